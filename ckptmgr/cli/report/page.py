"""The whole file: sections, scripts and styles in one HTML page that loads nothing."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import statistics
import time
from collections.abc import Sequence
from importlib import resources
from typing import Any

from ckptmgr.cli import risk
from ckptmgr.cli.report import charts, sizes, tables, words
from ckptmgr.cli.report.changes import changes
from ckptmgr.cli.report.collect import Run, collect, ranked_by
from ckptmgr.cli.report.tables import folded, note
from ckptmgr.cli.report.words import escape
from ckptmgr.manager import CheckpointManager
from ckptmgr.units import format_bytes, format_s

MOST_BYTES = 6_000_000
_POINTS = (300, 100, 30, 10)
"""How many points a chart, and rows a table, may have; the first number with which the file is small enough."""
_MOST_METRICS = 30
_MOST_ENTRIES = 40
_MOST_RESUMED = 50


def html(manager: CheckpointManager) -> str:
    """The report of a run, in ASCII. Raises ImportError if plotly is not installed."""
    scripts = _scripts()
    run, made = collect(manager), words.when(time.time())
    for most in _POINTS:
        page = _Page(run, made, most).html(scripts)
        if len(page) <= MOST_BYTES:
            break
    return page


@functools.cache
def _scripts() -> Sequence[str]:
    """The scripts of the page, and plotly.js first."""
    return [_for_html(_plotly()), _for_html(_packaged("page.js"))]


def _plotly() -> str:
    try:
        from plotly import offline
    except ImportError as problem:
        raise ImportError("plotly draws the report, and is not installed: pip install 'ckptmgr[cli]'") from problem
    return str(offline.get_plotlyjs())


def _packaged(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


class _Page:
    """The sections of a report. A section that has charts adds them to `charts`."""

    def __init__(self, run: Run, made: str, most: int) -> None:
        self.run, self.made, self.most = run, made, most
        self.charts: list[charts.Chart] = []

    def html(self, scripts: Sequence[str]) -> str:
        sections = {
            "Timeline": self.timeline(),
            "Metrics": self.metrics(),
            "Size by module": self.sizes(),
            "What changed": self.changes(),
            "Saving": self.saving(),
            "Work at risk": self.at_risk(),
            "Set aside by rewinds": self.branches(),
            "Passed over and failed": tables.troubles(self.run, self.most) or _nothing("None is known."),
            "Checkpoints on disk": tables.checkpoints(self.run, self.most) or _NOTHING_SAVED,
        }
        body = [self.head(), _tools(), _nav(sections), *(_section(*each) for each in sections.items())]
        data = {"charts": self.charts, "resumed": charts.resumed(self.run, _MOST_RESUMED)}
        page = _PAGE.format(
            title=escape(f"{self.run.name}: checkpoints"), style=_style(), body="\n".join(body),
            policy=" ".join(map(_digest, scripts)), charts=_json(data),
            scripts="\n".join(f"<script>{script}</script>" for script in scripts),
        )  # fmt: skip
        return page.encode("ascii", "xmlcharrefreplace").decode()

    def figure(self, chart: charts.Chart) -> str:
        """The place of a chart; the script draws it there."""
        self.charts.append(chart)
        title = escape(chart["title"])
        against = "" if chart["kind"] == "treemap" else " against steps or time"
        return (
            f'<figure><div class="chart" id="{chart["id"]}" role="img" '
            f'aria-label="{title}{against}; the same is in the table below"></div></figure>'
        )

    # ------------------------------------------------------------ sections

    def head(self) -> str:
        run, newest = self.run, self.run.infos[-1] if self.run.infos else None
        damaged = run.damaged()
        nbytes = sum(info.disk_nbytes or info.nbytes for info in run.infos)
        facts: dict[str, Any] = {
            "directory": run.directory,
            "on disk": f"{words.count(len(run.infos), 'checkpoint')}, {format_bytes(nbytes)}",
            "saved in all": len(run.of("saved")) if run.events else words.NO_JOURNAL,
            "damaged": len(damaged) or "none",
        }
        if len(run.unread) > len(damaged):
            facts["need a newer ckptmgr"] = len(run.unread) - len(damaged)
        if newest is not None:
            versions = ", ".join(f"{name} {version}" for name, version in newest.versions.items())
            facts["newest"] = f"step {newest.step}, {words.when(newest.time)}"
            facts["made with"] = versions or "stock Orbax"
            facts |= {words.shorten(name, 80): each for name, each in [*newest.metadata.items()][:_MOST_ENTRIES]}
        facts["report made"] = self.made
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
        return f"<header><h1>{escape(run.name)}</h1><dl>{rows}</dl></header>"

    def timeline(self) -> str:
        shown, said = charts.by_kind(charts.happenings(self.run), self.most)
        if not shown:
            return _NOTHING_SAVED
        rows = sorted((each for some in shown.values() for each in some), key=lambda each: each.step)
        return self.figure(charts.timeline(shown)) + note(*said) + folded("As a table", tables.happenings(rows))

    def metrics(self) -> str:
        every = charts.metrics(self.run, ranked_by(self.run))
        if not every:
            return _nothing("No metrics were saved.")
        found, left = every[:_MOST_METRICS], every[_MOST_METRICS:]
        steps, said = self.steps_of(found)
        drawn = "".join(self.metric(number, each, set(steps)) for number, each in enumerate(found))
        left_out = f"Not drawn: {words.listing([each.name for each in left])}." if left else ""
        aside = tables.aside(found, self.most) if any(each.aside for each in found) else ""
        return (
            tables.best(found)
            + drawn
            + note(said, left_out)
            + folded("As a table", tables.values(found, steps) + aside)
        )

    def steps_of(self, found: Sequence[charts.Metric]) -> tuple[list[int], str]:
        """The steps whose metrics are shown: every n-th, and those with the lowest and the highest values."""
        steps = sorted({save.step for metric in found for save in metric.line})
        place = {step: at for at, step in enumerate(steps)}
        keep = [place[save.step] for metric in found for save in metric.extremes().values()]
        return words.thinned(steps, self.most, keep)

    def metric(self, number: int, found: charts.Metric, steps: set[int]) -> str:
        title, gaps = f"<h3>{escape(found.name)}</h3>", found.gaps()
        if gaps == len(found.line) and not found.aside:
            return title + _nothing("Every value is NaN or infinite.")
        missing = f"{words.count(gaps, 'value is', 'values are')} NaN or infinite, and not drawn." if gaps else ""
        return title + self.figure(charts.metric(number, found, steps)) + note(missing)

    def sizes(self) -> str:
        if not self.run.infos:
            return _nothing("There is no readable checkpoint.")
        found = sizes.parts(self.run.infos[-1], self.most)
        said = f"<p>Step {self.run.infos[-1].step}: {format_bytes(sizes.total(found))} in arrays.</p>"
        drawn = self.figure(charts.treemap(found)) if sizes.total(found) else ""
        return said + drawn + folded("As a table", tables.parts(found))

    def changes(self) -> str:
        found = changes(self.run.infos)
        if not found:
            return _nothing("It takes two checkpoints on disk to compare.")
        shown, said = tables.changed(found, self.most)
        return _CHANGES + shown + note(said)

    def saving(self) -> str:
        shown, said = charts.timed(self.run, self.most)
        if not shown:
            return _nothing(words.NO_JOURNAL)
        drawn = "".join(
            f"<h3>{escape(chart['title'])}</h3>{self.figure(chart)}"
            for chart in charts.saving(shown, self.run, self.most)
        )
        chosen = charts.intervals(self.run, self.most)
        rows = tables.saving(shown) + (tables.intervals(chosen) if chosen else "")
        return drawn + note(said) + folded("As a table", rows)

    def at_risk(self) -> str:
        found = risk.peaks(self.run.events)
        if not found:
            return _nothing("Not known: it takes two saves in a journal.")
        shown = risk.fewer(found, self.most // 2)
        left_out = ""
        if len(shown) < len(found):
            left_out = f"Of {len(found):,} saves only {len(shown)} are drawn, those before which most was at risk."
        rows = folded("As a table", tables.at_risk(shown))
        return note(_most_at_risk(found), left_out) + self.figure(charts.at_risk(shown)) + rows

    def branches(self) -> str:
        found = self.run.branches
        if not found:
            return _nothing("No step: no rewind has set any aside, or they have been removed.")
        return tables.branches(found, self.most) + _BRANCHES


def _most_at_risk(found: Sequence[risk.Peak]) -> str:
    most = max(found, key=lambda peak: peak.before_s)
    typical_s = statistics.median(peak.before_s for peak in found)
    return (
        f"A run that stops loses the work since its newest durable save was begun. That was at most "
        f"{format_s(most.before_s)} ({words.count(most.steps, 'step')}), before the save of "
        f"{words.when(most.at)}; for half of the saves {format_s(typical_s)} or less."
    )


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _section(title: str, content: str) -> str:
    at = _anchor(title)
    return f'<section aria-labelledby="h-{at}"><h2 id="h-{at}">{title}</h2>{content}</section>'


def _nav(sections: Sequence[str] | dict[str, str]) -> str:
    links = "".join(f'<li><a href="#h-{_anchor(title)}">{title}</a></li>' for title in sections)
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>'


def _nothing(why: str) -> str:
    return f'<p class="none">{escape(why)}</p>'


# ---------------------------------------------------------------- scripts and styles


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _for_html(script: str) -> str:
    """A script that means the same, in ASCII, and does not end the element that it is in."""
    safe = re.sub(r"[^\x00-\x7f]", _escaped, script)
    return re.sub(r"<(?=/script|!--)", r"\\x3c", safe, flags=re.IGNORECASE)


def _escaped(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def _digest(script: str) -> str:
    """The source of a script in a Content-Security-Policy: no other script of the page runs."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _style() -> str:
    style = _packaged("page.css")
    for name, colours in _COLOURS.items():
        rules = "".join(f"--{role}: {colour}; " for role, colour in colours.items())
        style = style.replace(f"/* {name} */", f"{rules}color-scheme: {name};")
    return style


