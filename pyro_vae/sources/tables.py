"""Tables as text, as people have them: encoding, separator, decimal comma and header are found, and told."""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
import statistics
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from .base import first_line, number

__all__ = ["MISSING", "Table", "as_column", "is_missing", "read_table"]

MISSING = ("", "na", "n/a", "nan", "null", "none", "?")
ABSENT = [*MISSING, *(each.upper() for each in MISSING), *(each.capitalize() for each in MISSING), "NaN"]
SEPARATORS = (",", ";", "\t", "|")
SAMPLE = 200  # lines that the form of a file is told by
LARGE = 5 << 20  # bytes from which on pandas reads a file in several threads, if it is given its path
CHUNK = 1 << 18  # bytes that are looked at together, few enough for the processor's cache
ROWS = 2_000  # that are looked at together, likewise
BREAK, RETURN, TAB, BLANK, QUOTE = b'\n\r\t "'
DECIMAL_COMMA = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+),\d+([eE][+-]?\d+)?")
EITHER = re.compile(r"[+-]?[1-9]\d{0,2}[,.]\d{3}")  # 1,234 is 1234 to some, and 1.234 to others
IN_GROUPS = re.compile(r"[+-]?[1-9]\d{0,2}(\.\d{3})+")
WHOLE = re.compile(r"[+-]?\d{1,3}")
THOUSANDS = ",.' "
SEPARATOR_LINE = re.compile(rb'"?sep=(.)"?\n')  # as Excel writes above a table


Said = tuple[tuple[str, str], ...]


class Table:
    """A table of a file.

    Attributes:
        frame: a pandas data frame: columns of numbers, and of text, NaN where a cell is missing.
        first: the cells of the first row, where the file has no header.
        said: what was found out, for the description, and the option that changes it.
        lines: (rows,), the line of the file that each row is on.
    """

    def __init__(
        self,
        path: Path | str,
        frame: Any,
        first: Sequence[str] | None,
        said: Said,
        lines: np.ndarray,
        value: Callable[[str], float],
    ) -> None:
        self.path, self.frame, self.first, self.said, self.lines = path, frame, first, said, lines
        self.value = value  # of a cell

    ids: np.ndarray | None = None  # of the rows, where they have names without a column

    @property
    def names(self) -> list[str]:
        return list(self.frame.columns)

    def named(self, name: str) -> str | None:
        """The column of that name; where the file has no header, that whose first cell it is."""
        if name in self.frame:
            return name
        if f"'{name}" in self.frame:  # as written for spreadsheets, which would run it
            return f"'{name}"
        if self.first is not None and list(self.first).count(name) == 1:
            return self.names[list(self.first).index(name)]
        return None

    def row_of_word(self, name: str) -> int | None:
        """The first row whose cell in a column is no number."""
        if self.frame[name].dtype.kind in "fiu":
            return None
        cells = enumerate(self.frame[name])
        return next((i for i, cell in cells if isinstance(cell, str) and math.isnan(self.value(cell))), None)

    def numbers(self, names: Sequence[str]) -> np.ndarray:
        """(rows, columns), the values of columns without words, NaN where a cell is missing."""
        columns = [self.frame[name] for name in names]
        for j, column in enumerate(columns):
            if column.dtype.kind not in "fiu":  # numbers that are kept as they are written
                columns[j] = column.map(self.value, na_action="ignore").astype(np.float64)
        values = np.empty((len(self.frame), len(names)))
        arrays = [column.to_numpy() for column in columns]
        for at in range(0, len(values), ROWS):  # as pandas' own way takes the memory twice
            for j, array in enumerate(arrays):
                values[at : at + ROWS, j] = array[at : at + ROWS]
        return values

    def cells(self, name: str) -> list[str]:
        """A column as text, "" where a cell is missing."""
        column = self.frame[name]
        return ["" if missing else str(cell) for cell, missing in zip(column, column.isna(), strict=True)]


