"""Bad input, one table: exit code 2, one line that says what was expected, what came and the mend, nothing written."""

import errno
import os
import pickle
import re
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch

from pyro_vae import checkpoint
from pyro_vae.cli import main

TINY = ["--model.decoder.hidden", "[4]", "--guide.encoder.hidden", "[4]", "--model.latent_dim", "2"]
RUN = "runs/0001"


class Payload:
    """What a hostile file would run when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("payload-has-run",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, to be copied."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("trained"))
    try:
        status = main(["fit", "--epochs", "1", "--evaluate.num_samples", "5", "--out", "run", *TINY])
        return Path("run").absolute() if status == 0 else pytest.fail("expected a run to spoil, got none")
    finally:
        os.chdir(before)


def table(name="data.npy", change=lambda x: x, rows=40):
    """Write a table of real values, changed."""
    x = np.random.default_rng(0).normal(size=(rows, 3)).astype("float32")
    np.save(name, change(x), allow_pickle=True)


def cut(path, share=0.5):
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: int(share * len(content))])


def npz():
    np.savez("data.npz", x=np.zeros((40, 30)))
    cut("data.npz")


def pt(content=None):
    torch.save(torch.zeros(40, 30) if content is None else content, "data.pt")


def cut_pt():
    pt()
    cut("data.pt")


def csv(text):
    Path("data.csv").write_text(text)


def rows(last="3,4", count=30):
    return "a,b\n" + "1,2.5\n" * count + last + "\n"


def idx(cls="MNIST"):
    raw = Path("root", cls, "raw")
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"\0\0\x08\x03")


def mat():
    Path("root/freyfaces").mkdir(parents=True)
    Path("root/freyfaces/frey_rawface.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(40))


def config(text, name="config.toml"):
    Path(name).write_text(text)


def grey():
    table(change=lambda x: np.random.default_rng(0).uniform(size=x.shape))


def spoil(trained, name, how):
    shutil.copytree(trained, RUN)
    how(Path(RUN, name))


def of_before(run):
    """A run as earlier versions wrote it, whose configuration is in config.toml alone."""
    for path in (run / "model.safetensors", run / "checkpoints" / "last.safetensors"):
        state = checkpoint.load(path)
        checkpoint.save(
            {name: value for name, value in state.items() if name not in ("config", "epochs", "schema", "as_they_are")},
            path,
        )


def wider(path):
    of_before(path.parent)
    path.write_text(path.read_text().replace("4,", "5,"))


def foreign(path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, path)


def nothing(*_):
    pass


def keep(trained):
    shutil.copytree(trained, RUN)


def offline(monkeypatch):
    import torchvision.datasets

    def interrupted(self, root, *args, **kwargs):
        folder = Path(root, "MNIST", "raw")
        folder.mkdir(parents=True)
        (folder / "train-images-idx3-ubyte").write_bytes(b"half")
        raise ConnectionResetError("connection reset by peer")

    Path("root").mkdir()
    monkeypatch.setattr(torchvision.datasets.MNIST, "__init__", interrupted)


def full_disk(monkeypatch):
    def write_bytes(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


def own(monkeypatch, name, text):
    """A module of the user's own."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    Path(f"{name}.py").write_text(text)


def own_model(monkeypatch, name, error):
    own(
        monkeypatch,
        name,
        f"""
import torch

class Net(torch.nn.Module):
    def __init__(self):
        raise {error}
""",
    )


def rewrite(trained, change, name="config.toml"):
    """A run whose configuration is another."""

    def changed(path):
        of_before(path.parent)
        table = tomllib.loads(path.read_text())
        change(table)
        path.write_text(tomli_w.dumps(table))

    spoil(trained, name, changed)


def dangle(table):
    table["guide"]["init_args"]["model"] = {"reference": "modle"}


def latest():
    Path("runs/latest").mkdir(parents=True)


