"""Arrays from disk: all are asked for at once, then collected; what is damaged is an error that names the leaf."""

from __future__ import annotations

import collections
import functools
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorstore as ts
from etils import epath

from ckptmgr.arrays import chunks, database, extents, small
from ckptmgr.arrays.chunks import BYTES_ALONE, Index, Values
from ckptmgr.arrays.progress import Meter
from ckptmgr.format import manifest, paths
from ckptmgr.specs import LeafSpec
from ckptmgr.trees.structure import numpy_dtype

_SPEC = re.compile(r" \[[\w ]+='")  # what TensorStore adds to a message: it may be long
_AHEAD_BYTES = 64 << 20  # of a restore


class DamagedArrayError(Exception):
    """An array cannot be read, or is not the one the manifest describes."""

    def __init__(self, item: str, leaf: str, reason: str) -> None:
        super().__init__(reason)
        self.item = item
        self.leaf = f"{item}{leaf}"


class Source(NamedTuple):
    """The database of an item, in a step or elsewhere. `plain` arrays are ours and uncompressed.

    With `fills` a chunk that is not there is zeros.
    """

    folder: str
    zarr3: bool = True
    ocdbt: bool = True
    plain: bool = False
    fills: bool = False


class Opener:
    """Gives the arrays of one committed item."""

    def __init__(self, directory: epath.Path, source: Source) -> None:
        self._directory = directory / source.folder
        self._source = source

    @property
    def exists(self) -> bool:
        return bool((self._directory / "manifest.ocdbt").exists())

    @functools.cached_property
    def found(self) -> extents.Found:
        """Where each value lies in the files of a database on this machine."""
        return extents.find(self._directory)

    @functools.cached_property
    def _scratch(self) -> Values:
        return small.scratch()

    @functools.cached_property
    def _context(self) -> Any:
        return ts.Context()  # files are read, not mapped: a mapped one that is cut short ends the process

    @functools.cached_property
    def _store(self) -> Any:
        spec = database.open_spec(self._directory)
        return ts.KvStore.open(spec if self._source.ocdbt else spec["base"], context=self._context).result()

    @functools.cached_property
    def _spec(self) -> Any:
        unchanging = {"recheck_cached_metadata": False, "recheck_cached_data": False}  # what is committed stays
        driver = "zarr3" if self._source.zarr3 else "zarr"
        return ts.Spec({"driver": driver, "fill_missing_data_reads": self._source.fills, **unchanging})

    def small(self, plan: small.Plan) -> list[Values]:
        """Small arrays, read straight from the files; raises small.SmallArrayError."""
        return small.read(plan, os.fspath(self._directory), self.found, self._scratch)

    def plan(self, spec: LeafSpec, pieces: Sequence[Index]) -> tuple[list[Values], list[extents.Job]] | None:
        """How the pieces of a large array are read straight from the files; None if TensorStore has to."""
        stored, prefix = chunks.stored(spec), chunks.prefix(spec.name)
        if self.found.get(f"{prefix}zarr.json") != chunks.zarr_json(stored):
            return None  # it is not what the manifest says: TensorStore's answer says what it is
        return extents.plan(self._directory, self.found, prefix, stored, pieces)

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


