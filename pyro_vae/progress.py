"""The progress bar of every long call."""

from __future__ import annotations

import sys
import threading
from typing import Any

from tqdm import tqdm

__all__ = ["Bar"]


class Bar(tqdm):
    """tqdm's bar without its effects on the process.

    tqdm makes a lock of multiprocessing, which fixes the start method that the caller may still want to set, and a
    thread that watches the bar. Where stderr is closed, there is nothing to draw on.
    """

    monitor_interval = 0
    _lock = threading.RLock()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | ({"disable": True} if sys.stderr is None else {})))
