"""What state-space models are used for: predictions, windows, feedback, presets; exact answers."""

import dataclasses
import tempfile
from functools import partial
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from gaussian import Driven, Half, Linear, given, krishnan, linear_data, walk
from grid import Grid
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vae import evaluate, fit, load_dataset
from pyro_vae.data import Data, Dataset, Split
from pyro_vae.estimators import ELBO, PredictionPenalty, ReweightedWakeSleep, WakeSleep
from pyro_vae.guides import AmortizedGuide, StateSpaceGuide
from pyro_vae.log_weights import log_weights
from pyro_vae.models import VAE, DeepMarkovModel, StateSpaceModel, likelihoods, state_space
from pyro_vae.models.transitions import Emission, GatedTransition, Initial, LinearTransition, NormalTransition
from pyro_vae.prediction import decode, sample, to_arviz
from pyro_vae.report.sequences import Sequences
from pyro_vae.schedules import Cosine
from pyro_vae.sequences import Carried, latent_rmse, steps_of, windows

pytestmark = pytest.mark.usefixtures("float64")
Z, D, C, T, B = 2, 3, 2, 5, 4


def batch():
    torch.manual_seed(1)
    return torch.randn(B, T, D), torch.randn(B, T, C)


def autoregressive(num_inputs=0, scale=0.3):
    torch.manual_seed(0)
    width = D + num_inputs
    emission = Emission(Z, D, likelihoods.Normal(minimum_scale=scale / 2, initial_scale=scale), num_inputs=width)
    parts = Initial(Z, width, scale), LinearTransition(Z, width, scale), emission
    with torch.no_grad():
        parts[1].mean.function.weight.normal_().mul_(0.4)
    return StateSpaceModel(*parts, num_inputs, feedback=D)


def previous(x):
    return torch.cat([torch.zeros_like(x[..., :1, :]), x[..., :-1, :]], -2)


@pytest.mark.parametrize("num_inputs", [0, C])
def test_what_was_seen_acts_on_the_next_step(num_inputs):
    """ln p(x, z) is the sum of the parts' own log-densities at (x_{t-1}, u_t)."""
    model = autoregressive(num_inputs)
    x, u = batch()
    args = (x, u) if num_inputs else (x,)
    z, v = torch.randn(B, T, Z), torch.cat([previous(x), u], -1)[..., : D + num_inputs]
    expected = model.initial(v[:, 0]).log_prob(z[:, 0]).sum()
    for t in range(T):
        expected = expected + model.emission(z[:, t], v[:, t]).log_prob(x[:, t]).sum()
        if t:
            expected = expected + model.transition(z[:, t - 1], v[:, t]).log_prob(z[:, t]).sum()
    found = poutine.trace(poutine.condition(model, {"z": z})).get_trace(*args).log_prob_sum()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_inputs", [0, C])
@pytest.mark.parametrize("num_particles", [None, 3])
def test_draws_feed_back(num_inputs, num_particles):
    """Almost without noise each step is the mean that the steps before it tell."""
    model = autoregressive(num_inputs, scale=1e-7)
    u = batch()[1] if num_inputs else None
    given = {"u": u} if num_inputs else {"num_data": B, "num_steps": T}
    with torch.no_grad(), pyro.plate("particles", num_particles or 1, dim=-2):
        trace = poutine.trace(model).get_trace(**given)
    assert not any(trace.nodes[name]["is_observed"] for name in "zx")
    z, x = (trace.nodes[name]["value"] for name in "zx")
    assert x.shape == (num_particles or 1, B, T, D)
    v = previous(x) if u is None else torch.cat([previous(x), u.expand(*x.shape[:-1], -1)], -1)
    with torch.no_grad():
        torch.testing.assert_close(x, model.emission(z, v).mean, atol=1e-5, rtol=0)
        after = model.transition(z[..., :-1, :], v[..., 1:, :]).mean
        latent = model.transition(z[..., :-1, :], torch.zeros_like(v[..., 1:, :])).mean
    torch.testing.assert_close(z[..., 1:, :], after, atol=1e-5, rtol=0)
    assert float(x[..., 1:, :].abs().max()) > 0.01
    assert float((z[..., 1:, :] - latent).abs().max()) > 0.01  # it is the feedback that they follow
    with pytest.raises(ValueError, match="as it acts on z"):
        poutine.condition(model, {"z": z[0]})(**given)


def test_a_forecast_feeds_back():
    model = autoregressive(scale=1e-7)
    x = batch()[0]
    z = torch.randn(B, T, Z)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(z).to_event(2))

    drawn = model.forecast(guide, x, num_steps=2, num_samples=2)
    state, latest = z[:, -1], x[:, -1]
    with torch.no_grad():
        for t in range(2):
            state = model.transition(state, latest).mean
            latest = model.emission(state, latest).mean
            torch.testing.assert_close(drawn[:, :, t], latest.expand(2, -1, -1), atol=1e-5, rtol=0)
    assert model.filter(x, num_particles=7).z.shape == (7, B, T, Z)
    assert bool(torch.isfinite(model.impute(guide_of(model), x, mask=torch.rand(B, T) < 0.5, num_samples=2)).all())


def guide_of(model, inference="ST-LR", **options):
    return StateSpaceGuide(model, inference, hidden=4, **options)


