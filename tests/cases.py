"""THE tables: priors, families and likelihoods, of which every test of their kind and the matrix take every row, and
pairs of model and guide, on which every law of test_laws.py is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.guides import AmortizedGuide, StateSpaceGuide, families
from pyro_vae.log_weights import samples
from pyro_vae.models import VAE, DeepMarkovModel, LinearVAE, StateSpaceModel, likelihoods, priors
from pyro_vae.models.transitions import Initial
from pyro_vae.nn import MLP, ConvolutionalDecoder, ConvolutionalEncoder


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], tuple[Any, Any]]
    batch: Callable[[], Tensor]

    def pair(self) -> tuple[Any, Any]:
        """A fresh model and guide, the same at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make()

    def data(self, rows: int = 6) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.batch()[:rows]


def assert_same_sites(model: Any, guide: Any, x: Tensor) -> None:
    """The guide draws the model's latent sites, in their order, shapes, plates and supports."""
    model_trace, guide_trace = (poutine.trace(program).get_trace(x) for program in (model, guide))
    latent = {name: site for name, site in samples(model_trace) if not site["is_observed"]}
    drawn = dict(samples(guide_trace))
    assert list(latent) == list(drawn)
    for name, site in latent.items():
        assert site["value"].shape == drawn[name]["value"].shape
        assert [f.name for f in site["cond_indep_stack"]] == [f.name for f in drawn[name]["cond_indep_stack"]]
        assert bool(site["fn"].support.check(drawn[name]["value"]).all())


def vae(event_shape: tuple[int, ...], encoder: nn.Module | None = None, family: Any = None, **parts: Any) -> Any:
    model = VAE(event_shape, **parts)
    return model, AmortizedGuide(model, encoder=encoder, **({} if family is None else {"family": family}))


def vamp() -> Any:
    prior = priors.VampPrior((4,), 2, small, families.DiagonalNormal(), components=5)
    model = VAE((4,), prior=prior, decoder=small)
    return model, AmortizedGuide(model, encoder=prior.encoder, family=prior.family)


class TwoLevels(priors.Prior):
    """A user's own prior with two sites."""

    one: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(2), persistent=False)

    def forward(self) -> Any:
        top = pyro.sample("top", dist.Gamma(self.one, 1.0).to_event(1))
        return pyro.sample("z", dist.Normal(0 * top, 1 + top).to_event(1))


def mixed() -> tuple[Any, Any]:
    return vae((4,), small, prior=TwoLevels(), decoder=small)


def two_levels() -> Tensor:
    """A user's own prior as a function with two sites."""
    top = pyro.sample("top", dist.Gamma(torch.ones(2), 1.0).to_event(1))
    return pyro.sample("z", dist.Normal(torch.zeros_like(top), 1 + top).to_event(1))


class TwoSites(PyroModule):
    """A user's own model: z_1 ~ N(0, I_2), z_2 | z_1 ~ N(z_1, I_2), x | z_2 ~ N(W z_2, 0.5^2 I_4)."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor | None = None, *, num_data: int | None = None) -> Tensor:
        with pyro.plate("data", num_data if x is None else len(x)):
            one = self.W.new_ones(2)
            first = pyro.sample("first", dist.Normal(0 * one, one).to_event(1))
            second = pyro.sample("second", dist.Normal(first, one).to_event(1))
            return pyro.sample("x", dist.Normal(second @ self.W.mT, 0.5 * one[0]).to_event(1), obs=x)


def two_sites() -> tuple[Any, Any]:
    model = TwoSites()
    return model, AmortizedGuide(model, encoder=MLP((8,)))


class FiveSteps(DeepMarkovModel):
    """Sequences of one length, so that draws are asked for as of any model."""

    def forward(self, x: Tensor | None = None, *, num_data: int | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, num_data=num_data, num_steps=5 if x is None else None)


def five_steps() -> tuple[Any, Any]:
    model = FiveSteps((3,), 2, 5, (4,), likelihood=likelihoods.Normal())
    return model, StateSpaceGuide(model, hidden=4)


class Recurrent(nn.Module):
    """A user's decoder: z starts a recurrent network, whose batch comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.output = nn.GRU(1, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, z: Tensor) -> Tensor:
        steps = z.new_zeros(z.size(0), 4, 1)
        return self.output(self.network(steps, z[None])[0]).view(z.size(0), 1, 4)


class Part(nn.Module):
    """A user's own part of a sequence model, which counts dimensions from the left."""

    def __init__(self, size: int, out: int, scale: float) -> None:
        super().__init__()
        self.network, self.scale = nn.Sequential(nn.Linear(size, 8), nn.GLU(1), nn.Linear(4, 2 * out)), scale

    def forward(self, z: Tensor) -> Any:
        weights, value = self.network(z).view(z.size(0), 2, -1).unbind(1)
        return dist.Normal(weights.softmax(1) * value, self.scale).to_event(1)


