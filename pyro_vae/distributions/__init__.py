"""What models and guides are both made of: flow transforms, and distributions that Pyro lacks."""

from .autoregressive import autoregressive, coupling
from .markov_chain import MarkovChain, check_masks, is_masked
from .missing import WithMissing
from .transforms import (
    GatedAffineTransform,
    OnePass,
    PlanarTransform,
    RadialTransform,
    SylvesterTransform,
)

__all__ = [
    "GatedAffineTransform",
    "MarkovChain",
    "OnePass",
    "PlanarTransform",
    "RadialTransform",
    "SylvesterTransform",
    "WithMissing",
    "autoregressive",
    "check_masks",
    "coupling",
    "is_masked",
]
