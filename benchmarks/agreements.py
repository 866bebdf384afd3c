"""Agreements of thousands of clients of one coordinator of jax.distributed, through the library's own `Job`.

Each client is a connection of its own and runs in a thread of its own, as a process of a job would be. The
coordinator and client 0 have a process to themselves, as on the first machine of a job: its CPU time is what that
machine pays. All others share a few processes, and with them the cores of this machine: so the time of a call has
the work of all clients in it, which in a job is done on as many machines.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jax._src.lib import _jax

from benchmarks import fresh, measure
from ckptmgr.processes.agreement import Spec, digest
from ckptmgr.processes.coordinator import Coordinator
from ckptmgr.processes.job import Call, Job
from ckptmgr.saving.stages import Stages

_CROWDS = 4  # processes that the clients but the first share
_LONG_S = 3600  # for what is not measured: no client is to be taken for dead on a machine that has too much to do
_LEAVES = 100  # of a spec: their owners are sent with it, as one checksum


def line_of(client: Any, index: int, count: int, timeout_s: float) -> Job:
    """The line of calls of one client among so many."""
    return Job("scale", timeout_s, coordinator=Coordinator(client, index, count))


# ---------------------------------------------------------------- what is measured


def _spec(_: Any = None) -> Spec:
    return Spec(digest("leaves"), list, [-1] * _LEAVES, [], lambda owners, differs: None)


def _save(line: Job, number: int) -> None:
    """All waits of one save, behind the caller: that all save the same, directories, arrays, commit."""
    stages = Stages(number, line)
    stages.agree(_spec)
    for stage in ("directories", "arrays", "commit"):
        stages.reach(stage)


def _open(line: Job, number: int) -> None:
    call = Call("the opening of a run")
    line.decide(call, lambda: ["run 0", "/shared/run", "0" * 16])
    line.share(call)


def _restore(line: Job, number: int) -> None:
    """The newest step, restored by all or by none."""
    line.decide(Call("the choice of a step to restore"), lambda: number)
    line.share(Call(f"the restore from step {number}"))


ACTS: dict[str, Callable[[Job, int], Any]] = {
    "decide": lambda line, number: line.decide(Call("a decision", number), lambda: number),
    "share": lambda line, number: line.share(Call("a share", number)),
    "together": lambda line, number: line.together(Call("an agreement", number), _spec, lambda found: found),
    "collect": lambda line, number: line.collect(Call("a collection", number), _FILES),
    "a save": _save,
    "an opening": _open,
    "a restore": _restore,
}
_FILES = {f"d/{digest(str(n))}": [4096, 2**32 - 1] for n in range(3)}  # what a process may say of its part


def all_read_all(client: Any, index: int, number: int) -> None:
    """One agreement as the first version of ckptmgr had it: every process reads what every other has said."""
    prefix = f"ckptmgr/before/{number}"
    client.key_value_set(f"{prefix}/here/{index}", json.dumps([["an agreement", number], number, [None, ["0"]]]))
    client.wait_at_barrier(prefix, _LONG_S * 1000)
    for _, said in client.key_value_dir_get(f"{prefix}/here/"):
        json.loads(said)


# ---------------------------------------------------------------- one run with so many clients


class Turn(NamedTuple):
    """When a client began a call and when it had its answer; the clock is the same in all processes."""

    began: float
    ended: float


def measure_all(count: int, repeats: int, timeout_s: float) -> dict[str, Any]:
    """Seconds of each act of `count` clients, until the last has its answer, and of them the CPU of process 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    crowds = _crowds(count)
    gate = multiprocessing.get_context("forkserver").Barrier(len(crowds))
    argss = [(address, count, crowd, repeats, gate, timeout_s) for crowd in crowds]
    answers = fresh.call_group(_crowd, argss, timeout_s=timeout_s)
    return {name: _summary(count, [answer[name] for answer in answers]) for name in answers[0]}


def _crowds(count: int) -> list[range]:
    """Which clients share a process; the first has its own."""
    cuts = sorted({1 + (count - 1) * n // _CROWDS for n in range(_CROWDS + 1)})
    return [range(1), *(range(first, last) for first, last in itertools.pairwise(cuts))]


def _summary(count: int, crowds: Sequence[Sequence[tuple[list[Turn], float]]]) -> dict[str, Any]:
    rounds = []
    for together in zip(*crowds, strict=True):
        turns = [turn for crowd, _ in together for turn in crowd]
        took = max(turn.ended for turn in turns) - min(turn.began for turn in turns)
        rounds.append({"seconds": took, "cpu_of_0_s": together[0][1]})
    return {"count": count, **measure.summaries(rounds)}


def _crowd(
    address: str, count: int, indices: range, repeats: int, gate: Any, timeout_s: float
) -> dict[str, list[tuple[list[Turn], float]]]:
    """What the clients of one process see of every act, in each repetition."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each connection is an open file
    service = _jax.get_distributed_runtime_service(
        address, count, heartbeat_timeout=_LONG_S, shutdown_timeout=_LONG_S
    ) if 0 in indices else None  # fmt: skip
    clients = [
        _jax.get_distributed_runtime_client(address, index, init_timeout=_LONG_S, heartbeat_timeout=_LONG_S)
        for index in indices
    ]
    _all_at_once([client.connect for client in clients], gate)
    lines = [line_of(client, i, count, timeout_s) for client, i in zip(clients, indices, strict=True)]
    found: dict[str, list[tuple[list[Turn], float]]] = {}
    for name, number, acts in _schedule(lines, clients, indices, repeats):
        seen = _all_at_once(acts, gate)
        if number:  # the first makes connections
            found.setdefault(name, []).append(seen)
    _all_at_once([client.shutdown for client in clients], gate)
    gate.wait(timeout_s)  # a client that still watches the coordinator ends its process when that goes away
    if service is not None:
        service.shutdown()
    return found


def _schedule(
    lines: Sequence[Job], clients: Sequence[Any], indices: range, repeats: int
) -> Iterator[tuple[str, int, list[Callable[[], Any]]]]:
    for number in range(repeats + 1):
        for name, act in ACTS.items():
            yield name, number, [lambda line=line, act=act, n=number: act(line, n) for line in lines]
        yield "every process reads all", number, [
            lambda client=client, i=i, n=number: all_read_all(client, i, n)
            for client, i in zip(clients, indices, strict=True)
        ]  # fmt: skip


def _all_at_once(acts: Sequence[Callable[[], Any]], gate: Any) -> tuple[list[Turn], float]:
    """Calls each in a thread of its own, once all threads of all processes stand ready; also the CPU seconds.

    Raises what one of them raises.
    """
    cpu_s, turns, problems = [0.0], list[Turn](), list[BaseException]()

    def pass_gate() -> None:
        gate.wait(_LONG_S)
        cpu_s[0] = time.process_time()

    def run(act: Callable[[], Any]) -> None:
        ready.wait()
        began = time.monotonic()
        try:
            act()
        except BaseException as problem:
            problems.append(problem)
        turns.append(Turn(began, time.monotonic()))

    ready = threading.Barrier(len(acts), pass_gate)
    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return turns, time.process_time() - cpu_s[0]
