"""What a trained pair is for: draws, codes, reconstructions, paths between data, scores, and draws for ArviZ.

Each function takes any pair of Pyro programs with an observation site ``"x"`` in the plate of the data, the one called
"data" or else the outermost with a row for each datum. It runs them in eval mode on the device of their parameters, one
batch of data at a time, and returns tensors on the CPU. Random state and Pyro's parameter store are left as they were.
Data are in the units that the model sees: for the original units of a standardised table call
``dataset.restore`` on the result.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor, nn

from .data import as_data, tensor_of
from .draws import log_prob_of
from .evaluation import (
    MAX_ELEMENTS,
    check_given,
    check_support,
    evaluate,
    global_draws,
    isolated,
    plate_of_pair,
)
from .log_weights import on_plates, per_datum, plate_of_data, samples, some_rows
from .nn import positive

__all__ = [
    "Encoding",
    "Scores",
    "decode",
    "denoise",
    "encode",
    "encodings",
    "global_sites",
    "global_values",
    "interpolate",
    "reconstruct",
    "sample",
    "scores",
    "to_arviz",
]

OBSERVATION = "x"
MOMENT_DRAWS = 100  # where the moments of q(z_i | x) have no closed form


@dataclass(frozen=True, eq=False)
class Encoding:
    """q(z | x) of N data.

    A global latent site, outside the plate of the data, has no dimension N.

    Attributes:
        mean: ``E_q[z]``, (N, *latent_shape).
        scale: the standard deviation of each coordinate under q, (N, *latent_shape); None where q tells none and one
            draw was asked for.
        draws: ``z ~ q(z | x)``, (K, N, *latent_shape); None unless asked for.
        value: of a global site, what data are decoded at: the mean, or a draw where the mean is no value of the site.
    """

    mean: Tensor
    scale: Tensor | None
    draws: Tensor | None
    is_global: bool = False
    value: Tensor | None = None


def sample(
    model: Callable,
    num_samples: int,
    *,
    seed: int = 0,
    mean: bool = False,
    given: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Draws ``x ~ p(x)``, shape ``(num_samples, *event_shape)``; with `mean`, ``E[x | z]`` at ``z ~ p(z)``.

    The units are the model's: ``dataset.restore`` leads back to those of a standardised table. The model gets further
    keywords, as a model of sequences needs `num_steps`; tensors among them, such as inputs u, have a row for each draw,
    or one for all.

    Args:
        given: values of global sites theta, such as `global_values` gives: the draws are of
            ``p(x | theta)``. Global sites left out are drawn from their prior, once for all draws.

    Raises:
        ValueError: fewer than one draw, no site ``"x"``, `mean` where p(x | z) has none in closed form, or values of
            sites that are not global.

    Example:
        >>> from pyro_vae.models import VAE
        >>> sample(VAE((1, 8, 8), latent_dim=2), 3).unique()
        tensor([0., 1.])
    """
    num_samples = positive("num_samples", num_samples)

    kwargs = {name: _like(model, each) for name, each in kwargs.items()}
    of_each = {name for name, each in kwargs.items() if isinstance(each, Tensor) and each.ndim and len(each) != 1}
    for name in of_each:
        if len(kwargs[name]) != num_samples:
            raise ValueError(
                f"expected one row of {name} for each of {num_samples} draws, or one for all, got "
                f"{len(kwargs[name])}: give as many"
            )
    if isinstance(model, nn.Module):
        device = next(iter(model.parameters()), torch.zeros(())).device
        kwargs = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in kwargs.items()}

    def keywords(index: Tensor) -> dict[str, Any]:
        return {name: each[index] if name in of_each else each for name, each in kwargs.items()}

    with isolated(model):
        every = torch.arange(num_samples)
        trace = _drawn(model, 1, keywords(every[:1]))
        plate = plate_of_data(lambda rows: [_drawn(model, rows, keywords(every[:1].expand(rows)))], 1)
        shared = _shared(trace, plate)
        values = _of_all({name: _like(model, each) for name, each in (given or {}).items()}, shared)
        rows = _rows(_observation(trace)["value"].numel())
        torch.manual_seed(seed)
        parts = []
        for index in every.split(rows):
            trace = _drawn(poutine.condition(model, data=values), len(index), keywords(index))
            values |= {name: trace.nodes[name]["value"] for name in shared if name in trace}
            site = _observation(trace)
            parts.append((_mean(site, plate) if mean else _by_datum(site, site["value"], plate)).cpu())
    return torch.cat(parts)


