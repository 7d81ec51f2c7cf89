"""Which steps of sequences are there, and which of their values are observed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Carried", "Steps", "all_there", "latent_rmse", "steps_of", "windows"]


class Steps(NamedTuple):
    """Of sequences x (B, T, D).

    Attributes:
        x: values that are not observed are the first one that is, of the same column in the sequence, or else in the
            batch; 0 in a column without any.
        there: (B, T), False after a sequence's end; None where all have T steps.
        observed: (B, T) or (B, T, D), False at values that count nothing; None where all count.
    """

    x: Tensor
    there: Tensor | None
    observed: Tensor | None

    @property
    def seen(self) -> Tensor:
        """(B, T, D): x, and 0 where it is not observed."""
        return torch.where(self.counted, self.x, 0.0)

    @property
    def counted(self) -> Tensor:
        """(B, T, D), which values are observed: NaN are not."""
        known = self.x == self.x
        if self.observed is None:
            return known
        return known & (self.observed if self.observed.dim() == 3 else self.observed[..., None])

    def inputs(self, u: Tensor | None) -> Tensor | None:
        """u (B, T, C), 0 after a sequence's end."""
        return u if u is None or self.there is None else torch.where(self.there[..., None], u, 0.0)

    @property
    def last(self) -> Tensor:
        """(B,), which step is a sequence's last."""
        if self.there is None:
            return torch.full((len(self.x),), self.x.shape[1] - 1, device=self.x.device)
        return self.there.sum(1) - 1


class Carried(NamedTuple):
    """What a window of a long series gets from the one before it, for each of B series.

    Attributes:
        z: (B, Z), at the last step; x: (B, D), that step, 0 where it is not observed.
        h: the state (B, H) of the guide's network that reads forwards, a tuple.
    """

    z: Tensor
    x: Tensor
    h: tuple[Tensor, ...] = ()


def steps_of(x: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None) -> Steps:
    """The steps of x (B, T, D), of which `lengths` (B,) are there and `mask`, (B, T) or (B, T, D), is observed.

    Without `lengths` a sequence ends at its last observed step. What x holds elsewhere changes nothing.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> steps = steps_of(torch.ones(2, 3, 1), mask=torch.tensor([[1, 0, 1], [1, 1, 0]], dtype=torch.bool))
        >>> steps.there.tolist()
        [[True, True, True], [True, True, False]]
    """
    if x.dim() != 3:
        raise ValueError(
            f"expected sequences of shape (B, T, D), got {tuple(x.shape)}: add the dimension that is missing"
        )
    B, T, _ = x.shape
    if lengths is not None and (lengths.shape != (B,) or lengths.is_floating_point()):
        raise ValueError(
            f"expected lengths of shape ({B},), whole numbers, got {tuple(lengths.shape)} of {lengths.dtype}: one for "
            "each sequence"
        )
    if mask is not None and mask.shape not in (x.shape, x.shape[:2]):
        raise ValueError(f"expected a mask of shape {(B, T)} or {tuple(x.shape)}, got {tuple(mask.shape)}")
    if lengths is None and mask is None:
        return Steps(x, None, None)
    seen = torch.ones(B, T, dtype=torch.bool, device=x.device) if mask is None else mask.bool()
    if lengths is None:
        frames = seen if seen.dim() == 2 else seen.any(-1)
        there = frames.flip(1).cumsum(1).flip(1) > 0
    else:
        there = torch.arange(T, device=x.device) < lengths[:, None]
    observed = seen & (there if seen.dim() == 2 else there[..., None])
    counted = observed if observed.dim() == 3 else observed[..., None]
    own, of_any = _first(x, counted), _first(x.flatten(0, 1), counted.flatten(0, 1))
    something = torch.where(counted.any(1, keepdim=True), own, of_any)
    something = torch.where(counted.any((0, 1)) & something.isfinite(), something, torch.zeros_like(something))
    return Steps(x.where(counted, something), there, observed)


def _first(x: Tensor, counted: Tensor) -> Tensor:
    """(..., 1, D), of each column of x (..., T, D) the first value that counts."""
    at = counted.to(torch.uint8).argmax(-2, keepdim=True)
    return x.gather(-2, at.expand(*x.shape[:-2], 1, x.shape[-1]))


def all_there(x: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """`lengths`, and where they are not told but a mask is, all steps of x (B, T, D): the last ones may be missing.

    Raises:
        ValueError: lengths that x does not have.
    """
    B, T, _ = x.shape
    if lengths is None:
        return None if mask is None else torch.full((B,), T, device=x.device)
    if bool((lengths < 0).any() | (lengths > T).any()):
        raise ValueError(f"expected lengths from 0 to {T}, got {lengths.tolist()}: the steps of x")
    return lengths


def windows(
    size: int, x: Tensor, u: Tensor | None = None, *, lengths: Tensor | None = None, mask: Tensor | None = None
) -> Iterator[tuple[tuple[Tensor, ...], dict[str, Any]]]:
    """Series x (B, T, D) in windows of `size` steps, the last one shorter: arguments of model and guide.

    Without `lengths` a series ends at its last observed step, and not before.

    Raises:
        ValueError: no steps in a window.

    Example:
        >>> [args[0].shape[1] for args, _ in windows(4, torch.zeros(2, 10, 1))]
        [4, 4, 2]
    """
    if size < 1:
        raise ValueError(f"expected windows of at least one step, got size {size}")
    steps = steps_of(x, lengths, mask)
    lengths = None if steps.there is None else steps.there.sum(1)
    for begin in range(0, x.shape[1], size):
        part = slice(begin, begin + size)
        kwargs = {} if lengths is None else {"lengths": (lengths - begin).clamp(0, size)}
        if mask is not None:
            kwargs["mask"] = mask[:, part]
        yield tuple(each[:, part] for each in (x, u) if each is not None), kwargs


def latent_rmse(draws: Tensor, truth: Tensor, lengths: Tensor | None = None) -> float:
    """The root of the mean squared distance of E[z_t] from the truth, over steps that are there and dimensions.

    Args:
        draws: (S, B, T, Z); truth: (B, T, Z); lengths: (B,).

    Example:
        >>> latent_rmse(torch.zeros(10, 2, 3, 1), torch.full((2, 3, 1), 2.0))
        2.0
    """
    there = torch.ones(truth.shape[:2], dtype=torch.bool, device=truth.device)
    if lengths is not None:
        there = torch.arange(truth.shape[1], device=truth.device) < lengths[:, None]
    return float((draws.mean(0) - truth)[there].square().mean().sqrt())
