"""Masks, scales and plates within a datum: what `evaluate` and its kin tell of them, against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO

from pyro_vae import compare_estimators, evaluate
from pyro_vae.annealing import annealed, sandwich
from pyro_vae.distributions import MarkovChain
from pyro_vae.estimators import ELBO, IWAE, FreeBits
from pyro_vae.log_weights import log_weights
from pyro_vae.prediction import scores, to_arviz
from pyro_vae.svi import latent_scale

pytestmark = pytest.mark.usefixtures("float64")

B = 4
SHIFT = torch.tensor([[0.5, -1.0], [0.2, 1.5], [0.0, 0.3], [2.0, 1.0]], dtype=torch.float64)  # of q's mean, (B, 2)
KEEP = torch.tensor([[True, False], [False, False], [True, True], [True, False]])  # (B, 2)
KEEP3 = torch.tensor([[True, True, True], [True, True, False]])


def normal(location, scale=1.0):
    return dist.Normal(location, torch.full_like(location, scale))


def ln_q(scale=1.0):
    """E ln q of a dimension."""
    return -0.5 * math.log(2 * math.pi) - math.log(scale) - 0.5


def ln_p(shift, scale=1.0):
    """E ln N(z; 0, 1) of a dimension, z ~ N(shift, scale^2)."""
    return -0.5 * math.log(2 * math.pi) - 0.5 * (shift**2 + scale**2)


def dimensions(mask_q, mask_p):
    """A vector z of two independent dimensions. What the programs of this table get is the numbers of the data."""

    def model(i):
        with pyro.plate("data", len(i)), poutine.mask(mask=mask_p[i, 0]):
            pyro.sample("z", normal(torch.zeros(len(i), 2)).to_event(1))

    def guide(i):
        with pyro.plate("data", len(i)), poutine.mask(mask=mask_q[i, 0]):
            pyro.sample("z", normal(SHIFT[i], 0.8).to_event(1))

    each = mask_q[:, :1] * ln_q(0.8) - mask_p[:, :1] * ln_p(SHIFT, 0.8)
    return model, guide, each


def words(mask_q, mask_p):
    """A number in each of two words of a datum."""

    def model(i):
        with pyro.plate("data", len(i), dim=-2), pyro.plate("words", 2, dim=-1), poutine.mask(mask=mask_p[i]):
            pyro.sample("z", normal(torch.zeros(len(i), 2)))

    def guide(i):
        with pyro.plate("data", len(i), dim=-2), pyro.plate("words", 2, dim=-1), poutine.mask(mask=mask_q[i]):
            pyro.sample("z", normal(SHIFT[i], 0.8))

    return model, guide, mask_q * ln_q(0.8) - mask_p * ln_p(SHIFT, 0.8)


def entries(mask_q, mask_p):
    """A vector z whose distributions mask their dimensions."""

    def model(i):
        with pyro.plate("data", len(i)):
            pyro.sample("z", normal(torch.zeros(len(i), 2)).mask(mask_p[i]).to_event(1))

    def guide(i):
        with pyro.plate("data", len(i)):
            pyro.sample("z", normal(SHIFT[i], 0.8).mask(mask_q[i]).to_event(1))

    return model, guide, mask_q * ln_q(0.8) - mask_p * ln_p(SHIFT, 0.8)


def words_of_vectors(mask_q, mask_p):
    """A vector of two in each of two words: word by word, its second dimension has twice the shift."""

    def model(i):
        with pyro.plate("data", len(i), dim=-2), pyro.plate("words", 2, dim=-1), poutine.mask(mask=mask_p[i]):
            pyro.sample("z", normal(torch.zeros(len(i), 2, 2)).to_event(1))

    def guide(i):
        with pyro.plate("data", len(i), dim=-2), pyro.plate("words", 2, dim=-1), poutine.mask(mask=mask_q[i]):
            pyro.sample("z", normal(torch.stack([SHIFT[i], 2 * SHIFT[i]], -1), 0.8).to_event(1))

    shift = torch.stack([SHIFT, 2 * SHIFT], -1)
    return model, guide, (mask_q[..., None] * ln_q(0.8) - mask_p[..., None] * ln_p(shift, 0.8)).flatten(1)


def two_sites(mask_q, mask_p):
    """z1 and z2 | z1, whose divergence is known given z1 alone."""

    def model(i):
        with pyro.plate("data", len(i)):
            with poutine.mask(mask=mask_p[i, 0]):
                z = pyro.sample("z1", normal(torch.zeros(len(i))))
            with poutine.mask(mask=mask_p[i, 1]):
                pyro.sample("z2", normal(z))

    def guide(i):
        with pyro.plate("data", len(i)):
            with poutine.mask(mask=mask_q[i, 0]):
                z = pyro.sample("z1", normal(SHIFT[i, 0], 0.8))
            with poutine.mask(mask=mask_q[i, 1]):
                pyro.sample("z2", normal(z + SHIFT[i, 1], 0.8))

    return model, guide, mask_q * ln_q(0.8) - mask_p * ln_p(SHIFT, 0.8)


ALL = torch.ones(B, 2, dtype=torch.bool)
PROGRAMS = {f.__name__: f for f in (dimensions, words, entries, words_of_vectors, two_sites)}
MASKS = {"alike": (KEEP, KEEP), "guide": (KEEP, ALL), "model": (ALL, KEEP), "apart": (KEEP, ~KEEP), "none": (ALL, ALL)}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_parts_of_the_divergence_add_up_to_it(name, masks):
    """Per dimension, per datum, and as a whole; in `evaluate`, in log-weights and for `FreeBits`."""
    model, guide, exact = PROGRAMS[name](*MASKS[masks])
    found = evaluate(model, guide, torch.arange(B), num_samples=4_000, progress=False)
    assert found.kl_per_dim is not None
    assert found.kl_per_dim.shape == exact.shape[1:]
    error = 5 * found.kl.standard_error_draws + 1e-9
    torch.testing.assert_close(found.kl_per_dim, exact.mean(0), atol=max(error, 0.05), rtol=0.0)
    assert float(found.kl) == pytest.approx(float(exact.sum(1).mean()), abs=max(error, 1e-9))
    assert float(found.kl_per_dim.sum()) == pytest.approx(float(exact.sum(1).mean()), abs=2 * error)
    weights = log_weights(model, guide, (torch.arange(B),), {}, 5, analytic_kl=True)
    parts = sum(weights.kl_per_dim(site).sum(-1) for site in weights.sites)
    torch.testing.assert_close(parts.expand(5, B), weights.kl)  # with any weights, draw by draw
    with latent_scale(0.25):
        weights = log_weights(model, guide, (torch.arange(B),), {}, 5, analytic_kl=True)
        parts = sum(weights.kl_per_dim(site).sum(-1) for site in weights.sites)
        torch.testing.assert_close(parts.expand(5, B), weights.kl)
    weights = log_weights(model, guide, (torch.arange(B),), {}, 5)
    assert float(FreeBits(1e9).objective(weights).abs().max()) < 1e-12  # all of the divergence is free


def test_analytic_parts_are_exact():
    """One of two words counts in a third of the data; each has 0.25 nats, and no draw makes a difference."""
    mask = torch.tensor([[True, False], [True, True], [False, False]])

    def model(x, mask):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("words", 2, dim=-1), poutine.mask(mask=mask):
            z = pyro.sample("z", normal(torch.zeros(2)).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x, mask):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("words", 2, dim=-1), poutine.mask(mask=mask):
            pyro.sample("z", normal(0.5 * torch.ones(2)).to_event(1))

    found = evaluate(model, guide, (torch.zeros(3, 2), mask), num_samples=3, progress=False)
    expected = 0.125 * torch.tensor([2 / 3, 2 / 3, 1 / 3, 1 / 3])
    torch.testing.assert_close(found.kl_per_dim, expected, atol=1e-12, rtol=0.0)


def test_draws_in_another_order_have_no_analytic_parts():
    """q draws z2 first: KL(q(z1 | z2) || p(z1)) + KL(q(z2) || p(z2 | z1)) is no divergence of anything."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z1", normal(torch.zeros(len(x))))
            pyro.sample("z2", normal(z))

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z2", normal(torch.zeros(len(x)), 2**0.5))
            pyro.sample("z1", normal(z / 2, 0.5**0.5))

    found = evaluate(model, guide, torch.zeros(50), num_samples=2_000, progress=False)
    assert float(found.kl) == pytest.approx(0.0, abs=1e-12)
    assert float(found.kl_per_dim.sum()) == pytest.approx(0.0, abs=1e-12)


