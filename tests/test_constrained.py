"""Draws on constrained supports are scored from the numbers over the reals that they are made from."""

import copy
import pickle

import mpmath
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import biject_to, constraints

from pyro_vae import CompiledSVI, evaluate, fit
from pyro_vae.annealing import annealed
from pyro_vae.distributions import Constrained, Remembered
from pyro_vae.estimators import ELBO, IWAE, STL, DReG
from pyro_vae.guides import AmortizedGuide
from pyro_vae.models import VAE, likelihoods, priors

mp = mpmath.mp.clone()
mp.dps = 60


def positive(u):
    return [(u, None)], u


def unit(u):
    log, log1m = -mp.log1p(mp.exp(-u)), -mp.log1p(mp.exp(u))
    return [(log, log1m)], log + log1m


def shares(us):
    """Logarithms of a broken stick's parts, and of the Jacobian."""
    rest, ladj, logs, K = mp.mpf(0), mp.mpf(0), [], len(us)
    for i, u in enumerate(us):
        x = u - mp.log(K - i)
        log, left = -mp.log1p(mp.exp(-x)), -mp.log1p(mp.exp(x))
        logs.append(rest + log)
        ladj += rest + log + left
        rest += left
    return [*logs, rest], ladj


def gamma(a, rate):
    return lambda log, _: (a - 1) * log - rate * mp.exp(log) + a * mp.log(rate) - mp.loggamma(a)


def beta(a, b):
    return lambda log, log1m: (a - 1) * log + (b - 1) * log1m + mp.loggamma(a + b) - mp.loggamma(a) - mp.loggamma(b)


def relaxed_bernoulli(temperature, logit):
    def density(log, log1m):
        x = log - log1m
        diff = logit - x * temperature
        return mp.log(temperature) + diff - 2 * mp.log1p(mp.exp(diff)) - log - log1m

    return density


def dirichlet(a):
    return lambda logs: (
        sum((ai - 1) * log for ai, log in zip(a, logs, strict=True))
        + (mp.loggamma(sum(a)) - sum(mp.loggamma(ai) for ai in a))
    )


def relaxed_categorical(temperature, probs):
    def density(logs):
        K = len(logs)
        terms = [mp.log(p) - temperature * log for p, log in zip(probs, logs, strict=True)]
        total = mp.log(sum(mp.exp(term) for term in terms))
        return mp.loggamma(K) + (K - 1) * mp.log(temperature) + sum(terms) - K * total - sum(logs)

    return density


ELEMENTWISE = {  # distribution, support, logarithms, density at them, numbers over the reals
    "Gamma": (lambda t: dist.Gamma(t(0.05), t(2.0)), positive, gamma(0.05, 2.0), (-1e4, -700, -200, -90, -3, 0, 4)),
    "Chi2": (lambda t: dist.Chi2(t(0.1)), positive, gamma(0.05, 0.5), (-1e4, -200, 0, 3)),
    "Exponential": (lambda t: dist.Exponential(t(0.5)), positive, gamma(1, 0.5), (-1e4, -200, 0, 3)),
    "LogNormal": (
        lambda t: dist.LogNormal(t(0.3), t(20.0)),
        positive,
        lambda log, _: -log - ((log - mp.mpf(0.3)) / 20) ** 2 / 2 - mp.log(20) - mp.log(2 * mp.pi) / 2,
        (-900, -200, 0, 70),
    ),
    "Beta": (lambda t: dist.Beta(t(0.05), t(0.02)), unit, beta(0.05, 0.02), (-1e4, -200, -17, 0, 17, 40, 200, 1e4)),
    "RelaxedBernoulli": (
        lambda t: dist.RelaxedBernoulli(t(0.1), logits=t(0.5)),
        unit,
        relaxed_bernoulli(0.1, 0.5),
        (-800, -200, -17, 0, 17, 200, 800),
    ),
}
SIMPLEX = {
    "Dirichlet": (lambda t: dist.Dirichlet(t([0.02, 0.1, 0.02, 3.0])), dirichlet([0.02, 0.1, 0.02, 3.0])),
    "RelaxedOneHotCategorical": (
        lambda t: dist.RelaxedOneHotCategorical(t(0.1), probs=t([0.1, 0.2, 0.3, 0.4])),
        relaxed_categorical(0.1, [0.1, 0.2, 0.3, 0.4]),
    ),
}
PLACES = ((0, 0, 0), (-200, 50, -300), (300, -300, 300), (-1e4, 1e4, -1e4), (20, 20, 20), (-95, -95, -95))


def tensor_of(dtype):
    return lambda value: torch.tensor(value, dtype=dtype)


