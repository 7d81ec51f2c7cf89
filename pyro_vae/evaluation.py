"""`evaluate`: bounds on log p(x), and what goes with them, in bounded memory whatever the number of draws."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .compiled import Compiled
from .data import as_data
from .distributions import MarkovChain
from .log_weights import LogWeights, Structure, Structures, log_weights, samples

__all__ = ["Estimate", "Evaluation", "evaluate", "generalized_pareto_shape"]

MAX_ELEMENTS = 4_000_000  # of one tensor of decoded data: about 16 MB in float32
WORTH_COMPILING = 1_000  # calls


@dataclass(frozen=True)
class Estimate:
    """A mean over data, in nats per datum unless it says otherwise.

    `standard_error` is over data; `standard_error_draws`, apart, is what other draws would change.
    """

    value: float
    standard_error: float
    standard_error_draws: float = math.nan

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self:.2f}"

    def __format__(self, spec: str) -> str:
        """The value, and its standard error where there is one, each in the form `spec`."""
        error = "" if math.isnan(self.standard_error) else f" ± {self.standard_error:{spec or '.2f'}}"
        return f"{self.value:{spec or '.2f'}}{error}"


@dataclass(frozen=True)
class Evaluation:
    r"""Scores of a pair on data; `float()` gives an estimate's value.

    Attributes:
        elbo: ``E_q[log p(x, z) - log q(z|x)]``.
        log_evidence: ``E log 1/K sum_k p(x, z_k) / q(z_k|x) <= log p(x)`` (arXiv 1509.00519), K = `num_samples`.
        kl: ``KL(q(z|x) || p(z))``, from the draws.
        kl_per_dim: its parts per latent dimension where prior and posterior factorise, shape (D,); otherwise None.
        active_units: how many latent dimensions have ``Var_x E_q[z] > 0.01``; those of chains are left out, None where
            there are no others.
        ess: effective sample size of the K importance weights, 1 to K.
        khat: shape of the weights' Pareto tail; above 0.7 the weights cannot be trusted (arXiv 1507.02646).
        per_datum: each score's values, shape (N,): rank data by them.
        annealed: log p(x) by annealed importance sampling from the prior, where it was asked for: see `annealing`.
        num_steps: (N,), how many steps each datum has where it is a sequence, else None.
    """

    elbo: Estimate
    log_evidence: Estimate
    kl: Estimate
    kl_per_dim: Tensor | None
    active_units: int | None
    ess: Estimate
    khat: Estimate
    num_samples: int
    num_data: int
    per_datum: dict[str, Tensor]
    annealed: Estimate | None = None
    num_steps: Tensor | None = None

    @property
    def per_step(self) -> dict[str, Estimate] | None:
        """Of sequences: scores in nats per step, ``sum_i score_i / sum_i T_i``, which long ones have more part in."""
        if self.num_steps is None:
            return None
        found, mean = {}, float(self.num_steps.double().mean())
        for name in ("elbo", "log_evidence", "kl"):
            draws = getattr(self, name).standard_error_draws / mean
            found[name] = replace(of_steps(self.per_datum[name], self.num_steps), standard_error_draws=draws)
        return found

    def table(self) -> dict[str, Estimate]:
        names = ["elbo", "log_evidence", *(["annealed"] if self.annealed else []), "kl", "ess", "khat"]
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        rows = [f"{name:>13}  {estimate}" for name, estimate in self.table().items()]
        if self.active_units is not None:
            rows.append(f"{'active_units':>13}  {self.active_units}")
        for name, each in (self.per_step or {}).items():
            rows.append(f"{name:>13}  {each:.4f} per step")
        if self.khat.value > 0.7:
            rows.append(
                "khat is above 0.7: few draws carry the weight, and log p(x) may lie well above log_evidence; more "
                "draws (num_samples), annealing or a guide that is closer to the posterior help"
            )
        count = f"{self.num_data} data" if self.num_data > 1 else "1 datum (no standard errors)"
        return "\n".join([f"{count}, {self.num_samples} draws each; nats per datum", *rows])


def of_steps(scores: Tensor, num_steps: Tensor) -> Estimate:
    """``sum_i score_i / sum_i T_i`` of N sequences, with the standard error of a ratio."""
    T, N = num_steps.double(), len(scores)
    ratio = float(scores.sum() / T.sum())
    error = float((scores - ratio * T).std()) / (math.sqrt(N) * float(T.mean())) if N > 1 else math.nan
    return Estimate(ratio, error)


def _check_observed(weights: LogWeights) -> None:
    for name, site in samples(weights.calls[0].p):
        if site["is_observed"]:
            check_support(name, site["fn"], site["value"])


def check_support(name: str, distribution: Any, x: Tensor) -> None:
    """Raises ValueError where observed values lie outside the distribution's support, or are integers that it scores
    otherwise than the same real numbers."""
    if bool(distribution.support.check(x.to(torch.uint8) if x.dtype is torch.bool else x).all()):
        return _check_integers(name, distribution, x)
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    if count := int((x != x).sum()):
        raise ValueError(
            f'expected finite values of site "{name}", got {count} NaN: drop or fill them, or let the likelihood leave '
            "them out, likelihoods.Missing(...)"
        )
    kind, support = type(distribution).__name__, type(distribution.support).__name__.strip("_")
    raise ValueError(
        f'expected values of site "{name}" in the support of its {kind} likelihood, {support}, '
        f"got values from {x.min().item():.4g} to {x.max().item():.4g}: binarise the data (binarize='static' or "
        "'dynamic'), or take a likelihood for such values (ContinuousBernoulli for [0, 1], Binomial for counts, Normal "
        "for real numbers)"
    )


def _check_integers(name: str, distribution: Any, x: Tensor) -> None:
    """Raises ValueError where torch computes with integers in their own dtype, in which 255 + 1 may be 0."""
    if x.is_floating_point():
        return
    found = distribution.log_prob(x)
    try:
        wanted = distribution.log_prob(x.to(found.dtype))
    except (RuntimeError, IndexError, TypeError, ValueError):  # it takes integers alone
        return
    if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-2, equal_nan=True):
        raise ValueError(
            f'expected values of site "{name}" that {type(distribution).__name__} scores as it does the same real '
            f"numbers, got {x.dtype}, in which they overflow: observe x.float()"
        )


def _check_plates(structure: Structure) -> None:
    for name in structure.global_sites:
        raise ValueError(
            f'expected every site inside the plate "data", got "{name}" outside: its weight belongs to no single datum'
        )


class _Sums:
    """Running sums over draws for B data, each weight relative to the largest log-weight so far."""

    def __init__(self, rows: int, tail: int) -> None:
        self.shift = torch.full((rows,), -math.inf, dtype=torch.float64)
        self.first = torch.zeros(rows, dtype=torch.float64)  # sum w
        self.second = torch.zeros(rows, dtype=torch.float64)  # sum w^2
        self.sums = torch.zeros(4, rows, dtype=torch.float64)  # of log w, (log w)^2, KL, KL^2
        self.moments: dict[str, Tensor] = {}
        self.largest = torch.empty(0, rows, dtype=torch.float64)
        self.tail = tail

    def add(self, log_weight: Tensor, kl: Tensor, moments: Mapping[str, Tensor]) -> None:
        log_weight, kl = log_weight.double().cpu(), kl.double().cpu()
        shift = torch.maximum(self.shift, log_weight.amax(0))
        decay = (self.shift - shift).exp().nan_to_num(0.0)
        relative = (log_weight - shift).exp().nan_to_num(0.0)  # -inf - -inf: no weight at all
        self.first = self.first * decay + relative.sum(0)
        self.second = self.second * decay.square() + relative.square().sum(0)
        self.shift = shift
        self.sums += torch.stack([part.sum(0) for part in (log_weight, log_weight.square(), kl, kl.square())])
        for name, value in moments.items():
            self.moments[name] = self.moments.get(name, 0.0) + value.cpu()
        candidates = torch.cat([self.largest, log_weight])
        self.largest = candidates.topk(min(self.tail, len(candidates)), dim=0).values


def evaluate(
    model: Callable,
    guide: Callable,
    data: Any,
    *,
    num_samples: int = 100,
    seed: int = 0,
    progress: bool = True,
    compile: bool | None = None,
    annealing: int | None = None,
) -> Evaluation:
    """Score a pair on data with K = `num_samples` draws per datum, in eval mode, on the device that the model is on.

    Args:
        data: a tensor; a tuple of tensors, optionally ending in a dict of keyword tensors; or a split of a data set,
            whose standardisation is undone: scores are those of the original units.
        compile: run the draws as one compiled graph; by default where there are draws enough to pay for it.
        annealing: number of temperatures, such as 1,000, of 16 chains of annealed importance sampling beside.

    Raises:
        ValueError: data outside the likelihood's support (grey values under a Bernoulli are no log-likelihood), or a
            site outside the plate ``"data"``.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> model = VAE((4,), latent_dim=2)
        >>> scores = evaluate(model, AmortizedGuide(model), torch.ones(20, 4), num_samples=10)
        >>> float(scores.elbo) <= float(scores.log_evidence)
        True
    """
    if num_samples < 1:
        raise ValueError(f"expected num_samples >= 1, got {num_samples}: give a positive number")
    if annealing is not None and annealing < 1:
        raise ValueError(f"expected annealing >= 1 temperatures, got {annealing}: give a positive number")
    data = as_data(data, model, guide)
    device = next((p.device for p in _parameters(model, guide)), data.device)
    data = data.to(device)
    event = max(1_000, *(tensor[:1].numel() for tensor in data.args))  # at least: networks have hidden layers too
    rows = max(1, min(len(data), MAX_ELEMENTS // (event * num_samples)))
    parts = -(-num_samples // max(1, min(num_samples, MAX_ELEMENTS // (event * rows))))
    draws = [num_samples // parts + (i < num_samples % parts) for i in range(parts)]
    calls = parts * -(-len(data) // rows)
    structures = Structures()
    compute: Callable = functools.partial(_parts, model, guide, structures)
    if compile or (compile is None and calls >= WORTH_COMPILING):
        compute = Compiled(compute, model, guide)
    tail = min(math.ceil(num_samples / 5), math.ceil(3 * math.sqrt(num_samples))) + 1
    scores: dict[str, Tensor] = {}
    with isolated(model, guide), tqdm(total=len(data), unit="datum", disable=None if progress else True) as bar:
        torch.manual_seed(seed)
        generator = torch.Generator(device).manual_seed(seed)
        for begin in range(0, len(data), rows):
            count = min(rows, len(data) - begin)
            index = torch.arange(begin, begin + rows, device=device).clamp(max=len(data) - 1)  # graphs have one shape
            args, kwargs = data.trimmed_batch(index, generator)
            sums = _Sums(len(index), tail)
            _check_plates(structures.of(model, guide, args, kwargs, "data"))
            with torch.random.fork_rng():
                weights = log_weights(model, guide, args, kwargs, 1, structures, plate="data")
            _check_observed(weights)
            for K in draws:
                sums.add(*compute(args, kwargs, K))
            for name, value in (_scores(sums, num_samples) | _num_steps(weights)).items():
                whole = scores.setdefault(name, value.new_empty(len(data), *value.shape[1:]))
                whole[begin : begin + count] = value[:count]
            bar.update(count)
    evaluation = _summary(scores, num_samples, data.log_jacobian)
    if annealing is None:
        return evaluation
    from .annealing import annealed

    found = annealed(model, data, num_temperatures=annealing, seed=seed, progress=progress, compile=compile)
    per_datum = evaluation.per_datum | {"annealed": found.per_datum}
    return replace(evaluation, per_datum=per_datum, annealed=found.log_evidence)


def _num_steps(weights: LogWeights) -> dict[str, Tensor]:
    """How many steps the chain of each datum has."""
    for _, p, _, _ in weights.sites.values():
        if isinstance(p, MarkovChain):
            steps = torch.full((weights.log_weight.shape[1],), p.num_steps)
            return {"num_steps": steps if p.mask_ is None else p.mask_.sum(-1).cpu()}
    return {}


def _parts(
    model: Callable, guide: Callable, structures: Structures, args: Sequence[Any], kwargs: Mapping[str, Any], K: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    weights = log_weights(model, guide, args, kwargs, K, structures, plate="data", scaled=False)
    return weights.log_weight, weights.kl, _moments(weights)


def _scores(sums: _Sums, K: int) -> dict[str, Tensor]:
    elbo, kl = sums.sums[0] / K, sums.sums[2] / K
    ess = sums.first.square() / sums.second
    return {
        "elbo": elbo,
        "log_evidence": sums.shift + sums.first.log() - math.log(K),
        "kl": kl,
        "ess": ess,
        "khat": generalized_pareto_shape(sums.largest),
        "elbo_variance": (sums.sums[1] / K - elbo.square()).clamp(min=0) / max(K - 1, 1),
        "kl_variance": (sums.sums[3] / K - kl.square()).clamp(min=0) / max(K - 1, 1),
        "log_evidence_variance": (1 / ess - 1 / K).clamp(min=0),
        **{name: total / K for name, total in sums.moments.items()},
    }


def _moments(weights: LogWeights) -> dict[str, Tensor]:
    """Sums over draws per latent dimension, (B, D): the posterior's mean, its square, the KL where both factorise.

    Of a chain there are none: another batch may have another number of steps.
    """
    means, divergences = [], []
    for q, p, z, data_dim in weights.sites.values():
        if isinstance(q, MarkovChain):
            continue

        def by_datum(x: Tensor, z: Tensor = z, data_dim: int = data_dim) -> Tensor:
            return x.expand(z.shape)[..., None].movedim(data_dim, 1).flatten(start_dim=2).double()

        try:
            mean = q.mean
        except NotImplementedError:
            mean = z
        means.append(by_datum(mean))
        if all(isinstance(d, torch.distributions.Independent) and not d.base_dist.event_shape for d in (q, p)):
            kl = q.base_dist.log_prob(z) - p.base_dist.log_prob(z)
            with contextlib.suppress(NotImplementedError):
                kl = torch.distributions.kl_divergence(q.base_dist, p.base_dist)
            divergences.append(by_datum(kl))
    if not means:
        return {}
    mean = torch.cat(means, dim=2)
    moments = {"mean": mean.sum(0), "square": mean.square().sum(0)}
    if len(divergences) == len(weights.sites):
        moments["kl_per_dim"] = torch.cat(divergences, dim=2).sum(0)
    return moments


def _summary(scores: dict[str, Tensor], K: int, log_jacobian: float | Tensor) -> Evaluation:
    N = len(scores["elbo"])
    for name in ("elbo", "log_evidence"):
        scores[name] = scores[name] + log_jacobian

    def estimate(name: str) -> Estimate:
        variance = scores.get(f"{name}_variance")
        draws = math.nan if variance is None or K == 1 else variance.sum().sqrt().item() / N
        error = scores[name].std().item() / math.sqrt(N) if N > 1 else math.nan
        return Estimate(scores[name].mean().item(), error, draws)

    active_units = None
    if "mean" in scores:
        noise = (scores["square"] - scores["mean"].square()).clamp(min=0) / K  # of a mean that is itself one of draws
        active_units = int((scores["mean"].var(0, correction=min(1, N - 1)) - noise.mean(0) > 0.01).sum())
    return Evaluation(
        **{name: estimate(name) for name in ("elbo", "log_evidence", "kl", "ess", "khat")},
        kl_per_dim=scores["kl_per_dim"].mean(0) if "kl_per_dim" in scores else None,
        active_units=active_units,
        num_samples=K,
        num_data=N,
        per_datum={name: scores[name] for name in ("elbo", "log_evidence", "kl", "ess", "khat")},
        num_steps=scores.get("num_steps"),
    )


def generalized_pareto_shape(largest: Tensor) -> Tensor:
    """khat: the shape of a generalised Pareto distribution fitted to the tail of importance weights.

    `largest` holds the M + 1 largest log-weights of each datum in falling order, shape (M + 1, B); the last one is the
    threshold. The fit is Zhang and Stephens' (2009) with the weak prior of arXiv 1507.02646; (B,), NaN for M < 5.

    Example:
        >>> uniform = torch.linspace(1, 1e-3, 1000, dtype=torch.float64)[:, None]
        >>> bool((generalized_pareto_shape(-0.5 * uniform.flip(0).log())[0] - 0.5).abs() < 0.1)
        True
    """
    M = len(largest) - 1
    if M < 5:
        return torch.full(largest.shape[1:], math.nan, dtype=largest.dtype)
    scaled = (largest - largest[0]).exp()
    x = (scaled[:-1] - scaled[-1]).flip(0).clamp(min=torch.finfo(scaled.dtype).tiny)  # (M, B), rising
    grid = 30 + int(math.sqrt(M))
    steps = torch.arange(1, grid + 1, dtype=x.dtype)[:, None]
    quartile = x[int(M / 4 + 0.5) - 1]
    theta = 1 / x[-1] + (1 - (grid / (steps - 0.5)).sqrt()) / (3 * quartile)  # (grid, B)

    def shape(theta: Tensor) -> Tensor:
        return torch.log1p(-theta[:, None] * x).mean(1)

    k = shape(theta)
    profile = M * ((-theta / k).log() - k - 1)
    theta = (theta * profile.nan_to_num(-math.inf).softmax(0)).sum(0)
    return (M * shape(theta[None])[0] + 5) / (M + 10)


def _parameters(*programs: Any) -> Iterator[Tensor]:
    for program in programs:
        if isinstance(program, nn.Module):
            yield from program.parameters()


@contextlib.contextmanager
def isolated(*programs: Any) -> Iterator[None]:
    """Eval mode, no gradients, and nothing left behind in random state or parameter store.

    Plain functions see the store's values; modules, which hold their own, are kept from another's under the
    same name.
    """
    modules = [program for program in programs if isinstance(program, nn.Module)]
    store = pyro.get_param_store()
    with (
        evaluating(*modules),
        torch.random.fork_rng(),
        torch.no_grad(),
        store.scope(None if len(modules) == len(programs) else store.get_state()),
        pyro.validation_enabled(False),
    ):
        yield


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """In this context the modules are in eval mode; afterwards in the mode that each was in."""
    modes = [(submodule, submodule.training) for module in modules for submodule in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training
