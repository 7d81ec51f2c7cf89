"""Sections for all data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..prediction import encodings
from .charts import BLUE, GREY, INK, LABEL_COLORS, RED, Section, chart, counted, duration, legend, panels, plain, signed
from .subject import Coded, Subject

__all__ = ["HINTS", "kl_per_dimension", "latent_space", "memory", "score_rows", "training_curve"]


def training_curve(subject: Subject) -> Section:
    history, elbo = subject.run.history, subject.evaluation.elbo
    if not history:
        return Section("Training", "The run holds no history of its training.")
    epochs = [record["epoch"] for record in history]
    figure, (axis,) = panels(1, width=6.2, height=3.4)
    marker = "o" if len(epochs) == 1 else None
    for key, color, label in (("bound", GREY, "training"), ("valid", BLUE, "validation")):
        if any(key in record for record in history):
            bounds = [record.get(key, math.nan) for record in history]
            axis.plot(epochs, bounds, color=color, lw=1.8, marker=marker, label=label)
    axis.axhline(elbo.value, color=RED, lw=1.2, ls=(0, (4, 3)), zorder=0)
    stopped_early = "patience" in subject.run.config and all("valid" in record for record in history)
    kept = max(history, key=lambda record: record["valid"])["epoch"] if stopped_early else epochs[-1]
    label = f"test, weights of epoch {kept}: {signed(elbo.value)}"
    axis.plot([kept], [elbo.value], "o", color=RED, ms=6, label=label)
    settled = history[-(-len(history) // 10) if len(history) > 4 else 0 :]
    shown = [record[key] for record in settled for key in ("bound", "valid") if key in record] + [elbo.value]
    margin = 0.06 * (max(shown) - min(shown)) or 1.0
    axis.set_ylim(min(shown) - margin, max(shown) + margin)
    axis.set_xlabel("epoch", color=INK)
    axis.set_ylabel(f"bound, nats per {subject.noun}", color=INK)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    legend(axis, "lower right")
    text = (
        f"The bound on log p(x) after each of {counted(len(history), 'epoch')} "
        f"({duration(history[-1]['seconds'])}); higher is better."
    )
    if not any("valid" in record for record in history):
        text += " No validation data were scored during training."
    if any(record.get("kl_weight", 1.0) != 1.0 for record in history):
        text += " The training bound is taken at the KL weight of its epoch, the others at weight 1."
    return Section("Training", text, (chart("training", figure, "The bound against epochs"),))


def latent_space(subject: Coded) -> Section:
    dataset = subject.dataset
    valid = encodings(subject.run.guide, dataset.valid.observed[:2500], seed=subject.seed)
    code = torch.cat([valid[name].mean.flatten(1) for name in subject.latents], dim=1)
    code = torch.cat([subject.code[:2500], code]).double()
    labels = None
    if dataset.test.labels is not None and dataset.valid.labels is not None:
        labels = torch.cat([dataset.test.labels[:2500].cpu(), dataset.valid.labels[:2500].cpu()])
    D = code.shape[1]
    text = f"Where the guide puts {len(code):,} {subject.noun}s that training did not see: the mean of q(z|x)"
    names = tuple(subject.names[:2])
    if D > 2:
        centred = code - code.mean(0)
        _, singular_values, directions = torch.linalg.svd(centred, full_matrices=False)
        code = centred @ directions[:2].mT
        share = (singular_values[:2].square().sum() / singular_values.square().sum()).item()
        text += f", reduced to its first two principal components ({share:.0%} of the variance)"
        names = ("first principal component", "second principal component")
    elif D == 1:
        heights = torch.rand(len(code), 1, generator=torch.Generator().manual_seed(subject.seed)).double()
        code = torch.cat([code, heights], dim=1)
        text += ", spread at random from bottom to top so that points do not hide each other"
        names = (subject.names[0], "")
    figure, (axis,) = panels(1, width=6.2, height=5.6 if D > 1 else 2.6)
    x, y = code.numpy().T
    if labels is None:
        axis.scatter(x, y, s=11, color=BLUE, alpha=0.6, lw=0)
    else:
        text += ", coloured by label, which the model was never shown"
        _scatter_by_label(figure, axis, x, y, labels, dataset.classes)
    if D > 1:
        axis.set_aspect("equal", adjustable="datalim")
    else:
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
    axis.set_xlabel(names[0], color=INK)
    axis.set_ylabel(names[1], color=INK)
    return Section("The latent space", text + ".", (chart("latent_space", figure, "Scatter plot of latent codes"),))


def _scatter_by_label(
    figure: Figure, axis: Any, x: np.ndarray, y: np.ndarray, labels: Tensor, classes: Sequence[str] | None
) -> None:
    values = labels.unique().tolist()
    if len(values) > len(LABEL_COLORS) or labels.is_floating_point():
        points = axis.scatter(x, y, s=11, c=labels.numpy(), cmap="viridis", alpha=0.8, lw=0)
        bar = figure.colorbar(points, ax=axis, shrink=0.6, aspect=30)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=INK, labelsize=9, length=0)
        bar.set_label("label", color=INK)
        return
    for color, value in zip(LABEL_COLORS, values, strict=False):
        rows = (labels == value).numpy()
        label = plain(classes[value]) if classes else value
        axis.scatter(x[rows], y[rows], s=13, color=color, alpha=0.8, lw=0, label=label)
    axis.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, labelcolor=INK,
        handletextpad=0.1, markerscale=1.6,
    )  # fmt: skip


def kl_per_dimension(subject: Coded) -> Section:
    title, kl = "What each latent number carries", subject.evaluation.kl_per_dim
    if kl is None:
        return Section(
            title,
            "The KL divergence has no parts per dimension here: prior and posterior do not both factorise.",
        )
    ranked = subject.order[:64]
    figure, (axis,) = panels(1, width=6.2, height=2.8)
    for active, color, label in ((True, BLUE, "active"), (False, GREY, "idle")):
        bars = [i for i, d in enumerate(ranked) if bool(subject.active[d]) is active]
        if bars:
            axis.bar(bars, [float(kl[ranked[i]]) for i in bars], width=0.7, color=color, label=label)
    axis.set_ylabel("KL, nats", color=INK)
    if len(ranked) <= 20:
        axis.set_xticks(range(len(ranked)), [subject.names[d] for d in ranked])
    else:
        axis.set_xlabel("latent dimensions, most informative first", color=INK)
    axis.set_xlim(-0.6, max(len(ranked), 8) - 0.4)
    if bool(subject.active[ranked].any()) and not bool(subject.active[ranked].all()):
        legend(axis, "upper right")
    which = f" The {len(ranked)} largest of {len(kl)} are shown." if len(ranked) < len(kl) else ""
    return Section(
        title,
        f"KL(q(z|x) ‖ p(z)) per latent dimension: the information about x that it holds. "
        f"{subject.evaluation.active_units} of {counted(len(kl), 'dimension')} "
        f"{'is' if subject.evaluation.active_units == 1 else 'are'} active: the code moves with the data "
        f"(variance above 0.01).{which}",
        (chart("kl_per_dimension", figure, "Bars of KL per latent dimension"),),
    )


def memory(subject: Coded) -> str:
    """Whether draws x ~ p(x) lie closer to the training data than unseen data do."""
    train = subject.dataset.train.observed.flatten(1).cpu()
    test = subject.dataset.test.observed[:200].flatten(1).cpu()
    average = train.nanmean(0)  # in the place of what is missing
    train, test = (each.where(~each.isnan(), average) for each in (train, test))
    drawn = subject.sample(len(test), mean=False).flatten(1)
    ours, theirs = (torch.cdist(x, train).amin(1).median().item() for x in (drawn, test))
    noun = subject.noun
    comparison = (
        f"the median distance from a fresh draw x ~ p(x) to its nearest training {noun} is {ours:.2f}, and "
        f"from a test {noun} {theirs:.2f}"
    )
    if ours < 0.75 * theirs:
        return f"Perhaps: {comparison}. Draws stay closer to the training data than new data do."
    place = "about as far away as" if ours < 1.1 * theirs else "farther away than"
    return f"No sign of it: {comparison}. Draws lie {place} new data do."


HINTS = {
    "elbo": "lower bound on log p(x), the one that training raises",
    "log_evidence": "closer lower bound on log p(x), from importance sampling",
    "log_evidence_total": "that of all data together, in nats",
    "log_predictive": "log p(x) of each datum at draws of the sites that all data share",
    "annealed": "log p(x) by annealed importance sampling, which does not rest on the guide",
    "kl": "information that the code z holds about x",
    "ess": "effective sample size: how many of the draws count",
    "khat": "below 0.7, the log evidence can be trusted",
}


def score_rows(subject: Subject) -> list[dict[str, Any]]:
    evaluation = subject.evaluation
    rows = []
    for name, estimate in evaluation.table().items():
        hint = HINTS[name]
        if name == "khat":
            each = evaluation.per_datum.get("khat", torch.tensor([estimate.value]))  # global sites have one
            share = (each > 0.7).double().mean().item()
            if math.isnan(estimate.value):
                hint = "needs 25 draws or more per datum"
            elif share > 0 and evaluation.global_sites:
                hint = "above 0.7: a few draws carry nearly all the weight, and log p(x) is likely higher"
            elif share > 0:
                hint = (
                    f"above 0.7 for {share:.0%} of the {subject.noun}s: a few draws carry nearly all the "
                    "weight there, and log p(x) is likely higher than the log evidence"
                )
        if name == "annealed" and evaluation.annealing is not None:
            hint = "; ".join([hint, *evaluation.annealing.notes[1:]])
        rows.append({"name": name.replace("_", " "), "estimate": estimate, "hint": hint})
    for name, estimate in (evaluation.per_step or {}).items():
        hint = "the same in nats per step, of which long sequences have more"
        rows.append({"name": f"{name.replace('_', ' ')} / step", "estimate": estimate, "hint": hint})
    return rows
