"""`fit`: the training loop, and `Run`, what it leaves behind."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import json
import math
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import tomli_w
import torch
from pyro import poutine
from pyro.infer import (
    ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from pyro.poutine import runtime
from pyro.poutine.messenger import Messenger
from torch import Tensor

from . import checkpoint, prediction
from .compiled import get_random_state, preserved, set_random_state
from .config import build, describe, plain
from .data import (
    Data,
    Dataset,
    Schema,
    SchemaWarning,
    Split,
    as_data,
    columns_of,
    joined,
    like_columns,
    load_again,
    load_dataset,
    read,
    spans_of,
)
from .estimators import ConstrainedELBO, Estimator
from .evaluation import Evaluation, check_support, evaluate, evaluating, of_the_library
from .forecasting import Forecast, forecast
from .log_weights import check_draws_alone, samples
from .optim import Optimizer
from .progress import Bar
from .schedules import Schedule
from .sources import is_frame
from .svi import SVI, CompiledSVI, LatentScale, NonFiniteLossError, latent_scale, load_modules, modules_of

__all__ = ["Interrupted", "Run", "fit", "load_run", "select_device"]

Callback = Callable[["Run"], Any]
SCHEMA = "schema.json"
SAVE_EVERY = 10.0  # seconds between checkpoints
WORTH_COMPILING = 5_000  # steps
TRAINING = threading.Lock()  # held by the process's training
LINEAR = Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO  # in the KL weight


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a training, whose state is saved.

    Attributes:
        run: the directory to go on with, ``fit(..., resume=run)``.
    """

    run: Path | None = None


class Run:
    """A trained pair and its directory.

    `path` holds ``config.toml`` as resolved, ``schema.json``, the record of the data, ``metrics.jsonl`` (a line per
    epoch), ``checkpoints/`` and ``model.safetensors``. `schema` is that record, None of runs by earlier versions; where
    it names columns, `evaluate`, `encode`, `scores` and their like take pandas frames and paths too, in original units,
    and match them by name. Tensors and arrays are in the units that the model sees. `history` is the list of the lines
    of ``metrics.jsonl``: ``epoch``, ``steps``, ``bound`` and ``valid`` (nats per datum, higher is better),
    ``kl_weight``, ``learning_rate``, ``seconds``, and what the loss records, such as the multipliers of
    `ConstrainedELBO`.
    """

    def __init__(self, model: Any, guide: Any, path: Path, config: dict[str, Any]) -> None:
        self.model, self.guide, self.path, self.config = model, guide, path, config
        self.tensors: dict[str, Tensor] = {}  # those that the configuration names
        self._schema: Schema | None = None
        self.history: list[dict[str, Any]] = []

    def __repr__(self) -> str:
        last = f", bound {self.history[-1]['bound']:.2f}" if self.history else ""
        return f"Run({str(self.path)!r}, {len(self.history)} epochs{last})"

    def dataset(self) -> Dataset:
        """The data set that the run was trained on, loaded again: its rows in their splits and units.

        Raises:
            ValueError: the run was trained on tensors, whose source it does not know. FileNotFoundError: the file is
                gone.

        Warns:
            SchemaWarning: the file has changed since.
        """
        if self._schema is not None:
            return load_again(self._schema)
        source = self._source()
        if source is None:
            raise ValueError(f"expected a data set's name in {self.path / 'config.toml'}, found none: pass the data")
        return load_dataset(**source)

    def _source(self) -> dict[str, Any] | None:
        """The arguments of `load_dataset` in a configuration, which may come from anywhere."""
        source = self.config.get("data")
        if source is None:
            return None
        where = self.path / "config.toml"
        if not isinstance(source, Mapping) or "name_or_path" not in source:
            raise ValueError(f"expected a table [data] with name_or_path in {where}, got {source!r}: correct it")
        if unknown := source.keys() - inspect.signature(load_dataset).parameters.keys():
            raise ValueError(f"expected options of data in {where}, got {min(unknown)!r}: leave it out")
        return dict(source)

    def read(self, data: Any, **options: Any) -> Split:
        """`pyro_vae.data.read`: other data in the units of this run, such as a file or a pandas frame."""
        if self.schema is None:
            raise ValueError(f"expected a run that knows the units of its data, got {self.path}: pass tensors")
        return read(self.schema, data, **options)

    @property
    def schema(self) -> Schema | None:
        """The record of the data. Of a run by an earlier version, which has none, it is learned from the file that the
        run was trained on, with a warning, or None where there is no such file."""
        if self._schema is None and (source := self._source()) is not None:
            try:
                self._schema = load_dataset(**source).schema
            except FileNotFoundError:
                return None
            warnings.warn(
                f"{self.path} has no schema.json, as it is of an earlier version: its units are read from "
                f"{source['name_or_path']} anew",
                SchemaWarning,
                stacklevel=2,
            )
        return self._schema

    @schema.setter
    def schema(self, schema: Schema) -> None:
        self._schema = schema

    def _given(self, data: Any) -> Any:
        """What has names or a place is read in the units of the run."""
        if isinstance(data, str | Path):
            return self.read(data)
        if columns_of(data) is None or self.schema is None or self.schema.names is None:
            self._check_shape(data)
            return data
        return (self.read(data[0]).observed, *data[1:]) if isinstance(data, tuple) else self.read(data)

    def _check_shape(self, data: Any) -> None:
        """Raises ValueError where tensors have another width than those of the training."""
        first = data[0] if isinstance(data, tuple) and data else data
        if self._schema is None or not isinstance(first, Tensor | np.ndarray):
            return
        steps = ("T",) * self._schema.sequences
        own, came = ("N", *steps, *self._schema.event_shape), first.shape
        wanted = f"expected data of shape ({', '.join(map(str, own))}), as in the training"
        if len(came) != len(own) or (own[-1] != "N" and came[-1] != own[-1]):
            raise ValueError(f"{wanted}, got {tuple(came)}: give such rows")
        C = getattr(self.model, "num_inputs", 0) if steps else 0
        named = data[-1] if isinstance(data, tuple) and isinstance(data[-1], Mapping) else {}
        u = named.get("u")
        if C and (u is None or tuple(u.shape) != (*came[:2], C)):
            raise ValueError(
                f"{wanted}, and inputs of shape {(*came[:2], C)}, got {'none' if u is None else tuple(u.shape)}: give "
                '(x, {"lengths": ..., "u": ...})'
            )

    def evaluate(self, data: Any, **options: Any) -> Evaluation:
        """`pyro_vae.evaluate` of this pair.

        Warns:
            SchemaWarning: rows of a file or frame are among those that the run was trained on.
        """
        given = self._given(data)
        parts = given.parts if isinstance(given, Split) and given is not data else None
        if parts is not None and (seen := int((parts != "test").sum())):
            warnings.warn(
                f"{seen:,} of {len(given):,} rows are of the training or validation split, and scored with the others: "
                'split = run.read(data), then split.parts == "test" tells which are not',
                SchemaWarning,
                stacklevel=2,
            )
        return evaluate(self.model, self.guide, given, **options)

    def sample(self, num_samples: int, **options: Any) -> Tensor:
        """`pyro_vae.prediction.sample` of this model, given values of its global sites, if any.

        Raises:
            ValueError: it has some, and none were given: their prior knows nothing of the data.
        """
        if "given" not in options and (shared := prediction.global_sites(self.model, **options)):
            raise ValueError(
                f"expected values of the global sites {shared} to draw data at, got none: run.sample(..., "
                "given=pyro_vae.prediction.global_values(run.guide, data))"
            )
        return prediction.sample(self.model, num_samples, **options)

    def encode(self, data: Any, **options: Any) -> prediction.Encoding:
        """`pyro_vae.prediction.encode` by this guide, of data in the support of this model's likelihood."""
        given = self._given(data)
        prediction.check_data(self.model, self.guide, given)
        return prediction.encode(self.guide, given, **options)

    def decode(self, z: Any, **options: Any) -> Tensor:
        """`pyro_vae.prediction.decode` by this model."""
        return prediction.decode(self.model, z, **options)

    def reconstruct(self, data: Any, **options: Any) -> Tensor:
        """`pyro_vae.prediction.reconstruct` by this pair."""
        return prediction.reconstruct(self.model, self.guide, self._given(data), **options)

    def denoise(self, corrupted: Any, **options: Any) -> Tensor:
        """`pyro_vae.prediction.denoise` by this pair."""
        return prediction.denoise(self.model, self.guide, self._given(corrupted), **options)

    def interpolate(self, a: Any, b: Any, **options: Any) -> Tensor:
        """`pyro_vae.prediction.interpolate` by this pair."""
        return prediction.interpolate(self.model, self.guide, a, b, **options)

    def scores(self, data: Any, **options: Any) -> prediction.Scores:
        """`pyro_vae.prediction.scores` by this pair."""
        return prediction.scores(self.model, self.guide, self._given(data), **options)

    def forecast(self, data: Any = None, **options: Any) -> Forecast:
        """`pyro_vae.forecast` by this pair of what follows `data`, a split or what `read` takes; by default all data of
        the run."""
        if data is None:
            dataset = self.dataset()
            data = joined([dataset.train, dataset.valid, dataset.test])
        return forecast(self.model, self.guide, self._given(data), **options)

    def to_arviz(self, data: Any, **options: Any) -> Any:
        """`pyro_vae.prediction.to_arviz` of this pair."""
        return prediction.to_arviz(self.model, self.guide, self._given(data), **options)


