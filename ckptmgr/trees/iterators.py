"""Iterators: extras whose state is saved instead of themselves."""

from __future__ import annotations

import inspect
from typing import Any

import jax


def is_iterator(value: Any) -> bool:
    """Whether an extra is asked for its state: it has the methods, and is no pytree.

    `__getattr__` is not asked: `nnx.Rngs` answers every name, and draws a key for it.
    """
    is_tree = not jax.tree_util.all_leaves([value])
    return not is_tree and all(
        callable(inspect.getattr_static(value, name, None)) for name in ("get_state", "set_state")
    )


def is_global(value: Any) -> bool:
    """Whether an iterator says that its state is the same for all processes."""
    return is_iterator(value) and getattr(value, "is_global", False) is True
