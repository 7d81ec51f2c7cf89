"""`pyro-vae doctor`: what this installation has, and what it lacks."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

__all__ = ["report"]


def report() -> tuple[str, bool]:
    """The state of the installation, a line per fact, and whether pyro_vae can work with it.

    A line that starts with ``!`` is a fault and says how to mend it.

    Example:
        >>> text, works = report()
        >>> text.splitlines()[0].split()[0]
        'python'
    """
    facts = [
        ("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"),
        *_packages(),
        ("devices", _devices()),
        ("C++ compiler", _compiler()),
        ("free disk here", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB"),
        ("data", _data_root()),
    ]
    faults = list(_faults())
    lines = [f"{name:<16}{value}" for name, value in facts] + [f"! {fault}" for fault in faults]
    return "\n".join(lines), not faults


def _requirements() -> list[Requirement]:
    try:
        texts = importlib.metadata.requires("pyro_vae") or []
    except importlib.metadata.PackageNotFoundError:  # run straight from the checkout
        text = Path(__file__).parent.with_name("pyproject.toml").read_text(encoding="utf-8")
        texts = tomllib.loads(text)["project"]["dependencies"]
    requirements = [Requirement(text) for text in texts]
    return [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> list[tuple[str, str]]:
    names = ["pyro_vae", *(each.name for each in _requirements())]
    return [(name, _version(name) or "not installed") for name in names]


def _faults() -> Iterator[str]:
    for requirement in _requirements():
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            yield f"expected {requirement}, found {version or 'none'}: pip install '{requirement}'"
    if _version("torch") and _version("torchvision") and (reason := _torchvision_mismatch()):
        yield (
            f"expected a torchvision made for torch {_version('torch')}, got torchvision "
            f"{_version('torchvision')} ({reason}): install both at once from one index, "
            "pip install --force-reinstall torch torchvision"
        )


def _torchvision_mismatch() -> str | None:
    for requirement in map(Requirement, importlib.metadata.requires("torchvision") or []):
        if requirement.name == "torch" and not requirement.specifier.contains(str(_version("torch")), prereleases=True):
            return f"it asks for {requirement}"
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # "operator torchvision::nms does not exist", or a library that does not load
        return f"its import fails with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def _devices() -> str:
    try:
        import torch
    except Exception as error:
        return f"unknown: torch does not import ({type(error).__name__}: {error})"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old driver warns; the line below says what there is
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(count)]
    none = "no CUDA device" if torch.version.cuda else "no CUDA device (this torch is made for CPUs)"
    return ", ".join([f"{torch.get_num_threads()} CPU threads", *(gpus or [none])])


def _compiler() -> str:
    names = shlex.split(os.environ.get("CXX", ""))[:1] or ["g++", "clang++", "c++", "cl"]
    found = next(filter(None, map(shutil.which, names)), None)
    wanted = f"none of {', '.join(names)}: compiled steps need one (Debian, Ubuntu: apt install g++)"
    return found or wanted


def _data_root() -> str:
    root = Path(os.environ.get("PYRO_VAE_DATA") or "~/.cache/pyro_vae").expanduser()
    return f"{root}{'' if root.is_dir() else ' (made by the first download)'}"
