"""Formats the results of `facts` for a terminal."""

from __future__ import annotations

import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

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


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        right = column in ("step", "age", "size", "on disk", "bytes", "largest change")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def run(found: Facts) -> RenderableType:
    table = _table("step", "age", "size", "on disk", "metrics", "kept by", "")
    for row in found["steps"]:
        table.add_row(*_cells(row))
    policies = "unknown" if found["keep"] is None else ", ".join(found["keep"]) or "keep everything"
    head = f"{found['run']}  (retention: {policies})"
    return Group(head, table if found["steps"] else "no checkpoints", *_left_alone(found))


def _left_alone(found: Facts) -> list[Text]:
    """A line with the names of what is not a checkpoint, if there is any."""
    told = found.get("left_alone")
    if not told or not told["count"]:
        return []
    more = told["count"] - len(told["names"])
    return [Text(f"not checkpoints, left alone: {', '.join(told['names'])}{f', and {more} more' if more else ''}")]


def _cells(row: Facts) -> list[str | Text]:
    if row["damaged"]:
        word = "NOT READ" if row["later_format"] else "DAMAGED"
        return [str(row["step"]), "", "", "", "", "", Text(f"{word} {row['damaged']}", style="bold red")]
    metrics = ", ".join(f"{name} {_number(value)}" for name, value in row["metrics"].items())
    kept = "?" if row["kept"] is None else ", ".join(row["kept"]) or "nothing: would be deleted"
    doubt = row["distrusted"] if f"not counted: {row['distrusted']}" not in (row["kept"] or ()) else None
    doubts = [f"DISTRUSTED {doubt}"] * (doubt is not None)
    marks = ", ".join(filter(None, [*["pinned"] * row["pinned"], row["reduced"], *doubts]))
    return [
        str(row["step"]),
        age(row["age_s"]),
        size(row["nbytes"]),
        size(row["disk_nbytes"]),
        metrics,
        kept,
        marks,
    ]


def _number(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def kept(found: Facts) -> RenderableType:
    word = "deleted" if found["deleted"] else "would be deleted"
    gone, reduced = found["would_delete"], found["would_reduce"]
    told = [f"{word}: {', '.join(map(str, gone))}" if gone else "nothing to delete"]
    if reduced:
        word = "reduced to their params" if found["reduced"] else "would be reduced to their params"
        told.append(f"{word}: {', '.join(map(str, reduced))}")
    return Group(run(found), *told)


def checkpoint(found: Facts) -> RenderableType:
    when = datetime.datetime.fromtimestamp(found["time"]).isoformat(" ", "seconds")
    head = f"{found['run']}  step {found['step']}, {when}, {size(found['nbytes'])}"
    doubt = [Text(f"DISTRUSTED {found['distrusted']}", style="bold red")] if found["distrusted"] else []
    root = Tree(head + (f", {size(found['disk_nbytes'])} on disk" if found["disk_nbytes"] else ""))
    if found["reduced"]:
        root.add(Text(found["reduced"]))
    for name, leaves in found["items"].items():
        branch = root.add(_total(name, leaves) if leaves else name)
        _grow(branch, [(_parts(leaf["path"]), leaf) for leaf in leaves])
    tail = [f"{key}: {_pairs(found[key])}" for key in ("metrics", "metadata", "versions", "unread") if found[key]]
    return Group(root, *doubt, *tail)


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
    return [*parts, path[start:]] if path else ["(the tree itself)"]


def _grow(branch: Tree, rows: list[tuple[list[str], Facts]]) -> None:
    """Adds leaves below a node, each node with its total size."""
    below: dict[str, list[tuple[list[str], Facts]]] = {}
    for parts, leaf in rows:
        below.setdefault(parts[0], []).append((parts[1:], leaf))
    for name, group in below.items():
        if len(group) == 1 and not group[0][0]:
            branch.add(_leaf(name, group[0][1]))
        else:
            _grow(branch.add(_total(name, [leaf for _, leaf in group])), group)


def _total(name: str, leaves: list[Facts]) -> Text:
    count = f"{len(leaves)} leaves" if len(leaves) != 1 else "1 leaf"
    return Text.assemble((name, "bold"), f"  {count}, {size(sum(leaf['nbytes'] for leaf in leaves))}")


def _leaf(name: str, leaf: Facts) -> Text:
    kind = f"{leaf['dtype']}[{','.join(map(str, leaf['shape']))}]"
    if leaf["kind"] not in ("jax", "scalar"):
        kind += f" {leaf['kind']}"
    where = "" if leaf["sharding"] is None else f"  P({', '.join(map(repr, leaf['sharding']))})"
    return Text(f"{name}  {kind}  {size(leaf['nbytes'])}{where}")


def difference(found: Facts) -> RenderableType:
    lines: list[RenderableType] = [f"- {path}  only in the first" for path in found["only_in_first"]]
    lines += [f"+ {path}  only in the second" for path in found["only_in_second"]]
    lines += [
        f"! {path}  {one} in the first, {other} in the second" for path, (one, other) in found["changed"].items()
    ]
    if found.get("values"):
        table = _table("leaf", "largest change")
        for row in found["values"]:
            table.add_row(Text(row["path"]), _number(row["largest_change"]))
        lines.append(table)
    same = f"{found['equal_leaves']} leaves have the same shape and dtype"
    changed = f"; the values of {len(found['values'])} differ" if "values" in found else ""
    return Group(*(Text(each) if isinstance(each, str) else each for each in lines), same + changed)


def _changed(found: Facts) -> Any:
    return found["changed"].items()


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
    return "\n".join([f"the run {goes_on} from step {found['step']}", *said])


def leftovers(found: Facts) -> RenderableType:
    rows = found["leftovers"]
    if not rows:
        return "nothing is left over"
    table = _table("path", "size", "what it is")
    for row in rows:
        table.add_row(row["path"], size(row["nbytes"]), row["why"] + ("" if row["goes"] else "; is kept"))
    total = size(sum(row["nbytes"] for row in rows if row["goes"]))
    return Group(table, f"removed: {total}" if found["removed"] else f"--yes would remove {total}")


def doctor(found: Facts) -> RenderableType:
    table = _table("", "")
    table.add_row("system", f"Python {found['python']} on {found['system']}")
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    devices = found["devices"]
    table.add_row("devices", devices if isinstance(devices, str) else ", ".join(devices))
    table.add_row("storage", _storage(found["storage"]))
    for what, command in found["not_installed"].items():
        table.add_row("not installed", f"{what}: {command}")
    warnings = [Text(f"WARNING {each}", style="bold red") for each in found["warnings"]]
    return Group(table, *_left_alone(found), *(warnings or [Text("nothing is wrong")]))


def _storage(found: Facts) -> str:
    if "error" in found:
        return f"{found['directory']}: {found['error']}"
    speeds = f"writes {size(found['write_bytes_per_s'])}/s, reads {size(found['read_bytes_per_s'])}/s"
    free = f", {size(found['free_bytes'])} free" if found["free_bytes"] else ""
    return f"{found['directory']}: {speeds}{free}"
