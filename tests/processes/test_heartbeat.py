"""Heartbeats tell a process that is gone from a program that fails, or takes long, while all are there."""

import contextlib
import threading
import time

import pytest

from ckptmgr.errors import CheckpointTimeoutError
from ckptmgr.processes.coordinator import Coordinator
from ckptmgr.processes.job import Call, Job

CALL, TIMEOUT_S = Call("the sending of what was read from step 1"), 1.0


class Store:
    """The client of a coordinator that holds everything itself."""

    def __init__(self):
        self.held = {}

    def key_value_set(self, key, value, allow_overwrite):
        self.held[key] = value

    def key_value_dir_get(self, folder):
        return [each for each in list(self.held.items()) if each[0].startswith(f"{folder}/")]


@pytest.fixture
def jobs():
    store = Store()
    return [Job("line", TIMEOUT_S, coordinator=Coordinator(store, index, 3)) for index in range(3)]


@pytest.fixture
def never():
    """A program that does not end before the test does."""
    ends = threading.Event()
    yield ends.wait
    ends.set()


def fail():
    raise ValueError("no memory")


def test_what_a_program_returns_or_raises_comes_as_it_is_while_the_others_are_there(jobs):
    with jobs[1].working(), jobs[2].working():
        assert jobs[0].program(CALL, lambda: 7) == 7
        with pytest.raises(ValueError, match="no memory"):
            jobs[0].program(CALL, fail)


@pytest.mark.parametrize("gone", [[1], [2], [1, 2]])
def test_whoever_sends_no_heartbeat_while_a_program_fails_or_stands_still_is_missing(jobs, never, gone):
    with contextlib.ExitStack() as working:
        for index in {1, 2}.difference(gone):
            working.enter_context(jobs[index].working())
        for run in (fail, never):
            with pytest.raises(CheckpointTimeoutError) as caught:
                jobs[0].program(CALL, run)
            assert caught.value.missing == tuple(gone)
            assert isinstance(caught.value.__cause__, ValueError) == (run is fail)


def test_a_program_that_stands_still_while_all_are_there_has_the_bound_and_names_nobody(jobs, never):
    began = time.monotonic()
    with jobs[1].working(), jobs[2].working(), pytest.raises(CheckpointTimeoutError) as caught:
        jobs[0].program(CALL, never)
    assert time.monotonic() > began + TIMEOUT_S
    assert caught.value.missing == ()
    assert caught.value.waiting_for == f"the devices at {CALL}"
