"""In a steady run the first act of a save, on the caller's thread, decides, copies and hands over, no more."""

import collections
import contextlib
import sys
import threading

import faults
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import ckptmgr
from ckptmgr import CheckpointManager

FILES = {
    "open", "stat", "lstat", "fstat", "scandir", "listdir", "mkdir", "rename", "replace", "unlink", "rmdir",
    "access", "readlink", "link", "symlink", "utime", "fsync",
}  # fmt: skip
"""Calls of the system about files, as Python's `posix` and `io` name them."""
A_FEW = 6
"""As many a save may make on the caller's thread, to see whether the lock of the run is still held."""


class Seen:
    """What runs on one thread."""

    def __init__(self):
        self.files = collections.Counter()
        self.orbax = set()
        self.threads = 0
        self.waits = collections.Counter()

    @contextlib.contextmanager
    def looking(self):
        sys.setprofile(self._look)
        try:
            yield self
        finally:
            sys.setprofile(None)

    def _look(self, frame, event, of):
        code = frame.f_code
        if event == "call":
            if "/orbax/checkpoint/" in code.co_filename:
                self.orbax.add(f"{code.co_filename}:{code.co_name}")
            if code.co_name in ("wait", "join") and code.co_filename.endswith("threading.py"):
                self.waits[code.co_name] += 1
        elif event == "c_call":
            module, name = getattr(of, "__module__", None), of.__name__
            if name in FILES and module in ("posix", "io", "_io"):
                self.files[name] += 1
            elif name == "start_new_thread":
                self.threads += 1
            elif name == "acquire" and isinstance(getattr(of, "__self__", None), type(threading.Lock())):
                self.waits[f"{code.co_filename}:{code.co_name}"] += code.co_name not in ("__enter__", "notify")


def state(step):
    params = {"w": jnp.full((40, 30), float(step)), "b": np.full(7, float(step))}
    return params, {"mu": jnp.full((40, 30), float(step)), "count": jnp.asarray(step)}


def steady(run, before, **options):
    """What runs on the caller's thread in the third save of a structure; the saves before it are done."""
    seen = Seen()
    with CheckpointManager(run, **options) as manager:
        for step in (*before, before[-1] + 1):
            with contextlib.nullcontext() if step in before else seen.looking():
                result = manager.save(step, *state(step), metrics={"loss": jnp.asarray(1.0)})
            assert result.result().step == step
            manager.wait()
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep": 3},
        {"keep": ckptmgr.best("loss")},
        {"save_every": ckptmgr.every_seconds(1e-9)},
        {"on_commit": print},
    ],
    ids=["plain", "latest", "best", "seconds", "callback"],
)
def test_a_steady_save_calls_no_orbax_waits_for_nothing_and_starts_one_thread(options, tmp_path):
    seen = steady(tmp_path, [1, 2, 3], **options)
    assert seen.orbax == set()
    assert +seen.waits == {}
    assert seen.threads <= 1
    assert seen.files.total() <= A_FEW, seen.files


def test_what_a_steady_save_asks_of_the_disk_does_not_grow_with_the_steps(tmp_path):
    few = steady(tmp_path / "few", [1, 2, 3])
    many = steady(tmp_path / "many", list(range(1, 21)))
    assert few.files == many.files


def test_what_would_not_be_steady_is_seen(tmp_path):
    """The looks of this file see a wait, and Orbax, where they are."""
    seen = Seen()
    with CheckpointManager(tmp_path, asynchronous=False) as manager, seen.looking():
        manager.save(1, *state(1))
    assert +seen.waits
    assert seen.files["scandir"]  # nobody has looked into the run before
    with seen.looking():
        ocp.utils.is_primary_host(0)
    assert seen.orbax


# ---------------------------------------------------------------- what has come since the look at the run


def by_stock(run, step):
    with ocp.CheckpointManager(run) as manager:
        manager.save(step, args=ocp.args.StandardSave({"w": np.ones(3)}), force=True)


def by_a_person(run, step):
    (run / str(step)).mkdir()
    (run / str(step) / "notes").write_text("mine")


@pytest.mark.parametrize(
    ("come", "on_exists", "said"),
    [
        (by_stock, "error", "meanwhile; it is kept"),
        (by_a_person, "error", "exists and is not a checkpoint"),
        (by_a_person, "skip", "exists and is not a checkpoint"),
        (by_a_person, "replace", "exists and is not a checkpoint"),
    ],
)
def test_what_has_taken_the_number_meanwhile_is_kept_and_said_at_the_next_call(come, on_exists, said, tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, *state(1)).result()
        come(tmp_path, 7)
        before = {path: path.read_bytes() for path in (tmp_path / "7").rglob("*") if path.is_file()}
        manager.save(7, *state(7), on_exists=on_exists)
        with pytest.raises(ckptmgr.SaveError, match=f"step 7 .*/7 {said}"):
            manager.save(8, *state(8))
        assert before == {path: path.read_bytes() for path in (tmp_path / "7").rglob("*") if path.is_file()}
        assert manager.save(8, *state(8)).result().step == 8


def test_what_stock_has_saved_meanwhile_is_skipped_or_replaced(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, *state(1)).result()
        by_stock(tmp_path, 7)
        assert not manager.save(7, *state(7), on_exists="skip")
        manager.rewind(1)
        by_stock(tmp_path, 9)
        manager.save(9, *state(9), on_exists="replace").result()
        assert manager.restore(9).params["b"][0] == 9


def test_two_managers_of_one_process_know_each_others_steps(tmp_path):
    with CheckpointManager(tmp_path) as one, CheckpointManager(tmp_path) as other:
        one.save(1, *state(1)).result()
        other.save(5, *state(5)).result()
        with pytest.raises(ckptmgr.CheckpointExistsError):
            one.save(5, *state(5))
        one.rewind(1)
        assert other.save(5, *state(5), on_exists="skip")


def test_a_step_that_was_deleted_or_has_failed_is_free_again(tmp_path, monkeypatch):
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, *state(step)).result()
        manager.delete(2)
        assert manager.save(2, *state(2)).result().step == 2
        with monkeypatch.context() as patch:
            faults.install("full arrays 1", patch.setattr)
            with pytest.raises(ckptmgr.SaveError, match="step 3"):
                manager.save(3, *state(3)).result()
        assert manager.save(3, *state(3)).result().step == 3
