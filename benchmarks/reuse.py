"""What a step costs of which little has changed (`reuse_unchanged`), on a disk and in a bucket.

    python -m benchmarks.reuse --out docs/performance

80 MB that are frozen and 0.6 MB that are trained, as with an adapter (LoRA); ten steps. And a state of which every
array changes, with and without the option, in turns: what the option costs who has no use for it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ckptmgr
from benchmarks import counting, workloads

_STEPS = 10
_MB = 1e6


class Step(NamedTuple):
    """What one step cost."""

    stored: int
    """How many bytes more the disk, or the bucket, was given."""
    sent: int
    """Bytes that the process wrote, or sent to the bucket."""
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reuse", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--repeats", type=int, default=30, help="saves of each kind, where all changes: %(default)s"
    )
    parser.add_argument("--out", type=Path, help="where reuse.txt goes")
    options = parser.parse_args(arguments)
    lines = [
        f"{'80.6 MB, of which 0.6 MB change':<34}{'first step, MB':>16}{'each further one, MB':>22}{'seconds':>16}"
    ]
    lines += _rows("disk", *_on_disk())
    lines += _rows("s3", *_in_bucket())
    lines += ["", "3,001 leaves, 25 MB, all of which change: time with the option, as a ratio to that without it"]
    lines += [f"{what:<34}{ratio:>16.3f}" for what, ratio in _all_changes(options.repeats).items()]
    text = "\n".join(lines)
    if options.out:
        (options.out / "reuse.txt").write_text(text + "\n")
    print(text)
    return 0


def _rows(where: str, on: Sequence[Step], off: Sequence[Step]) -> list[str]:
    rows = []
    for option, steps in (("reuse_unchanged", on), ("without it", off)):
        for what in ("stored", "sent"):
            first, *further = [getattr(each, what) / _MB for each in steps]
            seconds = f"{steps[0].seconds:.2f}, {statistics.median(each.seconds for each in steps[1:]):.2f}"
            label = f"{where}, {option}: {'bytes ' + what}"
            rows.append(f"{label:<34}{first:>16.2f}{statistics.mean(further):>22.2f}{seconds:>16}")
    return rows


def _saved(run: str, reuse: bool, stored: Callable[[], int], sent: Callable[[], int]) -> list[Step]:
    random = np.random.default_rng(0)
    frozen = {f"layer_{n}": jnp.asarray(random.random((1024, 1024), np.float32)) for n in range(20)}
    found = []
    with ckptmgr.CheckpointManager(run, reuse_unchanged=reuse) as manager:
        for step in range(1, _STEPS + 1):
            params = {"frozen": frozen, "adapter": jnp.asarray(random.random(150_000, np.float32))}
            before, sent_before, began = stored(), sent(), time.perf_counter()
            manager.save(step, jax.block_until_ready(params)).result()
            seconds = time.perf_counter() - began
            manager.wait()
            found.append(Step(stored() - before, sent() - sent_before, seconds))
    return found


def _on_disk() -> tuple[list[Step], list[Step]]:
    def one(reuse: bool) -> list[Step]:
        with tempfile.TemporaryDirectory() as folder:
            return _saved(f"{folder}/run", reuse, lambda: _used(Path(folder)), _written)

    return one(True), one(False)


def _used(folder: Path) -> int:
    found = [each.stat() for each in folder.rglob("*") if each.is_file()]
    return sum({each.st_ino: each.st_blocks * 512 for each in found}.values())


def _written() -> int:
    """The bytes that this process has given to write(2) and its like."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def _in_bucket() -> tuple[list[Step], list[Step]]:
    with counting.servers() as proxies:
        proxy = proxies["s3"]

        def one(reuse: bool) -> list[Step]:
            return _saved(f"s3://bucket/{reuse}/run", reuse, lambda: 0, lambda: proxy.uploaded)

        return one(True), one(False)


def _all_changes(repeats: int) -> dict[str, float]:
    state = workloads.build(workloads.uniform(3001, 25_000_000))
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        managers = {
            reuse: ckptmgr.CheckpointManager(f"{folder}/{reuse}", keep=1, reuse_unchanged=reuse) for reuse in times
        }
        for step in range(repeats):
            for reuse, manager in managers.items():
                times[reuse].append(_save(manager, step, workloads.copy(state)))
        for manager in managers.values():
            manager.close()
    median: dict[bool, Any] = {reuse: np.median(found[2:], axis=0) for reuse, found in times.items()}
    return dict(zip(("blocked", "durable"), median[True] / median[False], strict=True))


def _save(manager: ckptmgr.CheckpointManager, step: int, state: workloads.State) -> tuple[float, float]:
    began = time.perf_counter()
    accepted = manager.save(step, *state)
    blocked = time.perf_counter() - began
    accepted.result()
    durable = time.perf_counter() - began
    manager.wait()
    return blocked, durable


if __name__ == "__main__":
    sys.exit(main())
