"""Inference programs q(z | x)."""

if __name__ == "guides":
    raise ImportError("expected `from pyro_vae import guides`, got `import guides`: this folder is pyro_vae.guides")

from . import families
from .amortized import AmortizedGuide

__all__ = ["AmortizedGuide", "families"]
