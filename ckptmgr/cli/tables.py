"""Formats the results of `facts` for a terminal."""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from ckptmgr import policies as policy
from ckptmgr.cli.facts import Facts


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


# ---------------------------------------------------------------- columns


@dataclasses.dataclass
class _Column:
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
_REASONS = 28
"""The width up to which reasons are shown rather than another metric."""


def _room(columns: Sequence[_Column]) -> int:
    return sum(each.needed for each in columns) + _GAP * (len(columns) - 1)


def _table(columns: Sequence[_Column], width: int | None) -> Text:
    """One line for each row, with a line of names; no line is longer than `width`."""
    spare = None if width is None else width - _room(columns)
    lines = [Text() for _ in range(len(columns[0].cells) + 1)]
    for place, column in enumerate(columns):
        wide = column.natural
        if spare is not None and column.bends:
            wide = min(wide, column.needed + max(spare, 0))
            spare -= wide - column.needed
        is_last = place == len(columns) - 1
        for line, cell in zip(lines, (column.name, *column.cells), strict=True):
            shown = _shortened(cell, wide)
            fill = " " * (wide - cell_len(shown))
            style = "bold" if line is lines[0] else "bold red" if column.alarms and shown[:2].isupper() else ""
            line.append(" " * (_GAP if place else 0) + (fill if column.is_right else ""))
            line.append(shown, style)
            line.append("" if column.is_right or is_last else fill)
    for line in lines:
        line.rstrip()
    return Text("\n", no_wrap=True, overflow="ignore").join(lines)


def _shortened(text: str, width: int) -> str:
    """A text that fits, cut after a word; a word that is too long by itself is cut."""
    if cell_len(text) <= width:
        return text
    cut = text[: width - 1]
    words = cut.rpartition(" ")[0] if text[width - 1] != " " else cut
    return f"{(words or cut).rstrip(' ,')}…"


# ---------------------------------------------------------------- a run


def run(found: Facts, width: int | None = None, metrics: Sequence[str] = ()) -> RenderableType:
    """One line for each step. Without a `width` every column is shown, and nothing is cut."""
    policies = "unknown" if found["keep"] is None else ", ".join(found["keep"]) or "everything"
    head = Text.assemble((found["run"], "bold"), f"  keeps {policies}")
    if not found["steps"]:
        return Group(head, Text("no checkpoints yet"), *_left_alone(found))
    ranked = [each.split(":")[-3] for each in found["keep"] or () if re.fullmatch(r"(.*:)?best:.*:.*:.*", each)]
    columns, hidden = _columns(found["steps"], width, metrics, ranked)
    more = [Text(f"not shown: {', '.join(hidden)} (ls --metric NAME shows one)")] if hidden else []
    return Group(head, _table(columns, width), *more, *_notes(found["steps"]), *_left_alone(found))


def _columns(
    rows: Sequence[Facts], width: int | None, wanted: Sequence[str], ranked: Sequence[str]
) -> tuple[list[_Column], list[str]]:
    """The columns that fit, in the order in which they are shown; and the metrics that do not fit.

    Metrics are shown in the order: those by which a policy ranks, then the others.
    """
    known = [name for row in reversed(rows) for name in row.get("metrics", ())]
    known = list(dict.fromkeys([*(name for name in ranked if name in known), *known]))
    digits = 6 if width is None else 5
    step = _Column("step", [str(row["step"]) for row in rows], is_right=True)
    age_ = _Column("age", [age(row["age_s"]) if "age_s" in row else "" for row in rows], is_right=True)
    size_ = _Column("size", [size(row.get("nbytes")) for row in rows], is_right=True)
    disk = _Column("on disk", [size(row.get("disk_nbytes")) for row in rows], is_right=True)
    kept = _Column("kept by", list(map(_kept, rows)), bends=True, least=12)
    note = _Column("note", list(map(_note, rows)), alarms=True)
    values = {name: _Column(name, [_metric(row, name, digits) for row in rows], is_right=True) for name in known}
    shown_values = [values[name] for name in wanted or known]
    order = [step, *[note] * any(note.cells), *shown_values[:1], size_, age_, kept, *shown_values[1:], disk]
    taken: list[_Column] = []
    for column in order:
        is_extra = column is disk and len(taken) < len(order) - 1  # others did not fit
        if width is None or column is step or (_room([*taken, column]) <= width and not is_extra):
            taken.append(column)
            if column is kept and width is not None:  # before it is cut, metrics after the first go
                kept.least = min(_REASONS, kept.least + width - _room(taken))
    shown = [each for each in (step, age_, size_, disk, *values.values(), kept, note) if each in taken]
    return shown, [name for name, column in values.items() if column not in taken and not wanted]