class FiveUserSteps(StateSpaceModel):
    """Sequences of one length from parts of a user's own."""

    def __init__(self) -> None:
        super().__init__(Initial(2), Part(2, 2, 0.5), Part(2, 3, 0.3))

    def forward(self, x: Tensor | None = None, *, num_data: int | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, num_data=num_data, num_steps=5 if x is None else None)


def five_user_steps() -> tuple[Any, Any]:
    model = FiveUserSteps()
    return model, StateSpaceGuide(model, hidden=4)


def from_the_left(out: int) -> nn.Module:
    """A user's network of (B, 3) that counts dimensions from the left."""
    return nn.Sequential(nn.Linear(3, 8), nn.GLU(1), nn.Softmax(1), nn.Linear(4, out), nn.Unflatten(1, (1, out)))


def convolutions() -> tuple[Any, Any]:
    """A user's convolutional networks, with batch statistics."""
    decoder = nn.Sequential(
        *(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Unflatten(1, (4, 2, 2)), nn.ConvTranspose2d(4, 3, 2, 2)),
        *(nn.BatchNorm2d(3), nn.ReLU(), nn.ConvTranspose2d(3, 1, 1), nn.Unflatten(1, (1, 1))),
    )
    encoder = nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.Flatten(1), nn.Linear(12, 6), nn.GLU(1))
    return vae((1, 4, 4), encoder, latent_dim=3, decoder=decoder)


