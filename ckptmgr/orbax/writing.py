"""Writes the items of a step with Orbax's own manager, synchronously, into the directory that it is given.

Orbax makes the directories, calls the writers of the items in their order, and writes its metadata, so that the
files stay Orbax's. The writers are ours. What Orbax calls a commit is left out: the commit is a rename, or the
last file in a bucket, and comes after the manifest (`ckptmgr/saving/committing.py`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from ckptmgr.arrays import writing
from ckptmgr.arrays.to_host import Plan
from ckptmgr.format import files, names
from ckptmgr.format import manifest as manifests
from ckptmgr.orbax import item_files

Item = writing.Snapshot | Callable[[], Any]
"""The copies of arrays, or a function that gives a JSON value once it has arrived."""


def write(
    directory: epath.Path,
    items: Mapping[str, Item],
    compression: str | None,
    *,
    made: Callable[[], None] = lambda: None,
    written: Callable[[], None] = lambda: None,
) -> None:
    """Writes a step into a directory, which Orbax makes. In several processes only process 0 calls it.

    It tells Orbax that it is alone: Orbax's own barriers take no bound from us, and some of them run programs on
    the devices, between those of the training.

    Args:
      directory: named after the step; what is there is removed.
      made: called once the directories of the items are there.
      written: called once the arrays are written; may wait for those of other processes, which are then merged.
    """
    everything = {
        name: ocp.args.StandardSave(item) if isinstance(item, writing.Snapshot) else ocp.args.JsonSave(item)
        for name, item in items.items()
    }
    with concurrent.futures.ThreadPoolExecutor() as threads:  # at the first failure the others are waited for
        arrays = _ArraysHandler(compression, made, written, threads)
        with _open(directory.parent, arrays, threads) as manager:
            manager.save(
                int(directory.name),
                args=ocp.args.Composite(**everything),
                force=True,
                custom_metadata=names.SIGNATURE,
            )


def _open(root: epath.Path, arrays: _ArraysHandler, threads: concurrent.futures.Executor) -> ocp.CheckpointManager:
    """A manager for one save: it costs 0.25 ms, and remembers nothing of the save before."""
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
        """Not asked here: JAX's counter of steps must only go up, and `processes.signals` counts it."""
        return False


class _Unlisted(ocp.path.step.NameFormat[Any]):
    """Plain numbers, and nothing is listed: in a bucket Orbax would make a request for each step that is there."""

    def build_name(self, step: int) -> str:
        return str(step)

    def build_metadata(self, step_path: epath.Path, step: int | None = None) -> None:
        return None

    def find_all(self, base_path: epath.PathLike) -> list[Any]:
        return []

    def find_step(self, base_path: epath.PathLike, step: int) -> Any:
        raise ValueError(f"step {step} is not listed")


class _InPlace(ocp.path.atomicity.CommitFileTemporaryPath):
    """A step, or an item in it, that is written where it is to be, and has no marker yet.

    In a bucket the marker shows the step to every reader, so it must come after the manifest. Items need none.
    """

    _metadata: Any = None

    @classmethod
    def from_final(cls, final_path: epath.Path, **options: Any) -> _InPlace:
        made = cls(final_path, final_path, **options)
        made._metadata = options.get("checkpoint_metadata_store")  # only that of the step
        return made

    async def finalize(self) -> None:
        if self._metadata is not None:
            self._metadata.update(
                file_path=self.get() / names.STEP_METADATA, commit_timestamp_nsecs=time.time_ns()
            )


# ---------------------------------------------------------------- handlers


class _ArraysHandler(ocp.StandardCheckpointHandler):
    """Writes the Snapshot it is given; recorded on disk under the name of the handler it stands for."""

    def __init__(
        self,
        compression: str | None,
        made: Callable[[], None],
        written: Callable[[], None],
        threads: concurrent.futures.Executor,
    ) -> None:
        super().__init__()
        self._compression = compression
        self._made, self._written = made, written
        self._threads = threads

    @classmethod
    def typestr(cls) -> str:
        return str(ocp.StandardCheckpointHandler.typestr())

    async def async_save(self, directory: epath.Path, *, args: Any) -> list[Any]:
        self._made()
        await _in(self._threads, lambda: self._write(directory, args.item))
        return []

    def _write(self, directory: epath.Path, snapshot: writing.Snapshot) -> None:
        writing.write(directory / writing.own_part(), snapshot, self._compression)
        _describe(directory, snapshot.plan)

    def finalize(self, directory: epath.Path) -> None:
        self._written()
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
        path = directory / self._name
        await _in(self._threads, lambda: files.write(path, json.dumps(args.item()).encode(), durable=False))
        return []

    def finalize(self, directory: epath.Path) -> None: ...


async def _in(threads: concurrent.futures.Executor, write: Callable[[], None]) -> None:
    """Writes an item beside the others."""
    await asyncio.get_running_loop().run_in_executor(threads, write)


def _describe(directory: epath.Path, plan: Plan) -> None:
    """Writes Orbax's own files about the arrays of an item. They are flushed with all others of the step."""
    for name, data in item_files.files(plan).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, data, durable=False)
