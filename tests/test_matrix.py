"""prior x family x likelihood: a pairwise covering array of these, a third of it compiled, or with ``--matrix`` (`make
matrix`) all of them."""

import contextlib
import itertools

import pyro
import pytest
import torch
from cases import DISCRETE, FAMILIES, LIKELIHOODS, PRIORS, assert_same_sites, small
from pyro.contrib.autoname import scope
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_vae import SVI, CompiledSVI, checkpoint
from pyro_vae.guides import AmortizedGuide, families
from pyro_vae.log_weights import log_weights
from pyro_vae.models import VAE
from pyro_vae.nn import bind

FAMILIES = FAMILIES | DISCRETE
FAMILIES |= {  # of one transform each, as graphs of flows are long
    **{name: families.__dict__[name](1) for name in ("Planar", "Radial", "TriangularSylvester")},
    **{name: families.__dict__[name](1, 2) for name in ("OrthogonalSylvester", "HouseholderSylvester")},
    **{name: families.__dict__[name](1, (8,)) for name in ("IAF", "MAF", "RealNVP")},
    **{name: families.__dict__[name](1, (8,)) for name in ("AutoregressiveSpline", "CouplingSpline")},
}


def covering_array():
    """Triples in which every two values of two columns meet."""
    for (i, prior), (j, family) in itertools.product(enumerate(PRIORS), enumerate(FAMILIES)):
        yield prior, family, list(LIKELIHOODS)[(i + j) % len(LIKELIHOODS)]


def pytest_generate_tests(metafunc):
    if "triple" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--matrix")
        triples = itertools.product(PRIORS, FAMILIES, LIKELIHOODS) if everything else covering_array()
        metafunc.parametrize("triple", list(triples), ids="-".join)


def makes_sense(prior, family, likelihood):
    """A discrete family is for codes of its kind, and a flow for what has a density; the default gives way."""
    return family in ("Categorical", "DiagonalNormal") if prior == "Categorical" else family not in DISCRETE


pytestmark = pytest.mark.usefixtures("float64")


def pair(prior, family, likelihood, seed=0):
    """Model, guide and data of these names."""
    torch.manual_seed(seed)
    p = PRIORS[prior]()
    model = VAE((4,), prior=p, likelihood=LIKELIHOODS[likelihood][0], decoder=small)
    guide = AmortizedGuide(model, getattr(p, "encoder", small), FAMILIES[family])
    return model, guide, LIKELIHOODS[likelihood][1]()[:6].double()


def test_every_two_meet():
    for a, b in itertools.combinations(range(3), 2):
        columns = [(PRIORS, FAMILIES, LIKELIHOODS)[i] for i in (a, b)]
        assert {(t[a], t[b]) for t in covering_array()} == set(itertools.product(*columns))


def is_compiled(prior, family, likelihood):
    """Whether steps of the triple are compiled when not all are: of a third, in which each component is, as a recording
    takes most of the time."""
    return prior == "Categorical" or (list(PRIORS).index(prior) + list(FAMILIES).index(family)) % 3 == 0


def test_every_component_is_compiled():
    possible = [triple for triple in covering_array() if makes_sense(*triple)]
    compiled = [triple for triple in possible if is_compiled(*triple)]
    assert len(compiled) > len(possible) / 4
    for a, b in zip(zip(*compiled, strict=True), zip(*possible, strict=True), strict=True):
        assert {*a} == {*b}


def test_a_pair_keeps_the_laws(triple, recorded_once, tmp_path, request):
    check_pair(triple, tmp_path, is_compiled(*triple) or request.config.getoption("--matrix"))


