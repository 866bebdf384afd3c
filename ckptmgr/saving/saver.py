"""The first act of a save, on the caller's thread: decide, copy, hand over.

For a step above every known step the directory is not read. The second act (`committing`) checks all the same that
the name is free; a failure there is raised at the next call.

Of several processes none waits for another here, as long as the steps go up: the second act finds out whether all
save the same. A process in which the first act fails tells the others there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ckptmgr import policies
from ckptmgr.clock import Clock
from ckptmgr.errors import CheckpointError, CheckpointExistsError, SaveError
from ckptmgr.format.manifest import Manifest
from ckptmgr.options import Options
from ckptmgr.processes import background
from ckptmgr.processes.job import Call, Job
from ckptmgr.processes.signals import Preemption
from ckptmgr.results import CheckpointInfo, SaveResult
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.history import History, describe
from ckptmgr.run.lock import Shared, Writer
from ckptmgr.saving import copying, items, reuse
from ckptmgr.saving.aftermath import Aftermath
from ckptmgr.saving.committing import Committer
from ckptmgr.saving.local_saves import LocalSaver
from ckptmgr.saving.measuring import Meter
from ckptmgr.saving.queue import Act, Pending

_log = logging.getLogger("ckptmgr")
_TOO_LARGE = 2**63  # no manifest can hold it


class Saver:
    """Saves for one manager. `writer` is None where the manager is read-only."""

    def __init__(
        self,
        options: Options,
        clock: Clock,
        catalog: Catalog,
        history: History,
        job: Job,
        shared: Shared,
        writer: Writer | None,
        pending: Pending,
        aftermath: Aftermath,
        local: LocalSaver | None = None,
    ) -> None:
        self._options, self._clock = options, clock
        self._catalog, self._history = catalog, history
        self._job, self._shared, self._writer = job, shared, writer
        self._pending, self._aftermath, self._local = pending, aftermath, local
        self._committer = Committer(
            catalog, compression=options.compression, job=pending.job, shared=shared,
            refuses_nonfinite=options.nonfinite == "refuse",
        )  # fmt: skip
        self._composer = items.Composer()
        self._reuse = reuse.Reuse(catalog) if options.reuse_unchanged else None
        self._copier = copying.Copier(options, self._reuse)
        self._meter = Meter(clock, options.save_every, lambda: pending.is_busy, aftermath.record_choice)
        self._named: tuple[int, tuple[str, ...]] = (0, ())
        """The step that was composed last, and the names of its items."""
        self._last: CheckpointInfo | None = None
        self._is_empty = False
        """Whether nothing was saved when this manager looked: a declined step does not look again."""
        self.preemption = Preemption()
        self.is_open = writer is not None

    # ------------------------------------------------------------ may this call write?

    def turn(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """A lock for calls that write, shared by all managers of the run; a callback runs inside of it."""
        if self._shared.process != os.getpid():
            raise SaveError(
                f"step {step}: this manager belongs to process {self._shared.process}, and this process is a fork "
                "of it, where a manager can only read. Save, delete and pin in the process that opened the run",
                step=step,
            )
        return contextlib.nullcontext() if self._pending.is_current() else self._shared.turn

    def require_open(self, step: int, what: str = "saved") -> None:
        """Raises the failure of an earlier save, or SaveError if this manager does not write."""
        if self._job.count == 1:  # several processes raise it in the next call that they make together
            self._pending.raise_failure()
        if not self.is_open:
            raise SaveError(f"step {step} cannot be {what}: this manager is read-only or closed", step=step)

    # ------------------------------------------------------------ deciding

    def look_ahead(self) -> None:
        """Looks up what the first call of `save` will ask: in a bucket that call makes no request then."""
        if self._shared.newest is None:  # in all processes alike
            known = self._job.decide(Call("the first look at a run"), self._newest_and_taken)
            self._shared.newest, taken = known or (None, [])
            self._shared.taken = frozenset(taken)
        if self._job.leads and not policies.need_no_time(self._options.save_every):
            self._last_save()

    def _newest_and_taken(self) -> tuple[int, list[int]] | None:
        """The newest step, and numbers that are names of something else; None if the run cannot be listed."""
        try:
            steps = self._catalog.steps()
        except CheckpointError:  # `save` raises it
            return None
        return max([*steps, self._pending.step or 0]), sorted(self._catalog.taken().difference(steps))

    def should_save(self, step: int) -> bool:
        """Whether a call would save durably now: by `save_every`, or because the run is to stop."""
        self._meter.called(step)
        if policies.need_no_time(self._options.save_every):
            due = self._is_due(step, None)
        else:  # clocks differ
            call = Call("the decision about a save", step)
            due = self._job.decide(call, lambda: self._is_due(step, self._last_save()))
        return self.preemption.is_due(step, due)

    def _is_due(self, step: int, last: policies.Record | None) -> bool:
        saving = self._meter.saving()
        return policies.is_due(self._options.save_every, step, now=self._clock.now(), last=last, saving=saving)

    def _last_save(self) -> policies.Record | None:
        """The last save that this manager accepted, else the newest on disk; its time is on the clock of `now`."""
        if self._last is None and not self._is_empty:
            newest = self._history.newest()
            self._is_empty = newest is None
            self._last = newest and dataclasses.replace(newest, time=self._clock.since(newest.time))
        return self._last

    def after_rewind(self) -> None:
        """After a rewind the policies of `save_every` look at the steps that are listed now."""
        self._last, self._is_empty = None, False
        self._shared.newest = None
        if self._local is not None:
            self._local.after_rewind()

    def _refuse(self, step: int, force: bool, on_exists: str) -> str | None:
        """Why this step is not saved; None if it is."""
        if on_exists not in ("error", "skip", "replace"):
            raise ValueError(f'on_exists takes "error", "skip" or "replace", not {on_exists!r}')
        if force:
            self._meter.called(step)
        due = self.preemption.is_due(step, True) if force else self.should_save(step)
        if not due:
            return "not due by save_every"
        if self._is_new(step) and on_exists != "skip":
            return None  # in all processes alike: they have been told the same, and have made the same calls since
        call = Call("the start of the save", step)
        refusal, newest, taken = self._job.decide(call, lambda: self._look_up(step, on_exists))
        self._shared.newest, self._shared.taken = newest, frozenset(taken)
        return refusal

    def _look_up(self, step: int, on_exists: str) -> tuple[str | None, int | None, list[int]]:
        """Why this step is not to be saved although it is due; the newest step, and numbers that are no steps."""
        if self._is_new(step) and not self._catalog.holds(step):
            return None, self._shared.newest, [*self._shared.taken]
        steps = self._catalog.steps()
        newest, taken = max([*steps, self._pending.step or 0]), self._catalog.taken().difference(steps)
        return self._exists(step, steps, on_exists), newest, sorted(taken)

    def _exists(self, step: int, steps: Sequence[int], on_exists: str) -> str | None:
        """Why a step that is there, or is being written, is not to be saved."""
        exists = step == self._pending.step or (
            step in set(steps) - self._catalog.damaged and not self._makes_way(step)
        )
        if exists and on_exists == "replace" and not self._catalog.can_replace:
            raise ValueError(
                f'on_exists="replace" needs a rename, which a bucket does not have: {self._catalog.directory}; '
                f"call delete({step}) first"
            )
        if not exists or on_exists == "replace":
            return None
        if on_exists == "skip":
            return f"step {step} exists"
        raise CheckpointExistsError(
            f'step {step} is already in {self._catalog.directory}; on_exists="replace" replaces it, '
            '"skip" keeps it',
            step=step,
        )

    def _makes_way(self, step: int) -> bool:
        """Whether a step is distrusted, so that its number can be saved again: a run that went back comes here."""
        try:
            return self._catalog.why_distrusted(step) is not None and not self._catalog.is_pinned(step)
        except CheckpointError:
            return False

    def _is_new(self, step: int) -> bool:
        """Whether the step is above every step that this process knows, and nothing else has its name."""
        newest = self._shared.newest
        return newest is not None and step > newest and step not in self._shared.taken

    # ------------------------------------------------------------ copying and handing over

    def save(
        self, step: int, params: Any, opt_state: Any, extras: Mapping[str, Any] | None,
        metrics: Mapping[str, Any] | None, *, force: bool, on_exists: str,
    ) -> SaveResult:  # fmt: skip
        """As `CheckpointManager.save`. When it returns, everything is copied, and the second act has begun."""
        called, began = time.perf_counter(), self._meter.now()
        with self.turn(step):
            self.require_open(step)
            if self._pending.is_current() and self._job.count > 1:
                raise SaveError(f"save({step}): all processes must make it; a callback runs in one", step=step)
            refusal = self._refuse(step, force, on_exists)
            is_local = self._local is not None and self._local.is_due(step)
            if refusal and is_local:
                return self._save_locally(step, called, params, opt_state, extras, metrics)
            if refusal:
                return SaveResult(step, refusal)
            is_new = self._is_new(step)
            self._shared.newest = max(step, self._shared.newest or 0)  # also if it fails here alone
            with self._telling(step, is_local):
                self._prepare(step, is_new)
                if step >= _TOO_LARGE:
                    raise ValueError(f"step {step} cannot be saved: it must be below 2**63")
                composed = self._compose(step, params, opt_state, extras, metrics)
                self._pending.wait()
                self.require_open(step)  # a callback may have closed the manager meanwhile
                copied = self._copier.copy(step, self._clock.wall(), composed)
                replaces = self._make_room(step, is_new) or on_exists == "replace"
            twin = copied.twin() if is_local else None  # while nobody writes: a writer lets go of its copies
            reason = "forced" if force else "preempted" if self.preemption.signalled else "due"
            result = self._hand_over(copied, reason, called, replaces=replaces)
            if twin is not None:
                self._start_beside(step, twin, called)
            self._meter.saved(step, began)
            return result

    def _compose(self, step: int, params: Any, opt_state: Any, extras: Any, metrics: Any) -> copying.Composed:
        if params is None and opt_state is None:
            raise ValueError("save needs params, or an opt_state that holds them")
        composed = self._composer.compose(step, params, opt_state, extras or {}, metrics or {})
        self._warn_of_items_left_out(step, composed.keys())
        self._meter.wait_for_values(params, opt_state)
        return composed

    def _warn_of_items_left_out(self, step: int, names: Collection[str]) -> None:
        """Warns if a step lacks an item that the step before has: a resume will probably ask for it."""
        before, had = self._named
        left_out = sorted(set(had) - set(names))
        if left_out and self._job.leads:
            _log.warning(
                "step %d is saved without %s, which step %d has: a restore that asks for it is refused. If that "
                "is not meant, pass it to this call of save too", step, " and ".join(left_out), before,
            )  # fmt: skip
        self._named = step, tuple(names)

    def _save_locally(self, step: int, called: float, *state: Any) -> SaveResult:
        """Saves a step that is not saved durably on the machines of the job alone."""
        assert self._local is not None
        try:
            composed = self._compose(step, *state)
            self._local.wait()
            copied = self._copier.copy(step, self._clock.wall(), composed)
        except Exception as problem:
            self._local.fail(step, problem)
            raise
        try:
            save = self._local.start(copied, called)
            if not copied.wait(save.wait_for, self._options.timeout_s):
                self._local.wait(0)  # raises CheckpointTimeoutError
        except BaseException:
            copied.abandon()
            raise
        if not self._goes_on:
            self._local.wait()
        return SaveResult(step, "due by local_every", save)

    def _start_beside(self, step: int, twin: copying.Copied, called: float) -> None:
        """Starts the local save of a step that is being saved durably, whatever becomes of it."""
        assert self._local is not None
        try:
            self._local.start(twin, called)
        except CheckpointError as problem:  # the local save before it stands still
            _log.warning("step %d is not saved locally: %s", step, problem)

    @property
    def _goes_on(self) -> bool:
        """Whether a save goes on after the call."""
        return self._options.asynchronous and background.CAN_OUTLIVE_MAIN

    @contextlib.contextmanager
    def _telling(self, step: int, is_local: bool) -> Iterator[None]:
        """What fails inside, in this process, fails in all: no other waits for what does not come."""
        try:
            yield
        except Exception as problem:
            if self._job.count > 1:
                self._pending.fail(step, problem)
            if self._local is not None and is_local:
                self._local.fail(step, problem)
            raise

    def _prepare(self, step: int, is_new: bool) -> None:
        self._shared.hold()
        self._catalog.check_names(step)
        if not is_new:
            self._catalog.check_free(step)

    def _make_room(self, step: int, is_new: bool) -> bool:
        """Renames a damaged step so that its number is free; returns whether to replace a distrusted one."""
        replaces = False
        if step in self._catalog.damaged and self._job.leads:
            _log.warning("step %d is damaged and set aside as %s", step, self._catalog.set_aside(step))
        elif self._job.leads and not is_new and self._catalog.is_listed(step) and self._makes_way(step):
            _log.warning("step %d is distrusted, and is replaced", step)
            replaces = self._catalog.can_replace
            if not replaces:  # a bucket cannot: the number is free once the step is deleted
                self._catalog.delete(step, "it is distrusted, and is replaced")
        self._catalog.forget(step)
        return replaces

    def _described(self, manifest: Manifest) -> CheckpointInfo:
        """A step that was committed: it is durable, whatever can be read of it now."""
        try:
            return self._history.glance(manifest)
        except Exception as problem:  # of the network, or of a client
            _log.warning("step %d is saved; its notes could not be read: %s", manifest.step, problem)
            return describe(manifest)

    def _hand_over(self, copied: copying.Copied, reason: str, called: float, *, replaces: bool) -> SaveResult:
        """Starts the second act in the thread: the commit, then callbacks, mirror and retention."""
        step, handed_over, flight = copied.step, time.perf_counter(), self._meter.begin()
        shared = 0

        def commit() -> CheckpointInfo:
            nonlocal shared
            if self._writer is None or not self._writer.is_held():
                raise SaveError("a callback has closed the manager", step=step)
            manifest = self._committer.commit(copied, replaces=replaces)
            shared = reuse.shared_bytes(manifest) if self._reuse is not None else 0
            blocked_s = max(handed_over, copied.completed_at()) - called
            info = self._described(manifest)
            return dataclasses.replace(info, blocked_s=blocked_s, durable_s=time.perf_counter() - called)

        def failed(failure: SaveError) -> None:
            self._last, self._is_empty = None, False
            self._aftermath.record_failure(step, failure)

        def then(info: CheckpointInfo) -> None:
            self._committer.after_commit()
            if self._reuse is not None:
                self._reuse.committed(step, shared)
            self._aftermath.after_commit(info, shared)

        def let_go() -> None:
            copied.release()
            flight.end()

        self._last, before = CheckpointInfo(step=step, time=self._clock.now()), self._last
        try:
            act = Act(commit, failed, then, let_go)
            save = self._pending.start(step, act)
            if not copied.wait(save.wait_for, self._options.timeout_s):
                self._pending.join(0)  # raises CheckpointTimeoutError
        except BaseException:
            copied.abandon()
            self._last = before
            raise
        if not self._goes_on:
            self._pending.wait()
        return SaveResult(step, reason, save)
