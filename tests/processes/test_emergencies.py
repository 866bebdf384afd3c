"""A process of a job dies, stands still, or is cut off from the network, in each act of a save and a restore."""

import concurrent.futures
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

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
SLACK_S = 1.0  # until a thread runs on a busy machine
END_S = 60.0
ALL = [
    (what, act, kind, victim)
    for what, acts in emergencies.ACTS.items()
    for act, kind, victim in itertools.product(acts, ("kill", "stop"), (0, 1))
    if victim == 0 or act not in emergencies.OF_PROCESS_0
]
FEW = [
    ("save", "the arrays of step 3", "stop", 0),
    ("save", "arrays", "stop", 1),
    ("restore", "the restore from step 2", "stop", 1),
    ("broadcast", "sum", "stop", 1),
]


class Job:
    """Two processes, one of which meets with an emergency."""

    def __init__(self, directory, what, emergency="", victim=None, hosts=({}, {})):
        self.directory, self.at, port = directory / "run", directory / "at", free_port()
        self.processes = [
            warm.start(
                [SCRIPT, self.directory, port, 2, index, 1, "emergency", what],
                env=os.environ
                | {"CKPTMGR_TIMEOUT_S": str(TIMEOUT_S), "CKPTMGR_EMERGENCY_AT": str(self.at)}
                | {"CKPTMGR_EMERGENCY": emergency if index == victim else ""}
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
        self.failed = [json.loads(rest) for word, rest in words if word == "failed"]

    def __repr__(self):
        return f"{self.code}\n{self.out}\n{self.err[-3000:]}"


def play(directory, what, act, kind, victim, *, goes_on):
    """An emergency, and the job that starts again; returns how late the other process said it, in `timeout_s`."""
    directory.mkdir()
    job = Job(directory, what, f"{kind} {act}", victim)
    try:
        happened = job.wait_for_the_emergency()
        other = job.end(1 - victim)
        late = judge(other, happened, victim, may_be_ended_by_jax=(kind, victim) == ("kill", 0))
        if goes_on:
            job.processes[victim].send_signal(signal.SIGCONT)
        else:
            job.processes[victim].kill()
        stopped = job.end(victim)
    finally:
        job.kill()
    go_on(job.directory, what, [*other.durable, *stopped.durable])
    return late


def judge(told, happened, missing, *, may_be_ended_by_jax=False):
    """How late a process said who is missing; it must have named the process in time."""
    if may_be_ended_by_jax and not told.failed:
        assert told.code == -signal.SIGABRT, told
        return 0.0
    assert len(told.failed) == 1, told
    ((when, kind, why, named, waiting_for),) = told.failed
    assert kind in ("CheckpointTimeoutError", "SaveError"), told
    assert named == [missing], told
    assert f"process {missing} " in waiting_for, told
    assert f"process {missing} " in why, told
    late_s = when - max(happened, told.begins[-1])
    assert late_s < BOUND_S + SLACK_S, (late_s, told)
    return late_s / TIMEOUT_S


def go_on(directory, what, durable):
    """What is listed is whole, and the job that starts again goes on from it."""
    newest = whole(directory)
    assert newest >= max(durable)
    again = Job(directory.parent, "save")
    try:
        said = [again.end(index) for index in range(2)]
    finally:
        again.kill()
    for told in said:
        assert (told.code, told.resumed, told.failed) == (0, [newest], []), told
    assert whole(directory) == newest + 4


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


@pytest.mark.soak
@pytest.mark.parametrize("turn", range(counted(1, full=10)))
def test_the_others_name_who_is_missing_in_time_and_the_job_goes_on_from_the_last_step(turn, tmp_path):
    warm._server()
    cases = ALL if SOAK else FEW
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        late = [
            threads.submit(play, tmp_path / f"{n}", *case, goes_on=case[2] == "stop" and (n + turn) % 2 == 0)
            for n, case in enumerate(cases)
        ]
    for case, each in zip(cases, late, strict=True):
        assert each.exception() is None, case
    if SOAK:
        print(f"{len(cases)} emergencies, named after at most {max(each.result() for each in late):.3f} timeout_s")


# ---------------------------------------------------------------- the network

ADDRESSES = ["10.213.77.1", "10.213.77.2"]


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def network():
    """Two network namespaces, as of two machines, and a link between them; yields their names."""
    names = [f"ckptmgr-{os.getpid()}-{index}" for index in range(2)]
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


def cut_off(directory, names, what, act, victim):
    directory.mkdir()
    hosts = [
        {"CKPTMGR_NETWORK": f"{name} {address}", "CKPTMGR_HOST": ADDRESSES[0]}
        for name, address in zip(names, ADDRESSES, strict=True)
    ]
    job = Job(directory, what, f"cut {act}", victim, hosts)
    try:
        job.wait_for_the_emergency()
        ip("-n", names[1], "link", "set", "link0", "down")
        happened = time.monotonic()
        job.processes[victim].send_signal(signal.SIGCONT)
        said = [job.end(index) for index in range(2)]
    finally:
        job.kill()
        ip("-n", names[1], "link", "set", "link0", "up")
    late = [judge(told, happened, 1 - index) for index, told in enumerate(said)]
    go_on(job.directory, what, [step for told in said for step in told.durable])
    return max(late)


def can_make_networks():
    return os.geteuid() == 0 and shutil.which("ip") and subprocess.run(["ip", "netns"]).returncode == 0


@pytest.mark.soak
@pytest.mark.skipif(not can_make_networks(), reason="only root makes network namespaces, with the command ip")
@pytest.mark.parametrize("turn", range(counted(1, full=10)))
def test_without_the_network_each_names_the_other(turn, tmp_path):
    cases = [(what, act) for what, acts in emergencies.ACTS.items() for act in acts]
    with network() as names:
        late = [
            cut_off(tmp_path / f"{n}", names, what, act, 0 if act in emergencies.OF_PROCESS_0 else (n + turn) % 2)
            for n, (what, act) in enumerate(cases if SOAK else [("save", "the commit of step 3")])
        ]
    if SOAK:
        print(f"{len(late)} times without network, named after at most {max(late):.3f} timeout_s")
