"""Distributions over whole numbers, exact over the whole range of their parameters' dtype.

Each is Pyro's distribution of its name by logits or logarithms; values of any dtype are scored, as real numbers.
Where factorials are large, log-densities are computed in float64, and returned in the parameters' dtype.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from .stirling import residual, surprise

__all__ = ["Bernoulli", "Binomial", "Categorical", "NegativeBinomial", "Poisson"]


class Bernoulli(dist.Bernoulli):
    """``p(x) = sigma(l)^x (1 - sigma(l))^(1 - x)``, by logits l.

    Example:
        >>> Bernoulli(logits=torch.tensor(-1e4)).log_prob(torch.tensor(True))
        tensor(-10000.)
    """

    @property
    def variance(self) -> Tensor:
        return self.logits.sigmoid() * (-self.logits).sigmoid()

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value.to(self.logits.dtype))


class Categorical(dist.Categorical):
    """``p(x) = softmax(l)_x``, by logits l, however large.

    Example:
        >>> Categorical(torch.tensor([9999.5, 1e4])).log_prob(torch.tensor(1))
        tensor(-0.4741)
    """

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        super().__init__(logits=logits.log_softmax(-1), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Categorical:
        return type(self)(self.logits.expand(*batch_shape, -1), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value.long() if value.dtype is torch.bool else value)


class Poisson(dist.Poisson):
    """``ln p(x) = x l - e^l - ln x!``, by the logarithm l of the rate.

    Example:
        >>> Poisson(torch.tensor(1e6).log()).log_prob(torch.tensor(1e6))
        tensor(-7.8267)
    """

    arg_constraints = {"log_rate": constraints.real}

    def __init__(self, log_rate: Tensor, validate_args: bool | None = None) -> None:
        self.log_rate = log_rate
        super().__init__(log_rate.exp(), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Poisson:
        return type(self)(self.log_rate.expand(batch_shape), validate_args=False)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            rate = self.log_rate.double().exp().expand(self._extended_shape(sample_shape))
            return _poisson(rate).to(self.log_rate.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        x = value.double()
        if self._validate_args:
            self._validate_sample(x)
        log_rate, (log_x, inverse) = self.log_rate.double(), _log_and_inverse(x)
        excess = log_rate.exp() - x
        log_p = -residual(x, log_x) - surprise(x, excess, log_x, log_rate, inverse) - excess
        return log_p.to(self.log_rate.dtype)


class Binomial(dist.Binomial):
    """``ln p(x) = ln C(n, x) + x ln sigma(l) + (n - x) ln sigma(-l)``, by logits l.

    Example:
        >>> Binomial(10**9, logits=torch.tensor(0.0)).log_prob(torch.tensor(5 * 10**8))
        tensor(-10.5874)
    """

    def __init__(self, total_count: int | Tensor, logits: Tensor, validate_args: bool | None = None) -> None:
        n = total_count
        if not isinstance(n, Tensor):
            n = torch.full((), float(n), dtype=torch.float64, device=logits.device)
        super().__init__(n, logits=logits, validate_args=validate_args)
        self.total_count = n.double()  # float32 has no whole numbers beyond 2^24

    def expand(self, batch_shape: Any, _instance: Any = None) -> Binomial:
        return type(self)(self.total_count, self.logits.expand(batch_shape), validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.total_count.to(self.logits.dtype) * self.logits.sigmoid()

    @property
    def variance(self) -> Tensor:
        return self.mean * (-self.logits).sigmoid()

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            n, p = self.total_count.expand(shape), self.logits.double().sigmoid().expand(shape)
            return torch.binomial(n, p).to(self.logits.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        x, l, n = value.double(), self.logits.double(), self.total_count  # noqa: E741  the formula's letter
        if self._validate_args:
            self._validate_sample(x)
        log_n, rest, rare = n.clamp(min=1).log(), n - x, torch.where(l < 0, l, -l).sigmoid()
        excess = torch.where(l < 0, n * rare - x, rest - n * rare)  # of successes expected
        log_share = logsigmoid(l)
        log_e, of_rest = log_n + log_share, _log_and_inverse(rest)
        log_p = _log_binomial(x, rest, excess, of_rest, log_n, log_e, log_e - l)
        return log_p.to(self.logits.dtype)


class NegativeBinomial(dist.NegativeBinomial):
    """Counts of mean ``m`` and variance ``m + m^2 / n``, by the logarithms of m and n; the Poisson's as n grows::

        ln p(x) = ln Gamma(n + x) - ln Gamma(n) - ln x! + n ln(n / (n + m)) + x ln(m / (n + m))

    Example:
        >>> NegativeBinomial(torch.tensor(0.0), torch.tensor(80.0)).log_prob(torch.tensor(0))
        tensor(-1.)
    """

    arg_constraints = {"log_mean": constraints.real, "log_total_count": constraints.real}

    def __init__(self, log_mean: Tensor, log_total_count: Tensor, validate_args: bool | None = None) -> None:
        self.log_mean, self.log_total_count = log_mean, log_total_count
        super().__init__(log_total_count.exp(), logits=log_mean - log_total_count, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> NegativeBinomial:
        log_total_count = self.log_total_count.expand(batch_shape)
        return type(self)(self.log_mean.expand(batch_shape), log_total_count, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.log_mean.exp()

    @property
    def variance(self) -> Tensor:
        return self.mean * (1 + self.logits.exp())

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            log_m, log_n = self.log_mean.double().expand(shape), self.log_total_count.double().expand(shape)
            # Gamma(n) = Gamma(n + 1) U^(1 / n), of which the logarithm exists for small n too
            log_gamma = torch._standard_gamma(log_n.exp() + 1).log() + torch.rand_like(log_n).log() * (-log_n).exp()
            return _poisson((log_gamma + (log_m - log_n)).exp()).to(self.log_mean.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        x = value.double()
        if self._validate_args:
            self._validate_sample(x)
        log_m, log_n = self.log_mean.double(), self.log_total_count.double()
        m, n = log_m.exp(), log_n.exp()
        log_both = torch.where(x > 0, torch.logaddexp(log_n, _log_and_inverse(x)[0]), log_n)  # ln(n + x)
        log_expected = torch.logaddexp(log_n, log_m)  # ln(n + m)
        # n (m - x) / (n + m): events expected among n + x, less those that are
        log_ratio = log_n - log_m
        tiny = log_ratio < -600
        excess = torch.where(tiny, n - x * torch.where(tiny, log_ratio, 0.0).exp(), log_ratio.sigmoid() * (m - x))
        log_x, log_rest = log_both + log_m - log_expected, log_both + log_n - log_expected
        log_p = _log_binomial(x, n, excess, (log_n, (-log_n.clamp(min=-700)).exp()), log_both, log_x, log_rest)
        return (log_n - log_both + log_p).to(self.log_mean.dtype)


def _poisson(rate: Tensor) -> Tensor:
    """Draws; torch's own of a rate beyond its integers are negative."""
    most = 1e15
    large = (rate * (1 + torch.randn_like(rate) / rate.clamp(min=most).sqrt())).round()
    return torch.where(rate > most, large, torch.poisson(rate.clamp(max=most)))


