"""State-space models: latent Markov chains that emit sequences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.nn import PyroModule
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from ..config import Configured
from ..distributions import MarkovChain, WithMissing, check_masks, folded
from ..draws import DrawsPlate, are_joint
from ..nn import MLP, positive
from ..sequences import Carried, Steps, all_there, steps_of
from .likelihoods import Likelihood
from .transitions import Emission, FirstStep, GatedTransition, Initial

__all__ = ["DeepMarkovModel", "Filtered", "StateSpaceModel"]

MAX_ELEMENTS = 4_000_000  # of draws that are held at once


class Filtered(NamedTuple):
    """What a particle filter tells of B sequences of T steps by K particles.

    Attributes:
        z: (K, B, T, Z), particles of each step given x up to and with it; log_weights: (K, B, T), normalised.
        predicted: (B, T, D), E[x_t | x_<t]; NaN where the emission has no mean.
        per_step: (B, T), ln p(x_t | x_<t) in nats, 0 at steps without observations.
        ess: (B, T), effective numbers of particles, before resampling.
    """

    z: Tensor
    log_weights: Tensor
    predicted: Tensor
    per_step: Tensor
    ess: Tensor

    @property
    def log_evidence(self) -> Tensor:
        """(B,), ln p(x) in nats: its exponential is unbiased."""
        return self.per_step.sum(-1)

    @property
    def mean(self) -> Tensor:
        """(B, T, Z), E[z_t | x_<=t]."""
        return (self.log_weights.exp()[..., None] * self.z).sum(0)


class StateSpaceModel(Configured, PyroModule):
    """A latent chain that emits a sequence, for each of B data::

        z_1 ~ initial(u_1),  z_t ~ transition(z_{t-1}, u_t),  x_t ~ emission(z_t, u_t)

    Sites ``"z"``, (B, T, Z), and ``"x"``, (B, T, D), in the plate ``"data"``. The arguments are modules that return
    distributions of batch shape (N,). They get tensors (N, ...), N = draws x data x steps, without u where there are no
    inputs: a part of one step may count dimensions from the left, as PyTorch's modules do.

    Args:
        num_inputs: C, how many numbers u_t holds.
        feedback: D, to make it autoregressive: for u_t the parts get ``(x_{t-1}, u_t)``, D + C numbers, 0 in the place
            of x_0 and of what is not observed. 0: they do not.

    Args of a call:
        x: (B, T, D), or None: then sequences are drawn, `num_data` of `num_steps`, with inputs as many as these.
        u: (B, T, C), inputs; u_t acts on the step that produces z_t.
        lengths: (B,), how many steps of each sequence are there; mask: (B, T) or (B, T, D), what of them is observed
            (arXiv 1609.09869 leaves out the same way). What x holds elsewhere changes nothing.
        carried: where x goes on a series, what came before it: then ``z_1 ~ transition(carried.z, u_1)``.

    Example:
        >>> model = StateSpaceModel(Initial(2), GatedTransition(2), Emission(2, 5))
        >>> model(num_data=3, num_steps=7).shape
        torch.Size([3, 7, 5])
    """

    def __init__(
        self,
        initial: Callable[..., dist.Distribution],
        transition: Callable[..., dist.Distribution],
        emission: Callable[..., dist.Distribution],
        num_inputs: int = 0,
        feedback: int = 0,
    ) -> None:
        super().__init__()
        self.initial, self.transition, self.emission = initial, transition, emission
        self.num_inputs, self.feedback = num_inputs, feedback
        v = (torch.zeros(1, num_inputs + feedback),) if num_inputs + feedback else ()
        with torch.no_grad():
            first = initial(*v)
            self.latent_dim = first.event_shape[-1]
            self.event_dim = emission(torch.zeros(1, self.latent_dim), *v).event_shape[-1]
        if feedback not in (0, self.event_dim):
            raise ValueError(f"expected feedback to be 0 or {self.event_dim}, the numbers of an x_t, got {feedback}")

    def forward(
        self,
        x: Tensor | None = None,
        u: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        carried: Carried | None = None,
        num_data: int | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        self._check(x, u, num_data, num_steps)
        if x is None:
            B, T = (num_data, num_steps) if u is None else (u.shape[0] if num_data is None else num_data, u.shape[1])
            return self._generated(int(B), int(T), u if u is None else u.expand(B, -1, -1))  # type: ignore[arg-type]
        (B, T, _), steps = x.shape, steps_of(x, lengths, mask)
        v = self._inputs(steps, u, carried)
        with pyro.plate("data", B):
            initial = self.initial(*_at(v, 0)) if carried is None else self.transition(carried.z, *_at(v, 0))
            z = pyro.sample("z", MarkovChain(initial, self.transition, T, v, steps.there))
            p, observed = self._emitted(z, *_beside(z, v)), steps.observed
            x = steps.x
            if observed is not None and observed.dim() == 3:
                x, p = torch.where(observed, x, torch.nan), WithMissing(p)
            elif observed is not None:
                p = p.mask(observed)
            return pyro.sample("x", p.to_event(1), obs=x)

    def _emitted(self, z: Tensor, *inputs: Tensor) -> Any:
        """p(x_t | z_t, u_t) of whole sequences z (..., B, T, Z)."""
        return folded(self.emission, z, *inputs, data_dims=2)

    @property
    def scaled(self) -> Callable[[Tensor], Tensor] | None:
        """What brings data to the scale that a guide's networks are best fed: the likelihood's, if there is one."""
        return getattr(getattr(self.emission, "likelihood", None), "scaled", None)

    def _inputs(self, steps: Steps, u: Tensor | None, carried: Carried | None = None) -> Tensor | None:
        """What the parts get at each step beside z, (B, T, D + C)."""
        dtype = next(iter([*self.parameters(), *self.buffers()]), torch.empty(0)).dtype
        u = None if u is None else steps.inputs(u.to(dtype))
        if not self.feedback:
            return u
        x = steps.seen.to(dtype)
        first = torch.zeros_like(x[:, :1]) if carried is None else carried.x[:, None].to(dtype)
        before = torch.cat([first, x[:, :-1]], 1)
        return before if u is None else torch.cat([before, u], -1)

    def _next(self, x: Tensor, u: Tensor | None) -> tuple[Tensor, ...]:
        """What the parts get beside z at the step after x (..., D)."""
        parts = [x] if self.feedback else []
        if u is not None:
            parts.append(u.to(x.dtype).expand(*x.shape[:-1], -1))
        return (torch.cat(parts, -1),) if parts else ()

    def _generated(self, B: int, T: int, u: Tensor | None) -> Tensor:
        """Draws: where x_{t-1} acts on z_t, those of x are made beside those of z."""
        like = next(iter([*self.parameters(), *self.buffers()]), torch.zeros(())).detach()
        none = like.new_zeros(B, self.event_dim)
        u = like.new_zeros(B, T, 0) if u is None else u
        drawn: list[Tensor] = []
        turns = itertools.cycle(range(T - 1))  # a path that is scored again has the x that it was drawn with

        def transition(z: Tensor, both: Tensor, x: Tensor) -> tuple[Any, Tensor]:
            """From x_{t-2}, u_{t-1} and u_t."""
            before, now = (each if self.num_inputs else None for each in both.chunk(2, -1))
            turn = next(turns)
            if turn == len(drawn):
                drawn.append(self.emission(z, *self._next(x, before)).sample())
            return self.transition(z, *self._next(drawn[turn], now)), drawn[turn]

        with pyro.plate("data", B):
            initial = self.initial(*self._next(none, u[:, 0] if self.num_inputs else None))
            if not self.feedback:
                z = pyro.sample("z", MarkovChain(initial, self.transition, T, u if self.num_inputs else None))
                return pyro.sample("x", self._emitted(z, *_beside(z, u if self.num_inputs else None)).to_event(1))
            both = torch.cat([torch.cat([u[:, :1], u[:, :-1]], 1), u], -1)
            z = pyro.sample("z", MarkovChain(initial, transition, T, both, carry=none))
            if len(drawn) != T - 1:
                raise ValueError('expected site "z" to be drawn with "x", got a value: pass x too, as it acts on z')
            one = z.shape[:-2] + none.shape[-1:]
            before = torch.stack([none.expand(one), *(x.reshape(one) for x in drawn)], -2)
            p = self._emitted(z, *self._next(before, u if self.num_inputs else None))
            x = torch.cat([before[..., 1:, :], p.sample()[..., -1:, :]], -2)
            with poutine.block():
                own = poutine.trace(lambda: pyro.sample("x", dist.Delta(x, event_dim=2))).get_trace()
            with poutine.replay(trace=own):
                return pyro.sample("x", p.to_event(1))

    @torch.no_grad()
    def filter(
        self,
        x: Tensor,
        u: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        num_particles: int = 1000,
    ) -> Filtered:
        """A particle filter that proposes from the transition (Gordon et al. 1993)::

            z_t^k ~ p(z_t | z_{t-1}^k),  w_t^k = w_{t-1}^k p(x_t | z_t^k)

        Particles are drawn anew, by systematic resampling, where their effective number is below half of them. Where
        none could have given x_t, its log-density is -inf and all weigh alike again. Without inputs from the future
        nothing of the future is used; its cost is `num_particles` times that of a draw. Without `lengths` all steps of
        x are there, the last ones too where they are not observed.

        Example:
            >>> model = StateSpaceModel(Initial(2), GatedTransition(2), Emission(2, 5))
            >>> model.filter(torch.ones(3, 7, 5), num_particles=20).log_evidence.shape
            torch.Size([3])
        """
        self._check(x, u, None, None)
        K, (B, T, _) = positive("num_particles", num_particles), x.shape
        steps = steps_of(x, all_there(x, lengths, mask), mask)
        v = self._inputs(steps, u)
        equal = -math.log(K)
        found: list[tuple[Tensor, ...]] = []
        z = self.initial(*_at(v, 0)).expand([K, B]).sample()
        log_w, unknown = z.new_full((K, B), equal), z.new_full((B, self.event_dim), torch.nan)
        for t in range(T):
            inputs = _beside(z, None if v is None else v[:, t])
            z = folded(self.transition, z, *inputs).sample() if t else z
            emission = folded(self.emission, z, *inputs)
            mean = _mean(emission)
            predicted = unknown if mean is None else (log_w.exp()[..., None] * mean).sum(0)
            log_p = self._observed(emission, steps, t)
            per_step = (log_w + log_p).logsumexp(0)
            log_w = torch.where(per_step.isneginf(), equal, log_w + log_p - per_step)
            ess = (-(2 * log_w).logsumexp(0)).exp()
            found.append((z, log_w, predicted, per_step, ess))
            ancestors = torch.where(ess < K / 2, _systematic(log_w), torch.arange(K, device=x.device)[:, None])
            z = z.gather(0, ancestors[..., None].expand_as(z))
            log_w = torch.where(ess < K / 2, equal, log_w)
        z, log_w, predicted, per_step, ess = (torch.stack(each, -1) for each in zip(*found, strict=True))
        return Filtered(z.mT, log_w, predicted.mT, per_step, ess)

    @torch.no_grad()
    def smooth(
        self,
        guide: Callable,
        x: Tensor,
        *args: Tensor,
        num_samples: int = 100,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Draws of q(z | x), (S, B, T, Z), with the guide's other arguments, such as u.

        Without `lengths` all steps of x are there, the last ones too where they are not observed.
        """
        kwargs |= _options(all_there(x, lengths, mask), mask)
        S = positive("num_samples", num_samples)
        at_once = S if S == 1 or are_joint([guide], (x, *args), kwargs) else 1
        draws = []
        for _ in range(S // at_once):
            with DrawsPlate(at_once, nesting=1, within=None):
                z = poutine.trace(guide).get_trace(x, *args, **kwargs).nodes["z"]["value"]
            draws.append(z.expand(at_once, *z.shape[-3:]))
        return torch.cat(draws)

    @torch.no_grad()
    def log_evidence(
        self,
        x: Tensor,
        u: Tensor | None = None,
        *,
        guide: Callable | None = None,
        num_samples: int = 1000,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """``ln p(x)``, (B,) nats, a lower bound in expectation: by K draws of a guide, by a particle filter without::

            ln 1/K sum_k p(x, z_k) / q(z_k | x)

        Masks count, scales of sites do not. Its exponential is unbiased. Draws of whole sequences serve as long as the
        guide is good; where sequences are long the filter's particles, which are drawn anew on the way, are the better
        ones.

        Raises:
            ValueError: a guide with latent sites beside z, or that counts steps which are not there.

        Example:
            >>> model = StateSpaceModel(Initial(2), GatedTransition(2), Emission(2, 5))
            >>> model.log_evidence(torch.ones(3, 7, 5), num_samples=20).shape
            torch.Size([3])
        """
        if guide is None:
            most = max(1, MAX_ELEMENTS // max(1, num_samples * x.shape[1] * max(self.event_dim, self.latent_dim)))
            given = {name: each for name, each in (("u", u), *_options(lengths, mask).items()) if each is not None}
            parts = zip(x.split(most), *(each.split(most) for each in given.values()), strict=True)
            of_rows = (dict(zip(("x", *given), part, strict=True)) for part in parts)
            return torch.cat([self.filter(**rows, num_particles=num_samples).log_evidence for rows in of_rows])
        args, kwargs = _given(x, u), _options(lengths, mask)
        most = max(1, MAX_ELEMENTS // max(1, x[..., 0].numel() * max(self.event_dim, self.latent_dim)))
        most = most if positive("num_samples", num_samples) == 1 or are_joint([guide, self], args, kwargs) else 1
        log_weights = []
        for K in torch.arange(num_samples).split(most):
            with DrawsPlate(len(K), nesting=1, within=None):
                q = poutine.trace(guide).get_trace(*args, **kwargs)
                p = poutine.trace(poutine.replay(self, trace=q)).get_trace(*args, **kwargs)
            _check_guide(p, q)
            of_sites = [_log_prob(site) for site in (p.nodes["z"], p.nodes["x"], q.nodes["z"])]
            log_weights.append((of_sites[0] + of_sites[1] - of_sites[2]).expand(len(K), len(x)))
        return torch.cat(log_weights).logsumexp(0) - math.log(num_samples)

    @torch.no_grad()
    def forecast(
        self,
        guide: Callable,
        x: Tensor,
        u: Tensor | None = None,
        u_future: Tensor | None = None,
        *,
        num_steps: int | None = None,
        num_samples: int = 100,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Draws of what follows x, (S, B, H, D): z at the last step by the guide, then the model's own steps.

        Without `lengths` all steps of x are there, the last ones too where they are not observed.

        Args:
            u_future: (B, H, C), inputs from the first step after x on; num_steps: H, where there are none.

        Example:
            >>> from pyro_vae.guides import StateSpaceGuide
            >>> model = StateSpaceModel(Initial(2), GatedTransition(2), Emission(2, 5))
            >>> model.forecast(StateSpaceGuide(model), torch.ones(3, 7, 5), num_steps=4, num_samples=10).shape
            torch.Size([10, 3, 4, 5])
        """
        self._check(x, u, None, None)
        if (u_future is None) == bool(self.num_inputs) or (u_future is None) == (num_steps is None):
            raise ValueError(
                f"expected {'u_future' if self.num_inputs else 'num_steps'} and it alone, for a model of "
                f"{self.num_inputs} inputs: as many steps are drawn"
            )
        if u_future is not None and (u_future.dim() != 3 or u_future.shape[::2] != (len(x), self.num_inputs)):
            raise ValueError(
                f"expected u_future of shape ({len(x)}, H, {self.num_inputs}), got {tuple(u_future.shape)}: inputs of "
                "each step to come"
            )
        H = positive("num_steps", num_steps if u_future is None else u_future.shape[1])  # type: ignore[arg-type]
        lengths = all_there(x, lengths, mask)
        if lengths is not None and bool((lengths < 1).any()):
            raise ValueError(
                f"expected lengths from 1 to {x.shape[1]}, got {lengths.tolist()}: a forecast goes on from x"
            )
        z = self.smooth(guide, *_given(x, u), num_samples=num_samples, **_options(lengths, mask))
        steps, rows = steps_of(x, lengths, mask), torch.arange(len(x), device=x.device)
        z, latest = z[:, rows, steps.last], steps.seen[rows, steps.last].to(z.dtype).expand(num_samples, -1, -1)
        found = []
        for t in range(H):
            inputs = self._next(latest, None if u_future is None else u_future[:, t])
            z = folded(self.transition, z, *inputs).sample()
            latest = folded(self.emission, z, *inputs).sample()
            found.append(latest)
        return torch.stack(found, 2)

    @torch.no_grad()
    def predict_one_step(
        self,
        guide: Callable,
        x: Tensor,
        u: Tensor | None = None,
        *,
        num_samples: int = 100,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Draws of each x_t given the steps before it, (S, B, T, D); of x_1 by the model alone.

        z_{t-1} is drawn by the guide. One that says of itself that it is `causal` is run once; another is run on the
        steps before each t, at a cost of T^2.

        Example:
            >>> from pyro_vae.guides import StateSpaceGuide
            >>> model = StateSpaceModel(Initial(2), GatedTransition(2), Emission(2, 5))
            >>> guide = StateSpaceGuide(model, "ST-L")
            >>> model.predict_one_step(guide, torch.ones(3, 7, 5), num_samples=10).shape
            torch.Size([10, 3, 7, 5])
        """
        self._check(x, u, None, None)
        S, (B, T, _) = positive("num_samples", num_samples), x.shape
        lengths = all_there(x, lengths, mask)
        v = self._inputs(steps_of(x, lengths, mask), u)
        if getattr(guide, "causal", False):
            z = self.smooth(guide, *_given(x, u), num_samples=S, **_options(lengths, mask)).unbind(2)
        else:
            found = []
            for t in range(1, T):
                ends = torch.full((B,), t, device=x.device) if lengths is None else lengths.clamp(max=t)
                options = _options(ends, None if mask is None else mask[:, :t])
                parts = _given(x[:, :t], None if u is None else u[:, :t])
                found.append(self.smooth(guide, *parts, num_samples=S, **options)[:, :, -1])
            z = tuple(found)
        given = [None] * T if v is None else v.unbind(1)
        states = [self.initial(*_at(v, 0)).expand([S, B]).sample()]
        after = zip(z, given[1:], strict=False)
        states += [folded(self.transition, z_t, *_beside(z_t, v_t)).sample() for z_t, v_t in after]
        at = zip(states, given, strict=True)
        drawn = [folded(self.emission, z_t, *_beside(z_t, v_t)).sample() for z_t, v_t in at]
        return torch.stack(drawn, 2)

    @torch.no_grad()
    def impute(
        self,
        guide: Callable,
        x: Tensor,
        u: Tensor | None = None,
        *,
        mask: Tensor,
        lengths: Tensor | None = None,
        num_samples: int = 100,
    ) -> Tensor:
        """Draws (S, B, T, D) of x where it is not observed or NaN, by the guide and the emission; x elsewhere.

        A Gaussian emission whose values are correlated given z is conditioned on the observed values of its step.
        Without `lengths` all steps are there, the last ones too where they are not observed.

        Raises:
            ValueError: steps that are observed in part, under another emission that does not factorise.
        """
        lengths = all_there(x, lengths, mask)
        z = self.smooth(guide, *_given(x, u), num_samples=num_samples, mask=mask, lengths=lengths)
        v = self._inputs(steps_of(x, lengths, mask), u)
        seen = (mask.bool() if mask.dim() == 3 else mask.bool()[..., None]) & (x == x)
        return torch.where(seen, x, _sample_given(self._emitted(z, *_beside(z, v)), x, seen))

    def prediction_error(
        self,
        z: Tensor,
        x: Tensor,
        u: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        carried: Carried | None = None,
    ) -> Tensor:
        """``sum_{t > 1} |x_t - E[x_t | z_t = E[z_t | z_{t-1}]]|^2`` of what is observed, (..., B).

        z is (..., B, T, Z), the other arguments are the model's own. What is carried foretells the first step, too.

        Raises:
            ValueError: an emission without a mean.
        """
        steps = steps_of(x, lengths, mask)
        v = self._inputs(steps, u, carried)
        begin, before = 1, z[..., :-1, :]
        if carried is not None:
            begin, before = 0, torch.cat([carried.z.expand(*z.shape[:-2], -1)[..., None, :], before], -2)
        inputs = _beside(before, None if v is None else v[:, begin:])
        foretold = folded(self.transition, before, *inputs, data_dims=2).mean
        predicted = _mean(self._emitted(foretold, *inputs))
        if predicted is None:
            raise ValueError("expected an emission with a mean, got one without: its errors of prediction are unknown")
        squares = (steps.seen[:, begin:] - predicted).square()
        return torch.where(steps.counted[:, begin:], squares, 0.0).sum((-2, -1))

    def _observed(self, emission: Any, steps: Steps, t: int) -> Tensor:
        """``ln p(x_t | z_t)`` of what is observed, (K, B)."""
        x, observed = steps.x[:, t], steps.observed
        if observed is None:
            return emission.log_prob(x)
        if observed.dim() == 3:
            return WithMissing(emission).log_prob(torch.where(observed[:, t], x, torch.nan))
        return torch.where(observed[:, t], emission.log_prob(x), 0.0)

    def _check(self, x: Tensor | None, u: Tensor | None, num_data: int | None, num_steps: int | None) -> None:
        if (u is not None) != bool(self.num_inputs):
            came = "none" if u is None else f"some of shape {tuple(u.shape)}"
            raise ValueError(f"expected {self.num_inputs} inputs at each step, got {came}: see num_inputs of the model")
        if x is None and u is None and (num_data is None or num_steps is None):
            raise ValueError("expected data x, or num_data=... and num_steps=..., got neither: how much is to be drawn")
        if x is not None and (num_data, num_steps) != (None, None):
            raise ValueError("expected x, or num_data and num_steps, got both: leave one out")
        if (
            x is None
            and u is not None
            and (num_steps is not None or (num_data is not None and len(u) not in (1, num_data)))
        ):
            raise ValueError(
                f"expected num_data beside u of one row for all, and no num_steps, got num_data={num_data}, "
                f"num_steps={num_steps} and u of shape {tuple(u.shape)}"
            )
        if x is not None and (x.dim() != 3 or x.shape[1] < 1 or x.shape[2] != self.event_dim):
            raise ValueError(
                f"expected x of shape (B, T, {self.event_dim}), got {tuple(x.shape)}: see the model's parts"
            )
        if u is not None and (
            u.dim() != 3 or u.shape[2] != self.num_inputs or (x is not None and x.shape[:2] != u.shape[:2])
        ):
            steps = "B, T" if x is None else f"{x.shape[0]}, {x.shape[1]}"
            raise ValueError(f"expected inputs u of shape ({steps}, {self.num_inputs}), got {tuple(u.shape)}")


class DeepMarkovModel(StateSpaceModel):
    """The deep Markov model of arXiv 1609.09869: a gated transition, a network from z_t to the likelihood of x_t.

    Args:
        event_shape: (D,), of one step.
        start: "normal": z_1 ~ N(0, I), as in the paper; "transition": ``z_1 ~ p(z_1 | z_0)`` with z_0 a parameter, as
            in Pyro's tutorial of this model.
        autoregressive: x_{t-1} acts on z_t and x_t, too.

    Example:
        >>> DeepMarkovModel((88,), latent_dim=10, transition_hidden=20)(num_data=3, num_steps=7).shape
        torch.Size([3, 7, 88])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        latent_dim: int = 100,
        transition_hidden: int = 200,
        emission_hidden: Sequence[int] = (100, 100),
        start: Literal["normal", "transition"] = "normal",
        likelihood: Likelihood | None = None,
        num_inputs: int = 0,
        autoregressive: bool = False,
    ) -> None:
        if len(event_shape) != 1 or start not in ("normal", "transition"):
            raise ValueError(
                f"expected event_shape (D,) of one step and start 'normal' or 'transition', got {tuple(event_shape)} "
                f"and {start!r}"
            )
        (D,) = event_shape
        C = num_inputs + (D if autoregressive else 0)
        transition = GatedTransition(positive("latent_dim", latent_dim), transition_hidden, C)
        initial = Initial(latent_dim, scale=1.0, learned_mean=False)
        emission = Emission(latent_dim, D, likelihood, MLP(hidden=emission_hidden), C)
        super().__init__(
            FirstStep(transition, latent_dim) if start == "transition" else initial,
            transition,
            emission,
            num_inputs,
            D if autoregressive else 0,
        )


def _given(x: Tensor, u: Tensor | None) -> tuple[Tensor, ...]:
    return (x,) if u is None else (x, u)


def _options(lengths: Tensor | None, mask: Tensor | None) -> dict[str, Tensor]:
    return {name: value for name, value in (("lengths", lengths), ("mask", mask)) if value is not None}


def _at(v: Tensor | None, t: int) -> tuple[Tensor, ...]:
    return () if v is None else (v[:, t],)


def _beside(z: Tensor, v: Tensor | None) -> tuple[Tensor, ...]:
    """What the parts get beside z, of its batch shape."""
    return () if v is None else (v.expand(*z.shape[:-1], -1),)


def _mean(emission: Any) -> Tensor | None:
    try:
        return emission.mean
    except NotImplementedError:
        return None


def _sample_given(emission: Any, x: Tensor, seen: Tensor) -> Tensor:
    """Draws of the dimensions that are not seen given those that are, and anything in the place of these.

    With ``y ~ N(m, S)``, and o for what is seen, ``y + S_o S_oo^{-1} (x_o - y_o)`` is a draw given x_o.
    """
    drawn = emission.sample()
    if not bool((seen.any(-1) & ~seen.all(-1)).any()):
        return drawn
    if not isinstance(emission, torch.distributions.MultivariateNormal | torch.distributions.LowRankMultivariateNormal):
        WithMissing(emission)
        return drawn
    kept = seen.to(drawn.dtype)
    covariance = emission.covariance_matrix
    of_seen = covariance * kept[..., None] * kept[..., None, :] + (1 - kept).diag_embed()  # the identity elsewhere
    missed = torch.where(seen, x - drawn, 0.0)
    solved = torch.cholesky_solve(missed[..., None], torch.linalg.cholesky(of_seen))
    return drawn + (covariance @ solved).squeeze(-1)


def _log_prob(site: Any) -> Tensor:
    """Masked and not scaled."""
    return scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])


def _check_guide(p: poutine.Trace, q: poutine.Trace) -> None:
    if others := [name for name in prune_subsample_sites(q).stochastic_nodes if name != "z"]:
        raise ValueError(
            f'expected a guide with the latent site "z" alone, got {others} beside: use pyro_vae.evaluate, which '
            "counts all sites"
        )
    check_masks("z", p.nodes["z"], q.nodes["z"])


def _systematic(log_w: Tensor) -> Tensor:
    """Ancestors (K, B) for normalised log-weights (K, B): K points, equally spaced from a random start."""
    K, B = log_w.shape
    start = torch.rand(B, dtype=log_w.dtype, device=log_w.device).double()
    points = (start[:, None] + torch.arange(K, device=log_w.device)) / K
    ends = log_w.double().exp().cumsum(0).mT.contiguous()
    return torch.searchsorted(ends / ends[:, -1:], points.contiguous(), right=True).clamp(max=K - 1).mT
