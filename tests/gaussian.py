"""Exact answers for linear-Gaussian state-space models, by the dense joint distribution of all steps."""

import numpy as np
import pyro.distributions as dist
import torch
from torch import nn

from pyro_vae.models import StateSpaceModel, likelihoods
from pyro_vae.models.transitions import Emission, Initial, LinearTransition, NormalTransition


class Linear:
    """z_1 ~ N(m, P), z_t ~ N(A z_{t-1} + b, Q), x_t ~ N(C z_t + d, R), for T steps."""

    def __init__(self, T, A, b, Q, C, d, R, m, P):
        self.T, self.A, self.b, self.Q, self.C, self.d, self.R, self.m, self.P = T, A, b, Q, C, d, R, m, P
        Z = len(b)
        means, blocks = [m], [[None] * T for _ in range(T)]
        blocks[0][0] = P
        for t in range(1, T):
            means.append(A @ means[-1] + b)
            for s in range(t):
                blocks[t][s] = A @ blocks[t - 1][s]
                blocks[s][t] = blocks[t][s].mT
            blocks[t][t] = A @ blocks[t - 1][t - 1] @ A.mT + Q
        self.mean = torch.cat(means)
        self.covariance = torch.cat([torch.cat(row, 1) for row in blocks])
        self.emit = torch.block_diag(*[C] * T)
        self.noise = torch.block_diag(*[R] * T)
        self.of_x = torch.distributions.MultivariateNormal(
            self.emit @ self.mean + d.repeat(T), self.emit @ self.covariance @ self.emit.mT + self.noise
        )
        self.Z = Z

    def log_evidence(self, x):
        """(N,), for x (N, T, D)."""
        return self.of_x.log_prob(x.flatten(1))

    def smoothed(self, x):
        """Means (N, T, Z) and the covariance (T Z, T Z) of z given all of x."""
        gain = self.covariance @ self.emit.mT @ torch.linalg.inv(self.of_x.covariance_matrix)
        mean = self.mean + (x.flatten(1) - self.of_x.mean) @ gain.mT
        return mean.unflatten(1, (self.T, self.Z)), self.covariance - gain @ self.emit @ self.covariance

    def conditionals(self, x):
        """Of z_t given z_{t-1} and all of x: gains (T, Z, Z), offsets (N, T, Z), covariances (T, Z, Z)."""
        mean, covariance = self.smoothed(x)
        Z, gains, offsets, covariances = self.Z, [], [], []
        for t in range(self.T):
            now = slice(t * Z, (t + 1) * Z)
            if t == 0:
                gains.append(torch.zeros(Z, Z, dtype=x.dtype))
                offsets.append(mean[:, 0])
                covariances.append(covariance[now, now])
                continue
            before = slice((t - 1) * Z, t * Z)
            gain = covariance[now, before] @ torch.linalg.inv(covariance[before, before])
            gains.append(gain)
            offsets.append(mean[:, t] - mean[:, t - 1] @ gain.mT)
            covariances.append(covariance[now, now] - gain @ covariance[before, now])
        return torch.stack(gains), torch.stack(offsets, 1), torch.stack(covariances)


def walk(T):
    """A linear model of one number, and its dense joint distribution."""
    torch.manual_seed(0)
    model = StateSpaceModel(
        Initial(1, scale=1.0),
        LinearTransition(1, scale=0.5),
        Emission(1, 1, likelihoods.Normal(initial_scale=0.4), nn.Sequential(nn.Linear(1, 1), nn.Unflatten(-1, (1, 1)))),
    )
    with torch.no_grad():
        linear, transition = model.emission.network[0], model.transition.mean.function
        noise = model.emission(torch.zeros(1, 1)).variance
        parts = (transition.weight, transition.bias, torch.full((1, 1), 0.25), linear.weight, linear.bias)
        return model, Linear(T, *parts, noise.view(1, 1), torch.zeros(1), torch.eye(1))


class Driven:
    """A linear model of one number whose parts read x_{t-1} and u_t, with weights that all differ."""

    def __init__(self, scale=0.5):
        torch.manual_seed(3)
        self.scale = scale
        self.emit = nn.Linear(3, 1)
        self.model = StateSpaceModel(
            Initial(1, 2, scale), LinearTransition(1, 2, scale), _Emission(self.emit, scale), num_inputs=1, feedback=1
        )
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(0.6 * torch.randn_like(parameter))

    def next_state(self, z, x, u):
        return self.model.transition.mean.function(torch.stack([z, x, u], -1)).squeeze(-1)

    def emitted(self, z, x, u):
        return self.emit(torch.stack([z, x, u], -1)).squeeze(-1)

    def joint(self, u, seen):
        """Of (z_1 ... z_T, x_1 ... x_T) for inputs u (T,) of one sequence, of which x is observed where seen (T,): what
        is not acts as 0."""
        T, start = len(u), self.model.initial
        first, step, emit = start.inputs.weight[0], self.model.transition.mean.function, self.emit
        F, c = torch.zeros(2 * T, 2 * T), torch.zeros(2 * T)
        for t in range(T):
            c[t] = start.mean[0] + first[1] * u[0] if t == 0 else step.bias[0] + step.weight[0, 2] * u[t]
            c[T + t] = emit.bias[0] + emit.weight[0, 2] * u[t]
            F[T + t, t] = emit.weight[0, 0]
            if t:
                F[t, t - 1] = step.weight[0, 0]
                F[t, T + t - 1], F[T + t, T + t - 1] = seen[t - 1] * step.weight[0, 1], seen[t - 1] * emit.weight[0, 1]
        inverse = torch.linalg.inv(torch.eye(2 * T) - F)
        return inverse @ c, self.scale**2 * inverse @ inverse.mT


class _Emission(nn.Module):
    def __init__(self, linear, scale):
        super().__init__()
        self.linear, self.scale = linear, scale

    def forward(self, z, v):
        return dist.Normal(self.linear(torch.cat([z, v], -1)), self.scale).to_event(1)


def given(mean, covariance, known, values):
    """Mean and covariance of a normal vector given some of its entries."""
    gain = covariance[:, known] @ torch.linalg.inv(covariance[known][:, known])
    return mean + gain @ (values - mean[known]), covariance - gain @ covariance[known]


def linear_data():
    """The data of arXiv 1609.09869's linear model, by the seed of its code."""
    state = np.random.RandomState(1)
    splits = []
    for count, steps in ((5000, 25), (500, 25)):
        z = [state.randn(count, 1)]
        for _ in range(1, steps):
            z.append(z[-1] + 0.05 + 10**0.5 * state.randn(count, 1))
        z = np.stack(z, 1)
        splits.append((torch.tensor(0.5 * z + 20**0.5 * state.randn(count, steps, 1)), torch.tensor(z)))
    return splits


class Half(nn.Module):
    """x_t ~ N(z_t / 2, scale^2)."""

    def __init__(self, scale, weight=0.5):
        super().__init__()
        self.scale, self.weight = scale, weight

    def forward(self, z):
        return dist.Normal(self.weight * z, self.scale).to_event(1)


def krishnan():
    transition = NormalTransition(lambda z: z + 0.05, 1, 10**0.5)
    return StateSpaceModel(Initial(1, scale=1.0, learned_mean=False), transition, Half(20**0.5))
