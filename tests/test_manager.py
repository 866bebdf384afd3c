"""The story of a save and a restore, as a caller sees it."""

import _thread
import concurrent.futures
import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time

import faults
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import visible

import ckptmgr
from ckptmgr import CheckpointManager, best, every_steps, latest
from ckptmgr.arrays import writing as arrays_writing
from ckptmgr.restoring.restorer import Restorer
from ckptmgr.saving.committing import Committer
from ckptmgr.testing import assert_trees_equal

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
ADAM = optax.adam(1e-3)


def state():
    return ADAM.update(jax.tree.map(jnp.ones_like, PARAMS), ADAM.init(PARAMS), PARAMS)[1]


@pytest.fixture
def run(tmp_path):
    """A run with steps 1, 2 and 3; the loss is least at 2."""
    with CheckpointManager(tmp_path / "run") as manager:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
            params = jax.tree.map(lambda leaf, step=step: leaf + step, PARAMS)
            manager.save(step, params, state(), metrics={"loss": loss}, extras={"position": {"epoch": step}})
    return tmp_path / "run"


# ---------------------------------------------------------------- saving


def test_a_checkpoint_is_one_composite_item(run):
    assert sorted(path.name for path in (run / "3").iterdir() if path.is_dir()) == [
        "metrics", "opt_state", "params", "position", "step",
    ]  # fmt: skip
    assert json.loads((run / "3" / "step" / "metadata").read_text()) == 3
    assert json.loads((run / "3" / "metrics" / "metrics").read_text()) == {"loss": 2.0}


def test_save_says_what_it_did_and_why(tmp_path):
    with CheckpointManager(tmp_path, save_every=10) as manager:
        assert not manager.should_save(5)
        skipped = manager.save(5, PARAMS)
        assert not skipped
        assert skipped.reason == "not due by save_every"
        assert skipped.done()
        with pytest.raises(ckptmgr.SaveError, match="was not saved: not due") as caught:
            skipped.result()
        assert caught.value.step == 5
        started = manager.save(10, PARAMS, metrics={"loss": jnp.float32(0.5)})
        assert started
        assert started.reason == "due"
        info = started.result(timeout_s=60)
        assert started.done()
        assert (info.step, info.metrics, info.items) == (10, {"loss": 0.5}, ("params", "step", "metrics"))
        forced = manager.save(11, PARAMS, force=True)
        assert forced.reason == "forced"
        assert "being written" in repr(forced) or "durable" in repr(forced)
    assert forced.done()
    assert CheckpointManager(tmp_path).steps() == [10, 11]


def test_a_synchronous_save_is_durable_when_it_returns(tmp_path):
    with CheckpointManager(tmp_path, asynchronous=False) as manager:
        assert manager.save(1, PARAMS).done()
        assert manager.steps() == [1]


def test_time_based_saves_follow_the_clock_given(tmp_path):
    now = [100.0]
    with CheckpointManager(tmp_path, save_every=ckptmgr.every_seconds(60), clock=lambda: now[0]) as manager:
        saved = []
        for step in range(1, 8):
            saved += [step] * bool(manager.save(step, PARAMS))
            now[0] += 25
        assert saved == [1, 4, 7]
    now[0] = manager.info(7).time + 59
    with CheckpointManager(tmp_path, save_every=ckptmgr.every_seconds(60), clock=lambda: now[0]) as manager:
        assert not manager.should_save(8)  # the time of the last save survives a restart
        now[0] += 1
        assert manager.should_save(8)


def test_a_step_that_exists(run):
    with CheckpointManager(run) as manager:
        before = manager.info(2).time
        with pytest.raises(ckptmgr.CheckpointExistsError, match="step 2 is already in") as caught:
            manager.save(2, PARAMS)
        assert caught.value.step == 2
        assert manager.save(2, PARAMS, on_exists="skip").reason == "step 2 exists"
        assert manager.info(2).time == before
        manager.pin(2)
        new = {"w": jnp.zeros(5)}
        manager.save(2, new, on_exists="replace").result()
        assert_trees_equal(manager.restore(2).params, new)
        assert manager.info(2).pinned
        assert manager.steps() == [1, 2, 3]
        manager.wait()
    assert visible(run) == ["1", "2", "3"]
    with CheckpointManager(run) as manager:
        manager.save(9, PARAMS)
        with pytest.raises(ckptmgr.CheckpointExistsError):  # also while the first is being written
            manager.save(9, PARAMS)
        with pytest.raises(ValueError, match="on_exists"):
            manager.save(9, PARAMS, on_exists="overwrite")


