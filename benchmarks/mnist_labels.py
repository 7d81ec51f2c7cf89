"""What labels and latent spaces know of each other on MNIST: clusters of Gaussian-mixture VAEs, and few labels.

Rows "10 clusters" and "30 clusters": a VAE whose prior is a mixture of as many Gaussians, learned with it; "fitted 10"
and "fitted 30": one fitted afterwards to the posterior means of a VAE with a standard normal prior (arXiv 1903.12436).
A cluster is called by the digit that most of its training images show; accuracy is of the test images. 784-500-10.

Rows "100 labels" and "3000 labels": the model M2 (arXiv 1406.5298), 784-500-50, with as many labelled training images,
balanced, among 50,000, repeated until they are about a tenth of the rows. Pyro's tutorial on the semi-supervised VAE
has 93.2 % and 95.8 %. The KL weighs `kl_start` at first: z is dear then, and the label tells what it can of the image.

    python benchmarks/mnist_labels.py   # goes on where it was interrupted
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
from torch import Tensor

from pyro_vae import Dataset, fit, load_dataset
from pyro_vae.data import Split
from pyro_vae.estimators import SemiSupervisedELBO
from pyro_vae.guides import AmortizedGuide
from pyro_vae.models import VAE, SemiSupervisedVAE, priors
from pyro_vae.nn import MLP
from pyro_vae.schedules import Cosine, Warmup

HERE = Path(__file__).parent
NETWORK = MLP(hidden=(500,))
ROWS = {  # how many, of what, and epochs
    "10 clusters": (10, "learned", 20),
    "30 clusters": (30, "learned", 20),
    "fitted 10": (10, "fitted", 20),
    "fitted 30": (30, "fitted", 20),
    "100 labels": (100, "labels", 40),
    "3000 labels": (3000, "labels", 40),
}
TUTORIAL = {"100 labels": 93.2, "3000 labels": 95.8}


def training(seed: int, epochs: int, path: Path) -> dict[str, Any]:
    begun = (path / "checkpoints" / "last.safetensors").exists()
    return {
        "optimizer": partial(torch.optim.Adam, lr=1e-3),
        "learning_rate": Cosine(epochs),
        "epochs": epochs,
        "seed": seed,
        "resume": path if begun else None,
        "out": None if begun else path,
    }


def clusters(digits: Dataset, components: int, how: str, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(seed)
    prior = priors.GaussianMixture(10, components) if how == "learned" else priors.StandardNormal(10)
    model = VAE(digits.event_shape, prior=prior, decoder=NETWORK)
    guide = AmortizedGuide(model, NETWORK)
    prior_name = f"mixture-{components}" if how == "learned" else "standard"
    path = arguments.out / f"{arguments.epochs} epochs" / f"{prior_name}-{seed}"
    settings = training(seed, arguments.epochs, path)
    run = fit(model, guide, digits.train, valid=digits.valid, kl_weight=Warmup(5), **settings)
    z = run.encode(digits.train).mean
    mixture = model.prior if how == "learned" else priors.GaussianMixture.fitted(z, components, seed=seed)

    def members(split: Split) -> Tensor:
        return mixture.responsibilities(run.encode(split).mean).argmax(-1)

    votes = torch.zeros(components, 10)
    votes.index_put_((members(digits.train), digits.train.labels), torch.ones(len(digits.train)), accumulate=True)
    names = votes.argmax(-1)
    return {
        name: 100 * (names[members(split)] == split.labels).float().mean().item()
        for name, split in (("valid", digits.valid), ("test", digits.test))
    }


def labels(digits: Dataset, count: int, _: str, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(seed)
    model = SemiSupervisedVAE(digits.event_shape, classes=10, latent_dim=50, decoder=NETWORK)
    guide = AmortizedGuide(model, NETWORK)
    order = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(seed))
    known = torch.cat([order[digits.train.labels[order] == digit][: count // 10] for digit in range(10)])
    hidden = torch.full((len(digits.train), 10), torch.nan)
    given = torch.eye(10)[digits.train.labels[known]]
    copies = max(1, round(len(digits.train) / (9 * count)))
    data = (
        torch.cat([digits.train.x, digits.train.x[known].repeat(copies, 1, 1, 1)]),
        torch.cat([hidden, given.repeat(copies, 1)]),
    )
    loss = SemiSupervisedELBO(max_plate_nesting=1, classification=arguments.classification)
    folder = f"{arguments.epochs} epochs, {arguments.classification:g}, {arguments.kl_start:g}"
    settings = training(seed, arguments.epochs, arguments.out / folder / f"labels-{count}-{seed}")
    run = fit(model, guide, data, loss=loss, kl_weight=Warmup(arguments.epochs / 2, arguments.kl_start), **settings)
    with torch.no_grad():
        return {
            name: 100 * (run.guide.posterior(split.x, site="y").probs.argmax(-1) == split.labels).float().mean().item()
            for name, split in (("valid", digits.valid), ("test", digits.test))
        }


def table(results: dict[str, Any]) -> str:
    """Means over seeds and their standard errors."""
    lines = ["| row | accuracy, test, % | Pyro's tutorial |", "| --- | --- | --- |"]
    for name, runs in results["rows"].items():
        test = [run["test"] for run in runs.values()]
        error = f" ± {statistics.stdev(test) / len(test) ** 0.5:.2f}" if len(test) > 1 else " (one run)"
        lines.append(f"| {name} | {statistics.mean(test):.2f}{error} | {TUTORIAL.get(name, '')} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=None, help="default: 20 for clusters, 40 for labels")
    parser.add_argument("--classification", type=float, default=200.0)
    parser.add_argument("--kl_start", type=float, default=5.0, help="KL weight, falling to 1 by half the epochs")
    parser.add_argument("--choose", action="store_true", help="print the validation accuracy; no test score")
    parser.add_argument("--root", default=None, help="folder of the data (default: PYRO_VAE_DATA)")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist_labels"))
    arguments = parser.parse_args()
    digits = load_dataset("mnist", binarize="static", root=arguments.root)
    target = HERE / "mnist_labels.json"
    for seed, name in itertools.product(arguments.seeds, arguments.rows):
        if str(seed) in recorded(target)["rows"].get(name, {}) and not arguments.choose:
            continue
        number, how, epochs = ROWS[name]
        settings = argparse.Namespace(**{**vars(arguments), "epochs": arguments.epochs or epochs})
        accuracy = (labels if how == "labels" else clusters)(digits, number, how, seed, settings)
        print(name, seed, f"validation {accuracy['valid']:.2f} %", flush=True)
        if not arguments.choose:
            names = ["epochs", *(["classification", "kl_start"] if how == "labels" else [])]
            chosen = {each: getattr(settings, each) for each in names}
            results = recorded(target)  # another process may have added rows meanwhile
            results["rows"].setdefault(name, {})[str(seed)] = accuracy | chosen
            record(target, results)
    if not arguments.choose:
        print(table(json.loads(target.read_text())))


if __name__ == "__main__":
    main()
