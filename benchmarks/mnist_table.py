"""What mnist_flows.py and mnist_priors.py share: rows of one table, trained on MNIST with one budget.

The VampPrior paper's one-layer set-up (arXiv 1705.07120): networks of two gated layers of 300 units, 40 latent
dimensions, statically binarised digits, 50,000 / 10,000 / 10,000 of them. Every row has the same seeds, epochs, batches
of 100, Adam along half a cosine, and KL warm-up. The step size was chosen on validation data for the row without flow
and prior (`--choose`), and the other rows take it over; epochs and warm-up are what two cores allow. That row is scored
by both scripts, from the same weights and draws; every other one once for each seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from common import record
from pyro.infer import Trace_ELBO

from pyro_vae import CompiledSVI, Dataset, Run, fit, load_dataset, load_run
from pyro_vae.guides import AmortizedGuide, families
from pyro_vae.models import VAE, priors
from pyro_vae.nn import MLP
from pyro_vae.schedules import Cosine, Warmup

HERE = Path(__file__).parent
LATENT = 40
BATCH = 100
LEARNING_RATE = 2e-3
WARMUP = 5
EPOCHS = 30
NETWORK = MLP(hidden=(300, 300), activation="glu")
Row = Callable[[Dataset], tuple[VAE, AmortizedGuide]]


def pair(family: families.Family | None = None, prior: Any = None) -> Row:
    def make(digits: Dataset) -> tuple[VAE, AmortizedGuide]:
        p = prior(digits) if prior else priors.StandardNormal(LATENT)
        encoder, q = getattr(p, "encoder", NETWORK), getattr(p, "family", family or families.DiagonalNormal())
        model = VAE(digits.event_shape, prior=p, decoder=NETWORK)
        with torch.no_grad():
            model.decoder.output.bias.copy_(digits.train.x.mean(0).flatten().clamp(1e-3, 1 - 1e-3).logit())
        return model, AmortizedGuide(model, encoder=encoder, family=q)

    return make


BASE = pair()  # a row of both tables, trained once


def train(name: str, row: Row, digits: Dataset, seed: int, arguments: argparse.Namespace) -> Run:
    settings = f"{arguments.epochs} epochs, {arguments.learning_rate:g}, {arguments.warmup:g}"
    path = arguments.out / settings / f"{'standard' if row is BASE else name}-{seed}"
    if (path / "model.safetensors").exists():
        return load_run(path)
    torch.manual_seed(seed)
    model, guide = row(digits)
    begun = (path / "checkpoints" / "last.safetensors").exists()
    return fit(
        model,
        guide,
        digits.train,
        valid=digits.valid,
        loss=Trace_ELBO(),
        optimizer=partial(torch.optim.Adam, lr=arguments.learning_rate),
        learning_rate=Cosine(arguments.epochs),
        kl_weight=Warmup(arguments.warmup),
        epochs=arguments.epochs,
        batch_size=BATCH,
        seed=seed,
        resume=path if begun else None,
        out=None if begun else path,
    )


def step_times(rows: dict[str, Row], digits: Dataset, turns: int = 20, steps: int = 20) -> dict[str, float]:
    """Milliseconds for a compiled step, in turns; medians."""
    contestants: dict[str, CompiledSVI] = {}
    x = digits.train.x[:BATCH]
    for name, row in rows.items():
        model, guide = row(digits)
        adam = partial(torch.optim.Adam, lr=1e-4)
        contestants[name] = CompiledSVI(model, guide, adam, Trace_ELBO())
        for _ in range(20):
            contestants[name].step(x)
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _, (name, svi) in itertools.product(range(turns), contestants.items()):
        begin = time.perf_counter()
        for _ in range(steps):
            svi.step(x)
        times[name].append((time.perf_counter() - begin) / steps * 1e3)
    return {name: round(statistics.median(each), 3) for name, each in times.items()}


def interval(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f} (one run)"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


def table(results: dict[str, Any]) -> str:
    """Means over seeds and their standard errors."""
    lines = [
        "| row | -ELBO, test | -log p(x), test | KL | active units | ms a step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in results["rows"].items():
        parts = [
            interval([run[key] for run in runs.values()]) for key in ("negative_elbo", "negative_log_likelihood", "kl")
        ]
        units = statistics.mean(run["active_units"] for run in runs.values())
        lines.append(f"| {name} | {' | '.join(parts)} | {units:.1f} | {results['step_milliseconds'].get(name, '')} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], target: Path) -> None:
    """Both test scores of every row and seed."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(results["rows"])[::-1]
    figure, axes = plt.subplots(figsize=(7, 1 + 0.35 * len(names)), layout="constrained")
    for key, label, marker in (("negative_elbo", "-ELBO", "o"), ("negative_log_likelihood", "-log p(x)", "D")):
        dots = [(run[key], i) for i, name in enumerate(names) for run in results["rows"][name].values()]
        axes.scatter(*zip(*dots, strict=True), marker=marker, s=22, alpha=0.7, label=label)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="nats per test image, a mark per seed")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.savefig(target, dpi=130)


def main(script: str, rows: dict[str, Row], also_timed: dict[str, Row], doc: str) -> None:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=rows, default=list(rows))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--learning_rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--warmup", type=float, default=WARMUP)
    parser.add_argument("--num_samples", type=int, default=200)
    parser.add_argument("--choose", action="store_true", help="train and print the validation bound; no test score")
    parser.add_argument("--times", action="store_true", help="time the steps of all rows, on a quiet machine")
    parser.add_argument("--root", default=None, help="folder of the data (default: PYRO_VAE_DATA)")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist_table"))
    arguments = parser.parse_args()
    digits = load_dataset("mnist", binarize="static", root=arguments.root)
    target = HERE / f"{script}.json"
    results = json.loads(target.read_text()) if target.exists() else {"rows": {}, "step_milliseconds": {}}
    results.pop("machine", None)
    if arguments.times:
        results["step_milliseconds"] = step_times(rows | also_timed, digits)
        record(target, results)
    else:
        for seed, name in itertools.product(arguments.seeds, arguments.rows):
            run = train(name, rows[name], digits, seed, arguments)
            print(name, seed, json.dumps(run.history[-1]), flush=True)
            if arguments.choose or str(seed) in results["rows"].get(name, {}):
                continue
            test = run.evaluate(digits.test, num_samples=arguments.num_samples, compile=True)
            score = {
                "negative_elbo": -float(test.elbo),
                "negative_log_likelihood": -float(test.log_evidence),
                "kl": float(test.kl),
                "active_units": test.active_units,
                "valid": -run.history[-1]["valid"],
                "training_seconds": run.history[-1]["seconds"],
            }
            results = json.loads(target.read_text()) if target.exists() else results
            results.pop("machine", None)
            results["rows"].setdefault(name, {})[str(seed)] = score
            budget = {name: getattr(arguments, name) for name in ("epochs", "learning_rate", "warmup", "num_samples")}
            record(target, results | budget)
    print(table(results))
    if results["rows"]:
        draw(results, HERE / f"{script}.png")
