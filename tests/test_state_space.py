"""State-space models and their structured guides: exact answers, who sees what, masks, inputs."""

import re
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from gaussian import Linear, walk
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vae import CompiledSVI, evaluate, fit
from pyro_vae.data import Data
from pyro_vae.estimators import IWAE, DReG
from pyro_vae.guides import StateSpaceGuide, families
from pyro_vae.guides.state_space import TanhCombiner
from pyro_vae.models import StateSpaceModel, likelihoods
from pyro_vae.models.transitions import (
    Emission,
    GatedTransition,
    Initial,
    LinearTransition,
    MLPTransition,
    NormalTransition,
)
from pyro_vae.sequences import steps_of

pytestmark = pytest.mark.usefixtures("float64")
CODES = ("MF-L", "MF-R", "MF-LR", "ST-L", "ST-R", "ST-LR")
Z, D, C, T, B = 2, 3, 2, 5, 4
normal = partial(Emission, Z, D, likelihoods.Normal("predicted"), network=None)


def pair(inference="ST-LR", transition=None, num_inputs=0, **options):
    torch.manual_seed(0)
    transition = GatedTransition(Z, 7, num_inputs) if transition is None else transition
    model = StateSpaceModel(Initial(Z, num_inputs), transition, normal(num_inputs=num_inputs), num_inputs)
    return model, StateSpaceGuide(model, inference, hidden=4, **options)


def batch():
    torch.manual_seed(1)
    return torch.randn(B, T, D), torch.randn(B, T, C)


def test_the_joint_density_is_the_dense_gaussians():
    """ln p(x, z) = ln p(x) + sum_t ln p(z_t | z_{t-1}, x), for any z."""
    torch.manual_seed(0)
    transition, readout = LinearTransition(Z), nn.Linear(Z, D)
    with torch.no_grad():
        transition.mean.function.weight.copy_(0.5 * torch.randn(Z, Z))
        transition.mean.function.bias.normal_()
        transition.log_scale.copy_(torch.tensor([-0.5, 0.2]))

    class Readout(nn.Module):
        def forward(self, z):
            return dist.Normal(readout(z), 0.7).to_event(1)

    model = StateSpaceModel(Initial(Z, scale=0.8), transition, Readout())
    linear = transition.mean.function
    Q = (2 * transition.log_scale).exp().diag()
    parts = (linear.weight, linear.bias, Q, readout.weight, readout.bias, 0.49 * torch.eye(D))
    with torch.no_grad():
        exact = Linear(T, *parts, model.initial.mean, 0.64 * torch.eye(Z))
        x, z = batch()[0], torch.randn(B, T, Z)
        mean, covariance = exact.smoothed(x)
        posterior = dist.MultivariateNormal(mean.flatten(1), (covariance + covariance.mT) / 2)
        expected = exact.log_evidence(x) + posterior.log_prob(z.flatten(1))
        found = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x).log_prob_sum()
    torch.testing.assert_close(found, expected.sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("inference", CODES)
def test_who_sees_what(inference, cell):
    """L: x and u up to t; R: from t on; ST: z_{t-1} too."""
    _, guide = pair(inference, cell=cell, num_inputs=C)
    x, u = (each.requires_grad_() for each in batch())
    h = torch.cat([guide.encoded(steps_of(x), u, direction) for direction in guide.cells], -1)
    z = torch.randn(B, Z, requires_grad=True)
    for t in range(T):
        q = guide.step(z, h[:, t])
        total = q.base_dist.loc.sin().sum() + q.base_dist.scale.sum()
        of_x, of_u, of_z = torch.autograd.grad(total, [x, u, z], retain_graph=True, allow_unused=True)
        seen = of_x.abs().sum((0, 2)) > 0
        assert torch.equal(of_u.abs().sum((0, 2)) > 0, seen)
        directions = inference.split("-")[1]
        expected = [("L" in directions and s < t) or ("R" in directions and s > t) or s == t for s in range(T)]
        assert seen.tolist() == expected
        assert (of_z is not None) == inference.startswith("ST")


@pytest.mark.parametrize("cell", ["rnn", "relu_rnn", "gru", "lstm"])
def test_the_networks_are_torchs(cell):
    """Both directions, over padded sequences: as torch's own over packed ones."""
    _, guide = pair("MF-LR", cell=cell)
    x, lengths = batch()[0], torch.tensor([5, 2, 3, 1])
    inputs = torch.cat([x, torch.ones(B, T, 1)], -1)
    kinds = {"rnn": nn.RNN, "relu_rnn": partial(nn.RNN, nonlinearity="relu"), "gru": nn.GRU, "lstm": nn.LSTM}
    network = kinds[cell](D + 1, 4, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for suffix, own in (("", guide.cells["L"]), ("_reverse", guide.cells["R"])):
            for name, value in own.named_parameters():
                getattr(network, f"{name[:-3]}_{name[-2:]}_l0{suffix}").copy_(value)
    packed = nn.utils.rnn.pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
    expected, _ = nn.utils.rnn.pad_packed_sequence(network(packed)[0], batch_first=True)
    steps = steps_of(x, lengths)
    found = torch.cat([guide.encoded(steps, None, direction) for direction in "LR"], -1)
    there = steps.there[..., None]
    torch.testing.assert_close(found * there, expected * there, rtol=1e-10, atol=1e-12)


def test_an_input_acts_on_the_step_that_it_produces():
    model, guide = pair(num_inputs=C)
    x, u = batch()
    z = torch.randn(B, T, Z)
    chain = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x, u).nodes["z"]["fn"]
    other = u.clone()
    other[:, 2] += 1
    again = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x, other).nodes["z"]["fn"]
    difference = (chain.log_prob_of_steps(z) - again.log_prob_of_steps(z)).abs().sum(0) > 0
    assert difference.tolist() == [False, False, True, False, False]
    first = u.clone()
    first[:, 0] += 1
    again = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x, first).nodes["z"]["fn"]
    difference = (chain.log_prob_of_steps(z) - again.log_prob_of_steps(z)).abs().sum(0) > 0
    assert difference.tolist() == [True, False, False, False, False]
    assert torch.isfinite(torch.tensor(Trace_ELBO().loss(model, guide, x, u)))


