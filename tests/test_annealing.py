"""Annealed importance sampling against exact evidences: unbiased weights, bounds from both sides, bad input."""

import json
import math
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_vae import annealing, evaluate, fit, load_dataset
from pyro_vae.annealing import annealed, sandwich
from pyro_vae.cli import main
from pyro_vae.evaluation import generalized_pareto_shape
from pyro_vae.guides import AmortizedGuide
from pyro_vae.models import VAE, LinearVAE, priors
from pyro_vae.nn import MLP

pytestmark = [
    pytest.mark.usefixtures("float64", "small_pilot"),
    pytest.mark.filterwarnings("ignore:annealed by"),  # few temperatures, and many chains or exact answers beside
]


@pytest.fixture
def small_pilot(monkeypatch):
    """Adapted less well, and as right."""
    monkeypatch.setattr(annealing, "PILOT_MOVES", 10)
    monkeypatch.setattr(annealing, "FIRST_MOVES", 8)


@pytest.fixture
def linear():
    torch.manual_seed(1)
    x = torch.randn(100, 2) @ torch.randn(2, 5) + torch.randn(100, 5)
    return LinearVAE.maximum_likelihood(x, 2), x[:6]


def posterior_guide(model, x, shift=0.0, wider=1.0):
    """The exact posterior of a linear VAE, or one with another mean and a wider spread."""
    exact = model.posterior(x)
    mean, L = (exact.mean + shift).detach(), (math.sqrt(wider) * exact.scale_tril).detach()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=L))

    return guide


def assert_unbiased(log_weight, exact):
    """E[w] = p(x) for each datum, by a z-test over the chains."""
    relative = (log_weight - exact).exp()
    z = (relative.mean(0) - 1) / (relative.std(0) / math.sqrt(len(relative)))
    assert z.abs().max() < 4, z


def short(model, data, **options):
    """Many chains along few temperatures: their weights are not degenerate, and any bias would be seen."""
    defaults = {"num_chains": 2000, "num_temperatures": 4, "leapfrog_steps": 3, "progress": False}
    return annealed(model, data, **{**defaults, **options})


@pytest.fixture(autouse=True)
def one_batch(monkeypatch):
    monkeypatch.setattr(annealing, "MAX_ELEMENTS", 100_000_000)


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_the_estimate_is_log_p_within_its_error(linear, start):
    model, x = linear
    guide = posterior_guide(model, x, 0.3, 2.0) if start == "guide" else None
    estimate = annealed(model, x, guide=guide, num_chains=200, num_temperatures=20, leapfrog_steps=3, progress=False)
    exact, error = model.log_evidence(x).detach(), estimate.log_evidence.standard_error_draws
    assert 0 < error < 0.03
    assert float(estimate) == pytest.approx(exact.mean().item(), abs=4 * error)
    assert estimate.log_evidence.standard_error == pytest.approx(exact.std().item() / math.sqrt(6), rel=0.1)
    assert 0.5 < estimate.acceptance < 0.85
    assert estimate.log_weight.shape == (200, 6) and estimate.per_datum.shape == (6,)
    assert torch.equal(estimate.per_datum, estimate.log_weight.logsumexp(0) - math.log(200))


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_the_weights_are_unbiased(linear, start):
    model, x = linear
    guide = posterior_guide(model, x, 0.3, 2.0) if start == "guide" else None
    assert_unbiased(short(model, x, guide=guide).log_weight, model.log_evidence(x))


@pytest.mark.parametrize("broken", [False, True])
def test_the_test_of_bias_finds_a_wrong_acceptance(linear, broken, monkeypatch):
    """At a big step HMC without rejections leaves another density invariant; with them the same step is right."""
    model, x = linear
    monkeypatch.setattr(annealing._Chains, "pilot", lambda self, density, u, bar: [u.new_full((6, 1), 0.5)] * 5)
    if broken:
        monkeypatch.setattr(annealing, "acceptance", torch.ones_like)
    log_weight = short(model, x).log_weight
    if broken:
        with pytest.raises(AssertionError):
            assert_unbiased(log_weight, model.log_evidence(x))
    else:
        assert_unbiased(log_weight, model.log_evidence(x))


