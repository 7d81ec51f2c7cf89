"""Laws that hold for every pair in the table of cases.py."""

import copy
import pickle

import pyro
import pytest
import torch
from cases import CASES, assert_same_sites
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO

from pyro_vae import evaluate, fit, load_run
from pyro_vae.config import build, describe
from pyro_vae.log_weights import log_weights

UNDESCRIBED = (
    *("two_sites", "distribution_prior", "sequences_of_user_networks", "decoder_from_the_left", "recurrent_decoder"),
    *("convolutions_with_batch_statistics", "hierarchical_prior_from_the_left"),
)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
def test_guide_draws_the_models_latent_sites_in_its_plates(case):
    model, guide = case.pair()
    assert_same_sites(model, guide, case.data())


@every_case
def test_prior_draws_lie_in_the_support_of_the_likelihood(case):
    model, _ = case.pair()
    x = model(num_data=7)
    assert x.shape == (7, *case.data().shape[1:])
    site = poutine.trace(model).get_trace(x).nodes["x"]
    assert bool(site["fn"].support.check(x).all())


@every_case
def test_log_weights_are_those_of_a_loop_over_draws_and_data(case):
    """log w_kb computed at once equals log p(x_b, z_kb) - log q(z_kb | x_b) of each draw and datum alone."""
    model, guide = (program.double().eval() for program in case.pair())
    x = case.data().double()
    torch.manual_seed(3)
    weights = log_weights(model, guide, (x,), {}, 4)
    assert weights.log_weight.shape == (4, len(x))
    for k in range(4):
        for b in range(len(x)):
            datum = x[b : b + 1]
            draws = {name: z[k, b : b + 1] for name, (_, _, z, _) in weights.sites.items()}
            q = poutine.trace(poutine.condition(guide, draws)).get_trace(datum).log_prob_sum()
            p = poutine.trace(poutine.condition(model, draws)).get_trace(datum).log_prob_sum()
            torch.testing.assert_close(weights.log_weight[k, b], p - q, rtol=1e-9, atol=1e-9)


@every_case
def test_evaluate_of_one_draw_is_the_elbo_and_the_bound_rises_with_k(case):
    model, guide = case.pair()
    x = case.data(20)
    one, many = (evaluate(model, guide, x, num_samples=k, seed=5, progress=False) for k in (1, 200))
    assert float(one.log_evidence) == pytest.approx(float(one.elbo), abs=1e-9)
    assert bool((many.per_datum["log_evidence"] >= many.per_datum["elbo"] - 1e-9).all())
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        pair = model.eval(), guide.eval()
        loss = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1).loss(*pair, x)
    noise = 5 * (many.elbo.standard_error_draws * 2**0.5)
    assert -loss / len(x) == pytest.approx(float(many.elbo), abs=noise)


@every_case
def test_a_run_saves_and_loads_the_same_numbers(case, tmp_path):
    model, guide = case.pair()
    x = case.data(20)
    run = fit(model, guide, x, epochs=2, batch_size=8, out=tmp_path / "run", progress=False)
    objects = dict(zip(("model", "guide"), case.pair(), strict=True)) if case.name in UNDESCRIBED else {}
    loaded = load_run(tmp_path / "run", **objects)
    before, after = (evaluate(r.model, r.guide, x, num_samples=10, progress=False) for r in (run, loaded))
    assert torch.equal(before.per_datum["log_evidence"], after.per_datum["log_evidence"])
    assert loaded.history == run.history


@every_case
def test_the_loss_falls(case, tmp_path):
    model, guide = case.pair()
    run = fit(model, guide, case.data(20), epochs=60, batch_size=20, out=tmp_path / "run", progress=False)
    bounds = [record["bound"] for record in run.history]
    assert sum(bounds[-10:]) > sum(bounds[:10])


@every_case
def test_copies_and_pickles_are_the_pair_itself(case):
    model, guide = case.pair()
    x = case.data()
    for other in (copy.deepcopy((model, guide)), pickle.loads(pickle.dumps((model, guide)))):
        losses = []
        for pair in ((model, guide), other):
            torch.manual_seed(0)
            losses.append(Trace_ELBO().loss(*pair, x))
        assert losses[0] == losses[1]


@every_case
def test_configuration_makes_the_pair_again(case):
    if case.name in UNDESCRIBED:
        pytest.skip("a user's own model or distribution, which keeps no record of its arguments")
    pair = dict(zip(("model", "guide"), case.pair(), strict=True))
    config = describe(pair)
    again = build(config)
    assert describe({name: again[name] for name in pair}) == config
    for name, program in pair.items():
        shapes = {key: value.shape for key, value in program.state_dict().items()}
        assert {key: value.shape for key, value in again[name].state_dict().items()} == shapes


@every_case
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_works(case, parallel):
    model, guide = case.pair()
    x = case.data()
    with pyro.get_param_store().scope():
        prior = Predictive(model, num_samples=5, parallel=parallel)(num_data=4)
        posterior = Predictive(model, guide=guide, num_samples=5, parallel=parallel, return_sites=("x",))
    assert prior["x"].shape == (5, 4, *x.shape[1:])
    with pyro.get_param_store().scope():
        assert posterior(x)["x"].shape == (5, *x.shape)


@pytest.mark.cuda
@every_case
def test_a_pair_trains_on_cuda(case, tmp_path):
    model, guide = case.pair()
    run = fit(model, guide, case.data(20), epochs=3, batch_size=8, device="cuda", out=tmp_path / "run", progress=False)
    assert {p.device.type for p in (*run.model.parameters(), *run.guide.parameters())} == {"cuda"}
    scores = evaluate(run.model, run.guide, case.data(20), num_samples=10, progress=False)
    assert torch.isfinite(scores.per_datum["log_evidence"]).all()