def bound(model, guide, *args, seed=0, loss=None, **kwargs):
    """Value and gradients, the same draws at each step for all T of the same size."""
    torch.manual_seed(seed)
    value = (loss or TraceMeanField_ELBO()).differentiable_loss(model, guide, *args, **kwargs)
    parameters = [*model.parameters(), *guide.parameters()]
    return value.detach(), torch.autograd.grad(value, parameters, allow_unused=True)


@pytest.mark.parametrize("inference", CODES)
@pytest.mark.parametrize("garbage", [7.0, torch.nan, torch.inf])
def test_padding_changes_nothing(inference, garbage):
    model, guide = pair(inference)
    x, lengths = batch()[0], torch.tensor([5, 2, 3, 1])
    there = torch.arange(T) < lengths[:, None]
    clean = bound(model, guide, x, lengths=lengths)
    dirty = bound(model, guide, x.where(there[..., None], torch.tensor(garbage)), lengths=lengths)
    torch.testing.assert_close(dirty, clean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bound(model, guide, x, mask=there), clean, rtol=1e-12, atol=1e-12)
    alone = [bound(model, guide, x[1:2, :n], lengths=torch.tensor([2])) for n in (2,)]
    longer = bound(model, guide, x[1:2], lengths=torch.tensor([2]))
    torch.testing.assert_close(longer[0], alone[0][0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("missing", ["frames", "entries"])
@pytest.mark.parametrize("garbage", [7.0, torch.nan])
def test_what_is_missing_changes_nothing(missing, garbage):
    """Frames in the middle, and single values."""
    model, guide = pair(missing=missing)
    x = batch()[0]
    frames = torch.rand(B, T) < 0.6
    frames[:, -1] = True
    entries = torch.rand(B, T, D) < 0.5
    entries[:, -1] = True
    for mask in (frames, entries):
        where = mask if mask.dim() == 3 else mask[..., None]
        clean = bound(model, guide, x, mask=mask)
        dirty = bound(model, guide, x.where(where, torch.tensor(garbage)), mask=mask)
        torch.testing.assert_close(dirty, clean, rtol=1e-12, atol=1e-12)
        assert float((clean[0] - bound(model, guide, x)[0]).abs()) > 0.1


def test_a_missing_value_is_integrated_out():
    """Of a linear model: the evidence of the values that are there, by guide and by particles."""
    model, exact = walk(3)
    exact = exact.of_x
    guide = StateSpaceGuide(model, "ST-LR", hidden=4)
    x, mask = torch.randn(1, 3, 1), torch.tensor([[True, False, True]])
    with torch.no_grad():
        keep = torch.tensor([0, 2])
        marginal = dist.MultivariateNormal(exact.mean[keep], exact.covariance_matrix[keep][:, keep])
        expected = float(marginal.log_prob(x[0, keep, 0]))
    found = evaluate(model, guide, (x, {"mask": mask}), num_samples=20_000, progress=False).log_evidence
    assert float(found) == pytest.approx(expected, abs=5 * found.standard_error_draws + 0.01)
    for given in (mask, mask[..., None]):
        filtered = model.filter(x, mask=given, num_particles=100_000)
        assert float(filtered.log_evidence) == pytest.approx(expected, abs=0.01)
        assert float(filtered.per_step[0, 1]) == pytest.approx(0.0, abs=1e-12)


def test_the_particle_filter_is_kalmans():
    """Means of z given the past, predictions of x, and an evidence whose exponential is unbiased."""
    model, exact = walk(6)
    x = exact.of_x.sample([3]).unflatten(1, (6, 1))
    x[0, 4] += 2.0  # an outlier: weights fall, and particles are drawn anew
    torch.manual_seed(1)
    filtered = model.filter(x, num_particles=200_000)
    for t in range(6):
        before, now = slice(0, t), slice(0, t + 1)
        covariance = exact.covariance @ exact.emit.mT
        gain = covariance[t, now] @ torch.linalg.inv(exact.of_x.covariance_matrix[now, now])
        mean = exact.mean[t] + (x[:, now, 0] - exact.of_x.mean[now]) @ gain
        torch.testing.assert_close(filtered.mean[:, t, 0], mean, atol=0.02, rtol=0)
        gain = exact.of_x.covariance_matrix[t, before] @ torch.linalg.inv(exact.of_x.covariance_matrix[before, before])
        predicted = exact.of_x.mean[t] + (x[:, before, 0] - exact.of_x.mean[before]) @ gain
        torch.testing.assert_close(filtered.predicted[:, t, 0], predicted, atol=0.02, rtol=0)
    assert float(filtered.ess.min()) < 100_000
    many = x.repeat(4000, 1, 1)
    ratios = (model.filter(many, num_particles=10).log_evidence - exact.log_evidence(many)).exp().view(4000, 3)
    error = ratios.std(0) / 4000**0.5
    assert bool((error < 0.1).all()) and bool(((ratios.mean(0) - 1).abs() < 4 * error).all())


def test_the_filter_goes_on_after_what_no_particle_could_give():
    """x_t within 1 of z_t, and one step far away: its density is 0, and so is that of the whole."""

    class Near(nn.Module):
        def forward(self, z):
            return dist.Uniform(z - 1, z + 1, validate_args=False).to_event(1)

    model = StateSpaceModel(Initial(1), NormalTransition(lambda z: z, 1, 0.1), Near())
    filtered = model.filter(torch.tensor([0.0, 0.0, 100.0, 0.0]).reshape(1, 4, 1), num_particles=100)
    assert filtered.per_step.isneginf().tolist() == [[False, False, True, False]]
    assert filtered.log_evidence.tolist() == [-torch.inf]
    assert bool(filtered.mean.isfinite().all())


@pytest.mark.parametrize("garbage", [7.0, torch.nan])
def test_inputs_after_the_end_change_nothing(garbage):
    model, guide = pair(num_inputs=C, reads_transition=True)
    x, u = batch()
    lengths = torch.tensor([5, 2, 3, 1])
    there = (torch.arange(T) < lengths[:, None])[..., None]
    clean = bound(model, guide, x, u, lengths=lengths)
    dirty = bound(model, guide, x, u.where(there, torch.tensor(garbage)), lengths=lengths)
    torch.testing.assert_close(dirty, clean, rtol=1e-12, atol=1e-12)


def test_values_that_are_nan_are_missing():
    """For a likelihood that takes them so, with a mask or without: as a mask leaves them out."""
    there = torch.rand(B, T, D) < 0.6
    x = batch()[0]
    emission = Emission(Z, D, likelihoods.Missing(likelihoods.Normal(initial_scale=0.5)))
    model = StateSpaceModel(Initial(Z), GatedTransition(Z, 7), emission)
    guide = StateSpaceGuide(model, hidden=4, missing="entries")
    expected = bound(model, guide, x, mask=there, lengths=torch.full((B,), T))
    marked = x.where(there, torch.tensor(torch.nan))
    torch.testing.assert_close(bound(model, guide, marked), expected, rtol=1e-12, atol=1e-12)
    z = torch.randn(B, T, Z)
    error = model.prediction_error(z, marked)
    torch.testing.assert_close(error, model.prediction_error(z, x, mask=there, lengths=torch.full((B,), T)))


@pytest.mark.parametrize("num_inputs", [0, C])
def test_a_forecast_begins_after_the_last_step(num_inputs):
    """From z at the end of each sequence, with the first future input: the means of the model's own steps."""
    transition = LinearTransition(Z, num_inputs, scale=1e-6)
    with torch.no_grad():
        transition.mean.function.weight.normal_()
        transition.mean.function.bias.normal_()
    model, _ = pair(transition=transition, num_inputs=num_inputs)
    x, u = batch()
    z, lengths = torch.randn(B, T, Z), torch.tensor([5, 2, 3, 1])
    future = torch.randn(B, 2, C)

    def guide(x, u=None, lengths=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(z).to_event(2))

    given = ((u, future), {}) if num_inputs else ((), {"num_steps": 2})
    drawn = model.forecast(guide, x, *given[0], lengths=lengths, num_samples=4000, **given[1])
    assert drawn.shape == (4000, B, 2, D)
    state = z[torch.arange(B), lengths - 1]
    for t in range(2):
        inputs = (future[:, t],) if num_inputs else ()
        state = transition(state, *inputs).mean
        p = model.emission(state, *inputs)
        error = (p.variance / 4000).sqrt()
        assert bool(((drawn[:, :, t].mean(0) - p.mean).abs() < 5 * error).all())
    with pytest.raises(ValueError, match="it alone"):
        model.forecast(guide, x, *given[0], **({"num_steps": 2} if num_inputs else {}))


def test_what_is_missing_is_drawn_and_the_rest_kept():
    model, guide = pair()
    x, mask = batch()[0], torch.rand(B, T, D) < 0.5
    drawn = model.impute(guide, x.where(mask, torch.nan), mask=mask, num_samples=50)
    assert drawn.shape == (50, B, T, D) and bool((drawn == x)[:, mask].all()) and bool(torch.isfinite(drawn).all())
    assert bool((drawn.std(0)[~mask] > 0).all())
    marked = x.clone()
    marked[0, 1] = torch.nan  # which is missing, whatever the mask says
    drawn = model.impute(guide, marked, mask=torch.ones(B, T, D, dtype=torch.bool), num_samples=3)
    assert bool(drawn.isfinite().all()) and bool((drawn == x).all(-1)[:, 1:].all())
    seen = []

    def spied(*args, **kwargs):
        seen.append(kwargs["lengths"].tolist())
        return guide(*args, **kwargs)

    model.impute(spied, x, mask=torch.arange(T) < torch.tensor([[3]] * B), num_samples=2)
    assert seen and all(lengths == [T] * B for lengths in seen)  # the chain goes on after the last observation
    assert model.smooth(guide, x, num_samples=6, lengths=torch.tensor([5, 2, 3, 1])).shape == (6, B, T, Z)


@pytest.mark.parametrize("make", [MLPTransition, LinearTransition, partial(NormalTransition, torch.sin, scale=0.3)])
def test_transitions(make):
    model, guide = pair(transition=make(latent_dim=Z))
    assert model(num_data=3, num_steps=4).shape == (3, 4, D)
    for loss in (IWAE(3), DReG(3), TraceMeanField_ELBO(num_particles=2, vectorize_particles=True)):
        assert np.isfinite(loss.loss(model, guide, batch()[0]))


@pytest.mark.parametrize("num_inputs", [0, C])
def test_a_guide_reads_the_transition(num_inputs, recorded_once):
    """q(z_t | ...) is a function of E_p[z_t | z_{t-1}, u_t] too; one set of parameters serves both programs."""
    model, guide = pair(transition=LinearTransition(Z, num_inputs), num_inputs=num_inputs, reads_transition=True)
    args = batch()[: 1 + bool(num_inputs)]
    assert guide.transition is model.transition
    with torch.no_grad():
        guide.combiner.features.weight.zero_(), guide.combiner.offset.weight.zero_()
        guide.combiner.offset.weight[:, Z : 2 * Z] = torch.eye(Z)
        model.transition.mean.function.weight.normal_()
        trace = poutine.trace(guide).get_trace(*args)
    z, chain = trace.nodes["z"]["value"], trace.nodes["z"]["fn"]
    u = args[1:] and (args[1][:, 1:],)
    expected = model.transition(z[:, :-1], *u).mean
    found = chain.transition(z[:, :-1], chain.inputs[:, 1:]).mean
    offset = found - expected  # of the family's own location, which is the same at all steps
    torch.testing.assert_close(offset, offset[:1, :1].expand_as(offset))
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
    before = model.transition.mean.function.weight.detach().clone()
    for _ in range(2):
        svi.step(*args)
    assert svi.compiled, svi.fallback_reason
    assert not torch.equal(before, model.transition.mean.function.weight)
    for refused in (partial(pair, "MF-LR"), pair_with_feedback):
        with pytest.raises(ValueError, match="a model without feedback beside reads_transition"):
            refused(reads_transition=True)


def pair_with_feedback(**options):
    parts = Initial(Z, D), LinearTransition(Z, D), normal(num_inputs=D)
    return StateSpaceGuide(StateSpaceModel(*parts, feedback=D), **options)


def test_a_flow_of_each_step_takes_one_pass():
    model, guide = pair(family=families.IAF(transforms=1, hidden=(6,)))
    calls = []
    guide.family.networks[0].register_forward_hook(lambda *_: calls.append(1))
    Trace_ELBO().loss(model, guide, batch()[0])
    assert len(calls) == T
    z = poutine.trace(guide).get_trace(batch()[0]).nodes["z"]
    torch.testing.assert_close(z["fn"].log_prob(z["value"]), z["fn"].log_prob(z["value"].clone()), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("inference", ["MF-LR", "ST-R", "ST-LR"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_compiled_steps_are_stock_steps(inference, cell, recorded_once):
    losses = {}
    for kind in (pyro.infer.SVI, CompiledSVI):
        pyro.clear_param_store()
        model, guide = pair(inference, cell=cell, combiner=TanhCombiner())
        svi = kind(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
        torch.manual_seed(0)
        losses[kind] = [svi.step(batch()[0], lengths=torch.tensor([5, 2, 3, 1])) for _ in range(3)]
    assert svi.compiled, svi.fallback_reason
    assert losses[CompiledSVI] == pytest.approx(losses[pyro.infer.SVI], rel=1e-9)


def test_fit_takes_sequences(tmp_path, recorded):
    model, guide = pair()
    data = (batch()[0], {"lengths": torch.tensor([5, 2, 3, 1])})
    run = fit(model, guide, data, valid=data, epochs=2, batch_size=2, progress=False, out=tmp_path / "run")
    assert len(run.history) == 2 and np.isfinite(run.history[-1]["valid"])


def test_bad_input():
    model, guide = pair(num_inputs=C)
    x, u = batch()
    for call, said in (
        (lambda: model(x), "expected 2 inputs at each step, got none"),
        (lambda: model(x, u[:, :3]), "expected inputs u of shape (4, 5, 2), got (4, 3, 2)"),
        (lambda: pair()[0](), "expected data x, or num_data"),
        (lambda: guide(x[0], u), "expected sequences of shape"),
        (lambda: guide(x, u, lengths=torch.ones(2)), "expected lengths of shape"),
        (lambda: guide(x, u, mask=torch.ones(2, 3)), "expected a mask of shape"),
        (lambda: model.filter(x[..., :1], u), "expected x of shape (B, T, 3), got (4, 5, 1)"),
        (lambda: model.filter(x[0], u), "expected x of shape (B, T, 3), got (5, 3)"),
        (lambda: model.filter(x[:, :0], u[:, :0]), "expected x of shape (B, T, 3), got (4, 0, 3)"),
        (lambda: model(x, u[..., :1]), "expected inputs u of shape (4, 5, 2), got (4, 5, 1)"),
        (lambda: model.forecast(guide, x, u, u[0]), "expected u_future of shape (4, H, 2), got (5, 2)"),
        (lambda: model.forecast(guide, x, u, u, lengths=torch.tensor([5, 0, 3, 1])), "expected lengths from 1 to 5"),
        (lambda: guide(x, u, lengths=torch.tensor([5.0, 2.5, 3.0, 1.0])), "expected lengths of shape (4,), whole"),
        (lambda: Data((x,), {"lengths": torch.tensor([6, 1, 1, 1])}), "expected lengths from 1 to the 5 steps of x"),
        (lambda: model(x, u, num_data=4), "expected x, or num_data and num_steps, got both"),
        (lambda: model(u=u, num_data=9), "expected num_data beside u of one row for all"),
        (lambda: pair(family=families.Bernoulli())[1](x), "expected a family over real numbers beside LinearCombiner"),
        (lambda: pair("ST-RL"), "expected inference MF-L"),
        (lambda: pair(cell="tcn"), "expected cell to be one of rnn, relu_rnn, gru, lstm"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            call()


COVARIANCE = torch.tensor([[1.0, 0.9, 0.3], [0.9, 1.2, -0.2], [0.3, -0.2, 0.8]])


class Correlated(nn.Module):
    """x ~ N((z, z, z), COVARIANCE) for z of one dimension, or of a covariance of low rank, or a mixture of two."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, z):
        mean = z.expand(*z.shape[:-1], 3)
        if self.kind == "full":
            return dist.MultivariateNormal(mean, COVARIANCE.to(z))
        if self.kind == "low rank":
            return dist.LowRankMultivariateNormal(mean, COVARIANCE[:, :2].to(z), torch.full((3,), 0.3).to(z))
        both = dist.Normal(torch.stack([mean, -mean], -2), 1.0).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(*z.shape[:-1], 2)), both)


def correlated(kind):
    class First(nn.Module):
        def forward(self):
            return dist.Normal(torch.zeros(1), 1.0).to_event(1)

    class Next(nn.Module):
        def forward(self, z):
            return dist.Normal(z, 1.0).to_event(1)

    return StateSpaceModel(First(), Next(), Correlated(kind))


@pytest.mark.parametrize("kind", ["full", "low rank"])
def test_correlated_values_are_imputed_given_those_of_their_step(kind):
    """One, two and none of three are seen: the Gaussian's conditional, at a z that is given."""
    torch.manual_seed(0)
    model = correlated(kind)
    x = torch.tensor([[[2.0, 0.0, 0.0], [1.0, torch.nan, -1.0], [0.0, 0.0, 0.0]]])
    mask = torch.tensor([[[True, False, False], [True, True, True], [False, False, False]]])
    z = torch.tensor([[[0.4], [-0.3], [1.0]]])

    def guide(x, lengths=None, mask=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(z, event_dim=2))

    drawn = model.impute(guide, x, mask=mask, num_samples=40_000)[:, 0]
    p = Correlated(kind)(z[0])
    seen = mask[0] & (x[0] == x[0])
    for t in range(3):
        there, mean, S = seen[t], p.mean[t], p.covariance_matrix.expand(3, 3, 3)[t]
        gain = S[~there][:, there] @ torch.linalg.inv(S[there][:, there])
        expected = mean[~there] + gain @ (x[0, t, there] - mean[there])
        covariance = S[~there][:, ~there] - gain @ S[there][:, ~there]
        assert bool((drawn[:, t, there] == x[0, t, there]).all())
        found = drawn[:, t, ~there]
        torch.testing.assert_close(found.mean(0), expected, atol=0.03, rtol=0.0)
        torch.testing.assert_close(found.mT.cov().reshape(covariance.shape), covariance, atol=0.04, rtol=0.0)


def test_values_that_are_correlated_otherwise_are_not_imputed_in_part():
    """Whole steps are; every query that leaves out a part says the same."""
    model, x = correlated("mixture"), torch.randn(2, 3, 3)
    part, steps = torch.rand(2, 3, 3) < 0.5, torch.tensor([[True, False, True]] * 2)

    def guide(x, lengths=None, mask=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2, 3, 1), 1.0).to_event(2))

    assert model.impute(guide, x, mask=steps, num_samples=2).shape == (2, 2, 3, 3)
    queries = [
        lambda: model.impute(guide, x, mask=part, num_samples=2),
        lambda: model.impute(guide, x.where(part, torch.nan), mask=steps, num_samples=2),
        lambda: model.filter(x, mask=part, num_particles=3),
        lambda: model(x, mask=part),
        lambda: likelihoods.Missing(_Blocks()).bind((3,))(torch.zeros(2, 1, 3)),
    ]
    for query in queries:
        with pytest.raises(ValueError, match="expected a distribution that factorises over dimensions, got"):
            query()


class _Blocks(likelihoods.Likelihood):
    def forward(self, parameters):
        return dist.MultivariateNormal(*self.unpacked(parameters), COVARIANCE.to(parameters))


def test_the_evidence_by_a_guide_counts_no_scale():
    """A guide that weighs its own ln q, as for a KL weight, draws the same z."""
    model, guide = pair("ST-L")
    x, _ = batch()
    found = []
    for scale in (1.0, 0.3):
        torch.manual_seed(0)
        found.append(model.log_evidence(x, guide=poutine.scale(guide, scale=scale), num_samples=3))
    torch.testing.assert_close(*found)