def kalman(exact, x, t):
    """Mean and variance of x_t given the steps before it."""
    before, now = slice(0, t), exact.of_x
    gain = now.covariance_matrix[t, before] @ torch.linalg.inv(now.covariance_matrix[before, before])
    mean = now.mean[t] + (x[:, before, 0] - now.mean[before]) @ gain
    return mean, now.covariance_matrix[t, t] - gain @ now.covariance_matrix[before, t]


@pytest.mark.parametrize("causal", [False, True])
def test_a_prediction_of_one_step_is_kalmans(causal):
    """With the exact p(z | x): that of all steps before t, or filtered at once."""
    model, _ = walk(6)
    x = walk(6)[1].of_x.sample([3]).unflatten(1, (6, 1))

    def guide(x, lengths=None):
        n = x.shape[1]
        marginals = []
        for t in range(n) if causal else [n - 1]:
            mean, covariance = walk(t + 1)[1].smoothed(x[:, : t + 1])
            marginals.append((mean[:, t, 0], covariance[t, t].sqrt().expand(len(x))))
        mean, scale = (torch.stack(each, -1)[..., None].expand(-1, n, 1) for each in zip(*marginals, strict=True))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, scale).to_event(2))

    guide.causal = causal
    torch.manual_seed(2)
    drawn = model.predict_one_step(guide, x, num_samples=40_000)
    for t in range(6):
        mean, variance = kalman(walk(6)[1], x, t)
        assert bool(((drawn[:, :, t, 0].mean(0) - mean).abs() < 5 * (variance / 40_000).sqrt()).all())
        torch.testing.assert_close(drawn[:, :, t, 0].var(0), variance.expand(3), rtol=0.05, atol=0)


def with_gaps():
    """x, u, which x are observed, and lengths: gaps at both ends and within, and ends in between."""
    torch.manual_seed(4)
    mask = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    x = torch.randn(4, 5, 1).where(mask[..., None], torch.nan)
    return x, torch.randn(4, 5, 1), mask, torch.tensor([5, 3, 2, 4])


@pytest.mark.parametrize("with_lengths", [False, True])
@torch.no_grad()
def test_the_filter_with_inputs_gaps_and_feedback_is_exact(with_lengths):
    """What it says of z and of the next x, and the evidence; without lengths the chain goes on over a last gap."""
    driven = Driven()
    x, u, mask, lengths = with_gaps()
    lengths = lengths if with_lengths else None
    torch.manual_seed(0)
    found = driven.model.filter(x, u, mask=mask, lengths=lengths, num_particles=100_000)
    for i, n in enumerate([5] * 4 if lengths is None else lengths.tolist()):
        seen = mask[i, :n]
        joint = driven.joint(u[i, :n, 0], seen)
        evidence = 0.0
        for t in range(n):
            known = seen.clone()
            known[t:] = False
            at = n + known.nonzero()[:, 0]
            mean, covariance = given(*joint, at, x[i, :n, 0][known])
            assert float(found.predicted[i, t, 0]) == pytest.approx(float(mean[n + t]), abs=0.02)
            if seen[t]:
                p = dist.Normal(mean[n + t], covariance[n + t, n + t].sqrt())
                evidence = evidence + p.log_prob(x[i, t, 0])
                mean, _ = given(*joint, torch.cat([at, torch.tensor([n + t])]), x[i, : t + 1, 0][seen[: t + 1]])
            assert float(found.mean[i, t, 0]) == pytest.approx(float(mean[t]), abs=0.02)
        assert float(found.log_evidence[i]) == pytest.approx(float(evidence), abs=0.02)


@torch.no_grad()
def test_queries_read_the_inputs_and_the_values_of_their_own_step():
    """Of a model almost without noise, z being known: one-step predictions, forecasts, imputations, in closed form."""
    driven, path = Driven(scale=1e-7), torch.randn(4, 5)
    model = driven.model
    (x, u, mask, lengths), future = with_gaps(), torch.randn(4, 2, 1)
    lengths = lengths.clamp(min=2)

    def guide(x, u, **kwargs):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(path[:, : x.shape[1], None]).to_event(2))

    seen = torch.where(mask, x[..., 0], 0.0)
    ahead = model.predict_one_step(guide, x, u, mask=mask, lengths=lengths, num_samples=1)[0, ..., 0]
    filled = model.impute(guide, x, u, mask=mask, lengths=lengths, num_samples=1)[0, ..., 0]
    later = model.forecast(guide, x, u, future, mask=mask, lengths=lengths, num_samples=1)[0, ..., 0]
    trailing = model.forecast(guide, x, u, future, mask=mask, num_samples=1)[0, ..., 0]
    for i, n in enumerate(lengths.tolist()):
        for t in range(1, n):
            z = driven.next_state(path[i, t - 1], seen[i, t - 1], u[i, t, 0])
            assert float(ahead[i, t]) == pytest.approx(float(driven.emitted(z, seen[i, t - 1], u[i, t, 0])), abs=1e-5)
            own = x[i, t, 0] if mask[i, t] else driven.emitted(path[i, t], seen[i, t - 1], u[i, t, 0])
            assert float(filled[i, t]) == pytest.approx(float(own), abs=1e-5)
        for drawn, end in ((later, n), (trailing, 5)):
            z, before = path[i, end - 1], seen[i, end - 1]
            for t in range(2):
                z = driven.next_state(z, before, future[i, t, 0])
                before = driven.emitted(z, before, future[i, t, 0])
                assert float(drawn[i, t]) == pytest.approx(float(before), abs=1e-5)


