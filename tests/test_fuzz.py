"""A thousand damaged files: each is read, or refused in one line of the library's own."""

import io
import random
import shutil
import string
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_vae import fit, load_dataset, load_run
from pyro_vae.cli import main
from pyro_vae.guides import AmortizedGuide
from pyro_vae.models import VAE, likelihoods

RNG = np.random.default_rng(0)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One to four changes of a file: bytes turned, cut, doubled, moved, put in, or the end left out."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        if not found:
            break
        at, count = chance.randrange(len(found)), chance.choice((1, 1, 2, 8, 64))
        match chance.choice(("turn", "cut", "double", "move", "insert", "end", "extreme")):
            case "turn":
                for i in range(at, min(len(found), at + count)):
                    found[i] = chance.randrange(256)
            case "cut":
                del found[at : at + count]
            case "double":
                found[at:at] = found[at : at + count]
            case "move":
                piece = found[at : at + count]
                del found[at : at + count]
                found[0:0] = piece
            case "insert":
                text = "".join(chance.choice(string.printable) for _ in range(count))
                found[at:at] = chance.choice((text, "nan", "1e999", "-", '"', "\x00", "\n\n", ",,", "é")).encode()
            case "end":
                del found[at:]
            case "extreme":
                found[at : at + count] = bytes([chance.choice((0, 255))]) * count
    return bytes(found)


def of_table():
    rows = [f"{a:.3f},{b},{b % 2},2024-01-{b % 28 + 1:02d}" for b, a in enumerate(RNG.random(30))]
    return "\n".join(["length,count,kind,day", *rows]).encode()


def written(save, *args, **options):
    file = io.BytesIO()
    save(file, *args, **options)
    return file.getvalue()


PIXELS = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
ARRAY = RNG.random((20, 3))
FILES = {  # name: contents, how many mutants, options
    "a.csv": (of_table(), 120, {"label": "kind", "id": "day"}),
    "b.csv": (of_table(), 80, {"time": "day", "id": "count"}),
    "a.npy": (written(np.save, ARRAY), 100, {}),
    "a.npz": (written(np.savez, x=ARRAY, labels=np.arange(20)), 80, {}),
    "s.npz": (written(np.savez_compressed, x=RNG.random((20, 5, 2)), lengths=np.full(20, 4)), 60, {}),
    "a.pt": (written(lambda file: torch.save({"x": torch.ones(20, 3)}, file)), 100, {}),
    **{
        f"im/3.{ending}": (written(Image.fromarray(PIXELS).save, ending), 24, {})
        for ending in ("png", "jpeg", "bmp", "gif", "tiff", "webp", "ppm")
    },
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_of_data(name, tmp_path):
    contents, count, options = FILES[name]
    chance, refused = random.Random(name), 0
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if name.startswith("im/"):
        for i in range(10):
            Image.fromarray(PIXELS).save(path.parent / f"{i}0.png")
    source = path.parent if name.startswith("im/") else path
    path.write_bytes(contents)
    load_dataset(source, **options)
    for _ in range(count):
        path.write_bytes(mutated(contents, chance))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                load_dataset(source, **options)
            except (ValueError, OSError) as error:
                assert str(error).startswith("expected"), repr(error)
                refused += 1
    assert refused > count / 10


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    np.save(folder / "a.npy", ARRAY)
    torch.manual_seed(0)
    model = VAE((3,), latent_dim=1, likelihood=likelihoods.ContinuousBernoulli())
    guide = AmortizedGuide(model)
    data = load_dataset(folder / "a.npy")
    return fit(model, guide, data.train, valid=data.valid, epochs=1, out=folder / "run", progress=False).path


@pytest.mark.parametrize(("name", "count"), [("model.safetensors", 100), ("checkpoints/last.safetensors", 60)])
def test_damaged_weights(name, count, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path, chance, refused = tmp_path / "run" / name, random.Random(name), 0
    if name != "model.safetensors":
        (tmp_path / "run" / "model.safetensors").unlink()
    contents = path.read_bytes()
    for _ in range(count):
        path.write_bytes(mutated(contents, chance))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".* is not the configuration that", UserWarning)
            try:
                load_run(tmp_path / "run")
            except (ValueError, OSError) as error:
                assert "expected" in str(error), repr(error)
                refused += 1
    assert refused > count / 2


CONFIGURATIONS = {
    "c.toml": (None, 100),
    "c.yaml": (
        b"data:\n  name_or_path: digits\nmodel:\n  class_path: VAE\n  init_args:\n    latent_dim: 3\nepochs: 3\n"
        b"optimizer:\n  class_path: Adam\n  init_args:\n    lr: 0.001\n",
        60,
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_damaged_configurations(name, run, tmp_path, monkeypatch, capsys):
    contents, count = CONFIGURATIONS[name]
    contents = contents or (run / "config.toml").read_bytes()
    monkeypatch.chdir(tmp_path)
    chance, refused = random.Random(name), 0
    for _ in range(count):
        (tmp_path / name).write_bytes(mutated(contents, chance))
        status = main(["fit", "--config", name, "--print_config"])
        error = capsys.readouterr().err
        assert status in (0, 2), error
        assert status == 0 or (error.count("\n") == 1 and "expected" in error), error
        refused += status == 2
    assert refused > count / 10
