"""What models and guides are both made of: flow transforms, and distributions that Pyro lacks."""

from .autoregressive import autoregressive, coupling
from .constrained import Constrained, Remembered, leaf_of, rearranged, unconstrained
from .folding import Unfolded, folded, mixes_rows, unfolded
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
    "Constrained",
    "GatedAffineTransform",
    "MarkovChain",
    "OnePass",
    "PlanarTransform",
    "RadialTransform",
    "Remembered",
    "SylvesterTransform",
    "Unfolded",
    "WithMissing",
    "autoregressive",
    "check_masks",
    "coupling",
    "folded",
    "is_masked",
    "leaf_of",
    "mixes_rows",
    "rearranged",
    "unconstrained",
    "unfolded",
]