def test_a_gap_at_the_end_is_no_end():
    """A guide is told so by every query."""
    model, told = autoregressive(C), []

    def guide(x, u, lengths=None, mask=None):
        told.append(lengths.tolist())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), x.shape[1], Z), 1.0).to_event(2))

    (x, u), mask = batch(), torch.arange(T) < torch.tensor([[3]] * B)
    guide.causal = True
    model.smooth(guide, x, u, mask=mask)
    model.predict_one_step(guide, x, u, mask=mask)
    model.impute(guide, x, u, mask=mask)
    model.forecast(guide, x, u, torch.zeros(B, 1, C), mask=mask)
    assert len(told) >= 4 and all(lengths == [T] * B for lengths in told)
    with pytest.raises(ValueError, match="expected lengths from 0 to 5, got"):
        model.smooth(guide, x, u, lengths=torch.tensor([5, 6, 1, 1]))


def test_a_guide_that_counts_what_is_not_there_is_refused():
    """It would pay for z after a sequence's end, and the bound be none; masked, or where all is there, it is taken."""
    model, lengths = DeepMarkovModel((D,), 2, 5, (4,), likelihood=likelihoods.Normal()), torch.tensor([5, 2, 3, 5])
    x = batch()[0]

    def guide(x, lengths=None, masked=False):
        q = dist.Normal(torch.zeros(len(x), x.shape[1], 2), 0.5)
        q = q.mask(steps_of(x, lengths).there[..., None]) if masked else q
        with pyro.plate("data", len(x)):
            pyro.sample("z", q.to_event(2))

    for bound in (
        lambda guide, **kwargs: ELBO().loss(model, guide, x, **kwargs),
        lambda guide, **kwargs: model.log_evidence(x, guide=guide, **kwargs),
        lambda guide, **kwargs: evaluate(model, guide, (x, kwargs), num_samples=5, progress=False),
    ):
        with pytest.raises(ValueError, match='expected latent site "z" masked in model and guide alike'):
            bound(guide, lengths=lengths)
        bound(partial(guide, masked=True), lengths=lengths)
        bound(guide)
    with pytest.raises(ValueError, match="in the guide alone: give the model's MarkovChain that mask"):
        ELBO().loss(lambda x, **kwargs: model(x), guide_of(model), x, lengths=lengths)
    with pytest.raises(ValueError, match='expected latent site "z" without a mask'):
        AmortizedGuide(model)(x, lengths=lengths)
    with pytest.raises(ValueError, match="use pyro_vae.evaluate, which counts all sites"):
        model.log_evidence(x, guide=pyro.infer.autoguide.AutoNormal(model))


@pytest.mark.parametrize("inference", ["ST-L", "ST-LR"])
def test_predictions_do_not_see_ahead(inference):
    model = DeepMarkovModel((D,), 2, 5, (4,), likelihood=likelihoods.Normal(), num_inputs=C, autoregressive=True)
    guide, (x, u), lengths = guide_of(model, inference), batch(), torch.tensor([5, 2, 3, 1])
    drawn = []
    for changed in (x, x + (torch.arange(T) >= 3)[:, None]):
        torch.manual_seed(0)
        drawn.append(model.predict_one_step(guide, changed, u, num_samples=2, lengths=lengths))
    assert drawn[0].shape == (2, B, T, D) and bool((drawn[0] == drawn[1])[:, :, :4].all())
    assert not bool((drawn[0] == drawn[1])[:, 0, 4].any())


