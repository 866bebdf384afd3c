"""Files on their way to the mirror."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import fsspec
from etils import epath
from etils.epath import backend

from ckptmgr.format import files, objects, paths

_UNFINISHED = f".{secrets.token_hex(4)}"
"""The ending of files that this process has not copied whole: two may copy the same at once."""
_LARGE_BYTES = 8 << 20  # the clients of S3 and GCS send a file of this size in parts


def put(source: epath.Path, draft: epath.Path, names: Sequence[str]) -> None:
    """Copies files. Each has its name once it is whole, and is durable when this returns."""
    if not paths.is_local(draft):
        _put_into_bucket(source, draft, names)
        return
    targets = [f"{draft / name}{_UNFINISHED}" for name in names]
    _copy(source, names, targets)
    files.sync(map(epath.Path, targets))
    for target, name in zip(targets, names, strict=True):
        os.replace(target, draft / name)


def _put_into_bucket(source: epath.Path, draft: epath.Path, names: Sequence[str]) -> None:
    """The client sends large files in parts; small ones are sent whole, many at a time."""
    sizes = {name: (source / name).stat().length for name in names}
    large = [name for name in names if sizes[name] >= _LARGE_BYTES]
    _copy(source, large, [str(draft / name) for name in large])

    def put(name: str) -> None:
        objects.write(draft / name, (source / name).read_bytes())

    for _ in files.for_each(draft, put, [name for name in names if name not in large]):
        pass


def _copy(source: epath.Path, names: Sequence[str], targets: Sequence[str]) -> None:
    if names:
        _client(epath.Path(targets[0])).put([str(source / name) for name in names], list(targets))


def remove(draft: epath.Path, names: Iterable[str]) -> None:
    """Removes files that were not copied whole. In a bucket there are none."""
    for name in names if paths.is_local(draft) else ():
        (draft / name).unlink(missing_ok=True)


def is_equal(one: epath.Path, other: epath.Path) -> bool:
    return bool(other.exists() and paths.read_bytes(one) == paths.read_bytes(other))


def _client(directory: epath.Path) -> Any:
    """The client that copies into a directory, without its old listings."""
    if paths.is_local(directory):
        return fsspec.filesystem("file", auto_mkdir=True)
    client = backend.fsspec_backend.fs(str(directory))
    client.invalidate_cache()
    return client