def read_table(
    path: Path,
    text: Sequence[str] = (),
    header: bool | None = None,
    *,
    separator: str | None = None,
    decimal: str | None = None,
    encoding: str | None = None,
    comment: str | None = None,
    thousands: str | None = None,
    as_written: Sequence[str] = (),
) -> Table:
    """The table in a file.

    Args:
        text: columns to keep as they are written, such as ids.
        header: whether the first row names the columns. This and what follows is found out where it is None.
        separator: the sign between cells, or its name, such as "tab".
        decimal: "." or ",".
        encoding: as Python calls it, such as "cp1252".
        comment: what lines begin with that are no rows; "" where all lines are.
        thousands: the mark between groups of three digits, such as ",".
        as_written: those columns of `text` in which "NA" and its like are words, as in names of countries.

    Raises:
        ValueError: no table, with file and line; an option that cannot be used.
    """
    _check_options(decimal, encoding, comment, thousands)
    given = {"header": header, "separator": separator, "decimal": decimal, "encoding": encoding, "comment": comment}
    separator = None if separator is None else _sign(separator)
    if decimal is None and thousands in (",", "."):
        decimal = {",": ".", ".": ","}[thousands]
    said: list[tuple[str, str]] = []
    state, data = _state(path), path.read_bytes()
    content, read_as = _decoded(path, data, encoding)
    if read_as:
        said.append((f"read as {read_as}", "encoding"))
    if named_sign := SEPARATOR_LINE.match(content):
        separator = separator or named_sign[1].decode()
        content = b"\n" + content[named_sign.end() :]
    content, comments, named_above = _without_comments(content, "#" if comment is None else comment)
    rows = _sample(content)
    if not rows:
        raise ValueError(f"expected a header row in {path}, got an empty file: write the columns' names first")
    separator, mark = _form(rows, separator, decimal, thousands)
    is_guess, decimal, value = decimal is None, mark, _reader(mark, thousands)
    if is_guess:
        _check_certain(path, [_split(row, separator) for row in rows[1:] or rows], mark, content, separator)
    if separator != ",":
        said.append((f"separated by {NAMES.get(separator, repr(separator))}", "separator"))
    if decimal == ",":
        said.append(("decimal commas", "decimal"))
    sample = [_split(row, separator) for row in rows]
    first, names, skipped = sample[0], sample[0], 1
    above = _split(named_above, separator) if named_above else []
    above[:1] = [each.lstrip(f"{comment or '#'} ") or "#" for each in above[:1]]
    if header is None and len(above) == len(first) and _are_alike(first, sample[1:], value):
        names, skipped, comments = above, 0, comments - 1  # as numpy.savetxt writes them
    elif header is False or (header is None and _are_alike(first, sample[1:], value)):
        names, skipped = [f"column {j + 1}" for j in range(len(first))], 0
        said.append((f"no header, so that the columns are called {names[0]!r} and so on", "header"))
    if comments:
        said.append((f"{_counted_as(comments, 'comment line')} left out", "comment"))
    names = [name.strip() for name in names]
    lines = _lines_if_even(content, separator, len(first))
    are_even = lines is not None
    if lines is None:
        lines = _lines(path, content, separator, len(first))
    names, left_out = _named(path, names, sample[skipped:])
    if len(set(names)) < len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"expected distinct column names in the header of {path}, got {repeated} twice: rename them")
    of_text = {name for j, name in enumerate(names) if name in text or (skipped == 0 and first[j] in text)}
    blanks = _has_blanks(content, rows[skipped:])
    words = {name for j, name in enumerate(names) if name in as_written or (skipped == 0 and first[j] in as_written)}
    read = partial(_frame, path, names, of_text, words, separator, decimal, value, header=skipped > 0, blanks=blanks)
    is_large = content is data and len(data) == state[0] >= LARGE and b'"' not in content
    try:
        frame = read(path if is_large else io.BytesIO(content))
    except ValueError:
        _lines(path, content, separator, len(first))  # names the line, where that is what is wrong
        raise
    if is_large and _state(path) != state:  # written into since
        frame = read(io.BytesIO(content))
    if are_even and (len(frame) != len(lines) - skipped or frame.iloc[:, -1].hasnans):  # a row may be short or blank
        lines = _lines(path, content, separator, len(first))
    _check_nameless(path, frame, left_out)
    ids = None
    if left_out:
        if left_out[0] == frame.columns[0] and not _is_counted(frame[left_out[0]]):  # as R writes row names
            ids = np.array([str(cell) for cell in frame[left_out[0]]])
        frame = frame.drop(columns=left_out)
        said.append((f"{_counted_as(len(left_out), 'nameless column')} of row numbers or nothing left out", "drop"))
    lines = lines[skipped:]
    if comments and not len(frame):
        raise ValueError(
            f"expected rows in {path}, got {_counted_as(comments, 'comment line')} alone: say comment='' "
            "(--data.comment '') where these are rows"
        )
    if last := _empty_at_the_end(frame):
        frame, lines = frame.iloc[:-last], lines[:-last]
        said.append((f"{_counted_as(last, 'empty row')} at the end left out", ""))
    if len(names) == 1 and not comments and bool((np.diff(lines) > 1).any()):
        said.append(("blank lines left out, where NA would be a missing value", ""))
    told = tuple((what, option) for what, option in said if given.get(option) is None)
    table = Table(path, frame, first if not skipped else None, told, lines, value)
    table.ids = None if ids is None else ids[: len(frame)]
    return table