class _Flat(dist.TorchDistribution):
    """N(mean (B, T, Z), covariance (T Z, T Z))."""

    arg_constraints = {}

    def __init__(self, mean, covariance, expanded=None):
        self.joint = dist.MultivariateNormal(mean.flatten(1), (covariance + covariance.mT) / 2)
        self.mean_, self.covariance = mean, covariance
        super().__init__(expanded or mean.shape[:1], mean.shape[1:], validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return _Flat(self.mean_, self.covariance, torch.Size(batch_shape))

    def sample(self, sample_shape=()):
        shape = torch.Size(sample_shape) + self.batch_shape
        return self.joint.expand(shape).sample().unflatten(-1, self.event_shape)

    def log_prob(self, value):
        return self.joint.log_prob(value.flatten(-2))


def test_the_evidence_by_a_guide_is_exact_where_the_guide_is(monkeypatch):
    model, exact = walk(6)
    x = exact.of_x.sample([3]).unflatten(1, (6, 1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", _Flat(*exact.smoothed(x)))

    found = model.log_evidence(x, guide=guide, num_samples=7)
    torch.testing.assert_close(found, exact.log_evidence(x), rtol=0, atol=1e-8)
    with monkeypatch.context() as patched:  # two draws at a time, and one sequence
        patched.setattr(state_space, "MAX_ELEMENTS", 2 * 18)
        torch.testing.assert_close(model.log_evidence(x, guide=guide, num_samples=7), found, rtol=0, atol=1e-8)
        each = model.log_evidence(x, lengths=torch.tensor([6, 2, 6]), num_samples=20_000)
    shorter = walk(2)[1].log_evidence(x[1:2, :2])
    torch.testing.assert_close(each[[0, 2]], found[[0, 2]], rtol=0, atol=0.05)
    torch.testing.assert_close(each[1:2], shorter, rtol=0, atol=0.05)
    torch.manual_seed(0)
    approximate = guide_of(model)
    bounds = model.log_evidence(x.repeat(200, 1, 1), guide=approximate, num_samples=500).exp().view(200, 3)
    error = bounds.std(0) / 200**0.5
    assert bool(((bounds.mean(0) - exact.log_evidence(x).exp()).abs() < 4 * error).all())
    by_particles = model.log_evidence(x, num_samples=20_000)
    torch.testing.assert_close(by_particles, exact.log_evidence(x), rtol=0, atol=0.05)


@pytest.mark.parametrize("inference", ["MF-L", "ST-L"])
@pytest.mark.parametrize(("cell", "ragged"), [("gru", True), ("lstm", True), ("gru", False)])
def test_windows_with_what_is_carried_are_the_whole(inference, cell, ragged):
    """By a filter: densities of model and guide, of z that is the same; gaps at a window's end, too."""
    model = autoregressive(C)
    guide = guide_of(model, inference, cell=cell)
    (x, u), lengths = batch(), torch.tensor([5, 2, 3, 5]) if ragged else None
    mask = torch.rand(B, T, D) < 0.7
    mask[:, 1] = ragged
    mask[torch.arange(B), -1 if lengths is None else lengths - 1] = True
    z = torch.randn(B, T, Z)

    def densities(*args, **kwargs):
        given = {"z": kwargs.pop("z")}
        return [poutine.trace(poutine.condition(f, given)).get_trace(*args, **kwargs).log_prob_sum() for f in pair]

    pair = model, guide
    whole = densities(x, u, lengths=lengths, mask=mask, z=z)
    parts, carried, begin = [], None, 0
    for args, kwargs in windows(2, x, u, lengths=lengths, mask=mask):
        part = z[:, begin : begin + 2]
        parts.append(densities(*args, **kwargs, carried=carried, z=part))
        carried = guide.after(*args, **kwargs, carried=carried)._replace(z=part[:, -1])
        begin += 2
    torch.testing.assert_close([sum(each) for each in zip(*parts, strict=True)], whole, rtol=1e-10, atol=0)


def test_a_forecast_begins_after_the_last_step_though_it_is_missing():
    """And the report's, of a sequence that a gap ends: x_t = t + 1 / 4 of z_t = z_{t-1} + 1."""

    class Exactly(nn.Module):
        def forward(self, z):
            return dist.Normal(z + 0.25, 1e-6).to_event(1)

    def guide(x, **kwargs):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(torch.arange(float(x.shape[1])).expand(len(x), -1)[..., None]).to_event(2))

    model = StateSpaceModel(Initial(1), NormalTransition(lambda z: z + 1, 1, 1e-6), Exactly())
    mask = torch.tensor([[True, True, False, False]])
    drawn = model.forecast(guide, torch.zeros(1, 4, 1), mask=mask, num_steps=2, num_samples=3)
    torch.testing.assert_close(drawn, torch.tensor([4.25, 5.25]).expand(3, 1, 2)[..., None], rtol=0, atol=1e-3)

    x = torch.arange(8.0).repeat(12, 1)[..., None] + 0.25
    mask = torch.ones(12, 8, dtype=torch.bool)
    mask[:, 4:6] = False
    split = Split((x,), {"lengths": torch.full((12,), 8), "mask": mask})
    run = SimpleNamespace(model=model, guide=guide)
    subject = SimpleNamespace(run=run, dataset=Dataset("x", split, split, split, x.shape[2:]), seed=0)
    assert "100% of the values" in Sequences(subject).forecasts().text


@pytest.mark.parametrize("estimator", [WakeSleep(), ReweightedWakeSleep(3, insomnia=0.5)])
def test_what_feeds_back_cannot_dream(estimator):
    model = autoregressive()
    with pytest.raises(ValueError, match="expected a model that can dream"):
        estimator.differentiable_loss(model, guide_of(model), batch()[0])


def test_what_is_ragged_cannot_dream():
    model = StateSpaceModel(Initial(Z), GatedTransition(Z), Emission(Z, D, likelihoods.Normal()))
    given = model, guide_of(model), batch()[0]
    assert WakeSleep().differentiable_loss(*given).isfinite()
    with pytest.raises(ValueError, match="for sequences with lengths or a mask, use another estimator"):
        WakeSleep().differentiable_loss(*given, lengths=torch.full((B,), T - 1))


@pytest.mark.parametrize("num_inputs", [0, C])
def test_sequences_for_arviz(num_inputs):
    model = autoregressive(num_inputs)
    x, u = batch()
    given = (x, u) if num_inputs else (x,)
    found = to_arviz(model, guide_of(model), (*given, {"lengths": torch.full((B,), T)}), num_samples=2)
    assert found["prior_predictive"]["x"].shape == found["posterior_predictive"]["x"].shape == (1, 2, B, T, D)
    z = torch.randn(B, T, Z)
    plain = StateSpaceModel(Initial(Z), GatedTransition(Z), Emission(Z, D, likelihoods.Normal()))
    torch.testing.assert_close(decode(plain, z, num_steps=T), plain.emission(z).mean)


def test_steps_in_windows_compile(recorded_once):
    from pyro_vae import CompiledSVI

    model = autoregressive()
    guide = guide_of(model)
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    carried = None
    for args, kwargs in windows(2, batch()[0].repeat(1, 2, 1)):
        assert svi.step(*args, **kwargs, carried=carried) > 0
        carried = guide.after(*args, **kwargs, carried=carried)
    assert svi.compiled, svi.fallback_reason


def test_a_sequence_without_observations():
    model = DeepMarkovModel((D,), 2, 5, (4,), likelihood=likelihoods.Normal())
    x, mask = batch()[0], torch.ones(B, T, dtype=torch.bool)
    mask[1] = False
    loss = Trace_ELBO().differentiable_loss(model, guide_of(model), x.where(mask[..., None], torch.nan), mask=mask)
    loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("entries", [False, True])
def test_what_is_not_observed_need_not_be_possible(entries):
    """-999 of a Bernoulli, in gaps, in a sequence and a column without observations, with Pyro's validation."""
    model, x = DeepMarkovModel((D,), 2, 5, (4,)), (batch()[0] > 0).double()
    guide, mask = guide_of(model), torch.rand(B, T, D) < 0.5
    mask[1], mask[:, 0], mask[2, :, 1] = False, False, False
    mask = mask if entries else mask[..., 0]
    found = []
    for value in (0.0, -999.0):
        torch.manual_seed(0)
        given = x.where(mask if entries else mask[..., None], torch.tensor(value))
        found.append(Trace_ELBO().loss(model, guide, given, mask=mask))
    assert found[0] == found[1]
    steps = steps_of(x.where(x > 2, torch.nan), mask=torch.zeros(B, T, dtype=torch.bool))
    assert bool((steps.x == 0).all())
    for args, kwargs in windows(3, given, lengths=torch.tensor([5, 2, 3, 5]), mask=mask):
        assert Trace_ELBO().loss(model, guide, *args, **kwargs) > 0


def tutorial_loop(model, guide, x):
    """Pyro's tutorial's model, a site for each step, from the same modules."""

    def per_step():
        z = model.initial.before.expand(len(x), -1)
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t}", model.transition(z))
                pyro.sample(f"x_{t}", model.emission(z), obs=x[:, t])

    def per_step_guide():
        h = torch.cat([guide.encoded(steps_of(x), None, direction) for direction in guide.cells], -1)
        z = guide.before.expand(len(x), -1)
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t}", guide.step(z, h[:, t]))

    return per_step, per_step_guide


