"""A checkpoint as one composite item: params, opt_state, step, metrics and extras, in and out.

Going in, `compose` checks every value before anything is written. Coming out, `match` pairs the leaves
of each template with those of the checkpoint before anything is read.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ckptmgr import difference, structure
from ckptmgr.difference import LeafDiff, StructureDiff
from ckptmgr.errors import UnsupportedLeafError
from ckptmgr.manifest import Item, Manifest
from ckptmgr.structure import LeafSpec, Row, TreeSpec, is_weak

PARAMS, OPT_STATE, STEP, METRICS = "params", "opt_state", "step", "metrics"
_RESERVED = frozenset({PARAMS, OPT_STATE, STEP, METRICS})
_log = logging.getLogger("ckptmgr")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclasses.dataclass(frozen=True)
class Tree:
    """An item of arrays, flattened and checked."""

    spec: TreeSpec
    leaves: Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Value:
    """An item of JSON: `get` is called once the caller has gone on, so that a metric is never waited for."""

    get: Callable[[], Any]
    kind: Literal["json", "bytes"] = "json"


# ---------------------------------------------------------------- going in


class Composer:
    """Makes the items of a step; remembers the structure of the last one, which is mostly the same."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, TreeSpec]] = {}

    def compose(
        self, step: int, params: Any, opt_state: Any, extras: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> dict[str, Tree | Value]:
        """Raises UnsupportedLeafError, TypeError or ValueError naming what cannot be saved."""
        found: dict[str, Tree | Value] = {}
        if params is not None:
            found[PARAMS] = self.tree(PARAMS, params)
        if opt_state is not None:
            found[OPT_STATE] = self.tree(OPT_STATE, opt_state)
        for name, value in extras.items():
            found[name] = self._extra(name, value)
        return found | {STEP: Value(lambda: step), METRICS: _metrics(metrics)}

    def tree(self, item: str, tree: Any) -> Tree:
        leaves, treedef = jax.tree_util.tree_flatten(tree)
        key = (treedef, list(map(_signature, leaves)))
        known = self._known.get(item)
        if known is None or known[0] != key:
            known = self._known[item] = (key, structure.describe(tree, item=item))
        return Tree(known[1], leaves)

    def _extra(self, name: str, value: Any) -> Tree | Value:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _RESERVED:
            raise ValueError(
                f"{name!r} cannot name an entry of extras: letters, digits, '_', '.' and '-', and none of "
                f"{', '.join(sorted(_RESERVED))}"
            )
        if hasattr(value, "get_state") and hasattr(value, "set_state"):
            value = value.get_state()
        if isinstance(value, bytes):
            return Value(functools.partial(_to_base64, value), "bytes")
        if _is_json(value):
            return Value(functools.partial(json.loads, json.dumps(value)))  # a copy: the caller goes on
        return self.tree(name, value)


def _signature(leaf: Any) -> Any:
    """Equal for leaves that are stored alike; a deleted array is like no other, and looked at again."""
    if isinstance(leaf, jax.Array):
        return leaf.shape, leaf.dtype, leaf.sharding, is_weak(leaf), leaf.is_deleted()
    if isinstance(leaf, np.ndarray):
        return type(leaf), leaf.shape, leaf.dtype
    if isinstance(leaf, int) and not isinstance(leaf, bool):
        return int, -(2**63) <= leaf < 2**63
    return type(leaf)


def _to_base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _is_json(value: Any) -> bool:
    """Whether a value comes back from JSON as it was."""
    if type(value) is dict:
        return all(type(key) is str for key in value) and all(map(_is_json, value.values()))
    if type(value) is list:
        return all(map(_is_json, value))
    return value is None or type(value) in (str, bool, int, float)


def _metrics(metrics: Mapping[str, Any]) -> Value:
    checked = {name: _metric(name, value) for name, value in metrics.items()}
    for value in checked.values():
        if isinstance(value, jax.Array):
            value.copy_to_host_async()
    return Value(lambda: {name: float(value) for name, value in checked.items()})


def _metric(name: Any, value: Any) -> Any:
    if not isinstance(name, str):
        raise TypeError(f"metrics: the name {name!r} is not a str")
    if isinstance(value, jax.Array) and value.ndim == 0:
        return jnp.copy(value)  # not waited for, and ours: the caller may donate its own
    if isinstance(value, int | float | np.number | np.ndarray) and np.ndim(value) == 0:
        return float(value)
    raise TypeError(f"metrics: {name!r} is {value!r}, not one number")


# ---------------------------------------------------------------- coming out


@dataclasses.dataclass(frozen=True)
class Matched:
    """One item of the checkpoint beside its template: a row for each leaf of the result."""

    item: str
    template: Any
    rows: Sequence[Row]
    outline: Any = None
    """What to make of the leaves when there is no template: plain containers."""

    @property
    def tree(self) -> Any:
        """A tree of the result's structure, whatever its leaves are."""
        return self.assemble(list(range(len(self.rows)))) if self.template is None else self.template

    def assemble(self, values: Sequence[Any]) -> Any:
        if self.template is None:
            return structure.rebuild(self.outline, values)
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(self.template), values)


