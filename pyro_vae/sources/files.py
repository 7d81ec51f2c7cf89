"""Files and folders of the user's own."""

from __future__ import annotations

import contextlib
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .base import Arrays, Choice, Columns, Source, column_name, first_line, for_shell, kind_of, number
from .frames import is_frame, of_frame
from .tables import Table, is_missing, read_table
from .times import are_in_order_as_dates, late, on_grid, padded, read_times, shortest, written

__all__ = [
    "OF_STEPS",
    "SIXTEEN_BIT",
    "checked",
    "of_array",
    "of_table",
    "read_csv",
    "read_future",
    "read_images",
    "read_npy",
    "read_npz",
    "read_pt",
]

OF_STEPS = ("lengths", "u", "mask")  # the arrays that make x of a .npz sequences
SIXTEEN_BIT = "intensities x/65535"
ZERO_FIRST = re.compile(r"\s*[+-]?0\d")
IN_GROUPS = re.compile(r"[+-]?\d{1,3}([,.' ])\d{3}(\1\d{3})*([.,]\d+)?")
FLOAT32_MAX = torch.finfo(torch.float32).max


def _check_size(path: Path, what: str, size: int, max_gb: float) -> None:
    """Refuses to read what takes more memory than is allowed, before it is read."""
    if size > max_gb * 1e9:
        raise ValueError(
            f"expected at most {max_gb:g} GB in {path}, got {size / 1e9:.3g} GB in {what}: allow more with max_gb= "
            "(--data.max_gb), or keep a part of it"
        )


def read_npy(path: Path, max_gb: float = 2.0) -> Source:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError(f"expected an array in {path}, got a foreign file: write it with numpy.save")
        file.seek(0)
        _check_size(path, "its array", _announced(file, path), max_gb)
        file.seek(0)
        try:
            array = np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:
            raise _unreadable(path, error) from error
    return of_array(array, path)


def _announced(file: Any, path: Path) -> int:
    """The bytes of the array that a file in NumPy's format announces."""
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(version, np.lib.format.read_array_header_2_0)
        shape, _, dtype = read(file)
        return math.prod(shape) * dtype.itemsize
    except Exception as error:
        raise _unreadable(path, error) from error


def of_array(array: np.ndarray, path: Path | str, labels: Tensor | None = None, classes: Any = None) -> Source:
    if array.dtype == np.uint16 and array.ndim > 2:
        return Source(torch.from_numpy(array.astype(np.float32)), labels, classes=classes, sixteen_bit=True)
    return Source(_from_numpy(array, path), labels, classes=classes)


def read_npz(path: Path, arrays: Arrays) -> Source:
    max_gb = arrays.max_gb
    if not zipfile.is_zipfile(path):
        raise ValueError(f"expected arrays in {path}, got a foreign or truncated file: write it with numpy.savez")
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            names = list(archive.files)
            data, label = _names_in(names, path, arrays.array)
            of_steps = [each for each in OF_STEPS if each in names]
            wanted = [name for name in (data, label, *of_steps) if name is not None]
            sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.zip.infolist()}
            for name in wanted:  # an entry may announce an array that is larger than itself
                _check_size(path, f"the array {name}", sizes[name], max_gb)
                with archive.zip.open(f"{name}.npy" if f"{name}.npy" in archive.zip.namelist() else name) as file:
                    _check_size(path, f"the array {name}", _announced(file, path), max_gb)
            read = {name: archive[name] for name in wanted}
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("expected"):
            raise
        raise _unreadable(path, error) from error
    labels, classes = _labels(read[label], path) if label is not None else (None, None)
    if of_steps:
        source = _sequences(_from_numpy(read[data], path), labels, classes, read, path)
    else:
        source = of_array(read[data], path, labels, classes)
    unused = [name for name in names if name not in wanted]
    guessed = data != "x" and len(names) > 1 and arrays.array is None
    told = [Choice(f"{data} read", "data.array NAME")] if guessed else []
    told += [Choice(f"{', '.join(unused)} not used", "")] if unused else []
    return replace(source, choices=tuple(told))


def _names_in(names: Sequence[str], path: Path, given: str | None) -> tuple[str, str | None]:
    """Which array of a .npz are the data, and which the labels."""
    if given is not None and given not in names:
        raise ValueError(f"expected array= (--data.array) as one of {names} of {path}, got {given!r}: correct it")
    labels = {"x": ("labels", "y"), "X": ("y", "labels"), "x_train": ("y_train",), "data": ("labels", "target", "y")}
    others = [name for name in names if name not in ("labels", "y", "target", *OF_STEPS)]
    data = given or next((name for name in labels if name in names), others[0] if len(others) == 1 else None)
    if data is None:
        raise ValueError(
            f"expected an array x (or {', '.join([*labels][1:])}), or one array only, in {path}, got {others}: name "
            "the data x, or say which by array= (--data.array)"
        )
    return data, next((name for name in labels.get(data, ("labels", "y")) if name in names), None)


