"""Where each restored leaf goes. Never to the saved sharding by itself."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ckptmgr.errors import LayoutError, UnsupportedLeafError
from ckptmgr.specs import Row
from ckptmgr.trees.following import follow, replicated, same
from ckptmgr.trees.layouts import HERE, HOST, Host, Layout, LayoutFunction, Place, Target, Wanted
from ckptmgr.trees.meshes import Meshes, carried, sharding_of
from ckptmgr.trees.structure import abstract, numpy_dtype

_log = logging.getLogger("ckptmgr")


def check(layout: Layout) -> Layout:
    """Refuses a value that is no layout, before anything is looked up on disk."""
    if isinstance(layout, Mesh) or _is_function(layout):
        return layout
    for leaf in jax.tree.leaves(layout, is_leaf=_is_placement):
        if not _is_placement(leaf):
            raise TypeError(
                "layout takes None, a Sharding, a Device, ckptmgr.HOST, a Mesh, a tree of shardings like the "
                f"params, or a callable, not {leaf!r}"
            )
    return layout


def _is_function(layout: Layout) -> TypeGuard[LayoutFunction]:
    """Whether a layout is to be called; a tree of shardings may have a `__call__` too, as Equinox's modules do."""
    return callable(layout) and not any(map(_is_placement, jax.tree.leaves(layout)))


def targets(layout: Layout, wanted: Sequence[Wanted], params: Wanted) -> list[list[Target]]:
    """The targets of the rows of each item that are read; raises LayoutError before anything is.

    `params` are the parameters as they are, or would be, restored: what a tree or a callable speaks of.
    """
    places = _places(layout, wanted, params)
    return [
        [
            _target(f"{each.item}{row.wants.path}", row, place)
            for row, place in zip(each.rows, chosen, strict=True)
            if row.saved is not None
        ]
        for each, chosen in zip(wanted, places, strict=True)
    ]


def kept(layout: Layout, wanted: Sequence[Wanted], params: Wanted) -> list[list[Row]]:
    """The rows of each item, with what `partial` keeps from the template where the layout wants it."""
    return [
        [
            row if row.saved else row._replace(given=_moved(f"{each.item}{row.wants.path}", row, place))
            for row, place in zip(each.rows, chosen, strict=True)
        ]
        for each, chosen in zip(wanted, _places(layout, wanted, params), strict=True)
    ]


def _moved(leaf: str, row: Row, place: Place) -> Any:
    if isinstance(place, Sharding):
        _check_fits(leaf, row.wants.shape, place)
    if not isinstance(row.given, jax.Array) or place is HERE or (place is HOST and row.wants.kind == "key"):
        return row.given
    return jax.device_get(row.given) if place is HOST else jax.device_put(row.given, place)


def _target(leaf: str, row: Row, place: Place) -> Target:
    wants, impl = row.wants, row.saved.impl if row.saved else row.wants.impl
    if wants.kind not in ("jax", "key"):
        place = HOST
    kind = "numpy" if place is HOST and wants.kind == "jax" else wants.kind
    if kind == "jax":
        _check_dtype(leaf, wants.dtype)
    if isinstance(place, Sharding):
        _check_fits(leaf, wants.shape, place)
    if kind == "key" and not _is_known(impl):
        raise UnsupportedLeafError(
            f"{leaf} has keys of the generator {impl}, which this version of JAX does not know", leaf=leaf
        )
    return Target(place, kind, wants.dtype, wants.weak, impl)


@functools.cache
def _is_known(impl: str | None) -> bool:
    """Whether JAX has a generator of keys of this name."""
    try:
        jax.eval_shape(lambda: jax.random.key(0, impl=impl))
    except ValueError:
        return False
    return True


def _check_fits(leaf: str, shape: tuple[int, ...], sharding: Sharding) -> None:
    if isinstance(sharding, SingleDeviceSharding):
        return
    try:
        if isinstance(sharding, NamedSharding) and len(sharding.spec) > len(shape):  # JAX says IndexError
            raise ValueError(f"the leaf has {len(shape)} axes, and {sharding.spec} has {len(sharding.spec)}")
        sharding.shard_shape(shape)
    except ValueError as problem:
        raise LayoutError(f"{leaf} of shape {shape} does not fit {sharding}: {problem}", leaf=leaf) from None


def _check_dtype(leaf: str, dtype: str) -> None:
    if numpy_dtype(dtype).itemsize < 8:  # JAX makes smaller what is wider
        return
    made = jax.dtypes.canonicalize_dtype(dtype).name
    if made != dtype:
        raise LayoutError(
            f"{leaf} is {dtype}, which JAX would make {made} on a device: set jax_enable_x64, give a "
            f"template of {made} with cast=True, or restore with layout=ckptmgr.HOST",
            leaf=leaf,
        )


# ---------------------------------------------------------------- the forms of a layout


def _places(layout: Layout, wanted: Sequence[Wanted], params: Wanted) -> list[list[Place]]:
    """The place of every row of each item."""
    if layout is None:
        return _places_of_templates(wanted, params)
    if isinstance(layout, Mesh):
        return carried(layout, wanted)
    meshes = Meshes([*wanted, params])
    if isinstance(layout, Sharding | jax.Device | Host):
        place = _place("every leaf", layout, meshes)
        return [[place] * len(each.rows) for each in wanted]
    chosen = _by_function(layout, params, meshes) if _is_function(layout) else _by_tree(layout, params, meshes)
    return [chosen if each.item == params.item else follow(each, params, chosen) for each in wanted]


