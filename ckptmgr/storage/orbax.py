"""Orbax's own manager, handlers and commit, put together so that the files stay Orbax's.

Orbax keeps the temporary directory, the order of a commit, the barriers between processes and its
metadata. Ours are the writers of the items, and the last act of a commit: the manifest, and the
`fsync` that makes the rename worth something.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import datetime
import inspect
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ckptmgr import catalog, job, paths, policy
from ckptmgr import manifest as manifests
from ckptmgr.storage import arrays, chatter, files

BuildManifest = Callable[[Mapping[str, manifests.File]], bytes]
STEP_METADATA = "_CHECKPOINT_METADATA"
METRICS, STEP = "metrics", "step"

SIGNATURE = {"ckptmgr": {"format": manifests.FORMAT}}
"""In Orbax's metadata of a step of ours: one that has it and no manifest has lost its manifest."""


def json_file(item: str) -> str:
    """The file of an item that is a JSON value; Orbax reads metrics from a file of that name."""
    return METRICS if item == METRICS else "metadata"


def checks_itself(name: str) -> bool:
    """Whether TensorStore checks this file of a step as it reads it: OCDBT's manifests, nodes and chunks."""
    is_read = name.endswith("/manifest.ocdbt") and f"/{arrays.PART}" not in name  # of a part its merger was all
    return is_read or "/d/" in name


# ---------------------------------------------------------------- writing


class Store:
    """One `orbax.checkpoint.CheckpointManager`, and what is to be done at the end of its commits."""

    def __init__(self, directory: epath.Path, *, compression: str | None, timeout_s: float) -> None:
        self._directory = directory
        self._compression = compression
        # How long processes wait for each other in a call of Orbax; then as long again to find out who is missing.
        self.patience_s = timeout_s / 2
        self._build_manifest: BuildManifest | None = None
        self._writers = _Writers()
        self._manager: ocp.CheckpointManager | None = self._open()

    def _open(self) -> ocp.CheckpointManager:
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(None, ocp.args.StandardSave, _ArraysHandler(self._compression, self._writers))
        registry.add(None, ocp.args.JsonSave, _JsonHandler(json_file(""), self._writers))
        registry.add(METRICS, ocp.args.JsonSave, _JsonHandler(json_file(METRICS), self._writers))
        processes = set(range(jax.process_count())) if jax.process_count() > 1 else None
        options = ocp.CheckpointManagerOptions(
            step_name_format=_UnlistedSteps(),
            preservation_policy=ocp.checkpoint_managers.LatestN(n=None),
            temporary_path_class=_commit_class(lambda: self._build_manifest),
            file_options=ocp.options.FileOptions(skip_sync_file_validations=True),
            async_options=ocp.AsyncOptions(
                timeout_secs=int(self.patience_s) or 1,
                barrier_sync_fn=_Barrier(processes),
                # Writers that wait for a directory nobody could create wait for minutes; a few mkdirs are
                # quick, and what stops them is raised by `save` itself.
                create_directories_asynchronously=False,
            ),
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=processes),
            create=False,  # `catalog` has made it
            save_root_metadata=False,
            lightweight_initialize=True,
        )
        with chatter.ours():
            return self._bounded(lambda: _Manager(self._directory, options=options, handler_registry=registry))

    def start(self, step: int, items: Mapping[str, Any], build_manifest: BuildManifest) -> None:
        """Starts writing a step: `items` are Snapshots of arrays, and functions that give JSON values."""
        manager = self._manager = self._manager or self._open()
        with chatter.ours():
            manager.reload()
        self._build_manifest = build_manifest
        arguments = {
            name: ocp.args.StandardSave(item) if isinstance(item, arrays.Snapshot) else ocp.args.JsonSave(item)
            for name, item in items.items()
        }
        self._writers.hold()
        with self._recovering(step):
            everything = ocp.args.Composite(**arguments)
            self._bounded(lambda: manager.save(step, args=everything, force=True, custom_metadata=SIGNATURE))
        self._writers.release()

    def wait(self, step: int) -> None:
        """Waits until the step is durable, or raises what stopped it."""
        with self._recovering(step):
            if self._manager is not None:
                self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _recovering(self, step: int) -> Iterator[None]:
        try:
            with chatter.ours():
                yield
        except BaseException as problem:
            self._recover(step)
            absent = job.absent(problem)
            if not absent:
                raise
            raise TimeoutError(f"{job.spell(absent)} did not come in {self.patience_s} s") from problem

    def _bounded(self, call: Callable[[], Any]) -> Any:
        """Makes a call of Orbax in which processes wait for each other for as long as it pleases Orbax."""
        if jax.process_count() == 1:
            return call()
        called: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def run() -> None:
            try:
                with chatter.ours():
                    called.set_result(call())
            except BaseException as problem:
                called.set_exception(problem)

        threading.Thread(target=run, name="ckptmgr: a call of Orbax", daemon=True).start()
        try:
            return called.result(self.patience_s)
        except concurrent.futures.TimeoutError:
            if called.done():
                raise
            raise TimeoutError(f"another process did not come in {self.patience_s} s") from None

    def _recover(self, step: int) -> None:
        """Makes room again; the next save opens a new manager: one whose commit failed keeps the failure."""
        self._writers.settle(self.patience_s)
        self._manager = None
        unfinished = self._directory / f"{step}{catalog.UNFINISHED if paths.is_local(self._directory) else ''}"
        if jax.process_index() == 0:
            with contextlib.suppress(Exception):  # the failure that is on its way says more
                if unfinished.exists():
                    unfinished.rmtree()

    def close(self) -> None:
        if self._manager is not None:
            with chatter.ours():
                self._manager.close()


