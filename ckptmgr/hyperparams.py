"""Reads and sets hyperparameters in an optax state (`optax.inject_hyperparams`)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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

    def replaced(path: Sequence[Any], old: Any) -> Any:
        steps = [getattr(step, "name", getattr(step, "key", None)) for step in path]
        at = steps.index(_HYPERPARAMS) + 1 if _HYPERPARAMS in steps else len(steps)
        name = steps[at] if at < len(steps) else None
        return _like(name, old, values[name]) if name in values else old

    return jax.tree_util.tree_map_with_path(replaced, opt_state)


class _Injected(NamedTuple):
    """The state of an injected optimizer."""

    hyperparams: Mapping[str, Any]
    schedules: Mapping[str, Any]


def _injected(opt_state: Any) -> list[_Injected]:
    """Every state of an injected optimizer, also inside chain, masked, multi_transform, nnx.state and others."""
    found = []

    def look(node: Any) -> bool:
        part = node.get if isinstance(node, Mapping) else functools.partial(getattr, node)
        if isinstance(hyperparams := part(_HYPERPARAMS, None), Mapping):
            found.append(_Injected(hyperparams, part("hyperparams_states", None) or {}))
        return False

    jax.tree_util.tree_flatten(opt_state, is_leaf=look)
    return found


def _bare(value: Any) -> Any:
    """The number of a hyperparameter; Flax NNX has a node around it."""
    leaves = jax.tree_util.tree_leaves(value)
    return leaves[0] if len(leaves) == 1 else value


def _like(name: str, old: Any, new: Any) -> Any:
    """A value of the type, dtype and place of another: each injected optimizer may have its own."""
    made: Any
    if isinstance(old, jax.core.Tracer) or isinstance(new, jax.core.Tracer):  # inside of jax.jit
        return jnp.asarray(new, dtype=jnp.result_type(old))
    if isinstance(old, jax.Array):
        made = jnp.array(new, dtype=old.dtype)  # a copy for each: a train step may donate the state
    else:
        made = np.asarray(new, old.dtype) if isinstance(old, np.ndarray) else type(old)(new)
    if jnp.issubdtype(jnp.result_type(old), jnp.integer) and np.any(np.asarray(made) != np.asarray(new)):
        raise TypeError(
            f"{name!r} is a whole number, which {new} is not: make the optimizer with a float, as {name}=1.0"
        )
    return jax.device_put(made, old.sharding) if isinstance(old, jax.Array) and old.committed else made
