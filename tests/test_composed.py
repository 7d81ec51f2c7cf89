"""Models composed of priors, likelihoods and guides, against mixtures and quadrature in closed form."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim import Adam
from test_guide import assert_mean_weight_is, log_weights
from torch import nn

from pyro_vae import CompiledSVI, evaluate, fit, load_run
from pyro_vae.estimators import SemiSupervisedELBO
from pyro_vae.guides import AmortizedGuide, families
from pyro_vae.models import VAE, BayesianVAE, ConditionalVAE, SemiSupervisedVAE, likelihoods
from pyro_vae.nn import MLP
from pyro_vae.svi import latent_scale


class LabelledMixture:
    """x | z, y ~ N(W z + m_y, s^2 I) with orthogonal columns in W: p(y | x) and p(z | x, y) in closed form, in reach of
    a guide that is linear in x and y."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = SemiSupervisedVAE(
            (3,), classes=4, latent_dim=2, likelihood=likelihoods.Normal("shared", initial_scale=0.8), decoder=MLP(())
        ).double()
        self.guide = AmortizedGuide(self.model, MLP(())).double()
        self.x = torch.randn(6, 3, dtype=torch.float64)
        self.y = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 3, 0, 1]]
        W, means = torch.linalg.qr(torch.randn(3, 2).double()).Q * torch.tensor([1.5, 0.6]), torch.randn(4, 3).double()
        self.s2 = float(self.model.observation(torch.zeros(1, 2).double(), self.y[:1]).variance[0, 0].detach())
        precision = W.pow(2).sum(0) / self.s2 + 1
        with torch.no_grad():
            self.model.decoder.network.output.weight.copy_(torch.cat([W, means.T], dim=1))
            self.model.decoder.network.output.bias.zero_()
            A = W.T / self.s2 / precision[:, None]  # E[z | x, y] = A (x - m_y)
            location, scale = self.guide.heads["z"].heads.linear.weight.split(2)
            location.copy_(torch.cat([A, -A @ means.T], dim=1)), scale.zero_()
            self.guide.heads["z"].heads.linear.bias.copy_(torch.cat([torch.zeros(2), -precision.log() / 2]))
            S = torch.linalg.inv(W @ W.T + self.s2 * torch.eye(3).double())
            self.guide.heads["y"].heads.linear.weight.copy_(means @ S)
            self.guide.heads["y"].heads.linear.bias.copy_(-(means @ S * means).sum(-1) / 2)
        of_each = dist.MultivariateNormal(means, W @ W.T + self.s2 * torch.eye(3).double()).log_prob(self.x[:, None])
        self.log_joint = of_each - math.log(4)  # ln p(x, y), (B, classes)


def test_the_semi_supervised_bound_is_the_evidence_at_the_posterior():
    case = LabelledMixture()
    y = case.y.clone()
    y[3:] = torch.nan
    exact = (case.log_joint * case.y)[:3].sum() + case.log_joint.logsumexp(-1)[3:].sum()
    for loss in (
        SemiSupervisedELBO(max_plate_nesting=1),
        SemiSupervisedELBO(max_plate_nesting=1, num_particles=3, vectorize_particles=True, classification=9.0),
    ):
        assert loss.loss(case.model, case.guide, case.x, y) == pytest.approx(-float(exact), abs=1e-10)
    labels = case.guide.posterior(case.x, site="y").probs
    torch.testing.assert_close(labels, case.log_joint.softmax(-1), rtol=1e-10, atol=1e-10)


def test_all_labels_and_none():
    case, loss = LabelledMixture(), SemiSupervisedELBO(max_plate_nesting=1)
    all_of_them = loss.loss(case.model, case.guide, case.x, case.y)
    assert all_of_them == pytest.approx(-float((case.log_joint * case.y).sum()), abs=1e-10)
    none = loss.loss(case.model, case.guide, case.x, torch.full_like(case.y, torch.nan))
    assert none == pytest.approx(-float(case.log_joint.logsumexp(-1).sum()), abs=1e-10)


def test_the_classifier_learns_from_labels_alone():
    """The gradient has ``classification * sum_{labelled} ln q(y | x)`` beside the bound's."""
    case = LabelledMixture()
    head = case.guide.heads["y"].heads.linear.weight
    y = case.y.clone()
    y[2:] = torch.nan
    gradients = []
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        loss = SemiSupervisedELBO(max_plate_nesting=1, classification=weight)
        gradients.append(torch.autograd.grad(loss.differentiable_loss(case.model, case.guide, case.x, y), head)[0])
    log_q = case.guide.posterior(case.x[:2], site="y").log_prob(case.y[:2]).sum()
    expected = -5 * torch.autograd.grad(log_q, head)[0]
    torch.testing.assert_close(gradients[1] - gradients[0], expected, rtol=1e-9, atol=1e-9)
    assert float(expected.norm()) > 0.1