def fit(
    model: Callable,
    guide: Callable,
    train: Any,
    *,
    valid: Any = None,
    loss: Any = None,
    optimizer: Optimizer | None = None,
    learning_rate: Schedule | float | None = None,
    kl_weight: Schedule | float | None = None,
    epochs: int = 100,
    batch_size: int | None = None,
    clip_norm: float | None = None,
    patience: int | None = None,
    callbacks: Sequence[Callback] = (),
    device: str = "auto",
    compile: bool | None = None,
    seed: int = 0,
    out: Path | str | None = None,
    overwrite: bool = False,
    resume: Path | str | None = None,
    progress: bool = True,
) -> Run:
    """Train `model` and `guide` on `train` with Pyro's SVI; every epoch is scored on `valid`.

    Args:
        model, guide: Pyro programs: modules, or plain functions with ``pyro.param``.
        train, valid: a tensor; a tuple of tensors, optionally ending in a dict of keyword tensors, all indexed
            together; or a split of a data set.
        loss: any ELBO of Pyro's form, or its class; ``Trace_ELBO()`` by default.
        optimizer: one of ``pyro.optim``, or a callable from parameters to a torch optimiser; Adam at 1e-3 by default.
        learning_rate: the optimiser's rate as a number, or a factor of the optimiser's own rate as a pure function of
            the epoch (`pyro_vae.schedules`).
        kl_weight: of every latent site in model and guide: a number, or a pure function of the epoch.
        patience: stop after this many epochs without a better validation bound, and return the best weights.
        callbacks: each is called with the `Run` after every epoch; one that returns True ends the training.
        device: ``"auto"`` is CUDA where there is one.
        compile: train with `CompiledSVI`; by default where there are steps enough to pay for the compilation.
        seed: of the draws and of the data's order. The user's own random state is left as it was.
        out: the run's directory; ``runs/0001`` and so on by default.
        resume: the directory of a run to go on with; on the same CPU it ends in the same bits as one never interrupted.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: arguments that do not fit, with the mend; another process, or
            another training of this one, that is under way.
        NonFiniteLossError: before the weights take a NaN; the last checkpoint stays. Its `run` is the directory.
        Interrupted: a KeyboardInterrupt, after the state has been saved. Its `run` is the directory.

    Example:
        >>> import tempfile
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> model = VAE((4,), latent_dim=2)
        >>> guide = AmortizedGuide(model)
        >>> run = fit(model, guide, torch.ones(100, 4), epochs=2, out=tempfile.mkdtemp(), progress=False)
        >>> run.history[1]["bound"] > run.history[0]["bound"]
        True
    """
    learning_rate, kl_weight, epochs, batch_size, clip_norm, patience, seed = map(
        plain, (learning_rate, kl_weight, epochs, batch_size, clip_norm, patience, seed)
    )
    _check_numbers(epochs, batch_size, clip_norm, patience, seed)
    _check_caller(model, guide, loss)
    with _surroundings(seed, select_device(device)) as place, _interruptions() as interrupted:
        data = _of_its_own(as_data(train, model, guide)).to(place)
        if isinstance(train, Split) and train.schema is not None and is_frame(valid):
            valid = read(train.schema, valid)  # frames are in original units
        valid = like_columns(train, valid)
        held_out = None if valid is None else _of_its_own(as_data(valid, model, guide)).to(place)
        loss = _loss(loss)
        optimizer = functools.partial(torch.optim.Adam, lr=1e-3, fused=True) if optimizer is None else optimizer
        batch_size = min(100, len(data)) if batch_size is None else batch_size
        _check_data(data, batch_size, patience, held_out)
        _check_optimizer(optimizer)
        _check_schedules(loss, optimizer, learning_rate, kl_weight)
        rate = _checked_schedule("learning_rate", learning_rate, epochs)
        if compile is None:
            long = epochs * len(data) >= WORTH_COMPILING * batch_size
            compile = long if resume is None else _was_compiled(resume)
        for module in modules_of(model=model, guide=guide, loss=loss).values():
            module.to(place).train()
        svi = (CompiledSVI if compile else SVI)(model, guide, optimizer, loss, clip_norm=clip_norm)
        weight = _checked_schedule("kl_weight", kl_weight, epochs)
        scale = latent_scale(1.0, place) if weight else None
        _make_parameters(svi, scale, data, held_out, batch_size, seed)
        settings: dict[str, Any] = {
            **{"epochs": epochs, "batch_size": batch_size, "clip_norm": clip_norm, "patience": patience},
            **{"data": getattr(data, "source", None), "seed": seed, "device": place},
            **{"model": model, "guide": guide, "loss": loss, "optimizer": optimizer},
            **{"learning_rate": learning_rate, "kl_weight": kl_weight},
        }
        path = checkpoint.new_run(out, overwrite) if resume is None else checkpoint.begun_run(resume)
        with checkpoint.locked(path), _told(path):
            tensors: dict[str, Tensor] = {}
            run = Run(model, guide, path, describe(settings, tensors))
            run.tensors, run.schema = tensors, _schema(data, held_out, columns_of(train))
            state = _State(svi, run, _generator(place, seed), data, {"seed": seed, "batch_size": batch_size})
            try:
                state.resume(patience) if resume is not None else state.begin()
            except BaseException:
                if resume is None:
                    checkpoint.discard_run(path)
                raise
            if progress and isinstance(svi, CompiledSVI) and svi.compiled:
                Bar.write(f"compiled the step in {svi.compile_seconds:.0f} s", file=sys.stderr)
            steps_per_epoch = -(-len(data) // batch_size)
            bar = Bar(
                total=epochs * steps_per_epoch, initial=svi.steps, unit="step", disable=None if progress else True
            )
            with bar:
                while state.epoch < epochs and not state.finished:
                    batches = data.batches(batch_size, _generator("cpu", seed, state.epoch))
                    for index in batches[state.position :]:
                        _set_rates(svi, svi.steps / steps_per_epoch, learning_rate, rate, weight, scale)
                        state.step(index, scale)
                        bar.update()
                        if interrupted.is_set() or time.monotonic() - state.saved > SAVE_EVERY:
                            svi.settle()
                            state.save()
                        if interrupted.is_set():
                            raise Interrupted(f"saved at step {svi.steps}: go on with resume={str(path)!r}")
                    svi.settle()
                    state.end_epoch(held_out, weight((svi.steps - 1) / steps_per_epoch) if weight else 1.0, patience)
                    last = state.run.history[-1]
                    shown = {key: f"{last[key]:.2f}" for key in ("bound", "valid") if key in last}
                    bar.set_postfix(epoch=f"{state.epoch}/{epochs}", **shown)
                    if any([callback(state.run) is True for callback in callbacks]):  # noqa: C419  each is called
                        state.finished = True
            return state.end(best=patience is not None)


def load_run(path: Path | str, *, model: Any = None, guide: Any = None, device: str = "cpu") -> Run:
    """The run at `path`, with its model and guide made from ``config.toml`` and their trained weights.

    Hand over `model` and `guide` where they are the user's own objects that no import path leads to. ``config.toml``
    names classes, which are imported and called: trust a run's directory as you trust code. The weights are only data.

    Raises:
        FileNotFoundError: no run there. ValueError: a truncated or foreign file, or another architecture.
    """
    path = Path(path)
    weights = checkpoint.weights_of(path)
    config = checkpoint.recorded_config(path, weights)
    if (text := checkpoint.changed_config(path, config)) is not None:
        warnings.warn(text, stacklevel=2)
    if not {"model", "guide"} <= config.keys():
        raise ValueError(
            f"expected the sections model and guide in {path / 'config.toml'}, found {sorted(config)}: "
            "name a run's directory"
        )
    given = {name: value for name, value in (("model", model), ("guide", guide)) if value is not None}
    state = checkpoint.load(weights)
    tensors = state.get("tensors", {})
    with torch.random.fork_rng():
        built = build({name: config[name] for name in ("model", "guide") if name not in given}, tensors, **given)
    run = Run(built["model"], built["guide"], path, config)
    run.tensors = tensors
    if "schema" in state:
        run.schema = schema = Schema.from_state(state["schema"], str(weights))
        _warn_of_schema(path / SCHEMA, schema)
    programs = {"model": run.model, "guide": run.guide}
    for name, module in modules_of(**programs).items():
        floating = [value.dtype for value in state.get(name, {}).values() if value.is_floating_point()]
        module.to(device=select_device(device), dtype=floating[0] if floating else None).eval()
    load_modules(modules_of(**programs), state)
    _feed_as_trained(programs, state)
    run.model, run.guide = (_with_params(program, state["params"]) for program in programs.values())
    run.history = state["history"] if "history" in state else _history(path, state.get("epochs"))
    return run


def _scaling_parts(programs: Mapping[str, Any]) -> list[Any]:
    """The likelihoods, which say on what scale networks are fed the data."""
    modules = modules_of(**programs).values()
    return [part for module in modules for part in module.modules() if hasattr(part, "as_they_are")]


def _feed_as_trained(programs: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Networks are fed what they were trained on: in a run before there was a schema, data as they are."""
    as_they_are = state.get("as_they_are", "schema" not in state)
    for part in _scaling_parts(programs):
        part.as_they_are = as_they_are


def _schema(data: Data, held_out: Data | None, columns: Sequence[str] | None) -> Schema:
    """The record that a split has, of what is trained on and validated on in fact; or one of tensors."""
    if isinstance(data, Split) and data.schema is not None and data.checksums is not None:
        valid = getattr(held_out, "checksums", None)
        valid = data.checksums[:0] if valid is None else valid
        test = data.schema.others(data.checksums, valid)
        sums = {"train": data.checksums, "valid": valid, "test": test}
        own = {"train": spans_of(data), "valid": spans_of(held_out) if isinstance(held_out, Split) else []}
        known = {span for spans in own.values() for span in spans}
        left = [span for part in ("test", "valid", "train") for span in data.schema.spans.get(part, [])]
        spans = {**own, "test": [span for span in left if span not in known]}
        return dataclasses.replace(data.schema, checksums=sums, spans=spans if any(spans.values()) else {})
    parts = {"train": data.args} | ({} if held_out is None else {"valid": held_out.args})
    return Schema.of_tensors(parts, columns)


def _warn_of_schema(path: Path, schema: Schema) -> None:
    """Says that a file, if there is one, is not the record that the weights were trained by."""
    if not path.exists():
        return
    try:
        if json.loads(path.read_text(encoding="utf-8")) == json.loads(schema.to_json()):
            return
    except ValueError:
        pass
    warnings.warn(
        f"{path} is not the record that the weights were trained by: the run is loaded as it was trained",
        SchemaWarning,
        stacklevel=3,
    )


def _history(path: Path, epochs: int | None) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, the first `epochs` of them where it is known how many the weights have seen."""
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line) for line in lines[:epochs] if line.endswith("\n")]


