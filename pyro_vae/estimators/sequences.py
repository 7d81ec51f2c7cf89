"""Objectives of sequence models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..log_weights import LogWeights
from .bounds import ELBO

__all__ = ["PredictionPenalty"]


class PredictionPenalty(ELBO):
    """Trains on the ELBO less what predictions of one step miss, and reports the ELBO::

        L - weight E_q sum_{t > 1} |x_t - E[x_t | z_t = E[z_t | z_{t-1}]]|^2

    over what is observed. It is no bound of anything: it pulls model and guide towards states that foretell the next
    step, at the expense of the likelihood.

    Args:
        weight: of the squares, in the data's units; 0 is the plain ELBO.

    Raises:
        ValueError: a model without `prediction_error`, which `StateSpaceModel` has.

    Example:
        >>> import torch
        >>> from pyro_vae.guides import StateSpaceGuide
        >>> from pyro_vae.models import DeepMarkovModel
        >>> model = DeepMarkovModel((3,), latent_dim=2, transition_hidden=5)
        >>> PredictionPenalty(0.1).loss(model, StateSpaceGuide(model), torch.ones(4, 7, 3)) > 0
        True
    """

    def __init__(self, weight: float, num_particles: int = 1, **arguments: Any) -> None:
        super().__init__(num_particles, **arguments)
        if not weight >= 0:
            raise ValueError(f"expected weight >= 0, got {weight}: give a weight of the squared errors")
        self.weight = weight

    def extra(self, weights: LogWeights, model: Callable, guide: Callable, args: Any, kwargs: Any) -> Tensor:
        if not hasattr(model, "prediction_error") or "z" not in weights.sites:
            raise ValueError(f"expected a StateSpaceModel for PredictionPenalty, got {type(model).__name__}: use ELBO")
        draws = [call.q.nodes["z"]["value"] for call in weights.calls]
        errors = torch.stack([model.prediction_error(z, *args, **kwargs) for z in draws])
        return -self.weight * weights.scale * errors.flatten(0, -2).mean(0).sum()
