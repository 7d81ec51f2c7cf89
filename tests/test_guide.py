"""AmortizedGuide: the mean of p(x, z) / q(z | x) over draws is p(x), in every model whose p(x) is known."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import FAMILIES
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam
from sklearn.mixture import GaussianMixture as Mixture
from torch import nn

from pyro_vae import CompiledSVI
from pyro_vae.guides import AmortizedGuide, families
from pyro_vae.models import VAE, LinearVAE, likelihoods, priors
from pyro_vae.nn import MLP

ENCODER = MLP((8,), activation="tanh")


def shaken(program, spread=0.4):
    """With random parameters, in float64."""
    with torch.no_grad():
        for parameter in program.double().parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return program


def log_weights(model, guide, K, *args, nesting=1, **kwargs):
    """log p(x, z_k) / q(z_k | x) of all data together, shape (K,)."""
    with torch.no_grad(), pyro.plate("draws", K, dim=-1 - nesting):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args, **kwargs)
        total = torch.zeros(K, *[1] * nesting, dtype=torch.float64)
        for sign, trace in ((1, model_trace), (-1, guide_trace)):
            trace.compute_log_prob()
            for site in trace.nodes.values():
                if "log_prob" in site and type(site["fn"]).__name__ != "_Subsample":
                    within = [dim for dim in range(-nesting, 0) if dim >= -site["log_prob"].dim()]
                    total = total + sign * site["log_prob"].sum(within, keepdim=True)
    return total.flatten()


def assert_mean_weight_is(log_evidence, log_weight, worst=0.05):
    """Within four standard errors, which are small."""
    weights = (log_weight - log_evidence).exp()
    error = float(weights.std()) / math.sqrt(len(weights))
    assert error < worst
    assert float(weights.mean()) == pytest.approx(1, abs=4 * error)


def widened(family, by=0.7):
    """With a larger scale, so that weights have a variance."""
    base = getattr(family, "base", family)
    D = base.heads.shapes[0].numel()
    with torch.no_grad():
        base.heads.linear.bias[D : 2 * D] += by


class Conjugate(PyroModule):
    """One latent site, and log p(x) in closed form."""

    def __init__(self, prior, likelihood, log_evidence):
        super().__init__()
        self.prior, self.likelihood, self.log_evidence = prior, likelihood, log_evidence

    def forward(self, x=None, *, num_data=None):
        with pyro.plate("data", num_data if x is None else len(x)):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(z), obs=x)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def gamma_poisson():
    a, b = tensor(2.0, 3.0), tensor(1.0, 2.0)
    return Conjugate(
        lambda: dist.Gamma(a, b).to_event(1),
        lambda z: dist.Poisson(z).to_event(1),
        lambda x: dist.GammaPoisson(a, b).to_event(1).log_prob(x),
    ), tensor(3.0, 1.0)[None]


def dirichlet_multinomial():
    a = tensor(1.0, 2.0, 1.5)
    return Conjugate(
        lambda: dist.Dirichlet(a),
        lambda z: dist.Multinomial(6, z),
        lambda x: dist.DirichletMultinomial(a, 6).log_prob(x),
    ), tensor(2.0, 1.0, 3.0)[None]


def beta_binomial():
    return Conjugate(
        lambda: dist.Beta(tensor(2.0), 3.0).to_event(1),
        lambda z: dist.Binomial(9, z).to_event(1),
        lambda x: dist.BetaBinomial(tensor(2.0), 3.0, 9).to_event(1).log_prob(x),
    ), tensor(4.0)[None]


def normal_normal():
    W = tensor(1.0, 0.5, -0.5, 1.0).reshape(2, 2)
    covariance = W @ W.T + 2 * torch.eye(2, dtype=torch.float64)
    return Conjugate(
        lambda: dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1),
        lambda z: dist.Normal(z @ W.T, math.sqrt(2)).to_event(1),
        lambda x: dist.MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance).log_prob(x),
    ), tensor(0.8, -0.6)[None]


CONJUGATES = {f.__name__: f for f in (gamma_poisson, dirichlet_multinomial, beta_binomial, normal_normal)}


@pytest.mark.parametrize("model_name", CONJUGATES)
@pytest.mark.parametrize("family_name", FAMILIES)
def test_mean_weight_is_the_evidence(model_name, family_name):
    torch.manual_seed(2)
    model, x = CONJUGATES[model_name]()
    guide = shaken(AmortizedGuide(model, ENCODER, FAMILIES[family_name], example=((x,), {})), 0.1)
    widened(guide.heads["z"])
    assert_mean_weight_is(float(model.log_evidence(x)), log_weights(model, guide, 100_000, x))


def test_mean_weight_of_a_chain_of_two_sites():
    """z_1 ~ N(0, I), z_2 | z_1 ~ N(z_1, I), x | z_2 ~ N(z_2, 2I): x ~ N(0, 4I)."""

    def model(x):
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            second = pyro.sample("second", dist.Normal(first, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(second, math.sqrt(2)).to_event(1), obs=x)

    x = tensor(0.5, -1.0)[None]
    exact = float(dist.Normal(x.new_zeros(2), 2.0).to_event(1).log_prob(x))
    for dependencies in ("earlier", "none", {"second": ["first"]}):
        torch.manual_seed(0)
        guide = shaken(AmortizedGuide(model, ENCODER, example=((x,), {}), dependencies=dependencies), 0.2)
        assert guide.heads["second"].heads.linear.in_features == 8 + 2 * (dependencies != "none")
        for head in guide.heads.values():
            widened(head)
        assert_mean_weight_is(exact, log_weights(model, guide, 100_000, x))


def test_mixture_prior_with_a_linear_decoder():
    """log p(x) = logsumexp_k [ln w_k + ln N(x; W m_k + b, W S_k W^T + s^2 I)]."""
    torch.manual_seed(0)
    for covariance in ("diagonal", "full"):
        prior = priors.GaussianMixture(2, components=3, covariance=covariance)
        likelihood = likelihoods.Normal("shared", initial_scale=1.5)
        model = shaken(VAE((3,), prior=prior, likelihood=likelihood, decoder=MLP(())))
        x = torch.randn(1, 3, dtype=torch.float64)
        W, b = model.decoder.output.weight, model.decoder.output.bias
        components = prior.components()
        S = components.covariance_matrix if covariance == "full" else components.variance.diag_embed()
        s2 = model.observation(torch.zeros(1, 2, dtype=torch.float64)).variance.diag_embed()
        each = dist.MultivariateNormal(components.mean @ W.T + b, W @ S @ W.T + s2)
        exact = float((each.log_prob(x) + prior.logits.log_softmax(-1)).logsumexp(-1).detach())
        guide = shaken(AmortizedGuide(model, ENCODER))
        widened(guide.heads["z"])
        assert_mean_weight_is(exact, log_weights(model, guide, 400_000, x))


def test_a_table_decoder_over_a_categorical_latent_is_a_gaussian_mixture():
    """Enumerated by the guide or by the model, against scikit-learn."""
    torch.manual_seed(0)
    x = torch.randn(40, 2, dtype=torch.float64) + torch.randint(0, 3, (40, 1)) * 3.0
    fit = Mixture(3, covariance_type="diag", random_state=0).fit(x.numpy())
    weights, means, variances = map(torch.from_numpy, (fit.weights_, fit.means_, fit.covariances_))

    def model(x, enumerate=None):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": enumerate} if enumerate else {})
            pyro.sample("x", dist.Normal(means[k], variances[k].sqrt()).to_event(1), obs=x)

    exact = fit.score(x.numpy()) * len(x)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)

    def marginal(x):
        return model(x, "parallel")

    with pytest.raises(ValueError, match="expected a model with latent sites, got one without"):
        AmortizedGuide(marginal, example=((x,), {}))
    assert -elbo.loss(marginal, lambda x: None, x) == pytest.approx(exact, rel=1e-9)

    guide = AmortizedGuide(model, nn.Identity(), example=((x,), {})).double()
    log_posterior = torch.from_numpy(fit.predict_proba(x.numpy())).log()
    guide.heads["k"].forward = lambda h: dist.Categorical(logits=log_posterior)
    assert -elbo.loss(model, config_enumerate(guide), x) == pytest.approx(exact, rel=1e-6)
    torch.manual_seed(0)
    sampled = AmortizedGuide(model, ENCODER, example=((x,), {})).double()
    enumerated = -elbo.loss(model, config_enumerate(sampled), x)
    draws = [-Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1).loss(model, sampled, x)]
    draws += [-Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1).loss(model, sampled, x)]
    assert sum(draws) / 2 == pytest.approx(enumerated, abs=max(5 * abs(draws[0] - draws[1]), 0.02 * abs(enumerated)))


# ------------------------------------------------------------ structure


def hierarchical(x, total=None):
    """Global w, local in the plate of groups, local in both plates."""
    G, B = x.shape[:2]
    w = pyro.sample("w", dist.LogNormal(x.new_zeros(()), 1.0))
    with pyro.plate("data", total or G, subsample_size=G, dim=-2):
        group = pyro.sample("group", dist.Normal(x.new_zeros(()), w))
        with pyro.plate("members", B, dim=-1):
            member = pyro.sample("member", dist.Normal(group, 1.0))
            pyro.sample("x", dist.Normal(member, 1.0), obs=x)


class PerMember(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 6)

    def forward(self, x):
        return self.linear(x[..., None]).tanh()


def gaussian_evidence(x, w):
    """log p(x | w) of `hierarchical`, group by group."""
    covariance = w**2 + 2 * torch.eye(x.shape[1], dtype=x.dtype)
    return dist.MultivariateNormal(x.new_zeros(x.shape[1]), covariance).log_prob(x).sum()


def test_global_and_nested_local_latents():
    torch.manual_seed(0)
    x = torch.randn(2, 3, dtype=torch.float64)
    guide = AmortizedGuide(hierarchical, PerMember(), example=((x,), {})).double()
    trace = poutine.trace(guide).get_trace(x)
    assert trace.nodes["w"]["value"].shape == ()
    assert trace.nodes["group"]["value"].shape == (2, 1)
    assert trace.nodes["member"]["value"].shape == (2, 3)
    assert {f.name for f in trace.nodes["member"]["cond_indep_stack"]} == {"members", "data"}
    grid = torch.linspace(-8, 8, 4_001, dtype=torch.float64)
    log_joint = torch.stack([gaussian_evidence(x, w) for w in grid.exp()]) + dist.Normal(0.0, 1.0).log_prob(grid)
    exact = float(log_joint.logsumexp(0) + (grid[1] - grid[0]).log())
    with torch.no_grad():
        for parameter in guide.heads.parameters():
            parameter.mul_(0.3)
    assert_mean_weight_is(exact, log_weights(hierarchical, guide, 400_000, x, nesting=2), worst=0.1)


def test_subsampled_plates_keep_their_scale():
    torch.manual_seed(0)
    x = torch.randn(4, 3)
    guide = AmortizedGuide(hierarchical, PerMember(), example=((x, 20), {}))
    trace = poutine.trace(guide).get_trace(x, 20)
    assert float(trace.nodes["group"]["scale"]) == float(trace.nodes["member"]["scale"]) == 5
    assert float(trace.nodes["w"]["scale"]) == 1

    everything = torch.randn(20, 2)

    def drawn(x):
        with pyro.plate("data", len(x), subsample_size=5) as index:
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[index])

    guide = AmortizedGuide(drawn, nn.Identity(), example=((everything,), {}))
    guide_trace = poutine.trace(guide).get_trace(everything)
    index = guide_trace.nodes["data"]["value"]
    model_trace = poutine.trace(poutine.replay(drawn, guide_trace)).get_trace(everything)
    assert torch.equal(model_trace.nodes["x"]["value"], everything[index])
    expected = guide.heads["z"](everything[index]).mean
    torch.testing.assert_close(guide_trace.nodes["z"]["fn"].mean, expected)


def test_all_latents_global_is_an_autoguide(recorded):
    """Bayesian regression: exact evidence, no encoder."""
    torch.manual_seed(0)
    X, y = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def model(X, y):
        w = pyro.sample("w", dist.Normal(X.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal((X * w).sum(-1), 1.0), obs=y)

    guide = AmortizedGuide(model, family=families.MultivariateNormal(), example=((X, y), {})).double()
    assert not hasattr(guide, "encoder")
    exact = float(dist.MultivariateNormal(y.new_zeros(6), X @ X.T + torch.eye(6)).log_prob(y))
    assert_mean_weight_is(exact, log_weights(model, guide, 400_000, X, y), worst=0.1)
    posterior = torch.linalg.inv(X.T @ X + torch.eye(2))
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(32, vectorize_particles=True))
    for _ in range(1_500):
        svi.step(X, y)
    assert svi.compiled
    q = guide.heads["w"](torch.empty(0))
    torch.testing.assert_close(q.mean, posterior @ X.T @ y, atol=0.05, rtol=0)
    torch.testing.assert_close(q.covariance_matrix, posterior, atol=0.05, rtol=0)


class Labelled(PyroModule):
    """y ~ Categorical, z ~ N(0, I), x | y, z."""

    def __init__(self):
        super().__init__()
        self.locations = nn.Parameter(torch.randn(3, 2))

    def forward(self, x=None, y=None, *, num_data=None):
        with pyro.plate("data", num_data if x is None else len(x)):
            y = pyro.sample("y", dist.Categorical(logits=self.locations.new_zeros(3)), obs=y)
            z = pyro.sample("z", dist.Normal(self.locations.new_zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z + self.locations[y], 1.0).to_event(1), obs=x)


def test_given_values_are_conditioned_on():
    torch.manual_seed(0)
    model = Labelled()
    guide = AmortizedGuide(model, ENCODER)
    x, y = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])
    assert set(guide(x)) == {"y", "z"} and set(guide(x, y)) == set(guide(x, y=y)) == {"z"}
    means = [poutine.trace(guide).get_trace(x, y).nodes["z"]["fn"].mean for y in (y, (y + 1) % 3)]
    assert (means[0] - means[1]).abs().min().item() > 0
    assert math.isfinite(TraceEnum_ELBO(max_plate_nesting=1).loss(model, config_enumerate(guide), x))
    assert math.isfinite(Trace_ELBO().loss(model, guide, x, y))


def test_enumerated_sites_are_features_too():
    """E_q over y by enumeration equals the average over draws of y."""
    torch.manual_seed(0)
    model = Labelled().double()
    guide = shaken(AmortizedGuide(model, ENCODER))
    x = torch.randn(4, 2, dtype=torch.float64)
    settings = {"num_particles": 400, "vectorize_particles": True, "max_plate_nesting": 1}
    pairs = ((TraceEnum_ELBO(**settings), config_enumerate(guide)), (Trace_ELBO(**settings), guide))
    values = [[-elbo.loss(model, program, x) for _ in range(12)] for elbo, program in pairs]
    (a, b), errors = [torch.tensor(v).mean() for v in values], [torch.tensor(v).std() / 12**0.5 for v in values]
    assert float(a) == pytest.approx(float(b), abs=4 * float(sum(error**2 for error in errors)) ** 0.5)


def test_supports_are_reached_and_real_ones_are_bare():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("real", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("positive", dist.Gamma(1.0 + x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("unit", dist.Uniform(-1.0, 2.0))
            pyro.sample("simplex", dist.Dirichlet(x.new_ones(3)))
            pyro.sample("binary", dist.Bernoulli(0.5 + x.new_zeros(2)).to_event(1))
            pyro.sample("code", dist.OneHotCategorical(logits=x.new_zeros(4)))
            pyro.sample("triangle", dist.LKJCholesky(3, 1.0))
            pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=x)

    x = torch.randn(7, 3)
    guide = AmortizedGuide(model, ENCODER, example=((x[:2],), {}))
    for batch in (x, x[:3]):
        trace = poutine.trace(guide).get_trace(batch)
        reference = poutine.trace(model).get_trace(batch)
        for name in guide.heads:
            site = trace.nodes[name]
            assert bool(reference.nodes[name]["fn"].support.check(site["value"]).all())
            assert site["fn"].log_prob(site["value"]).shape == (len(batch),)
    assert isinstance(trace.nodes["real"]["fn"], torch.distributions.Independent)
    assert math.isfinite(Trace_ELBO().loss(model, guide, x))


def test_families_per_site():
    torch.manual_seed(0)
    model = VAE((4,), prior=priors.Hierarchical((3, 2)))
    chosen = {"z_1": families.IAF(1, hidden=(8,)), "z_2": families.MultivariateNormal()}
    guide = AmortizedGuide(model, family=chosen)
    assert {name: type(head) for name, head in guide.heads.items()} == {n: type(f) for n, f in chosen.items()}
    with pytest.raises(ValueError, match=r"expected names among the latent sites \['z_2', 'z_1'\], got \['z'\]"):
        AmortizedGuide(model, family={"z": families.IAF()})
    with pytest.raises(ValueError, match=r'expected site "z_2" to depend on some of \[\], earlier sites in its plates'):
        AmortizedGuide(model, dependencies={"z_2": ["z_1"]})


def test_a_parameter_beside_it_in_a_guide():
    """Pyro's SVI steps one that was made before the guide traces its model for the first time."""
    model = VAE((4,), latent_dim=2)
    amortized = AmortizedGuide(model)

    def guide(x):
        amortized(pyro.param("contrast", torch.ones(())) * x)

    SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO()).step(torch.rand(5, 4).round())
    assert pyro.param("contrast").item() != 1.0