@pytest.mark.parametrize("size", [4, 20])
def test_the_classification_term_is_scaled_as_its_plate_and_averaged_over_particles(size):
    """And is not weighted as the KL is."""
    torch.manual_seed(0)
    W, V = (nn.Parameter(torch.randn(2, 3)) for _ in range(2))
    x, y = torch.randn(4, 2), torch.eye(3)[[0, 1, 2, 0]]
    known, y[2:] = y[:2].clone(), torch.nan

    def model(x, y=None):
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3)), obs=y)
            pyro.sample("x", dist.Normal(y @ V.T, 1.0).to_event(1), obs=x)

    def guide(x, y=None):
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            if y is None:
                pyro.sample("y", dist.OneHotCategorical(logits=x @ W))

    gradients = []
    for weight in (0.0, 1.0):
        loss = SemiSupervisedELBO(max_plate_nesting=1, num_particles=3, vectorize_particles=True, classification=weight)
        with latent_scale(0.3):
            gradients.append(torch.autograd.grad(loss.differentiable_loss(model, guide, x, y), W)[0])
    log_q = dist.OneHotCategorical(logits=x[:2] @ W).log_prob(known).sum()
    torch.testing.assert_close(gradients[0] - gradients[1], size / 4 * torch.autograd.grad(log_q, W)[0])


