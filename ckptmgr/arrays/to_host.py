"""From the devices to the host, in one batch: how a tree is stored, and its copies."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ckptmgr.arrays import chunks, shares
from ckptmgr.arrays.chunks import BYTES_ALONE, Index, Stored, Values, chunk_shape, whole
from ckptmgr.arrays.shares import Piece, Unit
from ckptmgr.arrays.to_devices import spell
from ckptmgr.processes import agreement
from ckptmgr.specs import LeafSpec, TreeSpec
from ckptmgr.trees.structure import dtype_name, is_key, numpy_dtype

Part = tuple[Index, Values]
Take = Callable[[Any, bool], list[Part]]
"""Gives the pieces of a leaf that this process writes; told whether each process has a leaf of its own."""
Pieces = Sequence[tuple[int, Sequence[tuple[Index, Index]]]]
"""Of each local shard that is written here: where in the array a box is, and where in the shard; () is all."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """How the leaves of a tree are stored: the same for every step, so it is made once."""

    tree: TreeSpec
    stored: tuple[Stored, ...]
    shardings: tuple[Any, ...]
    starts: tuple[int, ...]
    """The leaves whose copy to the host has to be started: those on an accelerator."""
    takes: tuple[Take | None, ...] = ()
    """How each leaf comes to the host; None for most: one piece, which `np.asarray` gives."""

    @functools.cached_property
    def sizes(self) -> Sequence[int]:
        """The bytes of each leaf."""
        return [each.nbytes for each in self.stored]

    @functools.cached_property
    def encoded_sizes(self) -> Sequence[int]:
        """The bytes of each leaf that is encoded here; 0 for one that TensorStore encodes."""
        return [each.nbytes if each.is_direct() else 0 for each in self.stored]

    @functools.cached_property
    def prefixes(self) -> Sequence[str]:
        """What the keys of each leaf begin with."""
        return [chunks.prefix(leaf.name) for leaf in self.tree.leaves]

    @functools.cached_property
    def heads(self) -> Sequence[bytes | None]:
        """The `zarr.json` of each leaf, uncompressed; None if its chunks are too large to be encoded here."""
        return [chunks.zarr_json(each) if each.is_direct() else None for each in self.stored]

    @functools.cached_property
    def lines(self) -> Sequence[str]:
        """For each leaf what all processes must agree on: its path, a tab, and what it is."""
        return [
            f"{leaf.path}\t{_spell(leaf, at)}" for leaf, at in zip(self.tree.leaves, self.shardings, strict=True)
        ]

    @functools.cached_property
    def digest(self) -> str:
        return agreement.digest(json.dumps([self.lines, self.tree.outline]))

    @functools.cached_property
    def owners(self) -> Sequence[int]:
        """The process that holds each leaf, the lowest of several; -1 if every process has one."""
        return [-1 if at is None else min(_processes(at)) for at in self.shardings]


@functools.lru_cache(maxsize=64)  # a tree has few shardings, each of thousands of devices in a large job
def _processes(sharding: Any) -> frozenset[int]:
    return frozenset(device.process_index for device in sharding.device_set)


def _spell(leaf: LeafSpec, sharding: Any) -> str:
    """What a leaf is and where it lives; that of one process alone may be another in each process."""
    said = f"{leaf.kind} {leaf}" + " weak" * leaf.weak + f" {leaf.impl}" * bool(leaf.impl)
    if leaf.chunks is not None:
        said += f" in chunks of {list(leaf.chunks)}"
    if sharding is None or len(_processes(sharding)) == 1:
        return said
    partition = f" {leaf.partition}" if isinstance(sharding, jax.sharding.NamedSharding) else ""
    return f"{said}{partition} over {_devices(sharding)}"


@functools.lru_cache(maxsize=64)  # as above
def _devices(sharding: Any) -> str:
    """The axes of a mesh, and its devices in their order; without a mesh the devices alone."""
    mesh = sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None
    order = sharding.device_set if mesh is None else mesh.devices.flat
    ids = [device.id for device in order]
    where = f"{len(ids)} devices ({agreement.digest(str(ids if mesh else sorted(ids)))[:8]})"
    return where if mesh is None else f"{dict(mesh.shape)} of {where}"


class Planner:
    """Remembers the plan of each item, for as long as its structure stays the same."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._known: dict[str, tuple[TreeSpec, Plan]] = {}

    def plan(self, item: str, tree: TreeSpec, leaves: Sequence[Any]) -> Plan:
        known = self._known.get(item)
        if known is None or known[0] is not tree:
            known = self._known[item] = (tree, _plan(tree, leaves, self._chunk_bytes))
        return known[1]


