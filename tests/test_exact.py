"""Known answers: probabilistic PCA, the weighted ELBO, gradients by hand, and identities."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from sklearn.datasets import load_digits
from torch import nn

from pyro_vae import evaluate, fit, load_dataset
from pyro_vae.evaluation import generalized_pareto_shape
from pyro_vae.guides import AmortizedGuide, families
from pyro_vae.log_weights import log_weights
from pyro_vae.models import VAE, LinearVAE
from pyro_vae.models.linear import maximum_log_likelihood
from pyro_vae.nn import MLP
from pyro_vae.svi import latent_scale

DIGITS = torch.tensor(load_digits().data)


class FixedNoise(poutine.messenger.Messenger):
    """Every Normal latent site is location + scale * noise, so that two computations see the same draw."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, message):
        if not message["is_observed"] and message["value"] is None and message["name"] == "z":
            message["value"] = message["fn"].mean + message["fn"].stddev * self.noise
            message["done"] = True


def exact_guide(model, variance=None):
    """The amortised guide of a linear VAE at its exact posterior, or at that of a model with another variance."""
    variance = model.variance.detach() if variance is None else torch.tensor(variance, dtype=torch.float64)
    guide = AmortizedGuide(model, encoder=nn.Flatten()).double()
    W, mu = model.weight.detach(), model.mean.detach()
    M = W.mT @ W + variance * torch.eye(W.shape[1], dtype=torch.float64)
    A = torch.linalg.solve(M, W.mT)
    head = guide.heads["z"].heads.linear
    with torch.no_grad():
        head.weight.copy_(torch.cat([A, torch.zeros_like(A)]))
        head.bias.copy_(torch.cat([-A @ mu, 0.5 * (variance / M.diagonal()).log()]))
    return guide


@pytest.mark.parametrize(("latent_dim", "answer"), [(2, -177.439971), (10, -159.993731)])
def test_probabilistic_pca_of_the_digits(latent_dim, answer):
    """With the best weights the ELBO equals the log-likelihood for every draw, and both equal the closed form."""
    assert maximum_log_likelihood(DIGITS, latent_dim).item() == pytest.approx(answer, abs=5e-7)
    model = LinearVAE.maximum_likelihood(DIGITS, latent_dim)
    exact = model.log_evidence(DIGITS)
    assert exact.mean().item() == pytest.approx(answer, abs=5e-7)
    guide = exact_guide(model)
    scores = evaluate(model, guide, DIGITS, num_samples=3, progress=False)
    torch.testing.assert_close(scores.per_datum["elbo"], exact.detach(), rtol=0, atol=1e-8)
    torch.testing.assert_close(scores.per_datum["log_evidence"], exact.detach(), rtol=0, atol=1e-8)
    assert scores.elbo.standard_error_draws < 1e-6
    posterior, q = model.posterior(DIGITS), guide.heads["z"](DIGITS)
    torch.testing.assert_close(q.mean, posterior.mean)
    torch.testing.assert_close(q.variance, posterior.variance)


@pytest.mark.parametrize(("latent_dim", "epochs"), [(2, 100), (10, 220)])
def test_training_comes_to_the_closed_form(latent_dim, epochs, tmp_path):
    """fit, from random weights, with a linear encoder: within 0.05 nats of the exact maximum, and not above it."""
    torch.manual_seed(0)
    x = DIGITS / 16
    model = LinearVAE((64,), latent_dim).double()
    guide = AmortizedGuide(model, encoder=nn.Flatten()).double()
    best = maximum_log_likelihood(x, latent_dim).item()
    fit(
        model,
        guide,
        x,
        loss=TraceMeanField_ELBO(),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.05, betas=(0.9, 0.95), fused=True),
        learning_rate=lambda epoch: max(0.003, 1 - epoch / epochs),
        epochs=epochs,
        batch_size=200,
        out=tmp_path / "run",
        progress=False,
    )
    exact = model.log_evidence(x).mean().item()
    bound = float(evaluate(model, guide, x, num_samples=20, progress=False).elbo)
    assert best - 0.05 < exact <= best + 1e-9
    assert best - 0.05 < bound < best + 0.01


