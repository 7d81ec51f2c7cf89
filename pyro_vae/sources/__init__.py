"""The sources of data, as they are: named data sets, and files and folders of the user's own."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .base import Arrays, Choice, Columns, Source, column_name, for_shell, kind_of
from .files import (
    OF_STEPS,
    SIXTEEN_BIT,
    checked,
    of_array,
    of_table,
    read_csv,
    read_future,
    read_images,
    read_npy,
    read_npz,
    read_pt,
)
from .frames import is_frame, of_frame
from .images import digits, freyfaces, mnist
from .sequences import polyphonic, simulated, sp500

__all__ = [
    "FORM",
    "NAMED",
    "SIXTEEN_BIT",
    "Arrays",
    "Choice",
    "Columns",
    "Source",
    "column_name",
    "find",
    "for_shell",
    "holds_sequences",
    "is_frame",
    "is_table",
    "kind_of",
    "read_future",
    "read_npy",
]

FORM = ("header", "separator", "decimal", "thousands", "encoding", "comment")  # how a table is written
_SEQUENCES: dict[str, Callable[[Path, bool], Source]] = {
    "jsb_chorales": polyphonic("jsb_chorales", "chorales of four voices, in quarter notes"),
    "piano_midi": polyphonic("piano_midi", "pieces for piano"),
    "muse_data": polyphonic("muse_data", "pieces for orchestra and piano"),
    "nottingham": polyphonic("nottingham", "folk tunes with chords"),
    "sp500": sp500,
    "linear_sequences": simulated("linear_sequences"),
    "nonlinear_sequences": simulated("nonlinear_sequences"),
    "pendulum": simulated("pendulum"),
    "stochastic_volatility": simulated("stochastic_volatility"),
}
NAMED: dict[str, Callable[[Path, bool], Source]] = {
    "digits": digits,
    "mnist": mnist("MNIST", "handwritten digits"),
    "fashion_mnist": mnist("FashionMNIST", "pieces of clothing"),
    "freyfaces": freyfaces,
    **_SEQUENCES,
}


def _names() -> str:
    return ", ".join(NAMED)


def is_table(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a table in text, as its name says."""
    suffixes = [each.lower() for each in Path(path).suffixes]
    suffixes = suffixes[:-1] if suffixes[-1:] == [".gz"] else suffixes
    return suffixes[-1:] in ([".csv"], [".tsv"])


def holds_sequences(name_or_path: str | os.PathLike[str], time: str | None) -> bool:
    """Whether a source is one of sequences, as far as it can be told without reading it."""
    text = os.fspath(name_or_path)
    path = Path(os.path.expanduser(text))
    if text in NAMED or is_table(path):
        return text in _SEQUENCES or (text not in NAMED and time is not None)
    if path.suffix.lower() != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return bool({f"{name}.npy" for name in OF_STEPS} & {*archive.namelist()})


