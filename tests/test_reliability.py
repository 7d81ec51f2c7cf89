"""A run is new, resumable or finished, whatever ends a training; and a call leaves the process as it was."""

import csv
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import numpy as np
import pyro
import pytest
import torch
from pyro import poutine

from pyro_vae import checkpoint, compare_estimators, evaluate, fit, load_run, prediction, training
from pyro_vae.annealing import annealed
from pyro_vae.cli import main
from pyro_vae.estimators import DReG
from pyro_vae.guides import AmortizedGuide
from pyro_vae.models import VAE
from pyro_vae.svi import SVI, NonFiniteLossError
from pyro_vae.training import Interrupted, _validation_bound

X = torch.rand(60, 4, generator=torch.Generator().manual_seed(0)).round()
ADAM = functools.partial(torch.optim.Adam, lr=1e-2, fused=True)


class KilledError(BaseException):
    """In the place of a SIGKILL: nothing catches it."""


def pair():
    torch.manual_seed(0)
    model = VAE((4,), latent_dim=2)
    return model, AmortizedGuide(model)


def go(*, programs=None, data=X, **options):
    settings = {"epochs": 4, "batch_size": 20, "optimizer": ADAM, "progress": False, "compile": False}
    return fit(*(programs or pair()), data, **{**settings, **options})


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(run):
    return torch.cat([p.detach().flatten() for p in (*run.model.parameters(), *run.guide.parameters())])


def kill(*_):
    raise KilledError


@pytest.fixture
def finished(tmp_path):
    return go(out=tmp_path / "run", valid=X, patience=4)


# ------------------------------------------------------------ the old stays until the new is there


def test_a_failed_resume_leaves_a_finished_run_as_it_was(finished):
    before = contents(finished.path)
    with pytest.raises(NonFiniteLossError) as caught:
        go(
            resume=finished.path,
            epochs=40,
            valid=X,
            patience=40,
            optimizer=functools.partial(torch.optim.Adam, lr=1e30, fused=True),
        )
    assert caught.value.run == finished.path
    for name in ("model.safetensors", "checkpoints/last.safetensors", "config.toml"):
        assert contents(finished.path)[Path(name)] == before[Path(name)], name
    again = load_run(finished.path)
    assert torch.equal(weights(again), weights(finished)) and again.history == finished.history


def test_a_failed_beginning_leaves_the_run_that_was_to_be_overwritten(finished, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        go(out=finished.path, overwrite=True, data=1 - X)
    assert caught.value.filename == str(finished.path / "checkpoints" / "last.safetensors")
    monkeypatch.undo()
    assert torch.equal(weights(load_run(finished.path)), weights(finished))
    other = go(out=finished.path, overwrite=True, data=1 - X)
    assert torch.equal(weights(load_run(finished.path)), weights(other))
    assert not torch.equal(weights(other), weights(finished))


def test_the_best_weights_are_those_of_the_history_after_a_kill(tmp_path, monkeypatch):
    """Killed nine epochs after the last save: what came later is forgotten, the best weights too."""

    def timed(run):
        monkeypatch.setattr(training, "SAVE_EVERY", -1 if len(run.history) == 2 else 1e9)
        if len(run.history) == 12:
            kill()

    out, options = tmp_path / "run", {"valid": X[:30], "patience": 50}
    with pytest.raises(KilledError):
        go(out=out, epochs=50, callbacks=[timed], **options)
    slow = functools.partial(torch.optim.Adam, lr=1e-6, fused=True)
    run = go(resume=out, epochs=5, optimizer=slow, **options)
    svi = SVI(run.model, run.guide, ADAM, pyro.infer.Trace_ELBO())
    found = _validation_bound(svi, training.as_data(X[:30]), lambda rows: 1.0, 160, 0)
    assert len(run.history) == 5
    assert found == pytest.approx(max(record["valid"] for record in run.history), abs=1e-6)


def test_a_run_under_way_is_loaded_with_its_own_history(tmp_path, monkeypatch):
    """Lines that were written after the state was saved describe no weights that there are."""
    monkeypatch.setattr(training, "SAVE_EVERY", 1e9)
    with pytest.raises(KilledError):
        go(out=tmp_path / "run", callbacks=[lambda run: kill() if len(run.history) == 3 else None])
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert load_run(tmp_path / "run").history == []
    whole, resumed = go(out=tmp_path / "whole"), go(resume=tmp_path / "run")
    assert torch.equal(weights(whole), weights(resumed))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4]