def _plan(tree: TreeSpec, leaves: Sequence[Any], chunk_bytes: int) -> Plan:
    arrays = [_plain(leaf) for leaf in leaves]
    held = _held_by_several(arrays)
    most_bytes = shares.largest_chunk(list(held.values()), [_piece_nbytes(arrays[place]) for place in held])
    shared = {place for place, some in held.items() if any(len(piece.holders) > 1 for piece in some)}
    bounds = [min(chunk_bytes, most_bytes) if place in shared else chunk_bytes for place in range(len(arrays))]
    are_keys = [array is not leaf for array, leaf in zip(arrays, leaves, strict=True)]
    stored = tuple(map(_stored, arrays, bounds, are_keys))
    cut = tuple(
        spec._replace(chunks=None if each.chunks == whole(each.shape) else each.chunks)
        for spec, each in zip(tree.leaves, stored, strict=True)
    )
    shardings = tuple(getattr(array, "sharding", None) for array in arrays)
    takes = list(map(_take, arrays, leaves))
    for place, mine in shares.own(jax.process_index(), held, stored, most_bytes).items():
        takes[place] = _take_share(arrays[place], mine, is_key=are_keys[place])
    starts = tuple(
        place
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, jax.Array) and not _in_host_memory(leaf) and takes[place] is not _take_nothing
    )
    return Plan(dataclasses.replace(tree, leaves=cut), stored, shardings, starts, tuple(takes))


def _held_by_several(arrays: Sequence[Any]) -> dict[int, list[Piece]]:
    """The pieces of each array that more than one process has a part of; all processes must agree on these."""
    found, known = dict[int, list[Piece]](), dict[Any, list[Piece]]()
    for place, array in enumerate(arrays) if jax.process_count() > 1 else ():
        sharding = getattr(array, "sharding", None)
        if sharding is not None and len(_processes(sharding)) > 1:
            key = sharding, array.shape
            found[place] = known[key] if key in known else known.setdefault(key, shares.pieces(*key))
    return found


def _piece_nbytes(array: Any) -> int:
    shape: tuple[int, ...] = array.sharding.shard_shape(array.shape)
    return math.prod(shape) * int(array.dtype.itemsize)


def _in_host_memory(array: jax.Array) -> bool:
    """On the CPU the host's view of an array is the array."""
    return is_key(array) or next(iter(array.sharding.device_set)).platform == "cpu"  # type: ignore[attr-defined]


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if isinstance(leaf, jax.Array) and is_key(leaf) else leaf


def _stored(array: Any, chunk_bytes: int, is_key: bool) -> Stored:
    """How an array lies on disk; the words of a key stay together."""
    shape = np.shape(array)
    on_device = isinstance(array, jax.Array)
    shard = array.sharding.shard_shape(shape) if on_device else shape
    dtype = array.dtype if on_device else np.asarray(array).dtype
    name = "uint8" if dtype_name(dtype) in BYTES_ALONE else dtype_name(dtype)
    words = shape[-1:] if is_key else ()
    cut, itemsize = len(shape) - len(words), dtype.itemsize * math.prod(words)
    return Stored(shape, name, chunk_shape(shape[:cut], shard[:cut], itemsize, chunk_bytes) + words)