def test_a_label_below_another_discrete_site_is_refused():
    """What is summed is ln q(y | x), not q(y | x, c)."""

    def model(x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.OneHotCategorical(torch.ones(2)))
            pyro.sample("y", dist.OneHotCategorical(torch.ones(3)), obs=y)
            pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=x)

    def guide(x, y=None):
        rates = pyro.param("rates", torch.ones(2, 3))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.OneHotCategorical(rates.sum(-1)))
            if y is None:
                pyro.sample("y", dist.OneHotCategorical((c @ rates).exp()))

    x, y = torch.randn(4, 2), torch.full((4, 3), torch.nan)
    y[0] = torch.tensor([1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match='expected site "y" in one plate of data and independent of discrete sites'):
        SemiSupervisedELBO(max_plate_nesting=1).differentiable_loss(model, guide, x, y)


def test_stock_svi_compiled_svi_and_fit_take_the_loss(recorded, tmp_path):
    """Ten labels and 390 data without; the run is kept."""
    case = LabelledMixture()
    torch.manual_seed(1)
    x = Predictive(case.model, num_samples=1, return_sites=("x", "y"))(num_data=400)
    data, labels = x["x"][0], x["y"][0]
    y = labels.clone()
    y[10:] = torch.nan
    losses = []
    for make in (SVI, CompiledSVI):
        pyro.clear_param_store()
        model = LabelledMixture().model
        guide = AmortizedGuide(model, MLP((8,))).double()
        svi = make(model, guide, Adam({"lr": 1e-2}), SemiSupervisedELBO(max_plate_nesting=1))
        losses.append([svi.step(data[:20], y[:20]) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-8)
    assert svi.compiled

    model = SemiSupervisedVAE((3,), classes=4, latent_dim=2, likelihood=likelihoods.Normal("shared"), decoder=MLP(()))
    guide = AmortizedGuide(model, MLP((8,)))
    pair = (data.float(), y.float())
    loss = SemiSupervisedELBO(max_plate_nesting=1, classification=2.0)
    run = fit(model, guide, pair, valid=pair, loss=loss, epochs=3, out=tmp_path / "run", progress=False)
    assert "SemiSupervisedELBO" in (run.path / "config.toml").read_text()
    again = load_run(run.path)
    assert torch.equal(
        again.guide.posterior(data[:5].float(), site="y").probs, run.guide.posterior(data[:5].float(), site="y").probs
    )
    unlabelled, labelled = (
        evaluate(run.model, run.guide, d, num_samples=500, progress=False) for d in (pair[0], (pair[0], labels.float()))
    )
    assert float(unlabelled.log_evidence) > float(labelled.log_evidence)  # p(x) > p(x, y)


def test_labels_are_checked():
    case, loss = LabelledMixture(), SemiSupervisedELBO(max_plate_nesting=1)
    with pytest.raises(
        ValueError, match=r"expected one-hot labels \(B, classes\) as the last argument.*got shape \(6,\)"
    ):
        loss.loss(case.model, case.guide, case.x, torch.zeros(6))
    with pytest.raises(ValueError, match='expected a guide with the latent site "label"'):
        SemiSupervisedELBO(max_plate_nesting=1, site="label").differentiable_loss(
            case.model, case.guide, case.x, case.y
        )
    with pytest.raises(ValueError, match="got y= by keyword"):
        SemiSupervisedELBO(max_plate_nesting=1).loss(case.model, case.guide, case.x, case.y, y=case.y)
    with pytest.raises(ValueError, match="expected classification >= 0"):
        SemiSupervisedELBO(classification=-1.0)
    with pytest.raises(ValueError, match="expected data x, labels y, or num_data"):
        case.model()


def bayesian():
    """x_i | z_i, w, b ~ N(w z_i + b, s^2): given w and b, N(b, w^2 + s^2)."""
    torch.manual_seed(0)
    likelihood = likelihoods.Normal("shared", initial_scale=0.7)
    model = BayesianVAE((1,), size=3, latent_dim=1, likelihood=likelihood, decoder=MLP(()), scale=1.3).double()
    x = torch.tensor([[0.8], [-0.4], [1.5]], dtype=torch.float64)
    family = {"w": families.MultivariateNormal(), "z": families.DiagonalNormal()}
    return model, AmortizedGuide(model, MLP((4,), activation="tanh"), family).double(), x


def test_a_bayesian_decoder_against_quadrature():
    model, guide, x = bayesian()
    grid = torch.linspace(-12, 12, 1201, dtype=torch.float64)
    w, b = grid[:, None], grid
    prior = dist.Normal(0.0, 1.3)
    s2 = model.observation(torch.zeros(1, 1).double(), torch.zeros(2).double()).variance.detach()
    log_joint = prior.log_prob(w) + prior.log_prob(b) + dist.Normal(b, (w**2 + s2).sqrt()).log_prob(x[:, None]).sum(0)
    exact = log_joint.logsumexp((0, 1)) + 2 * (grid[1] - grid[0]).log()
    assert_mean_weight_is(float(exact), log_weights(model, guide, 400_000, x))


def test_a_batch_stands_for_all_data(tmp_path):
    """The mean loss of batches is that of all data, and fit reports nats per datum."""
    model, guide, x = bayesian()
    with torch.no_grad():
        whole = log_weights(model, guide, 200_000, x)
        parts = torch.stack([log_weights(model, guide, 200_000, x[i : i + 1]) for i in range(3)])
    error = math.sqrt(float(whole.var() + parts.var(dim=1).sum() / 9) / 200_000)
    assert float(parts.mean()) == pytest.approx(float(whole.mean()), abs=4 * error)

    still = partial(torch.optim.SGD, lr=1e-12)
    run = fit(model, guide, x, valid=x, optimizer=still, epochs=200, batch_size=2, out=tmp_path / "run", progress=False)
    bounds = torch.tensor([record["bound"] for record in run.history])
    error = float(bounds.std()) / 200**0.5 + error
    assert float(bounds.mean()) == pytest.approx(float(whole.mean()) / 3, abs=4 * error) and error < 0.3
    loss = run.history[0]["valid"]
    with torch.no_grad():
        torch.manual_seed(0)
        assert loss == pytest.approx(-Trace_ELBO().loss(model, guide, x) / 3)


def test_a_decoder_that_is_handed_over_stays_as_it_was():
    other = VAE((4,), latent_dim=2, decoder=MLP((8,)))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    BayesianVAE((4,), size=100, latent_dim=2, decoder=other.decoder)
    assert before.keys() == other.state_dict().keys() and len(list(other.decoder.parameters())) == 4
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 4), nn.Unflatten(-1, (1, 4)))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="expected a decoder whose parameters have one name each, got tied ones"):
        BayesianVAE((4,), size=100, latent_dim=2, decoder=tied)


def test_decoders_are_drawn():
    model, guide, x = bayesian()
    assert not list(model.decoder.parameters()) and "decoder.output.weight" not in model.state_dict()
    for parallel in (False, True):
        draws = Predictive(model, guide=guide, num_samples=4, parallel=parallel, return_sites=("x", "w"))(x)
        assert draws["x"].shape == (4, 3, 1) and len(draws["w"].unique(dim=0)) == 4
    assert model(num_data=5).shape == (5, 1)
    with pytest.raises(ValueError, match="expected at most size=3 data, got 4"):
        model(torch.zeros(4, 1).double())
    scores = evaluate(model, guide, x, num_samples=5, progress=False)
    assert scores.global_sites == ("w",) and float(scores.log_evidence) < 0


def test_two_numbers_of_data_are_refused():
    x, y = torch.zeros(3, 4), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="expected data x or num_data=..., got both"):
        VAE((4,), latent_dim=2)(x, num_data=3)
    for model in (ConditionalVAE((4,), covariates=2, latent_dim=2), SemiSupervisedVAE((4,), classes=2, latent_dim=2)):
        assert model(y=y, num_data=3).shape == (3, 4)
        with pytest.raises(ValueError, match="expected num_data=3, as many as"):
            model(x, y, num_data=7)