class _Barrier:
    """Where Orbax's threads wait for the other processes; one that did not come is not waited for again."""

    def __init__(self, processes: set[int] | None) -> None:
        self._sync = ocp.multihost.get_barrier_sync_fn(processes=processes)
        self._broken: Exception | None = None

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        if self._broken is not None:
            raise self._broken
        try:
            self._sync(key=key, timeout_ms=timeout_ms)
        except Exception as problem:
            if job.absent(problem):
                self._broken = problem
            raise


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Not asked here: JAX's counter of steps must only go up, and `lifecycle` counts it."""
        return False


class _UnlistedSteps(ocp.path.step.NameFormat[Any]):
    """Steps named as Orbax names them, and never listed: `catalog` lists them, from disk, when asked."""

    def build_name(self, step: int) -> str:
        return str(step)

    def build_metadata(self, step_path: epath.Path, step: int | None = None) -> None:
        return None

    def find_all(self, base_path: epath.PathLike) -> list[Any]:
        return []

    def find_step(self, base_path: epath.PathLike, step: int) -> Any:
        raise ValueError(f"step {step} is not listed")


class _Writers:
    """The threads that write the items of one step."""

    def __init__(self) -> None:
        self._started: list[Any] = []
        self._go = threading.Event()

    def hold(self) -> None:
        """None begins before `release`: one that runs beside the caller of `save` only holds it up."""
        self._started.clear()
        self._go.clear()

    def release(self) -> None:
        self._go.set()

    def start(self, write: Callable[[], None]) -> list[Any]:
        """Starts one; what Orbax waits for."""

        async def when_released() -> None:  # Orbax runs it in a thread of its own
            self._go.wait()
            write()

        future = ocp.future.CommitFutureAwaitingContractedSignals(when_released(), name="ckptmgr_writer")
        self._started.append(future)
        return [future]

    def settle(self, timeout_s: float) -> None:
        """Waits until all have ended, however: Orbax goes on at the first that fails."""
        self.release()
        for future in self._started:
            with contextlib.suppress(Exception):
                future.result(timeout_s)


class _ArraysHandler(ocp.StandardCheckpointHandler):
    """Writes the Snapshot it is given; recorded on disk under the name of the handler it stands for."""

    def __init__(self, compression: str | None, writers: _Writers) -> None:
        super().__init__()
        self._compression = compression
        self._writers = writers

    @classmethod
    def typestr(cls) -> str:
        return str(ocp.StandardCheckpointHandler.typestr())

    async def async_save(self, directory: epath.Path, *, args: Any) -> list[Any]:
        snapshot, compression = args.item, self._compression
        part = arrays.own_part(directory)
        while snapshot.has_more():  # only under max_host_bytes: what is written makes room for the next copies
            arrays.write_wave(part, snapshot, compression)
            snapshot.collect()

        def write() -> None:
            arrays.write_wave(part, snapshot, compression)
            if jax.process_index() == 0:
                arrays.describe(directory, snapshot.plan)

        return self._writers.start(write)

    def finalize(self, directory: epath.Path) -> None:
        """Called by process 0 once all have written."""
        arrays.merge(directory)


class _JsonHandler(ocp.JsonCheckpointHandler):
    """Writes what the function it is given returns, so that no metric is waited for in the caller."""

    def __init__(self, filename: str, writers: _Writers) -> None:
        super().__init__(filename)
        self._name = filename
        self._writers = writers

    @classmethod
    def typestr(cls) -> str:
        return str(ocp.JsonCheckpointHandler.typestr())

    async def async_save(self, directory: epath.Path, *, args: Any) -> list[Any]:
        if jax.process_index() != 0:
            return []
        return self._writers.start(lambda: files.write(directory / self._name, json.dumps(args.item()).encode()))

    def finalize(self, directory: epath.Path) -> None: ...


# ---------------------------------------------------------------- the commit


