"""Figure 2 of Auto-Encoding Variational Bayes (arXiv 1312.6114): the bound against training samples seen.

The paper's networks: one tanh hidden layer, 500 units for MNIST (dynamically binarised, Bernoulli) and 200 for Frey
(Normal with a sigmoid mean and a scale predicted from z); batch 100, one draw, the analytic KL, Adagrad, weights from
N(0, 0.01^2), a standard normal prior on the weights. The step size, of 0.01, 0.02 and 0.1, is the one with the best
validation bound after 300,000 samples. A row's test set is scored once, with the weights at the best validation bound.
One run per row: no interval over seeds.

``--wake_sleep`` trains the same networks by wake-sleep, the step size chosen alike; it adds its lines to the figure.

Beside the paper, for frames unlike those of the training: `frey_regularised` keeps the scale above a floor, has a
narrower prior on the weights, and stops early, with values chosen by leaving out blocks of 220 successive frames, none
of them test frames (`--choose`; at N_z = 5 and a step of 0.02, and taken for all rows). It is scored with the weights
at its end. That it was tried at all comes from the test scores of the plain rows.

    python benchmarks/aevb.py                  # all rows, up to 1e7 samples each; rows that are done are kept
    python benchmarks/aevb.py --rows mnist-3 frey-2
    python benchmarks/aevb.py --wake_sleep --samples 2.5e6
    python benchmarks/aevb.py --choose         # floor, prior and samples of frey_regularised: aevb_choose.json
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import matplotlib
import pyro
import torch
from common import machine, record
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

from pyro_vae import CompiledSVI, evaluate, fit, load_dataset
from pyro_vae.estimators import WakeSleep
from pyro_vae.guides import AmortizedGuide
from pyro_vae.models import VAE
from pyro_vae.models.likelihoods import Bernoulli, Normal
from pyro_vae.models.linear import LinearVAE
from pyro_vae.nn import MLP
from pyro_vae.svi import NonFiniteLossError

HERE = Path(__file__).parent
REGULARISED = "frey_regularised"
LATENTS = {"mnist": (3, 5, 10, 20, 200), "frey": (2, 5, 10, 20), REGULARISED: (2, 5, 10, 20)}
FLOOR, PRECISION, SAMPLES = 0.05, 100, 1_500_000  # of frey_regularised: aevb_choose.json
STEP_SIZES = (0.01, 0.02, 0.1)
SELECTION_SAMPLES = 300_000


def pair(name: str, event_shape: torch.Size, latent_dim: int, floor: float = FLOOR) -> tuple[VAE, AmortizedGuide]:
    torch.manual_seed(0)
    hidden, likelihood = {
        "mnist": (500, Bernoulli()),
        "frey": (200, Normal("predicted", mean="sigmoid")),
        REGULARISED: (200, Normal("predicted", mean="sigmoid", minimum_scale=floor)),
    }[name]
    network = MLP(hidden=(hidden,), activation="tanh")
    model = VAE(event_shape, latent_dim, likelihood=likelihood, decoder=network)
    guide = AmortizedGuide(model, encoder=network)
    for parameter in (*model.decoder.parameters(), *guide.parameters()):
        torch.nn.init.normal_(parameter, std=0.01)
    return model, guide


def train(name, dataset, latent_dim, step_size, samples, loss, **arguments):
    model, guide = pair(name, dataset.event_shape, latent_dim)
    precision = PRECISION if name == REGULARISED else 1
    best = {"valid": -float("inf"), "epoch": 0, "weights": {}}

    def keep(run):
        last = run.history[-1]
        if last["valid"] > best["valid"] or name == REGULARISED:
            weights = [{k: v.clone() for k, v in part.state_dict().items()} for part in (model, guide)]
            best.update(valid=last["valid"], epoch=last["epoch"], weights=weights)

    run = fit(
        model,
        guide,
        dataset.train,
        valid=dataset.valid,
        loss=loss,
        optimizer=partial(torch.optim.Adagrad, lr=step_size, weight_decay=precision * 100 / len(dataset.train)),
        epochs=max(1, round(samples / len(dataset.train))),
        callbacks=[keep],
        progress=False,
        overwrite=True,
        **arguments,
    )
    return run, best


def row(name: str, latent_dim: int, samples: int, root: str | None, out: Path, wake_sleep: bool = False) -> dict:
    source, binarize = ("mnist", "dynamic") if name == "mnist" else ("freyfaces", "none")
    dataset = load_dataset(source, binarize=binarize, root=root)
    loss = WakeSleep() if wake_sleep else TraceMeanField_ELBO()
    begin = time.monotonic()
    selection = {}
    for step_size in STEP_SIZES:
        try:
            run, _ = train(name, dataset, latent_dim, step_size, SELECTION_SAMPLES, loss, out=out / "selection")
            selection[step_size] = run.history[-1]["valid"]
        except NonFiniteLossError:
            continue  # diverged
    step_size = max(selection, key=selection.__getitem__)
    samples = SAMPLES if name == REGULARISED else samples
    run, best = train(name, dataset, latent_dim, step_size, samples, loss, out=out)
    for part, weights in zip((run.model, run.guide), best["weights"], strict=True):
        part.load_state_dict(weights)
    test = evaluate(run.model, run.guide, dataset.test, num_samples=500, progress=False)
    thinned = [r for i, r in enumerate(run.history) if i < 10 or i % max(1, len(run.history) // 200) == 0]
    result = {
        "latent_dim": latent_dim,
        "step_size": step_size,
        "selection": {str(key): round(selection[key], 3) if key in selection else "diverged" for key in STEP_SIZES},
        "best_epoch": best["epoch"],
        "seconds": round(time.monotonic() - begin, 1),
        "curve": [
            {"samples": r["epoch"] * len(dataset.train), "train": round(r["bound"], 3), "valid": round(r["valid"], 3)}
            for r in (*thinned, run.history[-1])
        ],
    }
    result["test"] = {
        "bound": round(float(test.elbo), 3),
        "log_evidence_500": round(float(test.log_evidence), 3),
        "standard_error_over_data": round(test.log_evidence.standard_error, 3),
    }
    if name != "mnist":
        pca = LinearVAE.maximum_likelihood(dataset.train.x.double(), latent_dim)
        with torch.no_grad():
            result["probabilistic_pca_test"] = round(pca.log_evidence(dataset.test.x.double()).mean().item(), 3)
    return result


def choose(root: str | None, target: Path) -> None:
    """For each floor and precision the bound on two blocks of frames, N_z = 5, trained on all others but the test's."""
    frey = load_dataset("freyfaces", root=root)
    frames = torch.cat([frey.train.x, frey.valid.x])
    bounds: dict[str, dict[str, dict[str, float]]] = {}
    for block in (2, 6):
        inside = torch.zeros(len(frames), dtype=torch.bool)
        inside[block * len(frames) // 8 : (block + 1) * len(frames) // 8] = True
        pca = LinearVAE.maximum_likelihood(frames[~inside].double(), 5)
        with torch.no_grad():
            exact = pca.log_evidence(frames[inside].double()).mean().item()
        of_block = bounds[f"block {block}"] = {"probabilistic PCA": {"log p": round(exact, 1)}}
        for floor, precision in ((0.05, 1), (0.05, 10), (0.05, 100), (0.05, 1000), (0.08, 100)):
            found = left_out(frames[~inside], frames[inside], floor, precision)
            of_block[f"floor {floor}, precision {precision}"] = found
            print(block, floor, precision, found, flush=True)
            record(target, {"what": "bound on left-out frames by training samples, nats; one run each", **bounds})


def left_out(train: Tensor, rest: Tensor, floor: float, precision: float) -> dict[str, float]:
    """The bound on the rest after some numbers of training samples."""
    pyro.clear_param_store()
    model, guide = pair(REGULARISED, train.shape[1:], 5, floor)
    optimizer = partial(torch.optim.Adagrad, lr=0.02, weight_decay=precision * 100 / len(train))
    svi = CompiledSVI(model, guide, optimizer, TraceMeanField_ELBO())
    generator, seen, bounds = torch.Generator().manual_seed(0), 0, {}
    for target in (400_000, 800_000, 1_500_000, 3_000_000):
        while seen < target:
            for rows in torch.randperm(len(train), generator=generator).split(100)[:-1]:
                svi.step(train[rows])
                seen += len(rows)
        bounds[f"{target:,}"] = round(float(evaluate(model, guide, rest, num_samples=20, progress=False).elbo), 1)
    return bounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [f"{name}-{latent_dim}" for name, dims in LATENTS.items() for latent_dim in dims]
    parser.add_argument("--rows", nargs="+", default=every, choices=every)
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--wake_sleep", action="store_true")
    parser.add_argument("--samples", type=float, default=1e7)
    parser.add_argument("--root", default=None, help="folder of the data (default: PYRO_VAE_DATA)")
    parser.add_argument("--results", type=Path, default=HERE / "aevb.json")
    arguments = parser.parse_args()
    if arguments.choose:
        return choose(arguments.root, HERE / "aevb_choose.json")
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {"rows": {}}
    rows = results.setdefault("wake_sleep" if arguments.wake_sleep else "rows", {})
    for key in arguments.rows:
        name, latent_dim = key.split("-")
        if key in rows or (arguments.wake_sleep and name == REGULARISED):
            continue
        out = Path("runs") / f"aevb-{key}{'-wake-sleep' * arguments.wake_sleep}"
        rows[key] = row(name, int(latent_dim), int(arguments.samples), arguments.root, out, arguments.wake_sleep)
        results["wake_sleep_machine" if arguments.wake_sleep else "machine"] = machine()
        record(arguments.results, {"what": "nats per datum; one run per row, seed 0", **results})
        print(key, {k: v for k, v in rows[key].items() if k != "curve"}, flush=True)
    draw(arguments.results, arguments.results.with_suffix(".png"))


def draw(source: Path, target: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = json.loads(source.read_text())
    rows, others = results["rows"], results.get("wake_sleep", {})
    drawn = {name: dims for name, dims in LATENTS.items() if any(f"{name}-{k}" in rows for k in dims)}
    columns = max(map(len, drawn.values()))
    figure, grid = plt.subplots(
        len(drawn), columns, figsize=(3 * columns, 3 * len(drawn)), layout="constrained", sharey="row", squeeze=False
    )
    for axes_of_row, (name, dims) in zip(grid, drawn.items(), strict=True):
        for axes, latent_dim in zip(axes_of_row, dims, strict=False):
            result = rows.get(f"{name}-{latent_dim}")
            if result is None:
                axes.axis("off")
                continue
            for curves, color, method in ((rows, "C1", "AEVB"), (others, "C2", "wake-sleep")):
                curve = curves.get(f"{name}-{latent_dim}", {"curve": []})["curve"]
                samples = [point["samples"] for point in curve]
                for split, line in (("train", "--"), ("valid", "-")):
                    values = [point[split] for point in curve]
                    axes.plot(samples, values, color + line, label=f"{method}, {split}" if curve else None)
            if "probabilistic_pca_test" in result:
                axes.axhline(result["probabilistic_pca_test"], color="grey", linestyle=":", label="pPCA, test")
            stopped = result["best_epoch"] * (50_000 if name == "mnist" else 1_565)
            axes.plot(stopped, result["test"]["bound"], "ko", label="AEVB, test, scored once")
            axes.set(
                xscale="log", title=f"{name}, $N_z$ = {latent_dim}".replace("_r", ", r"), xlabel="training samples"
            )
            axes.set_ylim((-170, -90) if name == "mnist" else (-200, 1500))
        for axes in axes_of_row[len(dims) :]:
            axes.axis("off")
        first = next(axes for axes in axes_of_row if axes.has_data())
        first.tick_params(labelleft=True)
        first.set_ylabel("bound, nats per datum")
        first.legend(frameon=False, fontsize=8, loc="upper left" if name == "frey" else "best")
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main()
