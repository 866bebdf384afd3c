"""The run directory: what counts as a step, and what an interrupted process left behind."""

import os

import jax.numpy as jnp
import pytest
from conftest import visible
from etils import epath

from ckptmgr import CheckpointManager, catalog, paths


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
    (run / "5").rename(run / ".deleted-5-123")
    (run / "12.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    assert CheckpointManager(run, read_only=True).steps() == [10]
    assert (run / ".deleted-5-123").exists()  # a reader leaves everything as it is
    CheckpointManager(run).close()
    assert visible(run) == ["10"]


def test_a_step_caught_between_its_old_and_its_new_self_comes_back(run):
    (run / "5").rename(run / "5.replaced")
    with CheckpointManager(run) as manager:
        assert manager.steps() == [5, 10]
        assert float(manager.restore(5).params["w"][0]) == 5.0
    (run / "5.replaced").mkdir()
    CheckpointManager(run).close()
    assert visible(run) == ["10", "5"]


def test_deleting_takes_the_step_away_before_its_files(run, monkeypatch, caplog):
    listing = catalog.Catalog(epath.Path(run), None)
    monkeypatch.setattr(type(listing.path(5)), "rmtree", lambda self: (_ for _ in ()).throw(OSError("busy")))
    listing.delete(5)
    assert listing.steps() == [10]
    assert "could not be removed, and is tried again at the next start: busy" in caplog.text


def test_paths():
    assert str(paths.resolve("gs://bucket/run")) == "gs://bucket/run"
    assert paths.resolve("a/../b") == epath.Path(os.getcwd()) / "b"
    assert paths.resolve("~/x") == epath.Path(os.path.expanduser("~")) / "x"


def test_a_symlink_to_itself_is_no_step(run):
    (run / "9").mkdir()
    for link in (run / "latest", run / "11", run / "9" / "items"):
        link.symlink_to(link)
    assert CheckpointManager(run, read_only=True).steps() == [5, 10]
    assert CheckpointManager(run, read_only=True).restore().step == 10
