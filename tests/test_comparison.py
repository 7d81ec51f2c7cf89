"""`compare_estimators` against closed forms: gaps, bias, signal-to-noise ratios and slopes; and what it leaves."""

import contextlib
import json
import math
import os
import random
import re
from pathlib import Path

import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from PIL import Image
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_vae import compare_estimators, load_run
from pyro_vae.cli import main
from pyro_vae.comparison import Comparison
from pyro_vae.estimators import CIWAE, ELBO, IWAE, STL, VIMCO, Coefficients, DReG, Renyi, ReweightedWakeSleep
from pyro_vae.guides import AmortizedGuide
from pyro_vae.models import VAE, LinearVAE, priors
from pyro_vae.nn import MLP

P = 20  # data of the toy, each with parameters of its own
FEW = {"num_gradients": 12, "num_references": 0, "num_samples": 20, "progress": False}


class Toy(nn.Module):
    """z ~ N(mu_i, 1), x | z ~ N(z, 1): at mu = 0 and x = 1 the posterior is N(1/2, 1/2) (arXiv 1802.04537)."""

    def __init__(self):
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(P, dtype=torch.float64))

    def forward(self, x, i):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mu[i], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def log_evidence(self, x, i):
        return dist.Normal(self.mu[i], math.sqrt(2)).log_prob(x)


class ToyGuide(nn.Module):
    """q = N(1, 2/3): off by d = 1/2."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.ones(P, dtype=torch.float64))

    def forward(self, x, i):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.mean[i], math.sqrt(2 / 3)))


class NotDoubly(IWAE):
    """A gradient that looks like DReG's and is not one: weights where their squares belong."""

    def coefficients(self, log_weight):
        v = log_weight.softmax(0)
        return Coefficients(model=v, path=v, guide=None)


def toy(estimators, **options):
    data = torch.ones(P, dtype=torch.float64), torch.arange(P)
    return compare_estimators(Toy(), ToyGuide(), data, estimators, **{"progress": False, **options})


def row(comparison, estimator, K):
    table = comparison.table
    return table[(table["estimator"] == estimator) & (table["K"] == K)].iloc[0]


@pytest.fixture(scope="module", autouse=True)
def few_rounds():
    """Of timed steps: the times themselves are not tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_vae.comparison.steps.ROUNDS", 2)
        yield


@pytest.fixture(scope="module")
def at_once():
    """Few draws in a guide's bound."""
    estimators = {"IWAE": IWAE, "DReG": DReG, "STL": STL, "biased": NotDoubly}
    return toy(estimators, num_particles=(1, 8), num_gradients=1500, num_references=1500)


@pytest.fixture(scope="module")
def asymptotic():
    return toy([IWAE, DReG], num_particles=(8, 64), num_gradients=4000, num_references=0)


def linear_pair():
    model = LinearVAE((5,), 2).double()
    return model, AmortizedGuide(model, encoder=nn.Flatten()).double(), torch.randn(60, 5, dtype=torch.float64)


# ------------------------------------------------------------ bounds


def test_gaps_are_the_closed_forms(at_once, asymptotic):
    """KL(q || p(z|x)) for K = 1, and of IWAE (E[w^2] / p(x)^2 - 1) / 2K for many draws."""
    a, b, d = 1 / 2, 2 / 3, 1 / 2
    divergence = 0.5 * (math.log(a / b) + b / a + d * d / a - 1)
    for name in ("IWAE", "DReG", "STL", "biased"):
        found = row(at_once, name, 1)
        assert found["gap"] == pytest.approx(divergence, abs=4 * found["gap_standard_error_draws"])
    many = toy([IWAE, ELBO], num_particles=(64,), num_samples=6400, num_gradients=4, num_references=0)
    found = row(many, "IWAE", 64)
    second_moment = b / math.sqrt(a * (2 * b - a)) * math.exp(d * d / (2 * b - a))
    assert found["gap_standard_error_draws"] < 0.003
    assert found["gap"] == pytest.approx((second_moment - 1) / 128, abs=4 * found["gap_standard_error_draws"])
    assert row(many, "ELBO", 64)["gap"] == pytest.approx(divergence, abs=0.02)
    assert at_once.source == "exact"
    assert float(at_once.log_evidence) == pytest.approx(-0.5 * math.log(4 * math.pi) - 0.25, abs=1e-12)


