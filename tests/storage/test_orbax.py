"""The last act of a commit."""

import os
from pathlib import Path

import jax.numpy as jnp

from ckptmgr import CheckpointManager
from ckptmgr.storage import orbax


def test_everything_is_flushed_before_the_step_has_its_name(tmp_path, monkeypatch):
    flushed, before, written = [], [], []
    fsync, publish = os.fsync, orbax._publish

    def record(descriptor):
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def look(directory, final):
        before.extend(flushed)
        written.extend([Path(directory), *Path(directory).rglob("*")])
        publish(directory, final)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(orbax, "_publish", look)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": jnp.ones(3)}, metrics={"loss": 1.0})
    ours = {str(path) for path in written if not orbax.checks_itself(str(path))}  # TensorStore flushes the rest
    assert len(ours) > 10
    assert ours <= set(before)
    assert flushed[len(before) :] == [str(tmp_path)]
