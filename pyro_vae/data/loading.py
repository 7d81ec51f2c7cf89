"""`load_dataset`: a data set by name, or from a file or folder of the user's own."""

from __future__ import annotations

import math
import operator
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..sources import (
    FORM,
    NAMED,
    SIXTEEN_BIT,
    Arrays,
    Choice,
    Columns,
    Source,
    column_name,
    find,
    for_shell,
    is_frame,
    is_table,
)
from .containers import Dataset, Split, bernoulli, spans_of
from .schema import KINDS, Column, Kind, Schema, SchemaWarning, Span, row_checksums

__all__ = ["load_again", "load_dataset", "read"]

Binarize = Literal["none", "static", "dynamic"]
CHUNK = 10_000  # rows that are looked at together
PART = 2_000  # likewise, where they are to stay in the processor's cache
OF_BITS = (255, 65535)  # the divisors of pictures whose bits are known


def load_dataset(
    name_or_path: Any,
    *,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    binarize: Binarize = "none",
    split: Sequence[float] | None = None,
    label: str | None = None,
    id: str | None = None,
    time: str | None = None,
    inputs: Sequence[str] = (),
    window: int | None = None,
    every: str | float | None = None,
    columns: Sequence[str] = (),
    drop: Sequence[str] = (),
    kind: Sequence[str] = (),  # or a mapping
    standardize: bool = True,
    header: bool | None = None,
    separator: str | None = None,
    decimal: str | None = None,
    thousands: str | None = None,
    encoding: str | None = None,
    comment: str | None = None,
    divisor: float | None = None,
    size: int | str | Sequence[int] | None = None,
    channels: Literal["first", "last"] | None = None,
    array: str | None = None,
    max_gb: float = 2.0,
    seed: int = 0,
) -> Dataset:
    """A data set by name, or from a file or folder of the user's own.

    - `digits` (scikit-learn's, embedded): 1,297 / 250 / 250 images (1, 8, 8), counts 0 to 16.
    - `mnist`, `fashion_mnist`: 50,000 / 10,000 / 10,000 images (1, 28, 28), intensities x/255.
    - `freyfaces`: 1,565 / 200 / 200 frames (1, 28, 20), intensities x/255, in the order of the film.
    - `jsb_chorales`: 229 / 76 / 77 sequences (T, 88) of keys pressed or not, with their `lengths` by keyword;
      `piano_midi`, `muse_data` and `nottingham` alike.
    - `sp500`: 2,517 daily log returns in percent, in order, as 40 sequences (63, 1) of a quarter each.
    - simulated sequences, with the true z in `latents` of the splits: `linear_sequences` and `nonlinear_sequences`,
      those of arXiv 1609.09869 (25, 1), `pendulum` (100, 2) with inputs, `stochastic_volatility` (250, 1).
    - a `.npy`, `.npz` (array `x`, `X`, `x_train` or `data`, or the only one; `labels`, or `y` and its like), `.pt` (a
      tensor, or a dict with x and labels)
      or `.csv` file (numeric columns), or a folder of images of one size whose sub-folders, if
      any, are the classes.
    - sequences of the user's own: a `.npz` with x (N, T, D), `lengths` (N,) and, if any, inputs `u` (N, T, C) and the
      `mask` (N, T, D) of what is observed; a `.csv` with a column of times: see `time`. Splits of sequences go to model
      and guide as ``(x, {"lengths": ..., "u": ..., "mask": ...})``.

    A name goes before a file of that name: write `./digits` for the file. Arrays are tables (N, D) or images
    (N, H, W), (N, C, H, W), or (N, H, W, C) with 1, 3 or 4 channels beside H, W > 4, which is told. Transparent pixels
    of images are put over white, images are turned as their EXIF tag says, and 16 bits become x/65535.

    Eight-bit data become x/255, and are scored as such: uint8 arrays with values above 1, image files, and
    images without negative values whose largest is above 127 and at most 255. Other whole numbers, values in
    [0, 1] and real-valued images stay as they are. Other tables are standardised per column, and
    score + `log_jacobian` is the score in the original units.

    Args:
        name_or_path: one of the names above, or a path; a pandas frame, or an array.
        root: where the named data sets are kept; default: the environment's PYRO_VAE_DATA, else
            ~/.cache/pyro_vae.
        download: fetch the named data set if it is not there. An interrupted download leaves nothing behind.
        binarize: "none"; "static": x' ~ Bernoulli(x), drawn once; "dynamic": training batches are drawn
            afresh, the other splits once with a fixed seed. Data must be in [0, 1] (`digits` takes x/16).
        split: fractions (train, valid, test) of a permutation of all rows; default: the data set's own split,
            for the user's own data 80/10/10.
        label, id: columns of a `.csv` that are kept apart from the features, in `labels` and `ids` of the
            splits.
        time: the column of a `.csv` that orders rows, numbers or ISO dates: then rows with one `id` are a sequence.
            Cells that are missing are masked. Without `id` all rows are one series, which is cut into pieces of
            `window` steps; the first of them are the training split, the last ones the test split.
        inputs: columns of a `.csv` of sequences that act on the latents, as they are: u_t acts on the step to z_t.
        every: how far the times of a `.csv` are apart: "D", "B" (working days), "h", "15min", "MS" (first of the month)
            and so on, as pandas writes them, or a number for times that are numbers; dates with a zone are taken in
            UTC. Times without a row are steps without values, then; otherwise rows follow one another as they are, and
            the description counts the gaps.
        columns: of a `.csv` to model, where not all are that are nothing else. drop: those to leave out.
        kind: what columns are, where they seem something else, as ``{"visits": "count"}`` or ``["visits=count"]``. Of a
            "count" cells that are no whole number from 0 on become gaps, of a "binary" one those that are not 0 or 1;
            "real" values are standardised.
        standardize: False leaves real values as they are.
        divisor: what values are divided by, such as 255; 1 leaves those as they are that seem intensities. Scores and
            draws are of the quotients, as of pictures.
        header: whether the first row of a `.csv` names the columns; by default it is found out, and told, as is what
            the next but `thousands` say.
        separator: what stands between the cells of a `.csv`: a sign, or comma, semicolon, tab, bar or blank.
        decimal: "." or ",", the mark before the decimals of its numbers. Beside "," a point separates thousands, where
            decimals follow.
        thousands: the mark between groups of three digits: ",", ".", "'" or a blank. Numbers in groups are refused
            unless it is given, as "1,234" is another number to some.
        encoding: of its text, as Python calls it: "utf-8", "cp1252" and so on.
        comment: what its lines begin with that are no rows, such as "%"; "" where every line is a row, also one that
            begins with "#".
        size: of the images of a folder, which are resized to it: 32, "32x24", or (32, 24) for height and width.
        channels: "first" or "last", where an array of pictures has them; by default it is found out, and told.
        array: which one of a `.npz` holds the data.
        max_gb: what a file may take in memory, as far as it announces it; more is refused.
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
    every = None if every is None else str(every)
    window = None if window is None else operator.index(window)

    if not max_gb > 0:
        raise ValueError(f"expected max_gb > 0, got {max_gb}: give the gigabytes that data may take")
    if divisor is not None and not 0 < divisor < math.inf:
        raise ValueError(f"expected divisor > 0, got {divisor}: give what intensities are divided by, or 1")
    if channels not in (None, "first", "last"):
        raise ValueError(f"expected channels= (--data.channels) to be 'first' or 'last', got {channels!r}: choose one")
    kinds = _kinds(kind)
    form: dict[str, Any] = {
        "header": header,
        "separator": separator,
        "decimal": decimal,
        "thousands": thousands,
        "encoding": encoding,
        "comment": comment,
    }
    columns, drop, inputs = (
        tuple(map(str, names)) for names in (columns, drop, inputs)
    )  # of frames they may be numbers
    label, id, time = (None if name is None else str(name) for name in (label, id, time))
    named_columns = Columns(label, id, time, inputs, window, every, columns, drop, **form)
    arrays = Arrays(_height_and_width(size), channels, array, max_gb)
    name, source = find(name_or_path, root, download, named_columns, arrays)
    known = isinstance(name_or_path, str) and name_or_path in NAMED
    arguments: dict[str, Any] = {}
    if isinstance(name_or_path, str | os.PathLike):
        arguments = {"name_or_path": name_or_path if known else _absolute(name_or_path)}
    arguments |= {"binarize": binarize} if binarize != "none" else {}
    named: dict[str, Any] = {"label": label, "id": id, "time": time, "inputs": list(inputs) or None}
    named |= {"window": window, "every": every, "max_gb": None if max_gb == 2 else max_gb}
    named |= {"columns": list(columns) or None, "drop": list(drop) or None, **form}
    named |= {"kind": [f"{column}={what}" for column, what in kinds.items()] or None}
    named |= {
        "standardize": None if standardize else False,
        "divisor": divisor,
        "channels": channels,
        "array": array,
    }
    named |= {"size": size if size is None or isinstance(size, int | str) else list(size)}
    arguments |= {key: value for key, value in named.items() if value is not None}
    arguments |= {"root": _absolute(root)} if root else {}
    arguments |= {"split": list(split)} if split else {}
    arguments |= {"seed": seed} if seed else {}
    gaps = (*_of_kinds(source, kinds, name), *_gaps_of(source))
    rows = _division(source, split, seed, name)
    schema = _learned(name, source, rows[0], kinds, standardize, binarize, divisor)
    schema = replace(schema, source=arguments, choices=(*schema.choices, *source.choices, *gaps))
    return _dataset(schema, source, rows, seed)


def load_again(schema: Schema) -> Dataset:
    """The data set that a run was trained on: its rows in their units and splits, also where the file has changed.

    Args:
        schema: the run's record, whose `source` names the data.

    Raises:
        ValueError: the data came from no file, or none of a split's rows are left. FileNotFoundError: the file is gone.

    Warns:
        SchemaWarning: the file has changed.
    """
    if "name_or_path" not in schema.source:
        raise ValueError(f"expected data that can be loaded again, got {schema.name} without a source: pass the data")
    _, source = _read(schema, schema.source["name_or_path"], {})
    schema = replace(schema, classes=source.classes)  # with those of labels that are new
    arguments = dict(schema.source)
    seed, parts = arguments.get("seed", 0), ("train", "valid", "test")
    counted = None if source.lengths is None else _counted(source)
    everything = torch.arange(len(source.x))
    whole = _split(schema, source, everything, counted, "all", 0)
    sums = whole.checksums
    assert sums is not None
    rows: list[Tensor] = []
    if len(sums) == sum(map(len, schema.checksums.values())):
        rows = _division(source, arguments.get("split"), seed, schema.name)
        now = [sums[each.numpy()] for each in rows]
        if all(np.array_equal(each, schema.checksums[part]) for part, each in zip(parts, now, strict=True)):
            return _dataset(schema, source, rows, seed)
    found, told = _followed(schema, sums, spans_of(whole))
    where = arguments["name_or_path"]
    if not len(schema.checksums["valid"]):  # as the user divided the data otherwise
        unseen = np.flatnonzero(found == "test")
        own = rows[1].numpy() if rows else unseen[: len(unseen) // 2]
        found[own] = np.where(found[own] == "test", "valid", found[own])
    for part in parts:
        if not (found == part).any() and not told and part == "test":
            raise ValueError(
                f"expected rows that the run was not trained on in {where}, got none: name other data (--data)"
            )
        if not (found == part).any():
            raise ValueError(
                f"expected rows of the {part} split in {where}, which has changed since the training, got none: put "
                "the file back, or name other data (--data)"
            )
    if told:
        warnings.warn(f"{where} has changed since the training: {told}", SchemaWarning, stacklevel=3)
    rows = [_as_recorded(schema.checksums[part], sums, np.flatnonzero(found == part)) for part in parts]
    return _dataset(schema, source, rows, seed)


def _followed(schema: Schema, sums: np.ndarray, spans: Sequence[Span]) -> tuple[np.ndarray, str]:
    """(N,), the split of each row of a data set that may have changed, "" of further copies of rows that were there;
    and what has changed, in words."""
    left = Counter(row for rows in schema.checksums.values() for row in rows.tolist())
    known = set(left)
    same = schema.parts_of(sums)
    found = schema.parts_of_spans(same, spans)
    changed, new = found != same, found == ""
    found[new] = "test"
    copies = 0
    for i, row in enumerate(sums.tolist()):
        copy = row in known and not left[row]
        left[row] -= row in known and not copy
        copies += copy
        found[i] = "" if copy else found[i]
    gone = max(0, left.total() - int(changed.sum()))
    new[found == ""] = False
    told = []
    if new.any():
        told.append(f"{_rows(int(new.sum()))} new, and count{'s' if new.sum() == 1 else ''} as test rows")
    if gone:
        told.append(f"{_rows(gone)} gone")
    if changed.any():
        told.append(f"{_rows(int(changed.sum()))} changed, and keep{'s' if changed.sum() == 1 else ''} the split")
    if copies:
        what = "a further copy of another" if copies == 1 else "further copies of others"
        told.append(f"{_rows(copies)} {what}, and left out")
    return found, "; ".join(told)


def _rows(count: int) -> str:
    return "1 row is" if count == 1 else f"{count:,} rows are"


def _as_recorded(recorded: np.ndarray, sums: np.ndarray, rows: np.ndarray) -> Tensor:
    """Rows in the order in which their checksums were recorded, and then those that were not."""
    places: dict[int, list[int]] = {}
    for place, value in enumerate(recorded.tolist()):
        places.setdefault(value, []).append(place)
    at = [places[value].pop(0) if places.get(value) else len(recorded) for value in sums[rows].tolist()]
    return torch.from_numpy(rows[np.argsort(at, kind="stable")])


# what other files have alike
READING = ("label", "id", "time", "inputs", "window", "every", "size", "channels", "array", "root")
OPTIONS = ("download", "max_gb", *FORM)


def read(schema: Schema, data: Any, **options: Any) -> Split:
    """Other data in the units of a schema: its columns by name, in any order, its divisor, location and scale.

    Args:
        schema: the record in whose units the data are to be.
        data: a path, a data set's name, a pandas frame or an array, in original units; one row or many.
        options: of `load_dataset`, for what is another than it was: label, id, time, inputs, window, every, size,
            root, download, max_gb, and how a table is written, which is as was asked for at the training, and is
            otherwise found out anew, and told. A column of labels or ids may be absent, unless it is named here.

    Returns:
        All rows in their order. `Split.parts` tells those that were trained on.

    Raises:
        ValueError: columns that are missing, other shapes, values of other units, or other options.

    Warns:
        SchemaWarning: columns that are ignored, what was found out of the file, and what else was assumed.

    Example:
        >>> import pandas
        >>> from pyro_vae.data import load_dataset
        >>> frame = pandas.DataFrame({"a": range(50), "b": [0.5 * i for i in range(50)]})
        >>> schema = load_dataset(frame).schema
        >>> schema.restore(read(schema, frame[["b", "a"]][7:8]).x)
        tensor([[7.0000, 3.5000]])
    """
    if unknown := [name for name in options if name not in (*READING, *OPTIONS)]:
        raise ValueError(
            f"expected options of reading, {', '.join((*READING, *OPTIONS))} (--data.id and so on), got {unknown[0]}: "
            "leave it out, as columns, units and splits are those of the training"
        )
    name, source = _read(schema, data, options)
    schema = replace(schema, name=name)
    counted = None if source.lengths is None else _counted(source)
    seed = schema.source.get("seed", 0)
    everything = torch.arange(len(source.x))
    whole = _split(schema, source, everything, counted, "all", 3 * seed + 2 if schema.binarize == "static" else 2)
    assert whole.checksums is not None
    parts = schema.parts_of_spans(schema.parts_of(whole.checksums), spans_of(whole))
    if source.sizes is not None:
        own = np.repeat(("train", "valid", "test"), source.sizes)[np.argsort(source.order.numpy())]
        parts = np.where(parts == "", own, parts)
    parts[parts == ""] = "test"
    given = {key: value for key, value in options.items() if value is not None}
    roles = {key: value for key, value in {**schema.source, **given}.items() if key in READING}
    if not source.named:  # a series by itself, whose pieces have numbers
        roles.pop("id", None)
    return replace(whole, schema=replace(schema, classes=source.classes, source=roles), parts=parts)


def _read(schema: Schema, data: Any, options: Mapping[str, Any]) -> tuple[str, Source]:
    """The name and contents of a source whose columns are those of a schema, with what the schema allows it to hold."""
    before = dict(schema.source)
    is_path = isinstance(data, str | os.PathLike)
    same = is_path and before.get("name_or_path") in (data, _absolute(data))
    kept = {
        key: before[key] for key in (before if same else (*READING, *FORM) if is_path else READING) if key in before
    }
    asked = {**kept, **{key: value for key, value in options.items() if value is not None}}
    roles: dict[str, Any] = {key: asked.get(key) for key in ("label", "id", "time", "window", "every", *FORM)}
    columns = Columns(
        **roles,
        inputs=tuple(asked.get("inputs") or ()),
        expected=schema.names or (),
        optional=tuple(key for key in ("label", "id") if options.get(key) is None),
    )
    of_table = is_frame(data) or (is_path and is_table(data))
    if not of_table:  # what was asked for is refused, what the training's file had is not
        own = {key: value for key, value in options.items() if key in Columns._fields and value is not None}
        columns = Columns(**own)
    arrays = _arrays_like(asked, options, data if is_path else None, of_table)
    root, download = asked.get("root"), asked.get("download", False)
    try:
        name, source = find(data, root, download, columns, arrays, least=1)
    except FileNotFoundError as error:
        if not same:
            raise
        raise FileNotFoundError(
            f"expected the data of the training at {data}, found none: put the file back, or name other data with "
            "their path (--data)"
        ) from error
    except ValueError as error:
        given = [f"{key}={before[key]!r}" for key in FORM if key in kept and options.get(key) is None and not same]
        if not given:
            raise
        raise ValueError(f"{error} (read with {', '.join(given)}, as the file of the training)") from None
    _check_like(schema, source, name, same)
    as_they_are = source.columns is not None and schema.scale is None and source.x.dtype == torch.float64
    if as_they_are and not same and (lost := _lost(source.x)) > 0.01:
        warnings.warn(f"{name}: whole numbers above 2**24 are rounded by up to {lost:g}", SchemaWarning, stacklevel=4)
    kinds = _kinds([each for each in before.get("kind", ()) if source.columns is not None])
    found = [choice.what for choice in (*source.choices, *_of_kinds(source, kinds, name))]
    known = {choice.what for choice in schema.choices}
    if told := ", ".join(what for what in found if what not in known or not same):
        warnings.warn(f"{name}: {told}", SchemaWarning, stacklevel=4)
    if not schema.missing and not schema.sequences and source.x.is_floating_point() and bool(source.x.isnan().any()):
        row = int(source.x.isnan().flatten(1).any(1).nonzero()[0])
        line = f"row {row} (from 0)" if source.lines is None else f"line {source.lines()[row]}"
        raise ValueError(
            f"expected a value in every cell of {name}, as in the training data, got {int(source.x.isnan().sum())} "
            f"missing, the first in {line}: fill in or drop these rows"
        )
    if schema.names is not None and source.columns is None:
        warnings.warn(
            f"{name} names no columns: they are taken for {_listed(schema.names)}, in this order",
            SchemaWarning,
            stacklevel=4,
        )
    if source.unlabelled:
        warnings.warn(
            f"some rows of {name} have no label, and so none are written: codes and scores are what they would be",
            SchemaWarning,
            stacklevel=4,
        )
    if source.extra and not same:
        warnings.warn(
            f"columns of {name} that the model does not know are left out: {_listed(source.extra)}",
            SchemaWarning,
            stacklevel=4,
        )
    if source.classes is not None and schema.classes is None and asked.get("label") == before.get("label") is not None:
        warnings.warn(
            f"labels of {name} are words, which were numbers in the training, and so none are written: codes and "
            "scores are what they would be",
            SchemaWarning,
            stacklevel=4,
        )
        source = replace(source, labels=None, classes=None)
    return name, _classes_like(schema, source)


def _arrays_like(asked: Mapping[str, Any], given: Mapping[str, Any], path: Any, of_table: bool) -> Arrays:
    """How arrays are read: as those of the training were, where that has a meaning for this file, and as is `given`."""
    folder = path is not None and Path(path).expanduser().is_dir()
    packed = path is not None and Path(path).suffix.lower() == ".npz"
    fits = {"size": folder, "array": packed, "channels": not (of_table or folder or path in NAMED)}
    own = {name: asked.get(name) if fit else given.get(name) for name, fit in fits.items()}
    size = _height_and_width(own.pop("size"))
    return Arrays(size=size, max_gb=asked.get("max_gb", 2.0), **own)


def _check_like(schema: Schema, source: Source, name: str, same: bool) -> None:
    """The shape of one datum, and what its values are measured in."""
    shape, of_sequences = tuple(source.x.shape[1:]), source.lengths is not None
    shape = shape[1:] if of_sequences else shape
    known = source.eight_bit or source.values == SIXTEEN_BIT
    if known and len(shape) == 3 and shape == (1, *schema.event_shape[1:]):
        source.x = source.x.expand(-1, schema.event_shape[0], -1, -1)  # grey pictures among coloured ones
        shape = tuple(source.x.shape[1:])
    if shape != tuple(schema.event_shape) or of_sequences != schema.sequences:
        wanted = f"{tuple(schema.event_shape)}{f' ({_listed(schema.names)})' if schema.names else ''}"
        came = f"{shape}{f' ({_listed(source.columns)})' if source.columns else ''}"
        per = " per step"
        wanted_size = "x".join(map(str, schema.event_shape[1:])) if len(schema.event_shape) == 3 else ""
        raise ValueError(
            f"expected data of shape {wanted}{per * schema.sequences}, as in the training, got "
            f"{came}{per * of_sequences} in {name}: "
            + (f"size= (--data.size {wanted_size}) resizes them" if known and wanted_size else "name such data")
        )
    if same:
        return
    if known and schema.divisor not in OF_BITS:
        raise ValueError(
            f"expected values in the units of the training, got intensities of pictures in {name}: write them as .npy"
        )
    if schema.divisor == 1 or "divisor" in schema.source or known:
        return
    low, high = _ends(source.x)
    of_bytes = source.x.dtype == torch.uint8 and schema.divisor in OF_BITS
    if of_bytes and high != 1:  # not those of true and false
        source.eight_bit = True  # scaled by their own bits
        return
    if of_bytes or low < 0 or high > schema.divisor or (high <= 1 and not _are_whole(source.x)):
        raise ValueError(
            f"expected intensities from 0 to {schema.divisor:g}, as in the training, got {low:g} to {high:g} in "
            f"{name}: scale them so"
        )


def _classes_like(schema: Schema, source: Source) -> Source:
    """Labels by the classes of the training, with those that are new after them."""
    if source.labels is None or schema.classes is None:
        return replace(source, classes=schema.classes if source.labels is None else source.classes)
    own, codes = source.classes, source.labels
    if own is None:  # as all that are there are numbers
        values, codes = source.labels.unique(return_inverse=True)
        own = tuple(f"{value:g}" for value in values.tolist())
    classes = (*schema.classes, *(each for each in own if each not in schema.classes))
    return replace(source, labels=torch.tensor([classes.index(each) for each in own])[codes], classes=classes)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _division(source: Source, split: Sequence[float] | None, seed: int, name: str) -> list[Tensor]:
    """The rows of the training, validation and test split."""
    if split is None and source.sizes is not None:
        return list(source.order.split(list(source.sizes)))
    order = torch.randperm(len(source.x), generator=torch.Generator().manual_seed(int(seed)))
    order = torch.arange(len(source.x)) if source.in_time else order
    return list(order.split(list(_sizes(len(order), (0.8, 0.1, 0.1) if split is None else split, name))))


def _learned(
    name: str,
    source: Source,
    rows: Tensor,
    kinds: Mapping[str, Kind],
    standardize: bool,
    binarize: Binarize,
    divisor: float | None,
) -> Schema:
    """What the training rows tell of the data, without checksums."""
    training, of_sequences = source.x.index_select(0, rows), source.lengths is not None
    guessed, values = _scaling(source, training)
    divisor, values = (guessed, values) if divisor is None else (divisor, Choice(f"x/{divisor:g}", ""))
    if binarize != "none":
        divisor *= source.peak if divisor == guessed else 1
        text = f"x/{source.peak}" if source.peak > 1 else values.what
        values = Choice(text + (" binarised once" if binarize == "static" else " binarised afresh"), "")
    columns = num_steps = None
    missing = source.mask is not None or (source.x.is_floating_point() and _has_gaps(source.x))
    if source.lengths is not None:
        num_steps = int(source.lengths[rows].median())
        training = _by_step(training, _counted(source)[rows])
    if training.ndim == 2:
        names: Sequence[str | None] = source.columns or [None] * training.shape[1]
        asked = None if of_sequences else source.columns  # what a column of sequences is has no option
        location, scale = torch.zeros(len(names)), torch.ones(len(names))
        as_they_are = binarize != "none" or source.as_they_are or divisor != 1
        if not as_they_are and _is_real_table(training, asked, kinds, name) and standardize:
            location, scale = _standardisation(training, source.columns, name)
            values = Choice("real values standardised per column", "data.standardize false")
        elif source.x.dtype == torch.float64:
            _check_rounding(training / divisor, source.columns, kinds, name)
        found = _kinds_of(training / divisor if divisor != 1 else training)
        columns = tuple(
            Column(each, kinds.get(str(each), own), float(a), float(b))
            for each, own, a, b in zip(names, found, location, scale, strict=True)
        )
    elif source.x.dtype == torch.float64:
        _check_rounding((training / divisor).reshape(-1, 1), None, {}, name)
    shape = source.x.shape
    return Schema(
        name,
        tuple(shape[2:] if of_sequences else shape[1:]),
        columns,
        divisor=float(divisor),
        sequences=of_sequences,
        num_steps=num_steps,
        missing=missing,
        binarize=binarize,
        classes=source.classes,
        summary=f"{shape[0]:,} {source.noun or _noun(shape, of_sequences)}",
        choices=(values,),
    )


def _dataset(schema: Schema, source: Source, rows: Sequence[Tensor], seed: int) -> Dataset:
    """The splits that these rows are, and the record of them."""
    counted = None if source.lengths is None else _counted(source)  # (N, T, D)
    seeds = [3 * seed + i for i in range(3)] if schema.binarize == "static" else [None, 1, 2]
    parts = {}
    for name, own, drawn in zip(("train", "valid", "test"), rows, seeds, strict=True):
        parts[name] = _split(schema, source, own, counted, name, drawn)
    if not schema.checksums:
        sums = {name: split.checksums for name, split in parts.items() if split.checksums is not None}
        spans = {name: spans_of(split) for name, split in parts.items()}
        schema = replace(schema, checksums=sums, spans=spans if any(spans.values()) else {})
    splits = {name: replace(split, schema=schema) for name, split in parts.items()}
    return Dataset(schema.name, **splits, event_shape=torch.Size(schema.event_shape), schema=schema)


def _split(schema: Schema, source: Source, rows: Tensor, counted: Tensor | None, name: str, seed: int | None) -> Split:
    """These rows in the units of the schema, and their checksums. Intensities are made 0 or 1 by `seed`, or where it is
    None when batches are drawn."""
    sums = np.empty(len(rows), dtype=np.uint64)
    x = torch.empty((len(rows), *source.x.shape[1:]), dtype=torch.float32)
    for begin in range(0, len(rows), PART):
        some = rows[begin : begin + PART]
        raw = source.x.index_select(0, some)
        x[begin : begin + PART] = made = _converted(schema, source, raw)
        if bool(made.isinf().any()):
            raise _too_large(schema, source, raw, made, some)
        sums[begin : begin + PART] = _checksums(source, made if schema.scale is None else raw, counted, some)
    if schema.binarize != "none":
        x = _intensities(x, schema.name)
        x = x if seed is None else bernoulli(x, seed)
    log_jacobian: float | Tensor = 0.0 if schema.scale is None else -schema.scale.log().sum().item()
    if schema.scale is not None and counted is None and bool(x.isnan().any()):  # what is missing has no density
        log_jacobian = -(~x.isnan() * schema.scale.log()).sum(-1)
    of_steps: dict[str, Any] = {}
    if counted is not None:
        x, of_steps = _steps_of(source, x, counted, rows)
        if schema.scale is not None:
            log_jacobian = -(counted[rows].sum(1) * schema.scale.log()).sum(-1)
    split = Split(
        (x,),
        labels=None if source.labels is None else source.labels[rows],
        log_jacobian=log_jacobian,
        name=name,
        binarize="dynamic" if schema.binarize != "none" and seed is None else None,
        ids=rows.numpy() if source.ids is None else source.ids[rows.numpy()],
        schema=schema,
        checksums=sums,
        **of_steps,
    )
    return split


def _too_large(schema: Schema, source: Source, raw: Tensor, made: Tensor, rows: Tensor) -> ValueError:
    """The error of rows whose values are not finite in the units of the training."""
    first = made.isinf().nonzero()[0]
    row = int(rows[first[0]])
    line = f"row {row} (from 0)" if source.lines is None else f"line {source.lines()[row]}"
    at = f", column {column_name(int(first[-1]), schema.names)}" if schema.columns else ""
    return ValueError(
        f"expected values that are finite as float32 in the units of the training split, got "
        f"{float(raw[tuple(first)]):g} in {line}{at} of {schema.name}, which is too far from the values there: drop "
        "the row or the column, or scale the column"
    )


def _converted(schema: Schema, source: Source, x: Tensor) -> Tensor:
    """x in the units of the schema; pictures whose bits are known are scaled by them."""
    if schema.divisor in OF_BITS and source.values == SIXTEEN_BIT:
        return x.float()
    return x.float() / 255 if schema.divisor in OF_BITS and source.eight_bit else schema.convert(x)


def _checksums(source: Source, x: Tensor, counted: Tensor | None, rows: Tensor) -> np.ndarray:
    """`row_checksums` of x (B, ...), the values of these rows before they are standardised, or made 0 or 1."""
    if source.lengths is None or counted is None:
        return row_checksums(x)
    lengths, u = source.lengths[rows], None if source.inputs is None else source.inputs[rows]
    x = x.where(counted[rows], torch.nan) if source.mask is not None else x
    x = x.where((torch.arange(x.shape[1]) < lengths[:, None])[..., None], 0.0)
    return row_checksums(x, lengths[:, None], *([] if u is None else [u]))


def _has_gaps(x: Tensor) -> bool:
    parts = (some for some in x.split(CHUNK) if some.sum().isnan())  # a sum is told in less time
    return any(bool(some.isnan().any()) for some in parts)


def _kinds_of(training: Tensor) -> list[Kind]:
    """What each column of rows (N, D) holds: 0 and 1 alone, whole numbers from 0 on, or others."""
    whole = torch.ones(training.shape[1], dtype=torch.bool)
    binary = whole.clone()
    for some in training.split(PART):
        if not whole.any():
            break
        gaps = some.isnan()
        whole &= (((some >= 0) & (some == some.round())) | gaps).all(0)
        binary &= ((some == 0) | (some == 1) | gaps).all(0)
    of_kind: dict[bool | None, Kind] = {True: "binary", False: "count", None: "real"}
    return [of_kind[bool(b) if bool(w) else None] for w, b in zip(whole, binary, strict=True)]


def _counted_steps(source: Source) -> Tensor:
    """Which steps of sequences are there, (N, T)."""
    assert source.lengths is not None
    return torch.arange(source.x.shape[1]) < source.lengths[:, None]


def _counted(source: Source) -> Tensor:
    """Which values of sequences are there and not missing, (N, T, D)."""
    there = _counted_steps(source)
    return there[..., None].expand(source.x.shape) if source.mask is None else there[..., None] & source.mask


def _by_step(x: Tensor, counted: Tensor) -> Tensor:
    """A row for each step that has a value, (M, D), NaN where one is missing."""
    return x.double().where(counted, torch.nan)[counted.any(-1)]


def _steps_of(source: Source, x: Tensor, counted: Tensor, rows: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The sequences `rows` up to the end of the longest, and a split's arguments that go with their steps."""
    assert source.lengths is not None
    lengths = source.lengths[rows]
    T = int(lengths.max())

    def steps(of_all: Tensor) -> Tensor:
        return of_all[rows][:, :T].contiguous()

    kwargs = {"lengths": lengths}
    if source.inputs is not None:
        kwargs["u"] = steps(source.inputs).float()
    if source.mask is not None:
        kwargs["mask"] = steps(source.mask)
    latents = None if source.latents is None else steps(source.latents).float()
    times = None if source.times is None else source.times[rows.numpy(), :T]
    x = x[:, :T].where(steps(counted), 0.0).contiguous()
    return x, {"kwargs": kwargs, "latents": latents, "times": times}