class _State:
    """All of a training that outlives its process."""

    def __init__(self, svi: SVI, run: Run, generator: torch.Generator, data: Data, order: dict[str, int]) -> None:
        self.svi, self.run, self.generator, self.order = svi, run, generator, order
        self.rows, self.share = data, _share(svi, data)
        self.epoch, self.position, self.finished = 0, 0, False
        self.total: Tensor = torch.zeros((), dtype=torch.float64)
        self.best, self.since_best = -float("inf"), 0
        self.best_weights: dict[str, Any] | None = None
        self.saved = self.started = time.monotonic()
        self.recorded = False  # whether the record of the data is in its file
        self.written = 0  # lines of the history, or -1 where there may be others
        tensors = (*data.args, *data.kwargs.values())
        self.data = {
            "rows": len(data),
            "shapes": [list(tensor.shape[1:]) for tensor in tensors],
            "checksums": [
                zlib.crc32(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()) for tensor in tensors
            ],
        }
        self.folder = run.path / "checkpoints"

    def begin(self) -> None:
        self.folder.mkdir(exist_ok=True)
        checkpoint.save(self.state_dict(), self.folder / "last.safetensors")
        self._forget_the_run_of_before()
        self.written = -1
        self._tell()

    def _forget_the_run_of_before(self) -> None:
        """That was in this directory, and has gone on until the state of this one was there."""
        for old in (self.folder / "best.safetensors", self.run.path / "model.safetensors"):
            old.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        counters = ("epoch", "position", "total", "best", "since_best", "best_weights", "data", "order")
        return {
            **self.svi.state_dict(),
            "settings": self.svi.update.settings,
            **{name: getattr(self, name) for name in counters},
            "history": self.run.history,
            "config": self.run.config,
            "tensors": self.run.tensors,
            "schema": self.schema.state_dict(),
            "as_they_are": self._as_they_are,
            "random": get_random_state(),
            "generator": self.generator.get_state(),
            "execution": {"threads": torch.get_num_threads(), "compiled": isinstance(self.svi, CompiledSVI)},
        }

    def save(self) -> None:
        """One file, written whole or not at all; what people read follows it."""
        checkpoint.save(self.state_dict(), self.folder / "last.safetensors")
        self._tell()
        self.saved = time.monotonic()

    def _tell(self) -> None:
        path = self.run.path / "config.toml"
        if not path.exists() or path.read_text(encoding="utf-8") != tomli_w.dumps(self.run.config):
            checkpoint.save_config(self.run.config, path)
        if not self.recorded:
            self._write_schema()
        self._write_history()

    @property
    def _as_they_are(self) -> bool:
        return any(part.as_they_are for part in _scaling_parts(self.svi.modules))

    @property
    def schema(self) -> Schema:
        assert self.run.schema is not None
        return self.run.schema

    def _write_schema(self) -> None:
        with checkpoint.atomic(self.run.path / SCHEMA) as temporary:
            temporary.write_text(self.schema.to_json(), encoding="utf-8")
        self.recorded = True

    def _weights(self) -> dict[str, Any]:
        """What a pair is loaded from, without the optimiser's state."""
        weights: dict[str, Any] = {name: module.state_dict() for name, module in self.svi.modules.items()}
        return {**weights, "params": self.svi.state_dict()["params"]}

    def resume(self, patience: int | None) -> None:
        state = checkpoint.load(self.folder / "last.safetensors")
        if state["data"] != self.data:
            wanted, came = (f"{each['rows']:,} rows of shapes {each['shapes']}" for each in (state["data"], self.data))
            came = came if came != wanted else "as many with other values"
            raise ValueError(f"expected the data that the run was trained on, {wanted}, got {came}: name those")
        if state["position"] and state["order"] != self.order:
            raise ValueError(
                f"expected {state['order']}, as the run stopped inside an epoch, got {self.order}: keep to those"
            )
        torch.set_num_threads(state["execution"]["threads"])
        self.svi.load_state_dict(state)
        _feed_as_trained(self.svi.modules, state)
        update = self.svi.update
        for group, now, then in zip(update.groups, update.settings, state["settings"], strict=True):
            group.update({key: value for key, value in now.items() if _plain(value) != then.get(key)})
        for name in ("epoch", "position", "total", "best", "since_best"):
            setattr(self, name, state[name])
        if not (self.epoch or self.position):  # killed as it began, perhaps before the weights of another were gone
            self._forget_the_run_of_before()
        self.best_weights = state.get("best_weights")
        before = self.folder / "best.safetensors"  # of a run by an earlier version
        if self.best_weights is None and before.exists():
            own = {"params", *self.svi.modules}
            self.best_weights = {name: value for name, value in checkpoint.load(before).items() if name in own}
        if self.best_weights is None:
            self.best, self.since_best = -float("inf"), 0
        self.finished = patience is not None and self.since_best >= patience
        self.run.history = state["history"]
        self.generator.set_state(state["generator"])
        set_random_state(state["random"])
        self.started -= self.run.history[-1]["seconds"] if self.run.history else 0.0
        self.written = -1
        if "schema" in state:  # units never change
            recorded = Schema.from_state(state["schema"], str(self.folder / "last.safetensors"))
            if "name_or_path" in self.schema.source and self.schema.columns != recorded.columns:
                raise ValueError(
                    f"expected data in the units that the run was trained in, got those of {self.schema.name}, which "
                    "differ: name the data of the training"
                )
            source = self.schema.source if "name_or_path" in self.schema.source else recorded.source
            self.run.schema = dataclasses.replace(recorded, source=source, checksums=self._seen(recorded))

    def _seen(self, recorded: Schema) -> dict[str, np.ndarray]:
        """The recorded rows, those that a resumed training is validated on now among the validation rows."""
        valid = recorded.checksums.get("valid", np.empty(0, np.uint64))
        now = self.schema.checksums.get("valid", valid)
        further = now[~np.isin(now, valid)]
        if not len(further):
            return dict(recorded.checksums)
        valid, train = np.concatenate([valid, further]), recorded.checksums["train"]
        return {"train": train, "valid": valid, "test": recorded.others(train, valid)}

    def step(self, index: Tensor, scale: LatentScale | None) -> None:
        args, kwargs = self.rows.trimmed_batch(index, self.generator)
        with scale or contextlib.nullcontext():
            loss = self.svi.step_async(*args, **kwargs).reshape(-1)[0]
        self.total = self.total + loss * self.share(len(index))
        self.position += 1

    def end_epoch(self, held_out: Data | None, kl_weight: float, patience: int | None) -> None:
        svi, order = self.svi, self.order
        record: dict[str, Any] = {"epoch": self.epoch + 1, "steps": svi.steps}
        record["bound"] = self.rows.mean_log_jacobian - float(self.total) / len(self.rows)
        if held_out is not None:
            record["valid"] = _validation_bound(svi, held_out, self.share, 8 * order["batch_size"], order["seed"])
        record["kl_weight"] = kl_weight
        record["learning_rate"] = svi.update.groups[0].get("lr")
        if isinstance(svi.objective, Estimator):
            record |= svi.objective.record()
        self.run.history.append({**record, "seconds": round(time.monotonic() - self.started, 3)})
        self.epoch, self.position = self.epoch + 1, 0
        self.total = torch.zeros_like(self.total)
        self.since_best += 1
        if record.get("valid", -float("inf")) > self.best:
            self.best, self.since_best = record["valid"], 0
        self.svi.update.schedule(-record.get("valid", record["bound"]))
        if patience is not None:
            if not math.isfinite(record["valid"]):
                raise NonFiniteLossError(
                    f"epoch {self.epoch}: the validation bound is {record['valid']}, so that no epoch is best: train "
                    "without patience, or look at the validation data"
                )
            self.finished = self.since_best >= patience
            if self.since_best == 0:
                self.best_weights = copy.deepcopy(self._weights())
        self._write_history()

    def end(self, best: bool) -> Run:
        self.save()
        if best and self.best_weights is not None:
            self.svi.load_weights(self.best_weights)
        weights = self._weights()
        own = {"config": self.run.config, "tensors": self.run.tensors, "schema": self.schema.state_dict()}
        content = {**weights, "epochs": len(self.run.history), **own, "as_they_are": self._as_they_are}
        checkpoint.save(content, self.run.path / "model.safetensors")
        (self.folder / "best.safetensors").unlink(missing_ok=True)
        params = weights["params"]
        for module in self.svi.modules.values():
            module.eval()
        self.run.model, self.run.guide = (_with_params(p, params) for p in (self.run.model, self.run.guide))
        return self.run

    def _write_history(self) -> None:
        path, lines = self.run.path / "metrics.jsonl", [json.dumps(record) + "\n" for record in self.run.history]
        if self.written < 0 or not path.exists():
            with checkpoint.atomic(path) as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")
        elif self.written < len(lines):
            checkpoint.append("".join(lines[self.written :]), path)
        self.written = len(lines)


