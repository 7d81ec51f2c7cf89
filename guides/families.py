"""Families q(z | h): modules, declared without sizes, that turn features h into a distribution over a latent site.

With no features they are distributions with parameters of their own: what global latents and flow priors take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import ReshapeTransform
from torch import Tensor, nn

from ..distributions import (
    OnePass,
    PlanarTransform,
    RadialTransform,
    SylvesterTransform,
    autoregressive,
    coupling,
)
from ..nn import Declared, Heads, bind, positive

__all__ = [
    "IAF",
    "MAF",
    "AutoregressiveSpline",
    "Bernoulli",
    "Categorical",
    "CouplingSpline",
    "DiagonalNormal",
    "Family",
    "Flow",
    "HouseholderSylvester",
    "LowRankMultivariateNormal",
    "MultivariateNormal",
    "OrthogonalSylvester",
    "Planar",
    "Radial",
    "RealNVP",
    "TriangularSylvester",
]


class Family(Declared):
    """Base of families: `build` gets the number of features and the site's event shape, ``forward(h)`` returns
    q(z | h) for h of shape ``(*batch, features)``."""

    def build(self, features: int, event_shape: Sequence[int]) -> None:
        self.event_shape = torch.Size(event_shape)

    def forward(self, h: Tensor) -> dist.Distribution:
        raise NotImplementedError

    def shaped(self, distribution: dist.Distribution) -> dist.Distribution:
        """A distribution over vectors as one over the site's events."""
        if len(self.event_shape) == 1:
            return distribution
        flat = torch.Size([self.event_shape.numel()])
        return dist.TransformedDistribution(distribution, [ReshapeTransform(flat, self.event_shape, cache_size=1)])


class DiagonalNormal(Family):
    """``q(z|h) = N(z; m(h), diag s(h)^2)`` with m and log s linear in h, s near `initial_scale` before training.

    Example:
        >>> DiagonalNormal().bind(10, (3,))(torch.zeros(5, 10)).batch_shape
        torch.Size([5])
    """

    def __init__(self, initial_scale: float = 1.0) -> None:
        super().__init__()
        if not initial_scale > 0:
            raise ValueError(f"expected initial_scale > 0, got {initial_scale}: give a positive number")
        self.initial_scale = initial_scale

    def build(self, features: int, event_shape: Sequence[int]) -> None:
        super().build(features, event_shape)
        self.heads = Heads(features, event_shape, event_shape)
        self.heads.start(1, math.log(self.initial_scale))

    def forward(self, h: Tensor) -> dist.Distribution:
        location, log_scale = self.heads(h)
        return dist.Normal(location, log_scale.exp()).to_event(len(self.event_shape))


class MultivariateNormal(Family):
    """``q(z|h) = N(z; m(h), L(h) L(h)^T)``, m, L's triangle and the logarithm of its diagonal linear in h.

    Example:
        >>> MultivariateNormal().bind(10, (3,))(torch.zeros(5, 10)).covariance_matrix.shape
        torch.Size([5, 3, 3])
    """

    def build(self, features: int, event_shape: Sequence[int]) -> None:
        super().build(features, event_shape)
        D = math.prod(event_shape)
        self.heads = Heads(features, (D,), (D,), (D, D))

    def forward(self, h: Tensor) -> dist.Distribution:
        location, log_diagonal, triangle = self.heads(h)
        L = triangle.tril(-1) + log_diagonal.exp().diag_embed()
        return self.shaped(dist.MultivariateNormal(location, scale_tril=L))


class LowRankMultivariateNormal(Family):
    """``q(z|h) = N(z; m(h), W(h) W(h)^T + diag s(h)^2)`` with W of shape ``(D, rank)``.

    Example:
        >>> LowRankMultivariateNormal(rank=2).bind(10, (3,))(torch.zeros(5, 10)).event_shape
        torch.Size([3])
    """

    def __init__(self, rank: int = 4) -> None:
        super().__init__()
        self.rank = positive("rank", rank)

    def build(self, features: int, event_shape: Sequence[int]) -> None:
        super().build(features, event_shape)
        D = math.prod(event_shape)
        self.heads = Heads(features, (D,), (D,), (D, self.rank))

    def forward(self, h: Tensor) -> dist.Distribution:
        location, log_scale, W = self.heads(h)
        return self.shaped(dist.LowRankMultivariateNormal(location, W, (2 * log_scale).exp()))


