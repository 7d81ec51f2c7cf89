"""Pure functions of the training's progress, for the KL weight and the learning rate.

A schedule is any callable ``schedule(epoch) -> float`` where `epoch` counts passes over the data and may be a fraction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Cosine", "Exponential", "Schedule", "TenfoldDecay", "Warmup"]

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Warmup:
    """From `start` in a straight line to 1 over the first `epochs`, then 1.

    Example:
        >>> [Warmup(10, start=0.5)(epoch) for epoch in (0, 5, 10, 20)]
        [0.5, 0.75, 1.0, 1.0]
        >>> [Warmup(10, start=3.0)(epoch) for epoch in (0, 5, 20)]  # a KL that weighs more at first
        [3.0, 2.0, 1.0]
    """

    epochs: float
    start: float = 1e-3

    def __post_init__(self) -> None:
        _check_positive("epochs", self.epochs)
        _check_positive("start", self.start)

    def __call__(self, epoch: float) -> float:
        return 1.0 - (1.0 - self.start) * max(0.0, 1.0 - epoch / self.epochs)


@dataclass(frozen=True)
class Exponential:
    """``rate ** epoch``.

    Example:
        >>> Exponential(0.5)(2)
        0.25
    """

    rate: float

    def __post_init__(self) -> None:
        _check_positive("rate", self.rate)

    def __call__(self, epoch: float) -> float:
        return self.rate**epoch


@dataclass(frozen=True)
class Cosine:
    """From 1 along half a cosine down to `end` at `epochs`, then `end`.

    Example:
        >>> round(Cosine(10)(5), 3)
        0.5
    """

    epochs: float
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_positive("epochs", self.epochs)

    def __call__(self, epoch: float) -> float:
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * min(1.0, epoch / self.epochs))) / 2


@dataclass(frozen=True)
class TenfoldDecay:
    """1 until `begin`, then falling exponentially to a tenth at `end`.

    Example:
        >>> [round(TenfoldDecay(40, 100)(epoch), 3) for epoch in (0, 40, 70, 100)]
        [1.0, 1.0, 0.316, 0.1]
    """

    begin: float
    end: float

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end:
            raise ValueError(f"expected 0 <= begin < end, got {self.begin} and {self.end}: let it begin before it ends")

    def __call__(self, epoch: float) -> float:
        return 10 ** -min(1.0, max(0.0, (epoch - self.begin) / (self.end - self.begin)))


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"expected {name} > 0, got {value}: give a positive number")
