"""Data of every dtype under every likelihood, model and default dtype: the same numbers give the same scores."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import LIKELIHOODS
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_vae import evaluate, fit, load_dataset
from pyro_vae.annealing import annealed
from pyro_vae.data import as_data
from pyro_vae.estimators import ELBO, IWAE, SemiSupervisedELBO
from pyro_vae.guides import AmortizedGuide, StateSpaceGuide
from pyro_vae.models import (
    VAE,
    BayesianVAE,
    ConditionalVAE,
    DeepMarkovModel,
    SemiSupervisedVAE,
    StateSpaceModel,
    likelihoods,
)
from pyro_vae.models.transitions import Emission, Initial, LinearTransition
from pyro_vae.nn import MLP
from pyro_vae.prediction import decode, encode, reconstruct, scores
from pyro_vae.svi import NonFiniteLossError

small = MLP((8,), activation="tanh")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float64, torch.bfloat16, torch.float16)
quiet = {"progress": False}


def pair(likelihood, dtype=torch.float32):
    torch.manual_seed(0)
    model = VAE((4,), latent_dim=2, likelihood=likelihood, decoder=small).to(dtype)
    return model, AmortizedGuide(model, small)


def values(name, rows=8):
    """Data of a row of the table, as floats that every dtype holds."""
    torch.manual_seed(1)
    x = LIKELIHOODS[name][1]()[:rows]
    return (x * 8).round() / 8 if x.isnan().any() or bool((x != x.round()).any()) else x


def losses(model, guide, x):
    """By Pyro's estimators and this library's, from the same draws."""
    found = []
    for loss in (Trace_ELBO(), IWAE(num_particles=3)):
        torch.manual_seed(2)
        found.append(loss.loss(model, guide, x))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("own", [torch.float32, torch.float64], ids=str)
def test_the_same_numbers_have_the_same_scores(name, own):
    model, guide = pair(LIKELIHOODS[name][0], own)
    x = values(name)
    wanted = losses(model, guide, x.to(own))
    dtypes = [torch.float32, *FLOATS]
    if bool((x == x.round()).all()):
        dtypes += [*INTEGERS, *([torch.bool] if bool(((x == 0) | (x == 1)).all()) else [])]
    for dtype in dtypes:
        torch.testing.assert_close(losses(model, guide, x.to(dtype)), wanted, rtol=1e-6, atol=1e-5, msg=f"{dtype}")
    elbos = [float(evaluate(model, guide, x.to(d), num_samples=1, **quiet).elbo) for d in (own, dtypes[1], dtypes[-1])]
    assert elbos == pytest.approx(elbos[:1] * 3, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(
    "likelihood", [likelihoods.Binomial(255), likelihoods.Poisson(), likelihoods.NegativeBinomial()]
)
def test_no_integer_overflows(likelihood, validate):
    """255 + 1 is 0 in uint8, 127 + 1 is -128 in int8."""
    p = likelihood.bind((2,))(torch.tensor([[[0.3, 5.0]]]))
    with pyro.validation_enabled(validate):
        for dtype, x in ((torch.uint8, 255), (torch.int8, 127), (torch.int16, 255), (torch.int64, 255)):
            found = p.log_prob(torch.full((1, 2), x, dtype=dtype))
            assert torch.equal(found, p.log_prob(torch.full((1, 2), float(x))))


def test_large_counts_are_not_rounded_to_the_models_dtype():
    """float32 has no 123,456,789."""
    x = torch.tensor([[123_456_789]])
    p = likelihoods.Poisson().bind((1,))(torch.full((1, 1, 1), 18.63, dtype=torch.float32))
    exact = dist.Poisson(torch.tensor(18.63, dtype=torch.float32).double().exp()).log_prob(x.double())
    assert p.log_prob(x).item() == pytest.approx(exact.item(), rel=1e-5)
    assert p.log_prob(x.double()).item() == pytest.approx(exact.item(), rel=1e-5)
    linear = nn.Linear(1, 1)
    assert as_data(x.double(), linear).args[0].dtype is torch.float64
    assert as_data(torch.tensor([[0.1, 2.0]]).double(), linear).args[0].dtype is torch.float32
    assert as_data(x, linear).args[0] is x


def fitted(model, guide, data, tmp_path, **options):
    return fit(model, guide, data, epochs=1, batch_size=4, out=tmp_path / "run", overwrite=True, **quiet, **options)


MODELS = {
    "ConditionalVAE": (
        lambda: ConditionalVAE((4,), covariates=3, latent_dim=2, decoder=small),
        lambda model: AmortizedGuide(model, small, encoder_inputs=model.beside),
        lambda x: (x, torch.eye(3)[[0, 1, 2, 0, 1, 2, 0, 1]]),
    ),
    "SemiSupervisedVAE": (
        lambda: SemiSupervisedVAE((4,), classes=3, latent_dim=2, decoder=small),
        lambda model: AmortizedGuide(model, small),
        lambda x: (x, torch.eye(3)[[0, 1, 2, 0, 1, 2, 0, 1]]),
    ),
    "BayesianVAE": (
        lambda: BayesianVAE((4,), size=8, latent_dim=2, decoder=small),
        lambda model: AmortizedGuide(model, small),
        lambda x: (x,),
    ),
}


@pytest.mark.parametrize("own", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_on_every_dtype(name, own, tmp_path):
    make, guided, given = MODELS[name]
    x = values("Bernoulli")
    loss = SemiSupervisedELBO(max_plate_nesting=1) if name == "SemiSupervisedVAE" else Trace_ELBO()
    bounds = []
    for dtype in (torch.float32, torch.float64, torch.uint8, torch.bool):
        torch.manual_seed(0)
        model = make().to(own)
        guide = guided(model)
        run = fitted(model, guide, tuple(part.to(dtype) for part in given(x)), tmp_path, loss=loss)
        bounds.append(run.history[-1]["bound"])
        torch.manual_seed(0)
        assert torch.isfinite(torch.tensor(loss.loss(model, guide, *(part.to(dtype) for part in given(x)))))
    assert bounds == pytest.approx(bounds[:1] * len(bounds), rel=1e-5)


def test_numbers_of_classes_are_no_one_hot_labels():
    torch.manual_seed(0)
    model = SemiSupervisedVAE((4,), classes=3, latent_dim=2, decoder=small)
    with pytest.raises(ValueError, match=r"expected one-hot labels of shape \(B, 3\), got torch.int64 of shape \(5,\)"):
        model(torch.ones(5, 4), torch.zeros(5, dtype=torch.long))


@pytest.mark.parametrize("own", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("feedback", [False, True])
def test_sequences_of_every_dtype(own, feedback, tmp_path):
    torch.manual_seed(0)
    options = {"latent_dim": 2, "transition_hidden": 4, "emission_hidden": (4,), "num_inputs": 1}
    model = DeepMarkovModel((3,), **options, likelihood=likelihoods.Poisson(), autoregressive=feedback).to(own)
    guide = StateSpaceGuide(model, hidden=4)
    assert {p.dtype for p in guide.parameters()} == {own}
    torch.manual_seed(1)
    x, u, mask = torch.randint(0, 5, (4, 5, 3)), torch.randint(0, 2, (4, 5, 1)), torch.rand(4, 5, 3) > 0.2
    lengths = torch.tensor([5, 3, 4, 1])
    found = []
    for dtype in (own, torch.float32, torch.float64, torch.int64, torch.uint8):
        for as_mask in (mask, mask.to(torch.uint8), mask.to(own)):
            torch.manual_seed(2)
            given = {"lengths": lengths.to(torch.int32), "mask": as_mask}
            found.append(Trace_ELBO().loss(model, guide, x.to(dtype), u.to(dtype), **given))
        drawn = model.forecast(guide, x.to(dtype), u.to(dtype), u[:, :2].to(dtype), num_samples=2)
        assert drawn.dtype is own and model.filter(x.to(dtype), u.to(dtype), num_particles=3).z.dtype is own
    assert found == pytest.approx(found[:1] * len(found), rel=1e-6)
    for dtype in (torch.float64, torch.uint8):
        run = fitted(model, guide, (x.to(dtype), u.to(dtype), {"lengths": lengths, "mask": mask}), tmp_path)
        assert run.history[-1]["bound"] < 0


def test_default_dtype_is_no_obstacle(float64, tmp_path):
    digits = load_dataset("digits")
    torch.manual_seed(0)
    model = VAE(digits.event_shape, latent_dim=2, likelihood=likelihoods.Binomial(16), decoder=small)
    guide = AmortizedGuide(model, small)
    run = fit(model, guide, digits.train, valid=digits.valid, epochs=1, out=tmp_path / "run", **quiet)
    assert run.history[0]["valid"] < 0 and digits.train.x.dtype is torch.float32
    x = digits.test.x[:5]
    for data in (x, x.double(), x.to(torch.uint8)):
        assert scores(model, guide, data, num_samples=2).log_prob.isfinite().all()
    single = VAE(digits.event_shape, latent_dim=2, likelihood=likelihoods.Binomial(16), decoder=small).float()
    fit(single, AmortizedGuide(single, small), digits.train, epochs=1, out=tmp_path / "single", **quiet)


def test_every_use_of_a_pair_takes_every_dtype():
    model, guide = pair(likelihoods.Binomial(3))
    x = torch.randint(0, 4, (6, 4))
    for dtype in (torch.float64, torch.uint8):
        assert encode(guide, x.to(dtype)).mean.dtype is torch.float32
        assert reconstruct(model, guide, x.to(dtype)).isfinite().all()
    x = x.to(torch.uint8)
    assert annealed(model, x, num_temperatures=2, num_chains=2, compile=False, **quiet).per_datum.isfinite().all()
    assert decode(model, torch.zeros(2, 2, dtype=torch.float64)).dtype is torch.float32


class OwnProgram(nn.Module):
    """A user's own: categories are looked up, counts observed."""

    def __init__(self, observe):
        super().__init__()
        self.of_category, self.observe = nn.Embedding(3, 1), observe

    def forward(self, x, category):
        rate = self.of_category(category)[:, 0].exp() + 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(rate), 1.0))
            pyro.sample("x", dist.Poisson(rate * z.exp()), obs=self.observe(x))


