"""Tables as text, as people have them: encoding, separator, decimal comma and header are found, and told."""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
import statistics
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .base import first_line, number

__all__ = ["MISSING", "Table", "as_column", "is_missing", "read_table"]

MISSING = ("", "na", "n/a", "nan", "null", "none", "?")
SEPARATORS = (",", ";", "\t", "|")
SAMPLE = 200  # lines that the form of a file is told by
DECIMAL_COMMA = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+),\d+")


class Table:
    """A table of a file.

    Attributes:
        frame: a pandas data frame: columns of numbers, and of text, NaN where a cell is missing.
        first: the cells of the first row, where the file has no header.
        said: what was found out, for the description.
    """

    def __init__(
        self, path: Path | str, frame: Any, first: Sequence[str] | None, said: Any, lines: Callable[[], Any]
    ) -> None:
        self.path, self.frame, self.first, self.said, self._lines = path, frame, first, said, lines

    ids: np.ndarray | None = None  # of the rows, where they have names without a column

    @property
    def names(self) -> list[str]:
        return list(self.frame.columns)

    @cached_property
    def lines(self) -> np.ndarray:
        """(rows,), the line of the file that each row is on."""
        return np.asarray(self._lines(), dtype=int)

    def named(self, name: str) -> str | None:
        """The column of that name; where the file has no header, that whose first cell it is."""
        if name in self.frame:
            return name
        if self.first is not None and list(self.first).count(name) == 1:
            return self.names[list(self.first).index(name)]
        return None

    def cells(self, name: str) -> list[str]:
        """A column as text, "" where a cell is missing."""
        column = self.frame[name]
        return ["" if missing else str(cell) for cell, missing in zip(column, column.isna(), strict=True)]


def read_table(path: Path, text: Sequence[str] = (), header: bool | None = None) -> Table:
    """The table in a file.

    Args:
        text: columns to keep as they are written, such as ids.
        header: whether the first row names the columns; found out where it is None.

    Raises:
        ValueError: no table, with file and line.
    """
    import pandas

    content, said = _decoded(path)
    content, comments, named_above = _without_comments(content)
    rows = _sample(content)
    if not rows:
        raise ValueError(f"expected a header row in {path}, got an empty file: write the columns' names first")
    separator, decimal = _form(rows)
    if separator != ",":
        said.append(f"separated by {NAMES.get(separator, repr(separator))}")
    if decimal == ",":
        said.append("decimal commas")
    sample = [_split(row, separator) for row in rows]
    first, names, skipped = sample[0], sample[0], 1
    above = _split(named_above, separator) if named_above else []
    above[:1] = [each.lstrip("# ") or "#" for each in above[:1]]
    if header is None and len(above) == len(first) and _are_alike(first, sample[1:], decimal):
        names, skipped, comments = above, 0, comments - 1  # as numpy.savetxt writes them
    elif header is False or (header is None and _are_alike(first, sample[1:], decimal)):
        names, skipped = [f"column {j + 1}" for j in range(len(first))], 0
        said.append(f"no header, so that the columns are called {names[0]!r} and so on")
    if comments:
        said.append(f"{comments} comment line{'s' if comments > 1 else ''} left out")
    names = [name.strip() for name in names]
    counts, lines = _counted(content, separator)
    _check_rows(path, counts, lines, len(first))
    names, left_out = _named(path, names, sample[skipped:])
    if len(set(names)) < len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"expected distinct column names in the header of {path}, got {repeated} twice: rename them")
    of_text = {name: str for j, name in enumerate(names) if name in text or (skipped == 0 and first[j] in text)}
    try:
        frame = pandas.read_csv(
            io.StringIO(content),
            sep=r"\s+" if separator == " " else separator,
            decimal=decimal,
            header=0 if skipped else None,
            names=names,
            index_col=False,
            dtype=of_text,
            na_values=[*MISSING, *(each.upper() for each in MISSING), *(each.capitalize() for each in MISSING), "NaN"],
            keep_default_na=False,
            skipinitialspace=True,
            low_memory=False,
        )
    except (ValueError, OverflowError, csv.Error) as error:
        raise ValueError(
            f"expected a table in {path}, got something else ({first_line(error)}): export it anew as CSV"
        ) from error
    for name in frame.columns:
        frame[name] = as_column(frame[name], name in of_text, decimal)
    _check_nameless(path, frame, left_out)
    frame = frame.drop(columns=left_out)
    if left_out:
        said.append(
            f"{len(left_out)} nameless column{'s' if len(left_out) > 1 else ''} of row numbers or nothing left out"
        )
    return Table(
        path, frame, first if not skipped else None, tuple((each, "") for each in said), lambda: lines[skipped:]
    )