def _sequences(
    x: Tensor, labels: Tensor | None, classes: tuple[str, ...] | None, arrays: dict[str, np.ndarray], path: Path
) -> Source:
    """x (N, T, D), or (N, T) of numbers, and what goes with its steps."""
    x = x[..., None] if x.ndim == 2 else x
    if x.ndim != 3:
        raise ValueError(f"expected sequences x of shape (N, T, D) in {path}, got {tuple(x.shape)}: reshape x")
    N, T, D = x.shape
    lengths = torch.from_numpy(np.asarray(arrays.get("lengths", np.full(N, T))))
    whole = not lengths.is_floating_point() and not lengths.is_complex() and lengths.dtype != torch.bool
    if lengths.shape != (N,) or not whole or int(lengths.min()) < 1 or int(lengths.max()) > T:
        raise ValueError(
            f"expected lengths in {path} to be {N} whole numbers from 1 to {T}, got {lengths.dtype} of shape "
            f"{tuple(lengths.shape)}: give how many steps of each sequence are there"
        )
    found: dict[str, Tensor] = {}
    for name, shapes in (("u", ((N, T),)), ("mask", ((N, T), (N, T, D)))):
        if name in arrays:
            value = _from_numpy(arrays[name], path)
            if value.shape not in shapes and not (name == "u" and value.ndim == 3 and value.shape[:2] == (N, T)):
                wanted = "(N, T, C)" if name == "u" else f"{(N, T)} or {(N, T, D)}"
                raise ValueError(f"expected {name} of shape {wanted} in {path}, got {tuple(value.shape)}: reshape it")
            found[name] = value[..., None] if value.ndim == 2 else value
    mask = found["mask"].bool().expand(N, T, D) if "mask" in found else None
    return Source(x, labels, classes=classes, lengths=lengths.long(), inputs=found.get("u"), mask=mask)


def read_pt(path: Path, max_gb: float) -> Source:
    _check_size(path, "the file", path.stat().st_size, max_gb)
    unpacked = 0
    # `torch.load` says what is wrong with a broken archive
    with contextlib.suppress(Exception), path.open("rb") as file, zipfile.ZipFile(file) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    _check_size(path, "its tensors", unpacked, max_gb)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused below
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
    if x.is_meta:
        raise ValueError(f"expected values in {path}, got a tensor on the meta device, which has none: save its data")
    if x.layout == torch.strided and 0 in x.stride() and x.numel() > x.untyped_storage().nbytes() // x.itemsize:
        raise ValueError(
            f"expected a value for each element of {path}, got {tuple(x.shape)} that repeat fewer: save x.contiguous()"
        )
    if x.is_complex() or x.is_quantized or x.layout != torch.strided:
        raise ValueError(
            f"expected a dense real tensor in {path}, got {x.dtype} ({x.layout}): convert it before saving"
        )
    x = x.detach().to(torch.uint8 if x.dtype in (torch.bool, torch.uint8) else torch.float64)
    codes = None if labels is None else _labels(labels.detach().double().numpy(), path)[0]
    return Source(x, codes)


def read_csv(path: Path, columns: Columns) -> Source:
    text = [columns.label, columns.id, *_times_of(columns)]
    headers = [columns.header]
    if columns.expected and columns.header is None:
        headers += [True, False]  # where there are few rows, or names that are numbers, the names tell
    first: Table | None = None
    for header in headers:
        table = _table(path, columns._replace(header=header), text)
        if all(table.named(name) for name in columns.expected):
            return of_table(table, columns)
        first = first or table
    assert first is not None
    return of_table(first, columns)  # which says what is missing


