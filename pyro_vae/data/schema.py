"""What a run knows of its data: the columns and their units, shapes, choices, and the rows that it was trained on."""

from __future__ import annotations

import functools
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from ..sources import Choice

__all__ = ["KINDS", "Choice", "Column", "Kind", "Schema", "SchemaWarning", "row_checksums"]

Kind = Literal["real", "count", "binary"]
KINDS = ("real", "count", "binary")
VERSION = 1
CELLS = 1_000_000  # that are looked at together
PARTS = ("train", "valid", "test")
Span = tuple[str, float, float]  # an id, and the first and last time


@functools.cache
def _versions() -> Mapping[str, str]:
    return {"python": platform.python_version(), **dict(_installed(("pyro_vae", "pyro-ppl", "torch", "pandas")))}


def _installed(packages: Iterable[str]) -> Iterable[tuple[str, str]]:
    for package in packages:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue


class SchemaWarning(UserWarning):
    """What was assumed of data that are not quite those of the training."""


@dataclass(frozen=True)
class Column:
    """A column of a table, or one number of each step of sequences: the model sees ``(x - location) / scale``.

    Attributes:
        name: None where the source has no names.
        kind: what the training rows hold.
        location, scale: in original units; 0 and 1 where values stay as they are.
    """

    name: str | None
    kind: Kind
    location: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True, eq=False, repr=False)
