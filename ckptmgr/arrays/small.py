"""Small arrays of one chunk each, read from the files of a database with few calls.

With thousands of them the work for each array takes longer than its bytes do. So what can be done for many at
once is not done for each: neighbours in a file are read by one call, into memory that they share and that JAX
takes over without a copy.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from ckptmgr.arrays import chunks
from ckptmgr.arrays.chunks import RESIDUE, Values
from ckptmgr.arrays.extents import Extent, Found
from ckptmgr.format import paths
from ckptmgr.specs import LeafSpec
from ckptmgr.trees.structure import numpy_dtype

_RUN_BYTES = 2 << 20
_GAP_BYTES = 32 << 10  # is read, too, where another call would cost more
_SEAL_BYTES = 4


class SmallArrayError(ValueError):
    """One of them cannot be read: `place` is its place among those that are wanted."""

    def __init__(self, place: int, reason: object) -> None:
        super().__init__(str(reason))
        self.place = place


class Plan:
    """What is wanted of a database, and where in their memory it goes: the same for each step of a structure."""

    def __init__(self, specs: Sequence[LeafSpec]) -> None:
        self.keys = [chunks.prefix(spec.name) + chunks.ONLY[len(spec.shape)] for spec in specs]
        self.shapes = [spec.shape for spec in specs]
        self.dtypes = [numpy_dtype(spec.dtype) for spec in specs]
        self.sizes = [chunks.stored(spec).nbytes for spec in specs]
        ends = list(itertools.accumulate(map(chunks.round_up, self.sizes), initial=0))
        self.nbytes = ends.pop()
        self.offsets = ends


def scratch() -> Values:
    """Memory for what is on its way, which several calls of `read` may use in turn: new memory costs time."""
    return np.empty(_RUN_BYTES, np.uint8)


def read(plan: Plan, directory: str, found: Found, scratch: Values) -> list[Values]:
    """Reads all of them; raises SmallArrayError for the first that is missing or damaged."""
    memory: Any = chunks.aligned((plan.nbytes,), np.dtype(np.uint8))
    into = memoryview(memory)
    sources = _sources(plan, found)
    inline = [(place, source) for place, source in enumerate(sources) if isinstance(source, bytes)]
    _take(plan, into, inline)
    for run in _runs(sources):
        data = _read(directory, run, scratch)
        first = run[0].offset
        _take(plan, into, [(each.place, data[each.offset - first : each.end - first]) for each in run])
    array: Any = np.ndarray
    return list(map(array, plan.shapes, plan.dtypes, itertools.repeat(memory), plan.offsets))


def _sources(plan: Plan, found: Found) -> list[Extent | bytes]:
    """Where each of them is, or its bytes; none is read whose size is not that of its chunk."""
    sources: list[Any] = list(map(found.get, plan.keys))
    for place, (source, size) in enumerate(zip(sources, plan.sizes, strict=True)):
        if source is None:
            raise SmallArrayError(place, "its chunk is missing")
        nbytes = len(source) if isinstance(source, bytes) else source.nbytes
        if nbytes != size + _SEAL_BYTES:
            raise SmallArrayError(place, f"its chunk has {nbytes} bytes instead of {size + _SEAL_BYTES}")
    return sources


class _Chunk(NamedTuple):
    """One that lies in a file."""

    file: str
    offset: int
    end: int
    place: int


_chunk = functools.partial(tuple.__new__, _Chunk)  # without Python for each


def _runs(sources: Sequence[Extent | bytes]) -> list[list[_Chunk]]:
    """Neighbours in a file, a few MiB at a time."""
    runs: list[list[_Chunk]] = []
    for chunk in sorted(map(_chunk, [
        (source.file, source.offset, source.offset + source.nbytes, place)
        for place, source in enumerate(sources) if not isinstance(source, bytes)
    ])):  # fmt: skip
        file, offset, end, _ = chunk
        last = runs[-1][-1] if runs else None
        is_near = last is not None and last.file == file and offset - last.end <= _GAP_BYTES
        if is_near and end - runs[-1][0].offset <= _RUN_BYTES:
            runs[-1].append(chunk)
        else:
            runs.append([chunk])
    return runs


def _read(directory: str, run: Sequence[_Chunk], scratch: Values) -> Values:
    """The bytes of a file from the first chunk of a run to the last."""
    begin, end = run[0].offset, max(each.end for each in run)
    data = scratch[: end - begin]
    into: Any = memoryview(data.data)
    got = 0
    try:
        with paths.open_to_read(f"{directory}/{run[0].file}") as file:
            while got < len(data):
                more = os.preadv(file.fileno(), [into[got:]], begin + got)
                if more == 0:
                    raise ValueError(f"{directory}/{run[0].file} ends within its chunk")
                got += more
    except (OSError, ValueError) as problem:
        place = next((each.place for each in run if each.end > begin + got), run[0].place)
        raise SmallArrayError(place, problem) from problem
    return data


def _take(plan: Plan, into: memoryview, some: Sequence[tuple[int, Any]]) -> None:
    """Checks each chunk, and puts its values where they belong."""
    for place, data in some:
        if google_crc32c.value(data) != RESIDUE:
            raise SmallArrayError(place, "the checksum of its chunk does not match")
        offset, size = plan.offsets[place], plan.sizes[place]
        into[offset : offset + size] = data[:size]