def test_a_mean_field_guide_pays_its_gap_on_a_rotated_model():
    """The best diagonal guide is 1/2 (sum ln M_ii - ln |M|) below log p(x)."""
    model = LinearVAE.maximum_likelihood(DIGITS, 10)
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64))[0]
    with torch.no_grad():
        model.weight.copy_(model.weight @ rotation)
    W = model.weight.detach()
    M = W.mT @ W + model.variance.detach() * torch.eye(10)
    gap = 0.5 * (M.diagonal().log().sum() - torch.logdet(M)).item()
    assert gap > 0.3
    scores = evaluate(model, exact_guide(model), DIGITS, num_samples=200, progress=False)
    measured = model.log_evidence(DIGITS).mean().item() - float(scores.elbo)
    assert measured == pytest.approx(gap, abs=4 * scores.elbo.standard_error_draws)
    assert scores.elbo.standard_error_draws < 0.01


@pytest.mark.parametrize(("beta", "rate", "distortion"), [(1.0, 12.796141, 372.758), (4.0, 5.864669, 547.489)])
def test_kl_weight_in_the_linear_vae(beta, rate, distortion):
    """At W = U (L - t I)^{1/2}, t = beta s^2: the closed forms of rate and distortion, and no gradient."""
    s2, k = 5.824351, 10
    model = LinearVAE.maximum_likelihood(DIGITS, k)
    W = model.weight.detach()
    eigenvalues = W.square().sum(0) + model.variance.detach()
    t = beta * s2
    with torch.no_grad():
        model.weight.copy_(W / W.norm(dim=0) * (eigenvalues - t).sqrt())
        model.likelihood.log_scale.copy_(torch.tensor(s2, dtype=torch.float64).sqrt().log())
    guide = exact_guide(model, variance=t)
    q, p = guide.heads["z"](DIGITS), dist.Normal(torch.zeros(k), 1.0).to_event(1)
    measured_rate = torch.distributions.kl_divergence(q, p).mean().item()
    reconstruction = q.mean @ model.weight.mT + model.mean
    spread = (q.variance @ model.weight.square().mT).sum(1)
    measured_distortion = ((DIGITS - reconstruction).square().sum(1) + spread).mean().item()
    assert measured_rate == pytest.approx(rate, abs=1e-5)
    assert measured_distortion == pytest.approx(distortion, abs=1e-3)

    def gradients(weight, draws=64):
        """Mean and standard error of the weighted loss's gradient, per parameter, over independent draws."""
        torch.manual_seed(0)
        parameters = [model.weight, guide.heads["z"].heads.linear.weight]
        rows = []
        for _ in range(draws):
            with latent_scale(weight):
                loss = TraceMeanField_ELBO().differentiable_loss(model, guide, DIGITS)
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
        rows = torch.stack(rows)
        return rows.mean(0), rows.std(0) / math.sqrt(draws)

    mean, error = gradients(beta)
    assert (mean / error)[error > 1e-6 * error.max()].square().mean() < 2.0
    mean, error = gradients(2 * beta)
    assert (mean / error)[error > 1e-6 * error.max()].square().mean() > 10

    with latent_scale(beta):
        loss = TraceMeanField_ELBO(num_particles=64).loss(model, guide, DIGITS) / len(DIGITS)
    expected = beta * rate + distortion / (2 * s2) + 32 * math.log(2 * math.pi * s2)
    assert loss == pytest.approx(expected, abs=0.05)


