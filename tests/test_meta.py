"""CUDA without CUDA: every row of the tables runs on the `meta` device, which has shapes and no numbers.

A tensor that a program makes on the CPU raises there, and so does every read of a number on the host. What the library
reads on purpose stands in `MEANT`; on a GPU each of these waits for the device, and no step does another time.
"""

import contextlib

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, FAMILIES, LIKELIHOODS, PRIORS, small, vae
from test_estimators import EVERY

from pyro_vae import log_weights
from pyro_vae.compiled import _Preserved
from pyro_vae.estimators import ELBO, IWAE, DReG, PredictionPenalty
from pyro_vae.guides import AmortizedGuide, StateSpaceGuide, families
from pyro_vae.models import BayesianVAE, ConditionalVAE, SemiSupervisedVAE, StateSpaceModel, likelihoods, priors
from pyro_vae.models.transitions import Emission, GatedTransition, Initial, LinearTransition, MLPTransition

MEANT = {  # what reads numbers on the host, and why
    "pyro.enable_validation": "Pyro's and torch's checks of values, at the first call of `fit` and CompiledSVI alone",
    "draws.difference": "whether draws may be made in one call: looked at once for each signature",
    "log_weights._check_steps": "whether chains of model and guide have one mask: once for each signature",
    "compiled._Preserved": "what a first run wrote is put back where it differs: once for each signature",
    "a guide's first call": "the model is traced once for each signature; torch draws Dirichlet and Gamma by rejection",
    "SVI's gate": "whether loss and gradients are finite: one boolean a step, which compiled steps read a step later",
    "evaluation.check_support": "whether data lie in the likelihood's support: once for each batch, before its draws",
    "stock ELBOs of Pyro": "`item()` at each step by design; SemiSupervisedELBO is one of them",
}


@pytest.fixture(autouse=True)
def what_is_meant(monkeypatch):
    monkeypatch.setattr(log_weights, "difference", lambda *arguments: None)
    monkeypatch.setattr(log_weights, "_check_steps", lambda *traces: None)
    monkeypatch.setattr(
        _Preserved, "__torch_dispatch__", lambda self, f, types, args=(), kwargs=None: f(*args, **(kwargs or {}))
    )
    with pyro.validation_enabled(False):
        yield


def on_meta(estimator, model, guide, *args, **kwargs):
    """Loss and gradients, without numbers."""
    with torch.no_grad():
        guide(*args, **kwargs)  # its first call, see MEANT
    model, guide = (program.to("meta") for program in (model, guide))
    if isinstance(estimator, torch.nn.Module):
        estimator.to("meta")
    args = [each.to("meta") for each in args]
    kwargs = {name: each.to("meta") for name, each in kwargs.items()}
    loss = estimator.differentiable_loss(model, guide, *args, **kwargs)
    assert loss.device.type == "meta" and loss.shape == ()
    loss.backward()
    gradients = [p.grad for p in (*model.parameters(), *guide.parameters()) if p.grad is not None]
    assert gradients and all(gradient.device.type == "meta" for gradient in gradients)


def test_meta_raises_what_a_gpu_would_not():
    """The law can fail: a tensor of the CPU in a program, and a number that is read."""

    class Reading(ELBO):
        def objective(self, weights):
            return weights.log_weight.mean(0) * (1.0 if weights.log_weight.sum() > 0 else 2.0)

    class Mixing(ELBO):
        def objective(self, weights):
            return weights.log_weight.mean(0) + torch.ones(6)

    for estimator, message in ((Reading(2), "meta"), (Mixing(2), "device")):
        with pytest.raises((RuntimeError, NotImplementedError), match=message):
            on_meta(estimator, *CASES[0].pair(), CASES[0].data())


@pytest.mark.parametrize("estimator", [ELBO, IWAE, DReG])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pairs(case, estimator):
    model, guide = case.pair()
    refused = estimator is DReG and "categorical" in case.name
    with pytest.raises(ValueError, match="can be reparameterised") if refused else contextlib.nullcontext():
        on_meta(estimator(2), model, guide, case.data())


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    on_meta(DReG(2), *vae((4,), small, FAMILIES[name], latent_dim=3, decoder=small), torch.rand(6, 4).round())


@pytest.mark.parametrize("name", [name for name in PRIORS if name != "function"])  # which makes tensors on the CPU
def test_priors(name):
    on_meta(IWAE(2), *vae((4,), small, prior=PRIORS[name](), decoder=small), torch.rand(6, 4).round())


