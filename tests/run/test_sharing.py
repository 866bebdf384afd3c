"""One run used from several sides of one process: threads, managers, callbacks, forked children."""

import concurrent.futures
import contextlib
import ctypes
import fcntl
import functools
import gc
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref

import faults
import moments
import numpy as np
import pytest
from conftest import counted

import ckptmgr
from ckptmgr import CheckpointManager
from ckptmgr.format import names
from ckptmgr.processes import background
from ckptmgr.run import lock as writer
from ckptmgr.run import mirror

HOST = {"layout": ckptmgr.HOST}
OPEN = "import sys, ckptmgr; ckptmgr.CheckpointManager(sys.argv[1]).close()"


def values(number):
    return {f"w{place}": np.full(2000, number * 10 + place, np.float64) for place in range(4)}


def is_whole(params):
    number = int(params["w0"][0]) // 10
    return all((params[name] == array).all() for name, array in values(number).items())


def is_free(directory):
    """Whether another process could open the run: `flock` knows each opened file, not the process."""
    try:
        descriptor = os.open(directory / names.LOCK, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


# ---------------------------------------------------------------- two managers of one run


def test_two_managers_of_one_run_save_in_turn_and_lose_nothing(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "run").mkdir()
    managers = [CheckpointManager(tmp_path / name) for name in ("run", "link", "run")]

    def save(number):
        return [step for step in range(number, 30, 3) if managers[number].save(step, values(step))]

    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        saved = [step for steps in threads.map(save, range(3)) for step in steps]
    for manager in managers:
        manager.close()
    reader = CheckpointManager(tmp_path / "run", read_only=True)
    assert reader.steps() == sorted(saved) == list(range(30))
    for step in saved:
        assert reader.restore(step, **HOST).params["w0"][0] == step * 10
    subprocess.run([sys.executable, "-c", OPEN, tmp_path / "run"], check=True, timeout=60)


def test_two_managers_do_not_write_the_same_step(tmp_path):
    with CheckpointManager(tmp_path) as one, CheckpointManager(tmp_path) as other:
        one.save(1, values(1))
        with pytest.raises(ckptmgr.CheckpointExistsError):
            other.save(1, values(2))
        assert other.restore(1, **HOST).params["w0"][0] == 10


@pytest.mark.parametrize("saves", ["while the other is open", "after it has looked"])
def test_no_manager_deletes_what_the_mirror_of_another_lacks(tmp_path, saves, monkeypatch):
    copy, may_copy = mirror.Mirror._copy, threading.Event()

    def copy_late(*arguments):
        may_copy.wait(30)
        copy(*arguments)

    monkeypatch.setattr(mirror.Mirror, "_copy", copy_late)
    with CheckpointManager(tmp_path / "run", mirror=tmp_path / "away") as one:
        if saves == "after it has looked":
            one.wait()
        with CheckpointManager(tmp_path / "run", keep=ckptmgr.latest(1)) as other:
            for step in (1, 2, 3):
                other.save(step, values(step)).result()
            may_copy.set()
    assert CheckpointManager(tmp_path / "away", read_only=True).steps() == [1, 2, 3]
    assert CheckpointManager(tmp_path / "run", read_only=True).steps() == [3]


def test_a_manager_beside_one_with_a_mirror_deletes_after_its_saves_alone_and_waits_for_that(tmp_path):
    with CheckpointManager(tmp_path / "run", mirror=tmp_path / "away") as one:
        for step in (1, 2, 3):
            one.save(step, values(step))
        with CheckpointManager(tmp_path / "run", keep=ckptmgr.latest(1)) as other:
            other.pin(1)
            other.unpin(1)
            other.wait()
            assert one.steps() == [1, 2, 3]
            other.save(4, values(4))
            other.wait()
            assert one.steps() == [4]


def test_a_closed_manager_copies_nothing_more(tmp_path):
    with CheckpointManager(tmp_path / "run", keep=ckptmgr.latest(1)) as one:
        with CheckpointManager(tmp_path / "run", mirror=tmp_path / "away") as other:
            other.save(1, values(1))
        one.save(2, values(2)).result()
        one.wait()
        assert one.steps() == [2]
    assert CheckpointManager(tmp_path / "away", read_only=True).steps() == [1]


def test_each_manager_keeps_its_options_and_raises_its_own_failure(tmp_path, monkeypatch):
    told = []
    with CheckpointManager(tmp_path, on_commit=lambda info: told.append(info.step)) as one:
        other = CheckpointManager(tmp_path, timeout_s=30)
        with monkeypatch.context() as patch:
            faults.install("fail file 1", patch.setattr)
            other.save(1, values(1))
            one.wait()  # for the save of the other too, whose failure is not its own
        one.save(2, values(2)).result()
        with pytest.raises(ckptmgr.SaveError, match="step 1 could not be saved"):
            other.wait()
        other.save(3, values(3)).result()
        assert one.steps() == [2, 3]
        one.wait()
        assert told == [2]
        other.close()
        assert not is_free(tmp_path)
        one.save(4, values(4)).result()  # the other is closed, this one is not
        with pytest.raises(ckptmgr.SaveError, match="closed"):
            other.save(5, values(5))
    assert is_free(tmp_path)


def test_a_manager_made_again_without_closing_the_old_one_goes_on_with_its_saves(tmp_path):
    manager = CheckpointManager(tmp_path)
    for step in range(6):
        manager.save(step, values(step))
        manager = CheckpointManager(tmp_path)  # as a cell of a notebook that is run again
    assert is_whole(manager.restore(**HOST).params)
    manager.close()
    assert manager.steps() == list(range(6))
    ends = time.monotonic() + 30
    while not is_free(tmp_path) and time.monotonic() < ends:  # the work after the last commit may hold it
        gc.collect()
        time.sleep(0.01)
    assert is_free(tmp_path)


def test_a_run_whose_directory_was_removed_under_an_open_manager_is_locked_anew(tmp_path):
    run = tmp_path / "run"
    old = CheckpointManager(run)
    shutil.rmtree(run)
    with CheckpointManager(run) as new:
        new.save(1, values(1))
        assert not is_free(run)
    old.close()
    assert is_free(run)


# ---------------------------------------------------------------- the garbage collector, and the lock


def test_what_the_garbage_collector_calls_takes_no_lock_and_waits_for_nothing(tmp_path):
    """A lock in a destructor stops the whole process: the collector may interrupt the thread that holds it."""
    manager = CheckpointManager(tmp_path)
    manager.save(1, values(1)).result()
    manager.wait()
    kinds = {type(each) for each in gc.get_objects() if str(type(each).__module__).startswith("ckptmgr")}
    assert background.Background in kinds
    assert not [kind for kind in kinds if hasattr(kind, "__del__")]
    called = {info.func for info in weakref.finalize._registry.values()}
    assert {each for each in called if each.__module__.startswith("ckptmgr")} == {writer._leave}
    done = []
    with writer._guard:  # as a thread that opens a run does; its own garbage collector would stop for ever
        thread = threading.Thread(target=lambda: done.append(writer._leave(str(tmp_path), object(), os.getpid())))
        thread.start()
        thread.join(20)
    assert done
    manager.close()


def test_a_manager_that_nobody_holds_lets_another_process_in_once_it_has_saved(tmp_path):
    manager = CheckpointManager(tmp_path, mirror=tmp_path / "away")
    manager.save(1, values(1))
    del manager
    lock, ends = tmp_path / names.LOCK, time.monotonic() + 20
    while lock.exists() and time.monotonic() < ends:
        time.sleep(0.02)
    assert is_free(tmp_path)
    assert CheckpointManager(tmp_path, read_only=True).steps() == [1]


def test_a_lock_that_somebody_removes_all_the_time_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_is_still", lambda *_: False)
    with pytest.raises(ckptmgr.SaveError, match=r"lock was removed 1000 times while it was locked"):
        CheckpointManager(tmp_path)


def interrupted(call, turn):
    """What an interrupt at a moment of a call raises. As in a notebook, its traceback keeps what the call had."""
    try:
        with moments.Interrupt(turn, KeyboardInterrupt):
            call()
    except KeyboardInterrupt as problem:
        return problem
    return None


def test_an_interrupt_while_the_lock_is_taken_does_not_lock_this_process_out(tmp_path):
    """At each moment of the first locking of a run, and of locking it anew after the file was removed."""
    (tmp_path / names.OURS).mkdir()
    for turn in itertools.count(1):
        raised = interrupted(lambda: writer.Writer(tmp_path), turn)
        held = writer.Writer(tmp_path)
        assert not is_free(tmp_path)
        (tmp_path / names.LOCK).unlink()
        raised_anew = interrupted(held.shared.hold, turn)
        held.shared.hold()
        assert not is_free(tmp_path)
        held.release()
        if raised is raised_anew is None:
            break
    assert turn > 50
    assert is_free(tmp_path)


# ---------------------------------------------------------------- threads


@pytest.mark.soak
def test_any_thread_may_call_any_method(tmp_path):
    ends, accepted, problems = time.monotonic() + counted(4, full=60), {}, []
    steps, deleted = iter(range(10**6)), set()
    manager = CheckpointManager(tmp_path, timeout_s=60, keep=[ckptmgr.latest(30), ckptmgr.best("loss")])
    expected = (ckptmgr.CheckpointNotFoundError, ckptmgr.CheckpointExistsError)

    def save(draw):
        step = next(steps)
        result = manager.save(step, values(step), metrics={"loss": draw.random()})
        if result and draw.random() < 0.3:
            assert result.result().step == step
        accepted[step] = bool(result)

    def one_of_them(draw):
        return draw.choice(manager.steps() or [0])

    def delete(draw):
        step = one_of_them(draw)
        manager.delete(step)
        deleted.add(step)

    calls = [
        save,
        save,
        lambda draw: is_whole(manager.restore(**HOST).params) or problems.append("a mixture"),
        lambda draw: manager.restore("best", **HOST),
        lambda draw: manager.infos(),
        lambda draw: manager.info(one_of_them(draw)),
        lambda draw: manager.best(),
        lambda draw: manager.verify(one_of_them(draw)) or problems.append("damaged"),
        lambda draw: manager.pin(one_of_them(draw)),
        lambda draw: manager.unpin(one_of_them(draw)),
        delete,
        lambda draw: manager.wait(),
    ]

    def work(seed):
        draw = random.Random(seed)
        while time.monotonic() < ends:
            with contextlib.suppress(*expected):  # deleted by another thread meanwhile
                draw.choice(calls)(draw)

    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))
    manager.close()
    assert not problems
    listed = manager.steps()
    assert max(accepted.keys() - deleted) == listed[-1]
    for step in listed:
        assert manager.restore(step, **HOST).params["w0"][0] == step * 10


