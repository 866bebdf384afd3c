"""Files of `flax.serialization.to_bytes`, also flax's own `checkpoint_N`."""

from __future__ import annotations

import os
from typing import Any

from ckptmgr.interop import names

_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8} | {
    first + n: 1 << n for first in (0xCC, 0xD0) for n in range(4)
}
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_COUNTED = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
_FIXED_EXTENSIONS = {0xD4 + n: 1 << n for n in range(5)}
_EXTENSIONS = (0xC7, 0xC8, 0xC9)


def load(path: str | os.PathLike[str]) -> Any:
    """Reads a file as nested dicts of arrays."""
    try:
        from flax import serialization
    except ImportError:
        raise ImportError(".msgpack files need flax: pip install 'ckptmgr[interop]'") from None
    with open(path, "rb") as file:
        data = file.read()
    _check(memoryview(data), within=True)
    return serialization.msgpack_restore(data)


def _check(data: memoryview, *, within: bool) -> None:
    """Refuses headers with more values than there are bytes: msgpack allocates memory for them in advance.

    Args:
      within: also checks the inside of extensions, which hold flax's arrays.
    """
    at, promised, open_ = 0, 1, [1]
    while open_:
        if not open_[-1]:
            open_.pop()
            continue
        open_[-1] -= 1
        body, end, children = _header(data, at)
        if within and data[at] in (*_EXTENSIONS, *_FIXED_EXTENSIONS):
            _check(data[body:end], within=False)
        at, promised = end, promised - 1 + children
        if at + promised > len(data):
            raise ValueError(f"it declares more values than its {len(data)} bytes can hold")
        if children:
            open_.append(children)
        if len(open_) > names.DEEPEST:
            raise ValueError(f"it is nested more than {names.DEEPEST} deep")


def _header(data: memoryview, at: int) -> tuple[int, int, int]:
    """Where the body of the value at `at` begins and ends, and how many values follow as its children.

    https://github.com/msgpack/msgpack/blob/master/spec.md
    """
    first = data[at]
    if first < 0x80 or first >= 0xE0:
        return at + 1, at + 1, 0
    if first < 0xA0:
        return at + 1, at + 1, (first & 0x0F) * (1 if first >= 0x90 else 2)
    if first < 0xC0:
        return at + 1, at + 1 + (first & 0x1F), 0
    if first in _COUNTED:
        width, each = _COUNTED[first]
        return at + 1 + width, at + 1 + width, each * int.from_bytes(data[at + 1 : at + 1 + width], "big")
    if first in _FIXED_EXTENSIONS:
        return at + 2, at + 2 + _FIXED_EXTENSIONS[first], 0
    if first in _SIZED:
        width = _SIZED[first]
        body = at + 1 + width + (first in _EXTENSIONS)
        return body, body + int.from_bytes(data[at + 1 : at + 1 + width], "big"), 0
    return at + 1, at + 1 + _FIXED[first], 0
