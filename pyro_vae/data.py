"""Data sets, and the one form in which data reach a model.

`load_dataset` gives a `Dataset` of three `Split`s; `as_data` turns what a user passes to `fit` or `evaluate`
into `Data`. Every random choice comes from a `torch.Generator` with a fixed seed: the global generators are
neither read nor moved.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
import pickle
import shutil
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

__all__ = ["Data", "Dataset", "Split", "as_data", "load_dataset"]

Binarize = Literal["none", "static", "dynamic"]


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """What a model is conditioned on: tensors indexed together on dimension 0.

    Args:
        args: tensors (N, ...) that go to model and guide by position; at least one.
        kwargs: tensors (N, ...) that go by keyword.
        log_jacobian: nats per datum to add to a log-density of these data to get it in the original units.
        labels: (N,) or None; never shown to a model.

    Raises:
        ValueError: something that is no tensor, no tensor at all, no rows, or unequal lengths on dimension 0.

    Example:
        >>> data = Data((torch.zeros(5, 3),), {"lengths": torch.arange(5)})
        >>> len(data)
        5
        >>> data.batch(torch.tensor([4, 0]))[1]
        {'lengths': tensor([4, 0])}
    """

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor] = field(default_factory=dict)
    log_jacobian: float = 0.0
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.args:
            raise ValueError("expected at least one tensor by position, got none: pass (x,) or (x, {'name': tensor})")
        lengths = {}
        for name, value in [*((f"tensor {i}", a) for i, a in enumerate(self.args)), *self.kwargs.items()]:
            if not isinstance(value, Tensor):
                raise ValueError(f"expected a tensor as {name}, got {_kind(value)}: convert it with torch.as_tensor")
            if value.ndim == 0:
                raise ValueError(f"expected {name} with data on dimension 0, got a scalar tensor: pass shape (N, ...)")
            lengths[name] = len(value)
        if self.labels is not None:
            lengths["labels"] = len(self.labels)
        if len(set(lengths.values())) > 1:
            came = ", ".join(f"{name}: {length}" for name, length in lengths.items())
            raise ValueError(f"expected equal lengths on dimension 0, got {came}: give every tensor one row per datum")
        if len(self) == 0:
            raise ValueError("expected at least one datum, got tensors of length 0 on dimension 0: pass rows to score")

    def __len__(self) -> int:
        return len(self.args[0])

    def __repr__(self) -> str:
        shapes = [f"{tuple(tensor.shape)}" for tensor in self.args]
        shapes += [f"{name}={tuple(tensor.shape)}" for name, tensor in self.kwargs.items()]
        return f"{type(self).__name__}({', '.join(shapes)})"

    @property
    def device(self) -> torch.device:
        """Where the data live."""
        return self.args[0].device

    def to(self, device: torch.device | str) -> Self:
        """The same data with all tensors on `device`, in a new object of the same type."""
        return replace(
            self,
            args=tuple(tensor.to(device) for tensor in self.args),
            kwargs={name: tensor.to(device) for name, tensor in self.kwargs.items()},
            labels=None if self.labels is None else self.labels.to(device),
        )

    def batch(
        self, index: Tensor, generator: torch.Generator | None = None
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The rows `index` (B,) as `(args, kwargs)`, on the data's device.

        `generator`, on that device, is for splits that draw their data afresh; other data leave it untouched.
        """
        rows = index.to(self.device)
        args = tuple(tensor.index_select(0, rows) for tensor in self.args)
        return args, {name: tensor.index_select(0, rows) for name, tensor in self.kwargs.items()}