def tolerance(dtype):
    return 1e-5 if dtype == torch.float32 else 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_densities_of_numbers(name, dtype):
    """ln p(y) + ln |dy / du| and its derivative in u, against 60 digits."""
    make, logarithms, density, places = ELEMENTWISE[name]
    p, transform = make(tensor_of(dtype)), Remembered(make(tensor_of(dtype)).support)

    def exact(u):
        [(log, log1m)], ladj = logarithms(u)
        return density(log, log1m) + ladj

    for place in places:
        u = torch.tensor(float(place), dtype=dtype, requires_grad=True)
        y = transform(u)
        assert bool(p.support.check(y)) and transform.inv(y) is u
        value = p.log_prob(y) + transform.log_abs_det_jacobian(u, y)
        (slope,) = torch.autograd.grad(value, u)
        for got, right in ((value, exact(mp.mpf(place))), (slope, mp.diff(exact, mp.mpf(place)))):
            got = float(got.detach())
            assert abs(got - right) <= tolerance(dtype) * (1 + abs(right)), (place, got, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SIMPLEX)
def test_densities_of_shares(name, dtype):
    make, density = SIMPLEX[name]
    p, transform = make(tensor_of(dtype)), Remembered(constraints.simplex)

    def exact(*us):
        logs, ladj = shares(us)
        return density(logs) + ladj

    for place in PLACES:
        u = torch.tensor([float(each) for each in place], dtype=dtype, requires_grad=True)
        y = transform(u)
        assert bool(p.support.check(y))
        value = p.log_prob(y) + transform.log_abs_det_jacobian(u, y)
        (slope,) = torch.autograd.grad(value, u)
        at = [mp.mpf(each) for each in place]
        right = exact(*at)
        value = float(value.detach())
        assert abs(value - right) <= tolerance(dtype) * (1 + abs(right)), (place, value, right)
        for i in range(len(place)):
            derivative = mp.diff(lambda v, i=i, at=at: exact(*at[:i], v, *at[i + 1 :]), at[i])
            assert abs(float(slope[i]) - derivative) <= tolerance(dtype) * (1 + abs(derivative)), (place, i)


@pytest.mark.parametrize(
    "support",
    [
        *(constraints.positive, constraints.nonnegative, constraints.unit_interval, constraints.simplex),
        *(constraints.independent(constraints.positive, 1), constraints.independent(constraints.unit_interval, 2)),
        *(constraints.interval(-1.0, 3.0), constraints.greater_than(2.0), constraints.less_than(0.0)),
        *(
            constraints.real,
            constraints.independent(constraints.simplex, 1),
            constraints.independent(constraints.simplex, 2),
        ),
    ],
    ids=str,
)
def test_the_transform_is_torchs_where_nothing_is_rounded(support):
    u = torch.randn(5, 4, 3, dtype=torch.float64)
    ours, torchs = Remembered(support), biject_to(support)
    y = ours(u)
    torch.testing.assert_close(y + 0, torchs(u))
    torch.testing.assert_close(ours.log_abs_det_jacobian(u, y), torchs.log_abs_det_jacobian(u, torchs(u)))
    torch.testing.assert_close(ours.inv(torchs(u)), u)
    assert ours.inverse_shape(ours.forward_shape(u.shape)) == u.shape


def test_such_a_tensor_is_the_plain_one_elsewhere():
    u = torch.randn(4, 3, requires_grad=True)
    y = Remembered(constraints.simplex)(u)
    assert type(y) is Constrained and isinstance(y, torch.Tensor) and y.shape == (4, 4) and y.requires_grad
    for function in (
        *(lambda y: y + 1, lambda y: 2 * y, lambda y: 1 - y.sum(), lambda y: nn.functional.linear(y, torch.ones(2, 4))),
        *(lambda y: torch.cat([y, torch.zeros(4, 1)], 1), lambda y: y.double(), lambda y: y.argmax(-1)),
        *(lambda y: torch.where(y > 0.2, y, 0.0), lambda y: y.detach(), lambda y: y.mean(0).exp(), torch.log1p),
        *(lambda y: torch.einsum("bk,bk->b", y, y), lambda y: -y, lambda y: y.clamp(0.1, 0.5), lambda y: y.clone()),
    ):
        result = function(y)
        torch.testing.assert_close(torch.as_tensor(result) + 0, function(y.__dict__["plain"]))
    assert repr(y).startswith("tensor(") and y.tolist() == y.__dict__["plain"].tolist()
    assert type(pickle.loads(pickle.dumps(y.detach()))) is torch.Tensor
    assert torch.equal(copy.deepcopy(y.detach()), y.detach())
    (gradient,) = torch.autograd.grad((y * torch.arange(4.0)).sum(), u)
    plain = biject_to(constraints.simplex)(u)
    torch.testing.assert_close(gradient, torch.autograd.grad((plain * torch.arange(4.0)).sum(), u)[0])


