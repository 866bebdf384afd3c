"""The command line: `python -m benchmarks`."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import before, budgets, fresh, machine, plan, profiling, report, workloads


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes, and prints; 1 if a peer did not restore what it saved."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parse(given)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the data directory goes
    options.out.mkdir(parents=True, exist_ok=True)
    occasion = machine.occasion(given)
    with tempfile.TemporaryDirectory(prefix="ckptmgr-benchmark-", dir=options.dir) as directory:
        for results in _measure(options, Path(directory)):
            results = occasion | results | {"budgets": budgets.check(results)}
            _write(results, options.out)
    results["profiles"] = profiling.of_missed(results["budgets"])
    _write(results, options.out)
    print(report.text(results))
    if options.plots:
        from benchmarks import plots

        plots.draw(results, options.out)
    print(f"written to {options.out}")
    return 0 if _all_verified(results) else 1


def _write(results: Mapping[str, Any], directory: Path) -> None:
    (directory / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (directory / "results.txt").write_text(report.text(results) + "\n")
    (directory / "budgets.md").write_text(report.markdown(results["budgets"]))


def _measure(options: argparse.Namespace, directory: Path) -> Iterator[dict[str, Any]]:
    """What is known after each part of the run: one that is stopped has not run for nothing."""
    facts = machine.facts(directory) | {"devices": fresh.call(machine.devices)}
    with contextlib.closing(plan.Run(options, directory)) as run:
        results: dict[str, Any] = {
            "quick": options.quick, "repeats": options.sizes.repeats, "small_repeats": options.sizes.small_repeats,
            "series_repeats": options.sizes.series_repeats, "before": run.before,
            "machine": facts, "versions": machine.versions(),
            "workloads": {}, "series": {}, "not_installed": run.not_installed, "skipped": run.skipped,
        }  # fmt: skip
        for name in options.workloads:
            if found := run.workload(name):
                report.add_ratios(found)
                results["workloads"][name] = found
            yield results
        for name in options.series:
            results["series"][name] = run.series(name)
            yield results


def _all_verified(results: Mapping[str, Any]) -> bool:
    """Whether every peer restored the bits it saved; those that did not are named."""
    measured = [*results["workloads"].values(), *results["series"].get("leaves", ()),
                *results["series"].get("bytes", ())]  # fmt: skip
    wrong = [name for found in measured for name, figures in found["peers"].items() if not figures["verified"]]
    for name in wrong:
        print(f"{name} DID NOT RESTORE WHAT IT SAVED", file=sys.stderr)
    return not wrong


# ---------------------------------------------------------------- options


def _parse(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=_DESCRIPTION)
    known = ",".join(workloads.all_workloads(quick=False))
    series = ",".join(plan.SERIES)
    parser.add_argument("--out", type=Path, default=Path("docs/performance"), help="where results and plots go")
    parser.add_argument("--dir", type=Path, help="data is written to a temporary directory in it, then removed")
    parser.add_argument("--workloads", type=_some_of(known), help=f"of {known}; default: all")
    parser.add_argument("--series", type=_some_of(series), help=f"of {series}; default: all")
    parser.add_argument(
        "--budgets", action="store_true", help="only what the budgets need: no plots, less than 8 minutes"
    )
    parser.add_argument("--before", metavar="COMMIT", default=before.COMMIT,
                        help="compares with ckptmgr at this commit, too; default: %(default)s")  # fmt: skip
    parser.add_argument("--repeats", type=_positive, help="of each measurement; default: 5, of small workloads "
                        "15, of a series 3")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="runs everything on next to nothing, judges no times")
    parser.add_argument("--no-plots", dest="plots", action="store_false")
    options = parser.parse_args(given)
    if options.workloads is None:
        options.workloads = plan.JUDGED_WORKLOADS if options.budgets else known.split(",")
    if options.series is None:
        options.series = plan.JUDGED_SERIES if options.budgets else plan.SERIES
    options.plots = options.plots and not options.budgets
    options.sizes = plan.sizes(quick=options.quick, repeats=options.repeats, budgets=options.budgets)
    if options.plots and machine.is_missing("matplotlib"):
        parser.error("the plots need matplotlib: pip install 'ckptmgr[bench]', or give --no-plots")
    return options


_DESCRIPTION = "Measures ckptmgr beside pickle, stock Orbax, safetensors and torch DCP."


def _some_of(known: str) -> Any:
    """Parses "a,b" into a list of known names; "none" is the empty list."""

    def parse(text: str) -> list[str]:
        names = [] if text == "none" else text.split(",")
        unknown = sorted(set(names) - set(known.split(",")))
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: known are {known} and none")
        return names

    return parse


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