@dataclass(frozen=True, eq=False, repr=False)
class Split(Data):
    """One part of a data set: `args == (x,)` with x (N, *event_shape), float32.

    Args:
        name: "train", "valid" or "test".
        binarize: "dynamic" where x holds intensities in [0, 1] and `batch` draws x' ~ Bernoulli(x) afresh;
            else None.
        ids: (N,) what names each datum in its source: the id column, the image's path, or the row counted
            from 0.
        source: the arguments of `load_dataset` that are not defaults, with absolute paths: it can be called again.
    """

    name: str = "train"
    binarize: Literal["dynamic"] | None = None
    ids: np.ndarray | None = None
    source: dict[str, Any] | None = None

    @property
    def x(self) -> Tensor:
        """(N, *event_shape), float32, as stored: the intensities where `binarize` is "dynamic"."""
        return self.args[0]

    @cached_property
    def observed(self) -> Tensor:
        """(N, *event_shape), what a model can score: x, or one fixed draw of it, the same on every device."""
        return self.x if self.binarize is None else _bernoulli(self.x.cpu(), seed=0).to(self.device)

    @cached_property
    def _draws(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)

    def batch(
        self, index: Tensor, generator: torch.Generator | None = None
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The rows `index` (B,) as `((x,), {})`, drawn afresh where `binarize` is "dynamic".

        The draws come from `generator`, or without one from the split's own, which starts at a fixed seed.

        Raises:
            ValueError: a generator on another device than the data.
        """
        args, kwargs = super().batch(index)
        if self.binarize is None:
            return args, kwargs
        generator = self._draws if generator is None else generator
        if generator.device.type != self.device.type:
            raise ValueError(
                f"expected a generator on {self.device}, got one on {generator.device}: make it with "
                f"torch.Generator({str(self.device)!r})"
            )
        return (_fast_bernoulli(args[0], generator),), kwargs


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Three splits of one source, and what is known about it.

    Args:
        name: the data set's name, or the file's without its ending.
        train, valid, test: disjoint splits.
        event_shape: the shape of one datum, (C, H, W) or (D,).
        description: one sentence on the data.
        location, scale: (D,), float64, in original units: the columns of a real-valued table were
            standardised to (x - location) / scale, with the training split's mean and (1/N) standard
            deviation; None elsewhere.
        columns: names of a table's columns, or None.
        classes: what the labels 0, 1, ... stand for, where the source names its classes; else None.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    event_shape: torch.Size
    description: str
    location: Tensor | None = None
    scale: Tensor | None = None
    columns: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split.name} {len(split):,}" for split in (self.train, self.valid, self.test))
        return f"Dataset({self.name}: {self.description}; {sizes})"

    def to(self, device: torch.device | str) -> Dataset:
        """The same data set with all three splits on `device`."""
        return replace(self, train=self.train.to(device), valid=self.valid.to(device), test=self.test.to(device))

    def restore(self, x: Tensor) -> Tensor:
        """scale x + location for x (..., D), in x's dtype and on its device: the original units."""
        if self.location is None or self.scale is None:
            return x
        return (self.scale * x.cpu() + self.location).to(dtype=x.dtype).to(x.device)


def as_data(data: Any) -> Data:
    """The data that `data` stands for.

    Args:
        data: a tensor (N, ...); a tuple of such tensors, optionally ending in a dict of keyword tensors; or
            `Data`, such as a split of a data set, which is returned as it is.

    Raises:
        ValueError: anything else, unequal lengths on dimension 0, or no data.

    Example:
        >>> as_data((torch.zeros(7, 2), {"u": torch.ones(7, 1)}))
        Data((7, 2), u=(7, 1))
    """
    if isinstance(data, Data):
        return data
    if isinstance(data, Tensor):
        return Data((data,))
    if isinstance(data, Dataset):
        raise ValueError(f"expected data, got the whole data set {data.name!r}: pass its .train, .valid or .test")
    if not isinstance(data, tuple):
        raise ValueError(
            "expected a tensor, a tuple of tensors that may end in a dict of tensors, or a split of a data "
            f"set, got {_kind(data)}: convert it with torch.as_tensor, or put the tensors into a tuple"
        )
    if data and isinstance(data[-1], dict):
        return Data(data[:-1], data[-1])
    return Data(data)


def load_dataset(
    name_or_path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    binarize: Binarize = "none",
    split: Sequence[float] | None = None,
    label: str | None = None,
    id: str | None = None,
    seed: int = 0,
) -> Dataset:
    """A data set by name, or from a file or folder of the user's own.

    - `digits` (scikit-learn's, embedded): 1,297 / 250 / 250 images (1, 8, 8), counts 0 to 16.
    - `mnist`, `fashion_mnist`: 50,000 / 10,000 / 10,000 images (1, 28, 28), intensities x/255.
    - `freyfaces`: 1,565 / 200 / 200 frames (1, 28, 20), intensities x/255, in the order of the film.
    - a `.npy`, `.npz` (array `x`, or the only one; `labels`), `.pt` (a tensor, or a dict with x and labels)
      or `.csv` file (a header row, numeric columns), or a folder of images of one size whose sub-folders, if
      any, are the classes.

    A name goes before a file of that name: write `./digits` for the file. Arrays are tables (N, D) or images
    (N, H, W), (N, C, H, W) or, for uint8, (N, H, W, 3).

    Eight-bit data become x/255, and are scored as such: uint8 arrays with values above 1, image files, and
    images without negative values whose largest is above 127 and at most 255. Other whole numbers, values in
    [0, 1] and real-valued images stay as they are. Other tables are standardised per column, and
    score + `log_jacobian` is the score in the original units.

    Args:
        name_or_path: one of the names above, or a path.
        root: where the named data sets are kept; default: the environment's PYRO_VAE_DATA, else
            ~/.cache/pyro_vae.
        download: fetch the named data set if it is not there. An interrupted download leaves nothing behind.
        binarize: "none"; "static": x' ~ Bernoulli(x), drawn once; "dynamic": training batches are drawn
            afresh, the other splits once with a fixed seed. Data must be in [0, 1] (`digits` takes x/16).
        split: fractions (train, valid, test) of a permutation of all rows; default: the data set's own split,
            for the user's own data 80/10/10.
        label, id: columns of a `.csv` that are kept apart from the features, in `labels` and `ids` of the
            splits.
        seed: of the split's permutation and of static binarisation, and of nothing else.

    Raises:
        ValueError: an unknown name, contents or options that cannot be used.
        FileNotFoundError: no such path, or the named data set is not under `root`.
        OSError: a download that failed.
        ImportError: torchvision cannot be imported.

    Example:
        >>> digits = load_dataset("digits", binarize="dynamic")
        >>> digits.description
        '1,797 handwritten digits of 8 x 8 pixels, x/16 binarised afresh'
        >>> (x,), _ = digits.train.batch(torch.arange(100), torch.Generator().manual_seed(0))
        >>> x.shape, x.unique()
        (torch.Size([100, 1, 8, 8]), tensor([0., 1.]))
    """
    if binarize not in ("none", "static", "dynamic"):
        raise ValueError(
            f"expected binarize to be 'none', 'static' or 'dynamic', got {binarize!r}: choose one of these"
        )
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"expected seed to be a whole number from 0 to 2**32 - 1, got {seed!r}: choose such a number")
    if split is not None:
        _check_fractions(split)

    name, source = _find(name_or_path, root, download, label, id)
    known = isinstance(name_or_path, str) and name_or_path in _NAMED
    arguments: dict[str, Any] = {"name_or_path": name_or_path if known else _absolute(name_or_path)}
    arguments |= {"binarize": binarize} if binarize != "none" else {}
    arguments |= {key: value for key, value in (("label", label), ("id", id)) if value is not None}
    arguments |= {"root": _absolute(root)} if root else {}
    arguments |= {"split": list(split)} if split else {}
    arguments |= {"seed": seed} if seed else {}
    x, values = _scaled(source)
    if binarize != "none":
        x = _intensities(x / source.peak, name)
        values = f"x/{source.peak}" if source.peak > 1 else values
        values += " binarised once" if binarize == "static" else " binarised afresh"

    if split is None and source.sizes is not None:
        permutation, sizes = source.order, source.sizes
    else:
        permutation = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        sizes = _sizes(len(x), (0.8, 0.1, 0.1) if split is None else split, name)
    rows = permutation.split(list(sizes))
    parts = [x[r] for r in rows]

    location = scale = None
    if binarize == "none" and _is_real_table(x):
        location, scale = _standardisation(x, rows[0], source.columns, name)
        parts = [(part - location) / scale for part in parts]
        values = "real values standardised per column"
    elif binarize == "static":
        parts = [_bernoulli(part, 3 * seed + i) for i, part in enumerate(parts)]
    elif binarize == "dynamic":
        parts = [parts[0], _bernoulli(parts[1], 1), _bernoulli(parts[2], 2)]

    def make_split(i: int, split_name: str) -> Split:
        return Split(
            (parts[i].float(),),
            log_jacobian=0.0 if scale is None else -scale.log().sum().item(),
            labels=None if source.labels is None else source.labels[rows[i]],
            name=split_name,
            binarize="dynamic" if binarize == "dynamic" and split_name == "train" else None,
            ids=rows[i].numpy() if source.ids is None else source.ids[rows[i].numpy()],
            source=arguments,
        )

    return Dataset(
        name,
        train=make_split(0, "train"),
        valid=make_split(1, "valid"),
        test=make_split(2, "test"),
        event_shape=x.shape[1:],
        description=f"{len(x):,} {source.noun or _noun(x.shape)}, {values}",
        location=location,
        scale=scale,
        columns=source.columns,
        classes=source.classes,
    )


