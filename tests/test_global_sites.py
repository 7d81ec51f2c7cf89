"""Models with latent sites that all data share, against quadrature and closed forms."""

import contextlib
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import nn

from pyro_vae import annealing, evaluate, evaluation, fit, load_dataset, load_run, prediction
from pyro_vae.cli import main
from pyro_vae.guides import AmortizedGuide, families
from pyro_vae.models import BayesianVAE
from pyro_vae.prediction import encode, encodings, reconstruct, scores, to_arviz

pytestmark = pytest.mark.usefixtures("float64")

EFFECTS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
ERRORS = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)
SCHOOLS = torch.stack([EFFECTS, ERRORS], 1)


def schools(data=None, num_data=None):
    """mu ~ N(0, 10^2), tau ~ C+(0, 5), theta_i ~ N(mu, tau^2), x_i ~ N(theta_i, sd_i^2), in a plate of their own."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", num_data if data is None else len(data)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        sd = 10.0 if data is None else data[:, 1]
        return pyro.sample("x", dist.Normal(theta, sd), obs=None if data is None else data[:, 0])


class Grid:
    """mu and ln tau on a grid; theta is integrated out in closed form."""

    def __init__(self):
        mu, log_tau = torch.linspace(-60, 60, 1201)[:, None], torch.linspace(-12, 8, 2001)
        self.mu, self.tau = mu, log_tau.exp()
        log_p = dist.Normal(0.0, 10.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(self.tau) + log_tau
        for x, sd in SCHOOLS:
            log_p = log_p + self.density(x, sd)
        self.log_evidence = (log_p.flatten().logsumexp(0) + math.log(0.1 * 0.01)).item()
        self.weights = log_p.flatten().softmax(0).view(log_p.shape)
        self.mean_mu, self.mean_log_tau = (float((self.weights * v).sum()) for v in (mu, log_tau))
        self.sd_mu = float((self.weights * (mu - self.mean_mu) ** 2).sum() ** 0.5)
        self.sd_log_tau = float((self.weights * (log_tau - self.mean_log_tau) ** 2).sum() ** 0.5)

    def density(self, x, sd):
        return dist.Normal(self.mu, (self.tau**2 + sd**2).sqrt()).log_prob(x)


@pytest.fixture(scope="module")
def grid():
    torch.set_default_dtype(torch.float64)
    try:
        return Grid()
    finally:
        torch.set_default_dtype(torch.float32)


def guide_of(grid):
    """Heavy-tailed over the globals, and the exact p(theta_i | mu, tau, x_i)."""

    def guide(data):
        mu = pyro.sample("mu", dist.StudentT(5.0, grid.mean_mu, 1.2 * grid.sd_mu))
        tau = pyro.sample("tau", dist.LogNormal(grid.mean_log_tau, 1.3 * grid.sd_log_tau))
        precision = 1 / tau**2 + 1 / data[:, 1] ** 2
        mean = (mu / tau**2 + data[:, 0] / data[:, 1] ** 2) / precision
        with pyro.plate("schools", len(data)):
            pyro.sample("theta", dist.Normal(mean, precision**-0.5))

    return guide


def test_eight_schools_against_quadrature(grid):
    found = evaluate(schools, guide_of(grid), SCHOOLS, num_samples=2000, progress=False)
    error = found.log_evidence_total.standard_error_draws
    assert float(found.log_evidence_total) == pytest.approx(grid.log_evidence, abs=5 * error) and error < 0.02
    assert float(found.log_evidence) == pytest.approx(float(found.log_evidence_total) / 8, rel=1e-12)
    assert float(found.elbo) < float(found.log_evidence) and found.global_sites == ("mu", "tau")
    assert found.ess.value > 1000 and found.khat.value < 0.5 and found.kl_per_dim is None
    assert float(found.elbo) == pytest.approx(float(found.per_datum["elbo"].mean()), rel=1e-12)
    q_mu, q_tau = (
        dist.StudentT(5.0, grid.mean_mu, 1.2 * grid.sd_mu).log_prob(grid.mu),
        dist.LogNormal(grid.mean_log_tau, 1.3 * grid.sd_log_tau).log_prob(grid.tau) + grid.tau.log(),
    )
    q = (q_mu + q_tau).flatten().softmax(0).view(grid.weights.shape)
    for i, (x, sd) in enumerate(SCHOOLS):  # the draws of theta are of q, not of p(theta | x)
        predictive = (q * grid.density(x, sd).exp()).sum().log()
        assert float(found.per_datum["log_predictive"][i]) == pytest.approx(float(predictive), abs=0.05)
    assert torch.equal(
        scores(schools, guide_of(grid), SCHOOLS, num_samples=50).log_prob,
        evaluate(schools, guide_of(grid), SCHOOLS, num_samples=50, progress=False).per_datum["log_predictive"],
    )
    text = str(found)
    assert "log_evidence_total" in text and "log_predictive" in text and "global sites mu, tau" in text


def test_batches_share_the_draws_of_globals(grid, monkeypatch):
    whole = evaluate(schools, guide_of(grid), SCHOOLS, num_samples=400, progress=False)
    monkeypatch.setattr(evaluation, "MAX_ELEMENTS", 20 * 1_000 * 3)  # of three schools in a call
    parts = evaluate(schools, guide_of(grid), SCHOOLS, num_samples=400, progress=False)
    noise = 5 * whole.log_evidence_total.standard_error_draws
    assert float(parts.log_evidence_total) == pytest.approx(float(whole.log_evidence_total), abs=noise)
    # p(theta_i | mu, tau, x_i) is exact, so that the evidence given the globals has no noise but theirs
    assert parts.ess.value > 200


X = torch.randn(12, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
NEW = torch.randn(5, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(x), dim=-1):
        return pyro.sample("x", dist.Normal((x * w).sum(-1), 0.5), obs=y)


def posterior_of(x, y):
    precision = torch.eye(2) + x.T @ x / 0.25
    return dist.MultivariateNormal(torch.linalg.solve(precision, x.T @ y / 0.25), precision_matrix=precision)


def test_regression_has_closed_forms():
    """With the exact q(w) every draw's weight is ln p(y), and new rows have a Gaussian predictive density."""
    q = posterior_of(X, Y)

    def guide(x, y=None):
        pyro.sample("w", q)

    exact = dist.MultivariateNormal(torch.zeros(12), 0.25 * torch.eye(12) + X @ X.T).log_prob(Y)
    found = evaluate(regression, guide, (X, Y), num_samples=30, progress=False)
    assert float(found.log_evidence_total) == pytest.approx(float(exact), abs=1e-9)
    assert float(found.elbo) == pytest.approx(float(exact) / 12, abs=1e-10)
    assert float(found.kl) * 12 == pytest.approx(
        float(torch.distributions.kl_divergence(q, dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))), abs=1.5
    )
    fresh = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0])
    found = evaluate(regression, guide, (NEW, fresh), num_samples=20_000, progress=False)
    variance = 0.25 + ((NEW @ q.covariance_matrix) * NEW).sum(-1)
    predictive = dist.Normal(NEW @ q.loc, variance.sqrt()).log_prob(fresh)
    torch.testing.assert_close(found.per_datum["log_predictive"], predictive, atol=0.03, rtol=0)
    assert float(found.log_predictive) == pytest.approx(float(predictive.mean()), abs=0.02)


