"""Pyro's SVI with one torch optimiser over all parameters, and a gate that no NaN passes."""

from __future__ import annotations

import collections
import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.infer
import torch
from pyro import poutine
from pyro.infer import JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceMeanField_ELBO, TraceTailAdaptive_ELBO
from pyro.nn import PyroModule
from pyro.optim import PyroOptim
from pyro.poutine import runtime
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .compiled import Compiled, NotNowError, does_say, get_random_state, preserved, set_random_state
from .guards import NotStaticError, walk, watched
from .optim import AdamUpdate, Optimizer, Overflow, Update, gradient_of, is_left_zero

__all__ = ["SVI", "CompiledSVI", "NonFiniteLossError", "latent_scale"]


OF_GRADIENTS = (
    "keep roots, logarithms and divisions of the programs away from 0, where the derivative of a finite value is not "
    "finite (a torch.where does not hide it); where step 1 was finite, a smaller learning rate; float64"
)
OF_LOSSES = "another scale of the data, or float64; where step 1 was finite, a smaller learning rate or clip_norm=..."


class NonFiniteLossError(ArithmeticError):
    """The loss, a gradient or what an update would make of a parameter is NaN or infinite; parameters and optimiser are
    those of the step before.

    Attributes:
        run: the directory of a run that can go on from its last checkpoint, or None.
    """

    run: Path | None = None


class LatentScale(poutine.scale_messenger.ScaleMessenger):
    """Scales every latent site's log-probability, in model and guide alike: a weight on the ELBO's KL term."""

    def _process_message(self, message: dict[str, Any]) -> None:
        observed = message["type"] == "sample" and message["is_observed"]
        if not observed and type(message["fn"]).__name__ != "_Subsample":
            super()._process_message(message)

    @property
    def weight(self) -> float:
        return self.scale.item()

    @weight.setter
    def weight(self, weight: float) -> None:
        if not weight > 0:
            raise ValueError(f"expected a KL weight > 0, got {weight}")
        self.scale.fill_(weight)  # in place, so that a compiled step sees it


def latent_scale(weight: float, device: torch.device | str = "cpu") -> LatentScale:
    """In this context an ELBO is ``E_q[log p(x|z)] - weight * (E_q[log q(z|x)] - E_q[log p(z)])``, weight > 0.

    Example:
        >>> with latent_scale(0.5):
        ...     trace = poutine.trace(pyro.sample).get_trace("z", pyro.distributions.Normal(0, 1))
        >>> trace.nodes["z"]["scale"]
        tensor(0.5000)
    """
    scale = LatentScale(torch.ones((), device=device))
    scale.weight = weight
    return scale


