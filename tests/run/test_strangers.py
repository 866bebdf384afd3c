"""What others put into the directory of a run is no step and stays as it is: on a disk, in a mirror, a bucket."""

import logging
import os
import shutil
import subprocess
import sys
import uuid

import jax.numpy as jnp
import numpy as np
import pytest
import strangers
from conftest import counted, on_servers
from etils.epath.backend import fsspec_backend

import ckptmgr
from ckptmgr import CheckpointManager

TEMPLATE = {"w": jnp.zeros((4, 4)), "b": jnp.zeros(3)}


def params(step):
    return {"w": jnp.full((4, 4), float(step)), "b": jnp.arange(3.0)}


def save(manager, *steps):
    for step in steps:
        manager.save(step, params(step), metrics={"loss": 1 / step})


@pytest.fixture
def run(tmp_path):
    with CheckpointManager(tmp_path / "run") as manager:
        save(manager, 5, 10, 15)
    return tmp_path / "run"


def check(manager, *steps):
    """Every look at a run whose steps are these, and nothing but these."""
    newest = steps[-1]
    assert manager.steps() == list(steps)
    assert manager.latest() == newest
    for found in (manager.restore(params=TEMPLATE), manager.restore_or(params=TEMPLATE)):
        assert (found.step, found.resumed, found.skipped) == (newest, True, {})
        assert np.array_equal(found.params["w"], params(newest)["w"])
    assert [info.step for info in manager.infos()] == list(steps)
    assert all(info.distrusted is None for info in manager.infos())
    assert manager.best("loss") == newest
    assert list(manager.watch(timeout_s=0, poll_s=0)) == list(steps)
    assert manager.verify() and manager.verify().step == newest  # noqa: PT018


def check_life(run, steps, **options):
    """Looks at a run, saves once more under `keep=1`, closes, and looks at it again."""
    check(CheckpointManager(run, read_only=True), *steps)
    with CheckpointManager(run, keep=1, **options) as manager:
        if not options:  # a mirror has the run tidied as it is opened
            check(manager, *steps)
        save(manager, 20)
        manager.wait()
        check(manager, 20)
    with CheckpointManager(run, keep=1, **options) as manager:
        check(manager, 20)


def without(kinds, *names):
    return {what: kind for what, kind in kinds.items() if kind[0] not in names}


@pytest.fixture(autouse=True)
def _nothing_is_said(caplog):
    yield
    assert "Traceback" not in caplog.text


def test_fifty_kinds_of_strangers_are_not_there_for_us_and_stay(run):
    kinds = without(strangers.KINDS, "20")
    assert len(kinds) > 140
    before = strangers.make(run, kinds)
    check_life(run, (5, 10, 15))
    assert strangers.seen(run, [name for name, _ in kinds.values()]) == before
    assert set(os.listdir(run)) == {"20", ".ckptmgr", *(name for name, _ in kinds.values())}


ALONE = list(without(strangers.KINDS, "20"))


@pytest.mark.soak
@pytest.mark.parametrize("what", ALONE[:: counted(40, full=1)])
def test_each_kind_alone(run, what):
    kinds = {what: strangers.KINDS[what]}
    before = strangers.make(run, kinds)
    check_life(run, (5, 10, 15))
    assert strangers.seen(run, [kinds[what][0]]) == before


@pytest.mark.parametrize("what", strangers.LIKE_OURS)
def test_what_cannot_be_told_from_damage_is_passed_over_loudly_and_stays(run, what, caplog):
    name, make = strangers.LIKE_OURS[what]
    make(run / name, run)
    before = strangers.seen(run, [name])
    with CheckpointManager(run, keep=1) as manager:
        assert manager.steps() == [5, 10, 15, int(name)]
        save(manager, 20)
        manager.wait()
        assert manager.steps() == [5, 10, 15, 20, int(name)]
        assert "nothing is deleted" in caplog.text
        found = manager.restore(params=TEMPLATE)
        assert (found.step, list(found.skipped)) == (20, [int(name)])
        assert f"step {name} is passed over as damaged" in caplog.text
        save(manager, 21)
        manager.wait()
        assert manager.steps() == [21, int(name)]
    assert strangers.seen(run, [name]) == before


