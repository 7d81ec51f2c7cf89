"""Annealed importance sampling: log p(x) by chains along a path of densities, from p(z) or q(z | x) to p(x, z)."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions.constraints import MixtureSameFamilyConstraint

from .compiled import Compiled, preserved
from .data import Data, as_data
from .distributions import Remembered
from .draws import DRAWS, difference, log_prob_of, warn_of
from .evaluation import MAX_ELEMENTS, Estimate, check_support, generalized_pareto_shape, isolated, plate_of_pair
from .log_weights import on_plates, per_datum, plate_of_data, samples, structure_of
from .nn import positive
from .progress import Bar

__all__ = ["Annealed", "AnnealingWarning", "Sandwich", "annealed", "sandwich"]

TARGET = 0.65  # rate of acceptance, about the best for HMC (arXiv 1001.4460)
JITTER = 0.2  # of the step size, against trajectories that come back to where they began
GAIN = 0.5  # of the logarithm of the step size, for each move and unit of the rate
PILOT_MOVES = 50  # at least
FIRST_MOVES = 20  # of the pilot, at the first temperature, where it knows nothing
WORTH_COMPILING = 5_000  # calls
ROUNDING = 1e-6  # of an estimate, in float32
TAIL = 64  # chains from which on their weights' tail has a shape that can be fitted
SEEDS = 1_000_003  # between the random streams of a check's chains
PERIODIC = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)

Density = Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor]]
Batch = tuple[Sequence[Any], Mapping[str, Any]]


class AnnealingWarning(UserWarning):
    """Too few temperatures: half as many move the estimate by more than its error, or the chains' weights differ by
    more than their number makes up for."""


@dataclass(frozen=True)
class Annealed:
    """Annealed importance sampling of N data; `float()` gives the estimate's value.

    Attributes:
        log_evidence: mean over data of `per_datum`, with standard errors over data and, apart, over chains.
        per_datum: ``log 1/K sum_k exp(log_weight_k)``, (N,), nats.
        log_weight: of each of the K chains, (K, N): ``E[exp(log_weight)] = p(x)`` exactly.
        acceptance: mean rate of acceptance of the HMC moves, aimed at 0.65.
        halved: the estimate by as many chains at every other temperature; None for one temperature.
        change: log_evidence - halved, with its standard errors. E of both is below log p(x), and the distance falls
            with the temperatures: where it is far from 0, neither is near. None for one temperature.
        log_weight_variance: Var(ln w) over chains, the mean over data; log_evidence is near log p(x) where it is small.
        ess: effective sample size of the K chains, 1 to K, the mean over data.
        khat: shape of the tail of the chains' weights, as in `evaluate`; NaN for fewer than 64 chains.
    """

    log_evidence: Estimate
    per_datum: Tensor
    log_weight: Tensor
    acceptance: float
    num_chains: int
    num_temperatures: int
    halved: Estimate | None
    change: Estimate | None
    log_weight_variance: float
    ess: float
    khat: float

    def __float__(self) -> float:
        return self.log_evidence.value

    @property
    def moved(self) -> bool:
        """Whether half as many temperatures move the estimate by more than twice the standard error of the change."""
        if self.change is None:
            return False
        error = self.change.standard_error_draws
        error = 2 * (self.change.standard_error if math.isnan(error) else error)
        return self.change.value > max(error, ROUNDING * (1 + abs(float(self))))

    @property
    def too_few(self) -> bool:
        """Whether there are too few temperatures to trust the estimate: it has moved, or ``Var(ln w) > 2 ln K``.

        The mean of K weights is near its expectation from about ``exp KL`` draws on (arXiv 1511.01437), and the
        divergence is Var(ln w) / 2 where ln w is normal.
        """
        return self.moved or self.log_weight_variance > 2 * math.log(self.num_chains)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the mean of log p(x) of these data lies as far as can be told, from the estimate less 2 standard errors
        over chains to the estimate and as many, and above it the more of ``E ln w + Var(ln w) / 2``, which log p(x) is
        where ln w is normal, and of twice the change where the estimate has moved.
        """
        value, error = self.log_evidence.value, self.log_evidence.standard_error_draws
        error = 0.0 if math.isnan(error) else error
        above = 2 * self.change.value if self.change is not None and self.moved else 0.0
        if self.num_chains > 1:
            above = max(above, self.log_weight.mean().item() + self.log_weight_variance / 2 - value)
        return value - 2 * error, value + 2 * error + above

    @property
    def notes(self) -> list[str]:
        """What the chains tell of the estimate, a sentence each."""
        said = [
            f"annealed by {self.num_chains} chains of {self.num_temperatures:,} temperatures: Var(ln w) "
            f"{self.log_weight_variance:.2f}, ess {self.ess:.1f}"
        ]
        if self.change is not None:
            error = self.change.standard_error_draws
            said[0] += f"; half the temperatures give {self.change.value:.2f} less"
            said[0] += "" if math.isnan(error) else f", with an error of {error:.2f}"
        if self.too_few:
            said.append(
                f"too few temperatures: log p(x) may be anything up to {self.interval[1]:.2f}; take "
                f"{2 * self.num_temperatures:,} or more, or start from a guide"
            )
        if self.khat > 0.7:
            said.append(
                f"khat of the chains is {self.khat:.2f}, above 0.7: few of them carry the weight, and log p(x) may lie "
                "well above the estimate; more temperatures help"
            )
        return said

    def __str__(self) -> str:
        return "\n".join([str(self.log_evidence), *self.notes])