NAMES = {"\t": "tabs", ";": "semicolons", "|": "bars", " ": "blanks"}


def is_missing(cell: str) -> bool:
    return cell.strip().lower() in MISSING


def _decoded(path: Path) -> tuple[str, list[str]]:
    """The text of a file, and how it was read, where that is not as UTF-8."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(
            f"expected a table in {path}, got a broken archive ({first_line(error)}): pack it anew"
        ) from error
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            try:
                return _lines(data.decode(encoding)), [] if encoding == "utf-8-sig" else ["read as UTF-16"]
            except UnicodeDecodeError:
                break
    if b"\x00" in data:
        raise ValueError(f"expected text in {path}, got a file of bytes: export it as CSV")
    for encoding in ("utf-8", "cp1252"):
        try:
            return _lines(data.decode(encoding)), [] if encoding == "utf-8" else ["read as Windows-1252"]
        except UnicodeDecodeError:
            pass
    return _lines(data.decode("latin-1")), ["read as Latin-1"]


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _without_comments(text: str) -> tuple[str, int, str]:
    """The text with blank lines in the place of those that begin with #, their number, and what the last one before the
    first row says."""
    if "#" not in text or (not text.startswith("#") and "\n#" not in text):
        return text, 0, ""
    lines = text.split("\n")
    at = [i for i, line in enumerate(lines) if line.startswith("#")]
    begin = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    before = [i for i in at if i < begin]
    said = lines[before[-1]] if before else ""
    for i in at:
        lines[i] = ""
    return "\n".join(lines), len(at), said


def _sample(text: str) -> list[str]:
    """The first lines that are not blank, those of a quoted cell together."""
    found: list[str] = []
    start = 0
    while start < len(text) and len(found) < SAMPLE:
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        while text.count('"', start, end) % 2 and end < len(text):
            following = text.find("\n", end + 1)
            end = len(text) if following < 0 else following
        line = text[start:end]
        if line.strip():
            found.append(line)
        start = end + 1
    return found


def _split(line: str, separator: str) -> list[str]:
    if separator == " ":
        return line.split()
    try:
        row = next(csv.reader(io.StringIO(line), delimiter=separator, skipinitialspace=True), [])
    except csv.Error:
        row = line.split(separator)
    return [cell.strip() for cell in row]


def _form(rows: Sequence[str]) -> tuple[str, str]:
    """Separator and decimal mark: those by which all rows have as many cells, and most of them are numbers."""
    found = []
    for order, separator in enumerate((*SEPARATORS, " ")):
        sample = [_split(row, separator) for row in rows]
        width = len(sample[0])
        if width < 2 or any(len(row) != width for row in sample):
            continue
        below = [cell for row in sample[1:] or sample for cell in row]
        for decimal in (".", ","):
            if decimal == "," and not any(DECIMAL_COMMA.fullmatch(cell) for cell in below):
                continue
            known = sum(_kind(cell, decimal) != "word" for cell in below) / max(1, len(below))
            found.append((known, decimal == ".", -order, separator, decimal))
    if found:
        _, _, _, separator, decimal = max(found)
        return separator, decimal
    if len(rows) > 1 and all(DECIMAL_COMMA.fullmatch(row.strip()) for row in rows[1:]):  # one column
        return ";", ","
    widths = {separator: [len(_split(row, separator)) for row in rows] for separator in SEPARATORS}
    commonest = {separator: statistics.mode(each) for separator, each in widths.items()}
    ragged = [separator for separator in SEPARATORS if commonest[separator] > 1]  # the odd line is told afterwards
    return max(ragged, key=lambda separator: widths[separator].count(commonest[separator]), default=","), "."


def _reader(decimal: str) -> Callable[[str], float]:
    """A cell's value. Beside decimal commas a point separates thousands, and only before a comma: "1.234" alone may be
    either number, and "01.02.2024" is none."""
    if decimal == ".":
        return number

    def read(cell: str) -> float:
        if DECIMAL_COMMA.fullmatch(cell):
            return number(cell.replace(".", "").replace(",", "."))
        return math.nan if "." in cell else number(cell)

    return read


def _kind(cell: str, decimal: str = ".") -> str:
    if is_missing(cell):
        return "missing"
    if not math.isnan(_reader(decimal)(cell)):
        return "number"
    try:
        datetime.fromisoformat(cell)
        return "date"
    except ValueError:
        return "word"


def _are_alike(first: Sequence[str], rows: Sequence[Sequence[str]], decimal: str) -> bool:
    """Whether the first row is one like the others, and names no columns."""
    kinds = [_kind(cell, decimal) for cell in first]
    if not {"number", "date"} & {*kinds} or not rows:
        return False
    for j, (cell, kind) in enumerate(zip(first, kinds, strict=True)):
        below = [row[j] for row in rows if j < len(row)]
        of_column = [_kind(each, decimal) for each in below]
        if kind == "missing":
            continue
        if kind == "word" and cell not in below:
            return False
        if kind != "word" and kind not in of_column and {*of_column} != {"missing"}:
            return False
    return True


def _counted(text: str, separator: str) -> tuple[np.ndarray, np.ndarray]:
    """How many cells each row has, and the line that it is on."""
    if separator == " " or '"' in text:
        if separator == " ":
            rows = [(len(line.split()), i) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        else:
            reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
            try:
                rows = [(len(row), reader.line_num) for row in reader if row and (len(row) > 1 or row[0].strip())]
            except csv.Error:
                return np.empty(0, dtype=int), np.empty(0, dtype=int)
        return np.array([n for n, _ in rows], dtype=int), np.array([line for _, line in rows], dtype=int)
    data = np.frombuffer(text.encode("utf-8") + b"\n", dtype=np.uint8)
    ends = np.flatnonzero(data == 10)
    starts = np.concatenate([[0], ends[:-1] + 1])
    counts = np.add.reduceat(data == ord(separator), starts, dtype=np.int64) + 1
    blank = data <= 32 if separator != "\t" else (data == 10) | (data == 32)
    there = np.add.reduceat(~blank, starts, dtype=np.int64) > 0
    return counts[there], np.flatnonzero(there) + 1


def _check_rows(path: Path, counts: np.ndarray, lines: np.ndarray, width: int) -> None:
    wrong = np.flatnonzero(counts != width)
    if len(wrong):
        raise ValueError(
            f"expected {width} cells in line {lines[wrong[0]]} of {path}, got {counts[wrong[0]]}: mend that line"
        )


def _named(path: Path, names: list[str], sample: Sequence[Sequence[str]]) -> tuple[list[str], list[str]]:
    """The columns' names, and those of nameless columns that only number the rows, or are empty."""
    left_out = []
    for j, name in enumerate(names):
        if name:
            continue
        cells = [row[j] for row in sample]
        numbers = [number(cell) for cell in cells]
        counted = all(b - a == 1 for a, b in zip(numbers, numbers[1:], strict=False)) and numbers[:1] in ([0.0], [1.0])
        if not (counted or all(map(is_missing, cells))):
            raise ValueError(
                f"expected a name for every column of {path}, got none for column {j + 1}: name it in the header"
            )
        names[j] = f"column {j + 1}"
        left_out.append(names[j])
    return names, left_out


