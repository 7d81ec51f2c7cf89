"""SIGKILL at any moment leaves a run that is new, resumable or finished, and the same bytes in the end."""

import datetime
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import kills
import pytest
from kills import command, contents, files, result, state_of, train, within

from pyro_vae import load_run

STATE = ("last.safetensors", "model.safetensors", "metrics.jsonl", "config.toml", "schema.json")
FIT = ["fit", "--data", "digits", "--model.latent_dim", 2, "--epochs", 6, "--batch_size", 400, "--patience", "null"]
FIT += ["--evaluate.num_samples", 2]


@pytest.fixture(scope="module")
def host():
    host = kills.Host()
    yield host
    host.pool.shutdown()


def state(folder):
    """The files of a run that a training writes."""
    return {name: content for name, content in contents(folder).items() if name.rpartition("/")[2] in STATE}


def last_of_each(names):
    return sorted({name: at for at, name in enumerate(names)}.values())


def points(names, compiled):
    """All of an eager training. Compiled steps change what is in the files, and not how they are written: each step,
    and before state, history and weights are written."""
    few = ("step", "before last", "before model", "half a line")
    return [at for at in last_of_each(names) if names[at].startswith(few)] if compiled else range(len(names))


# ------------------------------------------------------------ trainings


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_training_that_is_killed_at_any_point(compiled, host, tmp_path):
    host(train, tmp_path / "whole", False, compiled)
    names = host.points(tmp_path, train, tmp_path / "counted", False, compiled)
    assert [name for name in names if name.startswith("step")] == ["step 1", "step 2", "step 3", "step 4"]
    assert {f"{part} {name}" for part in ("half of", "before", "after") for name in STATE} < {*names}
    begun, ended = names.index("after last.safetensors"), names.index("after model.safetensors")
    for at in points(names, compiled):
        path = tmp_path / f"killed-{at}"
        host.kill(tmp_path, at, train, path, False, compiled)
        found = host(state_of, path)
        assert found == ("new" if at < begun else "finished" if at >= ended else "resumable"), names[at]
        host(train, path, found != "new", compiled)
        assert result(path) == result(tmp_path / "whole"), names[at]
        assert files(path) == files(tmp_path / "whole"), names[at]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_resumption_that_is_killed_at_any_point(compiled, host, tmp_path):
    """The old weights stay, with their own history, until the new ones are there."""
    host(train, tmp_path / "whole", False, compiled)
    host(train, tmp_path / "old", False, compiled, epochs=1)
    shutil.copytree(tmp_path / "old", tmp_path / "counted")
    names = host.points(tmp_path, train, tmp_path / "counted", True, compiled)
    assert result(tmp_path / "counted") == result(tmp_path / "whole")
    ended = names.index("after model.safetensors")
    for at in points(names, compiled):
        path = shutil.copytree(tmp_path / "old", tmp_path / f"killed-{at}")
        host.kill(tmp_path, at, train, path, True, compiled)
        assert host(state_of, path) == "finished", names[at]
        there = tmp_path / ("old" if at < ended else "whole")
        assert host(epochs_of, path) == host(epochs_of, there), names[at]
        assert (path / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes(), names[at]
        host(train, path, True, compiled)
        assert result(path) == result(tmp_path / "whole"), names[at]
        assert files(path) == files(tmp_path / "whole"), names[at]


def epochs_of(path):
    return len(load_run(path).history)


def test_a_run_that_is_written_over_is_the_old_or_the_new_one(host, tmp_path):
    """The old one's weights, which a kill may leave, go before the new one goes on: its history is not theirs."""
    host(train, tmp_path / "whole", False, False)
    host(train, tmp_path / "old", False, False, epochs=1, seed=1)
    overwrite = {"overwrite": True}
    shutil.copytree(tmp_path / "old", tmp_path / "counted")
    names = host.points(tmp_path, train, tmp_path / "counted", False, False, **overwrite)
    begun, resumed = names.index("after last.safetensors"), names.index("step 1")
    for at in range(resumed):
        path = shutil.copytree(tmp_path / "old", tmp_path / f"killed-{at}")
        host.kill(tmp_path, at, train, path, False, False, **overwrite)
        if at < begun:
            assert state(path) == state(tmp_path / "old"), names[at]
            host(train, path, False, False, **overwrite)
        else:
            host.kill(tmp_path, "step 3", train, path, True, False)
            assert host(state_of, path) == "resumable", names[at]
            assert host(epochs_of, path) == 0, names[at]
            host(train, path, True, False)
        assert result(path) == result(tmp_path / "whole"), names[at]
        assert files(path) == files(tmp_path / "whole"), names[at]


def test_the_newest_run_is_the_latest_after_a_kill(host, tmp_path):
    (tmp_path / "counted").mkdir()
    names = host.points(tmp_path, within, tmp_path / "counted", train, None, False, False)
    for at in range(names.index("after latest") + 1):
        folder = tmp_path / f"killed-{at}"
        folder.mkdir()
        host.kill(tmp_path, at, within, folder, train, None, False, False)
        host.run(within, folder, train, None, False, False)
        *older, newest = sorted(path.name for path in (folder / "runs").iterdir() if path.name != "latest")
        assert newest in ("0001", "0002") and older in ([], ["0001"]), names[at]  # and nothing of a killed process
        assert os.readlink(folder / "runs" / "latest") == newest, names[at]
        assert result(folder / "runs" / "latest") == result(tmp_path / "counted" / "runs" / "0001"), names[at]


# ------------------------------------------------------------ commands


@pytest.fixture(scope="module")
def digits(host, tmp_path_factory):
    """A run with its report."""
    path = tmp_path_factory.mktemp("digits") / "run"
    assert host.run(command, *FIT, "--compile", "false", "--out", path)
    return path


@pytest.mark.parametrize("where", ["scoring", "half of samples.png", "half of report.html"])
def test_fit_that_is_killed_after_its_training(where, host, digits, tmp_path):
    path = tmp_path / "run"
    host.kill(tmp_path, where, command, *FIT, "--compile", "false", "--out", path)
    assert host(state_of, path) == "finished" and result(path) == result(digits)
    there = [name for name in files(path) if "/." not in name]
    assert "report.html" not in there and ("figures/samples.png" in there) == where.endswith("report.html")
    assert host.run(command, "report", path, "--num_samples", 2)
    assert result(path) == result(digits) and files(path) == files(digits)


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "--num_samples", 3, "--out", "scores.json"),
        ("sample", "--out", "samples.npz"),
        ("encode", "--out", "codes.csv"),
        ("scores", "--num_samples", 3, "--out", "scores.csv"),
        ("report", "--num_samples", 3),
    ],
    ids=lambda words: words[0],
)
def test_a_command_that_is_killed_changes_no_run(words, host, digits, tmp_path):
    """Nor is there half a file under its own name; run again, it clears what was left."""
    name, *options = words
    run = shutil.copytree(digits, tmp_path / "run")
    before, old = state(run), b"of before"
    out = tmp_path / "out" / options.pop() if name != "report" else run / "report.html"
    out.parent.mkdir(exist_ok=True)
    arguments = [name, run, *options, *([] if name == "report" else [out, "--overwrite"])]
    names = host.points(tmp_path, command, *arguments)
    whole = out.read_bytes()
    few = [at for at in last_of_each(names) if names[at].endswith(("scoring", "half of samples.png", out.name))]
    assert {f"half of {out.name}", f"before {out.name}", f"after {out.name}"} <= {names[at] for at in few}
    for at in reversed(few):  # each begins by clearing what the one before has left
        out.write_bytes(old)
        host.kill(tmp_path, at, command, *arguments)
        assert state(run) == before
        assert (out.read_bytes() == old) == (names[at] != f"after {out.name}"), names[at]
        assert out.read_bytes()[-20:] in (old, whole[-20:]), names[at]
    assert any(name.rpartition("/")[2].startswith(f".{out.name}.") for name in files(out.parent))
    assert host.run(command, *arguments)
    assert state(run) == before and files(run) == files(digits)
    assert name == "report" or ([*contents(out.parent).values()] == [whole])