def _refuse(what: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError where an option is given that has no meaning for data in memory."""
    for option, value in options.items():
        option = "columns" if option in ("features", "expected", "optional") else option
        if value not in (None, ()):
            raise ValueError(f"expected a file for {option}={value!r}, got {what}: leave {option}= out")


def _numbers_of(given: Any) -> np.ndarray:
    """The values of an array or a tensor, those that a mask hides as gaps."""
    if isinstance(given, np.ndarray):
        masked = isinstance(given, np.ma.MaskedArray)
        return np.ma.filled(given.astype(np.float64), np.nan) if masked else given
    if given.is_nested or given.layout != torch.strided:
        what, mend = ("a nested one", "x.to_padded_tensor") if given.is_nested else (given.layout, "x.to_dense()")
        raise ValueError(f"expected a dense tensor, got {what}: pass {mend}")
    if given.is_meta:
        raise ValueError("expected real numbers, got a tensor on the meta device, which has none: pass its values")
    if given.is_complex() or given.is_quantized:
        mend = "x.dequantize()" if given.is_quantized else "torch.view_as_real(x)"
        raise ValueError(f"expected real numbers, got {given.dtype}: pass {mend}")
    given = given.detach().cpu()
    return (given.float() if given.is_floating_point() and given.itemsize < 4 else given).numpy()


def find(
    name_or_path: Any,
    root: str | os.PathLike[str] | None,
    download: bool,
    columns: Columns,
    arrays: Arrays,
    least: int = 10,
) -> tuple[str, Source]:
    """The name and the raw contents of a source, of at least so many rows."""
    size, channels, array, max_gb = arrays
    if is_frame(name_or_path):
        _refuse("the frame", {**arrays._asdict(), "max_gb": None, **{name: getattr(columns, name) for name in FORM}})
        times = [] if columns.time is None else columns.time.split(",")
        table = of_frame(name_or_path, [columns.label, columns.id, *map(str.strip, times)])
        return "frame", checked(of_table(table, columns), "the frame", least)
    if isinstance(name_or_path, np.ndarray | torch.Tensor):
        _refuse("the array", {"size": size, "array": array, **columns._asdict()})
        values = _numbers_of(name_or_path)
        return "array", checked(of_array(values, "the array"), "the array", least, channels)
    if not isinstance(name_or_path, str | os.PathLike):
        raise ValueError(f"expected a data set's name or a path, got {kind_of(name_or_path)}: pass one of {_names()}")
    text = os.fspath(name_or_path)
    for option, column in columns._asdict().items():
        option = "columns" if option in ("features", "expected", "optional") else option
        if column not in (None, ()) and (text in NAMED or not is_table(text)):
            raise ValueError(
                f"expected a .csv file for {option}={column!r}, got {text!r}: leave {option}= (--data.{option}) out"
            )
    pictures = {"size": "a folder of images", "channels": "an array of pictures", "array": "a .npz file"}
    for option, wanted in pictures.items():
        if getattr(arrays, option) is not None and text in NAMED:
            raise ValueError(f"expected {wanted} for {option}= (--data.{option}), got {text!r}: leave it out")
    if text in NAMED:
        root = Path(root or os.environ.get("PYRO_VAE_DATA") or "~/.cache/pyro_vae").expanduser()
        return text, NAMED[text](root, download)

    path = Path(text).expanduser()
    if not path.exists():
        message = f"expected one of {_names()} or a path that exists, got {text!r}: correct the name or the path"
        raise (FileNotFoundError if path.suffix or len(path.parts) > 1 else ValueError)(message)
    readers: dict[str, Callable[[Path], Source]] = {
        ".npy": partial(read_npy, max_gb=max_gb),
        ".npz": partial(read_npz, arrays=arrays),
        ".pt": partial(read_pt, max_gb=max_gb),
        ".csv": partial(read_csv, columns=columns),
    }
    suffix = ".csv" if is_table(path) else path.suffix.lower()
    fits = {"size": path.is_dir(), "channels": suffix in (".npy", ".npz", ".pt"), "array": suffix == ".npz"}
    for option, wanted in pictures.items():
        if getattr(arrays, option) is not None and not fits[option]:
            raise ValueError(f"expected {wanted} for {option}= (--data.{option}), got {text!r}: leave it out")
    if path.is_dir():
        source = read_images(path, size, max_gb)
    elif suffix not in readers:
        raise ValueError(
            f"expected a folder of images or a file ending in {', '.join(readers)}, got {text!r}: convert "
            "it with numpy.save, say"
        )
    elif path.stat().st_size == 0:
        raise ValueError(f"expected data in {path}, got an empty file: write it again")
    else:
        source = readers[suffix](path)
    name = path.name if path.is_dir() else path.stem
    name = name.removesuffix(".csv").removesuffix(".tsv") if suffix == ".csv" else name
    return name, checked(source, path, least, channels)
