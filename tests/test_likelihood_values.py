"""Log-densities of every likelihood and prior, and their gradients, against mpmath over the dtypes' whole range."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath
import pyro.distributions as dist
import pytest
import torch
from mpmath import mp, mpf
from pyro import poutine
from torch import nn

from pyro_vae.guides import families
from pyro_vae.models import likelihoods, priors
from pyro_vae.nn import MLP

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
LARGEST_LOG = {torch.float32: 80.0, torch.float64: 700.0}
EACH_DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])


@dataclass(frozen=True)
class Row:
    """A component with one dimension, ``ln p(x)`` of it by mpmath, and where it is looked at.

    `log_density` gets x, what the decoder gives (for a prior nothing), and the component's own parameters in the order
    of `own`. `points` gives, for the largest logarithm of a dtype, tuples of x, the decoder's output and values of
    `own`.
    """

    make: Callable[[], Any]
    log_density: Callable[..., Any]
    points: Callable[[float], list[tuple[float, tuple[float, ...], tuple[float, ...]]]]
    own: tuple[str, ...] = ()


def softplus(x: Any) -> Any:
    return x + mp.log1p(mp.exp(-x)) if x > 0 else mp.log1p(mp.exp(x))


def log_binomial(x: Any, n: Any, logit: Any) -> Any:
    coefficient = mp.loggamma(n + 1) - mp.loggamma(x + 1) - mp.loggamma(n - x + 1)
    return coefficient - x * softplus(-logit) - (n - x) * softplus(logit)


def log_poisson(x: Any, log_rate: Any) -> Any:
    return x * log_rate - mp.exp(log_rate) - mp.loggamma(x + 1)


def log_negative_binomial(x: Any, log_mean: Any, log_n: Any) -> Any:
    n = mp.exp(log_n)
    rising = mp.loggamma(n + x) - mp.loggamma(n) if x > 0 else mpf(0)
    powers = -n * softplus(log_mean - log_n) - x * softplus(log_n - log_mean)
    return rising - mp.loggamma(x + 1) + powers


def log_normaliser(logit: Any) -> Any:
    return mp.log(mp.expm1(logit) / logit) if logit else mpf(0)


def log_categorical(x: Any, *logits: Any) -> Any:
    return logits[int(x)] - mp.log(sum(mp.exp(logit) for logit in logits))


def log_student(x: Any, mean: Any, log_excess: Any, log_scale: Any) -> Any:
    v = 1 + mp.exp(log_excess)
    z = (x - mean) * mp.exp(-log_scale)
    normaliser = mp.loggamma((v + 1) / 2) - mp.loggamma(v / 2) - mp.log(v * mp.pi) / 2 - log_scale
    return normaliser - (v + 1) / 2 * mp.log1p(z * z / v)


def log_normal(x: Any, mean: Any, log_scale: Any) -> Any:
    scale = mp.exp(log_scale) + mpf(MINIMUM_SCALE)
    return -(((x - mean) / scale) ** 2) / 2 - mp.log(scale) - mp.log(2 * mp.pi) / 2


def log_laplace(x: Any, mean: Any, log_scale: Any) -> Any:
    return -abs(x - mean) * mp.exp(-log_scale) - log_scale - mp.log(2)


def log_gamma(x: Any, log_a: Any, log_r: Any) -> Any:
    a = mp.exp(log_a)
    return a * log_r + (a - 1) * mp.log(x) - mp.exp(log_r) * x - mp.loggamma(a)


def over(xs: Any, outputs: Any, own: Any = ((),)) -> list[Any]:
    return [(x, output, each) for x, output, each in itertools.product(xs, outputs, own)]


def near_counts(top: float) -> list[Any]:
    """Counts up to 1e9 at rates near to and far from them."""
    found = over((0.0, 1.0, 7.0, 1e3, 1e6, 1e9), [(rate,) for rate in (-1e4, -100.0, -1.0, 0.0, 30.0, top)])
    for x in (1.0, 15.0, 16.0, 17.0, 1e3, 1e6, 123_456_789.0, 1e9):
        found += [(x, (float(mp.log(x)) + away,), ()) for away in (0.0, 1e-4, -0.01, 0.4, -0.7, 1.0)]
    return found


def dispersed(top: float) -> list[Any]:
    found = [(x, output, (0.5,)) for x, output, _ in near_counts(top)]
    for n in (-1e4, -100.0, -10.0, 0.0, 5.0, 20.0, 30.0, min(top, 650.0)):
        for x in (0.0, 1.0, 20.0, 1e6, 1e9):
            away = (float(mp.log(x)) if x else 0.0), -1e4, -30.0, top
            found += [(x, (log_mean,), (n,)) for log_mean in (*away, away[0] + 0.1)]
    return found


def of_a_large_total(top: float) -> list[Any]:
    found = []
    for x in (0.0, 1.0, 1e6, 5e8, 1e9 - 64, 1e9):
        typical = float(mp.log(x / (1e9 - x))) if 0 < x < 1e9 else 0.0
        found += [(x, (logit,), ()) for logit in (typical, typical + 1e-3, -20.0, 20.0, -1e4, 1e4)]
    return found


MINIMUM_SCALE = 1e-3
LOGITS = [
    (logit,) for logit in (-1e4, -700.0, -50.0, -16.5, -1.0, -0.51, -0.49, -1e-3, -1e-6, 0.0, 1e-4, 0.3, 2.0, 1e4)
]
REAL = (-1e4, -1.0, 0.0, 0.5, 1e4)
MEANS = [(-1e4,), (0.0,), (0.5,)]
LOG_SCALES = [(-1e4,), (-60.0,), (-3.0,), (0.0,), (20.0,), (1e4,)]

LIKELIHOODS: dict[str, Row] = {
    "Bernoulli": Row(
        likelihoods.Bernoulli, lambda x, logit: log_binomial(x, mpf(1), logit), lambda top: over((0.0, 1.0), LOGITS)
    ),
    "Binomial": Row(
        lambda: likelihoods.Binomial(255),
        lambda x, logit: log_binomial(x, mpf(255), logit),
        lambda top: over((0.0, 1.0, 100.0, 254.0, 255.0), LOGITS),
    ),
    "Binomial of a large total": Row(
        lambda: likelihoods.Binomial(10**9), lambda x, logit: log_binomial(x, mpf(10**9), logit), of_a_large_total
    ),
    "ContinuousBernoulli": Row(
        likelihoods.ContinuousBernoulli,
        lambda x, logit: x * logit - log_normaliser(logit),
        lambda top: over((0.0, 1e-5, 0.3, 0.5, 1.0), LOGITS),
    ),
    "Normal": Row(likelihoods.Normal, log_normal, lambda top: over(REAL, MEANS, LOG_SCALES), ("log_scale",)),
    "Normal of a predicted scale": Row(
        lambda: likelihoods.Normal("predicted"),
        lambda x, m, s: log_normal(x, m, s + mp.log(1 - mpf(MINIMUM_SCALE))),
        lambda top: over(REAL, [(*m, *s) for m in MEANS for s in LOG_SCALES]),
    ),
    "Normal of a mean in (0, 1)": Row(
        lambda: likelihoods.Normal(mean="sigmoid"),
        lambda x, logit, s: log_normal(x, 1 / (1 + mp.exp(-logit)), s),
        lambda top: over((0.0, 0.3, 1.0), LOGITS, ((-2.0,), (0.0,))),
        ("log_scale",),
    ),
    "Laplace": Row(likelihoods.Laplace, log_laplace, lambda top: over(REAL, MEANS, LOG_SCALES), ("log_scale",)),
    "StudentT": Row(
        likelihoods.StudentT,
        log_student,
        lambda top: over(REAL, MEANS, [(v, *s) for v in (-1e4, -20.0, 1.0, 10.0, 30.0, top) for s in LOG_SCALES]),
        ("log_df", "log_scale"),
    ),
    "Categorical": Row(
        lambda: likelihoods.Categorical(3),
        log_categorical,
        lambda top: over(
            (0.0, 1.0, 2.0), [(1e4, -1e4, 0.0), (1e4, 1e4 - 0.5, 1e4 - 1), (0.0, 0.1, 0.2), (-1e4, -1e4, -1e4 + 1)]
        ),
    ),
    "Poisson": Row(likelihoods.Poisson, log_poisson, near_counts),
    "NegativeBinomial": Row(likelihoods.NegativeBinomial, log_negative_binomial, dispersed, ("log_total_count",)),
    "Missing": Row(
        lambda: likelihoods.Missing(likelihoods.Poisson()),
        log_poisson,
        lambda top: near_counts(top)[:12],
    ),
}


@EACH_DTYPE
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihood_is_mpmaths(name, dtype):
    row = LIKELIHOODS[name]
    likelihood = row.make().bind((1,)).to(dtype)
    owner = getattr(likelihood, "likelihood", likelihood)
    for x, output, own in row.points(LARGEST_LOG[dtype]):
        x = torch.tensor(x, dtype=dtype)
        outputs = torch.tensor(output, dtype=dtype, requires_grad=True)
        parameters = [getattr(owner, parameter) for parameter in row.own]
        for parameter, value in zip(parameters, own, strict=True):
            nn.init.constant_(parameter, value)
        p = likelihood(outputs[:, None])
        log_p = p.log_prob(x[None])
        gradients = torch.autograd.grad(log_p, [outputs, *parameters])
        assert log_p.dtype == dtype
        found = [log_p.item(), *(each for gradient in gradients for each in gradient.flatten().tolist())]
        given = [*outputs.tolist(), *(parameter.item() for parameter in parameters)]
        compare(row.log_density, float(x), given, found, dtype, count=abs(float(x)))


def compare(
    log_density: Any, x: Any, given: list[float], found: list[float], dtype: torch.dtype, count: float = 0.0
) -> None:
    """The value and its derivatives in what is given; what is beyond the range of the dtype is infinite."""
    digits = 60 + int(max([0.0, *(each for each in given if each <= 700)]) / 2)  # the terms of exp(700) cancel
    with mpmath.workdps(digits):
        value, *derivatives = expected(log_density, x, given)
        if abs(value) > torch.finfo(dtype).max:
            assert found[0] == -torch.inf and not any(map(mp.isnan, found)), (x, given, found)
            return
        for place, (exact, came) in enumerate(zip((value, *derivatives), found, strict=True)):
            if abs(exact) > torch.finfo(dtype).max:
                assert abs(came) == float("inf"), (x, given, place, exact, came)
                continue
            # a derivative in the logarithm of a rate is a difference of counts, each of which is rounded
            rounding = 4 * 2.0**-53 * count if place else 0.0
            size = max(abs(exact), abs(value))
            error = abs(mpf(came) - exact)
            assert error <= TOLERANCE[dtype] * (1 + size) + rounding, (x, given, place, exact, came)


def expected(log_density: Any, x: float, given: list[float]) -> list[Any]:
    points = [mpf(each) for each in given]
    x = [mpf(each) for each in x] if isinstance(x, list) else mpf(x)
    found = [log_density(x, *points)]
    step = mpf(10) ** -18
    for i, point in enumerate(points):
        around = [log_density(x, *points[:i], point + sign * step, *points[i + 1 :]) for sign in (1, -1)]
        found.append((around[0] - around[1]) / (2 * step))
    return found


@dataclass(frozen=True)
class PriorRow:
    """A prior, ``ln p(z)`` by mpmath of z and the prior's own parameters, and where it is looked at."""

    make: Callable[..., Any]
    log_density: Callable[..., Any]
    points: list[tuple[tuple[float, ...], tuple[float, ...]]]  # z, and the parameters in the order of `own`
    own: tuple[str, ...] = ()


