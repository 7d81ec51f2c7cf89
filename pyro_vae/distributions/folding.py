"""Draws, data and steps folded into one batch around networks that take ``(B, ...)``, as PyTorch's do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from .missing import WithMissing

__all__ = ["Unfolded", "folded", "mixes_rows", "unfolded"]

SAME = (
    ("logits", "probs"),
    ("gate_logits", "gate"),
    ("scale_tril", "precision_matrix", "covariance_matrix"),
)  # of these one is enough
LIBRARIES = ("torch.", "pyro.", "pyro_vae.")


def folded(network: Callable[..., Any], *inputs: Tensor, event_dim: int = 1, data_dims: int = 1) -> Any:
    """``network(*inputs)`` with all dimensions left of the events as one: the network gets ``(N, *event)``.

    A network written for ``(B, *event)`` counts its dimensions from the left, as ``nn.Softmax(1)`` and convolutions do.
    Draws that come as ``(K, B, *event)`` reach it as ``(K B, *event)``, and its result is ``(K, B, ...)`` again. Where
    batch statistics mix the rows of a call, each draw has a call of its own, in order.

    Args:
        network: of tensors ``(N, *event)``, one for each of `inputs`, to a tensor ``(N, ...)`` or to a distribution of
            batch shape ``(N,)``.
        inputs: tensors ``(*batch, *event)`` whose batches broadcast.
        event_dim: number of dimensions of an event.
        data_dims: how many dimensions of the batch, from the right, belong to one draw.

    Returns:
        The network's result, of the batch shape of the inputs.

    Raises:
        ValueError: the network returns another number of rows than it gets.

    Example:
        >>> z = torch.randn(7, 5, 3)
        >>> folded(nn.Softmax(1), z).sum(-1).allclose(torch.ones(7, 5))
        True
    """
    batch = torch.broadcast_shapes(*(x.shape[: x.dim() - event_dim] for x in inputs))
    inputs = tuple(x.expand(*batch, *x.shape[x.dim() - event_dim :]) for x in inputs)
    if len(batch) == 1:
        return network(*inputs)
    if len(batch) > data_dims and mixes_rows(network):
        each = [folded(network, *x, event_dim=event_dim, data_dims=data_dims) for x in zip(*inputs, strict=True)]
        return _stacked(each)
    N = batch.numel()
    result = network(*(x.reshape(N, *x.shape[len(batch) :]) for x in inputs))
    rows = result.shape if isinstance(result, Tensor) else result.batch_shape
    if rows[:1] not in ((N,), (1,), ()):
        raise ValueError(
            f"expected a network that returns a row for each of the {N} rows it gets, got {tuple(rows)}: let it keep "
            "dimension 0"
        )
    if rows[:1] != (N,):
        result = result.expand(torch.Size([N]) + rows[1:])
    return result.reshape(batch + rows[1:]) if isinstance(result, Tensor) else unfolded(result, batch)


def mixes_rows(*programs: Any) -> bool:
    """Whether batch statistics make one row's result depend on the others.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        >>> mixes_rows(net), mixes_rows(net.eval())
        (True, False)
    """
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
        for program in programs
        if isinstance(program, nn.Module)
        for module in program.modules()
    )


def unfolded(p: Any, batch: torch.Size) -> Any:
    """The distribution p, whose batch shape begins with N, with `batch` of N elements in the place of N.

    Distributions of torch, Pyro and this library that are told by tensors alone stay of their class, so that closed
    forms are known of them; others become `Unfolded`.
    """
    if isinstance(p, torch.distributions.Independent):
        return unfolded(p.base_dist, batch).to_event(p.reinterpreted_batch_ndims)
    if isinstance(p, WithMissing):
        return WithMissing(unfolded(p.base, batch))
    rebuilt = _rebuilt([p], lambda tensors: tensors[0].reshape(batch + tensors[0].shape[1:]))
    if rebuilt is not None and (rebuilt.batch_shape, rebuilt.event_shape) != (batch + p.batch_shape[1:], p.event_shape):
        rebuilt = None
    return Unfolded(p, batch) if rebuilt is None else rebuilt


def _stacked(results: Sequence[Any]) -> Any:
    """Tensors, or distributions, as one with a further dimension on the left."""
    if isinstance(results[0], Tensor):
        return torch.stack([*results])
    rebuilt = _rebuilt(results, torch.stack)
    if rebuilt is None:
        raise ValueError(
            f"expected one draw in a call of a network with batch statistics in training mode that returns a "
            f"{type(results[0]).__name__}, got {len(results)}: use vectorize_particles=False"
        )
    return rebuilt


def _rebuilt(distributions: Sequence[Any], combined: Callable[[list[Tensor]], Tensor]) -> Any:
    """A distribution of the class of those given from their parameters `combined`; None for a class that is told by
    more than tensors, one for each element of a batch."""
    p = distributions[0]
    if isinstance(p, torch.distributions.Independent):
        base = _rebuilt([each.base_dist for each in distributions], combined)
        return None if base is None else base.to_event(p.reinterpreted_batch_ndims)
    names = [name for name in inspect.signature(type(p)).parameters if name != "validate_args"]
    if not type(p).__module__.startswith(LIBRARIES) or not {*names} <= {*p.arg_constraints}:
        return None
    for alike in SAME:
        known = [name for name in alike if name in vars(p)]  # the one that was given stands before those made from it
        known.sort(key=lambda name: getattr(p, name) is not getattr(p, "_param", None))
        names = [name for name in names if name not in alike or name in known[:1]]
    try:
        parts = {name: [getattr(each, name) for each in distributions] for name in names}
        if not all(isinstance(t, Tensor) and t.shape[:1] == p.batch_shape[:1] for each in parts.values() for t in each):
            return None
        return type(p)(**{name: combined(tensors) for name, tensors in parts.items()}, validate_args=False)
    except (AttributeError, TypeError, ValueError):  # it is told otherwise than by what it names
        return None


class Unfolded(dist.TorchDistribution):
    """A distribution one of whose batch dimensions, of N elements, becomes several dimensions of N elements in all.

    Args:
        folded: a distribution.
        batch: dimensions of N elements.
        dim: which dimension of the batch shape of `folded` they take the place of.

    Example:
        >>> p = Unfolded(dist.Normal(torch.arange(6.0), 1.0), torch.Size([2, 3]))
        >>> p.batch_shape, p.log_prob(p.mean).shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, folded: Any, batch: torch.Size, dim: int = 0) -> None:
        self.folded, self.batch, self.dim = folded, torch.Size(batch), dim
        shape = folded.batch_shape
        super().__init__(shape[:dim] + self.batch + shape[dim + 1 :], folded.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return self.folded.has_rsample

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        return self.folded.support

    @property
    def mean(self) -> Tensor:
        return self._unfolded(self.folded.mean, 0)

    @property
    def variance(self) -> Tensor:
        return self._unfolded(self.folded.variance, 0)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Unfolded:
        batch_shape = torch.Size(batch_shape)
        own = batch_shape[len(batch_shape) - len(self.batch_shape) :]
        if own != self.batch_shape:
            raise NotImplementedError(f"expected batch dimensions {tuple(self.batch_shape)} as they are, got {own}")
        more = batch_shape[: len(batch_shape) - len(own)]
        return Unfolded(self.folded.expand(more + self.folded.batch_shape), self.batch, len(more) + self.dim)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self._unfolded(self.folded.sample(torch.Size(sample_shape)), len(sample_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self._unfolded(self.folded.rsample(torch.Size(sample_shape)), len(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        shape = self.batch_shape + self.event_shape
        value = value.expand(torch.broadcast_shapes(value.shape, shape))
        samples = value.dim() - len(shape)
        first, last = samples + self.dim, samples + self.dim + len(self.batch)
        value = value.reshape(value.shape[:first] + (self.batch.numel(),) + value.shape[last:])
        return self._unfolded(self.folded.log_prob(value), samples)

    def _unfolded(self, value: Tensor, samples: int) -> Tensor:
        at = samples + self.dim
        return value.reshape(value.shape[:at] + self.batch + value.shape[at + 1 :])
