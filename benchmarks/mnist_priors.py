"""Priors on MNIST: standard normal, Gaussian mixture, VampPrior and flow, with a mean-field guide.

python benchmarks/mnist_priors.py           # each row with three seeds; goes on where it was interrupted
python benchmarks/mnist_priors.py --times   # milliseconds for a step, on a quiet machine

"""

from __future__ import annotations

import mnist_table
from mnist_table import BASE, LATENT, NETWORK, pair

from pyro_vae import Dataset
from pyro_vae.guides import families
from pyro_vae.models import priors

COMPONENTS = 500


def mixture(digits: Dataset) -> priors.Prior:
    return priors.GaussianMixture(LATENT, COMPONENTS)


def vamp(digits: Dataset) -> priors.Prior:
    prior = priors.VampPrior(digits.event_shape, LATENT, NETWORK, families.DiagonalNormal(), COMPONENTS)
    prior.initialize(digits.train.x)
    return prior


def flow(digits: Dataset) -> priors.Prior:
    return priors.Flow(LATENT, families.RealNVP(transforms=4))


ROWS = {"standard": BASE, "mixture": pair(prior=mixture), "VampPrior": pair(prior=vamp), "flow": pair(prior=flow)}

if __name__ == "__main__":
    mnist_table.main("mnist_priors", ROWS, {}, (__doc__ or "") + (mnist_table.__doc__ or ""))
