"""One HTML file about a run: what was kept and why, metrics, sizes, times, failures. It needs no network."""

from __future__ import annotations

import datetime
import html as escaping
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ckptmgr import cadence, policies
from ckptmgr.cli import risk
from ckptmgr.errors import CheckpointNotFoundError, CorruptCheckpointError, NewerFormatError
from ckptmgr.format import manifest as manifests
from ckptmgr.manager import CheckpointManager
from ckptmgr.results import CheckpointInfo
from ckptmgr.run import history, journal
from ckptmgr.run.catalog import open_catalog

_MOST = 300  # points in one picture; if there are more, only every second, third, ... is shown
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 200, 80, 26
Point = tuple[float, float]
Events = Sequence[Mapping[str, Any]]
Unread = CorruptCheckpointError | NewerFormatError


def html(manager: CheckpointManager) -> str:
    """The whole file, made from the checkpoints on disk and the journal of the run."""
    events = journal.read(manager.directory)
    infos, unread = survey(manager, journal.policies(manager.directory))
    name = f"{manager.directory.name}: checkpoints"
    body = "\n".join([
        _head(manager, infos, unread, events),
        _section("Timeline", _timeline(events, infos, unread)),
        _section("Metrics", _metrics(events, infos)),
        _section("Size by leaf", _leaves(infos)),
        _section("Saving", _saving(events)),
        _section("Work at risk", _at_risk(events)),
        _section("Walk-backs and failures", _troubles(events, unread)),
        _section("Checkpoints on disk", _checkpoints(infos, unread)),
    ])  # fmt: skip
    page = _PAGE.format(title=_text(name), style=_STYLE, body=body)
    return page.encode("ascii", "xmlcharrefreplace").decode()  # so the encoding does not matter


def survey(
    manager: CheckpointManager, keep: Sequence[policies.KeepPolicy] | None
) -> tuple[list[CheckpointInfo], dict[int, Unread]]:
    """The checkpoints on disk with why `keep` keeps each; and the errors of those that cannot be read."""
    infos = history.History(open_catalog(manager.directory), keep or ()).all()
    unread: dict[int, Unread] = {}
    for step in sorted(set(manager.steps()) - {info.step for info in infos}):
        try:
            manager.info(step)
        except (CorruptCheckpointError, NewerFormatError) as problem:
            unread[step] = problem
        except CheckpointNotFoundError:
            continue  # deleted concurrently
    return infos, unread


def _state(problem: Unread) -> str:
    return "needs a newer ckptmgr" if isinstance(problem, NewerFormatError) else "damaged"


def _damaged(unread: Mapping[int, Unread]) -> list[int]:
    return [step for step, problem in unread.items() if not isinstance(problem, NewerFormatError)]


def _text(value: object) -> str:
    return escaping.escape(str(value))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _nothing(why: str) -> str:
    return f"<p class='none'>{why}</p>"


_UNKNOWN = "Not known: the run has no journal (a bucket, or saved by stock Orbax)."


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    raise AssertionError


