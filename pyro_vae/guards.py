"""The Python state that programs read: where they keep numbers, tensors and objects, and what is there."""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor, nn

__all__ = ["Entry", "NotStaticError", "Scalar", "holds", "python_state", "stable"]

MAX_GUARDS = 5_000
LIBRARIES = {"torch", "pyro", "pyro_vae", "numpy", *sys.stdlib_module_names}
Scalar = (int, float, complex, str, bytes, types.NoneType, torch.dtype, torch.device, torch.Size)


class NotStaticError(Exception):
    """The program cannot be recorded as one graph."""


_MISSING = object()
Entry = tuple[Any, Any, Any]  # container, key, value
_MODULE_KEYS = {"training", "_parameters", "_buffers", "_modules"}


def python_state(roots: Sequence[Any]) -> list[Entry]:
    """Where the roots, and what they refer to, keep numbers, tensors and objects, and what is there now."""
    entries: list[Entry] = []
    seen: set[int] = set()
    standard = vars(nn.Module()).keys() - _MODULE_KEYS

    def visit(value: Any) -> None:
        if id(value) in seen or isinstance(value, (*Scalar, Tensor, type)) or len(entries) > MAX_GUARDS:
            return
        seen.add(id(value))
        if isinstance(value, types.MethodType):
            visit(value.__self__)
            visit(value.__func__)
        elif isinstance(value, functools.partial):
            visit_all([value.func, *value.args, *value.keywords.values()])
        elif isinstance(value, types.FunctionType):
            if _library(value.__module__):
                return
            for cell in value.__closure__ or ():
                add(_Cell(cell), 0, _get(_Cell(cell), 0))
            names = _names(value.__code__)
            for name in names & value.__globals__.keys():
                target = value.__globals__[name]
                add(value.__globals__, name, target)
                if isinstance(target, types.ModuleType) and not _library(target.__name__):
                    for attribute in names & vars(target).keys():
                        add(vars(target), attribute, vars(target)[attribute])
            visit_all([*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()])
        elif isinstance(value, dict):
            for key in list(value)[:1000]:
                add(value, key, value[key])
        elif isinstance(value, list | tuple):
            for index in range(min(1000, len(value))):
                add(value, index, value[index])
        elif isinstance(value, types.ModuleType):
            return
        elif hasattr(value, "__dict__"):
            ours = not _library(type(value).__module__)
            if ours or isinstance(value, nn.Module | ELBO):
                skipped = standard if isinstance(value, nn.Module) else ()
                for key in [key for key in vars(value) if key not in skipped]:
                    add(vars(value), key, vars(value)[key])
            for kind in type(value).__mro__ if ours else ():
                if not _library(kind.__module__):
                    visit_all([f for f in vars(kind).values() if isinstance(f, types.FunctionType)])

    def visit_all(values: Sequence[Any]) -> None:
        for value in values:
            visit(value)

    def add(container: Any, key: Any, value: Any) -> None:
        if not isinstance(container, tuple):
            entries.append((container, key, value))
        visit(value)

    visit_all(roots)
    return entries


def _library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in LIBRARIES


def _names(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def stable(states: Sequence[list[Entry]]) -> list[Entry]:
    """The entries that the program does not itself change as it runs.

    Raises:
        NotStaticError: a number changes.
    """
    stable = []
    later = [{_place(container, key): value for container, key, value in state} for state in states[1:]]
    for container, key, value in states[0]:
        values = [value, *(state.get(_place(container, key), _MISSING) for state in later)]
        if all(_same(value, other) for other in values):
            stable.append((container, key, value))
        elif all(isinstance(other, Scalar) for other in values):
            with contextlib.suppress(TypeError):
                container[key] = value
            raise NotStaticError(
                f"the number {key!r} changes as the program runs ({', '.join(map(repr, values))}). Mend: hand it over "
                "as an argument of the step"
            )
    return stable


def holds(state: Sequence[Entry]) -> bool:
    """Whether each place holds what it held."""
    try:
        for container, key, value in state:
            now = container[key]
            if now is not value and not _same(now, value):
                return False
    except (LookupError, ValueError):
        return False
    return True


def _place(container: Any, key: Any) -> Hashable:
    return (id(container.cell) if isinstance(container, _Cell) else id(container)), key


def _get(container: Any, key: Any) -> Any:
    try:
        return container[key]
    except (LookupError, ValueError):
        return _MISSING


class _Cell:
    """A closure's variable as a container."""

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def __getitem__(self, key: int) -> Any:
        return self.cell.cell_contents

    def __setitem__(self, key: int, value: Any) -> None:
        self.cell.cell_contents = value


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, Scalar) and type(a) is type(b) and a == b)
