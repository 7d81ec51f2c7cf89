"""Gradients along sampling paths where masks leave out parts of ln q and ln p, against quadrature."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule

from pyro_vae import SVI, CompiledSVI
from pyro_vae.distributions import MarkovChain, OnePass, PlanarTransform
from pyro_vae.estimators import IWAE, PIWAE, STL, DReG, Renyi

pytestmark = pytest.mark.usefixtures("float64")

X = 0.7
START = {"m": 0.3, "s": 0.8, "c": 0.9, "r": 0.7, "b": 0.6, "t": 0.9}


class Given(dist.Normal):
    """A normal distribution whose draws, (K, rows), come from given standard ones."""

    def __init__(self, loc, scale, standard):
        super().__init__(loc, scale)
        self.standard = standard

    def expand(self, batch_shape, _instance=None):
        return Given(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.standard)

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.standard


class Chain:
    """p: z ~ N(0, 1), y ~ N(z, 0.8^2), w ~ N(y, 1), the first `count` of them, x ~ N(last, 0.6^2); q: z ~ N(m, s^2),
    y ~ N(c z, r^2), w ~ N(b y, t^2). There is a row for each node of K draws and each combination of masks, with
    parameters of its own."""

    def __init__(self, count, K, nodes, combinations):
        points, weights = np.polynomial.hermite_e.hermegauss(nodes)
        grid = torch.cartesian_prod(*[torch.tensor(points)] * (count * K)).reshape(-1, count, K)
        weight = torch.cartesian_prod(*[torch.tensor(weights / weights.sum())] * (count * K)).prod(-1)
        self.count, self.combinations, self.size = count, combinations, len(weight)
        rows = len(combinations) * self.size
        self.weight = weight.repeat(len(combinations))
        self.standard = grid.repeat(len(combinations), 1, 1).movedim((1, 2), (0, 1))  # (count, K, rows)
        counts = torch.tensor(combinations).repeat_interleave(self.size, 0)  # (rows, 2 count)
        self.in_q, self.in_p = counts[:, :count].mT, counts[:, count:].mT
        self.p = {name: torch.full((rows,), value, requires_grad=True) for name, value in START.items()}
        self.x = torch.full((rows,), X)

    def _priors(self, z):
        yield dist.Normal(torch.zeros_like(self.x), 1.0)
        yield dist.Normal(z[0], 0.8)
        yield dist.Normal(z[1], 1.0)

    def _q(self, z):
        p = self.p
        yield p["m"], p["s"]
        yield p["c"] * z[0], p["r"]
        yield p["b"] * z[1], p["t"]

    def model(self, x):
        z = []
        with pyro.plate("data", len(x)):
            for i, prior in zip(range(self.count), self._priors(z), strict=False):
                with poutine.mask(mask=self.in_p[i]):
                    z.append(pyro.sample(f"z{i}", prior))
            pyro.sample("x", dist.Normal(z[-1], 0.6), obs=x)

    def guide(self, x):
        z = []
        with pyro.plate("data", len(x)):
            for i, q in zip(range(self.count), self._q(z), strict=False):
                own = Given(*q, self.standard[i])
                if i % 2:
                    z.append(pyro.sample(f"z{i}", own.mask(self.in_q[i])))
                    continue
                with poutine.mask(mask=self.in_q[i]):
                    z.append(pyro.sample(f"z{i}", own))

    def log_w(self):
        """(K, rows), by the formulas."""
        z, log_w = [], 0.0
        for i, (loc, scale) in zip(range(self.count), self._q(z), strict=False):
            z.append(loc + scale * self.standard[i])
            log_w = log_w - torch.where(self.in_q[i], dist.Normal(loc, scale).log_prob(z[i]), 0.0)
        for i, prior in zip(range(self.count), self._priors(z), strict=False):
            log_w = log_w + torch.where(self.in_p[i], prior.log_prob(z[i]), 0.0)
        return log_w + dist.Normal(z[-1], 0.6).log_prob(self.x)

    def mean(self, gradients):
        """Of each combination and parameter."""
        found = [torch.zeros_like(self.x) if g is None else g for g in gradients]
        return torch.stack([(self.weight * g).view(-1, self.size).sum(1) for g in found], 1)

    def exact(self, bound):
        """The bound's own gradient."""
        total = bound(self.log_w()).sum()
        return self.mean(torch.autograd.grad(total, [*self.p.values()], allow_unused=True))

    def found(self, estimator):
        loss = estimator.differentiable_loss(self.model, self.guide, self.x)
        return -self.mean(torch.autograd.grad(loss, [*self.p.values()], allow_unused=True))