class SVI(pyro.infer.SVI):
    """`pyro.infer.SVI` for training loops: the same losses from the same draws.

    It differs in three things. `optim` may also be any callable from parameters to a torch optimiser, such as
    ``functools.partial(torch.optim.Adam, lr=1e-3)``, and the optimisers that a `pyro.optim` object keeps, one for each
    parameter, are stepped as one. The parameters are those of the modules (model, guide, loss) and of every
    ``pyro.param``. A loss or gradient that is not finite raises before the optimiser acts, and an update that would
    leave a parameter that is not is undone.

    Where two of the modules register a parameter under one name, each is trained, and a warning names them:
    `pyro.infer.SVI` trains that alone which comes first, by the guide as a rule, and the other never.

    Raises:
        NonFiniteLossError: names the step, the site and the parameter.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> model = VAE((4,), latent_dim=2)
        >>> svi = SVI(model, AmortizedGuide(model), pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO())
        >>> svi.step(torch.ones(10, 4)) > 0
        True
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Optimizer,
        loss: Any,
        loss_and_grads: Callable | None = None,
        num_samples: int = 0,
        num_steps: int = 0,
        *,
        clip_norm: float | None = None,
        **arguments: Any,
    ) -> None:
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"expected clip_norm > 0, got {clip_norm}: give a positive number")
        if getattr(loss, "num_particles", 1) < 1:
            raise ValueError(
                f"expected a loss with num_particles >= 1, got {loss.num_particles}: give a positive number"
            )
        stock = optim if isinstance(optim, PyroOptim) else PyroOptim(optim, {})
        super().__init__(model, guide, stock, loss, loss_and_grads, num_samples, num_steps, **arguments)
        self.objective = loss
        self.given_gradients = None if isinstance(loss, pyro.infer.ELBO) else loss_and_grads  # which Pyro leaves aside
        self.clip_norm = clip_norm
        self.steps = 0
        self._named: set[str] = set()  # by two parameters, and told
        self.update = Update(optim)
        self._of_update = self.optim
        self._buffers = _Buffers()
        self._begin()

    def _begin(self) -> None:
        """What a subclass adds when it is made."""

    @property
    def parameters(self) -> dict[str, Tensor]:
        return self.update.parameters

    @property
    def modules(self) -> dict[str, nn.Module]:
        return modules_of(model=self.model, guide=self.guide, loss=self.objective)

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        """Run model and guide once, with Pyro's validation on, to collect parameters; random state and buffers stay."""
        captured = _Captured(param_only=True)
        with preserved(), torch.no_grad(), pyro.validation_enabled(True), captured:
            self.loss(self.model, self.guide, *args, **kwargs)
        self._collect(captured.trace)
        self._warn_of_names(captured.others)

    def step_async(self, *args: Any, **kwargs: Any) -> Tensor:
        """A step; returns the loss as a tensor (), or the losses of one that gives several, like Pyro's
        `ReweightedWakeSleep`, as a tensor (parts,).
        """
        self._follow()
        random_state, buffers = get_random_state(), self._buffers.taken(self)
        loss, finite, used, largest = self._backward(*args, **kwargs)
        if not bool(finite):
            self._buffers.put_back(buffers)
            raise self._diagnosis(loss, random_state, args, kwargs)
        gradients = [gradient_of(parameter) for parameter in self.parameters.values()]
        if self.clip_norm is not None:
            own = [parameter for parameter in self.parameters.values() if gradient_of(parameter) is not None]
            torch.nn.utils.clip_grad_norm_(own, self.clip_norm)
        if self.parameters and (overflow := self.update.step(used, float(largest))):
            self._buffers.put_back(buffers)
            raise self._diagnosis_of_update(overflow, loss, gradients)
        self.steps += 1
        return loss

    def _follow(self) -> None:
        """Take up another optimiser that was put in the place of the one of before."""
        if self.optim is not self._of_update:
            parameters, self.update, self._of_update = self.parameters, Update(self.optim), self.optim
            if parameters:
                self.update.add(parameters)

    def _backward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Sequence[bool], Tensor]:
        """The loss; whether it and the gradients, left in the parameters, are finite; which parameters were used; the
        largest absolute value among the gradients.
        """
        zeros = [(p, p.grad) for p in self.parameters.values() if is_left_zero(p.grad)]
        for parameter, _ in zeros:
            parameter.grad = None
        captured = _Captured(param_only=True)
        try:
            with captured:
                loss = self.loss_and_grads(self._registered(), self.guide, *args, **kwargs)
        finally:
            for parameter, zero in zeros:
                if parameter.grad is None:
                    parameter.grad = zero
        losses = [torch.as_tensor(part, dtype=torch.float64).detach().reshape(()) for part in _parts(loss)]
        self._collect(captured.trace)
        self._warn_of_names(captured.others)
        gradients = [g for p in self.parameters.values() if (g := gradient_of(p)) is not None]
        values = torch.stack(losses) if isinstance(loss, tuple) else losses[0]
        finite, largest = _finite(torch.zeros(()) if self._tells_no_loss else sum(losses), gradients)
        return values, finite, self._used(captured.trace), largest

    @property
    def _tells_no_loss(self) -> bool:
        """Whether the loss is infinite by design, and only its gradients mean something."""
        return isinstance(self.objective, TraceTailAdaptive_ELBO)

    def _registered(self) -> Callable:
        """The model; one that has a parameter's site, without which Pyro's losses take no derivative, where modules are
        trained that register none."""
        loss = self.objective
        own = not isinstance(loss, pyro.infer.ELBO) or type(loss).__module__.startswith("pyro_vae.")
        if own or isinstance(loss, JitTrace_ELBO | JitTraceEnum_ELBO | JitTraceMeanField_ELBO):
            return self.model  # the Jit losses look for the sites' names in the store
        plain = [module for module in self.modules.values() if not isinstance(module, PyroModule)]
        return _Registered(self.model) if plain else self.model

    def _used(self, trace: poutine.Trace) -> list[bool]:
        """Which of the parameters this step takes up: all but those of ``pyro.param`` statements that did not run."""
        ran = {id(site["value"].unconstrained()) for site in trace.nodes.values()}
        return [id(p) in ran or not name.startswith("param.") for name, p in self.parameters.items()]

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """A step of the optimiser; returns the loss in nats, summed over the batch (the losses, if it has several)."""
        loss = self.step_async(*args, **kwargs).tolist()
        self.settle()
        return tuple(loss) if isinstance(loss, list) else loss

    def settle(self) -> None:
        """Wait until all steps are known to have been finite, which `step_async` of a compiled one may not yet know.

        Raises:
            NonFiniteLossError: one was not.
        """

    def _collect(self, trace: poutine.Trace) -> None:
        """Find the parameters; those that are new since the last time join the optimiser."""
        known = {id(parameter) for parameter in self.parameters.values()}
        sites = [(name, site["value"].unconstrained()) for name, site in trace.nodes.items()]
        if self.parameters and all(id(p) in known or not p.requires_grad for _, p in sites):
            return
        found: dict[str, Tensor] = {
            f"{program}.{name}": parameter
            for program, module in self.modules.items()
            for name, parameter in module.named_parameters()
        }
        of_modules = {id(parameter) for parameter in found.values()}
        found |= {f"param.{name}": p for name, p in sites if id(p) not in of_modules}
        unique = {id(p): (name, p) for name, p in reversed(found.items()) if p.requires_grad}
        new = {name: p for name, p in reversed(unique.values()) if id(p) not in known}
        if new:
            self.update.add(new)

    def _warn_of_names(self, others: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Say which parameters of the modules have been registered under the name of another that is trained too."""
        trained = {id(p): name for name, p in self.parameters.items() if not name.startswith("param.")}
        for name, (first, second) in others.items():
            if name not in self._named and id(first) in trained and id(second) in trained:
                self._named.add(name)
                warnings.warn(
                    f"two parameters, {trained[id(first)]!r} and {trained[id(second)]!r}, are registered under the one "
                    f"name {name!r}: this SVI trains both, pyro.infer.SVI the first alone, and the parameter store "
                    "keeps the first alone. Mend: give them different names",
                    UserWarning,
                    stacklevel=4,
                )

    def _diagnosis(self, loss: Tensor, random_state: Any, args: Any, kwargs: Any) -> NonFiniteLossError:
        broken = [
            name for name, p in self.parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all())
        ]
        set_random_state(random_state)
        self.update.leave_zeros()
        sites: list[_Site] = []
        looked = False
        # a loss of the user's own may call the programs otherwise
        with contextlib.suppress(Exception), torch.no_grad(), pyro.validation_enabled(False), preserved():
            guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(self.model, guide_trace)).get_trace(*args, **kwargs)
            sites = [site for trace in (guide_trace, model_trace) for site in _broken_sites(trace)]
            looked = True
        set_random_state(random_state)
        return NonFiniteLossError(
            f"step {self.steps + 1}: the loss is {loss.tolist()}; "
            + (f"first at {sites[0].words}; " if sites else "every site is finite; " if looked else "")
            + (f"the gradient of parameter {broken[0]!r} is not finite" if broken else "gradients are finite")
            + f" ({len(broken)} of {len(self.parameters)}). The parameters are still those of step {self.steps}. Mend: "
            + (sites[0].mend if sites else OF_GRADIENTS if bool(loss.isfinite().all()) else OF_LOSSES)
        )

    def _diagnosis_of_update(
        self, overflow: Overflow, loss: Tensor, gradients: Sequence[Tensor | None]
    ) -> NonFiniteLossError:
        lr, eps = overflow.group.get("lr"), overflow.group.get("eps")
        largest = max((float(g.abs().amax()) for g in gradients if g is not None and g.numel()), default=0.0)
        what = (
            f"{overflow.state!r} of parameter {overflow.parameter!r}"
            if overflow.state
            else f"parameter {overflow.parameter!r}"
        )
        if lr is not None and not math.isfinite(lr):
            mend = "a finite learning rate"
        elif overflow.state:
            mend = "clip_norm=..., or another scale of the data, as the square of the gradient overflows"
        elif eps == 0:
            mend = "eps > 0, as the optimiser divides by the size of the gradients, which is zero up to rounding"
        else:
            mend = "a smaller learning rate, or clip_norm=..."
        return NonFiniteLossError(
            f"step {self.steps + 1}: the update would leave {what} not finite, at the loss {loss.tolist()} with finite "
            f"gradients of at most {largest:.3g} and the learning rate {lr}. It has not acted: the parameters are "
            f"still those of step {self.steps}. Mend: {mend}"
        )

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on: parameters, buffers, optimiser and step."""
        state: dict[str, Any] = {name: module.state_dict() for name, module in self.modules.items()}
        state["params"] = {name: parameter.detach() for name, parameter in self._params().items()}
        state["update"] = self.update.state_dict()
        state["steps"] = self.steps
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; call `initialize` before.

        Raises:
            ValueError: the state belongs to other modules or parameters; nothing has been changed then.
        """
        params = self._params()
        shapes = [{name: tuple(value.shape) for name, value in table.items()} for table in (params, state["params"])]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"expected the pyro.param values {shapes[0]}, got {shapes[1]} in the checkpoint: use the functions "
                "that it was trained with; a parameter that appears only after the first step cannot be taken up again"
            )
        if state["update"]["class"] != (now := self.update.state_dict()["class"]):
            raise ValueError(
                f"expected {state['update']['class']}, the optimiser of the checkpoint, got {now}: go on with the same"
            )
        self.load_weights(state)
        self.update.load_state_dict(state["update"])
        self.steps = state["steps"]

    def load_weights(self, state: Mapping[str, Any]) -> None:
        """Take up the parameters and buffers of a `state_dict`, and leave the optimiser as it is.

        Raises:
            ValueError: the state belongs to other modules; nothing has been changed then.
        """
        params = self._params()
        load_modules(self.modules, state)
        with torch.no_grad():
            for name, value in state["params"].items():
                params[name].copy_(value)

    def _params(self) -> dict[str, Tensor]:
        """The values of ``pyro.param`` statements that are no parameters of modules, unconstrained."""
        of_modules = {id(p) for module in self.modules.values() for p in module.parameters()}
        return {name: p for name, p in pyro.get_param_store().named_parameters() if id(p) not in of_modules}


class CompiledSVI(SVI):
    """`SVI` whose step, from the draws to the gradients or, with Adam, the update, is replayed as one compiled graph.

    A drop-in for `pyro.infer.SVI` for any Pyro program of static structure: the same numbers from the same draws, up
    to rounding. `compiled` is True, or False with `fallback_reason`: then every step is `SVI`'s. See `Compiled` for
    what a graph depends on. A step in which parameters appear, as the first does, runs eagerly; `initialize` makes
    them, and compiles, beforehand.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     m = pyro.sample("m", dist.Normal(0, 1))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(m, 1), obs=x)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        >>> losses = [svi.step(torch.ones(5)) for _ in range(3)]
        >>> svi.compiled, svi.fallback_reason
        (True, None)
    """

    def _begin(self) -> None:
        self._own_gradients = self.loss_and_grads
        self._partial = False  # the optimiser acts beside the graph, not in it
        self._looked = False  # whether the loss's gradients are those of its differentiable_loss
        self._said: list[str] = []  # by the program in its steps so far
        self._make_graphs()
        if isinstance(self.objective, pyro.infer.ELBO) and (problem := _cannot_derive(self.objective)):
            self._gradients.fall_back(problem)
        elif self.given_gradients is not None:
            self._gradients.fall_back("loss_and_grads was given. Mend: leave it out where autograd gives the gradients")

    def _make_graphs(self) -> None:
        places: list[tuple[Any, Any]] = [(vars(pyro.get_param_store()), name) for name in ("_params", "_constraints")]
        places += [(vars(self), name) for name in ("model", "guide", "objective")]
        # functions of this module, and not methods of what may be a class of a user, which guards would walk through
        whole, gradients, bound = (
            lambda *args: self._whole_step(*args),
            lambda *args: self._loss_and_gradients(*args),
            lambda *args, **kwargs: self._loss(*args, **kwargs),
        )
        self._whole = Compiled(whole, places=places, roots=self._hooks)
        self._gradients = Compiled(gradients, places=places, roots=self._hooks)
        self._bound = Compiled(bound, places=[*places, (vars(self), "loss")])
        self._unsettled: collections.deque[_Step] = collections.deque()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of: graphs are compiled anew."""
        self.settle()
        reasons = [graph.fallback_reason for graph in (self._whole, self._gradients, self._bound)]
        graphs = ("_whole", "_gradients", "_bound", "_unsettled")
        return {name: value for name, value in vars(self).items() if name not in graphs} | {"_reasons": reasons}

    def __setstate__(self, state: dict[str, Any]) -> None:
        reasons = state.pop("_reasons")
        self.__dict__ |= state
        self._make_graphs()
        for graph, reason in zip((self._whole, self._gradients, self._bound), reasons, strict=True):
            graph.fallback_reason = reason

    def _hooks(self) -> list[Any]:
        """The functions that wait for gradients."""
        parts = [(p._backward_hooks, p._post_accumulate_grad_hooks) for p in self.parameters.values()]
        return [hook for pair in parts for part in pair for hook in (part or {}).values()]

    @property
    def compiled(self) -> bool:
        return self.fallback_reason is None and (self._whole.compiled or self._gradients.compiled)

    @property
    def fallback_reason(self) -> str | None:
        if self.steps and not self.parameters:
            return "there are no parameters to optimise. Mend: give the guide some, by modules or pyro.param"
        return self._whole.fallback_reason or self._gradients.fallback_reason

    @property
    def compile_seconds(self) -> float:
        """What recording and compiling have taken so far."""
        return self._whole.seconds + self._gradients.seconds + self._bound.seconds

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        super().initialize(*args, **kwargs)
        self._prepare(args, kwargs)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.fallback_reason is not None:
            return super().evaluate_loss(*args, **kwargs)
        with torch.no_grad():
            return self._bound(*args, **kwargs).item()

    def step_async(self, *args: Any, **kwargs: Any) -> Tensor:
        self._follow()
        known = len(self.parameters)
        adam, problem = self._adam(), None
        if adam is not None:
            random_state, buffers = get_random_state(), self._buffers.taken(self)
            try:
                loss, finite, sure, *_ = self._whole.replay(adam, args, kwargs)
            except _UnusedParameterError:
                self._partial = True
            except NotNowError:
                pass
            except NotStaticError as error:
                problem = error
            else:
                self.update.leave_zeros(everywhere=True)
                self.steps += 1
                step = _Step(self.steps, loss, finite, _Flag(sure), random_state, buffers, args, kwargs)
                self._unsettled.append(step)
                self._settle(lambda flag: flag.arrived())
                return loss
        loss = super().step_async(*args, **kwargs)
        if problem is not None:  # and not the program's own
            self._whole.fall_back(str(problem))
        if len(self.parameters) != known:
            self._prepare(args, kwargs)
        return loss

    def _follow(self) -> None:
        super()._follow()
        if self.loss_and_grads is not self._own_gradients and self.fallback_reason is None:
            self._gradients.fall_back("svi.loss_and_grads is another. Mend: hand over the loss when the SVI is made")

    def settle(self) -> None:
        self._settle(lambda flag: True)

    def _settle(self, due: Callable[[_Flag], bool]) -> None:
        """Look whether past steps have acted, those that are `due`; after one that has not, no other has."""
        while self._unsettled and due(self._unsettled[0].acted):
            step = self._unsettled.popleft()
            if not bool(step.acted):
                others = [*self._unsettled]
                self._unsettled.clear()
                self.steps = step.number - 1
                self._buffers.put_back(step.buffers)
                if adam := self.update.adam():
                    adam.mend()
                if not bool(step.finite):  # by the squares, which may overflow where gradients do not
                    set_random_state(step.random_state)
                    with preserved(), pyro.validation_enabled(False), warnings.catch_warnings():
                        warnings.filterwarnings("ignore", "Encountered", UserWarning)
                        _, finite, *_ = SVI._backward(self, *step.args, **step.kwargs)
                    if not bool(finite):
                        raise self._diagnosis(step.loss, step.random_state, step.args, step.kwargs)
                    self.update.leave_zeros()
                self._partial = True  # only the update may not be finite: beside the graph it is looked at itself
                for each in (step, *others):
                    set_random_state(each.random_state)
                    each.loss.copy_(super().step_async(*each.args, **each.kwargs))
                return

    def _adam(self) -> AdamUpdate | None:
        """The update, where it can be part of the graph."""
        parameters = self.parameters.values()
        beside = self._partial or self.clip_norm is not None
        if not parameters or self.fallback_reason or beside:
            return None
        if not self.update.has_left_zeros() and any(gradient_of(p) is not None for p in parameters):
            return None
        return self.update.adam()

    def _prepare(self, args: Any, kwargs: Any) -> None:
        """Compile for these arguments."""
        if self.fallback_reason is None and (problem := self._problem(args, kwargs)):
            return self._gradients.fall_back(problem)
        if adam := self._adam():
            try:
                return self._whole.prepare(adam, args, kwargs)
            except _UnusedParameterError:
                self._partial = True
        if self.fallback_reason is None:
            self._gradients.prepare(frozenset(self.parameters), args, kwargs)

    def _backward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Sequence[bool], Tensor]:
        problem = None
        if self.parameters and self.fallback_reason is None and self._adam() is None:
            try:
                loss, finite, used, gradients, largest = self._gradients.replay(
                    frozenset(self.parameters), args, kwargs
                )
            except NotNowError:
                pass
            except NotStaticError as error:
                problem = error
            else:
                had = any(gradient_of(parameter) is not None for parameter in self.parameters.values())
                for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
                    if gradient is not None:
                        if gradient.stride() != parameter.stride():  # fused optimisers expect the parameter's layout
                            gradient = torch.empty_like(parameter).copy_(gradient)
                        before = gradient_of(parameter)
                        parameter.grad = gradient if before is None else before + gradient
                return loss, finite, used, torch.full_like(largest, math.inf) if had else largest
        if self.compiled or self.fallback_reason is not None:
            results = super()._backward(*args, **kwargs)
        else:
            with watched() as heard:
                results = super()._backward(*args, **kwargs)
            self._said += heard
        if problem is not None:  # and not the program's own
            self._gradients.fall_back(str(problem))
        return results

    def _whole_step(self, adam: AdamUpdate, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
        loss, finite, used, gradients, largest = self._step_without_update(args, kwargs, _finite_squares)
        if not all(used) or any(gradient is None for gradient in gradients):
            raise _UnusedParameterError
        return loss, finite, *adam(dict(zip(self.parameters.values(), gradients, strict=True)), finite, largest)

    def _loss_and_gradients(self, names: frozenset[str], args: Any, kwargs: Any) -> tuple[Any, ...]:
        return self._step_without_update(args, kwargs)

    def _step_without_update(self, args: Any, kwargs: Any, is_finite: Callable | None = None) -> tuple[Any, ...]:
        loss_function = getattr(self.objective, "differentiable_loss", self.objective)
        with poutine.trace(param_only=True) as captured:
            loss = torch.as_tensor(loss_function(self.model, self.guide, *args, **kwargs))  # a number, without sites
        known = {id(parameter) for parameter in self.parameters.values()}
        sites = [site["value"].unconstrained() for site in captured.trace.nodes.values()]
        if any(id(parameter) not in known and parameter.requires_grad for parameter in sites):
            raise _NewParametersError
        if any(parameter._post_accumulate_grad_hooks for parameter in self.parameters.values()):
            raise NotStaticError("a hook waits for a parameter's gradient. Mend: register_hook instead")
        free = [parameter for parameter in self.parameters.values() if parameter.requires_grad]
        found = torch.autograd.grad(loss, free, allow_unused=True) if loss.requires_grad else [None] * len(free)
        by_parameter = dict(zip(free, found, strict=True))
        gradients = [by_parameter.get(parameter) for parameter in self.parameters.values()]
        loss = loss.detach().double().reshape(())
        told = torch.zeros_like(loss) if self._tells_no_loss else loss
        finite, largest = (is_finite or _finite)(told, [gradient for gradient in gradients if gradient is not None])
        return loss, finite, self._used(captured.trace), gradients, largest

    def _problem(self, args: Any, kwargs: Any) -> str | None:
        """What is seen of the program before it is recorded: that it prints, and that its loss has gradients of its
        own."""
        if self._said:
            return does_say(self._said)
        if self._looked or not isinstance(self.objective, pyro.infer.ELBO) or not _is_users(type(self.objective)):
            return None
        before = walk([self.model, self.guide, self.objective])
        if before.acting:
            return None
        self._looked = True
        parameters = [*self.parameters.values()]
        left = [parameter.grad for parameter in parameters]
        try:
            with preserved():
                loss, *_, expected, _ = self._step_without_update(args, kwargs)
            with preserved():
                for parameter in parameters:
                    parameter.grad = None
                told = self.loss_and_grads(self._registered(), self.guide, *args, **kwargs)
                found = [parameter.grad for parameter in parameters]
        except Exception:
            return None  # a recording meets it too
        finally:
            for parameter, gradient in zip(parameters, left, strict=True):
                parameter.grad = gradient
            before.restore()
        pairs = [(loss, torch.as_tensor(told, dtype=loss.dtype).detach()), *zip(expected, found, strict=True)]
        if all(_is_close(a, b) for a, b in pairs):
            return None
        name = type(self.objective).__name__
        return (
            f"the loss or the gradients of {name}.loss_and_grads are not those of {name}.differentiable_loss, which "
            "would be recorded. Mend: make them the same function"
        )

    def _loss(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.as_tensor(self.loss(self.model, self.guide, *args, **kwargs), dtype=torch.float64)


class _Flag:
    """A boolean on its way from the device."""

    def __init__(self, flag: Tensor) -> None:
        self.flag, self.event = flag, None
        if flag.is_cuda:
            self.flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def arrived(self) -> bool:
        return self.event is None or self.event.query()

    def __bool__(self) -> bool:
        if self.event is not None:
            self.event.synchronize()
        return bool(self.flag)


class _Step(NamedTuple):
    number: int
    loss: Tensor
    finite: Tensor
    acted: _Flag
    random_state: Any
    buffers: Any
    args: Any
    kwargs: Any


class _Buffers:
    """The values that the buffers of modules had before a step, of those that steps write."""

    def __init__(self) -> None:
        self.first: list[tuple[Tensor, Tensor]] | None = None  # all of them, before the first step
        self.known: list[tuple[Tensor, int]] = []  # not written so far, with their versions
        self.written: list[Tensor] = []

    def __reduce__(self) -> tuple[type, tuple]:
        return _Buffers, ()

    def taken(self, svi: SVI) -> list[tuple[Tensor, Tensor]]:
        if self.first is None:
            every = [part for module in svi.modules.values() for part in module.modules()]
            buffers = {id(b): (b, isinstance(part, _NormBase)) for part in every for b in part.buffers(recurse=False)}
            self.first = [(buffer, buffer.clone()) for buffer, _ in buffers.values()]
            self.written = [buffer for buffer, normalises in buffers.values() if normalises]  # without a new version
            self.known = [(buffer, buffer._version) for buffer, normalises in buffers.values() if not normalises]
            return self.first
        self.first = []
        if self.known:
            self.written += [buffer for buffer, version in self.known if buffer._version != version]
            self.known = [(buffer, version) for buffer, version in self.known if buffer._version == version]
        return [(buffer, buffer.clone()) for buffer in self.written]

    def put_back(self, taken: Sequence[tuple[Tensor, Tensor]]) -> None:
        with torch.no_grad():
            for buffer, before in taken:
                buffer.copy_(before)


class _Registered:
    """A model with a parameter's site that stands for those of modules."""

    def __init__(self, model: Callable) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        value: Any = torch.zeros(())
        value.unconstrained = lambda: value
        message: Any = {
            **{"type": "param", "name": "_modules", "fn": lambda: value, "args": (), "kwargs": {}, "value": None},
            **{"infer": {}, "scale": 1.0, "mask": None, "cond_indep_stack": (), "done": False, "stop": False},
            **{"is_observed": False, "continuation": None, "intermediates": [], "obs": None},
        }
        runtime.apply_stack(message)
        return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _NewParametersError(NotNowError):
    """The program makes parameters that the optimiser does not know yet."""


class _UnusedParameterError(NotNowError):
    """A parameter has no gradient, so that the optimiser leaves it out."""


def _cannot_derive(loss: pyro.infer.ELBO) -> str | None:
    """Why ``loss_and_grads`` are not those of a ``differentiable_loss`` that can be recorded."""
    name = type(loss).__name__
    if own := [base.__name__ for base in type(loss).__mro__ if base.__name__.startswith("Jit") and not _is_users(base)]:
        return f"{name} records the program itself, by torch.jit. Mend: use {own[0].removeprefix('Jit')} in its place"
    names = ("differentiable_loss", "loss_and_grads")
    owners = [next((base for base in type(loss).__mro__ if name in vars(base)), object) for name in names]
    if not vars(loss).keys() & names and owners[0] is not object and issubclass(*owners):
        return None
    return (
        f"{name} has no differentiable_loss to record, or one that its loss_and_grads replaces. Mend: use a loss that "
        "has, like Trace_ELBO"
    )


def _is_users(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in ("pyro", "pyro_vae")


def _is_close(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal up to rounding, or none and zero."""
    if a is None or b is None:
        rest = a if b is None else b
        return rest is None or not bool(rest.any())
    return bool((a - b).norm() <= 1e-3 * b.norm()) or not bool(a.isfinite().all() & b.isfinite().all())


def _parts(loss: Any) -> tuple[Any, ...]:
    return loss if isinstance(loss, tuple) else (loss,)


def _finite(loss: Any, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Whether loss and gradients are finite, and the largest absolute value among the gradients."""
    dense = [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]
    each = [gradient.abs().amax().double() for gradient in dense if gradient.numel()]
    largest = torch.stack(each).amax() if each else torch.zeros_like(torch.as_tensor(loss))
    return (loss - loss) + 0 * largest == 0, largest  # infinity times 0, or less itself, is NaN


def _finite_squares(loss: Any, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """As `_finite`, by the norm of all gradients, which is quicker: no element is larger, up to where its square is 0,
    and what is not finite, or has too large a square, makes it so."""
    dense = [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]
    each = [gradient.square().sum().double() for gradient in dense if gradient.numel()]
    squares = sum(each, torch.zeros_like(torch.as_tensor(loss)))  # a stack would cost a view for each
    floor = max((torch.finfo(gradient.dtype).tiny ** 0.5 for gradient in dense), default=0.0)
    largest = squares.sqrt() + floor
    return (loss - loss) + 0 * largest == 0, largest


def modules_of(**programs: Any) -> dict[str, nn.Module]:
    """The modules among programs; that of a bound method is the object that it is bound to."""
    owners = {name: getattr(program, "__self__", program) for name, program in programs.items()}
    return {name: owner for name, owner in owners.items() if isinstance(owner, nn.Module)}


def load_modules(modules: Mapping[str, nn.Module], state: Mapping[str, Any]) -> None:
    """Load each module's weights, all or none.

    Raises:
        ValueError: a weight is missing, left over, or has another shape.
    """
    for name, module in modules.items():
        have = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        given = {key: tuple(value.shape) for key, value in state.get(name, {}).items()}
        if have != given:
            key = min(key for key in have.keys() | given.keys() if have.get(key) != given.get(key))
            raise ValueError(
                f"expected {name} weight {key!r} of shape {have.get(key, 'absent')}, got {given.get(key, 'absent')} in "
                "the checkpoint: it belongs to another architecture; build the model and guide as they were "
                "trained (and call a guide that makes its parameters at its first call once, on data)"
            )
    for name, module in modules.items():
        module.load_state_dict(state[name])


class _Captured(poutine.trace_messenger.TraceMessenger):
    """Traces parameters, and keeps those of modules that come under the name of another: that and this."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.others: dict[str, tuple[Tensor, Tensor]] = {}

    def _pyro_post_param(self, message: Any) -> None:
        super()._pyro_post_param(message)
        value = message["value"].unconstrained()
        for given in message["args"][1:2]:
            if isinstance(given, nn.Parameter) and given is not value:
                self.others.setdefault(message["name"], (value, given))


class _Site(NamedTuple):
    words: str
    mend: str


def _broken_sites(trace: poutine.Trace) -> Iterator[_Site]:
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
            continue
        fn, value = site["fn"], torch.as_tensor(site["value"])
        base = fn
        while hasattr(base, "base_dist"):
            base = base.base_dist
        kind = type(base).__name__
        arguments = ((key, getattr(base, key, None)) for key in getattr(base, "arg_constraints", {}))
        wrong = [key for key, each in arguments if isinstance(each, Tensor) and not bool(each.isfinite().all())]
        if not bool(value.isfinite().all()) and site["is_observed"]:
            yield _Site(f'site "{name}", whose value is not finite', f'data for "{name}" without NaN and infinity')
        elif wrong:
            yield _Site(
                f'site "{name}", whose {kind} has a {wrong[0]} that is not finite',
                f"another scale of what {wrong[0]} is computed from; where step 1 was finite, a smaller learning rate "
                "or clip_norm=...",
            )
        elif not bool(value.isfinite().all()):
            yield _Site(
                f'site "{name}", whose value is not finite',
                f"float64, or a {kind} without draws at the ends of its support",
            )
        elif not bool(fn.log_prob(site["value"]).isfinite().all()):
            yield _Site(
                f'site "{name}", whose log-probability is not finite',
                f'values of "{name}" inside the support of its {kind}, another scale of the data, or float64',
            )
