"""Writes the items of a step into a directory, with Orbax's own manager, synchronously.

Orbax makes the directories, calls the writers of the items in order, and writes its metadata, so that the files
are Orbax's. The writers are ours. Orbax's own commit is left out: ours is a rename, or the last file in a bucket,
and it comes after the manifest (`ckptmgr/saving/committing.py`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ckptmgr.arrays import database, writing
from ckptmgr.arrays.to_host import Plan
from ckptmgr.format import files, names, paths
from ckptmgr.format import manifest as manifests
from ckptmgr.orbax import item_files

Item = writing.Snapshot | Callable[[], Any]
"""The copies of arrays, or a function that returns a JSON value once it has arrived."""


def write(
    directory: epath.Path,
    items: Mapping[str, Item],
    compression: str | None,
    *,
    made: Callable[[], object] = lambda: None,
    written: Callable[[], None] = lambda: None,
    check: database.Check = lambda: None,
) -> Mapping[str, bytes]:
    """Writes a step into a directory, which Orbax makes. In a job only process 0 calls this.

    In a bucket Orbax would make some fifty requests, one after the other. So its small files are written on this
    machine, and then put into the bucket, many at a time. The arrays go straight to the bucket. Returns what was
    put there, by the names of the files; on a disk nothing.

    It tells Orbax that there is one process only: Orbax's own barriers have no bound that we can set, and some of
    them run programs on the devices, between those of the training.

    Args:
      directory: its name is the number of the step. On a disk it is removed first; in a bucket it must be empty.
      made: called once the directories of the items exist.
      written: called once the arrays are written. It may wait for other processes, whose arrays are merged then.
      check: raises if this process may not write any more; called before what may write over files of another.
    """
    everything = {
        name: ocp.args.StandardSave(item) if isinstance(item, writing.Snapshot) else ocp.args.JsonSave(item)
        for name, item in items.items()
    }
    put: dict[str, bytes] = {}
    with (
        concurrent.futures.ThreadPoolExecutor() as threads,  # after a failure the other writers are waited for
        _place_for_small_files(directory, check, put) as place,
    ):
        arrays = _ArraysHandler(directory, compression, made, written, check, threads)
        with _open(place.parent, arrays, threads) as manager:
            manager.save(
                int(directory.name),
                args=ocp.args.Composite(**everything),
                force=True,
                custom_metadata=names.SIGNATURE,
            )
    return put


@contextlib.contextmanager
def _place_for_small_files(
    directory: epath.Path, check: database.Check, put: dict[str, bytes]
) -> Iterator[epath.Path]:
    """Where Orbax writes; what it has written there is in the directory of the step afterwards, and in `put`."""
    check()
    if paths.is_local(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory() as scratch:
        place = epath.Path(scratch) / directory.name
        yield place
        check()
        put |= files.put_all(place, directory)


def _open(root: epath.Path, arrays: _ArraysHandler, threads: concurrent.futures.Executor) -> ocp.CheckpointManager:
    """A new manager for each save: that costs 0.25 ms, and nothing of an earlier save is left in it."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(None, ocp.args.StandardSave, arrays)
    registry.add(None, ocp.args.JsonSave, _JsonHandler(manifests.json_file(""), threads))
    metrics = _JsonHandler(manifests.json_file(manifests.METRICS), threads)
    registry.add(manifests.METRICS, ocp.args.JsonSave, metrics)
    options = ocp.CheckpointManagerOptions(
        step_name_format=_Unlisted(),
        preservation_policy=ocp.checkpoint_managers.LatestN(n=None),
        temporary_path_class=_InPlace,
        enable_async_checkpointing=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0}),
        create=False,
        save_root_metadata=False,
        lightweight_initialize=True,
    )
    return _Manager(root, options=options, handler_registry=registry)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Does not ask JAX: its counter of steps must only go up, and `processes.signals` counts it."""
        return False


class _Unlisted(ocp.path.step.NameFormat[Any]):
    """Plain numbers. Nothing is listed: in a bucket Orbax would make a request for each step."""

    def build_name(self, step: int) -> str:
        return str(step)

    def build_metadata(self, step_path: epath.Path, step: int | None = None) -> None:
        return None

    def find_all(self, base_path: epath.PathLike) -> list[Any]:
        return []

    def find_step(self, base_path: epath.PathLike, step: int) -> Any:
        raise ValueError(f"step {step} is not listed")


class _InPlace(ocp.path.atomicity.CommitFileTemporaryPath):
    """Writes a step, or an item, directly under its final name, and without Orbax's marker.

    In a bucket the marker makes the step visible to readers, so it must come after the manifest. Items need none.
    """

    _metadata: Any = None

    @classmethod
    def from_final(cls, final_path: epath.Path, **options: Any) -> _InPlace:
        made = cls(final_path, final_path, **options)
        made._metadata = options.get("checkpoint_metadata_store")  # given for the step, not for items
        return made

    async def finalize(self) -> None:
        if self._metadata is not None:
            self._metadata.update(
                file_path=self.get() / names.STEP_METADATA, commit_timestamp_nsecs=time.time_ns()
            )


# ---------------------------------------------------------------- handlers


class _ArraysHandler(ocp.StandardCheckpointHandler):
    """Writes a Snapshot; recorded on disk under the name of Orbax's own handler."""

    def __init__(
        self,
        step: epath.Path,
        compression: str | None,
        made: Callable[[], object],
        written: Callable[[], None],
        check: database.Check,
        threads: concurrent.futures.Executor,
    ) -> None:
        super().__init__()
        self._step, self._compression = step, compression
        self._made, self._written, self._check = made, written, check
        self._threads = threads

    @classmethod
    def typestr(cls) -> str:
        return str(ocp.StandardCheckpointHandler.typestr())

    async def async_save(self, directory: epath.Path, *, args: Any) -> list[Any]:
        self._made()
        await _in(self._threads, lambda: self._write(directory, args.item))
        return []

    def _write(self, directory: epath.Path, snapshot: writing.Snapshot) -> None:
        part = self._step / directory.name / writing.own_part()
        is_whole = jax.process_count() == 1  # else other processes' parts are merged with this one
        writing.write(part, snapshot, self._compression, self._check, directory if is_whole else None)
        _describe(directory, snapshot.plan)

    def finalize(self, directory: epath.Path) -> None:
        self._written()
        if paths.is_local(self._step) or jax.process_count() > 1:  # to look for parts in a bucket is a request
            self._check()
            writing.merge(self._step / directory.name, self._check, directory)


class _JsonHandler(ocp.JsonCheckpointHandler):
    """Writes what a function returns, called here, so that the caller of `save` waits for no metric."""

    def __init__(self, filename: str, threads: concurrent.futures.Executor) -> None:
        super().__init__(filename)
        self._name = filename
        self._threads = threads

    @classmethod
    def typestr(cls) -> str:
        return str(ocp.JsonCheckpointHandler.typestr())

    async def async_save(self, directory: epath.Path, *, args: Any) -> list[Any]:
        path = directory / self._name
        await _in(self._threads, lambda: files.write(path, json.dumps(args.item()).encode(), durable=False))
        return []

    def finalize(self, directory: epath.Path) -> None: ...


async def _in(threads: concurrent.futures.Executor, write: Callable[[], None]) -> None:
    """Writes an item in a thread, beside the other items."""
    await asyncio.get_running_loop().run_in_executor(threads, write)


def _describe(directory: epath.Path, plan: Plan) -> None:
    """Writes Orbax's own files about the arrays of an item. They are flushed with all others of the step."""
    for name, data in item_files.files(plan).items():
        path = directory / name
        if paths.is_local(path):  # a bucket has no folders; the client would ask whether the bucket is there
            path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, data, durable=False)
