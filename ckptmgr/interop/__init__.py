"""Plain trees in from other formats, and out to them. Knows no manager."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable
from typing import Any

from ckptmgr.interop import msgpack, npz, pickles, safetensors, stock
from ckptmgr.interop.adopting import adopt

__all__ = ["adopt", "read", "write"]

_PICKLES = (".pkl", ".pickle", ".p")
_READS = (
    ".pkl, .pickle, .p, .safetensors, .index.json, .msgpack, .npz, or a directory of safetensors or of stock Orbax"
)
_WRITES = "FILE.safetensors, FILE.npz, or a directory for stock Orbax"


def read(path: str | os.PathLike[str], *, allow: Iterable[str] = ()) -> Any:
    """Reads a tree; the ending of the name tells the format.

    Args:
      path: a file, or a directory.
      allow: names ("module.name") that a pickle may use beside what is known to be harmless.

    Raises UnsafePickleError for a pickle that wants more, ValueError for an ending that is not known.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if path.suffix in _PICKLES:
        return pickles.load(path, allow=allow)
    if path.is_dir():
        has_tensors = any(path.glob("*.safetensors"))
        return safetensors.load(path) if has_tensors else stock.load(path)
    if path.suffix == ".safetensors" or path.name.endswith(".index.json"):
        return safetensors.load(path)
    if path.suffix in (".msgpack", ".npz"):
        return msgpack.load(path) if path.suffix == ".msgpack" else npz.load(path)
    raise ValueError(f"{path} is of no known format; known are {_READS}")


def write(tree: Any, path: str | os.PathLike[str], *, max_shard_bytes: int = 5_000_000_000) -> list[pathlib.Path]:
    """Writes a tree; the ending of the name tells the format. Gives the files written.

    Args:
      tree: arrays and numbers.
      path: FILE.safetensors, FILE.npz, or a new directory, for stock Orbax.
      max_shard_bytes: the largest safetensors file; a larger tree makes several, with an index.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix == ".safetensors":
        return safetensors.save(tree, path, max_shard_bytes=max_shard_bytes)
    if path.suffix == ".npz":
        return npz.save(tree, path)
    if path.suffix:
        raise ValueError(f"{path} is of no known format; known are {_WRITES}")
    return stock.save(tree, path)
