"""The Python state that programs read: where they keep numbers, tensors and objects, and what is there."""

from __future__ import annotations

import argparse
import contextlib
import dis
import functools
import itertools
import operator
import sys
import types
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.trace_messenger import TraceHandler
from torch import Tensor, nn

__all__ = ["Entry", "Guards", "NotStaticError", "Scalar", "python_state", "restore", "stable"]

MAX_GUARDS = 5_000
LIBRARIES = {"torch", "pyro", "pyro_vae", "numpy", *sys.stdlib_module_names}
Scalar = (int, float, complex, str, bytes, types.NoneType, torch.dtype, torch.device, torch.Size)


class NotStaticError(Exception):
    """The program cannot be recorded as one graph."""


_MISSING = object()
_MISSINGS = itertools.repeat(_MISSING)
_item = dict.get  # makes no entry, as a defaultdict's own would
Entry = tuple[Any, Any, Any]  # container, key, value
_MODULE_KEYS = {"training", "_parameters", "_buffers", "_modules"}
_MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MODULE_INTERNALS = vars(nn.Module()).keys() - _MODULE_KEYS
_WALKED = (
    types.ModuleType,
    types.MethodType,
    types.FunctionType,
    functools.partial,
    property,
    staticmethod,
    classmethod,
)
_LIBRARY_OBJECTS = (
    *(nn.Module, ELBO, poutine.messenger.Messenger, TraceHandler),
    *(torch.distributions.Distribution, torch.distributions.Transform),
    *(argparse.Namespace, types.SimpleNamespace),
)


def python_state(roots: Sequence[Any], places: Sequence[tuple[Any, Any]] = ()) -> list[Entry]:
    """Where the roots, and what they refer to, keep numbers, tensors and objects, and what is there now.

    Of an object or class this is what functions that the roots reach name, so that a training loop may keep what it
    likes beside. `places` are pairs of a container and a key, whose values are roots too.
    """
    names: set[str] = set()
    while True:
        walk = _Walk(frozenset(names))
        for root in roots:
            walk.visit(root)
        for container, key in places:
            walk.add(container, key)
        if walk.named <= names:
            return walk.entries
        names |= walk.named


