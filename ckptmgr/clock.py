"""The time of a manager: what the clock on the wall shows, and how much time has gone by.

The two differ. A clock on the wall is set back and forth, and a caller's own may fail: a duration that is the
difference of two of its readings may be wrong by any amount.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

_log = logging.getLogger("ckptmgr")
LATEST = 6e10
"""Seconds from the epoch, in either direction, that every calendar can show: the year 3871."""


class _Reading(NamedTuple):
    now: float
    wall: float | None
    ticks: float


class Clock:
    """The clock that a manager was given, where it can be relied on.

    Durations come from the system's monotonic clock if `read` is `time.time`. Any other clock is believed in how
    far it goes forward: a test's own passes an hour in no time. Where it goes back or fails, the monotonic clock
    counts.
    """

    def __init__(self, read: Callable[[], float] = time.time) -> None:
        self._read = read
        self._has_warned = False
        wall = self._ask()
        self._last = _Reading(time.time() if wall is None else wall, wall, time.monotonic())

    def wall(self) -> float:
        """Seconds since the epoch, to be shown and recorded; if the clock fails, the system's."""
        wall = self._ask()
        return time.time() if wall is None else wall

    def now(self) -> float:
        """The same at the start, and from then on the seconds that have gone by: it never goes back."""
        last, ticks, wall = self._last, time.monotonic(), self._ask()
        passed = ticks - last.ticks
        if self._read is not time.time and wall is not None and last.wall is not None and wall >= last.wall:
            passed = wall - last.wall
        self._last = _Reading(last.now + passed, wall, ticks)
        return self._last.now

    def since(self, wall: float) -> float:
        """When a recorded time was, as `now` counts; a time in the future is now."""
        return self.now() - max(0.0, self.wall() - wall)

    def _ask(self) -> float | None:
        """What the clock shows; None if that is no time."""
        try:
            shown: Any = self._read()
            wall = float(shown)
        except Exception as problem:
            self._warn(f"{type(problem).__name__}: {problem}")
            return None
        if not abs(wall) <= LATEST:
            self._warn(f"it gives {shown!r}")
            return None
        return wall

    def _warn(self, why: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            _log.warning("clock=%r shows no time, and the system's clock is used: %s", self._read, why)