def own_guide(x, category):
    location = pyro.param("location", torch.zeros(()))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(location, 1.0))


def test_a_users_program_keeps_its_integers_and_loses_no_number(tmp_path):
    """Stock distributions compute with integers as they are: what overflows is refused by name, the rest is taken."""
    torch.manual_seed(0)
    category = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    bright, dark = torch.full((8,), 255, dtype=torch.uint8), torch.full((8,), 3, dtype=torch.uint8)
    kept, mended = OwnProgram(lambda x: x), OwnProgram(lambda x: x.float())
    for data in ((dark, category), (bright.long(), category), (bright.float(), category)):
        assert fitted(kept, own_guide, data, tmp_path).history[0]["bound"] < 0
    assert fitted(mended, own_guide, (bright, category), tmp_path).history[0]["bound"] < 0
    message = 'expected values of site "x" that Poisson scores as it does the same real numbers, got torch.uint8'
    with pytest.raises(ValueError, match=message):
        fitted(kept, own_guide, (bright, category), tmp_path)
    pyro.param("location", torch.zeros(()))
    for use in (lambda: evaluate(kept, own_guide, (bright, category), num_samples=2, **quiet),):
        with pytest.raises(ValueError, match=message):
            use()


def test_kernels_do_not_speak_for_themselves(tmp_path):
    """A user's own network that is fed integers, and scales that are infinite at the first call."""
    torch.manual_seed(0)
    model, _ = pair(likelihoods.Poisson())
    wide = nn.Linear(4, 4)
    x = torch.full((8, 4), 50_000)

    def guide(x):
        pyro.module("wide", wide)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(wide(x)[:, :2], wide(x)[:, 2:].exp()).to_event(1))

    with pytest.raises(ValueError, match=r"expected data of the dtype .*, got torch.int64 \(.*\): call x.float"):
        fitted(model, guide, x, tmp_path)
    with pytest.raises(NonFiniteLossError, match='step 1: .* first at site "z"') as raised:
        fitted(model, guide, x.float(), tmp_path)
    assert "\n" not in str(raised.value)
    fitted(*pair(likelihoods.Poisson()), x, tmp_path)  # the library's own are fed their logarithm


