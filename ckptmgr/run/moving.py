"""Makes the moves of a rewind in one directory of a run; `branches` decides which.

The plan is written durably before the first move. If the process is killed, the next one finishes the moves.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

from ckptmgr.format import names
from ckptmgr.format.names import ABANDONED, STEP
from ckptmgr.run import branches as branching
from ckptmgr.run.branches import Branch, Move, Plan
from ckptmgr.run.directory import Directory

_log = logging.getLogger("ckptmgr")


class Mover:
    """Moves the steps of one directory between its listing and its branches."""

    def __init__(self, storage: Directory) -> None:
        self._storage = storage

    def branches(self) -> list[Branch]:
        """What rewinds have set aside, the oldest first."""
        found = [branching.parse(name, self._steps_of(name)) for name in self._storage.inside(ABANDONED)]
        return sorted((each for each in found if each and each.steps), key=lambda branch: branch.time)

    def _steps_of(self, branch: str) -> list[int]:
        return [int(name) for name in self._storage.inside(f"{ABANDONED}/{branch}") if STEP.fullmatch(name)]

    def plan(self, step: int, listed: Collection[int]) -> Plan | None:
        """What a rewind to a step moves; None if it is neither listed nor in a branch."""
        return branching.plan(step, listed, self.branches(), self._storage.mark, time.time_ns())

    def plan_without(self, like: Plan, listed: Collection[int]) -> Plan:
        """What moves here with a plan for another directory of the run, if the step itself is not here."""
        return branching.plan_without(like.base, like.mark, listed, self._storage.mark, time.time_ns())

    def move(self, plan: Plan) -> None:
        """Writes the plan, then moves what is planned."""
        if plan.moves:
            self._storage.write_plan(branching.encode(plan.moves))
            self.finish()

    def finish(self) -> None:
        """Moves what a rewind has planned and not yet moved."""
        ahead = self._read_plan()
        if ahead is None:
            return
        while ahead:
            self._storage.move(ahead)
            ahead = ahead[1:]
            self._storage.has_moved(branching.encode(ahead))
        self._storage.end_plan()

    def _read_plan(self) -> list[Move] | None:
        """The moves ahead; None if no rewind was interrupted, or the file holds no plan."""
        try:
            plan = self._storage.read_plan()
            return None if plan is None else branching.decode(plan)
        except (OSError, ValueError) as problem:
            _log.error(
                "%s cannot be read as the plan of a rewind, so the rewind is not finished: %s. Remove that file",
                self._storage.path / names.REWINDING, problem,
            )  # fmt: skip
            return None