class Read(NamedTuple):
    """One leaf of an item that is to be read, in the pieces that are wanted of it."""

    item: str
    source: int
    """Which of the databases it is in."""
    spec: LeafSpec
    pieces: Sequence[Index] = ((),)

    def damaged(self, reason: object) -> DamagedArrayError:
        first_line = str(reason).partition("\n")[0]
        return DamagedArrayError(self.item, self.spec.path, _SPEC.split(first_line)[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the values that are wanted."""
        whole, shape = manifest.leaf_nbytes(self.spec), self.spec.shape
        if not whole or tuple(self.pieces) == ((),):
            return whole
        spans = [extents.spans(piece, shape) for piece in self.pieces]
        return whole // math.prod(shape) * sum(math.prod(last - first for first, last in span) for span in spans)


class Plan:
    """How leaves are read: the same for each step of a structure. `is_local` if the files are on this machine.

    `most_bytes` bounds the chunks that are held until their values are in place; a larger one is alone.
    """

    def __init__(
        self, wanted: Sequence[Read], sources: Sequence[Source], *, is_local: bool, most_bytes: int | None = None
    ) -> None:
        self.wanted, self.most_bytes = wanted, most_bytes
        ways = [way(each.spec, sources[each.source], is_local=is_local) for each in wanted]
        self.small = {
            source: [n for n, each in enumerate(wanted) if ways[n] == "small" and each.source == source]
            for source in range(len(sources))
        }
        """By database, the places of those that are read with few calls."""
        self.small_plans = {
            source: small.Plan([wanted[n].spec for n in places]) for source, places in self.small.items() if places
        }
        self.cut = [n for n, each in enumerate(wanted) if ways[n] == "small" and tuple(each.pieces) != ((),)]
        self.chunks, self.files, self.arrays = ([n for n, way in enumerate(ways) if way == each] for each in _WAYS)


_WAYS = ("chunk", "files", "array")


def way(spec: LeafSpec, source: Source, *, is_local: bool) -> str:
    """How an array is read: with others ("small"), as the only chunk that it has in a bucket ("chunk"), straight
    from the files ("files"), or by TensorStore, which opens it ("array")."""
    if not source.plain or spec.kind in ("key", "str") or 0 in spec.shape:
        return "array"
    stored = chunks.stored(spec)
    if spec.chunks is None and stored.is_direct():
        return "small" if is_local else "chunk"
    return "files" if is_local and stored.is_raw() else "array"


def read(plan: Plan, openers: Sequence[Opener], meter: Meter | None = None) -> list[list[Values]]:
    """The pieces of every wanted leaf, as numpy arrays; all asked for at once. Each source has its opener.

    `meter` is told of what has been read, on this thread.
    """
    wanted = plan.wanted
    found: list[Any] = [None] * len(wanted)
    asked = [(n, openers[wanted[n].source].chunk(wanted[n].spec)) for n in plan.chunks]
    opened = [(n, openers[wanted[n].source].open(wanted[n].spec.name)) for n in plan.arrays]
    for source, some in plan.small_plans.items():
        _read_small(plan, source, some, openers[source], found)
        if meter is not None:
            meter.add(sum(wanted[n].nbytes for n in plan.small[source]))
    jobs = []
    for n in plan.files:
        direct = _plan(wanted[n], openers[wanted[n].source])
        if direct is None:
            opened.append((n, openers[wanted[n].source].open(wanted[n].spec.name)))
        else:
            found[n] = [_view(wanted[n], values) for values in direct[0]]
            jobs += [(wanted[n], job) for job in direct[1]]
    most_ahead = _AHEAD_BYTES if plan.most_bytes is None else min(_AHEAD_BYTES, plan.most_bytes // _HELD)
    window = _Window(most_ahead, meter)
    for n, future in asked:
        found[n] = _cut(wanted[n], _result(wanted[n], future))
        if meter is not None:
            meter.add(wanted[n].nbytes)
    for n, future in opened:
        found[n] = _start(wanted[n], future, window)
    window.drain(0)
    _fill(jobs, plan.most_bytes, meter)
    return found


def missing(wanted: Sequence[Read], openers: Sequence[Opener]) -> dict[int, list[tuple[str, int]]]:
    """By database what it lacks of what is wanted: keys, and about how large the value of each is."""
    lacking: dict[int, list[tuple[str, int]]] = {}
    found = [opener.found if opener.exists else {} for opener in openers]
    for each in wanted:
        if each.spec.kind != "str":
            keys = extents.missing(found[each.source], each.spec, each.pieces)
            stored = chunks.stored(each.spec)
            itemsize = 16 if each.spec.kind == "key" else numpy_dtype(stored.dtype).itemsize
            nbytes = math.prod(stored.chunks) * itemsize
            lacking.setdefault(each.source, []).extend((key, nbytes) for key in keys)
    return {source: keys for source, keys in lacking.items() if keys}


def _read_small(plan: Plan, source: int, some: small.Plan, opener: Opener, found: list[Any]) -> None:
    places = plan.small[source]
    try:
        for n, values in zip(places, opener.small(some), strict=True):
            found[n] = [values]
    except small.SmallArrayError as problem:
        paths.refuse_exhausted(problem.__cause__ or problem)
        raise plan.wanted[places[problem.place]].damaged(problem) from problem
    except (ValueError, OSError, MemoryError) as problem:  # of the database
        paths.refuse_exhausted(problem)
        raise plan.wanted[places[0]].damaged(problem) from problem
    for n in plan.cut:
        if plan.wanted[n].source == source:
            found[n] = [found[n][0][index] for index in plan.wanted[n].pieces]


def _plan(each: Read, opener: Opener) -> tuple[list[Values], list[extents.Job]] | None:
    try:
        return opener.plan(each.spec, each.pieces)
    except KeyError:
        raise each.damaged("a chunk of it is missing") from None
    except (ValueError, OSError, MemoryError) as problem:
        paths.refuse_exhausted(problem)
        raise each.damaged(problem) from problem


def _fill(jobs: Sequence[tuple[Read, extents.Job]], most_bytes: int | None, meter: Meter | None) -> None:
    """Reads these chunks into their places; raises DamagedArrayError."""
    done = extents.read([job for _, job in jobs], most_bytes)
    for each, job in jobs:
        try:
            next(done)
        except (ValueError, OSError, MemoryError) as problem:
            paths.refuse_exhausted(problem)
            raise each.damaged(problem) from problem
        if meter is not None:
            meter.add(sum(into.nbytes for into, _ in job.takes))


def opened(each: Read, opener: Opener) -> Any:
    """The opened array; raises DamagedArrayError."""
    return _expected(each, opener.open(each.spec.name))


def chunk_of(array: Any) -> tuple[Sequence[int], int]:
    """The shape of the chunks of an opened array, and how many bytes TensorStore holds for one under way."""
    chunk = array.chunk_layout.read_chunk.shape or ()  # None for an array without axes
    return chunk, max(math.prod(chunk) * array.dtype.numpy_dtype.itemsize, _CHUNK_COSTS)


_CHUNK_COSTS = 4096  # even if it is smaller


def drain(each: Read, futures: Sequence[Any]) -> None:
    """Waits for reads whose values are not wanted; raises DamagedArrayError."""
    for future in futures:
        _result(each, future)


_HELD = 3  # how often TensorStore may hold a chunk: as it lies on disk, without its checksum, and its values


class _Window:
    """Bounds what TensorStore reads ahead: it holds each chunk until it is copied to its place."""

    def __init__(self, most: int, meter: Meter | None) -> None:
        self.most = most
        self._meter = meter
        self._under_way: collections.deque[tuple[int, int, Read, Any]] = collections.deque()
        self._nbytes = 0

    def add(self, nbytes: int, wanted: int, each: Read, start: Callable[[], Any]) -> None:
        """Starts to read chunks of so many bytes, of which so many are wanted."""
        self.drain(max(0, self.most - nbytes))
        self._under_way.append((nbytes, wanted, each, start()))
        self._nbytes += nbytes

    def drain(self, most: int) -> None:
        """Waits until at most so many bytes are under way; raises DamagedArrayError."""
        while self._nbytes > most:
            nbytes, wanted, each, future = self._under_way.popleft()
            self._nbytes -= nbytes
            _result(each, future)
            if self._meter is not None:
                self._meter.add(wanted)


def _start(each: Read, future: Any, window: _Window) -> list[Values]:
    """Reads the pieces of an opened array, each into memory that JAX can take over as it is."""
    array = _expected(each, future)
    dtype = array.dtype.numpy_dtype
    chunk, held = chunk_of(array)
    found = []
    for index in each.pieces:
        piece = chunks.at(array, index)
        buffer = _memory(each, piece.shape, dtype)
        into = ts.array(buffer)
        for box in chunks.boxes(index, piece.shape, chunk, math.prod(chunk) * window.most // 4 // held):
            part = piece.translate_to[0][box] if box else piece
            nbytes = chunks.taken_from(index, box, chunk) * held
            wanted = math.prod(part.shape) * dtype.itemsize
            window.add(nbytes, wanted, each, functools.partial(chunks.at(into, box).write, part))
        found.append(_view(each, buffer))
    return found


def _memory(each: Read, shape: Sequence[int], dtype: Any) -> Values:
    """Memory for a piece; no array is larger than the addresses of a process."""
    try:
        if math.prod(shape) * dtype.itemsize >= _ADDRESSES:
            raise ValueError(f"its shape is {tuple(shape)}, more than a process can address")
        return chunks.aligned(shape, dtype)
    except (ValueError, MemoryError) as problem:
        paths.refuse_exhausted(problem)
        raise each.damaged(problem) from problem


_ADDRESSES = 1 << 47


def _expected(each: Read, future: Any) -> Any:
    """An opened array, if it is the one the manifest speaks of."""
    array, spec = _result(each, future), each.spec
    shape, dtype = tuple(array.shape), array.dtype.name
    if spec.kind == "key":
        shape = shape[: len(spec.shape)]
    elif dtype != chunks.stored(spec).dtype:
        raise each.damaged(f"it is stored as {dtype}, not {spec.dtype}")
    if shape != spec.shape:
        raise each.damaged(f"it is stored with shape {shape}, not {spec.shape}")
    _check_chunks(each, array)
    return array


def _check_chunks(each: Read, array: Any) -> None:
    """Refuses what no writer has made: TensorStore ends the process if it cannot allocate what a file asks for."""
    if 0 in array.shape:  # then nothing is read
        return
    chunk = array.chunk_layout.read_chunk.shape or ()  # None for an array without axes
    nbytes, chunk_nbytes = (math.prod(axes) * array.dtype.numpy_dtype.itemsize for axes in (array.shape, chunk))
    if chunk_nbytes > max(_CHUNK_BYTES, 2 * nbytes):
        raise each.damaged(f"its chunks have {chunk_nbytes:,} bytes, and the whole array {nbytes:,}")
    count = math.prod(-(-size // step) for size, step in zip(array.shape, chunk, strict=True))
    if count > _CHUNKS:
        raise each.damaged(f"it has {count:,} chunks")


_CHUNK_BYTES = 64 << 20  # as large a chunk is read, however small its array
_CHUNKS = 1 << 30  # as many chunks TensorStore allows in a file


def _cut(each: Read, answer: Any) -> list[Values]:
    """The pieces of an array of one chunk."""
    if answer.state != "value":
        raise each.damaged("its chunk is missing")
    try:
        values = _view(each, chunks.decode(answer.value, chunks.stored(each.spec)))
    except ValueError as problem:
        raise each.damaged(problem) from problem
    return [chunks.at(values, index) for index in each.pieces]


def _result(each: Read, future: Any) -> Any:
    try:
        return future.result()
    except (ValueError, OSError, NotImplementedError) as problem:
        paths.refuse_exhausted(problem)
        raise each.damaged(problem) from problem


def _view(each: Read, values: Values) -> Values:
    dtype = each.spec.dtype
    return values.view(numpy_dtype(dtype)) if dtype in BYTES_ALONE else values