# name: (arguments, what the message says, how the bad input is made: nothing, or of the run or the monkeypatch)
CASES = {
    "unknown command": ("fitt", r"expected one of fit, .*, got 'fitt': did you mean fit\?", None),
    "unknown option": ("fit --nosuch 3", r"an option, got --nosuch: see pyro-vae fit --help", None),
    "misspelt option": ("fit --epoch 3", r"an option, got --epoch: did you mean --epochs\?", None),
    "misspelt component": ("fit --modle.latent_dim 3", r"got --modle.latent_dim: see pyro-vae fit --help", None),
    "unknown option of a command": (f"evaluate {RUN} --nun_samples 3", r"got --nun_samples: did you mean", None),
    "unknown data option": ("fit --data.binarise static", r"got --data.binarise: did you mean --data.binarize", None),
    "unknown argument": (
        "fit --model.latent_dimm 3",
        r"got --model.latent_dimm: did you mean --model.latent_dim\?",
        None,
    ),
    "option without value": ("fit --epochs --seed 1", r"a value after --epochs, got --seed: --epochs VALUE", None),
    "stray word": ("fit digits", r"expected options, got 'digits': data go by --data digits", None),
    "no run": ("evaluate", r"expected one RUN, got none: pyro-vae evaluate runs/latest", None),
    "two runs": ("evaluate a b", r"expected one RUN, got a b: pyro-vae evaluate", None),
    "unknown class": ("fit --model VAEE", r"--model, one of VAE, .*LinearVAE.*, got 'VAEE': did you mean VAE\?", None),
    "unknown module": ("fit --model nowhere.Net", r"an import path.*, got 'nowhere.Net': No module", None),
    "unknown attribute": ("fit --model pyro_vae.models.Net", r"an import path.*got 'pyro_vae.models.Net'", None),
    "no class": (
        "fit --model.likelihood.total_count 3",
        r"a class for --model.likelihood, got only total_count: add",
        None,
    ),
    "missing argument": (
        "fit --model.likelihood Binomial",
        r"expected --model.likelihood.total_count.*got none: add",
        None,
    ),
    "wrong type": ("fit --epochs many", r"a whole number for --epochs, got 'many': give", None),
    "wrong fraction": ("fit --batch_size 1.5", r"a whole number or null for --batch_size, got '1.5': give", None),
    "wrong type of an argument": (
        "fit --model.latent_dim x",
        r"a whole number or null for --model.latent_dim, got 'x'",
        None,
    ),
    "wrong choice": (
        "fit --data.binarize maybe",
        r"one of none, static, dynamic for --data.binarize, got 'maybe'",
        None,
    ),
    "unknown key in a config": (
        "fit --config config.toml",
        r"got --epoch: did you mean --epochs",
        lambda: config("epoch = 3"),
    ),
    "unknown nested key": (
        "fit --config config.toml",
        r"got --model.width: see",
        lambda: config('[model]\nclass_path = "VAE"\n[model.init_args]\nwidth = 3'),
    ),
    "wrong type in a config": (
        "fit --config config.yaml",
        r"a whole number for --epochs, got \[3\]: give",
        lambda: config("epochs: [3]", "config.yaml"),
    ),
    "missing config": ("fit --config config.toml", r"a TOML or YAML file, got 'config.toml'", None),
    "empty config": (
        "fit --config config.toml",
        r"a table of settings.*, got an empty file: write",
        lambda: config(""),
    ),
    "no TOML": ("fit --config config.toml", r"expected TOML in config.toml, got", lambda: config("epochs = = 3")),
    "no YAML": ("fit --config c.yaml", r"expected YAML in c.yaml, got", lambda: config("a: [1, 2", "c.yaml")),
    "list as config": ("fit --config c.yaml", r"a table.*, got list: write", lambda: config("- 1\n- 2", "c.yaml")),
    "config of another kind": (
        "fit --config c.ini",
        r"ending in .toml, .yaml or .yml, got",
        lambda: config("a=1", "c.ini"),
    ),
    "missing data": ("fit --data ./data.npy", r"a path that exists, got './data.npy': correct", None),
    "unknown data": ("fit --data mnits", r"one of digits, mnist,.*got 'mnits': correct", None),
    "data of another kind": (
        "fit --data d.txt",
        r"a file ending in .npy.*got 'd.txt': convert",
        lambda: config("1", "d.txt"),
    ),
    "named data not there": ("fit --data mnist --data.root .", r"four files of MNIST.*: pass download=True", None),
    "empty file": (
        "fit --data d.npy",
        r"expected data in d.npy, got an empty file: write it",
        lambda: config("", "d.npy"),
    ),
    "truncated npy": (
        "fit --data data.npy",
        r"a numeric array in data.npy, got a truncated.*: save",
        lambda: (table(), cut("data.npy")),
    ),
    "truncated npz": (
        "fit --data data.npz",
        r"expected arrays in data.npz, got a foreign or truncated file: write",
        npz,
    ),
    "truncated pt": (
        "fit --data data.pt",
        r"expected a tensor.*data.pt, got a truncated or foreign file: write",
        cut_pt,
    ),
    "broken csv": (
        "fit --data data.csv",
        r"2 cells in line 2 of data.csv, got 1: mend that line",
        lambda: csv('a,b\n"1,2\n'),
    ),
    "truncated csv": (
        "fit --data data.csv",
        r"2 cells in line 32 of .*, got 1: mend that line",
        lambda: csv(rows("3")),
    ),
    "words in a csv": (
        "fit --data data.csv",
        r"numbers in column 'b'.*, got 'red'.*: leave such columns out with drop=",
        lambda: csv(rows("3,red")),
    ),
    "label not there": (
        "fit --data data.csv --data.label kind",
        r"one of the columns.*, got 'kind': correct",
        lambda: csv(rows()),
    ),
    "label without csv": (
        "fit --data data.npy --data.label kind",
        r"a .csv file.*, got 'data.npy': leave label= \(--data.label\) out",
        table,
    ),
    "truncated idx": (
        "fit --data mnist --data.root root",
        r"bytes in .*train-images.*, got 4 \(truncated.*: pass download",
        idx,
    ),
    "truncated mat": (
        "fit --data freyfaces --data.root root",
        r"a MATLAB file.*, got a truncated or foreign one.*: delete",
        mat,
    ),
    "wrong shape": ("fit --data data.npy", r"got shape \(40,\): reshape", lambda: table(change=lambda x: x[:, 0])),
    "too few data": ("fit --data data.npy", r"at least 10 rows.*, got 4: add data", lambda: table(rows=4)),
    "pickled npy": (
        "fit --data data.npy",
        r"a numeric array in data.npy, got pickled objects.*: save it anew",
        lambda: table(change=lambda x: np.array([Payload()] * 40, dtype=object)),
    ),
    "pickled pt": ("fit --data data.pt", r"a tensor.*, got pickled objects: write", lambda: pt({"x": Payload()})),
    "bare pickle": (
        "fit --data data.pt",
        r"a tensor.*data.pt, got a truncated or foreign file: write",
        lambda: Path("data.pt").write_bytes(pickle.dumps(Payload())),
    ),
    "NaN": (
        "fit --data data.npy",
        r"finite.*got 3 infinite.*row 7.*: fill",
        lambda: table(change=lambda x: np.where(np.arange(40)[:, None] == 7, -np.inf, x)),
    ),
    "infinity": ("fit --data data.csv", r"finite.*got 1 infinite or too large.*'b': fill", lambda: csv(rows("1,inf"))),
    "grey under a Bernoulli": (
        "fit --data data.npy --model.likelihood Bernoulli",
        r'site "x" in the support of its Bernoulli likelihood.*, got values from 0.*: binarise',
        grey,
    ),
    "grey to binarise": (
        "fit --data data.npy --data.binarize static",
        r"values in \[0, 1\] to binarise, got.*: pass",
        table,
    ),
    "pictures from a table": (
        "fit --data data.npy --model.decoder ConvolutionalDecoder",
        r"pictures.*, got.*: use MLP",
        table,
    ),
    "no latent dimension": ("fit --model.latent_dim 0", r"a positive whole number, got 0: ", None),
    "no width": ("fit --model.decoder.hidden [0]", r"hidden to be a positive whole number, got 0: ", None),
    "negative epochs": ("fit --epochs -3", r"epochs to be a whole number >= 1, got -3: ", None),
    "too large a batch": ("fit --batch_size 5000", r"batch_size from 1 to 1297.*, got 5000: ", None),
    "no patience": ("fit --patience 0", r"patience to be a whole number >= 1, got 0: ", None),
    "no gradient": ("fit --clip_norm -1", r"clip_norm > 0, got -1.0: ", None),
    "negative learning rate": ("fit --optimizer.lr -1", r"optimiser.*, got Invalid learning rate: -1", None),
    "no warmup": ("fit --kl_weight Warmup --kl_weight.epochs 0", r"epochs > 0, got 0.*: ", None),
    "both prior and size": (
        "fit --model.latent_dim 2 --model.prior.latent_dim 2",
        r"latent_dim or prior, got both: ",
        None,
    ),
    "another event shape": (
        "fit --model.event_shape [3]",
        r"\[1, 8, 8\] as model.event_shape, got \[3\]: leave it out",
        None,
    ),
    "no test draws": ("fit --evaluate.num_samples 0", r"--evaluate.num_samples >= 1, got 0: give", None),
    "unknown device": ("fit --device tpu9", r"a device of this machine.*, got 'tpu9': ", None),
    "absent device": ("fit --device cuda", r"a device of this machine.*, got 'cuda': ", None),
    "used directory": (
        "fit --out full --epochs 1",
        r"a new or empty directory, got full: name another",
        lambda: (Path("full").mkdir(), config("1", "full/f")),
    ),
    "directory below a file": (
        "fit --out file/run --epochs 1",
        r"read and write at file.*, got 'Not a directory': name",
        lambda: config("1", "file"),
    ),
    "full disk at the start": (
        "fit --out run --epochs 1",
        r"read and write at .*, got 'No space left.*: free",
        full_disk,
    ),
    "interrupted download": (
        "fit --data mnist --data.root root --data.download",
        r"to download MNIST, got.*connection reset.*: try again",
        offline,
    ),
    "resume without a run": (
        "fit --resume nowhere",
        r"a run's configuration at nowhere/config.toml, found none: name",
        None,
    ),
    "resume elsewhere": (f"fit --resume {RUN} --out new", r"--resume without --out.*, got both: a run goes on", keep),
    "resume another model": (
        f"fit --resume {RUN} --model.latent_dim 3",
        r"expected .* of shape .*, got .*another architecture; build",
        keep,
    ),
    "resume other data": (
        f"fit --resume {RUN} --data.split [0.6,0.2,0.2]",
        r"expected the data.*, 1,297 rows of shapes .*, got 1,079 rows .*: name those",
        keep,
    ),
    "resume a truncated checkpoint": (
        f"fit --resume {RUN}",
        r"a pyro_vae checkpoint, got .*last.safetensors, which is truncated or foreign.*: use another",
        lambda trained: spoil(trained, "checkpoints/last.safetensors", cut),
    ),
    "no run there": ("evaluate nowhere", r"a run's configuration at nowhere/config.toml, found none: name", None),
    "config that is no run's": (
        f"evaluate {RUN}",
        r"the sections model and guide in .*, found \['a'\]: ",
        lambda: (Path(RUN).mkdir(parents=True), config("a = 1", f"{RUN}/config.toml")),
    ),
    "other architecture": (
        f"evaluate {RUN}",
        r"expected .* weight .* of shape .*, got .* in the checkpoint: it belongs to another architecture",
        lambda trained: spoil(trained, "config.toml", wider),
    ),
    "truncated weights": (
        f"evaluate {RUN}",
        r"a pyro_vae checkpoint, got .*model.safetensors, which is truncated or foreign",
        lambda trained: spoil(trained, "model.safetensors", cut),
    ),
    "foreign weights": (
        f"sample {RUN}",
        r"a pyro_vae checkpoint, got .*model.safetensors, which is truncated or foreign",
        lambda trained: spoil(trained, "model.safetensors", foreign),
    ),
    "no draws": (f"evaluate {RUN} --num_samples 0", r"num_samples >= 1, got 0: ", keep),
    "no samples": (f"sample {RUN} --num 0", r"--num >= 1, got 0: give", keep),
    "no codes": (f"encode {RUN} --num_samples 0", r"num_samples >= 1, got 0: ", keep),
    "unknown split": (f"evaluate {RUN} --split tset", r"one of train, valid, test, all for --split, got 'tset'", keep),
    "unknown ending": (f"sample {RUN} --out a.xlsx", r"--out to end in .npz or .csv, got 'a.xlsx': name", keep),
    "unknown ending of scores": (f"evaluate {RUN} --out a.txt", r"--out to end in .json, got 'a.txt': name", keep),
    "file that exists": (
        f"sample {RUN} --out {RUN}/a.csv",
        r"a new file, got .*exists: name another, or add --overwrite",
        lambda trained: spoil(trained, "a.csv", Path.touch),
    ),
    "no such folder": (f"encode {RUN} --out no/codes.npz", r"a folder at 'no', got none: make it", keep),
    "folder that is a file": (
        f"encode {RUN} --out {RUN}/config.toml/codes.npz",
        r"a folder at .*, got none: make it",
        keep,
    ),
    "full disk": (
        f"sample {RUN}",
        r"read and write at .*, got 'No space left on device': free some space",
        lambda trained, monkeypatch: (keep(trained), full_disk(monkeypatch)),
    ),
    "other data's shape": (
        f"evaluate {RUN} --data data.npy",
        r"data of shape \(1, 8, 8\).*, got \(3,\) in data: name",
        lambda trained: (keep(trained), table()),
    ),
    "latest run that is a folder": (
        "fit --epochs 1",
        r"runs/latest to be a link.*, got a file or folder: rename it",
        latest,
    ),
    "optimiser that needs a closure": ("fit --optimizer LBFGS", r"--optimizer, one of .*, got 'LBFGS': see", None),
    "optimiser of sparse gradients": ("fit --optimizer SparseAdam", r"--optimizer, one of .*, got 'Spar.*: ", None),
    "compiled loss": ("fit --loss JitTrace_ELBO", r"--loss, one of .*, got 'JitTrace_ELBO': ", None),
    "loss of samples": ("fit --loss Trace_MMD", r"--loss, one of .*, got 'Trace_MMD': ", None),
    "network as family": (
        "fit --guide.family pyro_vae.nn.MLP",
        r"a family for --guide.family, got 'pyro_vae.nn.MLP': see",
        None,
    ),
    "table as family": ("fit --guide.family builtins.dict", r"a family for --guide.family, got 'builtins.dict'", None),
    "prior as family": (
        "fit --guide.family pyro_vae.models.priors.StandardNormal",
        r"a family for --guide.family, got 'pyro_vae.models.priors.StandardNormal': see",
        None,
    ),
    "family as prior": (
        "fit --model.prior pyro_vae.guides.families.DiagonalNormal",
        r"a prior's class or a function for --model.prior, got 'pyro_vae.guides.families.DiagonalNormal': see",
        None,
    ),
    "prior as likelihood": (
        "fit --model.likelihood pyro_vae.models.priors.StandardNormal",
        r"a likelihood for --model.likelihood, got 'pyro_vae.models.priors.StandardNormal': see",
        None,
    ),
    "likelihood as decoder": (
        "fit --model.decoder pyro_vae.models.likelihoods.Bernoulli",
        r"a module's class for --model.decoder, got .*Bernoulli': see",
        None,
    ),
    "family as encoder": (
        "fit --guide.encoder pyro_vae.guides.families.DiagonalNormal --model.latent_dim 2",
        r"a module's class for --guide.encoder, got .*DiagonalNormal': see",
        None,
    ),
    "table as model": ("fit --model builtins.dict", r"a module's class or a function for --model, got 'bui", None),
    "table as guide": ("fit --guide builtins.dict --model VAE", r"or a function for --guide, got 'builtins", None),
    "loss of torch": ("fit --loss torch.nn.MSELoss", r"a subclass of pyro.infer.ELBO for --loss, got 'torch", None),
    "module as optimiser": (
        "fit --optimizer torch.nn.Linear",
        r"of torch.optim.Optimizer for --optimizer, got 'torch.nn.Linear': see",
        None,
    ),
    "optimiser of Pyro's own": (
        "fit --optimizer pyro.optim.ClippedAdam",
        r"a class of torch.optim.*, got 'pyro.optim.ClippedAdam': choose",
        None,
    ),
    "clipping of Pyro's own": (
        """fit --optimizer pyro.optim.Adam --optimizer.clip_args {"clip_norm":1}""",
        r"a table --optimizer.optim_args alone.*, got .*clip_args.*: as",
        None,
    ),
    "table as schedule": ("fit --kl_weight builtins.dict", r"callable objects.* for --kl_weight, got 'built", None),
    "module that raises": (
        "fit --model raises_on_import.Net",
        r"can be imported for 'raises_on_import.Net', got RuntimeError: no luck: mend raises_on_import",
        lambda monkeypatch: own(monkeypatch, "raises_on_import", "raise RuntimeError('no luck')"),
    ),
    "module with an error of syntax": (
        "fit --model no_syntax.Net",
        r"can be imported for 'no_syntax.Net', got SyntaxError: .*: mend no_syntax",
        lambda monkeypatch: own(monkeypatch, "no_syntax", "class ="),
    ),
    "module that exits": (
        "fit --model exits_on_import.Net",
        r"can be imported for 'exits_on_import.Net', got SystemExit: 3: mend exits_on_import",
        lambda monkeypatch: own(monkeypatch, "exits_on_import", "import sys; sys.exit(3)"),
    ),
    "constructor with a ValueError": (
        "fit --model value_error_net.Net",
        r"arguments that value_error_net.Net .*, got ValueError: too wide",
        lambda monkeypatch: own_model(monkeypatch, "value_error_net", "ValueError('too wide')"),
    ),
    "constructor with a TypeError": (
        "fit --model type_error_net.Net",
        r"arguments that type_error_net.Net .*, got .*: too odd",
        lambda monkeypatch: own_model(monkeypatch, "type_error_net", "TypeError('too odd')"),
    ),
    "huge seed": (f"fit --seed {2**70}", r"a whole number from 0 to .* for --seed, got 1180591620717411303424: ", None),
    "negative seed": ("fit --seed -1", r"a whole number from 0 to .* for --seed, got -1: ", None),
    "negative seed of the data": ("fit --data.seed -1", r"from 0 to .* for --data.seed, got -1: ", None),
    "negative seed of a command": (f"sample {RUN} --seed -1", r"from 0 to .* for --seed, got -1: ", keep),
    "nobody's home": ("fit --data ~nobody123/x.csv", r"a path for --data, got '~nobody123/x.csv'.*: correct", None),
    "empty data": ("fit --data=", r"a value after --data, got '': --data VALUE", None),
    "empty data in a config": (
        "fit --config c.toml",
        r"a value after --data, got '': --data VALUE",
        lambda: config('data = ""', "c.toml"),
    ),
    "empty out": ("fit --out=", r"a value after --out, got '': --out VALUE", None),
    "empty out of a command": (f"sample {RUN} --out=", r"a value after --out, got '': --out VALUE", keep),
    "device without values": ("fit --device meta", r"a device that holds values for --device, got 'meta': auto", None),
    "one dash": ("fit -epochs 3", r"an option like --epochs, got -epochs: did you mean --epochs\?", None),
    "one dash and a letter": ("fit -e 3", r"an option like --\w+, got -e: see pyro-vae fit --help", None),
    "flag with another word": ("fit --overwrite maybe", r"nothing after --overwrite, got 'maybe': leave it out", None),
    "flag of a command with another word": (
        f"sample {RUN} --overwrite maybe",
        r"nothing after --overwrite, got 'maybe': leave it out",
        keep,
    ),
    "misspelt help": (f"evaluate {RUN} --hepl", r"an option like --help, got --hepl: did you mean --help\?", keep),
    "model of the guide": (
        "fit --guide.model 3",
        r"the guide's model from --model, got --guide.model 3: leave it out",
        None,
    ),
    "parameters of the optimiser": ("fit --optimizer.params 3", r"got --optimizer.params 3: leave it out", None),
    "draws in a csv": (
        f"encode {RUN} --num_samples 3 --out c.csv",
        r"--out to end in .npz for the draws of --num_samples, got 'c.csv': name",
        keep,
    ),
    "run whose model is a word": (
        f"evaluate {RUN}",
        r"expected model in .*config.toml as class_path and init_args, got 'VAE': ",
        lambda trained: rewrite(trained, lambda table: table.update(model="VAE")),
    ),
    "run whose guide is a number": (
        f"encode {RUN}",
        r"expected guide in .*config.toml as class_path and init_args, got 3: ",
        lambda trained: rewrite(trained, lambda table: table.update(guide=3)),
    ),
    "run with a dangling reference": (
        f"evaluate {RUN}",
        r"expected guide.model in .* to refer to an earlier object, got 'modle': ",
        lambda trained: rewrite(
            trained, lambda table: table["guide"]["init_args"].update(model={"reference": "modle"})
        ),
    ),
    "run with a list of arguments": (
        f"evaluate {RUN}",
        r"expected model in .*config.toml as class_path and init_args, got .*\[1\].*: ",
        lambda trained: rewrite(trained, lambda table: table["model"].update(init_args=[1])),
    ),
    "run with an unknown key of the data": (
        f"evaluate {RUN}",
        r"expected options of data in .*config.toml, got 'nosuch': leave it out",
        lambda trained: rewrite(trained, lambda table: table["data"].update(nosuch=1)),
    ),
    "run whose data are a number": (
        f"evaluate {RUN}",
        r"a table \[data\] with name_or_path in .*, got 3: correct it",
        lambda trained: rewrite(trained, lambda table: table.update(data=3)),
    ),
    "resume with a list of arguments": (
        f"fit --resume {RUN}",
        r"a class for --model, got \[1\]: name one",
        lambda trained: rewrite(trained, lambda table: table["model"].update(init_args=[1])),
    ),
    "resume with a dangling reference": (
        f"fit --resume {RUN}",
        r"the guide's model from --model, got --guide.model .*modle.*: leave",
        lambda trained: rewrite(
            trained, lambda table: table["guide"]["init_args"].update(model={"reference": "modle"})
        ),
    ),
    "list as model": (
        "fit --config c.yaml",
        r"a class for --model, got \[1\]: name one",
        lambda: config("model: [1]", "c.yaml"),
    ),
    "reference as guide": (
        "fit --config c.yaml",
        r"a class for --guide, got a reference to model: name",
        lambda: config("guide: {reference: model}", "c.yaml"),
    ),
    "foreign metrics": (
        f"report {RUN}",
        r"a table per line in .*metrics.jsonl, got .*: mend or delete it",
        lambda trained: spoil(trained, "metrics.jsonl", lambda path: path.write_text("garbage\n")),
    ),
    "numbers as metrics": (
        f"evaluate {RUN}",
        r"a table per line in .*metrics.jsonl, got 3: mend or delete it",
        lambda trained: spoil(trained, "metrics.jsonl", lambda path: path.write_text("3\n")),
    ),
}


def tree():
    return {path: path.read_bytes() if path.is_file() else None for path in Path.cwd().rglob("*")}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, request, tmp_path, monkeypatch, capsys):
    arguments, message, make = CASES[name]
    if name == "absent device" and torch.cuda.is_available():
        pytest.skip("expected a machine without CUDA, found one with it")
    monkeypatch.chdir(tmp_path)
    if make is not None:
        wanted = make.__code__.co_varnames[: make.__code__.co_argcount]
        make(*(request.getfixturevalue(fixture) for fixture in wanted if fixture in ("trained", "monkeypatch")))
    before = tree()
    capsys.readouterr()
    arguments = arguments.split()
    tiny = TINY if arguments[0] == "fit" and "--resume" not in arguments and "model" not in str(arguments) else []
    status = main([*arguments, *tiny])
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    error = capsys.readouterr().err
    assert status == 2, error
    assert error.count("\n") == 1 and error.endswith("\n")
    assert "Traceback" not in error
    assert re.match(r"pyro-vae: error: expected .+(, got|, found) .+: .+", error), error
    assert re.search(message, error), error
    assert tree() == before
