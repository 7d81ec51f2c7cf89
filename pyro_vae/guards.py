"""The Python state that programs read: where they keep numbers, tensors and objects, and what is there."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import types
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.trace_messenger import TraceHandler
from torch import Tensor, nn

__all__ = ["Entry", "NotStaticError", "Scalar", "holds", "python_state", "restore", "stable"]

MAX_GUARDS = 5_000
LIBRARIES = {"torch", "pyro", "pyro_vae", "numpy", *sys.stdlib_module_names}
Scalar = (int, float, complex, str, bytes, types.NoneType, torch.dtype, torch.device, torch.Size)


class NotStaticError(Exception):
    """The program cannot be recorded as one graph."""


_MISSING = object()
Entry = tuple[Any, Any, Any]  # container, key, value
_MODULE_KEYS = {"training", "_parameters", "_buffers", "_modules"}
_ENTERED = (nn.Module, ELBO, poutine.messenger.Messenger, TraceHandler, argparse.Namespace, types.SimpleNamespace)


def python_state(roots: Sequence[Any], places: Sequence[tuple[Any, Any]] = ()) -> list[Entry]:
    """Where the roots, and what they refer to, keep numbers, tensors and objects, and what is there now.

    `places` are pairs of a container and a key, whose values are roots too.
    """
    entries: list[Entry] = []
    seen: set[int] = set()
    standard = vars(nn.Module()).keys() - _MODULE_KEYS

    def visit(value: Any) -> None:
        if id(value) in seen or isinstance(value, (*Scalar, Tensor, types.ModuleType)) or len(entries) > MAX_GUARDS:
            return
        seen.add(id(value))
        if isinstance(value, types.MethodType):
            visit_all([value.__self__, value.__func__])
        elif isinstance(value, functools.partial):
            visit_all([value.func, *value.args, *value.keywords.values()])
        elif isinstance(value, property):
            visit_all([value.fget])
        elif isinstance(value, staticmethod | classmethod):
            visit(value.__func__)
        elif isinstance(value, types.FunctionType):
            visit_function(value)
        elif isinstance(value, dict):
            for key in list(value)[:1000]:
                add(value, key)
        elif isinstance(value, list | tuple):
            for index in range(min(1000, len(value))):
                add(value, index)
        elif isinstance(value, type):
            visit_class(value)
        elif hasattr(value, "__dict__"):
            if not _library(type(value).__module__) or isinstance(value, _ENTERED):
                skipped = standard if isinstance(value, nn.Module) else ()
                for key in [key for key in vars(value) if key not in skipped]:
                    add(vars(value), key)
                add(_Size(vars(value)), 0)
                for key in _MODULE_KEYS & vars(value).keys() - {"training"}:
                    add(_Size(vars(value)[key]), 0)
            visit_class(type(value))

    def visit_function(function: types.FunctionType) -> None:
        if _library(function.__module__):
            return
        for cell in function.__closure__ or ():
            add(_Cell(cell), 0)
            sized(_get(_Cell(cell), 0))
        visit_names(_names(function.__code__), function.__globals__)
        visit_all([*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), vars(function)])

    def visit_names(names: set[str], namespace: dict[str, Any]) -> None:
        for name in names & namespace.keys():
            add(namespace, name)
            sized(namespace[name])
            module = namespace[name]
            if isinstance(module, types.ModuleType) and not _library(module.__name__) and id(module) not in seen:
                seen.add(id(module))
                visit_names(names, vars(module))

    def visit_class(kind: type) -> None:
        for base in kind.__mro__:
            if not _library(base.__module__):
                for key, member in list(vars(base).items()):
                    if not key.startswith("__") or isinstance(member, types.FunctionType):
                        add(_Class(base), key)

    def visit_all(values: Sequence[Any]) -> None:
        for value in values:
            visit(value)

    def sized(value: Any) -> None:
        if isinstance(value, list | dict):
            add(_Size(value), 0)

    def add(container: Any, key: Any) -> None:
        value = _get(container, key)
        if not isinstance(container, tuple):
            entries.append((container, key, value))
        visit(value)

    visit_all(roots)
    for container, key in places:
        add(container, key)
    return entries


def restore(state: Sequence[Entry]) -> None:
    """Put back what a program has changed since."""
    for container, key, value in state:
        if value is not _MISSING and not _same(_get(container, key), value):
            with contextlib.suppress(TypeError):  # a class's, or a size
                container[key] = value


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
    entries = []
    later = [{_place(container, key): value for container, key, value in state} for state in states[1:]]
    for container, key, value in states[0]:
        values = [value, *(state.get(_place(container, key), _MISSING) for state in later)]
        if all(_same(value, other) for other in values):
            entries.append((container, key, value))
        elif all(isinstance(other, Scalar) for other in values) and not isinstance(container, _Size):
            raise NotStaticError(
                f"the number {key!r} changes as the program runs ({', '.join(map(repr, values))}). Mend: hand it over "
                "as an argument of the step"
            )
    return entries


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
    inner = getattr(container, "inner", container)
    return type(container), id(inner), key


def _get(container: Any, key: Any) -> Any:
    try:
        return container[key]
    except (LookupError, ValueError):
        return _MISSING


class _Cell:
    """A closure's variable as a container."""

    def __init__(self, cell: types.CellType) -> None:
        self.inner = cell

    def __getitem__(self, key: int) -> Any:
        return self.inner.cell_contents

    def __setitem__(self, key: int, value: Any) -> None:
        self.inner.cell_contents = value


class _Class:
    """A class's own members."""

    def __init__(self, kind: type) -> None:
        self.inner = kind

    def __getitem__(self, key: str) -> Any:
        return vars(self.inner)[key]


class _Size:
    """The number of a container's items as its one item."""

    def __init__(self, container: Any) -> None:
        self.inner = container

    def __getitem__(self, key: int) -> int:
        return len(self.inner)


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, Scalar) and type(a) is type(b) and a == b)
