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

from ..distributions import WithMissing, continuous, discrete
from ..nn import Declared, bind, positive

__all__ = [
    "Bernoulli",
    "Binomial",
    "Categorical",
    "ContinuousBernoulli",
    "Laplace",
    "Likelihood",
    "Missing",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "StudentT",
    "auto",
]


class Likelihood(Declared):
    """Base of likelihoods: ``forward(parameters) -> p(x | z)``."""

    num_parameters = 1
    as_they_are = False  # True in a run by an earlier version, whose networks were trained on data as they are

    def build(self, event_shape: Sequence[int]) -> None:
        self.event_shape = torch.Size(event_shape)

    def forward(self, parameters: Tensor) -> dist.Distribution:
        raise NotImplementedError

    def scaled(self, x: Tensor) -> Tensor:
        """Data x on the scale that a network is best fed, whatever their range; 0 stays 0."""
        return x if self.as_they_are else self._scaled(x)

    def _scaled(self, x: Tensor) -> Tensor:
        return x

    def unpacked(self, parameters: Tensor) -> tuple[Tensor, ...]:
        expected = (self.num_parameters, *self.event_shape)
        if not isinstance(parameters, Tensor):
            raise ValueError(
                f"expected a decoder's output as one tensor of shape (*batch, {', '.join(map(str, expected))}), got a "
                f"{type(parameters).__name__}: let it end in torch.stack(..., dim={-len(expected)})"
            )
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
        return discrete.Bernoulli(logits=logits).to_event(len(self.event_shape))


class _Counts(Likelihood):
    """Base of likelihoods of whole numbers, small and large (`benchmarks/encoder_inputs.py` holds scales against each
    other)."""

    def _scaled(self, x: Tensor) -> Tensor:
        return x.clamp(min=0).log1p()  # noise may have led below 0


class Binomial(_Counts):
    """Counts out of `total_count`: ``p(x|z) = prod_d C(n, x_d) s_d^{x_d} (1 - s_d)^{n - x_d}``, ``s = sigma(l)``."""

    def __init__(self, total_count: int) -> None:
        super().__init__()
        if total_count < 1:
            raise ValueError(f"expected total_count >= 1, got {total_count}")
        self.total_count = total_count

    def _scaled(self, x: Tensor) -> Tensor:
        """``4 arcsin(sqrt(x / n))``, from 0 to 2 pi: the scale on which a Binomial's variance is the same for all s."""
        return 4 * (x / self.total_count).clamp(0, 1).sqrt().asin()

    def forward(self, parameters: Tensor) -> dist.Distribution:
        (logits,) = self.unpacked(parameters)
        return discrete.Binomial(self.total_count, logits).to_event(len(self.event_shape))


class ContinuousBernoulli(Likelihood):
    """The Bernoulli's formula as a density on [0, 1], with its normalising constant (arXiv 1907.06845)."""

    def forward(self, parameters: Tensor) -> dist.Distribution:
        (logits,) = self.unpacked(parameters)
        return continuous.ContinuousBernoulli(logits=logits).to_event(len(self.event_shape))


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
        log_scale = self.log_scale + predicted[0] if predicted else self.log_scale
        log_scale = torch.logaddexp(log_scale, torch.full_like(log_scale, math.log(self.minimum_scale)))
        if self.mean == "sigmoid":
            mean = mean.sigmoid()
        return continuous.Normal(mean, log_scale).to_event(len(self.event_shape))


class Laplace(Likelihood):
    """``p(x|z) = prod_d exp(-|x_d - m_d(z)| / b) / (2 b)``, b one learned number: medians, robust to outliers.

    Example:
        >>> Laplace().bind((4,))(torch.zeros(5, 1, 4)).log_prob(torch.zeros(5, 4)).shape
        torch.Size([5])
    """

    def build(self, event_shape: Sequence[int]) -> None:
        super().build(event_shape)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, parameters: Tensor) -> dist.Distribution:
        (location,) = self.unpacked(parameters)
        return continuous.Laplace(location, self.log_scale).to_event(len(self.event_shape))


class StudentT(Likelihood):
    """``p(x|z) = prod_d t_v(x_d; m_d(z), s)``, the degrees of freedom v > 1 and the scale s learned: outliers allowed.

    Example:
        >>> StudentT().bind((4,))(torch.zeros(5, 1, 4)).log_prob(torch.zeros(5, 4)).shape
        torch.Size([5])
    """

    def build(self, event_shape: Sequence[int]) -> None:
        super().build(event_shape)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.log_df = nn.Parameter(torch.tensor(1.0))

    def forward(self, parameters: Tensor) -> dist.Distribution:
        (location,) = self.unpacked(parameters)
        return continuous.StudentT(self.log_df, location, self.log_scale).to_event(len(self.event_shape))


