"""`scan`: a recurrence over time, of which a recorded graph holds one operator and not all steps."""

from __future__ import annotations

import functools
import hashlib
import operator
import platform
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.utils import _pytree as pytree

__all__ = ["scan"]

CHUNK = 5  # steps in one compiled call
LARGE = 2**18  # elements of a matrix that is packed for its products with all steps
compiler: ContextVar[Callable[[GraphModule, Sequence[Tensor]], Callable] | None] = ContextVar("compiler", default=None)


def scan(step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, inputs: Any) -> tuple[Any, Any]:
    """``c_t, y_t = step(c_{t-1}, u_t)`` for t = 1 ... T: the last carry, and all y_t.

    Where the call is recorded, as by `CompiledSVI`, steps are compiled `CHUNK` at a time, once for all lengths above
    that. The gradient is that of the recurrence ``c_t = F_t(c_{t-1}, theta)``: with g the gradient of what follows::

        l_t = g_t + (dF_{t+1} / dc_t)^T l_{t+1},        d theta = sum_t (dF_t / dtheta)^T l_t

    The first runs backwards through time; the second is one call for all steps. A step that cannot be taken apart like
    that is unrolled: its draws depend on the carry in another way than by a location and a scale, it carries whole
    numbers or nothing, it writes into tensors that it did not make, or what varies into one that does not.

    Args:
        step: a pure function; what it draws is drawn anew at each step.
        carry: a tree of tensors, whose shapes a step keeps.
        inputs: a tree of tensors (T, ...), T >= 1.

    Returns:
        The carry after the last step, and the tree of y with tensors (T, ...).

    Example:
        >>> total, sums = scan(lambda c, u: (c + u, c + u), torch.zeros(()), torch.arange(4.0))
        >>> total, sums
        (tensor(6.), tensor([0., 1., 3., 6.]))
    """
    leaves = pytree.tree_leaves(inputs)
    if compiler.get() is not None and len(leaves[0]) > 1:
        try:
            return _rolled(step, carry, inputs)
        except _NotSeparableError:
            pass
    ys = []
    for t in range(len(leaves[0])):
        carry, y = step(carry, pytree.tree_map(lambda u, t=t: u[t], inputs))
        ys.append(y)
    return carry, pytree.tree_map(lambda *each: torch.stack(each), *ys)


class _NotSeparableError(Exception):
    """The step writes into what it is given, carries whole numbers or nothing, cannot be made for all steps at once, or
    its draws are not a function of noise that is drawn apart."""


def _rolled(step: Callable, carry: Any, inputs: Any) -> tuple[Any, Any]:
    start, structure = pytree.tree_flatten(carry)
    leaves, of_inputs = pytree.tree_flatten(inputs)
    start, leaves = [c.contiguous() for c in start], [u.contiguous() for u in leaves]  # one layout for all steps
    n = len(start)

    def flat(*tensors: Tensor) -> list[Tensor]:
        given = pytree.tree_unflatten(tensors[:n], structure), pytree.tree_unflatten(tensors[n:], of_inputs)
        c, y = step(*given)
        flat.of_y = pytree.tree_structure(y)  # type: ignore[attr-defined]
        return [*map(Tensor.contiguous, pytree.tree_leaves(c)), *pytree.tree_leaves(y)]

    if not start or not all(c.is_floating_point() for c in start):
        raise _NotSeparableError
    with disable_proxy_modes_tracing(), torch.no_grad():
        examples = [*[c.detach().clone() for c in start], *[u[0].detach().clone() for u in leaves]]
        one = make_fx(flat)(*examples)
        constants = _lift_constants(one)
        taken = _Step.of(one, n, len(leaves), [*examples, *constants])
    with torch.no_grad():
        drawn = torch.ops.pyro_vae.scan(taken.key, start, leaves, constants)
    path, known = drawn[:n], drawn[n:]
    before = [torch.cat([c[None], p[:-1]]) for c, p in zip(start, path, strict=True)]
    results = taken.all_steps([*before, *leaves, *known], constants)
    results = _Adjoint.apply(taken, len(results), *path, *results, *constants)
    c, ys = results[:n], results[n:]
    return (
        pytree.tree_unflatten([each[-1] for each in c], structure),
        pytree.tree_unflatten(ys, flat.of_y),  # type: ignore[attr-defined]
    )


