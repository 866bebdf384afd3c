"""Reads a whole step, to see whether every bit is as it was written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from etils import epath

from ckptmgr.arrays import chunks, reading
from ckptmgr.arrays.progress import Progress
from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format import files, paths, recorded
from ckptmgr.format import manifest as manifests
from ckptmgr.results import Damage, VerifyReport
from ckptmgr.run import values
from ckptmgr.run.catalog import Catalog
from ckptmgr.specs import LeafSpec

_BATCH_BYTES = 256 << 20  # held in memory at a time


def verify_step(catalog: Catalog, step: int, on_progress: Progress | None) -> VerifyReport:
    """Verifies a step of a run. If a writer replaces it meanwhile, the new step is verified."""
    while True:
        stamp = catalog.stamp(step)
        try:
            manifest = catalog.manifest(step, fresh=True)
            report = verify(manifest, catalog.path(step), on_progress)
        except CorruptCheckpointError as problem:
            report = VerifyReport(step=step, damages=(Damage(problem.path or "", str(problem)),))
        if report or catalog.stamp(step) == stamp:
            return report
        catalog.require(step)  # raises CheckpointNotFoundError if the step was deleted meanwhile


def verify(manifest: manifests.Manifest, directory: epath.Path, on_progress: Progress | None) -> VerifyReport:
    """Compares every file with the manifest, then reads every array, a bounded number of chunks at a time."""
    damages = list(_damaged_files(manifest, directory))
    leaves = nbytes = 0
    for name, item in manifest.items.items():
        if item.kind != "arrays":
            damages += _damaged_values(manifest, directory, name)
            continue
        folders = [directory / item.place(name) / manifests.own_place(each) for each in range(item.processes)]
        try:
            files.check_regular(directory / item.place(name))
        except OSError as problem:
            paths.refuse_exhausted(problem)
            damages.append(Damage(name, f"cannot be read: {problem}"))
            continue
        for folder, spec in itertools.product(folders, item.tree.leaves):
            damages += _damages(name, item, folder, spec)
            leaves += 1
            nbytes += manifests.leaf_nbytes(spec)
            if on_progress is not None:
                on_progress(nbytes, manifest.nbytes)
    return VerifyReport(
        step=manifest.step,
        damages=tuple(damages),
        unchecked=(() if manifest.files else _UNCHECKED) + _unread(manifest),
        files=len(manifest.files),
        leaves=leaves,
        nbytes=nbytes,
    )


_UNCHECKED = (
    "values of arrays and small files: stock Orbax wrote this step without checksums, so it is only known that "
    "every array can be read",
)


def _unread(manifest: manifests.Manifest) -> tuple[str, ...]:
    return tuple(f"{name}: {item.why}" for name, item in manifest.items.items() if item.kind == "unread")


def _damaged_values(manifest: manifests.Manifest, directory: epath.Path, name: str) -> list[Damage]:
    """The damage of an item of JSON without a checksum."""
    if manifest.files or manifest.items[name].kind == "unread":
        return []
    try:
        values.read_value(manifest, directory, name)
    except CorruptCheckpointError as problem:
        return [Damage(problem.path or name, str(problem))]
    return []


def _damaged_files(manifest: manifests.Manifest, directory: epath.Path) -> Iterator[Damage]:
    yield from itertools.starmap(Damage, manifest.unreadable.items())
    for name, file in manifest.files.items():
        try:
            recorded.check_file(manifest, str(directory), name, file)
        except CorruptCheckpointError as problem:
            yield Damage(name, str(problem).partition(f"{directory / name} ")[2])


def _damages(name: str, item: manifests.Item, folder: epath.Path, spec: LeafSpec) -> list[Damage]:
    """What is wrong with one array, read whole but not held whole."""
    read = reading.Read(name, 0, spec)
    try:
        if read.spec.kind == "str":
            values.text(read, folder)
            return []
        opener = reading.Opener(folder, reading.Source("", zarr3=item.zarr3, ocdbt=item.ocdbt, fills=item.fills))
        array = reading.opened(read, opener)
        chunk, held = reading.chunk_of(array)
        box_bytes = max(held, _BATCH_BYTES // 4)
        boxes = chunks.boxes((), array.shape, chunk, math.prod(chunk) * box_bytes // held)
        for batch in _batches(boxes, max(1, _BATCH_BYTES // box_bytes)):
            reading.drain(read, [array[box].read() for box in batch])
    except reading.DamagedArrayError as problem:
        return [Damage(problem.leaf, str(problem))]
    return []


def _batches(boxes: Iterator[tuple[slice, ...]], size: int) -> Iterator[list[tuple[slice, ...]]]:
    while batch := list(itertools.islice(boxes, size)):
        yield batch
