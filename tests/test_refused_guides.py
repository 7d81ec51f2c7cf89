"""Guides that observe, and KL weights beside sums over discrete sites: what is right is taken, the rest is refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoNormalMessenger
from pyro.nn import PyroModule
from torch import nn

from pyro_vae import compare_estimators, evaluate, fit
from pyro_vae.annealing import annealed, sandwich
from pyro_vae.estimators import ELBO, IWAE, STL, VIMCO, DReG, Renyi, SemiSupervisedELBO, WakeSleep
from pyro_vae.prediction import scores
from pyro_vae.svi import latent_scale

pytestmark = pytest.mark.usefixtures("float64")
X, Y = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64), torch.eye(3, dtype=torch.float64)


class Labelled(PyroModule):
    """y of three classes, z ~ N(m, 1), x ~ N(z, 1)."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()))

    def forward(self, x=None, y=None, num_data=None):
        with pyro.plate("data", num_data if x is None else len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3) / 3), obs=y)
            z = pyro.sample("z", dist.Normal(self.mean, 1.0))
            return pyro.sample("x", dist.Normal(z, 1.0), obs=x), y


class Observing(PyroModule):
    """q(z | x), and q(y | x) that is scored where y is given, or a site of the guide's own that is observed."""

    def __init__(self, what="y"):
        super().__init__()
        self.what, self.logits = what, nn.Parameter(torch.tensor([0.0, 1.0, 2.0]))

    def forward(self, x=None, y=None, num_data=None):
        with pyro.plate("data", len(x)):
            q = dist.OneHotCategorical(logits=self.logits)
            if y is None or self.what == "y":
                pyro.sample("y", q, obs=y)
            if self.what == "other":
                pyro.sample("other", dist.Normal(self.logits[0], 1.0), obs=x)
            if self.what == "factor":
                pyro.factor("factor", 0.0 * q.log_prob(torch.eye(3)[0]), has_rsample=False)
            if self.what == "deterministic":
                pyro.deterministic("probabilities", q.probs)
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))


def trained(loss):
    def query(model, guide, tmp_path):
        options = {"batch_size": 3, "epochs": 1, "progress": False, "out": tmp_path / "run"}
        return fit(model, guide, (X, Y), loss=loss, **options)

    return query


QUERIES = {
    **{type(loss).__name__: trained(loss) for loss in (TraceMeanField_ELBO(), TraceGraph_ELBO(), RenyiELBO(0.5, 2))},
    "Trace_ELBO": trained(Trace_ELBO()),
    "TraceEnum_ELBO": trained(TraceEnum_ELBO(max_plate_nesting=1)),
    "ReweightedWakeSleep": trained(ReweightedWakeSleep()),
    "SemiSupervisedELBO": trained(SemiSupervisedELBO(max_plate_nesting=1)),
    **{
        type(loss).__name__: lambda model, guide, _, loss=loss: loss.loss(model, guide, X, Y)
        for loss in (ELBO(), IWAE(2), DReG(2), STL(), Renyi(0.5, 2), VIMCO(2), WakeSleep())
    },
    "evaluate": lambda model, guide, _: evaluate(model, guide, (X, Y), num_samples=2, progress=False),
    "scores": lambda model, guide, _: scores(model, guide, (X, Y), num_samples=2),
    "annealed": lambda model, guide, _: annealed(model, (X, Y), guide=guide, num_temperatures=2, progress=False),
    "compare_estimators": lambda model, guide, _: compare_estimators(model, guide, (X, Y), [ELBO], progress=False),
}


@pytest.mark.parametrize("what", ["y", "other"])
@pytest.mark.parametrize("query", QUERIES)
def test_a_guide_that_observes_is_refused_by_name(query, what, tmp_path):
    """Its ln q of what is given would stand in the bound, which is then above ln p(x)."""
    with pytest.raises(ValueError, match=f'expected a guide that draws latent sites alone, got .*"{what}"'):
        QUERIES[query](Labelled(), Observing(what), tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["nothing", "factor", "deterministic"])
def test_guides_that_draw_alone_are_exact(what, tmp_path):
    """ln p(x, y), for the exact posterior; `pyro.factor` and `pyro.deterministic` are no observations."""
    exact = float((math.log(1 / 3) + dist.Normal(0.0, math.sqrt(2.0)).log_prob(X)).sum())
    losses = [STL(), IWAE(2)]
    if what != "deterministic":  # of which Pyro's bounds warn
        losses.append(SemiSupervisedELBO(max_plate_nesting=1))
        trained(Trace_ELBO())(Labelled(), Observing(what), tmp_path)
    for loss in losses:
        assert -loss.loss(Labelled(), Observing(what), X, Y) == pytest.approx(exact, abs=1e-6)


@pytest.mark.filterwarnings("ignore:Found non-auxiliary vars in guide but not model")  # Pyro's, beside the refusal
@pytest.mark.parametrize("method", ["loss", "differentiable_loss", "loss_and_grads"])
@pytest.mark.parametrize("what", ["y", "other"])
def test_labels_are_the_models_alone(method, what):
    with pytest.raises(ValueError, match=f'expected a guide that draws latent sites alone, got .*"{what}"'):
        getattr(SemiSupervisedELBO(max_plate_nesting=1), method)(Labelled(), Observing(what), X, Y)
    with pytest.raises(ValueError, match='"y"'):
        ELBO().loss(Labelled(), Observing(), X, Y)


