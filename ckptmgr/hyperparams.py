"""Reads and sets hyperparameters in an optax state (`optax.inject_hyperparams`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

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
        found |= state.hyperparams
    if not found:
        raise ValueError(f"this opt_state holds no hyperparameters; {_HOW}")
    return found


def set_hyperparams(opt_state: Any, **values: Any) -> Any:
    """Returns `opt_state` with these hyperparameters set; dtype and sharding stay as they were.

    A hyperparameter that follows a schedule cannot be set, because every step computes it again.

    Raises ValueError for an unknown or scheduled name, TypeError for a value of another shape.
    """
    known = get_hyperparams(opt_state)
    scheduled = {name for state in _injected(opt_state) for name in _schedules(state)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{name!r} is not among the hyperparameters {sorted(known)}; {_HOW}")
        if name in scheduled:
            raise ValueError(f"{name!r} follows a schedule, so every step computes it; inject a number instead")
        if np.shape(value) != np.shape(known[name]):
            raise TypeError(f"{name!r} has shape {np.shape(known[name])}, not {np.shape(value)}")
    return optax.tree_utils.tree_set(
        opt_state, _is_hyperparam, **{name: _like(known[name], value) for name, value in values.items()}
    )


def _injected(opt_state: Any) -> list[Any]:
    """Every state of an injected optimizer, also inside chain, masked, multi_transform and others."""
    found = []

    def look(node: Any) -> bool:
        if isinstance(getattr(node, "hyperparams", None), Mapping):
            found.append(node)
        return False

    jax.tree_util.tree_flatten(opt_state, is_leaf=look)
    return found


def _schedules(state: Any) -> Mapping[str, Any]:
    return getattr(state, "hyperparams_states", None) or {}


def _is_hyperparam(path: Any, value: Any) -> bool:
    return any(getattr(step, "name", None) == "hyperparams" for step in path)


def _like(old: Any, new: Any) -> Any:
    if not isinstance(old, jax.Array):
        return type(old)(new)
    array = jnp.asarray(new, dtype=old.dtype)
    return jax.device_put(array, old.sharding) if old.committed else array
