"""Laws of `pyro_vae.data`: fixed facts of the data sets, exact densities, and what every bad input says."""

import csv
import io
import math
import os
import pickle
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from pyro_vae import sources
from pyro_vae.data import Data, Split, as_data, load_dataset

SPLITS = ("train", "valid", "test")
REAL = Path(os.environ.get("PYRO_VAE_DATA") or Path(__file__).parents[2] / "shared" / "data")


def real_data(file: str) -> Path:
    if not (REAL / file).is_file():
        pytest.skip(f"{REAL / file} is not there")
    return REAL


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def splits(dataset) -> list[Split]:
    return [dataset.train, dataset.valid, dataset.test]


def all_rows(dataset) -> torch.Tensor:
    """x of all splits in the order of the source, whose ids are row numbers."""
    ids = np.concatenate([split.ids for split in splits(dataset)])
    return torch.cat([split.x for split in splits(dataset)])[torch.from_numpy(np.argsort(ids))]


def real_table(rows: int = 50, columns: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal([5.0, -300.0, 0.01][:columns], [2.0, 50.0, 0.003][:columns], (rows, columns))


def write_csv(path: Path, header: list[str], rows) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def save(path: Path, array) -> Path:
    np.save(path, array)
    return path


def write_images(folder: Path, count: int = 12, mode: str = "L", size: tuple[int, int] = (5, 4)) -> Path:
    shape = (size[1], size[0]) + ((3,) if mode == "RGB" else ())
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(autouse=True)
def global_generators_stay():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    yield
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


# ------------------------------------------------------------ Data and as_data


def test_data_moves_and_batches_together():
    x, u = torch.arange(12.0).reshape(6, 2), torch.arange(6)
    data = as_data((x, {"u": u}))
    (rows,), kwargs = data.batch(torch.tensor([5, 1]))
    assert len(data) == 6 and data.labels is None and data.log_jacobian == 0.0
    assert torch.equal(rows, x[[5, 1]]) and torch.equal(kwargs["u"], u[[5, 1]])
    moved = data.to("meta")
    assert type(moved) is Data and moved is not data
    assert moved.args[0].is_meta and moved.kwargs["u"].is_meta and not data.args[0].is_meta


def test_a_split_stays_a_split_on_another_device():
    split = load_dataset("digits", binarize="dynamic").train
    moved = split.to("meta")
    assert type(moved) is Split and (moved.name, moved.binarize) == ("train", "dynamic")
    assert moved.x.is_meta and moved.labels.is_meta and moved.ids is split.ids
    assert as_data(split) is split


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6),
    st.lists(st.integers(0, 3), max_size=2),
    st.integers(1, 3),
    st.sets(st.text(), max_size=3),
)
def test_as_data_keeps_what_it_is_given(rows, shape, count, names):
    args = tuple(torch.full((rows, *shape), float(i)) for i in range(count))
    kwargs = {name: torch.zeros(rows) for name in names}
    for data in (as_data((*args, kwargs)), as_data(as_data((*args, kwargs)))):
        assert data.args == args and data.kwargs == kwargs and len(data) == rows
    assert as_data(args).args == args and as_data(args[0]).args == args[:1]


AS_DATA_MISTAKES = [
    (lambda: np.array(["a", "b"]), "expected an array of numbers, got dtype <U1"),
    (lambda: [torch.zeros(3)], "got list.*put the tensors into a tuple"),
    (lambda: None, "got NoneType"),
    (lambda: (), r"at least one tensor by position, got none: pass \(x,\)"),
    (lambda: ({"x": torch.zeros(3)},), "at least one tensor by position"),
    (lambda: torch.tensor(1.0), r"got a scalar tensor: pass shape \(N, ...\)"),
    (lambda: torch.zeros(0, 2), "at least one datum"),
    (lambda: (torch.zeros(3), torch.zeros(4)), "equal lengths on dimension 0, got tensor 0: 3, tensor 1: 4"),
    (lambda: (torch.zeros(3), {"u": torch.zeros(2)}), "got tensor 0: 3, u: 2"),
    (lambda: (torch.zeros(3), {"u": [1, 2, 3]}), "expected a tensor as u, got list"),
    (lambda: (torch.zeros(3), {}, torch.zeros(3)), "expected a tensor as tensor 1, got dict"),
    (lambda: load_dataset("digits"), "whole data set 'digits': pass its .train, .valid or .test"),
]


@pytest.mark.parametrize(("make", "message"), AS_DATA_MISTAKES, ids=[m for _, m in AS_DATA_MISTAKES])
def test_as_data_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message) as error:
        as_data(make())
    assert "\n" not in str(error.value)


# ------------------------------------------------------------ named data sets


