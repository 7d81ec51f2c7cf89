"""The inference half, q(z | x), of any Pyro model of static structure."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import MixtureSameFamilyConstraint
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from ..config import Configured
from ..nn import MLP, Heads, bind
from .families import Bernoulli, Categorical, DiagonalNormal, Family

__all__ = ["AmortizedGuide"]

Example = tuple[Sequence[Any], Mapping[str, Any]]
Dependencies = Literal["earlier", "none"] | Mapping[str, Sequence[str]]

MAX_CALLS = 100  # signatures that are kept
RESERVED = nn.ModuleDict()
PERIODIC = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)


class AmortizedGuide(Configured, PyroModule):
    """``q(z | x) = prod_i q(z_i | encoder(x), z_<i)`` over the latent sites of `model`, in the model's order.

    The model is traced for its latent sites, their shapes, plates and supports. Each gets a copy of `family`, or of
    ``family[site]``, whose features are the encoder's output beside the values of earlier sites (`dependencies`:
    "earlier", "none", or the names for each site). A constrained support is reached through ``biject_to``; discrete
    sites get a `Categorical` or `Bernoulli`; those that the model marks for enumeration are left to it. Sites outside
    the data's plate are global: their q has parameters of its own, and local sites depend on them only where
    `dependencies` says so.

    `encoder` is any module from a datum to a vector of features, or to ``(B, *plates, features)`` for plates within the
    data's, from the outermost; it is fed `encoder_inputs(*args, **kwargs)`, by default the first tensor, with zeros in
    the place of NaN. A site gets the mean of the features over plates that it is not in, and is told which element it
    is of plates that they do not have. The data's plate is the one called "data", else the one of an observed site that
    has as many elements as the first tensor, else the outermost. A latent site that a call observes is conditioned on,
    not drawn: its value is the argument of its name. The model is traced once for each signature of its arguments, for
    plates and what is observed, which must follow from the shapes of tensors and the values of the rest. The sizes come
    from `example`, ``(args, kwargs)`` of a call, else from a draw ``model(num_data=2)``, else from the first call. The
    model is not a submodule: its parameters are its own.

    Raises:
        ValueError: sites, shapes or supports that differ between two runs of the model; supports that differ from datum
            to datum, or are learned; latent sites with a mask or a scale beside their plates', or over angles;
            sequential plates; unbounded counts; several plates that may be the data's, or an encoder's; features that
            do not broadcast to a site's plates; rows of a plate that are neither drawn by it nor given.

    Example:
        >>> from pyro_vae.models import VAE
        >>> model = VAE((1, 8, 8), latent_dim=4)
        >>> guide = AmortizedGuide(model)
        >>> guide(torch.zeros(3, 1, 8, 8))["z"].shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        model: Callable,
        encoder: nn.Module | None = None,
        family: Family | Mapping[str, Family] = DiagonalNormal(),  # noqa: B008  a declaration: `bind` copies it
        encoder_inputs: Callable[..., Tensor] | None = None,
        example: Example | None = None,
        dependencies: Dependencies = "earlier",
    ) -> None:
        super().__init__()
        self._declared = (model, encoder, family, dependencies)
        self._encoder_inputs = encoder_inputs
        self._sites: dict[str, _Latent] = {}
        self._parents: dict[str, tuple[str, ...]] = {}
        self._unseen: dict[str, tuple[_Plate, ...]] = {}  # plates of a site that the encoder's output does not have
        self._seen_in: tuple[int, ...] = ()
        self._calls = _Calls()
        self._data: Any = None
        self.heads: Any = nn.ModuleDict()
        if example is None:
            if "num_data" not in inspect.signature(getattr(model, "forward", model)).parameters:
                return
            try:
                with _untouched(model), poutine.block():
                    drawn = model(num_data=2)
            except (TypeError, ValueError):  # it wants more: the first call has it
                return
            if drawn is None:
                return
            example = (drawn if isinstance(drawn, tuple) else (drawn,), {})
        self._build(*example)

    def _build(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        model, encoder, family, dependencies = self._declared
        tensors = _tensors(args, kwargs)
        with _untouched(model), poutine.block():
            sites, *others = [_latents(trace := poutine.trace(model).get_trace(*args, **kwargs)) for _ in range(8)]
        self._data = _data_plate(trace, len(tensors[0]) if tensors else 0)
        for again in others:
            _check_static(sites, again)
        if not sites:
            raise ValueError("expected a model with latent sites, got one without: there is nothing to infer")
        families = family if isinstance(family, Mapping) else dict.fromkeys(sites, family)
        for given in (families, {} if isinstance(dependencies, str) else dependencies):
            if not given.keys() <= sites.keys():
                raise ValueError(f"expected names among the latent sites {list(sites)}, got {list(given)}")
        for name in families if isinstance(family, Mapping) else ():
            if sites[name].is_discrete and not isinstance(families[name], Bernoulli | Categorical):
                raise ValueError(
                    f'expected a discrete family for latent site "{name}" on {sites[name].base}, got '
                    f"{type(families[name]).__name__}: leave it out, and it gets its own"
                )
        if not isinstance(family, Mapping | DiagonalNormal | Bernoulli | Categorical) and all(
            site.is_discrete for site in sites.values()
        ):
            raise ValueError(
                f"expected latent sites with a density for {type(family).__name__}, got {list(sites)}, all discrete: "
                "leave the family out"
            )
        self._sites = sites
        features, like = 0, next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
        if any(self._data in site.plates for site in sites.values()):
            inputs = self.encoded(*args, **kwargs)
            like = inputs if inputs.is_floating_point() else torch.empty(0, device=inputs.device)
            self.encoder = bind(MLP() if encoder is None else encoder, inputs.shape[1:]).to(like)
            call = self._call(args, kwargs)
            with _untouched(self.encoder), poutine.block(), torch.no_grad():
                h, _, dims = self._encode(call, args, kwargs)
            features = h.shape[-1]
            self._seen_in = _seen_in(h, dims, [site for site in sites.values() if self._data in site.plates])
        for name, site in sites.items():
            local = self._data in site.plates
            self._parents[name] = _parents(site, sites, dependencies, self._data)
            unseen = [
                plate for plate in site.plates if plate != self._data and not (local and plate.dim in self._seen_in)
            ]
            self._unseen[name] = tuple(unseen)
            own = features if local else 0
            known = own + sum(sites[parent].size for parent in self._parents[name])
            size = known + (math.prod(plate.full_size for plate in unseen) if unseen else 0)
            self.heads[_key(name)] = head = site.head(families.get(name, DiagonalNormal()), size).to(like)
            for module in head.modules() if known > own else ():
                if isinstance(module, Heads):  # else scales, exponentials of sums of draws, grow along a chain of sites
                    module.linear.weight.data[:, own:known] *= 0.1

    def encoded(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the encoder is fed, shape ``(B, ...)``."""
        if self._encoder_inputs is not None:
            x = self._encoder_inputs(*args, **kwargs)
        else:
            tensors = _tensors(args, kwargs)
            if not tensors:
                raise ValueError("expected a tensor of data to encode, got none: call guide(x)")
            like = next(self.parameters(), torch.empty(0))
            x = tensors[0] if tensors[0].is_floating_point() else tensors[0].to(like.dtype)
        return x.where(x == x, 0.0) if x.is_floating_point() else x

    def posterior(self, *args: Any, site: str = "z", **kwargs: Any) -> Any:
        """``q(z | x)`` of a latent site that depends on no other, as a distribution with batch shape ``(B,)``."""
        if not self._sites:
            self._build(args, kwargs)
        if site not in self._sites or self._parents[site]:
            raise ValueError(f"q({site} | x) depends on other draws, or is no latent site: use guide(...)")
        h, plates, _ = self._encode(self._call(args, kwargs), args, kwargs)
        return self._q(site, self.heads[_key(site)], h, plates, {})

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent site; returns ``{site: value}``."""
        if not self._sites:
            self._build(args, kwargs)
        call = self._call(args, kwargs)
        h, plates, _ = self._encode(call, args, kwargs)
        given = _arguments(self._declared[0], args, kwargs)
        values: dict[str, Tensor] = {}
        draws, heads = {}, self.heads  # looked up once, as Pyro registers what it finds
        for name, site in self._sites.items():
            if name in call.observed:
                if not isinstance(given.get(name), Tensor):
                    raise ValueError(
                        f'expected the value of the observed site "{name}" as the argument {name}, got none'
                    )
                values[name] = given[name]
                continue
            with contextlib.ExitStack() as stack:
                for plate in site.plates:
                    stack.enter_context(plates[plate.name])
                values[name] = draws[name] = pyro.sample(name, self._q(name, heads[_key(name)], h, plates, values))
        return draws

    def _call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Call:
        return self._calls.of(self._declared[0], self._sites, args, kwargs)

    def _encode(
        self, call: _Call, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Any], list[int]]:
        """Features, ``(*plates, features)``, the plates, and the dimensions that the encoder's output has."""
        known = {plate.name: call.plates[plate.name] for site in self._sites.values() for plate in site.plates}
        data = known.pop(self._data.name, None) if self._data else None
        for plate in known.values():
            if plate.size < plate.full_size and plate.name not in call.drawn:
                raise ValueError(
                    f'expected the rows of plate "{plate.name}" to be drawn by it, got {plate.size} indices: leave '
                    "them to pyro.plate(..., subsample_size=...), or take all of them"
                )
        plates = {name: pyro.plate(name, plate.full_size, plate.size, dim=plate.dim) for name, plate in known.items()}
        if data is None:
            return torch.empty(0), plates, []
        inputs = self.encoded(*args, **kwargs)
        if len(inputs) == data.full_size > data.size and data.name not in call.drawn:
            raise ValueError(
                f'expected the rows of plate "{data.name}" to be drawn by it, or given as data, got {data.size} '
                "indices: let encoder_inputs return these rows"
            )
        if data.size == data.full_size:
            plates[data.name] = pyro.plate(data.name, len(inputs), dim=data.dim)
        elif len(inputs) == data.full_size:
            plates[data.name] = pyro.plate(data.name, data.full_size, data.size, dim=data.dim)
            inputs = inputs[plates[data.name].indices]
        else:
            batch = torch.arange(len(inputs), device=inputs.device)
            plates[data.name] = pyro.plate(data.name, data.full_size, subsample=batch, dim=data.dim)
        h = self.encoder(inputs)
        dims = [data.dim, *(plate.dim for plate in self._within())][: h.dim() - 1]
        if h.shape[:1] != inputs.shape[:1] or len(dims) != h.dim() - 1:
            raise ValueError(
                f'expected an encoder\'s output of shape (B, features), with the plates within "{data.name}", '
                f"{[plate.name for plate in self._within()]}, between, got {tuple(h.shape)} of {len(inputs)} data"
            )
        order = sorted(range(len(dims)), key=dims.__getitem__)
        shape = [1] * -min(dims)
        for dim, size in zip(dims, h.shape, strict=False):
            shape[dim] = size
        return h.permute(*order, -1).reshape(*shape, h.shape[-1]), plates, dims

    def _within(self) -> tuple[_Plate, ...]:
        """The plates within the data's, from the outermost."""
        stacks = [site.plates for site in self._sites.values() if self._data in site.plates]
        return max((stack[stack.index(self._data) + 1 :] for stack in stacks), key=len)

    def _q(self, name: str, head: Any, h: Tensor, plates: Any, values: Mapping[str, Tensor]) -> Any:
        """The site's distribution given the encoder's output and the sites that it depends on."""
        site = self._sites[name]
        parts = [site.on_its_plates(h, plates)] if self._data in site.plates else []
        parts += [self._sites[parent].flat(values[parent]) for parent in self._parents[name]]
        if unseen := self._unseen[name]:
            parts.append(_which(unseen, plates).to(next(head.parameters())))
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        features = torch.cat([part.expand(*batch, -1) for part in parts], dim=-1) if parts else h.new_empty(0)
        return site.constrained(head(features))


class _Plate(NamedTuple):
    name: str
    dim: int
    size: int
    full_size: int


class _Call(NamedTuple):
    """What the model is for arguments of one signature."""

    plates: dict[str, _Plate]
    drawn: frozenset[str]  # plates that draw their rows
    observed: frozenset[str]  # latent sites that are observed now


class _Calls:
    """A `_Call` for each signature: shapes of tensors, values of the rest."""

    __slots__ = ("known",)  # it follows from arguments alone, so that no guard of a compiled step need look here

    def __init__(self) -> None:
        self.known: dict[Any, _Call] = {}

    def of(
        self, model: Callable, sites: Mapping[str, _Latent], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> _Call:
        key = _signature((args, dict(kwargs)))
        if key not in self.known:
            unrecorded = disable_proxy_modes_tracing()  # where a compiled step meets the signature: bounds are read
            with unrecorded, _untouched(model), poutine.block(), _DrawnRows() as drawn, torch.no_grad():
                trace = poutine.trace(model).get_trace(*args, **kwargs)
                events = {name: latent.event for name, latent in _latents(trace).items()}
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
            self.known[key] = _Call(plates, frozenset(drawn.names), frozenset(observed))
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


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that may be data."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]


def _key(name: str) -> str:
    """A site's name among modules, whose names hold no dots and are no attributes of `nn.ModuleDict`."""
    return name.replace(".", "/") if "." in name else f"{name}/" if hasattr(RESERVED, name) else name


class _Latent:
    """A latent site of the model."""

    def __init__(self, name: str, site: Mapping[str, Any]) -> None:
        self.name, self.event_shape, self.support = name, site["fn"].event_shape, site["fn"].support
        if isinstance(self.support, MixtureSameFamilyConstraint):
            self.support = self.support.base_constraint
        self.plates = _plates(site)
        scale = math.prod(plate.full_size / plate.size for plate in self.plates)
        if site["mask"] is not None or not math.isclose(float(site["scale"]), scale, rel_tol=1e-5):
            raise ValueError(
                f'expected latent site "{name}" without a mask or a scale of its own, which q would lack: mask what is '
                "observed alone, and scale model and guide together, as by pyro_vae.svi.latent_scale"
            )
        if isinstance(_innermost(site["fn"]), PERIODIC):
            raise ValueError(
                f'expected latent site "{name}" over the real numbers or a subset, got angles: sample a vector and '
                "take its direction"
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
            self.categories = int(self.base.upper_bound) + 1
        self.dtype = site["value"].dtype
        self.size = self.flat(site["value"]).shape[-1]
        batch, dims = site["fn"].batch_shape, {plate.dim for plate in self.plates}
        if any(size > 1 and dim not in dims for dim, size in zip(range(-len(batch), 0), batch, strict=True)):
            raise ValueError(
                f'expected latent site "{name}" with its batch in plates, got batch shape {tuple(batch)} in the plates '
                f"{[plate.name for plate in self.plates]}: add pyro.plate or to_event"
            )

    @property
    def event(self) -> tuple[Any, ...]:
        """Shape and support."""
        bounds = {name: float(value) for name, value in vars(self.base).items() if isinstance(value, Tensor | float)}
        return tuple(self.event_shape), type(self.base).__name__.strip("_"), bounds

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Latent) and self._key() == other._key()

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

    def head(self, family: Family, features: int) -> Any:
        """The family, or the one of this site's discrete support, bound to it."""
        own: type[Bernoulli] | type[Categorical] | None = None
        if isinstance(self.base, type(constraints.boolean)):
            own = Bernoulli
        elif isinstance(self.base, type(constraints.one_hot)) or self.categories is not None:
            own = Categorical
        if self.is_discrete and own is None:
            raise ValueError(
                f'expected latent site "{self.name}" with a finite or a continuous support, got {self.base}: sum it '
                "out in the model, or take a distribution with a bound"
            )
        if isinstance(family, Bernoulli | Categorical) and type(family) is not own:
            fitting = own.__name__ if own else "a continuous one"
            raise ValueError(
                f'expected a family over the support of latent site "{self.name}", {self.base}, got '
                f"{type(family).__name__}: take {fitting}"
            )
        if own is None:
            return bind(family, features, self.bare_shape)
        family = family if isinstance(family, own) else own()
        integers = [] if self.categories is None else [self.categories, self.dtype]
        return bind(family, features, self.event_shape, *integers)

    def constrained(self, q: Any) -> Any:
        """q over the site's support, from q over real numbers; q itself where the support is these, or discrete."""
        if self.is_discrete or self.is_real:
            return q
        return dist.TransformedDistribution(q, [biject_to(self.support).with_cache(1)])

    def flat(self, value: Tensor) -> Tensor:
        """A value of the site as vectors, ``(*plates, size)``: one-hot, or over the real numbers."""
        events = len(self.event_shape)
        if self.categories is not None:
            value, events = nn.functional.one_hot(value.long(), self.categories), events + 1
        elif not self.is_discrete and not self.is_real:
            value, events = biject_to(self.support).inv(value), len(self.bare_shape)
        return value.flatten(start_dim=-events) if events else value[..., None]

    def on_its_plates(self, h: Tensor, plates: Mapping[str, Any]) -> Tensor:
        """The encoder's output, averaged over plates that this site is not in."""
        names = {plate.dim: plate.name for plate in self.plates}
        for dim in range(1 - h.dim(), 0):
            if dim not in names:
                h = h.mean(dim - 1, keepdim=True)
            elif h.shape[dim - 1] not in (1, size := plates[names[dim]].subsample_size):
                raise ValueError(
                    f'expected the encoder\'s output to have {size} on the dimension of plate "{names[dim]}" of site '
                    f'"{self.name}", got {h.shape[dim - 1]}: let it return (B, features), or (B, ..., features) with '
                    "the plates within between"
                )
        return h.reshape(h.shape[min(names) - 1 :])


def _which(some: Sequence[_Plate], plates: Mapping[str, Any]) -> Tensor:
    """Which element of these plates it is, one-hot, ``(*plates, elements)``."""
    number = torch.zeros(())
    for plate in some:
        if plates[plate.name].size != plate.full_size:
            raise ValueError(
                f'expected {plate.full_size} elements of plate "{plate.name}", as in the example, got '
                f"{plates[plate.name].size}: let the encoder return features for each, (B, ..., features)"
            )
        index = torch.as_tensor(plates[plate.name].indices)
        number = number * plate.full_size + index.reshape(-1, *[1] * (-1 - plate.dim))
    return number[..., None] == torch.arange(math.prod(plate.full_size for plate in some), device=number.device)


def _plates(site: Mapping[str, Any]) -> tuple[_Plate, ...]:
    frames = site["cond_indep_stack"]
    if any(not frame.vectorized for frame in frames):
        raise ValueError(
            f'expected vectorised plates, got site "{site["name"]}" in a sequential one: use `with pyro.plate(...)`'
        )
    return tuple(_Plate(frame.name, frame.dim, frame.size, frame.full_size or frame.size) for frame in frames)


def _samples(trace: poutine.Trace) -> Iterator[tuple[str, Any]]:
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample":
            yield name, site


def _innermost(distribution: Any) -> Any:
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return distribution


def _latents(trace: poutine.Trace) -> dict[str, _Latent]:
    """The latent sites, without those that the estimator sums out."""
    sites = [(n, s) for n, s in _samples(trace) if not s["is_observed"] and s["infer"].get("enumerate") != "parallel"]
    return {name: _Latent(name, site) for name, site in sites}


def _data_plate(trace: poutine.Trace, count: int) -> _Plate | None:
    """The one called "data", else the outermost of an observed site that has `count` elements, else the outermost."""
    observed: list[_Plate] = []
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


def _seen_in(h: Tensor, dims: Sequence[int], sites: Sequence[_Latent]) -> tuple[int, ...]:
    """The dimensions of plates whose elements have features of their own in the encoder's output."""
    seen = []
    for dim in dims:
        there = {plate.name: plate.size for site in sites for plate in site.plates if plate.dim == dim}
        if h.shape[dim - 1] > 1 or set(there.values()) == {1}:
            seen.append(dim)
            if len(there) > 1:
                raise ValueError(
                    f"expected one plate on dimension {dim} of the encoder's output, got {sorted(there)}: give each a "
                    "dimension of its own, pyro.plate(..., dim=...), or let the encoder return (B, features)"
                )
    return tuple(seen)


def _check_static(sites: Mapping[str, _Latent], again: Mapping[str, _Latent]) -> None:
    for name in [*sites, *again]:
        if sites.get(name) != again.get(name):
            raise ValueError(
                f'expected a model of static structure, got a latent site "{name}" that differs between runs, in '
                "presence, shape or support: decide by masks and torch.where, and take supports that depend on no draw"
            )


def _parents(
    site: _Latent, sites: Mapping[str, _Latent], dependencies: Dependencies, data: _Plate | None
) -> tuple[str, ...]:
    """The earlier sites whose values the site's head sees."""
    earlier = list(sites)[: list(sites).index(site.name)]
    within = [name for name in earlier if set(sites[name].plates) <= set(site.plates)]
    if isinstance(dependencies, str):
        local = [name for name in within if data in sites[name].plates]
        return tuple(local) if dependencies == "earlier" else ()
    asked = tuple(dependencies.get(site.name, ()))
    if not set(asked) <= set(within):
        raise ValueError(
            f'expected site "{site.name}" to depend on some of {within}, earlier sites in its plates, got {list(asked)}'
        )
    return asked


def _arguments(model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by the model's names for them."""
    signature = inspect.signature(getattr(model, "forward", model))
    arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


@contextlib.contextmanager
def _untouched(*programs: Any) -> Iterator[None]:
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
