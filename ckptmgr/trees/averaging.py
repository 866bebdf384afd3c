"""The mean of several trees, of which one is held at a time beside the sum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ckptmgr.trees import structure

_SUMS = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.complex64), np.dtype(np.complex128))
"""Dtypes that are added up as they are; smaller floats are added up in float32."""


def mean(trees: Iterable[tuple[str, Any]], item: str = "") -> Any:
    """The mean of trees on the host, leaf by leaf. Errors say the name of a tree, and `item` before a path.

    Floating point leaves are added up in float32 or wider, and get their dtype back. All other leaves (integers,
    bools, text, PRNG keys) must be equal in all trees. Raises ValueError that names the first leaf that differs.
    """
    average: _Mean | None = None
    for name, tree in trees:
        if average is None:
            average = _Mean(name, tree, item)
        else:
            average.add(name, tree)
        del tree  # before the next one is made
    if average is None:
        raise ValueError("there is nothing to average")
    return average.result()


class _Mean:
    """The sum so far."""

    def __init__(self, name: str, tree: Any, item: str) -> None:
        self._item = item
        leaves, self._treedef = jax.tree_util.tree_flatten_with_path(tree)
        self._first, self._count = name, 1
        self._kept = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
        """The leaves of the first tree that all trees must share, and the dtype and shape of the others."""
        self._sums: dict[str, np.ndarray[Any, Any]] = {}
        for path, leaf in self._kept.items():
            if _is_float(leaf):
                self._sums[path] = np.array(leaf, _wide(np.asarray(leaf).dtype))
                self._kept[path] = _Like(leaf)

    def add(self, name: str, tree: Any) -> None:
        found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
        for path in [*self._kept, *found]:
            if path not in found or path not in self._kept:
                there, lacking = (self._first, name) if path in self._kept else (name, self._first)
                raise ValueError(
                    f"{self._item}{path} is in {there} and not in {lacking}: only equal structures are averaged"
                )
        for path, leaf in found.items():
            kept = self._kept[path]
            if isinstance(kept, _Like):
                if not kept.fits(leaf):
                    raise ValueError(f"{self._item}{path} is {kept} in {self._first} and {_Like(leaf)} in {name}")
                np.add(self._sums[path], np.asarray(leaf), out=self._sums[path], casting="unsafe")
            elif not _equal(kept, leaf):
                where = f"{self._item}{path}"
                raise ValueError(
                    f"{where} is no floating point number, and differs between {self._first} and {name}"
                )
        self._count += 1

    def result(self) -> Any:
        leaves = [
            kept.cast(self._sums[path], self._count) if isinstance(kept, _Like) else kept
            for path, kept in self._kept.items()
        ]
        return jax.tree_util.tree_unflatten(self._treedef, leaves)


class _Like:
    """The shape and the dtype of a leaf, without its values."""

    def __init__(self, leaf: Any) -> None:
        array = np.asarray(leaf)
        self._is_python = isinstance(leaf, float | complex) and not isinstance(leaf, np.generic)
        self._shape, self._dtype = array.shape, array.dtype

    def __str__(self) -> str:
        return f"{self._dtype}[{','.join(map(str, self._shape))}]"

    def fits(self, leaf: Any) -> bool:
        return _is_float(leaf) and (np.shape(leaf), np.asarray(leaf).dtype) == (self._shape, self._dtype)

    def cast(self, total: np.ndarray[Any, Any], count: int) -> Any:
        total /= count
        found = total.astype(self._dtype, copy=False)
        return found.item() if self._is_python else found


def _is_float(leaf: Any) -> bool:
    if isinstance(leaf, str) or _is_key(leaf):
        return False
    return bool(jnp.issubdtype(np.asarray(leaf).dtype, np.inexact))


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and structure.is_key(leaf)


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype if dtype in _SUMS else np.dtype(np.float32)


def _equal(one: Any, other: Any) -> bool:
    if _is_key(one) or _is_key(other):
        return _is_key(one) and _is_key(other) and _equal(*map(jax.random.key_data, (one, other)))
    one, other = np.asarray(one), np.asarray(other)
    return (one.shape, one.dtype) == (other.shape, other.dtype) and one.tobytes() == other.tobytes()