def test_the_gap_of_a_linear_vae_is_its_divergence():
    model, guide, x = linear_pair()
    estimators = {"ELBO": ELBO, "Pyro's": lambda K: TraceMeanField_ELBO(num_particles=K)}
    comparison = compare_estimators(
        model,
        guide,
        x,
        estimators,
        num_particles=(4,),
        num_samples=400,
        num_gradients=4,
        num_references=0,
        progress=False,
    )
    q = dist.MultivariateNormal(guide.heads["z"](x).mean, torch.diag_embed(guide.heads["z"](x).variance))
    divergence = torch.distributions.kl_divergence(q, model.posterior(x)).mean().item()
    for name in estimators:
        found = row(comparison, name, 4)
        assert found["gap"] == pytest.approx(divergence, abs=4 * found["gap_standard_error_draws"])
        assert found["bound"] + found["gap"] == pytest.approx(model.log_evidence(x).mean().item(), abs=1e-9)
        assert found["bound_standard_error"] > found["gap_standard_error"] > found["gap_standard_error_draws"] > 0


def test_estimators_of_pyro_have_the_bounds_of_ours():
    model, guide, x = linear_pair()
    ours = {"ELBO": STL, "Renyi": lambda K: Renyi(0.5, K)}
    stock = {
        "stock ELBO": lambda K: Trace_ELBO(num_particles=K),
        "stock Renyi": lambda K: RenyiELBO(alpha=0.5, num_particles=K),
        "stock wake-sleep": lambda K: pyro.infer.ReweightedWakeSleep(num_particles=K),
    }
    options = FEW | {"num_particles": (2,), "num_gradients": 40, "num_references": 40}
    table = compare_estimators(model, guide, x, ours | stock, **options).table.set_index("estimator")
    for name in ours:
        a, b = table.loc[name], table.loc[f"stock {name}"]
        error = math.hypot(a["bound_standard_error_draws"], b["bound_standard_error_draws"])
        assert a["bound"] == pytest.approx(b["bound"], abs=4 * error)
        assert b["bound_standard_error"] == pytest.approx(a["bound_standard_error"], rel=0.7)
        for part in ("model", "guide"):
            assert b[f"{part}_bias_z"] < 4
            assert a[f"{part}_norm"] == pytest.approx(b[f"{part}_norm"], rel=0.4)
    assert math.isnan(table.loc["stock wake-sleep", "guide_bias"])
    assert table.loc["stock wake-sleep", "guide_snr"] > 0


def test_log_evidence_exact_given_or_bounded():
    model, guide, x = linear_pair()
    exact = model.log_evidence(x).detach()
    assert compare_estimators(model, guide, x, [ELBO], num_particles=(1,), **FEW).source == "exact"

    def same(*args, **kwargs):
        return model(*args, **kwargs)

    options = FEW | {"num_particles": (1,), "num_samples": 300}
    bounded = compare_estimators(same, guide, x, [ELBO], **options)
    assert bounded.source == "bound of 300 draws"
    assert float(bounded.log_evidence) == pytest.approx(exact.mean().item(), abs=0.2)
    for given in (exact, exact.mean().item()):
        comparison = compare_estimators(same, guide, x, [ELBO], log_evidence=given, **options)
        assert comparison.source == "given"
        assert float(comparison.log_evidence) == pytest.approx(exact.mean().item())
        found = row(comparison, "ELBO", 1)
        assert found["gap"] == pytest.approx(exact.mean().item() - found["bound"])
    few = compare_estimators(same, guide, x, [ELBO], log_evidence=exact, num_data=7, **options)
    assert few.settings["num_data"] == 7
    assert float(few.log_evidence) == pytest.approx(exact[_rows(60, 7)].mean().item())


def _rows(N, count):
    return torch.randperm(N, generator=torch.Generator().manual_seed(0))[:count]


# ------------------------------------------------------------ gradients


def test_signal_to_noise_of_the_closed_form(at_once, asymptotic):
    """For one draw exactly, for many their limits; DReG's ratio over IWAE's for the guide."""
    for name, ratio in (("IWAE", 0.612372), ("DReG", math.sqrt(6)), ("STL", math.sqrt(6))):
        found = row(at_once, name, 1)
        assert found["guide_snr_standard_error"] < 0.02 * ratio
        assert found["guide_snr"] == pytest.approx(ratio, abs=4 * found["guide_snr_standard_error"])
        assert found["guide_norm"] == pytest.approx(math.sqrt(P), rel=0.03)  # each mean is -1
        assert found["guide_snr_whole"] == pytest.approx(ratio, rel=0.05)  # all parameters have the same
    limits = {"IWAE": 0.50603 / 8, "DReG": 1.29002 * 8}
    for name, ratio in limits.items():
        found = row(asymptotic, name, 64)
        assert found["guide_snr"] == pytest.approx(ratio, abs=4 * found["guide_snr_standard_error"] + 0.02 * ratio)
    assert row(asymptotic, "DReG", 64)["guide_norm"] == pytest.approx(0.83648 / 64 * math.sqrt(P), rel=0.15)


