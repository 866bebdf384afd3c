"""Arrays to disk and back: TensorStore transactions of many arrays, every chunk with its checksum.

An item's arrays are zarr3 in one OCDBT database, as Orbax reads them. Nothing here waits leaf by leaf:
a writer puts thousands into a transaction and commits once; a restore asks for all, then collects.

The checksums: each chunk carries zarr's `crc32c` codec; OCDBT's manifest and nodes carry their own
(https://google.github.io/tensorstore/kvstore/ocdbt/index.html); the small `zarr.json` of each array is
stored inside a node (`max_inline_value_bytes`), so that it is covered too.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import tensorstore as ts
from etils import epath

from ckptmgr import paths
from ckptmgr.errors import CheckpointError
from ckptmgr.lifecycle import Moment
from ckptmgr.storage import chunks, devices, extents, files
from ckptmgr.storage.chunks import BYTES_ALONE, Index, Stored, Values
from ckptmgr.storage.devices import Part, Plan
from ckptmgr.structure import LeafSpec, numpy_dtype

_SPEC = re.compile(r" \[[\w ]+='")  # what TensorStore adds to a message: it may be long
PART = "ocdbt.process_"  # Orbax's name for what one of several processes wrote
_ENCODED_BYTES = 4 << 20  # smaller ones take less memory, and time for each commit
_AHEAD_BYTES = 64 << 20  # of a restore
_INLINE_BYTES = 4096  # larger than any zarr.json, so that each lies in a checksummed node


class DamagedArrayError(Exception):
    """An array cannot be read, or is not the one the manifest describes."""

    def __init__(self, item: str, leaf: str, reason: str) -> None:
        super().__init__(reason)
        self.item = item
        self.leaf = f"{item}{leaf}"


_process: int | None = None


def _refuse_fork() -> None:
    """TensorStore ends a process without a word that was forked after TensorStore had started its threads."""
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise CheckpointError(
            f"arrays are not read in a process that was forked from process {_process}, which has read or written "
            'some: TensorStore does not survive a fork. Start the process with multiprocessing\'s "spawn"'
        )


def _database(directory: epath.Path) -> dict[str, Any]:
    _refuse_fork()
    return {"driver": "ocdbt", "base": _base(str(directory))}


def base(directory: epath.Path) -> Any:
    """The files of a database."""
    return ts.KvStore.open(_base(str(directory)), context=ts.Context()).result()


def _base(path: str) -> Any:
    """A directory as TensorStore spells it; the address of S3 comes from where the cloud's own tools take it."""
    if paths.is_local(path):
        return f"file://{path}/"
    if not path.startswith("s3://"):
        return f"{path}/"
    bucket, _, below = path.removeprefix("s3://").partition("/")
    known = {
        "endpoint": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        "aws_region": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
    }
    return {"driver": "s3", "bucket": bucket, "path": f"{below}/"} | {k: v for k, v in known.items() if v}


# ---------------------------------------------------------------- writing


class Snapshot:
    """The host copies of one item on their way to disk: all of them, or one wave of `max_bytes` after another."""

    def __init__(self, plan: Plan, leaves: Sequence[Any], max_bytes: int | None, *, is_own: bool = False) -> None:
        self.plan = plan
        self.is_own = is_own
        """Whether each process may have its own: then it is copied in all."""
        self._leaves = leaves
        self._left_out: frozenset[int] = frozenset()
        self._waves = chunks.runs([each.nbytes for each in plan.stored], max_bytes)
        self.copied: list[tuple[int, list[Part]]] = []
        """The copies that wait to be written: the place of each leaf, and its parts."""
        self.complete = Moment()
        """Set once every leaf has been copied, or the save is over."""
        self.completed_at = 0.0
        """When it was, on the clock of `time.perf_counter`."""
        self._is_abandoned = False

    def start(self) -> None:
        """Starts the copies of the next wave; returns at once."""
        devices.start_copies(self.plan, self._leaves, self._waves[0])

    def collect(self) -> None:
        """Waits for the copies of the next wave."""
        wave = self._waves.pop(0)
        parts = devices.collect(self.plan, self._leaves, wave, is_own=self.is_own)
        if self._is_abandoned:
            raise InterruptedError("the call of save was interrupted before everything was copied")
        self.copied = self._without(list(zip(wave, parts, strict=True)))
        if not self._waves:
            self.release()

    def has_more(self) -> bool:
        return bool(self._waves)

    def abandon(self) -> None:
        """The call of `save` has ended: its caller may change what is not copied yet, which must not be saved."""
        self._is_abandoned = True

    def digest(self) -> str:
        """Equal for equal values."""
        found = hashlib.sha256()
        for _, parts in self.copied:
            for _, part in parts:
                found.update(part.tobytes())
        return found.hexdigest()[:32]

    def leave_out(self, places: Collection[int]) -> None:
        """Leaves that another process writes."""
        self._left_out = frozenset(places)
        self.copied = self._without(self.copied)

    def _without(self, copied: list[tuple[int, list[Part]]]) -> list[tuple[int, list[Part]]]:
        return [(place, [] if place in self._left_out else parts) for place, parts in copied]

    def release(self) -> None:
        """Lets go of the leaves: the caller of `save` may do with them what it likes."""
        self._leaves = ()
        if not self.complete.is_set():
            self.completed_at = time.perf_counter()
        self.complete.set()


