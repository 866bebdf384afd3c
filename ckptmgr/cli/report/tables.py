"""The HTML of the report: tables with all that the charts show, so that nothing is lost without scripts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckptmgr.cli import risk
from ckptmgr.cli.report import charts, sizes, words
from ckptmgr.cli.report.changes import Change
from ckptmgr.cli.report.collect import Run, Save, Unread
from ckptmgr.cli.report.words import escape
from ckptmgr.errors import NewerFormatError
from ckptmgr.results import CheckpointInfo
from ckptmgr.run.branches import Branch
from ckptmgr.units import format_bytes


def table(caption: str, columns: Sequence[str], rows: Iterable[str]) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def row(first: object, *cells: object) -> str:
    """A row whose first cell is its heading."""
    rest = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr><th scope="row">{escape(first)}</th>{rest}</tr>'


def folded(what: str, content: str) -> str:
    """A table that a script folds; without scripts it is open."""
    return f"<details open><summary>{escape(what)}</summary>{content}</details>"


def number(value: float) -> str:
    return f"{value:.6g}"


def seconds(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"


# ---------------------------------------------------------------- of the charts


def happenings(shown: Sequence[charts.Happened]) -> str:
    rows = (row(each.step, "" if each.time is None else words.when(each.time), each) for each in shown)
    return table("What happened to each step", ("step", "when", "what"), rows)


def best(found: Sequence[charts.Metric]) -> str:
    """The best step by each metric, and the newest value."""
    return table(
        "Best values",
        ("metric", "which", "value", "step", "newest value"),
        (each for one in found for each in _best(one)),
    )


def _best(metric: charts.Metric) -> list[str]:
    newest = number(metric.value(metric.line[-1])) if metric.line else ""
    way = {"min": "best (lowest)", "max": "best (highest)"}.get(metric.mode or "")
    found: Mapping[str, Save | None] = metric.extremes() or {"no finite value": None}
    return [
        row(metric.name, way or word, number(metric.value(save)), save.step, newest)
        if save is not None
        else row(metric.name, word, "", "", newest)
        for word, save in found.items()
    ]


def values(found: Sequence[charts.Metric], steps: Sequence[int]) -> str:
    """The values of all metrics at these steps."""
    by_name = [{save.step: save for save in metric.line} for metric in found]
    rows = []
    for step in steps:
        saves = [some.get(step) for some in by_name]
        time = next((save.time for save in saves if save is not None), None)
        cells = [
            "" if save is None else number(metric.value(save)) for metric, save in zip(found, saves, strict=True)
        ]
        rows.append(row(step, "" if time is None else words.when(time), *cells))
    return table("Metrics", ("step", "saved", *(metric.name for metric in found)), rows)


def aside(found: Sequence[charts.Metric], most: int) -> str:
    """The values of steps that a rewind has left behind."""
    rows = [
        row(save.step, words.when(save.time), metric.name, number(metric.value(save)))
        for metric in found
        for save in words.thinned(metric.aside, most)[0]
    ]
    return table("Metrics of steps set aside by a rewind", ("step", "saved", "metric", "value"), rows)


def parts(found: Sequence[sizes.Part]) -> str:
    whole = sizes.total(found) or 1
    rows = (
        f'<tr><th scope="row" style="--depth:{min(part.depth, 12)}">{escape(part.name)}</th>'
        f"<td>{escape(part.what)}</td><td>{format_bytes(part.nbytes)}</td><td>{part.nbytes / whole:.1%}</td></tr>"
        for part in found
    )
    return table("Size by module", ("module or leaf", "what", "size", "share"), rows)


def saving(shown: Sequence[charts.Timed]) -> str:
    rows = (
        row(
            save.step, words.when(save.time), seconds(save.durable_s), seconds(save.blocked_s),
            f"{format_bytes(save.throughput)}/s",
            "" if save.disk_nbytes is None else format_bytes(save.disk_nbytes),
        )
        for save in shown
    )  # fmt: skip
    columns = ("step", "durable at", "seconds until durable", "seconds the caller waited", "throughput", "on disk")
    return table("Saving", columns, rows)


def intervals(found: Sequence[tuple[int, float, float]]) -> str:
    rows = (row(step, words.when(time), seconds(chosen)) for step, time, chosen in found)
    return table("Intervals that overhead has chosen", ("step", "when", "seconds between two saves"), rows)


def at_risk(peaks: Sequence[risk.Peak]) -> str:
    rows = (
        row(peak.step, words.when(peak.at), seconds(peak.before_s), peak.steps, seconds(peak.after_s))
        for peak in peaks
    )
    columns = ("step", "durable at", "seconds at risk before", "steps at risk before", "seconds at risk after")
    return table("Work at risk", columns, rows)


# ---------------------------------------------------------------- by themselves


def changed(found: Sequence[Change], most: int) -> tuple[str, str]:
    """A row for each step that differs from the one before, and for those in a row that do not; and a sentence."""
    rows: list[str] = []
    same: list[Change] = []
    for change in found:
        if change:
            rows += [_same(same), _differs(change)] if same else [_differs(change)]
            same = []
        else:
            same.append(change)
    rows += [_same(same)] if same else []
    shown, said = words.thinned(rows, most)
    return table(
        "How each step differs from the one before", ("step", "the one before", "what differs"), shown
    ), said


def _same(steps: Sequence[Change]) -> str:
    first, last = steps[0], steps[-1]
    which = first.step if len(steps) == 1 else f"{first.step} to {last.step} ({len(steps)} steps)"
    return row(which, first.before, "nothing")


def _differs(change: Change) -> str:
    facts = {
        ("leaf added", "leaves added"): change.added,
        ("leaf removed", "leaves removed"): change.removed,
        ("leaf of another shape or dtype", "leaves of another shape or dtype"): change.changed,
    }
    found = [(words.count(len(names), *noun), names) for noun, names in facts.items()]
    found.append(("metadata and versions", change.around))
    said = [f"{what} ({words.listing(names, 4)})" for what, names in found if names]
    items = "".join(f"<li>{escape(each, 800)}</li>" for each in said)
    return f'<tr><th scope="row">{change.step}</th><td>{change.before}</td><td><ul>{items}</ul></td></tr>'


def branches(found: Sequence[Branch], most: int) -> str:
    shown, said = words.thinned(found, most)
    rows = (
        row(words.listing(sorted(branch.steps)), branch.fork, words.when(branch.time / 1e9)) for branch in shown
    )
    return table("Steps set aside by rewinds", ("steps", "they follow step", "set aside"), rows) + note(said)


_TROUBLES = {
    "failed": "a save failed",
    "passed over": "passed over in a restore",
    "distrusted": "distrusted",
    "trusted": "trusted again",
}


def troubles(run: Run, most: int) -> str:
    """Failures, damage and doubts; empty if there are none."""
    found = [
        row(event["step"], words.when(event["time"]), _TROUBLES[event["event"]], event.get("why", ""))
        for event in run.of(*_TROUBLES)
    ]
    shown, said = words.thinned(found, most)
    shown += [row(step, "now", state(why), why) for step, why in list(run.unread.items())[:most]]
    if not shown:
        return ""
    return table("Passed over and failed", ("step", "when", "what", "why"), shown) + note(said)


def state(problem: Unread) -> str:
    return "needs a newer ckptmgr" if isinstance(problem, NewerFormatError) else "damaged"


def checkpoints(run: Run, most: int) -> str:
    """The checkpoints on disk; empty if there are none."""
    infos = {info.step: info for info in run.infos}
    steps, said = words.thinned(sorted([*infos, *run.unread]), most)
    rows = [_checkpoint(infos[step]) if step in infos else _unread(step, run.unread[step]) for step in steps]
    columns = ("step", "saved", "size", "on disk", "kept by", "metrics")
    return table("Checkpoints on disk", columns, rows) + note(said) if rows else ""


def _checkpoint(info: CheckpointInfo) -> str:
    found = words.listing([f"{name} {number(value)}" for name, value in info.metrics.items()])
    on_disk = format_bytes(info.disk_nbytes) if info.disk_nbytes else ""
    return row(info.step, words.when(info.time), format_bytes(info.nbytes), on_disk, _kept_by(info), found)


def _unread(step: int, problem: Unread) -> str:
    return row(step, "", "", "", state(problem), "")


def _kept_by(info: CheckpointInfo) -> str:
    kept = [*info.kept, *(["pinned"] if info.pinned and "pinned" not in info.kept else [])]
    notes = [f"distrusted: {info.distrusted}" if info.distrusted else "", info.reduced or ""]
    return ", ".join(kept) + "".join(f" ({each})" for each in notes if each)


def note(*sentences: Any) -> str:
    said = " ".join(str(each) for each in sentences if each)
    return f"<p>{escape(said, 2000)}</p>" if said else ""