def _scaling(source: Source, training: Tensor) -> tuple[float, Choice]:
    """What intensities are divided by, 1 where values stay as they are, and what to call them."""
    low, high = _ends(training)
    images_of_bytes = training.ndim > 2 and source.lengths is None and low >= 0 and 127 < high <= 255
    if source.sixteen_bit and high > 255:
        return 65535.0, Choice(SIXTEEN_BIT, "data.divisor 1")
    if source.eight_bit or images_of_bytes or (training.dtype == torch.uint8 and high > 1):
        return 255.0, Choice("intensities x/255", "" if source.eight_bit or source.sizes else "data.divisor 1")
    if source.values:
        return 65535.0 if source.values == SIXTEEN_BIT else 1.0, Choice(source.values, "")
    if _are_whole(training):
        option = "data.kind NAME=real" if source.columns else ""
        counts = ", taken for counts" if option and low >= 0 else ""
        what = "binary values" if low >= 0 and high <= 1 else f"whole numbers {low:.0f} to {high:.0f}{counts}"
        return 1.0, Choice(what, option)
    return 1.0, Choice("values in [0, 1]" if low >= 0 and high <= 1 else "real values", "")


def _intensities(x: Tensor, name: str) -> Tensor:
    low, high = _ends(x)
    if low < 0 or high > 1:
        raise ValueError(
            f"expected values in [0, 1] to binarise, got {low:g} to {high:g} in {name}: pass "
            "binarize='none', or scale the data into [0, 1]"
        )
    return x.float()


