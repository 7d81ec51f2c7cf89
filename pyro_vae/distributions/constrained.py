"""Draws on a constrained support that remember the number over the reals that they were made from.

A share of 1e-60 rounds to 0 in single precision, and the density of a sparse Dirichlet distribution at 0 is infinite.
The logarithm of the share, -138, is an ordinary number: `Constrained` hands it to the densities that ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions import transforms as torch_transforms
from torch.nn.functional import logsigmoid

__all__ = ["Constrained", "Remembered", "leaf_of", "rearranged", "unconstrained"]

LOG = {torch.log, Tensor.log}
XLOGY = {torch.xlogy, Tensor.xlogy, torch.special.xlogy}
NEGATIVE = {torch.neg, torch.negative, Tensor.neg, Tensor.negative, Tensor.__neg__}
LOG1P = {torch.log1p, Tensor.log1p, torch.special.log1p}
ONE_MINUS = {Tensor.__rsub__, torch.rsub}
CLAMP = {torch.clamp, Tensor.clamp, torch.clip, Tensor.clip}
GRADIENTS = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
HOOKS = {Tensor.retain_grad, Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}
CASTS = {Tensor.double, Tensor.float, Tensor.to}
SHAPES = {  # of one tensor to one tensor, that move elements and change none
    *(Tensor.__getitem__, Tensor.unsqueeze, Tensor.squeeze, Tensor.expand, Tensor.expand_as, Tensor.reshape),
    *(Tensor.view, Tensor.flatten, Tensor.unflatten, Tensor.movedim, Tensor.transpose, Tensor.permute),
    *(Tensor.select, Tensor.narrow, Tensor.index_select, Tensor.contiguous, torch.unsqueeze, torch.squeeze),
    *(torch.reshape, torch.flatten, torch.movedim, torch.transpose, torch.permute, torch.select, torch.narrow),
    *(torch.index_select, torch.unflatten),
}


class Constrained(Tensor):
    """A tensor that remembers the logarithms of its elements, before these were rounded.

    It is the tensor `plain` to every function of torch but for logarithms: ``log(y)``, ``xlogy(a, y)``, and where
    ``log(1 - y)`` is known ``log(1 - y)`` and ``log1p(-y)`` too. Functions that only move elements, or change their
    type, keep what is remembered; the others give plain tensors. A derivative with respect to it is refused, as the
    logarithms are no functions of the rounded values: it is one with respect to ``unconstrained(support, y)``.

    Attributes:
        plain: the values, an ordinary tensor.
        log: their logarithms. log1m: those of 1 less them, or None.
        source: the tensor over the real numbers that they were made from, and by which transform, or None.

    Example:
        >>> y = Remembered(torch.distributions.constraints.positive)(torch.tensor([-200.0]))
        >>> y, y.log(), torch.distributions.Gamma(0.1, 1.0).log_prob(y)
        (tensor([1.1755e-38]), tensor([-200.]), tensor([177.7473]))
    """

    plain: Tensor
    remembered: tuple[Tensor | None, Tensor | None]
    source: tuple[Tensor, Callable[[Tensor], Tensor]] | None

    @staticmethod
    def of(plain: Tensor, log: Tensor | None, log1m: Tensor | None = None, source: Any = None) -> Constrained:
        value = plain.as_subclass(Constrained)
        value.__dict__.update(plain=plain, remembered=(log, log1m), source=source, version=plain._version)
        return value

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_derivative(function, args, kwargs):
            raise RuntimeError(
                "expected a derivative with respect to plain tensors, got one with respect to a draw on a constrained "
                "support, which does not see the logarithms that densities are computed from: compute the density of "
                "z.detach().requires_grad_(), or take the derivative with respect to the "
                "unconstrained number, pyro_vae.distributions.unconstrained(support, z)"
            )
        found = _by_memory(function, args, kwargs)
        if found is not None:
            return found
        return function(*map(_plain, args), **{name: _plain(value) for name, value in kwargs.items()})

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__dict__["plain"].__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.__dict__["plain"].__deepcopy__(memo)


class _Negative(Constrained):
    """Minus such a tensor: its ``log1p`` is known."""


def _is_derivative(function: Any, args: Sequence[Any], kwargs: Any) -> bool:
    """Whether it is a derivative with respect to what remembers."""
    if function in HOOKS:
        return True
    if function not in GRADIENTS:
        return False
    inputs = kwargs.get("inputs", args[1] if function is torch.autograd.grad and len(args) > 1 else ()) or ()
    inputs = [inputs] if isinstance(inputs, Tensor) else inputs
    return any(isinstance(each, Constrained) for each in inputs)


def _by_memory(function: Any, args: Sequence[Any], kwargs: Any) -> Any:
    """The result where it follows from what a tensor remembers, else None."""
    value = args[0] if args else None
    if function in XLOGY and len(args) == 2 and _remembers(args[1]) and _logarithms(args[1])[0] is not None:
        return _plain(args[0]) * _logarithms(args[1])[0]
    if function in (torch.stack, torch.cat) and args and all(map(_remembers, args[0])):
        return _mapped(lambda *parts: function([*parts], *args[1:], **kwargs), args[0])
    if not isinstance(value, Constrained) or not _intact(value):
        return None
    if type(value) is _Negative:
        return _logarithms(value)[1] if function in LOG1P else None
    log, log1m = _logarithms(value)
    if function in LOG:
        return log
    if function in CASTS and not function(_plain(value), *args[1:], **kwargs).is_floating_point():
        return None
    if function in SHAPES or function in CASTS:
        return _mapped(lambda part: function(part, *args[1:], **kwargs), [value])
    if log1m is None:
        return None
    if function in NEGATIVE:
        negative = (-value.__dict__["plain"]).as_subclass(_Negative)
        plain = -value.__dict__["plain"]
        negative.__dict__.update(plain=plain, remembered=(log, log1m), source=None, version=plain._version)
        return negative
    if function in ONE_MINUS and not kwargs and len(args) == 2 and type(args[1]) in (int, float) and args[1] == 1:
        return Constrained.of(1 - value.__dict__["plain"], log1m, log)
    if function in CLAMP:  # as torch's inverse of a sigmoid does against infinities, which logarithms do not have
        low, high = (*args[1:], kwargs.get("min"), kwargs.get("max"))[:2] if len(args) > 1 else _bounds(kwargs)
        limits = torch.finfo(value.dtype)
        if low in (None, limits.tiny) and high in (None, 1.0 - limits.eps):
            return value
    return None


def _bounds(kwargs: Any) -> tuple[Any, Any]:
    return kwargs.get("min"), kwargs.get("max")


def _intact(value: Constrained) -> bool:
    """Whether nobody has written into the tensor since, whose logarithms it then would not have."""
    return value.__dict__["plain"]._version == value.__dict__["version"]


def _remembers(value: Any) -> bool:
    return type(value) is Constrained and _intact(value)


def _source(value: Tensor) -> Any:
    return value.__dict__["source"] if _remembers(value) else None


def _logarithms(value: Constrained) -> tuple[Any, Any]:
    return value.__dict__["remembered"]


def _plain(value: Any) -> Any:
    if isinstance(value, Constrained):
        return value.__dict__["plain"]
    if isinstance(value, list | tuple) and any(isinstance(each, Constrained) for each in value):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value
    return value


def _mapped(function: Callable[..., Tensor], values: Sequence[Constrained]) -> Constrained:
    """The same function of values, logarithms and logarithms of 1 less them."""
    parts = []
    for i in range(2):
        logs = [_logarithms(value)[i] for value in values]
        parts.append(None if any(each is None for each in logs) else function(*logs))
    return Constrained.of(function(*map(_plain, values)), *parts)


class Remembered(torch_transforms.Transform):
    """``biject_to(support)`` whose log-determinant is taken from the unconstrained number, and whose results are
    `Constrained` where the support is positive numbers, a unit interval or a simplex.

    Example:
        >>> transform = Remembered(torch.distributions.constraints.simplex)
        >>> u = torch.tensor([300.0, -300.0])
        >>> y = transform(u)
        >>> y, y.log(), transform.inv(y) is u
        (tensor([1., 0., 0.]), tensor([   0.0000, -599.3069, -299.3069]), True)
    """

    bijective = True

    def __init__(self, support: Any) -> None:
        super().__init__()
        self.support, self.bijection = support, biject_to(support)
        self.domain, self.codomain = self.bijection.domain, self.bijection.codomain
        inner = self.bijection
        while isinstance(inner, torch_transforms.IndependentTransform):
            inner = inner.base_transform
        if isinstance(inner, torch_transforms.ComposeTransform) and _is_positive(inner):
            inner = inner.parts[0]
        self.kind = type(inner)
        self.events = self.bijection.domain.event_dim

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remembered) and self.bijection == other.bijection

    def forward_shape(self, shape: Any) -> torch.Size:
        return self.bijection.forward_shape(shape)

    def inverse_shape(self, shape: Any) -> torch.Size:
        return self.bijection.inverse_shape(shape)

    def _call(self, u: Tensor) -> Tensor:
        limits = torch.finfo(u.dtype)
        if self.kind is torch_transforms.ExpTransform:
            return Constrained.of(u.exp().clamp(limits.tiny, limits.max), u, None, (u, self))
        if self.kind is torch_transforms.SigmoidTransform:
            return Constrained.of(
                u.sigmoid().clamp(limits.tiny, 1 - limits.eps), logsigmoid(u), logsigmoid(-u), (u, self)
            )
        if self.kind is torch_transforms.StickBreakingTransform:
            log, _ = _broken_stick(u)
            return Constrained.of(log.exp(), log, None, (u, self))
        y = self._inside(self.bijection(u))
        return Constrained.of(y, None, None, (u, self)) if y.dim() == u.dim() else y  # a matrix is made from a vector

    def _inside(self, y: Tensor) -> Tensor:
        """y off the bounds of an interval, on which rounding may put it."""
        base = self.support
        while hasattr(base, "base_constraint"):
            base = base.base_constraint
        limits = torch.finfo(y.dtype)
        for name, side, most in (
            ("lower_bound", torch.maximum, limits.max),
            ("upper_bound", torch.minimum, -limits.max),
        ):
            if (bound := getattr(base, name, None)) is not None:
                bound = torch.as_tensor(bound, dtype=y.dtype, device=y.device)
                y = side(y, torch.nextafter(bound, torch.full_like(bound, most)))
        return y.clamp(-limits.max, limits.max)

    def _inverse(self, y: Tensor) -> Tensor:
        source = _source(y)
        return self.bijection.inv(y) if source is None else source[0]

    def log_abs_det_jacobian(self, u: Tensor, y: Tensor) -> Tensor:
        if self.kind is torch_transforms.SigmoidTransform:
            each = logsigmoid(u) + logsigmoid(-u)
            return each.sum([-1 - i for i in range(self.events)]) if self.events else each
        if self.kind is torch_transforms.StickBreakingTransform:
            log, rest = _broken_stick(u)
            return (log[..., :-1] + rest).sum([-1 - i for i in range(self.events)])
        return self.bijection.log_abs_det_jacobian(u, y)


def _is_positive(transform: torch_transforms.ComposeTransform) -> bool:
    """Whether it leads to the numbers above 0."""
    kinds = [type(part) for part in transform.parts]
    if kinds != [torch_transforms.ExpTransform, torch_transforms.AffineTransform]:
        return False
    affine: Any = transform.parts[1]
    return type(affine.loc) in (int, float) and affine.loc == 0 and affine.scale == 1


def _broken_stick(u: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the parts of a stick of which each of u breaks off a share, and of what each leaves of the rest."""
    parts = torch.arange(u.shape[-1], 0, -1, dtype=u.dtype, device=u.device)
    x = u - parts.log()
    taken, left = logsigmoid(x), logsigmoid(-x)
    before = left.cumsum(-1)
    return torch.cat([taken[..., :1], taken[..., 1:] + before[..., :-1], before[..., -1:]], -1), left


def rearranged(value: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function(value)`` for a function that moves elements of a batch, which remembers what the value does."""
    source = _source(value)
    return function(value) if source is None else source[1](function(source[0]))


def leaf_of(drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A draw as its sampling path made it, a leaf of autograd in its place, and the value that the leaf gives.

    Path and leaf are the numbers over the reals, where the draw remembers these: at the edge of a support the gradient
    of a density of the draw itself is infinite.
    """
    source = _source(drawn)
    if source is None:
        leaf = drawn.detach().requires_grad_()
        return drawn, leaf, leaf
    leaf = source[0].detach().requires_grad_()
    return source[0], leaf, source[1](leaf)


def unconstrained(support: Any, value: Tensor) -> Tensor:
    """The number over the reals that `value` on the support is made from."""
    return Remembered(support).inv(value)
