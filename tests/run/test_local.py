"""The run directory: what counts as a step, and what an interrupted process left behind."""

import fcntl
import logging
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
from conftest import visible
from etils import epath

import ckptmgr
from ckptmgr import CheckpointManager
from ckptmgr.format import names, paths
from ckptmgr.run import journal
from ckptmgr.run.catalog import open_catalog


@pytest.fixture
def run(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        for step in (5, 10):
            manager.save(step, {"w": jnp.full(3, float(step))})
    return tmp_path


def test_only_whole_numbers_are_steps(run):
    for name in ("07", "-3", "12.orbax-checkpoint-tmp", "notes", "5.5", ".deleted-3-1"):
        (run / name).mkdir()
    (run / "11").write_text("a file")
    assert CheckpointManager(run, read_only=True).steps() == [5, 10]


def test_what_a_process_was_stopped_in_is_tidied_up_at_the_next_start(run):
    ours = run / ".ckptmgr"
    (ours / "deleting").mkdir()
    (run / "5").rename(ours / "deleting" / "5-123")
    (ours / "saving" / "12" / "params").mkdir(parents=True)
    assert CheckpointManager(run, read_only=True).steps() == [10]
    assert (ours / "deleting" / "5-123").exists()  # a reader leaves everything as it is
    CheckpointManager(run).close()
    assert visible(run) == ["10"]
    assert not list((ours / "saving").iterdir()) + list((ours / "deleting").iterdir())


def test_a_step_caught_between_its_old_and_its_new_self_comes_back(run):
    replaced = run / ".ckptmgr" / "replaced"
    replaced.mkdir()
    (run / "5").rename(replaced / "5")
    with CheckpointManager(run) as manager:
        assert manager.steps() == [5, 10]
        assert float(manager.restore(5).params["w"][0]) == 5.0
    (replaced / "5").mkdir()
    CheckpointManager(run).close()
    assert (visible(run), list(replaced.iterdir())) == (["10", "5"], [])


def test_what_was_replaced_does_not_come_back_in_the_place_of_a_step_that_was_deleted(run):
    (run / ".ckptmgr" / "replaced" / "5").mkdir(parents=True)
    with CheckpointManager(run) as manager:
        (run / ".ckptmgr" / "replaced" / "5").mkdir(parents=True, exist_ok=True)
        manager.delete(5)
    with CheckpointManager(run) as manager:
        assert manager.steps() == [10]


def of_version_1(run):
    """The same run as version 1 left it when it was killed, and entries of strangers with names like its."""
    (run / ".ckptmgr/journal.jsonl").rename(run / ".journal.jsonl")
    shutil.rmtree(run / ".ckptmgr")
    (run / ".writer").write_text('{"host": "h", "pid": 17, "since": "2026-11-24T10:00:00+00:00"}')
    (run / ".shared").write_text("0123456789abcdef")
    (run / "10").rename(run / "10.replaced")
    shutil.copytree(run / "5", run / "5.replaced")
    shutil.copytree(run / "5", run / ".deleted-4-17")
    shutil.copytree(run / "5", run / "3.damaged-17")
    (run / "12.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    ours = set(os.listdir(run)) - {"5", "10"}
    for name in (".deleted-emails", "my.orbax-checkpoint-tmp", "thesis.replaced", "5.damaged", ".deleted-4"):
        (run / name).mkdir()
        (run / name / "file").write_text("mine")
    of_stock = run / "13.orbax-checkpoint-tmp"
    of_stock.mkdir()
    (of_stock / "_CHECKPOINT_METADATA").write_text('{"item_handlers": {}}')
    return ours, set(os.listdir(run)) - ours - {"5", "10"}


def test_what_version_1_left_beside_the_steps_is_moved_once(run):
    ours, others = of_version_1(run)
    CheckpointManager(run, read_only=True).restore()
    assert ours <= set(os.listdir(run))
    with CheckpointManager(run) as manager:
        assert manager.steps() == [5, 10]
        assert [event["step"] for event in journal.read(manager.directory)] == [5, 10]
    assert set(os.listdir(run)) == {"5", "10", ".ckptmgr", *others}
    assert [name.split("-")[0] for name in os.listdir(run / ".ckptmgr" / "damaged")] == ["3"]
    (run / "7.orbax-checkpoint-tmp").mkdir()  # later it is somebody's
    CheckpointManager(run).close()
    assert (run / "7.orbax-checkpoint-tmp").exists()


def test_a_process_of_version_1_that_writes_is_not_disturbed(run):
    of_version_1(run)
    with open(run / ".writer") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ckptmgr.SaveError, match="is being written to by process 17 on h"):
            CheckpointManager(run)
    CheckpointManager(run).close()


def test_deleting_takes_the_step_away_before_its_files(run, monkeypatch, caplog):
    listing = open_catalog(epath.Path(run))
    monkeypatch.setattr(type(listing.path(5)), "rmtree", lambda self: (_ for _ in ()).throw(OSError("busy")))
    listing.delete(5)
    assert listing.steps() == [10]
    assert "could not be removed; the next start tries again: busy" in caplog.text


IN_THE_WAY = [
    (".ckptmgr/deleting", "a file", "delete"),
    (".ckptmgr/deleting", "a symlink", "delete"),
    (".ckptmgr/damaged", "a file", "save"),
    (".ckptmgr/damaged", "a symlink", "save"),
    *(("5/PINNED", what, change) for what in ("a folder", "a FIFO", "a symlink") for change in ("pin", "unpin")),
]


@pytest.mark.parametrize(("place", "what", "change"), IN_THE_WAY)
def test_what_is_in_the_way_of_a_change_is_named_in_an_error_of_ours(run, place, what, change, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    make = {
        "a file": lambda path: path.write_text("notes"),
        "a symlink": lambda path: path.symlink_to(tmp_path / "elsewhere"),
        "a folder": lambda path: (path / "notes").mkdir(parents=True),
        "a FIFO": os.mkfifo,
    }[what]
    with CheckpointManager(run) as manager:
        if change == "save":
            (run / "10" / "manifest.json").write_bytes(b"")
            assert manager.restore().step == 5
        make(run / place)
        if change == "unpin" and what in ("a FIFO", "a symlink"):  # it is removed: what it leads to stays
            manager.unpin(5)
            assert (tmp_path / "elsewhere").exists()
            return
        act = {
            "delete": lambda: manager.delete(5),
            "save": lambda: manager.save(10, {"w": jnp.ones(3)}),
            "pin": lambda: manager.pin(5),
            "unpin": lambda: manager.unpin(5),
        }[change]
        with pytest.raises(ckptmgr.SaveError, match=rf"step {'10' if change == 'save' else '5'} is not .*{place}"):
            act()
    assert not os.listdir(tmp_path / "elsewhere")


class _Replaces(logging.Handler):
    """Another process, which puts a whole step in the place of one when it is told to be damaged."""

    def __init__(self, run, good):
        super().__init__()
        self.run, self.good = run, good

    def emit(self, record):
        if "is passed over as damaged" in record.getMessage() and self.good.exists():
            shutil.rmtree(self.run / "10")
            self.good.rename(self.run / "10")


def test_a_step_that_was_replaced_after_it_was_found_damaged_is_not_marked_as_damaged(run, tmp_path):
    shutil.copytree(run / "10", tmp_path / "good")
    (run / "10" / "manifest.json").write_bytes(b"")
    handler = _Replaces(run, tmp_path / "good")
    logging.getLogger("ckptmgr").addHandler(handler)
    try:
        with CheckpointManager(run) as manager:
            assert manager.restore().step == 5
            assert manager.info(10).distrusted is None
    finally:
        logging.getLogger("ckptmgr").removeHandler(handler)


def test_paths():
    assert str(paths.resolve("gs://bucket/run")) == "gs://bucket/run"
    assert paths.resolve("a/../b") == epath.Path(os.getcwd()) / "b"
    assert paths.resolve("~/x") == epath.Path(os.path.expanduser("~")) / "x"
    assert str(paths.resolve("/data/s3/x")) == "/data/s3/x"
    assert str(paths.resolve("/data/s3:/x")) == "/data/s3:/x"


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_path_that_would_be_another_than_it_says_is_refused(scheme, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    meant, merged = f"{scheme}://bucket/run", f"{scheme}:/bucket/run"
    with pytest.raises(ValueError, match=f"^directory takes .*, not {merged}: write '{meant}' as text"):
        CheckpointManager(Path(meant))
    with pytest.raises(ValueError, match=f"^mirror takes .*, not {merged}: write '{meant}' as text"):
        CheckpointManager("run", mirror=Path(meant))
    for path in (f"/{scheme}/bucket/run", f"/data/../{scheme}/bucket/run"):
        with pytest.raises(ValueError, match=f"not /{scheme}/bucket/run: .* read as {meant}. .* write '{meant}'"):
            CheckpointManager(path)
    assert not list(tmp_path.iterdir())


def test_a_symlink_to_itself_is_no_step(run):
    (run / "9").mkdir()
    for link in (run / "latest", run / "11", run / "9" / "items"):
        link.symlink_to(link)
    assert CheckpointManager(run, read_only=True).steps() == [5, 10]
    assert CheckpointManager(run, read_only=True).restore().step == 10


@pytest.mark.parametrize("inside", ["nothing", "notes"])
def test_the_only_checkpoint_of_a_step_outlives_a_folder_of_its_name(tmp_path, inside):
    """A save that replaces a step was killed between two renames, then somebody made a folder."""
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        manager.save(2, {"w": jnp.arange(4)})
    (tmp_path / names.REPLACED).mkdir()
    (tmp_path / "2").rename(tmp_path / names.REPLACED / "2")
    (tmp_path / "2").mkdir()
    if inside == "notes":
        (tmp_path / "2" / "notes").write_text("mine")
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        assert manager.steps() == ([2] if inside == "nothing" else [])
    if inside == "notes":
        assert (tmp_path / "2" / "notes").read_text() == "mine"
        (tmp_path / "2" / "notes").unlink()
        with ckptmgr.CheckpointManager(tmp_path) as manager:
            assert manager.steps() == [2]
