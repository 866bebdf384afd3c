"""The results as tables for a terminal, and the ratios that go into the JSON file beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import peers
from benchmarks.measure import TIMES
from benchmarks.memory import PEAKS
from benchmarks.workloads import spell_bytes

Results = Mapping[str, Any]
BASES = {"pickle-fsync": "pickle + fsync", "orbax": "stock Orbax", "before": "ckptmgr before"}


def add_ratios(found: dict[str, Any]) -> None:
    """Gives each peer of a workload its times over those of each base, medians over medians."""
    for figures in found["peers"].values():
        figures["ratios"] = {
            base: {time: figures[time]["median"] / found["peers"][base][time]["median"] for time in TIMES}
            for base in BASES
            if base in found["peers"]
        }


def text(results: Results) -> str:
    """Everything that was measured, for a terminal of some 110 columns."""
    return "\n".join(line for part in _parts(results) for line in [*part, ""])


def _parts(results: Results) -> Iterator[list[str]]:
    yield occasion(results)
    for found in results["workloads"].values():
        yield _workload(found)
    series = results["series"]
    for name, heading in (("leaves", "cost against leaves"), ("bytes", "cost against bytes")):
        if series.get(name):
            yield _growth(heading, series[name])
    for name, write in (
        ("training", _training), ("saves", _saves), ("opening", _opening), ("shards", _shards),
        ("processes", _processes), ("late", _late),
    ):  # fmt: skip
        if name in series:
            yield write(series[name])
    if results["budgets"]:
        yield _budgets(results["budgets"])
    for what, lines in results.get("profiles", {}).items():
        yield [section(f"a budget is missed: what remains of {what}"), *lines]
    yield _remarks(results)


def occasion(results: Results) -> list[str]:
    """Command, date, commit, machine and versions."""
    machine, versions = results["machine"], results["versions"]
    return [
        f"{results['command']}   {results['date']}   commit {results['commit'][:10]}{results['commit'][40:]}",
        f"{machine['cpu']}, {machine['cores']} cores, {spell_bytes(machine['memory_bytes'])}, "
        f"{machine['kernel']}, {machine['file_system']}, JAX on {machine['devices']}",
        ", ".join(f"{name} {version}" for name, version in versions.items() if version),
    ]


# ---------------------------------------------------------------- one workload


def _workload(found: Results) -> list[str]:
    times = [
        [_title(name), *(_spread(figures[time]) for time in (*TIMES, "finished_s")), _slashed(figures["first"]),
         "yes" if figures["verified"] else "NO"]
        for name, figures in found["peers"].items()
    ]  # fmt: skip
    header = ["seconds: median (min - max)", "blocked in save", "until durable", "restore",
              "until the old one is deleted", "first save and restore", "bits verified"]  # fmt: skip
    return [section(found["title"]), *table(header, times), _ceilings(found["ceilings"]), "", *_space(found)]


def _space(found: Results) -> list[str]:
    bases = {base: f"x {words}" for base, words in BASES.items() if base in found["peers"]}
    header = ["", *bases.values(), "on disk", "files", "memory: save", "restore"]
    rows = [
        [
            _title(name),
            *(_slashed(figures["ratios"][base]) for base in bases),
            spell_bytes(figures["disk_bytes"]),
            str(figures["files"]),
            *(_bytes_or_dash(figures.get(peak)) for peak in PEAKS),
        ]
        for name, figures in found["peers"].items()
    ]
    remark = "ratios and first times are blocked / durable / restore; memory is the peak above the job's own"
    arrays = f"as many JAX arrays, and nothing else, take {spell_bytes(found['ceilings']['arrays_peak_bytes'])}"
    return [*table(header, rows), remark, arrays]


def _ceilings(found: Results) -> str:
    words = {"raw_write_s": "raw write + fsync", "raw_read_s": "raw read()", "device_get_s": "jax.device_get"}
    return "ceilings: " + ", ".join(f"{words[name]} {_spread(found[name])}" for name in words)


# ---------------------------------------------------------------- series


def _growth(heading: str, points: Sequence[Results]) -> list[str]:
    rows = [
        [f"{point['leaves']:,}", spell_bytes(point["nbytes"]), _title(name),
         *(short(figures[time]["median"]) for time in TIMES)]
        for point in points
        for name, figures in point["peers"].items()
    ]  # fmt: skip
    header = ["leaves", "bytes", "", "blocked s", "durable s", "restore s"]
    return [section(heading), *table(header, rows, left=3)]


def _training(found: Results) -> list[str]:
    rows = [
        [_title(name), _spread(speed), _percent(found["slowdown"].get(name))]
        for name, speed in found["steps_per_s"].items()
    ]
    heading = f"training that saves {spell_bytes(found['nbytes'])} every {found['save_every']} steps"
    return [section(heading), *table(["", "steps/s", "slower: mean, standard error"], rows)]


def _saves(found: Results) -> list[str]:
    rows = [
        [
            words,
            spell_bytes(held["anonymous_bytes"]),
            *(f"{held[what]:.0f}" for what in ("threads", "open_files", "files")),
        ]
        for words, held in (("early", found["early"]), ("at the end", found["late"]))
    ]
    heading = f"a run of {found['count']} saves of {spell_bytes(found['nbytes'])}: what it holds after a save"
    return [section(heading), *table(["", "memory", "threads", "open files", "files on disk"], rows)]


def _opening(found: Results) -> list[str]:
    rows = [
        [_title(name), _spread(figures["open_s"]), _spread(figures["first_save_blocked_s"])]
        for name, figures in found["peers"].items()
    ]
    header = ["seconds", "open, list", "blocked in the first save"]
    return [section(f"opening a directory of {found['steps']:,} steps"), *table(header, rows)]


def _shards(found: Results) -> list[str]:
    rows = [
        [_title(name), spell_bytes(figures["chunk_bytes"]),
         *(_ratio_or_reason(figures[axis]) for axis in ("saved_axis", "other_axis"))]
        for name, figures in found["peers"].items()
    ]  # fmt: skip
    heading = f"restoring one shard of {found['count']} ({spell_bytes(found['shard_bytes'])}): bytes read / needed"
    return [section(heading), *table(["", "chunk", "along the saved axis", "along the other"], rows)]


def _processes(found: Results) -> list[str]:
    rows = [
        [_title(name), count, *(short(figures[time]["median"]) for time in TIMES),
         *(_bytes_or_dash(figures.get(peak)) for peak in PEAKS), ""]
        if figures["supported"]
        else [_title(name), count, *"-----", f"not supported yet: {figures['reason'][:60]}"]
        for name, by_count in found["peers"].items()
        for count, figures in by_count.items()
    ]  # fmt: skip
    header = ["", "processes", "blocked s", "durable s", "restore s", "memory: save", "restore", ""]
    remark = "times are those of the slowest process; memory is the peak of the one that takes most, above its own"
    return [section(f"several processes, {spell_bytes(found['nbytes'])}"), *table(header, rows), remark]


def _late(found: Results) -> list[str]:
    rows = [
        [_title(name), count, *(_spread(figures[what]) for what in ("first_s", "blocked_s", "durable_s"))]
        if figures["supported"]
        else [_title(name), count, "-", "-", f"not supported yet: {figures['reason'][:60]}"]
        for name, by_count in found["peers"].items()
        for count, figures in by_count.items()
    ]
    header = [
        "seconds: median (min - max)",
        "processes",
        "blocked in the first",
        "in the slowest",
        "until durable",
    ]
    title = f"a save to which each process but the first comes {found['late_s']:.1f} s later"
    return [section(title), *table(header, rows)]


# ---------------------------------------------------------------- budgets and remarks


def _budgets(budgets: Sequence[Results]) -> list[str]:
    return [
        section("budgets"),
        *table(["", "", "at most", "measured", ""], [_verdict(row) for row in budgets], left=2),
    ]


def _verdict(row: Results) -> list[str]:
    words = {True: "met", False: "missed", None: "not judged"}
    return [row["where"], row["what"], short(row["limit"]), short(row["measured"]), words[row["met"]]]


def markdown(budgets: Sequence[Results]) -> str:
    """The budgets as the table of docs/performance.md."""
    head = "| workload | budget | at most | measured | |\n|---|---|---|---|---|\n"
    return head + "".join(f"| {' | '.join(_verdict(row))} |\n" for row in budgets)


def _remarks(results: Results) -> list[str]:
    return [
        *(f"{peers.ALL[name].title}: {peers.ALL[name].note}" for name in peers.ALL),
        *(f"{peers.ALL[name].title} was not measured: {package} is not installed"
          for name, package in results["not_installed"].items()),
        *(f"{name} was skipped: {why}" for name, why in results["skipped"].items()),
        "Reads come from the page cache: what is restored was written just before.",
    ]  # fmt: skip


# ---------------------------------------------------------------- words and columns


def _title(name: str) -> str:
    return peers.ALL[name].title if name in peers.ALL else name


def section(words: str) -> str:
    return f"== {words} "


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _spread(found: Mapping[str, float]) -> str:
    return f"{short(found['median'])} ({short(found['min'])} - {short(found['max'])})"


def _slashed(times: Mapping[str, float]) -> str:
    return " / ".join(short(times[time]) for time in TIMES)


def _bytes_or_dash(count: float | None) -> str:
    return "-" if count is None else spell_bytes(count)


def _percent(found: Mapping[str, float] | None) -> str:
    return "{mean:.1%} +- {standard_error:.1%}".format(**found) if found else ""


def _ratio_or_reason(found: Mapping[str, Any]) -> str:
    return short(found["ratio"]) if found["supported"] else f"not supported yet: {found['reason'][:40]}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Columns as wide as they need; the first `left` are aligned to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
