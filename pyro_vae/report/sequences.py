"""Sections on sequences: draws, states as they are filtered and smoothed, forecasts, paths of the states."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..evaluation import isolated
from ..sequences import latent_rmse
from .charts import BLUE, GREY, INK, LABEL_COLORS, RED, Section, chart, legend, panels, plain
from .subject import Subject

__all__ = ["Sequences"]

BAND = (0.05, 0.95)
FEW_COLUMNS = 6  # more are shown as a roll, a column of the picture for each step
DRAWS = 300


class Sequences:
    """Sections for a `StateSpaceModel` and its guide, in original units; for another pair what can be shown of it."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.model, self.guide, self.dataset = subject.run.model, subject.run.guide, subject.dataset
        test = self.dataset.test
        lengths = test.kwargs["lengths"].cpu()
        long = (lengths >= lengths.double().median()).nonzero().flatten()
        self.shown = long[:3].tolist()
        D = test.x.shape[-1]
        self.rolls = D > FEW_COLUMNS
        self.names = [plain(name) for name in self.dataset.columns or [f"x{d + 1}" if D > 1 else "x" for d in range(D)]]
        self.device = next(iter(self.model.parameters()), torch.zeros(())).device

    def sections(self) -> list[Section]:
        with isolated(self.model, self.guide):
            torch.manual_seed(self.subject.seed)
            found = [self.samples()]
            if hasattr(self.model, "forecast"):
                found += [self.forecasts(), self.states(), self.paths()]
        return found

    def one(self, i: int, steps: int | None = None) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """A test sequence by itself, or its first steps, as arguments of model and guide."""
        (x,), kwargs = self.dataset.test.batch(torch.tensor([i]))
        length = kwargs.pop("lengths")
        T = int(length) if steps is None else steps
        args = [x, kwargs.pop("u")] if "u" in kwargs else [x]
        found = {name: value[:, :T].to(self.device) for name, value in kwargs.items()}
        return tuple(a[:, :T].to(self.device) for a in args), {
            **found,
            "lengths": length.new_tensor([T]).to(self.device),
        }

    def data(self, i: int) -> np.ndarray:
        """(T, D), NaN where a value is missing."""
        test = self.dataset.test
        x = test.observed[i].where(test.counted[i], torch.nan)[: int(test.kwargs["lengths"][i])]
        return self.restored(x)

    def restored(self, x: Tensor) -> np.ndarray:
        return self.dataset.restore(x.double().cpu()).numpy()

    def samples(self) -> Section:
        data = [self.data(i) for i in self.shown]
        drawn = []
        for i, own in zip(self.shown, data, strict=True):
            (_, *u), _ = self.one(i)
            size = {"u": u[0]} if u else {"num_data": 1, "num_steps": len(own)}
            drawn.append(self.restored(self.model(**size)[0]))
        text = "Above, test sequences; below, draws from the model, as long as they are."
        if u:
            text += " The draws have the inputs of the sequences above them."
        figure, axes = panels(2 * len(data), columns=len(data), height=2.0)
        for j, (above, below) in enumerate(zip(data, drawn, strict=True)):
            first, second = axes[j], axes[j + len(data)]
            first.set_title("data", fontsize=10, color=INK, loc="left")
            second.set_title("draw", fontsize=10, color=INK, loc="left")
            self.draw(first, above)
            self.draw(second, below)
            if not self.rolls:
                low, high = np.nanmin([*map(np.nanmin, data)]), np.nanmax([*map(np.nanmax, data)])
                margin = 0.15 * (high - low) or 1.0
                for axis in (first, second):
                    axis.set_ylim(low - margin, high + margin)
        if not self.rolls and len(self.names) > 1:
            figure.legend(
                *axes[0].get_legend_handles_labels(),
                loc="outside lower center", ncols=FEW_COLUMNS, frameon=False, fontsize=9, labelcolor=INK,
            )  # fmt: skip
        return Section("Samples", text, (chart("samples", figure, "Test sequences above draws from the model"),))

    def draw(self, axis: Any, x: np.ndarray) -> None:
        """A sequence (T, D): lines of its columns, or a roll."""
        if self.rolls:
            self.roll(axis, x)
            return
        for d, name in enumerate(self.names):
            axis.plot(x[:, d], color=LABEL_COLORS[d], lw=1.4, label=name)
        axis.set_xlabel("step", color=INK, fontsize=9)

    def roll(self, axis: Any, x: np.ndarray, begin: int = 0) -> None:
        low, high = (np.nanmin(self.data(self.shown[0])), np.nanmax(self.data(self.shown[0])))
        extent = (begin - 0.5, begin + len(x) - 0.5, -0.5, x.shape[1] - 0.5)
        axis.imshow(x.T, origin="lower", aspect="auto", cmap="Greys", vmin=low, vmax=high, extent=extent)
        axis.set_xlabel("step", color=INK, fontsize=9)
        used = np.flatnonzero(np.nan_to_num(np.concatenate([self.data(i) for i in self.shown])).any(0))
        axis.set_ylim(used.min() - 3, used.max() + 3)
        axis.set_xlim(axis.get_xlim()[0], begin + len(x) - 0.5)

    def forecasts(self) -> Section:
        """What follows three quarters of a test sequence, against what did."""
        rows: list[tuple[np.ndarray, np.ndarray, int]] = []
        for i in self.shown:
            own = self.data(i)
            begin = max(1, 3 * len(own) // 4)
            args, kwargs = self.one(i, begin)
            size: dict[str, Any] = {"num_steps": len(own) - begin}
            if len(args) > 1:
                size = {"u_future": self.one(i)[0][1][:, begin:]}
            if len(own) > begin:
                drawn = self.model.forecast(self.guide, *args, **kwargs, **size, num_samples=DRAWS)[:, 0]
                rows.append((own, self.restored(drawn), begin))
        if not rows:
            return Section("Forecasts", "The test sequences are too short to foretell a part of them.")
        inside = [_inside(drawn, own[begin:]) for own, drawn, begin in rows]
        covered = np.concatenate([each.flatten() for each in inside])
        share = f"{np.nanmean(covered):.0%} of the values that followed lie within the 5 % to 95 % band"
        if self.rolls:
            figure, axes = panels(2 * len(rows), columns=len(rows), height=2.0)
            for j, (own, drawn, begin) in enumerate(rows):
                self.roll(axes[j], own)
                together = np.concatenate([own[:begin], drawn.mean(0)])
                self.roll(axes[j + len(rows)], together)
                for axis, title in ((axes[j], "what followed"), (axes[j + len(rows)], "expected")):
                    axis.axvline(begin - 0.5, color=RED, lw=1.2)
                    axis.set_title(title, fontsize=10, color=INK, loc="left")
            text = "Test sequences, and below each what the model expects after the line: averages of its draws."
        else:
            columns = range(min(3, len(self.names)))
            figure, axes = panels(len(rows) * len(columns), columns=len(rows), height=1.9)
            for k, d in enumerate(columns):
                for j, (own, drawn, begin) in enumerate(rows):
                    axis, steps = axes[k * len(rows) + j], np.arange(begin, len(own))
                    for low, high, alpha in ((0.05, 0.95, 0.18), (0.25, 0.75, 0.3)):
                        band = np.quantile(drawn[..., d], [low, high], axis=0)
                        axis.fill_between(steps, *band, color=BLUE, alpha=alpha, lw=0)
                    axis.plot(steps, np.median(drawn[..., d], 0), color=BLUE, lw=1.6, label="median of draws")
                    axis.plot(own[:, d], color=INK, lw=1.1, label="data")
                    axis.axvline(begin - 0.5, color=RED, lw=1.0)
                    axis.set_title(self.names[d], fontsize=10, color=INK, loc="left")
                    axis.set_xlabel("step", color=INK, fontsize=9)
            figure.legend(
                *axes[0].get_legend_handles_labels(),
                loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelcolor=INK,
            )  # fmt: skip
            text = (
                "Test sequences, and after the line what the model foretells without seeing it: the median, and bands "
                f"that hold half and nine tenths of its draws. {share}."
            )
        return Section("Forecasts", text, (chart("forecasts", figure, "Forecasts against what followed"),))

    def states(self) -> Section:
        """Bands of z by particles and by the guide."""
        i = self.shown[0]
        args, kwargs = self.one(i)
        smooth = self.model.smooth(self.guide, *args, **kwargs, num_samples=DRAWS)[:, 0].cpu()  # (S, T, Z)
        filtered = self.model.filter(*args, **kwargs, num_particles=1000)
        weights = filtered.log_weights[:, 0].exp()[..., None]
        z = filtered.z[:, 0]
        mean = (weights * z).sum(0).cpu()
        spread = ((weights * z.square()).sum(0).cpu() - mean.square()).clamp(min=0).sqrt()
        order = smooth.mean(0).var(0, correction=0).argsort(descending=True)[:3].tolist()
        truth = self.dataset.test.latents
        known = truth is not None and truth.shape[-1] == smooth.shape[-1]
        knows = "what came before, too" if getattr(self.guide, "causal", False) else "the whole sequence"
        figure, axes = panels(len(order), columns=1, width=3 * 8.4, height=1.9)
        for axis, d in zip(axes, order, strict=True):
            steps = np.arange(len(mean))
            axis.fill_between(
                steps, mean[:, d] - 1.64 * spread[:, d], mean[:, d] + 1.64 * spread[:, d], color=GREY, alpha=0.35, lw=0,
                label="filtered: by what came before",
            )  # fmt: skip
            low, high = smooth[..., d].quantile(torch.tensor(BAND), dim=0)
            axis.fill_between(steps, low, high, color=BLUE, alpha=0.4, lw=0, label=f"by the guide: {knows}")
            axis.plot(smooth[..., d].mean(0), color=BLUE, lw=1.4)
            if known and truth is not None:
                axis.plot(truth[i, : len(mean), d].cpu(), color=RED, lw=1.1, label="truth")
            axis.set_title(f"z{d + 1}", fontsize=10, color=INK, loc="left")
        axes[-1].set_xlabel("step", color=INK, fontsize=9)
        axes[0].legend(
            loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False, fontsize=9, labelcolor=INK
        )  # fmt: skip
        text = (
            "The latent numbers of a test sequence that move most, with bands of nine tenths: grey by a particle "
            f"filter, which knows what came before, blue by the guide, which knows {knows}."
        )
        if known and truth is not None:
            error = latent_rmse(smooth[:, None], truth[i : i + 1, : len(mean)].cpu())
            text += f" The smoothed mean is {error:.3g} off the truth, as a root mean square."
        ess = float(filtered.ess.mean())
        text += f" Of 1,000 particles {ess:,.0f} count, on average."
        plot = chart("states", figure, "Bands of latent states, filtered and smoothed")
        return Section("The states of a sequence", text, (plot,))

    def paths(self) -> Section:
        """A phase portrait: smoothed means of test sequences, the first against the second direction."""
        steps = int(self.dataset.test.kwargs["lengths"].median())
        count = min(30, len(self.dataset.test), max(4, 500 // steps))  # more lines hide each other
        found = []
        for i in range(count):
            args, kwargs = self.one(i)
            found.append(self.model.smooth(self.guide, *args, **kwargs, num_samples=50)[:, 0].mean(0).cpu().double())
        every = torch.cat(found)
        if len(every) < 3:
            return Section("Paths of the states", "The test sequences have too few steps to draw a path of.")
        names = ["z1", "z2"]
        text = f"The smoothed means of {count} test sequence{'s' if count > 1 else ''}"
        if every.shape[-1] == 1:
            pairs = [torch.cat([path[:-1], path[1:]], -1) for path in found]
            names = ["z at a step", "z at the next"]
        else:
            _, singular_values, directions = torch.linalg.svd(every - every.mean(0), full_matrices=False)
            pairs = found
            if every.shape[-1] > 2:
                pairs = [(path - every.mean(0)) @ directions[:2].mT for path in found]
                share = float(singular_values[:2].square().sum() / singular_values.square().sum())
                text += f", on their first two principal components ({share:.0%} of the variance)"
                names = ["first principal component", "second principal component"]
        figure, (axis,) = panels(1, width=6.2, height=5.2)
        for j, pair in enumerate(pairs):
            x, y = pair.numpy().T
            axis.plot(x, y, color=BLUE, lw=0.8, alpha=0.55)
            axis.plot(x[:1], y[:1], "o", color=RED, ms=4, label=None if j else "first step")
        axis.set_xlabel(names[0], color=INK)
        axis.set_ylabel(names[1], color=INK)
        legend(axis, "best")
        return Section("Paths of the states", f"{text}.", (chart("paths", figure, "Paths of latent states"),))


def _inside(drawn: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Where the truth (H, D) is within the band of draws (S, H, D); NaN where it is missing."""
    low, high = np.quantile(drawn, BAND, axis=0)
    return np.where(np.isnan(truth), np.nan, (low <= truth) & (truth <= high))
