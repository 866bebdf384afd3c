"""From the host onto the devices, in one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ckptmgr.arrays import chunks
from ckptmgr.arrays.chunks import Index, Values
from ckptmgr.specs import LeafSpec
from ckptmgr.trees.layouts import HERE, Target
from ckptmgr.trees.structure import numpy_dtype, weaken


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


def held_bytes(spec: LeafSpec, target: Target) -> int:
    """What a leaf takes on the host while it goes to its target, beside the array that it becomes."""
    if spec.kind == "str" or _takes_over(spec, target):
        return 0
    whole = (slice(None),) * len(spec.shape)
    where = [spell(index or whole, spec.shape) for index in pieces(spec.shape, target)]
    itemsize = _KEY_BYTES if spec.kind == "key" else numpy_dtype(spec.dtype).itemsize
    if spec.kind != "key" and spec.dtype != target.dtype:  # a copy in the other type, beside what was read
        itemsize += numpy_dtype(target.dtype).itemsize
    return itemsize * sum(math.prod(len(range(*axis)) for axis in piece) for piece in where)


_KEY_BYTES = 16  # of the generator whose keys are the largest


def _takes_over(spec: LeafSpec, target: Target) -> bool:
    """Whether the array is made of the very memory that is read: numpy arrays, and most on JAX's CPU devices."""
    if target.kind not in ("jax", "numpy") or spec.dtype != target.dtype:
        return False
    return target.kind == "numpy" or (
        not target.weak and not chunks.is_packed(spec.dtype) and _platforms(target.place) == {"cpu"}
    )


def _platforms(place: Any) -> set[str]:
    if not isinstance(place, jax.sharding.Sharding):
        return {jax.default_backend()}
    devices: set[Any] = place.device_set
    return {each.platform for each in devices}


class Plan:
    """How leaves get from the host to their targets: the same for each step of a structure.

    With `only` it is about one piece of each leaf, the only one that is read.
    """

    def __init__(self, specs: Sequence[LeafSpec], targets: Sequence[Target], only: int | None = None) -> None:
        self.specs, self.targets = specs, targets
        rows = list(enumerate(zip(specs, targets, strict=True)))
        self.cast = [n for n, (spec, target) in rows if target.kind in _CAST and spec.dtype != target.dtype]
        moves = [(n, piece, where) for n, row in rows for piece, where in _moves(*row)]
        if only is not None:
            moves = [(n, 0, where) for n, piece, where in moves if piece == only]
        self.here = [(n, piece) for n, piece, where in moves if where is HERE]
        """Leaf and number of each piece that goes to the default device; JAX may move it later."""
        self.bound = [(n, piece) for n, piece, where in moves if where is not HERE]
        """Those that stay where they go, which is the one of `places` beside each."""
        self.places = [where for _, _, where in moves if where is not HERE]
        self.ready = [n for n, (_, target) in rows if target.kind == "jax" and not is_sharded(target)]
        """Leaves that are the one array that arrives."""
        self.host = [n for n, (_, target) in rows if target.kind == "numpy"]
        self.others = sorted(set(range(len(targets))) - {*self.ready, *self.host})
        """Leaves in pieces, keys and numbers."""
        self.weak = [n for n, (_, target) in rows if target.weak and target.kind == "jax"]


_CAST = ("jax", "numpy", "scalar")


def _moves(spec: LeafSpec, target: Target) -> list[tuple[int, Any]]:
    """Each array of a leaf that goes to a device: which of the leaf's pieces, and where to."""
    if target.kind not in ("jax", "key"):
        return []
    if not is_sharded(target):  # keys are placed once they are made
        is_placed = isinstance(target.place, jax.sharding.Sharding) and target.kind == "jax"
        return [(0, target.place if is_placed else HERE)]
    shape, kind = spec.shape, target.place.memory_kind
    numbers = {spell(index, shape): number for number, index in enumerate(pieces(shape, target))}
    return [
        (numbers[spell(index, shape)], jax.sharding.SingleDeviceSharding(device, memory_kind=kind))
        for device, index in target.place.addressable_devices_indices_map(shape).items()
    ]


def place(plan: Plan, read: Sequence[Sequence[Values]]) -> list[Any]:
    """The leaves as their targets want them; all that goes to devices goes in one call."""
    values = cast(plan, read)
    return finish(plan, send(plan, values), values)


def cast(plan: Plan, read: Sequence[Sequence[Values]]) -> list[Sequence[Values]]:
    """The same values, those of some leaves in another dtype."""
    values = list(read)
    for n in plan.cast:
        values[n] = [_cast(piece, numpy_dtype(plan.targets[n].dtype)) for piece in read[n]]
    return values


