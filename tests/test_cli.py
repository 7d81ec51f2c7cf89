"""The command line from end to end, on a small run."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import pyro_vae
from pyro_vae import load_dataset, load_run
from pyro_vae.cli import HELP, main
from pyro_vae.evaluation import evaluate

TINY = [
    *("--epochs", "2", "--evaluate.num_samples", "5"),
    *("--model.latent_dim", "2", "--model.decoder.hidden", "[8]", "--guide.encoder.hidden", "[8]"),
]


def command(line, *more):
    status = main([*line.split(), *more])
    assert status == 0, f"pyro-vae {line} ended with exit code {status}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with a run."""
    before = Path.cwd()
    folder = tmp_path_factory.mktemp("work")
    os.chdir(folder)
    try:
        command("fit", *TINY)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """A copy of it, to work in."""
    shutil.copytree(folder, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bounds(run):
    return [(record["bound"], record["valid"]) for record in load_run(run).history]


def weights(run):
    run = load_run(run)
    return {f"{i} {name}": w for i, m in enumerate((run.model, run.guide)) for name, w in m.state_dict().items()}


def assert_same_run(a, b):
    assert bounds(a) == bounds(b)
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("line", ["", "--help", "--version", *(f"{name} --help" for name in HELP if name)])
def test_help_needs_no_torch(line):
    code = f"""
import sys
from pyro_vae.cli import main
assert main({line.split()!r}) == 0
assert not {{"torch", "pyro", "numpy", "jsonargparse"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pyro-vae 0." if line == "--version" else "usage: pyro-vae")


def test_help_is_short_and_names_every_option(capsys):
    import inspect

    from pyro_vae.cli import COMMANDS, NOT_ASKED
    from pyro_vae.training import fit

    assert set(HELP) - {""} == set(COMMANDS)
    for name in COMMANDS:
        assert f"\n  {name}  " in HELP[""]
        assert len(HELP[name].splitlines()) <= 50
        assert max(map(len, HELP[name].splitlines())) <= 110
    for name in set(inspect.signature(fit).parameters) - NOT_ASKED:
        assert f"--{name}" in HELP["fit"]
    for name in set(inspect.signature(load_dataset).parameters) - {"name_or_path"}:
        assert f"--data.{name}" in HELP["fit"]
    for name, function in COMMANDS.items():
        if name != "fit":
            for option in set(inspect.signature(function).parameters) - {"run"}:
                assert f"--{option}" in HELP[name]


@pytest.mark.parametrize("role", ["model", "guide.family", "loss", "optimizer", "kl_weight", "model.likelihood"])
def test_class_help(role, capsys):
    expected = {
        "model": "LinearVAE",
        "guide.family": "DiagonalNormal",
        "loss": "TraceMeanField_ELBO",
        "optimizer": "AdamW",
        "kl_weight": "Warmup",
        "model.likelihood": "total_count",
    }
    command(f"fit --{role}.help")
    assert expected[role] in capsys.readouterr().out


def test_doctor(capsys):
    assert main(["doctor"]) in (0, 1)
    assert "python" in capsys.readouterr().out


def test_fit_tells_what_it_does(empty, capsys):
    command("fit --out run", *TINY)
    out = capsys.readouterr().out
    assert "data     digits: 1,797 handwritten digits" in out
    assert "Binomial likelihood because the values are whole numbers from 0 to 16" in out
    assert "device   " in out
    assert "log_evidence" in out
    assert f"report   {(empty / 'run' / 'report.html').as_uri()}" in out
    assert (empty / "run" / "report.html").stat().st_size > 10_000
    suggestions = [line.strip() for line in out.split("try:\n")[1].splitlines()]
    assert len(suggestions) == 3
    for line in suggestions:
        assert line.startswith("pyro-vae ")
        extra = ["--evaluate.num_samples", "5"] if " fit " in line else []
        command(line.removeprefix("pyro-vae "), *extra)


def test_configuration_of_a_run_repeats_it(here):
    command("fit --config runs/0001/config.toml --evaluate.num_samples 5")
    assert_same_run("runs/0001", "runs/0002")
    assert Path("runs/latest").resolve().name == "0002"
    command("fit --config runs/0001/config.toml --evaluate.num_samples 5 --seed 1")
    assert bounds("runs/0003") != bounds("runs/0001")


def test_resumed_run_equals_an_uninterrupted_one(empty):
    command("fit --out whole --epochs 4", *TINY[2:])
    command("fit --out parts --epochs 2", *TINY[2:])
    assert len(bounds("parts")) == 2
    command("fit --resume parts --epochs 4 --evaluate.num_samples 5")
    assert_same_run("whole", "parts")
    assert tomllib.loads(Path("parts/config.toml").read_text())["epochs"] == 4


def test_resume_takes_a_new_learning_rate(empty):
    command("fit --out run", *TINY)
    command("fit --resume run --epochs 3 --optimizer.lr 1e-5 --evaluate.num_samples 5")
    assert [record["learning_rate"] for record in load_run("run").history] == [1e-3, 1e-3, 1e-5]


def test_interrupted_fit_says_how_to_go_on(empty, monkeypatch, capsys):
    import signal

    from pyro_vae.svi import SVI

    step = SVI.step_async

    def interrupting(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        if self.steps == 5:
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(SVI, "step_async", interrupting)
    assert main(["fit", *TINY]) == 130
    error = capsys.readouterr().err
    assert error == "pyro-vae: interrupted, saved at step 5; to go on: pyro-vae fit --resume runs/0001\n"
    monkeypatch.setattr(SVI, "step_async", step)
    command("fit --resume runs/0001 --evaluate.num_samples 5")
    command("fit --out whole", *TINY)
    assert_same_run("whole", "runs/0001")


def test_diverging_fit_says_how_to_go_on(empty, monkeypatch, capsys):
    from pyro_vae.svi import SVI, NonFiniteLossError

    def diverging(self, *args, **kwargs):
        raise NonFiniteLossError("step 3: the loss is nan")

    monkeypatch.setattr(SVI, "step_async", diverging)
    assert main(["fit", *TINY]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "step 3: the loss is nan" in error and "pyro-vae fit --resume runs/0001 --optimizer.lr 1e-4" in error


def test_bug_is_one_line_and_shows_its_traceback_on_demand(here, monkeypatch, capsys):
    import pyro_vae.training

    def broken(*args, **kwargs):
        raise KeyError("a bug\nof two lines")

    monkeypatch.setattr(pyro_vae.training, "load_run", broken)
    assert main(["evaluate", "runs/0001"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "KeyError" in error and "PYRO_VAE_TRACEBACK=1" in error
    monkeypatch.setenv("PYRO_VAE_TRACEBACK", "1")
    with pytest.raises(KeyError, match="a bug"):
        main(["evaluate", "runs/0001"])


@pytest.mark.parametrize(
    "options", ["", "--kl_weight Warmup --kl_weight.epochs 3 --loss TraceMeanField_ELBO --patience null"]
)
def test_printed_configuration_is_the_same_again(empty, capsys, options):
    line = f"fit --print_config --model.likelihood Binomial --model.likelihood.total_count 17 {options}"
    command(line, *TINY)
    printed = capsys.readouterr().out
    assert not list(empty.iterdir())
    assert tomllib.loads(printed)["model"]["init_args"]["likelihood"]["init_args"] == {"total_count": 17}
    Path("config.toml").write_text(printed)
    command("fit --config config.toml --print_config")
    assert capsys.readouterr().out == printed


def test_toml_and_yaml_give_the_same(empty):
    Path("a.toml").write_text("""
data = "digits"
epochs = 2
model = {class_path = "VAE", init_args = {latent_dim = 2, decoder = {class_path = "MLP", init_args = {hidden = [8]}}}}
guide = {encoder = {hidden = [8]}}
optimizer = {class_path = "Adam", init_args = {lr = 1e-2}}
evaluate = {num_samples = 5}
""")
    Path("b.yaml").write_text("""
data: {name_or_path: digits}
epochs: 2
model:
  class_path: pyro_vae.models.VAE
  init_args:
    latent_dim: 2
    decoder: {class_path: pyro_vae.nn.MLP, init_args: {hidden: [8]}}
guide: {class_path: AmortizedGuide, init_args: {encoder: {class_path: MLP, init_args: {hidden: [8]}}}}
optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.01}}
evaluate: {num_samples: 5}
""")
    command("fit --config a.toml --out a")
    command("fit --config b.yaml --out b")
    assert_same_run("a", "b")
    command("fit --config a.toml --out c --optimizer.lr 1e-3")
    assert bounds("c") != bounds("a")


def test_a_function_as_a_prior_by_import_path(empty, monkeypatch):
    Path("my_priors.py").write_text("""
