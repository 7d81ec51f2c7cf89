"""Likelihoods p(x | z): modules that turn a decoder's output into a distribution over one datum.

A decoder returns ``(*batch, num_parameters, *event_shape)``; the likelihood reads it along that dimension.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..nn import Declared

__all__ = ["Bernoulli", "Binomial", "ContinuousBernoulli", "Likelihood", "Normal", "auto"]


class Likelihood(Declared):
    """Base of likelihoods: ``forward(parameters) -> p(x | z)``."""

    num_parameters = 1

    def build(self, event_shape: Sequence[int]) -> None:
        self.event_shape = torch.Size(event_shape)

    def forward(self, parameters: Tensor) -> dist.Distribution:
        raise NotImplementedError

    def unpacked(self, parameters: Tensor) -> tuple[Tensor, ...]:
        expected = (self.num_parameters, *self.event_shape)
        if parameters.shape[-len(expected) :] != expected:
            raise ValueError(
                f"expected a decoder's output of shape (*batch, {', '.join(map(str, expected))}), got "
                f"{tuple(parameters.shape)}: let it end in (num_parameters, *event_shape), as with nn.Unflatten"
            )
        return parameters.unbind(dim=-1 - len(self.event_shape))


class Bernoulli(Likelihood):
    """``p(x|z) = prod_d sigma(l_d)^{x_d} (1 - sigma(l_d))^{1 - x_d}`` for x in {0, 1}."""

    def forward(self, parameters: Tensor) -> dist.Distribution:
        (logits,) = self.unpacked(parameters)
        return dist.Bernoulli(logits=logits).to_event(len(self.event_shape))


class Binomial(Likelihood):
    """Counts out of `total_count`: ``p(x|z) = prod_d C(n, x_d) s_d^{x_d} (1 - s_d)^{n - x_d}``, ``s = sigma(l)``."""

    def __init__(self, total_count: int) -> None:
        super().__init__()
        if total_count < 1:
            raise ValueError(f"expected total_count >= 1, got {total_count}")
        self.total_count = total_count

    def forward(self, parameters: Tensor) -> dist.Distribution:
        (logits,) = self.unpacked(parameters)
        return dist.Binomial(self.total_count, logits=logits).to_event(len(self.event_shape))


class ContinuousBernoulli(Likelihood):
    """The Bernoulli's formula as a density on [0, 1], with its normalising constant (arXiv 1907.06845)."""

    def forward(self, parameters: Tensor) -> dist.Distribution:
        (logits,) = self.unpacked(parameters)
        return dist.ContinuousBernoulli(logits=logits).to_event(len(self.event_shape))


class Normal(Likelihood):
    """``p(x|z) = prod_d N(x_d; m_d(z), s_d^2)``.

    The scale s is one learned number (``"shared"``), one per dimension (``"per_dimension"``), or predicted from z
    (``"predicted"``), always above `minimum_scale`. ``mean="sigmoid"`` keeps m in (0, 1), as in arXiv 1312.6114.

    Example:
        >>> Normal(scale="per_dimension").bind((4,))(torch.zeros(5, 1, 4)).log_prob(torch.zeros(5, 4)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        scale: Literal["shared", "per_dimension", "predicted"] = "shared",
        mean: Literal["identity", "sigmoid"] = "identity",
        minimum_scale: float = 1e-3,
        initial_scale: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("scale", scale, ("shared", "per_dimension", "predicted")),
            ("mean", mean, ("identity", "sigmoid")),
        ):
            if value not in known:
                raise ValueError(f"expected {name} to be one of {', '.join(known)}, got {value!r}")
        if not 0 < minimum_scale < initial_scale:
            raise ValueError(f"expected 0 < minimum_scale < initial_scale, got {minimum_scale} and {initial_scale}")
        self.scale, self.mean = scale, mean
        self.minimum_scale, self.initial_scale = minimum_scale, initial_scale
        self.num_parameters = 2 if scale == "predicted" else 1

    def build(self, event_shape: Sequence[int]) -> None:
        super().build(event_shape)
        offset = math.log(self.initial_scale - self.minimum_scale)
        if self.scale == "predicted":
            self.register_buffer("log_scale", torch.tensor(offset), persistent=False)
        else:
            shape = event_shape if self.scale == "per_dimension" else ()
            self.log_scale = nn.Parameter(torch.full(tuple(shape), offset))

    def forward(self, parameters: Tensor) -> dist.Distribution:
        mean, *predicted = self.unpacked(parameters)
        log_scale = self.log_scale + predicted[0] if predicted else self.log_scale.expand_as(mean)
        if self.mean == "sigmoid":
            mean = mean.sigmoid()
        return dist.Normal(mean, log_scale.exp() + self.minimum_scale).to_event(len(self.event_shape))


def auto(x: Tensor) -> Likelihood:
    """The likelihood that fits the values of x, shape ``(N, *event_shape)``; the reason goes to this module's logger.

    Example:
        >>> auto(torch.tensor([[0.0, 16.0], [3.0, 7.0]]))
        Binomial()
    """
    likelihood, reason = fitting(x)
    logging.getLogger(__name__).info("likelihood: %s, because %s", type(likelihood).__name__, reason)
    return likelihood


def fitting(x: Tensor) -> tuple[Likelihood, str]:
    """The likelihood that fits the values of x, shape ``(N, *event_shape)``, and why.

    Example:
        >>> fitting(torch.tensor([[0.0, 16.0], [3.0, 7.0]]))
        (Binomial(), 'the values are whole numbers from 0 to 16')
    """
    low, high = x.min().item(), x.max().item()
    whole = bool((x == x.round()).all())
    likelihood: Likelihood
    if whole and low >= 0 and high <= 1:
        likelihood, reason = Bernoulli(), "every value is 0 or 1"
    elif whole and low >= 0 and high <= 255:
        likelihood, reason = Binomial(int(high)), f"the values are whole numbers from 0 to {high:.0f}"
    elif low >= 0 and high <= 1:
        likelihood, reason = ContinuousBernoulli(), "the values are real numbers in [0, 1]"
    else:
        likelihood, reason = Normal("per_dimension"), f"the values are real numbers from {low:.3g} to {high:.3g}"
    return likelihood, reason
