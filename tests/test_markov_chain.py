"""Chains as one distribution: against the loop over steps in Pyro, the dense joint Gaussian, and quadrature."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from gaussian import Linear
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

from pyro_vae import CompiledSVI
from pyro_vae.compiled import Compiled
from pyro_vae.distributions import MarkovChain
from pyro_vae.estimators import ELBO, IWAE, STL, VIMCO, DReG
from pyro_vae.scan import _packed, _packs, _Step, scan

pytestmark = pytest.mark.usefixtures("float64")


class Step(nn.Module):
    """N(z_t; m(z_{t-1}, u_t), s(z_{t-1}, u_t)^2)"""

    def __init__(self, Z, C):
        super().__init__()
        self.hidden, self.heads = nn.Linear(Z + C, 5), nn.Linear(5, 2 * Z)

    def forward(self, z, u):
        shape = torch.broadcast_shapes(z.shape[:-1], u.shape[:-1])
        both = torch.cat([z.expand(*shape, -1), u.expand(*shape, -1)], -1)
        mean, log_scale = self.heads(self.hidden(both).tanh()).chunk(2, -1)
        return dist.Normal(z + 0.1 * mean, log_scale.exp()).to_event(1)


class Pair(nn.Module):
    """A chain of Z numbers, inputs u of C, data x of one number, and a filter as guide; by chains or by steps."""

    Z, C, T = 2, 3, 5

    def __init__(self, by_steps=False):
        super().__init__()
        torch.manual_seed(3)
        self.of_model, self.of_guide = Step(self.Z, self.C), Step(self.Z, self.C + 1)
        self.emission = nn.Linear(self.Z, 1)
        self.first = nn.Linear(self.C + 1, self.Z)
        self.by_steps = by_steps

    def prior(self):
        return dist.Normal(torch.zeros(self.Z), 1.0).to_event(1)

    def posterior(self, u, x):
        return dist.Normal(self.first(torch.cat([u, x], -1)), 0.5).to_event(1)

    def model(self, x, u):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            if not self.by_steps:
                z = pyro.sample("z", MarkovChain(self.prior(), self.of_model, self.T, u))
                pyro.sample("x", dist.Normal(self.emission(z), 1.0).to_event(2), obs=x)
                return
            for t in range(self.T):
                p = self.prior() if t == 0 else self.of_model(z, u[:, t])
                z = pyro.sample(f"z{t}", p)
                pyro.sample(f"x{t}", dist.Normal(self.emission(z), 1.0).to_event(1), obs=x[:, t])

    def guide(self, x, u):
        both = torch.cat([u, x], -1)
        z = None
        with pyro.plate("data", len(x)):
            if not self.by_steps:
                q = self.posterior(u[:, 0], x[:, 0])
                pyro.sample("z", MarkovChain(q, self.of_guide, self.T, both))
                return
            for t in range(self.T):
                q = self.posterior(u[:, 0], x[:, 0]) if t == 0 else self.of_guide(z, both[:, t])
                z = pyro.sample(f"z{t}", q)


def batch(B=4):
    torch.manual_seed(1)
    return torch.randn(B, Pair.T, 1), torch.randn(B, Pair.T, Pair.C)


def gradients(pair, loss, x, u, seed=0):
    pyro.clear_param_store()
    torch.manual_seed(seed)
    value = loss.differentiable_loss(pair.model, pair.guide, x, u)
    return value.detach(), torch.autograd.grad(value, [*pair.parameters()])


@pytest.mark.parametrize(
    "loss",
    [Trace_ELBO(), TraceMeanField_ELBO(), ELBO(3), IWAE(3), STL(3), DReG(3)],
    ids=["sampled", "analytic", "ELBO", "IWAE", "STL", "DReG"],
)
def test_a_chain_is_the_loop_over_its_steps(loss):
    """The same draws, the same bound, the same gradients."""
    (bound, found), (expected, wanted) = (gradients(Pair(by_steps), loss, *batch()) for by_steps in (False, True))
    torch.testing.assert_close(bound, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", [Trace_ELBO(), VIMCO(3), IWAE(3)])
def test_a_discrete_chain_has_the_score_of_its_draw(loss):
    """As the loop over its steps; the guide's gradient is not 0."""
    found = {}
    for by_steps in (False, True):
        logits, start = torch.tensor([-1.0, 0.5], requires_grad=True), torch.tensor([0.3, -0.2], requires_grad=True)

        def chain(first, step, by_steps):
            if not by_steps:
                return pyro.sample("z", MarkovChain(first, step, 3))
            z = [pyro.sample("z0", first)]
            for t in (1, 2):
                z.append(pyro.sample(f"z{t}", step(z[-1])))
            return torch.stack(z, -2)

        def model(x, by_steps=by_steps):
            with pyro.plate("data", len(x)):
                first = dist.Bernoulli(0.5 * torch.ones(2)).to_event(1)
                z = chain(first, lambda z: dist.Bernoulli(0.2 + 0.6 * z).to_event(1), by_steps)
                pyro.sample("x", dist.Normal(z.sum((-1, -2)), 1.0), obs=x)

        def guide(x, by_steps=by_steps, logits=logits, start=start):
            with pyro.plate("data", len(x)):
                first = dist.Bernoulli(logits=start).to_event(1)
                chain(first, lambda z: dist.Bernoulli(logits=logits + z).to_event(1), by_steps)

        torch.manual_seed(0)
        value = loss.differentiable_loss(model, guide, torch.tensor([1.0, 4.0]))
        found[by_steps] = value.detach(), *torch.autograd.grad(value, [logits, start])
    torch.testing.assert_close(found[False], found[True], rtol=1e-10, atol=1e-12)
    assert all(float(gradient.norm()) > 0.01 for gradient in found[False][1:])


