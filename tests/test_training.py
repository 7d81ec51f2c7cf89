"""fit: the same steps as Pyro's own SVI, nothing lost, nothing left changed."""

import functools
import json
import math
import os
import signal
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.nn import PyroModule
from torch.distributions import constraints

from pyro_vae import evaluate, fit, load_run
from pyro_vae.estimators import DReG, WakeSleep
from pyro_vae.estimators import ReweightedWakeSleep as OwnWakeSleep
from pyro_vae.guides import AmortizedGuide
from pyro_vae.schedules import Cosine, Exponential, TenfoldDecay, Warmup
from pyro_vae.svi import SVI, NonFiniteLossError, latent_scale

BERNOULLI = CASES[0]


def weights(*modules):
    return [p.detach().clone() for module in modules for p in module.parameters()]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def train(pair=None, data=None, **arguments):
    model, guide = pair or BERNOULLI.pair()
    data = BERNOULLI.data(20) if data is None else data
    return fit(model, guide, data, **{"epochs": 3, "batch_size": 8, "progress": False, **arguments})


OPTIMIZERS = {
    "adam": lambda: pyro.optim.Adam({"lr": 0.01}),
    "clipped_adam": lambda: pyro.optim.ClippedAdam({"lr": 0.01, "clip_norm": 0.5, "lrd": 0.99}),
    "adagrad_rmsprop": lambda: pyro.optim.AdagradRMSProp({"eta": 0.1}),
    "sgd_clipped": lambda: pyro.optim.SGD({"lr": 0.01, "momentum": 0.9}, {"clip_norm": 1.0}),
    "per_parameter": lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if "heads" in name else 0.01}),
    "scheduler": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.5}
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_pyros_own_svi(name, tmp_path):
    """The same data order and seed through `pyro.infer.SVI`: the same losses and weights."""
    x = BERNOULLI.data(20)
    model, guide = BERNOULLI.pair()
    optimizer = OPTIMIZERS[name]()
    run = train((model, guide), x, optimizer=optimizer, out=tmp_path / "run", seed=3)

    stock_model, stock_guide = BERNOULLI.pair()
    optimizer = OPTIMIZERS[name]()
    svi = pyro.infer.SVI(stock_model, stock_guide, optimizer, Trace_ELBO())
    torch.manual_seed(3)
    bounds = []
    for epoch in range(3):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(3 * 1_000_003 + epoch))
        bounds.append(-sum(svi.step(x[index]) for index in order.split(8)) / 20)
        if name == "scheduler":
            optimizer.step()
    assert [record["bound"] for record in run.history] == pytest.approx(bounds, rel=1e-6)
    for a, b in zip(weights(model, guide), weights(stock_model, stock_guide), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
        TraceMeanField_ELBO(),
        TraceGraph_ELBO(),
        RenyiELBO(alpha=0.5, num_particles=2),
        ReweightedWakeSleep(num_particles=2, max_plate_nesting=1),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_any_stock_loss_trains(loss, tmp_path):
    before = weights(*(pair := BERNOULLI.pair()))
    run = train(pair, loss=loss, out=tmp_path / "run", valid=BERNOULLI.data(20))
    assert not equal(before, weights(*pair))
    assert all(math.isfinite(record["bound"]) and math.isfinite(record["valid"]) for record in run.history)


def test_a_torch_optimiser_is_stepped_once_for_all_parameters(tmp_path):
    made = []

    def optimizer(parameters):
        made.append(torch.optim.Adam(parameters, lr=0.01))
        return made[-1]

    pair = BERNOULLI.pair()
    train(pair, optimizer=optimizer, out=tmp_path / "run")
    assert len(made) == 1
    count = sum(len(group["params"]) for group in made[0].param_groups)
    assert count == len(weights(*pair))


def test_nothing_of_the_process_is_changed(tmp_path):
    pyro.param("mine", torch.tensor(3.0))
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    handler = signal.getsignal(signal.SIGINT)
    train(out=tmp_path / "run", valid=BERNOULLI.data(20))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads and signal.getsignal(signal.SIGINT) is handler
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert pyro.settings.get("validate_infer") and torch.distributions.Distribution._validate_args


def test_plain_functions_with_params_train_and_load(tmp_path):
    """x ~ N(z, 1), z ~ N(0, 1): the best Normal guide on x = 1 is N(1/2, 1/2), and it comes back from the file."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        location = pyro.param("location", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(location, scale))

    x = torch.ones(200)
    run = fit(
        model,
        guide,
        x,
        optimizer=pyro.optim.Adam({"lr": 0.02}),
        learning_rate=lambda epoch: max(0.02, 1 - epoch / 200),
        loss=TraceMeanField_ELBO(),
        epochs=200,
        batch_size=200,
        out=tmp_path / "run",
        progress=False,
    )
    assert list(pyro.get_param_store().keys()) == []
    for guide_of_run in (run.guide, load_run(tmp_path / "run", model=model, guide=guide).guide):
        site = pyro.poutine.trace(guide_of_run).get_trace(x).nodes["z"]
        assert site["fn"].mean[0].item() == pytest.approx(0.5, abs=0.02)
        assert site["fn"].variance[0].item() == pytest.approx(0.5, abs=0.03)
    exact = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0)).item()
    assert float(evaluate(run.model, run.guide, x, num_samples=50).log_evidence) == pytest.approx(exact, abs=0.005)


def test_a_parameter_that_appears_later_joins_the_optimiser():
    calls = []

    def model(x):
        pyro.sample("x", dist.Normal(pyro.param("early", torch.tensor(0.0)), 1.0), obs=x)
        calls.append(1)
        if len(calls) > 3:
            pyro.sample("y", dist.Normal(pyro.param("late", torch.tensor(0.0)), 1.0), obs=x)

    svi = SVI(model, lambda x: None, functools.partial(torch.optim.SGD, lr=0.1), Trace_ELBO())
    for _ in range(8):
        svi.step(torch.tensor(1.0))
    assert pyro.param("late").item() > 0.2


def test_kl_warmup_scales_latent_sites_only():
    model, guide = BERNOULLI.pair()
    x = BERNOULLI.data()
    plain, half = [], []
    for weight, losses in ((1.0, plain), (0.5, half), (1e-9, none := [])):
        torch.manual_seed(0)
        with latent_scale(weight):
            losses.append(TraceMeanField_ELBO().loss(model, guide, x))
    kl = plain[0] - none[0]
    assert kl > 0.01
    assert half[0] == pytest.approx(none[0] + 0.5 * kl, rel=1e-5)
    with pytest.raises(ValueError, match="KL weight > 0, got 0"):
        latent_scale(0.0)


def test_schedules_act_at_their_epochs(tmp_path):
    run = train(
        epochs=5,
        kl_weight=Warmup(4, start=0.2),
        learning_rate=Exponential(0.5),
        optimizer=functools.partial(torch.optim.SGD, lr=0.01),
        out=tmp_path / "run",
    )
    last = [(3 * epoch - 1) / 3 for epoch in range(1, 6)]
    assert [r["kl_weight"] for r in run.history] == pytest.approx([min(1, 0.2 + 0.8 * e / 4) for e in last])
    assert [r["learning_rate"] for r in run.history] == pytest.approx([0.01 * 0.5**e for e in last])
    assert Cosine(10)(10) == 0.0 and TenfoldDecay(1, 3)(3) == pytest.approx(0.1)


def test_early_stopping_returns_the_best_weights(tmp_path):
    """On few data a large network overfits: fit stops, and the weights are those of the best validation bound."""
    torch.manual_seed(0)
    x = torch.rand(60, 1, 4, 4).round()
    seen = {}
    model, guide = BERNOULLI.pair()

    def keep(run):
        seen[run.history[-1]["epoch"]] = weights(model, guide)

    run = train(
        (model, guide),
        x[:20],
        valid=x[20:],
        epochs=400,
        patience=5,
        optimizer=functools.partial(torch.optim.Adam, lr=0.05),
        callbacks=[keep],
        out=tmp_path / "run",
    )
    bounds = [record["valid"] for record in run.history]
    best = max(range(len(bounds)), key=bounds.__getitem__) + 1
    assert len(bounds) == best + 5 < 400
    assert equal(weights(run.model, run.guide), seen[best])
    assert not equal(seen[best], seen[best + 5])


def test_a_callback_can_end_the_training(tmp_path):
    run = train(epochs=50, callbacks=[lambda run: len(run.history) == 2], out=tmp_path / "run")
    assert len(run.history) == 2


def test_runs_number_themselves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [train(epochs=1).path.as_posix() for _ in range(2)] == ["runs/0001", "runs/0002"]
    assert Path("runs/latest").resolve().name == "0002"
    with pytest.raises(FileExistsError, match="expected a new or empty directory"):
        train(out="runs/0001")
    train(out="runs/0001", overwrite=True)


def test_a_nan_stops_before_the_weights_take_it(tmp_path):
    """The message names step, site and parameter; weights and checkpoint are those of the step before."""
    model, guide = BERNOULLI.pair()
    before = []

    def poison(run):
        before[:] = weights(model, guide)
        with torch.no_grad():
            guide.heads["z"].heads.linear.bias.mul_(float("inf")).nan_to_num_(0.0, 1e30, -1e30)

    with pytest.raises(NonFiniteLossError, match=r'step 4: the loss is .*site "z".*parameter') as error:
        train((model, guide), callbacks=[poison], out=tmp_path / "run")
    assert "smaller learning rate" in str(error.value)
    after = weights(model, guide)
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(changed) == 1
    resumed = fit(
        *BERNOULLI.pair(), BERNOULLI.data(20), epochs=1, batch_size=8, resume=tmp_path / "run", progress=False
    )
    assert all(bool(torch.isfinite(w).all()) for w in weights(resumed.model, resumed.guide))


def test_resumed_runs_end_in_the_same_bits(tmp_path):
    """Stopped after one epoch, or by Ctrl-C in the middle of an epoch, and resumed."""
    x = BERNOULLI.data(20)
    arguments = {"valid": x[:5], "kl_weight": Warmup(4), "optimizer": pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.9})}
    whole = train(BERNOULLI.pair(), x, epochs=6, out=tmp_path / "whole", **arguments)

    first = train(BERNOULLI.pair(), x, epochs=2, out=tmp_path / "parts", **arguments)
    resumed = train(BERNOULLI.pair(), x, epochs=6, resume=first.path, **arguments)
    assert equal(weights(whole.model, whole.guide), weights(resumed.model, resumed.guide))

    def interrupt(step=[0]):  # noqa: B006  counts over calls
        step[0] += 1
        if step[0] == 8:
            os.kill(os.getpid(), signal.SIGINT)

    model, guide = BERNOULLI.pair()
    model.likelihood.register_forward_hook(lambda *_: interrupt())
    with pytest.raises(KeyboardInterrupt, match="saved at step .*: go on with resume="):
        train((model, guide), x, epochs=6, out=tmp_path / "cut", **arguments)
    resumed = train(BERNOULLI.pair(), x, epochs=6, resume=tmp_path / "cut", **arguments)
    assert equal(weights(whole.model, whole.guide), weights(resumed.model, resumed.guide))
    for other in ("parts", "cut"):
        assert metrics(tmp_path / other) == metrics(tmp_path / "whole")


def metrics(path):
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_a_run_cut_at_any_position_resumes_to_the_same_bits(tmp_path):
    """Three batches an epoch; cut after each step of two epochs, the last of an epoch among them."""
    x = BERNOULLI.data(20)
    whole = train(BERNOULLI.pair(), x, epochs=3, out=tmp_path / "whole", kl_weight=Warmup(4))
    for step in range(1, 7):
        count = [0]

        def interrupt(encoder, *_, count=count, step=step):
            count[0] += encoder.training
            if encoder.training and count[0] == step + 1:  # initialize calls the encoder before
                os.kill(os.getpid(), signal.SIGINT)

        model, guide = BERNOULLI.pair()
        guide.encoder.register_forward_hook(interrupt)
        path = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt, match=f"saved at step {step}:"):
            train((model, guide), x, epochs=3, out=path, kl_weight=Warmup(4))
        guide.encoder._forward_hooks.clear()
        resumed = train((model.eval(), guide.eval()), x, epochs=3, resume=path, kl_weight=Warmup(4))
        assert equal(weights(whole.model, whole.guide), weights(resumed.model, resumed.guide)), step
        assert metrics(path) == metrics(tmp_path / "whole")


def test_a_second_fit_trains_with_dropout_again(tmp_path):
    """fit leaves the pair in eval mode, and takes it up in training mode."""
    seen = []

    class Noisy(torch.nn.Dropout):
        def forward(self, x):
            seen.append(self.training)
            return super().forward(x)

    model, guide = BERNOULLI.pair()
    guide.encoder = torch.nn.Sequential(guide.encoder, Noisy(0.5))
    for name in ("first", "second"):
        seen.clear()
        train((model, guide), epochs=1, out=tmp_path / name)
        assert sum(seen) >= 3 and not model.training


def test_a_guide_made_at_its_first_call_trains_under_stock_svi_and_fit(tmp_path):
    """A model without num_data: the guide finds its sites inside the first step, and they do not leak into it."""

    class Plain(PyroModule):
        def __init__(self):
            super().__init__()
            self.location = torch.nn.Parameter(torch.zeros(4))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z + self.location, 1.0).to_event(1), obs=x)

    x = torch.randn(20, 4) + 3
    model = Plain()
    guide = AmortizedGuide(model)
    assert not list(guide.parameters())
    losses = [pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)]
    assert math.isfinite(losses[0]) and list(guide.parameters())
    model = Plain()
    run = fit(model, AmortizedGuide(model), x, epochs=2, batch_size=10, out=tmp_path / "run", progress=False)
    again = Plain()
    guide = AmortizedGuide(again)
    guide(x)
    assert equal(weights(load_run(run.path, model=again, guide=guide).guide), weights(run.guide))


def test_an_autoguide_with_local_latents_trains_and_is_scored(tmp_path):
    """x ~ N(z, 1), z ~ N(0, 1), full batch: AutoNormal comes to the exact evidence."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.linspace(-1, 1, 10)
    guide = pyro.infer.autoguide.AutoNormal(model)
    optimizer = functools.partial(torch.optim.Adam, lr=0.05)
    arguments = {"epochs": 300, "batch_size": 10, "out": tmp_path / "run", "learning_rate": Cosine(300, 0.01)}
    run = fit(model, guide, x, loss=TraceMeanField_ELBO(), optimizer=optimizer, progress=False, **arguments)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).mean().item()
    assert float(evaluate(run.model, run.guide, x, num_samples=200).log_evidence) == pytest.approx(exact, abs=0.01)


