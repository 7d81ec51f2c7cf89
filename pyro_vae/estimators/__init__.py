"""Estimators, objectives of Pyro's form: ``loss(model, guide, *data)`` is minus a bound in nats, summed over data.

Each is a *bound*, a function of K log-weights ``ln w_k = ln p(x, z_k) - ln q(z_k | x)``, and a *gradient*, which may be
another than the bound's own: two choices. `pyro.infer.SVI`, `CompiledSVI` and `fit` take them as ``loss``.
"""

from __future__ import annotations

from .base import Coefficients, Estimator
from .bounds import CIWAE, ELBO, IWAE, MIWAE, PIWAE, STL, VIMCO, BetaELBO, DReG, FreeBits, Renyi, ScoreFunction
from .constrained import ConstrainedELBO, Constraint, MutualInformation, Rate, Reconstruction
from .semi_supervised import SemiSupervisedELBO
from .sequences import PredictionPenalty
from .wake_sleep import ReweightedWakeSleep, WakeSleep

__all__ = [
    "CIWAE",
    "ELBO",
    "IWAE",
    "MIWAE",
    "PIWAE",
    "STL",
    "VIMCO",
    "BetaELBO",
    "Coefficients",
    "ConstrainedELBO",
    "Constraint",
    "DReG",
    "Estimator",
    "FreeBits",
    "MutualInformation",
    "Rate",
    "Reconstruction",
    "Renyi",
    "PredictionPenalty",
    "ReweightedWakeSleep",
    "ScoreFunction",
    "SemiSupervisedELBO",
    "WakeSleep",
]