def decode(model: Callable, z: Any, *, seed: int = 0, **kwargs: Any) -> Tensor:
    """``E[x | z]``, shape ``(N, *event_shape)``, for z of shape ``(N, *latent_shape)``.

    Args:
        z: a tensor; or, for a model with several latent sites, a dict from site to tensor. Sites left out
            are drawn in the model's order, with `seed`. Global sites, which have no dimension N, are never left out,
            as nothing is known of them before the data: `global_values` gives them.
        kwargs: what else the model needs to draw data, as one of sequences needs `num_steps`.

    Raises:
        ValueError: sites or shapes that are not the model's, or a global site without a value.

    Example:
        >>> from pyro_vae.models import VAE
        >>> decode(VAE((1, 8, 8), latent_dim=2), torch.zeros(5, 2)).shape
        torch.Size([5, 1, 8, 8])
    """
    z = {name: _like(model, each) for name, each in z.items()} if isinstance(z, Mapping) else _like(model, z)
    with isolated(model):
        trace = _drawn(model, 1, kwargs)
        plate = plate_of_data(lambda rows: [_drawn(model, rows, kwargs)], 1)
        shared = _shared(trace, plate)
        sites = {name: site for name, site in samples(trace) if name != OBSERVATION and name not in shared}
        given = {} if isinstance(z, Tensor) else {name: value for name, value in z.items() if name in shared}
        if missing := [name for name in shared if name not in given]:
            raise ValueError(
                f"expected values of the global sites {missing} in z, which all data share, got none: add those of the "
                'guide, {"z": z, **pyro_vae.prediction.global_values(guide, data)}'
            )
        of_all = _of_all(given, shared)
        if not sites:
            raise ValueError(
                f"expected a model with a latent site for each datum, got {sorted(shared)}, which all data share: "
                "sample(model, N, mean=True, given=...) gives E[x]"
            )
        latents = _named(
            z if isinstance(z, Tensor) else {name: z[name] for name in z if name not in given}, sites, plate
        )
        N = len(next(iter(latents.values())))
        torch.manual_seed(seed)
        parts = []
        for index in torch.arange(N).split(_rows(_observation(trace)["value"].numel())):
            of_each = {name: _in_plates(sites[name], value[index], plate) for name, value in latents.items()}
            conditioned = poutine.condition(model, data=of_all | of_each)
            parts.append(_mean(_observation(_drawn(conditioned, len(index), kwargs)), plate).cpu())
    return torch.cat(parts)