def test_the_tutorials_model():
    torch.manual_seed(0)
    model = DeepMarkovModel((D,), 4, 6, (5,), start="transition")
    guide = guide_of(model, "ST-R", cell="rnn")
    x = (batch()[0] > 0).double()
    torch.manual_seed(3)
    expected = Trace_ELBO().loss(*tutorial_loop(model, guide, x))
    torch.manual_seed(3)
    assert Trace_ELBO().loss(model, guide, x) == pytest.approx(expected, rel=1e-10)
    assert sample(model, 2, num_steps=3).shape == (2, 3, D)


def test_the_papers_model():
    model = DeepMarkovModel((88,))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    gated = GatedTransition(100, 200)
    assert sum(p.numel() for p in gated.parameters()) == sum(n for name, n in sizes.items() if "transition" in name)
    first = model.initial()
    assert first.base_dist.loc.eq(0).all() and first.base_dist.scale.eq(1).all() and first.event_shape == (100,)
    with pytest.raises(ValueError, match="expected event_shape"):
        DeepMarkovModel((88, 1))
    with pytest.raises(ValueError, match="expected feedback to be 0 or 3"):
        StateSpaceModel(Initial(2, 1), LinearTransition(2, 1), Emission(2, 3, num_inputs=1), feedback=1)


def papers_linear():
    one = torch.eye(1)
    return Linear(25, one, torch.tensor([0.05]), 10 * one, 0.5 * one, torch.zeros(1), 20 * one, torch.zeros(1), one)


def mean_field_bound(exact, x):
    """The best bound of steps without z_{t-1}, nats per step: q has the diagonal of the posterior's precision."""
    covariance = exact.smoothed(x)[1]
    gap = 0.5 * (torch.linalg.inv(covariance).diagonal().log().sum() + covariance.logdet())
    return float(exact.log_evidence(x).mean() - gap) / exact.T


def test_the_exact_evidence_of_the_linear_model():
    """3.0741 nats per step on the validation split: the data, and the dense joint, are those of the paper."""
    exact, (train, valid) = papers_linear(), linear_data()
    assert float(exact.log_evidence(valid[0]).mean()) / 25 == pytest.approx(-3.0741, abs=5e-5)
    assert mean_field_bound(exact, train[0]) == pytest.approx(-3.2685, abs=5e-5)
    mean, _ = exact.smoothed(valid[0])
    assert latent_rmse(mean[None], valid[1]) == pytest.approx(3.687, abs=5e-4)