def start_copies(plan: Plan, leaves: Sequence[Any], places: Sequence[int]) -> None:
    """Starts the copies of these leaves to the host; returns at once."""
    wanted = places if isinstance(places, range) else frozenset(places)
    with _asked_for():
        for place in plan.starts:
            if place in wanted:
                leaves[place].copy_to_host_async()


def _asked_for() -> Any:
    """A save asks for its copies, as `jax.device_get` does; jax_transfer_guard="disallow" is about others."""
    return jax.transfer_guard_device_to_host("allow")


def collect(plan: Plan, leaves: Sequence[Any], places: Sequence[int], *, is_own: bool = False) -> list[list[Part]]:
    """Waits for the copies of these leaves: for each the pieces that this process writes.

    The values are those of this moment whatever the caller does to the arrays afterwards: numpy
    arrays are copied, and of a jax array a reference is held, so that one that is donated is copied
    by JAX instead of overwritten. Of numpy arrays those of process 0 are written, unless each process has
    its own.
    """
    takes = plan.takes
    with _asked_for():  # a loop without calls: there are thousands of leaves, and the caller waits
        return [
            take(leaves[place], is_own) if (take := takes[place]) else [((), np.asarray(leaves[place]))]
            for place in places
        ]


def _take(array: Any, leaf: Any) -> Take | None:
    """How a leaf comes to the host, whose words `array` holds if it is a key."""
    sharding = getattr(array, "sharding", None)
    if sharding is None:
        return _take_numpy if jax.process_index() == 0 else _take_own_numpy
    if jax.process_index() not in _processes(sharding):
        return _take_nothing
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return _take_key if array is not leaf else _take_bytes if array.dtype in _BYTES_ALONE else None
    pieces = [
        (n, [(shard.index, ())]) for n, shard in enumerate(array.addressable_shards) if shard.replica_id == 0
    ]
    return functools.partial(_take_pieces if array is leaf else _take_pieces_of_key, pieces)


def _take_share(array: Any, mine: Sequence[Unit], *, is_key: bool) -> Take:
    """How the units of an array that this process writes come to the host."""
    if not mine:
        return _take_nothing
    shards = {spell(shard.index, array.shape): n for n, shard in reversed([*enumerate(array.addressable_shards)])}
    boxes: dict[int, list[tuple[Index, Index]]] = {}
    for unit in mine:
        boxes.setdefault(shards[spell(unit.piece, array.shape)], []).append((unit.where, unit.inside))
    return functools.partial(_take_pieces_of_key if is_key else _take_pieces, [*boxes.items()])


def _take_numpy(leaf: Any, is_own: bool) -> list[Part]:
    return [((), _as_bytes(np.array(leaf, order="C")))]


def _take_own_numpy(leaf: Any, is_own: bool) -> list[Part]:
    return _take_numpy(leaf, is_own) if is_own else []


def _take_nothing(leaf: Any, is_own: bool) -> list[Part]:
    return []


def _take_bytes(leaf: Any, is_own: bool) -> list[Part]:
    return [((), _as_bytes(np.asarray(leaf)))]


def _take_key(leaf: Any, is_own: bool) -> list[Part]:
    return [((), np.asarray(jax.random.key_data(leaf)))]


def _take_pieces(pieces: Pieces, leaf: Any, is_own: bool) -> list[Part]:
    return [
        (index, piece[inside] if inside else piece)
        for n, boxes in pieces
        for piece in [_as_bytes(np.asarray(leaf.addressable_data(n)))]
        for index, inside in boxes
    ]


def _take_pieces_of_key(pieces: Pieces, leaf: Any, is_own: bool) -> list[Part]:
    return _take_pieces(pieces, jax.random.key_data(leaf), is_own)


_BYTES_ALONE = frozenset(map(numpy_dtype, BYTES_ALONE))


def _as_bytes(array: Values) -> Values:
    return array.view(np.uint8) if array.dtype in _BYTES_ALONE else array