@dataclass(eq=False)
class _Source:
    """The raw contents of a source, in the source's order."""

    x: Tensor  # (N, ...), uint8, float32 or float64
    labels: Tensor | None = None
    ids: np.ndarray | None = None
    columns: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    sizes: tuple[int, int, int] | None = None  # the data set's own split of x[order]
    order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    peak: int = 1  # the value that stands for probability 1
    eight_bit: bool = False
    noun: str = ""
    values: str = ""


def _find(
    name_or_path: str | os.PathLike[str],
    root: str | os.PathLike[str] | None,
    download: bool,
    label: str | None,
    id: str | None,
) -> tuple[str, _Source]:
    if not isinstance(name_or_path, str | os.PathLike):
        raise ValueError(f"expected a data set's name or a path, got {_kind(name_or_path)}: pass one of {_names()}")
    text = os.fspath(name_or_path)
    for option, column in (("label", label), ("id", id)):
        if column is not None and (text in _NAMED or Path(text).suffix.lower() != ".csv"):
            raise ValueError(f"expected a .csv file for {option}={column!r}, got {text!r}: leave {option}= out")
    if text in _NAMED:
        root = Path(root or os.environ.get("PYRO_VAE_DATA") or "~/.cache/pyro_vae").expanduser()
        return text, _NAMED[text](root, download)

    path = Path(text).expanduser()
    if not path.exists():
        message = f"expected one of {_names()} or a path that exists, got {text!r}: correct the name or the path"
        raise (FileNotFoundError if path.suffix or len(path.parts) > 1 else ValueError)(message)
    readers: dict[str, Callable[[Path], _Source]] = {
        ".npy": _read_npy,
        ".npz": _read_npz,
        ".pt": _read_pt,
        ".csv": partial(_read_csv, label=label, id=id),
    }
    suffix = path.suffix.lower()
    if path.is_dir():
        source = _read_images(path)
    elif suffix not in readers:
        raise ValueError(
            f"expected a folder of images or a file ending in {', '.join(readers)}, got {text!r}: convert "
            "it with numpy.save, say"
        )
    elif path.stat().st_size == 0:
        raise ValueError(f"expected data in {path}, got an empty file: write it again")
    else:
        source = readers[suffix](path)
    return path.name if path.is_dir() else path.stem, _checked(source, path)


