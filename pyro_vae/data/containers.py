"""The one form in which data reach a model: `Data`, and the splits of a data set.

Every random choice comes from a `torch.Generator` with a fixed seed: the global generators are neither read nor moved.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from ..sources import is_frame, kind_of
from ..sources.times import padded
from .schema import Choice, Schema, Span

__all__ = [
    "Data",
    "Dataset",
    "Split",
    "as_data",
    "bernoulli",
    "columns_of",
    "joined",
    "like_columns",
    "rows_of",
    "spans_of",
    "tensor_of",
]

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
        schema: what is known of the data set, in whose units x is.
        latents: (N, T, Z), the true z of simulated sequences, or None; never shown to a model.
        times: (N, T), numbers or dates (datetime64) of the steps of a `.csv` of sequences, or None.
        parts: (N,), of data that were read for a run: the split that each datum was in at its training, "test" of those
            that it has not seen; else None.
        checksums: (N,), of the rows, by which a run knows what it was trained on.
    """

    name: str = "train"
    binarize: Literal["dynamic"] | None = None
    ids: np.ndarray | None = None
    schema: Schema | None = None
    latents: Tensor | None = None
    times: np.ndarray | None = None
    parts: np.ndarray | None = None
    checksums: np.ndarray | None = None

    @property
    def source(self) -> dict[str, Any] | None:
        """The arguments of `load_dataset` that are not defaults, with absolute paths: it can be called again."""
        return self.roles if "name_or_path" in self.roles else None

    @property
    def roles(self) -> dict[str, Any]:
        """The options of `load_dataset` that the data were read with, such as the columns of ids and times."""
        return {} if self.schema is None else dict(self.schema.source)

    @property
    def x(self) -> Tensor:
        """(N, *event_shape), float32, as stored: the intensities where `binarize` is "dynamic"."""
        return self.args[0]

    @cached_property
    def observed(self) -> Tensor:
        """(N, *event_shape), what a model can score: x, or one fixed draw of it, the same on every device."""
        return self.x if self.binarize is None else bernoulli(self.x.cpu(), seed=0).to(self.device)

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
        schema: the record of it, which a run keeps; None of splits that are put together by hand.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    event_shape: torch.Size
    schema: Schema | None = None

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split.name} {len(split):,}" for split in (self.train, self.valid, self.test))
        return f"Dataset({self.name}: {self.description}; {sizes})"

    def to(self, device: torch.device | str) -> Dataset:
        """The same data set with all three splits on `device`."""
        return replace(self, train=self.train.to(device), valid=self.valid.to(device), test=self.test.to(device))

    @property
    def description(self) -> str:
        """One sentence on the data."""
        return "" if self.schema is None else self.schema.description

    @property
    def location(self) -> Tensor | None:
        """(D,), float64, in original units: the columns of a real-valued table were standardised to
        (x - location) / scale, with the training split's mean and (1/N) standard deviation; None elsewhere."""
        return None if self.schema is None else self.schema.location

    @property
    def scale(self) -> Tensor | None:
        """(D,), float64, as `location`."""
        return None if self.schema is None else self.schema.scale

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The names of a table's columns, or None."""
        return None if self.schema is None else self.schema.names

    @property
    def classes(self) -> tuple[str, ...] | None:
        """What the labels 0, 1, ... stand for, where the source names its classes; else None."""
        return None if self.schema is None else self.schema.classes

    def with_choices(self, *choices: Choice) -> Dataset:
        """The same data set, in whose record further choices stand.

        Args:
            choices: what has been chosen by the data, such as the likelihood.
        """
        assert self.schema is not None
        schema = replace(self.schema, choices=(*self.schema.choices, *choices))
        train, valid, test = (replace(split, schema=schema) for split in (self.train, self.valid, self.test))
        return replace(self, train=train, valid=valid, test=test, schema=schema)

    @property
    def sequences(self) -> bool:
        """Whether each datum is a sequence."""
        return "lengths" in self.train.kwargs

    @property
    def has_missing_entries(self) -> bool:
        """Whether some values of a step are missing and others are not."""
        return any(bool((s.counted.any(-1) & ~s.counted.all(-1)).any()) for s in (self.train, self.valid, self.test))

    def restore(self, x: Tensor) -> Tensor:
        """`Schema.restore`: x (..., D) in the original units of a table."""
        return x if self.schema is None else self.schema.restore(x)


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

    log_jacobians = [torch.as_tensor(split.log_jacobian, dtype=torch.float64).expand(len(split)) for split in splits]
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
        parts=None,
        checksums=np.concatenate(known("checksums")) if known("checksums") else None,
        binarize=None,
        name="all",
    )
    if whole.ids is None:
        return whole
    ids = whole.ids
    with contextlib.suppress(ValueError):  # "9" before "10"
        ids = ids.astype(float)
    begins = np.zeros(len(ids)) if whole.times is None else whole.times[:, 0]  # of pieces of one series
    return rows_of(whole, np.lexsort((begins, ids)).tolist())


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
        parts=None if split.parts is None else split.parts[rows],
        checksums=None if split.checksums is None else split.checksums[rows],
    )