def test_gated_layers_and_the_initial_scale_by_hand():
    torch.manual_seed(0)
    network = MLP(hidden=(3,), activation="glu").bind((2,), (1,))
    layer, x = network.layers[0], torch.randn(4, 2)
    W, V, b, c = layer.weight[:3], layer.weight[3:], layer.bias[:3], layer.bias[3:]
    gated = (x @ W.T + b) * torch.sigmoid(x @ V.T + c)
    torch.testing.assert_close(network(x), network.output(gated))

    for features in (0, 10):
        scales = [
            (torch.manual_seed(0), families.DiagonalNormal(scale).bind(features, (3,))(torch.ones(features)).stddev)[1]
            for scale in (1.0, 0.05)
        ]
        torch.testing.assert_close(scales[1], 0.05 * scales[0])


def one_layer_pair():
    torch.manual_seed(0)
    network = MLP(hidden=(5,), activation="tanh")
    model = VAE((6,), latent_dim=2, decoder=network).double()
    return model, AmortizedGuide(model, encoder=network).double()


def test_gradient_of_the_one_layer_vae_by_hand():
    """Back-propagation written out in NumPy equals autograd through Pyro."""
    model, guide = one_layer_pair()
    x = torch.rand(7, 6, dtype=torch.float64).round()
    noise = torch.randn(7, 2, dtype=torch.float64)
    with FixedNoise(noise):
        loss = TraceMeanField_ELBO().differentiable_loss(model, guide, x)
    loss.backward()

    encoder, head = guide.encoder.layers[0], guide.heads["z"].heads.linear
    hidden, output = model.decoder.layers[0], model.decoder.output
    A, a, C, c, F, f, G, g = (
        p.detach().numpy() for layer in (encoder, head, hidden, output) for p in (layer.weight, layer.bias)
    )
    x, noise = x.numpy(), noise.numpy()
    h = np.tanh(x @ A.T + a)
    m, log_s = np.split(h @ C.T + c, 2, axis=1)
    s = np.exp(log_s)
    z = m + s * noise
    d = np.tanh(z @ F.T + f)
    logits = d @ G.T + g
    value = np.sum(np.logaddexp(0, logits) - x * logits) + np.sum(0.5 * (m**2 + s**2 - 1) - log_s)
    assert loss.item() == pytest.approx(value, rel=1e-12)

    d_logits = 1 / (1 + np.exp(-logits)) - x
    d_hidden = (d_logits @ G) * (1 - d**2)
    d_z = d_hidden @ F
    d_head = np.concatenate([d_z + m, d_z * noise * s + s**2 - 1], axis=1)
    d_encoder = (d_head @ C) * (1 - h**2)
    for layer, delta, inputs in (
        (output, d_logits, d),
        (hidden, d_hidden, z),
        (head, d_head, h),
        (encoder, d_encoder, x),
    ):
        np.testing.assert_allclose(layer.weight.grad.numpy(), delta.T @ inputs, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(layer.bias.grad.numpy(), delta.sum(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 4, 12])
def test_mini_batches_have_the_gradient_of_the_full_batch(batch_size):
    """The gradient over all data is the sum of the batches' gradients at the same noise: each is unbiased."""
    model, guide = one_layer_pair()
    x, noise = torch.rand(12, 6, dtype=torch.float64).round(), torch.randn(12, 2, dtype=torch.float64)
    parameters = [*model.parameters(), *guide.parameters()]

    def gradient(rows):
        with FixedNoise(noise[rows]):
            return torch.autograd.grad(Trace_ELBO().differentiable_loss(model, guide, x[rows]), parameters)

    whole = gradient(torch.arange(12))
    batches = [gradient(rows) for rows in torch.randperm(12).split(batch_size)]
    for i, full in enumerate(whole):
        torch.testing.assert_close(sum(batch[i] for batch in batches), full, rtol=1e-10, atol=1e-10)


def test_a_guide_that_is_the_prior_has_no_kl():
    """KL(q || q) = 0: log-weights are then the log-likelihood of each draw."""
    model = VAE((6,), latent_dim=3).double()
    guide = AmortizedGuide(model).double()
    nn.init.zeros_(guide.heads["z"].heads.linear.weight)
    nn.init.zeros_(guide.heads["z"].heads.linear.bias)
    x = torch.rand(8, 6, dtype=torch.float64).round()
    weights = log_weights(model, guide, (x,), {}, 5)
    assert torch.equal(weights.kl, torch.zeros(5, 8, dtype=torch.float64))
    scores = evaluate(model, guide, x, num_samples=5, progress=False)
    assert float(scores.kl) == 0.0 and scores.kl_per_dim.abs().max() == 0.0 and scores.active_units == 0


def test_the_k_sample_bound_rises_with_k_to_the_evidence():
    model = LinearVAE.maximum_likelihood(DIGITS, 2)
    guide = exact_guide(model)
    with torch.no_grad():
        guide.heads["z"].heads.linear.bias += 0.3
    x = DIGITS[:100]
    exact = model.log_evidence(x).mean().item()
    bounds = [evaluate(model, guide, x, num_samples=k, progress=False) for k in (1, 4, 16, 256, 4096)]
    values = [float(scores.log_evidence) for scores in bounds]
    errors = [scores.log_evidence.standard_error_draws for scores in bounds]
    assert values[0] < values[1] - 0.2
    for i in range(2, 5):
        assert values[i] > values[i - 1] - 4 * math.hypot(errors[i], errors[i - 1])
    assert errors[-1] < 0.003
    assert values[-1] == pytest.approx(exact, abs=4 * errors[-1])
    assert float(bounds[-1].khat) < 0.7


@pytest.mark.parametrize("chunk", [10, 97, 10_000])
def test_memory_bounds_do_not_change_the_estimate(chunk, monkeypatch):
    """Any split of data and draws gives the same quantity: against the closed form, within the reported error."""
    from pyro_vae import evaluation

    model = LinearVAE.maximum_likelihood(DIGITS, 2)
    guide = exact_guide(model)
    with torch.no_grad():
        guide.heads["z"].heads.linear.bias += 0.1
    monkeypatch.setattr(evaluation, "MAX_ELEMENTS", 64 * chunk)
    scores = evaluate(model, guide, DIGITS[:20], num_samples=50, progress=False)
    exact = model.log_evidence(DIGITS[:20]).mean().item()
    error = scores.log_evidence.standard_error_draws
    assert 0 < error < 0.05
    assert float(scores.log_evidence) == pytest.approx(exact, abs=5 * error)


def test_scores_of_a_standardised_table_are_those_of_the_original_units(tmp_path):
    """A Gaussian density is the same before and after standardisation, Jacobian included."""
    rng = np.random.default_rng(0)
    table = rng.normal([5.0, -300.0, 0.01], [2.0, 50.0, 0.003], size=(200, 3))
    np.save(tmp_path / "table.npy", table)
    dataset = load_dataset(tmp_path / "table.npy")
    model = LinearVAE.maximum_likelihood(dataset.train.x.double(), 1)
    guide = exact_guide(model)
    scores = evaluate(model, guide, dataset.test.x.double(), num_samples=2, progress=False)
    original = dataset.restore(dataset.test.x.double())
    scale = dataset.scale
    covariance = (model.weight @ model.weight.mT + model.variance * torch.eye(3)).detach() * scale * scale[:, None]
    mean = dataset.location + scale * model.mean.detach()
    exact = dist.MultivariateNormal(mean, covariance).log_prob(original).mean().item()
    assert abs(dataset.test.log_jacobian) > 1
    assert float(scores.log_evidence) + dataset.test.log_jacobian == pytest.approx(exact, abs=1e-6)
    single = evaluate(model.float(), guide.float(), dataset.test, num_samples=2, progress=False)
    assert float(single.log_evidence) == pytest.approx(exact, abs=1e-4)


def test_an_empty_latent_space_is_the_independent_pixel_model(mnist_root):
    """No active unit on MNIST: 205.97 nats, independent pixels at the training means; grey targets have a floor."""
    mnist = load_dataset("mnist", binarize="dynamic", root=mnist_root)
    means = mnist.train.x.double().mean(0).clamp(1e-3, 1 - 1e-3)
    grey = load_dataset("mnist", root=mnist_root).test.x.double()
    cross_entropy = -(grey * means.log() + (1 - grey) * (1 - means).log()).flatten(1).sum(1).mean().item()
    assert cross_entropy == pytest.approx(205.97, abs=5e-3)
    floor = -(torch.xlogy(grey, grey) + torch.xlogy(1 - grey, 1 - grey)).flatten(1).sum(1).mean().item()
    assert floor == pytest.approx(45.53, abs=5e-3)

    model = VAE(mnist.event_shape, latent_dim=4, decoder=MLP(hidden=()))
    guide = AmortizedGuide(model)
    head = guide.heads["z"].heads.linear
    with torch.no_grad():
        for parameter in (model.decoder.output.weight, head.weight, head.bias):
            parameter.zero_()
        model.decoder.output.bias.copy_(means.logit().flatten())
    scores = evaluate(model, guide, mnist.test, num_samples=2, progress=False)
    assert scores.active_units == 0 and float(scores.kl) == 0.0
    assert -float(scores.log_evidence) == pytest.approx(205.97, abs=0.3)
    with pytest.raises(ValueError, match="support of its Bernoulli likelihood.*binarise the data"):
        evaluate(model, guide, grey[:10].float(), num_samples=2, progress=False)


def test_memory_is_bounded_whatever_the_number_of_draws(monkeypatch):
    """No call scores more draws x data x dimensions than the bound, and every draw of every datum is scored once."""
    from pyro_vae import evaluation

    calls = []

    def counted(model, guide, args, kwargs, num_samples, structure, **options):
        calls.append((num_samples, len(args[0])))
        return scored(model, guide, args, kwargs, num_samples, structure, **options)

    scored = evaluation.log_weights
    monkeypatch.setattr(evaluation, "MAX_ELEMENTS", 20_000)
    monkeypatch.setattr(evaluation, "log_weights", counted)
    model = LinearVAE((3,), latent_dim=1)
    for num_samples in (2, 7, 64, 1000):
        calls.clear()
        evaluate(model, AmortizedGuide(model), torch.randn(9, 3), num_samples=num_samples, progress=False)
        draws = [call for call in calls if call[0] > 1]  # the others check the data
        (rows,) = {rows for _, rows in draws}  # the last rows are filled up to the same number
        assert sum(K for K, _ in draws) == num_samples * -(-9 // rows)
        assert max(K * rows for K, rows in draws) * 1_000 <= 20_000


@pytest.mark.parametrize("num_samples", [27, 200, 1000, 5000])
def test_khat_is_that_of_arviz(num_samples):
    """The Pareto tail's shape against `psislw` of ArviZ 0.x, for light and heavy tails."""
    import importlib.metadata
    import warnings

    if not importlib.metadata.version("arviz").startswith("0."):
        pytest.skip("psislw of ArviZ 1.x has another form")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz

    for tail in (0.1, 0.5, 0.9):
        log_weight = -tail * torch.rand(num_samples, dtype=torch.float64).log()
        _, expected = arviz.psislw(log_weight.numpy().copy())
        largest = log_weight.topk(min(math.ceil(num_samples / 5), math.ceil(3 * math.sqrt(num_samples))) + 1).values
        khat = generalized_pareto_shape(largest[:, None])
        assert khat.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("num_samples", [50, 99, 1000])
def test_a_posterior_that_is_the_prior_has_no_active_units(num_samples, monkeypatch):
    """Where q has no mean in closed form, the noise of its mean over draws is no activity; any split of the draws."""
    from pyro_vae import evaluation

    class Hidden(dist.Normal):
        @property
        def mean(self):
            raise NotImplementedError

        def expand(self, batch_shape, _instance=None):
            return Hidden(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Hidden(torch.zeros(2), torch.ones(2)).to_event(1))

    monkeypatch.setattr(evaluation, "MAX_ELEMENTS", 40_000)
    assert evaluate(model, guide, torch.randn(36), num_samples=num_samples, progress=False).active_units == 0
