"""The two policies that go by what saving costs, on simulated disks, against costs that the simulation knows."""

import dataclasses
import itertools
import math
import random

import pytest
from conftest import counted
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckptmgr import Costs, Saving, as_often_as_possible, overhead
from ckptmgr.policies import is_due


@dataclasses.dataclass
class Disk:
    """A save blocks the caller for `blocked_s`; for `write_s` after it each step takes `slowing` times as long."""

    blocked_s: float = 0.05
    write_s: float = 2.0
    slowing: float = 1.2
    step_s: float = 0.1
    noise: float = 0.0
    stall_s: float = 0.0
    """The first step beside a save takes so much longer."""
    hiccup: float = 0.0
    """With this probability a step takes 20 times as long, whatever is saved."""

    def at(self, now):
        return self


@dataclasses.dataclass
class Changing(Disk):
    """From a moment on another disk."""

    after: float = math.inf
    then: Disk = None

    def at(self, now):
        return self.then if now >= self.after else self


@dataclasses.dataclass
class Run:
    """What has happened in a simulated run."""

    saves: list = dataclasses.field(default_factory=list)
    """For each save: when it began, and what it has really cost."""
    costs: Costs = dataclasses.field(default_factory=Costs)
    overlapped: int = 0

    def share(self, since, until):
        """What the saves that began in this time have cost, divided by it."""
        return sum(cost for began, cost in self.saves if since <= began < until) / (until - since)

    def count(self, since, until):
        return sum(since <= began < until for began, _ in self.saves)


def simulate(policy, disk, seconds, *, seed=0, pause=(math.inf, 0.0), forced=()):
    """A training loop that asks at every step, on a clock of its own. `pause`: every so many steps, so long."""
    dice, run = random.Random(seed), Run()
    now, step, ends, last = 1000.0, 0, -math.inf, None
    start, costs, is_first = now, Costs(), False
    while now < start + seconds:
        this = disk.at(now - start)
        step += 1
        alone_s = this.step_s * max(0.1, dice.gauss(1, this.noise))
        alone_s *= 20 if dice.random() < this.hiccup else 1
        slowed_s = min(alone_s * (this.slowing - 1), max(0.0, ends - now)) + (this.stall_s if is_first else 0)
        now, is_first = now + alone_s + slowed_s, False
        if run.saves:
            run.saves[-1] = (run.saves[-1][0], run.saves[-1][1] + slowed_s)
        if step % pause[0] == 0:
            now += pause[1]
        costs = costs.called(step, now, ends if ends <= now else None)
        saving = Saving(in_progress=now < ends, costs=costs)
        if is_due([policy], step, now=now, last=last, saving=saving) or step in forced:
            run.overlapped += now < ends
            began, now = now, max(now, ends) + this.blocked_s
            run.saves.append((began - start, now - began))
            ends = now + this.write_s
            costs, is_first = costs.saved(step, began, now), True
            last = dataclasses.make_dataclass("Last", ["step", "time"])(step, began)
    run.costs = costs
    return run


disks = st.builds(
    Disk,
    blocked_s=st.floats(0.001, 1.0),
    write_s=st.floats(0.01, 30.0),
    slowing=st.floats(1.0, 3.0),
    step_s=st.floats(0.02, 2.0),
)
shares = st.sampled_from([0.01, 0.02, 0.05, 0.2])
SAVES = 10
"""After so many saves the share is what was asked for."""


STEPS = 8000


def length(disk, share, saves=50):
    """Long enough for so many saves, and not for too many steps."""
    each_s = max((disk.blocked_s + disk.write_s * (disk.slowing - 1)) / share, disk.write_s + 3 * disk.step_s)
    return min(saves * each_s, STEPS * disk.step_s)


def settled(run):
    """When the first saves are over, and when the last began."""
    return run.saves[SAVES][0], run.saves[-1][0]


