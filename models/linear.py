"""Probabilistic principal component analysis: the VAE whose every quantity has a closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import pyro.distributions as dist
import torch
from torch import Tensor

from ..nn import MLP
from .likelihoods import Normal
from .vae import VAE

__all__ = ["LinearVAE", "maximum_log_likelihood"]


class LinearVAE(VAE):
    r"""``z ~ N(0, I_k)``, ``x | z ~ N(W z + mu, s^2 I_D)`` (Tipping and Bishop 1999; arXiv 1911.02469).

    Exactly: ``x ~ N(mu, W W^T + s^2 I)`` and ``z | x ~ N(M^{-1} W^T (x - mu), s^2 M^{-1})``, ``M = W^T W + s^2 I``.

    Example:
        >>> model = LinearVAE((5,), latent_dim=2)
        >>> model.log_evidence(torch.zeros(3, 5)).shape
        torch.Size([3])
    """

    def __init__(self, event_shape: Sequence[int], latent_dim: int = 2) -> None:
        super().__init__(
            event_shape,
            latent_dim,
            likelihood=Normal("shared", minimum_scale=1e-12),
            decoder=MLP(hidden=()),
        )

    @property
    def weight(self) -> Tensor:
        """W, shape ``(D, k)``."""
        return self.decoder.output.weight

    @property
    def mean(self) -> Tensor:
        """mu, shape ``(D,)``."""
        return self.decoder.output.bias

    @property
    def variance(self) -> Tensor:
        """s^2."""
        return (self.likelihood.log_scale.exp() + self.likelihood.minimum_scale).square()

    def log_evidence(self, x: Tensor) -> Tensor:
        """``log p(x)`` in nats, shape ``(N,)``, for x of shape ``(N, *event_shape)``."""
        diagonal = self.variance.expand_as(self.mean)
        return dist.LowRankMultivariateNormal(self.mean, self.weight, diagonal).log_prob(x.flatten(1))

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """``p(z | x)``, batch shape ``(N,)``, event shape ``(k,)``."""
        W = self.weight
        M = W.mT @ W + self.variance * torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
        location = torch.linalg.solve(M, W.mT @ (x.flatten(1) - self.mean).mT).mT
        return dist.MultivariateNormal(location, precision_matrix=M / self.variance)

    @classmethod
    def maximum_likelihood(cls, x: Tensor, latent_dim: int) -> Self:
        """The model that maximises the likelihood of x: ``W = U_k (L_k - s^2 I)^{1/2}``, s^2 the mean of the discarded
        eigenvalues of the 1/N covariance.

        Raises:
            ValueError: latent_dim is not below the number of dimensions.
        """
        mean, eigenvalues, eigenvectors = _principal_components(x, latent_dim)
        variance = eigenvalues[latent_dim:].mean()
        model = cls(x.shape[1:], latent_dim).to(x)
        with torch.no_grad():
            model.mean.copy_(mean)
            model.weight.copy_(eigenvectors[:, :latent_dim] * (eigenvalues[:latent_dim] - variance).clamp(min=0).sqrt())
            model.likelihood.log_scale.copy_((variance.sqrt() - model.likelihood.minimum_scale).log())
        return model


def maximum_log_likelihood(x: Tensor, latent_dim: int) -> Tensor:
    """``max log p(x) / N = -1/2 [D ln 2 pi + sum_{i<=k} ln l_i + (D - k) ln s^2 + D]`` in nats per datum.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> round(maximum_log_likelihood(torch.tensor(load_digits().data), 2).item(), 4)
        -177.44
    """
    _, eigenvalues, _ = _principal_components(x, latent_dim)
    D, kept, discarded = len(eigenvalues), eigenvalues[:latent_dim], eigenvalues[latent_dim:]
    return -0.5 * (D * math.log(2 * math.pi) + kept.log().sum() + len(discarded) * discarded.mean().log() + D)


def _principal_components(x: Tensor, latent_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, and the eigenvalues (falling) and eigenvectors of the 1/N covariance."""
    x = x.flatten(1)
    if not 1 <= latent_dim < x.shape[1]:
        raise ValueError(f"expected 1 <= latent_dim < {x.shape[1]}, the data's dimension, got {latent_dim}")
    mean = x.mean(0)
    eigenvalues, eigenvectors = torch.linalg.eigh((x - mean).mT @ (x - mean) / len(x))
    return mean, eigenvalues.flip(0), eigenvectors.flip(1)
