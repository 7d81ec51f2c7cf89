"""Tables that are in memory already: pandas frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .base import kind_of, number
from .tables import Table, as_column

__all__ = ["is_frame", "of_frame"]


def is_frame(value: object) -> bool:
    """Whether the value is a pandas frame, looked at without importing pandas."""
    return kind_of(value).startswith("pandas.") and type(value).__name__ == "DataFrame"


def _column(column: Any, as_text: bool) -> Any:
    if as_text:
        import pandas

        cells = [None if gap else str(cell) for cell, gap in zip(column, column.isna(), strict=True)]
        return pandas.Series(cells, dtype=object)
    if column.dtype in (np.dtype(np.int64), np.dtype(np.uint64)):
        return column  # as double precision may not tell them apart
    return column.astype(np.float64) if column.dtype.kind in "iuf" else as_column(column, False, number)


def of_frame(frame: Any, text: Sequence[str | None] = ()) -> Table:
    """A frame as a table in a file would be: numbers as float64, all else and the columns of `text` as text, those that
    are of its index among them, and the index, where it is none of pandas' own numbers, as ids.

    Raises:
        ValueError: columns of one name.
    """
    import pandas

    wanted = {*text} - {str(name) for name in frame.columns}
    asked = [level for level in frame.index.names if level is not None and str(level) in wanted]
    frame = frame.reset_index(level=asked) if asked else frame
    names = [str(name) for name in frame.columns]
    if len({*names}) < len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"expected distinct column names in the frame, got {repeated} twice: rename them")
    rows = frame.reset_index(drop=True)
    columns = {name: _column(rows.iloc[:, j], name in text) for j, name in enumerate(names)}
    table = Table("the frame", pandas.DataFrame(columns), None, (), np.arange(len(rows)), number)
    if not (isinstance(frame.index, pandas.RangeIndex) and frame.index.start == 0 and frame.index.step == 1):
        table.ids = np.array([str(each) for each in frame.index])
    return table
