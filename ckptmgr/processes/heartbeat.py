"""Heartbeats: a process that works on a save says so again and again, and the others wait for it longer.

So a slow save does not fail. A process that is gone, stopped, or cut off from the network sends nothing, and the
wait for it ends.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Collection, Iterator

from ckptmgr.processes.background import Moment
from ckptmgr.processes.coordinator import Coordinator, CoordinatorSilentError

_LONGEST_BEAT_S, _LONGEST_LOOK_S = 30.0, 15.0


def beat_s(timeout_s: float) -> float:
    """How often a process that works says so."""
    return min(timeout_s / 10, _LONGEST_BEAT_S)


def look_s(timeout_s: float) -> float:
    """How often a process that waits looks for it: so often that the wait ends soon after `timeout_s`."""
    return min(timeout_s / 50, _LONGEST_LOOK_S)


class Heartbeats:
    """The heartbeats of all processes, in the key-value store of jax.distributed's coordinator.

    Each process has one key, `<prefix>/works/<process>/beat`. Its value is a number that changes with every beat.
    """

    def __init__(self, coordinator: Coordinator, prefix: str) -> None:
        self._coordinator, self._folder = coordinator, f"{prefix}/works"

    @contextlib.contextmanager
    def sent(self, process: int, every_s: float) -> Iterator[None]:
        """Inside it a thread sends the heartbeats of this process."""
        done = Moment()
        threading.Thread(
            target=self._send, args=(process, every_s, done), name="ckptmgr: heartbeat", daemon=True
        ).start()
        try:
            yield
        finally:
            done.set()

    def _send(self, process: int, every_s: float, done: Moment) -> None:
        for number in itertools.count():
            with contextlib.suppress(CoordinatorSilentError):
                self._coordinator.set(f"{self._folder}/{process}/beat", str(number), every_s)
            if done.wait(every_s):
                return

    def newest(self, processes: Collection[int], wait_s: float) -> dict[int, str] | None:
        """The newest heartbeat of each of the processes that has sent one; None if the coordinator is silent.

        One process is looked for alone: of many that wait for process 0 not each asks for the heartbeats of all.
        """
        folder = f"{self._folder}/{next(iter(processes))}" if len(processes) == 1 else self._folder
        try:
            entries = self._coordinator.entries(folder, wait_s)
        except CoordinatorSilentError:
            return None
        return {int(key.split("/")[-2]): value for key, value in entries.items()}


def without_pulse(
    heartbeats: Heartbeats, processes: Collection[int], wait_s: float, is_over: Callable[[], bool]
) -> set[int]:
    """Those of the processes that send no heartbeat within these seconds; a silent coordinator is process 0."""
    look_s = wait_s / 10
    ends, before, silent = time.monotonic() + wait_s, heartbeats.newest(processes, look_s), set(processes)
    while silent and time.monotonic() < ends and not is_over():
        time.sleep(look_s)
        newest = heartbeats.newest(processes, look_s)
        if newest is not None and before is not None:
            silent -= {i for i in silent if newest.get(i) != before.get(i)}
        before = newest if before is None else before
    return silent if before is not None else {0}


class Patience:
    """How long processes are waited for: `timeout_s` after the newest heartbeat of each, or after the start."""

    def __init__(self, heartbeats: Heartbeats, timeout_s: float) -> None:
        self._heartbeats, self._timeout_s, self._look_s = heartbeats, timeout_s, look_s(timeout_s)
        self._began = self._looked_at = time.monotonic()
        self._newest: dict[int, str] | None = None
        self._heard_at: dict[int, float] = {}

    def silent(self, processes: Collection[int]) -> set[int]:
        """Those of the processes that have been waited for long enough."""
        now = time.monotonic()
        if processes and now - self._looked_at >= self._look_s:
            newest, self._looked_at = self._heartbeats.newest(processes, self._look_s), now
            if newest is not None and self._newest is not None:
                self._heard_at |= {i: now for i, each in newest.items() if self._newest.get(i) != each}
            self._newest = newest if self._newest is None else self._newest | (newest or {})
        return {i for i in processes if self._left_s(i) <= 0}

    def next_look_s(self, process: int) -> float:
        """How long to wait for this process before it is asked about again; once more if it is silent."""
        left_s = self._left_s(process)
        return min(self._look_s, left_s) if left_s > 0 else self._look_s

    def _left_s(self, process: int) -> float:
        return self._heard_at.get(process, self._began) + self._timeout_s - time.monotonic()
