"""From the devices to the host, and from the host onto the devices; each way in one batch."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ckptmgr import job
from ckptmgr.layout import HERE, Target
from ckptmgr.storage import chunks, stock
from ckptmgr.storage.chunks import BYTES_ALONE, Index, Stored, Values, chunk_shape, whole
from ckptmgr.structure import LeafSpec, TreeSpec, dtype_name, is_key, numpy_dtype, weaken

Part = tuple[Index, Values]


# ---------------------------------------------------------------- to the host


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the leaves of a tree are stored: the same for every step, so it is made once."""

    tree: TreeSpec
    stored: tuple[Stored, ...]
    shardings: tuple[Any, ...]
    starts: tuple[int, ...]
    """The leaves whose copy to the host has to be started: those on an accelerator."""

    @functools.cached_property
    def prefixes(self) -> Sequence[str]:
        """What the keys of each leaf begin with."""
        return [chunks.prefix(leaf.name) for leaf in self.tree.leaves]

    @functools.cached_property
    def heads(self) -> Sequence[bytes | None]:
        """The `zarr.json` of each leaf, uncompressed; None if its chunks are too large to be encoded here."""
        return [chunks.zarr_json(each) if each.is_direct() else None for each in self.stored]

    @functools.cached_property
    def files(self) -> Mapping[str, bytes]:
        """Orbax's own files about the leaves."""
        shapes, cuts = [each.shape for each in self.stored], [each.chunks for each in self.stored]
        return stock.describe(self.tree, shapes, cuts, self.shardings)

    @functools.cached_property
    def lines(self) -> Sequence[str]:
        """For each leaf what all processes must agree on: its path, a tab, and what it is."""
        return [
            f"{leaf.path}\t{_spell(leaf, at)}" for leaf, at in zip(self.tree.leaves, self.shardings, strict=True)
        ]

    @functools.cached_property
    def digest(self) -> str:
        return job.digest(json.dumps([self.lines, self.tree.outline]))

    @functools.cached_property
    def owners(self) -> Sequence[int]:
        """The process that holds each leaf, the lowest of several; -1 if every process has one."""
        return [-1 if at is None else min(_processes(at)) for at in self.shardings]


def _processes(sharding: Any) -> set[int]:
    return {device.process_index for device in sharding.device_set}


def _spell(leaf: LeafSpec, sharding: Any) -> str:
    """What a leaf is and where it lives; that of one process alone may be another in each process."""
    said = f"{leaf.kind} {leaf}" + " weak" * leaf.weak + f" {leaf.impl}" * bool(leaf.impl)
    if leaf.chunks is not None:
        said += f" in chunks of {list(leaf.chunks)}"
    if sharding is None or len(_processes(sharding)) == 1:
        return said
    mesh = sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None
    order = sharding.device_set if mesh is None else mesh.devices.flat
    ids = [device.id for device in order]
    where = f"{len(ids)} devices ({job.digest(str(ids if mesh else sorted(ids)))[:8]})"
    return (
        f"{said} {leaf.partition} over {dict(mesh.shape)} of {where}"
        if mesh is not None
        else f"{said} over {where}"
    )


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
    stored = tuple(_stored(array, chunk_bytes) for array in arrays)
    cut = tuple(
        spec._replace(chunks=None if each.chunks == whole(each.shape) else each.chunks)
        for spec, each in zip(tree.leaves, stored, strict=True)
    )
    shardings = tuple(getattr(array, "sharding", None) for array in arrays)
    starts = tuple(
        place for place, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and not _in_host_memory(leaf)
    )
    return Plan(dataclasses.replace(tree, leaves=cut), stored, shardings, starts)


def _in_host_memory(array: jax.Array) -> bool:
    """On the CPU the host's view of an array is the array."""
    return is_key(array) or next(iter(array.sharding.device_set)).platform == "cpu"  # type: ignore[attr-defined]


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if isinstance(leaf, jax.Array) and is_key(leaf) else leaf


