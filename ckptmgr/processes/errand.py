"""Work that may stand still in a library, where no exception reaches it: a thread does it, callers may leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from ckptmgr.processes.background import Moment

Found = TypeVar("Found")


class Errand(Generic[Found]):
    """Work, and once it is over what came of it."""

    def __init__(self, work: Callable[[], Found]) -> None:
        self._work = work
        self._found: list[Found] = []
        self.problem: BaseException | None = None
        self.over = Moment()

    def run(self) -> None:
        """Called in the thread; raises nothing."""
        try:
            self._found.append(self._work())
        except BaseException as problem:
            self.problem = problem
        finally:
            self.over.set()

    def comes(self, wait_s: float) -> bool:
        """Whether it is over in time. Time in which this process was stopped does not count, but for a slice."""
        return self.over.wait(wait_s)

    def is_done(self) -> bool:
        """Whether it is over, and has not failed."""
        return self.over.is_set() and self.problem is None

    def result(self) -> Found:
        """Returns or raises what the work did."""
        if self.problem is not None:
            raise self.problem
        return self._found[0]
