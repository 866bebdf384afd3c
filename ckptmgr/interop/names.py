"""Flat names for the leaves of a tree: safetensors and .npz files have names instead of containers."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from ckptmgr.errors import UnsupportedLeafError

DEEPEST = 100
"""How deep the containers of a tree that is read may be nested: JAX and Python recurse into them."""


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by their paths, joined by "/": dict keys, places in sequences, names of fields."""
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = "/".join(_part(key) for key in path)
        if name in found:
            raise UnsupportedLeafError(f"two leaves would have the name {name!r}; rename a key", leaf=name)
        found[name] = leaf
    return found


def _part(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def nest(flat: dict[str, Any]) -> Any:
    """Nested dicts, from names joined by "/"."""
    root: dict[str, Any] = {}
    for name, leaf in flat.items():
        *above, last = name.split("/")
        if len(above) > DEEPEST:
            raise ValueError(f"{name[:100]!r}... is nested more than {DEEPEST} deep")
        node = root
        for part in above:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name!r} is below another leaf")
        if last in node:
            raise ValueError(f"{name!r} is a leaf, and has leaves below it")
        node[last] = leaf
    return root[""] if set(root) == {""} else root


def host(name: str, leaf: Any) -> np.ndarray[Any, Any]:
    """A leaf as a numpy array in C order, which files have."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # type: ignore[attr-defined]
        raise UnsupportedLeafError(
            f"{name or 'the tree'} holds PRNG keys, for which such a file has no dtype; jax.random.key_data makes "
            "an array of them",
            leaf=name,
        )
    return np.asarray(leaf, order="C")
