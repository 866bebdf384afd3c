"""What `overhead` and `as_often_as_possible` do in a real training loop: `python -m benchmarks.cadence`.

A slowed disk is the directory of a run whose rename of a step waits first, as if the disk had much to write. The
share of the run that saving costs is measured here from times that the loop takes itself: what the calls of `save`
take, and by how much the steps beside a save are slower than the mean of the others. The policy's own measurements
are not looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

import ckptmgr
from benchmarks import fresh, machine, report
from ckptmgr.run import catalog

SETTLED = 4
"""After so many saves the share is judged."""
SHARE, LARGE_SHARE = 0.02, 0.05


class Case(NamedTuple):
    """A policy on a disk."""

    title: str
    policy: Any
    waits_s: float = 0.0
    """How long the disk takes longer for each save."""
    asynchronous: bool = True
    changes: bool = False
    """Whether the disk is slowed in the second half alone."""


OVERHEADS = (
    Case("fast disk", ckptmgr.overhead(SHARE)),
    Case("slowed by 0.5 s", ckptmgr.overhead(SHARE), 0.5),
    Case("fast disk, synchronous", ckptmgr.overhead(SHARE), 0.0, False),
    Case("slowed by 0.1 s, synchronous", ckptmgr.overhead(SHARE), 0.1, False),
    Case("slowed by 0.3 s in the second half, synchronous", ckptmgr.overhead(LARGE_SHARE), 0.3, False, True),
)
OFTEN = (
    Case("as_often_as_possible, fast disk", ckptmgr.as_often_as_possible()),
    Case("as_often_as_possible, slowed by 1 s", ckptmgr.as_often_as_possible(), 1.0),
    Case("every 20 steps, slowed by 1 s", 20, 1.0),
)


class Step(NamedTuple):
    """One turn of the loop, in seconds since its start."""

    began: float
    trained: float
    returned: float
    is_saved: bool
    was_beside: bool
    """Whether a save was being written when the step began."""


class _SlowDirectory:
    """The directory of a run, whose `publish` waits."""

    def __init__(self, real: Any, waits_s: Any) -> None:
        self._real, self._waits_s = real, waits_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def publish(self, name: str) -> Any:
        time.sleep(self._waits_s())
        return self._real.publish(name)


@contextlib.contextmanager
def slowed(waits_s: Any) -> Iterator[None]:
    """Inside it each directory that is opened is on a disk that takes so much longer for each step."""
    real = catalog.open_directory
    with mock.patch.object(catalog, "open_directory", lambda path: _SlowDirectory(real(path), waits_s)):
        yield


def train(case: Case, seconds: float, width: int, directory: Path) -> dict[str, Any]:
    """Trains for so long under a policy, and measures."""
    begins = time.perf_counter()

    def waits_s() -> float:
        is_fast = case.changes and time.perf_counter() < begins + seconds / 2
        return 0.0 if is_fast else case.waits_s

    durable: list[tuple[int, float]] = []
    options = {"save_every": case.policy, "asynchronous": case.asynchronous}  # no step is deleted beside the loop
    options["on_commit"] = lambda info: durable.append((info.step, time.perf_counter() - begins))
    state = jax.block_until_ready(_train_step(_start(width)))  # compiles
    with slowed(waits_s), ckptmgr.CheckpointManager(directory, **options) as manager:
        begins = time.perf_counter()
        steps = _loop(manager, seconds, state, begins)
    return _figures(case, steps, durable, seconds)


def _loop(manager: ckptmgr.CheckpointManager, seconds: float, state: Any, begins: float) -> list[Step]:
    newest, steps = None, []
    while (began := time.perf_counter()) < begins + seconds:
        was_beside = newest is not None and not newest.done()
        state = jax.block_until_ready(_train_step(state))
        trained = time.perf_counter()
        result = manager.save(len(steps) + 1, state)
        newest = result if result else newest
        times = (each - begins for each in (began, trained, time.perf_counter()))
        steps.append(Step(*times, is_saved=bool(result), was_beside=was_beside))
    return steps


def _start(width: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    return {f"w{n}": jax.random.normal(key, (width, width)) / width**0.5 for n, key in enumerate(keys)}


@jax.jit
def _train_step(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Gradient descent on a perceptron of three layers."""
    batch = jnp.ones((64, state["w0"].shape[0]))

    def loss(state: dict[str, jax.Array]) -> jax.Array:
        return jnp.mean(jnp.tanh(jnp.tanh(batch @ state["w0"]) @ state["w1"] @ state["w2"]) ** 2)

    return jax.tree.map(lambda w, g: w - 0.01 * g, state, jax.grad(loss)(state))


# ---------------------------------------------------------------- figures


def _figures(case: Case, steps: Sequence[Step], durable: Sequence[tuple[int, float]], seconds: float) -> Any:
    quiet_s = statistics.fmean(each.trained - each.began for each in steps if not each.was_beside)
    halves = [(0.0, seconds / 2), (seconds / 2, seconds)] if case.changes else [(0.0, seconds)]
    gaps = [later - step for (step, _), (later, _) in itertools.pairwise(durable)]
    waits = sorted(each.returned - each.trained for each in steps if each.is_saved)
    return {
        "title": case.title,
        "asked": getattr(case.policy, "share", None),
        "step_s": quiet_s,
        "saves": len(waits),
        "phases": [_phase(steps, *half) for half in halves],
        "longest_wait_s": waits[-1],
        "wait_s": statistics.median(waits),
        "steps_between": statistics.median(gaps) if gaps else None,
        "most_steps_between": max(gaps, default=None),
    }