def test_copies_pickles_and_predictive():
    torch.manual_seed(0)
    model = Labelled()
    guide = AmortizedGuide(model, ENCODER, family=families.IAF(1, hidden=(8,)))
    x = torch.randn(5, 2)
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        torch.testing.assert_close(other.posterior(x, site="y").probs, guide.posterior(x, site="y").probs)
        draws = []
        for each in (guide, other):
            torch.manual_seed(1)
            draws.append(each(x)["z"])
        assert torch.equal(*draws)
    drawn = Predictive(model, guide=guide, num_samples=6, parallel=True, return_sites=("x", "z"))(x)
    assert drawn["z"].shape == (6, 5, 2)


def test_global_sites_in_a_plate_have_parameters_each(recorded):
    """Three components with conjugate means: exact evidence, and the exact posterior of each."""
    y = torch.tensor([[-2.0, 0.5, 3.0]], dtype=torch.float64)

    def model(y):
        with pyro.plate("components", 3, dim=-1):
            mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 2.0))
        with pyro.plate("data", len(y), dim=-2), pyro.plate("columns", 3, dim=-1):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    torch.manual_seed(0)
    guide = AmortizedGuide(model, example=((y,), {})).double()
    assert_mean_weight_is(
        float(dist.Normal(y.new_zeros(()), 5**0.5).log_prob(y).sum()), log_weights(model, guide, 400_000, y, nesting=2)
    )
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(16, vectorize_particles=True))
    for _ in range(600):
        svi.step(y)
    torch.testing.assert_close(poutine.trace(guide).get_trace(y).nodes["mean"]["fn"].mean, 0.8 * y[0], atol=0.1, rtol=0)


