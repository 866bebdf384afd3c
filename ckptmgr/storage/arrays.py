"""Arrays to disk and back: one TensorStore transaction for an item, every chunk with its checksum.

An item's arrays are zarr3 in one OCDBT database, as Orbax reads them. Nothing here waits leaf by leaf:
a save starts every copy to the host, then collects them; its writer opens every array in one
transaction and commits once. A restore opens all, reads all, and puts all on the devices in one call.

The checksums: each chunk carries zarr's `crc32c` codec; OCDBT's manifest and nodes carry their own
(https://google.github.io/tensorstore/kvstore/ocdbt/index.html); the small `zarr.json` of each array is
stored inside a node (`max_inline_value_bytes`), so that it is covered too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tensorstore as ts
from etils import epath

from ckptmgr.layout import HERE, Target
from ckptmgr.storage import files, stock
from ckptmgr.structure import LeafSpec, TreeSpec, is_key

_INLINE_BYTES = 4096  # larger than any zarr.json, so that each lies in a checksummed node
_STORED_AS_BYTES = frozenset({"uint2", "uint4", "float8_e4m3", "float6_e2m3fn", "float6_e3m2fn"})
"""Types that TensorStore has no name for: one byte a value, stored as uint8."""

Values = np.ndarray[Any, Any]
Index = tuple[slice, ...]
Part = tuple[Index, Values]


class DamagedArrayError(Exception):
    """An array cannot be read, or is not the one the manifest describes."""

    def __init__(self, item: str, leaf: str, reason: str) -> None:
        super().__init__(reason)
        self.item = item
        self.leaf = f"{item}{leaf}"


# ---------------------------------------------------------------- the form of a leaf on disk


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """One array as it lies on disk."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]


def chunk_shape(shape: Sequence[int], shard: Sequence[int], itemsize: int, chunk_bytes: int) -> tuple[int, ...]:
    """The largest chunk of at most `chunk_bytes` that no two shards share, cut along the longest axes.

    A chunk bounds what a restore onto another layout has to read; one that two processes share could
    not be written by both.
    """
    chunk = [max(1, size) for size in shard]
    while math.prod(chunk) * itemsize > chunk_bytes:
        cuts = [(size, axis) for axis, size in enumerate(chunk) if size > 1]
        if not cuts:
            break
        _, axis = max(cuts)
        chunk[axis] = _next_smaller(chunk[axis], sharded=shard[axis] != shape[axis])
    return tuple(chunk)


