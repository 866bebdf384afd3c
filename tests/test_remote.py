"""gs:// and s3://, against servers on this machine that speak their protocols."""

import logging
import signal
import subprocess
import sys
import uuid

import faults
import member
import numpy as np
import pytest
import trainer
from conftest import ON_SERVERS, counted, in_background
from etils import epath
from etils.epath import gpath
from test_crash import last
from test_crash import run as train
from test_job import finish, start

import ckptmgr
from ckptmgr import interop
from ckptmgr.cli import doctor, facts, places
from ckptmgr.format import names, objects, paths, recorded
from ckptmgr.saving import sealing

pytestmark = ON_SERVERS


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
        with pytest.raises(ValueError, match=r'on_exists="replace" needs a rename.*delete\(4\) first'):
            manager.save(4, trainer.state(4), on_exists="replace")
        assert manager.verify()
        manager.delete(3)
        assert manager.steps() == [4]
    with ckptmgr.CheckpointManager(run) as manager:
        assert saved(manager) == (4, [])
        with pytest.raises(ckptmgr.CheckpointNotFoundError, match="no step 3"):
            manager.restore(3)
        told = []
        manager.restore(on_progress=lambda *at: told.append(at))
        leaf_nbytes = trainer.state(4)["w0"].nbytes
        assert told == [(n * leaf_nbytes, trainer.LEAVES * leaf_nbytes) for n in range(trainer.LEAVES + 1)]


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
    (epath.Path(run) / names.SAVING / "2").write_text("")  # as a process leaves it that is killed in a save
    (epath.Path(run) / "2" / names.COMMITTED).unlink()
    reader = ckptmgr.CheckpointManager(run, read_only=True)
    assert reader.steps() == [1, 3]
    with ckptmgr.CheckpointManager(run) as manager:
        assert not (epath.Path(run) / "2" / "manifest.json").exists()
        manager.save(2, trainer.state(2)).result()
        assert saved(manager, 2) == (2, [])


