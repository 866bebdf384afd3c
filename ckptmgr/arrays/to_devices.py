"""From the host onto the devices, in one batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ckptmgr.arrays.chunks import Index, Values
from ckptmgr.specs import LeafSpec
from ckptmgr.trees.layouts import HERE, Target
from ckptmgr.trees.structure import dtype_name, numpy_dtype, weaken


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


class Plan:
    """How leaves get from the host to their targets: the same for each step of a structure."""

    def __init__(self, specs: Sequence[LeafSpec], targets: Sequence[Target]) -> None:
        self.specs, self.targets = specs, targets
        whole = [_is_whole(spec, target) for spec, target in zip(specs, targets, strict=True)]
        places = [_single_place(target) for target in targets]
        self.here = [n for n, is_whole in enumerate(whole) if is_whole and places[n] is HERE]
        """Leaves that go to the default device as they are; JAX may move them later."""
        self.bound = [n for n, is_whole in enumerate(whole) if is_whole and places[n] is not HERE]
        self.places = [places[n] for n in self.bound]
        self.others = [n for n, is_whole in enumerate(whole) if not is_whole]
        """Leaves that are cast, cut into pieces, made keys or left on the host."""
        self.weak = [n for n, target in enumerate(targets) if target.weak and target.kind == "jax"]


def _is_whole(spec: LeafSpec, target: Target) -> bool:
    return target.kind == "jax" and spec.dtype == target.dtype and not is_sharded(target)


def place(plan: Plan, values: Sequence[Sequence[Values]]) -> list[Any]:
    """The leaves as their targets want them; all that goes to devices goes in one call."""
    moving = [_moves(values[n], plan.specs[n], plan.targets[n]) for n in plan.others]
    free = [array for moves in moving for array, where in moves if where is HERE]
    bound = [move for moves in moving for move in moves if move[1] is not HERE]
    here = iter(jax.device_put([values[n][0] for n in plan.here] + free))
    arrays = [values[n][0] for n in plan.bound] + [array for array, _ in bound]
    there = iter(jax.device_put(arrays, plan.places + [where for _, where in bound]))
    leaves: list[Any] = [None] * len(values)
    for places, arrived in ((plan.here, here), (plan.bound, there)):
        for n, array in zip(places, arrived, strict=False):  # the others follow
            leaves[n] = array
    for n, moves in zip(plan.others, moving, strict=True):
        arrived = [next(here if where is HERE else there) for _, where in moves]
        leaves[n] = _finish(arrived, values[n], plan.specs[n].shape, plan.targets[n])
    return _weakly_typed(leaves, plan.weak)


def _cast(piece: Values, target: Target) -> Values:
    unchanged = target.kind == "key" or dtype_name(piece.dtype) == target.dtype
    return piece if unchanged else piece.astype(numpy_dtype(target.dtype))


def _single_place(target: Target) -> Any:
    """Where an array goes that is not cut into pieces; keys are placed once they are made."""
    return target.place if isinstance(target.place, jax.sharding.Sharding) and target.kind == "jax" else HERE


def _moves(values: Sequence[Values], spec: LeafSpec, target: Target) -> list[tuple[Values, Any]]:
    """Each array of a leaf that goes to a device, and where to."""
    if target.kind not in ("jax", "key"):
        return []
    shape, read = spec.shape, [_cast(piece, target) for piece in values]
    if not is_sharded(target):
        return [(read[0], _single_place(target))]
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


def _weakly_typed(leaves: list[Any], weak: Sequence[int]) -> list[Any]:
    """The same bits, with JAX's weak type where it was saved: one program for the leaves of each mesh.

    A program runs on the mesh of `jax.set_mesh`, and takes no arrays of another: each has the mesh of its leaves.
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
            with jax.set_mesh(where if isinstance(where, jax.sharding.Mesh) else _NO_MESH):
                weakened = weaken([_in_default_memory(array) for array in strong])
            for place, array, made in zip(places, strong, weakened, strict=True):
                leaves[place] = jax.device_put(made, array.sharding) if array.committed else made
    return leaves


def _in_default_memory(array: jax.Array) -> jax.Array:
    """Programs do not compute on arrays that are kept in the memory of the host."""
    kind = next(iter(array.devices())).default_memory().kind
    sharding = array.sharding
    return array if sharding.memory_kind == kind else jax.device_put(array, sharding.with_memory_kind(kind))