class Categorical(_Counts):
    """``p(x|z) = prod_d softmax(l_d(z))_{x_d}`` for whole numbers x_d from 0 to `categories` - 1.

    Example:
        >>> Categorical(3).bind((4,))(torch.zeros(5, 3, 4)).log_prob(torch.zeros(5, 4)).shape
        torch.Size([5])
    """

    def __init__(self, categories: int) -> None:
        super().__init__()
        self.num_parameters = positive("categories", categories)

    def forward(self, parameters: Tensor) -> dist.Distribution:
        logits = torch.stack(self.unpacked(parameters), dim=-1)
        return discrete.Categorical(logits).to_event(len(self.event_shape))


class Poisson(_Counts):
    """Counts: ``p(x|z) = prod_d r_d^{x_d} e^{-r_d} / x_d!``, ``r = exp(l(z))``.

    Example:
        >>> Poisson().bind((4,))(torch.zeros(5, 1, 4)).log_prob(torch.zeros(5, 4)).shape
        torch.Size([5])
    """

    def forward(self, parameters: Tensor) -> dist.Distribution:
        (log_rate,) = self.unpacked(parameters)
        return discrete.Poisson(log_rate).to_event(len(self.event_shape))


class NegativeBinomial(_Counts):
    """Counts of mean m(z) and variance ``m + m^2 / n``, n > 0 learned for each dimension: more spread than `Poisson`.

    Example:
        >>> NegativeBinomial().bind((2,))(torch.zeros(3, 1, 2)).mean
        tensor([[1., 1.],
                [1., 1.],
                [1., 1.]])
    """

    def build(self, event_shape: Sequence[int]) -> None:
        super().build(event_shape)
        self.log_total_count = nn.Parameter(torch.zeros(tuple(event_shape)))

    def forward(self, parameters: Tensor) -> dist.Distribution:
        (log_mean,) = self.unpacked(parameters)
        return discrete.NegativeBinomial(log_mean, self.log_total_count).to_event(len(self.event_shape))


class Missing(Likelihood):
    """`likelihood` of the values that are there: NaN marks those that are not.

    ``p(x|z) = prod_{d: x_d is not NaN} p(x_d|z)``, exact where values are missing at random. Draws are complete.

    Example:
        >>> p = Missing(Bernoulli()).bind((2,))(torch.zeros(1, 1, 2))
        >>> p.log_prob(torch.tensor([[1.0, torch.nan]])).exp()
        tensor([0.5000])
    """

    def __init__(self, likelihood: Likelihood) -> None:
        super().__init__()
        self.likelihood = likelihood
        self.num_parameters = likelihood.num_parameters

    def build(self, event_shape: Sequence[int]) -> None:
        super().build(event_shape)
        self.likelihood = bind(self.likelihood, event_shape)

    def _scaled(self, x: Tensor) -> Tensor:
        return self.likelihood.scaled(x)

    def forward(self, parameters: Tensor) -> dist.Distribution:
        return WithMissing(self.likelihood(parameters))


def auto(x: Tensor) -> Likelihood:
    """The likelihood that fits the values of x, shape ``(N, *event_shape)``; the reason goes to this module's logger.

    Example:
        >>> auto(torch.tensor([[0.0, 16.0], [3.0, 7.0]]))
        NegativeBinomial()
    """
    likelihood, reason = fitting(x)
    logging.getLogger(__name__).info("likelihood: %s, because %s", type(likelihood).__name__, reason)
    return likelihood


def fitting(x: Tensor) -> tuple[Likelihood, str]:
    """The likelihood that fits the values of x, shape ``(N, *event_shape)``, and why: counts of tables have no largest
    value, the whole numbers of pictures have.

    Example:
        >>> fitting(torch.tensor([[0.0, 16.0], [3.0, 7.0]]))
        (NegativeBinomial(), 'the values are counts, from 0 to 16')
    """
    likelihood: Likelihood
    is_picture = x.ndim > 2
    if bool(x.isnan().any()):
        there = x[~x.isnan()]
        likelihood, reason = fitting(there.reshape(-1, *[1] * (x.ndim - 1)))
        return Missing(likelihood), f"some values are missing, and of the others {reason}"
    low, high = x.min().item(), x.max().item()
    whole = bool((x == x.round()).all())
    if whole and low >= 0 and high <= 1:
        likelihood, reason = Bernoulli(), "every value is 0 or 1"
    elif whole and low >= 0 and is_picture:
        likelihood, reason = Binomial(int(high)), f"the values are whole numbers from 0 to {high:.0f}"
    elif whole and low >= 0:
        likelihood, reason = NegativeBinomial(), f"the values are counts, from 0 to {high:.0f}"
    elif low >= 0 and high <= 1:
        likelihood, reason = ContinuousBernoulli(), "the values are real numbers in [0, 1]"
    else:
        likelihood, reason = Normal("per_dimension"), f"the values are real numbers from {low:.3g} to {high:.3g}"
    return likelihood, reason
