"""The user's pair of programs, which measurements leave as it is."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from ..compiled import preserved
from ..evaluation import of_the_library
from ..log_weights import structure_of
from ..svi import modules_of


@contextlib.contextmanager
def surroundings(seed: int, device: torch.device) -> Iterator[None]:
    """Gradients, seeded draws and no validation of every step, on a device; all as before when it ends."""
    states = random.getstate(), np.random.get_state()
    with (
        of_the_library(device),
        torch.enable_grad(),
        torch.random.fork_rng(),
        pyro.validation_enabled(False),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Encountered", UserWarning)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class Pair:
    """Copies of a pair, each as the pair is now, once it has made what programs make at their first run.

    What functions hold is not copied: parameters in Pyro's store, and those of modules that they close over. These are
    put back.

    Raises:
        ValueError: not all sites are in one plate of data.
    """

    def __init__(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> None:
        store = pyro.get_param_store()
        self.programs = _deep_copy((model, guide))
        state = store.get_state()
        self.state = _without(state, model, guide)
        with store.scope(self.state), torch.no_grad(), poutine.block():
            self.structure = structure_of(self.programs[0], self.programs[1], args, kwargs)
            with preserved(), poutine.trace(param_only=True) as captured:
                trace = poutine.trace(self.programs[1]).get_trace(*args, **kwargs)
                poutine.replay(self.programs[0], trace)(*args, **kwargs)
            tensors = [site["value"].unconstrained() for site in captured.trace.nodes.values()]
        self.state = _without(self.state, *self.programs)
        for name in self.structure.global_sites:
            raise ValueError(
                f'expected every site inside the plate of data, got "{name}" outside: its weight belongs to no single '
                "datum"
            )
        if self.structure.plate is None:
            raise ValueError(
                "expected a plate of independent data that holds an observed and a latent site, got none: put the data "
                "into pyro.plate"
            )
        of_modules = {id(p) for module in modules_in(*self.programs) for p in module.parameters()}
        unique = {id(tensor): tensor for tensor in tensors if id(tensor) not in of_modules}
        self.others = [(tensor, tensor.detach().clone(), tensor.grad) for tensor in unique.values()]

    @contextlib.contextmanager
    def copied(self) -> Iterator[tuple[Any, Any]]:
        """Model and guide, in train mode, and a parameter store of their own."""
        programs = _deep_copy(self.programs)
        for module in modules_in(*programs):
            module.train()
        state = {name: dict(table) for name, table in self.state.items()}
        for tensor, *_ in self.others:
            tensor.grad = None
        try:
            with pyro.get_param_store().scope(state):
                yield programs
        finally:
            with torch.no_grad():
                for tensor, value, gradient in self.others:
                    tensor.copy_(value)
                    tensor.grad = gradient


def modules_in(*programs: Any) -> list[nn.Module]:
    return [*modules_of(**{str(i): program for i, program in enumerate(programs)}).values()]


def _without(state: Any, *programs: Any) -> dict[str, dict[str, Any]]:
    """The parameter store's state, without what belongs to modules."""
    own = {id(p) for module in modules_in(*programs) for p in module.parameters()}
    names = [name for name, value in state["params"].items() if id(value) not in own]
    return {part: {name: state[part][name] for name in names} for part in ("params", "constraints")}


def _deep_copy(programs: Any) -> Any:
    """Guides may keep traces, whose tensors are results: such are copied as values."""
    original = Tensor.__deepcopy__

    def of_values(self: Tensor, memo: dict[int, Any]) -> Any:
        if self.is_leaf or id(self) in memo:
            return original(self, memo)
        memo[id(self)] = self.detach().clone()
        return memo[id(self)]

    with mock.patch.object(Tensor, "__deepcopy__", of_values):
        return copy.deepcopy(programs)


def derived_seed(*parts: int) -> int:
    return functools.reduce(lambda a, b: a * 1_000_003 + b, parts) % 2**63
