"""Networks and programs that count dimensions from the left: several draws are what as many single draws are."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, Part
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import nn

from pyro_vae import CompiledSVI, annealing, compare_estimators, evaluate
from pyro_vae.distributions import MarkovChain, Unfolded, WithMissing, folded, unfolded
from pyro_vae.draws import SeparateDrawsWarning, difference
from pyro_vae.estimators import ELBO, IWAE
from pyro_vae.guides import AmortizedGuide
from pyro_vae.log_weights import log_weights, structure_of
from pyro_vae.models import VAE, BayesianVAE, ConditionalVAE, StateSpaceModel, likelihoods
from pyro_vae.models.transitions import Emission, Initial, NormalTransition
from pyro_vae.prediction import decode, encode, reconstruct, sample, to_arviz

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
BATCH_STATISTICS = next(case for case in CASES if "batch_statistics" in case.name)
CONTINUOUS = [case for case in CASES if "categorical" not in case.name]


# ------------------------------------------------------------ the table of pairs


@every_case
def test_joint_draws_score_as_single_calls_in_single_precision(case):
    """In double precision this is the law on log-weights of test_laws.py."""
    model, guide = (program.eval() for program in case.pair())
    x = case.data()
    weights = log_weights(model, guide, (x,), {}, 4)
    for k in range(4):
        draws = {name: z[k] for name, (_, _, z, _) in weights.sites.items()}
        q, p = (poutine.trace(poutine.condition(program, draws)).get_trace(x) for program in (guide, model))
        for trace in (q, p):
            trace.compute_log_prob()
        of_q = sum(q.nodes[name]["log_prob"] for name in draws)
        log_weight = sum(p.nodes[name]["log_prob"] for name in [*draws, "x"]) - of_q
        off = (weights.log_weight[k] - log_weight).abs()
        if not inverts(case):  # a flow is scored by its inverse here, by the pass that made the draw there
            assert bool((off <= 1e-5 * (1 + log_weight.abs() + of_q.abs())).all())


def inverts(case):
    return case.name in ("mixture_prior", "laplace_prior", "gamma_prior", "dirichlet_prior", "distribution_prior")


@pytest.mark.parametrize("case", CONTINUOUS, ids=lambda case: case.name)
def test_chains_go_where_single_ones_go(case):
    """The annealed density, its gradient and its ratio for K chains are those of each alone."""
    model, guide = (program.double().eval() for program in case.pair())
    x = case.data().double()
    batch = (x,), {}
    path, single = (annealing._Path(model, guide, batch, K) for K in (3, 1))
    assert path.together
    u = path.draws(3, batch)
    for k, alone in enumerate(u.split(1)):
        for joint, own in zip(path(batch, u, 0.4), single(batch, alone, 0.4), strict=True):
            torch.testing.assert_close(joint[k], own[0], rtol=1e-9, atol=1e-9)


@every_case
def test_gradients_of_joint_draws_are_those_of_single_calls(case):
    """At the same draws, for each parameter of the model."""
    model, guide = (program.double().eval() for program in case.pair())
    x = case.data().double()
    weights = log_weights(model, guide, (x,), {}, 3, leaves=True)
    draws = {name: z.detach() for name, (_, _, z, _) in weights.sites.items()}
    of_guide = {id(p) for p in guide.parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in of_guide]
    if not parameters:
        return
    joint = torch.autograd.grad(weights.log_p.sum(), parameters, allow_unused=True)
    log_p = [
        poutine.trace(poutine.condition(model, {name: z[k] for name, z in draws.items()})).get_trace(x).log_prob_sum()
        for k in range(3)
    ]
    single = torch.autograd.grad(sum(log_p), parameters, allow_unused=True)
    for a, b in zip(joint, single, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


LEFT = [case for case in CASES if "left" in case.name or "recurrent" in case.name or "user" in case.name]


@pytest.mark.parametrize("case", LEFT, ids=lambda case: case.name)
def test_compiled_steps_take_such_networks(case, recorded_once):
    losses = []
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        model, guide = case.pair()
        svi = kind(model, guide, pyro.optim.Adam({"lr": 0.01}), IWAE(3))
        torch.manual_seed(0)
        losses.append([svi.step(case.data()) for _ in range(4)])
    assert svi.compiled, svi.fallback_reason
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("case", LEFT, ids=lambda case: case.name)
def test_what_a_pair_is_for_takes_such_networks(case):
    model, guide = case.pair()
    x = case.data(20)
    assert sample(model, 6).shape == (6, *x.shape[1:])
    encoding = encode(guide, x) if "hierarchical" not in case.name else None
    if encoding is not None and "sequences" not in case.name:
        assert decode(model, encoding.mean).shape == x.shape
    assert reconstruct(model, guide, x, num_samples=3).shape == x.shape
    assert to_arviz(model, guide, x, num_samples=3)["posterior"].sizes["draw"] == 3
    few = {"num_particles": (1, 3), "num_gradients": 8, "num_samples": 8, "num_data": 20, "progress": False}
    assert (compare_estimators(model, guide, x, [IWAE], **few).table["bound"].abs() > 0).all()


# ------------------------------------------------------------ batch statistics


def test_batch_statistics_have_a_call_for_each_draw():
    """As stock SVI without vectorised particles: the same loss, gradients and running statistics."""
    results = []
    for together in (True, False):
        model, guide = (program.double() for program in BATCH_STATISTICS.pair())
        x = BATCH_STATISTICS.data().double()
        torch.manual_seed(0)
        loss = ELBO(3, vectorize_particles=together).loss_and_grads(model, guide, x)
        gradients = [p.grad for p in (*model.parameters(), *guide.parameters())]
        results.append([torch.tensor(loss), *gradients, *model.buffers(), *guide.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    model, guide = BATCH_STATISTICS.pair()
    model, guide = model.double(), guide.double()
    torch.manual_seed(0)
    stock = Trace_ELBO(num_particles=3).loss(model, guide, BATCH_STATISTICS.data().double())
    for a, b in zip(results[0][-10:], [*model.buffers(), *guide.buffers()][-10:], strict=True):
        torch.testing.assert_close(a, b)
    assert stock == pytest.approx(float(results[0][0]), rel=0.2)  # an analytic divergence there, draws here


def test_a_decoder_with_batch_statistics_sees_one_draw_at_a_time():
    decoder = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Unflatten(1, (1, 4))).double()
    z = torch.randn(5, 6, 3, dtype=torch.float64)
    joint = folded(decoder, z)
    means = decoder[0].running_mean.clone()
    decoder[0].reset_running_stats()
    for k in range(5):
        torch.testing.assert_close(joint[k], decoder(z[k]))
    torch.testing.assert_close(decoder[0].running_mean, means)
    decoder.eval()
    torch.testing.assert_close(folded(decoder, z), torch.stack([decoder(each) for each in z]))


def test_parts_of_sequences_with_batch_statistics():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    part = Wrapped(net)
    z = torch.randn(4, 5, 6, 3)  # draws, data, steps
    p = folded(part, z, data_dims=2)
    assert p.batch_shape == (4, 5, 6) and isinstance(p.base_dist, dist.Normal)
    torch.testing.assert_close(p.mean[1], net(z[1].flatten(0, 1)).view(5, 6, 2))


class Wrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, z):
        return dist.Normal(self.net(z), 1.0).to_event(1)


# ------------------------------------------------------------ distributions of another batch shape

N, SHAPE = 6, torch.Size([2, 3])
DISTRIBUTIONS = {
    "Normal": lambda: dist.Normal(torch.randn(N), 1 + torch.rand(N)),
    "independent": lambda: dist.Normal(torch.randn(N, 2, 4), 1.0).to_event(2),
    "MultivariateNormal": lambda: dist.MultivariateNormal(torch.randn(N, 2), torch.eye(2) + 0.3),
    "precision": lambda: dist.MultivariateNormal(torch.randn(N, 2), precision_matrix=torch.eye(2) + 0.3),
    "of its width": lambda: dist.MultivariateNormal(torch.randn(N, N), torch.eye(N)),
    "Bernoulli": lambda: dist.Bernoulli(torch.rand(N)),
    "Categorical": lambda: dist.Categorical(logits=torch.randn(N, 3)),
    "Binomial": lambda: dist.Binomial(7, torch.rand(N)),
    "Beta": lambda: dist.Beta(1 + torch.rand(N), 2.0),
    "Gamma": lambda: dist.Gamma(1 + torch.rand(N), 2.0),
    "LogNormal": lambda: dist.LogNormal(torch.randn(N), 0.5),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(logits=torch.randn(N, 3)), dist.Normal(torch.randn(N, 3), 1.0)
    ),
    "masked": lambda: dist.Normal(torch.randn(N), 1.0).mask(torch.arange(N) < 4),
    "missing": lambda: WithMissing(dist.Normal(torch.randn(N, 2), 1.0).to_event(1)),
    "chain": lambda: MarkovChain(dist.Normal(torch.randn(N, 2), 1.0).to_event(1), Part(2, 2, 0.3), 4),
    "lazy": lambda: (p := dist.Bernoulli(torch.rand(N)), p.logits, p)[2],
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_another_batch_shape_is_the_same_distribution(name):
    p = DISTRIBUTIONS[name]()
    q = unfolded(p, SHAPE)
    assert q.batch_shape == SHAPE and q.event_shape == p.event_shape
    x = p.sample(torch.Size([5]))
    torch.testing.assert_close(q.log_prob(x.reshape(5, *SHAPE, *p.event_shape)), p.log_prob(x).reshape(5, *SHAPE))
    torch.manual_seed(0)
    drawn = p.sample()
    torch.manual_seed(0)
    assert torch.equal(q.sample().reshape(drawn.shape), drawn)
    if name not in ("chain", "Categorical"):
        torch.testing.assert_close(q.mean, p.mean.reshape(*SHAPE, *p.event_shape))
    wider = q.expand(torch.Size([4]) + SHAPE)
    assert wider.log_prob(x[0].reshape(*SHAPE, *p.event_shape)).shape == (4, *SHAPE)


def test_a_users_subclass_is_not_rebuilt_from_its_parameters():
    class Shifted(dist.Normal):
        def log_prob(self, value):
            return super().log_prob(value - self.by)

    p = Shifted(torch.randn(N), 1.0)
    p.by = 3.0
    q = unfolded(p, SHAPE)
    assert isinstance(q, Unfolded)
    torch.testing.assert_close(q.log_prob(torch.zeros(SHAPE)), p.log_prob(torch.zeros(N)).reshape(SHAPE))


def test_a_network_that_loses_rows_is_refused():
    with pytest.raises(ValueError, match="a row for each of the 6 rows it gets, got .12, 2.: let it keep dimension 0"):
        folded(lambda z: z.reshape(-1, 2), torch.zeros(2, 3, 4))


def test_models_with_more_than_z():
    """Covariates, and weights that are latent."""
    net = nn.Sequential(nn.Linear(5, 6), nn.GLU(1), nn.Linear(3, 4), nn.Unflatten(1, (1, 4)))
    z, y = torch.randn(7, 6, 2), torch.randn(6, 3)
    conditional = ConditionalVAE((4,), covariates=3, latent_dim=2, decoder=net)
    joint = conditional.observation(z, y).base_dist.logits
    torch.testing.assert_close(joint, torch.stack([conditional.observation(one, y).base_dist.logits for one in z]))
    bayesian = BayesianVAE((4,), size=6, latent_dim=5, decoder=net)
    w = torch.randn(int(bayesian.weight_scale.numel()))
    z = torch.randn(7, 6, 5)
    joint = bayesian.observation(z, w).base_dist.logits
    torch.testing.assert_close(joint, torch.stack([bayesian.observation(one, w).base_dist.logits for one in z]))
    several = bayesian.observation(z, w + torch.arange(7.0)[:, None, None]).base_dist.logits
    own = [bayesian.observation(one, w + k).base_dist.logits for k, one in enumerate(z)]
    torch.testing.assert_close(several, torch.stack(own), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------ a user's own program


class Own(PyroModule):
    """z ~ N(0, I), x | z ~ Poisson(topics(softmax(z))), a softmax over a dimension from the left or the right."""

    def __init__(self, dim):
        super().__init__()
        torch.manual_seed(1)
        self.topics, self.softmax = nn.Linear(3, 6), nn.Softmax(dim)

    def prior(self):
        zeros = self.topics.weight.new_zeros(3)
        return dist.Normal(zeros, 1 + zeros).to_event(1)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", dist.Poisson(self.topics(self.softmax(z)).exp()).to_event(1), obs=x)


def own(dim, batch=8):
    torch.manual_seed(0)
    x = torch.poisson(torch.ones(batch, 6)).double()
    model = Own(dim).double()
    return model, AmortizedGuide(model, encoder=nn.Linear(6, 4).double(), example=((x,), {})), x


def test_a_program_that_counts_from_the_left_is_scored_draw_by_draw():
    (model, guide, x), (right, _, _) = own(1), own(-1)
    torch.manual_seed(0)
    with pytest.warns(SeparateDrawsWarning, match='20 draws in one call give site "x" another log-probability'):
        bound = -IWAE(20).loss(model, guide, x)
    torch.manual_seed(0)
    assert -IWAE(20, vectorize_particles=False).loss(right, guide, x) == pytest.approx(bound, rel=1e-12)
    joint = evaluate(right, guide, x, num_samples=300, progress=False)
    with pytest.warns(SeparateDrawsWarning, match="Fix: count dimensions from the right"):
        scores = evaluate(model, guide, x, num_samples=300, progress=False)
    noise = 5 * (scores.elbo.standard_error_draws + joint.elbo.standard_error_draws)
    assert float(scores.elbo) == pytest.approx(float(joint.elbo), abs=noise)


def test_it_is_looked_at_once():
    (model, guide, x), loss = own(1), IWAE(5)
    with pytest.warns(SeparateDrawsWarning):
        loss.loss(model, guide, x)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    loss.loss(model, guide, x)  # and a second warning would be an error
    assert len(calls) == 5


def test_a_program_that_only_takes_one_draw():
    """`view` of a shape that is fixed raises where there are more draws: it is told, and scored."""

    class Fixed(Own):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", self.prior())
                rate = self.topics(z.view(len(x), 3)).exp()
                return pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)

    _, guide, x = own(-1)
    model = Fixed(-1).double()
    with pytest.warns(SeparateDrawsWarning, match="6 draws in one call raise RuntimeError: shape"):
        assert torch.isfinite(torch.tensor(IWAE(6).loss(model, guide, x)))


def test_an_error_of_a_single_draw_is_the_users_own():
    class Broken(Own):
        def forward(self, x):
            if poutine.runtime._PYRO_STACK and x.sum() < 0:
                raise KeyError("a fault of the program")
            return super().forward(x)

    _, guide, x = own(-1)
    loss, model = IWAE(4), Broken(-1).double()
    loss.loss(model, guide, x)
    with pytest.raises(KeyError, match="a fault of the program"):
        IWAE(4).loss(model, guide, -x - 1)


def test_gradients_compiled_and_annealed(recorded):
    model, guide, x = own(1)
    with pytest.warns(SeparateDrawsWarning):
        svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), IWAE(3))
        torch.manual_seed(0)
        losses = [svi.step(x) for _ in range(4)]
    assert svi.compiled, svi.fallback_reason
    pyro.clear_param_store()  # which holds the other one's parameters under the same names
    right, guide, x = own(-1)
    svi = SVI(right, guide, pyro.optim.Adam({"lr": 0.01}), IWAE(3, vectorize_particles=False))
    torch.manual_seed(0)
    assert [svi.step(x) for _ in range(4)] == pytest.approx(losses, rel=1e-9)
    (model, _, x), (right, _, _) = own(1, 4), own(-1, 4)
    settings = {"num_chains": 8, "num_temperatures": 40, "leapfrog_steps": 3, "progress": False}
    with pytest.warns(SeparateDrawsWarning):
        left = annealing.annealed(model, x, **settings)
    joint = annealing.annealed(right, x, **settings)
    noise = 6 * (left.log_evidence.standard_error_draws + joint.log_evidence.standard_error_draws)
    assert float(left) == pytest.approx(float(joint), abs=noise)


def test_batch_statistics_of_a_plain_function_are_found():
    """A network in a closure: in training mode its draws have calls of their own, quietly, in eval mode one call."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 6))
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            rate = net(z.reshape(-1, 3)).reshape(*z.shape[:-1], 6).exp()
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    x, loss = torch.poisson(torch.ones(8, 6)), IWAE(5)
    loss.loss(model, guide, x)
    calls.clear()
    loss.loss(model, guide, x)
    assert len(calls) == 5
    net.eval()
    for _ in range(2):  # calls 1 and 2 are held against single ones
        loss.loss(model, guide, x)
    calls.clear()
    loss.loss(model, guide, x)
    assert len(calls) == 1


