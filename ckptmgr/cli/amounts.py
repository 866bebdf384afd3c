"""Numbers as people read them: bytes, times, metrics."""

from __future__ import annotations

from typing import Any

from ckptmgr.units import format_bytes


def size(nbytes: float | None) -> str:
    """A number of bytes with its unit; nothing where it is not known."""
    return "" if nbytes is None else format_bytes(nbytes)


def age(seconds: float) -> str:
    """A duration in its largest fitting unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def number(value: Any, digits: int = 6) -> str:
    """A metric; NaN and infinity are text already."""
    return value if isinstance(value, str) else f"{value:.{digits}g}"


def leaves(count: int, more: str = "") -> str:
    """A number of leaves, in words."""
    return f"{count}{more} {'leaf' if count == 1 else 'leaves'}"