@pytest.mark.parametrize("vectorized", [False, True])
def test_particles(vectorized):
    pair, (x, u) = Pair(), batch()
    exact = Trace_ELBO(num_particles=1)

    def many(loss, count):
        return torch.tensor([loss.loss(pair.model, pair.guide, x, u) for _ in range(count)])

    def agree(a, b):
        error = (a.var() / len(a) + b.var() / len(b)).sqrt()
        return bool((a.mean() - b.mean()).abs() < 5 * error)

    with torch.no_grad():
        torch.manual_seed(0)
        one = many(exact, 500)
        several = Trace_ELBO(num_particles=3, vectorize_particles=vectorized, max_plate_nesting=1)
        assert agree(many(several, 100), one)
        options = {"vectorize_particles": vectorized}
        for estimator in (STL(3, **options), ELBO(3, **options)):
            assert agree(many(estimator, 100), one)
        tighter = many(IWAE(3, **options), 100)
        assert agree(many(DReG(3, **options), 100), tighter) and tighter.mean() < one.mean()


def test_a_draw_is_scored_as_any_value_is():
    pair, (_, u) = Pair(), batch()
    chain = MarkovChain(pair.prior(), pair.of_model, pair.T, u).expand([7, 4])
    z = chain.rsample()
    assert z.shape == (7, 4, 5, 2) and chain.event_shape == (5, 2)
    torch.testing.assert_close(chain.log_prob(z), chain.log_prob(z.clone()), rtol=1e-12, atol=0)
    again = chain.expand([7, 4])
    torch.testing.assert_close(again.log_prob(z), chain.log_prob(z))
    assert again._draw is chain._draw and chain.expand([2, 7, 4])._draw is None
    drawn = chain.sample(torch.Size([3]))
    assert drawn.shape == (3, 7, 4, 5, 2) and chain.log_prob(drawn).requires_grad


