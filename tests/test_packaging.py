"""What is shipped, what importing it does, and what makes the environment around it."""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import pyro_vae

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pyro_vae"
NOT_ENGINE = {"models", "guides", "cli", "defaults", "options", "report", "__init__", "__main__"}
WHAT_COMPONENTS_USE = {"nn", "distributions", "draws", "config", "scan", "sequences"}


def run(*command, cwd=ROOT, **environment):
    """The command's standard output, followed by its standard error where it fails."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + (done.stderr if done.returncode else "")


def python(code, **kwargs):
    status, output = run(sys.executable, "-c", code, **kwargs)
    assert status == 0, output
    return output.strip()


def sources():
    """Each module's name below pyro_vae, such as ("models", "vae"), and its file."""
    for folder, _, names in os.walk(PACKAGE, followlinks=True):
        for name in names:
            path = Path(folder, name)
            if path.suffix == ".py":
                yield path.relative_to(PACKAGE).with_suffix("").parts, path


def imports(module, path):
    """(name, relative) of everything that the file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split(".")), False
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield (*node.module.split("."), alias.name), False
        elif isinstance(node, ast.ImportFrom):
            base = module[: len(module) - node.level]
            parts = tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                yield ("pyro_vae", *base, *parts, alias.name), True


def test_imports_point_one_way():
    wrong = []
    for module, path in sources():
        for name, relative in imports(module, path):
            here = module[0]
            if name[0] in {"models", "guides"}:
                wrong.append(f"{path}: import pyro_vae.{name[0]}, not {name[0]}")
            if name[0] != "pyro_vae" or len(name) < 2:
                continue
            if here in {"models", "guides"}:
                if not relative:
                    wrong.append(f"{path}: expected a relative import, got {'.'.join(name)}")
                if name[1] not in {here, *WHAT_COMPONENTS_USE}:
                    wrong.append(f"{path}: {here}/ may not import {'.'.join(name)}")
            elif here not in NOT_ENGINE and name[1] in {"models", "guides", "cli", "report"}:
                wrong.append(f"{path}: the engine may not import {'.'.join(name)}")
    assert not wrong, "\n".join(wrong)


def tracked():
    """The files of the package as git sees them, by the name that they are imported under."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("expected a git checkout to compare the wheel with, found none")
    folders = ["pyro_vae", "models", "guides"]
    status, output = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *folders)
    assert status == 0, output
    files = {name for name in output.split("\0") if (ROOT / name).is_file()}
    return {name if name.startswith("pyro_vae/") else f"pyro_vae/{name}" for name in files}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy to build from: a build folder in the checkout would leak into the next wheel."""
    tree = tmp_path_factory.mktemp("a tree") / "checkout"
    tree.mkdir()
    for name in ["pyro_vae", "models", "guides"]:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file() and path.name[0] != ".":
            shutil.copy(path, tree)
    return tree


@pytest.mark.parametrize("options", [["--wheel"], []], ids=["from the tree", "from the sdist"])
def test_wheel_holds_the_tree(tree, tmp_path, options):
    status, output = run(
        sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", tmp_path, tree, cwd=tmp_path
    )
    assert status == 0, output
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        archive.extractall(tmp_path / "site")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {name.split("/")[0] for name in names} == {"pyro_vae", f"pyro_vae-{version}.dist-info"}
    assert {name for name in names if name.startswith("pyro_vae/")} == tracked()
    assert "pyro_vae/py.typed" in names
    for sdist in tmp_path.glob("*.tar.gz"):
        with tarfile.open(sdist) as archive:
            assert not [member.name for member in archive if member.issym() or member.islnk()]

    code = "import pyro_vae.models, pyro_vae.guides; print(pyro_vae.models.__file__, pyro_vae.__version__)"
    found = python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert found == f"{tmp_path / 'site' / 'pyro_vae' / 'models' / '__init__.py'} {version}"


def test_version_is_that_of_pyproject():
    assert pyro_vae.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_import_has_no_side_effect():
    python("""
import importlib, logging, pkgutil, warnings
import matplotlib, numpy, torch, pyro, pyro.distributions, random

def state():
    names = ["root", *logging.root.manager.loggerDict]
    loggers = {name: logging.getLogger(name) for name in names}
    return {
        "torch RNG": torch.get_rng_state().tolist(),
        "numpy RNG": [str(part) for part in numpy.random.get_state()],
        "python RNG": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "pyro validation": pyro.settings.get(),
        "torch validation": torch.distributions.Distribution._validate_args,
        "param store": list(pyro.get_param_store().keys()),
        "backend": dict.__getitem__(matplotlib.rcParams, "backend"),
        "warnings": list(warnings.filters),
        "loggers": {name: (each.level, each.disabled, list(each.handlers)) for name, each in loggers.items()},
    }

def compare(name):
    for key, value in before.items():
        now = state()[key]
        now = {each: now[each] for each in value} if key == "loggers" else now
        assert now == value, f"importing {name} changed {key}: {value} -> {now}"

for library in "arviz pandas scipy.stats sklearn matplotlib.figure jsonargparse torch._dynamo".split():
    importlib.import_module(library)  # what these do on import is not ours
