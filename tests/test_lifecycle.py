"""An accepted save is not lost when the script ends: real scripts, as a person writes them."""

import subprocess
import sys

import interrupted
import numpy as np
import pytest
from conftest import counted

from ckptmgr import CheckpointManager, CheckpointTimeoutError, lifecycle

SCRIPT = """
import sys, jax.numpy as jnp, ckptmgr
manager = ckptmgr.CheckpointManager(sys.argv[1])
print(bool(manager.save(1, {f"l{i}": jnp.full((512, 1024), float(i)) for i in range(20)})), flush=True)
"""
ENDINGS = {"ends": ("", 0), "raises": ("raise ValueError('bug')", 1), "sys.exit": ("sys.exit(3)", 3)}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_save_is_finished_before_the_script_is_gone(tmp_path, ending):
    last_line, status = ENDINGS[ending]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + last_line, tmp_path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status, done.stderr
    assert done.stdout == "True\n"
    back = CheckpointManager(tmp_path, read_only=True).restore(1).params
    assert all(np.all(np.asarray(back[f"l{i}"]) == i) for i in range(20))


def test_waits_are_bounded_and_say_what_they_waited_for():
    background = lifecycle.Background(60)
    release = lifecycle.threading.Event()
    background.start("the save of step 9", release.wait)
    with pytest.raises(CheckpointTimeoutError, match=r"the save of step 9 took longer than 0\.05 s") as caught:
        background.wait(0.05)
    assert caught.value.waiting_for == "the save of step 9"
    release.set()
    background.wait(5)


def test_one_task_at_a_time_in_order():
    background, seen = lifecycle.Background(60), []
    for number in range(20):
        background.start(f"task {number}", lambda number=number: seen.append(number))
    background.wait(5)
    assert seen == list(range(20))


@pytest.mark.soak
@pytest.mark.parametrize("max_host_bytes", [0, 300_000], ids=["whole", "in waves"])
def test_ctrl_c_at_any_moment_loses_nothing_and_the_manager_goes_on(max_host_bytes, tmp_path):
    for seed in range(counted(1, full=10)):
        command = [sys.executable, interrupted.__file__, tmp_path / str(seed), str(seed), "50"]
        done = subprocess.run([*command, str(max_host_bytes)], capture_output=True, text=True, timeout=200)
        assert done.stdout == "lost [] of True\n", done.stderr[-3000:]
