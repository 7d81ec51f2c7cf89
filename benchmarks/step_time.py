"""Seconds per training step: CompiledSVI against stock SVI, hand-written PyTorch, NumPyro, Pythae, and matrix products.

Every contestant runs the same mathematics on the same batch, on one core, in turns of a few steps each, so that a
machine that drifts favours nobody; medians and quartiles over the turns. `floor` is the step's matrix products alone.
`data` is what `fit` does for a batch beside the step, index selection and dynamic binarisation. `first_step_seconds`
holds the compiling, from an empty cache. Peak memory is of tensors in one warm step, over what lives between steps.
`pip install pyro_vae[benchmarks]` adds NumPyro, JAX and Pythae; those that are missing are left out.

    python benchmarks/step_time.py                       # all
    python benchmarks/step_time.py --rows vae-20 vae-100
    python benchmarks/step_time.py --rows quality        # needs MNIST: PYRO_VAE_DATA names its folder

`quality`: seconds of training, compiling included, until the bound on the 10,000 test images of binarised MNIST passes
-100 nats; the 784-400-50 VAE, batch 100, Adam 1e-3, 100 steps in turns; the median of the seeds, and each of them, a
quarter of an hour each.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # compile times are of an empty cache
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # XLA has no other way to one thread

import pyro
import pyro.distributions as dist
import torch
from common import record
from pyro.distributions.transforms import AffineAutoregressive
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_vae import CompiledSVI, load_dataset
from pyro_vae.data import Split

HERE = Path(__file__).parent
WHAT = "milliseconds per step on one core; quality: seconds until a bound of -100 nats"
Step = Callable[[], object]
PIXELS, HIDDEN, LATENT = 784, 400, 50


# ------------------------------------------------------------ Pyro programs, and the same by hand


class Networks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, PIXELS))


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 16, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 49, 2 * LATENT),
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENT, 32 * 49),
            nn.Unflatten(1, (32, 7, 7)),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 1, 4, 2, 1),
            nn.Flatten(),
        )


class Program:
    """A VAE as a Pyro program, and its loss by hand."""

    loss: object = TraceMeanField_ELBO()

    def __init__(self, networks: Callable[[], nn.Module] = Networks) -> None:
        self.networks = networks()

    def prior(self, x: Tensor) -> dist.TorchDistribution:
        return dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        location, log_scale = self.networks.encoder(x).chunk(2, -1)
        return location, log_scale.exp()

    def model(self, x: Tensor) -> None:
        pyro.module(f"networks-{id(self)}", self.networks)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            pyro.sample("x", dist.Bernoulli(logits=self.networks.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module(f"networks-{id(self)}", self.networks)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*self.posterior(x)).to_event(1))

    def by_hand(self, x: Tensor) -> Tensor:
        location, scale = self.posterior(x)
        z = location + scale * torch.randn_like(scale)
        distortion = F.binary_cross_entropy_with_logits(self.networks.decoder(z), x, reduction="sum")
        return distortion + 0.5 * (location**2 + scale**2 - 1 - 2 * scale.log()).sum()

    def parameters(self) -> list[nn.Parameter]:
        return list(self.networks.parameters())


def normal_log_prob(x: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    return (-0.5 * ((x - location) / scale) ** 2 - scale.log() - 0.9189385332046727).sum(-1)


class Mixture(Program):
    """A prior of 50 learned Gaussians."""

    loss = Trace_ELBO()

    def __init__(self) -> None:
        super().__init__()
        self.networks.locations = nn.Parameter(torch.randn(50, LATENT))
        self.networks.log_scales = nn.Parameter(torch.zeros(50, LATENT))

    def prior(self, x: Tensor) -> dist.TorchDistribution:
        components = dist.Normal(self.networks.locations, self.networks.log_scales.exp()).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=x.new_zeros(50)), components)

    def by_hand(self, x: Tensor) -> Tensor:
        location, scale = self.posterior(x)
        z = location + scale * torch.randn_like(scale)
        distortion = F.binary_cross_entropy_with_logits(self.networks.decoder(z), x, reduction="sum")
        components = normal_log_prob(z[:, None], self.networks.locations, self.networks.log_scales.exp())
        log_p = components.logsumexp(-1) - 3.912023005428146
        return distortion + (normal_log_prob(z, location, scale) - log_p).sum()


class Flow(Program):
    """An inverse autoregressive flow on the posterior."""

    loss = Trace_ELBO()

    def __init__(self) -> None:
        super().__init__()
        self.networks.iaf = AffineAutoregressive(pyro.nn.AutoRegressiveNN(LATENT, [200]))

    def guide(self, x: Tensor) -> None:
        pyro.module(f"networks-{id(self)}", self.networks)
        with pyro.plate("data", len(x)):
            base = dist.Normal(*self.posterior(x)).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [self.networks.iaf]))

    def by_hand(self, x: Tensor) -> Tensor:
        location, scale = self.posterior(x)
        start = location + scale * torch.randn_like(scale)
        shift, log_scale = self.networks.iaf.arn(start)
        log_scale = log_scale.clamp(self.networks.iaf.log_scale_min_clip, self.networks.iaf.log_scale_max_clip)
        z = log_scale.exp() * start + shift
        log_q = normal_log_prob(start, location, scale) - log_scale.sum(-1)
        log_p = normal_log_prob(z, torch.zeros_like(z), torch.ones_like(z))
        return F.binary_cross_entropy_with_logits(self.networks.decoder(z), x, reduction="sum") + (log_q - log_p).sum()


class ImportanceWeighted(Program):
    """The IWAE objective with 50 draws, as a loss function of the user's own."""

    K = 50

    def loss(self, model: Callable, guide: Callable, x: Tensor) -> Tensor:
        with pyro.plate("draws", self.K, dim=-2):
            guide_trace = pyro.poutine.trace(guide).get_trace(x)
            model_trace = pyro.poutine.trace(pyro.poutine.replay(model, guide_trace)).get_trace(x)
        guide_trace.compute_log_prob()
        model_trace.compute_log_prob()
        log_p = model_trace.nodes["z"]["log_prob"] + model_trace.nodes["x"]["log_prob"]
        return -(log_p - guide_trace.nodes["z"]["log_prob"]).logsumexp(0).sum()

    def by_hand(self, x: Tensor) -> Tensor:
        location, scale = self.posterior(x)
        z = location + scale * torch.randn(self.K, *scale.shape)
        logits = self.networks.decoder(z)
        log_x = -F.binary_cross_entropy_with_logits(logits, x.expand(logits.shape), reduction="none").sum(-1)
        log_z = normal_log_prob(z, torch.zeros_like(z), torch.ones_like(z)) - normal_log_prob(z, location, scale)
        return -(log_x + log_z).logsumexp(0).sum()


