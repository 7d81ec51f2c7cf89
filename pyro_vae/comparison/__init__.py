"""Estimators held against each other on the model at hand."""

from .compare import compare_estimators
from .result import Comparison

__all__ = ["Comparison", "compare_estimators"]
