"""Nothing is lost: real processes, real signals, and what is on disk afterwards."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
import trainer
import warm
from conftest import counted, free_port, in_background

import ckptmgr
from ckptmgr.format import names

pytestmark = pytest.mark.xdist_group("crash")

SCRIPT = Path(trainer.__file__)


def start(directory, steps, *how, fault="", job=None):
    env = os.environ | {"CKPTMGR_FAULT": fault} | ({"CKPTMGR_JOB": job} if job else {})
    return warm.start([SCRIPT, directory, steps, *how], env=env)


def run(directory, steps, *how, fault=""):
    process = start(directory, steps, *how, fault=fault)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def rest(process):
    """What it says to its end. (`communicate` would miss what was read ahead with a line before.)"""
    with process.stdout, process.stderr:
        out = process.stdout.read()
        process.wait(60)
        return out, process.stderr.read()


def last(said, word):
    return max((int(line.split()[1]) for line in said.splitlines() if line.startswith(f"{word} ")), default=0)


def leftovers(directory):
    """The name of each, and what tells it from another of that name, which a process makes that still saves."""
    ours, found = directory / names.OURS, set()
    for folder in ("saving", "deleting", "replaced"):
        for path in (ours / folder).glob("*"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_ino, path.stat().st_ctime_ns))
    return found


@pytest.mark.soak
def test_killed_at_random_moments_the_newest_committed_step_is_there_and_nothing_is_left_over(tmp_path):
    draw, committed, interrupted, left = random.Random(0), 0, 0, set()
    for killed in range(200):
        if killed >= counted(4, full=200) and interrupted:
            break
        process = start(tmp_path, 10**6, "train")
        assert process.stdout.readline().startswith("resumed")
        assert not leftovers(tmp_path) & left  # cleaned by the start
        if not committed:  # else the first kill may come before there is anything to find
            committed = last(next(line for line in process.stdout if line.startswith("committed")), "committed")
        time.sleep(draw.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        said, _ = rest(process)
        committed = max(committed, last(said, "committed"))
        interrupted += bool(left := leftovers(tmp_path))
        with ckptmgr.CheckpointManager(tmp_path, read_only=True) as reader:
            found = reader.restore(params=trainer.state(0))
            assert found.step == reader.latest() >= committed
            assert not found.skipped
            assert trainer.step_of(found.params) == found.step
    assert interrupted  # else no kill hit a save


MATRIX = [
    (how, f"{when} {point}")
    for how, absent in (("train", ["exchange"]), ("replace", ["delete", "rename"]))  # what the other kind does
    for point in faults.POINTS
    for when in ("before", "after")
    if point not in absent
]


@pytest.mark.soak
@pytest.mark.parametrize(("how", "point"), MATRIX[:: counted(5, full=1)], ids=str)
def test_killed_at_each_point_of_a_save_the_newest_committed_step_is_there(how, point, tmp_path):
    returned, said, _ = run(tmp_path, 50, how, fault=f"{point} {12 if 'file' in point else 4}")
    assert returned == -signal.SIGKILL
    saving, committed = last(said, "saving"), last(said, "committed")
    assert 0 < committed <= saving < 50
    with ckptmgr.CheckpointManager(tmp_path, read_only=True) as reader:
        found = reader.restore(params=trainer.state(0))
        assert not found.skipped
        assert committed <= trainer.step_of(found.params) <= saving
        for step in reader.steps():  # no step that is listed is less than whole
            assert reader.verify(step)
    ckptmgr.CheckpointManager(tmp_path).close()
    assert not leftovers(tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("how", "status"), [("end", 0), ("raise", 1), ("exit", 3), ("SIGTERM", -signal.SIGTERM)], ids=str
)
def test_a_script_that_leaves_right_after_save_loses_nothing(how, status, tmp_path):
    size = counted(30_000_000, full=300_000_000)
    command = [sys.executable, SCRIPT, tmp_path, str(size), "leave", how]  # how Python itself ends is what counts
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    with ckptmgr.CheckpointManager(tmp_path, read_only=True) as reader:
        found = reader.restore(7, params=trainer.state(0, size // 4 // trainer.LEAVES))
    assert trainer.step_of(found.params) == 7


@pytest.mark.soak
def test_sigterm_saves_the_last_completed_step_and_the_run_goes_on_bit_for_bit(tmp_path):
    draw, steps = random.Random(1), 10**6
    for _ in range(counted(3, full=50)):
        process = start(tmp_path, steps, "guard")
        assert process.stdout.readline().startswith("resumed")
        first = process.stdout.readline()  # it may be the last, too
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGTERM)
        said = first + rest(process)[0]
        assert process.returncode == 0
        with ckptmgr.CheckpointManager(tmp_path, read_only=True) as reader:
            assert reader.latest() == last(said, "done") == last(said, "ended")
    stopped = said.split()[-1]
    code, straight, _ = run(tmp_path / "straight", last(said, "ended"), "guard")
    assert code == 0
    assert straight.split()[-1] == stopped


def test_where_jax_takes_sigterm_itself_its_sync_point_is_honoured(tmp_path):
    process = start(tmp_path, 10**6, "guard", job=f"{free_port()} 1 0")
    for line in process.stdout:
        if line == "done 10\n":
            break
    process.send_signal(signal.SIGTERM)
    said, err = rest(process)
    assert process.returncode == 0, err
    with ckptmgr.CheckpointManager(tmp_path, read_only=True) as reader:
        assert 10 < reader.latest() == last(said, "done") == last(said, "ended")


def test_the_sync_point_of_jax_is_one_for_all_managers_of_a_process(tmp_path):
    process = start(tmp_path, 100, "managers", job=f"{free_port()} 1 0")
    said, err = rest(process)
    assert process.returncode == 0, err
    assert said.splitlines() == ["ended 33 33 11", "again True"]


def test_a_second_signal_ends_at_once_and_a_handler_that_was_there_is_called(tmp_path):
    manager, called = ckptmgr.CheckpointManager(tmp_path, save_every=10), []
    before = signal.signal(signal.SIGUSR1, lambda *_: called.append(1))
    try:
        with manager.preemption_guard([signal.SIGUSR1]):
            assert not manager.save(1, trainer.state(1))
            assert not manager.preempted
            os.kill(os.getpid(), signal.SIGUSR1)
            assert called == [1]
            assert not manager.preempted  # step 1 was declined: the next is saved first
            assert manager.save(2, trainer.state(2)).reason == "preempted"
            assert manager.preempted
        os.kill(os.getpid(), signal.SIGUSR1)
        assert called == [1, 1]
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert manager.steps() == [2]
    returned, said, _ = run(tmp_path / "twice", 10**6, "twice")
    assert (returned, said) == (-signal.SIGTERM, "told once\n")


@pytest.mark.parametrize("fault", ["before exchange 1", "after exchange 1"])
def test_killed_as_a_pinned_step_is_replaced_the_step_is_pinned(fault, tmp_path):
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        manager.save(0, trainer.state(0)).result()
        manager.pin(0)
    status, _, err = run(tmp_path, 1, "replace", fault=fault)
    assert status == -signal.SIGKILL, err
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        assert manager.info(0).pinned
        assert manager.verify(0)


def test_a_second_writer_is_told_who_writes_and_the_first_goes_on(tmp_path):
    process = start(tmp_path, 10**6, "train")
    process.stdout.readline()
    with pytest.raises(ckptmgr.SaveError, match=f"process {process.pid} on .* since 20.*read_only=True"):
        ckptmgr.CheckpointManager(tmp_path)
    assert process.poll() is None
    process.kill()
    process.communicate()
    with ckptmgr.CheckpointManager(tmp_path) as manager, ckptmgr.CheckpointManager(tmp_path) as other:
        assert manager.steps() == other.steps()  # the owner is gone; one process may have two managers


def test_a_process_that_was_forked_does_not_hold_the_run(tmp_path):
    process = start(tmp_path, 1, "fork")
    child = int(process.stdout.readline().split()[1])
    with pytest.raises(ckptmgr.SaveError, match=f"process {process.pid} "):
        ckptmgr.CheckpointManager(tmp_path)
    process.kill()
    try:
        process.wait()
        os.kill(child, 0)  # it is still there
        ckptmgr.CheckpointManager(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


@pytest.mark.soak
@pytest.mark.parametrize("how", ["train", "replace"])
def test_a_reader_beside_a_writer_sees_whole_steps_or_a_clear_error(how, tmp_path):
    process = start(tmp_path, 10**6, how)
    try:
        reader = ckptmgr.CheckpointManager(tmp_path, read_only=True)
        first = next(reader.watch(timeout_s=60, poll_s=0.01))
        ends, restored, gone = time.monotonic() + counted(2, full=60), [], 0
        while time.monotonic() < ends or (len(set(restored)) <= 3 and time.monotonic() < ends + 60):
            found = reader.restore(params=trainer.state(0))
            assert not found.skipped
            assert trainer.step_of(found.params) == (found.metrics["made"] if how == "replace" else found.step)
            restored.append(trainer.step_of(found.params))
            try:
                reader.restore(reader.steps()[0], params=trainer.state(0))
            except ckptmgr.CheckpointNotFoundError:
                gone += 1  # deleted under the reader's hands, and said so
        assert first == 0 or how == "train"
        assert restored == sorted(restored)
        assert len(set(restored)) > 3
    finally:
        process.kill()
        process.communicate()


def test_a_reader_that_is_overtaken_again_and_again_says_so_in_time(tmp_path, monkeypatch):
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        manager.save(0, trainer.state(0))
        manager.wait()
        reader = ckptmgr.CheckpointManager(tmp_path, read_only=True, timeout_s=0.5)
        read = reader._restorer._read

        def overtaken(*args):
            found = read(*args)
            manager.save(0, trainer.state(1), on_exists="replace")
            manager.wait()
            return found

        monkeypatch.setattr(reader._restorer, "_read", overtaken)
        with pytest.raises(ckptmgr.CheckpointTimeoutError, match=r"no writer replaces it in 0\.5 s"):
            reader.restore(0, params=trainer.state(0))


def test_watch_yields_each_good_step_once(tmp_path):
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(step, trainer.state(step))
        manager.wait()
        (tmp_path / "2" / "params" / "_METADATA").write_bytes(b"{}")
        reader = ckptmgr.CheckpointManager(tmp_path, read_only=True)
        assert list(reader.watch(timeout_s=0, poll_s=0.01)) == [1, 3]
        assert list(reader.watch(after=1, timeout_s=0, poll_s=0.01)) == [3]
        watching = reader.watch(after=3, poll_s=0.01)
        manager.save(4, trainer.state(4))
        assert next(watching) == 4


def damage(path, how):
    if how == "removed":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data if how == "flipped" else data[: len(data) // 2])


@pytest.mark.parametrize("how", ["flipped", "truncated", "removed"])
def test_damage_in_any_file_of_the_newest_step_gives_the_one_before_with_a_warning(how, tmp_path, caplog):
    with ckptmgr.CheckpointManager(tmp_path / "run") as manager:
        for step in (1, 2):
            manager.save(
                step, trainer.state(step), trainer.state(step), extras={"at": {"n": step}}, metrics={"n": 1}
            )
    templates = {"params": trainer.state(0), "opt_state": trainer.state(0), "extras": {"at": {"n": 0}}}
    names = [
        path.relative_to(tmp_path / "run" / "2") for path in (tmp_path / "run" / "2").rglob("*") if path.is_file()
    ]
    assert len(names) > 10
    for name in names:
        shutil.copytree(tmp_path / "run", tmp_path / "damaged")
        damage(tmp_path / "damaged" / "2" / name, how)
        with ckptmgr.CheckpointManager(tmp_path / "damaged") as manager:
            caplog.clear()
            found = manager.restore(**templates)
            assert (found.step, list(found.skipped), trainer.step_of(found.params)) == (1, [2], 1), name
            assert "step 2 is passed over as damaged" in caplog.text
            with pytest.raises(ckptmgr.CorruptCheckpointError) as caught:
                manager.restore(2, **templates)
            assert caught.value.path or caught.value.leaf
        shutil.rmtree(tmp_path / "damaged")


def test_a_damaged_step_is_not_counted_not_deleted_and_its_number_is_free_again(tmp_path):
    manager = ckptmgr.CheckpointManager(tmp_path, keep=2)
    for step in (1, 2, 3):
        manager.save(step, trainer.state(step))
    manager.wait()
    for chunk in (tmp_path / "3").rglob("d/*"):
        chunk.write_bytes(b"")
    found = manager.restore(params=trainer.state(0))
    assert (found.step, list(found.skipped)) == (2, [3])
    with pytest.raises(ckptmgr.CorruptCheckpointError):
        manager.restore(3, params=trainer.state(0))  # never another in its place
    manager.save(1, trainer.state(1))
    manager.wait()
    assert manager.steps() == [1, 2, 3]  # two that are good, and the damaged one
    manager.save(3, trainer.state(3))
    manager.wait()
    assert manager.steps() == [2, 3]
    assert trainer.step_of(manager.restore(params=trainer.state(0)).params) == 3
    assert list((tmp_path / ".ckptmgr" / "damaged").glob("3-*"))


def run_in_guards(directory, body):
    script = f"""