def test_infos_tells_of_every_readable_step_what_info_tells_of_one(tmp_path):
    with CheckpointManager(tmp_path, keep=[ckptmgr.latest(2), ckptmgr.best("loss")]) as manager:
        for step in (1, 2, 3, 4):
            manager.save(step, PARAMS, metrics={"loss": step})
        manager.wait()
        found = manager.infos()
        assert [(info.step, info.kept) for info in found] == [
            (1, ("best(metric='loss', n=1, mode='min')",)), (3, ("latest(n=2)",)), (4, ("latest(n=2)", "newest")),
        ]  # fmt: skip
        assert found == [manager.info(step) for step in manager.steps()]
        (tmp_path / "3" / "manifest.json").write_bytes(b"")
    assert [info.step for info in CheckpointManager(tmp_path, read_only=True).infos()] == [1, 4]


class Opaque:
    pass


def deleted():
    """An array as a caller has it after its buffer was donated."""
    array = jnp.float32(1.0)
    array.delete()
    return array


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": -1}, ValueError, "a step must be a whole number"),
        ({"step": 1.5}, ValueError, "a step must be a whole number"),
        ({"step": True}, ValueError, "a step must be a whole number"),
        ({"params": None}, ValueError, "save needs params"),
        ({"params": {"w": Opaque()}}, ckptmgr.UnsupportedLeafError, r"params\['w'\]: is a test_manager.Opaque"),
        ({"opt_state": ("x",)}, ckptmgr.UnsupportedLeafError, r"opt_state\[0\]: is a builtins.str"),
        ({"extras": {"it": Opaque()}}, ckptmgr.UnsupportedLeafError, "it: is a test_manager.Opaque"),
        ({"extras": {"params": 1}}, ValueError, "'params' cannot name an entry of extras"),
        ({"extras": {"../x": 1}}, ValueError, "'../x' cannot name an entry of extras"),
        ({"metrics": {"loss": jnp.ones(2)}}, TypeError, "'loss' is .* not one number"),
        ({"metrics": {"loss": deleted()}}, ValueError, "'loss' was deleted or donated"),
        ({"metrics": {"loss": "low"}}, TypeError, "'loss' is 'low', not one number"),
        ({"metrics": {3: 1.0}}, TypeError, "the name 3 is not a str"),
    ],
)
def test_bad_input_has_its_own_error_and_nothing_is_written(tmp_path, arguments, error, message):
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(error, match=message):
            manager.save(**{"step": 1, "params": PARAMS, **arguments})
        assert visible(tmp_path) == []
        manager.save(1, PARAMS).result()  # and it goes on as if nothing had been asked


def test_a_directory_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        CheckpointManager(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="is a file"):
        CheckpointManager(tmp_path / "file" / "below")


def test_a_directory_without_permission(tmp_path):
    """As a user who is not root: root may write anywhere."""
    tmp_path.chmod(0o755)
    for above in tmp_path.parents[:3]:
        above.chmod(0o755)
    code = (
        "import os, sys, ckptmgr, orbax.checkpoint\n"
        "if os.getuid() == 0: os.setegid(65534); os.seteuid(65534)\n"
        "for directory in (sys.argv[1], sys.argv[1] + '/below'):\n"
        "    try: ckptmgr.CheckpointManager(directory)\n"
        "    except PermissionError as error: print(error)\n"
    )
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    done = subprocess.run([sys.executable, "-c", code, closed], capture_output=True, text=True, check=True)
    assert done.stdout.count("cannot be written to") == 2, done.stderr
    assert list(closed.iterdir()) == []


def test_paths_are_resolved_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    relative, home = CheckpointManager("runs/a"), CheckpointManager("~/b")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for manager in (relative, home):
        manager.save(1, PARAMS)
        manager.close()
    assert os.listdir(tmp_path / "elsewhere") == []
    assert (tmp_path / "runs" / "a" / "1" / "manifest.json").exists()
    assert (tmp_path / "home" / "b" / "1" / "manifest.json").exists()
    assert relative.directory == ckptmgr.manager.epath.Path(tmp_path / "runs" / "a")