def test_masked_dimensions_are_not_active():
    """The mean of a word moves with the data where the word counts, and in the other word where nothing does."""
    x = torch.randn(30, 2)
    mask = torch.stack([torch.ones(30, dtype=torch.bool), torch.zeros(30, dtype=torch.bool)], -1)

    def pair(mask):
        def model(x):
            with pyro.plate("data", len(x), dim=-2), pyro.plate("words", 2, dim=-1), poutine.mask(mask=mask):
                z = pyro.sample("z", normal(torch.zeros(2)))
                pyro.sample("x", normal(z), obs=x)

        def guide(x):
            with pyro.plate("data", len(x), dim=-2), pyro.plate("words", 2, dim=-1), poutine.mask(mask=mask):
                pyro.sample("z", normal(x / 2, 0.5**0.5))

        return model, guide

    active = [evaluate(*pair(each), x, num_samples=10, progress=False).active_units for each in (True, mask)]
    assert active == [2, 1]


def test_chains_whose_masks_differ_are_refused():
    """The divergence of two chains counts the steps that both have, the log-weights those that each has."""

    def program(lengths):
        there = torch.arange(3) < lengths[:, None]

        def run(x):
            with pyro.plate("data", len(x)):
                first = normal(torch.zeros(len(x), 1)).to_event(1)
                pyro.sample("z", MarkovChain(first, lambda z: normal(z).to_event(1), 3, mask=there))

        return run

    model, guide = program(torch.tensor([3, 2])), program(torch.tensor([3, 1]))
    for score in (ELBO(), IWAE(3)):
        with pytest.raises(ValueError, match='expected latent site "z" masked in model and guide alike'):
            score.loss(model, guide, torch.zeros(2))
        assert score.loss(model, program(torch.tensor([3, 2])), torch.zeros(2)) == pytest.approx(0.0, abs=1e-12)