def of_table(table: Table, columns: Columns) -> Source:
    """The data of a table's rows."""
    path, times = table.path, _times_of(columns)
    asked = {columns.label, columns.id}
    absent = {option for option in columns.optional if not _has(table, option, getattr(columns, option))}
    label = table.named(columns.label or "") if "label" in absent else None
    unlabelled = label is not None and not all(map(is_missing, table.cells(label)))
    columns = columns._replace(**{option: None for option in absent})  # type: ignore[arg-type]
    named = [("label", columns.label), ("id", columns.id), *(("time", each) for each in times)]
    named += [("inputs", each) for each in columns.inputs]
    _check_columns(table, named)
    for option, wanted in (("inputs", "time"), ("window", "time"), ("every", "time"), ("label", "no time")):
        if getattr(columns, option) and (columns.time is None) == (option != "label"):
            raise ValueError(
                f"expected {wanted}= (--data.time) beside {option}= of {path}: sequences are told by their times"
            )
    if columns.time is not None and columns.id is None and columns.window is None:
        raise ValueError(
            "expected id= (--data.id, a sequence for each), window= (--data.window, series in pieces of so many steps) "
            f"or both beside time= of {path}, got neither: give one"
        )
    if columns.window is not None and columns.window < 1:
        raise ValueError(f"expected window >= 1, got {columns.window}: give how many steps a piece has")

    others = {table.named(name) for _, name in named if name is not None}
    features = _features(table, columns, others)
    known = {*map(table.named, features), *others, *asked}
    extra = tuple(name for name in table.names if name not in known) if columns.expected else ()
    x = _numbers(table, features, bool(columns.expected), columns.time is not None)
    ids = None if columns.id is None else np.array(_cells(table, columns.id), dtype=str)
    if columns.time is not None:
        return replace(_in_time(table, x, features, ids, columns), named=ids is not None, extra=extra)
    labels, classes = (None, None) if columns.label is None else _csv_labels(table, columns.label)
    lines = table.lines  # not the frame, which is given free
    return Source(
        torch.from_numpy(x),
        labels,
        table.ids if ids is None else ids,
        tuple(features),
        classes,
        lines=lambda: lines,
        choices=_told(table),
        named=ids is not None,
        unlabelled=unlabelled,
        extra=extra,
    )


def _table(path: Path, columns: Columns, text: Sequence[str | None]) -> Table:
    return read_table(
        path,
        [each for each in text if each],
        columns.header,
        separator=columns.separator,
        decimal=columns.decimal,
        thousands=columns.thousands,
        encoding=columns.encoding,
        comment=columns.comment,
        as_written=[] if columns.id is None else [columns.id],
    )


def _told(table: Table) -> tuple[Choice, ...]:
    return tuple(Choice(what, f"data.{option}") for what, option in table.said)


def _has(table: Table, option: str, name: str | None) -> bool:
    """Whether a table has the column of that name; of labels, with one in every row."""
    found = None if name is None else table.named(name)
    return found is not None and (option != "label" or not any(map(is_missing, table.cells(found))))


def _times_of(columns: Columns) -> list[str]:
    """The columns of times: one, or those of years and their parts, as in "year,quarter"."""
    return [] if columns.time is None else [each.strip() for each in columns.time.split(",")]


def read_future(path: Any, columns: Columns) -> Source:
    """The inputs of steps to come, in a file or a frame, as the x of sequences."""
    times = _times_of(columns)
    text = [columns.id, *times]
    table = of_frame(path, text) if is_frame(path) else _table(path, columns, text)
    named = [("id", columns.id), *(("time", each) for each in times), *(("inputs", name) for name in columns.inputs)]
    _check_columns(table, named)
    u = _inputs(table, columns.inputs)
    ids = None if columns.id is None else np.array(_cells(table, columns.id), dtype=str)
    return _in_time(table, u, columns.inputs, ids, Columns(id=columns.id, time=columns.time))


def _cells(table: Table, name: str) -> list[str]:
    return table.cells(table.named(name) or name)


def _check_columns(table: Table, named: Sequence[tuple[str, str | None]]) -> None:
    for option, name in named:
        if name is not None and table.named(name) is None:
            raise ValueError(
                f"expected {option}= (--data.{option}) to be one of the columns {table.names} of {table.path}, "
                f"got {name!r}: correct it"
            )


def _features(table: Table, columns: Columns, apart: set[str | None]) -> list[str]:
    """The columns to model: those asked for, or all but those that are something else, or to be left out."""
    if absent := [name for name in columns.expected if table.named(name) is None]:
        raise ValueError(
            f"expected the columns of the training, {', '.join(columns.expected)}, in {table.path}, got none called "
            f"{', '.join(map(repr, absent))} among {', '.join(map(repr, table.names))}: add them, or rename"
        )
    if columns.expected:
        return list(columns.expected)
    for option, names in (("columns", columns.features), ("drop", columns.drop)):
        _check_columns(table, [(option, name) for name in names])
    dropped = {table.named(name) for name in columns.drop}
    features = [table.named(name) or name for name in columns.features] or table.names
    features = [name for name in features if name not in apart | dropped]
    if not features:
        taken = ", ".join(map(repr, sorted(filter(None, apart | dropped)))) or "none"
        raise ValueError(f"expected a column to model in {table.path}, got {taken} alone: add a numeric column")
    return features