def encodings(guide: Callable, data: Any, *, num_samples: int | None = None, seed: int = 0) -> dict[str, Encoding]:
    """The `Encoding` of each latent site, with `num_samples` draws if given.

    Mean and scale of a single site are those of q(z | x). With several sites they are moments over draws of
    the earlier ones, ``E_q E[z_i | z_<i]`` and ``(E_q Var[z_i | z_<i] + Var_q E[z_i | z_<i])^{1/2}``; where q
    has no mean in closed form, as with flows and chains, mean and scale are those of draws. All take `num_samples`, or
    100.

    Raises:
        ValueError: fewer than one draw, or q of a global site that depends on a part of the data.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> list(encodings(AmortizedGuide(VAE((4,), latent_dim=2)), torch.ones(5, 4)))
        ['z']
    """
    num_samples = None if num_samples is None else positive("num_samples", num_samples)
    parts: dict[str, list[Encoding]] = {}
    plate: str | None = None
    with isolated(guide):
        torch.manual_seed(seed)
        for args, kwargs in _batches(data, seed, guide):
            own = poutine.trace(guide).get_trace(*args, **kwargs)
            if plate is None:
                plate = _plate_of(guide, args, kwargs)
                shared = [name for name, site in _latents(own).items() if _plate_dim(site, plate) is None]
                made_of = [name for name, site in samples(own) if _plate_dim(site, plate) is None]  # by autoguides
                sites = list(_latents(own).values())
                closed = len(sites) == 1 and _moment(sites[0], "mean", plate) is not None
                count = num_samples or (1 if closed else MOMENT_DRAWS)
                given = global_draws(guide, made_of, args, kwargs, count)
            whole = [poutine.trace(poutine.replay(guide, each)).get_trace(*args, **kwargs) for each in given]
            for each, trace in zip(given, whole, strict=True):
                check_given(each, trace)
            traces = [_latents(trace) for trace in whole]
            for name in traces[0] if not parts else [name for name in traces[0] if name not in shared]:
                draws = torch.stack([_by_datum(trace[name], trace[name]["value"], plate) for trace in traces]).cpu()
                numbers = draws if draws.is_floating_point() else draws.to(torch.get_default_dtype())
                means = _stack([_moment(trace[name], "mean", plate) for trace in traces])
                variances = _stack([_moment(trace[name], "variance", plate) for trace in traces])
                scale = numbers.std(0) if means is None and len(draws) > 1 else None
                if means is not None and variances is not None:
                    scale = (variances.mean(0) + means.var(0, correction=0)).sqrt()
                mean = (numbers if means is None else means).mean(0)
                value = None
                if name in shared:  # a mean may be no value that the site takes, as of categories or rotations
                    support = traces[0][name]["fn"].support
                    own_values = mean.to(traces[0][name]["value"]) if not support.is_discrete else draws[0]
                    value = own_values if bool(support.check(own_values).all()) else draws[0]
                encoding = Encoding(mean, scale, draws if num_samples else None, name in shared, value)
                parts.setdefault(name, []).append(encoding)
    return {name: _joined(batches) for name, batches in parts.items()}


def global_sites(model: Callable, *, seed: int = 0, mean: bool = False, **kwargs: Any) -> list[str]:
    """The names of the latent sites of a model outside the plate of the data; `kwargs` as for `sample`."""
    device = next(model.parameters(), torch.zeros(())).device if isinstance(model, nn.Module) else None
    of_rows = {name: each[:1].to(device) for name, each in kwargs.items() if isinstance(each, Tensor) and each.ndim}

    def drawn(rows: int) -> list[poutine.Trace]:
        given = {name: each.expand(rows, *each.shape[1:]) for name, each in of_rows.items()}
        return [_drawn(model, rows, {**kwargs, **given})]

    with isolated(model):
        return list(_shared(drawn(1)[0], plate_of_data(drawn, 1)))


def global_values(guide: Callable, data: Any, *, seed: int = 0) -> dict[str, Tensor]:
    """Values of the global sites to draw and decode data at: the `Encoding.value` of each.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import BayesianVAE
        >>> model = BayesianVAE((4,), size=5, latent_dim=2)
        >>> given = global_values(AmortizedGuide(model), torch.ones(5, 4))
        >>> sample(model, 3, given=given).shape
        torch.Size([3, 4])
    """
    return {name: each.value for name, each in encodings(guide, data, seed=seed).items() if each.value is not None}