def _metric(row: Facts, name: str, digits: int) -> str:
    return _number(row["metrics"][name], digits) if name in row.get("metrics", ()) else ""


def _kept(row: Facts) -> str:
    if row["damaged"]:
        return ""
    return "?" if row["kept"] is None else ", ".join(map(reason, row["kept"])) or "nothing: would be deleted"


def reason(why: str) -> str:
    """Why a step is kept, in short words: a policy as the command line spells it, or what was said."""
    try:
        kept = policy.parse(why)
    except ValueError:
        return {"keep=None": "no policy deletes"}.get(why, why.partition(":")[0])
    return _short(kept)


def _short(kept: policy.KeepPolicy) -> str:
    if isinstance(kept, policy.params_only):
        return f"params of {_short(kept.policy)}"
    if isinstance(kept, policy.latest):
        return f"latest {kept.n}"
    if isinstance(kept, policy.best):
        return f"best {kept.metric}" if kept.n == 1 else f"best {kept.n} {kept.metric}"
    if isinstance(kept, policy.every_steps):
        return f"every {kept.n} steps"
    return f"every {age(kept.s)}" if isinstance(kept, policy.every_seconds) else policy.spell(kept)


_NOT_COUNTED = "not counted: "


def _note(row: Facts) -> str:
    """What is the matter with a step, in single words; `_notes` say the rest."""
    words = {
        "NOT READ": row["damaged"] and row["later_format"],
        "DAMAGED": row["damaged"] and not row["later_format"],
        "DISTRUSTED": row.get("distrusted") and not _is_left_out(row),
        "pinned": row.get("pinned") and "pinned" not in (row["kept"] or ()),
        "reduced": row.get("reduced"),
    }
    return ", ".join(word for word, holds in words.items() if holds)


def _notes(rows: Sequence[Facts]) -> list[Text]:
    """The lines below the table: what is the matter with which steps."""
    said: dict[str, list[int]] = {}
    for row in rows:
        if row["damaged"]:
            why = row["damaged"].removeprefix(f"step {row['step']}: ")
            said.setdefault(f"{'NOT READ' if row['later_format'] else 'DAMAGED'} {why}", []).append(row["step"])
        elif _is_left_out(row):
            said.setdefault(f"{_NOT_COUNTED}{row['distrusted']}", []).append(row["step"])
        elif row["distrusted"]:
            said.setdefault(f"DISTRUSTED {row['distrusted']}", []).append(row["step"])
        if row.get("reduced"):
            said.setdefault(row["reduced"].rpartition(" on ")[0], []).append(row["step"])
    return [
        Text.assemble((why, "bold red" if why[:2].isupper() else ""), _steps(steps)) for why, steps in said.items()
    ]


def _steps(steps: Sequence[int]) -> str:
    return f" (step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))})"


def _is_left_out(row: Facts) -> bool:
    """Whether a step does not count for retention, because it is not whole."""
    return any(why.startswith(_NOT_COUNTED) for why in row["kept"] or ())


def _left_alone(found: Facts) -> list[Text]:
    """A line with the names of what is not a checkpoint, if there is any."""
    told = found.get("left_alone")
    if not told or not told["count"]:
        return []
    more = told["count"] - len(told["names"])
    return [Text(f"not checkpoints, left alone: {', '.join(told['names'])}{f', and {more} more' if more else ''}")]


def _number(value: Any, digits: int = 6) -> str:
    return value if isinstance(value, str) else f"{value:.{digits}g}"


def plan(found: Facts, width: int | None = None) -> RenderableType:
    """What `keep` does or would do, below the table of the run."""
    return Group(run(found, width), changes(found))


def changes(found: Facts) -> Text:
    is_done = bool(found["deleted"] or found["reduced"])
    said = []
    for steps, done, planned in (
        (found["would_delete"], "deleted", "would be deleted"),
        (found["would_reduce"], "reduced to their params", "would be reduced to their params"),
    ):
        if steps:
            said.append(f"{done if is_done else planned}: {', '.join(map(str, steps))}")
    return Text("\n".join(said) or "nothing to delete")