def _numbers(table: Table, names: Sequence[str], are_known: bool = False, in_time: bool = False) -> np.ndarray:
    """The values of columns, (rows, columns), NaN where one is missing; of those that a run knows or not, and of steps
    or not, which decides what may be the mend of a word."""
    own = [table.named(name) or name for name in names]
    words = [name for name in own if table.row_of_word(name) is not None]
    if words:
        row = table.row_of_word(words[0])
        cell = table.frame[words[0]].iloc[row]
        also = f" (also in {', '.join(map(repr, words[1:]))})" if words[1:] else ""
        groups = IN_GROUPS.fullmatch(cell)
        thousands = f"say thousands= (--data.thousands {groups[1]!r}), " if groups else ""
        named = "that of ids with id= (--data.id)"
        if not in_time:  # whose sequences have no labels
            named = f"the column of labels with label= (--data.label), {named}, of dates with time= (--data.time)"
        roles = f"leave such columns out with drop= (--data.drop {for_shell(words)}), name {named}, or "
        raise ValueError(
            f"expected numbers in column {words[0]!r} of {table.path}, got {cell!r} in line {table.lines[row]}{also}: "
            f"{thousands}{'' if are_known else roles}correct the cell"
        )
    for name in own:
        column = table.frame[name]
        if column.dtype.kind in "ui" and len(column) and _beyond(column.min(), column.max()):
            raise _too_precise(f"column {name!r} of {table.path}", max(column.min(), column.max(), key=abs))
    return table.numbers(own)


def _in_time(table: Table, x: np.ndarray, features: Sequence[str], ids: np.ndarray | None, columns: Columns) -> Source:
    """Rows put in order of their times: a sequence for each id, or one series, in pieces of `window` steps if given."""
    time, inputs, window, every = columns.time, columns.inputs, columns.window, columns.every
    assert time is not None
    for name in _times_of(columns):
        timeless = [i for i, cell in enumerate(_cells(table, name)) if is_missing(cell) or cell == "NaT"]
        if timeless:
            raise ValueError(
                f"expected a time in every row of column {name!r} of {table.path}, got {len(timeless)} missing, the "
                f"first in line {table.lines[timeless[0]]}: fill in or drop these rows"
            )
    written_times = _written_times(table, _times_of(columns))
    times = read_times(table.path, time, written_times, table.value)
    parts = _in_order(table, times, written_times, ids)
    moved = next((part[1:][np.diff(part) < 0] for part in parts if (np.diff(part) < 0).any()), None)
    in_file = [[written_times[i] for i in np.sort(part)] for part in parts]
    if moved is not None and times.dtype.kind == "f" and are_in_order_as_dates(in_file):
        raise ValueError(
            f"expected numbers or ISO dates in column {time!r} of {table.path}, got {written_times[moved[0]]!r} in "
            f"line {table.lines[moved[0]]}, which as a number goes before lines above, and may be a date: write dates "
            "as 2006-09-26, or sort the rows"
        )
    at = [times[part] for part in parts]
    owners = None if ids is None else [ids[part[0]] for part in parts]
    told: list[Choice] = []
    if every is not None:
        filled = [_filled(table, times, part, ids, columns) for part in parts]
        at, parts = [each for each, _ in filled], [part for _, part in filled]
        if absent := sum(int((part < 0).sum()) for part in parts):
            told.append(Choice(f"{absent:,} time{'s' if absent > 1 else ''} without a row", ""))
    elif count := late(at):
        gaps = f"{count:,} gap{'s' if count > 1 else ''}"
        option = f"data.every {shortest(at)}"
        told.append(Choice(f"{gaps} in {time!r} closed up, as absent times are no missing steps", option))
    if window is not None:
        if owners is not None:
            owners = [name for name, part in zip(owners, parts, strict=True) for _ in range(0, len(part), window)]
        parts = [part[begin : begin + window] for part in parts for begin in range(0, len(part), window)]
        at = [each[begin : begin + window] for each in at for begin in range(0, len(each), window)]
        earliest = sorted(range(len(at)), key=lambda i: at[i][0])  # of all series, as the split is in time
        parts, at = [parts[i] for i in earliest], [at[i] for i in earliest]
        owners = None if owners is None else [owners[i] for i in earliest]

    def steps(values: np.ndarray, fill: float) -> Tensor:
        pieces = [torch.from_numpy(np.where((part < 0)[:, None], np.nan, values[part])) for part in parts]
        return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=fill)

    values, lengths = steps(x, math.nan), torch.tensor([len(part) for part in parts])
    mask = values.isfinite()
    return Source(
        values.where(mask, 0.0),
        ids=None if owners is None else np.array(owners),
        columns=tuple(features),
        lengths=lengths,
        inputs=steps(_inputs(table, inputs), 0.0) if inputs else None,
        mask=None if int(mask.all(-1).sum()) == int(lengths.sum()) else mask,
        times=padded(at, int(lengths.max())),
        in_time=window is not None,
        choices=(*_told(table), *told),
    )


