"""State-space models: latent Markov chains that emit sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..config import Configured
from ..distributions import MarkovChain, WithMissing
from ..nn import MLP, bind, positive
from ..sequences import Steps, steps_of
from .likelihoods import Bernoulli, Likelihood

__all__ = [
    "Emission",
    "Filtered",
    "GatedTransition",
    "Initial",
    "LinearTransition",
    "MLPTransition",
    "NormalTransition",
    "StateSpaceModel",
]

Scale = float | Literal["learned"]


def _scale(scale: Scale, dim: int) -> Tensor | nn.Parameter:
    """Its logarithm, (dim,): a parameter where it is learned, from 1 on."""
    if scale == "learned":
        return nn.Parameter(torch.zeros(dim))
    if not scale > 0:
        raise ValueError(f"expected a positive scale or 'learned', got {scale!r}")
    return torch.full((dim,), float(scale)).log()


class _Normal(Configured, nn.Module):
    """Base: a normal distribution whose scales are one number for each dimension, fixed or learned."""

    log_scale: Tensor

    def _set_scale(self, scale: Scale, dim: int) -> None:
        value = _scale(scale, dim)
        if isinstance(value, nn.Parameter):
            self.log_scale = value
        else:
            self.register_buffer("log_scale", value)

    def _around(self, mean: Tensor) -> dist.Distribution:
        return dist.Normal(mean, self.log_scale.exp()).to_event(1)


class Initial(_Normal):
    """``p(z_1) = N(m, diag s^2)``, with inputs ``N(m + B u_1, diag s^2)``.

    Args:
        scale: s, or "learned", from 1 on.
        learned_mean: whether m is a parameter; else it is 0.

    Example:
        >>> Initial(3)().event_shape
        torch.Size([3])
    """

    def __init__(
        self, latent_dim: int, num_inputs: int = 0, scale: Scale = "learned", learned_mean: bool = True
    ) -> None:
        super().__init__()
        self.mean: Tensor
        if learned_mean:
            self.mean = nn.Parameter(torch.zeros(latent_dim))
        else:
            self.register_buffer("mean", torch.zeros(latent_dim))
        self.inputs = nn.Linear(num_inputs, latent_dim, bias=False) if num_inputs else None
        self._set_scale(scale, latent_dim)

    def forward(self, u: Tensor | None = None) -> dist.Distribution:
        return self._around(self.mean if self.inputs is None else self.mean + self.inputs(u))


class NormalTransition(_Normal):
    """``p(z_t | z_{t-1}, u_t) = N(f(z_{t-1}, u_t), diag s^2)`` for any function f.

    Args:
        mean: f, of z (..., Z) or of z and u (..., C).
        scale: s, or "learned", from 1 on.

    Example:
        >>> NormalTransition(lambda z: z + 2 * z.sin(), latent_dim=1, scale=5**0.5)(torch.zeros(4, 1)).batch_shape
        torch.Size([4])
    """

    mean: Any

    def __init__(self, mean: Callable[..., Tensor], latent_dim: int, scale: Scale = "learned") -> None:
        super().__init__()
        self.mean = mean
        self._set_scale(scale, latent_dim)

    def forward(self, z: Tensor, u: Tensor | None = None) -> dist.Distribution:
        return self._around(self.mean(z) if u is None else self.mean(z, u))


class LinearTransition(NormalTransition):
    """``p(z_t | z_{t-1}, u_t) = N(A z_{t-1} + B u_t + b, diag s^2)``, A the identity before training.

    Example:
        >>> LinearTransition(2)(torch.tensor([1.0, 2.0])).mean.tolist()
        [1.0, 2.0]
    """

    def __init__(self, latent_dim: int, num_inputs: int = 0, scale: Scale = "learned") -> None:
        super().__init__(_Joined(_identity(latent_dim, num_inputs)), latent_dim, scale)


class MLPTransition(NormalTransition):
    """``p(z_t | z_{t-1}, u_t) = N(z_{t-1} + f(z_{t-1}, u_t), diag s^2)``, f a network.

    Example:
        >>> MLPTransition(2, num_inputs=1)(torch.zeros(5, 2), torch.zeros(5, 1)).batch_shape
        torch.Size([5])
    """

    def __init__(
        self, latent_dim: int, num_inputs: int = 0, network: MLP | None = None, scale: Scale = "learned"
    ) -> None:
        network = MLP(hidden=(64,), activation="tanh") if network is None else network
        super().__init__(_Residual(bind(network, (latent_dim + num_inputs,), (latent_dim,))), latent_dim, scale)


class GatedTransition(Configured, nn.Module):
    """The gated transition of deep Markov models (arXiv 1609.09869), v = (z_{t-1}, u_t)::

        g = sigmoid(W_2 relu(W_1 v)),  h = W_4 relu(W_3 v),  mean = (1 - g) (W_5 v) + g h,  s = softplus(W_6 relu(h))

    with biases; W_5 v is z before training.

    Example:
        >>> GatedTransition(latent_dim=3, hidden=10)(torch.zeros(5, 3)).batch_shape
        torch.Size([5])
    """

    def __init__(self, latent_dim: int, hidden: int = 200, num_inputs: int = 0) -> None:
        super().__init__()
        width = latent_dim + num_inputs
        self.gate = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, latent_dim))
        self.proposal = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, latent_dim))
        self.linear, self.scale = _identity(latent_dim, num_inputs), nn.Linear(latent_dim, latent_dim)

    def forward(self, z: Tensor, u: Tensor | None = None) -> dist.Distribution:
        v = _joined(z, u)
        g, h = self.gate(v).sigmoid(), self.proposal(v)
        mean = (1 - g) * self.linear(v) + g * h
        return dist.Normal(mean, softplus(self.scale(h.relu()))).to_event(1)


class Emission(Configured, nn.Module):
    """``p(x_t | z_t, u_t)``: a likelihood of what a network makes of z and u.

    Example:
        >>> Emission(latent_dim=3, event_dim=88)(torch.zeros(5, 7, 3)).batch_shape
        torch.Size([5, 7])
    """

    def __init__(
        self,
        latent_dim: int,
        event_dim: int,
        likelihood: Likelihood | None = None,
        network: nn.Module | None = None,
        num_inputs: int = 0,
    ) -> None:
        super().__init__()
        self.likelihood = bind(Bernoulli() if likelihood is None else likelihood, (event_dim,))
        self.network = bind(
            MLP(hidden=(100, 100)) if network is None else network,
            (latent_dim + num_inputs,),
            (self.likelihood.num_parameters, event_dim),
        )

    def forward(self, z: Tensor, u: Tensor | None = None) -> dist.Distribution:
        return self.likelihood(self.network(_joined(z, u)))


class Filtered(NamedTuple):
    """What a particle filter tells of B sequences of T steps by K particles.

    Attributes:
        z: (K, B, T, Z), particles of each step given x up to and with it; log_weights: (K, B, T), normalised.
        predicted: (B, T, D), E[x_t | x_<t].
        per_step: (B, T), ln p(x_t | x_<t) in nats, 0 at steps without observations.
        ess: (B, T), effective numbers of particles, before resampling.
    """

    z: Tensor
    log_weights: Tensor
    predicted: Tensor
    per_step: Tensor
    ess: Tensor

    @property
    def log_evidence(self) -> Tensor:
        """(B,), ln p(x) in nats: its exponential is unbiased."""
        return self.per_step.sum(-1)

    @property
    def mean(self) -> Tensor:
        """(B, T, Z), E[z_t | x_<=t]."""
        return (self.log_weights.exp()[..., None] * self.z).sum(0)


class StateSpaceModel(Configured, PyroModule):
    """A latent chain that emits a sequence, for each of B data::

        z_1 ~ initial(u_1),  z_t ~ transition(z_{t-1}, u_t),  x_t ~ emission(z_t, u_t)

    Sites ``"z"``, (B, T, Z), and ``"x"``, (B, T, D), in the plate ``"data"``. The arguments are modules, called with
    any leading batch shape, without u where there are no inputs, that return distributions.

    Args of a call:
        x: (B, T, D), or None: then sequences are drawn, `num_data` of `num_steps`.
        u: (B, T, C), inputs; u_t acts on the step that produces z_t.
        lengths: (B,), how many steps of each sequence are there; mask: (B, T) or (B, T, D), what of them is observed
            (arXiv 1609.09869 leaves out the same way). What x holds elsewhere changes nothing.

    Example:
        >>> model = StateSpaceModel(Initial(2), LinearTransition(2), Emission(2, 5))
        >>> model(num_data=3, num_steps=7).shape
        torch.Size([3, 7, 5])
    """

    def __init__(
        self,
        initial: Callable[..., dist.Distribution],
        transition: Callable[..., dist.Distribution],
        emission: Callable[..., dist.Distribution],
        num_inputs: int = 0,
    ) -> None:
        super().__init__()
        self.initial, self.transition, self.emission, self.num_inputs = initial, transition, emission, num_inputs
        u = (torch.zeros(1, num_inputs),) if num_inputs else ()
        with torch.no_grad():
            first = initial(*u)
            self.latent_dim = first.event_shape[-1]
            self.event_dim = emission(torch.zeros(1, self.latent_dim), *u).event_shape[-1]

    def forward(
        self,
        x: Tensor | None = None,
        u: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        num_data: int | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        self._check(x, u, num_data, num_steps)
        B, T = (num_data, num_steps) if x is None else x.shape[:2]
        if u is not None:
            B, T = u.shape[:2]
        steps = None if x is None else steps_of(x, lengths, mask)
        there = None if steps is None else steps.there
        first, every = ((), ()) if u is None else ((u[:, 0],), (u,))
        with pyro.plate("data", B):
            z = pyro.sample("z", MarkovChain(self.initial(*first), self.transition, int(T), u, there))  # type: ignore[arg-type]
            p = self.emission(z, *every)
            if steps is None:
                return pyro.sample("x", p.to_event(1))
            x, observed = steps.x, steps.observed
            if observed is not None and observed.dim() == 3:
                x, p = torch.where(observed, x, torch.nan), WithMissing(p)
            elif observed is not None:
                p = p.mask(observed)
            return pyro.sample("x", p.to_event(1), obs=x)

    @torch.no_grad()
    def filter(
        self,
        x: Tensor,
        u: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        num_particles: int = 1000,
    ) -> Filtered:
        """A particle filter that proposes from the transition (Gordon et al. 1993)::

            z_t^k ~ p(z_t | z_{t-1}^k),  w_t^k = w_{t-1}^k p(x_t | z_t^k)

        Particles are drawn anew, by systematic resampling, where their effective number is below half of them. Without
        inputs from the future nothing of the future is used; its cost is `num_particles` times that of a draw.

        Example:
            >>> model = StateSpaceModel(Initial(2), LinearTransition(2), Emission(2, 5))
            >>> model.filter(torch.ones(3, 7, 5), num_particles=20).log_evidence.shape
            torch.Size([3])
        """
        self._check(x, u, None, None)
        K, (B, T, _) = positive("num_particles", num_particles), x.shape
        steps = steps_of(x, lengths, mask)
        equal = -math.log(K)
        log_w = x.new_full((K, B), equal)
        found: list[tuple[Tensor, ...]] = []
        z = x.new_empty(K, B, self.latent_dim)
        for t in range(T):
            inputs = () if u is None else (u[:, t],)
            p = self.initial(*inputs).expand([K, B]) if t == 0 else self.transition(z, *inputs)
            z = p.sample()
            emission = self.emission(z, *inputs)
            predicted = (log_w.exp()[..., None] * emission.mean).sum(0)
            log_p = self._observed(emission, steps, t)
            per_step = (log_w + log_p).logsumexp(0)
            log_w = log_w + log_p - per_step
            ess = (-(2 * log_w).logsumexp(0)).exp()
            found.append((z, log_w, predicted, per_step, ess))
            ancestors = torch.where(ess < K / 2, _systematic(log_w), torch.arange(K, device=x.device)[:, None])
            z = z.gather(0, ancestors[..., None].expand_as(z))
            log_w = torch.where(ess < K / 2, equal, log_w)
        z, log_w, predicted, per_step, ess = (torch.stack(each, -1) for each in zip(*found, strict=True))
        return Filtered(z.mT, log_w, predicted.mT, per_step, ess)

    @torch.no_grad()
    def smooth(self, guide: Callable, x: Tensor, *args: Tensor, num_samples: int = 100, **kwargs: Tensor) -> Tensor:
        """Draws of q(z | x), (S, B, T, Z), with the guide's other arguments: u, lengths, mask."""
        with pyro.plate("_draws", positive("num_samples", num_samples), dim=-2):
            trace = poutine.trace(guide).get_trace(x, *args, **kwargs)
        z = trace.nodes["z"]["value"]
        return z.expand(num_samples, *z.shape[-3:])

    @torch.no_grad()
    def forecast(
        self,
        guide: Callable,
        x: Tensor,
        u: Tensor | None = None,
        u_future: Tensor | None = None,
        *,
        num_steps: int | None = None,
        num_samples: int = 100,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Draws of what follows x, (S, B, H, D): z at the last step by the guide, then the model's own steps.

        Args:
            u_future: (B, H, C), inputs from the first step after x on; num_steps: H, where there are none.

        Example:
            >>> from pyro_vae.guides import StateSpaceGuide
            >>> model = StateSpaceModel(Initial(2), LinearTransition(2), Emission(2, 5))
            >>> model.forecast(StateSpaceGuide(model), torch.ones(3, 7, 5), num_steps=4, num_samples=10).shape
            torch.Size([10, 3, 4, 5])
        """
        self._check(x, u, None, None)
        if (u_future is None) == bool(self.num_inputs) or (u_future is None) == (num_steps is None):
            raise ValueError(
                f"expected {'u_future' if self.num_inputs else 'num_steps'} and it alone, for a model of "
                f"{self.num_inputs} inputs: as many steps are drawn"
            )
        H = positive("num_steps", num_steps if u_future is None else u_future.shape[1])  # type: ignore[arg-type]
        options = {name: value for name, value in (("lengths", lengths), ("mask", mask)) if value is not None}
        z = self.smooth(guide, x, *(() if u is None else (u,)), num_samples=num_samples, **options)
        there = steps_of(x, lengths, mask).there
        last = torch.full((len(x),), x.shape[1] - 1, device=x.device) if there is None else there.sum(1) - 1
        z = z[:, torch.arange(len(x), device=x.device), last]
        found = []
        for t in range(H):
            inputs = () if u_future is None else (u_future[:, t],)
            z = self.transition(z, *inputs).sample()
            found.append(self.emission(z, *inputs).sample())
        return torch.stack(found, 2)

    @torch.no_grad()
    def impute(
        self,
        guide: Callable,
        x: Tensor,
        u: Tensor | None = None,
        *,
        mask: Tensor,
        lengths: Tensor | None = None,
        num_samples: int = 100,
    ) -> Tensor:
        """Draws (S, B, T, D) of x where it is not observed, by the guide and the emission; x elsewhere.

        Without `lengths` all steps are there, the last ones too where they are not observed.
        """
        lengths = torch.full((len(x),), x.shape[1], device=x.device) if lengths is None else lengths
        z = self.smooth(guide, x, *(() if u is None else (u,)), num_samples=num_samples, mask=mask, lengths=lengths)
        drawn = self.emission(z, *(() if u is None else (u,))).sample()
        return torch.where(mask.bool() if mask.dim() == 3 else mask.bool()[..., None], x, drawn)

    def _observed(self, emission: Any, steps: Steps, t: int) -> Tensor:
        """``ln p(x_t | z_t)`` of what is observed, (K, B)."""
        x, observed = steps.x[:, t], steps.observed
        if observed is None:
            return emission.log_prob(x)
        if observed.dim() == 3:
            return WithMissing(emission).log_prob(torch.where(observed[:, t], x, torch.nan))
        return torch.where(observed[:, t], emission.log_prob(x), 0.0)

    def _check(self, x: Tensor | None, u: Tensor | None, num_data: int | None, num_steps: int | None) -> None:
        if (u is not None) != bool(self.num_inputs):
            came = "none" if u is None else f"some of shape {tuple(u.shape)}"
            raise ValueError(f"expected {self.num_inputs} inputs at each step, got {came}: see num_inputs of the model")
        if x is None and u is None and (num_data is None or num_steps is None):
            raise ValueError("expected data x, or num_data=... and num_steps=..., got neither: how much is to be drawn")
        if x is not None and u is not None and x.shape[:2] != u.shape[:2]:
            raise ValueError(f"expected inputs u for each step of x, got {tuple(u.shape)} for {tuple(x.shape)}")


class _Joined(nn.Module):
    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor, u: Tensor | None = None) -> Tensor:
        return self.function(_joined(z, u))


class _Residual(_Joined):
    def forward(self, z: Tensor, u: Tensor | None = None) -> Tensor:
        return z + super().forward(z, u)


def _identity(latent_dim: int, num_inputs: int) -> nn.Linear:
    """Linear in (z, u), and z before training."""
    linear = nn.Linear(latent_dim + num_inputs, latent_dim)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(latent_dim, latent_dim + num_inputs))
        linear.bias.zero_()
    return linear


def _joined(z: Tensor, u: Tensor | None) -> Tensor:
    """(z, u) of a common batch shape."""
    if u is None:
        return z
    shape = torch.broadcast_shapes(z.shape[:-1], u.shape[:-1])
    return torch.cat([z.expand(*shape, -1), u.expand(*shape, -1)], -1)


def _systematic(log_w: Tensor) -> Tensor:
    """Ancestors (K, B) for normalised log-weights (K, B): K points, equally spaced from a random start."""
    K, B = log_w.shape
    points = (torch.rand(B, dtype=log_w.dtype, device=log_w.device)[:, None] + torch.arange(K).to(log_w)) / K
    ends = log_w.exp().cumsum(0).mT.contiguous()
    return torch.searchsorted(ends, points.contiguous()).clamp(max=K - 1).mT
