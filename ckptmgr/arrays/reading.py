"""Arrays from disk: all are asked for at once, then collected; what is damaged is an error that names the leaf."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorstore as ts
from etils import epath

from ckptmgr.arrays import chunks, database, extents
from ckptmgr.arrays.chunks import BYTES_ALONE, Index, Stored, Values
from ckptmgr.format import paths
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


class Opener:
    """Gives the arrays of one committed item. `plain` arrays are ours and uncompressed."""

    def __init__(
        self, directory: epath.Path, *, zarr3: bool = True, ocdbt: bool = True, plain: bool = False
    ) -> None:
        context = ts.Context()  # files are read, not mapped: a mapped one that is cut short ends the process
        spec = database.open_spec(directory)
        self._context = context
        self._store = ts.KvStore.open(spec if ocdbt else spec["base"], context=context).result()
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
            self._found = extents.find(database.base(self._directory))
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
        piece = chunks.at(array, index)
        buffer = chunks.aligned(piece.shape, dtype)
        into = ts.array(buffer)
        for box in chunks.boxes(index, piece.shape, chunk, _AHEAD_BYTES // 4 // dtype.itemsize):
            part = piece.translate_to[0][box] if box else piece
            window.add(part.size * dtype.itemsize, each, functools.partial(chunks.at(into, box).write, part))
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