def _empty_at_the_end(frame: Any) -> int:
    """How many rows below the last value have none, as spreadsheets write them."""
    count = 0
    while count < len(frame) and bool(frame.iloc[-1 - count].isna().all()):
        count += 1
    return count


def _check_certain(path: Path, rows: Sequence[Sequence[str]], mark: str, content: bytes, separator: str) -> None:
    """Raises ValueError where a decimal mark may as well separate thousands: three digits follow it everywhere, and
    points stand beside whole numbers, which decimals would have written as others."""
    marked = [cell for row in rows for cell in row if mark in cell and not math.isnan(_reader(mark, None)(cell))]
    if not marked and mark == "." and len(rows) >= SAMPLE - 1 and separator != " ":
        _check_certain_later(path, content, separator)
    if not marked or not all(map(EITHER.fullmatch, marked)):
        return
    columns = [column for column in zip(*rows, strict=False) if any(mark in cell for cell in column)]
    if mark == "," or any(WHOLE.fullmatch(cell) for column in columns for cell in column):
        raise _uncertain(path, marked[0], mark)


def _check_certain_later(path: Path, content: bytes, separator: str) -> None:
    """Likewise of points that come after the first rows, among which there are none."""
    first, edge = "", rf"[\n{re.escape(separator)}]"
    for found in re.finditer(rf'{edge}\s*"?([+-]?[0-9.]*\.[0-9.]*)"?\s*(?={edge}|$)'.encode(), content):
        cell = found[1].decode()
        if not IN_GROUPS.fullmatch(cell):
            return
        first = first or cell
    if first:
        raise _uncertain(path, first, ".")


def _uncertain(path: Path, cell: str, mark: str) -> ValueError:
    return ValueError(
        f"expected numbers that can be read in one way in {path}, got {cell}, which is {cell.replace(mark, '')} or "
        f"{cell.replace(mark, '.')}: say thousands={mark!r} (--data.thousands {mark}) or decimal={mark!r} "
        f"(--data.decimal {mark})"
    )


NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars", " ": "blanks"}


def _sign(separator: str) -> str:
    """A separator by its name, "tab" or "tabs", as signs are hard to write in a shell; others as they are."""
    signs = {name: sign for sign, plural in NAMES.items() for name in (plural, plural[:-1])}
    sign = signs.get(separator, separator)
    is_sign = len(sign) == 1 and sign.isascii() and (sign.isprintable() or sign == "\t")
    if not is_sign or sign.isalnum() or sign in '"+-.':
        raise ValueError(
            "expected separator= (--data.separator) as one sign, or as comma, semicolon, tab, bar or blank, got "
            f"{separator!r}: give what stands between cells"
        )
    return sign


