"""Orbax's own manager, handlers and commit, put together so that the files stay Orbax's.

Orbax makes the directories, writes its metadata, and calls the writers of the items and the commit in their
order. The writers and the commit are ours: the manifest and every file are flushed before the rename.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ckptmgr.arrays import writing
from ckptmgr.arrays.to_host import Plan
from ckptmgr.errors import CheckpointError, SaveError
from ckptmgr.format import files, names, paths
from ckptmgr.format import manifest as manifests
from ckptmgr.orbax import item_files
from ckptmgr.processes.job import Call, Job
from ckptmgr.run.catalog import Catalog
from ckptmgr.saving import sealing

BuildManifest = Callable[[Mapping[str, manifests.File]], bytes]

# ---------------------------------------------------------------- writing


class Store:
    """Writes steps with Orbax's manager, synchronously: for a thread beside the training.

    Of several processes only process 0 calls Orbax, which it tells that it is alone: Orbax's own barriers take
    no bound from us, and some of them run programs on the devices, between those of the training. The others
    write their arrays beside those of process 0.
    """

    def __init__(self, run: Catalog, *, compression: str | None, job: Job) -> None:
        self._run = run
        self._compression = compression
        self._job = job

    def write(
        self,
        step: int,
        items: Mapping[str, Any],
        build_manifest: BuildManifest,
        own: Collection[str] = (),
        *,
        replaces: bool = False,
    ) -> None:
        """Returns once a step is durable; raises what stopped it, and leaves nothing of it.

        `items` are Snapshots of arrays, and functions that give JSON values; of those in `own` each process
        writes its own.
        """
        snapshots = {name: item for name, item in items.items() if isinstance(item, writing.Snapshot)}
        stages = _Stages(step, self._job)
        try:
            with self._job.working():
                if self._job.leads:
                    meant = self._meant(step, items, own)

                    def commit() -> None:
                        _commit(self._run, step, meant, build_manifest, replaces)

                    self._lead(step, items, commit, stages)
                else:
                    self._follow(self._run.draft(step), snapshots, {name: items[name] for name in own}, stages)
        except BaseException:
            if self._job.leads:
                self._run.discard(step)
            raise
        finally:
            for snapshot in snapshots.values():
                snapshot.release()

    def _meant(self, step: int, items: Mapping[str, Any], own: Collection[str]) -> Callable[[], sealing.Meant]:
        """What the step is to hold, asked for once the metrics have arrived."""

        def meant() -> sealing.Meant:
            plans = {name: item.plan for name, item in items.items() if isinstance(item, writing.Snapshot)}
            others = range(1, jax.process_count())
            texts = {
                f"{name}/{manifests.json_file(name)}": json.dumps(items[name]()).encode()
                for name in items.keys() - plans
            }
            texts |= {
                f"{item}/{name}": data
                for item, plan in plans.items()
                for name, data in item_files.files(plan).items()
            }
            texts[names.STEP_METADATA] = _metadata(step, self._run.draft(step), set(items))
            if paths.is_local(self._run.directory):
                texts[names.COMMITTED] = _marker(self._run, step)
            told = {
                f"{name}/{manifests.own_place(each, manifests.json_file(name))}"
                for name in {*own} - {*plans}
                for each in others
            }
            parts = {
                f"{name}/{manifests.own_place(each)}": plans[name]
                for name in plans
                if name in own
                for each in others
            }
            return sealing.Meant(texts, frozenset(told), parts | plans, self._compression)

        return meant

    def _lead(self, step: int, items: Mapping[str, Any], commit: Callable[[], None], stages: _Stages) -> None:
        everything = {
            name: ocp.args.StandardSave(item) if isinstance(item, writing.Snapshot) else ocp.args.JsonSave(item)
            for name, item in items.items()
        }
        self._run.discard(step)
        with concurrent.futures.ThreadPoolExecutor() as threads:  # at the first failure the others are waited for
            manager = self._open(self._run.begin(step), commit, stages, threads)
            try:
                manager.save(
                    step, args=ocp.args.Composite(**everything), force=True, custom_metadata=names.SIGNATURE
                )
                stages.reach("commit")
            except Exception as problem:
                stages.fail(problem)
                raise
            finally:
                manager.close()

    def _open(
        self, draft: epath.Path, commit: Callable[[], None], stages: _Stages, threads: concurrent.futures.Executor
    ) -> ocp.CheckpointManager:
        """A manager for one save: it costs 0.25 ms, and remembers nothing of the save before."""
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(None, ocp.args.StandardSave, _ArraysHandler(self._compression, stages, threads))
        registry.add(None, ocp.args.JsonSave, _JsonHandler(manifests.json_file(""), threads))
        registry.add(
            manifests.METRICS, ocp.args.JsonSave, _JsonHandler(manifests.json_file(manifests.METRICS), threads)
        )
        options = ocp.CheckpointManagerOptions(
            step_name_format=_Draft(draft.name),
            preservation_policy=ocp.checkpoint_managers.LatestN(n=None),
            temporary_path_class=_commit_class(commit),
            enable_async_checkpointing=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0}),
            create=False,  # `catalog` has made it
            save_root_metadata=False,
            lightweight_initialize=True,
        )
        return _Manager(draft.parent, options=options, handler_registry=registry)

    def _follow(
        self, draft: epath.Path, snapshots: Mapping[str, writing.Snapshot], own: Mapping[str, Any], stages: _Stages
    ) -> None:
        """What a process that does not lead does: it writes its arrays once process 0 has made the directories."""
        here = jax.process_index()
        parts = {name: manifests.own_place(here) if name in own else writing.own_part() for name in snapshots}
        stages.reach("directories")
        try:
            for name in own.keys() - snapshots.keys():
                files.write(
                    draft / name / manifests.own_place(here, manifests.json_file(name)),
                    json.dumps(own[name]()).encode(),
                )
            with concurrent.futures.ThreadPoolExecutor() as threads:
                for _ in threads.map(
                    lambda name: _write(draft / name / parts[name], snapshots[name], self._compression), snapshots
                ):
                    pass
        except Exception as problem:
            stages.fail(problem)
            raise
        stages.reach("arrays")
        stages.reach("commit")


class _Stages:
    """Where the processes of a job wait for each other in a save; what fails in one fails in all.

    "directories": process 0 has made them. "arrays": all have written theirs. "commit": the step has its name.
    """

    def __init__(self, step: int, job: Job) -> None:
        self._step, self._job = step, job
        self._ahead = ["directories", "arrays", "commit"]

    def reach(self, stage: str) -> None:
        """Passes a stage, once; raises what has failed in another process."""
        if stage in self._ahead:
            self._pass(None)

    def fail(self, problem: Exception) -> None:
        """Tells the others at the next stage; a failure that came from them is known to all."""
        if self._ahead:
            with contextlib.suppress(CheckpointError):
                self._pass(problem)

    def _pass(self, problem: Exception | None) -> None:
        stage = self._ahead.pop(0)
        call = Call(f"the {stage}", self._step)
        try:
            if stage == "arrays":
                self._job.share(call, problem)
            else:
                self._job.tell(call, problem)
        except Exception:
            self._ahead.clear()
            raise


def _write(directory: epath.Path, snapshot: writing.Snapshot, compression: str | None) -> None:
    """Writes this process's part of an item."""
    writing.write_wave(directory, snapshot, compression)
    while snapshot.has_more():  # only under max_host_bytes: what is written makes room for the next copies
        snapshot.collect()
        writing.write_wave(directory, snapshot, compression)


