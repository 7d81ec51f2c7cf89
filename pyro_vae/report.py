"""`write_report`: one self-contained HTML page on what a run has learned, and its figures as PNG files."""

from __future__ import annotations

import base64
import io
import math
import platform
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyro
import tomli_w
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image
from pyro import poutine
from torch import Tensor, nn

from .checkpoint import atomic
from .data import Dataset
from .evaluation import Estimate, Evaluation, evaluate, isolated
from .log_weights import samples
from .prediction import decode, encodings, reconstruct, sample
from .training import Run

__all__ = ["independent_baseline", "summary_sentence", "write_report"]

INK, FAINT = "#3d4450", "#d5d8dd"
BLUE, RED, GREY = "#33658a", "#d1603d", "#939ca8"
LABEL_COLORS = [  # of middling lightness, which dark mode's inversion keeps
    *("#3b6ea8", "#cf6f17", "#3f8f45", "#cc4141", "#8a5fa0"),
    *("#2a8f8c", "#a8841a", "#7d5c4a", "#d0578f", "#6f7884"),
]
WALK = "from −2.5 to 2.5 standard deviations of the prior and leaves the others at its mean"
PICTURE_WIDTH = 1680  # pixels of a full-width grid of pictures, shown at half that size


def write_report(
    run: Run,
    dataset: Dataset,
    *,
    num_samples: int = 100,
    seed: int = 0,
    progress: bool = True,
    evaluation: Evaluation | None = None,
) -> Path:
    """Write ``report.html`` into the run's directory, and its figures into ``figures/``; returns its path.

    The page is one file: pictures are embedded, and it asks nothing of the network. It shows samples,
    reconstructions, the training curve, traversals, the latent space, KL per dimension, nearest training
    data, scores and configuration.

    Args:
        run: what `fit` returned, or `load_run`.
        dataset: what it was trained on: pictures (C, H, W), or rows of a table (D,).
        num_samples: draws per test datum for the scores.
        seed: of all draws.
        evaluation: `evaluate`'s scores on ``dataset.test``, where they are at hand; else they are computed.

    Raises:
        ValueError: data that the model cannot score, or an `evaluation` of other data.

    Example:
        >>> import tempfile
        >>> from pyro_vae import fit, load_dataset
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE, likelihoods
        >>> digits = load_dataset("digits")
        >>> model = VAE(digits.event_shape, latent_dim=2, likelihood=likelihoods.Binomial(16))
        >>> guide, out = AmortizedGuide(model), tempfile.mkdtemp()
        >>> run = fit(model, guide, digits.train, epochs=1, out=out, progress=False)
        >>> write_report(run, digits, num_samples=5, progress=False).name
        'report.html'
    """
    if evaluation is None:
        evaluation = evaluate(run.model, run.guide, dataset.test, num_samples=num_samples, seed=seed, progress=progress)
    subject = _Subject(run, dataset, evaluation, seed)
    make = _Pictures(subject) if subject.pictures else _Tables(subject)
    hero, *sections = [
        make.samples(),
        make.reconstructions(),
        _training_curve(subject),
        make.traversals(),
        _latent_space(subject),
        _kl_per_dimension(subject),
        make.nearest(),
    ]
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    for figure in (figure for section in (hero, *sections) for figure in section.figures):
        with atomic(folder / f"{figure.name}.png") as temporary:
            temporary.write_bytes(figure.png)
    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(template).render(
        title=f"What the {type(run.model).__name__ if isinstance(run.model, nn.Module) else 'model'} learned "
        f"from {dataset.name}",
        dataset=dataset,
        sentence=summary_sentence(run.model, evaluation, dataset),
        hero=hero,
        sections=sections,
        scores=_score_rows(subject),
        evaluation=evaluation,
        noun=subject.noun,
        facts=_facts(run, seed),
        config=tomli_w.dumps(run.config),
    )
    path = run.path / "report.html"
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def summary_sentence(model: Callable, evaluation: Evaluation, dataset: Dataset) -> str:
    """How good the fit is, in one sentence: the test log-likelihood beside `independent_baseline`.

    Raises:
        ValueError: `evaluation` is not of ``dataset.test``.
    """
    if evaluation.num_data != len(dataset.test):
        raise ValueError(
            f"expected scores of the {len(dataset.test)} test data, got scores of {evaluation.num_data}: "
            "pass evaluate(model, guide, dataset.test)"
        )
    noun = _noun(dataset)
    part = "pixel" if noun == "image" else "column"
    baseline = independent_baseline(model, dataset)
    discrete = _observation(model).support.is_discrete
    score = evaluation.log_evidence
    start = f"On {evaluation.num_data:,} {noun}s that it has never seen, this model "
    if discrete:
        sentence = f"{start}needs at most {-score.value:.1f} ± {score.standard_error:.1f} nats per {noun}"
    else:
        sentence = (
            f"{start}reaches a log-density of at least {_signed(score.value)} ± {score.standard_error:.1f} "
            f"nats per {noun}"
        )
    if baseline is None:
        return f"{sentence} ({'fewer' if discrete else 'higher'} is better)."
    if discrete:
        sentence += (
            f", where knowing how each {part} is distributed, and nothing more, needs {-baseline.value:.1f} "
            f"± {baseline.standard_error:.1f} (fewer is better)"
        )
    else:
        sentence += (
            f", where knowing how each {part} is distributed, and nothing more, reaches "
            f"{_signed(baseline.value)} ± {baseline.standard_error:.1f} (higher is better)"
        )
    return sentence + ("." if score.value > baseline.value else ": it has not learned more than that yet.")


