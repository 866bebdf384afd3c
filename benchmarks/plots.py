"""The results as pictures, PNG and SVG: told apart by colour, and in print by hatching and marker as well.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart
(https://jfly.uni-koeln.de/color/).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import peers
from benchmarks.measure import TIMES

# colour, hatching of bars, marker of lines
STYLES = {
    "ckptmgr": ("#D55E00", "", "o"),
    "before": ("#E69F00", "--", "X"),
    "orbax": ("#0072B2", "//", "s"),
    "pickle-fsync": ("#009E73", "..", "^"),
    "pickle": ("#F0E442", "xx", "v"),
    "safetensors": ("#56B4E9", "\\\\", "D"),
    "torch-dcp": ("#CC79A7", "++", "P"),
}
_WORDS = {"blocked_s": "blocked in save", "durable_s": "until durable", "restore_s": "restore"}
_CEILINGS = {"durable_s": "raw_write_s", "restore_s": "raw_read_s"}


def draw(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """Draws what was measured; returns the files."""
    plt.rcParams |= {"svg.hashsalt": "ckptmgr", "font.size": 9}
    plt.rcParams |= {"axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3}
    series = results["series"]
    pictures: dict[str, tuple[Callable[[Any], Any], Any]] = {
        "times": (_times, results["workloads"]),
        "memory": (_memory, results["workloads"]),
        "leaves": (_against("leaves", "leaves", "bytes in all are the same"), series.get("leaves")),
        "bytes": (_against("nbytes", "bytes", "31 leaves"), series.get("bytes")),
        "training": (_training, series.get("training")),
    }
    return [
        path for name, (make, found) in pictures.items() if found for path in _write(make(found), directory / name)
    ]


def draw_scale(results: Mapping[str, Any], path: Path) -> list[Path]:
    """Draws what `benchmarks.scale` has measured."""
    plt.rcParams |= {"svg.hashsalt": "ckptmgr", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    counts = results["sizes"]
    figure, panels = plt.subplots(2, 2, figsize=(10, 8), layout="constrained", sharex=True)
    for panel, (title, lines) in zip(panels.flat, _scale_panels(results).items(), strict=True):
        for (name, costs), style in zip(lines.items(), STYLES.values(), strict=False):
            panel.plot(counts, costs, marker=style[2], color=style[0], markeredgecolor="black", label=name)
        panel.set(xscale="log", yscale="log", ylabel="seconds")
        panel.set_xticks(counts, [f"{count:,}" for count in counts])
        panel.set_title(title, loc="left")
        panel.legend(frameon=False)
    for panel in panels[1]:
        panel.set_xlabel("processes")
    return _write(figure, path)


def draw_month(results: Mapping[str, Any], path: Path) -> list[Path]:
    """Draws what `benchmarks.month` has simulated: the share that trains against the time between saves."""
    plt.rcParams |= {"svg.hashsalt": "ckptmgr", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    months = results["months"]
    figure, panels = plt.subplots(2, 2, figsize=(10, 8), layout="constrained", sharex=True, sharey=True)
    for panel, (name, month) in zip(panels.flat, months.items(), strict=True):
        for words, chosen, style in _month_lines(month["policies"]):
            points = sorted((each["interval_s"], 100 * each["trains"]) for each in chosen)
            line = "-" if words == "fixed intervals" else ""
            panel.plot(*zip(*points, strict=True), line, marker=style[2], color=style[0], markeredgecolor="black",
                       markersize=5 if line else 9, label=words)  # fmt: skip
        panel.set(xscale="log", ylabel="% of the month that trains")
        panel.set_title(f"{name}: a failure every {month['mtbf_s'] / 3600:.2g} h", loc="left")
    for panel in panels[1]:
        panel.set_xlabel("mean seconds between two saves")
    _legend(figure, panels.flat[0])
    return _write(figure, path)


def _month_lines(found: Mapping[str, Any]) -> list[tuple[str, list[Any], tuple[str, str, str]]]:
    """The points of a panel by kind, with their style."""
    fixed = [each for words, each in found.items() if words.startswith("every ")]
    rest = {words.partition(":")[0]: [each] for words, each in found.items() if not words.startswith("every ")}
    return [
        (words, points, style)
        for (words, points), style in zip({"fixed intervals": fixed, **rest}.items(), STYLES.values(), strict=True)
    ]


def _scale_panels(results: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Curves by panel, and by name: what is paid once for all processes is divided among them."""
    agreed, steps, counts = results["agreements"], results["steps"], results["sizes"]
    acts = ("together", "every process reads all", "a save", "a restore")

    def shared(costs: Sequence[Any]) -> list[float]:
        return [each["median"] / count for each, count in zip(costs, counts, strict=True)]

    return {
        "agreements until the last has its answer / processes": {
            name: shared([each[name]["seconds"] for each in agreed]) for name in acts
        },
        "of these, CPU of process 0 and the coordinator / processes": {
            name: shared([each[name]["cpu_of_0_s"] for each in agreed]) for name in acts
        },
        "a save: process 0, for all / processes": {
            name: shared([each["save"][name] for each in steps])
            for name in ("in all", "merge", "look through", "checksums", "compare", "flush")
        },
        "a restore: one process, its share": {
            name: [each["read"][name]["median"] for each in steps]
            for name in ("in all", "check files", "manifest", "index", "open", "arrays")
        },
    }


