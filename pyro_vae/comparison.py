"""`compare_estimators`: bias, noise, time and memory of estimators on the model at hand, and what training gains."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import inspect
import json
import math
import os
import random
import statistics
import sys
import textwrap
import time
import types
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias
from unittest import mock

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
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from .checkpoint import atomic
from .compiled import _recordable, get_random_state, preserved, set_random_state
from .data import Data, as_data
from .estimators import ELBO, Estimator, Renyi
from .evaluation import MAX_ELEMENTS, Estimate, evaluate, evaluating
from .log_weights import log_weights, samples, structure_of
from .optim import Optimizer
from .svi import SVI, CompiledSVI, NonFiniteLossError, _derives_gradients, modules_of

__all__ = ["Comparison", "compare_estimators"]

PARTS = ("model", "guide")
BLOCKS = 12  # of draws: the error of a signal-to-noise ratio comes from leaving out one at a time
GROUPS, REPEATS = 10, 4  # of data and of draws, for losses that tell no bound of a single datum
ROUNDS = 15  # of timed steps
MAX_BYTES = 64_000_000  # that gradients drawn in one call may take, each as one alone does
WORTH_RECORDING = 100  # draws
BIASED = 4.0  # standard errors
WIDTH = 100  # of the text table


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare_estimators` found; ``str()`` is a text table, and what follows from it.

    Attributes:
        table: a row for each estimator and K. In nats per datum: ``bound``, ``bound_standard_error`` over data and
            ``bound_standard_error_draws`` over draws; ``gap`` to log p(x) and its two errors, named alike. Of the
            gradient of the loss of a batch, each with the prefix ``model_`` or ``guide_`` and in nats per unit of the
            parameters: ``norm``, of its expectation; ``mean_norm``, the expected norm of a draw;
            ``standard_deviation`` and ``variance``, the trace of the covariance; ``snr`` and
            ``snr_standard_error``, the mean over parameters of ``|mean| / standard deviation``; ``snr_whole`` and its
            error, ``norm / standard_deviation``; ``bias`` and ``bias_standard_error``. ``draws`` of the guide for each
            datum; ``seconds`` and ``megabytes`` per step, the latter at its peak beyond what lives between steps;
            ``compiled``. Of training: ``trained``, log p(x) in nats per datum, mean over seeds;
            ``trained_standard_error``; ``trained_low`` and ``trained_high``, a 95 % interval; ``trained_steps``;
            ``trained_seconds``; ``failed``, seeds that ended in a loss that is not finite and are left out. NaN where
            something was not asked for or makes no sense.
        slopes: a row for each estimator and part: ``slope`` of ln snr against ln K by weighted least squares, its
            ``standard_error`` and ``intercept``; ``whole_slope`` and ``whole_standard_error`` of ``snr_whole``.
        log_evidence: log p(x) that gaps are to, nats per datum.
        source: where that is from: "exact", "given" or "bound of ... draws".
        skipped: why an estimator does not exist for a K, by name.
        settings: what the numbers were taken with.
    """

    table: pandas.DataFrame
    slopes: pandas.DataFrame
    log_evidence: Estimate
    source: str
    skipped: dict[str, str]
    settings: dict[str, Any]

    @property
    def verdict(self) -> list[str]:
        """What the numbers say, a sentence each."""
        return _verdict(self)

    def __str__(self) -> str:
        return _text(self)

    def to_csv(self, path: Path | str) -> None:
        """Write `table`, atomically."""
        with atomic(Path(path)) as temporary:
            self.table.to_csv(temporary, index=False)

    def to_json(self, path: Path | str) -> None:
        """Write everything, atomically; NaN and infinity become null."""
        content = {
            "log_evidence": vars(self.log_evidence),
            "source": self.source,
            "skipped": self.skipped,
            "settings": self.settings,
            "table": self.table.to_dict("records"),
            "slopes": self.slopes.to_dict("records"),
        }
        with atomic(Path(path)) as temporary:
            temporary.write_text(json.dumps(_finite_or_null(content), indent=1, allow_nan=False) + "\n", "utf-8")

    @classmethod
    def from_json(cls, path: Path | str) -> Self:
        """What `to_json` wrote."""
        content = json.loads(Path(path).read_text("utf-8"))
        numbers = {key: math.nan if value is None else value for key, value in content["log_evidence"].items()}
        table, slopes = (pandas.DataFrame(content[name]) for name in ("table", "slopes"))
        for frame in (table, slopes):
            for name in frame.columns.difference(["estimator", "part", "compiled"]):
                frame[name] = pandas.to_numeric(frame[name])
        others = {name: content[name] for name in ("source", "skipped", "settings")}
        return cls(table, slopes, Estimate(**numbers), **others)

    def figures(self, directory: Path | str) -> list[Path]:
        """Draw ``signal_to_noise.png``, ``bounds.png`` and ``quality_against_time.png`` into an existing directory."""
        from .comparison_figures import draw

        return draw(self, Path(directory))


