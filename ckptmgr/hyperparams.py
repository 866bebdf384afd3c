"""Reads and sets hyperparameters in an optax state (`optax.inject_hyperparams`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ckptmgr.trees.structure import is_weak, weaken

_HYPERPARAMS = "hyperparams"
_HOW = (
    "wrap the optimizer so that its state carries them:\n"
    "    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)"
)


def get_hyperparams(opt_state: Any) -> dict[str, Any]:
    """The injected hyperparameters of an optax state, by name.

    A name that several injected optimizers share is returned once; `set_hyperparams` sets it in all of them.

    Raises ValueError if there are none; the message shows how to inject them.
    """
    found: dict[str, Any] = {}
    for state in _injected(opt_state):
        found |= {name: _bare(value) for name, value in state.hyperparams.items()}
    if not found:
        raise ValueError(f"this opt_state holds no hyperparameters; {_HOW}")
    return found


def set_hyperparams(opt_state: Any, **values: Any) -> Any:
    """Returns `opt_state` with these hyperparameters set; dtype and sharding stay as they were.

    A hyperparameter that follows a schedule cannot be set, because every step computes it again.

    Raises ValueError for an unknown or scheduled name, TypeError for a value of another shape, or one that the
    dtype cannot hold: 0.5 where the optimizer was made with a whole number.
    """
    known = get_hyperparams(opt_state)
    states = _injected(opt_state)
    scheduled = {name for state in states for name in state.schedules}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{name!r} is not among the hyperparameters {sorted(known)}; {_HOW}")
        if name in scheduled:
            raise ValueError(f"{name!r} follows a schedule, so every step computes it; inject a number instead")
        for state in states:
            shape = np.shape(_bare(state.hyperparams.get(name, value)))
            if np.shape(value) != shape:
                raise TypeError(f"{name!r} has shape {shape}, not {np.shape(value)}")

    return _with(opt_state, values)


def _with(tree: Any, values: Mapping[str, Any]) -> Any:
    """The tree with these values in each of its injected optimizers."""
    nodes, treedef = jax.tree_util.tree_flatten(tree, is_leaf=_is_injected)
    changed = [_with_own(node, values) if _is_injected(node) else node for node in nodes]
    return jax.tree_util.tree_unflatten(treedef, changed)


def _with_own(state: Any, values: Mapping[str, Any]) -> Any:
    """The state of an injected optimizer with these values; there may be another one inside of it."""

    def replaced(path: Sequence[Any], old: Any) -> Any:
        name = _name(path)
        return _like(name, old, values[name]) if name in values else old

    children, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda node: node is not state)
    changed = [
        jax.tree_util.tree_map_with_path(replaced, child) if _name(path) == _HYPERPARAMS else _with(child, values)
        for path, child in children
    ]
    return jax.tree_util.tree_unflatten(treedef, changed)


def _name(path: Sequence[Any]) -> Any:
    """The name of the first step of a path."""
    return getattr(path[0], "name", getattr(path[0], "key", None))


class _Injected(NamedTuple):
    """The state of an injected optimizer."""

    hyperparams: Mapping[str, Any]
    schedules: Mapping[str, Any]


def _injected(opt_state: Any) -> list[_Injected]:
    """Every state of an injected optimizer, also inside chain, masked, multi_transform, nnx.state and others."""
    found = []

    def look(node: Any) -> bool:
        if _is_injected(node):
            part = _parts(node)
            found.append(_Injected(part(_HYPERPARAMS, None), part("hyperparams_states", None) or {}))
        return False

    jax.tree_util.tree_flatten(opt_state, is_leaf=look)
    return found


def _is_injected(node: Any) -> bool:
    """Whether it is the state of an injected optimizer, and no parameter or label that is called hyperparams.

    Every such state counts its steps. Its inner state may be empty, and then `nnx.state` leaves it out.
    """
    part = _parts(node)
    return isinstance(part(_HYPERPARAMS, None), Mapping) and part("count", None) is not None


def _parts(node: Any) -> Callable[..., Any]:
    """What gives a part of a node by its name, or a default."""
    return node.get if isinstance(node, Mapping) else functools.partial(getattr, node)


def _bare(value: Any) -> Any:
    """The number of a hyperparameter; Flax NNX has a node around it."""
    leaves = jax.tree_util.tree_leaves(value)
    return leaves[0] if len(leaves) == 1 else value


def _like(name: str, old: Any, new: Any) -> Any:
    """A value of the type, dtype and place of another: each injected optimizer may have its own."""
    made: Any
    if isinstance(old, jax.core.Tracer) or isinstance(new, jax.core.Tracer):  # inside of jax.jit
        return _as_weak(old, jnp.asarray(new, dtype=jnp.result_type(old)))
    if isinstance(old, jax.Array):
        made = jnp.array(new, dtype=old.dtype)  # a copy for each: a train step may donate the state
    else:
        made = np.asarray(new, old.dtype) if isinstance(old, np.ndarray) else type(old)(new)
    if jnp.issubdtype(jnp.result_type(old), jnp.integer) and np.any(np.asarray(made) != np.asarray(new)):
        raise TypeError(
            f"{name!r} is a whole number, which {new} is not: make the optimizer with a float, as {name}=1.0"
        )
    made = _as_weak(old, made)
    return jax.device_put(made, old.sharding) if isinstance(old, jax.Array) and old.committed else made


def _as_weak(old: Any, new: Any) -> Any:
    """An array as weak as another: a train step is compiled again for one that is not."""
    return weaken([new])[0] if is_weak(old) else new
