"""Distributions of data with missing values."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

__all__ = ["WithMissing"]


class WithMissing(dist.TorchDistribution):
    """An independent distribution whose log-probability leaves out the dimensions that are NaN.

    Raises:
        ValueError: the distribution does not factorise over dimensions.

    Example:
        >>> p = WithMissing(dist.Normal(torch.zeros(3), 1.0).to_event(1))
        >>> p.log_prob(torch.tensor([0.0, torch.nan, torch.nan]))
        tensor(-0.9189)
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, base: Any) -> None:
        if isinstance(base, WithMissing):
            base = base.base
        if not isinstance(base, torch.distributions.Independent) or base.base_dist.event_shape:
            raise ValueError(f"expected a distribution that factorises over dimensions, got {base}: use .to_event()")
        self.base: Any = base
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        return constraints.independent(_OrMissing(self.base.base_dist.support), len(self.event_shape))

    @property
    def has_rsample(self) -> bool:
        return self.base.has_rsample

    @property
    def mean(self) -> Tensor:
        return self.base.mean

    @property
    def variance(self) -> Tensor:
        return self.base.variance

    def expand(self, batch_shape: Any, _instance: Any = None) -> WithMissing:
        return WithMissing(self.base.expand(batch_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.base.sample(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.base.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        each = self.base.base_dist
        support = each.support
        anything = value.new_zeros(()) if support.is_discrete else transform_to(support)(value.new_zeros(()))
        there = value == value
        log_prob = each.log_prob(torch.where(there, value, anything))
        return torch.where(there, log_prob, 0.0).sum([-1 - i for i in range(len(self.event_shape))])


class _OrMissing(constraints.Constraint):
    """A support, and NaN."""

    def __init__(self, support: Any) -> None:
        self.support, self.event_dim, self.is_discrete = support, support.event_dim, support.is_discrete

    def check(self, value: Tensor) -> Tensor:
        return self.support.check(value) | (value != value)
