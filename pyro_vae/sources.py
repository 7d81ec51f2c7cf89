"""The sources of data, as they are: named data sets, and files and folders of the user's own."""

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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["NAMED", "Source", "column_name", "find", "kind_of"]


@dataclass(eq=False)
class Source:
    """The raw contents of a source, in the source's order."""

    x: Tensor  # (N, ...), uint8, float32 or float64; of sequences (N, T, D), padded with zeros
    labels: Tensor | None = None
    ids: np.ndarray | None = None
    columns: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    lengths: Tensor | None = None  # (N,), of sequences
    sizes: tuple[int, int, int] | None = None  # the data set's own split of x[order]
    order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    peak: int = 1  # the value that stands for probability 1
    eight_bit: bool = False
    noun: str = ""
    values: str = ""


def find(
    name_or_path: str | os.PathLike[str],
    root: str | os.PathLike[str] | None,
    download: bool,
    label: str | None,
    id: str | None,
) -> tuple[str, Source]:
    if not isinstance(name_or_path, str | os.PathLike):
        raise ValueError(f"expected a data set's name or a path, got {kind_of(name_or_path)}: pass one of {_names()}")
    text = os.fspath(name_or_path)
    for option, column in (("label", label), ("id", id)):
        if column is not None and (text in NAMED or Path(text).suffix.lower() != ".csv"):
            raise ValueError(f"expected a .csv file for {option}={column!r}, got {text!r}: leave {option}= out")
    if text in NAMED:
        root = Path(root or os.environ.get("PYRO_VAE_DATA") or "~/.cache/pyro_vae").expanduser()
        return text, NAMED[text](root, download)

    path = Path(text).expanduser()
    if not path.exists():
        message = f"expected one of {_names()} or a path that exists, got {text!r}: correct the name or the path"
        raise (FileNotFoundError if path.suffix or len(path.parts) > 1 else ValueError)(message)
    readers: dict[str, Callable[[Path], Source]] = {
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


def _digits(root: Path, download: bool) -> Source:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return Source(
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


def _mnist(class_name: str, noun: str) -> Callable[[Path, bool], Source]:
    def load(root: Path, download: bool) -> Source:
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
        return Source(
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


def _freyfaces(root: Path, download: bool) -> Source:
    from scipy.io import loadmat

    path = root / "freyfaces" / "frey_rawface.mat"
    if download and not path.is_file():
        _download(_FREY_URL, path, _FREY_SHA256)
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
    return Source(
        torch.from_numpy(frames.T.reshape(-1, 1, 28, 20).copy()),
        sizes=(1565, 200, 200),
        order=torch.arange(1965),
        eight_bit=True,
        noun="frames of one face, 28 x 20 pixels",
    )


def _download(url: str, path: Path, sha256: str | None = None) -> None:
    with _temporary_sibling(path.parent) as temporary:
        fresh = Path(temporary) / path.name
        try:
            with urllib.request.urlopen(url, timeout=60) as response, fresh.open("wb") as file:
                shutil.copyfileobj(response, file)
        except Exception as error:
            raise OSError(_download_failed(url, path.parent, error)) from error
        checksum = hashlib.sha256(fresh.read_bytes()).hexdigest()
        if sha256 not in (None, checksum):
            problem = f"sha256 {checksum[:12]}... instead of {sha256[:12]}..."
            raise OSError(_download_failed(url, path.parent, problem))
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(fresh, path)


def _polyphonic(name: str, noun: str) -> Callable[[Path, bool], Source]:
    """Splits of sequences of chords, tuples of MIDI numbers from 21 to 108 (Boulanger-Lewandowski et al. 2012)."""

    def load(root: Path, download: bool) -> Source:
        path = root / name / f"{name}.pickle"
        if download and not path.is_file():
            from pyro.contrib.examples import polyphonic_data_loader

            _download(getattr(polyphonic_data_loader, name.upper()).url, path)
        if not path.is_file():
            raise FileNotFoundError(
                f"expected {path.name} in {path.parent}, got no such file: pass download=True (--data.download), or "
                f"root= (--data.root, or PYRO_VAE_DATA) the folder that holds {name}/"
            )
        try:
            with path.open("rb") as file:
                splits = _Chords(file, encoding="latin1").load()
            songs = [song for split in ("train", "valid", "test") for song in splits[split]]
            lengths = torch.tensor([len(song) for song in songs])
            x = torch.zeros(len(songs), int(lengths.max()), 88, dtype=torch.uint8)
            for i, song in enumerate(songs):
                for t, chord in enumerate(song):
                    x[i, t, [note - 21 for note in chord]] = 1
        except Exception as error:
            raise ValueError(
                f"expected sequences of chords in {path}, got a truncated or foreign file ({_first_line(error)}): "
                "delete it and pass download=True"
            ) from error
        sizes = len(splits["train"]), len(splits["valid"]), len(splits["test"])
        order = torch.arange(len(songs))
        return Source(x, lengths=lengths, sizes=sizes, order=order, noun=noun, values="88 keys pressed or not")

    return load


class _Chords(pickle.Unpickler):
    """Reads numbers, strings and their lists alone: NumPy's whole numbers by a function of this module."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "scalar" and module.endswith("multiarray"):
            return lambda dtype, raw: int.from_bytes(raw.encode("latin1"), "little", signed=True)
        if (module, name) == ("numpy", "dtype"):
            return _Integer
        raise pickle.UnpicklingError(f"{module}.{name} is no number")


class _Integer:
    """In the place of ``numpy.dtype("i8")``."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _temporary_sibling(folder: Path) -> tempfile.TemporaryDirectory[str]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=f".{folder.name}-download-", dir=folder.parent)


def _download_failed(what: str, folder: Path, problem: object) -> str:
    return (
        f"expected to download {what}, got a failure ({_first_line(problem)}), nothing was kept: "
        f"try again, or put the files into {folder} yourself"
    )


NAMED: dict[str, Callable[[Path, bool], Source]] = {
    "digits": _digits,
    "mnist": _mnist("MNIST", "handwritten digits"),
    "fashion_mnist": _mnist("FashionMNIST", "pieces of clothing"),
    "freyfaces": _freyfaces,
    "jsb_chorales": _polyphonic("jsb_chorales", "chorales of four voices, in quarter notes"),
    "piano_midi": _polyphonic("piano_midi", "pieces for piano"),
    "muse_data": _polyphonic("muse_data", "pieces for orchestra and piano"),
    "nottingham": _polyphonic("nottingham", "folk tunes with chords"),
}


def _names() -> str:
    return ", ".join(NAMED)


# ------------------------------------------------------------ the user's own files


def _read_npy(path: Path) -> Source:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError(f"expected an array in {path}, got a foreign file: write it with numpy.save")
        file.seek(0)
        try:
            array = np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:
            raise _unreadable(path, error) from error
    return Source(_from_numpy(array, path))


def _read_npz(path: Path) -> Source:
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
    return Source(_from_numpy(arrays[name], path), labels, classes=classes)


def _read_pt(path: Path) -> Source:
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
            raise ValueError(f"expected {name} in {path} to be a tensor, got {kind_of(value)}: save it as a tensor")
    if x.is_complex() or x.is_quantized or x.layout != torch.strided:
        raise ValueError(
            f"expected a dense real tensor in {path}, got {x.dtype} ({x.layout}): convert it before saving"
        )
    x = x.detach().to(torch.uint8 if x.dtype in (torch.bool, torch.uint8) else torch.float64)
    codes = None if labels is None else _labels(labels.detach().double().numpy(), path)[0]
    return Source(x, codes)


def _read_csv(path: Path, label: str | None, id: str | None) -> Source:
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
    return Source(torch.from_numpy(x), labels, ids, tuple(features), classes)


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


def _read_images(folder: Path) -> Source:
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
    return Source(x.contiguous(), labels, ids, classes=classes, eight_bit=True)


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


def _checked(source: Source, where: Path) -> Source:
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
        column = f"column {column_name(place[0], source.columns)}" if x.ndim == 2 else f"position {tuple(place)}"
        raise ValueError(
            f"expected finite float32 values in {where}, got {int(bad.sum())} missing, NaN, infinite or too "
            f"large, the first in row {row} (from 0), {column}: fill in or drop these rows"
        )
    return replace(source, x=x)


def column_name(j: int, columns: tuple[str, ...] | None) -> str:
    return f"{j} (from 0)" if columns is None else repr(columns[j])


def kind_of(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _first_line(problem: object) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0][:160] if lines else type(problem).__name__
