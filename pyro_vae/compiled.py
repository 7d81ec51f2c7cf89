"""`Compiled`: a function that runs Pyro programs, recorded below the handlers and replayed as one compiled graph."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import functools
import itertools
import logging
import operator
import random
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer.util import Dice
from pyro.poutine import runtime
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .guards import (
    Guards,
    NotStaticError,
    Scalar,
    Walk,
    get_value,
    is_library,
    no_run_but,
    place_of,
    restore,
    set_by_each_run,
    stable,
    walk,
    watched,
)
from .scan import compiler

__all__ = ["Compiled", "FallbackWarning", "get_random_state", "keep_freed_memory", "set_random_state"]

MAX_VARIANTS = 16
MAX_SEEN_ONCE = 64
NUM_MOVES = 8
_requires_grad = operator.attrgetter("requires_grad")
_hook_lists = operator.attrgetter("_backward_hooks", "_post_accumulate_grad_hooks")
PACKAGE = Path(__file__).parent
PYRO, TORCH = (Path(str(module.__file__)).parent for module in (pyro, torch))
FLOATS = (float, np.floating)
LEAVES = (Tensor, *Scalar)
NUMPY = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64}
OF_TORCH = ("artifact generation failed, cannot save", "No CUDA runtime is found")
TINY_KERNEL = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(float* x) { at::vec::Vectorized<float>::loadu(x).store(x); }
"""
PURE_HANDLERS = (
    poutine.block_messenger.BlockMessenger,
    poutine.condition_messenger.ConditionMessenger,
    poutine.do_messenger.DoMessenger,
    poutine.mask_messenger.MaskMessenger,
    poutine.scale_messenger.ScaleMessenger,
)


def keep_freed_memory() -> bool:
    """Have the C library keep what tensors on the CPU free, up to 32 MB each, for those of the next step.

    Otherwise it hands pages back to the system after each step, and the next one waits for as many new ones. It is for
    the whole process and for good; `pyro-vae fit` calls it, a library would not. Returns whether there is such a
    setting: it is glibc's ``mallopt``.

    Example:
        >>> import sys
        >>> keep_freed_memory() or sys.platform != "linux"
        True
    """
    trim_threshold, mmap_threshold = -1, -3  # of glibc's malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(mmap_threshold, 2**25))


class FallbackWarning(UserWarning):
    """A program runs eagerly, at the speed of `pyro.infer.SVI`; the message says why, and the mend."""


@contextlib.contextmanager
def _steps_compiled() -> Iterator[None]:
    """Each `scan` is one operator in the graph, and not all its steps."""
    token = compiler.set(lambda graph, tensors: _compile(graph, tensors))
    try:
        yield
    finally:
        compiler.reset(token)


class NotNowError(Exception):
    """There is no graph for this call: its signature is new, or the function is not to be recorded this time."""


