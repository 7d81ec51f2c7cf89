"""Generative programs p(x, z)."""

if __name__ == "models":
    raise ImportError("expected `from pyro_vae import models`, got `import models`: this folder is pyro_vae.models")

from . import likelihoods, priors, transitions
from .bayesian import BayesianVAE
from .conditional import ConditionalVAE
from .linear import LinearVAE
from .semi_supervised import SemiSupervisedVAE
from .state_space import DeepMarkovModel, StateSpaceModel
from .vae import VAE

__all__ = [
    "VAE",
    "BayesianVAE",
    "ConditionalVAE",
    "DeepMarkovModel",
    "LinearVAE",
    "SemiSupervisedVAE",
    "StateSpaceModel",
    "likelihoods",
    "priors",
    "transitions",
]
