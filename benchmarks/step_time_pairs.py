"""Milliseconds per compiled step of two states of the code, each in a process of its own, in turns on one core.

    python benchmarks/step_time_pairs.py OLD NEW [--rows vae-20 vae-100 iwae50-20] [--pairs 3] [--out FILE.json]

OLD and NEW are checkouts of this repository. A second process of OLD runs beside them: what differs between two runs of
one code is noise. A figure is the median over 50 turns of the ratio to OLD's own time in the same turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROWS = {"vae-20": (20, 1, 25), "vae-100": (100, 1, 12), "iwae50-20": (20, 50, 2)}  # batch, draws, steps of a turn
CHILD = """
import os, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
checkout, batch, draws, steps = sys.argv[1], *map(int, sys.argv[2:])
sys.path.insert(0, checkout)
import pyro, torch
torch.set_num_threads(1)
from pyro.infer import Trace_ELBO
import pyro_vae, pyro_vae.compiled
from pyro_vae.estimators import IWAE
from pyro_vae.guides import AmortizedGuide
from pyro_vae.models import VAE
from pyro_vae.nn import MLP
assert pyro_vae.__file__.startswith(checkout), pyro_vae.__file__
pyro_vae.compiled.keep_freed_memory()
torch.manual_seed(0)
network = MLP((400,))
model = VAE((784,), latent_dim=50, decoder=network)
loss = IWAE(draws) if draws > 1 else Trace_ELBO()
svi = pyro_vae.CompiledSVI(model, AmortizedGuide(model, network), pyro.optim.Adam({"lr": 1e-3}), loss)
x = torch.rand(batch, 784).round()
for _ in range(40):
    svi.step(x)
assert svi.compiled, svi.fallback_reason
print("ready", flush=True)
for _ in sys.stdin:
    begin = time.perf_counter()
    for _ in range(steps):
        svi.step(x)
    print((time.perf_counter() - begin) / steps * 1e3, flush=True)
"""


def started(checkout: Path, row: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", CHILD, str(checkout.resolve()), *map(str, ROWS[row])]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )


def ratios(checkouts: dict[str, Path], row: str, turns: int) -> dict[str, float]:
    processes = {name: started(checkout, row) for name, checkout in checkouts.items()}
    for name, process in processes.items():
        if process.stdout.readline().strip() != "ready":
            raise SystemExit(f"expected a compiled step by {checkouts[name]}, got none: run it by hand")
    times: dict[str, list[float]] = {name: [] for name in processes}
    for turn in range(turns):
        for name in processes if turn % 2 else reversed(processes):
            processes[name].stdin.write("go\n")
            processes[name].stdin.flush()
            times[name].append(float(processes[name].stdout.readline()))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return {name: statistics.median(a / b for a, b in zip(times[name], times["old"], strict=True)) for name in times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rows", nargs="*", choices=[*ROWS], default=[*ROWS])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    checkouts = {"old": arguments.old, "old again": arguments.old, "new": arguments.new}
    found = {}
    for row in arguments.rows:
        pairs = [ratios(checkouts, row, 50) for _ in range(arguments.pairs)]
        found[row] = {name: statistics.median(pair[name] for pair in pairs) for name in checkouts}
        print(row, {name: round(ratio, 4) for name, ratio in found[row].items()}, pairs, flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
