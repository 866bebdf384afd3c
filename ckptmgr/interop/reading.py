"""Reads a tree of another format, which the ending of the name gives, or the first bytes."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ckptmgr.errors import CheckpointError
from ckptmgr.interop import msgpack, npz, pickles, safetensors
from ckptmgr.orbax import one_tree

_ENDINGS = {
    ".pkl": "pickle", ".pickle": "pickle", ".p": "pickle", ".safetensors": "safetensors", ".json": "safetensors",
    ".msgpack": "msgpack", ".npz": "npz",
}  # fmt: skip
_LOADS: Mapping[str, Callable[[pathlib.Path], Any]] = {
    "safetensors": safetensors.load, "msgpack": msgpack.load, "npz": npz.load,
}  # fmt: skip
_KNOWN = (
    ".pkl, .pickle, .p, .safetensors, .index.json, .msgpack, .npz, checkpoint_N of flax, or a directory of "
    "safetensors or of stock Orbax"
)


def read(path: str | os.PathLike[str], *, allow: Iterable[str] = ()) -> Any:
    """Reads a tree. The ending of the name gives the format; without a known ending the first bytes do.

    Args:
      path: a file, or a directory.
      allow: names ("module.name") that a pickle may use in addition to those known to be harmless.

    Raises UnsafePickleError for a pickle that uses other names, ValueError for an unknown format, a damaged file,
    or a file that would need much more memory than its size.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists() and path.suffix != ".safetensors":
        raise FileNotFoundError(f"there is no file {path}")
    if path.is_dir():
        has_tensors = any(path.glob("*.safetensors")) or (path / safetensors.INDEX).exists()
        return _checked("safetensors", path) if has_tensors else one_tree.load(path)
    if path.suffix == ".safetensors":
        path = safetensors.found(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    format_ = _ENDINGS.get(path.suffix) or _by_content(path)
    if format_ is None:
        raise ValueError(f"{path} has an unknown format; known are {_KNOWN}")
    return pickles.load(path, allow=allow) if format_ == "pickle" else _checked(format_, path)


def _by_content(path: pathlib.Path) -> str | None:
    with open(path, "rb") as file:
        head = file.read(4)
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "pickle"
    if head == b"PK\3\4":
        return "npz"
    is_map = head[:1] in (b"\xde", b"\xdf") or b"\x80" <= head[:1] <= b"\x8f"
    return "msgpack" if is_map else None


def _checked(format_: str, path: pathlib.Path) -> Any:
    try:
        return _LOADS[format_](path)
    except (OSError, ImportError, CheckpointError):
        raise
    except Exception as problem:  # of the libraries below
        raise ValueError(f"{path} cannot be read as {format_}: {str(problem)[:300]}") from problem
