"""Bias and noise of the gradients."""

from __future__ import annotations

import math
import random
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas
import pyro
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ..compiled import _recordable, get_random_state, set_random_state
from ..estimators import ELBO, Estimator, Renyi
from ..log_weights import samples
from ..svi import _cannot_derive
from .contestants import Contestant, draws_of
from .memory import peak_memory
from .pair import Pair, derived_seed, modules_in

PARTS = ("model", "guide")
BLOCKS = 12  # of draws: the error of a signal-to-noise ratio comes from leaving out one at a time
MAX_BYTES = 64_000_000  # that gradients drawn in one call may take, each as one alone does
WORTH_RECORDING = 100  # draws


Expected: TypeAlias = dict[str, Tensor]  # the means of each part in blocks of draws, (J, P)


class _Moments:
    """Sums of draws g (P,) and of their squares, about the first of them, in blocks."""

    def __init__(self, blocks: int) -> None:
        self.blocks, self.count, self.norms = blocks, 0, 0.0
        self.counts = torch.zeros(blocks, dtype=torch.long)

    def add(self, draws: Tensor) -> None:
        """Take up (R, P)."""
        if not self.count:
            self.origin = draws[0].clone()
            self.first, self.second = (draws.new_zeros(self.blocks, draws.shape[1]) for _ in range(2))
        self.norms += draws.norm(dim=1).sum().item()
        draws = draws - self.origin
        numbers = (self.count + torch.arange(len(draws), device=draws.device)) % self.blocks
        self.first.index_add_(0, numbers, draws)
        self.second.index_add_(0, numbers, draws.square())
        self.count += len(draws)
        self.counts += torch.bincount(numbers.cpu(), minlength=self.blocks)

    def means(self) -> Tensor:
        """Of each block, (J, P)."""
        return self.origin + self.first / self.counts.to(self.first)[:, None]

    def moments(self, without: int | None = None) -> tuple[Tensor, Tensor, int]:
        """Mean and variance of each parameter's gradient, (P,), and the number of draws; of all blocks but one."""
        first, second, count = self.first.sum(0), self.second.sum(0), self.count
        if without is not None:
            first, second, count = (
                first - self.first[without],
                second - self.second[without],
                count - int(self.counts[without]),
            )
        variance = (second - first.square() / count).clamp(min=0) / (count - 1)
        return self.origin + first / count, variance, count


def _signal_to_noise(mean: Tensor, variance: Tensor, count: int) -> tuple[float, float]:
    """Averaged over parameters, and of the gradient as a whole; without what the noise adds to squared means."""
    varies = variance > 1e-12 * mean.square()
    if not varies.any():
        return (math.inf, math.inf) if bool((mean != 0).any()) else (math.nan, math.nan)
    squared = (mean.square() - variance / count).clamp(min=0)[varies] / variance[varies]
    whole = (mean.square().sum() - variance.sum() / count).clamp(min=0) / variance.sum()
    return squared.sqrt().mean().item(), whole.sqrt().item()


def _with_errors(moments: _Moments) -> tuple[tuple[float, float], tuple[float, float]]:
    """Both ratios, each with its standard error by the jackknife."""
    ratios = _signal_to_noise(*moments.moments())
    J = moments.blocks
    others = torch.tensor([_signal_to_noise(*moments.moments(without=j)) for j in range(J)], dtype=torch.float64)
    errors = ((J - 1) * (others - others.mean(0)).square().mean(0)).sqrt().tolist()
    return (ratios[0], errors[0]), (ratios[1], errors[1])


def _parameters_of(model: Any, guide: Any, args: Any, kwargs: Any) -> dict[str, list[Tensor]]:
    """The parameters that draws or densities of each program depend on."""
    q = poutine.trace(guide).get_trace(*args, **kwargs)
    fixed = q.copy()
    for _, site in samples(fixed):
        site["value"] = site["value"].detach()
    p = poutine.trace(poutine.replay(model, fixed)).get_trace(*args, **kwargs)
    candidates: list[Tensor] = [p for module in modules_in(model, guide) for p in module.parameters()]
    candidates += [parameter for _, parameter in pyro.get_param_store().named_parameters()]
    candidates = [*{id(each): each for each in candidates if each.requires_grad}.values()]
    parts = {}
    for part, trace in zip(PARTS, (p, q), strict=True):
        terms = [site["fn"].log_prob(site["value"]).sum() for _, site in samples(trace)]
        terms += [site["value"].sum() for _, site in samples(trace)]
        terms = [term for term in terms if term.requires_grad]
        used = torch.autograd.grad(terms, candidates, allow_unused=True) if terms and candidates else []
        parts[part] = [each for each, gradient in zip(candidates, used, strict=False) if gradient is not None]
    return parts


