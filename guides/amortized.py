"""The variational autoencoder's inference half, q(z | x)."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from ..config import Configured
from ..nn import MLP, bind
from .families import DiagonalNormal, Family

__all__ = ["AmortizedGuide"]

Example = tuple[Sequence[Any], Mapping[str, Any]]


class AmortizedGuide(Configured, PyroModule):
    """``q(z | x) = prod_i q(z_i | encoder(x), z_<i)`` over the latent sites of `model`, in the model's order.

    The model is traced once: each latent site in its plate ``"data"`` gets a copy of `family` whose features are the
    encoder's output beside the earlier sites' values. `encoder` is any module from a datum to a vector of features,
    `encoder_inputs(*args, **kwargs)` returns what it is fed (the first tensor by default). The sizes come from
    `example`, ``(args, kwargs)`` of a call, else from a draw ``model(num_data=2)``, else from the first call. The model
    is not a submodule: its parameters are its own.

    Raises:
        ValueError: a latent site that is discrete, constrained, outside the plate ``"data"``, or deeper than it.

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
        family: Family = DiagonalNormal(),  # noqa: B008  a declaration: `bind` copies it
        encoder_inputs: Callable[..., Tensor] | None = None,
        example: Example | None = None,
    ) -> None:
        super().__init__()
        self._declared = (model, encoder, family)
        self._encoder_inputs = encoder_inputs
        self.heads: Any = nn.ModuleDict()
        if example is None:
            if "num_data" not in inspect.signature(getattr(model, "forward", model)).parameters:
                return
            with _untouched(model), poutine.block():
                drawn = model(num_data=2)
            example = (drawn if isinstance(drawn, tuple) else (drawn,), {})
        self._build(*example)

    def _build(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        model, encoder, family = self._declared
        inputs = self.encoded(*args, **kwargs)
        like = inputs if inputs.is_floating_point() else torch.empty(0, device=inputs.device)
        encoder = bind(MLP() if encoder is None else encoder, inputs.shape[1:]).to(like)
        with _untouched(model, encoder), poutine.block(), torch.no_grad():
            trace = poutine.trace(model).get_trace(*args, **kwargs)
            features = encoder(inputs).shape[-1]
        self.encoder = encoder
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
                continue
            _check_site(name, site)
            shape = site["fn"].event_shape
            self.heads[name] = bind(family, features, shape).to(like)
            features += shape.numel()
        if not self.heads:
            raise ValueError("expected a model with latent sites, got one without: there is nothing to infer")

    def encoded(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the encoder is fed, shape ``(B, ...)``."""
        if self._encoder_inputs is not None:
            return self._encoder_inputs(*args, **kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not tensors:
            raise ValueError("expected a tensor of data to encode, got none: call guide(x)")
        return tensors[0]

    def posterior(self, *args: Any, site: str = "z", **kwargs: Any) -> Any:
        """``q(z | x)`` of the first latent site, as a distribution with batch shape ``(B,)``."""
        if next(iter(self.heads)) != site:
            raise ValueError(f"q({site} | x) depends on other draws, or is no latent site: use guide(...)")
        return self.heads[site](self.encoder(self.encoded(*args, **kwargs)))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent site; returns ``{site: value}``."""
        if not self.heads:
            self._build(args, kwargs)
        inputs = self.encoded(*args, **kwargs)
        h = self.encoder(inputs)
        draws: dict[str, Tensor] = {}
        with pyro.plate("data", len(inputs)):
            for name, head in self.heads.items():
                draws[name] = z = pyro.sample(name, head(h))
                if len(draws) < len(self.heads):
                    flat = z.flatten(start_dim=-len(head.event_shape)) if head.event_shape else z[..., None]
                    h = torch.cat([h.expand(*flat.shape[:-1], h.shape[-1]), flat], dim=-1)
        return draws


def site_is_subsample(site: Mapping[str, Any]) -> bool:
    return type(site["fn"]).__name__ == "_Subsample"


def _check_site(name: str, site: Mapping[str, Any]) -> None:
    plates = [frame.name for frame in site["cond_indep_stack"]]
    support = site["fn"].support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if plates != ["data"]:
        raise ValueError(f'expected latent site "{name}" in the plate "data" alone, got plates {plates}')
    if support is not torch.distributions.constraints.real:
        raise ValueError(f'expected latent site "{name}" to have real support, got {support}')


@contextlib.contextmanager
def _untouched(*programs: Any) -> Iterator[None]:
    """Random state, Pyro's parameter store and the modules' modes are after the block what they were before it."""
    submodules = [m for program in programs if isinstance(program, nn.Module) for m in program.modules()]
    modes = [(submodule, submodule.training) for submodule in submodules]
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        for submodule in submodules:
            submodule.training = False
        try:
            yield
        finally:
            for submodule, training in modes:
                submodule.training = training
