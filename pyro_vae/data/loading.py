"""`load_dataset`: a data set by name, or from a file or folder of the user's own."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..sources import NAMED, Columns, Source, column_name, find
from .containers import Dataset, Split, bernoulli

__all__ = ["load_dataset"]

Binarize = Literal["none", "static", "dynamic"]
Kind = Literal["real", "count", "binary"]
KINDS = ("real", "count", "binary")
CHUNK = 10_000  # rows that are looked at together


def load_dataset(
    name_or_path: str | os.PathLike[str],
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
    encoding: str | None = None,
    comment: str | None = None,
    size: int | str | Sequence[int] | None = None,
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
        header: whether the first row of a `.csv` names the columns; by default it is found out, and told, as is what
            the next four say.
        separator: what stands between the cells of a `.csv`: a sign, or comma, semicolon, tab, bar or blank.
        decimal: "." or ",", the mark before the decimals of its numbers. Beside "," a point separates thousands.
        encoding: of its text, as Python calls it: "utf-8", "cp1252" and so on.
        comment: what its lines begin with that are no rows, such as "%"; "" where every line is a row, also one that
            begins with "#".
        size: of the images of a folder, which are resized to it: 32, "32x24", or (32, 24) for height and width.
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

    if not max_gb > 0:
        raise ValueError(f"expected max_gb > 0, got {max_gb}: give the gigabytes that data may take")
    kinds = _kinds(kind)
    form: dict[str, Any] = {
        "header": header,
        "separator": separator,
        "decimal": decimal,
        "encoding": encoding,
        "comment": comment,
    }
    named_columns = Columns(label, id, time, tuple(inputs), window, every, tuple(columns), tuple(drop), **form)
    name, source = find(name_or_path, root, download, named_columns, _height_and_width(size), max_gb)
    known = isinstance(name_or_path, str) and name_or_path in NAMED
    arguments: dict[str, Any] = {"name_or_path": name_or_path if known else _absolute(name_or_path)}
    arguments |= {"binarize": binarize} if binarize != "none" else {}
    named: dict[str, Any] = {"label": label, "id": id, "time": time, "inputs": list(inputs) or None}
    named |= {"window": window, "every": every, "max_gb": None if max_gb == 2 else max_gb}
    named |= {"columns": list(columns) or None, "drop": list(drop) or None, **form}
    named |= {"kind": [f"{column}={what}" for column, what in kinds.items()] or None}
    named |= {"standardize": None if standardize else False}
    named |= {"size": size if size is None or isinstance(size, int | str) else list(size)}
    arguments |= {key: value for key, value in named.items() if value is not None}
    arguments |= {"root": _absolute(root)} if root else {}
    arguments |= {"split": list(split)} if split else {}
    arguments |= {"seed": seed} if seed else {}
    gaps = _of_kinds(source, kinds, name)
    x, values = _scaled(source)
    if binarize != "none":
        x = _intensities(x / source.peak, name)
        values = f"x/{source.peak}" if source.peak > 1 else values
        values += " binarised once" if binarize == "static" else " binarised afresh"

    if split is None and source.sizes is not None:
        permutation, sizes = source.order, source.sizes
    else:
        permutation = torch.randperm(len(x), generator=torch.Generator().manual_seed(int(seed)))
        permutation = torch.arange(len(x)) if source.in_time else permutation
        sizes = _sizes(len(x), (0.8, 0.1, 0.1) if split is None else split, name)
    rows = permutation.split(list(sizes))
    counted = None if source.lengths is None else _counted(source)  # (N, T, D)
    shape, parts = x.shape, [x.index_select(0, r) for r in rows]  # twice as fast as x[r]
    location = scale = None
    asked = source.columns if counted is None else None  # what a column of sequences is has no option
    training = parts[0] if counted is None else _by_step(parts[0], counted[rows[0]])
    real = binarize == "none" and not source.as_they_are and _is_real_table(training, asked, kinds, name)
    if real and standardize:
        table = x if counted is None else _by_step(x, counted)
        largest = torch.stack([some.abs().nan_to_num(0.0).amax(0) for some in table.split(CHUNK)]).amax(0)
        source.x = x = table = table[:0].clone()  # a slice alone would keep the memory
        location, scale = _standardisation(training, largest, source.columns, name)
        training = training[:0].clone()
        for i, part in enumerate(parts):
            parts[i] = _standardised(part, location, scale)
        values = "real values standardised per column"
    elif binarize == "static":
        parts = [bernoulli(part, 3 * seed + i) for i, part in enumerate(parts)]
    elif binarize == "dynamic":
        parts = [parts[0], bernoulli(parts[1], 1), bernoulli(parts[2], 2)]

    def make_split(i: int, split_name: str) -> Split:
        log_jacobian: float | Tensor = 0.0 if scale is None else -scale.log().sum().item()
        part, parts[i] = parts[i].float(), parts[i][:0].clone()
        if scale is not None and counted is None and bool(part.isnan().any()):  # what is missing has no density
            log_jacobian = -(~part.isnan() * scale.log()).sum(-1)
        of_steps: dict[str, Any] = {}
        if source.lengths is not None and counted is not None:
            part, of_steps = _steps_of(source, part, counted, rows[i])
            if scale is not None:
                log_jacobian = -(counted[rows[i]].sum(1) * scale.log()).sum(-1)
        return Split(
            (part,),
            labels=None if source.labels is None else source.labels[rows[i]],
            log_jacobian=log_jacobian,
            name=split_name,
            binarize="dynamic" if binarize == "dynamic" and split_name == "train" else None,
            ids=rows[i].numpy() if source.ids is None else source.ids[rows[i].numpy()],
            source=arguments,
            **of_steps,
        )

    return Dataset(
        name,
        train=make_split(0, "train"),
        valid=make_split(1, "valid"),
        test=make_split(2, "test"),
        event_shape=shape[1 if source.lengths is None else 2 :],
        description=f"{shape[0]:,} {source.noun or _noun(shape, counted is not None)}, {values}{source.note}{gaps}",
        location=location,
        scale=scale,
        columns=source.columns,
        classes=source.classes,
    )


def _counted(source: Source) -> Tensor:
    """Which values of sequences are there and not missing, (N, T, D)."""
    assert source.lengths is not None
    there = torch.arange(source.x.shape[1]) < source.lengths[:, None]
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


def _scaled(source: Source) -> tuple[Tensor, str]:
    """The values that are modelled, float32 for eight-bit intensities x/255, and what to call them."""
    x = source.x
    low, high = _ends(x)
    images_of_bytes = x.ndim > 2 and source.lengths is None and low >= 0 and 127 < high <= 255
    if source.eight_bit or images_of_bytes or (x.dtype == torch.uint8 and high > 1):
        return x.float() / 255, "intensities x/255"
    if x.dtype == torch.uint8:
        x = x.float()
    if source.values:
        return x, source.values
    if _are_whole(x):
        return x, "binary values" if low >= 0 and high <= 1 else f"whole numbers {low:.0f} to {high:.0f}"
    return x, "values in [0, 1]" if low >= 0 and high <= 1 else "real values"


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
    for some in train.split(CHUNK):
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


def _of_kinds(source: Source, kinds: Mapping[str, Kind], name: str) -> str:
    """Make gaps of cells that are not of the kind that their column is said to be; how many there are."""
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
    missing = 0
    if source.x.ndim == 2 and source.x.is_floating_point():
        parts = source.x.split(CHUNK)
        missing = sum(int(some.isnan().sum()) for some in parts if some.sum().isnan())  # a sum is told in less time
    told = f", {made:,} cell{'s' if made > 1 else ''} of another kind made gaps" if made else ""
    return told + (f", {missing:,} missing value{'s' if missing > 1 else ''}" if missing else "")


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


def _standardisation(train: Tensor, size: Tensor, columns: tuple[str, ...] | None, name: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1/N) of the training rows of a table, (D,) each, float64.

    Args:
        size: (D,), the largest absolute value of each column.
    """
    pieces = train.split(CHUNK)
    count = sum((~some.isnan()).sum(0) for some in pieces)
    location = sum(some.double().nansum(0) for some in pieces) / count
    scale = (sum((some - location).square().nansum(0) for some in pieces) / count).sqrt()
    rounding = 1e-12 * size
    unseen = scale.isnan().nonzero().flatten().tolist()
    if unseen:
        raise ValueError(
            f"expected values in every column of {name}, column {column_name(unseen[0], columns)} has none in the "
            "training split: drop it"
        )
    constant = (scale <= rounding).nonzero().flatten().tolist()
    if constant:
        raise ValueError(
            f"expected every column of {name} to vary, column {column_name(constant[0], columns)} is constant "
            f"({location[constant[0]]:g}) in the training split, up to rounding: drop it"
        )
    return location, scale


def _standardised(x: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """float32, made in small parts that stay in the processor's cache."""
    found = torch.empty(x.shape)
    for some, out in zip(x.split(CHUNK // 5), found.split(CHUNK // 5), strict=True):
        out.copy_((some - location).div_(scale))
    return found


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
