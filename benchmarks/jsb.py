"""Deep Markov models on JSB chorales: nats per frame of the test split, and the time of a step beside Pyro's own loop.

Rows: the model of arXiv 1609.09869 (z 100, emission 100, transition 200, RNN 600; Adam 8e-4, batch 20, gradient norm
1, KL weight from 0.01 to 1 over 5,000 steps; not its L2 term) with the inference networks ST-R (its DKS), ST-LR and
MF-LR, and the model of Pyro's tutorial (z_1 from a learned z_0, a ReLU RNN, Adam 3e-4 with betas 0.96 and 0.999, norm
10, decay 0.99996 a step, KL weight from 0.2 over 1,000 epochs). "budget", "both cores" and "weight decay" are the
tutorial's model with a GRU and a schedule for the time there is: 8e-4 falling to 0 along half a cosine over 1,000,
1,800 or 1,450 epochs, KL weight from 0.2 over 300, 600 or 600, decoupled weight decay 0, 0.1 or 0.5. Each trains for as
many epochs as fit into its `--minutes`, compilation counted, and keeps the weights of the best validation bound; the
test split is scored once. The figure has the validation bounds.

``--time`` measures steps in alternation: `CompiledSVI` and Pyro's `SVI` on a loop with a site for each step, whose
encoder is torch's own RNN, of the same modules, and what of either goes into matrix products; with ``--kept_memory``
both after `keep_freed_memory`.

    python benchmarks/jsb.py                    # rows that are recorded are kept
    python benchmarks/jsb.py --rows ST-R --minutes 30
    python benchmarks/jsb.py --time
    python benchmarks/jsb.py --time --kept_memory
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import pyro
import torch
from common import record, recorded
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor, nn

from pyro_vae import CompiledSVI, Run, fit, load_dataset
from pyro_vae.compiled import keep_freed_memory
from pyro_vae.guides import StateSpaceGuide
from pyro_vae.guides.state_space import TanhCombiner
from pyro_vae.models import DeepMarkovModel, likelihoods
from pyro_vae.schedules import Cosine, Exponential, Warmup
from pyro_vae.sequences import steps_of

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
BATCH = 20
STEPS_PER_EPOCH = 12
PAPER = {
    "optimizer": partial(torch.optim.Adam, lr=8e-4, fused=True),
    "clip_norm": 1.0,
    "kl_weight": Warmup(5000 / STEPS_PER_EPOCH, start=0.01),
}
TUTORIAL = {
    "optimizer": partial(torch.optim.Adam, lr=3e-4, betas=(0.96, 0.999), fused=True),
    "clip_norm": 10.0,
    "kl_weight": Warmup(1000, start=0.2),
    "learning_rate": Exponential(0.99996**STEPS_PER_EPOCH),
}
BUDGET = {
    "optimizer": partial(torch.optim.Adam, lr=8e-4, betas=(0.96, 0.999), fused=True),
    "clip_norm": 10.0,
    "kl_weight": Warmup(300, start=0.2),
    "learning_rate": Cosine(1000),
    "epochs": 1000,
}
BOTH_CORES = {
    "optimizer": partial(torch.optim.AdamW, lr=8e-4, betas=(0.96, 0.999), weight_decay=0.1, fused=True),
    "clip_norm": 10.0,
    "kl_weight": Warmup(600, start=0.2),
    "learning_rate": Cosine(1800),
    "epochs": 1800,
}
WEIGHT_DECAY = BOTH_CORES | {
    "optimizer": partial(torch.optim.AdamW, lr=8e-4, betas=(0.96, 0.999), weight_decay=0.5, fused=True),
    "learning_rate": Cosine(1450),
    "epochs": 1450,
}


class Row(NamedTuple):
    inference: str
    cell: str
    start: str
    settings: dict[str, Any]
    published: str  # bound, and the importance-sampled figure where there is one


ROWS = {
    "ST-R": Row("ST-R", "lstm", "normal", PAPER, "6.926 / 6.388"),
    "ST-LR": Row("ST-LR", "lstm", "normal", PAPER, ""),
    "MF-LR": Row("MF-LR", "lstm", "normal", PAPER, ""),
    "tutorial": Row("ST-R", "relu_rnn", "transition", TUTORIAL, "6.87"),
    "budget": Row("ST-R", "gru", "transition", BUDGET, ""),
    "both cores": Row("ST-R", "gru", "transition", BOTH_CORES, ""),
    "weight decay": Row("ST-R", "gru", "transition", WEIGHT_DECAY, ""),
}


class Size(NamedTuple):
    """latent, hidden of the encoder, batch, steps; hidden of the transition and the emission; width of x."""

    Z: int
    rnn: int
    B: int
    T: int
    transition: int
    emission: int
    D: int = 88


SIZES = [
    Size(100, 600, 20, 60, 200, 100),
    Size(8, 64, 32, 250, 32, 32),
    Size(2, 32, 64, 100, 32, 32),
    Size(1, 40, 250, 25, 32, 32),
    Size(1, 40, 250, 25, 32, 32, D=1),  # as the paper's simulated sequences: Normal, not 88 keys
]


def pair(row: Row, size: Size = SIZES[0]) -> tuple[DeepMarkovModel, StateSpaceGuide]:
    model = DeepMarkovModel(
        (size.D,),
        size.Z,
        size.transition,
        (size.emission, size.emission),
        row.start,
        likelihood=likelihoods.Bernoulli() if size.D > 1 else likelihoods.Normal(),
    )
    return model, StateSpaceGuide(model, row.inference, size.rnn, row.cell, TanhCombiner())


def train(name: str, arguments: argparse.Namespace) -> tuple[Run, float]:
    """The run, and its minutes."""
    row, path = ROWS[name], arguments.out / name
    data = load_dataset("jsb_chorales", root=arguments.root)
    torch.manual_seed(arguments.seed)
    model, guide = pair(row)
    with torch.no_grad():
        share = data.train.x.sum((0, 1)) / data.train.kwargs["lengths"].sum()
        model.emission.network.output.bias.copy_(share.clamp(1e-3, 1 - 1e-3).logit())
    start = time.monotonic()
    run = fit(
        model,
        guide,
        data.train,
        valid=data.valid,
        loss=TraceMeanField_ELBO(),
        batch_size=BATCH,
        patience=arguments.patience,
        callbacks=[lambda run: time.monotonic() - start > 60 * arguments.minutes],
        seed=arguments.seed,
        compile=True,
        out=path,
        overwrite=True,
        **{"epochs": 5000, **row.settings},
    )
    return run, (time.monotonic() - start) / 60


def score(name: str, run: Run, minutes: float, arguments: argparse.Namespace) -> dict[str, Any]:
    data = load_dataset("jsb_chorales", root=arguments.root)
    test = run.evaluate(data.test, num_samples=arguments.num_samples)
    frames = int(data.valid.kwargs["lengths"].sum()) / len(data.valid)
    curve = [[round(r["seconds"]), -r["valid"] / frames] for r in run.history]
    assert test.per_step is not None
    return {
        "bound": -test.per_step["elbo"].value,
        "standard_error": test.per_step["elbo"].standard_error,
        "importance_sampled": -test.per_step["log_evidence"].value,
        "importance_sampled_standard_error": test.per_step["log_evidence"].standard_error,
        "num_samples": arguments.num_samples,
        "best_valid_bound": min(valid for _, valid in curve),
        "epochs": len(run.history),
        "best_epoch": 1 + min(range(len(curve)), key=lambda i: curve[i][1]),
        "minutes": minutes,
        "minutes_to_compile": minutes - run.history[-1]["seconds"] / 60,
        "threads": torch.get_num_threads(),
        "seed": arguments.seed,
        "published": ROWS[name].published,
        "curve": curve[:: max(1, len(curve) // 200)],
    }


def figure(rows: dict[str, Any], path: Path) -> None:
    drawn, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for i, name in enumerate(ROWS):
        if name in rows:
            seconds, bounds = zip(*rows[name]["curve"], strict=True)
            label = f"{name}, threads: {rows[name]['threads']}"
            axis.plot([each / 60 for each in seconds], bounds, color=f"C{i}", lw=1.4, label=label)
    axis.set(ylim=(6.9, 9.5), xlabel="minutes of training", ylabel="-bound, nats per frame")
    axis.set_title("JSB chorales, validation split")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    drawn.savefig(path, dpi=150)


def loop(model: DeepMarkovModel, guide: StateSpaceGuide) -> tuple[Callable, Callable]:
    """The same pair with a site for each step, the encoder torch's own recurrent network of the same parameters."""
    cell = guide.cells["R"]
    kinds = {nn.GRUCell: nn.GRU, nn.LSTMCell: nn.LSTM, nn.RNNCell: nn.RNN}
    options = {"nonlinearity": cell.nonlinearity} if isinstance(cell, nn.RNNCell) else {}
    network = kinds[type(cell)](cell.input_size, cell.hidden_size, batch_first=True, **options)
    for parameter, value in cell.named_parameters():
        setattr(network, f"{parameter}_l0", value)

    def site(name: str, p: Any, there: Tensor, **kwargs: Any) -> Tensor:
        with poutine.mask(mask=there):
            return pyro.sample(name, p, **kwargs)

    def per_step(x: Tensor, lengths: Tensor) -> None:
        pyro.module("model", model)
        there = torch.arange(x.shape[1]) < lengths[:, None]
        z = torch.empty(0)
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                z = site(f"z_{t}", model.transition(z) if t else model.initial(), there[:, t])
                site(f"x_{t}", model.emission(z), there[:, t], obs=x[:, t])

    def per_step_guide(x: Tensor, lengths: Tensor) -> None:
        pyro.module("guide", guide)
        steps = steps_of(x, lengths)
        there = steps.there
        last = lengths[:, None] - 1
        backwards = (last - torch.arange(x.shape[1])).clamp(min=0)[..., None]  # each sequence reversed on its own
        given = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        h = network(given.gather(1, backwards.expand_as(given)))[0]
        h = h.gather(1, backwards.expand_as(h))
        z = guide.before.expand(len(x), -1) if guide.structured else None
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                z = site(f"z_{t}", guide.step(z, h[:, t]), there[:, t])

    return per_step, per_step_guide


