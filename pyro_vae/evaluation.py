"""`evaluate`: bounds on log p(x), and what goes with them, in bounded memory whatever the number of draws."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from .compiled import Compiled, preserved
from .data import Data, as_data
from .distributions import MarkovChain
from .log_weights import LogWeights, Structure, Structures, is_point, log_weights, plate_of_data, samples, some_rows
from .nn import positive
from .progress import Bar

if TYPE_CHECKING:
    from .annealing import Annealed

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
        log_evidence: ``E log 1/K sum_k p(x, z_k) / q(z_k|x) <= log p(x)`` (arXiv 1509.00519), K = `num_samples`. With
            global latent sites theta, that of all data divided by their number N.
        log_evidence_total: of all data together, in nats.
        log_predictive: ``log 1/K sum_k p(x_i | theta_k)``, theta_k ~ q(theta): of data that theta was not trained on
            (arXiv 1307.5928). Without global sites it is `log_evidence`.
        global_sites: the names of the latent sites outside the plate of the data.
        kl: ``KL(q(z|x) || p(z))``, from the draws.
        kl_per_dim: its parts per latent dimension, and element of the plates within a datum, where prior and posterior
            factorise, shape (D,), in closed form where there is one; otherwise None. Their sum is `kl` in expectation.
        active_units: how many latent dimensions have ``Var_x E_q[z] > 0.01``, over the data in which they count; those
            of chains are left out, None where there are no others.
        ess: effective sample size of the K importance weights, 1 to K.
        khat: shape of the weights' Pareto tail; above 0.7 the weights cannot be trusted (arXiv 1507.02646).
        per_datum: each score's values, shape (N,): rank data by them.
        annealed: log p(x) by annealed importance sampling from the prior, where it was asked for.
        annealing: what its chains tell of it, an `annealing.Annealed`: whether they had temperatures enough.
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
    global_sites: tuple[str, ...] = ()
    annealing: Annealed | None = None

    @property
    def log_evidence_total(self) -> Estimate:
        each, N = self.log_evidence, self.num_data
        return Estimate(N * each.value, N * each.standard_error, N * each.standard_error_draws)

    @property
    def log_predictive(self) -> Estimate:
        if not self.global_sites:
            return self.log_evidence
        values, N = self.per_datum["log_predictive"], self.num_data
        return Estimate(values.mean().item(), values.std().item() / math.sqrt(N) if N > 1 else math.nan)

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
        if self.global_sites:
            names[2:2] = ["log_evidence_total", "log_predictive"]
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        width = max(13, *map(len, self.table()))
        rows = [f"{name:>{width}}  {estimate}" for name, estimate in self.table().items()]
        if self.active_units is not None:
            rows.append(f"{'active_units':>{width}}  {self.active_units}")
        for name, each in (self.per_step or {}).items():
            rows.append(f"{name:>{width}}  {each:.4f} per step")
        if self.global_sites:
            rows.append(
                f"global sites {', '.join(self.global_sites)}: log_evidence is that of all data over their number, "
                "log_predictive of each datum at draws of them"
            )
        if self.khat.value > 0.7:
            rows.append(
                "khat is above 0.7: few draws carry the weight, and log p(x) may lie well above log_evidence; more "
                "draws (num_samples), annealing or a guide that is closer to the posterior help"
            )
        rows += [] if self.annealing is None else self.annealing.notes
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
    if x.is_floating_point() and (count := int(x.isinf().sum())):
        raise ValueError(f'expected finite values of site "{name}", got {count} infinite: drop or mend them')
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
    try:
        found = distribution.log_prob(x)
        wanted = distribution.log_prob(x.to(found.dtype))
    except (RuntimeError, IndexError, TypeError, ValueError):  # it takes integers alone, or real numbers alone
        return
    if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-2, equal_nan=True):
        raise ValueError(
            f'expected values of site "{name}" that {type(distribution).__name__} scores as it does the same real '
            f"numbers, got {x.dtype}, in which they overflow: observe x.float()"
        )


def _check_plates(structure: Structure) -> None:
    if structure.subsampled is not None:
        raise ValueError(
            f'expected every plate within "{structure.plate}" to be whole, got "{structure.subsampled}", of which a '
            "part is drawn, "
            "so that no draw tells the log-weight of a datum: leave out its subsample_size, or give the elements of "
            "the plate as data"
        )


def _check_rows(weights: LogWeights, rows: int, plate: str) -> None:
    if (came := weights.log_weight.shape[1]) != rows:
        raise ValueError(
            f'expected a plate "{plate}" of the {rows} rows that a call gets, got one of {came}: make it of len(x)'
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

    The plate of the data is the one called "data", or else the outermost around all that is observed with as many
    elements as there are data. Latent sites outside are global: K draws of them are made, and for each of these
    sqrt(K) of the local ones, with which ``p(x_i | theta_k)`` is estimated without bias::

        log p(x) >= E ln 1/K sum_k p(theta_k) / q(theta_k) prod_i p(x_i | theta_k)

    Masks count, scales do not: a scale of a site, such as the KL's or of a tempered likelihood, is one of the training,
    and the scores are those of the model without it.

    Args:
        data: a tensor; a tuple of tensors, optionally ending in a dict of keyword tensors; or a split of a data set,
            whose standardisation is undone: scores are those of the original units.
        compile: run the draws as one compiled graph; by default where there are draws enough to pay for it.
        annealing: number of temperatures, such as 1,000, of 16 chains of annealed importance sampling beside; it warns
            of too few.

    Raises:
        ValueError: data outside the likelihood's support (grey values under a Bernoulli are no log-likelihood), no
            plate of the data, a plate within it of which a part is drawn, or a global site that is drawn after a local
            one.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> model = VAE((4,), latent_dim=2)
        >>> scores = evaluate(model, AmortizedGuide(model), torch.ones(20, 4), num_samples=10)
        >>> float(scores.elbo) <= float(scores.log_evidence)
        True
    """
    num_samples = positive("num_samples", num_samples)
    annealing = None if annealing is None else positive("annealing", annealing)
    data = as_data(data, model, guide)
    device = next((p.device for p in _parameters(model, guide)), data.device)
    data = data.to(device)
    event = max(1_000, *(tensor[:1].numel() for tensor in data.args))  # at least: networks have hidden layers too
    rows = max(1, min(len(data), MAX_ELEMENTS // (event * num_samples)))
    parts = -(-num_samples // max(1, min(num_samples, MAX_ELEMENTS // (event * rows))))
    draws = [num_samples // parts + (i < num_samples % parts) for i in range(parts)]
    calls = parts * -(-len(data) // rows)
    structures = Structures()
    tail = min(math.ceil(num_samples / 5), math.ceil(3 * math.sqrt(num_samples))) + 1
    scores: dict[str, Tensor] = {}
    with isolated(model, guide), Bar(total=len(data), unit="datum", disable=None if progress else True) as bar:
        torch.manual_seed(seed)
        generator = torch.Generator(device).manual_seed(int(seed))
        first = torch.arange(min(max(1, MAX_ELEMENTS // event), len(data)), device=device)  # of one draw
        args, kwargs = data.batch(first, generator)
        plate = plate_of_pair(model, guide, args, kwargs)
        _check_densities(model, guide, args, kwargs)
        if structures.of(model, guide, args, kwargs, plate).global_sites:
            if annealing is not None:
                raise ValueError("expected local latent sites alone beside annealing, got global ones: leave it out")
            of_all = _hierarchical(model, guide, data, num_samples, seed, structures, plate, bar)
            _warn_of_lost(of_all.per_datum["log_predictive"])
            return of_all
        generator = torch.Generator(device).manual_seed(int(seed))
        compute: Callable = functools.partial(_parts, model, guide, structures, plate)
        if compile or (compile is None and calls >= WORTH_COMPILING):
            compute = Compiled(compute, model, guide)
        for begin in range(0, len(data), rows):
            count = min(rows, len(data) - begin)
            index = torch.arange(begin, begin + rows, device=device).clamp(max=len(data) - 1)  # graphs have one shape
            args, kwargs = data.trimmed_batch(index, generator)
            sums = _Sums(len(index), tail)
            _check_plates(structures.of(model, guide, args, kwargs, plate))
            with torch.random.fork_rng():
                weights = log_weights(model, guide, args, kwargs, 1, structures, plate=plate)
            _check_observed(weights)
            _check_rows(weights, len(index), plate)
            for K in draws:
                sums.add(*compute(args, kwargs, K))
            for name, value in (_scores(sums, num_samples) | _num_steps(weights)).items():
                whole = scores.setdefault(name, value.new_empty(len(data), *value.shape[1:]))
                whole[begin : begin + count] = value[:count]
            bar.update(count)
    evaluation = _summary(scores, num_samples, data.log_jacobian)
    _warn_of_lost(evaluation.per_datum["log_evidence"])
    if annealing is None:
        return evaluation
    from .annealing import annealed

    found = annealed(model, data, num_temperatures=annealing, seed=seed, progress=progress, compile=compile)
    per_datum = evaluation.per_datum | {"annealed": found.per_datum}
    return replace(evaluation, per_datum=per_datum, annealed=found.log_evidence, annealing=found)


def _warn_of_lost(scores: Tensor) -> None:
    if lost := int((~scores.isfinite()).sum()):
        warnings.warn(
            f"{lost:,} of {len(scores):,} data have no finite score, as they are far from what was trained on: means "
            "over all data are not finite, and they have the first ranks",
            UserWarning,
            stacklevel=3,
        )


def plate_of_pair(model: Callable, guide: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The plate of the data, left as it was."""

    def run(rows: int) -> list[poutine.Trace]:
        given, named = some_rows(args, kwargs, rows)
        q = poutine.trace(guide).get_trace(*given, **named)
        return [poutine.trace(poutine.replay(model, q)).get_trace(*given, **named)]

    with preserved():
        return plate_of_data(run, len(args[0]))


def _check_densities(model: Callable, guide: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError where q is a point: ``p(x, z)`` at one z is no bound on ``p(x)``."""
    with preserved():
        q = poutine.trace(guide).get_trace(*args, **kwargs)
        p = poutine.trace(poutine.replay(model, q)).get_trace(*args, **kwargs)
    drawn = [site for _, site in samples(q) if not site["is_observed"]]
    if any(site["infer"].get("is_auxiliary") and not is_point(site["fn"]) for site in drawn):
        return  # autoguides map one draw to the sites
    points = [site["name"] for site in drawn if site["name"] in p and is_point(site["fn"])]
    points = [name for name in points if not p.nodes[name]["is_observed"] and not is_point(p.nodes[name]["fn"])]
    if points:
        raise ValueError(
            f"expected a guide with a density for each latent site, got points for {points}, as of AutoDelta, at which "
            "p(x, z) is no bound on p(x): take AutoNormal, say, or a family of guides"
        )


def global_draws(
    guide: Callable, sites: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], count: int
) -> list[poutine.Trace]:
    """Draws of the global sites and of what they are made of, each a trace to replay programs with."""
    draws = []
    for _ in range(count if sites else 0):
        drawn, trace = poutine.Trace(), poutine.trace(guide).get_trace(*args, **kwargs)
        for name in sites:
            if name in trace.nodes:
                drawn.add_node(name, **trace.nodes[name])
        draws.append(drawn)
    return draws or [poutine.Trace()] * count


def check_given(given: poutine.Trace, trace: poutine.Trace) -> None:
    """Raises ValueError where q of global draws is another for this part of the data than for the first: then no part
    tells the density of a draw."""
    for name, site in given.nodes.items():
        value, own = site["value"], trace.nodes[name]["fn"]
        a, b = (float(q.log_prob(value).sum()) for q in (site["fn"], own))
        if abs(a - b) > 1e-4 * (1 + abs(a)):
            raise ValueError(
                f'expected q of the global site "{name}" to depend on no data, or all data in one call, got another '
                f"density for another part of them (ln q of one draw {a:.4g}, then {b:.4g}): score fewer data, or give "
                "the site parameters of its own"
            )


def _latent_names(given: poutine.Trace) -> list[str]:
    return [name for name, site in given.nodes.items() if not site["infer"].get("is_auxiliary")]


def _hierarchical(
    model: Callable, guide: Callable, data: Data, K: int, seed: int, structures: Structures, plate: str, bar: Any
) -> Evaluation:
    """`evaluate` of a pair with global sites: by K draws of them, and for each of these L = sqrt(K) of local ones."""
    N, L = len(data), max(1, round(math.sqrt(K)))
    generator = torch.Generator(data.device).manual_seed(int(seed))
    event = max(1_000, *(tensor[:1].numel() for tensor in data.args))
    rows = max(1, min(N, MAX_ELEMENTS // (event * L)))
    of_globals, elbo, log_joint = (torch.zeros(K, dtype=torch.float64) for _ in range(3))
    scores: dict[str, Tensor] = {}
    draws: list[poutine.Trace] = []
    for index in torch.arange(N, device=data.device).split(rows):
        args, kwargs = data.trimmed_batch(index, generator)
        structure = structures.of(model, guide, args, kwargs, plate)
        _check_plates(structure)
        draws = draws or global_draws(guide, structure.global_sites, args, kwargs, K)
        sums = _Sums(len(index), tail=1)
        for k, given in enumerate(draws):
            weights = log_weights(model, guide, args, kwargs, L, structures, plate=plate, scaled=False, given=given)
            if k == 0:
                _check_observed(weights)
                _check_rows(weights, len(index), plate)
            check_given(given, weights.calls[0].q)
            sums.add(weights.log_weight, weights.kl, _moments(weights))
            log_weight = weights.log_weight.double().cpu()
            of_globals[k] = weights.global_log_weight
            elbo[k] += log_weight.mean(0).sum()
            log_joint[k] += (log_weight.logsumexp(0) - math.log(L)).sum()
        for name, value in _scores(sums, K * L).items():
            whole = scores.setdefault(name, value.new_empty(N, *value.shape[1:]))
            whole[index.cpu()] = value
        bar.update(len(index))
    log_joint, kl = log_joint + of_globals, -of_globals.mean() / N
    log_jacobian = torch.as_tensor(data.log_jacobian, dtype=torch.float64)
    per_datum = {
        "elbo": scores["elbo"] - kl + log_jacobian,
        "log_predictive": scores["log_evidence"] + log_jacobian,
        "kl": scores["kl"] + kl,
    }
    means = {name: value.mean().item() for name, value in per_datum.items()}
    errors = {name: value.std().item() / math.sqrt(N) if N > 1 else math.nan for name, value in per_datum.items()}
    relative = (log_joint - log_joint.amax()).exp()
    ess = (relative.sum().square() / relative.square().sum()).item()
    tail = min(math.ceil(K / 5), math.ceil(3 * math.sqrt(K))) + 1
    khat = generalized_pareto_shape(log_joint.topk(min(tail, K)).values[:, None]).item()
    log_evidence = (log_joint.logsumexp(0).item() - math.log(K)) / N + log_jacobian.mean().item()
    noise = [math.nan, math.nan]
    if K > 1:
        noise = [(elbo + of_globals).std().item() / math.sqrt(K) / N, math.sqrt(max(0.0, 1 / ess - 1 / K)) / N]
    return Evaluation(
        elbo=Estimate(means["elbo"], errors["elbo"], noise[0]),
        log_evidence=Estimate(log_evidence, math.nan, noise[1]),
        kl=Estimate(means["kl"], errors["kl"]),
        kl_per_dim=None,
        active_units=int((_spread(scores, K * L) > 0.01).sum()) if "mean" in scores else None,
        ess=Estimate(ess, math.nan),
        khat=Estimate(khat, math.nan),
        num_samples=K,
        num_data=N,
        per_datum=per_datum,
        global_sites=tuple(_latent_names(draws[0])),
    )


def _num_steps(weights: LogWeights) -> dict[str, Tensor]:
    """How many steps the chain of each datum has."""
    for _, p, _, _ in weights.sites.values():
        if isinstance(p, MarkovChain):
            steps = torch.full((weights.log_weight.shape[1],), p.num_steps)
            return {"num_steps": steps if p.mask_ is None else p.mask_.sum(-1).cpu()}
    return {}


def _parts(
    model: Callable,
    guide: Callable,
    structures: Structures,
    plate: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    K: int,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    weights = log_weights(model, guide, args, kwargs, K, structures, plate=plate, scaled=False)
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
    """Sums over draws per latent dimension, (B, D): the posterior's mean and its square, 0 where a mask leaves it out,
    how often it does not, and the KL where all sites factorise.

    Of a chain there are none: another batch may have another number of steps.
    """
    parts: dict[str, list[Tensor]] = {"mean": [], "square": [], "counted": []}
    for name, (q, _, z, data_dim) in weights.sites.items():
        if isinstance(q, MarkovChain):
            continue

        def by_datum(x: Tensor, z: Tensor = z, data_dim: int = data_dim) -> Tensor:
            return x.expand(z.shape)[..., None].movedim(data_dim, 1).flatten(start_dim=2).double()

        try:
            mean = q.mean
        except NotImplementedError:
            mean = z
        there = weights.counted(name)
        counted = torch.ones_like(mean) if there is None else there.to(mean.dtype)
        mean = mean if there is None else torch.where(there, mean, 0.0)
        for part, value in (("mean", mean), ("square", mean.square()), ("counted", counted)):
            parts[part].append(by_datum(value))
    if not parts["mean"]:
        return {}
    moments = {part: torch.cat(values, dim=2).sum(0) for part, values in parts.items()}
    if len(parts["mean"]) == len(weights.sites) and (kl := weights.kl_per_element()) is not None:
        moments["kl_per_dim"] = kl.double().sum(0)
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
        active_units = int((_spread(scores, K) > 0.01).sum())
    means: dict[str, Any] = {name: estimate(name) for name in ("elbo", "log_evidence", "kl", "ess", "khat")}
    return Evaluation(
        **means,
        kl_per_dim=scores["kl_per_dim"].mean(0) if "kl_per_dim" in scores else None,
        active_units=active_units,
        num_samples=K,
        num_data=N,
        per_datum={name: scores[name] for name in ("elbo", "log_evidence", "kl", "ess", "khat")},
        num_steps=scores.get("num_steps"),
    )


def _spread(scores: Mapping[str, Tensor], K: int) -> Tensor:
    """``Var_x E_q[z]`` per latent dimension, over the data in which it counts, without the noise of means of draws."""
    share, some = scores["counted"], scores["counted"] > 0
    mean, square = (torch.where(some, scores[name] / share.clamp(min=1 / K), 0.0) for name in ("mean", "square"))
    count = some.sum(0)
    noise = torch.where(some, (square - mean.square()).clamp(min=0) / (K * share.clamp(min=1 / K)), 0.0)
    centred = torch.where(some, mean - mean.sum(0) / count.clamp(min=1), 0.0)
    return centred.square().sum(0) / (count - 1).clamp(min=1) - noise.sum(0) / count.clamp(min=1)


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
    device = next((p.device for module in modules for p in module.parameters()), torch.device("cpu"))
    with (
        of_the_library(device),
        evaluating(*modules),
        torch.random.fork_rng(),
        torch.no_grad(),
        store.scope(None if len(modules) == len(programs) else store.get_state()),
        pyro.validation_enabled(False),
    ):
        yield


@contextlib.contextmanager
def of_the_library(device: torch.device) -> Iterator[None]:
    """Without the caller's ``inference_mode`` and default device, under which no draw is what it is elsewhere."""
    same = torch.get_default_device().type in (device.type, "cpu")
    with torch.inference_mode(False), contextlib.nullcontext() if same else device:
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