def test_of_several_threads_one_is_told_of_a_failure(tmp_path, monkeypatch):
    def wait(_):
        ready.wait(10)
        try:
            manager.wait()
        except ckptmgr.SaveError as problem:
            return problem.step

    with CheckpointManager(tmp_path) as manager:
        with monkeypatch.context() as patch:
            faults.install("fail file 1", patch.setattr)
            manager.save(1, values(1))
            while manager.steps() or manager._shared.background.waiting():
                time.sleep(0.01)
        ready = threading.Barrier(4)
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            assert sorted(map(str, threads.map(wait, range(4)))) == ["1", "None", "None", "None"]


def test_an_old_result_does_not_take_the_failure_of_a_newer_save(tmp_path, monkeypatch):
    with CheckpointManager(tmp_path) as manager:
        with monkeypatch.context() as patch:
            faults.install("fail file 1", patch.setattr)
            old = manager.save(1, values(1))
            with pytest.raises(ckptmgr.SaveError, match="step 1 "):
                old.result()
        with monkeypatch.context() as patch:
            faults.install("fail file 1", patch.setattr)
            manager.save(2, values(2))
            with pytest.raises(ckptmgr.SaveError, match="step 1 "):
                old.result()
            with pytest.raises(ckptmgr.SaveError, match="step 2 "):
                manager.wait()
        manager.wait()


