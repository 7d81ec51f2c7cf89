"""The command line: ``pyro-vae COMMAND ...``. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import codecs
import contextlib
import errno
import inspect
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .options import (
    COMPONENTS,
    TABLES,
    Options,
    Table,
    check,
    classes_help,
    estimator,
    flat,
    mend,
    nested,
    one_of,
    parse,
    read_config,
    resolved,
)

if TYPE_CHECKING:
    from torch import Tensor

    from .data import Dataset, Schema, Split
    from .training import Run

__all__ = ["main"]

LEVELS = (0.05, 0.5, 0.95)
MOST_SCORED = 200_000_000  # numbers that `fit` decodes to score the test split, unless told otherwise

HELP = {
    "": """\
usage: pyro-vae COMMAND ...

Variational autoencoders as Pyro programs.

  fit            train a model, score it, write a report
  evaluate       score a run: bounds on log p(x), KL, effective sample size
  sample         draw new data from a run's model
  forecast       what follows the sequences of a run's data, with intervals
  encode         q(z | x) of data: means, scales and draws
  reconstruct    decode what a run's guide makes of data
  scores         how probable a run's model finds each datum
  compare        which loss to train a run's model with: bias and noise of gradients, time, what training gains
  report         write a run's report again
  doctor         what this installation has, and what it lacks

  --help         this page; pyro-vae COMMAND --help tells more
  --version      the version

examples:
  pyro-vae fit                                     handwritten digits, in about half a minute
  pyro-vae fit --data table.csv --data.label kind  your own data
  pyro-vae evaluate runs/latest
  pyro-vae sample runs/latest --num 100 --out samples.npz
""",
    "fit": """\
usage: pyro-vae fit [OPTIONS]

Train a model and its guide; the run's directory gets weights, scores and a report.

data:
  --data NAME|PATH     digits (default), mnist, fashion_mnist, freyfaces, or a .npy, .npz, .pt, .csv file or a
                       folder of images; sequences: jsb_chorales, sp500, pendulum, ..., a .npz with lengths
  --data.binarize HOW  none (default), static, dynamic    --data.divisor X   what values are divided by
  --data.label COLUMN, --data.id COLUMN      columns of a .csv that are no features
  --data.columns A,B   columns to model, not all       --data.drop A,B   columns to leave out
  --data.kind A=count  what a column is: real, count, binary   --data.standardize false   values as they are
  --data.header true|false   whether the first row names the columns; how a .csv is written, else found out:
  --data.separator tab, --data.decimal ',', --data.thousands ., --data.encoding cp1252, --data.comment %
  --data.time COLUMN   a .csv of sequences, one for each id, or pieces of --data.window N steps, or both;
                       year,quarter: times in several columns; --data.inputs COLUMN,COLUMN act on the latents;
                       with --data.every D (h, MS, 2, ...) absent times are steps without values
  --data.size 32|32x24 resize the images of a folder    --data.max_gb N   what a file may take in memory (2)
  --data.array X, --data.channels last       which array of a .npz, and where its channels are
  --data.download      fetch a named data set          --data.root DIR   where the named data sets are
  --data.split [0.8,0.1,0.1], --data.seed N  another division into train, valid and test

what is trained (--model.help, --guide.help, ... list the classes and their options):
  --model CLASS        VAE (default), LinearVAE, DeepMarkovModel (sequences), your own: package.module.Class
  --model.latent_dim N, --model.decoder MLP, --model.decoder.hidden [200,200], --model.prior CLASS
  --model.likelihood auto|CLASS    auto (default) looks at the data
  --guide CLASS        AmortizedGuide (default), StateSpaceGuide; --guide.family CLASS, --guide.inference ST-R
  --loss CLASS         Trace_ELBO (default), IWAE, DReG, ..., or your own; --loss.num_particles K
  --optimizer CLASS    Adam (default); --optimizer.lr 1e-3
  --learning_rate X    the optimiser's rate, or the class of a schedule that it is multiplied with
  --kl_weight X|CLASS  a number, or a schedule, as in --kl_weight Warmup --kl_weight.epochs 20

training:
  --epochs N (200)     passes over the data            --batch_size N (100)
  --patience N (30)    stop after N epochs without a better validation bound, keep the best; null: never
  --clip_norm X        clip the gradient's norm        --seed N (0), --device D (auto: CUDA if there is one)
  --compile true|false the step as one compiled graph, or eager; by default compiled from 5,000 steps on
  --evaluate.num_samples N   draws per datum for the test scores (1000; on large data fewer, 50 or more)
  --out DIR            the run's directory (runs/0001 and so on); --overwrite to write into a full one
  --resume DIR         go on with a run; other options change its settings

configuration:
  --config FILE        TOML or YAML; a run's config.toml repeats the run; options go before the file, and what
                       neither says is 100 epochs without patience
  --print_config       print the configuration as TOML, and do nothing

examples:
  pyro-vae fit --model.latent_dim 2
  pyro-vae fit --data mnist --data.binarize dynamic --data.download --model.decoder ConvolutionalDecoder
  pyro-vae fit --data table.csv --data.label kind --model LinearVAE
  pyro-vae fit --config runs/0001/config.toml --seed 1
""",
    "evaluate": """\
usage: pyro-vae evaluate RUN [OPTIONS]

Score a run's model and guide: nats per datum, higher is better but for kl.

  RUN                the run's directory, such as runs/latest
  --data NAME|PATH   other data than the run's         --split train|valid|test|all (test)
  --num_samples N    draws per datum (1000)            --seed N (0), --device D (auto)
  --annealing N      log p(x) by annealed importance sampling too, N temperatures (such as 1000; slow)
  --out FILE.json    write the scores too              --overwrite

