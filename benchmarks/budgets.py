"""The budgets that ckptmgr is held to, as ratios inside one run, beside what the run measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks import peers

Results = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Budget:
    """A ratio, or a fraction, that is not to be above `limit`; it is known to within `uncertainty`."""

    where: str
    what: str
    limit: float
    measured: float
    uncertainty: float = 0.0
    profiled: tuple[str, str] | None = None
    """The workload, and what to look at there, "save" or "restore", if the budget is missed."""

    def row(self, judged: bool) -> dict[str, Any]:
        """With the verdict; None if the limit lies within the uncertainty, or if nothing is judged.

        A quick run is not judged: it measures start-up costs.
        """
        is_clear = abs(self.measured - self.limit) >= self.uncertainty
        return dataclasses.asdict(self) | {"met": self.measured <= self.limit if judged and is_clear else None}


def check(results: Results) -> list[dict[str, Any]]:
    """Every budget that this run has the figures for."""
    makers = (_times, _memory, _training, _opening, _shards, _many_saves)
    return [budget.row(judged=not results["quick"]) for make in makers for budget in make(results)]


# ---------------------------------------------------------------- times

_DISK_DECIDES = "big"  # there the quietest of the repetitions counts; elsewhere the median

# workload, figure, what it is compared with, limit; pickle without fsync is no save that is durable
_TIMES = [
    ("tiny", "blocked_s", "pickle-fsync", 1),
    ("tiny", "durable_s", "orbax", 1),
    ("tiny", "restore_s", "pickle-fsync", 4),
    ("tiny", "restore_s", "orbax", 1 / 5),
    ("many", "blocked_s", "pickle-fsync", 0.35),
    ("many", "blocked_s", "orbax", 1 / 20),
    ("many", "durable_s", "pickle-fsync", 1.5),
    ("many", "restore_s", "pickle-fsync", 1.6),
    ("many", "restore_s", "orbax", 1 / 12),
    ("big", "blocked_s", "orbax", 1 / 4),
    ("big", "durable_s", "raw", 1.2),
    ("big", "durable_s", "pickle-fsync", 1),
    ("big", "durable_s", "orbax", 1),
    ("big", "durable_s", "safetensors", 1),
    ("big", "durable_s", "torch-dcp", 1),
    ("big", "restore_s", "raw", 1),
    ("big", "restore_s", "orbax", 0.4),
]
_WORDS = {"durable_s": "save until durable", "blocked_s": "blocked in save", "restore_s": "restore"}


def _times(results: Results) -> list[Budget]:
    budgets = []
    for workload, figure, against, limit in _TIMES:
        found = results["workloads"].get(workload)
        if found is None or (against != "raw" and against not in found["peers"]):
            continue
        quietest = workload == _DISK_DECIDES
        kind = "min" if quietest else "median"
        ours, theirs = found["peers"]["ckptmgr"][figure][kind], _base(found, figure, against)[kind]
        what = f"{_WORDS[figure]} / {_spell(figure, against)}{', quietest of each' if quietest else ''}"
        profiled = workload, "restore" if figure == "restore_s" else "save"
        budgets.append(Budget(found["title"], what, limit, ours / theirs, profiled=profiled))
    return budgets


def _base(found: Results, figure: str, against: str) -> Mapping[str, float]:
    if against == "raw":
        return found["ceilings"]["raw_read_s" if figure == "restore_s" else "raw_write_s"]
    return found["peers"][against][figure]  # pickle is blocked for its whole save


def _spell(figure: str, against: str) -> str:
    if against == "raw":
        return "a raw read()" if figure == "restore_s" else "a raw write with fsync"
    if against == "pickle-fsync" and figure == "blocked_s":
        return "the whole save of pickle + fsync"
    return peers.ALL[against].title


# ---------------------------------------------------------------- memory and series


def _memory(results: Results) -> list[Budget]:
    """Not of the 7 leaves: what a save takes there is a thread's stack."""
    limits = {"save_peak_bytes": ("memory of a save / bytes saved", 1.1),
              "restore_peak_bytes": ("memory of a restore / bytes restored", 1.2)}  # fmt: skip
    return [
        Budget(found["title"], what, limit, found["peers"]["ckptmgr"][figure] / found["nbytes"])
        for name, found in results["workloads"].items()
        for figure, (what, limit) in limits.items()
        if name != "tiny"
    ]


def _training(results: Results) -> list[Budget]:
    found = results["series"].get("training")
    if found is None:
        return []
    slowdown = found["slowdown"]["ckptmgr"]
    within = 2 * slowdown["standard_error"]
    what = f"slower when it saves every {found['save_every']} steps, known to within {within:.2g}"
    return [Budget("training", what, 0.035, slowdown["mean"], within)]


def _opening(results: Results) -> list[Budget]:
    found = results["series"].get("opening")
    if found is None:
        return []
    ours, theirs = (found["peers"][name]["open_s"]["median"] for name in ("ckptmgr", "orbax"))
    return [Budget(f"a directory of {found['steps']:,} steps", "open / stock Orbax", 1 / 10, ours / theirs)]


def _shards(results: Results) -> list[Budget]:
    """A checksummed chunk is read whole: one chunk is allowed beside the shard."""
    found = results["series"].get("shards")
    if found is None:
        return []
    peer = found["peers"]["ckptmgr"]
    chunk = peer["chunk_bytes"] / found["shard_bytes"]
    axes = {"saved_axis": ("along the saved axis", 1.1), "other_axis": ("along the other axis", 2.0)}
    return [
        Budget(f"one shard of {found['count']}", f"bytes read / bytes needed, {words}", limit + chunk,
               peer[axis]["ratio"])
        for axis, (words, limit) in axes.items()
        if peer[axis]["supported"]
    ]  # fmt: skip


def _many_saves(results: Results) -> list[Budget]:
    found = results["series"].get("saves")
    if found is None:
        return []
    early, late = found["early"], found["late"]
    where = f"a run of {found['count']} saves"
    grown = (late["anonymous_bytes"] - early["anonymous_bytes"]) / found["nbytes"]
    counts = {"threads": ("threads", 1.1), "open_files": ("open files", 1), "files": ("files on disk", 1)}
    return [
        Budget(where, "memory that it grew by / bytes of one save", 0.2, grown),
        *(Budget(where, f"{words}, at the end / early", limit, late[name] / early[name])
          for name, (words, limit) in counts.items()),  # pools of threads fill slowly
    ]  # fmt: skip