def test_what_is_no_data_is_refused():
    for data, message in (
        (torch.zeros(3, 2, dtype=torch.complex64), "expected real numbers as tensor 0, got torch.complex64"),
        (np.zeros((3, 2)) * 1j, "expected real numbers as tensor 0, got torch.complex128"),
        ([[1.0, 2.0]], "expected a tensor, .* got list: convert it"),
    ):
        with pytest.raises(ValueError, match=message):
            as_data(data)


def test_observed_values_stay_as_they_are():
    """What is scored as real numbers is no other tensor: the site's value is what was given."""
    model, guide = pair(likelihoods.Binomial(3))
    x = torch.randint(0, 4, (6, 4), dtype=torch.uint8)
    assert poutine.trace(model).get_trace(x).nodes["x"]["value"] is x


def test_linear_parts_of_state_space_models_in_double_precision():
    model = StateSpaceModel(Initial(2), LinearTransition(2), Emission(2, 3, likelihoods.Normal())).double()
    guide = StateSpaceGuide(model, hidden=4, reads_transition=True)
    assert guide.transition is model.transition
    assert guide(torch.zeros(2, 4, 3)).dtype is torch.float64


COUNTS = (
    likelihoods.Binomial(100_000),
    likelihoods.Categorical(10),
    likelihoods.Poisson(),
    likelihoods.NegativeBinomial(),
    likelihoods.Missing(likelihoods.Poisson()),
)