def compare_estimators(
    model: Callable,
    guide: Callable,
    data: Any,
    estimators: Mapping[str, Callable[[int], Any]] | Sequence[type],
    *,
    num_particles: Sequence[int] = (1, 4, 16, 64),
    num_data: int = 500,
    num_samples: int = 1000,
    num_gradients: int = 200,
    num_references: int | None = None,
    log_evidence: float | Tensor | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    learning_rate: float | None = None,
    optimizer: Optimizer | None = None,
    batch_size: int | None = None,
    valid: Any = None,
    compile: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    r"""Hold estimators against each other on a pair as it stands, and with a budget on what training it brings.

    With g a draw of the gradient on one fixed batch, of the parameters of the model or of the guide (those that both
    use count in both)::

        snr  = mean_i |E g_i| / sd(g_i)                    (arXiv 1802.04537)
        bias = |E g - d/dtheta E[objective]|

    The expected gradient of the estimator's own objective is estimated by the plainest unbiased gradient: autograd's,
    with the score of draws that cannot be reparameterised, without `Estimator.coefficients`, `signal` and `extra`. The
    noise of the draws themselves is taken out of squared norms and means; a bias is 0 as far as can be told where it
    is within 4 standard errors. Parameters whose gradient does not vary count in no mean of ratios.

    log p(x) is ``model.log_evidence(x)`` where the model has such a method, else `log_evidence`, else the bound of
    `num_samples` draws; of a trained pair it is the first or the last. Scores are taken in eval mode; gradients, time,
    memory and training in train mode, with all parameters as they are. Model, guide, parameter store, random state and
    modes are afterwards what they were: copies of modules are trained, and the parameters of functions are put back.

    Args:
        data: as for `evaluate`; one plate of independent data holds all sites.
        estimators: callables from K to an estimator, by name, ``{"Renyi": lambda K: Renyi(0.5, K)}``, or classes that
            take `num_particles`. Those of Pyro are as welcome; the standard errors over data are then of groups of
            data, and a bias is known of Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO and RenyiELBO.
        num_particles: the values of K. Where an estimator refuses one, it is left out and named in ``skipped``.
        num_data: how many data the bounds and log p(x) are of, drawn from `data` (and from `valid`).
        num_samples: draws for each datum that log p(x) is told by, and that each bound's average is of, about.
        num_gradients, num_references: draws of each gradient, and of that which a bias is told by: five times as many
            by default; 0 leaves it out. A ratio below ``1 / sqrt(num_gradients)`` is lost in the noise. Their moments
            take 200 bytes for each parameter.
        log_evidence: of the data, nats per datum: their mean, or a tensor (N,).
        steps, seconds: per seed, what each estimator may train for, from the pair as it is; compilation is free.
        seeds: of the training's draws and order of data.
        learning_rate: of Adam, 1e-3 by default; or else `optimizer`, as for `fit`.
        batch_size: of gradients and steps; by default 100, or all data if they are fewer.
        valid: data that trained pairs are scored on; `data` by default.
        compile: time and train with `CompiledSVI`, not with `SVI`.

    Raises:
        ValueError: arguments that do not fit, an estimator that cannot take the pair, sites outside the plate of data.

    Example:
        >>> from pyro_vae.estimators import IWAE, DReG
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import LinearVAE
        >>> model, x = LinearVAE((3,), latent_dim=1), torch.randn(50, 3)
        >>> few = {"num_particles": (1, 8), "num_gradients": 20, "num_samples": 20, "progress": False}
        >>> comparison = compare_estimators(model, AmortizedGuide(model), x, [IWAE, DReG], **few)
        >>> comparison.table[["estimator", "K"]].values.tolist()
        [['IWAE', 1], ['IWAE', 8], ['DReG', 1], ['DReG', 8]]
        >>> comparison.source
        'exact'
    """
    num_references = 5 * num_gradients if num_references is None else num_references
    _check_numbers(num_data, num_samples, num_gradients, num_references)
    budget = _budget(steps, seconds, seeds)
    if learning_rate is not None and (optimizer is not None or not learning_rate > 0):
        came = f"{learning_rate}" if optimizer is None else f"{learning_rate} and an optimiser"
        raise ValueError(f"expected learning_rate > 0 or else an optimizer, got {came}: give one of them")
    optimizer = optimizer or functools.partial(torch.optim.Adam, lr=learning_rate or 1e-3, fused=True)
    contestants, skipped = _contestants(estimators, num_particles)
    data = as_data(data)
    held_out = data if valid is None else as_data(valid)
    batch_size = min(100, len(data)) if batch_size is None else batch_size
    if not 1 <= batch_size <= len(data):
        raise ValueError(
            f"expected a batch_size from 1 to {len(data)}, the number of data, got {batch_size}: choose within"
        )
    parameters = [p for module in modules_of(model=model, guide=guide).values() for p in module.parameters()]
    device = parameters[0].device if parameters else data.device
    data, held_out = data.to(device), held_out.to(device)
    rows = _some(len(data), num_data, seed)
    generator = torch.Generator(device).manual_seed(seed)
    scored = _fixed(data, rows, generator)
    tested = scored if valid is None else _fixed(held_out, _some(len(held_out), num_data, seed), generator)
    batch = data.batch(_some(len(data), batch_size, seed).to(device), generator)
    given = None if log_evidence is None else _per_datum(log_evidence, len(data))[rows]

    total = len(contestants) * (4 + len(budget.seeds))
    with _surroundings(seed), tqdm(total=total, unit="measurement", disable=None if progress else True) as bar:
        pair = _Pair(model, guide, *batch)
        with pair.copied() as (p, q):
            for each in contestants:  # what one of them cannot take is said before anything is measured
                _check_takes(each, p, q, *batch)
            evidence = _log_evidence(p, q, scored, given, num_samples, seed)
            if budget.seeds:
                _log_evidence(p, q, tested, None, 2, seed)
        found: list[dict[str, Any]] = []
        references: dict[Hashable, _Expected] = {}
        for each in contestants:
            row: dict[str, Any] = {"estimator": each.name, "K": each.K, "draws": _draws(each.make())}
            row |= _bound_row(pair, each, scored, evidence, num_samples, seed)
            bar.update()
            row |= _gradient_row(pair, each, batch, num_gradients, num_references, references, seed)
            bar.update(2)
            found.append(row)
        with _Steps(pair, contestants, batch, optimizer, compile) as all_steps:
            for row, more in zip(found, all_steps.costs(bar), strict=True):
                row |= more
            for row, more in zip(found, all_steps.trained(budget, data, tested, num_samples, bar), strict=True):
                row |= more
    table = pandas.DataFrame(found)
    settings = {
        "num_data": len(scored),
        "num_samples": num_samples,
        "batch_size": batch_size,
        "num_gradients": num_gradients,
        "num_references": num_references,
        "steps": steps,
        "seconds": seconds,
        "seeds": [*budget.seeds],
        "seed": seed,
        "compile": compile,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return Comparison(table, _slopes(table), evidence.mean, evidence.source, skipped, settings)


# ------------------------------------------------------------ arguments


class _Budget(NamedTuple):
    steps: int | None
    seconds: float | None
    seeds: tuple[int, ...]


def _budget(steps: int | None, seconds: float | None, seeds: Sequence[int]) -> _Budget:
    given = tuple(seeds)
    if steps is None and seconds is None:
        return _Budget(None, None, ())
    if steps is not None and seconds is not None:
        raise ValueError(f"expected steps or seconds, got {steps} steps and {seconds} seconds: give one of them")
    if steps is not None and not _is_whole(steps, 1):
        raise ValueError(f"expected steps >= 1, got {steps}: give a positive whole number")
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"expected seconds > 0, got {seconds}: give a positive number")
    if not given or len(set(given)) < len(given) or not all(_is_whole(seed, 0) for seed in given):
        raise ValueError(f"expected different whole numbers >= 0 as seeds, got {seeds}: as in (0, 1, 2)")
    return _Budget(steps, seconds, given)


def _check_numbers(num_data: int, num_samples: int, num_gradients: int, num_references: int) -> None:
    least = {"num_data": (num_data, 2), "num_samples": (num_samples, 2), "num_gradients": (num_gradients, 4)}
    if num_references:
        least["num_references"] = (num_references, 4)
    for name, (value, minimum) in least.items():
        if not _is_whole(value, minimum):
            raise ValueError(f"expected {name} >= {minimum}, got {value}: give a whole number from there on")


def _is_whole(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _per_datum(log_evidence: float | Tensor, N: int) -> Tensor:
    """(N,), float64; of a number that is their mean, N times it."""
    given = torch.as_tensor(log_evidence, dtype=torch.float64).detach().cpu()
    if given.shape not in ((), (N,)):
        raise ValueError(
            f"expected log_evidence as a number or of shape ({N},), got shape {tuple(given.shape)}: one value per datum"
        )
    return given.expand(N)


def _some(N: int, count: int, seed: int) -> Tensor:
    """The indices of so many of N data, at most, in their order."""
    return torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def _fixed(data: Data, rows: Tensor, generator: torch.Generator) -> Data:
    """These data, drawn once where they are drawn afresh at each call."""
    return Data(*data.batch(rows.to(data.device), generator), log_jacobian=data.log_jacobian)


class _Contestant(NamedTuple):
    name: str
    K: int
    build: Callable[[], Any]

    def make(self) -> Any:
        """A new estimator that shares nothing with others."""
        return copy.deepcopy(self.build())

    def __str__(self) -> str:
        return f"{self.name}, K = {self.K}"


def _contestants(
    estimators: Mapping[str, Callable[[int], Any]] | Sequence[type], num_particles: Sequence[int]
) -> tuple[list[_Contestant], dict[str, str]]:
    """Every estimator at every K that it does not refuse, and why it refuses others."""
    if not isinstance(estimators, Mapping):
        if isinstance(estimators, str) or not isinstance(estimators, Sequence):
            raise ValueError(f"expected a mapping or a list of estimators, got {estimators!r}: as in [IWAE, DReG]")
        estimators = {getattr(each, "__name__", repr(each)): each for each in estimators}
    if not estimators:
        raise ValueError("expected estimators, got none: give some, as in [IWAE, DReG]")
    values = [*num_particles] if isinstance(num_particles, Iterable) else [num_particles]
    if not values or not all(_is_whole(K, 1) for K in values):
        raise ValueError(f"expected whole numbers >= 1 as num_particles, got {num_particles}: as in (1, 4, 16)")
    contestants: list[_Contestant] = []
    skipped: dict[str, str] = {}
    with torch.random.fork_rng():
        for name, given in estimators.items():
            refusals: list[ValueError] = []
            for K in sorted(set(values)):
                each = _Contestant(name, K, functools.partial(_built, name, given, K))
                try:
                    each.build()
                except ValueError as error:
                    refusals.append(error)
                    skipped[str(each)] = str(error)
                else:
                    contestants.append(each)
            if len(refusals) == len(set(values)):
                raise refusals[0]
    return contestants, skipped


def _built(name: str, given: Any, K: int) -> Any:
    if isinstance(given, pyro.infer.ELBO) or not callable(given):
        kind = type(given).__name__
        raise ValueError(
            f'expected a class or a callable from K to an estimator as "{name}", got {kind}: lambda K: {kind}(...)'
        )
    if inspect.isclass(given):
        parameters = inspect.signature(given).parameters
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind not in variadic]
        if {*needed} - {"num_particles"} or "num_particles" not in parameters:
            lacks = f"needs {', '.join(needed)}" if needed else "takes none"
            raise ValueError(
                f"expected classes that need num_particles at most, got {given.__name__}, which {lacks}: give it as "
                f'{{"{name}": lambda K: {given.__name__}(...)}}'
            )
    loss: Any = given(num_particles=K) if inspect.isclass(given) else given(K)  # type: ignore[call-arg]
    if not isinstance(loss, pyro.infer.ELBO):
        raise ValueError(f'expected "{name}" to give a pyro.infer.ELBO, got {type(loss).__name__}: return an estimator')
    return loss


def _draws(loss: Any) -> int:
    return loss.num_draws if isinstance(loss, Estimator) else loss.num_particles


# ------------------------------------------------------------ the user's pair, untouched


@contextlib.contextmanager
def _surroundings(seed: int) -> Iterator[None]:
    """Seeded draws and no validation of every step; all as before when it ends."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered", UserWarning)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class _Pair:
    """Copies of a pair, each as the pair is now, once it has made what programs make at their first run.

    What functions hold is not copied: parameters in Pyro's store, and those of modules that they close over. These are
    put back.

    Raises:
        ValueError: not all sites are in one plate of data.
    """

    def __init__(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> None:
        store = pyro.get_param_store()
        self.programs = _deep_copy((model, guide))
        state = store.get_state()
        self.state = _without(state, model, guide)
        with store.scope(self.state), torch.no_grad(), poutine.block():
            self.structure = structure_of(self.programs[0], self.programs[1], args, kwargs)
            with preserved(), poutine.trace(param_only=True) as captured:
                trace = poutine.trace(self.programs[1]).get_trace(*args, **kwargs)
                poutine.replay(self.programs[0], trace)(*args, **kwargs)
            tensors = [site["value"].unconstrained() for site in captured.trace.nodes.values()]
        self.state = _without(self.state, *self.programs)
        for name in self.structure.global_sites:
            raise ValueError(
                f'expected every site inside the plate of data, got "{name}" outside: its weight belongs to no single '
                "datum"
            )
        if self.structure.plate is None:
            raise ValueError(
                "expected a plate of independent data that holds an observed and a latent site, got none: put the data "
                "into pyro.plate"
            )
        of_modules = {id(p) for module in _modules(*self.programs) for p in module.parameters()}
        unique = {id(tensor): tensor for tensor in tensors if id(tensor) not in of_modules}
        self.others = [(tensor, tensor.detach().clone(), tensor.grad) for tensor in unique.values()]

    @contextlib.contextmanager
    def copied(self) -> Iterator[tuple[Any, Any]]:
        """Model and guide, in train mode, and a parameter store of their own."""
        programs = _deep_copy(self.programs)
        for module in _modules(*programs):
            module.train()
        state = {name: dict(table) for name, table in self.state.items()}
        for tensor, *_ in self.others:
            tensor.grad = None
        try:
            with pyro.get_param_store().scope(state):
                yield programs
        finally:
            with torch.no_grad():
                for tensor, value, gradient in self.others:
                    tensor.copy_(value)
                    tensor.grad = gradient


def _modules(*programs: Any) -> list[nn.Module]:
    return [*modules_of(**{str(i): program for i, program in enumerate(programs)}).values()]


def _without(state: Any, *programs: Any) -> dict[str, dict[str, Any]]:
    """The parameter store's state, without what belongs to modules."""
    own = {id(p) for module in _modules(*programs) for p in module.parameters()}
    names = [name for name, value in state["params"].items() if id(value) not in own]
    return {part: {name: state[part][name] for name in names} for part in ("params", "constraints")}


def _deep_copy(programs: Any) -> Any:
    """Guides may keep traces, whose tensors are results: such are copied as values."""
    original = Tensor.__deepcopy__

    def of_values(self: Tensor, memo: dict[int, Any]) -> Any:
        if self.is_leaf or id(self) in memo:
            return original(self, memo)
        memo[id(self)] = self.detach().clone()
        return memo[id(self)]

    with mock.patch.object(Tensor, "__deepcopy__", of_values):
        return copy.deepcopy(programs)


def _check_takes(each: _Contestant, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
    try:
        each.make().loss_and_grads(model, guide, *args, **kwargs)
    except (ValueError, NotImplementedError) as error:
        said = f"{error}" if "expected" in str(error) else f"expected a pair that it takes, got {error}: leave it out"
        raise ValueError(f"{each}: {said}") from error


def _seed(*parts: int) -> int:
    return functools.reduce(lambda a, b: a * 1_000_003 + b, parts) % 2**63


# ------------------------------------------------------------ bounds


class _Evidence(NamedTuple):
    values: Tensor  # (N,)
    mean: Estimate
    source: str


def _log_evidence(model: Any, guide: Any, data: Data, given: Tensor | None, num_samples: int, seed: int) -> _Evidence:
    """The best that is known of log p(x): each way stands before those that know less."""
    exact = getattr(model, "log_evidence", None)
    if exact is not None:
        with torch.no_grad(), evaluating(*_modules(model)):
            values = exact(*data.args, **data.kwargs).double().cpu() + data.log_jacobian
        if values.shape != (len(data),):
            came = tuple(values.shape)
            raise ValueError(f"expected shape ({len(data)},) of model.log_evidence(x), got {came}: log p of each datum")
        return _Evidence(values, Estimate(values.mean().item(), _error(values, None), 0.0), "exact")
    if given is not None:
        one = bool((given == given[0]).all())  # a mean, whose spread is not known
        return _Evidence(given, Estimate(given.mean().item(), math.nan if one else _error(given, None)), "given")
    # annealed importance sampling belongs here
    evaluation = evaluate(model, guide, data, num_samples=num_samples, seed=seed, progress=False, compile=False)
    values = evaluation.per_datum["log_evidence"]
    return _Evidence(values, evaluation.log_evidence, f"bound of {num_samples:,} draws")


class _Bound(NamedTuple):
    values: Tensor  # (N,), each the mean over draws
    error: float  # of their mean, over draws
    groups: list[Tensor] | None  # of data that were scored together


def _bound(loss: Any, model: Any, guide: Any, data: Data, num_samples: int) -> _Bound:
    N, K = len(data), _draws(loss)
    if not isinstance(loss, Estimator):
        groups = [*torch.arange(N).tensor_split(min(GROUPS, N))]
        draws = torch.stack([_losses(loss, model, guide, data, groups) for _ in range(REPEATS)])
        sizes = torch.tensor([len(group) for group in groups])
        error = (sizes.square() * draws.var(0)).sum().div(REPEATS).sqrt().item() / N
        return _Bound(draws.mean(0).repeat_interleave(sizes), error, groups)
    repeats = max(2, min(50, num_samples // K))
    event = max(1_000, *(tensor[:1].numel() for tensor in data.args))  # at least: networks have hidden layers too
    rows = max(1, MAX_ELEMENTS // (event * K))
    bounds = []
    for index in torch.arange(N, device=data.device).split(rows):
        args, kwargs = data.batch(index)
        for _ in range(repeats):  # in calls of their own: some programs take data of one size alone
            bounds.append(loss.bound(loss.weigh(model, guide, args, kwargs).log_weight).expand(len(index)))
    draws = torch.cat([torch.stack(bounds[i : i + repeats]) for i in range(0, len(bounds), repeats)], dim=1)
    draws = draws.double().cpu()
    return _Bound(draws.mean(0), draws.var(0).sum().div(repeats).sqrt().item() / N, None)


def _losses(loss: Any, model: Any, guide: Any, data: Data, groups: Sequence[Tensor]) -> Tensor:
    """Minus the loss of each group, per datum, float64."""
    values = []
    for group in groups:
        args, kwargs = data.batch(group.to(data.device))
        scale = log_weights(model, guide, args, kwargs, 1).scale
        value = loss.loss(model, guide, *args, **kwargs)
        values.append(-float(value[0] if isinstance(value, tuple) else value) / (scale * len(group)))
    return torch.tensor(values, dtype=torch.float64)


def _error(values: Tensor, groups: Sequence[Tensor] | None) -> float:
    """The standard error over data of the mean of (N,), or of that of groups."""
    if groups is not None:
        values = torch.stack([values[group].mean() for group in groups])
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _bound_row(
    pair: _Pair, each: _Contestant, data: Data, evidence: _Evidence, num_samples: int, seed: int
) -> dict[str, float]:
    with pair.copied() as (model, guide), evaluating(*_modules(model, guide)), torch.no_grad():
        torch.manual_seed(_seed(seed, 1, each.K))
        values, error, groups = _bound(each.make(), model, guide, data, num_samples)
    values = values + data.log_jacobian
    gap = evidence.values - values
    of_both = math.hypot(error, evidence.mean.standard_error_draws)
    return {
        "bound": values.mean().item(),
        "bound_standard_error": _error(values, groups),
        "bound_standard_error_draws": error,
        "gap": gap.mean().item(),
        "gap_standard_error": _error(gap, groups),
        "gap_standard_error_draws": error if math.isnan(of_both) else of_both,
    }


# ------------------------------------------------------------ gradients


_Expected: TypeAlias = dict[str, tuple[Tensor, float]]  # the mean of each part, and its noise's squared norm


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
    candidates: list[Tensor] = [p for module in _modules(model, guide) for p in module.parameters()]
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


def _gradient_moments(
    pair: _Pair, loss: Any, batch: Any, count: int, seed: int, blocks: int = 1
) -> dict[str, _Moments]:
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
            together = int(min(count, MAX_BYTES // max(1, _peak_memory(one, args[0].device))))
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
    if not _derives_gradients(loss) or (_draws(loss) > 1 and not loss.vectorize_particles):
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
    return kind.bound, kind.objective, kind.weigh, kind.analytic_kl, _draws(loss), *sorted(state.items(), key=str)


def _gradient_row(
    pair: _Pair,
    each: _Contestant,
    batch: Any,
    num_gradients: int,
    num_references: int,
    references: dict[Hashable, _Expected],
    seed: int,
) -> dict[str, float]:
    blocks = min(BLOCKS, num_gradients // 2)
    own = _gradient_moments(pair, each.make(), batch, num_gradients, _seed(seed, 2, each.K), blocks)
    plain = _plain(each.make()) if num_references else None
    reference: _Expected = {}
    if plain is not None:
        key = _objective_of(plain)
        if key not in references:
            found = _gradient_moments(pair, plain, batch, num_references, _seed(seed, 3, each.K))
            moments = {part: each.moments() for part, each in found.items()}
            references[key] = {part: (mean, (spread.sum() / n).item()) for part, (mean, spread, n) in moments.items()}
        reference = references[key]
    row: dict[str, float] = {}
    for part in PARTS:
        its = _statistics(own[part], reference.get(part)) if part in own else dict.fromkeys(STATISTICS, math.nan)
        row |= {f"{part}_{name}": value for name, value in its.items()}
    return row


STATISTICS = (
    *("norm", "mean_norm", "standard_deviation", "variance", "snr", "snr_standard_error"),
    *("snr_whole", "snr_whole_standard_error", "bias", "bias_standard_error"),
)


def _statistics(own: _Moments, reference: tuple[Tensor, float] | None) -> dict[str, float]:
    mean, variance, count = own.moments()
    trace = variance.sum().item()
    (snr, snr_error), (whole, whole_error) = _with_errors(own)
    bias = error = math.nan
    if reference is not None:
        expected, its_noise = reference
        rounding = 1e-6 * expected.norm().item()
        noise = trace / count + its_noise
        bias = math.sqrt(max(0.0, (mean - expected).square().sum().item() - noise))
        error = math.hypot(math.sqrt(noise), rounding)
    norm = math.sqrt(max(0.0, mean.square().sum().item() - trace / count))
    values = (norm, own.norms / count, math.sqrt(trace), trace, snr, snr_error, whole, whole_error, bias, error)
    return dict(zip(STATISTICS, values, strict=True))


def _slopes(table: pandas.DataFrame) -> pandas.DataFrame:
    rows = []
    for name in table["estimator"].drop_duplicates():
        own = table[table["estimator"] == name]
        for part in PARTS:
            slope, error, intercept = _slope(own["K"], own[f"{part}_snr"], own[f"{part}_snr_standard_error"])
            whole, whole_error, _ = _slope(own["K"], own[f"{part}_snr_whole"], own[f"{part}_snr_whole_standard_error"])
            row = {"estimator": name, "part": part, "slope": slope, "standard_error": error, "intercept": intercept}
            rows.append({**row, "whole_slope": whole, "whole_standard_error": whole_error})
    return pandas.DataFrame(rows)


def _slope(K: pandas.Series, ratios: pandas.Series, errors: pandas.Series) -> tuple[float, float, float]:
    """Of ln ratio against ln K by weighted least squares, its standard error, and the intercept.

    Where the points lie further from the line than their errors tell, the slope's error grows as much.
    """
    ratio, error = ratios.to_numpy(float), errors.to_numpy(float)
    usable = np.isfinite(ratio) & (ratio > 0) & np.isfinite(error)
    if usable.sum() < 2:
        return math.nan, math.nan, math.nan
    x, y = np.log(K.to_numpy(float)[usable]), np.log(ratio[usable])
    weight = 1 / np.maximum(error[usable] / ratio[usable], 1e-6) ** 2
    centre = np.average(x, weights=weight)
    information = (weight * (x - centre) ** 2).sum()
    slope = (weight * (x - centre) * y).sum() / information
    intercept = np.average(y, weights=weight) - slope * centre
    excess = (weight * (y - intercept - slope * x) ** 2).sum() / max(len(x) - 2, 1)
    return float(slope), float(math.sqrt(max(1.0, excess) / information)), float(intercept)


# ------------------------------------------------------------ steps


class _Steps:
    """A stepper for each contestant, all on one copy of the pair, which each trains from the beginning."""

    def __init__(
        self, pair: _Pair, contestants: Sequence[_Contestant], batch: Any, optimizer: Optimizer, compile: bool
    ) -> None:
        self.pair, self.contestants, self.batch = pair, contestants, batch
        self.optimizer, self.kind = optimizer, CompiledSVI if compile else SVI
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        args, kwargs = self.batch
        try:
            self.model, self.guide = self.stack.enter_context(self.pair.copied())
            self.svis, self.beginnings = [], []
            for each in self.contestants:
                loss = each.make()
                if isinstance(loss, nn.Module):
                    loss.to(args[0].device).train()
                svi = self.kind(self.model, self.guide, copy.deepcopy(self.optimizer), loss)
                svi.initialize(*args, **kwargs)
                self.svis.append(svi)
                self.beginnings.append(copy.deepcopy(svi.state_dict()))
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *raised: Any) -> None:
        self.stack.close()

    def costs(self, bar: Any) -> list[dict[str, Any]]:
        """Seconds, the contestants taking turns, and memory of a step."""
        args, kwargs = self.batch
        device = args[0].device
        times: list[list[float]] = [[] for _ in self.svis]
        broken: set[int] = set()
        for turn in range(ROUNDS + 2):
            for i, svi in enumerate(self.svis):
                if i in broken:
                    continue
                _settled(device)
                begun = time.perf_counter()
                try:
                    svi.step(*args, **kwargs)
                except NonFiniteLossError:
                    broken.add(i)
                _settled(device)
                if turn >= 2:  # after what is done at first steps alone
                    times[i].append(time.perf_counter() - begun)
        rows = []
        for i, svi in enumerate(self.svis):
            row: dict[str, Any] = {"seconds": math.nan, "megabytes": math.nan, "compiled": False}
            if i not in broken:
                peak = _peak_memory(functools.partial(svi.step, *args, **kwargs), device)
                compiled = isinstance(svi, CompiledSVI) and svi.compiled
                row = {"seconds": statistics.median(times[i]), "megabytes": peak / 1e6, "compiled": compiled}
            rows.append(row)
            bar.update()
        return rows

    def trained(self, budget: _Budget, data: Data, tested: Data, num_samples: int, bar: Any) -> list[dict[str, Any]]:
        """log p(x) of pairs that were trained with the budget."""
        names = ("trained", "trained_standard_error", "trained_low", "trained_high", "trained_steps", "trained_seconds")
        rows = []
        for svi, beginning in zip(self.svis, self.beginnings, strict=True):
            row: dict[str, Any] = {**dict.fromkeys(names, math.nan), "failed": 0}
            ends: list[tuple[float, int, float]] = []
            for seed in budget.seeds:
                svi.load_state_dict(copy.deepcopy(beginning))
                try:
                    steps, seconds = self._train(svi, budget, data, seed)
                except NonFiniteLossError:
                    row["failed"] += 1
                else:
                    score = _log_evidence(self.model, self.guide, tested, None, num_samples, seed).mean.value
                    ends.append((score, steps, seconds))
                bar.update()
            if ends:
                scores, taken, seconds_taken = zip(*ends, strict=True)
                error = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
                half = scipy.stats.t.ppf(0.975, len(scores) - 1) * error if len(scores) > 1 else math.nan
                mean = statistics.fmean(scores)
                values = (
                    mean,
                    error,
                    mean - half,
                    mean + half,
                    statistics.fmean(taken),
                    statistics.fmean(seconds_taken),
                )
                row |= dict(zip(names, values, strict=True))
            rows.append(row)
        return rows

    def _train(self, svi: SVI, budget: _Budget, data: Data, seed: int) -> tuple[int, float]:
        """Steps on whole batches in random order; how many, and in which time."""
        rows = len(self.batch[0][0])
        torch.manual_seed(seed)
        draws = torch.Generator(data.device).manual_seed(seed)
        order = torch.Generator().manual_seed(seed)
        begun, taken = time.perf_counter(), 0
        while True:
            for index in torch.randperm(len(data), generator=order).to(data.device).split(rows):
                if len(index) < rows:
                    break
                args, kwargs = data.batch(index, draws)
                svi.step_async(*args, **kwargs)
                taken += 1
                if budget.seconds is not None and taken % 10 == 0:
                    svi.settle()
                if taken == budget.steps or time.perf_counter() - begun >= (budget.seconds or math.inf):
                    svi.settle()
                    _settled(data.device)
                    return taken, time.perf_counter() - begun


def _settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(step: Callable[[], Any], device: torch.device) -> float:
    """Bytes that a call holds at its peak beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # else what others left is freed meanwhile
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's library says on the process's standard error."""
    sys.stderr.flush()
    try:
        kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is none
        yield
        return
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


# ------------------------------------------------------------ in words


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(comparison: Comparison) -> str:
    settings, table = comparison.settings, comparison.table
    of = comparison.log_evidence
    lines = [
        f"{settings['num_data']} data, gradients and steps of {settings['batch_size']}; {settings['num_gradients']:,} "
        f"gradients, {settings['num_references']:,} for the bias; {settings['device']}, {settings['threads']} threads",
        f"log p(x) = {of} nats per datum ({comparison.source})",
        "",
    ]
    ratios = {f"{part}_z": table[f"{part}_bias"] / table[f"{part}_bias_standard_error"] for part in PARTS}
    columns = [
        ("K", [f"{K}" for K in table["K"]]),
        ("bound", _numbers(table["bound"])),
        ("gap", _numbers(table["gap"])),
        ("SNR m", _numbers(table["model_snr"])),
        ("SNR g", _numbers(table["guide_snr"])),
        ("bias m", _numbers(ratios["model_z"], 1)),
        ("bias g", _numbers(ratios["guide_z"], 1)),
        ("ms", _numbers(1e3 * table["seconds"])),
        ("MB", _numbers(table["megabytes"], 1)),
    ]
    meaning = "nats per datum: bound, gap"
    if table["trained"].notna().any():
        columns += [("trained", _numbers(table["trained"])), ("±", _numbers(table["trained_standard_error"]))]
        meaning += ", log p(x) after training ± its standard error over seeds"
    meaning += (
        "; SNR and bias of the gradients of m, the model, and g, the guide, a bias in its standard errors, sure above "
        f"{BIASED:g}; ms and MB of a step"
    )
    widths = [max(len(name), *map(len, cells)) for name, cells in columns]
    gap = "  " if sum(widths) + 2 * len(widths) <= WIDTH - 12 else " "
    room = WIDTH - sum(widths) - len(gap) * len(widths)
    names = ["estimator", *(_cut(name, max(9, room)) for name in table["estimator"])]
    first = max(map(len, names))
    for cells in zip(names, *([name, *rows] for name, rows in columns), strict=True):
        line = [cells[0].ljust(first), *(cell.rjust(width) for cell, width in zip(cells[1:], widths, strict=True))]
        lines.append(gap.join(line))
    lines += ["", *textwrap.wrap(meaning, WIDTH), ""]
    slopes = comparison.slopes[comparison.slopes["slope"].notna()]
    for name in slopes["estimator"].drop_duplicates():
        own = slopes[slopes["estimator"] == name]
        parts = zip(own["part"], own["slope"], own["standard_error"], strict=True)
        of_parts = (f"K^{slope:.2f} (± {error:.2f}) for the {part}" for part, slope, error in parts)
        lines += textwrap.wrap(f"{name}: SNR ~ {', '.join(of_parts)}", WIDTH)
    for note in (*comparison.verdict, *(f"left out: {name}: {why}" for name, why in comparison.skipped.items())):
        lines += textwrap.wrap(f"- {note}", WIDTH)
    return "\n".join(lines)


def _verdict(comparison: Comparison) -> list[str]:
    table, said = comparison.table, []
    for part in PARTS:
        excess = table[f"{part}_bias"] / table[f"{part}_bias_standard_error"]
        biased = table[excess > BIASED]
        for name in biased["estimator"].drop_duplicates():
            where = ", ".join(f"{K}" for K in biased["K"][biased["estimator"] == name])
            said.append(f"{name}: the {part}'s gradient is biased at K = {where}")
    for _, row in comparison.slopes.iterrows():
        if row["slope"] < min(-0.1, -3 * row["standard_error"]):
            said.append(f"{row['estimator']}: the signal of the {row['part']}'s gradient drowns with K")
    trained = table[table["trained"].notna()]
    if len(trained):
        best = trained.loc[trained["trained"].idxmax()]
        text = f"{best['estimator']}, K = {best['K']} trains best, log p(x) = {best['trained']:.2f}"
        others = trained[(trained["trained_high"] >= best["trained_low"]) & (trained.index != best.name)]
        if len(others) > 4:
            text += f"; {len(others)} others are within the 95 % intervals"
        elif len(others):
            named = (f"{name}, K = {K}" for name, K in zip(others["estimator"], others["K"], strict=True))
            text += f"; within the 95 % intervals: {'; '.join(named)}"
        said.append(text)
    return said


def _numbers(values: Iterable[float], digits: int = 2) -> list[str]:
    def shown(value: float) -> str:
        return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.2e}"

    return ["–" if math.isnan(value) else shown(value) for value in values]


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"
