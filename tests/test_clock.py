"""Time: clocks that jump, stop, lie and fail. Saving neither stops nor goes on without end."""

import json
import math
import time

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ckptmgr import CheckpointManager, every_seconds
from ckptmgr.clock import Clock
from ckptmgr.run import journal

DAY, START = 86_400.0, 1.7e9
PARAMS = {"w": jnp.ones(1)}


def _fails():
    raise OSError("no clock")


NO_TIME = {
    "NaN": math.nan, "inf": math.inf, "-inf": -math.inf, "too late": 1e300, "too early": -1e12, "None": None,
    "a str": "noon", "a huge int": 10**400, "an array": np.ones(3), "complex": 1j,
}  # fmt: skip
ODD = {"an int": 5, "negative": -5, "numpy": np.float32(5), "a jax array": jnp.float32(5), "True": True}


class Shown:
    """A clock that shows what it is told to."""

    def __init__(self, shown=START):
        self.shown = shown

    def __call__(self):
        return self.shown() if callable(self.shown) else self.shown


# ---------------------------------------------------------------- the clock


def test_time_goes_on_with_the_clock_given_and_never_back():
    shown = Shown()
    clock = Clock(shown)
    found = []
    for moment in (0, 60, 3600, -DAY, -DAY + 30, math.nan, 50, 80):
        shown.shown = START + moment
        found.append(clock.now() - START)
    assert found == pytest.approx([0, 60, 3600, 3600, 3630, 3630, 3630, 3660], abs=2)
    assert found == sorted(found)


def test_the_systems_clock_may_jump_and_time_does_not(monkeypatch):
    with monkeypatch.context() as patch:
        shown = Shown(START)
        patch.setattr(time, "time", shown)
        clock = Clock(time.time)
        began = clock.now()
        for moment in (DAY, -DAY, 0):
            shown.shown = START + moment
            assert 0 <= clock.now() - began < 5
            assert clock.wall() == START + moment


@pytest.mark.parametrize("name", [*NO_TIME, "fails"])
def test_a_clock_that_shows_no_time_is_said_once_and_the_systems_counts(name, caplog):
    clock = Clock(Shown(NO_TIME.get(name, _fails)))
    assert abs(clock.wall() - time.time()) < 5
    before = clock.now()
    time.sleep(0.01)
    assert 0.01 <= clock.now() - before < 5
    assert caplog.text.count("does not return a time") == 1


@pytest.mark.parametrize("name", ODD)
def test_any_number_is_a_time(name):
    clock = Clock(Shown(ODD[name]))
    assert (clock.now(), clock.wall()) == (float(ODD[name]),) * 2
    json.dumps(clock.wall())


def test_what_was_recorded_in_the_future_is_now():
    clock = Clock(Shown())
    assert clock.since(START - 60) == START - 60
    assert clock.since(START + DAY) == START


# ---------------------------------------------------------------- in a run


def _saved(directory, shown, moments, step=0, save_every=None):
    """The moments at which a run saved that asked at each of these."""
    found = []
    with CheckpointManager(directory, save_every=save_every or every_seconds(100), clock=shown) as manager:
        for moment in moments:
            shown.shown = moment
            step += 1
            if manager.save(step, PARAMS):
                found.append(moment)
            manager.wait()  # Orbax's policy saves nothing while another save is in progress
    return found, step


@pytest.mark.parametrize(
    "save_every",
    [every_seconds(100), ocp.checkpoint_managers.ContinuousCheckpointingPolicy(minimum_interval_secs=100)],
)
@pytest.mark.parametrize("jump", [DAY, -DAY])
@pytest.mark.parametrize("restarts", [False, True])
def test_a_jump_of_a_day_costs_one_interval_or_one_save(tmp_path, jump, restarts, save_every):
    shown = Shown()
    before = [START + each for each in range(0, 300, 50)]
    after = [START + jump + each for each in range(300, 700, 50)]
    if restarts:
        first, step = _saved(tmp_path, shown, before, save_every=save_every)
        shown.shown = after[0]
        second, _ = _saved(tmp_path, shown, after, step, save_every)
    else:
        found, _ = _saved(tmp_path, shown, before + after, save_every=save_every)
        first, second = [each for each in found if each in before], [each for each in found if each in after]
    assert len(first) == 3
    assert 3 <= len(second) <= 5


@pytest.mark.parametrize("name", [*NO_TIME, "fails"])
def test_a_clock_that_shows_no_time_stops_no_save_and_every_file_can_be_read(tmp_path, name):
    with CheckpointManager(tmp_path, clock=Shown(NO_TIME.get(name, _fails)), keep=[every_seconds(5)]) as manager:
        for step in (1, 2):
            manager.save(step, PARAMS)
        manager.wait()
        assert manager.restore(params=PARAMS).step == 2
        assert all(abs(info.time - time.time()) < 60 for info in manager.infos())
    assert [event["step"] for event in journal.read(manager.directory) if event["event"] == "saved"] == [1, 2]
    body = (tmp_path / "2" / "manifest.json").read_text()
    json.loads(body, parse_constant=lambda constant: pytest.fail(constant))


def test_a_clock_that_is_no_function_is_refused(tmp_path):
    with pytest.raises(TypeError, match="clock takes a function"):
        CheckpointManager(tmp_path / "run", clock=5.0)
    assert not (tmp_path / "run").exists()
