"""What a run measures: the sizes of the full run and of the quick one, and the order."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import before, distributed, fresh, machine, measure, memory, peers, series, workloads
from benchmarks.workloads import Workload

SERIES = ("leaves", "bytes", "training", "saves", "opening", "shards", "processes", "late")
JUDGED_WORKLOADS = ("tiny", "many", "big")
JUDGED_SERIES = ("training", "saves", "opening", "shards")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything; these are the full run's, `QUICK` runs the same code on next to nothing."""

    repeats: int = 5
    small_repeats: int = 15
    """Of the workloads below 100 MB, where the median counts."""
    series_repeats: int = 3
    leaves: tuple[int, ...] = (30, 100, 300, 1_000, 3_000, 10_000)
    leaves_bytes: int = 25 * 10**6
    bytes: tuple[int, ...] = (10**6, 4 * 10**6, 16 * 10**6, 64 * 10**6, 256 * 10**6, 10**9, 2 * 10**9)
    bytes_leaves: int = 30
    training: tuple[int, int, int] = (1024, 256, 100)  # width, rows, save_every
    training_turns: int = 24
    saves: int = 50
    steps: int = 2_000
    shards: tuple[int, int, int] = (8, 8192, 4096)  # count, rows, columns
    processes: tuple[int, ...] = (1, 2, 4)
    process_rows: int = 1024  # 67 MB in all
    late: tuple[int, ...] = (1, 2, 4, 8)
    late_s: float = 2.0
    group_timeout_s: float = 180


QUICK = Sizes(
    repeats=1, small_repeats=1, series_repeats=1, leaves=(30, 60), leaves_bytes=10**5, bytes=(10**5, 10**6),
    training=(32, 8, 20), training_turns=2, saves=5, steps=20, shards=(4, 64, 64), processes=(1, 2),
    process_rows=8, late=(1, 2), late_s=0.3, group_timeout_s=100,
)  # fmt: skip


def sizes(*, quick: bool, repeats: int | None, budgets: bool = False) -> Sizes:
    """`repeats` is for workloads and series alike, the turns of training excepted."""
    chosen = QUICK if quick else Sizes(small_repeats=9, training_turns=14) if budgets else Sizes()
    if repeats is None:
        return chosen
    return dataclasses.replace(chosen, repeats=repeats, small_repeats=repeats, series_repeats=repeats)