def _is_real_table(train: Tensor, columns: Sequence[str] | None, kinds: Mapping[str, Kind], name: str) -> bool:
    """Whether training rows (N, D) are neither counts nor within [0, 1]: a Normal is their likelihood.

    Raises:
        ValueError: nearly all of a column are counts, and the others are: is it one?
    """
    if train.ndim != 2:
        return False
    if all(bool(((some >= 0) & (some <= 1) | some.isnan()).all()) for some in train.split(CHUNK)):
        return "real" in kinds.values()
    counts = there = torch.zeros(train.shape[1], dtype=torch.int64)
    for some in train.split(PART):
        counts = counts + ((some >= 0) & (some == some.round())).sum(0)
        there = there + (~some.isnan()).sum(0)
        if bool((there - counts > 0.01 * len(train)).any()):  # too many for a column that is asked about
            return True
    named = list(columns) if columns is not None else [str(j) for j in range(train.shape[1])]
    wrong = [j for j in range(train.shape[1]) if counts[j] < there[j] or kinds.get(named[j]) == "real"]
    asked = [j for j in wrong if counts[j] >= 0.99 * there[j] and named[j] not in kinds]
    if asked and len(asked) == len(wrong) and columns is not None:
        cells = train[:, asked[0]]
        odd = cells[~(cells.isnan() | ((cells >= 0) & (cells == cells.round())))]
        told = ", ".join(f"{float(each):g}" for each in odd[:3])
        raise ValueError(
            f"expected whole numbers from 0 on in column {named[asked[0]]!r} of {name}, as nearly all of it are, got "
            f"{told}: say what it is, kind= (--data.kind {named[asked[0]]}=count) makes these cells gaps, "
            f"{named[asked[0]]}=real takes them"
        )
    return bool(wrong)