def _check_options(decimal: str | None, encoding: str | None, comment: str | None, thousands: str | None) -> None:
    if decimal not in (None, ".", ","):
        raise ValueError(
            f"expected decimal= (--data.decimal) to be '.' or ',', got {decimal!r}: give the mark before the decimals"
        )
    if thousands is not None and (thousands not in [*THOUSANDS] or thousands == decimal):
        other = "" if decimal is None else f" and not decimal={decimal!r}"
        raise ValueError(
            f"expected thousands= (--data.thousands) as one of , . ' or a blank{other}, got {thousands!r}: give the "
            "mark between groups of three digits"
        )
    if comment and comment.split() != [comment]:
        raise ValueError(
            f"expected comment= (--data.comment) without blanks, or '' for no comments, got {comment!r}: give what "
            "comment lines begin with, such as %"
        )
    try:
        io.TextIOWrapper(io.BytesIO(), encoding)
    except (LookupError, ValueError):
        raise ValueError(
            f"expected encoding= (--data.encoding) as Python calls one, such as utf-8, cp1252 or utf-16, got "
            f"{encoding!r}: correct it"
        ) from None


def _counted_as(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file is written into; a pipe has no size."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _frame(
    path: Path,
    names: list[str],
    of_text: set[str],
    words: set[str],
    separator: str,
    decimal: str,
    value: Callable[[str], float],
    source: Any,
    *,
    header: bool,
    blanks: bool,
) -> Any:
    """The columns of numbers, and those of text: `of_text`, and where a cell is no number."""
    import pandas

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pandas.errors.DtypeWarning)  # pandas reads in parts, which `_column` joins
            frame = pandas.read_csv(
                source,
                compression=None,
                sep=r"\s+" if separator == " " else separator,
                decimal=decimal,
                header=0 if header else None,
                names=names,
                index_col=False,
                dtype=dict.fromkeys(of_text, str),
                na_values={name: [""] if name in words else ABSENT for name in names} if words else ABSENT,
                keep_default_na=False,
                skipinitialspace=blanks,
            )
    except (ValueError, OverflowError, csv.Error) as error:
        raise ValueError(
            f"expected a table in {path}, got something else ({first_line(error)}): export it anew as CSV"
        ) from error
    for name, dtype in frame.dtypes.items():
        if name in words:
            frame[name] = frame[name].str.strip().astype(object)
        elif name in of_text or dtype.kind not in "fiu":
            frame[name] = as_column(frame[name], name in of_text, value)
    return frame


def _has_blanks(content: bytes, rows: Sequence[str]) -> bool:
    """Whether a cell may begin with a blank, which pandas skips in a quarter more time.

    Args:
        rows: the first ones below the header, in which blanks are common.
    """
    begin = max(0, content.find(rows[0].encode())) if rows and b'"' not in content else 0
    return content.find(b" ", begin) >= 0


def is_missing(cell: str) -> bool:
    return cell.strip().lower() in MISSING


ENCODINGS = (  # what the file begins with, how it is read then, and what is said of it
    (b"\xef\xbb\xbf", "utf-8", ""),
    (b"\xff\xfe", "utf-16", "UTF-16"),
    (b"\xfe\xff", "utf-16", "UTF-16"),
    (b"", "utf-8", ""),
    (b"", "cp1252", "Windows-1252"),
    (b"", "latin-1", "Latin-1"),
)


