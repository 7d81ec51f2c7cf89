"""Priors p(z): modules whose forward returns a distribution over one datum's latent variable.

A prior of your own is any callable of no arguments that returns a distribution with an empty batch shape, or a Pyro
function with sample statements that returns what the decoder is fed.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Sequence
from typing import Any, Literal, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..config import Configured
from ..distributions import continuous, discrete, folded
from ..nn import MLP, bind, positive

__all__ = [
    "Categorical",
    "Dirichlet",
    "Fixed",
    "Flow",
    "Gamma",
    "GaussianMixture",
    "Hierarchical",
    "Laplace",
    "Prior",
    "StandardNormal",
    "VampPrior",
]


class Prior(Configured, nn.Module):
    """Base of priors: ``forward() -> p(z)`` with an empty batch shape."""

    def forward(self) -> dist.Distribution:
        raise NotImplementedError


class Fixed(Prior):
    """A distribution object as a prior: its tensors are buffers, so that they move and are saved with the model.

    Example:
        >>> Fixed(dist.Laplace(torch.zeros(3), 1.0).to_event(1))().event_shape
        torch.Size([3])
    """

    def __init__(self, distribution: dist.Distribution) -> None:
        super().__init__()
        if distribution.batch_shape:
            raise ValueError(
                f"expected a prior for one datum, got one with batch shape {tuple(distribution.batch_shape)}: "
                "call .to_event() on it"
            )
        self.skeleton, tensors = _taken_apart(distribution)
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"tensor{i}", tensor.detach().clone(memory_format=torch.contiguous_format))

    def forward(self) -> dist.Distribution:
        return _put_together(self.skeleton, list(self.buffers()))


def _taken_apart(value: Any) -> tuple[bytes, list[Tensor]]:
    """An object without its tensors, and these."""
    file, tensors = io.BytesIO(), list[Tensor]()

    class Pickler(pickle.Pickler):
        def persistent_id(self, part: Any) -> int | None:
            if not isinstance(part, Tensor):
                return None
            tensors.append(part)
            return len(tensors) - 1

    Pickler(file).dump(value)
    return file.getvalue(), tensors


def _put_together(skeleton: bytes, tensors: Sequence[Tensor]) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, index: int) -> Tensor:
            return tensors[index]

    return Unpickler(io.BytesIO(skeleton)).load()


class StandardNormal(Prior):
    r"""``p(z) = N(z; 0, I)``.

    Example:
        >>> StandardNormal(3)().event_shape
        torch.Size([3])
    """

    location: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.register_buffer("location", torch.zeros(positive("latent_dim", latent_dim)), persistent=False)

    def forward(self) -> dist.Distribution:
        return dist.Normal(self.location, torch.ones_like(self.location)).to_event(1)


class _Positive(Prior):
    """Base of priors with positive parameters of shape `latent_dim`, kept as logarithms, learned or fixed."""

    def __init__(self, latent_dim: int, learned: bool, **parameters: float) -> None:
        super().__init__()
        self.rounded_off: dict[str, float] = {}
        for name, value in parameters.items():
            if not value > 0:
                raise ValueError(f"expected {name} > 0, got {value}: give a positive number")
            log = torch.full((positive("latent_dim", latent_dim),), math.log(value))
            if learned:
                self.register_parameter(f"log_{name}", nn.Parameter(log))
            else:
                self.register_buffer(f"log_{name}", log)
            # a million has no logarithm in float32 that leads back to it
            rounded = float(torch.tensor(math.log(value), device="cpu"))
            self.rounded_off[name] = 0.0 if learned else math.log(value) - rounded

    def logarithm(self, name: str) -> Tensor:
        """In float64, that of the number given to rounding."""
        return getattr(self, f"log_{name}").double() + self.rounded_off[name]


class Laplace(_Positive):
    """``p(z) = prod_d exp(-|z_d| / b_d) / (2 b_d)``: few dimensions far from 0.

    Example:
        >>> Laplace(3)().event_shape
        torch.Size([3])
    """

    log_scale: Tensor

    def __init__(self, latent_dim: int, scale: float = 1.0, learned: bool = False) -> None:
        super().__init__(latent_dim, learned, scale=scale)

    def forward(self) -> dist.Distribution:
        return continuous.Laplace(torch.zeros_like(self.log_scale), self.log_scale).to_event(1)


class Gamma(_Positive):
    """``p(z) = prod_d r_d^{a_d} z_d^{a_d - 1} exp(-r_d z_d) / Gamma(a_d)`` for z > 0.

    Example:
        >>> bool((Gamma(3)().sample() > 0).all())
        True
    """

    log_rate: Tensor

    def __init__(self, latent_dim: int, concentration: float = 1.0, rate: float = 1.0, learned: bool = False) -> None:
        super().__init__(latent_dim, learned, concentration=concentration, rate=rate)

    def forward(self) -> dist.Distribution:
        logarithms = self.logarithm("concentration"), self.logarithm("rate")
        return continuous.Gamma(*logarithms, dtype=self.log_rate.dtype).to_event(1)


class Dirichlet(_Positive):
    """``p(z) proportional to prod_d z_d^{a_d - 1}`` for z >= 0 with sum 1: proportions of topics.

    Example:
        >>> bool(Dirichlet(3)().sample().sum().isclose(torch.tensor(1.0)))
        True
    """

    log_concentration: Tensor

    def __init__(self, latent_dim: int, concentration: float = 1.0, learned: bool = False) -> None:
        super().__init__(latent_dim, learned, concentration=concentration)

    def forward(self) -> dist.Distribution:
        return continuous.Dirichlet(self.logarithm("concentration"), dtype=self.log_concentration.dtype)


class Categorical(Prior):
    """One-hot z over `categories`, uniform or with learned probabilities; several `codes` at once make z
    ``(codes, categories)``.

    Example:
        >>> Categorical(5)().sample().sum()
        tensor(1.)
    """

    logits: Tensor

    def __init__(self, categories: int, codes: int | None = None, learned: bool = False) -> None:
        super().__init__()
        shape = (*([] if codes is None else [positive("codes", codes)]), positive("categories", categories))
        if learned:
            self.logits = nn.Parameter(torch.zeros(shape))
        else:
            self.register_buffer("logits", torch.zeros(shape), persistent=False)

    def forward(self) -> dist.Distribution:
        return dist.OneHotCategorical(logits=self.logits.log_softmax(-1)).to_event(self.logits.dim() - 1)


class GaussianMixture(Prior):
    """``p(z) = sum_k w_k N(z; m_k, S_k)`` with diagonal or full S_k, learned with the model or fitted afterwards.

    Example:
        >>> GaussianMixture(3, components=5)().event_shape
        torch.Size([3])
    """

    def __init__(
        self, latent_dim: int, components: int = 10, covariance: Literal["diagonal", "full"] = "diagonal"
    ) -> None:
        super().__init__()
        if covariance not in ("diagonal", "full"):
            raise ValueError(f"expected covariance to be diagonal or full, got {covariance!r}")
        K, D = positive("components", components), positive("latent_dim", latent_dim)
        self.logits = nn.Parameter(torch.zeros(K))
        self.locations = nn.Parameter(torch.randn(K, D))
        self.log_scales = nn.Parameter(torch.zeros(K, D))
        self.triangles = nn.Parameter(torch.zeros(K, D, D)) if covariance == "full" else None

    def forward(self) -> dist.Distribution:
        return dist.MixtureSameFamily(discrete.Categorical(self.logits), self.components())

    def components(self) -> dist.Distribution:
        """The Gaussians, batch shape ``(K,)``."""
        if self.triangles is None:
            return continuous.Normal(self.locations, self.log_scales).to_event(1)
        L = self.triangles.tril(-1) + self.log_scales.exp().diag_embed()
        return dist.MultivariateNormal(self.locations, scale_tril=L)

    def responsibilities(self, z: Tensor) -> Tensor:
        """``p(k | z)``, shape ``(*batch, K)``: which cluster a code belongs to.

        Example:
            >>> GaussianMixture(3, components=5).responsibilities(torch.zeros(7, 3)).shape
            torch.Size([7, 5])
        """
        return (self.logits.log_softmax(-1) + self.components().log_prob(z[..., None, :])).softmax(-1)

    @classmethod
    def fitted(
        cls, z: Tensor, components: int = 10, covariance: Literal["diagonal", "full"] = "full", seed: int = 0
    ) -> Self:
        """The mixture of most likelihood for draws z, shape ``(N, D)``, of an aggregate posterior: ex-post density
        estimation (arXiv 1903.12436). Put it in the place of ``model.prior``.

        Example:
            >>> GaussianMixture.fitted(torch.randn(100, 3), components=2)().event_shape
            torch.Size([3])
        """
        from sklearn.mixture import GaussianMixture as Fit

        prior = cls(z.shape[1], components, covariance).to(z)
        fit = Fit(components, covariance_type=covariance[:4], random_state=seed).fit(z.detach().cpu().double().numpy())
        with torch.no_grad():
            prior.logits.copy_(torch.from_numpy(fit.weights_).log())
            prior.locations.copy_(torch.from_numpy(fit.means_))
            if prior.triangles is None:
                prior.log_scales.copy_(torch.from_numpy(fit.covariances_).log() / 2)
            else:
                L = torch.linalg.cholesky(torch.from_numpy(fit.covariances_))
                prior.log_scales.copy_(L.diagonal(dim1=-2, dim2=-1).log())
                prior.triangles.copy_(L)
        return prior


class VampPrior(Prior):
    """``p(z) = 1/K sum_k q(z | u_k)`` with learned pseudo-inputs u_k (arXiv 1705.07120).

    q is the guide's: hand it over, ``AmortizedGuide(model, encoder=prior.encoder, family=prior.family)``.

    Args:
        event_shape: of a datum.
        encoder: from a datum to features, as the guide takes it.
        family: from features to q(z | u), as the guide takes it.
        components: K.

    Example:
        >>> from pyro_vae.guides import families
        >>> VampPrior((1, 8, 8), 4, MLP((16,)), families.DiagonalNormal(), components=10)().event_shape
        torch.Size([4])
    """

    def __init__(
        self, event_shape: Sequence[int], latent_dim: int, encoder: nn.Module, family: nn.Module, components: int = 500
    ) -> None:
        super().__init__()
        self.inputs = nn.Parameter(torch.rand(positive("components", components), *event_shape))
        self.encoder = bind(encoder, event_shape)
        with torch.no_grad():
            features = self.encoder(self.inputs).shape[-1]
        self.family = bind(family, features, (positive("latent_dim", latent_dim),))
        self.init_args |= {"encoder": self.encoder, "family": self.family}  # a guide's configuration refers to these
        self.register_buffer("logits", torch.zeros(components), persistent=False)

    logits: Tensor

    def forward(self) -> dist.Distribution:
        return dist.MixtureSameFamily(
            discrete.Categorical(self.logits), self.family(self.encoder(self.inputs)), validate_args=False
        )

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start from data, shape ``(N, *event_shape)``, with zeros in the place of NaN, as for the guide's encoder, and
        on its scale: ``model.scaled(x)``.

        Raises:
            ValueError: fewer data than components.
        """
        if len(x) < len(self.inputs):
            raise ValueError(f"expected at least {len(self.inputs)} data, one for each component, got {len(x)}")
        self.inputs.copy_(x[torch.randperm(len(x), device=x.device)[: len(self.inputs)]].nan_to_num(0.0))