def test_on_commit_is_told_of_each_checkpoint_and_what_it_raises_harms_nothing(tmp_path, caplog):
    told = []

    def broken(info):
        raise RuntimeError("no network")

    with CheckpointManager(tmp_path, on_commit=[broken, told.append]) as manager:
        manager.save(1, PARAMS, metrics={"loss": 1.5})
        manager.save(2, PARAMS)
    assert [(info.step, dict(info.metrics)) for info in told] == [(1, {"loss": 1.5}), (2, {})]
    assert "no network" in caplog.text


def test_of_threads_that_save_the_same_step_one_does(tmp_path):
    def save(number):
        ready.wait(10)
        try:
            return bool(manager.save(1, {"w": np.full(100000, number)}))
        except ckptmgr.CheckpointExistsError:
            return False

    ready = threading.Barrier(4)
    with CheckpointManager(tmp_path) as manager, concurrent.futures.ThreadPoolExecutor(4) as threads:
        saved = list(threads.map(save, range(4)))
        assert sorted(saved) == [False, False, False, True]
        assert manager.restore(1).params["w"][0] == saved.index(True)


def test_a_callback_that_exits_does_not_stop_retention(tmp_path, caplog):
    with CheckpointManager(tmp_path, on_commit=lambda info: sys.exit("enough"), keep=1) as manager:
        manager.save(1, PARAMS)
        manager.save(2, PARAMS)
        manager.wait()
        assert manager.steps() == [2]
    assert "enough" in caplog.text


@pytest.mark.parametrize("options", [{}, {"max_host_bytes": 1000}, {"asynchronous": False}], ids=str)
def test_a_save_that_a_callback_makes_is_durable_when_it_returns(options, tmp_path):
    def values(fill):
        return {name: np.full(1000, fill) for name in "ab"}

    def again(info):
        if info.step == 1:
            params = values(2.0)
            manager.save(2, params).result(10)
            found.append(manager.steps())
            for leaf in params.values():
                leaf[:] = 9.0

    found = []
    with CheckpointManager(tmp_path, on_commit=again, timeout_s=20, **options) as manager:
        manager.save(1, values(1.0))
        manager.wait()
        assert found == [[1, 2]]
        assert_trees_equal(manager.restore(2).params, values(2.0))


def test_an_interrupt_as_the_writing_starts_does_not_save_what_its_caller_may_have_changed(tmp_path, monkeypatch):
    params, released = {name: np.zeros(1000) for name in "ab"}, threading.Event()
    start, write = _thread.start_new_thread, Committer.commit

    def interrupted(*given):
        start(*given)
        raise KeyboardInterrupt

    def held(*given, **how):
        released.wait(10)
        return write(*given, **how)

    with CheckpointManager(tmp_path, max_host_bytes=1000) as manager:
        monkeypatch.setattr(Committer, "commit", held)
        with monkeypatch.context() as patch:
            patch.setattr(_thread, "start_new_thread", interrupted)
            with pytest.raises(KeyboardInterrupt):
                manager.save(1, params)
        params["b"][:] = 9.0
        released.set()
        with pytest.raises(ckptmgr.SaveError, match="was interrupted before everything was copied"):
            manager.wait()
        assert manager.steps() == []


