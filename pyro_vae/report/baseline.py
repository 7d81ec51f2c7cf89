"""How good the fit is: beside a model without latent variables."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ..data import Dataset
from ..distributions.discrete import NegativeBinomial, Poisson
from ..evaluation import Estimate, Evaluation, isolated, of_steps
from ..log_weights import samples
from .charts import counted

__all__ = ["independent_baseline", "noun_of", "observation_of", "summary_sentence", "trace_of"]


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
    noun = noun_of(dataset)
    part = "pixel" if noun == "image" else "column"
    baseline = independent_baseline(model, dataset)
    discrete = observation_of(model).support.is_discrete
    score = evaluation.log_predictive  # log_evidence, but where sites are shared by all data
    start = f"On {counted(evaluation.num_data, noun)} that it has never seen, this model "
    if evaluation.per_step is not None and dataset.sequences:
        score, noun = evaluation.per_step["log_evidence"], "step"
    kind, better = ("needs at most", "fewer") if discrete else ("reaches a log-density of at least", "higher")

    def told(estimate: Estimate) -> str:
        value = -estimate.value if discrete else estimate.value
        return f"{replace(estimate, value=value):.1f}".replace("-", "−")

    sentence = f"{start}{kind} {told(score)} nats per {noun}"
    if baseline is None:
        return f"{sentence} ({better} is better)."
    sentence += (
        f", where knowing how each {part} is distributed, and nothing more, {kind.split()[0]} {told(baseline)} "
        f"({better} is better)"
    )
    return sentence + ("." if score.value > baseline.value else ": it has not learned more than that yet.")


def independent_baseline(model: Callable, dataset: Dataset) -> Estimate | None:
    r"""The test log-likelihood, in nats per datum, of sequences per step, of a model without latent variables.

    Every pixel or column stands on its own: ``p(x) = prod_d f(x_d; theta_d)``, f of the model's family
    p(x|z), with theta_d fitted to the training data and to one more datum, the overall average, so that no
    value that training lacks is impossible. With m and v for averages over all d, ``m_d = (sum_n x_nd + m) /
    (N + 1)`` is the mean of a Bernoulli, Binomial, Poisson, negative binomial, continuous Bernoulli (its logits
    within +-15.9, as in float32) or normal, and ``(sum_n (x_nd - m_d)^2 + v) / (N + 1)`` the normal's variance; a
    negative binomial's count of failures is the most likely one between e^-5 and e^15. None for other families.

    Example:
        >>> from pyro_vae import load_dataset
        >>> from pyro_vae.models import VAE, likelihoods
        >>> digits = load_dataset("digits")
        >>> print(independent_baseline(VAE((1, 8, 8), likelihood=likelihoods.Binomial(16)), digits))
        -254.65 ± 2.82
    """
    observation = observation_of(model)
    train, test = dataset.train.values.double().cpu(), dataset.test.x.double().cpu()
    count = (~train.isnan()).sum(0) + 1  # what is missing counts nothing
    mean = (train.nansum(0) + train.nanmean()) / count
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
            variance = (squares.nansum(0) + squares.nanmean()) / count
            fitted = torch.distributions.Normal(mean, variance.sqrt())
        case "Poisson":
            fitted = Poisson(mean.log())
        case "NegativeBinomial":
            fitted = NegativeBinomial(mean.log(), _log_total_count(train, mean.log()))
        case _:
            return None
    there = dataset.test.counted.cpu() & ~test.isnan()
    log_prob = torch.where(there, fitted.log_prob(test.where(there, mean.round())), 0.0).flatten(1).sum(1)
    log_prob = log_prob + dataset.test.log_jacobian
    if dataset.sequences:
        return of_steps(log_prob, dataset.test.kwargs["lengths"].cpu())
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


def _log_total_count(train: Tensor, log_mean: Tensor) -> Tensor:
    """ln n_d at which the training rows are most probable, given their means: by golden sections, as ln p rises and
    falls once."""
    low, high = torch.full_like(log_mean, -5.0), torch.full_like(log_mean, 15.0)

    def total(log_count: Tensor) -> Tensor:
        parts = [NegativeBinomial(log_mean, log_count).log_prob(rows.nan_to_num()) for rows in train.split(10_000)]
        gaps = [rows.isnan() for rows in train.split(10_000)]
        return torch.stack([torch.where(gap, 0.0, part).sum(0) for part, gap in zip(parts, gaps, strict=True)]).sum(0)

    share = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        left, right = high - share * (high - low), low + share * (high - low)
        rises = total(left) < total(right)
        low, high = torch.where(rises, left, low), torch.where(rises, high, right)
    return (low + high) / 2


def observation_of(model: Callable) -> Any:
    """p(x|z) of one element, with its class and settings, from a draw of the model."""
    distribution = dict(samples(trace_of(model)))["x"]["fn"]
    distribution = getattr(distribution, "base", distribution)  # of one whose data have gaps
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    return distribution


def trace_of(model: Callable) -> poutine.Trace:
    with isolated(model):
        inputs = getattr(model, "num_inputs", None)
        if inputs is None:
            return poutine.trace(model).get_trace(num_data=1)
        device = next(iter(model.parameters()), torch.zeros(())).device  # type: ignore[attr-defined]
        few = {"u": torch.zeros(1, 2, inputs, device=device)} if inputs else {"num_data": 1, "num_steps": 2}
        return poutine.trace(model).get_trace(**few)


def noun_of(dataset: Dataset) -> str:
    if dataset.sequences:
        return "sequence"
    return "image" if len(dataset.event_shape) == 3 else "row"
