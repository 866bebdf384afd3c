"""The saves that were accepted: written one after the other; the failure of one is raised at the next call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from ckptmgr.errors import CheckpointTimeoutError, SaveError
from ckptmgr.processes.background import Task
from ckptmgr.processes.job import Job
from ckptmgr.results import CheckpointInfo, Save
from ckptmgr.run.lock import Shared
from ckptmgr.saving import stages

_log = logging.getLogger("ckptmgr")


class Act(NamedTuple):
    """The second act of a save."""

    commit: Callable[[], CheckpointInfo]
    """Returns once the step is durable."""
    failed: Callable[[SaveError], object] = lambda failure: None
    then: Callable[[CheckpointInfo], object] = lambda info: None
    """Called after the commit."""
    let_go: Callable[[], object] = lambda: None
    """Called at the end in any case."""


class Pending:
    """The saves of one manager. All managers of a run in this process share one thread that writes.

    `timeout_s` bounds every wait for a save. `job` tells which processes are missing. `how` they are saved is said
    in messages.
    """

    def __init__(self, timeout_s: float, job: Job, shared: Shared, how: str = "") -> None:
        self._timeout_s = timeout_s
        self.job = job
        self._shared, self._how = shared, how
        self._background = shared.background
        self._saves: list[Save] = []

    def start(self, step: int, act: Act) -> Save:
        """Runs the second act of a save in the thread."""
        save, task = self._task(step, act)
        if not self.is_current():
            self.join()
        self._saves.append(save)
        self._background.start(task)
        return save

    def fail(self, step: int, problem: Exception) -> None:
        """Tells the other processes of the job that the save of a step has failed here, and is not handed over.

        All raise it at their next call, also this one, so that they stay together. If the save has failed in each
        process by itself, none does.
        """

        def tell() -> CheckpointInfo:
            with self.job.working():
                save.was_raised = self.job.fail(stages.saved(step), problem)
            raise problem

        save, task = self._task(step, Act(tell))
        self._saves.append(save)
        self._background.add(task)

    def _task(self, step: int, act: Act) -> tuple[Save, Task]:
        save = Save(step, self._timeout_s, self._background.wait_for, self._named)

        def finish() -> None:
            try:
                save.info = act.commit()
            except BaseException as problem:
                self._end(save, problem)
                if save.failure is not None:
                    act.failed(save.failure)
            else:
                save.over.set()
                act.then(save.info)

        def ended(problem: BaseException | None) -> None:
            self._end(save, problem)
            act.let_go()

        return save, Task(f"the save of step {step}", finish, self._timeout_s, save, ended)

    @property
    def step(self) -> int | None:
        """The step that is being written, by any manager of the run; None once it is durable, or has failed."""
        written = (task.about for task in self._background.waiting())
        return next((save.step for save in written if isinstance(save, Save) and not save.over.is_set()), None)

    @property
    def is_busy(self) -> bool:
        """Whether a new save would wait: for one of any manager of the run, or for the work after its commit."""
        return bool(self._background.waiting())

    def join(self, timeout_s: float | None = None) -> None:
        """Waits until nothing is being written, and the work after the commit is done."""
        try:
            self._background.wait(self._timeout_s if timeout_s is None else timeout_s)
        except CheckpointTimeoutError as late:
            raise self._named(late) from None

    def _named(self, late: CheckpointTimeoutError) -> CheckpointTimeoutError:
        """The same, with the processes of the job that the save waits for."""
        awaited = self.job.awaited
        if awaited is None:
            return late
        told, waiting_for = f"{late}; still waiting for {awaited}", f"{late.waiting_for}: {awaited}"
        return CheckpointTimeoutError(told, waiting_for=waiting_for, missing=awaited.processes)

    def wait(self) -> None:
        """Waits as `join` does; then raises the failure of a save."""
        self.join()
        self.raise_failure()

    def settle(self, step: int) -> None:
        """If this step is still being written, waits for it."""
        if step == self.step and not self.is_current():
            self.wait()

    def is_current(self) -> bool:
        """Whether the caller runs in the thread that saves, as callbacks do: it must not wait for itself."""
        return self._background.is_current()

    def raise_failure(self) -> None:
        """Raises the failure of a save, once: not if `SaveResult.result` has raised it."""
        with self._shared.raising:
            for save in [each for each in self._saves if each.over.is_set()]:
                self._saves.remove(save)
                if save.failure is not None and not save.was_raised:
                    save.was_raised = True
                    raise save.failure

    def _end(self, save: Save, problem: BaseException | None) -> None:
        """Ends a save: it is durable or failed, whatever has interrupted it. May be called twice."""
        if save.info is None and save.failure is None:
            why = "its thread was interrupted" if problem is None else str(problem) or repr(problem)
            failure = SaveError(f"step {save.step} could not be saved{self._how}: {why}", step=save.step)
            failure.__cause__ = problem
            save.failure = failure
            _log.error("%s", failure)  # there may be no next call that raises it
        save.over.set()