def _gradient_moments(pair: Pair, loss: Any, batch: Any, count: int, seed: int, blocks: int = 1) -> dict[str, _Moments]:
    args, kwargs = batch
    if isinstance(loss, nn.Module):
        loss.eval()  # as it is, whatever it adapts in training
    with pair.copied() as (model, guide):
        torch.manual_seed(seed)
        parts = {part: each for part, each in _parameters_of(model, guide, args, kwargs).items() if each}
        unique = [*{id(each): each for group in parts.values() for each in group}.values()]
        places = {id(each): i for i, each in enumerate(unique)}
        moments = {part: _Moments(blocks) for part in parts}
        for draws in _draws_of_gradients(loss, model, guide, args, kwargs, unique, count):
            for part, group in parts.items():
                moments[part].add(torch.cat([draws[places[id(each)]].double() for each in group], dim=1))
    return moments


def _draws_of_gradients(
    loss: Any, model: Any, guide: Any, args: Any, kwargs: Any, parameters: Sequence[Tensor], count: int
) -> Iterator[list[Tensor]]:
    """Independent draws of the gradient, (R, elements) of each parameter, R summing up to `count`."""
    draw, done, together = None, 0, 1

    def one() -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        loss.loss_and_grads(model, guide, *args, **kwargs)
        return [torch.zeros_like(p).view(1, -1) if p.grad is None else p.grad.reshape(1, -1) for p in parameters]

    if count >= WORTH_RECORDING:
        with torch.random.fork_rng():
            together = int(min(count, MAX_BYTES // max(1, peak_memory(one, args[0].device))))
        if together > 4:
            draw = _vectorised(loss, model, guide, args, kwargs, parameters)
    while draw is not None and done < count:
        R = min(together, count - done)
        yield [gradient.reshape(R, -1) for gradient in draw(R)]
        done += R
    for _ in range(done, count):
        yield one()
    for parameter in parameters:
        parameter.grad = None


def _vectorised(
    loss: Any, model: Any, guide: Any, args: Any, kwargs: Any, parameters: Sequence[Tensor]
) -> Callable[[int], list[Tensor]] | None:
    """R -> as many draws of the gradient, (R, ...) of each parameter, by the loss recorded below Pyro's handlers; None
    for what cannot be recorded or vectorised."""
    if _cannot_derive(loss) is not None or (draws_of(loss) > 1 and not loss.vectorize_particles):
        return None

    def gradients() -> list[Tensor]:
        value = loss.differentiable_loss(model, guide, *args, **kwargs)
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    def draw(R: int) -> list[Tensor]:
        with torch.no_grad():
            return torch.vmap(lambda _: graph(), randomness="different")(torch.zeros(R, device=args[0].device))

    beside = _other_random_state()
    try:
        with _recordable(), torch._guards.tracing(torch._guards.TracingContext(FakeTensorMode())):
            graph = make_fx(gradients)()
        state = get_random_state()
        recorded = graph()
        set_random_state(state)
        torch.testing.assert_close(recorded, gradients())  # nothing but torch's random state makes the difference
        if _other_random_state() != beside:
            return None
        for node in graph.graph.nodes:
            node.target = OUT_OF_PLACE.get(node.target, node.target)
        graph.recompile()
        draw(2)
    except Exception:
        return None
    return draw


def _other_random_state() -> tuple[Any, ...]:
    return random.getstate(), repr(np.random.get_state())


def _normal(x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return mean + std * torch.randn(x.shape, dtype=x.dtype, device=x.device)


def _uniform(x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(x.shape, dtype=x.dtype, device=x.device)


def _exponential(x: Tensor, rate: float = 1.0) -> Tensor:
    return -torch.log1p(-torch.rand(x.shape, dtype=x.dtype, device=x.device)) / rate


OUT_OF_PLACE = {  # of what fills a new tensor, which no vmap can fill with different draws
    torch.ops.aten.normal_.default: _normal,
    torch.ops.aten.uniform_.default: _uniform,
    torch.ops.aten.exponential_.default: _exponential,
}


def _plain(loss: Any) -> Any:
    """An estimator whose gradient is the expected one of the same objective, the plainest; None where none is known."""
    if isinstance(loss, Estimator):
        own = {name: getattr(Estimator, name) for name in ("coefficients", "signal", "extra")}
        loss.__class__ = types.new_class(type(loss).__name__, (type(loss),), exec_body=lambda names: names.update(own))
        return loss
    if type(loss) in (Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO):
        return ELBO(loss.num_particles)
    return Renyi(loss.alpha, loss.num_particles) if type(loss) is RenyiELBO and loss.alpha != 1 else None


def _objective_of(loss: Any) -> Hashable:
    """The same for estimators with the same bound and objective, as far as can be told."""
    state = {name: value for name, value in vars(loss).items() if not name.startswith("_")}
    if not all(isinstance(value, int | float | str | None) for value in state.values()):
        return object()
    kind = type(loss)
    return kind.bound, kind.objective, kind.weigh, kind.analytic_kl, draws_of(loss), *sorted(state.items(), key=str)


def gradient_row(
    pair: Pair,
    each: Contestant,
    batch: Any,
    num_gradients: int,
    num_references: int,
    references: dict[Hashable, Expected],
    seed: int,
) -> dict[str, float]:
    blocks = min(BLOCKS, num_gradients // 2)
    own = _gradient_moments(pair, each.make(), batch, num_gradients, derived_seed(seed, 2, each.K), blocks)
    plain = _plain(each.make()) if num_references else None
    reference: Expected = {}
    if plain is not None:
        key = _objective_of(plain)
        if key not in references:
            found = _gradient_moments(pair, plain, batch, num_references, derived_seed(seed, 3, each.K), blocks)
            references[key] = {part: moments.means() for part, moments in found.items()}
        reference = references[key]
    row: dict[str, float] = {}
    for part in PARTS:
        its = _statistics(own[part], reference.get(part)) if part in own else dict.fromkeys(STATISTICS, math.nan)
        row |= {f"{part}_{name}": value for name, value in its.items()}
    return row


STATISTICS = (
    *("norm", "mean_norm", "standard_deviation", "variance", "snr", "snr_standard_error"),
    *("snr_whole", "snr_whole_standard_error", "bias", "bias_z"),
)


def _bias(own: Tensor, reference: Tensor) -> tuple[float, float]:
    """``|E own - E reference|`` from means of J blocks each, (J, P), and its square in standard errors.

    The square is the mean product of different blocks' differences, to which their noise adds nothing; its error comes
    from leaving out one block at a time.
    """
    differences = own - reference
    J = len(differences)
    products = differences @ differences.mT
    products.fill_diagonal_(0.0)
    total, of_block = products.sum(), products.sum(1)
    squared = (total / (J * (J - 1))).item() if J > 1 else math.nan
    others = (total - 2 * of_block) / ((J - 1) * (J - 2)) if J > 2 else torch.full((J,), math.nan)
    error = math.sqrt((J - 1) * (others - others.mean()).square().mean().item())
    rounding = (1e-6 * reference.mean(0).norm().item()) ** 2
    z = squared / math.hypot(error, rounding) if error or rounding else 0.0
    return math.sqrt(max(0.0, squared)) if squared == squared else math.nan, z


def _statistics(own: _Moments, reference: Tensor | None) -> dict[str, float]:
    mean, variance, count = own.moments()
    trace = variance.sum().item()
    (snr, snr_error), (whole, whole_error) = _with_errors(own)
    bias = z = math.nan
    if reference is not None:
        bias, z = _bias(own.means(), reference)
    norm = math.sqrt(max(0.0, mean.square().sum().item() - trace / count))
    values = (norm, own.norms / count, math.sqrt(trace), trace, snr, snr_error, whole, whole_error, bias, z)
    return dict(zip(STATISTICS, values, strict=True))


class Line(NamedTuple):
    """ln ratio against ln K by weighted least squares.

    Attributes:
        standard_error: of the slope; where the points lie further from the line than their errors tell, as much larger.
        points: how many there are. fit: the probability of points as far from a line, or farther, were it one; NaN for
            two, which always lie on one.
    """

    slope: float = math.nan
    standard_error: float = math.nan
    intercept: float = math.nan
    points: int = 0
    fit: float = math.nan


def slopes_of(table: pandas.DataFrame) -> pandas.DataFrame:
    rows = []
    for name in table["estimator"].drop_duplicates():
        own = table[table["estimator"] == name]
        for part in PARTS:
            line = line_through(own["K"], own[f"{part}_snr"], own[f"{part}_snr_standard_error"])
            whole = line_through(own["K"], own[f"{part}_snr_whole"], own[f"{part}_snr_whole_standard_error"])
            row = {"estimator": name, "part": part, **line._asdict()}
            rows.append({**row, "whole_slope": whole.slope, "whole_standard_error": whole.standard_error})
    return pandas.DataFrame(rows)


def line_through(K: Any, ratios: Any, errors: Any) -> Line:
    """The line through ratios with these standard errors."""
    K, ratio, error = (np.asarray(each, float) for each in (K, ratios, errors))
    usable = np.isfinite(ratio) & (ratio > 0) & np.isfinite(error)
    points = int(usable.sum())
    if points < 2:
        return Line(points=points)
    x, y = np.log(K[usable]), np.log(ratio[usable])
    weight = 1 / np.maximum(error[usable] / ratio[usable], 1e-6) ** 2
    centre = np.average(x, weights=weight)
    information = (weight * (x - centre) ** 2).sum()
    slope = (weight * (x - centre) * y).sum() / information
    intercept = np.average(y, weights=weight) - slope * centre
    squares, freedom = (weight * (y - intercept - slope * x) ** 2).sum(), points - 2
    fit = float(scipy.stats.chi2.sf(squares, freedom)) if freedom else math.nan
    spread = math.sqrt(max(1.0, squares / max(freedom, 1)) / information)
    return Line(float(slope), spread, float(intercept), points, fit)
