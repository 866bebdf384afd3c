"""Columns of text that fit a terminal: one line for each row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text


@dataclasses.dataclass
class Column:
    """A column of a table. One that `bends` is cut at a word, down to `least`, where there is no room."""

    name: str
    cells: list[str]
    is_right: bool = False
    bends: bool = False
    least: int = 0
    alarms: bool = False
    """What it says in capitals is shown in red."""

    @property
    def natural(self) -> int:
        return max(map(cell_len, (self.name, *self.cells)))

    @property
    def needed(self) -> int:
        return min(self.natural, self.least) if self.bends else self.natural


_GAP = 2


def room(columns: Sequence[Column]) -> int:
    """The width that these columns need at least."""
    return sum(each.needed for each in columns) + _GAP * (len(columns) - 1)


def table(columns: Sequence[Column], width: int | None) -> Text:
    """One line for each row, with a line of names; no line is longer than `width`."""
    spare = None if width is None else width - room(columns)
    lines = [Text() for _ in range(len(columns[0].cells) + 1)]
    for place, column in enumerate(columns):
        wide = column.natural
        if spare is not None and column.bends:
            wide = min(wide, column.needed + max(spare, 0))
            spare -= wide - column.needed
        is_last = place == len(columns) - 1
        for line, cell in zip(lines, (column.name, *column.cells), strict=True):
            shown = shortened(cell, wide)
            fill = " " * (wide - cell_len(shown))
            style = "bold" if line is lines[0] else "bold red" if column.alarms and shown[:2].isupper() else ""
            line.append(" " * (_GAP if place else 0) + (fill if column.is_right else ""))
            line.append(shown, style)
            line.append("" if column.is_right or is_last else fill)
    for line in lines:
        line.rstrip()
    return Text("\n", no_wrap=True, overflow="ignore").join(lines)


def shortened(text: str, width: int) -> str:
    """A text that fits, cut after a word; a word that is too long by itself is cut."""
    if cell_len(text) <= width:
        return text
    cut = next(text[:n] for n in range(len(text), -1, -1) if cell_len(text[:n]) <= width - 1)
    words = cut.rpartition(" ")[0] if text[len(cut)] != " " else cut
    return f"{(words or cut).rstrip(' ,')}…"
