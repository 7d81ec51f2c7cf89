"""zuko's autoregressive and coupling transforms: the one place that knows zuko."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .transforms import CouplingTransform, GatedAffineTransform

__all__ = ["autoregressive", "coupling"]

BINS = 8  # of a spline
Univariate = tuple[Callable[..., Any], Sequence[tuple[int, ...]]]  # and the shapes of its parameters


def autoregressive(dim: int, features: int, univariate: str, hidden: Sequence[int], reverse: bool = False) -> nn.Module:
    """A module ``h -> (x -> y)``, ``y_i = f(x_i; x_<i, h)``, with one masked network for all i (arXiv 1502.03509).

    Args:
        dim: of x; h has `features` of them, and is None where that is 0.
        univariate: of f: "affine", "gated" or "spline".
        reverse: condition on x_>i.

    Example:
        >>> transform = autoregressive(3, 5, "affine", (16,))(torch.zeros(5))
        >>> transform(torch.zeros(7, 3)).shape
        torch.Size([7, 3])
    """
    zuko = _zuko()
    function, shapes = _univariate(zuko, univariate)
    order = torch.arange(dim)
    return zuko.flows.MaskedAutoregressiveTransform(
        dim,
        features,
        order=order.flip(0) if reverse else order,
        univariate=function,
        shapes=shapes,
        hidden_features=hidden,
    )


def coupling(dim: int, features: int, univariate: str, hidden: Sequence[int], reverse: bool = False) -> nn.Module:
    """A module ``h -> (x -> y)`` that leaves every other dimension, and moves the rest by ``f(x_i; these, h)``
    (arXiv 1605.08803).

    Example:
        >>> transform = coupling(3, 0, "spline", (16,))(None)
        >>> transform.inv(torch.zeros(7, 3)).shape
        torch.Size([7, 3])
    """
    zuko = _zuko()
    function, shapes = _univariate(zuko, univariate)
    if dim == 1:  # there is nothing to condition on but h
        return zuko.flows.ElementWiseTransform(1, features, univariate=function, shapes=shapes, hidden_features=hidden)
    return _Coupling(dim, features, function, shapes, hidden, reverse)


class _Coupling(nn.Module):
    """zuko's coupling, with the indices of its parts as buffers: zuko's reads them from a mask on the host, at each
    call."""

    kept: Tensor
    moved: Tensor

    def __init__(
        self, dim: int, features: int, univariate: Callable[..., Any], shapes: Any, hidden: Sequence[int], reverse: bool
    ) -> None:
        super().__init__()
        self.univariate, self.shapes = univariate, shapes
        kept, moved = torch.arange(dim)[int(reverse) :: 2], torch.arange(dim)[1 - int(reverse) :: 2]
        self.register_buffer("kept", kept, persistent=False)
        self.register_buffer("moved", moved, persistent=False)
        self.total = sum(math.prod(shape) for shape in shapes)
        self.hyper = _zuko().nn.MLP(len(kept) + features, len(moved) * self.total, hidden_features=hidden)

    def forward(self, h: Tensor | None) -> CouplingTransform:
        zuko = _zuko()

        def conditional(x: Tensor) -> Any:
            if h is not None:
                x = torch.cat(zuko.utils.broadcast(x, h, ignore=1), -1)
            parameters = zuko.utils.unpack(self.hyper(x).unflatten(-1, (-1, self.total)), self.shapes)
            return zuko.transforms.DependentTransform(self.univariate(*parameters), 1)

        return CouplingTransform(conditional, self.kept, self.moved)


def _univariate(zuko: ModuleType, name: str) -> Univariate:
    known: dict[str, Univariate] = {
        "affine": (zuko.transforms.MonotonicAffineTransform, ((), ())),
        "gated": (GatedAffineTransform, ((), ())),
        "spline": (zuko.transforms.MonotonicRQSTransform, ((BINS,), (BINS,), (BINS - 1,))),
    }
    if name not in known:
        raise ValueError(f"expected univariate to be one of {', '.join(known)}, got {name!r}")
    return known[name]


def _zuko() -> ModuleType:
    """zuko, without what its import does to torch's distributions."""
    distribution, inverse = torch.distributions.Distribution, torch.distributions.transforms._InverseTransform
    before = distribution._validate_args, distribution.arg_constraints, inverse.__name__
    try:
        import zuko
    finally:
        distribution._validate_args, distribution.arg_constraints, inverse.__name__ = before  # type: ignore[method-assign]
    return zuko