# ---------------------------------------------------------------- callbacks


def test_a_callback_may_call_every_method(tmp_path):
    def call_all(info):
        if info.step != 1:
            return
        manager.wait()
        manager.save(2, values(2)).result(10)
        manager.pin(2), manager.unpin(2), manager.pin(1)
        seen.append((manager.steps(), manager.restore(2, **HOST).params["w0"][0], manager.info(1).pinned))
        assert manager.verify(2)
        manager.delete(2)
        manager.close()
        with pytest.raises(ckptmgr.SaveError, match="closed"):
            manager.save(3, values(3))
        seen.append("closed" if not is_free(tmp_path) else "let in before what follows from the save was done")

    seen = []
    manager = CheckpointManager(tmp_path, on_commit=call_all, timeout_s=20)
    manager.save(1, values(1))
    manager.wait()
    assert seen == [([1, 2], 20.0, True), "closed"]
    manager.close()
    assert manager.steps() == [1]
    assert is_free(tmp_path)


class Raises:
    """Code of the caller that raises a problem once: at the `turn`-th call of what is called `name`."""

    def __init__(self, problem, name, turn):
        self.problem, self.name, self.turn, self.seen = problem, name, turn, 0

    def at(self, name, value=None):
        if name == self.name:
            self.seen += 1
            if self.seen == self.turn:
                raise self.problem(name)
        return value

    def should_save(self, step, *, now, last):
        return self.at("should_save", True)

    def keep(self, records):
        return self.at("keep", [record.step for record in records])

    def get_state(self):
        return self.at("get_state", {"position": 1})

    def set_state(self, state): ...


