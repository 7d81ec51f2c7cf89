"""`draw`: the figures of a `Comparison`, for a paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator

from ..checkpoint import atomic
from .result import lies_on_a_line, uncertain

if TYPE_CHECKING:
    from .result import Comparison

__all__ = ["draw"]

INK, FAINT, GREY = "#3d4450", "#d5d8dd", "#939ca8"
COLORS = ["#33658a", "#d1603d", "#3f8f45", "#8a5fa0", "#a8841a", "#2a8f8c", "#d0578f", "#7d5c4a", "#cc4141", "#6f7884"]
MARKERS = "osD^vPX<>*"
APART = 0.045  # ln of the factor between neighbours in K, so that equal values do not hide each other


def draw(comparison: Comparison, directory: Path) -> list[Path]:
    """Write the figures as PNG files, each atomically; returns their paths.

    Raises:
        FileNotFoundError: no such directory.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"expected a directory for figures, got {str(directory)!r}, which is none: make it")
    paths = []
    for name, make in FIGURES.items():
        figure = make(comparison)
        path = directory / f"{name}.png"
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png", dpi=200, facecolor="white")
        paths.append(path)
    return paths


def signal_to_noise(comparison: Comparison) -> Figure:
    """SNR against K on log axes, with lines where the points lie on one, for the model's and the guide's gradient."""
    count = comparison.table["estimator"].nunique()
    figure, axes = _panels(2, width=8.0, height=3.6 + 0.2 * count)
    for axis, part in zip(axes, ("model", "guide"), strict=True):
        slopes = comparison.slopes[comparison.slopes["part"] == part].set_index("estimator")
        for look, name, rows in _estimators(comparison):
            snr, error = rows[f"{part}_snr"], rows[f"{part}_snr_standard_error"]
            shown = snr.map(math.isfinite) & (snr > 0)
            if not shown.any():
                continue
            fit, label = slopes.loc[name], _plain(name)
            if math.isfinite(fit["slope"]) and lies_on_a_line(fit):
                label += f"   {uncertain(fit['slope'], fit['standard_error'], '+')}".replace("-", "−")
                K = rows["K"][shown]
                line = math.exp(fit["intercept"]) * K ** fit["slope"]
                axis.plot(K * look["apart"], line, color=look["color"], lw=1.2, ls=(0, (4, 3)), zorder=1)
            _points(axis, look, rows["K"][shown], snr[shown], error[shown], label)
        _log_scale(axis)
        _scale_of_K(axis, comparison)
        axis.set_title(f"gradient of the {part}", color=INK, fontsize=10, loc="left")
        _legend(axis, "estimator   slope", loc="upper left", bbox_to_anchor=(-0.02, -0.2))
    axes[0].set_ylabel("signal-to-noise ratio", color=INK)
    return figure


