"""Objectives that train the guide by the divergence KL(p(z | x) || q(z | x)), for latents of any kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.utils import _pytree as pytree

from ..log_weights import LogWeights, samples
from .base import Coefficients
from .bounds import IWAE

__all__ = ["ReweightedWakeSleep", "WakeSleep"]


class ReweightedWakeSleep(IWAE):
    """`IWAE`'s bound; the guide follows its normalised weights v, and the model's dreams (arXiv 1406.2751)::

        model   sum_k v_k d ln p(x, z_k)
        guide   insomnia sum_k v_k d ln q(z_k | x) + (1 - insomnia) d ln q(z' | x'),    x', z' ~ p

    No draw is differentiated, so that latents of every kind do. One dream is drawn for each datum.

    Args:
        insomnia: the share of the wake phase in the guide's gradient.

    Raises:
        ValueError: global latent sites; dreams of data that are not arguments of the model as they are observed.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE, priors
        >>> model = VAE((4,), prior=priors.Categorical(3, codes=2))
        >>> ReweightedWakeSleep(num_particles=5).loss(model, AmortizedGuide(model), torch.ones(10, 4)) > 0
        True
    """

    def __init__(self, num_particles: int = 2, insomnia: float = 1.0, **arguments: Any) -> None:
        super().__init__(num_particles, **arguments)
        if not 0 <= insomnia <= 1:
            raise ValueError(f"expected insomnia from 0 to 1, got {insomnia}: give the share of the wake phase")
        self.insomnia = insomnia
        self.tempered = insomnia == 1  # a dream has no KL term to weigh

    def coefficients(self, log_weight: Tensor) -> Coefficients:
        v = log_weight.softmax(0)
        return Coefficients(model=v, path=None, guide=-self.insomnia * v if self.insomnia else None)

    def extra(self, weights: LogWeights, model: Callable, guide: Callable, args: Any, kwargs: Any) -> Tensor | None:
        if self.insomnia == 1:
            return None
        if getattr(model, "feedback", 0):
            raise ValueError(
                "expected a model that can dream, got one in which x_{t-1} of the data acts on z_t: use insomnia=1, or "
                "another estimator"
            )
        with torch.no_grad():
            dream = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
        args, kwargs = _with_dreamt(dream, args, kwargs)
        return (1 - self.insomnia) * poutine.trace(poutine.replay(guide, dream)).get_trace(
            *args, **kwargs
        ).log_prob_sum()


class WakeSleep(ReweightedWakeSleep):
    """The ELBO of one draw trains the model, dreams the guide (Hinton et al. 1995)::

        model   d ln p(x, z)
        guide   d ln q(z' | x'),    x', z' ~ p

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> model = VAE((4,), latent_dim=2)
        >>> WakeSleep().loss(model, AmortizedGuide(model), torch.ones(10, 4)) > 0
        True
    """

    def __init__(self) -> None:
        super().__init__(1, insomnia=0.0)


def _with_dreamt(dream: poutine.Trace, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments, with those that the model observes replaced by what it dreamt."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    for name, site in samples(dream):
        if not site["infer"].get("was_observed") or site["infer"].get("_deterministic"):
            continue
        observed = site["infer"]["obs"]
        base = observed._base  # of a view, whose elements are to be in the same order
        flat = (
            base is not None and base.is_contiguous() and observed.is_contiguous() and base.numel() == observed.numel()
        )
        places = [i for i, leaf in enumerate(leaves) if leaf is observed or (flat and leaf is base)]
        if not places or observed.shape != site["value"].shape:
            raise ValueError(
                f'expected the values of the observed site "{name}" to be an argument of the model as it is, got '
                "others, so that a dream cannot be put in their place: transform the data beforehand, or, for "
                "sequences with lengths or a mask, use another estimator"
            )
        for i in places:
            leaves[i] = site["value"].reshape(leaves[i].shape).to(leaves[i].dtype)
    return pytree.tree_unflatten(leaves, structure)
