"""The plan of a restore: which leaf of a step is read for which leaf of the templates, and where it goes.

It is kept, and serves every restore that asks for the same of steps of the same structure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Sharding

from ckptmgr.format.manifest import Item, Manifest
from ckptmgr.restoring import extras, matching, reading
from ckptmgr.restoring.matching import Request
from ckptmgr.specs import StructureDiff
from ckptmgr.trees import iterators
from ckptmgr.trees import placement as layouts
from ckptmgr.trees.layouts import Host
from ckptmgr.trees.signatures import is_alike, signature


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a restore does once its step is chosen."""

    passed: StructureDiff
    """What `partial` and `cast` let pass."""
    sources: Mapping[str, int | None]
    """Whose state of an item is read, where the processes that saved it had each their own; None for all."""
    trees: reading.Plan
    structures: Mapping[str, Any]
    """The treedef of the template of each item that has one: what is equal to it may not be the same."""


class Planner:
    """Makes plans, and keeps the last one."""

    def __init__(self, max_host_bytes: int | None = None) -> None:
        self._max_host_bytes = max_host_bytes
        self._known: tuple[Any, Mapping[str, Item], Plan] | None = None

    def plan(self, manifest: Manifest, templates: Mapping[str, Any], request: Request, *, is_local: bool) -> Plan:
        """Raises StructureMismatchError, LayoutError or ValueError for what does not fit."""
        request.check_names({*manifest.items, *templates})
        asked, known = _asked(manifest, templates, request, is_local), self._known
        if asked is not None and known is not None:
            before, items, kept = known
            if _are(items, manifest.items) and is_alike(before, asked):
                return dataclasses.replace(kept, structures=_structures(templates))
        plan = _make(manifest, templates, request, is_local, self._max_host_bytes)
        if asked is not None and not plan.passed:
            self._known = asked, manifest.items, plan
        return plan


def _make(
    manifest: Manifest, templates: Mapping[str, Any], request: Request, is_local: bool, max_host_bytes: int | None
) -> Plan:
    matched, passed = matching.match(manifest, templates, request)
    params = matching.params_of(manifest, matched)
    if passed.missing and request.layout is not None:
        kept = layouts.kept(request.layout, matched, params)
        matched = [dataclasses.replace(each, rows=rows) for each, rows in zip(matched, kept, strict=True)]
    targets = layouts.targets(request.layout, matched, params)
    sources = {
        name: extras.source(name, manifest.items[name], template, request.layout)
        for name, template in templates.items()
        if name in manifest.items
    }
    structures = _structures({each.item: each.template for each in matched})
    if not passed:  # then nothing is taken from the templates, and their arrays need not be held
        matched = [each.without_values() for each in matched]
    trees = reading.Plan(manifest, matched, targets, sources, is_local=is_local, max_host_bytes=max_host_bytes)
    return Plan(passed, sources, trees, structures)


def _structures(templates: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: template for name, template in templates.items() if template is not None}
    return {name: jax.tree_util.tree_structure(template) for name, template in given.items()}


def _are(known: Mapping[str, Item], items: Mapping[str, Item]) -> bool:
    """Whether these are the very same items, as those of manifests that say the same are."""
    return known.keys() == items.keys() and all(known[name] is item for name, item in items.items())


def _asked(manifest: Manifest, templates: Mapping[str, Any], request: Request, is_local: bool) -> Any:
    """All that a plan depends on beside the items; None if it depends on more, or warns of something each time."""
    is_plain = request.layout is None or isinstance(request.layout, Sharding | jax.Device | Host)
    if not is_plain or request.rename or request.optimizer is not None:
        return None
    trees = {name: _spelled(manifest.items.get(name), template) for name, template in templates.items()}
    if None in trees.values():
        return None
    widest = jax.dtypes.canonicalize_dtype("float64")  # which jax_enable_x64 decides
    around = (jax.sharding.get_mesh(), widest, manifest.written_here, is_local)
    return list(trees.items()), request.layout, around


def _spelled(item: Item | None, template: Any) -> Any:
    """A template without its values; None if that does not tell what comes back."""
    is_iterator = iterators.is_iterator(template)
    if template is None or (is_iterator and item is not None and item.kind != "arrays"):
        return [is_iterator, iterators.is_global(template)]
    if is_iterator or item is None or item.kind != "arrays":
        return None
    leaves, treedef = jax.tree_util.tree_flatten(template)
    arrays = tuple(kind for kind in set(map(type, leaves)) if issubclass(kind, jax.Array))
    placed = (*arrays, jax.ShapeDtypeStruct)
    try:
        shardings = {id(each := leaf.sharding): each for leaf in leaves if type(leaf) in placed}
    except TypeError:  # a PartitionSpec outside of `jax.set_mesh`
        return None
    if any(isinstance(getattr(each, "mesh", None), AbstractMesh) for each in shardings.values()):
        return None  # which devices it stands for depends on what is around, and may be said
    spelled = str(treedef)  # to `==`, a key 1 is a key True
    return treedef, spelled, signature(leaves), [type(leaf) in arrays and leaf.committed for leaf in leaves]