class Run:
    """Measures in fresh processes, with all data below one directory; says on stderr what it is at."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self._sizes, self._judged_alone = options.sizes, options.budgets
        self._directory = directory / "data"
        self._directory.mkdir()
        self._known = workloads.all_workloads(options.quick)
        self.skipped: dict[str, str] = {}
        self.not_installed = {name: package for name in peers.ALL if (package := peers.missing(name))}
        self.before: str | None = None
        """The commit that is compared with."""
        self._server = self._start(options.before, directory / "before")
        left_out = {*self.not_installed, *(["pickle"] if options.budgets else [])}
        left_out |= set() if self._server else {"before"}
        self._peers = [name for name in peers.ALL if name not in left_out]

    def close(self) -> None:
        if self._server:
            self._server.close()

    def _start(self, commit: str, directory: Path) -> before.Server | None:
        try:
            self.before = before.full_name(commit)
            return before.Server(before.checkout(commit, directory))
        except before.UnavailableError as problem:
            _say(f"{peers.Before.title}: skipped, {problem}")
            self.skipped[peers.Before.title] = str(problem)
            return None

    @property
    def _address(self) -> str | None:
        return self._server.address if self._server else None

    def workload(self, name: str) -> dict[str, Any] | None:
        """Times and memory of every peer on one workload; None if the machine is too small."""
        workload = self._known[name]
        repeats = self._sizes.repeats if workload.nbytes >= 10**8 else self._sizes.small_repeats
        found = self._times(workload, repeats)
        if found is not None:
            found = {"title": workload.title, "devices": workload.devices} | found
        self._clean()
        return found

    def series(self, name: str) -> Any:
        runs: dict[str, Callable[[], Any]] = {
            "leaves": self._leaves, "bytes": self._bytes, "training": self._training, "saves": self._saves,
            "opening": self._opening, "shards": self._shards, "processes": self._processes,
            "late": self._late,
        }  # fmt: skip
        _say(f"series: {name}")
        found = runs[name]()
        self._clean()
        return found

    # ------------------------------------------------------------ workloads

    def _times(self, workload: Workload, repeats: int, *, with_memory: bool = True) -> dict[str, Any] | None:
        too_small = _too_small(workload, self._directory)
        if too_small:
            _say(f"{workload.title}: skipped, {too_small}")
            self.skipped[workload.title] = too_small
            return None
        _say(f"{workload.title}: times")
        args = (workload, self._peers, repeats, self._directory, self._address)
        found = fresh.call(measure.times, *args, devices=workload.devices)
        if with_memory:
            _say(f"{workload.title}: memory")
            for name in ["ckptmgr"] if self._judged_alone else self._peers:
                found["peers"][name] |= self._memory(workload, name)
            found["ceilings"]["arrays_peak_bytes"] = fresh.call(
                memory.bare_arrays, workload, devices=workload.devices
            )
        return found

    def _memory(self, workload: Workload, name: str) -> dict[str, int]:
        scratch = self._directory / "scratch" / name
        args = (workload, name, (self._directory / name).resolve(), scratch.resolve())
        if name == "before" and self._address:
            return before.call(self._address, memory.peaks, *args, devices=workload.devices)
        return fresh.call(memory.peaks, *args, devices=workload.devices)

    def _clean(self) -> None:
        for entry in self._directory.iterdir():
            shutil.rmtree(entry)

    # ------------------------------------------------------------ series

    def _points(self, chosen: Sequence[Workload]) -> list[dict[str, Any]]:
        points = []
        for workload in chosen:
            found = self._times(workload, self._sizes.series_repeats, with_memory=False)
            points += [] if found is None else [found]
            self._clean()
        return points

    def _leaves(self) -> list[dict[str, Any]]:
        return self._points([workloads.uniform(count, self._sizes.leaves_bytes) for count in self._sizes.leaves])

    def _bytes(self) -> list[dict[str, Any]]:
        return self._points([workloads.uniform(self._sizes.bytes_leaves, size) for size in self._sizes.bytes])

    def _training(self) -> dict[str, Any]:
        sizes = self._sizes
        names = ("ckptmgr",) if self._judged_alone else ("ckptmgr", "orbax", "pickle-fsync")
        return fresh.call(series.training, names, *sizes.training, sizes.training_turns, self._directory)

    def _saves(self) -> dict[str, Any]:
        return fresh.call(series.saves, self._sizes.saves, self._known["many"], self._directory)

    def _opening(self) -> dict[str, Any]:
        return fresh.call(series.opening, self._sizes.steps, self._sizes.series_repeats, self._directory)

    def _shards(self) -> dict[str, Any]:
        names = ("ckptmgr",) if self._judged_alone else _BOTH
        return distributed.shards(names, *self._sizes.shards, self._sizes.group_timeout_s, self._directory)

    def _processes(self) -> dict[str, Any]:
        sizes = self._sizes
        return distributed.processes(
            _BOTH, sizes.processes, sizes.process_rows, sizes.series_repeats, sizes.group_timeout_s,
            self._directory,
        )  # fmt: skip

    def _late(self) -> dict[str, Any]:
        sizes = self._sizes
        args = sizes.late, sizes.late_s, sizes.series_repeats, sizes.group_timeout_s, self._directory
        return distributed.late(_BOTH, *args)


_BOTH = ("ckptmgr", "orbax")  # the peers that know several processes, and a part of an array


def _too_small(workload: Workload, directory: Path) -> str | None:
    """Why this machine cannot measure the workload; None if it can."""
    # Memory: the reference, a copy to save, what is restored, and copies that peers make; of sharded arrays
    # JAX keeps a whole copy beside each, and 8.1 x was seen. Disk: each peer's checkpoint, the one that
    # replaces it, and the raw file.
    memory_bytes, disk_bytes = 9 * workload.nbytes, (len(peers.ALL) + 3) * workload.nbytes
    if machine.available_bytes() < memory_bytes:
        return f"it takes {workloads.spell_bytes(memory_bytes)} of memory"
    if shutil.disk_usage(directory).free < disk_bytes:
        return f"it takes {workloads.spell_bytes(disk_bytes)} of disk"
    return None


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
