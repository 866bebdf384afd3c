"""A step that thousands of processes have written, as process 0 and a reader see it, by the library's own code.

There is one process here. It saves as process 0 of a job, and where that waits for the arrays of the others, it
writes their parts itself, each with the few small pieces that such a process would hold. The rest is as in a job:
the merge, the look through all files, the manifest, the flush, the name. Then one process opens the run, and reads
its share of the step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

import ckptmgr
from benchmarks import measure
from ckptmgr.arrays import reading, shares, to_host, writing
from ckptmgr.arrays.chunks import Index, Stored
from ckptmgr.arrays.shares import Piece
from ckptmgr.arrays.to_host import Part
from ckptmgr.format import files, recorded
from ckptmgr.format import manifest as manifests
from ckptmgr.processes.job import Call, Job
from ckptmgr.run import catalog
from ckptmgr.run.lock import Shared
from ckptmgr.saving import committing, sealing
from ckptmgr.saving.copying import Copied
from ckptmgr.specs import LeafSpec, TreeSpec

_ITEMS, _COLUMNS = ("params", "opt_state"), 2048  # pieces of 8 kB: smaller ones would lie in the index
_STEP = 1
_TIMED = {
    "merge": (writing, "merge"),
    "look through": (files, "walk"),
    "checksums": (recorded, "record_files"),
    "compare": (sealing, "check"),
    "manifest": (manifests, "encode"),
    "flush": (files, "sync"),
}


def measure_step(count: int, leaves: int, repeats: int, directory: Path) -> dict[str, Any]:
    """Seconds and bytes of a step that so many processes have written, each a piece of so many leaves."""
    saves = [_save(count, leaves // len(_ITEMS), directory / str(turn)) for turn in range(repeats)]
    reads = [_read(count, directory / str(turn)) for turn in range(repeats)]
    step = directory / "0" / str(_STEP)
    found = [path for path in step.rglob("*") if path.is_file()]
    return {
        "count": count,
        "leaves": leaves,
        "files": len(found),
        "manifest_bytes": (step / manifests.NAME).stat().st_size,
        "index_bytes": sum(os.path.getsize(step / item / "d" / name) for item in _ITEMS
                           for name in os.listdir(step / item / "d")),
        "save": measure.summaries(saves),
        "read": measure.summaries(reads),
    }  # fmt: skip


# ---------------------------------------------------------------- the save


class _Line(Job):
    """Process 0 of a job whose other processes are played here."""

    def __init__(self, write_parts: Any) -> None:
        super().__init__("scale", 3600, alone=True)
        self._write_parts = write_parts

    def collect(self, call: Call, found: Any) -> list[Any]:
        return [*super().collect(call, found), *(self._write_parts() if call.what == "the arrays" else [])]


def _save(count: int, leaves: int, directory: Path) -> dict[str, float]:
    """Seconds of each thing that process 0 does for all, and of writing a part."""
    run = catalog.open_catalog(epath.Path(directory))
    run.prepare()
    parts: list[float] = []

    def write_parts() -> list[list[Any]]:
        of_0 = {**seconds}
        done = [measure.timed(_write_part, run.draft(_STEP), count, leaves, n) for n in range(1, count)]
        seconds.update(of_0)  # what the others do is not of process 0
        parts.extend(part_s for _, part_s in done)
        return [[report, ""] for report, _ in done]

    copied, committer = (
        _copied(count, leaves),
        committing.Committer(run, compression=None, job=_Line(write_parts), shared=Shared()),
    )
    with _timed(_TIMED) as seconds:
        _, all_s = measure.timed(committer.commit, copied)
    others = sum(seconds.values()) + sum(parts)
    return seconds | {"the rest": all_s - others, "in all": all_s - sum(parts), "a part": statistics.median(parts)}


def _copied(count: int, leaves: int) -> Copied:
    """The snapshot of process 0."""
    trees = {name: _snapshot(count, leaves, 0) for name in _ITEMS}
    values = {manifests.STEP: lambda: _STEP, manifests.METRICS: dict}
    described = {name: manifests.Item("arrays", each.plan.tree) for name, each in trees.items()}
    described |= {name: manifests.Item("json", file=manifests.json_file(name)) for name in values}
    return Copied({**trees, **values}, manifests.Manifest(step=_STEP, time=0.0, items=described))


def _snapshot(count: int, leaves: int, index: int) -> writing.Snapshot:
    """What one process has copied: its piece of each leaf of an item."""
    plan = dataclasses.replace(_plan(count, leaves), takes=(functools.partial(_take, index),) * leaves)
    snapshot = writing.Snapshot(plan, [None] * leaves, None)
    snapshot.start()
    snapshot.collect()
    return snapshot


@functools.cache
def _plan(count: int, leaves: int) -> to_host.Plan:
    """Leaves that are cut into a piece for each process."""
    shape, cut = (count, _COLUMNS), (1, _COLUMNS)
    names = [f"w{n}" for n in range(leaves)]
    specs = [LeafSpec(f"['{name}']", (name,), "numpy", shape, "float32", chunks=cut) for name in names]
    outline = {"dict": {name: n for n, name in enumerate(names)}}
    stored = (Stored(shape, "float32", cut),) * leaves
    return to_host.Plan(TreeSpec(tuple(specs), outline), stored, (None,) * leaves, ())


def _take(index: int, leaf: Any, is_own: bool) -> list[Part]:
    return [(_piece(index), np.full((1, _COLUMNS), index, np.float32))]


def _piece(index: int) -> Index:
    return slice(index, index + 1), slice(0, _COLUMNS)


def _write_part(draft: epath.Path, count: int, leaves: int, index: int) -> sealing.Facts:
    """What another process does, and reports."""
    parts = [f"{name}/{writing.PART}{index}" for name in _ITEMS]
    for part in parts:
        writing.write(draft / part, _snapshot(count, leaves, index), None)
    return sealing.pack(sealing.own_files(draft, [], parts))


@contextlib.contextmanager
def _timed(points: Mapping[str, tuple[Any, str]]) -> Iterator[dict[str, float]]:
    """Adds up the seconds that each of these functions takes."""
    seconds = dict.fromkeys(points, 0.0)
    real = {what: getattr(owner, name) for what, (owner, name) in points.items()}

    def watch(what: str) -> Any:
        def watched(*args: Any, **given: Any) -> Any:
            began = time.perf_counter()
            try:
                return real[what](*args, **given)
            finally:
                seconds[what] += time.perf_counter() - began

        return watched

    for what, (owner, name) in points.items():
        setattr(owner, name, watch(what))
    try:
        yield seconds
    finally:
        for what, (owner, name) in points.items():
            setattr(owner, name, real[what])


# ---------------------------------------------------------------- one process that reads


def _read(count: int, directory: Path) -> dict[str, float]:
    """Seconds of opening the run, and of what one process does to read its share."""
    _, open_s = measure.timed(_open, directory)
    run, index, folder = (
        catalog.open_catalog(epath.Path(directory)),
        count // 2,
        epath.Path(directory / str(_STEP)),
    )
    manifest, manifest_s = measure.timed(lambda: run.manifest(_STEP, fresh=True))
    items = [*_ITEMS, manifests.STEP, manifests.METRICS]
    _, check_s = measure.timed(lambda: recorded.check_files(manifest, folder, items, share=(index, count)))
    sources = [reading.Source(name, plain=True) for name in _ITEMS]
    openers = [reading.Opener(folder, source) for source in sources]
    _, index_s = measure.timed(lambda: [opener.found for opener in openers])
    wanted = [
        reading.Read(name, n, leaf, [_piece(index)])
        for n, name in enumerate(_ITEMS)
        for leaf in manifest.items[name].tree.leaves
    ]
    plan = reading.Plan(wanted, sources, is_local=True)
    found, arrays_s = measure.timed(reading.read, plan, openers)
    assert all((values == index).all() for pieces in found for values in pieces)
    seconds = {"manifest": manifest_s, "check files": check_s, "index": index_s, "arrays": arrays_s}
    return {"open": open_s} | seconds | {"in all": sum(seconds.values())}


def _open(directory: Path) -> None:
    manager = ckptmgr.CheckpointManager(directory, read_only=True)
    assert manager.latest() == _STEP
    manager.close()


# ---------------------------------------------------------------- who writes what

_PLANNED, _ROWS = 100, 4096


def measure_plan(count: int, repeats: int) -> dict[str, Any]:
    """Seconds until a process knows what it writes, at the first save of a structure: 100 leaves of 16 MiB."""
    replicas = max(1, count // 32)
    kinds = {
        "a piece in each": [Piece(_rows(n, count), (n,)) for n in range(count)],
        "all in each": [Piece(_rows(0, 1), tuple(range(count)))],
        "32 pieces": [
            Piece(_rows(n, count // replicas), tuple(range(n * replicas, (n + 1) * replicas)))
            for n in range(count // replicas)
        ],
    }
    rounds = [{kind: measure.timed(_shares, held)[1] for kind, held in kinds.items()} for _ in range(repeats)]
    return {"count": count, **measure.summaries(rounds)}


def _rows(n: int, of: int) -> Index:
    return slice(n * _ROWS // of, (n + 1) * _ROWS // of), slice(0, 1024)


def _shares(held: Sequence[Piece]) -> Any:
    rows = held[0].at[0].stop
    all_held = dict.fromkeys(range(_PLANNED), held)  # one list for all, as in a plan
    most = shares.largest_chunk(list(all_held.values()), [rows * 1024 * 4] * _PLANNED)
    cut = to_host.chunk_shape((_ROWS, 1024), (rows, 1024), 4, most if len(held[0].holders) > 1 else 64 << 20)
    return shares.own(0, all_held, [Stored((_ROWS, 1024), "float32", cut)] * _PLANNED, most)