def _write(figure: Any, path: Path) -> list[Path]:
    written = [path.with_suffix(".png"), path.with_suffix(".svg")]
    figure.savefig(written[0], dpi=150)
    figure.savefig(written[1], metadata={"Date": None})  # the same picture is the same file
    plt.close(figure)
    return written


# ---------------------------------------------------------------- bars


def _times(workloads: Mapping[str, Any]) -> Any:
    figure, panels = plt.subplots(3, 1, figsize=(9, 9), layout="constrained", sharex=True)
    for panel, time in zip(panels, TIMES, strict=True):
        _bars(panel, workloads, lambda figures, time=time: figures[time], with_spread=True)
        _draw_ceilings(panel, workloads, _CEILINGS.get(time))
        panel.set_yscale("log")
        panel.set_ylabel("seconds")
        panel.set_title(_WORDS[time], loc="left")
    _legend(figure, panels[1])
    return figure


def _memory(workloads: Mapping[str, Any]) -> Any:
    """Of workloads below a megabyte the peak is a thread's stack: left out, unless there are no others."""
    chosen = {name: found for name, found in workloads.items() if found["nbytes"] >= 10**6} or workloads
    figure, panels = plt.subplots(2, 1, figsize=(9, 6), layout="constrained", sharex=True)
    for panel, what in zip(panels, ("save", "restore"), strict=True):
        for found in chosen.values():
            for figures in found["peers"].values():
                figures[f"{what}_peak_ratio"] = figures[f"{what}_peak_bytes"] / found["nbytes"]
        _bars(panel, chosen, lambda figures, what=what: figures[f"{what}_peak_ratio"])
        panel.set_ylabel("x bytes of the arrays")
        panel.set_title(f"peak memory of a {what}, above the job's own", loc="left")
    _legend(figure, panels[0])
    return figure


def _bars(
    panel: Any, workloads: Mapping[str, Any], value: Callable[[Any], Any], with_spread: bool = False
) -> None:
    """A group of bars for each workload, one for each peer; whiskers from the least to the most."""
    names = [name for name in STYLES if any(name in found["peers"] for found in workloads.values())]
    for i, name in enumerate(names):
        colour, hatch, _ = STYLES[name]
        found = [value(each["peers"][name]) for each in workloads.values()]
        places = [x + (i - (len(names) - 1) / 2) * _BAR for x in range(len(found))]
        heights = [each["median"] for each in found] if with_spread else found
        spread = [[each["median"] - each["min"] for each in found],
                  [each["max"] - each["median"] for each in found]] if with_spread else None  # fmt: skip
        panel.bar(places, heights, _BAR, yerr=spread, color=colour, hatch=hatch, edgecolor="black",
                  linewidth=0.5, error_kw={"elinewidth": 0.8}, label=peers.ALL[name].title)  # fmt: skip
    panel.set_xticks(range(len(workloads)), [_on_two_lines(found["title"]) for found in workloads.values()])
    panel.grid(axis="x", visible=False)


_BAR = 0.12


def _draw_ceilings(panel: Any, workloads: Mapping[str, Any], ceiling: str | None) -> None:
    if ceiling is None:
        return
    for x, found in enumerate(workloads.values()):
        label = "raw write + fsync, raw read()" if x == 0 else None
        panel.hlines(found["ceilings"][ceiling]["median"], x - 0.45, x + 0.45, color="black", ls="--", label=label)


def _on_two_lines(title: str) -> str:
    return title.replace(" (", "\n(").replace(" over ", "\nover ")


def _legend(figure: Any, panel: Any) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


# ---------------------------------------------------------------- lines


def _against(axis: str, label: str, remark: str) -> Callable[[Sequence[Mapping[str, Any]]], Any]:
    def make(points: Sequence[Mapping[str, Any]]) -> Any:
        figure, panels = plt.subplots(1, 3, figsize=(11, 4.2), layout="constrained", sharey=True)
        for panel, time in zip(panels, TIMES, strict=True):
            for name in points[0]["peers"]:
                colour, _, marker = STYLES[name]
                found = [point["peers"][name][time] for point in points]
                places = [point[axis] for point in points]
                line = {"color": colour, "marker": marker, "label": peers.ALL[name].title}
                panel.plot(places, [each["median"] for each in found], markeredgecolor="black", **line)
                panel.fill_between(
                    places, [each["min"] for each in found], [each["max"] for each in found],
                    color=colour, alpha=0.2, linewidth=0,
                )  # fmt: skip
            panel.set(xscale="log", yscale="log", xlabel=f"{label} ({remark})")
            panel.set_title(_WORDS[time], loc="left")
        panels[0].set_ylabel("seconds")
        _legend(figure, panels[0])
        return figure

    return make


def _training(found: Mapping[str, Any]) -> Any:
    figure, panel = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for i, (name, speed) in enumerate(found["steps_per_s"].items()):
        colour, hatch, _ = STYLES.get(name, ("#999999", "", "o"))
        spread = [[speed["median"] - speed["min"]], [speed["max"] - speed["median"]]]
        panel.barh(i, speed["median"], xerr=spread, color=colour, hatch=hatch, edgecolor="black", linewidth=0.5)
    words = {"never": "never saves", "control": "never saves, again"}
    names = [words.get(name) or peers.ALL[name].title for name in found["steps_per_s"]]
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.set(xlabel="steps per second", title=f"saving every {found['save_every']} steps")
    return figure