def _next_smaller(size: int, *, sharded: bool) -> int:
    if not sharded:
        return -(-size // 2)
    return next(size // k for k in range(2, size + 1) if size % k == 0)


# ---------------------------------------------------------------- copying to the host


class Snapshot:
    """The host copies of one item: what `save` returns with, and what its writer needs."""

    def __init__(
        self, tree: TreeSpec, stored: Sequence[Stored], parts: Sequence[Sequence[Part]], shardings: Sequence[Any]
    ) -> None:
        self.tree = tree
        self.stored = stored
        self.parts = parts
        self.shardings = shardings
        self.nbytes = sum(math.prod(s.shape) * _dtype(s.dtype).itemsize for s in stored)


def start_copies(leaves: Sequence[Any]) -> None:
    """Starts the copy of every leaf to the host; returns at once."""
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and not is_key(leaf):
            leaf.copy_to_host_async()


def collect(tree: TreeSpec, leaves: Sequence[Any], chunk_bytes: int) -> Snapshot:
    """Waits for the copies of `leaves`.

    The values are those of this moment whatever the caller does to the arrays afterwards: numpy
    arrays are copied, and of a jax array a reference is held, so that one that is donated is copied
    by JAX instead of overwritten.
    """
    arrays = [jax.random.key_data(leaf) if spec.kind == "key" else leaf
              for spec, leaf in zip(tree.leaves, leaves, strict=True)]  # fmt: skip
    parts = [_parts(array) for array in arrays]
    stored = [_stored(array, part, chunk_bytes) for array, part in zip(arrays, parts, strict=True)]
    shardings = [getattr(array, "sharding", None) for array in arrays]
    return Snapshot(tree, stored, parts, shardings)


def _parts(array: Any) -> list[Part]:
    """The pieces of an array that this process writes: one replica of each shard it holds."""
    if not isinstance(array, jax.Array):
        return [((), _bytes_view(np.array(array, order="C")))]
    if isinstance(array.sharding, jax.sharding.SingleDeviceSharding):
        return [((), _bytes_view(np.asarray(array)))]
    return [
        (shard.index, _bytes_view(np.asarray(shard.data)))
        for shard in array.addressable_shards
        if shard.replica_id == 0
    ]


def _bytes_view(array: Values) -> Values:
    return array.view(np.uint8) if array.dtype.name in _STORED_AS_BYTES else array


def _stored(array: Any, parts: Sequence[Part], chunk_bytes: int) -> Stored:
    shape = np.shape(array)
    shard = array.sharding.shard_shape(shape) if isinstance(array, jax.Array) else shape
    dtype = np.asarray(array).dtype if not isinstance(array, jax.Array) else array.dtype
    name = "uint8" if dtype.name in _STORED_AS_BYTES else dtype.name
    return Stored(shape, name, chunk_shape(shape, shard, dtype.itemsize, chunk_bytes))


# ---------------------------------------------------------------- writing


def write(directory: epath.Path, snapshot: Snapshot, compression: str | None) -> None:
    """Writes an item: its arrays in one transaction, then Orbax's own files about them."""
    if snapshot.stored:
        _write_arrays(directory, snapshot, compression)
    described = stock.describe(
        snapshot.tree,
        [stored.shape for stored in snapshot.stored],
        [stored.chunks for stored in snapshot.stored],
        snapshot.shardings,
    )
    for name, data in described.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, data)


def _write_arrays(directory: epath.Path, snapshot: Snapshot, compression: str | None) -> None:
    database = {**_database(directory), "config": {"max_inline_value_bytes": _INLINE_BYTES}}
    transaction, context = ts.Transaction(atomic=True), ts.Context()
    codecs = {size: _codecs(size, compression) for size in (1, 2)}
    opened = [
        ts.open(
            {
                "driver": "zarr3",
                "kvstore": {**database, "path": _prefix(spec)},
                "store_data_equal_to_fill_value": True,
                "metadata": {
                    "shape": stored.shape,
                    "data_type": stored.dtype,
                    "codecs": codecs[min(2, _dtype(stored.dtype).itemsize)],
                    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": stored.chunks}},
                },
            },
            create=True,
            open=True,
            context=context,
            transaction=transaction,
        )
        for spec, stored in zip(snapshot.tree.leaves, snapshot.stored, strict=True)
    ]
    writes = [
        (array.result()[index] if index else array.result()).write(
            part, can_reference_source_data_indefinitely=True
        )
        for array, parts in zip(opened, snapshot.parts, strict=True)
        for index, part in parts
        if part.size
    ]
    for each in writes:
        each.copy.result()
    transaction.commit_async().result()


def _database(directory: epath.Path) -> dict[str, Any]:
    path = str(directory)
    return {"driver": "ocdbt", "base": path if "://" in path else f"file://{path}/"}


def _prefix(spec: LeafSpec) -> str:
    return f"{spec.name}/" if spec.name else ""


def _codecs(itemsize: int, compression: str | None) -> list[dict[str, Any]]:
    to_bytes: dict[str, Any] = {"name": "bytes"}
    if itemsize > 1:  # zarr3 allows no byte order for single bytes
        to_bytes["configuration"] = {"endian": "little"}
    squeeze = [{"name": "zstd", "configuration": {"level": 1}}] if compression == "zstd" else []
    return [to_bytes, *squeeze, {"name": "crc32c"}]


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


# ---------------------------------------------------------------- reading


class Opener:
    """Opens the arrays of one committed item."""

    def __init__(self, directory: epath.Path, *, zarr3: bool = True, ocdbt: bool = True) -> None:
        self._driver = "zarr3" if zarr3 else "zarr"
        self._base = _database(directory) if ocdbt else {"driver": "file", "path": f"{directory}/"}
        self._ocdbt = ocdbt
        self._context = ts.Context({"file_io_mode": {"mode": "memmap"}} if files.is_local(directory) else {})

    def open(self, name: str) -> Any:
        """A future of the array with this name."""
        path = f"{name}/" if name else ""
        below = {"path": path} if self._ocdbt else {"path": self._base["path"] + path}
        spec = {"driver": self._driver, "kvstore": {**self._base, **below}, "fill_missing_data_reads": False}
        return ts.open(spec, open=True, read=True, context=self._context)

    def facts(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a stored array."""
        array = self.open(name).result()
        return tuple(array.shape), array.dtype.name


@dataclasses.dataclass(frozen=True, slots=True)
class Read:
    """One leaf of an item that is to be read, in the pieces that are wanted of it."""

    item: str
    opener: Opener
    spec: LeafSpec
    pieces: Sequence[Index] = ((),)

    def damaged(self, reason: object) -> DamagedArrayError:
        return DamagedArrayError(self.item, self.spec.path, str(reason))


def read(wanted: Sequence[Read]) -> list[list[Values]]:
    """The pieces of every wanted leaf, as numpy arrays; all opened at once, all read at once."""
    opened = [each.opener.open(each.spec.name) for each in wanted]
    arrays = [_expect(each, future) for each, future in zip(wanted, opened, strict=True)]
    reading = [
        [(array[index] if index else array).read() for index in each.pieces]
        for each, array in zip(wanted, arrays, strict=True)
    ]
    return [
        [_view(each.spec, _result(each, future)) for future in futures]
        for each, futures in zip(wanted, reading, strict=True)
    ]


def _expect(each: Read, future: Any) -> Any:
    """The opened array, if it is the one the manifest speaks of."""
    array, spec = _result(each, future), each.spec
    shape, dtype = tuple(array.shape), array.dtype.name
    if spec.kind == "key":
        shape = shape[: len(spec.shape)]
    elif dtype != ("uint8" if spec.dtype in _STORED_AS_BYTES else spec.dtype):
        raise each.damaged(f"it is stored as {dtype}, not {spec.dtype}")
    if shape != spec.shape:
        raise each.damaged(f"it is stored with shape {shape}, not {spec.shape}")
    return array


def _result(each: Read, future: Any) -> Any:
    try:
        return future.result()
    except (ValueError, OSError, NotImplementedError) as problem:
        raise each.damaged(problem) from problem


def _view(spec: LeafSpec, values: Values) -> Values:
    return values.view(_dtype(spec.dtype)) if spec.dtype in _STORED_AS_BYTES else values


# ---------------------------------------------------------------- onto the devices


def pieces(shape: tuple[int, ...], target: Target) -> Sequence[Index]:
    """The distinct pieces of an array that this process's devices hold; () is all of it."""
    if not _is_sharded(target):
        return ((),)
    indices = target.place.addressable_devices_indices_map(shape).values()
    return tuple({_spell(index, shape): index for index in indices}.values())


def _is_sharded(target: Target) -> bool:
    """Whether the pieces go to devices one by one; keys are made whole, then spread."""
    sharded = isinstance(target.place, jax.sharding.Sharding) and len(target.place.device_set) > 1
    return sharded and target.kind == "jax"


def _spell(index: Index, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
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
    return [
        _finish([next(here if where is HERE else there) for _, where in moves], *row)
        for moves, row in zip(moving, rows, strict=True)
    ]


def _cast(piece: Values, target: Target) -> Values:
    unchanged = target.kind == "key" or piece.dtype.name == target.dtype
    return piece if unchanged else piece.astype(_dtype(target.dtype))


def _moves(read: Sequence[Values], shape: tuple[int, ...], target: Target) -> list[tuple[Values, Any]]:
    """Each array of a leaf that goes to a device, and where to."""
    if target.kind not in ("jax", "key"):
        return []
    if not _is_sharded(target):
        alone = isinstance(target.place, jax.sharding.Sharding) and target.kind == "jax"
        return [(read[0], target.place if alone else HERE)]
    by_index = dict(zip((_spell(index, shape) for index in pieces(shape, target)), read, strict=True))
    kind = target.place.memory_kind
    return [
        (by_index[_spell(index, shape)], jax.sharding.SingleDeviceSharding(device, memory_kind=kind))
        for device, index in target.place.addressable_devices_indices_map(shape).items()
    ]


_PYTHON: Mapping[str, Callable[[Any], Any]] = {"int": int, "float": float, "bool": bool, "complex": complex}


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
        keys = jax.random.wrap_key_data(arrived[0], impl=target.impl)
        return jax.device_put(keys, target.place) if isinstance(target.place, jax.sharding.Sharding) else keys
    array = arrived[0]
    if _is_sharded(target):
        array = jax.make_array_from_single_device_arrays(shape, target.place, list(arrived))
    return _weakly_typed(array) if target.weak else array


def _weakly_typed(array: jax.Array) -> jax.Array:
    """The same bits with JAX's weak type, which an update in place takes over from its operand."""
    weak = jnp.broadcast_to(jnp.asarray(array.dtype.type(0).item()), array.shape)
    return weak.at[...].set(array) if weak.dtype == array.dtype else array