def _places_of_templates(wanted: Sequence[Wanted], params: Wanted) -> list[list[Place]]:
    """Where each template's leaf is. A leaf that has no place of its own follows the parameter that it mirrors."""
    meshes = Meshes([*wanted, params])
    chosen = [_own(row, meshes) or HERE for row in params.rows]
    return [
        chosen if each.item == params.item else _own_or_follow(each, params, chosen, meshes) for each in wanted
    ]


def _own_or_follow(wanted: Wanted, params: Wanted, places: Sequence[Place], meshes: Meshes) -> list[Place]:
    rest = replicated(places) if wanted.item == "opt_state" else HERE
    followed = follow(wanted, params, places, rest)
    return [
        same(_own(row, meshes, place), place, row.wants.shape)
        for row, place in zip(wanted.rows, followed, strict=True)
    ]


def _own(row: Row, meshes: Meshes, followed: Place = None) -> Place | None:
    """Where the template's leaf is; None for an abstract leaf that does not say.

    Of several meshes that an abstract leaf may mean, it is the one of the leaf that it follows.
    """
    if isinstance(row.given, jax.Array) and not row.given.committed:
        return HERE
    sharding = sharding_of(row.given)
    if isinstance(sharding, PartitionSpec):
        raise LayoutError(
            f"the template's {row.wants.path} has a PartitionSpec, which needs a mesh: give layout=, or restore "
            "inside `with jax.set_mesh(mesh)`",
            leaf=row.wants.path,
        )
    return meshes.concrete(sharding, row.wants.path, followed) if isinstance(sharding, Sharding) else None


def _by_function(layout: LayoutFunction, params: Wanted, meshes: Meshes) -> list[Place]:
    def place(row: Row) -> Place:
        leaf = row.wants if row.wants.kind == "jax" else row.saved
        answer = None
        if leaf is not None and row.wants.kind in ("jax", "key"):
            answer = layout(row.wants.path, abstract(leaf))
        return _answered(params, row, answer, meshes)

    return [place(row) for row in params.rows]


def _by_tree(layout: Any, params: Wanted, meshes: Meshes) -> list[Place]:
    """A pytree like the params, or a prefix of one; None where the template's leaf is."""
    answers: list[Any] = []

    def spread(answer: Any, below: Any) -> None:
        answers.extend([answer] * len(jax.tree.leaves(below)))  # in the order of `params.order`

    try:
        jax.tree.map(spread, layout, params.tree, is_leaf=_is_placement)
    except ValueError as problem:
        raise LayoutError(f"layout is no prefix of {params.item}: {problem}") from None
    by_row = dict(zip(params.order, answers, strict=True))
    return [_answered(params, row, by_row[place], meshes) for place, row in enumerate(params.rows)]


def _answered(params: Wanted, row: Row, answer: Any, meshes: Meshes) -> Place:
    """The place that a tree or a function gives for a parameter; None leaves it where the template's leaf is."""
    if answer is None:
        return _own(row, meshes) or HERE
    return _place(f"{params.item}{row.wants.path}", answer, meshes)


def _is_placement(node: Any) -> bool:
    return node is None or isinstance(node, Sharding | PartitionSpec | jax.Device | Host)


def _place(leaf: str, answer: Any, meshes: Meshes) -> Place:
    if isinstance(answer, PartitionSpec):
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise LayoutError(
                f"layout has {answer} for {leaf}, which needs a mesh: give NamedSharding(mesh, spec), or "
                "restore inside `with jax.set_mesh(mesh)`",
                leaf=leaf,
            )
        try:
            return NamedSharding(mesh, answer)
        except ValueError as problem:
            raise LayoutError(
                f"layout has {answer} for {leaf}, which does not fit {mesh}: {problem}", leaf=leaf
            ) from None
    if not _is_placement(answer):
        raise LayoutError(f"layout has {answer!r} for {leaf}, which is no Sharding or PartitionSpec", leaf=leaf)
    if isinstance(answer, jax.Device):
        return SingleDeviceSharding(answer)
    return meshes.concrete(answer, leaf) or HERE if isinstance(answer, Sharding) else answer


def span_processes(places: Iterable[Any]) -> bool:
    """Whether arrays that go to these places are on devices of other processes too."""
    found = list(places)
    meshes = [getattr(each, "mesh", each) for each in found]
    known = [jax.sharding.get_mesh(), *(mesh for mesh in meshes if isinstance(mesh, Mesh))]
    devices = (device for each in found for device in _devices(each, known))
    return any(device.process_index != jax.process_index() for device in devices)


def _devices(place: Any, known: Sequence[Mesh]) -> Iterable[jax.Device]:
    """The devices of a place for arrays; `known` are the meshes that one without devices may mean."""
    mesh = getattr(place, "mesh", place)
    if isinstance(mesh, PartitionSpec):
        mesh = known[0]
    if isinstance(mesh, AbstractMesh) and not mesh.empty:
        axes = mesh.axis_names, mesh.axis_sizes
        mesh = next((each for each in known if (each.axis_names, each.axis_sizes) == axes), None)
        if mesh is None:  # then it is jax.make_mesh of all devices
            return jax.devices()
    if isinstance(mesh, Mesh):
        return mesh.devices.flat if not mesh.empty else []
    if isinstance(place, Sharding) and not isinstance(mesh, AbstractMesh):
        return place.device_set
    return [place] if isinstance(place, jax.Device) else []
