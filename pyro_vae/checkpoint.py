"""Nested training state in one safetensors file, written whole or not at all; nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import tomli_w
import torch
from torch import Tensor

__all__ = ["discard_run", "load", "load_config", "new_run", "save", "save_config"]


def save(state: Any, path: Path) -> None:
    """Write numbers, strings, lists, tables and tensors, nested in any way, to one file, atomically.

    A tensor that appears twice is stored once. Raises OSError where the disk is full or read-only; the file that was
    there before stays.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple, str] = {}

    def skeleton(value: Any) -> Any:
        if isinstance(value, Tensor):
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.numel() and value.device)
            name = seen.setdefault(key, f"{len(seen)}") if value.numel() else f"{len(seen)}-{len(tensors)}"
            if name not in tensors:
                tensors[name] = value.detach().cpu().contiguous().clone()
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"table": [[skeleton(key), skeleton(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {"list": [skeleton(item) for item in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"expected numbers, strings and tensors in a checkpoint, got {type(value).__name__}")

    data = safetensors.torch.save(tensors, metadata={"pyro_vae": json.dumps(skeleton(state))})
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def load(path: Path, device: torch.device | str = "cpu") -> Any:
    """What `save` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, or none of this library's.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint at {path}, found none")
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
            structure = json.loads((file.metadata() or {})["pyro_vae"])
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"expected a pyro_vae checkpoint, got {path}, which is truncated or foreign ({error}): use another"
        ) from None

    def restored(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "list":
            return [restored(item) for item in content]
        return {restored(key): restored(item) for key, item in content}

    try:
        return restored(structure)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected a pyro_vae checkpoint, got {path}, which is foreign ({error!r}): use another"
        ) from None


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file to write, which takes the place of `path` when the block ends well, and vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_config(config: Mapping[str, Any], path: Path) -> None:
    """Write a table as TOML, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(tomli_w.dumps(config), encoding="utf-8")


def load_config(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not TOML.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a run's configuration at {path}, found none: name a run's directory")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected TOML in {path}, got something else: {error}") from None


def new_run(out: Path | str | None, overwrite: bool = False) -> Path:
    """Make a run's directory: `out`, or the next number under ``runs`` with the link ``runs/latest`` to it.

    Raises:
        FileExistsError: `out` holds something and `overwrite` is False, or ``runs/latest`` is no link.
    """
    if out is not None:
        path = Path(out)
        if path.exists() and (not path.is_dir() or any(path.iterdir())) and not overwrite:
            raise FileExistsError(f"expected a new or empty directory, got {path}: name another, or overwrite=True")
        path.mkdir(parents=True, exist_ok=True)
        return path
    runs = Path("runs")
    latest = runs / "latest"
    if latest.exists() and not latest.is_symlink():
        raise FileExistsError(f"expected {latest} to be a link to the newest run, got a file or folder: rename it")
    runs.mkdir(exist_ok=True)
    number = max((int(child.name) for child in runs.iterdir() if child.name.isdigit()), default=0) + 1
    while True:
        path = runs / f"{number:04d}"
        try:
            path.mkdir()
            break
        except FileExistsError:
            number += 1
    link = runs / f".latest.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    os.replace(link, latest)
    return path


def discard_run(path: Path) -> None:
    """Take back what `new_run` and the start of a training made at `path`, as far as it can be."""
    shutil.rmtree(path / "checkpoints", ignore_errors=True)
    with contextlib.suppress(OSError):
        for name in ("config.toml", "metrics.jsonl"):
            (path / name).unlink(missing_ok=True)
        path.rmdir()
        latest = path.parent / "latest"
        if latest.is_symlink() and not latest.exists():
            latest.unlink()
