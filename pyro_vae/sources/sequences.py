"""Named data sets of sequences, and simulated ones whose latents are known."""

from __future__ import annotations

import csv
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import Source, download_file, first_line

__all__ = ["cut_series", "polyphonic", "simulated", "sp500"]


def polyphonic(name: str, noun: str) -> Callable[[Path, bool], Source]:
    """Splits of sequences of chords, tuples of MIDI numbers from 21 to 108 (Boulanger-Lewandowski et al. 2012)."""

    def load(root: Path, download: bool) -> Source:
        path = root / name / f"{name}.pickle"
        if download and not path.is_file():
            from pyro.contrib.examples import polyphonic_data_loader

            download_file(getattr(polyphonic_data_loader, name.upper()).url, path)
        if not path.is_file():
            raise FileNotFoundError(
                f"expected {path.name} in {path.parent}, got no such file: pass download=True (--data.download), or "
                f"root= (--data.root, or PYRO_VAE_DATA) the folder that holds {name}/"
            )
        try:
            with path.open("rb") as file:
                splits = _Chords(file, encoding="latin1").load()
            songs = [song for split in ("train", "valid", "test") for song in splits[split]]
            lengths = torch.tensor([len(song) for song in songs])
            x = torch.zeros(len(songs), int(lengths.max()), 88, dtype=torch.uint8)
            for i, song in enumerate(songs):
                for t, chord in enumerate(song):
                    x[i, t, [note - 21 for note in chord]] = 1
        except Exception as error:
            raise ValueError(
                f"expected sequences of chords in {path}, got a truncated or foreign file ({first_line(error)}): "
                "delete it and pass download=True"
            ) from error
        sizes = len(splits["train"]), len(splits["valid"]), len(splits["test"])
        order = torch.arange(len(songs))
        return Source(x, lengths=lengths, sizes=sizes, order=order, noun=noun, values="88 keys pressed or not")

    return load


class _Chords(pickle.Unpickler):
    """Reads numbers, strings and their lists alone: NumPy's whole numbers by a function of this module."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "scalar" and module.endswith("multiarray"):
            return lambda dtype, raw: int.from_bytes(raw.encode("latin1"), "little", signed=True)
        if (module, name) == ("numpy", "dtype"):
            return _Integer
        raise pickle.UnpicklingError(f"{module}.{name} is no number")


class _Integer:
    """In the place of ``numpy.dtype("i8")``."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


_SP500_DAYS = 63  # a quarter of a year's trading


def sp500(root: Path, download: bool) -> Source:
    path = root / "sp500" / "SP500.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f"expected SP500.csv in {path.parent}, got no such file: put it there, a column VALUE of daily log returns "
            "in percent, or pass root= (--data.root, or PYRO_VAE_DATA) the folder that holds sp500/"
        )
    try:
        with path.open(newline="", encoding="utf-8") as file:
            returns = np.array([float(row["VALUE"]) for row in csv.DictReader(file)])
        if len(returns) < 1000 or not np.isfinite(returns).all():
            raise ValueError(f"{len(returns)} returns")
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"expected a column VALUE of daily returns in {path}, got a truncated or foreign file "
            f"({first_line(error)}): replace it"
        ) from error
    x, lengths = cut_series(torch.from_numpy(returns)[:, None], _SP500_DAYS)
    return Source(
        x, lengths=lengths, in_time=True, noun="quarters of the S&P 500, 2006 to 2016", values="daily log returns in %"
    )


def cut_series(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """One series (T, D) in pieces of `size` steps, (N, size, D), the last one padded with zeros; their lengths (N,)."""
    pieces = x.split(size)
    lengths = torch.tensor([len(piece) for piece in pieces])
    return torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True), lengths


# ------------------------------------------------------------ simulated, with the truth


def _linear(state: np.random.RandomState, count: int, steps: int) -> tuple[np.ndarray, ...]:
    """z_1 ~ N(0, 1), z_t ~ N(z_{t-1} + 0.05, 10), x_t ~ N(z_t / 2, 20), variances (arXiv 1609.09869)."""
    return _walk(state, count, steps, lambda z: z + 0.05, 1.0, 10.0, 20.0)


def _nonlinear(state: np.random.RandomState, count: int, steps: int) -> tuple[np.ndarray, ...]:
    """z_1 ~ N(0, 0.01), z_t ~ N(z_{t-1} + 2 sin z_{t-1}, 5), x_t ~ N(z_t / 2, 5), variances (arXiv 1609.09869)."""
    return _walk(state, count, steps, lambda z: 2 * np.sin(z) + z, 0.01, 5.0, 5.0)


