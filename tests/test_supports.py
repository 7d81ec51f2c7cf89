"""Latent sites on every support: a guide and annealed chains take them exactly, or refuse them by name."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints
from torch.distributions import transforms as maps

from pyro_vae import evaluate
from pyro_vae.annealing import annealed
from pyro_vae.guides import AmortizedGuide

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Singular sample detected"),  # torch's, of Wishart's draws
]
ONE = torch.ones((), dtype=torch.float64)


def normals(*shape):
    return dist.Normal(ONE.new_zeros(shape), 1.0).to_event(len(shape))


def mapped(base, *transforms):
    return dist.TransformedDistribution(base, [*transforms])


def mixture(components):
    return dist.MixtureSameFamily(dist.Categorical(ONE.new_ones(2)), components)


class Dice(dist.Categorical):
    """1 to 6."""

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self):
        return constraints.integer_interval(1, 6)

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, self._get_checked_instance(Dice, _instance))


TAKEN = {
    "real matrix": lambda: normals(2, 2),
    "interval": lambda: dist.Beta(2 * ONE, 2 * ONE),
    "another interval": lambda: dist.AffineBeta(2 * ONE, 2 * ONE, -ONE, 2 * ONE),
    "half-line": lambda: dist.HalfNormal(ONE),
    "half-line of inverse Gamma": lambda: dist.InverseGamma(3 * ONE, 2 * ONE),
    "half-line from one on": lambda: dist.Pareto(ONE, 3 * ONE),
    "half-line of Weibull": lambda: dist.Weibull(ONE, 2 * ONE),
    "simplex of two": lambda: dist.Dirichlet(ONE.new_ones(2) + 1),
    "simplex of three": lambda: dist.Dirichlet(ONE.new_ones(3) + 1),
    "simplices": lambda: dist.Dirichlet(ONE.new_ones(2, 3) + 2).to_event(1),
    "ordered": lambda: mapped(normals(3), dist.transforms.OrderedTransform()),
    "Cholesky factor of a correlation": lambda: dist.LKJCholesky(3, ONE),
    "several of them": lambda: dist.LKJCholesky(2, ONE.new_ones(2)).to_event(1),
    "another Cholesky factor": lambda: mapped(normals(3), maps.CorrCholeskyTransform()),
    "parts side by side": lambda: mapped(
        normals(3), maps.CatTransform([maps.ExpTransform(), maps.AffineTransform(0.0, 1.0)], -1, [1, 2])
    ),
    "mixture on the line": lambda: mixture(dist.Normal(ONE.new_tensor([-1.0, 1.0]), 1.0)),
    "mixture on a half-line": lambda: mixture(dist.Gamma(ONE.new_tensor([2.0, 3.0]), 1.0)),
    "one category": lambda: dist.OneHotCategorical(ONE.new_ones(1)),
    "one integer": lambda: dist.Categorical(ONE.new_ones(1)),
    "integers": lambda: dist.Binomial(3, 0.5 * ONE),
    "booleans": lambda: dist.Bernoulli(0.3 * ONE),
}
REFUSED = {  # with what the guide says; chains say so, too, or, where it is None, take it
    "positive definite": (lambda: dist.Wishart(4 * ONE, torch.eye(2, dtype=torch.float64)), "PositiveDefinite"),
    "several": (lambda: dist.Wishart(ONE.new_tensor([4, 5]), torch.eye(2).double()).to_event(1), "PositiveDefinite"),
    "mixture of matrices": (
        lambda: mixture(dist.Wishart(ONE.new_tensor([4, 5]), torch.eye(2).double())),
        "PositiveDefinite",
    ),
    "lower triangular": (lambda: mapped(normals(2, 2), maps.LowerCholeskyTransform()), "LowerCholesky"),
    "sphere": (lambda: dist.ProjectedNormal(ONE.new_ones(3)), "Sphere"),
    "circle": (lambda: dist.ProjectedNormal(ONE.new_ones(2)), "Sphere"),
    "circles": (lambda: dist.ProjectedNormal(ONE.new_ones(4, 2)).to_event(1), "Sphere"),
    "angle": (lambda: dist.VonMises(0 * ONE, ONE), "angles"),
    "angles": (lambda: dist.VonMises(ONE.new_zeros(2), ONE).to_event(1), "angles"),
    "pair of angles": (lambda: dist.SineBivariateVonMises(0 * ONE, 0 * ONE, ONE, ONE, 0.1 * ONE), "angles"),
    "mixture of angles": (lambda: mixture(dist.VonMises(ONE.new_tensor([-1.0, 1.0]), ONE)), "angles"),
    "scaled angle": (lambda: mapped(dist.VonMises(0 * ONE, ONE), maps.AffineTransform(0.0, 2.0)), "angles"),
    "point": (lambda: dist.Delta(ONE), "a point"),
    "unbounded counts": (lambda: dist.Poisson(ONE), "finite or a continuous support"),
    "counts with a total": (lambda: dist.Multinomial(3, ONE.new_ones(3) / 3), "finite or a continuous support"),
    "integers from one on": (lambda: Dice(ONE.new_ones(6)), "integers from 0 on"),
    "no draws": (lambda: dist.ImproperUniform(constraints.real, (), ()), "cannot"),
    "no draws on a sphere": (lambda: dist.VonMises3D(ONE.new_tensor([1.0, 0.0, 0.0])), "cannot"),
    "no density": (lambda: mapped(normals(3), maps.SoftmaxTransform()), "a density on all of its support"),
    "no inverse": (lambda: mapped(dist.Normal(0 * ONE, 1.0), maps.AbsTransform()), "a density on all of its support"),
    "density of another shape": (
        lambda: mapped(normals(2), maps.StackTransform([maps.ExpTransform(), maps.AffineTransform(0.0, 2.0)], -1)),
        "a density on all of its support",
    ),
}
FALSE = {  # supports that are narrower than the distribution says: chains stay where there is a density
    "negative, said to be real": lambda: mapped(
        dist.Normal(0 * ONE, 1.0), maps.ExpTransform(), maps.AffineTransform(0.0, -1.0)
    ),
    "ordered, said to be positive": lambda: mapped(normals(3), dist.transforms.OrderedTransform(), maps.ExpTransform()),
}


def program(make):
    """x ~ N(0, 1), which does not depend on the site, so that ln p(x) is known whatever its prior is."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("S", make())
            pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)

    return model