@pytest.mark.soak
@pytest.mark.parametrize("problem", [KeyboardInterrupt, ValueError, SystemExit, MemoryError][: counted(2, full=4)])
@pytest.mark.parametrize("name", ["get_state", "should_save", "keep", "clock", "on_commit"])
def test_what_is_raised_in_the_callers_own_code_harms_no_save(problem, name, tmp_path):
    for turn in range(1, counted(3, full=9)):
        _save_with(Raises(problem, name, turn), tmp_path / str(turn))


def _save_with(raises, run):
    accepted = set()

    def bear(call):
        """Calls again what was interrupted once."""
        for _ in range(3):
            with contextlib.suppress(raises.problem, ckptmgr.SaveError):
                return call()
        raise AssertionError("it is never done")

    def save(step):
        extras = {"data": raises}
        return manager.save(step, values(step), extras=extras, on_exists="replace")

    options = {
        "save_every": raises,
        "keep": raises,
        "clock": lambda: raises.at("clock", time.time()),
        "on_commit": lambda info: raises.at("on_commit"),
    }
    manager = bear(lambda: CheckpointManager(run, timeout_s=20, **options))
    for step in range(3):
        if bear(functools.partial(save, step)):
            accepted.add(step)
    bear(manager.close)
    assert raises.seen
    assert accepted == {0, 1, 2} == set(manager.steps())
    assert all(is_whole(manager.restore(step, **HOST).params) for step in manager.steps())
    assert is_free(run)


# ---------------------------------------------------------------- forks


def _outcome(work):
    try:
        return str(work())
    except BaseException as problem:
        return f"{type(problem).__name__}: {problem}"


def in_child(work):
    """What `work` said in a forked child, which then ends as a Python process does."""
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        ends_well = False
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)  # a child that stands still is ended
            os.write(theirs, _outcome(work).encode())
            threading._shutdown()  # as the end of a data loader's process does
            ends_well = True
        finally:
            os._exit(not ends_well)  # whatever has happened: the child must not go on with the tests
    os.close(theirs)
    with os.fdopen(ours) as said:
        found = said.read()
    assert os.waitpid(child, 0)[1] == 0
    return found


