"""Time and memory of steps, and what training with a budget of them brings."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import scipy.stats
import torch
from torch import nn

from ..data import Data
from ..optim import Optimizer
from ..svi import SVI, CompiledSVI, NonFiniteLossError
from .bounds import best_log_evidence
from .contestants import Contestant, is_whole
from .memory import peak_memory, settled
from .pair import Pair

ROUNDS = 15  # of timed steps


class Budget(NamedTuple):
    steps: int | None
    seconds: float | None
    seeds: tuple[int, ...]


def budget_of(steps: int | None, seconds: float | None, seeds: Sequence[int]) -> Budget:
    given = tuple(seeds)
    if steps is None and seconds is None:
        return Budget(None, None, ())
    if steps is not None and seconds is not None:
        raise ValueError(f"expected steps or seconds, got {steps} steps and {seconds} seconds: give one of them")
    if steps is not None and not is_whole(steps, 1):
        raise ValueError(f"expected steps >= 1, got {steps}: give a positive whole number")
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"expected seconds > 0, got {seconds}: give a positive number")
    if not given or len(set(given)) < len(given) or not all(is_whole(seed, 0) for seed in given):
        raise ValueError(f"expected different whole numbers >= 0 as seeds, got {seeds}: as in (0, 1, 2)")
    return Budget(steps, seconds, given)


class Steps:
    """A stepper for each contestant, all on one copy of the pair, which each trains from the beginning."""

    def __init__(
        self, pair: Pair, contestants: Sequence[Contestant], batch: Any, optimizer: Optimizer, compile: bool
    ) -> None:
        self.pair, self.contestants, self.batch = pair, contestants, batch
        self.optimizer, self.kind = optimizer, CompiledSVI if compile else SVI
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        args, kwargs = self.batch
        try:
            self.model, self.guide = self.stack.enter_context(self.pair.copied())
            self.svis, self.beginnings = [], []
            for each in self.contestants:
                loss = each.make()
                if isinstance(loss, nn.Module):
                    loss.to(args[0].device).train()
                svi = self.kind(self.model, self.guide, copy.deepcopy(self.optimizer), loss)
                svi.initialize(*args, **kwargs)
                self.svis.append(svi)
                self.beginnings.append(copy.deepcopy(svi.state_dict()))
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *raised: Any) -> None:
        self.stack.close()

    def costs(self, bar: Any) -> list[dict[str, Any]]:
        """Seconds, the contestants taking turns, and memory of a step."""
        args, kwargs = self.batch
        device = args[0].device
        times: list[list[float]] = [[] for _ in self.svis]
        broken: set[int] = set()
        for turn in range(ROUNDS + 2):
            for i, svi in enumerate(self.svis):
                if i in broken:
                    continue
                settled(device)
                begun = time.perf_counter()
                try:
                    svi.step(*args, **kwargs)
                except NonFiniteLossError:
                    broken.add(i)
                settled(device)
                if turn >= 2:  # after what is done at first steps alone
                    times[i].append(time.perf_counter() - begun)
        rows = []
        for i, svi in enumerate(self.svis):
            row: dict[str, Any] = dict.fromkeys(("seconds", "seconds_standard_error", "megabytes"), math.nan)
            row["compiled"] = False
            if i not in broken:
                peak = peak_memory(functools.partial(svi.step, *args, **kwargs), device)
                compiled = isinstance(svi, CompiledSVI) and svi.compiled
                row = {"seconds": statistics.median(times[i]), "seconds_standard_error": _error_of_median(times[i])}
                row |= {"megabytes": peak / 1e6, "compiled": compiled}
            rows.append(row)
            bar.update()
        return rows

    def trained(self, budget: Budget, data: Data, tested: Data, num_samples: int, bar: Any) -> list[dict[str, Any]]:
        """log p(x) of pairs that were trained with the budget."""
        names = (
            *("trained", "trained_standard_error", "trained_low", "trained_high", "trained_steps"),
            *("trained_seconds", "trained_seconds_standard_error"),
        )
        rows = []
        for svi, beginning in zip(self.svis, self.beginnings, strict=True):
            row: dict[str, Any] = {**dict.fromkeys(names, math.nan), "failed": 0}
            ends: list[tuple[float, int, float]] = []
            for seed in budget.seeds:
                svi.load_state_dict(copy.deepcopy(beginning))
                try:
                    steps, seconds = self._train(svi, budget, data, seed)
                except NonFiniteLossError:
                    row["failed"] += 1
                else:
                    score = best_log_evidence(self.model, self.guide, tested, None, num_samples, seed).mean.value
                    ends.append((score, steps, seconds))
                bar.update()
            if ends:
                scores, taken, seconds_taken = zip(*ends, strict=True)
                error = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
                half = scipy.stats.t.ppf(0.975, len(scores) - 1) * error if len(scores) > 1 else math.nan
                mean = statistics.fmean(scores)
                values = (
                    mean,
                    error,
                    mean - half,
                    mean + half,
                    statistics.fmean(taken),
                    statistics.fmean(seconds_taken),
                    statistics.stdev(seconds_taken) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan,
                )
                row |= dict(zip(names, values, strict=True))
            rows.append(row)
        return rows

    def _train(self, svi: SVI, budget: Budget, data: Data, seed: int) -> tuple[int, float]:
        """Steps on whole batches in random order; how many, and in which time."""
        rows = len(self.batch[0][0])
        torch.manual_seed(seed)
        draws = torch.Generator(data.device).manual_seed(int(seed))
        order = torch.Generator().manual_seed(int(seed))
        begun, taken = time.perf_counter(), 0
        while True:
            for index in torch.randperm(len(data), generator=order).to(data.device).split(rows):
                if len(index) < rows:
                    break
                args, kwargs = data.batch(index, draws)
                svi.step_async(*args, **kwargs)
                taken += 1
                if budget.seconds is not None and taken % 10 == 0:
                    svi.settle()
                if taken == budget.steps or time.perf_counter() - begun >= (budget.seconds or math.inf):
                    svi.settle()
                    settled(data.device)
                    return taken, time.perf_counter() - begun


def _error_of_median(times: Sequence[float]) -> float:
    """Its standard error, from the quartiles: sqrt(pi / 2) times that of a mean, were the times normal."""
    low, _, high = statistics.quantiles(times, n=4)
    return math.sqrt(math.pi / 2 / len(times)) * (high - low) / 1.349
