"""Where each restored leaf goes. Never to the saved sharding by itself."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Final, NamedTuple, Protocol, TypeAlias, TypeGuard

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ckptmgr.errors import LayoutError
from ckptmgr.specs import Keys, Row
from ckptmgr.trees.structure import abstract

_log = logging.getLogger("ckptmgr")


class Host:
    """The type of `ckptmgr.HOST`."""

    def __repr__(self) -> str:
        return "ckptmgr.HOST"


HOST: Final = Host()
"""As a layout: numpy arrays, on no device."""

HERE: Final = "the default device"
"""Where `jnp.asarray` would put it: on the default device, and free to be moved by a jitted function."""


class Device(Protocol):
    """A `jax.Device`, which JAX leaves without a type."""

    @property
    def process_index(self) -> int: ...


Placement: TypeAlias = Sharding | PartitionSpec | Device | Host
"""Where one leaf goes. A PartitionSpec is of the mesh of `jax.set_mesh`."""


class Dataclass(Protocol):
    """A pytree that is a dataclass: a module of Equinox, a struct of Flax."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


LayoutFunction: TypeAlias = Callable[[str, jax.ShapeDtypeStruct], Placement | None]
Layout: TypeAlias = (
    Placement | Mesh | LayoutFunction | Mapping[Any, Any] | list[Any] | tuple[Any, ...] | Dataclass | None
)  # fmt: skip
"""Where restored arrays go: one place for all, a Mesh, a function of path and leaf, or a tree of places; None is
where the templates' arrays are."""
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
            row if row.saved else row._replace(given=_moved(row, place))
            for row, place in zip(each.rows, chosen, strict=True)
        ]
        for each, chosen in zip(wanted, _places(layout, wanted, params), strict=True)
    ]


def _moved(row: Row, place: Place) -> Any:
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
    return Target(place, kind, wants.dtype, wants.weak, impl)


def _check_fits(leaf: str, shape: tuple[int, ...], sharding: Sharding) -> None:
    try:
        if isinstance(sharding, NamedSharding) and len(sharding.spec) > len(shape):  # JAX says IndexError
            raise ValueError(f"the leaf has {len(shape)} axes, and {sharding.spec} has {len(sharding.spec)}")
        sharding.shard_shape(shape)
    except ValueError as problem:
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


def _places(layout: Layout, wanted: Sequence[Wanted], params: Wanted) -> list[list[Place]]:
    """The place of every row of each item."""
    if layout is None:
        return _places_of_templates(wanted, params)
    if isinstance(layout, Mesh):
        return _carried(layout, wanted)
    meshes = _Meshes([*wanted, params])
    if isinstance(layout, Sharding | jax.Device | Host):
        place = _place("every leaf", layout, meshes)
        return [[place] * len(each.rows) for each in wanted]
    chosen = _by_function(layout, params, meshes) if _is_function(layout) else _by_tree(layout, params, meshes)
    return [chosen if each.item == params.item else _follow(each, params, chosen) for each in wanted]


def _places_of_templates(wanted: Sequence[Wanted], params: Wanted) -> list[list[Place]]:
    """Where each template's leaf is. A leaf that has no place of its own follows the parameter that it mirrors."""
    meshes = _Meshes([*wanted, params])
    chosen = [_own(row, meshes) or HERE for row in params.rows]
    return [
        chosen if each.item == params.item else _own_or_follow(each, params, chosen, meshes) for each in wanted
    ]


def _own_or_follow(wanted: Wanted, params: Wanted, places: Sequence[Place], meshes: _Meshes) -> list[Place]:
    rest = _replicated(places) if wanted.item == "opt_state" else HERE
    followed = _follow(wanted, params, places, rest)
    return [
        _same(_own(row, meshes, place), place, row.wants.shape)
        for row, place in zip(wanted.rows, followed, strict=True)
    ]


def _own(row: Row, meshes: _Meshes, followed: Place = None) -> Place | None:
    """Where the template's leaf is; None for an abstract leaf that does not say.

    Of several meshes that an abstract leaf may mean, it is the one of the leaf that it follows.
    """
    if isinstance(row.given, jax.Array) and not row.given.committed:
        return HERE
    sharding = getattr(row.given, "sharding", None)
    return meshes.concrete(sharding, row.wants.path, followed) if isinstance(sharding, Sharding) else None


def _same(own: Place | None, followed: Place, shape: tuple[int, ...]) -> Place:
    """A leaf's own place, spelled as that of the leaf that it follows if both are the same place: P("x", None) and
    P("x") are equal for JAX's programs, and not for `==`."""
    if own is None:
        return followed
    both = isinstance(own, Sharding) and isinstance(followed, Sharding)
    return followed if both and own.is_equivalent_to(followed, len(shape)) else own


