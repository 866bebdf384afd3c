"""From one mesh to another: devices for a sharding that names none, and saved PartitionSpecs on a new mesh."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from ckptmgr.errors import LayoutError
from ckptmgr.specs import Row
from ckptmgr.trees.layouts import Place, Wanted

_log = logging.getLogger("ckptmgr")


def sharding_of(leaf: Any, default: Any = None) -> Any:
    """The sharding of a leaf of a template; a PartitionSpec if it has nothing more, and no mesh is set."""
    try:
        return getattr(leaf, "sharding", default)
    except TypeError:  # JAX makes it of the mesh that is set now
        return PartitionSpec()


class Meshes:
    """Finds the devices of a sharding that names only the axes of its mesh, as those of `jax.eval_shape` do."""

    def __init__(self, wanted: Iterable[Wanted]) -> None:
        self._wanted = tuple(wanted)

    @functools.cached_property
    def _known(self) -> list[Mesh]:
        """The mesh of `jax.set_mesh`, then those that the templates' arrays are on."""
        shardings = (sharding_of(row.given) for each in self._wanted for row in each.rows)
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


def carried(mesh: Mesh, wanted: Sequence[Wanted]) -> list[list[Place]]:
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
