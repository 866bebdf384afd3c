"""A day of a job that loses machines, with local saves (`local=`) and without: simulated, and with real processes.

In the simulation a job trains in steps of equal length. It saves every so many steps in one or two tiers: on the
machines of the job (local), and in a place that all of them reach (durable). Failures come at random (a Poisson
process) with published rates, see `benchmarks.month`. After a failure the run starts again from the newest step
that is left.

In reality four processes train. One of them is killed (SIGKILL) at random moments, its local directory is removed,
and all start again. The failures are the same with local saves and without. A step takes 15 s in the simulated
job and a few ms here; failures come after as many steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ckptmgr
from benchmarks import distributed, fresh, month

PROCESSES = 4
LOCAL_EVERY, DURABLE_EVERY = 20, 1_000
_NEVER = 10**9

# ---------------------------------------------------------------- the simulation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tier:
    """A place for saves, and what it costs; seconds."""

    every: int
    """Saves every so many steps."""
    blocked_s: float = month.Job.blocked_s
    write_s: float = month.Job.write_s
    slowing: float = month.Job.slowing
    """Steps beside a save take so many times as long."""
    restart_s: float = month.Job.restart_s
    """From a failure until the run trains again, if it restores from here."""
    lost: float = 0.0
    """The share of the failures after which no step is left here: two neighbours are gone, or all."""

    @property
    def cost_s(self) -> float:
        """What one save costs."""
        return self.blocked_s + self.write_s * (1 - 1 / self.slowing)


STEP_S = month.Job.step_s
STORAGES = {
    "a save takes 1 min": Tier(every=DURABLE_EVERY),
    "a save takes 10 min": Tier(every=DURABLE_EVERY, write_s=600.0, restart_s=1_200.0),
}
"""What is durable: as in `benchmarks.month`, and slower."""
LOCAL = Tier(every=LOCAL_EVERY, write_s=15.0, restart_s=490.0)
"""Assumed: a restart takes 480 s and what reading takes; that is 10 s, and 120 s or 720 s of what is durable."""
LOST = 0.05


def day(
    tiers: Sequence[Tier],
    failures: Iterable[float],
    *,
    step_s: float = STEP_S,
    until_s: float = month.DAY_S,
    seed: int = 0,
) -> dict[str, float]:
    """Trains until `until_s`: the steps that were done again, and the shares of the time by what it went to.

    Of a step that is not whole when a failure comes only the time is counted.
    """
    dice, failing = random.Random(seed), iter(failures)
    fails = next(failing, math.inf)
    now, step, failed, lost = 0.0, 0, 0, 0
    spent = dict.fromkeys(("saving", "again", "restarting"), 0.0)
    kept = [0] * len(tiers)
    written = [(0, 0.0)] * len(tiers)
    """Of each tier the step that it keeps, and the one that is being written, and until when."""

    def settle(until: float) -> None:
        for at, (saved, ends) in enumerate(written):
            kept[at] = saved if ends <= until else kept[at]

    while now < until_s:
        beside = [tier.slowing for tier, (_, ends) in zip(tiers, written, strict=True) if ends > now]
        began, worked_s = now, 0.0
        now += step_s * max(beside, default=1.0)
        if now <= fails:
            step, worked_s = step + 1, step_s
            for at, tier in enumerate(tiers):
                if step % tier.every == 0:
                    now = max(now, written[at][1]) + tier.blocked_s
                    settle(min(now, fails))
                    written[at] = step, now + tier.write_s
        settle(min(now, fails))
        if now <= fails:
            spent["saving"] += now - began - worked_s
            continue
        left = [kept[at] if dice.random() >= tier.lost else 0 for at, tier in enumerate(tiers)]
        best = max(range(len(tiers)), key=lambda at: (left[at], -tiers[at].restart_s))
        failed, lost = failed + 1, lost + step - left[best]
        spent["again"] += fails - began - worked_s
        step, kept = left[best], left
        broke, now = fails, fails + tiers[best].restart_s
        while (fails := next(failing, math.inf)) <= now:  # a failure during a restart begins it anew
            failed, now = failed + 1, fails + tiers[best].restart_s
        spent["restarting"] += now - broke
        written = [(each, broke) for each in left]
    spent["again"] += lost * step_s
    shares = {name: seconds / now for name, seconds in spent.items()}
    return {"failures": failed, "lost": lost, "steps": step, "trains": step * step_s / now} | shares


def policies(durable: Tier, mtbf_s: float) -> dict[str, list[Tier]]:
    """What is compared, by the names that the table gives it."""
    every = max(1, round(month.young_s(durable.cost_s, mtbf_s) / STEP_S))
    young = dataclasses.replace(durable, every=every)
    both = f"local every {LOCAL_EVERY}, durable every"
    return {
        f"durable every {DURABLE_EVERY:,}": [durable],
        f"durable every {every:,} (Young)": [young],
        f"{both} {DURABLE_EVERY:,}": [LOCAL, durable],
        f"the same; {LOST:.0%} of failures leave no local step": [dataclasses.replace(LOCAL, lost=LOST), durable],
        f"{both} {every:,}; {LOST:.0%} of failures likewise": [dataclasses.replace(LOCAL, lost=LOST), young],
    }


def simulate(days: int) -> dict[str, Any]:
    """For each storage and each rate of failures every policy: means over so many days."""
    found: dict[str, Any] = {}
    for storage, durable in STORAGES.items():
        for source, rate in month.RATES.items():
            found[f"{storage}, {source}"] = {
                "mtbf_s": 1 / rate,
                "policies": {
                    name: _means([day(tiers, month.failing(rate, seed), seed=seed) for seed in range(days)])
                    for name, tiers in policies(durable, 1 / rate).items()
                },
            }
    return found


def _means(days: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(each[name] for each in days) for name in days[0]}


# ---------------------------------------------------------------- real processes


class Plan(NamedTuple):
    """A day that is scaled in time."""

    step_s: float
    uptimes: Sequence[float]
    """After so many steps of each start one process is killed; after the last one the day ends."""
    victims: Sequence[int]


def plan(step_s: float, steps: int, seed: int, rate: float = month.RATES["RSC-1"]) -> Plan:
    """At random, in so many steps, as many failures as a large job has in them."""
    moments = itertools.takewhile(lambda moment: moment < steps, month.failing(rate * STEP_S, seed))
    edges = [0.0, *moments, float(steps)]
    dice = random.Random(seed)
    uptimes = [later - one for one, later in itertools.pairwise(edges)]
    return Plan(step_s, uptimes, [dice.randrange(PROCESSES) for _ in uptimes[1:]])


class Said(NamedTuple):
    """What process 0 has told in one life."""

    resumed: int
    done: Mapping[int, float]
    """What each step took."""
    calls_s: float
    """What all calls of save took."""
    saved_s: Mapping[str, Sequence[tuple[float, float]]]
    """Of each save of a tier what the call took, and the time from its end until all was written."""


def real(plan: Plan, folder: Path, machines: Path) -> dict[str, Any]:
    """The same failures with local saves and without, in turns; beside the simulation of the same failures."""
    lives: dict[str, list[Said]] = {"durable": [], "local": []}
    for at, uptime in enumerate(plan.uptimes):
        for name, own in lives.items():
            where = folder / name, machines / name
            victim = plan.victims[at] if at < len(plan.victims) else None
            own.append(_live(*where, name == "local", plan.step_s, uptime, at, victim))
    return {name: _compared(own, is_local=name == "local") for name, own in lives.items()}


def _live(
    run: Path, machines: Path, is_local: bool, step_s: float, uptime: float, at: int, victim: int | None
) -> Said:
    """One start of the run, until one process of it is killed, and then all."""
    run.mkdir(parents=True, exist_ok=True)
    address, said = distributed.free_address(), [run / f"said-{at}-{rank}" for rank in range(PROCESSES)]
    job = [
        fresh.Running(
            distributed.as_one_of,
            (address, PROCESSES, rank, _train, (run / "steps", machines, is_local, step_s, said[rank])),
            quiet=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        _wait_for(job, said, int(uptime))
        time.sleep(uptime % 1 * step_s)
        if victim is not None:
            job[victim].stop(0)
    finally:
        for each in job:
            each.stop(0)
    if victim is not None:
        shutil.rmtree(machines / str(victim), ignore_errors=True)
    return _heard(said[0].read_text())


def _wait_for(job: Sequence[fresh.Running], said: Sequence[Path], steps: int, timeout_s: float = 600) -> None:
    """Waits until all train, and the first has done so many steps."""
    ends = time.monotonic() + timeout_s
    while not all(path.exists() and "resumed" in path.read_text() for path in said) or (
        said[0].read_text().count("done ") < steps
    ):
        for each in job:
            if each.answer.poll():
                each.result(0)  # raises: a process of the run does not end by itself
        if time.monotonic() > ends:
            raise fresh.FailedError(f"the run did not do {steps} steps in {timeout_s:.0f} s")
        time.sleep(0.005)


def _train(run: Path, machines: Path, is_local: bool, step_s: float, said: Path) -> None:
    """One process of the run: trains until it is killed."""
    options: dict[str, Any] = {"save_every": DURABLE_EVERY, "keep": 2, "timeout_s": 60}
    if is_local:
        options |= {"local": machines / str(jax.process_index()), "local_every": LOCAL_EVERY}
    with open(said, "w", buffering=1) as out, ckptmgr.CheckpointManager(run, **options) as manager:
        found = manager.restore_or(params=_start())
        state, step, saves = found.params, found.step, list[Any]()
        jax.block_until_ready(_train_step(state))  # compiles
        out.write(f"resumed {step}\n")
        for _ in itertools.count():
            began = time.perf_counter()
            state, step = jax.block_until_ready(_train_step(state)), step + 1
            time.sleep(max(0.0, began + step_s - time.perf_counter()))
            out.write(f"done {step} {time.perf_counter() - began}\n")
            called = time.perf_counter()
            if result := manager.save(step, state):
                tier = "durable" if step % DURABLE_EVERY == 0 else "local"
                saves.append((tier, time.perf_counter() - called, result))
                out.write(f"called {step} {saves[-1][1]}\n")
            while saves and saves[0][2].done():
                tier, blocked_s, save = saves.pop(0)
                out.write(f"{tier} {blocked_s} {save.result().durable_s - blocked_s}\n")


def _start() -> Any:
    spread = NamedSharding(Mesh(np.array(jax.devices()), ("shard",)), PartitionSpec("shard"))
    return jax.jit(lambda: {f"w{n}": jnp.zeros((64, 64)) for n in range(4)}, out_shardings=spread)()


@jax.jit
def _train_step(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """All processes need the sum of all parts, so none is ahead of the others."""
    return jax.tree.map(lambda w: w + 1 + jnp.sum(w) * 0, state)


def _heard(text: str) -> Said:
    lines = [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]
    [(_, resumed), *others] = lines
    saved: dict[str, list[tuple[float, float]]] = {"local": [], "durable": []}
    for word, one, other in others:
        if word in saved:
            saved[word].append((float(one), float(other)))
    done = {int(step): float(seconds) for word, step, seconds in others if word == "done"}
    calls_s = sum(float(seconds) for word, _, seconds in others if word == "called")
    return Said(int(resumed), done, calls_s, saved)


def _compared(lives: Sequence[Said], *, is_local: bool) -> dict[str, Any]:
    """What was done again in reality, and in a simulation with the times that were measured here.

    A call waits for the save before; the simulation knows that by itself, so it is given the shortest call. Each
    start has a pace of its own, on a machine that does other work: the simulation is given as many steps in it.
    """
    reached = [max(each.done, default=each.resumed) for each in lives]
    lost = [end - later.resumed for end, later in zip(reached, lives[1:], strict=False)]
    saved = {name: [times for each in lives for times in each.saved_s[name]] for name in lives[0].saved_s}
    blocked = {name: min((each for each, _ in times), default=0.0) for name, times in saved.items()}
    written = {name: statistics.median([each for _, each in times] or [0.0]) for name, times in saved.items()}
    everies = {"durable": DURABLE_EVERY} | ({"local": LOCAL_EVERY} if is_local else {})
    tiers = [
        Tier(every=every, blocked_s=blocked[name], write_s=written[name], slowing=1.0, restart_s=0.0)
        for name, every in everies.items()
    ]
    step_s = statistics.fmean(seconds for each in lives for seconds in each.done.values())
    took_s = [
        (sum(each.done.values()) + each.calls_s) * step_s / statistics.fmean(each.done.values() or [step_s])
        for each in lives
    ]
    ends = [*itertools.accumulate(took_s)]
    same = day(tiers, ends[:-1], step_s=step_s, until_s=ends[-1])
    return {
        "failures": len(lost),
        "trained": sum(len(each.done) for each in lives),
        "lost": sum(lost),
        "lost_each": lost,
        "simulated_trained": same["lost"] + same["steps"],
        "simulated_lost": same["lost"],
        "step_s": step_s,
        "times_s": {name: blocked[name] + written[name] for name in saved},
    }