def test_a_vamp_prior_of_couplings():
    prior = priors.VampPrior((4,), 3, small, families.CouplingSpline(1, (8,)), components=4)
    model, guide = vae((4,), prior.encoder, prior.family, prior=prior, decoder=small)
    on_meta(IWAE(2), model, guide, torch.rand(6, 4).round())


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods(name):
    likelihood, batch = LIKELIHOODS[name]
    on_meta(IWAE(2), *vae((4,), small, latent_dim=2, likelihood=likelihood, decoder=small), batch())


@pytest.mark.parametrize("scale", ["shared", "per_dimension", "predicted"])
def test_scales(scale):
    likelihood = likelihoods.Normal(scale, "sigmoid")
    on_meta(ELBO(2), *vae((4,), small, latent_dim=2, likelihood=likelihood, decoder=small), torch.rand(6, 4))


@pytest.mark.parametrize("name", EVERY)
def test_estimators(name):
    prior = priors.Categorical(3, codes=2) if name in ("VIMCO", "ScoreFunction") or "Wake" in name else None
    model, guide = vae((4,), small, **({"latent_dim": 2} if prior is None else {"prior": prior}), decoder=small)
    on_meta(EVERY[name](), model, guide, torch.rand(6, 4).round())


@pytest.mark.parametrize("together", [True, False])
def test_draws_one_by_one(together):
    model, guide = vae((4,), small, latent_dim=2, decoder=small)
    on_meta(IWAE(3, vectorize_particles=together), model, guide, torch.rand(6, 4).round())


def test_labels_and_covariates():
    x, y = torch.rand(6, 4).round(), torch.eye(3)[[0, 1, 2, 0, 1, 2]]
    conditional = ConditionalVAE((4,), covariates=3, latent_dim=2, decoder=small)
    on_meta(IWAE(2), conditional, AmortizedGuide(conditional, small, encoder_inputs=conditional.beside), x, y)
    bayesian = BayesianVAE((4,), size=12, latent_dim=2, decoder=small)
    on_meta(ELBO(2), bayesian, AmortizedGuide(bayesian, small), x)
    labelled = SemiSupervisedVAE((4,), classes=3, latent_dim=2, decoder=small)
    on_meta(IWAE(2), labelled, AmortizedGuide(labelled, small), x, y)


TRANSITIONS = {
    "linear": lambda: LinearTransition(2, 1),
    "network": lambda: MLPTransition(2, 1),
    "gated": lambda: GatedTransition(2, 5, 1),
}


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("inference", ["MF-L", "MF-R", "MF-LR", "ST-L", "ST-R", "ST-LR"])
def test_sequences(transition, inference):
    """Ragged, with inputs and entries that are missing."""
    model = StateSpaceModel(
        Initial(2, 1), TRANSITIONS[transition](), Emission(2, 3, likelihoods.Normal(), small, 1), num_inputs=1
    )
    guide = StateSpaceGuide(model, inference, hidden=4, missing="entries")
    x, u = torch.randn(6, 5, 3), torch.randn(6, 5, 1)
    for given in ({}, {"lengths": torch.tensor([5, 4, 3, 2, 1, 5])}, {"mask": torch.rand(6, 5, 3) < 0.7}):
        on_meta(IWAE(2), model, guide, x, u, **given)
        model, guide = (program.to_empty(device="cpu") for program in (model, guide))


@pytest.mark.parametrize("cell", ["rnn", "relu_rnn", "gru", "lstm"])
def test_recurrent_networks(cell):
    model = StateSpaceModel(Initial(2), LinearTransition(2), Emission(2, 3, likelihoods.Normal(), small), feedback=0)
    guide = StateSpaceGuide(model, hidden=4, cell=cell, family=families.IAF(1, (8,)))
    on_meta(ELBO(2), model, guide, torch.randn(6, 5, 3))
    model = StateSpaceModel(
        Initial(2, 3), LinearTransition(2, 3), Emission(2, 3, likelihoods.Normal(), small, 3), feedback=3
    )
    on_meta(PredictionPenalty(0.1), model, StateSpaceGuide(model, hidden=4, cell=cell), torch.randn(6, 5, 3))


def test_nested_plates_and_global_sites():
    """A user's own program with a guide of the library's."""

    class Words(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.location = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x):
            one = torch.ones_like(self.location)
            scale = pyro.sample("scale", dist.Gamma(2 * one, one))
            with pyro.plate("data", len(x), dim=-2):
                z = pyro.sample("z", dist.Normal(self.location, scale))
                share = pyro.sample("share", dist.Beta(0.3 * one, 0.5 * one))
                with pyro.plate("words", x.shape[1], dim=-1):
                    pyro.sample("x", dist.Normal(z + share, one), obs=x)

    x = torch.randn(6, 4)
    model = Words()
    on_meta(ELBO(2), model, AmortizedGuide(model, small, example=((x,), {})), x)
