"""`save_table`: arrays beside ids, labels and times, as a `.csv` that other programs read, or as a `.npz`."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint import atomic
from .containers import Split
from .schema import Schema

__all__ = ["save_table"]


def save_table(
    path: str | os.PathLike[str],
    arrays: Mapping[str, Any],
    data: Split | None = None,
    *,
    schema: Schema | None = None,
    times: np.ndarray | None = None,
    num_before: np.ndarray | None = None,
    overwrite: bool = False,
) -> None:
    """Write arrays (N, ...) with a row for each datum; of sequences, (N, T, ...) with a row for each step.

    A `.csv` has a column for each number, called like the columns of the schema where the array's name is ``x`` or
    begins with ``x_``, after those of ids, labels, steps and times. A `.npz` has the arrays as they are. Text that a
    spreadsheet would run gets an apostrophe before it.

    Args:
        path: where to write; another file takes its place whole or not at all.
        arrays: by name, tensors or arrays of as many rows.
        data: the data that the rows are of: their ids, labels, lengths and times are written, too.
        schema: names columns and classes; by default that of `data`.
        times: (N, T), of the steps, where they are not those of `data`.
        num_before: (N,), steps before the first one of each sequence, as a forecast's.
        overwrite: take the place of a file.

    Raises:
        ValueError: another ending. FileExistsError: there is a file. OSError: a full disk, or a read-only one; the file
            that was there before stays.

    Example:
        >>> import tempfile, torch
        >>> from pyro_vae import load_dataset
        >>> path = Path(tempfile.mkdtemp(), "codes.csv")
        >>> save_table(path, {"z_mean": torch.zeros(2, 2)})
        >>> print(path.read_text())
        z_mean_0,z_mean_1
        0.0,0.0
        0.0,0.0
        <BLANKLINE>
    """
    path = Path(path)
    if path.suffix not in (".csv", ".npz"):
        raise ValueError(f"expected a file ending in .csv or .npz, got {str(path)!r}: name such a file")
    if path.exists() and not overwrite:
        raise FileExistsError(f"expected a new file, got {str(path)!r}, which exists: name another, or overwrite=True")
    schema = data.schema if schema is None and data is not None else schema
    made = {name: np.asarray(a.detach().cpu() if torch.is_tensor(a) else a) for name, a in arrays.items()}
    if path.suffix == ".csv":  # a .npz holds draws (K, N, ...), too
        _check(made, data, sequences=schema is not None and schema.sequences)
    content = _content(path.suffix, made, data, schema, times, num_before)
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def _check(arrays: Mapping[str, np.ndarray], data: Split | None, sequences: bool) -> None:
    """As many rows in each array, and of sequences steps."""
    lengths = {name: len(array) if array.ndim else None for name, array in arrays.items()}
    lengths |= {} if data is None else {"the data": len(data)}
    if not arrays or None in lengths.values() or len({*lengths.values()}) > 1:
        raise ValueError(f"expected arrays of as many rows, got {lengths}: give one for each datum")
    if sequences and (flat := [name for name, array in arrays.items() if array.ndim < 2]):
        raise ValueError(f"expected arrays (N, T, ...) of sequences, got {flat[0]!r} of shape (N,): write a .npz")


def _content(
    ending: str,
    arrays: dict[str, np.ndarray],
    data: Split | None,
    schema: Schema | None,
    times: np.ndarray | None,
    num_before: np.ndarray | None,
) -> bytes:
    named: dict[str, Any] = {}
    if data is not None and data.ids is not None:
        named["id"] = data.ids
    if data is not None and data.labels is not None:
        labels, classes = data.labels.cpu().numpy(), None if data.schema is None else data.schema.classes
        named["label"] = labels if classes is None else np.array(classes)[labels]
    sequences = schema is not None and schema.sequences
    times = data.times if data is not None and num_before is None else times
    lengths = data.kwargs["lengths"].cpu().numpy() if sequences and data is not None else None
    if ending == ".npz":
        if "file" in arrays:
            raise ValueError("expected names that numpy.savez takes, got an array called 'file': call it otherwise")
        if lengths is not None and num_before is None:
            named["length"] = lengths
        if times is not None:
            named["time"] = times
        file = io.BytesIO()
        content: dict[str, Any] = {**arrays, **{f"{name}s": values for name, values in named.items()}}
        np.savez(file, **content)
        return file.getvalue()
    if sequences:
        named, arrays = _by_step(named, arrays, schema, lengths, times, num_before)
    return _csv(named, arrays, schema)


def _by_step(
    named: Mapping[str, np.ndarray],
    arrays: Mapping[str, np.ndarray],
    schema: Schema | None,
    lengths: np.ndarray | None,
    times: np.ndarray | None,
    num_before: np.ndarray | None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Rows of sequences as rows of their steps."""
    N, T = next(iter(arrays.values())).shape[:2]
    steps = np.arange(T) + np.zeros((N, 1), dtype=int) + (0 if num_before is None else num_before[:, None])
    there = np.ones((N, T), dtype=bool) if lengths is None or num_before is not None else steps < lengths[:, None]
    of_each = {"id": np.arange(N), **named}
    rows = {name: np.broadcast_to(values[:, None], (N, T))[there] for name, values in of_each.items()}
    rows["step"] = steps[there]
    if times is not None:
        name = str(schema.source.get("time", "time")) if schema is not None else "time"
        while name in rows:
            name = f"time_{name}"
        shown = times[there]
        rows[name] = shown.astype(np.int64) if shown.dtype.kind == "f" and (shown % 1 == 0).all() else shown
    return rows, {name: array[there] for name, array in arrays.items()}


def _csv(named: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray], schema: Schema | None) -> bytes:
    import pandas

    columns_of: dict[str, Any] = {}
    if schema is not None:
        columns_of = {"x": schema.names, "u": schema.source.get("inputs")}
    columns = dict(named)
    for name, array in arrays.items():
        flat = array.reshape(len(array), -1)
        names = [f"{name}_{i}" for i in range(flat.shape[1])] if array.ndim > 1 else [name]
        own = columns_of.get(name.split("_")[0])
        if own and len(own) == len(names):
            names = [f"{column}{name[1:]}" for column in own]
        for column, values in zip(names, flat.T, strict=True):
            while column in columns:  # a feature that is called id or label
                column = f"{name}_{column}"
            columns[column] = values
    table = pandas.DataFrame({name: [*map(_as_text, v)] if v.dtype.kind in "UO" else v for name, v in columns.items()})
    return table.rename(columns=_as_text).to_csv(index=False).encode()


def _as_text(cell: Any) -> Any:
    """A cell that a spreadsheet does not take for a formula, and run: an apostrophe before it says so."""
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return cell
    with contextlib.suppress(ValueError):
        float(cell)
        return cell
    return f"'{cell}"