def test_backward_weights_are_unbiased_for_one_over_p(linear):
    """From exact draws of p(z | x), E[1 / w] = 1 / p(x); to a narrow q_0, as 1 / w has a heavy tail to a wide one."""
    model, x = linear
    chains = annealing._Chains(2000, 4, 3)
    with torch.no_grad():
        path = annealing._Path(model, posterior_guide(model, x, 0.2, 0.7), ((x,), {}), 2000)
        density = lambda u, t: path(((x,), {}), u, t)  # noqa: E731
        steps = chains.pilot(density, path.draws(2000, ((x,), {})), Silent())
        u = model.posterior(x).sample((2000,))
        negated, _ = chains.run(density, u, steps, Silent(), chains.every[::-1])
    assert_unbiased(negated, -model.log_evidence(x))


class Silent:
    def update(self):
        pass


def test_one_temperature_is_importance_sampling(linear):
    model, x = linear
    estimate = annealed(model, x, num_chains=3, num_temperatures=1, progress=False)
    assert math.isnan(estimate.acceptance)
    assert estimate.log_weight.shape == (3, len(x))
    many = annealed(model, x, num_chains=20_000, num_temperatures=1, progress=False)
    assert_unbiased(many.log_weight, model.log_evidence(x))


def test_the_sandwich_holds_the_exact_value_and_closes():
    torch.manual_seed(2)
    model = LinearVAE((8,), latent_dim=3).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(8, 3))
        model.likelihood.log_scale.fill_(0.0)
    torch.manual_seed(0)
    exact = model.log_evidence(model(num_data=40)).detach()
    gaps = []
    for num_temperatures in (3, 12, 36):
        bounds = sandwich(model, 40, num_temperatures=num_temperatures, leapfrog_steps=3, progress=False)
        below, above = (bounds.per_datum - exact).mean(1).tolist()
        assert below < 4 * bounds.lower.standard_error_draws
        assert above > -4 * bounds.upper.standard_error_draws
        assert float(bounds.gap) == pytest.approx(above - below)
        assert float(bounds.upper) - float(bounds.lower) == pytest.approx(above - below)
        gaps.append(above - below)
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2], gaps
    assert abs(gaps[2]) < 0.5


def test_a_good_guide_needs_fewer_temperatures(linear):
    model, x = linear
    options = {"num_chains": 64, "num_temperatures": 5, "leapfrog_steps": 3, "progress": False}
    prior = annealed(model, x, **options)
    guided = annealed(model, x, guide=posterior_guide(model, x, 0.1, 1.2), **options)
    assert guided.log_weight.std(0).mean() < 0.3 * prior.log_weight.std(0).mean()
    exact_guide = annealed(model, x, guide=posterior_guide(model, x), **options)
    torch.testing.assert_close(exact_guide.log_weight, model.log_evidence(x).detach().expand(64, 6))


# ------------------------------------------------------------ models of other forms


def gamma_poisson(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
        pyro.sample("x", dist.Poisson(rate[..., None].expand(*rate.shape, 3)).to_event(1), obs=x)


def gamma_poisson_evidence(x):
    a, b, total = 2.0, 1.5, x.sum(1)
    return (
        a * math.log(b)
        + torch.lgamma(a + total)
        - math.lgamma(a)
        - (a + total) * math.log(b + 3)
        - torch.lgamma(x + 1).sum(1)
    )


def two_sites(x):
    with pyro.plate("data", len(x)):
        first = pyro.sample("first", dist.Normal(0.0, 1.0))
        second = pyro.sample("second", dist.Normal(first, 1.0))
        pyro.sample("x", dist.Normal(second, 0.5), obs=x)


def groups(x, mask=None):
    """Items in a plate within the data's, those out of the mask left out with their latent site."""
    with pyro.plate("data", len(x), dim=-2):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 3, dim=-1), poutine.mask(mask=torch.ones(3) > 0 if mask is None else mask):
            item = pyro.sample("item", dist.Normal(mean, 1.0))
            pyro.deterministic("twice", 2 * item)
            pyro.sample("x", dist.Normal(item, 1.0), obs=x)


