"""Sections on tables."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..prediction import reconstruct
from .charts import BLUE, GREY, INK, LABEL_COLORS, WALK, Plot, Section, chart, counted, legend, limits, panels, plain
from .sections import memory
from .subject import Coded, dimension

__all__ = ["Tables"]


class Tables:
    """Sections whose figures are charts of columns, in original units."""

    def __init__(self, subject: Coded) -> None:
        self.subject = subject
        D = math.prod(subject.dataset.event_shape)
        self.names = [plain(name) for name in subject.dataset.columns or (f"column {d}" for d in range(D))]
        varying = np.nanstd(subject.dataset.train.x.flatten(1).cpu().numpy(), 0).nonzero()[0].tolist()
        self.worth_showing = varying or list(range(D))

    def restored(self, x: Tensor) -> np.ndarray:
        return self.subject.dataset.restore(x.cpu().double()).flatten(1).numpy()

    def chosen(self, count: int) -> tuple[list[int], str]:
        columns = self.worth_showing[:count]
        if len(columns) == len(self.names):
            return columns, ""
        return columns, f" The first {len(columns)} of {len(self.names)} columns that vary are shown."

    def samples(self) -> Section:
        subject = self.subject
        columns, which = self.chosen(12)
        data = self.restored(subject.dataset.train.observed[:5000])
        drawn = self.restored(subject.sample(len(data), mean=False))
        figure, axes = panels(len(columns))
        for axis, d in zip(axes, columns, strict=True):
            own = data[~np.isnan(data[:, d]), d]
            distinct = np.unique(own)
            edges = np.linspace(*limits(own), 31)
            if len(distinct) <= 30 and (distinct == distinct.round()).all():
                edges = np.arange(distinct[0] - 0.5, distinct[-1] + 1)
            axis.hist(own, edges, color=GREY, alpha=0.45, label="data")
            axis.hist(drawn[:, d], edges, histtype="step", color=BLUE, lw=1.6, label="samples")
            axis.set_yticks([])
            axis.spines["left"].set_visible(False)
            axis.set_title(self.names[d], fontsize=10, color=INK, loc="left")
        legend(axes[0], "best")
        return Section(
            "Samples",
            f"Each column's histogram over {len(data):,} training rows, and over as many rows drawn from the "
            f"model; then the columns that go together most.{which}",
            (chart("samples", figure, "Histograms, data against samples"), *self.pairs(data, drawn)),
        )

    def pairs(self, data: np.ndarray, drawn: np.ndarray) -> Iterator[Plot]:
        """The three pairs of columns that go together most: data above, samples below."""
        columns = self.worth_showing[:50]
        if len(columns) < 2:
            return
        first, second = np.triu_indices(len(columns), 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            correlation = np.ma.corrcoef(np.ma.masked_invalid(data[:, columns].T)).filled(0.0)
            strength = np.nan_to_num(np.abs(correlation)[first, second])
        chosen = [(columns[first[i]], columns[second[i]]) for i in (-strength).argsort()[:3]]
        figure, axes = panels(2 * len(chosen), columns=len(chosen), height=2.4)
        for i, (a, b) in enumerate(chosen):
            above, below = axes[i], axes[i + len(chosen)]
            for axis, rows, color in ((above, data, GREY), (below, drawn, BLUE)):
                axis.scatter(rows[:1000, a], rows[:1000, b], s=7, color=color, alpha=0.5, lw=0)
                axis.set(xlim=limits(data[:, a]), ylim=limits(data[:, b]))
            above.set_title("data", fontsize=10, color=INK, loc="left")
            below.set_title("samples", fontsize=10, color=INK, loc="left")
            for axis in (above, below):
                axis.set_xlabel(self.names[a], color=INK, fontsize=9)
                axis.set_ylabel(self.names[b], color=INK, fontsize=9)
        yield chart("pairs", figure, "Scatter plots of pairs of columns, data above samples")

    def reconstructions(self) -> Section:
        subject = self.subject
        columns, which = self.chosen(6)
        test = subject.dataset.test.observed[:500].cpu()
        data = self.restored(test)
        remade = self.restored(reconstruct(subject.run.model, subject.run.guide, test))
        figure, axes = panels(len(columns), height=2.3)
        for axis, d in zip(axes, columns, strict=True):
            middle = np.nanmean(data[:, d]) if not np.isnan(data[:, d]).all() else 0.0
            axis.axline((middle, middle), slope=1, color=GREY, lw=1, zorder=0)
            axis.scatter(data[:, d], remade[:, d], s=9, color=BLUE, alpha=0.5, lw=0)
            axis.set(xlim=limits(data[:, d]), ylim=limits(data[:, d]))
            axis.set_title(self.names[d], fontsize=10, color=INK, loc="left")
        return Section(
            "Reconstructions",
            f"For {len(test):,} test rows, a column's true value (across) against what is left of it after "
            f"the row has been squeezed into {counted(subject.code.shape[1], 'number')} and unfolded again "
            f"(up). On the line, nothing is lost.{which}",
            (chart("reconstructions", figure, "True against reconstructed values"),),
        )

    def traversals(self) -> Section:
        subject, title = self.subject, "What the latent numbers mean"
        columns, which = self.chosen(6)
        dims, values = subject.walked(6), torch.linspace(-2.5, 2.5, 41)
        standard = torch.zeros(len(dims), len(values), subject.code.shape[1])
        for row, d in enumerate(dims):
            standard[row, :, d] = values
        decoded = subject.walk(standard)
        if isinstance(decoded, str):
            return Section(title, decoded)
        train = subject.dataset.train.x.flatten(1).cpu().numpy()
        mean, scale = (torch.from_numpy(moment(train, 0)) for moment in (np.nanmean, np.nanstd))
        decoded = (decoded.flatten(2) - mean) / scale
        figure, axes = panels(len(dims), sharey=True)
        for axis, d, x in zip(axes, dims, decoded, strict=True):
            for color, j in zip(LABEL_COLORS, columns, strict=False):
                axis.plot(values, x[:, j], color=color, lw=1.6, label=self.names[j])
            axis.set_title(dimension(subject, d), fontsize=10, color=INK, loc="left")
        figure.legend(
            *axes[0].get_legend_handles_labels(),
            loc="outside lower center", ncols=2 * min(3, len(dims)), frameon=False, fontsize=9, labelcolor=INK,
        )  # fmt: skip
        return Section(
            title,
            f"Each panel turns one latent number {WALK}, and follows the average of every column, in "
            f"standard deviations of the training data.{which}",
            (chart("traversals", figure, "Lines of decoded columns along each latent dimension"),),
        )

    def nearest(self) -> Section:
        return Section("Does it memorise?", memory(self.subject))
