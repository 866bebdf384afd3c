"""A checkpoint as a tree of modules, cut at a depth."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rich.text import Text
from rich.tree import Tree

from ckptmgr.cli.amounts import leaves, size

Facts = Mapping[str, Any]
Rows = list[tuple[list[str], Facts]]
"""Leaves, each with the parts of its path that are left."""
_MOST_LINES = 200


def grow(root: Tree, items: Mapping[str, Rows], depth: int) -> int:
    """Adds items with their leaves, so many levels deep; returns how many leaves are shown."""
    shown = 0
    for name, rows in items.items():
        if [parts for parts, _ in rows] == [[]]:
            root.add(_leaf(name, rows[0][1]))
            shown += 1
        elif rows:
            shown += _grow(root.add(_total(name, [leaf for _, leaf in rows])), rows, depth - 1)
        else:
            root.add(Text.assemble((name, "bold"), "  no arrays"))
    return shown


def parts(path: str) -> list[str]:
    """Splits a path: "[0].mu['w']" becomes [0], .mu, ['w']."""
    parts, start = [], 0
    for at, letter in enumerate(path):
        inside = path.count("[", start, at) > path.count("]", start, at)
        if letter in "[." and at > start and not inside:
            parts.append(path[start:at])
            start = at
    return [*parts, path[start:]] if path else []


def _below(rows: Rows) -> dict[str, Rows]:
    """The rows of each node that is next; keys with numbers in them in the order of these."""
    found: dict[str, Rows] = {}
    for parts, leaf in rows:
        found.setdefault(parts[0], []).append((parts[1:], leaf))
    if not all(name.startswith("['") for name in found):
        return found
    return dict(sorted(found.items(), key=lambda each: _natural(each[0])))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key by which block2 comes before block10."""
    pieces = re.findall(r"\d+|\D+", name)
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces]


def depth_of(rows: Rows) -> int:
    return max((len(parts) for parts, _ in rows), default=0)


def _lines(rows: Rows, depth: int) -> int:
    """The lines that these rows take, so many levels deep."""
    return len({tuple(parts[:level]) for parts, _ in rows for level in range(1, min(len(parts), depth) + 1)})


def fitting(items: Mapping[str, Rows], deepest: int) -> int:
    """The largest depth that does not take too many lines."""
    for depth in range(deepest, 1, -1):
        if sum(1 + _lines(rows, depth - 1) for rows in items.values()) <= _MOST_LINES:
            return depth
    return 1


def _grow(branch: Tree, rows: Rows, depth: int) -> int:
    """Adds leaves below a node, each node with its total size; returns how many leaves are shown."""
    if depth <= 0:
        return 0
    shown = 0
    for name, group in _below(rows).items():
        if len(group) == 1 and not group[0][0]:
            branch.add(_leaf(name, group[0][1]))
            shown += 1
        else:
            shown += _grow(branch.add(_total(name, [leaf for _, leaf in group])), group, depth - 1)
    return shown


def _total(name: str, below: list[Facts]) -> Text:
    nbytes = size(sum(leaf["nbytes"] for leaf in below))
    return Text.assemble((name, "bold"), f"  {leaves(len(below))}, {nbytes}")


def _leaf(name: str, leaf: Facts) -> Text:
    kind = f"{leaf['dtype']}[{','.join(map(str, leaf['shape']))}]"
    if leaf["kind"] not in ("jax", "scalar", "key"):
        kind += f" {leaf['kind']}"
    where = "" if leaf["sharding"] is None else f"  P({', '.join(map(repr, leaf['sharding']))})"
    return Text(f"{name}  {kind}  {size(leaf['nbytes'])}{where}")
