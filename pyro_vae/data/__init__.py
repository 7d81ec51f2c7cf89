"""Data sets, and the one form in which data reach a model.

`load_dataset` gives a `Dataset` of three `Split`s; `as_data` turns what a user passes to `fit` or `evaluate` into
`Data`.
"""

from __future__ import annotations

from .containers import Data, Dataset, Split, as_data, joined, rows_of
from .loading import load_dataset

__all__ = ["Data", "Dataset", "Split", "as_data", "joined", "load_dataset", "rows_of"]