def _stored(array: Any, chunk_bytes: int) -> Stored:
    shape = np.shape(array)
    on_device = isinstance(array, jax.Array)
    shard = array.sharding.shard_shape(shape) if on_device else shape
    dtype = array.dtype if on_device else np.asarray(array).dtype
    name = "uint8" if dtype_name(dtype) in BYTES_ALONE else dtype_name(dtype)
    return Stored(shape, name, chunk_shape(shape, shard, dtype.itemsize, chunk_bytes))


def start_copies(plan: Plan, leaves: Sequence[Any], places: range) -> None:
    """Starts the copies of these leaves to the host; returns at once."""
    with _asked_for():
        for place in plan.starts:
            if place in places:
                leaves[place].copy_to_host_async()


def _asked_for() -> Any:
    """A save asks for its copies, as `jax.device_get` does; jax_transfer_guard="disallow" is about others."""
    return jax.transfer_guard_device_to_host("allow")


def collect(plan: Plan, leaves: Sequence[Any], places: range, *, is_own: bool = False) -> list[list[Part]]:
    """Waits for the copies of these leaves: for each the pieces that this process writes.

    The values are those of this moment whatever the caller does to the arrays afterwards: numpy
    arrays are copied, and of a jax array a reference is held, so that one that is donated is copied
    by JAX instead of overwritten. Of numpy arrays those of process 0 are written, unless each process has
    its own.
    """
    with _asked_for():
        return [_parts(leaves[place], plan.shardings[place], is_own) for place in places]


def _parts(leaf: Any, sharding: Any, is_own: bool) -> list[Part]:
    if sharding is None:
        is_wanted = is_own or jax.process_index() == 0
        return [((), _as_bytes(np.array(leaf, order="C")))] if is_wanted else []
    if jax.process_index() not in _processes(sharding):
        return []
    array = _plain(leaf)
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return [((), _as_bytes(np.asarray(array)))]
    return [(shard.index, _as_bytes(np.asarray(shard.data))) for shard in _written_here(array)]


def _written_here(array: jax.Array) -> list[Any]:
    """The pieces of an array that this process writes: the holder of its first replica writes a piece."""
    return [shard for shard in array.addressable_shards if shard.replica_id == 0]


_BYTES_ALONE = frozenset(map(numpy_dtype, BYTES_ALONE))


def _as_bytes(array: Values) -> Values:
    return array.view(np.uint8) if array.dtype in _BYTES_ALONE else array


# ---------------------------------------------------------------- onto the devices


def pieces(shape: tuple[int, ...], target: Target) -> Sequence[Index]:
    """The distinct pieces of an array that this process's devices hold; () is all of it."""
    if not is_sharded(target):
        return ((),)
    indices = target.place.addressable_devices_indices_map(shape).values()
    return tuple({spell(index, shape): index for index in indices}.values())


def is_sharded(target: Target) -> bool:
    """Whether the pieces go to devices one by one; keys are made whole, then spread."""
    if not isinstance(target.place, jax.sharding.Sharding) or target.kind != "jax":
        return False
    return len(target.place.device_set) > 1 or not target.place.is_fully_addressable