def _kinds(kind: Sequence[str] | Mapping[str, Kind]) -> dict[str, Kind]:
    given = list(kind.items()) if isinstance(kind, Mapping) else [tuple(str(each).rsplit("=", 1)) for each in kind]
    for each in given:
        if len(each) != 2 or each[1] not in KINDS:
            raise ValueError(
                f"expected kind= (--data.kind) as NAME=KIND of {', '.join(KINDS)}, got {'='.join(map(str, each))!r}: "
                "as in visits=count"
            )
    return dict(given)  # type: ignore[arg-type]


def _of_kinds(source: Source, kinds: Mapping[str, Kind], name: str) -> tuple[Choice, ...]:
    """Make gaps of cells that are not of the kind that their column is said to be; what is to be told of them."""
    made = 0
    for column, kind in kinds.items():
        if source.columns is None or column not in source.columns or source.lengths is not None:
            raise ValueError(
                f"expected kind= (--data.kind) of one of the columns {list(source.columns or ())} of {name}, got "
                f"{column!r}: correct it"
            )
        if kind == "real":
            continue
        cells = source.x[:, source.columns.index(column)]
        fits = (cells >= 0) & (cells == cells.round()) if kind == "count" else (cells == 0) | (cells == 1)
        odd = ~fits & ~cells.isnan()
        cells[odd] = torch.nan
        made += int(odd.sum())
    return (Choice(f"{made:,} cell{'s' if made > 1 else ''} of another kind made gaps", ""),) if made else ()


