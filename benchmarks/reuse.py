"""What a step costs of which little has changed (`reuse_unchanged`), on a disk and in a bucket.

    python -m benchmarks.reuse --out docs/performance

84 MB that are frozen and 0.6 MB that are trained, as with an adapter (LoRA); with the option and without it.
What the option costs where every array changes: `python -m benchmarks.options`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ckptmgr
from benchmarks import counting

_MB = 1e6


class Step(NamedTuple):
    """What one step cost."""

    stored: int
    """How many bytes more of the disk are in use."""
    sent: int
    """Bytes that the process wrote, or sent to the bucket."""
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reuse", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="where reuse.txt goes")
    options = parser.parse_args(arguments)
    lines = [
        f"{'84.5 MB, of which 0.6 MB change':<34}{'first step, MB':>16}{'each further one, MB':>22}{'seconds':>16}"
    ]
    lines += _rows("disk", *_on_disk(options.steps), ("stored", "sent"))
    lines += _rows("s3", *_in_bucket(options.steps), ("sent",))
    text = "\n".join(lines)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "reuse.txt").write_text(text + "\n")
    print(text)
    return 0


def _rows(where: str, on: Sequence[Step], off: Sequence[Step], known: Sequence[str]) -> list[str]:
    rows = []
    for option, steps in (("reuse_unchanged", on), ("without it", off)):
        for what in known:
            first, *further = [getattr(each, what) / _MB for each in steps]
            seconds = f"{steps[0].seconds:.2f}, {statistics.median(each.seconds for each in steps[1:]):.2f}"
            label = f"{where}, {option}: {'bytes ' + what}"
            rows.append(f"{label:<34}{first:>16.2f}{statistics.mean(further):>22.2f}{seconds:>16}")
    return rows


def _saved(run: str, steps: int, reuse: bool, stored: Callable[[], int], sent: Callable[[], int]) -> list[Step]:
    random = np.random.default_rng(0)
    frozen = {f"layer_{n}": jnp.asarray(random.random((1024, 1024), np.float32)) for n in range(20)}
    found = []
    with ckptmgr.CheckpointManager(run, reuse_unchanged=reuse) as manager:
        for step in range(1, steps + 1):
            params = {"frozen": frozen, "adapter": jnp.asarray(random.random(150_000, np.float32))}
            before, sent_before, began = stored(), sent(), time.perf_counter()
            manager.save(step, jax.block_until_ready(params)).result()
            seconds = time.perf_counter() - began
            manager.wait()
            found.append(Step(stored() - before, sent() - sent_before, seconds))
    return found


def _on_disk(steps: int) -> tuple[list[Step], list[Step]]:
    def one(reuse: bool) -> list[Step]:
        with tempfile.TemporaryDirectory() as folder:
            return _saved(f"{folder}/run", steps, reuse, lambda: _used(Path(folder)), _written)

    return one(True), one(False)


def _used(folder: Path) -> int:
    found = [each.stat() for each in folder.rglob("*") if each.is_file()]
    return sum({each.st_ino: each.st_blocks * 512 for each in found}.values())


def _written() -> int:
    """The bytes that this process has given to write(2) and its like."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def _in_bucket(steps: int) -> tuple[list[Step], list[Step]]:
    with counting.servers() as proxies:
        proxy = proxies["s3"]

        def one(reuse: bool) -> list[Step]:
            return _saved(f"s3://bucket/{reuse}/run", steps, reuse, lambda: 0, lambda: proxy.uploaded)

        return one(True), one(False)


if __name__ == "__main__":
    sys.exit(main())
