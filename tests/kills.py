"""Processes that end by SIGKILL, at a write, at a step or at a moment; `test_kills.py` looks at what they leave.

`Host` is a process that has imported and compiled all that they need, and forks them: each then takes a fraction of a
second. SIGKILL leaves on disk what is there at that instant, so that a kill in the middle of each write, before and
after each file takes its final name, and before each step meets every state that a run's directory can be left in.
"""

import concurrent.futures
import dataclasses
import functools
import gc
import json
import multiprocessing
import os
import select
import signal
import sys
import traceback
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

import pyro_vae.comparison  # noqa: F401  what commands import when they need it, so that no fork has to
import pyro_vae.report  # noqa: F401
from pyro_vae import checkpoint, evaluation, fit, load_run, training
from pyro_vae.cli import main
from pyro_vae.compiled import FallbackWarning
from pyro_vae.guides import AmortizedGuide, StateSpaceGuide
from pyro_vae.models import VAE, DeepMarkovModel, likelihoods
from pyro_vae.progress import Bar

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # for which autograd has threads, and they forbid forks
X = torch.rand(40, 1, generator=torch.Generator().manual_seed(0))


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z * pyro.param("w", torch.ones(())), 1.0), obs=x[:, 0])


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, 0] * pyro.param("v", torch.ones(())), 0.5))


def train(path, resume, compiled, epochs=2, **options):
    """Two steps an epoch, after each of which the state is saved."""
    training.SAVE_EVERY = -1
    where = {"resume": path} if resume else {"out": path}
    optimizer = functools.partial(torch.optim.Adam, lr=1e-2, fused=True)
    settings = {"valid": X[:20], "batch_size": 20, "patience": epochs, "optimizer": optimizer, "compile": compiled}
    fit(model, guide, X, epochs=epochs, progress=False, **{**where, **settings, **options})


