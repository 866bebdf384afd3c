"""The benchmarks of how often to save: the simulated month against formulas, and the loop from end to end."""

import dataclasses
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SOAK

import ckptmgr
from benchmarks import cadence, month

ROOT = Path(__file__).parents[1]
PERFORMANCE = ROOT / "docs" / "performance"


def test_the_interval_of_daly_is_that_of_the_paper():
    """Daly 2006, captions of figures 3, 4 and 5; minutes."""
    assert round(month.daly_s(5, 24 * 60)) == 117
    assert round(month.daly_s(5, 6 * 60)) == 57
    assert round(month.daly_s(5, 15), 1) == 9.1
    assert month.daly_s(40, 15) == 15
    assert month.young_s(5, 24 * 60) == 120


def test_the_rates_are_those_of_the_papers():
    assert 1 / (month.RATES["Llama 3"] * 2) == pytest.approx(54 * 86_400 / 419)  # 16,384 GPUs: twice as many
    assert 1 / (month.RATES["RSC-1"] * 2) / 3600 == pytest.approx(
        1.8, abs=0.05
    )  # as the paper says of 2,048 nodes


def test_every_second_of_a_month_has_one_place():
    for policy in (ckptmgr.every_seconds(600), ckptmgr.overhead(0.02), ckptmgr.as_often_as_possible()):
        job = month.Job(noise=0.0)
        found = month.Month(job, policy, month.failing(month.RATES["RSC-1"], 1), 1).run(5 * month.DAY_S)
        parts = [found[name] for name in ("trains", "saving", "again", "restarting")]
        assert sum(parts) == pytest.approx(1, abs=0.005)
        assert found["failures"] > 10


@pytest.mark.parametrize("interval_s", [600, 3600])
def test_a_fixed_interval_loses_what_the_first_order_formula_says(interval_s):
    """Young 1974: a failure loses half an interval; here also what is being written, and the step that failed."""
    job, rate = month.Job(noise=0.0), month.RATES["RSC-1"]
    months = [
        month.Month(job, ckptmgr.every_seconds(interval_s), month.failing(rate, seed), seed).run(15 * month.DAY_S)
        for seed in range(6)
    ]
    saving = statistics.fmean(each["saving"] for each in months)
    again = statistics.fmean(each["again"] for each in months)
    assert saving == pytest.approx(job.cost_s / interval_s, rel=0.1)
    assert again == pytest.approx(rate * (interval_s / 2 + job.write_s + job.step_s), rel=0.25)


def test_without_failures_overhead_costs_its_share_on_a_disk_that_changes_too():
    for job, share in itertools.product((month.Job(), month.Job(slow=(1, 2, 8))), (0.005, 0.02)):
        found = month.Month(job, ckptmgr.overhead(share), itertools.repeat(math.inf), 0).run(4 * month.DAY_S)
        assert found["saving"] == pytest.approx(share, rel=1 / 3)
        assert found["again"] == 0


def test_a_failure_goes_back_to_what_was_durable():
    """It saves at steps 10, 20, ...; the save of step 10 is durable at 162 s, before the failure at 170 s."""
    job = month.Job(noise=0.0, slowing=1.0, blocked_s=2, write_s=10, restart_s=100)
    found = month.Month(job, ckptmgr.every_steps(10), iter([170.0, math.inf]), 0)
    found.run(300)
    assert (found.lost_s, found.restarts) == (2 * job.step_s, 1)  # steps 11 and 12, whose end came after it
    never = month.Month(dataclasses.replace(job, write_s=100), ckptmgr.every_steps(10), iter([170.0, math.inf]), 0)
    never.run(300)
    assert never.lost_s == 12 * job.step_s or never.lost_s == 11 * job.step_s