def test_digits():
    digits = load_dataset("digits")
    assert [len(split) for split in splits(digits)] == [1297, 250, 250]
    assert [split.name for split in splits(digits)] == list(SPLITS)
    assert digits.event_shape == (1, 8, 8) and digits.description.startswith("1,797 handwritten digits of 8 x 8")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    assert torch.equal(all_rows(digits).flatten(1), torch.from_numpy(images).float())
    for split in splits(digits):
        assert split.x.dtype == torch.float32 and split.log_jacobian == 0.0
        assert (split.x.min(), split.x.max()) == (0, 16)
        assert np.array_equal(split.labels, labels[split.ids]) and split.labels.dtype == torch.int64
        assert split.observed is split.x and digits.restore(split.x) is split.x
    assert "train 1,297, valid 250, test 250" in repr(digits)


def test_loading_twice_gives_the_same_and_the_seed_moves_only_what_it_says():
    def x(**options):
        return [split.x for split in splits(load_dataset("digits", **options))]

    def same(a, b):
        return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))

    assert same(x(), x(seed=1))
    assert same(x(binarize="static"), x(binarize="static"))
    assert not same(x(binarize="static"), x(binarize="static", seed=1))
    assert same(x(binarize="dynamic"), x(binarize="dynamic", seed=1))
    assert same(x(split=(0.6, 0.2, 0.2), seed=3), x(split=(0.6, 0.2, 0.2), seed=3))
    assert not same(x(split=(0.6, 0.2, 0.2), seed=3), x(split=(0.6, 0.2, 0.2)))


