"""What a real manager tells the policies about saving: whether a save is in progress, and what saves cost."""

import itertools
import json
import os
import signal
import threading
import time

import faults
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import ckptmgr
from ckptmgr import CheckpointManager
from ckptmgr.saving import copying, queue
from ckptmgr.units import format_s

SLOW_S = 1.0
PARAMS = {"w": np.ones((64, 64), np.float32)}


@pytest.fixture
def slow_disk(monkeypatch):
    """Each rename of a step takes a second, as if the disk had to write a large one."""
    real = faults.FaultyDirectory.publish
    monkeypatch.setattr(
        faults.FaultyDirectory, "publish", lambda *given, **how: (time.sleep(SLOW_S), real(*given, **how))[1]
    )


class Looks:
    """A policy of a user: saves the steps that it is given, and keeps what it is told."""

    def __init__(self, *steps):
        self.steps, self.told = steps, []

    def should_save(self, step, *, now, last, saving):
        self.told.append(saving)
        return step in self.steps


@jax.jit
def work(x):
    return jnp.tanh(x @ x)


@pytest.mark.parametrize(
    "policy",
    [ckptmgr.as_often_as_possible(), ocp.checkpoint_managers.ContinuousCheckpointingPolicy()],
    ids=["ours", "orbax"],
)
@pytest.mark.parametrize("callback_s", [0, SLOW_S / 2])
def test_on_a_slow_disk_no_save_waits_for_the_save_before(policy, callback_s, tmp_path, slow_disk):
    begun, over, declined = {}, {}, []

    def committed(info):
        time.sleep(callback_s)
        over[info.step] = time.perf_counter()

    state, step, ends = jnp.ones((64, 64)), 0, time.perf_counter() + 60
    with CheckpointManager(tmp_path, save_every=policy, on_commit=committed) as manager:
        while len(begun) < 3 and time.perf_counter() < ends:
            step += 1
            state = work(state).block_until_ready()
            time.sleep(0.01)
            began = time.perf_counter()
            if manager.save(step, {"w": state}):
                begun[step] = began
            else:
                declined.append(step)
    assert len(begun) == 3
    assert [*begun] == [*over] == manager.steps()
    for one, following in itertools.pairwise(begun):
        assert begun[following] >= over[one]
        assert [each for each in declined if one < each < following]  # the run went on meanwhile


def test_a_save_is_in_progress_until_it_is_durable(tmp_path, slow_disk):
    looks = Looks(1)
    with CheckpointManager(tmp_path, save_every=looks) as manager:
        result = manager.save(1, PARAMS)
        manager.should_save(2)
        assert not result.done()
        manager.wait()
        manager.should_save(3)
    assert [each.in_progress for each in looks.told] == [False, True, False]


@pytest.mark.parametrize("fault", ["fail arrays 2", "fail publish 2"])
def test_after_a_save_that_fails_the_policy_goes_on(fault, tmp_path, monkeypatch):
    clock = Clock()
    with CheckpointManager(tmp_path, save_every=ckptmgr.overhead(0.5), clock=clock) as manager:
        faults.install(fault, monkeypatch.setattr)
        failed = 0
        for step in range(1, 30):
            clock.now += 1
            try:
                manager.save(step, PARAMS)
                manager.wait()
            except ckptmgr.SaveError:
                failed += 1
    assert failed == 1
    assert len(manager.steps()) > 2
    assert max(manager.steps()) > 20


