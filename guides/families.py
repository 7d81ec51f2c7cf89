"""Families q(z | h): modules, declared without sizes, that turn features h into a distribution over a latent site."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..nn import Declared

__all__ = ["DiagonalNormal", "Family"]


class Family(Declared):
    """Base of families: `build` gets the number of features and the site's event shape, ``forward(h)`` returns
    q(z | h) for h of shape ``(*batch, features)``."""

    def build(self, features: int, event_shape: Sequence[int]) -> None:
        self.event_shape = torch.Size(event_shape)

    def forward(self, h: Tensor) -> dist.Distribution:
        raise NotImplementedError


class DiagonalNormal(Family):
    """``q(z|h) = N(z; m(h), diag s(h)^2)`` with m and log s linear in h.

    Example:
        >>> DiagonalNormal().bind(10, (3,))(torch.zeros(5, 10)).batch_shape
        torch.Size([5])
    """

    def build(self, features: int, event_shape: Sequence[int]) -> None:
        super().build(features, event_shape)
        self.location_and_log_scale = nn.Linear(features, 2 * math.prod(event_shape))

    def forward(self, h: Tensor) -> dist.Distribution:
        location, log_scale = (
            self.location_and_log_scale(h).unflatten(-1, (2, *self.event_shape)).unbind(dim=-1 - len(self.event_shape))
        )
        return dist.Normal(location, log_scale.exp()).to_event(len(self.event_shape))