def _make_parameters(
    svi: SVI, scale: LatentScale | None, data: Data, held_out: Data | None, batch_size: int, seed: int
) -> None:
    """Run the pair once for each shape of a batch, and look whether the data are in its support."""
    typical, place = data.typical_batches(batch_size), data.device
    try:
        with scale or contextlib.nullcontext():
            for rows in typical if isinstance(svi, CompiledSVI) else typical[:1]:
                args, kwargs = data.trimmed_batch(rows.to(place), _generator(place, seed))
                _initialize(svi, svi.objective, scale, args, kwargs)
            _check_globals(svi, len(data), args, kwargs)
    except Exception as problem:
        try:  # data outside the support fail in either; this says it better
            _check_support(svi, data)
        except ValueError:
            raise
        except Exception:
            raise problem from None
        raise
    for part in (data, held_out):
        _check_support(svi, part)


def _set_rates(
    svi: SVI,
    epoch: float,
    learning_rate: Schedule | float | None,
    rate: Schedule | None,
    weight: Schedule | None,
    scale: LatentScale | None,
) -> None:
    if scale and weight:
        scale.weight = weight(epoch)
    if rate is not None:
        for group, given in zip(svi.update.groups, svi.update.settings, strict=True):
            group["lr"] = given["lr"] * rate(epoch) if callable(learning_rate) else rate(epoch)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What ends the training early tells the directory to go on with."""
    try:
        yield
    except (NonFiniteLossError, Interrupted) as error:
        error.run = path
        raise


def _initialize(svi: SVI, loss: Any, scale: LatentScale | None, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """`SVI.initialize`, after what the loss does not look at itself; what torch says of parameters that are not finite
    and of dtypes, in this library's words."""
    try:
        _check_guide(svi, loss, args, kwargs)
        if scale is not None:
            _check_weight(svi, loss, scale, args, kwargs)
        svi.initialize(*args, **kwargs)
        if not svi.parameters:
            raise ValueError("expected parameters to optimise, got none in model, guide and loss: give the guide some")
    except ValueError as error:
        if not str(error).startswith("Expected parameter"):
            raise
        raise svi._diagnosis(torch.tensor(math.nan), get_random_state(), args, kwargs) from None
    except RuntimeError as error:
        (problem, *_), given = str(error).splitlines() or [""], (*args, *kwargs.values())
        if "dtype" not in problem and "scalar type" not in problem:
            raise
        came = sorted({str(tensor.dtype) for tensor in given if isinstance(tensor, Tensor)})
        raise ValueError(
            f"expected data of the dtype that model and guide compute with, got {', '.join(came)} ({problem}): call "
            "x.float() where networks are fed"
        ) from error


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _with_params(program: Any, params: dict[str, Tensor]) -> Any:
    """A plain function with ``pyro.param``, run with these values; a module as it is."""
    if modules_of(program=program) or not params:
        return program

    store = pyro.get_param_store()
    own: dict[str, Any] = {}

    @functools.wraps(program)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        if not own:
            with store.scope() as state, torch.random.fork_rng(), torch.no_grad(), poutine.block():
                program(*args, **kwargs)
                for name, parameter in store.named_parameters():
                    parameter.copy_(params[name])
            own.update(state)
        with store.scope(own):
            return program(*args, **kwargs)

    return scoped


