"""Priors and likelihoods against closed forms, SciPy and scikit-learn."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import DISCRETE, FAMILIES, FLOWS, PRIORS, two_levels
from pyro import poutine
from scipy import stats
from sklearn.mixture import GaussianMixture as Mixture
from test_flows import bound
from test_guide import assert_mean_weight_is, log_weights, shaken, widened
from torch import nn

from pyro_vae import CompiledSVI, evaluate, fit, load_run
from pyro_vae.distributions import WithMissing
from pyro_vae.guides import AmortizedGuide, families
from pyro_vae.models import VAE, ConditionalVAE, LinearVAE, likelihoods, priors
from pyro_vae.nn import MLP

ENCODER = MLP((8,), activation="tanh")
x_real, x_count = (torch.tensor([[0.3, -1.2, 2.0]]), torch.tensor([[0.0, 3.0, 7.0]]))

DISTRIBUTIONS = [name for name in PRIORS if name not in ("Hierarchical", "function")]  # these have sites


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_have_a_density_that_moves_and_is_saved(name):
    torch.manual_seed(0)
    prior = PRIORS[name]()
    p = prior()
    assert isinstance(p, torch.distributions.Distribution) and p.batch_shape == ()
    z = p.sample((7,))
    assert p.log_prob(z).shape == (7,) and bool(p.support.check(z).all())
    other = copy.deepcopy(prior).double()
    torch.testing.assert_close(other().log_prob(z.double()), p.log_prob(z).double(), rtol=1e-4, atol=1e-4)
    assert other().sample().dtype is torch.float64
    again = PRIORS[name]()
    again.load_state_dict(prior.state_dict())
    assert torch.equal(again().log_prob(z), prior().log_prob(z))


def test_parameters_are_learned_or_fixed():
    for make in (priors.Laplace, priors.Gamma, priors.Dirichlet, priors.Categorical):
        assert not list(make(3).parameters()) and list(make(3, learned=True).parameters())


def test_gaussian_mixture_fitted_to_draws_is_scikit_learns():
    torch.manual_seed(0)
    z = torch.randn(300, 2, dtype=torch.float64) + 4 * torch.randint(0, 3, (300, 1))
    for covariance, theirs in (("diagonal", "diag"), ("full", "full")):
        fitted = priors.GaussianMixture.fitted(z, 3, covariance, seed=1)
        score = Mixture(3, covariance_type=theirs, random_state=1).fit(z.numpy()).score(z.numpy())
        assert float(fitted().log_prob(z).mean().detach()) == pytest.approx(score, abs=1e-9)
    model = VAE((4,), latent_dim=2)
    after = VAE((4,), prior=priors.GaussianMixture.fitted(z.float(), 3), decoder=model.decoder)
    assert after.decoder is model.decoder and after(num_data=3).shape == (3, 4)


def test_vamp_prior_is_the_mixture_of_the_guides_posteriors(recorded, tmp_path):
    torch.manual_seed(0)
    prior = priors.VampPrior((4,), 2, MLP((8,)), families.DiagonalNormal(), components=5)
    model = VAE((4,), prior=prior, decoder=MLP((8,)))
    guide = AmortizedGuide(model, encoder=prior.encoder, family=prior.family)
    z = torch.randn(6, 2)
    q = guide.posterior(prior.inputs)
    expected = (q.log_prob(z[:, None]) - torch.tensor(5.0).log()).logsumexp(-1)
    torch.testing.assert_close(prior().log_prob(z), expected)

    shared = {id(p) for p in prior.parameters()} & {id(p) for p in guide.parameters()}
    assert len(shared) == len(list(guide.parameters()))
    x = torch.rand(20, 4).round()
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), pyro.infer.Trace_ELBO())
    svi.step(x)
    assert len(svi.parameters) == len({id(p) for m in (model, guide) for p in m.parameters()})
    prior.initialize(x)
    assert {tuple(u) for u in prior.inputs.tolist()} <= {tuple(row) for row in x.tolist()}
    prior.initialize(x.where(x > 0, torch.nan))
    assert bool(prior.inputs.isfinite().all())
    with pytest.raises(ValueError, match="expected at least 5 data, one for each component, got 4"):
        prior.initialize(x[:4])

    run = fit(model, guide, x, epochs=2, batch_size=10, out=tmp_path / "run", progress=False)
    loaded = load_run(run.path)
    assert loaded.guide.encoder is loaded.model.prior.encoder
    assert loaded.guide.heads["z"] is loaded.model.prior.family
    scores = [evaluate(r.model, r.guide, x, num_samples=5, progress=False).per_datum["elbo"] for r in (run, loaded)]
    assert torch.equal(*scores)


@pytest.mark.parametrize("name", FLOWS)
def test_flow_prior_scores_its_draws(name):
    """By one pass of the forward direction; the draw came from the inverse."""
    torch.manual_seed(0)
    family = bound(name, dim=3, features=0)
    p = family.inverse()
    noise, z = ((torch.manual_seed(1), each.sample((6,)))[1] for each in (family.base(torch.empty(0)), p))
    by_hand, log_p = z, torch.zeros(6, dtype=torch.float64)
    for f in family.chain(torch.empty(0)):
        by_hand, ladj = f.call_and_ladj(by_hand)
        log_p = log_p + ladj
    torch.testing.assert_close(by_hand, noise, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(p.log_prob(z), log_p + family.base(torch.empty(0)).log_prob(by_hand))


def test_hierarchical_prior_is_read_from_the_top():
    torch.manual_seed(0)
    model = VAE((4,), prior=priors.Hierarchical((5, 3, 2)))
    trace = poutine.trace(model).get_trace(num_data=6)
    shapes = {name: tuple(trace.nodes[name]["value"].shape) for name in ("z_3", "z_2", "z_1")}
    assert shapes == {"z_3": (6, 2), "z_2": (6, 3), "z_1": (6, 5)}
    assert list(AmortizedGuide(model).heads) == ["z_3", "z_2", "z_1"]
    with pytest.raises(ValueError, match="expected two or more latent_dims"):
        priors.Hierarchical((5,))


def test_a_function_with_several_sites_is_a_prior(tmp_path):
    torch.manual_seed(0)
    model = VAE((4,), prior=two_levels)
    guide = AmortizedGuide(model)
    assert list(guide.heads) == ["top", "z"]
    x = torch.rand(20, 4).round()
    run = fit(model, guide, x, epochs=2, batch_size=10, out=tmp_path / "run", progress=False)
    scores = [evaluate(r.model, r.guide, x, num_samples=5, progress=False) for r in (run, load_run(run.path))]
    assert torch.equal(*(score.per_datum["elbo"] for score in scores))


LIKELIHOODS = {
    "Laplace": (
        likelihoods.Laplace(),
        x_real,
        lambda m: stats.laplace(m[0, 0], 1.0).logpdf(x_real),
    ),
    "StudentT": (
        likelihoods.StudentT(),
        x_real,
        lambda m: stats.t(1 + torch.e, m[0, 0], 1.0).logpdf(x_real),
    ),
    "Poisson": (likelihoods.Poisson(), x_count, lambda m: stats.poisson(m[0, 0].exp()).logpmf(x_count)),
    "NegativeBinomial": (
        likelihoods.NegativeBinomial(),
        x_count,
        lambda m: stats.nbinom(1, 1 / (1 + m[0, 0].exp())).logpmf(x_count),
    ),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihood_is_scipys(name):
    torch.manual_seed(0)
    likelihood, x, answer = LIKELIHOODS[name]
    parameters = torch.randn(1, 1, 3, dtype=torch.float64)
    p = likelihood.bind((3,)).double()(parameters)
    assert float(p.log_prob(x.double()).detach()) == pytest.approx(answer(parameters).sum(), rel=1e-9)


def test_the_fitting_likelihood_of_values_with_gaps():
    x = torch.tensor([[0.0, 1.0], [torch.nan, 1.0]])
    likelihood, reason = likelihoods.fitting(x)
    assert isinstance(likelihood, likelihoods.Missing) and isinstance(likelihood.likelihood, likelihoods.Bernoulli)
    assert reason == "some values are missing, and of the others every value is 0 or 1"


def test_categorical_likelihood_is_a_cross_entropy():
    torch.manual_seed(0)
    parameters, x = torch.randn(5, 4, 2, 3), torch.randint(0, 4, (5, 2, 3))
    p = likelihoods.Categorical(4).bind((2, 3))(parameters)
    expected = -nn.functional.cross_entropy(parameters, x, reduction="none").sum((1, 2))
    torch.testing.assert_close(p.log_prob(x), expected)
    assert p.sample().shape == (5, 2, 3)


def test_missing_values_are_marginalised():
    """A linear VAE with gaps: log p of the observed dimensions is that of the smaller Gaussian."""
    torch.manual_seed(0)
    linear = shaken(LinearVAE((4,), latent_dim=2), 0.3)
    model = VAE((4,), 2, likelihood=likelihoods.Missing(linear.likelihood), decoder=linear.decoder).double()
    x = torch.randn(1, 4, dtype=torch.float64)
    x[0, 1] = torch.nan
    there = [0, 2, 3]
    W, s2 = linear.weight[there], linear.variance
    covariance = W @ W.mT + s2 * torch.eye(3, dtype=torch.float64)
    exact = float(dist.MultivariateNormal(linear.mean[there], covariance).log_prob(x[0, there]).detach())
    guide = shaken(AmortizedGuide(model, ENCODER), 0.1)
    widened(guide.heads["z"])
    assert_mean_weight_is(exact, log_weights(model, guide, 200_000, x))


def test_covariates_shift_the_conditional_evidence(tmp_path):
    """x | y of a linear decoder: N(W_z 0 + W_y y + b, W_z W_z^T + s^2 I)."""
    torch.manual_seed(0)
    likelihood = likelihoods.Normal("shared", initial_scale=1.5)
    model = ConditionalVAE((3,), 2, latent_dim=2, likelihood=likelihood, decoder=MLP(()))
    x, y = torch.randn(1, 3), torch.randn(1, 2)
    guide = AmortizedGuide(model, ENCODER, encoder_inputs=model.beside, example=((x, y), {}))
    x, y = x.double(), y.double()
    shaken(model, 0.3), shaken(guide, 0.1)
    widened(guide.heads["z"])
    layer = model.decoder.network.output
    s2 = model.observation(torch.zeros(1, 2).double(), y).variance.diag_embed()
    W = layer.weight[:, :2]
    p = dist.MultivariateNormal(y @ layer.weight[:, 2:].mT + layer.bias, W @ W.mT + s2)
    assert_mean_weight_is(p.log_prob(x).item(), log_weights(model, guide, 200_000, x, y))

    with pytest.raises(ValueError, match=r"expected covariates y of shape \(B, 2\), got none"):
        model(x)
    with pytest.raises(ValueError, match=r"expected a prior over vectors, got one over \(2, 5\)"):
        ConditionalVAE((3,), 2, prior=priors.Categorical(5, codes=2))
    x, y = torch.randn(20, 3), torch.randn(20, 2)
    run = fit(model.float(), guide.float(), (x, y), epochs=2, batch_size=10, out=tmp_path / "run", progress=False)
    assert bool(run.evaluate((x, y), num_samples=5, progress=False).per_datum["elbo"].isfinite().all())


def test_missing_values_are_refused_where_nothing_takes_them(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(20, 4)
    x[3, 1] = torch.nan
    for likelihood, taken in ((likelihoods.Normal(), False), (likelihoods.Missing(likelihoods.Normal()), True)):
        model = VAE((4,), 2, likelihood=likelihood)
        guide = AmortizedGuide(model)
        if taken:
            fit(model, guide, x, epochs=1, batch_size=5, out=tmp_path / "run", progress=False)
            assert bool(evaluate(model, guide, x, num_samples=3, progress=False).per_datum["elbo"].isfinite().all())
        else:
            with pytest.raises(ValueError, match=r'expected finite values of site "x", got 1 NaN.*Missing'):
                fit(model, guide, x, epochs=1, batch_size=5, out=tmp_path / "not", progress=False)
    with pytest.raises(ValueError, match="expected finite data, got 1 NaN or infinite values"):
        x[0, 0] = torch.inf
        fit(model, guide, x, epochs=1, batch_size=5, out=tmp_path / "infinite", progress=False)


def test_what_is_no_prior_is_refused():
    with pytest.raises(ValueError, match=r"expected a prior for one datum, got one with batch shape \(3,\)"):
        VAE((4,), prior=dist.Normal(torch.zeros(3), 1.0))
    with pytest.raises(ValueError, match="expected covariance to be diagonal or full, got 'round'"):
        priors.GaussianMixture(2, covariance="round")
    with pytest.raises(ValueError, match="expected rate > 0, got 0"):
        priors.Gamma(2, rate=0)
    with pytest.raises(ValueError, match="expected a distribution that factorises over dimensions"):
        WithMissing(dist.MultivariateNormal(torch.zeros(3), torch.eye(3)))


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_vamp_prior_of_each_family_is_the_mean_over_its_inputs(family, latent_dim, float64):
    """``ln 1/K sum_k q(z | u_k)``, one pseudo-input after the other, for z of any batch shape; and its gradients."""
    torch.manual_seed(0)
    prior = priors.VampPrior((5,), latent_dim, MLP((7,)), family, components=3)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    for shape in ((4,), (2, 4), ()):
        z = torch.randn(*shape, latent_dim, requires_grad=True)
        each = [prior.family(prior.encoder(prior.inputs[k])).log_prob(z) for k in range(3)]
        exact = torch.stack(each).logsumexp(0) - math.log(3)
        found = prior().log_prob(z)
        torch.testing.assert_close(found, exact)
        wanted = [z, *(p for p in prior.parameters() if p.requires_grad)]
        gradients = (torch.autograd.grad(value.sum(), wanted, allow_unused=True) for value in (found, exact))
        for a, b in zip(*gradients, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
    assert prior().sample((4,)).shape == (4, latent_dim)


@pytest.mark.parametrize("name", [*FAMILIES, *DISCRETE])
def test_values_and_features_of_families_broadcast(name, float64):
    """z (B, 1, D) against features (K, h), z (D,) against (K, h), and (B, K, D) against (h,)."""
    torch.manual_seed(0)
    bound = (FAMILIES | DISCRETE)[name].bind(5, (3,))
    h = torch.randn(4, 5)
    for shape, features in (((6, 1), h), ((), h), ((6, 4), h[0])):
        z = torch.eye(3)[torch.randint(3, shape)] if name in DISCRETE else torch.randn(*shape, 3)
        wide = torch.broadcast_shapes(shape, features.shape[:-1])
        exact = bound(features.expand(*wide, 5)).log_prob(z.expand(*wide, 3))
        torch.testing.assert_close(bound(features).log_prob(z), exact)