def own_part() -> str:
    """Where in an item this process writes its part; one that is alone writes the whole."""
    return f"{PART}{jax.process_index()}" if jax.process_count() > 1 else ""


def merge(directory: epath.Path) -> None:
    """Makes one database of the parts that several processes wrote; it refers to their chunks and copies none."""
    parts = [entry for entry in directory.iterdir() if entry.name.startswith(PART)]
    if not parts:
        return
    transaction, context = ts.Transaction(atomic=True), ts.Context()
    whole = ts.KvStore.open(_database(directory), context=context).result().with_transaction(transaction)
    copies = [
        ts.KvStore.open(_database(part), context=context).result().experimental_copy_range_to(whole)
        for part in parts
    ]
    for each in copies:
        each.result()
    transaction.commit_async().result()


def write_wave(directory: epath.Path, snapshot: Snapshot, compression: str | None) -> None:
    """Writes what has been copied, and lets go of it."""
    plan, copied, snapshot.copied = snapshot.plan, snapshot.copied, []
    stored = [plan.stored[place] for place, _ in copied]
    encoded = [each.nbytes if each.is_direct() else 0 for each in stored]  # held until the commit
    for some in chunks.runs(encoded, _ENCODED_BYTES) if copied else ():
        _write(directory, plan, [copied[i] for i in some], compression)


def _write(
    directory: epath.Path, plan: Plan, copied: Sequence[tuple[int, list[Part]]], compression: str | None
) -> None:
    """Writes these leaves in one transaction."""
    transaction, context = ts.Transaction(atomic=True), ts.Context()
    database = {**_database(directory), "config": {"max_inline_value_bytes": _INLINE_BYTES}}
    store = ts.KvStore.open(database, context=context).result().with_transaction(transaction)
    with _ENCODING:
        for key, data in _encoded(plan, copied) if compression is None else ():
            store[key] = data
    opened = [
        (_create(store / plan.prefixes[place], plan.stored[place], compression, context), parts)
        for place, parts in copied
        if parts
    ]
    writing = [
        _at(array.result(), index).write(part, can_reference_source_data_indefinitely=True)
        for array, parts in opened
        for index, part in parts
        if part.size
    ]
    for each in writing:
        each.copy.result()
    transaction.commit_async().result()


_ENCODING = threading.Lock()
"""Held by the item that is being encoded: threads that all run Python only take turns, at a price."""


def _encoded(plan: Plan, copied: Sequence[tuple[int, list[Part]]]) -> Iterator[tuple[str, bytes]]:
    """Key and bytes of every array that is small enough to be encoded here; its copy is let go."""
    for place, parts in copied:
        head, prefix, cuts = plan.heads[place], plan.prefixes[place], plan.stored[place].chunks
        if head is not None and parts:
            yield f"{prefix}zarr.json", head
            for index, part in parts:
                for name, data in chunks.encoded(part, index, cuts):
                    yield prefix + name, data
            parts.clear()


def _at(array: Any, index: Index) -> Any:
    return array[index] if index else array


def describe(directory: epath.Path, plan: Plan) -> None:
    """Writes Orbax's own files about the arrays of an item."""
    for name, data in plan.files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, data)