class Categorical(Family):
    """``q(z|h) = softmax(l(h))`` over the last dimension of one-hot vectors, l linear in h, or over as many integers.

    Example:
        >>> Categorical().bind(10, (3,))(torch.zeros(5, 10)).event_shape
        torch.Size([3])
    """

    def build(
        self,
        features: int,
        event_shape: Sequence[int],
        categories: int | None = None,
        dtype: torch.dtype = torch.long,
    ) -> None:
        super().build(features, event_shape)
        self.one_hot, self.dtype = categories is None, dtype
        self.heads = Heads(features, event_shape if categories is None else (*event_shape, categories))

    def forward(self, h: Tensor) -> dist.Distribution:
        (logits,) = self.heads(h)
        if self.one_hot:
            return dist.OneHotCategorical(logits=logits).to_event(len(self.event_shape) - 1)
        integers = _Integers(logits=logits)
        integers.dtype = self.dtype
        return integers.to_event(len(self.event_shape))


class _Integers(dist.Categorical):
    """A categorical distribution whose integers have the type of the model's, which draws some as floats."""

    dtype = torch.long

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        wider = super().expand(batch_shape, self._get_checked_instance(_Integers, _instance))
        wider.dtype = self.dtype
        return wider

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return super().sample(torch.Size(sample_shape)).to(self.dtype)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        return super().enumerate_support(expand).to(self.dtype)


class Bernoulli(Family):
    """``q(z|h) = prod_d sigma(l_d)^{z_d} (1 - sigma(l_d))^{1 - z_d}`` with l linear in h.

    Example:
        >>> Bernoulli().bind(10, (3,))(torch.zeros(5, 10)).event_shape
        torch.Size([3])
    """

    def build(self, features: int, event_shape: Sequence[int]) -> None:
        super().build(features, event_shape)
        self.heads = Heads(features, event_shape)

    def forward(self, h: Tensor) -> dist.Distribution:
        (logits,) = self.heads(h)
        return dist.Bernoulli(logits=logits).to_event(len(self.event_shape))


class Flow(Family):
    """Base of flow families: ``z = f_K(... f_1(z_0; h) ...; h)`` with ``z_0 ~ base(h)``.

    Density: ``ln q(z|h) = ln q(z_0|h) - sum_k ln |df_k/dz_{k-1}|``, of a draw from the pass that made it.
    """

    def __init__(self, transforms: int = 4, base: Family | None = None) -> None:
        super().__init__()
        self.transforms = positive("transforms", transforms)
        self.base = DiagonalNormal() if base is None else base

    def build(self, features: int, event_shape: Sequence[int]) -> None:
        super().build(features, event_shape)
        D = math.prod(event_shape)
        self.features = features
        self.base = bind(self.base, features, (D,))
        self.build_flow(features, D)

    def build_flow(self, features: int, dim: int) -> None:
        """Make the parameters of the transforms."""
        raise NotImplementedError

    def chain(self, h: Tensor) -> list[Any]:
        """f_1 to f_K at h, each with ``call_and_ladj``."""
        raise NotImplementedError

    def forward(self, h: Tensor) -> dist.Distribution:
        batch = h.shape[:-1] if self.features else torch.Size()
        return self.shaped(dist.TransformedDistribution(self.base(h), [OnePass(f, batch) for f in self.chain(h)]))

    def inverse(self) -> dist.Distribution:
        """The distribution of ``f_1^{-1}(... f_K^{-1}(z_0))``, without features: a score takes one pass."""
        h = torch.empty(0)
        backwards = [OnePass(f).inv for f in reversed(self.chain(h))]
        return self.shaped(dist.TransformedDistribution(self.base(h), backwards))


