"""`Update`: the optimisers of all parameters, stepped as one."""

from __future__ import annotations

import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.adagrad_rmsprop import AdagradRMSProp
from pyro.optim.clipped_adam import ClippedAdam
from pyro.optim.lr_scheduler import PyroLRScheduler
from pyro.params.param_store import normalize_param_name
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

__all__ = ["Optimizer", "Overflow", "Update", "gradient_of", "is_left_zero"]

Optimizer: TypeAlias = PyroOptim | Callable[[Any], torch.optim.Optimizer]
FUSED = {
    torch.optim.Adam: ("cpu", "cuda"),
    torch.optim.AdamW: ("cpu", "cuda"),
    torch.optim.SGD: ("cpu", "cuda"),
    torch.optim.Adagrad: ("cpu",),
}
OWN_CALLS = (PyroOptim.__call__, PyroLRScheduler.__call__)  # what `Update` does in their place
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
MAX_IN_GRAPH = 32  # parameters: each takes a C++ compiler half a second, and torch's fused kernel is nearly as fast
# that update each element from its own history: one of them for all parameters is as good as one for each
ELEMENTWISE = {
    *FUSED,
    *(torch.optim.Adadelta, torch.optim.Adamax, torch.optim.ASGD, torch.optim.NAdam, torch.optim.RAdam),
    *(torch.optim.RMSprop, torch.optim.Rprop, ClippedAdam, AdagradRMSProp),
}


class Overflow(NamedTuple):
    """An update that did not act, as it would have left a number that is not finite."""

    parameter: str
    state: str | None  # of the optimiser, where it is this that would not be finite
    group: dict[str, Any]


_gradient, _version = operator.attrgetter("grad"), operator.attrgetter("_version")


def is_left_zero(gradient: Tensor | None) -> bool:
    """Whether this is the gradient of zero that a step left, and nobody has written into it."""
    return gradient is not None and getattr(gradient, "_left_at", None) == gradient._version


def gradient_of(parameter: Tensor) -> Tensor | None:
    """The gradient, unless it is the zero that a step left."""
    return None if is_left_zero(parameter.grad) else parameter.grad


