"""Variational autoencoders as Pyro programs.

A model is a Pyro program p(x, z), a guide is a Pyro program q(z | x), an estimator turns the pair into a
number.
The names below are imported when first used: ``import pyro_vae`` alone imports neither torch nor pyro.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import guides, models
    from .comparison import Comparison, compare_estimators
    from .data import Dataset, Schema, load_dataset, save_table
    from .defaults import defaults_for
    from .evaluation import Evaluation, evaluate
    from .forecasting import Forecast, forecast
    from .svi import SVI, CompiledSVI
    from .training import Run, fit, load_run

    __version__: str

__all__ = [
    "SVI",
    "Comparison",
    "CompiledSVI",
    "Dataset",
    "Evaluation",
    "Forecast",
    "Run",
    "Schema",
    "compare_estimators",
    "defaults_for",
    "evaluate",
    "fit",
    "forecast",
    "guides",
    "load_dataset",
    "load_run",
    "models",
    "save_table",
]

_MODULE_OF = {
    "Comparison": "comparison",
    "compare_estimators": "comparison",
    "Dataset": "data",
    "Schema": "data",
    "load_dataset": "data",
    "save_table": "data",
    "defaults_for": "defaults",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "Forecast": "forecasting",
    "forecast": "forecasting",
    "SVI": "svi",
    "CompiledSVI": "svi",
    "Run": "training",
    "fit": "training",
    "load_run": "training",
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    elif name in __all__:
        value = importlib.import_module(f".{name}", __name__)
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("pyro_vae")
    except importlib.metadata.PackageNotFoundError:  # run straight from the checkout
        import tomllib
        from pathlib import Path

        text = Path(__file__).parent.with_name("pyproject.toml").read_text(encoding="utf-8")
        return tomllib.loads(text)["project"]["version"]
