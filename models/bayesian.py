"""The VAE whose decoder's weights are latent too, p(w) prod_i p(z_i) p(x_i | z_i, w)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..distributions import folded
from ..nn import positive
from .likelihoods import Likelihood
from .vae import VAE

__all__ = ["BayesianVAE"]


class BayesianVAE(VAE):
    """``w ~ N(0, diag s^2)``, ``z_i ~ p(z)``, ``x_i ~ p(x | decoder_w(z_i))`` (arXiv 1312.6114, appendix F).

    Site ``"w"`` holds all the decoder's weights in one vector, with s = `scale` for biases and `scale` over the root of
    the inputs for matrices. A batch of B data stands for all `size` of them: its terms are scaled by ``size / B``. The
    guide has one q(w) for all data, best begun narrow: ``family={"w": DiagonalNormal(initial_scale=0.05)}``. The
    decoder given is copied, not changed.

    Raises:
        ValueError: a decoder with tied weights; more data in a batch than `size`.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide, families
        >>> model = BayesianVAE((4,), size=1000, latent_dim=2)
        >>> guide = AmortizedGuide(model, family={"w": families.DiagonalNormal(initial_scale=0.05)})
        >>> {site: value.shape[0] for site, value in guide(torch.ones(5, 4)).items() if site == "z"}
        {'z': 5}
    """

    weight_scale: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        size: int,
        latent_dim: int | None = None,
        prior: Callable[[], Any] | dist.Distribution | None = None,
        likelihood: Likelihood | None = None,
        decoder: nn.Module | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(event_shape, latent_dim, prior, likelihood, copy.deepcopy(decoder))
        self.size = positive("size", size)
        if len(list(self.decoder.named_parameters(remove_duplicate=False))) > len(list(self.decoder.parameters())):
            raise ValueError("expected a decoder whose parameters have one name each, got tied ones: untie them")
        self.shapes = {name: parameter.shape for name, parameter in self.decoder.named_parameters()}
        for module in self.decoder.modules():  # what is drawn takes the places of parameters
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach(), persistent=False)
        scales = [
            torch.full((shape.numel(),), scale / math.sqrt(shape[1:].numel() if len(shape) > 1 else 1))
            for shape in self.shapes.values()
        ]
        self.register_buffer("weight_scale", torch.cat(scales), persistent=False)

    def observation(self, z: Tensor, w: Tensor) -> dist.Distribution:  # type: ignore[override]
        """``p(x | z, w)`` for z of shape ``(*draws, B, *latent_shape)``, w of shape ``(P,)`` or ``(*draws, 1, P)``."""
        return self.likelihood(self._decode(w, z))

    def _decode(self, w: Tensor, z: Tensor) -> Tensor:
        if (draws := w.shape[:-2]).numel() > 1:  # each has a decoder of its own
            rows = z.expand(*draws, *z.shape[-1 - len(self.latent_shape) :]).flatten(0, len(draws) - 1)
            return torch.func.vmap(self._decode)(w.reshape(len(rows), -1), rows).unflatten(0, draws)
        parts = w.flatten().split([shape.numel() for shape in self.shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

        def decoder(z: Tensor) -> Tensor:
            return torch.func.functional_call(self.decoder, weights, z)

        return folded(decoder, z, event_dim=len(self.latent_shape))

    def forward(self, x: Tensor | None = None, *, num_data: int | None = None) -> Tensor:
        if (x is None) == (num_data is None):
            raise ValueError(f"expected data x or num_data=..., got {'neither' if x is None else 'both'}")
        if x is not None and len(x) > self.size:
            raise ValueError(f"expected at most size={self.size} data, got {len(x)}: give size the number of all data")
        w = pyro.sample("w", dist.Normal(torch.zeros_like(self.weight_scale), self.weight_scale).to_event(1))
        plate = (
            pyro.plate("data", num_data)
            if x is None
            else pyro.plate("data", self.size, subsample=torch.arange(len(x), device=x.device))
        )
        with plate:
            return pyro.sample("x", self.observation(self.latent(), w), obs=x)