def _decoded(path: Path, data: bytes, encoding: str | None) -> tuple[bytes, str]:
    """The text of a file in UTF-8, which is what pandas takes, and as what it was read, where that is not UTF-8."""
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(
            f"expected a table in {path}, got a broken archive ({first_line(error)}): pack it anew"
        ) from error
    content, read_as = _in_utf8(data) if encoding is None else (_from_encoding(path, data, encoding), "")
    if b"\x00" in content:
        wide = ", or name its encoding (--data.encoding utf-16-le)" if content[1:8:2] == bytes(4) else ""
        raise ValueError(f"expected text in {path}, got a file of bytes: export it as CSV{wide}")
    return _with_line_feeds(content) if b"\r" in content else content, read_as


def _with_line_feeds(content: bytes) -> bytes:
    """Lines ended as in Unix, where they are as in Windows or, long ago, by a return alone."""
    data = np.frombuffer(content, dtype=np.uint8)
    if data[-1] != RETURN and (data[np.flatnonzero(data == RETURN) + 1] == BREAK).all():
        return content.replace(b"\r", b"")  # three times as fast as to look for two bytes
    return content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _from_encoding(path: Path, data: bytes, encoding: str) -> bytes:
    try:
        return data.decode(encoding).removeprefix("\ufeff").encode()
    except UnicodeError as error:
        raise ValueError(
            f"expected text in {path} as encoding={encoding!r} (--data.encoding) has it, got something else "
            f"({first_line(error)}): name another, or leave it out"
        ) from error


def _in_utf8(data: bytes) -> tuple[bytes, str]:
    if data.isascii():
        return data, ""
    for mark, encoding, read_as in ENCODINGS:
        if data.startswith(mark):
            try:
                if mark or not read_as:
                    text = data.decode(encoding)
                    return text.encode() if read_as else data.removeprefix(mark), read_as
                parts = (data[at : at + CHUNK] for at in range(0, len(data), CHUNK))  # as most of them are ASCII
                return b"".join(part if part.isascii() else part.decode(encoding).encode() for part in parts), read_as
            except UnicodeDecodeError:
                continue
    raise AssertionError("Latin-1 reads all bytes")


def _without_comments(content: bytes, mark: str) -> tuple[bytes, int, str]:
    """The text with blank lines in the place of those that begin with the mark, their number, and what the last one
    before the first row says."""
    sign = mark.encode()
    begins, at, quotes, counted = [], content.find(sign) if mark else -1, 0, 0
    while at >= 0:
        if at == 0 or content[at - 1] == BREAK:
            quotes, counted = quotes + content.count(b'"', counted, at), at
            if quotes % 2 == 0:  # else it goes on with a quoted cell
                begins.append(at)
                end = content.find(b"\n", at)
                at = counted = len(content) if end < 0 else end
        at = content.find(sign, at + 1)
    if not begins:
        return content, 0, ""
    view, kept, end, above, said = memoryview(content), [], 0, True, ""
    for begin in begins:
        kept.append(view[end:begin])
        above = above and not content[end:begin].strip()
        end = content.find(b"\n", begin)
        end = len(content) if end < 0 else end
        said = content[begin:end].decode() if above else said
    return b"".join([*kept, view[end:]]), len(begins), said


def _sample(content: bytes) -> list[str]:
    """The first lines that are not blank, those of a quoted cell together."""
    found: list[str] = []
    start = 0
    while start < len(content) and len(found) < SAMPLE:
        end = content.find(b"\n", start)
        end = len(content) if end < 0 else end
        while content.count(b'"', start, end) % 2 and end < len(content):
            following = content.find(b"\n", end + 1)
            end = len(content) if following < 0 else following
        line = content[start:end].decode()
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


