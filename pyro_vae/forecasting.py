"""What follows the sequences of a data set: draws of the steps to come, and their times."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data import Split, as_data, rows_of, tensor_of
from .evaluation import MAX_ELEMENTS, isolated
from .nn import positive
from .sources import Columns, is_frame, read_future, read_npy
from .sources.times import after, padded, spacing, written

__all__ = ["Forecast", "forecast"]

NUM_STEPS = 10


@dataclass(frozen=True, eq=False)
class Forecast:
    """Draws of what follows N sequences.

    Attributes:
        split: the sequences themselves: those of the data, or the end of the one series that they are pieces of, which
            is not for scores.
        num_before: (N,), how many steps each sequence has in the split, a series in all its pieces.
        draws: x of the H steps after these, (K, N, H, D), in the units that the model sees.
        times: of the H steps, (N, H), in the kind of `split.times`; None where they cannot be told.
    """

    split: Split
    num_before: Tensor
    draws: Tensor
    times: np.ndarray | None


def forecast(
    model: Any,
    guide: Callable,
    split: Any,
    *,
    num_steps: int | None = None,
    inputs: Any = None,
    num_samples: int = 1000,
    seed: int = 0,
) -> Forecast:
    """Draws of what follows each sequence of a split: z at its last step by the guide, then the model's own steps.

    The pieces of a series (`window` of `load_dataset`) are taken as the one sequence that they are, those of each id by
    themselves, of which the last `window` steps are seen. ``dataset.restore(found.draws)`` is in the original units.

    Args:
        model: a `StateSpaceModel`.
        split: of a data set; or sequences (N, T, D), alone or as ``(x, {"lengths": ..., "u": ...})``.
        num_steps: H; by default as many as there are inputs to come, or 10.
        inputs: of a model with inputs, those to come: (N, H, C), a tensor or array in the split's order; or a `.csv`
            or a pandas frame with the columns of id, time and inputs that the data were read with: sequences that have
            rows in it are forecast, as many steps for each, from the first one after the sequence's last; or a `.npy`
            of shape (N, H, C).
        num_samples: K.

    Raises:
        ValueError: inputs to come that a model needs or does not take; columns, ids, times or shapes that do not go on
            from the split.

    Example:
        >>> from pyro_vae import load_dataset
        >>> from pyro_vae.guides import StateSpaceGuide
        >>> from pyro_vae.models import DeepMarkovModel, likelihoods
        >>> swings = load_dataset("stochastic_volatility")
        >>> model = DeepMarkovModel((1,), 2, 5, likelihood=likelihoods.Normal())
        >>> forecast(model, StateSpaceGuide(model), swings.test, num_steps=3, num_samples=20).draws.shape
        torch.Size([20, 50, 3, 1])
    """
    num_steps = None if num_steps is None else positive("num_steps", num_steps)
    num_samples = positive("num_samples", num_samples)
    if not isinstance(split, Split):
        own = as_data(split, model, guide)
        x = own.args[0]
        every_step = {} if "lengths" in own.kwargs else {"lengths": torch.full((len(x),), x.shape[1])}
        split = Split(own.args, own.kwargs | every_step)
    if not hasattr(model, "forecast"):
        raise ValueError(
            f"expected a StateSpaceModel to forecast by, got {type(model).__name__}: train one on sequences"
        )
    C = model.num_inputs
    if C and inputs is None:
        raise ValueError(
            "expected inputs= (--inputs), a file of the inputs of each step to come, for a model with inputs, got "
            "none: name it"
        )
    if inputs is not None and not C:
        raise ValueError(
            f"expected no inputs= (--inputs) for a model without inputs, got {str(inputs)!r}: leave it out"
        )
    source = split.roles
    num_before, every = split.kwargs["lengths"].cpu(), source.get("every")
    series = _series(split) if "window" in source else [np.array([i]) for i in range(len(split))]
    if split.times is not None:
        of_each = [times[:T] for times, T in zip(split.times, num_before.tolist(), strict=True)]
        every = every or spacing([np.concatenate([of_each[i] for i in rows]) for rows in series])
    if "window" in source:
        num_before = torch.stack([num_before[rows].sum() for rows in series])
        split = _ends(split, series, source["window"])
    u = times = None
    H = num_steps or NUM_STEPS
    if inputs is not None:
        rows, u, times = _to_come(inputs, split, every)
        split, num_before = rows_of(split, rows), num_before[rows]
        H = num_steps or u.shape[1]
        if u.shape[1] < H:
            raise ValueError(
                f"expected inputs of {H} steps in {inputs}, got {u.shape[1]}: add rows, or lower num_steps"
            )
        u, times = u[:, :H], None if times is None else times[:, :H]
    elif split.times is not None and every is not None:
        times = np.stack([after(last, every, H) for last in _last(split)])

    device = next((p.device for p in model.parameters()), split.device)
    N, T, D = split.x.shape
    draws = torch.empty(num_samples, N, H, D, dtype=split.x.dtype)
    most = max(1, MAX_ELEMENTS // (num_samples * (T + H) * max(D, model.latent_dim)))
    with isolated(model, guide):
        torch.manual_seed(seed)
        for index in torch.arange(N).split(most):
            args, kwargs = split.batch(index)
            given = {name: value.to(device) for name, value in kwargs.items()}
            to_come: dict[str, Any] = {"num_steps": H} if u is None else {"u_future": u[index].to(device)}
            found = model.forecast(guide, *(a.to(device) for a in args), num_samples=num_samples, **given, **to_come)
            draws[:, index] = found.cpu()
    return Forecast(split, num_before, draws, times)


def _series(split: Split) -> list[np.ndarray]:
    """The rows of each series that is cut into pieces: those of one id, or all."""
    ids = np.zeros(len(split), dtype=int) if split.ids is None or not _is_named(split) else split.ids
    found = [np.flatnonzero(ids == each) for each in dict.fromkeys(ids.tolist())]
    return found if split.times is None else [rows[np.argsort(split.times[rows, 0], kind="stable")] for rows in found]


def _is_named(split: Split) -> bool:
    """Whether ids are those of a column, and do not count the pieces."""
    return "id" in (split.roles)


def _ends(split: Split, series: list[np.ndarray], num_steps: int) -> Split:
    """The last steps of series that are cut into pieces, as one sequence each."""
    lengths = split.kwargs["lengths"].cpu()
    there = torch.arange(split.x.shape[1]) < lengths[:, None]
    totals = [min(num_steps, int(lengths[rows].sum())) for rows in series]

    def ends(steps: Tensor) -> Tensor:
        steps = steps.cpu()
        parts = [steps[rows][there[rows]][-total:] for rows, total in zip(series, totals, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(split.device)

    of_steps = {name: ends(each) for name, each in split.kwargs.items() if each.ndim > 1}
    times = None
    if split.times is not None:
        last = [split.times[rows][there[rows].numpy()][-n:] for rows, n in zip(series, totals, strict=True)]
        times = padded(last, max(totals))
    return replace(
        split,
        args=(ends(split.x),),
        kwargs={"lengths": lengths.new_tensor(totals).to(split.device), **of_steps},
        log_jacobian=math.nan,  # only the pieces' are known
        labels=None,
        ids=np.array([split.ids[rows[0]] for rows in series]) if split.ids is not None and _is_named(split) else None,
        latents=None,
        times=times,
        parts=None,
    )


def _last(split: Split) -> np.ndarray:
    """(N,), the time of each sequence's last step."""
    assert split.times is not None
    return split.times[np.arange(len(split)), split.kwargs["lengths"].cpu().numpy() - 1]