@pytest.mark.parametrize("encoder", [nn.Identity, PerMember], ids=["of all members", "of each"])
def test_plates_in_pyros_own_order(encoder):
    """Dimensions from the right as they are entered: members lie to the left of the data."""

    def model(x):
        with pyro.plate("data", len(x)):
            group = pyro.sample("group", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("members", 3):
                member = pyro.sample("member", dist.Normal(group, 1.0))
                pyro.sample("x", dist.Normal(member, 1.0), obs=x.T)

    torch.manual_seed(0)
    x = torch.randn(2, 3, dtype=torch.float64)
    guide = AmortizedGuide(model, encoder(), example=((x,), {})).double()
    trace = poutine.trace(guide).get_trace(x)
    assert trace.nodes["group"]["value"].shape == (2,) and trace.nodes["member"]["value"].shape == (3, 2)
    means = trace.nodes["member"]["fn"].mean
    assert means.shape == (3, 2) and (means[0] - means[1]).abs().min().item() > 1e-6
    exact = float(gaussian_evidence(x, torch.ones(())))
    with torch.no_grad():
        for parameter in guide.heads.parameters():
            parameter.mul_(0.3)
    assert_mean_weight_is(exact, log_weights(model, guide, 400_000, x, nesting=2))
    assert guide(torch.randn(5, 3, dtype=torch.float64))["member"].shape == (3, 5)


def test_the_data_plate_is_found():
    def model(x, prior_scale):
        with pyro.plate("components", 2):
            scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), prior_scale))
            pyro.deterministic("squared", scale**2)
        rows = pyro.plate("rows", len(x), dim=-1)
        with pyro.plate("outputs", 3, dim=-2), rows:
            pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x.T)
        with rows:
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=x[:, 0])

    x = torch.randn(6, 3)
    guide = AmortizedGuide(model, ENCODER, example=((x, torch.ones(())), {}))
    draws = guide(torch.randn(4, 3), torch.ones(()))
    assert draws["scale"].shape == (2,) and draws["z"].shape == (4,)


