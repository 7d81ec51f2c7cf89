"""What a data set is trained with where nothing else is said: `defaults_for`, and what completes a configuration."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch

from .config import build, describe, import_object
from .data import Choice, Dataset
from .models import StateSpaceModel, likelihoods
from .options import COMPONENTS, NUMBERS, Options, Table, nested, parameters, resolved

__all__ = [
    "DEFAULTS",
    "FIRST_RUN",
    "OF_SEQUENCES",
    "batch_size_for",
    "check_references",
    "defaults_for",
    "programs_for",
    "refused",
]

DEFAULTS: Options = [
    ("data.name_or_path", "digits"),
    ("model", "VAE"),
    ("guide", "AmortizedGuide"),
    ("loss", "Trace_ELBO"),
    ("optimizer", "Adam"),
    ("optimizer.lr", 1e-3),
    ("optimizer.fused", True),
]
OF_SEQUENCES: Options = [
    ("model", "DeepMarkovModel"),
    ("model.latent_dim", 16),
    ("model.transition_hidden", 64),
    ("guide", "StateSpaceGuide"),
    ("clip_norm", 10.0),
]
FIRST_RUN: Options = [("epochs", 200), ("patience", 30)]  # where no configuration file is given


def defaults_for(dataset: Dataset, *, seed: int = 0) -> Table:
    """The arguments with which `fit` does what ``pyro-vae fit`` does for a data set: model, guide, loss, optimiser,
    splits, and how long to train.

    Args:
        dataset: what is to be trained on.
        seed: of the initial weights, and of the training.

    Example:
        >>> from pyro_vae import load_dataset
        >>> arguments = defaults_for(load_dataset("digits"))
        >>> type(arguments["model"].likelihood).__name__, arguments["batch_size"]
        ('Binomial', 100)
    """
    options = [*DEFAULTS, *(OF_SEQUENCES if dataset.sequences else []), *FIRST_RUN]
    tree = nested([(path, value) for path, value in options if not path.startswith("data")])
    components = {name: resolved(name, tree.pop(name)) for name in COMPONENTS if name in tree}
    programs, likelihood = programs_for(components, dataset, seed)
    dataset = dataset if dataset.schema is None else dataset.with_choices(likelihood)
    splits = {"train": dataset.train, "valid": dataset.valid}
    return {**programs, **splits, **tree, "batch_size": batch_size_for(dataset), "seed": seed}


def batch_size_for(dataset: Dataset) -> int:
    """As many data as a step takes.

    Args:
        dataset: what is to be trained on.
    """
    return min(20 if dataset.sequences else 100, len(dataset.train))


def programs_for(components: Table, dataset: Dataset, seed: int) -> tuple[Table, Choice]:
    """`fit`'s objects, completed from the data and from one another; and why this likelihood.

    Args:
        components: class and arguments of each, as in a configuration; those of model and guide are completed in place.
        dataset: what is to be trained on.
        seed: of the initial weights.

    Raises:
        ValueError: components that do not fit the data, or one another.
    """
    model, guide = components["model"], components["guide"]
    reason = Choice("as configured", "")
    for node in (model, guide):
        if "object" in node:
            raise ValueError(
                f"expected a class with an import path, got {node['object']}: name it, --model module.Class"
            )
    model_class, arguments = import_object(model["class_path"]), model["init_args"]
    names = parameters(model_class)
    shape = tuple(dataset.event_shape)
    of_sequences = inspect.isclass(model_class) and issubclass(model_class, StateSpaceModel)
    if "event_shape" in names and dataset.sequences != of_sequences:
        wanted, like = ("a model of sequences", "DeepMarkovModel") if dataset.sequences else ("another model", "VAE")
        raise ValueError(f"expected {wanted} for {dataset.name}, got {model['class_path']}: --model {like}")
    if dataset.sequences and "u" in dataset.train.kwargs and "num_inputs" in names:
        arguments["num_inputs"] = dataset.train.kwargs["u"].shape[-1]
    if arguments.get("event_shape", shape) not in (shape, list(shape), json.dumps(shape)):
        raise ValueError(f"expected {list(shape)} as model.event_shape, got {arguments['event_shape']}: leave it out")
    if "event_shape" in names:
        arguments["event_shape"] = shape
    if "likelihood" in names and arguments.get("likelihood", "auto") == "auto":
        likelihood, why = _likelihood(dataset)
        arguments["likelihood"] = describe({"likelihood": likelihood})["likelihood"]
        reason = Choice(why, "model.likelihood CLASS")
    elif isinstance(arguments.get("likelihood"), dict):
        name = arguments["likelihood"].get("class_path", "").rpartition(".")[2]
        reason = Choice(f"{name} likelihood as configured", "")
    guide_class = import_object(guide["class_path"])
    if inspect.isclass(guide_class) and "model" in parameters(guide_class):
        guide["init_args"]["model"] = {"reference": "model"}
        if "missing" in parameters(guide_class) and dataset.has_missing_entries:
            guide["init_args"].setdefault("missing", "entries")
    made = {name: components[name] for name in COMPONENTS if name in components}
    check_references(made, "the configuration")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            built = build(made)
        except (TypeError, ValueError) as error:
            raise refused(error, f"{model['class_path']} and {guide['class_path']}") from error
    return {name: built[name] for name in COMPONENTS if name in built}, reason


def _likelihood(dataset: Dataset) -> tuple[likelihoods.Likelihood, str]:
    """By the training rows alone; but where values are missing in other rows, it leaves them out there."""
    observed = dataset.train.values
    likelihood, why = likelihoods.fitting(observed[~observed.isnan()] if dataset.sequences else observed)
    if isinstance(likelihood, likelihoods.Missing):
        return likelihood, f"{type(likelihood.likelihood).__name__} likelihood of what is there because {why}"
    why = f"{type(likelihood).__name__} likelihood because {why}"
    if dataset.sequences or dataset.schema is None or not dataset.schema.missing:
        return likelihood, why
    return likelihoods.Missing(likelihood), f"{why}, and some are missing outside of the training split"


def refused(error: Exception, what: str) -> ValueError:
    """What a constructor, anybody's code, says against its arguments."""
    if "expected" in str(error):
        return ValueError(str(error))
    return ValueError(f"expected arguments that {what} take, got {type(error).__name__}: {error}")


def check_references(components: Table, where: str) -> None:
    """Every component a class and its arguments, every reference to one before it: as `config.build` takes them."""
    seen: set[str] = set()

    def walk(value: Any, path: str) -> None:
        if isinstance(value, list | tuple):
            for i, item in enumerate(value):
                walk(item, f"{path}.{i}")
        if isinstance(value, Mapping) and "reference" in value:
            if value["reference"] not in seen:
                raise ValueError(
                    f"expected {path} in {where} to refer to an earlier object, got {value['reference']!r}: mend it"
                )
        elif isinstance(value, Mapping) and not value.keys() & {"object", "tensor"}:
            arguments = value.get("init_args", {}) if "class_path" in value else value
            if not isinstance(arguments, Mapping) or not isinstance(value.get("class_path", ""), str):
                raise ValueError(f"expected {path} in {where} as class_path and init_args, got {value}: correct it")
            for name, item in arguments.items():
                walk(item, f"{path}.{name}")
        seen.add(path)

    for name, value in components.items():
        if name in NUMBERS and isinstance(value, float | int):
            continue
        if not isinstance(value, Mapping) or not value.keys() & {"class_path", "object", "reference"}:
            raise ValueError(f"expected {name} in {where} as class_path and init_args, got {value!r}: correct it")
        walk(value, name)