def independent_baseline(model: Callable, dataset: Dataset) -> Estimate | None:
    r"""The test log-likelihood, in nats per datum, of a model without latent variables.

    Every pixel or column stands on its own: ``p(x) = prod_d f(x_d; theta_d)``, f of the model's family
    p(x|z), with theta_d fitted to the training data and to one more datum, the overall average, so that no
    value that training lacks is impossible. With m and v for averages over all d, ``m_d = (sum_n x_nd + m) /
    (N + 1)`` is the mean of a Bernoulli, Binomial, continuous Bernoulli (its logits within +-15.9, as in
    float32) or normal, and ``(sum_n (x_nd - m_d)^2 + v) / (N + 1)`` the normal's variance. None for other
    families.

    Example:
        >>> from pyro_vae import load_dataset
        >>> from pyro_vae.models import VAE, likelihoods
        >>> digits = load_dataset("digits")
        >>> print(independent_baseline(VAE((1, 8, 8), likelihood=likelihoods.Binomial(16)), digits))
        -254.65 ± 2.82
    """
    observation = _observation(model)
    train, test = (split.x.double().cpu() for split in (dataset.train, dataset.test))
    mean = (train.sum(0) + train.mean()) / (len(train) + 1)
    fitted: torch.distributions.Distribution
    match type(observation).__name__:
        case "Bernoulli":
            fitted = torch.distributions.Bernoulli(probs=mean)
        case "Binomial":
            total_count = observation.total_count.double().max().cpu()
            fitted = torch.distributions.Binomial(total_count, probs=mean / total_count)
        case "ContinuousBernoulli":
            fitted = torch.distributions.ContinuousBernoulli(logits=_continuous_bernoulli_logits(mean))
        case "Normal":
            squares = (train - mean).square()
            variance = (squares.sum(0) + squares.mean()) / (len(train) + 1)
            fitted = torch.distributions.Normal(mean, variance.sqrt())
        case _:
            return None
    log_prob = fitted.log_prob(test).flatten(1).sum(1) + dataset.test.log_jacobian
    error = log_prob.std().item() / math.sqrt(len(test)) if len(test) > 1 else math.nan
    return Estimate(log_prob.mean().item(), error)


def _continuous_bernoulli_logits(mean: Tensor) -> Tensor:
    """Where ``E[x] = 1 / (1 - e^-l) - 1 / l`` is `mean`, by bisection."""
    low, high = torch.full_like(mean, -15.9), torch.full_like(mean, 15.9)
    for _ in range(60):
        middle = (low + high) / 2
        expected = torch.where(middle.abs() > 1e-3, -1 / torch.expm1(-middle) - 1 / middle, 0.5 + middle / 12)
        low, high = torch.where(expected < mean, middle, low), torch.where(expected < mean, high, middle)
    return (low + high) / 2