def test_dropout_is_no_difference():
    class Dropping(Own):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", self.prior())
                rate = self.topics(nn.functional.dropout(z, 0.5, self.training)).exp()
                return pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)

    _, guide, x = own(-1)
    model = Dropping(-1).double()
    structure = structure_of(model, guide, (x,), {})
    assert difference([guide, model], (x,), {}, 4, structure.nesting, structure.plate) is None
    assert IWAE(4).loss(model, guide, x) > 0


def test_nested_plates_are_single_calls_too():
    """Plates on dimensions left of the data's: a single draw has the shapes of a call of its own."""
    net = nn.Sequential(nn.Linear(3, 6), nn.GLU(1), nn.Linear(3, 2))

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("groups", 2, dim=-2):
                pyro.sample("w", dist.Normal(torch.zeros(2, len(x)), 1.0))
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("groups", 2, dim=-2):
                pyro.sample("w", dist.Normal(torch.zeros(2, len(x)), 0.5))
            pyro.sample("z", dist.Normal(torch.zeros(3), 0.5).to_event(1))

    x = torch.randn(5, 2)
    with pytest.warns(SeparateDrawsWarning, match="draws in one call"):
        weights = log_weights(model, guide, (x,), {}, 3, plate="data")
    assert weights.log_weight.shape == (3, 5)
    for k, call in enumerate(weights.calls):
        trace = call.p
        trace.compute_log_prob()
        expected = trace.nodes["x"]["log_prob"] + trace.nodes["z"]["log_prob"] + trace.nodes["w"]["log_prob"].sum(0)
        torch.testing.assert_close(weights.log_p[k], expected)