def test_a_folder_that_a_killed_comparison_was_filling_is_cleared(host, tmp_path):
    host.kill(tmp_path, "half of table.csv", kills.fill, tmp_path / "comparison")
    assert len(files(tmp_path)) == 2 and not (tmp_path / "comparison").exists()
    assert host.run(kills.fill, tmp_path / "comparison")
    assert files(tmp_path) == []


# ------------------------------------------------------------ by hand


TRAININGS = {"eager": (90, 60), "compiled": (40, 57)}  # kills of `fit` and of the command
OF_EACH = 10  # kills of these
COMMANDS = {
    "evaluate": ["--num_samples", 200, "--out", "scores.json"],
    "sample": ["--num", 1000, "--out", "samples.npz"],
    "encode": ["--split", "all", "--out", "codes.csv"],
    "scores": ["--num_samples", 200, "--out", "scores.csv"],
    "report": ["--num_samples", 50],
}
WITH_COMPILER = 3  # kills of the command together with the C++ compilers that it runs


class Victims:
    """Kills at random moments, by kind, and the states that they left."""

    def __init__(self, host):
        self.host, self.chance, self.counts, self.states = host, random.Random(0), Counter(), Counter()

    def train(self, kind, number, folder, begin, resume):
        """Kill trainings, several times each until they have weights, and until there were so many kills; each ends as
        the whole one does."""
        for name in ("warm", "whole"):
            start = time.time()
            assert self.host.run(*begin(folder / name))
        end, saved = time.time() - start, (folder / "whole" / "schema.json").stat().st_mtime - start
        left, runs = number, 0
        while left:
            path, ended, found = folder / f"{runs}", False, "new"
            runs += 1
            while not ended:
                moment = self.chance.uniform(self.chance.choice([0, saved, saved]), end)
                moment = moment if left and found != "finished" else None
                call, start = begin if found == "new" else resume, time.time()
                ended = self.host.run(*call(path), kill_after=moment)
                if ended and call is begin:  # the machine may have other work now
                    saved, end = ((path / "schema.json").stat().st_mtime - start, time.time() - start)
                if not ended:
                    left -= 1
                    self.killed(kind if found == "new" else f"{kind} resumed", path)
                    found = self.host(state_of, path)
            assert result(path) == result(folder / "whole") and files(path) == files(folder / "whole"), path
        return folder / "whole"

    def command(self, name, number, run):
        """Kill a command; the run stays as it is, and what is written is whole or absent. Run again, it ends well."""
        folder, options = run.parent / name, COMMANDS[name]
        out = run / "report.html" if name == "report" else folder / options[-1]
        arguments = [name, run, *options] if name == "report" else [name, run, *options[:-1], out, "--overwrite"]
        folder.mkdir()
        for _ in range(2):
            start = time.monotonic()
            assert self.host.run(command, *arguments)
        end = time.monotonic() - start
        before, whole, there = state(run), out.read_bytes(), files(run.parent)
        while number:
            out.unlink()
            ended = self.host.run(command, *arguments, kill_after=self.chance.uniform(0, end))
            assert state(run) == before and (not out.exists() or out.read_bytes()[-9:] == whole[-9:])
            if not ended:
                number -= 1
                self.killed(name)
            start = time.monotonic()
            assert self.host.run(command, *arguments)
            end = time.monotonic() - start
            assert files(run.parent) == there and (name == "report" or out.read_bytes() == whole)

    def command_with_compilers(self, number, whole, folder):
        """Kill an interpreter and all that it has started; its compiler's cache is empty at first."""
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
        environment = {**os.environ, **kills.NO_GPU, **cache, "OMP_NUM_THREADS": "1"}  # as many as the forks have
        path, begin = folder / "run", [*FIT, "--compile", "true", "--out", folder / "run"]
        for moment in [*(self.chance.uniform(5, 30) for _ in range(number)), None]:
            found = self.host(state_of, path)
            words = begin if found == "new" else ["fit", "--resume", path]
            process = subprocess.Popen(
                [sys.executable, "-m", "pyro_vae", *map(str, words)],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                assert process.wait(moment) == 0
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self.killed("fit and its C++ compilers", path)
        assert sum(self.counts.values()) and result(path) == result(whole) and files(path) == files(whole)

    def killed(self, kind, path=None):
        self.counts[kind] += 1
        print(end=f"\r{sum(self.counts.values())} kills", flush=True)
        if path is not None:
            self.states[self.host(state_of, path)] += 1


@pytest.mark.slow
def test_three_hundred_kills(host, tmp_path):
    """What it printed, on two cores beside other work (torch 2.14.1), with the library of the commit before this line:

    2026-12-01, 23 min: 300 kills, all came to the same bytes: fit() eager 44, fit() eager resumed 46, fit eager 40, fit
    eager resumed 20, fit() compiled 33, fit() compiled resumed 7, fit compiled 14, fit compiled resumed 43, fit and its
    C++ compilers 3, evaluate 10, sample 10, encode 10, scores 10, report 10; left resumable 131, new 84, finished 35
    """
    begun, victims = time.monotonic(), Victims(host)
    for how, (of_fit, of_command) in TRAININGS.items():
        compiled = how == "compiled"
        folder = tmp_path / f"fit-{how}"
        folder.mkdir()
        options = {"compiled": compiled, "epochs": 20}
        victims.train(
            f"fit() {how}",
            of_fit,
            folder,
            lambda path, o=options: (functools.partial(train, resume=False, **o), path),
            lambda path, o=options: (functools.partial(train, resume=True, **o), path),
        )
        folder = tmp_path / f"command-{how}"
        folder.mkdir()
        whole = victims.train(
            f"fit {how}",
            of_command,
            folder,
            lambda path, c=compiled: (command, *FIT, "--compile", str(c).lower(), "--out", path),
            lambda path: (command, "fit", "--resume", path),
        )
    victims.command_with_compilers(WITH_COMPILER, whole, tmp_path)
    for name in COMMANDS:
        victims.command(name, OF_EACH, shutil.copytree(whole, tmp_path / f"of-{name}" / "run"))
    assert sum(victims.counts.values()) == 300
    kinds, states = (
        ", ".join(f"{name} {count}" for name, count in counts.items()) for counts in (victims.counts, victims.states)
    )
    took = f"{datetime.date.today()}, {(time.monotonic() - begun) / 60:.0f} min"
    print(f"\n{took}: 300 kills, all came to the same bytes: {kinds}; left {states}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "sequences"])
def test_twenty_thousand_compiled_steps_keep_what_they_need(kind, tmp_path):
    """What it printed (torch 2.14.1); memory comes and goes by some MB as states are saved, so that 5,000 steps are too
    few to tell: of three runs of them one had 7.6 MB more in the end, and one 1.5.

    2026-12-01, rows: after 525 steps 921.0 MB, 2 threads, 14 files; after 20160 steps 920.5 MB, 2 threads, 14 files
    2026-12-01, sequences: after 512 and 20096 steps 969.6 MB, 2 threads, 14 files
    """
    first, last = kills.Host()(kills.soak, tmp_path / "run", kind)
    print(f"\n{datetime.date.today()}, {kind}: {first}; {last}")
    assert first.steps < 700 and last.steps >= 20_000
    assert last.megabytes - first.megabytes < 5 and (last.threads, last.files) == (first.threads, first.files)