def test_without_globals_both_names_are_the_evidence():
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    exact = dist.Normal(0.0, 2**0.5).log_prob(Y).mean()
    found = evaluate(model, guide, Y, num_samples=5, progress=False)
    assert float(found.log_evidence) == pytest.approx(float(exact), abs=1e-12) and found.global_sites == ()
    assert found.log_predictive == found.log_evidence
    assert float(found.log_evidence_total) == pytest.approx(12 * float(exact), abs=1e-10)
    estimate = annealing.annealed(
        model, Y, num_temperatures=20, leapfrog_steps=3, progress=False
    )  # a plate of any name
    assert float(estimate) == pytest.approx(float(exact), abs=0.1)


def test_draws_for_arviz(grid, monkeypatch):
    """Globals have no dimension of data, and each of their draws is one for all data, in whatever batches."""

    def guide(data):
        mu = pyro.sample("mu", dist.Normal(3.0, 2.0))
        pyro.sample("tau", dist.LogNormal(0.0, 0.1))
        with pyro.plate("schools", len(data)):
            pyro.sample("theta", dist.Normal(mu, 1e-9))

    monkeypatch.setattr(prediction, "MAX_ELEMENTS", 6)  # three schools in a batch
    found = to_arviz(schools, guide, SCHOOLS, num_samples=7)
    assert dict(found["posterior"].sizes) == {"chain": 1, "draw": 7, "datum": 8}
    assert found["posterior"]["mu"].dims == ("chain", "draw")
    assert found["posterior"]["theta"].dims == found["log_likelihood"]["x"].dims == ("chain", "draw", "datum")
    theta, mu = (torch.tensor(found["posterior"][name].values) for name in ("theta", "mu"))
    torch.testing.assert_close(theta, mu[..., None].expand_as(theta), atol=1e-7, rtol=0)
    assert len({round(float(v), 6) for v in mu.flatten()}) == 7
    log_p = dist.Normal(theta, ERRORS).log_prob(EFFECTS)
    torch.testing.assert_close(torch.tensor(found["log_likelihood"]["x"].values), log_p)
    assert found["prior"]["mu"].shape == (1, 7) and found["prior_predictive"]["x"].shape == (1, 7, 8)
    found = to_arviz(regression, lambda x, y=None: pyro.sample("w", posterior_of(X, Y)), (X, Y), num_samples=4)
    assert found["posterior"]["w"].dims == ("chain", "draw", "w_dim_0") and "x" in found["prior_predictive"]