# ------------------------------------------------------------ sequences


class Turned(nn.Module):
    """A part with a softmax over `dim` of (N, 2)."""

    def __init__(self, out, scale, dim):
        super().__init__()
        torch.manual_seed(out)
        self.net, self.scale = nn.Sequential(nn.Linear(2, 5), nn.Softmax(dim), nn.Linear(5, out)), scale

    def forward(self, z, u=None):
        return dist.Normal(self.net(z), self.scale).to_event(1)


def sequence_model(dim):
    return StateSpaceModel(Initial(2), Turned(2, 0.5, dim), Turned(3, 0.3, dim))


def sequence_guide(dim):
    """A user's own guide whose second state sees the first."""
    step = Turned(2, 0.4, dim)

    def guide(x, lengths=None, mask=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("first", dist.Normal(x[:, 0, :2], 1.0).to_event(1), infer={"is_auxiliary": True})
            rest = step.net(z)
            path = torch.stack([rest, *[rest] * (x.shape[1] - 1)], -2)
            pyro.sample("z", dist.Normal(path, 0.5).to_event(2))

    return guide


def test_queries_of_sequences_by_parts_that_count_from_the_left():
    x, found = torch.randn(4, 5, 3), []
    for dim in (1, -1):
        model, guide = sequence_model(dim), sequence_guide(-1)
        results = []
        for query in (
            lambda m=model: m.filter(x, num_particles=20).log_evidence,
            lambda m=model, g=guide: m.smooth(g, x, num_samples=6),
            lambda m=model, g=guide: m.forecast(g, x, num_steps=3, num_samples=6),
            lambda m=model, g=guide: m.predict_one_step(g, x, num_samples=6),
            lambda m=model, g=guide: m.impute(g, x, mask=torch.rand(4, 5, 3) < 0.5, num_samples=6),
            lambda m=model: m.prediction_error(torch.ones(6, 4, 5, 2), x),
            lambda m=model: m(num_data=4, num_steps=5),
        ):
            torch.manual_seed(0)
            results.append(query())
        found.append(results)
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right)