def _share(svi: SVI, data: Data) -> Callable[[int], float]:
    """Batch size -> the share of a batch in the data that its loss stands for, where the model scales its plate."""
    args, kwargs = data.batch(torch.zeros(1, dtype=torch.long, device=data.args[0].device))
    with torch.random.fork_rng(), torch.no_grad(), poutine.block(), evaluating(*svi.modules.values()):
        trace = poutine.trace(svi.model).get_trace(*args, **kwargs)
    frames = [frame for _, site in samples(trace) if site["is_observed"] for frame in site["cond_indep_stack"]]
    size = next((frame.full_size for frame in frames if frame.size == 1 and (frame.full_size or 1) > 1), None)
    return lambda rows: rows / size if size else 1.0


def _validation_bound(svi: SVI, data: Data, share: Callable[[int], float], batch_size: int, seed: int) -> float:
    """The bound at KL weight 1, in eval mode, on a random stream of its own that is the same at each epoch."""
    total = 0.0
    with torch.random.fork_rng(), torch.no_grad(), evaluating(*svi.modules.values()):
        torch.manual_seed(seed)
        generator = _generator(data.args[0].device, seed)
        for index in torch.arange(len(data), device=data.args[0].device).split(batch_size):
            args, kwargs = data.trimmed_batch(index, generator)
            loss = svi.loss(svi.model, svi.guide, *args, **kwargs)
            total += float(loss[0] if isinstance(loss, tuple) else loss) * share(len(index))
    return data.mean_log_jacobian - total / len(data)


