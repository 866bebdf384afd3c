"""CheckpointManager: the story of a save, of a restore, and of what is kept."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import jax
from etils import epath

from ckptmgr import clock as clocks
from ckptmgr import options, policies
from ckptmgr.errors import CorruptCheckpointError, SaveError
from ckptmgr.format import paths
from ckptmgr.processes import background, job, signals
from ckptmgr.processes.job import Call
from ckptmgr.restoring import matching
from ckptmgr.restoring import restorer as restoring
from ckptmgr.results import Checkpoint, CheckpointInfo, Damage, OptState, Params, SaveResult, VerifyReport
from ckptmgr.run import history, journal, lock, opening, verifying
from ckptmgr.run.catalog import open_catalog
from ckptmgr.saving import aftermath, queue, saver
from ckptmgr.specs import Optimizer, PyTree, StructureDiff, fit_line
from ckptmgr.trees import placement
from ckptmgr.trees.layouts import Layout

_log = logging.getLogger("ckptmgr")


class CheckpointManager:
    """Saves the state of a training run under numbered steps and restores it.

    Args:
      directory: where the run's checkpoints are: a str, a PathLike or an `epath.Path`. A relative path
        and `~` are resolved here, once.
      save_every: which calls of `save` save: an int N (every N steps), a policy, or a list of policies
        any of which fires. Default: every call.
      keep: what retention leaves alone: an int N (the latest N), a policy, or a list of policies whose
        choices add up. Default: everything.
      asynchronous: True: `save` returns once the values are safely copied; False: once they are durable.
      compression: None or "zstd".
      chunk_bytes: largest chunk of one array on disk, which bounds what a restore onto another layout
        reads.
      max_host_bytes: bound on the host memory held by copies that wait to be written; None: unbounded.
      on_commit: a callable, or several, given the CheckpointInfo of each checkpoint once it is durable.
        What one raises is logged and harms nothing.
      read_only: True for evaluators: never writes, deletes or cleans anything.
      mirror: a second home, also gs:// or s3://: every checkpoint is copied there in the background, and
        `restore` takes from there what is not here.
      mirror_keep: what retention leaves alone there, as `keep` says it here. Default: everything.
      metadata: a JSON-able mapping recorded with every checkpoint.
      timeout_s: bound on every wait, in seconds.
      clock: gives the time in seconds since the epoch. One that goes back, or fails, stops no save.

    Raises:
      ValueError, TypeError: an option is wrong; the message names it.
      NotADirectoryError, PermissionError: the directory cannot be used.
      SaveError: another process writes into the directory.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        save_every: policies.SaveEvery | None = None,
        keep: policies.Keep | None = None,
        asynchronous: bool = True,
        compression: Literal["zstd"] | None = None,
        chunk_bytes: int = 64 * 2**20,
        max_host_bytes: int | None = None,
        on_commit: Callable[[CheckpointInfo], object] | Sequence[Callable[[CheckpointInfo], object]] | None = None,
        read_only: bool = False,
        mirror: str | os.PathLike[str] | None = None,
        mirror_keep: policies.Keep | None = None,
        metadata: Mapping[str, Any] | None = None,
        timeout_s: float = 1200.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        given = {
            "save_every": save_every, "keep": keep, "asynchronous": asynchronous,
            "compression": compression, "chunk_bytes": chunk_bytes, "max_host_bytes": max_host_bytes,
            "on_commit": on_commit, "read_only": read_only, "mirror": mirror, "mirror_keep": mirror_keep,
            "metadata": metadata, "timeout_s": timeout_s, "clock": clock,
        }  # fmt: skip
        self._options = options.check(given)
        self._clock = clocks.Clock(self._options.clock)
        self._directory = paths.resolve(directory)
        aftermath.check_mirror(self._options.mirror, self._directory)
        self._catalog = open_catalog(self._directory)
        self._history = history.History(self._catalog, self._options.keep)
        self._writer: lock.Writer | None
        timeout_s = self._options.timeout_s
        if read_only:  # it may be opened in one process of a job alone
            self._job = saving = job.Job("", timeout_s, alone=True)
            self._writer, self._shared = None, lock.Shared()
        else:
            name, self._writer = opening.open_run(self._directory, self._catalog, timeout_s)
            self._job, saving = job.Job(name, timeout_s), job.Job(f"{name}/saving", timeout_s)
            self._shared = self._writer.shared
        self._catalog.share_damage(self._shared.damaged)
        self._pending = queue.Pending(timeout_s, saving, self._shared)
        writes = not read_only and self._job.leads
        self._journal = journal.Journal(self._directory, self._clock.wall, writes=writes)
        self._aftermath = aftermath.Aftermath(
            self._options, self._catalog, self._history, self._job, self._journal, self._shared, self._writer
        )
        self._restorer = restoring.Restorer(
            self._catalog, self._history, self._aftermath.mirror, self._job, self._journal, timeout_s
        )
        self._saver = saver.Saver(
            self._options, self._clock, self._catalog, self._history, self._job, self._shared, self._writer,
            self._pending, self._aftermath,
        )  # fmt: skip
        if not read_only:
            signals.drain_on_sigterm()
            self._aftermath.update_mirror()  # what an earlier process has not copied

    def __repr__(self) -> str:
        state = "open for writing" if self._saver.is_open else "read-only or closed"
        return fit_line("CheckpointManager", repr(str(self._directory)), state)

    @property
    def directory(self) -> epath.Path:
        """Where the checkpoints are, absolute."""
        return self._directory

    # ------------------------------------------------------------ saving

    def should_save(self, step: int) -> bool:
        """Whether `save(step, ...)` would save now: by `save_every`, or because the run is to stop."""
        return self._saver.should_save(policies.step_number(step))

    def save(
        self,
        step: int,
        params: PyTree,
        opt_state: PyTree = None,
        *,
        extras: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        force: bool = False,
        on_exists: Literal["error", "skip", "replace"] = "error",
    ) -> SaveResult:
        """Saves a step if `save_every` asks for it, or if `force`.

        When it returns, the caller may donate, delete or overwrite every array it passed.

        Args:
          step: the number of the step, 0 or more.
          params: a pytree of arrays and numbers; None if `opt_state` holds the parameters.
          opt_state: a pytree of arrays and numbers.
          extras: by name: a pytree, a JSON-able value, or an object with `get_state` and `set_state`.
          metrics: one number each; may still be on their way from a device.
          force: saves whatever `save_every` says.
          on_exists: what to do if the step is there: "error", "skip" or "replace" (the old one stays
            until the new one is durable).

        Raises:
          CheckpointExistsError: the step is there and `on_exists` is "error".
          UnsupportedLeafError: a leaf has no form on disk; nothing was written.
          SaveError: the save before this one failed, or this one did.
        """
        return self._saver.save(
            policies.step_number(step), params, opt_state, extras, metrics, force=force, on_exists=on_exists,
        )  # fmt: skip

    # ------------------------------------------------------------ waiting and closing

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until nothing is being written, deleted or copied to the mirror.

        Raises SaveError if a save failed, CheckpointTimeoutError after `timeout_s` (default: the
        manager's) seconds.
        """
        self._pending.join(timeout_s)
        self._aftermath.wait(timeout_s)
        self._pending.raise_failure()

    def close(self) -> None:
        """Waits for what is being written, then lets go of everything. Raises as `wait` does.

        After a CheckpointTimeoutError it is still being written, and `close` may be called again.
        """
        if self._shared.process != os.getpid():
            self._saver.is_open = False  # in a forked child: the run is the parent's
        elif self._pending.is_current():  # a callback, which cannot wait for itself
            self._saver.is_open = False
            self._shared.background.add(background.Task("the closing", self._let_go, self._options.timeout_s))
        else:
            with self._shared.turn:
                self._pending.join()
                self._let_go()
            self._pending.raise_failure()

    def _let_go(self) -> None:
        """Each line may be done again: an interrupted call of `close` is made once more."""
        self._aftermath.wait()
        self._saver.is_open = False
        if self._writer is not None:
            self._writer.release()

    @contextlib.contextmanager
    def preemption_guard(self, signals: Sequence[int] = (signal.SIGTERM,)) -> Iterator[None]:
        """Inside it a signal makes the next `save` happen whatever `save_every` says, and sets `preempted`.

        A second signal ends the process at once. Handlers that were there before are called too, and get
        their signals back at the end, once what was accepted is durable.
        """
        with self._saver.preemption.guard(signals):
            try:
                yield
            finally:
                self.wait()

    @property
    def preempted(self) -> bool:
        """Whether a signal has come and training is to stop now.

        Not yet if the newest step was declined just before the signal: the next call of `save` saves, then
        it is True. So a loop that saves, then looks, always ends with its last step saved.
        """
        return self._saver.preemption.reached

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------ restoring

    def restore(
        self,
        step: int | Literal["best"] | None = None,
        *,
        params: Params | None = None,
        opt_state: OptState | None = None,
        optimizer: Optimizer | None = None,
        extras: Mapping[str, Any] | None = None,
        layout: Layout = None,
        cast: bool | Collection[str] = False,
        partial: bool | Collection[str] = False,
        rename: Mapping[str, str] | None = None,
        broadcast: bool = False,
    ) -> Checkpoint[Params, OptState]:
        """Restores a step into the structure of the templates; what has no template is not read.

        Args:
          step: a number, "best", or None for the newest good one: damaged steps are passed over, loudly.
          params, opt_state: templates, concrete or abstract (`jax.eval_shape`).
          optimizer: an optax optimizer, in the place of an `opt_state` template.
          extras: by name: a template, or an object whose `set_state` is given what was saved.
          layout: None (where the template's leaf is; else the default device), a Sharding, a Device,
            `ckptmgr.HOST`, a Mesh (the saved PartitionSpecs on it), a pytree of shardings like the params or
            a prefix of one, or a callable `(path, ShapeDtypeStruct) -> Sharding`. What mirrors a parameter
            (Adam's moments) follows it, also where an abstract template or an optimizer names no place.
          cast: allows dtypes to differ, and converts to the template's; True, or the items that may.
          partial: keeps the template's own value for leaves that the checkpoint lacks, and ignores
            leaves that the template lacks; True, or the items that may. `Checkpoint.missing` and `.unused`
            name the leaves.
          rename: {regex of an old path: new path}, as `re.sub` takes them.
          broadcast: what several processes hold is read by one of them and sent to the others over the
            devices' own network; for storage that is slower than that. Without it each reads for itself.

        Without any template everything comes back, as nested dicts, lists and tuples.

        Raises:
          CheckpointNotFoundError: there is no checkpoint, or none with this number.
          CorruptCheckpointError: the step asked for is damaged, or every step is.
          StructureMismatchError: a template does not fit; nothing was read.
          LayoutError: a leaf cannot go where `layout` wants it; nothing was read.
          ValueError: a rule of `rename` matches no leaf, or `cast` or `partial` names no item.
        """
        request = self._request(
            params=params, opt_state=opt_state, optimizer=optimizer, extras=extras, layout=layout, cast=cast,
            partial=partial, rename=rename, broadcast=broadcast,
        )  # fmt: skip
        self._pending.wait()
        restorer = self._restorer.among(request)
        if step is None:
            return restorer.newest(request)
        if step == "best":
            return restorer.best(request)
        return restorer.one(policies.step_number(step), request)

    def restore_or(
        self,
        *,
        step: int = 0,
        params: Params | None = None,
        opt_state: OptState | None = None,
        optimizer: Optimizer | None = None,
        extras: Mapping[str, Any] | None = None,
        layout: Layout = None,
        cast: bool | Collection[str] = False,
        partial: bool | Collection[str] = False,
        rename: Mapping[str, str] | None = None,
        broadcast: bool = False,
    ) -> Checkpoint[Params, OptState]:
        """Resumes from the newest good step, or starts: the values given come back if nothing is saved yet.

        Takes what `restore` takes; `step` is that of the start, and `optimizer` also gives the opt_state of the
        start, `optimizer.init(params)`. `Checkpoint.resumed` tells which of the two it was.
        """
        request = self._request(
            params=params, opt_state=opt_state, optimizer=optimizer, extras=extras, layout=layout, cast=cast,
            partial=partial, rename=rename, broadcast=broadcast,
        )  # fmt: skip
        step = policies.step_number(step)
        self._pending.wait()
        restorer = self._restorer.among(request)
        if restorer.has_steps():
            return restorer.newest(request)
        start: Any = params
        state: Any = restoring.first_state(optimizer, params) if optimizer is not None else opt_state
        return Checkpoint(step=step, params=start, opt_state=state, extras=dict(extras or {}), resumed=False)

    def _request(
        self, *, extras: Mapping[str, Any] | None, layout: Layout, rename: Mapping[str, str] | None,
        broadcast: bool, **templates: Any,
    ) -> matching.Request:  # fmt: skip
        """Checks what is asked for before anything is looked up."""
        return matching.Request(
            extras=extras or {},
            layout=placement.check(layout),
            rename=rename or {},
            broadcast=broadcast and jax.process_count() > 1,
            **templates,
        )

    # ------------------------------------------------------------ looking

    def steps(self) -> list[int]:
        """The committed steps, in order."""
        return self._catalog.steps()

    def latest(self) -> int | None:
        """The newest committed step; None if there is none."""
        return max(self._catalog.steps(), default=None)

    def watch(
        self, after: int | None = None, *, timeout_s: float | None = None, poll_s: float = 1.0
    ) -> Iterator[int]:
        """Yields each step that is committed, also by another process, once and in order; for evaluators.

        A step that is replaced, or saved anew after a rewind, comes again.

        Args:
          after: only steps after this one; None: those that are there already come first.
          timeout_s: ends when no new step has come for so long; None: never.
          poll_s: how often to look.
        """
        return self._history.watch(after, timeout_s, poll_s)

    def best(self, metric: str | None = None, *, mode: Literal["min", "max"] = "min") -> int | None:
        """The step with the best value of a metric, of equals the newer; None if no step has it.

        Without arguments it is the metric of the first `ckptmgr.best` in `keep`.
        """
        return self._history.best(metric, mode)

    def info(self, step: int) -> CheckpointInfo:
        """What is known of a step without reading an array."""
        step = policies.step_number(step)
        self._pending.settle(step)
        return self._history.info(step)

    def infos(self) -> list[CheckpointInfo]:
        """What is known of every readable step, in order, from one look at all."""
        return self._history.all()

    def diff(self, step: int, *, params: PyTree = None, opt_state: PyTree = None) -> StructureDiff:
        """How the templates differ from a step; falsy if they do not."""
        step = policies.step_number(step)
        self._catalog.require(step)
        return matching.compare(self._catalog.manifest(step), params, opt_state)

    def verify(
        self, step: int | None = None, *, on_progress: Callable[[int, int], object] | None = None
    ) -> VerifyReport:
        """Reads every file and every array of a step (default: the newest), whole but in bounded memory.

        Args:
          step: its number.
          on_progress: called with the bytes of arrays read so far, and in all.
        """
        number = self.latest() if step is None else policies.step_number(step)
        if number is None:
            raise self._catalog.nothing_good({})
        self._pending.settle(number)
        while True:
            stamp = self._catalog.stamp(number)
            report = self._verify(number, on_progress)
            if report or self._catalog.stamp(number) == stamp:
                return report
            self._catalog.require(number)  # says that it was deleted; what has replaced it is verified anew

    def _verify(self, step: int, on_progress: Callable[[int, int], object] | None) -> VerifyReport:
        try:
            manifest = self._catalog.manifest(step, fresh=True)
        except CorruptCheckpointError as problem:
            return VerifyReport(step=step, damages=(Damage(problem.path or "", str(problem)),))
        return verifying.verify(manifest, self._catalog.path(step), on_progress)

    def delete(self, step: int) -> None:
        """Deletes a step, pinned or not."""
        step = policies.step_number(step)
        with self._saver.turn(step):
            self._saver.require_open(step)
            self._pending.wait()
            self._aftermath.delete(step)

    def rewind(self, step: int) -> None:
        """Lets the run go on from an earlier step: later ones are set aside, and nothing is deleted.

        What was set aside is in no listing, and retention leaves it alone. A rewind to one of these steps brings
        it back with those before it, and sets aside what was saved in its place. If the number is also listed,
        the listed step is meant. The mirror's steps are set aside too. With several processes all make the call.

        Waits for the save in progress and for the mirror. If the process is killed in it, the next manager that
        may write finishes it.

        Raises:
          CheckpointNotFoundError: the step is neither listed nor set aside; the message says which are.
          CorruptCheckpointError: the step is seen to be damaged (its manifest, or the size of a file).
          SaveError: the manager is read-only or closed, a save has failed, or the mirror cannot be reached.
        """
        step = policies.step_number(step)
        with self._saver.turn(step):
            self._saver.require_open(step, "gone back to")
            if self._pending.is_current() and self._job.count > 1:
                raise SaveError(f"step {step}: all processes make a rewind, and a callback runs in one", step=step)
            call = Call(f"the rewind to step {step}")
            self._job.together(call, self._pending.wait)

            moved = self._job.decide(call, lambda: self._aftermath.rewind(step))
            self._saver.has_gone_back()
            self._aftermath.go_on_from(step, moved)

    def pin(self, step: int) -> None:
        """Keeps a step whatever retention says, until `unpin`."""
        self._mark(step, self._catalog.pin)

    def unpin(self, step: int) -> None:
        """Gives a step back to retention."""
        self._mark(step, self._catalog.unpin)

    def _mark(self, step: int, mark: Callable[[int], None]) -> None:
        step = policies.step_number(step)
        with self._saver.turn(step):
            self._saver.require_open(step)
            self._pending.settle(step)
            self._aftermath.mark(step, mark)