@pytest.mark.parametrize("name", ["gamma", "simplex", "matrix"])
def test_networks_are_called_once_whatever_the_support(name):
    prior = {
        "gamma": lambda x: dist.Gamma(x.new_ones(4), 1.0).to_event(1),
        "simplex": lambda x: dist.Dirichlet(x.new_ones(4)),
        "matrix": lambda x: dist.Normal(x.new_zeros(2, 3), 1.0).to_event(2),
    }[name]

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior(x))
            pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=x)

    x, calls = torch.randn(5, 2), []
    guide = AmortizedGuide(model, ENCODER, families.IAF(2, hidden=(8,)), example=((x,), {}))
    for network in guide.heads["z"].networks:
        network.hyper.register_forward_hook(lambda *_: calls.append(1))
    poutine.trace(guide).get_trace(x).compute_log_prob()
    assert len(calls) == 2


def test_drawn_and_given_codes_compile(recorded):
    torch.manual_seed(0)
    model = Labelled()
    guide = AmortizedGuide(model, ENCODER)
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        for given in ((), (torch.tensor([0, 1, 2, 0, 1]),)):
            svi.step(torch.randn(5, 2), *given)
    assert svi.compiled, svi.fallback_reason
    assert sum(map(len, svi._whole._recordings.values())) == 2  # graphs: one for drawn codes, one for given ones