def select_device(device: str) -> torch.device:
    """The torch device of a name; ``"auto"`` is CUDA where there is one.

    Raises:
        ValueError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"expected a device of this machine (auto, cpu, cuda), got {device!r}: {reason}") from None
    return torch.device(device)


def _generator(device: torch.device | str, *seeds: int) -> torch.Generator:
    seed = functools.reduce(lambda a, b: a * 1_000_003 + b, seeds)
    return torch.Generator(device).manual_seed(seed % 2**63)


def _was_compiled(run: Path | str) -> bool:
    execution = checkpoint.load(Path(run) / "checkpoints" / "last.safetensors")["execution"]
    return execution.get("compiled", False)


def _check_numbers(epochs: Any, batch_size: Any, clip_norm: Any, patience: Any, seed: Any) -> None:
    for name, value, low in (
        ("epochs", epochs, 1),
        ("batch_size", batch_size, 1),
        ("patience", patience, 1),
        ("seed", seed, 0),
    ):
        optional = name in ("batch_size", "patience") and value is None
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not optional and not (whole and low <= value < 2**63):
            raise ValueError(f"expected {name} to be a whole number >= {low}, got {value!r}: give one")
    number = isinstance(clip_norm, float | int) and not isinstance(clip_norm, bool)
    if clip_norm is not None and not (number and clip_norm > 0):
        raise ValueError(f"expected clip_norm > 0, got {clip_norm!r}: give a positive number")


def _check_caller(model: Any, guide: Any, loss: Any) -> None:
    """Where `fit` is called from: handlers would act on every step, and on all that is looked at besides."""
    if handlers := [type(handler).__name__ for handler in runtime._PYRO_STACK]:
        raise ValueError(
            f"expected fit outside of Pyro's handlers, got it inside {', '.join(handlers)}: put them into the programs"
        )
    for name, module in modules_of(model=model, guide=guide, loss=loss).items():
        if any(parameter.is_inference() for parameter in module.parameters()):
            raise ValueError(
                f"expected a {name} whose parameters can be trained, got one that was made under "
                "torch.inference_mode(): make it outside"
            )


def _of_its_own(data: Data) -> Data:
    """The data as tensors that autograd takes, which those made under ``inference_mode`` are not."""
    tensors = (*data.args, *data.kwargs.values())
    if not any(tensor.is_inference() for tensor in tensors):
        return data
    kwargs = {name: tensor.clone() for name, tensor in data.kwargs.items()}
    return dataclasses.replace(data, args=tuple(tensor.clone() for tensor in data.args), kwargs=kwargs)


def _check_data(data: Data, batch_size: int, patience: int | None, valid: Data | None) -> None:
    if not 1 <= batch_size <= len(data):
        raise ValueError(
            f"expected a batch_size from 1 to {len(data)}, the number of data, got {batch_size}: choose within"
        )
    if patience is not None and valid is None:
        raise ValueError(f"expected patience >= 1 beside validation data, got {patience}: pass valid=...")
    for name, part in (("data", data), ("validation data", valid)):
        if part is None:
            continue
        for refused, tensors in ((torch.isinf, part.args), (lambda x: ~torch.isfinite(x), part.kwargs.values())):
            for tensor in tensors:  # NaN among the arguments may be data that a likelihood takes as missing
                if tensor.is_floating_point() and (count := int(refused(tensor).sum())):
                    raise ValueError(f"expected finite {name}, got {count} NaN or infinite values: drop or fill them")
    for tensor in filter(Tensor.is_floating_point, data.args):
        largest, most = float(tensor.abs().nan_to_num(0.0).amax()), torch.finfo(tensor.dtype).max ** 0.5 / 10
        if largest > most:
            raise ValueError(
                f"expected data whose squares are numbers of {tensor.dtype}, of at most {most:.0e}, got {largest:.3g}: "
                "standardise the data, or divide them"
            )
    if valid is None:
        return
    given, held_out = (
        [("an argument", tensor.shape[1:]) for tensor in part.args]
        + [(name, tensor.shape[1:]) for name, tensor in sorted(part.kwargs.items())]
        for part in (data, valid)
    )
    steps = "lengths" in data.kwargs  # of which validation data may have another number
    if [name for name, _ in given] != [name for name, _ in held_out] or any(
        a[steps:] != b[steps:] or len(a) != len(b) for (_, a), (_, b) in zip(given, held_out, strict=True)
    ):
        shapes = [", ".join(f"{name} {tuple(shape)}" for name, shape in part) for part in (given, held_out)]
        raise ValueError(
            f"expected validation data like the training data, each datum {shapes[0]}, got {shapes[1]}: give the same"
        )


def _loss(loss: Any) -> Any:
    """The loss, made where it is a class; Pyro's by default."""
    if loss is None:
        return Trace_ELBO()
    if isinstance(loss, type):
        try:
            loss = loss()
        except TypeError as error:
            raise ValueError(
                f"expected a loss, got the class {loss.__name__}, which cannot be made without arguments ({error}): "
                f"hand over {loss.__name__}(...)"
            ) from None
    if isinstance(loss, TraceTailAdaptive_ELBO):
        raise ValueError(
            "expected a loss that tells a bound, got TraceTailAdaptive_ELBO, which has none: use CompiledSVI"
        )
    if not (callable(loss) or hasattr(loss, "loss")):
        raise ValueError(f"expected a loss such as Trace_ELBO(), got {loss!r}: name one of pyro_vae.estimators")
    return loss