def test_slopes_of_the_signal_to_noise_ratio(at_once, asymptotic):
    slopes = asymptotic.slopes.set_index(["estimator", "part"])
    expected = {("IWAE", "model"): 0.5, ("IWAE", "guide"): -0.5, ("DReG", "model"): 0.5, ("DReG", "guide"): 0.5}
    for which, slope in expected.items():
        found = slopes.loc[which]
        assert found["slope"] == pytest.approx(slope, abs=0.06)
        assert found["whole_slope"] == pytest.approx(slope, abs=0.06)
        assert 0 < found["standard_error"] < 0.03
    for _, found in at_once.slopes[at_once.slopes["estimator"] == "STL"].iterrows():  # from K = 1 on
        assert found["slope"] == pytest.approx(0.5, abs=4 * found["standard_error"])
        assert found["standard_error"] < 0.01


def test_only_the_biased_show_bias(at_once):
    table = at_once.table
    for part in ("model", "guide"):
        excess = table[f"{part}_bias_z"]
        wrong = (table["estimator"] == "biased") & (table["K"] == 8) & (part == "guide")
        assert (excess[~wrong] < 4).all()
        assert (excess[wrong] > 20).all()
    assert "biased: the guide's gradient is biased at K = 8" in at_once.verdict
    bias = row(at_once, "biased", 8)["guide_bias"]
    assert bias == pytest.approx(math.sqrt(P) * (0.775 - 0.11), abs=0.1)


def test_half_a_gradient_is_told():
    """At the defaults, of a small network; the right one is not."""

    class Half(IWAE):
        def signal(self, weights):
            return 0.5 * super().signal(weights)

        def objective(self, weights):
            log_weight = weights.log_weight
            return self.bound(0.5 * log_weight + 0.5 * log_weight.detach())

    torch.manual_seed(0)
    model = VAE((20,), latent_dim=3, decoder=MLP((30,))).double()
    guide, x = AmortizedGuide(model, encoder=MLP((30,))).double(), torch.rand(100, 20, dtype=torch.float64).round()
    own = lambda loss: IWAE(loss.num_particles)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_vae.comparison.gradients._plain", own)
        comparison = compare_estimators(
            model, guide, x, {"IWAE": IWAE, "half": Half}, num_particles=(4,), num_samples=10, progress=False
        )
    table = comparison.table.set_index("estimator")
    for part in ("model", "guide"):
        assert table.loc["half", f"{part}_bias_z"] > 4
        assert table.loc["half", f"{part}_bias"] == pytest.approx(0.5 * table.loc["IWAE", f"{part}_norm"], rel=0.3)
        assert abs(table.loc["IWAE", f"{part}_bias_z"]) < 4


def test_discrete_latents_have_the_score_of_their_draws():
    model = VAE((6,), prior=priors.Categorical(2, codes=3), decoder=MLP((4,)))
    guide, x = AmortizedGuide(model, encoder=MLP((4,))), torch.rand(10, 6).round()
    estimators = {"VIMCO": VIMCO, "IWAE": IWAE, "wake-sleep": ReweightedWakeSleep}
    options = FEW | {"num_particles": (4,), "num_gradients": 500, "num_references": 1500}
    table = compare_estimators(model, guide, x, estimators, **options).table.set_index("estimator")
    for name in ("VIMCO", "IWAE"):
        assert table.loc[name, "guide_bias_z"] < 4
        assert table.loc[name, "model_bias_z"] < 4
    assert table.loc["wake-sleep", "model_bias_z"] < 4
    assert table.loc["VIMCO", "guide_snr"] > 2 * table.loc["IWAE", "guide_snr"]
    with pytest.raises(ValueError, match=r"DReG, K = 4: expected latent sites that can be reparameterised for DReG"):
        compare_estimators(model, guide, x, [DReG], **options)