@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.soak
def test_a_forked_child_reads_and_writes_nothing(tmp_path):
    manager = CheckpointManager(tmp_path, timeout_s=30)
    manager.save(1, values(1), metrics={"loss": 1.0}).result()
    inode = (tmp_path / names.LOCK).stat().st_ino
    for number in range(2, counted(6, full=100)):
        with manager._shared.turn:  # a thread that holds it is not there in the child
            result = manager.save(number, values(number))
            writes = {
                "save": lambda: manager.save(99, values(99)),
                "delete": lambda: manager.delete(1),
                "pin": lambda: manager.pin(1),
                "unpin": lambda: manager.unpin(1),
            }
            for name, call in list(writes.items())[:: counted(2, full=1)]:
                assert "SaveError" in (said := in_child(call)), name
                assert f"belongs to process {os.getpid()}, and this process is a fork of it" in said
        assert in_child(lambda: (manager.wait(), manager.close(), 1 in manager.steps(), manager.best("loss"))) == (
            "(None, None, True, 1)"
        )
        assert "TensorStore does not survive a fork" in in_child(lambda: manager.restore(1, **HOST))
        said = in_child(lambda result=result: result.result())
        assert "forked" in said or result.done(), said  # done before the fork: the child knows it too
        result.result()
        assert (tmp_path / names.LOCK).stat().st_ino == inode
    assert not is_free(tmp_path)
    manager.close()
    assert manager.steps() == list(range(1, counted(6, full=100)))
    assert is_whole(manager.restore(**HOST).params)


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_sigterm_ends_a_forked_child_that_stands_still_in_a_library(tmp_path):
    """As pools of data loaders end theirs, and wait for them."""
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    ours, theirs = os.pipe()
    with CheckpointManager(tmp_path):
        assert callable(signal.getsignal(signal.SIGTERM))
        if (child := os.fork()) == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)  # a child that stands still is ended
            lock(mutex)
            os.write(theirs, b"locks")
            lock(mutex)
            os._exit(1)
        assert os.read(ours, 5) == b"locks"
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    os.close(ours)
    os.close(theirs)


