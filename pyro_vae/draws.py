"""Several draws in one call of a program, and whether one call gives what as many calls give."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .distributions import rearranged

__all__ = ["DRAWS", "DrawsPlate", "SeparateDrawsWarning", "are_joint", "difference", "log_prob_of", "warn_of"]

DRAWS = "_draws"
DROPOUTS = {
    getattr(torch.nn.functional, name)
    for name in (
        *("dropout", "dropout1d", "dropout2d", "dropout3d"),
        *("alpha_dropout", "feature_alpha_dropout"),
    )
} | {torch.dropout, torch.feature_dropout, torch.alpha_dropout}
ATTENTION = {
    torch.nn.functional.scaled_dot_product_attention,
    torch.nn.functional.multi_head_attention_forward,
}
RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


class SeparateDrawsWarning(UserWarning):
    """A program gives other numbers for several draws in one call, so that each draw has a call of its own."""


class DrawsPlate(pyro.plate):
    """The plate of K draws, left of all others, around the sites within a plate, or around all where there is none.

    One draw has no plate: the programs run as they are.
    """

    def __init__(self, num_draws: int, nesting: int, within: str | None) -> None:
        with poutine.block():
            super().__init__(DRAWS, num_draws, dim=-1 - nesting)
        self.within, self.one = within, num_draws == 1

    def _process_message(self, message: Any) -> None:
        if message["type"] != "sample" or self.one or _is_subsample(message):
            return
        names = [frame.name for frame in message["cond_indep_stack"] if frame.vectorized and frame.name != DRAWS]
        if self.within is None or self.within in names:
            super()._process_message(message)


def warn_of(problem: str) -> None:
    """Say that draws are made one by one from now on, and why."""
    warnings.warn(
        f"{problem}: the draws are made one by one from here on, which is slower. Fix: count dimensions from the right "
        "in the program, as in softmax(-1) and flatten(-2), keep rows apart, and make noise by sample statements",
        SeparateDrawsWarning,
        stacklevel=2,
    )


def are_joint(programs: Sequence[Callable], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether two draws of programs of one plate may be made in one call; a warning says why not."""
    with torch.random.fork_rng():
        problem = difference(programs, args, kwargs, num_draws=2, nesting=1, within=None)
    if problem is not None:
        warn_of(problem)
    return problem is None


def difference(
    programs: Sequence[Callable],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    num_draws: int,
    nesting: int,
    within: str | None,
) -> str | None:
    """How several draws in one call score otherwise than the first and the last of them in calls of their own; None
    where they do not.

    The first of the programs makes the draws, the others are run at them. All are scored at the same values, with
    dropout left out, as far as torch's functions do it. Run it where random state and buffers are preserved.

    Args:
        programs: a guide and a model, or a guide alone.
        num_draws: K. nesting: how many dimensions the programs' plates take. within: as for `DrawsPlate`.

    Example:
        >>> import pyro.distributions as dist
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(4, 3), 1.0).to_event(1))
        ...         pyro.sample("y", dist.Normal(z.softmax(1), 1.0).to_event(1))
        >>> difference([guide], (torch.zeros(4),), {}, 2, 1, "data")
        '2 draws in one call give site "y" another log-probability than a call for each'
    """
    plate = DrawsPlate(num_draws, nesting, within)
    with torch.no_grad(), pyro.validation_enabled(False), _WithoutDropout():
        try:
            with plate:
                drawn = poutine.trace(programs[0]).get_trace(*args, **kwargs)
            joint = [*_scores(programs, drawn, args, kwargs, plate)]
        except Exception as error:
            own = poutine.trace(programs[0]).get_trace(*args, **kwargs)
            for _ in _scores(programs, own, args, kwargs):
                pass  # what a single draw raises is the user's to see
            message = str(error).strip().partition("\n")[0]
            return f"{num_draws} draws in one call raise {type(error).__name__}: {message}"
        for k in (0, num_draws - 1):
            single = _single(drawn, k, nesting)
            for of_all, own in zip(joint, _scores(programs, single, args, kwargs), strict=True):
                for name, (log_prob, is_inverted) in own.items():
                    its, _ = of_all[name]
                    at = its.dim() - 1 - nesting
                    its = its if at < 0 or its.shape[at] == 1 else its.select(at, k)
                    if not _alike(its, log_prob, is_inverted):
                        again = [*_scores(programs, single, args, kwargs)]
                        if any(name in each and not _alike(each[name][0], log_prob, is_inverted) for each in again):
                            return f'site "{name}" has another log-probability at each call, of noise of its own'
                        return (
                            f'{num_draws} draws in one call give site "{name}" another log-probability than a call '
                            "for each"
                        )
    return None


