"""A Markov chain as one distribution over all its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints, kl_divergence, register_kl
from torch.utils import _pytree as pytree

from ..scan import scan

__all__ = ["MarkovChain", "check_masks", "is_masked"]


class MarkovChain(dist.TorchDistribution):
    r"""``p(z_1, ..., z_T) = p(z_1) prod_{t > 1} p(z_t | z_{t-1}, u_t)``, one event of shape (T, *Z).

    A draw is made step by step; a value is scored by one call of `transition` for all steps; a chain's own draw, by
    the passes that made it. The divergence from another chain is estimated along this chain's draw by divergences of
    single steps in closed form::

        KL(q(z_1) || p(z_1)) + sum_{t > 1} KL(q(z_t | z_{t-1}) || p(z_t | z_{t-1})),    z ~ q

    Args:
        initial: p(z_1), a distribution over events of shape Z.
        transition: ``transition(z_prev, u_t)``, without inputs ``transition(z_prev)``, returns p(z_t | z_{t-1}, u_t).
            It gets (N, *Z) and (N, C), N = draws x data, and in a score x steps.
        num_steps: T.
        inputs: (*batch, T, C); the first step's belongs to `initial`, and is not read.
        mask: (*batch, T), False at steps that are not there: they count nothing.
        carry: what a recurrent transition remembers, a tree of tensors (*batch, size) at z_1: such a one is called with
            it, (N, size), as last argument, returns ``(distribution, carry)``, and is scored step by step.

    Raises:
        ValueError: no steps, or inputs or a mask for another number of them.

    Example:
        >>> first = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> chain = MarkovChain(first, lambda z: dist.Normal(z, 0.1).to_event(1), num_steps=7)
        >>> z = chain.sample(torch.Size([5]))
        >>> z.shape, chain.log_prob(z).shape
        (torch.Size([5, 7, 2]), torch.Size([5]))
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self,
        initial: Any,
        transition: Callable[..., Any],
        num_steps: int,
        inputs: Tensor | None = None,
        mask: Tensor | None = None,
        carry: Any = None,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"expected num_steps >= 1, got {num_steps}: a chain has a first step")
        for name, given, dims in (("inputs", inputs, 2), ("a mask", mask, 1)):
            if given is not None and (given.dim() < dims or given.shape[-dims] != num_steps):
                raise ValueError(
                    f"expected {name} for {num_steps} steps, got shape {tuple(given.shape)}: time is dimension -{dims}"
                )
        self.initial, self.transition, self.num_steps = initial, transition, num_steps
        self.inputs, self.mask_, self.carry = inputs, mask, carry
        self._draw: tuple[Tensor, Tensor, bool] | None = None  # with its steps' scores, and if these have gradients
        shapes = [initial.batch_shape]
        shapes += [inputs.shape[:-2]] if inputs is not None else []
        shapes += [mask.shape[:-1]] if mask is not None else []
        event_shape = torch.Size([num_steps]) + initial.event_shape
        super().__init__(torch.broadcast_shapes(*shapes), event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return self.initial.has_rsample

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> Any:
        return constraints.independent(self.initial.support, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MarkovChain:
        wider = MarkovChain(self.initial, self.transition, self.num_steps, self.inputs, self.mask_, self.carry)
        if self.batch_shape == torch.Size(batch_shape):
            wider._draw = self._draw
        wider._batch_shape = torch.Size(batch_shape)
        return wider

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        shape = torch.Size(sample_shape) + self.batch_shape
        first = self.initial.expand(shape)
        z = _drawn(first)
        log_first = first.log_prob(z)
        if self.num_steps == 1:
            path, each = z[None], log_first[None]
        else:

            def step(state: Any, u: Tensor) -> tuple[Any, tuple[Tensor, Tensor]]:
                p, carry = self._next(state[0], u, state[1])
                if self.has_rsample and not p.has_rsample:
                    raise ValueError(
                        f"expected reparameterised steps, as the first one is, got {type(p).__name__}: a chain has "
                        "one kind of gradient"
                    )
                z = _drawn(p)
                return (z, carry), (z, p.log_prob(z))

            start = z.reshape(shape.numel(), *self.initial.event_shape), self._carry(shape)
            _, (later, log_later) = scan(step, start, self._inputs(shape, z))
            path = torch.cat([z[None], later.reshape(self.num_steps - 1, *z.shape)])
            each = torch.cat([log_first[None], log_later.reshape(self.num_steps - 1, *shape)])
        path = path.movedim(0, len(shape))
        self._draw = path, each.movedim(0, -1), torch.is_grad_enabled()
        return path

    def log_prob(self, value: Tensor) -> Tensor:
        drawn, each = self._own_draw()
        if drawn is not value or each is None:
            each = self.log_prob_of_steps(value)
        if self.mask_ is not None:
            each = torch.where(self.mask_, each, 0.0)
        return each.sum(-1)

    def _own_draw(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The last draw and its steps' scores, if they have the gradients that are asked for."""
        if self._draw is None or (torch.is_grad_enabled() and not self._draw[2]):
            return None, None
        return self._draw[:2]

    def log_prob_of_steps(self, value: Tensor) -> Tensor:
        """``ln p(z_t | z_{t-1}, u_t)`` of each step, (*batch, T), masked ones too."""
        if value.shape[-len(self.event_shape) :] != self.event_shape:
            raise ValueError(f"expected a path of shape (..., {self.event_shape}), got {tuple(value.shape)}")
        first, later = self._steps(value, lambda p, z: p.log_prob(z))
        first = first[..., None]
        return first if later is None else torch.cat([first.expand_as(later[..., :1]), later], -1)

    def _steps(self, value: Tensor, score: Callable[[Any, Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
        """`score` of the first step, and of all later ones with time as last dimension."""
        time = value.dim() - len(self.event_shape)
        z = value.select(time, 0)
        first = score(self.initial, z)
        if self.num_steps == 1:
            return first, None
        if self.carry is None:
            p, after, shape = self._later(value)
            return first, score(p, after).reshape(shape)
        shape, after = value.shape[:time], value.narrow(time, 1, self.num_steps - 1).movedim(time, 0)

        def step(state: Any, at: tuple[Tensor, Tensor]) -> tuple[Any, Tensor]:
            u, z = at
            p, carry = self._next(state[0], u, state[1])
            return (z, carry), score(p, z)

        start = z.reshape(shape.numel(), *self.initial.event_shape), self._carry(shape)
        after = after.reshape(self.num_steps - 1, *start[0].shape)
        _, later = scan(step, start, (self._inputs(shape, z), after))
        return first, later.reshape(self.num_steps - 1, *shape).movedim(0, -1)

    def _later(self, value: Tensor) -> tuple[Any, Tensor, torch.Size]:
        """The distributions of all steps but the first as one batch, the steps of `value` for them, (N, *Z), and what
        N is: (*batch, T - 1)."""
        time, steps = value.dim() - len(self.event_shape), self.num_steps - 1
        batch, u = value.shape[:time], None
        if self.inputs is not None:
            batch = torch.broadcast_shapes(batch, self.inputs.shape[:-2])
            value = value.expand(batch + value.shape[time:])
            u = self.inputs[..., 1:, :].expand(batch + (steps, -1)).flatten(0, len(batch))
        time, N = len(batch), batch.numel() * steps
        before, after = (value.narrow(time, at, steps).reshape(N, *self.initial.event_shape) for at in (0, 1))
        return self._next(before, u, None)[0], after, batch + (steps,)

    def _next(self, z: Tensor, u: Tensor | None, carry: Any) -> tuple[Any, Any]:
        """The distribution of the step after z (N, *Z), of batch shape (N,), and the carry."""
        given = (z,) if self.inputs is None or u is None else (z, u)
        p, carry = (self.transition(*given), ()) if self.carry is None else self.transition(*given, carry)
        return (p if p.batch_shape == z.shape[:1] else p.expand(z.shape[:1])), carry

    def _carry(self, shape: torch.Size) -> Any:
        """(N, size) of each tensor."""
        tree = () if self.carry is None else self.carry
        return pytree.tree_map(lambda c: c.expand(shape + c.shape[-1:]).reshape(-1, c.shape[-1]), tree)

    def _inputs(self, shape: torch.Size, like: Tensor) -> Tensor:
        """u_2 ... u_T, (T - 1, N, C)."""
        if self.inputs is None:
            return like.new_zeros(self.num_steps - 1, 0)
        u = self.inputs[..., 1:, :]
        return u.expand(shape + u.shape[-2:]).movedim(-2, 0).reshape(self.num_steps - 1, shape.numel(), u.shape[-1])


def check_masks(name: str, p: Mapping[str, Any], q: Mapping[str, Any]) -> None:
    """Raise where one of a latent site's two forms leaves out steps of a chain, and the other counts them."""
    for one, its, other, site in (("model", p, "guide", q), ("guide", q, "model", p)):
        if getattr(its["fn"], "mask_", None) is not None and not is_masked(site):
            raise ValueError(
                f'expected latent site "{name}" masked in model and guide alike, got steps that are not there in the '
                f"{one} alone: give the {other}'s MarkovChain that mask, or its distribution by .mask()"
            )


def is_masked(site: Mapping[str, Any]) -> bool:
    """Whether parts of a sample site count nothing: by a mask of its chain, by ``.mask()`` or by `poutine.mask`."""
    p = site["fn"]
    while p is not None:
        if isinstance(p, dist.MaskedDistribution) or getattr(p, "mask_", None) is not None:
            return True
        p = getattr(p, "base_dist", None)
    return site["mask"] is not None and site["mask"] is not True


def _drawn(p: Any) -> Tensor:
    return p.rsample() if p.has_rsample else p.sample()


@register_kl(MarkovChain, MarkovChain)
def _kl_of_chains(q: MarkovChain, p: MarkovChain) -> Tensor:
    """Along the draw of q; unbiased. NaN where one chain has a step that the other has not: no divergence is defined,
    and to raise an error the masks would have to be read at each call."""
    if q.carry is not None or p.carry is not None:
        raise NotImplementedError("the steps of a recurrent chain are not known apart from its carry")
    if not q.has_rsample:
        raise NotImplementedError("without a path to differentiate, the divergence lacks the score of its draw")
    z, _ = q._own_draw()
    z = q.rsample() if z is None else z
    first = kl_divergence(q.initial, p.initial)
    if q.num_steps > 1:
        batch = torch.broadcast_shapes(q.batch_shape, p.batch_shape, z.shape[: z.dim() - len(q.event_shape)])
        z = z.expand(batch + q.event_shape)
        (of_q, _, shape), (of_p, _, _) = q._later(z), p._later(z)
        later = kl_divergence(of_q, of_p).reshape(shape)
        each = torch.cat([first[..., None].expand_as(later[..., :1]), later], -1)
    else:
        each = first[..., None].expand(q.batch_shape + (1,))
    of_q, of_p = (True if mask is None else mask for mask in (q.mask_, p.mask_))
    if of_q is True and of_p is True:
        return each.sum(-1)
    of_q, of_p = (torch.as_tensor(mask, device=each.device) for mask in (of_q, of_p))
    return torch.where(of_q == of_p, torch.where(of_q, each, 0.0), math.nan).sum(-1)