def log_dirichlet(z: Any, *log_a: Any) -> Any:
    a = [mp.exp(each) for each in log_a]
    powers = sum((each - 1) * mp.log(at) for each, at in zip(a, z, strict=True))
    return powers + mp.loggamma(sum(a)) - sum(mp.loggamma(each) for each in a)


def log_mixture(z: Any, *parameters: Any) -> Any:
    """Of two normal distributions, by two logits, two locations and two logarithms of scales."""
    total = [
        mp.exp(w) * mp.exp(-(((z[0] - m) * mp.exp(-s)) ** 2) / 2 - s)
        for w, m, s in zip(*(parameters[i : i + 2] for i in (0, 2, 4)), strict=True)
    ]
    weights = mp.exp(parameters[0]) + mp.exp(parameters[1])
    return mp.log(sum(total) / weights) - mp.log(2 * mp.pi) / 2


CONCENTRATIONS = [float(mp.log(a)) for a in (1e-2, 0.3, 1.0, 7.0, 1e3, 1e6)]
MIXTURES = [
    (0.0, 0.0, 0.0, 1.0, 0.0, 0.0),
    (1e4, -1e4, 0.0, 1.0, 0.0, 0.0),
    (1e4, 1e4 - 1, -3.0, 3.0, -20.0, 60.0),
    (0.0, 0.0, 1.0, 2.0, -200.0, 0.0),
    (0.0, 1.0, 0.5, 0.5, -80.0, 80.0),
    (0.0, 1.0, 0.5, 0.5, 1e4, 1e4),
]
PRIORS = {
    "StandardNormal": PriorRow(
        lambda: priors.StandardNormal(1),
        lambda z: -(z[0] ** 2) / 2 - mp.log(2 * mp.pi) / 2,
        [((z,), ()) for z in (-1e10, 0.0, 0.5, 1e10)],
    ),
    "Laplace": PriorRow(
        lambda: priors.Laplace(1, learned=True),
        lambda z, s: log_laplace(z[0], mpf(0), s),
        [((z,), s) for z in (-1e4, 0.0, 0.5) for s in LOG_SCALES],
        ("log_scale",),
    ),
    "Gamma": PriorRow(
        lambda: priors.Gamma(1, learned=True),
        lambda z, a, r: log_gamma(z[0], a, r),
        [
            ((float(mp.exp(a - r + away)),), (a, r))
            for a in CONCENTRATIONS
            for r in (-20.0, 0.0, 20.0)
            for away in (-30.0, -1.0, -1e-3, 0.0, 0.2, 3.0)
        ],
        ("log_concentration", "log_rate"),
    ),
    "Dirichlet": PriorRow(
        lambda: priors.Dirichlet(2, learned=True),
        log_dirichlet,
        [((z, 1 - z), (a, b)) for a in CONCENTRATIONS for b in CONCENTRATIONS for z in (1e-6, 0.3, 0.5, 0.5005)],
        ("log_concentration",),
    ),
    "Categorical": PriorRow(
        lambda: priors.Categorical(3, learned=True),
        lambda z, *logits: log_categorical(z.index(1), *logits),
        [
            (z, logits)
            for z in ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0))
            for logits in ((1e4, -1e4, 0.0), (1e4, 1e4 - 0.5, 1e4 - 1))
        ],
        ("logits",),
    ),
    "GaussianMixture": PriorRow(
        lambda: priors.GaussianMixture(1, 2),
        log_mixture,
        [((z,), each) for z in (-2.0, 0.5, 1e4) for each in MIXTURES],
        ("logits", "locations", "log_scales"),
    ),
    "full GaussianMixture": PriorRow(
        lambda: priors.GaussianMixture(1, 2, "full"),
        log_mixture,
        [((z,), each) for z in (-2.0, 0.5) for each in MIXTURES[:2]],
        ("logits", "locations", "log_scales"),
    ),
}