def test_a_resumed_run_can_outlast_its_early_stop(tmp_path):
    arguments = {"valid": BERNOULLI.data(20), "optimizer": functools.partial(torch.optim.SGD, lr=1e-12)}
    run = train(epochs=30, patience=1, out=tmp_path / "run", **arguments)
    stopped = len(run.history)
    assert stopped < 30
    resumed = train(epochs=stopped + 2, patience=50, resume=tmp_path / "run", **arguments)
    assert len(resumed.history) == stopped + 2


def test_what_does_not_go_together_is_refused(tmp_path):
    out = tmp_path / "run"
    for loss in (RenyiELBO(num_particles=2), DReG(2), WakeSleep(), OwnWakeSleep(2, insomnia=0.5)):
        with pytest.raises(ValueError, match=f"linear in the KL term beside kl_weight, got {type(loss).__name__}"):
            train(loss=loss, kl_weight=Warmup(2), out=out)
    with pytest.raises(ValueError, match="one rule for the learning rate"):
        train(optimizer=pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.9}), learning_rate=Exponential(0.9), out=out)
    with pytest.raises(ValueError, match="support of its Bernoulli likelihood"):
        train(valid=torch.rand(5, 1, 4, 4), out=out)
    assert not out.exists()


def test_resume_refuses_other_data_and_other_architectures(tmp_path):
    train(out=tmp_path / "run", epochs=1)
    for data in (BERNOULLI.data(19), 1 - BERNOULLI.data(20)):
        with pytest.raises(ValueError, match="expected the data that the run was trained on"):
            train(data=data, resume=tmp_path / "run")
    other = CASES[1]
    with pytest.raises(ValueError, match="belongs to another architecture|expected the data"):
        train(other.pair(), other.data(20), resume=tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="expected a checkpoint at"):
        train(resume=tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