def test_codes(grid):
    encoding = encode(guide_of(grid), SCHOOLS, num_samples=50)
    assert encoding.mean.shape == (8,) and encoding.draws.shape == (50, 8)
    every = encodings(guide_of(grid), SCHOOLS, num_samples=50)
    assert every["mu"].mean.shape == () and every["tau"].draws.shape == (50,) and every["mu"].is_global
    assert float(every["mu"].mean) == pytest.approx(grid.mean_mu)
    with pytest.raises(ValueError, match=r"one latent site for each datum, got \[\]: call encodings"):
        encode(lambda x, y=None: pyro.sample("w", posterior_of(X, Y)), (X, Y))
    assert reconstruct(schools, guide_of(grid), SCHOOLS, num_samples=3).shape == (8,)


class Topics(PyroModule):
    """Words of documents: topics that all share, and each document's shares of them."""

    def __init__(self):
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        with pyro.plate("topics", 3):
            words = pyro.sample("words", dist.Dirichlet(torch.full((9,), 0.3)))
        with pyro.plate("documents", len(x)):
            share = pyro.sample("share", dist.Dirichlet(self.strength.exp() * torch.ones(3)))
            return pyro.sample("x", dist.Multinomial(30, share @ words), obs=x)


def test_a_topic_model(tmp_path):
    """Global topics in a plate of their own, 8 documents, `fit`'s own batch size, and every score."""
    x = torch.distributions.Multinomial(30, torch.rand(8, 9)).sample()
    model = Topics()
    family = {"words": families.DiagonalNormal(initial_scale=0.1)}
    guide = AmortizedGuide(model, nn.Linear(9, 8), family, example=((x,), {}))
    run = fit(model, guide, x, epochs=60, out=tmp_path / "run", progress=False)
    assert run.history[-1]["bound"] > run.history[0]["bound"] and run.history[-1]["steps"] == 60
    found = run.evaluate(x, num_samples=100, progress=False)
    assert found.global_sites == ("words",) and math.isfinite(float(found.log_evidence_total))
    assert float(found.elbo) < float(found.log_evidence)
    assert run.scores(x, num_samples=10).log_prob.shape == (8,)
    assert run.encode(x).mean.shape == (8, 3)
    assert run.to_arviz(x, num_samples=5)["posterior"]["words"].shape == (1, 5, 3, 9)


def test_a_bayesian_vae_is_scored():
    """Its batch stands for all data in training; here the data are all there are."""
    model = BayesianVAE((4,), size=50, latent_dim=2).double()
    guide = AmortizedGuide(model, family={"w": families.DiagonalNormal(initial_scale=0.05)}).double()
    x = torch.rand(9, 4).round()
    found = evaluate(model, guide, x, num_samples=20, progress=False)
    assert found.global_sites == ("w",) and float(found.elbo) < float(found.log_evidence) < 0
    with torch.no_grad():
        kl = torch.distributions.kl_divergence(
            guide.heads["w"](torch.empty(0)), dist.Normal(0 * model.weight_scale, model.weight_scale).to_event(1)
        )
    assert float(found.kl) > float(kl) / 9 * 0.5