class _Walk:
    """A walk over objects, into the attributes of these names alone."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self.named: set[str] = set()  # by the functions that were met
        self.entries: list[Entry] = []
        self.seen: set[int] = set()

    def visit(self, value: Any) -> None:
        if id(value) in self.seen or isinstance(value, (*Scalar, Tensor)):
            return
        if len(self.entries) > MAX_GUARDS:
            return
        self.seen.add(id(value))
        if isinstance(value, types.ModuleType):
            for name in () if _library(value.__name__) else self.names & vars(value).keys():
                self.add(vars(value), name, sized=True)
        elif isinstance(value, types.MethodType):
            self.visit_all([value.__self__, value.__func__])
        elif isinstance(value, functools.partial):
            self.visit_all([value.func, *value.args, value.keywords])
        elif isinstance(value, property):
            self.visit(value.fget)
        elif isinstance(value, staticmethod | classmethod):
            self.visit(value.__func__)
        elif isinstance(value, types.FunctionType):
            self.visit_function(value)
        elif isinstance(value, dict):
            for key in list(value)[:1000]:
                self.add(value, key, sized=True)
        elif isinstance(value, list | tuple):
            for index in range(min(1000, len(value))):
                self.add(value, index, sized=True)
        if isinstance(value, type):
            self.visit_class(value)
        elif isinstance(value, _WALKED):
            pass
        elif hasattr(value, "__dict__"):
            self.visit_object(value)

    def visit_all(self, values: Sequence[Any]) -> None:
        for value in values:
            self.size(value)
            self.visit(value)

    def visit_object(self, value: Any) -> None:
        attributes = vars(value)
        if _library(type(value).__module__):
            if not isinstance(value, _LIBRARY_OBJECTS):
                return
            skipped = _MODULE_INTERNALS if isinstance(value, nn.Module) else ()
            keys = [key for key in attributes if key not in skipped]
        else:
            self.entries.append((_Attributes(value), "__dict__", attributes))
            keys = [key for key in attributes if key in self.names or key in _MODULE_KEYS]
            for key in self.names - attributes.keys():  # that the instance may get, in the place of its class's
                if any(key in vars(kind) for kind in type(value).__mro__):
                    self.add(attributes, key)
        if isinstance(value, nn.Module):
            self.add(attributes, "forward")
            for name in _MODULE_HOOKS:
                self.add(attributes, name, sized=True)
        for key in keys:
            self.add(attributes, key, sized=key in self.names or key in _MODULE_KEYS)
        self.visit_class(type(value))

    def visit_class(self, kind: type) -> None:
        for base in kind.__mro__:
            if not _library(base.__module__):
                inherited = {name for other in base.__mro__ if _library(other.__module__) for name in vars(other)}
                for key, member in list(vars(base).items()):
                    special = key.startswith(("__", "_pyro_")) or key in inherited  # which a library may call
                    run_unnamed = key == "forward" or (special and isinstance(member, types.FunctionType))
                    if run_unnamed or key in self.names:
                        self.add(_Class(base), key)
                for key in self.names - vars(base).keys():  # that it may get, in the place of a base's
                    if hasattr(base, key):
                        self.add(_Class(base), key)
            elif base not in (object, nn.Module):
                functions = [member for member in vars(base).values() if isinstance(member, types.FunctionType)]
                self.named = self.named.union(*(_names(function.__code__)[1] for function in functions))

    def visit_function(self, function: types.FunctionType) -> None:
        if _library(function.__module__):
            return
        for cell in function.__closure__ or ():
            self.add(_Attributes(cell), "cell_contents", sized=True)
        for key in ("__code__", "__defaults__", "__kwdefaults__"):
            self.add(_Attributes(function), key, sized=True)
        variables, attributes, modules = _names(function.__code__)
        self.named |= attributes
        for name in variables:  # of a builtin, a global may come to take the place
            self.add(function.__globals__, name, sized=True)
        for name in modules & sys.modules.keys():
            self.visit(sys.modules[name])
        self.visit(vars(function))

    def add(self, container: Any, key: Any, sized: bool = False) -> None:
        value = _get(container, key)
        if not isinstance(container, tuple):
            self.entries.append((container, key, value))
        if sized:
            self.size(value)
        self.visit(value)

    def size(self, value: Any) -> None:
        if isinstance(value, list | dict | set):
            self.entries.append((_Size(value), 0, len(value)))


def restore(state: Sequence[Entry]) -> None:
    """Put back what a program has changed since, as far as it can be put back."""
    for container, key, value in state:
        if value is not _MISSING and not _same(_get(container, key), value):
            with contextlib.suppress(Exception):  # a class's members, a size, a list that has become shorter
                container[key] = value


def _library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in LIBRARIES


@functools.cache
def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """The global variables and the attributes that code reads, and the modules that it imports."""
    variables, attributes, modules = set(), set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            variables.add(instruction.argval)
        elif instruction.opname.endswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM")):
            attributes.add(instruction.argval)
        elif instruction.opname == "IMPORT_NAME":
            modules.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _names(constant)
            variables, attributes, modules = variables | inner[0], attributes | inner[1], modules | inner[2]
    return frozenset(variables), frozenset(attributes), frozenset(modules)


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
                f"{_name(container, key)} changes as the program runs ({', '.join(map(repr, values))}). Mend: hand it "
                "over as an argument of the step"
            )
    return entries


class Guards:
    """Whether places still hold what they held. Looked up by loops in C, as this is done at every step."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries = list(
            {_place(container, key): (container, key, v) for container, key, v in entries}.values()
        )
        self.in_dicts = _transposed([entry for entry in entries if isinstance(entry[0], dict)])
        self.in_lists = _transposed([entry for entry in entries if isinstance(entry[0], list)])
        self.in_classes = _transposed([(vars(c.inner), key, v) for c, key, v in entries if isinstance(c, _Class)])
        self.slots = _transposed([(c.inner, key, value) for c, key, value in entries if isinstance(c, _Attributes)])
        self.sizes = _transposed([(c.inner, key, value) for c, key, value in entries if isinstance(c, _Size)])

    def hold(self) -> bool:
        return self._identical() or all(_same(_get(container, key), value) for container, key, value in self.entries)

    def difference(self) -> str | None:
        """The first place that holds another thing, in words."""
        for container, key, value in self.entries:
            if not _same(now := _get(container, key), value):
                return f"{_name(container, key)} is now {now!r:.80}, not {value!r:.80}"
        return None

    def _identical(self) -> bool:
        get: Any
        try:
            for (places, keys, values), get in ((self.in_lists, operator.getitem), (self.slots, getattr)):
                if not all(map(operator.is_, map(get, places, keys), values)):
                    return False
        except (LookupError, ValueError, AttributeError):  # no such item, an empty cell
            return False
        for (places, keys, values), get in ((self.in_dicts, _item), (self.in_classes, types.MappingProxyType.get)):
            if not all(map(operator.is_, map(get, places, keys, _MISSINGS), values)):
                return False
        sized, _, sizes = self.sizes
        return (*map(len, sized),) == sizes


def _transposed(entries: Sequence[Entry]) -> tuple[Any, Any, Any]:
    containers, keys, values = zip(*entries, strict=True) if entries else ((), (), ())
    return containers, keys, values


def _name(container: Any, key: Any) -> str:
    if isinstance(container, _Size):
        return "the size of a container"
    return "a closure's variable" if key == "cell_contents" else repr(key)


def _place(container: Any, key: Any) -> Hashable:
    inner = getattr(container, "inner", container)
    return type(container), id(inner), key


def _get(container: Any, key: Any) -> Any:
    if isinstance(container, dict):
        return _item(container, key, _MISSING)
    try:
        return container[key]
    except (LookupError, ValueError, AttributeError):
        return _MISSING


class _Attributes:
    """What an object keeps beside its ``__dict__``: a cell its value, a function its code and defaults."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getitem__(self, key: str) -> Any:
        return getattr(self.inner, key)

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self.inner, key, value)


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
    return a is b or (isinstance(a, Scalar) and type(a) is type(b) and a == b and str(a) == str(b))  # 0.0 is not -0.0