def _constant(weight: float) -> Schedule:
    return lambda epoch: float(weight)


def _check_optimizer(optimizer: Any) -> None:
    if isinstance(optimizer, PyroOptim):
        return
    is_made = isinstance(optimizer, torch.optim.Optimizer)
    if is_made or not callable(optimizer) or (isinstance(optimizer, type) and issubclass(optimizer, PyroOptim)):
        came = f"a {type(optimizer).__name__} that was made already" if is_made else repr(optimizer)
        raise ValueError(
            f"expected an optimiser of pyro.optim, or a callable from parameters to one of torch, got {came}: hand "
            "over functools.partial(torch.optim.Adam, lr=1e-3)"
        )


def _check_schedules(
    loss: Any, optimizer: Any, learning_rate: Schedule | float | None, kl_weight: Schedule | float | None
) -> None:
    for name, given in (("learning_rate", learning_rate), ("kl_weight", kl_weight)):
        number = isinstance(given, float | int) and not isinstance(given, bool)
        if given is None or (callable(given) and not isinstance(given, type)):
            continue
        if not number or not 0 < given < math.inf:  # type: ignore[operator]
            raise ValueError(
                f"expected {name} to be a positive number or a function of the epoch, got {given!r}: give 1e-3, or a "
                "schedule such as pyro_vae.schedules.Warmup(20)"
            )
    weighs_draws = isinstance(loss, RenyiELBO | ReweightedWakeSleep | ConstrainedELBO | Trace_MMD)
    if kl_weight is not None and (weighs_draws or not getattr(loss, "tempered", True)):
        raise ValueError(
            f"expected a loss that is linear in the KL term beside kl_weight, got {type(loss).__name__}, whose weights "
            "or constraints it would change: leave kl_weight out, or use ELBO"
        )
    arguments = getattr(optimizer, "pt_optim_args", {})
    if learning_rate is not None and (
        isinstance(optimizer, PyroLRScheduler) or "lrd" in arguments or "eta" in arguments
    ):
        raise ValueError(
            "expected one rule for the learning rate, got learning_rate beside an optimiser that has its own (a "
            "scheduler, lrd or eta): leave one out"
        )


def _checked_schedule(name: str, given: Schedule | float | None, epochs: int) -> Schedule | None:
    """A schedule whose values are numbers from 0 on: looked at over the whole training before it begins, and at each
    step, as a negative rate would train uphill."""
    if given is None:
        return None
    of_epoch = given if callable(given) else _constant(given)

    def checked(epoch: float) -> float:
        came = of_epoch(epoch)
        value = plain(came.item() if isinstance(came, Tensor) and came.numel() == 1 else came)
        if not isinstance(value, float | int) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise ValueError(
                f"expected {name} to be a number >= 0 at each epoch, got {came!r} at epoch {epoch:g}: mend the schedule"
            )
        return float(value)

    for part in range(100):
        checked(epochs * part / 100)
    return checked