def test_long_chains_start_finite():
    def model(x):
        with pyro.plate("data", len(x)):
            z = x.new_zeros(8)
            for i in range(20):
                z = pyro.sample(f"z{i}", dist.Normal(0.5 * z, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., :2], 1.0).to_event(1), obs=x)

    for seed in range(8):
        torch.manual_seed(seed)
        guide = AmortizedGuide(model, ENCODER, example=((torch.randn(9, 2),), {}))
        assert math.isfinite(Trace_ELBO().loss(model, guide, torch.randn(200, 2)))


def test_equal_bounds_are_one_support():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("u", dist.Uniform(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=x)

    guide = AmortizedGuide(model, ENCODER, example=((torch.randn(3, 2),), {}))
    u = guide(torch.randn(7, 2))["u"]
    assert u.shape == (7, 2) and bool(((u > 0) & (u < 1)).all())


def totalled(x, total=None):
    with pyro.plate("data", total or len(x), subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def test_scales_are_those_of_each_call():
    x = torch.randn(20, 2)
    for example in ((x, 20), (x[:5], 20), (x,)):
        guide = AmortizedGuide(totalled, ENCODER, example=(example, {}))
        for args, scale in (((x, 20), 1), ((x[:5], 20), 4), ((x[:5], 50), 10), ((x,), 1)):
            trace = poutine.trace(guide).get_trace(*args)
            assert float(torch.as_tensor(trace.nodes["z"]["scale"])) == scale
            assert trace.nodes["z"]["value"].shape == (len(args[0]), 2)


def test_rows_of_the_callers_are_refused_or_fed():
    x = torch.randn(20, 2)

    def model(x, rows):
        with pyro.plate("data", len(x), subsample=rows):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[rows])

    rows = torch.tensor([3, 1, 7])
    with pytest.raises(
        ValueError, match='expected the rows of plate "data" to be drawn by it, or given as data, got 3'
    ):
        AmortizedGuide(model, nn.Identity(), example=((x, rows), {}))

    def words(x, rows):
        with pyro.plate("words", 10, subsample=rows):
            pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match='expected the rows of plate "words" to be drawn by it, got 3 indices'):
        AmortizedGuide(words, example=((x, rows), {}))(x, rows)
    guide = AmortizedGuide(model, nn.Identity(), encoder_inputs=lambda x, rows: x[rows], example=((x, rows), {}))
    site = poutine.trace(guide).get_trace(x, rows).nodes["z"]
    torch.testing.assert_close(site["fn"].mean, guide.heads["z"](x[rows]).mean)
    assert float(torch.as_tensor(site["scale"])) == pytest.approx(20 / 3)


