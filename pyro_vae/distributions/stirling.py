"""Log-densities with factorials, without the cancellation of large terms.

``ln Gamma(k + 1) = k ln k - k + r(k)``, where r grows as ln k alone. The large parts of all factorials and powers of a
density join to terms ``c ln(c / e)``, which are small where counts c are near what is expected, e (Loader, "Fast and
accurate computation of binomial probabilities", 2000).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["residual", "surprise"]

SHIFT = 8  # from here on six terms of Stirling's series have 14 digits
SERIES = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360)


def residual(k: Tensor, log_k: Tensor) -> Tensor:
    """``r(k) = ln Gamma(k + 1) - k ln k + k`` for float64 ``k >= 0``, the limit 0 at k = 0.

    Args:
        log_k: ln k, any finite number where k = 0.

    Example:
        >>> k = torch.tensor([1.0, 1e9], dtype=torch.float64)
        >>> residual(k, k.log())
        tensor([ 1.0000, 11.2806], dtype=torch.float64)
    """
    small = k < SHIFT
    few = torch.where(small, k, 0.0)
    product = few + 1  # (k + 1) ... (k + 8), by which Gamma(k + 9) is larger than Gamma(k + 1)
    for i in range(2, SHIFT + 1):
        product = product * (few + i)
    shifted = torch.where(small, few + SHIFT, k)
    log_shifted, inverse = shifted.log(), 1 / shifted
    series, square = torch.full_like(k, SERIES[-1]), inverse.square()
    for coefficient in reversed(SERIES[:-1]):
        series = series * square + coefficient
    of_shifted = 0.5 * (math.log(2 * math.pi) + log_shifted) + inverse * series
    change = (few + SHIFT) * log_shifted - SHIFT - product.log() - few * torch.where(small, log_k, 0.0)
    return of_shifted + torch.where(small, change, 0.0)


def surprise(c: Tensor, excess: Tensor, log_c: Tensor, log_e: Tensor, inverse: Tensor) -> Tensor:
    """``c ln(c / e)`` for ``c >= 0`` and ``excess = e - c``, 0 at c = 0.

    Args:
        log_c, log_e: ln c and ln e, which are finite; ln c is any finite number where c = 0.
        inverse: 1 / c, any number where c = 0; by ``(-ln c).exp()`` its derivative does not underflow where c is large.

    Example:
        >>> c, e = torch.tensor([5.0, 9.0]), torch.tensor([10.0, 10.0])
        >>> surprise(c, e - c, c.log(), e.log(), 1 / c)
        tensor([-3.4657, -0.9482])
    """
    near = excess.abs() < c / 2
    change = torch.where(near, excess, 0.0) * torch.where(near, inverse, 0.0)  # e / c - 1
    return torch.where(near, -c * change.log1p(), c * (log_c - log_e))