class Update:
    """What an optimiser does at each step, as one multi-tensor update.

    A `pyro.optim` object keeps an optimiser with settings and state for each parameter, which several SVIs may share,
    in ``optim_objs``. These stay the truth; here they are stepped together, by torch's fused kernels where there are
    any. A `pyro.optim` object of a class with a ``__call__`` of its own, or whose constructor makes no torch
    optimisers, is called as Pyro calls it. A callable from parameters to a torch optimiser gives one optimiser for all
    of them.

    Raises:
        ValueError: the optimiser does not take its arguments, or is none.
    """

    def __init__(self, optim: Optimizer) -> None:
        if not isinstance(optim, PyroOptim) and not callable(optim):
            raise ValueError(
                "expected a pyro.optim object, or a callable from parameters to a torch optimiser such as "
                f"functools.partial(torch.optim.Adam, lr=1e-3), got {type(optim).__name__}: give one of them"
            )
        self.optim = optim
        self.is_called = isinstance(optim, PyroOptim) and type(optim).__call__ not in OWN_CALLS
        self.parameters: dict[str, Tensor] = {}
        self.optimizers: list[torch.optim.Optimizer] = []  # one, or that of each parameter
        self.schedulers: list[Any] = []
        self.settings: list[dict[str, Any]] = []  # of each group, as given
        self._clips: list[tuple[Callable, Tensor]] = []
        self._joint: Any = None
        self._adam: AdamUpdate | None = None
        self._takes_adam = False
        self._begun = False  # whether it acts by the settings of now
        self._measured = False  # whether it knows how large the moments are
        self._places: list[Iterable[Any]] = []  # of all that a joint optimiser is made from
        self._held: list[Any] = []  # there
        self._members: list[list[dict[str, Any]]] = []
        self._largest: float | None = None  # of the gradients so far, where they are known
        self._zeros: dict[int, Tensor] = {}  # the gradients that steps leave
        self._left: tuple[list[Any], list[int]] = ([], [])  # those of all parameters, and their versions
        self._copies: list[Tensor] = []  # where `_Before` keeps its own

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of: all but what follows from it."""
        new = Update(self.optim)
        derived = (
            "_clips",
            "_joint",
            "_adam",
            "_takes_adam",
            "_begun",
            "_measured",
            "_places",
            "_held",
            "_members",
            "_zeros",
            "_left",
        )
        return vars(self) | {name: getattr(new, name) for name in (*derived, "_copies")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if isinstance(self.optim, PyroOptim) and self.parameters and not self.is_called:
            self._adopt_all(self.optim)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimisers' groups of parameters: change a learning rate there."""
        return [group for optimizer in self.optimizers for group in getattr(optimizer, "param_groups", ())]

    def add(self, parameters: Mapping[str, Tensor]) -> None:
        """Take up new parameters."""
        given = {id(group["params"][0]): settings for group, settings in zip(self.groups, self.settings, strict=True)}
        self.parameters |= parameters
        try:
            if isinstance(self.optim, PyroOptim):
                if not self.is_called:
                    self._adopt_all(self.optim)
            elif self.optimizers:
                self.optimizers[0].add_param_group({"params": list(parameters.values())})
            else:
                optimizer = self.optim(list(parameters.values()))
                if not isinstance(optimizer, torch.optim.Optimizer):
                    raise TypeError(f"{type(optimizer).__name__} in the place of a torch.optim.Optimizer")
                self.optimizers.append(optimizer)
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected arguments that the optimiser takes, got {error}: correct them") from None
        self.settings = [given.get(id(group["params"][0])) or _settings(group) for group in self.groups]
        self._joint = None

    def _adopt_all(self, optim: PyroOptim) -> None:
        self.optimizers, self.schedulers, self._clips = [], [], []
        for name, parameter in self.parameters.items():
            self._adopt(optim, name, parameter)

    def _adopt(self, optim: PyroOptim, name: str, parameter: Tensor) -> None:
        """Find the parameter's own optimiser, or make it as `PyroOptim` does."""
        stored = pyro.get_param_store().param_name(parameter)
        if parameter not in optim.optim_objs:
            arguments: Any = optim.pt_optim_args
            if stored or not callable(arguments):
                optimizer: Any = optim._get_optim(parameter)
            else:
                optimizer = optim.pt_optim_constructor([parameter], **arguments(normalize_param_name(name)))
                if isinstance(optim, PyroLRScheduler):
                    optimizer = optim.pt_scheduler_constructor(optimizer, **optim.kwargs)
            state = optim._state_waiting_to_be_consumed.pop(stored, None)
            if state is not None:
                _load(optimizer, state)
            optim.optim_objs[parameter] = optimizer
            optim.grad_clip[parameter] = optim._get_grad_clip(parameter)
        optimizer = optim.optim_objs[parameter]
        if isinstance(optim, PyroLRScheduler):
            self.schedulers.append(optimizer)
            optimizer = optimizer.optimizer
        self.is_called = self.is_called or not isinstance(optimizer, torch.optim.Optimizer)
        self.optimizers.append(optimizer)
        if clip := optim.grad_clip[parameter]:
            self._clips.append((clip, parameter))

    def step(self, used: Sequence[bool], largest: float = math.inf) -> Overflow | None:
        """Clip the gradients as the optimiser asks, update the parameters, and leave gradients of zero.

        A parameter that was `used` and has no gradient has one of zero, as in Pyro, if it ever had another. Where a
        parameter would not be finite afterwards, all is as it was but the gradients, and what would overflow is told.
        `largest` is the largest absolute value among the gradients: where it makes sure of the update, nothing is
        looked at.
        """
        before = None if self._is_sure(largest) else _Before(self)
        unused = [] if isinstance(self.optim, PyroOptim) else [*self.parameters.values()]
        zeros = [(parameter, parameter.grad) for parameter in unused if is_left_zero(parameter.grad)]
        for parameter, _ in zeros:
            parameter.grad = None  # which torch's optimisers leave out
        try:
            self._act(used)
        finally:
            for parameter, zero in zeros:
                parameter.grad = zero
            self.leave_zeros()
        self._measured = False
        overflow = before.overflow() if before is not None else None
        if before is not None and overflow is not None:
            before.put_back()
            self._joint = None
        return overflow

    def _is_sure(self, largest: float) -> bool:
        """Whether Adam, AdamW or SGD cannot but leave finite numbers, by the bounds of `AdamUpdate`."""
        kinds = {type(optimizer) for optimizer in self.optimizers}
        if self.is_called or not kinds or not kinds <= {torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD}:
            return False
        if any(any(_hooks(optimizer)) or _own_step(optimizer) for optimizer in self.optimizers):
            return False
        if self._joint is None or not self._unchanged() or self._largest is None:
            moments = [
                (value.abs().amax(), 0.5 if key == "exp_avg_sq" else 1.0)
                for optimizer in self.optimizers
                for state in optimizer.state.values()
                for key, value in state.items()
                if key in MOMENTS and isinstance(value, Tensor) and value.numel()
            ]
            sizes = [float(size) ** power for size, power in moments]
            self._largest = max(sizes, default=0.0)
        self._largest = max(self._largest, largest)
        number = min((torch.finfo(p.dtype) for p in self.parameters.values()), key=lambda info: info.max)
        limit = number.max * number.eps / 4
        return self._largest < math.sqrt(number.max) / 2 and all(
            _largest_rate(group) <= number.max and self._largest * _reach(group) <= limit for group in self.groups
        )

    def _act(self, used: Sequence[bool]) -> None:
        if self.is_called:
            optim: Any = self.optim
            optim([parameter for parameter, is_used in zip(self.parameters.values(), used, strict=True) if is_used])
            made = [optim.optim_objs[p] for p in self.parameters.values() if p in optim.optim_objs]
            self.schedulers = [each for each in made if hasattr(each, "optimizer")]
            self.optimizers = [getattr(each, "optimizer", each) for each in made]
            self.settings = self.settings or [_settings(group) for group in self.groups]
            return
        for clip, parameter in self._clips:
            if parameter.grad is not None:
                clip(parameter)
        joint = self._joined()
        if not all(used) and len(self.optimizers) == len(used):
            _OneByOne([optimizer for optimizer, it in zip(self.optimizers, used, strict=True) if it]).step()
            return
        for group in joint.param_groups:
            if group.get("fused") and not _fits_kernel(joint, group):
                group["fused"] = False
        joint.step()
        for group, members in zip(joint.param_groups, self._members, strict=True):
            if group.get("lr") != members[0].get("lr"):  # decayed by the optimiser itself
                for member in members:
                    member["lr"] = group["lr"]
                self._hold()

    def leave_zeros(self, everywhere: bool = False) -> None:
        """Leave a gradient of zero where there is one, as Pyro's SVI does, or `everywhere`."""
        if self.has_left_zeros():
            return
        for parameter in self.parameters.values():
            gradient = parameter.grad
            if (gradient is not None or everywhere) and not is_left_zero(gradient):
                zero = self._zeros.get(id(parameter))
                if zero is None or not is_left_zero(zero) or not _fits(zero, parameter):
                    zero = torch.zeros_like(parameter)
                    zero._left_at = zero._version  # type: ignore[attr-defined]
                    self._zeros[id(parameter)] = zero
                parameter.grad = zero
        left = [*map(_gradient, self.parameters.values())]
        if all(map(is_left_zero, left)):
            self._left = left, [*map(_version, left)]

    def has_left_zeros(self) -> bool:
        """Whether the gradients of all parameters are still those that a step left: quick, as it is asked at each."""
        left, versions = self._left
        now = [*map(_gradient, self.parameters.values())]
        same = len(now) == len(left) > 0 and all(map(operator.is_, now, left))
        return same and [*map(_version, left)] == versions

    def adam(self) -> AdamUpdate | None:
        """The next update in tensor arithmetic, where it is Adam's and nothing comes between; the same object as long
        as only numbers among the settings change.
        """
        if self.is_called:
            return None
        self._largest = None  # of which the graph keeps its own
        joint = self._joined()
        if self._takes_adam and not self._begun:
            if self._adam is None or not self._adam.acts_on(joint):
                self._adam = AdamUpdate(joint)
            self._adam.begin(joint)
            self._hold()
            self._begun = True
        if self._adam is not None and not self._measured:
            self._adam.measure()
            self._measured = True
        return self._adam if self._takes_adam else None

    def _joined(self) -> Any:
        """All optimisers as one."""
        if self._joint is None or not self._unchanged():
            if self._joint is not None and isinstance(self.optim, PyroOptim) and not self.is_called:
                self._adopt_all(self.optim)
            self._joint = self._join()
            grouped = {id(p) for group in self._joint.param_groups for p in group["params"]}
            own = grouped == {id(p) for p in self.parameters.values()}
            self._takes_adam = own and not self._clips and AdamUpdate.stands_for(self._joint)
            self._begun = False
            self._hold()
        return self._joint

    def _hold(self) -> None:
        """Take note of every object that a user may replace, to make the update another."""
        self._places = []
        if isinstance(self.optim, PyroOptim):
            self._places += [self.optim.optim_objs.values(), self.optim.grad_clip.values()]
        for optimizer in self.optimizers:
            self._places += [vars(optimizer).values(), optimizer.param_groups, optimizer.state.values()]
            self._places += [hooks.values() for hooks in _hooks(optimizer)]
            for group in optimizer.param_groups:
                self._places += [group.values(), *(value for value in group.values() if isinstance(value, list))]
            if self._takes_adam:
                self._places += [state.values() for state in optimizer.state.values()]
        self._places.append([self._places])  # so that what is added at the end is seen
        self._held = [*itertools.chain.from_iterable(self._places)]

    def _unchanged(self) -> bool:
        return all(map(operator.is_, itertools.chain.from_iterable(self._places), self._held))

    def _join(self) -> Any:
        """One optimiser on the states of all, with a group for each kind of settings."""
        joint: Any
        if self.is_called:
            joint, self._members = _OneByOne(self.optimizers), [[group] for group in self.groups]
            return joint
        if len(self.optimizers) == 1:
            joint = self.optimizers[0]
            self._members = [[group] for group in joint.param_groups]
        elif type(self.optimizers[0]) not in ELEMENTWISE or any(
            any(_hooks(o)) or _own_step(o) for o in self.optimizers
        ):
            joint = _OneByOne(self.optimizers)
            self._members = [[group] for group in joint.param_groups]
        else:
            kind = type(self.optimizers[0])
            if kind is ClippedAdam and not any(group["centered_variance"] for group in self.groups):
                kind = _FusedClippedAdam
            joint = object.__new__(kind)
            joint.__dict__.update({k: v for k, v in vars(self.optimizers[0]).items() if k != "step"})  # a wrapper
            joint.state = defaultdict(dict)
            self._members = []
            merged: list[dict[str, Any]] = []
            for optimizer in self.optimizers:
                optimizer._opt_called = True  # type: ignore[attr-defined]  # else its scheduler warns
                for group in optimizer.param_groups:
                    joint.state |= {p: optimizer.state[p] for p in group["params"]}
                    same = [i for i, other in enumerate(merged) if _kind(other) == _kind(group)]
                    if same:
                        merged[same[0]]["params"] += group["params"]
                        self._members[same[0]].append(group)
                    else:
                        merged.append({**group, "params": list(group["params"])})
                        self._members.append([group])
            joint.param_groups = merged
        for group in joint.param_groups:
            if _can_fuse(joint, group):
                group["fused"] = True
                for p in group["params"]:
                    if "step" in (state := joint.state[p]):
                        state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)
        return joint

    def schedule(self, metric: float) -> None:
        """Step the schedulers; `metric` is what `ReduceLROnPlateau` wants small."""
        for scheduler in self.schedulers:
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(metric) if plateau else scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {
            "class": type(next(iter(self.optimizers), None)).__name__,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same optimiser on the same parameters."""
        for parts, states in ((self.optimizers, state["optimizers"]), (self.schedulers, state["schedulers"])):
            for part, its_state in zip(parts, states, strict=True):
                before = getattr(part, "state", {})
                try:
                    part.load_state_dict(dict(its_state))
                except ValueError as error:
                    raise ValueError(
                        f"expected an optimiser of the parameters of before, got another ({error}): train the same, "
                        "such as those that requires_grad_(False) left out"
                    ) from None
                for p, its in getattr(part, "state", {}).items():
                    known = {key: value for key, value in before.get(p, {}).items() if isinstance(value, Tensor)}
                    its |= {key: value.copy_(its[key]) for key, value in known.items()}  # the tensors that graphs know
        self._measured, self._largest = False, None


class _Before:
    """The parameters and the optimisers' states of now, to go back to."""

    def __init__(self, update: Update) -> None:
        self.update = update
        optimizers = [optimizer for optimizer in update.optimizers if isinstance(optimizer, torch.optim.Optimizer)]
        self.tables: list[Any] = []
        self.tensors = [*update.parameters.values()]
        for optimizer in optimizers:
            self.tables += [optimizer.state, *optimizer.param_groups, *optimizer.state.values()]
        for table in self.tables:
            self.tensors += [value for value in table.values() if isinstance(value, Tensor)]
        self.contents = [dict(table) for table in self.tables]
        copies = update._copies
        if len(copies) != len(self.tensors) or not all(map(_fits, copies, self.tensors)):
            copies = update._copies = [torch.empty_like(tensor) for tensor in self.tensors]
        with torch.no_grad():
            torch._foreach_copy_(copies, self.tensors)

    def overflow(self) -> Overflow | None:
        """The first parameter that is not finite now, or of whose elementwise optimiser a state is not."""
        update = self.update
        found: list[tuple[str, str | None, Tensor]] = [(name, None, p) for name, p in update.parameters.items()]
        groups = {id(p): group for group in update.groups for p in group["params"]}
        names = {id(p): name for name, p in update.parameters.items()}
        for optimizer in update.optimizers if not update.is_called else ():
            for p, state in optimizer.state.items() if type(optimizer) in ELEMENTWISE else ():
                found += [
                    (names.get(id(p), "?"), key, value) for key, value in state.items() if isinstance(value, Tensor)
                ]
        found = [each for each in found if each[2].is_floating_point() and each[2].numel()]
        with torch.no_grad():
            largest = torch._foreach_norm([value for *_, value in found], torch.inf)
            if bool(torch.stack([norm.to(largest[0].device, torch.float64) for norm in largest]).isfinite().all()):
                return None
        (name, key, _), *_ = (each for each, norm in zip(found, largest, strict=True) if not bool(norm.isfinite()))
        return Overflow(name, key, {**groups.get(id(update.parameters.get(name)), {})})

    @torch.no_grad()
    def put_back(self) -> None:
        for table, content in zip(self.tables, self.contents, strict=True):
            table.clear()
            table.update(content)
        for tensor, copy in zip(self.tensors, self.update._copies, strict=True):
            tensor.copy_(copy)


def _fits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype and a.device == b.device


def _largest_rate(group: Mapping[str, Any]) -> float:
    """No less than what an update multiplies by: beyond the largest number, its product with zero is no number."""
    kept = group["betas"][0] if "betas" in group else group["momentum"]
    return abs(float(group["lr"])) / (1 - kept) if 0 <= kept < 1 else math.inf


def _reach(group: Mapping[str, Any]) -> float:
    """How far an update moves a parameter at most, for gradients of at most 1; infinite where it is not known."""
    rate, decay = _largest_rate(group), group["weight_decay"]
    if "betas" not in group:
        return 2 * rate if decay == 0 else math.inf
    decays_well = decay == 0 or (group["decoupled_weight_decay"] and abs(1 - group["lr"] * decay) <= 1)
    return rate / group["eps"] if decays_well and group["eps"] > 0 else math.inf


def _own_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the instance has got another ``step`` than a scheduler's count of its class's."""
    step = vars(optimizer).get("step")
    return step is not None and not hasattr(step, "_wrapped_by_lr_sched")


def _load(optimizer: Any, state: Mapping[str, Any]) -> None:
    if hasattr(optimizer, "optimizer"):  # a scheduler
        optimizer.load_state_dict(state["scheduler"])
        optimizer.optimizer.load_state_dict(state["optimizer"])
    else:
        optimizer.load_state_dict(state)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _hooks(optimizer: torch.optim.Optimizer) -> list[dict[Any, Any]]:
    own: list[Any] = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    return [*own, _global_optimizer_pre_hooks, _global_optimizer_post_hooks]


def _kind(group: Mapping[str, Any]) -> tuple[Any, ...]:
    settings = {key: id(value) if isinstance(value, Tensor) else value for key, value in _settings(group).items()}
    return settings, {p.dtype for p in group["params"]}


def _can_fuse(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    devices = FUSED.get(type(optimizer), ())
    free = group.get("fused") is None and not group.get("foreach") and not group.get("differentiable")
    return free and all(
        p.device.type in devices and p.is_floating_point() and (p.grad is None or p.grad.layout is torch.strided)
        for p in group["params"]
    )


def _fits_kernel(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether torch's fused kernels take these gradients: dense, and with SGD's buffers all there or all to be made."""
    used = [p for p in group["params"] if p.grad is not None]
    buffers = {optimizer.state[p].get("momentum_buffer") is None for p in used}
    return not any(p.grad.is_sparse for p in used) and len(buffers) <= 1


class AdamUpdate:
    """Adam's step in tensor arithmetic alone, on the parameters and states of an optimiser: to be part of a graph.

    It acts where it is sure to leave finite numbers. With L the largest norm of the gradients of a step, which no
    element of the first moment exceeds, this is so where L^2 does not overflow and ``lr L / ((1 - beta1) eps)``, which
    no parameter moves by more than, is less than half of what the largest number is rounded to; and where the rate
    itself is a number, as infinity times a gradient of zero is none. In single precision and with Adam's own settings
    this is L < 9.2e18.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.groups = _adam_groups(optimizer)
        firsts = [states[0][0] for states, *_ in self.groups]
        self.rates = [first.new_empty(3, dtype=torch.float64) for first in firsts]
        self.constants = [first.new_empty(6) for first in firsts]
        self.places = [(*r.unbind(), *c.unbind()) for r, c in zip(self.rates, self.constants, strict=True)]
        self.numbers: list[tuple[float, ...]] = [(math.nan,) * 9] * len(firsts)  # in these places
        self.unbroken = torch.ones((), dtype=torch.bool, device=firsts[0].device)
        self.largest = torch.zeros((), dtype=torch.float64, device=firsts[0].device)

    @staticmethod
    def stands_for(optimizer: torch.optim.Optimizer) -> bool:
        if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
            return False
        unusual = ("amsgrad", "maximize", "capturable", "differentiable", "foreach")
        on_cpu = [p for group in optimizer.param_groups for p in group["params"] if not p.is_cuda]
        return (
            not any(_hooks(optimizer))
            and len(on_cpu) <= MAX_IN_GRAPH
            and all(
                group["fused"]
                and group["eps"] > 0
                and not any(group[key] for key in unusual)
                and not isinstance(group["lr"], Tensor)
                and len({p.dtype for p in group["params"]}) == 1
                for group in optimizer.param_groups
            )
        )

    def acts_on(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimiser's parameters, states and kinds of decay are those that this was made for."""
        if len(optimizer.param_groups) != len(self.groups):
            return False
        for group, (states, *decay) in zip(optimizer.param_groups, self.groups, strict=True):
            now = [(p, *map(optimizer.state[p].get, ("step", "exp_avg", "exp_avg_sq"))) for p in group["params"]]
            if [group["weight_decay"] != 0, group["decoupled_weight_decay"]] != decay or len(now) != len(states):
                return False
            if not all(map(operator.is_, itertools.chain(*now), itertools.chain(*states))):
                return False
        return True

    @torch.no_grad()
    def measure(self) -> None:
        """Look how large the moments are, which another step than this has left."""
        states = [state for states, *_ in self.groups for state in states]
        of_moments = [m.abs().amax() for _, _, m, _ in states if m.numel()]
        of_squares = [v.amax().sqrt() for *_, v in states if v.numel()]
        each = [torch.zeros_like(self.largest), *(norm.to(self.largest) for norm in (*of_moments, *of_squares))]
        self.largest.copy_(torch.stack(each).amax())

    def mend(self) -> None:
        """Let updates through again after a step that was not finite."""
        self.unbroken.fill_(True)

    @torch.no_grad()
    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the settings of now where the graph reads them."""
        for index, (group, places) in enumerate(zip(optimizer.param_groups, self.places, strict=True)):
            lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
            numbers = (lr, beta1, beta2, 1 - beta1, beta2, 1 - beta2, group["eps"], decay, 1 - lr * decay)
            for place, number, before in zip(places, numbers, self.numbers[index], strict=True):
                if number != before:
                    place.fill_(number)
            self.numbers[index] = numbers

    @torch.no_grad()
    def __call__(self, gradients: Mapping[Tensor, Tensor], finite: Tensor, largest: Tensor) -> list[Tensor]:
        """Update parameters and states in place, unless this step or one since `mend` is not `finite`, or the update
        might not be. `largest` is no less than the largest absolute value among the gradients.

        Returns whether this step is finite and its update sure to be, and the factors that correct for bias: as results
        of the graph they are computed once, not per element.
        """
        factors, sure = [], finite
        largest = torch.maximum(largest, self.largest)
        for (states, decays, decoupled), rates, constants in zip(self.groups, self.rates, self.constants, strict=True):
            lr, beta1, beta2 = rates.unbind()
            t = torch.stack([step for _, step, _, _ in states]).double() + 1
            corrected = torch.stack([lr / (1 - beta1**t), (1 - beta2**t).sqrt()]).to(constants.dtype)
            number, wide = torch.finfo(constants.dtype), constants.double()
            if decays and not decoupled:  # a part of the gradient
                of_parameters = torch.stack([p.abs().amax() for p, *_ in states if p.numel()]).amax()
                largest = torch.maximum(largest, largest + wide[4].abs() * of_parameters)
            most = lr.abs() / (1 - beta1)  # of all rates
            sure = sure & (largest < math.sqrt(number.max) / 2) & (most <= number.max)
            sure = sure & (most * largest / wide[3] <= number.max * number.eps / 4)
            if decays and decoupled:
                sure = sure & (wide[5].abs() <= 1)
            factors.append(corrected)
        acts = sure & self.unbroken
        self.unbroken.copy_(acts)
        self.largest.copy_(torch.where(acts, largest, self.largest))
        for (states, decays, decoupled), constants, corrected in zip(self.groups, self.constants, factors, strict=True):
            new1, old2, new2, eps, decay, shrink = constants.unbind()
            for (p, step, exp_avg, exp_avg_sq), (rate, correction2) in zip(states, corrected.unbind(1), strict=True):
                start = p * shrink if decays and decoupled else p
                g = gradients[p] + decay * p if decays and not decoupled else gradients[p]
                m = exp_avg + new1 * (g - exp_avg)
                v = old2 * exp_avg_sq + new2 * g * g
                new = start - rate * m / (v.sqrt() / correction2 + eps)
                for tensor, value in ((p, new), (step, step + 1), (exp_avg, m), (exp_avg_sq, v)):
                    tensor.copy_(torch.where(acts, value, tensor))
        return [sure, *factors]


class _AdamGroup(NamedTuple):
    states: list[tuple[Tensor, Tensor, Tensor, Tensor]]  # parameter, steps, moments
    decays: bool
    decoupled: bool  # from the gradient


def _adam_groups(optimizer: torch.optim.Optimizer) -> list[_AdamGroup]:
    groups = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not (state := optimizer.state[p]):
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        states = [(p, *(optimizer.state[p][key] for key in ("step", "exp_avg", "exp_avg_sq"))) for p in group["params"]]
        groups.append(_AdamGroup(states, group["weight_decay"] != 0, group["decoupled_weight_decay"]))
    return groups


class _OneByOne:
    """Optimisers of a kind that is not known, each for itself."""

    def __init__(self, optimizers: Sequence[Any]) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in getattr(optimizer, "param_groups", ())]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class _FusedClippedAdam(ClippedAdam):
    """Pyro's ClippedAdam by torch's fused Adam, whose eps is added to a square root that is corrected for bias."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["lr"] *= group["lrd"]
            by_step = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    if not (state := self.state[p]):
                        state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                    by_step[state["step"]].append(p)
            for step, parameters in by_step.items():
                gradients = [p.grad for p in parameters]
                torch._foreach_clamp_min_(gradients, -group["clip_norm"])
                torch._foreach_clamp_max_(gradients, group["clip_norm"])
                beta1, beta2 = group["betas"]
                adam(
                    parameters,
                    gradients,
                    [self.state[p]["exp_avg"] for p in parameters],
                    [self.state[p]["exp_avg_sq"] for p in parameters],
                    [],
                    [torch.tensor(float(step), dtype=torch.float32, device=p.device) for p in parameters],
                    fused=True,
                    amsgrad=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"] / math.sqrt(1 - beta2 ** (step + 1)),
                    maximize=False,
                )
                for p in parameters:
                    self.state[p]["step"] += 1
