"""Where each restored leaf goes. Never to the saved sharding by itself."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple, Protocol

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ckptmgr.errors import LayoutError
from ckptmgr.structure import Keys, Row

_log = logging.getLogger("ckptmgr")


class _Host:
    def __repr__(self) -> str:
        return "ckptmgr.HOST"


HOST: Final = _Host()
"""As a layout: numpy arrays, on no device."""

HERE: Final = "the default device"
"""Where `jnp.asarray` would put it: on the default device, and free to be moved by a jitted function."""

Layout = Any
Place = Any
"""A Sharding, HERE or HOST."""


class Target(NamedTuple):
    """Where one leaf goes, and as what."""

    place: Place
    kind: str
    """A `LeafSpec.kind`."""
    dtype: str
    weak: bool = False
    impl: str | None = None


class Wanted(Protocol):
    """An item that is to be restored: its tree, with a row for each leaf."""

    @property
    def item(self) -> str: ...
    @property
    def tree(self) -> Any: ...
    @property
    def rows(self) -> Sequence[Row]: ...


def check(layout: Layout) -> Layout:
    """Refuses a value that is no layout, before anything is looked up on disk."""
    if isinstance(layout, Mesh) or callable(layout):
        return layout
    for leaf in jax.tree.leaves(layout, is_leaf=_is_placement):
        if not _is_placement(leaf):
            raise TypeError(
                "layout takes None, a Sharding, a Device, ckptmgr.HOST, a Mesh, a tree of shardings like the "
                f"params, or a callable, not {leaf!r}"
            )
    return layout


def targets(layout: Layout, wanted: Sequence[Wanted], params: Wanted, optimizer: Any = None) -> list[list[Target]]:
    """The targets of the rows of each item that are read; raises LayoutError before anything is.

    `params` are the parameters as they are, or would be, restored: what a tree or a callable speaks of.
    """
    places = _places(layout, wanted, params, optimizer)
    return [
        [
            _target(f"{each.item}{row.wants.path}", row, place)
            for row, place in zip(each.rows, chosen, strict=True)
            if row.saved is not None
        ]
        for each, chosen in zip(wanted, places, strict=True)
    ]


def _target(leaf: str, row: Row, place: Place) -> Target:
    wants, impl = row.wants, row.saved.impl if row.saved else row.wants.impl
    if wants.kind not in ("jax", "key"):
        place = HOST
    kind = "numpy" if place is HOST and wants.kind == "jax" else wants.kind
    if kind == "jax":
        _check_dtype(leaf, wants.dtype)
    if isinstance(place, Sharding):
        _check_fits(leaf, wants.shape, place)
    return Target(place, kind, wants.dtype, wants.weak, impl)


def _check_fits(leaf: str, shape: tuple[int, ...], sharding: Sharding) -> None:
    try:
        sharding.shard_shape(shape)
        if isinstance(sharding, NamedSharding) and len(sharding.spec) > len(shape):
            raise ValueError(f"it has {len(shape)} axes")
    except (ValueError, IndexError) as problem:  # JAX indexes past the axes of a spec that is too long
        raise LayoutError(f"{leaf} of shape {shape} does not fit {sharding}: {problem}", leaf=leaf) from None


def _check_dtype(leaf: str, dtype: str) -> None:
    made = jax.dtypes.canonicalize_dtype(dtype).name
    if made != dtype:
        raise LayoutError(
            f"{leaf} is {dtype}, which JAX would make {made} on a device: set jax_enable_x64, give a "
            f"template of {made} with cast=True, or restore with layout=ckptmgr.HOST",
            leaf=leaf,
        )


# ---------------------------------------------------------------- the forms of a layout


def _places(layout: Layout, wanted: Sequence[Wanted], params: Wanted, optimizer: Any) -> list[list[Place]]:
    """The place of every row of each item."""
    if layout is None:
        return [[_own(row) for row in each.rows] for each in wanted]
    if isinstance(layout, Sharding | jax.Device | _Host):
        return [[_one(layout)] * len(each.rows) for each in wanted]
    if isinstance(layout, Mesh):
        return _carried(layout, wanted)
    chosen = _by_callable(layout, params) if callable(layout) else _by_tree(layout, params)
    return [chosen if each.item == params.item else _follow(each, params, chosen, optimizer) for each in wanted]


def _own(row: Row) -> Place:
    """Where the template's leaf is."""
    if isinstance(row.given, jax.Array) and not row.given.committed:
        return HERE
    return getattr(row.given, "sharding", None) or HERE


def _one(place: Any) -> Place:
    return SingleDeviceSharding(place) if isinstance(place, jax.Device) else place


def _carried(mesh: Mesh, wanted: Sequence[Wanted]) -> list[list[Place]]:
    """The saved PartitionSpecs on another mesh; what it cannot carry is replicated, and said once."""
    lost: list[str] = []

    def place(item: str, row: Row) -> Place:
        saved = row.saved or row.wants
        spec = carry(row.wants.shape, saved.partition or (), mesh)
        if row.saved and any(_names(saved.partition or ())) and _names(spec) != _names(saved.partition or ()):
            lost.append(f"{item}{row.wants.path} of shape {row.wants.shape}: {saved.partition} becomes {spec}")
        return NamedSharding(mesh, spec)

    places = [[place(each.item, row) for row in each.rows] for each in wanted]
    if lost:
        _log.warning(
            "%d leaves are replicated along axes that %s lacks or that do not divide them; the first: %s",
            len(lost), dict(mesh.shape), lost[0],
        )  # fmt: skip
    return places