def test_arguments_of_every_kind_have_their_own_plates_and_sites():
    """Dicts, floats and equal values of another type are told apart; the model is traced once for each."""
    runs = []

    def model(batch, scale=1.0):
        runs.append(1)
        x = batch["x"]
        with pyro.plate("data", batch["N"], subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0), obs=batch.get("z"))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    x = torch.randn(4)
    example, encoder_inputs = (({"x": x, "N": 8},), {}), lambda batch, scale=1.0: batch["x"]
    guide = AmortizedGuide(model, MLP((8,)), encoder_inputs=encoder_inputs, example=example)
    assert float(poutine.trace(guide).get_trace({"x": x, "N": 8}).nodes["z"]["scale"]) == 2
    assert float(poutine.trace(guide).get_trace({"x": x, "N": 40}).nodes["z"]["scale"]) == 10
    runs.clear()
    for scale in (1.0, 1, 2.0, 1.0):
        guide({"x": x, "N": 8}, scale)
    assert len(runs) == 3
    for step in range(1, 300):
        guide({"x": x, "N": 8}, step)
    assert len(guide._calls.known) <= 100


def test_a_support_that_a_call_moves_is_refused():
    def model(x, high):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Uniform(0.0, high))
            pyro.sample("x", dist.Normal(u, 1.0), obs=x)

    x = torch.randn(5)
    guide = AmortizedGuide(model, MLP((8,)), example=((x, 1.0), {}))
    with pytest.raises(ValueError, match=r'expected latent site "u" as in the example, .*1\.0.*, got .*3\.0'):
        guide(x, 3.0)


def test_copies_keep_a_real_support_bare():
    model = VAE((4,), latent_dim=2)
    guide, x = AmortizedGuide(model), torch.rand(3, 4).round()
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert torch.equal(other.posterior(x).mean, guide.posterior(x).mean)


def test_sites_of_any_name():
    """A Bayesian linear regression by PyroSample, whose sites have dots; and names of what modules have."""

    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](2, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

        def forward(self, x, y=None):
            mean = self.linear(x)[..., 0]
            with pyro.plate("data", len(x)):
                pyro.sample("type", dist.Normal(0.0, 1.0))
                return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    x, y = torch.randn(5, 2), torch.randn(5)
    model = Regression()
    guide = AmortizedGuide(model, example=((x, y), {}))
    assert list(guide(x, y)) == ["linear.weight", "linear.bias", "type"]
    again = AmortizedGuide(model, example=((x, y), {}))
    again.load_state_dict(guide.state_dict())
    assert torch.equal(again.posterior(x, y, site="type").mean, guide.posterior(x, y, site="type").mean)
    assert math.isfinite(SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO()).step(x, y))