PARTS = {"year": 1, "quarter": 3, "month": 1, "week": 1, "day": 1, "hour": 0, "minute": 0}


def _written_times(table: Table, names: Sequence[str]) -> list[str]:
    """Times as they are written; of several columns, dates made of years and their parts."""
    if len(names) == 1:
        return _cells(table, names[0])
    found: dict[str, list[float]] = {}
    for name in names:
        kind = next((part for part in PARTS if name.strip().lower().startswith(part)), None)
        values = [number(cell) for cell in _cells(table, name)]
        again = f", as is {kind} by another" if kind in found else ""
        if kind is None or again or any(value % 1 or not math.isfinite(value) for value in values):
            raise ValueError(
                f"expected columns of whole numbers called {', '.join(PARTS)} as time= (--data.time) of {table.path}, "
                f"got {name!r}{again}: rename it, or write dates into one column"
            )
        found[kind] = values
    if "year" not in found:
        raise ValueError(f"expected a column year among time= (--data.time) of {table.path}, got {list(names)}: add it")
    dates = []
    for row, year in enumerate(found["year"]):
        of = {part: int(values[row]) for part, values in found.items()}
        month = of.get("month", 3 * of.get("quarter", 1) - 2)
        try:
            if not 1000 <= year <= 9999:
                raise ValueError("a year of four digits")
            date = datetime(int(year), month, of.get("day", 1), of.get("hour", 0), of.get("minute", 0))
            date += timedelta(weeks=of.get("week", 1) - 1)
        except ValueError as error:
            raise ValueError(
                f"expected dates in the columns {list(names)} of {table.path}, got {of} in line {table.lines[row]} "
                f"({first_line(error)}): correct it"
            ) from None
        dates.append(date.isoformat(" "))
    return dates


def _in_order(table: Table, times: np.ndarray, cells: Sequence[str], ids: np.ndarray | None) -> list[np.ndarray]:
    """The rows of each id, in the order of their times."""
    path, lines = table.path, table.lines
    if not len(times):
        raise ValueError(f"expected a row for each step in {path}, got the header alone: add rows")
    names = np.zeros(len(times), dtype=str) if ids is None else ids
    nameless = [i for i, name in enumerate(names) if ids is not None and not name.strip()]
    if nameless:
        raise ValueError(
            f"expected an id in every row of {path}, got {len(nameless)} missing, the first in line "
            f"{lines[nameless[0]]}: fill in or drop these rows"
        )
    parts = [np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())]
    parts = [part[np.argsort(times[part], kind="stable")] for part in parts]
    for part in parts:
        again = part[1:][times[part][1:] == times[part][:-1]]
        if len(again):
            whose = "" if ids is None else f" for {str(ids[again[0]])!r}"
            mend = "name the column of ids with id= (--data.id)" if ids is None else "mend that line"
            raise ValueError(
                f"expected distinct times in {path}, got {cells[again[0]]!r} twice{whose} (to the microsecond), the "
                f"second in line {lines[again[0]]}: {mend}"
            )
    return parts


def _filled(
    table: Table, times: np.ndarray, rows: np.ndarray, ids: np.ndarray | None, columns: Columns
) -> tuple[np.ndarray, np.ndarray]:
    """All times of a sequence, `every` so many, and the rows at them, -1 where there is none."""
    assert columns.every is not None
    where = f"{table.path}{'' if ids is None else f' for {str(ids[rows[0]])!r}'}"
    grid, places = on_grid(times[rows], columns.every, where)
    found = np.full(len(grid), -1)
    found[places] = rows
    if columns.inputs and (found < 0).any():
        raise ValueError(
            f"expected inputs at every time of {where}, got no row at {written(grid[found < 0][0])}: add rows with "
            "inputs, whose other cells may be empty"
        )
    return grid, found


def _inputs(table: Table, names: Sequence[str]) -> np.ndarray:
    """The values of columns without which no step can be taken, (rows, columns)."""
    u = _numbers(table, names)
    missing = np.argwhere(~np.isfinite(u))
    if len(missing):
        row, column = missing[0]
        raise ValueError(
            f"expected inputs in every row of {table.path}, got {len(missing)} missing or infinite, the first in line "
            f"{table.lines[row]}, column {names[column]!r}: fill in"
        )
    return u


