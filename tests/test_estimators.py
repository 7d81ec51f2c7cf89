"""Estimators against closed forms, enumeration and quadrature: the bound, and the expectation of its gradient."""

import copy
import inspect
import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide.initialization import init_to_mean
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule
from sklearn.datasets import load_digits
from torch import nn

from pyro_vae import SVI, CompiledSVI, estimators, fit
from pyro_vae.estimators import (
    CIWAE,
    ELBO,
    IWAE,
    MIWAE,
    PIWAE,
    STL,
    VIMCO,
    BetaELBO,
    Coefficients,
    ConstrainedELBO,
    DReG,
    Estimator,
    FreeBits,
    MutualInformation,
    Rate,
    Reconstruction,
    Renyi,
    ReweightedWakeSleep,
    ScoreFunction,
    WakeSleep,
)
from pyro_vae.guides import AmortizedGuide, families
from pyro_vae.log_weights import log_weights, structure_of
from pyro_vae.models import VAE, BayesianVAE, likelihoods, priors
from pyro_vae.nn import MLP
from pyro_vae.svi import latent_scale

pytestmark = pytest.mark.usefixtures("float64")
small = MLP((6,), activation="tanh")
EVERY = {  # of three draws or so
    "ELBO": lambda: ELBO(3),
    "BetaELBO": lambda: BetaELBO(4.0, 3),
    "FreeBits": lambda: FreeBits(0.1, 3),
    "ConstrainedELBO": lambda: ConstrainedELBO([Rate(at_most=0.05), Reconstruction(at_least=-1.0)], num_particles=3),
    "STL": lambda: STL(3),
    "IWAE": lambda: IWAE(3),
    "Renyi": lambda: Renyi(0.5, 3),
    "Renyi, negative": lambda: Renyi(-1.0, 3),
    "DReG": lambda: DReG(3),
    "DReG, Renyi": lambda: DReG(3, alpha=0.5),
    "CIWAE": lambda: CIWAE(0.3, 3),
    "MIWAE": lambda: MIWAE(2, 2),
    "PIWAE": lambda: PIWAE(2, 2),
    "VIMCO": lambda: VIMCO(3),
    "ScoreFunction": lambda: ScoreFunction(3),
    "ReweightedWakeSleep": lambda: ReweightedWakeSleep(3),
    "ReweightedWakeSleep, both phases": lambda: ReweightedWakeSleep(3, insomnia=0.5),
    "WakeSleep": WakeSleep,
}
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


def assert_mean_is(samples, expected, worst=4.5, precise=math.inf):
    """A z-test of the mean over the first dimension, which can tell it from a number `precise` away."""
    error = samples.std(0) / len(samples) ** 0.5
    assert bool((error < precise).all())
    assert bool(((samples.mean(0) - expected).abs() <= worst * error).all()), (samples.mean(0), expected, error)


def gradient_of(estimator, model, guide, parameters, *args):
    """Of the bound, not of the loss."""
    found = torch.autograd.grad(estimator.differentiable_loss(model, guide, *args), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else -g for p, g in zip(parameters, found, strict=True)]


# ------------------------------------------------------------ the toy of arXiv 1802.04537


class Toy:
    """z ~ N(mu, I), x | z ~ N(z, I), q = N(posterior mean + off, 2/3 I), many data with parameters of their own each,
    so that one call is as many draws of a gradient."""

    def __init__(self, rows, off=0.5, dim=1, variance=2 / 3):
        self.mu = torch.zeros(rows, dim, requires_grad=True)
        self.mean = torch.full((rows, dim), off, requires_grad=True)
        self.x, self.scale = torch.zeros(rows, dim), variance**0.5

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.mean, self.scale).to_event(1))

    def gradients(self, estimator):
        """With respect to the model's and the guide's parameter, (rows, dim) each."""
        return gradient_of(estimator, self.model, self.guide, [self.mu, self.mean], self.x)


class StickingInIWAE(IWAE):
    """STL's path inside IWAE's bound: biased."""

    def coefficients(self, log_weight):
        v = log_weight.softmax(0)
        return Coefficients(model=v, path=v, guide=None)


def test_the_gap_at_the_optimum():
    """D = 20: 0.456513 nats where 2/3 is a variance, 0.066719 where it is a scale."""
    for variance, gap in ((2 / 3, 0.456513), (4 / 9, 0.066719)):
        toy = Toy(20_000, off=0.0, dim=20, variance=variance)
        log_p = dist.Normal(0.0, 2**0.5).log_prob(toy.x).sum(-1)
        weights = log_weights(toy.model, toy.guide, (toy.x,), {}, 1)
        assert_mean_is((log_p - weights.log_weight[0]).detach(), gap, precise=0.02)


def test_gradients_of_one_draw():
    for cls, snr in ((IWAE, 0.61237), (DReG, 6**0.5), (StickingInIWAE, 6**0.5), (STL, 6**0.5)):
        gradient = Toy(200_000).gradients(cls(1))[1][:, 0]
        assert_mean_is(gradient, -1.0, precise=0.01)
        assert float(-gradient.mean() / gradient.std()) == pytest.approx(snr, abs=0.02)


@pytest.mark.parametrize("cls", [IWAE, DReG, StickingInIWAE])
def test_the_table_of_means_and_signal_to_noise(cls):
    """Means and ratios of the guide's gradient as K grows; slopes from K = 8 on."""
    limit, ratio, power = {
        IWAE: (-0.83648, 0.50603, -0.5),
        DReG: (-0.83648, 1.29002, 0.5),
        StickingInIWAE: (-0.75, 1.81485, 0.5),
    }[cls]
    Ks, ratios, scaled, errors = [8, 16, 32, 64], [], [], []
    for K in Ks:
        rows = max(10_000, int(400 * K / ratio**2)) if cls is IWAE else 20_000
        gradient = torch.cat([Toy(min(rows, 40_000)).gradients(cls(K))[1] for _ in range(-(-rows // 40_000))])[:, 0]
        ratios.append(float(gradient.mean().abs() / gradient.std()))
        scaled.append(float(gradient.mean()) * (K if cls is not StickingInIWAE else 1))
        errors.append(float(gradient.std()) / len(gradient) ** 0.5 * (K if cls is not StickingInIWAE else 1))
    slope = np.polyfit(np.log(Ks), np.log(ratios), 1)[0]
    assert slope == pytest.approx(power, abs=0.06)
    assert ratios[-1] * 64**-power == pytest.approx(ratio, rel=0.08)
    extrapolated = 2 * scaled[-1] - scaled[-2]  # the next term falls as 1/K
    assert extrapolated == pytest.approx(limit, abs=4 * math.hypot(2 * errors[-1], errors[-2]) + 0.003)


def test_the_models_gradient_gains_with_k():
    """A slope of 1/2 for the model's parameters, and the same gradient for DReG as for IWAE."""
    Ks, ratios = [8, 16, 32, 64], []
    for K in Ks:
        torch.manual_seed(K)
        gradient = Toy(40_000).gradients(IWAE(K))[0][:, 0]
        torch.manual_seed(K)
        torch.testing.assert_close(Toy(40_000).gradients(DReG(K))[0][:, 0], gradient)
        toy = Toy(40_000)
        toy.x += 1.0  # mu is no optimum then
        gradient = toy.gradients(IWAE(K))[0][:, 0]
        ratios.append(float(gradient.mean().abs() / gradient.std()))
    assert np.polyfit(np.log(Ks), np.log(ratios), 1)[0] == pytest.approx(0.5, abs=0.06)


def test_gradients_vanish_at_the_posterior_draw_by_draw():
    for estimator, vanishes in ((STL(4), True), (DReG(4), True), (DReG(4, alpha=0.5), True), (IWAE(4), False)):
        gradient = Toy(100, off=0.0, variance=0.5).gradients(estimator)[1]
        assert (float(gradient.abs().max()) < 1e-12) is vanishes
    plain = gradient_of(Trace_ELBO(), (toy := Toy(100, 0.0, variance=0.5)).model, toy.guide, [toy.mean], toy.x)[0]
    assert float(plain.abs().max()) > 0.1


@pytest.mark.parametrize("alpha", [0.5, 0.2, -0.5, 1.5])
def test_renyi_bounds_in_closed_form(alpha):
    """K = 400,000: ln p - L = ln(a/b)/2 + ln(a/s) / (2 (alpha - 1)) + alpha d^2 / (2 s), s = alpha a + (1 - alpha) b"""
    a, b, d = 0.5, 2 / 3, 0.5
    s = alpha * a + (1 - alpha) * b
    gap = math.log(a / b) / 2 + math.log(a / s) / (2 * (alpha - 1)) + alpha * d**2 / (2 * s)
    log_p = float(dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(0.0)))
    toy = Toy(4)
    bound = -Renyi(alpha, 400_000).loss(toy.model, toy.guide, toy.x) / 4
    assert log_p - bound == pytest.approx(gap, abs=0.01)


def test_renyi_goes_from_iwae_to_the_elbo():
    log_weight = torch.randn(7, 5)
    torch.testing.assert_close(Renyi(0.0, 7).bound(log_weight), IWAE(7).bound(log_weight))
    torch.testing.assert_close(Renyi(1 - 1e-7, 7).bound(log_weight), STL(7).bound(log_weight), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="expected alpha other than 1"):
        Renyi(1.0)


# ------------------------------------------------------------ discrete latents, enumerated


class Bits:
    """z in {0, 1}^d, x | z ~ N(w.z, 1); many data with the same x and logits of their own."""

    def __init__(self, rows, d=2):
        torch.manual_seed(0)
        self.d = d
        self.logits = torch.tensor([-1.0, 1.0]).repeat(rows, d // 2).requires_grad_()
        self.w = torch.tensor([1.5, -1.0]).repeat(rows, d // 2).requires_grad_()
        self.x = torch.full((rows,), 1.2)
        self.states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=d)))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.4 * torch.ones(self.d)).to_event(1))
            pyro.sample("x", dist.Normal((z * self.w).sum(-1), 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.logits).to_event(1))

    def exact(self, bound, K):
        """The expectation of a bound of K draws, over all 2^(d K), for the first datum; with autograd's graph."""
        log_q = dist.Bernoulli(logits=self.logits[0]).to_event(1).log_prob(self.states)
        log_p = dist.Bernoulli(0.4 * torch.ones(self.d)).to_event(1).log_prob(self.states)
        log_p = log_p + dist.Normal(self.states @ self.w[0], 1.0).log_prob(self.x[0])
        picks = torch.cartesian_prod(*[torch.arange(2**self.d)] * K).view(-1, K)  # (2^(d K), K)
        return (log_q[picks].sum(-1).exp() * bound((log_p - log_q)[picks].mT)).sum()


