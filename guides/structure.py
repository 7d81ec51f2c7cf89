"""What a guide reads off a Pyro model of static structure: its latent sites, their plates, and what a call observes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import MixtureSameFamilyConstraint
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from ..distributions import Remembered, is_masked, unconstrained

__all__ = ["Call", "Calls", "Latent", "Plate", "check_static", "data_plate", "latents", "traced", "untouched"]

MAX_CALLS = 100  # signatures that are kept
PERIODIC = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)


class Plate(NamedTuple):
    name: str
    dim: int
    size: int
    full_size: int


class Call(NamedTuple):
    """What the model is for arguments of one signature."""

    plates: dict[str, Plate]
    drawn: frozenset[str]  # plates that draw their rows
    observed: frozenset[str]  # latent sites that are observed now


class Calls:
    """A `Call` for each signature: shapes of tensors, values of the rest."""

    __slots__ = ("known",)  # it follows from arguments alone, so that no guard of a compiled step need look here

    def __init__(self) -> None:
        self.known: dict[Any, Call] = {}

    def of(self, model: Callable, sites: Mapping[str, Latent], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        key = _signature((args, dict(kwargs)))
        if key not in self.known:
            unrecorded = disable_proxy_modes_tracing()  # where a compiled step meets the signature: bounds are read
            with unrecorded, untouched(model), poutine.block(), _DrawnRows() as drawn, torch.no_grad():
                trace = poutine.trace(model).get_trace(*args, **kwargs)
                events = {name: latent.event for name, latent in latents(trace).items()}
            if more := events.keys() - sites.keys():
                raise ValueError(
                    f"expected the latent sites {list(sites)} of the example, got {sorted(more)} beside: build the "
                    "guide with an example in which nothing latent is given"
                )
            for name, event in events.items():
                if event != sites[name].event:
                    raise ValueError(
                        f'expected latent site "{name}" as in the example, {sites[name].event}, got {event}: sample it '
                        "on a fixed support, such as (0, 1), and scale it in the model"
                    )
            nodes = dict(_samples(trace)).items()
            plates = {plate.name: plate for _, site in nodes for plate in _plates(site)}
            observed = {name for name, site in nodes if site["is_observed"]} & sites.keys()
            while len(self.known) >= MAX_CALLS:
                self.known.pop(next(iter(self.known)))
            self.known[key] = Call(plates, frozenset(drawn.names), frozenset(observed))
        return self.known[key]


class _DrawnRows(Messenger):
    """Notes the plates that draw their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if type(msg["fn"]).__name__ == "_Subsample" and msg["value"] is None:
            self.names.add(msg["name"])


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Tensor, value.shape
    if isinstance(value, Mapping):
        return type(value), *((key, _signature(each)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return type(value), *map(_signature, value)
    try:
        hash(value)
    except TypeError:
        return object()  # never seen: the model is traced again
    return type(value), value


class Latent:
    """A latent site of the model."""

    def __init__(self, name: str, site: Mapping[str, Any]) -> None:
        self.name, self.event_shape, self.support = name, site["fn"].event_shape, site["fn"].support
        self.support = _of_components(self.support)
        self.plates = _plates(site)
        scale = math.prod(plate.full_size / plate.size for plate in self.plates)
        if is_masked(site) or not math.isclose(float(site["scale"]), scale, rel_tol=1e-5):
            raise ValueError(
                f'expected latent site "{name}" without a mask or a scale of its own, which q would lack: mask what is '
                "observed alone, and scale model and guide together, as by pyro_vae.svi.latent_scale"
            )
        parts = [*_parts(site["fn"])]
        if any(isinstance(part, PERIODIC) for part in parts):
            raise ValueError(
                f'expected latent site "{name}" over the real numbers or a subset, got angles: sample a vector and '
                "take its direction"
            )
        if any(isinstance(part, dist.Delta) for part in parts):
            raise ValueError(
                f'expected latent site "{name}" with a density, got a point: take pyro.deterministic, or a '
                "distribution with a spread"
            )
        self.base: Any = self.support
        while hasattr(self.base, "base_constraint"):
            self.base = self.base.base_constraint
        for bound, value in vars(self.base).items():
            if not isinstance(value, Tensor):
                continue
            if value.requires_grad or (value.numel() > 1 and bool((value != value.flatten()[0]).any())):
                raise ValueError(
                    f'expected latent site "{name}" with one fixed support for all, got {self.base}: sample it on a '
                    "fixed one, such as (0, 1), and scale it in the model"
                )
            setattr(self.base, bound, value.flatten()[0])
        self.categories: int | None = None
        if isinstance(self.base, constraints.integer_interval):
            if int(self.base.lower_bound) != 0:
                raise ValueError(
                    f'expected latent site "{name}" on integers from 0 on, got {self.base}: draw them from 0, and '
                    "shift them in the model"
                )
            self.categories = int(self.base.upper_bound) + 1
        self._check_bijection()
        if not self.is_discrete and not self.bare_shape.numel():
            raise ValueError(
                f'expected latent site "{name}" with something to infer, got {self.base} of shape '
                f"{tuple(self.event_shape)}, on which there is one value: take pyro.deterministic"
            )
        self.dtype, self.device = site["value"].dtype, site["value"].device
        self.size = self.flat(site["value"]).shape[-1]
        batch, dims = site["fn"].batch_shape, {plate.dim for plate in self.plates}
        if any(size > 1 and dim not in dims for dim, size in zip(range(-len(batch), 0), batch, strict=True)):
            raise ValueError(
                f'expected latent site "{name}" with its batch in plates, got batch shape {tuple(batch)} in the plates '
                f"{[plate.name for plate in self.plates]}: add pyro.plate or to_event"
            )

    def _check_bijection(self) -> None:
        if self.is_discrete or self.is_real:
            return
        try:
            biject_to(self.support).inverse_shape(self.event_shape)
        except NotImplementedError:
            kind = type(self.base).__name__.strip("_")
            raise ValueError(
                f'expected latent site "{self.name}" on a support that real numbers can be mapped to, got {kind}, '
                "which biject_to does not know: sample real numbers, and map them in the model (for a covariance "
                "scales and LKJCholesky, for a direction a vector that is divided by its length)"
            ) from None

    def check_density(self, p: Any) -> None:
        """Raises ValueError where the model's density p is none on the support that it declares."""
        if self.is_discrete:
            return
        problem = ""
        for dtype in dict.fromkeys((self.dtype, torch.float64)):  # a value may be off the support by rounding alone
            found = self._problem(p, dtype)
            if found is None:
                return
            problem = problem or found
        raise ValueError(
            f'expected latent site "{self.name}" with a density on all of its support, {self.base}, got {problem}: '
            "take a distribution whose support is what it says, or sample real numbers, and map them in the model"
        )

    def _problem(self, p: Any, dtype: Any) -> str | None:
        """What is wrong with p at some values."""
        try:
            for number in (-1.0, 0.5, 1.5):
                u = torch.full(p.batch_shape + self.bare_shape, number, dtype=dtype, device=self.device)
                value, log_probs = u, []
                if not self.is_real:
                    bijection = biject_to(self.support)
                    value = bijection(u)
                    log_probs.append(bijection.log_abs_det_jacobian(u, value))
                log_probs.append(p.log_prob(value))
                sound = bool(value.isfinite().all()) and not any(bool(each.isnan().any()) for each in log_probs)
                if not sound or any(each.shape != p.batch_shape for each in log_probs):
                    return "none"
        except (NotImplementedError, RuntimeError, ValueError) as error:
            return f"{type(error).__name__} {error}".strip()
        return None

    @property
    def event(self) -> tuple[Any, ...]:
        """Shape and support."""
        bounds = {name: float(value) for name, value in vars(self.base).items() if isinstance(value, Tensor | float)}
        return tuple(self.event_shape), type(self.base).__name__.strip("_"), bounds

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Latent) and self._key() == other._key()

    def _key(self) -> tuple[Any, ...]:
        return self.name, self.plates, self.event

    @property
    def is_discrete(self) -> bool:
        return bool(self.base.is_discrete)

    @property
    def is_real(self) -> bool:
        return isinstance(self.base, type(constraints.real))  # a copy is another object

    @property
    def bare_shape(self) -> torch.Size:
        """Of an event over the real numbers."""
        if self.is_real:
            return self.event_shape
        return biject_to(self.support).inverse_shape(self.event_shape)

    def constrained(self, q: Any) -> Any:
        """q over the site's support, from q over real numbers; q itself where the support is these, or discrete."""
        if self.is_discrete or self.is_real:
            return q
        return dist.TransformedDistribution(q, [Remembered(self.support)])

    def flat(self, value: Tensor) -> Tensor:
        """A value of the site as vectors, ``(*plates, size)``: one-hot, or over the real numbers. Of a constrained site
        it is ``asinh`` of the numbers over the reals, which in a sparse one are in hundreds.
        """
        events = len(self.event_shape)
        if self.categories is not None:
            value, events = nn.functional.one_hot(value.long(), self.categories), events + 1
        elif not self.is_discrete and not self.is_real:
            value, events = unconstrained(self.support, value).asinh(), len(self.bare_shape)
        return value.flatten(start_dim=-events) if events else value[..., None]


def _of_components(support: Any) -> Any:
    """The support of a mixture's components in the place of the mixture's."""
    if isinstance(support, MixtureSameFamilyConstraint):
        return _of_components(support.base_constraint)
    if isinstance(support, type(constraints.independent(constraints.real, 1))):
        return constraints.independent(_of_components(support.base_constraint), support.reinterpreted_batch_ndims)
    return support


def _plates(site: Mapping[str, Any]) -> tuple[Plate, ...]:
    frames = site["cond_indep_stack"]
    if any(not frame.vectorized for frame in frames):
        raise ValueError(
            f'expected vectorised plates, got site "{site["name"]}" in a sequential one: use `with pyro.plate(...)`'
        )
    return tuple(Plate(frame.name, frame.dim, frame.size, frame.full_size or frame.size) for frame in frames)


def _samples(trace: poutine.Trace) -> Iterator[tuple[str, Any]]:
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample":
            yield name, site


def _parts(distribution: Any) -> Iterator[Any]:
    """The distribution, what it is made from, and what that is a mixture of."""
    while distribution is not None:
        yield distribution
        distribution = getattr(distribution, "base_dist", getattr(distribution, "component_distribution", None))


def traced(model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> poutine.Trace:
    """The model's trace.

    Raises:
        ValueError: a site that has no draws, such as an improper one.
    """
    with _Site() as site:
        try:
            return poutine.trace(model).get_trace(*args, **kwargs)
        except NotImplementedError as error:
            named = "a site" if site.name is None else f'"{site.name}"'
            raise ValueError(
                f"expected a model that can be drawn from, got {named} that cannot ({error}): take a distribution with "
                "draws"
            ) from error


class _Site(Messenger):
    """Knows which site is being drawn."""

    name: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        self.name = msg["name"]

    def _pyro_post_sample(self, msg: Any) -> None:
        self.name = None


def latents(trace: poutine.Trace) -> dict[str, Latent]:
    """The latent sites, without those that the estimator sums out."""
    sites = [(n, s) for n, s in _samples(trace) if not s["is_observed"] and s["infer"].get("enumerate") != "parallel"]
    return {name: Latent(name, site) for name, site in sites}


def data_plate(trace: poutine.Trace, count: int) -> Plate | None:
    """The one called "data", else the outermost of an observed site that has `count` elements, else the outermost."""
    observed: list[Plate] = []
    for _, site in _samples(trace):
        named = next((plate for plate in _plates(site) if plate.name == "data"), None)
        if named is not None:
            return named
        if site["is_observed"] and not site["infer"].get("_deterministic"):
            observed += _plates(site)
    fitting = [plate for plate in observed if count in plate[2:]] or observed
    if len(names := {plate.name for plate in fitting if count in plate[2:]}) > 1:
        raise ValueError(
            f'expected one plate of {count} data, got {sorted(names)}: call the one of independent data "data", or '
            "give an example with another number of data"
        )
    return fitting[0] if fitting else None


def check_static(sites: Mapping[str, Latent], again: Mapping[str, Latent]) -> None:
    for name in [*sites, *again]:
        if sites.get(name) != again.get(name):
            raise ValueError(
                f'expected a model of static structure, got a latent site "{name}" that differs between runs, in '
                "presence, shape or support: decide by masks and torch.where, and take supports that depend on no draw"
            )


@contextlib.contextmanager
def untouched(*programs: Any) -> Iterator[None]:
    """Random state, Pyro's parameter store and the modules' modes are after the block what they were before it."""
    owners = [getattr(program, "__self__", program) for program in programs]  # of bound methods
    submodules = [m for owner in owners if isinstance(owner, nn.Module) for m in owner.modules()]
    modes = [(submodule, submodule.training) for submodule in submodules]
    store = pyro.get_param_store()
    plain = not all(isinstance(owner, nn.Module) for owner in owners)  # functions read the store's values
    try:
        with torch.random.fork_rng(), store.scope(store.get_state() if plain else None):
            for submodule in submodules:
                submodule.training = False
            yield
    finally:
        for submodule, training in modes:
            submodule.training = training
        dict(store.items())  # reading a parameter gives it back its `unconstrained`, which `scope` takes from it