def as_data(data: Any, *programs: Any) -> Data:
    """The data that `data` stands for.

    Args:
        data: a tensor (N, ...), a NumPy array or a pandas frame of numbers; a tuple of such, optionally ending in a
            dict of those by keyword; or `Data`, such as a split of a data set, which is returned as it is.
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


def spans_of(split: Split) -> list[Span]:
    """The id of each sequence, and its first and last time; of data without times none.

    Args:
        split: of sequences.
    """
    if split.times is None:
        return []
    names = split.ids if "id" in split.roles and split.ids is not None else [""] * len(split)
    times = split.times.astype("datetime64[us]").astype(np.int64) if split.times.dtype.kind == "M" else split.times
    ends = times[np.arange(len(split)), split.kwargs["lengths"].cpu().numpy() - 1]
    return [(str(name), a, b) for name, a, b in zip(names, times[:, 0].tolist(), ends.tolist(), strict=True)]


def columns_of(data: Any) -> tuple[str, ...] | None:
    """The names of the columns of a pandas frame, or None.

    Args:
        data: a frame, alone or first in a tuple; anything else has no names.

    Raises:
        ValueError: two columns of one name.
    """
    first = data[0] if isinstance(data, tuple) and data else data
    if not is_frame(first):
        return None
    names = tuple(str(name) for name in first.columns)
    if len({*names}) < len(names):
        raise ValueError(f"expected distinct column names in the frame, got {list(names)}: rename them")
    return names


def like_columns(train: Any, other: Any) -> Any:
    """A frame with the columns of the one that is trained on, by their names; all else as it is.

    Args:
        train: what is trained on, a frame, or a tuple that begins with one.
        other: what is to be like it.

    Raises:
        ValueError: columns that are missing.
    """
    if isinstance(train, tuple) and isinstance(other, tuple) and train and other:
        return (like_columns(train[0], other[0]), *other[1:])
    names = columns_of(train)
    if names is None or not is_frame(other):
        return other
    if absent := [name for name in train.columns if name not in other.columns]:
        raise ValueError(
            f"expected the columns of the training, {', '.join(names)}, in the validation frame, got none called "
            f"{', '.join(map(repr, absent))}: add them"
        )
    return other[list(train.columns)]


def tensor_of(value: Any) -> Any:
    """A NumPy array, or a pandas frame or series, as a tensor; all else as it is.

    Args:
        value: anything; what a mask hides becomes NaN.

    Raises:
        ValueError: columns or cells that are no numbers.
    """
    is_series = kind_of(value).startswith("pandas.") and type(value).__name__ == "Series"
    if not (isinstance(value, np.ndarray) or is_frame(value) or is_series):
        return value
    if is_frame(value):
        words = [str(name) for name, column in value.items() if column.dtype.kind not in "biuf"]
        if words:
            raise ValueError(
                f"expected numbers in every column of the frame, got others in {', '.join(map(repr, words[:10]))}: "
                "drop them, or let load_dataset(frame, label=...) read it"
            )
    if isinstance(value, np.ma.MaskedArray):
        value = np.ma.filled(value.astype(np.float64), np.nan)
    if is_series and value.dtype.kind not in "biuf":
        raise ValueError(f"expected a series of numbers, got {value.dtype}: convert it")
    array = value if isinstance(value, np.ndarray) else value.to_numpy(dtype=np.float64, na_value=np.nan)
    array = array.astype(np.float64) if array.dtype.kind == "f" and array.dtype.itemsize > 8 else array
    array = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind not in "biufc":
        raise ValueError(f"expected an array of numbers, got dtype {array.dtype}: convert with array.astype('float32')")
    wide = array.dtype in (np.uint16, np.uint32, np.uint64)
    return torch.from_numpy(np.require(array.astype(np.int64) if wide else array, requirements=["C", "W"]))


def _as_data(data: Any) -> Data:
    if isinstance(data, Data):
        return data
    data = tensor_of(data)
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
        named = {name: tensor_of(each) for name, each in data[-1].items()}
        return Data(tuple(map(tensor_of, data[:-1])), named)
    return Data(tuple(map(tensor_of, data)))


def bernoulli(probability: Tensor, seed: int) -> Tensor:
    return torch.bernoulli(probability, generator=torch.Generator().manual_seed(int(seed)))


def _fast_bernoulli(probability: Tensor, generator: torch.Generator) -> Tensor:
    """As `torch.bernoulli`, from 24 random bits per number too, but two numbers per draw of the generator."""
    count = probability.numel()
    words = torch.empty(-(-count // 2), dtype=torch.int64, device=probability.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int32)[:count].view(probability.shape)
    uniform = (bits >> 8).to(probability.dtype)  # on -2^23, ..., 2^23 - 1
    return torch.lt(uniform, probability * 2**24 - 2**23, out=uniform)