def test_a_guide_that_counts_from_the_left_draws_one_by_one():
    x, model = torch.randn(4, 5, 3), sequence_model(-1)
    for query in (
        lambda guide: model.smooth(guide, x, num_samples=400).mean(0),
        lambda guide: model.forecast(guide, x, num_steps=1, num_samples=400).mean(0),
    ):
        with pytest.warns(SeparateDrawsWarning, match='site "z"'):
            left = query(sequence_guide(1))
        torch.testing.assert_close(left, query(sequence_guide(-1)), atol=0.25, rtol=0)


def test_functions_and_networks_of_the_librarys_own_parts():
    """What `NormalTransition` and `Emission` are given counts from the left."""
    z = torch.randn(7, 6, 2)
    turn = nn.Sequential(nn.Linear(2, 4), nn.GLU(1))
    transition = NormalTransition(turn, 2)
    torch.testing.assert_close(transition(z).mean, torch.stack([transition(one).mean for one in z]))
    network = nn.Sequential(nn.Linear(2, 8), nn.GLU(1), nn.Unflatten(1, (1, 4)))
    emission = Emission(2, 4, likelihoods.Normal(), network)
    torch.testing.assert_close(emission(z).mean, torch.stack([emission(one).mean for one in z]))


def test_a_scalar_and_a_matrix_latent():
    """Events without dimensions, and with two."""
    scalar = VAE(
        (3,),
        prior=dist.Normal(0.0, 1.0),
        decoder=nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 3), nn.Unflatten(1, (1, 3))),
    )
    z = torch.randn(5, 4)
    joint = scalar.observation(z).base_dist.logits
    torch.testing.assert_close(joint, torch.stack([scalar.observation(one).base_dist.logits for one in z]))
    matrix = dist.Normal(torch.zeros(2, 3), 1.0).to_event(2)
    model = VAE((3,), prior=matrix, decoder=nn.Sequential(nn.Flatten(1), nn.Linear(6, 3), nn.Unflatten(1, (1, 3))))
    z = torch.randn(5, 4, 2, 3)
    joint = model.observation(z).base_dist.logits
    torch.testing.assert_close(joint, torch.stack([model.observation(one).base_dist.logits for one in z]))