def _to_come(inputs: Any, split: Split, every: str | None) -> tuple[list[int], Tensor, np.ndarray | None]:
    """Which sequences there are inputs for, these (N, H, C), and their times (N, H), if they are known."""
    source, given = split.roles, None if is_frame(inputs) else tensor_of(inputs)
    path = "inputs" if isinstance(given, Tensor) else "the frame" if given is None else Path(inputs)
    if isinstance(given, Tensor) or split.times is None:
        if given is None:
            raise ValueError("expected inputs of data without times as a tensor or array (N, H, C), got a frame")
        u = given if isinstance(given, Tensor) else read_npy(Path(path)).x
        C = split.kwargs["u"].shape[-1] if "u" in split.kwargs else 0
        are_finite = bool(u.float().isfinite().all())
        if u.ndim != 3 or u.shape[::2] != (len(split), C) or not are_finite:
            came = f"shape {tuple(u.shape)}" if are_finite else "some that are infinite or missing"
            raise ValueError(
                f"expected finite numbers of shape ({len(split)}, H, {C}) in {path}, got {came}: give inputs of the "
                f"steps after each sequence of the split {split.name!r}"
            )
        known = split.times is not None and every is not None
        times = np.stack([after(last, str(every), u.shape[1]) for last in _last(split)]) if known else None
        return list(range(len(split))), u.to(split.x.dtype), times
    found = read_future(
        inputs if given is None else path,
        Columns(id=source.get("id"), time=source["time"], inputs=tuple(source["inputs"])),
    )
    assert found.lengths is not None and found.times is not None
    if found.times.dtype != split.times.dtype:
        raise ValueError(f"expected times in {path} as in the data, got {written(found.times[0, 0])}: write them alike")
    row_of = {str(id): i for i, id in enumerate([""] if split.ids is None else split.ids)}
    names = [""] if found.ids is None else [str(id) for id in found.ids]
    if unknown := [name for name in names if name not in row_of]:
        raise ValueError(
            f"expected ids of the split {split.name!r}, such as {min(row_of)!r}, in {path}, got {unknown[0]!r}: "
            "correct it, or name another --split"
        )
    lengths, rows, last = found.lengths.tolist(), [row_of[name] for name in names], _last(split)
    H = lengths[0]
    if min(lengths) != max(lengths):
        i = next(i for i, length in enumerate(lengths) if length != H)
        raise ValueError(
            f"expected as many rows for each id in {path}, got {H} for {names[0]!r} and {lengths[i]} for {names[i]!r}: "
            "make them even"
        )
    for name, row, times in zip(names, rows, found.times, strict=True):
        whose = f" for {name!r}" if name else ""
        if times[0] <= last[row]:
            raise ValueError(
                f"expected times after {written(last[row])}{whose} in {path}, got {written(times[0])}: leave out what "
                "has been"
            )
        expected = times[:H] if every is None else after(last[row], every, H)
        far = np.abs(expected - times[:H]) > 1e-6 * np.abs(expected[0] - last[row])
        if far.any():
            raise ValueError(
                f"expected a row{whose} at {written(expected[far][0])} in {path}, got {written(times[:H][far][0])}: "
                f"give one every {every} from the end of the data on"
            )
    return rows, found.x[:, :H].float(), found.times[:, :H]