def carry(shape: Sequence[int], partition: Iterable[Any], mesh: Mesh) -> PartitionSpec:
    """A PartitionSpec for another mesh: without axes the mesh lacks, or that do not divide their dimension."""
    kept = []
    for size, names in zip(shape, _names(partition), strict=False):
        known = tuple(name for name in names if name in mesh.shape)
        divides = size % math.prod(mesh.shape[name] for name in known) == 0
        kept.append((known[0] if len(known) == 1 else known) if known and divides else None)
    while kept and kept[-1] is None:
        kept.pop()
    return PartitionSpec(*kept)


def _names(partition: Iterable[Any]) -> list[tuple[str, ...]]:
    """The mesh axes of each dimension, without those of trailing ones that are not sharded."""
    found = [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in partition]
    while found and not found[-1]:
        found.pop()
    return found


def _by_callable(layout: Callable[[str, jax.ShapeDtypeStruct], Any], params: Wanted) -> list[Place]:
    def place(row: Row) -> Place:
        wants = row.wants
        if wants.kind != "jax":
            return _own(row)
        leaf = jax.ShapeDtypeStruct(wants.shape, wants.dtype)
        answer = layout(wants.path, leaf)
        return _own(row) if answer is None else _sharding(f"{params.item}{wants.path}", answer)

    return [place(row) for row in params.rows]


def _by_tree(layout: Any, params: Wanted) -> list[Place]:
    """A pytree like the params, or a prefix of one; None where the template's leaf is."""
    try:
        spread = jax.tree.broadcast(layout, params.tree, is_leaf=_is_placement)
    except ValueError as problem:
        raise LayoutError(f"layout is no prefix of {params.item}: {problem}") from None
    answers = jax.tree.leaves(spread, is_leaf=_is_placement)
    return [
        _own(row) if answer is None else _sharding(f"{params.item}{row.wants.path}", answer)
        for row, answer in zip(params.rows, answers, strict=True)
    ]


def _is_placement(node: Any) -> bool:
    return node is None or isinstance(node, Sharding | PartitionSpec | jax.Device | _Host)


def _sharding(leaf: str, answer: Any) -> Place:
    if isinstance(answer, PartitionSpec):
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise LayoutError(
                f"layout has {answer} for {leaf}, which needs a mesh: give NamedSharding(mesh, spec), or "
                "restore inside `with jax.set_mesh(mesh)`",
                leaf=leaf,
            )
        return NamedSharding(mesh, answer)
    if not _is_placement(answer):
        raise LayoutError(f"layout has {answer!r} for {leaf}, which is no Sharding or PartitionSpec", leaf=leaf)
    return _one(answer)


# ---------------------------------------------------------------- what follows the params


@dataclasses.dataclass(frozen=True)
class _Param:  # to JAX a leaf, as a tuple would not be
    shape: tuple[int, ...]
    place: Place


_NO_PARAM: Final = _Param((), None)


def _follow(wanted: Wanted, params: Wanted, places: Sequence[Place], optimizer: Any) -> list[Place]:
    """Leaves that mirror a parameter (Adam's mu and nu) go where it goes, the rest is replicated."""
    followed = [_Param(row.wants.shape, place) for row, place in zip(params.rows, places, strict=True)]
    knows = optimizer is not None and wanted.item == "opt_state"
    mirrored = _by_optax(wanted, params, followed, optimizer) if knows else _by_path(wanted, params, followed)
    rest = _replicated(places)
    return [
        param.place if param is not _NO_PARAM and param.shape == row.wants.shape else rest
        for row, param in zip(wanted.rows, mirrored, strict=True)
    ]


def _by_optax(wanted: Wanted, params: Wanted, followed: Sequence[_Param], optimizer: Any) -> list[_Param]:
    """What optax knows of its own state."""
    tree = jax.tree.unflatten(jax.tree.structure(params.tree), followed)
    found = optax.tree_utils.tree_map_params(
        optimizer, lambda _, param: param, wanted.tree, tree, transform_non_params=lambda _: _NO_PARAM
    )
    return list(jax.tree.leaves(found))


def _by_path(wanted: Wanted, params: Wanted, followed: Sequence[_Param]) -> list[_Param]:
    """A leaf mirrors the parameter whose whole path its own path ends with."""
    known = {row.wants.keys: param for row, param in zip(params.rows, followed, strict=True)}

    def mirrored(keys: Keys) -> _Param:
        endings = (keys[first:] for first in range(len(keys) + 1))
        return next((known[ending] for ending in endings if ending in known), _NO_PARAM)

    return [mirrored(row.wants.keys) for row in wanted.rows]


def _replicated(places: Iterable[Place]) -> Place:
    """All of an array on every device of the mesh that the params are on."""
    for place in places:
        if isinstance(place, NamedSharding):
            return NamedSharding(place.mesh, PartitionSpec(), memory_kind=place.memory_kind)
    return next(iter(places), HERE)
