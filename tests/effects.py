"""Pyro programs beside which a user's own objects live: what a step leaves in them must be what SVI leaves.

Each row makes (model, guide, step, left): ``step(svi, i)`` takes one step, `left()` tells what the user's objects hold.
The rows of `COMPILED` compile to at most the number of graphs beside them, those of `EAGER` run eagerly for the reason
beside them.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import logging
import queue
import random

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from programs import X
from pyro import poutine
from torch import nn

BATCH = None


def latent():
    return pyro.sample("m", dist.Normal(pyro.param("location", torch.zeros(())), 1.0))


def guide(*args, **kwargs):
    latent()


def model(x, weight=1.0):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)), poutine.scale(scale=weight):
        pyro.sample("x", dist.Normal(m, 1.0).expand([2]).to_event(1), obs=x)


class Holder:
    """Something that holds what a program reads or writes."""


class Batch:
    def __init__(self, x):
        self.x, self.rows = x, len(x)


class Slots:
    __slots__ = ("x",)


class Properties:
    @property
    def x(self):
        return self._x


@dataclasses.dataclass(frozen=True)
class Data:
    x: torch.Tensor
    weight: float


Pair = collections.namedtuple("Pair", "x weight")


def nothing():
    return None


def plain(svi, i):
    return svi.step(X + i)


def held(change, read, holder=None):
    """A model of what a holder is given anew before each step."""
    holder = holder or Holder()

    def step(svi, i):
        change(holder, i)
        return svi.step()

    return lambda: model(*read(holder)), guide, step, nothing


def weight_of(value, read=lambda weight: weight):
    """A model of a number that a holder is given anew before each step."""
    holder = Holder()

    def step(svi, i):
        holder.weight = value(i)
        return svi.step(X)

    return lambda x: model(x, read(holder.weight)), guide, step, nothing


def argument(make, read):
    return lambda data: model(*read(data)), guide, lambda svi, i: svi.step(make(i)), nothing


def acting(act, left, given=plain):
    """A model that does something else, too."""

    def with_act(x):
        act(x)
        model(x)

    return with_act, guide, given, left


def drawn(batch, left=nothing):
    """A model that gets its batch by itself."""
    return lambda: model(batch()), guide, lambda svi, i: svi.step(), left


def leaving(put, left):
    """A guide that leaves something of its own."""
    return model, lambda x: put(latent()), plain, left


def closure():
    x = X

    def step(svi, i):
        nonlocal x
        x = X + i
        return svi.step()

    return lambda: model(x), guide, step, nothing


def global_variable():
    def step(svi, i):
        global BATCH
        BATCH = X + i
        return svi.step()

    return lambda: model(BATCH), guide, step, nothing


def class_attribute():
    class Kept:
        x = X

    return held(lambda _, i: setattr(Kept, "x", X + i), lambda _: (Kept.x,))


def buffer():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("x", X)

        def forward(self):
            model(self.x)

    module = Module()

    def step(svi, i):
        module.x = X + i
        return svi.step()

    return module, guide, step, nothing


def remembered(kind):
    holder, items = Holder(), {}
    holder.z = None
    if kind == "pair":
        return leaving(lambda z: setattr(holder, "z", (z, 2 * z)), lambda: [z.item() for z in holder.z])
    if kind == "item":
        return leaving(lambda z: setattr(holder, "z", z.item()), lambda: (type(holder.z), holder.z))
    if kind == "distribution":
        return leaving(lambda z: setattr(holder, "z", dist.Normal(z, 1.0)), lambda: holder.z.loc.item())
    if kind == "dictionary":
        return leaving(lambda z: items.update(z=z), lambda: items["z"].item())
    return leaving(lambda z: setattr(holder, "z", z), lambda: holder.z.item())


def cached():
    @functools.lru_cache
    def table(rows):
        return torch.ones(rows, 2)

    kept = {}

    def batch(x):
        kept.setdefault(len(x), table(len(x)))
        return model(x + kept[len(x)])

    return batch, guide, lambda svi, i: svi.step(X[: 4 + i % 2]), lambda: sorted(kept)


def hooked(make_hook, left):
    def step(svi, i):
        if i == 1:
            for name, parameter in pyro.get_param_store().named_parameters():
                parameter.register_hook(make_hook(name))
        return svi.step(X)

    return model, guide, step, left


def norms():
    found = collections.defaultdict(list)
    return hooked(lambda name: lambda g: found[name].append(g.norm().item()), lambda: dict(found))


def gradients_in_a_list():
    found = []
    return hooked(lambda name: lambda g: found.append(g), lambda: [float(g) for g in found])


def last_gradient():
    found = {}
    return hooked(lambda name: lambda g: found.update({name: g}), lambda: {k: float(g) for k, g in found.items()})


def between(change):
    def step(svi, i):
        change(i, pyro.get_param_store())
        return svi.step(X)

    return model, guide, step, nothing


def by_hand(i, store):
    parameter = store._params.get("location")
    if i == 3:
        parameter.grad = torch.ones(())
    elif i == 5:
        parameter.grad.add_(1.0)
    elif i == 6:
        parameter.grad = None


def failing():
    holder = Holder()

    def step(svi, i):
        holder.fails = i == 3
        if holder.fails:
            with contextlib.suppress(KeyError):
                svi.step(X)
            holder.fails = False
        return svi.step(X)

    def fail(x):
        if holder.fails:
            raise KeyError("of the program's own")

    return acting(fail, nothing, step)


def list_of(kind):
    log = kind()
    add = {set: lambda x: log.add(len(log)), collections.Counter: lambda x: log.update(a=1)}
    return acting(add.get(kind, lambda x: log.append(len(log))), lambda: sorted(log.items() if kind is dict else log))


class Counted(list):
    """A list that keeps count of what is done to it."""

    def __init__(self):
        super().__init__()
        self.done = 0

    def append(self, item):
        self.done += 1
        super().append(item)

    def copy(self):
        raise TypeError("it is the only one")

    clear = extend = copy


def log_of_items():
    log = []
    return leaving(lambda z: log.append(z.item()), lambda: [(type(value), value) for value in log])


def written_to(make, method, left):
    target = make()
    return acting(lambda x: getattr(target, method)("a"), lambda: left(target))


class Writer:
    def __init__(self):
        self.values = []

    def add_scalar(self, value):
        self.values.append(value)


class Counting(logging.Handler):
    def __init__(self):
        super().__init__()
        self.count = 0

    def emit(self, record):
        self.count += 1


def logged():
    logger, handler = logging.Logger("a user's"), Counting()
    logger.addHandler(handler)
    return acting(lambda x: logger.warning("step"), lambda: handler.count)


def printed():
    out = io.StringIO()

    def step(svi, i):
        with contextlib.redirect_stdout(out):
            return svi.step(X)

    return acting(lambda x: print("step"), out.getvalue, step)


def generator():
    def batches():
        yield from (X + i for i in range(30))

    batch = batches()
    return drawn(lambda: next(batch), lambda: float(next(batch).sum()))


class Loader:
    def __init__(self):
        self.count, self.batches = 0, iter([X + i for i in range(30)])

    def __iter__(self):
        return self

    def __next__(self):
        self.count += 1
        return X + self.count

    def counted(self):
        self.count += 1
        return X + self.count

    def batch(self):
        return next(self.batches)


def loader(name):
    made = Loader()
    method = {"next": lambda: next(made), "counted": made.counted, "batch": made.batch}[name]
    return drawn(method, lambda: (made.count, float(next(made.batches).sum())))


def full(kind):
    batches = kind([X + i for i in range(30)])
    return drawn(getattr(batches, "popleft", batches.pop), lambda: len(batches))


def queued():
    batches = queue.Queue()
    for i in range(30):
        batches.put(X + i)
    return drawn(batches.get, batches.qsize)


def shuffled_loader():
    data = torch.utils.data.TensorDataset(torch.cat([X, X + 1]))
    batches = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    return drawn(lambda: next(iter(batches))[0])


def own_random_numbers(make, left=lambda g: g.random()):
    numbers = make()
    return lambda x: model(x, 0.5 + numbers.random()), guide, lambda svi, i: svi.step(X), lambda: left(numbers)


def shuffled():
    order, numbers = [*range(6)], random.Random(1)

    def batch(x):
        numbers.shuffle(order)
        model(x[order[:3]])

    return batch, guide, plain, lambda: order


COMPILED = {
    "an attribute": (lambda: held(lambda h, i: setattr(h, "x", X + i), lambda h: (h.x,)), 1),
    "a batch among the attributes": (lambda: held(lambda h, i: setattr(h, "x", Batch(X + i)), lambda h: (h.x.x,)), 1),
    "a pair among the attributes": (lambda: held(lambda h, i: setattr(h, "x", (X + i, 0.1 * i + 1)), lambda h: h.x), 1),
    "a dictionary among the attributes": (
        lambda: held(lambda h, i: setattr(h, "x", {"x": X + i, "w": 0.1 * i + 1}), lambda h: (h.x["x"], h.x["w"])),
        1,
    ),
    "two shapes of an attribute": (
        lambda: held(lambda h, i: setattr(h, "x", (X + i)[: 4 + i % 2]), lambda h: (h.x,)),
        2,
    ),
    "an item of a dictionary": (lambda: held(lambda h, i: h.update(x=X + i), lambda h: (h["x"],), {"x": X}), 1),
    "an item of a list": (lambda: held(lambda h, i: h.__setitem__(0, X + i), lambda h: (h[0],), [X]), 1),
    "slots": (lambda: held(lambda h, i: setattr(h, "x", X + i), lambda h: (h.x,), Slots()), 1),
    "a property": (lambda: held(lambda h, i: setattr(h, "_x", X + i), lambda h: (h.x,), Properties()), 1),
    "a class's attribute": (class_attribute, 1),
    "a closure": (closure, 1),
    "a global variable": (global_variable, 1),
    "a buffer": (buffer, 1),
    "a float": (lambda: weight_of(lambda i: 0.1 * i + 0.1), 1),
    "a float that decides": (
        lambda: weight_of(lambda i: [0.1, 0.9, 0.5][i % 3], lambda weight: 1.0 if weight > 0.4 else 0.5),
        3,
    ),
    "a whole number": (lambda: weight_of(lambda i: i % 3 + 1), 3),
    "a batch as argument": (lambda: argument(lambda i: Batch(X + i), lambda b: (b.x, 1 / b.rows)), 1),
    "a dataclass as argument": (lambda: argument(lambda i: Data(X + i, 0.1 * i + 1), lambda b: (b.x, b.weight)), 1),
    "a named tuple as argument": (lambda: argument(lambda i: Pair(X + i, 0.1 * i + 1), tuple), 1),
    "caches": (cached, 3),
    "the last draw": (lambda: remembered("draw"), 1),
    "the last draw in a dictionary": (lambda: remembered("dictionary"), 1),
    "the last pair": (lambda: remembered("pair"), 1),
    "the last gradient": (last_gradient, 2),
    "a hook that changes gradients": (lambda: hooked(lambda name: lambda g: 2 * g, nothing), 2),
    "gradients by hand": (lambda: between(by_hand), 2),
    "a store that is cleared": (lambda: between(lambda i, store: store.clear() if i == 3 else None), 2),
    "a parameter that is given": (
        lambda: between(lambda i, store: store.__setitem__("location", torch.ones(())) if i == 3 else None),
        2,
    ),
    "an error of the program": (failing, 1),
}
EAGER = {
    "a list": (lambda: list_of(list), "adds to 'log'"),
    "a deque": (lambda: list_of(functools.partial(collections.deque, maxlen=3)), "'log'"),
    "a list of the user's own": (lambda: list_of(Counted), "changes as the program runs|adds to 'log'"),
    "a set": (lambda: list_of(set), "adds to 'log'"),
    "a counter": (lambda: list_of(collections.Counter), "'a' changes as the program runs"),
    "a log of items": (log_of_items, "adds to 'log'"),
    "a writer": (lambda: written_to(Writer, "add_scalar", lambda w: w.values), "adds to 'values'"),
    "a file": (lambda: written_to(io.StringIO, "write", lambda f: f.getvalue()), "'target', a file"),
    "a logger": (logged, "prints or logs 'step'"),
    "print": (printed, "prints or logs 'step'"),
    "the last item": (lambda: remembered("item"), "'z' changes as the program runs"),
    "the last distribution": (lambda: remembered("distribution"), "sets 'z' to another Normal"),
    "norms of gradients": (norms, "host"),
    "gradients in a list": (gradients_in_a_list, "adds to 'found'"),
    "a generator": (generator, "'batch', an iterator"),
    "an iterator of an object": (lambda: loader("batch"), "an iterator"),
    "an object that is an iterator": (lambda: loader("next"), "'made', an iterator"),
    "a counter of batches": (lambda: loader("counted"), "an iterator"),
    "a list that is emptied": (lambda: full(list), "takes from it"),
    "a deque that is emptied": (lambda: full(collections.deque), "takes from it"),
    "a queue": (queued, "a Queue"),
    "a loader that shuffles": (shuffled_loader, "Mend: "),
    "random numbers of Python": (lambda: own_random_numbers(lambda: random.Random(3)), "two runs of the program"),
    "random numbers of NumPy": (lambda: own_random_numbers(lambda: np.random.default_rng(3)), "two runs"),
    "an order that is shuffled": (shuffled, "changes as the program runs"),
}
