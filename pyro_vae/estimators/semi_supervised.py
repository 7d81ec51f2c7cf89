"""The bound of data of which some have labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor

from ..log_weights import check_draws_alone

__all__ = ["SemiSupervisedELBO"]


class SemiSupervisedELBO(TraceEnum_ELBO):
    """Labels for some of the data, the last argument, and none for the rest (arXiv 1406.5298)::

        sum_{labelled} L(x, y) + sum_{others} U(x),     U(x) = sum_y q(y|x) [L(x, y) - ln q(y|x)]

    L is the ELBO given x and y; U that of x alone, with y, and every other discrete site, summed out. Labels are
    one-hot, ``(B, classes)``, with NaN in rows without one. The gradient has ``classification * sum_{labelled}
    ln q(y|x)`` beside, scaled as the data's plate is, the term that trains the classifier on the labels; the loss that
    is reported leaves it out. All sites are in the plate of the data, the only one.

    Args:
        classification: weight of that term.
        site: the label's name in model and guide; both take its value as their last argument, and draw it without.

    Raises:
        ValueError: a last argument that is no tensor with rows of labels; a guide without the site, or with one that
            depends on other discrete sites, or that observes the label or anything else; labels by keyword.

    Example: see `pyro_vae.models.SemiSupervisedVAE`.
    """

    def __init__(self, *args: Any, classification: float = 1.0, site: str = "y", **kwargs: Any) -> None:
        super().__init__(*args, **{"strict_enumeration_warning": False, **kwargs})  # the labelled have nothing to sum
        if classification < 0:
            raise ValueError(f"expected classification >= 0, got {classification}: give a weight")
        self.classification, self.site = classification, site

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        labelled, others, given, drawn = self._calls(model, guide, args, kwargs)
        loss = super().differentiable_loss(*labelled, **kwargs) + super().differentiable_loss(*others, **kwargs)
        check_draws_alone(given.trace)
        if self.site not in drawn.trace.nodes:
            raise ValueError(f'expected a guide with the latent site "{self.site}", got {list(drawn.trace.nodes)}')
        log_q = drawn.trace.nodes[self.site]["fn"].log_prob(labelled[-1])
        rows = len(args[-1])
        if log_q.dim() > self.max_plate_nesting or log_q.shape[-1] != rows:  # summed out dimensions are further left
            raise ValueError(
                f'expected site "{self.site}" in one plate of data and independent of discrete sites that are summed '
                f"out, got its log-probability of shape {tuple(log_q.shape)} for {rows} data: draw it first"
            )
        (plate,) = {f for f in drawn.trace.nodes[self.site]["cond_indep_stack"] if f.dim == -1}
        weight = self.classification * (plate.full_size or plate.size) / plate.size
        log_q = log_q.reshape(-1, rows).mean(0)  # over particles
        surrogate = weight * torch.where(args[-1].isfinite().all(-1), log_q, 0.0).sum()
        return loss - (surrogate - surrogate.detach())

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        labelled, others, given, _ = self._calls(model, guide, args, kwargs)
        loss = super().loss(*labelled, **kwargs) + super().loss(*others, **kwargs)
        check_draws_alone(given.trace)
        return loss

    def _calls(
        self, model: Callable, guide: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple, tuple, Any, Any]:
        """Programs and arguments for the labelled and for the others, and the guides that keep their traces."""
        *data, y = args
        if not isinstance(y, Tensor) or y.dim() != 2 or not data or self.site in kwargs:
            came = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            came = f"{self.site}= by keyword" if self.site in kwargs else came
            raise ValueError(
                f"expected one-hot labels (B, classes) as the last argument, NaN where missing, got {came}: train on "
                "(x, y)"
            )
        known = y.isfinite().all(-1)
        label = torch.where(known[:, None], y, torch.eye(y.shape[1], dtype=y.dtype, device=y.device)[0])
        given, drawn = poutine.trace(guide), poutine.trace(guide)
        labelled = (poutine.mask(model, mask=known), poutine.mask(given, mask=known), *data, label)
        others = (poutine.mask(model, mask=~known), config_enumerate(poutine.mask(drawn, mask=~known)), *data)
        return labelled, others, given, drawn
