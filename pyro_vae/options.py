"""Options and configuration files as one table, checked against the signatures of what will be called.

Every option is a path into one table, ``--model.decoder.hidden [200,200]``, as is every entry of a
configuration file; the later win. The signatures of functions and classes are the schema (jsonargparse reads
them): nothing is declared twice. `config.build` makes the objects.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

__all__ = [
    "Options",
    "Table",
    "check",
    "classes_help",
    "estimator",
    "flat",
    "mend",
    "nested",
    "one_of",
    "parameters",
    "parse",
    "read_config",
    "resolved",
]

Options = list[tuple[str, Any]]  # (a dotted path, a value: text from the command line, anything from a file)
Table = dict[str, Any]

FLAGS = {"overwrite", "data.download", "mean", "print_config"}
WHERE = {  # the short names of a component's classes are those of these modules, of the later ones first
    "model": ("pyro_vae.models",),
    "guide": ("pyro_vae.guides",),
    "loss": ("pyro.infer", "pyro_vae.estimators"),
    "estimators": ("pyro.infer", "pyro_vae.estimators"),
    "optimizer": ("torch.optim",),
    "learning_rate": ("pyro_vae.schedules",),
    "kl_weight": ("pyro_vae.schedules",),
    "prior": ("pyro_vae.models.priors",),
    "likelihood": ("pyro_vae.models.likelihoods",),
    "family": ("pyro_vae.guides.families",),
    "encoder": ("pyro_vae.nn",),
    "decoder": ("pyro_vae.nn",),
}
ESTIMATORS = ("loss", "estimators")
COMPONENTS = ("model", "guide", "loss", "optimizer", "learning_rate", "kl_weight")
NUMBERS = ("learning_rate", "kl_weight")  # of which a number may stand in a class's place
USUAL = {
    "model": "VAE",
    "guide": "AmortizedGuide",
    "loss": "Trace_ELBO",
    "optimizer": "Adam",
    "prior": "StandardNormal",
    "family": "DiagonalNormal",
    "encoder": "MLP",
    "decoder": "MLP",
}
TABLES = ("data", "evaluate")
FILLED = {"model": "event_shape", "guide": "model", "optimizer": "params"}  # what comes from the rest


# ------------------------------------------------------------ options


def parse(arguments: Sequence[str], command: str, known: Sequence[str], words: int) -> tuple[list[str], Options]:
    """``--path value``, ``--path=value`` and ``--flag``, and what is none of them: so many `words` at most.

    The command and its `known` options are what messages name.
    """

    def unknown(word: str) -> ValueError:
        near = f"--{word.lstrip('-')}"
        like = difflib.get_close_matches(near, known, n=1, cutoff=0.7) or known
        hint = mend(near, known, command, "--help")
        return ValueError(f"expected an option like {like[0]}, got {word}: {hint}")

    positional: list[str] = []
    options: Options = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word.startswith("-") and not word.startswith("--"):
            raise unknown(word)
        if not word.startswith("--"):
            positional.append(word)
            continue
        path, equals, value = word[2:].partition("=")
        if equals:
            options.append((path, value))
        elif path in FLAGS or path.endswith(".help"):
            options.append((path, rest.pop(0) if rest and rest[0] in ("true", "false") else True))
            if rest and not rest[0].startswith("-") and len(positional) >= words:
                raise ValueError(f"expected true, false or nothing after {word}, got {rest[0]!r}: leave it out")
        elif not rest or rest[0].startswith("--"):
            if "." not in path and word not in known:
                raise unknown(word)
            came = rest[0] if rest else "nothing"
            raise ValueError(f"expected a value after {word}, got {came}: {word} VALUE")
        else:
            options.append((path, rest.pop(0)))
    return positional, options


def read_config(path: Path) -> Options:
    """A TOML or YAML file's entries."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a TOML or YAML file, got {str(path)!r}, which is none: correct --config")
    table: Any
    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            table = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"expected YAML in {path}, got something else: mend {error}") from None
    elif path.suffix == ".toml":
        from .checkpoint import load_config

        table = load_config(path)
    else:
        raise ValueError(f"expected a file ending in .toml, .yaml or .yml, got {str(path)!r}: rename it")
    if not isinstance(table, dict) or not table:
        came = f"{type(table).__name__}" if table else "an empty file"
        raise ValueError(f"expected a table of settings in {path}, got {came}: write for instance epochs = 10")
    return flat(table)


