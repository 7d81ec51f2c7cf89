"""The VAE given covariates, p(z) p(x | z, y)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..distributions import folded
from ..nn import MLP, Declared, bind, positive
from .likelihoods import Likelihood
from .vae import VAE

__all__ = ["ConditionalVAE"]


class ConditionalVAE(VAE):
    """``z ~ p(z)``, ``x ~ p(x | decoder(z, y))``, given y of shape ``(B, covariates)``: one-hot labels, or any others.

    `decoder` is a module from z beside y, ``(B, latent + covariates)``; the rest is as in `VAE`. A guide that sees
    both takes ``encoder_inputs=model.beside`` (NeurIPS 2015, "Learning structured output representation").

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> model = ConditionalVAE((4,), covariates=3, latent_dim=2)
        >>> guide = AmortizedGuide(model, encoder_inputs=model.beside)
        >>> x, y = torch.ones(5, 4), torch.eye(3)[[0, 1, 2, 0, 1]]
        >>> guide(x, y)["z"].shape, model(y=y).shape
        (torch.Size([5, 2]), torch.Size([5, 4]))
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        covariates: int,
        latent_dim: int | None = None,
        prior: Callable[[], Any] | dist.Distribution | None = None,
        likelihood: Likelihood | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        wider = _Wider(MLP() if decoder is None else decoder, positive("covariates", covariates))
        super().__init__(event_shape, latent_dim, prior, likelihood, wider)
        self.covariates = covariates

    def beside(self, x: Tensor, y: Tensor) -> Tensor:
        """Data, `scaled`, beside their covariates, ``(B, dimensions + covariates)``: what an encoder is fed."""
        dtype = next(self.decoder.parameters(), torch.empty(0)).dtype
        return torch.cat([self.scaled(x.to(dtype)).flatten(1), y.to(dtype)], dim=-1)

    def observation(self, z: Tensor, y: Tensor) -> dist.Distribution:  # type: ignore[override]
        """``p(x | z, y)`` for z of shape ``(*batch, latent)``."""
        batch, y = torch.broadcast_shapes(z.shape[:-1], y.shape[:-1]), y.to(z.dtype)
        return self.likelihood(folded(self.decoder, torch.cat([z.expand(*batch, -1), y.expand(*batch, -1)], dim=-1)))

    def forward(self, x: Tensor | None = None, y: Tensor | None = None, *, num_data: int | None = None) -> Tensor:
        if y is None or y.shape[1:] != (self.covariates,):
            came = "none" if y is None else f"shape {tuple(y.shape)}"
            raise ValueError(
                f"expected covariates y of shape (B, {self.covariates}), got {came}: call model(x, y), or model(y=y)"
            )
        if num_data not in (None, len(y)):
            raise ValueError(f"expected num_data={len(y)}, as many as covariates y, got {num_data}: leave it out")
        with pyro.plate("data", len(y)):
            return pyro.sample("x", self.observation(self.latent(), y), obs=x)


class _Wider(Declared):
    """A network for inputs with more dimensions than it is bound to."""

    def __init__(self, network: nn.Module, more: int) -> None:
        super().__init__()
        self.network, self.more = network, more

    def build(self, input_shape: Sequence[int], output_shape: Sequence[int]) -> None:
        if len(input_shape) != 1:
            raise ValueError(f"expected a prior over vectors, got one over {tuple(input_shape)}: take a flat one")
        self.network = bind(self.network, (input_shape[0] + self.more,), output_shape)

    def forward(self, h: Tensor) -> Tensor:
        return self.network(h)
