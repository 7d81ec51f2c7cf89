"""Inference networks on the linear and the nonlinear model of arXiv 1609.09869, figures 3 and 4: nats per step against
epochs on the validation split, and the exact line.

The generative model is known and fixed, as in the paper; 5,000 training sequences of 25 steps; a GRU of 40,
`LinearCombiner`, Adam at 5e-3 falling to 0 along half a cosine, batches of 250, the analytic KL of each step. Nothing
was chosen. "reads" marks guides with ``reads_transition=True``, which the paper has not. The exact values are computed
in tests/test_sequences.py: by the dense joint, and by a grid.

    python benchmarks/nonlinear_ssm.py   # rows that are recorded are kept
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import pyro.distributions as dist
import torch
from common import record, recorded
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_vae import Dataset, evaluate, fit, load_dataset
from pyro_vae.guides import StateSpaceGuide
from pyro_vae.models import StateSpaceModel
from pyro_vae.models.transitions import Initial, NormalTransition
from pyro_vae.schedules import Cosine
from pyro_vae.sequences import latent_rmse

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
CODES = ("MF-L", "MF-LR", "ST-L", "ST-R", "ST-LR", "ST-R, reads", "ST-LR, reads")
EPOCHS = 100
EXACT = {"linear": (3.0741, 3.687), "nonlinear": (2.4845, 2.298)}  # nats per step, root mean square


class Half(nn.Module):
    """x_t ~ N(z_t / 2, scale^2)."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, z: Tensor) -> dist.Distribution:
        return dist.Normal(0.5 * z, self.scale).to_event(1)


def model_of(name: str) -> StateSpaceModel:
    if name == "linear":
        transition = NormalTransition(lambda z: z + 0.05, 1, 10**0.5)
        return StateSpaceModel(Initial(1, scale=1.0, learned_mean=False), transition, Half(20**0.5))
    transition = NormalTransition(lambda z: z + 2 * z.sin(), 1, 5**0.5)
    return StateSpaceModel(Initial(1, scale=0.1, learned_mean=False), transition, Half(5**0.5))


def trained(name: str, inference: str, dataset: Dataset, epochs: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = model_of(name)
    code, _, reads = inference.partition(", ")
    guide = StateSpaceGuide(model, code, hidden=40, reads_transition=bool(reads))  # type: ignore[arg-type]
    run = fit(
        model,
        guide,
        dataset.train,
        valid=dataset.valid,
        loss=TraceMeanField_ELBO(),
        optimizer=partial(torch.optim.Adam, lr=5e-3),
        learning_rate=Cosine(epochs),
        epochs=epochs,
        batch_size=250,
        clip_norm=100.0,
        seed=seed,
        compile=True,
        out=tempfile.mkdtemp(),
    )
    scores = evaluate(model, guide, dataset.valid, num_samples=100)
    assert scores.per_step is not None and dataset.valid.latents is not None
    draws = model.smooth(guide, dataset.valid.x, num_samples=100)
    return {
        "bound": -scores.per_step["elbo"].value,
        "standard_error_draws": scores.per_step["elbo"].standard_error_draws,
        "importance_sampled_100": -scores.per_step["log_evidence"].value,
        "root_mean_square": latent_rmse(draws, dataset.valid.latents),
        "minutes": run.history[-1]["seconds"] / 60,
        "curve": [-record["valid"] / 25 for record in run.history],
    }


def figure(results: dict[str, Any], path: Path) -> None:
    drawn, axes = plt.subplots(1, 2, figsize=(13, 4.2), layout="constrained")
    for axis, name in zip(axes, EXACT, strict=True):
        for i, inference in enumerate(CODES):
            prefix = f"{name}, {inference}, seed"
            runs = [row for key, row in results["rows"].items() if key.startswith(prefix) and "epochs" not in key]
            for run in runs:
                curve = run["curve"]
                axis.plot(
                    range(1, len(curve) + 1), curve, color=f"C{i}", lw=1.4, label=f"{inference} {run['bound']:.3f}"
                )
        axis.axhline(EXACT[name][0], color="black", lw=1.0, ls="--", label=f"exact {EXACT[name][0]:.4f}")
        axis.set(xscale="log", xlabel="epoch", ylabel="-bound, nats per step", title=f"{name} model, validation split")
        low = EXACT[name][0]
        axis.set_ylim(low - 0.03, low + (0.6 if name == "nonlinear" else 0.4))
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axis.spines[["top", "right"]].set_visible(False)
    drawn.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(EXACT), choices=list(EXACT))
    parser.add_argument("--codes", nargs="+", default=list(CODES), choices=CODES)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    target = HERE / "nonlinear_ssm.json"
    for name in arguments.models:
        dataset = load_dataset(f"{name}_sequences")
        for inference in arguments.codes:
            for seed in arguments.seeds:
                results, key = recorded(target), f"{name}, {inference}, seed {seed}"
                key += "" if arguments.epochs == EPOCHS else f", {arguments.epochs} epochs"
                if key not in results["rows"]:
                    row = trained(name, inference, dataset, arguments.epochs, seed)
                    results = recorded(target)  # another process may have added rows meanwhile
                    results["rows"][key] = row
                    record(target, results)
                row = results["rows"][key]
                print(f"{key:>34}  {row['bound']:.4f} (exact {EXACT[name][0]}), rms {row['root_mean_square']:.3f}")
    figure(json.loads(target.read_text()), HERE / "nonlinear_ssm.png")


if __name__ == "__main__":
    main()