def _csv_labels(table: Table, name: str) -> tuple[Tensor, tuple[str, ...] | None]:
    path, cells = table.path, _cells(table, name)
    missing = [i for i, cell in enumerate(cells) if is_missing(cell)]
    if missing:
        raise ValueError(
            f"expected a label in every row of column {name!r} of {path}, got {len(missing)} missing, the "
            f"first in line {table.lines[missing[0]]}: fill in or drop these rows"
        )
    numbers = np.array([number(cell) for cell in cells])
    are_words = np.isnan(numbers).any() or np.abs(numbers).max(initial=0) >= 2**53 or any(map(ZERO_FIRST.match, cells))
    if are_words or len({*cells}) > len(np.unique(numbers)):  # as 1 and 1.0
        return _labels(np.array(cells, dtype=str), path)
    return _labels(numbers, path)


_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
_OF_SPLITS = ("test", "testing", "val", "valid", "validation")  # beside one of the training
_DECODERS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # none that runs another program
MOST_PIXELS = 100_000_000  # of one image


class _Picture(NamedTuple):
    """One image: (H, W, 3), uint8, or uint16 where it has 16 bits, and what was done to it."""

    pixels: np.ndarray
    said: tuple[str, ...]


def _picture(path: Path, size: tuple[int, int] | None) -> _Picture:
    """The first frame, turned as its EXIF tag says, over white where it is transparent, resized to (H, W)."""
    from PIL import Image, ImageOps

    said = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is refused
            with Image.open(path, formats=_DECODERS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(f"{image.width:,} x {image.height:,} pixels, of which {MOST_PIXELS:,} are taken")
                if getattr(image, "n_frames", 1) > 1:
                    said.append("the first frame of animations")
                deep = image.mode.startswith("I")
                if image.mode == "F":
                    raise ValueError("32-bit real numbers: save them by numpy.save")
                upright = ImageOps.exif_transpose(image)
                if upright.size != image.size or image.getexif().get(0x0112, 1) != 1:
                    said.append("turned as EXIF tells")
                if size is not None and (upright.height, upright.width) != size:
                    said.append(f"resized to {size[0]} x {size[1]}")
                    resample = Image.Resampling.BILINEAR if deep else Image.Resampling.LANCZOS
                    upright = upright.resize(size[::-1], resample)
                if deep:
                    values = np.asarray(upright).astype(np.int64)
                    if values.min() < 0 or values.max() > 65535:
                        raise ValueError(f"values from {values.min()} to {values.max()} of 32 bits: save them as .npy")
                    return _Picture(np.repeat(values.astype(np.uint16)[..., None], 3, -1), tuple(said))
                if _bits(path) == 16:
                    said.append("colours of 16 bits cut to 8")
                if "A" in upright.getbands() or "transparency" in upright.info:
                    upright = upright.convert("RGBA")
                    if np.asarray(upright.getchannel("A")).min() < 255:
                        said.append("transparent pixels over white")
                    white = Image.new("RGBA", upright.size, (255, 255, 255, 255))
                    upright = Image.alpha_composite(white, upright)
                return _Picture(np.asarray(upright.convert("RGB")), tuple(said))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, OverflowError, KeyError) as error:
        raise ValueError(
            f"expected an image in {path}, got a truncated, foreign or too large file ({first_line(error)}): replace it"
        ) from error


def _bits(path: Path) -> int:
    """Of each colour of a PNG, which Pillow cuts to 8."""
    with path.open("rb") as file:
        head = file.read(25)
    return head[24] if head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) == 25 else 8


