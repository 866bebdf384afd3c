"""Runs of stock Orbax get a manifest, and from then on every bit of them is watched."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import ckptmgr
from ckptmgr import interop
from ckptmgr.testing import assert_trees_equal

PARAMS = {"w": jnp.arange(3000.0).reshape(50, 60), "b": np.arange(5), "n": 3}


@pytest.fixture(params=[{}, {"use_zarr3": True}, {"use_ocdbt": False}], ids=["zarr2", "zarr3", "no database"])
def run(request, tmp_path):
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    handler = ocp.PyTreeCheckpointHandler(**request.param)
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("params", ocp.args.PyTreeSave, handler)
    registry.add("metrics", ocp.args.JsonSave, ocp.JsonCheckpointHandler("metrics"))
    with ocp.CheckpointManager(tmp_path, options=options, handler_registry=registry) as stock:
        for step in (1, 2):
            state = jax.tree.map(lambda leaf, step=step: leaf * step, PARAMS)
            stock.save(step, args=ocp.args.Composite(params=ocp.args.PyTreeSave(state)))
    return tmp_path


def test_it_restores_as_before_and_is_checked(run):
    assert ckptmgr.CheckpointManager(run, read_only=True).verify(2).unchecked
    assert interop.adopt(run) == [1, 2]
    assert interop.adopt(run) == []
    manager = ckptmgr.CheckpointManager(run, read_only=True)
    report = manager.verify(2)
    assert report
    assert not report.unchecked
    assert_trees_equal(manager.restore(1, params=PARAMS).params, PARAMS)
    with ocp.CheckpointManager(run) as stock:
        assert stock.latest_step() == 2  # and Orbax reads it as ever
        how = ocp.args.PyTreeRestore(PARAMS, ocp.checkpoint_utils.construct_restore_args(PARAMS))
        back = stock.restore(1, args=ocp.args.Composite(params=how)).params
    assert np.array_equal(back["w"], PARAMS["w"])


def test_a_flipped_bit_in_any_file_is_found_once_it_is_adopted(run):
    interop.adopt(run)
    files = [path for path in (run / "2").rglob("*") if path.is_file() and path.stat().st_size]
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        manager = ckptmgr.CheckpointManager(run, read_only=True)
        assert not manager.verify(2), path
        with pytest.raises(ckptmgr.CorruptCheckpointError):
            manager.restore(2, params=PARAMS)
        path.write_bytes(whole)
    assert len(files) > 3


def test_a_step_that_cannot_be_read_is_not_adopted(run):
    for path in (run / "2" / "params").rglob("*"):
        if path.is_file() and path.name not in ("_METADATA", "_sharding"):
            path.write_bytes(b"")
    with pytest.raises(ckptmgr.CorruptCheckpointError, match="step 2"):
        interop.adopt(run)
    assert not (run / "2" / "manifest.json").exists()
    assert (run / "1" / "manifest.json").exists()