def test_masks_that_come_to_differ_are_no_number():
    """Masks are read at the first of like calls; later ones that differ give NaN, at which a training stops."""

    def program(steps):
        def run(x, of_model, of_guide):
            lengths = of_model if steps == "model" else of_guide
            there = torch.arange(3) < lengths[:, None]
            with pyro.plate("data", len(x)):
                first = normal(torch.zeros(len(x), 1)).to_event(1)
                pyro.sample("z", MarkovChain(first, lambda z: normal(z).to_event(1), 3, mask=there))

        return run

    pair, x = (program("model"), program("guide")), torch.zeros(2)
    alike, other = torch.tensor([3, 2]), torch.tensor([3, 1])
    for score in (ELBO(), IWAE(3), FreeBits(0.0)):
        for _ in range(2):  # joint draws are looked at in calls 1, 2, 4, 8 ...
            assert score.loss(*pair, x, alike, alike) == pytest.approx(0.0, abs=1e-12)
        assert math.isnan(score.loss(*pair, x, alike, other))
        assert score.loss(*pair, x, other, other) == pytest.approx(0.0, abs=1e-12)
    first = normal(torch.zeros(2, 1)).to_event(1)
    whole, cut = (MarkovChain(first, lambda z: normal(z).to_event(1), 3, mask=mask) for mask in (None, KEEP3))
    kl = torch.distributions.kl_divergence
    whole.rsample(), cut.rsample()
    assert kl(whole, cut).isnan().tolist() == kl(cut, whole).isnan().tolist() == [False, True]
    assert TraceMeanField_ELBO().loss(*pair, x, alike, alike) == pytest.approx(0.0, abs=1e-12)
    with pytest.warns(UserWarning, match="Encountered NaN: loss"):
        TraceMeanField_ELBO().loss(*pair, x, alike, other)


# ------------------------------------------------------------ plates that are not whole


MEAN = torch.zeros((), requires_grad=True)


def subsampled(x, vectorized=True):
    """x of 8 words, of which a call draws 4."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(MEAN, 1.0))
        if vectorized:
            with pyro.plate("words", 8, subsample_size=4, dim=-1) as i:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, i])
        else:
            for i in pyro.plate("words", 8, subsample_size=4):
                pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[:, i : i + 1])


def posterior(x, vectorized=True):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Normal(x.sum(1, keepdim=True) / 9, 1 / 3))


def in_turn(x):
    subsampled(x, vectorized=False)


def latent_words(x):
    """The words' latent numbers are drawn in a part of the plate."""
    with pyro.plate("data", len(x), dim=-2), pyro.plate("words", 8, subsample_size=4, dim=-1) as i:
        z = pyro.sample("z", dist.Normal(MEAN, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, i])


def of_latent_words(x):
    with pyro.plate("data", len(x), dim=-2), pyro.plate("words", 8, subsample_size=4, dim=-1) as i:
        pyro.sample("z", dist.Normal(x[:, i] / 2, 0.5**0.5))