def ragged(lengths):
    torch.manual_seed(0)
    T = int(lengths.max())
    there = torch.arange(T) < lengths[:, None]
    x = (torch.rand(len(lengths), T, D) < 0.3).double() * there[..., None]
    return Data((x,), {"lengths": lengths, "mask": there})


def test_batches_are_of_like_lengths():
    """Every row once; few numbers of steps, all of them foretold; padding is cut, and nothing else."""
    lengths = torch.randint(1, 100, (200,), generator=torch.Generator().manual_seed(0))
    data = ragged(lengths)
    batches = data.batches(20, torch.Generator().manual_seed(1))
    assert torch.cat(batches).sort().values.tolist() == list(range(200))
    steps = []
    for rows in batches:
        (x,), kwargs = data.trimmed_batch(rows)
        steps.append(x.shape[1])
        assert bool((kwargs["lengths"] == lengths[rows]).all()) and kwargs["mask"].shape == x.shape[:2]
        assert float(x.sum()) == float(data.args[0][rows].sum()) and steps[-1] >= int(lengths[rows].max())
    assert len(set(steps)) <= 4 and sum(steps) < 0.7 * 10 * int(lengths.max())
    assert {data.trimmed_batch(rows)[0][0].shape for rows in data.typical_batches(20)} == {(20, T, D) for T in steps}
    for size, rest in ((30, 20), (150, 50)):
        shapes = {data.trimmed_batch(rows)[0][0].shape for rows in data.batches(size)}
        assert shapes <= {data.trimmed_batch(rows)[0][0].shape for rows in data.typical_batches(size)}
        assert any(shape[0] == rest for shape in shapes)
    again = data.batches(20, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    other = data.batches(20, torch.Generator().manual_seed(2))
    assert not all(torch.equal(a, b) for a, b in zip(batches, other, strict=True))
    plain = Data((torch.zeros(7, 3),))
    expected = torch.randperm(7, generator=torch.Generator().manual_seed(0)).split(2)
    assert all(map(torch.equal, plain.batches(2, torch.Generator().manual_seed(0)), expected))


def test_values_outside_the_support_are_met_before_training(tmp_path):
    """Grey values under a Bernoulli, padding and all."""
    lengths = torch.randint(1, 6, (30,))
    data = ragged(lengths)
    grey = Data((0.5 * data.args[0],), data.kwargs)
    model = DeepMarkovModel((D,), 2, 5, (4,))
    with pytest.raises(ValueError, match='values of site "x" in the support of its Bernoulli likelihood'):
        fit(model, guide_of(model), grey, epochs=1, batch_size=10, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    fit(model, guide_of(model), data, epochs=1, batch_size=10, out=tmp_path / "run", progress=False)


def test_scores_of_a_step():
    """Nats per step: sums over data by sums of lengths, the error that of a ratio."""
    lengths = torch.randint(1, 30, (200,), generator=torch.Generator().manual_seed(0))
    data = ragged(lengths)
    torch.manual_seed(0)
    model = DeepMarkovModel((D,), 2, 5, (4,))
    scores = evaluate(model, guide_of(model), data, num_samples=3, progress=False)
    assert torch.equal(scores.num_steps, lengths)
    for name, each in scores.per_step.items():
        values = scores.per_datum[name]
        assert each.value == pytest.approx(float(values.sum() / lengths.sum()), rel=1e-12)
        generator = torch.Generator().manual_seed(0)
        index = torch.randint(200, (4000, 200), generator=generator)
        bootstrap = values[index].sum(1) / lengths[index].sum(1)
        assert each.standard_error == pytest.approx(float(bootstrap.std()), rel=0.1)
    assert " per step" in str(scores)
    fixed = evaluate(model, guide_of(model), (data.args[0],), num_samples=2, progress=False)
    assert fixed.num_steps.unique().tolist() == [int(lengths.max())]
    table = VAE((4,), latent_dim=2)
    assert evaluate(table, AmortizedGuide(table), torch.ones(20, 4).double(), num_samples=2).per_step is None


def test_a_penalty_on_predictions():
    """Its gradient is that of the ELBO and of the squared errors; what it reports is the ELBO."""
    torch.manual_seed(0)
    model = autoregressive(C)
    guide = guide_of(model)
    (x, u), lengths = batch(), torch.tensor([5, 2, 3, 5])

    def gradients(loss):
        torch.manual_seed(1)
        value = loss.differentiable_loss(model, guide, x, u, lengths=lengths)
        return value.detach(), torch.autograd.grad(value, [*guide.parameters(), *model.parameters()], allow_unused=True)

    plain, penalised = gradients(ELBO()), gradients(PredictionPenalty(0.5))
    torch.testing.assert_close(penalised[0], plain[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(PredictionPenalty(0.0)), plain, rtol=1e-12, atol=1e-14)
    torch.manual_seed(1)
    z = poutine.trace(guide).get_trace(x, u, lengths=lengths).nodes["z"]["value"]
    v, total = torch.cat([previous(x), u], -1), 0.0
    for i in range(B):
        for t in range(1, int(lengths[i])):
            state = model.transition(z[i, t - 1], v[i, t]).mean
            total = total + (x[i, t] - model.emission(state, v[i, t]).mean).square().sum()
    torch.testing.assert_close(model.prediction_error(z, x, u, lengths=lengths).sum(), total, rtol=1e-10, atol=0)
    own = torch.autograd.grad(0.5 * total, [*guide.parameters(), *model.parameters()], allow_unused=True)
    for a, b, c in zip(penalised[1], plain[1], own, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b + (0.0 if c is None else c), rtol=1e-8, atol=1e-10)
    vae = VAE((4,), latent_dim=2)
    with pytest.raises(ValueError, match="expected a StateSpaceModel for PredictionPenalty"):
        PredictionPenalty(0.5).differentiable_loss(vae, AmortizedGuide(vae), torch.ones(20, 4).double())


@pytest.mark.parametrize("vectorize", [False, True])
def test_a_penalty_is_the_mean_over_the_draws_and_scales_with_the_data(vectorize, monkeypatch):
    model = autoregressive(C)
    (x, u), lengths, drawn = batch(), torch.tensor([5, 2, 3, 5]), []
    guide, plain = guide_of(model), type(model).prediction_error

    def noted(self, z, *args, **kwargs):
        drawn.append(z.expand(-1, B, T, Z) if z.dim() == 4 else z[None])
        return plain(self, z, *args, **kwargs)

    monkeypatch.setattr(StateSpaceModel, "prediction_error", noted)
    penalty = PredictionPenalty(0.5, num_particles=3, vectorize_particles=vectorize)
    torch.manual_seed(0)
    weights = log_weights(model, guide, (x, u), {"lengths": lengths}, 3, vectorize=vectorize)
    extra = penalty.extra(dataclasses.replace(weights, scale=10.0), model, guide, (x, u), {"lengths": lengths})
    z = torch.cat(drawn)
    assert z.shape == (3, B, T, Z)
    total = sum(plain(model, each, x, u, lengths=lengths).sum() for each in z)
    torch.testing.assert_close(extra, -0.5 * 10 * total / 3, rtol=1e-10, atol=0)


def test_errors_of_prediction_in_windows_are_those_of_the_whole():
    model = autoregressive(C)
    (x, u), z, lengths, begin = batch(), torch.randn(7, B, T, Z), torch.tensor([5, 2, 3, 5]), 0
    whole, parts, carried = model.prediction_error(z, x, u, lengths=lengths), 0.0, None
    for args, kwargs in windows(2, x, u, lengths=lengths):
        end = begin + args[0].shape[1]
        parts = parts + model.prediction_error(z[..., begin:end, :], *args, **kwargs, carried=carried)
        carried, begin = Carried(z[..., end - 1, :], x[:, end - 1]), end
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=0)


class Squashed(nn.Module):
    """A distribution without a mean."""

    def forward(self, z):
        p = dist.TransformedDistribution(dist.Normal(z, 1.0), [torch.distributions.SigmoidTransform()])
        return p.to_event(1)


def test_an_emission_without_a_mean():
    """Its evidence is known, its predictions are not."""
    model = StateSpaceModel(Initial(1), NormalTransition(lambda z: z, 1, 0.1), Squashed())
    x = torch.rand(2, 3, 1)
    found = model.filter(x, num_particles=20_000)
    assert bool(found.predicted.isnan().all())
    normal = StateSpaceModel(Initial(1), NormalTransition(lambda z: z, 1, 0.1), Half(1.0, weight=1.0))
    there = normal.filter(x.logit(), num_particles=20_000).log_evidence
    expected = there - (x * (1 - x)).log().sum((1, 2))
    torch.testing.assert_close(found.log_evidence, expected, rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="expected an emission with a mean"):
        PredictionPenalty(1.0).differentiable_loss(model, guide_of(model), x)


def test_whole_numbers_are_weighed_as_numbers_are():
    """A filter of x of any type."""
    model = DeepMarkovModel((D,), 2, 5, (4,), likelihood=likelihoods.Poisson())
    found = []
    for dtype in (torch.float64, torch.int64, torch.bool):
        torch.manual_seed(0)
        found.append(model.filter((batch()[0] > 0).to(dtype), num_particles=500).log_evidence)
    assert found[0].dtype == torch.float64
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=0, atol=0)


def test_functions_of_state_and_inputs_get_both_of_one_shape():
    """As a user writes them, at any number of draws."""
    readout, move = nn.Linear(Z + C, D), nn.Linear(Z + C, Z)

    class Readout(nn.Module):
        def forward(self, z, u):
            return dist.Normal(readout(torch.cat([z, u], -1)), 1.0).to_event(1)

    transition = NormalTransition(lambda z, u: move(torch.cat([z, u], -1)), Z)
    model = StateSpaceModel(Initial(Z, C), transition, Readout(), num_inputs=C)
    guide, (x, u) = guide_of(model), batch()
    for loss in (ELBO(3), TraceMeanField_ELBO(num_particles=3, vectorize_particles=True)):
        assert 0 < loss.loss(model, guide, x, u) < 1e4
    assert model.filter(x, u, num_particles=3).z.shape == (3, B, T, Z)
    assert model.forecast(guide, x, u, u, num_samples=3).shape == (3, B, T, D)
    assert model.predict_one_step(guide, x, u, num_samples=3).shape == (3, B, T, D)
    mask = torch.rand(B, T) < 0.5
    assert model.impute(guide, x, u, mask=mask, num_samples=3).shape == (3, B, T, D)
    assert model.prediction_error(torch.randn(3, B, T, Z), x, u).shape == (3, B)
    assert model.log_evidence(x, u, guide=guide, num_samples=3).shape == (B,)
    assert model(u=u).shape == (B, T, D)


def test_draws_are_scored_with_the_values_that_they_were_drawn_with():
    """Where x_{t-1} acts on z_t: with gradients, though they were drawn without."""
    model = autoregressive(C)
    _, u = batch()
    with torch.no_grad():
        trace = poutine.trace(model).get_trace(u=u)
    x, z = (trace.nodes[name]["value"] for name in ("x", "z"))
    expected = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x, u).log_prob_sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=1e-10, atol=0)
    assert expected.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_particles_of_no_weight_have_no_offspring(dtype):
    """And the others within one of K w."""
    torch.manual_seed(0)
    K = 100_000
    log_w = torch.randn(K, 5, dtype=dtype)
    log_w[-2:] = -torch.inf
    log_w = log_w.log_softmax(0)
    for _ in range(20):
        counts = torch.stack([each.bincount(minlength=K) for each in state_space._systematic(log_w).mT], -1)
        assert int(counts[-2:].sum()) == 0
        assert float((counts - K * log_w.double().exp()).abs().max()) < 1.01


