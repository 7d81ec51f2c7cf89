"""Generative programs p(x, z)."""

if __name__ == "models":
    raise ImportError("expected `from pyro_vae import models`, got `import models`: this folder is pyro_vae.models")

from . import likelihoods, priors
from .conditional import ConditionalVAE
from .linear import LinearVAE
from .vae import VAE

__all__ = ["VAE", "ConditionalVAE", "LinearVAE", "likelihoods", "priors"]
