"""Flow transforms ``y = f(x)`` that zuko lacks, in its convention: `call_and_ladj` gives y and log |dy/dx|."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform
from torch.nn import functional as F

__all__ = [
    "CouplingTransform",
    "GatedAffineTransform",
    "OnePass",
    "PlanarTransform",
    "RadialTransform",
    "SylvesterTransform",
]

HALVINGS = 64  # of an interval: to the last bit of float64


class _Scored(Transform):
    """Base: a subclass has ``call_and_ladj(x) -> (y, log |dy/dx|)`` and ``_inverse(y) -> x``."""

    domain: Any = constraints.real_vector
    codomain: Any = constraints.real_vector
    bijective = True

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]


class PlanarTransform(_Scored):
    r"""``y = x + u tanh(w.x + b)``, invertible as u is moved along w until ``w.u > -1`` (arXiv 1505.05770).

    Shapes: u, w ``(*batch, D)``, b ``(*batch, 1)``. The inverse is found by bisection, to rounding.

    Example:
        >>> transform = PlanarTransform(torch.ones(3), torch.ones(3), torch.zeros(1))
        >>> x = torch.randn(5, 3, dtype=torch.float64)
        >>> torch.allclose(transform.inv(transform(x)), x)
        True
    """

    def __init__(self, u: Tensor, w: Tensor, b: Tensor) -> None:
        super().__init__()
        wu = (w * u).sum(-1, keepdim=True)
        tiny = torch.finfo(w.dtype).tiny
        self.w, self.b = w, b
        self.u = u + (F.softplus(wu) - 1 - wu) * w / (w.square().sum(-1, keepdim=True) + tiny)
        self.wu = (w * self.u).sum(-1, keepdim=True)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = ((self.w * x).sum(-1, keepdim=True) + self.b).tanh()
        ladj = (self.wu * (1 - h.square())).log1p()
        return x + self.u * h, ladj.squeeze(-1).expand(torch.broadcast_shapes(x.shape, self.u.shape)[:-1])

    def _inverse(self, y: Tensor) -> Tensor:
        wy, reach = (self.w * y).sum(-1, keepdim=True), self.wu.abs()
        a = _root(lambda a: a + self.wu * (a + self.b).tanh(), wy, wy - reach, wy + reach)
        return y - self.u * (a + self.b).tanh()


class RadialTransform(_Scored):
    r"""``y = x + beta (x - c) / (alpha + |x - c|)``, alpha = e^a, beta = softplus(b) - alpha (arXiv 1505.05770).

    Shapes: c ``(*batch, D)``, a and b ``(*batch, 1)``. The inverse is found by bisection, to rounding.

    Example:
        >>> transform = RadialTransform(torch.zeros(3), torch.zeros(1), torch.ones(1))
        >>> x = torch.randn(5, 3, dtype=torch.float64)
        >>> torch.allclose(transform.inv(transform(x)), x)
        True
    """

    def __init__(self, c: Tensor, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.c, self.alpha = c, a.exp()
        self.beta = F.softplus(b) - self.alpha

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        difference = x - self.c
        reach = self.alpha + difference.norm(dim=-1, keepdim=True)
        stretch = (self.beta / reach).log1p()
        ladj = (x.shape[-1] - 1) * stretch + (self.beta * self.alpha / reach.square()).log1p()
        return x + self.beta * difference / reach, ladj.squeeze(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        difference = y - self.c
        R = difference.norm(dim=-1, keepdim=True)
        r = _root(lambda r: r * (1 + self.beta / (self.alpha + r)), R, torch.zeros_like(R), R + self.beta.abs())
        return self.c + difference / (1 + self.beta / (self.alpha + r))


class SylvesterTransform(_Scored):
    r"""``y = x + Q R1 tanh(R2 Q^T x + b)``: orthonormal columns Q, upper triangular R1 and R2 (arXiv 1803.05649).

    Shapes: Q ``(*batch, D, M)``, b ``(*batch, M)``. `triangles`, ``(*batch, M, M)``, holds R1 above its diagonal and
    R2^T below; `diagonals`, ``(*batch, 2, M)``, are theirs before tanh, so that ``1 + R1_ii R2_ii > 0``. The
    log-determinant is ``sum_i ln(1 + tanh'_i R1_ii R2_ii)``. The inverse solves for one column after the other.

    Example:
        >>> transform = SylvesterTransform(torch.eye(4)[:, :2], torch.ones(2, 2), torch.ones(2, 2), torch.zeros(2))
        >>> x = torch.randn(5, 4)
        >>> torch.allclose(transform.inv(transform(x)), x, atol=1e-6)
        True
    """

    def __init__(self, Q: Tensor, triangles: Tensor, diagonals: Tensor, b: Tensor) -> None:
        super().__init__()
        d1, d2 = diagonals.tanh().unbind(-2)
        self.Q, self.b = Q, b
        self.R1 = triangles.triu(1) + d1.diag_embed()
        self.R2 = triangles.tril(-1).mT + d2.diag_embed()
        self.product = d1 * d2

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w = _times(self.Q.mT, x)
        h = (_times(self.R2, w) + self.b).tanh()
        ladj = (self.product * (1 - h.square())).log1p().sum(-1)
        return x + _times(self.Q, _times(self.R1, h)), ladj

    def _inverse(self, y: Tensor) -> Tensor:
        v = _times(self.Q.mT, y)
        shape = torch.broadcast_shapes(v.shape, self.b.shape)
        w: list[Tensor] = [v.new_zeros(shape[:-1])] * shape[-1]
        h = list(w)
        for i in reversed(range(shape[-1])):
            later = range(i + 1, shape[-1])
            offset = self.b[..., i] + sum(self.R2[..., i, j] * w[j] for j in later)
            target = (v[..., i] - sum(self.R1[..., i, j] * h[j] for j in later)).expand(shape[:-1])
            r1, r2 = self.R1[..., i, i], self.R2[..., i, i]

            def equation(a: Tensor, r1: Tensor = r1, r2: Tensor = r2, offset: Tensor = offset) -> Tensor:
                return a + r1 * (r2 * a + offset).tanh()

            w[i] = _root(equation, target, target - r1.abs(), target + r1.abs())
            h[i] = (r2 * w[i] + offset).tanh()
        return y - _times(self.Q, _times(self.R1, torch.stack(h, -1)))


class CouplingTransform(_Scored):
    r"""``y_a = x_a, y_b = f(x_b; x_a)`` for two parts a and b of the dimensions (arXiv 1605.08803).

    Args:
        conditional: ``conditional(x_a)`` is f, a transform of zuko's convention over vectors.
        kept, moved: the indices of a and of b, whole numbers.

    Example:
        >>> from torch.distributions.transforms import Transform
        >>> class Doubled(Transform):
        ...     def call_and_ladj(self, x):
        ...         return 2 * x, torch.full(x.shape[:-1], 0.6931 * x.shape[-1])
        >>> CouplingTransform(lambda a: Doubled(), torch.tensor([0]), torch.tensor([1, 2]))(torch.ones(5, 3))[0]
        tensor([1., 2., 2.])
    """

    def __init__(self, conditional: Callable[[Tensor], Any], kept: Tensor, moved: Tensor) -> None:
        super().__init__()
        self.conditional, self.kept, self.moved = conditional, kept, moved

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self.conditional(x.index_select(-1, self.kept)).call_and_ladj(x.index_select(-1, self.moved))
        return x.index_copy(-1, self.moved, y), ladj

    def _inverse(self, y: Tensor) -> Tensor:
        x = self.conditional(y.index_select(-1, self.kept)).inv(y.index_select(-1, self.moved))
        return y.index_copy(-1, self.moved, x)


class GatedAffineTransform(_Scored):
    r"""``y = g x + (1 - g) m``, ``g = sigmoid(s + 2)``, elementwise: the update of arXiv 1606.04934.

    Example:
        >>> GatedAffineTransform(torch.zeros(3), torch.zeros(3))(torch.ones(3))
        tensor([0.8808, 0.8808, 0.8808])
    """

    domain = constraints.real
    codomain = constraints.real

    def __init__(self, m: Tensor, s: Tensor) -> None:
        super().__init__()
        self.m, self.s = m, s + 2

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ladj = F.logsigmoid(self.s)
        return torch.lerp(self.m.expand_as(x), x, self.s.sigmoid().expand_as(x)), ladj.expand_as(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.m + (y - self.m) / self.s.sigmoid()


class OnePass(Transform):
    """A transform that keeps the log-determinant of its own forward pass.

    A draw is scored by the pass that made it, and a value by one pass of the inverse's: the network within
    `transform`, which has ``call_and_ladj``, is called once.

    Args:
        batch_shape: of what the transform depends on: vectors of fewer elements are expanded to it, which transforms
            such as couplings leave to their callers.
    """

    bijective = True

    def __init__(self, transform: Any, batch_shape: Sequence[int] = ()) -> None:
        super().__init__(cache_size=1)
        self.transform, self.batch_shape = transform, tuple(batch_shape)
        self.domain, self.codomain = transform.domain, transform.codomain
        self._kept: tuple[Any, Any, Any] = (None, None, None)

    def _call(self, x: Tensor) -> Tensor:
        y, ladj = self.transform.call_and_ladj(self._expanded(x))
        self._kept = (x, y, ladj)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        return self.transform.inv(self._expanded(y))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        if self._kept[0] is not x or self._kept[1] is not y:
            self._kept = (x, y, self.transform.call_and_ladj(self._expanded(x))[1])
        return self._kept[2]

    def _expanded(self, x: Tensor) -> Tensor:
        return x.expand(torch.broadcast_shapes(x.shape[:-1], self.batch_shape) + x.shape[-1:])


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None]).squeeze(-1)


def _root(f: Callable[[Tensor], Tensor], target: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Where an increasing function of each element is `target`; with the gradients of the implicit function."""
    with torch.no_grad():
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            below = f(middle) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    with torch.enable_grad():
        root = ((low + high) / 2).detach().requires_grad_()
        value = f(root)
        (slope,) = torch.autograd.grad(value.sum(), root, retain_graph=True)
    return root.detach() - (f(root.detach()) - target) / slope.detach()