def test_a_save_that_cannot_be_handed_over_does_not_stop_the_policy(tmp_path, monkeypatch):
    """The save before it is still being written at the call, and is over when that fails."""
    clock, takes_s = Clock(), [1.0]
    options = {
        "save_every": ckptmgr.overhead(0.5),
        "clock": clock,
        "on_commit": lambda info: time.sleep(takes_s[0]),
    }
    with CheckpointManager(tmp_path, **options) as manager:
        manager.save(1, PARAMS)
        with monkeypatch.context() as patch:
            patch.setattr(queue.Pending, "start", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                manager.save(2, PARAMS, force=True)
        takes_s[0] = 0
        for step in range(3, 20):
            clock.now += 1
            manager.save(step, PARAMS)
            manager.wait()
    assert len(manager.steps()) > 2


class Clock:
    """A clock that stands still, but for what a test lets pass."""

    def __init__(self):
        self.now = 1e9

    def __call__(self):
        return self.now


def test_what_is_measured_is_what_has_passed_and_saves_by_force_count(tmp_path, monkeypatch):
    """Steps take 2 s, 3 s beside a save; a call of save blocks for 5 s."""
    clock, looks, goes_on = Clock(), Looks(4), threading.Event()

    def copy(*given, real=copying.Copier.copy):
        clock.now += 5
        return real(*given)

    monkeypatch.setattr(copying.Copier, "copy", copy)
    options = {"save_every": looks, "clock": clock, "on_commit": lambda info: goes_on.wait(60)}
    with CheckpointManager(tmp_path, **options) as manager:
        for step in range(1, 12):
            clock.now += 3 if step in (5, 9) else 2
            goes_on.set()  # a save is over when the step beside it is
            manager.wait()
            goes_on.clear()
            manager.save(step, PARAMS, force=step == 8)
    costs = looks.told[-1].costs
    assert manager.steps() == [4, 8]
    assert costs.quiet == (2,) * 8
    assert [(each.blocked_s, each.steps_beside, each.beside_s) for each in costs.saves] == [(5, 1, 3)] * 2
    assert (costs.step_s, costs.cost_s) == (2, 6)
    assert costs.share(costs.saves[0].began + 24) == 0.5


def test_a_save_of_a_preempted_run_counts_too(tmp_path):
    looks = Looks(1)
    with CheckpointManager(tmp_path, save_every=looks) as manager, manager.preemption_guard([signal.SIGUSR1]):
        manager.save(1, PARAMS)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert manager.save(2, PARAMS).reason == "preempted"
        manager.wait()
        manager.should_save(3)
        manager.should_save(4)
    assert len(looks.told[-1].costs.saves) == 2


def test_the_wait_for_values_that_are_computed_is_no_cost(tmp_path):
    looks, state = Looks(2), jnp.ones((1500, 1500))
    work(state).block_until_ready()
    with CheckpointManager(tmp_path, save_every=looks) as manager:
        manager.save(1, {"w": state}, force=True)  # makes the plan
        manager.wait()
        for _ in range(20):
            state = work(state)
        began = time.perf_counter()
        manager.save(2, {"w": state})
        waited_s = time.perf_counter() - began
        manager.wait()
        manager.should_save(3)
        manager.should_save(4)
    assert looks.told[-1].costs.saves[-1].blocked_s < waited_s / 2


def test_what_overhead_chooses_is_said_in_the_log_and_in_the_journal_and_only_when_it_changes(tmp_path, caplog):
    caplog.set_level("INFO", "ckptmgr")
    clock = Clock()
    with CheckpointManager(tmp_path, save_every=ckptmgr.overhead(0.1), clock=clock) as manager:
        for step in range(1, 60):
            clock.now += 2
            if manager.should_save(step):
                clock.now += 0.5 if step < 30 else 2  # as long as a save of a blocking disk would take
                manager.save(step, PARAMS)
            manager.wait()
    lines = (tmp_path / ".ckptmgr" / "journal.jsonl").read_text().splitlines()
    said = [event for event in map(json.loads, lines) if event["event"] == "paced"]
    assert said
    for event in said:
        assert event["share"] == 0.1
        assert event["interval_s"] == pytest.approx((event["blocked_s"] + event["slowed_s"]) / 0.1)
        assert (
            f"step {event['step']}: overhead(0.1) saves about every {format_s(event['interval_s'])}" in caplog.text
        )
    assert caplog.text.count("overhead(0.1) saves about") == len(said) < 6


def test_a_run_without_such_a_policy_measures_nothing(tmp_path):
    reads = []

    def clock():
        reads.append(1)
        return time.time()

    with CheckpointManager(tmp_path, save_every=2, clock=clock) as manager:
        before = len(reads)
        manager.save(1, PARAMS)
        assert len(reads) == before + 1  # for `now`
