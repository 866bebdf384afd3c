"""Where the time of a save and a restore goes, line by line: `python -m benchmarks.profiling [many] [repeats]`.

py-spy looks at a process that saves and restores from outside, so that a line that lets go of the
interpreter's lock is not seen more often than one that holds it. The line is the innermost one of
Python: one that calls into JAX or TensorStore stands for what these do. A share is of the wall time
of all saves, or restores; a thread that only waits is not counted, and two may be busy at once.
"""

from __future__ import annotations

import collections
import json
import linecache
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import peers, workloads

ROWS = 8
LOOKS_PER_S = 100
IDLE = ("_worker", "select", "wait", "_wait_for_tstate_lock")
COMPARED = {"orbax": peers.Orbax, "ckptmgr": peers.Ckptmgr}
ENOUGH = {"tiny": 60, "many": 30, "big": 5}  # repetitions that take some seconds
_PY_SPY = Path(sysconfig.get_path("scripts")) / "py-spy"  # of this environment, activated or not


def main(name: str = "many", repeats: str = "10") -> None:
    print(
        f"{workloads.all_workloads(quick=False)[name].title}: the lines seen most often, of {repeats} repetitions"
    )
    for peer, kind in COMPARED.items():
        for what, lines in profile(peer, name, repeats).items():
            print("", f"{kind.title}, {what}: {lines[0]}", *lines[1:], sep="\n")


def of_missed(budgets: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """For each save and restore that misses a budget: where its time goes, or why that is not known."""
    missed = sorted({tuple(row["profiled"]) for row in budgets if row["met"] is False and row["profiled"]})
    found: dict[str, list[str]] = {}
    for name in {name: None for name, _ in missed}:
        try:
            shown = profile("ckptmgr", name, str(ENOUGH[name]))
        except (OSError, WatchError) as problem:
            shown = {what: [f"not known: {problem}"] for what in ("save", "restore")}
        found |= {f"{name}, {what}": shown[what] for each, what in missed if each == name}
    return found


def profile(peer: str, name: str, repeats: str) -> dict[str, list[str]]:
    """For a save and a restore: the median of its seconds, and the lines that were seen most often.

    Each has a process of its own: the threads of the other one would be seen as its own.
    """
    shown = {}
    with tempfile.TemporaryDirectory() as directory:
        for what in ("save", "restore"):
            arguments = ["--watched", peer, name, repeats, directory, what]
            shown[what] = show(what, *look(arguments, Path(directory, "seen.txt")))
    return shown


class WatchError(RuntimeError):
    """The process that was to be watched failed."""


def look(arguments: list[str], seen: Path) -> tuple[list[float], list[str]]:
    """The seconds that each save or restore took, and all stacks: frames, and how often they were seen."""
    watched = [sys.executable, "-m", "benchmarks.profiling", *arguments]
    options = [
        "--rate",
        str(LOOKS_PER_S),
        "--nonblocking",
        "--full-filenames",
        "--format",
        "raw",
        "--output",
        seen,
    ]
    done = subprocess.run([_PY_SPY, "record", *options, "--", *watched], stdout=subprocess.PIPE, text=True)
    answer = next((line for line in done.stdout.splitlines() if line.startswith("[")), None)
    if answer is None:
        raise WatchError("the process that was to be watched failed")
    return json.loads(answer), seen.read_text().splitlines()


def show(what: str, seconds: list[float], stacks: list[str]) -> list[str]:
    lines: collections.Counter[str] = collections.Counter()
    for stack in stacks:
        frames, _, count = stack.rpartition(" ")
        innermost = frames.rpartition(";")[2]
        is_idle = innermost.partition(" ")[0].endswith(IDLE)
        in_background = "_bootstrap_inner (" in frames
        if not is_idle and (in_background or re.search(rf"\b{what} \([^;]*profiling\.py", frames)):
            lines[innermost] += int(count)
    shares = [
        f"  {count / LOOKS_PER_S / sum(seconds):6.1%}  {spell(line)}" for line, count in lines.most_common(ROWS)
    ]
    return [f"{sorted(seconds)[len(seconds) // 2]:.3f} s (median)", *shares]


def spell(frame: str) -> str:
    """`function (/path/file.py:12)` with the end of the path, and the line itself."""
    function, _, place = frame.rstrip(")").rpartition(" (")
    file, _, line = place.rpartition(":")
    source = linecache.getline(file, int(line)).strip()
    return f"{'/'.join(Path(file).parts[-2:])}:{line} in {function}: {source[:70]}"


# ---------------------------------------------------------------- the process that is watched


def watched(peer: str, name: str, repeats: str, directory: str, what: str) -> None:
    """Saves, or restores what another process has saved."""
    state = workloads.build(workloads.all_workloads(quick=False)[name])
    opened = COMPARED[peer](Path(directory))

    def save(fresh: workloads.State) -> None:
        opened.save(fresh)
        opened.wait()

    def restore(template: workloads.State) -> None:
        jax.block_until_ready(opened.restore(template))

    if what == "save":
        took = [seconds(save, workloads.copy(state)) for _ in range(int(repeats))]
    else:
        took = [seconds(restore, state) for _ in range(int(repeats))]
    opened.close()
    print(json.dumps(took), flush=True)


def seconds(call: Callable[[workloads.State], None], state: workloads.State) -> float:
    started = time.perf_counter()
    call(state)
    return time.perf_counter() - started


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watched"]:
        watched(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