_COLOURS = {
    "light": {
        "page": "#ffffff", "ink": "#1b1f24", "soft": "#57606a", "rule": "#d3d9e0",
        "data": "#0072b2", "second": "#8a5a00", "bad": "#a63c00",
    },
    "dark": {
        "page": "#0f1419", "ink": "#e6edf3", "soft": "#a5b0bb", "rule": "#333d47",
        "data": "#56b4e9", "second": "#e69f00", "bad": "#ffa657",
    },
}  # fmt: skip
_CHANGES = (
    "<p>Leaves, metadata and versions are compared. "
    "<code>ckptmgr diff RUN@STEP RUN@STEP --values</code> compares values too.</p>"
)
_NOTHING_SAVED = _nothing("Nothing has been saved yet.")
_BRANCHES = "<p><code>ckptmgr rewind RUN@STEP</code> to one of these steps brings it back.</p>"
_CHOICES = {
    "Horizontal axis": ("x", {"step": "Steps", "time": "Time"}),
    "Vertical axis": ("y", {"linear": "Linear", "log": "Logarithmic"}),
    "Colours": ("theme", {"auto": "Auto", "light": "Light", "dark": "Dark"}),
}
_HINTS = """<p class="live-only hint"><span class="mouse">Drag in a chart to zoom, double-click to zoom out.</span>
<span class="touch">Touch a point to see its value; zoom with the buttons of a chart.</span>
Dotted vertical lines show where the run was resumed.</p>
<noscript><p>Without scripts no chart is drawn. Every chart has its data in a table.</p></noscript>"""


def _tools() -> str:
    """The buttons; in each group the first is pressed, as `page.js` begins."""
    groups = []
    for what, (name, choices) in _CHOICES.items():
        buttons = "".join(
            f'<button type="button" data-set="{name}" data-to="{value}" '
            f'aria-pressed="{"false" if at else "true"}">{label}</button>'
            for at, (value, label) in enumerate(choices.items())
        )
        groups.append(f'<span class="group" role="group" aria-label="{what}">{buttons}</span>')
    return f'<div class="tools" role="group" aria-label="How the charts are drawn">{"".join(groups)}</div>{_HINTS}'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
img-src data: blob:; script-src {policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main>
<script type="application/json" id="charts">{charts}</script>
{scripts}
</body>
</html>
"""