def test_what_moves_elements_keeps_the_logarithms():
    u = torch.full((2, 3), -300.0)
    y = Remembered(constraints.unit_interval)(u)
    for function in (
        *(lambda y: y[0], lambda y: y[..., 1], lambda y: y.unsqueeze(1), lambda y: y.expand(4, 2, 3)),
        *(
            lambda y: y.reshape(6),
            lambda y: torch.stack([y, y]),
            lambda y: torch.cat([y, y]),
            lambda y: y.transpose(0, 1),
        ),
        *(lambda y: y.movedim(0, 1), lambda y: 1 - (1 - y), lambda y: torch.flatten(y)),
    ):
        assert torch.equal(function(y).log(), torch.full_like(function(y.__dict__["plain"]), -300.0))
    assert torch.equal((1 - y).log(), torch.zeros(2, 3)) and torch.equal((-y).log1p(), torch.zeros(2, 3))
    assert torch.equal((1 - y).log1p(), torch.log(torch.tensor(2.0)).expand(2, 3))


def test_torch_compile_takes_them():
    y, net = Remembered(constraints.simplex)(torch.randn(4, 3)), nn.Linear(4, 2)
    torch.testing.assert_close(torch.compile(net, backend="eager")(y), net(y.__dict__["plain"]))


SPARSE = {
    "Dirichlet": lambda: priors.Dirichlet(10, concentration=0.02),
    "many topics": lambda: priors.Dirichlet(50, concentration=0.02),
    "Beta": lambda: dist.Beta(torch.full((5,), 0.05), torch.full((5,), 0.05)).to_event(1),
    "Gamma": lambda: priors.Gamma(5, concentration=0.05),
    "relaxed categorical": lambda: dist.RelaxedOneHotCategorical(torch.tensor(0.1), probs=torch.ones(6) / 6),
    "relaxed Bernoulli": lambda: dist.RelaxedBernoulli(torch.tensor(0.1), logits=torch.zeros(6)).to_event(1),
    "mixture of Betas": lambda: dist.Independent(
        dist.MixtureSameFamily(
            dist.Categorical(torch.ones(5, 2)),
            dist.Beta(torch.tensor([0.05, 2.0]), torch.tensor([0.5, 0.05])).expand([5, 2]),
        ),
        1,
    ),
}


