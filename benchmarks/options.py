"""What options cost a save in which every array has changed, beside a save without them, in turns.

    python -m benchmarks.options --out docs/performance

The first save of a structure is given apart: `nonfinite` compiles its programs there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ckptmgr
from benchmarks import fresh, workloads

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "without": {},
    "reuse_unchanged": {"reuse_unchanged": True},
    "nonfinite": {"nonfinite": "distrust"},
}
WORKLOADS = {
    "few": workloads.uniform(7, 10_000),
    "some": workloads.uniform(97, 25_000_000),
    "many": workloads.uniform(3001, 25_000_000),
}


class Times(NamedTuple):
    """Seconds of one save."""

    blocked: float
    durable: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, writes, and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.options", description=__doc__.partition("\n")[0])
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=30, help="saves of each kind (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where options.txt goes")
    options = parser.parse_args(arguments)
    lines = [f"{'state':<24}{'option':<18}{'first, blocked':>16}{'blocked, ms':>18}{'durable, ms':>18}"]
    for name in options.workloads.split(","):
        found = fresh.call(_measured, WORKLOADS[name], options.repeats)
        lines += [_line(WORKLOADS[name], option, times, found["without"]) for option, times in found.items()]
    text = "\n".join(lines)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "options.txt").write_text(text + "\n")
    print(text)
    return 0


def _line(workload: workloads.Workload, option: str, times: Sequence[Times], without: Sequence[Times]) -> str:
    """Medians of the saves after the first, and their ratio to those without the option."""
    cells = []
    for at in range(len(Times._fields)):
        own, beside = (statistics.median(each[at] for each in some[1:]) for some in (times, without))
        cells.append(f"{1e3 * own:.3g}" + (f" ({own / beside:.2f} x)" if times is not without else ""))
    title = f"{workload.leaves:,} leaves, {workloads.spell_bytes(workload.nbytes)}"
    return f"{title:<24}{option:<18}{times[0].blocked:>14.3f} s{cells[0]:>18}{cells[1]:>18}"


def _measured(workload: workloads.Workload, repeats: int) -> dict[str, list[Times]]:
    state = workloads.build(workload)
    found: dict[str, list[Times]] = {option: [] for option in OPTIONS}
    with tempfile.TemporaryDirectory() as folder:
        managers = {
            option: ckptmgr.CheckpointManager(f"{folder}/{option}", keep=1, **OPTIONS[option]) for option in found
        }
        for step in range(repeats + 1):
            for option, manager in managers.items():
                found[option].append(_save(manager, step, workloads.copy(state)))
        for manager in managers.values():
            manager.close()
    return found


def _save(manager: ckptmgr.CheckpointManager, step: int, state: workloads.State) -> Times:
    began = time.perf_counter()
    accepted = manager.save(step, *state)
    blocked = time.perf_counter() - began
    accepted.result()
    durable = time.perf_counter() - began
    manager.wait()
    return Times(blocked, durable)


if __name__ == "__main__":
    sys.exit(main())
