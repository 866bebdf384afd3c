"""The benchmark of local saves: the simulated day against formulas, real failures, and the command."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SOAK

from benchmarks import local, local_day, month
from benchmarks.local_day import DURABLE_EVERY, LOCAL, STEP_S, STORAGES, Tier

ROOT = Path(__file__).parents[1]
PERFORMANCE = ROOT / "docs" / "performance"
FREE = {"blocked_s": 0.0, "write_s": 0.0, "slowing": 1.0, "restart_s": 0.0}
[DURABLE, SLOW] = STORAGES.values()


# ---------------------------------------------------------------- the simulated day


@pytest.mark.parametrize("tiers", [[DURABLE], [SLOW], [LOCAL, SLOW]], ids=("durable", "slow", "local"))
def test_without_failures_the_day_pays_for_its_saves_and_for_nothing_else(tiers):
    found = local_day.day(tiers, [])
    train_s = STEP_S + sum(each.cost_s / each.every for each in tiers)
    assert found["lost"] == found["failures"] == found["again"] == found["restarting"] == 0
    assert found["trains"] == pytest.approx(STEP_S / train_s, abs=0.001)


@pytest.mark.parametrize("rate", month.RATES.values(), ids=month.RATES)
@pytest.mark.parametrize("every", [20, 60])
def test_a_failure_loses_half_an_interval_and_what_is_being_written(every, rate):
    """Of the step that is cut off only the time is counted; a failure during a restart loses nothing."""
    tier = dataclasses.replace(DURABLE, every=every)
    runs = [
        local_day.day([tier], month.failing(rate, seed), seed=seed, until_s=20 * month.DAY_S) for seed in range(5)
    ]
    lost = sum(each["lost"] for each in runs) / sum(each["failures"] for each in runs)
    alone = math.exp(-rate * tier.restart_s)
    assert lost == pytest.approx((every / 2 + tier.write_s / STEP_S - 0.5) * alone, rel=0.1)
    for each in runs:
        restarting_s = each["failures"] * tier.restart_s
        assert each["restarting"] == pytest.approx(restarting_s / (20 * month.DAY_S), rel=0.05)


def test_every_second_of_a_day_has_one_place():
    for durable, rate, seed in itertools.product(STORAGES.values(), month.RATES.values(), range(2)):
        for tiers in local_day.policies(durable, 1 / rate).values():
            found = local_day.day(tiers, month.failing(rate, seed), seed=seed)
            parts = [found[name] for name in ("trains", "saving", "again", "restarting")]
            assert sum(parts) == pytest.approx(1, abs=1e-9)


def test_a_failure_goes_back_to_the_newest_step_that_was_whole():
    """Steps of 1 s; local saves every 2 take 1.5 s, durable ones every 10 take 4 s."""
    tiers = [Tier(every=2, **FREE | {"write_s": 1.5}), Tier(every=10, **FREE | {"write_s": 4, "restart_s": 9})]

    def lost(*failures, lost=0.0):
        here = [dataclasses.replace(tiers[0], lost=lost), tiers[1]]
        return local_day.day(here, failures, step_s=1.0, until_s=100)["lost"]

    assert [lost(each) for each in (1.2, 3.4, 3.6, 5.2, 5.6)] == [1, 3, 1, 3, 1]
    assert [lost(each, lost=1.0) for each in (5.6, 13.5, 14.5, 27.5)] == [5, 13, 4, 7]
    assert lost(5.6, 7.7) == 1 + 2  # back to 4 each time: the save of step 6 is not over yet
    only = local_day.day(tiers[1:], [15.0], step_s=1.0, until_s=30)
    assert (only["lost"], only["steps"], only["failures"]) == (5, 16, 1)
    assert only["restarting"] == 9 / 30


def test_a_failure_during_a_restart_begins_it_anew():
    tier = Tier(every=1, **FREE | {"restart_s": 10})
    found = local_day.day([tier], [5.0, 9.0], step_s=1.0, until_s=25)
    assert (found["failures"], found["steps"], found["restarting"]) == (2, 11, 14 / 25)


def test_local_saves_that_cost_nothing_and_never_help_change_nothing():
    useless = Tier(every=20, **FREE | {"lost": 1.0, "restart_s": DURABLE.restart_s})
    for seed in range(5):
        one, other = (
            local_day.day(tiers, month.failing(month.RATES["RSC-1"], seed), seed=seed)
            for tiers in ([DURABLE], [useless, DURABLE])
        )
        assert one == other


def test_the_scaled_failures_are_as_many_for_each_step():
    plans = [local_day.plan(0.01, 6_000, seed) for seed in range(200)]
    assert {round(sum(each.uptimes), 6) for each in plans} == {6_000}
    steps = sum(sum(each.uptimes) for each in plans)
    failures = sum(len(each.victims) for each in plans)
    assert failures / steps == pytest.approx(month.RATES["RSC-1"] * STEP_S, rel=0.1)


# ---------------------------------------------------------------- real processes


@pytest.mark.xdist_group("benchmarks")
def test_of_a_killed_process_and_its_directory_less_is_lost_with_local_saves(tmp_path):
    plan = local_day.Plan(step_s=0.01, uptimes=[150.5, 0.0], victims=[2])
    found = local_day.real(plan, tmp_path / "runs", tmp_path / "machines")
    assert found["local"]["failures"] == found["durable"]["failures"] == 1
    assert found["local"]["lost"] < found["durable"]["lost"] < DURABLE_EVERY
    assert found["durable"]["lost"] == found["durable"]["trained"]  # nothing durable yet
    assert found["local"]["times_s"]["local"] > 0
    assert {path.name for path in (tmp_path / "machines" / "local").iterdir()} == set("0123")  # 2 came back


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="20 seconds of measuring")
@pytest.mark.xdist_group("benchmarks")
def test_the_command_measures_what_local_saves_cost(tmp_path):
    command = [sys.executable, "-m", "benchmarks.local", "--width=32", "--rounds=1", "--days=1", "--steps=3",
               "--out", tmp_path]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "local.txt").read_text().strip() == done.stdout.strip()
    results = json.loads((tmp_path / "local.json").read_text())
    cost = results["cost"]
    assert cost["sent"] == pytest.approx(1, abs=0.05)  # with the heads of the answers, beside small files
    assert cost["held"] == pytest.approx(4, abs=0.1)  # own part and the neighbour's, of two steps
    assert set(cost["variants"]) == set(local.VARIANTS)
    for name, each in cost["variants"].items():
        assert all(math.isfinite(number) for number in each.values())
        assert (each["blocked_s"] > 0) == (each["durable_s"] > 0) == (name != "without")
    assert set(results["real"]) == {"durable", "local"}


# ---------------------------------------------------------------- the kept results


def test_the_tables_of_the_page_are_those_of_the_results():
    page = (ROOT / "docs" / "local.md").read_text()
    results = json.loads((PERFORMANCE / "local.json").read_text())
    for table in local.markdown(results).values():
        assert table in page
    assert (PERFORMANCE / "local.txt").read_text().strip() == local.text(results).strip()


def test_in_the_kept_run_each_part_is_sent_once_and_less_is_done_again():
    results = json.loads((PERFORMANCE / "local.json").read_text())
    assert results["cost"]["sent"] == pytest.approx(1, abs=0.01)
    assert results["real"]["local"]["lost"] < results["real"]["durable"]["lost"] / 3
