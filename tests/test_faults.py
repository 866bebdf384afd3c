"""What fails without ending the process: a disk that errs, is full, or is slow, at every point of a save."""

import logging
import os
import subprocess
import sys
import threading
import time

import faults
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import trainer
from conftest import counted, free_port, visible

import ckptmgr
from ckptmgr.arrays import writing
from ckptmgr.format import names

SAVING = ["arrays", "description", "file", "sync", "publish", "rename"]


def saved(manager, step):
    return trainer.step_of(manager.restore(step, params=trainer.state(0)).params)


@pytest.mark.parametrize("fault", [f"fail {point}" for point in SAVING] + ["full file", "short file"])
def test_a_write_that_fails_at_any_point_is_said_and_harms_nothing(fault, tmp_path, monkeypatch):
    with ckptmgr.CheckpointManager(tmp_path, keep=1) as manager:
        manager.save(1, trainer.state(1)).result()
        with monkeypatch.context() as patch:
            faults.install(f"{fault} 1", patch.setattr)
            reason = "No space left" if "full" in fault else "Input/output error"
            with pytest.raises(ckptmgr.SaveError, match=f"step 2 could not be saved: .*{reason}") as caught:
                manager.save(2, trainer.state(2)).result()
        assert caught.value.step == 2
        assert caught.value.__cause__ is not None
        assert (manager.steps(), manager.latest(), saved(manager, 1)) == ([1], 1, 1)
        assert visible(tmp_path) == ["1"]
        assert not any((tmp_path / names.SAVING).iterdir())
        manager.save(2, trainer.state(2)).result()
        assert saved(manager, 2) == 2


def test_one_that_fails_waits_for_those_that_write_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "SLOW_S", 0.5)
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        with monkeypatch.context() as patch:
            faults.install("fail file 1", patch.setattr)
            faults.install("slow arrays 1", patch.setattr)
            with pytest.raises(ckptmgr.SaveError):
                manager.save(1, trainer.state(1)).result()
        time.sleep(2 * faults.SLOW_S)
        assert visible(tmp_path) == []


@pytest.mark.parametrize("swaps", [True, False], ids=["swaps", "cannot swap"])
@pytest.mark.parametrize("fault", ["fail arrays 1", "fail publish 1", "fail rename 1", "fail rename 2"])
def test_a_replacement_that_fails_leaves_a_whole_step(fault, swaps, tmp_path, monkeypatch):
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        manager.save(1, trainer.state(1)).result()
        with monkeypatch.context() as patch:
            if not swaps:  # as on macOS
                patch.setattr("ckptmgr.format.files.exchange", lambda *_: False)
            faults.install(fault, patch.setattr)
            failed = manager.save(1, trainer.state(2), on_exists="replace")
            done = "rename" in fault and swaps  # then nothing is renamed
            if done:
                failed.result()
            else:
                with pytest.raises(ckptmgr.SaveError, match="step 1 could not be saved"):
                    failed.result()
        assert manager.steps() == [1]
        assert saved(manager, 1) in ((2,) if done else (1, 2))
        assert saved(manager, 1) == 1 or swaps
        manager.save(1, trainer.state(3), on_exists="replace").result()
        assert saved(manager, 1) == 3
    ckptmgr.CheckpointManager(tmp_path).close()
    assert visible(tmp_path) == ["1"]


def test_a_deletion_that_fails_is_logged_does_not_stop_the_next_and_is_finished_later(
    tmp_path, monkeypatch, caplog
):
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(step, trainer.state(step))
    with ckptmgr.CheckpointManager(tmp_path, keep=1) as manager, monkeypatch.context() as patch:
        faults.install("fail rename 2", patch.setattr)  # the first is the new step's
        faults.install("fail remove 1", patch.setattr)
        manager.save(4, trainer.state(4))
        manager.wait()
    assert manager.steps() == [1, 4]  # 1 could not be renamed; 2 is out of the listing, 3 is gone
    assert "step 1 could not be deleted" in caplog.text
    assert [name.split("-")[0] for name in os.listdir(tmp_path / ".ckptmgr/deleting")] == ["2"]
    with ckptmgr.CheckpointManager(tmp_path, keep=1) as manager:
        manager.save(5, trainer.state(5))
        manager.wait()
        assert visible(tmp_path) == ["5"]


