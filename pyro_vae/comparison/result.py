"""`Comparison`: what was found, as a table, in words and in files."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pandas

from ..checkpoint import atomic
from ..evaluation import Estimate
from .gradients import PARTS, slopes_of

BIASED = 4.0  # standard errors
SURE = 3.0  # standard errors of a slope that is not 0
NO_LINE = 0.01  # probability of points as far from a line, were it one
WIDTH = 100  # of the text table


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare_estimators` found; ``str()`` is a text table, and what follows from it.

    Attributes:
        table: a row for each estimator and K. In nats per datum: ``bound``, ``bound_standard_error`` over data and
            ``bound_standard_error_draws`` over draws; ``gap`` to log p(x) and its two errors, named alike. Of the
            gradient of the loss of a batch, each with the prefix ``model_`` or ``guide_`` and in nats per unit of the
            parameters: ``norm``, of its expectation; ``mean_norm``, the expected norm of a draw;
            ``standard_deviation`` and ``variance``, the trace of the covariance; ``snr`` and
            ``snr_standard_error``, the mean over parameters of ``|mean| / standard deviation``; ``snr_whole`` and its
            error, ``norm / standard_deviation``; ``bias``, and ``bias_z``, its square in standard errors. ``draws`` of
            the guide for each datum; ``seconds`` of a step, a median, ``seconds_standard_error``, and ``megabytes``, at
            the peak beyond what lives between steps; ``compiled``. Of training: ``trained``, log p(x) in nats per
            datum, mean over seeds; ``trained_standard_error``; ``trained_low`` and ``trained_high``, a 95 % interval;
            ``trained_steps``; ``trained_seconds`` and ``trained_seconds_standard_error``; ``failed``, seeds that ended
            in a loss that is not finite and are left out. NaN where something was not asked for or makes no sense.
        slopes: a row for each estimator and part: ``slope`` of ln snr against ln K by weighted least squares, its
            ``standard_error`` and ``intercept``, of how many ``points``; ``fit``, the probability of points as far from
            a line, below 0.01 if there is none, NaN for two points; ``whole_slope`` and ``whole_standard_error`` of
            ``snr_whole``.
        log_evidence: log p(x) that gaps are to, nats per datum.
        source: where that is from: "exact", "given" or "bound of ... draws".
        skipped: why an estimator does not exist for a K, by name.
        settings: what the numbers were taken with.
    """

    table: pandas.DataFrame
    slopes: pandas.DataFrame
    log_evidence: Estimate
    source: str
    skipped: dict[str, str]
    settings: dict[str, Any]

    @property
    def verdict(self) -> list[str]:
        """What the numbers say, a sentence each."""
        return _verdict(self)

    def __str__(self) -> str:
        return _text(self)

    def to_csv(self, path: Path | str) -> None:
        """Write `table`, atomically."""
        with atomic(Path(path)) as temporary:
            self.table.to_csv(temporary, index=False)

    def to_json(self, path: Path | str) -> None:
        """Write everything, atomically; NaN and infinity become null."""
        content = {
            "log_evidence": vars(self.log_evidence),
            "source": self.source,
            "skipped": self.skipped,
            "settings": self.settings,
            "table": self.table.to_dict("records"),
            "slopes": self.slopes.to_dict("records"),
        }
        with atomic(Path(path)) as temporary:
            temporary.write_text(json.dumps(_finite_or_null(content), indent=1, allow_nan=False) + "\n", "utf-8")

    @classmethod
    def from_json(cls, path: Path | str) -> Self:
        """What `to_json` wrote; errors that an older version did not write are NaN."""
        content = json.loads(Path(path).read_text("utf-8"))
        numbers = {key: math.nan if value is None else value for key, value in content["log_evidence"].items()}
        table, slopes = (pandas.DataFrame(content[name]) for name in ("table", "slopes"))
        for frame in (table, slopes):
            for name in frame.columns.difference(["estimator", "part", "compiled"]):
                frame[name] = pandas.to_numeric(frame[name])
        for name in {"seconds_standard_error", "trained_seconds_standard_error"} - {*table.columns}:
            table[name] = math.nan
        slopes = slopes if "fit" in slopes.columns else slopes_of(table)
        others = {name: content[name] for name in ("source", "skipped", "settings")}
        return cls(table, slopes, Estimate(**numbers), **others)

    def figures(self, directory: Path | str) -> list[Path]:
        """Draw ``signal_to_noise.png``, ``bounds.png`` and ``quality_against_time.png`` into an existing directory."""
        from .figures import draw

        return draw(self, Path(directory))


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(comparison: Comparison) -> str:
    settings, table = comparison.settings, comparison.table
    of = comparison.log_evidence
    lines = [
        f"{settings['num_data']} data, gradients and steps of {settings['batch_size']}; {settings['num_gradients']:,} "
        f"gradients, {settings['num_references']:,} for the bias; {settings['device']}, {settings['threads']} threads",
        f"log p(x) = {of} nats per datum ({comparison.source})",
        "",
    ]
    columns = [
        ("K", [f"{K}" for K in table["K"]]),
        ("bound", _numbers(table["bound"])),
        ("gap", _numbers(table["gap"])),
        ("SNR m", _numbers(table["model_snr"])),
        ("SNR g", _numbers(table["guide_snr"])),
        ("bias m", _numbers(table["model_bias_z"], 1)),
        ("bias g", _numbers(table["guide_bias_z"], 1)),
        ("ms", _measured(1e3 * table["seconds"], 1e3 * table["seconds_standard_error"])),
        ("MB", _numbers(table["megabytes"], 1)),
    ]
    meaning = "nats per datum: bound, gap"
    if table["trained"].notna().any():
        columns += [("trained", _numbers(table["trained"])), ("±", _numbers(table["trained_standard_error"]))]
        before = settings.get("untrained")
        meaning += ", log p(x) of the data that trained copies are scored on, ± its standard error over seeds"
        meaning += "" if before is None else f", {before:.2f} before training"
    meaning += (
        "; SNR and bias of the gradients of m, the model, and g, the guide, a squared bias in its standard errors, "
        f"sure above {BIASED:g}; ms, ± the standard error of a median, and MB of a step"
    )
    widths = [max(len(name), *map(len, cells)) for name, cells in columns]
    gap = "  " if sum(widths) + 2 * len(widths) <= WIDTH - 12 else " "
    room = WIDTH - sum(widths) - len(gap) * len(widths)
    names = ["estimator", *(_cut(name, max(9, room)) for name in table["estimator"])]
    first = max(map(len, names))
    for cells in zip(names, *([name, *rows] for name, rows in columns), strict=True):
        line = [cells[0].ljust(first), *(cell.rjust(width) for cell, width in zip(cells[1:], widths, strict=True))]
        lines.append(gap.join(line))
    lines += ["", *textwrap.wrap(meaning, WIDTH), ""]
    for name in table["estimator"].drop_duplicates():
        said = [
            _power(comparison, row) for _, row in comparison.slopes[comparison.slopes["estimator"] == name].iterrows()
        ]
        if any(said):
            lines += textwrap.wrap(f"{name}: SNR ~ {', '.join(filter(None, said))}", WIDTH)
    for note in (*comparison.verdict, *(f"left out: {name}: {why}" for name, why in comparison.skipped.items())):
        lines += textwrap.wrap(f"- {note}", WIDTH)
    return "\n".join(lines)


