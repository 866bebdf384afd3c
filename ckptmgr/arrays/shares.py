"""Who writes what where several processes hold the same: each piece is written once, and the work is shared.

Each process finds the same shares, from shapes and shardings alone: nothing is asked, and no program runs on a
device. A piece that is larger than a tenth of a fair share is cut between its chunks.
"""

from __future__ import annotations

import collections
import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
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
    for leaves in _alike(enumerate(held)):
        size = sum(nbytes[leaf] for leaf in leaves)
        for piece in held[leaves[0]]:
            for process in piece.holders:
                load[process] += size / len(piece.holders)
    return max(_LEAST_BYTES, int(max(load.values(), default=0.0)) // _PARTS)


def _alike(held: Iterable[tuple[int, Sequence[Piece]]]) -> Iterable[list[int]]:
    """The leaves that have one and the same list of pieces, those of one sharding and shape.

    A leaf may have thousands of pieces, and a model thousands of leaves: no piece is looked at for each leaf.
    """
    found: dict[int, list[int]] = {}
    for leaf, some in held:
        found.setdefault(id(some), []).append(leaf)
    return found.values()


def own(
    process: int, held: Mapping[int, Sequence[Piece]], stored: Sequence[Stored], most_bytes: int
) -> dict[int, list[Unit]]:
    """What a process writes of each leaf that several processes hold a part of."""
    load, several, mine = collections.Counter[int](), list[Unit](), dict[int, list[Unit]]()
    for leaves in _alike(held.items()):
        some, shape = held[leaves[0]], stored[leaves[0]].shape
        itemsize = sum(numpy_dtype(stored[leaf].dtype).itemsize for leaf in leaves)
        for piece in some:
            if len(piece.holders) == 1:  # nobody else can write it
                load[piece.holders[0]] += math.prod(_shape(piece.at, shape)) * itemsize
        alone, together = _split(process, some)
        for leaf in leaves:
            mine[leaf] = list(units(leaf, alone, stored[leaf], most_bytes))
            several += units(leaf, together, stored[leaf], most_bytes)
    several.sort(key=lambda unit: unit.leaf)  # in all processes alike, whichever lists are one in each
    for unit, writer in zip(several, assign(several, load), strict=True):
        if writer == process:
            mine[unit.leaf].append(unit)
    return mine


def _split(process: int, some: Sequence[Piece]) -> tuple[list[Piece], list[Piece]]:
    """The pieces that this process alone holds, and those that several hold."""
    return (
        [piece for piece in some if piece.holders == (process,)],
        [piece for piece in some if len(piece.holders) > 1],
    )


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


def assign(work: Sequence[Unit], load: Mapping[int, int] = MappingProxyType({})) -> list[int]:
    """The process that writes each unit: the largest first, each to the holder that has least to write so far.

    `load` has the bytes that a process has to write beside these.
    """
    total = collections.Counter(load)
    writers = [0] * len(work)
    queues: dict[int, list[tuple[int, int]]] = {}  # by identity: to compare holders takes as long as they are many
    order = sorted(range(len(work)), key=lambda n: (len(work[n].holders) > 1, -work[n].nbytes, n))
    for n in order:
        holders = work[n].holders
        if id(holders) not in queues:
            queues[id(holders)] = sorted((total[process], process) for process in holders)
        queue = queues[id(holders)]
        while queue[0][0] != total[queue[0][1]]:  # what it has got through another queue meanwhile
            heapq.heapreplace(queue, (total[queue[0][1]], queue[0][1]))
        writers[n] = queue[0][1]
        total[writers[n]] += work[n].nbytes
        heapq.heapreplace(queue, (total[writers[n]], writers[n]))
    return writers