def read_images(folder: Path, size: tuple[int, int] | None, max_gb: float) -> Source:
    def visible(path: Path) -> bool:
        return not any(part.startswith(".") for part in path.relative_to(folder).parts)

    files = sorted(path for path in folder.rglob("*") if path.is_file() and visible(path))
    paths = [path for path in files if path.suffix.lower() in _IMAGE_ENDINGS]
    if not paths:
        raise ValueError(f"expected images ({', '.join(_IMAGE_ENDINGS)}) in {folder}, got none: correct the path")
    parts = [path.relative_to(folder).parts for path in paths]
    names = sorted({p[0] for p in parts if len(p) > 1})
    if {"train", "training"} & {*map(str.lower, names)} and {*_OF_SPLITS} & {*map(str.lower, names)}:
        raise ValueError(
            f"expected folders of classes in {folder}, got those of splits, {names}: name one of them, such as "
            f"{folder / names[0]}"
        )
    ids = np.array(["/".join(p) for p in parts])
    while len({p[0] for p in parts}) == 1 and all(len(p) > 2 for p in parts):  # a folder around all classes
        parts = [p[1:] for p in parts]
    in_folders = [len(p) > 1 for p in parts]
    if any(in_folders) and not all(in_folders):
        stray = paths[in_folders.index(False)]
        raise ValueError(f"expected all images of {folder} in sub-folders or none, {stray} is not: move it into one")

    pictures: list[_Picture] = []
    for path in paths:
        pictures.append(_picture(path, size))
        first, last = pictures[0].pixels, pictures[-1].pixels
        _check_size(folder, f"{len(paths):,} images", len(paths) * first.nbytes, max_gb)
        if last.shape != first.shape:
            one, odd = (f"{width} x {height}" for height, width, _ in (first.shape, last.shape))
            raise ValueError(
                f"expected all images of {folder} to have {one} pixels as {paths[0].name} has, {path} has {odd}: "
                "resize them all by size= (--data.size 32, or 32x24 for height and width)"
            )
        if last.dtype != first.dtype:
            raise ValueError(
                f"expected all images of {folder} to have as many bits as {paths[0].name} has, {path} has "
                f"{8 * last.itemsize}: convert it"
            )
    arrays = np.stack([picture.pixels for picture in pictures])
    if (arrays == arrays[..., :1]).all():
        arrays = arrays[..., :1]
    eight_bit = arrays.dtype == np.uint8
    x = torch.from_numpy(arrays if eight_bit else (arrays / np.float32(65535))).movedim(-1, 1).contiguous()
    labels, classes = _labels(np.array([p[0] for p in parts]), folder) if all(in_folders) else (None, None)
    said = [one for one in dict.fromkeys(one for picture in pictures for one in picture.said)]
    if len(files) > len(paths):
        endings = sorted({path.suffix.lower() or path.name for path in files} - {*_IMAGE_ENDINGS})
        count = len(files) - len(paths)
        said.append(f"{count:,} file{'s' if count > 1 else ''} of other kinds not read ({', '.join(endings[:5])})")
    return Source(
        x,
        labels,
        ids,
        classes=classes,
        eight_bit=eight_bit,
        values="" if eight_bit else SIXTEEN_BIT,
        choices=tuple(Choice(one, "") for one in said),
    )


def _unreadable(path: Path, error: Exception) -> ValueError:
    came = "pickled objects" if "Object arrays" in str(error) else "a truncated or broken file"
    return ValueError(f"expected a numeric array in {path}, got {came} ({first_line(error)}): save it anew as numbers")


def _from_numpy(array: np.ndarray, where: Path | str) -> Tensor:
    if array.dtype.kind not in "buif":
        mends = {"c": "take array.real, or both parts as columns", "V": "put its fields into columns of a frame"}
        mend = mends.get(array.dtype.kind, "convert with array.astype('float32')")
        raise ValueError(f"expected numbers in {where}, got dtype {array.dtype}: {mend}")
    if array.dtype in (np.dtype(bool), np.dtype(np.uint8)):
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.uint8))
    if array.dtype.kind in "ui" and array.itemsize == 8 and array.size and _beyond(array.min(), array.max()):
        raise _too_precise(where, max(array.min(), array.max(), key=lambda each: abs(int(each))))
    array = array if array.flags.writeable else array.copy()
    narrow = array.dtype in (np.dtype(np.float32), np.dtype(np.float16))  # else double precision, for the scales' sake
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32 if narrow else np.float64))


def _beyond(*ends: Any) -> bool:
    return any(abs(int(end)) > 2**53 for end in ends)


def _too_precise(where: Path | str, came: Any) -> ValueError:
    return ValueError(
        f"expected whole numbers up to 2**53 in {where}, got {came}, which double precision does not tell from its "
        "neighbours: subtract a constant from these, or leave them out"
    )


def _labels(labels: np.ndarray, where: Path | str) -> tuple[Tensor, tuple[str, ...] | None]:
    """(N,): whole numbers as int64, others as float32, strings as their place among the sorted classes."""
    if labels.dtype.kind == "U":
        classes, codes = np.unique(labels, return_inverse=True)
        return torch.from_numpy(codes).long(), tuple(str(name) for name in classes)
    if labels.dtype.kind not in "buif" or not np.isfinite(labels).all():
        raise ValueError(
            f"expected finite numbers or strings as labels in {where}, got {labels.dtype}: mend the labels"
        )
    if labels.dtype.kind != "b" and np.abs(labels.astype(np.float64)).max(initial=0) >= 2.0**63:
        return _labels(labels.astype(str), where)
    whole = bool((labels == np.round(labels)).all())
    return torch.from_numpy(labels.astype(np.int64 if whole else np.float32)), None


