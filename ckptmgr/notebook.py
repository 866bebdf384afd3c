"""Tables of values for notebooks, as HTML: escaped, bounded, and without colours of their own.

So they are readable in dark themes too.
"""

from __future__ import annotations

import datetime
import functools
import html
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

MOST_ROWS = 20
_LONGEST = 200
_SHORT = 30
_WHOLE = " style='white-space: nowrap'"  # a time or a size in two lines is hard to read
_Self = TypeVar("_Self")


def safely(draw: Callable[[_Self], str]) -> Callable[[_Self], str]:
    """Makes a `_repr_html_` that shows what is wrong instead of raising it."""

    @functools.wraps(draw)
    def draws(self: _Self) -> str:
        try:
            return draw(self)
        except Exception as problem:  # of a disk or of a client: a cell of a notebook must not fail for it
            return f"<div>{text(repr(self))}<p>{text(problem)}</p></div>"

    return draws


def text(value: object) -> str:
    """A value as escaped text, cut if it is long."""
    found = str(value)
    found = found if len(found) <= _LONGEST else f"{found[: _LONGEST - 3]}..."
    return html.escape(found.encode("utf-8", "backslashreplace").decode())


def when(seconds: float) -> str:
    """A time since the epoch; "" if it is not known or no date."""
    try:
        return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC" if seconds else ""
    except (OverflowError, ValueError, OSError):
        return ""


def page(title: object, *parts: str) -> str:
    """A title, and what is below it."""
    return f"<div><strong>{text(title)}</strong>{''.join(parts)}</div>"


def facts(rows: Mapping[str, object]) -> str:
    """A table of two columns; rows without a value are left out."""
    shown = {name: value for name, value in rows.items() if value not in (None, "")}
    body = "".join(
        f"<tr><th scope='row'>{text(name)}</th><td>{text(each)}</td></tr>" for name, each in shown.items()
    )
    return f"<table><tbody>{body}</tbody></table>" if body else ""


def table(head: Iterable[object], rows: Iterable[Iterable[object]], count: int, what: str = "rows") -> str:
    """The first rows of a table, and how many more there are of `count`; nothing if there are none."""
    shown = "".join(f"<tr>{_cells(row)}</tr>" for row in itertools.islice(rows, MOST_ROWS))
    if not shown:
        return ""
    titles = "".join(f"<th scope='col'>{text(title)}</th>" for title in head)
    more = f"<p>{count - MOST_ROWS:,} more {text(what)}</p>" if count > MOST_ROWS else ""
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{shown}</tbody></table>{more}"


def mapping(head: tuple[str, str], rows: Mapping[Any, object], what: str) -> str:
    """A table of names and values."""
    return table(head, rows.items(), len(rows), what)


def names(title: str, found: Collection[object]) -> str:
    """A table of one column."""
    return table([title], ([each] for each in found), len(found), title)


def _cells(row: Iterable[object]) -> str:
    return "".join(f"<td{_WHOLE if len(str(cell)) <= _SHORT else ''}>{text(cell)}</td>" for cell in row)