def test_draws_at_once_are_like_draws_one_by_one(monkeypatch):
    """Recorded and vectorised over draws, a gradient has the moments that it has in a loop; shared parameters too."""
    network = MLP((4,), activation="tanh")
    model = VAE((6,), latent_dim=2, decoder=network).double()
    guide = AmortizedGuide(model, encoder=network).double()
    x = torch.rand(10, 6, dtype=torch.float64).round()
    options = FEW | {"num_particles": (4,), "num_gradients": 250}
    together = compare_estimators(model, guide, x, [DReG], **options).table
    monkeypatch.setattr("pyro_vae.comparison.gradients.WORTH_RECORDING", math.inf)
    alone = compare_estimators(model, guide, x, [DReG], **options).table
    for part in ("model", "guide"):
        for name, tolerance in (("norm", 0.08), ("mean_norm", 0.06), ("variance", 0.3), ("snr", 0.2)):
            np.testing.assert_allclose(together[f"{part}_{name}"], alone[f"{part}_{name}"], rtol=tolerance)
    assert not np.allclose(together["guide_variance"], alone["guide_variance"], rtol=1e-6)


def test_programs_with_randomness_of_their_own_are_drawn_one_by_one():
    """A number that Python draws would be one constant of a recorded gradient."""

    class Jittered(ToyGuide):
        def forward(self, x, i):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.mean[i] * random.choice((0.5, 1.5)), 1e-3))

    data = torch.ones(P, dtype=torch.float64), torch.arange(P)
    random.seed(0)
    comparison = compare_estimators(
        Toy(), Jittered(), data, [ELBO], num_particles=(1,), num_gradients=120, num_references=0, progress=False
    )
    assert row(comparison, "ELBO", 1)["guide_snr_whole"] < 10
    assert random.random() == random.Random(0).random()


def test_an_exact_guide_has_no_noise_under_sticking_the_landing():
    data = torch.ones(P, dtype=torch.float64), torch.arange(P)

    class Exact(ToyGuide):
        def forward(self, x, i):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.mean[i] / 2, math.sqrt(1 / 2)))

    comparison = compare_estimators(Toy(), Exact(), data, [STL, IWAE], num_particles=(1,), **FEW)
    stl, iwae = row(comparison, "STL", 1), row(comparison, "IWAE", 1)
    assert stl["guide_standard_deviation"] < 1e-12 < 1e-2 < iwae["guide_standard_deviation"]
    assert stl["gap"] == pytest.approx(0.0, abs=1e-12)
    assert "nan" not in str(comparison)


# ------------------------------------------------------------ steps and training


def test_time_and_memory_of_a_step():
    model, guide, x = linear_pair()
    table = compare_estimators(
        model, guide, x.repeat(20, 1), [IWAE], num_particles=(1, 64), batch_size=1000, **FEW
    ).table.set_index("K")
    assert (table["seconds"] > 0).all() and (table["seconds"] < 10).all()
    one_tensor = 64 * 1000 * 5 * 8 / 1e6  # of decoded data
    assert one_tensor < table.loc[64, "megabytes"] < 40 * one_tensor
    assert table.loc[64, "megabytes"] > 10 * table.loc[1, "megabytes"]
    assert not table["compiled"].any()


def test_more_steps_reach_higher():
    model, guide, x = linear_pair()
    x = x @ torch.randn(5, 5, dtype=torch.float64)
    options = FEW | {
        "num_particles": (2,),
        "num_references": 0,
        "learning_rate": 0.05,
        "seeds": (0, 1),
        "valid": x[:20],
    }
    short, long = (row(compare_estimators(model, guide, x, [DReG], steps=n, **options), "DReG", 2) for n in (5, 80))
    before = model.log_evidence(x[:20]).mean().item()
    assert before < short["trained_low"] < short["trained"] < short["trained_high"] < long["trained"]
    assert (short["trained_steps"], long["trained_steps"]) == (5, 80)
    assert short["trained_seconds"] < long["trained_seconds"]
    half = short["trained_high"] - short["trained"]
    assert half == pytest.approx(12.7062 * short["trained_standard_error"], rel=1e-4)  # Student's t, one degree
    options["seeds"] = (1,)
    timed = row(compare_estimators(model, guide, x, [DReG], seconds=0.3, **options), "DReG", 2)
    assert math.isnan(timed["trained_low"])
    assert 0.3 <= timed["trained_seconds"] < 5
    assert timed["trained_steps"] >= 1


