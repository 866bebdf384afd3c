"""A month of a job of 1,024 hosts, in a simulation, under several save policies: `python -m benchmarks.month`.

The policies are those of `ckptmgr` themselves, asked at every step on a simulated clock. Failures come at random
(a Poisson process) with published rates; every policy meets the same ones. After a failure the run starts again
from its newest durable step. What is compared is the share of the month that trains: steps that were never done
again, times what a step takes alone.

Sources:
  Grattafiori et al. 2024, "The Llama 3 Herd of Models", arXiv:2407.21783, section 3.3.4: 419 unexpected
    interruptions in 54 days on 16,384 GPUs.
  Kokolis et al. 2024, "Revisiting Reliability in Large-Scale Machine Learning Research Clusters",
    arXiv:2410.21680: 6.50 failures in 1,000 node-days (RSC-1, nodes of 8 GPUs).
  Young 1974, "A first order approximation to the optimum checkpoint interval", Comm. ACM 17(9).
  Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ckptmgr
from benchmarks import machine, report
from ckptmgr import policies
from ckptmgr.costs import Costs, Saving

DAY_S = 86_400.0
HOSTS, GPUS_OF_HOST = 1_024, 8
RATES = {
    "Llama 3": 419 / 54 / 16_384 * HOSTS * GPUS_OF_HOST / DAY_S,
    "RSC-1": 6.50 / 1_000 * HOSTS / DAY_S,
}
"""Failures of the whole job in a second."""
FIXED_S = (120, 300, 600, 1_200, 1_800, 3_600, 7_200)
SHARES = (0.005, 0.01, 0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A job: what its steps, its saves and its restarts take, in seconds."""

    step_s: float = 15.0
    noise: float = 0.02
    """The standard deviation of a step, as a share of it."""
    blocked_s: float = 2.0
    write_s: float = 60.0
    slowing: float = 1.05
    """Steps beside a save take so many times as long."""
    restart_s: float = 600.0
    """From a failure until the run trains again."""
    slow: tuple[float, float, float] = (0.0, 0.0, 1.0)
    """From a day to another the disk takes so many times as long."""

    def disk(self, now: float) -> float:
        since, until, times = self.slow
        return times if since * DAY_S <= now < until * DAY_S else 1.0

    @property
    def cost_s(self) -> float:
        """What one save costs on the disk as it mostly is."""
        return self.blocked_s + self.write_s * (1 - 1 / self.slowing)


JOBS = {"steady": Job(), "slow for ten days": Job(slow=(10, 20, 8))}


def young_s(cost_s: float, mtbf_s: float) -> float:
    """The interval of Young 1974: the square root of twice the cost of a save times the time between failures."""
    return math.sqrt(2 * cost_s * mtbf_s)


def daly_s(cost_s: float, mtbf_s: float) -> float:
    """The interval of Daly 2006; the time between failures, if a save costs twice as much."""
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    part = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(part) / 3 + part / 9) - cost_s


def compared(cost_s: float, mtbf_s: float) -> dict[str, policies.SavePolicy]:
    """The policies, by the names that the tables give them."""
    found: dict[str, policies.SavePolicy] = {f"every {each:,} s": ckptmgr.every_seconds(each) for each in FIXED_S}
    for name, seconds in (("Young", young_s(cost_s, mtbf_s)), ("Daly", daly_s(cost_s, mtbf_s))):
        found[f"{name}: every {seconds:,.0f} s"] = ckptmgr.every_seconds(seconds)
    found |= {f"overhead({each})": ckptmgr.overhead(each) for each in SHARES}
    return found | {"as_often_as_possible": ckptmgr.as_often_as_possible()}


# ---------------------------------------------------------------- one month


