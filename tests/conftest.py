"""Fixtures: where the real data are, and the state that each test starts from."""

import os
from pathlib import Path

import pyro
import pytest
import torch


def data_root() -> Path:
    return Path(os.environ.get("PYRO_VAE_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data")


def needed(file: str) -> Path:
    if not (data_root() / file).exists():
        pytest.skip(f"needs the data file {file}, looked for it in {data_root()}")
    return data_root()


@pytest.fixture
def mnist_root() -> Path:
    return needed("MNIST/raw/train-images-idx3-ubyte")


@pytest.fixture(autouse=True)
def fresh_state():
    """Each test starts from the same seed and an empty parameter store."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


@pytest.fixture
def recorded(monkeypatch):
    """The recorded graph, run as it is: what inductor does to it is tested apart, as it takes seconds."""
    monkeypatch.setattr("pyro_vae.compiled._compile", lambda graph, tensors: graph)
    monkeypatch.setattr("pyro_vae.scan._Step.table", {})


@pytest.fixture
def recorded_once(recorded, monkeypatch):
    """`recorded`, without the second recording, which finds programs that are not static: none of these."""
    from pyro_vae.compiled import _Recording

    record, graphs = _Recording._record, {}

    def first(self, leaves):
        if self not in graphs:
            graphs[self] = record(self, leaves)
        return graphs[self]

    monkeypatch.setattr(_Recording, "_record", first)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def skip_without_cuda(request):
    if request.node.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_addoption(parser):
    parser.addoption("--matrix", action="store_true", help="every prior x family x likelihood, not a covering array")


def pytest_collection_modifyitems(items):
    """The longest first, so that no worker waits for it at the end."""
    items.sort(key=lambda item: "inductor_compiles_every" not in item.name)