@pytest.mark.parametrize("likelihood", COUNTS, ids=lambda likelihood: type(likelihood).__name__)
def test_the_librarys_encoders_are_fed_counts_on_their_scale(likelihood):
    x = torch.tensor([[0, 1, 1_000, 99_999]])
    fed = x.float().log1p()
    if isinstance(likelihood, likelihoods.Binomial):
        fed = 4 * (x / 100_000).sqrt().asin()  # from 0 to 2 pi
    torch.manual_seed(0)
    model = VAE((4,), latent_dim=2, likelihood=likelihood, decoder=small)
    for guide in (AmortizedGuide(model), AmortizedGuide(model, small)):
        torch.testing.assert_close(guide.encoded(x), fed)
        torch.testing.assert_close(guide.encoded(torch.cat([x, 0 * x]))[:1], fed)  # whatever else is in the batch
    asked = AmortizedGuide(model, small, encoder_inputs=lambda x: x / 10)
    torch.testing.assert_close(asked.encoded(x), x / 10)
    own = AmortizedGuide(model, nn.Sequential(nn.Linear(4, 2)))
    torch.testing.assert_close(own.encoded(x), x.float())  # what a user's own network gets is for the user to say
    if isinstance(likelihood, likelihoods.Missing):
        assert guide.encoded(torch.full((1, 4), torch.nan)).tolist() == [[0.0] * 4]


def test_real_numbers_are_fed_as_they_are():
    x = torch.tensor([[-1e4, 0.0, 0.5, 1e4]])
    for likelihood in (likelihoods.Normal(), likelihoods.Laplace(), likelihoods.StudentT(), likelihoods.Bernoulli()):
        assert torch.equal(AmortizedGuide(VAE((4,), latent_dim=2, likelihood=likelihood), small).encoded(x), x)


@pytest.mark.parametrize("likelihood", [*COUNTS[:1], *COUNTS[2:]], ids=lambda likelihood: type(likelihood).__name__)
def test_counts_of_a_wide_range_train_by_default(likelihood, tmp_path):
    torch.manual_seed(0)
    x = torch.poisson(torch.exp(torch.randn(60, 8) * 2 + 3))
    model = VAE((8,), latent_dim=2, likelihood=likelihood)
    run = fit(model, AmortizedGuide(model), x, epochs=4, batch_size=20, out=tmp_path / "run", **quiet)
    assert run.history[-1]["bound"] > run.history[0]["bound"]
    for inference in ("MF-L", "ST-LR"):
        chain = DeepMarkovModel((2,), latent_dim=2, transition_hidden=4, likelihood=likelihood)
        guide = StateSpaceGuide(chain, inference, hidden=4)
        run = fit(chain, guide, x.reshape(60, 4, 2), epochs=1, batch_size=20, out=tmp_path / inference, **quiet)
        assert run.history[-1]["bound"] < 0


STOCK = {
    "Poisson": (lambda: dist.Poisson(torch.tensor(200.0)), 255),
    "Binomial": (lambda: dist.Binomial(255, logits=torch.tensor(0.3)), 255),
    "Bernoulli": (lambda: dist.Bernoulli(logits=torch.tensor(0.3)), 1),
    "Normal": (lambda: dist.Normal(torch.tensor(250.0), 3.0), 255),
    "Categorical": (lambda: dist.Categorical(logits=torch.arange(4.0)), 3),
    "Geometric": (lambda: dist.Geometric(torch.tensor(0.1)), 200),
    "NegativeBinomial": (lambda: dist.NegativeBinomial(torch.tensor(5.0), logits=torch.tensor(2.0)), 255),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("name", STOCK)
def test_estimators_score_whole_numbers_of_a_users_program_as_real_ones(name, dtype):
    make, value = STOCK[name]
    x = torch.full((3,), value).to(dtype)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", make(), obs=x)
        return z

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    exact = float(make().log_prob(x.float()).sum())
    for estimator in (ELBO(2), IWAE(3)):
        assert -estimator.loss(model, guide, x) == pytest.approx(exact, rel=1e-5)