def _verdict(comparison: Comparison) -> list[str]:
    table, said = comparison.table, []
    for part in PARTS:
        biased = table[table[f"{part}_bias_z"] > BIASED]
        for name in biased["estimator"].drop_duplicates():
            where = ", ".join(f"{K}" for K in biased["K"][biased["estimator"] == name])
            said.append(f"{name}: the {part}'s gradient is biased at K = {where}")
    for _, row in comparison.slopes.iterrows():
        falls = row["slope"] < min(-0.1, -SURE * row["standard_error"])
        if falls and lies_on_a_line(row) and row["points"] > 2:
            low, high = _range(comparison, row)
            said.append(
                f"{row['estimator']}: the signal of the {row['part']}'s gradient drowns with K, from {low} to {high}"
            )
    return said + _of_training(table[table["trained"].notna()], comparison.settings.get("untrained"))


def _of_training(trained: pandas.DataFrame, untrained: float | None) -> list[str]:
    """The best is named where the 95 % intervals of all others end below its own."""
    if not len(trained):
        return []
    if trained[["trained_low", "trained_high"]].isna().any(axis=None):
        return ["which trains best cannot be told where a single seed has been trained: name more --seeds"]
    best = trained.loc[trained["trained"].idxmax()]
    name = f"{best['estimator']}, K = {best['K']}"
    others = trained[(trained["trained_high"] >= best["trained_low"]) & (trained.index != best.name)]
    text = f"{name} trains best, log p(x) = {best['trained']:.2f}"
    if len(others):
        named = (f"{each}, K = {K}" for each, K in zip(others["estimator"], others["K"], strict=True))
        within = f"{len(others)} others" if len(others) > 4 else "; ".join(named)
        text = f"which trains best cannot be told: {name} has log p(x) = {best['trained']:.2f}; within the 95 % "
        text += f"intervals: {within}; more seeds or steps tell them apart"
    elif len(trained) == 1:
        text = f"{name} trains to log p(x) = {best['trained']:.2f}"
    said = [text]
    if untrained is not None and best["trained_low"] <= untrained:
        said.append(f"no pair is surely better than before training, {untrained:.2f}: train longer")
    if (trained["failed"] > 0).any():
        some = trained[trained["failed"] > 0]
        failed = (f"{row['estimator']}, K = {row['K']}: {row['failed']}" for _, row in some.iterrows())
        said.append(f"seeds that ended in a loss that is not finite are left out: {'; '.join(failed)}")
    return said