@pytest.mark.parametrize("rows", [1, 6])
def test_whole_numbers_are_of_the_models_type(rows):
    def model(x):
        with pyro.plate("data", len(x)):
            n = pyro.sample("n", dist.Binomial(5, torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(n[..., None] @ torch.ones(1), 1.0), obs=x)

    x = torch.randn(rows)
    guide = AmortizedGuide(model, MLP((8,)), example=((x,), {}))
    assert guide(x)["n"].dtype == torch.float32
    assert math.isfinite(TraceEnum_ELBO(max_plate_nesting=1).loss(model, config_enumerate(guide), x))


def test_what_a_guide_is_built_from():
    """Its posterior before a first call; a number before the data; parameters of a function; float64 data."""
    pyro.param("scale", torch.tensor(2.0))

    def model(beta, X, y):
        w = pyro.sample("w", dist.Normal(X.new_zeros(2), pyro.param("scale")).to_event(1))
        with pyro.plate("data", len(X)):
            z = pyro.sample("z", dist.Normal(X.new_zeros(()), beta))
            pyro.sample("y", dist.Normal(X @ w + z, 1.0), obs=y)

    X, y = torch.randn(5, 2).double(), torch.randn(5).double()
    guide = AmortizedGuide(model, MLP((8,)))
    assert guide.posterior(torch.ones(()), X, y).batch_shape == (5,)
    assert guide(torch.ones(()), X, y)["w"].dtype == torch.float64


def test_plates_of_one_element_in_the_example():
    """The encoder has features for each member, also where the example has but one."""

    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("members", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([*z.shape, 2]).to_event(1), obs=x)

    guide = AmortizedGuide(model, nn.Linear(2, 8), example=((torch.randn(3, 1, 2),), {}))
    assert guide(torch.randn(3, 4, 2))["z"].shape == (3, 4)

    def two(x):
        with pyro.plate("data", len(x), dim=-1):
            for name in ("members", "outputs"):
                with pyro.plate(name, 3, dim=-2):
                    pyro.sample(f"of {name}", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(x, 1.0).to_event(2), obs=x)

    with pytest.raises(ValueError, match=r"expected one plate on dimension -2 .*, got \['members', 'outputs'\]"):
        AmortizedGuide(two, nn.Linear(2, 8), example=((torch.randn(5, 3, 2),), {}))


def test_a_family_that_no_site_takes_is_refused():
    model = VAE((4,), prior=priors.Categorical(3))
    with pytest.raises(ValueError, match=r"expected latent sites with a density for IAF, got \['z'\], all discrete"):
        AmortizedGuide(model, family=families.IAF())


def test_values_are_given_by_any_argument():
    torch.manual_seed(0)
    labelled = Labelled()

    def model(x, **others):
        return labelled(x, others.get("y"))

    x, y = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])
    guide = AmortizedGuide(model, ENCODER, example=((x,), {}))
    assert set(guide(x, y=y)) == {"z"} and set(guide(x)) == {"y", "z"}
    only_labelled = AmortizedGuide(model, ENCODER, example=((x,), {"y": y}))
    assert set(only_labelled(x, y=y)) == {"z"}
    with pytest.raises(ValueError, match=r"expected the latent sites \['z'\] of the example, got \['y'\] beside"):
        only_labelled(x)


def test_an_argument_named_like_a_site_that_it_does_not_observe():
    def model(x, z):
        with pyro.plate("data", len(x)):
            value = pyro.sample("z", dist.Normal(x.new_zeros(2), z).to_event(1))
            pyro.sample("x", dist.Normal(value, 1.0).to_event(1), obs=x)

    x = torch.randn(5, 2)
    assert set(AmortizedGuide(model, ENCODER, example=((x, torch.ones(())), {}))(x, torch.ones(()))) == {"z"}


# ------------------------------------------------------------ refusals


def data_plate(body):
    def model(x):
        with pyro.plate("data", len(x)):
            body(x)
            pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=x)

    return model


def moving_support(x):
    z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
    pyro.sample("u", dist.Uniform(0.0, 1 + z.sum().abs()))


def per_datum_support(x):
    pyro.sample("u", dist.Uniform(0.0, 1 + x[:, 0].abs()))


def control_flow(x):
    if pyro.sample("c", dist.Bernoulli(0.5 * x.new_ones(len(x)))).sum() > len(x) / 2:
        pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))


def counts(x):
    pyro.sample("n", dist.Poisson(x.new_ones(len(x))))


def no_plate(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=x)
    pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0))


def sequential(x):
    for i in pyro.plate("data", 2):
        pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))


def masked(x):
    with poutine.mask(mask=x[:, 0] > 0):
        pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))


def masked_law(x):
    pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).mask(x[:, :1] > 0).to_event(1))


def scaled(x):
    with poutine.scale(scale=0.1):
        pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))


def learned_support(x):
    pyro.sample("u", dist.Uniform(0.0, pyro.param("high", torch.ones(())).exp()))


def angle(x):
    pyro.sample("u", dist.VonMises(x.new_zeros(len(x)), 4.0))


def square(x):
    with pyro.plate("years", 5, dim=-2):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("x", dist.Normal(x[:, 0], 1.0), obs=x[:, 0].expand(5, -1))


