"""Priors p(z): modules whose forward returns a distribution over one datum's latent variable."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import nn

from ..config import Configured

__all__ = ["Prior", "StandardNormal"]


class Prior(Configured, nn.Module):
    """Base of priors: ``forward() -> p(z)`` with an empty batch shape."""

    def forward(self) -> dist.Distribution:
        raise NotImplementedError


class StandardNormal(Prior):
    r"""``p(z) = N(z; 0, I)``.

    Example:
        >>> StandardNormal(3)().event_shape
        torch.Size([3])
    """

    location: torch.Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        if isinstance(latent_dim, bool) or not isinstance(latent_dim, int) or latent_dim < 1:
            raise ValueError(f"expected latent_dim to be a positive whole number, got {latent_dim!r}: give 1 or more")
        self.register_buffer("location", torch.zeros(latent_dim), persistent=False)

    def forward(self) -> dist.Distribution:
        return dist.Normal(self.location, torch.ones_like(self.location)).to_event(1)