def lies_on_a_line(slope: Mapping[str, Any]) -> bool:
    """Whether ln SNR against ln K lies within its errors of a line: a row of `Comparison.slopes`."""
    return slope["points"] == 2 or slope["fit"] >= NO_LINE


def _range(comparison: Comparison, slope: Mapping[str, Any]) -> tuple[int, int]:
    """The least and the largest K of the points."""
    own = comparison.table[comparison.table["estimator"] == slope["estimator"]]
    K = own["K"][own[f"{slope['part']}_snr"] > 0]
    return int(K.min()), int(K.max())


def _power(comparison: Comparison, slope: Mapping[str, Any]) -> str | None:
    """How the signal changes with K: a power where the points lie on a line; between two values of K."""
    if slope["points"] < 2 or math.isnan(slope["slope"]):
        return None
    if not lies_on_a_line(slope):
        return f"no power of K for the {slope['part']}"
    if abs(slope["slope"]) < SURE * slope["standard_error"]:
        return f"no power of K that is sure for the {slope['part']}"
    power = f"K^({uncertain(slope['slope'], slope['standard_error'])}) for the {slope['part']}"
    return power if slope["points"] > 2 else "{} from K = {} to {}".format(power, *_range(comparison, slope))


def _numbers(values: Iterable[float], digits: int = 2) -> list[str]:
    def shown(value: float) -> str:
        return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.2e}"

    return ["–" if math.isnan(value) else shown(value) for value in values]


def _measured(values: Iterable[float], errors: Iterable[float]) -> list[str]:
    """Values with errors of one digit or two."""
    found = []
    for value, error in zip(values, errors, strict=True):
        digits = 2 if math.isnan(error) or error < 1 else 1 if error < 10 else 0
        found.append("–" if math.isnan(value) else f"{value:.{digits}f}±{error:.{digits}f}")
    return found


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"


def uncertain(value: float, error: float, sign: str = "") -> str:
    """To the first digit of the error, from hundredths on."""
    digits = min(4, max(2, -math.floor(math.log10(error)))) if error > 0 else 2
    return f"{value:{sign}.{digits}f} ± {error:.{digits}f}"