def _cast(values: Values, dtype: np.dtype[Any]) -> Values:
    """In memory that JAX can take over as it is."""
    found = chunks.aligned(values.shape, dtype)
    np.copyto(found, values, casting="unsafe")
    return found


def send(plan: Plan, values: Sequence[Sequence[Values]]) -> list[list[jax.Array]]:
    """The arrays of each leaf on their devices; they may still be on their way."""
    here = jax.device_put([values[n][piece] for n, piece in plan.here])
    bound = jax.device_put([values[n][piece] for n, piece in plan.bound], plan.places)
    arrived: list[list[jax.Array]] = [[] for _ in values]
    for moves, arrays in ((plan.here, here), (plan.bound, bound)):
        for (n, _), array in zip(moves, arrays, strict=True):
            arrived[n].append(array)
    return arrived


def finish(plan: Plan, arrived: Sequence[Sequence[jax.Array]], values: Sequence[Sequence[Values]]) -> list[Any]:
    """The leaves, of what has arrived, and of the values of those that go to no device."""
    leaves: list[Any] = [None] * len(values)
    for n in plan.ready:
        leaves[n] = arrived[n][0]
    for n in plan.host:
        leaves[n] = values[n][0] if values[n][0].flags.writeable else values[n][0].copy()
    for n in plan.others:
        leaves[n] = _made(arrived[n], values[n], plan.specs[n].shape, plan.targets[n])
    return _weakly_typed(leaves, plan.weak)


_PYTHON: Mapping[str, Callable[[Any], Any]] = {
    "int": int, "float": float, "bool": bool, "complex": complex, "str": str,
}  # fmt: skip


def _made(arrived: Sequence[jax.Array], values: Sequence[Values], shape: tuple[int, ...], target: Target) -> Any:
    """One leaf, of what was read and of what has arrived on the devices."""
    if target.kind in _PYTHON:
        return _PYTHON[target.kind](values[0][()])
    if target.kind == "scalar":
        return values[0][()]
    if target.kind == "key":
        return _keys(arrived[0], values[0], target)
    dtype = numpy_dtype(target.dtype)
    return jax.make_array_from_single_device_arrays(shape, target.place, list(arrived), dtype=dtype)


def _keys(here: jax.Array, words: Values, target: Target) -> Any:
    """Typed keys of their words, which are here as a whole; each process puts its part where it belongs."""
    place = target.place
    if isinstance(place, jax.sharding.NamedSharding) and not place.is_fully_addressable:
        mine = place.addressable_devices_indices_map(words.shape)
        where = [jax.sharding.SingleDeviceSharding(device, memory_kind=place.memory_kind) for device in mine]
        copies = [jax.device_put(words[index], each) for index, each in zip(mine.values(), where, strict=True)]
        spread = jax.make_array_from_single_device_arrays(words.shape, place, copies, dtype=words.dtype)
        return jax.random.wrap_key_data(spread, impl=target.impl)
    keys = jax.random.wrap_key_data(here, impl=target.impl)
    return jax.device_put(keys, place) if isinstance(place, jax.sharding.Sharding) else keys


_NO_MESH = jax.sharding.Mesh(np.empty((), object), ())


def mesh_of(where: Any) -> jax.sharding.Mesh:
    """The mesh for a program whose arrays have this mesh or sharding.

    A program runs on the mesh of `jax.set_mesh`, and takes no arrays of another.
    """
    mesh = getattr(where, "mesh", where)
    return mesh if isinstance(mesh, jax.sharding.Mesh) else _NO_MESH


def _weakly_typed(leaves: list[Any], weak: Sequence[int]) -> list[Any]:
    """The same bits, with JAX's weak type where it was saved: one program for the leaves of each mesh.

    One leaf that is committed to its device would commit all results of its program.
    """
    groups: dict[Any, list[int]] = {}
    for place in weak:
        sharding = leaves[place].sharding
        group = getattr(sharding, "mesh", sharding), leaves[place].committed
        groups.setdefault(group, []).append(place)
    with jax.debug_nans(False), jax.debug_infs(False):  # a leaf may hold them: nothing is computed here
        for (where, _), places in groups.items():
            strong = [leaves[place] for place in places]
            with jax.set_mesh(mesh_of(where)):
                weakened = weaken([_in_default_memory(array) for array in strong])
            for place, array, made in zip(places, strong, weakened, strict=True):
                leaves[place] = jax.device_put(made, array.sharding) if array.committed else made
    return leaves


def _in_default_memory(array: jax.Array) -> jax.Array:
    """Programs do not compute on arrays that are kept in the memory of the host."""
    kind = next(iter(array.devices())).default_memory().kind
    sharding = array.sharding
    return array if sharding.memory_kind == kind else jax.device_put(array, sharding.with_memory_kind(kind))
