"""The ELBO under inequality constraints, by Lagrange multipliers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..log_weights import LogWeights, is_point, samples
from .bounds import BetaELBO

__all__ = ["ConstrainedELBO", "Constraint", "MutualInformation", "Rate", "Reconstruction"]


class Constraint:
    """Base: a mean over data and draws, in nats per datum, is to be at most, or at least, a number.

    `each` gives the values whose mean it is, (K, B). The bound is a number, or a tensor that a schedule fills anew.
    """

    def __init__(self, at_most: float | Tensor | None = None, at_least: float | Tensor | None = None) -> None:
        if (at_most is None) == (at_least is None):
            raise ValueError(
                f"expected at_most=... or at_least=... of {type(self).__name__}, got "
                f"{'neither' if at_most is None else 'both'}: give one, and two constraints for an interval"
            )
        self.sign = 1.0 if at_least is None else -1.0
        self.limit: Any = at_most if at_least is None else at_least

    @property
    def quantity(self) -> str:
        """Its name in a run's history."""
        return type(self).__name__

    def each(self, weights: LogWeights) -> Tensor:
        raise NotImplementedError

    def __str__(self) -> str:
        return f"{self.quantity} {'<=' if self.sign > 0 else '>='} {float(self.limit):g}"


class Rate(Constraint):
    """``KL(q(z | x) || p(z))`` of the local sites: at least a capacity, at most a budget.

    Example:
        >>> print(Rate(at_most=5.0))
        Rate <= 5
    """

    def each(self, weights: LogWeights) -> Tensor:
        return weights.kl


class Reconstruction(Constraint):
    """``E_q[ln p(x | z)]``: as good as asked for, and the rate no larger than that takes (arXiv 1810.00597).

    Example:
        >>> print(Reconstruction(at_least=-80.0))
        Reconstruction >= -80
    """

    def each(self, weights: LogWeights) -> Tensor:
        return weights.reconstruction


class MutualInformation(Constraint):
    """``I(z; y)`` between a latent site and a label, under the data of the batch::

        1/B sum_i E_q(z_i | x_i)[ ln 1/n_i sum_{j: y_j = y_i} q(z_i | x_j) - ln 1/B sum_j q(z_i | x_j) ]

    n_i data have the label y_i; data without one, NaN, count nothing. Given how many data have which label, its
    expectation is an upper bound on the information under the distribution that the data come from, as the KL
    divergence is convex, and falls to it with B; it is never above the labels' entropy. The site's q may not depend on
    other draws.

    Args:
        site: the latent site. label: the index of a positional argument, the name of one given by keyword, or an
            observed site; integers (B,), or one-hot (B, classes).

    Raises:
        ValueError: no such site or label; a site in plates within the data's.

    Example:
        >>> print(MutualInformation("z", label=1, at_most=0.1))
        MutualInformation(z, 1) <= 0.1
    """

    def __init__(self, site: str, label: int | str, at_most: float | Tensor) -> None:
        super().__init__(at_most=at_most)
        self.site, self.label = site, label

    @property
    def quantity(self) -> str:
        return f"MutualInformation({self.site}, {self.label})"

    def each(self, weights: LogWeights) -> Tensor:
        y, known = self._labels(weights)
        log_q = torch.cat([self._log_q(call) for call in weights.calls])  # (K, B, B): of z_i under q(. | x_j)
        same = ((y[:, None] == y) & known).to(log_q.dtype)
        of_class = (log_q + same.log()).logsumexp(-1) - same.sum(-1).log()
        count = known.sum()
        each = of_class - ((log_q + known.to(log_q.dtype).log()).logsumexp(-1) - count.log())
        return torch.where(known, each, 0.0) * (len(y) / count.clamp(min=1))

    def _labels(self, weights: LogWeights) -> tuple[Tensor, Tensor]:
        """Classes, and which of them are known, (B,) each."""
        given: Any = None
        if isinstance(self.label, int):
            given = weights.args[self.label] if self.label < len(weights.args) else None
        else:
            given = weights.kwargs.get(self.label, weights.observed(self.label))
        if not isinstance(given, Tensor) or given.dim() not in (1, 2):
            raise ValueError(
                f"expected labels (B,) or one-hot (B, classes) as {self.label!r}, got none: name the argument"
            )
        known = given == given
        if given.dim() == 2:
            return given.argmax(-1) if given.shape[1] > 1 else given.squeeze(1), known.all(-1)
        return given, known

    def _log_q(self, call: Any) -> Tensor:
        if self.site not in call.shared or call.data_dim is None:
            raise ValueError(f'expected "{self.site}" to be a latent site in the plate of data, got {call.shared}')
        q, z = call.q.nodes[self.site]["fn"], call.p.nodes[self.site]["value"]
        if (first := next(iter(dict(samples(call.q))))) != self.site or is_point(q):
            raise ValueError(
                f'expected "{self.site}" to be the first site that the guide draws, with a density, so that its q '
                f'depends on x alone, got "{first}" first, {type(q).__name__}: draw it first'
            )
        batch = z.shape[: z.dim() - q.event_dim]
        if batch.numel() not in (call.B, call.K * call.B):
            raise ValueError(f'expected "{self.site}" in the plate of data alone, got draws of shape {tuple(z.shape)}')
        axis = len(batch) + call.data_dim
        z = z.movedim(axis, 0).unsqueeze(axis + 1)
        log_q = q.log_prob(z)  # (B, ..., B at axis + 1, ...)
        log_q = log_q.movedim(axis + 1, -1)
        return log_q.reshape(call.B, -1, call.B).movedim(0, 1)