def encode(guide: Callable, data: Any, *, num_samples: int | None = None, seed: int = 0) -> Encoding:
    """q(z | x) of a guide with one latent site for each datum: its mean and scale, and `num_samples` draws if given.

    Raises:
        ValueError: several such sites, or none (`encodings` is for them), or as `encodings`.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> encoding = encode(AmortizedGuide(VAE((4,), latent_dim=2)), torch.ones(5, 4), num_samples=10)
        >>> encoding.mean.shape, encoding.draws.shape
        (torch.Size([5, 2]), torch.Size([10, 5, 2]))
    """
    encoded = encodings(guide, data, num_samples=num_samples, seed=seed)
    local = {name: encoding for name, encoding in encoded.items() if not encoding.is_global}
    if len(local) != 1:
        raise ValueError(
            f"expected a guide with one latent site for each datum, got {sorted(local)}: call encodings(...)"
        )
    return next(iter(local.values()))


def reconstruct(model: Callable, guide: Callable, data: Any, *, num_samples: int = 1, seed: int = 0) -> Tensor:
    """``E_q[E[x | z]]``, shape ``(N, *event_shape)``, with `num_samples` draws z ~ q(z | x) per datum.

    Raises:
        ValueError: fewer than one draw, data outside the likelihood's support, or no site ``"x"`` with a mean in closed
            form.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> model = VAE((4,), latent_dim=2)
        >>> reconstruct(model, AmortizedGuide(model), torch.ones(5, 4)).shape
        torch.Size([5, 4])
    """
    check_data(model, guide, data, seed=seed)
    return denoise(model, guide, data, num_samples=num_samples, seed=seed)


def check_data(model: Callable, guide: Callable, data: Any, *, seed: int = 0) -> None:
    """Raises ValueError where data lie outside the likelihood's support, whose codes would say nothing."""
    with isolated(model, guide):
        torch.manual_seed(seed)
        for args, kwargs in _batches(data, seed, model, guide):
            for name, site in samples(_traces(model, guide, args, kwargs)[1]):
                if site["is_observed"]:
                    check_support(name, site["fn"], site["value"])


def denoise(model: Callable, guide: Callable, corrupted: Any, *, num_samples: int = 1, seed: int = 0) -> Tensor:
    """`reconstruct` of a corrupted input: ``E_q[E[x | z]]`` looks like what the model was trained on.

    The input is encoded as it is and never scored, so that it need not lie in the likelihood's support: a
    Bernoulli takes noisy grey values.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> model = VAE((4,), latent_dim=2)
        >>> denoise(model, AmortizedGuide(model), torch.ones(5, 4) + 0.1 * torch.randn(5, 4)).shape
        torch.Size([5, 4])
    """
    num_samples = positive("num_samples", num_samples)
    parts, plate = [], None
    with isolated(model, guide):
        torch.manual_seed(seed)
        for args, kwargs in _batches(corrupted, seed, model, guide):
            plate = plate or plate_of_pair(model, guide, args, kwargs)
            total = torch.zeros(())
            for _ in range(num_samples):
                trace = _traces(model, guide, args, kwargs)[1]
                total = total + _mean(_observation(trace), plate)
            parts.append((total / num_samples).cpu())
    return torch.cat(parts)


