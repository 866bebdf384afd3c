"""The second home: on a disk, and on servers that speak the protocols of gs:// and s3://."""

import _thread
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import faults
import pytest
import trainer
from conftest import ON_SERVERS, counted, free_port, visible
from etils import epath
from orbax.checkpoint import checkpoint_managers
from test_crash import last, rest, start
from test_job import end, finish
from test_job import start as start_job

import ckptmgr
from ckptmgr.format import files, names
from ckptmgr.run import mirror, transfer

pytestmark = ON_SERVERS


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


PLACES = ["disk", "gs", "s3"]


@pytest.fixture(params=PLACES[:: counted(2, full=1)])
def away(request, tmp_path):
    return at(request.param, request, tmp_path)


def at(place, request, tmp_path):
    if place == "disk":
        return str(tmp_path / "away")
    request.getfixturevalue("servers")
    return f"{place}://bucket/{uuid.uuid4().hex}"


def steps_in(away):
    return ckptmgr.CheckpointManager(away, read_only=True).steps()


def save(manager, *steps):
    for step in steps:
        manager.save(step, trainer.state(step), metrics={"loss": 1 / step})


def saved(manager, *step):
    found = manager.restore(*step, params=trainer.state(0))
    assert trainer.step_of(found.params) == found.step
    return found.step, list(found.skipped)


@pytest.mark.soak
def test_every_checkpoint_is_copied_and_comes_back_when_the_disk_is_gone(home, away):
    with ckptmgr.CheckpointManager(home, keep=1, mirror=away) as manager:
        save(manager, 1, 2, 3)
        manager.wait()
        assert (manager.steps(), steps_in(away)) == ([3], [1, 2, 3])
    shutil.rmtree(home)
    with ckptmgr.CheckpointManager(home, keep=1, mirror=away) as manager:
        start = manager.restore_or(params=trainer.state(0))
        assert (start.resumed, start.step, trainer.step_of(start.params)) == (True, 3, 3)
        assert saved(manager, 1) == (1, [])
        save(manager, 4)
    assert steps_in(away) == [1, 2, 3, 4]
    reader = ckptmgr.CheckpointManager(away, read_only=True)  # it is a run like any other
    assert all(reader.verify(step) for step in reader.steps())
    assert saved(reader) == (4, [])


@pytest.mark.soak
def test_the_mirror_keeps_what_its_own_policies_ask_for_and_what_is_pinned(home, away):
    with ckptmgr.CheckpointManager(home, keep=2, mirror=away, mirror_keep=ckptmgr.every_steps(2)) as manager:
        save(manager, 1, 2, 3)
        manager.wait()
        manager.pin(3)
        save(manager, 4, 5, 6)
        manager.wait()
        assert (manager.steps(), steps_in(away)) == ([3, 5, 6], [2, 3, 4, 6])
        manager.unpin(3)
        manager.wait()
        assert steps_in(away) == [2, 4, 6]


def test_the_best_is_found_in_either_home(home, tmp_path):
    best = ckptmgr.best("loss")
    with ckptmgr.CheckpointManager(home, keep=best, mirror=tmp_path / "away", mirror_keep=best) as manager:
        for step, loss in ((1, 0.5), (2, 0.1), (3, 0.3)):
            manager.save(step, trainer.state(step), metrics={"loss": loss})
    shutil.rmtree(home)
    with ckptmgr.CheckpointManager(home, keep=best, mirror=tmp_path / "away") as manager:
        manager.save(4, trainer.state(4), metrics={"loss": 0.2}).result()
        assert (manager.best(), saved(manager, "best")[0]) == (4, 2)


def damage(step):
    (data,) = (step / "params" / "d").iterdir()
    flip(data)