@dataclasses.dataclass(frozen=True)
class _Last:
    step: int
    time: float
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Month:
    """A month of one job, step by step."""

    job: Job
    policy: policies.SavePolicy
    failures: Iterator[float]
    seed: int
    now: float = 0.0
    step: int = 0
    saves: int = 0
    lost_s: float = 0.0
    """Work that was done again."""
    saving_s: float = 0.0
    """What saves have cost."""
    restarts: int = 0

    def __post_init__(self) -> None:
        self._dice = random.Random(self.seed)
        self._asks = policies.asks_about_saving(self.policy)
        self._durable: _Last | None = None
        self._written: tuple[_Last, float] | None = None
        self._fails = next(self.failures)
        self._begin()

    def _begin(self) -> None:
        """A new process, which knows no more than what is durable."""
        self._costs, self._last = Costs(), self._durable

    def run(self, until: float) -> dict[str, float]:
        """The shares of the month that train and that do not, and the mean time between saves."""
        while self.now < until:
            self._train()
            if self.now >= self._fails:
                self._fail()
            else:
                self._ask()
        done = self.step * self.job.step_s
        return {
            "trains": done / self.now,
            "saving": self.saving_s / self.now,
            "again": self.lost_s / self.now,
            "restarting": self.restarts * self.job.restart_s / self.now,
            "interval_s": self.now / self.saves,
            "failures": self.restarts,
        }

    def _train(self) -> None:
        alone_s = self.job.step_s * max(0.5, self._dice.gauss(1, self.job.noise))
        ends = self._written[1] if self._written else self.now
        slowed_s = min(alone_s * (self.job.slowing - 1), max(0.0, ends - self.now))
        self.now += alone_s + slowed_s
        self.saving_s += slowed_s
        self.step += 1
        if self._written and self.now >= ends:
            self._durable = self._written[0]

    def _ask(self) -> None:
        saving = None
        if self._asks:
            ends = self._written[1] if self._written else -math.inf
            self._costs = self._costs.called(self.step, self.now, ends if ends <= self.now else None)
            saving = Saving(in_progress=ends > self.now, costs=self._costs)
        if policies.is_due([self.policy], self.step, now=self.now, last=self._last, saving=saving):
            self._save()

    def _save(self) -> None:
        """The caller waits for the save before, if that is still being written."""
        began, times = self.now, self.job.disk(self.now)
        if self._written and self._written[1] > began:
            self.now, self._durable = self._written[1], self._written[0]
        self.now += self.job.blocked_s * times
        self._last = _Last(self.step, began)
        self._written = self._last, self.now + self.job.write_s * times
        self._costs = self._costs.saved(self.step, began, self.now) if self._asks else self._costs
        self.saves, self.saving_s = self.saves + 1, self.saving_s + self.now - began

    def _fail(self) -> None:
        """The step that failed is lost too. A failure during a restart begins it anew."""
        kept = self._durable.step if self._durable else 0
        self.lost_s += (self.step - kept) * self.job.step_s
        self.step, self._written = kept, None
        while self._fails <= self.now:
            self.now = max(self.now, self._fails) + self.job.restart_s
            self.restarts += 1
            self._fails = next(each for each in self.failures if each > self.now - self.job.restart_s)
        self._begin()


def failing(rate: float, seed: int) -> Iterator[float]:
    """The times of failures, without end."""
    dice, now = random.Random(seed), 0.0
    while True:
        now += dice.expovariate(rate)
        yield now


# ---------------------------------------------------------------- the command


def simulate(days: float, seeds: int) -> dict[str, Any]:
    """For each job and each rate of failures every policy, medians over the seeds."""
    found: dict[str, Any] = {}
    for name, job in JOBS.items():
        for source, rate in RATES.items():
            print(f"{name}, {source}", file=sys.stderr, flush=True)
            found[f"{name}, {source}"] = {
                "mtbf_s": 1 / rate,
                "policies": {
                    words: _medians([_month(job, each, rate, days, seed) for seed in range(seeds)])
                    for words, each in compared(job.cost_s, 1 / rate).items()
                },
            }
    return found


def _month(job: Job, policy: policies.SavePolicy, rate: float, days: float, seed: int) -> dict[str, float]:
    return Month(job, policy, failing(rate, seed), seed).run(days * DAY_S)


def _medians(months: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in months) for name in months[0]}


def main(arguments: list[str] | None = None) -> int:
    """Simulates, writes, draws and prints."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parse(given)
    options.out.mkdir(parents=True, exist_ok=True)
    results = machine.occasion(given, "benchmarks.month") | {"days": options.days, "seeds": options.seeds}
    results["job"] = {name: dataclasses.asdict(job) for name, job in JOBS.items()}
    results["months"] = simulate(options.days, options.seeds)
    (options.out / "month.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (options.out / "month.txt").write_text(text(results) + "\n")
    print(text(results))
    if options.plots:
        from benchmarks import plots

        plots.draw_month(results, options.out / "month")
    return 0


def _parse(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.month", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/performance"), help="where results and plot go")
    parser.add_argument("--days", type=float, default=30.0, help="of each simulation; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="simulations of each policy; default: %(default)s")
    parser.add_argument("--no-plots", dest="plots", action="store_false")
    options = parser.parse_args(given)
    if options.plots and machine.is_missing("matplotlib"):
        parser.error("the plot needs matplotlib: pip install 'ckptmgr[bench]', or give --no-plots")
    return options


_HEAD = ("", "trains", "saving", "done again", "restarting", "seconds between saves")


def text(results: Mapping[str, Any]) -> str:
    """A table for each job and each rate of failures."""
    lines = [f"{results['command']}   {results['date']}   commit {results['commit'][:10]}"]
    for name, month in results["months"].items():
        hours = month["mtbf_s"] / 3600
        lines += ["", report.section(f"{name}: a failure every {hours:.2g} h"), *report.table(_HEAD, _rows(month))]
    return "\n".join([*lines, "", f"medians of {results['seeds']} simulations of {results['days']:g} days"])


def _rows(month: Mapping[str, Any]) -> list[list[str]]:
    return [
        [words, *(f"{each[what]:.2%}" for what in ("trains", "saving", "again", "restarting")),
         f"{each['interval_s']:,.0f}"]
        for words, each in month["policies"].items()
    ]  # fmt: skip


def markdown(results: Mapping[str, Any]) -> dict[str, str]:
    """The tables of docs/month.md, by name."""
    return {
        name: "\n".join(f"| {' | '.join(row)} |" for row in _rows(month))
        for name, month in results["months"].items()
    }


if __name__ == "__main__":
    sys.exit(main())
