"""The page, of its sections."""

from __future__ import annotations

import platform
from datetime import datetime
from pathlib import Path

import jinja2
import pyro
import tomli_w
import torch
from torch import nn

from ..checkpoint import atomic
from ..data import Dataset
from ..evaluation import Evaluation, evaluate
from ..training import Run
from .baseline import summary_sentence
from .charts import counted, duration
from .pictures import Pictures
from .sections import kl_per_dimension, latent_space, score_rows, training_curve
from .sequences import Sequences
from .subject import Coded, Subject
from .tables import Tables

__all__ = ["write_report"]


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
    data, scores and configuration; of sequences samples, states as they are filtered and smoothed, forecasts,
    paths of the states.

    Args:
        run: what `fit` returned, or `load_run`.
        dataset: what it was trained on: pictures (C, H, W), rows of a table (D,), or sequences.
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
    subject: Subject
    if dataset.sequences:
        subject = Subject(run, dataset, evaluation, seed)
        hero, *sections = Sequences(subject).sections()
        sections.append(training_curve(subject))
    else:
        subject = Coded(run, dataset, evaluation, seed)
        make = Pictures(subject) if len(dataset.event_shape) == 3 else Tables(subject)
        hero, *sections = [
            make.samples(),
            make.reconstructions(),
            training_curve(subject),
            make.traversals(),
            latent_space(subject),
            kl_per_dimension(subject),
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
        scores=score_rows(subject),
        evaluation=evaluation,
        noun=subject.noun,
        facts=facts(run, seed),
        config=tomli_w.dumps(run.config),
    )
    path = run.path / "report.html"
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def facts(run: Run, seed: int) -> dict[str, str]:
    from .. import __version__

    facts = {"written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")}
    if run.history:
        epochs = counted(len(run.history), "epoch")
        facts["training"] = f"{epochs} in {duration(run.history[-1]['seconds'])}"
    facts["seed"] = f"{seed} for this report"
    if "seed" in run.config:
        facts["seed"] = f"{run.config['seed']} for training, " + facts["seed"]
    facts["versions"] = (
        f"pyro_vae {__version__}, pyro {pyro.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
    return facts