@settings(max_examples=counted(10, full=300))
@given(disks, shares)
@example(Disk(blocked_s=0.001, write_s=30, slowing=1.0, step_s=2.0), 0.2)
@example(Disk(blocked_s=0.001, write_s=2, slowing=2.0, step_s=0.1), 0.05)
@example(Disk(blocked_s=0.5, write_s=0.1, slowing=1.0, step_s=0.1), 0.05)
def test_the_share_is_never_above_what_was_asked_for_and_not_far_below_if_the_disk_allows(disk, share):
    run = simulate(overhead(share), disk, length(disk, share))
    if len(run.saves) < SAVES + 5:
        return  # one save costs so much that few are made
    since, until = settled(run)
    assert run.share(since, until) <= share * 4 / 3
    cost_s = run.share(since, until) * (until - since) / run.count(since, until)
    fastest_s = disk.write_s + disk.blocked_s + 4 * disk.slowing * disk.step_s  # a save at a time, and a rest
    if cost_s / share > fastest_s:
        assert run.share(since, until) >= share * 2 / 3
    assert run.overlapped == 0


@settings(max_examples=counted(10, full=300))
@given(disks, st.integers(0, 99))
def test_noise_in_the_steps_does_not_move_the_share(disk, seed):
    disk = dataclasses.replace(disk, noise=0.1, blocked_s=max(disk.blocked_s, disk.step_s))
    share = 0.05
    run = simulate(overhead(share), disk, length(disk, share, 100), seed=seed)
    if len(run.saves) < SAVES + 30:
        return
    assert run.share(*settled(run)) <= share * 4 / 3


@pytest.mark.parametrize("hiccup", [0.0, 0.01])
@pytest.mark.soak
@pytest.mark.parametrize("stall", [3, 30, 300][: counted(2, full=3)])
def test_a_few_very_long_steps_beside_a_save_are_its_cost_also_among_hiccups_of_the_machine(stall, hiccup):
    """On a busy machine a save may stop a short step for many times its length. What is uncertain costs more."""
    disk = Disk(blocked_s=0.001, write_s=0.05, slowing=1.0, step_s=0.005, stall_s=stall * 0.005, hiccup=hiccup)
    run = simulate(overhead(0.1), disk, 600 * disk.stall_s)
    assert 0.1 / 3 * (1 if hiccup else 2) <= run.share(*settled(run)) <= 0.1 * 4 / 3


@settings(max_examples=counted(4, full=100))
@given(st.floats(1.5, 10), st.booleans())
def test_a_disk_that_changes_is_followed(factor, becomes_slower):
    fast, slow = Disk(blocked_s=0.01, write_s=0.5), Disk(blocked_s=0.01 * factor, write_s=0.5 * factor)
    before, after = (fast, slow) if becomes_slower else (slow, fast)
    changes_s, ends_s = 50 * factor, 200 * factor
    run = simulate(overhead(0.05), Changing(**vars(before), after=changes_s, then=after), ends_s)
    steady = simulate(overhead(0.05), after, ends_s)
    first = [began for began, _ in run.saves if began >= changes_s][1]  # the second on the new disk
    assert first <= changes_s + 30 * factor
    mine, theirs = (each.count(first, ends_s) for each in (run, steady))
    assert mine == pytest.approx(theirs, rel=1 / 3, abs=2)
    assert run.share(first, run.saves[-1][0]) <= 0.05 * 4 / 3


def test_the_first_save_on_a_slower_disk_is_the_last_at_the_old_interval():
    fast, slow = Disk(blocked_s=0.1, write_s=1, slowing=1), Disk(blocked_s=10, write_s=100, slowing=1)
    run = simulate(overhead(0.02), Changing(**vars(fast), after=500, then=slow), 5000)
    new = [began for began, _ in run.saves if began >= 500]
    assert new[1] - new[0] >= 10 / 0.02 * 0.9


@pytest.mark.parametrize("pause_s", [1.0, 60.0, 600.0])
def test_a_pause_for_evaluation_is_no_cost_and_no_burst_of_saves_follows(pause_s):
    disk, share = Disk(blocked_s=0.1, write_s=3, slowing=1.5), 0.05
    plain = simulate(overhead(share), disk, 5000)
    paused = simulate(overhead(share), disk, 5000 + pause_s * 25, pause=(2000, pause_s))
    assert paused.costs.cost_s <= plain.costs.cost_s * 2
    assert len(plain.saves) / 2 <= len(paused.saves)
    begins = [began for began, _ in paused.saves]
    interval_s = plain.costs.cost_s / share
    assert min(b - a for a, b in itertools.pairwise(begins[3:])) >= interval_s / 4