@EACH_DTYPE
@pytest.mark.parametrize("name", PRIORS)
def test_prior_is_mpmaths(name, dtype):
    row = PRIORS[name]
    prior = row.make().to(dtype)
    own = [getattr(prior, parameter) for parameter in row.own]
    for z, values in row.points:
        z = torch.tensor(z, dtype=dtype)
        given = torch.tensor(values, dtype=dtype).split([parameter.numel() for parameter in own])
        with torch.no_grad():
            for parameter, value in zip(own, given, strict=True):
                parameter.copy_(value.view_as(parameter))
        log_p = prior().log_prob(z)
        found = [log_p.item()]
        if own:
            found += [each for gradient in torch.autograd.grad(log_p, own) for each in gradient.flatten().tolist()]
        compare(row.log_density, z.tolist(), [each for value in given for each in value.tolist()], found, dtype)


@EACH_DTYPE
@mpmath.workdps(50)
def test_fixed_numbers_are_those_given(dtype):
    """A million has no logarithm in float32 that leads back to it."""
    gamma = priors.Gamma(1, concentration=1e6, rate=1e3).to(dtype)()
    dirichlet = priors.Dirichlet(2, concentration=1e6).to(dtype)()
    a, r = mp.log(mpf(10**6)), mp.log(mpf(1000))
    for z in (1003.0, 996.0):
        exact = log_gamma(mpf(z), a, r)
        assert abs(gamma.log_prob(torch.tensor([z], dtype=dtype)).item() - exact) < TOLERANCE[dtype] * (1 + abs(exact))
    z = [0.501953125, 0.498046875]  # in float32 too
    exact = log_dirichlet([mpf(each) for each in z], a, a)
    assert abs(dirichlet.log_prob(torch.tensor(z, dtype=dtype)).item() - exact) < TOLERANCE[dtype] * (1 + abs(exact))


