"""Orbax's manager in our thread, and the last act of a commit."""

import gc
import logging
import os
import threading
from pathlib import Path

import faults
import jax.numpy as jnp
import pytest
from absl import logging as absl_logging

from ckptmgr import CheckpointManager, SaveError
from ckptmgr.run.catalog import Catalog


def test_everything_is_flushed_before_the_step_has_its_name(tmp_path, monkeypatch):
    flushed, before, written = [], [], []
    fsync, publish = os.fsync, Catalog.publish

    def record(descriptor):
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def look(run, step, **how):
        before.extend(flushed)
        draft = Path(run.draft(step))
        written.extend([draft, *draft.rglob("*")])
        return publish(run, step, **how)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Catalog, "publish", look)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": jnp.ones(3)}, metrics={"loss": 1.0})
    tensorstores = {path for path in written if path.parent.name == "d" or path.name == "manifest.ocdbt"}
    ours = {str(path) for path in {*written} - tensorstores}
    assert len(ours) > 10
    assert ours <= set(before)
    assert flushed[len(before) :] == [str(tmp_path)]


def asynchronous():
    """The objects of Orbax that own a thread: one that is collected while a thread starts stops the process."""
    names = {"AsyncCheckpointer", "_AsyncManager", "_FinalizeThread", "CommitFuture", "ThreadRaisingException"}
    return [type(each).__name__ for each in gc.get_objects() if type(each).__name__ in names]


@pytest.mark.parametrize("point", ["arrays", "description", "file", "sync", "publish", "rename"])
def test_saves_that_fail_leave_no_thread_of_orbax_to_the_garbage_collector(point, tmp_path, monkeypatch):
    gc.collect()
    before, stop = asynchronous(), threading.Event()

    def start_threads():
        while not stop.is_set():
            thread = threading.Thread(target=gc.collect, args=(0,))
            thread.start()
            thread.join()

    beside = threading.Thread(target=start_threads)
    beside.start()
    try:
        with CheckpointManager(tmp_path, timeout_s=60) as manager:
            for step in range(3):
                with monkeypatch.context() as patch:
                    faults.install(f"{'full' if step % 2 else 'fail'} {point} 1", patch.setattr)
                    with pytest.raises(SaveError):
                        manager.save(step, {"w": jnp.ones(3)}).result()
                assert asynchronous() == before
                assert manager.save(step, {"w": jnp.ones(3)}).result().step == step
    finally:
        stop.set()
        beside.join()
    assert asynchronous() == before


def test_what_others_log_while_a_step_is_written_keeps_its_level(tmp_path, monkeypatch, caplog):
    levels = []

    def talk(*_):
        thread = threading.Thread(target=absl_logging.error, args=("of the user",))
        thread.start()
        thread.join()
        levels.extend(record.levelno for record in caplog.records if record.getMessage() == "of the user")

    with monkeypatch.context() as patch, CheckpointManager(tmp_path) as manager:
        patch.setattr(
            Catalog, "publish", lambda *given, real=Catalog.publish, **how: (talk(), real(*given, **how))[1]
        )
        manager.save(1, {"w": jnp.ones(3)}).result()
    assert levels == [logging.ERROR]
