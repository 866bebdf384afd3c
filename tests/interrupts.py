"""Interrupts on the CPython that runs this, counted: `python interrupts.py COUNT`. See `make interrupts`.

COUNT at random moments of a loop that saves; scripts that end by Ctrl-C; and one at each moment of each call.
"""

import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

import interrupted
import moments

import ckptmgr

BOUND_S = 300
TRAINS = """
import sys, numpy as np, ckptmgr
manager = ckptmgr.CheckpointManager(sys.argv[1])
for step in range(10**6):
    if manager.save(step, {f"w{i}": np.full(100_000, step * 10 + i) for i in range(4)}):
        print(step, flush=True)
"""


def loop(directory, seed, max_host_bytes):
    """Interrupts of a loop that catches each and goes on: how many, and how many accepted saves were lost."""
    command = [sys.executable, interrupted.__file__, directory, str(seed), "50", str(max_host_bytes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=BOUND_S)
    found = re.fullmatch(r"lost \[(.*)\] after (\d+) interrupts\n", done.stdout)
    return (int(found[2]), len(found[1].split())) if found else (0, 1)


def script(directory, seed):
    """A script that Ctrl-C ends: 1, and how many saves were lost that it had been told of."""
    with subprocess.Popen(
        [sys.executable, "-c", TRAINS, directory], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        first = process.stdout.readline()
        time.sleep(random.Random(seed).uniform(0, 0.3))
        process.send_signal(signal.SIGINT)
        accepted = {int(step) for step in [first, *process.stdout.read().split()]}
        ended = process.wait(BOUND_S)
    listed = set(ckptmgr.CheckpointManager(directory, read_only=True).steps())
    return 1, len(accepted - listed) + (ended != -signal.SIGINT)


def each_moment(directory):
    """One interrupt at every fifth moment of each call, and at every twentieth of the thread that writes."""
    command = [sys.executable, moments.__file__, directory, "5", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=7200)
    if done.returncode:
        print(done.stderr[-3000:], f"\nended with {done.returncode}", file=sys.stderr)
    return sum(int(line.split()[0]) for line in done.stdout.splitlines()), int(done.returncode != 0)


def main(count):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job, and its children, ignore it
    few = [range(int(count) // 100), range(max(1, int(count) // 50))]
    kinds = {
        "a loop that goes on": [lambda at, seed=seed: loop(at, seed, 0) for seed in few[0]],
        "one that saves in waves": [lambda at, seed=seed: loop(at, seed, 300_000) for seed in few[0]],
        "a script that ends by it": [lambda at, seed=seed: script(at, seed) for seed in few[1]],
        "each call, at each moment": [each_moment],
    }
    total = 0
    for kind, runs in kinds.items():
        interrupts = lost = hung = 0
        for run in runs:
            with tempfile.TemporaryDirectory() as directory:
                try:
                    found = run(os.path.join(directory, "run"))
                    interrupts, lost = interrupts + found[0], lost + found[1]
                except subprocess.TimeoutExpired:
                    hung += 1
        total += lost + hung
        print(f"CPython {platform.python_version()}, {kind}: {interrupts} interrupts, {lost} lost, {hung} hung")
    sys.exit(total > 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
