"""Data sets, and the one form in which data reach a model.

`load_dataset` gives a `Dataset` of three `Split`s; `as_data` turns what a user passes to `fit` or `evaluate`
into `Data`. Every random choice comes from a `torch.Generator` with a fixed seed: the global generators are
neither read nor moved.
"""

from __future__ import annotations

import contextlib
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from .sources import NAMED, Columns, Source, column_name, find, kind_of
from .sources.times import padded

__all__ = ["Data", "Dataset", "Split", "as_data", "joined", "load_dataset", "rows_of"]

Binarize = Literal["none", "static", "dynamic"]
Kind = Literal["real", "count", "binary"]
KINDS = ("real", "count", "binary")
CHUNK = 10_000  # rows that are looked at together
NUM_BUCKETS = 4  # of lengths of sequences: each is a compiled step


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """What a model is conditioned on: tensors indexed together on dimension 0.

    Args:
        args: tensors (N, ...) that go to model and guide by position; at least one.
        kwargs: tensors (N, ...) that go by keyword.
        log_jacobian: nats to add to the log-density of a datum to get it in the original units: one number, or (N,),
            float64, where it depends on the datum, as on a sequence's length.
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
    log_jacobian: float | Tensor = 0.0
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.args:
            raise ValueError("expected at least one tensor by position, got none: pass (x,) or (x, {'name': tensor})")
        lengths = {}
        for name, value in [*((f"tensor {i}", a) for i, a in enumerate(self.args)), *self.kwargs.items()]:
            if not isinstance(value, Tensor):
                raise ValueError(f"expected a tensor as {name}, got {kind_of(value)}: convert it with torch.as_tensor")
            if value.is_complex():
                raise ValueError(f"expected real numbers as {name}, got {value.dtype}: pass torch.view_as_real(...)")
            if value.ndim == 0:
                raise ValueError(f"expected {name} with data on dimension 0, got a scalar tensor: pass shape (N, ...)")
            lengths[name] = len(value)
        for name, given in (("labels", self.labels), ("log_jacobian", self.log_jacobian)):
            if isinstance(given, Tensor):
                lengths[name] = len(given)
        if len(set(lengths.values())) > 1:
            came = ", ".join(f"{name}: {length}" for name, length in lengths.items())
            raise ValueError(f"expected equal lengths on dimension 0, got {came}: give every tensor one row per datum")
        if len(self) == 0:
            raise ValueError("expected at least one datum, got tensors of length 0 on dimension 0: pass rows to score")
        steps = self.kwargs.get("lengths")
        if steps is not None and self.args[0].ndim == 3 and not steps.is_floating_point():
            T, low, high = self.args[0].shape[1], int(steps.min()), int(steps.max())
            if low < 1 or high > T:
                raise ValueError(
                    f"expected lengths from 1 to the {T} steps of x, got {low} to {high}: drop what is empty"
                )

    def __len__(self) -> int:
        return len(self.args[0])

    def __repr__(self) -> str:
        shapes = [f"{tuple(tensor.shape)}" for tensor in self.args]
        shapes += [f"{name}={tuple(tensor.shape)}" for name, tensor in self.kwargs.items()]
        return f"{type(self).__name__}({', '.join(shapes)})"

    @property
    def mean_log_jacobian(self) -> float:
        return float(torch.as_tensor(self.log_jacobian).mean())

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

    def in_dtype(self, dtype: torch.dtype) -> Self:
        """The same data with real numbers in this dtype."""

        def brought(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point() or tensor.dtype is dtype:
                return tensor
            now = tensor.to(dtype)
            back = now.to(tensor.dtype)
            return tensor if bool(((tensor == tensor.round()) & (back != tensor)).any()) else now

        args = tuple(map(brought, self.args))
        kwargs = {name: brought(tensor) for name, tensor in self.kwargs.items()}
        same = all(map(operator.is_, (*args, *kwargs.values()), (*self.args, *self.kwargs.values())))
        return self if same else replace(self, args=args, kwargs=kwargs)

    def batch(
        self, index: Tensor, generator: torch.Generator | None = None
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The rows `index` (B,) as `(args, kwargs)`, on the data's device.
        `generator`, on that device, is for splits that draw their data afresh; other data leave it untouched.
        """
        rows = index.to(self.device)
        args = tuple(tensor.index_select(0, rows) for tensor in self.args)
        return args, {name: tensor.index_select(0, rows) for name, tensor in self.kwargs.items()}

    def trimmed_batch(
        self, index: Tensor, generator: torch.Generator | None = None
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """`batch`; of sequences, where `lengths` (N,) are among the tensors by keyword, without the steps after the
        longest: what is as long as x on dimension 1 is cut like it. They end at one of at most four numbers of steps,
        so that compiled shapes stay few.
        """
        args, kwargs = self.batch(index, generator)
        if self._ends is None:
            return args, kwargs
        T = self.args[0].shape[1]
        end = int(self._ends[self._bucket[index.cpu()].max()])

        def cut(tensor: Tensor) -> Tensor:
            return tensor[:, :end].contiguous() if tensor.ndim > 1 and tensor.shape[1] == T else tensor

        return tuple(map(cut, args)), {name: cut(tensor) for name, tensor in kwargs.items()}

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """All rows once, shuffled, `batch_size` at a time; sequences of like lengths go together.

        Example:
            >>> data = Data((torch.zeros(6, 9, 1),), {"lengths": torch.tensor([3, 9, 3, 9, 3, 9])})
            >>> sorted(data.trimmed_batch(rows)[0][0].shape for rows in data.batches(3))
            [torch.Size([3, 3, 1]), torch.Size([3, 9, 1])]
        """
        order = torch.randperm(len(self), generator=generator)
        if self._ends is None:
            return list(order.split(batch_size))
        parts = order[self._bucket[order].argsort(stable=True)].split(batch_size)
        return [parts[i] for i in torch.randperm(len(parts), generator=generator)]

    def typical_batches(self, batch_size: int) -> list[Tensor]:
        """Rows of a batch of each shape that `trimmed_batch` makes of `batches`."""
        of_bucket = [torch.arange(len(self))]
        if self._ends is not None:
            of_bucket = [(self._bucket == i).nonzero().flatten() for i in range(len(self._ends))]
        found = [rows[torch.arange(batch_size) % len(rows)] for rows in of_bucket]
        rest = len(self) % batch_size
        return [*found, found[-1][:rest]] if rest else found

    @cached_property
    def _ends(self) -> Tensor | None:
        """The lengths that batches of sequences are cut to."""
        lengths, x = self.kwargs.get("lengths"), self.args[0]
        if lengths is None or x.ndim != 3 or lengths.shape != (len(x),) or lengths.is_floating_point():
            return None
        ordered = lengths.cpu().clamp(1, x.shape[1]).sort().values
        return ordered[torch.arange(1, NUM_BUCKETS + 1) * len(ordered) // NUM_BUCKETS - 1].unique()

    @cached_property
    def _bucket(self) -> Tensor:
        """(N,), the place of each sequence's bucket in `_ends`."""
        assert self._ends is not None
        return torch.bucketize(self.kwargs["lengths"].cpu().clamp(1, self.args[0].shape[1]), self._ends)


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
        latents: (N, T, Z), the true z of simulated sequences, or None; never shown to a model.
        times: (N, T), numbers or dates (datetime64) of the steps of a `.csv` of sequences, or None.
    """

    name: str = "train"
    binarize: Literal["dynamic"] | None = None
    ids: np.ndarray | None = None
    source: dict[str, Any] | None = None
    latents: Tensor | None = None
    times: np.ndarray | None = None

    @property
    def x(self) -> Tensor:
        """(N, *event_shape), float32, as stored: the intensities where `binarize` is "dynamic"."""
        return self.args[0]

    @cached_property
    def observed(self) -> Tensor:
        """(N, *event_shape), what a model can score: x, or one fixed draw of it, the same on every device."""
        return self.x if self.binarize is None else _bernoulli(self.x.cpu(), seed=0).to(self.device)

    @property
    def counted(self) -> Tensor:
        """Which values are there and not missing, in the shape of x."""
        lengths, mask, x = self.kwargs.get("lengths"), self.kwargs.get("mask"), self.x
        counted = torch.ones_like(x, dtype=torch.bool)
        if lengths is not None:
            counted = counted & (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
        return counted if mask is None else counted & (mask if mask.ndim == x.ndim else mask[..., None])

    @property
    def values(self) -> Tensor:
        """What of `observed` a model scores: of sequences a row for each step, (M, D), NaN where a value is missing."""
        if "lengths" not in self.kwargs:
            return self.observed
        return self.observed.where(self.counted, torch.nan)[self.counted.any(-1)]

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
        event_shape: the shape of one datum, (C, H, W) or (D,); of one step of a sequence.
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

    @property
    def sequences(self) -> bool:
        """Whether each datum is a sequence."""
        return "lengths" in self.train.kwargs

    @property
    def has_missing_entries(self) -> bool:
        """Whether some values of a step are missing and others are not."""
        return any(bool((s.counted.any(-1) & ~s.counted.all(-1)).any()) for s in (self.train, self.valid, self.test))

    def restore(self, x: Tensor) -> Tensor:
        """scale x + location for x (..., D), in x's dtype and on its device: the original units."""
        if self.location is None or self.scale is None:
            return x
        return (self.scale * x.cpu() + self.location).to(dtype=x.dtype).to(x.device)


def joined(splits: Sequence[Split]) -> Split:
    """All data of splits as one, in the order of their ids, `observed` as they are scored; shorter sequences are padded
    with zeros."""
    T = max(split.x.shape[1] for split in splits) if splits[0].kwargs else 0

    def together(tensors: Sequence[Tensor]) -> Tensor:
        if T and tensors[0].ndim > 1:
            tensors = [nn.functional.pad(t, (0, 0, 0, T - t.shape[1])) for t in tensors]
        return torch.cat(list(tensors))

    def known(name: str) -> list[Any]:
        values = [getattr(split, name) for split in splits]
        return [value for value in values if value is not None]

    log_jacobians = [torch.as_tensor(split.log_jacobian).expand(len(split)) for split in splits]
    same = all(not isinstance(split.log_jacobian, Tensor) for split in splits)
    whole = replace(
        splits[-1],
        args=(together([split.observed for split in splits]),),
        kwargs={name: together([split.kwargs[name] for split in splits]) for name in splits[0].kwargs},
        log_jacobian=splits[0].log_jacobian if same else torch.cat(log_jacobians),
        labels=torch.cat(known("labels")) if known("labels") else None,
        ids=np.concatenate(known("ids")) if known("ids") else None,
        latents=together(known("latents")) if known("latents") else None,
        times=np.concatenate([padded(times, T) for times in known("times")]) if known("times") else None,
        binarize=None,
        name="all",
    )
    if whole.ids is None:
        return whole
    ids = whole.ids
    with contextlib.suppress(ValueError):  # "9" before "10"
        ids = ids.astype(float)
    return rows_of(whole, np.argsort(ids, kind="stable").tolist())


def rows_of(split: Split, rows: list[int]) -> Split:
    """These data of a split, in this order."""
    of_each = isinstance(split.log_jacobian, Tensor)
    return replace(
        split,
        args=tuple(each[rows] for each in split.args),
        kwargs={name: each[rows] for name, each in split.kwargs.items()},
        log_jacobian=split.log_jacobian[rows] if of_each else split.log_jacobian,  # type: ignore[index]
        labels=None if split.labels is None else split.labels[rows],
        ids=None if split.ids is None else split.ids[rows],
        latents=None if split.latents is None else split.latents[rows],
        times=None if split.times is None else split.times[rows],
    )


def as_data(data: Any, *programs: Any) -> Data:
    """The data that `data` stands for.

    Args:
        data: a tensor (N, ...); a tuple of such tensors, optionally ending in a dict of keyword tensors; or
            `Data`, such as a split of a data set, which is returned as it is.
        programs: model and guide. Real numbers among the data are brought to the floating-point dtype that all their
            parameters have; whole numbers that it does not hold stay as they are, as do integers and booleans.

    Raises:
        ValueError: anything else, unequal lengths on dimension 0, or no data.

    Example:
        >>> as_data((torch.zeros(7, 2), {"u": torch.ones(7, 1)}))
        Data((7, 2), u=(7, 1))
        >>> as_data(torch.zeros(7, 2, dtype=torch.float64), nn.Linear(2, 2)).args[0].dtype
        torch.float32
    """
    owners = (getattr(program, "__self__", program) for program in programs)
    parameters = [p for owner in owners if isinstance(owner, nn.Module) for p in owner.parameters()]
    dtypes = {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
    data = _as_data(data)
    return data.in_dtype(*dtypes) if len(dtypes) == 1 else data


def _as_data(data: Any) -> Data:
    if isinstance(data, Data):
        return data
    if isinstance(data, Tensor):
        return Data((data,))
    if isinstance(data, Dataset):
        raise ValueError(f"expected data, got the whole data set {data.name!r}: pass its .train, .valid or .test")
    if not isinstance(data, tuple):
        raise ValueError(
            "expected a tensor, a tuple of tensors that may end in a dict of tensors, or a split of a data "
            f"set, got {kind_of(data)}: convert it with torch.as_tensor, or put the tensors into a tuple"
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
    time: str | None = None,
    inputs: Sequence[str] = (),
    window: int | None = None,
    every: str | float | None = None,
    columns: Sequence[str] = (),
    drop: Sequence[str] = (),
    kind: Sequence[str] = (),  # or a mapping
    standardize: bool = True,
    header: bool | None = None,
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
        header: whether the first row of a `.csv` names the columns; by default it is found out, and told.
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
    named_columns = Columns(label, id, time, tuple(inputs), window, every, tuple(columns), tuple(drop), header)
    name, source = find(name_or_path, root, download, named_columns, _height_and_width(size), max_gb)
    known = isinstance(name_or_path, str) and name_or_path in NAMED
    arguments: dict[str, Any] = {"name_or_path": name_or_path if known else _absolute(name_or_path)}
    arguments |= {"binarize": binarize} if binarize != "none" else {}
    named: dict[str, Any] = {"label": label, "id": id, "time": time, "inputs": list(inputs) or None}
    named |= {"window": window, "every": every, "max_gb": None if max_gb == 2 else max_gb}
    named |= {"columns": list(columns) or None, "drop": list(drop) or None, "header": header}
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
    shape, parts = x.shape, [x[r] for r in rows]
    location = scale = None
    asked = source.columns if counted is None else None  # what a column of sequences is has no option
    training = parts[0] if counted is None else _by_step(parts[0], counted[rows[0]])
    real = binarize == "none" and not source.as_they_are and _is_real_table(training, asked, kinds, name)
    if real and standardize:
        table = x if counted is None else _by_step(x, counted)
        largest = torch.stack([some.abs().nan_to_num(0.0).amax(0) for some in table.split(CHUNK)]).amax(0)
        source.x = x = table = table[:0]
        location, scale = _standardisation(training, largest, source.columns, name)
        training = training[:0]
        for i, part in enumerate(parts):
            parts[i] = torch.cat([((some - location) / scale).float() for some in part.split(CHUNK)])
        values = "real values standardised per column"
    elif binarize == "static":
        parts = [_bernoulli(part, 3 * seed + i) for i, part in enumerate(parts)]
    elif binarize == "dynamic":
        parts = [parts[0], _bernoulli(parts[1], 1), _bernoulli(parts[2], 2)]

    def make_split(i: int, split_name: str) -> Split:
        log_jacobian: float | Tensor = 0.0 if scale is None else -scale.log().sum().item()
        part, parts[i] = parts[i].float(), parts[i][:0]
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
    low, high = _ends(train)
    if low >= 0 and high <= 1:
        return "real" in kinds.values()
    counts = sum(((some >= 0) & (some == some.round())).sum(0) for some in train.split(CHUNK))
    there = sum((~some.isnan()).sum(0) for some in train.split(CHUNK))
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
        missing = sum(int(some.isnan().sum()) for some in source.x.split(CHUNK))
    told = f", {made:,} cell{'s' if made > 1 else ''} of another kind made gaps" if made else ""
    return told + (f", {missing:,} missing value{'s' if missing > 1 else ''}" if missing else "")


def _ends(x: Tensor) -> tuple[float, float]:
    """The smallest and the largest value that is not missing, looked at in parts, as memory counts."""
    ends = []
    for some in x.split(CHUNK):
        some = some[~some.isnan()] if some.is_floating_point() and bool(some.isnan().any()) else some
        if some.numel():
            ends.append(some.aminmax())
    if not ends:
        return 0.0, 0.0
    return min(float(each.min) for each in ends), max(float(each.max) for each in ends)


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


def _bernoulli(probability: Tensor, seed: int) -> Tensor:
    return torch.bernoulli(probability, generator=torch.Generator().manual_seed(int(seed)))


def _fast_bernoulli(probability: Tensor, generator: torch.Generator) -> Tensor:
    """As `torch.bernoulli`, from 24 random bits per number too, but two numbers per draw of the generator."""
    count = probability.numel()
    words = torch.empty(-(-count // 2), dtype=torch.int64, device=probability.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int32)[:count].view(probability.shape)
    uniform = (bits >> 8).to(probability.dtype)  # on -2^23, ..., 2^23 - 1
    return torch.lt(uniform, probability * 2**24 - 2**23, out=uniform)


def _absolute(path: str | os.PathLike[str]) -> str:
    return str(Path(path).expanduser().absolute())


def _noun(shape: torch.Size, sequences: bool) -> str:
    if sequences:
        return f"sequences of up to {shape[1]} steps, {shape[2]} number{'s' if shape[2] > 1 else ''} each"
    if len(shape) == 2:
        return f"rows of {shape[1]} column{'s' if shape[1] > 1 else ''}"
    _, channels, height, width = shape
    return f"images of {height} x {width} pixels" + (f" in {channels} channels" if channels > 1 else "")