class _Meshes:
    """Finds the devices of a sharding that names only the axes of its mesh, as those of `jax.eval_shape` do."""

    def __init__(self, wanted: Iterable[Wanted]) -> None:
        self._wanted = tuple(wanted)

    @functools.cached_property
    def _known(self) -> list[Mesh]:
        """The mesh of `jax.set_mesh`, then those that the templates' arrays are on."""
        shardings = (getattr(row.given, "sharding", None) for each in self._wanted for row in each.rows)
        named = (sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding))
        return [mesh for mesh in (jax.sharding.get_mesh(), *dict.fromkeys(named)) if isinstance(mesh, Mesh)]

    def concrete(self, sharding: Sharding, leaf: str, followed: Place = None) -> Sharding | None:
        """The same on devices; None if it names no axis of any mesh."""
        mesh = getattr(sharding, "mesh", None)
        if not isinstance(sharding, NamedSharding) or not isinstance(mesh, AbstractMesh):
            return sharding
        if mesh.empty:
            return None
        kind = sharding.memory_kind or getattr(followed, "memory_kind", None)
        return NamedSharding(self._find(mesh, leaf, followed), sharding.spec, memory_kind=kind)

    def _find(self, abstract: AbstractMesh, leaf: str, followed: Place) -> Mesh:
        for mesh in (getattr(followed, "mesh", None), *self._known):
            if not isinstance(mesh, Mesh):
                continue
            if (mesh.axis_names, mesh.axis_sizes) == (abstract.axis_names, abstract.axis_sizes):
                return mesh
        if abstract.size != jax.device_count():
            raise LayoutError(
                f"the template's {leaf} is on a mesh of {abstract.size} devices that are not named, and there are "
                f"{jax.device_count()}: give layout=, or restore inside `with jax.set_mesh(mesh)`",
                leaf=leaf,
            )
        made = jax.make_mesh(abstract.axis_sizes, abstract.axis_names, axis_types=abstract.axis_types)
        _log.warning(
            "the template names a mesh %s and no devices: restored onto jax.make_mesh of all of them. To choose, "
            "give layout=, or restore inside `with jax.set_mesh(mesh)`", dict(abstract.shape)
        )  # fmt: skip
        self._known.append(made)
        return made


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


def _by_function(layout: LayoutFunction, params: Wanted, meshes: _Meshes) -> list[Place]:
    def place(row: Row) -> Place:
        leaf = row.wants if row.wants.kind == "jax" else row.saved
        answer = None
        if leaf is not None and row.wants.kind in ("jax", "key"):
            answer = layout(row.wants.path, abstract(leaf))
        return _answered(params, row, answer, meshes)

    return [place(row) for row in params.rows]


def _by_tree(layout: Any, params: Wanted, meshes: _Meshes) -> list[Place]:
    """A pytree like the params, or a prefix of one; None where the template's leaf is."""
    answers: list[Any] = []

    def spread(answer: Any, below: Any) -> None:
        answers.extend([answer] * len(jax.tree.leaves(below)))

    try:
        jax.tree.map(spread, layout, params.tree, is_leaf=_is_placement)
    except ValueError as problem:
        raise LayoutError(f"layout is no prefix of {params.item}: {problem}") from None
    return [_answered(params, row, answer, meshes) for row, answer in zip(params.rows, answers, strict=True)]


def _answered(params: Wanted, row: Row, answer: Any, meshes: _Meshes) -> Place:
    """The place that a tree or a function gives for a parameter; None leaves it where the template's leaf is."""
    if answer is None:
        return _own(row, meshes) or HERE
    return _place(f"{params.item}{row.wants.path}", answer, meshes)


def _is_placement(node: Any) -> bool:
    return node is None or isinstance(node, Sharding | PartitionSpec | jax.Device | Host)


def _place(leaf: str, answer: Any, meshes: _Meshes) -> Place:
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


# ---------------------------------------------------------------- what follows the params


def _follow(wanted: Wanted, params: Wanted, places: Sequence[Place], rest: Place | None = None) -> list[Place]:
    """Leaves that mirror a parameter (Adam's mu and nu) go where it goes, others to `rest` (default: replicated).

    A leaf mirrors the parameter that has its shape and whose whole path its own path ends with. Where there is
    none, the end of that path is enough: with optax.lookahead `.fast_state[0].mu['w']` mirrors `.fast['w']`.
    """
    rest = _replicated(places) if rest is None else rest
    whole, partly = _endings(params, places)

    def place(row: Row) -> Place:
        own = [(row.wants.keys[first:], row.wants.shape) for first in range(len(row.wants.keys) + 1)]
        return next((known[ending] for known in (whole, partly) for ending in own if ending in known), rest)

    return [place(row) for row in wanted.rows]


_Ending = tuple[Keys, tuple[int, ...]]


def _endings(params: Wanted, places: Sequence[Place]) -> tuple[dict[_Ending, Place], dict[_Ending, Place]]:
    """The places of the parameters by path and shape: by whole paths, and by ends that lead to one place only."""
    whole: dict[_Ending, Place] = {}
    partly: dict[_Ending, list[Place]] = {}
    for row, place in zip(params.rows, places, strict=True):
        keys, shape = row.wants.keys, row.wants.shape
        whole[keys, shape] = place
        for first in range(1, len(keys)):
            partly.setdefault((keys[first:], shape), []).append(place)
    agreed = {ending: found[0] for ending, found in partly.items() if all(each == found[0] for each in found)}
    return whole, agreed


def _replicated(places: Iterable[Place]) -> Place:
    """All of an array on every device of the mesh that the params are on."""
    for place in places:
        if isinstance(place, NamedSharding):
            return NamedSharding(place.mesh, PartitionSpec(), memory_kind=place.memory_kind)
    return next(iter(places), HERE)


def spans_processes(place: Any) -> bool:
    """Whether a place for arrays has devices of other processes."""
    if isinstance(place, NamedSharding):
        place = place.mesh
    if isinstance(place, AbstractMesh):  # stands for the mesh of `jax.set_mesh`
        place = jax.sharding.get_mesh()
    if isinstance(place, Mesh):
        devices = list(place.devices.flat)
    elif isinstance(place, Sharding):
        devices = list(place.device_set)
    else:
        devices = [place] if isinstance(place, jax.Device) else []
    return any(device.process_index != jax.process_index() for device in devices)
