"""Files on their way to the mirror."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import fsspec
from etils import epath
from etils.epath import backend

from ckptmgr.format import files, paths

_UNFINISHED = f".{secrets.token_hex(4)}"
"""The ending of files that this process has not copied whole: two may copy the same at once."""


def put(source: epath.Path, draft: epath.Path, names: Sequence[str]) -> None:
    """Copies files. Each has its name once it is whole, and is durable when this returns."""
    is_local, client = paths.is_local(draft), _client(draft)
    targets = [f"{draft / name}{_UNFINISHED if is_local else ''}" for name in names]
    if names:
        client.put([str(source / name) for name in names], targets)
    files.sync(map(epath.Path, targets))
    for target, name in zip(targets, names, strict=True) if is_local else ():
        os.replace(target, draft / name)


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
