"""Formats the results of `facts` for a terminal."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from ckptmgr import policies as policy
from ckptmgr.cli import tree
from ckptmgr.cli.amounts import age, number, size
from ckptmgr.cli.amounts import leaves as count_leaves
from ckptmgr.cli.columns import Column, room, table
from ckptmgr.cli.facts import Facts

_REASONS = 28
"""The width up to which reasons are shown rather than another metric."""


def run(found: Facts, width: int | None = None, metrics: Sequence[str] = ()) -> RenderableType:
    """One line for each step. Without a `width` every column is shown, and nothing is cut."""
    policies = "unknown" if found["keep"] is None else ", ".join(found["keep"]) or "everything"
    head = Text.assemble((found["run"], "bold"), f"  keeps {policies}")
    if not found["steps"]:
        return Group(head, Text("no checkpoints yet"), *_left_alone(found))
    ranked = [each.split(":")[-3] for each in found["keep"] or () if re.fullmatch(r"(.*:)?best:.*:.*:.*", each)]
    columns, hidden = _columns(found["steps"], width, metrics, ranked)
    more = [Text(f"not shown: {', '.join(hidden)} (ls --metric NAME shows one)")] if hidden else []
    return Group(head, table(columns, width), *more, *_notes(found["steps"]), *_left_alone(found))


def _columns(
    rows: Sequence[Facts], width: int | None, wanted: Sequence[str], ranked: Sequence[str]
) -> tuple[list[Column], list[str]]:
    """The columns that fit, in the order in which they are shown; and the metrics that do not fit.

    Metrics are shown in the order: those by which a policy ranks, then the others.
    """
    known = [name for row in reversed(rows) for name in row.get("metrics", ())]
    known = list(dict.fromkeys([*(name for name in ranked if name in known), *known]))
    digits = 6 if width is None else 5
    step = Column("step", [str(row["step"]) for row in rows], is_right=True)
    age_ = Column("age", [age(row["age_s"]) if "age_s" in row else "" for row in rows], is_right=True)
    size_ = Column("size", [size(row.get("nbytes")) for row in rows], is_right=True)
    disk = Column("on disk", [size(row.get("disk_nbytes")) for row in rows], is_right=True)
    kept = Column("kept by", list(map(_kept, rows)), bends=True, least=12)
    note = Column("note", list(map(_note, rows)), alarms=True)
    values = {name: Column(name, [_metric(row, name, digits) for row in rows], is_right=True) for name in known}
    shown_values = [values[name] for name in wanted or known]
    order = [step, *[note] * any(note.cells), *shown_values[:1], size_, age_, kept, *shown_values[1:], disk]
    taken: list[Column] = []
    for column in order:
        is_extra = column is disk and len(taken) < len(order) - 1  # others did not fit
        if width is None or column is step or (room([*taken, column]) <= width and not is_extra):
            taken.append(column)
            if column is kept and width is not None:  # before it is cut, metrics after the first go
                kept.least = min(_REASONS, kept.least + width - room(taken))
    shown = [each for each in (step, age_, size_, disk, *values.values(), kept, note) if each in taken]
    return shown, [name for name, column in values.items() if column not in taken and not wanted]


def _metric(row: Facts, name: str, digits: int) -> str:
    return number(row["metrics"][name], digits) if name in row.get("metrics", ()) else ""


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


def checkpoint(found: Facts, depth: int | None = None) -> RenderableType:
    """A tree, `depth` levels deep; without a depth as deep as a few screens can show."""
    when = datetime.datetime.fromtimestamp(found["time"]).isoformat(" ", "seconds")
    disk = f", {size(found['disk_nbytes'])} on disk" if found["disk_nbytes"] else ""
    head = Text.assemble(
        (f"{found['run']} step {found['step']}", "bold"), f"  {when}, {size(found['nbytes'])}{disk}"
    )
    doubt = [Text(f"DISTRUSTED {found['distrusted']}", style="bold red")] if found["distrusted"] else []
    named = {name: leaves for name, leaves in found["items"].items() if name not in ("step", "metrics")}
    items = {name: [(tree.parts(leaf["path"]), leaf) for leaf in leaves] for name, leaves in named.items()}
    deepest = 1 + max(map(tree.depth_of, items.values()), default=0)
    root = Tree(head)
    if found["reduced"]:
        root.add(Text(found["reduced"]))
    shown = tree.grow(root, items, tree.fitting(items, deepest) if depth is None else depth)
    hidden = sum(map(len, items.values())) - shown
    more = [Text(f"{count_leaves(hidden, ' more')}; --depth {deepest} shows them")] if hidden else []
    tail = [
        Text(f"{key}: {_pairs(found[key])}") for key in ("metrics", "metadata", "versions", "unread") if found[key]
    ]
    return Group(root, *more, *doubt, *tail)


def _pairs(values: Facts) -> str:
    return ", ".join(
        f"{name} {number(value) if isinstance(value, float) else value}" for name, value in values.items()
    )


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
        changes = [number(row["largest_change"]) for row in values[:most]]
        columns = [Column("largest change", changes, is_right=True), Column("leaf", paths)]
        parts += [table(columns, width), *map(Text, _more(values, most))]
    same = f"{count_leaves(found['equal_leaves'])} with the same shape and dtype"
    differ = f"the values of {len(values)} differ" if values else "all values are equal"
    changed = f"; {differ}" if "values" in found else "; values are not compared (--values)"
    return Group(*parts, Text(same + changed))


def _more(found: Sequence[object], most: int) -> list[str]:
    return [f"... and {len(found) - most} more; --all shows them"] if len(found) > most else []


def verified(found: list[Facts]) -> RenderableType:
    lines = []
    for report in found:
        read = f"{report['files']} files, {count_leaves(report['leaves'])}, {size(report['nbytes'])}"
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
        Column("size", [size(row["nbytes"]) for row in rows], is_right=True),
        Column("what it is", whys, bends=True, least=24),
        Column("where", [row["path"].removeprefix(f"{found['run']}/") for row in rows]),
    ]
    total = size(sum(row["nbytes"] for row in rows if row["goes"]))
    return Group(table(columns, width), Text(f"{'removed' if found['removed'] else 'would be removed'}: {total}"))


def doctor(found: Facts) -> RenderableType:
    rows = [
        ("system", f"Python {found['python']} on {found['system']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
        ("devices", found["devices"] if isinstance(found["devices"], str) else ", ".join(found["devices"])),
        ("storage", _storage(found["storage"])),
        *(("not installed", f"{what}: {command}") for what, command in found["not_installed"].items()),
    ]
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(Text(name, "bold"), Text(value))
    warnings = [Text(f"WARNING {each}", style="bold red") for each in found["warnings"]]
    return Group(grid, *_left_alone(found), *(warnings or [Text("nothing is wrong")]))


def _storage(found: Facts) -> str:
    if "error" in found:
        return f"{found['directory']}: {found['error']}"
    speeds = f"writes {size(found['write_bytes_per_s'])}/s, reads {size(found['read_bytes_per_s'])}/s"
    free = f", {size(found['free_bytes'])} free" if found["free_bytes"] else ""
    return f"{found['directory']}: {speeds}{free}"