def _walk(
    state: np.random.RandomState,
    count: int,
    steps: int,
    mean: Callable[[np.ndarray], np.ndarray],
    first: float,
    of_z: float,
    of_x: float,
) -> tuple[np.ndarray, ...]:
    z = [math.sqrt(first) * state.randn(count, 1)]
    for _ in range(1, steps):
        z.append(mean(z[-1]) + math.sqrt(of_z) * state.randn(count, 1))
    latents = np.stack(z, 1)
    return 0.5 * latents + math.sqrt(of_x) * state.randn(count, steps, 1), latents


def _pendulum(state: np.random.RandomState, count: int, steps: int) -> tuple[np.ndarray, ...]:
    """Angle and velocity z = (a, w) of a damped pendulum that a torque u moves, ten steps a second::

        da/dt = w,  dw/dt = -9.81 sin a - 0.3 w + 5 u + noise,    x = (sin a, cos a) + N(0, 0.05^2)

    u is piecewise constant, uniform on [-1, 1]; midpoint steps.
    """
    pieces = state.uniform(-1, 1, (count, -(-steps // 10), 1))
    u = np.repeat(pieces, 10, axis=1)[:, :steps]
    z = np.stack([state.uniform(-np.pi / 2, np.pi / 2, count), state.randn(count)], -1)

    def rate(z: np.ndarray, u: np.ndarray) -> np.ndarray:
        return np.stack([z[:, 1], -9.81 * np.sin(z[:, 0]) - 0.3 * z[:, 1] + 5 * u], -1)

    found = []
    for t in range(steps):
        for _ in range(5):
            middle = z + 0.01 * rate(z, u[:, t, 0])
            z = z + 0.02 * rate(middle, u[:, t, 0])
        z = z + 0.05 * state.randn(count, 2) * np.array([0.0, 1.0])
        found.append(z)
    latents = np.stack(found, 1)
    x = np.stack([np.sin(latents[..., 0]), np.cos(latents[..., 0])], -1)
    return x + 0.05 * state.randn(*x.shape), latents, u


def _volatility(state: np.random.RandomState, count: int, steps: int) -> tuple[np.ndarray, ...]:
    """Log-variances z_t = 0.97 z_{t-1} + N(0, 0.2^2), from their stationary law; returns x_t ~ N(0, e^{z_t})."""
    z = [0.2 / math.sqrt(1 - 0.97**2) * state.randn(count, 1)]
    for _ in range(1, steps):
        z.append(0.97 * z[-1] + 0.2 * state.randn(count, 1))
    latents = np.stack(z, 1)
    return np.exp(latents / 2) * state.randn(count, steps, 1), latents


_SIMULATED: dict[str, tuple[Callable, tuple[tuple[int, int], ...], str]] = {
    "linear_sequences": (_linear, ((5000, 25), (500, 25), (500, 50)), "random walks seen with noise"),
    "nonlinear_sequences": (_nonlinear, ((5000, 25), (500, 25), (500, 50)), "walks with 2 sin z, seen with noise"),
    "pendulum": (_pendulum, ((800, 100), (100, 100), (100, 100)), "swings of a pendulum that a torque moves"),
    "stochastic_volatility": (_volatility, ((400, 250), (50, 250), (50, 250)), "returns of changing volatility"),
}


def simulated(name: str) -> Callable[[Path, bool], Source]:
    """A data set that is drawn anew from a fixed seed: its splits are draws of one stream, as in arXiv 1609.09869."""

    def load(root: Path, download: bool) -> Source:
        draw, splits, noun = _SIMULATED[name]
        state = np.random.RandomState(1)
        T = max(steps for _, steps in splits)
        parts = [[_padded(each, T) for each in draw(state, count, steps)] for count, steps in splits]
        x, z, *u = (torch.from_numpy(np.concatenate(each)) for each in zip(*parts, strict=True))
        train, valid, test = (count for count, _ in splits)
        return Source(
            x,
            lengths=torch.tensor([steps for count, steps in splits for _ in range(count)]),
            inputs=u[0] if u else None,
            latents=z,
            sizes=(train, valid, test),
            order=torch.arange(len(x)),
            noun=noun,
            values="real values",
            as_they_are=True,
        )

    return load


def _padded(sequences: np.ndarray, T: int) -> np.ndarray:
    return np.pad(sequences, ((0, 0), (0, T - sequences.shape[1]), (0, 0)))
