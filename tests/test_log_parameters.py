"""Moments, draws, divergences and graphs of the distributions that are given by logits or logarithms."""

import mpmath
import pyro
import pyro.distributions as dist
import pytest
import torch
from mpmath import mp, mpf
from scipy import stats
from test_likelihood_values import LIKELIHOODS, TOLERANCE
from torch.distributions import kl_divergence
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.distributions.continuous import ContinuousBernoulli, Dirichlet, Gamma, Laplace, Normal, StudentT
from pyro_vae.distributions.discrete import Bernoulli, Binomial, Categorical, NegativeBinomial, Poisson
from pyro_vae.models import likelihoods

LOGITS = (-1e4, -50.0, -3.0, -0.5, -0.4, -1e-3, -1e-8, 0.0, 1e-4, 0.5, 7.0, 1e4)
EACH_DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])


@EACH_DTYPE
@mpmath.workdps(80)
def test_continuous_bernoulli_moments(dtype):
    """Mean, variance and entropy are derivatives of ``A(l) = ln((e^l - 1) / l)``."""
    for value in LOGITS:
        logit = torch.tensor(value, dtype=dtype, requires_grad=True)
        l = mpf(logit.item())  # noqa: E741
        p = ContinuousBernoulli(logits=logit)
        if l:
            mean = 1 / -mp.expm1(-l) - 1 / l
            variance = 1 / l**2 - mp.exp(-l) / mp.expm1(-l) ** 2
            entropy = mp.log(mp.expm1(l) / l) - l * mean
        else:
            mean, variance, entropy = mpf(1) / 2, mpf(1) / 12, mpf(0)
        for found, exact in ((p.mean, mean), (p.variance, variance), (p.entropy(), entropy)):
            assert abs(found.item() - exact) < TOLERANCE[dtype], (value, found.item(), exact)
        for found, exact in ((p.mean, variance), (p.entropy(), -l * variance)):
            (gradient,) = torch.autograd.grad(found, logit)
            assert abs(gradient.item() - exact) < TOLERANCE[dtype], (value, gradient.item(), exact)


@EACH_DTYPE
@mpmath.workdps(80)
def test_continuous_bernoulli_quantiles_and_their_gradients(dtype):
    """``F^{-1}(u) = ln(1 + u (e^l - 1)) / l``; draws at every logit have finite gradients."""
    for value in LOGITS:
        logit = torch.tensor(value, dtype=dtype, requires_grad=True)
        p, l = ContinuousBernoulli(logits=logit), mpf(logit.item())  # noqa: E741
        for u in (0.0, 1e-6, 0.25, 0.5, 0.9375, 1.0):
            x = p.icdf(torch.tensor(u, dtype=dtype))
            u = mpf(torch.tensor(u, dtype=dtype).item())
            exact = mp.log1p(u * mp.expm1(l)) / l if l and u < 1 else u
            assert abs(x.item() - exact) < TOLERANCE[dtype], (value, u)
            if 0 < u < 1:
                slope = (mp.exp(-l * exact) - 1) / (mp.exp(-l) - 1) / l - exact / l if l else u * (1 - u) / 2
                (gradient,) = torch.autograd.grad(x, logit)
                assert abs(gradient.item() - slope) < TOLERANCE[dtype], (value, u)
                assert abs(value) > 100 or abs(p.cdf(x.detach()).item() - u) < 1e-4
        torch.manual_seed(0)
        draws = p.rsample((1000,))
        (gradient,) = torch.autograd.grad(draws.sum(), logit)
        assert bool(draws.isfinite().all()) and bool(gradient.isfinite()) and draws.dtype is dtype
        assert bool(p.support.check(draws).all())
        assert float((draws.mean() - p.mean).detach().abs()) < 4 * float(p.stddev.detach()) / 1000**0.5 + 1e-6