def documents(dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.distributions.Multinomial(60, torch.softmax(2 * torch.randn(60, 30), -1)).sample().to(dtype)


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_priors_train_in_single_precision_as_in_double(name, tmp_path):
    bounds = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = VAE((30,), prior=SPARSE[name](), likelihood=likelihoods.Poisson()).to(dtype)
        guide, settings = AmortizedGuide(model).to(dtype), {"epochs": 8, "batch_size": 20, "progress": False}
        run = fit(model, guide, documents(dtype), out=tmp_path / str(dtype), **settings)
        bounds.append(run.history[-1]["bound"])
        scores = evaluate(model, guide, documents(dtype), num_samples=20, progress=False)
        assert torch.isfinite(scores.per_datum["log_evidence"]).all()
    assert bounds[0] == pytest.approx(bounds[1], abs=8)  # one draw each; they start at about -200


def topics(x):
    """A user's own program, with stock distributions."""
    with pyro.plate("data", len(x)):
        theta = pyro.sample("theta", dist.Dirichlet(torch.full((10,), 0.02)))
        share = pyro.sample("share", dist.Beta(0.05, 0.05))
        strength = pyro.sample("strength", dist.Gamma(0.05, 1.0))
        rate = theta @ (1 + torch.arange(300.0).view(10, 30) % 7) + (share + strength)[..., None]
        pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


LOSSES = {
    "Trace_ELBO": Trace_ELBO,
    "ELBO": ELBO,
    "IWAE": lambda: IWAE(3),
    "STL": lambda: STL(2),
    "DReG": lambda: DReG(3),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_users_program_of_sparse_sites(loss, recorded):
    """Every step is finite, and compiled steps are SVI's."""
    x, losses = documents(torch.float32), []
    for kind in (pyro.infer.SVI, CompiledSVI):
        pyro.clear_param_store()
        torch.manual_seed(0)
        guide = AmortizedGuide(topics, encoder_inputs=torch.log1p, example=((x,), {}))
        svi = kind(topics, guide, pyro.optim.Adam({"lr": 0.01}), LOSSES[loss]())
        losses.append([svi.step(x) for _ in range(12)])
    assert svi.compiled, svi.fallback_reason
    assert torch.isfinite(torch.tensor(losses)).all() and losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


def test_gradients_along_paths_in_single_precision():
    """STL and DReG differentiate at the number over the reals: in single precision they are what they are in double."""
    gradients = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = VAE((4,), prior=priors.Dirichlet(3, 0.02), likelihood=likelihoods.Poisson()).to(dtype)
        guide = AmortizedGuide(model, encoder=nn.Flatten()).to(dtype)
        for parameter in guide.parameters():
            nn.init.constant_(parameter, 0.3)
        x = torch.ones(400, 4, dtype=dtype)
        found = []
        for loss in (STL(50), DReG(50)):
            torch.manual_seed(0)
            guide.zero_grad()
            loss.loss_and_grads(model, guide, x)
            found += [p.grad.double().clone() for p in guide.parameters()]
        gradients.append(found)
    for single, double in zip(*gradients, strict=True):
        assert torch.isfinite(single).all()
        assert (single - double).norm() < 0.15 * double.norm()


def test_annealing_of_a_sparse_prior():
    """A Beta prior and a Bernoulli likelihood: ln p(x) = ln B(a + x, b + 1 - x) / B(a, b)."""

    def model(x):
        with pyro.plate("data", len(x)):
            share = pyro.sample("share", dist.Beta(torch.tensor(0.3), torch.tensor(0.6)))
            pyro.sample("x", dist.Bernoulli(probs=0.01 + 0.98 * share), obs=x)

    x = torch.tensor([0.0, 1.0])
    exact = torch.tensor([1.0 - 0.01 - 0.98 / 3, 0.01 + 0.98 / 3]).log().mean()
    estimate = annealed(model, x, num_chains=200, num_temperatures=20, leapfrog_steps=3, progress=False)
    noise = 5 * estimate.log_evidence.standard_error_draws
    assert float(estimate) == pytest.approx(float(exact), abs=noise) and noise < 0.2


@pytest.mark.parametrize("scale", [1.0, 10.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_interval_is_scored_from_the_number_over_the_reals(scale, dtype):
    """z ~ U(-2, 3), q = T(N(0, scale^2)): the ELBO is the integral of ln |dz / du| - ln 5 - ln q(u) over u."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(torch.tensor(-2.0, dtype=dtype), torch.tensor(3.0, dtype=dtype)))
            pyro.sample("x", dist.Normal(torch.zeros((), dtype=dtype), 1.0), obs=x)

    x = torch.zeros(20, dtype=dtype)
    guide = AmortizedGuide(model, example=((x,), {})).to(dtype)
    for parameter in guide.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        guide.heads["z"].heads.linear.bias[1] = torch.tensor(scale).log()
    u = torch.linspace(-12, 12, 200_001, dtype=torch.float64) * scale
    q = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), scale).log_prob(u)
    log_p = nn.functional.logsigmoid(u) + nn.functional.logsigmoid(-u)  # of U(-2, 3), with the Jacobian of 5 sigma(u)
    exact = float(torch.trapezoid(q.exp() * (log_p - q), u) + dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0)))
    found = evaluate(model, guide, x, num_samples=4000, progress=False)
    assert float(found.elbo) == pytest.approx(exact, abs=5 * found.elbo.standard_error_draws + 1e-4)


def test_what_is_written_into_is_remembered_no_longer():
    for change, right in (
        (lambda y: y.mul_(2.0), [0.0, 0.0]),
        (lambda y: y.__setitem__(0, 0.9), [-0.1053605, -0.6931472]),
    ):
        y = Remembered(constraints.unit_interval)(torch.zeros(2))
        change(y)
        torch.testing.assert_close(y.log() + 0, torch.tensor(right))
    y = Remembered(constraints.positive)(torch.tensor([1.0986123]))
    torch.testing.assert_close(y.to(torch.long).float().log(), torch.tensor([3.0]).log() * 1)


@pytest.mark.parametrize("support", [constraints.positive, constraints.simplex, constraints.interval(-1.0, 3.0)])
def test_derivatives_that_miss_the_logarithms_are_refused(support):
    """d/dy of what is computed from u has no part along y alone; along u it is whole."""
    u = torch.tensor([0.3, -0.5], dtype=torch.float64, requires_grad=True)
    y = Remembered(support)(u)
    for derivative in (
        lambda: torch.autograd.grad(y.log().sum() + y.sum(), y),
        lambda: torch.autograd.grad((y.log().sum(),), inputs=[u, y]),
        lambda: y.sum().backward(inputs=[y]),
        lambda: torch.autograd.backward([y.sum()], inputs=[y]),
        y.retain_grad,
        lambda: y.register_hook(print),
    ):
        with pytest.raises(RuntimeError, match=r"unconstrained\(support, z\)"):
            derivative()
    (found,) = torch.autograd.grad(y.square().sum(), u)
    (exact,) = torch.autograd.grad(biject_to(support)(u).square().sum(), u)
    torch.testing.assert_close(found, exact)
    leaf = y.detach().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(leaf.square().sum(), leaf)[0], 2 * y.detach())
