"""The Python state that programs read: where they keep numbers, tensors and objects, and what is there."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dis
import functools
import io
import itertools
import logging
import operator
import random
import sys
import threading
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.trace_messenger import TraceHandler
from torch import Tensor, nn

__all__ = [
    "Entry",
    "Guards",
    "NotStaticError",
    "Scalar",
    "Walk",
    "get_value",
    "no_run_but",
    "is_library",
    "place_of",
    "restore",
    "set_by_each_run",
    "stable",
    "walk",
    "watched",
]

MAX_GUARDS = 5_000
LIBRARIES = {"torch", "pyro", "pyro_vae", "numpy", *sys.stdlib_module_names}
Scalar = (int, float, complex, str, bytes, types.NoneType, torch.dtype, torch.device, torch.Size)


class NotStaticError(Exception):
    """The program cannot be recorded as one graph."""


_MISSING = object()
_MISSINGS = itertools.repeat(_MISSING)
_item = dict.get  # makes no entry, as a defaultdict's own would
Entry = tuple[Any, Any, Any]  # container, key, value
_CONTAINERS = (list, dict, set, collections.deque, bytearray)
_QUEUES = ("queue", "_queue", "multiprocessing.queues", "multiprocessing.connection", "asyncio.queues", "socket")
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


def walk(roots: Sequence[Any], places: Sequence[tuple[Any, Any]] = ()) -> Walk:
    """Where the roots, and what they refer to, keep numbers, tensors and objects, and what is there now.

    Of an object or class this is what functions that the roots reach name, so that a training loop may keep what it
    likes beside. `places` are pairs of a container and a key, whose values are roots too.
    """
    names: set[str] = set()
    while True:
        found = Walk(frozenset(names))
        for root in roots:
            found.visit(root)
        found.enter_places(places)
        if found.named <= names:
            return found
        names |= found.named


class Walk:
    """A walk over objects, into the attributes of these names alone.

    Attributes:
        entries: where a number, a tensor or an object is kept, and what is there.
        of_users: the places among them that are no library's own.
        acting: what reads or writes outside of the program when it is used, such as an iterator, in words.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self.named: set[str] = set()  # by the functions that were met
        self.entries: list[Entry] = []
        self.of_users: set[Hashable] = set()
        self._in_library = False
        self.acting: list[str] = []
        self.seen: set[int] = set()
        self._contents: dict[int, Callable[[], None]] = {}  # what puts the contents of a container back
        self._at = "an argument"

    def restore(self) -> None:
        """Put back what a program has changed since, as far as it can be put back."""
        restore(self.entries)
        for put_back in self._contents.values():
            put_back()

    def enter_places(self, places: Sequence[tuple[Any, Any]]) -> None:
        for container, key in places:
            self.add(container, key)
        self.of_users -= {place_of(*place) for place in places}

    def visit(self, value: Any) -> None:
        if id(value) in self.seen or isinstance(value, (*Scalar, Tensor)):
            return
        if len(self.entries) > MAX_GUARDS:
            return
        self.seen.add(id(value))
        if kind := _acts(value):
            self.acting.append(f"{self._at}, {kind}")
            return
        if put_back := _generator_state(value):
            self._contents[id(value)] = put_back
            return
        if isinstance(value, functools._lru_cache_wrapper):
            self.visit(value.__wrapped__)
        if isinstance(value, types.ModuleType):
            for name in () if is_library(value.__name__) else self.names & vars(value).keys():
                self.add(vars(value), name, sized=True)
        elif isinstance(value, types.MethodType):
            self.visit_all([value.__self__, value.__func__])
        elif isinstance(value, types.BuiltinMethodType | types.MethodWrapperType):  # as the append of a list
            self.visit_all([value.__self__])
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
        elif isinstance(value, list | tuple | collections.deque):
            for index in range(min(1000, len(value))):
                self.add(value, index, sized=True)
        if isinstance(value, type):
            self.visit_class(value)
        elif isinstance(value, _WALKED):
            pass
        elif hasattr(value, "__dict__"):
            self.visit_object(value)
        for name in _slots(type(value)) & self.names:
            self.add(_Attributes(value), name, sized=True)

    def visit_all(self, values: Sequence[Any]) -> None:
        for value in values:
            self.size(value)
            self.visit(value)

    def visit_object(self, value: Any) -> None:
        attributes = vars(value)
        if is_library(type(value).__module__):
            if not isinstance(value, _LIBRARY_OBJECTS):
                return
            skipped = _MODULE_INTERNALS if isinstance(value, nn.Module) else ()
            keys = [key for key in attributes if key not in skipped]
            was, self._in_library = self._in_library, True
            self.add_object(value, keys)
            self._in_library = was
        else:
            was, self._in_library = self._in_library, False
            self.entries.append((_Attributes(value), "__dict__", attributes))
            keys = [key for key in attributes if key in self.names or key in _MODULE_KEYS]
            for key in self.names - attributes.keys():  # that the instance may get, in the place of its class's
                if any(key in vars(kind) for kind in type(value).__mro__):
                    self.add(attributes, key)
            self.add_object(value, keys)
            self._in_library = was

    def add_object(self, value: Any, keys: Sequence[str]) -> None:
        attributes = vars(value)
        if isinstance(value, nn.Module):
            self.add(attributes, "forward")
            for name in _MODULE_HOOKS:
                self.add(attributes, name, sized=True)
        for key in keys:
            self.add(attributes, key, sized=key in self.names or key in _MODULE_KEYS)
        self.visit_class(type(value))

    def visit_class(self, kind: type) -> None:
        for base in kind.__mro__:
            if not is_library(base.__module__):
                inherited = {name for other in base.__mro__ if is_library(other.__module__) for name in vars(other)}
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
        if is_library(function.__module__):
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            self.add(_Attributes(cell, name), "cell_contents", sized=True)
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
        value = get_value(container, key)
        before, self._at = self._at, _name(container, key)
        if not isinstance(container, tuple):
            self.entries.append((container, key, value))
            if not self._in_library:
                self.of_users.add(place_of(container, key))
        if sized:
            self.size(value)
        self.visit(value)
        self._at = before

    def size(self, value: Any) -> None:
        if isinstance(value, _CONTAINERS):
            self.entries.append((_Size(value), self._at, len(value)))
            if id(value) not in self._contents:
                self._contents[id(value)] = _contents(value)