def test_what_has_no_such_scores_is_refused(grid):
    def late(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("after", dist.Normal(z.sum(), 1.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("after", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match='the global site "after" before the sites of the plate "data"'):
        evaluate(late, guide, Y, num_samples=3, progress=False)
    with pytest.raises(ValueError, match="local latent sites alone beside annealing"):
        evaluate(schools, guide_of(grid), SCHOOLS, annealing=5, progress=False)

    def unplated(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[0], 1.0).expand([len(x)]).to_event(1), obs=x)

    with pytest.raises(
        ValueError, match="expected a plate of the 12 data of a call around all that is observed, got the plates"
    ):
        evaluate(unplated, lambda x: pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1)), Y, progress=False)
    with pytest.raises(ValueError, match=r"AmortizedGuide\(model, example=\(\(x,\), \{\}\)\)"):
        AmortizedGuide(schools)


def test_a_global_guide_that_reads_the_rows_of_a_call_is_refused(monkeypatch):
    """theta ~ N(0, 1), x_i ~ N(theta, 1), q(theta) the posterior given the rows of its call: right in one call."""

    def model(x):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    def guide(x):
        pyro.sample("theta", dist.Normal(x.sum() / (len(x) + 1), (len(x) + 1) ** -0.5))

    exact = dist.MultivariateNormal(torch.zeros(12), torch.eye(12) + 1).log_prob(Y)
    found = evaluate(model, guide, Y, num_samples=4, progress=False)
    assert float(found.log_evidence_total) == pytest.approx(float(exact), abs=1e-9)
    monkeypatch.setattr(evaluation, "MAX_ELEMENTS", 2 * 1_000 * 5)  # of five data in a call
    with pytest.raises(ValueError, match='q of the global site "theta" to depend on no data, or all data in one call'):
        evaluate(model, guide, Y, num_samples=4, progress=False)


def test_batches_of_shared_sites_are_refused_with_and_without_a_plate(tmp_path):
    def plated(x):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(()), 0.1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    def unplated(x):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(()), 0.1))
        pyro.sample("x", dist.Normal(theta, 1.0).expand([len(x)]).to_event(1), obs=x)

    def guide(x):
        pyro.sample("theta", dist.Normal(pyro.param("location", torch.zeros(())), 0.1))

    settings = {"epochs": 1, "out": tmp_path / "run", "progress": False}
    for model in (plated, unplated):
        with pytest.raises(ValueError, match=r"a plate that stands for all 12 data, as the latent sites \['theta'\]"):
            fit(model, guide, Y, batch_size=5, **settings)
        fit(model, guide, Y, **settings, overwrite=True)


def slopes(x=None, num_data=None):
    """w ~ N(0, 10^2) and v of all data, z_i ~ N(0, 1), x_i ~ N(w z_i + v, 0.1^2)."""
    w = pyro.sample("w", dist.Normal(torch.zeros(()), 10.0))
    v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", num_data if x is None else len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        return pyro.sample("x", dist.Normal(w * z[:, None] + v, 0.1).to_event(1), obs=x)


def guide_of_slopes(x):
    pyro.sample("w", dist.Normal(torch.tensor(3.0), 0.5))
    pyro.sample("v", dist.Normal(torch.tensor([1.0, -1.0]), 0.5).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, 0], 0.1))


