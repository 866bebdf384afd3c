"""The stages at which the processes of a job wait for each other during a save; what fails in one fails in all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ckptmgr.errors import CheckpointError
from ckptmgr.processes.agreement import Spec
from ckptmgr.processes.job import Call, Job


class Stages:
    """The stages of one save, in their order.

    First all agree that they save the same. "directories": process 0 has made them. "arrays": each process has
    written its own. "commit": the step has its name.
    """

    def __init__(self, step: int, job: Job) -> None:
        self._step, self._job = step, job
        self._ahead = ["directories", "arrays", "commit"]

    def agree(self, spec: Callable[[], Spec]) -> None:
        """Waits until every process has copied the same leaves; raises what differs, or what failed in one."""
        try:
            self._job.together(saved(self._step), spec, lambda found: found)
        except Exception:
            self._ahead.clear()
            raise

    def reach(self, stage: str, found: Any = None) -> list[Any]:
        """Waits until the others have reached a stage; raises what has failed in one of them.

        At "arrays" process 0 gets what each process has found; elsewhere nothing comes back.
        """
        return self._pass(None, found) if stage in self._ahead else []

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """A failure inside is raised in the other processes at their next stage."""
        try:
            yield
        except Exception as problem:
            with contextlib.suppress(CheckpointError):
                if self._ahead[:1] == ["directories"] and not self._job.leads:
                    self._pass(None)  # only process 0 is heard there
                if self._ahead:
                    self._pass(problem)
            raise

    def _pass(self, problem: Exception | None, found: Any = None) -> list[Any]:
        stage = self._ahead.pop(0)
        call = Call(f"the {stage}", self._step)
        try:
            if stage != "arrays":
                self._job.tell(call, problem)
            elif problem is not None:
                self._job.share(call, problem)
            else:
                return self._job.collect(call, found)
            return []
        except Exception:
            self._ahead.clear()
            raise


def saved(step: int) -> Call:
    """The call with which the save of a step begins, behind the caller."""
    return Call("the save", step)
