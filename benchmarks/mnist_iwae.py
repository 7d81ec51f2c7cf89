"""The IWAE paper's table (arXiv 1509.00519, table 1, one layer): VAE, IWAE and DReG at 1, 5 and 50 draws on MNIST.

784-200-200-50 tanh, dynamic binarisation, 50,000 / 10,000 / 10,000 images. Every row has the same passes over the data:
batches of 100, Adam at 1e-3 falling to 0 along half a cosine, eps 1e-2 on a sum over the batch, the paper's 1e-4 on a
mean; nothing was chosen. L_5000, once for each row and seed, of the first 2,000 test images, which take 3 minutes of a
core where all take 13; active units by the paper's rule. ``--paper`` is the paper's schedule, and all test images:
batches of 20, 3^i passes at 1e-3 x 10^(-i/7), i = 0 to 7, 3,280 in all.

    python benchmarks/mnist_iwae.py   # goes on where it was interrupted
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import record, recorded
from mnist_table import interval

from pyro_vae import Dataset, Run, fit, load_dataset, load_run
from pyro_vae.estimators import IWAE, DReG, Estimator
from pyro_vae.guides import AmortizedGuide
from pyro_vae.models import VAE
from pyro_vae.nn import MLP
from pyro_vae.schedules import Cosine

HERE = Path(__file__).parent
EPOCHS = 10
ROWS = {  # estimator, draws, and the paper's negative log-likelihood and active units
    "VAE 1": (lambda: MeanOfDraws(1), "86.76, 19"),
    "VAE 5": (lambda: MeanOfDraws(5), "86.47, 20"),
    "VAE 50": (lambda: MeanOfDraws(50), "86.35, 20"),
    "IWAE 5": (lambda: IWAE(5), "85.54, 22"),
    "IWAE 50": (lambda: IWAE(50), "84.78, 25"),
    "DReG 5": (lambda: DReG(5), ""),
    "DReG 50": (lambda: DReG(50), ""),
}


class MeanOfDraws(Estimator):
    """The mean of the log-weights, as the paper's VAE has it."""

    linear = True

    def bound(self, log_weight: torch.Tensor) -> torch.Tensor:
        return log_weight.mean(0)


def falling(epoch: float) -> float:
    """The paper's steps: a factor 10^(-i/7) for 3^i passes each."""
    ends = list(itertools.accumulate(3**i for i in range(8)))
    return 10 ** -(next((i for i, end in enumerate(ends) if epoch < end), 7) / 7)


def train(name: str, digits: Dataset, seed: int, arguments: argparse.Namespace) -> Run:
    epochs = 3280 if arguments.paper else arguments.epochs
    path = arguments.out / f"{'paper' if arguments.paper else epochs}" / f"{name.replace(' ', '-')}-{seed}"
    if (path / "model.safetensors").exists():
        return load_run(path)
    torch.manual_seed(seed)
    network = MLP(hidden=(200, 200), activation="tanh")
    model = VAE(digits.event_shape, latent_dim=50, decoder=network)
    guide = AmortizedGuide(model, encoder=network)
    with torch.no_grad():
        model.decoder.output.bias.copy_(digits.train.x.mean(0).flatten().clamp(1e-3, 1 - 1e-3).logit())
    begun = (path / "checkpoints" / "last.safetensors").exists()
    batch = 20 if arguments.paper else 100
    return fit(
        model,
        guide,
        digits.train,
        loss=ROWS[name][0](),
        optimizer=partial(torch.optim.Adam, lr=1e-3, eps=1e-4 * batch),
        learning_rate=falling if arguments.paper else Cosine(epochs),
        epochs=epochs,
        batch_size=batch,
        seed=seed,
        resume=path if begun else None,
        out=None if begun else path,
    )


def table(results: dict[str, Any]) -> str:
    """Means over seeds and their standard errors."""
    lines = [
        "| row | -log p(x), test | -ELBO, test | active units | paper | seconds an epoch |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in results["rows"].items():
        parts = [interval([run[key] for run in runs.values()]) for key in ("negative_log_likelihood", "negative_elbo")]
        units, seconds = (
            statistics.mean(run[key] for run in runs.values()) for key in ("active_units", "seconds_an_epoch")
        )
        lines.append(f"| {name} | {' | '.join(parts)} | {units:.1f} | {ROWS[name][1]} | {seconds:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--paper", action="store_true", help="the paper's 3,280 passes")
    parser.add_argument("--num_samples", type=int, default=5000)
    parser.add_argument("--test_images", type=int, default=2000)
    parser.add_argument("--root", default=None, help="folder of the data (default: PYRO_VAE_DATA)")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist_iwae"))
    arguments = parser.parse_args()
    digits = load_dataset("mnist", binarize="dynamic", root=arguments.root)
    target = HERE / ("mnist_iwae_paper.json" if arguments.paper else "mnist_iwae.json")
    for seed, name in itertools.product(arguments.seeds, arguments.rows):
        if str(seed) in recorded(target)["rows"].get(name, {}):
            continue
        run = train(name, digits, seed, arguments)
        images = digits.test.observed[: None if arguments.paper else arguments.test_images]
        test = run.evaluate(images, num_samples=arguments.num_samples)
        results = recorded(target)  # another process may have added rows meanwhile
        results["rows"].setdefault(name, {})[str(seed)] = {
            "negative_log_likelihood": -float(test.log_evidence),
            "standard_error_over_images": test.log_evidence.standard_error,
            "negative_elbo": -float(test.elbo),
            "kl": float(test.kl),
            "active_units": test.active_units,
            "epochs": len(run.history),
            "seconds_an_epoch": run.history[-1]["seconds"] / len(run.history),
        }
        record(target, results)
    print(table(json.loads(target.read_text())))


if __name__ == "__main__":
    main()