import pyro
import pyro.distributions as dist
import torch


def topics():
    strength = pyro.sample("strength", dist.Gamma(torch.ones(1), 1.0).to_event(1))
    return pyro.sample("z", dist.Dirichlet(strength * torch.ones(3)))
""")
    monkeypatch.setattr(sys, "path", sys.path[:])
    command("fit --model.prior my_priors.topics --epochs 2 --evaluate.num_samples 5")
    run = load_run("runs/0001")
    assert run.model.prior.__name__ == "topics" and list(run.guide.heads) == ["strength", "z"]
    sys.modules.pop("my_priors")


def test_own_model_by_import_path(empty, monkeypatch):
    Path("my_models.py").write_text("""
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule


class Factors(PyroModule):
    def __init__(self, event_shape, width: int = 3):
        super().__init__()
        self.shape, self.width = event_shape, width
        self.linear = torch.nn.Linear(width, event_shape[0])

    def forward(self, x=None, *, num_data=None):
        with pyro.plate("data", num_data if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.width), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.linear(z), 1.0).to_event(1), obs=x)
""")
    x = np.random.default_rng(0).normal(size=(60, 4))
    np.save("x.npy", x)
    path = sys.path[:]
    command("fit --data x.npy --model my_models.Factors --model.width 2 --epochs 2 --evaluate.num_samples 5")
    command("evaluate runs/latest --num_samples 5")
    command("encode runs/latest --out codes.npz")
    assert np.load("codes.npz")["z_mean"].shape == (6, 2)
    assert sys.path == path
    sys.modules.pop("my_models")


def test_evaluate(here, capsys):
    command("evaluate runs/latest --num_samples 7 --split valid --out scores.json")
    run, digits = load_run("runs/0001"), load_dataset("digits")
    expected = evaluate(run.model, run.guide, digits.valid, num_samples=7)
    written = json.loads(Path("scores.json").read_text())
    assert written["elbo"]["value"] == float(expected.elbo)
    assert written["split"] == "valid" and written["num_data"] == 250
    assert f"log_evidence  {expected.log_evidence}" in capsys.readouterr().out


def test_sample(here):
    command("sample runs/latest --num 5")
    command("sample runs/latest --num 5 --out samples.csv")
    x = np.load("samples.npz")["x"]
    assert x.shape == (5, 1, 8, 8)
    assert ((x == x.round()) & (x >= 0) & (x <= 16)).all()
    rows = np.loadtxt("samples.csv", delimiter=",", skiprows=1)
    assert (rows == x.reshape(5, 64)).all()
    assert main(["sample", "runs/latest"]) == 2
    command("sample runs/latest --num 3 --overwrite")
    assert len(np.load("samples.npz")["x"]) == 3


def test_encode_and_reconstruct(here):
    command("encode runs/latest --num_samples 3 --split all --out codes.npz")
    command("encode runs/latest --out codes.csv")
    command("reconstruct runs/latest --out x.npz")
    codes = np.load("codes.npz")
    assert codes["z_mean"].shape == codes["z_scale"].shape == (1797, 2)
    assert codes["z_draws"].shape == (3, 1797, 2)
    assert codes["ids"].tolist() == list(range(1797))
    header, *rows = Path("codes.csv").read_text().splitlines()
    assert header == "id,label,z_mean_0,z_mean_1,z_scale_0,z_scale_1"
    test = load_dataset("digits").test
    last = np.array([row.split(",") for row in rows], dtype=float)
    assert (last[:, 0] == test.ids).all() and (last[:, 1] == test.labels.numpy()).all()
    np.testing.assert_allclose(last[:, 2:4], codes["z_mean"][test.ids], rtol=1e-5)
    assert np.load("x.npz")["x"].shape == (250, 1, 8, 8)


def test_report(here, capsys):
    before = Path("runs/0001/report.html").stat().st_mtime_ns
    command("report runs/0001 --num_samples 5")
    assert Path("runs/0001/report.html").stat().st_mtime_ns > before
    assert "file://" in capsys.readouterr().out


def test_table_in_its_own_units(empty):
    generator = np.random.default_rng(0)
    x = generator.normal([100.0, -3.0], [20.0, 0.1], size=(200, 2))
    lines = ["name,height,depth,kind", *(f"n{i},{a},{b},{'ab'[i % 2]}" for i, (a, b) in enumerate(x))]
    Path("table.csv").write_text("\n".join(lines))
    Path("other.csv").write_text("\n".join([lines[0], *lines[21:61]]))
    command("fit --data table.csv --data.label kind --data.id name --model LinearVAE --model.latent_dim 1 --epochs 30 "
            "--optimizer.lr 1e-2 --evaluate.num_samples 5")  # fmt: skip
    assert tomllib.loads(Path("runs/0001/config.toml").read_text())["data"] == {
        "name_or_path": str(empty / "table.csv"),
        "label": "kind",
        "id": "name",
    }
    command("sample runs/latest --num 2000 --out samples.csv")
    rows = np.loadtxt("samples.csv", delimiter=",", skiprows=1)
    assert Path("samples.csv").read_text().startswith("height,depth\n")
    assert abs(rows[:, 0].mean() - 100) < 10 and abs(rows[:, 1].mean() + 3) < 0.05
    command("encode runs/latest --split all --out codes.csv")
    assert Path("codes.csv").read_text().splitlines()[0] == "id,label,z_mean_0,z_scale_0"
    command("encode runs/latest --data other.csv --split all --out other_codes.csv")
    codes, others = (
        {row.split(",")[0]: row.split(",")[2:] for row in Path(name).read_text().splitlines()[1:]}
        for name in ("codes.csv", "other_codes.csv")
    )
    assert len(codes) == 200 and len(others) == 40
    for name, code in others.items():  # the same datum has the same code, whatever data set it comes in
        np.testing.assert_allclose(
            np.array(code, dtype=float), np.array(codes[name], dtype=float), rtol=1e-4, atol=1e-5
        )


def test_binarized_data_with_a_convolutional_pair(empty):
    pair = "--model.decoder ConvolutionalDecoder --model.decoder.channels [4] --guide.family DiagonalNormal"
    pair += " --guide.encoder ConvolutionalEncoder --guide.encoder.channels [4]"
    command(f"fit --data digits --data.binarize dynamic {pair} --epochs 1 --evaluate.num_samples 5")
    config = tomllib.loads(Path("runs/0001/config.toml").read_text())
    assert config["data"] == {"name_or_path": "digits", "binarize": "dynamic"}
    assert config["model"]["init_args"]["likelihood"]["class_path"].endswith("Bernoulli")
    assert config["guide"]["init_args"]["encoder"]["init_args"] == {"channels": [4]}
    command("evaluate runs/0001 --num_samples 5")


def test_small_own_data_need_no_options(empty):
    np.save("x.npy", np.random.default_rng(0).normal(size=(20, 3)))
    command("fit --data x.npy --epochs 1 --evaluate.num_samples 5")
    assert tomllib.loads(Path("runs/0001/config.toml").read_text())["batch_size"] == 16


def write_csv(path, names, x):
    np.savetxt(path, x, delimiter=",", header=",".join(names), comments="", fmt="%.9g")


@pytest.fixture(scope="module")
def on_a_table(tmp_path_factory):
    """A run of a LinearVAE on a table of correlated columns, far from standardised; its folder."""
    folder = tmp_path_factory.mktemp("on_a_table")
    before = Path.cwd()
    os.chdir(folder)
    try:
        generator = np.random.default_rng(0)
        z = generator.normal(size=(400, 1))
        x = np.array([1000.0, -3.0, 0.5]) + np.array([50.0, 0.1, 2.0]) * (z + 0.1 * generator.normal(size=(400, 3)))
        write_csv("table.csv", ["id", "x_id", "label"], x)
        np.save("x.npy", x)
        test = load_dataset("table.csv").test.ids
        write_csv("other.csv", ["id", "x_id", "label"], x[test])  # would be standardised otherwise by themselves
        command("fit --data table.csv --model LinearVAE --model.latent_dim 1 --epochs 150 --optimizer.lr 2e-2 "
                "--evaluate.num_samples 5")  # fmt: skip
    finally:
        os.chdir(before)
    return folder


def test_reconstructions_are_in_the_units_of_the_data(on_a_table, tmp_path):
    run, out = on_a_table / "runs" / "0001", tmp_path / "x.npz"
    command(f"reconstruct {run} --split all --num_samples 50 --out {out}")
    written, x = np.load(out), np.load(on_a_table / "x.npy")
    error = written["x"] - x[written["ids"]]
    assert sorted(written["ids"]) == list(range(400))
    assert (error.std(axis=0) < 0.3 * x.std(axis=0)).all()
    assert (abs(error.mean(axis=0)) < 0.2 * x.std(axis=0)).all()


def test_features_called_id_and_label_lose_no_ids(on_a_table, tmp_path):
    run = on_a_table / "runs" / "0001"
    command(f"reconstruct {run} --out {tmp_path / 'x.csv'}")
    command(f"reconstruct {run} --out {tmp_path / 'x.npz'}")
    header = (tmp_path / "x.csv").read_text().splitlines()[0]
    rows, written = np.loadtxt(tmp_path / "x.csv", delimiter=",", skiprows=1), np.load(tmp_path / "x.npz")
    assert header == "id,x_id,x_x_id,label"
    assert (rows[:, 0] == written["ids"]).all()
    np.testing.assert_allclose(rows[:, 1:], written["x"], rtol=1e-5)


def test_the_same_rows_elsewhere_have_the_same_score(on_a_table, tmp_path):
    run = on_a_table / "runs" / "0001"
    command(f"evaluate {run} --num_samples 20 --out {tmp_path / 'own.json'}")
    command(f"evaluate {run} --num_samples 20 --out {tmp_path / 'other.json'} --data {on_a_table / 'other.csv'}")
    own, other = (json.loads((tmp_path / name).read_text()) for name in ("own.json", "other.json"))
    assert own["num_data"] == other["num_data"] == 40
    for name in ("elbo", "log_evidence"):
        assert own[name]["value"] == pytest.approx(other[name]["value"], abs=1e-4)


def test_all_splits_keep_each_label_beside_its_id(here):
    from sklearn.datasets import load_digits

    command("encode runs/latest --split all --out codes.npz")
    written = np.load("codes.npz")
    assert sorted(written["ids"]) == list(range(1797))
    assert (written["labels"].astype(int) == load_digits().target[written["ids"]]).all()


@pytest.mark.parametrize("line", ["--help", "evaluate runs/0001 --num_samples 5"])
def test_closed_output_ends_the_command_in_silence(here, line):
    read, write = os.pipe()
    os.close(read)
    code = f"import sys; from pyro_vae.cli import main; sys.exit(main({line.split()!r}))"
    paths = os.pathsep.join(filter(None, [str(Path(pyro_vae.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths},
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_own_files_shadow_no_modules(empty, monkeypatch):
    Path("statistics.py").write_text("raise RuntimeError('the wrong statistics')")
    monkeypatch.delitem(sys.modules, "statistics", raising=False)
    assert main(["fit", "--model", "statistics.NormalDist", "--print_config"]) == 2
    assert Path(sys.modules["statistics"].__file__).parent != empty


def test_optimizer_of_pyro_is_its_namesake_of_torch(empty, capsys):
    command("fit --print_config --optimizer pyro.optim.Adam --optimizer.optim_args", '{"lr":0.01}')
    printed = tomllib.loads(capsys.readouterr().out)
    assert printed["optimizer"] == {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}


def test_own_loss(empty, monkeypatch, capsys):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    Path("my_losses.py").write_text("import pyro\n\nclass Mine(pyro.infer.Trace_ELBO):\n    pass\n")
    command("fit --print_config --loss my_losses.Mine")
    assert tomllib.loads(capsys.readouterr().out)["loss"]["class_path"] == "my_losses.Mine"
    sys.modules.pop("my_losses")