class _Adjoint(torch.autograd.Function):
    """The results of all steps, whose gradients it turns into those of the recurrence."""

    @staticmethod
    def forward(ctx: Any, step: _Step, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        path, results, constants = tensors[: step.n], tensors[step.n : step.n + count], tensors[step.n + count :]
        ctx.step, ctx.num_tensors = step, len(tensors)
        ctx.save_for_backward(*results[step.num_results :], *constants)
        return tuple(each.clone() for each in (*path, *results[step.n : step.num_results]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        n = ctx.step.n
        adjoint = torch.ops.pyro_vae.scan_adjoint(
            ctx.step.key, [*map(Tensor.contiguous, gradients)], [*ctx.saved_tensors]
        )
        found = [*[None] * n, *adjoint, *gradients[n:]]
        return (None, None, *found, *[None] * (ctx.num_tensors - len(found)))


class _Step:
    """One step as graphs.

    `noise` gives its noise. `carried` is a function of (carry, inputs, noise, constants): the next carry, and its
    products with constant matrices, which are most of the work. `full` is one of (carry, inputs, noise, products,
    constants): carry, y and what the gradient needs, for all steps at once. `pull` is that gradient, of the carry: a
    function of what it needs, constants, and the gradients of carry and y. `carried` and `pull` take `matrices` of the
    constants packed, once for all steps.
    """

    table: dict[str, _Step] = {}

    def __init__(
        self, key: str, full: GraphModule, noise: GraphModule, n: int, m: int, examples: Sequence[Tensor]
    ) -> None:
        self.key, self.noise, self.n = key, noise, n
        given = [tensor.detach() for tensor in (*examples[: n + m], *noise(), *examples[n + m :])]
        num_constants = len(examples) - n - m
        self.carried, known = _carry_alone(full, n, num_constants)
        products = self.carried(*given)[n:]
        self.products = [product.to("meta") for product in products]
        self.full, self.pull, self.num_results, self.num_saved = _with_gradient(full, n, given, num_constants, known)
        varying = [each[None] for each in (*given[: len(given) - num_constants], *products)]
        try:
            self.all_steps(varying, examples[n + m :])
        except RuntimeError as error:  # of vmap, as where it writes what varies into what does not
            raise _NotSeparableError from error
        self.matrices = _with_packed_products(self.carried, len(given) - num_constants, examples[n + m :])
        self.matrices_of_pull = _with_packed_products(self.pull, self.num_saved, examples[n + m :])
        self.forward = _Recurrence(self.carried, n)
        self.adjoint = _Recurrence(self._pulled, n, backwards=True)

    @classmethod
    def of(cls, one: GraphModule, n: int, m: int, examples: Sequence[Tensor]) -> _Step:
        full, noise = _without_noise(one, n + m)
        shapes = [f"{tensor.shape} {tensor.stride()} {tensor.dtype} {tensor.device}" for tensor in examples]
        key = hashlib.sha256("\n".join([f"{n} {m}", full.code, noise.code, *shapes]).encode()).hexdigest()
        if key not in cls.table:
            cls.table[key] = cls(key, full, noise, n, m, examples)
        return cls.table[key]

    def all_steps(self, varying: Sequence[Tensor], constants: Sequence[Tensor]) -> list[Tensor]:
        """`full` of carries, inputs, noise and products over time."""
        return torch.vmap(self.full, in_dims=(*[0] * len(varying), *[None] * len(constants)))(*varying, *constants)

    def run(self, start: Sequence[Tensor], inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> list[Tensor]:
        """The carries after each step, the noise, and the products."""
        noise = [torch.stack(each) for each in zip(*[self.noise.forward() for _ in inputs[0]], strict=True)]
        results = self.forward(start, [*inputs, *noise], [*constants, *map(_packed, self.matrices(*constants))])
        return [*results[: self.n], *noise, *results[self.n :]]

    def run_adjoint(self, gradients: Sequence[Tensor], fixed: Sequence[Tensor]) -> list[Tensor]:
        """l_t for the gradients g_t of all carries and results."""
        n, saved, constants = self.n, fixed[: self.num_saved], fixed[self.num_saved :]
        last = [g[-1] for g in gradients[:n]]
        following, here = [each[1:] for each in (*saved, *gradients[n:])], [g[:-1] for g in gradients[:n]]
        packed = [*map(_packed, self.matrices_of_pull(*constants))]
        found = self.adjoint(last, [*following, *here], [*constants, *packed])
        return [torch.cat([each, at[None]]) for each, at in zip(found, last, strict=True)]

    def _pulled(self, *tensors: Tensor) -> list[Tensor]:
        """l_t from l_{t+1}, what the gradient needs and the gradients of y at t + 1, g_t, and constants."""
        n, m, end = self.n, self.n + self.num_saved, self.n + self.num_saved + self.num_results
        later, saved, of_y, of_carry = tensors[:n], tensors[n:m], tensors[m : end - n], tensors[end - n : end]
        pulled = self.pull(*saved, *tensors[end:], *later, *of_y)
        return [g + p for g, p in zip(of_carry, pulled, strict=True)]


class _Recurrence:
    """``c_t, y_t = function(c_{t-1}, v_t, constants)`` of n carries over all t, forwards or backwards, `CHUNK` steps in
    one compiled call."""

    def __init__(self, function: Callable, n: int, *, backwards: bool = False) -> None:
        self.function, self.n, self.backwards = function, n, backwards
        self.compile: Any = compiler.get()
        self.compiled: dict[int, Callable] = {}

    def __call__(self, carry: Sequence[Tensor], varying: Sequence[Tensor], constants: Sequence[Tensor]) -> list[Tensor]:
        """All c_t and y_t, (T, ...). The last chunk overlaps the one before where T is no multiple."""
        T = len(varying[0])
        size = min(CHUNK, T)
        results: list[Tensor] = []
        for begin in (*range(0, T - size, size), T - size):
            if self.backwards:
                begin = T - size - begin
            before = begin + size if self.backwards else begin - 1
            given = [each[before] for each in results[: self.n]] or carry
            tensors = [*given, *[each[begin : begin + size] for each in varying], *constants]
            if size not in self.compiled:
                examples = [torch.empty(t.shape, dtype=t.dtype) if t.is_mkldnn else t.detach() for t in tensors]
                steps = make_fx(partial(self._steps, len(constants)))(*examples)
                with torch._inductor.config.patch(size_asserts=False):  # what is packed has no strides
                    self.compiled[size] = self.compile(steps, examples)
            found = self.compiled[size](*tensors)
            results = results or [each.new_empty(T, *each.shape[1:]) for each in found]
            for whole, part in zip(results, found, strict=True):
                whole[begin : begin + size] = part
        return results

    def _steps(self, num_constants: int, *tensors: Tensor) -> list[Tensor]:
        end = len(tensors) - num_constants
        carry, constants, found = tensors[: self.n], tensors[end:], []
        steps = [*zip(*[each.unbind() for each in tensors[self.n : end]], strict=True)]
        for at in reversed(steps) if self.backwards else steps:
            found.append(self.function(*carry, *at, *constants))
            carry = found[-1][: self.n]
        return [torch.stack(each) for each in zip(*(found[::-1] if self.backwards else found), strict=True)]


def _lift_constants(graph: GraphModule) -> list[Tensor]:
    """Make what the step reads from elsewhere its last inputs; returns these tensors."""
    found: dict[str, Node] = {}
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        if not isinstance(getattr(graph, node.target), Tensor):
            raise _NotSeparableError
        if node.target not in found:
            with graph.graph.inserting_after(last):
                found[node.target] = last = graph.graph.placeholder(f"constant{node.target}")
        node.replace_all_uses_with(found[node.target])
        graph.graph.erase_node(node)
    graph.recompile()
    return [getattr(graph, name) for name in found]


def _without_noise(graph: GraphModule, before: int) -> tuple[GraphModule, GraphModule]:
    """The step as a function of its noise, which follows the first inputs, and the noise as a function of nothing."""
    own = {
        node
        for node in graph.graph.nodes
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    }
    noise = torch.fx.Graph()
    copies: dict[Node, Node] = {}

    def copied(node: Node) -> Node:
        if node.op != "call_function":
            raise _NotSeparableError
        if node not in copies:
            for source in node.all_input_nodes:
                copied(source)
            copies[node] = noise.node_copy(node, lambda source: copies[source])
        return copies[node]

    drawn = [node for node in graph.graph.nodes if node in own]
    noise.output([copied(node) for node in drawn])
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    place = places[before - 1]
    for node in drawn:
        with graph.graph.inserting_after(place):
            place = graph.graph.placeholder(f"noise_{node.name}")
        place.meta = dict(node.meta)
        node.replace_all_uses_with(place)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    if _writes_into({node for node in graph.graph.nodes if node.op == "placeholder"}, graph.graph):
        raise _NotSeparableError
    graph.recompile()
    return graph, GraphModule({}, noise)


def _writes_into(nodes: set[Any], graph: torch.fx.Graph) -> bool:
    """Whether an operation writes into one of these or a view of one."""
    given = {*nodes}
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if not given.intersection(node.all_input_nodes):
            continue
        for argument, value in zip(schema.arguments if schema else (), node.args, strict=False):
            if argument.is_write and given.intersection(value if isinstance(value, list | tuple) else [value]):
                return True
        if node.target is operator.getitem or (schema and any(result.alias_info for result in schema.returns)):
            given.add(node)
    return False


def _carry_alone(full: GraphModule, n: int, num_constants: int) -> tuple[GraphModule, list[int]]:
    """The carry and its products with constant matrices, and which of all products these are."""
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    results: Any = graph.graph_copy(full.graph, copies)
    output = graph.output([*results[:n]])
    graph.eliminate_dead_code()
    left = {*graph.nodes}
    places = [node for node in full.graph.nodes if node.op == "placeholder"]
    fixed = _made_of(places[len(places) - num_constants :], full.graph)
    known, values = [], []
    for i, node in enumerate(_products(full.graph)):
        if copies[node] in left and _is_known(node, fixed):
            with graph.inserting_after(copies[node]):  # a cell may go on to write into its product
                values.append(graph.call_function(torch.ops.aten.clone.default, (copies[node],)))
            known.append(i)
    output.args = ([*results[:n], *values],)
    return GraphModule(full, graph), known


def _with_packed_products(step: GraphModule, first: int, constants: Sequence[Tensor]) -> GraphModule:
    """Have products with large constant matrices take these packed, as inputs after the constants, which begin at
    input `first`; returns the matrices as a function of the constants."""
    graph, nodes = step.graph, [*step.graph.nodes]
    given, after = nodes[first : first + len(constants)], nodes[first + len(constants)]
    fixed = _made_of(given, graph)
    products = [] if _writes_into(fixed, graph) else [node for node in _products(graph) if _is_known(node, fixed)]
    matrices: list[Any] = [*dict.fromkeys(node.args[-1] for node in products)]
    values = _part(step, given, matrices)(*constants)
    matrices = [node for node, value in zip(matrices, values, strict=True) if _is_quicker_packed(value)]
    taken = _part(step, given, matrices)
    with graph.inserting_before(after):
        packed = {node: graph.placeholder(f"packed_{node.name}") for node in matrices}
    for node in products:
        *bias, a, w = cast(tuple[Node, ...], node.args)
        if w in packed:
            with graph.inserting_before(node):
                product = graph.call_function(torch.ops.pyro_vae.packed_product.default, (a, packed[w]))
                if bias:
                    product = graph.call_function(torch.ops.aten.add.Tensor, (product, *bias))
            node.replace_all_uses_with(product)
    graph.eliminate_dead_code()
    step.recompile()
    return taken


def _made_of(constants: Sequence[Node], graph: torch.fx.Graph) -> set[Any]:
    """These nodes, and those that follow from them alone."""
    fixed = {*constants}
    for node in graph.nodes:
        if node.op == "call_function" and fixed.issuperset(node.all_input_nodes):
            fixed.add(node)
    return fixed


def _is_known(node: Node, fixed: set[Any]) -> bool:
    """Whether it is a product of what varies with a fixed matrix, and a fixed bias if any."""
    *bias, a, w = node.args
    return not node.kwargs and a not in fixed and fixed.issuperset([*bias, w])


@functools.cache
def _packs() -> bool:
    return torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")


def _is_quicker_packed(w: Tensor) -> bool:
    return w.device.type == "cpu" and w.dtype == torch.float32 and w.numel() >= LARGE and _packs()


def _packed(w: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(w.mT)


def _products(graph: torch.fx.Graph) -> list[Node]:
    return [node for node in graph.nodes if node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)]


def _known_product(value: Tensor, *operands: Tensor) -> Tensor:
    return _KnownProduct.apply(value, *operands)


class _KnownProduct(torch.autograd.Function):
    """``a w`` or ``b + a w`` where its value is known: only the gradient is to be computed."""

    @staticmethod
    def forward(value: Tensor, *operands: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, *bias, a, w = inputs
        ctx.shapes = [each.shape for each in bias]
        ctx.save_for_backward(a, w)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (g,), (a, w) = gradients, ctx.saved_tensors
        of_w = a.mT @ g if w.is_contiguous() else (g.mT @ a).mT  # in the layout of w
        return None, *[g.sum_to_size(shape) for shape in ctx.shapes], g @ w.mT, of_w

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], value: Tensor, *operands: Tensor) -> tuple[Tensor, int]:
        *bias, a, w = operands
        value, a = value.movedim(in_dims[0], 0), a.movedim(in_dims[-2], 0)
        bias = [each if each.dim() < 2 else each.expand(value.shape).flatten(0, 1) for each in bias]
        flat = _known_product(value.flatten(0, 1), *bias, a.flatten(0, 1), w)
        return flat.unflatten(0, value.shape[:2]), 0


def _with_gradient(
    full: GraphModule, n: int, given: Sequence[Tensor], num_constants: int, known: Sequence[int]
) -> tuple[GraphModule, GraphModule, int, int]:
    """The graphs `full` and `pull` of a step, and how many results and saved tensors follow each other in the first."""

    def joint(*tensors: Tensor) -> list[Tensor]:
        inputs, cotangents = tensors[: len(given)], tensors[len(given) :]
        carry = [c.detach().requires_grad_() for c in inputs[:n]]
        with torch.enable_grad():
            results = full(*carry, *inputs[n:])
            pairs = [(r, g) for r, g in zip(results, cotangents, strict=True) if r.requires_grad]
            found = torch.autograd.grad([r for r, _ in pairs], carry, [g for _, g in pairs], allow_unused=True)
        return [*results, *[torch.zeros_like(c) if g is None else g for c, g in zip(carry, found, strict=True)]]

    graph = make_fx(joint)(*given, *[torch.ones_like(r) for r in full(*given)])
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    inputs, tangents = places[: len(given)], places[len(given) :]
    products = []
    each = _products(graph.graph)  # first those of the step, in its order
    for node in [each[i] for i in known]:
        with graph.graph.inserting_before(node):
            products.append(graph.graph.placeholder(f"product_{node.name}"))
            node.replace_all_uses_with(graph.graph.call_function(_known_product, (products[-1], *node.args)))
    for node in places[:n]:
        for user in [user for user in node.users if user.target is torch.ops.aten.detach.default]:
            user.replace_all_uses_with(node)  # which `joint` put there
            graph.graph.erase_node(user)
    constants = inputs[len(inputs) - num_constants :]
    fixed, pulled = {*constants}, {*tangents}
    for node in graph.graph.nodes:
        if node.op in ("get_attr", "call_function"):
            sources = node.all_input_nodes
            if pulled.intersection(sources):
                pulled.add(node)
            elif fixed.issuperset(sources):
                fixed.add(node)
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    results, gradients = output.args[0][: len(tangents)], output.args[0][len(tangents) :]
    needed = [source for node in graph.graph.nodes if node in pulled for source in node.all_input_nodes]
    needed += [node for node in gradients if node not in pulled]
    saved = [*dict.fromkeys(node for node in needed if node not in pulled and node not in fixed)]
    begin = [*inputs[: len(inputs) - num_constants], *products, *constants]
    first = _part(graph, begin, [*results, *saved])
    return first, _part(graph, [*saved, *constants, *tangents], gradients), len(results), len(saved)


def _part(graph: GraphModule, inputs: Sequence[Node], outputs: Sequence[Node]) -> GraphModule:
    """What leads from these nodes to those."""
    part = torch.fx.Graph()
    copies = {node: part.placeholder(node.name) for node in inputs}
    for node in graph.graph.nodes:
        made = node.op in ("get_attr", "call_function") and copies.keys() >= {*node.all_input_nodes}
        if made and node not in copies:
            copies[node] = part.node_copy(node, lambda source: copies[source])
    part.output([copies[node] for node in outputs])
    part.eliminate_dead_code()
    return GraphModule(graph, part)


@torch.library.custom_op("pyro_vae::scan", mutates_args=())
def _scan(key: str, start: Sequence[Tensor], inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return _Step.table[key].run(start, inputs, constants)


@_scan.register_fake
def _(key: str, start: Sequence[Tensor], inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> list[Tensor]:
    step, T = _Step.table[key], len(inputs[0])
    products = [start[0].new_empty((T, *product.shape), dtype=product.dtype) for product in step.products]
    return [*[each.new_empty(T, *each.shape) for each in (*start, *step.noise())], *products]


@torch.library.custom_op("pyro_vae::scan_adjoint", mutates_args=())
def _scan_adjoint(key: str, gradients: Sequence[Tensor], fixed: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return _Step.table[key].run_adjoint(gradients, fixed)


@_scan_adjoint.register_fake
def _(key: str, gradients: Sequence[Tensor], fixed: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(g) for g in gradients[: _Step.table[key].n]]


library = torch.library.Library("pyro_vae", "FRAGMENT")
library.define("packed_product(Tensor a, Tensor w) -> Tensor")


@torch.library.impl(library, "packed_product", "CompositeExplicitAutograd")
def _(a: Tensor, w: Tensor) -> Tensor:
    """``a w`` of w as `_packed` has it, as `torch.library.custom_op` takes no such tensors."""
    return torch.ops.mkldnn._linear_pointwise(a, w, None, "none", [], "")


@torch.library.register_fake("pyro_vae::packed_product", lib=library)
def _(a: Tensor, w: Tensor) -> Tensor:
    return a.new_empty(len(a), len(w))