def check_pair(triple, tmp_path, compiled=True):
    if not makes_sense(*triple):
        refusal = 'expected (a family over the support of latent site "|latent sites with a density for)'
        with pytest.raises(ValueError, match=refusal):
            pair(*triple)
        return
    model, guide, x = pair(*triple)
    assert_same_sites(model, guide, x)
    with torch.no_grad():
        weights = log_weights(model, guide, (x,), {}, 3).log_weight
    assert weights.shape == (3, 6) and bool(weights.isfinite().all())

    checkpoint.save({"model": model.state_dict(), "guide": guide.state_dict()}, tmp_path / "weights")
    *again, _ = pair(*triple, seed=1)
    for name, program in zip(("model", "guide"), again, strict=True):
        program.load_state_dict(checkpoint.load(tmp_path / "weights")[name])
    losses = []
    for programs in ((model, guide), again):
        torch.manual_seed(1)
        losses.append(Trace_ELBO().loss(*programs, x))
    assert losses[0] == losses[1]

    if not compiled:
        return
    trajectories = []
    for svi_class, programs in ((pyro.infer.SVI, (model, guide)), (CompiledSVI, again)):
        pyro.clear_param_store()
        torch.manual_seed(2)
        svi = svi_class(*programs, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
        trajectories.append([svi.step(x) for _ in range(3)])
    assert svi.compiled, svi.fallback_reason
    assert trajectories[1] == pytest.approx(trajectories[0], rel=1e-10)
    assert len(set(trajectories[0])) == 3


def each_component_once():
    """Triples in which every prior, likelihood and family is."""
    sampled = [name for name in PRIORS if name != "Categorical"]
    for i, family in enumerate(name for name in FAMILIES if name not in DISCRETE):
        yield sampled[i % len(sampled)], family, list(LIKELIHOODS)[i % len(LIKELIHOODS)]
    yield "Categorical", "Categorical", "Bernoulli"


@pytest.mark.slow
@pytest.mark.parametrize("names", list(each_component_once()), ids="-".join)
def test_inductor_compiles_the_step_of_every_component(names):
    trajectories = []
    for svi_class in (pyro.infer.SVI, CompiledSVI):
        pyro.clear_param_store()
        model, guide, x = pair(*names)
        svi = svi_class(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        torch.manual_seed(2)
        trajectories.append([svi.step(x) for _ in range(3)])
    assert svi.compiled, svi.fallback_reason
    assert trajectories[1] == pytest.approx(trajectories[0], rel=1e-10)


class Everything(nn.Module):
    """A program of every prior and every likelihood."""

    def __init__(self):
        super().__init__()
        self.priors = {name: make() for name, make in PRIORS.items()}
        self.likelihoods = {name: bind(declared, (4,)) for name, (declared, _) in LIKELIHOODS.items()}
        self.outputs = {name: torch.randn(each.num_parameters, 4) for name, each in self.likelihoods.items()}
        parts = (*self.priors.values(), *self.likelihoods.values())
        self.parts = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        self.data = [batch()[:6].double() for _, batch in LIKELIHOODS.values()]

    def forward(self, *data):
        with pyro.plate("data", len(data[0])):
            for name, prior in self.priors.items():
                with scope(prefix=name):
                    if not isinstance(p := prior(), torch.Tensor):
                        pyro.sample("z", p)
            for (name, likelihood), x in zip(self.likelihoods.items(), data, strict=True):
                pyro.sample(name, likelihood(self.outputs[name].expand(len(x), -1, -1)), obs=x)


def test_inductor_compiles_every_component():
    """The bound of a program of them all, in one graph."""
    model = Everything()
    sites = pyro.poutine.trace(model).get_trace(*model.data).stochastic_nodes
    continuous = [site for site in sites if site not in ("data", "Categorical/z")]
    chosen = dict(zip(continuous, (family for name, family in FAMILIES.items() if name not in DISCRETE), strict=True))
    guide = AmortizedGuide(model, small, chosen, lambda *data: data[0], (model.data, {}), "none")
    losses = []
    for svi_class in (SVI, CompiledSVI):
        svi = svi_class(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        torch.manual_seed(2)
        losses += [svi.evaluate_loss(*model.data) for _ in range(2)]
    assert svi._bound.compiled and losses[2:] == pytest.approx(losses[:2], rel=1e-10)


@pytest.mark.cuda
def test_a_pair_moves_to_cuda(triple):
    if not makes_sense(*triple):
        pytest.skip("refused: a family over another support")
    device = torch.device("cuda") if "function" in triple else contextlib.nullcontext()  # which makes its own tensors
    with device:
        model, guide, x = (each.cuda() for each in pair(*triple))
    weights = log_weights(model, guide, (x,), {}, 3).log_weight
    assert weights.is_cuda and bool(weights.isfinite().all())