def log_prob_of(site: Mapping[str, Any]) -> Tensor:
    """``ln p`` of a site's value. Whole numbers that are observed are scored as real ones, as 255 + 1 is 0 in uint8.

    A distribution that takes whole numbers alone, as indices, is given them.
    """
    p, value = site["fn"], site["value"]
    if not site["is_observed"] or not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
        return p.log_prob(value)
    wide = value.dtype in (torch.int32, torch.int64)  # of which float32 does not hold all
    try:
        return p.log_prob(value.to(torch.float64 if wide else torch.get_default_dtype()))
    except (IndexError, RuntimeError, TypeError, ValueError):
        return p.log_prob(value)


def _scores(
    programs: Sequence[Callable], drawn: poutine.Trace, args: Any, kwargs: Any, plate: Any = None
) -> Iterator[dict[str, tuple[Tensor, bool]]]:
    """Log-probabilities of the sites of each program at given draws, and whether a transform is inverted for them. The
    rows of plates are added to the draws."""
    for program in programs:
        with plate or contextlib.nullcontext():
            trace = poutine.trace(poutine.replay(program, drawn)).get_trace(*args, **kwargs)
        scores = {}
        for name, site in trace.nodes.items():
            if site["type"] != "sample":
                continue
            if _is_subsample(site):
                if name not in drawn:
                    drawn.add_node(name, **site)  # its rows are those of every call
            elif not _is_point(site["fn"]):
                log_prob = log_prob_of(site)
                if site["mask"] is not None:
                    log_prob = torch.where(torch.as_tensor(site["mask"]), log_prob, log_prob.new_zeros(()))
                scores[name] = log_prob, _is_transformed(site["fn"])
        yield scores


def _single(drawn: poutine.Trace, k: int, nesting: int) -> poutine.Trace:
    """Draw k alone, its values of the shapes that a call without the plate of draws gives."""
    single = poutine.Trace()
    for name, site in drawn.nodes.items():
        if site["type"] != "sample" or site["is_observed"]:
            continue
        site, value = site.copy(), site["value"]
        frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        if any(frame.name == DRAWS for frame in frames):
            event, own = site["fn"].event_dim, max((-frame.dim for frame in frames if frame.name != DRAWS), default=0)

            def one(value: Tensor, event: int = event, own: int = own) -> Tensor:
                value = value.select(value.dim() - event - 1 - nesting, k)
                return value.reshape(value.shape[value.dim() - own - event :])

            site["value"] = rearranged(value, one)
            site["cond_indep_stack"] = tuple(f for f in site["cond_indep_stack"] if f.name != DRAWS)
        single.add_node(name, **site)
    return single


def _alike(a: Tensor, b: Tensor, is_inverted: bool) -> bool:
    """Up to rounding, which flows amplify where they are inverted."""
    tolerance = (1e-4 if torch.finfo(b.dtype).eps > 1e-10 else 1e-10) * (10 if is_inverted else 1)
    a, b = torch.broadcast_tensors(a.double(), b.double())
    off = (a - b).abs() > tolerance * (1 + b.abs())
    return not bool((off | (a.isfinite() != b.isfinite())).any())


def _is_transformed(distribution: Any) -> bool:
    while not isinstance(distribution, torch.distributions.TransformedDistribution):
        if not hasattr(distribution, "base_dist"):
            return False
        distribution = distribution.base_dist
    return True


def _is_point(distribution: Any) -> bool:
    """Whether its density is that of one value, which is none at the next number beside."""
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return isinstance(distribution, pyro.distributions.Delta)


def _is_subsample(site: Mapping[str, Any]) -> bool:
    return type(site["fn"]).__name__ == "_Subsample"


class _WithoutDropout(TorchFunctionMode):
    """Dropout leaves everything as it is, so that calls can be held against each other."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if function is torch.nn.functional.rrelu:
            return torch.nn.functional.rrelu(*args[:3], **{**kwargs, "training": False, "inplace": False})
        if function in RECURRENT or function in ATTENTION:
            args = tuple(0.0 if isinstance(each, float) else each for each in args)
            kwargs = {**kwargs, "dropout_p": 0.0} if "dropout_p" in kwargs else kwargs
        return function(*args, **kwargs)
