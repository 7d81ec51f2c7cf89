"""Times of a table's rows, numbers or dates: whether they are even, and how they go on."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from .base import first_line, number

__all__ = [
    "after",
    "are_in_order_as_dates",
    "late",
    "on_grid",
    "padded",
    "read_times",
    "shortest",
    "spacing",
    "written",
]

STEPS = "such as D, B (working days), h, 15min or MS (first of the month), or a number, as the times are"
MOST_FILLED = 100  # steps of a grid for each time that there is
LOOKED_AT = 20  # sequences of times that spacings are guessed from


def read_times(
    path: Path | str, column: str, cells: Sequence[str], number: Callable[[str], float] = number
) -> np.ndarray:
    """(rows,), float64 where all are numbers, as `number` reads them, else datetime64[us], those with a zone in UTC."""
    numbers = np.array([number(cell) for cell in cells])
    if not np.isnan(numbers).any():
        compact = _compact(cells)
        _check_numbers(path, column, cells, numbers)
        return numbers if compact is None else compact
    try:
        dates = [datetime.fromisoformat(cell.strip()) for cell in cells]
    except ValueError as error:
        if (found := _in_words(cells)) is not None:
            return found
        raise ValueError(
            f"expected numbers or ISO dates in column {column!r} of {path}, got others ({first_line(error)}): write "
            "them as 2006-09-26 or 2006-09-26 12:00"
        ) from None
    zoned = [date.tzinfo is not None for date in dates]
    if any(zoned) and not all(zoned):
        raise ValueError(f"expected a zone at all times or at none in column {column!r} of {path}, got both: mend them")
    plain = [date.astimezone(UTC).replace(tzinfo=None) if date.tzinfo else date for date in dates]
    return np.array(plain, dtype="datetime64[us]")


QUARTER = re.compile(r"([0-9]{4})[ -]?[qQ]([1-4])")
YEAR = "(19|20)[0-9]{2}"
MONTH, DAY = "(0[1-9]|1[0-2])", "(0[1-9]|[12][0-9]|3[01])"  # with their zeros, and with or without:
ANY_MONTH, ANY_DAY = "(0?[1-9]|1[0-2])", "(0?[1-9]|[12][0-9]|3[01])"
MAY_BE_DATES = [rf"{ANY_MONTH}\.{YEAR}", rf"{YEAR}\.{MONTH}"]
MAY_BE_DATES += [rf"{first}{second}{YEAR}" for first, second in ((ANY_DAY, ANY_MONTH), (ANY_MONTH, ANY_DAY))]
IN_DISORDER = {  # forms of dates whose order as numbers is another, and the groups by which they are in order
    rf"{ANY_DAY}\.{ANY_MONTH}": (2, 1),
    rf"{DAY}{MONTH}([0-9]{{2}})": (3, 2, 1),
    rf"{MONTH}{DAY}([0-9]{{2}})": (3, 1, 2),
}
WITH_ZEROS = [rf"{DAY}\.{MONTH}", *[*IN_DISORDER][1:]]  # dates if one begins with 0, which numbers do not


def _all_match(forms: Sequence[str], cells: Sequence[str]) -> bool:
    return any(all(re.fullmatch(form, cell.strip()) for cell in cells) for form in forms)


def are_in_order_as_dates(sequences: Sequence[Sequence[str]]) -> bool:
    """Whether the cells of each sequence, as its file has them, go forward as dates of one form."""
    for form, groups in IN_DISORDER.items():
        found = [[re.fullmatch(form, cell.strip()) for cell in cells] for cells in sequences]
        if all(all(each) for each in found):
            keys = [[tuple(int(each[i]) for i in groups) for each in cells if each] for cells in found]
            if all(a < b for key in keys for a, b in zip(key, key[1:], strict=False)):
                return True
    return False


def _check_numbers(path: Path | str, column: str, cells: Sequence[str], numbers: np.ndarray) -> None:
    """Raises ValueError where numbers are infinite, or seem dates, whose order would be another."""
    with_zeros = any(cell.strip().startswith("0") for cell in cells) and _all_match(WITH_ZEROS, cells)
    may_be = with_zeros or _all_match(MAY_BE_DATES, cells)
    odd = None if np.isfinite(numbers).all() else cells[int(np.argmin(np.isfinite(numbers)))]
    if cells and (may_be or odd is not None):
        came = cells[0] if odd is None else odd
        seem = "and its like, which seem dates" if odd is None else "among them"
        raise ValueError(
            f"expected numbers or ISO dates in column {column!r} of {path}, got {came!r} {seem}: write them "
            "as 2006-09-26 or 2006-09"
        )


def _in_words(cells: Sequence[str]) -> np.ndarray | None:
    """Dates that can be read in one way alone: 2006/09/26, Sep 26 2006, 2006Q3, or 26.09.2006 among days after the
    twelfth."""
    import pandas

    words, found = [cell.strip() for cell in cells], {}
    quarters = [QUARTER.fullmatch(word) for word in words]
    if words and all(quarters):
        return np.array([f"{each[1]}-{3 * int(each[2]) - 2:02d}" for each in quarters if each], dtype="datetime64[us]")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the day comes first
        guess = pandas.tseries.api.guess_datetime_format
        forms = {guess(words[0], dayfirst=first) for first in (False, True)} if words else set()
    for form in forms - {None}:
        if form.startswith("%Y") and "%d" in form and form.index("%d") < form.index("%m"):
            continue  # as nobody writes
        with contextlib.suppress(ValueError, TypeError):
            found[form] = pandas.to_datetime(words, format=form).to_numpy("datetime64[us]")
    return next(iter(found.values())) if len(found) == 1 else None


def _compact(cells: Sequence[str]) -> np.ndarray | None:
    """Dates written as 19900126, or months as 199001, where all cells are such."""
    words = [cell.strip() for cell in cells]
    form = {8: "%Y%m%d", 6: "%Y%m"}.get(len(words[0]) if words else 0)
    if form is None or any(len(word) != len(words[0]) or not "1500" < word < "2500" for word in words):
        return None
    try:
        return np.array([datetime.strptime(word, form) for word in words], dtype="datetime64[us]")
    except ValueError:
        return None


def on_grid(times: np.ndarray, every: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """All times from the first to the last, `every` so many, and the place of each of `times` among them.

    Raises:
        ValueError: a time between two of the grid, or many more steps than times.
    """
    step = _step(every, times)
    count = (times[-1] - times[0]) / step + 1
    if count > MOST_FILLED * len(times):
        raise ValueError(
            f"expected at most {MOST_FILLED} steps for each row of {where}, got {count:,.0f} from {written(times[0])} "
            f"to {written(times[-1])} every {every}: name a longer step with every= (--data.every)"
        )
    if isinstance(step, float):
        places = np.round((times - times[0]) / step).astype(int)
        grid = times[0] + step * np.arange(places[-1] + 1)
        near = np.abs(grid[places] - times) <= 1e-6 * step
    else:
        grid = _dates(times[0], every, end=times[-1])
        places = np.searchsorted(grid, times)
        near = np.isin(times, grid)
    if not near.all():
        guess, begin = _inferred(times), f" from {written(times[0])} on" if near[0] else ""
        seems = f", which seems {guess}" if guess is not None else f", {STEPS}"
        raise ValueError(
            f"expected times every {every}{begin} in {where}, got {written(times[~near][0])}: "
            f"name their step with every= (--data.every){seems}"
        )
    return grid, places


def after(last: Any, every: str, count: int) -> np.ndarray:
    """The `count` times after `last`, which is one of the grid."""
    step = _step(every, np.array([last]))
    if isinstance(step, float):
        return last + step * np.arange(1, count + 1)
    return _dates(last, every, periods=count + 1)[1:]


def spacing(sequences: Sequence[np.ndarray]) -> str | None:
    """The `every` of sequences of times that are all even; None where they are not, or are too few to tell."""
    several = [times for times in sequences if len(times) > 1]
    guesses = dict.fromkeys(guess for times in several[:LOOKED_AT] for guess in _guesses(times))
    return next((guess for guess in guesses if all(_is_even(times, guess) for times in several)), None)


def shortest(sequences: Sequence[np.ndarray]) -> str:
    """The shortest step as `every` has it: "h", "15min", a number; "D" of days and all that is longer."""
    step = min(np.diff(times).min() for times in sequences if len(times) > 1)
    if not isinstance(step, np.timedelta64):
        return written(step)
    import pandas

    longer = step >= np.timedelta64(1, "D")
    return "D" if longer else str(pandas.tseries.frequencies.to_offset(pandas.Timedelta(step)).freqstr)


def padded(sequences: Sequence[np.ndarray], width: int) -> np.ndarray:
    """(N, width), NaN or NaT after each one's end."""
    nothing = np.datetime64("NaT") if sequences[0].dtype.kind == "M" else np.nan
    return np.stack([np.pad(times, (0, width - len(times)), constant_values=nothing) for times in sequences])