@dataclass(frozen=True)
class Sandwich:
    """``E[lower] <= E[log p(x)] <= E[upper]`` for data of the model's own.

    Attributes:
        lower, upper: means over data, with standard errors over data and, apart, over chains (those of `upper` start at
            one exact draw each, and the error is that given these draws).
        gap: upper - lower for the same data, whose scatter cancels: in expectation the most by which either is wrong.
        per_datum: lower and upper, (2, N), nats.
        acceptance: mean rate of acceptance of the HMC moves.
        log_weight_variance: Var(ln w) over the chains of each direction, the means over data.
        ess: effective sample sizes of the K chains of each, 1 to K, the means over data.
    """

    lower: Estimate
    upper: Estimate
    gap: Estimate
    per_datum: Tensor
    acceptance: float
    num_chains: int
    num_temperatures: int
    log_weight_variance: tuple[float, float]
    ess: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.lower} to {self.upper}"


def annealed(
    model: Callable,
    data: Any,
    *,
    guide: Callable | None = None,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    leapfrog_steps: int = 10,
    seed: int = 0,
    progress: bool = True,
    compile: bool | None = None,
) -> Annealed:
    r"""``log p(x)`` by annealed importance sampling (arXiv physics/9803008; for decoders 1611.04273), nats per datum.

    ``log w = sum_{k=1..T} (t_k - t_{k-1}) log [p(x, z_{k-1}) / q_0(z_{k-1})]``, ``z_0 ~ q_0``, and z_k one HMC move
    from z_{k-1} that leaves ``pi_k(z) proportional to q_0(z)^{1 - t_k} p(x, z)^{t_k}`` invariant. ``E[w] = p(x)``
    exactly, so that ``E log 1/K sum_k w_k <= log p(x)``, as for the bound of `evaluate`; yet the chains come to where
    p(z | x) is when q_0 misses it. q_0 is p(z), or q(z | x) of a `guide`; the temperatures ``0 = t_0 < ... < t_T = 1``
    are sigmoidal. A pilot run with draws of its own adapts the step size for each temperature and datum; the chains
    that count take these as given.

    With too few temperatures the estimate is below log p(x), by tens of nats in 50 dimensions, and its standard error
    does not tell it. So as many chains run at every other temperature, too: where that moves the estimate by more than
    its error, or the weights differ too much for K of them, a warning says so.

    Every gradient is a call of the model: ``5/2 T (leapfrog_steps + 1)`` of K chains for each datum, pilot and all.

    Args:
        model: a Pyro model with continuous latent sites, constrained ones too, in the plate of the data. Masks count,
            scales do not.
        data: as for `evaluate`: a standardised split's score is that of the original units.
        guide: q(z | x) to start from; a good one needs fewer temperatures.
        num_chains: K. num_temperatures: T; 1 is plain importance sampling.
        leapfrog_steps: of each HMC move.
        compile: run model and gradient as one compiled graph; by default where there are calls enough to pay for it.

    Raises:
        ValueError: latent sites that are discrete, outside the plate of the data, or without a density; data outside
            the likelihood's support; numbers below 1.

    Warns:
        AnnealingWarning: too few temperatures, as far as the chains tell: see `Annealed.too_few`.

    Example:
        >>> from pyro_vae.models import LinearVAE
        >>> model, x = LinearVAE((3,), latent_dim=1), torch.randn(20, 3)
        >>> estimate = annealed(model, x, num_temperatures=20, leapfrog_steps=3, progress=False)
        >>> abs(float(estimate) - model.log_evidence(x).mean().item()) < 0.2
        True
    """
    data = as_data(data, model, guide)
    chains = _Chains(num_chains, num_temperatures, leapfrog_steps)
    programs = [model] if guide is None else [model, guide]
    with isolated(*programs):
        torch.manual_seed(seed + 1)  # seed itself is that of the data's own draws
        (log_weight, log_weight_halved), acceptance = _run(model, guide, data, None, chains, seed, progress, compile)
    log_weight = log_weight + data.log_jacobian
    value, variance = _log_mean(log_weight)
    halved = change = None
    if chains.between:
        half, of_half = _log_mean(log_weight_halved + data.log_jacobian)
        halved, change = _estimate(half, of_half), _estimate(value - half, variance + of_half)
    spread, ess = _spread(log_weight)
    tail = min(math.ceil(num_chains / 5), math.ceil(3 * math.sqrt(num_chains))) + 1
    khat = generalized_pareto_shape(log_weight.topk(tail, dim=0).values) if num_chains >= TAIL else value * math.nan
    found = Annealed(
        _estimate(value, variance),
        value,
        log_weight,
        acceptance,
        num_chains,
        num_temperatures,
        halved,
        change,
        spread,
        ess,
        khat.mean().item(),
    )
    if found.too_few:
        warnings.warn("; ".join(found.notes[:2]), AnnealingWarning, stacklevel=2)
    return found


