"""Structured inference networks for state-space models."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import linear

from ..config import Configured
from ..distributions import MarkovChain
from ..nn import Declared, bind, positive
from ..scan import scan
from ..sequences import Carried, Steps, all_there, steps_of
from .families import DiagonalNormal, Family

__all__ = ["Combiner", "LinearCombiner", "StateSpaceGuide", "TanhCombiner"]

Inference = Literal["MF-L", "MF-R", "MF-LR", "ST-L", "ST-R", "ST-LR"]
CELLS: dict[str, Any] = {
    "rnn": nn.RNNCell,
    "relu_rnn": partial(nn.RNNCell, nonlinearity="relu"),
    "gru": nn.GRUCell,
    "lstm": nn.LSTMCell,
}


class Combiner(Declared):
    """Base: `build` gets the sizes of z_t, of what is read for z_{t-1}, and of each of h; ``forward(z_prev, *h)`` gives
    features of q(z_t | ...), and what is added to its location, or None."""

    def build(self, latent_dim: int, width: int, hidden: int, parts: int) -> None:
        raise NotImplementedError

    def forward(self, z: Tensor, *h: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    num_features: int


class LinearCombiner(Combiner):
    """Features ``tanh(W (z, h) + b)``, and ``V (z, h)`` added to the location: it follows unbounded states.

    Example:
        >>> features, offset = LinearCombiner().bind(2, 2, 8, 1)(torch.zeros(5, 2), torch.zeros(5, 8))
        >>> features.shape, offset.shape
        (torch.Size([5, 8]), torch.Size([5, 2]))
    """

    def build(self, latent_dim: int, width: int, hidden: int, parts: int) -> None:
        self.num_features = hidden
        self.features = nn.Linear(width + parts * hidden, hidden)
        self.offset = nn.Linear(width + parts * hidden, latent_dim, bias=False)

    def forward(self, z: Tensor, *h: Tensor) -> tuple[Tensor, Tensor]:
        v = torch.cat([z, *h], -1)
        return self.features(v).tanh(), self.offset(v)


class TanhCombiner(Combiner):
    """Features ``(tanh(W z + b) + h_left + h_right) / 3``, or ``(tanh(W z + b) + h) / 2`` (arXiv 1609.09869).

    Example:
        >>> TanhCombiner().bind(2, 2, 8, 1)(torch.zeros(5, 2), torch.zeros(5, 8))[0].shape
        torch.Size([5, 8])
    """

    def build(self, latent_dim: int, width: int, hidden: int, parts: int) -> None:
        self.num_features = hidden
        self.of_z = nn.Linear(width, hidden)

    def forward(self, z: Tensor, *h: Tensor) -> tuple[Tensor, None]:
        return (self.of_z(z).tanh() + sum(h)) / (1 + len(h)), None


class StateSpaceGuide(Configured, PyroModule):
    """``q(z | x) = prod_t q(z_t | z_{t-1}, h_t)``, h_t what recurrent networks make of x and u up to t, from t on, or
    both (arXiv 1609.09869).

    Args:
        model: with `latent_dim`, `event_dim` and `num_inputs`, as `StateSpaceModel`; it is not kept, but for its
            transition where that is read.
        inference: MF-L, MF-R, MF-LR: q(z_t | h_t), without z_{t-1}. ST-L, ST-R, ST-LR: with it. L reads the past (a
            filter), R the future (a smoother, as z_{t-1} tells of the past), LR both.
        hidden: the size of h.
        cell: "rnn" (of tanh), "relu_rnn", "gru" or "lstm".
        combiner: what joins z_{t-1} and h_t.
        family: of each step, as ``families.IAF(transforms=1)``.
        missing: "frames": the networks see which steps are observed; "entries": of each value.
        reads_transition: the combiner reads ``E_p[z_t | z_{t-1}, u_t]`` beside z_{t-1}, so that it need not learn what
            the model's transition knows; its parameters are then the guide's, too.

    Raises:
        ValueError: another code or cell; a transition to read without z_{t-1}, or one with feedback.

    Example:
        >>> from pyro_vae.models import StateSpaceModel
        >>> from pyro_vae.models.transitions import Emission, Initial, LinearTransition
        >>> model = StateSpaceModel(Initial(2), LinearTransition(2), Emission(2, 5))
        >>> StateSpaceGuide(model, inference="ST-R")(torch.ones(3, 7, 5)).shape
        torch.Size([3, 7, 2])
    """

    def __init__(
        self,
        model: Any,
        inference: Inference = "ST-LR",
        hidden: int = 64,
        cell: Literal["rnn", "relu_rnn", "gru", "lstm"] = "gru",
        combiner: Combiner | None = None,
        family: Family | None = None,
        missing: Literal["frames", "entries"] = "frames",
        reads_transition: bool = False,
    ) -> None:
        super().__init__()
        structure, _, directions = inference.partition("-")
        if structure not in ("MF", "ST") or directions not in ("L", "R", "LR"):
            raise ValueError(f"expected inference MF-L, MF-R, MF-LR, ST-L, ST-R or ST-LR, got {inference!r}")
        for name, value, known in (("cell", cell, CELLS), ("missing", missing, ("frames", "entries"))):
            if value not in known:
                raise ValueError(f"expected {name} to be one of {', '.join(known)}, got {value!r}")
        self.structured, self.missing = structure == "ST", missing
        scaled = getattr(model, "scaled", None)
        self._scaled = scaled if callable(scaled) else None
        feedback = bool(getattr(model, "feedback", 0))
        if reads_transition and (not self.structured or feedback):
            raise ValueError(
                f"expected ST-L, ST-R or ST-LR and a model without feedback beside reads_transition, got {inference}: "
                "leave it out"
            )
        self.transition = model.transition if reads_transition else None
        self.num_read = model.num_inputs if reads_transition else 0
        D, Z, hidden = model.event_dim, model.latent_dim, positive("hidden", hidden)
        width = D + model.num_inputs + (D if missing == "entries" else 1)
        self.cells = nn.ModuleDict({direction: CELLS[cell](width, hidden) for direction in directions})
        self.num_states = 2 if cell == "lstm" else 1
        features = hidden * len(directions)
        if self.structured:
            combiner = LinearCombiner() if combiner is None else combiner
            self.combiner = bind(combiner, Z, 2 * Z if reads_transition else Z, hidden, len(directions))
            features = self.combiner.num_features
            self.before = nn.Parameter(torch.zeros(Z))
        self.family = bind(DiagonalNormal() if family is None else family, features, (Z,))
        self.to(next((p.dtype for p in model.parameters()), torch.get_default_dtype()))

    @property
    def causal(self) -> bool:
        """Whether q(z_t | ...) sees nothing after x_t: it is a filter."""
        return "R" not in self.cells

    def forward(
        self,
        x: Tensor,
        u: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        carried: Carried | None = None,
    ) -> Tensor:
        steps = steps_of(x, lengths, mask)
        parts = [self.encoded(steps, u, direction, carried) for direction in self.cells]
        if self.num_read:
            parts.append(cast(Tensor, steps.inputs(u)).to(parts[0].dtype))
        h = torch.cat(parts, -1)
        before = self.before.expand(len(x), -1) if self.structured else None
        if self.structured and carried is not None:
            before = carried.z
        with pyro.plate("data", len(x)):
            return pyro.sample("z", MarkovChain(self.step(before, h[:, 0]), self.step, h.shape[1], h, steps.there))

    @torch.no_grad()
    def after(
        self,
        x: Tensor,
        u: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        carried: Carried | None = None,
    ) -> Carried:
        """What goes on to the window after x: ``model(next, carried=...)``, and the guide alike. z is drawn.

        Networks that read backwards begin at the end of each window. Without `lengths` all steps are there.
        """
        lengths = all_there(x, lengths, mask)
        steps, rows = steps_of(x, lengths, mask), torch.arange(len(x), device=x.device)
        with poutine.block():
            z = self(x, u, lengths=lengths, mask=mask, carried=carried)
        h = self._encode(steps, u, "L", carried)[0] if "L" in self.cells else ()
        return Carried(z[rows, steps.last], steps.seen[rows, steps.last], h)

    def step(self, z: Tensor | None, h: Tensor) -> dist.Distribution:
        """``q(z_t | z_{t-1}, h_t)``; u_t follows h_t where the transition is read."""
        if z is None:
            return self.family(h)
        shape = torch.broadcast_shapes(z.shape[:-1], h.shape[:-1])
        h = h.expand(*shape, -1)
        if not self.structured:
            return self.family(h)
        z = z.expand(*shape, -1)
        if self.transition is not None:
            h, *u = h.split([h.shape[-1] - self.num_read, self.num_read], -1) if self.num_read else (h,)
            z = torch.cat([z, self.transition(z, *u).mean], -1)
        features, offset = self.combiner(z, *h.chunk(len(self.cells), -1))
        q = self.family(features)
        return q if offset is None else _shifted(q, offset)

    def encoded(self, steps: Steps, u: Tensor | None, direction: str, carried: Carried | None = None) -> Tensor:
        """(B, T, hidden): of steps up to each ("L") or from each on ("R")."""
        return self._encode(steps, u, direction, carried)[1]

    def _encode(
        self, steps: Steps, u: Tensor | None, direction: str, carried: Carried | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The network's state at the end, and `encoded`."""
        dtype = next(self.cells.parameters()).dtype
        x, observed, u = steps.seen.to(dtype), steps.counted, None if u is None else steps.inputs(u.to(dtype))
        x = x if self._scaled is None else self._scaled(x)
        seen = observed if self.missing == "entries" else observed.any(-1, keepdim=True)
        parts = [x, seen.to(x.dtype)] if u is None else [x, u, seen.to(x.dtype)]
        inputs = torch.cat(parts, -1).movedim(1, 0)
        there = torch.ones_like(inputs[..., :1], dtype=torch.bool)
        if steps.there is not None:
            there = steps.there.movedim(1, 0)[..., None]
        if direction == "R":
            inputs, there = inputs.flip(0), there.flip(0)
        cell: Any = self.cells[direction]

        def step(state: Any, at: Any) -> tuple[Any, Tensor]:
            given, alive = at
            new = _next(cell, given, state)
            new = tuple(torch.where(alive, a, b) for a, b in zip(new, state, strict=True))
            return new, new[0]

        start = (inputs.new_zeros(inputs.shape[1], cell.hidden_size),) * self.num_states
        if direction == "L" and carried is not None:
            start = carried.h
        state, h = scan(step, start, (linear(inputs, cell.weight_ih, cell.bias_ih), there))
        return state, (h.flip(0) if direction == "R" else h).movedim(0, 1)