def _observation(model: Callable) -> Any:
    """p(x|z) of one element, with its class and settings, from a draw of the model."""
    distribution = dict(samples(_trace(model)))["x"]["fn"]
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    return distribution


def _trace(model: Callable) -> poutine.Trace:
    with isolated(model):
        return poutine.trace(model).get_trace(num_data=1)


# ------------------------------------------------------------ what is shown


@dataclass(frozen=True)
class _Figure:
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
class _Section:
    title: str
    text: str
    figures: tuple[_Figure, ...] = ()


class _Subject:
    """A run on a data set, and what several sections need of it."""

    def __init__(self, run: Run, dataset: Dataset, evaluation: Evaluation, seed: int) -> None:
        self.run, self.dataset, self.evaluation, self.seed = run, dataset, evaluation, seed
        self.pictures = len(dataset.event_shape) == 3
        self.noun = _noun(dataset)
        sites = dict(samples(_trace(run.model)))
        codes = encodings(run.guide, dataset.test, seed=seed)
        self.latents = {name: sites[name] for name in sites if name in codes}  # in the order that KL has
        self.code = torch.cat([codes[name].mean.flatten(1) for name in self.latents], dim=1)  # (N, D)
        self.active = self.code.double().var(0) > 0.01
        spread = evaluation.kl_per_dim if evaluation.kl_per_dim is not None else self.code.var(0)
        self.order = spread.argsort(descending=True).tolist()  # dimensions, the most informative first
        self.names = [
            f"{name}{d + 1}" if len(self.latents) == 1 else f"{name}[{d + 1}]"
            for name in self.latents
            for d in range(codes[name].mean[0].numel())
        ]

    def sample(self, n: int, mean: bool) -> Tensor:
        return sample(self.run.model, n, seed=self.seed, mean=mean)

    def walk(self, standard: Tensor) -> Tensor | str:
        """E[x|z] at ``z = E[z] + standard * sd[z]`` of the prior, for `standard` (..., D); or why not."""
        if len(self.latents) > 1:
            return (
                f"The model has {len(self.latents)} latent sites that depend on each other: there is no "
                "single code to walk along."
            )
        ((name, site),) = self.latents.items()
        try:
            mean, scale = (moment.flatten().cpu() for moment in (site["fn"].mean, site["fn"].stddev))
        except NotImplementedError:
            return "The prior has no mean and variance in closed form: there is no line to walk along."
        z = (mean + standard * scale).reshape(-1, *site["value"].shape[1:])
        if not bool(site["fn"].support.check(z.to(site["value"])).all()):
            return f"The values of {name} are constrained: there is no straight line to walk along."
        return decode(self.run.model, {name: z}, seed=self.seed).unflatten(0, standard.shape[:-1])

    def walked(self, most: int) -> list[int]:
        """The dimensions to walk along: at most so many, active ones if there are any."""
        return [d for d in self.order if self.active[d] or not self.active.any()][:most]