def test_the_exact_evidence_of_the_nonlinear_model():
    """2.4845 nats per step and a root mean square of 2.298, by a grid; the particle filter's beside it."""
    valid = load_dataset("nonlinear_sequences").valid
    x, z = valid.x.double(), valid.latents.double()
    grid = Grid(lambda z: z + 2 * z.sin(), 0.01, 5.0, 5.0)
    exact, _ = grid.filtered(x[..., 0])
    assert float(exact.mean()) / 25 == pytest.approx(-2.4845, abs=5e-5)
    assert latent_rmse(grid.smoothed(x[..., 0])[None, ..., None], z) == pytest.approx(2.298, abs=5e-4)
    model = StateSpaceModel(
        Initial(1, scale=0.1, learned_mean=False),
        NormalTransition(lambda z: z + 2 * z.sin(), 1, 5**0.5),
        Half(5**0.5),
    )
    ratios = (model.filter(x, num_particles=500).log_evidence - exact).exp()
    error = float(ratios.std()) / len(x) ** 0.5
    assert error < 0.02 and float(ratios.mean()) == pytest.approx(1, abs=4 * error)


def trained(model, inference, data, epochs=100, **options):
    torch.manual_seed(0)
    guide = StateSpaceGuide(model, inference, hidden=40, **options)
    fit(
        model,
        guide,
        data,
        loss=TraceMeanField_ELBO(),
        optimizer=partial(torch.optim.Adam, lr=5e-3),
        learning_rate=Cosine(epochs),
        epochs=epochs,
        batch_size=250,
        clip_norm=100.0,
        progress=False,
        out=tempfile.mkdtemp(),
    )
    return guide


