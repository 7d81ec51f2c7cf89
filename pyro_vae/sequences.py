"""Which steps of sequences are there, and which of their values are observed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Steps", "steps_of"]


class Steps(NamedTuple):
    """Of sequences x (B, T, D).

    Attributes:
        x: values that are not observed are those of the sequence's first observed step.
        there: (B, T), False after a sequence's end; None where all have T steps.
        observed: (B, T) or (B, T, D), False at values that count nothing; None where all count.
    """

    x: Tensor
    there: Tensor | None
    observed: Tensor | None


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
    if lengths is not None and lengths.shape != (B,):
        raise ValueError(f"expected lengths of shape ({B},), got {tuple(lengths.shape)}: one number for each sequence")
    if mask is not None and mask.shape not in (x.shape, x.shape[:2]):
        raise ValueError(f"expected a mask of shape {(B, T)} or {tuple(x.shape)}, got {tuple(mask.shape)}")
    if lengths is None and mask is None:
        return Steps(x, None, None)
    seen = torch.ones(B, T, dtype=torch.bool, device=x.device) if mask is None else mask.bool()
    frames = seen if seen.dim() == 2 else seen.any(-1)
    if lengths is None:
        there = frames.flip(1).cumsum(1).flip(1) > 0
    else:
        there = torch.arange(T, device=x.device) < lengths[:, None]
    observed = seen & (there if seen.dim() == 2 else there[..., None])
    first = (frames & there).to(torch.uint8).argmax(1)
    something = x[torch.arange(B, device=x.device), first][:, None]
    return Steps(x.where(observed if observed.dim() == 3 else observed[..., None], something), there, observed)