def run(module, *options):
    command = [sys.executable, "-m", module, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.xdist_group("benchmarks")
def test_the_month_is_simulated_and_drawn(tmp_path):
    said = run("benchmarks.month", "--days=0.3", "--seeds=1", "--out", tmp_path)
    results = json.loads((tmp_path / "month.json").read_text())
    assert len(results["months"]) == len(month.JOBS) * len(month.RATES)
    for each in results["months"].values():
        assert {"overhead(0.01)", "as_often_as_possible", "every 600 s"} <= set(each["policies"])
        assert all(0 < found["trains"] < 1 for found in each["policies"].values())
    assert (tmp_path / "month.txt").read_text().strip() == said.strip()
    assert (tmp_path / "month.png").stat().st_size > 1000


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="20 seconds of measuring")
@pytest.mark.xdist_group("benchmarks")
def test_the_loop_is_measured(tmp_path):
    said = run("benchmarks.cadence", "--seconds=2", "--width=64", "--out", tmp_path)
    results = json.loads((tmp_path / "cadence.json").read_text())
    assert all(each["saves"] >= 1 for each in results["overheads"] + results["often"])
    assert (tmp_path / "cadence.txt").read_text().strip() == said.strip()


def test_the_loop_is_measured_from_when_it_is_compiled(tmp_path, monkeypatch):
    real, calls = cadence._train_step, []

    def slow_at_first(state):
        calls.append(state)
        time.sleep(0.5 if len(calls) == 1 else 0)
        return real(state)

    monkeypatch.setattr(cadence, "_train_step", slow_at_first)
    case = cadence.Case("slow", ckptmgr.every_steps(1))
    assert cadence.train(case, 0.3, 8, tmp_path)["saves"] >= 1


def test_the_share_that_the_loop_measures_is_that_of_the_times():
    """100 steps of 1 s, of which every tenth is saved for 0.1 s, and the one after it takes 1.5 s."""
    steps, now = [], 0.0
    for at in range(1, 301):
        beside = at % 10 == 1 and at > 1
        trained = now + (1.5 if beside else 1.0)
        saved = at % 10 == 0
        returned = trained + 0.1 * saved
        steps.append(cadence.Step(now, trained, returned, saved, beside))
        now = returned
    found = cadence._phase(steps, 0, math.inf)
    assert found["interval_s"] == pytest.approx(10.6)
    assert found["share"] == pytest.approx(0.6 / 10.6)
    assert found["blocked"] == pytest.approx(0.1 / 10.6)


@pytest.mark.parametrize("module", [cadence, month], ids=["cadence", "month"])
def test_the_tables_of_the_page_are_those_of_the_results(module):
    name = module.__name__.rpartition(".")[2]
    results = json.loads((PERFORMANCE / f"{name}.json").read_text())
    page = (ROOT / "docs" / f"{name}.md").read_text()
    for table in module.markdown(results).values():
        assert table in page
    assert (PERFORMANCE / f"{name}.txt").read_text().rstrip() == module.text(results).rstrip()


def test_a_share_that_says_that_saving_makes_a_run_faster_is_not_shown():
    assert cadence._spelled(-0.135, 0.027) == "not measurable"
    assert cadence._spelled(-0.001, 0.002) == "-0.1% ± 0.2%"
    assert cadence._spelled(0.02, 0.002) == "2.0% ± 0.2%"
    results = json.loads((PERFORMANCE / "cadence.json").read_text())
    phases = {each["title"]: each["phases"] for each in results["overheads"]}
    shown = {
        name: [cadence._spelled(each["share"], each["error"]) for each in found] for name, found in phases.items()
    }
    assert [name for name, found in shown.items() if "not measurable" in found] == ["slowed by 0.5 s"]


def test_in_the_kept_run_the_share_is_within_a_third_where_save_waits_and_no_call_waits_for_the_save_before():
    results = json.loads((PERFORMANCE / "cadence.json").read_text())
    exact = [each for each in results["overheads"] if "synchronous" in each["title"]]  # the others: see the page
    assert len(exact) >= 2
    for each in exact:
        for phase in each["phases"]:
            assert phase["share"] == pytest.approx(each["asked"], rel=1 / 3)
    often = {each["title"]: each for each in results["often"]}
    assert often["as_often_as_possible, slowed by 1 s"]["longest_wait_s"] < 0.5
    assert often["every 20 steps, slowed by 1 s"]["longest_wait_s"] > 0.5