@pytest.mark.parametrize(
    "fractions", [(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (1 / 3, 1 / 3, 1 / 3), (0.001, 0.001, 0.998)]
)
def test_fractions_split_all_rows(fractions):
    digits = load_dataset("digits", split=fractions)
    ids = np.concatenate([split.ids for split in splits(digits)])
    assert np.array_equal(np.sort(ids), np.arange(1797))
    for split, fraction in zip(splits(digits), fractions, strict=True):
        assert abs(len(split) - fraction * 1797) <= 1


def test_static_binarisation_draws_once_with_the_intensities_as_means():
    intensities, binary = load_dataset("digits"), load_dataset("digits", binarize="static")
    for grey, split in zip(splits(intensities), splits(binary), strict=True):
        p = grey.x / 16
        assert set(split.x.unique().tolist()) == {0.0, 1.0} and split.binarize is None
        assert torch.equal(split.x[p == 0], torch.zeros_like(split.x[p == 0])) and (split.x[p == 1] == 1).all()
        standard_error = (p * (1 - p)).sum().sqrt()
        assert (split.x - p).sum().abs() < 4 * standard_error
    assert torch.equal(binary.train.batch(torch.arange(9))[0][0], binary.train.x[:9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dynamic_draws_have_the_right_probabilities(dtype):
    """Means within 4.5 standard errors, exact at 0 and 1, and neighbours, who share a draw, are independent."""
    p = torch.tensor([0.0, 1.0, 0.5, 1 / 255, 0.001, 0.9, 0.3], dtype=dtype)
    split = Split((p.expand(300_001, -1),), name="train", binarize="dynamic")
    (x,), _ = split.batch(torch.arange(len(split)), torch.Generator().manual_seed(0))
    assert x.dtype == dtype and set(x.unique().tolist()) == {0.0, 1.0}
    error = 4.5 * (p * (1 - p) / len(x)).sqrt()
    assert bool(((x.mean(0) - p).abs() <= error).all())
    flat = x[:, 2].contiguous()
    assert abs((flat[:-1] * flat[1:]).mean() - 0.25) < 4.5 * (3 / 16 / len(flat)) ** 0.5
    (y,), _ = split.batch(torch.arange(len(split)), torch.Generator().manual_seed(1))
    assert abs((x[:, 2] * y[:, 2]).mean() - 0.25) < 4.5 * (3 / 16 / len(flat)) ** 0.5


def test_dynamic_binarisation_draws_each_batch_afresh():
    digits = load_dataset("digits", binarize="dynamic")
    train, index = digits.train, torch.arange(200)

    def draw(g):
        return train.batch(index, g)[0][0]

    g = generator(7)
    first, second = draw(g), draw(g)
    assert not torch.equal(first, second) and not torch.equal(draw(None), draw(None))
    assert torch.equal(first, draw(generator(7))) and not torch.equal(first, draw(generator(8)))
    assert torch.equal(
        load_dataset("digits", binarize="dynamic").train.batch(index)[0][0],
        load_dataset("digits", binarize="dynamic").train.batch(index)[0][0],
    )

    p = train.x[:200]
    mean = torch.stack([draw(g) for _ in range(400)]).mean(0)
    assert torch.equal(p, load_dataset("digits").train.x[:200] / 16)
    assert ((mean - p).abs() <= 6 * (p * (1 - p) / 400).sqrt()).all()

    assert set(train.observed.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(train.observed, load_dataset("digits", binarize="dynamic").train.observed)
    for split in (digits.valid, digits.test):
        assert split.binarize is None and split.observed is split.x
        assert set(split.x.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(split.batch(index, generator(1))[0][0], split.x[index])


def test_a_generator_of_another_device_is_refused():
    train = load_dataset("digits", binarize="dynamic").train.to("meta")
    with pytest.raises(ValueError, match=r"expected a generator on meta, got one on cpu: make it with torch"):
        train.batch(torch.arange(3), generator())


def test_mnist():
    mnist = load_dataset("mnist", root=real_data("MNIST/raw/train-images-idx3-ubyte"))
    assert [len(split) for split in splits(mnist)] == [50_000, 10_000, 10_000]
    assert mnist.event_shape == (1, 28, 28) and mnist.classes[0] == "0 - zero"
    for split in splits(mnist):
        assert split.x.dtype == torch.float32 and (split.x.min(), split.x.max()) == (0, 1)
        assert set(split.labels.tolist()) == set(range(10))
    assert mnist.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.test.labels[:4].tolist() == [7, 2, 1, 0]
    training_file = torch.cat([mnist.train.x, mnist.valid.x])
    assert training_file.double().mean().item() == pytest.approx(0.13066, abs=1e-5)


def test_frey_faces():
    frey = load_dataset("freyfaces", root=real_data("freyfaces/frey_rawface.mat"))
    assert [len(split) for split in splits(frey)] == [1565, 200, 200]
    assert frey.event_shape == (1, 28, 20) and frey.train.log_jacobian == 0.0
    x = torch.cat([split.x for split in splits(frey)])
    assert x.min() >= 0 and x.max() == 238 / 255
    left_to_right = x.diff(dim=-1).abs().mean()
    assert left_to_right < 0.7 * x.reshape(-1, 20, 28).mT.reshape(-1, 28, 20).diff(dim=-1).abs().mean()
    assert x.diff(dim=0).abs().mean() < 0.6 * (x[100:] - x[:-100]).abs().mean()


def test_jsb_chorales():
    """Frames, lengths, keys and silent frames of each split, by the data's own page."""
    chorales = load_dataset("jsb_chorales", root=real_data("jsb_chorales/jsb_chorales.pickle"))
    assert [len(split) for split in splits(chorales)] == [229, 76, 77] and chorales.event_shape == (88,)
    facts = []
    for split in splits(chorales):
        lengths, x = split.kwargs["lengths"], split.x
        there = torch.arange(x.shape[1]) < lengths[:, None]
        assert x.shape[1] == lengths.max() and not x[~there].any()
        keys = x.sum((0, 1)).nonzero().flatten() + 21
        silent = int((x[there].sum(-1) == 0).sum())
        facts.append((int(lengths.sum()), int(lengths.min()), int(lengths.max()), int(keys[0]), int(keys[-1]), silent))
    assert facts == [(13807, 25, 129, 43, 96, 18), (4602, 32, 144, 48, 96, 29), (4725, 32, 160, 45, 96, 17)]
    (x,), kwargs = chorales.train.batch(torch.tensor([3, 1]))
    assert x.shape == (2, 129, 88) and kwargs["lengths"].tolist() == chorales.train.kwargs["lengths"][[3, 1]].tolist()


def test_a_pickle_of_other_things_is_refused(tmp_path):
    """What it would run is not run."""
    path = tmp_path / "jsb_chorales" / "jsb_chorales.pickle"
    path.parent.mkdir()
    for content in (pickle.dumps(Path.cwd), b"\x80", pickle.dumps({"train": [[(60,)]]}), pickle.dumps({"train": [7]})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="expected sequences of chords in .*delete it and pass download=True"):
            load_dataset("jsb_chorales", root=tmp_path)


def test_a_download_of_chorales_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(OSError, match="no network.*nothing was kept"):
        load_dataset("nottingham", root=tmp_path, download=True)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_names_the_root(monkeypatch, tmp_path):
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path))
    for name, folder in (
        ("mnist", "MNIST"),
        ("fashion_mnist", "FashionMNIST"),
        ("freyfaces", "freyfaces"),
        ("jsb_chorales", "jsb_chorales"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{folder}.*pass download=True .*or root= ") as error:
            load_dataset(name)
        assert str(tmp_path) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_idx_file_is_named(tmp_path, monkeypatch):
    raw = write_small_mnist(tmp_path, monkeypatch)
    assert len(load_dataset("mnist", root=tmp_path).test) == 10
    for file in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        whole = (raw / file).read_bytes()
        (raw / file).write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=rf"bytes in .*{file}, got .*truncated.*pass download=True"):
            load_dataset("mnist", root=tmp_path)
        (raw / file).write_bytes(b"\x1f" + whole[1:])
        with pytest.raises(ValueError, match=rf"{file}, got a foreign one"):
            load_dataset("mnist", root=tmp_path)
        (raw / file).write_bytes(whole)


def write_small_mnist(root: Path, monkeypatch) -> Path:
    """An MNIST of 30 + 10 images in the place of the real one."""
    shapes = {file: (30 if "train" in file else 10, *shape[1:]) for file, shape in sources.images._IDX_SHAPES.items()}
    monkeypatch.setattr(sources.images, "_IDX_SHAPES", shapes)
    real_source = sources.images.Source

    def small_source(*args, **kwargs):
        return real_source(*args, **kwargs | {"sizes": (20, 10, 10), "order": torch.arange(40)})

    monkeypatch.setattr(sources.images, "Source", small_source)
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for file, shape in shapes.items():
        header = np.array([2048 + len(shape), *shape], dtype=">i4").tobytes()
        (raw / file).write_bytes(header + bytes(i % 10 for i in range(math.prod(shape))))
    return raw


@pytest.mark.parametrize("failure", [RuntimeError("md5 mismatch"), ConnectionError("reset"), None])
def test_an_interrupted_mnist_download_leaves_nothing(failure, tmp_path, monkeypatch):
    from torchvision import datasets

    def download(self):
        folder = Path(self.raw_folder)
        folder.mkdir(parents=True)
        for file in sources.images._IDX_SHAPES:
            (folder / file).write_bytes(b"half")
        if failure is not None:
            raise failure

    monkeypatch.setattr(datasets.MNIST, "download", download)
    monkeypatch.setattr(datasets.MNIST, "_load_data", lambda self: (torch.zeros(1), torch.zeros(1)))
    with pytest.raises(OSError, match="nothing was kept: try again, or put the files into .*MNIST.raw yourself"):
        load_dataset("mnist", root=tmp_path, download=True)
    assert list(tmp_path.rglob("*")) == []


def test_a_download_replaces_a_truncated_file(tmp_path, monkeypatch):
    from torchvision import datasets

    raw = write_small_mnist(tmp_path, monkeypatch)
    whole = {file: (raw / file).read_bytes() for file in sources.images._IDX_SHAPES}

    def download(self):
        Path(self.raw_folder).mkdir(parents=True)
        for file, content in whole.items():
            (Path(self.raw_folder) / file).write_bytes(content)

    monkeypatch.setattr(datasets.MNIST, "download", download)
    (raw / "train-images-idx3-ubyte").write_bytes(b"half")
    assert len(load_dataset("mnist", root=tmp_path, download=True).train) == 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["MNIST"]


def test_a_frey_download_is_checked(tmp_path, monkeypatch):
    content = (real_data("freyfaces/frey_rawface.mat") / "freyfaces" / "frey_rawface.mat").read_bytes()

    def serve(body):
        monkeypatch.setattr(sources.base.urllib.request, "urlopen", lambda *args, **kwargs: io.BytesIO(body))

    serve(content[:5000])
    with pytest.raises(OSError, match="sha256 .* nothing was kept: try again"):
        load_dataset("freyfaces", root=tmp_path / "new", download=True)
    assert list(tmp_path.rglob("*.mat")) == [] and list((tmp_path / "new").iterdir()) == []
    serve(content)
    assert len(load_dataset("freyfaces", root=tmp_path / "new", download=True).test) == 200
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["freyfaces"]


def test_a_broken_frey_file_is_named(tmp_path):
    (tmp_path / "freyfaces").mkdir()
    (tmp_path / "freyfaces" / "frey_rawface.mat").write_bytes(b"no matlab" * 50)
    with pytest.raises(ValueError, match=r"expected a MATLAB file .*frey_rawface.mat, got a truncated or foreign"):
        load_dataset("freyfaces", root=tmp_path)


def test_a_mismatched_torchvision_sends_to_the_doctor(tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"torchvision::nms does not exist\): run `pyro-vae doctor`"):
        load_dataset("mnist", root=tmp_path)


# ------------------------------------------------------------ the user's own files


def test_a_real_table_is_standardised_and_scores_convert_to_original_units(tmp_path):
    table = real_table(200)
    dataset = load_dataset(write_csv(tmp_path / "t.csv", ["a", "b", "c"], table.tolist()))
    train = torch.from_numpy(table)[torch.from_numpy(dataset.train.ids)]
    assert [len(split) for split in splits(dataset)] == [160, 20, 20] and dataset.columns == ("a", "b", "c")
    torch.testing.assert_close(dataset.location, train.mean(0))
    torch.testing.assert_close(dataset.scale, train.std(0, correction=0))
    torch.testing.assert_close(dataset.train.x.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(dataset.train.x.std(0, correction=0), torch.ones(3))

    covariance = torch.tensor([[2.0, 0.3, 0.1], [0.3, 1.0, 0.2], [0.1, 0.2, 0.5]], dtype=torch.float64)
    mean = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    standardised = torch.distributions.MultivariateNormal(mean, covariance)
    original = torch.distributions.MultivariateNormal(
        dataset.location + dataset.scale * mean, dataset.scale[:, None] * covariance * dataset.scale
    )
    for split in splits(dataset):
        x = torch.from_numpy(table)[torch.from_numpy(split.ids)]
        torch.testing.assert_close(dataset.restore(split.x).double(), x, rtol=1e-5, atol=1e-6)
        exact = (x - dataset.location) / dataset.scale
        torch.testing.assert_close(standardised.log_prob(exact) + split.log_jacobian, original.log_prob(x))
        torch.testing.assert_close(split.x, exact.float())


@pytest.mark.parametrize(
    ("array", "event_shape", "factor"),
    [
        (np.arange(48).reshape(12, 4) % 7, (4,), 1),
        (np.arange(48).reshape(12, 4) % 2 == 0, (4,), 1),
        ((np.arange(48).reshape(12, 4) % 2).astype(np.uint8), (4,), 1),
        (np.arange(48, dtype=np.uint8).reshape(12, 4) * 5, (4,), 1 / 255),
        (np.linspace(0, 1, 48, dtype=np.float32).reshape(12, 4), (4,), 1),
        (np.arange(240, dtype=np.uint8).reshape(12, 5, 4), (1, 5, 4), 1 / 255),
        (np.arange(240, dtype=np.float64).reshape(12, 5, 4), (1, 5, 4), 1 / 255),
        (np.arange(240).reshape(12, 5, 4) % 17, (1, 5, 4), 1),
        (np.arange(720).reshape(12, 3, 5, 4) % 256, (3, 5, 4), 1 / 255),
        (np.linspace(-3, 3, 240, dtype=">f4").reshape(12, 1, 5, 4), (1, 5, 4), 1),
    ],
)
@pytest.mark.parametrize("ending", [".npy", ".npz", ".pt"])
def test_arrays_keep_their_values(array, event_shape, factor, ending, tmp_path):
    path = tmp_path / f"x{ending}"
    if ending == ".npy":
        np.save(path, array)
    elif ending == ".npz":
        np.savez(path, x=array, other=1, labels=np.arange(12) % 3)
    else:
        tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        torch.save({"x": tensor, "labels": torch.arange(12) % 3}, path)
    dataset = load_dataset(path)
    assert dataset.event_shape == event_shape and dataset.name == "x" and dataset.location is None
    expected = torch.from_numpy(array.astype(np.float64) * factor).float().reshape(12, *event_shape)
    torch.testing.assert_close(all_rows(dataset), expected, rtol=1e-6, atol=0)
    assert [len(split) for split in splits(dataset)] == [10, 1, 1]
    if ending != ".npy":
        assert all(np.array_equal(split.labels, split.ids % 3) for split in splits(dataset))


def test_channels_last_bytes_come_out_channels_first(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
    dataset = load_dataset(save(tmp_path / "x.npy", images))
    assert dataset.event_shape == (3, 6, 5)
    assert torch.equal(all_rows(dataset), torch.from_numpy(images).permute(0, 3, 1, 2) / 255)


def test_a_single_tensor_or_array_of_any_name_is_enough(tmp_path):
    torch.save(torch.nn.Parameter(torch.ones(10, 2, dtype=torch.bfloat16)), tmp_path / "x.pt")
    np.savez(tmp_path / "x.npz", anything=np.ones((10, 2)), labels=np.array(["b", "a"] * 5))
    assert (all_rows(load_dataset(tmp_path / "x.pt")) == 1).all()
    dataset = load_dataset(str(tmp_path / "x.npz"))
    assert dataset.classes == ("a", "b") and set(dataset.train.labels.tolist()) == {0, 1}
    assert not dataset.train.x.requires_grad


def test_csv_keeps_label_and_id_apart(tmp_path):
    rows = [[f"p{i}", i % 5, ["ill", "well"][i % 2], i / 7, i % 3] for i in range(40)]
    path = write_csv(tmp_path / "t.csv", ["id", "count", "state", "y", "z"], rows)
    dataset = load_dataset(path, id="id", label="state")
    assert dataset.columns == ("count", "y", "z") and dataset.classes == ("ill", "well")
    for split in splits(dataset):
        numbers = np.array([int(name[1:]) for name in split.ids])
        assert np.array_equal(split.labels, numbers % 2)
        torch.testing.assert_close(dataset.restore(split.x)[:, 1], torch.from_numpy(numbers / 7).float())
    halves = load_dataset(write_csv(path, ["x", "half"], [[i, i / 2] for i in range(20)]), label="half").train
    assert halves.labels.dtype == torch.float32 and np.array_equal(halves.labels, halves.ids / 2)


def test_image_folders(tmp_path):
    grey = load_dataset(write_images(tmp_path / "grey"))
    assert grey.event_shape == (1, 4, 5) and grey.train.labels is None and grey.description.startswith("12 images")
    first = np.asarray(Image.open(tmp_path / "grey" / grey.train.ids[0]))
    assert torch.equal(grey.train.x[0, 0], torch.from_numpy(first.copy()) / 255)
    Image.open(tmp_path / "grey" / "00.png").convert("RGB").save(tmp_path / "grey" / "00.png")
    assert load_dataset(tmp_path / "grey").event_shape == (1, 4, 5)

    for kind in ("cats", "dogs"):
        write_images(tmp_path / "pets" / kind, 6, "RGB")
    (tmp_path / "pets" / "README.txt").write_text("no image")
    pets = load_dataset(tmp_path / "pets")
    assert pets.event_shape == (3, 4, 5) and pets.classes == ("cats", "dogs")
    for split in splits(pets):
        assert [pets.classes[k] for k in split.labels] == [str(name).split("/")[0] for name in split.ids]


of_names = st.characters(codec="utf-8", exclude_characters="\ufeff", exclude_categories=("Cc", "Cs", "Zl", "Zp"))
names = st.text(of_names, min_size=1, max_size=8).filter(
    lambda name: name.strip() and not name.startswith("#") and sources.base.number(name) != sources.base.number(name)
)
whole_tables = hnp.arrays(np.int64, st.tuples(st.integers(10, 20), st.integers(1, 4)), elements=st.integers(0, 255))


@settings(max_examples=30, deadline=None)
@given(whole_tables, st.data())
def test_whole_numbers_come_back_from_csv_under_any_column_names(table, data):
    header = data.draw(st.lists(names, min_size=table.shape[1], max_size=table.shape[1], unique_by=str.strip))
    with tempfile.TemporaryDirectory() as folder:
        dataset = load_dataset(write_csv(Path(folder) / "t.csv", header, table.tolist()))
    assert dataset.columns == tuple(name.strip() for name in header)
    assert torch.equal(all_rows(dataset), torch.from_numpy(table).float())


def test_an_outlier_beyond_float32_among_the_validation_rows_is_no_silent_infinity(tmp_path):
    table = np.zeros((10, 1))
    table[[0, 2], 0] = [6e-36, 685.0]
    data = load_dataset(save(tmp_path / "t.npy", table / 3))  # whose training rows lie within [0, 1]
    assert all(bool(part.x.isfinite().all()) for part in splits(data)) and data.location is None


def test_a_value_too_far_from_the_training_rows_is_named(tmp_path):
    table = np.stack([np.arange(20.0), 1e-45 * np.arange(20)], 1)
    row = int(torch.randperm(20, generator=torch.Generator().manual_seed(0))[-1])  # a test row
    table[row, 1] = 1.0
    path = write_csv(tmp_path / "t.csv", ["a", "b"], table.tolist())
    with pytest.raises(ValueError, match=rf"got 1 in line {row + 2}, column 'b' of t, which is too far"):
        load_dataset(path)


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(
        np.float64,
        st.tuples(st.integers(10, 20), st.integers(1, 3)),
        elements=st.floats(-1e30, 1e30, allow_subnormal=False),
    ),
    st.sampled_from(["csv", "npy"]),
)
def test_real_tables_come_back_in_original_units_or_a_column_is_named(table, ending):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"t.{ending}"
        if ending == "csv":
            write_csv(path, [f"column {j}" for j in range(table.shape[1])], table.tolist())
        else:
            np.save(path, table)
        try:
            dataset = load_dataset(path)
        except ValueError as error:
            named = ("is constant", "finite as float32 in the units of the training")
            assert "column" in str(error) and any(words in str(error) for words in named)
            return
    restored = dataset.restore(all_rows(dataset).double())
    tolerance = 1e-6 * np.abs(table).max(0) + torch.finfo(torch.float32).tiny
    assert (np.abs(restored.numpy() - table) <= tolerance).all()
    assert math.isfinite(dataset.train.log_jacobian) and torch.isfinite(dataset.train.x).all()
    if dataset.scale is not None:
        assert dataset.test.log_jacobian == pytest.approx(-dataset.scale.log().sum().item())


@settings(max_examples=25, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.int16, np.int64, np.float16, np.float32, bool]),
        hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=4)
        .filter(lambda shape: shape[3:] != (3,))  # bytes with channels last
        .map(lambda shape: (10, *shape[1:])),
        elements={"min_value": 0, "max_value": 1},
    )
)
def test_values_in_the_unit_interval_come_back_from_npy(array):
    with tempfile.TemporaryDirectory() as folder:
        dataset = load_dataset(save(Path(folder) / "x.npy", array))
    assert torch.equal(all_rows(dataset).flatten(), torch.from_numpy(array.astype(np.float32)).flatten())


# ------------------------------------------------------------ what every bad input says


def csv_file(text: str | bytes):
    def make(folder: Path) -> Path:
        (folder / "t.csv").write_bytes(text.encode() if isinstance(text, str) else text)
        return folder / "t.csv"

    return make


def array_file(array):
    return lambda folder: save(folder / "x.npy", array)


def bytes_file(name: str, content: bytes):
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def pt_file(content):
    def make(folder: Path) -> Path:
        torch.save(content, folder / "x.pt")
        return folder / "x.pt"

    return make


def npz_file(**arrays):
    def make(folder: Path) -> Path:
        np.savez(folder / "x.npz", **arrays)
        return folder / "x.npz"

    return make


def truncated(make):
    def make_half(folder: Path) -> Path:
        path = make(folder)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        return path

    return make_half


def object_array(folder: Path) -> Path:
    np.save(folder / "x.npy", np.array([{"a": 1}] * 12), allow_pickle=True)
    return folder / "x.npy"


def odd_image(folder: Path) -> Path:
    write_images(folder / "pictures")
    Image.new("L", (9, 9)).save(folder / "pictures" / "07.png")
    return folder / "pictures"


def broken_image(folder: Path) -> Path:
    path = write_images(folder / "pictures", size=(40, 40)) / "03.png"
    path.write_bytes(path.read_bytes()[:200])
    return folder / "pictures"


def deep_image(folder: Path) -> Path:
    Image.fromarray(np.full((4, 5), 70000, dtype=np.int32)).save(write_images(folder / "pictures") / "05.tif")
    return folder / "pictures"


def stray_image(folder: Path) -> Path:
    write_images(folder / "pictures" / "cats")
    write_images(folder / "pictures", 1)
    return folder / "pictures"


ones = np.ones((12, 2))
holes = real_table(20)
holes[[4, 9], [2, 0]] = [np.nan, np.inf]
flat = real_table(20)
flat[:, 1] = 0.1
numbers = "".join(f"{i / 3},{i % 4}\n" for i in range(20))

MISTAKES = [
    (
        "a name nobody knows",
        lambda f: "mnits",
        {},
        "expected one of digits, mnist, .*path that exists, got 'mnits'",
    ),
    ("not a name", lambda f: 5, {}, "a data set's name or a path, got int: pass one of digits"),
    ("a path that is not there", lambda f: f / "no.csv", {}, "or a path that exists, got .*no.csv"),
    ("unknown ending", bytes_file("x.xlsx", b"1"), {}, r"ending in .npy, .npz, .pt, .csv, got .*x.xlsx"),
    ("empty file", bytes_file("x.npy", b""), {}, "x.npy, got an empty file: write it again"),
    ("foreign npy", bytes_file("x.npy", b"hello"), {}, "x.npy, got a foreign file: write it with numpy.save"),
    (
        "truncated npy",
        truncated(array_file(ones)),
        {},
        "x.npy, got a truncated or broken file .*save it anew",
    ),
    ("pickled npy", object_array, {}, "x.npy, got pickled objects .*save it anew as numbers"),
    ("strings", array_file(np.array([["a", "b"]] * 12)), {}, "expected numbers in .*dtype <U1: convert"),
    ("complex", array_file(ones * 1j), {}, "got dtype complex128"),
    (
        "foreign npz",
        bytes_file("x.npz", b"hello"),
        {},
        "x.npz, got a foreign or truncated file: write it with",
    ),
    ("truncated npz", truncated(npz_file(x=ones)), {}, "x.npz, got a foreign or truncated file"),
    ("two arrays", npz_file(a=ones, b=ones), {}, r"one array only, in .*got \['a', 'b'\]: name the data x"),
    ("pickled npz", npz_file(x=np.array([{}] * 12)), {}, "x.npz, got pickled objects"),
    ("short labels", npz_file(x=ones, labels=np.arange(3)), {}, r"labels of shape \(12,\) in .*got \(3,\)"),
    ("foreign pt", bytes_file("x.pt", b"hello"), {}, "x.pt, got a truncated or foreign file: write it with"),
    ("plain pickle", bytes_file("x.pt", pickle.dumps([1.0])), {}, "x.pt, got a truncated or foreign file"),
    ("truncated pt", truncated(pt_file(torch.ones(12, 2))), {}, "x.pt, got a truncated or foreign file"),
    ("pickled pt", pt_file(torch.nn.Linear(1, 1)), {}, "x.pt, got pickled objects"),
    ("dict without x", pt_file({"y": torch.ones(12, 2)}), {}, r"got the keys \['y'\]: name the data x"),
    ("list in pt", pt_file([1, 2]), {}, "to be a tensor, got list"),
    ("complex pt", pt_file(torch.ones(12, 2) * 1j), {}, "dense real tensor in .*complex64"),
    ("one dimension", array_file(np.ones(12)), {}, r"got shape \(12,\): reshape it"),
    ("five dimensions", array_file(np.ones((12, 1, 1, 1, 1))), {}, r"got shape \(12, 1, 1, 1, 1\)"),
    ("few rows", array_file(ones[:9]), {}, "at least 10 rows in .*got 9: add data"),
    ("no columns", array_file(np.ones((12, 0))), {}, r"values in every row of .*got shape \(12, 0\)"),
    (
        "NaN and inf",
        array_file(holes),
        {},
        r"got 1 infinite or too large, the first in row 9 \(from 0\), column 0 \(from 0\): fill in",
    ),
    (
        "NaN in images",
        array_file(np.full((12, 2, 2), np.nan)),
        {},
        r"got 48 .*row 0 \(from 0\), position \(0, 0, 0\)",
    ),
    ("beyond float32", array_file(ones * 1e39), {}, "got 24 infinite or too large"),
    (
        "constant column",
        array_file(flat),
        {},
        r"column 1 \(from 0\) is constant \(0.1\) in the training split, up to rounding: drop",
    ),
    (
        "constant csv column",
        csv_file("a,b\n" + "".join(f"{i / 3},0.7\n" for i in range(20)).replace("0.7", "1.7")),
        {},
        r"column 'b' is constant \(1.7\)",
    ),
    (
        "words in csv",
        csv_file("a,b\n1,2\n3,x\n"),
        {},
        r"numbers in column 'b' .*got 'x' in line 3: .*label= .*id= .*time= ",
    ),
    (
        "absent label",
        csv_file("a,b\n" + numbers),
        {"label": "c"},
        r"label= \(--data.label\) to be one of the columns \['a', 'b'\]",
    ),
    (
        "absent id",
        csv_file("a,b\n" + numbers),
        {"id": "c"},
        r"id= \(--data.id\) to be one of the columns \['a', 'b'\] .*got 'c'",
    ),
    (
        "missing label",
        csv_file("a,b\n1,2\n3,\n"),
        {"label": "b"},
        "a label in every row of column 'b' .*line 3",
    ),
    ("only labels", csv_file("a\n1\n"), {"label": "a"}, "a column to model in .*got 'a' alone"),
    ("header only", csv_file("a,b\n"), {}, "at least 10 rows in .*got 0"),
    ("blank csv", csv_file("\n\n"), {}, "expected a header row .*got an empty file"),
    ("twice the same name", csv_file("a,a\n" + numbers), {}, r"distinct column names .*got \['a'\] twice"),
    ("nameless column", csv_file(",b\n" + numbers), {}, r"none for column 1: name it in the header"),
    ("ragged csv", csv_file("a,b\n1,2\n3\n"), {}, r"expected 2 cells in line 3 of .*got 1: mend"),
    ("binary csv", csv_file(b"a,b\n\xff\xfe"), {}, "expected 2 cells in line 2 of .*, got 1: mend that line"),
    ("open quote", csv_file('a,b\n"1,2\n'), {}, "expected 2 cells in line 2 of .*, got 1: mend that line"),
    (
        "label of an array",
        array_file(ones),
        {"label": "a"},
        r"a .csv file for label='a', got .*leave label= \(--data.label\) out",
    ),
    (
        "id of digits",
        lambda f: "digits",
        {"id": "a"},
        "a .csv file for id='a', got 'digits'",
    ),
    ("empty folder", lambda f: f, {}, r"expected images \(.png, .*got none: correct the path"),
    ("odd image", odd_image, {}, r"have 5 x 4 pixels as 00.png has, .*07.png has 9 x 9: resize them all by size="),
    ("broken image", broken_image, {}, "expected an image in .*03.png, got a truncated, foreign or too large file"),
    ("deep image", deep_image, {}, "expected an image in .*05.tif, got .*values from 70000 to 70000 of 32 bits"),
    ("stray image", stray_image, {}, "in sub-folders or none, .*00.png is not: move it"),
    (
        "binarised counts",
        array_file(ones * 3),
        {"binarize": "static"},
        r"in \[0, 1\] to binarise, got 3 to 3 in x",
    ),
    (
        "binarised reals",
        array_file(real_table()),
        {"binarize": "dynamic"},
        "to binarise, .*pass binarize='none'",
    ),
    (
        "unknown binarisation",
        lambda f: "digits",
        {"binarize": "yes"},
        "'none', 'static' or 'dynamic', got 'yes'",
    ),
    (
        "fractions above 1",
        lambda f: "digits",
        {"split": (0.8, 0.1, 0.2)},
        r"sum to 1, got \(0.8, 0.1, 0.2\): pass",
    ),
    ("two fractions", lambda f: "digits", {"split": (0.8, 0.2)}, "three fractions"),
    ("a fraction of 0", lambda f: "digits", {"split": (0.8, 0.2, 0.0)}, "each above 0"),
    ("a word for a split", lambda f: "digits", {"split": "train"}, "three fractions .*got 'train'"),
    (
        "an empty split",
        array_file(ones),
        {"split": (0.98, 0.01, 0.01)},
        r"one row in each split of x, got \(12, 0, 0\)",
    ),
    ("negative seed", lambda f: "digits", {"seed": -1}, r"from 0 to 2\*\*32 - 1, got -1"),
]


@pytest.mark.parametrize(("make", "options", "message"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_answered_in_one_line(make, options, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_dataset(make(tmp_path), **options)
    text = str(error.value)
    assert "\n" not in text and ": " in text
    assert isinstance(error.value, FileNotFoundError) == ("no.csv" in text)


def test_a_table_of_large_whole_numbers_is_standardised(tmp_path):
    """Years and temperatures are no counts: a Normal is their likelihood, on the standardised scale."""
    generator = torch.Generator().manual_seed(0)
    table = torch.stack(
        [torch.randint(-20, 40, (50,), generator=generator), torch.randint(1990, 2024, (50,), generator=generator)], 1
    )
    lines = ["temperature,year", *(f"{int(a)},{int(b)}" for a, b in table)]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    dataset = load_dataset(tmp_path / "table.csv")
    assert dataset.scale is not None and dataset.train.log_jacobian < -3
    torch.testing.assert_close(dataset.train.x.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    restored = {tuple(row) for row in dataset.restore(dataset.test.x).round().int().tolist()}
    assert restored <= {tuple(row) for row in table.tolist()}
