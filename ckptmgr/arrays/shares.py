"""Who writes what where several processes hold the same: each piece is written once, and the work is shared.

Each process finds the same shares, from shapes and shardings alone: nothing is asked, and no program runs on a
device. A piece that is larger than a tenth of a fair share is cut between its chunks.
"""

from __future__ import annotations

import collections
import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ckptmgr.arrays import chunks
from ckptmgr.arrays.chunks import Index, Stored
from ckptmgr.arrays.to_devices import spell
from ckptmgr.trees.structure import numpy_dtype

_PARTS = 10  # of a fair share: no process then writes more than 1.1 of it
_LEAST_BYTES = 64 << 10  # smaller chunks cost more than an equal share saves


class Piece(NamedTuple):
    """A piece of an array, and the processes that hold it, in order."""

    at: Index
    holders: tuple[int, ...]


class Unit(NamedTuple):
    """What one process writes at once: a piece, or a box of its chunks; `inside` is where in the piece it is."""

    leaf: int
    piece: Index
    inside: Index
    nbytes: int
    holders: tuple[int, ...]

    @property
    def where(self) -> Index:
        """Where in the array it is."""
        if not self.inside:
            return self.piece
        starts = [axis.start or 0 for axis in self.piece]
        return tuple(
            slice(start + part.start, start + part.stop) for start, part in zip(starts, self.inside, strict=True)
        )


def pieces(sharding: Any, shape: tuple[int, ...]) -> list[Piece]:
    """The distinct pieces of an array, in the order of its devices."""
    indices, holders = dict[Any, Index](), collections.defaultdict[Any, set[int]](set)
    for device, index in sharding.devices_indices_map(shape).items():
        spelled = spell(index, shape)
        indices.setdefault(spelled, index)
        holders[spelled].add(device.process_index)
    return [Piece(index, tuple(sorted(holders[spelled]))) for spelled, index in indices.items()]


def largest_chunk(held: Sequence[Sequence[Piece]], nbytes: Sequence[int]) -> int:
    """How large a chunk of what several processes hold may be; `nbytes` are those of a piece of each leaf."""
    load = collections.defaultdict[int, float](float)
    for some, size in zip(held, nbytes, strict=True):
        for piece in some:
            for process in piece.holders:
                load[process] += size / len(piece.holders)
    return max(_LEAST_BYTES, int(max(load.values(), default=0.0)) // _PARTS)


def units(leaf: int, held: Sequence[Piece], stored: Stored, most_bytes: int) -> Iterator[Unit]:
    """What of a leaf may be written by itself."""
    itemsize = numpy_dtype(stored.dtype).itemsize
    for piece in held:
        shape = _shape(piece.at, stored.shape)
        if len(piece.holders) == 1 or math.prod(shape) * itemsize <= most_bytes:
            yield Unit(leaf, piece.at, (), math.prod(shape) * itemsize, piece.holders)
            continue
        for box in chunks.boxes(piece.at, shape, stored.chunks, 1):
            size = math.prod(axis.stop - axis.start for axis in box) * itemsize
            yield Unit(leaf, piece.at, box, size, piece.holders)


def _shape(index: Index, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(len(range(*axis.indices(size))) for axis, size in zip(index, shape, strict=True))


def assign(work: Sequence[Unit]) -> list[int]:
    """The process that writes each unit: the largest first, each to the holder that has least to write so far."""
    load = collections.Counter[int]()
    writers = [0] * len(work)
    queues: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    order = sorted(range(len(work)), key=lambda n: (len(work[n].holders) > 1, -work[n].nbytes, n))
    for n in order:
        queue = queues.setdefault(work[n].holders, [(0, process) for process in work[n].holders])
        while queue[0][0] != load[queue[0][1]]:  # what it has got through another queue meanwhile
            heapq.heapreplace(queue, (load[queue[0][1]], queue[0][1]))
        writers[n] = queue[0][1]
        load[writers[n]] += work[n].nbytes
        heapq.heapreplace(queue, (load[writers[n]], writers[n]))
    return writers
