"""The estimators that are compared, each at every K."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch

from ..estimators import Estimator


class Contestant(NamedTuple):
    name: str
    K: int
    build: Callable[[], Any]

    def make(self) -> Any:
        """A new estimator that shares nothing with others."""
        return copy.deepcopy(self.build())

    def __str__(self) -> str:
        return f"{self.name}, K = {self.K}"


def contestants_of(
    estimators: Mapping[str, Callable[[int], Any]] | Sequence[type], num_particles: Sequence[int]
) -> tuple[list[Contestant], dict[str, str]]:
    """Every estimator at every K that it does not refuse, and why it refuses others."""
    if not isinstance(estimators, Mapping):
        if isinstance(estimators, str) or not isinstance(estimators, Sequence):
            raise ValueError(f"expected a mapping or a list of estimators, got {estimators!r}: as in [IWAE, DReG]")
        estimators = {getattr(each, "__name__", repr(each)): each for each in estimators}
    if not estimators:
        raise ValueError("expected estimators, got none: give some, as in [IWAE, DReG]")
    values = [*num_particles] if isinstance(num_particles, Iterable) else [num_particles]
    if not values or not all(is_whole(K, 1) for K in values):
        raise ValueError(f"expected whole numbers >= 1 as num_particles, got {num_particles}: as in (1, 4, 16)")
    contestants: list[Contestant] = []
    skipped: dict[str, str] = {}
    with torch.random.fork_rng():
        for name, given in estimators.items():
            refusals: list[ValueError] = []
            for K in sorted(set(values)):
                each = Contestant(name, K, functools.partial(_built, name, given, K))
                try:
                    each.build()
                except ValueError as error:
                    refusals.append(error)
                    skipped[str(each)] = str(error)
                else:
                    contestants.append(each)
            if len(refusals) == len(set(values)):
                raise refusals[0]
    return contestants, skipped


def _built(name: str, given: Any, K: int) -> Any:
    if isinstance(given, pyro.infer.ELBO) or not callable(given):
        kind = type(given).__name__
        raise ValueError(
            f'expected a class or a callable from K to an estimator as "{name}", got {kind}: lambda K: {kind}(...)'
        )
    if inspect.isclass(given):
        parameters = inspect.signature(given).parameters
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind not in variadic]
        if {*needed} - {"num_particles"} or "num_particles" not in parameters:
            lacks = f"needs {', '.join(needed)}" if needed else "takes none"
            raise ValueError(
                f"expected classes that need num_particles at most, got {given.__name__}, which {lacks}: give it as "
                f'{{"{name}": lambda K: {given.__name__}(...)}}'
            )
    loss: Any = given(num_particles=K) if inspect.isclass(given) else given(K)  # type: ignore[call-arg]
    if not isinstance(loss, pyro.infer.ELBO):
        raise ValueError(f'expected "{name}" to give a pyro.infer.ELBO, got {type(loss).__name__}: return an estimator')
    return loss


def draws_of(loss: Any) -> int:
    return loss.num_draws if isinstance(loss, Estimator) else loss.num_particles


def check_takes(each: Contestant, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
    try:
        each.make().loss_and_grads(model, guide, *args, **kwargs)
    except (ValueError, NotImplementedError) as error:
        said = f"{error}" if "expected" in str(error) else f"expected a pair that it takes, got {error}: leave it out"
        raise ValueError(f"{each}: {said}") from error


def is_whole(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum
