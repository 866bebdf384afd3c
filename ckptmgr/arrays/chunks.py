"""The form of an array on disk: chunks, codecs, and the bytes of one chunk.

zarr3 with the codecs `bytes` (little-endian, in C order), `zstd` if asked, and `crc32c`. A small chunk is
encoded and checked here, without opening an array for it: for many small arrays that is five to eight times
faster. `chunk_shape` decides the cut. The cut of each leaf is in the manifest, so older steps stay readable.
`extents`, `format/schema`, `orbax/item_files` and `saving/sealing` also assume that chunks are a regular grid.

Format: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/crc32c/index.html
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import google_crc32c
import numpy as np
import tensorstore as ts

from ckptmgr.specs import LeafSpec
from ckptmgr.trees.structure import numpy_dtype

Values = np.ndarray[Any, Any]
Index = tuple[slice, ...]

BYTES_ALONE = frozenset({"uint2", "uint4", "float8_e4m3", "float6_e2m3fn", "float6_e3m2fn"})
"""Types that TensorStore has no name for: one byte a value, stored as uint8."""

_PACKED = frozenset({"int2", "int4", "float4_e2m1fn"})  # TensorStore normalises their spare bits, JAX packs them
_DIRECT_BYTES = 1 << 20
_SMALL_BYTES = 1 << 20  # smaller chunks cost more than they save
_MOST_PARTS = 1024  # of a chunk that is cut once: a prime number of a million would make a million
_ALIGNMENT = 64
RESIDUE = 0x48674BC7  # CRC-32C of anything followed by its own CRC-32C, little-endian


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """One array as it lies on disk."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize

    def is_direct(self) -> bool:
        """Whether its chunks are small enough, and plain enough, to be encoded and checked here."""
        return math.prod(self.chunks) * numpy_dtype(self.dtype).itemsize <= _DIRECT_BYTES and self.is_raw()

    def is_raw(self) -> bool:
        """Whether a chunk is the very bytes of its values in memory, and their checksum."""
        return self.dtype not in _PACKED and sys.byteorder == "little"


def chunk_shape(shape: Sequence[int], shard: Sequence[int], itemsize: int, chunk_bytes: int) -> tuple[int, ...]:
    """The largest chunk of at most `chunk_bytes` that no two shards share, cut along the longest axes.

    A chunk is read whole, so it bounds what a restore onto another layout has to read: of an array in n
    shards the axes that are not sharded are cut too, until one of n shards along them would read at
    most twice what it needs. Two processes could not write one chunk, so an axis that is sharded is cut into
    equal parts; where a prime number allows only tiny ones, the chunk stays larger.
    """
    chunk = [max(1, size) for size in shard]
    is_sharded = [have != part for have, part in zip(shape, shard, strict=True)]
    while math.prod(chunk) * itemsize > chunk_bytes:
        smaller = [_next_smaller(size, sharded=is_sharded[axis]) for axis, size in enumerate(chunk)]
        cuts = [(size, axis) for axis, size in enumerate(chunk) if smaller[axis] < size]
        if not cuts:
            break
        _, axis = max(cuts)
        chunk[axis] = smaller[axis]
    shards = math.prod(have // part for have, part in zip(shape, shard, strict=True) if part)
    for axis, have in enumerate(shape):
        while not is_sharded[axis] and chunk[axis] > 1 and chunk[axis] * shards > 2 * have:
            if math.prod(chunk) * itemsize <= 2 * _SMALL_BYTES:
                break
            chunk[axis] = _next_smaller(chunk[axis], sharded=False)
    return tuple(chunk)


def stored(spec: LeafSpec) -> Stored:
    """How a leaf of a committed step lies on disk."""
    return _stored(spec.shape, spec.dtype, spec.chunks)


@functools.lru_cache(maxsize=4096)
def _stored(shape: tuple[int, ...], dtype: str, chunks: tuple[int, ...] | None) -> Stored:
    """Leaves have few forms."""
    return Stored(shape, "uint8" if dtype in BYTES_ALONE else dtype, chunks or whole(shape))


def is_packed(dtype: str) -> bool:
    """Whether JAX may hold its values otherwise than numpy does."""
    return dtype in _PACKED or dtype in BYTES_ALONE


def whole(shape: Sequence[int]) -> tuple[int, ...]:
    """The chunk that holds all of an array."""
    return tuple(max(1, size) for size in shape)


def runs(sizes: Sequence[int], bound: int | None) -> list[range]:
    """Neighbours that stay within a bound together; one that is larger is alone."""
    if bound is None or sum(sizes) <= bound:
        return [range(len(sizes))]
    starts, held = [0], 0
    for place, size in enumerate(sizes):
        if held and held + size > bound:
            starts.append(place)
            held = 0
        held += size
    return [range(first, last) for first, last in itertools.pairwise([*starts, len(sizes)])]


def round_up(nbytes: int) -> int:
    """To where the next array may begin, as `aligned` has it."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def aligned(shape: Sequence[int], dtype: np.dtype[Any]) -> Values:
    """Memory for an array that begins where JAX wants it; from elsewhere it copies to the CPU's device."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + nbytes].view(dtype).reshape(shape)


def give_back() -> None:
    """Returns freed memory to the system: glibc keeps much of it, and spreads what comes next over it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _next_smaller(size: int, *, sharded: bool) -> int:
    """The next smaller chunk along an axis; `size` if there is none."""
    if not sharded:
        return -(-size // 2)
    return next((size // k for k in range(2, min(size, _MOST_PARTS) + 1) if size % k == 0), size)


# ---------------------------------------------------------------- zarr's own words


def metadata(stored: Stored, compression: str | None) -> dict[str, Any]:
    """What an array is, as zarr3 says it."""
    to_bytes: dict[str, Any] = {"name": "bytes"}
    if numpy_dtype(stored.dtype).itemsize > 1:  # zarr3 allows no byte order for single bytes
        to_bytes["configuration"] = {"endian": "little"}
    squeeze = [{"name": "zstd", "configuration": {"level": 1}}] if compression == "zstd" else []
    return {
        "shape": stored.shape,
        "data_type": stored.dtype,
        "codecs": [to_bytes, *squeeze, {"name": "crc32c"}],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": stored.chunks}},
    }


@functools.lru_cache(maxsize=4096)
def zarr_json(stored: Stored) -> bytes:
    """The `zarr.json` of an uncompressed array, as TensorStore itself writes it."""
    store = ts.KvStore.open({"driver": "memory"}).result()
    spec = ts.Spec({"driver": "zarr3", "metadata": metadata(stored, None)})
    ts.open(spec, kvstore=store, create=True, context=ts.Context()).result()
    return bytes(store.read("zarr.json").result().value)


def prefix(name: str) -> str:
    """What the keys of an array begin with."""
    return f"{name}/" if name else ""


def at(array: Any, index: Index) -> Any:
    """A piece of an array; () is all of it."""
    return array[index] if index else array


ONLY = ["/".join(["c", *["0"] * rank]) for rank in range(33)]
"""The name of the only chunk of an array of each rank."""


def boxes(index: Index, shape: Sequence[int], chunk: Sequence[int], most: int) -> Iterator[Index]:
    """A piece of an array, which is at `index` of it, cut between chunks: `most` bounds the values of the chunks
    that a box takes from, of which there is one at least."""
    starts = [axis.start or 0 for axis in index] if index else [0] * len(shape)
    steps = list(chunk)  # how far a box goes along each axis: the last axes first, whose values are neighbours
    for axis in reversed(range(len(shape))):
        room = most // math.prod(steps)
        steps[axis] *= min(max(1, room), -(-shape[axis] // steps[axis]) + 1)
    cuts = [
        [0, *range(-(-(first + 1) // step) * step - first, have, step), have]
        for first, have, step in zip(starts, shape, steps, strict=True)
    ]
    return itertools.product(*[[slice(a, b) for a, b in itertools.pairwise(each)] for each in cuts])


def taken_from(index: Index, box: Index, chunk: Sequence[int]) -> int:
    """How many chunks a box of a piece takes from, all of which are read for it."""
    starts = [axis.start or 0 for axis in index] if index else [0] * len(box)
    spans = [(first + axis.start, first + axis.stop) for first, axis in zip(starts, box, strict=True)]
    return math.prod(-(-last // size) - first // size for (first, last), size in zip(spans, chunk, strict=True))


# ---------------------------------------------------------------- one chunk


def encoded(part: Values, index: Index, chunk: tuple[int, ...]) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every chunk of a part of an array; the part begins where a chunk does."""
    if part.shape == chunk and not index:
        yield ONLY[part.ndim], _seal(part)
        return
    starts = [axis.start or 0 for axis in index] if index else [0] * part.ndim
    grid = [range(0, have, size) for have, size in zip(part.shape, chunk, strict=True)]
    for corner in itertools.product(*grid):
        block = part[tuple(slice(at, at + size) for at, size in zip(corner, chunk, strict=True))]
        place = [(a + b) // size for a, b, size in zip(starts, corner, chunk, strict=True)]
        yield "/".join(["c", *map(str, place)]), _seal(_padded(block, chunk))


def _padded(block: Values, chunk: tuple[int, ...]) -> Values:
    """zarr3 stores a chunk at the edge of an array in full."""
    if block.shape == chunk:
        return block
    full = np.zeros(chunk, block.dtype)
    full[tuple(slice(size) for size in block.shape)] = block
    return full


def _seal(values: Values) -> bytes:
    """The bytes of a chunk, with their checksum behind them."""
    data = values.tobytes()
    return data + int(google_crc32c.value(data)).to_bytes(4, "little")


def decode(data: bytes, stored: Stored) -> Values:
    """The values of an array of one chunk; raises ValueError if a bit of them has changed."""
    if len(data) != stored.nbytes + 4:
        raise ValueError(f"its chunk has {len(data)} bytes instead of {stored.nbytes + 4}")
    if google_crc32c.value(data) != RESIDUE:
        raise ValueError("the checksum of its chunk does not match")
    return np.frombuffer(data, numpy_dtype(stored.dtype), math.prod(stored.shape)).reshape(stored.shape)
