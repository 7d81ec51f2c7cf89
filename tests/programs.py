"""Pyro programs that use nothing of this library, with the loss that trains them: CompiledSVI must serve them all."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, autoguide, config_enumerate
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import constraints

X = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(6, 2)


def regression(x):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(weight, scale[..., None]).to_event(1), obs=x)


def subsampled(x):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=3) as index:
        pyro.sample("x", dist.Normal(weight, 1.0).to_event(1), obs=x[index])


def masked(x):
    location = pyro.param("location", torch.zeros(2))
    with pyro.plate("data", len(x)), poutine.mask(mask=x[:, 0] > 0), poutine.scale(scale=0.3):
        z = pyro.sample("z", dist.Normal(location, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def constrained(x):
    location = pyro.param("q_location", lambda: torch.randn(2))
    scale = pyro.param("q_scale", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(location, scale).to_event(1))


def coins(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z[..., None] * torch.ones(2), 1.0).to_event(1), obs=x)


def coins_guide(x):
    logits = pyro.param("logits", torch.zeros(len(x)))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=logits))


def mixture(x):
    weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
    locations = pyro.param("locations", torch.arange(3.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locations[k][..., None] * torch.ones(2), 1.0).to_event(1), obs=x)


def nothing(x):
    pass


def registered():
    net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        location, log_scale = net(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(location, log_scale.exp()).to_event(1))

    return model, guide


class Bayesian(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.scale = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, self.scale), obs=x[:, 0])


def automatic(guide, model=regression, **arguments):
    def make():
        program = model() if isinstance(model, type) else model
        return program, guide(program, **arguments)

    return make


def chain(x):
    """A hidden Markov model with its states enumerated."""
    transition = pyro.param("transition", torch.ones(2, 2) / 2, constraint=constraints.simplex)
    locations = pyro.param("locations", torch.tensor([-1.0, 1.0]))
    state = 0
    for t in pyro.markov(range(len(x))):
        state = pyro.sample(f"z{t}", dist.Categorical(transition[state]), infer={"enumerate": "parallel"})
        pyro.sample(f"x{t}", dist.Normal(locations[state], 1.0), obs=x[t, 0])


def image_vae():
    """The tutorial's VAE: two nn.Modules, registered by pyro.module."""
    encoder = nn.Sequential(nn.Linear(2, 8), nn.Softplus(), nn.Linear(8, 4))
    decoder = nn.Sequential(nn.Linear(2, 8), nn.Softplus(), nn.Linear(8, 2))

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(x.shape[0], 2), x.new_ones(x.shape[0], 2)).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=(x > 0).to(x.dtype))

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", x.shape[0]):
            location, scale = encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(location, scale.exp()).to_event(1))

    return model, guide


class DeepMarkov(nn.Module):
    """A deep Markov model with a backward recurrent guide, masks for ragged sequences and an annealed KL term."""

    def __init__(self):
        super().__init__()
        self.gate, self.proposal = nn.Linear(2, 2), nn.Linear(2, 2)
        self.scale, self.emission = nn.Linear(2, 2), nn.Linear(2, 1)
        self.rnn = nn.GRU(1, 4, batch_first=True)
        self.combine, self.heads = nn.Linear(2, 4), nn.Linear(4, 4)
        self.start, self.q_start = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def model(self, x, lengths, annealing):
        pyro.module("dmm", self)
        z = self.start.expand(len(x), 2)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                gate = self.gate(z).sigmoid()
                mean = (1 - gate) * z + gate * self.proposal(z).relu()
                mask = t < lengths
                with poutine.mask(mask=mask), poutine.scale(scale=annealing):
                    scale = nn.functional.softplus(self.scale(z)) + 1e-3
                    z = pyro.sample(f"z{t}", dist.Normal(mean, scale).to_event(1))
                with poutine.mask(mask=mask):
                    pyro.sample(f"x{t}", dist.Normal(self.emission(z), 1.0).to_event(1), obs=x[:, t, None])

    def guide(self, x, lengths, annealing):
        pyro.module("dmm", self)
        hidden = self.rnn(x[..., None].flip(1))[0].flip(1)
        z = self.q_start.expand(len(x), 2)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                location, scale = self.heads((self.combine(z).tanh() + hidden[:, t]) / 2).chunk(2, -1)
                with poutine.mask(mask=t < lengths), poutine.scale(scale=annealing):
                    z = pyro.sample(f"z{t}", dist.Normal(location, nn.functional.softplus(scale)).to_event(1))