def _next(cell: Any, given: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The cell's state after inputs whose linear map is `given`, which is one product for all steps."""
    h = linear(state[0], cell.weight_hh, cell.bias_hh)
    if isinstance(cell, nn.GRUCell):
        (r, z, n), (of_r, of_z, of_n) = given.chunk(3, -1), h.chunk(3, -1)
        z = (z + of_z).sigmoid()
        return ((1 - z) * (n + (r + of_r).sigmoid() * of_n).tanh() + z * state[0],)
    if isinstance(cell, nn.LSTMCell):
        i, f, g, o = (given + h).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    return ((given + h).relu() if cell.nonlinearity == "relu" else (given + h).tanh(),)


def _shifted(q: Any, offset: Tensor) -> Any:
    """The distribution of z + offset."""
    if q.support.is_discrete:
        raise ValueError(
            f"expected a family over real numbers beside LinearCombiner, got {type(q).__name__}: use TanhCombiner"
        )
    if isinstance(q, torch.distributions.Independent) and isinstance(q.base_dist, torch.distributions.Normal):
        return dist.Normal(q.base_dist.loc + offset, q.base_dist.scale).to_event(1)
    if isinstance(q, torch.distributions.MultivariateNormal):
        return dist.MultivariateNormal(q.loc + offset, scale_tril=q.scale_tril)
    shift = torch.distributions.AffineTransform(offset, 1.0, event_dim=1, cache_size=1)
    return dist.TransformedDistribution(q, [shift])
