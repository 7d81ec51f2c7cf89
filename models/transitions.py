"""What state-space models are declared from: initial distributions, transitions, emissions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..config import Configured
from ..distributions import folded
from ..nn import MLP, bind
from .likelihoods import Bernoulli, Likelihood

__all__ = [
    "Emission",
    "FirstStep",
    "GatedTransition",
    "Initial",
    "LinearTransition",
    "MLPTransition",
    "NormalTransition",
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
        if u is None or self.inputs is None:
            return self._around(self.mean.expand(*(() if u is None else u.shape[:-1]), -1))
        return self._around(self.mean + self.inputs(u))


class FirstStep(Configured, nn.Module):
    """``p(z_1) = transition(z_0, u_1)`` with z_0 a parameter.

    Example:
        >>> FirstStep(LinearTransition(2), latent_dim=2)().event_shape
        torch.Size([2])
    """

    def __init__(self, transition: Callable[..., dist.Distribution], latent_dim: int) -> None:
        super().__init__()
        self.transition = transition
        self.before = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, u: Tensor | None = None) -> dist.Distribution:
        return self.transition(self.before) if u is None else self.transition(self.before, u)


class NormalTransition(_Normal):
    """``p(z_t | z_{t-1}, u_t) = N(f(z_{t-1}, u_t), diag s^2)`` for any function f.

    Args:
        mean: f, of z (N, Z) or of z and u (N, C).
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
        return self._around(folded(self.mean, z) if u is None else folded(self.mean, z, u))


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
        return self.likelihood(folded(self.network, _joined(z, u)))


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