def interpolate(model: Callable, guide: Callable, a: Any, b: Any, *, steps: int = 9, seed: int = 0) -> Tensor:
    """``E[x | z_t]`` on the line ``z_t = (1 - t) E_q[z | a] + t E_q[z | b]``, t from 0 to 1, shape
    ``(steps, *event_shape)``, for two data of shape `event_shape`. Global sites stay at their `Encoding.value`.

    Raises:
        ValueError: fewer than two steps, or two data of different shapes.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> model = VAE((4,), latent_dim=2)
        >>> interpolate(model, AmortizedGuide(model), torch.zeros(4), torch.ones(4), steps=5).shape
        torch.Size([5, 4])
    """
    if steps < 2:
        raise ValueError(f"expected steps >= 2, the two ends, got {steps}")
    a, b = tensor_of(a), tensor_of(b)
    if a.shape != b.shape:
        raise ValueError(f"expected two data of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    line = {}
    for name, encoding in encodings(guide, torch.stack([a, b]), seed=seed).items():
        if encoding.is_global:
            line[name] = encoding.mean if encoding.value is None else encoding.value
            continue
        start, end = encoding.mean
        t = torch.linspace(0, 1, steps, dtype=start.dtype).reshape(-1, *[1] * start.ndim)
        line[name] = torch.lerp(start, end, t)
    return decode(model, line, seed=seed)


@dataclass(frozen=True, eq=False)
class Scores:
    """How probable a model finds N data.

    Attributes:
        log_prob: (N,), a lower bound on log p(x), in nats.
        ids: (N,), what names each datum in its source, or its row.
    """

    log_prob: Tensor
    ids: np.ndarray

    @cached_property
    def rank(self) -> Tensor:
        """(N,), 1 for the least probable datum, 2 for the next, up to N; those without a finite score come first."""
        rank = torch.empty(len(self.log_prob), dtype=torch.long)
        order = self.log_prob.nan_to_num(-math.inf, math.inf, -math.inf).argsort(stable=True)
        rank[order] = torch.arange(1, len(rank) + 1)
        return rank

    def to_frame(self) -> Any:
        """A pandas frame with the columns ``id``, ``log_prob`` and ``rank``, in the order of the data."""
        import pandas

        return pandas.DataFrame({"id": self.ids, "log_prob": self.log_prob.numpy(), "rank": self.rank.numpy()})

    def __repr__(self) -> str:
        return f"Scores({len(self.log_prob):,} data, {self.log_prob.min():.2f} to {self.log_prob.max():.2f} nats)"


def scores(model: Callable, guide: Callable, data: Any, *, num_samples: int = 100, seed: int = 0) -> Scores:
    """``log 1/K sum_k p(x, z_k) / q(z_k | x) <= log p(x)`` in nats, for each datum, with K = `num_samples` draws.

    Low scores mark anomalies: the `rank` of the least probable datum is 1. A split's standardisation is undone, as in
    `evaluate`. Draws belong to places: the same datum in another place has another score, within its Monte Carlo error.

    Args:
        model, guide: Pyro programs.
        data: what `fit` takes.
        num_samples: K.
        seed: of the draws.

    Raises:
        ValueError: data outside the likelihood's support, and as `evaluate`.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> model = VAE((4,), latent_dim=2)
        >>> found = scores(model, AmortizedGuide(model), torch.ones(5, 4), num_samples=10)
        >>> found.log_prob.shape, sorted(found.rank.tolist())
        (torch.Size([5]), [1, 2, 3, 4, 5])
        >>> list(found.to_frame().columns)
        ['id', 'log_prob', 'rank']
    """
    data = as_data(data, model, guide)
    evaluation = evaluate(model, guide, data, num_samples=num_samples, seed=seed, progress=False)
    log_prob = evaluation.per_datum["log_predictive" if evaluation.global_sites else "log_evidence"]
    ids = getattr(data, "ids", None)
    return Scores(log_prob.detach().cpu(), np.arange(len(data)) if ids is None else ids)


def to_arviz(model: Callable, guide: Callable, data: Any, *, num_samples: int = 100, seed: int = 0) -> Any:
    """Draws of the pair for ArviZ: an ``InferenceData`` (ArviZ 0.x), or a ``DataTree`` (ArviZ 1.x).

    Groups ``prior`` and ``prior_predictive`` (z ~ p(z), x ~ p(x | z)), ``posterior`` and
    ``posterior_predictive`` (z ~ q(z | x), a new x ~ p(x | z)), ``log_likelihood`` (log p(x | z) of the
    posterior's draws, in nats, in the units that the model sees) and ``observed_data``. Dimensions ``chain``
    (1), ``draw`` (`num_samples`), ``datum`` (N), then ``z_dim_0`` and so on. All draws are kept,
    ``num_samples * N`` data twice: hand over a part of a large data set. Global sites have no dimension ``datum``: each
    of their draws is shared by all data.

    Raises:
        ValueError: fewer than one draw, data outside the likelihood's support, or no plate of the data.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> model = VAE((4,), latent_dim=2)
        >>> inference = to_arviz(model, AmortizedGuide(model), torch.ones(5, 4), num_samples=10)
        >>> dict(inference["posterior"].sizes)
        {'chain': 1, 'draw': 10, 'datum': 5, 'z_dim_0': 2}
    """
    num_samples = positive("num_samples", num_samples)
    drawn: dict[str, dict[str, list[Tensor]]] = {}  # group, site: a tensor (K, B, ...) per batch
    observed: list[Tensor] = []
    with isolated(model, guide):
        torch.manual_seed(seed)
        for args, kwargs in _batches(data, seed, model, guide):
            guide_trace, trace = _traces(model, guide, args, kwargs)
            site = _observation(trace)
            if not observed:
                plate = plate_of_pair(model, guide, args, kwargs)
                shared = [name for name, each in _latents(guide_trace).items() if _plate_dim(each, plate) is None]
                made_of = [name for name, each in samples(guide_trace) if _plate_dim(each, plate) is None]
                of_prior, of_guide = (
                    global_draws(program, names, args, kwargs, num_samples)
                    for program, names in ((_of_prior(model, args, kwargs), shared), (guide, made_of))
                )
            given = zip(of_prior, of_guide, strict=True)
            draws = [_draw_groups(model, guide, args, kwargs, plate, *each) for each in given]
            for group, sites in draws[0].items():
                for name in sites:
                    stacked = torch.stack([draw[group][name].cpu() for draw in draws])
                    drawn.setdefault(group, {}).setdefault(name, []).append(stacked)
            observed.append(_by_datum(site, site["value"], plate).cpu())
    groups = {
        group: {
            name: (batches[0] if name in shared else torch.cat(batches, dim=1))[None] for name, batches in sites.items()
        }
        for group, sites in drawn.items()
    }
    return _inference_data({**groups, "observed_data": {OBSERVATION: torch.cat(observed)}}, shared)


def _of_prior(model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """The model without its data: called with `num_data`, where it takes that, else with the data, which it draws
    anew."""
    if "num_data" not in inspect.signature(getattr(model, "forward", model)).parameters:
        return poutine.uncondition(model)
    given = _without_data(model, args, kwargs)
    return lambda *args, **kwargs: model(num_data=len(args[0]), **given)


def _draw_groups(
    model: Callable,
    guide: Callable,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    plate: str,
    of_prior: poutine.Trace,
    of_guide: poutine.Trace,
) -> dict[str, dict[str, Tensor]]:
    """One draw per datum of each of ArviZ's groups, at draws of global sites."""
    guide_trace, model_trace = _traces(model, poutine.replay(guide, of_guide), args, kwargs)
    check_given(of_guide, guide_trace)
    prior = _of_prior(model, args, kwargs)
    prior_trace = poutine.trace(poutine.replay(prior, of_prior)).get_trace(*args, **kwargs)
    latents, posterior = _latents(guide_trace), _observation(model_trace)
    for frame in posterior["cond_indep_stack"]:
        if frame.name != plate and frame.full_size not in (None, frame.size):
            raise ValueError(
                f'expected every plate within "{plate}" to be whole, got {frame.size} of {frame.full_size} elements of '
                f'"{frame.name}", which make no log-likelihood of a datum: leave out its subsample_size'
            )
    check_support(OBSERVATION, posterior["fn"], posterior["value"])
    log_prob = on_plates(posterior, log_prob_of(posterior))
    data_dim = next(frame.dim for frame in posterior["cond_indep_stack"] if frame.name == plate)
    drawn = {name: _by_datum(site, site["value"], plate) for name, site in samples(prior_trace)}
    return {
        "prior": {name: drawn[name] for name in latents},
        "prior_predictive": {OBSERVATION: drawn[OBSERVATION]},
        "posterior": {name: _by_datum(site, site["value"], plate) for name, site in latents.items()},
        "posterior_predictive": {OBSERVATION: _by_datum(posterior, posterior["fn"].sample(), plate)},
        "log_likelihood": {OBSERVATION: per_datum(log_prob, data_dim, -1 - log_prob.dim())[0]},
    }


def _without_data(model: Callable, args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Keywords with which the model draws data like these: as long sequences, where it is of these."""
    signature = inspect.signature(getattr(model, "forward", model))
    if "num_steps" not in signature.parameters:
        return kwargs
    given = signature.bind(*args, **kwargs).arguments
    return {"u": given["u"]} if "u" in given else {"num_steps": given["x"].shape[1]}


def _inference_data(groups: Mapping[str, Mapping[str, Tensor]], shared: Sequence[str]) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
        import arviz
    import xarray

    datasets: dict[str, Any] = {}
    for group, sites in groups.items():
        variables = {}
        for name, value in sites.items():
            leading = [*([] if group == "observed_data" else ["chain", "draw"]), *([] if name in shared else ["datum"])]
            own = [f"{name}_dim_{i}" for i in range(value.ndim - len(leading))]
            variables[name] = ([*leading, *own], value.numpy())
        dataset = xarray.Dataset(variables)
        datasets[group] = dataset.assign_coords({dim: range(size) for dim, size in dataset.sizes.items()})
    if "InferenceData" in vars(arviz):
        return arviz.InferenceData(**datasets)
    return xarray.DataTree.from_dict(datasets)


def _batches(data: Any, seed: int, *programs: Any) -> Iterator[tuple[tuple[Tensor, ...], dict[str, Tensor]]]:
    """The data in order, as calls of a program, on the device that the programs' parameters are on."""
    modules = (program for program in programs if isinstance(program, nn.Module))
    data = as_data(data, *programs)
    device = next((p.device for module in modules for p in module.parameters()), data.device)
    data = data.to(device)
    generator = torch.Generator(device).manual_seed(int(seed))
    elements = max(tensor[0].numel() for tensor in data.args)
    for index in torch.arange(len(data), device=device).split(_rows(elements)):
        yield data.batch(index, generator)


def _rows(elements: int) -> int:
    return max(1, MAX_ELEMENTS // elements)


def _drawn(model: Callable, num_data: int, kwargs: Mapping[str, Any] | None = None) -> poutine.Trace:
    return poutine.trace(model).get_trace(num_data=num_data, **kwargs or {})


def _traces(
    model: Callable, guide: Callable, args: tuple[Tensor, ...], kwargs: Mapping[str, Any]
) -> tuple[poutine.Trace, poutine.Trace]:
    """Of one draw z ~ q(z | x), and of the model at it."""
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    return guide_trace, poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args, **kwargs)


def _observation(trace: poutine.Trace) -> Any:
    sites = dict(samples(trace))
    if OBSERVATION not in sites:
        raise ValueError(f'expected the site "{OBSERVATION}", got the sites {sorted(sites)}: name it so')
    return sites[OBSERVATION]


def _latents(trace: poutine.Trace) -> dict[str, Any]:
    return {
        name: site for name, site in samples(trace) if not site["is_observed"] and not site["infer"].get("is_auxiliary")
    }


def _plate_dim(site: Any, plate: str) -> int | None:
    """Of the plate of the data in the site's values, from the right; None of a global site."""
    for frame in site["cond_indep_stack"]:
        if frame.name == plate:
            return frame.dim - len(site["fn"].event_shape)
    return None


def _plate_of(guide: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The plate of the data; none where all sites are global."""

    def run(rows: int) -> list[poutine.Trace]:
        given, named = some_rows(args, kwargs, rows)
        return [poutine.trace(guide).get_trace(*given, **named)]

    try:
        with torch.random.fork_rng():
            return plate_of_data(run, len(args[0]))
    except ValueError:  # of plates of other things alone
        return ""


def _shared(trace: poutine.Trace, plate: str) -> dict[str, Any]:
    """The latent sites outside the plate of the data."""
    return {
        name: site for name, site in _latents(trace).items() if name != OBSERVATION and _plate_dim(site, plate) is None
    }


def _of_all(values: Mapping[str, Tensor], shared: Mapping[str, Any]) -> dict[str, Tensor]:
    """Values of global sites as the model has them."""
    for name, value in values.items():
        if name not in shared:
            raise ValueError(f'expected values of the global sites {sorted(shared)}, got one of "{name}": leave it out')
        if value.shape != shared[name]["value"].shape:
            expected = tuple(shared[name]["value"].shape)
            raise ValueError(f'expected the global site "{name}" with shape {expected}, got {tuple(value.shape)}')
    return {name: value.to(shared[name]["value"]) for name, value in values.items()}


def _by_datum(site: Any, value: Tensor, plate: str) -> Tensor:
    """A value or a moment of the site, with its data on dimension 0; that of a global site as it is."""
    dim = _plate_dim(site, plate)
    return value if dim is None else value.movedim(dim, 0)


def _in_plates(site: Any, value: Tensor, plate: str) -> Tensor:
    """A value with its data on dimension 0 as the site has it."""
    dim = _plate_dim(site, plate)
    return (value if dim is None else value.movedim(0, dim)).to(site["value"])


def _moment(site: Any, name: str, plate: str) -> Tensor | None:
    """The distribution's mean or variance, data first; None where it has no closed form."""
    innermost = site["fn"]
    while hasattr(innermost, "base_dist"):
        innermost = innermost.base_dist
    if isinstance(innermost, torch.distributions.Categorical):  # whose mean is NaN
        return None
    try:
        return _by_datum(site, getattr(site["fn"], name), plate)
    except NotImplementedError:
        return None


def _mean(site: Any, plate: str) -> Tensor:
    mean = _moment(site, "mean", plate)
    if mean is None:
        raise ValueError(f"expected p(x | z) with a mean in closed form, got {site['fn']}: use sample(...)")
    return mean


def _named(z: Tensor | Mapping[str, Tensor], sites: Mapping[str, Any], plate: str) -> dict[str, Tensor]:
    """The latent values by site, checked against the model's own."""
    if isinstance(z, Tensor):
        if len(sites) != 1:
            raise ValueError(f"expected a dict of latent values from some of {sorted(sites)}, got one tensor")
        z = {next(iter(sites)): z}
    if not z or not z.keys() <= sites.keys():
        raise ValueError(f"expected latent values for some of the sites {sorted(sites)}, got {sorted(z)}")
    for name, value in z.items():
        shape = _by_datum(sites[name], sites[name]["value"], plate).shape[1:]
        if value.ndim == 0 or len(value) == 0 or value.shape[1:] != shape:
            raise ValueError(f'expected "{name}" with shape {("N", *shape)}, got {tuple(value.shape)}')
    if len({len(value) for value in z.values()}) != 1:
        raise ValueError(f"expected as many values of each site, got { {n: len(v) for n, v in z.items()} }")
    return dict(z)


def _like(model: Callable, value: Any) -> Any:
    """An array as a tensor of the model's dtype; all else as it is."""
    if isinstance(value, list | tuple):
        raise ValueError(f"expected a tensor or an array, got a {type(value).__name__}: torch.as_tensor(...) makes one")
    found = tensor_of(value)
    return value if found is value else as_data((found[None],), model).args[0][0]


def _stack(values: list[Tensor | None]) -> Tensor | None:
    present = [value for value in values if value is not None]
    return torch.stack(present).cpu() if len(present) == len(values) else None


def _joined(batches: list[Encoding]) -> Encoding:
    if batches[0].is_global:
        return batches[0]
    scales = [batch.scale for batch in batches if batch.scale is not None]
    draws = [batch.draws for batch in batches if batch.draws is not None]
    return Encoding(
        mean=torch.cat([batch.mean for batch in batches]),
        scale=torch.cat(scales) if scales else None,
        draws=torch.cat(draws, dim=1) if draws else None,
    )
