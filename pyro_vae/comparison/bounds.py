"""What estimators tell of log p(x), and the best that is known of it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data import Data
from ..estimators import Estimator
from ..evaluation import MAX_ELEMENTS, Estimate, evaluate, evaluating
from ..log_weights import log_weights
from .contestants import Contestant, draws_of
from .pair import Pair, derived_seed, modules_in

GROUPS, REPEATS = 10, 4  # of data and of draws, for losses that tell no bound of a single datum


class Evidence(NamedTuple):
    values: Tensor  # (N,)
    mean: Estimate
    source: str


def best_log_evidence(
    model: Any, guide: Any, data: Data, given: Tensor | None, num_samples: int, seed: int
) -> Evidence:
    """The best that is known of log p(x): each way stands before those that know less."""
    exact = getattr(model, "log_evidence", None)
    if exact is not None and "num_samples" not in inspect.signature(exact).parameters:  # else it is an estimate
        with torch.no_grad(), evaluating(*modules_in(model)):
            values = exact(*data.args, **data.kwargs).double().cpu() + data.log_jacobian
        if values.shape != (len(data),):
            came = tuple(values.shape)
            raise ValueError(f"expected shape ({len(data)},) of model.log_evidence(x), got {came}: log p of each datum")
        return Evidence(values, Estimate(values.mean().item(), _error(values, None), 0.0), "exact")
    if given is not None:
        one = bool((given == given[0]).all())  # a mean, whose spread is not known
        return Evidence(given, Estimate(given.mean().item(), math.nan if one else _error(given, None)), "given")
    evaluation = evaluate(model, guide, data, num_samples=num_samples, seed=seed, progress=False, compile=False)
    values = evaluation.per_datum["log_evidence"]
    return Evidence(values, evaluation.log_evidence, f"bound of {num_samples:,} draws")


class _Bound(NamedTuple):
    values: Tensor  # (N,), each the mean over draws
    error: float  # of their mean, over draws
    groups: list[Tensor] | None  # of data that were scored together


def _bound(loss: Any, model: Any, guide: Any, data: Data, num_samples: int) -> _Bound:
    N, K = len(data), draws_of(loss)
    if not isinstance(loss, Estimator):
        groups = [*torch.arange(N).tensor_split(min(GROUPS, N))]
        draws = torch.stack([_losses(loss, model, guide, data, groups) for _ in range(REPEATS)])
        sizes = torch.tensor([len(group) for group in groups])
        error = (sizes.square() * draws.var(0)).sum().div(REPEATS).sqrt().item() / N
        return _Bound(draws.mean(0).repeat_interleave(sizes), error, groups)
    repeats = max(2, min(50, num_samples // K))
    event = max(1_000, *(tensor[:1].numel() for tensor in data.args))  # at least: networks have hidden layers too
    rows = max(1, MAX_ELEMENTS // (event * K))
    bounds = []
    for index in torch.arange(N, device=data.device).split(rows):
        args, kwargs = data.batch(index)
        for _ in range(repeats):  # in calls of their own: some programs take data of one size alone
            bounds.append(loss.bound(loss.weigh(model, guide, args, kwargs).log_weight).expand(len(index)))
    draws = torch.cat([torch.stack(bounds[i : i + repeats]) for i in range(0, len(bounds), repeats)], dim=1)
    draws = draws.double().cpu()
    return _Bound(draws.mean(0), draws.var(0).sum().div(repeats).sqrt().item() / N, None)


def _losses(loss: Any, model: Any, guide: Any, data: Data, groups: Sequence[Tensor]) -> Tensor:
    """Minus the loss of each group, per datum, float64."""
    values = []
    for group in groups:
        args, kwargs = data.batch(group.to(data.device))
        scale = log_weights(model, guide, args, kwargs, 1).scale
        value = loss.loss(model, guide, *args, **kwargs)
        values.append(-float(value[0] if isinstance(value, tuple) else value) / (scale * len(group)))
    return torch.tensor(values, dtype=torch.float64)


def _error(values: Tensor, groups: Sequence[Tensor] | None) -> float:
    """The standard error over data of the mean of (N,), or of that of groups."""
    if groups is not None:
        values = torch.stack([values[group].mean() for group in groups])
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def bound_row(
    pair: Pair, each: Contestant, data: Data, evidence: Evidence, num_samples: int, seed: int
) -> dict[str, float]:
    with pair.copied() as (model, guide), evaluating(*modules_in(model, guide)), torch.no_grad():
        torch.manual_seed(derived_seed(seed, 1, each.K))
        values, error, groups = _bound(each.make(), model, guide, data, num_samples)
    values = values + data.log_jacobian
    gap = evidence.values - values
    of_both = math.hypot(error, evidence.mean.standard_error_draws)
    return {
        "bound": values.mean().item(),
        "bound_standard_error": _error(values, groups),
        "bound_standard_error_draws": error,
        "gap": gap.mean().item(),
        "gap_standard_error": _error(gap, groups),
        "gap_standard_error_draws": error if math.isnan(of_both) else of_both,
    }
