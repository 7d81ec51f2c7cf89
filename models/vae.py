"""The variational autoencoder's generative half, p(z) p(x | z)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from ..config import Configured
from ..distributions import folded
from ..nn import MLP, bind
from .likelihoods import Bernoulli, Likelihood
from .priors import Fixed, StandardNormal

__all__ = ["VAE"]


class VAE(Configured, PyroModule):
    """``z ~ p(z)``, ``x ~ p(x | decoder(z))``, independently for each datum (arXiv 1312.6114).

    Sites ``"z"`` and ``"x"`` in the plate ``"data"``. The arguments are components: `prior` is a module that returns
    p(z), a distribution, or a Pyro function with sites of its own that returns z; `decoder` any module from z, ``(B,
    *latent_shape)``, to ``(B, num_parameters, *event_shape)``, which `likelihood`, a module, turns into p(x|z). Several
    draws z for each datum reach the decoder as one batch, so that it may count dimensions from the left, as PyTorch's
    modules do. Components declared without sizes are bound to the shapes at hand. ``latent_dim=16`` is short for
    ``prior=StandardNormal(16)``.

    Raises:
        ValueError: an event shape without positive sizes; both `latent_dim` and `prior`.

    Example:
        >>> model = VAE(event_shape=(1, 8, 8), latent_dim=4)
        >>> model(num_data=3).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        latent_dim: int | None = None,
        prior: Callable[[], Any] | dist.Distribution | None = None,
        likelihood: Likelihood | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not event_shape or any(size < 1 for size in event_shape):
            raise ValueError(f"expected event_shape to hold positive sizes, got {tuple(event_shape)}")
        if prior is not None and latent_dim is not None:
            raise ValueError("expected latent_dim or prior, got both: the prior has a size of its own")
        self.event_shape = torch.Size(event_shape)
        self.prior = StandardNormal(16 if latent_dim is None else latent_dim) if prior is None else prior
        if isinstance(prior, torch.distributions.Distribution):
            self.prior = Fixed(prior)
        with torch.random.fork_rng(), torch.no_grad(), poutine.block(), pyro.plate("data", 1):
            self.latent_shape = self.latent().shape[1:]
        self.likelihood = bind(Bernoulli() if likelihood is None else likelihood, event_shape)
        self.decoder = bind(
            MLP() if decoder is None else decoder,
            self.latent_shape,
            (self.likelihood.num_parameters, *event_shape),
        )

    def latent(self) -> Tensor:
        """Draw z, site ``"z"``, or the sites of a prior that is a Pyro function."""
        prior = self.prior()
        return prior if isinstance(prior, Tensor) else pyro.sample("z", prior)

    @property
    def scaled(self) -> Callable[[Tensor], Tensor]:
        """What brings data to the scale that an encoder is best fed: the likelihood's."""
        return self.likelihood.scaled

    def observation(self, z: Tensor) -> dist.Distribution:
        """``p(x | z)`` for z of shape ``(*batch, *latent_shape)``."""
        return self.likelihood(folded(self.decoder, z, event_dim=len(self.latent_shape)))

    def forward(self, x: Tensor | None = None, *, num_data: int | None = None) -> Tensor:
        if (x is None) == (num_data is None):
            raise ValueError(f"expected data x or num_data=..., got {'neither' if x is None else 'both'}")
        with pyro.plate("data", num_data if x is None else x.shape[0]):
            return pyro.sample("x", self.observation(self.latent()), obs=x)
