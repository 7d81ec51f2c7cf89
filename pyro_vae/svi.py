"""Pyro's SVI with one torch optimiser over all parameters, and a gate that no NaN passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import pyro
import pyro.infer
import torch
from pyro import poutine
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from pyro.params.param_store import normalize_param_name
from torch import Tensor, nn

__all__ = ["SVI", "NonFiniteLossError", "Optimizer", "latent_scale"]

Optimizer: TypeAlias = PyroOptim | Callable[[Any], torch.optim.Optimizer]


class NonFiniteLossError(ArithmeticError):
    """The loss or a gradient is NaN or infinite; the parameters are those of the step before."""


class LatentScale(poutine.messenger.Messenger):
    """Scales every latent site's log-probability, in model and guide alike: a weight on the ELBO's KL term."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, message: dict[str, Any]) -> None:
        if not message["is_observed"] and type(message["fn"]).__name__ != "_Subsample":
            message["scale"] = message["scale"] * self.weight


def latent_scale(weight: float, device: torch.device | str = "cpu") -> contextlib.AbstractContextManager:
    """In this context an ELBO is ``E_q[log p(x|z)] - weight * (E_q[log q(z|x)] - E_q[log p(z)])``, weight > 0.

    Example:
        >>> with latent_scale(0.5):
        ...     trace = poutine.trace(pyro.sample).get_trace("z", pyro.distributions.Normal(0, 1))
        >>> trace.nodes["z"]["scale"]
        tensor(0.5000)
    """
    if not weight > 0:
        raise ValueError(f"expected a KL weight > 0, got {weight}")
    return LatentScale(torch.tensor(weight, device=device))


