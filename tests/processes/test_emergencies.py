"""A process of a job dies, stands still, or is cut off from the network, in each act of a save and a restore."""

import concurrent.futures
import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import emergencies
import member
import numpy as np
import pytest
import warm
from conftest import SOAK, counted, free_port, visible

import ckptmgr

pytestmark = pytest.mark.xdist_group("emergencies")
SCRIPT = Path(member.__file__)
TIMEOUT_S = 5.0
BOUND_S = 1.1 * TIMEOUT_S
SLACK_S = 2.0  # until a thread runs on a busy machine
END_S = 60.0
AT_A_TIME = 5


class Emergency(NamedTuple):
    """What happens to which process, in a save, a restore, or a restore with broadcast."""

    what: str
    act: str
    kind: str
    victim: int


ALL = [
    Emergency(what, act, kind, victim)
    for what, acts in emergencies.ACTS.items()
    for act, kind, victim in itertools.product(acts, ("kill", "stop"), (0, 1))
    if victim == 0 or act not in emergencies.OF_PROCESS_0
]
FEW = [
    Emergency("save", "the arrays of step STEP", "stop", 0),
    Emergency("save", "arrays", "stop", 1),
    Emergency("restore", "the restore from step STEP", "stop", 0),
    Emergency("broadcast", "sum", "stop", 1),
]


class Job:
    """Two processes, one of which meets with an emergency."""

    def __init__(self, run, emergency=None, hosts=({}, {})):
        self.at, port = run.parent / "at", free_port()
        self.at.unlink(missing_ok=True)
        what, act, kind, victim = emergency or ("save", "", "", None)
        self.processes = [
            warm.start(
                [SCRIPT, run, port, 2, index, 1, "emergency", what],
                env=os.environ
                | {"CKPTMGR_TIMEOUT_S": str(TIMEOUT_S), "CKPTMGR_EMERGENCY_AT": str(self.at)}
                | {"CKPTMGR_EMERGENCY": f"{kind} {act}" if index == victim else ""}
                | hosts[index],
            )
            for index in range(2)
        ]

    def wait_for_the_emergency(self):
        """When it was."""
        ends = time.monotonic() + END_S
        while not self.at.exists() or not self.at.read_text():
            assert time.monotonic() < ends, self.said()
            time.sleep(0.02)
        return float(self.at.read_text())

    def end(self, index):
        """All that a process says until it ends."""
        out, err = self.processes[index].communicate(END_S)
        return Told(out, err, self.processes[index].returncode)

    def said(self):
        self.kill()
        return [self.end(index) for index in range(2)]

    def kill(self):
        for process in self.processes:
            process.kill()


class Told:
    """What a process has said."""

    def __init__(self, out, err, code):
        self.out, self.err, self.code = out, err, code
        words = [line.partition(" ")[::2] for line in out.splitlines()]
        self.durable = [int(rest) for word, rest in words if word == "durable"]
        self.resumed = [int(rest) for word, rest in words if word == "resumed"]
        self.begins = [float(rest) for word, rest in words if word == "begins"]
        self.raised = [json.loads(rest) for word, rest in words if word == "raised"]

    def __repr__(self):
        return f"{self.code}\n{self.out}\n{self.err[-3000:]}"


class Run:
    """Jobs, one after the other, in one directory. Each goes on from the last committed step of the one before."""

    def __init__(self, directory):
        directory.mkdir(parents=True)
        self.directory, self.newest = directory / "run", 0
        self.late = []
        """How late each emergency was noticed, in `timeout_s`."""

    def meet(self, emergency, *, goes_on):
        """A process is killed or stopped, and goes on or does not once the other has said so."""
        victim, is_killed = emergency.victim, emergency.kind == "kill"
        job = Job(self.directory, emergency)
        try:
            happened = job.wait_for_the_emergency()
            other = job.end(1 - victim)
            if goes_on and not is_killed:
                job.processes[victim].send_signal(signal.SIGCONT)
            else:
                job.processes[victim].kill()
            said = [other, job.end(victim)]
        finally:
            job.kill()
        self.late.append(judge(other, happened, victim, may_be_ended_by_jax=is_killed and victim == 0))
        self._look(said)

    def cut_off(self, emergency, names):
        """As a process comes to an act, it loses the network."""
        hosts = [
            {"CKPTMGR_NETWORK": f"{name} {address}", "CKPTMGR_HOST": ADDRESSES[0]}
            for name, address in zip(names, ADDRESSES, strict=True)
        ]
        job = Job(self.directory, emergency, hosts)
        try:
            job.wait_for_the_emergency()
            ip("-n", names[1], "link", "set", "link0", "down")
            happened = time.monotonic()
            job.processes[emergency.victim].send_signal(signal.SIGCONT)
            said = [job.end(index) for index in range(2)]
        finally:
            job.kill()
            ip("-n", names[1], "link", "set", "link0", "up")
        self.late += [judge(told, happened, 1 - index) for index, told in enumerate(said)]
        self._look(said)

    def end(self):
        """A job to which nothing happens."""
        job, before = Job(self.directory), self.newest
        try:
            said = [job.end(index) for index in range(2)]
        finally:
            job.kill()
        assert [(told.code, told.raised) for told in said] == [(0, [])] * 2, said
        self._look(said)
        assert self.newest == before + 4

    def _look(self, said):
        """The job went on from the newest step, and what it has left is whole."""
        assert [told.resumed for told in said] == [[self.newest]] * 2, said
        self.newest = whole(self.directory)
        assert self.newest >= max(step for told in said for step in told.durable), said