class Regression(Program):
    """y ~ N(X w + b, s), w and b standard normal, s log-normal; AutoNormal."""

    loss = Trace_ELBO()

    def __init__(self) -> None:
        self.guide = type(f"AutoNormal{id(self)}", (AutoNormal,), {})(self.model)  # its parameters are its own
        self.locations = {name: nn.Parameter(torch.zeros(shape)) for name, shape in (("w", 20), ("b", ()), ("s", ()))}
        self.scales = {name: nn.Parameter(torch.full_like(p, -2.25)) for name, p in self.locations.items()}

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(20), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x[:, :20] @ w + b, s), obs=x[:, 20])

    def by_hand(self, x: Tensor) -> Tensor:
        draws, log_q, log_p = {}, 0.0, 0.0
        for name, location in self.locations.items():
            scale = F.softplus(self.scales[name])
            z = draws[name] = location + scale * torch.randn_like(location)
            log_q = log_q + (normal_log_prob(z[..., None], location[..., None], scale[..., None])).sum()
            log_p = log_p + (normal_log_prob(z[..., None], torch.zeros(()), torch.ones(()))).sum()
        mean, scale = x[:, :20] @ draws["w"] + draws["b"], draws["s"].exp()
        return log_q - log_p - normal_log_prob(x[:, 20], mean, scale)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.locations.values(), *self.scales.values()]


