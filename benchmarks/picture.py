"""The picture of the README: a run that was killed and resumed, and the time that saving blocks training.

    make demo
    python -m benchmarks.picture runs/demo

Draws the losses that `make demo` has left, and what `python -m benchmarks` has left in docs/performance.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import peers
from benchmarks.plots import STYLES

ROOT = Path(__file__).parents[1]
RESULTS, OUT = ROOT / "docs" / "performance" / "results.json", ROOT / "docs" / "picture.png"
PEERS = ("ckptmgr", "pickle-fsync", "orbax")
WORKLOADS = {
    "tiny": "7 leaves\n52 B",
    "many": "3,001 leaves\n25 MB",
    "big": "97 leaves\n806 MB",
    "gpt2": "GPT-2, Adam\n1.49 GB",
}


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss, in the order in which the run wrote them: a resumed run repeats some steps."""
    rows = [line.split() for line in (run / "losses.txt").read_text().splitlines()]
    return [(int(step), float.fromhex(loss)) for step, loss in rows]


def lives(rows: list[tuple[int, float]]) -> list[list[tuple[int, float]]]:
    """The rows of each process: one ends where the step goes back."""
    found: list[list[tuple[int, float]]] = [[]]
    for row in rows:
        if found[-1] and row[0] <= found[-1][-1][0]:
            found.append([])
        found[-1].append(row)
    return found


def draw(runs: Path, results: Path, out: Path) -> list[Path]:
    plt.rcParams |= {
        "svg.hashsalt": "ckptmgr",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    _losses(left, losses(runs / "straight"), lives(losses(runs / "killed")))
    _blocked(right, json.loads(results.read_text())["workloads"])
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)
    return out


def _losses(panel: Any, straight: list[tuple[int, float]], killed: list[list[tuple[int, float]]]) -> None:
    last = killed[-1][-1][0]
    panel.plot(*zip(*[row for row in straight if row[0] <= last], strict=True),
               color="#bbbbbb", linewidth=5, label="never stopped")  # fmt: skip
    for life, colour in zip(killed[-2:], ("#0072B2", "#D55E00"), strict=True):
        words = "killed" if life is killed[-2] else "resumed"
        panel.plot(*zip(*life, strict=True), color=colour, linewidth=1, label=words)
    end, start = killed[-2][-1][0], killed[-1][0][0] - 1
    panel.axvline(end, color="black", linestyle="--", linewidth=1)
    panel.annotate(f"SIGKILL at step {end},\nresumed from step {start}", (end, 0.75), (-6, 0),
                   xycoords=("data", "axes fraction"), textcoords="offset points", ha="right")  # fmt: skip
    panel.set(yscale="log", xlabel="step", ylabel="loss")
    panel.set_title("the same losses, bit for bit", loc="left")
    panel.legend(frameon=False, loc="lower left")


def _blocked(panel: Any, workloads: dict[str, Any]) -> None:
    for i, name in enumerate(PEERS):
        colour, hatch, _ = STYLES[name]
        heights = [1000 * workloads[each]["peers"][name]["blocked_s"]["median"] for each in WORKLOADS]
        places = [x + (i - 1) * 0.27 for x in range(len(heights))]
        look = {"color": colour, "hatch": hatch, "edgecolor": "black", "linewidth": 0.5}
        bars = panel.bar(places, heights, 0.27, label=peers.ALL[name].title, **look)
        words = [f"{height:.2g}" if height < 100 else f"{height:,.0f}" for height in heights]
        panel.bar_label(bars, words, fontsize=7)
    panel.set_xticks(range(len(WORKLOADS)), WORKLOADS.values())
    panel.set(yscale="log", ylabel="milliseconds")
    panel.set_title("how long each save blocks training (logarithmic)", loc="left")
    panel.legend(frameon=False, loc="upper left")
    panel.margins(y=0.2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the directory that `make demo` has left its runs in")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=OUT, help="the picture")
    arguments = parser.parse_args()
    print(draw(arguments.runs, arguments.results, arguments.out))