class Compiled:
    """``function(*args, **kwargs)``, a pytree of tensors, as one compiled graph per signature.

    A signature is the shapes, types and devices of the tensors among the arguments, the values of the others (a float
    enters as a tensor), the handlers around the call, and the Python state that the function, `programs` and what
    `roots` gives read: attributes, closures, globals. A place whose tensor is another at the next call enters like an
    argument from then on, and one whose float changes twice. The first signature is compiled at its first call, others
    at their second. What cannot be recorded runs eagerly, and `fallback_reason` says why. At calls 1, 2, 4 ... a graph
    is held against the function itself, run with the same draws.

    From the same random state a replay gives what the function gives, up to rounding. Random state, buffers and the
    parameter store are after a recording what they were before.

    Example:
        >>> double = Compiled(lambda x: 2 * x)
        >>> double(torch.ones(3)), double.compiled
        (tensor([2., 2., 2.]), True)
    """

    def __init__(
        self,
        function: Callable,
        *programs: Any,
        places: Sequence[tuple[Any, Any]] = (),
        roots: Callable[[], Sequence[Any]] = tuple,
    ) -> None:
        self.function = function
        self.programs = (function, *programs)
        self.places = places
        self.roots = roots
        self.fallback_reason: str | None = None
        self.seconds = 0.0  # spent on recording and compiling
        self._recordings: dict[Hashable, list[_Recording]] = {}
        self._seen: set[Hashable] = set()
        self._moving: list[Place] = []  # whose values enter like arguments
        self._changed: set[Hashable] = set()  # the places of floats that have changed once
        self._by_value: set[Hashable] = set()  # those on which the structure depends

    @property
    def compiled(self) -> bool:
        return self.fallback_reason is None and bool(self._recordings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        problem = None
        try:
            return self.replay(*args, **kwargs)
        except NotNowError:
            pass
        except NotStaticError as error:
            problem = error
        results = self.function(*args, **kwargs)
        if problem is not None:  # and not the program's own
            self.fall_back(str(problem))
        return results

    def replay(self, *args: Any, **kwargs: Any) -> Any:
        """The results by a graph, or nothing has happened.

        Raises:
            NotNowError: there is none now. NotStaticError: there can be none; `fall_back` is due.
        """
        if self.fallback_reason is None:
            found = self._find(args, kwargs)
            if found is not None:
                recording, leaves = found
                return recording.replay(leaves)
        raise NotNowError

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Compile for arguments like these now, not at their second call."""
        if self.fallback_reason is None:
            try:
                self._find(args, kwargs, now=True)
            except NotStaticError as error:
                self.fall_back(str(error))

    def fall_back(self, reason: str) -> None:
        """Run eagerly from now on."""
        self._recordings.clear()
        self.fallback_reason = reason
        frames = (frame for frame, _ in traceback.walk_stack(sys._getframe()))
        inner = itertools.takewhile(lambda frame: Path(frame.f_code.co_filename).parent == PACKAGE, frames)
        warnings.warn(f"running eagerly: {reason}", FallbackWarning, stacklevel=1 + len(list(inner)))

    def _find(self, args: Any, kwargs: Any, now: bool = False) -> tuple[_Recording, list[Any]] | None:
        """The recording for these arguments, made where it is due or to be made `now`, and the leaves of its call."""
        leaves, key = _signature(self._moving, args, kwargs)
        for recording in self._recordings.get(key, ()):
            if recording.holds():
                return recording, leaves
        if now:
            self._seen.add(key)
        if self._recordings and key not in self._seen:
            if len(self._seen) == MAX_SEEN_ONCE:
                raise NotStaticError(
                    f"{MAX_SEEN_ONCE} signatures have come, as an argument, or a handler around the step, is new each "
                    "time. Mend: hand over numbers as floats or tensors, and make handlers and optimisers once"
                )
            self._seen.add(key)
            return None
        if key in self._recordings and (further := self._found_moving(self._recordings[key][-1])):
            moving = [*self._moving, *further]
            leaves_then, key_then = _signature(moving, args, kwargs)
            try:
                recording = self._record(moving, leaves_then, args, kwargs)
            except NotStaticError:  # the structure may depend on a float among them
                self._by_value |= {place_of(*place) for place in further}
            else:
                self._moving, self._recordings = moving, {key_then: [recording]}
                self._seen.add(key_then)
                return recording, leaves_then
        if sum(map(len, self._recordings.values())) == MAX_VARIANTS:
            alike = self._recordings.get(key)
            change = alike[-1].guards.difference() if alike else None
            raise NotStaticError(
                f"{MAX_VARIANTS} graphs have been compiled, and {change or 'another signature came'}. Mend: pad the "
                "data to a few shapes, and hand over what changes from step to step as float or tensor arguments"
            )
        self._recordings.setdefault(key, []).append(recording := self._record(self._moving, leaves, args, kwargs))
        return recording, leaves

    def _found_moving(self, last: _Recording) -> list[Place]:
        """The places that another tensor has come to, or another float again, since the last recording."""
        found = []
        for container, key, before, now in last.guards.differences():
            if type(before) is not type(now) or not _can_move(container, before) or not _can_move(container, now):
                continue
            place = place_of(container, key)
            if place in self._by_value:
                continue
            if isinstance(now, FLOATS) and place not in self._changed:
                self._changed.add(place)
            else:
                found.append((container, key))
        return found

    def _record(self, moving: Sequence[Place], leaves: Sequence[Any], args: Any, kwargs: Any) -> _Recording:
        begin = time.monotonic()
        try:
            objects = [leaf for leaf in leaves if not isinstance(leaf, (*Scalar, Tensor))]
            programs = (*self.programs, *objects, *self.roots())
            return _Recording(self.function, programs, self.places, moving, leaves, args, kwargs)
        finally:
            self.seconds += time.monotonic() - begin


Place = tuple[Any, Any]  # container and key


def _can_move(container: Any, value: Any) -> bool:
    """Whether a value may enter like an argument: a float, a tensor without gradient, or a batch of such."""
    if isinstance(container, tuple) or not hasattr(container, "__setitem__"):
        return False
    if isinstance(value, FLOATS):
        return True
    leaves: list[Any] = []
    if isinstance(value, Tensor | tuple | list | dict) or _fields(value) is not None:
        with contextlib.suppress(NotStaticError):
            _tree_key(value, leaves)
            return any(isinstance(leaf, Tensor) for leaf in leaves)
    return False


def _signature(moving: Sequence[Place], args: Any, kwargs: Any) -> tuple[list[Any], Hashable]:
    """The leaves, in pytree's order, and what a graph for them depends on."""
    leaves: list[Any] = []
    casts = [torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in ("cpu", "cuda")]
    surroundings = (torch.is_grad_enabled(), torch.get_default_dtype(), *casts)
    handlers = tuple(map(_handler_key, runtime._PYRO_STACK))
    values = [get_value(*place) for place in moving]
    return leaves, (surroundings, handlers, *(_tree_key(tree, leaves) for tree in (values, args, kwargs)))


def _tree_key(tree: Any, leaves: list[Any]) -> Hashable:
    """The key of a tree, whose leaves are appended; quicker for the common kinds than pytree's own walk."""
    kind = type(tree)
    if kind is tuple or kind is list:
        return kind, *[_tree_key(item, leaves) for item in tree]
    if kind is dict:
        return kind, *[(name, _tree_key(item, leaves)) for name, item in tree.items()]
    if isinstance(tree, LEAVES):
        leaves.append(tree)
        return _leaf_key(tree)
    fields = _fields(tree)
    if fields is not None:
        return kind, *[(name, _tree_key(item, leaves)) for name, item in fields.items()]
    if pytree.tree_is_leaf(tree):
        leaves.append(tree)
        return _leaf_key(tree)
    items, structure = pytree.tree_flatten(tree)
    return structure, *[_tree_key(item, leaves) for item in items]


def _builder(tree: Any) -> Callable[[Iterator[Any]], Any]:
    """What makes a tree like this of other leaves, in the order of `_tree_key`."""
    kind = type(tree)
    if kind is tuple or kind is list:
        parts = [*map(_builder, tree)]
        return lambda rest: kind([part(rest) for part in parts])
    if kind is dict:
        named = {name: _builder(item) for name, item in tree.items()}
        return lambda rest: {name: part(rest) for name, part in named.items()}
    fields = None if isinstance(tree, (Tensor, *Scalar)) else _fields(tree)
    if fields is not None:
        empty, named = copy.copy(tree), {name: _builder(item) for name, item in fields.items()}
        for name in named:
            object.__setattr__(empty, name, None)

        def build(rest: Iterator[Any]) -> Any:
            made = copy.copy(empty)
            for name, part in named.items():
                object.__setattr__(made, name, part(rest))
            return made

        return build
    if isinstance(tree, Tensor) or pytree.tree_is_leaf(tree):
        return next
    items, structure = pytree.tree_flatten(tree)
    parts = [*map(_builder, items)]
    return lambda rest: pytree.tree_unflatten([part(rest) for part in parts], structure)


def _fields(value: Any) -> dict[str, Any] | None:
    """The attributes of a batch: an object that holds tensors and numbers, and nothing else but containers of them."""
    kind = type(value)
    if is_library(kind.__module__) or isinstance(value, type) or callable(value):
        return None
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    else:
        fields = getattr(value, "__dict__", {})
    leaves = pytree.tree_leaves(fields)
    holds = any(isinstance(leaf, Tensor) for leaf in leaves)
    return fields if holds and all(isinstance(leaf, (Tensor, *Scalar)) for leaf in leaves) else None


def _leaf_key(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        if leaf.layout is not torch.strided or leaf.requires_grad:
            problem = "requires gradients" if leaf.requires_grad else "is not strided"
            raise NotStaticError(f"a tensor argument {problem}. Mend: detach() it or make it a parameter; to_dense()")
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.is_neg(), leaf.is_conj()
    if isinstance(leaf, FLOATS):
        return float
    if hasattr(leaf, "__dict__") and not isinstance(leaf, Scalar):
        return type(leaf), id(leaf)  # a recording keeps it alive
    try:
        hash(leaf)
    except TypeError:
        raise NotStaticError(
            f"an argument is a {type(leaf).__name__}, whose value cannot be compared. Mend: hand over a tensor"
        ) from None
    return type(leaf), leaf


def _handler_key(handler: Any) -> Hashable:
    if not isinstance(handler, PURE_HANDLERS):
        raise NotStaticError(
            f"{type(handler).__name__} around the step would see no sites of a compiled one. Mend: use it inside the "
            "model or the guide"
        )
    return type(handler), tuple((key, _identity(value)) for key, value in vars(handler).items())


def _identity(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple((key, _identity(item)) for key, item in value.items())
    return value if isinstance(value, Scalar) else id(value)


class _Recording:
    """One graph: the function's tensor operations for one signature, on its arguments and on live tensors."""

    def __init__(
        self,
        function: Callable,
        programs: Sequence[Any],
        places: Sequence[Place],
        moving: Sequence[Place],
        leaves: Sequence[Any],
        args: Any,
        kwargs: Any,
    ) -> None:
        self.function, self.moving = function, moving
        self.build = _builder(([get_value(*place) for place in moving], args, kwargs))
        self.leaves = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        self.handlers = [dict(vars(handler)) for handler in runtime._PYRO_STACK]  # kept alive: their ids are in the key
        self.calls = 0
        self.written: list[Place] = []
        self.read = _Read()
        dtypes = [leaf.dtype for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        self.float_dtype = functools.reduce(torch.promote_types, dtypes, torch.get_default_dtype())
        self.device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))
        if self.device.type == "cpu":
            _wake_compiler()
        store = pyro.get_param_store()
        parameters = {*store._params}
        before: Walk | None = None
        try:
            before = walk(programs, places)
            if before.acting:
                raise NotStaticError(
                    f"the program can reach {before.acting[0]}, which acts outside of it when it is used. Mend: use it "
                    "between the steps, and hand over what it gives as an argument"
                )
            with preserved():
                with watched() as heard:
                    self._evaluate(leaves)  # makes what programs make at their first run
                if heard:
                    raise NotStaticError(does_say(heard))
                first = walk(programs, places)
                states = [first.entries]
                was = {place_of(*entry[:2]): entry[2] for entry in before.entries}
                self.written = [
                    (container, key)
                    for container, key, value in states[0]
                    if was.get(place_of(container, key)) is not value and _is_set(container, key)
                ]
                graphs = []
                for _ in range(2):
                    graphs.append(self._record(leaves))
                    states.append(walk(programs, places).entries)
            moved = {place_of(*place) for place in moving}
            entries = [entry for entry in stable(states) if place_of(*entry[:2]) not in moved]
            set_each_time = {place_of(*entry[:2]): entry for entry in set_by_each_run(states)}
            self.kept = [place_of(*place) in set_each_time for place in self.written]
            for place in (set_each_time.keys() & first.of_users) - {place_of(*place) for place in self.written}:
                raise no_run_but(set_each_time[place])
            self.graph, self.live = _lifted(graphs)
            hooks = [hook for tensor in self.live for part in _hook_lists(tensor) for hook in (part or {}).values()]
            known = {place_of(*entry[:2]) for entry in first.entries}
            of_hooks = [entry for entry in walk(hooks).entries if place_of(*entry[:2]) not in known]
            self.guards = Guards([*entries, *of_hooks])
            self.compute = _compile(self.graph, [*self._tensors(leaves), *self.live])
            self._compare(leaves, self.compute, self.graph, 1e-3, "the compiled graph and the recorded one differ")
            if all(tensor.is_cuda for tensor in (*self._tensors(leaves), *self.live)):
                self.compute = _cuda_graph(self.compute, self._tensors(leaves), self.live)
        except Exception as error:
            if before is not None:
                before.restore()
            for name in {*store._params} - parameters:
                del store[name]  # the program's own run makes it, from its own draws
            if isinstance(error, (NotStaticError, NotNowError)):
                raise
            raise NotStaticError(_reason(error)) from error
        self._put_back(before)
        self.tensors_were = self._tensors_are()
        self.specifications = self._specifications()
        self.read.begin()

    def _put_back(self, before: Walk) -> None:
        """What each run of the program sets, as it was before the recording."""
        written = {place_of(*place) for place, is_set in zip(self.written, self.kept, strict=True) if is_set}
        restore([entry for entry in before.entries if place_of(*entry[:2]) in written])

    def holds(self) -> bool:
        """Whether the program reads what it read when it was recorded, values of tensors apart."""
        if (now := self._tensors_are()) != self.tensors_were:
            if self._specifications() != self.specifications:
                return False
            self.tensors_were = now
        return self.read.holds() and self.guards.hold()

    def _tensors_are(self) -> list[Any]:
        """What changes when a live tensor becomes another in place: quick to find."""
        live = self.live
        places = [*map(Tensor.data_ptr, live), *map(Tensor.size, live), *map(Tensor.stride, live)]
        hooks = [*map(_hook_lists, live)]
        if hooks.count((None, None)) < len(hooks):
            hooks = [*map(_hooks, live)]
        return [*places, *map(_requires_grad, live), *hooks]

    def _specifications(self) -> list[Any]:
        return [(*_form(tensor), tensor.requires_grad, _hooks(tensor)) for tensor in self.live]

    def replay(self, leaves: Sequence[Any]) -> Any:
        self.calls += 1
        if self.calls & (self.calls - 1) == 0:
            self._compare(
                leaves,
                self.compute,
                lambda *_: self._evaluate(leaves),
                1e4 * self._epsilon(),
                f"at call {self.calls} of its graph the program gives other numbers than the graph: something that is "
                "no tensor argument, parameter or buffer changes between calls. Mend: hand it over as an argument",
            )
        with torch.no_grad():
            results = self.compute(*self._tensors(leaves), *self.live)
        if self.written:
            rest = iter(results[self.num_results :])
            for (container, key), structure, is_set in zip(self.written, self.trees, self.kept, strict=True):
                value = pytree.tree_unflatten([next(rest) for _ in range(structure.num_leaves)], structure)
                if is_set:
                    container[key] = value
            results = results[: self.num_results]
        return tuple(results) if self.plain else pytree.tree_unflatten(self._filled(results), self.outputs)

    def _epsilon(self) -> float:
        """Of the least precise numbers that the graph computes with."""
        values = [node.meta.get("val") for node in self.graph.graph.nodes]
        dtypes = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.ndim}
        return max(torch.finfo(dtype).eps for dtype in dtypes or {self.float_dtype})

    def _tensors(self, leaves: Sequence[Any]) -> list[Tensor]:
        return [
            leaf
            if isinstance(leaf, Tensor)
            else torch.full((), float(leaf), dtype=self.float_dtype, device=self.device)
            for leaf in leaves
            if isinstance(leaf, (Tensor, *FLOATS))
        ]

    def _run(self, leaves: Sequence[Any]) -> Any:
        values, args, kwargs = self.build(iter(leaves))
        were = [get_value(*place) for place in self.moving]
        try:
            for (container, key), value, was in zip(self.moving, values, were, strict=True):
                if value is not was:
                    container[key] = value
            return self.function(*args, **kwargs)
        finally:
            for (container, key), value, was in zip(self.moving, values, were, strict=True):
                if value is not was:
                    container[key] = was

    def _evaluate(self, leaves: Sequence[Any]) -> list[Any]:
        """The function itself, run eagerly."""
        results = pytree.tree_leaves(self._run(leaves))
        return [*results, *pytree.tree_leaves([get_value(*place) for place in self.written if _is_set(*place)])]

    def _compared(self, values: Sequence[Any]) -> list[Any]:
        """The results of a run without what places hold that the program leaves alone."""
        sizes = [structure.num_leaves for structure in self.trees]
        begins = itertools.accumulate(sizes, initial=len(values) - sum(sizes))
        left = {
            i for b, size, kept in zip(begins, sizes, self.kept, strict=False) if not kept for i in range(b, b + size)
        }
        return [value for i, value in enumerate(values) if i not in left]

    def _record(self, leaves: Sequence[Any]) -> GraphModule:
        def function(*tensors: Tensor) -> list[Tensor]:
            rest = iter(tensors)
            given = [next(rest) if isinstance(leaf, (Tensor, *FLOATS)) else leaf for leaf in leaves]
            results, self.outputs = pytree.tree_flatten(self._run(given))
            self.fixed = [None if isinstance(result, Tensor) else (result,) for result in results]
            self.plain = self.outputs == pytree.tree_structure((*results,)) and not any(self.fixed)
            tensors_of = [result for result in results if isinstance(result, Tensor)]
            trees = [pytree.tree_flatten(get_value(*place) if _is_set(*place) else ()) for place in self.written]
            self.num_results, self.trees = len(tensors_of), [structure for _, structure in trees]
            return [*tensors_of, *(tensor.detach() for values, _ in trees for tensor in values)]

        one_for_all = torch._guards.TracingContext(FakeTensorMode())  # else make_fx builds one for each operation
        with _recordable(self.read), torch._guards.tracing(one_for_all), _steps_compiled():
            apart = [tensor.detach() for tensor in self._tensors(leaves)]  # from what the program reads elsewhere
            return _owning(make_fx(function)(*apart))

    def _filled(self, results: Sequence[Tensor]) -> list[Any]:
        rest = iter(results)
        return [next(rest) if fixed is None else fixed[0] for fixed in self.fixed]

    def _compare(
        self, leaves: Sequence[Any], actual: Callable, expected: Callable, tolerance: float, complaint: str
    ) -> None:
        """Both from the same random state and buffers; raise where they differ by more than rounding: by more than a
        tolerance, and more than the expected ones do when each parameter moves by about its own rounding, which shows
        where a kink, as of a ReLU, or a long recurrence is left to rounding.
        """
        tensors = [*self._tensors(leaves), *self.live]

        def evaluated(compute: Callable, seed: int | None = None) -> tuple[list[Tensor], Tensor]:
            needs_gradients = torch.is_grad_enabled() and compute not in (self.compute, self.graph)
            with preserved(*tensors), torch.set_grad_enabled(needs_gradients):
                if seed is not None:
                    _move(self.live, seed)
                values = self._compared(compute(*tensors))
                return [v.detach().clone() for v in values if isinstance(v, Tensor)], torch.get_rng_state()

        (found, state), (results, expected_state) = evaluated(actual), evaluated(expected)
        if not torch.equal(state, expected_state):
            raise NotStaticError(
                f"{complaint}: it draws other random numbers. Mend: no random state of its own, as checkpoint() of a "
                "network with dropout has"
            )
        norms = [value.double().nan_to_num().norm() for value in results]
        differences = [*map(_distance, found, results)]
        most = [tolerance * (norm + 1e-3 * max(norms)) for norm in norms]
        for seed in range(NUM_MOVES if any(map(operator.gt, differences, most)) else 0):
            with contextlib.suppress(Exception):  # of a program that takes no other numbers
                moved, _ = evaluated(expected, seed)
                by_rounding = map(_distance, moved, results)
                most = [max(a, 2 * b) for a, b in zip(most, by_rounding, strict=True)]
        for difference, allowed, norm in zip(differences, most, norms, strict=True):
            if difference > allowed:
                raise NotStaticError(f"{complaint} (by {difference:.3g} of {norm:.3g})")


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Infinite where not the same elements are finite."""
    difference = (a.double() - b.double()).nan_to_num().norm()
    return difference if bool((a.isfinite() == b.isfinite()).all()) else torch.full_like(difference, torch.inf)


def _move(tensors: Sequence[Tensor], seed: int) -> None:
    """Each number of the parameters among them by up to four of its roundings."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            if tensor.requires_grad:
                by = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.5
                tensor.mul_((1 + 8 * torch.finfo(tensor.dtype).eps * by).to(tensor))


def _hooks(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tuple(part or ()) for part in _hook_lists(tensor))


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _is_view(function: Any) -> bool:
    schema = getattr(function, "_schema", None)  # operators of higher order have none
    return function is operator.getitem or (schema is not None and any(result.alias_info for result in schema.returns))


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill its memory, each in a place of its own."""
    dimensions = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    places = itertools.accumulate((size for _, size in dimensions), operator.mul, initial=1)
    return all(stride == place for (stride, _), place in zip(dimensions, places, strict=False))


def _owning(graph: GraphModule) -> GraphModule:
    """The graph with results that share memory neither with each other nor with what it reads."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    results, used = [], set()
    for result in output.args[0]:
        base = result
        while base.op == "call_function" and _is_view(base.target):
            base = base.args[0]
        if base in used or base.op != "call_function" or not _is_dense(result.meta["val"]):
            with graph.graph.inserting_before(output):
                result = graph.graph.call_function(
                    torch.ops.aten.clone.default, (result,), {"memory_format": torch.contiguous_format}
                )
        used.add(base)
        results.append(result)
    output.args = (results,)
    graph.recompile()
    return graph


def _compile(graph: GraphModule, tensors: Sequence[Tensor]) -> Callable:
    try:
        try:
            return _inductor(graph, tensors)
        except Exception as error:
            if not isinstance(getattr(error, "inner_exception", None), ImportError):
                raise
            with torch._inductor.utils.fresh_cache():  # the shared one holds what a killed process has half-written
                return _inductor(graph, tensors)
    except Exception as error:
        if not _compiler_works():
            raise NotStaticError(
                "torch finds no working C++ compiler. Mend: install one, such as g++, and set TORCHINDUCTOR_CACHE_DIR, "
                "if at all, to a path without spaces, which torch's call of it does not take"
            ) from error
        raise NotStaticError(
            f"torch cannot compile the program's graph: {type(error).__name__}: {_first_line(error)}. Mend: none here; "
            "other versions of torch may"
        ) from error


def _inductor(graph: GraphModule, tensors: Sequence[Tensor]) -> Callable:
    with torch.no_grad(), torch._inductor.config.patch(fallback_random=True), _quiet(), warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # of torch about itself, which -W error makes failures
            warnings.simplefilter("ignore", category)
        return torch._inductor.standalone_compile(graph, list(tensors), dynamic_shapes="from_example_inputs")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of itself while it compiles, of which nothing is for a user to do."""
    loggers = [logging.getLogger(name) for name in ("torch._inductor.standalone_compile", "torch.utils.cpp_extension")]

    def passes(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in OF_TORCH)

    for logger in loggers:
        logger.addFilter(passes)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(passes)


def _cuda_graph(compute: Callable, given: Sequence[Tensor], live: Sequence[Tensor]) -> Callable:
    """All kernels in one launch, with fresh random numbers at each; arguments are copied to where it reads them."""
    buffers = [tensor.detach().clone() for tensor in given]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), preserved(*live):
        with torch.cuda.stream(stream):
            for _ in range(3):  # what libraries allocate at their first call must not be captured
                compute(*buffers, *live)
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        results = compute(*buffers, *live)

    def replay(*tensors: Tensor) -> list[Any]:
        for buffer, tensor in zip(buffers, tensors, strict=False):  # live tensors follow
            buffer.copy_(tensor)
        graph.replay()
        return [result.clone() if isinstance(result, Tensor) else result for result in results]

    return replay


@functools.cache
def _wake_compiler() -> None:
    """Compile a tiny kernel beside the recording: torch probes a C++ compiler at its first, for seconds."""

    def compile() -> None:
        with contextlib.suppress(Exception), _quiet():  # which the graph's own kernels meet too, and name
            CppPythonBindingsCodeCache.load_pybinding(["float*"], TINY_KERNEL)

    with contextlib.suppress(Exception), _quiet():
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        threading.Thread(target=compile, daemon=True).start()


@functools.cache
def _compiler_works() -> bool:
    """Whether a trivial graph compiles."""
    tensor = torch.ones(2)
    try:
        _inductor(make_fx(torch.exp)(tensor), [tensor])
    except Exception:
        return False
    return True


def does_say(heard: Sequence[str]) -> str:
    return (
        f"the program prints or logs {heard[0].splitlines()[0][:60]!r}, which no compiled step would do. Mend: print "
        "and log between the steps"
    )


def _is_set(container: Any, key: Any) -> bool:
    """Whether a place holds tensors that a graph's results may take the place of."""
    leaves = pytree.tree_leaves(get_value(container, key))
    computed = (isinstance(leaf, Tensor) and not (leaf.is_leaf and leaf.requires_grad) for leaf in leaves)
    return hasattr(container, "__setitem__") and any(computed) and all(isinstance(leaf, Tensor) for leaf in leaves)


class _Read:
    """The tensors whose values a recording has read on the host: they are numbers in the graph."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.versions: list[tuple[int, bytes]] = []

    def note(self, tensor: Tensor) -> bool:
        """Whether the value may be read: it follows from no parameter."""
        sources = _sources(tensor)
        if any(source.requires_grad for source in sources):
            return False
        self.tensors += [s for s in sources if not any(s is known for known in self.tensors)]
        return True

    def begin(self) -> None:
        self.versions = [*map(_state, self.tensors)]

    def holds(self) -> bool:
        return [*map(_state, self.tensors)] == self.versions


def _state(tensor: Tensor) -> tuple[int, bytes]:
    """What tells that a tensor has changed. A write through ``.data`` raises no version: few numbers are compared."""
    few = tensor.device.type == "cpu" and tensor.numel() <= 16 and tensor.dtype in NUMPY
    return tensor._version, tensor.detach().numpy().tobytes() if few else b""


def _sources(tensor: Tensor) -> list[Tensor]:
    """The tensors of before the recording that this one follows from, itself if it is one."""
    mode: Any = proxy_tensor.get_proxy_mode()
    found: Any = proxy_tensor.get_proxy_slot(tensor, mode.tracer, None) if mode is not None else None
    if found is None:
        return [tensor]
    if found.constant is None:  # a read of it is an error anyway
        return []
    sources: dict[Any, Tensor | None] = {}
    nodes = [found.proxy.node]
    while nodes:
        node = nodes.pop()
        if node not in sources:
            value = getattr(mode.tracer.root, node.target) if node.op == "get_attr" else None
            sources[node] = value if isinstance(value, Tensor) else None
            nodes += node.all_input_nodes
    return [value for value in sources.values() if value is not None]


HOST_READS = (Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__, Tensor.tolist, Tensor.numpy)


class _HostReads(TorchFunctionMode):
    """``item()`` of a recorded tensor is the tensor itself, detached; leaving torch otherwise is an error.

    TraceEnum_ELBO leaves out terms of probability zero: here they are summed as zeros.
    """

    def __init__(self, read: _Read) -> None:
        super().__init__()
        self.read = read

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.item:
            if not self.read.note(args[0]):
                return args[0].detach()
            try:
                return function(*args)
            except RuntimeError:
                return args[0].detach()
        if function in HOST_READS and not self.read.note(args[0]):
            raise RuntimeError("_local_scalar_dense of what follows from a parameter")
        if function in (Tensor.numpy, Tensor.tolist, Tensor.__array__) and args[0].numel():
            torch.ops.aten._local_scalar_dense(args[0].detach().flatten()[0])
        if function is torch.nn.functional.one_hot:
            classes = args[1] if len(args) > 1 else (kwargs or {}).get("num_classes", -1)
            if classes > 0:  # without the check of values
                return (args[0][..., None] == torch.arange(classes, device=args[0].device)).long()
        if function in (Tensor.all, Tensor.masked_select) and _called_by(Dice.compute_expectation):
            return False if function is Tensor.all else args[0].where(args[1], 0.0).flatten()
        return function(*args, **(kwargs or {}))


def _called_by(function: Any) -> bool:
    frames = itertools.islice(traceback.walk_stack(sys._getframe(2)), 4)
    return any(frame.f_code is function.__code__ for frame, _ in frames)


@contextlib.contextmanager
def _recordable(read: _Read | None = None) -> Iterator[None]:
    """Without checks of values, which read them on the host, and with less work for each node."""
    with (
        pyro.validation_enabled(False),
        mock.patch("pyro.util.torch_isnan", lambda value: False),
        mock.patch("torch.distributions.Distribution._validate_sample", lambda self, value: None),
        _forms_made_once(),
        _HostReads(read or _Read()),
    ):
        yield


@contextlib.contextmanager
def _forms_made_once() -> Iterator[None]:
    """The fake tensor that tells the form of a node's value is one for all nodes of this form, as one for each takes a
    sixth of a recording and more: nothing but forms is read of them, and the compiler makes its own."""
    made: dict[Any, Any] = {}
    make = proxy_tensor.extract_val

    def known(value: Any, *args: Any, **kwargs: Any) -> Any:
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
            return make(value, *args, **kwargs)
        if (form := _form(value)) not in made:
            made[form] = make(value, *args, **kwargs)
        return made[form]

    with mock.patch.object(proxy_tensor, "extract_val", known):
        yield


class _PlainRecurrent(TorchFunctionMode):
    """An LSTM not by mkldnn, whose own is for no dispatch mode."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        enabled = torch._C._get_mkldnn_enabled()
        if function is torch.lstm:
            torch._C._set_mkldnn_enabled(False)
        try:
            return function(*args, **(kwargs or {}))
        finally:
            if function is torch.lstm:
                torch._C._set_mkldnn_enabled(enabled)


class _Preserved(TorchDispatchMode):
    """Keeps a copy of every tensor that is not of its own time before an operation first writes into it."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.before = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self.kept = {id(tensor) for tensor in tensors}
        self.created: set[int] = set()
        self.generators: dict[torch.Generator, Tensor] = {}  # of the program's own

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written, draws, makes = _effects(function)
        if draws:
            for generator in (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)):
                if generator not in self.generators:
                    self.generators[generator] = generator.get_state()
        for index, name in written:
            value = args[index] if index < len(args) else kwargs.get(name)
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, Tensor) and id(tensor) not in self.kept and self._old(tensor):
                    self.before.append((tensor, tensor.clone()))
                    self.kept.add(id(tensor))
        results = function(*args, **kwargs)
        if makes:
            leaves = [results] if isinstance(results, Tensor) else pytree.tree_leaves(results)
            self.created.update(leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor))
        return results

    def _old(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata not in self.created


@functools.cache
def _effects(function: Any) -> tuple[list[tuple[int, str]], bool, bool]:
    """Of an operator: the arguments that it writes into, by index and name; whether it takes a generator; and whether
    its results are new tensors."""
    undeclared = ("running_mean", "running_var")  # in batch norm
    arguments = function._schema.arguments
    written = [(i, a.name) for i, a in enumerate(arguments) if a.is_write or a.name in undeclared]
    makes = function is torch.ops.aten.lift_fresh.default or not any(r.alias_info for r in function._schema.returns)
    return written, any("Generator" in str(a.type) for a in arguments), makes


@contextlib.contextmanager
def preserved(*tensors: Tensor) -> Iterator[None]:
    """Random state (torch's, NumPy's, Python's) and all tensors of before the block are after it what they were.

    Name the `tensors` that a compiled graph may write into, which no dispatch mode sees.
    """
    random_state, mode = get_random_state(), _Preserved(tensors)
    others = random.getstate(), np.random.get_state()
    try:
        with mode, _PlainRecurrent():
            yield
    finally:
        set_random_state(random_state)
        for generator, state in mode.generators.items():
            generator.set_state(state)
        random.setstate(others[0])
        np.random.set_state(others[1])
        with torch.no_grad():
            for tensor, before in reversed(mode.before):
                if not torch.equal(tensor, before):
                    tensor.copy_(before)


def _lifted(graphs: Sequence[GraphModule]) -> tuple[GraphModule, list[Tensor]]:
    """The graph with the tensors that are the same objects in both recordings as further inputs, and these tensors."""
    first, second = graphs
    lines = [
        [f"{n.op} {n.target} {n.args} {n.kwargs}" for n in graph.graph.nodes if n.op != "placeholder"]
        for graph in graphs
    ]
    for a, b in itertools.zip_longest(*lines, fillvalue="nothing"):
        if a != b:
            raise NotStaticError(
                f"two runs of the program differ in structure or in a number, {a[:200]!r} and then {b[:200]!r}. Mend: "
                "no control flow on drawn values or counters; hand over numbers that change as arguments"
            )
    nodes: dict[str, Any] = {}
    start = next(node for node in first.graph.nodes if node.op != "placeholder")
    for node in [node for node in first.graph.nodes if node.op == "get_attr"]:
        a, b = getattr(first, node.target), getattr(second, node.target)
        if isinstance(a, torch.Generator):
            raise NotStaticError("the program draws from a torch.Generator of its own. Mend: torch.manual_seed")
        if a is b:
            if node.target not in nodes:
                with first.graph.inserting_before(start):
                    nodes[node.target] = first.graph.placeholder(f"live{node.target}")
            node.replace_all_uses_with(nodes[node.target])
        elif not isinstance(a, Tensor) or not torch.equal(a, b):
            raise NotStaticError(
                f"a constant of the program is {a} in one run and {b} in the next. Mend: hand it over as an argument"
            )
    live = [getattr(first, name) for name in nodes]
    first.graph.eliminate_dead_code()
    first.recompile()
    return first, live


def _reason(error: Exception) -> str:
    """What stopped the recording, and in which line of the program."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if TORCH not in Path(f.filename).parents]
    programs = [f for f in frames if not {PACKAGE, PYRO} & set(Path(f.filename).parents)]
    frame = [*frames, *programs][-1]
    where = f"at {frame.filename}:{frame.lineno}, {frame.line!r}"
    if "_local_scalar_dense" in str(error):
        return (
            f"the program reads the value of a tensor on the host {where}, so that its structure may depend on it. "
            "Mend: torch.where, masks and tensor arithmetic in the place of if, float() and numpy"
        )
    problem = f"{type(error).__name__}: {_first_line(error)}"
    return f"the program cannot be recorded {where}: {problem}. Mend: tensor operations that torch.compile takes"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def get_random_state() -> dict[str, Any]:
    """The state of torch's generators on the CPU and, where CUDA is in use, on each device."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
