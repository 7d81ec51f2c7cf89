"""Bounds on log p(x), and gradients of them."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from typing import Any, Literal

import pyro
import torch
from torch import Tensor, nn

from ..log_weights import LogWeights
from ..nn import bind, positive
from .base import Coefficients, Estimator

__all__ = [
    "CIWAE",
    "ELBO",
    "IWAE",
    "MIWAE",
    "PIWAE",
    "STL",
    "VIMCO",
    "BetaELBO",
    "DReG",
    "FreeBits",
    "Renyi",
    "ScoreFunction",
]


def _log_mean_exp(log_weight: Tensor, dim: int = 0) -> Tensor:
    return log_weight.logsumexp(dim) - math.log(log_weight.shape[dim])


class ELBO(Estimator):
    """``E_q[ln p(x | z)] - KL(q(z | x) || p(z))``, K draws (arXiv 1312.6114).

    The divergence of each site is analytic where it exists in closed form, given the sites before it, and
    ``ln q - ln p`` of the draws elsewhere. Masks and scales may differ between model and guide.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> model = VAE((4,), latent_dim=2)
        >>> ELBO(num_particles=3).loss(model, AmortizedGuide(model), torch.ones(10, 4)) > 0
        True
    """

    linear = True
    analytic_kl = True

    def bound(self, log_weight: Tensor) -> Tensor:
        return log_weight.mean(0)

    def signal(self, weights: LogWeights) -> Tensor:
        return weights.log_weight / self.num_draws  # no draw has a part in another's


class BetaELBO(ELBO):
    """Trains on ``E_q[ln p(x | z)] - beta KL(q(z | x) || p(z))``, all latent sites' KL, and reports the ELBO.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> model = VAE((4,), latent_dim=2)
        >>> BetaELBO(beta=4.0).loss(model, AmortizedGuide(model), torch.ones(10, 4)) > 0
        True
    """

    def __init__(self, beta: float, num_particles: int = 1, **arguments: Any) -> None:
        super().__init__(num_particles, **arguments)
        if not beta >= 0:
            raise ValueError(f"expected beta >= 0, got {beta}: give a weight of the KL term")
        self.beta = beta

    def each(self, weights: LogWeights) -> Tensor:
        """What is trained on, of each draw, (K, B)."""
        return weights.reconstruction - self.beta * weights.kl

    def objective(self, weights: LogWeights) -> Tensor:
        return self.each(weights).mean(0)

    def global_objective(self, weights: LogWeights) -> Tensor:
        return self.beta * weights.global_log_weight

    def signal(self, weights: LogWeights) -> Tensor:
        return self.each(weights) / self.num_draws


class FreeBits(BetaELBO):
    """Trains on ``E_q[ln p(x | z)] - sum_g max(nats, KL_g)``, and reports the ELBO (arXiv 1606.04934).

    A group g is a dimension of a local site where q and p both factorise over dimensions, else a site; KL_g is its mean
    over draws and the data of the batch, weighted where there is a KL weight. A group below `nats` has no pull of its
    KL term.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> model = VAE((4,), latent_dim=2)
        >>> FreeBits(nats=0.1).loss(model, AmortizedGuide(model), torch.ones(10, 4)) > 0
        True
    """

    def __init__(self, nats: float, num_particles: int = 1, **arguments: Any) -> None:
        super().__init__(1.0, num_particles, **arguments)
        if not nats >= 0:
            raise ValueError(f"expected nats >= 0, got {nats}: give what each group may use freely")
        self.nats = nats

    def each(self, weights: LogWeights) -> Tensor:
        free = torch.zeros(())
        for name in weights.sites:
            kl = weights.kl_per_dim(name)  # (K, B, groups)
            free = free + (kl * (kl.detach().mean((0, 1)) <= self.nats)).sum(-1)
        return weights.log_weight + free


class STL(Estimator):
    """The mean of K log-weights, with the gradient of the guide through the draws alone: "sticking the landing".

    ``(d ln w / dz) dz``: the score of q, whose expectation is 0, is left out, so that the gradient is 0 for every draw
    where q is the posterior (arXiv 1703.09194; for hierarchies arXiv 2101.11046).

    Raises:
        ValueError: draws that cannot be reparameterised.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> model = VAE((4,), latent_dim=2)
        >>> STL(num_particles=3).loss(model, AmortizedGuide(model), torch.ones(10, 4)) > 0
        True
    """

    linear = True

    def bound(self, log_weight: Tensor) -> Tensor:
        return log_weight.mean(0)

    def coefficients(self, log_weight: Tensor) -> Coefficients:
        equal = torch.full_like(log_weight, 1 / len(log_weight))
        return Coefficients(model=equal, path=equal, guide=None)


class Renyi(Estimator):
    """``1/(1 - alpha) ln 1/K sum_k w_k^(1 - alpha)``, the variational Renyi bound by K draws (arXiv 1602.02311, and its
    analysis as VR-IWAE, arXiv 2210.06226).

    alpha = 0 is `IWAE`; towards alpha = 1 it falls to the ELBO.

    Raises:
        ValueError: alpha = 1.

    Example:
        >>> Renyi(alpha=0.5).bound(torch.tensor([[1.0], [1.0]]))
        tensor([1.])
    """

    def __init__(
        self,
        alpha: float = 0.0,
        num_particles: int = 2,
        max_plate_nesting: float = math.inf,
        max_iarange_nesting: int | None = None,
        vectorize_particles: bool = True,
        strict_enumeration_warning: bool = True,
        **arguments: Any,
    ) -> None:
        super().__init__(
            num_particles,
            max_plate_nesting,
            max_iarange_nesting,
            vectorize_particles,
            strict_enumeration_warning,
            **arguments,
        )
        if alpha == 1:
            raise ValueError("expected alpha other than 1, where the bound is the ELBO: use ELBO or STL")
        self.alpha = alpha

    def bound(self, log_weight: Tensor) -> Tensor:
        return _log_mean_exp((1 - self.alpha) * log_weight) / (1 - self.alpha)


class IWAE(Renyi):
    """``ln 1/K sum_k w_k``: it rises to log p(x) with K (arXiv 1509.00519).

    Example:
        >>> IWAE(num_particles=2).bound(torch.tensor([[0.0], [1.0]]))
        tensor([0.6201])
    """

    def __init__(self, num_particles: int = 1, max_plate_nesting: float = math.inf, **arguments: Any) -> None:
        super().__init__(0.0, num_particles, max_plate_nesting, **arguments)


class DReG(Renyi):
    """`IWAE`'s bound, or Renyi's, with the doubly reparameterised gradient of the guide (arXiv 1810.04152)::

        sum_k (alpha v_k + (1 - alpha) v_k^2) (d ln w_k / dz_k) dz_k,    v = softmax((1 - alpha) ln w)

    Its signal-to-noise ratio rises with K where that of `IWAE`'s falls. The model's gradient is the bound's.

    Raises:
        ValueError: draws that cannot be reparameterised; a KL weight, whose gradient this is not.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> model = VAE((4,), latent_dim=2)
        >>> DReG(num_particles=3).loss(model, AmortizedGuide(model), torch.ones(10, 4)) > 0
        True
    """

    tempered = False

    def __init__(self, num_particles: int = 1, alpha: float = 0.0, **arguments: Any) -> None:
        super().__init__(alpha, num_particles, **arguments)

    def coefficients(self, log_weight: Tensor) -> Coefficients:
        v = ((1 - self.alpha) * log_weight).softmax(0)
        return Coefficients(model=v, path=self.alpha * v + (1 - self.alpha) * v.square(), guide=None)


class CIWAE(Estimator):
    """``beta ELBO + (1 - beta) IWAE`` of the same K draws (arXiv 1802.04537).

    Example:
        >>> CIWAE(beta=0.5, num_particles=2).bound(torch.tensor([[0.0], [1.0]]))
        tensor([0.5601])
    """

    def __init__(self, beta: float, num_particles: int = 2, **arguments: Any) -> None:
        super().__init__(num_particles, **arguments)
        if not 0 <= beta <= 1:
            raise ValueError(f"expected beta from 0 to 1, got {beta}: give the ELBO's share")
        self.beta = beta

    def bound(self, log_weight: Tensor) -> Tensor:
        return self.beta * log_weight.mean(0) + (1 - self.beta) * _log_mean_exp(log_weight)


class MIWAE(Estimator):
    """``1/M sum_m ln 1/K sum_k w_mk``: the mean of M bounds of K draws each (arXiv 1802.04537).

    Example:
        >>> MIWAE(num_bounds=2, num_particles=2).bound(torch.tensor([[0.0], [1.0], [2.0], [2.0]]))
        tensor([1.3101])
    """

    def __init__(self, num_bounds: int, num_particles: int, **arguments: Any) -> None:
        super().__init__(num_particles, **arguments)
        self.num_bounds = positive("num_bounds", num_bounds)

    @property
    def num_draws(self) -> int:
        return self.num_bounds * self.num_particles

    def grouped(self, log_weight: Tensor) -> Tensor:
        """(M, K, B)."""
        return log_weight.unflatten(0, (self.num_bounds, self.num_particles))

    def bound(self, log_weight: Tensor) -> Tensor:
        return _log_mean_exp(self.grouped(log_weight), 1).mean(0)


class PIWAE(MIWAE):
    """`IWAE`'s bound of all M K draws, whose gradient trains the model; the guide's is `MIWAE`'s (arXiv 1802.04537).

    Raises:
        ValueError: draws that cannot be reparameterised.

    Example:
        >>> PIWAE(num_bounds=2, num_particles=2).bound(torch.tensor([[0.0], [1.0], [2.0], [2.0]]))
        tensor([1.5313])
    """

    def bound(self, log_weight: Tensor) -> Tensor:
        return _log_mean_exp(log_weight)

    def coefficients(self, log_weight: Tensor) -> Coefficients:
        of_guide = self.grouped(log_weight).softmax(1).flatten(0, 1) / self.num_bounds
        return Coefficients(model=log_weight.softmax(0), path=of_guide, guide=of_guide)


class VIMCO(IWAE):
    """`IWAE`'s bound for draws that cannot be reparameterised: each draw's score is multiplied by what the draw adds::

        L - ln 1/K (sum_{j != k} w_j + exp(mean_{j != k} ln w_j))

    (arXiv 1602.06725). Draws that can be reparameterised are, as in `IWAE`.

    Raises:
        ValueError: K = 1.

    Example:
        >>> VIMCO(num_particles=2).bound(torch.tensor([[0.0], [1.0]]))
        tensor([0.6201])
    """

    def __init__(self, num_particles: int = 2, **arguments: Any) -> None:
        super().__init__(num_particles, **arguments)
        if num_particles < 2:
            raise ValueError("expected num_particles >= 2, got 1, which leaves none to compare with: use ScoreFunction")

    def signal(self, weights: LogWeights) -> Tensor:
        log_weight, K = weights.log_weight, self.num_particles
        zero = log_weight == -math.inf  # draws of no density
        finite = log_weight.masked_fill(zero, 0.0)
        mean_of_others = (finite.sum(0) - finite) / (K - 1)
        mean_of_others = mean_of_others.masked_fill(zero.sum(0) > zero.long(), -math.inf)
        without = torch.logaddexp(_log_sum_of_others(log_weight), mean_of_others) - math.log(K)
        return self.bound(log_weight) - without.masked_fill(without == -math.inf, 0.0)


def _log_sum_of_others(log_weight: Tensor) -> Tensor:
    """``ln sum_{j != k} w_j`` for each k, (K, B); exact also where one weight is nearly all of the sum."""
    largest, at = log_weight.max(0, keepdim=True)
    is_largest = torch.zeros_like(log_weight, dtype=torch.bool).scatter(0, at, True)
    rest = log_weight.masked_fill(is_largest, -math.inf).logsumexp(0, keepdim=True)
    relative = (log_weight - largest).exp()
    others = (relative.sum(0) - relative).masked_fill(is_largest, 1.0)  # 1 or more elsewhere: the largest is in it
    return torch.where(is_largest, rest, largest + others.log())


class ScoreFunction(ELBO, nn.Module):
    """The ELBO, with scores of draws that cannot be reparameterised multiplied by ``ln w_k - b`` (arXiv 1206.6430).

    Args:
        baseline: b. "leave-one-out": the mean of the other draws' log-weights (arXiv 1602.06725), for K > 1. A module
            from the first argument, (B, ...), to (B,) or (B, 1), or a declared one such as ``MLP()``: it is trained by
            ``(ln w - b(x))^2`` beside (arXiv 1402.0030). None: 0.

    Raises:
        ValueError: leave-one-out with one draw; a module for data that have no plate.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE, priors
        >>> model = VAE((4,), prior=priors.Categorical(3, codes=2))
        >>> ScoreFunction(num_particles=2).loss(model, AmortizedGuide(model), torch.ones(10, 4)) > 0
        True
    """

    num_particles: int

    def __init__(
        self,
        num_particles: int = 2,
        baseline: nn.Module | Literal["leave-one-out"] | None = "leave-one-out",
        **arguments: Any,
    ) -> None:
        super().__init__(num_particles, **arguments)
        if baseline == "leave-one-out" and num_particles < 2:
            raise ValueError(
                "expected num_particles >= 2 for the leave-one-out baseline, got 1: draw more, or give a module"
            )
        if not (baseline is None or baseline == "leave-one-out" or isinstance(baseline, nn.Module)):
            raise ValueError(f"expected a module, 'leave-one-out' or None as baseline, got {baseline!r}: give one")
        self.baseline = baseline
        self._name = f"baseline {uuid.uuid4()}"

    def weigh(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> LogWeights:
        if isinstance(self.baseline, nn.Module):
            baseline: nn.Module = bind(self.baseline, args[0].shape[1:], (1,)).to(args[0].device)
            self.baseline = baseline
            self._register(baseline)
        return super().weigh(model, guide, args, kwargs)

    def _register(self, baseline: nn.Module) -> None:
        """In Pyro's store, where stock SVI finds it, under a name that no other module has there."""
        store, mine = pyro.get_param_store(), dict(baseline.named_parameters())
        for name, parameter in mine.items():
            if store._params.get(f"{self._name}$$${name}", parameter) is not parameter:  # a copy's, or of another run
                self._name = f"baseline {uuid.uuid4()}"
        pyro.module(self._name, baseline)

    def _baseline(self, weights: LogWeights) -> Tensor | float:
        """(B,), of the module, or (K, B)."""
        if isinstance(self.baseline, nn.Module):
            b = self.baseline(weights.args[0]).reshape(-1)
            if len(b) != weights.log_p.shape[1] or not next(iter(weights.calls)).structure.plate:
                raise ValueError(
                    f"expected a baseline for each of {weights.log_p.shape[1]} data in a plate, got {len(b)} values: "
                    "give the rows of the batch as the first argument, or take the leave-one-out baseline"
                )
            return b
        if self.baseline is None:
            return 0.0
        log_weight = weights.log_weight.detach()
        return (log_weight.sum(0) - log_weight) / (self.num_particles - 1)

    def signal(self, weights: LogWeights) -> Tensor:
        return (weights.log_weight - self._baseline(weights)) / self.num_particles

    def extra(self, weights: LogWeights, model: Callable, guide: Callable, args: Any, kwargs: Any) -> Tensor | None:
        if not isinstance(self.baseline, nn.Module):
            return None
        return -(weights.log_weight.detach() - self._baseline(weights)).square().mean(0).sum()