DISCRETE = {  # make, its bound, its draws
    "ELBO": (lambda: ELBO(2), lambda w: w.mean(0), 2),
    "BetaELBO is the ELBO at 1": (lambda: BetaELBO(1.0, 2), lambda w: w.mean(0), 2),
    "ScoreFunction": (lambda: ScoreFunction(2, baseline=None), lambda w: w.mean(0), 2),
    "ScoreFunction, leave one out": (lambda: ScoreFunction(3), lambda w: w.mean(0), 3),
    "IWAE": (lambda: IWAE(2), lambda w: w.logsumexp(0) - math.log(2), 2),
    "VIMCO": (lambda: VIMCO(3), lambda w: w.logsumexp(0) - math.log(3), 3),
    "Renyi": (lambda: Renyi(0.5, 2), lambda w: 2 * ((0.5 * w).logsumexp(0) - math.log(2)), 2),
    "CIWAE": (lambda: CIWAE(0.3, 2), lambda w: 0.3 * w.mean(0) + 0.7 * (w.logsumexp(0) - math.log(2)), 2),
}


TEN_BITS = {"IWAE": DISCRETE["IWAE"], "ScoreFunction": DISCRETE["ScoreFunction"]}
TEN_BITS["VIMCO"] = (lambda: VIMCO(2), DISCRETE["IWAE"][1], 2)
BITS = {f"{name}, {d} bits": (d, *case) for d, cases in ((2, DISCRETE), (10, TEN_BITS)) for name, case in cases.items()}


@pytest.mark.parametrize(("d", "make", "bound", "K"), BITS.values(), ids=BITS)
def test_scores_are_unbiased(d, make, bound, K):
    """Over all 2^(d K) draws."""
    bits = Bits(100_000, d)
    exact = [g[0] for g in torch.autograd.grad(bits.exact(bound, K), [bits.w, bits.logits])]
    found = gradient_of(make(), bits.model, bits.guide, [bits.w, bits.logits], bits.x)
    for gradient, expected in zip(found, exact, strict=True):
        assert_mean_is(gradient, expected, precise=0.01 if d == 2 else 0.03)
    assert float(exact[1].norm()) > 0.1
    losses = torch.stack([torch.tensor(-make().loss(bits.model, bits.guide, bits.x)) / len(bits.x) for _ in range(4)])
    assert losses.mean() == pytest.approx(float(bits.exact(bound, K).detach()), abs=0.02)


@pytest.mark.parametrize("d", [2, 10])
def test_the_z_test_finds_a_biased_gradient(d):
    """Straight through: the derivative of a relaxed draw in the place of the draw's."""

    class StraightThrough(Bits):
        def guide(self, x):
            with pyro.plate("data", len(x)):
                u = torch.rand_like(self.logits)
                soft = (self.logits + u.log() - (-u).log1p()).sigmoid()
                hard = (soft > 0.5).to(soft.dtype) + soft - soft.detach()
                log_q = dist.Bernoulli(logits=self.logits).log_prob(hard.detach().round())
                pyro.sample("z", dist.Delta(hard, log_q).to_event(1))

        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([d]).to_event(1).mask(False))
                log_p = (z * math.log(0.4) + (1 - z) * math.log(0.6)).sum(-1)
                pyro.factor("prior", log_p)
                pyro.sample("x", dist.Normal((z * self.w).sum(-1), 1.0), obs=x)

    bits = StraightThrough(100_000, d)
    exact = torch.autograd.grad(bits.exact(lambda w: w.mean(0), 1), bits.logits)[0][0]
    gradient = gradient_of(ELBO(), bits.model, bits.guide, [bits.logits], bits.x)[0]
    with pytest.raises(AssertionError):
        assert_mean_is(gradient, exact)


@pytest.mark.parametrize(("insomnia", "d"), [(1.0, 2), (0.3, 2), (0.0, 2), (0.5, 10)])
def test_reweighted_wake_sleep_by_enumeration(insomnia, d):
    """Its wake phases over all draws of K = 2, and its sleep phase over all dreams (x by its own draws)."""
    bits, K = Bits(100_000, d), 2
    log_q = dist.Bernoulli(logits=bits.logits[0]).to_event(1).log_prob(bits.states)
    log_p = dist.Bernoulli(0.4 * torch.ones(d)).to_event(1).log_prob(bits.states)
    log_joint = log_p + dist.Normal(bits.states @ bits.w[0], 1.0).log_prob(bits.x[0])
    picks = torch.cartesian_prod(*[torch.arange(2**d)] * K)
    v = (log_joint - log_q)[picks].softmax(-1).detach()
    chance = log_q[picks].sum(-1).exp().detach()[:, None]
    of_model = torch.autograd.grad((chance * v * log_joint[picks]).sum(), bits.w, retain_graph=True)[0][0]
    wake = torch.autograd.grad((chance * v * log_q[picks]).sum(), bits.logits, retain_graph=True)[0][0]
    sleep = torch.autograd.grad((log_p.exp() * log_q).sum(), bits.logits)[0][0]  # q does not look at x here
    estimator = ReweightedWakeSleep(K, insomnia=insomnia)
    found = gradient_of(estimator, bits.model, bits.guide, [bits.w, bits.logits], bits.x)
    assert_mean_is(found[0], of_model, precise=0.01)
    assert_mean_is(found[1], insomnia * wake + (1 - insomnia) * sleep, precise=0.01)


def test_dreams_reach_the_encoder():
    """The sleep phase fits q(z | x) to the model's own joint: for a linear Gaussian model the regression of z on x."""
    torch.manual_seed(0)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(2 * z, 1.0).to_event(1), obs=x)

    a = nn.Parameter(torch.zeros(1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a * x, 0.7).to_event(1))

    x = torch.full((200_000, 1), 50.0)  # which the dreams have nothing to do with
    gradient = gradient_of(WakeSleep(), model, guide, [a], x)[0] / len(x)  # E[(z - a x) x] / 0.49 = 2 / 0.49
    assert float(gradient) == pytest.approx(2 / 0.49, abs=0.1)
    with pytest.raises(ValueError, match='expected the values of the observed site "x" to be an argument'):
        WakeSleep().differentiable_loss(lambda x: model(2 * x), guide, x)