def flip(file):
    values = bytearray(file.read_bytes())
    values[len(values) // 2] ^= 1
    file.write_bytes(bytes(values))


@pytest.mark.soak
def test_a_step_that_is_damaged_here_is_taken_from_the_mirror(home, away, caplog):
    with ckptmgr.CheckpointManager(home, mirror=away) as manager:
        save(manager, 1, 2)
        manager.wait()
        damage(home / "2")
        assert saved(manager) == (2, [])
        assert saved(manager, 2) == (2, [])
        assert f"step 2 is taken from {away}: step 2: {home}/2/params" in caplog.text
        manager.save(2, trainer.state(2)).result()  # the damaged one makes room
        manager.wait()
        assert manager.verify(2)
    assert steps_in(away) == [1, 2]


def test_a_damaged_step_of_the_mirror_alone_leaves_its_number_free(home, away):
    with ckptmgr.CheckpointManager(home, mirror=away) as manager:
        save(manager, 1, 2)
    shutil.rmtree(home)
    for file in (each for each in names_below(away, "2/params/d")):
        data = bytearray(epath.Path(file).read_bytes())
        data[len(data) // 2] ^= 1
        epath.Path(file).write_bytes(bytes(data))
    with ckptmgr.CheckpointManager(home, mirror=away) as manager:
        assert saved(manager)[0] == 1
        manager.save(2, trainer.state(2)).result()
        assert saved(manager) == (2, [])


def names_below(away, folder):
    return [str(each) for each in (epath.Path(away) / folder).iterdir()]


@pytest.mark.parametrize("name", [names.PIN, names.TRUST])
def test_a_step_that_is_unpinned_or_trusted_while_it_is_copied_is_copied(name, home, away, monkeypatch):
    put, was_there = transfer.put, []

    def put_late(source, draft, files):
        if name in files:
            was_there.append((source / name).exists())
            (source / name).unlink()
        put(source, draft, files)

    monkeypatch.setattr(transfer, "put", put_late)
    with ckptmgr.CheckpointManager(home, keep=5) as manager:
        save(manager, 1)
        manager.wait()
        (epath.Path(home) / "1" / name).write_bytes(b'{"trusted": true, "why": "seen"}')
    with ckptmgr.CheckpointManager(home, mirror=away) as manager:
        manager.wait()
        save(manager, 2)
        manager.wait()
    assert was_there == [True]
    assert steps_in(away) == [1, 2]


def test_a_step_that_is_deleted_stays_in_the_mirror(home, tmp_path):
    with ckptmgr.CheckpointManager(home, mirror=tmp_path / "away") as manager:
        save(manager, 1, 2)
        manager.wait()
        manager.delete(2)
        assert (manager.steps(), steps_in(tmp_path / "away")) == ([1], [1, 2])
        assert manager.restore().step == 2
        manager.rewind(1)
        assert (manager.restore().step, steps_in(tmp_path / "away")) == (1, [1])


def test_a_damaged_step_is_not_copied_and_the_others_are(home, tmp_path, caplog):
    with ckptmgr.CheckpointManager(home) as manager:
        save(manager, 1, 2, 3)
    damage(home / "2")
    with ckptmgr.CheckpointManager(home, mirror=tmp_path / "away") as manager:
        manager.wait()
        assert steps_in(tmp_path / "away") == [1, 3]
    assert f"step 2 is not copied to {tmp_path / 'away'}: the copy is damaged" in caplog.text
    assert visible(tmp_path / "away") == ["1", "3"]


def test_a_step_with_a_damaged_marker_is_not_copied(home, tmp_path, caplog):
    """The marker is the last file to be written there: it is not read back with the others."""
    with ckptmgr.CheckpointManager(home) as manager:
        save(manager, 1, 2)
    flip(home / "1" / "commit_success.txt")
    with ckptmgr.CheckpointManager(home, mirror=tmp_path / "away") as manager:
        manager.wait()
    assert steps_in(tmp_path / "away") == [2]
    assert "step 1 is not copied" in caplog.text


def test_a_step_whose_manifest_was_damaged_after_it_was_read_is_not_copied(home, tmp_path, monkeypatch, caplog):
    copy, saved = mirror.Mirror._copy, threading.Event()

    def damage_first(self, step, offer=None):
        saved.wait(20)
        if step == 2:
            (home / "2" / "manifest.json").write_text("{")
        copy(self, step, offer)

    monkeypatch.setattr(mirror.Mirror, "_copy", damage_first)
    with ckptmgr.CheckpointManager(home, mirror=tmp_path / "away", timeout_s=20) as manager:
        for step in (1, 2, 3):
            manager.save(step, trainer.state(step)).result()
        saved.set()
    assert steps_in(tmp_path / "away") == [1, 3]
    assert "step 2 is not copied" in caplog.text


def test_an_interrupt_as_copying_starts_does_not_stop_later_copies(home, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with ckptmgr.CheckpointManager(home, mirror=tmp_path / "away") as manager:
        save(manager, 1)
        manager.wait()
        with monkeypatch.context() as patch:
            patch.setattr(_thread, "start_new_thread", interrupted)
            with pytest.raises(KeyboardInterrupt):
                manager.pin(1)
        save(manager, 2)
    assert steps_in(tmp_path / "away") == [1, 2]


def test_a_copy_that_was_damaged_on_its_way_is_never_shown(home, tmp_path, monkeypatch, caplog):
    real = ckptmgr.run.transfer.put

    def spoil(source, draft, names):
        real(source, draft, names)
        if any("/d/" in name for name in names):
            damage(draft)

    with ckptmgr.CheckpointManager(home, mirror=tmp_path / "away") as manager:
        with monkeypatch.context() as patch:
            patch.setattr("ckptmgr.run.transfer.put", spoil)
            save(manager, 1)
            manager.wait()
        assert steps_in(tmp_path / "away") == []
        assert "step 1 is not copied" in caplog.text
        assert "the next save tries again" in caplog.text
        save(manager, 2)
    assert steps_in(tmp_path / "away") == [1, 2]


def test_a_copy_that_was_damaged_once_is_made_again_before_the_step_may_go(home, tmp_path, monkeypatch):
    real, damaged = ckptmgr.run.transfer.put, []

    def spoil_once(source, draft, names):
        real(source, draft, names)
        if not damaged and any("/d/" in name for name in names):
            damaged.append(names)
            damage(draft)

    monkeypatch.setattr("ckptmgr.run.transfer.put", spoil_once)
    with ckptmgr.CheckpointManager(home, mirror=tmp_path / "away", keep=ckptmgr.latest(1)) as manager:
        save(manager, 1)
        manager.wait()
        assert steps_in(tmp_path / "away") == [1]
        save(manager, 2)
    assert damaged
    assert steps_in(home) == [2]
    assert steps_in(tmp_path / "away") == [1, 2]


@pytest.mark.soak
def test_a_step_that_is_saved_again_is_copied_again(home, away):
    with ckptmgr.CheckpointManager(home, mirror=away) as manager:
        manager.save(7, trainer.state(1)).result()
        manager.wait()
        manager.save(7, trainer.state(2), on_exists="replace").result()
    shutil.rmtree(home)
    with ckptmgr.CheckpointManager(home, mirror=away) as manager:
        assert trainer.step_of(manager.restore(params=trainer.state(0)).params) == 2


@pytest.mark.soak
@pytest.mark.parametrize("place", PLACES[:: counted(3, full=1)])
def test_killed_at_random_moments_the_mirror_shows_whole_steps_alone(place, home, request, tmp_path):
    draw, interrupted, copied, away = random.Random(0), 0, 0, at(place, request, tmp_path)
    for _ in range(counted(2, full=30)):
        process = start(home, 10**6, "mirror", away)
        assert process.stdout.readline().startswith("resumed")
        while not copied and not ckptmgr.CheckpointManager(away, read_only=True).steps():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(draw.uniform(0.3, 1.0 if place == "disk" else 4.0))
        process.send_signal(signal.SIGKILL)
        said, _ = rest(process)
        reader = ckptmgr.CheckpointManager(away, read_only=True)
        for step in reader.steps():
            assert reader.verify(step)
            assert saved(reader, step) == (step, [])
        copied += len(reader.steps())
        interrupted += max(reader.steps(), default=0) < last(said, "saving")
    assert interrupted
    assert copied
    ckptmgr.CheckpointManager(home, mirror=away, keep=1, mirror_keep=3).close()  # catches up
    assert max(steps_in(away)) == ckptmgr.CheckpointManager(home, read_only=True).latest()


TURN = {"make step": 2}  # the first is at home
POINTS = [f"{when} {point} {TURN.get(point, 1)}" for point in faults.MIRROR_POINTS for when in ("before", "after")]
MATRIX = [
    (place, fault)
    for fault in [*POINTS, "before put 2", "after put 2"]
    for place in PLACES
    if place == "disk" or "make step" not in fault  # a bucket's step is made by its marker
]


@pytest.mark.soak
@pytest.mark.parametrize(("place", "fault"), MATRIX[:: counted(4, full=1)], ids=str)
def test_killed_at_each_point_of_copying_the_next_process_ends_it(place, fault, home, request, tmp_path):
    away = at(place, request, tmp_path)
    process = start(home, 1, "mirror", away, fault=fault)
    rest(process)
    assert process.returncode == -signal.SIGKILL
    assert steps_in(away) == ([1] if "after make step" in fault else [])
    with ckptmgr.CheckpointManager(home, mirror=away) as manager:
        manager.wait()
        reader = ckptmgr.CheckpointManager(away, read_only=True)
        assert (reader.steps(), saved(reader)) == ([1], (1, []))
        assert reader.verify(1)


def test_what_was_copied_before_a_crash_is_not_copied_again(home, tmp_path):
    away = tmp_path / "away"
    rest(start(home, 1, "mirror", str(away), fault="before check 1"))
    (data,) = (away / ".ckptmgr" / "saving" / "1" / "params" / "d").iterdir()
    before = os.stat(data)
    with ckptmgr.CheckpointManager(home, mirror=away) as manager:
        manager.wait()
    after = os.stat(away / "1" / "params" / "d" / data.name)
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.soak
def test_what_was_begun_for_another_save_of_the_step_is_begun_anew(home, away, monkeypatch):
    rest(start(home, 1, "mirror", away, fault="before check 1"))
    shutil.rmtree(home)
    copy, copied = mirror.Mirror._copy, []
    monkeypatch.setattr(mirror.Mirror, "_copy", lambda *given: (copied.append(given[1]), copy(*given)))
    with ckptmgr.CheckpointManager(home, mirror=away) as manager:
        manager.save(1, trainer.state(5)).result()
        manager.wait()
        manager = ckptmgr.CheckpointManager(away, read_only=True)
        assert trainer.step_of(manager.restore(1, params=trainer.state(0)).params) == 5
        assert manager.verify(1)
    assert copied == [1]  # at once, and not only after it was read back as damaged


def test_a_mirror_that_cannot_be_written_to_is_said_and_neither_stops_saving_nor_fills_the_disk(
    home, tmp_path, caplog
):
    away = tmp_path / "away"
    away.write_text("a file is in its place")
    with ckptmgr.CheckpointManager(home, keep=1, mirror=away) as manager:
        save(manager, 1, 2, 3)
        manager.wait()
        assert manager.steps() == [3]
        assert f"the mirror {away} cannot be written to" in caplog.text
        away.unlink()
        save(manager, 4)
        manager.wait()
        assert manager.steps() == [4]
        assert 4 in steps_in(away)  # and 3, if it was copied before it was deleted


def test_a_server_that_is_away_leaves_what_is_here_usable(home, servers, monkeypatch, caplog):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://localhost:{free_port()}")
    away = f"s3://bucket/{uuid.uuid4().hex}"
    lost = {"CKPTMGR_AWAY": away}
    program = (
        "import os, sys, ckptmgr, trainer\n"
        "with ckptmgr.CheckpointManager(sys.argv[1], keep=1, mirror=os.environ['CKPTMGR_AWAY']) as manager:\n"
        "    for step in (1, 2):\n"
        "        manager.save(step, trainer.state(step)).result()\n"
        "    manager.wait()\n"
        "    print(manager.steps(), manager.restore(params=trainer.state(0)).step)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(home)],
        env=os.environ | lost | {"PYTHONPATH": os.path.dirname(trainer.__file__), "AWS_MAX_ATTEMPTS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.stdout.strip() == "[2] 2", ended.stderr
    assert f"the mirror {away} cannot be written to" in ended.stderr
    assert f"the mirror {away} cannot be read" in ended.stderr


def test_a_slow_mirror_holds_up_neither_saving_nor_loses_what_it_keeps(home, tmp_path, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setitem(faults.KINDS, "slow", lambda *_: go_on.wait(200))
    faults.install("slow put 1", monkeypatch.setattr)
    with ckptmgr.CheckpointManager(home, keep=1, mirror=tmp_path / "away") as manager:
        save(manager, 1, 2, 3)
        manager.restore(params=trainer.state(0))
        assert manager.steps() == [1, 2, 3]  # none is deleted before it is copied
        go_on.set()
        manager.wait()
        assert manager.steps() == [3]
    assert steps_in(tmp_path / "away") == [1, 2, 3]


def test_two_processes_have_one_mirror(home, tmp_path, monkeypatch):
    monkeypatch.setenv("CKPTMGR_MIRROR", str(tmp_path / "away"))
    assert finish(start_job(2, str(home), "save", "1", "2", "3"))[0] == "steps 2 3"
    assert steps_in(tmp_path / "away") == [1, 2, 3]
    shutil.rmtree(home)
    assert finish(start_job(2, str(home), "load")) == ["restored 3 skipped"] * 2
    assert finish(start_job(2, str(home), "load", "1")) == ["restored 1 skipped"] * 2


# ---------------------------------------------------------------- copied by the processes of a job


def copied(processes):
    """By process: the files that it has copied, and their bytes."""
    return [json.loads(said) for said in finish(processes)]


def written_by(process, found):
    """The data files of a process among these."""
    return {name for name in found if re.search(rf"/(ocdbt\.)?process_{process}/d/", name)}


def in_mirror(home, away, *steps):
    """Whether the mirror holds these steps, whole, with the files that they have at home."""
    reader = ckptmgr.CheckpointManager(away, read_only=True)
    if "://" not in str(away):
        for step in map(str, steps):
            names = [sorted(files.walk(epath.Path(place) / step)[1]) for place in (home, away)]
            assert names[0] == names[1]
        assert not list((away / ".ckptmgr" / "saving").iterdir())
    return reader.steps() == [*steps] and all(reader.verify(step) for step in steps)


@pytest.mark.parametrize("place", PLACES[:: counted(2, full=1)])
@pytest.mark.parametrize("count", [2, 4][: counted(1, full=2)])
def test_each_process_of_a_job_copies_what_it_wrote(count, place, home, request, tmp_path, monkeypatch):
    away = at(place, request, tmp_path)
    monkeypatch.setenv("CKPTMGR_MIRROR", away)
    found = copied(start_job(count, str(home), "mirrored", "1", "2", devices=1, timeout_s=60.0))
    assert in_mirror(home, Path(away) if place == "disk" else away, 1, 2)
    everything = {f"{step}/{name}" for step in (1, 2) for name in files.walk(epath.Path(home) / str(step))[1]}
    assert sorted(name for one in found for name in one) == sorted(
        everything - {f"{step}/{names.COMMITTED}" for step in (1, 2)}
    )  # each once
    for process, one in enumerate(found):
        assert written_by(process, everything) <= one.keys()
        assert process == 0 or written_by(process, everything) == one.keys()
    nbytes = [sum(one.values()) for one in found]
    assert max(nbytes) <= 1.1 * sum(nbytes) / count


def test_a_process_that_is_slow_to_copy_is_waited_for(home, tmp_path, monkeypatch):
    monkeypatch.setenv("CKPTMGR_MIRROR", str(tmp_path / "away"))
    found = copied(start_job(2, str(home), "mirrored", "1", faults={1: "slow put 1"}, timeout_s=8.0))
    assert in_mirror(home, tmp_path / "away", 1)
    assert found[1]
    assert not found[0].keys() & found[1].keys()


@pytest.mark.parametrize("fault", ["fail put 1", "not shared"])
def test_what_another_process_cannot_copy_process_0_copies(fault, home, tmp_path, monkeypatch):
    """The disk of the other fails; or what it sees under the name of the mirror is a disk of its own."""
    folder = "away-INDEX" if fault == "not shared" else "away-0"
    monkeypatch.setenv("CKPTMGR_MIRROR", str(tmp_path / folder))
    faults = {} if fault == "not shared" else {1: fault}
    found = copied(start_job(2, str(home), "mirrored", "1", faults=faults))
    assert in_mirror(home, tmp_path / "away-0", 1)
    assert written_by(1, found[0])
    assert not found[1]
    assert not (tmp_path / "away-1").exists()


@pytest.mark.parametrize(("victim", "fault"), [(1, "before put 1"), (1, "after put 1"), (0, "before check 1")])
def test_a_process_killed_as_it_copies_leaves_the_rest_to_process_0(victim, fault, home, tmp_path, monkeypatch):
    away = tmp_path / "away"
    monkeypatch.setenv("CKPTMGR_MIRROR", str(away))
    with monkeypatch.context() as patch:
        patch.setenv("CKPTMGR_ALONE", "")
        processes = start_job(2, str(home), "mirrored", "1", faults={victim: fault}, timeout_s=8.0)
        try:
            assert processes[victim].wait(100) == -signal.SIGKILL
            out, err = processes[1 - victim].communicate(timeout=100)
        finally:
            end(processes)
    if victim == 1:
        assert processes[0].returncode == 0, out + err
        of_victim = written_by(1, {f"1/{name}" for name in files.walk(epath.Path(home) / "1")[1]})
        assert len(written_by(1, json.loads(out.splitlines()[-1]))) == len(of_victim) - fault.startswith("after")
        assert "process 0 copies the parts of other processes too: process 1 of 2 did not reach" in err
        assert in_mirror(home, away, 1)
    found = copied(start_job(2, str(home), "mirrored", "2"))
    assert in_mirror(home, away, 1, 2)
    assert not any(name.startswith("1/") for one in found for name in one)  # what was copied stays


def test_options_that_make_no_sense_are_refused(home):
    with pytest.raises(ValueError, match="mirror_keep= needs a mirror: give mirror= too"):
        ckptmgr.CheckpointManager(home, mirror_keep=3)
    with pytest.raises(ValueError, match=r"mirror=.* is the run itself"):
        ckptmgr.CheckpointManager(home, mirror=home)
    (home.parent / "link").symlink_to(home)
    with pytest.raises(ValueError, match=r"mirror=.* is the run itself"):
        ckptmgr.CheckpointManager(home, mirror=home.parent / "link")
    with pytest.raises(ValueError, match="mirror takes a path on this machine, gs:// or s3://, not ftp://"):
        ckptmgr.CheckpointManager(home, mirror="ftp://host/run")
    with pytest.raises(ValueError, match="read_only=True contradicts mirror_keep="):
        ckptmgr.CheckpointManager(home, read_only=True, mirror=str(home) + "2", mirror_keep=1)
    assert not home.exists()


def test_a_read_only_manager_reads_from_the_mirror_and_copies_nothing(home, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="ckptmgr")
    with ckptmgr.CheckpointManager(home) as manager:
        save(manager, 1)
    reader = ckptmgr.CheckpointManager(home, read_only=True, mirror=tmp_path / "away")
    assert saved(reader) == (1, [])
    assert not (tmp_path / "away").exists()


@pytest.mark.parametrize("is_empty", [False, True], ids=["steps here", "none here"])
def test_the_best_comes_from_here_while_the_mirror_cannot_be_read(home, tmp_path, caplog, is_empty):
    away = tmp_path / "away"
    with ckptmgr.CheckpointManager(home, keep=ckptmgr.best("loss")) as manager:
        for step in () if is_empty else (1, 2, 3):
            manager.save(step, trainer.state(step), metrics={"loss": abs(step - 2)})
    away.symlink_to(away)
    with ckptmgr.CheckpointManager(home, keep=ckptmgr.best("loss"), mirror=away) as manager:
        if is_empty:
            with pytest.raises(ckptmgr.CheckpointError, match=r"away cannot be read: .*symbolic links"):
                manager.restore("best", params=trainer.state(0))
        else:
            assert manager.restore("best", params=trainer.state(0)).step == 2
            assert f"the mirror {away} cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [(checkpoint_managers.LatestN(1), [3]), (checkpoint_managers.EveryNSteps(1, exact_interval=False), [1, 2, 3])],
    ids=["latest", "every"],
)
def test_the_policies_of_the_mirror_are_asked_in_the_order_of_steps(policy, wanted, home, tmp_path, monkeypatch):
    put, copied = transfer.put, set()

    def put_noted(source, draft, names):
        copied.add(int(source.name))
        put(source, draft, names)

    monkeypatch.setattr(transfer, "put", put_noted)
    with ckptmgr.CheckpointManager(home) as manager:
        save(manager, 1, 2, 3)
    with ckptmgr.CheckpointManager(home, mirror=tmp_path / "away", mirror_keep=policy) as manager:
        manager.wait()
    assert (steps_in(tmp_path / "away"), sorted(copied)) == (wanted, wanted)