# ---------------------------------------------------------------- a checkpoint

_MOST_LINES = 200
_Rows = list[tuple[list[str], Facts]]


def checkpoint(found: Facts, depth: int | None = None) -> RenderableType:
    """A tree, `depth` levels deep; without a depth as deep as a few screens can show."""
    when = datetime.datetime.fromtimestamp(found["time"]).isoformat(" ", "seconds")
    disk = f", {size(found['disk_nbytes'])} on disk" if found["disk_nbytes"] else ""
    head = Text.assemble(
        (f"{found['run']} step {found['step']}", "bold"), f"  {when}, {size(found['nbytes'])}{disk}"
    )
    doubt = [Text(f"DISTRUSTED {found['distrusted']}", style="bold red")] if found["distrusted"] else []
    items: dict[str, _Rows] = {
        name: [(_parts(leaf["path"]), leaf) for leaf in leaves] for name, leaves in found["items"].items()
    }
    deepest = 1 + max((_depth(rows) for rows in items.values()), default=0)
    depth = _fitting(items, deepest) if depth is None else depth
    root, shown = Tree(head), 0
    if found["reduced"]:
        root.add(Text(found["reduced"]))
    for name, rows in items.items():
        if name in ("step", "metrics"):
            continue  # every checkpoint has them, and they are said below
        if [leaf["path"] for _, leaf in rows] == [""]:
            root.add(_leaf(name, rows[0][1]))
            shown += 1
        elif rows:
            branch = root.add(_total(name, [leaf for _, leaf in rows]))
            shown += _grow(branch, rows, depth - 1)
        else:
            root.add(Text.assemble((name, "bold"), "  no arrays"))
    hidden = sum(map(len, items.values())) - shown
    more = [Text(f"{_leaves(hidden, ' more')}; --depth {deepest} shows them")] if hidden else []
    tail = [
        Text(f"{key}: {_pairs(found[key])}") for key in ("metrics", "metadata", "versions", "unread") if found[key]
    ]
    return Group(root, *more, *doubt, *tail)


def _pairs(values: Facts) -> str:
    return ", ".join(
        f"{name} {_number(value) if isinstance(value, float) else value}" for name, value in values.items()
    )


def _parts(path: str) -> list[str]:
    """Splits a path: "[0].mu['w']" becomes [0], .mu, ['w']."""
    parts, start = [], 0
    for at, letter in enumerate(path):
        inside = path.count("[", start, at) > path.count("]", start, at)
        if letter in "[." and at > start and not inside:
            parts.append(path[start:at])
            start = at
    return [*parts, path[start:]] if path else []