example:
  pyro-vae evaluate runs/latest --split valid --out scores.json
""",
    "sample": """\
usage: pyro-vae sample RUN [OPTIONS]

Draw x ~ p(x), in the data's original units, pictures from 0 to 1; of a model with inputs x ~ p(x | u), u of
training sequences.

  RUN                the run's directory, such as runs/latest
  --num N            how many (64)                     --mean   E[x | z] in the place of x
  --num_steps N      of a sequence (the training sequences' median)
  --out FILE         .npz or .csv (samples.npz)        --overwrite
  --seed N (0), --device D (auto)

example:
  pyro-vae sample runs/latest --num 100 --out samples.csv
""",
    "forecast": """\
usage: pyro-vae forecast RUN [OPTIONS]

What follows each sequence: mean, median and 5 % and 95 % quantiles per step, in the data's original units.

  RUN                the run's directory, such as runs/latest
  --data NAME|PATH   other data than the run's         --split train|valid|test|all (all)
  --num_steps N      steps after the last one (10)     --num_samples K   draws (1000; kept in a .npz)
  --inputs FILE      of a model with inputs, those to come: a .csv with the columns of id, time and inputs;
                     for data that are no .csv a .npy (N, H, C)
  --out FILE         .csv or .npz (forecast.csv)       --overwrite
  --seed N (0), --device D (auto)

example:
  pyro-vae forecast runs/latest --num_steps 20 --out forecast.csv
""",
    "encode": """\
usage: pyro-vae encode RUN [OPTIONS]

q(z | x): means and scales per datum, with ids and labels where the data have them; of sequences, flows and
several latent sites those of 100 draws, which hang on the seed and on the other rows.

  RUN                the run's directory, such as runs/latest
  --data NAME|PATH   other data, all of their rows     --split train|valid|test|all (test)
  --num_samples K    K draws per datum too (.npz)      --seed N (0), --device D (auto)
  --out FILE         .npz or .csv (codes.npz)          --overwrite

example:
  pyro-vae encode runs/latest --split all --out codes.csv
""",
    "reconstruct": """\
usage: pyro-vae reconstruct RUN [OPTIONS]

E[x' | z] for z ~ q(z | x), in the data's original units.

  RUN                the run's directory, such as runs/latest
  --data NAME|PATH   other data, all of their rows     --split train|valid|test|all (test)
  --num_samples K    average over K draws (1)          --seed N (0), --device D (auto)
  --out FILE         .npz or .csv (reconstructions.npz)   --overwrite

example:
  pyro-vae reconstruct runs/latest --out reconstructions.npz
""",
    "scores": """\
usage: pyro-vae scores RUN [OPTIONS]

A lower bound on log p(x) of each datum, in nats: id, log_prob, and rank, 1 for the least probable; of
sequences with times the first one, too. With missing values, or fewer steps, it is that of what is there.

  RUN                the run's directory, such as runs/latest
  --data NAME|PATH   other data, all of their rows     --split train|valid|test|all (test)
  --num_samples N    draws per datum (1000)            --seed N (0), --device D (auto)
  --out FILE         .csv or .npz (scores.csv)         --overwrite

example:
  pyro-vae scores runs/latest --data new.csv --out scores.csv
""",
    "compare": """\
usage: pyro-vae compare RUN [OPTIONS]

Hold losses against each other on a run's model and guide: bounds and their gap to log p(x), bias and
signal-to-noise ratio of gradients, time and memory of a step and, with a budget, what training brings.

  RUN                  the run's directory, such as runs/latest
  --estimators A,B,C   classes of pyro_vae.estimators, pyro.infer or your own, module.Class (ELBO,IWAE,DReG);
                       --estimators.help lists them; --estimators.CIWAE.beta 0.5 sets what one takes
  --num_particles K,K  draws of each (1,4,16)
  --steps N | --seconds S   train copies with each, so long for each seed; otherwise none is trained
  --seeds N,N,N        of trainings (0,1,2)              --learning_rate X   of Adam (0.001)
  --batch_size N       of gradients and steps (100)      --compile true|false   compiled steps (false)
  --data NAME|PATH     other data than the run's: its training split is what all is measured on
  --split train|valid|test|all   what trained copies are scored on (valid)
  --num_data N         data that bounds are of (500)
  --num_samples N      draws per datum that log p(x) is told by (1000)
  --num_gradients N    draws of each gradient (200)      --seed N (0), --device D (auto)
  --out DIR            comparison.csv, .json and figures (comparison)      --overwrite

example:
  pyro-vae compare runs/latest --estimators IWAE,DReG --num_particles 1,8,64 --steps 500
""",
    "report": """\
usage: pyro-vae report RUN [OPTIONS]

Write report.html into a run's directory again.

  RUN                the run's directory, such as runs/latest
  --num_samples N    draws per datum (1000)            --seed N (0), --device D (auto)

example:
  pyro-vae report runs/latest
""",
    "doctor": """\
usage: pyro-vae doctor

Tell what this installation has, and what it lacks: versions, devices, a compiler, data.
""",
}

Part = Literal["train", "valid", "test", "all"]

NOT_ASKED = {
    "model",
    "guide",
    "train",
    "valid",
    "loss",
    "optimizer",
    "learning_rate",
    "kl_weight",
    "callbacks",
    "progress",
}
OUT = {
    "evaluate": "x.json",
    "sample": "samples.npz",
    "forecast": "forecast.csv",
    "encode": "codes.npz",
    "reconstruct": "reconstructions.npz",
    "scores": "scores.csv",
}


COUNTS = ("num", "num_samples", "num_steps", "num_data", "num_gradients", "annealing", "batch_size", "steps")


class Stop(Exception):
    """Ends the command with a line on stderr and an exit code."""

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line)
        self.code = code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``pyro-vae`` with these arguments (the process's by default); returns the exit code.

    0: done. 2: bad input, with a line that says what was expected, what came, and the mend. 1: anything else
    that went wrong, also in a line; ``PYRO_VAE_TRACEBACK=1`` shows where. 130: interrupted, the run is saved.
    141: whoever reads the output has closed it.

    Example:
        >>> main(["evaluate", "--help"])
        usage: pyro-vae evaluate RUN [OPTIONS]
        ...
        0
    """
    _open_streams()
    try:
        with _working_directory_importable():
            code = _dispatch(list(sys.argv[1:] if arguments is None else arguments))
            _flush()
            return code
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Stop as stop:
        line, code = str(stop), stop.code
    except KeyboardInterrupt:
        line, code = "interrupted", 130
    except Exception as error:
        if os.environ.get("PYRO_VAE_TRACEBACK"):
            raise
        line, code = _explained(error)
    print(f"pyro-vae: {' '.join(line.split())}", file=sys.stderr)
    return code


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Stop(f"error: expected to print to stdout, got {error.strerror!r}: the work itself is done", 2) from None


def _open_streams() -> None:
    """Streams that are closed lead nowhere, and those of a narrow encoding say +- for ±: neither costs the work."""
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:  # else a file that is opened next takes the number, and what is printed goes there
                with contextlib.suppress(OSError):
                    os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        elif number and hasattr(stream, "reconfigure"):
            codecs.register_error("pyro_vae", _in_ascii)
            stream.reconfigure(errors="pyro_vae")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join("+-" if letter == "±" else "?" for letter in text), error.end


class _Unbroken:
    """A stream whose reader may leave, or whose disk may be full, before the work is done."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _explained(error: Exception) -> tuple[str, int]:
    """The line and the exit code of an error: the library's own messages say what was expected."""
    message = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        place = f" at {error.filename}" if error.filename else " stdout" if error.errno == errno.ENOSPC else ""
        mend = "free some space" if error.errno == errno.ENOSPC else "name another place"
        return f"error: expected to read and write{place}, got {error.strerror!r}: {mend}", 2
    if isinstance(error, ValueError | OSError | ImportError) and "expected" in message:
        return f"error: {message}", 2
    kind = type(error).__name__
    return f"unexpected {kind}: {message} (PYRO_VAE_TRACEBACK=1 shows where)", 1


def _dispatch(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("--help", "-h", "help"):
        print(HELP[""], end="")
        return 0
    if command == "--version":
        from . import __version__

        print(f"pyro-vae {__version__}")
        return 0
    if command not in COMMANDS:
        raise ValueError(f"expected {one_of(COMMANDS)}, got {command!r}: {mend(command, COMMANDS, '--help')}")
    if {"--help", "-h"} & set(arguments[1:]):
        print(HELP[command], end="")
        return 0
    known = ["--help", *re.findall(r"--[a-z_.]*[a-z]", HELP[command])]
    positional, options = parse(arguments[1:], command, known, words=0 if command in ("fit", "doctor") else 1)
    if command == "fit":
        if positional:
            raise ValueError(f"expected options, got {positional[0]!r}: data go by --data {positional[0]}")
        with contextlib.redirect_stdout(_Unbroken(sys.stdout)):
            return _fit(options)
    if command == "doctor":
        if positional or options:
            raise ValueError(f"expected doctor alone, got {' '.join(arguments[1:])!r}: leave it out")
        return _doctor()
    if command == "compare" and "estimators.help" in dict(options):
        print(classes_help("estimators"))
        return 0
    if len(positional) != 1:
        came = " ".join(positional) or "none"
        raise ValueError(f"expected one RUN, got {came}: pyro-vae {command} runs/latest")
    return _called(command, COMMANDS[command], Path(positional[0]), options)


def _doctor() -> int:
    from .doctor import report

    text, works = report()
    print(text)
    return 0 if works else 1


def _called(command: str, function: Callable[..., int], run: Path, options: Options) -> int:
    """Call a command's function with a run and options, as far as its signature and the data's allow."""
    from .data import load_dataset

    names = set(inspect.signature(function).parameters) - {"run"}
    tree: Table = {}
    for path, value in options:
        name, _, rest = path.partition(".")
        if name not in names or (rest and name not in ("data", "estimators")):
            known = [f"--{each}" for each in sorted(names)]
            raise ValueError(f"expected {one_of(known)}, got --{path}: {mend(f'--{path}', known, command, '--help')}")
        if name == "data":
            tree.setdefault("data", {})[rest or "name_or_path"] = value
        elif name == "estimators":
            tree.setdefault("estimators", {})[rest] = value
        else:
            tree[name] = value
    data = check(load_dataset, tree.pop("data", {}), "data")
    if command in OUT:
        _check_ending(Path(tree.get("out") or OUT[command]), (".json",) if command == "evaluate" else (".npz", ".csv"))
    tables = {"data": data, "estimators": tree.pop("estimators", {})}
    arguments = check(function, tree, "")
    for name, value in arguments.items():
        if name in COUNTS and value is not None and value < 1:
            raise ValueError(f"expected --{name} >= 1, got {value}: give a positive number")
    return function(run, **{name: tables[name] for name in tables if name in names}, **arguments)


# ------------------------------------------------------------ fit


def _fit(options: Options) -> int:
    from . import training
    from .checkpoint import check_new_run
    from .data import load_dataset
    from .defaults import batch_size_for, programs_for
    from .evaluation import evaluate

    for option, _ in options:
        if option.endswith(".help"):
            print(classes_help(option.removesuffix(".help")))
            return 0
    tree, resume = _configuration(options)
    settings = check(training.fit, {key: tree[key] for key in tree if key not in (*COMPONENTS, *TABLES)}, "", NOT_ASKED)
    source = check(load_dataset, tree["data"], "data")
    scoring = check(evaluate, tree.get("evaluate", {}), "evaluate", {"model", "guide", "data", "progress"})
    components = {name: resolved(name, tree[name]) for name in COMPONENTS if tree.get(name) not in (None, "null")}
    if "print_config" in dict(options):
        print(_toml({"data": source, **components, **settings, "evaluate": scoring}), end="")
        return 0
    num_samples = scoring.pop("num_samples", None)
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"expected --evaluate.num_samples >= 1, got {num_samples}: give a positive number")
    device = training.select_device(settings.get("device") or "auto")

    if resume is None:
        check_new_run(settings.get("out"), settings.get("overwrite", False))
    if device.type == "cpu":
        from .compiled import keep_freed_memory

        keep_freed_memory()
    with _notes():
        dataset = _data_to_fit(source, resume)
    assert dataset.schema is not None
    found = [choice for choice in dataset.schema.choices if choice.option]
    said = [dataset.schema.summary, *(choice.what for choice in dataset.schema.choices if not choice.option)]
    print(f"data     {dataset.name}: {', '.join(said)}", flush=True)
    for choice in found:
        if choice.option.startswith("data.kind"):  # the likelihood hangs on it: told where output is thrown away, too
            print(f"note     {choice.what} (--{choice.option})", file=sys.stderr, flush=True)
        else:
            print(f"         {choice.what} (--{choice.option})")
    sizes = ", ".join(f"{split.name} {len(split):,}" for split in (dataset.train, dataset.valid, dataset.test))
    print(f"         {sizes}")
    settings.setdefault("batch_size", batch_size_for(dataset))
    if resume is not None and "batch_size" not in dict(options):  # fewer rows than there were
        settings["batch_size"] = min(settings["batch_size"], len(dataset.train))
    programs, reason = programs_for(components, dataset, settings.get("seed", 0))
    dataset = dataset.with_choices(reason)
    other = f" (--{reason.option})" if reason.option else ""
    print(f"model    {_name_of(programs['model'])}, {reason.what}{other}")
    print(f"device   {_device(device)}", flush=True)
    try:
        log = [] if sys.stderr.isatty() else [_log_of_epochs()]
        settings |= {"valid": dataset.valid, "resume": resume, "callbacks": log}
        run = training.fit(train=dataset.train, **programs, **settings)
    except training.Interrupted as interrupt:
        saved = str(interrupt).partition(":")[0]
        raise Stop(f"interrupted, {saved}; to go on: pyro-vae fit --resume {_quoted(interrupt.run)}", 130) from None
    except training.NonFiniteLossError as error:
        mend = f"pyro-vae fit --resume {_quoted(error.run)} --optimizer.lr 1e-4 --clip_norm 10"
        go_on = f"; to go on from the last checkpoint: {mend}" if error.run is not None else ""
        raise Stop(f"error: {error}{go_on}", 1) from None

    last = run.history[-1]
    best = max(run.history, key=lambda record: record["valid"])
    bound = f"best validation bound {best['valid']:.2f} nats, epoch {best['epoch']}"
    print(f"trained  {last['epoch']} epochs in {last['seconds']:.0f} s; {bound}")
    if best is last and len(run.history) > 1:
        print("         the bound was still rising: more --epochs may raise it further")
    patience = settings.get("patience")
    if resume is not None and last["epoch"] < settings.get("epochs", 0) and patience is not None:
        print(f"         {patience} epochs without a better bound have ended it; --patience null goes on")
    num_samples = num_samples or min(1_000, max(50, MOST_SCORED // dataset.test.x.numel()))
    print(f"scoring  {len(dataset.test):,} data with {num_samples:,} draws each", flush=True)
    with _notes():
        scores = evaluate(run.model, run.guide, dataset.test, num_samples=num_samples, **scoring)
    print(f"run      {run.path}\n\ntest split: {scores}\n", flush=True)
    from .models import StateSpaceModel
    from .report import summary_sentence, write_report

    print(f"{summary_sentence(run.model, scores, dataset)}\n", flush=True)
    report = write_report(run, dataset, evaluation=scores, seed=scoring.get("seed", 0))
    print(f"report   {report.absolute().as_uri()}\n")
    where = _quoted(run.path)
    print("next     try:")
    print(f"  pyro-vae sample {where} --num 100 --out {where}/samples.npz")
    if isinstance(run.model, StateSpaceModel):
        steps = "--inputs to_come.csv" if run.model.num_inputs else "--num_steps 10"
        print(f"  pyro-vae forecast {where} {steps} --out {where}/forecast.csv")
    print(f"  pyro-vae encode {where} --split test --out {where}/codes.csv")
    print(f"  pyro-vae fit --config {where}/config.toml --seed 1")
    return 0


def _data_to_fit(source: Table, resume: Path | None) -> Dataset:
    """The data set of a configuration; of a run that goes on, its own rows in their units and splits."""
    from dataclasses import replace

    from .checkpoint import load
    from .data import Schema, load_again, load_dataset

    path = resume / "checkpoints" / "last.safetensors" if resume is not None else None
    state = load(path) if path is not None else {}
    if "schema" in state:
        schema = Schema.from_state(state["schema"], str(path))
        moved = {**schema.source, "name_or_path": source["name_or_path"]}
        if source == moved:  # also where the file lies elsewhere
            return load_again(replace(schema, source=moved))
    return load_dataset(**source)


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """What is said of data and scores goes to stderr, a line each."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for warning in said:
                print(f"note     {warning.message}", file=sys.stderr, flush=True)


def _log_of_epochs() -> Callable[[Run], None]:
    """A line on the training every ten seconds, for a log that shows no progress bar."""
    said = [time.monotonic()]

    def log(run: Run) -> None:
        if time.monotonic() - said[0] > 10:
            said[0] = time.monotonic()
            last = run.history[-1]
            print(f"         epoch {last['epoch']}: bound {last['bound']:.2f}, valid {last['valid']:.2f}", flush=True)

    return log


def _configuration(options: Options) -> tuple[Table, Path | None]:
    """All settings of `fit`: defaults, then files, then options; and the run to go on with, if any."""
    from .checkpoint import begun_run, recorded_config
    from .defaults import DEFAULTS, FIRST_RUN, OF_SEQUENCES
    from .sources import holds_sequences

    paths = {path: value for path, value in options if path in ("config", "resume")}
    resume = None
    for name, value in paths.items():
        if value is True or not value:
            raise ValueError(f"expected a path after --{name}, got none: --{name} PATH")
    files = [read_config(Path(value)) for path, value in options if path == "config"]
    if "resume" in paths:
        resume = Path(paths["resume"])
        if resume.is_symlink():  # as runs/latest, which soon leads elsewhere
            resume = resume.parent / os.readlink(resume)
        files.append(flat(recorded_config(resume, resume / "checkpoints" / "last.safetensors")))
        begun_run(resume)
        if not any(path.split(".")[0] == "data" for path, _ in (*files[-1], *options)):
            raise ValueError(f"expected data for {resume}, which was trained on data without a path: add --data PATH")
    own = [(path, value) for path, value in options if path not in ("config", "resume", "print_config")]
    own.sort(key=lambda option: option[0].count("."))
    given = [*(option for file in files for option in file), *own]
    data = nested([*DEFAULTS[:1], *((path, value) for path, value in given if path.split(".")[0] == "data")])["data"]
    base = [*DEFAULTS, *(OF_SEQUENCES if holds_sequences(str(data["name_or_path"]), data.get("time")) else [])]
    if not paths:  # a file that leaves out the patience means none: a run's config.toml does
        base += FIRST_RUN
    tree = nested([*base, *given])
    if resume is not None and {"out", "overwrite"} & tree.keys():
        raise ValueError("expected --resume without --out and --overwrite, got both: a run goes on where it is")
    return tree, resume


def _name_of(program: Any) -> str:
    return type(program).__name__ if not inspect.isroutine(program) else program.__name__


def _device(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' if threads > 1 else ''}"


def _quoted(path: Any) -> str:
    import shlex

    return shlex.quote(str(path))


def _toml(table: Table) -> str:
    import tomli_w

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items() if item is not None}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value if isinstance(value, bool | int | float | str) else str(value)

    simple = {key: item for key, item in plain(table).items() if not isinstance(item, dict)}
    return tomli_w.dumps(simple | {key: item for key, item in plain(table).items() if isinstance(item, dict) and item})


# ------------------------------------------------------------ the commands on a run


def _evaluate(
    run: Path,
    data: Table,
    split: Part | None = None,
    num_samples: int = 1000,
    annealing: int | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> int:
    from .annealing import AnnealingWarning
    from .evaluation import evaluate

    loaded, part = _opened(run, device, data, split, out, overwrite, "test")
    with _notes():
        warnings.simplefilter("ignore", AnnealingWarning)  # what is printed says it
        scores = evaluate(loaded.model, loaded.guide, part, num_samples=num_samples, seed=seed, annealing=annealing)
    print(f"{part.name} split: {scores}" if part.name != "all" else f"all data: {scores}")
    if out is not None:
        table: Table = {
            name: {"value": each.value, "standard_error": each.standard_error} for name, each in scores.table().items()
        }
        table |= {
            "active_units": scores.active_units,
            "num_samples": scores.num_samples,
            "num_data": scores.num_data,
        }
        if (found := scores.annealing) is not None:
            halved = None if found.halved is None else found.halved.value
            table["annealing"] = {
                "num_chains": found.num_chains,
                "num_temperatures": found.num_temperatures,
                "half_the_temperatures": halved,
                "log_weight_variance": found.log_weight_variance,
                "ess": found.ess,
                "interval": found.interval,
            }
        for name, each in (scores.per_step or {}).items():
            table[f"{name}_per_step"] = {"value": each.value, "standard_error": each.standard_error}
        _write(out, json.dumps({"split": part.name, **table}, indent=2).encode() + b"\n")
    return 0


def _sample(
    run: Path,
    num: int = 64,
    mean: bool = False,
    num_steps: int | None = None,
    out: Path = Path("samples.npz"),
    overwrite: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> int:
    from .prediction import global_sites, global_values, sample

    _check_out(out, overwrite)
    loaded = _load(run, device)
    with _notes():
        schema = loaded.schema
    steps: dict[str, Any] = {}
    if hasattr(loaded.model, "forecast"):
        inputs = getattr(loaded.model, "num_inputs", 0)
        T = num_steps or (schema.num_steps if schema is not None else None)
        if T is None or (inputs and (schema is None or not schema.sequences)):
            wanted, how = ("data with inputs", "train it on a file") if inputs else ("--num_steps", "add it")
            raise ValueError(f"expected {wanted} for {run}, a run on sequences that names no data: {how}")
        steps = {"u": _some_inputs(_own(loaded), num, T, seed)} if inputs else {"num_steps": T}
    elif num_steps is not None:
        raise ValueError(f"expected --num_steps for a run on sequences, got {run}, which is none: leave it out")
    if shared := global_sites(loaded.model, **steps):
        if schema is None or "name_or_path" not in schema.source:
            raise ValueError(
                f"expected data for {run}, whose global sites {shared} are drawn by them: train it on a file"
            )
        steps["given"] = global_values(loaded.guide, _own(loaded).train)
        print(f"         at the guide's values of the global sites {', '.join(shared)}")
    x = sample(loaded.model, num, seed=seed, mean=mean, **steps)
    arrays = {"x": _restored(schema, x)}
    _save(out, arrays | ({"u": steps["u"]} if "u" in steps else {}), None, schema)
    return 0


def _some_inputs(dataset: Dataset, num: int, T: int, seed: int) -> Any:
    """(num, T, C), of training sequences that are so long, drawn at random."""
    import torch

    lengths = dataset.train.kwargs["lengths"].cpu()
    long = (lengths >= T).nonzero().flatten()
    if not len(long):
        raise ValueError(f"expected --num_steps <= {int(lengths.max())}, for which there are inputs, got {T}: lower it")
    rows = torch.randint(len(long), (num,), generator=torch.Generator().manual_seed(int(seed)))
    return dataset.train.kwargs["u"][long[rows], :T]


def _forecast(
    run: Path,
    data: Table,
    split: Part | None = None,
    num_steps: int | None = None,
    num_samples: int = 1000,
    inputs: Path | None = None,
    out: Path = Path("forecast.csv"),
    overwrite: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> int:
    import torch

    from .forecasting import forecast
    from .models import StateSpaceModel

    loaded, part = _opened(run, device, data, split, out, overwrite, "all")
    if not isinstance(loaded.model, StateSpaceModel) or "lengths" not in part.kwargs:
        raise ValueError(
            f"expected a run of a StateSpaceModel on sequences, got {run} on {_named(part)}: train one, "
            "pyro-vae fit --data table.csv --data.id COLUMN --data.time COLUMN"
        )
    schema = part.schema
    assert schema is not None
    found = forecast(
        loaded.model,
        loaded.guide,
        part,
        num_steps=num_steps,
        inputs=inputs,
        num_samples=num_samples,
        seed=seed,
    )
    _, N, H, D = found.draws.shape
    levels = torch.tensor(LEVELS).double()
    moments = torch.empty(1 + len(LEVELS), N, H, D, dtype=torch.double)
    for i in range(N):
        x = schema.restore(found.draws[:, i].double())
        moments[:, i] = _rounded(schema, torch.cat([x.mean(0)[None], x.quantile(levels, dim=0)]))
    names = ["x_mean", *(f"x_{round(100 * level)}%" for level in LEVELS)]
    arrays = dict(zip(names, moments, strict=True))
    if out.suffix == ".npz":
        arrays["x_draws"] = _restored(schema, found.draws)
    _save(out, arrays, found.split, schema, times=found.times, num_before=found.num_before.numpy())
    of = f"the {part.name} split" if part.name != "all" else "the data"
    print(f"         {H} step{'s' if H > 1 else ''} after {N:,} sequence{'s' if N > 1 else ''} of {of}")
    if found.split.times is not None and found.times is None:
        print("         the data's times are uneven, or too few to tell how they go on: --data.every D (h, MS, 2) does")
    return 0


def _encode(
    run: Path,
    data: Table,
    split: Part | None = None,
    num_samples: int | None = None,
    out: Path = Path("codes.npz"),
    overwrite: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> int:
    from .prediction import check_data, encodings

    if num_samples is not None and out.suffix != ".npz":
        raise ValueError(
            f"expected --out to end in .npz for the draws of --num_samples, got {str(out)!r}: name such a file"
        )
    loaded, part = _opened(run, device, data, split, out, overwrite)
    arrays: dict[str, Any] = {}
    check_data(loaded.model, loaded.guide, part)
    codes = encodings(loaded.guide, part, num_samples=num_samples, seed=seed)
    shared = [site for site, code in codes.items() if code.is_global]
    if shared and out.suffix == ".csv":
        print(f"         without the global sites {', '.join(shared)}, which have no rows: --out FILE.npz has them")
        codes = {site: code for site, code in codes.items() if not code.is_global}
        if not codes:
            raise ValueError("expected a site for each datum to write a row of, got global sites alone: --out FILE.npz")
    for site, code in codes.items():
        arrays |= {f"{site}_mean": code.mean, f"{site}_scale": code.scale}
        if code.draws is not None:
            arrays[f"{site}_draws"] = code.draws
    _save(out, {name: array for name, array in arrays.items() if array is not None}, part, part.schema)
    return 0


def _reconstruct(
    run: Path,
    data: Table,
    split: Part | None = None,
    num_samples: int = 1,
    out: Path = Path("reconstructions.npz"),
    overwrite: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> int:
    from .prediction import reconstruct

    loaded, part = _opened(run, device, data, split, out, overwrite)
    x = reconstruct(loaded.model, loaded.guide, part, num_samples=num_samples, seed=seed)
    _save(out, {"x": _restored(part.schema, x)}, part, part.schema)
    return 0


def _scores(
    run: Path,
    data: Table,
    split: Part | None = None,
    num_samples: int = 1000,
    out: Path = Path("scores.csv"),
    overwrite: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> int:
    import numpy as np

    from .data import save_table
    from .prediction import scores
    from .sources.times import written

    loaded, part = _opened(run, device, data, split, out, overwrite)
    with _notes():
        found = scores(loaded.model, loaded.guide, part, num_samples=num_samples, seed=seed)
    columns = {"id": found.ids, "log_prob": found.log_prob, "rank": found.rank}
    if part.times is not None:
        columns["begin"] = np.array([written(time) for time in part.times[:, 0]])
    save_table(out, columns, overwrite=True)
    print(f"wrote    {out}")
    print(f"         {found}")
    uneven = part.kwargs["lengths"].unique().numel() > 1 if "lengths" in part.kwargs else bool(part.x.isnan().any())
    if uneven:
        what = "sequences have different lengths" if "lengths" in part.kwargs else "some values are missing"
        print(f"note     {what}: log_prob and rank are of what is there", file=sys.stderr)
    return 0


def _compare(
    run: Path,
    data: Table,
    estimators: Table,
    num_particles: str = "1,4,16",
    steps: int | None = None,
    seconds: float | None = None,
    seeds: str = "0,1,2",
    learning_rate: float | None = None,
    batch_size: int | None = None,
    compile: bool = False,
    split: Part = "valid",
    num_data: int = 500,
    num_samples: int = 1000,
    num_gradients: int = 200,
    out: Path = Path("comparison"),
    overwrite: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> int:
    chosen = _estimators(estimators)
    values, of_training = _numbers("num_particles", num_particles, 1), _numbers("seeds", seeds, 0)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not overwrite)):
        raise FileExistsError(f"expected a new or empty folder, got {str(out)!r}: name another, or add --overwrite")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"expected a folder at {str(out.parent)!r}, got none: make it, or name another --out")
    from .checkpoint import temporary_folder
    from .comparison import compare_estimators

    loaded = _load(run, device)
    dataset = _divided(loaded, data) if data else _own(loaded)
    comparison = compare_estimators(
        loaded.model,
        loaded.guide,
        dataset.train,
        chosen,
        num_particles=values,
        num_data=num_data,
        num_samples=num_samples,
        num_gradients=num_gradients,
        steps=steps,
        seconds=seconds,
        seeds=of_training,
        learning_rate=learning_rate,
        batch_size=batch_size,
        valid=_of(dataset, split),
        compile=compile,
        seed=seed,
    )
    print(comparison)
    with temporary_folder(out.absolute()) as folder:
        comparison.to_csv(folder / "comparison.csv")
        comparison.to_json(folder / "comparison.json")
        comparison.figures(folder)
        out.mkdir(exist_ok=True)
        print()
        for path in sorted(folder.iterdir()):
            os.replace(path, out / path.name)
            print(f"wrote    {out / path.name}")
    return 0


def _estimators(options: Table) -> dict[str, Callable[[int], Any]]:
    """What ``--estimators A,B --estimators.B.alpha 0.5`` stands for: by name, from K to an estimator."""
    from .config import build

    arguments: dict[str, Table] = {}
    for path, value in options.items():
        name, _, rest = path.partition(".")
        if path and not rest:
            raise ValueError(
                f"expected --estimators.CLASS.NAME VALUE, got --estimators.{path} {value}: name what to set"
            )
        if path:
            arguments.setdefault(name, {})[rest] = value
    classes = str(options.get("", "ELBO,IWAE,DReG")).split(",")
    names = [each.rpartition(".")[2] for each in classes]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"expected different classes for --estimators, got {options['']!r}: as in IWAE,DReG")
    if unknown := arguments.keys() - set(names):
        name = min(unknown)
        raise ValueError(f"expected settings of one of {', '.join(names)}, got --estimators.{name}: name it too")

    def from_K(path: str, its: Table) -> Callable[[int], Any]:
        estimator(path, its, 2)  # whatever is wrong is said before data are loaded
        return lambda K: build({"estimator": estimator(path, its, K)})["estimator"]

    return {name: from_K(path, arguments.get(name, {})) for name, path in zip(names, classes, strict=True)}


def _numbers(option: str, text: str, minimum: int) -> tuple[int, ...]:
    words = [word.strip() for word in text.strip("[]() ").split(",")]
    if not all(word.isdecimal() and int(word) >= minimum for word in words):
        raise ValueError(f"expected whole numbers >= {minimum} for --{option}, got {text!r}: as in --{option} 1,4,16")
    return tuple(map(int, words))


def _report(run: Path, num_samples: int = 1000, device: str = "auto", seed: int = 0) -> int:
    from .evaluation import evaluate
    from .report import write_report

    loaded = _load(run, device)
    dataset = _own(loaded)
    with _notes():
        scores = evaluate(loaded.model, loaded.guide, dataset.test, num_samples=num_samples, seed=seed)
    path = write_report(loaded, dataset, evaluation=scores, seed=seed)
    print(f"report   {path.absolute().as_uri()}")
    return 0


def _load(run: Path, device: str) -> Run:
    from .checkpoint import recorded_config, weights_of
    from .defaults import check_references, refused
    from .training import load_run

    config = recorded_config(run, weights_of(run))
    check_references({name: config[name] for name in ("model", "guide") if name in config}, str(run / "config.toml"))
    try:
        with _notes():
            loaded = load_run(run, device=device)
        damaged: list[Any] = [record for record in loaded.history if not isinstance(record, dict)]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        damaged = [error]
    except ValueError as error:
        raise refused(error, f"the classes in {run / 'config.toml'}") from error
    if damaged:
        raise ValueError(f"expected a table per line in {run / 'metrics.jsonl'}, got {damaged[0]}: mend or delete it")
    return loaded


def _opened(
    run: Path,
    device: str,
    data: Table,
    split: Part | None,
    out: Path | None,
    overwrite: bool,
    usual: Part | None = None,
) -> tuple[Run, Split]:
    """A run and the data that a command on it is about, after the file to write has been looked at."""
    _check_out(out, overwrite)
    loaded = _load(run, device)
    return loaded, _part(loaded, data, split, usual)


def _own(run: Run) -> Dataset:
    """The data set that the run was trained on."""
    if run.config.get("data") is None:
        raise ValueError(f"expected data that {run.path} was trained on, got data without a path: add --data PATH")
    with _notes():
        return run.dataset()


def _part(run: Run, options: Table, split: Part | None, usual: Part | None = None) -> Split:
    """The data that a command is about: a split of the run's own, or rows of other data, in the run's units.

    Without --split it is the `usual` one, or else the test split of the run's own data, and all of other data.
    """
    from dataclasses import replace

    import numpy as np

    from .data import rows_of

    if not options:
        return _of(_own(run), split or usual or "test")
    whole = _other(run, options)
    wanted = split or usual or "all"
    if wanted == "all" or whole.parts is None:
        return whole
    rows = np.flatnonzero(whole.parts == wanted)
    if not len(rows):
        raise ValueError(
            f"expected rows of the {wanted} split in {_named(whole)}, got {len(whole):,} of others, such as rows that "
            "the run was trained on: --split all takes them"
        )
    if split is None and len(rows) < len(whole):
        left = f"{len(whole) - len(rows):,} of {len(whole):,} rows of {_named(whole)}"
        what = f"{left} are of the training or validation split, and left out"
        print(f"note     {what}: --split all takes them", file=sys.stderr)
    return replace(rows_of(whole, rows.tolist()), name=wanted)


def _other(run: Run, options: Table) -> Split:
    from dataclasses import replace

    with _notes():
        schema = run.schema
        if schema is None:
            raise ValueError(f"expected a run that knows the units of its data, got {run.path}: it is an earlier one's")
        own = schema.source.get("name_or_path")
        options = {"name_or_path": own} | options
        name = options.pop("name_or_path")
        if name is None:
            raise ValueError(f"expected a path beside the options of data for {run.path}, got none: add --data PATH")
        whole = run.read(name, **options)
    return replace(whole, name="all")


def _named(part: Split) -> str:
    return "tensors" if part.schema is None else part.schema.name


def _of(dataset: Dataset, name: Part) -> Split:
    from .data import joined

    parts = [dataset.train, dataset.valid, dataset.test]
    return next((part for part in parts if part.name == name), None) or joined(parts)


def _divided(run: Run, options: Table) -> Dataset:
    """Other data in three splits: rows that the run has not seen are divided, where there is nothing else."""
    from dataclasses import replace

    import numpy as np
    import torch

    from .data import Dataset, rows_of

    whole = _other(run, options)
    parts = np.full(len(whole), "test", dtype="<U5") if whole.parts is None else whole.parts.astype("<U5")
    if not {"train", "valid"} <= {*parts}:
        new = np.flatnonzero(parts == "test")
        new = new[torch.randperm(len(new), generator=torch.Generator().manual_seed(0)).numpy()]
        tenth = len(new) // 10
        parts[new] = "train"
        parts[new[:tenth]], parts[new[tenth : 2 * tenth]] = "valid", "test"
    splits = {}
    for name in ("train", "valid", "test"):
        rows = np.flatnonzero(parts == name)
        if not len(rows):
            raise ValueError(f"expected at least 10 rows that are new in {_named(whole)}, to divide them, got fewer")
        splits[name] = replace(rows_of(whole, rows.tolist()), name=name)
    shape = whole.x.shape[2:] if "lengths" in whole.kwargs else whole.x.shape[1:]
    return Dataset(_named(whole), **splits, event_shape=shape, schema=whole.schema)


def _check_ending(out: Path, endings: Sequence[str]) -> None:
    if out.suffix not in endings:
        raise ValueError(f"expected --out to end in {' or '.join(endings)}, got {str(out)!r}: name such a file")


def _check_out(out: Path | None, overwrite: bool) -> None:
    if out is None:
        return
    if out.exists() and (not overwrite or out.is_dir()):
        raise FileExistsError(f"expected a new file, got {str(out)!r}, which exists: name another, or add --overwrite")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"expected a folder at {str(out.parent)!r}, got none: make it, or name another --out")


def _write(out: Path, content: bytes) -> None:
    from .checkpoint import atomic

    with atomic(out) as temporary:
        temporary.write_bytes(content)
    print(f"wrote    {out}")


def _restored(schema: Schema | None, x: Tensor) -> Tensor:
    """Original units: in double precision, as a location may be far from zero."""
    if schema is None or schema.scale is None:
        return x
    return _rounded(schema, schema.restore(x.double()))


def _rounded(schema: Schema, x: Tensor) -> Tensor:
    """No digits that nobody computed: seven of each column's scale."""
    if schema.scale is None:
        return x.float()
    unit = 10.0 ** (6 - schema.scale.log10().floor())
    return (x * unit).round() / unit


def _save(out: Path, arrays: Mapping[str, Any], data: Split | None, schema: Any, **options: Any) -> None:
    from .data import save_table

    save_table(out, arrays, data, schema=schema, overwrite=True, **options)
    print(f"wrote    {out}")


COMMANDS: dict[str, Callable[..., int]] = {
    "fit": _fit,
    "evaluate": _evaluate,
    "sample": _sample,
    "forecast": _forecast,
    "encode": _encode,
    "reconstruct": _reconstruct,
    "scores": _scores,
    "compare": _compare,
    "report": _report,
    "doctor": _doctor,
}


@contextlib.contextmanager
def _working_directory_importable() -> Iterator[None]:
    """The user's own modules are found where the command is run, after all that is installed."""
    before = sys.path[:]
    sys.path.append(os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before