def test_scores_of_a_draw_without_gradients_are_made_anew():
    """Where gradients are wanted after a draw that had none."""
    a = torch.zeros((), requires_grad=True)
    chain = MarkovChain(dist.Normal(a.expand(2), 1.0).to_event(1), lambda z: dist.Normal(z + a, 1.0).to_event(1), 4)
    with torch.no_grad():
        z = chain.rsample()
    expected = torch.autograd.grad(chain.log_prob(z.clone()), a)
    assert torch.autograd.grad(chain.log_prob(z), a) == expected
    other = MarkovChain(dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda z: dist.Normal(z / 2, 1.0).to_event(1), 4)
    slopes = []
    for draw in (chain.sample, chain.rsample):
        torch.manual_seed(0)
        draw()
        torch.manual_seed(0)  # a divergence along a new draw, where there was none with gradients
        slopes.append(torch.autograd.grad(kl_divergence(chain, other), a)[0])
    assert slopes[0] == slopes[1] != 0
    with pytest.raises(ValueError, match="expected a path of shape"):
        chain.log_prob(torch.zeros(3, 9, 2))


def test_a_chain_has_one_kind_of_gradient():
    first = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    mixed = MarkovChain(first, lambda z: dist.Bernoulli(logits=z).to_event(1), 3)
    with pytest.raises(ValueError, match="expected reparameterised steps"):
        mixed.rsample()


def test_the_divergence_is_unbiased():
    pair, (x, u) = Pair(), batch(1)
    q = MarkovChain(pair.posterior(u[:, 0], x[:, 0]), pair.of_guide, pair.T, torch.cat([u, x], -1)).expand([20_000, 1])
    p = MarkovChain(pair.prior(), pair.of_model, pair.T, u).expand([20_000, 1])
    with torch.no_grad():
        z = q.rsample()
        sampled, analytic = (q.log_prob(z) - p.log_prob(z)).squeeze(1), kl_divergence(q, p).squeeze(1)
    difference = sampled - analytic
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / 20_000**0.5
    assert analytic.std() < sampled.std()
    same = MarkovChain(pair.prior(), pair.of_model, pair.T, u)
    assert float(kl_divergence(p, same).detach().abs().max()) == 0.0


def test_masked_steps_count_nothing():
    pair, (x, u) = Pair(), batch()
    mask = torch.arange(pair.T) < torch.tensor([[5], [3], [1], [4]])
    chain, short = (MarkovChain(pair.prior(), pair.of_model, T, u[:, :T], m) for T, m in ((5, mask), (3, None)))
    z = chain.sample()
    torch.testing.assert_close(chain.log_prob(z)[1], short.log_prob(z[:, :3].clone())[1], rtol=1e-12, atol=0)
    garbage = torch.where(mask[..., None], z, 1e6)
    torch.testing.assert_close(chain.log_prob(garbage), chain.log_prob(z), rtol=1e-12, atol=0)
    q = MarkovChain(pair.posterior(u[:, 0], x[:, 0]), pair.of_guide, pair.T, torch.cat([u, x], -1), mask)
    each = kl_divergence(q, MarkovChain(pair.prior(), pair.of_model, pair.T, u, mask))
    torch.testing.assert_close(each[2], kl_divergence(q.initial, pair.prior())[2])


class Remembering(nn.Module):
    """Steps that remember the mean of what was."""

    def __init__(self):
        super().__init__()
        self.of = nn.Linear(2, 2)

    def forward(self, z, h):
        h = 0.5 * h + 0.5 * z
        return dist.Normal(self.of(h), 0.7).to_event(1), h


def test_a_carry():
    torch.manual_seed(0)
    step, first = Remembering(), dist.Normal(torch.zeros(2), 1.0).to_event(1)
    chain = MarkovChain(first, step, 4, carry=torch.zeros(2)).expand([3])
    z = chain.rsample()
    h, expected = torch.zeros(3, 2), first.log_prob(z[:, 0])
    for t in range(1, 4):
        p, h = step(z[:, t - 1], h)
        expected = expected + p.log_prob(z[:, t])
    for value in (z, z.clone()):
        torch.testing.assert_close(chain.log_prob(value), expected, rtol=1e-12, atol=0)
    with pytest.raises(NotImplementedError):
        kl_divergence(chain, chain)