@pytest.mark.parametrize("wait", ["wait", "result"])
def test_an_interrupt_inside_a_wait_leaves_no_lock_that_the_writing_needs(wait, tmp_path, monkeypatch):
    enter, main, write = threading.Condition.__enter__, threading.get_ident(), Committer.commit

    def interrupted(condition):
        enter(condition)
        if threading.get_ident() == main:
            monkeypatch.undo()
            raise KeyboardInterrupt

    def slow(*given, **how):
        time.sleep(0.2)
        return write(*given, **how)

    with CheckpointManager(tmp_path, timeout_s=20) as manager:
        monkeypatch.setattr(Committer, "commit", slow)
        result = manager.save(1, PARAMS)
        monkeypatch.setattr(threading.Condition, "__enter__", interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            result.result() if wait == "result" else manager.wait()
        monkeypatch.undo()
        assert result.result(10).step == 1


def test_what_is_looked_at_while_a_step_is_replaced_is_not_remembered(tmp_path, monkeypatch):
    write = Committer.commit

    def look_then_write(*given, **how):
        assert manager.infos()[0].metrics["loss"] == 1.0
        return write(*given, **how)

    away = tmp_path / "away"
    with CheckpointManager(tmp_path / "home", mirror=away) as manager:
        manager.save(1, PARAMS, metrics={"loss": 1.0})
        manager.wait()
        monkeypatch.setattr(Committer, "commit", look_then_write)
        told = manager.save(1, PARAMS, metrics={"loss": 2.0}, on_exists="replace").result()
        assert told.metrics["loss"] == manager.info(1).metrics["loss"] == 2.0
    assert CheckpointManager(away, read_only=True).info(1).metrics["loss"] == 2.0


@pytest.mark.parametrize("mark", ["pin", "distrust"])
def test_a_step_that_is_marked_while_it_is_read_is_no_other_step(tmp_path, monkeypatch, mark):
    """With broadcast a step that is replaced meanwhile cannot be read again."""
    read, times = Restorer._read, []

    def marked_meanwhile(*given):
        times.append(time.monotonic())
        found = read(*given)
        if len(times) == 1:
            writer.pin(1) if mark == "pin" else writer.distrust(1, "a test")
        return found

    monkeypatch.setattr(Restorer, "_read", marked_meanwhile)
    with CheckpointManager(tmp_path) as writer:
        writer.save(1, PARAMS).result()
        found = CheckpointManager(tmp_path, read_only=True).restore(1, params=PARAMS)
    assert_trees_equal(found.params, PARAMS)
    assert len(times) == 1


def test_metadata_versions_and_time_are_recorded(tmp_path):
    with CheckpointManager(tmp_path, metadata={"git": "abc", "lr": 0.1}, clock=lambda: 42.0) as manager:
        manager.save(1, PARAMS, state())
    info = CheckpointManager(tmp_path, read_only=True).info(1)
    assert info.metadata == {"git": "abc", "lr": 0.1}
    assert info.time == 42.0
    assert info.versions["ckptmgr"] == ckptmgr.__version__
    assert info.versions["jax"] == jax.__version__
    assert info.nbytes == 9 * 4 * 3 + 4
    assert [leaf.path for leaf in info.leaves["params"]] == ["['b']", "['w']"]
    assert info.kept == ("keep=None", "newest") or set(info.kept) == {"keep=None", "newest"}


def test_closed_and_read_only_managers_do_not_save(run):
    manager = CheckpointManager(run)
    manager.close()
    manager.close()
    left = run / ".ckptmgr" / "saving" / "9"  # by a save that another process is at, for all a reader knows
    left.mkdir()
    reader = CheckpointManager(run, read_only=True)
    assert left.exists()
    for each in (manager, reader):
        with pytest.raises(ckptmgr.SaveError, match="read-only or closed"):
            each.save(9, PARAMS)
        with pytest.raises(ckptmgr.SaveError, match="read-only or closed"):
            each.delete(1)
    assert reader.steps() == [1, 2, 3]
    missing = CheckpointManager(run / "nowhere", read_only=True)
    assert missing.steps() == []
    assert not (run / "nowhere").exists()


# ---------------------------------------------------------------- failure


def test_a_failed_save_raises_at_the_next_call_and_takes_nothing_with_it(run, monkeypatch, caplog):

    with CheckpointManager(run, keep=1) as manager:
        monkeypatch.setattr(
            arrays_writing, "write_wave", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        result = manager.save(4, PARAMS)
        with pytest.raises(ckptmgr.SaveError, match=r"step 4 could not be saved: .*No space left") as caught:
            manager.save(5, PARAMS)
        assert caught.value.step == 4
        assert isinstance(caught.value.__cause__, OSError)
        with pytest.raises(ckptmgr.SaveError, match="step 4"):
            result.result()
        monkeypatch.undo()
        assert manager.steps() == [1, 2, 3]
        assert manager.latest() == 3
        manager.save(4, PARAMS).result()
        manager.wait()
        assert manager.steps() == [4]
    assert "step 4 could not be saved" in caplog.text


def test_an_old_result_does_not_hide_the_failure_of_a_later_save(tmp_path, monkeypatch):
    manager = CheckpointManager(tmp_path)
    monkeypatch.setattr(Committer, "commit", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    first = manager.save(1, PARAMS)
    with pytest.raises(ckptmgr.SaveError, match="step 1"):
        manager.wait()
    second = manager.save(2, PARAMS)
    while not second.done():
        time.sleep(0.01)
    with pytest.raises(ckptmgr.SaveError, match="step 1"):
        first.result()
    with pytest.raises(ckptmgr.SaveError, match="step 2"):
        manager.close()


def test_a_failed_save_ends_its_result_whatever_fails_beside_it(tmp_path, caplog, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("the journal cannot say it")

    manager = CheckpointManager(tmp_path)
    monkeypatch.setattr("ckptmgr.run.journal.Journal.record", fails)
    faults.install("fail publish 1", monkeypatch.setattr)
    result = manager.save(1, PARAMS)
    with pytest.raises(ckptmgr.SaveError, match=r"step 1 could not be saved: .*Input/output error"):
        result.result(10)
    manager.close()
    assert "the save of step 1 failed" in caplog.text


# ---------------------------------------------------------------- restoring


def test_restore_or_starts_or_resumes(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        start = manager.restore_or(step=0, params=PARAMS, opt_state=state(), extras={"it": {"n": 0}})
        assert (start.resumed, start.step, start.info) == (False, 0, None)
        assert start.params is PARAMS
        manager.save(7, jax.tree.map(jnp.zeros_like, PARAMS), state(), extras={"it": {"n": 5}})
        back = manager.restore_or(step=0, params=PARAMS, opt_state=state(), extras={"it": {"n": 0}})
        assert (back.resumed, back.step) == (True, 7)
        assert back.extras == {"it": {"n": 5}}
        assert_trees_equal(back.params, jax.tree.map(jnp.zeros_like, PARAMS))


def test_the_newest_the_best_or_one_by_number(run):
    manager = CheckpointManager(run, keep=best("loss"))
    assert manager.restore().step == 3
    assert manager.restore("best").step == 2
    assert manager.restore(1).step == 1
    assert manager.restore(1).metrics == {"loss": 3.0}
    assert manager.best() == manager.best("loss") == 2
    assert manager.best("loss", mode="max") == 1
    assert manager.best("accuracy") is None
    with pytest.raises(ckptmgr.CheckpointNotFoundError, match="no checkpoint has the metric"):
        CheckpointManager(run, keep=best("accuracy")).restore("best")
    with pytest.raises(ValueError, match="needs a metric"):
        CheckpointManager(run).best()
    with pytest.raises(ckptmgr.CheckpointNotFoundError, match=r"no step 4 in .*its steps are 1, 2, 3") as caught:
        manager.restore(4)
    assert (caught.value.step, caught.value.directory) == (4, str(run))
    with pytest.raises(ckptmgr.CheckpointNotFoundError, match="nothing is saved"):
        CheckpointManager(run.parent / "new").restore()


def test_a_wrong_level_of_directory_is_explained(run):
    with pytest.raises(ckptmgr.CheckpointNotFoundError, match=r"did you mean .*run\?"):
        CheckpointManager(run.parent, read_only=True).restore()
    with pytest.raises(ckptmgr.CheckpointNotFoundError, match=r"directory of one checkpoint; open its parent"):
        CheckpointManager(run / "2", read_only=True).restore()


def test_the_types_of_the_template_come_back(run):
    manager = CheckpointManager(run, read_only=True)
    wants = state()
    concrete = manager.restore(3, params=PARAMS, opt_state=wants)
    abstract = manager.restore(3, params=jax.eval_shape(lambda: PARAMS), opt_state=jax.eval_shape(lambda: wants))
    by_optimizer = manager.restore(3, params=PARAMS, optimizer=ADAM)
    without_templates = manager.restore(3, optimizer=ADAM)
    for back in (concrete, abstract, by_optimizer, without_templates):
        assert_trees_equal(back.opt_state, wants)
        assert type(back.opt_state[0]) is type(wants[0])
        assert_trees_equal(back.params, jax.tree.map(lambda leaf: leaf + 3, PARAMS))
    with pytest.raises(ValueError, match="opt_state or optimizer, not both"):
        manager.restore(opt_state=wants, optimizer=ADAM)


def test_without_a_template_everything_comes_back_in_plain_containers(run):
    back = CheckpointManager(run, read_only=True).restore(2)
    assert set(back.params) == {"w", "b"}
    assert set(back.opt_state[0]) == {"count", "mu", "nu"}
    assert back.extras == {"position": {"epoch": 2}}
    assert back.info.step == 2


def test_params_alone_are_restored_without_a_byte_of_the_rest(run):
    import shutil

    for item in ("opt_state", "position"):
        shutil.rmtree(run / "3" / item)
    manager = CheckpointManager(run, read_only=True)
    back = manager.restore(params=PARAMS)
    assert (back.step, back.opt_state, dict(back.skipped)) == (3, None, {})
    assert_trees_equal(back.params, jax.tree.map(lambda leaf: leaf + 3, PARAMS))
    with pytest.raises(ckptmgr.CorruptCheckpointError, match="opt_state"):
        manager.restore(3, params=PARAMS, opt_state=state())


def test_a_template_that_does_not_fit_is_refused_before_any_array_is_read(run):
    import shutil

    for item in ("params", "opt_state"):  # what cannot be read has not been read
        shutil.rmtree(run / "3" / item / "d")
    manager = CheckpointManager(run, read_only=True)
    wrong = {"w": jnp.ones((2, 4)), "b": jnp.ones(3, jnp.bfloat16), "new": jnp.ones(1)}
    with pytest.raises(ckptmgr.StructureMismatchError) as caught:
        manager.restore(params=wrong, opt_state=optax.sgd(0.1, momentum=0.9).init(PARAMS))
    text = str(caught.value)
    for leaf, saved, template in (
        ("params['w']", "float32[2,3]", "float32[2,4]"),
        ("params['b']", "float32[3]", "bfloat16[3]"),
        ("params['new']", "-", "float32[1]"),
        ("opt_state[0].mu['w']", "float32[2,3]", "-"),
        ("opt_state[0].trace['w']", "-", "float32[2,3]"),
        ("opt_state[0]", "ScaleByAdamState", "TraceState"),
    ):
        line = next(line.split() for line in text.splitlines() if line.split()[:1] == [leaf])
        assert line[1:3] == [saved, template]
    assert len(caught.value.diff.leaves) == 10
    assert manager.diff(3, params=wrong).shape[0].path == "params['w']"
    assert not manager.diff(3, params=PARAMS, opt_state=state())


def test_cast_partial_and_rename_are_done_only_when_asked(run):
    manager = CheckpointManager(run, read_only=True)
    half = {"w": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros(3, jnp.bfloat16)}
    assert_trees_equal(
        manager.restore(3, params=half, cast=True).params,
        jax.tree.map(lambda leaf: (leaf + 3).astype(jnp.bfloat16), PARAMS),
    )
    grown = {"w": jnp.zeros((2, 3)), "head": jnp.full(4, 9.0)}
    back = manager.restore(3, params=grown, partial=True).params
    assert np.array_equal(back["w"], PARAMS["w"] + 3)
    assert back["head"] is grown["head"]
    with pytest.raises(ckptmgr.StructureMismatchError):
        manager.restore(3, params={"w": jnp.zeros((2, 9)), "b": jnp.ones(3)}, partial=True, cast=True)
    moved = {"layer": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}
    rename = {r"\['w'\]": "['layer']['kernel']", r"\['b'\]": "['layer']['bias']"}
    back = manager.restore(3, params=moved, rename=rename).params
    assert np.array_equal(back["layer"]["kernel"], PARAMS["w"] + 3)


class Iterator:
    """A data iterator with a position."""

    def __init__(self, state=0):
        self.state = state

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


@pytest.mark.parametrize(
    "position", [41, {"epoch": 3, "index": [1, 2.5, None]}, {"base64": 5}, b"\x00opaque\xff", np.arange(3)]
)
def test_iterators_json_and_trees_are_extras(tmp_path, position):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, PARAMS, extras={"data": Iterator(position), "ema": PARAMS, "note": "half way"})
        mine = Iterator(position if isinstance(position, np.ndarray) else 0)
        back = manager.restore(params=PARAMS, extras={"data": mine, "ema": PARAMS, "note": ""})
        assert back.extras["data"] is mine
        assert np.array_equal(mine.state, position)
        assert back.extras["note"] == "half way"
        assert_trees_equal(back.extras["ema"], PARAMS)
        assert manager.restore(params=PARAMS).extras == {}
        with pytest.raises(ckptmgr.StructureMismatchError, match="other"):
            manager.restore(params=PARAMS, extras={"other": Iterator()})
        new = Iterator("where it starts")
        back = manager.restore(params=PARAMS, extras={"other": new, "note": ""}, partial=True)
        assert back.extras == {"other": new, "note": "half way"}
        assert new.state == "where it starts"


def test_restoring_walks_back_past_a_damaged_step_and_says_so(run, caplog):
    manifest = run / "3" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"Adam", b"Adom"))
    manager = CheckpointManager(run)
    with caplog.at_level(logging.WARNING, logger="ckptmgr"):
        back = manager.restore(params=PARAMS)
    assert back.step == 2
    assert "manifest.json" in back.skipped[3]
    assert "step 3 is passed over" in caplog.text
    with pytest.raises(ckptmgr.CorruptCheckpointError, match="manifest") as caught:
        manager.restore(3, params=PARAMS)
    assert caught.value.step == 3
    for step in (1, 2):
        (run / str(step) / "manifest.json").write_bytes(b"")
    with pytest.raises(ckptmgr.CorruptCheckpointError, match="all 3 checkpoints"):
        manager.restore_or(step=0, params=PARAMS)


# ---------------------------------------------------------------- what is kept


def test_retention_keeps_latest_best_and_every_n_and_survives_a_restart(tmp_path):
    losses = {1: 9.0, 2: 1.0, 3: float("nan"), 4: 5.0, 5: 4.0, 6: 3.0, 7: 8.0}
    for steps in ((1, 2, 3), (4, 5), (6, 7)):  # three runs of the script
        with CheckpointManager(tmp_path, keep=[latest(2), best("loss"), every_steps(4)]) as manager:
            for step in steps:
                manager.save(step, PARAMS, metrics={"loss": losses[step]})
    assert manager.steps() == [2, 4, 6, 7]
    assert manager.info(2).kept == ("best(metric='loss', n=1, mode='min')",)
    assert set(manager.info(7).kept) == {"latest(n=2)", "newest"}


def test_a_step_that_is_being_written_is_there_for_its_caller(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, PARAMS)
        manager.pin(1)
        manager.save(2, PARAMS)
        assert manager.info(2).step == 2
        assert manager.info(1).pinned
    seen = []
    with CheckpointManager(
        tmp_path, on_commit=lambda info: seen.append(manager.info(info.step).nbytes)
    ) as manager:
        manager.save(3, PARAMS)
    assert seen == [manager.info(3).nbytes]


def test_pinned_steps_stay_until_they_are_unpinned(tmp_path):
    with CheckpointManager(tmp_path, keep=1) as manager:
        manager.save(1, PARAMS).result()
        manager.pin(1)
        manager.save(2, PARAMS)
        manager.save(3, PARAMS)
        manager.wait()
        assert manager.steps() == [1, 3]
        assert "pinned" in manager.info(1).kept
        manager.unpin(1)
        manager.save(4, PARAMS)
        manager.wait()
        assert manager.steps() == [4]
        with pytest.raises(ckptmgr.CheckpointNotFoundError):
            manager.pin(1)


def test_a_step_can_be_deleted_and_saved_again(run):
    with CheckpointManager(run) as manager:
        manager.delete(2)
        assert manager.steps() == [1, 3]
        with pytest.raises(ckptmgr.CheckpointNotFoundError):
            manager.delete(2)
        manager.save(2, PARAMS)
        manager.wait()
        assert manager.steps() == [1, 2, 3]
        manager.delete(2)
        manager.save(2, PARAMS, metrics={"loss": 7.0})
        assert manager.restore(2).metrics == {"loss": 7.0}