import multiprocessing, os, signal, sys, time
import numpy as np, ckptmgr
m = ckptmgr.CheckpointManager({str(directory)!r}, save_every=1000)
params = {{"w": np.ones(3)}}
{body}
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


def test_a_guard_in_a_guard_is_as_one(tmp_path):
    body = """
with m.preemption_guard():
    with m.preemption_guard([signal.SIGTERM, signal.SIGUSR1]):
        os.kill(os.getpid(), signal.SIGTERM)
        print(bool(m.save(1, params)), m.preempted)
    print(bool(m.save(2, params)), m.preempted, signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL)
with m.preemption_guard():
    print(bool(m.save(3, params)), m.preempted)
"""
    done = run_in_guards(tmp_path, body)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True True", "True True True", "False False"]


SLOW = """
import sys, time
from ckptmgr.format import files
from ckptmgr.run import transfer
write, put = files.write, transfer.put
def slow(do, pause_s, *given, **how):
    time.sleep(pause_s)
    return do(*given, **how)
def say(*words):
    print(*words, flush=True)
"""
AT_THE_END = {
    "a guard": "with m.preemption_guard():",
    "guards of two managers": "with other.preemption_guard(), m.preemption_guard():",
    "a guard of two signals": "with m.preemption_guard([signal.SIGUSR1, signal.SIGTERM]):",
}


