"""What grows with the number of processes: a real coordinator with many clients, and a real job."""

import concurrent.futures
import contextlib
import os
import re
import signal
import threading
import time

import pytest
from conftest import counted, free_port, in_background
from jax._src.lib import _jax
from test_job import end, finish, start

from ckptmgr.errors import CheckpointTimeoutError
from ckptmgr.processes import job
from ckptmgr.processes.agreement import Spec
from ckptmgr.processes.coordinator import Coordinator

pytestmark = pytest.mark.xdist_group("job")


class Watched:
    """A client of the coordinator that counts what it reads of directories, and how long that takes."""

    def __init__(self, client):
        self.client, self.entries, self.looked_s, self.slow_s = client, [], 0.0, 0.0

    def __getattr__(self, name):
        return getattr(self.client, name)

    def key_value_dir_get(self, prefix):
        began = time.monotonic()
        time.sleep(self.slow_s)
        found = self.client.key_value_dir_get(prefix)
        self.entries.append(len(found))
        self.looked_s += time.monotonic() - began
        return found


@contextlib.contextmanager
def lines(count, timeout_s):
    """A line of calls for each client of a coordinator, as each process of a job has one."""
    address = f"127.0.0.1:{free_port()}"
    service = _jax.get_distributed_runtime_service(address, count)
    clients = [_jax.get_distributed_runtime_client(address, index) for index in range(count)]
    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        list(threads.map(lambda client: client.connect(), clients))
        found = []
        for index, client in enumerate(map(Watched, clients)):
            line = job.Job("scale", timeout_s, coordinator=Coordinator(client, index, count))
            line.watched = client
            found.append(line)
        try:
            yield found
        finally:  # a client that still watches the coordinator ends its process when that goes away
            list(threads.map(lambda client: client.shutdown(), clients))
    service.shutdown()


def all_at_once(lines, act):
    with concurrent.futures.ThreadPoolExecutor(len(lines)) as threads:
        return list(threads.map(act, lines))


def spec(_=None):
    return Spec("the same", list, [-1], [], lambda owners, differs: None)


@pytest.mark.parametrize("count", [3, counted(12, full=64)])
def test_only_process_0_reads_what_all_report(count):
    with lines(count, 60) as found:
        for number in range(3):
            all_at_once(found, lambda line, n=number: line.together(job.Call("a save", n), spec, spec))
            gathered = all_at_once(found, lambda line, n=number: line.collect(job.Call("files", n), line.index))
            assert gathered == [list(range(count)), *[[]] * (count - 1)]
        assert found[0].watched.entries
        assert [line.watched.entries for line in found[1:]] == [[]] * (count - 1)


def test_who_waits_long_for_process_0_reads_its_heartbeats_alone():
    late = threading.Event()
    with lines(6, 1.0) as found:

        def save(line):
            with line.working():
                if line.leads:
                    late.wait(2.5)  # longer than a wait lasts, but for the heartbeats
                line.decide(job.Call("a decision", 1), lambda: 7)

        all_at_once(found, save)
        read = [entries for line in found[1:] for entries in line.watched.entries]
        assert read
        assert max(read) == 1


def test_looking_for_the_reports_of_the_others_takes_a_small_part_of_the_time_that_they_are_waited_for():
    """A look at thousands of reports takes a while, and process 0 has a training step to run beside it."""
    with lines(4, 60) as found:
        found[0].watched.slow_s = 0.1
        began = time.monotonic()

        def save(line):
            if line.index == 3:
                time.sleep(3)
            line.share(job.Call("the arrays", 1))

        all_at_once(found, save)
        waited_s = time.monotonic() - began
        assert waited_s < 6
        assert found[0].watched.looked_s < 0.3 * waited_s + 0.2


def test_what_one_process_reports_as_failed_is_raised_where_the_others_are_collected():
    with lines(3, 60) as found:

        def write(line):
            call = job.Call("the arrays", 1)
            try:
                line.share(call, ValueError("no space")) if line.index == 2 else line.collect(call, line.index)
            except ValueError as problem:
                return str(problem)

        said = all_at_once(found, write)
        assert all("no space" in each for each in said), said
        assert all_at_once(found, lambda line: line.collect(job.Call("the arrays", 2), 5))[0] == [5, 5, 5]


def test_a_process_that_comes_after_the_others_have_given_up_finds_its_place_again():
    with lines(2, 1.0) as (first, late):
        with pytest.raises(CheckpointTimeoutError):
            first.share(job.Call("the save", 1))
        first.fail(job.Call("the save", 2), CheckpointTimeoutError("step 1 is slow", waiting_for="process 1"))
        for step in (1, 2):
            with pytest.raises(CheckpointTimeoutError, match=r"did not reach|is slow"):
                late.share(job.Call("the save", step))
        assert all_at_once([first, late], lambda line: line.collect(job.Call("files", 3), line.index))[0] == [0, 1]


def test_a_message_names_some_of_a_thousand_processes():
    assert job.spell([3]) == "process 3"
    assert job.spell([0, 2]) == "processes 0, 2"
    assert job.spell(range(1, 1001)) == f"processes {', '.join(map(str, range(1, 17)))} and 984 more"


@in_background
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_large_job_loses_a_process_in_a_save_and_its_next_start_goes_on_from_the_last_step(tmp_path):
    """32 processes with a device each, on one machine: all of them wait for two cores."""
    count = counted(4, full=32)
    victim, timeout_s = count // 2 + 1, 8 + 2 * count
    processes = start(
        count, tmp_path, "crowd", "1", "2", "3",
        devices=1, faults={victim: "before arrays 3"}, timeout_s=timeout_s,
    )  # fmt: skip
    try:
        assert processes[victim].wait(600) == -signal.SIGKILL
        out, err = processes[0].communicate(timeout=4 * timeout_s)
    finally:
        end(processes)
    assert "durable 2\n" in out, out + err[-3000:]
    assert re.search(
        rf"failed SaveError step 3 could not be saved: process {victim} of {count} did not reach", out
    )
    assert (
        finish(start(count, tmp_path, "crowd", "3", devices=1, timeout_s=timeout_s), 600)
        == ["steps 1 2 3"] * count
    )
    check_balance(tmp_path / "3" / "params", count)


def check_balance(item, count):
    """No process has written more than a tenth above its share."""
    parts = [sum(map(os.path.getsize, (item / f"ocdbt.process_{n}" / "d").iterdir())) for n in range(count)]
    assert max(parts) < 1.1 * sum(parts) / count, parts
