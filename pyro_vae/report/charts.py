"""Figures of the page, and the words of numbers."""

from __future__ import annotations

import base64
import io
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator

__all__ = [
    "BLUE",
    "FAINT",
    "GREY",
    "INK",
    "LABEL_COLORS",
    "PICTURE_WIDTH",
    "Plot",
    "RED",
    "Section",
    "WALK",
    "chart",
    "counted",
    "duration",
    "legend",
    "limits",
    "panels",
    "plain",
    "signed",
]

INK, FAINT = "#3d4450", "#d5d8dd"
BLUE, RED, GREY = "#33658a", "#d1603d", "#939ca8"
LABEL_COLORS = [  # of middling lightness, which dark mode's inversion keeps
    *("#3b6ea8", "#cf6f17", "#3f8f45", "#cc4141", "#8a5fa0"),
    *("#2a8f8c", "#a8841a", "#7d5c4a", "#d0578f", "#6f7884"),
]
WALK = "from −2.5 to 2.5 standard deviations of the prior and leaves the others at its mean"
PICTURE_WIDTH = 1680  # pixels of a full-width grid of pictures, shown at half that size


@dataclass(frozen=True)
class Plot:
    name: str
    png: bytes
    description: str  # for those who cannot see it
    kind: str  # "picture", shown as it is, or "chart", whose dark ink turns light in dark mode

    @property
    def source(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height on the page: half the PNG's, so that dense screens show every pixel of it."""
        width, height = struct.unpack(">II", self.png[16:24])
        return -(-width // 2), -(-height // 2)


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    figures: tuple[Plot, ...] = ()


def limits(values: np.ndarray) -> tuple[float, float]:
    """An axis that nearly all values fit on; those that are missing need no place."""
    there = values[~np.isnan(values)]
    low, high = np.quantile(there, [0.002, 0.998]) if len(there) else (0.0, 1.0)
    margin = 0.08 * (high - low) or 0.5
    return low - margin, high + margin


LONGEST_NAME = 40


def plain(name: str) -> str:
    """A name that matplotlib takes as it stands: no formula between dollars, not left out of legends, and not longer
    than its chart."""
    name = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def panels(
    count: int, columns: int = 3, width: float = 8.4, height: float = 1.9, sharey: bool = False
) -> tuple[Figure, list[Any]]:
    """A figure with `count` panels of this height in inches, `columns` beside each other."""
    columns = min(count, columns)
    rows = -(-count // columns)
    if count > 1:
        width *= columns / 3
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.03)  # inches, but wspace
    figure = Figure(figsize=(width, height * rows), layout=layout)
    FigureCanvasAgg(figure)
    first = figure.add_subplot(rows, columns, 1)
    axes = [first]
    for i in range(1, count):
        axes.append(figure.add_subplot(rows, columns, i + 1, sharey=first if sharey else None))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(FAINT)
        axis.tick_params(colors=INK, labelsize=9, length=0, pad=5)
        axis.set_facecolor("none")
        if count > 1:
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
                side.set_major_formatter(_compact)
    return figure, axes


def _compact(value: float, position: float) -> str:
    """A tick's label: 40000 is 40k."""
    return EngFormatter(sep="")(value) if abs(value) >= 10_000 else f"{value:.6g}".replace("-", "−")


def legend(axis: Any, location: str) -> None:
    axis.legend(loc=location, frameon=False, fontsize=9, labelcolor=INK)


def chart(name: str, figure: Figure, description: str) -> Plot:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, transparent=True)
    return Plot(name, buffer.getvalue(), description, "chart")


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def signed(value: float) -> str:
    return f"{value:.1f}".replace("-", "−")


def duration(seconds: float) -> str:
    if seconds < 100:
        return counted(round(seconds), "second")
    if seconds < 6000:
        return counted(round(seconds / 60), "minute")
    return f"{seconds / 3600:.1f} hours"
