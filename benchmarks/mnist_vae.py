"""The VAE of the IWAE paper (arXiv 1509.00519, table 1, one layer, k = 1) on dynamically binarised MNIST.

784-200-200-50 tanh, 50,000 / 10,000 / 10,000 images, batch 100, the analytic KL, Adam at 2e-3 falling to 0 along half a
cosine, and then twice more from the weights that this gave; the loss is a sum over the batch, so that eps = 1e-2 is the
paper's 1e-4 on a mean. Schedule, step size and KL were chosen on validation data in shorter runs. The script
scores the test set once, with L_5000; for the result beside it, see its note. A single run: no interval over seeds.

    python benchmarks/mnist_vae.py   # 700, 500 and 500 epochs; goes on where it was interrupted
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import matplotlib
import torch
from common import record
from pyro.infer import TraceMeanField_ELBO

from pyro_vae import Dataset, Run, evaluate, fit, load_dataset, load_run
from pyro_vae.guides import AmortizedGuide
from pyro_vae.models import VAE
from pyro_vae.nn import MLP
from pyro_vae.schedules import Cosine

HERE = Path(__file__).parent
PAPER = 86.76


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, nargs="+", default=[700, 500, 500], help="epochs of each cosine")
    parser.add_argument("--num_samples", type=int, default=5000)
    parser.add_argument("--root", default=None, help="folder of the data (default: PYRO_VAE_DATA)")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist_vae"))
    arguments = parser.parse_args()
    digits = load_dataset("mnist", binarize="dynamic", root=arguments.root)
    score(train(arguments, digits), digits, arguments.num_samples)


def train(arguments: argparse.Namespace, digits: Dataset) -> list[Run]:
    torch.manual_seed(0)
    network = MLP(hidden=(200, 200), activation="tanh")
    model = VAE(digits.event_shape, latent_dim=50, decoder=network)
    guide = AmortizedGuide(model, encoder=network)
    with torch.no_grad():
        pixels = digits.train.x.mean(0).flatten().clamp(1e-3, 1 - 1e-3)
        model.decoder.output.bias.copy_(pixels.logit())
    runs: list[Run] = []
    for cycle, epochs in enumerate(arguments.cycles):
        path = arguments.out / f"cycle{cycle}"
        if (path / "model.safetensors").exists():
            runs.append(load_run(path))
            model, guide = runs[-1].model, runs[-1].guide
            continue
        begun = (path / "checkpoints" / "last.safetensors").exists()
        runs.append(
            fit(
                model,
                guide,
                digits.train,
                valid=digits.valid,
                loss=TraceMeanField_ELBO(),
                optimizer=partial(torch.optim.Adam, lr=2e-3, eps=1e-2),
                learning_rate=Cosine(epochs),
                epochs=epochs,
                seed=cycle,
                resume=path if begun else None,
                out=None if begun else path,
            )
        )
    return runs


def score(runs: list[Run], digits: Dataset, num_samples: int) -> None:
    begin = time.monotonic()
    test = evaluate(runs[-1].model, runs[-1].guide, digits.test, num_samples=num_samples)
    print(test)
    results = {
        "what": f"VAE 784-200-200-50 tanh, dynamic binarisation, L_{num_samples}; one run",
        "epochs": [len(run.history) for run in runs],
        "negative_log_likelihood": -float(test.log_evidence),
        "standard_error_over_images": test.log_evidence.standard_error,
        "standard_error_over_draws": test.log_evidence.standard_error_draws,
        "negative_elbo": -float(test.elbo),
        "kl": float(test.kl),
        "active_units": test.active_units,
        "paper": {"negative_log_likelihood": PAPER, "active_units": 19},
        "training_seconds": sum(run.history[-1]["seconds"] for run in runs),
        "evaluation_seconds": time.monotonic() - begin,
        "history": [
            {key: round(record[key], 3) for key in ("epoch", "bound", "valid", "seconds")}
            for run in runs
            for record in run.history
        ],
    }
    record(HERE / "mnist_vae.json", results)
    draw(HERE / "mnist_vae.json", HERE / "mnist_vae.png")


def draw(source: Path, target: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = json.loads(source.read_text())
    history = results["history"]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    epochs = range(1, len(history) + 1)
    axes.plot(epochs, [record["bound"] for record in history], label="ELBO, training")
    axes.plot(epochs, [record["valid"] for record in history], label="ELBO, validation")
    axes.axhline(-results["negative_log_likelihood"], color="black", label="log p(x), test, once")
    axes.axhline(-PAPER, color="grey", linestyle="--", label=f"log p(x), paper: -{PAPER}")
    axes.set(xlabel="epoch", ylabel="nats per image", ylim=(-105, -82), title=results["what"])
    axes.title.set_fontsize(9)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