def checked(source: Source, where: Path | str, least: int = 10, channels: str | None = None) -> Source:
    """The user's own data as a table (N, D), images (N, C, H, W) or sequences (N, T, D), or an error."""
    x = source.x
    if source.lengths is not None:
        return _checked_sequences(source, where, least)
    if x.ndim not in (2, 3, 4):
        raise ValueError(
            f"expected {where} to hold a table (N, D) or images (N, H, W) or (N, C, H, W), got shape "
            f"{tuple(x.shape)}: reshape it, for instance with x.reshape(len(x), -1)"
        )
    if x.ndim == 3:
        x = x[:, None]
    choices = source.choices
    seem_last = x.ndim == 4 and x.shape[3] in (1, 3, 4) and min(x.shape[1:3]) > 4
    if x.ndim == 4 and (channels == "last" or (channels is None and seem_last)):
        x = x.movedim(3, 1).contiguous()
        told = [] if channels else [Choice("channels last in the file", "data.channels first")]
        choices = (*told, *choices)
    if len(x) < least:
        why = ", to split them" if least > 1 else ""
        raise ValueError(f"expected at least {least} row{'s'[: least - 1]} in {where}{why}, got {len(x)}: add data")
    if x.numel() == 0:
        raise ValueError(f"expected values in every row of {where}, got shape {tuple(x.shape)}: add columns")
    if source.labels is not None and source.labels.shape != (len(x),):
        raise ValueError(
            f"expected labels of shape ({len(x)},) in {where}, got {tuple(source.labels.shape)}: give one per row"
        )
    bad = torch.zeros(1, dtype=torch.bool)
    table = x.ndim == 2  # whose missing cells a likelihood leaves out
    if x.is_floating_point() and not all(_are_finite(some, table) for some in x.split(10_000)):
        bad = ~(x.float().isfinite() | (x.isnan() & table))
        row, *place = (int(i) for i in bad.nonzero()[0])
        column = f"column {column_name(place[0], source.columns)}" if x.ndim == 2 else f"position {tuple(place)}"
        where_row = f"row {row} (from 0)" if source.lines is None else f"line {source.lines()[row]}"
        came = "infinite or too large" if table else "missing, NaN, infinite or too large"
        raise ValueError(
            f"expected finite float32 values in {where}, got {int(bad.sum())} {came}, the first in {where_row}, "
            f"{column}: fill in or drop these rows"
        )
    return replace(source, x=x, choices=choices)


def _are_finite(x: Tensor, or_missing: bool) -> bool:
    low, high = map(float, x.aminmax())
    if low >= -FLOAT32_MAX and high <= FLOAT32_MAX:  # not where one is NaN
        return True
    return bool((x.float().isfinite() | (x.isnan() & or_missing)).all())


def _checked_sequences(source: Source, where: Path | str, least: int) -> Source:
    x, lengths, mask = source.x, source.lengths, source.mask
    assert lengths is not None
    if len(x) < least:
        steps = int(lengths.sum())
        shorter = f"a window= (--data.window) of at most {steps // 10} of its {steps:,} steps, or "
        pieces = shorter if source.times is not None and steps >= 10 else ""
        raise ValueError(
            f"expected at least {least} sequences in {where}, to split them, got {len(x)}: {pieces}more data"
        )
    if source.labels is not None and source.labels.shape != (len(x),):
        raise ValueError(
            f"expected labels of shape ({len(x)},) in {where}, got {tuple(source.labels.shape)}: give one per sequence"
        )
    there = torch.arange(x.shape[1]) < lengths[:, None]
    counted = there[..., None] if mask is None else there[..., None] & mask
    for name, value, counts in (("x", x, counted), ("u", source.inputs, there[..., None])):
        bad = torch.zeros(1) if value is None else ~torch.isfinite(value.float()) & counts
        if bool(bad.any()):
            row, step, *_ = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"expected finite float32 values of {name} in {where}, got {int(bad.sum())} NaN, infinite or too "
                f"large, the first in sequence {row}, step {step} (from 0): fill in, or leave them out by a mask"
            )
    inputs = None if source.inputs is None else torch.where(there[..., None], source.inputs, 0.0)
    return replace(source, x=torch.where(counted, x, torch.zeros((), dtype=x.dtype)), inputs=inputs)
