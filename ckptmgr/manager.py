"""CheckpointManager: the public API of a run. The work is done in `saving`, `restoring` and `run`."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import jax
from etils import epath

from ckptmgr import assembly, notebook, policies
from ckptmgr.errors import SaveError
from ckptmgr.processes import background
from ckptmgr.processes.job import Call
from ckptmgr.restoring import matching
from ckptmgr.restoring import restorer as restoring
from ckptmgr.results import Checkpoint, CheckpointInfo, OptState, Params, SaveResult, VerifyReport
from ckptmgr.run import verifying
from ckptmgr.saving import items
from ckptmgr.specs import Optimizer, PyTree, StructureDiff, fit_line
from ckptmgr.trees import placement
from ckptmgr.trees.layouts import Layout
from ckptmgr.units import format_bytes


class CheckpointManager:
    """Saves the state of a training run under numbered steps and restores it.

    Args:
      directory: where the checkpoints of the run are: a str, a PathLike or an `epath.Path`. A relative path
        and `~` are resolved here, once.
      save_every: which calls of `save` really save: an int N (every N steps), a policy, or a list of policies
        (a step is saved if one of them wants it). Default: every call.
      keep: which checkpoints retention keeps: an int N (the latest N), a policy, or a list of policies (a
        checkpoint is kept if one of them wants it). Default: all.
      asynchronous: True: `save` returns once the values are safely copied; False: once they are durable.
      compression: None or "zstd".
      chunk_bytes: the largest chunk of one array on disk. It bounds how much a restore onto another layout
        reads.
      max_host_bytes: bound on the host memory that a save takes for copies that wait to be written, and a restore
        beside the arrays that it returns; None: unbounded. A larger array or chunk takes its own size.
      nonfinite: what to do if the parameters hold NaN or infinity when they are saved: "ignore" (nobody looks),
        "distrust" (the step is saved, and `restore()` passes over it), or "refuse" (the save fails). The
        parameters are params, or opt_state where params is None. They are looked at on their devices; `save` does
        not wait for it.
      on_commit: a callable, or several. Each is called with the CheckpointInfo of a checkpoint once it is
        durable. An exception in one is logged and harms nothing. In a job it runs in process 0 and cannot save.
      read_only: True for evaluators: never writes, deletes or cleans anything.
      reuse_unchanged: True: a jax array that is the very object of the last save is not copied and written again.
        The new step shares its files with the step before (hard links; in a bucket the server copies them).
      local: a directory on each process's own machine (a RAM disk, a local SSD). Steps that `local_every` wants
        are saved there too, or there alone: by each process its own part, and that of a process on another
        machine. `restore` takes the newest step of which all parts are left somewhere, if no durable one is newer.
      local_every: which calls of `save` save there, as `save_every` does. Default: every call.
      local_keep: how many of these steps each machine keeps. Default: 2.
      local_copies: 1 (default): each process keeps the part of a neighbour too, so that any one machine may be
        lost; 0: it does not.
      mirror: a second directory, also gs:// or s3://. Every checkpoint is copied there in the background, and
        `restore` reads from there the steps that `directory` lacks.
      mirror_keep: which checkpoints retention keeps in the mirror, as `keep` does for `directory`. Default: all.
      metadata: a JSON-able mapping recorded with every checkpoint.
      timeout_s: bound on every wait, in seconds.
      clock: a callable that returns the time in seconds since the epoch. If it goes back, or fails, saves go on.

    Raises:
      ValueError, TypeError: an option is wrong; the message names it.
      NotADirectoryError, PermissionError: the directory cannot be used.
      SaveError: another process writes into the directory; the message names it.
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
        nonfinite: Literal["ignore", "distrust", "refuse"] = "ignore",
        on_commit: Callable[[CheckpointInfo], object] | Sequence[Callable[[CheckpointInfo], object]] | None = None,
        read_only: bool = False,
        reuse_unchanged: bool = False,
        local: str | os.PathLike[str] | None = None,
        local_every: policies.SaveEvery | None = None,
        local_keep: int | None = None,
        local_copies: int | None = None,
        mirror: str | os.PathLike[str] | None = None,
        mirror_keep: policies.Keep | None = None,
        metadata: Mapping[str, Any] | None = None,
        timeout_s: float = 1200.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        parts = assembly.assemble(
            directory,
            {
                "save_every": save_every, "keep": keep, "asynchronous": asynchronous,
                "compression": compression, "chunk_bytes": chunk_bytes, "max_host_bytes": max_host_bytes,
                "nonfinite": nonfinite, "on_commit": on_commit, "read_only": read_only,
                "reuse_unchanged": reuse_unchanged, "local": local, "local_every": local_every,
                "local_keep": local_keep, "local_copies": local_copies,
                "mirror": mirror, "mirror_keep": mirror_keep,
                "metadata": metadata, "timeout_s": timeout_s, "clock": clock,
            },
        )  # fmt: skip
        self._options, self._directory = parts.options, parts.directory
        self._catalog, self._history, self._journal = parts.catalog, parts.history, parts.journal
        self._job, self._shared, self._writer = parts.job, parts.shared, parts.writer
        self._pending, self._aftermath = parts.pending, parts.aftermath
        self._restorer, self._saver, self._local = parts.restorer, parts.saver, parts.local

    def __repr__(self) -> str:
        state = "open for writing" if self._saver.is_open else "read-only or closed"
        path = str(self._directory)
        return fit_line("CheckpointManager", repr(path if len(path) <= 70 else f"...{path[-67:]}"), state)

    @notebook.safely
    def _repr_html_(self) -> str:
        steps = self._catalog.steps()
        infos = {info.step: info for info in self._history.all()}
        newest = (self._row(step, infos.get(step)) for step in reversed(steps))
        state = "open for writing" if self._saver.is_open else "read-only or closed"
        return notebook.page(
            f"CheckpointManager: {self._directory}, {state}, {len(steps):,} steps",
            notebook.table(("step", "saved", "size", "metrics", "why it is kept"), newest, len(steps), "steps"),
        )

    def _row(self, step: int, info: CheckpointInfo | None) -> tuple[object, ...]:
        if info is None:
            return step, "", "", "", self._history.why_unread(step)
        metrics = ", ".join(f"{name}={value:.6g}" for name, value in itertools.islice(info.metrics.items(), 5))
        why = f"distrusted: {info.distrusted}" if info.distrusted is not None else ", ".join(info.kept)
        return step, notebook.when(info.time), format_bytes(info.nbytes), metrics, why

    @property
    def directory(self) -> epath.Path:
        """The directory of the run, as an absolute path."""
        return self._directory

    # ------------------------------------------------------------ saving

    def should_save(self, step: int) -> bool:
        """Whether `save(step, ...)` would save durably now: by `save_every`, or because the run is to stop."""
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
        """Saves a step if `save_every` wants it, or if `force` is True.

        When it returns, the caller may donate, delete or overwrite every array it passed.

        Args:
          step: the number of the step, 0 or more.
          params: a pytree of arrays and numbers; None if `opt_state` holds the parameters.
          opt_state: a pytree of arrays and numbers.
          extras: by name: a pytree, a JSON-able value, or an object with `get_state` and `set_state`.
          metrics: by name one number each. They may be jax scalars that are still being computed.
          force: True: saves whatever `save_every` says.
          on_exists: what to do if the step is saved already: "error", "skip" or "replace" (the old checkpoint
            stays until the new one is durable).

        Raises:
          CheckpointExistsError: the step is saved already and `on_exists` is "error".
          UnsupportedLeafError: a leaf cannot be stored; nothing was written.
          SaveError: an earlier save failed, or the manager is closed or read-only. In a job it is raised in all
            processes, also if they did not save the same.
          ValueError: an argument is wrong, or `on_exists` is "replace" in a bucket.
        """
        background.hold_if_ending()
        result = self._saver.save(
            policies.step_number(step), params, opt_state, extras, metrics, force=force, on_exists=on_exists,
        )  # fmt: skip
        background.hold_if_ending()  # a signal that came meanwhile ends the process once this save is durable
        return result

    # ------------------------------------------------------------ waiting and closing

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until nothing is being written, deleted or copied to the mirror.

        Raises SaveError if a save failed, and CheckpointTimeoutError if one of these takes longer than `timeout_s`
        seconds (default: the manager's `timeout_s`).
        """
        self._pending.join(timeout_s)
        if self._local is not None:
            self._local.wait(timeout_s)
        self._aftermath.wait(timeout_s)
        self._pending.raise_failure()

    def close(self) -> None:
        """Waits for what is being written, then releases the run. Raises as `wait` does.

        After a CheckpointTimeoutError the save still goes on, and `close` may be called again.
        """
        if self._shared.process != os.getpid():
            self._saver.is_open = False  # in a forked child: the run is the parent's
        elif self._pending.is_current():  # a callback, which cannot wait for itself
            self._saver.is_open = False
            self._shared.background.add(
                background.Task("the call of close", self._let_go, self._options.timeout_s)
            )
        else:
            with self._shared.turn:
                self._pending.join()
                self._let_go()
            self._pending.raise_failure()

    def _let_go(self) -> None:
        """Every line may run twice: after an interrupt `close` may be called again."""
        self._aftermath.wait()
        self._saver.is_open = False
        if self._local is not None:
            self._local.close()
        if self._writer is not None:
            self._writer.release()

    @contextlib.contextmanager
    def preemption_guard(self, signals: Sequence[int] = (signal.SIGTERM,)) -> Iterator[None]:
        """Inside it a signal sets `preempted`, and makes the next `save` happen whatever `save_every` says.

        A second signal ends the process at once. The handlers from before are called too. They are set again at
        the end, once every accepted save is durable. If the first signal comes after the last call of `save`, and
        nobody asks for `preempted` after it, it then has its usual effect: SIGTERM ends the process. So what must
        still be done belongs inside. If an exception ends the guard, such a signal is forgotten.
        """
        with self._saver.preemption.guard(signals, self.wait):
            yield

    @property
    def preempted(self) -> bool:
        """Whether a signal has come and training must stop now.

        If the newest step was declined before the signal, it is still False: the next call of `save` saves, and
        then it is True. So a loop that saves, then looks at `preempted`, ends with its last step saved.
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
        on_progress: Callable[[int, int], object] | None = None,
    ) -> Checkpoint[Params, OptState]:
        """Restores a step into the structure of the templates; items without a template are not read.

        Args:
          step: a number, "best", or None for the newest good step. Damaged and distrusted steps are passed over
            with a warning. A distrusted step is restored by its number, with a warning.
          params, opt_state: templates, concrete or abstract (`jax.eval_shape`).
          optimizer: an optax optimizer, instead of a template for `opt_state`.
          extras: by name: a template, or an object whose `set_state` is called with what was saved.
          layout: None (where the template's leaf is; else the default device), a Sharding, a Device,
            `ckptmgr.HOST`, a Mesh (the saved PartitionSpecs on it), a pytree of shardings with the structure of
            params or a prefix of it, or a callable `(path, ShapeDtypeStruct) -> Sharding`. Leaves of opt_state
            that mirror a parameter (Adam's moments) go where the parameter goes.
          cast: allows dtypes to differ, and converts to those of the template; True, or the names of items.
          partial: keeps the template's own value for leaves that the checkpoint lacks, and ignores
            leaves that the template lacks; True, or the names of items. `Checkpoint.missing` and `.unused`
            name the leaves.
          rename: {regex of an old path: new path}, as `re.sub` takes them.
          broadcast: one process reads what several hold, and sends it to the others over the network of the
            devices. It helps if the storage is slower than that network. Default: each process reads itself.
          on_progress: called on this thread with two numbers: the bytes of arrays that this process has read so
            far, and those that it reads in all, without items that are not asked for. The first number grows from
            0 to the second, which a restored step ends with. It begins anew with another step if one is passed
            over. What it raises ends the restore, in all processes of a job.

        Without any template all items come back, as nested dicts, lists and tuples.

        Raises:
          CheckpointNotFoundError: there is no checkpoint, or none with this number.
          CorruptCheckpointError: this step is damaged; with step=None every step is damaged or distrusted.
          StructureMismatchError: a template does not fit the checkpoint; no array was read.
          LayoutError: a leaf cannot go where `layout` wants it; no array was read.
          ValueError: a rule of `rename` matches no leaf, or `cast` or `partial` names no item.
        """
        request = self._request(
            params=params, opt_state=opt_state, optimizer=optimizer, extras=extras, layout=layout, cast=cast,
            partial=partial, rename=rename, broadcast=broadcast, on_progress=on_progress,
        )  # fmt: skip
        self._settle()
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
        on_progress: Callable[[int, int], object] | None = None,
    ) -> Checkpoint[Params, OptState]:
        """Resumes from the newest good step. If nothing is saved yet, returns the values that it was given.

        Takes the arguments of `restore`, except that `step` is the step of a new run. With `optimizer` a new run
        gets `optimizer.init(params)` as its opt_state. `Checkpoint.resumed` tells whether a step was restored.
        """
        request = self._request(
            params=params, opt_state=opt_state, optimizer=optimizer, extras=extras, layout=layout, cast=cast,
            partial=partial, rename=rename, broadcast=broadcast, on_progress=on_progress,
        )  # fmt: skip
        step = policies.step_number(step)
        self._settle()
        restorer = self._restorer.among(request)
        if restorer.has_steps():
            return restorer.newest(request)
        for name in extras or ():
            items.check_name(name)  # now, and not at the first save
        start: Any = params
        state: Any = restoring.first_state(optimizer, params) if optimizer is not None else opt_state
        return Checkpoint(step=step, params=start, opt_state=state, extras=dict(extras or {}), resumed=False)

    def _settle(self) -> None:
        """Waits until nothing is being saved."""
        self._pending.wait()
        if self._local is not None:
            self._local.wait()

    def _request(
        self, *, extras: Mapping[str, Any] | None, layout: Layout, rename: Mapping[str, str] | None,
        broadcast: bool, **templates: Any,
    ) -> matching.Request:  # fmt: skip
        """Checks the arguments before anything is read."""
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
        """The newest committed step, trusted or not; None if there is none."""
        return max(self._catalog.steps(), default=None)

    def watch(
        self, after: int | None = None, *, timeout_s: float | None = None, poll_s: float = 1.0
    ) -> Iterator[int]:
        """Yields each committed step once and in order, also those of another process; for evaluators.

        Damaged and distrusted steps are not yielded. A step is yielded again if it is replaced, saved again after
        a rewind, or trusted again.

        Args:
          after: only steps after this one; None: all, those that exist already first.
          timeout_s: ends after so many seconds without a new step; None: never.
          poll_s: seconds between two looks at the directory.
        """
        return self._history.watch(after, timeout_s, poll_s)

    def best(self, metric: str | None = None, *, mode: Literal["min", "max"] = "min") -> int | None:
        """The step with the best value of a metric; of equal values the newer step. None if no step has it.

        Without arguments the first `ckptmgr.best` in `keep` gives the metric and the mode.
        """
        return self._history.best(metric, mode)

    def info(self, step: int) -> CheckpointInfo:
        """What is known of a step; no array is read."""
        step = policies.step_number(step)
        self._pending.settle(step)
        return self._history.info(step)

    def infos(self) -> list[CheckpointInfo]:
        """What is known of every readable step, in order."""
        return self._history.all()

    def diff(self, step: int, *, params: PyTree = None, opt_state: PyTree = None) -> StructureDiff:
        """How the templates differ from a step; falsy if they do not differ."""
        step = policies.step_number(step)
        self._catalog.require(step)
        return matching.compare(self._catalog.manifest(step), params, opt_state)

    def verify(
        self, step: int | None = None, *, on_progress: Callable[[int, int], object] | None = None
    ) -> VerifyReport:
        """Reads every file and every array of a step, in bounded memory, and reports all damage.

        Args:
          step: the number of the step; default: the newest.
          on_progress: called with two numbers: the bytes of arrays read so far, and those of all arrays.
        """
        number = self.latest() if step is None else policies.step_number(step)
        if number is None:
            raise self._catalog.nothing_good({})
        self._pending.settle(number)
        return verifying.verify_step(self._catalog, number, on_progress)

    def delete(self, step: int) -> None:
        """Deletes a step, pinned or not. Its copy in the mirror stays: a restore may take the step from there."""
        step = policies.step_number(step)
        with self._saver.turn(step):
            self._saver.require_open(step, "deleted")
            self._pending.wait()
            self._aftermath.delete(step)
            if self._local is not None:
                self._local.forget(step)

    def rewind(self, step: int) -> None:
        """Lets the run go on from an earlier step: later steps are set aside, and nothing is deleted.

        Steps that were set aside are not listed, and retention does not delete them. A rewind to one of them
        brings it back, with the steps before it, and sets aside what was saved instead. If a listed step has the
        same number, the listed step is meant. The same is done in the mirror. All processes of a job must make
        the call.

        Waits for the save in progress and for the mirror. If the process is killed during a rewind, the next
        manager that may write finishes it.

        Raises:
          CheckpointNotFoundError: the step is neither listed nor set aside; the message says which are.
          CorruptCheckpointError: the step is damaged (its manifest, or the size of a file).
          SaveError: the manager is read-only or closed, a save has failed, or the mirror cannot be used.
        """
        step = policies.step_number(step)
        with self._saver.turn(step):
            self._saver.require_open(step, "rewound to")
            if self._pending.is_current() and self._job.count > 1:
                raise SaveError(f"rewind({step}): all processes must make it; a callback runs in one", step=step)
            call = Call(f"the rewind to step {step}")
            self._job.together(call, self._pending.wait)

            with self._job.working():  # in a bucket each file is copied
                moved = self._job.decide(call, lambda: self._aftermath.rewind(step))
            self._saver.after_rewind()
            self._aftermath.go_on_from(step, moved)

    def pin(self, step: int) -> None:
        """Keeps a step whatever retention says, until `unpin`."""
        self._mark(step, self._catalog.pin)

    def unpin(self, step: int) -> None:
        """Lets retention delete a step again."""
        self._mark(step, self._catalog.unpin)

    def distrust(self, step: int, why: str) -> None:
        """Says that a step is not to be used: `restore()` passes over it, until `trust`.

        A distrusted step is never the best one, and retention does not count it: it is no reason to delete another
        step. It is there as long as the policies of `keep` would keep it if it were trusted. A save of its number
        replaces it, unless it is pinned. `why` is shown wherever the step is passed over.
        """
        if not isinstance(why, str) or not why.strip():
            raise ValueError(f"distrust({step}) needs to know why: a text that is not empty, not {why!r}")
        self._mark(step, lambda step: self._aftermath.distrust(step, why), "distrusted")

    def trust(self, step: int) -> None:
        """Takes back `distrust`, and what `nonfinite="distrust"` has found in a step."""
        self._mark(step, self._aftermath.trust, "trusted")

    def _mark(self, step: int, mark: Callable[[int], None], what: str = "pinned or unpinned") -> None:
        step = policies.step_number(step)
        with self._saver.turn(step):
            self._saver.require_open(step, what)
            self._pending.settle(step)
            self._aftermath.mark(step, mark)