# ------------------------------------------------------------ named data sets


def _digits(root: Path, download: bool) -> _Source:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return _Source(
        torch.from_numpy(images).float().reshape(-1, 1, 8, 8),
        torch.from_numpy(labels).long(),
        sizes=(1297, 250, 250),
        order=torch.randperm(len(images), generator=torch.Generator().manual_seed(0)),
        peak=16,
        noun="handwritten digits of 8 x 8 pixels",
        values="counts 0 to 16",
    )


_IDX_SHAPES = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}


def _mnist(class_name: str, noun: str) -> Callable[[Path, bool], _Source]:
    def load(root: Path, download: bool) -> _Source:
        torchvision_class = getattr(_torchvision_datasets(), class_name)
        folder = root / class_name / "raw"
        if download and _idx_problems(folder):
            _download_idx(torchvision_class, folder)
        missing = [file for file in _IDX_SHAPES if not (folder / file).is_file()]
        if missing:
            raise FileNotFoundError(
                f"expected the four files of {class_name} in {folder}, got no {', no '.join(missing)}: pass "
                f"download=True (--data.download), or root= (--data.root, or PYRO_VAE_DATA) the folder that holds "
                f"{class_name}/raw"
            )
        for problem in _idx_problems(folder):
            raise ValueError(f"{problem}: pass download=True to fetch it anew")
        files = [torchvision_class(root, train=train) for train in (True, False)]
        return _Source(
            torch.cat([file.data for file in files])[:, None],
            torch.cat([file.targets for file in files]).long(),
            classes=tuple(files[0].classes),
            sizes=(50_000, 10_000, 10_000),
            order=torch.arange(70_000),
            eight_bit=True,
            noun=f"{noun} of 28 x 28 pixels",
        )

    return load


def _torchvision_datasets() -> Any:
    try:
        import torchvision.datasets
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"expected a torchvision that fits torch {torch.__version__}, its import failed "
            f"({_first_line(error)}): run `pyro-vae doctor`, which tells how to install a matching pair"
        ) from error
    return torchvision.datasets


def _idx_problems(folder: Path) -> list[str]:
    """What is wrong with the idx files: a big-endian header (2048 + ndim, sizes), then unsigned bytes."""
    problems = []
    for file, shape in _IDX_SHAPES.items():
        path = folder / file
        header = np.array([2048 + len(shape), *shape], dtype=">i4").tobytes()
        expected, came = len(header) + math.prod(shape), path.stat().st_size if path.is_file() else 0
        if came != expected:
            problems.append(f"expected {expected:,} bytes in {path}, got {came:,} (truncated or foreign)")
        else:
            with path.open("rb") as stream:
                if stream.read(len(header)) != header:
                    problems.append(f"expected an idx file of shape {shape} in {path}, got a foreign one")
    return problems