@dataclasses.dataclass
class Held:
    """What this process has of the system's."""

    steps: int
    megabytes: float
    threads: int
    files: int

    @classmethod
    def after(cls, steps):
        gc.collect()
        lines = Path("/proc/self/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        megabytes = round(int(status["VmRSS"].split()[0]) / 1024, 1)
        return cls(steps, megabytes, int(status["Threads"]), len(os.listdir("/proc/self/fd")))

    def __str__(self):
        return f"after {self.steps} steps {self.megabytes} MB, {self.threads} threads, {self.files} files"


def soak(path, kind):
    """What 20,000 compiled steps hold after 500 of them and in the end; the last batch of an epoch is smaller."""
    training.SAVE_EVERY = 1.0
    torch.set_num_threads(1)
    if kind == "rows":
        x = torch.rand(2_090, 8).round()  # 104 batches of 20, one of 10
        data, valid, batch_size, epochs = x, x[:200], 20, 192
        program = VAE((8,), latent_dim=2)
        other = AmortizedGuide(program)
    else:
        x, lengths = torch.randn(250, 12, 2), torch.randint(3, 13, (250,))  # 31 batches of 8, one of 2
        data, valid = (x, {"lengths": lengths}), (x[:50], {"lengths": lengths[:50]})
        batch_size, epochs = 8, 628
        program = DeepMarkovModel(
            (2,), latent_dim=2, transition_hidden=4, emission_hidden=(4,), likelihood=likelihoods.Normal()
        )
        other = StateSpaceGuide(program, hidden=4)
    held = []

    def look(run):
        steps = run.history[-1]["steps"]
        if (not held and steps >= 500) or len(run.history) == epochs:
            held.append(Held.after(steps))

    options = {"batch_size": batch_size, "epochs": epochs, "patience": epochs, "callbacks": [look]}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        fit(program, other, data, valid=valid, compile=True, progress=False, out=path, **options)
    return held


def fill(path):
    with checkpoint.temporary_folder(path) as folder:
        (folder / "table.csv").write_text("half of it, and the other half")


def within(folder, function, *arguments):
    os.chdir(folder)
    function(*arguments)


def command(*arguments):
    """A whole command, as `pyro-vae` runs it; a training saves its state after each step."""
    training.SAVE_EVERY = -1
    sys.stdout, sys.stderr = (open(os.devnull, "w") for _ in range(2))  # noqa: SIM115
    assert main([str(argument) for argument in arguments]) == 0


# ------------------------------------------------------------ the points at which a process is killed


class Points:
    """Names each point that a process comes to, and kills it at the one of the number, or first of the name, `at`."""

    def __init__(self, folder, at):
        self.folder, self.at, self.names = folder, at, []

    def reach(self, name):
        self.names.append(name)
        if self.at in (len(self.names) - 1, name):
            os.kill(os.getpid(), signal.SIGKILL)

    def holds(self, path):
        return self.folder in path.absolute().parents

    def arm(self):
        """For good: the process is forked for this."""
        written = {name: getattr(Path, name) for name in ("write_bytes", "write_text", "mkdir", "unlink", "symlink_to")}
        append, replace, step = checkpoint.append, os.replace, training._State.step
        points = self

        def write(name, path, content, *args, **kwargs):
            if self.holds(path):
                written[name](path, content[: len(content) // 2], *args, **kwargs)
                self.reach(f"half of {final(path)}")
            return written[name](path, content, *args, **kwargs)

        def around(name, path, *args, **kwargs):
            if self.holds(path) and not (name == "unlink" and path.name.startswith(".")):
                self.reach(f"before {name} of {path.name}")
            return written[name](path, *args, **kwargs)

        def half_a_line(text, path):
            append(text[: len(text) // 2], path)
            self.reach(f"half a line of {path.name}")
            append(text[len(text) // 2 :], path)

        def take_the_place(source, target):
            ours = self.holds(Path(target))
            if ours:
                self.reach(f"before {Path(target).name}")
            replace(source, target)
            if ours:
                self.reach(f"after {Path(target).name}")

        def before_a_step(state, *args):
            self.reach(f"step {state.svi.steps + 1}")
            step(state, *args)

        class Scoring(Bar):
            def update(self, *args):
                points.reach("scoring")
                super().update(*args)

        for name in ("write_bytes", "write_text"):  # a file that is whole and not yet in its place is as after fsync
            setattr(Path, name, lambda path, *args, name=name, **kwargs: write(name, path, *args, **kwargs))
        for name in ("mkdir", "unlink", "symlink_to"):
            setattr(Path, name, lambda path, *args, name=name, **kwargs: around(name, path, *args, **kwargs))
        checkpoint.append, os.replace = half_a_line, take_the_place
        training._State.step, evaluation.Bar = before_a_step, Scoring


def final(path):
    """The name that `checkpoint.atomic` gives in the end."""
    return path.name.removesuffix(f".{os.getpid()}").removeprefix(".")


# ------------------------------------------------------------ the processes


def without_gpu():
    os.environ.update(NO_GPU)


class Host:
    """A process that forks others, which are killed."""

    def __init__(self):
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["kills"])
        self.pool = concurrent.futures.ProcessPoolExecutor(1, processes, without_gpu)

    def __call__(self, function, *arguments, **options):
        """What `function` returns, called in the host itself."""
        return self.pool.submit(function, *arguments, **options).result()

    def points(self, folder, function, *arguments, **options):
        """The names of the points that the function comes to in `folder`, in order."""
        status, names = self(forked, function, arguments, options, folder=folder, at=None)
        assert status == 0, status
        return names

    def kill(self, folder, at, function, *arguments, **options):
        """SIGKILL at the point of this number or name."""
        status, _ = self(forked, function, arguments, options, folder=folder, at=at)
        assert status == signal.SIGKILL, status

    def run(self, function, *arguments, kill_after=None, **options):
        """Whether it ended before it was killed."""
        status, _ = self(forked, function, arguments, options, kill_after=kill_after)
        assert status in ((0,) if kill_after is None else (0, signal.SIGKILL)), status
        return status == 0


def forked(function, arguments, options, folder=None, at=None, kill_after=None):
    """The status of a process of its own and, where it ends well, the points that it came to in `folder`."""
    end, begin = os.pipe()
    if not (process := os.fork()):
        status = 1
        try:
            torch.set_num_threads(1)
            warnings.simplefilter("ignore")
            points = Points(folder, at)
            if folder is not None:
                points.arm()
            function(*arguments, **options)
            os.write(begin, json.dumps(points.names).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(begin)
    if kill_after is not None and not select.select([end], [], [], kill_after)[0]:  # which it closes as it ends
        os.kill(process, signal.SIGKILL)
    with open(end, "rb") as pipe:
        names = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return abs(status), json.loads(names or "[]")


# ------------------------------------------------------------ what they leave


def state_of(path):
    """new, resumable or finished; what is there loads."""
    try:
        checkpoint.begun_run(path)
    except FileNotFoundError:
        assert not path.exists() or checkpoint._is_new(path)
        return "new"
    checkpoint.load(path / "checkpoints" / "last.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a config.toml that is not there yet
        run = load_run(path)
    assert [record["epoch"] for record in run.history] == list(range(1, len(run.history) + 1))
    return "finished" if (path / "model.safetensors").exists() else "resumable"


def result(path):
    """Weights and history, without the seconds that it took."""
    lines = (path / "metrics.jsonl").read_text().splitlines()
    history = [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]
    return (path / "model.safetensors").read_bytes(), history


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