def judge(told, happened, missing, *, may_be_ended_by_jax=False):
    """How late a process said who is missing; it must have named the process in time."""
    if may_be_ended_by_jax and not told.raised:
        assert told.code == -signal.SIGABRT, told
        return 0.0
    assert len(told.raised) == 1, told
    ((when, kind, why, named, waiting_for),) = told.raised
    assert kind in ("CheckpointTimeoutError", "SaveError"), told
    assert named == [missing], told
    assert f"process {missing} " in waiting_for, told
    assert f"process {missing} " in why, told
    late_s = when - max(happened, told.begins[-1])
    assert late_s < BOUND_S + SLACK_S, (late_s, told)
    return late_s / TIMEOUT_S


def whole(directory):
    """The newest step; every step that is listed must be whole, and nothing else be there."""
    with ckptmgr.CheckpointManager(directory, read_only=True) as reader:
        steps = reader.steps()
        assert visible(directory) == sorted(map(str, steps))
        for step in steps:
            assert reader.verify(step)
            found = reader.restore(step, layout=ckptmgr.HOST)
            assert np.array_equal(found.params["w"], member.state(step)["w"])
    return steps[-1]


def all_of(runs):
    """Runs them at the same time, for most of it is waiting; returns how late the latest emergency was noticed."""
    with concurrent.futures.ThreadPoolExecutor() as threads:
        ends = [threads.submit(run) for run in runs]
    return max(late for each in ends for late in each.result())


@pytest.mark.soak
@pytest.mark.parametrize("turn", range(counted(1, full=10)))
def test_the_others_name_who_is_missing_in_time_and_the_job_goes_on_from_the_last_step(turn, tmp_path):
    def play(number):
        run = Run(tmp_path / str(number))
        for each in cases[number::AT_A_TIME]:
            try:
                run.meet(each, goes_on=(ALL.index(each) // AT_A_TIME + turn) % 2)
            except BaseException as problem:
                raise AssertionError(each) from problem
        run.end()
        return run.late

    cases = ALL if SOAK else FEW
    warm.run(["-c", ""])  # starts the process that the threads then ask
    latest = all_of(functools.partial(play, number) for number in range(min(AT_A_TIME, len(cases))))
    print(f"{len(cases)} emergencies, noticed after at most {latest:.3f} timeout_s")


# ---------------------------------------------------------------- the network

ADDRESSES = ["10.213.77.1", "10.213.77.2"]


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def network(number):
    """Two network namespaces, as of two machines, and a link between them; yields their names."""
    names = [f"ckptmgr-{os.getpid()}-{number}-{index}" for index in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "link0", "netns", names[0], "type", "veth", "peer", "name", "link0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "link0")
            ip("-n", name, "link", "set", "link0", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def can_make_networks():
    return os.geteuid() == 0 and shutil.which("ip") and subprocess.run(["ip", "netns"]).returncode == 0


@pytest.mark.soak
@pytest.mark.skipif(not can_make_networks(), reason="only root makes network namespaces, with the command ip")
@pytest.mark.parametrize("turn", range(counted(1, full=10)))
def test_without_the_network_each_names_the_other(turn, tmp_path):
    def play(number):
        run = Run(tmp_path / str(number))
        with network(number) as names:
            for n, (what, act) in list(enumerate(cases))[number::AT_A_TIME]:
                victim = 0 if act in emergencies.OF_PROCESS_0 else (n // AT_A_TIME + turn) % 2
                try:
                    run.cut_off(Emergency(what, act, "cut", victim), names)
                except BaseException as problem:
                    raise AssertionError((what, act, victim)) from problem
        run.end()
        return run.late

    cases = [(what, act) for what, acts in emergencies.ACTS.items() for act in acts]
    cases = cases if SOAK else [("save", "the commit of step STEP")]
    warm.run(["-c", ""])  # starts the process that the threads then ask
    latest = all_of(functools.partial(play, number) for number in range(min(AT_A_TIME, len(cases))))
    print(f"{len(cases)} times without network, noticed after at most {latest:.3f} timeout_s")
