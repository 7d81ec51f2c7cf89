"""What a source of data tells, and how files come from the network."""

from __future__ import annotations

import hashlib
import math
import os
import shlex
import shutil
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Arrays",
    "Choice",
    "Columns",
    "Source",
    "column_name",
    "download_failed",
    "download_file",
    "first_line",
    "for_shell",
    "kind_of",
    "number",
    "temporary_sibling",
]


class Columns(NamedTuple):
    """Which columns of a table are features and which are not, how many steps a piece of one series has, how far times
    are apart, and how the file is to be read, as far as that is not found out; the features that a run expects, and
    which of the others may be absent."""

    label: str | None = None
    id: str | None = None
    time: str | None = None
    inputs: tuple[str, ...] = ()
    window: int | None = None
    every: str | None = None
    features: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    header: bool | None = None
    separator: str | None = None
    decimal: str | None = None
    thousands: str | None = None
    encoding: str | None = None
    comment: str | None = None
    expected: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


class Arrays(NamedTuple):
    """How pictures and arrays are to be read, as far as that is not found out.

    Args:
        size: height and width that the images of a folder are resized to.
        channels: "first" or "last", of arrays of pictures.
        array: which one of a .npz.
        max_gb: what a file may take in memory.
    """

    size: tuple[int, int] | None = None
    channels: str | None = None
    array: str | None = None
    max_gb: float = 2.0


@dataclass(frozen=True)
class Choice:
    """Something that was done to data without being asked for.

    Attributes:
        what: what was done, and why.
        option: of the command line, without its dashes, which changes it; "" where none does.
    """

    what: str
    option: str


@dataclass(eq=False)
class Source:
    """The raw contents of a source, in the source's order."""

    x: Tensor  # (N, ...), uint8, float32 or float64; of sequences (N, T, D), padded with zeros
    labels: Tensor | None = None
    ids: np.ndarray | None = None
    columns: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    lengths: Tensor | None = None  # (N,), of sequences, and what goes with their steps, padded alike:
    inputs: Tensor | None = None  # (N, T, C)
    mask: Tensor | None = None  # (N, T, D), False where a value is missing
    latents: Tensor | None = None  # (N, T, Z), the truth of simulated ones
    times: np.ndarray | None = None  # (N, T), numbers or dates, NaN or NaT after the end
    in_time: bool = False  # the first rows are the training split, the last ones the test split
    as_they_are: bool = False  # real values that are not standardised
    sizes: tuple[int, int, int] | None = None  # the data set's own split of x[order]
    order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    peak: int = 1  # the value that stands for probability 1
    eight_bit: bool = False
    sixteen_bit: bool = False  # whole numbers of an array of 16 bits, which may be intensities
    lines: Callable[[], np.ndarray] | None = None  # gives (N,), those of a table's rows in their file
    noun: str = ""
    values: str = ""
    choices: tuple[Choice, ...] = ()  # what was done to the data that one may not expect
    named: bool = False  # whether ids are those of a column
    unlabelled: bool = False  # whether labels were left out, as some rows have none
    extra: tuple[str, ...] = ()  # columns that are left out, as a schema does not know them


def download_file(url: str, path: Path, sha256: str | None = None) -> None:
    with temporary_sibling(path.parent) as temporary:
        fresh = Path(temporary) / path.name
        try:
            with urllib.request.urlopen(url, timeout=60) as response, fresh.open("wb") as file:
                shutil.copyfileobj(response, file)
        except Exception as error:
            raise OSError(download_failed(url, path.parent, error)) from error
        checksum = hashlib.sha256(fresh.read_bytes()).hexdigest()
        if sha256 not in (None, checksum):
            problem = f"sha256 {checksum[:12]}... instead of {sha256[:12]}..."
            raise OSError(download_failed(url, path.parent, problem))
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(fresh, path)


def temporary_sibling(folder: Path) -> tempfile.TemporaryDirectory[str]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=f".{folder.name}-download-", dir=folder.parent)


def download_failed(what: str, folder: Path, problem: object) -> str:
    return (
        f"expected to download {what}, got a failure ({first_line(problem)}), nothing was kept: "
        f"try again, or put the files into {folder} yourself"
    )


def for_shell(names: Sequence[str]) -> str:
    """Names as a list that a shell takes as one word."""
    return shlex.quote(",".join(names))


def column_name(j: int, columns: tuple[str, ...] | None) -> str:
    return f"{j} (from 0)" if columns is None else repr(columns[j])


def number(cell: str) -> float:
    """The cell's value; NaN where it is missing or no number."""
    try:
        return math.nan if "_" in cell else float(cell)
    except ValueError:
        return math.nan


def kind_of(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def first_line(problem: object) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0][:160] if lines else type(problem).__name__