def test_a_learned_baseline_learns_the_bound_and_changes_no_mean():
    bits = Bits(20_000)
    estimator = ScoreFunction(1, baseline=nn.Linear(1, 1))
    bits.x = bits.x[:, None]
    model = lambda x: bits.model(x[:, 0])  # noqa: E731
    svi = pyro.infer.SVI(model, bits.guide, pyro.optim.Adam({"lr": 0.05}), estimator)
    for _ in range(200):
        svi.step(bits.x)
    b = float(estimator.baseline(bits.x[:1]).detach())
    mean = -estimator.loss(model, bits.guide, bits.x) / len(bits.x)
    assert b == pytest.approx(mean, abs=0.05)
    variances = []
    for each in (ScoreFunction(1, baseline=None), estimator):
        gradient = gradient_of(each, model, bits.guide, [bits.logits], bits.x)[0]
        variances.append(float(gradient.var(0).sum()))
        assert_mean_is(gradient, gradient_of(ScoreFunction(4), model, bits.guide, [bits.logits], bits.x)[0].mean(0), 6)
    assert variances[1] < variances[0]


# ------------------------------------------------------------ hierarchies, global latents, plates


def nodes(dimensions, count=20):
    """Gauss-Hermite nodes of so many independent standard normals, (nodes, dimensions), and their weights."""
    x, w = np.polynomial.hermite_e.hermegauss(count)
    grid = torch.tensor(np.stack(np.meshgrid(*[x] * dimensions, indexing="ij"), -1).reshape(-1, dimensions))
    weights = torch.tensor(
        np.stack(np.meshgrid(*[w / w.sum()] * dimensions, indexing="ij"), -1).reshape(-1, dimensions)
    )
    return grid, weights.prod(-1)


