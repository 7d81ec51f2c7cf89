"""Data sets, their records, and the one form in which data reach a model.

`load_dataset` gives a `Dataset` of three `Split`s and the `Schema` of it; `read` gives other data in a schema's units;
`as_data` turns what a user passes to `fit` or `evaluate` into `Data`.
"""

from __future__ import annotations

from .containers import Data, Dataset, Split, as_data, columns_of, joined, like_columns, rows_of, spans_of, tensor_of
from .loading import load_again, load_dataset, read
from .schema import Choice, Column, Schema, SchemaWarning
from .tables import save_table

__all__ = [
    "Choice",
    "Column",
    "Data",
    "Dataset",
    "Schema",
    "SchemaWarning",
    "Split",
    "as_data",
    "columns_of",
    "joined",
    "like_columns",
    "load_again",
    "load_dataset",
    "read",
    "rows_of",
    "save_table",
    "spans_of",
    "tensor_of",
]
