"""Components remember how they were made, so that a run can be made again from a readable file."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro.infer
import torch

__all__ = ["Configured", "build", "describe", "import_object", "plain"]


NUMBERS = (bool, int, float, str)


class Configured:
    """Base of everything that a configuration file can name: it records its constructor's arguments.

    Example:
        >>> class Box(Configured):
        ...     def __init__(self, width: int, depth: int = 2):
        ...         self.area = width * depth
        >>> Box(3).init_args
        {'width': 3}
    """

    init_args: dict[str, Any] = {}  # of a class without a constructor of its own; never changed

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" not in cls.__dict__:
            return
        init = cls.__init__

        @functools.wraps(init)
        def recording(self: Configured, *args: Any, **kwargs: Any) -> None:
            outermost = "init_args" not in self.__dict__
            if outermost:
                signature = inspect.signature(init)
                given = signature.bind(self, *args, **kwargs).arguments
                given.pop(next(iter(given)))
                for name, parameter in signature.parameters.items():
                    if parameter.kind is parameter.VAR_KEYWORD:
                        given.update(given.pop(name, {}))
                self.__dict__["init_args"] = given
            init(self, *args, **kwargs)
            if outermost:
                own = {name: self.__dict__.get(name) for name in self.init_args}
                self.__dict__["_as_made"] = {name: each for name, each in own.items() if type(each) in NUMBERS}

        cls.__init__ = recording  # type: ignore[assignment, method-assign]


def plain(value: Any) -> Any:
    """A number of NumPy's as Python's, which files hold; all else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def describe(objects: Mapping[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """The configuration that `build` turns into equal objects: plain numbers, strings, lists and tables.

    An object becomes ``{"class_path": ..., "init_args": {...}}``, its second appearance
    ``{"reference": path of the first}``, and an object that no import path leads to ``{"object": repr}``:
    the file stays readable, and `build` says what it lacks. So does one whose arguments cannot be told: they have no
    names, or a number among them is another now, or ``None``, for which TOML has no word, is not the default. Tuples
    come back as lists, paths and devices as text. Tensors go to `tensors`, by their paths, where it is given: the
    configuration names them, ``{"tensor": path}``, and `build` takes them from there.

    Example:
        >>> describe({"optimizer": functools.partial(torch.optim.Adam, lr=0.1)})
        {'optimizer': {'class_path': 'torch.optim.adam.Adam', 'init_args': {'lr': 0.1}}}
    """
    seen: dict[int, str] = {}

    def value_of(value: Any, path: str) -> Any:
        arguments: dict[str, Any] | None
        value = plain(value)
        if value is None:
            return {"object": "None"}
        if type(value) in NUMBERS:
            return value
        if isinstance(value, Path | torch.device):
            return str(value)
        if type(value) in (list, tuple, torch.Size):
            return [value_of(item, f"{path}.{i}") for i, item in enumerate(value)]
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return table_of(value, path)
        if id(value) in seen:
            return {"reference": seen[id(value)]}
        if type(value) is torch.Tensor:
            if tensors is None:
                return {"object": f"a tensor of shape {tuple(value.shape)}"}
            tensors[path] = value.detach().cpu().clone()
            return {"tensor": path}
        seen[id(value)] = path
        if isinstance(value, functools.partial) and not value.args:
            target, arguments = value.func, dict(value.keywords)
        elif inspect.isroutine(value) or inspect.isclass(value):
            target, arguments = value, {}
        else:
            target, arguments = type(value), _arguments_of(value)
        name = f"{target.__module__}.{target.__qualname__}"
        if arguments is None or not _is_importable(name, target):
            return {"object": " ".join(repr(value).split())[:200]}
        return {"class_path": name, "init_args": table_of(_told(target, arguments), path)}

    def table_of(table: Mapping[str, Any], path: str) -> dict[str, Any]:
        return {name: value_of(value, f"{path}.{name}" if path else name) for name, value in table.items()}

    return table_of({name: value for name, value in objects.items() if value is not None}, "")


def _told(target: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that are to be written: None is left out where it is what leaving it out means."""
    try:
        defaults = {name: each.default for name, each in inspect.signature(target).parameters.items()}
    except (TypeError, ValueError):
        defaults = {}
    return {name: value for name, value in arguments.items() if value is not None or defaults.get(name) is not None}


def _arguments_of(value: Any) -> dict[str, Any] | None:
    """The constructor's arguments of an object: as recorded, or read back from attributes of their names; None where
    one may have been given that no attribute tells."""
    if isinstance(value, Configured) or "init_args" in getattr(value, "__dict__", {}):
        return value.init_args if _as_made(value) else None
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, torch.nn.Module) and (value.state_dict() or not _is_of_torch(value)):
        return None
    try:
        parameters = inspect.signature(type(value)).parameters
    except ValueError:
        return None
    if isinstance(value, torch.nn.Identity):  # whose arguments mean nothing
        return {}
    known = type(value).__module__.partition(".")[0] in ("torch", "pyro")  # whose other arguments change no number
    arguments = {}
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and known:
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or not hasattr(value, name):
            if not known or parameter.default is parameter.empty:
                return None
        elif not _is_same(getattr(value, name), parameter.default):
            arguments[name] = getattr(value, name)
    finite = math.isfinite(arguments.get("max_plate_nesting", math.inf))
    if isinstance(value, pyro.infer.ELBO) and finite and value.vectorize_particles and value.num_particles > 1:
        arguments["max_plate_nesting"] -= 1  # Pyro has added that of the particles
    return arguments


def _as_made(value: Any) -> bool:
    """Whether its arguments have names, and what the constructor has made of numbers among them is still there."""
    kinds = inspect.signature(type(value)).parameters
    if any(name in kinds and kinds[name].kind is inspect.Parameter.VAR_POSITIONAL for name in value.init_args):
        return False
    return all(getattr(value, name, None) == before for name, before in getattr(value, "_as_made", {}).items())


def _is_same(value: Any, default: Any) -> bool:
    try:
        return bool(value == default)
    except Exception:  # arrays of several elements
        return False


def _is_of_torch(value: Any) -> bool:
    return type(value).__module__.startswith("torch.nn.")


def _is_importable(name: str, target: Any) -> bool:
    try:
        return not name.startswith("__main__.") and import_object(name) is target
    except ValueError:
        return False


def import_object(path: str) -> Any:
    """The object at an import path such as ``pyro_vae.models.VAE``.

    Raises:
        ValueError: no module or no attribute of that name, or a module that raises.
    """
    module, _, name = str(path).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"expected an import path like package.module.Name, got {path!r}: {error}") from None
    except (Exception, SystemExit) as error:  # the module is anybody's code
        raised = f"{type(error).__name__}: {error}"
        raise ValueError(f"expected a module that can be imported for {path!r}, got {raised}: mend {module}") from None


def _is_component(target: type) -> bool:
    """Whether the class is one of modules, dataclasses or callable objects such as losses and schedules."""
    return (
        issubclass(target, torch.nn.Module | Configured)
        or dataclasses.is_dataclass(target)
        or "__call__" in dir(target)
    )


def build(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None, **given: Any) -> dict[str, Any]:
    """The objects that `describe` described, with its `tensors`; `given` ones are taken as they are and can be referred
    to.

    Raises:
        ValueError: an entry that holds only an object's name, or a class that refuses its arguments.
    """
    built: dict[str, Any] = dict(given)

    def made(value: Any, path: str) -> Any:
        if path in given:
            return given[path]
        if isinstance(value, list):
            return [made(item, f"{path}.{i}") for i, item in enumerate(value)]
        if not isinstance(value, Mapping):
            return value
        if "reference" in value:
            return looked_up(value["reference"])
        if "tensor" in value and value["tensor"] in (tensors or {}):
            return (tensors or {})[value["tensor"]]
        if "object" in value or "tensor" in value:
            was = value.get("object", "a tensor")
            raise ValueError(
                f"{path} was {was}, which the file cannot tell, as no import path leads to it or its arguments are not "
                f"known: hand it over, as in load_run(path, {path.split('.')[0]}=...)"
            )
        arguments = {
            key: made(item, f"{path}.{key}")
            for key, item in value.get("init_args", value if "class_path" not in value else {}).items()
        }
        if "class_path" not in value:
            return arguments
        target = import_object(value["class_path"])
        if not inspect.isclass(target) or issubclass(target, torch.optim.Optimizer):
            built[path] = functools.partial(target, **arguments) if arguments else target
            return built[path]
        if not _is_component(target):
            raise ValueError(
                f"expected a component at {path}, got {value['class_path']}: name a module, loss or schedule"
            )
        try:
            built[path] = target(**arguments)
        except TypeError as error:
            raise ValueError(
                f"expected arguments that {value['class_path']} takes at {path}, got {type(error).__name__}: {error}"
            ) from None
        if isinstance(built[path], torch.nn.Module):
            built[path].__dict__.setdefault("init_args", arguments)  # a class of the user's own can be described too
        return built[path]

    def looked_up(path: str) -> Any:
        owner, _, name = path.rpartition(".")
        holder = looked_up(owner) if owner and owner not in built and path not in built else built.get(owner)
        arguments = getattr(holder, "init_args", {})  # as the holder has them, who may have bound them
        if name not in arguments and path not in built:
            raise ValueError(f"expected a reference to a component named before, got {path!r}: name one")
        return arguments[name] if name in arguments else built[path]

    for key, value in config.items():
        built[key] = made(value, key)
    return built
