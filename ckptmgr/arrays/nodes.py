"""The manifest and the nodes of an OCDBT database, decoded as its format describes them.

`tensorstore.ocdbt.dump` gives the same, and never frees its answer (0.1.86: half a kilobyte for each entry).
https://google.github.io/tensorstore/kvstore/ocdbt/index.html#storage-format
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import google_crc32c
import numpy as np

_MANIFEST, _NODE = bytes.fromhex("0cdb3a2a"), bytes.fromhex("0cdb20de")
_NOWHERE = 2**64 - 1  # the root of an empty database
_MOST_BYTES_OF_A_NUMBER = 10
_MOST_BITS = 7 * _MOST_BYTES_OF_A_NUMBER
_FEW = 8  # numbers: numpy takes longer


class Place(NamedTuple):
    """Where the bytes of a node or of a value are. `base` is what the names in a node begin with."""

    base: bytes
    file: bytes
    offset: int
    nbytes: int


class Node(NamedTuple):
    """Its keys, and for each the place of its value, or the value; or the nodes below, each with its prefix."""

    keys: Sequence[bytes]
    values: Sequence[Place | bytes]
    children: Sequence[tuple[bytes, Place]]


def roots(manifest: bytes) -> list[Place] | None:
    """The root of the newest version in `manifest.ocdbt`, if there is one; None for a manifest of another form.

    Raises ValueError for a damaged one.
    """
    rest = _open(manifest, _MANIFEST, "the manifest")
    if rest is None:
        return None
    rest.bytes(16)  # uuid
    (kind,) = rest.numbers(1)
    rest.numbers(2)  # the most bytes of a value inside of a node, and of a node
    rest.bytes(1)  # arity of the tree of versions
    (compression,) = rest.numbers(1)
    if kind or compression > 1:
        return None
    rest.bytes(4 * compression)  # the level
    files = list(_files(rest, b""))
    (count,) = rest.numbers(1)
    generations, _, ids, offsets, sizes = (
        rest.numbers(count), rest.bytes(count), rest.numbers(count), rest.numbers(count), rest.numbers(count)
    )  # fmt: skip
    if not count:
        return None
    newest = generations.index(max(generations))
    if offsets[newest] == _NOWHERE:
        return []
    return _places(files, ids[newest:], offsets[newest:], sizes[newest:])[:1]


def _open(data: bytes, magic: bytes, what: str) -> _Rest | None:
    """The body of a manifest or a node; None if it is compressed. Raises ValueError for a damaged one."""
    if data[:4] != magic or int.from_bytes(data[4:12], "little") != len(data):
        raise ValueError(f"{what} of the database is not where it should be")
    if google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ValueError(f"the checksum of {what} of the database does not match")
    if data[13]:
        return None
    if data[12]:
        raise ValueError(f"{what} of the database has a format that is not known")
    return _Rest(data[:-4], 14)


def decode(data: bytes, base: bytes) -> Node | None:
    """A node of which `base` is known; None if it is compressed. Raises ValueError for a damaged one."""
    rest = _open(data, _NODE, "a node")
    if rest is None:
        return None
    height = rest.bytes(1)[0]
    files = list(_files(rest, base))
    (count,) = rest.numbers(1)
    suffixes, prefixes = _key_lengths(rest, count)
    common = rest.numbers(count) if height else []
    keys = _keys(rest, prefixes, suffixes)
    if height:
        ids, offsets, sizes = (rest.numbers(count) for _ in range(3))
        places = _places(files, ids, offsets, sizes)
        below = [key[:size] for key, size in zip(keys, common, strict=True)]
        return Node([], [], list(zip(below, places, strict=True)))
    return Node(keys, _values(rest, count, files), [])


class _Rest:
    """What of a node is not read yet."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at

    def bytes(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        if len(found) != count:
            raise ValueError("a node of the database ends too early")
        self._at += count
        return found

    def numbers(self, count: int) -> list[int]:
        """Unsigned numbers in groups of seven bits, the lowest first; the highest bit says that more follow."""
        if count <= _FEW:
            return self._few(count)
        most = count * _MOST_BYTES_OF_A_NUMBER
        raw = np.frombuffer(self._data[self._at : self._at + most], np.uint8)
        last = np.flatnonzero(raw < 128)[:count]
        if len(last) != count:
            raise ValueError("a node of the database ends too early")
        first = np.concatenate([[0], last[:-1] + 1])
        used = raw[: last[-1] + 1]
        place = np.arange(len(used)) - np.repeat(first, last - first + 1)
        self._at += len(used)
        groups = (used & 127).astype(np.uint64) << (7 * place).astype(np.uint64)
        found: list[int] = np.add.reduceat(groups, first).tolist()
        return found

    def _few(self, count: int) -> list[int]:
        """The same in one loop: of a small database there is little else to read."""
        data, at, found = self._data, self._at, []
        for _ in range(count):
            number = place = 0
            while (byte := data[at] if at < len(data) else -1) >= 128 and place < _MOST_BITS:
                number |= (byte & 127) << place
                place += 7
                at += 1
            if byte < 0:
                raise ValueError("a node of the database ends too early")
            if place == _MOST_BITS:
                raise ValueError("a node of the database has a number that is too long")
            found.append(number | byte << place)
            at += 1
        self._at = at
        return found


def _files(rest: _Rest, base: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Base and name of each file that the node names."""
    (count,) = rest.numbers(1)
    suffixes, prefixes = _key_lengths(rest, count)
    bases = rest.numbers(count)
    for path, size in zip(_keys(rest, prefixes, suffixes), bases, strict=True):
        yield base + path[:size], path[size:]


def _key_lengths(rest: _Rest, count: int) -> tuple[list[int], list[int]]:
    prefixes = [0, *rest.numbers(count - 1)] if count else []
    return rest.numbers(count), prefixes


def _keys(rest: _Rest, prefixes: Sequence[int], suffixes: Sequence[int]) -> list[bytes]:
    """Each key begins as the one before it does."""
    found, key = [], b""
    for prefix, suffix in zip(prefixes, _cut(rest, suffixes), strict=True):
        key = key[:prefix] + suffix
        found.append(key)
    return found


def _cut(rest: _Rest, sizes: Sequence[int]) -> list[bytes]:
    """Neighbours of these sizes."""
    data = rest.bytes(sum(sizes))
    return [data[end - size : end] for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]


def _values(rest: _Rest, count: int, files: Sequence[tuple[bytes, bytes]]) -> list[Place | bytes]:
    sizes, kinds = rest.numbers(count), rest.bytes(count)
    outside = [size for size, is_outside in zip(sizes, kinds, strict=True) if is_outside]
    ids, offsets = rest.numbers(len(outside)), rest.numbers(len(outside))
    places = iter(_places(files, ids, offsets, outside))
    inside = iter(_cut(rest, [size for size, is_outside in zip(sizes, kinds, strict=True) if not is_outside]))
    return [next(places) if is_outside else next(inside) for is_outside in kinds]


def _places(
    files: Sequence[tuple[bytes, bytes]], ids: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]
) -> list[Place]:
    rows = [(*files[n], offset, size) for n, offset, size in zip(ids, offsets, sizes, strict=True)]
    return list(map(_place, rows))


_place = functools.partial(tuple.__new__, Place)  # without Python for each: there are thousands