def test_a_trained_estimator_does_not_depend_on_the_others():
    model, guide, x = linear_pair()
    options = FEW | {"num_particles": (2,), "steps": 5, "seeds": (3,)}
    alone = compare_estimators(model, guide, x, [DReG], **options)
    beside = compare_estimators(model, guide, x, [IWAE, STL, DReG], **options)
    for name in ("trained", "bound", "guide_snr", "model_norm"):
        assert row(alone, "DReG", 2)[name] == row(beside, "DReG", 2)[name]


def test_compiled_steps_train_as_eager_ones_do(recorded):
    model, guide, x = linear_pair()
    options = FEW | {"num_particles": (2,), "steps": 12, "seeds": (0, 1), "batch_size": 20}
    eager, compiled = (compare_estimators(model, guide, x, [DReG], compile=c, **options) for c in (False, True))
    assert compiled.table["compiled"].all()
    np.testing.assert_allclose(eager.table["trained"], compiled.table["trained"], rtol=1e-9)


def test_a_divergence_is_counted_and_left_out(monkeypatch):
    from pyro_vae.svi import SVI, NonFiniteLossError

    step = SVI.step_async

    def diverging(self, *args, **kwargs):
        if self.steps == 3 and torch.initial_seed() == 1:
            raise NonFiniteLossError("step 4: the loss is nan")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SVI, "step_async", diverging)
    model, guide, x = linear_pair()
    options = FEW | {"num_particles": (1,), "steps": 5}
    found = row(compare_estimators(model, guide, x, [IWAE], seeds=(0, 1, 2), **options), "IWAE", 1)
    assert found["failed"] == 1 and found["trained_steps"] == 5 and math.isfinite(found["trained_low"])


# ------------------------------------------------------------ what is the user's


def test_modules_store_and_random_state_stay_as_they_were():
    model, guide, x = linear_pair()
    optimizer = pyro.optim.Adam({"lr": 0.05})
    svi = pyro.infer.SVI(model, guide, optimizer, Trace_ELBO())
    svi.step(x)
    model.train()
    guide.eval()
    for parameter in (*model.parameters(), *guide.parameters()):
        parameter.grad = torch.ones_like(parameter)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)

    def state():
        store = pyro.get_param_store()
        tensors = [*model.state_dict().items(), *guide.state_dict().items(), *store.named_parameters()]
        return {
            "tensors": [(name, tensor.tolist()) for name, tensor in tensors],
            "objects": [id(tensor) for _, tensor in store.named_parameters()],
            "gradients": [p.grad.tolist() for p in (*model.parameters(), *guide.parameters())],
            "modes": [module.training for each in (model, guide) for module in each.modules()],
            "random": (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()),
            "validation": (pyro.settings.get(), torch.distributions.Distribution._validate_args),
            "optimizer": (len(optimizer.optim_objs), [str(o.state_dict()) for o in optimizer.optim_objs.values()]),
        }

    before = state()
    options = FEW | {"num_particles": (1, 2), "steps": 3, "seeds": (0, 1), "optimizer": optimizer}
    compare_estimators(model, guide, x, [IWAE, DReG], **options)
    assert state() == before
    with pytest.raises(ValueError, match="K = 1: expected"):
        compare_estimators(model, guide, x, {"MIWAE": lambda K: Refusing(K)}, **options)
    assert state() == before


class Refusing(IWAE):
    def differentiable_loss(self, model, guide, *args, **kwargs):
        raise ValueError("expected another pair")


def test_functions_keep_their_parameters():
    """Plain functions with pyro.param, and a module that one closes over."""
    decoder = nn.Linear(2, 4)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        weight = pyro.param("weight", torch.zeros(4, 2))
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ weight, scale).to_event(1))

    x = torch.randn(30, 4)
    pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)
    store = pyro.get_param_store()
    decoder.weight.grad = torch.full_like(decoder.weight, 7.0)

    def state():
        return {name: (id(p), p.tolist()) for name, p in store.named_parameters()}, decoder.weight.tolist()

    before = state()
    options = FEW | {"num_particles": (2,), "steps": 10, "seeds": (0, 1), "learning_rate": 0.1}
    found = row(compare_estimators(model, guide, x, [DReG], **options), "DReG", 2)
    assert state() == before
    assert (decoder.weight.grad == 7.0).all()
    assert found["trained"] > float(found["bound"] + found["gap"])
    assert min(found["model_snr"], found["guide_snr"], found["trained_standard_error"]) > 0


