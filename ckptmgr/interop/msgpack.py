"""What `flax.serialization.to_bytes` wrote."""

from __future__ import annotations

import os
from typing import Any


def load(path: str | os.PathLike[str]) -> Any:
    """Reads a file as nested dicts of arrays."""
    try:
        from flax import serialization
    except ImportError:
        raise ImportError(".msgpack files need flax: pip install 'ckptmgr[interop]'") from None
    with open(path, "rb") as file:
        return serialization.msgpack_restore(file.read())
