"""What the charts show, as plain JSON values; `page.js` draws them with plotly.js.

A chart has an `id`, a `kind` ("line", "marks" or "treemap"), a `unit`, a `title` and `traces`. A trace has its
points (`step`, `time` in milliseconds, `y`), a `name`, the `symbol` of its marks and the `role` of its colour.
Symbols tell traces apart; colours only help.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckptmgr.cli import risk
from ckptmgr.cli.report import sizes, words
from ckptmgr.cli.report.collect import Run, Save, saves
from ckptmgr.results import CheckpointInfo
from ckptmgr.units import format_bytes

Chart = dict[str, Any]
Trace = dict[str, Any]
_LATEST_MS = 8.64e15  # what a date of JavaScript can be


def _milliseconds(seconds: float) -> int | None:
    return round(seconds * 1000) if abs(seconds) * 1000 < _LATEST_MS else None


def _number(value: float) -> float | None:
    """A number with nine digits; None, which makes a gap, for NaN and infinity."""
    return float(f"{value:.9g}") if math.isfinite(value) else None


def _trace(name: str, points: Iterable[tuple[int, float, float]], **how: Any) -> Trace:
    """A trace through points: step, time and value."""
    rows = list(points)
    return {
        "name": words.shorten(name, 120),
        "step": [step for step, _, _ in rows],
        "time": [_milliseconds(time) for _, time, _ in rows],
        "y": [_number(value) for _, _, value in rows],
    } | how


# ---------------------------------------------------------------- what happened to each step


@dataclasses.dataclass(frozen=True)
class Kind:
    """Something that happened to a step, and its mark."""

    words: str
    lane: str
    symbol: str
    role: str


DISK, REMOVED, TROUBLE, RESTORED = "on disk", "removed", "trouble", "restored"
LANES = (RESTORED, TROUBLE, REMOVED, DISK)
KINDS = {
    "kept": Kind("on disk", DISK, "circle", "data"),
    "pinned": Kind("on disk, pinned", DISK, "diamond", "data"),
    "reduced": Kind("on disk, reduced to its params", DISK, "triangle-right", "data"),
    "doubtful": Kind("on disk, distrusted", DISK, "pentagon-open", "bad"),
    "damaged": Kind("on disk, damaged", DISK, "triangle-up", "bad"),
    "later": Kind("on disk, needs a newer ckptmgr", DISK, "square-open", "soft"),
    "deleted": Kind("saved, then deleted", REMOVED, "circle-open", "soft"),
    "aside": Kind("set aside by a rewind", REMOVED, "diamond-open", "soft"),
    "failed": Kind("a save that failed", TROUBLE, "x", "bad"),
    "passed over": Kind("passed over in a restore", TROUBLE, "triangle-down", "bad"),
    "distrusted": Kind("distrusted", TROUBLE, "line-ew-open", "bad"),
    "trusted": Kind("trusted again", TROUBLE, "asterisk-open", "ink"),
    "restored": Kind("restored, or resumed from", RESTORED, "cross", "ink"),
    "rewound": Kind("gone back to", RESTORED, "triangle-left", "ink"),
}
"""The events of the journal that are drawn (`_TOLD`), and the states of a step on disk."""
_TOLD = ("failed", "passed over", "distrusted", "trusted", "restored", "rewound")


@dataclasses.dataclass(frozen=True)
class Happened:
    """A step, when and what happened to it, and why."""

    step: int
    time: float | None
    kind: str
    why: str

    def __str__(self) -> str:
        return f"step {self.step}: {KINDS[self.kind].words}{': ' if self.why else ''}{self.why}"


def happenings(run: Run) -> list[Happened]:
    """Everything that the timeline shows, by step and time."""
    here = {info.step for info in run.infos} | set(run.unread)
    saved_at = {event["step"]: event["time"] for event in run.of("saved")}
    found = [Happened(info.step, info.time, _state(info), _why_here(info)) for info in run.infos]
    damaged = run.damaged()
    found += [
        Happened(step, saved_at.get(step), "damaged" if step in damaged else "later", _short(why))
        for step, why in run.unread.items()
    ]
    found += [
        Happened(step, branch.time / 1e9, "aside", f"the run went back to step {branch.fork}")
        for branch in run.branches
        for step in sorted(branch.steps)
    ]
    found += [_told(event) for event in run.of("deleted") if event["step"] not in here]
    found += [_told(event) for event in run.of(*_TOLD)]
    return sorted(found, key=lambda each: (each.step, each.time or 0.0, each.kind))


def _told(event: Mapping[str, Any]) -> Happened:
    why = event.get("why") or (f"from {event['source']}" if event.get("source") else "")
    return Happened(event["step"], event["time"], event["event"], _short(why))


def _short(why: object) -> str:
    return words.shorten(why, 160)


def _state(info: CheckpointInfo) -> str:
    states = {"doubtful": info.distrusted, "pinned": info.pinned, "reduced": info.reduced}
    return next((state for state, applies in states.items() if applies), "kept")


def _why_here(info: CheckpointInfo) -> str:
    return _short(info.distrusted or info.reduced or ", ".join(info.kept))


def by_kind(found: Sequence[Happened], most: int) -> tuple[dict[str, list[Happened]], list[str]]:
    """What happened by its kind, at most about so many of each; and sentences if some are left out."""
    kinds = {kind: [each for each in found if each.kind == kind] for kind in KINDS}
    shown: dict[str, list[Happened]] = {}
    said = []
    for kind, rows in kinds.items():
        if rows:
            shown[kind], note = words.thinned(rows, most)
            said += [f"Of those {KINDS[kind].words}, {note[0].lower()}{note[1:]}"] if note else []
    return shown, said


def timeline(shown: Mapping[str, Sequence[Happened]]) -> Chart:
    """Steps from left to right, in four lanes."""
    traces = [
        {
            "name": KINDS[kind].words,
            "step": [each.step for each in rows],
            "time": [None if each.time is None else _milliseconds(each.time) for each in rows],
            "y": [KINDS[kind].lane] * len(rows),
            "text": [str(each) for each in rows],
            "symbol": KINDS[kind].symbol,
            "role": KINDS[kind].role,
        }
        for kind, rows in shown.items()
    ]
    lanes = [lane for lane in LANES if any(trace["y"][0] == lane for trace in traces)]
    return {"id": "timeline", "kind": "marks", "title": "what happened to each step", "lanes": lanes[::-1],
            "traces": traces}  # fmt: skip


def resumed(run: Run, most: int) -> Trace:
    """Where the run was resumed: the newest restores, at most so many."""
    told = run.of("restored")[-most:]
    return {
        "step": [event["step"] for event in told],
        "time": [_milliseconds(event["time"]) for event in told],
    }


# ---------------------------------------------------------------- metrics


@dataclasses.dataclass(frozen=True)
class Metric:
    """The values of one metric."""

    name: str
    mode: str | None
    """Whether "min" or "max" is best; None if no policy says so."""
    line: Sequence[Save]
    aside: Sequence[Save]

    def value(self, save: Save) -> float:
        return save.metrics[self.name]

    def extremes(self) -> dict[str, Save]:
        """The lowest and the highest value in words; of equal values the newer. Distrusted steps do not count."""
        drawn = [save for save in self.line if math.isfinite(self.value(save)) and save.distrusted is None]
        if not drawn:
            return {}
        lowest = min(drawn, key=lambda save: (self.value(save), -save.step))
        highest = max(drawn, key=lambda save: (self.value(save), save.step))
        if self.mode is not None:
            return {"best": highest if self.mode == "max" else lowest}
        is_constant = self.value(lowest) == self.value(highest)
        return {"always": highest} if is_constant else {"lowest": lowest, "highest": highest}

    def gaps(self) -> int:
        return sum(not math.isfinite(self.value(save)) for save in self.line)


def metrics(run: Run, modes: Mapping[str, str]) -> list[Metric]:
    """Every metric that was ever saved; first those that a policy ranks steps by."""
    line, aside = saves(run)
    names = {name for save in (*line, *aside) for name in save.metrics}
    return [
        Metric(
            name,
            modes.get(name),
            [save for save in line if name in save.metrics],
            [save for save in aside if name in save.metrics],
        )
        for name in sorted(names, key=lambda name: (name not in modes, name))
    ]


_EXTREMES = {"best": "star", "lowest": "triangle-down-open", "highest": "triangle-up-open"}


def metric(number: int, found: Metric, steps: set[int]) -> Chart:
    """A line through the values at these steps. The best is marked, and what is distrusted or was set aside."""

    def points(some: Iterable[Save]) -> list[tuple[int, float, float]]:
        return [(save.step, save.time, found.value(save)) for save in some]

    line = [save for save in found.line if save.step in steps]
    traces = [_trace(found.name, points(line), symbol="circle", role="data", line="solid")]
    if distrusted := [save for save in line if save.distrusted is not None]:
        traces.append(_trace("distrusted", points(distrusted), symbol="pentagon-open", role="bad", mark=12))
    if found.aside:
        rows, _ = words.thinned(found.aside, len(steps) or 1)
        traces.append(_trace("set aside by a rewind", points(rows), symbol="diamond-open", role="soft", mark=10))
    for word, save in found.extremes().items():
        if symbol := _EXTREMES.get(word):
            name = f"{word}: step {save.step}"
            traces.append(_trace(name, points([save]), symbol=symbol, role="second", mark=14))
    return {"id": f"metric-{number}", "kind": "line", "title": found.name, "traces": traces}


# ---------------------------------------------------------------- saving


@dataclasses.dataclass(frozen=True)
class Timed:
    """A save with its measurements, as far as the journal has them."""

    step: int
    time: float
    durable_s: float
    blocked_s: float
    nbytes: float
    disk_nbytes: float | None

    @property
    def throughput(self) -> float:
        """Bytes of arrays a second, until they were durable."""
        return self.nbytes / self.durable_s


def timed(run: Run, most: int) -> tuple[list[Timed], str]:
    """The saves with their times, at most so many; of several in a row the one that took longest."""
    told = {"durable_s", "blocked_s", "nbytes"}
    found = [
        Timed(
            event["step"], event["time"], event["durable_s"], event["blocked_s"], event["nbytes"],
            event.get("disk_nbytes"),
        )
        for event in run.of("saved")
        if told <= event.keys() and event["durable_s"] > 0
    ]  # fmt: skip
    every = -(-len(found) // most) or 1
    shown = [max(found[at : at + every], key=lambda save: save.durable_s) for at in range(0, len(found), every)]
    said = f"Only one of {every} is shown: of {every} in a row the save that took longest." if every > 1 else ""
    return shown, said


def saving(shown: Sequence[Timed], run: Run, most: int) -> list[Chart]:
    """Seconds, bytes a second, bytes on disk; and the interval that `overhead` has chosen."""

    def points(value: str) -> list[tuple[int, float, float]]:
        return [(save.step, save.time, getattr(save, value)) for save in shown if getattr(save, value) is not None]

    charts: list[Chart] = [
        {"id": "seconds", "title": "seconds of each save", "unit": "s", "kind": "line", "traces": [
            _trace("seconds until durable", points("durable_s"), symbol="circle", role="data", line="solid"),
            _trace("seconds the caller waited", points("blocked_s"), symbol="diamond", role="second", line="dot"),
        ]},
        {"id": "throughput", "title": "bytes saved per second", "unit": "B/s", "kind": "line", "traces": [
            _trace("bytes saved per second", points("throughput"), symbol="circle", role="data", line="solid"),
        ]},
    ]  # fmt: skip
    if on_disk := points("disk_nbytes"):
        trace = _trace("bytes on disk", on_disk, symbol="circle", role="data", line="solid")
        charts.append({"id": "on-disk", "title": "bytes on disk of each save", "unit": "B", "kind": "line",
                       "traces": [trace]})  # fmt: skip
    if paced := intervals(run, most):
        name = "seconds between two saves, as overhead has chosen"
        trace = _trace(name, paced, symbol="circle", role="data", line="hv")
        charts.append({"id": "interval", "title": name, "unit": "s", "kind": "line", "traces": [trace]})
    return charts


def intervals(run: Run, most: int) -> list[tuple[int, float, float]]:
    """The intervals that `overhead` has chosen: step, time, seconds."""
    found = [
        (event["step"], event["time"], event["interval_s"]) for event in run.of("paced") if "interval_s" in event
    ]
    return words.thinned(found, most)[0]


def at_risk(peaks: Sequence[risk.Peak]) -> Chart:
    """Work at risk grows, and falls when the next save is durable."""
    points = [
        point
        for peak in peaks
        for point in ((peak.step, peak.at, peak.before_s), (peak.step, peak.at, peak.after_s))
    ]
    name = "seconds of work at risk"
    trace = _trace(name, points, symbol="circle", role="data", line="solid")
    return {"id": "risk", "title": name, "unit": "s", "kind": "line", "traces": [trace]}


# ---------------------------------------------------------------- sizes


def treemap(found: Sequence[sizes.Part]) -> Chart:
    """Every part as a rectangle in that of the part that holds it."""
    return {
        "id": "sizes",
        "kind": "treemap",
        "title": "size by module",
        "names": [part.name for part in found],
        "parents": [part.parent for part in found],
        "depths": [part.depth for part in found],
        "values": [part.nbytes for part in found],
        "texts": [f"{format_bytes(part.nbytes)}, {part.what}" for part in found],
    }