def test_a_layer_that_is_zero_at_first_hides_nothing_for_long():
    """Joint draws are held against single ones again at calls 1, 2, 4, 8 ..."""

    class Gated(Own):
        def __init__(self, dim):
            super().__init__(dim)
            self.gate = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", self.prior())
                rate = (self.gate * self.topics(self.softmax(z))).exp()
                return pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)

    _, guide, x = own(-1)
    model, loss = Gated(1).double(), IWAE(6)
    loss.loss(model, guide, x)
    with torch.no_grad():
        model.gate.fill_(1.0)
    with pytest.warns(SeparateDrawsWarning):
        loss.loss(model, guide, x)
    torch.manual_seed(0)
    found = loss.loss(model, guide, x)
    torch.manual_seed(0)
    assert found == pytest.approx(IWAE(6, vectorize_particles=False).loss(model, guide, x), rel=1e-12)


def test_another_layer_is_looked_at():
    (model, guide, x), loss = own(-1), IWAE(6)
    for _ in range(3):
        loss.loss(model, guide, x)
    model.softmax = nn.Softmax(1)
    with pytest.warns(SeparateDrawsWarning):
        loss.loss(model, guide, x)


def test_noise_of_a_programs_own_is_told_as_such():
    class Noisy(Own):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", self.prior())
                rate = (self.topics(self.softmax(z)) + torch.randn_like(z[..., :1])).exp()
                return pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)

    _, guide, x = own(-1)
    with pytest.warns(SeparateDrawsWarning, match='site "x" has another log-probability at each call, of noise of its'):
        IWAE(4).loss(Noisy(-1).double(), guide, x)


@pytest.mark.parametrize(
    "emission",
    [
        lambda z: dist.ZeroInflatedPoisson(gate=torch.full(z.shape[:1] + (2,), 0.3), rate=z.exp()),
        lambda z: dist.ZeroInflatedNegativeBinomial(
            gate=torch.full(z.shape[:1] + (2,), 0.3), total_count=2.0, logits=z
        ),
        lambda z: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(*z.shape, 3)), dist.Normal(z[..., None] + torch.arange(3.0), 1.0)
        ),
    ],
    ids=["zero-inflated Poisson", "zero-inflated negative binomial", "mixture"],
)
def test_emissions_of_every_form(emission):
    model = StateSpaceModel(Initial(2), NormalTransition(lambda z: z, 2), lambda z: emission(z).to_event(1))
    z, x = torch.randn(3, 4, 5, 2), torch.ones(4, 5, 2)
    p, folded_z, folded_x = model._emitted(z), z.flatten(0, 2), x.expand(3, 4, 5, 2).flatten(0, 2)
    right = emission(folded_z).to_event(1).log_prob(folded_x).view(3, 4, 5)
    torch.testing.assert_close(p.log_prob(x), right)
