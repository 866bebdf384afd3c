"""An accepted save is not lost when the script ends, or when somebody interrupts it: real scripts and signals."""

import signal
import subprocess
import sys
import threading
import time

import interrupted
import moments
import numpy as np
import pytest
from conftest import counted, in_background

from ckptmgr import CheckpointManager, CheckpointTimeoutError
from ckptmgr.format import names
from ckptmgr.processes import background as lifecycle
from ckptmgr.run import transfer

SCRIPT = """
import sys, jax.numpy as jnp, ckptmgr
manager = ckptmgr.CheckpointManager(sys.argv[1])
print(bool(manager.save(1, {f"l{i}": jnp.full((512, 1024), float(i)) for i in range(20)})), flush=True)
"""
INTERRUPTED = "import signal; signal.signal(2, signal.default_int_handler); signal.raise_signal(2)"
ENDINGS = {"ends": ("", 0), "raises": ("raise ValueError('bug')", 1), "sys.exit": ("sys.exit(3)", 3),
           "Ctrl-C": (INTERRUPTED, -signal.SIGINT)}  # fmt: skip


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


HELD = """
import signal, sys, time, numpy as np, ckptmgr
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from ckptmgr.format import files
from ckptmgr.processes import background
drain = background.drain
def told():
    print("waits at the end", file=sys.stderr, flush=True)
    drain()
background.drain = told
write = files.write
def slow(*given, **how):
    time.sleep(0.5)
    write(*given, **how)
files.write = slow
manager = ckptmgr.CheckpointManager(sys.argv[1])
print(bool(manager.save(1, {"w": np.arange(9.0)})), flush=True)
raise KeyboardInterrupt
"""


@in_background
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_while_the_last_save_is_waited_for_is_asked_for_twice(tmp_path, presses):
    process = subprocess.Popen(
        [sys.executable, "-c", HELD, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "True\n"
    while "waits at the end" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    while "press Ctrl-C again" not in (said := process.stderr.readline()):
        assert process.poll() is None
    if presses == 2:
        process.send_signal(signal.SIGINT)
    with process.stdout, process.stderr:
        process.stderr.read()
    assert process.wait(60) == -signal.SIGINT
    assert "waits for the save of step 1; press Ctrl-C again to end without it" in said
    assert CheckpointManager(tmp_path, read_only=True).steps() == ([1] if presses == 1 else [])


def test_waits_are_bounded_and_say_what_they_waited_for():
    background, release = lifecycle.Background(), threading.Event()
    background.start(lifecycle.Task("the save of step 9", release.wait, 60))
    with pytest.raises(CheckpointTimeoutError, match=r"the save of step 9 took longer than 0\.05 s") as caught:
        background.wait(0.05)
    assert caught.value.waiting_for == "the save of step 9"
    release.set()
    background.wait(5)


STOPPED = """
import sys, time, numpy as np, ckptmgr
from ckptmgr.arrays import writing
from ckptmgr.processes import background as lifecycle

def work():  # a second and a half in which this process runs
    for _ in range(15):
        time.sleep(0.1)

manager = ckptmgr.CheckpointManager(sys.argv[1], max_host_bytes=1, timeout_s=3)
background = manager._shared.background
print("begins", flush=True)
if sys.argv[2] == "wait":
    background.start(lifecycle.Task("the task", work, 3))
    background.wait()
elif sys.argv[2] == "drain":
    background.start(lifecycle.Task("the task", lambda: (work(), print("done", flush=True)), 3))
    lifecycle.drain()
    sys.exit(0)
else:
    write = writing.write_wave
    writing.write_wave = lambda *given: (time.sleep(0.5), write(*given))
    manager.save(1, {"a": np.ones(9), "b": np.ones(9)}, {"c": np.ones(9)})
print("done", flush=True)
"""


@pytest.mark.parametrize("how", ["wait", "drain", "save"])
def test_time_in_which_the_process_was_stopped_is_not_counted(how, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, tmp_path, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begins\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    said, problems = process.communicate(timeout=60)
    assert (said, process.returncode) == ("done\n", 0), problems
    assert "longer than" not in problems


def test_one_task_at_a_time_in_order():
    background, seen = lifecycle.Background(), []
    for number in range(20):
        background.start(lifecycle.Task(f"task {number}", lambda number=number: seen.append(number), 60))
    background.wait(5)
    assert seen == list(range(20))


def test_a_thread_that_an_exception_ends_leaves_its_tasks_to_the_next():
    def ended(problem):
        seen.append("ended")
        if seen.count("ended") == 1:
            raise MemoryError  # as an exception of another thread may come anywhere

    background, seen = lifecycle.Background(), []
    background.start(lifecycle.Task("task 1", lambda: seen.append("run"), 5, ended=ended))
    background.start(lifecycle.Task("task 2", lambda: seen.append("after it"), 5))
    background.wait(20)
    assert seen == ["run", "ended", "ended", "after it"]


def test_a_mirror_that_takes_too_long_is_said_and_close_may_be_called_again(tmp_path, monkeypatch):
    released, put = threading.Event(), transfer.put

    def held(*given):
        released.wait(20)
        put(*given)

    monkeypatch.setattr(transfer, "put", held)
    manager = CheckpointManager(tmp_path / "home", mirror=tmp_path / "away", timeout_s=0.5)
    manager.save(1, {"w": np.arange(9.0)}).result(20)
    for _ in range(2):
        with pytest.raises(CheckpointTimeoutError, match=r"the copy to .* took longer than 0\.5 s"):
            manager.close()
    assert (tmp_path / "home" / names.LOCK).exists()  # it may still delete what is copied
    released.set()
    manager.wait(20)
    manager.close()
    assert not (tmp_path / "home" / names.LOCK).exists()
    assert CheckpointManager(tmp_path / "away", read_only=True).steps() == [1]


@pytest.mark.soak
def test_an_exception_at_each_moment_of_each_call_loses_nothing(tmp_path):
    """Each moment is found by tracing: see moments.py."""
    every = counted(191, full=1)
    command = [sys.executable, moments.__file__, tmp_path, str(every), str(every // 2)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=counted(200, full=7200))
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(reversed(line.split(" interrupts of ")) for line in done.stdout.splitlines())
    assert list(said) == moments.EVERY
    assert sum(map(int, said.values())) > counted(20, full=5000)


@pytest.mark.soak
@pytest.mark.parametrize("max_host_bytes", [0, 300_000], ids=["whole", "in waves"])
def test_ctrl_c_at_any_moment_loses_nothing_and_the_manager_goes_on(max_host_bytes, tmp_path):
    for seed in range(counted(1, full=10)):
        command = [sys.executable, interrupted.__file__, tmp_path / str(seed), str(seed), "50"]
        done = subprocess.run([*command, str(max_host_bytes)], capture_output=True, text=True, timeout=200)
        assert done.stdout.startswith("lost [] after "), done.stderr[-3000:]
