"""Pyro's own test-suite, once with `pyro.infer.SVI` and once with `CompiledSVI` in its place: the tests that differ.

    python benchmarks/pyro_tests.py CHECKOUT [tests/infer/test_gradient.py ...] [--inductor] [--out pyro_tests.json]

CHECKOUT is a work tree of Pyro's repository, whose tests alone are used: Pyro is the installed one. Without names, the
files that mention SVI are run, but for those in `SLOW`. Graphs are interpreted as they were recorded, as a compiler
takes seconds for each of them; with ``--inductor`` they are compiled. How many tests pass, those that differ, and the
reasons for which steps run eagerly go to the JSON file.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SLOW = (
    "tests/infer/mcmc",
    "tests/perf",
    "tests/test_examples.py",
    "tests/contrib/funsor",
    "tests/contrib/epidemiology",
)
NAMES = "two parameters"  # under one name: what CompiledSVI warns of and SVI does not
FIGURES = "PYRO_VAE_PYRO_TESTS"  # the environment variable that names the file by which the two runs know themselves


class Plugin:
    """Puts one class in the place of SVI before any test is collected, and keeps the outcomes."""

    def __init__(self, kind: str, inductor: bool, out: str, wanted: list[str] | None) -> None:
        self.kind, self.inductor, self.out, self.wanted = kind, inductor, Path(out), wanted
        self.tests: dict[str, dict] = {}
        self.made: list = []

    def pytest_configure(self, config) -> None:
        import pyro.contrib.cevae
        import pyro.contrib.forecast
        import pyro.infer

        import pyro_vae.compiled

        config.addinivalue_line("filterwarnings", "ignore::pyro_vae.compiled.FallbackWarning")
        config.addinivalue_line("filterwarnings", f"default:{NAMES}:UserWarning")
        stock, made = pyro.infer.SVI, self.made
        base = stock if self.kind == "SVI" else pyro_vae.CompiledSVI
        if not self.inductor:
            pyro_vae.compiled._compile = lambda graph, tensors: graph

        class SVI(base):
            def __init__(self, *args, **kwargs) -> None:
                made.append(self)
                super().__init__(*args, **kwargs)

        SVI.__name__ = SVI.__qualname__ = base.__name__
        SVI.__module__ = base.__module__
        for name, module in [*sys.modules.items()]:
            if name.partition(".")[0] == "pyro":
                for key, value in [*vars(module).items()]:
                    if value is stock:
                        setattr(module, key, SVI)

    def pytest_collection_modifyitems(self, items) -> None:
        items[:] = [item for item in items if self.wanted is None or item.nodeid in self.wanted]

    def pytest_warning_recorded(self, warning_message, nodeid) -> None:
        if str(warning_message.message).startswith(NAMES) and nodeid in self.tests:
            self.tests[nodeid]["told"] = str(warning_message.message).partition(":")[0]

    def pytest_runtest_setup(self, item) -> None:
        self.made.clear()

    def pytest_runtest_logreport(self, report) -> None:
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "svis": 0})
        if report.outcome != "passed":
            text = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
            lines = [line for line in text.splitlines() if line.startswith("E  ")] or text.splitlines()[-1:]
            test.update(outcome=report.outcome, why="\n".join(line[:300] for line in lines[:4]))
        if report.when == "call":
            test["svis"] = len(self.made)
            reasons = {getattr(svi, "fallback_reason", None) for svi in self.made} - {None}
            test["eager"] = sorted(reason.split(" at /")[0][:160] for reason in reasons)
            test["compiled"] = sum(bool(getattr(svi, "compiled", False)) for svi in self.made)
        if report.when == "teardown":
            self.out.write_text(json.dumps(self.tests))

    def pytest_sessionfinish(self) -> None:
        self.out.write_text(json.dumps(self.tests))


if FIGURES in os.environ:
    plugin = Plugin(*json.loads(Path(os.environ[FIGURES]).read_text()))
    pytest_configure = plugin.pytest_configure
    pytest_warning_recorded = plugin.pytest_warning_recorded
    pytest_collection_modifyitems = plugin.pytest_collection_modifyitems
    pytest_runtest_setup = plugin.pytest_runtest_setup
    pytest_runtest_logreport = plugin.pytest_runtest_logreport
    pytest_sessionfinish = plugin.pytest_sessionfinish


def run(kind: str, name: str, arguments: argparse.Namespace, wanted: list[str] | None = None) -> dict[str, dict]:
    """The outcomes of the tests in a file, or of those `wanted`, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("tests", "setup.cfg", "examples"):  # and not Pyro itself
            (Path(folder) / part).symlink_to(arguments.checkout.resolve() / part)
        out = Path(folder) / "outcomes.json"
        here = Path(__file__).resolve().parent
        path = os.pathsep.join([str(here), folder, str(here.parent), os.environ.get("PYTHONPATH", "")])
        figures = Path(folder) / "figures.json"  # the names of thousands of tests are too long for an environment
        figures.write_text(json.dumps([kind, arguments.inductor, str(out), wanted]))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "pyro_tests", name]
        environment = {**os.environ, "PYTHONPATH": path, FIGURES: str(figures)}
        begin, end = time.monotonic(), ""
        try:
            subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, timeout=arguments.seconds, check=False
            )
        except subprocess.TimeoutExpired:
            end = ", not finished"
        found = json.loads(out.read_text()) if out.exists() else {}
        print(f"{kind} {name}: {len(found)} tests in {time.monotonic() - begin:.0f} s{end}", flush=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--inductor", action="store_true")
    parser.add_argument("--seconds", type=float, default=900, help="for each file and class")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    files = sorted((arguments.checkout / "tests").rglob("test_*.py"))
    mention = [str(f.relative_to(arguments.checkout)) for f in files if "SVI" in f.read_text()]
    names = arguments.names or [name for name in mention if not name.startswith(SLOW)]
    found: dict[str, dict[str, dict]] = {"SVI": {}, "CompiledSVI": {}}
    for i, name in enumerate(names):
        stock = run("SVI", name, arguments)
        using = [test for test, outcome in stock.items() if outcome["svis"]]
        found["SVI"] |= stock
        found["CompiledSVI"] |= run("CompiledSVI", name, arguments, using) if using else {}
        record(arguments, names[: i + 1], found)


def record(arguments: argparse.Namespace, names: list[str], found: dict[str, dict[str, dict]]) -> None:
    """Print what differs, and write the results."""
    import pyro
    import torch

    stock, compiled = found["SVI"], found["CompiledSVI"]
    using = sorted(stock.keys() & compiled.keys())  # a file may run out of time
    differ = {
        test: {kind: tests[test] for kind, tests in found.items()}
        for test in using
        if stock[test]["outcome"] != compiled[test]["outcome"]
    }
    reasons = collections.Counter(reason for test in using for reason in compiled[test].get("eager", ()))
    commit = subprocess.run(
        ["git", "-C", str(arguments.checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    results = {
        "pyro": pyro.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "checkout": commit.stdout.strip(),
        "compiler": "inductor" if arguments.inductor else "none, graphs are interpreted",
        "files": names,
        "tests_with_svi": len(using),
        "not_reached": sum(bool(outcome["svis"]) for outcome in stock.values()) - len(using),
        "svis": sum(compiled[test]["svis"] for test in using),
        "svis_compiled": sum(compiled[test].get("compiled", 0) for test in using),
        "alike": len(using) - len(differ),
        "outcomes": {kind: collections.Counter(tests[t]["outcome"] for t in using) for kind, tests in found.items()},
        "differ": differ,
        "told": {test: compiled[test]["told"] for test in using if "told" in compiled[test]},
        "eager": dict(reasons.most_common()),
    }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({key: value for key, value in results.items() if key not in ("files", "eager")}), flush=True)


if __name__ == "__main__":
    main()