EXACT = -0.5 * math.log(2 * math.pi)


@pytest.mark.parametrize("name", TAKEN)
def test_a_support_that_is_taken_is_exact(name):
    """E_q p(z) / q(z) = 1, by the guide and along chains."""
    torch.manual_seed(0)
    model, x = program(TAKEN[name]), torch.zeros(4)
    found = evaluate(model, AmortizedGuide(model), x, num_samples=4_000, progress=False).log_evidence
    assert float(found) == pytest.approx(EXACT, abs=0.05)
    if TAKEN[name]().support.is_discrete:
        with pytest.raises(ValueError, match='"S".*discrete'):
            annealed(model, x, num_temperatures=3, progress=False)
    else:
        assert float(annealed(model, x, num_temperatures=3, leapfrog_steps=2, progress=False)) == pytest.approx(EXACT)


@pytest.mark.parametrize("name", REFUSED)
def test_a_support_that_is_not_is_refused_by_name(name):
    make, said = REFUSED[name]
    model, x = program(make), torch.zeros(4)
    with pytest.raises(ValueError, match=rf'expected .*"S".*{said}'):
        AmortizedGuide(model)(x)
    with pytest.raises(ValueError, match=r"expected .*(\"S\"|a site that has none)"):
        annealed(model, x, num_temperatures=3, progress=False)


@pytest.mark.parametrize("name", FALSE)
def test_a_support_that_is_narrower_than_said_is_refused_by_guides(name):
    model, x = program(FALSE[name]), torch.zeros(4)
    with pytest.raises(ValueError, match='expected latent site "S" with a density on all of its support'):
        AmortizedGuide(model)(x)
    assert float(annealed(model, x, num_temperatures=3, leapfrog_steps=2, progress=False)) == pytest.approx(EXACT)


@pytest.mark.parametrize("said", ["Sphere", "angles"])
def test_a_site_is_named_among_others(said):
    """The model is drawn from at construction already where it can be."""

    def model(x=None, num_data=None):
        with pyro.plate("data", num_data if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(ONE, 1.0))
            pyro.sample("where", dist.VonMises(z, ONE) if said == "angles" else dist.ProjectedNormal(ONE.new_ones(3)))
            return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=f'expected latent site "where".*{said}'):
        AmortizedGuide(model)


def test_a_simplex_of_one_is_a_constant():
    model, x = program(lambda: dist.Dirichlet(ONE.new_ones(1))), torch.zeros(4)
    with pytest.raises(ValueError, match='expected latent site "S" with something to infer, got Simplex'):
        AmortizedGuide(model)(x)
    assert float(annealed(model, x, num_temperatures=3, leapfrog_steps=2, progress=False)) == pytest.approx(EXACT)


@pytest.mark.parametrize(
    "p", [dist.LKJCholesky(130, 1.0), dist.Dirichlet(torch.full((20_000,), 0.1))], ids=["matrix", "simplex"]
)
def test_values_that_rounding_takes_off_a_large_support_are_no_fault_of_the_density(p):
    def model(x):
        pyro.sample("z", p)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x)

    AmortizedGuide(model, example=((torch.zeros(3),), {}))
