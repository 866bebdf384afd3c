"""Reads plain trees from other formats, and writes them. Uses no manager.

A new format is a module here with `load` or `save`. `reading` (`_ENDINGS`, `_LOADS`, `_KNOWN`) finds `load`, and
`write` below finds `save`. `importing` sorts what was read into the arguments of a save; `adopting` gives steps of
stock Orbax a manifest. The help in `cli/converting.py` lists the formats."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from ckptmgr.interop import npz, safetensors
from ckptmgr.interop.adopting import adopt, without_manifest
from ckptmgr.interop.importing import Incoming, incoming
from ckptmgr.interop.reading import read
from ckptmgr.orbax import one_tree

__all__ = [
    "Incoming",
    "adopt",
    "check_format",
    "incoming",
    "local",
    "read",
    "replaced_by",
    "without_manifest",
    "write",
]

_WRITES = "FILE.safetensors, FILE.npz, or a directory for stock Orbax"


def write(tree: Any, path: str | os.PathLike[str], *, max_shard_bytes: int = 5_000_000_000) -> list[pathlib.Path]:
    """Writes a tree; the ending of the name gives the format. Returns the files that were written.

    Args:
      tree: arrays and numbers.
      path: FILE.safetensors, FILE.npz, or a new directory (for stock Orbax).
      max_shard_bytes: the largest safetensors file; a larger tree makes several, with an index.
    """
    path = local(path)
    check_format(path)
    if path.suffix == ".safetensors":
        return safetensors.save(tree, path, max_shard_bytes=max_shard_bytes)
    if path.suffix == ".npz":
        return npz.save(tree, path)
    return one_tree.save(tree, path)


def local(path: str | os.PathLike[str]) -> pathlib.Path:
    """A path on a disk; raises ValueError for one in a bucket."""
    if "://" in os.fspath(path):
        raise ValueError(f"{path} is not on a disk: write a file here, and copy it there")
    return pathlib.Path(path).expanduser()


def check_format(path: pathlib.Path) -> None:
    """Raises ValueError if `write` does not know the format that the name of this path gives."""
    if path.suffix not in ("", ".safetensors", ".npz"):
        raise ValueError(f"{path} has an unknown format; known are {_WRITES}")


def replaced_by(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that a `write` to this path replaces or removes."""
    found = {path} if path.exists() or path.is_symlink() else set()
    return sorted(found | set(safetensors.older(path) if path.suffix == ".safetensors" else ()))
