"""A file that is cut short while it is read: the process lives, and restores the step before or the whole one."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import counted

import ckptmgr

READER = """
import sys, time
import numpy as np
import ckptmgr

run, found = ckptmgr.CheckpointManager(sys.argv[1], read_only=True), set()
meant = {step: np.random.default_rng(step).integers(2**31, size=2_000_000, dtype=np.int32) for step in (1, 2)}
ends = time.monotonic() + float(sys.argv[2])
print("reading", flush=True)
while time.monotonic() < ends or (len(found) < 2 and time.monotonic() < ends + 60):
    back = run.restore(layout=ckptmgr.HOST)
    assert all((leaf == meant[back.step]).all() for leaf in back.params.values()), back.step
    found.add(back.step)
print(sorted(found), flush=True)
"""


@pytest.mark.parametrize("how", [{}, {"compression": "zstd"}], ids=str)  # read by us, and by TensorStore
def test_a_file_that_is_cut_short_again_and_again_while_it_is_read_ends_no_process(how, tmp_path):
    rng = np.random.default_rng(0)
    with ckptmgr.CheckpointManager(tmp_path / "run", **how) as manager:
        for step in (1, 2):
            values = np.random.default_rng(step).integers(2**31, size=2_000_000, dtype=np.int32)
            manager.save(step, {f"w{i}": values for i in range(3)})
    large = max((tmp_path / "run" / "2" / "params" / "d").iterdir(), key=lambda path: path.stat().st_size)
    good = large.read_bytes()
    command = [sys.executable, "-c", READER, tmp_path / "run", str(counted(1.5, full=20))]
    with (
        open(tmp_path / "errors", "w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=tmp_path) as reader,
    ):
        assert reader.stdout.readline() == "reading\n"
        while reader.poll() is None:
            time.sleep(rng.uniform(0, 0.02))  # a restore takes about as long: it has begun, and goes on
            os.truncate(large, int(rng.integers(len(good))))
            time.sleep(rng.uniform(0, 0.005))
            with open(large, "r+b") as file:
                file.write(good)
        said = reader.stdout.read()
    assert reader.returncode == 0, (tmp_path / "errors").read_text()[-2000:]
    assert "1" in said
    assert ckptmgr.CheckpointManager(tmp_path / "run", read_only=True).restore().step == 2