@EACH_DTYPE
@mpmath.workdps(60)
def test_continuous_bernoulli_divergence(dtype):
    for a in (-1e4, -2.0, 0.0, 0.3, 1e4):
        for b in (-1e3, 0.0, 5.0):
            p, q = (ContinuousBernoulli(logits=torch.tensor(logit, dtype=dtype)) for logit in (a, b))
            exact = (mpf(a) - b) * mean_of(mpf(a)) - normaliser(mpf(a)) + normaliser(mpf(b))
            assert abs(kl_divergence(p, q).item() - exact) < TOLERANCE[dtype] * (1 + abs(exact))


def mean_of(l):  # noqa: E741
    return 1 / -mp.expm1(-l) - 1 / l if l else mpf(1) / 2


def normaliser(l):  # noqa: E741
    return mp.log(mp.expm1(l) / l) if l else mpf(0)


MOMENTS = {
    "Bernoulli": (Bernoulli(logits=torch.tensor(-20.0)), stats.bernoulli(float(1 / (1 + mp.exp(20))))),
    "Binomial": (Binomial(50, torch.tensor(0.3)), stats.binom(50, float(1 / (1 + mp.exp(-0.3))))),
    "Poisson": (Poisson(torch.tensor(2.0)), stats.poisson(float(mp.exp(2)))),
    "NegativeBinomial": (
        NegativeBinomial(torch.tensor(2.0), torch.tensor(-1.0)),
        stats.nbinom(float(mp.exp(-1)), float(1 / (1 + mp.exp(3)))),
    ),
    "Normal": (Normal(torch.tensor(1.0), torch.tensor(-2.0)), stats.norm(1, float(mp.exp(-2)))),
    "Laplace": (Laplace(torch.tensor(1.0), torch.tensor(2.0)), stats.laplace(1, float(mp.exp(2)))),
    "StudentT": (
        StudentT(torch.tensor(2.0), torch.tensor(1.0), torch.tensor(-1.0)),
        stats.t(1 + float(mp.exp(2)), 1, float(mp.exp(-1))),
    ),
    "Gamma": (
        Gamma(torch.tensor(1.0), torch.tensor(2.0), torch.float32),
        stats.gamma(float(mp.e), scale=float(mp.exp(-2))),
    ),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_and_draws_are_scipys(name):
    p, theirs = MOMENTS[name]
    assert p.mean.item() == pytest.approx(theirs.mean(), rel=1e-5)
    assert p.variance.item() == pytest.approx(theirs.var(), rel=1e-5)
    torch.manual_seed(0)
    wide = p.expand((5, 4000))
    assert type(wide) is type(p) and wide.batch_shape == (5, 4000)
    draws = wide.sample()
    assert draws.dtype is torch.float32
    assert abs(draws.mean().item() - theirs.mean()) < 5 * theirs.std() / 20_000**0.5
    torch.testing.assert_close(wide.log_prob(draws)[0, :9], p.log_prob(draws[0, :9]))


def test_draws_of_large_counts():
    torch.manual_seed(0)
    for p in (
        Poisson(torch.tensor(20.0)),
        Binomial(10**9, torch.tensor(0.0)),
        NegativeBinomial(torch.tensor(20.0), torch.tensor(30.0)),
        NegativeBinomial(torch.tensor(20.0), torch.tensor(80.0)),
    ):
        draws = p.expand((4000,)).sample().double()
        assert float((draws.mean() - p.mean).abs()) < 5 * float(p.variance) ** 0.5 / 4000**0.5 + 64
        assert float(draws.var() / p.variance) == pytest.approx(1, abs=0.15)
    for p in (Poisson(torch.tensor(-1e4)), NegativeBinomial(torch.tensor(0.0), torch.tensor(-1e4))):
        assert p.sample().item() == 0
    for rate in (40.0, 80.0):  # beyond the integers that torch draws
        assert Poisson(torch.tensor(rate)).sample().log().item() == pytest.approx(rate, abs=1e-5)
    assert Poisson(torch.tensor(1e4)).sample().item() == torch.inf
    assert Binomial(7, torch.tensor(1e4)).sample().item() == 7


def test_student_tends_to_the_normal():
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    t, normal = StudentT(torch.tensor(100.0), 0 * x, 0 * x), dist.Normal(0 * x, 1.0)
    torch.testing.assert_close(t.log_prob(x), normal.log_prob(x), rtol=1e-14, atol=1e-14)
    torch.manual_seed(0)
    draws = StudentT(torch.tensor(1e4), torch.zeros(5000), torch.tensor(0.0)).sample()
    assert draws.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_missing_and_masked_values_have_no_gradient(name):
    """Exactly 0, and not NaN, whatever the decoder says of them."""
    row = LIKELIHOODS[name]
    if name == "Missing":
        return
    likelihood = likelihoods.Missing(row.make()).bind((2,))
    for x, output, own in row.points(80.0)[::7]:
        for parameter, value in zip(row.own, own, strict=True):
            torch.nn.init.constant_(getattr(likelihood.likelihood, parameter), value)
        outputs = torch.tensor(output)[:, None].expand(-1, 2).clone().requires_grad_()
        log_p = likelihood(outputs).log_prob(torch.tensor([torch.nan, x]))
        (gradient,) = torch.autograd.grad(log_p, outputs)
        assert bool((gradient[:, 0] == 0).all()), (x, output, own, gradient)
        plain = likelihood.likelihood(outputs).mask(torch.tensor(False))
        (gradient,) = torch.autograd.grad(plain.log_prob(torch.full((2,), x)).sum(), outputs)
        assert bool((gradient == 0).all())


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_graph_holds_the_density(name):
    """It is recorded without a read of the host, and on the meta device too, where no tensor of the CPU enters."""
    row = LIKELIHOODS[name]
    likelihood = row.make().bind((3,))
    parameters, x = torch.zeros(5, likelihood.num_parameters, 3), torch.ones(5, 3)

    def gradients(parameters, x):
        parameters = parameters.detach().requires_grad_()
        log_p = likelihood(parameters).log_prob(x)
        return log_p, *torch.autograd.grad(log_p.sum(), [parameters, *likelihood.parameters()])

    with pyro.validation_enabled(False):
        graph = make_fx(gradients)(parameters, x)
        for found, wanted in zip(graph(parameters + 0.3, 0 * x), gradients(parameters + 0.3, 0 * x), strict=True):
            torch.testing.assert_close(found, wanted)
        likelihood.to("meta")
        for dtype in (torch.float32, torch.uint8):
            found = gradients(parameters.to("meta"), x.to("meta", dtype))
            assert {each.device.type for each in found} == {"meta"}


def test_categorical_is_normalised_and_expands():
    p = Categorical(torch.tensor([[1e4, 1e4 - 1, -1e4], [0.0, 1.0, 2.0]]))
    torch.testing.assert_close(p.logits.exp().sum(-1), torch.ones(2))
    assert p.expand((4, 2)).log_prob(torch.zeros(4, 2, dtype=torch.uint8)).shape == (4, 2)
    assert p.enumerate_support().shape == (3, 2)
    exact = -mp.log(1 + mp.e + mp.e**2)
    assert p.log_prob(torch.tensor([True, False]))[1].item() == pytest.approx(float(exact), 1e-5)
    with pytest.raises(ValueError, match="within the support"):
        Categorical(torch.zeros(3), validate_args=True).log_prob(torch.tensor(3))


def test_dirichlet_draws_and_expands():
    p = Dirichlet(torch.tensor([1.0, 2.0]).log(), torch.float32)
    z = p.expand((7,)).rsample()
    assert z.shape == (7, 2) and z.dtype is torch.float32 and p.has_rsample
    assert p.mean.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert kl_divergence(p, p).item() == 0
    boundary = Dirichlet(torch.zeros(2), torch.float32).log_prob(torch.tensor([0.0, 1.0]))  # uniform up to the end
    assert boundary.item() == pytest.approx(0, abs=1e-6)
