"""What the default encoder is best fed, by likelihood: the validation bound after a fixed number of epochs.

    python benchmarks/encoder_inputs.py [--root FOLDER] [--longer 10 --out encoder_inputs_long.json]

writes encoder_inputs.json beside this script. Each row is a data set under its likelihood, a way to feed the encoder,
and the validation bound in nats per datum of three seeds; None where the loss was not finite.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyro_vae
from pyro_vae import fit, load_dataset
from pyro_vae.guides import AmortizedGuide
from pyro_vae.models import VAE, likelihoods
from pyro_vae.nn import MLP
from pyro_vae.svi import NonFiniteLossError

SEEDS = (0, 1, 2)


def feeds(train: Tensor, likelihood: Any) -> dict[str, Any]:
    """Fixed functions of a datum, known before training."""
    largest, mean, std = train.max(), train.mean(0), train.std()
    found = {
        "as it is": lambda x: x,
        "over the largest": lambda x: x / largest,
        "standardised": lambda x: (x - mean) / std,
    }
    if bool((train >= 0).all()):
        found |= {
            "log1p": lambda x: x.log1p(),
            "square root": lambda x: x.sqrt(),
            "centred": lambda x: 2 * x / largest - 1,
        }
    if isinstance(likelihood, likelihoods.Binomial):
        found["arcsine"] = lambda x: 4 * (x / likelihood.total_count).sqrt().asin()
    return found


def simulated(spread: float, overdispersed: bool = False) -> Tensor:
    """Counts of log-normal rates that three factors drive, (1000, 20)."""
    generator = torch.Generator().manual_seed(0)
    z, W = torch.randn(1000, 3, generator=generator), torch.randn(3, 20, generator=generator)
    log_rate = spread * (z @ W) / 3**0.5 + 3
    if overdispersed:
        log_rate = log_rate + 0.5 * torch.randn(1000, 20, generator=generator)
    return torch.poisson(log_rate.clamp(max=13).exp(), generator=generator)


def data_sets(root: str | None) -> dict[str, tuple[Any, Tensor, Tensor, int]]:
    """Likelihood, training and validation data, and the epochs."""
    digits = load_dataset("digits")
    found = {
        "digits, counts 0 to 16": (likelihoods.Binomial(16), digits.train.x, digits.valid.x, 10),
        "digits as counts": (likelihoods.Poisson(), digits.train.x, digits.valid.x, 10),
        "digits as categories": (likelihoods.Categorical(17), digits.train.x, digits.valid.x, 10),
    }
    for name, spread in (("narrow", 0.5), ("wide", 2.0)):
        x = simulated(spread)
        found[f"{name} counts to {x.max():,.0f}"] = (likelihoods.Poisson(), x[:800], x[800:], 20)
    x = simulated(1.5, overdispersed=True)
    found[f"overdispersed counts to {x.max():,.0f}"] = (likelihoods.NegativeBinomial(), x[:800], x[800:], 20)
    try:
        pixels = load_dataset("mnist", root=root).train.x[:1500].mul(255).round()
        found["MNIST, 0 to 255"] = (likelihoods.Binomial(255), pixels[:1000], pixels[1000:], 10)
        faces = load_dataset("freyfaces", root=root)
        found["Frey faces"] = (likelihoods.Normal(), faces.train.x, faces.valid.x, 5)
    except FileNotFoundError as error:
        print(error)
    return found


def bound(likelihood: Any, feed: Any, train: Tensor, valid: Tensor, epochs: int, seed: int) -> float | None:
    torch.manual_seed(seed)
    small = MLP((128,))
    model = VAE(train.shape[1:], latent_dim=4, likelihood=likelihood, decoder=small)
    guide = AmortizedGuide(model, small, encoder_inputs=feed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = fit(
                model,
                guide,
                train,
                valid=valid,
                epochs=epochs,
                seed=seed,
                out=folder + "/run",
                progress=False,
                compile=False,
            )
        except (NonFiniteLossError, ValueError):
            return None
        return run.history[-1]["valid"] if math.isfinite(run.history[-1]["valid"]) else None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root")
    parser.add_argument("--longer", type=int, default=1, help="this many times as many epochs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    table = []
    for name, (likelihood, train, valid, epochs) in data_sets(arguments.root).items():
        for feed, function in {**feeds(train, likelihood), "by default": None}.items():
            bounds = [bound(likelihood, function, train, valid, arguments.longer * epochs, seed) for seed in SEEDS]
            table.append({"data": name, "likelihood": type(likelihood).__name__, "fed": feed, "bounds": bounds})
            trained = [each for each in bounds if each is not None]
            mean = f"{statistics.mean(trained):12.2f}" if trained else "           -"
            print(f"{name:32} {feed:18} {mean}  {len(trained)} of {len(SEEDS)}", flush=True)
    settings = {"torch": torch.__version__, "pyro_vae": pyro_vae.__version__, "threads": torch.get_num_threads()}
    settings["longer"] = arguments.longer
    arguments.out.write_text(json.dumps({"settings": settings, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
