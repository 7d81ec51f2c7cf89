"""The picture of docs/priors.md: a prior, the aggregate posterior, and the mismatch between them.

For VAEs of handwritten digits with two latent dimensions and three priors. The aggregate posterior is
q(z) = 1/N sum_n q(z | x_n); the third column is ln q(z) / p(z), white where both are small, and its mean over draws
from q(z) is the number above it.

    python docs/priors.py
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import torch

from pyro_vae import fit, load_dataset
from pyro_vae.guides import AmortizedGuide, families
from pyro_vae.models import VAE, likelihoods, priors
from pyro_vae.nn import MLP
from pyro_vae.schedules import Cosine, Warmup

NETWORK = MLP(hidden=(128, 128))
POINTS = 201


def aggregate(posterior: torch.distributions.Distribution, z: torch.Tensor) -> torch.Tensor:
    """ln q(z), q the mean over data of q(z | x_n)."""
    each = [posterior.log_prob(part[:, None]) for part in z.reshape(-1, z.shape[-1]).split(1000)]
    return (torch.cat([part.logsumexp(-1) for part in each]) - math.log(len(each[0][0]))).reshape(z.shape[:-1])


def main() -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    digits = load_dataset("digits")
    torch.manual_seed(0)
    vamp = priors.VampPrior(digits.event_shape, 2, NETWORK, families.DiagonalNormal(), components=50)
    vamp.initialize(digits.train.x)
    rows = {
        "StandardNormal(2)": priors.StandardNormal(2),
        "GaussianMixture(2, 10)": priors.GaussianMixture(2, components=10),
        "VampPrior, 50 pseudo-inputs": vamp,
    }
    figure, axes = plt.subplots(len(rows), 3, figsize=(9, 8.6), layout="constrained")
    for row, (name, prior) in zip(axes, rows.items(), strict=True):
        torch.manual_seed(1)
        model = VAE(digits.event_shape, prior=prior, likelihood=likelihoods.Binomial(16), decoder=NETWORK)
        family = getattr(prior, "family", families.DiagonalNormal())
        guide = AmortizedGuide(model, getattr(prior, "encoder", NETWORK), family)
        settings = {"learning_rate": Cosine(200), "kl_weight": Warmup(20), "epochs": 200, "seed": 0}
        fit(model, guide, digits.train, **settings)
        with torch.no_grad():
            posterior = guide.posterior(digits.train.x)
            draws, means = posterior.sample((10,)).flatten(0, 1), posterior.mean
            low, high = draws.min(0).values, draws.max(0).values
            line = torch.linspace(0, 1, POINTS)
            z = low + (high - low) * torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
            log_q, log_p = aggregate(posterior, z), model.prior().log_prob(z)
            mismatch = (aggregate(posterior, draws) - model.prior().log_prob(draws)).mean()
        seen = (log_q > log_q.max() - 7) | (log_p > log_p.max() - 7)
        window = {"origin": "lower", "extent": (low[0], high[0], low[1], high[1]), "aspect": "auto"}
        row[0].imshow(log_p.exp(), cmap="Greys", **window)
        row[1].imshow(log_q.exp(), cmap="Greys", alpha=0.6, **window)
        row[1].scatter(*means.T, c=digits.train.labels, s=3, cmap="tab10")
        ratio = (log_q - log_p).where(seen, torch.nan)
        picture = row[2].imshow(ratio, cmap="RdBu_r", vmin=-6, vmax=6, **window)
        row[0].set_ylabel(name)
        row[2].set_title(f"KL(q(z) | p(z)) = {mismatch:.2f} nats", fontsize=9)
    for axis, title in zip(axes[0], ("prior p(z)", "aggregate posterior q(z)", None), strict=True):
        if title:
            axis.set_title(title, fontsize=9)
    figure.colorbar(picture, ax=axes[:, 2], label="ln q(z) / p(z)", shrink=0.6)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
