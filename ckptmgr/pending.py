"""The save that is being written: waited for beside the training, its failure raised at the next call."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ckptmgr.checkpoint import CheckpointInfo
from ckptmgr.errors import CheckpointTimeoutError, SaveError
from ckptmgr.job import Job
from ckptmgr.lifecycle import Background, Outcome

_log = logging.getLogger("ckptmgr")


class Pending:
    """One save at a time; `timeout_s` bounds every wait for it, and `job` knows which processes it waits for."""

    def __init__(self, timeout_s: float, job: Job) -> None:
        self._job = job
        self._committed: int | None = None
        self._background = Background(timeout_s)
        self._failure: SaveError | None = None

    def follow(
        self,
        step: int,
        commit: Callable[[], CheckpointInfo],
        failed: Callable[[SaveError], None],
        then: Callable[[CheckpointInfo], None],
    ) -> Outcome:
        """Runs `commit`, which returns once the step is durable, in a thread, and `failed` or `then` after it."""
        told = Outcome()
        self._committed = None

        def finish() -> None:
            try:
                info = commit()
            except BaseException as problem:  # raised again at the next call
                failure = SaveError(f"step {step} could not be saved: {problem}", step=step)
                failure.__cause__ = problem
                self._failure = failure
                _log.error("%s", failure)  # heard even if no next call comes
                told.failure = failure
                told.set()
                failed(failure)
                return
            finally:
                self._committed = step
            told.value = info
            told.set()
            then(info)

        self._background.start(f"the save of step {step}", finish, step)
        return told

    @property
    def step(self) -> int | None:
        """The step that is being written; None once it is durable, or has failed."""
        step: int | None = self._background.about
        return None if step == self._committed else step

    def join(self, timeout_s: float | None = None) -> None:
        """Waits until nothing is being written, and what follows from it is done."""
        try:
            self._background.wait(timeout_s)
        except CheckpointTimeoutError as late:
            if not self._job.waits_for:
                raise
            told = f"{late}; {self._job.waits_for} did not come"
            raise CheckpointTimeoutError(told, waiting_for=late.waiting_for) from None

    def wait(self) -> None:
        """The same, and raises what has failed."""
        self.join()
        self.raise_failure()

    def settle(self, step: int) -> None:
        """If this step is still being written, waits for it."""
        if step == self.step and not self.is_current():
            self.wait()

    def acknowledge(self, failure: SaveError) -> None:
        """A failure that `SaveResult.result` has raised is not raised again; a later one is."""
        if self._failure is failure:
            self._failure = None

    def is_current(self) -> bool:
        """Whether the caller is a callback of the save that is being finished, which must not wait for itself."""
        return self._background.is_current()

    def raise_failure(self) -> None:
        """Raises the failure of the last save, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
