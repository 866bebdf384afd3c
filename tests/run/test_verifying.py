"""Damage of every kind in every file: no restore gives a wrong value, and `verify` names the place."""

import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import counted

import ckptmgr
from ckptmgr import CheckpointManager, CorruptCheckpointError

PARAMS = {
    "w": jax.random.normal(jax.random.key(0), (64, 80)),
    "large": jax.random.normal(jax.random.key(1), (600, 600)),
    "key": jax.random.key(2),
    "half": jnp.ones((3, 5), jnp.bfloat16),
    "small": jnp.ones(7, jnp.int4),
    "numpy": np.arange(100, dtype=np.int16),
    "number": 3,
}
STATE = optax.adam(1e-3).init({"w": PARAMS["w"]})
EXTRAS = {"position": {"epoch": 1}, "ema": {"w": PARAMS["w"]}}
METRICS = {"loss": 1.0}


@pytest.fixture(scope="module", params=[{}, {"compression": "zstd", "chunk_bytes": 10_000}], ids=["plain", "zstd"])
def step(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    with CheckpointManager(directory, **request.param) as manager:
        manager.save(1, PARAMS, STATE, extras=EXTRAS, metrics=METRICS)
    return directory / "1"


def files(step):
    return sorted(path for path in step.rglob("*") if path.is_file())


def check_that_it_is_found(step, path):
    """Restoring raises, and `verify` names the place."""
    manager = CheckpointManager(step.parent, read_only=True)
    with pytest.raises(CorruptCheckpointError) as caught:
        manager.restore(1, params=PARAMS, opt_state=STATE, extras=EXTRAS)
    assert caught.value.step == 1
    assert caught.value.path
    report = manager.verify(1)
    assert not report
    item = path.relative_to(step).parts[0]
    assert any(item in where for where, _ in report.damages), str(report)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(counted(1, full=10)))
def test_flipped_bits(step, seed):
    """Each file gets its share, however small it is: a file is drawn first, then a bit of it."""
    rng = random.Random(seed)
    for _ in range(50):
        path = rng.choice(files(step))
        good = path.read_bytes()
        bit = rng.randrange(8 * len(good))
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            check_that_it_is_found(step, path)
        finally:
            path.write_bytes(good)


@pytest.mark.parametrize("how", ["truncated", "emptied", "removed", "grown"])
def test_files_that_are_short_or_missing_or_long(step, how):
    for path in files(step):
        good = path.read_bytes()
        change = {"truncated": good[:-1], "emptied": b"", "grown": good + b"x"}
        path.write_bytes(change[how]) if how in change else path.unlink()
        try:
            check_that_it_is_found(step, path)
        finally:
            path.write_bytes(good)


def test_a_whole_step_is_said_to_be_whole_and_progress_is_told(step):
    told = []
    report = CheckpointManager(step.parent, read_only=True).verify(on_progress=lambda *at: told.append(at))
    assert report
    assert "whole" in str(report)
    assert report.files == len(files(step)) - 1  # all but the manifest, which checks itself
    assert report.leaves == 7 + 3 + 1
    assert [at for at, _ in told] == sorted(at for at, _ in told)
    assert told[-1] == (report.nbytes, report.nbytes)


def test_what_cannot_be_checked_is_said(tmp_path):
    with ocp.CheckpointManager(tmp_path) as stock:
        stock.save(1, args=ocp.args.Composite(params=ocp.args.StandardSave({"w": PARAMS["large"]})))
    report = CheckpointManager(tmp_path, read_only=True).verify(1)
    assert report
    assert "stock Orbax" in report.unchecked[0]
    shutil.rmtree(tmp_path / "1" / "params" / "ocdbt.process_0")
    report = CheckpointManager(tmp_path, read_only=True).verify(1)
    assert [where for where, _ in report.damages] == ["params['w']"]


def test_there_is_nothing_to_verify_in_an_empty_run(tmp_path):
    with pytest.raises(ckptmgr.CheckpointNotFoundError):
        CheckpointManager(tmp_path).verify()
    with pytest.raises(ckptmgr.CheckpointNotFoundError):
        CheckpointManager(tmp_path).verify(3)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(counted(20, full=200)))
def test_arrays_donated_deleted_or_overwritten_right_after_save(tmp_path, seed):
    """Random sizes and dtypes; the bits that come back are those of the moment of the call."""
    rng = random.Random(seed)
    numbers = np.random.default_rng(seed)
    params, expected, undo = {}, {}, []
    for n in range(rng.randint(1, 6)):
        dtype = rng.choice(["float32", "int32", "bfloat16", "uint8", "bool", "float16"])
        shape = tuple(rng.choice([1, 3, 17, 256, 700]) for _ in range(rng.randint(0, 2)))
        values = numbers.integers(0, 2, shape).astype(jnp.dtype(dtype))
        name, how = f"leaf{n}", rng.choice(["donate", "delete", "overwrite", "alias"])
        expected[name] = values.copy()
        if how == "overwrite":
            params[name] = values
            undo.append(lambda values=values: values.__setitem__(..., 1 - values.astype(np.int8)))
        else:
            params[name] = array = jnp.array(values) if how != "alias" else jnp.array(values).view()
            spoil = jax.jit(lambda x: jnp.zeros_like(x) if x.dtype == bool else x * 0 + 1, donate_argnums=0)
            undo.append(array.delete if how == "delete" else lambda array=array, spoil=spoil: spoil(array))
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, params)
        for each in undo:
            each()
        back = manager.restore(1, layout=ckptmgr.HOST).params
    for name, values in expected.items():
        assert np.asarray(back[name]).tobytes() == values.tobytes(), name