def _download_idx(torchvision_class: Any, folder: Path) -> None:
    name = torchvision_class.__name__
    with _temporary_sibling(folder.parent) as temporary:
        fresh = Path(temporary) / name / "raw"
        try:
            torchvision_class(temporary, download=True)
        except Exception as error:
            raise OSError(_download_failed(name, folder, error)) from error
        for problem in _idx_problems(fresh):
            raise OSError(_download_failed(name, folder, problem))
        folder.mkdir(parents=True, exist_ok=True)
        for file in _IDX_SHAPES:
            os.replace(fresh / file, folder / file)


_FREY_URL = "https://cs.nyu.edu/~roweis/data/frey_rawface.mat"
_FREY_SHA256 = "e5d5aeea3fa1f780d1657a13f80480e80aaaf4f83554bd91b3846fd446f9d0ec"


def _freyfaces(root: Path, download: bool) -> _Source:
    from scipy.io import loadmat

    path = root / "freyfaces" / "frey_rawface.mat"
    if download and not path.is_file():
        _download_frey(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected frey_rawface.mat in {path.parent}, got no such file: pass download=True "
            "(--data.download), or root= (--data.root, or PYRO_VAE_DATA) the folder that holds freyfaces/"
        )
    try:
        frames = loadmat(path)["ff"]
    except Exception as error:
        raise ValueError(
            f"expected a MATLAB file with the array ff in {path}, got a truncated or foreign one "
            f"({_first_line(error)}): delete it and pass download=True"
        ) from error
    if frames.shape != (560, 1965) or frames.dtype != np.uint8:
        raise ValueError(
            f"expected ff in {path} to be uint8 of shape (560, 1965), got {frames.dtype} of shape "
            f"{frames.shape}: delete the file and pass download=True"
        )
    return _Source(
        torch.from_numpy(frames.T.reshape(-1, 1, 28, 20).copy()),
        sizes=(1565, 200, 200),
        order=torch.arange(1965),
        eight_bit=True,
        noun="frames of one face, 28 x 20 pixels",
    )


def _download_frey(path: Path) -> None:
    with _temporary_sibling(path.parent) as temporary:
        fresh = Path(temporary) / path.name
        try:
            with urllib.request.urlopen(_FREY_URL, timeout=60) as response, fresh.open("wb") as file:
                shutil.copyfileobj(response, file)
        except Exception as error:
            raise OSError(_download_failed(_FREY_URL, path.parent, error)) from error
        checksum = hashlib.sha256(fresh.read_bytes()).hexdigest()
        if checksum != _FREY_SHA256:
            problem = f"sha256 {checksum[:12]}... instead of {_FREY_SHA256[:12]}..."
            raise OSError(_download_failed(_FREY_URL, path.parent, problem))
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(fresh, path)


def _temporary_sibling(folder: Path) -> tempfile.TemporaryDirectory[str]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=f".{folder.name}-download-", dir=folder.parent)


def _download_failed(what: str, folder: Path, problem: object) -> str:
    return (
        f"expected to download {what}, got a failure ({_first_line(problem)}), nothing was kept: "
        f"try again, or put the files into {folder} yourself"
    )


_NAMED: dict[str, Callable[[Path, bool], _Source]] = {
    "digits": _digits,
    "mnist": _mnist("MNIST", "handwritten digits"),
    "fashion_mnist": _mnist("FashionMNIST", "pieces of clothing"),
    "freyfaces": _freyfaces,
}


def _names() -> str:
    return ", ".join(_NAMED)


# ------------------------------------------------------------ the user's own files


def _read_npy(path: Path) -> _Source:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError(f"expected an array in {path}, got a foreign file: write it with numpy.save")
        file.seek(0)
        try:
            array = np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:
            raise _unreadable(path, error) from error
    return _Source(_from_numpy(array, path))


def _read_npz(path: Path) -> _Source:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"expected arrays in {path}, got a foreign or truncated file: write it with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:
        raise _unreadable(path, error) from error
    others = [name for name in arrays if name != "labels"]
    name = "x" if "x" in arrays else others[0] if len(others) == 1 else None
    if name is None:
        raise ValueError(f"expected an array x, or one array only, in {path}, got {others}: name the data x")
    labels, classes = _labels(arrays["labels"], path) if "labels" in arrays else (None, None)
    return _Source(_from_numpy(arrays[name], path), labels, classes=classes)