def _form(rows: Sequence[str], given: str | None, mark: str | None, thousands: str | None) -> tuple[str, str]:
    """Separator and decimal mark, where they are not given: those by which all rows have as many cells, and most of
    them are numbers."""
    found = []
    for order, separator in enumerate((*SEPARATORS, " ") if given is None else (given,)):
        width = len(_split(rows[0], separator))
        sample = [_split(row, separator) for row in rows] if width > 1 else []
        if not sample or any(len(row) != width for row in sample):
            continue
        below = [cell for row in sample[1:] or sample for cell in row]
        for decimal in (".", ",") if mark is None else (mark,):
            value = _reader(decimal, thousands)
            if (
                decimal == ","
                and mark is None
                and not any("," in each and not math.isnan(value(each)) for each in below)
            ):
                continue
            found.append((below, decimal == ".", -order, separator, decimal))
    if found:
        if len(found) > 1:  # most tables have one form alone
            values = [_reader(form[-1], thousands) for form in found]
            known = [
                sum(_kind(cell, value) != "word" for cell in form[0]) / max(1, len(form[0]))
                for form, value in zip(found, values, strict=True)
            ]
            found = [max(zip(known, found, strict=True), key=lambda each: (each[0], *each[1][1:]))[1]]
        return found[0][-2:]
    may_be = given != "," and mark != "."
    if may_be and len(rows) > 1 and all(DECIMAL_COMMA.fullmatch(row.strip()) for row in rows[1:]):  # one column
        return given or ";", ","
    if given is not None:
        return given, mark or "."
    widths = {separator: [len(_split(row, separator)) for row in rows] for separator in SEPARATORS}
    commonest = {separator: statistics.mode(each) for separator, each in widths.items()}
    ragged = [separator for separator in SEPARATORS if commonest[separator] > 1 and separator != mark]
    default = ";" if mark == "," else ","  # of one column; of ragged rows the odd line is told afterwards
    return max(
        ragged, key=lambda separator: widths[separator].count(commonest[separator]), default=default
    ), mark or "."


@cache
def _reader(decimal: str, thousands: str | None) -> Callable[[str], float]:
    """What gives a cell's value. Beside decimal commas a point separates thousands, and unless it is said to, only
    before a comma: "1.234" alone may be either number, and "01.02.2024" is none."""
    if decimal == "." and thousands is None:
        return number
    mark = {None: r"\.", " ": "[ \u00a0\u202f]"}.get(thousands, re.escape(thousands or ""))
    fraction, exponent = rf"{re.escape(decimal)}\d+", r"([eE][+-]?\d+)?"
    always = "?" if thousands is not None else ""
    in_groups = re.compile(rf"[+-]?\d{{1,3}}({mark}\d{{3}})+({fraction}){always}{exponent}")

    def read(cell: str) -> float:
        if in_groups.fullmatch(cell):
            cell = re.sub(mark, "", cell)
        elif decimal == "," and "." in cell:
            return math.nan
        return number(cell.replace(",", ".") if decimal == "," else cell)

    return read


def _kind(cell: str, value: Callable[[str], float]) -> str:
    if is_missing(cell):
        return "missing"
    if not math.isnan(value(cell)):
        return "number"
    try:
        datetime.fromisoformat(cell)
        return "date"
    except ValueError:
        return "word"


def _are_alike(first: Sequence[str], rows: Sequence[Sequence[str]], value: Callable[[str], float]) -> bool:
    """Whether the first row is one like the others, and names no columns."""
    kinds = [_kind(cell, value) for cell in first]
    if not {"number", "date"} & {*kinds} or not rows:
        return False
    counted = len(first) > 1 and list(first) == [str(j) for j in range(len(first))]
    if counted and any("." in cell for row in rows for cell in row):  # as pandas numbers columns
        return False
    for j, (cell, kind) in enumerate(zip(first, kinds, strict=True)):
        below = [row[j] for row in rows if j < len(row)]
        of_column = [_kind(each, value) for each in below]
        if kind == "missing":
            continue
        if kind == "word" and cell not in below:
            return False
        if kind != "word" and kind not in of_column and {*of_column} != {"missing"}:
            return False
    return True