def sandwich(
    model: Callable,
    num_data: int,
    *,
    guide: Callable | None = None,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    leapfrog_steps: int = 10,
    seed: int = 0,
    progress: bool = True,
    compile: bool | None = None,
    **kwargs: Tensor,
) -> Sandwich:
    """Bounds on E[log p(x)] from both sides for data x that the model itself draws: bidirectional Monte Carlo (arXiv
    1511.02543).

    The lower one is that of `annealed`. As z that x was drawn from is an exact draw of ``p(z | x)``, chains can go the
    same path backwards from it, and their weights have ``E[1 / w] = 1 / p(x)``: minus the logarithm of their mean is
    above log p(x) in expectation. The gap bounds the error of both, and shows how many temperatures `annealed` needs.

    Args:
        num_data: N, drawn by ``model(num_data=N, **kwargs)``, which returns x, or a tuple of tensors, that
            ``model(x, **kwargs)`` takes. The other arguments are those of `annealed`.
        kwargs: the model's own, tensors with a row for each datum, such as covariates.

    Raises:
        ValueError: as `annealed`; a model that does not return the data that it draws.

    Example:
        >>> from pyro_vae.models import LinearVAE
        >>> model = LinearVAE((3,), latent_dim=1)
        >>> bounds = sandwich(model, 20, num_temperatures=20, leapfrog_steps=3, progress=False)
        >>> abs(float(bounds.gap)) < 0.3
        True
    """
    num_data = positive("num_data", num_data)
    chains = _Chains(num_chains, num_temperatures, leapfrog_steps)
    programs = [model] if guide is None else [model, guide]
    with isolated(*programs):
        torch.manual_seed(seed)
        simulated = poutine.trace(model).get_trace(num_data=num_data, **kwargs)
        x = simulated.nodes["_RETURN"]["value"]
        if not all(isinstance(part, Tensor) for part in (x if isinstance(x, tuple) else (x,))):
            raise ValueError(f"expected a model that returns the data it draws, got {type(x).__name__}: return x")

        def drawn(rows: int) -> list[poutine.Trace]:
            return [simulated if rows == num_data else poutine.trace(model).get_trace(num_data=rows, **kwargs)]

        plate = plate_of_data(drawn, num_data)
        for name, site in _sites(simulated):
            if any(frame.name == plate for frame in site["cond_indep_stack"]):
                _data_dim(name, site, plate, num_data)
        data = as_data((*(x if isinstance(x, tuple) else (x,)), kwargs))
        weights, acceptance = _run(model, guide, data, simulated, chains, seed, progress, compile)
    (lower, below), (negated, above) = (_log_mean(log_weight) for log_weight in weights)
    spreads, sizes = zip(*map(_spread, weights), strict=True)
    return Sandwich(
        _estimate(lower, below),
        _estimate(-negated, above),
        _estimate(-negated - lower, below + above),
        torch.stack([lower, -negated]),
        acceptance,
        num_chains,
        num_temperatures,
        spreads,
        sizes,
    )


