"""Distributions over real numbers, exact over the whole range of their parameters' dtype.

Each is Pyro's distribution of its name by logits, or by the logarithms of its positive parameters, which stay finite
where these do not; values of any dtype are scored, as real numbers.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints, register_kl

from .constrained import Constrained
from .stirling import residual, surprise

__all__ = ["ContinuousBernoulli", "Dirichlet", "Gamma", "Laplace", "Normal", "StudentT"]

MAX_LOG = 705.0  # whose exponential, and some times that, is finite in float64
# of ln(sinh(y) / y) = y^2 / 6 - y^4 / 180 + ..., which has 17 digits for |y| < 1/4
EVEN = (1 / 6, -1 / 180, 1 / 2835, -1 / 37800, 1 / 467775, -691 / 3831077250, 2 / 127702575)


class Normal(dist.Normal):
    """``ln p(x) = -z^2 / 2 - ln s - ln(2 pi) / 2`` with ``z = (x - m) / s``, by ln s.

    Example:
        >>> Normal(torch.tensor(0.0), torch.tensor(1e4)).log_prob(torch.tensor(1.0))
        tensor(-10000.9189)
    """

    arg_constraints = {"loc": constraints.real, "log_scale": constraints.real}

    def __init__(self, loc: Tensor, log_scale: Tensor, validate_args: bool | None = None) -> None:
        self.log_scale = log_scale
        super().__init__(loc, log_scale.exp(), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Normal:
        return type(self)(self.loc.expand(batch_shape), self.log_scale.expand(batch_shape), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.to(self.loc.dtype)
        if self._validate_args:
            self._validate_sample(value)
        largest = torch.finfo(self.loc.dtype).max
        z, beyond = _standardised(value - self.loc, self.log_scale, largest**0.5)
        log_p = -0.5 * z.square() - self.log_scale - 0.5 * math.log(2 * math.pi)
        return torch.where(beyond, -torch.inf, log_p)


class Laplace(dist.Laplace):
    """``ln p(x) = -|x - m| / b - ln(2 b)``, by ln b.

    Example:
        >>> Laplace(torch.tensor(0.0), torch.tensor(-1e4)).log_prob(torch.tensor(0.0))
        tensor(9999.3066)
    """

    arg_constraints = {"loc": constraints.real, "log_scale": constraints.real}

    def __init__(self, loc: Tensor, log_scale: Tensor, validate_args: bool | None = None) -> None:
        self.log_scale = log_scale
        super().__init__(loc, log_scale.exp(), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Laplace:
        return type(self)(self.loc.expand(batch_shape), self.log_scale.expand(batch_shape), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.to(self.loc.dtype)
        if self._validate_args:
            self._validate_sample(value)
        z, beyond = _standardised(value - self.loc, self.log_scale, torch.finfo(self.loc.dtype).max)
        return torch.where(beyond, -torch.inf, -z.abs() - self.log_scale - math.log(2))


class StudentT(dist.StudentT):
    """``ln p(x) = ln Gamma(k + 1) - ln Gamma(k + 1/2) - ln(pi v) / 2 - ln s - (k + 1) ln(1 + z^2 / v)`` with
    ``z = (x - m) / s``, ``k = (v - 1) / 2``, by ln s and the logarithm of v - 1.

    Example:
        >>> StudentT(torch.tensor(1e3), torch.tensor(0.0), torch.tensor(0.0)).log_prob(torch.tensor(1.0))
        tensor(-1.4189)
    """

    arg_constraints = {"log_excess_df": constraints.real, "loc": constraints.real, "log_scale": constraints.real}

    def __init__(
        self, log_excess_df: Tensor, loc: Tensor, log_scale: Tensor, validate_args: bool | None = None
    ) -> None:
        self.log_excess_df, self.log_scale = log_excess_df, log_scale
        df = 1 + log_excess_df.clamp(max=80.0).exp()  # beyond, draws are a normal distribution's
        super().__init__(df, loc, log_scale.exp(), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> StudentT:
        log_excess_df, log_scale = self.log_excess_df.expand(batch_shape), self.log_scale.expand(batch_shape)
        return type(self)(log_excess_df, self.loc.expand(batch_shape), log_scale, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        there = self.df > 2
        excess = torch.where(there, self.df - 2, 1.0)
        return torch.where(there, self.scale.square() * (1 + 2 / excess), torch.inf)

    def log_prob(self, value: Tensor) -> Tensor:
        dtype = self.loc.dtype
        value = value.to(dtype)
        if self._validate_args:
            self._validate_sample(value)
        log_2k = self.log_excess_df.double().clamp(max=MAX_LOG)
        log_scale, difference = self.log_scale.double(), (value - self.loc).double()
        log_v = torch.logaddexp(log_2k, torch.zeros_like(log_2k))
        log_unit = -log_scale - log_v / 2
        u = difference * log_unit.clamp(max=MAX_LOG).exp()  # z / v^(1/2)
        far = (u.abs() > 1e100) | ((log_unit > MAX_LOG) & (difference != 0))
        log_u = torch.where(far, difference, 1.0).abs().log() + log_unit
        log_one_more = torch.where(far, 2 * log_u, torch.where(far, 0.0, u).square().log1p())
        kernel = (1 + log_2k.exp() / 2) * log_one_more
        return (self._log_normaliser(log_2k) - kernel - log_scale).to(dtype)

    def _log_normaliser(self, log_2k: Tensor) -> Tensor:
        """``ln Gamma(k + 1) - ln Gamma(k + 1/2) - ln(pi v) / 2``, which is a constant for large k."""
        log_k = log_2k - math.log(2)
        k, half = log_k.exp(), torch.full_like(log_k, 0.5)
        log_more = torch.logaddexp(log_k, half.log())  # ln(k + 1/2)
        residuals = residual(k, log_k) - residual(k + half, log_more)
        return (
            residuals
            + surprise(k, half, log_k, log_more, (-log_k.clamp(min=-700)).exp())
            + 0.5
            - 0.5 * math.log(2 * math.pi)
        )


class Gamma(dist.Gamma):
    """``ln p(x) = a ln r + (a - 1) ln x - r x - ln Gamma(a)``, by the logarithms of a and r, kept in float64.

    Example:
        >>> a = torch.tensor(1e6, dtype=torch.float64)
        >>> Gamma(a.log(), a.log(), torch.float32).log_prob(torch.tensor(1.0))
        tensor(5.9888)
    """

    arg_constraints = {"log_concentration": constraints.real, "log_rate": constraints.real}

    def __init__(
        self, log_concentration: Tensor, log_rate: Tensor, dtype: torch.dtype, validate_args: bool | None = None
    ) -> None:
        self.log_concentration, self.log_rate = log_concentration.double(), log_rate.double()
        a, r = (log.exp().to(dtype) for log in (self.log_concentration, self.log_rate))
        super().__init__(a, r, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Gamma:
        log_a, log_r = self.log_concentration.expand(batch_shape), self.log_rate.expand(batch_shape)
        return type(self)(log_a, log_r, self.rate.dtype, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        x = value.double()
        if self._validate_args:
            self._validate_sample(x)
        log_a, a = self.log_concentration, self.log_concentration.exp()
        excess = self.log_rate.exp() * x - a
        powers = _powers(x, a, excess, log_a, log_a - self.log_rate)
        return (log_a - residual(a, log_a) + powers - excess).to(self.rate.dtype)


class Dirichlet(dist.Dirichlet):
    """``ln p(x) = sum_d (a_d - 1) ln x_d - ln Gamma(a_d) + ln Gamma(sum_d a_d)``, by the logarithms of a, kept in
    float64.

    Example:
        >>> Dirichlet(torch.full((3,), 1e6, dtype=torch.float64).log(), torch.float64).log_prob(torch.ones(3) / 3)
        tensor(14.8136, dtype=torch.float64)
    """

    arg_constraints = {"log_concentration": constraints.real_vector}

    def __init__(self, log_concentration: Tensor, dtype: torch.dtype, validate_args: bool | None = None) -> None:
        self.log_concentration = log_concentration.double()
        super().__init__(self.log_concentration.exp().to(dtype), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Dirichlet:
        log = self.log_concentration.expand(*batch_shape, *self.event_shape)
        return type(self)(log, dtype=self.concentration.dtype, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        x = value.double()
        if self._validate_args:
            self._validate_sample(x)
        log_a, a = self.log_concentration, self.log_concentration.exp()
        log_sum = log_a.logsumexp(-1)
        total = log_sum.exp()
        powers = _powers(x, a, total[..., None] * x - a, log_a, log_a - log_sum[..., None])
        each = log_a - residual(a, log_a) + powers
        return (residual(total, log_sum) - log_sum + each.sum(-1)).to(self.concentration.dtype)


def _powers(x: Tensor, a: Tensor, excess: Tensor, log_a: Tensor, log_typical: Tensor) -> Tensor:
    """``(a - 1) ln x - a ln t`` for x near or far from its typical value t, `excess` being ``a (x / t - 1)``."""
    near = excess.abs() < a / 2
    log_x = torch.where(near, x, 1.0).log()
    change = torch.where(near, excess, 0.0) * (-log_a).exp()  # x / t - 1
    if type(x) is Constrained:  # whose logarithm is finite where it is rounded to 0
        far = (a - 1) * torch.where(near, 0.0, x.log()) - a * log_typical
    else:
        far = torch.xlogy(a - 1, torch.where(near, 1.0, x)) - a * log_typical
    return torch.where(near, a * change.log1p() - log_x, far)


class ContinuousBernoulli(dist.ContinuousBernoulli):
    """``ln p(x) = l x - ln((e^l - 1) / l)`` on [0, 1], by logits l, uniform at l = 0 (arXiv 1907.06845).

    Example:
        >>> ContinuousBernoulli(logits=torch.tensor(-50.0)).log_prob(torch.tensor(0.0))
        tensor(3.9120)
    """

    @property
    def mean(self) -> Tensor:
        y, size, small = self._parts()
        series = 0.5 * _odd(y)  # of the derivative in l of ln(sinh(y) / y)
        low = 1 / size - (-size).exp() / -torch.expm1(-size)
        return torch.where(small, 0.5 + series, torch.where(self.logits < 0, low, 1 - low))

    @property
    def variance(self) -> Tensor:
        y, size, small = self._parts()
        series = sum((2 * i + 2) * (2 * i + 1) * c * y ** (2 * i) for i, c in enumerate(EVEN)) / 4
        return torch.where(small, series, size**-2 - (-size).exp() / torch.expm1(-size).square())

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        u = torch.rand(shape, dtype=torch.float64, device=self.logits.device)
        return self.icdf(u.clamp(min=2.0**-53))  # 0 has no finite gradient

    def entropy(self) -> Tensor:
        return -self._expected_log_prob(self)

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.to(self.logits.dtype)
        if self._validate_args:
            self._validate_sample(value)
        return self._linear_in(value, 1 - value)

    def cdf(self, value: Tensor) -> Tensor:
        value = value.to(self.logits.dtype)
        tiny = self.logits.abs() < torch.finfo(value.dtype).eps
        size = torch.where(tiny, 1.0, self.logits.abs())
        low = torch.where(self.logits < 0, value, 1 - value)
        below = torch.expm1(-size * low) / torch.expm1(-size)
        below = torch.where(self.logits < 0, below, 1 - below)
        uniform = value + self.logits / 2 * value * (value - 1)  # whose error is of the order of l^2
        return torch.where(tiny, uniform, below).clamp(0, 1)

    def icdf(self, value: Tensor) -> Tensor:
        logits, u = self.logits.double(), value.double()
        # ln(1 - u + u e^l) / l, the cumulants of a Bernoulli over l
        w = u * (1 - u)
        cumulants = (u, w / 2, w * (1 - 2 * u) / 6, w * (1 - 6 * w) / 24, w * (1 - 2 * u) * (1 - 12 * w) / 120)
        small = logits.abs() < 1e-3
        near = torch.where(small, logits, 0.0)
        series = sum(c * near**i for i, c in enumerate(cumulants))
        size = torch.where(small, 1.0, logits.abs())
        low = -torch.log1p(torch.where(logits < 0, u, 1 - u) * torch.expm1(-size)) / size
        x = torch.where(small, series, torch.where(logits < 0, low, 1 - low))
        return x.clamp(0, 1).to(self.logits.dtype)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """l / 2 and |l|, each where a formula takes it and at a harmless number elsewhere, and where |l| is small."""
        small = self.logits.abs() < 0.5
        return torch.where(small, self.logits / 2, 0.0), torch.where(small, 1.0, self.logits.abs()), small

    def _linear_in(self, x: Tensor, complement: Tensor) -> Tensor:
        """`log_prob`, which is linear in x, for x and 1 - x."""
        y, size, small = self._parts()
        series = sum(c * y ** (2 * i + 2) for i, c in enumerate(EVEN))
        large = -size * torch.where(self.logits < 0, x, complement) - torch.log(-torch.expm1(-size) / size)
        return torch.where(small, y * (x - complement) - series, large)

    def _expected_log_prob(self, p: ContinuousBernoulli) -> Tensor:
        """``E_p[ln p(x)]`` by this density."""
        return self._linear_in(p.mean, type(p)(logits=-p.logits, validate_args=False).mean)


@register_kl(ContinuousBernoulli, ContinuousBernoulli)
def _kl_of_continuous_bernoullis(q: ContinuousBernoulli, p: ContinuousBernoulli) -> Tensor:
    return q._expected_log_prob(q) - p._expected_log_prob(q)


def _odd(y: Tensor) -> Any:
    """The derivative of ln(sinh(y) / y) for small y."""
    return sum((2 * i + 2) * c * y ** (2 * i + 1) for i, c in enumerate(EVEN))


def _standardised(difference: Tensor, log_scale: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """``z = d / s``, and where it is above `largest`: there it is given as 0, so that no gradient is NaN."""
    invertible = log_scale > 1 - math.log(torch.finfo(difference.dtype).max)
    z = difference * (-torch.where(invertible, log_scale, 0.0)).exp()
    beyond = torch.where(invertible, z.abs() > largest, difference != 0)
    return torch.where(beyond, 0.0, z), beyond
