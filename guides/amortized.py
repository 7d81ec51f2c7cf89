"""The inference half, q(z | x), of any Pyro model of static structure."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

from ..config import Configured
from ..nn import MLP, Declared, Heads, bind
from .families import Bernoulli, Categorical, DiagonalNormal, Family
from .structure import Call, Calls, Latent, Plate, check_static, data_plate, latents, traced, untouched

__all__ = ["AmortizedGuide"]

Example = tuple[Sequence[Any], Mapping[str, Any]]
Dependencies = Literal["earlier", "none"] | Mapping[str, Sequence[str]]

RESERVED = nn.ModuleDict()


class AmortizedGuide(Configured, PyroModule):
    """``q(z | x) = prod_i q(z_i | encoder(x), z_<i)`` over the latent sites of `model`, in the model's order.

    The model is traced for its latent sites, their shapes, plates and supports. Each gets a copy of `family`, or of
    ``family[site]``, whose features are the encoder's output beside the values of earlier sites (`dependencies`:
    "earlier", "none", or the names for each site). A constrained support is reached through ``biject_to``; discrete
    sites get a `Categorical` or `Bernoulli`; those that the model marks for enumeration are left to it. Sites outside
    the data's plate are global: their q has parameters of its own, and local sites depend on them only where
    `dependencies` says so.

    `encoder` is any module from a datum to a vector of features, or to ``(B, *plates, features)`` for plates within
    the data's, from the outermost; it is fed `encoder_inputs(*args, **kwargs)`, with zeros in the place of NaN: by
    default the first tensor, which a network of this library gets as ``model.scaled`` gives it, where the model has
    such a function, like those of counts, and a network of your own as it is. A site gets the mean of the features
    over plates that it is not in, and is told which element it is of plates that they do not have. The data's plate
    is the one called "data", else the one of an observed site that has as many elements as the first tensor, else
    the outermost. A latent site that a call observes is conditioned on, not drawn: its value is the argument of its
    name. The model is traced once for each signature of its arguments, for plates and what is observed, which must
    follow from the shapes of tensors and the values of the rest. The sizes come from `example`, ``(args, kwargs)``
    of a call, else from a draw ``model(num_data=2)``, else from the first call. The model is not a submodule: its
    parameters are its own.

    Raises:
        ValueError: sites, shapes or supports that differ between two runs of the model; supports that differ from datum
            to datum, or are learned; latent sites with a mask or a scale beside their plates', over angles, on spheres
            and others that ``biject_to`` does not know, without draws, or without a density on their support;
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
        self._sites: dict[str, Latent] = {}
        self._parents: dict[str, tuple[str, ...]] = {}
        self._unseen: dict[str, tuple[Plate, ...]] = {}  # plates of a site that the encoder's output does not have
        self._seen_in: tuple[int, ...] = ()
        self._calls = Calls()
        self._data: Any = None
        self.heads: Any = nn.ModuleDict()
        if example is None:
            if "num_data" not in inspect.signature(getattr(model, "forward", model)).parameters:
                return
            try:
                with untouched(model), poutine.block():
                    drawn = model(num_data=2)
            except (TypeError, ValueError, NotImplementedError):  # it wants more: the first call has it
                return
            if drawn is None:
                return
            example = (drawn if isinstance(drawn, tuple) else (drawn,), {})
            try:
                with untouched(model), poutine.block():
                    model(*example[0])
            except Exception as error:
                message = str(error).partition("\n")[0]
                raise ValueError(
                    "expected a model whose draw, model(num_data=2), is what it takes as data, got one that cannot be "
                    f"called with it ({message}): give the arguments of a call, AmortizedGuide(model, example=((x,), "
                    "{}))"
                ) from error
        self._build(*example)

    def _build(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        model, encoder, family, dependencies = self._declared
        tensors = _tensors(args, kwargs)
        with untouched(model), poutine.block():
            sites, *others = [latents(trace := traced(model, args, kwargs)) for _ in range(8)]
            for name, site in sites.items():
                site.check_density(trace.nodes[name]["fn"])
        self._data = data_plate(trace, len(tensors[0]) if tensors else 0)
        for again in others:
            check_static(sites, again)
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
        drawn = [trace.nodes[name]["value"] for name in sites]  # whose dtype is that of the model's parameters
        like = next((z for z in (*drawn, *tensors) if z.is_floating_point()), torch.empty(0, device=drawn[0].device))
        features = 0
        if any(self._data in site.plates for site in sites.values()):
            inputs = self.encoded(*args, **kwargs)
            self.encoder = bind(MLP() if encoder is None else encoder, inputs.shape[1:]).to(like)
            call = self._call(args, kwargs)
            with untouched(self.encoder), poutine.block(), torch.no_grad():
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
            self.heads[_key(name)] = head = _head(site, families.get(name, DiagonalNormal()), size).to(like)
            for module in head.modules() if known > own else ():
                if isinstance(module, Heads):  # else scales, exponentials of sums of draws, grow along a chain of sites
                    module.linear.weight.data[:, own:known] *= 0.1

    def encoded(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the encoder is fed, shape ``(B, ...)``."""
        model, encoder, *_ = self._declared
        of_library = encoder is None or isinstance(encoder, Declared)
        if self._encoder_inputs is not None:
            x = self._encoder_inputs(*args, **kwargs)
        else:
            tensors = _tensors(args, kwargs)
            if not tensors:
                came = ", ".join(type(each).__name__ for each in (*args, *kwargs.values())) or "nothing"
                raise ValueError(f"expected a tensor of data to encode, got {came}: call guide(torch.as_tensor(x))")
            x = self._as_numbers(tensors[0])
            if of_library:
                scaled = getattr(model, "scaled", None)
                x = scaled(x) if callable(scaled) else x
        if not x.is_floating_point() and not of_library:  # a network of the user's own may look them up
            return x
        x = self._as_numbers(x)
        return x.where(x == x, 0.0)

    def _as_numbers(self, x: Tensor) -> Tensor:
        """x in the dtype of the guide's parameters."""
        default = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        return x.to(next((p.dtype for p in self.parameters() if p.is_floating_point()), default))

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

    def _call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        return self._calls.of(self._declared[0], self._sites, args, kwargs)

    def _encode(
        self, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]
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

    def _within(self) -> tuple[Plate, ...]:
        """The plates within the data's, from the outermost."""
        stacks = [site.plates for site in self._sites.values() if self._data in site.plates]
        return max((stack[stack.index(self._data) + 1 :] for stack in stacks), key=len)

    def _q(self, name: str, head: Any, h: Tensor, plates: Any, values: Mapping[str, Tensor]) -> Any:
        """The site's distribution given the encoder's output and the sites that it depends on."""
        site = self._sites[name]
        parts = [_on_its_plates(site, h, plates)] if self._data in site.plates else []
        like = next(head.parameters())
        parts += [self._sites[parent].flat(values[parent]).to(like.dtype) for parent in self._parents[name]]
        if unseen := self._unseen[name]:
            parts.append(_which(unseen, plates).to(like))
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        features = torch.cat([part.expand(*batch, -1) for part in parts], dim=-1) if parts else h.new_empty(0)
        return site.constrained(head(features))


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that may be data."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]


def _key(name: str) -> str:
    """A site's name among modules, whose names hold no dots and are no attributes of `nn.ModuleDict`."""
    return name.replace(".", "/") if "." in name else f"{name}/" if hasattr(RESERVED, name) else name


def _which(some: Sequence[Plate], plates: Mapping[str, Any]) -> Tensor:
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


def _seen_in(h: Tensor, dims: Sequence[int], sites: Sequence[Latent]) -> tuple[int, ...]:
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


def _parents(
    site: Latent, sites: Mapping[str, Latent], dependencies: Dependencies, data: Plate | None
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


def _head(site: Latent, family: Family, features: int) -> Any:
    """The family, or the one of this site's discrete support, bound to it."""
    own: type[Bernoulli] | type[Categorical] | None = None
    if isinstance(site.base, type(constraints.boolean)):
        own = Bernoulli
    elif isinstance(site.base, type(constraints.one_hot)) or site.categories is not None:
        own = Categorical
    if site.is_discrete and own is None:
        raise ValueError(
            f'expected latent site "{site.name}" with a finite or a continuous support, got {site.base}: sum it '
            "out in the model, or take a distribution with a bound"
        )
    if isinstance(family, Bernoulli | Categorical) and type(family) is not own:
        fitting = own.__name__ if own else "a continuous one"
        raise ValueError(
            f'expected a family over the support of latent site "{site.name}", {site.base}, got '
            f"{type(family).__name__}: take {fitting}"
        )
    if own is None:
        return bind(family, features, site.bare_shape)
    family = family if isinstance(family, own) else own()
    integers = [] if site.categories is None else [site.categories, site.dtype]
    return bind(family, features, site.event_shape, *integers)


def _on_its_plates(site: Latent, h: Tensor, plates: Mapping[str, Any]) -> Tensor:
    """The encoder's output, averaged over plates that the site is not in."""
    names = {plate.dim: plate.name for plate in site.plates}
    for dim in range(1 - h.dim(), 0):
        if dim not in names:
            h = h.mean(dim - 1, keepdim=True)
        elif h.shape[dim - 1] not in (1, size := plates[names[dim]].subsample_size):
            raise ValueError(
                f'expected the encoder\'s output to have {size} on the dimension of plate "{names[dim]}" of site '
                f'"{site.name}", got {h.shape[dim - 1]}: let it return (B, features), or (B, ..., features) with '
                "the plates within between"
            )
    return h.reshape(h.shape[min(names) - 1 :])