def _gaps_of(source: Source) -> tuple[Choice, ...]:
    """What is to be told of missing values; of steps without any, which may be times without a row, nothing is."""
    if source.lengths is not None and source.mask is not None:
        steps = source.mask[_counted_steps(source)]  # (M, D)
        odd = int((~steps[steps.any(-1)]).sum())
        return (Choice(f"{odd:,} missing value{'s' if odd > 1 else ''}", ""),) if odd else ()
    missing = 0
    if source.x.ndim == 2 and source.x.is_floating_point():
        parts = source.x.split(CHUNK)
        missing = sum(int(some.isnan().sum()) for some in parts if some.sum().isnan())  # a sum is told in less time
    if not missing:
        return ()
    empty = sum(int(some.isnan().all(1).sum()) for some in source.x.split(CHUNK))
    none = f" ({empty:,} row{'s' if empty > 1 else ''} of nothing else)" if empty else ""
    return (Choice(f"{missing:,} missing value{'s' if missing > 1 else ''}{none}", ""),)


def _ends(x: Tensor) -> tuple[float, float]:
    """The smallest and the largest value that is not missing, looked at in parts, as memory counts."""
    ends = []
    for some in x.split(CHUNK):
        if not some.numel():
            continue
        low, high = map(float, some.aminmax())
        if low != low:  # as a value is missing
            low = float(some.nan_to_num(math.inf, math.inf, -math.inf).min())
            high = float(some.nan_to_num(-math.inf, math.inf, -math.inf).max())
        ends += [(low, high)] if low <= high else []
    return (min(low for low, _ in ends), max(high for _, high in ends)) if ends else (0.0, 0.0)