def _counted(content: bytes, separator: str) -> tuple[np.ndarray, np.ndarray]:
    """How many cells each row has, and the line that it ends on."""
    data, quoted = np.frombuffer(content, dtype=np.uint8), separator != " " and b'"' in content
    counts, ends, last = [np.zeros(1, dtype=np.uint32)], [], [np.empty(0, dtype=bool)]
    inside, before = False, True
    for at in range(0, len(data), CHUNK):
        some = data[at : at + CHUNK]
        breaks = some == BREAK
        if separator == " ":
            blank = breaks | (some == BLANK) | (some == TAB)
            marks = ~blank & np.append(before, blank[:-1])  # where cells begin
            before = blank[-1]
        else:
            marks = some == ord(separator)
        if quoted:
            within = _within_quotes(data, at, separator, inside)
            if within is None:
                return _counted_slowly(content, separator)
            last.append(~within[breaks])
            breaks, marks, inside = breaks & ~within, marks & ~within, within[-1]
        ends.append(np.flatnonzero(breaks))
        found = np.add.reduceat(marks.view(np.uint8), np.append(0, ends[-1]), dtype=np.uint32)
        ends[-1] += at
        counts[-1][-1] += found[0]  # the row that the last part ends in
        counts += [found[1:]] if len(found) > 1 else []
    if inside:
        return _counted_slowly(content, separator)
    cells = np.concatenate(counts).astype(int) + (separator != " ")
    lines = np.flatnonzero(np.append(np.concatenate(last), True)) + 1 if quoted else np.arange(1, len(cells) + 1)
    there = cells > 0 if separator == " " else ~_are_blank(content, np.concatenate([*ends, [len(data)]]), cells == 1)
    return cells[there], lines[there]


def _within_quotes(data: np.ndarray, at: int, separator: str, inside: bool) -> np.ndarray | None:
    """Which bytes of a part are of a quoted cell; None where a quote does not begin or end one."""
    are_quotes = data[at : at + CHUNK] == QUOTE
    quotes = np.flatnonzero(are_quotes)
    if not len(quotes):
        return np.full(len(are_quotes), inside)
    before = data[np.maximum(at + quotes[int(inside) :: 2] - 1, 0)]
    after = data[np.minimum(at + quotes[int(not inside) :: 2] + 1, len(data) - 1)]
    for each in (before, after):  # another quote is one that is doubled
        if not ((each == ord(separator)) | (each == BREAK) | (each == QUOTE)).all():
            return None
    return ((np.cumsum(are_quotes, dtype=np.uint8) + np.uint8(inside)) & 1).astype(bool)


def _counted_slowly(content: bytes, separator: str) -> tuple[np.ndarray, np.ndarray]:
    reader = csv.reader(io.StringIO(content.decode()), delimiter=separator, skipinitialspace=True)
    try:
        rows = [(len(row), reader.line_num) for row in reader if row and (len(row) > 1 or row[0].strip())]
    except csv.Error:  # a cell too long for the csv module: pandas tells what it is
        return np.empty(0, dtype=int), np.arange(1, content.count(b"\n") + 2)
    counts, lines = np.array(rows, dtype=int).reshape(-1, 2).T
    return counts, lines


def _are_blank(content: bytes, ends: np.ndarray, may_be: np.ndarray) -> np.ndarray:
    """Which rows are blank, of those that may be."""
    blank, rows = np.zeros(len(may_be), dtype=bool), np.flatnonzero(may_be)
    starts = np.append(0, ends[:-1] + 1)
    signs = np.frombuffer(content + b"\n", dtype=np.uint8)[starts[rows]] if len(rows) > 1 else np.zeros(len(rows))
    for row in rows[signs <= BLANK]:  # few, as most rows begin with a sign
        blank[row] = not content[starts[row] : ends[row]].strip()
    return blank


def _lines_if_even(content: bytes, separator: str, width: int) -> np.ndarray | None:
    """`_lines`, where there are as many separators as in that many whole rows: rows that are too long then stand
    beside short ones, whose last cell pandas leaves empty, or blank ones, which pandas leaves out."""
    if width == 1 or separator == " " or b'"' in content:
        return None
    data = np.frombuffer(content, dtype=np.uint8)
    parts = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    num_rows = sum(np.count_nonzero(part == BREAK) for part in parts) + (data[-1] != BREAK)
    num_separators = sum(np.count_nonzero(part == ord(separator)) for part in parts)
    return np.arange(1, num_rows + 1) if num_separators == num_rows * (width - 1) else None


