"""Bytes and seconds as people read them: in the log, in notebooks, on the command line and in reports."""

from __future__ import annotations


def format_bytes(nbytes: float) -> str:
    """A number of bytes with its unit, in powers of 1000: "999 B", "1.5 kB", "12.0 GB"."""
    size, unit = nbytes, "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(round(size, 1 if unit != "B" else 0)) < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def format_s(seconds: float) -> str:
    """A time in three digits: milliseconds below ten of them, and whole seconds from a hundred on."""
    if 0 < abs(seconds) < 0.01:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def format_rate(nbytes: float, seconds: float) -> str:
    """Bytes a second: "1.2 GB/s"; of no time at all "0 B/s"."""
    return f"{format_bytes(nbytes / seconds if seconds > 0 else 0)}/s"