def spell(index: Index, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    return tuple(axis.indices(size) for axis, size in zip(index, shape, strict=True))


def place(
    values: Sequence[Sequence[Values]], shapes: Sequence[tuple[int, ...]], targets: Sequence[Target]
) -> list[Any]:
    """The leaves as their targets want them; all that goes to devices goes in one call."""
    rows = list(zip(values, shapes, targets, strict=True))
    moving = [_moves([_cast(piece, target) for piece in read], shape, target) for read, shape, target in rows]
    free = [array for moves in moving for array, where in moves if where is HERE]
    bound = [move for moves in moving for move in moves if move[1] is not HERE]
    here = iter(jax.device_put(free))
    there = iter(jax.device_put([array for array, _ in bound], [where for _, where in bound]))
    leaves = [
        _finish([next(here if where is HERE else there) for _, where in moves], *row)
        for moves, row in zip(moving, rows, strict=True)
    ]
    return _weakly_typed(leaves, targets)


def _cast(piece: Values, target: Target) -> Values:
    unchanged = target.kind == "key" or dtype_name(piece.dtype) == target.dtype
    return piece if unchanged else piece.astype(numpy_dtype(target.dtype))


def _moves(read: Sequence[Values], shape: tuple[int, ...], target: Target) -> list[tuple[Values, Any]]:
    """Each array of a leaf that goes to a device, and where to."""
    if target.kind not in ("jax", "key"):
        return []
    if not is_sharded(target):
        alone = isinstance(target.place, jax.sharding.Sharding) and target.kind == "jax"
        return [(read[0], target.place if alone else HERE)]
    by_index = dict(zip((spell(index, shape) for index in pieces(shape, target)), read, strict=True))
    kind = target.place.memory_kind
    return [
        (by_index[spell(index, shape)], jax.sharding.SingleDeviceSharding(device, memory_kind=kind))
        for device, index in target.place.addressable_devices_indices_map(shape).items()
    ]


_PYTHON: Mapping[str, Callable[[Any], Any]] = {
    "int": int, "float": float, "bool": bool, "complex": complex, "str": str,
}  # fmt: skip


def _finish(arrived: Sequence[jax.Array], read: Sequence[Values], shape: tuple[int, ...], target: Target) -> Any:
    """One leaf, of what was read and of what has arrived on the devices."""
    if target.kind in _PYTHON:
        return _PYTHON[target.kind](read[0][()])
    if target.kind == "scalar":
        return _cast(read[0], target)[()]
    if target.kind == "numpy":
        value = _cast(read[0], target)
        return value if value.flags.writeable else value.copy()
    if target.kind == "key":
        return _keys(arrived[0], read[0], target)
    if is_sharded(target):
        dtype = numpy_dtype(target.dtype)
        return jax.make_array_from_single_device_arrays(shape, target.place, list(arrived), dtype=dtype)
    return arrived[0]


def _keys(here: jax.Array, words: Values, target: Target) -> Any:
    """Typed keys of their words, which are here as a whole; each process puts its part where it belongs."""
    place = target.place
    if isinstance(place, jax.sharding.NamedSharding) and not place.is_fully_addressable:
        everywhere = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec())
        spread = jax.make_array_from_callback(words.shape, everywhere, words.__getitem__)
        wrap = functools.partial(jax.random.wrap_key_data, impl=target.impl)
        return jax.jit(wrap, out_shardings=place)(spread)
    keys = jax.random.wrap_key_data(here, impl=target.impl)
    return jax.device_put(keys, place) if isinstance(place, jax.sharding.Sharding) else keys


_NO_MESH = jax.sharding.Mesh(np.empty((), object), ())


def _weakly_typed(leaves: list[Any], targets: Sequence[Target]) -> list[Any]:
    """The same bits, with JAX's weak type where it was saved: one program for the leaves of each mesh.

    A program runs on the mesh of `jax.set_mesh`, and takes no arrays of another: each has the mesh of its leaves.
    One leaf that is committed to its device would commit all results of its program.
    """
    groups: dict[Any, list[int]] = {}
    for place, target in enumerate(targets):
        if target.weak and target.kind == "jax":
            sharding = leaves[place].sharding
            group = getattr(sharding, "mesh", sharding), leaves[place].committed
            groups.setdefault(group, []).append(place)
    with jax.debug_nans(False), jax.debug_infs(False):  # a leaf may hold them: nothing is computed here
        for (where, _), places in groups.items():
            strong = [leaves[place] for place in places]
            with jax.set_mesh(where if isinstance(where, jax.sharding.Mesh) else _NO_MESH):
                weakened = weaken([_in_default_memory(array) for array in strong])
            for place, array, weak in zip(places, strong, weakened, strict=True):
                leaves[place] = jax.device_put(weak, array.sharding) if array.committed else weak
    return leaves


def _in_default_memory(array: jax.Array) -> jax.Array:
    """Programs do not compute on arrays that are kept in the memory of the host."""
    kind = next(iter(array.devices())).default_memory().kind
    sharding = array.sharding
    return array if sharding.memory_kind == kind else jax.device_put(array, sharding.with_memory_kind(kind))
