"""gs:// and s3://, against servers on this machine that speak their protocols."""

import logging
import subprocess
import sys
import uuid

import member
import numpy as np
import pytest
import trainer
from etils import epath
from test_job import finish, start

import ckptmgr
from ckptmgr import catalog

pytestmark = [
    pytest.mark.xdist_group("remote"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # clients of fsspec close when Python ends
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(params=["gs", "s3"])
def run(request, servers):
    return f"{request.param}://bucket/{uuid.uuid4().hex}/run"


def saved(manager, *step):
    found = manager.restore(*step, params=trainer.state(0))
    assert trainer.step_of(found.params) == found.step
    return found.step, list(found.skipped)


def test_saved_restored_kept_pinned_deleted_and_verified(run):
    with ckptmgr.CheckpointManager(run, keep=2) as manager:
        assert not manager.restore_or(params=trainer.state(0)).resumed
        for step in (1, 2, 3):
            manager.save(step, trainer.state(step), {"mu": trainer.state(step)}, metrics={"loss": 1 / step})
            if step == 1:
                manager.wait()
                manager.pin(1)
        manager.wait()
        assert manager.steps() == [1, 2, 3]  # two, and the pinned one
        manager.unpin(1)
        manager.save(4, trainer.state(4)).result()
        manager.wait()
        assert manager.steps() == [3, 4]
        with pytest.raises(ckptmgr.CheckpointExistsError):
            manager.save(4, trainer.state(4))
        with pytest.raises(ValueError, match=r'on_exists="replace" takes a rename.*delete\(4\) first'):
            manager.save(4, trainer.state(4), on_exists="replace")
        assert manager.verify()
        manager.delete(3)
        assert manager.steps() == [4]
    with ckptmgr.CheckpointManager(run) as manager:
        assert saved(manager) == (4, [])
        with pytest.raises(ckptmgr.CheckpointNotFoundError, match="no step 3"):
            manager.restore(3)


def test_damage_is_found_walked_back_from_and_set_aside(run):
    with ckptmgr.CheckpointManager(run) as manager:
        for step in (1, 2):
            manager.save(step, trainer.state(step))
        manager.wait()
        (data,) = (epath.Path(run) / "2" / "params" / "d").iterdir()
        values = bytearray(data.read_bytes())
        values[len(values) // 2] ^= 1
        data.write_bytes(bytes(values))
        assert not manager.verify(2)
        with pytest.raises(ckptmgr.CorruptCheckpointError):
            manager.restore(2, params=trainer.state(0))
        assert saved(manager) == (1, [2])
        manager.save(2, trainer.state(2)).result()
        assert saved(manager) == (2, [])


def test_what_is_not_committed_is_no_step_and_goes_once_a_newer_one_is_there(run):
    with ckptmgr.CheckpointManager(run) as manager:
        for step in (1, 2, 3):
            manager.save(step, trainer.state(step))
    (epath.Path(run) / "2" / catalog.COMMITTED).unlink()  # as a process leaves it that is killed in a save
    reader = ckptmgr.CheckpointManager(run, read_only=True)
    assert reader.steps() == [1, 3]
    with ckptmgr.CheckpointManager(run) as manager:
        assert not (epath.Path(run) / "2" / "manifest.json").exists()
        manager.save(2, trainer.state(2)).result()
        assert saved(manager, 2) == (2, [])


def test_watch_sees_what_another_process_saves(run):
    reader = ckptmgr.CheckpointManager(run, read_only=True)
    watching = reader.watch(timeout_s=60, poll_s=0.05)
    process = subprocess.Popen(
        [sys.executable, trainer.__file__, run, "2", "train"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        assert [next(watching), next(watching)] == [1, 2]
        assert saved(reader) == (2, [])
    finally:
        process.wait(60)


def test_two_processes_on_gs(servers):
    run = f"gs://bucket/{uuid.uuid4().hex}"
    assert finish(start(2, run, "save", "1", "2", "3"))[0] == "steps 2 3"
    assert finish(start(2, run, "load")) == ["restored 3 skipped"] * 2
    found = ckptmgr.CheckpointManager(run, read_only=True).restore(layout=ckptmgr.HOST).params
    assert all(np.array_equal(found[name], values) for name, values in member.state(3).items())


def test_what_is_missing_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"s3:// needs s3fs: pip install 'ckptmgr\[s3\]'"):
        ckptmgr.CheckpointManager("s3://bucket/run")
    with pytest.raises(ValueError, match="not ftp://"):
        ckptmgr.CheckpointManager("ftp://host/run")


def test_no_credential_is_logged(run, caplog):
    caplog.set_level(logging.DEBUG, logger="ckptmgr")
    with ckptmgr.CheckpointManager(run) as manager:
        manager.save(1, trainer.state(1)).result()
    said = "".join(record.getMessage() for record in caplog.records if record.name == "ckptmgr")
    assert "saved" in said
    assert "not-a-secret" not in said