ROWS: dict[str, tuple[Callable[[], Program], int]] = {
    "vae-20": (Program, 20),
    "vae-100": (Program, 100),
    "vae-512": (Program, 512),
    "convolutional-100": (lambda: Program(Convolutional), 100),
    "iaf-100": (Flow, 100),
    "mixture-100": (Mixture, 100),
    "iwae50-20": (ImportanceWeighted, 20),
    "regression-100": (Regression, 100),
}


# ------------------------------------------------------------ contestants: each gives a step, and the steps in one call


def stock(
    program: Program, x: Tensor, validate: bool = True, svi_class: type = SVI, learning_rate: float = 1e-4
) -> Callable[..., object]:
    svi = svi_class(program.model, program.guide, pyro.optim.Adam({"lr": learning_rate}), program.loss)

    def step(x: Tensor = x) -> object:
        with pyro.validation_enabled(validate):
            loss = svi.step(x)
        if svi_class is CompiledSVI and not svi.compiled:
            raise SystemExit(f"not compiled: {svi.fallback_reason}")
        return loss

    return step


def by_hand(program: Program, x: Tensor, compile: bool, learning_rate: float = 1e-4) -> Callable[..., object]:
    optimizer = torch.optim.Adam(program.parameters(), lr=learning_rate, fused=True)
    loss_function = torch.compile(program.by_hand) if compile else program.by_hand

    def step(x: Tensor = x) -> float:
        loss = loss_function(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def matrix_products(x: Tensor) -> Step:
    """Forward, and backward to weights and hidden units, with results written into place."""
    sizes = [(PIXELS, HIDDEN), (HIDDEN, 2 * LATENT), (LATENT, HIDDEN), (HIDDEN, PIXELS)]
    B = len(x)
    layers = [(torch.randn(B, i), torch.randn(i, o), torch.randn(B, o)) for i, o in sizes]
    out = [(torch.empty(B, o), torch.empty(i, o), torch.empty(B, i)) for i, o in sizes]

    def step() -> None:
        for layer, ((h, weight, gradient), (forward, to_weight, to_input)) in enumerate(zip(layers, out, strict=True)):
            torch.mm(h, weight, out=forward)
            torch.mm(h.T, gradient, out=to_weight)
            if layer:
                torch.mm(gradient, weight.T, out=to_input)

    return step


def next_batch(batch: int) -> Step:
    split = Split((torch.rand(60_000, PIXELS),), binarize="dynamic")
    order = itertools.cycle(torch.randperm(len(split)).split(batch))
    return lambda: split.batch(next(order))


def numpyro_svi(initial: nn.Module, learning_rate: float = 1e-4) -> Any:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as npd

    start = {name: jnp.asarray(value.detach().numpy()) + 0.0 for name, value in initial.named_parameters()}

    def dense(name: str, h: jax.Array) -> jax.Array:
        weight = numpyro.param(f"{name}.weight", start[f"{name}.weight"].T)
        return h @ weight + numpyro.param(f"{name}.bias", start[f"{name}.bias"])

    def model(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", npd.Normal(jnp.zeros(LATENT), 1.0).to_event(1))
            h = jax.nn.softplus(dense("decoder.0", z))
            numpyro.sample("x", npd.Bernoulli(logits=dense("decoder.2", h)).to_event(1), obs=x)

    def guide(x: jax.Array) -> None:
        h = jax.nn.softplus(dense("encoder.0", x))
        location, log_scale = jnp.split(dense("encoder.2", h), 2, -1)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", npd.Normal(location, jnp.exp(log_scale)).to_event(1))

    return numpyro.infer.SVI(model, guide, numpyro.optim.Adam(learning_rate), numpyro.infer.TraceMeanField_ELBO())


def numpyro_steps(x: Tensor, scan: int) -> Step:
    import jax
    import jax.numpy as jnp

    svi, data = numpyro_svi(Networks()), jnp.asarray(x.numpy())
    state = svi.init(jax.random.key(0), data)
    update = jax.jit(svi.update, donate_argnums=0)
    batches = jnp.broadcast_to(data, (max(scan, 1), *data.shape)) + 0.0
    epoch = jax.jit(lambda state, batches: jax.lax.scan(svi.update, state, batches), donate_argnums=0)

    def step() -> None:
        nonlocal state
        state, loss = epoch(state, batches) if scan else update(state, data)
        jax.block_until_ready(loss)

    return step


def pythae_steps(x: Tensor, batches: int) -> Step:
    import logging

    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    logging.disable(logging.WARNING)

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = Networks().encoder

        def forward(self, x: Tensor) -> ModelOutput:
            location, log_scale = self.network(x.flatten(1)).chunk(2, -1)
            return ModelOutput(embedding=location, log_covariance=2 * log_scale)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = Networks().decoder

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.network(z).sigmoid().reshape(-1, 1, 28, 28))

    model = VAE(VAEConfig((1, 28, 28), LATENT, reconstruction_loss="bce"), Encoder(), Decoder())
    images = x.repeat(batches, 1).reshape(-1, 1, 28, 28)
    config = BaseTrainerConfig(
        output_dir=tempfile.mkdtemp(), num_epochs=1, learning_rate=1e-4, no_cuda=True,
        per_device_train_batch_size=len(x), per_device_eval_batch_size=len(x),
    )  # fmt: skip
    trainer = BaseTrainer(model, BaseDataset(images, torch.zeros(len(images))), training_config=config)
    trainer.prepare_training()
    return lambda: trainer.train_step(epoch=1)


# ------------------------------------------------------------ measuring


def contestants(name: str, turn: int) -> dict[str, tuple[Step, int]]:
    """Each with the number of steps that one call makes."""
    make, batch = ROWS[name]
    torch.manual_seed(0)
    x = torch.rand(batch, PIXELS).round()
    found: dict[str, tuple[Step, int]] = {
        "CompiledSVI": (stock(make(), x, validate=False, svi_class=CompiledSVI), 1),
        "stock SVI": (stock(make(), x), 1),
        "stock SVI, no validation": (stock(make(), x, validate=False), 1),
        "PyTorch by hand": (by_hand(make(), x, compile=False), 1),
        "PyTorch by hand, compiled": (by_hand(make(), x, compile=True), 1),
    }
    if name.startswith("vae"):
        found["floor"] = (matrix_products(x), 1)
        found["data"] = (next_batch(batch), 1)
        if importlib.util.find_spec("numpyro"):
            found["NumPyro, jitted update"] = (numpyro_steps(x, 0), 1)
            found["NumPyro, scanned epoch"] = (numpyro_steps(x, turn), turn)
        if importlib.util.find_spec("pythae"):
            found["Pythae's trainer"] = (pythae_steps(x, turn), turn)
    return found


def peak_memory(step: Step) -> int:
    """Bytes of tensors at the highest, over those at the start."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def measure(name: str, turns: int, turn: int) -> dict[str, dict[str, float]]:
    steps = contestants(name, turn)
    times: dict[str, list[float]] = {key: [] for key in steps}
    first = {}
    for key, (step, count) in steps.items():  # compile, and warm up
        begin = time.perf_counter()
        step()
        first[key] = time.perf_counter() - begin
        for _ in range(max(3, 2 * turn // count)):
            step()
    for _ in range(turns):
        for key, (step, count) in steps.items():
            begin = time.perf_counter()
            for _ in range(turn // count):
                step()
            times[key].append((time.perf_counter() - begin) / turn)
    result = {}
    for key, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        result[key] = {"milliseconds": round(1e3 * median, 4), "quartiles": [round(1e3 * low, 4), round(1e3 * high, 4)]}
        result[key]["first_step_seconds"] = round(first[key], 1)
        if key in ("CompiledSVI", "stock SVI", "PyTorch by hand", "PyTorch by hand, compiled"):
            result[key]["peak_megabytes"] = round(peak_memory(steps[key][0]) / 1e6, 3)
    ours = result["CompiledSVI"]["milliseconds"]
    for row in result.values():
        row["relative"] = round(row["milliseconds"] / ours, 3)
    return result


Train = Callable[[Tensor], None]  # on batches (100, 100, 784)
Bound = Callable[[Tensor], float]  # nats per image


def torch_racer(program: Program, make_step: Callable[[Program], Callable[..., object]]) -> tuple[Train, Bound]:
    step: list[Callable[..., object]] = []

    def train(batches: Tensor) -> None:
        if not step:
            step.append(make_step(program))
        for x in batches:
            step[0](x)

    def bound(x: Tensor) -> float:
        with torch.no_grad():
            return -float(program.by_hand(x)) / len(x)

    return train, bound


def numpyro_racer(initial: nn.Module, learning_rate: float) -> tuple[Train, Bound]:
    import jax
    import jax.numpy as jnp

    svi = numpyro_svi(initial, learning_rate)
    scan = jax.jit(lambda state, batches: jax.lax.scan(svi.update, state, batches), donate_argnums=0)
    state: list[Any] = []

    def train(batches: Tensor) -> None:
        data = jnp.asarray(batches.numpy())
        if not state:
            state.append(svi.init(jax.random.key(0), data[0]))
        state[0], losses = scan(state[0], data)
        jax.block_until_ready(losses)

    return train, lambda x: -float(svi.evaluate(state[0], jnp.asarray(x.numpy()))) / len(x)


def race(seed: int, target: float = -100.0, learning_rate: float = 1e-3) -> dict[str, dict[str, float]]:
    """All from the same weights on the same batches, in turns of 100 steps; scored, untimed, after each."""
    digits = load_dataset("mnist", binarize="static")
    train, test = digits.train.x.flatten(1), digits.test.x.flatten(1)
    x = train[:100]
    makers: dict[str, Callable[[Program], Callable[..., object]]] = {
        "CompiledSVI": lambda program: stock(program, x, False, CompiledSVI, learning_rate),
        "stock SVI": lambda program: stock(program, x, learning_rate=learning_rate),
        "PyTorch by hand, compiled": lambda program: by_hand(program, x, True, learning_rate),
    }
    torch.manual_seed(seed)
    initial = Program()
    racing = {key: torch_racer(copy.deepcopy(initial), maker) for key, maker in makers.items()}
    if importlib.util.find_spec("numpyro"):
        racing["NumPyro, scanned"] = numpyro_racer(initial.networks, learning_rate)
    seconds, result = dict.fromkeys(racing, 0.0), {}
    steps = 0
    while racing:
        for batches in train[torch.randperm(len(train))].unflatten(0, (-1, 100, 100)):
            steps += 100
            for key, (advance, bound) in list(racing.items()):
                begin = time.perf_counter()
                advance(batches)
                seconds[key] += time.perf_counter() - begin
                if (now := bound(test)) > target:
                    result[key] = {"seconds": round(seconds[key], 1), "steps": steps, "bound": round(now, 2)}
                    print(f"  {key:28} {result[key]}", flush=True)
                    del racing[key]
    return result


def quality(seeds: int) -> Iterator[dict[str, dict[str, Any]]]:
    """The results so far, after each seed."""
    runs: list[dict[str, dict[str, float]]] = []
    for seed in range(seeds):
        pyro.clear_param_store()
        torch.compiler.reset()
        runs.append(race(seed))
        yield {
            key: {"seconds": statistics.median(run[key]["seconds"] for run in runs), "each": [run[key] for run in runs]}
            for key in runs[0]
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*ROWS, "quality"]
    parser.add_argument("--rows", nargs="+", default=every, choices=every)
    parser.add_argument("--turns", type=int, default=24)
    parser.add_argument("--steps", type=int, default=25, help="per turn")
    parser.add_argument("--seeds", type=int, default=3, help="of the row quality")
    parser.add_argument("--results", type=Path, default=HERE / "step_time.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    before = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    results = {"rows": before.get("rows", {}), "quality": before.get("quality", {})}
    for name in arguments.rows:
        pyro.clear_param_store()
        torch.compiler.reset()
        print(name, flush=True)
        if name == "quality":
            for results[name] in quality(arguments.seeds):
                record(arguments.results, {"what": WHAT, **results})
            continue
        results["rows"][name] = measure(name, arguments.turns, arguments.steps)
        record(arguments.results, {"what": WHAT, **results})
        for key, row in results["rows"][name].items():
            rest = f"{row['first_step_seconds']:6.1f} s  {row.get('peak_megabytes', '')}"
            print(f"  {key:28} {row['milliseconds']:9.3f} ms {row['relative']:7.2f} x  {rest}", flush=True)


if __name__ == "__main__":
    main()