def test_a_slow_disk_holds_up_no_caller_for_longer_than_asked(tmp_path, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setitem(faults.KINDS, "slow", lambda *_: go_on.wait(60))
    with ckptmgr.CheckpointManager(tmp_path, timeout_s=0.5) as manager:
        manager.save(1, trainer.state(1)).result(60)
        faults.install("slow publish 1", monkeypatch.setattr)
        slow = manager.save(2, trainer.state(2))
        assert (slow.done(), manager.latest()) == (False, 1)
        waits = {
            "wait": manager.wait, "close": manager.close, "result": lambda: slow.result(0.1),
            "save": lambda: manager.save(3, trainer.state(3)), "delete": lambda: manager.delete(1),
            "restore": lambda: manager.restore(params=trainer.state(0)),
        }  # fmt: skip
        for wait in waits.values():
            with pytest.raises(ckptmgr.CheckpointTimeoutError, match="the save of step 2") as caught:
                wait()
            assert caught.value.waiting_for == "the save of step 2"
        go_on.set()
        assert slow.result(60).step == 2
        assert manager.save(3, trainer.state(3)).result(60)  # `close` that timed out closed nothing
        manager.wait(60)
        assert manager.steps() == [1, 2, 3]


def test_a_save_that_is_slower_than_every_wait_is_durable_in_the_end_and_the_next_is_fast(tmp_path, monkeypatch):
    with ckptmgr.CheckpointManager(tmp_path, timeout_s=0.2) as manager:
        for step, point in enumerate(SAVING, start=1):
            go_on = threading.Event()
            with monkeypatch.context() as patch:
                patch.setitem(faults.KINDS, "slow", lambda *_, go_on=go_on: go_on.wait(60))
                faults.install(f"slow {point} 1", patch.setattr)
                manager.wait(60)  # a deletion may go on once the save before is durable
                saved_slowly = manager.save(step, trainer.state(step))
                with pytest.raises(ckptmgr.CheckpointTimeoutError, match=f"the save of step {step}"):
                    manager.wait()
                go_on.set()
                assert saved_slowly.result(60).step == step
        manager.wait(60)
        assert manager.steps() == list(range(1, len(SAVING) + 1))


@pytest.fixture
def small_disk(tmp_path):
    """A real disk of 6 MiB."""
    if os.getuid() != 0:
        pytest.skip("mounting a small disk takes root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.soak
def test_a_disk_that_is_full_at_any_fraction_of_a_save_is_said_and_saving_goes_on_once_there_is_room(small_disk):
    draw = np.random.default_rng(0)
    params = {
        f"w{i}": draw.random(size) for i, size in enumerate([100_000, 50_000, 40_000, *[500] * 20])
    }  # 1.6 MB
    fractions = np.linspace(0, 0.97, counted(5, full=60))
    with ckptmgr.CheckpointManager(small_disk / "run") as manager:
        needed = manager.save(0, params).result().disk_nbytes
        for step, fraction in enumerate(fractions, start=1):
            manager.wait()  # the save before is durable, but what follows from it is written yet
            free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
            (small_disk / "ballast").write_bytes(bytes(free - int(fraction * needed)))
            with pytest.raises(
                ckptmgr.SaveError, match=rf"step {step} could not be saved: .*No space left"
            ) as caught:
                manager.save(step, params).result()
            assert caught.value.step == step
            assert manager.steps() == [step - 1]
            assert visible(small_disk / "run") == [str(step - 1)]
            found = manager.restore(params=params).params
            assert all(np.array_equal(found[name], params[name]) for name in params)
            (small_disk / "ballast").unlink()
            manager.save(step, params).result()
            manager.delete(step - 1)


# ---------------------------------------------------------------- what is said of it


def test_one_log_line_for_each_save_restore_deletion_and_walk_back(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="ckptmgr")
    with ckptmgr.CheckpointManager(tmp_path, keep=2) as manager:
        for step in (1, 2, 3):
            manager.save(step, trainer.state(step))
        manager.wait()
        (tmp_path / "3" / "params" / "_METADATA").write_bytes(b"{}")
        manager.restore(params=trainer.state(0))
    said = [record.getMessage() for record in caplog.records if record.name == "ckptmgr"]
    starts = ["step 1 saved: ", "step 2 saved: ", "step 3 saved: ", "step 1 deleted", "step 3 is passed over",
              "step 2 restored"]  # fmt: skip
    assert len(said) == len(starts)
    assert all(line.startswith(start) for line, start in zip(said, starts, strict=True))


def test_orbax_warns_of_its_own_calls_and_not_of_ours(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError("on purpose")

    monkeypatch.setattr(writing, "write_wave", fail)
    with ckptmgr.CheckpointManager(tmp_path / "ours") as manager, pytest.raises(ckptmgr.SaveError):
        manager.save(1, trainer.state(1)).result()
    loud = [record for record in caplog.records if record.levelno > logging.INFO]
    assert {record.name for record in loud} == {"ckptmgr"}
    assert len(loud) == 1
    caplog.clear()
    monkeypatch.setattr(ocp.path.atomicity.AtomicRenameTemporaryPath, "finalize", fail)
    with ocp.CheckpointManager(tmp_path / "theirs") as stock:
        stock.save(1, args=ocp.args.StandardSave({"w": jnp.ones(3)}))
        with pytest.raises(OSError, match="on purpose"):
            stock.wait_until_finished()
    assert any(record.levelno > logging.WARNING for record in caplog.records)


def test_the_times_and_bytes_of_a_save_are_known_to_who_made_it(tmp_path):
    told = []
    with ckptmgr.CheckpointManager(tmp_path, on_commit=told.append) as manager:
        info = manager.save(1, trainer.state(1)).result()
        manager.wait()
        assert told == [info]
        assert 0 < info.blocked_s < info.durable_s < 60
        on_disk = sum(path.stat().st_size for path in (tmp_path / "1").rglob("*") if path.is_file())
        assert info.disk_nbytes == on_disk - (tmp_path / "1" / "manifest.json").stat().st_size
        assert manager.info(1).durable_s is None


EXPORT = """
import sys, urllib.request
import ckptmgr
with ckptmgr.CheckpointManager(sys.argv[1]) as manager:
    manager.save(1, {"w": 1.0})
    manager.wait()
    manager.restore(1)
print(urllib.request.urlopen(f"http://localhost:{sys.argv[2]}/metrics").read().decode())
"""


def test_saves_and_restores_reach_the_exporter_of_orbax(tmp_path):
    port = str(free_port())
    told = os.environ | {"ENABLE_ORBAX_PROMETHEUS_TELEMETRY": "true", "ORBAX_PROMETHEUS_PORT": port}
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, tmp_path / "run", port],
        env=told,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for name in ("write_success", "read_start", "read_success"):
        assert f"jax_orbax_{name}_total 1.0" in done.stdout
    assert "jax_orbax_write_finalize_duration_secs" in done.stdout
    assert 'jax_orbax_read_total_duration_secs_count{storage_type="other"} 1.0' in done.stdout