def _acts(value: Any) -> str | None:
    """Whether a use of the object reads or writes outside of the program, for good: in words."""
    kind = type(value)
    if issubclass(kind, io.IOBase):
        return "a file"
    if kind.__module__ in _QUEUES and not isinstance(value, types.FunctionType | type):
        return f"a {kind.__name__}"
    if "tensorboard" in kind.__module__ and not isinstance(value, types.FunctionType | types.ModuleType | type):
        return f"a {kind.__name__}"
    return "an iterator" if hasattr(kind, "__next__") else None


def _generator_state(value: Any) -> Callable[[], None] | None:
    """What puts a generator of random numbers, of Python or NumPy, back to where it is."""
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def _contents(container: Any) -> Callable[[], None]:
    """What gives a container the items of now, past what a class of the user's own makes of it."""
    kind: Any = next(kind for kind in _CONTAINERS if isinstance(container, kind))
    before = kind.copy(container)

    def put_back() -> None:
        items, known = (kind.items(each) if kind is dict else each for each in (container, before))
        same = container == before if kind is set else all(map(_alike, items, known))
        if kind.__len__(container) != len(before) or not same:
            kind.clear(container)
            (kind.update if kind in (dict, set) else kind.extend)(container, before)

    return put_back


def _alike(a: Any, b: Any) -> bool:
    """The same object, or items of a dictionary that are."""
    return a is b or (type(a) is tuple and type(b) is tuple and len(a) == 2 == len(b) and a[0] is b[0] and a[1] is b[1])


def _slots(kind: type) -> set[str]:
    """The names in ``__slots__`` of classes that are no library's."""
    found: set[str] = set()
    for base in kind.__mro__:
        if "__slots__" in vars(base) and not is_library(base.__module__):
            names = vars(base)["__slots__"]
            found |= {names} if isinstance(names, str) else set(names)
    return found


class _Heard:
    """A stream that notes what this thread writes, and passes it on."""

    def __init__(self, stream: Any, heard: list[str]) -> None:
        self._stream, self._heard, self._thread = stream, heard, threading.get_ident()

    def write(self, text: str) -> Any:
        if text.strip() and threading.get_ident() == self._thread:
            self._heard.append(text.strip())
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """What this thread prints, and logs by other loggers than those of the libraries below, within the block."""
    heard: list[str] = []
    handle, thread = logging.Logger.handle, threading.get_ident()

    def noted(self: logging.Logger, record: logging.LogRecord) -> None:
        if record.thread == thread and not is_library(record.name):
            heard.append(record.getMessage())
        handle(self, record)

    with contextlib.ExitStack() as stack:
        if sys.stdout is not None:
            stack.enter_context(contextlib.redirect_stdout(_Heard(sys.stdout, heard)))
        stack.enter_context(mock.patch.object(logging.Logger, "handle", noted))
        yield heard


def restore(state: Sequence[Entry]) -> None:
    """Put back what a program has changed since, as far as it can be put back."""
    for container, key, value in state:
        if value is not _MISSING and not _same(get_value(container, key), value):
            with contextlib.suppress(Exception):  # a class's members, a size, a list that has become shorter
                container[key] = value


def is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in LIBRARIES