def linear(T=6):
    torch.manual_seed(2)
    A, C = 0.7 * torch.linalg.qr(torch.randn(2, 2)).Q, torch.randn(3, 2)
    Q, R = torch.tensor([0.5, 0.3]).diag(), torch.tensor([0.4, 0.6, 0.9]).diag()
    return Linear(T, A, torch.tensor([0.1, -0.2]), Q, C, torch.randn(3), R, torch.randn(2), torch.eye(2))


def test_exact_conditionals_give_the_evidence_without_variance():
    """q = prod_t p(z_t | z_{t-1}, x): the bound of every single draw is log p(x)."""
    case = linear()
    x = case.of_x.sample([5]).unflatten(1, (case.T, 3))
    gains, offsets, covariances = case.conditionals(x)
    exact = case.log_evidence(x)

    def model(x):
        with pyro.plate("data", len(x)):
            first = dist.MultivariateNormal(case.m, case.P)
            chain = MarkovChain(first, lambda z: dist.MultivariateNormal(z @ case.A.mT + case.b, case.Q), case.T)
            z = pyro.sample("z", chain)
            pyro.sample("x", dist.MultivariateNormal(z @ case.C.mT + case.d, case.R).to_event(1), obs=x)

    def guide(x):
        inputs = torch.cat([gains.flatten(1), covariances.flatten(1)], -1).expand(len(x), -1, -1)
        inputs = torch.cat([offsets, inputs], -1)

        def step(z, u):
            offset, gain, covariance = u.split([2, 4, 4], -1)
            mean = (gain.unflatten(-1, (2, 2)) @ z[..., None]).squeeze(-1) + offset
            return dist.MultivariateNormal(mean, covariance.unflatten(-1, (2, 2)))

        with pyro.plate("data", len(x)):
            first = dist.MultivariateNormal(offsets[:, 0], covariances[0])
            pyro.sample("z", MarkovChain(first, step, case.T, inputs))

    for loss in (Trace_ELBO(), IWAE(5)):
        for _ in range(3):
            assert loss.loss(model, guide, x) == pytest.approx(-float(exact.sum()), abs=1e-8)


# ------------------------------------------------------------ recorded


def test_a_recorded_step_is_the_loops(recorded):
    """One graph for all lengths: values and gradients of carry, inputs and parameters."""
    torch.manual_seed(0)
    cell, readout = nn.LSTMCell(3, 4), nn.Linear(4, 2)
    start = nn.Parameter(torch.randn(2, 5, 4))
    scale = nn.Parameter(torch.ones(3))

    def value(u):
        def step(state, u):
            h, c = cell(u, state)
            noise = torch.randn(5, 2)
            y = readout(h) * noise
            return (h, c), {"y": y, "twice": 2 * h}

        (h, _), ys = scan(step, (start[0], start[1]), u * scale)
        total = ys["y"].square().sum() + ys["twice"].sin().sum() + h.sum()
        return total, *torch.autograd.grad(total, [start, scale, *cell.parameters(), *readout.parameters()])

    for T in (1, 2, 6):
        u = torch.randn(T, 5, 3)
        function = Compiled(value)
        torch.manual_seed(1)
        expected = value(u)
        torch.manual_seed(1)
        found = function(u)
        assert function.compiled, function.fallback_reason
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        (recording,) = next(iter(function._recordings.values()))
        names = [str(node.target) for node in recording.graph.graph.nodes]
        assert names.count("pyro_vae.scan.default") == (T > 1)
    assert [len(step.products) for step in _Step.table.values()] == [2]  # of the cell, which are made once


@pytest.fixture
def short_chunks(monkeypatch):
    """Of two steps, as each kernel takes a compiler a second."""
    monkeypatch.setattr("pyro_vae.scan.CHUNK", 2)


