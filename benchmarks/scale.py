"""What a job of thousands of processes pays: `python -m benchmarks.scale`.

Three things are measured for each number of processes, in fresh processes: what the processes agree on
(`agreements`), a step that so many have written, as process 0 and as one reader see it (`parts`), and how long a
process takes to find out what it writes. Straight lines through the figures give the costs of other numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize

from benchmarks import agreements, fresh, machine, parts, report

Results = Mapping[str, Any]
SIZES = (2, 8, 32, 128, 512, 2_048)
LEAVES = 8
MANY_LEAVES = (8, 64, 256)
"""Leaves of a step of `_FEW` processes: what a leaf more costs."""
_FEW = 128
FORECAST = (64, 1_024, 16_384)
_TIMEOUT_S = 1800.0


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes and prints."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parse(given)
    options.out.mkdir(parents=True, exist_ok=True)
    occasion = machine.occasion(given, "benchmarks.scale")
    with tempfile.TemporaryDirectory(prefix="ckptmgr-benchmark-", dir=options.dir) as directory:
        facts = machine.facts(Path(directory)) | {"devices": fresh.call(machine.devices)}
        found = _measure(options.sizes, options.repeats, Path(directory))
    results = occasion | {"machine": facts, "versions": machine.versions()} | found
    results["lines"] = lines(results)
    (options.out / f"{options.name}.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (options.out / f"{options.name}.txt").write_text(text(results) + "\n")
    print(text(results))
    if options.plots:
        from benchmarks import plots

        plots.draw_scale(results, options.out / options.name)
    return 0


def _parse(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/performance"), help="where results and plot go")
    parser.add_argument("--name", default="scale", help="their name; default: %(default)s")
    parser.add_argument("--dir", type=Path, help="data is written to a temporary directory in it, then removed")
    parser.add_argument("--sizes", type=_sizes, default=SIZES, help="numbers of processes; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement; default: %(default)s")
    parser.add_argument("--no-plots", dest="plots", action="store_false")
    options = parser.parse_args(given)
    if options.plots and machine.is_missing("matplotlib"):
        parser.error("the plot needs matplotlib: pip install 'ckptmgr[bench]', or give --no-plots")
    return options


def _sizes(given: str) -> tuple[int, ...]:
    return tuple(map(int, given.split(",")))


def _measure(sizes: Sequence[int], repeats: int, directory: Path) -> dict[str, Any]:
    few = min(_FEW, max(sizes))
    wanted = dict.fromkeys([*((count, LEAVES) for count in sizes), *((few, leaves) for leaves in MANY_LEAVES)])
    steps = {}
    for count, leaves in wanted:
        _say(f"a step of {count} processes and {leaves} leaves")
        folder = directory / f"{count}-{leaves}"
        steps[count, leaves] = fresh.call(parts.measure_step, count, leaves, repeats, folder)
    agreed, plans = [], []
    for count in sizes:
        _say(f"agreements of {count} processes")
        agreed.append(agreements.measure_all(count, repeats, _TIMEOUT_S))
        plans.append(fresh.call(parts.measure_plan, count, repeats))
    return {
        "sizes": list(sizes),
        "repeats": repeats,
        "agreements": agreed,
        "steps": [steps[count, LEAVES] for count in sizes],
        "leaves": [steps[few, leaves] for leaves in MANY_LEAVES],
        "plans": plans,
    }


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- a straight line through the figures

_SAVE = ("merge", "look through", "checksums", "compare", "manifest", "flush", "the rest", "in all", "a part")
_READ = ("open", "manifest", "check files", "index", "arrays", "in all")


def lines(results: Results) -> dict[str, dict[str, float]]:
    """For each cost what it is without another process, and what each process adds."""
    found = {}
    for name in results["agreements"][0]:
        for what, words in (("seconds", name), ("cpu_of_0_s", f"{name}, CPU of process 0")):
            found[words] = _line(results, "agreements", lambda each, n=name, w=what: each[n][w]["median"])
    for part, names in (("save", _SAVE), ("read", _READ)):
        for name in names:
            value = lambda each, p=part, n=name: each[p][n]["median"]  # noqa: E731
            found[f"{part}: {name}"] = _line(results, "steps", value)
    for name in ("files", "manifest_bytes", "index_bytes"):
        found[name] = _line(results, "steps", lambda each, n=name: each[n])
    for name in (each for each in results["plans"][0] if each != "count"):
        found[f"plan: {name}"] = _line(results, "plans", lambda each, n=name: each[n]["median"])
    return found


def _line(results: Results, series: str, value: Callable[[Any], float]) -> dict[str, float]:
    """Least squares of relative errors: a large number of processes counts no more than a small one."""
    counts = np.array(results["sizes"], float)
    costs = np.array([value(each) for each in results[series]], float)
    rows = np.stack([np.ones_like(counts), counts], 1) / costs[:, None]
    fixed, each = (float(cost) for cost in optimize.nnls(rows, np.ones_like(costs))[0])  # no cost is below zero
    return {"fixed": fixed, "each": each} | {str(count): fixed + each * count for count in FORECAST}


# ---------------------------------------------------------------- tables


def text(results: Results) -> str:
    """Everything that was measured, for a terminal of some 110 columns."""
    return "\n".join(line for part in _tables(results) for line in [*part, ""])


def _tables(results: Results) -> Iterator[list[str]]:
    yield report.occasion(results)
    kinds = list(results["agreements"][0])
    heads = ["processes", *kinds]
    for what, title in (
        ("seconds", "agreements: seconds until the last process has its answer"),
        ("cpu_of_0_s", "of these, CPU seconds of process 0 and the coordinator"),
    ):
        rows = [[count, *(each[kind][what]["median"] for kind in kinds)]
                for count, each in zip(results["sizes"], results["agreements"], strict=True)]  # fmt: skip
        yield _table(title, heads, rows)
    yield _table(
        f"a save of {LEAVES} leaves: seconds of process 0 for all; and of any process for its own part",
        ["processes", *_SAVE],
        [[each["count"], *(each["save"][name]["median"] for name in _SAVE)] for each in results["steps"]],
    )
    yield _table(
        "the step, and one process that reads its share of it: seconds",
        ["processes", "files", "manifest kB", "index kB", *_READ],
        [[*_sizes_of(each), *(each["read"][name]["median"] for name in _READ)] for each in results["steps"]],
    )
    saved, read = ("merge", "compare", "manifest", "in all"), ("manifest", "index", "in all")
    yield _table(
        f"the same with more leaves, {results['leaves'][0]['count']} processes: seconds",
        ["leaves", *(f"save: {name}" for name in saved), "index kB", *(f"read: {name}" for name in read)],
        [
            [each["leaves"], *(each["save"][name]["median"] for name in saved), each["index_bytes"] / 1000]
            + [each["read"][name]["median"] for name in read]
            for each in results["leaves"]
        ],
    )
    plans = [name for name in results["plans"][0] if name != "count"]
    yield _table(
        "who writes what, found once for each structure: seconds, 100 leaves",
        ["processes", *plans],
        [[each["count"], *(each[name]["median"] for name in plans)] for each in results["plans"]],
    )
    yield _table(
        "a straight line through each: fixed + each * processes, and what it gives",
        ["", "fixed", "each", *(f"{count:,}" for count in FORECAST)],
        [[name, *line.values()] for name, line in results["lines"].items()],
    )
    yield [f"medians of {results['repeats']}; all processes on this machine; files come from the page cache"]


def markdown(results: Results) -> dict[str, str]:
    """The tables of docs/scale.md, by name."""
    plans = [name for name in results["plans"][0] if name != "count"]
    shown = [n for n, count in enumerate(results["sizes"]) if count >= _SHOWN]
    agreed, steps = [results["agreements"][n] for n in shown], [results["steps"][n] for n in shown]
    kinds = (("together", "seconds"), ("every process reads all", "seconds"), ("a save", "seconds"),
             ("a save", "cpu_of_0_s"), ("a restore", "seconds"), ("a restore", "cpu_of_0_s"))  # fmt: skip
    chunks = _of_chunk(results)
    return {
        "PLANS": _rows([[each["count"], *(each[name]["median"] for name in plans)]
                        for each in (results["plans"][n] for n in shown)]),
        "AGREED": _rows([[each["together"]["count"], *(each[kind][what]["median"] for kind, what in kinds)]
                         for each in agreed]),
        "SAVES": _rows([[each["count"], *(each["save"][name]["median"] for name in SAVES)] for each in steps]),
        "READS": _rows([[*_sizes_of(each)[:3], *(each["read"][name]["median"] for name in _READ)]
                        for each in steps]),
        "MODEL": _rows([[words, *(results["lines"][name][str(count)] for count in FORECAST)]
                        for name, words in _MODEL.items()]),
        "CHUNK": _rows([[words, f"{1e6 * chunks[words]:.1f} us"] for words in _CHUNK]),
        "CHUNKS": _rows([[words, *(_LARGE * count * chunks[words] for count in FORECAST)] for words in _CHUNK]),
    }  # fmt: skip


_SHOWN, _LARGE = 32, 1_000
SAVES = ("merge", "look through", "checksums", "compare", "manifest", "flush", "in all")
_MODEL = {
    "save: in all": "a save: process 0, for all, seconds",
    "a save, CPU of process 0": "a save: agreements, CPU seconds of process 0",
    "save: a part": "a save: each process, its own part, seconds",
    "read: in all": "a restore: each process, 64 kB, seconds",
    "a restore, CPU of process 0": "a restore: agreements, CPU seconds of process 0",
    "read: open": "an opening: each process, seconds",
    "an opening, CPU of process 0": "an opening: agreements, CPU seconds of process 0",
    "files": "files of a step",
    "manifest_bytes": "bytes of the manifest",
}
_CHUNK = {
    "process 0 merges": ("save", "merge"),
    "process 0 compares": ("save", "compare"),
    "each process that restores reads the index": ("read", "index"),
}


def _of_chunk(results: Results) -> dict[str, float]:
    """Seconds for each chunk more, from the most leaves and the fewest."""
    few, many = results["leaves"][0], results["leaves"][-1]
    more = (many["leaves"] - few["leaves"]) * many["count"]
    return {
        words: max(0.0, many[part][name]["median"] - few[part][name]["median"]) / more
        for words, (part, name) in _CHUNK.items()
    }


def _rows(rows: Sequence[Sequence[Any]]) -> str:
    return "\n".join(
        f"| {' | '.join(each if isinstance(each, str) else report.short(each) for each in row)} |" for row in rows
    )


def _sizes_of(each: Results) -> list[float]:
    return [each["count"], each["files"], each["manifest_bytes"] / 1000, each["index_bytes"] / 1000]


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [[each if isinstance(each, str) else report.short(each) for each in row] for row in rows]
    return [report.section(title), *report.table(list(head), cells)]


if __name__ == "__main__":
    sys.exit(main())
