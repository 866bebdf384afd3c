"""Reading once what several processes hold, and sending it to the others over the devices' own network.

The processes that hold the same pieces are a team. Each piece is read by one of its team; then the bytes of
all go through one sum over the team, to which every other member adds zeros. They are summed as whole
numbers: floats would lose the sign of -0.0. What is sent is the same in every process, so all programs are
run in the same order; whether all could read their part must be agreed on before the first is run.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ckptmgr.layout import Target
from ckptmgr.storage import arrays, devices
from ckptmgr.storage.chunks import Index, Values
from ckptmgr.structure import numpy_dtype

_BLOCK_BYTES = 64 << 20  # what one program sends
_LEAST_BYTES = 64 << 10  # blocks are powers of two from here on, so that few programs are compiled
Teams = tuple[tuple[int, ...], ...]


class _Piece(NamedTuple):
    where: Index
    shape: tuple[int, ...]
    team: tuple[int, ...]
    """The processes that hold it."""
    reader: int


class Shared:
    """The leaves that are read once; `leaves` are their places among all that are wanted."""

    def __init__(self, wanted: Sequence[arrays.Read], targets: Sequence[Target]) -> None:
        self._wanted = wanted
        self._pieces: dict[int, list[_Piece]] = {}
        self._read: dict[int, list[Values]] = {}
        load: collections.Counter[int] = collections.Counter()
        for place, (each, target) in enumerate(zip(wanted, targets, strict=True)):
            pieces = _pieces(each, target, load)
            if each.spec.kind != "str" and any(len(piece.team) > 1 for piece in pieces):
                self._pieces[place] = pieces

    @property
    def leaves(self) -> list[int]:
        """In an order in which those of the same teams are neighbours."""
        return sorted(self._pieces, key=lambda place: (_teams(self._pieces[place]), place))

    def read(self) -> None:
        """Reads what this process reads for its teams; raises DamagedArrayError."""
        here = jax.process_index()
        own = {
            place: self._wanted[place]._replace(pieces=[p.where for p in pieces if p.reader == here])
            for place, pieces in self._pieces.items()
        }
        self._read = dict(zip(own, arrays.read(list(own.values())), strict=True))

    def send(self, places: Sequence[int]) -> dict[int, list[Values]]:
        """Each of these leaves in the pieces that this process holds, in the order of `devices.pieces`."""
        found: dict[int, list[Values]] = {}
        by_teams: dict[Teams, list[int]] = {}
        for place in places:
            by_teams.setdefault(_teams(self._pieces[place]), []).append(place)
        for teams, together in by_teams.items():
            found |= self._send(teams, together)
        return found

    def _send(self, teams: Teams, places: Sequence[int]) -> dict[int, list[Values]]:
        here = jax.process_index()
        mine = next((team for team in teams if here in team), None)
        if mine is None:
            return {place: [] for place in places}
        sizes = {team: sum(self._nbytes(place, team) for place in places) for team in teams}
        buffer = np.zeros(max(sizes.values()), np.uint8)
        views = self._views(buffer, places, mine)
        for place in places:
            own = iter(self._read.pop(place))
            for piece, view in views[place]:
                if piece.reader == here:
                    view[...] = np.ascontiguousarray(next(own)).reshape(-1).view(np.uint8)
        _sum(buffer, teams)
        return {place: [_piece(self._wanted[place], *each) for each in views[place]] for place in places}

    def _nbytes(self, place: int, team: tuple[int, ...]) -> int:
        return sum(_nbytes(self._wanted[place], piece) for piece in self._pieces[place] if piece.team == team)

    def _views(
        self, buffer: Values, places: Sequence[int], team: tuple[int, ...]
    ) -> dict[int, list[tuple[_Piece, Values]]]:
        """Where each piece of the team lies in what is sent."""
        found: dict[int, list[tuple[_Piece, Values]]] = {}
        at = 0
        for place in places:
            rows: list[tuple[_Piece, Values]] = []
            found[place] = rows
            for piece in self._pieces[place]:
                if piece.team == team:
                    rows.append((piece, buffer[at : at + _nbytes(self._wanted[place], piece)]))
                    at += rows[-1][1].nbytes
        return found


def _pieces(each: arrays.Read, target: Target, load: collections.Counter[int]) -> list[_Piece]:
    """The distinct pieces of a leaf over all processes; each is read by the one with least to read so far."""
    if not devices.is_sharded(target):
        return []
    shape, holders = each.spec.shape, collections.defaultdict(set)
    indices: dict[Any, Index] = {}
    for device, index in target.place.devices_indices_map(shape).items():
        key = devices.spell(index, shape)
        holders[key].add(device.process_index)
        indices.setdefault(key, index)
    found = []
    for key, index in indices.items():
        team = tuple(sorted(holders[key]))
        reader = min(team, key=lambda process: (load[process], process))
        size = tuple(len(range(*axis)) for axis in key)
        found.append(_Piece(index, size, team, reader))
        load[reader] += _nbytes(each, found[-1])
    return found


def _nbytes(each: arrays.Read, piece: _Piece) -> int:
    return math.prod(piece.shape) * numpy_dtype(each.spec.dtype).itemsize


def _piece(each: arrays.Read, piece: _Piece, raw: Values) -> Values:
    return raw.view(numpy_dtype(each.spec.dtype)).reshape(piece.shape)


def _teams(pieces: Iterable[_Piece]) -> Teams:
    return tuple(sorted({piece.team for piece in pieces}))


def _sum(buffer: Values, teams: Teams) -> None:
    """Makes the buffers of each team the sum of them all, block by block."""
    for start in range(0, buffer.size, _BLOCK_BYTES):
        block = buffer[start : start + _BLOCK_BYTES]
        padded = np.zeros(max(_LEAST_BYTES, 1 << (block.size - 1).bit_length()), np.uint8)
        padded[: block.size] = block
        block[...] = _sum_block(padded.view(np.uint32), teams).view(np.uint8)[: block.size]


def _sum_block(words: Values, teams: Teams) -> Values:
    before, after = _shardings(teams)
    device = next(iter(before.addressable_devices))
    shape = (len(teams), len(teams[0]), words.size)
    row = jax.device_put(words[None, None], device)
    every = jax.make_array_from_single_device_arrays(shape, before, [row])
    summed: Values = np.asarray(_add(after)(every).addressable_shards[0].data)[0]
    return summed


@functools.cache
def _shardings(teams: Teams) -> tuple[NamedSharding, NamedSharding]:
    """One device of each process: a row of the members of each team, then what they share."""
    first: Mapping[int, Any] = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([[first[process] for process in team] for team in teams]), ("team", "member"))
    return NamedSharding(mesh, PartitionSpec("team", "member")), NamedSharding(mesh, PartitionSpec("team"))


@functools.cache
def _add(after: NamedSharding) -> Any:
    return jax.jit(lambda words: words.sum(axis=1, dtype=words.dtype), out_shardings=after)