class ConstrainedELBO(BetaELBO, nn.Module):
    """Maximises the ELBO under inequality constraints; reports the ELBO::

        max_{p, q} min_{lambda >= 0}  ELBO - sum_c lambda_c s_c (g_c - limit_c)

    g_c is the mean that a constraint is about, s_c is 1 for at most and -1 for at least. After each gradient the
    multipliers rise by `step_size` times the violation, and stay at 0 where a constraint is idle: then the ELBO is what
    is trained. Multipliers and values are buffers, kept in a run's checkpoint and history; they change in
    training mode alone, and not where a log-weight is not finite.

    Raises:
        ValueError: no constraint, or a step size that is not positive.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> model, loss = VAE((4,), latent_dim=2), ConstrainedELBO([Rate(at_most=0.1)])
        >>> import pyro
        >>> svi = pyro.infer.SVI(model, AmortizedGuide(model), pyro.optim.Adam({"lr": 0.01}), loss)
        >>> svi.step(torch.ones(10, 4)) > 0
        True
    """

    multipliers: Tensor
    values: Tensor

    def __init__(
        self,
        constraints: Sequence[Constraint],
        step_size: float = 0.01,
        num_particles: int = 1,
        **arguments: Any,
    ) -> None:
        super().__init__(1.0, num_particles, **arguments)
        if not constraints:
            raise ValueError("expected constraints, got none: give one, or use ELBO")
        if not step_size > 0:
            raise ValueError(f"expected step_size > 0, got {step_size}: give a positive number")
        self.constraints, self.step_size = [*constraints], step_size
        self.register_buffer("multipliers", torch.zeros(len(self.constraints), dtype=torch.float64))
        self.register_buffer("values", torch.full((len(self.constraints),), math.nan, dtype=torch.float64))

    def each(self, weights: LogWeights) -> Tensor:
        multipliers = self.multipliers.clone()  # they change before the gradient is taken
        penalties = [
            multiplier.to(weights.kl.dtype) * constraint.sign * constraint.each(weights)
            for multiplier, constraint in zip(multipliers, self.constraints, strict=True)
        ]
        return weights.log_weight - sum(penalties)

    def extra(self, weights: LogWeights, model: Callable, guide: Callable, args: Any, kwargs: Any) -> None:
        if not self.training:
            return
        with torch.no_grad():
            for i, constraint in enumerate(self.constraints):
                value = constraint.each(weights).mean()
                violation = constraint.sign * (value - constraint.limit)
                multiplier = (self.multipliers[i] + self.step_size * violation).clamp(min=0)
                sound = value.isfinite() & weights.log_weight.isfinite().all()  # else the step is not taken
                self.values[i] = torch.where(sound, value, self.values[i])
                self.multipliers[i] = torch.where(sound, multiplier, self.multipliers[i])

    def record(self) -> dict[str, Any]:
        """Each constraint's last value, in training, and multiplier."""
        names = map(str, self.constraints)
        pairs = zip(names, self.values.tolist(), self.multipliers.tolist(), strict=True)
        return {"constraints": {name: {"value": value, "multiplier": multiplier} for name, value, multiplier in pairs}}
