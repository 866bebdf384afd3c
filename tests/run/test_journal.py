"""What happened to a run, as its own file tells it."""

import json

import faults
import jax.numpy as jnp
import pytest
from etils import epath

import ckptmgr
from ckptmgr.format import names
from ckptmgr.run import journal


def events(directory):
    return [(each["event"], each["step"]) for each in journal.read(epath.Path(directory))]


def test_it_tells_what_was_saved_deleted_passed_over_restored_and_failed(tmp_path, monkeypatch):
    params = {"w": jnp.arange(3000.0)}
    with ckptmgr.CheckpointManager(tmp_path, keep=2, clock=lambda: 5.0) as manager:
        for step in (1, 2, 3):
            manager.save(step, params, metrics={"loss": 1 / step}).result()
        manager.wait()
        (tmp_path / "3" / "manifest.json").write_bytes(b"")
        assert manager.restore().step == 2
        with monkeypatch.context() as patch:
            faults.install("fail description 1", patch.setattr)
            with pytest.raises(ckptmgr.SaveError):
                manager.save(4, params).result()
        manager.delete(2)
    assert events(tmp_path) == [
        ("saved", 1), ("saved", 2), ("saved", 3), ("deleted", 1), ("passed over", 3), ("restored", 2),
        ("failed", 4), ("deleted", 2),
    ]  # fmt: skip
    first, *_ = journal.read(epath.Path(tmp_path))
    assert first["time"] == 5.0
    assert first["metrics"] == {"loss": 1.0}
    assert first["nbytes"] == 12000
    assert 0 < first["blocked_s"] <= first["durable_s"]


def test_a_reader_writes_nothing_and_a_line_cut_short_is_left_out(tmp_path):
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": jnp.ones(3)})
    before = (tmp_path / names.JOURNAL).read_bytes()
    ckptmgr.CheckpointManager(tmp_path, read_only=True).restore()
    assert (tmp_path / names.JOURNAL).read_bytes() == before
    foreign = (
        b'[1]\n"saved"\n7\nnull\n\xff\n{}\n{"event": "saved", "step": "1", "time": 0}\n' + b"[" * 100_000 + b"\n"
    )
    (tmp_path / names.JOURNAL).write_bytes(foreign + before + b'{"event": "sav')
    assert events(tmp_path) == [("saved", 1)]


@pytest.mark.parametrize("keep", [7, "latest", [7], [["latest", 1]], [{"latest": 1}], ["latest(n=)"], ["no(n=1)"]])
def test_policies_that_nobody_can_read_are_not_known(keep, tmp_path):
    event = {"event": "saved", "step": 1, "time": 0.0, "keep": keep}
    (tmp_path / names.OURS).mkdir()
    (tmp_path / names.JOURNAL).write_text(json.dumps(event))
    assert journal.policies(epath.Path(tmp_path)) is None


def test_what_cannot_be_written_harms_nothing(tmp_path):
    with ckptmgr.CheckpointManager(tmp_path / "run") as manager:
        (tmp_path / "run" / names.JOURNAL).mkdir()
        manager.save(1, {"w": jnp.ones(3)}).result()
        assert manager.steps() == [1]