def test_pairs_that_the_user_has_trained_with_pyro():
    """A guide that keeps traces of its model, and bound methods of one module."""
    inner = LinearVAE((4,), 2)
    x = torch.randn(20, 4)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder, self.encoder = nn.Linear(2, 4), nn.Linear(4, 2)

        def model(self, x):
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

        def guide(self, x):
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))

    def prior_only(x):
        with pyro.plate("data", 20):
            z = pyro.sample("z", dist.Normal(inner.mean[:1].sum(), 1.0))
            pyro.sample("x", dist.Normal(z[..., None] * inner.mean, 1.0).to_event(1), obs=x)

    whole, auto = Whole(), AutoNormal(prior_only)
    options = FEW | {"num_particles": (2,), "steps": 2, "seeds": (0,), "batch_size": 20, "learning_rate": 0.01}
    for model, guide, rest in (
        (whole.model, whole.guide, {}),
        (prior_only, auto, {"log_evidence": 0.0, "steps": None}),
    ):
        pyro.clear_param_store()
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        svi.step(x)
        before = {name: p.tolist() for name, p in pyro.get_param_store().named_parameters()}
        found = compare_estimators(model, guide, x, [IWAE], **options | rest).table.iloc[0]
        assert {name: p.tolist() for name, p in pyro.get_param_store().named_parameters()} == before
        assert found["guide_variance"] > 0
    assert found["model_variance"] != found["guide_variance"]


# ------------------------------------------------------------ what comes of it


def test_an_estimator_may_refuse_some_numbers_of_draws():
    comparison = toy([VIMCO, IWAE], num_particles=(1, 2), num_gradients=4, num_references=0)
    assert [*comparison.table[["estimator", "K"]].itertuples(index=False, name=None)] == [
        ("VIMCO", 2),
        ("IWAE", 1),
        ("IWAE", 2),
    ]
    assert [*comparison.skipped] == ["VIMCO, K = 1"]
    assert "left out: VIMCO, K = 1: expected num_particles >= 2" in str(comparison)
    with pytest.raises(ValueError, match="expected num_particles >= 2"):
        toy([VIMCO], num_particles=(1,))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model, guide, x = linear_pair()
    estimators = {"IWAE": IWAE, "DReG of a very long name, alpha = 0.5": lambda K: DReG(K, 0.5), "_VIMCO $K$": VIMCO}
    return compare_estimators(
        model, guide, x, estimators, **FEW | {"num_particles": (1, 4), "steps": 3, "seeds": (0, 1)}
    )


def test_text_fits_a_page(trained, at_once):
    for comparison in (trained, at_once):
        lines = str(comparison).splitlines()
        assert max(map(len, lines)) <= 100
        header = next(i for i, line in enumerate(lines) if line.startswith("estimator"))
        body = lines[header : header + 1 + len(comparison.table)]
        assert {len(line) for line in body} == {len(body[0])}
        assert all(line.split()[-1] != "" for line in body)
    assert "trains best" in str(trained)
    assert "DReG of a" in str(trained) and "IWAE " in str(trained)


def test_tables_survive_their_files(trained, tmp_path):
    trained.to_csv(tmp_path / "comparison.csv")
    trained.to_json(tmp_path / "comparison.json")
    pandas.testing.assert_frame_equal(pandas.read_csv(tmp_path / "comparison.csv"), trained.table)
    again = Comparison.from_json(tmp_path / "comparison.json")
    pandas.testing.assert_frame_equal(again.table, trained.table)
    pandas.testing.assert_frame_equal(again.slopes, trained.slopes)
    assert (again.log_evidence, again.source, again.skipped) == (
        trained.log_evidence,
        trained.source,
        trained.skipped,
    )
    assert again.settings == trained.settings and str(again) == str(trained)
    assert "NaN" not in (tmp_path / "comparison.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.csv", "comparison.json"]


def test_figures(trained, at_once, tmp_path):
    untrained = Comparison(**vars(at_once) | {"table": at_once.table.head(4)})
    for comparison in (trained, untrained):
        paths = comparison.figures(tmp_path)
        assert [path.name for path in paths] == ["signal_to_noise.png", "bounds.png", "quality_against_time.png"]
        for path in paths:
            image = np.asarray(Image.open(path).convert("L"))
            assert image.shape[1] > 1000 and 0.005 < (image < 200).mean() < 0.3
    with pytest.raises(FileNotFoundError, match="expected a directory for figures"):
        trained.figures(tmp_path / "nowhere")


class Global(nn.Module):
    def __init__(self, observed):
        super().__init__()
        self.observed = observed

    def forward(self, x):
        w = pyro.sample("w", dist.Normal(0, 1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0, 1))
            if self.observed:
                pyro.sample("x", dist.Normal(w + z, 1), obs=x[:, 0])