class TwoSites:
    """z1 ~ N(0, 1), z2 ~ N(z1, 1), x ~ N(m z2, 1); q: z1 ~ N(a x, s1^2), z2 ~ N(c z1 + d x, s2^2)."""

    start = {"m": 0.8, "a": 0.6, "s1": 0.7, "c": 0.3, "d": 0.5, "s2": 0.8}

    def __init__(self, rows):
        self.p = {name: torch.full((rows,), value, requires_grad=True) for name, value in self.start.items()}
        self.x = torch.full((rows,), 1.3)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(()), 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
            pyro.sample("x", dist.Normal(self.p["m"] * z2, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(self.p["a"] * x, self.p["s1"]))
            pyro.sample("z2", dist.Normal(self.p["c"] * z1 + self.p["d"] * x, self.p["s2"]))

    @classmethod
    def exact(cls, bound, K):
        """The gradient of a bound of K draws, by quadrature over their noise."""
        p, x = {name: torch.tensor(value, requires_grad=True) for name, value in cls.start.items()}, 1.3
        e, weights = nodes(2 * K)
        e1, e2 = e[:, :K].T, e[:, K:].T
        z1 = p["a"] * x + p["s1"] * e1
        z2 = p["c"] * z1 + p["d"] * x + p["s2"] * e2
        log_w = dist.Normal(0.0, 1.0).log_prob(z1) + dist.Normal(z1, 1.0).log_prob(z2)
        log_w = log_w + dist.Normal(p["m"] * z2, 1.0).log_prob(torch.tensor(x))
        log_w = log_w - dist.Normal(p["a"] * x, p["s1"]).log_prob(z1)
        log_w = log_w - dist.Normal(p["c"] * z1 + p["d"] * x, p["s2"]).log_prob(z2)
        return torch.stack(torch.autograd.grad((weights * bound(log_w)).sum(), [*p.values()]))


def log_mean_exp(w):
    return w.logsumexp(0) - math.log(len(w))


REPARAMETERISED = {
    "ELBO": (lambda: ELBO(1), lambda w: w.mean(0), 1),
    "STL": (lambda: STL(2), lambda w: w.mean(0), 2),
    "IWAE": (lambda: IWAE(2), log_mean_exp, 2),
    "DReG": (lambda: DReG(2), log_mean_exp, 2),
    "DReG, one by one": (lambda: DReG(2, vectorize_particles=False), log_mean_exp, 2),
    "DReG, Renyi": (lambda: DReG(2, alpha=0.5), lambda w: 2 * log_mean_exp(0.5 * w), 2),
    "CIWAE": (lambda: CIWAE(0.3, 2), lambda w: 0.3 * w.mean(0) + 0.7 * log_mean_exp(w), 2),
}


@pytest.mark.parametrize(("make", "bound", "K"), REPARAMETERISED.values(), ids=REPARAMETERISED)
def test_a_guide_of_two_sites_against_quadrature(make, bound, K):
    two = TwoSites(100_000)
    found = torch.stack(gradient_of(make(), two.model, two.guide, [*two.p.values()], two.x), -1)
    assert_mean_is(found, two.exact(bound, K), precise=0.03)


def test_piwae_trains_the_model_by_one_bound_and_the_guide_by_the_other():
    two = TwoSites(100_000)
    found = torch.stack(gradient_of(PIWAE(2, 1), two.model, two.guide, [*two.p.values()], two.x), -1)
    exact = two.exact(lambda w: w.mean(0), 2)
    exact[0] = two.exact(log_mean_exp, 2)[0]
    assert_mean_is(found, exact, precise=0.02)
    miwae = torch.stack(gradient_of(MIWAE(2, 1), two.model, two.guide, [*two.p.values()], two.x), -1)
    assert_mean_is(miwae, two.exact(lambda w: w.mean(0), 2), precise=0.02)


def test_a_biased_path_fails_the_quadrature():
    two = TwoSites(100_000)
    found = torch.stack(gradient_of(StickingInIWAE(2), two.model, two.guide, [*two.p.values()], two.x), -1)
    with pytest.raises(AssertionError):
        assert_mean_is(found, two.exact(log_mean_exp, 2))


class Global:
    """w ~ N(0, 1); z_i ~ N(w, 1); x_i ~ N(z_i, 1), two of four at a time; q: w ~ N(m, s^2), z_i ~ N(a x_i + c w, ..)"""

    start = {"m": 0.4, "s": 0.6, "a": 0.4, "c": 0.3, "t": 0.8}

    def __init__(self):
        self.p = {name: torch.tensor(value, requires_grad=True) for name, value in self.start.items()}
        self.x, self.size = torch.tensor([0.5, -1.0, 1.5, 2.0]), 2

    def model(self, x):
        w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x), subsample_size=self.size) as index:
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(self, x):
        w = pyro.sample("w", dist.Normal(self.p["m"], self.p["s"]))
        with pyro.plate("data", len(x), subsample_size=self.size) as index:
            pyro.sample("z", dist.Normal(self.p["a"] * x[index] + self.p["c"] * w, self.p["t"]))

    def exact(self, bound, K):
        """``E_q(w)[ln p(w)/q(w) + sum_i L_i(w)]`` and its gradient."""
        p = {name: torch.tensor(value, requires_grad=True) for name, value in self.start.items()}
        e, weights = nodes(1 + K, 20)
        w, e = p["m"] + p["s"] * e[:, 0], e[:, 1:].T
        total = dist.Normal(0.0, 1.0).log_prob(w) - dist.Normal(p["m"], p["s"]).log_prob(w)
        for x in self.x:
            mean = p["a"] * x + p["c"] * w
            z = mean + p["t"] * e
            log_w = dist.Normal(w, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
            total = total + bound(log_w - dist.Normal(mean, p["t"]).log_prob(z))
        value = (weights * total).sum()
        return float(value.detach()), torch.stack(torch.autograd.grad(value, [*p.values()]))


GLOBAL = {name: REPARAMETERISED[name] for name in ("ELBO", "STL", "IWAE", "DReG", "DReG, one by one")}


@pytest.mark.parametrize(("make", "bound", "K"), GLOBAL.values(), ids=GLOBAL)
def test_global_latents_are_outside_the_logarithm(make, bound, K):
    """The bound and its gradient, from batches, against quadrature over all the data."""
    case, estimator = Global(), make()
    value, exact = case.exact(bound, K)
    found, losses = [], []
    for _ in range(600):
        loss = estimator.differentiable_loss(case.model, case.guide, case.x)
        losses.append(-loss.detach())
        found.append(-torch.stack(torch.autograd.grad(loss, [*case.p.values()])))
    assert_mean_is(torch.stack(losses), value, precise=0.4)
    assert_mean_is(torch.stack(found), exact, precise=0.9)


def test_the_size_of_a_batch_does_not_change_the_mean_of_bound_or_gradient():
    """Batches of one and all four data; of two, above."""
    case, (value, exact), estimator = Global(), Global().exact(log_mean_exp, 2), DReG(2)
    for size in (1, 4):
        case.size, found, losses = size, [], []
        for _ in range(300):
            loss = estimator.differentiable_loss(case.model, case.guide, case.x)
            losses.append(-loss.detach())
            found.append(-torch.stack(torch.autograd.grad(loss, [*case.p.values()])))
        assert_mean_is(torch.stack(losses), value)
        assert_mean_is(torch.stack(found), exact)


def test_a_bayesian_decoder_is_accepted():
    model = BayesianVAE((4,), size=50, latent_dim=2, decoder=small)
    guide = AmortizedGuide(model, small, {"w": families.DiagonalNormal(initial_scale=0.05)})
    x = torch.rand(5, 4).round()
    for name, make in EVERY.items():
        if "Wake" in name:
            continue
        assert math.isfinite(make().loss_and_grads(model, guide, x)), name
    with pytest.raises(ValueError, match=r"expected local latent sites alone for ReweightedWakeSleep, got .*'w'"):
        ReweightedWakeSleep(2).differentiable_loss(model, guide, x)


def test_log_weights_end_at_the_outermost_plate_of_data():
    """Words within documents, with a topic each, some masked: one weight a document; crossed plates; time outside."""
    x, mask = torch.randn(5, 3), torch.rand(5, 3) > 0.3

    def model(x, mask):
        with pyro.plate("documents", 5, dim=-2):
            top = pyro.sample("top", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("words", 3, dim=-1), poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(top, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, mask):
        with pyro.plate("documents", 5, dim=-2):
            top = pyro.sample("top", dist.Normal(x.sum(-1, keepdim=True), 1.0))
            with pyro.plate("words", 3, dim=-1), poutine.mask(mask=mask):
                pyro.sample("z", dist.Normal(top + x, 0.5))

    structure = structure_of(model, guide, (x, mask), {})
    assert structure.plate == "documents" and structure.global_sites == () and structure.nesting == 2
    weights = log_weights(model, guide, (x, mask), {}, 4)
    top, z = weights.sites["top"].value, weights.sites["z"].value
    words = dist.Normal(top, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x) - dist.Normal(top + x, 0.5).log_prob(z)
    expected = dist.Normal(0.0, 1.0).log_prob(top) - dist.Normal(x.sum(-1, keepdim=True), 1.0).log_prob(top)
    expected = expected.squeeze(-1) + (words * mask).sum(-1)
    torch.testing.assert_close(weights.log_weight, expected)
    garbage = x.where(mask, 1e6)
    torch.manual_seed(0)
    one = IWAE(3).loss(lambda x: model(x, mask), lambda _: guide(x, mask), x)
    torch.manual_seed(0)
    assert IWAE(3).loss(lambda x: model(x, mask), lambda _: guide(x * 1.0, mask), garbage) == pytest.approx(one)


def test_a_plate_outside_the_data_is_summed():
    x = torch.randn(3, 5)

    def model(x):
        data = pyro.plate("data", 5, dim=-1)
        with data:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("time", 3, dim=-2), data:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 5, dim=-1):
            pyro.sample("z", dist.Normal(x.mean(0), 0.5))

    assert structure_of(model, guide, (x,), {}).plate == "data"
    exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(x.T).sum()  # q is near the posterior
    assert -IWAE(2_000).loss(model, guide, x) == pytest.approx(float(exact), abs=0.02)
    assert -ELBO(2_000).loss(model, guide, x) < float(exact)


def test_without_local_latents_everything_is_one_datum():
    """Bayesian regression: K draws of the weights, for all the data; subsampled, refused but by linear estimators."""
    X, y = torch.randn(6, 2), torch.randn(6)

    def model(X, y, size=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 6, subsample_size=size) as i:
            pyro.sample("y", dist.Normal((X[i] * w).sum(-1), 1.0), obs=y[i])

    def guide(X, y, size=None):
        pyro.sample("w", dist.Normal(torch.zeros(2), 0.6).to_event(1))

    exact = dist.MultivariateNormal(torch.zeros(6), torch.eye(6) + X @ X.T).log_prob(y)
    assert -IWAE(50_000).loss(model, guide, X, y) == pytest.approx(float(exact), abs=0.05)
    whole = ELBO(50_000).loss(model, guide, X, y)
    parts = [ELBO(2_000).loss(model, guide, X, y, size=3) for _ in range(100)]
    assert_mean_is(torch.tensor(parts), whole)
    with pytest.raises(
        ValueError, match='expected every plate within that of independent data to be whole, got "data"'
    ):
        IWAE(2).loss(model, guide, X, y, size=3)


def test_one_estimator_serves_several_programs():
    """Nothing of the first is kept: other plates, other arguments, a bound method."""
    estimator = IWAE(4)
    for event_shape, rows in (((4,), 5), ((4,), 7), ((1, 2, 2), 5)):
        model = VAE(event_shape, prior=priors.Hierarchical((2, 2), small), decoder=small)
        guide = AmortizedGuide(model, small)
        x = torch.rand(rows, *event_shape).round()
        torch.manual_seed(0)
        one = estimator.loss(model, guide, x)
        torch.manual_seed(0)
        assert one == IWAE(4).loss(model, guide, x)
    two = TwoSites(5)
    assert math.isfinite(estimator.loss(two.model, two.guide, two.x))
    assert math.isfinite(copy.deepcopy(estimator).loss(two.model, two.guide, two.x))


def test_what_would_be_a_wrong_number_is_refused():
    two, bits = TwoSites(4), Bits(4)

    def lacking(x):
        pyro.sample("z1", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))

    with pytest.raises(ValueError, match='expected every latent site of the model in the guide, got "z2"'):
        IWAE(2).loss(two.model, lacking, two.x)
    with pytest.raises(ValueError, match='expected sites of the guide in the model too, got "z1"'):
        IWAE(2).loss(lambda x: bits.model(x), lambda x: (bits.guide(x), lacking(x)), bits.x)
    for estimator in (STL(2), DReG(2), PIWAE(2, 2)):
        with pytest.raises(ValueError, match=r"expected latent sites that can be reparameterised .* \['z'\]"):
            estimator.differentiable_loss(bits.model, bits.guide, bits.x)

    @pyro.infer.config_enumerate
    def enumerated(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(torch.ones(2)))

    with pytest.raises(ValueError, match='got "k", which is to be summed out'):
        IWAE(2).loss(enumerated, lambda x: None, bits.x)
    for make, message in (
        (lambda: IWAE(0), "expected num_particles to be a positive whole number"),
        (lambda: VIMCO(1), "expected num_particles >= 2"),
        (lambda: ScoreFunction(1), "expected num_particles >= 2 for the leave-one-out baseline"),
        (lambda: ScoreFunction(2, "none"), "expected a module, 'leave-one-out' or None"),
        (lambda: CIWAE(2.0), "expected beta from 0 to 1"),
        (lambda: BetaELBO(-1.0), "expected beta >= 0"),
        (lambda: FreeBits(-1.0), "expected nats >= 0"),
        (lambda: ReweightedWakeSleep(2, 3.0), "expected insomnia from 0 to 1"),
        (lambda: ConstrainedELBO([]), "expected constraints, got none"),
        (lambda: ConstrainedELBO([Rate(at_most=1.0)], step_size=0.0), "expected step_size > 0"),
        (lambda: Rate(), "expected at_most=... or at_least=... of Rate, got neither"),
        (lambda: Rate(at_most=1.0, at_least=1.0), "got both"),
        (lambda: MIWAE(0, 2), "expected num_bounds to be a positive whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


# ------------------------------------------------------------ the ELBO, weighted and constrained


def test_the_analytic_divergence_is_that_of_trace_mean_field():
    model = VAE((4,), prior=priors.StandardNormal(3), decoder=small)
    guide = AmortizedGuide(model, small)
    x = torch.rand(6, 4).round()
    parameters = [*model.parameters(), *guide.parameters()]
    for weight in (1.0, 0.3):
        results = []
        for estimator in (ELBO(), TraceMeanField_ELBO()):
            torch.manual_seed(0)
            with latent_scale(weight):
                loss = estimator.differentiable_loss(model, guide, x)
            results.append([loss, *torch.autograd.grad(loss, parameters)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_the_divergence_where_masks_and_scales_differ_between_the_programs():
    """``m_q s_q E ln q - m_p s_p E ln p``: Pyro's reads the guide's alone."""
    keep = torch.tensor([True, True, False, True])

    def model(x):
        with pyro.plate("data", 4), poutine.mask(mask=keep):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]))

    def guide(x):
        with pyro.plate("data", 4), poutine.scale(scale=torch.tensor(2.0)):
            pyro.sample("z", dist.Normal(0.5, 1.0).expand([4]))

    ln_q, ln_p = -0.5 * math.log(2 * math.pi) - 0.5, -0.5 * math.log(2 * math.pi) - 0.5 * 1.25
    exact = 3 * ln_p - 2 * 4 * ln_q
    draws = torch.tensor([-ELBO(1_000).loss(model, guide, torch.zeros(4)) for _ in range(60)])
    assert_mean_is(draws, exact, precise=0.04)


def test_a_draw_in_another_order_has_no_analytic_divergence():
    """The guide draws z2 first: KL(q(z1 | z2) || p(z1)) + KL(q(z2) || p(z2 | z1)) would be another bound."""

    def model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("z2", dist.Normal(z1, 1.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(()), 2**0.5))
            pyro.sample("z1", dist.Normal(z2 / 2, 0.5**0.5))

    assert ELBO(3).loss(model, guide, torch.zeros(2)) == pytest.approx(0.0, abs=1e-12)


def test_beta_is_a_kl_weight_and_the_elbo_is_reported():
    model = VAE((4,), prior=priors.GaussianMixture(3, 4), decoder=small)
    guide = AmortizedGuide(model, small)
    x = torch.rand(6, 4).round()
    gradients = []
    for beta, weight in ((4.0, 1.0), (1.0, 4.0)):
        torch.manual_seed(0)
        with latent_scale(weight):
            loss = BetaELBO(beta).differentiable_loss(model, guide, x)
        gradients.append(torch.autograd.grad(loss, [*model.parameters(), *guide.parameters()]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    torch.manual_seed(0)
    loss = ELBO().loss(model, guide, x)
    torch.manual_seed(0)
    assert BetaELBO(4.0).loss(model, guide, x) == loss


def test_beta_weighs_the_global_sites_too():
    case, gradients = Global(), []
    case.size = 4
    for beta, weight in ((4.0, 1.0), (1.0, 4.0)):
        torch.manual_seed(0)
        with latent_scale(weight):
            gradients.append(gradient_of(BetaELBO(beta), case.model, case.guide, [*case.p.values()], case.x))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_free_bits_where_masks_differ_between_the_programs():
    """All of the KL is free: no gradient, whatever is masked."""
    location = torch.tensor([0.2, 0.1, 0.3]).requires_grad_()
    keep = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", 3), poutine.mask(mask=keep):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(location[:, None], 1.0).to_event(1))

    (gradient,) = gradient_of(FreeBits(10.0), model, guide, [location], torch.zeros(3))
    torch.testing.assert_close(gradient, torch.zeros(3))


def test_free_bits_free_the_dimensions_below():
    """KL per dimension 0.02 and 0.5: of the second alone there is a pull; of both by a site that does not factorise."""
    location, scale = torch.tensor([0.2, 1.0]).requires_grad_(), torch.ones(2).requires_grad_()

    def program(q):
        def model(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", q())

        return model, guide

    model, guide = program(lambda: dist.Normal(location, scale).to_event(1))
    x = torch.zeros(5)
    estimator = FreeBits(0.1)
    assert estimator.loss(model, guide, x) == pytest.approx(5 * (0.02 + 0.5))
    (gradient,) = gradient_of(estimator, model, guide, [location], x)
    torch.testing.assert_close(gradient, -5 * torch.tensor([0.0, 1.0]))
    model, guide = program(lambda: dist.MultivariateNormal(location, scale_tril=scale.diag()))
    (gradient,) = gradient_of(FreeBits(0.5, 20_000), model, guide, [location], x)  # its KL is 0.52
    torch.testing.assert_close(gradient, -5 * torch.tensor([0.2, 1.0]), atol=0.2, rtol=0)
    (gradient,) = gradient_of(FreeBits(0.55, 20_000), model, guide, [location], x)
    torch.testing.assert_close(gradient, torch.zeros(2))


class Digits:
    """The linear VAE of the digits along their first ten principal axes, x_i ~ N(w_i z_i, s^2), whose variances are l
    (arXiv 1911.02469): at a KL weight beta the rate is sum ln(l / (beta s^2)) / 2, the distortion
    sum min(l, beta s^2) + what the other axes hold."""

    s2 = 5.824351

    def __init__(self):
        x = torch.from_numpy(load_digits().data).double()
        x = x - x.mean(0)
        variances, axes = torch.linalg.eigh(x.mT @ x / len(x))
        self.l, self.discarded = variances[-10:], float(variances[:-10].sum())
        self.x = x @ axes[:, -10:]
        self.w = nn.Parameter((self.l - self.s2).sqrt())  # the best at beta = 1
        self.b, self.log_t = nn.Parameter(self.w.detach() / self.l.sqrt()), nn.Parameter((self.s2 / self.l).log() / 2)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.w * z, self.s2**0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.b * x / self.l.sqrt(), self.log_t.exp()).to_event(1))

    @property
    def rate(self):
        return float((self.b.square() + (2 * self.log_t).exp() - 1 - 2 * self.log_t).sum() / 2)

    @property
    def distortion(self):
        kept = (1 - self.w * self.b / self.l.sqrt()).square() * self.l + self.w.square() * (2 * self.log_t).exp()
        return float(kept.sum()) + self.discarded

    def reconstruction(self, distortion):
        """E_q[ln p(x | z)] of the ten axes."""
        return -(distortion - self.discarded) / (2 * self.s2) - 5 * math.log(2 * math.pi * self.s2)


RATES, DISTORTIONS = {1: 12.796141, 4: 5.864669, 0.5: 16.261877}, {1: 372.758, 4: 547.489, 0.5: 343.636}


@pytest.mark.parametrize(
    ("constraint", "beta", "multiplier", "step_size"),
    [
        (lambda case: Rate(at_most=RATES[4]), 4, 3.0, 0.05),
        (lambda case: Rate(at_least=RATES[0.5]), 0.5, 0.5, 0.01),
        (lambda case: Reconstruction(at_least=case.reconstruction(DISTORTIONS[0.5])), 0.5, 1.0, 0.05),
        (lambda case: Rate(at_most=RATES[1] + 0.3), 1, 0.0, 0.05),
        (lambda case: Reconstruction(at_least=case.reconstruction(DISTORTIONS[4])), 1, 0.0, 0.05),
    ],
    ids=["budget", "capacity", "reconstruction", "idle budget", "idle reconstruction"],
)
def test_constraints_come_to_the_closed_forms(constraint, beta, multiplier, step_size):
    """The multiplier is that of the KL weight whose rate is the limit; an idle one is 0, and the ELBO is back."""
    case = Digits()
    with torch.no_grad():
        assert case.rate == pytest.approx(RATES[1], abs=1e-5) and case.distortion == pytest.approx(372.758, abs=1e-3)
    loss = ConstrainedELBO([constraint(case)], step_size=step_size)
    rates = {case.w: 0.05, case.b: 0.01, case.log_t: 0.04}
    optimizer = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in rates.items()], betas=(0.9, 0.99))
    steps = 400 if multiplier else 200
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 - 2 * step / steps))
    tail = []
    for step in range(steps):
        optimizer.zero_grad()
        (loss.differentiable_loss(case.model, case.guide, case.x) / len(case.x)).backward()
        optimizer.step(), schedule.step()
        if step >= 0.675 * steps:
            tail.append(loss.multipliers.clone())
    assert float(torch.stack(tail).mean()) == pytest.approx(multiplier, abs=0.03)
    with torch.no_grad():
        assert case.rate == pytest.approx(RATES[beta], rel=0.008)
        assert case.distortion == pytest.approx(DISTORTIONS[beta], rel=0.003)
    (record,) = loss.record()["constraints"].items()
    assert record[1]["multiplier"] == float(loss.multipliers[0])