def flat(table: Mapping[str, Any]) -> Options:
    """The entries of a nested table by dotted path; a class comes before its arguments."""
    options: Options = []

    def walk(path: str, value: Any) -> None:
        if not isinstance(value, Mapping) or {"reference", "object"} & value.keys():
            options.append((path, value))
            return
        if "class_path" in value:
            options.append((path, value["class_path"]))
        for key, item in value.items():
            if key == "init_args" and isinstance(item, Mapping):
                for name, argument in item.items():
                    walk(f"{path}.{name}", argument)
            elif key != "class_path":
                walk(f"{path}.{key}" if path else str(key), item)

    walk("", table)
    return options


def nested(options: Options) -> Table:
    """One nested table of all options, of which the later win; components hold class_path and init_args."""
    tree: Table = {}
    for path, value in options:
        head, *rest = [part for part in path.split(".") if part != "init_args"]
        if not rest and head in USUAL and isinstance(value, Mapping) and "reference" in value:
            raise ValueError(f"expected a class for --{head}, got a reference to {value['reference']}: name a class")
        if head in COMPONENTS:
            if rest and rest[-1] == "class_path":
                rest.pop()
            _put(tree, [head, *rest], value)
        elif head in ("data", "evaluate"):
            name = ".".join(rest) or "name_or_path"
            tree.setdefault(head, {})[name] = value
        elif rest:
            raise ValueError(
                f"expected one of {', '.join(COMPONENTS)} before a dot, got --{path}: see pyro-vae fit --help"
            )
        else:
            tree[head] = value
    return tree


def _put(tree: Table, path: Sequence[str], value: Any) -> None:
    *parents, last = path
    node = tree
    for name in parents:
        child = node.get(name)
        if not isinstance(child, dict) or child.keys() & {"reference", "object"}:
            child = {"class_path": child} if isinstance(child, str) else {}
            node[name] = child
        node = child.setdefault("init_args", {})
    before = node.get(last)
    if isinstance(before, dict) and isinstance(value, str) and _same_class(path, before.get("class_path"), value):
        return
    top = len(path) == 1 and not isinstance(value, Mapping)
    node[last] = {"class_path": value, "init_args": {}} if top else value


def _same_class(path: Sequence[str], before: str | None, now: str) -> bool:
    where = ".".join(path)
    return before is not None and _find(where, before, {})[0] is _find(where, now, {})[0]


# ------------------------------------------------------------ signatures


def check(target: Callable, arguments: Mapping[str, Any], where: str, hidden: Iterable[str] = ()) -> Table:
    """The arguments, converted to the types of the target's signature; `hidden` ones are not for users."""
    import jsonargparse

    if not where or where in TABLES:
        for name, value in arguments.items():
            _check_value(_option(where, name), name, value)
    names = {name: parameter for name, parameter in parameters(target).items() if name not in hidden}
    keywords = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(_constructors(target)[-1]).parameters.values())
    unknown = [name for name in arguments if name not in names]
    if unknown and not keywords:
        path = _option(where, unknown[0])
        known = [_option(where, name) for name in names if FILLED.get(where) != name]
        if not where:
            known += [f"--{name}" for name in (*COMPONENTS, *TABLES)]
        wanted = one_of(known) if where else "an option"
        raise ValueError(f"expected {wanted}, got {path}: {mend(path, known, 'fit', '--help')}")
    given = {name: value for name, value in arguments.items() if value is not None and str(value) != "null"}
    skip: set[str | int] = {*(name for name in parameters(target) if name not in given), *unknown}
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(target) else parser.add_function_arguments
    add(target, None, as_positional=False, fail_untyped=False, skip=skip)
    checked: Table = {}
    for name, value in given.items():
        bare = isinstance(value, str) and not value.strip().startswith("[")
        if bare and _in_words(_annotation(target, name)) == "a list, each text":
            given[name] = [word.strip() for word in value.split(",")]
    words = {name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in given.items()}
    try:
        parsed = parser.parse_args([f"--{name}={word}" for name, word in words.items() if name not in unknown])
    except jsonargparse.ArgumentError as error:
        found = re.search(r'Parser key "(\w+)"', str(error))
        name = found.group(1) if found and found.group(1) in given else next(iter(given))
        wanted = _in_words(_annotation(target, name))
        raise ValueError(f"expected {wanted} for {_option(where, name)}, got {given[name]!r}: give {wanted}") from None
    for name, value in given.items():
        checked[name] = _loaded(value) if name in unknown else getattr(parsed, name)
    seed = checked.get("seed")
    if (not where or where in TABLES) and seed is not None and not 0 <= seed < 2**32:
        raise ValueError(
            f"expected a whole number from 0 to 2**32 - 1 for {_option(where, 'seed')}, got {seed}: give one"
        )
    return {name: None if name not in given else checked[name] for name in arguments}