before = state()
import pyro_vae
for module in pkgutil.walk_packages(pyro_vae.__path__, "pyro_vae."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        compare(module.name)
for name in pyro_vae.__all__:
    getattr(pyro_vae, name)
compare("the lazy names")
""")


def test_bare_import_imports_neither_torch_nor_pyro():
    python("""
import sys, pyro_vae
assert pyro_vae.__version__ and set(pyro_vae.__all__) <= set(dir(pyro_vae))
assert not {"torch", "pyro", "numpy"} & set(sys.modules)
""")


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_command_answers_without_torch(option):
    if not (PACKAGE / "cli.py").exists():
        pytest.skip("expected pyro_vae/cli.py, found none yet")
    code = f"""
import runpy, sys
sys.argv = ["pyro-vae", "{option}"]
try:
    runpy.run_module("pyro_vae", run_name="__main__")
except SystemExit as exit:
    assert not exit.code
assert not {{"torch", "pyro"}} & set(sys.modules)
"""
    assert python(code)


def test_lazy_names():
    code = """
import pyro_vae.training, pyro_vae.evaluation, pyro_vae.data, pyro_vae.svi
from pyro_vae import *
from pyro_vae import fit as again
assert fit is again is pyro_vae.fit is pyro_vae.training.fit
assert evaluate is pyro_vae.evaluation.evaluate and SVI is pyro_vae.svi.SVI
assert models is pyro_vae.models and guides is pyro_vae.guides
"""
    python(code)
    with pytest.raises(AttributeError, match="has no attribute 'train'"):
        pyro_vae.train  # noqa: B018


@pytest.mark.parametrize("name", ["models", "guides"])
def test_bare_component_import_names_the_right_one(name):
    status, output = run(sys.executable, "-c", f"import {name}")
    assert status != 0
    assert f"from pyro_vae import {name}" in output.splitlines()[-1]
    assert output.splitlines()[-1].startswith("ImportError: ")


def test_doctor_names_a_mismatched_torchvision(tmp_path):
    (tmp_path / "torchvision").mkdir()
    init = tmp_path / "torchvision" / "__init__.py"
    init.write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    metadata = tmp_path / "torchvision-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    header = "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1.0\n"
    code = "from pyro_vae.doctor import report; text, works = report(); assert not works; print(text)"

    metadata.write_text(header)
    last = python(code, PYTHONPATH=str(tmp_path)).splitlines()[-1]
    assert "got torchvision 0.1.0 (its import fails with RuntimeError: operator torchvision::nms" in last
    assert last.endswith("pip install --force-reinstall torch torchvision")

    metadata.write_text(header + "Requires-Dist: torch (==1.0.0)\n")
    last = python(code, PYTHONPATH=str(tmp_path)).splitlines()[-1]
    assert "got torchvision 0.1.0 (it asks for torch==1.0.0)" in last


@pytest.fixture
def fake(tmp_path):
    """PATH of one folder, and a maker of commands in it."""

    def command(name, body):
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    (tmp_path / "bin").mkdir()
    for tool in ["sh", "dirname"]:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    command.path = str(tmp_path / "bin")
    return command


SHIM = 'echo "pyenv: $0: command not found" >&2; exit 127'
NO_VENV = """case "$2" in *ensurepip*) exit 1;; *) echo 3.12;; esac"""


def which(fake, **environment):
    return run("sh", ROOT / "scripts" / "install.sh", "--which", cwd="/", **{"PATH": fake.path, **environment})


def test_install_passes_over_what_does_not_run(fake):
    fake("python3.13", SHIM)
    fake("python3.12", "exit 1")
    fake("python3.11", NO_VENV)
    fake("python3", f'exec "{sys.executable}" "$@"')
    assert which(fake) == (0, f"{sys._base_executable}\n")
    assert which(fake, HOME="") == (0, f"{sys._base_executable}\n")


def test_install_takes_the_named_python_first(fake, tmp_path):
    fake("python3.13", "echo /not/this/one")
    fake("my python", f'exec "{sys.executable}" "$@"')
    assert which(fake, PYTHON=f"{fake.path}/my python") == (0, f"{sys._base_executable}\n")
    assert which(fake, PYTHON="no-such-python") == (0, "/not/this/one\n")


def test_install_says_what_is_missing(fake):
    fake("python3.13", SHIM)
    status, output = which(fake)
    assert status != 0
    assert output.startswith("expected Python >= 3.11, found none that runs among python3.13")
    fake("python3.12", NO_VENV)
    status, output = which(fake)
    assert status != 0
    assert output.endswith("(Debian, Ubuntu: apt install python3.12-venv)\n")


def test_a_folder_called_as_the_package_does_not_shadow_it(tmp_path):
    """Python started beside a clone finds the package, and no namespace of the folder's name."""
    (tmp_path / "pyro_vae").symlink_to(Path(__file__).parents[1])
    found = subprocess.run(
        [sys.executable, "-c", "import pyro_vae; print(pyro_vae.__version__)"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, f"{found.stderr}: make install anew"