class SVI(pyro.infer.SVI):
    """`pyro.infer.SVI` for training loops: the same losses from the same draws.

    It differs in three things. `optim` may also be any callable from parameters to a torch optimiser, such as
    ``functools.partial(torch.optim.Adam, lr=1e-3)``, and a `pyro.optim` one is run as one torch optimiser over all
    parameters, `optimizer` (and its scheduler `scheduler`), made at the first step. The parameters are those of the
    modules (model, guide, loss) and of every ``pyro.param``. A loss or gradient that is not finite raises before the
    optimiser acts.

    Raises:
        NonFiniteLossError: names the step, the site and the parameter.
        ValueError: there is nothing to optimise.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> model = VAE((4,), latent_dim=2)
        >>> svi = SVI(model, AmortizedGuide(model), pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO())
        >>> svi.step(torch.ones(10, 4)) > 0
        True
    """

    def __init__(
        self, model: Callable, guide: Callable, optim: Optimizer, loss: Any, *, clip_norm: float | None = None
    ) -> None:
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"expected clip_norm > 0, got {clip_norm}: give a positive number")
        if getattr(loss, "num_particles", 1) < 1:
            raise ValueError(
                f"expected a loss with num_particles >= 1, got {loss.num_particles}: give a positive number"
            )
        super().__init__(model, guide, optim if isinstance(optim, PyroOptim) else PyroOptim(optim, {}), loss)
        self.objective = loss
        self.clip_norm = clip_norm
        self.steps = 0
        self.parameters: dict[str, Tensor] = {}
        self.settings: list[dict[str, Any]] = []  # of the optimiser's groups, as given
        self.optimizer: torch.optim.Optimizer
        self.scheduler: Any = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        return modules_of(model=self.model, guide=self.guide, loss=self.objective)

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        """Run model and guide once, with Pyro's validation on, to collect parameters; random state and buffers stay."""
        with torch.random.fork_rng(), torch.no_grad(), pyro.validation_enabled(True):
            buffers = [(b, b.clone()) for module in self.modules.values() for b in module.buffers()]
            self.loss(self.model, self.guide, *args, **kwargs)
            for buffer, before in buffers:
                buffer.copy_(before)
        self._collect()

    def step_async(self, *args: Any, **kwargs: Any) -> Tensor:
        """A step; returns the loss as a scalar tensor."""
        random_state = get_random_state()
        loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
        loss = torch.as_tensor(loss[0] if isinstance(loss, tuple) else loss, dtype=torch.float64).detach()
        if len(pyro.get_param_store()) + len(self.modules) != self._collected:
            self._collect()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None and p.numel()]
        largest = torch.stack(torch._foreach_norm(gradients, torch.inf)) if gradients else loss
        if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(largest).all()):
            raise self._diagnosis(loss, random_state, args, kwargs)
        if self.clip_norm is not None:
            norm = torch.nn.utils.get_total_norm(gradients)
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip_norm, norm)
        for parameter, clip in self._clips:
            clip(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return loss

    def step(self, *args: Any, **kwargs: Any) -> float:
        """A step of the optimiser; returns the loss in nats, summed over the batch."""
        return self.step_async(*args, **kwargs).item()

    _collected = -1

    def _collect(self) -> None:
        """Find the parameters; those that are new since the last time join the optimiser."""
        store = pyro.get_param_store()
        found: dict[str, Tensor] = {
            f"{program}.{name}": parameter
            for program, module in self.modules.items()
            for name, parameter in module.named_parameters()
        }
        known = {id(parameter) for parameter in found.values()}
        found |= {f"param.{name}": p for name, p in store.named_parameters() if id(p) not in known}
        unique = {id(p): (name, p) for name, p in reversed(found.items()) if p.requires_grad}
        old = {id(parameter) for parameter in self.parameters.values()}
        new = {name: p for name, p in reversed(unique.values()) if id(p) not in old}
        self._collected = len(store) + len(self.modules)
        if not new and not self.parameters:
            raise ValueError("expected parameters to optimise, got none in model, guide and loss")
        if new:
            groups = self._groups(new)
            self.settings += [{key: value for key, value in group.items() if key != "params"} for group in groups]
            if self.parameters:
                for group in groups:
                    self.optimizer.add_param_group(group)
            else:
                try:
                    self.optimizer = self.optim.pt_optim_constructor(groups)
                except ValueError as error:
                    raise ValueError(
                        f"expected arguments that the optimiser takes, got {error}: correct them"
                    ) from None
                groups = self.optimizer.param_groups
                self.settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
                if isinstance(self.optim, PyroLRScheduler):
                    self.scheduler = self.optim.pt_scheduler_constructor(self.optimizer, **self.optim.kwargs)
            self.parameters |= new
        clips = [(p, self.optim._get_grad_clip(p)) for p in self.parameters.values()]
        self._clips = [(parameter, clip) for parameter, clip in clips if clip is not None]

    def _groups(self, parameters: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """The parameters, in groups of equal optimiser arguments."""
        arguments = self.optim.pt_optim_args
        if not callable(arguments):
            return [{"params": list(parameters.values()), **arguments}]
        groups: list[dict[str, Any]] = []
        for name, parameter in parameters.items():
            wanted = arguments(normalize_param_name(pyro.get_param_store().param_name(parameter) or name))
            for group in groups:
                if {key: value for key, value in group.items() if key != "params"} == wanted:
                    group["params"].append(parameter)
                    break
            else:
                groups.append({"params": [parameter], **wanted})
        return groups

    def _diagnosis(self, loss: Tensor, random_state: Any, args: Any, kwargs: Any) -> NonFiniteLossError:
        broken = [
            name for name, p in self.parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all())
        ]
        set_random_state(random_state)
        self.optimizer.zero_grad()
        with torch.no_grad(), pyro.validation_enabled(False):
            guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(self.model, guide_trace)).get_trace(*args, **kwargs)
        sites = [site for trace in (guide_trace, model_trace) for site in _broken_sites(trace)]
        set_random_state(random_state)
        return NonFiniteLossError(
            f"step {self.steps + 1}: the loss is {loss.item()}; "
            + (f"first at {sites[0]}; " if sites else "every site is finite; ")
            + (f"the gradient of parameter {broken[0]!r} is not finite" if broken else "gradients are finite")
            + f" ({len(broken)} of {len(self.parameters)}). The parameters are still those of step {self.steps}. "
            "Mend: a smaller learning rate, clip_norm=..., or another scale of the data"
        )

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on: parameters, buffers, optimiser and step."""
        state: dict[str, Any] = {name: module.state_dict() for name, module in self.modules.items()}
        state["params"] = {name: parameter.detach() for name, parameter in self._params().items()}
        state["optimizer"] = self.optimizer.state_dict()
        state["optimizer_class"] = type(self.optimizer).__name__
        state["scheduler"] = self.scheduler.state_dict() if self.scheduler else None
        state["steps"] = self.steps
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; call `initialize` before.

        Raises:
            ValueError: the state belongs to other modules or parameters; nothing has been changed then.
        """
        if state["optimizer_class"] != (now := type(self.optimizer).__name__):
            raise ValueError(
                f"expected {state['optimizer_class']}, the optimiser of the checkpoint, got {now}: go on with the same"
            )
        params = self._params()
        shapes = [{name: tuple(value.shape) for name, value in table.items()} for table in (params, state["params"])]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"expected the pyro.param values {shapes[0]}, got {shapes[1]} in the checkpoint: use the functions "
                "that it was trained with; a parameter that appears only after the first step cannot be taken up again"
            )
        load_modules(self.modules, state)
        with torch.no_grad():
            for name, value in state["params"].items():
                params[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
        self.steps = state["steps"]

    def _params(self) -> dict[str, Tensor]:
        """The values of ``pyro.param`` statements that are no parameters of modules, unconstrained."""
        of_modules = {id(p) for module in self.modules.values() for p in module.parameters()}
        return {name: p for name, p in pyro.get_param_store().named_parameters() if id(p) not in of_modules}


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


def _broken_sites(trace: poutine.Trace) -> Iterator[str]:
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
            continue
        if not bool(torch.isfinite(torch.as_tensor(site["value"])).all()):
            yield f'site "{name}", whose value is not finite'
        elif not bool(torch.isfinite(site["fn"].log_prob(site["value"])).all()):
            yield f'site "{name}", whose log-probability is not finite'


def get_random_state() -> dict[str, Any]:
    """The state of torch's generators on the CPU and, where CUDA is in use, on each device."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