def contestant(kind: str, size: Size, kept_memory: bool, channel: Any) -> None:
    """So many steps when it is told, in a process with a parameter store of its own: what another SVI does to a shared
    one makes `CompiledSVI` record anew."""
    if kept_memory:
        assert keep_freed_memory(), "expected glibc"
    torch.manual_seed(0)
    model, guide = pair(Row("ST-R", "gru", "normal", {}, ""), size)
    x = (torch.rand(size.B, size.T, size.D) < 0.05).float() if size.D > 1 else torch.randn(size.B, size.T, 1)
    lengths = torch.full((size.B,), size.T)
    programs = loop(model, guide) if kind == "stock" else (model, guide)
    torch.manual_seed(0)
    channel.send(TraceMeanField_ELBO().loss(*programs, x, lengths=lengths))
    maker: Any = SVI if kind == "stock" else CompiledSVI
    svi = maker(*programs, ClippedAdam({"lr": 1e-5, "clip_norm": 10.0}), TraceMeanField_ELBO())
    step = partial(svi.step, x, lengths=lengths)
    while steps := channel.recv():
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        channel.send(seconds)
    channel.send((getattr(svi, "compiled", False), products(step, 3 if kind == "stock" else 10)))
    channel.recv()  # as an end beside the other's last steps would take their time


