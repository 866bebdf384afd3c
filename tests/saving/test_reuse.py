"""`reuse_unchanged`: what did not change is not written again, and each step stands alone all the same."""

import errno
import gc
import itertools
import os
import re
import signal
import uuid
from pathlib import Path

import faults
import jax
import jax.numpy as jnp
import member
import numpy as np
import orbax.checkpoint as ocp
import pytest
import warm
from conftest import counted, on_servers
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_job import lines, start

import ckptmgr
from ckptmgr import CheckpointManager
from ckptmgr.arrays import to_host, unchanged

MILLION = 1 << 20


def array(seed, nbytes=MILLION):
    return jnp.asarray(np.random.default_rng(seed).random(nbytes // 4, np.float32))


def on_disk(directory):
    """The bytes of all files, those with several names once."""
    found = [each.stat() for each in Path(directory).rglob("*") if each.is_file()]
    return sum({each.st_ino: each.st_blocks * 512 for each in found}.values())


def bits(leaf):
    is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()


def check(manager, step, want):
    found = manager.restore(step).params
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for have, meant in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert bits(have) == bits(meant)
    assert manager.verify(step)


def stock_restores(directory, step, want):
    with ocp.CheckpointManager(directory) as manager:
        template = ocp.args.StandardRestore(jax.tree.map(jnp.zeros_like, want))
        found = manager.restore(step, args=ocp.args.Composite(params=template))["params"]
    for have, meant in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert np.asarray(have).tobytes() == np.asarray(meant).tobytes()


def test_a_further_step_takes_the_disk_of_what_changed_and_each_step_stands_alone(tmp_path, monkeypatch):
    frozen = {f"layer {n}": array(n) for n in range(8)}
    copied = []
    real = to_host.collect
    monkeypatch.setattr(
        to_host, "collect", lambda *given, **how: (copied.append(len(given[2])), real(*given, **how))[1]
    )
    states, used = {}, []
    with CheckpointManager(tmp_path, reuse_unchanged=True) as manager:
        for step in range(1, 11):
            states[step] = {"frozen": frozen, "trained": array(100 + step, 1 << 16)}
            manager.save(step, states[step]).result()
            manager.wait()
            used.append(on_disk(tmp_path))
        assert copied == [9] + 9 * [1]
        assert max(after - before for before, after in itertools.pairwise(used)) < 3 * (1 << 16)
        for step in (1, 3):
            manager.delete(step)
        for step in manager.steps():
            check(manager, step, states[step])
    for step in (2, 10):
        stock_restores(tmp_path, step, states[step])


def logged(caplog):
    return [each.getMessage() for each in caplog.records if each.name == "ckptmgr"]


def nbytes_of(text):
    number, unit = text.split()
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6}[unit]


def test_the_log_says_what_was_written_and_what_is_shared(tmp_path, caplog):
    caplog.set_level("INFO", "ckptmgr")
    params = {"frozen": array(0, 4 * MILLION), "trained": array(1, 1 << 16)}
    with CheckpointManager(tmp_path, reuse_unchanged=True) as manager:
        for step in (1, 2, 3):
            params["trained"] = array(step, 1 << 16)
            size = manager.save(step, params).result().disk_nbytes
    found = [re.search(r"saved: (.*) written and (.*) shared with", each) for each in logged(caplog)]
    written, shared = zip(*[map(nbytes_of, each.groups()) for each in found if each], strict=True)
    assert shared[0] == 0
    assert written[0] > 4 * MILLION
    assert all(each > 4 * MILLION for each in shared[1:])
    assert all(each < 1 << 18 for each in written[1:])
    assert written[2] + shared[2] == pytest.approx(size, rel=0.02)
    assert "reused nothing" not in caplog.text


@pytest.mark.parametrize(("nbytes", "warnings"), [(2 * MILLION, 1), (MILLION // 2, 0)], ids=["large", "small"])
def test_a_step_that_returns_the_frozen_arrays_is_warned_of_once(tmp_path, caplog, nbytes, warnings):
    state = {"frozen": array(0, nbytes), "trained": jnp.ones(3)}
    step_of = jax.jit(lambda state: state | {"trained": state["trained"] + 1})
    with CheckpointManager(tmp_path, reuse_unchanged=True) as manager:
        for step in range(1, 7):
            state = step_of(state)
            manager.save(step, state)
            manager.wait()
            assert caplog.text.count("reused nothing in steps 2 and 3") == (warnings if step >= 3 else 0)


def test_what_is_reused_at_the_third_save_is_no_reason_to_warn(tmp_path, caplog):
    """A large part is trained: what is frozen is written apart at the second save, and shared from then on."""
    frozen = array(0, 2 * MILLION)
    with CheckpointManager(tmp_path, reuse_unchanged=True) as manager:
        for step in (1, 2, 3, 4):
            manager.save(step, {"frozen": frozen, "trained": array(step, 8 * MILLION)})
        manager.wait()
    assert "reused nothing" not in caplog.text


def test_without_the_option_everything_is_written(tmp_path):
    params = {"frozen": array(0)}
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, params)
    assert on_disk(tmp_path) > 2 * MILLION


def test_what_changes_now_and_then_is_kept_in_between_and_no_step_holds_twice_what_it_needs(tmp_path):
    """As a target network does, beside a large model that is trained, and a small base that is not."""
    base, target = array(0, 2 * MILLION), array(1, 4 * MILLION)
    with CheckpointManager(tmp_path, reuse_unchanged=True) as manager:
        for step in range(1, 13):
            target = array(step, 4 * MILLION) if step % 4 == 0 else target
            params = {"base": base, "target": target, "trained": array(100 + step, 8 * MILLION)}
            manager.save(step, params).result()
            check(manager, step, params)
            size = sum(each.stat().st_size for each in (tmp_path / str(step)).rglob("*") if each.is_file())
            assert size < 2 * 14 * MILLION
        written = [each.name for each in (tmp_path / "12" / "params").iterdir() if "." in each.name]
    assert set(written) == {"manifest.ocdbt", "unchanged.4"}  # apart once more when the target first changed


@settings(max_examples=counted(8, full=200), deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_changes_fails_or_is_deleted_each_step_has_what_was_saved(data, tmp_path_factory):
    directory, keys = tmp_path_factory.mktemp("run"), jax.random.split(jax.random.key(0), 1024)
    arrays, states, fresh = {n: array(n, 4096 * (n + 1)) for n in range(6)}, {}, iter(range(100, 10**6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unchanged, "LEAST_BYTES", 1)
        with CheckpointManager(directory, reuse_unchanged=True, keep=data.draw(st.integers(1, 4))) as manager:
            for step in range(1, data.draw(st.integers(3, 12))):
                for n in data.draw(st.sets(st.integers(0, 5))):
                    arrays[n] = array(next(fresh), 4096 * (n + 1))
                params = {"one": {n: arrays[n] for n in range(4)}, "numpy": np.full(3, step), "five": arrays[5]}
                params["one"][9], params["keys"] = arrays[4], keys
                act = data.draw(st.sampled_from(["save"] * 4 + ["fail", "delete", "again"]))
                if act == "fail":
                    with patch.context() as broken:
                        faults.install("fail sync 1", broken.setattr)
                        with pytest.raises(ckptmgr.SaveError):
                            manager.save(step, params).result()
                    continue
                manager.save(step, params)
                states[step] = params
                if act == "again":
                    manager.save(step, params, on_exists="replace")
                manager.wait()
                if act == "delete" and len(manager.steps()) > 1:
                    manager.delete(data.draw(st.sampled_from(manager.steps())))
            for step in manager.steps():
                check(manager, step, states[step])


def test_numpy_arrays_and_new_arrays_are_written_and_a_donated_one_is_refused(tmp_path):
    frozen, numpy = array(0), np.zeros(MILLION // 4, np.float32)
    with CheckpointManager(tmp_path, reuse_unchanged=True) as manager:
        manager.save(1, {"frozen": frozen, "numpy": numpy, "new": array(1)}).result()
        manager.wait()  # what is being written is not shared yet
        numpy += 1
        manager.save(2, {"frozen": frozen, "numpy": numpy, "new": array(2)}).result()
        check(manager, 2, {"frozen": frozen, "numpy": np.ones_like(numpy), "new": array(2)})
        jax.jit(lambda x: x + 1, donate_argnums=0)(frozen)
        assert frozen.is_deleted()
        with pytest.raises((RuntimeError, ckptmgr.CheckpointError)):
            manager.save(3, {"frozen": frozen, "numpy": numpy, "new": array(2)}).result()
        assert manager.steps() == [1, 2]


def test_the_caller_may_donate_what_was_not_copied(tmp_path):
    frozen = array(0)
    meant = np.array(frozen)
    with CheckpointManager(tmp_path, reuse_unchanged=True) as manager:
        manager.save(1, {"frozen": frozen}).result()
        manager.wait()
        accepted = manager.save(2, {"frozen": frozen})
        frozen.delete()
        accepted.result()
        check(manager, 2, {"frozen": meant})


def test_an_array_that_is_gone_is_not_taken_for_a_later_one(tmp_path):
    with CheckpointManager(tmp_path, reuse_unchanged=True) as manager:
        for step in range(1, 9):
            params = {"w": array(step)}
            manager.save(step, params).result()
            manager.wait()
            check(manager, step, params)
            del params
            gc.collect()  # the next array may lie where this one lay


def test_a_step_that_a_restore_has_passed_over_as_damaged_is_no_source(tmp_path):
    frozen = array(0)
    with CheckpointManager(tmp_path, reuse_unchanged=True) as manager:
        for step in (1, 2):
            manager.save(step, {"frozen": frozen, "trained": array(step)})
        manager.wait()
        data = max((tmp_path / "2" / "params" / "d").iterdir(), key=lambda each: each.stat().st_size)
        values = bytearray(data.read_bytes())
        values[len(values) // 2] ^= 1
        data.write_bytes(bytes(values))
        assert manager.restore(params={"frozen": frozen, "trained": frozen}).step == 1
        manager.save(3, {"frozen": frozen, "trained": array(3)}).result()
        assert not list((tmp_path / "3" / "params").glob("written.*"))
        check(manager, 3, {"frozen": frozen, "trained": array(3)})


@pytest.mark.parametrize("number", [errno.EPERM, errno.EMLINK, errno.EXDEV])
def test_where_links_cannot_be_had_the_files_are_copied(tmp_path, monkeypatch, number):
    params = {"frozen": array(0)}

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    with CheckpointManager(tmp_path, reuse_unchanged=True) as manager:
        manager.save(1, params).result()
        monkeypatch.setattr(os, "link", refuse)
        manager.save(2, params).result()
        manager.delete(1)
        check(manager, 2, params)


def test_another_program_removes_the_step_before_meanwhile(tmp_path, monkeypatch):
    params = {"frozen": array(0)}
    with CheckpointManager(tmp_path, reuse_unchanged=True) as manager:
        manager.save(1, params).result()
        manager.wait()
        real = unchanged.take_over

        def late(*given):
            (tmp_path / "1").rename(tmp_path / "away")
            return real(*given)

        monkeypatch.setattr(unchanged, "take_over", late)
        with pytest.raises(ckptmgr.SaveError, match="step 2 could not be saved"):
            manager.save(2, params).result()
        monkeypatch.undo()
        manager.save(3, params).result()
        check(manager, 3, params)


def test_ranges_hold_the_keys_of_these_arrays_and_of_no_others():
    prefixes = ["b/", "a/", "a.b/", "c/", "c0/"]
    assert list(unchanged.ranges(prefixes, [0, 1, 2])) == [("a.b/", "b0")]
    assert list(unchanged.ranges(prefixes, [1])) == [("a/", "a0")]
    assert list(unchanged.ranges(prefixes, [2, 0, 4])) == [("a.b/", "a.b0"), ("b/", "b0"), ("c0/", "c00")]
    assert list(unchanged.ranges([""], [0])) == [("", "")]
    assert list(unchanged.ranges(prefixes, [])) == []


NESTED = [("q", "q/lora"), ("", "x"), ("c", "c/c/0"), ("a", "a/zarr.json"), ("linear.w", "linear.w/~/b")]


@pytest.mark.parametrize("names", NESTED, ids=" ".join)
@pytest.mark.parametrize("frozen", [[0], [1], [0, 1]], ids=["the first", "the second", "both"])
def test_names_that_begin_others_never_bring_back_old_values(names, frozen, tmp_path):
    states = {}
    with CheckpointManager(tmp_path, reuse_unchanged=True) as manager:
        kept = {names[n]: array(n, 4 * MILLION) for n in frozen}
        for step in (1, 2, 3):
            changed = {name: array(10 * step + n) for n, name in enumerate(names)}
            states[step] = {**changed, **kept, "z": array(step)}
            manager.save(step, states[step]).result()
        for step, want in states.items():
            check(manager, step, want)


def test_arrays_are_apart_if_no_name_begins_another():
    assert unchanged.are_apart(["b/", "a/", "a.b/", "c/", "c0/"])
    assert unchanged.are_apart([""])
    assert not unchanged.are_apart(["a/", "b/", "a-b/", "a/b/"])
    assert not unchanged.are_apart(["x/", ""])


@pytest.mark.parametrize("nbytes", [4096, 2 * MILLION], ids=["a small part changes", "a large part changes"])
def test_steps_that_are_saved_again_and_below_the_newest(tmp_path, nbytes):
    frozen, states = array(0), {}
    with CheckpointManager(tmp_path, reuse_unchanged=True) as manager:
        for n, step in enumerate([3, 3, 4, 4, 2, 3, 5, 2, 6, 1, 6, 7]):
            states[step] = {"frozen": frozen, "trained": array(n + 1, nbytes)}
            manager.save(step, states[step], on_exists="replace").result()
        for step, want in states.items():
            check(manager, step, want)


def test_a_tree_that_is_one_array(tmp_path):
    params = array(0)
    with CheckpointManager(tmp_path, reuse_unchanged=True) as manager:
        for step in (1, 2, 3):
            manager.save(step, params)
        manager.wait()
        manager.delete(1)
        check(manager, 3, params)
    assert on_disk(tmp_path) < 2 * MILLION


@pytest.mark.parametrize("bound", [None, 3 * MILLION], ids=["all at once", "in waves"])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_sharded_arrays_in_waves_and_compressed(tmp_path, bound, compression):
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    frozen = {n: jax.device_put(array(n, 2 * MILLION), where) for n in range(4)}
    how = {"max_host_bytes": bound, "compression": compression, "chunk_bytes": MILLION // 2}
    with CheckpointManager(tmp_path, reuse_unchanged=True, **how) as manager:
        for step in (1, 2, 3):
            params = {"frozen": frozen, "trained": jax.device_put(array(step, 2 * MILLION), where)}
            manager.save(step, params).result()
        manager.wait()
        assert {each.name for each in (tmp_path / "3" / "params").iterdir()} >= {"written.1"}
        manager.delete(1)
        check(manager, 3, params)
    stock_restores(tmp_path, 3, params)


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_while_it_takes_over_the_step_before_is_whole(tmp_path, when):
    arrays = {n: array(n) for n in range(2)}
    code = f"""
import os, signal, sys
import numpy as np, jax.numpy as jnp, ckptmgr
from ckptmgr.arrays import unchanged
real, seen = unchanged.take_over, []
def take_over(*given):
    seen.append(1)
    if len(seen) == 2 and {when == "before"}: os.kill(os.getpid(), signal.SIGKILL)
    real(*given)
    if len(seen) == 2: os.kill(os.getpid(), signal.SIGKILL)
unchanged.take_over = take_over
params = {{str(n): jnp.asarray(np.random.default_rng(n).random({MILLION} // 4, np.float32)) for n in range(2)}}
with ckptmgr.CheckpointManager({str(tmp_path)!r}, reuse_unchanged=True) as manager:
    for step in (1, 2, 3):
        manager.save(step, params).result()
"""
    process = warm.start(["-c", code])
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL
    with CheckpointManager(tmp_path, reuse_unchanged=True) as manager:
        assert manager.steps() == [1, 2]
        params = {str(n): arrays[n] for n in arrays}
        check(manager, 2, params)
        manager.delete(1)
        manager.save(3, params).result()
        check(manager, 3, params)
        check(manager, 2, params)


@pytest.mark.xdist_group("processes")
def test_each_of_two_processes_takes_over_its_own_part(tmp_path):
    said = lines(start(2, tmp_path, "frozen", 1, 2, 3))
    for process in said:
        first, *others = [int(line.split()[1]) for line in process]
        assert first > 3 * MILLION
        assert max(others) < 1 << 17
    with CheckpointManager(tmp_path) as manager:
        manager.delete(1)
        want = {"rows": member.FROZEN, "same": member.FROZEN + 1, "trained": np.full((64, 64), 3, np.float32)}
        check(manager, 3, want)
    stock_restores(tmp_path, 3, want)


@on_servers
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_in_a_bucket_the_server_copies(servers, scheme):
    run = f"{scheme}://bucket/{uuid.uuid4().hex}/run"
    frozen = array(0)
    with CheckpointManager(run, reuse_unchanged=True) as manager:
        for step in (1, 2, 3):
            params = {"frozen": frozen, "trained": array(step, 4096)}
            manager.save(step, params).result()
            manager.wait()
        new = [each.stat().length for each in (epath.Path(run) / "3" / "params" / "d").iterdir()]
        assert sum(new) < 1 << 15
        manager.delete(1)
        for step in (2, 3):
            check(manager, step, {"frozen": frozen, "trained": array(step, 4096)})