class Planar(Flow):
    """K planar transforms ``z + u tanh(w.z + b)`` with u, w, b linear in h (arXiv 1505.05770).

    Example:
        >>> Planar(transforms=4).bind(10, (3,))(torch.zeros(5, 10)).rsample().shape
        torch.Size([5, 3])
    """

    def build_flow(self, features: int, dim: int) -> None:
        self.heads = Heads(features, (self.transforms, dim), (self.transforms, dim), (self.transforms, 1))

    def chain(self, h: Tensor) -> list[Any]:
        return [PlanarTransform(*each) for each in zip(*(t.unbind(-2) for t in self.heads(h)), strict=True)]


class Radial(Flow):
    """K radial transforms about centres c, with c and the logarithms of their widths linear in h (arXiv 1505.05770).

    Example:
        >>> Radial(transforms=4).bind(10, (3,))(torch.zeros(5, 10)).rsample().shape
        torch.Size([5, 3])
    """

    def build_flow(self, features: int, dim: int) -> None:
        self.heads = Heads(features, (self.transforms, dim), (self.transforms, 1), (self.transforms, 1))

    def chain(self, h: Tensor) -> list[Any]:
        return [RadialTransform(*each) for each in zip(*(t.unbind(-2) for t in self.heads(h)), strict=True)]


class _Sylvester(Flow):
    """K transforms ``z + Q R1 tanh(R2 Q^T z + b)``; a subclass says what Q is, and how many columns it has."""

    identity: Tensor

    def columns_of(self, dim: int) -> int:
        return dim

    def build_flow(self, features: int, dim: int) -> None:
        K, M = self.transforms, self.columns_of(dim)
        self.heads = Heads(features, (K, M, M), (K, 2, M), (K, M))
        self.build_basis(features, dim, M)

    def build_basis(self, features: int, dim: int, columns: int) -> None:
        raise NotImplementedError

    def bases(self, h: Tensor) -> Tensor:
        """Q of each transform, ``(*batch, K, D, M)`` or without the batch."""
        raise NotImplementedError

    def chain(self, h: Tensor) -> list[Any]:
        triangles, diagonals, b = self.heads(h)
        parts = (self.bases(h).unbind(-3), triangles.unbind(-3), diagonals.unbind(-3), b.unbind(-2))
        return [SylvesterTransform(*each) for each in zip(*parts, strict=True)]


class OrthogonalSylvester(_Sylvester):
    """K Sylvester transforms whose Q, with `columns` columns, comes from h by orthogonalisation (arXiv 1803.05649).

    Example:
        >>> OrthogonalSylvester(transforms=2, columns=2).bind(10, (3,))(torch.zeros(5, 10)).rsample().shape
        torch.Size([5, 3])
    """

    def __init__(self, transforms: int = 4, columns: int = 16, base: Family | None = None) -> None:
        super().__init__(transforms, base)
        self.columns = positive("columns", columns)

    def columns_of(self, dim: int) -> int:
        return min(self.columns, dim)

    def build_basis(self, features: int, dim: int, columns: int) -> None:
        self.basis = Heads(features, (self.transforms, dim, columns))
        self.register_buffer("identity", torch.eye(dim, columns), persistent=False)

    def bases(self, h: Tensor) -> Tensor:
        return torch.linalg.qr(self.identity + self.basis(h)[0]).Q


class HouseholderSylvester(_Sylvester):
    """K Sylvester transforms whose Q is a product of `reflections` across planes that come from h (arXiv 1803.05649).

    Example:
        >>> HouseholderSylvester(transforms=2, reflections=2).bind(10, (3,))(torch.zeros(5, 10)).rsample().shape
        torch.Size([5, 3])
    """

    def __init__(self, transforms: int = 4, reflections: int = 8, base: Family | None = None) -> None:
        super().__init__(transforms, base)
        self.reflections = positive("reflections", reflections)

    def build_basis(self, features: int, dim: int, columns: int) -> None:
        self.normals = Heads(features, (self.transforms, self.reflections, dim))
        self.register_buffer("identity", torch.eye(dim), persistent=False)

    def bases(self, h: Tensor) -> Tensor:
        (normals,) = self.normals(h)
        Q = self.identity
        for v in nn.functional.normalize(normals, dim=-1)[..., None].unbind(-3):
            Q = Q - 2 * (Q @ v) @ v.mT
        return Q