def in_guards(directory, body, *before):
    script = f"""{SLOW}
import os, signal, numpy as np, ckptmgr
m, other = ckptmgr.CheckpointManager({str(directory)!r}), ckptmgr.CheckpointManager({str(directory)!r} + "-other")
params = {{"w": np.ones(3)}}
{body}
"""
    return subprocess.Popen(
        [*before, sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def terminated_as_it_waits(directory, body):
    """What a script says after SIGTERM, which comes shortly after `waits`, and how it ends; then its errors."""
    process = in_guards(directory, body)
    assert process.stdout.readline() == "waits\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said, err = rest(process)
    return (said, process.returncode), err


@in_background
@pytest.mark.parametrize(
    ("then", "end"),
    [
        ("pass", ("", -signal.SIGTERM)),
        ("assert m.preempted", ("goes on\n", 0)),
        ("m.save(2, params)", ("goes on\n", 0)),
        ("sys.exit(3)", ("", 3)),
    ],
)
def test_sigterm_after_the_last_save_of_a_guard_ends_the_process_unless_somebody_has_asked(then, end, tmp_path):
    body = f"""
with m.preemption_guard():
    m.save(1, params)
    os.kill(os.getpid(), signal.SIGTERM)
    {then}
say("goes on")
"""
    said, err = rest(process := in_guards(tmp_path / "run", body))
    assert (said, process.returncode) == end, err
    assert ckptmgr.CheckpointManager(tmp_path / "run", read_only=True).steps()[0] == 1


@in_background
@pytest.mark.parametrize("how", AT_THE_END)
def test_sigterm_during_the_last_wait_of_a_guard_ends_the_process_once_the_save_is_durable(how, tmp_path):
    body = f"""
files.write = lambda *given, **how: slow(write, 0.3, *given, **how)
{AT_THE_END[how]}
    m.save(1, params)
    say("waits")
say("goes on")
"""
    end, err = terminated_as_it_waits(tmp_path / "run", body)
    assert end == ("", -signal.SIGTERM), err
    assert ckptmgr.CheckpointManager(tmp_path / "run", read_only=True).steps() == [1]


@in_background
def test_sigterm_during_the_last_save_of_a_guard_ends_the_process(tmp_path):
    """A save waits for the one before it: there it spends most of its time on a slow disk."""
    body = """
files.write = lambda *given, **how: slow(write, 0.3, *given, **how)
with m.preemption_guard():
    m.save(1, params)
    say("waits")
    m.save(2, params)
say("goes on")
"""
    end, err = terminated_as_it_waits(tmp_path / "run", body)
    assert end == ("", -signal.SIGTERM), err
    assert ckptmgr.CheckpointManager(tmp_path / "run", read_only=True).steps() == [1, 2]


@in_background
def test_who_is_told_after_a_declined_step_that_there_is_more_to_save_may_save_it_after_the_guard(tmp_path):
    body = """
m = ckptmgr.CheckpointManager(m.directory, save_every=10)
with m.preemption_guard():
    assert m.save(10, params) and not m.save(11, params)
    os.kill(os.getpid(), signal.SIGTERM)
    assert not m.preempted
m.save(11, params, force=True)
m.wait()
say("goes on")
"""
    said, err = rest(process := in_guards(tmp_path / "run", body))
    assert (said, process.returncode) == ("goes on\n", 0), err
    assert ckptmgr.CheckpointManager(tmp_path / "run", read_only=True).steps() == [10, 11]


@in_background
def test_a_signal_at_the_end_of_a_guard_waits_for_the_saves_of_other_runs_too(tmp_path):
    body = """
files.write = lambda *given, **how: slow(write, 0.3 if "other" in str(given[0]) else 0, *given, **how)
with m.preemption_guard([signal.SIGUSR1]):
    other.save(1, params)
    m.save(1, params)
    os.kill(os.getpid(), signal.SIGUSR1)
say("goes on")
"""
    said, err = rest(process := in_guards(tmp_path / "run", body))
    assert (said, process.returncode) == ("", -signal.SIGUSR1), err
    assert ckptmgr.CheckpointManager(f"{tmp_path}/run-other", read_only=True).steps() == [1]


@in_background
def test_sigterm_ends_a_process_whose_callback_marks_a_step_of_another_run(tmp_path):
    """The call of `save` that does not return holds no lock that the callback needs."""
    body = """
def mark(info):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    other.pin(1)
    say("marked")

m.close()
m = ckptmgr.CheckpointManager(m.directory, on_commit=mark)
other.save(1, params).result()
m.save(1, params)
for step in range(2, 100_000):
    other.save(step, params)
"""
    process = in_guards(tmp_path / "run", body)
    try:
        said, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (said, process.returncode) == ("marked\n", -signal.SIGTERM), err


@in_background
def test_a_handler_of_the_caller_is_told_of_a_signal_during_the_last_wait_and_the_process_goes_on(tmp_path):
    body = """
files.write = lambda *given, **how: slow(write, 0.3, *given, **how)
signal.signal(signal.SIGTERM, lambda *_: say("told"))
with m.preemption_guard():
    m.save(1, params)
    say("waits")
say("goes on", *m.steps())
"""
    end, err = terminated_as_it_waits(tmp_path / "run", body)
    assert end == ("told\ngoes on 1\n", 0), err


@in_background
def test_sigterm_ends_a_process_that_goes_on_saving_and_copies_slowly(tmp_path):
    body = """
m.close()
transfer.put = lambda *given: slow(put, 0.2, *given)
m = ckptmgr.CheckpointManager(m.directory, mirror=str(m.directory) + "-away")
for step in range(1, 100_000):
    m.save(step, params)
    say("saved", step)
    time.sleep(0.02)
"""
    process = in_guards(tmp_path / "run", body)
    while process.stdout.readline() != "saved 5\n":
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    try:
        said, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGTERM, err
    with ckptmgr.CheckpointManager(tmp_path / "run", read_only=True) as reader:
        assert reader.steps()[: last(said, "saved")] == list(range(1, last(said, "saved") + 1))


def has_namespaces():
    command = ["unshare", "--pid", "--fork", "--kill-child", "true"]
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except FileNotFoundError:
        return False


AS_INIT = {
    "outside": "m.save(1, params)",
    "twice": """
files.write = lambda *given, **how: slow(write, 60, *given, **how)
m.save(1, params)
os.kill(1, signal.SIGTERM)
time.sleep(0.1)
""",
    "twice in a guard": """
guard = m.preemption_guard()
guard.__enter__()
os.kill(1, signal.SIGTERM)
""",
    "the last wait of a guard": """
files.write = lambda *given, **how: slow(write, 0.3, *given, **how)
m.save(1, params)
with m.preemption_guard():
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(1, signal.SIGTERM))
""",
}


@in_background
@pytest.mark.parametrize("how", AS_INIT)
def test_the_first_process_of_a_container_ends_by_sigterm(how, tmp_path):
    """The system ignores a signal without a handler there."""
    if not has_namespaces():
        pytest.skip("only root may make a PID namespace here")
    body = f"""
{AS_INIT[how]}
assert os.getpid() == 1
os.kill(1, signal.SIGTERM)
time.sleep(20)
say("lives")
os._exit(0)
"""
    process = in_guards(tmp_path / "run", body, "unshare", "--pid", "--fork", "--kill-child")
    said, err = process.communicate(timeout=120)
    assert (said, process.returncode) == ("", 128 + signal.SIGTERM), err
    if "twice" not in how:
        assert ckptmgr.CheckpointManager(tmp_path / "run", read_only=True).steps() == [1]


def test_a_fork_in_a_guard_ends_by_sigterm_as_one_outside(tmp_path):
    body = """
fork = multiprocessing.get_context("fork")
def ends():
    child = fork.Process(target=time.sleep, args=(600,))
    child.start()
    time.sleep(0.5)
    child.terminate()
    child.join(20)
    code = child.exitcode
    child.kill()
    return code
with m.preemption_guard():
    print(ends())
    with m.preemption_guard([signal.SIGUSR1]):
        print(ends())
    os.kill(os.getpid(), signal.SIGTERM)
    print(bool(m.save(1, params)), m.preempted)
print(ends())
"""
    done = run_in_guards(tmp_path, body)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["-15", "-15", "True True", "-15"]