def test_a_guide_that_runs_the_model_itself_is_for_stock_bounds(tmp_path):
    model = Labelled()
    guide = AutoNormalMessenger(model, amortized_plates=("data",))
    options = {"batch_size": 3, "epochs": 1, "progress": False, "out": tmp_path / "run"}
    assert math.isfinite(fit(model, guide, (X, Y), loss=Trace_ELBO(), **options).history[0]["bound"])


def test_a_sandwich_from_a_guide_that_observes_is_refused():
    def model(x=None, num_data=None):
        with pyro.plate("data", num_data if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))
            pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x)

    with pytest.raises(ValueError, match='expected a guide that draws latent sites alone, got the observed site "x"'):
        sandwich(model, 4, guide=guide, num_temperatures=2, progress=False)


# ------------------------------------------------------------ a KL weight beside sums


LOCATIONS, WEIGHTS = (torch.tensor(each, dtype=torch.float64) for each in ([-1.0, 0.5, 2.0], [0.2, 0.5, 0.3]))


class Mixture(PyroModule):
    """c of three, z ~ N(l_c, 1), x ~ N(z + s_c, 1); s is 0 where x does not depend on c by itself."""

    def __init__(self, direct, enumerated=True):
        super().__init__()
        self.locations = nn.Parameter(LOCATIONS.clone())
        self.shifts = nn.Parameter(torch.tensor([0.3, 0.0, -0.5])) if direct else None
        self.infer = {"enumerate": "parallel"} if enumerated else {}

    def forward(self, x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS.to(x)), infer=self.infer)
            z = pyro.sample("z", dist.Normal(self.locations[c], 1.0))
            pyro.sample("x", dist.Normal(z if self.shifts is None else z + self.shifts[c], 1.0), obs=x)


class Guide(PyroModule):
    """z at x / 2, a point, so that a bound is its value there; q(c) where it is asked for."""

    def __init__(self, draws_c):
        super().__init__()
        self.draws_c, self.logits = draws_c, nn.Parameter(torch.tensor([0.1, 0.4, -0.2]))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            if self.draws_c:
                pyro.sample("c", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Delta(x / 2 + 0 * self.logits[0]))


@pytest.mark.parametrize("weight", [0.25, 1.0, 3.0])
@pytest.mark.parametrize(("direct", "draws_c"), [(False, False), (False, True), (True, True)])
def test_sums_with_a_kl_weight_are_exact(direct, draws_c, weight):
    """``ln p(x | z) + w ln sum_c p(c) p(z | c)``, and ``sum_c q(c) [ln p(x | z, c) + w ln p(c) p(z | c) / q(c)]``."""
    model, guide = Mixture(direct, enumerated=not draws_c), Guide(draws_c)
    z = X[:, None] / 2
    of_z = dist.Normal(LOCATIONS, 1.0).log_prob(z) + WEIGHTS.log()  # (B, 3)
    of_x = dist.Normal(z + (model.shifts.detach() if direct else torch.zeros(3)), 1.0).log_prob(X[:, None])
    q = guide.logits.detach().softmax(0)
    exact = (q * (of_x + weight * (of_z - q.log()))).sum(1) if draws_c else of_x[:, 0] + weight * of_z.logsumexp(1)
    with latent_scale(weight):
        found = -TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, X)
    assert found == pytest.approx(float(exact.sum()), rel=1e-6)


class SquaredELBO(Trace_ELBO):
    """No line in the KL weight."""

    def loss(self, *args, **kwargs):
        return super().loss(*args, **kwargs) ** 2


@pytest.mark.parametrize("loss", [TraceEnum_ELBO(max_plate_nesting=1), SquaredELBO(), "Trace_MMD"])
def test_a_kl_weight_that_a_loss_does_not_weigh_is_refused_before_training(loss, tmp_path):
    """A scaled c in one sum with an unscaled x; a square; a loss that reads no scale of latent sites."""
    enumerated = isinstance(loss, TraceEnum_ELBO)
    if loss == "Trace_MMD":
        import pyro.contrib.gp

        loss = Trace_MMD(pyro.contrib.gp.kernels.RBF(1))
    model, guide = Mixture(True, enumerated), Guide(draws_c=not enumerated)
    options = {"kl_weight": lambda epoch: 0.5, "batch_size": 3, "progress": False, "out": tmp_path / "run"}
    with pytest.raises(ValueError, match=f"expected a .*{type(loss).__name__}.*leave kl_weight out"):
        fit(model, guide, X, loss=loss, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("draws_c", [False, True])
def test_a_kl_weight_beside_sums_trains(draws_c, tmp_path):
    model, guide = Mixture(direct=draws_c, enumerated=not draws_c), Guide(draws_c)
    options = {"kl_weight": lambda epoch: 0.5, "batch_size": 3, "progress": False, "out": tmp_path / "run"}
    run = fit(
        model, guide, X, loss=TraceEnum_ELBO(max_plate_nesting=1), epochs=2, learning_rate=lambda e: 0.0, **options
    )
    with latent_scale(0.5):
        expected = -TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, X) / 3
    assert run.history[-1]["bound"] == pytest.approx(expected, rel=1e-6)
