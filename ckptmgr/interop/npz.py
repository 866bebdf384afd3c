"""numpy's .npz files: arrays by name, never objects."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from ckptmgr.interop import names

_MARK = "|"
"""Ends the name of an array whose dtype numpy's format does not know: "w|bfloat16" holds its raw bytes."""


def save(tree: Any, path: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Writes a tree; the names are the paths of its leaves, joined by "/"."""
    path = pathlib.Path(path)
    arrays = dict(_stored(name, names.host(name, leaf)) for name, leaf in names.flatten(tree).items())
    unfinished = path.with_name(f"{path.name}.part")
    with open(unfinished, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    os.replace(unfinished, path)
    return [path]


def _stored(name: str, array: np.ndarray[Any, Any]) -> tuple[str, np.ndarray[Any, Any]]:
    if not hasattr(ml_dtypes, array.dtype.name):
        return name, array
    return f"{name}{_MARK}{array.dtype.name}", array.view(f"u{array.dtype.itemsize}")


def load(path: str | os.PathLike[str]) -> Any:
    """Reads a file as nested dicts of numpy arrays."""
    with np.load(path, allow_pickle=False) as found:
        return names.nest(dict(_restored(name, found[name]) for name in found.files))


def _restored(name: str, array: np.ndarray[Any, Any]) -> tuple[str, np.ndarray[Any, Any]]:
    plain, mark, dtype = name.rpartition(_MARK)
    if not mark or not hasattr(ml_dtypes, dtype):
        return name, array
    return plain, array.view(getattr(ml_dtypes, dtype))