def _log_and_inverse(count: Tensor) -> tuple[Tensor, Tensor]:
    """ln k and 1 / k, and 0 and 1 at k = 0."""
    count = torch.where(count > 0, count, 1.0)
    return count.log(), 1 / count


def _log_binomial(
    x: Tensor,
    rest: Tensor,
    excess: Tensor,
    of_rest: tuple[Tensor, Tensor],
    log_both: Tensor,
    log_expected: Tensor,
    log_rest_expected: Tensor,
) -> Tensor:
    """``ln Gamma(n + 1) - ln Gamma(x + 1) - ln Gamma(n - x + 1) + x ln(e / n) + (n - x) ln((n - e) / n)``, in float64.

    Args:
        rest: n - x, and `of_rest` its logarithm and inverse; excess: e - x, e being the successes expected.
        log_both, log_expected, log_rest_expected: ln n, ln e and ln(n - e).
    """
    (log_x, inverse), (log_rest, inverse_of_rest) = _log_and_inverse(x), of_rest
    residuals = residual(x + rest, log_both) - residual(x, log_x) - residual(rest, log_rest)
    surprises = surprise(x, excess, log_x, log_expected, inverse)
    return residuals - surprises - surprise(rest, -excess, log_rest, log_rest_expected, inverse_of_rest)