def _load(number):
    return number * 2


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_data_loaders_that_are_forked_while_a_save_is_written_end_quietly(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        for step in range(3):
            manager.save(step, values(step))
            with multiprocessing.get_context("fork").Pool(2) as pool:
                assert pool.map(_load, range(4)) == [0, 2, 4, 6]
        manager.wait()
        assert manager.steps() == [0, 1, 2]
        assert not is_free(tmp_path)


# ---------------------------------------------------------------- what one manager does, and the others know


def test_a_manager_opened_after_the_lock_was_removed_leaves_the_draft_of_another_alone(tmp_path):
    with CheckpointManager(tmp_path):
        os.unlink(tmp_path / names.LOCK)
        draft = tmp_path / names.SAVING / "2"
        draft.mkdir()
        CheckpointManager(tmp_path).close()
        assert draft.exists()


WRITES = """import sys, numpy, ckptmgr
with ckptmgr.CheckpointManager(sys.argv[1]) as manager:
    manager.save(4, {"w": numpy.arange(4)}).result()
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_second_manager_that_is_refused_takes_no_lock_from_the_first(tmp_path):
    first = CheckpointManager(tmp_path)
    os.unlink(tmp_path / names.LOCK)
    other = subprocess.Popen(
        [sys.executable, "-c", WRITES, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "open\n"
    said = f"is being written to by process {other.pid}"
    for call in (lambda: CheckpointManager(tmp_path), lambda: first.save(9, values(9)), lambda: first.delete(4)):
        with pytest.raises(ckptmgr.SaveError, match=said):
            call()
    other.communicate(timeout=60)
    assert first.steps() == [4]
    with CheckpointManager(tmp_path):  # now it is free again
        first.save(9, values(9)).result()
    first.close()
    assert is_free(tmp_path)


@pytest.mark.parametrize("call", ["save", "delete", "pin", "unpin", "rewind"])
def test_whoever_lost_the_lock_to_another_process_changes_nothing(tmp_path, call):
    manager = CheckpointManager(tmp_path)
    for step in (1, 2, 3):
        manager.save(step, values(step)).result()
    manager.wait()
    os.unlink(tmp_path / names.LOCK)
    other = subprocess.Popen(
        [sys.executable, "-c", WRITES, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "open\n"
    with pytest.raises(ckptmgr.SaveError, match=f"is being written to by process {other.pid}"):
        getattr(manager, call)(*((9, values(9)) if call == "save" else (2,)))
    other.communicate(timeout=60)
    assert manager.steps() == [1, 2, 3, 4]
    manager.close()


def test_no_manager_of_the_run_deletes_what_another_has_just_saved(tmp_path):
    one = CheckpointManager(tmp_path / "run")
    other = CheckpointManager(tmp_path / "run", keep=1, mirror=tmp_path / "mirror")
    one.save(100, values(100)).result()
    other.save(60, values(60)).result()
    one.save(55, values(55)).result()
    one.wait()
    other.pin(100)  # the mirror takes the pin over, then the other's policy is asked
    other.wait()
    assert 55 in one.steps()
    one.close()
    other.close()


def test_a_run_is_held_until_the_mirror_has_what_was_saved_also_without_close(tmp_path):
    manager = CheckpointManager(tmp_path / "run", mirror=tmp_path / "mirror")
    go_on = threading.Event()
    manager._shared.mirroring.add(background.Task("a slow copy", lambda: go_on.wait(60) and None, 60))
    shared = weakref.ref(manager._shared)
    manager.save(1, values(1)).result()
    until(lambda: not shared().background.waiting())
    del manager
    gc.collect()
    time.sleep(0.3)
    assert not is_free(tmp_path / "run")
    go_on.set()
    until(lambda: is_free(tmp_path / "run"))
    assert CheckpointManager(tmp_path / "mirror", read_only=True).steps() == [1]


def until(is_so):
    ends = time.monotonic() + 30
    while not is_so():
        gc.collect()
        assert time.monotonic() < ends
        time.sleep(0.05)


# ---------------------------------------------------------------- what comes while a step is written


def test_a_step_that_comes_while_its_number_waits_to_be_written_is_not_replaced(tmp_path):
    with CheckpointManager(tmp_path / "other") as other:
        other.save(2, values(7))
    go_on = threading.Event()
    manager = CheckpointManager(tmp_path / "run", on_commit=lambda info: info.step == 5 and go_on.wait(60))
    manager.save(5, values(5))
    saving = threading.Thread(target=manager.save, args=(2, values(2)))
    saving.start()
    until(lambda: manager._shared.background.waiting())
    time.sleep(0.3)
    os.rename(tmp_path / "other/2", tmp_path / "run/2")
    go_on.set()
    saving.join()
    with pytest.raises(ckptmgr.SaveError, match="step 2"):
        manager.wait()
    assert manager.restore(2, **HOST).params["w0"][0] == 70
    manager.close()


def test_a_step_that_a_callback_brings_back_is_not_replaced(tmp_path):
    manager = CheckpointManager(tmp_path, on_commit=lambda info: info.step == 7 and manager.rewind(6))
    for step in (1, 2, 6):
        manager.save(step, values(step))
    manager.rewind(2)
    manager.save(7, values(7))
    with contextlib.suppress(ckptmgr.CheckpointExistsError, ckptmgr.SaveError):
        manager.save(6, values(0)).result()
    with contextlib.suppress(ckptmgr.SaveError):
        manager.wait()
    assert manager.restore(6, **HOST).params["w0"][0] == 60
    manager.close()


def test_a_second_manager_also_writes_that_a_run_is_of_version_2(tmp_path):
    """Else the next start would take a folder of the user's for one that version 1 left, and move it."""
    run = tmp_path / "run"
    with CheckpointManager(run), CheckpointManager(run) as other:
        shutil.rmtree(run / names.OURS)
        other.save(2, values(2)).result()
    (run / ".deleted-5-7").mkdir()
    (run / ".deleted-5-7" / "notes").write_text("mine")
    CheckpointManager(run).close()
    assert (run / ".deleted-5-7" / "notes").read_text() == "mine"