def _create(store: Any, stored: Stored, compression: str | None, context: Any) -> Any:
    spec = {
        "driver": "zarr3",
        "metadata": chunks.metadata(stored, compression),
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(ts.Spec(spec), kvstore=store, create=True, open=True, context=context)


# ---------------------------------------------------------------- reading


class Opener:
    """Gives the arrays of one committed item. `plain` arrays are ours and uncompressed."""

    def __init__(
        self, directory: epath.Path, *, zarr3: bool = True, ocdbt: bool = True, plain: bool = False
    ) -> None:
        context = ts.Context()  # files are read, not mapped: a mapped one that is cut short ends the process
        database = _database(directory)
        self._context = context
        self._store = ts.KvStore.open(database if ocdbt else database["base"], context=context).result()
        unchanging = {"recheck_cached_metadata": False, "recheck_cached_data": False}  # what is committed stays
        driver = "zarr3" if zarr3 else "zarr"
        self._spec = ts.Spec({"driver": driver, "fill_missing_data_reads": False, **unchanging})
        self._directory = directory
        self._plain = plain
        self._found: extents.Found | None = None

    def is_direct(self, spec: LeafSpec) -> bool:
        """Whether an array is one chunk that is read and checked without opening the array."""
        alone = self._plain and spec.chunks is None and spec.kind != "key" and 0 not in spec.shape
        return alone and _stored(spec).is_direct()

    def plan(self, spec: LeafSpec, pieces: Sequence[Index]) -> tuple[list[Values], list[extents.Job]] | None:
        """How the pieces of a large array are read straight from the files; None if TensorStore has to."""
        stored = _stored(spec)
        if not (self._plain and spec.kind != "key" and 0 not in spec.shape and stored.is_raw()):
            return None
        if not paths.is_local(self._directory):
            return None
        if self._found is None:
            self._found = extents.find(base(self._directory))
        prefix = chunks.prefix(spec.name)
        if self._found.get(f"{prefix}zarr.json") != chunks.zarr_json(stored):
            return None  # it is not what the manifest says: TensorStore's answer says what it is
        return extents.plan(self._directory, self._found, prefix, stored, pieces)

    def chunk(self, spec: LeafSpec) -> Any:
        """A future of the only chunk of an array."""
        return self._store.read(chunks.prefix(spec.name) + chunks.ONLY[len(spec.shape)], staleness_bound=0)

    def open(self, name: str) -> Any:
        """A future of the array with this name."""
        return ts.open(
            self._spec, kvstore=self._store / chunks.prefix(name), open=True, read=True, context=self._context
        )

    def facts(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a stored array."""
        array = self.open(name).result()
        return tuple(array.shape), array.dtype.name


def _stored(spec: LeafSpec) -> Stored:
    dtype = "uint8" if spec.dtype in BYTES_ALONE else spec.dtype
    return Stored(spec.shape, dtype, spec.chunks or chunks.whole(spec.shape))


class Read(NamedTuple):
    """One leaf of an item that is to be read, in the pieces that are wanted of it."""

    item: str
    opener: Opener
    spec: LeafSpec
    pieces: Sequence[Index] = ((),)

    @property
    def copied_nbytes(self) -> int:
        """Bytes that are held twice while the leaf goes to its device."""
        return _stored(self.spec).nbytes if self.opener.is_direct(self.spec) else 0

    def damaged(self, reason: object) -> DamagedArrayError:
        first_line = str(reason).partition("\n")[0]
        return DamagedArrayError(self.item, self.spec.path, _SPEC.split(first_line)[0])


def read(wanted: Sequence[Read]) -> list[list[Values]]:
    """The pieces of every wanted leaf, as numpy arrays; all asked for at once."""
    direct = [each.opener.is_direct(each.spec) for each in wanted]
    plans = [None if fast else _plan(each) for each, fast in zip(wanted, direct, strict=True)]
    asked = [
        each.opener.chunk(each.spec) if fast else each.opener.open(each.spec.name) if plan is None else None
        for each, fast, plan in zip(wanted, direct, plans, strict=True)
    ]
    window = _Window()
    found = [
        _cut(each, _result(each, future))
        if fast
        else _start(each, future, window)
        if plan is None
        else [_view(each, values) for values in plan[0]]
        for each, fast, plan, future in zip(wanted, direct, plans, asked, strict=True)
    ]
    window.drain(0)
    _fill([(each, job) for each, plan in zip(wanted, plans, strict=True) if plan is not None for job in plan[1]])
    return found


def _plan(each: Read) -> tuple[list[Values], list[extents.Job]] | None:
    try:
        return each.opener.plan(each.spec, each.pieces)
    except KeyError:
        raise each.damaged("a chunk of it is missing") from None
    except (ValueError, OSError) as problem:
        paths.refuse_exhausted(problem)
        raise each.damaged(problem) from problem


def _fill(jobs: Sequence[tuple[Read, extents.Job]]) -> None:
    """Reads these chunks into their places; raises DamagedArrayError."""
    done = extents.read([job for _, job in jobs])
    for each, _ in jobs:
        try:
            next(done)
        except (ValueError, OSError, MemoryError) as problem:
            paths.refuse_exhausted(problem)
            raise each.damaged(problem) from problem


def opened(each: Read) -> Any:
    """The opened array; raises DamagedArrayError."""
    return _expected(each, each.opener.open(each.spec.name))


def drain(each: Read, futures: Sequence[Any]) -> None:
    """Waits for reads whose values are not wanted; raises DamagedArrayError."""
    for future in futures:
        _result(each, future)


class _Window:
    """Bounds what TensorStore reads ahead: it holds each chunk until it is copied to its place."""

    def __init__(self) -> None:
        self._under_way: collections.deque[tuple[int, Read, Any]] = collections.deque()
        self._nbytes = 0

    def add(self, nbytes: int, each: Read, start: Callable[[], Any]) -> None:
        self.drain(max(0, _AHEAD_BYTES - nbytes))
        self._under_way.append((nbytes, each, start()))
        self._nbytes += nbytes

    def drain(self, most: int) -> None:
        """Waits until at most so many bytes are under way; raises DamagedArrayError."""
        while self._nbytes > most:
            nbytes, each, future = self._under_way.popleft()
            self._nbytes -= nbytes
            _result(each, future)


def _start(each: Read, future: Any, window: _Window) -> list[Values]:
    """Reads the pieces of an opened array, each into memory that JAX can take over as it is."""
    array = _expected(each, future)
    chunk = array.chunk_layout.read_chunk.shape or ()  # None for an array without axes
    dtype = array.dtype.numpy_dtype
    found = []
    for index in each.pieces:
        piece = _at(array, index)
        buffer = chunks.aligned(piece.shape, dtype)
        into = ts.array(buffer)
        for box in chunks.boxes(index, piece.shape, chunk, _AHEAD_BYTES // 4 // dtype.itemsize):
            part = piece.translate_to[0][box] if box else piece
            window.add(part.size * dtype.itemsize, each, functools.partial(_at(into, box).write, part))
        found.append(_view(each, buffer))
    return found


def _expected(each: Read, future: Any) -> Any:
    """An opened array, if it is the one the manifest speaks of."""
    array, spec = _result(each, future), each.spec
    shape, dtype = tuple(array.shape), array.dtype.name
    if spec.kind == "key":
        shape = shape[: len(spec.shape)]
    elif dtype != _stored(spec).dtype:
        raise each.damaged(f"it is stored as {dtype}, not {spec.dtype}")
    if shape != spec.shape:
        raise each.damaged(f"it is stored with shape {shape}, not {spec.shape}")
    return array


def _cut(each: Read, answer: Any) -> list[Values]:
    """The pieces of an array of one chunk."""
    if answer.state != "value":
        raise each.damaged("its chunk is missing")
    try:
        values = _view(each, chunks.decode(answer.value, _stored(each.spec)))
    except ValueError as problem:
        raise each.damaged(problem) from problem
    return [_at(values, index) for index in each.pieces]


def _result(each: Read, future: Any) -> Any:
    try:
        return future.result()
    except (ValueError, OSError, NotImplementedError) as problem:
        paths.refuse_exhausted(problem)
        raise each.damaged(problem) from problem


def _view(each: Read, values: Values) -> Values:
    dtype = each.spec.dtype
    return values.view(numpy_dtype(dtype)) if dtype in BYTES_ALONE else values