class Flow(Prior):
    """``z = f^{-1}(z_0)``, ``z_0 ~ base``: any flow family, without features, in the direction in which a score takes
    one pass (a draw of an autoregressive one takes a pass for each dimension).

    Example:
        >>> from pyro_vae.guides import families
        >>> Flow(3, families.RealNVP(transforms=4, hidden=(16,)))().event_shape
        torch.Size([3])
    """

    def __init__(self, latent_dim: int, flow: nn.Module) -> None:
        super().__init__()
        self.flow = bind(flow, 0, (positive("latent_dim", latent_dim),))

    def forward(self) -> dist.Distribution:
        return self.flow.inverse()


class Hierarchical(Prior):
    """Layers from the top down: ``z_L ~ N(0, I)``, ``z_l | z_{l+1} ~ N(m_l(z_{l+1}), diag s_l(z_{l+1})^2)``.

    Sites ``"z_L"`` to ``"z_1"``; the decoder is fed z_1. `latent_dims` are the sizes of z_1 to z_L.

    Example:
        >>> Hierarchical((8, 4))().shape
        torch.Size([8])
    """

    def __init__(self, latent_dims: Sequence[int], network: nn.Module = MLP()) -> None:  # noqa: B008  a declaration
        super().__init__()
        if len(latent_dims) < 2:
            raise ValueError(f"expected two or more latent_dims, got {list(latent_dims)}: StandardNormal has one layer")
        sizes = [positive("latent_dims", size) for size in latent_dims]
        self.top = StandardNormal(sizes[-1])
        pairs = zip(sizes[1:], sizes, strict=False)
        self.networks = nn.ModuleList(bind(network, (above,), (2, below)) for above, below in pairs)

    def forward(self) -> Any:
        z = pyro.sample(f"z_{len(self.networks) + 1}", self.top())
        for level in reversed(range(len(self.networks))):
            location, log_scale = folded(self.networks[level], z).unbind(-2)
            z = pyro.sample(f"z_{level + 1}", continuous.Normal(location, log_scale).to_event(1))
        return z
