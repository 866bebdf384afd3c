"""A checkpoint as one composite item: params, opt_state, step, metrics and extras.

`compose` checks every value before anything is written.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ckptmgr.arrays.to_devices import mesh_of
from ckptmgr.format.manifest import METRICS, OPT_STATE, PARAMS, RESERVED, STEP
from ckptmgr.format.names import UNFINISHED
from ckptmgr.specs import TreeSpec
from ckptmgr.trees import structure
from ckptmgr.trees.iterators import is_global, is_iterator
from ckptmgr.trees.signatures import is_alike, signature
from ckptmgr.trees.structure import is_key

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_FILES = frozenset({
    "manifest.json", "PINNED", "trust.json", "commit_success.txt", "checkpoint", "default", "descriptor", "AUTO",
    "_CHECKPOINT_METADATA", "_CHECKPOINT_DELETION", "_METADATA", "_sharding", "_strings.json", "array_metadatas",
    "manifest.ocdbt", "d", "orbax.checkpoint",
})  # fmt: skip
"""Names with another meaning in the directory of a step, for ckptmgr or for Orbax (v0 and v1)."""


@dataclasses.dataclass(frozen=True)
class Tree:
    """An item of arrays, flattened and checked."""

    spec: TreeSpec
    leaves: Sequence[Any]
    is_own: bool = False
    """Whether each process of a job may have its own."""


@dataclasses.dataclass(frozen=True)
class Value:
    """An item of JSON. `get` is called after `save` has returned, so that no caller waits for a metric."""

    get: Callable[[], Any]
    kind: Literal["json", "bytes"] = "json"
    is_own: bool = False
    """Whether each process of a job may have its own."""


# ---------------------------------------------------------------- going in


class _Known(NamedTuple):
    """The structure of an item, for as long as the key is equal."""

    key: Any
    spec: TreeSpec
    spelled: str | None
    """The containers in words, if a dict has keys that are not names: to `==`, a key 1 is a key True."""


class Composer:
    """Makes the items of a step; remembers the structure of the last one, which is mostly the same."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def compose(
        self, step: int, params: Any, opt_state: Any, extras: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> dict[str, Tree | Value]:
        """Raises UnsupportedLeafError, TypeError or ValueError that names what cannot be saved."""
        for name, given in (("extras", extras), ("metrics", metrics)):
            if not isinstance(given, Mapping):
                raise TypeError(f"{name} takes a mapping of names to values, not {type(given).__name__}")
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
        key = (treedef, signature(leaves))
        known = self._known.get(item)
        if known is None or not is_alike(known.key, key) or known.spelled not in (None, str(treedef)):
            spec = structure.describe(tree, item=item)
            known = _Known(key, spec, None if structure.has_names_alone(spec.outline) else str(treedef))
        self._known[item] = known._replace(key=key)  # its objects are most likely those of the next step
        return Tree(known.spec, leaves)

    def _extra(self, name: str, value: Any) -> Tree | Value:
        check_name(name)
        is_own = not is_global(value)
        if is_iterator(value):
            value = value.get_state()
        if isinstance(value, bytes):
            return Value(functools.partial(_to_base64, value), "bytes", is_own)
        if _is_json(value):  # a copy: the caller goes on
            return Value(functools.partial(json.loads, json.dumps(value)), "json", is_own)
        return dataclasses.replace(self.tree(name, value), is_own=is_own)


def check_name(name: Any) -> None:
    """Raises ValueError if no entry of extras can have this name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name an entry of extras: use letters, digits, '_', '.' and '-'")
    if name in RESERVED | _FILES or UNFINISHED in name or name.startswith("ocdbt.process_"):
        raise ValueError(
            f"{name!r} cannot name an entry of extras: a checkpoint has an item or a file of that name"
        )


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
    return Value(lambda: {name: float(value) for name, value in jax.device_get(checked).items()})


def _metric(name: Any, value: Any) -> Any:
    if not isinstance(name, str):
        raise TypeError(f"metrics: the name {name!r} is not a str")
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"metrics: {name!r} is a tracer: save outside of jax.jit")
    if isinstance(value, jax.Array) and value.is_deleted():
        raise ValueError(f"metrics: {name!r} was deleted or donated before it was given to save")
    if isinstance(value, jax.Array) and value.ndim == 0 and not jnp.iscomplexobj(value) and not is_key(value):
        # A loss may be either: nothing is computed here. The mesh of `jax.set_mesh` may be another than its own.
        with jax.debug_nans(False), jax.debug_infs(False), jax.set_mesh(mesh_of(value.sharding)):
            return jnp.copy(value)  # not waited for, and ours: the caller may donate its own
    if isinstance(value, int | float) or _is_real_number(value):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"metrics: {name!r} is too large for a float") from None
    raise TypeError(f"metrics: {name!r} is {value!r}, not one number")


def _is_real_number(value: Any) -> bool:
    """Whether it is one number of numpy, or of a type such as bfloat16, which is no np.number."""
    if not isinstance(value, np.generic | np.ndarray) or value.ndim:
        return False
    return bool(jnp.issubdtype(value.dtype, jnp.number) or value.dtype == bool) and not jnp.iscomplexobj(value)
