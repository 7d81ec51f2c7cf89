"""`compare_estimators`: bias, noise, time and memory of estimators on the model at hand, and what training gains."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import pandas
import torch
from torch import Tensor

from ..data import Data, as_data
from ..evaluation import of_the_library
from ..optim import Optimizer
from ..progress import Bar
from ..svi import modules_of
from .bounds import best_log_evidence, bound_row
from .contestants import check_takes, contestants_of, draws_of, is_whole
from .gradients import Expected, gradient_row, slopes_of
from .pair import Pair, surroundings
from .result import Comparison
from .steps import Steps, budget_of


def compare_estimators(
    model: Callable,
    guide: Callable,
    data: Any,
    estimators: Mapping[str, Callable[[int], Any]] | Sequence[type],
    *,
    num_particles: Sequence[int] = (1, 4, 16, 64),
    num_data: int = 500,
    num_samples: int = 1000,
    num_gradients: int = 200,
    num_references: int | None = None,
    log_evidence: float | Tensor | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    learning_rate: float | None = None,
    optimizer: Optimizer | None = None,
    batch_size: int | None = None,
    valid: Any = None,
    compile: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    r"""Hold estimators against each other on a pair as it stands, and with a budget on what training it brings.

    With g a draw of the gradient on one fixed batch, of the parameters of the model or of the guide (those that both
    use count in both)::

        snr  = mean_i |E g_i| / sd(g_i)                    (arXiv 1802.04537)
        bias = |E g - d/dtheta E[objective]|

    The expected gradient of the estimator's own objective is estimated by the plainest unbiased gradient: autograd's,
    with the score of draws that cannot be reparameterised, without `Estimator.coefficients`, `signal` and `extra`. The
    noise of the draws themselves is taken out of squared norms and means; a bias is 0 as far as can be told where its
    square is within 4 standard errors, ``bias_z``. Parameters whose gradient does not vary count in no mean of ratios.
    An estimator whose guide follows another objective than its bound by design, as in PIWAE and wake-sleep, is biased
    in this sense. Losses are in eval mode for gradients, with multipliers and baselines as they are made.

    log p(x) is ``model.log_evidence(x)`` where the model has such a method, else `log_evidence`, else the bound of
    `num_samples` draws; of a trained pair it is the first or the last. Scores are taken in eval mode; gradients, time,
    memory and training in train mode, with all parameters as they are. Model, guide, parameter store, random state and
    modes are afterwards what they were: copies of modules are trained, and the parameters of functions are put back.

    Args:
        data: as for `evaluate`; one plate of independent data holds all sites.
        estimators: callables from K to an estimator, by name, ``{"Renyi": lambda K: Renyi(0.5, K)}``, or classes that
            take `num_particles`. Those of Pyro are as welcome; the standard errors over data are then of groups of
            data, and a bias is known of Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO and RenyiELBO.
        num_particles: the values of K. Where an estimator refuses one, it is left out and named in ``skipped``.
        num_data: how many data the bounds and log p(x) are of, drawn from `data` (and from `valid`).
        num_samples: draws for each datum that log p(x) is told by, and that each bound's average is of, about.
        num_gradients, num_references: draws of each gradient, and of that which a bias is told by: five times as many
            by default; 0 leaves it out. A ratio below ``1 / sqrt(num_gradients)`` is lost in the noise. Their moments
            take 400 bytes for each parameter.
        log_evidence: of the data, nats per datum: their mean, or a tensor (N,).
        steps, seconds: per seed, what each estimator may train for, from the pair as it is; compilation is free.
        seeds: of the training's draws and order of data.
        learning_rate: of Adam, 1e-3 by default; or else `optimizer`, as for `fit`.
        batch_size: of gradients and steps; by default 100, or all data if they are fewer.
        valid: data that trained pairs are scored on; `data` by default.
        compile: time and train with `CompiledSVI`, not with `SVI`.

    Raises:
        ValueError: arguments that do not fit, an estimator that cannot take the pair, sites outside the plate of data.

    Example:
        >>> from pyro_vae.estimators import IWAE, DReG
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import LinearVAE
        >>> model, x = LinearVAE((3,), latent_dim=1), torch.randn(50, 3)
        >>> few = {"num_particles": (1, 8), "num_gradients": 20, "num_samples": 20, "progress": False}
        >>> comparison = compare_estimators(model, AmortizedGuide(model), x, [IWAE, DReG], **few)
        >>> comparison.table[["estimator", "K"]].values.tolist()
        [['IWAE', 1], ['IWAE', 8], ['DReG', 1], ['DReG', 8]]
        >>> comparison.source
        'exact'
    """
    num_references = 5 * num_gradients if num_references is None else num_references
    _check_numbers(num_data, num_samples, num_gradients, num_references)
    budget = budget_of(steps, seconds, seeds)
    if learning_rate is not None and (optimizer is not None or not learning_rate > 0):
        came = f"{learning_rate}" if optimizer is None else f"{learning_rate} and an optimiser"
        raise ValueError(f"expected learning_rate > 0 or else an optimizer, got {came}: give one of them")
    optimizer = optimizer or functools.partial(torch.optim.Adam, lr=learning_rate or 1e-3, fused=True)
    contestants, skipped = contestants_of(estimators, num_particles)
    data = as_data(data, model, guide)
    held_out = data if valid is None else as_data(valid, model, guide)
    batch_size = min(100, len(data)) if batch_size is None else batch_size
    if not 1 <= batch_size <= len(data):
        raise ValueError(
            f"expected a batch_size from 1 to {len(data)}, the number of data, got {batch_size}: choose within"
        )
    parameters = [p for module in modules_of(model=model, guide=guide).values() for p in module.parameters()]
    device = parameters[0].device if parameters else data.device
    data, held_out = data.to(device), held_out.to(device)
    with of_the_library(device):
        rows = _some(len(data), num_data, seed)
        generator = torch.Generator(device).manual_seed(int(seed))
        scored = _fixed(data, rows, generator)
        tested = scored if valid is None else _fixed(held_out, _some(len(held_out), num_data, seed), generator)
        batch = data.batch(_some(len(data), batch_size, seed).to(device), generator)
        given = None if log_evidence is None else _per_datum(log_evidence, len(data))[rows]

    total = len(contestants) * (4 + len(budget.seeds))
    with surroundings(seed, device), Bar(total=total, unit="measurement", disable=None if progress else True) as bar:
        pair = Pair(model, guide, *batch)
        with pair.copied() as (p, q):
            for each in contestants:  # what one of them cannot take is said before anything is measured
                check_takes(each, p, q, *batch)
            evidence = best_log_evidence(p, q, scored, given, num_samples, seed)
            untrained = math.nan
            if budget.seeds:
                untrained = best_log_evidence(p, q, tested, None, num_samples, seed).mean.value
        found: list[dict[str, Any]] = []
        references: dict[Hashable, Expected] = {}
        for each in contestants:
            row: dict[str, Any] = {"estimator": each.name, "K": each.K, "draws": draws_of(each.make())}
            row |= bound_row(pair, each, scored, evidence, num_samples, seed)
            bar.update()
            row |= gradient_row(pair, each, batch, num_gradients, num_references, references, seed)
            bar.update(2)
            found.append(row)
        with Steps(pair, contestants, batch, optimizer, compile) as all_steps:
            for row, more in zip(found, all_steps.costs(bar), strict=True):
                row |= more
            for row, more in zip(found, all_steps.trained(budget, data, tested, num_samples, bar), strict=True):
                row |= more
    table = pandas.DataFrame(found)
    settings = {
        "num_data": len(scored),
        "num_samples": num_samples,
        "batch_size": batch_size,
        "num_gradients": num_gradients,
        "num_references": num_references,
        "steps": steps,
        "seconds": seconds,
        "seeds": [*budget.seeds],
        "untrained": untrained if math.isfinite(untrained) else None,
        "seed": seed,
        "compile": compile,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return Comparison(table, slopes_of(table), evidence.mean, evidence.source, skipped, settings)


def _check_numbers(num_data: int, num_samples: int, num_gradients: int, num_references: int) -> None:
    least = {"num_data": (num_data, 2), "num_samples": (num_samples, 2), "num_gradients": (num_gradients, 4)}
    if num_references:
        least["num_references"] = (num_references, 4)
    for name, (value, minimum) in least.items():
        if not is_whole(value, minimum):
            raise ValueError(f"expected {name} >= {minimum}, got {value}: give a whole number from there on")


def _per_datum(log_evidence: float | Tensor, N: int) -> Tensor:
    """(N,), float64; of a number that is their mean, N times it."""
    given = torch.as_tensor(log_evidence, dtype=torch.float64).detach().cpu()
    if given.shape not in ((), (N,)):
        raise ValueError(
            f"expected log_evidence as a number or of shape ({N},), got shape {tuple(given.shape)}: one value per datum"
        )
    return given.expand(N)


def _some(N: int, count: int, seed: int) -> Tensor:
    """The indices of so many of N data, at most, in their order."""
    return torch.randperm(N, generator=torch.Generator().manual_seed(int(seed)))[:count].sort().values


def _fixed(data: Data, rows: Tensor, generator: torch.Generator) -> Data:
    """These data, drawn once where they are drawn afresh at each call."""
    of_rows = data.log_jacobian[rows] if isinstance(data.log_jacobian, Tensor) else data.log_jacobian
    return Data(*data.batch(rows.to(data.device), generator), log_jacobian=of_rows)