class SemiSupervised(nn.Module):
    """y ~ OneHot, z ~ N(0, I), x | y, z; an unseen label is enumerated."""

    def __init__(self):
        super().__init__()
        self.classifier, self.encoder = nn.Linear(2, 3), nn.Linear(5, 4)
        self.decoder = nn.Linear(5, 2)

    def model(self, x, y=None):
        pyro.module("m2", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(x.new_ones(len(x), 3) / 3), obs=y)
            batch = torch.broadcast_shapes(z.shape[:-1], y.shape[:-1])
            mean = self.decoder(torch.cat((z.expand(*batch, 2), y.expand(*batch, 3)), -1))
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(self, x, y=None):
        pyro.module("m2", self)
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=self.classifier(x)))
            location, scale = self.encoder(torch.cat((x.expand(*y.shape[:-1], 2), y), -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(location, scale.exp()).to_event(1))

    def classify(self, x, y):
        pyro.module("m2", self)
        with pyro.plate("data", len(x)), poutine.scale(scale=5.0):
            pyro.sample("y_aux", dist.OneHotCategorical(logits=self.classifier(x)), obs=y)


PROGRAMS = {
    "AutoNormal": (automatic(autoguide.AutoNormal), Trace_ELBO()),
    "AutoNormal, mean field": (automatic(autoguide.AutoNormal), TraceMeanField_ELBO()),
    "AutoNormal, particles": (automatic(autoguide.AutoNormal), Trace_ELBO(num_particles=3)),
    "AutoNormal, vectorised": (
        automatic(autoguide.AutoNormal),
        Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    ),
    "AutoDiagonalNormal": (automatic(autoguide.AutoDiagonalNormal), Trace_ELBO()),
    "AutoMultivariateNormal": (automatic(autoguide.AutoMultivariateNormal), Trace_ELBO()),
    "AutoLowRank": (automatic(autoguide.AutoLowRankMultivariateNormal, rank=1), Trace_ELBO()),
    "AutoIAFNormal": (automatic(autoguide.AutoIAFNormal, hidden_dim=[8]), Trace_ELBO()),
    "AutoDelta": (automatic(autoguide.AutoDelta), Trace_ELBO()),
    "subsampling": (automatic(autoguide.AutoNormal, subsampled), Trace_ELBO()),
    "PyroModule, PyroSample": (automatic(autoguide.AutoNormal, Bayesian), Trace_ELBO()),
    "mask, scale, constraint": (lambda: (masked, constrained), Trace_ELBO()),
    "score function": (lambda: (coins, coins_guide), Trace_ELBO()),
    "enumeration": (lambda: (mixture, nothing), TraceEnum_ELBO(max_plate_nesting=1)),
    "enumeration in the guide": (lambda: (coins, config_enumerate(coins_guide)), TraceEnum_ELBO(max_plate_nesting=1)),
    "hidden Markov model": (lambda: (chain, nothing), TraceEnum_ELBO(max_plate_nesting=0)),
    "pyro.module, batch norm, dropout": (registered, Trace_ELBO()),
    "vectorised enumeration": (
        lambda: (coins, config_enumerate(coins_guide)),
        TraceEnum_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
    ),
    "tutorial's VAE": (image_vae, TraceMeanField_ELBO()),
    "semi-supervised VAE": (
        lambda: (m2 := SemiSupervised(), (m2.model, config_enumerate(m2.guide, "parallel", expand=True)))[1],
        TraceEnum_ELBO(max_plate_nesting=1),
    ),
    "deep Markov model": (
        lambda: (dmm := DeepMarkov(), (dmm.model, dmm.guide))[1],
        Trace_ELBO(),
        (X, torch.tensor([2, 1, 2, 2, 1, 2]), 0.5),
    ),
    "custom loss": (
        automatic(autoguide.AutoNormal),
        lambda model, guide, *args: 2 * Trace_ELBO().differentiable_loss(model, guide, *args),
    ),
}
