"""An OCDBT database, as TensorStore opens it, on a disk or in a bucket."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import tensorstore as ts
from etils import epath

from ckptmgr.errors import CheckpointError
from ckptmgr.format import objects, paths

MANIFEST = "manifest.ocdbt"
Check = Callable[[], object]
"""Raises if this process may not write any more."""
_process: int | None = None
_READS_IN_BUCKETS = {
    "experimental_read_coalescing_threshold_bytes": 1 << 20,
    "experimental_read_coalescing_merged_bytes": 16 << 20,
    "experimental_read_coalescing_interval": "5ms",
    "cache_pool": {"total_bytes_limit": 100 << 20},
}
"""Neighbours in a file are read with one request: of small arrays there are thousands. The nodes are kept in
memory: else TensorStore reads them again for each group of arrays."""


def refuse_fork() -> None:
    """TensorStore ends a process without a word that was forked after TensorStore had started its threads."""
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise CheckpointError(
            f"arrays are not read in a process that was forked from process {_process}, which has read or written "
            'some: TensorStore does not survive a fork. Start the process with multiprocessing\'s "spawn"'
        )


def open_spec(directory: epath.Path) -> dict[str, Any]:
    refuse_fork()
    reads = {} if paths.is_local(directory) else _READS_IN_BUCKETS
    return {"driver": "ocdbt", "base": _base(str(directory)), **reads}


def write_spec(directory: epath.Path) -> dict[str, Any]:
    """A database that is written. In a bucket its manifest is kept in memory until `publish`.

    The manifest is the one file of a database that a second writer would change too, and TensorStore would merge
    what both have written. The other files have random names.
    """
    if paths.is_local(directory):
        return open_spec(directory)
    return open_spec(directory) | {"manifest": _in_memory(directory)}


def publish(directory: epath.Path, context: Any, check: Check, place: epath.Path | None = None) -> None:
    """In a bucket writes the manifest of a database, once all else is there, and if it is not there yet.

    `place`: a folder of this machine that gets it instead, to be put into the bucket with other files.
    """
    if paths.is_local(directory):
        return
    found = ts.KvStore.open(_in_memory(directory), context=context).result().read(MANIFEST).result()
    if found.state != "value":  # an item without arrays has no database
        return
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
        (place / MANIFEST).write_bytes(found.value)
    else:
        check()
        objects.create(directory / MANIFEST, bytes(found.value))


def _in_memory(directory: epath.Path) -> dict[str, Any]:
    return {"driver": "memory", "path": f"{directory}/"}


def base(directory: str | os.PathLike[str]) -> Any:
    """The files of a database."""
    refuse_fork()
    return ts.KvStore.open(_base(str(directory)), context=ts.Context()).result()


def _base(path: str) -> Any:
    """A directory for TensorStore, not as a URL, in which `#`, `?` and `%` have a meaning.

    The address of S3 comes from where the cloud's own tools take it.
    """
    if paths.is_local(path):
        return {"driver": "file", "path": f"{path}/"}
    scheme, _, rest = path.partition("://")
    bucket, _, below = rest.partition("/")
    if scheme != "s3":
        return {"driver": "gcs", "bucket": bucket, "path": f"{below}/"}
    known = {
        "endpoint": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        "aws_region": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
    }
    return {"driver": "s3", "bucket": bucket, "path": f"{below}/"} | {k: v for k, v in known.items() if v}