def _below(rows: _Rows) -> dict[str, _Rows]:
    """The rows of each node that is next; keys with numbers in them in the order of these."""
    found: dict[str, _Rows] = {}
    for parts, leaf in rows:
        found.setdefault(parts[0], []).append((parts[1:], leaf))
    if not all(name.startswith("['") for name in found):
        return found
    return dict(sorted(found.items(), key=lambda each: _natural(each[0])))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key by which block2 comes before block10."""
    pieces = re.findall(r"\d+|\D+", name)
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces]


def _depth(rows: _Rows) -> int:
    return max((len(parts) for parts, _ in rows), default=0)


def _lines(rows: _Rows, depth: int) -> int:
    """The lines that these rows take, so many levels deep."""
    return len({tuple(parts[:level]) for parts, _ in rows for level in range(1, min(len(parts), depth) + 1)})


def _fitting(items: Mapping[str, _Rows], deepest: int) -> int:
    """The largest depth that does not take too many lines."""
    for depth in range(deepest, 1, -1):
        if sum(1 + _lines(rows, depth - 1) for rows in items.values()) <= _MOST_LINES:
            return depth
    return 1


def _grow(branch: Tree, rows: _Rows, depth: int) -> int:
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


def _leaves(count: int, more: str = "") -> str:
    return f"{count}{more} {'leaf' if count == 1 else 'leaves'}"


def _total(name: str, leaves: list[Facts]) -> Text:
    nbytes = size(sum(leaf["nbytes"] for leaf in leaves))
    return Text.assemble((name, "bold"), f"  {_leaves(len(leaves))}, {nbytes}")


def _leaf(name: str, leaf: Facts) -> Text:
    kind = f"{leaf['dtype']}[{','.join(map(str, leaf['shape']))}]"
    if leaf["kind"] not in ("jax", "scalar", "key"):
        kind += f" {leaf['kind']}"
    where = "" if leaf["sharding"] is None else f"  P({', '.join(map(repr, leaf['sharding']))})"
    return Text(f"{name}  {kind}  {size(leaf['nbytes'])}{where}")


_MOST_DIFFERENCES = 40


def difference(found: Facts, every: bool = True, width: int | None = None) -> RenderableType:
    """The leaves that differ; without `every` the first of them, and how many more there are."""
    lines = [f"- {path}  only in the first" for path in found["only_in_first"]]
    lines += [f"+ {path}  only in the second" for path in found["only_in_second"]]
    lines += [
        f"! {path}  {one} in the first, {other} in the second" for path, (one, other) in found["changed"].items()
    ]
    values = found.get("values", [])
    most = len(lines) + len(values) if every else _MOST_DIFFERENCES
    parts: list[RenderableType] = [Text(line) for line in [*lines[:most], *_more(lines, most)]]
    if values:
        paths = [row["path"] for row in values[:most]]
        changes = [_number(row["largest_change"]) for row in values[:most]]
        columns = [_Column("largest change", changes, is_right=True), _Column("leaf", paths)]
        parts += [_table(columns, width), *map(Text, _more(values, most))]
    same = f"{_leaves(found['equal_leaves'])} with the same shape and dtype"
    changed = f"; the values of {len(values)} differ" if "values" in found else ""
    return Group(*parts, Text(same + changed))


def _more(found: Sequence[object], most: int) -> list[str]:
    return [f"... and {len(found) - most} more; --all shows them"] if len(found) > most else []


def verified(found: list[Facts]) -> RenderableType:
    lines = []
    for report in found:
        read = f"{report['files']} files, {report['leaves']} leaves, {size(report['nbytes'])}"
        verdict = ("whole", "") if report["whole"] else ("DAMAGED", "bold red")
        lines.append(Text.assemble(f"step {report['step']}: {read}: ", verdict))
        lines += [Text(f"  {each['where']}: {each['reason']}") for each in report["damages"]]
        lines += [Text(f"  not checked: {each}") for each in report["unchecked"]]
    return Group(*lines) if lines else Text("no checkpoints")


def rewound(found: Facts) -> RenderableType:
    lines = {"set aside": found["set_aside"], "come back" if not found["done"] else "came back": found["returned"]}
    said = [f"{what}: {', '.join(map(str, steps))}" for what, steps in lines.items() if steps]
    goes_on = "goes on" if found["done"] else "would go on"
    return Text("\n".join([f"the run {goes_on} from step {found['step']}", *said]))


def leftovers(found: Facts, width: int | None = None) -> RenderableType:
    rows = found["leftovers"]
    if not rows:
        return Text("nothing is left over")
    whys = [row["why"] + ("" if row["goes"] else "; is kept") for row in rows]
    columns = [
        _Column("size", [size(row["nbytes"]) for row in rows], is_right=True),
        _Column("what it is", whys, bends=True, least=24),
        _Column("where", [row["path"].removeprefix(f"{found['run']}/") for row in rows]),
    ]
    total = size(sum(row["nbytes"] for row in rows if row["goes"]))
    return Group(_table(columns, width), Text(f"{'removed' if found['removed'] else 'would be removed'}: {total}"))


def doctor(found: Facts) -> RenderableType:
    rows = [
        ("system", f"Python {found['python']} on {found['system']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
        ("devices", found["devices"] if isinstance(found["devices"], str) else ", ".join(found["devices"])),
        ("storage", _storage(found["storage"])),
        *(("not installed", f"{what}: {command}") for what, command in found["not_installed"].items()),
    ]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name, "bold"), Text(value))
    warnings = [Text(f"WARNING {each}", style="bold red") for each in found["warnings"]]
    return Group(table, *_left_alone(found), *(warnings or [Text("nothing is wrong")]))


def _storage(found: Facts) -> str:
    if "error" in found:
        return f"{found['directory']}: {found['error']}"
    speeds = f"writes {size(found['write_bytes_per_s'])}/s, reads {size(found['read_bytes_per_s'])}/s"
    free = f", {size(found['free_bytes'])} free" if found["free_bytes"] else ""
    return f"{found['directory']}: {speeds}{free}"