def test_a_changed_configuration_is_told_and_not_taken(finished, capsys):
    path = finished.path / "config.toml"
    path.write_text(path.read_text().replace("latent_dim = 2", "latent_dim = 3"))
    with pytest.warns(UserWarning, match="config.toml is not the configuration that the weights were trained by"):
        assert torch.equal(weights(load_run(finished.path)), weights(finished))
    assert main(["sample", str(finished.path), "--out", str(finished.path / "x.csv")]) == 0
    assert "note     " in capsys.readouterr().err


def test_runs_of_before_load_and_go_on(finished, tmp_path):
    """Their configuration is in config.toml alone, their best weights in a file of their own."""
    old = tmp_path / "old"
    shutil.copytree(finished.path, old)
    (old / ".lock").unlink()
    last, model = old / "checkpoints" / "last.safetensors", old / "model.safetensors"
    state, weights_only = checkpoint.load(last), checkpoint.load(model)
    checkpoint.save({**state, **state["best_weights"]}, old / "checkpoints" / "best.safetensors")
    checkpoint.save({k: v for k, v in state.items() if k not in ("best_weights", "config")}, last)
    checkpoint.save({k: v for k, v in weights_only.items() if k not in ("epochs", "config")}, model)
    again = load_run(old)
    assert torch.equal(weights(again), weights(finished)) and again.history == finished.history
    for path in (finished.path, old):
        go(resume=path, epochs=6, valid=X, patience=6)
    assert model.read_bytes() == (finished.path / "model.safetensors").read_bytes()
    assert not (old / "checkpoints" / "best.safetensors").exists()


# ------------------------------------------------------------ new, resumable or finished