def _check_guide(svi: SVI, loss: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Pyro's own bounds take a guide that observes; estimators of this library look for themselves."""
    of_pyro = isinstance(loss, ELBO) and not isinstance(loss, Estimator)
    if of_pyro and not isinstance(poutine.unwrap(svi.guide), Messenger):
        with preserved(), torch.no_grad(), evaluating(*svi.modules.values()):
            check_draws_alone(poutine.trace(svi.guide).get_trace(*args, **kwargs))


def _check_globals(svi: SVI, count: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """In batches the data's terms stand for all data, where latent sites are shared by all: else the prior of these is
    counted in each batch."""
    if (rows := len(args[0])) == count or rows < 2:
        return
    traces = []
    with preserved(), torch.no_grad(), evaluating(*svi.modules.values()), contextlib.suppress(Exception):
        for n in (rows, rows - 1):  # what is of each row has another shape for fewer of them
            some = [each[:n] for each in args], {name: each[:n] for name, each in kwargs.items()}
            q = poutine.trace(svi.guide).get_trace(*some[0], **some[1])
            traces.append(poutine.trace(poutine.replay(svi.model, q)).get_trace(*some[0], **some[1]))
    if len(traces) < 2:  # programs of one number of rows alone
        return
    p, fewer = traces
    shared, seen = [], {}
    for name, site in samples(p):
        if torch.is_tensor(site["value"]) and site["value"].shape == fewer.nodes[name]["value"].shape:
            shared += [] if site["is_observed"] else [name]
        elif site["is_observed"]:
            seen[name] = rows * _weight(site, fewer.nodes[name])
    wrong = {name: stands for name, stands in seen.items() if abs(stands - count) > 1e-3 * count}
    if shared and wrong:
        name, stands = next(iter(wrong.items()))
        raise ValueError(
            f"expected a plate that stands for all {count} data, as the latent sites {shared} are shared by them, got "
            f'batches of {rows} whose site "{name}" stands for {stands:g}: batch_size={count}, or pyro.plate(NAME, '
            f"{count}, subsample=torch.arange(len(x)))"
        )


def _weight(site: Mapping[str, Any], fewer: Mapping[str, Any]) -> float:
    """How many data a row of an observed site counts for: its scale, but for plates within a datum of which a part is
    drawn. `fewer` is the site of a call with fewer rows."""
    sizes = {frame.name: frame.size for frame in fewer["cond_indep_stack"]}
    within = [frame for frame in site["cond_indep_stack"] if sizes.get(frame.name) == frame.size]
    of_parts = math.prod((frame.full_size or frame.size) / frame.size for frame in within)
    return float(torch.as_tensor(site["scale"]).double().mean()) / of_parts


def _check_weight(svi: SVI, loss: Any, scale: LatentScale, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """A loss of Pyro's form is a line in the KL weight, for the same draws."""
    if isinstance(loss, Estimator) or type(loss) in LINEAR:
        return
    losses = []
    for weight in (1.0, 0.5, 2.0):  # what fails at 1 fails of itself
        scale.weight = weight
        try:
            with preserved(), torch.no_grad(), evaluating(*svi.modules.values()):
                found = svi.loss(svi.model, svi.guide, *args, **kwargs)
        except ValueError as error:
            if weight == 1.0:
                raise
            raise ValueError(
                f"expected a pair that {type(loss).__name__} takes beside kl_weight, which scales latent sites and no "
                f"others, got one that it refuses ({error}): leave kl_weight out, or let the guide draw or enumerate "
                "what is summed out"
            ) from error
        finally:
            scale.weight = 1.0
        losses.append(float(found[0] if isinstance(found, tuple) else found))
    one, half, two = losses
    if abs(two - one - 2 * (one - half)) > 1e-4 * (abs(half) + abs(one) + abs(two)):
        raise ValueError(
            f"expected a loss that is linear in the KL term beside kl_weight, got {type(loss).__name__}, which is "
            f"{half:.6g}, {one:.6g} and {two:.6g} at the weights 0.5, 1 and 2: leave kl_weight out, or use ELBO"
        )


def _check_support(svi: SVI, data: Data | None) -> None:
    """Every datum lies in the support of the observed site that holds it where the loss calls the model; of a site that
    holds what the model makes of the data, the first hundred do."""
    if data is None:
        return
    whole = (data.observed,) if isinstance(data, Split) else data.args
    for count, direct in ((1, True), (min(100, len(data)), False)):  # the support of one datum broadcasts over all
        args, kwargs = data.batch(torch.arange(count, device=data.device), _generator(data.device, 0))
        with (
            torch.random.fork_rng(),
            torch.no_grad(),
            pyro.validation_enabled(False),
            evaluating(*svi.modules.values()),
        ):
            model = poutine.trace(svi.model)
            svi.loss(model, svi.guide, *args, **kwargs)
        for name, site in samples(model.trace):
            places = [i for i, given in enumerate(args) if site["value"] is given]
            if not site["is_observed"] or bool(places) != direct:
                continue
            for value in [whole[i] for i in places] or [site["value"]]:
                check_support(name, site["fn"], value)


@contextlib.contextmanager
def _surroundings(seed: int, place: torch.device) -> Iterator[torch.device]:
    """Gradients, seeded draws, an empty parameter store and no validation of every step, on a device; all is as it was
    when it ends."""
    if not TRAINING.acquire(blocking=False):
        raise ValueError(
            "expected one training at a time in a process, as draws and parameter store are the process's, got a "
            "second: run it in a process of its own, or after the first"
        )
    threads = torch.get_num_threads()
    try:
        with (
            of_the_library(place),
            torch.enable_grad(),
            torch.random.fork_rng(),
            pyro.get_param_store().scope(),
            pyro.validation_enabled(False),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "Encountered", UserWarning)
            torch.manual_seed(seed)
            try:
                yield place
            finally:
                torch.set_num_threads(threads)
    finally:
        TRAINING.release()


@contextlib.contextmanager
def _interruptions() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that a step is never cut in two; the second Ctrl-C cuts."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def interrupt(*_: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
