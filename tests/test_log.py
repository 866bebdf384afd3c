"""The lines of the logger `ckptmgr` about saves, restores and deletions, and how bytes and seconds are written."""

import re

import numpy as np
import pytest

from ckptmgr import CheckpointManager, latest
from ckptmgr.units import format_bytes, format_rate, format_s

PARAMS = {"w": np.zeros((1000, 1000), np.float32), "b": np.zeros(250_000, np.float32)}
TIME = r"[\d.,e-]+ m?s"
SPEED = r"[\d.]+ [kMGT]?B/s"


@pytest.fixture
def said(caplog):
    caplog.set_level("INFO", "ckptmgr")

    def find(pattern):
        lines = [each.getMessage() for each in caplog.records if each.levelname == "INFO"]
        return [line for line in lines if re.fullmatch(pattern, line)]

    return find


def test_a_save_tells_its_bytes_its_times_and_its_speed(said, tmp_path):
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            info = manager.save(step, PARAMS).result()
    written = format_bytes(info.disk_nbytes)
    assert written == "5.0 MB"
    saves = said(rf"step \d saved: {written} written, durable after {TIME} \({SPEED}\), the caller waited {TIME}")
    assert [line.split()[1] for line in saves] == ["1", "2"]
    assert (
        f"durable after {format_s(info.durable_s)} ({format_rate(info.disk_nbytes, info.durable_s)})" in saves[1]
    )
    assert saves[1].endswith(f"the caller waited {format_s(info.blocked_s)}")


def test_a_restore_tells_where_from_and_how_fast(said, tmp_path):
    with CheckpointManager(tmp_path / "run", mirror=tmp_path / "mirror") as manager:
        for step in (1, 2):
            manager.save(step, PARAMS, extras={"seed": 7}).result()
        manager.wait()
        manager.restore()
        manager.restore(extras={"seed": None})
        manager.delete(2)
        manager.restore(params=PARAMS)
    run, mirror = re.escape(str(tmp_path / "run")), re.escape(str(tmp_path / "mirror"))
    assert len(said(rf"step 2 restored from {run}: 5.0 MB in {TIME} \({SPEED}\)")) == 1
    assert len(said(rf"step 2 restored from {run}: 0 B in {TIME} \(0 B/s\)")) == 1
    assert len(said(rf"step 2 restored from {mirror}: 5.0 MB in {TIME} \({SPEED}\)")) == 1


def test_a_deletion_tells_where_and_why(said, tmp_path):
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    with CheckpointManager(run, keep=latest(2), mirror=mirror, mirror_keep=latest(1)) as manager:
        for step in (1, 2, 3):
            manager.save(step, PARAMS).result()
            manager.wait()
        manager.delete(2)
    assert said("step . deleted.*")[-1] == f"step 2 deleted from {run}: asked for"
    assert sorted(said("step . deleted.*")[:-1]) == sorted([
        f"step 1 deleted from {mirror}: no policy keeps it",
        f"step 1 deleted from {run}: no policy keeps it",
        f"step 2 deleted from {mirror}: no policy keeps it",
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1, "1 B"), (999, "999 B"), (999.7, "1.0 kB"), (1000, "1.0 kB"), (999_940, "999.9 kB"),
     (999_960, "1.0 MB"), (1.5e9, "1.5 GB"), (2e12, "2.0 TB"), (3e15, "3000.0 TB")],
)  # fmt: skip
def test_bytes(nbytes, text):
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.0000123, "0.0123 ms"), (0.00123, "1.23 ms"), (0.0123, "0.0123 s"), (1.2345, "1.23 s"),
     (99.94, "99.9 s"), (3600.4, "3,600 s")],
)  # fmt: skip
def test_seconds(seconds, text):
    assert format_s(seconds) == text


def test_a_rate_of_no_time():
    assert (format_rate(3e6, 2.0), format_rate(3e6, 0.0)) == ("1.5 MB/s", "0 B/s")