def _phase(steps: Sequence[Step], since: float, until: float) -> dict[str, Any]:
    """From the save after which the share is judged to the last one: the saves between, and what they cost."""
    saved = [at for at, each in enumerate(steps) if each.is_saved and since <= each.trained < until]
    if len(saved) <= SETTLED + 1:
        return {"saves": len(saved), "share": None, "error": None, "interval_s": None}
    cycles = [steps[one + 1 : other + 1] for one, other in itertools.pairwise(saved[SETTLED:])]
    passed_s = steps[saved[-1]].returned - steps[saved[SETTLED]].returned
    blocked_s = sum(cycle[-1].returned - cycle[-1].trained for cycle in cycles)
    lost = [each for each in map(_lost_s, cycles) if each is not None]
    error_s = statistics.stdev(lost) * len(lost) ** 0.5 if len(lost) > 1 else 0.0
    return {
        "saves": len(saved),
        "share": (blocked_s + sum(lost)) / passed_s,
        "error": error_s / passed_s,
        "blocked": blocked_s / passed_s,
        "interval_s": passed_s / len(cycles),
    }


def _lost_s(cycle: Sequence[Step]) -> float | None:
    """By how much the steps beside a save took longer than the others before the next save."""
    times = [(each.trained - each.began, each.was_beside) for each in cycle]
    quiet = [seconds for seconds, was_beside in times if not was_beside]
    beside = [seconds for seconds, was_beside in times if was_beside]
    return sum(beside) - len(beside) * statistics.fmean(quiet) if quiet else None


# ---------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes and prints."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parse(given)
    options.out.mkdir(parents=True, exist_ok=True)
    occasion = machine.occasion(given, "benchmarks.cadence")
    with tempfile.TemporaryDirectory(prefix="ckptmgr-benchmark-", dir=options.dir) as directory:
        where = Path(directory)
        facts = machine.facts(where) | {"devices": fresh.call(machine.devices)}
        found = {
            name: [_measure(name, at, options, where / f"{name}{at}") for at in range(len(cases))]
            for name, cases in (("overheads", OVERHEADS), ("often", OFTEN))
        }
    results = occasion | {"machine": facts, "versions": machine.versions()} | found
    (options.out / "cadence.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (options.out / "cadence.txt").write_text(text(results) + "\n")
    print(text(results))
    return 0


def _measure(name: str, at: int, options: argparse.Namespace, directory: Path) -> Any:
    case = {"overheads": OVERHEADS, "often": OFTEN}[name][at]
    print(case.title, file=sys.stderr, flush=True)
    seconds = options.seconds * (2 if case.changes else 1) / (1 if name == "overheads" else 3)
    return train(case, seconds, options.width, directory)


def _parse(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cadence", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/performance"), help="where results go")
    parser.add_argument("--dir", type=Path, help="data is written to a temporary directory in it, then removed")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each run; default: %(default)s")
    parser.add_argument("--width", type=int, default=256, help="of each layer; default: %(default)s")
    return parser.parse_args(given)


def text(results: Mapping[str, Any]) -> str:
    """Everything that was measured, for a terminal."""
    lines = [*report.occasion(results), ""]
    lines += [report.section(f"overhead: the share that saving costs, after {SETTLED} saves")]
    lines += report.table(list(_OVERHEAD), _overhead_rows(results))
    lines += [
        "",
        report.section("as often as possible: what a call of save waits, and steps between durable saves"),
    ]
    return "\n".join([*lines, *report.table(list(_OFTEN), _often_rows(results))])


_OVERHEAD = ("", "asked for", "step, ms", "saves", "seconds between saves", "share ± its error", "of it blocked")
_OFTEN = ("", "step, ms", "saves", "a save waits, ms", "the longest, ms", "steps between", "at most")


def _overhead_rows(results: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for each in results["overheads"]:
        names = [""] if len(each["phases"]) == 1 else [": before", ": after"]
        for name, phase in zip(names, each["phases"], strict=True):
            known = phase["share"] is not None
            figures = (phase["interval_s"], phase["share"], phase["blocked"]) if known else ()
            spelled = (
                [f"{figures[0]:.3g}", _spelled(phase["share"], phase["error"]), f"{figures[2]:.2%}"]
                if figures
                else ["-"] * 3
            )
            rows.append(
                [
                    each["title"] + name,
                    f"{each['asked']:.0%}",
                    f"{1e3 * each['step_s']:.3g}",
                    str(phase["saves"]),
                    *spelled,
                ]
            )
    return rows


def _spelled(share: float, error: float) -> str:
    """A share and its error. Saving makes no run faster: if the share is below zero by more than its error, then
    the few steps without a save beside them are not like the others, and the share cannot be measured."""
    return "not measurable" if share < -error else f"{share:.1%} ± {error:.1%}"


def _often_rows(results: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            each["title"], f"{1e3 * each['step_s']:.3g}", str(each["saves"]), f"{1e3 * each['wait_s']:.3g}",
            f"{1e3 * each['longest_wait_s']:.3g}", f"{each['steps_between'] or 0:g}",
            f"{each['most_steps_between'] or 0:g}",
        ]
        for each in results["often"]
    ]  # fmt: skip


def markdown(results: Mapping[str, Any]) -> dict[str, str]:
    """The tables of docs/cadence.md, by name."""
    return {
        "OVERHEAD": "\n".join(f"| {' | '.join(row)} |" for row in _overhead_rows(results)),
        "OFTEN": "\n".join(f"| {' | '.join(row)} |" for row in _often_rows(results)),
    }


if __name__ == "__main__":
    sys.exit(main())