def _read_pt(path: Path) -> _Source:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        pickled = zipfile.is_zipfile(path) and isinstance(error, pickle.UnpicklingError)
        raise ValueError(
            f"expected a tensor, or a dict with x and labels, in {path}, got "
            f"{'pickled objects' if pickled else 'a truncated or foreign file'}: write it with torch.save"
        ) from error
    if isinstance(content, dict) and "x" not in content:
        raise ValueError(f"expected a tensor x in the dict of {path}, got the keys {list(content)}: name the data x")
    x, labels = (content["x"], content.get("labels")) if isinstance(content, dict) else (content, None)
    for name, value in (("x", x), ("labels", labels)):
        if not isinstance(value, Tensor) and not (name == "labels" and value is None):
            raise ValueError(f"expected {name} in {path} to be a tensor, got {_kind(value)}: save it as a tensor")
    if x.is_complex() or x.is_quantized or x.layout != torch.strided:
        raise ValueError(
            f"expected a dense real tensor in {path}, got {x.dtype} ({x.layout}): convert it before saving"
        )
    x = x.detach().to(torch.uint8 if x.dtype in (torch.bool, torch.uint8) else torch.float64)
    codes = None if labels is None else _labels(labels.detach().double().numpy(), path)[0]
    return _Source(x, codes)


def _read_csv(path: Path, label: str | None, id: str | None) -> _Source:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file, strict=True) if row] or [[]]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"expected comma-separated text in UTF-8 in {path}, got something else ({_first_line(error)}): "
            "export it anew as CSV"
        ) from error
    _check_header(path, header)
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(
                f"expected {len(header)} cells in row {i} (from 0) of {path}, got {len(row)}: mend that row"
            )
    for option, name in (("label", label), ("id", id)):
        if name is not None and name not in header:
            raise ValueError(
                f"expected {option}= to be one of the columns {header} of {path}, got {name!r}: correct it"
            )

    cells = dict(zip(header, zip(*rows, strict=True), strict=True)) if rows else {name: () for name in header}
    features = [name for name in header if name not in (label, id)]
    if not features:
        raise ValueError(f"expected a column beside label and id in {path}, got none: add a numeric column")
    x = np.empty((len(rows), len(features)))
    for j, name in enumerate(features):
        if not name.strip():
            raise ValueError(
                f"expected a name for every column of {path}, got none for column {header.index(name)} (from "
                f"0): name it in the header, or pass id={name!r} if it only numbers the rows"
            )
        for i, cell in enumerate(cells[name]):
            x[i, j] = _number(cell)
            if _is_word(cell):
                words = [column for column in features[j:] if any(map(_is_word, cells[column]))]
                also = f" (also in {', '.join(map(repr, words[1:]))})" if words[1:] else ""
                raise ValueError(
                    f"expected numbers in column {name!r} of {path}, got {cell!r} in row {i} (from 0){also}: name the "
                    "column of labels with label= (--data.label) and that of ids with id= (--data.id), or drop it"
                )
    labels, classes = (None, None) if label is None else _csv_labels(path, label, cells[label])
    ids = None if id is None else np.array(cells[id], dtype=str)
    return _Source(torch.from_numpy(x), labels, ids, tuple(features), classes)


def _check_header(path: Path, header: list[str]) -> None:
    if not header:
        raise ValueError(f"expected a header row in {path}, got an empty file: write the columns' names first")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise ValueError(f"expected distinct column names in the header of {path}, got {repeated} twice: rename them")
    numbers = [_number(name) for name in header]
    if not any(math.isnan(number) for number in numbers) and any(number % 1 for number in numbers):
        raise ValueError(f"expected a header row in {path}, got the numbers {header[:3]}...: write the names first")


def _is_missing(cell: str) -> bool:
    return cell.strip().lower() in ("", "na", "n/a", "nan", "null", "none")


def _is_word(cell: str) -> bool:
    return math.isnan(_number(cell)) and not _is_missing(cell)


def _number(cell: str) -> float:
    """The cell's value; NaN where it is missing or no number."""
    try:
        return math.nan if "_" in cell else float(cell)
    except ValueError:
        return math.nan


def _csv_labels(path: Path, name: str, cells: Sequence[str]) -> tuple[Tensor, tuple[str, ...] | None]:
    missing = [i for i, cell in enumerate(cells) if _is_missing(cell)]
    if missing:
        raise ValueError(
            f"expected a label in every row of column {name!r} of {path}, got {len(missing)} missing, the "
            f"first in row {missing[0]} (from 0): fill in or drop these rows"
        )
    numbers = np.array([_number(cell) for cell in cells])
    return _labels(np.array(cells, dtype=str) if np.isnan(numbers).any() else numbers, path)


_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")


