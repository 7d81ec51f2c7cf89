"""Laws of `pyro_vae.prediction` on a linear VAE, where every quantity has a closed form."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive

from pyro_vae import evaluate, fit, load_dataset, prediction
from pyro_vae.guides import AmortizedGuide
from pyro_vae.models import VAE, LinearVAE, likelihoods
from pyro_vae.prediction import (
    decode,
    denoise,
    encode,
    encodings,
    interpolate,
    reconstruct,
    sample,
    scores,
    to_arviz,
)
from pyro_vae.training import Run

N, D, K = 12, 5, 2
GROUPS = {"prior", "prior_predictive", "posterior", "posterior_predictive", "log_likelihood", "observed_data"}


def linear_model() -> LinearVAE:
    generator = torch.Generator().manual_seed(1)
    model = LinearVAE((D,), latent_dim=K).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(D, K, generator=generator, dtype=torch.float64))
        model.mean.copy_(torch.arange(D))
        model.likelihood.log_scale.fill_(-0.5)
    return model


@pytest.fixture
def model() -> LinearVAE:
    return linear_model()


@pytest.fixture
def x(model) -> torch.Tensor:
    return sample(model, N, seed=7)


@pytest.fixture
def guide(model) -> AmortizedGuide:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AmortizedGuide(model)


def exact_guide(model):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", model.posterior(x))

    return guide


def shifted_model(x=None, *, num_data=None):
    shift = pyro.param("shift", torch.zeros(3))
    with pyro.plate("data", num_data if x is None else len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(2 * z + shift, 1.0).to_event(1), obs=x)


def shifted_guide(x):
    shift = pyro.param("shift", torch.zeros(3))
    with pyro.plate("data", len(x)):  # the exact posterior
        pyro.sample("z", dist.Normal(0.4 * (x - shift), 0.2**0.5).to_event(1))


def chain_model(x=None, *, num_data=None):
    with pyro.plate("data", num_data if x is None else len(x)):
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(top, 0.5))
        return pyro.sample("x", dist.Normal(z, 0.1), obs=x)


def chain_guide(x):
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.Normal(x, 2.0))
        pyro.sample("z", dist.Normal(3 * top, 0.5))


def nested_model(x=None, *, num_data=None):
    pixels = pyro.plate("pixels", 4, dim=-2)
    with pyro.plate("data", num_data, dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pixels:
            return pyro.sample("x", dist.Normal(z * torch.arange(4.0)[:, None], 1.0), obs=x)


def test_decode_is_affine(model):
    z = torch.randn(7, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = z @ model.weight.T + model.mean
    torch.testing.assert_close(decode(model, z), expected.detach())
    torch.testing.assert_close(decode(model, {"z": z}), expected.detach())


def test_sample_has_the_exact_moments(model):
    draws, means = sample(model, 100_000), sample(model, 100_000, mean=True)
    covariance = (model.weight @ model.weight.T).detach()
    identity = torch.eye(D, dtype=torch.float64)
    for x, expected in ((draws, covariance + model.variance.detach() * identity), (means, covariance)):
        error = (x.mean(0) - model.mean.detach()) / (expected.diagonal() / len(x)).sqrt()
        assert error.abs().max() < 5
        torch.testing.assert_close(x.T.cov(), expected, rtol=0, atol=0.02 * expected.diagonal().max().item())
    assert torch.linalg.matrix_rank(means - model.mean.detach()) == K  # no observation noise


def test_encode_is_q(model, guide, x):
    q = guide.posterior(x)
    encoding = encode(guide, x)
    torch.testing.assert_close(encoding.mean, q.mean.detach())
    torch.testing.assert_close(encoding.scale, q.stddev.detach())
    assert encoding.draws is None

    encoding = encode(exact_guide(model), x, num_samples=1000)
    posterior = model.posterior(x)
    torch.testing.assert_close(encoding.mean, posterior.mean.detach())
    torch.testing.assert_close(encoding.scale, posterior.stddev.detach())
    assert encoding.draws.shape == (1000, N, K)
    error = (encoding.draws.mean(0) - encoding.mean) / (encoding.scale / 1000**0.5)
    assert error.abs().max() < 5
    torch.testing.assert_close(encoding.draws.std(0), encoding.scale, rtol=0.1, atol=0)


def test_encodings_of_dependent_sites_have_the_marginal_moments():
    x = torch.tensor([1.0, -2.0])
    encoded = encodings(chain_guide, x, num_samples=1000)
    assert encoded["z"].draws.shape == (1000, 2)
    torch.testing.assert_close(encoded["top"].mean, x)
    torch.testing.assert_close(encoded["z"].mean, 3 * x, rtol=0, atol=5 * 6 / 1000**0.5)
    torch.testing.assert_close(encoded["z"].scale, torch.full((2,), (36 + 0.25) ** 0.5), rtol=0.12, atol=0)
    with pytest.raises(ValueError, match=r"one latent site for each datum, got \['top', 'z'\]"):
        encode(chain_guide, x)


def test_encode_where_q_has_no_closed_form():
    def guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(x, 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, dist.transforms.AffineTransform(1.0, 2.0)))

    encoding = encode(guide, torch.zeros(3, 2), num_samples=1000)
    torch.testing.assert_close(encoding.scale, torch.full((3, 2), 2.0), rtol=0.1, atol=0)
    assert torch.equal(encoding.mean, encoding.draws.mean(0))
    assert (encoding.mean - 1).abs().max() < 5 * 2 / 1000**0.5


def test_decode_draws_the_sites_left_out():
    top, z = torch.tensor([3.0, -3.0]), torch.tensor([0.5, 0.25])
    torch.testing.assert_close(decode(chain_model, {"top": top, "z": z}), z)
    means = decode(chain_model, {"top": top.repeat_interleave(2000)}).reshape(2, 2000)  # z ~ N(top, 0.5^2)
    torch.testing.assert_close(means.mean(1), top, rtol=0, atol=5 * 0.5 / 2000**0.5)
    torch.testing.assert_close(means.std(1), torch.full((2,), 0.5), rtol=0.1, atol=0)


def test_reconstruct_averages_over_the_posterior(model, x):
    guide = exact_guide(model)
    exact = (model.posterior(x).mean @ model.weight.T + model.mean).detach()
    covariance = model.posterior(x).covariance_matrix[0]
    spread = (model.weight @ covariance @ model.weight.T).diagonal().sqrt().detach()
    one, many = reconstruct(model, guide, x), reconstruct(model, guide, x, num_samples=400)
    assert ((one - exact) / spread).std().item() == pytest.approx(1, abs=0.4)
    assert ((many - exact) / spread * 400**0.5).abs().max() < 5
    assert torch.equal(denoise(model, guide, x), one)


def test_denoise_takes_what_the_likelihood_does_not():
    model = VAE((4,), latent_dim=2)
    cleaned = denoise(model, AmortizedGuide(model), torch.full((3, 4), -0.3), num_samples=2)
    assert cleaned.shape == (3, 4) and bool(((cleaned > 0) & (cleaned < 1)).all())


def test_interpolate_is_a_straight_line_for_a_linear_model(model, guide, x):
    path = interpolate(model, guide, x[0], x[1], steps=5)
    ends = decode(model, guide.posterior(x[:2]).mean.detach())
    torch.testing.assert_close(path[[0, -1]], ends)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
    torch.testing.assert_close(path, (1 - t) * ends[0] + t * ends[1])
    assert interpolate(chain_model, chain_guide, torch.tensor(0.0), torch.tensor(1.0)).shape == (9,)


def test_scores_of_the_exact_posterior_are_the_evidence(model, x):
    exact = model.log_evidence(x).detach()
    torch.testing.assert_close(scores(model, exact_guide(model), x, num_samples=3).log_prob, exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "predict",
    [
        lambda model, guide, x, seed: sample(model, 3, seed=seed),
        lambda model, guide, x, seed: encode(guide, x, num_samples=2, seed=seed).draws,
        lambda model, guide, x, seed: reconstruct(model, guide, x, seed=seed),
        lambda model, guide, x, seed: scores(model, guide, x, num_samples=2, seed=seed).log_prob,
        lambda model, guide, x, seed: torch.as_tensor(
            to_arviz(model, guide, x, num_samples=2, seed=seed)["posterior_predictive"]["x"].values
        ),
    ],
    ids=["sample", "encode", "reconstruct", "scores", "to_arviz"],
)
def test_the_seed_decides_and_nothing_else_changes(predict, model, guide, x):
    pyro.clear_param_store()
    model.train()
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    first, second, other = (predict(model, guide, x, seed) for seed in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not list(pyro.get_param_store().keys())
    assert model.training and guide.training and not first.requires_grad


def test_batches_are_joined_in_order(monkeypatch, model, guide, x):
    z = torch.arange(2.0 * N, dtype=torch.float64).reshape(N, K)
    whole = decode(model, z), encode(guide, x).mean
    monkeypatch.setattr(prediction, "MAX_ELEMENTS", 5 * D)
    torch.testing.assert_close(decode(model, z), whole[0])
    torch.testing.assert_close(encode(guide, x).mean, whole[1])
    assert encode(guide, x, num_samples=3).draws.shape == (3, N, K)
    assert sample(model, N).shape == reconstruct(model, guide, x).shape == (N, D)
    inference = to_arviz(model, guide, x, num_samples=3)
    assert inference["posterior"]["z"].shape == (1, 3, N, K)
    assert torch.equal(torch.as_tensor(inference["observed_data"]["x"].values), x)


def test_plain_functions_see_the_parameter_store():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    with pyro.get_param_store().scope():
        pyro.param("shift", torch.full((3,), 10.0))
        assert torch.equal(decode(shifted_model, torch.zeros(2, 3)), torch.full((2, 3), 10.0))
        assert (sample(shifted_model, 500).mean(0) - 10).abs().max() < 1
        encoding = encode(shifted_guide, x)
        torch.testing.assert_close(encoding.mean, 0.4 * (x - 10))
        torch.testing.assert_close(encoding.scale, torch.full((6, 3), 0.2**0.5))
        exact = dist.Normal(10.0, 5**0.5).log_prob(x).sum(1).double()
        torch.testing.assert_close(scores(shifted_model, shifted_guide, x).log_prob, exact, rtol=1e-5, atol=0)
        assert list(pyro.get_param_store().keys()) == ["shift"]


def test_a_plate_inside_the_datum():
    z = torch.tensor([1.0, 2.0])
    assert torch.equal(decode(nested_model, z), z[:, None] * torch.arange(4.0))
    assert sample(nested_model, 3).shape == (3, 4)


def test_a_split_is_data():
    digits = load_dataset("digits", binarize="dynamic")
    model = VAE(digits.event_shape, latent_dim=2)
    assert reconstruct(model, AmortizedGuide(model), digits.test).shape == (len(digits.test), 1, 8, 8)


def test_to_arviz(model, x):
    inference = to_arviz(model, exact_guide(model), x, num_samples=300)
    sizes = {"chain": 1, "draw": 300, "datum": N}
    assert set(getattr(inference, "children", None) or inference.groups()) == GROUPS
    for group in ("prior", "posterior"):
        assert dict(inference[group].sizes) == {**sizes, "z_dim_0": K}
    for group in ("prior_predictive", "posterior_predictive"):
        assert dict(inference[group].sizes) == {**sizes, "x_dim_0": D}
    assert inference["log_likelihood"]["x"].dims == ("chain", "draw", "datum")
    assert inference["observed_data"]["x"].dims == ("datum", "x_dim_0")

    def tensor(group: str, name: str) -> torch.Tensor:
        return torch.as_tensor(inference[group][name].values)

    assert torch.equal(tensor("observed_data", "x"), x)
    z = tensor("posterior", "z")[0]
    posterior = model.posterior(x)
    assert ((z.mean(0) - posterior.mean) / posterior.stddev * 300**0.5).abs().max() < 5
    torch.testing.assert_close(tensor("log_likelihood", "x")[0], model.observation(z).log_prob(x).detach())
    assert (tensor("prior", "z").mean() * (300 * N * K) ** 0.5).abs() < 5
    assert (tensor("prior_predictive", "x").mean((0, 1, 2)) - model.mean).abs().max() < 0.2
    noise = tensor("posterior_predictive", "x")[0] - (z @ model.weight.T + model.mean)
    assert noise.square().mean().item() == pytest.approx(model.variance.item(), rel=0.07)


def test_run_methods_delegate(tmp_path, model, guide, x):
    run = Run(model, guide, tmp_path, {"data": {"name_or_path": "digits", "binarize": "static"}})
    assert torch.equal(run.sample(3, seed=2), sample(model, 3, seed=2))
    assert torch.equal(run.encode(x).mean, encode(guide, x).mean)
    assert torch.equal(run.decode(torch.zeros(1, K)), decode(model, torch.zeros(1, K)))
    assert torch.equal(run.reconstruct(x, num_samples=2), reconstruct(model, guide, x, num_samples=2))
    assert torch.equal(run.denoise(x), denoise(model, guide, x))
    assert torch.equal(run.interpolate(x[0], x[1], steps=3), interpolate(model, guide, x[0], x[1], steps=3))
    assert torch.equal(run.scores(x, num_samples=2).log_prob, scores(model, guide, x, num_samples=2).log_prob)
    evaluation = run.evaluate(x, num_samples=2, progress=False)
    assert torch.equal(evaluation.per_datum["log_evidence"], run.scores(x, num_samples=2).log_prob)
    assert run.to_arviz(x, num_samples=2)["posterior"]["z"].shape == (1, 2, N, K)
    assert torch.equal(run.dataset().test.x, load_dataset("digits", binarize="static").test.x)
    with pytest.raises(ValueError, match="expected a data set's name"):
        Run(model, guide, tmp_path, {}).dataset()


def test_a_run_looks_at_what_it_is_given(tmp_path):
    """Tensors of another width, or values that have no density, are refused; values too far away to score are told."""
    model = VAE((3,), latent_dim=2)
    run = fit(model, AmortizedGuide(model), torch.ones(20, 3), epochs=1, out=tmp_path / "run", progress=False)
    for method in (run.evaluate, run.scores, run.encode, run.reconstruct):
        for wrong in (torch.ones(5, 4), torch.ones(3), np.ones((5, 2)), (torch.ones(5, 1, 3),)):
            with pytest.raises(ValueError, match=r"expected data of shape \(N, 3\), as in the training, got \("):
                method(wrong)
        with pytest.raises(ValueError, match="in the support of its Bernoulli likelihood, Boolean, got values from 7"):
            method(7 * torch.ones(5, 3))
    normal = VAE((3,), latent_dim=2, likelihood=likelihoods.Normal())
    for call in (evaluate, scores):
        with pytest.warns(UserWarning, match="1 of 5 data have no finite score, as they are far"):
            call(normal, AmortizedGuide(normal), torch.eye(5, 3) * torch.tensor([1e25, 1.0, 1.0]), num_samples=3)


def unobserved(*, num_data):
    with pyro.plate("data", num_data):
        return pyro.sample("y", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, g, x: sample(m, 0), "num_samples to be a positive whole number, got 0"),
        (lambda m, g, x: reconstruct(m, g, x, num_samples=0), "num_samples to be a positive whole number, got 0"),
        (lambda m, g, x: encode(g, x, num_samples=0), "num_samples to be a positive whole number, got 0"),
        (lambda m, g, x: to_arviz(m, g, x, num_samples=0), "num_samples to be a positive whole number, got 0"),
        (lambda m, g, x: sample(m, 1.5), "num_samples to be a positive whole number, got 1.5"),
        (lambda m, g, x: evaluate(m, g, x, num_samples="3"), "num_samples to be a positive whole number, got '3'"),
        (lambda m, g, x: scores(m, g, x, num_samples=None), "num_samples to be a positive whole number, got None"),
        (lambda m, g, x: decode(m, [[1.0, 2.0]]), "expected a tensor or an array, got a list: torch.as_tensor"),
        (lambda m, g, x: evaluate(m, g, x / 0.0), 'expected finite values of site "x", got .* infinite'),
        (lambda m, g, x: reconstruct(m, g, x / 0.0), 'expected finite values of site "x", got .* infinite'),
        (lambda m, g, x: reconstruct(m, g, x * math.nan), 'expected finite values of site "x", got .* NaN'),
        (lambda m, g, x: interpolate(m, g, x[0], x[1], steps=1), "steps >= 2"),
        (lambda m, g, x: interpolate(m, g, x[0], x[:1]), r"one shape, got \(5,\) and \(1, 5\)"),
        (lambda m, g, x: sample(unobserved, 2), r"""site "x", got the sites \['y'\]: name it so"""),
        (lambda m, g, x: decode(m, x), r"""shape \('N', 2\), got \(12, 5\)"""),
        (lambda m, g, x: decode(m, {"w": x}), r"sites \['z'\], got \['w'\]"),
        (lambda m, g, x: decode(chain_model, x[:, 0]), r"\['top', 'z'\], got one tensor"),
    ],
)
def test_errors_say_what_was_expected(call, message, model, guide, x):
    with pytest.raises(ValueError, match=message):
        call(model, guide, x)


@pytest.mark.parametrize("parallel", [True, False])
def test_pyros_own_predictive(parallel, model, guide, x):
    prior = Predictive(model, num_samples=4, parallel=parallel)(num_data=6)
    assert prior["z"].shape == (4, 6, K) and prior["x"].shape == (4, 6, D)
    posterior = Predictive(guide, num_samples=4, parallel=parallel)(x)
    assert posterior["z"].shape == (4, N, K)
    sites = ("z", "x")
    joint = Predictive(model, guide=guide, num_samples=4, parallel=parallel, return_sites=sites)(x)
    assert joint["z"].shape == (4, N, K)
    assert torch.equal(joint["x"], x.expand(4, N, D))  # observed
    predictive = Predictive(model, posterior_samples=posterior, parallel=parallel)(num_data=N)
    assert predictive["x"].shape == (4, N, D)
    noise = predictive["x"][0] - decode(model, posterior["z"][0].detach())
    assert noise.std().item() == pytest.approx(model.variance.sqrt().item(), rel=0.4)