QUERIES = {
    "evaluate": lambda model, guide, x: evaluate(model, guide, x, num_samples=5, progress=False),
    "scores": lambda model, guide, x: scores(model, guide, x, num_samples=5).log_prob,
    "annealed": lambda model, guide, x: annealed(model, x, num_temperatures=3, progress=False),
    "annealed from the guide": lambda model, guide, x: annealed(
        model, x, guide=guide, num_temperatures=3, progress=False
    ),
    "compare_estimators": lambda model, guide, x: compare_estimators(model, guide, x, [ELBO], progress=False),
    "IWAE": lambda model, guide, x: IWAE(3).loss(model, guide, x),
}


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("pair", [(subsampled, posterior), (in_turn, posterior), (latent_words, of_latent_words)])
def test_a_part_of_a_plate_within_a_datum_is_refused_by_name(pair, query):
    with pytest.raises(ValueError, match='expected .*"words"'):
        QUERIES[query](*pair, torch.randn(5, 8))


def test_linear_bounds_scale_a_part_of_a_plate():
    """The ELBO of all words, in expectation."""
    x = torch.randn(5, 8)
    exact = float(dist.MultivariateNormal(torch.zeros(8), torch.eye(8) + 1).log_prob(x).sum())
    found = torch.tensor([-ELBO(20).loss(subsampled, posterior, x) for _ in range(400)])
    assert abs(float(found.mean()) - exact) < 4.5 * float(found.std()) / 20


def test_whole_sequential_plates_are_scored():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            for i in pyro.plate("words", 8):
                pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[:, i])

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.sum(1) / 9, 1 / 3))

    x = torch.randn(5, 8)
    exact = dist.MultivariateNormal(torch.zeros(8), torch.eye(8) + 1).log_prob(x)
    found = evaluate(model, guide, x, num_samples=3, progress=False)
    torch.testing.assert_close(found.per_datum["log_evidence"], exact, rtol=1e-10, atol=0.0)
    path = annealed(model, x, guide=guide, num_temperatures=2, progress=False)
    torch.testing.assert_close(path.per_datum, exact, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_plate_of_data_of_other_rows_is_refused(sequential):
    def model(x):
        with pyro.plate("data", len(x), subsample_size=3) as i:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=3) as i:
            pyro.sample("z", dist.Normal(x[i] / 2, 1.0))

    def in_turn(x, observed=True):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            if observed:
                pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    pair = (in_turn, lambda x: in_turn(x, observed=False)) if sequential else (model, guide)
    for query in ("evaluate", "scores", "annealed"):
        with pytest.raises(ValueError, match="expected .*plate"):
            QUERIES[query](*pair, torch.randn(7))


# ------------------------------------------------------------ scales


def tempered(scale, where):
    """z ~ N(0, 1), x | z ~ N(z, 1) with a scale on one of the sites in model, guide or both."""

    def scaled(wanted):
        return poutine.scale(scale=scale if wanted else 1.0)

    def model(x):
        with pyro.plate("data", len(x)):
            with scaled(where in ("latent", "prior")):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with scaled(where == "observed"):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), scaled(where == "latent"):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    return model, guide


@pytest.mark.parametrize("where", ["observed", "latent", "prior"])
def test_scores_are_those_of_the_untempered_model(where):
    """A scale that is no plate's is a tempering of the training: ln p(x) is the model's own, for each way to it."""
    x = torch.randn(20)
    exact = dist.Normal(torch.zeros(()), 2**0.5).log_prob(x)
    model, guide = tempered(torch.tensor(0.3), where)
    found = evaluate(model, guide, x, num_samples=3, progress=False)
    torch.testing.assert_close(found.per_datum["log_evidence"], exact)
    assert float(found.elbo) == pytest.approx(float(exact.mean()))
    torch.testing.assert_close(scores(model, guide, x, num_samples=3).log_prob, exact)
    assert float(annealed(model, x, guide=guide, num_temperatures=2, progress=False)) == pytest.approx(
        float(exact.mean())
    )
    assert float(annealed(model, x, num_temperatures=60, leapfrog_steps=3, progress=False)) == pytest.approx(
        float(exact.mean()), abs=0.05
    )


def test_log_likelihoods_for_arviz_are_of_whole_data():
    def model(x=None, num_data=None):
        with pyro.plate("data", num_data if x is None else len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("words", 8, subsample_size=4, dim=-1) as i:
                pyro.sample("x", dist.Normal(z, 1.0), obs=None if x is None else x[:, i])

    with pytest.raises(ValueError, match='expected .*"words"'):
        to_arviz(model, posterior, torch.randn(5, 8), num_samples=2)


def test_a_sandwich_refuses_a_part_of_a_plate():
    def model(x=None, num_data=None):
        with pyro.plate("data", num_data if x is None else len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("words", 8, subsample_size=4, dim=-1) as i:
                return pyro.sample("x", dist.Normal(z, 1.0), obs=None if x is None else x[:, i])

    with pytest.raises(ValueError, match='expected .*"words"'):
        sandwich(model, 3, num_temperatures=3, progress=False)