def _check_value(option: str, name: str, value: Any) -> None:
    """Values that their types allow, and that nothing can be made of."""
    if value == "" and name != "comment":  # which may be none
        raise ValueError(f"expected a value after {option}, got '': {option} VALUE")
    if name == "out" and str(value).startswith("-"):  # which later commands would take for an option
        raise ValueError(f"expected a path without a dash before it for {option}, got {str(value)!r}: name another")
    if isinstance(value, str) and value.startswith("~"):
        try:
            Path(value).expanduser()
        except RuntimeError:
            raise ValueError(f"expected a path for {option}, got {value!r}, nobody's home: correct it") from None
    if name == "device" and str(value).partition(":")[0] == "meta":
        raise ValueError(f"expected a device that holds values for {option}, got {value!r}: auto, cpu or cuda")


def _loaded(value: Any) -> Any:
    """What a word of the command line means where no signature tells its type."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value


def _number(node: Any) -> float | None:
    """What is a number, or a text that means one, in the place of a class."""
    word: Any = node.get("class_path") if isinstance(node, dict) and not node.get("init_args") else node
    try:
        return None if isinstance(word, bool) else float(word)
    except (TypeError, ValueError):
        return None


def resolved(path: str, value: Any) -> Any:
    """A component as `config.build` takes it: the class found, its arguments checked."""
    node = {"class_path": value} if isinstance(value, str) else value
    if path in NUMBERS and (number := _number(node)) is not None:
        return number
    if not isinstance(node, dict):
        raise ValueError(f"expected a class for --{path}, got {value!r}: name one, or see pyro-vae fit --{path}.help")
    if {"reference", "object"} & node.keys():
        return node
    target, class_path = _find(path, node.get("class_path"), node.get("init_args", {}))
    given = node.get("init_args", {})
    if path == "optimizer" and inspect.isroutine(target):
        return resolved(path, _torch_optimizer(class_path, given))
    names = parameters(target)
    leaves, components = {}, {}
    for name, argument in given.items():
        nested = isinstance(argument, dict) or (name in names and _is_component(_annotation(target, name)))
        if path in FILLED and FILLED[path] == name:
            if path != "model" and argument != {"reference": "model"}:
                raise ValueError(
                    f"expected the {path}'s {name} from --model, got --{path}.{name} {argument}: leave it out"
                )
            components[name] = argument
        elif nested and name in names and argument not in (None, "null"):
            components[name] = argument if argument == "auto" else resolved(f"{path}.{name}", argument)
        else:
            leaves[name] = argument
    checked = {key: item for key, item in check(target, leaves, path).items() if item is not None}
    for name, parameter in names.items():
        needed = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
        if needed and name not in given and FILLED.get(path) != name and inspect.isclass(target):
            option = f"--{path}.{name}"
            raise ValueError(f"expected {option} for {target.__name__}, got none: add {option} VALUE")
    return {"class_path": class_path, "init_args": {**checked, **components}}


def _find(path: str, name: str | None, arguments: Mapping[str, Any]) -> tuple[Any, str]:
    """The class or function of a short name or import path, and its import path."""
    from .config import import_object

    role = _role(path)
    if name is None and role not in USUAL:
        raise ValueError(f"expected a class for --{path}, got only {', '.join(arguments)}: add --{path} CLASS")
    name = USUAL[role] if name is None else name
    command, option = ("compare", "--estimators") if role == "estimators" else ("fit", f"--{path}")
    if not isinstance(name, str):
        raise ValueError(f"expected a class for {option}, got {name!r}: name one, or see pyro-vae fit {option}.help")
    if "." in name:
        target = import_object(name)
    else:
        known = _classes(role)
        if name not in known:
            raise ValueError(
                f"expected a class for {option}, {one_of(known)} or an import path, got {name!r}: "
                f"{mend(str(name), known, command, f'{option}.help')}"
            )
        target = known[name]
    if not callable(target):
        raise ValueError(
            f"expected a class or function for {option}, got {name!r}, a {type(target).__name__}: name one"
        )
    _check_role(path, name, target)
    return target, f"{target.__module__}.{target.__qualname__}" if "." not in name else name


def _check_role(path: str, name: str, target: Any) -> None:
    from pyro.infer import ELBO
    from torch import nn, optim

    from .guides.families import Family
    from .models.likelihoods import Likelihood
    from .models.priors import Prior

    def is_a(*bases: type) -> bool:
        return inspect.isclass(target) and issubclass(target, bases)

    function = inspect.isroutine(target)
    program = "a module's class or a function", is_a(nn.Module) or function
    network = "a module's class", is_a(nn.Module) and not is_a(Prior, Likelihood, Family)
    schedule = "a class of callable objects or a function", function or is_a(object) and "__call__" in dir(target)
    of_pyro = function and str(target.__module__).startswith("pyro.optim")
    roles = {
        "model": program,
        "guide": program,
        "loss": ("a subclass of pyro.infer.ELBO", is_a(ELBO)),
        "estimators": ("subclasses of pyro.infer.ELBO", is_a(ELBO)),
        "optimizer": ("a subclass of torch.optim.Optimizer", is_a(optim.Optimizer) or of_pyro),
        "learning_rate": schedule,
        "kl_weight": schedule,
        "prior": ("a prior's class or a function", function or (is_a(nn.Module) and not is_a(Likelihood, Family))),
        "likelihood": ("a likelihood", is_a(Likelihood)),
        "family": ("a family", is_a(Family)),
        "encoder": network,
        "decoder": network,
    }
    role = _role(path)
    own = role in COMPONENTS and role != path  # an argument of the user's class, of a name that means something here
    wanted, fits = ("", True) if own else roles.get(role, ("", True))
    if not fits:
        raise ValueError(f"expected {wanted} for --{path}, got {name!r}: see pyro-vae fit --{path}.help")


def _role(path: str) -> str:
    """What a component is for: the last name of its path, or that of an entry of ``--estimators``."""
    return "estimators" if path.startswith("estimators.") and path.count(".") == 1 else path.rpartition(".")[2]


def estimator(name: str, arguments: Mapping[str, Any], num_particles: int) -> Table:
    """An estimator of so many draws, by short name or import path, as `config.build` takes it."""
    path = f"estimators.{name.rpartition('.')[2]}"
    target, _ = _find(path, name, arguments)
    if not _takes_draws(target):
        raise ValueError(f"expected --estimators that take num_particles, got {name}, which does not: leave it out")
    if "num_particles" in arguments:
        raise ValueError(f"expected --num_particles for all estimators, got --{path}.num_particles: name it there")
    return resolved(path, {"class_path": name, "init_args": {**arguments, "num_particles": num_particles}})


def _torch_optimizer(class_path: str, given: Mapping[str, Any]) -> Table:
    """The torch optimiser that ``pyro.optim.Adam`` and its like stand for: `SVI` runs it over all parameters."""
    name = class_path.rpartition(".")[2]
    if name not in _classes("optimizer"):
        raise ValueError(f"expected a class of torch.optim for --optimizer, got {class_path!r}: choose one of those")
    arguments = _loaded(given.get("optim_args", {}))
    if given.keys() - {"optim_args"} or not isinstance(arguments, Mapping):
        came = json.dumps(given, default=str)
        raise ValueError(
            f"expected a table --optimizer.optim_args alone for {class_path}, got {came}: as in torch.optim"
        )
    return {"class_path": f"torch.optim.{name}", "init_args": dict(arguments)}


def _classes(role: str) -> dict[str, Any]:
    """The classes of a component by short name."""
    import importlib

    from torch import nn, optim

    roles = [role] if role in WHERE else [each for each in WHERE if WHERE[each][0].startswith("pyro_vae.")]
    found: dict[str, Any] = {}
    for module in dict.fromkeys(module for each in roles for module in WHERE[each]):
        names = vars(importlib.import_module(module))
        public = names.get("__all__", [name for name in names if not name.startswith("_")])
        found |= {name: names[name] for name in public if inspect.isclass(names.get(name))}
    if role in ESTIMATORS:
        from pyro.infer import ELBO

        found = {name: each for name, each in found.items() if issubclass(each, ELBO) and each is not ELBO}
    if role == "optimizer":
        found = {name: each for name, each in found.items() if issubclass(each, optim.Optimizer)}
    bases = ("Prior", "Likelihood", "Family", "Estimator", "Declared", "Optimizer", "Configured")
    unfit = ("LBFGS", "SparseAdam", "Trace_MMD")  # they need a closure, sparse gradients, draws as losses
    if role in ("encoder", "decoder"):
        other = "Decoder" if role == "encoder" else "Encoder"
        found = {name: each for name, each in found.items() if issubclass(each, nn.Module) and other not in name}
    return {
        name: each
        for name, each in found.items()
        if name not in (*bases, *unfit) and not (role in ESTIMATORS and name.startswith("Jit"))
    }


def _takes_draws(target: Callable) -> bool:
    taken = inspect.signature(_constructors(target)[-1]).parameters.values()
    return "num_particles" in parameters(target) or any(p.kind is p.VAR_KEYWORD for p in taken)


def _needs_objects(target: Callable) -> bool:
    given = parameters(target).items()
    return any(p.default is p.empty and _is_component(_annotation(target, name)) for name, p in given)


def _constructors(target: Callable) -> list[Callable]:
    """The functions that take a target's arguments: of a class whose constructor hands keywords on, its bases' too."""
    if not inspect.isclass(target):
        return [target]
    found: list[Callable] = []
    for base in target.__mro__[:-1]:
        if "__init__" in vars(base):
            found.append(functools.partial(vars(base)["__init__"], None))
            if all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(found[-1]).parameters.values()):
                break
    return found or [target]


def parameters(target: Callable) -> dict[str, inspect.Parameter]:
    found: dict[str, inspect.Parameter] = {}
    for function in _constructors(target):
        found |= {name: p for name, p in inspect.signature(function).parameters.items() if name not in found}
    return {name: p for name, p in found.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _annotation(target: Any, name: str) -> Any:
    for each in _constructors(target):
        function = each.func if isinstance(each, functools.partial) and inspect.isclass(target) else each
        if name not in inspect.signature(function).parameters:
            continue
        try:
            return get_type_hints(function).get(name, Any)
        except Exception:  # names that only a type checker knows
            return inspect.signature(function).parameters[name].annotation
    return Any


def _is_component(annotation: Any) -> bool:
    """Whether values of this type are made from a class and arguments."""
    if get_origin(annotation) is Callable:
        return True
    parts = [part for part in get_args(annotation) if part is not type(None) and get_origin(part) is not Mapping]
    if parts and get_origin(annotation) is not Literal:
        return all(map(_is_component, parts))
    plain = ("builtins", "pathlib", "os", "typing")
    return inspect.isclass(annotation) and annotation.__module__ not in plain


def _in_words(annotation: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    words |= {Path: "a path", os.PathLike: "a path", Any: "a value"}
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    if annotation in words:
        return words[annotation]
    if get_origin(annotation) in words:
        return words[get_origin(annotation)]
    parts = [part for part in get_args(annotation) if part is not Ellipsis]
    if get_origin(annotation) in (list, tuple, Sequence, Iterable):
        return f"a list, each {_in_words(parts[0])}" if parts else "a list"
    if get_origin(parts[0] if parts else None) is Literal:  # null is no choice, but that none is made
        return _in_words(parts[0])
    if parts:
        return " or ".join(dict.fromkeys(map(_in_words, parts)))
    return getattr(annotation, "__name__", str(annotation))


def _option(where: str, name: str) -> str:
    if name == "name_or_path":
        return f"--{where}"
    return f"--{where}.{name}" if where else f"--{name}"


def one_of(names: Iterable[str]) -> str:
    names = list(names)
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def mend(came: str, known: Iterable[str], *command: str) -> str:
    close = difflib.get_close_matches(came, list(known), n=1, cutoff=0.7)
    return f"did you mean {close[0]}?" if close else f"see pyro-vae {' '.join(command)}"


def classes_help(path: str) -> str:
    """The classes of a component, and what their constructors take."""
    role = path.rpartition(".")[2]
    if role not in WHERE:
        raise ValueError(f"expected {one_of(f'--{name}.help' for name in WHERE)}, got --{path}.help: choose one")
    lines = [f"--{path} CLASS, or package.module.CLASS of your own; --{path}.NAME VALUE sets what it takes"]
    if role == "estimators":
        lines = [
            "--estimators CLASS,CLASS, also package.module.CLASS; --estimators.CLASS.NAME VALUE sets what one takes"
        ]
    for name, target in _classes(role).items():
        if role == "estimators" and (not _takes_draws(target) or _needs_objects(target)):
            continue
        summary = (inspect.getdoc(target) or "").split("\n\n")[0]
        takes = [str(p) for n, p in parameters(target).items() if n != FILLED.get(role)]
        lines += ["", f"{name}  {' '.join(summary.split())}", *(f"    {each}" for each in takes)]
    return "\n".join(lines)
