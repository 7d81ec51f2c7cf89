"""What several sections need of a run on a data set."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data import Dataset
from ..evaluation import Evaluation
from ..log_weights import samples
from ..prediction import decode, encodings, sample
from ..training import Run
from .baseline import noun_of, trace_of

__all__ = ["Coded", "Subject", "dimension"]


class Subject:
    """A run on a data set."""

    def __init__(self, run: Run, dataset: Dataset, evaluation: Evaluation, seed: int) -> None:
        self.run, self.dataset, self.evaluation, self.seed = run, dataset, evaluation, seed
        self.noun = noun_of(dataset)


class Coded(Subject):
    """One whose data have a code each, and what several sections need of it."""

    def __init__(self, run: Run, dataset: Dataset, evaluation: Evaluation, seed: int) -> None:
        super().__init__(run, dataset, evaluation, seed)
        sites = dict(samples(trace_of(run.model)))
        encoded = encodings(run.guide, dataset.test, seed=seed)
        codes = {name: each for name, each in encoded.items() if not each.is_global}
        self.shared = {name: each.value for name, each in encoded.items() if each.value is not None}  # all is drawn at
        self.latents = {name: sites[name] for name in sites if name in codes}  # in the order that KL has
        self.code = torch.cat([codes[name].mean.flatten(1) for name in self.latents], dim=1)  # (N, D)
        variance = self.code.double().var(0, correction=min(1, len(self.code) - 1))  # 0 of one datum
        self.active = variance > 0.01
        spread = evaluation.kl_per_dim if evaluation.kl_per_dim is not None else variance
        self.order = spread.argsort(descending=True).tolist()  # dimensions, the most informative first
        self.names = [
            f"{name}{d + 1}" if len(self.latents) == 1 else f"{name}[{d + 1}]"
            for name in self.latents
            for d in range(codes[name].mean[0].numel())
        ]

    def sample(self, n: int, mean: bool) -> Tensor:
        return sample(self.run.model, n, seed=self.seed, mean=mean, given=self.shared)

    def walk(self, standard: Tensor) -> Tensor | str:
        """E[x|z] at ``z = E[z] + standard * sd[z]`` of the prior, for `standard` (..., D); or why not."""
        if len(self.latents) > 1:
            return (
                f"The model has {len(self.latents)} latent sites that depend on each other: there is no "
                "single code to walk along."
            )
        ((name, site),) = self.latents.items()
        try:
            mean, scale = (moment.flatten().cpu() for moment in (site["fn"].mean, site["fn"].stddev))
        except NotImplementedError:
            return "The prior has no mean and variance in closed form: there is no line to walk along."
        z = (mean + standard * scale).reshape(-1, *site["value"].shape[1:])
        if not bool(site["fn"].support.check(z.to(site["value"])).all()):
            return f"The values of {name} are constrained: there is no straight line to walk along."
        return decode(self.run.model, {**self.shared, name: z}, seed=self.seed).unflatten(0, standard.shape[:-1])

    def walked(self, most: int) -> list[int]:
        """The dimensions to walk along: at most so many, active ones if there are any."""
        return [d for d in self.order if self.active[d] or not self.active.any()][:most]


def dimension(subject: Coded, d: int) -> str:
    kl = subject.evaluation.kl_per_dim
    return subject.names[d] if kl is None else f"{subject.names[d]} ({kl[d]:.2f} nats)"