def products(step: Callable[[], Any], steps: int) -> float:
    """Seconds that a step spends in matrix products."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            step()
    kinds = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise", "mkldnn::_reorder_linear_weight")
    found = [e.self_cpu_time_total for e in profile.key_averages() if e.key in kinds]
    return sum(found) / steps / 1e6


def timed(size: Size, kept_memory: bool, repetitions: int = 7) -> dict[str, Any]:
    """Seconds of a step, medians, in alternation; and that both are the same objective."""
    context = multiprocessing.get_context("spawn")
    channels, losses, first = {}, {}, {}
    for kind in ("stock", "compiled"):
        channels[kind], other = context.Pipe()
        context.Process(target=contestant, args=(kind, size, kept_memory, other), daemon=True).start()
        losses[kind] = channels[kind].recv()

    def seconds_of(kind: str, steps: int) -> Any:
        channels[kind].send(steps)
        return channels[kind].recv()

    for kind in channels:
        first[kind] = sum(seconds_of(kind, 2))  # of which one is eager
        seconds_of(kind, 2)
    seconds = {kind: [] for kind in channels}
    for _ in range(repetitions):
        for kind in channels:
            seconds[kind] += seconds_of(kind, 2 if kind == "stock" else 6)
    found = {kind: statistics.median(times) for kind, times in seconds.items()}
    (_, stock_products), (compiled, compiled_products) = (seconds_of(kind, 0) for kind in channels)
    for channel in channels.values():
        channel.send(None)
    return {
        "size": size._asdict(),
        "stock_seconds": found["stock"],
        "compiled_seconds": found["compiled"],
        "ratio": found["stock"] / found["compiled"],
        "first_steps_seconds": first["compiled"],
        "stock_products_seconds": stock_products,
        "compiled_products_seconds": compiled_products,
        "compiled": compiled,
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--patience", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_samples", type=int, default=2000)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--kept_memory", action="store_true", help="time both with keep_freed_memory()")
    parser.add_argument("--root", default=None, help="folder of the data (default: PYRO_VAE_DATA)")
    parser.add_argument("--out", type=Path, default=Path("runs/jsb"))
    arguments = parser.parse_args()
    if arguments.time:
        sizes = [timed(size, arguments.kept_memory) for size in SIZES]
        record(HERE / f"jsb_time{'_kept_memory' if arguments.kept_memory else ''}.json", {"sizes": sizes})
        for each in sizes:
            print(f"{tuple(each['size'].values())}: {each['ratio']:.1f}")
        return
    target = HERE / "jsb.json"
    for name in arguments.rows:
        results = recorded(target)
        if name not in results["rows"]:
            row = score(name, *train(name, arguments), arguments)
            results = recorded(target)
            results["rows"][name] = row
            record(target, results)
        row = results["rows"][name]
        print(f"{name:>10}  bound {row['bound']:.3f} ± {row['standard_error']:.3f}, {row['importance_sampled']:.3f}")
    figure(recorded(target)["rows"], HERE / "jsb.png")


if __name__ == "__main__":
    main()
