"""The VAE with labels, some of which are missing, p(y) p(z) p(x | z, y)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from .conditional import ConditionalVAE
from .likelihoods import Likelihood
from .priors import Categorical

__all__ = ["SemiSupervisedVAE"]


class SemiSupervisedVAE(ConditionalVAE):
    """``y ~ Categorical(1/C)``, ``z ~ p(z)``, ``x ~ p(x | decoder(z, y))``: the model M2 (arXiv 1406.5298).

    The label y is one-hot, ``(B, classes)``; without it, ``model(x)``, it is latent. ``AmortizedGuide(model)`` is
    ``q(y | x) q(z | x, y)``: a classifier, and an encoder beside. Train the pair with `SemiSupervisedELBO`, which sums
    y out, on ``(x, y)`` with NaN where a label is missing; ``guide.posterior(x, site="y")`` classifies.

    Example:
        >>> import torch
        >>> from pyro_vae.estimators import SemiSupervisedELBO
        >>> from pyro_vae.guides import AmortizedGuide
        >>> model = SemiSupervisedVAE((4,), classes=3, latent_dim=2)
        >>> guide = AmortizedGuide(model)
        >>> x, y = torch.ones(5, 4), torch.eye(3)[[0, 1, 2, 0, 1]]
        >>> y[2:] = torch.nan
        >>> SemiSupervisedELBO(max_plate_nesting=1).loss(model, guide, x, y) > 0
        True
        >>> guide.posterior(x, site="y").probs.shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        classes: int,
        latent_dim: int | None = None,
        prior: Callable[[], Any] | dist.Distribution | None = None,
        likelihood: Likelihood | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__(event_shape, classes, latent_dim, prior, likelihood, decoder)
        self.label = Categorical(classes)

    def forward(self, x: Tensor | None = None, y: Tensor | None = None, *, num_data: int | None = None) -> Tensor:
        given = next((tensor for tensor in (x, y) if tensor is not None), None)
        if given is None and num_data is None:
            raise ValueError("expected data x, labels y, or num_data=... to draw some, got none")
        if given is not None and num_data not in (None, len(given)):
            raise ValueError(f"expected num_data={len(given)}, as many as are given, got {num_data}: leave it out")
        if y is not None and y.shape[-1:] != (self.covariates,):
            raise ValueError(
                f"expected one-hot labels of shape (B, {self.covariates}), got {y.dtype} of shape {tuple(y.shape)}: "
                f"call torch.nn.functional.one_hot(y, {self.covariates}) where they are numbers of classes"
            )
        with pyro.plate("data", num_data if given is None else len(given)):
            y = pyro.sample("y", self.label(), obs=y)
            return pyro.sample("x", self.observation(self.latent(), y), obs=x)
