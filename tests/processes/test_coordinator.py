"""Questions to the coordinator: each has a bound, and one that was left is over before the next."""

import threading
import time

import jax
import pytest

from ckptmgr.processes.coordinator import Coordinator, CoordinatorSilentError

BOUND_S = 0.2


class Store:
    """The client of a coordinator that holds everything itself, and stands still until it is let go on."""

    def __init__(self):
        self.held, self.goes_on, self.broken = [], threading.Event(), 0

    def _stand(self):
        assert self.goes_on.wait(10)

    def key_value_set(self, key, value, allow_overwrite):
        self._stand()
        if self.broken:
            self.broken -= 1
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: the connection broke")
        self.held.append((key, value))

    def key_value_dir_get(self, folder):
        self._stand()
        return [each for each in self.held if each[0].startswith(f"{folder}/")]

    def key_value_delete(self, key):
        self._stand()

    def blocking_key_value_get(self, key, wait_ms):
        self._stand()
        ends = time.monotonic() + wait_ms / 1000
        while key not in dict(self.held):
            if time.monotonic() > ends:
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: no such key")
            time.sleep(0.01)
        return dict(self.held)[key]


@pytest.fixture
def store():
    found = Store()
    yield found
    found.goes_on.set()


def test_no_question_waits_longer_than_its_bound(store):
    coordinator = Coordinator(store, 0, 2)
    for ask in (
        lambda: coordinator.set("a/b", "1", BOUND_S),
        lambda: coordinator.entries("a", BOUND_S),
        lambda: coordinator.delete("a/b", BOUND_S),
    ):
        with pytest.raises(CoordinatorSilentError):
            ask()
    assert coordinator.get("a/b", BOUND_S) is None


def test_a_question_that_was_left_is_over_before_the_next_and_one_that_was_not_begun_is_dropped(store):
    coordinator = Coordinator(store, 0, 2)
    for value in ("begun", "not begun"):
        with pytest.raises(CoordinatorSilentError):
            coordinator.set("a/b", value, BOUND_S)
    threading.Timer(BOUND_S, store.goes_on.set).start()
    assert coordinator.entries("a", 10) == {"a/b": "begun"}


def test_questions_beside_do_not_wait_for_each_other(store):
    coordinator = Coordinator(store, 0, 2)
    store.goes_on.set()
    threading.Timer(BOUND_S, lambda: coordinator.beside().set("a/b", "1", 10)).start()
    assert coordinator.get("a/b", 10) == "1"


def test_a_key_that_is_not_there_is_no_silence(store):
    store.goes_on.set()
    assert Coordinator(store, 0, 2).get("a/b", BOUND_S) is None


def test_a_connection_that_broke_is_tried_again_until_the_bound(store):
    store.goes_on.set()
    store.broken = 2
    coordinator = Coordinator(store, 0, 2)
    coordinator.set("a/b", "1", 10)
    assert coordinator.get("a/b", 10) == "1"
    store.broken = 1000
    with pytest.raises(CoordinatorSilentError) as caught:
        coordinator.set("a/b", "2", BOUND_S)
    assert "UNAVAILABLE" in str(caught.value.__cause__)


def test_what_else_goes_wrong_is_raised(store):
    store.goes_on.set()
    store.held = None
    with pytest.raises(TypeError):
        Coordinator(store, 0, 2).entries("a", 10)