def late(sequences: Sequence[np.ndarray]) -> int:
    """How many steps are more than one and a half times as long as the median of their sequence; 0 where all are even,
    as working days are."""
    steps = [np.diff(times).astype(float) for times in sequences if len(times) > 1]
    found = sum(int((each > 1.5 * np.median(each)).sum()) for each in steps)
    return 0 if found == 0 or spacing(sequences) is not None else found


def written(time: Any) -> str:
    """A time as in a table: a date without midnight, a whole number without a point."""
    if isinstance(time, np.datetime64):
        return str(time.astype("datetime64[s]")).replace("T", " ").removesuffix(" 00:00:00")
    return repr(float(time)).removesuffix(".0")


def _guesses(times: np.ndarray) -> list[str]:
    shortest = np.diff(times).min()
    if times.dtype.kind == "f":
        return [repr(float(shortest))]
    import pandas

    days, rest = divmod(shortest, np.timedelta64(1, "D"))
    of_shortest = f"{days}D" if not rest else pandas.tseries.frequencies.to_offset(pandas.Timedelta(shortest)).freqstr
    return [each for each in (_inferred(times), of_shortest) if each is not None]


def _inferred(times: np.ndarray) -> str | None:
    """How dates go on, where pandas can tell."""
    if times.dtype.kind != "M" or len(times) < 3:
        return None
    import pandas

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas 3 tells that its next one returns an offset
        found = pandas.infer_freq(pandas.DatetimeIndex(times))
    return getattr(found, "freqstr", found)


def _is_even(times: np.ndarray, every: str) -> bool:
    try:
        grid, _ = on_grid(times, every, "")
    except ValueError:
        return False
    return len(grid) == len(times)


def _step(every: str, times: np.ndarray) -> Any:
    """The step of numbers, or of dates about how long it is."""
    step, dated = number(every), times.dtype.kind == "M"
    if dated and np.isnan(step):
        two = _dates(times[0], every, periods=2)
        step = two[1] - two[0]
    elif dated:
        step = 0.0
    if not step > np.zeros((), np.asarray(step).dtype) or (not dated and not np.isfinite(step)):
        kind = "dates" if dated else "numbers"
        raise ValueError(f"expected a step of {kind} as every= (--data.every), got {every!r}: name one, {STEPS}")
    return step


def _dates(first: Any, every: str, **options: Any) -> np.ndarray:
    import pandas

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that "d" is to be written as "D"
            return pandas.date_range(first, freq=every, **options).to_numpy("datetime64[us]")
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"expected a step of dates as every= (--data.every), got {every!r}: name one, {STEPS}"
        ) from None
