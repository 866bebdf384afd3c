"""The nodes of an OCDBT database, decoded as its format describes them.

`tensorstore.ocdbt.dump` tells the same, and never frees what it has told (0.1.86: half a kilobyte for each entry).
https://google.github.io/tensorstore/kvstore/ocdbt/index.html#storage-format
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import google_crc32c
import numpy as np

_MAGIC = bytes.fromhex("0cdb20de")
_MOST_BYTES_OF_A_NUMBER = 10


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


def decode(data: bytes, base: bytes) -> Node | None:
    """A node of which `base` is known; None if it is compressed. Raises ValueError for a damaged one."""
    if data[:4] != _MAGIC or int.from_bytes(data[4:12], "little") != len(data):
        raise ValueError("a node of the database is not where it should be")
    if google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ValueError("the checksum of a node of the database does not match")
    if data[13]:
        return None
    if data[12]:
        raise ValueError("a node of the database has a format that is not known")
    rest = _Rest(data[:-4], 14)
    height = rest.bytes(1)[0]
    files = list(_files(rest, base))
    (count,) = rest.numbers(1)
    suffixes, prefixes = _key_lengths(rest, count)
    common = rest.numbers(count) if height else []
    keys = list(_keys(rest, prefixes, suffixes))
    if height:
        ids, offsets, sizes = (rest.numbers(count) for _ in range(3))
        places = [Place(*files[n], offset, size) for n, offset, size in zip(ids, offsets, sizes, strict=True)]
        below = [key[:size] for key, size in zip(keys, common, strict=True)]
        return Node([], [], list(zip(below, places, strict=True)))
    return Node(keys, list(_values(rest, count, files)), [])


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
        if not count:
            return []
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


def _keys(rest: _Rest, prefixes: Sequence[int], suffixes: Sequence[int]) -> Iterator[bytes]:
    """Each key begins as the one before it does."""
    key = b""
    for prefix, suffix in zip(prefixes, suffixes, strict=True):
        key = key[:prefix] + rest.bytes(suffix)
        yield key


def _values(rest: _Rest, count: int, files: Sequence[tuple[bytes, bytes]]) -> Iterator[Place | bytes]:
    sizes, kinds = rest.numbers(count), rest.bytes(count)
    elsewhere = sum(kinds)
    ids, offsets = rest.numbers(elsewhere), rest.numbers(elsewhere)
    places = zip(ids, offsets, strict=True)
    for size, is_elsewhere in zip(sizes, kinds, strict=True):
        if is_elsewhere:
            file, offset = next(places)
            yield Place(*files[file], offset, size)
        else:
            yield rest.bytes(size)