# ---------------------------------------------------------------- a number that a stranger has

IN_THE_WAY = [what for what, (name, _) in strangers.KINDS.items() if name.isdecimal() and name.isascii()]
IN_THE_WAY = [
    what for what in IN_THE_WAY
    if str(int(strangers.KINDS[what][0])) == strangers.KINDS[what][0] and not what.startswith("empty_folder")
]  # fmt: skip


def test_a_number_that_a_stranger_has_is_refused_by_name_and_the_others_are_saved(run):
    before = strangers.make(run, strangers.KINDS)
    with CheckpointManager(run) as manager:
        for what in IN_THE_WAY:
            name = strangers.KINDS[what][0]
            for how in ("error", "skip", "replace"):
                with pytest.raises(
                    ckptmgr.SaveError, match=f"{name} exists and is not a checkpoint; move it away"
                ):
                    manager.save(int(name), params(1), on_exists=how)
        save(manager, 16)
    assert manager.steps() == [5, 10, 15, 16]
    assert strangers.seen(run, [name for name, _ in strangers.KINDS.values()]) == before
    assert os.listdir(run / ".ckptmgr" / "saving") == []


def test_an_empty_folder_that_has_the_number_makes_room(run):
    (run / "16").mkdir()
    with CheckpointManager(run) as manager:
        save(manager, 16)
    assert manager.steps() == [5, 10, 15, 16]


# ---------------------------------------------------------------- a step under another name


def parts(step):
    """Of the files of a step: all, all but one, and one alone."""
    files = {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}
    return [files, *(files - {each} for each in sorted(files)), *({each} for each in sorted(files))]


