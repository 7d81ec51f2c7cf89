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

import filelock
import safetensors
import safetensors.torch
import tomli_w
import torch
from torch import Tensor

__all__ = [
    "append",
    "atomic",
    "begun_run",
    "changed_config",
    "check_new_run",
    "discard_run",
    "load",
    "load_config",
    "locked",
    "new_run",
    "recorded_config",
    "save",
    "save_config",
    "temporary_folder",
    "weights_of",
]

LOCK = ".lock"


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

    try:
        return _restored(structure, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected a pyro_vae checkpoint, got {path}, which is foreign ({error!r}): use another"
        ) from None


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "list":
        return [_restored(item, tensors) for item in content]
    return {_restored(key, tensors): _restored(item, tensors) for key, item in content}


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file to write, which takes the place of `path` when the block ends well, and vanishes otherwise.

    Those that killed processes have left of it vanish too. A link stays, and what it leads to is written. An error
    names `path`.
    """
    place = path.resolve() if path.is_symlink() else path
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        _clear(place)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, place)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which vanishes in the end, as do those that killed processes have left.

    Args:
        path: what the folder's files are for; the folder lies beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    _clear(path)
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that had the same number in another container
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def append(text: str, path: Path) -> None:
    """Add lines to a file. An error names the file."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _clear(path: Path) -> None:
    """Remove the temporary files and folders of `path` whose processes have ended."""
    prefix = f".{path.name}."
    with os.scandir(path.parent) as entries:
        left = [entry.name for entry in entries if entry.name.startswith(prefix)]
    for name in left:
        number = name.removeprefix(prefix)
        if number.isdecimal() and not _is_alive(int(number)):
            temporary = path.with_name(name)
            if temporary.is_dir() and not temporary.is_symlink():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def save_config(config: Mapping[str, Any], path: Path) -> None:
    """Write a table as TOML, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(tomli_w.dumps(config), encoding="utf-8")


def weights_of(path: Path) -> Path:
    """The file of a run that holds its weights: of the training that ended last, or else of the one under way."""
    finished = path / "model.safetensors"
    return finished if finished.exists() else path / "checkpoints" / "last.safetensors"


def recorded_config(path: Path, weights: Path) -> dict[str, Any]:
    """The configuration of the run at `path` that `weights` were trained by; a run of before has it in config.toml.

    Raises:
        FileNotFoundError: there is no run. ValueError: a truncated or foreign file.
    """
    if weights.is_file() and (recorded := _read(weights, "config")):
        return recorded
    return load_config(path / "config.toml")


def changed_config(path: Path, config: Mapping[str, Any]) -> str | None:
    """What is to be said of a ``config.toml`` that is not what the weights were trained by; None where it is."""
    file = path / "config.toml"
    try:
        if load_config(file) == tomllib.loads(tomli_w.dumps(config)):
            return None
    except (FileNotFoundError, ValueError):
        pass
    return f"{file} is not the configuration that the weights were trained by: the run is loaded as it was trained"


def _read(path: Path, name: str) -> Any:
    """An entry without tensors of the table that `save` wrote."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            structure = json.loads((file.metadata() or {})["pyro_vae"])
        entries = [value for key, value in structure["table"] if key == name]
        return _restored(entries[0], {}) if entries else None
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError):
        return None  # `load` says what is wrong


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


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """The run at `path` as this process's own; the end of the process frees it, however it comes.

    Raises:
        FileExistsError: another process has it.
    """
    lock = filelock.FileLock(path / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise FileExistsError(
            f"expected {path} to be trained by one process, got a second: wait for the other, or name another directory"
        ) from None
    try:
        yield
    finally:
        lock.release()


def check_new_run(out: Path | str | None, overwrite: bool = False) -> None:
    """Whether `new_run` can make a directory, as far as it can be told before.

    Args:
        out: the directory, or None for the next number under ``runs``.
        overwrite: whether it may hold something.

    Raises:
        FileExistsError: `out` holds something and `overwrite` is False, or ``runs/latest`` is no link.
    """
    if out is not None:
        path = Path(out)
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"expected a new or empty directory, got the file {path}: name another")
        if path.exists() and not overwrite and not _is_new(path):
            raise FileExistsError(f"expected a new or empty directory, got {path}: name another, or overwrite=True")
        return
    latest = Path("runs", "latest")
    if latest.exists() and not latest.is_symlink():
        raise FileExistsError(f"expected {latest} to be a link to the newest run, got a file or folder: rename it")


def new_run(out: Path | str | None, overwrite: bool = False) -> Path:
    """Make a run's directory: `out`, or the next number under ``runs`` with the link ``runs/latest`` to it.

    One in which a training was killed before it had saved anything counts as new.

    Raises:
        FileExistsError: `out` holds something and `overwrite` is False, or ``runs/latest`` is no link.
    """
    check_new_run(out, overwrite)
    if out is not None:
        path = Path(out)
        path.mkdir(parents=True, exist_ok=True)
        return path
    runs = Path("runs")
    latest = runs / "latest"
    runs.mkdir(exist_ok=True)
    number = max((int(child.name) for child in runs.iterdir() if child.name.isdigit()), default=0) + 1
    while True:
        path = runs / f"{number:04d}"
        try:
            path.mkdir()
            break
        except FileExistsError:
            number += 1
    _clear(latest)
    link = runs / f".latest.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    os.replace(link, latest)
    return path


def _is_new(path: Path) -> bool:
    """Whether the directory is empty, or holds what a training makes before it first saves its state."""
    names = {entry.name for entry in path.iterdir()}
    if not names:
        return True
    saved = path / "checkpoints"
    begun = not saved.exists() or (saved.is_dir() and all(each.name.startswith(".") for each in saved.iterdir()))
    return LOCK in names and names <= {LOCK, saved.name} and begun


def begun_run(path: Path | str) -> Path:
    """The directory of a run that a training can go on with.

    Raises:
        FileNotFoundError: it holds no state of one.
    """
    if not (Path(path) / "checkpoints" / "last.safetensors").is_file():
        raise FileNotFoundError(
            f"expected a run's checkpoints in {path}, found none: name a run's directory, or begin anew with out="
        )
    return Path(path)


def discard_run(path: Path) -> None:
    """Take back what `new_run` and a training that has saved nothing made at `path`, as far as it can be."""
    with contextlib.suppress(OSError):
        if not _is_new(path):
            return
        shutil.rmtree(path / "checkpoints", ignore_errors=True)
        (path / LOCK).unlink(missing_ok=True)
        path.rmdir()
        latest = path.parent / "latest"
        if latest.is_symlink() and not latest.exists():
            latest.unlink()