async def _in(threads: concurrent.futures.Executor, write: Callable[[], None]) -> None:
    """Writes an item beside the others."""
    await asyncio.get_running_loop().run_in_executor(threads, write)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Not asked here: JAX's counter of steps must only go up, and `lifecycle` counts it."""
        return False


class _Draft(ocp.path.step.NameFormat[Any]):
    """Orbax is told to save a draft, which `_commit` makes the step. Nothing is listed: `catalog` lists steps.

    Were Orbax told the step's own name, it would remove a step that is there before it writes the new one.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def build_name(self, step: int) -> str:
        return self._name

    def build_metadata(self, step_path: epath.Path, step: int | None = None) -> None:
        return None

    def find_all(self, base_path: epath.PathLike) -> list[Any]:
        return []

    def find_step(self, base_path: epath.PathLike, step: int) -> Any:
        raise ValueError(f"step {step} is not listed")


class _ArraysHandler(ocp.StandardCheckpointHandler):
    """Writes the Snapshot it is given; recorded on disk under the name of the handler it stands for."""

    def __init__(self, compression: str | None, stages: _Stages, threads: concurrent.futures.Executor) -> None:
        super().__init__()
        self._compression = compression
        self._threads = threads
        self._stages = stages

    @classmethod
    def typestr(cls) -> str:
        return str(ocp.StandardCheckpointHandler.typestr())

    async def async_save(self, directory: epath.Path, *, args: Any) -> list[Any]:
        self._stages.reach("directories")
        await _in(self._threads, lambda: self._write(directory, args.item))
        return []

    def _write(self, directory: epath.Path, snapshot: writing.Snapshot) -> None:
        _write(directory / writing.own_part(), snapshot, self._compression)
        _describe(directory, snapshot.plan)

    def finalize(self, directory: epath.Path) -> None:
        self._stages.reach("arrays")
        writing.merge(directory)


class _JsonHandler(ocp.JsonCheckpointHandler):
    """Writes what the function it is given returns: the caller of `save` waits for no metric."""

    def __init__(self, filename: str, threads: concurrent.futures.Executor) -> None:
        super().__init__(filename)
        self._name = filename
        self._threads = threads

    @classmethod
    def typestr(cls) -> str:
        return str(ocp.JsonCheckpointHandler.typestr())

    async def async_save(self, directory: epath.Path, *, args: Any) -> list[Any]:
        await _in(self._threads, lambda: files.write(directory / self._name, json.dumps(args.item()).encode()))
        return []

    def finalize(self, directory: epath.Path) -> None: ...


# ---------------------------------------------------------------- the commit


def _commit_class(commit: Callable[[], None]) -> type[Any]:
    """Where Orbax writes, which is in place: `commit` gives the step its name.

    Orbax asks for one path for the step and one for each item in it.
    """

    class Commit(ocp.path.atomicity.CommitFileTemporaryPath):
        metadata_store: Any = None

        @classmethod
        def from_final(cls, final_path: epath.Path, **options: Any) -> Commit:
            made = cls(final_path, final_path, **options)
            made.metadata_store = options.get("checkpoint_metadata_store")
            return made

        async def finalize(self) -> None:
            if self.metadata_store is not None:  # that of the step; its items need nothing
                self.metadata_store.update(
                    file_path=self.get() / names.STEP_METADATA, commit_timestamp_nsecs=time.time_ns()
                )
                commit()

    return Commit


def _metadata(step: int, draft: epath.Path, items: set[str]) -> bytes:
    """What Orbax wrote about the step, if it is about this one."""
    try:
        data = paths.read_bytes(draft / names.STEP_METADATA)
        found = json.loads(data)
        if found["custom_metadata"] == names.SIGNATURE and items <= found["item_handlers"].keys():
            return data
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise SaveError(
        f"{draft / names.STEP_METADATA} is not what Orbax wrote: step {step} is not committed", step=step
    )


def _marker(run: Catalog, step: int) -> bytes:
    return f"Checkpoint commit was successful to {run.directory / str(step)}".encode()


def _commit(
    run: Catalog, step: int, meant: Callable[[], sealing.Meant], build_manifest: BuildManifest, replaces: bool
) -> None:
    """Makes a draft the step: every file is flushed, the manifest written, then it gets its name."""
    draft, said = run.draft(step), _marker(run, step)
    if paths.is_local(draft):
        files.write(draft / names.COMMITTED, said)
    files.flush(draft / names.STEP_METADATA)
    folders, sizes = files.walk(draft)
    recorded = manifests.record_files(draft, sizes, manifests.checks_itself)
    sealing.check(step, draft, meant(), recorded)
    files.write(draft / manifests.NAME, build_manifest(recorded))
    run.keep_pin(step)
    files.sync(folders)
    if not paths.is_local(draft):  # object stores cannot rename: there the last file says that the step is whole
        files.write(draft / names.COMMITTED, said)
    replaced = run.publish(step, replaces=replaces)
    files.sync([run.directory])
    if replaced is not None:
        run.remove(replaced)


def _describe(directory: epath.Path, plan: Plan) -> None:
    """Writes Orbax's own files about the arrays of an item."""
    for name, data in item_files.files(plan).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, data)