@pytest.mark.slow
@pytest.mark.parametrize("inference", ["ST-R", "ST-LR", "MF-LR"])
def test_trained_guides_come_to_the_exact_values(inference):
    """On the linear model: the evidence where q can be the posterior; the best mean-field bound where not.

    Recorded in float32 by benchmarks/nonlinear_ssm.py.
    """
    exact, (x, _) = papers_linear(), linear_data()[1]
    best = mean_field_bound(exact, x) if inference == "MF-LR" else float(exact.log_evidence(x).mean()) / 25
    torch.set_default_dtype(torch.float32)
    dataset = load_dataset("linear_sequences")
    model = krishnan()
    guide = trained(model, inference, dataset.train)
    found = evaluate(model, guide, dataset.valid, num_samples=20, progress=False).per_step["elbo"]
    assert best - 0.01 < found.value < best + 4 * found.standard_error_draws


@pytest.mark.slow
def test_parameters_are_recovered():
    """z_t ~ N([0.2 z_0 + tanh(a z_1), 0.2 z_1 + sin(b z_0)], 1), x ~ N(z / 2, 0.1): a = 0.5, b = -0.1.

    The bound's own maximum is nearer to 0: a guide that does not read the transition comes to a = 0.465 to 0.472.
    """
    torch.set_default_dtype(torch.float32)
    true = Curved(0.5, -0.1)
    transition = NormalTransition(true, 2, 1.0)
    model = StateSpaceModel(Initial(2, scale=1.0, learned_mean=False), transition, Half(0.1**0.5))
    torch.manual_seed(0)
    with torch.no_grad():
        x = model(num_data=10_000, num_steps=25)
    learned = Curved(0.1, 0.1)
    transition = NormalTransition(learned, 2, 1.0)
    model = StateSpaceModel(Initial(2, scale=1.0, learned_mean=False), transition, Half(0.1**0.5))
    trained(model, "ST-LR", x, epochs=12, reads_transition=True)
    assert [float(p.detach()) for p in learned.parameters()] == pytest.approx([0.5, -0.1], abs=0.03)


class Curved(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, z):
        first, second = z.unbind(-1)
        return torch.stack([0.2 * first + (self.a * second).tanh(), 0.2 * second + (self.b * first).sin()], -1)
