"""Inference programs q(z | x)."""

if __name__ == "guides":
    raise ImportError("expected `from pyro_vae import guides`, got `import guides`: this folder is pyro_vae.guides")

from . import families, state_space
from .amortized import AmortizedGuide
from .state_space import StateSpaceGuide

__all__ = ["AmortizedGuide", "StateSpaceGuide", "families", "state_space"]
