"""Runs a function in a fresh process: nothing measured before leaves memory, threads or devices behind.

The processes are forked from a server that has imported the libraries and used none of them: a fresh
process for each peer and workload then costs milliseconds instead of the seconds that torch takes to import.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["benchmarks.preload"])
_DEVICES = "--xla_force_host_platform_device_count"


class FailedError(RuntimeError):
    """The function raised, its process died, or it took too long; the message says which."""


class Running:
    """A function that runs in a process of its own, with `devices` CPU devices."""

    def __init__(
        self, function: Callable[..., Any], args: Sequence[Any], *, devices: int = 1, quiet: bool = False
    ) -> None:
        self._what = f"{function.__module__}.{function.__name__}"
        self.answer, theirs = _context.Pipe(duplex=False)
        self._process = _context.Process(target=_run, args=(theirs, environment(devices), quiet, function, args))
        self._process.start()
        theirs.close()  # so that the answer ends when the process does

    def result(self, timeout_s: float) -> Any:
        """What the function returned; raises FailedError."""
        try:
            if not self.answer.poll(timeout_s):
                raise FailedError(f"{self._what} took longer than {timeout_s:.0f} s")
            succeeded, value = self.answer.recv()
        except EOFError:
            self._process.join()
            raise FailedError(f"{self._what}: its process died, exit code {self._process.exitcode}") from None
        finally:
            self.stop()
        if not succeeded:
            raise FailedError(f"{self._what} failed\n{value}")
        return value

    def stop(self, patience_s: float = 5) -> None:
        """Ends the process, by force if it does not end by itself."""
        self._process.join(patience_s)
        self._process.kill()
        self._process.join()


def call(function: Callable[..., Any], *args: Any, devices: int = 1, timeout_s: float = 3600) -> Any:
    """`function(*args)` in a fresh process."""
    running = Running(function, args, devices=devices)
    try:
        return running.result(timeout_s)
    finally:
        running.stop(0)


def call_group(function: Callable[..., Any], argss: Sequence[Sequence[Any]], *, timeout_s: float) -> list[Any]:
    """`function` in one process for each of `argss`, all at the same time; one that fails ends them all.

    What they print goes nowhere: gloo announces every connection, and background threads of a process that
    is ended write pages of tracebacks.
    """
    group = [Running(function, args, quiet=True) for args in argss]
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    try:
        while len(results) < len(group):
            waiting = {group[i].answer: i for i in range(len(group)) if i not in results}
            ready = multiprocessing.connection.wait(waiting, timeout=max(0, deadline - time.monotonic()))
            if not ready:
                raise FailedError(f"{len(waiting)} of {len(group)} processes took longer than {timeout_s:.0f} s")
            for answer in ready:
                results[waiting[answer]] = group[waiting[answer]].result(timeout_s)
        return [results[i] for i in range(len(group))]
    finally:
        for running in group:
            running.stop(0)


def environment(devices: int) -> Mapping[str, str]:
    """The number of CPU devices, whatever the caller's own environment asks for."""
    flags = re.sub(rf"{_DEVICES}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    return {"XLA_FLAGS": f"{flags} {_DEVICES}={devices}".strip(), "TF_CPP_MIN_LOG_LEVEL": "3"}


def _run(
    answer: Any, environment: Mapping[str, str], quiet: bool, function: Callable[..., Any], args: Sequence[Any]
) -> None:
    os.environ.update(environment)
    if quiet:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    try:
        outcome = (True, function(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    answer.send(outcome)
    answer.close()
    if not outcome[0]:
        os._exit(1)  # a library that failed may have threads that never end