def test_what_is_decoded_has_the_globals_of_the_guide(monkeypatch):
    """E[x | z] = w z + v; nothing is drawn from a prior that knows no data."""
    v = torch.tensor([1.0, -1.0])
    z = torch.tensor([0.0, 1.0, 2.0])
    given = {"w": torch.tensor(3.0), "v": v}
    torch.testing.assert_close(prediction.decode(slopes, {"z": z, **given}), 3 * z[:, None] + v)
    ends = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    line = prediction.interpolate(slopes, guide_of_slopes, *ends, steps=3)
    torch.testing.assert_close(line, 3 * z[:, None] + v)
    for missing in ({"z": z}, {"z": z, "v": v}, z):
        with pytest.raises(ValueError, match=r"values of the global sites \[.*global_values\(guide, data\)"):
            prediction.decode(slopes, missing)
    with pytest.raises(ValueError, match=r'the global site "v" with shape \(2,\), got \(3, 2\)'):
        prediction.decode(slopes, {"z": z, "w": given["w"], "v": v.expand(3, 2)})
    monkeypatch.setattr(prediction, "MAX_ELEMENTS", 2 * 10)  # of ten draws in a call
    drawn = prediction.sample(slopes, 4000, given=given)
    covariance = 9 + 0.01 * torch.eye(2)
    torch.testing.assert_close(drawn.mean(0), v, atol=5 * 3 / 4000**0.5, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), covariance, atol=5 * 9 * (2 / 4000) ** 0.5, rtol=0)
    of_prior = prediction.sample(slopes, 40)  # of one w: x_1 - x_2 is v_1 - v_2 and noise
    assert float((of_prior[:, 0] - of_prior[:, 1]).std()) < 0.3
    with pytest.raises(ValueError, match=r"the global sites \['v', 'w'\], got one of \"z\""):
        prediction.sample(slopes, 3, given={"z": z})


def crossed(x=None, num_data=None):
    """x_ij ~ N(a_i + b_j, 0.1^2) of rows i, which are the data, and three columns j, with one b_j for all data."""
    columns = pyro.plate("columns", 3, dim=-1)
    with columns:
        b = pyro.sample("b", dist.Normal(torch.tensor([10.0, 20.0, 30.0]), 0.01))
    with pyro.plate("rows", num_data if x is None else len(x), dim=-2):
        a = pyro.sample("a", dist.Normal(torch.zeros(()), 0.1))
        with columns:
            return pyro.sample("x", dist.Normal(a + b, 0.1), obs=x)


def guide_of_crossed(x):
    with pyro.plate("columns", 3, dim=-1):
        pyro.sample("b", dist.Normal(torch.tensor([10.0, 20.0, 30.0]), 0.01))
    with pyro.plate("rows", len(x), dim=-2):
        pyro.sample("a", dist.Normal(x.mean(-1, keepdim=True) - 20, 0.05))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 15])
def test_a_plate_of_as_many_elements_as_there_are_data_is_another(count, monkeypatch):
    """Rows and columns of equal numbers are told apart by a call with another number of rows."""
    monkeypatch.setattr(prediction, "MAX_ELEMENTS", 36)  # 12 rows in a call, so that the rest are 3
    columns = torch.tensor([10.0, 20.0, 30.0])
    b = torch.tensor([[1.0, 2.0, 3.0]])[0]
    x = prediction.sample(crossed, count)
    torch.testing.assert_close(x, columns.expand(count, 3), atol=1.0, rtol=0)
    given = prediction.sample(crossed, count, given={"b": b}, mean=True)
    torch.testing.assert_close(given, b.expand(count, 3), atol=1.0, rtol=0)
    codes = encodings(guide_of_crossed, x)
    assert codes["b"].is_global and not codes["a"].is_global
    torch.testing.assert_close(codes["a"].mean[:, 0], x.mean(-1) - 20)
    a = torch.arange(float(count))[:, None]
    torch.testing.assert_close(prediction.decode(crossed, {"a": a, "b": b}), a + b)
    assert reconstruct(crossed, guide_of_crossed, x).shape == (count, 3)
    draws = to_arviz(crossed, guide_of_crossed, x, num_samples=4)["posterior"]
    assert draws["a"].shape[:3] == (1, 4, count) and draws["b"].shape == (1, 4, 3)
    found = evaluate(crossed, guide_of_crossed, x, num_samples=50, progress=False)
    assert found.global_sites == ("b",) and found.per_datum["elbo"].shape == (count,)


