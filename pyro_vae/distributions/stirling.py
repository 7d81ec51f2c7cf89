"""Log-densities with factorials, without the cancellation of large terms.

``ln Gamma(k + 1) = k ln k - k + r(k)``, where r grows as ln k alone. The large parts of all factorials and powers of a
density join to terms ``c ln(c / e)``, which are small where counts c are near what is expected, e (Loader, "Fast and
accurate computation of binomial probabilities", 2000).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["residual", "scaled_log1p", "surprise"]

SMALL = 16.0  # from here on five terms of Stirling's series are exact in float64
SERIES = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360)


def residual(k: Tensor, log_k: Tensor) -> Tensor:
    """``r(k) = ln Gamma(k + 1) - k ln k + k`` for float64 ``k >= 0``, the limit 0 at k = 0.

    Args:
        log_k: ln k, any finite number where k = 0.

    Example:
        >>> k = torch.tensor([0.0, 1.0, 1e9], dtype=torch.float64)
        >>> residual(k, k.clamp(min=1).log())
        tensor([ 0.0000,  1.0000, 11.2806], dtype=torch.float64)
    """
    few, many = k.clamp(max=SMALL), 1 / k.clamp(min=SMALL)
    series, square = torch.zeros_like(many), many.square()
    for coefficient in reversed(SERIES):
        series = series * square + coefficient
    small = torch.lgamma(few + 1) - few * log_k.clamp(max=math.log(SMALL)) + few
    return torch.where(k < SMALL, small, 0.5 * (math.log(2 * math.pi) + log_k) + many * series)


def surprise(c: Tensor, excess: Tensor, log_c: Tensor, log_e: Tensor) -> Tensor:
    """``c ln(c / e)`` for ``c >= 0`` and ``excess = e - c``, 0 at c = 0.

    Args:
        log_c, log_e: ln c and ln e, which are finite; ln c is any finite number where c = 0.

    Example:
        >>> c, e = torch.tensor([5.0, 9.0]), torch.tensor([10.0, 10.0])
        >>> surprise(c, e - c, c.log(), e.log())
        tensor([-3.4657, -0.9482])
    """
    near = excess.abs() < c / 2
    change = scaled_log1p(torch.where(near, c, 1.0), torch.where(near, excess, 0.0))
    return torch.where(near, -change, c * (log_c - log_e))


def scaled_log1p(c: Tensor, a: Tensor) -> Tensor:
    """``c ln(1 + a / c)``, which tends to a, for float64 c > 0, however large.

    Example:
        >>> c = torch.tensor(1e200, dtype=torch.float64, requires_grad=True)
        >>> scaled_log1p(c, torch.full_like(c, 3.0)), torch.autograd.grad(scaled_log1p(c, torch.ones_like(c)), c)
        (tensor(3., dtype=torch.float64, grad_fn=<WhereBackward0>), (tensor(0., dtype=torch.float64),))
    """
    limit = a.abs() < 1e-18 * c
    a_there, c_there = torch.where(limit, 0.0, a), torch.where(limit, 1.0, c)
    unit = torch.where(c > 1e150, c.new_full((), 2.0**-400), 1.0)  # else a / c^2, the derivative in c, underflows
    return torch.where(limit, a, c_there * torch.log1p((a_there * unit) / (c_there * unit)))
