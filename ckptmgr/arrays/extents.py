"""Where the chunks of an item lie in its files; reads large chunks from there into the memory of their arrays.

TensorStore holds each chunk in memory of its own before it copies the values to their place, which takes more time
and memory. Mapping the files would avoid it, and would end the process by SIGBUS where a file is cut short or a
sector is bad.
https://google.github.io/tensorstore/kvstore/ocdbt/index.html describes the nodes that are walked here.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import math
import os
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import tensorstore as ts
from etils import epath

from ckptmgr.arrays import chunks, database, nodes
from ckptmgr.arrays.chunks import Index, Stored, Values
from ckptmgr.arrays.nodes import Node, Place
from ckptmgr.format import paths, schema
from ckptmgr.specs import LeafSpec
from ckptmgr.trees.structure import numpy_dtype

_THREADS = min(8, os.cpu_count() or 1)


class Extent(NamedTuple):
    """Where the bytes of a value are."""

    file: str
    offset: int
    nbytes: int


Found = dict[str, Extent | bytes]


def find(path: str | os.PathLike[str]) -> Found:
    """Where every value of a database on this machine is, or the value itself if it is small.

    Raises ValueError or OSError for a database that cannot be read.
    """
    database.refuse_fork()
    directory, found = os.fspath(path), Found()
    store = functools.cache(lambda: database.base(directory))  # TensorStore's view of it, if that is needed
    todo = [(b"", root) for root in _roots(directory, store)]
    seen = set[Place]()
    while todo:
        prefix, place = todo.pop()
        if place in seen:
            raise ValueError("a node of the database is below itself")
        seen.add(place)
        node = nodes.decode(_read_node(directory, place), place.base) or _dumped(store(), place)
        todo += [(prefix + below, child) for below, child in node.children]
        for key, value in zip(node.keys, node.values, strict=True):  # no Python calls: there are thousands
            if isinstance(value, bytes):
                found[(prefix + key).decode()] = value
            else:
                row = _inside(value.base + value.file), value.offset, value.nbytes
                found[(prefix + key).decode()] = _extent(row)
    return found


def _roots(directory: str, store: Callable[[], Any]) -> list[Place]:
    """The root of the newest version; of an empty database none."""
    known = nodes.roots(paths.read_bytes(f"{directory}/manifest.ocdbt"))
    if known is not None:
        return known
    versions = ts.ocdbt.dump(store()).result()["versions"]
    root = max(versions, key=lambda version: int(version["generation_number"]))["root"]
    return [_place(root["location"])] if "location" in root else []


def _read_node(directory: str, place: Place) -> bytes:
    with paths.open_to_read(f"{directory}/{_inside(place.base + place.file)}") as file:
        if place.offset + place.nbytes > os.fstat(file.fileno()).st_size:
            raise ValueError("a node of the database is missing")
        return os.pread(file.fileno(), place.nbytes, place.offset)


def _dumped(store: Any, place: Place) -> Node:
    """A node that is compressed, as in steps of older versions."""
    spelled = ":".join(urllib.parse.quote(part, safe="") for part in (place.base, place.file))
    entries = ts.ocdbt.dump(store, f"btreenode:{spelled}:{place.offset}:{place.nbytes}").result()["entries"]
    if entries and "location" in entries[0]:
        below = [(each["subtree_common_prefix"], _place(each["location"])) for each in entries]
        return Node([], [], below)
    values = [
        _place(each["indirect_value"]) if "indirect_value" in each else each["inline_value"] for each in entries
    ]
    return Node([each["key"] for each in entries], values, [])


def nbytes(source: Extent | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.nbytes


def _place(location: str) -> Place:
    """From `KIND:BASE:FILE:OFFSET:LENGTH`, as TensorStore spells it."""
    _, base, file, offset, length = location.split(":")
    unquoted = urllib.parse.unquote_to_bytes
    return Place(unquoted(base), unquoted(file), int(offset), int(length))


_extent = functools.partial(tuple.__new__, Extent)  # without Python for each: there are thousands


@functools.lru_cache(maxsize=256)
def _inside(name: bytes) -> str:
    """The name of a file of the database: there are few, each with many values."""
    found = name.decode()
    if not schema.stays_inside(found):
        raise ValueError(f"the database leads to {found!r}, outside of the checkpoint")
    return found


# ---------------------------------------------------------------- reading


class Job(NamedTuple):
    """A chunk to be read, and the places in the pieces of its array that take values from it."""

    directory: epath.Path
    source: Extent | bytes
    stored: Stored
    takes: Sequence[tuple[Values, Index]]
    """Memory of a piece, and the part of the chunk that belongs there."""


def plan(
    directory: epath.Path, found: Found, prefix: str, stored: Stored, pieces: Sequence[Index]
) -> tuple[list[Values], list[Job]]:
    """Memory for the pieces of an array, and the chunks that fill it; raises KeyError for one that is missing."""
    wanted = [spans(index, stored.shape) for index in pieces]
    memory = [chunks.aligned([last - first for first, last in span], numpy_dtype(stored.dtype)) for span in wanted]
    takes: dict[tuple[int, ...], list[tuple[Values, Index]]] = {}
    for values, span in zip(memory, wanted, strict=True):
        for place, own, part in _overlaps(span, stored.chunks):
            room: Values = values[own] if own else values  # [()] would be a copy
            takes.setdefault(place, []).append((room, part))
    jobs = []
    for place, into in takes.items():
        key = prefix + "/".join(["c", *map(str, place)])
        jobs.append(Job(directory, found[key], stored, into))
    return memory, jobs


def read_value(directory: str, source: Extent | bytes) -> bytes:
    """A value as it lies in the database."""
    if isinstance(source, bytes):
        return source
    with paths.open_to_read(f"{directory}/{source.file}") as file:
        return os.pread(file.fileno(), source.nbytes, source.offset)


def missing(found: Found, spec: LeafSpec, pieces: Sequence[Index]) -> list[str]:
    """The keys of an array, for these pieces of it, that a database lacks."""
    stored, prefix = chunks.stored(spec), chunks.prefix(spec.name)
    end = "/0" if spec.kind == "key" else ""  # the words of a key are an axis more, which is not cut
    wanted = {f"{prefix}zarr.json"} | {
        prefix + "/".join(["c", *map(str, place)]) + end
        for index in pieces
        for place, _, _ in _overlaps(spans(index, stored.shape), stored.chunks[: len(stored.shape)])
    }
    return sorted(wanted - found.keys())


def spans(index: Index, shape: Sequence[int]) -> list[tuple[int, int]]:
    """The first place and the one after the last, for each axis of a piece."""
    if not index:
        return [(0, size) for size in shape]
    return [axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)]


def _overlaps(
    span: Sequence[tuple[int, int]], chunk: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], Index, Index]]:
    """The chunks that a piece takes from: the place of each, which values of the piece, which of the chunk."""
    axes = [
        [
            (n, slice(max(first, n * size) - first, min(last, (n + 1) * size) - first),
             slice(max(first - n * size, 0), min(last - n * size, size)))
            for n in range(first // size, -(-last // size))
        ]
        for (first, last), size in zip(span, chunk, strict=True)
    ]  # fmt: skip
    for each in itertools.product(*axes):
        yield tuple(n for n, _, _ in each), tuple(own for _, own, _ in each), tuple(part for *_, part in each)


def read(jobs: Sequence[Job], most_bytes: int | None = None) -> Iterator[None]:
    """Reads chunks beside each other; the n-th `next` returns once the n-th is read, or raises what is wrong.

    Chunks that are not read straight into their place take at most `most_bytes`, or are read one by one.
    Raises ValueError for a damaged chunk, OSError for a file that cannot be read.
    """
    largest = max((_chunk_bytes(job) for job in jobs if not _is_own(job)), default=0)
    beside = _THREADS if most_bytes is None or not largest else max(1, min(_THREADS, most_bytes // largest))
    with concurrent.futures.ThreadPoolExecutor(beside) as threads:
        yield from threads.map(_read, jobs)


def _chunk_bytes(job: Job) -> int:
    return math.prod(job.stored.chunks) * numpy_dtype(job.stored.dtype).itemsize


def _is_own(job: Job) -> bool:
    """Whether the values of a chunk lie in their place as they lie in the chunk."""
    into, _ = job.takes[0]
    return len(job.takes) == 1 and into.flags.c_contiguous and into.shape == job.stored.chunks


def _read(job: Job) -> None:
    size = _chunk_bytes(job)
    if nbytes(job.source) != size + 4:
        raise ValueError(f"its chunk has {nbytes(job.source)} bytes instead of {size + 4}")
    into, is_own = job.takes[0][0], _is_own(job)
    chunk = into if is_own else np.empty(job.stored.chunks, numpy_dtype(job.stored.dtype))
    _fill(job, chunk)
    if not is_own:
        for into, part in job.takes:
            into[...] = chunk[part]


def _fill(job: Job, chunk: Values) -> None:
    """Reads the values of a chunk and the checksum behind them."""
    values: Any = chunk.reshape(-1).view(np.uint8)
    data, seal = memoryview(values), memoryview(bytearray(4))
    if isinstance(job.source, bytes):
        data[:], seal[:] = job.source[:-4], job.source[-4:]
        path = job.directory
    else:
        path = job.directory / job.source.file
        _read_into(path, job.source.offset, data, seal)
    if google_crc32c.value(values) != int.from_bytes(seal, "little"):
        raise ValueError(f"the checksum of its chunk does not match in {path}")


def _read_into(path: epath.Path, offset: int, data: memoryview, seal: memoryview) -> None:
    """Fills both, the one after the other, from a place of a file."""
    with paths.open_to_read(path) as file:
        at = 0
        while at < len(data) + len(seal):
            rest = [data[at:], seal] if at < len(data) else [seal[at - len(data) :]]
            got = os.preadv(file.fileno(), rest, offset + at)
            if got == 0:
                raise ValueError(f"{path} ends within its chunk")
            at += got