def groups_evidence(x, mask=None):
    mask = torch.ones(x.shape) > 0 if mask is None else mask
    rows = [dist.MultivariateNormal(torch.zeros(k := int(m.sum())), torch.ones(k, k) + 2 * torch.eye(k)) for m in mask]
    return torch.stack([row.log_prob(datum[m]) for row, datum, m in zip(rows, x, mask, strict=True)])


def moving_support(x):
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.Uniform(0.0, 2.0))
        z = pyro.sample("z", dist.Uniform(0.0, top))
        pyro.sample("x", dist.Bernoulli(z / 2), obs=x)


def proportions(x):
    with pyro.plate("data", len(x)):
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([0.5, 1.0, 2.0])))
        pyro.sample("x", dist.Multinomial(4, p), obs=x)


def some(rows):
    return torch.tensor(rows, dtype=torch.float64)


GAPS = torch.tensor([[True, True, False], [True, False, True], [True, True, True]])
ITEMS = some([[0.5, 1.5, -1.0], [2.0, 0.0, 1.0], [-1.0, -2.0, 0.5]])
COUNTS = some([[0, 1, 0], [3, 2, 5], [9, 4, 6]])
FOUR = some([[4, 0, 0], [1, 1, 2], [0, 3, 1]])
MODELS = {
    "constrained": (gamma_poisson, COUNTS, gamma_poisson_evidence(COUNTS)),
    "two sites": (two_sites, some([0.3, -2.0]), dist.Normal(some(0.0), 1.5).log_prob(some([0.3, -2.0]))),
    "nested plates": (groups, ITEMS, groups_evidence(ITEMS)),
    "mask": (groups, (ITEMS, {"mask": GAPS}), groups_evidence(ITEMS, GAPS)),
    "support that depends on another site": (moving_support, some([0, 1]), some([0.75, 0.25]).log()),
    "simplex": (
        proportions,
        FOUR,
        dist.DirichletMultinomial(some([0.5, 1.0, 2.0]), 4.0).log_prob(FOUR),
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_the_weights_are_unbiased_in_models_of_other_forms(case):
    model, data, exact = MODELS[case]
    assert_unbiased(short(model, data).log_weight, exact)


def test_a_constrained_site_from_a_guide():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal((x.mean(1) + 0.5).log(), 0.7))

    estimate = short(gamma_poisson, COUNTS, guide=guide, num_temperatures=2)
    assert_unbiased(estimate.log_weight, gamma_poisson_evidence(COUNTS))


def test_a_sandwich_of_nested_plates_and_keyword_data():
    def model(x=None, *, num_data=None, offset):
        with pyro.plate("data", num_data or len(x), dim=-2):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            with pyro.plate("items", 3, dim=-1):
                rate = pyro.sample("rate", dist.Gamma(2.0, mean.exp()))
                return pyro.sample("x", dist.Normal(rate + offset[:, None], 0.7), obs=x)

    bounds = sandwich(model, 9, offset=torch.arange(9.0), num_temperatures=30, leapfrog_steps=3, progress=False)
    assert abs(float(bounds.gap)) < 0.5 + 4 * bounds.gap.standard_error_draws
    assert bounds.per_datum.shape == (2, 9)


def test_the_families_and_priors_of_the_library():
    """A mixture prior, and an amortised guide whose density is a flow's, agree."""
    torch.manual_seed(0)
    from pyro_vae.guides import families

    model = VAE((6,), prior=priors.GaussianMixture(2, 3), decoder=MLP((8,))).double()
    guide = AmortizedGuide(model, encoder=MLP((8,)), family=families.RealNVP(2, hidden=(8,))).double()
    x = torch.rand(4, 6).round()
    options = {"num_chains": 300, "num_temperatures": 6, "leapfrog_steps": 3, "progress": False}
    one, other = annealed(model, x, **options), annealed(model, x, guide=guide, **options)
    error = math.hypot(one.log_evidence.standard_error_draws, other.log_evidence.standard_error_draws)
    assert 0 < error < 0.1
    assert float(one) == pytest.approx(float(other), abs=4 * error)


# ------------------------------------------------------------ how it runs


def test_memory_is_bounded_and_every_chain_counts(linear, monkeypatch):
    model, x = linear
    calls, compute = [], annealing._Path.__call__

    def counted(path, batch, u, t):
        calls.append(u.shape[0] * u.shape[1])
        return compute(path, batch, u, t)

    monkeypatch.setattr(annealing, "MAX_ELEMENTS", 4_000)
    monkeypatch.setattr(annealing._Path, "__call__", counted)
    for num_chains in (2, 10):
        calls.clear()
        options = {"num_chains": num_chains, "num_temperatures": 3, "leapfrog_steps": 2, "progress": False}
        estimate = annealed(model, x[:3], **options)
        assert max(calls) * 1_000 <= 4_000
        assert bool(estimate.log_weight.isfinite().all()) and estimate.log_weight.unique().numel() == 3 * num_chains


def test_compiled_chains_are_the_same(linear, recorded):
    model, x = linear
    options = {"num_chains": 4, "num_temperatures": 3, "leapfrog_steps": 1, "progress": False}
    guide = posterior_guide(model, x, 0.3)
    eager, compiled = (annealed(model, x, guide=guide, compile=c, **options) for c in (False, True))
    torch.testing.assert_close(compiled.log_weight, eager.log_weight, rtol=1e-8, atol=1e-8)


def test_nothing_is_left_behind():
    def model(x=None, *, num_data=None):
        location = pyro.param("location", torch.zeros(2))
        with pyro.plate("data", num_data or len(x)):
            z = pyro.sample("z", dist.Normal(location, 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(network(z), 1.0).to_event(1), obs=x)

    network = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)).double()
    pyro.param("location", torch.ones(2))
    random_state, store = torch.get_rng_state(), pyro.get_param_store().get_state()
    module = VAE((3,), latent_dim=2, decoder=nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Unflatten(-1, (1, 3))))
    module.decoder[0].eval()
    modes = [part.training for part in module.modules()]
    torch.set_rng_state(random_state)
    options = {"num_chains": 1, "num_temperatures": 2, "leapfrog_steps": 1, "progress": False}
    results = [annealed(model, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), **options)]
    results += [sandwich(module.double(), 4, **options), annealed(module, torch.ones(4, 3), **options)]
    assert torch.equal(torch.get_rng_state(), random_state)
    now = pyro.get_param_store().get_state()
    assert now["params"].keys() == store["params"].keys()
    assert torch.equal(pyro.param("location"), torch.ones(2)) and pyro.param("location").requires_grad
    assert [part.training for part in module.modules()] == modes
    for parameter in [*module.parameters(), pyro.param("location").unconstrained(), *network.parameters()]:
        assert parameter.requires_grad and parameter.grad is None
    assert torch.is_grad_enabled() and not results[0].log_weight.requires_grad
    again = annealed(module, torch.ones(4, 3), **options)
    assert torch.equal(again.log_weight, results[2].log_weight)
    other = annealed(module, torch.ones(4, 3), seed=1, **options)
    assert not torch.equal(other.log_weight, results[2].log_weight)


