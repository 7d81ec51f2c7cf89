"""`Estimator`: from log-weights to a bound and its gradient, once for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.infer
import torch
from torch import Tensor, nn

from ..config import Configured
from ..log_weights import LogWeights, Structures, log_weights
from ..nn import positive

__all__ = ["Coefficients", "Estimator"]


class Coefficients(NamedTuple):
    """What the draws weigh in a gradient that is not the bound's own, each (K, B) or None for nothing::

        sum_k model_k d ln p(x, z_k) + path_k (d ln w_k / dz_k) dz_k - guide_k d ln q(z_k | x)

    The first and the last are derivatives with respect to parameters at fixed draws, dz_k is the whole sampling path.
    Where `guide` is None, changes that begin at draws whose ln q is masked weigh `model` along their path: they have no
    score that was turned into a derivative along it.
    """

    model: Tensor
    path: Tensor | None
    guide: Tensor | None


class Estimator(Configured, pyro.infer.ELBO):
    """Base of estimators: a subclass says what the bound is and, where it is another, what is differentiated.

    `bound` maps log-weights (K, B) to bounds (B,). The loss is minus their sum, times the scale N / B of the data's
    plate, which stays outside every logarithm; the log-weights are summed over all plates within it. Sites outside are
    global: they are drawn once, and the bound is ``E_q(w)[ln p(w)/q(w) + N/B sum_i L_i(w)]``. Without any override the
    gradient is the bound's, with the score of draws that cannot be reparameterised.
    Where no plate holds all that is observed and something latent, everything is one datum.

    Args:
        num_particles: K, draws of the guide for each datum.
        max_plate_nesting: how deep plates of the programs may be nested. They are found by a run: this is a check.
        vectorize_particles: draw them in one call, in a plate outside all others; else model and guide run K times.
        retain_graph: keep autograd's graph after `loss_and_grads`.
        max_iarange_nesting, strict_enumeration_warning, ignore_jit_warnings, jit_options, tail_adaptive_beta: taken as
            Pyro's ELBOs take them, by position too; as in `pyro.infer.Trace_ELBO`, the last four change nothing.

    Raises:
        ValueError: latent sites in one program alone; plates within the data's that are subsampled, or sequential
            ones, where the bound is not linear in the log-weights; plates nested deeper than `max_plate_nesting`.

    Example:
        >>> class Median(Estimator):
        ...     "The median of the log-weights."
        ...     def bound(self, log_weight):
        ...         return log_weight.median(0).values
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> model = VAE((4,), latent_dim=2)
        >>> Median(num_particles=5).loss(model, AmortizedGuide(model), torch.ones(10, 4)) > 0
        True
    """

    linear = False  # in the log-weights, so that plates within the data's may be subsampled
    analytic_kl = False
    tempered = True  # the gradient is right for log-weights with a KL weight

    def __init__(
        self,
        num_particles: int = 1,
        max_plate_nesting: float = math.inf,
        max_iarange_nesting: int | None = None,
        vectorize_particles: bool = True,
        strict_enumeration_warning: bool = True,
        ignore_jit_warnings: bool = False,
        jit_options: dict[str, Any] | None = None,
        retain_graph: bool | None = None,
        tail_adaptive_beta: float = -1.0,
    ) -> None:
        if isinstance(self, nn.Module):
            nn.Module.__init__(self)
        super().__init__(
            positive("num_particles", num_particles),
            max_plate_nesting,
            max_iarange_nesting,
            vectorize_particles,
            strict_enumeration_warning,
            ignore_jit_warnings,
            jit_options,
            retain_graph,
            tail_adaptive_beta,
        )
        self.max_iarange_nesting = max_iarange_nesting
        self.max_plate_nesting = max_plate_nesting if max_iarange_nesting is None else max_iarange_nesting
        if not self.max_plate_nesting >= 0:
            raise ValueError(f"expected max_plate_nesting >= 0, got {self.max_plate_nesting}: leave it out")
        self._structures = Structures()

    @property
    def num_draws(self) -> int:
        """Of the guide for each datum."""
        return self.num_particles

    def bound(self, log_weight: Tensor) -> Tensor:
        """Log-weights (K, B) to bounds (B,)."""
        raise NotImplementedError

    def global_objective(self, weights: LogWeights) -> Tensor:
        """What is differentiated of the global sites, ()."""
        return weights.global_log_weight

    def objective(self, weights: LogWeights) -> Tensor:
        """What is differentiated, (B,)."""
        return self.bound(weights.log_weight)

    def signal(self, weights: LogWeights) -> Tensor:
        """What multiplies the score of draws without a reparameterisation, (K, B); no gradient passes it."""
        return self.objective(weights).expand_as(weights.log_weight)

    def coefficients(self, log_weight: Tensor) -> Coefficients | None:
        """A gradient that is not the objective's own."""
        return None

    def extra(self, weights: LogWeights, model: Callable, guide: Callable, args: Any, kwargs: Any) -> Tensor | None:
        """A further term, (), that is differentiated and not reported."""
        return None

    def record(self) -> dict[str, Any]:
        """What a run's history keeps of the estimator's own state."""
        return {}

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        weights = self.weigh(model, guide, args, kwargs)
        bound = weights.scale * self.bound(weights.log_weight).sum() + weights.global_log_weight
        if weights.leaves:
            surrogate = self._apart(weights)
        else:
            surrogate = weights.scale * self.objective(weights).sum() + self.global_objective(weights)
            total = surrogate.detach()
            if weights.score is not None:
                surrogate = surrogate + weights.scale * (self.signal(weights).detach() * weights.score).sum()
            if weights.global_score is not None:
                surrogate = surrogate + total * weights.global_score
        extra = self.extra(weights, model, guide, args, kwargs)
        if extra is not None:
            surrogate = surrogate + extra
        return -(bound.detach() + (surrogate - surrogate.detach()))

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        with torch.no_grad():
            weights = self.weigh(model, guide, args, kwargs)
            return -(weights.scale * self.bound(weights.log_weight).sum() + weights.global_log_weight).item()

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def weigh(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> LogWeights:
        """The log-weights of this estimator's draws."""
        weights = log_weights(
            model,
            guide,
            args,
            kwargs,
            self.num_draws,
            self._structures,
            vectorize=self.vectorize_particles,
            analytic_kl=self.analytic_kl,
            leaves=torch.is_grad_enabled() and type(self).coefficients is not Estimator.coefficients,
        )
        structure = self._structures.of(model, guide, args, kwargs)
        if structure.nesting > self.max_plate_nesting:
            raise ValueError(
                f"expected plates nested at most max_plate_nesting={self.max_plate_nesting} deep, got "
                f"{structure.nesting}: leave max_plate_nesting out, as it is found by a run"
            )
        subsampled = structure.subsampled
        if subsampled is not None and not self.linear:
            raise ValueError(
                "expected every plate within that of independent data to be whole, got "
                f'"{subsampled}", which {type(self).__name__} would put inside a logarithm: subsample the plate of '
                "independent data, which holds every observed site, or use a linear estimator, ELBO or STL"
            )
        return weights

    def _apart(self, weights: LogWeights) -> Tensor:
        """What has the gradient that `coefficients` tell."""
        c = self.coefficients(weights.log_weight.detach())
        assert c is not None
        if c.path is not None and weights.unreparameterised:
            raise ValueError(
                f"expected latent sites that can be reparameterised for {type(self).__name__}, got "
                f"{weights.unreparameterised}: use VIMCO, ScoreFunction or ReweightedWakeSleep"
            )
        if c.path is None and weights.global_sites:
            raise ValueError(
                f"expected local latent sites alone for {type(self).__name__}, got the global "
                f"{list(weights.global_sites)}: use IWAE, VIMCO or ELBO"
            )
        if weights.weighted and not self.tempered:
            raise ValueError(
                f"expected latent sites without a KL weight for {type(self).__name__}, got one, at which its gradient "
                "is biased: leave kl_weight out, or use IWAE"
            )
        local = weights.scale * _dot(c.model, weights.log_p)
        of_all = self.global_objective(weights)
        if c.guide is None:
            of_all, of_draws = weights.global_log_p, local
        else:
            local = local - weights.scale * _dot(c.guide, weights.log_q)
            of_draws = weights.scale * _dot(c.guide, weights.log_weight)
        if c.path is None:
            return local + of_all
        along = weights.scale * _dot(c.path, weights.log_weight)
        scored = c.guide is not None or c.path is c.model  # then masked draws weigh the same along their paths
        of_masked = along if scored else weights.scale * _dot(c.model, weights.log_weight)
        return local + of_all + weights.along_paths(along, of_draws + self.global_objective(weights), of_masked)

    def _get_trace(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> Any:
        call = self.weigh(model, guide, args, kwargs).calls[0]
        return call.p, call.q


def _dot(coefficients: Tensor, log: Tensor) -> Tensor:
    """Their product's sum, where a draw of no weight counts nothing, though its logarithm may be infinite."""
    return torch.where(coefficients == 0, 0.0, coefficients * log).sum()