def _are_whole(x: Tensor) -> bool:
    """Whether all values that are not missing are whole numbers, looked at in parts, as memory counts."""
    return all(bool(((some == some.round()) | some.isnan()).all()) for some in x.split(CHUNK))


def _standardisation(train: Tensor, columns: tuple[str, ...] | None, name: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1/N) of the training rows of a table, (D,) each, float64."""
    pieces = train.split(PART)
    count = sum((~some.isnan()).sum(0) for some in pieces)
    location = sum(some.double().nansum(0) for some in pieces) / count
    scale = (sum((some - location).square().nansum(0) for some in pieces) / count).sqrt()
    rounding = 1e-14 * torch.stack([some.abs().nan_to_num(0.0).amax(0) for some in pieces]).amax(0)
    unseen = scale.isnan().nonzero().flatten().tolist()
    constant = (scale <= rounding).nonzero().flatten().tolist()
    if odd := unseen or constant:
        wanted, came, why = "to vary", f"is constant ({location[odd[0]]:g})", ", up to rounding"
        if unseen:
            wanted, came, why = "to have values", "has none", ""
        also = f" (also {', '.join(column_name(j, columns) for j in odd[1:])})" if odd[1:] else ""
        mend = f"drop= (--data.drop {for_shell([columns[j] for j in odd])})" if columns else "drop it"
        raise ValueError(
            f"expected every column of {name} {wanted}, column {column_name(odd[0], columns)} {came} in the training "
            f"split{why}{also}: {mend}"
        )
    return location, scale


def _check_rounding(train: Tensor, columns: tuple[str, ...] | None, kinds: Mapping[str, Kind], name: str) -> None:
    """Raises ValueError where values that stay as they are lie closer together than float32 tells them apart."""
    for j in range(train.shape[1]):
        column = train[:, j][~train[:, j].isnan()]
        if not len(column) or column.min() == column.max() or not _lost(column) > 0.01 * column.std(correction=0):
            continue
        mend = "subtract their mean, and scale them"
        if columns is not None:
            known = kinds.get(columns[j]) == "real"
            mend = "standardize= (--data.standardize) true" if known else f"kind= (--data.kind {columns[j]}=real)"
        which = f" column {column_name(j, columns)} has some" if columns is not None else " which has some"
        raise ValueError(
            f"expected values that float32 tells apart in {name},{which} from {float(column.min()):.12g} to "
            f"{float(column.max()):.12g}, which it rounds: {mend}"
        )


def _lost(x: Tensor) -> float:
    """The largest error of values as float32."""
    return float((x - x.float().double()).abs().nan_to_num(0.0).max()) if x.numel() else 0.0


def _height_and_width(size: int | str | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    given = str(size).lower().split("x") if isinstance(size, int | str) else [str(each) for each in size]
    if not 1 <= len(given) <= 2 or not all(each.isdecimal() and int(each) > 0 for each in given):
        raise ValueError(f"expected size as 32, 32x24 or (32, 24), got {size!r}: give height and width in pixels")
    return int(given[0]), int(given[-1])


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


def _absolute(path: str | os.PathLike[str]) -> str:
    return str(Path(path).expanduser().absolute())


def _noun(shape: torch.Size, sequences: bool) -> str:
    if sequences:
        return f"sequences of up to {shape[1]} steps, {shape[2]} number{'s' if shape[2] > 1 else ''} each"
    if len(shape) == 2:
        return f"rows of {shape[1]} column{'s' if shape[1] > 1 else ''}"
    _, channels, height, width = shape
    return f"images of {height} x {width} pixels" + (f" in {channels} channels" if channels > 1 else "")