def one_component(x=None, num_data=None):
    with pyro.plate("components", 1):
        m = pyro.sample("m", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("documents", num_data if x is None else len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        return pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_global_plate_of_one_element():
    m, z = torch.ones(1), torch.arange(3.0)
    torch.testing.assert_close(prediction.decode(one_component, {"m": m, "z": z}), z)
    assert prediction.sample(one_component, 4, given={"m": m}).shape == (4,)

    def guide(x):
        with pyro.plate("components", 1):
            pyro.sample("m", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("documents", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    for rows in (1, 2):
        codes = encodings(guide, torch.arange(float(rows)))
        assert codes["m"].is_global and not codes["z"].is_global


def test_topics_that_are_given_lie_in_a_plate_of_their_own():
    def topics(x=None, num_data=None):
        with pyro.plate("topics", 4):
            words = pyro.sample("words", dist.Dirichlet(torch.ones(5)))
        with pyro.plate("documents", num_data if x is None else len(x)):
            share = pyro.sample("share", dist.Dirichlet(torch.ones(4)))
            return pyro.sample("x", dist.Multinomial(10, share @ words), obs=x)

    words = torch.eye(5)[:4]
    for count in (4, 7):
        drawn = prediction.sample(topics, count, given={"words": words})
        assert drawn.shape == (count, 5) and not drawn[:, 4].any()


@pytest.mark.parametrize("kind", ["AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal"])
def test_pyros_guides_of_global_sites(kind):
    """Their draws are made of auxiliary ones, which are the same for every part of the data."""
    guide = getattr(pyro.infer.autoguide, kind)(regression)
    guide(X, Y)
    codes = encodings(guide, (X, Y), num_samples=40)
    assert codes["w"].is_global and codes["w"].draws.shape == (40, 2) and bool(codes["w"].draws.std(0).gt(0).all())
    assert to_arviz(regression, guide, (X, Y), num_samples=5)["posterior"]["w"].shape == (1, 5, 2)
    with pytest.raises(ValueError, match="expected a model with a latent site for each datum"):
        prediction.decode(lambda num_data: regression(X[:num_data]), {"w": torch.zeros(2)})


def switched(x=None, num_data=None):
    """c ~ Bernoulli(1/2) of all data chooses a slope, 0 or 100."""
    c = pyro.sample("c", dist.Bernoulli(0.5))
    with pyro.plate("data", num_data if x is None else len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        return pyro.sample("x", dist.Normal(z * torch.tensor([0.0, 100.0])[c.long()], 1.0), obs=x)


def test_data_are_decoded_at_values_that_global_sites_take():
    def guide(x):
        pyro.sample("c", dist.Bernoulli(0.999))
        pyro.sample("L", dist.LKJCholesky(3, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.1))

    codes = encodings(guide, torch.zeros(4))
    assert float(codes["c"].mean) == pytest.approx(0.999) and float(codes["c"].value) == 1.0
    L = codes["L"].value
    torch.testing.assert_close((L @ L.mT).diagonal(), torch.ones(3))

    def of_switch(x):
        pyro.sample("c", dist.Bernoulli(0.999))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.1))

    line = prediction.interpolate(switched, of_switch, torch.tensor(0.0), torch.tensor(2.0), steps=3)
    torch.testing.assert_close(line, torch.tensor([0.0, 100.0, 200.0]))


@pytest.mark.parametrize("num_samples", [None, 10])
def test_codes_of_categories(num_samples):
    def guide(x):
        pyro.sample("k", dist.Categorical(torch.tensor([0.0, 0.0, 1.0])))
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(torch.tensor([0.0, 1.0, 0.0])))

    codes = encodings(guide, torch.zeros(4, 1), num_samples=num_samples)
    assert torch.equal(codes["c"].mean, torch.ones(4)) and torch.equal(codes["c"].scale, torch.zeros(4))
    assert codes["k"].value.dtype == torch.int64 and int(codes["k"].value) == 2


def test_points_bound_no_evidence():
    """ln p(x, z) at one z is none: of mu ~ N(0, 0.1^2) and 20 data it was 77 nats too high."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 0.1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 0.1))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.zeros(20)
    point = pyro.infer.autoguide.AutoDelta(model)
    point(x)
    for score in (evaluate, scores):
        with pytest.raises(ValueError, match=r"a density for each latent site, got points for \['mu', 'z'\]"):
            score(model, point, x, num_samples=5)
    normal = pyro.infer.autoguide.AutoNormal(model, init_scale=0.05)
    normal(x)
    evaluate(model, normal, x, num_samples=5, progress=False)


@pytest.mark.parametrize("handler", ["scale around", "plate's own size"])
def test_batches_that_stand_for_all_by_a_scale_are_taken(handler, tmp_path):
    """theta ~ N(0, 1), x_i ~ N(theta, 1): the variance of q is the posterior's, 1 / (N + 1)."""
    N = 40
    data = torch.randn(N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def program(x):
        rows = pyro.plate("data", N, subsample=torch.arange(len(x))) if handler != "scale around" else None
        scale = poutine.scale(scale=N / len(x)) if rows is None else contextlib.nullcontext()
        return scale, rows or pyro.plate("data", len(x))

    def model(x):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))
        scale, rows = program(x)
        with scale, rows:
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    def guide(x):
        loc, log_scale = pyro.param("loc", torch.zeros(())), pyro.param("log_scale", torch.tensor(-1.5))
        pyro.sample("theta", dist.Normal(loc, log_scale.exp()))

    settings = {
        "epochs": 60,
        "batch_size": 10,
        "learning_rate": 0.02,
        "loss": TraceMeanField_ELBO(num_particles=30),
        "progress": False,
    }
    run = fit(model, guide, data, out=tmp_path / "run", **settings)
    q = encodings(run.guide, data)["theta"]
    assert float(q.scale) == pytest.approx((N + 1) ** -0.5, rel=0.15)


def test_a_part_of_a_plate_within_a_datum_does_not_make_it_stand_for_all(tmp_path):
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-2), pyro.plate("pixels", 4, subsample_size=2, dim=-1) as pixels:
            pyro.sample("x", dist.Normal(w, 1.0), obs=x[:, pixels])

    def guide(x):
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.zeros(())), 0.1))

    with pytest.raises(ValueError, match=r'batches of 4 whose site "x" stands for 4: batch_size=40'):
        fit(model, guide, torch.zeros(40, 4), batch_size=4, epochs=1, out=tmp_path / "run", progress=False)