class Layer(nn.Module):
    """A user's network between layers of a hierarchical prior: (B, 2) to (B, 2, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 12), nn.GLU(1), nn.Unflatten(1, (2, 3)), nn.Softmax(2))

    def forward(self, z: Tensor) -> Tensor:
        return self.network(z)


def real() -> Tensor:
    return torch.randn(20, 4)


def codes() -> Tensor:
    return torch.randint(0, 3, (20, 4)).float()


def with_gaps() -> Tensor:
    return real().where(torch.rand(20, 4) > 0.2, torch.nan)


small = MLP(hidden=(12,), activation="tanh")
hidden = {"hidden": (16, 16)}

FLOWS = {
    "Planar": families.Planar(2),
    "Radial": families.Radial(2),
    "OrthogonalSylvester": families.OrthogonalSylvester(2, columns=2),
    "HouseholderSylvester": families.HouseholderSylvester(2, reflections=2),
    "TriangularSylvester": families.TriangularSylvester(2),
    "IAF": families.IAF(2, **hidden),
    "MAF": families.MAF(2, **hidden),
    "RealNVP": families.RealNVP(2, **hidden),
    "AutoregressiveSpline": families.AutoregressiveSpline(2, **hidden),
    "CouplingSpline": families.CouplingSpline(2, **hidden),
}
FAMILIES = {
    "DiagonalNormal": families.DiagonalNormal(),
    "MultivariateNormal": families.MultivariateNormal(),
    "LowRankMultivariateNormal": families.LowRankMultivariateNormal(2),
    **FLOWS,
}
DISCRETE = {"Categorical": families.Categorical(), "Bernoulli": families.Bernoulli()}
PRIORS: dict[str, Callable[[], Any]] = {  # of three dimensions, for data of four
    "StandardNormal": lambda: priors.StandardNormal(3),
    "Laplace": lambda: priors.Laplace(3, 2.0, learned=True),
    "Gamma": lambda: priors.Gamma(3, 2.0, 3.0),
    "Dirichlet": lambda: priors.Dirichlet(3, 0.5),
    "Categorical": lambda: priors.Categorical(3, codes=2, learned=True),
    "GaussianMixture": lambda: priors.GaussianMixture(3, 4),
    "full GaussianMixture": lambda: priors.GaussianMixture(3, 4, "full"),
    "VampPrior": lambda: priors.VampPrior((4,), 3, small, families.DiagonalNormal(), 6),
    "Flow": lambda: priors.Flow(3, families.RealNVP(2, (8,))),
    "Hierarchical": lambda: priors.Hierarchical((3, 2), small),
    "Fixed": lambda: priors.Fixed(dist.StudentT(torch.tensor(3.0), torch.zeros(3), 1.0).to_event(1)),
    "function": lambda: two_levels,
}
LIKELIHOODS: dict[str, tuple[likelihoods.Likelihood, Callable[[], Tensor]]] = {
    "Bernoulli": (likelihoods.Bernoulli(), lambda: torch.rand(20, 4).round()),
    "Binomial": (likelihoods.Binomial(16), lambda: torch.randint(0, 17, (20, 4)).float()),
    "ContinuousBernoulli": (likelihoods.ContinuousBernoulli(), lambda: torch.rand(20, 4)),
    "Normal": (likelihoods.Normal(), real),
    "Laplace": (likelihoods.Laplace(), real),
    "StudentT": (likelihoods.StudentT(), real),
    "Categorical": (likelihoods.Categorical(3), codes),
    "Poisson": (likelihoods.Poisson(), codes),
    "NegativeBinomial": (likelihoods.NegativeBinomial(), codes),
    "Missing": (likelihoods.Missing(likelihoods.Normal()), with_gaps),
}
CASES = [
    Case(
        "bernoulli", lambda: vae((1, 4, 4), small, latent_dim=3, decoder=small), lambda: torch.rand(20, 1, 4, 4).round()
    ),
    Case(
        "binomial",
        lambda: vae((5,), small, prior=priors.StandardNormal(2), likelihood=likelihoods.Binomial(16), decoder=small),
        lambda: torch.randint(0, 17, (20, 5)).float(),
    ),
    Case(
        "continuous_bernoulli",
        lambda: vae((5,), small, latent_dim=2, likelihood=likelihoods.ContinuousBernoulli(), decoder=small),
        lambda: torch.rand(20, 5),
    ),
    *(
        Case(
            f"normal_{scale}_{mean}",
            lambda scale=scale, mean=mean: vae(
                (5,), small, latent_dim=2, likelihood=likelihoods.Normal(scale, mean), decoder=small
            ),
            lambda: torch.rand(20, 5),
        )
        for scale, mean in (("shared", "identity"), ("per_dimension", "identity"), ("predicted", "sigmoid"))
    ),
    Case(
        "convolutional",
        lambda: vae(
            (3, 9, 7),
            ConvolutionalEncoder((4, 6), features=10),
            latent_dim=2,
            decoder=ConvolutionalDecoder((6, 4), features=10),
        ),
        lambda: torch.rand(20, 3, 9, 7).round(),
    ),
    Case(
        "linear",
        lambda: (model := LinearVAE((4,), latent_dim=2), AmortizedGuide(model, encoder=nn.Flatten())),
        lambda: torch.randn(20, 4),
    ),
    Case(
        "defaults",
        lambda: (model := VAE((4,), latent_dim=2), AmortizedGuide(model, family=families.DiagonalNormal())),
        lambda: torch.rand(20, 4).round(),
    ),
    Case("sequences", five_steps, lambda: torch.randn(20, 5, 3)),
    Case("sequences_of_user_networks", five_user_steps, lambda: torch.randn(20, 5, 3)),
    Case(
        "decoder_from_the_left",
        lambda: vae((4,), small, latent_dim=3, likelihood=likelihoods.Poisson(), decoder=from_the_left(4)),
        codes,
    ),
    Case("convolutions_with_batch_statistics", convolutions, lambda: torch.rand(20, 1, 4, 4).round()),
    Case(
        "recurrent_decoder", lambda: vae((4,), small, latent_dim=3, decoder=Recurrent()), lambda: codes().clamp(max=1)
    ),
    Case(
        "hierarchical_prior_from_the_left",
        lambda: vae((4,), small, prior=priors.Hierarchical((3, 2), Layer()), decoder=from_the_left(4)),
        lambda: torch.rand(20, 4).round(),
    ),
    Case("two_sites", two_sites, lambda: torch.randn(20, 4)),
    Case("two_site_prior", mixed, lambda: torch.rand(20, 4).round()),
    Case("vamp_prior", vamp, lambda: torch.rand(20, 4).round()),
    *(
        Case(
            f"{name}_prior",
            lambda prior=prior, family=family, likelihood=likelihood: vae(
                (4,), small, family, prior=prior(), likelihood=likelihood, decoder=small
            ),
            batch,
        )
        for name, prior, family, likelihood, batch in (
            ("mixture", lambda: priors.GaussianMixture(3, 4), families.IAF(1, (8,)), likelihoods.Laplace(), real),
            (
                "full_mixture",
                lambda: priors.GaussianMixture(2, 3, "full"),
                families.MultivariateNormal(),
                likelihoods.StudentT(),
                real,
            ),
            (
                "flow",
                lambda: priors.Flow(3, families.RealNVP(2, (8,))),
                families.LowRankMultivariateNormal(1),
                likelihoods.Missing(likelihoods.Normal()),
                with_gaps,
            ),
            ("laplace", lambda: priors.Laplace(2), families.Planar(2), likelihoods.Categorical(3), codes),
            ("gamma", lambda: priors.Gamma(3, 2.0), families.Radial(2), likelihoods.Poisson(), codes),
            (
                "dirichlet",
                lambda: priors.Dirichlet(3, learned=True),
                families.OrthogonalSylvester(1, 2),
                likelihoods.NegativeBinomial(),
                codes,
            ),
            (
                "hierarchical",
                lambda: priors.Hierarchical((3, 2), small),
                families.CouplingSpline(1, (8,)),
                likelihoods.Bernoulli(),
                lambda: torch.rand(20, 4).round(),
            ),
            (
                "categorical",
                lambda: priors.Categorical(3, codes=2),
                families.DiagonalNormal(),
                likelihoods.Bernoulli(),
                lambda: torch.rand(20, 4).round(),
            ),
            (
                "distribution",
                lambda: dist.StudentT(5.0, torch.zeros(3), 1.0).to_event(1),
                families.TriangularSylvester(1),
                likelihoods.Normal(),
                real,
            ),
        )
    ),
]
