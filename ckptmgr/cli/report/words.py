"""Numbers, times and texts of the report, in words."""

from __future__ import annotations

import datetime
import html
from collections.abc import Iterable, Sequence
from typing import TypeVar

_Row = TypeVar("_Row")
_LONGEST = 300
NO_JOURNAL = "Not known: the run has no journal (a bucket, or saved by stock Orbax)."


def shorten(value: object, most: int = _LONGEST) -> str:
    """A text without its middle if it is long: names and messages may have any length."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-most // 3 :]}"


def escape(value: object, most: int = _LONGEST) -> str:
    """A short text as HTML."""
    return html.escape(shorten(value, most))


def when(seconds: float) -> str:
    """A time in UTC, to the second; a time that no calendar has is said as a number."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g} s after 1970"


def count(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun: 1 step, 2 steps."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def listing(names: Sequence[object], most: int = 8) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(shorten(name, 120) for name in names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def thinned(rows: Sequence[_Row], most: int, keep: Iterable[int] = ()) -> tuple[list[_Row], str]:
    """Every n-th of the rows, the last, and those at the places `keep`; and a sentence if some are left out."""
    every = -(-len(rows) // most) or 1
    places = sorted({*range(0, len(rows), every), *([len(rows) - 1] if rows else []), *keep})
    return [rows[place] for place in places], f"Only one of {every} is shown." if every > 1 else ""