def _pixels(path: Path) -> np.ndarray:
    """(H, W, 3), uint8; transparency is dropped."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode = image.mode
            pixels = None if mode[0] in "IF" else np.asarray(image.convert("RGBA").convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"expected an image in {path}, got a truncated or foreign file ({_first_line(error)}): replace it"
        ) from error
    if pixels is None:
        raise ValueError(f"expected 8 bits per channel in {path}, got the mode {mode!r}: convert it, or use .npy")
    return pixels


def _read_images(folder: Path) -> _Source:
    def visible(path: Path) -> bool:
        return not any(part.startswith(".") for part in path.relative_to(folder).parts)

    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _IMAGE_ENDINGS and p.is_file() and visible(p))
    if not paths:
        raise ValueError(f"expected images ({', '.join(_IMAGE_ENDINGS)}) in {folder}, got none: correct the path")
    parts = [path.relative_to(folder).parts for path in paths]
    in_folders = [len(p) > 1 for p in parts]
    if any(in_folders) and not all(in_folders):
        stray = paths[in_folders.index(False)]
        raise ValueError(f"expected all images of {folder} in sub-folders or none, {stray} is not: move it into one")

    arrays: list[np.ndarray] = []
    for path in paths:
        arrays.append(_pixels(path))
        if arrays[-1].shape != arrays[0].shape:
            first, odd = (f"{width} x {height}" for height, width, _ in (arrays[0].shape, arrays[-1].shape))
            raise ValueError(
                f"expected all images of {folder} to have {first} pixels as {paths[0].name} has, {path} has "
                f"{odd}: resize or crop it"
            )
    x = torch.from_numpy(np.stack(arrays)).movedim(-1, 1)
    if (x == x[:, :1]).all():
        x = x[:, :1]
    ids = np.array(["/".join(p) for p in parts])
    labels, classes = _labels(np.array([p[0] for p in parts]), folder) if all(in_folders) else (None, None)
    return _Source(x.contiguous(), labels, ids, classes=classes, eight_bit=True)


def _unreadable(path: Path, error: Exception) -> ValueError:
    came = "pickled objects" if "Object arrays" in str(error) else "a truncated or broken file"
    return ValueError(f"expected a numeric array in {path}, got {came} ({_first_line(error)}): save it anew as numbers")


def _from_numpy(array: np.ndarray, where: Path) -> Tensor:
    if array.dtype.kind not in "buif":
        raise ValueError(f"expected numbers in {where}, got dtype {array.dtype}: convert with array.astype('float32')")
    eight_bit = array.dtype in (np.dtype(bool), np.dtype(np.uint8))
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.uint8 if eight_bit else np.float64))


def _labels(labels: np.ndarray, where: Path) -> tuple[Tensor, tuple[str, ...] | None]:
    """(N,): whole numbers as int64, others as float32, strings as their place among the sorted classes."""
    if labels.dtype.kind == "U":
        classes, codes = np.unique(labels, return_inverse=True)
        return torch.from_numpy(codes).long(), tuple(str(name) for name in classes)
    if labels.dtype.kind not in "buif" or not np.isfinite(labels).all():
        raise ValueError(
            f"expected finite numbers or strings as labels in {where}, got {labels.dtype}: mend the labels"
        )
    whole = bool((labels == np.round(labels)).all())
    return torch.from_numpy(labels.astype(np.int64 if whole else np.float32)), None


# ------------------------------------------------------------ values and splits


def _checked(source: _Source, where: Path) -> _Source:
    """The user's own data as a table (N, D) or images (N, C, H, W), or an error."""
    x = source.x
    if x.ndim not in (2, 3, 4):
        raise ValueError(
            f"expected {where} to hold a table (N, D) or images (N, H, W) or (N, C, H, W), got shape "
            f"{tuple(x.shape)}: reshape it, for instance with x.reshape(len(x), -1)"
        )
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim == 4 and x.dtype == torch.uint8 and x.shape[3] == 3 and x.shape[1] not in (1, 3):
        x = x.movedim(3, 1).contiguous()
    if len(x) < 10:
        raise ValueError(f"expected at least 10 rows in {where}, to split them, got {len(x)}: add data")
    if x.numel() == 0:
        raise ValueError(f"expected values in every row of {where}, got shape {tuple(x.shape)}: add columns")
    if source.labels is not None and source.labels.shape != (len(x),):
        raise ValueError(
            f"expected labels of shape ({len(x)},) in {where}, got {tuple(source.labels.shape)}: give one per row"
        )
    bad = ~torch.isfinite(x.float()) if x.is_floating_point() else torch.zeros(1, dtype=torch.bool)
    if bad.any():
        row, *place = (int(i) for i in bad.nonzero()[0])
        column = f"column {_column(place[0], source.columns)}" if x.ndim == 2 else f"position {tuple(place)}"
        raise ValueError(
            f"expected finite float32 values in {where}, got {int(bad.sum())} missing, NaN, infinite or too "
            f"large, the first in row {row} (from 0), {column}: fill in or drop these rows"
        )
    return replace(source, x=x)