@functools.cache
def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """The global variables and the attributes that code reads or sets, and the modules that it imports."""
    variables, attributes, modules = set(), set(), set()
    reads = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM")
    named = (
        reads if code.co_name in ("__init__", "__post_init__") else (*reads, "STORE_ATTR")
    )  # of an object that is new
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL"):
            variables.add(instruction.argval)
        elif instruction.opname.endswith(named):
            attributes.add(instruction.argval)
        elif instruction.opname == "IMPORT_NAME":
            modules.add(instruction.argval)
    if variables & {"getattr", "setattr", "hasattr", "delattr"}:
        attributes |= {constant for constant in code.co_consts if isinstance(constant, str) and constant.isidentifier()}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _names(constant)
            variables, attributes, modules = variables | inner[0], attributes | inner[1], modules | inner[2]
    return frozenset(variables), frozenset(attributes), frozenset(modules)


def stable(states: Sequence[list[Entry]]) -> list[Entry]:
    """The entries that the program does not itself change as it runs.

    Raises:
        NotStaticError: a number, or the number of a container's items, changes.
    """
    entries = []
    for (container, key, value), values in _over_runs(states):
        if all(_same(value, other) for other in values):
            entries.append((container, key, value))
        elif isinstance(container, _Size) and all(isinstance(other, int) for other in values):
            raise NotStaticError(
                f"the program adds to {key} or takes from it as it runs ({', '.join(map(repr, values))} items), which "
                "no compiled step would do. Mend: keep it outside of the program; for a log, let the program return "
                "nothing and read parameters and losses after the step"
            )
        elif isinstance(container, _Size) or any(other is _MISSING for other in values):
            pass
        elif all(isinstance(other, Scalar) for other in values) or any(isinstance(v, int | float) for v in values):
            shown = ", ".join(f"{value!r:.40}" for value in values)
            raise NotStaticError(
                f"{_name(container, key)} changes as the program runs ({shown}). Mend: "
                "hand it over as an argument of the step, or keep a tensor there"
            )
    return entries


def set_by_each_run(states: Sequence[list[Entry]]) -> Iterator[Entry]:
    """The places in which each run leaves another object, and what the first has left."""
    for entry, values in _over_runs(states):
        if all(map(operator.is_not, values, values[1:])) and not any(isinstance(v, Scalar) for v in values):
            yield entry


def no_run_but(entry: Entry) -> NotStaticError:
    """The error of a program whose each run leaves an object there that no graph makes."""
    container, key, value = entry
    return NotStaticError(
        f"each run of the program sets {_name(container, key)} to another {type(value).__name__}, which no compiled "
        "step would do. Mend: keep tensors there, or what changes no more"
    )


def _over_runs(states: Sequence[list[Entry]]) -> Iterator[tuple[Entry, list[Any]]]:
    """Each entry of the first state, and its value in each."""
    later = [{place_of(container, key): value for container, key, value in state} for state in states[1:]]
    for entry in states[0]:
        yield entry, [entry[2], *(state.get(place_of(*entry[:2]), _MISSING) for state in later)]


class Guards:
    """Whether places still hold what they held. Looked up by loops in C, as this is done at every step."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries = list(
            {place_of(container, key): (container, key, v) for container, key, v in entries}.values()
        )
        self.in_dicts = _transposed([entry for entry in entries if isinstance(entry[0], dict)])
        self.in_lists = _transposed([entry for entry in entries if isinstance(entry[0], list | collections.deque)])
        self.in_classes = _transposed([(vars(c.inner), key, v) for c, key, v in entries if isinstance(c, _Class)])
        self.slots = _transposed([(c.inner, key, value) for c, key, value in entries if isinstance(c, _Attributes)])
        self.sizes = _transposed([(c.inner, key, value) for c, key, value in entries if isinstance(c, _Size)])

    def hold(self) -> bool:
        return self._identical() or all(
            _same(get_value(container, key), value) for container, key, value in self.entries
        )

    def differences(self) -> list[tuple[Any, Any, Any, Any]]:
        """The places that hold another thing: container, key, what was there, what is."""
        found = [(*entry, get_value(*entry[:2])) for entry in self.entries]
        return [each for each in found if not _same(each[2], each[3])]

    def difference(self) -> str | None:
        """The first place that holds another thing, in words."""
        for container, key, value, now in self.differences():
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
        return f"the number of items of {key}"
    return repr(container.name) if key == "cell_contents" else repr(key)


def place_of(container: Any, key: Any) -> Hashable:
    inner = getattr(container, "inner", container)
    return type(container), id(inner), key


def get_value(container: Any, key: Any) -> Any:
    if isinstance(container, dict):
        return _item(container, key, _MISSING)
    try:
        return container[key]
    except (LookupError, ValueError, AttributeError):
        return _MISSING


class _Attributes:
    """What an object keeps beside its ``__dict__``: a cell its value, a function its code and defaults."""

    def __init__(self, inner: Any, name: str | None = None) -> None:
        self.inner, self.name = inner, name

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

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self.inner, key, value)


class _Size:
    """The number of a container's items as its one item."""

    def __init__(self, container: Any) -> None:
        self.inner = container

    def __getitem__(self, key: str) -> int:
        return len(self.inner)


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, Scalar) and type(a) is type(b) and a == b and str(a) == str(b))  # 0.0 is not -0.0
