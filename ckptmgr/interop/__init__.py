"""Reads plain trees from other formats, and writes them. Uses no manager.

A new format is a module here with `load` or `save`. `reading` (`_ENDINGS`, `_LOADS`, `_KNOWN`) finds `load`, and
`write` below finds `save`. `importing` sorts what was read into the arguments of a save; `adopting` gives steps of
stock Orbax a manifest. The help in `cli/app.py` lists the formats."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from ckptmgr.interop import npz, safetensors
from ckptmgr.interop.adopting import adopt
from ckptmgr.interop.importing import Incoming, incoming
from ckptmgr.interop.reading import read
from ckptmgr.orbax import one_tree

__all__ = ["Incoming", "adopt", "incoming", "read", "write"]

_WRITES = "FILE.safetensors, FILE.npz, or a directory for stock Orbax"


def write(tree: Any, path: str | os.PathLike[str], *, max_shard_bytes: int = 5_000_000_000) -> list[pathlib.Path]:
    """Writes a tree; the ending of the name gives the format. Returns the files that were written.

    Args:
      tree: arrays and numbers.
      path: FILE.safetensors, FILE.npz, or a new directory (for stock Orbax).
      max_shard_bytes: the largest safetensors file; a larger tree makes several, with an index.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix == ".safetensors":
        return safetensors.save(tree, path, max_shard_bytes=max_shard_bytes)
    if path.suffix == ".npz":
        return npz.save(tree, path)
    if path.suffix:
        raise ValueError(f"{path} has an unknown format; known are {_WRITES}")
    return one_tree.save(tree, path)