# ------------------------------------------------------------ what is refused


def sampled(distribution, **plate):
    def model(x):
        with pyro.plate("data", len(x), **plate):
            z = pyro.sample("z", distribution)
            mean = z if z.dim() <= x.dim() else z.sum(-1)
            pyro.sample("x", dist.Normal(0 * mean, 1.0), obs=x[:2] if plate else x)

    return model


def global_site(x):
    scale = pyro.sample("scale", dist.Gamma(1.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, scale), obs=x)


def observed_alone(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def subsampled(x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 5, subsample_size=2, dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, None])


def guide_of(*names, of=dist.Normal, infer=None):
    def guide(x):
        with pyro.plate("data", len(x)):
            for name in names:
                pyro.sample(name, of(torch.zeros(()), *([1.0] if of is dist.Normal else [])), infer=infer or {})

    return guide


def auxiliary(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(a, 1.0))


def gamma_z(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(1.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


NORMAL = sampled(dist.Normal(0.0, 1.0))
REFUSED = {
    "no chains": (NORMAL, {"num_chains": 0}, r"num_chains to be a positive whole number, got 0"),
    "no temperatures": (NORMAL, {"num_temperatures": 0}, r"num_temperatures to be a positive whole number, got 0"),
    "no steps": (NORMAL, {"leapfrog_steps": 0}, r"leapfrog_steps to be a positive whole number, got 0"),
    "discrete": (sampled(dist.Bernoulli(0.5)), {}, r'got "z", Bernoulli, which is discrete: sum it out'),
    "no density": (sampled(dist.Delta(torch.zeros(()))), {}, r'got "z", Delta, which has no density'),
    "angle": (sampled(dist.VonMises(0.0, 1.0)), {}, r'got "z", VonMises, an angle: sample a vector'),
    "sphere": (sampled(dist.ProjectedNormal(torch.ones(3))), {}, r"on Sphere, which biject_to does not know: sample"),
    "global": (global_site, {}, r'inside the plate "data", got "scale" outside.*or give its value'),
    "nothing latent": (observed_alone, {}, r"expected latent sites, got none"),
    "rows drawn by the plate": (
        sampled(dist.Normal(0.0, 1.0), subsample_size=2),
        {},
        r'plate "data" of all rows, got 2 of its 4 rows',
    ),
    "items drawn by a plate": (subsampled, {}, r'all elements of plate "items" in every call, got 2 of 5'),
    "site missing in the guide": (NORMAL, {"guide": guide_of()}, r'in the guide, got "z" in the model alone'),
    "auxiliary site": (NORMAL, {"guide": auxiliary}, r'auxiliary site "a", which would have to be integrated out'),
    "guide without a density": (NORMAL, {"guide": guide_of("z", of=dist.Delta)}, r'got "z", Delta, which has no'),
    "guide off the support": (gamma_z, {"guide": guide_of("z")}, r"in the supports of the model's sites \['z'\], got"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(case):
    model, options, message = REFUSED[case]
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        annealed(model, torch.ones(4), **{"num_chains": 2, "num_temperatures": 2, "progress": False, **options})
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_data():
    model = VAE((3,), latent_dim=2).double()
    with pytest.raises(ValueError, match="support of its Bernoulli likelihood.*binarise the data"):
        annealed(model, torch.full((4, 3), 0.5), num_temperatures=2, progress=False)
    with pytest.raises(ValueError, match="expected num_data to be a positive whole number, got 0"):
        sandwich(model, 0)
    with pytest.raises(ValueError, match="a model that returns the data it draws, got NoneType: return x"):
        sandwich(lambda num_data: None, 3)
    with pytest.raises(ValueError, match="annealing to be a positive whole number, got 0"):
        evaluate(model, AmortizedGuide(model).double(), torch.ones(4, 3), annealing=0)


# ------------------------------------------------------------ beside the bound of evaluate


def test_evaluate_with_annealing(linear):
    model, x = linear
    guide = AmortizedGuide(model, encoder=nn.Flatten()).double()
    plain = evaluate(model, guide, x, num_samples=5, progress=False)
    assert plain.annealed is None and "annealed" not in plain.table() and "annealed" not in str(plain)
    scores = evaluate(model, guide, x, num_samples=5, annealing=10, progress=False)
    assert scores.elbo == plain.elbo and list(scores.table()) == [
        "elbo",
        "log_evidence",
        "annealed",
        "kl",
        "ess",
        "khat",
    ]
    assert f"annealed  {scores.annealed}" in str(scores)
    exact = model.log_evidence(x).mean().item()
    assert float(scores.annealed) == pytest.approx(exact, abs=4 * scores.annealed.standard_error_draws)
    assert scores.per_datum["annealed"].mean().item() == pytest.approx(float(scores.annealed))


def test_a_standardised_table_is_scored_in_its_units(tmp_path):
    import numpy as np

    np.save(tmp_path / "table.npy", np.random.default_rng(0).normal(5.0, 20.0, size=(100, 3)))
    test = load_dataset(tmp_path / "table.npy").test
    model = LinearVAE.maximum_likelihood(test.x, 1)
    scores = evaluate(model, AmortizedGuide(model), test, num_samples=2, annealing=10, progress=False)
    exact = model.log_evidence(test.x).mean().item() + test.log_jacobian
    assert abs(test.log_jacobian) > 5
    assert float(scores.annealed) == pytest.approx(exact, abs=4 * scores.annealed.standard_error_draws)


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(annealing, "FIRST_MOVES", 1)
    monkeypatch.setattr(annealing, "PILOT_MOVES", 1)
    torch.set_default_dtype(torch.float32)
    digits = load_dataset("digits")
    model = LinearVAE(digits.event_shape, 2)
    fit(model, AmortizedGuide(model, encoder=nn.Flatten()), digits.train, epochs=1, out="run", progress=False)
    line = ["evaluate", "run", "--num_samples", "2", "--annealing"]
    assert main([*line, "2", "--out", "scores.json"]) == 0
    written = json.loads(Path("scores.json").read_text())
    assert written["annealed"].keys() == {"value", "standard_error"}
    assert f"annealed  {written['annealed']['value']:.2f} ± " in capsys.readouterr().out
    assert main([*line, "0"]) == 2
    assert "expected --annealing >= 1, got 0" in capsys.readouterr().err


# ------------------------------------------------------------ too few temperatures


def in_fifty_dimensions(scale, noise=1.0, rows=8):
    """z ~ N(0, I) in 50 dimensions, x ~ N(W z, noise^2 I) in 50; data of the model's own, and ln p of each."""
    draws = torch.Generator().manual_seed(0)
    W = scale * torch.randn(50, 50, generator=draws)
    x = torch.randn(rows, 50, generator=draws) @ W.mT + noise * torch.randn(rows, 50, generator=draws)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(50), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W.mT, noise).to_event(1), obs=x)

    of_x = dist.MultivariateNormal(torch.zeros(50), W @ W.mT + noise**2 * torch.eye(50))
    return model, x, of_x.log_prob(x)


QUICK = {"leapfrog_steps": 3, "progress": False, "compile": False}


@pytest.mark.parametrize(("scale", "num_temperatures"), [(1.0, 16), (1.0, 64), (0.15, 4), (0.15, 10), (0.1, 10)])
def test_too_few_temperatures_are_told(scale, num_temperatures):
    """The estimate is low by 0.5 to 100 nats, more than its standard error; the interval holds the truth."""
    model, x, exact = in_fifty_dimensions(scale)
    with pytest.warns(annealing.AnnealingWarning, match="too few temperatures: log p"):
        found = annealed(model, x, num_temperatures=num_temperatures, **QUICK)
    low, high = found.interval
    assert float(found) + found.log_evidence.standard_error_draws < float(exact.mean())
    assert low < float(exact.mean()) < high
    assert found.too_few
    assert f"too few temperatures: log p(x) may be anything up to {high:.2f}" in str(found)
    if scale == 1.0:
        assert float(exact.mean()) - float(found) > 20
        assert found.moved
        assert found.change.value > 10 * found.change.standard_error_draws


def test_temperatures_enough_are_right_without_a_warning():
    model, x, exact = in_fifty_dimensions(0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = annealed(model, x, num_temperatures=40, num_chains=32, **QUICK)
    assert float(found) == pytest.approx(float(exact.mean()), abs=3 * found.log_evidence.standard_error_draws)
    assert found.log_evidence.standard_error_draws < 0.1
    assert found.interval[0] < float(exact.mean()) < found.interval[1]
    assert not found.moved and not found.too_few and "too few" not in str(found)
    assert found.ess > 16 and found.log_weight_variance < 1


def test_what_the_chains_tell(linear):
    """Each number by its formula; half the temperatures are every other one of them; the check changes no draw."""
    model, x = linear
    found = annealed(model, x, num_chains=64, num_temperatures=9, **QUICK)
    w = found.log_weight.exp()
    assert found.ess == pytest.approx(float((w.sum(0).square() / w.square().sum(0)).mean()))
    assert found.log_weight_variance == pytest.approx(float(found.log_weight.var(0).mean()))
    largest = found.log_weight.topk(14, dim=0).values  # min(64 / 5, 3 sqrt(64)) and the threshold
    assert found.khat == pytest.approx(float(generalized_pareto_shape(largest).mean()))
    assert found.change.value == pytest.approx(float(found.log_evidence) - float(found.halved))
    assert found.change.standard_error_draws >= found.log_evidence.standard_error_draws
    assert float(found.halved) == pytest.approx(model.log_evidence(x).mean().item(), abs=0.2)
    assert math.isnan(annealed(model, x, num_chains=63, num_temperatures=2, **QUICK).khat)
    assert annealing._Chains(3, 9, 1).every_other == [0, 2, 4, 6, 8, 9]
    assert annealing._Chains(3, 4, 1).every_other == [0, 2, 4]
    one = annealed(model, x, num_temperatures=1, num_chains=100, **QUICK)
    assert one.change is None and one.halved is None and not one.moved
    single = annealed(model, x, num_temperatures=4, num_chains=1, **QUICK)
    assert math.isnan(single.log_weight_variance) and single.ess == 1.0 and not single.too_few
    assert single.interval == (float(single), float(single)) or single.moved


def test_the_tail_of_many_chains_is_told():
    """The posterior is far narrower than the prior: khat of the chains is above 0.7."""
    model, x, _ = in_fifty_dimensions(0.3)
    with pytest.warns(annealing.AnnealingWarning):
        found = annealed(model, x, num_chains=64, num_temperatures=3, **QUICK)
    assert found.khat > 0.7 and "khat of the chains" in str(found)


def test_scores_of_a_pair_tell_of_too_few_temperatures():
    model, x, exact = in_fifty_dimensions(1.0)
    guide = AmortizedGuide(model, encoder=nn.Identity())
    with pytest.warns(annealing.AnnealingWarning):
        scores = evaluate(model, guide, x, num_samples=5, annealing=8, progress=False)
    assert scores.annealing.interval[1] > float(exact.mean()) > float(scores.annealed) + 20
    assert "too few temperatures: log p(x) may be anything up to" in str(scores)


def test_a_sandwich_tells_the_same_of_both_directions():
    model = LinearVAE((3,), 2).double()
    found = sandwich(model, 20, num_temperatures=6, **QUICK)
    assert all(0 < each < 5 for each in found.log_weight_variance)
    assert all(1 < each <= 16 for each in found.ess)


def test_rounding_moves_no_estimate(linear):
    """From the exact posterior all weights are p(x), but for rounding."""
    model, x = linear
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (x, x[:1]):
            found = annealed(model, rows, guide=posterior_guide(model, rows), num_temperatures=4, **QUICK)
            assert not found.moved and not found.too_few
            assert float(found) == pytest.approx(model.log_evidence(rows).mean().item(), abs=1e-9)