ESTIMATORS = {  # with the bound that they differentiate, and what the quadrature is good for
    "DReG": (DReG(2), IWAE(2).bound, 2e-3),
    "DReG, alpha 0.5": (DReG(2, alpha=0.5), Renyi(0.5, 2).bound, 1e-4),
    "DReG, alpha -0.5": (DReG(2, alpha=-0.5), Renyi(-0.5, 2).bound, 2e-2),
    "IWAE": (IWAE(2), IWAE(2).bound, 1e-12),
    "STL": (STL(2), lambda log_w: log_w.mean(0), 1e-12),
    "PIWAE": (PIWAE(2, 1), lambda log_w: log_w.mean(0), 1e-12),  # of the guide
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_draws_with_every_combination_of_masks(name):
    """In the guide, the model and both, of z, y and both; each combination on rows of its own in one batch."""
    estimator, bound, precision = ESTIMATORS[name]
    chain = Chain(2, 2, 12, [*itertools.product([True, False], repeat=4)])
    error = (chain.found(estimator) - chain.exact(bound)).abs().amax(1)
    assert float(error.max()) < precision, dict(zip(chain.combinations, error.tolist(), strict=True))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_chain_of_three_with_every_combination_of_masks_in_the_guide(alpha):
    """Paths from counted through masked to counted draws, and back."""
    combinations = [(*q, True, i % 2 == 0, True) for i, q in enumerate(itertools.product([True, False], repeat=3))]
    chain = Chain(3, 2, 7, combinations)
    error = (chain.found(DReG(2, alpha=alpha)) - chain.exact(Renyi(alpha, 2).bound)).abs().amax(1)
    assert float(error.max()) < 1e-2, dict(zip(chain.combinations, error.tolist(), strict=True))


def mean_gradients(estimator, program, rows):
    """Over rows with parameters of their own, by name, and their standard errors."""
    model, guide, p = program(rows)
    loss = estimator.differentiable_loss(model, guide, torch.full((rows,), X))
    found = -torch.stack(torch.autograd.grad(loss, [*p.values()]), 1)
    return found.mean(0), found.std(0) / math.sqrt(rows)


def parameters(rows, **start):
    return {name: torch.full((rows,), value, requires_grad=True) for name, value in start.items()}


def chain_with_gaps(rows):
    """Steps 1 and 3 of three count; in every other row steps 1 and 2, and the data depend on step 3."""
    p = parameters(rows, m=0.3, c=0.9, s=0.7)
    gap = (torch.arange(rows) % 2 == 0)[:, None]
    mask = torch.where(gap, torch.tensor([True, False, True]), torch.tensor([True, True, False]))

    def model(x):
        with pyro.plate("data", rows):
            first = dist.Normal(torch.zeros(rows, 1), 1.0).to_event(1)
            z = pyro.sample("z", MarkovChain(first, lambda z: dist.Normal(z, 0.8).to_event(1), 3, mask=mask))
            pyro.sample("x", dist.Normal(z[..., 2, 0], 0.6), obs=x)

    def guide(x):
        with pyro.plate("data", rows):
            first = dist.Normal(p["m"][:, None], p["s"][:, None]).to_event(1)
            c = p["c"][:, None, None].expand(rows, 3, 1)
            pyro.sample("z", MarkovChain(first, lambda z, c: dist.Normal(c * z, 0.7).to_event(1), 3, c, mask))

    return model, guide, p


def chain_with_an_end(rows):
    """Two of three steps count in model and guide, in every other row one of them."""
    p = parameters(rows, m=0.3, c=0.9, s=0.7)
    lengths = 1 + torch.arange(rows) % 2
    there = torch.arange(3) < lengths[:, None]

    def model(x):
        with pyro.plate("data", rows):
            first = dist.Normal(torch.zeros(rows, 1), 1.0).to_event(1)
            z = pyro.sample("z", MarkovChain(first, lambda z: dist.Normal(z, 0.8).to_event(1), 3, mask=there))
            last = torch.where(lengths == 1, z[..., 0, 0], z[..., 1, 0])
            pyro.sample("x", dist.Normal(last, 0.6), obs=x)

    def guide(x):
        with pyro.plate("data", rows):
            first = dist.Normal(p["m"][:, None], p["s"][:, None]).to_event(1)
            c = p["c"][:, None, None].expand(rows, 3, 1)
            pyro.sample("z", MarkovChain(first, lambda z, c: dist.Normal(c * z, 0.7).to_event(1), 3, c, there))

    return model, guide, p


def plates_within(rows):
    """Three words of a datum, of which the second's ln q is masked; a draw of the datum that they depend on is too."""
    p = parameters(rows, m=0.3, c=0.9, s=0.7)
    mask = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", rows, dim=-2):
            top = pyro.sample("top", dist.Normal(torch.zeros(rows, 1), 1.0))
            with pyro.plate("words", 3, dim=-1):
                y = pyro.sample("y", dist.Normal(top, 0.8))
                pyro.sample("x", dist.Normal(y, 0.9), obs=x[:, None].expand(rows, 3))

    def guide(x):
        with pyro.plate("data", rows, dim=-2):
            with poutine.mask(mask=(torch.arange(rows) % 3 > 0)[:, None]):
                top = pyro.sample("top", dist.Normal(p["m"][:, None], p["s"][:, None]))
            with pyro.plate("words", 3, dim=-1), poutine.mask(mask=mask):
                pyro.sample("y", dist.Normal(p["c"][:, None] * top, 0.8))

    return model, guide, p


PROGRAMS = {f.__name__: f for f in (chain_with_gaps, chain_with_an_end, plates_within)}


@pytest.mark.parametrize("make", [lambda: DReG(3), lambda: DReG(3, alpha=0.5), lambda: STL(3)])
@pytest.mark.parametrize("name", PROGRAMS)
def test_paths_whose_score_counts_in_part(name, make):
    """Against the bound's own gradient by as many draws; one call a draw, too."""
    estimator, rows = make(), 90_000
    plain = Renyi(estimator.alpha, 3) if isinstance(estimator, DReG) else PIWAE(3, 1)
    expected, of_expected = mean_gradients(plain, PROGRAMS[name], rows)
    for vectorize in (True, False):
        estimator.vectorize_particles = vectorize
        found, error = mean_gradients(estimator, PROGRAMS[name], rows)
        both = (error.square() + of_expected.square()).sqrt()
        assert bool((both < 0.02).all())
        assert bool(((found - expected).abs() < 4.5 * both).all()), (found, expected, both)


def test_a_chain_that_ends_keeps_the_doubly_reparameterised_gradient():
    """K = 1: no score is left, so that the gradient is that of the path alone, for every draw."""
    model, guide, p = chain_with_an_end(8)
    found = []
    for estimator in (DReG(1), STL(1)):
        torch.manual_seed(0)
        loss = estimator.differentiable_loss(model, guide, torch.full((8,), X))
        found.append(torch.stack(torch.autograd.grad(loss, [*p.values()])))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("estimator", [DReG(2), STL(2), PIWAE(2, 2)])
def test_a_mask_below_a_transform_is_refused(estimator):
    """It counts the log-determinant, and half of the base's density: no part of the draw is left out."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 1], 0.6), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(2, requires_grad=True), 1.0).mask(torch.tensor([True, False])).to_event(1)
            planar = OnePass(PlanarTransform(torch.ones(2), torch.ones(2), torch.zeros(1)))
            pyro.sample("z", dist.TransformedDistribution(base, [planar]))

    with pytest.raises(ValueError, match='expected masks of whole draws.*"z".*use ELBO or IWAE'):
        estimator.differentiable_loss(model, guide, torch.ones(3))
    assert IWAE(2).loss(model, guide, torch.ones(3)) > 0


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_global_draw_that_masked_and_counted_draws_depend_on(alpha):
    """Its gradient by quadrature over it, divided by the number of data, of 40,000 for each node."""
    rows, start = 40_000, {"m": 0.3, "s": 0.5}
    in_q = torch.arange(rows) % 2 == 0
    standard, weight = (torch.tensor(each) for each in np.polynomial.hermite_e.hermegauss(7))
    found = {}
    for estimator in (DReG(2, alpha=alpha), Renyi(alpha, 2)):
        torch.manual_seed(1)
        p = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
        each = []
        for node in standard:

            def model(x):
                top = pyro.sample("top", dist.Normal(torch.zeros(()), 1.0))
                with pyro.plate("data", rows):
                    z = pyro.sample("z", dist.Normal(top, 0.8))
                    y = pyro.sample("y", dist.Normal(z, 0.8))
                    pyro.sample("x", dist.Normal(y, 0.6), obs=x)

            def guide(x, node=node, p=p):
                top = pyro.sample("top", Given(p["m"], p["s"], node))
                with pyro.plate("data", rows):
                    with poutine.mask(mask=in_q):
                        z = pyro.sample("z", dist.Normal(0.5 * top, 0.7))
                    with poutine.mask(mask=~in_q):
                        pyro.sample("y", dist.Normal(0.9 * z + 0.2 * top, 0.7))

            loss = estimator.differentiable_loss(model, guide, torch.full((rows,), X))
            each.append(-torch.stack(torch.autograd.grad(loss, [*p.values()])) / rows)
        found[type(estimator)] = (weight[:, None] * torch.stack(each)).sum(0) / weight.sum()
    torch.testing.assert_close(found[DReG], found[Renyi], atol=0.008, rtol=0.0)


class Masked(PyroModule):
    """The guide of two draws, of which the first, or in every other row the second, is masked."""

    def __init__(self):
        super().__init__()
        self.m, self.c = torch.nn.Parameter(torch.tensor(0.3)), torch.nn.Parameter(torch.tensor(0.9))

    def forward(self, x):
        first = torch.arange(len(x)) % 2 == 0
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=first):
                z = pyro.sample("z0", dist.Normal(self.m, 0.8).expand([len(x)]))
            with poutine.mask(mask=~first):
                pyro.sample("z1", dist.Normal(self.c * z, 0.7))


def test_compiled_steps_are_the_same(recorded):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z0", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(pyro.sample("z1", dist.Normal(z, 0.8)), 0.6), obs=x)

    found = []
    for kind in (SVI, CompiledSVI):
        guide = Masked()
        svi = kind(model, guide, pyro.optim.Adam({"lr": 0.1}), DReG(3, alpha=0.3))
        torch.manual_seed(0)
        losses = [svi.step(torch.full((6,), X)) for _ in range(3)]
        found.append(torch.tensor([*losses, guide.m.item(), guide.c.item()]))
    assert svi.compiled
    torch.testing.assert_close(*found)