def _lines(path: Path, content: bytes, separator: str, width: int) -> np.ndarray:
    """(rows,), the line that each row is on, once all are found to have so many cells."""
    counts, lines = _counted(content, separator)
    wrong = np.flatnonzero(counts != width)
    if len(wrong) and width > 1 and len(counts) > 2 and counts[0] == width and (counts[1:] == counts[1]).all():
        raise ValueError(
            f"expected {counts[1]} names in line {lines[0]} of {path}, as many as there are cells in every line below, "
            f"got {width}: mend that line, or leave it out by comment= (--data.comment), what it begins with"
        )
    if len(wrong):
        raise ValueError(
            f"expected {width} cells in line {lines[wrong[0]]} of {path}, got {counts[wrong[0]]}: mend that line"
        )
    return lines


def _named(path: Path, names: list[str], sample: Sequence[Sequence[str]]) -> tuple[list[str], list[str]]:
    """The columns' names, and those of nameless columns that only number the rows, or are empty."""
    left_out = []
    for j, name in enumerate(names):
        if name:
            continue
        cells = [row[j] for row in sample]
        numbers = [number(cell) for cell in cells]
        counted = all(b - a == 1 for a, b in zip(numbers, numbers[1:], strict=False)) and numbers[:1] in ([0.0], [1.0])
        whole = all(math.isnan(each) or each % 1 == 0 for each in numbers)
        are_names = j == 0 and whole and len({*cells}) == len(cells) > 1 and not any(map(is_missing, cells))  # as of R
        if not (counted or are_names or all(map(is_missing, cells))):
            raise ValueError(
                f"expected a name for every column of {path}, got none for column {j + 1}: name it in the header"
            )
        names[j] = f"column {j + 1}"
        left_out.append(names[j])
    return names, left_out


def _is_counted(cells: Any) -> bool:
    return cells.dtype.kind in "fiu" and bool((cells.diff().iloc[1:] == 1).all())


def _check_nameless(path: Path, frame: Any, names: Sequence[str]) -> None:
    """Raises ValueError where a nameless column holds something after the rows that its form was told by."""
    for name in names:
        cells = frame[name]
        whole = cells.dtype.kind in "iuO"
        are_names = name == frame.columns[0] and whole and cells.is_unique and not cells.hasnans
        if not (_is_counted(cells) or are_names or bool(cells.isna().all())):
            raise ValueError(f"expected a name for every column of {path}, got none for {name}: name it in the header")


def as_column(column: Any, as_text: bool, number: Callable[[str], float]) -> Any:
    """Numbers where all cells are; true and false as 1 and 0; text without blanks around it."""
    import pandas

    if column.dtype == bool:
        return column.astype(np.float64)
    cells = [None if gap else _tidy(cell) for cell, gap in zip(column.tolist(), column.isna(), strict=True)]
    cells = [None if isinstance(cell, str) and is_missing(cell) else cell for cell in cells]
    words, given = {"true": 1.0, "false": 0.0}, [cell for cell in cells if cell is not None]
    value = words.__getitem__ if given and all(str(cell).lower() in words for cell in given) else number
    numbers = [np.nan if cell is None else value(cell.lower()) if isinstance(cell, str) else cell for cell in cells]
    is_text = as_text or any(math.isnan(each) and cell is not None for cell, each in zip(cells, numbers, strict=True))
    return pandas.Series(cells if is_text else numbers, index=column.index, dtype=object if is_text else np.float64)


def _tidy(cell: Any) -> str | float:
    """Text without blanks around it, or the number that pandas found in a part of the file without text."""
    return float(cell) if type(cell) in (int, float) else str(cell).strip()