BAD = {
    "no estimators": ({"estimators": []}, r"expected estimators, got none: .*\[IWAE, DReG\]"),
    "text": ({"estimators": "IWAE"}, r"expected a mapping or a list of estimators, got 'IWAE'"),
    "an object": ({"estimators": {"IWAE": IWAE(2)}}, r'expected a class or .* as "IWAE", got IWAE: lambda K'),
    "a class that needs more": ({"estimators": [CIWAE]}, r"got CIWAE, which needs beta: give it as .*lambda K: CIWAE"),
    "no estimator": ({"estimators": {"mine": lambda K: K}}, r'expected "mine" to give a pyro.infer.ELBO, got int'),
    "K": ({"num_particles": (0, 1)}, r"expected whole numbers >= 1 as num_particles, got \(0, 1\)"),
    "one K": ({"num_particles": True}, r"expected whole numbers >= 1 as num_particles, got True"),
    "num_data": ({"num_data": 1}, r"expected num_data >= 2, got 1"),
    "gradients": ({"num_gradients": 1}, r"expected num_gradients >= 4, got 1"),
    "references": ({"num_references": 3}, r"expected num_references >= 4, got 3"),
    "batch_size": ({"batch_size": 61}, r"expected a batch_size from 1 to 60, the number of data, got 61"),
    "both budgets": ({"steps": 1, "seconds": 1.0}, r"expected steps or seconds, got 1 steps and 1.0 seconds"),
    "steps": ({"steps": 0}, r"expected steps >= 1, got 0"),
    "seconds": ({"seconds": -1.0}, r"expected seconds > 0, got -1.0"),
    "seeds": ({"steps": 1, "seeds": (1, 1)}, r"expected different whole numbers >= 0 as seeds, got \(1, 1\)"),
    "no seeds": ({"steps": 1, "seeds": ()}, r"expected different whole numbers >= 0 as seeds, got \(\)"),
    "learning rate": ({"learning_rate": 0.0}, r"expected learning_rate > 0 or else an optimizer, got 0.0"),
    "two": ({"learning_rate": 0.1, "optimizer": torch.optim.Adam}, r"or else an optimizer, got 0.1 and an optimiser"),
    "log p(x)": ({"log_evidence": torch.ones(59)}, r"or of shape \(60,\), got shape \(59,\): one value per datum"),
    "data": ({"data": [1.0]}, r"expected a tensor, a tuple of tensors"),
    "global site": (
        {"model": Global(True), "guide": Global(False)},
        r'expected every site inside the plate of data, got "w"',
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    model, guide, x = linear_pair()
    given, message = BAD[name]
    arguments = {"model": model, "guide": guide, "data": x, "estimators": [IWAE], "num_particles": (1,), **FEW, **given}
    with pytest.raises(ValueError, match=message) as error:
        compare_estimators(**arguments)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------ the command


TINY = "--epochs 1 --evaluate.num_samples 5 --model.latent_dim 2 --model.decoder.hidden [8] --guide.encoder.hidden [8]"
QUICK = "--num_particles 2 --num_gradients 4 --num_data 20 --num_samples 5 --batch_size 10"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A working directory with a run that was trained with an estimator of this library."""
    folder = tmp_path_factory.mktemp("work")
    with contextlib.chdir(folder):
        assert main(["fit", "--loss", "IWAE", "--loss.num_particles", "2", *TINY.split()]) == 0
        Path("mine.py").write_text(
            "from pyro_vae.estimators import CIWAE\n\n\nclass Own(CIWAE):\n"
            "    def __init__(self, beta: float, num_particles: int = 1):\n"
            "        super().__init__(beta, num_particles)\n"
        )
    return folder


@pytest.fixture
def here(work, monkeypatch):
    monkeypatch.chdir(work)
    return work


def test_fit_takes_estimators_by_short_name(here, capsys):
    assert load_run("runs/0001").config["loss"] == {
        "class_path": "pyro_vae.estimators.bounds.IWAE",
        "init_args": {"num_particles": 2},
    }
    assert main(["fit", "--loss", "ReweightedWakeSleep", "--loss.insomnia", "0.5", "--print_config"]) == 0
    assert "pyro_vae.estimators.wake_sleep.ReweightedWakeSleep" in capsys.readouterr().out
    assert main(["fit", "--loss", "Trace_ELBO", "--print_config"]) == 0
    assert "pyro.infer.trace_elbo.Trace_ELBO" in capsys.readouterr().out
    assert main(["fit", "--loss", "Estimator", "--print_config"]) == 2


def test_compare(here, capfd):
    estimators = "--estimators Trace_ELBO,mine.Own --estimators.Own.beta 0.5"
    assert main(f"compare runs/latest {estimators} {QUICK} --steps 2 --seeds 0,1 --out result".split()) == 0
    out, error = capfd.readouterr()
    assert "Own" in out and "trains best" in out and "wrote    result/comparison.csv" in out
    assert "USDT" not in error and "ERROR" not in error  # of the profiler's library
    assert sorted(path.name for path in Path("result").iterdir()) == [
        *("bounds.png", "comparison.csv", "comparison.json", "quality_against_time.png", "signal_to_noise.png"),
    ]
    table = pandas.read_csv("result/comparison.csv")
    assert table[["estimator", "K"]].values.tolist() == [
        *(["Trace_ELBO", 2], ["Own", 2]),
    ]
    assert table["trained"].notna().all()
    assert json.loads(Path("result/comparison.json").read_text())["settings"]["seeds"] == [0, 1]
    assert main(f"compare runs/latest {QUICK} --out result".split()) == 2
    assert main(f"compare runs/latest --estimators STL {QUICK} --out result --overwrite --num_particles 3".split()) == 0
    assert pandas.read_csv("result/comparison.csv")["estimator"].tolist() == ["STL"]


WRONG = {
    "unknown": ("--estimators IWEA", r"expected a class for --estimators, one of .*got 'IWEA': did you mean IWAE\?"),
    "no estimator": ("--estimators torch.nn.MSELoss", r"expected subclasses of pyro.infer.ELBO for --estimators"),
    "needs more": ("--estimators CIWAE", r"expected --estimators.CIWAE.beta for CIWAE, got none: add --estimators.CIW"),
    "takes no K": ("--estimators WakeSleep", r"that take num_particles, got WakeSleep, which does not"),
    "twice": ("--estimators STL,STL", r"expected different classes for --estimators, got 'STL,STL'"),
    "setting": ("--estimators DReG --estimators.DReG.alfa 1", r"did you mean --estimators.DReG.alpha\?"),
    "setting of another": ("--estimators DReG --estimators.STL.x 1", r"settings of one of DReG, got --estimators.STL"),
    "half a setting": ("--estimators.DReG 1", r"expected --estimators.CLASS.NAME VALUE, got --estimators.DReG 1"),
    "K there": ("--estimators.DReG.num_particles 1", r"expected --num_particles for all estimators"),
    "K": ("--num_particles 1,x", r"expected whole numbers >= 1 for --num_particles, got '1,x'"),
    "seeds": ("--seeds -1", r"expected whole numbers >= 0 for --seeds, got '-1'"),
    "budgets": ("--steps 1 --seconds 1", r"expected steps or seconds, got 1 steps and 1.0 seconds"),
    "steps": ("--steps many", r"expected a whole number or null for --steps, got 'many'"),
    "option": ("--estimator STL", r"got --estimator: did you mean --estimators\?"),
    "split": ("--split half", r"expected one of train, valid, test, all for --split"),
    "out": ("--out mine.py", r"expected a new or empty folder, got 'mine.py'"),
    "out in nothing": ("--out no/where", r"expected a folder at 'no', got none: make it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_of_the_command(name, here, capsys):
    before = sorted(os.listdir())
    options, message = WRONG[name]
    assert main(["compare", "runs/0001", *options.split()]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("pyro-vae: error: expected ") and error.count("\n") == 1
    assert re.search(message, error)
    assert not out and sorted(os.listdir()) == before


def test_nothing_half_written(here, monkeypatch, capsys):
    def full(self, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Comparison, "figures", full)
    before = sorted(os.listdir())
    assert main(f"compare runs/latest --estimators STL {QUICK} --out other".split()) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(os.listdir()) == before


def test_help_of_the_command(capsys):
    assert main(["compare", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: pyro-vae compare RUN") and "--estimators" in out and "--seconds" in out
    assert main(["compare", "--estimators.help"]) == 0
    out = capsys.readouterr().out
    assert "\nWakeSleep  " not in out and "\nConstrainedELBO  " not in out  # which K alone does not make
    assert "\nDReG  " in out and "--estimators.CLASS.NAME VALUE" in out and "\nEstimator  " not in out