def test_multipliers_change_in_training_mode_alone():
    case, loss = Digits(), ConstrainedELBO([Rate(at_most=0.0)])
    loss.eval()
    loss.differentiable_loss(case.model, case.guide, case.x)
    loss.train()
    loss.loss(case.model, case.guide, case.x)
    assert float(loss.multipliers) == 0.0
    loss.differentiable_loss(case.model, case.guide, case.x)
    assert float(loss.multipliers) > 0.0


@pytest.mark.parametrize("constraint", [Reconstruction(at_least=-1.0), Rate(at_most=0.0)])
def test_a_step_that_is_not_taken_moves_no_multiplier(constraint):
    case, loss = Digits(), ConstrainedELBO([constraint])
    loss.differentiable_loss(case.model, case.guide, case.x)
    before = loss.multipliers.clone(), loss.values.clone()
    assert float(before[0]) > 0
    x = case.x.clone()
    x[0] = torch.nan
    with pyro.validation_enabled(False):
        loss.differentiable_loss(case.model, case.guide, x)
    assert torch.equal(loss.multipliers, before[0]) and torch.equal(loss.values, before[1])
    loss.differentiable_loss(case.model, case.guide, case.x)
    assert float(loss.multipliers) > float(before[0])


class Coded:
    """q(z | x_i) = N(m_i, s_i^2) for six data with labels, in one dimension."""

    m = torch.tensor([0.0, 0.5, 3.0, 2.0, -1.0, 0.3], dtype=torch.float64)
    s = torch.tensor([1.0, 0.5, 0.7, 1.0, 0.4, 1.2], dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 1, 2, 0])

    def model(self, x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    def guide(self, x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.m[:, None], self.s[:, None]).to_event(1))

    def exact(self, y):
        z = torch.linspace(-12, 14, 20_001)
        density = dist.Normal(self.m, self.s).log_prob(z[:, None]).exp()
        whole, total = density.mean(-1), 0.0
        for label in y.unique():
            of_class = density[:, y == label].mean(-1)
            share = (y == label).double().mean()
            total = total + share * torch.trapezoid(of_class * (of_class / whole).log().nan_to_num(), z)
        return float(total)


