"""Reading once what several processes hold, and sending it to the others over the devices' own network.

Along the axes of a mesh that a leaf's PartitionSpec does not name, the devices hold copies of it. One of the
copies is read, each of its pieces by the process that has the device. Then the bytes go through one sum along
these axes, to which every other copy adds zeros: as whole numbers, as floats would lose the sign of -0.0.
Every process runs the same programs in the same order; whether all could read must be agreed on before the first
that sends what was read. A program waits for all processes, and JAX has no bound for it: the caller of this module
runs it.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ckptmgr.arrays import chunks, reading, to_devices
from ckptmgr.arrays.chunks import Index, Values
from ckptmgr.arrays.progress import Meter
from ckptmgr.trees.layouts import Target
from ckptmgr.trees.structure import numpy_dtype

_BLOCK_BYTES = 64 << 20  # what one program sends to a device
_LEAST_BYTES = 64 << 10  # blocks are powers of two from here on, so that few programs are compiled
_TIMES = 12
"""How often a piece is held on its way: read, sent, summed, received, in blocks of up to twice its size."""
Spelled = tuple[tuple[int, int, int], ...]
Sums = dict[Any, Values]
"""By device."""
Runner = Callable[[Callable[[], Sums]], Sums]
"""Runs a program of several processes; raises if it does not end."""
Sent = dict[Any, list[tuple[slice, Values]]]
"""By device: the bytes of pieces, and where among those of all leaves they are."""


class _Copies(NamedTuple):
    """Where the copies of a leaf are: a mesh, with an axis of copies and one of pieces."""

    mesh: Mesh

    @property
    def here(self) -> list[tuple[int, Any]]:
        """Which copy each device of this process belongs to."""
        return [(copy, device) for (copy, _), device in self._local]

    @property
    def receivers(self) -> Collection[Any]:
        """A device of this process for each piece that it holds."""
        return {column: device for (_, column), device in self._local}.values()

    @property
    def _local(self) -> list[tuple[tuple[int, ...], Any]]:
        here = jax.process_index()
        return [(at, each) for at, each in np.ndenumerate(self.mesh.devices) if each.process_index == here]

    @property
    def times(self) -> int:
        """What the busiest process holds for each byte of a piece: each of its devices sends and receives it."""
        return _TIMES * max(collections.Counter(each.process_index for each in self.mesh.devices.flat).values())


class Shared:
    """The leaves that are read once; `leaves` are their places among all that are wanted.

    At most `most_bytes` are held at once, or what one leaf and the smallest block take.
    """

    def __init__(
        self,
        wanted: Sequence[reading.Read],
        sources: Sequence[reading.Source],
        targets: Sequence[Target],
        run: Runner,
        most_bytes: int | None,
        is_local: bool,
    ) -> None:
        self._wanted, self._sources, self._targets, self._run = wanted, sources, targets, run
        self._most_bytes, self._is_local = most_bytes, is_local
        self._copies = {place: found for place, target in enumerate(targets) if (found := _copies(target))}
        self._chosen: dict[int, int] = {}
        """The copy of each leaf that is read: the one with least to read so far."""
        self._read: dict[int, dict[Spelled, Values]] = {}
        load: collections.Counter[tuple[_Copies, int]] = collections.Counter()
        for place, copies in self._copies.items():
            count = copies.mesh.devices.shape[0]
            self._chosen[place] = min(range(count), key=lambda copy: (load[copies, copy], copy))
            load[copies, self._chosen[place]] += self._nbytes(place)

    @property
    def leaves(self) -> list[int]:
        """In an order in which those of the same mesh are neighbours."""
        order = {copies: number for number, copies in enumerate(dict.fromkeys(self._copies.values()))}
        return sorted(self._copies, key=lambda place: (order[self._copies[place]], place))

    def cut(self) -> list[Sequence[int]]:
        """The leaves, as many at a time as may be read and sent at once: in all processes the same."""
        leaves = self.leaves
        held = [self._nbytes(place) * self._copies[place].times for place in leaves]
        return [[leaves[n] for n in run] for run in chunks.runs(held, self._most_bytes)] if leaves else []

    def nbytes_read_here(self) -> int:
        """Bytes of what this process reads for all."""
        own = ((place, list(self._pieces_read_here(place).values())) for place in self._copies)
        return sum(self._wanted[place]._replace(pieces=pieces).nbytes for place, pieces in own)

    def read(self, places: Sequence[int], openers: Sequence[reading.Opener], meter: Meter | None) -> None:
        """Reads what this process reads of these leaves for all; raises DamagedArrayError."""
        pieces = {place: self._pieces_read_here(place) for place in places}
        wanted = [self._wanted[place]._replace(pieces=list(own.values())) for place, own in pieces.items()]
        plan = reading.Plan(wanted, self._sources, is_local=self._is_local, most_bytes=self._most_bytes)
        for (place, own), values in zip(pieces.items(), reading.read(plan, openers, meter), strict=True):
            self._read[place] = dict(zip(own, values, strict=True))

    def _pieces_read_here(self, place: int) -> dict[Spelled, Index]:
        chosen, shape = self._chosen[place], self._wanted[place].spec.shape
        where = self._targets[place].place.devices_indices_map(shape)
        own = [where[device] for copy, device in self._copies[place].here if copy == chosen]
        return {to_devices.spell(index, shape): index for index in own}

    def send(self, places: Sequence[int]) -> dict[int, list[Values]]:
        """Each of these leaves in the pieces that this process holds, in the order of `to_devices.pieces`."""
        found: dict[int, list[Values]] = {}
        together: dict[_Copies, list[int]] = {}
        for place in places:
            together.setdefault(self._copies[place], []).append(place)
        for copies, group in together.items():
            for run in chunks.runs([self._nbytes(place) for place in group], _BLOCK_BYTES):
                found |= self._send(copies, [group[each] for each in run])
        return found

    def _send(self, copies: _Copies, places: Sequence[int]) -> dict[int, list[Values]]:
        if not copies.here:
            return {place: [] for place in places}
        sizes = [self._nbytes(place) for place in places]
        spans = [slice(end - size, end) for end, size in zip(np.cumsum(sizes), sizes, strict=True)]
        sent: Sent = {device: [] for _, device in copies.here}
        for place, span in zip(places, spans, strict=True):
            read = self._read.pop(place)
            for copy, device in copies.here:
                if copy == self._chosen[place]:
                    piece = read[self._spelled(place, device)]
                    sent[device].append((span, np.ascontiguousarray(piece).reshape(-1).view(np.uint8)))
        came = _sum(copies, sent, sum(sizes), self._block_bytes(copies), self._run)
        return {place: self._pieces(place, span, came) for place, span in zip(places, spans, strict=True)}

    def _pieces(self, place: int, span: slice, came: Sums) -> list[Values]:
        dtype, shape = numpy_dtype(self._wanted[place].spec.dtype), self._piece_shape(place)
        by_index = {self._spelled(place, device): data[span] for device, data in came.items()}
        wanted = to_devices.pieces(self._wanted[place].spec.shape, self._targets[place])
        spelled = [to_devices.spell(index, self._wanted[place].spec.shape) for index in wanted]
        return [by_index[each].view(dtype).reshape(shape) for each in spelled]

    def _block_bytes(self, copies: _Copies) -> int:
        """A power of two, as are the sizes of programs."""
        if self._most_bytes is None:
            return _BLOCK_BYTES
        return min(_BLOCK_BYTES, max(_LEAST_BYTES, 1 << (self._most_bytes // copies.times).bit_length() - 1))

    def _spelled(self, place: int, device: Any) -> Spelled:
        shape = self._wanted[place].spec.shape
        return to_devices.spell(self._targets[place].place.devices_indices_map(shape)[device], shape)

    def _piece_shape(self, place: int) -> tuple[int, ...]:
        return tuple(self._targets[place].place.shard_shape(self._wanted[place].spec.shape))

    def _nbytes(self, place: int) -> int:
        return math.prod(self._piece_shape(place)) * numpy_dtype(self._wanted[place].spec.dtype).itemsize


def _copies(target: Target) -> _Copies | None:
    """Where the copies of a leaf are; None if no two processes hold the same of it."""
    place = target.place
    if not to_devices.is_sharded(target) or not isinstance(place, NamedSharding):
        return None
    entries = getattr(place.spec, "partitions", place.spec)
    named = {axis for entry in entries for axis in (entry if isinstance(entry, tuple) else (entry,))}
    axes = [number for number, axis in enumerate(place.mesh.axis_names) if axis not in named]
    grid = np.moveaxis(place.mesh.devices, axes, range(len(axes)))
    grid = grid.reshape(math.prod(grid.shape[: len(axes)]), -1)
    holders = [{device.process_index for device in column} for column in grid.T]
    return _Copies(Mesh(grid, ("copy", "piece"))) if any(len(held) > 1 for held in holders) else None


def _sum(copies: _Copies, sent: Sent, nbytes: int, block_bytes: int, run: Runner) -> Sums:
    """The sums of what the copies of each piece have sent, on a device for each piece."""
    came = {device: chunks.aligned((nbytes,), np.dtype(np.uint8)) for device in copies.receivers}
    for start in range(0, nbytes, block_bytes):
        block = slice(start, min(nbytes, start + block_bytes))
        words = {device: _words(parts, block) for device, parts in sent.items()}
        summed = run(functools.partial(_sum_block, copies.mesh, words))
        for device, values in came.items():
            values[block] = summed[device][: block.stop - block.start]
    return came


def _words(parts: Sequence[tuple[slice, Values]], block: slice) -> Values:
    """What a device sends of a block: zeros where it has nothing."""
    size = block.stop - block.start
    words = np.zeros(max(_LEAST_BYTES, 1 << (size - 1).bit_length()), np.uint8)
    for span, data in parts:
        first, last = max(span.start, block.start), min(span.stop, block.stop)
        if first < last:
            words[first - block.start : last - block.start] = data[first - span.start : last - span.start]
    return words


def _sum_block(mesh: Mesh, words: dict[Any, Values]) -> Sums:
    before = NamedSharding(mesh, PartitionSpec("copy", "piece"))
    rows = jax.device_put([data.view(np.uint32)[None, None] for data in words.values()], list(words))
    shape = (*mesh.devices.shape, rows[0].size)
    summed = _add(mesh)(jax.make_array_from_single_device_arrays(shape, before, rows))
    shards = summed.addressable_shards
    found = jax.device_get([shard.data for shard in shards])
    return {shard.device: data[0].view(np.uint8) for shard, data in zip(shards, found, strict=True)}


@functools.cache
def _add(mesh: Mesh) -> Any:
    after = NamedSharding(mesh, PartitionSpec("piece"))
    return jax.jit(lambda words: words.sum(axis=0, dtype=words.dtype), out_shardings=after)