REFUSED = {
    "mask": (data_plate(masked), 'expected latent site "z" without a mask'),
    "mask of the law": (data_plate(masked_law), 'expected latent site "z" without a mask'),
    "scale": (data_plate(scaled), 'expected latent site "z" without a mask or a scale of its own'),
    "learned support": (data_plate(learned_support), 'expected latent site "u" with one fixed support for all'),
    "angles": (data_plate(angle), 'latent site "u" over the real numbers or a subset, got angles'),
    "two plates of as many": (square, r"expected one plate of 5 data, got \['rows', 'years'\]"),
    "moving support": (data_plate(moving_support), 'latent site "u" that differs between runs'),
    "support of each datum": (data_plate(per_datum_support), 'expected latent site "u" with one fixed support for all'),
    "control flow": (data_plate(control_flow), 'latent site "z" that differs between runs'),
    "counts": (data_plate(counts), 'expected latent site "n" with a finite or a continuous support'),
    "no plate": (no_plate, 'expected latent site "z" with its batch in plates, got batch shape'),
    "sequential plate": (sequential, 'expected vectorised plates, got site "z0" in a sequential one'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_amortised_is_refused_by_name(name):
    model, message = REFUSED[name]
    torch.manual_seed(3)
    with pytest.raises(ValueError, match=message), pyro.validation_enabled(False):
        AmortizedGuide(model, ENCODER, example=((torch.randn(5, 2),), {}))


def test_families_of_another_support_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            c = pyro.sample("c", dist.OneHotCategorical(logits=torch.zeros(3)))
            pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=x + 0 * z + 0 * c[..., :2])

    example = ((torch.randn(5, 2),), {})
    for family, message in (
        (families.Categorical(), r'latent site "z", Real\(\), got Categorical: take a continuous one'),
        (families.Bernoulli(), 'latent site "z"'),
        ({"c": families.Bernoulli()}, 'latent site "c", OneHot.*, got Bernoulli: take Categorical'),
        ({"c": families.IAF()}, 'expected a discrete family for latent site "c"'),
    ):
        with pytest.raises(ValueError, match=message):
            AmortizedGuide(model, ENCODER, family, example=example)
    guide = AmortizedGuide(model, ENCODER, {"c": families.Categorical()}, example=example)
    assert guide(example[0][0])["c"].sum() == 5


def test_features_that_fit_no_plate_are_refused():
    x = torch.randn(2, 3)
    guide = AmortizedGuide(hierarchical, PerMember(), example=((x,), {}))
    guide.encoder = nn.Sequential(PerMember(), nn.Flatten(0, 1))
    with pytest.raises(ValueError, match=r"expected an encoder's output of shape \(B, features\)"):
        guide(x)
    guide.encoder = nn.Sequential(PerMember(), nn.ConstantPad2d((0, 0, 0, 1), 0.0))
    with pytest.raises(ValueError, match='have 3 on the dimension of plate "members" of site "member", got 4'):
        guide(x)


def test_linear_vae_gap_is_closed():
    """Rotated weights: the exact posterior has a full covariance, which MultivariateNormal reaches."""
    torch.manual_seed(0)
    model = shaken(LinearVAE((4,), latent_dim=2), 0.6)
    x = torch.randn(3, 4, dtype=torch.float64)
    guide = AmortizedGuide(model, nn.Flatten(), families.MultivariateNormal()).double()
    exact = model.posterior(x)
    L = torch.linalg.cholesky(exact.covariance_matrix[0])
    W = model.weight
    M = W.mT @ W + model.variance * torch.eye(2, dtype=torch.float64)
    with torch.no_grad():
        slope = torch.linalg.solve(M, W.mT)
        linear = guide.heads["z"].heads.linear
        linear.weight.zero_()
        linear.weight[:2] = slope
        linear.bias.zero_()
        linear.bias[:2] = -slope @ model.mean
        linear.bias[2:4] = L.diagonal().log()
        linear.bias[4:] = L.flatten()
    for _ in range(3):
        assert -Trace_ELBO().loss(model, guide, x) == pytest.approx(
            float(model.log_evidence(x).sum().detach()), rel=1e-9
        )


def test_data_of_one_number_each_and_models_that_are_bound_methods():
    class Scalars(nn.Module):
        def __init__(self):
            super().__init__()
            self.normalised = nn.BatchNorm1d(1)

        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, x.new_ones(())))
                pyro.sample("x", dist.Normal(self.normalised(z[:, None])[:, 0], 1.0), obs=x)

    x = torch.randn(6)
    program = Scalars()
    guide = AmortizedGuide(program.model, example=((x,), {}))
    assert guide(x)["z"].shape == (6,)
    assert int(program.normalised.num_batches_tracked) == 0 and program.normalised.training


def test_an_inverse_autoregressive_flow_closes_the_linear_vaes_gap():
    """Rotated weights (arXiv 1911.02469): a diagonal Gaussian is short of ln p(x) by (sum ln M_ii - ln |M|) / 2."""
    torch.manual_seed(0)
    model = LinearVAE((4,), latent_dim=2).double()
    with torch.no_grad():
        model.weight.copy_(tensor(1.5, 1.0, 1.2, 1.4, -0.4, 0.3, 0.9, 0.2).reshape(4, 2))
    x = model(num_data=100).detach()
    M = model.weight.mT @ model.weight + model.variance * torch.eye(2).double()
    gap = float((M.diagonal().log().sum() - torch.logdet(M)).detach()) / 2
    gaps = {}
    for name, family in (("IAF", families.IAF(transforms=1, hidden=())), ("DiagonalNormal", families.DiagonalNormal())):
        torch.manual_seed(1)
        guide = AmortizedGuide(model, nn.Flatten(), family).double()
        optimizer = torch.optim.Adam(guide.parameters(), lr=0.03)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
        loss = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
        for _ in range(400):
            optimizer.zero_grad()
            loss.differentiable_loss(model, guide, x).backward()
            optimizer.step()
            schedule.step()
        elbo = log_weights(model, guide, 20_000, x).mean() / len(x)
        gaps[name] = float(model.log_evidence(x).mean().detach() - elbo)
    assert gap > 0.2
    assert gaps["DiagonalNormal"] == pytest.approx(gap, abs=0.01)
    assert gaps["IAF"] == pytest.approx(0, abs=0.01)