def _scaled(source: _Source) -> tuple[Tensor, str]:
    """The values that are modelled, float32 for eight-bit intensities x/255, and what to call them."""
    x = source.x
    low, high = (bound.item() for bound in x.aminmax())
    images_of_bytes = x.ndim > 2 and low >= 0 and 127 < high <= 255
    if source.eight_bit or images_of_bytes or (x.dtype == torch.uint8 and high > 1):
        return x.float() / 255, "intensities x/255"
    if x.dtype == torch.uint8:
        x = x.float()
    if source.values:
        return x, source.values
    if bool((x == x.round()).all()):
        return x, "binary values" if low >= 0 and high <= 1 else f"whole numbers {low:.0f} to {high:.0f}"
    return x, "values in [0, 1]" if low >= 0 and high <= 1 else "real values"


def _intensities(x: Tensor, name: str) -> Tensor:
    low, high = (bound.item() for bound in x.aminmax())
    if low < 0 or high > 1:
        raise ValueError(
            f"expected values in [0, 1] to binarise, got {low:g} to {high:g} in {name}: pass "
            "binarize='none', or scale the data into [0, 1]"
        )
    return x.float()


def _is_real_table(x: Tensor) -> bool:
    """A table that is neither of counts up to 255 nor within [0, 1]: a Normal is its likelihood."""
    counts = bool((x == x.round()).all()) and x.min().item() >= 0 and x.max().item() <= 255
    return x.ndim == 2 and not counts and not bool(((x >= 0) & (x <= 1)).all())


def _standardisation(
    x: Tensor, train_rows: Tensor, columns: tuple[str, ...] | None, name: str
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1/N) of the training rows, (D,) each."""
    location, scale = x[train_rows].mean(0), x[train_rows].std(0, correction=0)
    rounding = 1e-12 * x.abs().amax(0)
    constant = (scale <= rounding).nonzero().flatten().tolist()
    if constant:
        raise ValueError(
            f"expected every column of {name} to vary, column {_column(constant[0], columns)} is constant "
            f"({location[constant[0]]:g}) in the training split, up to rounding: drop it"
        )
    return location, scale


def _check_fractions(fractions: Sequence[float]) -> None:
    numbers = isinstance(fractions, tuple | list) and all(isinstance(f, int | float) and f > 0 for f in fractions)
    if not numbers or len(fractions) != 3 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            "expected split to be three fractions (train, valid, test), each above 0, that sum to 1, got "
            f"{fractions!r}: pass for instance (0.8, 0.1, 0.1)"
        )


def _sizes(count: int, fractions: Sequence[float], name: str) -> tuple[int, int, int]:
    valid, test = (round(fraction * count) for fraction in fractions[1:])
    sizes = (count - valid - test, valid, test)
    if min(sizes) < 1:
        raise ValueError(
            f"expected at least one row in each split of {name}, got {sizes} of its {count} rows: raise the "
            "smallest fraction"
        )
    return sizes


def _bernoulli(probability: Tensor, seed: int) -> Tensor:
    return torch.bernoulli(probability, generator=torch.Generator().manual_seed(seed))


def _fast_bernoulli(probability: Tensor, generator: torch.Generator) -> Tensor:
    """As `torch.bernoulli`, from 24 random bits per number too, but two numbers per draw of the generator."""
    count = probability.numel()
    words = torch.empty(-(-count // 2), dtype=torch.int64, device=probability.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int32)[:count].view(probability.shape)
    uniform = (bits >> 8).to(probability.dtype)  # on -2^23, ..., 2^23 - 1
    return torch.lt(uniform, probability * 2**24 - 2**23, out=uniform)


# ------------------------------------------------------------ words


def _absolute(path: str | os.PathLike[str]) -> str:
    return str(Path(path).expanduser().absolute())


def _noun(shape: torch.Size) -> str:
    if len(shape) == 2:
        return f"rows of {shape[1]} column{'s' if shape[1] > 1 else ''}"
    _, channels, height, width = shape
    return f"images of {height} x {width} pixels" + (f" in {channels} channels" if channels > 1 else "")


def _column(j: int, columns: tuple[str, ...] | None) -> str:
    return f"{j} (from 0)" if columns is None else repr(columns[j])


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _first_line(problem: object) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0][:160] if lines else type(problem).__name__
