"""How much of the arrays of a step has been read, told to a caller who asks for it."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[int, int], object]
"""Called with the bytes of arrays read so far, and with those that are read in all."""
_PAUSE_S = 0.1


class Meter:
    """Counts bytes and tells of them: (0, total) at once, (total, total) by `end`, and few numbers between.

    Between them it tells each hundredth of the total, and what there is after `_PAUSE_S` seconds. What the
    callable raises passes through.
    """

    def __init__(self, tell: Progress, total: int) -> None:
        self._tell, self._total = tell, total
        self._done = 0
        self._say(0)

    def add(self, nbytes: int) -> None:
        """So many more have been read. The last number is left to `end`."""
        self._done = min(self._total, self._done + nbytes)
        is_much = 100 * (self._done - self._told) >= self._total
        if self._told < self._done < self._total and (is_much or time.monotonic() - self._at >= _PAUSE_S):
            self._say(self._done)

    def end(self) -> None:
        """All has been read, and is where it is wanted."""
        if self._told < self._total:
            self._say(self._total)

    def _say(self, done: int) -> None:
        self._told, self._at = done, time.monotonic()
        self._tell(done, self._total)