def test_layouts_of_the_first_step_and_the_others_may_differ(short_chunks):
    """A carry that begins expanded and goes on transposed, and a gradient that is one number for all."""
    weight = nn.Parameter(torch.randn(3, 3))

    def value(u):
        def step(c, u):
            c = (weight @ c.mT).tanh().mT + u
            return c, c

        c, ys = scan(step, torch.ones(1, 3).expand(4, 3), u.mT.mT)
        total = ys.sum() + c.sum()
        return total, *torch.autograd.grad(total, [weight])

    u = torch.randn(5, 4, 3)
    function = Compiled(value)
    for _ in range(2):
        torch.testing.assert_close(function(u), value(u), rtol=1e-10, atol=1e-12)
    assert function.compiled, function.fallback_reason


def test_a_step_that_carries_nothing_is_unrolled(recorded):
    weight = nn.Parameter(torch.tensor(3.0))

    def gradient(x):
        _, y = scan(lambda c, u: ((), u * weight), (), x)
        return torch.autograd.grad(y.sum(), weight)[0]

    compiled = Compiled(gradient)
    assert compiled(torch.arange(7.0)) == 21 and compiled.compiled


@pytest.mark.parametrize("T", [2, 5, 6, 11])
def test_chunks_of_steps_may_overlap(T, recorded):
    weight, x = nn.Parameter(torch.tensor(0.9)), torch.linspace(-1, 1, T)

    def gradient(x):
        last, y = scan(lambda c, u: ((c * weight + u).tanh(), c * u), torch.ones(()), x)
        value = y.square().sum() + last
        return value.detach(), torch.autograd.grad(value, weight)[0]

    compiled = Compiled(gradient)
    for found, expected in zip(compiled(x), gradient(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert compiled.compiled and _Step.table


def test_draws_that_cannot_be_taken_apart_are_unrolled(recorded):
    def value(u):
        def step(z, u):
            z = torch.distributions.Gamma(z.exp() + 1, 1.0).rsample()
            return z, z + u

        return scan(step, torch.zeros(3), u)[1].sum()

    function = Compiled(value)
    u = torch.randn(4, 3)
    torch.manual_seed(1)
    expected = value(u)
    torch.manual_seed(1)
    assert function(u) == expected and function.compiled


@pytest.mark.parametrize("kind", ["zeros", "counter", "bias"])
def test_steps_that_are_written_by_hand(kind, recorded):
    """A fresh tensor that the step fills, a whole number that it counts, a bias for each row."""
    W, b = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(5, 3))

    def step(state, u):
        z, n = state
        if kind == "zeros":
            new = torch.zeros(5, 3)
            new[:, 0] = z[:, 0] * W[0, 0]
            new[:, 1:] = (z @ W)[:, 1:]
        else:
            new = torch.addmm(b, z, W) if kind == "bias" else z @ W / n
        return (torch.tanh(new + u), n + 1), new

    def value(u):
        start = torch.ones(5, 3), torch.ones((), dtype=torch.long if kind == "counter" else None)
        total = scan(step, start, u)[1].square().sum()
        return total, *torch.autograd.grad(total, [W, b], allow_unused=True)

    u, function = torch.randn(4, 5, 3), Compiled(value)
    expected = value(u)
    found = function(u)
    assert function.compiled, function.fallback_reason
    for a, c in zip(found, expected, strict=True):
        assert (a is None) == (c is None)
        if a is not None:
            torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)