class Schema:
    """The record of a data set, which a run keeps as ``schema.json``.

    Args:
        name: the data set's name.
        event_shape: of one datum; of one step of a sequence.
        columns: of a table or of the steps of sequences; None of pictures.
        divisor: the model sees ``x / divisor``, as of pictures of eight bits.
        sequences: whether each datum is a sequence.
        num_steps: the median length of the training sequences, or None.
        missing: whether some values are missing.
        binarize: how intensities are made 0 or 1.
        classes: what the labels 0, 1, ... stand for, or None.
        source: the arguments of `load_dataset` that the data were read with, columns of labels, ids, times and inputs
            among them, and `name_or_path` where they lead to the data again.
        summary: how many data of which kind there are.
        choices: what was found out of the data, and chosen by it.
        checksums: of the rows of each split, uint64, in the split's order.
        spans: of sequences with times, the id, first and last time of each, by which they are known when they have
            grown or changed; dates in microseconds since 1970.
        versions: of the packages that wrote it.

    Example:
        >>> from pyro_vae import load_dataset
        >>> schema = load_dataset("digits").train.schema
        >>> schema
        Schema(digits: (1, 8, 8); train 1,297, valid 250, test 250)
        >>> Schema.from_json(schema.to_json()).event_shape
        (1, 8, 8)
    """

    name: str
    event_shape: tuple[int, ...]
    columns: tuple[Column, ...] | None = None
    divisor: float = 1.0
    sequences: bool = False
    num_steps: int | None = None
    missing: bool = False
    binarize: str = "none"
    classes: tuple[str, ...] | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""
    choices: tuple[Choice, ...] = ()
    checksums: Mapping[str, np.ndarray] = field(default_factory=dict)
    spans: Mapping[str, list[Span]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=_versions)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{part} {len(rows):,}" for part, rows in self.checksums.items())
        return f"Schema({self.name}: {self.names or self.event_shape}; {sizes})"

    @property
    def description(self) -> str:
        """One sentence on the data."""
        return ", ".join(filter(None, (self.summary, *(choice.what for choice in self.choices))))

    @property
    def names(self) -> tuple[str, ...] | None:
        """The names of the columns; None where they have none."""
        if self.columns is None or any(column.name is None for column in self.columns):
            return None
        return tuple(str(column.name) for column in self.columns)

    @cached_property
    def location(self) -> Tensor | None:
        """(D,), float64; None where values are not standardised."""
        return None if self._as_they_are else self._of_columns("location")

    @cached_property
    def scale(self) -> Tensor | None:
        """(D,), float64; None where values are not standardised."""
        return None if self._as_they_are else self._of_columns("scale")

    def _of_columns(self, name: str) -> Tensor:
        return torch.tensor([getattr(column, name) for column in self.columns or ()], dtype=torch.float64)

    @property
    def _as_they_are(self) -> bool:
        return all(column.location == 0 and column.scale == 1 for column in self.columns or ())

    def convert(self, x: Tensor) -> Tensor:
        """What the model sees, float32.

        Args:
            x: (..., *event_shape), in original units.
        """
        if self.location is None or self.scale is None:
            return x.float() if self.divisor == 1 else x.float() / self.divisor
        flat = x.reshape(-1, x.shape[-1])
        some = max(1, CELLS // max(1, flat.shape[1]))
        parts = [((rows.double() - self.location) / self.scale).float() for rows in flat.split(some)]
        return torch.cat(parts).reshape(x.shape)

    def restore(self, x: Any) -> Tensor:
        """``scale x + location``, in x's dtype and on its device: the original units of a table. What was divided, as
        intensities of pictures, stays so.

        Args:
            x: (..., D), what the model draws or sees; ``x.double()`` where the location is far from zero.
        """
        x = torch.as_tensor(x)
        if self.location is None or self.scale is None:
            return x
        return (self.scale * x.cpu() + self.location).to(dtype=x.dtype).to(x.device)

    def to_table(self) -> dict[str, Any]:
        """Numbers, strings, lists and tables, as ``schema.json`` has them; checksums as hexadecimal numbers."""
        source = dict(self.source)
        return {
            "version": VERSION,
            "name": self.name,
            "summary": self.summary,
            "event_shape": list(self.event_shape),
            "columns": self.columns and [vars(column) for column in self.columns],
            **{name: getattr(self, name) for name in ("divisor", "sequences", "num_steps", "missing", "binarize")},
            "classes": self.classes and list(self.classes),
            **{name: source.get(name) for name in ("label", "id", "time", "inputs", "window", "every")},
            "source": source,
            "choices": [vars(choice) for choice in self.choices],
            "versions": dict(self.versions),
            "spans": {part: [list(span) for span in spans] for part, spans in self.spans.items()},
            "checksums": {part: [f"{row:016x}" for row in rows.tolist()] for part, rows in self.checksums.items()},
        }

    @classmethod
    def from_table(cls, table: Any, where: str = "the schema") -> Self:
        """What `to_table` wrote, also by an earlier version.

        Args:
            table: that table.
            where: where it comes from, for messages.

        Raises:
            ValueError: a foreign or a later one.
        """
        version = table.get("version") if isinstance(table, Mapping) else None
        if isinstance(version, int) and version > VERSION:
            raise ValueError(f"expected version {VERSION} or before in {where}, got {version}: update pyro_vae")
        try:
            if version != VERSION:
                raise ValueError(f"version {version!r}")
            columns = table["columns"] and tuple(Column(**column) for column in table["columns"])
            schema = cls(
                name=table["name"],
                event_shape=tuple(map(int, table["event_shape"])),
                columns=columns,
                **{name: table[name] for name in ("divisor", "sequences", "num_steps", "missing", "binarize")},
                classes=table["classes"] and tuple(table["classes"]),
                source=table["source"],
                summary=table["summary"],
                choices=tuple(Choice(**choice) for choice in table["choices"]),
                checksums={
                    part: np.array([int(row, 16) for row in rows], dtype=np.uint64)
                    for part, rows in table["checksums"].items()
                },
                spans={part: [(i, a, b) for i, a, b in spans] for part, spans in table["spans"].items()},
                versions=table["versions"],
            )
            for column in schema.columns or ():
                if column.kind not in KINDS or not np.isfinite(column.location) or not column.scale > 0:
                    raise ValueError(f"{column}")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"expected the record of a data set in {where}, got something else ({error!r}): take that of a run"
            ) from None
        return schema

    def state_dict(self) -> dict[str, Any]:
        """The table without checksums, and these as tensors, for `checkpoint.save`."""
        sums = {part: torch.from_numpy(rows.view(np.int64)) for part, rows in self.checksums.items()}
        return {"table": replace(self, checksums={}).to_table(), "checksums": sums}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], where: str) -> Self:
        """What `state_dict` gave.

        Args:
            state: that table with tensors.
            where: where it comes from, for messages.

        Raises:
            ValueError: foreign content, or a later version's.
        """
        if not isinstance(state, Mapping) or not {"table", "checksums"} <= state.keys():
            raise ValueError(f"expected the record of a data set in {where}, got something else: use another run")
        schema = cls.from_table(state["table"], where)
        return replace(
            schema, checksums={part: rows.numpy().view(np.uint64) for part, rows in state["checksums"].items()}
        )

    def to_json(self) -> str:
        """The text of ``schema.json``."""
        return json.dumps(self.to_table(), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "the schema") -> Self:
        """What `to_json` wrote.

        Args:
            text: that text.
            where: where it comes from, for messages.

        Raises:
            ValueError: foreign text, or a later version's.
        """
        try:
            table = json.loads(text)
        except ValueError as error:
            raise ValueError(f"expected JSON in {where}, got something else ({error}): take that of a run") from None
        return cls.from_table(table, where)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """The record in a file.

        Args:
            path: such as the ``schema.json`` of a run.

        Raises:
            FileNotFoundError: no such file. ValueError: a foreign file, or a later version's.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"expected a run's schema.json at {path}, found none: name one")
        try:
            return cls.from_json(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise ValueError(f"expected JSON in {path}, got something else ({error}): take that of a run") from None

    @classmethod
    def of_tensors(cls, splits: Mapping[str, Sequence[Tensor]], columns: Sequence[str] | None = None) -> Self:
        """The record of tensors that come without one: their shape, and the checksums of their rows.

        Args:
            splits: for "train", and "valid" if there is one, tensors (N, ...) that belong together.
            columns: the names of the columns of the first, or None.
        """
        x = splits["train"][0]
        named = None if columns is None else tuple(Column(name, "real") for name in columns)
        sums = {part: row_checksums(*tensors) for part, tensors in splits.items()}
        missing = x.is_floating_point() and bool(x.isnan().any())
        return cls("tensors", tuple(x.shape[1:]), named, missing=missing, checksums=sums)

    def others(self, train: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """The checksums of the rows that are left when others are taken away: of rows that are alike as many are.

        Args:
            train, valid: (N,), checksums of the rows to take away.
        """
        taken = Counter([*train.tolist(), *valid.tolist()])
        left: list[int] = []
        for part in PARTS:
            kept = []
            for row in self.checksums.get(part, np.empty(0, np.uint64)).tolist():
                if taken[row]:
                    taken[row] -= 1
                else:
                    kept.append(row)
            left = kept + left  # the test rows first
        return np.array(left, dtype=np.uint64)

    def parts_of(self, checksums: np.ndarray) -> np.ndarray:
        """(N,), the split that each row was in, "" for rows that are new. Of rows that are alike as many count as
        were, of the training first; further copies of one that was trained on are of the training, too."""
        values, of_row, counts = np.unique(checksums, return_inverse=True, return_counts=True)
        order = np.argsort(of_row, kind="stable")
        copy = np.empty(len(checksums), dtype=int)  # which of the rows that are alike
        copy[order] = np.arange(len(checksums)) - np.repeat(np.cumsum(counts) - counts, counts)
        known = []
        for part in PARTS:
            rows = np.sort(self.checksums.get(part, np.empty(0, np.uint64)))
            known.append(np.searchsorted(rows, values, "right") - np.searchsorted(rows, values, "left"))
        train, valid, test = (each[of_row] for each in known)
        further = np.select([train > 0, valid > 0], ["train", "valid"], "")
        ends = np.cumsum([train, valid, test], axis=0)
        return np.select([copy < end for end in ends], PARTS, further)

    def parts_of_spans(self, found: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
        """`parts_of` sequences, where those that have grown or changed are known by the id and the time that they begin
        at: of the recorded ones of that id, the last that begins no later and has not ended."""
        recorded: dict[str, list[tuple[float, float, str]]] = {}
        for part, its in self.spans.items():
            for name, begin, end in its:
                recorded.setdefault(name, []).append((begin, end, part))
        parts = found.copy()
        for i in np.flatnonzero(found == "").tolist() if spans else ():
            name, begin, _ = spans[i]
            open_then = [each for each in recorded.get(name, []) if each[0] <= begin <= each[1]]
            parts[i] = max(open_then)[2] if open_then else ""
        return parts


def row_checksums(*tensors: Tensor) -> np.ndarray:
    """(N,), uint64, of the rows of tensors (N, ...) taken together: as float64, NaN alike, zeros at the end as none."""
    found = np.zeros(len(tensors[0]), dtype=np.uint64)
    for place, tensor in enumerate(tensors):
        flat = tensor.detach().cpu().reshape(len(tensor), -1)
        keys = _mixed(np.arange(1, flat.shape[1] + 1, dtype=np.uint64) + np.uint64(place << 48)) | np.uint64(1)
        some = max(1, CELLS // max(1, flat.shape[1]))
        for begin in range(0, len(flat), some):
            values = flat[begin : begin + some].double().numpy() + 0.0  # -0.0 is 0.0
            cells = values.view(np.uint64)
            cells[np.isnan(values)] = 0x7FF8000000000000
            cells ^= cells >> np.uint64(32)
            cells *= np.uint64(0x9E3779B97F4A7C15)
            cells ^= cells >> np.uint64(32)
            found[begin : begin + some] += cells @ keys
    return _mixed(found)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Numbers of 64 bits, each of which hangs on all bits of its own (the finaliser of splitmix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