def of_people(x=None, num_data=None):
    """A factor model: x_i ~ N(load z_i, s^2), load and s of all people."""
    load = pyro.sample("load", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("people", num_data if x is None else len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(z * load, s).to_event(1), obs=x)


def test_a_run_of_global_sites_is_reopened_and_drawn_at_what_it_learned(tmp_path, capsys):
    """From Python, whose guide was made by an example, and from the command line."""
    torch.manual_seed(0)
    data = (100.0 + torch.randn(60, 3)).float()
    np.savetxt(tmp_path / "t.csv", data.numpy(), delimiter=",", header="a,b,c", comments="")
    dataset = load_dataset(tmp_path / "t.csv")
    example = dataset.train.x.double()
    guide = AmortizedGuide(of_people, example=((example,), {})).double()
    run = fit(of_people, guide, dataset.train, epochs=2, out=tmp_path / "run", progress=False)
    again = load_run(run.path)
    assert torch.equal(again.tensors["guide.example.0.0"], example)
    x = dataset.test.x
    assert torch.equal(encode(again.guide, x, seed=3).mean, encode(run.guide, x, seed=3).mean)
    with pytest.raises(ValueError, match=r"values of the global sites \['load', 's'\] to draw data at"):
        run.sample(3)
    given = prediction.global_values(run.guide, dataset.train)
    assert run.sample(3, given=given).shape == (3, 3) and set(given) == {"load", "s"}

    out = tmp_path / "x.csv"
    assert main(["sample", str(run.path), "--num", "2000", "--out", str(out)]) == 0
    drawn = torch.tensor(np.loadtxt(out, delimiter=",", skiprows=1))
    sd = (given["load"].square() + given["s"].square()).sqrt() * dataset.scale
    torch.testing.assert_close(drawn.std(0), sd, rtol=0.1, atol=0)  # and not that of the prior
    assert main(["encode", str(run.path), "--out", str(tmp_path / "z.csv")]) == 0
    said = capsys.readouterr().out
    assert "at the guide's values of the global sites load, s" in said
    assert "without the global sites load, s, which have no rows: --out FILE.npz has them" in said
    assert (tmp_path / "z.csv").read_text().splitlines()[0] == "id,z_mean_0,z_scale_0"
    assert main(["encode", str(run.path), "--out", str(tmp_path / "z.npz")]) == 0
    assert np.load(tmp_path / "z.npz")["load_mean"].shape == (3,)
