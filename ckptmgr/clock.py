"""The time of a manager: the wall clock, and how much time has passed.

The two differ. A wall clock may be set back and forth, and a clock of the caller may fail: the difference of two
readings may be wrong by any amount.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

_log = logging.getLogger("ckptmgr")
LATEST = 6e10
"""Seconds from the epoch, in either direction, that every calendar can represent: the year 3871."""


class _Reading(NamedTuple):
    now: float
    wall: float | None
    ticks: float


class Clock:
    """The clock of a manager, corrected where it cannot be right.

    If `read` is `time.time`, durations come from the system's monotonic clock. Any other clock is used while it
    goes forward: with a clock of a test an hour may pass at once. If it goes back or fails, the monotonic clock is
    used.
    """

    def __init__(self, read: Callable[[], float] = time.time) -> None:
        self._read = read
        self._has_warned = False
        wall = self._ask()
        self._last = _Reading(time.time() if wall is None else wall, wall, time.monotonic())

    def wall(self) -> float:
        """Seconds since the epoch, to show and to record; if the clock fails, those of the system."""
        wall = self._ask()
        return time.time() if wall is None else wall

    def now(self) -> float:
        """Equals `wall` at the start; from then on the seconds that have passed are added. It never goes back."""
        last, ticks, wall = self._last, time.monotonic(), self._ask()
        passed = ticks - last.ticks
        if self._read is not time.time and wall is not None and last.wall is not None and wall >= last.wall:
            passed = wall - last.wall
        self._last = _Reading(last.now + passed, wall, ticks)
        return self._last.now

    def since(self, wall: float) -> float:
        """A recorded time on the clock of `now`; a time in the future becomes now."""
        return self.now() - max(0.0, self.wall() - wall)

    def _ask(self) -> float | None:
        """The reading of the clock; None if it is not a time."""
        try:
            shown: Any = self._read()
            wall = float(shown)
        except Exception as problem:
            self._warn(f"{type(problem).__name__}: {problem}")
            return None
        if not abs(wall) <= LATEST:
            self._warn(f"it returns {shown!r}")
            return None
        return wall

    def _warn(self, why: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            _log.warning("clock=%r does not return a time, so the system's clock is used: %s", self._read, why)