def test_mutual_information_is_that_of_the_batch_by_quadrature():
    case = Coded()
    x = torch.zeros(6)
    one_hot, column = torch.eye(3)[case.y], case.y[:, None]
    for label, args, kwargs in (
        (1, (case.y,), {}),
        ("y", (), {"y": case.y}),
        (1, (one_hot,), {}),
        (1, (column,), {}),
    ):
        constraint = MutualInformation("z", label, at_most=0.1)
        weights = log_weights(case.model, case.guide, (x, *args), kwargs, 40_000)
        each = constraint.each(weights)
        assert each.shape == (40_000, 6)
        assert_mean_is(each.mean(1), case.exact(case.y), precise=0.01)
    alone = log_weights(case.model, case.guide, (x, torch.arange(6)), {}, 5_000, vectorize=True)
    entropy = MutualInformation("z", 1, at_most=1.0).each(alone).mean()
    assert float(entropy) < math.log(6)
    same = log_weights(case.model, case.guide, (x, torch.zeros(6).long()), {}, 3)
    torch.testing.assert_close(MutualInformation("z", 1, at_most=1.0).each(same), torch.zeros(3, 6))


def test_data_without_labels_count_nothing_in_the_information():
    case, fewer = Coded(), Coded()
    known = torch.tensor([True, True, False, True, True, False])
    fewer.m, fewer.s, fewer.y = case.m[known], case.s[known], case.y[known]
    one_hot = torch.eye(3)[case.y].where(known[:, None], torch.nan)
    for labels in (one_hot, case.y.double().where(known, torch.nan)):
        weights = log_weights(case.model, case.guide, (torch.zeros(6), labels), {}, 40_000)
        each = MutualInformation("z", 1, at_most=0.1).each(weights)
        assert_mean_is(each.mean(1), fewer.exact(fewer.y), precise=0.01)
    weights = log_weights(case.model, case.guide, (torch.zeros(6), torch.full((6, 3), torch.nan)), {}, 5)
    assert bool((MutualInformation("z", 1, at_most=0.1).each(weights) == 0).all())


def test_mutual_information_of_batches_is_above_that_of_the_data():
    """y is a fair coin, x ~ N(2 y, 1), q = N(x, 1/4): as many of each label in a batch; it falls to the exact one."""
    z = torch.linspace(-10, 12, 20_001)
    of_class = [dist.Normal(mean, 1.25**0.5).log_prob(z).exp() for mean in (0.0, 2.0)]
    whole = sum(of_class) / 2
    exact = float(sum(torch.trapezoid(p * (p / whole).log(), z) for p in of_class) / 2)
    constraint, means = MutualInformation("z", 1, at_most=0.1), {}
    for rows, batches in ((4, 200), (64, 20)):
        values = []
        for _ in range(batches):
            y = torch.arange(rows) % 2
            x = 2.0 * y + torch.randn(rows)

            def model(x, y):
                with pyro.plate("data", len(x)):
                    pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

            def guide(x, y):
                with pyro.plate("data", len(x)):
                    pyro.sample("z", dist.Normal(x, 0.5))

            values.append(constraint.each(log_weights(model, guide, (x, y), {}, 50)).mean())
        values = torch.stack(values)
        means[rows] = float(values.mean())
        assert means[rows] > exact - 3 * float(values.std()) / batches**0.5
    assert means[4] > exact + 0.05 and means[64] == pytest.approx(exact, abs=0.05)


def test_a_loose_limit_on_the_information_is_idle():
    """c >= H(y): the multiplier is 0 at every step, and the gradient is the ELBO's."""
    case = Coded()
    case.m = nn.Parameter(case.m.clone())
    loss = ConstrainedELBO([MutualInformation("z", 1, at_most=math.log(3))], num_particles=64)
    x = torch.zeros(6)
    for _ in range(20):
        torch.manual_seed(1)
        (gradient,) = gradient_of(loss, case.model, case.guide, [case.m], x, case.y)
        torch.manual_seed(1)
        (plain,) = gradient_of(ELBO(64), case.model, case.guide, [case.m], x, case.y)
        assert torch.equal(gradient, plain) and float(loss.multipliers) == 0.0
    tight = ConstrainedELBO([MutualInformation("z", 1, at_most=0.01)], num_particles=64, step_size=1.0)
    with torch.no_grad():
        weights = log_weights(case.model, case.guide, (x, case.y), {}, 500)
        before = float(MutualInformation("z", 1, 1.0).each(weights).mean())
    optimizer = torch.optim.Adam([case.m], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        tight.differentiable_loss(case.model, case.guide, x, case.y).backward()
        optimizer.step()
    assert float(tight.multipliers) > 0 and float(tight.values) < 0.3 * before
    for label in (5, "nope"):
        unknown = ConstrainedELBO([MutualInformation("z", label, at_most=1.0)])
        with pytest.raises(ValueError, match="expected labels"):
            gradient_of(unknown, case.model, case.guide, [case.m], x)


# ------------------------------------------------------------ programs that are written in other ways


def normal_pair(x):
    """m ~ N(0, 1), z_i ~ N(m, 1), x_i ~ N(z_i, 1)."""
    m = pyro.sample("m", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def evidence_of_pair(x):
    return float(dist.MultivariateNormal(torch.zeros(len(x)), 2 * torch.eye(len(x)) + 1).log_prob(x))


def test_a_global_site_that_follows_local_draws_makes_one_datum():
    """q(m | z) q(z | x) at the exact posterior: any bound is ln p(x), whatever the order and K."""
    x = torch.tensor([0.5, -1.0, 2.0])
    joint = torch.cat(
        [torch.cat([torch.ones(1, 1), torch.ones(1, 3)], 1), torch.cat([torch.ones(3, 1), torch.eye(3) + 1], 1)]
    )
    A = joint[:, 1:] @ torch.linalg.inv(joint[1:, 1:] + torch.eye(3))
    mean, cov = A @ x, joint - A @ joint[:, 1:].T
    L = torch.linalg.cholesky(cov[[1, 2, 3, 0]][:, [1, 2, 3, 0]])

    def guide(x):
        z = []
        location = mean[[1, 2, 3, 0]]
        e = []
        for i in range(3):
            at = location[i] + sum(L[i, j] * e[j] for j in range(i))
            z.append(pyro.sample(f"z{i}", dist.Normal(at, L[i, i]).mask(True)))
            e.append((z[-1] - at) / L[i, i])
        pyro.sample("m", dist.Normal(location[3] + sum(L[3, j] * e[j] for j in range(3)), L[3, 3]))

    def model(x):
        m = pyro.sample("m", dist.Normal(torch.zeros(()), 1.0))
        for i in range(3):
            z = pyro.sample(f"z{i}", dist.Normal(m, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    for estimator in (STL(1), STL(5), IWAE(5), DReG(5), IWAE(5, vectorize_particles=False)):
        assert -estimator.loss(model, guide, x) == pytest.approx(evidence_of_pair(x), abs=1e-9)

    def pooled(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x / 2, 0.7))
        pyro.sample("m", dist.Normal(z.mean(-1, keepdim=True), 0.4))

    assert structure_of(normal_pair, pooled, (x,), {}).plate is None
    one = torch.tensor([-STL(1).loss(normal_pair, pooled, x) for _ in range(60)])
    ten = torch.tensor([-STL(10).loss(normal_pair, pooled, x) for _ in range(60)])
    error = float((one.var() + ten.var()) / 60) ** 0.5
    assert abs(float(one.mean() - ten.mean())) < 4.5 * error
    assert -IWAE(100_000).loss(normal_pair, pooled, x) == pytest.approx(evidence_of_pair(x), abs=0.05)


def test_piwae_trains_a_global_guide_by_the_guides_bound():
    case = Global()
    case.size = 4
    gradients = []
    for estimator in (MIWAE(2, 2), PIWAE(2, 2)):
        torch.manual_seed(0)
        gradients.append(gradient_of(estimator, case.model, case.guide, [*case.p.values()], case.x))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["AutoNormal", "AutoMultivariateNormal", "AutoDelta"])
def test_autoguides_have_stocks_bound(kind):
    x = torch.tensor([0.5, -1.0, 2.0])
    settings = {} if kind == "AutoDelta" else {"init_scale": 0.8}
    guide = getattr(pyro.infer.autoguide, kind)(normal_pair, init_loc_fn=init_to_mean, **settings)
    ours = torch.tensor([STL(4).loss(normal_pair, guide, x) for _ in range(60)])
    stock = torch.tensor([Trace_ELBO(4).loss(normal_pair, guide, x) for _ in range(60)])
    error = float((ours.var() + stock.var()) / 60) ** 0.5
    assert abs(float(ours.mean() - stock.mean())) < 4.5 * error + 1e-9
    if kind == "AutoMultivariateNormal":  # all local sites are points of one joint draw: K of them
        assert -IWAE(50_000).loss(normal_pair, guide, x) == pytest.approx(evidence_of_pair(x), abs=0.05)


def test_a_reparameterised_model_keeps_its_plate():
    x = torch.randn(20)
    other = poutine.reparam(normal_pair, {"m": LocScaleReparam(0.0)})
    guide = pyro.infer.autoguide.AutoNormal(other)
    guide(x)
    assert structure_of(other, guide, (x,), {}).plate == "data"


def test_messengers_are_left_to_pyro():
    guide = pyro.infer.autoguide.AutoNormalMessenger(normal_pair)
    with pytest.raises(ValueError, match='expected a guide that draws latent sites alone, got the observed site "x"'):
        ELBO().loss(normal_pair, guide, torch.zeros(3))


def test_handlers_around_the_call_count():
    def model(x=None):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x=None):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(torch.zeros(()), 0.7))

    x = torch.tensor([0.5, -1.0, 2.0])
    estimator, losses = IWAE(5), []
    for call in (lambda: estimator.loss(model, guide, x), lambda: estimator.loss(model, guide)):
        torch.manual_seed(0)
        with poutine.condition(data={"x": x}):
            losses.append(call())
    assert losses[0] == losses[1]