class _Pictures:
    """Sections whose figures are made of pictures."""

    def __init__(self, subject: _Subject) -> None:
        self.subject = subject
        x = subject.dataset.train.x
        low, high = x.min().item(), x.max().item()
        self.range = (0.0, 1.0) if low >= 0 and high <= 1 or low == high else (low, high)
        width = self.tiles(x[:1]).shape[-2]
        self.columns = min(12, max(3, PICTURE_WIDTH // width))

    def tiles(self, x: Tensor) -> np.ndarray:
        """(..., C, H, W) as bytes (..., H, W, 3); channels, unless 1 or 3, stand side by side."""
        low, high = self.range
        x = ((x.float() - low) / (high - low)).clamp(0, 1)
        channels = x.shape[-3]
        if channels not in (1, 3):
            x = x.movedim(-3, -2).flatten(-2)[..., None, :, :]
        x = x.expand(*x.shape[:-3], 3, *x.shape[-2:])
        return (x.movedim(-3, -1) * 255).round().byte().numpy()

    def mosaic(self, name: str, x: Tensor, description: str, group: int = 0) -> _Figure:
        """Pictures x (rows, columns, C, H, W), each pixel a square; a wide gap follows every `group` rows."""
        tiles = self.tiles(x)
        rows, columns, height, width, _ = tiles.shape
        scale, gap = max(1, PICTURE_WIDTH // (columns * width)), 8
        tiles = tiles.repeat(scale, axis=2).repeat(scale, axis=3)
        height, width = height * scale, width * scale
        tops = [r * (height + gap) + (r // group * 3 * gap if group else 0) for r in range(rows)]
        canvas = np.zeros((tops[-1] + height, columns * (width + gap) - gap, 4), np.uint8)
        for r, top in enumerate(tops):
            for c in range(columns):
                tile = canvas[top : top + height, c * (width + gap) : c * (width + gap) + width]
                tile[..., :3], tile[..., 3] = tiles[r, c], 255
        buffer = io.BytesIO()
        Image.fromarray(canvas).save(buffer, "png", optimize=True)
        return _Figure(name, buffer.getvalue(), description, "picture")

    def samples(self) -> _Section:
        rows = min(8, max(2, -(-96 // self.columns)))
        x = self.subject.sample(rows * self.columns, mean=True).unflatten(0, (rows, self.columns))
        count = rows * self.columns
        return _Section(
            "Samples",
            f"{count} images that do not exist. Each starts as random numbers z drawn from the prior p(z), "
            "which the model turns into the average image E[x|z].",
            (self.mosaic("samples", x, f"A grid of {count} images drawn from the model"),),
        )

    def reconstructions(self) -> _Section:
        test = self.subject.dataset.test.observed
        count = min(self.columns * 3, len(test))
        columns = min(self.columns, count)
        lines = count // columns
        data = test[: lines * columns].cpu()
        remade = reconstruct(self.subject.run.model, self.subject.run.guide, data)
        pairs = torch.stack([x.unflatten(0, (lines, columns)) for x in (data, remade)], dim=1).flatten(0, 1)
        return _Section(
            "Reconstructions",
            "Above, test images that the model has never seen; below each, what is left of it after it has "
            f"been squeezed into {_counted(self.subject.code.shape[1], 'number')} and unfolded again.",
            (self.mosaic("reconstructions", pairs, "Test images above their reconstructions", group=2),),
        )

    def traversals(self) -> _Section:
        subject, D = self.subject, self.subject.code.shape[1]
        if D == 2:
            side = 16 if self.columns == 12 else self.columns
            quantile = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(side) + 0.5) / side)
            standard = torch.stack(torch.meshgrid(quantile, -quantile, indexing="xy"), dim=-1)
            title, name = "The whole latent plane", "manifold"
            text = (
                "Two numbers describe every image, so all that this model can draw fits on one map. From "
                f"left to right {subject.names[0]} grows, from bottom to top {subject.names[1]}, in steps of "
                "equal probability under a normal prior."
            )
        else:
            dims, values = subject.walked(8), torch.linspace(-2.5, 2.5, min(11, self.columns))
            standard = torch.zeros(len(dims), len(values), D)
            for row, d in enumerate(dims):
                standard[row, :, d] = values
            title, name = "What the latent numbers mean", "traversals"
            text = (
                f"Each row turns one latent number {WALK}. From top to bottom: "
                f"{', '.join(_dimension(subject, d) for d in dims)}."
            )
        x = subject.walk(standard)
        if isinstance(x, str):
            return _Section(title, x)
        return _Section(title, text, (self.mosaic(name, x, "Images decoded from chosen latent numbers"),))

    def nearest(self) -> _Section:
        subject, train = self.subject, self.subject.dataset.train
        count = min(10, self.columns)
        x = subject.sample(count, mean=True)
        nearest = torch.cdist(x.flatten(1), train.x.cpu().flatten(1)).argmin(1)
        pairs = torch.stack([x, train.x[nearest.to(train.device)].cpu()])
        return _Section(
            "Does it memorise?",
            f"Above, samples; below each, the training image that is closest to it. {_memory(subject)}",
            (self.mosaic("nearest", pairs, "Samples above their nearest training images"),),
        )


class _Tables:
    """Sections whose figures are charts of columns, in original units."""

    def __init__(self, subject: _Subject) -> None:
        self.subject = subject
        D = math.prod(subject.dataset.event_shape)
        self.names = [_plain(name) for name in subject.dataset.columns or (f"column {d}" for d in range(D))]
        varying = subject.dataset.train.x.flatten(1).std(0).nonzero().flatten().tolist()
        self.worth_showing = varying or list(range(D))

    def restored(self, x: Tensor) -> np.ndarray:
        return self.subject.dataset.restore(x).cpu().flatten(1).numpy()

    def chosen(self, count: int) -> tuple[list[int], str]:
        columns = self.worth_showing[:count]
        if len(columns) == len(self.names):
            return columns, ""
        return columns, f" The first {len(columns)} of {len(self.names)} columns that vary are shown."

    def samples(self) -> _Section:
        subject = self.subject
        columns, which = self.chosen(12)
        data = self.restored(subject.dataset.train.observed[:5000])
        drawn = self.restored(subject.sample(len(data), mean=False))
        figure, axes = _panels(len(columns))
        for axis, d in zip(axes, columns, strict=True):
            distinct = np.unique(data[:, d])
            edges = np.linspace(*_limits(data[:, d]), 31)
            if len(distinct) <= 30 and (distinct == distinct.round()).all():
                edges = np.arange(distinct[0] - 0.5, distinct[-1] + 1)
            axis.hist(data[:, d], edges, color=GREY, alpha=0.45, label="data")
            axis.hist(drawn[:, d], edges, histtype="step", color=BLUE, lw=1.6, label="samples")
            axis.set_yticks([])
            axis.spines["left"].set_visible(False)
            axis.set_title(self.names[d], fontsize=10, color=INK, loc="left")
        _legend(axes[0], "best")
        return _Section(
            "Samples",
            f"Each column's histogram over {len(data):,} training rows, and over as many rows drawn from the "
            f"model; then the columns that go together most.{which}",
            (_chart("samples", figure, "Histograms, data against samples"), *self.pairs(data, drawn)),
        )

    def pairs(self, data: np.ndarray, drawn: np.ndarray) -> Iterator[_Figure]:
        """The three pairs of columns that go together most: data above, samples below."""
        columns = self.worth_showing[:50]
        if len(columns) < 2:
            return
        first, second = np.triu_indices(len(columns), 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            strength = np.nan_to_num(np.abs(np.corrcoef(data[:, columns].T))[first, second])
        chosen = [(columns[first[i]], columns[second[i]]) for i in (-strength).argsort()[:3]]
        figure, axes = _panels(2 * len(chosen), columns=len(chosen), height=2.4)
        for i, (a, b) in enumerate(chosen):
            above, below = axes[i], axes[i + len(chosen)]
            for axis, rows, color in ((above, data, GREY), (below, drawn, BLUE)):
                axis.scatter(rows[:1000, a], rows[:1000, b], s=7, color=color, alpha=0.5, lw=0)
                axis.set(xlim=_limits(data[:, a]), ylim=_limits(data[:, b]))
            above.set_title("data", fontsize=10, color=INK, loc="left")
            below.set_title("samples", fontsize=10, color=INK, loc="left")
            for axis in (above, below):
                axis.set_xlabel(self.names[a], color=INK, fontsize=9)
                axis.set_ylabel(self.names[b], color=INK, fontsize=9)
        yield _chart("pairs", figure, "Scatter plots of pairs of columns, data above samples")

    def reconstructions(self) -> _Section:
        subject = self.subject
        columns, which = self.chosen(6)
        test = subject.dataset.test.observed[:500].cpu()
        data = self.restored(test)
        remade = self.restored(reconstruct(subject.run.model, subject.run.guide, test))
        figure, axes = _panels(len(columns), height=2.3)
        for axis, d in zip(axes, columns, strict=True):
            axis.axline((data[0, d], data[0, d]), slope=1, color=GREY, lw=1, zorder=0)
            axis.scatter(data[:, d], remade[:, d], s=9, color=BLUE, alpha=0.5, lw=0)
            axis.set(xlim=_limits(data[:, d]), ylim=_limits(data[:, d]))
            axis.set_title(self.names[d], fontsize=10, color=INK, loc="left")
        return _Section(
            "Reconstructions",
            f"For {len(test):,} test rows, a column's true value (across) against what is left of it after "
            f"the row has been squeezed into {_counted(subject.code.shape[1], 'number')} and unfolded again "
            f"(up). On the line, nothing is lost.{which}",
            (_chart("reconstructions", figure, "True against reconstructed values"),),
        )

    def traversals(self) -> _Section:
        subject, title = self.subject, "What the latent numbers mean"
        columns, which = self.chosen(6)
        dims, values = subject.walked(6), torch.linspace(-2.5, 2.5, 41)
        standard = torch.zeros(len(dims), len(values), subject.code.shape[1])
        for row, d in enumerate(dims):
            standard[row, :, d] = values
        decoded = subject.walk(standard)
        if isinstance(decoded, str):
            return _Section(title, decoded)
        train = subject.dataset.train.x.flatten(1).cpu()
        decoded = (decoded.flatten(2) - train.mean(0)) / train.std(0)
        figure, axes = _panels(len(dims), sharey=True)
        for axis, d, x in zip(axes, dims, decoded, strict=True):
            for color, j in zip(LABEL_COLORS, columns, strict=False):
                axis.plot(values, x[:, j], color=color, lw=1.6, label=self.names[j])
            axis.set_title(_dimension(subject, d), fontsize=10, color=INK, loc="left")
        figure.legend(
            *axes[0].get_legend_handles_labels(),
            loc="outside lower center", ncols=2 * min(3, len(dims)), frameon=False, fontsize=9, labelcolor=INK,
        )  # fmt: skip
        return _Section(
            title,
            f"Each panel turns one latent number {WALK}, and follows the average of every column, in "
            f"standard deviations of the training data.{which}",
            (_chart("traversals", figure, "Lines of decoded columns along each latent dimension"),),
        )

    def nearest(self) -> _Section:
        return _Section("Does it memorise?", _memory(self.subject))


# ------------------------------------------------------------ sections for all data


def _training_curve(subject: _Subject) -> _Section:
    history, elbo = subject.run.history, subject.evaluation.elbo
    if not history:
        return _Section("Training", "The run holds no history of its training.")
    epochs = [record["epoch"] for record in history]
    figure, (axis,) = _panels(1, width=6.2, height=3.4)
    marker = "o" if len(epochs) == 1 else None
    for key, color, label in (("bound", GREY, "training"), ("valid", BLUE, "validation")):
        if any(key in record for record in history):
            bounds = [record.get(key, math.nan) for record in history]
            axis.plot(epochs, bounds, color=color, lw=1.8, marker=marker, label=label)
    axis.axhline(elbo.value, color=RED, lw=1.2, ls=(0, (4, 3)), zorder=0)
    stopped_early = "patience" in subject.run.config and all("valid" in record for record in history)
    kept = max(history, key=lambda record: record["valid"])["epoch"] if stopped_early else epochs[-1]
    label = f"test, weights of epoch {kept}: {_signed(elbo.value)}"
    axis.plot([kept], [elbo.value], "o", color=RED, ms=6, label=label)
    settled = history[-(-len(history) // 10) if len(history) > 4 else 0 :]
    shown = [record[key] for record in settled for key in ("bound", "valid") if key in record] + [elbo.value]
    margin = 0.06 * (max(shown) - min(shown)) or 1.0
    axis.set_ylim(min(shown) - margin, max(shown) + margin)
    axis.set_xlabel("epoch", color=INK)
    axis.set_ylabel(f"bound, nats per {subject.noun}", color=INK)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    _legend(axis, "lower right")
    text = (
        f"The bound on log p(x) after each of {_counted(len(history), 'epoch')} "
        f"({_duration(history[-1]['seconds'])}); higher is better."
    )
    if not any("valid" in record for record in history):
        text += " No validation data were scored during training."
    if any(record.get("kl_weight", 1.0) != 1.0 for record in history):
        text += " The training bound is taken at the KL weight of its epoch, the others at weight 1."
    return _Section("Training", text, (_chart("training", figure, "The bound against epochs"),))


def _latent_space(subject: _Subject) -> _Section:
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
    figure, (axis,) = _panels(1, width=6.2, height=5.6 if D > 1 else 2.6)
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
    chart = _chart("latent_space", figure, "Scatter plot of latent codes")
    return _Section("The latent space", text + ".", (chart,))


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
        label = _plain(classes[value]) if classes else value
        axis.scatter(x[rows], y[rows], s=13, color=color, alpha=0.8, lw=0, label=label)
    axis.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, labelcolor=INK,
        handletextpad=0.1, markerscale=1.6,
    )  # fmt: skip


def _kl_per_dimension(subject: _Subject) -> _Section:
    title, kl = "What each latent number carries", subject.evaluation.kl_per_dim
    if kl is None:
        return _Section(
            title,
            "The KL divergence has no parts per dimension here: prior and posterior do not both factorise.",
        )
    ranked = subject.order[:64]
    figure, (axis,) = _panels(1, width=6.2, height=2.8)
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
    _legend(axis, "upper right")
    which = f" The {len(ranked)} largest of {len(kl)} are shown." if len(ranked) < len(kl) else ""
    return _Section(
        title,
        f"KL(q(z|x) ‖ p(z)) per latent dimension: the information about x that it holds. "
        f"{subject.evaluation.active_units} of {_counted(len(kl), 'dimension')} "
        f"{'is' if subject.evaluation.active_units == 1 else 'are'} active: the code moves with the data "
        f"(variance above 0.01).{which}",
        (_chart("kl_per_dimension", figure, "Bars of KL per latent dimension"),),
    )


def _memory(subject: _Subject) -> str:
    """Whether draws x ~ p(x) lie closer to the training data than unseen data do."""
    train = subject.dataset.train.observed.flatten(1).cpu()
    test = subject.dataset.test.observed[:200].flatten(1).cpu()
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
    "annealed": "log p(x) by annealed importance sampling, which does not rest on the guide",
    "kl": "information that the code z holds about x",
    "ess": "effective sample size: how many of the draws count",
    "khat": "below 0.7, the log evidence can be trusted",
}


def _score_rows(subject: _Subject) -> list[dict[str, Any]]:
    evaluation = subject.evaluation
    rows = []
    for name, estimate in evaluation.table().items():
        hint = HINTS[name]
        if name == "khat":
            share = (evaluation.per_datum["khat"] > 0.7).double().mean().item()
            if math.isnan(estimate.value):
                hint = "needs 25 draws or more per datum"
            elif share > 0:
                hint = (
                    f"above 0.7 for {share:.0%} of the {subject.noun}s: a few draws carry nearly all the "
                    "weight there, and log p(x) is likely higher than the log evidence"
                )
        rows.append({"name": name.replace("_", " "), "estimate": estimate, "hint": hint})
    return rows


def _facts(run: Run, seed: int) -> dict[str, str]:
    from . import __version__

    facts = {"written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")}
    if run.history:
        epochs = _counted(len(run.history), "epoch")
        facts["training"] = f"{epochs} in {_duration(run.history[-1]['seconds'])}"
    facts["seed"] = f"{seed} for this report"
    if "seed" in run.config:
        facts["seed"] = f"{run.config['seed']} for training, " + facts["seed"]
    facts["versions"] = (
        f"pyro_vae {__version__}, pyro {pyro.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
    return facts


# ------------------------------------------------------------ charts and words


def _limits(values: np.ndarray) -> tuple[float, float]:
    """An axis that nearly all values fit on."""
    low, high = np.quantile(values, [0.002, 0.998])
    margin = 0.08 * (high - low) or 0.5
    return low - margin, high + margin


def _plain(name: str) -> str:
    """A name that matplotlib takes as it stands: no formula between dollars, and not left out of legends."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _panels(
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


def _legend(axis: Any, location: str) -> None:
    axis.legend(loc=location, frameon=False, fontsize=9, labelcolor=INK)


def _chart(name: str, figure: Figure, description: str) -> _Figure:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, transparent=True)
    return _Figure(name, buffer.getvalue(), description, "chart")


def _noun(dataset: Dataset) -> str:
    return "image" if len(dataset.event_shape) == 3 else "row"


def _dimension(subject: _Subject, d: int) -> str:
    kl = subject.evaluation.kl_per_dim
    return subject.names[d] if kl is None else f"{subject.names[d]} ({kl[d]:.2f} nats)"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _signed(value: float) -> str:
    return f"{value:.1f}".replace("-", "−")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return _counted(round(seconds), "second")
    if seconds < 6000:
        return _counted(round(seconds / 60), "minute")
    return f"{seconds / 3600:.1f} hours"