def _commit_class(manifest: Callable[[], BuildManifest | None]) -> type[Any]:
    """Orbax's commit by rename, with the manifest and the fsyncs before it.

    Orbax asks for one temporary path for the step and one for each item in it. Only the step's is
    renamed: an item inside a directory that nobody sees needs no second name.
    """

    class Commit(ocp.path.atomicity.AtomicRenameTemporaryPath):
        metadata_store: Any = None

        @classmethod
        def from_final(cls, final_path: epath.Path, **options: Any) -> Commit:
            store = options.get("checkpoint_metadata_store")
            if store is None:
                return cls(final_path, final_path)
            commit: Commit
            if paths.is_local(final_path):
                commit = super().from_final(final_path, **options)
            else:  # object stores cannot rename: there the last file says that the step is whole
                commit = cls(final_path, final_path, **options)
            commit.metadata_store = store
            return commit

        async def finalize(self) -> None:
            if self.metadata_store is not None:
                self._seal(manifest())
                if paths.is_local(self.get()):
                    _publish(self.get(), self.get_final())
                else:
                    self._say_committed()

        def _seal(self, build: BuildManifest | None) -> None:
            directory = self.get()
            self.metadata_store.wait_until_finished()
            self.metadata_store.update(file_path=directory / STEP_METADATA, commit_timestamp_nsecs=time.time_ns())
            self.metadata_store.wait_until_finished()
            if paths.is_local(directory):
                self._say_committed()
            files.flush(directory / STEP_METADATA)
            folders, sizes = files.walk(directory)
            if build is not None:
                files.write(
                    directory / manifests.NAME, build(manifests.record_files(directory, sizes, checks_itself))
                )
            files.sync(folders)

        def _say_committed(self) -> None:
            said = f"Checkpoint commit was successful to {self.get_final()}"
            files.write(self.get() / catalog.COMMITTED, said.encode())

    return Commit


def _publish(written: epath.Path, final: epath.Path) -> None:
    """Gives a written step its name. One that has the name already makes room without a gap."""
    if not final.exists():
        written.rename(final)
    elif _exchange(written, final):
        written.rename(_replaced(final))
    else:
        final.rename(_replaced(final))
        try:
            written.rename(final)
        except OSError:
            _replaced(final).rename(final)
            raise
    files.sync([final.parent])
    if _replaced(final).exists():
        if (_replaced(final) / catalog.PIN).exists():
            files.write(final / catalog.PIN, (_replaced(final) / catalog.PIN).read_bytes())
        catalog.remove(_replaced(final))


def _replaced(final: epath.Path) -> epath.Path:
    return final.parent / f"{final.name}{catalog.REPLACED}"


def _exchange(one: epath.Path, other: epath.Path) -> bool:
    """Swaps two names at once (renameat2 with RENAME_EXCHANGE, Linux); False where that cannot be."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


# ---------------------------------------------------------------- Orbax's own policies


def adapt_save(given: Any) -> Any:
    """A SaveDecisionPolicy of Orbax as one of ours; anything else as it is."""
    decide = getattr(given, "should_save", None)
    is_orbax = callable(decide) and "previous_steps" in inspect.signature(decide).parameters
    return _OrbaxSave(given) if is_orbax and not isinstance(given, type) else given


def adapt_keep(given: Any) -> Any:
    """A PreservationPolicy of Orbax as one of ours; anything else as it is."""
    is_orbax = hasattr(given, "should_preserve") and not isinstance(given, type)
    return _OrbaxKeep(given) if is_orbax else given


def _for_orbax(record: policy.Record) -> Any:
    when = datetime.datetime.fromtimestamp(record.time, datetime.UTC)
    return _PolicyRecord(record.step, when, dict(record.metrics))


class _PolicyRecord:
    """What Orbax's policies look at."""

    def __init__(self, step: int, when: datetime.datetime, metrics: dict[str, float]) -> None:
        self.step = step
        self.time = when
        self.metrics = metrics or None


class _OrbaxSave:
    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __repr__(self) -> str:
        return repr(self._wrapped)

    def should_save(self, step: int, *, now: float, last: policy.Record | None) -> bool:
        this = _PolicyRecord(step, datetime.datetime.fromtimestamp(now, datetime.UTC), {})
        context = ocp.checkpoint_managers.DecisionContext(
            is_saving_in_progress=False,
            reached_preemption=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(),
        )
        previous = [_for_orbax(last)] if last else []
        return bool(self._wrapped.should_save(this, previous, context=context))


class _OrbaxKeep:
    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __repr__(self) -> str:
        return repr(self._wrapped)

    def keep(self, history: Sequence[policy.Record]) -> set[int]:
        records = [_for_orbax(record) for record in history]
        context = ocp.checkpoint_managers.PreservationContext()
        verdicts = self._wrapped.should_preserve(records, context=context)
        return {record.step for record, keep in zip(records, verdicts, strict=True) if keep}
