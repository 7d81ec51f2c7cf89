"""What every benchmark records beside its figures: the machine, the versions and the command."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import pyro
import torch


def machine() -> dict[str, Any]:
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "command": " ".join(["python", *sys.argv]),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def recorded(path: Path) -> dict[str, Any]:
    """What `record` has written, without the machine; read anew after each row, as another process may add some."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    results.pop("machine", None)
    return results


def record(path: Path, results: dict[str, Any]) -> None:
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