def test_saves_that_others_want_count_too():
    disk, share = Disk(blocked_s=0.2, write_s=1, slowing=1), 0.05
    forced = range(100, 4000, 300)
    run = simulate(overhead(share), disk, 600, forced=forced)
    alone = simulate(overhead(share), disk, 600)
    assert run.share(50, 590) <= share * 4 / 3
    assert len(run.saves) <= len(alone.saves) * 4 / 3


def test_the_first_step_is_saved_and_the_second_save_waits_until_it_is_known_what_a_step_takes():
    run = simulate(overhead(0.9), Disk(blocked_s=0.001, write_s=0.001, slowing=1, step_s=1), 10)
    assert [round(began) for began, _ in run.saves][:2] == [1, 5]  # step 1, then three steps without a save


@settings(max_examples=counted(8, full=200))
@given(disks, st.floats(0, 10))
def test_as_often_as_possible_never_overlaps_and_wastes_at_most_a_step(disk, least_s):
    each_s = disk.write_s + disk.step_s + disk.blocked_s + least_s
    run = simulate(as_often_as_possible(least_s), disk, max(5 * each_s, min(30 * each_s, STEPS * disk.step_s)))
    assert run.overlapped == 0
    gap_s = max(disk.write_s + disk.blocked_s, least_s)
    begins = [began for began, _ in run.saves]
    gaps = [b - a for a, b in itertools.pairwise(begins)]
    assert min(gaps) >= gap_s - 1e-6
    assert max(gaps) <= gap_s + 2 * disk.step_s * disk.slowing + 1e-6


def test_a_policy_is_told_only_what_it_asks_for():
    class Plain:
        def should_save(self, step, *, now, last):
            return step == 2

    class Asks:
        def should_save(self, step, *, now, last, saving):
            return not saving.in_progress

    class TakesAll:
        def should_save(self, step, **given):
            return "saving" in given

    busy, idle = Saving(in_progress=True), Saving(in_progress=False)
    assert is_due([Plain()], 2, now=0, last=None, saving=busy)
    assert [is_due([Asks()], 1, now=0, last=None, saving=each) for each in (busy, idle)] == [False, True]
    assert not is_due([TakesAll()], 1, now=0, last=None, saving=idle)
    for ours in (as_often_as_possible(), overhead(0.02)):
        assert [is_due([ours], 1, now=0, last=None, saving=each) for each in (busy, idle)] == [False, True]
        assert is_due([ours], 1, now=0, last=None)  # without a manager


def test_the_choice_says_what_it_rests_on_and_when_it_differs():
    run = simulate(overhead(0.05), Disk(blocked_s=0.2, write_s=1, slowing=1.5), 100)
    choice = overhead(0.05).choice(run.costs)
    assert choice.cost_s == pytest.approx(choice.blocked_s + choice.slowed_s)
    assert choice.interval_s == pytest.approx(choice.cost_s / 0.05)
    assert choice.blocked_s == pytest.approx(0.2)
    assert choice.step_s == pytest.approx(0.1)
    assert choice.slowed_s == pytest.approx(1 / 3, rel=0.3)  # a third of a second in which 0.67 s were trained
    for words in ("overhead(0.05)", f"every {choice.interval_s:.3g} s", "the caller waits 0.2 s"):
        assert words in str(choice)
    assert choice.differs(None)
    assert not choice.differs(dataclasses.replace(choice, interval_s=choice.interval_s * 1.2))
    assert choice.differs(dataclasses.replace(choice, interval_s=choice.interval_s * 1.3))
    assert choice.differs(dataclasses.replace(choice, interval_s=choice.interval_s / 1.3))
    assert overhead(0.05).choice(Costs()) is None


@pytest.mark.parametrize("wrong", [0, 1, -0.1, 1.5, math.nan, True, "0.02", None])
def test_a_share_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="overhead takes a share between 0 and 1"):
        overhead(wrong)


@pytest.mark.parametrize("wrong", [-1, math.nan, math.inf, True, "60", None])
def test_seconds_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="as_often_as_possible takes min_seconds"):
        as_often_as_possible(wrong)


def test_they_are_values():
    assert overhead(0.02) == overhead(0.02) != overhead(0.03)
    assert repr(overhead(0.02)) == "overhead(share=0.02)"
    assert len({as_often_as_possible(), as_often_as_possible(0)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        overhead(0.02).share = 0.5