@pytest.mark.parametrize("name", ["-5", "005", "old-5", "step_5", "x5", "5 copy 5"])
def test_a_copy_of_a_step_under_another_name_is_no_step_also_if_no_other_is_left(run, name):
    for step in (10, 15):
        shutil.rmtree(run / str(step))
    whole = (run / "5").rename(run.parent / "whole")
    for part in parts(whole):
        for file in part:
            (run / name / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(whole / file, run / name / file)
        assert CheckpointManager(run, read_only=True).steps() == [], sorted(part)
        shutil.rmtree(run / name)
    shutil.copytree(whole, run / name)
    before = strangers.seen(run, [name])
    with CheckpointManager(run, keep=1) as manager:
        with pytest.raises(ckptmgr.CheckpointNotFoundError):
            manager.delete(5)
        with pytest.raises(ckptmgr.CheckpointNotFoundError, match=f"{name} is a checkpoint under another name"):
            manager.restore(params=TEMPLATE)
        save(manager, 20, 21)
    assert strangers.seen(run, [name]) == before
    check(CheckpointManager(run, read_only=True), 21)


# ---------------------------------------------------------------- a mirror on a disk


def test_strangers_in_a_mirror_and_at_home_stay_and_the_others_are_copied(run, tmp_path, caplog):
    away = tmp_path / "away"
    with CheckpointManager(run, mirror=away):
        pass
    kinds = without(strangers.KINDS, "20")
    before = [strangers.make(place, kinds) for place in (run, away)]
    check_life(run, (5, 10, 15), mirror=away, mirror_keep=1)
    check(CheckpointManager(away, read_only=True), 20)
    names = [name for name, _ in kinds.values()]
    assert [strangers.seen(place, names) for place in (run, away)] == before
    for place in (run, away):
        assert set(os.listdir(place)) == {"20", ".ckptmgr", *names}
    assert "not a checkpoint" not in caplog.text


def test_a_stranger_in_a_mirror_that_has_the_number_of_a_step_is_said_and_stays(run, tmp_path, caplog):
    away = tmp_path / "away"
    (away / "10").mkdir(parents=True)
    (away / "10" / "file").write_text("mine")
    before = strangers.seen(away, ["10"])
    with caplog.at_level(logging.ERROR), CheckpointManager(run, mirror=away) as manager:
        save(manager, 20)
        manager.wait()
    assert CheckpointManager(away, read_only=True).steps() == [5, 15, 20]
    assert strangers.seen(away, ["10"]) == before
    assert f"{away / '10'} exists and is not a checkpoint; move it away" in caplog.text


# ---------------------------------------------------------------- a folder of ours that is somebody's


def _of_another_program(ours):
    ours.mkdir()
    for name in ("saving", "lock", "journal.jsonl", "version"):
        (ours / name).write_text("mine")


def _folders(ours):
    for name in ("lock", "journal.jsonl", "version"):
        (ours / name / "below").mkdir(parents=True)


OURS = {
    "a file": (lambda ours: ours.write_text("mine"), r"\.ckptmgr is a file; .* Move the file away"),
    "a FIFO": (os.mkfifo, r"\.ckptmgr is a file; .* Move the file away"),
    "a symlink": (lambda ours: ours.symlink_to("5"), r"\.ckptmgr is a symlink"),
    "a dangling symlink": (lambda ours: ours.symlink_to("/nowhere/at/all"), r"\.ckptmgr is a symlink"),
    "full of files": (_of_another_program, r"saving is a file; .* Move the file away"),
    "full of folders": (_folders, r"lock is a directory; .* Move the directory away"),
}


@pytest.mark.parametrize("what", OURS)
def test_a_folder_of_our_name_that_is_somebodys_is_refused_by_name_and_read_beside(run, what, tmp_path):
    make, said = OURS[what]
    shutil.rmtree(run / ".ckptmgr")
    make(run / ".ckptmgr")
    before = strangers.seen(run, [".ckptmgr", "5"])
    with pytest.raises(OSError, match=said):
        CheckpointManager(run)
    if what == "full of folders":
        os.rmdir(run / ".ckptmgr" / "saving")  # which is ours
        os.utime(run / ".ckptmgr", ns=(0, before[run / ".ckptmgr"][2]))
    assert strangers.seen(run, [".ckptmgr", "5"]) == before
    check(CheckpointManager(run, read_only=True), 5, 10, 15)
    with CheckpointManager(tmp_path / "other", mirror=run) as manager:  # the training goes on without its mirror
        save(manager, 16)
    assert manager.steps() == [16]


def test_a_folder_of_ours_without_permissions_is_refused_by_name(run, nobody):
    (run / ".ckptmgr").chmod(0)
    nobody()
    with pytest.raises(PermissionError, match=r"\.ckptmgr cannot be written to: no permission"):
        CheckpointManager(run)
    check(CheckpointManager(run, read_only=True), 5, 10, 15)
    (run / ".ckptmgr").chmod(0o700)


def test_a_folder_of_ours_on_another_file_system_is_refused_by_name(run):
    command = ["mount", "-t", "tmpfs", "none", run / ".ckptmgr"]
    if subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("only root may mount")
    try:
        with pytest.raises(OSError, match=r"\.ckptmgr is on another file system than the steps.*Unmount it"):
            CheckpointManager(run)
        check(CheckpointManager(run, read_only=True), 5, 10, 15)
    finally:
        subprocess.run(["umount", run / ".ckptmgr"], check=True)


def test_a_folder_of_ours_may_be_removed_while_the_run_is_open(run):
    """Then saves go on, another process is still kept out, and what others name as version 1 did stays theirs."""
    with CheckpointManager(run, keep=2) as manager:
        shutil.rmtree(run / ".ckptmgr")
        save(manager, 20)
        manager.wait()
        assert manager.steps() == [15, 20]
        program = f"import ckptmgr; ckptmgr.CheckpointManager({str(run)!r})"
        second = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert "is being written to by process" in second.stderr
        shutil.rmtree(run / ".ckptmgr")
        manager.delete(15)
        save(manager, 25)
    before = strangers.make(run, {"": ("5.replaced", strangers.folder_with_a_file)})
    with CheckpointManager(run) as manager:
        check(manager, 20, 25)
    assert strangers.seen(run, ["5.replaced"]) == before


def test_another_process_that_took_a_run_whose_lock_was_removed_is_named(run):
    program = f"import ckptmgr; m = ckptmgr.CheckpointManager({str(run)!r}); print(flush=True); input()"
    with CheckpointManager(run) as manager:
        (run / ".ckptmgr" / "lock").unlink()
        other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert other.stdout.readline() == b"\n"
        for call in (lambda: save(manager, 20), lambda: manager.delete(5)):
            with pytest.raises(ckptmgr.SaveError, match=f"is being written to by process {other.pid}"):
                call()
        other.communicate(b"\n")
        save(manager, 20)
    check(CheckpointManager(run, read_only=True), 5, 10, 15, 20)


# ---------------------------------------------------------------- a bucket

PLACES = ["gs", "s3"]


@pytest.fixture
def bucket(request, servers):
    return f"{request.param}://bucket/{uuid.uuid4().hex}/run"


def client_of(run):
    client = fsspec_backend.fs(run)
    return client, client._strip_protocol(run)


@on_servers
@pytest.mark.soak
@pytest.mark.parametrize("bucket", PLACES[:: counted(2, full=1)], indirect=True)
def test_strangers_in_a_bucket_are_not_there_for_us_and_stay(bucket):
    with CheckpointManager(bucket) as manager:
        save(manager, 5, 10, 15)
    client, run = client_of(bucket)
    strangers.put(client, run)
    before = strangers.objects(client, run, "5", "10", "15")
    assert len(before) > 30
    check(CheckpointManager(bucket, read_only=True), 5, 10, 15)
    with CheckpointManager(bucket, keep=1) as manager:
        save(manager, 20)
        manager.wait()
        check(manager, 20)
    assert strangers.objects(client, run, "20") == before
    with CheckpointManager(bucket) as manager:
        for number in (2024, 2025, 2027, 2028, 25, 7)[:: counted(3, full=1)]:
            with pytest.raises(ckptmgr.SaveError, match=f"{number} exists and is not a checkpoint; move it away"):
                manager.save(number, params(1))
        save(manager, 30)
        manager.wait()
        assert manager.steps() == [20, 30]
    assert strangers.objects(client, run, "20", "30") == before


@on_servers
@pytest.mark.parametrize("bucket", PLACES[:: counted(2, full=1)], indirect=True)
def test_copies_of_a_step_in_a_bucket_are_no_steps_also_if_no_other_is_left(bucket):
    with CheckpointManager(bucket) as manager:
        save(manager, 5)
        manager.wait()
        client, run = client_of(bucket)
        for name in ("-5", "005", "old-5"):
            client.copy(f"{run}/5", f"{run}/{name}", recursive=True)
        before = strangers.objects(client, run, "5")
        manager.delete(5)
        assert CheckpointManager(bucket, read_only=True).steps() == []
        save(manager, 20)
    assert strangers.objects(client, run, "20") == before
    check(CheckpointManager(bucket, read_only=True), 20)


@on_servers
@pytest.mark.soak
@pytest.mark.parametrize("bucket", PLACES[:: counted(2, full=1)], indirect=True)
def test_strangers_in_a_mirror_in_a_bucket_stay_and_the_others_are_copied(run, bucket, caplog):
    client, away = client_of(bucket)
    strangers.put(client, away, copies=False)
    before = strangers.objects(client, away)
    with CheckpointManager(run, mirror=bucket, mirror_keep=1) as manager:
        save(manager, 20)
        manager.wait()
        save(manager, 2024)
        manager.wait()
        save(manager, 2040)
    assert strangers.objects(client, away, "2040") == before
    assert CheckpointManager(bucket, read_only=True).steps() == [2040]
    assert "2024 exists and is not a checkpoint; move it away" in caplog.text