def _check_nameless(path: Path, frame: Any, names: Sequence[str]) -> None:
    """Raises ValueError where a nameless column holds something after the rows that its form was told by."""
    for name in names:
        cells = frame[name]
        counts = cells.dtype.kind == "f" and bool((cells.diff().iloc[1:] == 1).all())
        if not (counts or bool(cells.isna().all())):
            raise ValueError(f"expected a name for every column of {path}, got none for {name}: name it in the header")


def as_column(column: Any, as_text: bool, decimal: str) -> Any:
    """Numbers where all cells are; true and false as 1 and 0; text without blanks around it."""
    import pandas

    if column.dtype == bool:
        return column.astype(str) if as_text else column.astype(np.float64)
    if column.dtype.kind in "iuf" and not as_text:
        return column.astype(np.float64)
    cells = [None if gap else str(cell).strip() for cell, gap in zip(column, column.isna(), strict=True)]
    cells = [None if cell is None or is_missing(cell) else cell for cell in cells]
    words, given = {"true": 1.0, "false": 0.0}, [cell for cell in cells if cell is not None]
    value = words.__getitem__ if given and all(cell.lower() in words for cell in given) else _reader(decimal)
    numbers = [np.nan if cell is None else value(cell.lower()) for cell in cells]
    is_text = as_text or any(math.isnan(each) and cell is not None for cell, each in zip(cells, numbers, strict=True))
    return pandas.Series(cells if is_text else numbers, index=column.index, dtype=object if is_text else np.float64)
