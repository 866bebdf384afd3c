"""Before a step gets its manifest: does the draft hold what was meant to be saved, and nothing else?

The manifest must describe what was saved, not what is on the disk now: another program may have emptied, removed
or replaced something while the step was written.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from etils import epath

from ckptmgr.arrays import chunks, extents
from ckptmgr.arrays.chunks import Stored
from ckptmgr.arrays.to_host import Plan
from ckptmgr.errors import SaveError
from ckptmgr.format import files, objects, paths, recorded
from ckptmgr.format import manifest as manifests
from ckptmgr.trees.structure import numpy_dtype

_DATABASE = re.compile(r"(ocdbt\.process_0/)?(unchanged\.\d+/)?(manifest\.ocdbt|d/[0-9a-f]{32})")


class Meant(NamedTuple):
    """What a step must hold."""

    files: Mapping[str, bytes]
    """The content of each file, by its name."""
    reported: Mapping[str, manifests.File]
    """What the other processes have written, as each of them has found it there."""
    databases: Mapping[str, Plan]
    """The plan of the arrays in each database, by its folder."""
    compression: str | None


def is_of_database(name: str) -> bool:
    """Whether TensorStore wrote this file of a step, and has flushed it."""
    return _DATABASE.fullmatch(name.partition("/")[2]) is not None


# ---------------------------------------------------------------- what each process has written

Facts = Mapping[str, tuple[int, int | None]]
"""Size and CRC-32 of files by their names in the step, as JSON."""


def own_files(
    draft: epath.Path,
    texts: Iterable[str],
    parts: Iterable[str],
    kept: Mapping[str, manifests.File] = MappingProxyType({}),
) -> dict[str, manifests.File]:
    """The files that this process has written: `texts`, and those of the databases in `parts`. Flushes the names.

    `kept` has those that it took over from the step before. Each process reads and flushes its own: else process 0
    would read and flush those of thousands.
    """
    sizes = {text: paths.size(draft / text) for text in texts}
    for part in parts:
        with contextlib.suppress(FileNotFoundError):  # this process has nothing to write
            folders, found = files.walk(draft / part)
            sizes |= {f"{part}/{name}": size for name, size in found.items()}
            files.sync(folders)
    return recorded.record_files(draft, sizes, recorded.checks_itself(draft), kept)


def pack(found: Mapping[str, manifests.File]) -> Facts:
    """For the way to process 0."""
    return {name: (file.size, file.crc32) for name, file in found.items()}


def look_through(
    draft: epath.Path, sent: Mapping[str, bytes]
) -> tuple[list[epath.Path], Mapping[str, int], dict[str, manifests.File]]:
    """The folders of a draft, the sizes of its files, and the files that need not be read.

    Those are the ones that this process has just sent to a bucket, if the bucket lists them as they were sent.
    """
    if paths.is_local(draft):
        return *files.walk(draft), {}
    found = objects.below(draft)
    unread = {
        name: manifests.File(len(data), zlib.crc32(data))
        for name, data in sent.items()
        if name in found and found[name].is_like(data)
    }
    return [], {name: each.size for name, each in found.items()}, unread


def unpack(reports: Iterable[Facts | None]) -> dict[str, manifests.File]:
    """What all have written, in one."""
    return {name: manifests.File(*facts) for each in reports for name, facts in (each or {}).items()}


def without_parts(draft: epath.Path, folders: Iterable[epath.Path], others: Iterable[str]) -> list[epath.Path]:
    """The folders but for those of parts that other processes have written, and flushed."""
    parts = {tuple(parts[:2]) for name in others if len(parts := name.split("/")) > 2}
    depth = len(draft.parts)
    return [folder for folder in folders if tuple(folder.parts[depth : depth + 2]) not in parts]


# ---------------------------------------------------------------- what the step holds


def check(step: int, draft: epath.Path, meant: Meant, found: Mapping[str, manifests.File]) -> None:
    """Raises SaveError that names the first file or leaf that differs from what was meant."""

    def refuse(name: str, why: str) -> SaveError:
        return SaveError(
            f"{draft / name} {why}: another program has changed the files of step {step}, so it is not committed",
            step=step,
        )

    for name, file in meant.reported.items():
        if found.get(name) != file:
            raise refuse(name, "is not what was written" if name in found else "is missing")
    for name, data in meant.files.items():
        if name not in found:
            raise refuse(name, "is missing")
        if (found[name].size, found[name].crc32) != (len(data), zlib.crc32(data)):
            raise refuse(name, "is not what was written")
    for name in found.keys() - meant.files.keys() - meant.reported.keys():
        folder = next((each for each in meant.databases if name.startswith(f"{each}/")), None)
        if folder is None or not _DATABASE.fullmatch(name.removeprefix(f"{folder}/")):
            raise refuse(name, "was not written by this save")
    for folder, plan in meant.databases.items():
        if paths.is_local(draft):
            for key, why in _wrong(draft / folder, plan, meant.compression, {**found}, folder):
                raise refuse(folder, f"{why} {key}")


def _wrong(
    directory: epath.Path, plan: Plan, compression: str | None, files: Mapping[str, manifests.File], folder: str
) -> Iterator[tuple[str, str]]:
    """The chunks that are missing or have another size."""
    if not plan.stored:
        return
    try:
        found = extents.find(directory)
    except (ValueError, OSError) as problem:
        paths.refuse_exhausted(problem)
        yield f"({str(problem)[:300]})", "has no list of its arrays"
        return
    expected, ends = _expected(plan), dict[str, int]()
    if compression is not None:
        expected = dict.fromkeys(expected)
    for key, size in expected.items():  # without function calls: there are thousands of chunks
        chunk = found.get(key)
        if chunk is None:
            yield key, "lacks"
        elif isinstance(chunk, bytes):
            if size is not None and len(chunk) != size:
                yield key, "has the wrong size for"
        elif size is not None and chunk.nbytes != size:
            yield key, "has the wrong size for"
        elif (end := chunk.offset + chunk.nbytes) > ends.get(chunk.file, 0):
            ends[chunk.file] = end
    for file, end in ends.items():
        there = files.get(f"{folder}/{file}")
        if there is None or there.size < end:
            yield file, "lacks the end of"
    if len(found) != len(expected):
        yield f"{len(found)} arrays and chunks instead of {len(expected)}", "holds"


_known: weakref.WeakKeyDictionary[Plan, Mapping[str, int | None]] = weakref.WeakKeyDictionary()


def _expected(plan: Plan) -> Mapping[str, int | None]:
    """The keys of a database and the size of each value, None if it may vary; made once for each plan."""
    if plan not in _known:
        found: dict[str, int | None] = {}
        for prefix, stored in zip(plan.prefixes, plan.stored, strict=True):
            size = math.prod(stored.chunks) * numpy_dtype(stored.dtype).itemsize + 4 if stored.is_raw() else None
            found[f"{prefix}zarr.json"] = None
            found |= dict.fromkeys(_keys(prefix, stored), size)
        _known[plan] = found
    return _known[plan]


def _keys(prefix: str, stored: Stored) -> Iterator[str]:
    if stored.chunks == stored.shape:
        yield prefix + chunks.ONLY[len(stored.shape)]
        return
    grid = [range(-(-have // size)) for have, size in zip(stored.shape, stored.chunks, strict=True)]
    for place in itertools.product(*grid):
        yield prefix + "/".join(["c", *map(str, place)])