@EACH_DTYPE
@mpmath.workdps(50)
def test_priors_made_of_others_are_mpmaths(dtype):
    torch.manual_seed(0)
    z = torch.tensor([0.4], dtype=dtype)
    vamp = priors.VampPrior((4,), 1, MLP((8,)), families.DiagonalNormal(), components=2).to(dtype)
    q = vamp.family(vamp.encoder(vamp.inputs)).base_dist
    parameters = [0.0, 0.0, *q.loc.flatten().tolist(), *q.scale.log().flatten().tolist()]
    exact = log_mixture([mpf(z.item())], *map(mpf, parameters))
    assert abs(vamp().log_prob(z).item() - exact) < TOLERANCE[dtype]

    flow = priors.Flow(1, families.MAF(1, hidden=(8,))).to(dtype)  # of one dimension: affine
    p = flow()
    base, (transform,) = p.base_dist.base_dist, p.transforms
    ends = [transform(base.mean + sign * base.stddev).item() for sign in (-1, 1)]
    exact = log_normal_of(mpf(z.item()), (mpf(ends[0]) + ends[1]) / 2, mp.log((mpf(ends[1]) - ends[0]) / 2))
    assert abs(p.log_prob(z).item() - exact) < 10 * TOLERANCE[dtype]

    fixed = priors.Fixed(dist.StudentT(torch.tensor(3.0), torch.zeros(1), 1.0).to_event(1)).to(dtype)
    exact = log_student(mpf(z.item()), mpf(0), mp.log(2), mpf(0))
    assert abs(fixed().log_prob(z).item() - exact) < TOLERANCE[dtype]

    layers = priors.Hierarchical((1, 1), MLP((4,))).to(dtype)
    trace = poutine.trace(layers).get_trace()
    trace.compute_log_prob()
    top, below = (trace.nodes[name]["value"] for name in ("z_2", "z_1"))
    location, log_scale = layers.networks[0](top).flatten().tolist()
    exact = log_normal_of(mpf(below.item()), mpf(location), mpf(log_scale))
    assert abs(trace.nodes["z_1"]["log_prob"].item() - exact) < TOLERANCE[dtype]


def log_normal_of(x: Any, mean: Any, log_scale: Any) -> Any:
    return -(((x - mean) * mp.exp(-log_scale)) ** 2) / 2 - log_scale - mp.log(2 * mp.pi) / 2


def test_every_likelihood_and_prior_has_a_row():
    composed = {"VampPrior", "Flow", "Fixed", "Hierarchical"}
    for module, base, rows in ((likelihoods, likelihoods.Likelihood, {}), (priors, priors.Prior, composed)):
        table = LIKELIHOODS if module is likelihoods else PRIORS
        covered = {type(row.make()).__name__ for row in table.values()} | set(rows)
        exported = {name for name in module.__all__ if isinstance(getattr(module, name), type)}
        assert covered == exported - {base.__name__}
