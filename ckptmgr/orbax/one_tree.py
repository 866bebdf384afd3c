"""Directories of stock Orbax that hold one tree and are not part of a run."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


def save(tree: Any, directory: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Writes a tree with Orbax's own StandardCheckpointer."""
    path = pathlib.Path(os.path.abspath(directory))
    for name in (path, path.with_name(f"{path.name}.orbax-checkpoint-tmp")):
        if name.is_symlink():  # Orbax would fail in the background, and then wait for minutes
            raise FileExistsError(f"{name} is a symlink, and ckptmgr does not write through symlinks; remove it")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return [path]


def load(directory: str | os.PathLike[str]) -> Any:
    """Reads a tree of Orbax's StandardCheckpointer or PyTreeCheckpointer as numpy arrays in plain containers."""
    path = pathlib.Path(os.path.abspath(directory))
    _refuse_steps(path)
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        if metadata is None:
            raise ValueError(f"{path} is not a tree that Orbax has saved: it has no _METADATA")
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=on_host))


def _refuse_steps(path: pathlib.Path) -> None:
    """Raises ValueError for a step or a run of Orbax: what to name in its place."""
    if (path / "_METADATA").exists():
        return
    items = sorted(each for each in path.glob("*") if (each / "_METADATA").exists())
    if items:
        raise ValueError(f"{path} is a step of Orbax; name one of its items: {', '.join(map(str, items))}")
    if any(path.glob("*/*/_METADATA")):
        raise ValueError(f"{path} is a run of Orbax, which needs no import: name it as the run")