def test_watch_sees_what_another_process_saves(run):
    reader = ckptmgr.CheckpointManager(run, read_only=True)
    watching = reader.watch(timeout_s=150, poll_s=0.05)
    process = subprocess.Popen(  # without pipes, which the warnings of the client would fill
        [sys.executable, trainer.__file__, run, "2", "train"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        assert [next(watching), next(watching)] == [1, 2]
        assert saved(reader) == (2, [])
    finally:
        process.wait(60)


# ---------------------------------------------------------------- faults

PLACES = ["gs", "s3"]
FILES = 6  # small files of a step: the manifest is the last but one, the marker the last


def folders(run):
    """The numbers under which anything lies in the bucket, a step or not."""
    return sorted(int(entry.name) for entry in epath.Path(run).iterdir() if entry.name.isdigit())


KILLS = [
    (place, f"{when} {point}")
    for point in ["arrays 4", "description 4", *(f"file {3 * FILES + n}" for n in (1, FILES - 1, FILES)),
                  "note 4", "choose 4", "retain 4", "delete 1", "remove 1"]
    for when in ("before", "after")
    for place in PLACES
]  # fmt: skip


@pytest.mark.soak
@pytest.mark.parametrize(("run", "fault"), KILLS[:: counted(19, full=1)], ids=str, indirect=["run"])
def test_killed_at_each_point_of_a_save_whole_steps_alone_are_listed_and_the_run_goes_on(run, fault):
    returned, said, err = train(run, 50, "train", fault=fault)
    assert returned == -signal.SIGKILL, err
    saving, committed = last(said, "saving"), last(said, "committed")
    assert 0 < committed <= saving < 50
    reader = ckptmgr.CheckpointManager(run, read_only=True)
    newest, skipped = saved(reader)
    assert committed <= newest <= saving
    assert not skipped
    assert all(reader.verify(step) for step in reader.steps())
    with ckptmgr.CheckpointManager(run) as manager:
        assert manager.restore_or(params=trainer.state(0)).step == newest
        manager.save(newest + 1, trainer.state(newest + 1)).result()
        assert saved(manager) == (newest + 1, [])
        assert manager.verify()
    ckptmgr.CheckpointManager(run).close()
    assert folders(run) == reader.steps()


FAILURES = [
    (place, fault)
    for fault in [
        *(f"{kind} {point} 1" for kind in ("fail", "full", "refuse") for point in ("arrays", "description")),
        *(f"{kind} file {n}" for kind in ("fail", "full", "refuse", "short") for n in (1, FILES - 1, FILES)),
    ]
    for place in PLACES
]


@pytest.mark.soak
@pytest.mark.parametrize(("run", "fault"), FAILURES[:: counted(13, full=1)], ids=str, indirect=["run"])
def test_a_write_that_fails_at_any_point_is_said_and_harms_nothing(run, fault, monkeypatch):
    with ckptmgr.CheckpointManager(run) as manager:
        manager.save(1, trainer.state(1)).result()
        with monkeypatch.context() as patch:
            faults.install(fault, patch.setattr)
            with pytest.raises(ckptmgr.SaveError, match="step 2 could not be saved: ") as caught:
                manager.save(2, trainer.state(2)).result()
        assert caught.value.step == 2
        assert caught.value.__cause__ is not None
        reader = ckptmgr.CheckpointManager(run, read_only=True)
        assert manager.steps() == reader.steps() == [1]
        assert folders(run) == [1]
        assert saved(reader) == (1, [])
        manager.save(2, trainer.state(2)).result()
        assert saved(reader) == (2, [])
        assert reader.verify()


@pytest.mark.parametrize("kind", ["fail", "refuse"])
def test_a_note_that_cannot_be_removed_does_no_harm(run, kind, monkeypatch, caplog):
    with ckptmgr.CheckpointManager(run, keep=2) as manager:
        with monkeypatch.context() as patch:
            faults.install(f"{kind} note 1", patch.setattr)
            assert manager.save(1, trainer.state(1)).result().step == 1
            manager.wait()
        assert "a note about a save could not be removed" in caplog.text
        assert manager.steps() == [1]
        assert saved(manager) == (1, [])
        for step in (2, 3):
            manager.save(step, trainer.state(step)).result()
        manager.wait()
        assert manager.steps() == folders(run) == [2, 3]
    ckptmgr.CheckpointManager(run).close()
    assert not (epath.Path(run) / names.SAVING).exists()


def test_a_small_file_that_another_program_changes_before_the_manifest_is_there_is_noticed(run, monkeypatch):
    def changed(draft, sent, real=sealing.look_through):
        place = draft / "params" / "_METADATA"
        data = place.read_bytes()
        place.write_bytes(data[:-1] + b" ")  # of the same size
        return real(draft, sent)

    with ckptmgr.CheckpointManager(run) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(sealing, "look_through", changed)
            with pytest.raises(ckptmgr.SaveError, match="params/_METADATA is not what was written"):
                manager.save(1, trainer.state(1)).result()
        assert manager.steps() == folders(run) == []
        manager.save(1, trainer.state(1)).result()
        assert saved(manager) == (1, [])


def test_a_write_that_fails_while_its_caller_waits_for_the_copies_is_a_failed_save_too(run, monkeypatch):
    with ckptmgr.CheckpointManager(run, max_host_bytes=1) as manager:  # so that `save` writes all but the last
        with monkeypatch.context() as patch:
            faults.install("refuse arrays 1", patch.setattr)
            with pytest.raises(ckptmgr.SaveError, match="step 1 could not be saved: Service Unavailable"):
                manager.save(1, trainer.state(1)).result()
        assert manager.steps() == []
    with ckptmgr.CheckpointManager(run) as manager:  # the server for gs:// cannot take one file in several waves
        manager.save(1, trainer.state(1)).result()
        assert saved(manager) == (1, [])


DELETIONS = [
    (place, point, left, kind)
    for point, left in (("choose", [1, 2]), ("delete", [1, 2]), ("remove", [2]))
    for kind in ("fail", "refuse")
    for place in PLACES
]


@pytest.mark.soak
@pytest.mark.parametrize(
    ("run", "point", "left", "kind"), DELETIONS[:: counted(5, full=1)], ids=str, indirect=["run"]
)
def test_a_deletion_that_fails_is_logged_and_finished_later(run, point, left, kind, monkeypatch, caplog):
    with ckptmgr.CheckpointManager(run, keep=1) as manager:
        manager.save(1, trainer.state(1))
        manager.wait()
        with monkeypatch.context() as patch:
            faults.install(f"{kind} {point} 1", patch.setattr)
            manager.save(2, trainer.state(2))
            manager.wait()
        assert (manager.steps(), folders(run)) == (left, [1, 2])
        assert "could not be" in caplog.text
        manager.save(3, trainer.state(3))
        manager.wait()
        assert (manager.steps(), saved(manager)) == ([3], (3, []))
    ckptmgr.CheckpointManager(run).close()
    assert folders(run) == [3]


AFTER = ("choose", "delete", "remove")  # once a step is committed
SLOW = [(place, point) for point in ("arrays", "description", "file", *AFTER) for place in PLACES]


@in_background
@pytest.mark.soak
@pytest.mark.parametrize(("run", "point"), SLOW[:: counted(7, full=1)], ids=str, indirect=["run"])
def test_while_a_slow_server_is_waited_for_whole_steps_alone_are_listed(run, point, monkeypatch):
    with ckptmgr.CheckpointManager(run, keep=1) as manager:
        manager.save(1, trainer.state(1))
        manager.wait()
        faults.install(f"slow {point} 1", monkeypatch.setattr)
        slow = manager.save(2, trainer.state(2))
        reader = ckptmgr.CheckpointManager(run, read_only=True)
        seen = [saved(reader)]
        assert seen == [(1, [])] or point in AFTER
        while reader.steps() != [2]:
            seen.append(saved(reader))
        assert all(each in ((1, []), (2, [])) for each in seen)
        assert slow.result().step == 2


def test_a_step_that_is_deleted_under_a_readers_hands_is_not_called_damaged(run, monkeypatch):
    with ckptmgr.CheckpointManager(run) as manager:
        for step in (1, 2):
            manager.save(step, trainer.state(step))
        manager.wait()
        reader, check = ckptmgr.CheckpointManager(run, read_only=True), recorded.check_files

        def overtaken(*args, **options):
            if 2 in manager.steps():
                manager.delete(2)
            return check(*args, **options)

        monkeypatch.setattr(recorded, "check_files", overtaken)
        assert saved(reader) == (1, [])


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


def test_a_run_may_have_the_name_of_one_of_its_steps(run):
    with ckptmgr.CheckpointManager(f"{run}/7") as manager:
        for step in (7, 8):
            manager.save(step, trainer.state(step)).result()
        assert manager.steps() == [7, 8]


@pytest.mark.parametrize("goes_on", ["the same manager", "the next one"])
def test_the_removal_of_a_damaged_step_is_stopped_and_its_number_can_be_saved_again(run, goes_on, monkeypatch):
    def stop_after_one(keys, size):
        yield keys[:3]
        if len(keys) > 3:
            raise OSError("the connection is lost")

    def save_again(manager):
        manager.save(2, trainer.state(2)).result()
        assert saved(manager) == (2, [])
        assert manager.verify(2)

    with ckptmgr.CheckpointManager(run) as manager:
        for step in (1, 2):
            manager.save(step, trainer.state(step)).result()
        objects.write(epath.Path(run) / "2" / "params/manifest.ocdbt", b"damaged")
        assert saved(manager) == (1, [2])
        manager.wait()
        with monkeypatch.context() as patch:
            patch.setattr(objects, "_batches", stop_after_one)
            with pytest.raises(ckptmgr.SaveError, match="step 2 is not set aside although it is damaged"):
                manager.save(2, trainer.state(2)).result()
        if goes_on == "the same manager":
            save_again(manager)
    with ckptmgr.CheckpointManager(run) as manager:
        if goes_on == "the next one":
            assert folders(run) == [1]
            save_again(manager)
        assert manager.steps() == folders(run) == [1, 2]
    there = objects.below(epath.Path(run))
    assert len({name.split("/")[2] for name in there if name.startswith(names.DAMAGED)}) == 1
    assert not any(name.startswith((names.DELETING, names.SAVING)) for name in there)


def test_tensorflow_is_not_asked_for_what_is_in_a_bucket_although_it_is_installed(run, tmp_path, monkeypatch):
    """Its client knows neither the address of this server nor the credentials; here there is none at all."""
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: True)
    with pytest.raises(ImportError, match="TensorFlow"):
        epath.Path(run).exists()
    monkeypatch.setattr(doctor, "_PROBE_BYTES", 1 << 20)
    with ckptmgr.CheckpointManager(run) as manager:
        for step in (1, 2, 3):
            manager.save(step, trainer.state(step)).result()
        manager.pin(1)
        manager.rewind(2)
        manager.rewind(3)
        manager.delete(2)
        assert saved(manager) == (3, [])
        assert manager.verify()
        objects.write(manager.directory / "3" / "params/manifest.ocdbt", b"damaged")
        assert saved(manager) == (1, [3])
        manager.save(3, trainer.state(3)).result()
        (aside,) = facts.leftovers(manager.directory)
        assert aside["nbytes"] > 1000
    with pytest.raises(ckptmgr.CheckpointNotFoundError, match=f"did you mean {run}"):
        ckptmgr.CheckpointManager(manager.directory.parent, read_only=True).restore()
    assert places._split(f"{run}@3") == (run, 3, True)
    assert "error" not in doctor._storage(run)
    with ckptmgr.CheckpointManager(tmp_path / "run", mirror=f"{run}/mirror") as manager:
        manager.save(1, trainer.state(1)).result()
        manager.wait()
    objects.delete(paths.resolve(run) / "mirror/1/manifest.json")  # as a checkpoint of stock Orbax
    objects.delete(paths.resolve(run) / "mirror/1/_CHECKPOINT_METADATA")
    objects.write(paths.resolve(run) / "mirror/1/step/commit_success.txt", b"")
    assert interop.adopt(f"{run}/mirror") == [1]
    assert saved(ckptmgr.CheckpointManager(f"{run}/mirror", read_only=True)) == (1, [])
