"""Exact answers for state-space models of one number, by forward and backward sums over a grid."""

import numpy as np
import torch


class Grid:
    """z_1 ~ N(0, first), z_t ~ N(f(z_{t-1}), Q), x_t ~ N(z_t / 2, R), variances; z_1 on Gauss-Hermite nodes."""

    def __init__(self, f, first, Q, R, limit=60.0, step=0.1):
        self.R = R
        nodes, weights = np.polynomial.hermite_e.hermegauss(40)
        self.start, self.start_weights = first**0.5 * torch.tensor(nodes), torch.tensor(weights / weights.sum())
        self.z = torch.arange(-limit, limit + step, step, dtype=torch.float64)

        def density(before):
            return step * torch.distributions.Normal(f(before)[:, None], Q**0.5).log_prob(self.z).exp()

        self.second, self.later = density(self.start), density(self.z)

    def _likelihood(self, x, z):
        return torch.distributions.Normal(0.5 * z, self.R**0.5).log_prob(x[:, None]).exp()

    def filtered(self, x):
        """For x (N, T): ln p(x), (N,); normalised weights of z_t given x up to t, a tensor (N, points) for each t."""
        p, total, found = self.start_weights.expand(len(x), -1), 0.0, []
        for t in range(x.shape[1]):
            if t:
                p = p @ (self.second if t == 1 else self.later)
            p = p * self._likelihood(x[:, t], self.z if t else self.start)
            total = total + p.sum(1).log()
            p = p / p.sum(1, keepdim=True)
            found.append(p)
        return total, found

    def smoothed(self, x):
        """E[z_t | x], (N, T)."""
        _, found = self.filtered(x)
        beta, means = torch.ones(len(x), len(self.z), dtype=torch.float64), []
        for t in reversed(range(x.shape[1])):
            if t < x.shape[1] - 1:
                beta = (beta * self._likelihood(x[:, t + 1], self.z)) @ (self.later if t else self.second).mT
                beta = beta / beta.amax(1, keepdim=True)
            weights = found[t] * beta
            means.append((weights * (self.z if t else self.start)).sum(1) / weights.sum(1))
        return torch.stack(means[::-1], 1)