class TriangularSylvester(_Sylvester):
    """K Sylvester transforms whose Q is in turn the identity and the reversal of dimensions (arXiv 1803.05649).

    Example:
        >>> TriangularSylvester(transforms=2).bind(10, (3,))(torch.zeros(5, 10)).rsample().shape
        torch.Size([5, 3])
    """

    def build_basis(self, features: int, dim: int, columns: int) -> None:
        self.register_buffer("identity", torch.eye(dim), persistent=False)

    def bases(self, h: Tensor) -> Tensor:
        return torch.stack([self.identity.flip(0) if k % 2 else self.identity for k in range(self.transforms)])


class _Network(Flow):
    """K transforms, each with a network of its own that sees h, over dimensions in an order that turns at each."""

    layer: Callable[..., nn.Module]
    univariate = "affine"

    def __init__(self, transforms: int = 2, hidden: Sequence[int] = (256,), base: Family | None = None) -> None:
        super().__init__(transforms, base)
        self.hidden = tuple(positive("hidden", width) for width in hidden)

    def build_flow(self, features: int, dim: int) -> None:
        self.networks = nn.ModuleList(
            self.layer(dim, features, self.univariate, self.hidden, bool(k % 2)) for k in range(self.transforms)
        )

    def chain(self, h: Tensor) -> list[Any]:
        return [network(h if self.features else None) for network in self.networks]


class IAF(_Network):
    """Inverse autoregressive flow with the gated update ``g z + (1 - g) m``, g and m from a masked network on z and h
    (arXiv 1606.04934).

    Example:
        >>> IAF(transforms=2, hidden=(16,)).bind(10, (3,))(torch.zeros(5, 10)).rsample().shape
        torch.Size([5, 3])
    """

    layer = staticmethod(autoregressive)
    univariate = "gated"


class MAF(_Network):
    """Masked autoregressive flow, ``s z + m``, s and m from a masked network on z and h (arXiv 1705.07057), in the
    direction in which a draw takes one pass.

    Example:
        >>> MAF(transforms=2, hidden=(16,)).bind(10, (3,))(torch.zeros(5, 10)).rsample().shape
        torch.Size([5, 3])
    """

    layer = staticmethod(autoregressive)


class RealNVP(_Network):
    """Affine coupling, ``s z + m`` for every other dimension given the rest and h (arXiv 1605.08803): one pass in both
    directions.

    Example:
        >>> RealNVP(transforms=2, hidden=(16,)).bind(10, (3,))(torch.zeros(5, 10)).rsample().shape
        torch.Size([5, 3])
    """

    layer = staticmethod(coupling)


class AutoregressiveSpline(_Network):
    """Autoregressive monotone rational-quadratic splines on (-5, 5), the identity beyond (arXiv 1906.04032), in the
    direction in which a draw takes one pass.

    Example:
        >>> AutoregressiveSpline(transforms=2, hidden=(16,)).bind(10, (3,))(torch.zeros(5, 10)).rsample().shape
        torch.Size([5, 3])
    """

    layer = staticmethod(autoregressive)
    univariate = "spline"


class CouplingSpline(_Network):
    """Coupling by monotone rational-quadratic splines on (-5, 5), the identity beyond (arXiv 1906.04032): one pass in
    both directions.

    Example:
        >>> CouplingSpline(transforms=2, hidden=(16,)).bind(10, (3,))(torch.zeros(5, 10)).rsample().shape
        torch.Size([5, 3])
    """

    layer = staticmethod(coupling)
    univariate = "spline"