def with_large_matrices(kind):
    """A recurrence of single precision, a value and its gradients; and where they are taken."""
    generator = torch.Generator().manual_seed(0)
    W, b, b_of_rows, start, u = (
        torch.randn(shape, generator=generator, dtype=torch.float32)
        for shape in ((6, 6), (6,), (5, 6), (5, 6), (7, 5, 6))
    )
    parameters = [nn.Parameter(each) for each in (W, b, b_of_rows, start)]
    fixed, (W, b, b_of_rows, start) = W, parameters

    def written_between(W, c, u):
        product = u @ W
        W.mul_(0.5)
        return product + c * W[0]

    def step(c, u):
        product = {
            "cell": lambda: nn.functional.linear(c, W, b),
            "without bias": lambda: c @ W,
            "bias of rows": lambda: torch.addmm(b_of_rows, c, W),
            "made of constants": lambda: c @ (W - W.mT),
            "from the left": lambda: (W @ c.mT).mT,
            "written between": lambda: written_between(fixed.clone(), c, u),
        }[kind]()
        c = (product + u).tanh()
        return c, c

    def value(u):
        total = scan(step, start, u)[1].square().sum()
        return total, *torch.autograd.grad(total, parameters, allow_unused=True)

    return value, u


def check_packed(kind, monkeypatch):
    packed = []
    monkeypatch.setattr("pyro_vae.scan.LARGE", 1)
    monkeypatch.setattr("pyro_vae.scan._packed", lambda w: packed.append(w) or _packed(w))
    value, u = with_large_matrices(kind)
    function = Compiled(value)
    expected, found = value(u), function(u)
    assert function.compiled, function.fallback_reason
    for a, c in zip(found, expected, strict=True):
        assert (a is None) == (c is None)
        if a is not None:
            torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)
    function(u)  # which is held against the program
    del packed[:]
    function(u)
    return len(packed)


@pytest.mark.skipif(not _packs(), reason="expected x86 and oneDNN")
@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("cell", 2),
        ("without bias", 2),
        ("bias of rows", 2),
        ("made of constants", 2),
        ("from the left", 1),
        ("written between", 0),
    ],
)
def test_large_matrices_are_packed_once_for_all_steps(kind, count, recorded, monkeypatch):
    """Forwards and backwards; a matrix on the left only backwards, where it is on the right."""
    assert check_packed(kind, monkeypatch) == count


@pytest.mark.skipif(not _packs(), reason="expected x86 and oneDNN")
def test_inductor_takes_packed_matrices(monkeypatch, short_chunks):
    assert check_packed("cell", monkeypatch) == 2


def test_a_step_that_writes_into_a_buffer_is_unrolled(recorded):
    count = torch.zeros(())

    def value(u):
        def step(c, u):
            count.add_(1.0)
            return c + u * count, c

        return scan(step, torch.zeros(3), u)[0].sum()

    function = Compiled(value)
    u = torch.randn(4, 3)
    found = [function(u) for _ in range(3)]
    assert function.compiled, function.fallback_reason
    assert float(count) == 12.0
    count.zero_()
    torch.testing.assert_close(found, [value(u) for _ in range(3)])


@pytest.mark.parametrize("make", [Trace_ELBO, TraceMeanField_ELBO, lambda: IWAE(3), lambda: DReG(3)])
def test_compiled_steps_are_stock_steps(make, recorded):
    bounds = {}
    for kind in (pyro.infer.SVI, CompiledSVI):
        pyro.clear_param_store()
        pair = Pair()
        svi = kind(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.01}), make())
        torch.manual_seed(0)
        bounds[kind] = [svi.step(*batch()) for _ in range(4)]
    assert svi.compiled, svi.fallback_reason
    assert bounds[CompiledSVI] == pytest.approx(bounds[pyro.infer.SVI], rel=1e-9)


def test_inductor_compiles_one_step(short_chunks):
    pair = Pair()
    svi = CompiledSVI(pair.model, pair.guide, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO())
    torch.manual_seed(0)
    found = [svi.step(*batch()) for _ in range(3)]
    assert svi.compiled, svi.fallback_reason
    pyro.clear_param_store()
    pair = Pair()
    stock = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO())
    torch.manual_seed(0)
    assert found == pytest.approx([stock.step(*batch()) for _ in range(3)], rel=1e-9)
