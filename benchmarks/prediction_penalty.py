"""`PredictionPenalty` against the plain ELBO: a deep Markov model of the simulated pendulum with its inputs.

For each weight, scored on the test split: ln p(x) in nats per step and the root mean square of predictions of one step,
both by a particle filter of 1,000 particles that knows the past alone; and how far the true angle (as sine and cosine)
and velocity are from what a linear map makes of the smoothed states, fitted on the validation split. Latents 4, hidden
32, Adam at 3e-3 falling to 0 along half a cosine over 60 epochs in batches of 100. Nothing was chosen.

    python benchmarks/prediction_penalty.py   # rows that are recorded are kept
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import record, recorded
from torch import Tensor

from pyro_vae import Dataset, fit, load_dataset
from pyro_vae.data import Split
from pyro_vae.estimators import PredictionPenalty
from pyro_vae.guides import StateSpaceGuide
from pyro_vae.models import DeepMarkovModel, likelihoods
from pyro_vae.schedules import Cosine

HERE = Path(__file__).parent


def truth(split: Split) -> Tensor:
    """(M, 3): sine, cosine, and velocity in units of its deviation."""
    assert split.latents is not None
    angle, velocity = split.latents.flatten(0, 1).double().unbind(-1)
    return torch.stack([angle.sin(), angle.cos(), velocity / velocity.std()], -1)


def trained(swings: Dataset, weight: float, epochs: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    likelihood = likelihoods.Normal(initial_scale=0.3)
    model = DeepMarkovModel((2,), 4, 32, (32, 32), likelihood=likelihood, num_inputs=1)
    guide = StateSpaceGuide(model, "ST-LR", hidden=32)
    run = fit(
        model,
        guide,
        swings.train,
        valid=swings.valid,
        loss=PredictionPenalty(weight),
        optimizer=partial(torch.optim.Adam, lr=3e-3),
        learning_rate=Cosine(epochs),
        epochs=epochs,
        batch_size=100,
        clip_norm=100.0,
        seed=seed,
        compile=True,
        out=tempfile.mkdtemp(),
    )
    torch.manual_seed(seed)
    (x,), kwargs = swings.test.batch(torch.arange(len(swings.test)))
    filtered = model.filter(x, **kwargs, num_particles=1000)
    states = []
    for split in (swings.valid, swings.test):
        (own,), given = split.batch(torch.arange(len(split)))
        z = model.smooth(guide, own, given["u"], lengths=given["lengths"], num_samples=50).mean(0).double()
        states.append(torch.cat([z.flatten(0, 1), torch.ones(z[..., 0].numel(), 1, dtype=z.dtype)], -1))
    linear = torch.linalg.lstsq(states[0], truth(swings.valid)).solution
    error = (states[1] @ linear - truth(swings.test)).square().mean(0).sqrt()
    return {
        "log_p_per_step": float(filtered.log_evidence.mean()) / x.shape[1],
        "one_step_root_mean_square": float((filtered.predicted - x)[:, 1:].square().mean().sqrt()),
        "angle_root_mean_square": float(error[:2].square().mean().sqrt()),
        "velocity_root_mean_square": float(error[2]),
        "valid_bound_per_step": run.history[-1]["valid"] / x.shape[1],
        "minutes": run.history[-1]["seconds"] / 60,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", type=float, default=[0.0, 1.0, 10.0, 100.0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    arguments = parser.parse_args()
    swings, target = load_dataset("pendulum"), HERE / "prediction_penalty.json"
    for seed in arguments.seeds:
        for weight in arguments.weights:
            results, key = recorded(target), f"weight {weight:g}, seed {seed}"
            if key not in results["rows"]:
                row = trained(swings, weight, arguments.epochs, seed)
                results = recorded(target)
                results["rows"][key] = row
                record(target, results)
            print(key, {name: round(value, 4) for name, value in results["rows"][key].items()})


if __name__ == "__main__":
    main()