def bounds(comparison: Comparison) -> Figure:
    """Each bound against K, with its standard error over draws, below log p(x)."""
    figure, (axis,) = _panels(1, width=6.8, height=3.6)
    of = comparison.log_evidence
    axis.axhline(of.value, color=GREY, lw=1.4, zorder=0, label=f"log p(x), {comparison.source}")
    if math.isfinite(of.standard_error_draws) and of.standard_error_draws > 0:
        low, high = (of.value + sign * of.standard_error_draws for sign in (-1, 1))
        axis.axhspan(low, high, color=FAINT, alpha=0.6, lw=0, zorder=0)
    for look, name, rows in _estimators(comparison):
        _points(axis, look, rows["K"], rows["bound"], rows["bound_standard_error_draws"], _plain(name), line=True)
    _scale_of_K(axis, comparison)
    axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter(_compact)
    axis.set_ylabel("bound, nats per datum", color=INK)
    _legend(axis, None, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def quality_against_time(comparison: Comparison) -> Figure:
    """What each estimator gives against the time that it takes, and the front of those that are surely better, with
    errors of both, than all that take no longer."""
    table = comparison.table
    figure, (axis,) = _panels(1, width=6.8, height=3.8)
    trained = table["trained"].notna().any()
    if trained:
        time, quality = table["trained_seconds"], table["trained"]
        axis.set_xlabel("seconds of training", color=INK)
        axis.set_ylabel("log p(x) after training, nats per datum", color=INK)
    else:
        time, quality = 1e3 * table["seconds"], table["guide_snr"]
        axis.set_xlabel("milliseconds per step", color=INK)
        axis.set_ylabel("signal-to-noise ratio of the guide's gradient", color=INK)
    good = time.map(math.isfinite) & quality.map(math.isfinite) & (trained | (quality > 0))
    of_quality = table["trained_high"] - quality if trained else 2 * table["guide_snr_standard_error"]
    of_time = 2 * (table["trained_seconds_standard_error"] if trained else 1e3 * table["seconds_standard_error"])
    unknown = {"of_time": of_time[good].fillna(math.inf), "of_quality": of_quality[good].fillna(math.inf)}
    front = _front(time[good], quality[good], **unknown)
    if len(front) > 1:
        axis.plot(
            time[front], quality[front], color=FAINT, lw=6, zorder=0, solid_joinstyle="round", label="best for its time"
        )
    for look, name, rows in _estimators(comparison):
        rows = rows[good[rows.index]]
        error = rows["trained_high"] - rows["trained"] if trained else rows["guide_snr_standard_error"]
        x, y = time[rows.index], quality[rows.index]
        _points(axis, look, x, y, error, _plain(name), apart=False)
        for index in rows.index:
            axis.annotate(
                f"{table['K'][index]}", (x[index], y[index]), (6, 5), textcoords="offset points",
                color=look["color"], fontsize=8,
            )  # fmt: skip
    wide = good.any() and time[good].max() > 10 * time[good].min()
    axis.set_xscale("log" if wide else "linear")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if wide else MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(_compact)
    axis.yaxis.set_major_formatter(_compact)
    if not trained:
        _log_scale(axis)
    _legend(axis, "K beside the points", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


FIGURES: dict[str, Callable[[Any], Figure]] = {
    "signal_to_noise": signal_to_noise,
    "bounds": bounds,
    "quality_against_time": quality_against_time,
}


def _front(time: pandas.Series, quality: pandas.Series, of_time: pandas.Series, of_quality: pandas.Series) -> list[Any]:
    """In the order of time, those that are better, within errors, than all others that may take no longer."""
    front = []
    for index in time.sort_values(kind="stable").index:
        as_fast = (time - of_time <= time[index] + of_time[index]) & (time.index != index)
        if (quality[as_fast] + of_quality[as_fast] < quality[index] - of_quality[index]).all():
            front.append(index)
    return front


def _estimators(comparison: Comparison) -> Iterator[tuple[dict[str, Any], str, pandas.DataFrame]]:
    """Each estimator's look, name and rows; ``apart`` is a factor on K."""
    names = comparison.table["estimator"].drop_duplicates().tolist()
    for i, name in enumerate(names):
        apart = math.exp(APART * (i - (len(names) - 1) / 2))
        look = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "apart": apart}
        yield look, name, comparison.table[comparison.table["estimator"] == name].sort_values("K")


def _points(
    axis: Any, look: dict[str, Any], x: Any, y: Any, error: Any, label: str, line: bool = False, apart: bool = True
) -> None:
    axis.errorbar(
        x * look["apart"] if apart else x, y, yerr=error.fillna(0.0), label=label,
        color=look["color"], marker=look["marker"], ms=5.5, lw=1.2 if line else 0, elinewidth=1.1, capsize=2.5,
    )  # fmt: skip


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.03)  # inches, but wspace
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    axes: list[Any] = []
    for i in range(count):
        axes.append(figure.add_subplot(1, count, i + 1))
        axes[-1].spines[["top", "right"]].set_visible(False)
        axes[-1].spines[["left", "bottom"]].set_color(FAINT)
        axes[-1].tick_params(colors=INK, labelsize=9, length=0, pad=5)
        axes[-1].tick_params(which="minor", length=0)
    return figure, axes


def _scale_of_K(axis: Any, comparison: Comparison) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(sorted({*comparison.table["K"].tolist()})))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(_compact)
    axis.set_xlabel("K, draws of the guide", color=INK)


def _log_scale(axis: Any) -> None:
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 30 * low else (1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(_compact)
    axis.yaxis.set_minor_formatter(NullFormatter())


def _legend(axis: Any, title: str | None, **place: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        legend = axis.legend(frameon=False, fontsize=8.5, labelcolor=INK, title=title, alignment="left", **place)
        legend.get_title().set(color=GREY, fontsize=8.5)


def _compact(value: float, position: float) -> str:
    """A tick's label: 40000 is 40k."""
    return EngFormatter(sep="")(value) if abs(value) >= 10_000 else f"{value:.6g}".replace("-", "−")


def _plain(name: str) -> str:
    """A name that matplotlib takes as it stands: no formula between dollars, and not left out of legends."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")