@dataclasses.dataclass(frozen=True)
class Request:
    """What a caller of `restore` asked for."""

    params: Any = None
    opt_state: Any = None
    optimizer: Any = None
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layout: Any = None
    cast: bool = False
    partial: bool = False
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    broadcast: bool = False

    def __post_init__(self) -> None:
        if self.optimizer is not None and self.opt_state is not None:
            raise ValueError("restore takes opt_state or optimizer, not both: each stands for the other")

    def templates(self, manifest: Manifest) -> dict[str, Any]:
        """The template of each item that is to be read; None where it is to come back as it was saved."""
        trees = {PARAMS: self.params, OPT_STATE: self.opt_state}
        asked = {name: template for name, template in trees.items() if template is not None}
        if self.optimizer is not None:
            asked = {PARAMS: self.params, OPT_STATE: _state_template(manifest, self.optimizer, self.params)}
        asked |= self.extras
        return asked or _everything(manifest)


def _everything(manifest: Manifest) -> dict[str, None]:
    """What comes back when no template is given; what is not read is said."""
    unread = {name: item.why for name, item in manifest.items.items() if item.kind == "unread"}
    for name, why in unread.items():
        _log.warning("step %d: %s is not restored: %s", manifest.step, name, why)
    return {name: None for name in manifest.items if name not in (STEP, METRICS, *unread)}


def match(manifest: Manifest, templates: Mapping[str, Any], request: Request) -> list[Matched]:
    """Pairs every template with its item; raises StructureMismatchError that names all that differs."""
    allowed = ["dtype"] * request.cast + ["missing", "unexpected"] * request.partial
    diff, matched = StructureDiff(), []
    for name, template in templates.items():
        item = manifest.items.get(name)
        if item is not None and item.kind == "unread":
            raise UnsupportedLeafError(f"step {manifest.step}: {name} is not restored: {item.why}", leaf=name)
        if item is None and name not in _RESERVED:
            diff += StructureDiff((LeafDiff(name, None, None, "missing"),)).without(*allowed)
        elif item is None or item.kind == "arrays":
            pair, differs = _match_tree(name, item or Item("arrays"), template, request.rename)
            matched.append(pair)
            diff += differs.without(*allowed)
    difference.raise_if_different(diff, " and ".join(templates), _where_else(manifest, templates))
    return matched


def _where_else(manifest: Manifest, templates: Mapping[str, Any]) -> str:
    """What to do if params or opt_state are asked for in a checkpoint that others wrote under other names."""
    absent = [name for name in (PARAMS, OPT_STATE) if name in templates and name not in manifest.items]
    others = [name for name, item in manifest.items.items() if item.kind == "arrays" and name not in _RESERVED]
    if not absent or not others:
        return ""
    return (
        f"it has no {' and no '.join(absent)}; give a template to what it has: extras={{{others[0]!r}: template}}"
    )


def params_of(manifest: Manifest, matched: Sequence[Matched]) -> Matched:
    """The parameters among these items, or, if they are not to be restored, as they were saved."""
    known = next((each for each in matched if each.item == PARAMS), None)
    return known or _match_tree(PARAMS, manifest.items.get(PARAMS, Item("arrays")), None, {})[0]


def _match_tree(name: str, item: Item, template: Any, rename: Mapping[str, str]) -> tuple[Matched, StructureDiff]:
    saved = item.tree
    if template is None:
        rows = [Row(leaf, leaf) for leaf in saved.leaves]
        return Matched(name, None, rows, saved.outline), StructureDiff()
    template = state_of(template)
    wants = structure.describe(template, item=name, is_template=True)
    known = difference.renamed(saved, rename, wants)
    return Matched(name, template, _rows(saved, known, wants, template)), difference.compare(known, wants, name)


def compare(manifest: Manifest, params: Any, opt_state: Any) -> StructureDiff:
    """How templates differ from a checkpoint."""
    given = {name: tree for name, tree in ((PARAMS, params), (OPT_STATE, opt_state)) if tree is not None}
    found = StructureDiff()
    for name, template in given.items():
        found += _match_tree(name, manifest.items.get(name, Item("arrays")), template, {})[1]
    return found


def _rows(saved: TreeSpec, known: TreeSpec, wants: TreeSpec, template: Any) -> list[Row]:
    there = {leaf.keys: original for leaf, original in zip(known.leaves, saved.leaves, strict=True)}
    given = jax.tree_util.tree_leaves(template)
    return [Row(there.get(leaf.keys), leaf, own) for leaf, own in zip(wants.leaves, given, strict=True)]


def _state_template(manifest: Manifest, optimizer: Any, params: Any) -> Any:
    """The abstract opt_state of an optax optimizer, from the params template or those saved."""
    if params is None:
        tree = manifest.items[PARAMS].tree if PARAMS in manifest.items else TreeSpec((), None)
        params = structure.rebuild(tree.outline, list(map(_abstract, tree.leaves)))
    return jax.eval_shape(optimizer.init, params)


def _abstract(leaf: LeafSpec) -> Any:
    if leaf.kind == "key":
        return jax.eval_shape(lambda: jnp.broadcast_to(jax.random.key(0, impl=leaf.impl), leaf.shape))
    return jax.eval_shape(lambda: jnp.zeros(leaf.shape, leaf.dtype))


def from_json(item: Item, value: Any) -> Any:
    """The value of an item that is not a tree."""
    return base64.b64decode(value) if item.kind == "bytes" else value


def state_of(template: Any) -> Any:
    """The template of an extra's arrays: that of an iterator is the state it has now."""
    return template.get_state() if hasattr(template, "set_state") else template


def handed_over(template: Any, value: Any) -> Any:
    """A restored extra: the value, or the caller's own iterator once it has been set to it."""
    if not hasattr(template, "set_state"):
        return value
    template.set_state(value)
    return template
