"""Families and flow transforms against what is known of every density: Jacobians, inverses, integrals, Bayes' rule."""

import subprocess
import sys

import pytest
import torch
from cases import FAMILIES, FLOWS
from torch.autograd.functional import jacobian

from pyro_vae.distributions import OnePass
from pyro_vae.guides import families

every_flow = pytest.mark.parametrize("name", FLOWS)
every_family = pytest.mark.parametrize("name", FAMILIES)


def bound(name, dim=4, features=5, spread=1.0):
    """The family with large random parameters, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        family = FAMILIES[name].bind(features, (dim,)).double()
        with torch.no_grad():
            for parameter in family.parameters():
                fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
                parameter.copy_(spread * torch.randn_like(parameter) / fan_in**0.5)
    return family


@every_flow
@pytest.mark.parametrize("features", [0, 5])
def test_log_determinant_is_that_of_the_jacobian(name, features):
    torch.manual_seed(0)
    family = bound(name, features=features)
    h = torch.randn(features, dtype=torch.float64)
    for f in family.chain(h):
        x = 2 * torch.randn(20, 4, dtype=torch.float64)
        y, ladj = f.call_and_ladj(x)
        sign, exact = torch.linalg.slogdet(torch.stack([jacobian(f, row) for row in x]))
        assert bool((sign == 1).all())
        torch.testing.assert_close(ladj, exact, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(f.log_abs_det_jacobian(x, y), exact, rtol=1e-9, atol=1e-9)


@every_flow
@pytest.mark.parametrize("dim", [1, 4])
def test_inverse_is_the_inverse(name, dim):
    torch.manual_seed(0)
    family = bound(name, dim)
    h = torch.randn(20, 5, dtype=torch.float64)
    for f in family.chain(h):
        x = 2 * torch.randn(7, 20, dim, dtype=torch.float64)
        torch.testing.assert_close(f.inv(f(x)), x, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(f(f.inv(x)), x, rtol=1e-8, atol=1e-8)


@every_family
def test_density_integrates_to_one(name):
    family = bound(name, dim=2, features=0, spread=0.7)
    q = family(torch.empty(0, dtype=torch.float64))
    with torch.no_grad():
        draws = q.sample((20_000,))
        low, high = draws.amin(0), draws.amax(0)
        low, high = low - 0.5 * (high - low), high + 0.5 * (high - low)
        axes = [torch.linspace(low[i], high[i], 701, dtype=torch.float64) for i in range(2)]
        grid = torch.cartesian_prod(*axes)
        cell = torch.stack([axis[1] - axis[0] for axis in axes]).prod()
        density = torch.cat([q.log_prob(part) for part in grid.split(200_000)]).exp()
    assert float(density.sum() * cell) == pytest.approx(1, abs=2e-3)


@every_family
def test_a_draw_and_its_value_have_the_same_density(name):
    """From the pass that made it, and by inversion."""
    torch.manual_seed(0)
    q = bound(name)(torch.randn(6, 5, dtype=torch.float64))
    for distribution in (q, q.expand((3, 6))):
        z = distribution.rsample()
        torch.testing.assert_close(distribution.log_prob(z.clone()), distribution.log_prob(z), rtol=1e-7, atol=1e-7)


@every_flow
def test_density_of_a_given_value_has_the_gradient_of_its_formula(name):
    """Through the inverse, found by bisection for some, against finite differences."""
    torch.manual_seed(0)
    family, h = bound(name, dim=3), torch.randn(2, 5, dtype=torch.float64)
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def log_prob(z, h):
        return family(h).log_prob(z)

    assert torch.autograd.gradcheck(log_prob, (z, h.requires_grad_()), eps=1e-6, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["IAF", "MAF", "RealNVP", "AutoregressiveSpline", "CouplingSpline"])
def test_each_network_is_called_once(name):
    """For a draw with its score, and for the score of a value under a flow prior."""
    family, calls = bound(name), []
    for network in family.networks:
        network.hyper.register_forward_hook(lambda *_: calls.append(1))
    q = family(torch.randn(6, 5, dtype=torch.float64))
    z = q.rsample()
    q.log_prob(z)
    assert len(calls) == family.transforms
    calls.clear()
    forward = torch.distributions.TransformedDistribution(
        torch.distributions.Independent(torch.distributions.Normal(torch.zeros(4).double(), 1.0), 1),
        [OnePass(f).inv for f in reversed(family.chain(torch.randn(6, 5, dtype=torch.float64)))],
    )
    forward.log_prob(z)
    assert len(calls) == family.transforms


@every_family
def test_the_density_depends_on_the_features(name):
    family, z = bound(name), torch.ones(4).double()
    a, b = (family(h).log_prob(z) for h in torch.randn(2, 5, dtype=torch.float64))
    assert abs((a - b).item()) > 1e-3


@every_family
def test_events_of_any_shape(name):
    family = FAMILIES[name].bind(5, (2, 3))
    q = family(torch.randn(7, 5))
    z = q.rsample()
    assert z.shape == (7, 2, 3) and q.log_prob(z).shape == (7,)


@every_family
def test_without_features_there_are_parameters(name):
    family = bound(name, features=0)
    q = family(torch.empty(0, dtype=torch.float64))
    assert q.batch_shape == () and q.log_prob(q.rsample((3,))).shape == (3,)


def test_zuko_leaves_torch_as_it_was():
    code = """
import torch
Distribution, Inverse = torch.distributions.Distribution, torch.distributions.transforms._InverseTransform
before = Distribution._validate_args, Distribution.arg_constraints, Inverse.__name__
from pyro_vae.guides import families
families.IAF().bind(2, (3,))
import sys
assert "zuko" in sys.modules
assert (Distribution._validate_args, Distribution.arg_constraints, Inverse.__name__) == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("make", [families.Planar, families.IAF, families.TriangularSylvester])
def test_sizes_are_checked(make):
    with pytest.raises(ValueError, match="expected transforms to be a positive whole number, got 0"):
        make(0)
