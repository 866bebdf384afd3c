"""`restore(on_progress=...)`: what is told, on which thread, and what comes of an error in it."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import ckptmgr
from ckptmgr import CheckpointManager
from ckptmgr.arrays.progress import Meter

KIB = 1 << 10
WIDE = {"wide": np.arange(4 << 20, dtype=np.float32).reshape(64, -1)}
ODD = {
    "half": jnp.ones(7, jnp.bfloat16), "eighth": jnp.ones(9, "float8_e4m3"), "four": jnp.ones(3, "int4"),
    "key": jax.random.key(3), "keys": jax.random.split(jax.random.key(3, impl="rbg"), 4),
    "host": np.ones((3, 4)), "scalar": np.float32(3), "number": 5, "none": jnp.zeros((0, 3)), "empty": {},
}  # fmt: skip


class Told:
    """What on_progress was called with."""

    def __init__(self):
        self.calls, self.threads = [], set()

    def __call__(self, done, total):
        self.calls.append((done, total))
        self.threads.add(threading.get_ident())

    def check(self, total):
        """One step was read: the numbers grow from 0 to the total, which is told once."""
        assert self.calls == sorted(set(self.calls))
        assert {each for _, each in self.calls} == {total}
        assert (self.calls[0], self.calls[-1]) == ((0, total), (total, total))
        assert self.threads == {threading.get_ident()}


def across(axes, leaf):
    """Both axes of a mesh of eight devices, one of them for copies or for another axis of the array."""
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, jax.P(*axes)))


@pytest.fixture(scope="module", params=[None, "zstd"], ids=["plain", "compressed"])
def run(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    with CheckpointManager(directory, compression=request.param, chunk_bytes=256 * KIB) as manager:
        manager.save(1, WIDE | ODD, {"mu": jnp.ones((10, 10))}, extras={"json": {"a": 1}, "bytes": b"1"})
    return directory


@pytest.mark.parametrize("max_host_bytes", [None, 2 << 20])
@pytest.mark.parametrize("layout", [None, ckptmgr.HOST])
def test_a_restore_of_everything_tells_all_bytes_of_the_step(layout, max_host_bytes, run):
    manager, told = CheckpointManager(run, read_only=True, max_host_bytes=max_host_bytes), Told()
    manager.restore(layout=layout, on_progress=told)
    told.check(manager.info(1).nbytes)
    assert len(told.calls) > (10 if max_host_bytes else 1)


@pytest.mark.parametrize("max_host_bytes", [None, 2 << 20])
@pytest.mark.parametrize("axes", ["xy", "y"])
def test_pieces_of_an_array_are_told_as_they_are_read_once_for_each_copy_that_differs(axes, max_host_bytes, run):
    manager, told = CheckpointManager(run, read_only=True, max_host_bytes=max_host_bytes), Told()
    template = {"wide": across(axes, WIDE["wide"])}
    manager.restore(params=template, partial=True, on_progress=told)
    told.check(WIDE["wide"].nbytes)


def test_the_last_number_before_the_end_is_close_to_it(tmp_path):
    """What was read has been counted: the end does not make up for what was forgotten."""
    with CheckpointManager(tmp_path, chunk_bytes=256 * KIB) as manager:
        manager.save(1, WIDE).result()
        for how in ({}, {"max_host_bytes": 2 << 20}):
            told = Told()
            CheckpointManager(tmp_path, read_only=True, **how).restore(on_progress=told)
            assert told.calls[-2][0] == WIDE["wide"].nbytes - 256 * KIB


def test_only_what_is_asked_for_is_counted(run):
    manager, told = CheckpointManager(run, read_only=True), Told()
    manager.restore(opt_state={"mu": jnp.ones((10, 10))}, on_progress=told)
    told.check(400)


@pytest.mark.parametrize("what", ["json", "bytes"])
def test_an_item_without_arrays_has_no_bytes(what, run):
    told = Told()
    CheckpointManager(run, read_only=True).restore(extras={what: None}, on_progress=told)
    assert told.calls == [(0, 0)]


def test_thousands_of_small_leaves_are_told_in_few_calls(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {str(n): np.full(256, n, np.float32) for n in range(6000)}).result()
        told = Told()
        manager.restore(on_progress=told)
    told.check(6000 * KIB)
    assert 3 <= len(told.calls) < 50


def test_a_new_run_tells_nothing_and_a_resumed_one_does(tmp_path):
    told, params = Told(), {"w": jnp.ones(100)}
    with CheckpointManager(tmp_path) as manager:
        assert not manager.restore_or(params=params, on_progress=told).resumed
        assert told.calls == []
        manager.save(1, params, optax.adam(1.0).init(params)).result()
        assert manager.restore_or(params=params, optimizer=optax.adam(1.0), on_progress=told).resumed
    told.check(3 * 400 + 4)


@pytest.mark.parametrize("state", [{}, {"a": {}}, {"none": np.zeros((0, 2))}, {"one": np.ones(1, np.int8)}])
def test_a_state_of_next_to_nothing(state, tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state).result()
        told = Told()
        manager.restore(on_progress=told)
    told.check(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))


def test_a_damaged_newest_step_begins_anew_with_the_one_before(tmp_path):
    with CheckpointManager(tmp_path, chunk_bytes=256 * KIB) as manager:
        for step in (1, 2):
            manager.save(step, WIDE).result()
        largest = max((tmp_path / "2" / "params" / "d").iterdir(), key=lambda path: path.stat().st_size)
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
        told = Told()
        assert manager.restore(on_progress=told).step == 1
    anew = told.calls.index((0, WIDE["wide"].nbytes), 1)
    assert 2 < anew < len(told.calls) - 2
    assert (WIDE["wide"].nbytes,) * 2 not in told.calls[:anew]  # the damaged step was never done
    told.calls = told.calls[anew:]
    told.check(WIDE["wide"].nbytes)


def test_from_the_mirror_and_from_a_local_step(tmp_path):
    with CheckpointManager(tmp_path / "run", mirror=tmp_path / "mirror") as manager:
        manager.save(1, WIDE).result()
        manager.wait()
        manager.delete(1)
        told = Told()
        assert manager.restore(on_progress=told).info.source == str(tmp_path / "mirror")
        told.check(WIDE["wide"].nbytes)
    with CheckpointManager(tmp_path / "far", save_every=10, local=tmp_path / "near") as manager:
        manager.save(7, WIDE).result()
        told = Told()
        assert str(tmp_path / "near") in manager.restore(on_progress=told).info.source
        told.check(WIDE["wide"].nbytes)


def test_a_step_of_stock_orbax(tmp_path):
    with ocp.CheckpointManager(tmp_path) as stock:
        stock.save(1, args=ocp.args.Composite(params=ocp.args.StandardSave(WIDE | {"b": np.ones(3)})))
    told = Told()
    CheckpointManager(tmp_path, read_only=True).restore(on_progress=told)
    told.check(WIDE["wide"].nbytes + 24)


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_what_it_raises_ends_the_restore_and_is_no_damage(error, run):
    def fail(done, total):
        if done:
            raise error("stopped by the caller")

    with CheckpointManager(run) as manager:
        with pytest.raises(error, match="stopped by the caller"):
            manager.restore(on_progress=fail)
        assert manager.restore().skipped == {}
        assert manager.info(1).distrusted is None


@pytest.mark.parametrize("call", ["restore", "restore_or"])
def test_what_cannot_be_called_is_refused_before_anything_is_read(call, tmp_path):
    with CheckpointManager(tmp_path) as manager, pytest.raises(TypeError, match="on_progress takes a callable"):
        getattr(manager, call)(params={"w": np.ones(3)}, on_progress=3)


def test_ten_thousand_chunks_are_told_in_a_hundred_calls():
    told = Told()
    meter = Meter(told, 10_000)
    for _ in range(10_000):
        meter.add(1)
    meter.end()
    told.check(10_000)
    assert 100 <= len(told.calls) < 120