def _when(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _of(events: Events, *kinds: str) -> list[Mapping[str, Any]]:
    return [event for event in events if event["event"] in kinds]


def _head(
    manager: CheckpointManager, infos: Sequence[CheckpointInfo], unread: Mapping[int, Unread], events: Events
) -> str:
    newest = infos[-1] if infos else None
    facts = {
        "directory": manager.directory,
        "on disk": f"{len(infos)} checkpoints, {_size(sum(info.disk_nbytes or info.nbytes for info in infos))}",
        "saved in all": f"{len(_of(events, 'saved'))}" if events else _UNKNOWN,
        "damaged": len(_damaged(unread)) or "none",
    }
    if len(unread) > len(_damaged(unread)):
        facts["need a newer ckptmgr"] = len(unread) - len(_damaged(unread))
    if newest is not None:
        facts["newest"] = f"step {newest.step}, {_when(newest.time)}"
        facts["made with"] = (
            ", ".join(f"{name} {version}" for name, version in newest.versions.items()) or "stock Orbax"
        )
        facts |= {str(name): value for name, value in newest.metadata.items()}
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    return f"<h1>{_text(manager.directory.name)}</h1><dl>{rows}</dl>"


# ---------------------------------------------------------------- pictures


def _thinned(rows: Sequence[Any]) -> tuple[list[Any], str]:
    """At most `_MOST` of the rows, and a sentence if some are left out."""
    every = math.ceil(len(rows) / _MOST) or 1
    said = f" Only one of {every} is shown." if every > 1 else ""
    return [*rows[:-1:every], *rows[-1:]], said


def _scale(values: Iterable[float], low: float, high: float) -> Any:
    values = list(values)
    least, most = min(values), max(values)
    span = (most - least) or 1.0
    return lambda value: low + (value - least) / span * (high - low)


def _svg(title: str, content: str, height: float = _HEIGHT) -> str:
    return (
        f"<figure><svg role='img' viewBox='0 0 {_WIDTH} {height:.0f}' aria-label='{_text(title)}'>"
        f"<title>{_text(title)}</title>{content}</svg></figure>"
    )


def _label(x: float, y: float, text: object, anchor: str = "start") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'>{_text(text)}</text>"


_SHAPES = {
    "kept": ("on disk", "<circle r='6' class='kept'/>"),
    "pinned": ("on disk, pinned", "<path d='M0-8 8 0 0 8-8 0Z' class='kept'/>"),
    "doubtful": ("on disk, distrusted", "<path d='M0-8 8-2 5 7H-5L-8-2Z' class='gone'/>"),
    "damaged": ("on disk, damaged", "<path d='M0-8 8 7H-8Z' class='bad'/>"),
    "later": ("on disk, needs a newer ckptmgr", "<path d='M-6-6H6V6H-6Z' class='gone'/>"),
    "reduced": ("on disk, reduced to its params", "<path d='M-7 0A7 7 0 0 1 7 0Z' class='kept'/>"),
    "deleted": ("saved, then deleted", "<circle r='5' class='gone'/>"),
    "failed": ("a save that failed", "<path d='M-6-6 6 6M6-6-6 6' class='bad line'/>"),
    "passed over": ("passed over in a restore", "<path d='M-7-5H7L0 7Z' class='bad'/>"),
    "distrusted": ("distrusted", "<path d='M-7 0H7' class='bad line'/>"),
    "trusted": ("trusted again", "<path d='M-7 0H7M0-7V7' class='line'/>"),
    "restored": ("restored, or resumed from", "<path d='M0-8V8M-5 3 0 8 5 3' class='line'/>"),
    "rewound": ("gone back to", "<path d='M8 0H-8M-3-5-8 0-3 5' class='line'/>"),
}
"""What happened to a step. Shapes tell the events apart; colours only help."""
_LANES = {
    "kept": 0,
    "pinned": 0,
    "doubtful": 0,
    "reduced": 0,
    "damaged": 0,
    "later": 0,
    "deleted": 1,
    "failed": 2,
    "passed over": 2,
    "distrusted": 2,
    "trusted": 2,
    "restored": 3,
    "rewound": 3,
}
_TOLD = ("failed", "passed over", "distrusted", "trusted", "restored", "rewound")
_NAMES = ("on disk", "deleted", "trouble", "restored")


def _kind(info: CheckpointInfo) -> str:
    states = {"doubtful": info.distrusted, "pinned": info.pinned, "reduced": info.reduced}
    return next((state for state, applies in states.items() if applies), "kept")


def _timeline(events: Events, infos: Sequence[CheckpointInfo], unread: Mapping[int, Unread]) -> str:
    """Steps from left to right, in four lanes: on disk, deleted, trouble, restored."""
    here = {info.step for info in infos} | set(unread)
    rows = [(info.step, _kind(info), info.distrusted or ", ".join(info.kept)) for info in infos]
    damaged = _damaged(unread)
    rows += [(step, "damaged" if step in damaged else "later", str(why)) for step, why in unread.items()]
    rows += [(e["step"], "deleted", e.get("why", "")) for e in _of(events, "deleted") if e["step"] not in here]
    rows += [(e["step"], e["event"], e.get("why", "")) for e in _of(events, *_TOLD)]
    if not rows:
        return _nothing("Nothing has been saved yet.")
    shown, said = _thinned(sorted(rows))
    x = _scale([step for step, _, _ in rows], _LEFT + 12, _WIDTH - 16)
    lanes = "".join(
        _label(0, 34 + 36 * lane, name) + f"<path class='axis' d='M{_LEFT} {30 + 36 * lane}H{_WIDTH}'/>"
        for lane, name in enumerate(_NAMES)
    )
    marks = "".join(
        f"<g transform='translate({x(step):.1f} {30 + 36 * _LANES[kind]})'><title>step {step}: {_SHAPES[kind][0]}"
        f"{': ' if why else ''}{_text(why)}</title>{_SHAPES[kind][1]}</g>"
        for step, kind, why in shown
    )
    ends = _label(_LEFT, 176, f"step {min(rows)[0]}") + _label(_WIDTH, 176, f"step {max(rows)[0]}", "end")
    used = {kind for _, kind, _ in rows}
    legend = "".join(
        f"<li><svg viewBox='-10 -10 20 20' aria-hidden='true'>{shape}</svg>{words}</li>"
        for kind, (words, shape) in _SHAPES.items()
        if kind in used
    )
    note = f"<p>{said}</p>" if said else ""
    return (
        _svg("what happened to each step", lanes + marks + ends, 184) + f"<ul class='legend'>{legend}</ul>{note}"
    )


def _at_step(step: float) -> str:
    return f"step {step:.0f}"


def _line(title: str, rows: Sequence[Point], unit: str = "", place: Callable[[float], str] = _at_step) -> str:
    """A line through points; NaN and infinity make gaps."""
    finite = [(x, y) for x, y in rows if math.isfinite(y)]
    gaps = len(rows) - len(finite)
    if not finite:
        return f"<h3>{_text(title)}</h3>" + _nothing("Every value is NaN or infinite.")
    shown, said = _thinned(rows)
    x = _scale([x for x, _ in rows], _LEFT, _WIDTH - 10)
    y = _scale([y for _, y in finite], _HEIGHT - _BOTTOM, 12)
    runs, pen = [], "M"
    for step, value in shown:
        if math.isfinite(value):
            runs.append(f"{pen}{x(step):.1f} {y(value):.1f}")
        pen = "L" if math.isfinite(value) else "M"
    dots = "".join(f"<circle cx='{x(s):.1f}' cy='{y(v):.1f}' r='3'/>" for s, v in shown if math.isfinite(v))
    least, most = min(v for _, v in finite), max(v for _, v in finite)
    axes = f"<path class='axis' d='M{_LEFT} 12V{_HEIGHT - _BOTTOM}H{_WIDTH}'/>"
    labels = _label(_LEFT - 6, 18, f"{most:.3g}{unit}", "end")
    labels += _label(_LEFT - 6, _HEIGHT - _BOTTOM, f"{least:.3g}{unit}", "end") if most > least else ""
    labels += _label(_LEFT, _HEIGHT - 6, place(rows[0][0]))
    labels += _label(_WIDTH, _HEIGHT - 6, place(rows[-1][0]), "end")
    missing = f" {gaps} values are NaN or infinite, and are not drawn." if gaps else ""
    note = f"<p>{said}{missing}</p>" if said or missing else ""
    drawn = f"{axes}<path class='data' d='{''.join(runs)}'/><g class='dots'>{dots}</g>{labels}"
    return f"<h3>{_text(title)}</h3>" + _svg(f"{title} against steps", drawn) + note


def _metrics(events: Events, infos: Sequence[CheckpointInfo]) -> str:
    """The metrics of every step that was ever saved, as far as they are known."""
    known = {event["step"]: event.get("metrics", {}) for event in _of(events, "saved")}
    known |= {info.step: info.metrics for info in infos}
    names = sorted({name for metrics in known.values() for name in metrics})
    if not names:
        return _nothing("No metrics were saved.")
    return "".join(
        _line(name, [(step, float(known[step][name])) for step in sorted(known) if name in known[step]])
        for name in names
    )


def _leaves(infos: Sequence[CheckpointInfo]) -> str:
    """The largest leaves of the newest checkpoint, and the rest in one bar."""
    if not infos:
        return _nothing("There is no readable checkpoint.")
    rows = [
        (f"{item}{leaf.path}", manifests.leaf_nbytes(leaf), str(leaf))
        for item, leaves in infos[-1].leaves.items()
        for leaf in leaves
    ]
    rows.sort(key=lambda row: -row[1])
    shown, rest = rows[:20], rows[20:]
    if rest:
        shown.append((f"{len(rest)} smaller leaves", sum(row[1] for row in rest), ""))
    most = max((row[1] for row in shown), default=1) or 1
    bars = "".join(
        f"<tr><th scope='row'>{_text(name)}</th><td>{_text(kind)}</td><td class='number'>{_size(nbytes)}</td>"
        f"<td class='bar'><svg viewBox='0 0 100 10' preserveAspectRatio='none' aria-hidden='true'>"
        f"<rect width='{100 * nbytes / most:.1f}' height='10'/></svg></td></tr>"
        for name, nbytes, kind in shown
    )
    return f"<p>Step {infos[-1].step}.</p>" + _table(("leaf", "what", "size", ""), bars)


def _saving(events: Events) -> str:
    told = {"durable_s", "blocked_s", "nbytes"}
    saved = [event for event in _of(events, "saved") if told <= event.keys() and event["durable_s"]]
    if not saved:
        return _nothing(_UNKNOWN)
    pairs: dict[str, list[Point]] = {
        "seconds until durable": [(event["step"], event["durable_s"]) for event in saved],
        "seconds the caller waited": [(event["step"], event["blocked_s"]) for event in saved],
        "megabytes saved per second": [
            (event["step"], event["nbytes"] / 1e6 / event["durable_s"]) for event in saved
        ],
    }
    paced = [(event["step"], event["interval_s"]) for event in _of(events, "paced") if "interval_s" in event]
    if paced:
        pairs["seconds between two saves, as overhead has chosen"] = paced
    return "".join(_line(title, rows) for title, rows in pairs.items())


def _at_risk(events: Events) -> str:
    """The time since the newest durable save was begun: it grows, and falls when the next save is durable."""
    found = risk.peaks(events)
    if not found:
        return _nothing("Not known: it takes two saves in a journal.")
    shown = risk.fewer(found, _MOST // 2)
    rows = [point for peak in shown for point in ((peak.at, peak.before_s), (peak.at, peak.after_s))]
    most = max(found, key=lambda peak: peak.before_s)
    typical_s = statistics.median(peak.before_s for peak in found)
    said = (
        f"A run that stops loses the work since its newest durable save was begun. That was at most "
        f"{cadence.spell_s(most.before_s)} ({most.steps} steps), before the save of {_when(most.at)}; "
        f"for half of the saves {cadence.spell_s(typical_s)} or less."
    )
    if len(shown) < len(found):
        said += f" Of {len(found)} saves only {len(shown)} are drawn, those before which most was at risk."
    return f"<p>{said}</p>" + _line("seconds of work at risk", rows, " s", _when)


# ---------------------------------------------------------------- tables


def _table(columns: Sequence[str], rows: str) -> str:
    head = "".join(f"<th scope='col'>{column}</th>" for column in columns)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _row(*cells: object) -> str:
    first, *rest = cells
    return (
        f"<tr><th scope='row'>{_text(first)}</th>" + "".join(f"<td>{_text(cell)}</td>" for cell in rest) + "</tr>"
    )


def _troubles(events: Events, unread: Mapping[int, Unread]) -> str:
    words = {
        "failed": "a save failed",
        "passed over": "passed over in a restore",
        "distrusted": "distrusted",
        "trusted": "trusted again",
    }
    rows = [_row(e["step"], _when(e["time"]), words[e["event"]], e.get("why", "")) for e in _of(events, *words)]
    rows += [_row(step, "now", _state(why), why) for step, why in unread.items()]
    return _table(("step", "when", "what", "why"), "".join(rows)) if rows else _nothing("None is known.")


def _kept_by(info: CheckpointInfo) -> str:
    notes = [f"distrusted: {info.distrusted}" if info.distrusted else "", info.reduced or ""]
    return ", ".join(info.kept) + " (pinned)" * info.pinned + "".join(f" ({note})" for note in notes if note)


def _checkpoints(infos: Sequence[CheckpointInfo], unread: Mapping[int, Unread]) -> str:
    rows = {
        info.step: _row(
            info.step, _when(info.time), _size(info.nbytes), _kept_by(info),
            ", ".join(f"{name} {value:.6g}" for name, value in info.metrics.items()),
        )
        for info in infos
    }  # fmt: skip
    rows |= {step: _row(step, "", "", _state(why), "") for step, why in unread.items()}
    shown, said = _thinned([rows[step] for step in sorted(rows)])
    if not shown:
        return _nothing("Nothing has been saved yet.")
    return _table(("step", "saved", "size", "kept by", "metrics"), "".join(shown)) + (
        f"<p>{said}</p>" if said else ""
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""

# Colours that stay apart without colour vision: https://jfly.uni-koeln.de/color/ (Okabe and Ito).
_STYLE = """
:root { --page: #ffffff; --ink: #1b1f24; --soft: #57606a; --rule: #c9d1d9; --data: #0072b2; --bad: #a63c00; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f1419; --ink: #e6edf3; --soft: #a5b0bb; --rule: #3d4752; --data: #56b4e9; --bad: #ffa657; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .1rem 1rem; }
dt, p, .none { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: .3rem 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 34rem; height: auto; }
svg text { fill: var(--soft); font-size: 13px; }
.axis { stroke: var(--rule); fill: none; }
.data { stroke: var(--data); fill: none; stroke-width: 2; }
.dots, .kept, .bar rect { fill: var(--data); }
.gone { fill: var(--page); stroke: var(--soft); stroke-width: 2; }
.bad { fill: var(--bad); stroke: var(--bad); }
.line { fill: none; stroke: currentColor; stroke-width: 2.5; }
.bad.line { stroke: var(--bad); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; margin: .3rem 0; }
.legend svg { width: 1.1rem; height: 1.1rem; margin-right: .4rem; vertical-align: -.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; vertical-align: top; }
tr { border-bottom: 1px solid var(--rule); }
th[scope=row] { font-weight: 500; }
td.number { white-space: nowrap; }
td.bar { width: 35%; min-width: 7rem; }
td.bar svg { display: block; width: 100%; height: .9rem; margin-top: .25rem; }
"""
