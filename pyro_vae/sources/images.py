"""Named data sets of images."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .base import Source, download_failed, download_file, first_line, temporary_sibling

__all__ = ["digits", "freyfaces", "mnist"]


def digits(root: Path, download: bool) -> Source:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return Source(
        torch.from_numpy(images).float().reshape(-1, 1, 8, 8),
        torch.from_numpy(labels).long(),
        sizes=(1297, 250, 250),
        order=torch.randperm(len(images), generator=torch.Generator().manual_seed(0)),
        peak=16,
        noun="handwritten digits of 8 x 8 pixels",
        values="counts 0 to 16",
    )


_IDX_SHAPES = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}


def mnist(class_name: str, noun: str) -> Callable[[Path, bool], Source]:
    def load(root: Path, download: bool) -> Source:
        torchvision_class = getattr(_torchvision_datasets(), class_name)
        folder = root / class_name / "raw"
        if download and _idx_problems(folder):
            _download_idx(torchvision_class, folder)
        missing = [file for file in _IDX_SHAPES if not (folder / file).is_file()]
        if missing:
            raise FileNotFoundError(
                f"expected the four files of {class_name} in {folder}, got no {', no '.join(missing)}: pass "
                f"download=True (--data.download), or root= (--data.root, or PYRO_VAE_DATA) the folder that holds "
                f"{class_name}/raw"
            )
        for problem in _idx_problems(folder):
            raise ValueError(f"{problem}: pass download=True to fetch it anew")
        files = [torchvision_class(root, train=train) for train in (True, False)]
        return Source(
            torch.cat([file.data for file in files])[:, None],
            torch.cat([file.targets for file in files]).long(),
            classes=tuple(files[0].classes),
            sizes=(50_000, 10_000, 10_000),
            order=torch.arange(70_000),
            eight_bit=True,
            noun=f"{noun} of 28 x 28 pixels",
        )

    return load


def _torchvision_datasets() -> Any:
    try:
        import torchvision.datasets
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"expected a torchvision that fits torch {torch.__version__}, its import failed "
            f"({first_line(error)}): run `pyro-vae doctor`, which tells how to install a matching pair"
        ) from error
    return torchvision.datasets


def _idx_problems(folder: Path) -> list[str]:
    """What is wrong with the idx files: a big-endian header (2048 + ndim, sizes), then unsigned bytes."""
    problems = []
    for file, shape in _IDX_SHAPES.items():
        path = folder / file
        header = np.array([2048 + len(shape), *shape], dtype=">i4").tobytes()
        expected, came = len(header) + math.prod(shape), path.stat().st_size if path.is_file() else 0
        if came != expected:
            problems.append(f"expected {expected:,} bytes in {path}, got {came:,} (truncated or foreign)")
        else:
            with path.open("rb") as stream:
                if stream.read(len(header)) != header:
                    problems.append(f"expected an idx file of shape {shape} in {path}, got a foreign one")
    return problems


def _download_idx(torchvision_class: Any, folder: Path) -> None:
    name = torchvision_class.__name__
    with temporary_sibling(folder.parent) as temporary:
        fresh = Path(temporary) / name / "raw"
        try:
            torchvision_class(temporary, download=True)
        except Exception as error:
            raise OSError(download_failed(name, folder, error)) from error
        for problem in _idx_problems(fresh):
            raise OSError(download_failed(name, folder, problem))
        folder.mkdir(parents=True, exist_ok=True)
        for file in _IDX_SHAPES:
            os.replace(fresh / file, folder / file)


_FREY_URL = "https://cs.nyu.edu/~roweis/data/frey_rawface.mat"
_FREY_SHA256 = "e5d5aeea3fa1f780d1657a13f80480e80aaaf4f83554bd91b3846fd446f9d0ec"


def freyfaces(root: Path, download: bool) -> Source:
    from scipy.io import loadmat

    path = root / "freyfaces" / "frey_rawface.mat"
    if download and not path.is_file():
        download_file(_FREY_URL, path, _FREY_SHA256)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected frey_rawface.mat in {path.parent}, got no such file: pass download=True "
            "(--data.download), or root= (--data.root, or PYRO_VAE_DATA) the folder that holds freyfaces/"
        )
    try:
        frames = loadmat(path)["ff"]
    except Exception as error:
        raise ValueError(
            f"expected a MATLAB file with the array ff in {path}, got a truncated or foreign one "
            f"({first_line(error)}): delete it and pass download=True"
        ) from error
    if frames.shape != (560, 1965) or frames.dtype != np.uint8:
        raise ValueError(
            f"expected ff in {path} to be uint8 of shape (560, 1965), got {frames.dtype} of shape "
            f"{frames.shape}: delete the file and pass download=True"
        )
    return Source(
        torch.from_numpy(frames.T.reshape(-1, 1, 28, 20).copy()),
        sizes=(1565, 200, 200),
        order=torch.arange(1965),
        eight_bit=True,
        noun="frames of one face, 28 x 20 pixels",
    )