def test_a_program_that_becomes_another_is_seen():
    """Same objects, same arguments: the kept structure is looked at again."""
    x = torch.tensor([0.5, -1.0, 2.0])
    state = {"pooled": False}

    def model(x):
        if state["pooled"]:
            return normal_pair(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        if state["pooled"]:
            pyro.sample("m", dist.Normal(torch.tensor(0.3), 0.6))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    estimator = IWAE(2_000)
    estimator.loss(model, guide, x)
    state["pooled"] = True
    bounds = []
    for each in (estimator, IWAE(2_000)):
        torch.manual_seed(0)
        each.loss(model, guide, x)
        torch.manual_seed(0)
        bounds.append(each.loss(model, guide, x))
    assert bounds[0] == bounds[1]


def test_a_plate_more_than_there_was_is_seen():
    """Where it takes the place of the plate of draws."""
    x, state = torch.ones(4, 3), {"deep": False}

    def model(x):
        if not state["deep"]:
            with pyro.plate("data", 4, dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
                return pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        with pyro.plate("data", 4, dim=-1), pyro.plate("columns", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            return pyro.sample("x", dist.Normal(z, 1.0), obs=x.mT)

    def guide(x):
        if not state["deep"]:
            with pyro.plate("data", 4, dim=-1):
                return pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))
        with pyro.plate("data", 4, dim=-1), pyro.plate("columns", 3, dim=-2):
            return pyro.sample("z", dist.Normal(x.mT / 2, 0.7))

    estimator = IWAE(5)
    estimator.loss(model, guide, x)
    state["deep"] = True
    torch.manual_seed(0)
    found = estimator.loss(model, guide, x)
    torch.manual_seed(0)
    assert found == IWAE(5).loss(model, guide, x)
    with pytest.raises(RuntimeError, match="own error"):
        estimator.loss(raising, guide, x)


def raising(x):
    raise RuntimeError("its own error")


def test_masked_and_factored_scores():
    """A masked draw that its neighbours depend on; a density that the guide adds by a factor."""
    logits = torch.zeros(50_000, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=False):
                z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=False):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    x = torch.ones(50_000) * 1.5
    log_p = dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(torch.tensor(1.5))
    for estimator in (ELBO(1), ScoreFunction(3)):
        assert_mean_is(gradient_of(estimator, model, guide, [logits], x)[0], 0.25 * (log_p[1] - log_p[0]), precise=0.02)

    def factored(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=logits.detach()).mask(False))
            pyro.factor("q", dist.Bernoulli(logits=logits).log_prob(z), has_rsample=False)

    def plain(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

    assert_mean_is(gradient_of(ELBO(1), plain, factored, [logits], x)[0], 0.25 * (log_p[1] - log_p[0]), precise=0.02)


@pytest.mark.parametrize("by", ["handler", "distribution", "entries"])
@pytest.mark.parametrize("make", [DReG, STL, IWAE, lambda K: DReG(K, alpha=0.5)])
def test_paths_of_draws_whose_score_is_masked(make, by):
    """ln q counts for every other datum alone: the gradient is the bound's own, by quadrature."""
    rows, K = 60_000, 3
    mask = torch.arange(rows) % 2 == 0
    m = torch.full((rows,), 0.5, requires_grad=True)

    def site(location):
        p = dist.Normal(location, 0.8 if location is m else 1.0)
        if by == "distribution":
            return pyro.sample("z", p.mask(mask))
        if by == "entries":
            entries = dist.Normal(p.loc[:, None], p.scale[:, None]).mask(mask[:, None])
            return pyro.sample("z", entries.to_event(1))[..., 0]
        with poutine.mask(mask=mask):
            return pyro.sample("z", p)

    def model(x):
        with pyro.plate("data", rows):
            pyro.sample("x", dist.Normal(site(torch.zeros(rows)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", rows):
            site(m)

    estimator = make(K)
    found = gradient_of(estimator, model, guide, [m], torch.full((rows,), 1.5))[0]
    e, w = nodes(K)
    for counted in (True, False):
        location = torch.tensor(0.5, requires_grad=True)
        z = location + 0.8 * e
        log_w = dist.Normal(z, 1.0).log_prob(torch.tensor(1.5))
        if counted:
            log_w = log_w + dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(location, 0.8).log_prob(z)
        bound = estimator.bound(log_w.mT)
        (expected,) = torch.autograd.grad((w * bound).sum(), location)
        assert_mean_is(found[mask == counted], expected, precise=0.02)


def test_draws_of_no_density_count_nothing():
    """p(z) is 0 for half of the draws: bounds and gradients of draws that count are finite."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.zeros(()), 1.0, validate_args=False))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    location = torch.zeros(8, requires_grad=True)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(location, 1.0))

    x = torch.zeros(8)
    with pyro.validation_enabled(False):
        for estimator in (IWAE(20), DReG(20), ReweightedWakeSleep(20)):
            loss = estimator.differentiable_loss(model, guide, x)
            assert bool(loss.isfinite()) and bool(torch.autograd.grad(loss, location)[0].isfinite().all())
    log_weight = torch.tensor([[0.0, 1.0], [-math.inf, 2.0], [-math.inf, 3.0]])
    signal = VIMCO(3).signal(type("Weights", (), {"log_weight": log_weight}))
    assert bool(signal.isfinite().all())
    assert float(signal[0, 0]) == pytest.approx(-math.log(3))


def test_more_that_would_be_a_wrong_number_is_refused(tmp_path):
    model, guide, x = hierarchical()
    with latent_scale(0.5), pytest.raises(ValueError, match="expected latent sites without a KL weight for DReG"):
        DReG(2).differentiable_loss(model, guide, x)
    with pytest.raises(ValueError, match="expected a loss that is linear in the KL term beside kl_weight, got DReG"):
        fit(model, guide, x, loss=DReG(2), kl_weight=lambda e: 0.5, out=tmp_path / "no", batch_size=6, progress=False)
    bits = Bits(6)
    rows = ScoreFunction(1, baseline=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="expected a baseline for each of 6 data in a plate, got 3 values"):
        rows.differentiable_loss(lambda y, x: bits.model(x), lambda y, x: bits.guide(x), torch.zeros(3, 1), bits.x)

    def guide_without_size(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    def model_with_size(x):
        with pyro.plate("data", 30, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match='expected plate "data" of one size in model and guide'):
        IWAE(2).loss(model_with_size, guide_without_size, torch.zeros(3))

    def transposed(x):
        with pyro.plate("data", x.shape[1]):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x.t())

    def of_transposed(x):
        with pyro.plate("data", x.shape[1]):
            pyro.sample("z", dist.Normal(x.t(), 1.0).to_event(1))

    with pytest.raises(ValueError, match='expected the values of the observed site "x" to be an argument'):
        WakeSleep().differentiable_loss(transposed, of_transposed, torch.zeros(2, 3))


def test_a_learned_baseline_has_a_name_of_its_own_in_the_store():
    bits = Bits(6)
    first = ScoreFunction(1, baseline=nn.Linear(1, 1))
    second = copy.deepcopy(first)
    for estimator in (first, second):
        before = estimator.baseline.bias.clone()
        programs = (lambda x: bits.model(x[:, 0]), lambda x: bits.guide(x[:, 0]))
        pyro.infer.SVI(*programs, pyro.optim.Adam({"lr": 0.1}), estimator).step(bits.x[:, None])
        assert not torch.equal(estimator.baseline.bias, before)


# ------------------------------------------------------------ in use


def hierarchical(dtype=None):
    torch.manual_seed(0)
    model = VAE((4,), prior=priors.Hierarchical((2, 2), small), likelihood=likelihoods.Normal(), decoder=small)
    return model, AmortizedGuide(model, small), torch.randn(6, 4)


class Small(PyroModule):
    """`TwoSites` with parameters to train, of model or guide."""

    def __init__(self, of_guide):
        super().__init__()
        self.of_guide, self.name = of_guide, "phi" if of_guide else "theta"  # two names in Pyro's store
        setattr(self, self.name, nn.Parameter(torch.tensor([0.6, 0.3, 0.5, -0.2])))

    def forward(self, x):
        a, c, d, log_scale = getattr(self, self.name)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(a * x, 1.0) if self.of_guide else dist.Normal(a, 1.0))
            z2 = pyro.sample("z2", dist.Normal(c * z1 + (d * x if self.of_guide else d), log_scale.exp()))
            if not self.of_guide:
                pyro.sample("x", dist.Normal(z2, log_scale.exp()), obs=x)


def trained_pair():
    return Small(False), Small(True), torch.linspace(-1, 2, 6)


@every
def test_compiled_steps_are_stock_steps(make, recorded_once):
    trajectories = []
    for svi_class in (pyro.infer.SVI, SVI, CompiledSVI):
        pyro.clear_param_store()
        model, guide, x = trained_pair()
        torch.manual_seed(1)
        svi = svi_class(model, guide, pyro.optim.Adam({"lr": 1e-2}), make())
        trajectories.append([svi.step(x) for _ in range(4)])
    assert svi.compiled, svi.fallback_reason
    for other in trajectories[1:]:
        assert other == pytest.approx(trajectories[0], rel=1e-9)
    assert len(set(trajectories[0])) == 4


@pytest.mark.parametrize("name", ["ELBO", "IWAE", "DReG", "MIWAE", "VIMCO"])
def test_one_draw_at_a_time_is_the_same_bound(name):
    model, guide, x = trained_pair()
    together, alone = EVERY[name](), EVERY[name]()
    alone.vectorize_particles = False
    bounds = [[each.loss(model, guide, x) for _ in range(100)] for each in (together, alone)]
    a, b = (torch.tensor(each) for each in bounds)
    assert float((a.mean() - b.mean()).abs()) < 4.5 * float((a.var() + b.var()) / 100) ** 0.5


def test_fit_keeps_multipliers_in_the_history_and_the_checkpoint(tmp_path):
    model, guide, x = hierarchical()
    loss = ConstrainedELBO([Rate(at_most=0.05)], step_size=0.1)
    run = fit(model, guide, x.repeat(4, 1), loss=loss, epochs=3, batch_size=6, out=tmp_path / "run", progress=False)
    (record,) = run.history[-1]["constraints"].values()
    assert record["multiplier"] == float(loss.multipliers) > 0
    assert record["value"] == float(loss.values)
    *again, _ = hierarchical()
    resumed = ConstrainedELBO([Rate(at_most=0.05)], step_size=0.1)
    more = {"epochs": 4, "batch_size": 6, "progress": False}
    fit(*again, x.repeat(4, 1), loss=resumed, resume=run.path, **more)
    model, guide, _ = hierarchical()
    whole = ConstrainedELBO([Rate(at_most=0.05)], step_size=0.1)
    fit(model, guide, x.repeat(4, 1), loss=whole, out=tmp_path / "whole", **more)
    assert torch.equal(resumed.multipliers, whole.multipliers)
    with pytest.raises(ValueError, match="expected a loss that is linear in the KL term"):
        fit(model, guide, x, loss=whole, kl_weight=lambda epoch: 0.5, out=tmp_path / "no", batch_size=6, progress=False)


def test_a_new_estimator_is_one_class():
    """A log-weight estimator in a few lines: the median of means, from the base alone."""

    class MedianOfMeans(Estimator):
        def bound(self, log_weight):
            return log_weight.unflatten(0, (3, -1)).logsumexp(1).median(0).values - math.log(len(log_weight) // 3)

    model, guide, x = hierarchical()
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), MedianOfMeans(9))
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_every_name_is_exported():
    assert {type(make()).__name__ for make in EVERY.values()} <= set(estimators.__all__)


class TestArgumentsOfPyro:
    """A name changed from Pyro's to ours, and nothing else."""

    POSITIONAL = (3, 1, None, True, False, True, {"check_trace": False}, True, -0.5)
    NAMES = [*inspect.signature(Trace_ELBO.__init__).parameters][1:]

    def test_the_signature_is_that_of_pyro(self):
        assert [*inspect.signature(ELBO.__init__).parameters][1:] == self.NAMES
        assert [*inspect.signature(RenyiELBO.__init__).parameters][1:] == [*inspect.signature(Renyi).parameters][:-1]

    @pytest.mark.parametrize("kind", [ELBO, STL])
    def test_all_are_taken_by_position_and_by_name(self, kind):
        named = kind(**dict(zip(self.NAMES, self.POSITIONAL, strict=True)))
        for loss in (kind(*self.POSITIONAL), named):
            assert [getattr(loss, name) for name in self.NAMES] == [*self.POSITIONAL]

    @pytest.mark.parametrize("name", [name for name in EVERY if name not in ("WakeSleep",)])
    def test_a_nesting_that_the_programs_exceed_is_an_error(self, name):
        toy, loss = Toy(5), EVERY[name]()
        loss.max_plate_nesting = 1
        assert math.isfinite(loss.loss(toy.model, toy.guide, toy.x))
        loss.max_plate_nesting = 0
        with pytest.raises(ValueError, match="expected plates nested at most max_plate_nesting=0 deep, got 1"):
            loss.loss(toy.model, toy.guide, toy.x)

    def test_what_makes_no_sense_is_refused(self):
        with pytest.raises(ValueError, match="expected max_plate_nesting >= 0, got -1"):
            IWAE(3, max_plate_nesting=-1)
        with pytest.raises(TypeError, match="bogus"):
            BetaELBO(2.0, bogus=1)

    def test_renyi_has_pyros_defaults(self):
        ours, stock = Renyi(), RenyiELBO()
        assert (ours.alpha, ours.num_particles) == (stock.alpha, stock.num_particles) == (0, 2)

    def test_the_graph_is_kept_where_it_is_asked_for(self):
        toy = Toy(5)
        for retain in (None, True):
            kept = []

            class Kept(ELBO):
                def differentiable_loss(self, *args, **kwargs):
                    kept.append(super().differentiable_loss(*args, **kwargs))  # noqa: B023
                    return kept[-1]  # noqa: B023

            Kept(retain_graph=retain).loss_and_grads(toy.model, toy.guide, toy.x)
            if retain:
                kept[0].backward()
            else:
                with pytest.raises(RuntimeError, match="second time"):
                    kept[0].backward()