def _log_mean(log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """``log 1/K sum_k w_k``, and its variance over chains by the delta method, NaN for K = 1; each (N,)."""
    K = len(log_weight)
    value = log_weight.logsumexp(0) - math.log(K)
    relative = (log_weight - value).exp()
    return value, relative.var(0) / K if K > 1 else torch.full_like(value, math.nan)


def _spread(log_weight: Tensor) -> tuple[float, float]:
    """Var(ln w) over K chains, NaN for one, and their effective sample size; means over data."""
    variance = log_weight.var(0).mean().item() if len(log_weight) > 1 else math.nan
    ess = (2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)).exp()
    return variance, ess.mean().item()


def _estimate(value: Tensor, variance: Tensor) -> Estimate:
    N = len(value)
    error = value.std().item() / math.sqrt(N) if N > 1 else math.nan
    return Estimate(value.mean().item(), error, variance.sum().sqrt().item() / N)


class _Chains:
    """K chains along temperatures ``0 = t_0 < ... < t_T = 1``, of any density."""

    def __init__(self, num_chains: int, num_temperatures: int, leapfrog_steps: int) -> None:
        numbers = {"num_chains": num_chains, "num_temperatures": num_temperatures, "leapfrog_steps": leapfrog_steps}
        for name, number in numbers.items():
            positive(name, number)
        self.count, self.leapfrog_steps, self.between = num_chains, leapfrog_steps, num_temperatures - 1
        sigmoid = torch.linspace(-4, 4, num_temperatures + 1, dtype=torch.float64, device="cpu").sigmoid()
        self.temperatures: list[float] = ((sigmoid - sigmoid[0]) / (sigmoid[-1] - sigmoid[0])).tolist()
        self.pilot_moves = [0, *[-(-PILOT_MOVES // num_temperatures)] * self.between, 0]
        self.pilot_moves[1] += FIRST_MOVES if self.between else 0
        self.every = range(num_temperatures + 1)
        self.every_other = sorted({*self.every[::2], num_temperatures})

    def pilot(self, density: Density, u: Tensor, bar: Bar) -> list[Tensor]:
        """Step sizes (B, 1) for each temperature, from chains that start at u, (K, B, S)."""
        log_step, steps = u.new_zeros(u.shape[1], 1), []
        for t, moves in zip(self.temperatures, self.pilot_moves, strict=True):
            for _ in range(moves):
                u, _, rate = self.move(density, u, t, log_step.exp())
                log_step = log_step + GAIN * (rate.mean(0)[:, None] - TARGET)
                bar.update()
            steps.append(log_step.exp())
        return steps

    def run(
        self, density: Density, u: Tensor, steps: Sequence[Tensor], bar: Bar, order: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """log w of chains from u ~ pi_0 along temperatures in this order, or -log w of backward ones from u ~ pi_T, and
        rates of acceptance, (K, B)."""
        *_, ratio = density(u, self.temperatures[1])
        log_weight, rates = ratio.new_zeros(ratio.shape, dtype=torch.float64), torch.zeros_like(ratio)
        for here, there in itertools.pairwise(order):
            log_weight += (self.temperatures[there] - self.temperatures[here]) * ratio
            if there != order[-1]:
                u, ratio, rate = self.move(density, u, self.temperatures[there], steps[there])
                rates += rate / (len(order) - 2)
                bar.update()
        return log_weight, rates if len(order) > 2 else rates + math.nan

    def move(self, density: Density, u: Tensor, t: float, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One HMC move that leaves pi_t invariant: u and its ratio afterwards, and the rate of acceptance, (K, B)."""
        log_pi, gradient, ratio = density(u, t)
        step = step * (1 + JITTER * (2 * torch.rand_like(u[..., :1]) - 1))
        momentum = torch.randn_like(u)
        kinetic, proposal = momentum.square().sum(-1) / 2, u
        for _ in range(self.leapfrog_steps):
            momentum = momentum + step / 2 * gradient
            proposal = proposal + step * momentum
            log_pi_there, gradient, ratio_there = density(proposal, t)
            momentum = momentum + step / 2 * gradient
        rate = acceptance(log_pi_there - log_pi + kinetic - momentum.square().sum(-1) / 2)
        accepted = torch.rand_like(rate) < rate
        return torch.where(accepted[..., None], proposal, u), torch.where(accepted, ratio_there, ratio), rate


def acceptance(log_ratio: Tensor) -> Tensor:
    """``min(1, exp(log_ratio))``, and 0 for NaN, where a path has left what numbers can hold."""
    return log_ratio.clamp(max=0).exp().nan_to_num(0.0)


def _run(
    model: Callable,
    guide: Callable | None,
    data: Data,
    simulated: poutine.Trace | None,
    chains: _Chains,
    seed: int,
    progress: bool,
    compile: bool | None,
) -> tuple[Tensor, float]:
    """log w, and -log w of backward chains where the data were simulated, else log w at every other temperature, each
    (K, N); the rate of acceptance."""
    programs = [model] if guide is None else [model, guide]
    modules = [program for program in programs if isinstance(program, nn.Module)]
    device = next((p.device for module in modules for p in module.parameters()), data.device)
    data = data.to(device)
    K, N = chains.count, len(data)
    orders = [chains.every, chains.every_other if simulated is None else chains.every[::-1]]
    event = max(1_000, *(tensor[:1].numel() for tensor in data.args))  # as in evaluate
    rows = max(1, min(N, MAX_ELEMENTS // (event * K)))
    parts = -(-K // max(1, min(K, MAX_ELEMENTS // (event * rows))))
    counts = [K // parts + (i < K % parts) for i in range(parts)]
    between = sum(max(0, len(order) - 2) for order in orders)
    moves = -(-N // rows) * (sum(chains.pilot_moves) + parts * between)
    worth_compiling = moves * (chains.leapfrog_steps + 1) >= WORTH_COMPILING if compile is None else compile
    generator = torch.Generator(device).manual_seed(int(seed))
    results = torch.empty(2, 2, K, N, dtype=torch.float64)
    path: _Path | None = None
    with Bar(total=moves, unit="move", disable=None if progress else True) as bar:
        for begin in range(0, N, rows):
            index = torch.arange(begin, begin + rows, device=device).clamp(max=N - 1)  # graphs have one shape
            batch = data.batch(index, generator)
            if path is None:
                path = _Path(model, guide, batch, K)
                density: Callable = Compiled(path, *programs) if worth_compiling else path
            path.check(batch)
            of_batch = functools.partial(density, batch)
            steps = chains.pilot(of_batch, path.draws(counts[0], batch), bar)
            for first, count in zip(itertools.accumulate(counts, initial=0), counts, strict=False):
                for i, order in enumerate(orders):
                    backward, check = i == 1 and simulated is not None, i == 1 and simulated is None
                    with torch.random.fork_rng() if check else contextlib.nullcontext():
                        if check:  # its draws leave those of the estimate what they are without it
                            torch.manual_seed(seed + SEEDS * (1 + begin * K + first))
                        u = path.exact(simulated, index, count, batch) if backward else path.draws(count, batch)
                        both = torch.stack(chains.run(of_batch, u, steps, bar, order)).cpu()
                    results[:, i, first : first + count, begin : begin + rows] = both[..., : N - begin]
    log_weights, rates = results
    return log_weights, (rates[0] if simulated is None else rates).mean().item()


class _Path:
    """``log pi_t(u) = log q_0(z) + t log [p(x, z) / q_0(z)] + log |dz / du|`` of z = z(u) for B data.

    u holds all latent sites over the real numbers, (K, B, S), each reached through ``biject_to`` of its support.
    """

    def __init__(self, model: Callable, guide: Callable | None, batch: Batch, num_chains: int) -> None:
        self.model, self.guide = model, guide
        self.start = poutine.block(model, hide_fn=_is_observed) if guide is None else guide
        try:
            self.plate = plate_of_pair(model, self.start, *batch)
            structure = structure_of(model, self.start, *batch, plate=self.plate)
        except NotImplementedError as error:
            raise ValueError(
                f"expected draws to start chains from, got a site that has none ({error}): start from a guide, or take "
                "a distribution with draws"
            ) from error
        for name in structure.global_sites:
            raise ValueError(
                f'expected every site inside the plate "{self.plate}", got "{name}" outside: its weight belongs to no '
                "single datum; sample it in the plate, or give its value"
            )
        self.nesting = structure.nesting
        self.together = False  # all chains in one call
        p, q = self._drawn(1, batch)
        for name, site in _sites(q):
            if name not in p.nodes:
                raise ValueError(
                    f'expected a guide whose density is known, got auxiliary site "{name}", which would have to be '
                    "integrated out: start from the prior, guide=None"
                )
            _check_density(name, site)
        self.shapes: dict[str, torch.Size] = {}  # of an event and the plates within the data's, over the real numbers
        self.own: dict[str, int] = {}  # dimensions of a site's own plates
        for name, site in _sites(p):
            self.data_dim = _data_dim(name, site, self.plate, len(batch[0][0]))
            if not site["is_observed"]:
                _check_density(name, site)
                self.shapes[name] = self._by_datum(site).shape[2:]
                self.own[name] = max(-f.dim for f in site["cond_indep_stack"] if f.vectorized and f.name != DRAWS)
        if not self.shapes:
            raise ValueError("expected latent sites, got none: log p(x) is the model's log-probability of x as it is")
        if num_chains > 1:
            programs = [model] if guide is None else [guide, model]
            with preserved():
                problem = difference(programs, *batch, num_chains, self.nesting, self.plate)
            self.together = problem is None
            if problem is not None:
                warn_of(problem)

    def __call__(self, batch: Batch, u: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """``log pi_t(u)``, its gradient, and the ratio ``log p(x, z) / q_0(z)``: (K, B), (K, B, S), (K, B)."""
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            start, ratio = self._log_probs(u, batch)
            log_pi = start + t * ratio
            (gradient,) = torch.autograd.grad(log_pi.sum(), u)
        return log_pi.detach(), gradient, ratio.detach()

    def check(self, batch: Batch) -> None:
        """Raises ValueError for data outside of the likelihood's support."""
        for name, site in _sites(self._drawn(1, batch)[0]):
            if site["is_observed"]:
                check_support(name, site["fn"], site["value"])

    def draws(self, K: int, batch: Batch) -> Tensor:
        """u of z ~ q_0, (K, B, S)."""
        if not self.together:
            return torch.cat([self._bare(self._drawn(1, batch)[0]) for _ in range(K)])
        return self._bare(self._drawn(K, batch)[0])

    def exact(self, simulated: poutine.Trace, index: Tensor, K: int, batch: Batch) -> Tensor:
        """u of z that the data of these rows were drawn with, the same in all K chains, (K, B, S)."""
        z = {}
        for name in self.shapes:
            site = simulated.nodes[name]
            z[name] = site["value"].index_select(self.data_dim - len(site["fn"].event_shape), index)
        u = self._bare(_trace(poutine.condition(self.model, data=z), batch))
        return u.expand(K, *u.shape[1:])

    def _log_probs(self, u: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """``log q_0(z) |dz / du|`` and ``log p(x, z) / q_0(z)``, (K, B)."""
        if not self.together and len(u) > 1:
            both = zip(*(self._log_probs(one, batch) for one in u.split(1)), strict=True)
            start, ratio = (torch.cat(each) for each in both)
            return start, ratio
        with self._chains(len(u)), _Bare(self._values(u)) as bare:
            p = _trace(self.model, batch)
        prior, likelihood, volume, q_0 = (u.new_zeros(u.shape[:2]) for _ in range(4))
        for name, site in _sites(p):
            log_prob = self._per_datum(site, log_prob_of(site))
            if name in self.shapes:
                prior = prior + log_prob
                log_det = bare.log_det[name]
                plates = 1 + self.nesting if self.together else self.own[name]
                volume = volume + self._per_datum(site, sum_rightmost(log_det, log_det.dim() - plates))
            else:
                likelihood = likelihood + log_prob
        if self.guide is None:
            return prior + volume, likelihood
        with self._chains(len(u)):
            q = _trace(poutine.replay(self.guide, p), batch)
        for _, site in _sites(q):
            q_0 = q_0 + self._per_datum(site, site["fn"].log_prob(site["value"]))
        return q_0 + volume, prior + likelihood - q_0

    def _drawn(self, K: int, batch: Batch) -> tuple[poutine.Trace, poutine.Trace]:
        """The model at draws from q_0, and q_0 itself."""
        with self._chains(K):
            q = _trace(self.start, batch)
            return _trace(poutine.replay(self.model, q), batch), q

    def _chains(self, K: int) -> Any:
        if not self.together:
            return contextlib.nullcontext()
        with poutine.block():
            return pyro.plate(DRAWS, K, dim=-1 - self.nesting)

    def _by_datum(self, site: Any) -> Tensor:
        """A site's value over the real numbers, ``(K, B, *other plates, *event)``."""
        value, dims = site["value"], 1 + self.nesting + site["fn"].event_dim
        value = value.reshape(*[1] * (dims - value.dim()), *value.shape)
        return _bijection(site["fn"].support).inv(value).movedim(1 + self.nesting + self.data_dim, 1)

    def _bare(self, trace: poutine.Trace) -> Tensor:
        parts = [(self._by_datum(trace.nodes[name]), shape.numel()) for name, shape in self.shapes.items()]
        u = torch.cat([part.reshape(*part.shape[:2], size) for part, size in parts], -1)
        edge = -math.log(torch.finfo(u.dtype).tiny)
        u = u.nan_to_num(nan=math.nan, posinf=edge, neginf=-edge)  # of draws that were rounded to the support's edge
        if bool(u.isnan().any()):
            raise ValueError(
                f"expected draws of the guide in the supports of the model's sites {list(self.shapes)}, got others: "
                "map them there, or start from the prior, guide=None"
            )
        return u

    def _values(self, u: Tensor) -> dict[str, Tensor]:
        """The parts of u by site, ``(K, *plates, *event)``."""
        parts = u.split([shape.numel() for shape in self.shapes.values()], -1)
        values = {
            name: part.reshape(*u.shape[:2], *shape).movedim(1, 1 + self.nesting + self.data_dim)
            for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)
        }
        if self.together:
            return values
        return {name: value.reshape(value.shape[1 + self.nesting - self.own[name] :]) for name, value in values.items()}

    def _per_datum(self, site: Mapping[str, Any], log_prob: Tensor) -> Tensor:
        return per_datum(on_plates(site, log_prob), self.data_dim, -1 - self.nesting)


class _Bare(Messenger):
    """Gives latent sites values on their supports from ones over the real numbers; keeps log-determinants."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.log_det: dict[str, Tensor] = {}

    def _pyro_sample(self, message: Any) -> None:
        if not message["is_observed"] and (u := self.values.get(message["name"])) is not None:
            bijection = _bijection(message["fn"].support)
            message["value"] = bijection(u)
            self.log_det[message["name"]] = bijection.log_abs_det_jacobian(u, message["value"])


def _trace(program: Callable, batch: Batch) -> poutine.Trace:
    args, kwargs = batch
    return poutine.trace(program).get_trace(*args, **kwargs)


def _bijection(support: Any) -> Any:
    """From real numbers to the support; None where there is none."""
    while isinstance(support, MixtureSameFamilyConstraint):
        support = support.base_constraint
    try:
        return Remembered(support)
    except NotImplementedError:
        return None


def _data_dim(name: str, site: Any, plate: str, N: int) -> int:
    """The dimension of the plate of the data, all N of them."""
    for frame in site["cond_indep_stack"]:
        if frame.name != plate and frame.full_size not in (None, frame.size):
            raise ValueError(
                f'expected all elements of plate "{frame.name}" in every call, got {frame.size} of {frame.full_size}: '
                "leave out its subsample_size"
            )
    data = next(frame for frame in site["cond_indep_stack"] if frame.name == plate)
    if not data.vectorized or data.size != N:
        came = f"{data.size} of its {N} rows" if data.vectorized else "a sequential one"
        raise ValueError(f'expected a vectorised plate "{plate}" of all rows, got {came} at site "{name}": use len(x)')
    return data.dim


def _check_density(name: str, site: Any) -> None:
    """Raises ValueError for a latent site on which no chain can move."""
    distribution, support = site["fn"], site["fn"].support
    while hasattr(distribution, "base_dist") or hasattr(distribution, "component_distribution"):
        distribution = getattr(distribution, "base_dist", None) or distribution.component_distribution
    if distribution.support.is_discrete:
        problem = "which is discrete: sum it out in the model, or give its value"
    elif isinstance(distribution, dist.Delta):
        problem = "which has no density: take pyro.deterministic, or a distribution with a spread"
    elif isinstance(distribution, PERIODIC):
        problem = "an angle: sample a vector and take its direction"
    elif _bijection(support) is None:
        problem = f"on {support}, which biject_to does not know: sample real numbers, and map them in the model"
    elif not _has_density(site):
        problem = "whose density, or the one of the map to its support, is not known: sample real numbers, and map them"
    else:
        return
    kind = type(distribution).__name__
    raise ValueError(f'expected continuous latent sites that HMC can move on, got "{name}", {kind}, {problem}')


def _has_density(site: Any) -> bool:
    """Whether its density over the real numbers can be computed, one for each element of its plates."""
    fn, value = site["fn"], site["value"]
    batch = value.shape[: value.dim() - fn.event_dim]
    bijection = _bijection(fn.support)
    try:
        log_det = bijection.log_abs_det_jacobian(bijection.inv(value), value)
        return fn.log_prob(value).shape == batch and sum_rightmost(log_det, log_det.dim() - len(batch)).shape == batch
    except (NotImplementedError, RuntimeError):
        return False


def _is_observed(site: Any) -> bool:
    return site["type"] == "sample" and site["is_observed"]


def _sites(trace: poutine.Trace) -> list[tuple[str, Any]]:
    """The sample sites that carry a density."""
    return [(name, site) for name, site in samples(trace) if not site["infer"].get("_deterministic")]
