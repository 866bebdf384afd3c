"""Numbers as people read them: bytes, times, metrics."""

from __future__ import annotations

from typing import Any


def size(nbytes: float | None) -> str:
    """A number of bytes with its unit, in powers of 1000."""
    if nbytes is None:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


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