def test_a_directory_in_which_nothing_was_saved_is_new(tmp_path, monkeypatch):
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", kill)
    monkeypatch.setattr(checkpoint, "discard_run", lambda path: None)
    with pytest.raises(KilledError):
        go(out=tmp_path / "run")
    monkeypatch.setattr(checkpoint, "save", save)
    (tmp_path / "run" / "checkpoints" / ".last.safetensors.999999999").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="expected a run's checkpoints in .*, found none: .* begin anew"):
        go(resume=tmp_path / "run")
    go(out=tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["last.safetensors"]
    with pytest.raises(FileExistsError, match="expected a new or empty directory"):
        go(out=tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("of a person")
    with pytest.raises(FileExistsError, match="expected a new or empty directory"):
        go(out=tmp_path / "mine")


def test_temporaries_of_ended_processes_are_cleared(finished):
    folder = finished.path / "checkpoints"
    left, others = folder / ".last.safetensors.999999999", folder / f".last.safetensors.{os.getppid()}"
    for path in (left, others):
        path.write_bytes(b"half")
    go(resume=finished.path, epochs=6, valid=X)
    assert not left.exists() and others.exists()


def test_one_process_trains_a_run(finished):
    with (
        filelock.FileLock(finished.path / ".lock"),
        pytest.raises(FileExistsError, match="to be trained by one process, got a second: wait"),
    ):
        go(resume=finished.path, epochs=6)
    assert load_run(finished.path).history == finished.history
    go(resume=finished.path, epochs=6)


def test_one_training_runs_in_a_process(tmp_path):
    refused = []

    def second(run):
        def other():
            try:
                go(out=tmp_path / "second")
            except ValueError as error:
                refused.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    go(out=tmp_path / "first", epochs=1, callbacks=[second])
    assert "expected one training at a time in a process" in refused[0] and not (tmp_path / "second").exists()


@pytest.mark.parametrize("ending", ["interrupt", "overflow"])
def test_the_advice_names_the_run_itself(ending, tmp_path, monkeypatch, capsys):
    """Another run that has begun since is `latest`."""
    monkeypatch.chdir(tmp_path)
    fit_ = training.fit

    def disturbed(*args, callbacks, **options):
        def end(run):
            checkpoint.new_run(None)
            if ending == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            else:
                with torch.no_grad():
                    next(run.model.parameters()).fill_(torch.nan)

        return fit_(*args, callbacks=[end], **options)

    monkeypatch.setattr(training, "fit", disturbed)
    status = main(
        ["fit", "--epochs", "3", "--patience", "null", "--model.latent_dim", "2", "--evaluate.num_samples", "2"]
    )
    error = capsys.readouterr().err
    assert status == (130 if ending == "interrupt" else 1)
    assert "pyro-vae fit --resume runs/0001" in error and "runs/0002" not in error


def test_what_is_interrupted_tells_its_directory(tmp_path):
    with pytest.raises(Interrupted) as caught:
        go(out=tmp_path / "run", callbacks=[lambda run: os.kill(os.getpid(), signal.SIGINT)])
    assert caught.value.run == tmp_path / "run"
    assert torch.equal(weights(go(resume=tmp_path / "run")), weights(go(out=tmp_path / "whole")))


# ------------------------------------------------------------ the process


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_a_training_is_the_same_in_every_context(context, tmp_path):
    expected = weights(go(out=tmp_path / "usual", valid=X))
    programs = pair()
    with context():
        run = go(programs=programs, out=tmp_path / "within", valid=X)
    assert torch.equal(weights(run), expected)


def test_data_made_under_inference_mode_are_taken_and_models_are_not(tmp_path):
    with torch.inference_mode():
        x, programs = X.clone(), pair()
    assert torch.equal(weights(go(data=x, out=tmp_path / "run")), weights(go(out=tmp_path / "usual")))
    with pytest.raises(ValueError, match=r"expected a model whose parameters can be trained, .* make it outside"):
        go(programs=programs, out=tmp_path / "other")


def test_handlers_around_are_refused(tmp_path):
    with poutine.scale(scale=2.0), pytest.raises(ValueError, match="fit outside of Pyro's handlers, .*ScaleMessenger"):
        go(out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


SCRIPT = """
import multiprocessing, sys, tempfile, threading, torch
from pyro_vae import evaluate, fit
from pyro_vae.models import VAE
from pyro_vae.guides import AmortizedGuide
sys.stderr = None
model = VAE((4,), latent_dim=2)
guide = AmortizedGuide(model)
run = fit(model, guide, torch.ones(20, 4), epochs=1, batch_size=10, out=tempfile.mkdtemp())
evaluate(model, guide, torch.ones(20, 4), num_samples=3)
assert threading.active_count() == 1, threading.enumerate()
assert multiprocessing.get_start_method(allow_none=True) is None
multiprocessing.set_start_method("spawn")
print("as it was")
"""


def in_a_process(command, cwd=None, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **more}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_start_method_and_threads_are_left_to_the_caller():
    found = in_a_process([sys.executable, "-c", SCRIPT])
    assert found.stdout == "as it was\n", found.stderr


@pytest.mark.parametrize("streams", [">&- 2>&-", "| head -c 1", ""])
def test_streams_that_are_closed_or_narrow_cost_no_work(streams, tmp_path):
    command = f"{sys.executable} -m pyro_vae fit --epochs 1 --evaluate.num_samples 2 --out run {streams}"
    found = in_a_process(["bash", "-c", command], cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "run" / "model.safetensors").exists() and (tmp_path / "run" / "report.html").exists()
    if not streams:
        assert "+-" in found.stdout and found.stdout.isascii()


# ------------------------------------------------------------ arguments


INFINITE = X.clone()
INFINITE[5, 1] = torch.inf
REFUSED = {
    "an infinite value of the validation data": ({"valid": INFINITE}, "finite validation data, got 1"),
    "validation data of another width": ({"valid": X[:, :2]}, r"like the training data.*\(4,\), got .*\(2,\)"),
    "validation data with a keyword": ({"valid": (X, {"u": X})}, "like the training data"),
    "values whose squares overflow": (
        {"data": X * 1e30},
        r"squares are numbers of torch.float32, .* got 1e\+30: stand",
    ),
    "half an epoch": ({"epochs": 2.5}, "epochs to be a whole number >= 1, got 2.5"),
    "epochs as text": ({"epochs": "3"}, "epochs to be a whole number >= 1, got '3'"),
    "half a datum": ({"batch_size": 2.5}, "batch_size to be a whole number >= 1, got 2.5"),
    "no seed": ({"seed": None}, "seed to be a whole number >= 0, got None"),
    "a seed beyond 63 bits": ({"seed": 2**64}, "seed to be a whole number >= 0, got 18446744073709551616"),
    "true patience": ({"patience": True, "valid": X}, "patience to be a whole number >= 1, got True"),
    "a norm as text": ({"clip_norm": "1"}, "clip_norm > 0, got '1'"),
    "a rate that becomes negative": (
        {"learning_rate": lambda epoch: 0.5 - epoch, "epochs": 3},
        r"learning_rate to be a number >= 0 at each epoch, got -0.01\d* at epoch 0.51: mend",
    ),
    "a weight that becomes negative": ({"kl_weight": lambda epoch: -1.0}, "kl_weight to be a number >= 0 .*, got -1.0"),
    "a rate that is none": ({"learning_rate": lambda epoch: None}, "learning_rate to be a number >= 0 .*, got None"),
    "a rate in words": ({"learning_rate": lambda epoch: "x"}, "learning_rate to be a number >= 0 .*, got 'x'"),
    "an infinite rate": ({"learning_rate": lambda epoch: 1 / max(epoch, 1e-320)}, "learning_rate to be a number"),
    "a bad schedule": ({"kl_weight": "warm"}, "kl_weight to be a positive number or a function"),
}


@pytest.mark.parametrize("kind", [float, np.float32, torch.tensor])
def test_schedules_may_return_what_is_one_number(kind, tmp_path):
    histories = []
    for name, made in (("own", kind), ("float", float)):
        run = go(
            out=tmp_path / name, learning_rate=lambda epoch, m=made: m(0.5), kl_weight=lambda epoch, m=made: m(0.25)
        )
        histories.append([(record["learning_rate"], record["kl_weight"], record["bound"]) for record in run.history])
    assert histories[0] == histories[1]


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_are_looked_at_before_anything_is_written(name, tmp_path):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        go(out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------ what is written


def test_cells_that_a_spreadsheet_would_run_are_text(finished, tmp_path):
    """Ids, labels and headers of others come back in files of codes."""
    rows = [f"{name},{i % 3},{i % 5}" for i, name in enumerate(["=1+1", "+cmd|x", "-2", "@SUM(A1)", "plain"] * 6)]
    (tmp_path / "t.csv").write_text("id,=a,b\n" + "\n".join(rows) + "\n")
    out = tmp_path / "codes.csv"
    arguments = ["--data", str(tmp_path / "t.csv"), "--data.id", "id"]
    run = tmp_path / "of_table"
    quick = ["--epochs", "1", "--model.latent_dim", "1", "--evaluate.num_samples", "2", "--out", str(run)]
    assert main(["fit", *arguments, *quick]) == 0
    assert main(["encode", str(run), "--split", "all", "--out", str(out)]) == 0
    ids = {row["id"] for row in csv.DictReader(out.read_text(encoding="utf-8").splitlines())}
    assert ids == {"'=1+1", "'+cmd|x", "-2", "'@SUM(A1)", "plain"}
    assert main(["sample", str(run), "--num", "3", "--out", str(tmp_path / "x.csv")]) == 0
    assert (tmp_path / "x.csv").read_text().startswith("'=a,b\n")


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    """As it fills in the middle of a training."""
    opened = Path.open

    def full(self, mode="r", **options):
        if mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(self, mode, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        go(out=tmp_path / "run")
    assert caught.value.filename == str(tmp_path / "run" / "metrics.jsonl")


CHAINS = {"num_temperatures": 4, "leapfrog_steps": 1, "progress": False}


def scores(model, guide):
    return [
        float(evaluate(model, guide, X, num_samples=5, progress=False).log_evidence),
        float(annealed(model, X[:5], **CHAINS)),
        float(prediction.sample(model, 4).sum()),
        float(prediction.encode(guide, X, num_samples=3).draws.sum()),
        float(prediction.reconstruct(model, guide, X).sum()),
    ]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_scores_are_the_same_in_every_context(context):
    model, guide = pair()
    guide(X)
    expected = scores(model, guide)
    with context():
        assert scores(model, guide) == expected


def test_estimators_are_compared_without_the_callers_context():
    model, guide = pair()
    few = {"num_particles": (2,), "num_gradients": 4, "num_references": 0, "num_samples": 2, "progress": False}
    with torch.inference_mode():
        assert compare_estimators(model, guide, X, [DReG], **few).table["bound"].notna().all()
