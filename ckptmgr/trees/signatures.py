"""Whether a tree is described as the one before it was, told without Python for each leaf."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ckptmgr.trees.structure import is_key


def signature(leaves: Sequence[Any]) -> list[Any]:
    """Equal for leaves that are described alike; deleted arrays never match.

    A caller waits for this at each save. So leaves of one type are asked together, and what they say is compared
    as lists: both without Python for each leaf, and an object that is the same as before is not looked into.
    """
    kinds = list(map(type, leaves))
    found: list[Any] = [kinds]
    for kind in dict.fromkeys(kinds):
        some = list(itertools.compress(leaves, map(operator.is_, kinds, itertools.repeat(kind))))
        if issubclass(kind, jax.core.Tracer):
            found.append(object())  # matches nothing; `describe` refuses it
        elif issubclass(kind, jax.Array):
            facts = _KEY_FACTS if is_key(some[0]) else _AVAL
            found += [list(map(facts, some)), list(map(_SHARDING, some)), any(map(_IS_DELETED, some)) and object()]
        elif issubclass(kind, np.ndarray):
            found.append(list(map(_SHAPE_AND_DTYPE, some)))
        elif issubclass(kind, jax.ShapeDtypeStruct):
            found.append(some)  # it has no values, and never changes
        elif kind is int:
            found.append((min(some) >= -(2**63), max(some) < 2**63))
    return found


_AVAL, _SHARDING = operator.attrgetter("aval"), operator.attrgetter("sharding")
"""The first is shape, dtype and weak type in one object, which arrays share."""
_IS_DELETED, _SHAPE_AND_DTYPE = operator.methodcaller("is_deleted"), operator.attrgetter("shape", "dtype")
_KEY_FACTS = _SHAPE_AND_DTYPE  # each array of keys makes its aval anew


def is_alike(one: Any, other: Any) -> bool:
    """Whether two trees have the same structure; what a node holds as static may refuse to be compared."""
    try:
        return bool(one == other)
    except (ValueError, TypeError):  # an array for an answer, or a PartitionSpec whose mesh is not set any more
        return False
