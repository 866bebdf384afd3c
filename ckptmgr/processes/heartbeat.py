"""Heartbeats: a process that works on a save says so again and again, and the others wait for it longer.

So a slow save does not fail. A process that is gone, or stopped, sends nothing, and the wait for it ends.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Collection, Iterator
from typing import Any

import jax

from ckptmgr.processes.background import Moment

_LONGEST_BEAT_S = 30.0


def beat_s(timeout_s: float) -> float:
    """How often a process that works says so."""
    return min(timeout_s / 10, _LONGEST_BEAT_S)


class Heartbeats:
    """The heartbeats of all processes, in the key-value store of jax.distributed's coordinator.

    Each process has one key, `<prefix>/works/<process>/beat`. Its value is a number that changes with every beat.
    """

    def __init__(self, client: Any, prefix: str) -> None:
        self._client, self._prefix = client, f"{prefix}/works/"

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
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator does not answer
                self._client.key_value_set(f"{self._prefix}{process}/beat", str(number), allow_overwrite=True)
            if done.wait(every_s):
                return

    def newest(self, processes: Collection[int]) -> dict[int, str]:
        """The newest heartbeat of each process that has sent one; of more than one process all are read.

        Who waits for process 0 alone asks for no other: else each process of a job would read those of all.
        """
        prefix = f"{self._prefix}{min(processes)}/" if len(processes) == 1 else self._prefix
        try:
            entries = self._client.key_value_dir_get(prefix)
        except jax.errors.JaxRuntimeError:  # the coordinator does not answer
            return {}
        return {int(key.split("/")[-2]): value for key, value in entries}


class Patience:
    """How long processes are waited for: `timeout_s` after the newest heartbeat of each, or after the start."""

    def __init__(self, heartbeats: Heartbeats, timeout_s: float) -> None:
        self._heartbeats, self._timeout_s = heartbeats, timeout_s
        self._began = self._looked_at = time.monotonic()
        self._newest: dict[int, str] = {}
        self._heard_at: dict[int, float] = {}

    def silent(self, processes: Collection[int]) -> set[int]:
        """Those of the processes that have been waited for long enough."""
        now = time.monotonic()
        if now - self._looked_at >= beat_s(self._timeout_s) / 2:
            newest, self._looked_at = self._heartbeats.newest(processes), now
            if self._newest:
                self._heard_at |= {i: now for i, each in newest.items() if self._newest.get(i) != each}
            self._newest |= newest
        ends = {i: self._heard_at.get(i, self._began) + self._timeout_s for i in processes}
        return {i for i in processes if now > ends[i]}
