"""An exception at each moment of a call, one after the other: `moments.py DIRECTORY EVERY FIRST [CALL ...]`.

A moment is a place where CPython may run a signal handler or deliver an exception of another thread: where a
function begins, after each call, and where a loop goes back (`eval_breaker` in its ceval.c). They are found by
tracing the bytecode of ckptmgr, and of the standard library's threads and context managers under it. Nothing is
raised between a lock that `with` has taken and the block: CPython does not do that either. Nor between the last
call of the block and the release: what comes after a call is raised as if the call had raised it.

Each time the arrays are overwritten afterwards, as a program may do that catches Ctrl-C, and the manager is used
again. At the end every save that was accepted must be there, and every listed step what was given to its call.
"""

import contextlib
import dis
import faulthandler
import functools
import itertools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import guard
import numpy as np

import ckptmgr
from ckptmgr.format import names
from ckptmgr.processes import background

guard.install()

PACKAGE = os.path.dirname(ckptmgr.__file__)
LIBRARY = [
    os.path.join(os.path.dirname(os.__file__), name)
    for name in ("threading", "queue", "contextlib", "concurrent", "weakref")
]
BOUND_S = 60
LEAST = 100  # moments of a thread that writes: there are thousands
OPEN = "import sys, ckptmgr\nfor run in sys.argv[1:]: ckptmgr.CheckpointManager(run).close()"


@functools.cache
def moments(code):
    """The offsets of the bytecode at which an exception may come from outside."""
    steps = list(dis.get_instructions(code))
    begin = {step.offset for step in steps if step.opname in ("RESUME", "JUMP_BACKWARD")}
    handlers = _handlers(code)
    called = {
        after.offset
        for before, after in itertools.pairwise(steps)
        if _is_call(before.opname) and handlers(before.offset) == handlers(after.offset)
    }
    return begin | called


def _handlers(code):
    """Gives what handles an exception at an offset of the bytecode."""
    entries = dis.Bytecode(code).exception_entries
    return lambda offset: next((each.target for each in entries if each.start <= offset < each.end), None)


def _is_call(name):
    return name.startswith("CALL") and not name.startswith("CALL_INTRINSIC")


class Interrupt:
    """Raises at the `turn`-th moment of the thread in which it is installed."""

    def __init__(self, turn, kind):
        self.turn, self.kind, self.seen, self.where = turn, kind, 0, None

    def __enter__(self):
        sys._getframe().f_trace_opcodes = True  # CPython 3.12 reports opcodes if a frame asked before settrace
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _enter(self, frame, event, _):
        name = frame.f_code.co_filename
        is_called_by_us = name.startswith(tuple(LIBRARY)) and frame.f_back and frame.f_back.f_trace
        if not name.startswith(PACKAGE) and not is_called_by_us:
            return None  # asyncio, say, keeps exceptions to itself
        frame.f_trace = self._step  # CPython 3.13 looks at f_trace_opcodes only if this is set before it
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step(frame, event, None)  # RESUME, where the function begins, is reported as the call

    def _step(self, frame, event, _):
        if event in ("call", "opcode") and frame.f_lasti in moments(frame.f_code):
            self.seen += 1
            if self.seen == self.turn:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}"
                sys.settrace(None)
                raise self.kind(f"at {self.where}")
        return self._step


def values(step):
    return {f"w{place}": np.full(300, step * 10 + place, np.float64) for place in range(3)}


class Run:
    """One run in which one call is interrupted."""

    def __init__(self, directory, options):
        self.directory, self.accepted, self.given = directory, set(), {}
        self.keeps_one = "keep" in options
        self.may_fail = False  # what was accepted: then it must be said
        self.manager = ckptmgr.CheckpointManager(directory, timeout_s=20, **options)

    def save(self, step, **how):
        self.given[step] = values(step)
        try:
            result = self.manager.save(step, self.given[step], **how)
            if result:
                self.accepted.add(step)
            return result
        finally:
            self.overwrite()

    def overwrite(self):
        for params in self.given.values():
            for array in params.values():
                array[...] = -1

    def go_on(self):
        """Saves once more, waits and closes; what was not accepted may be said to have failed."""
        self.bear(lambda: self.save(9))
        self.bear(self.manager.wait)
        self.bear(self.manager.close)

    def bear(self, call):
        try:
            call()
        except ckptmgr.SaveError as problem:
            if problem.step in self.accepted and not self.may_fail:
                raise
            self.accepted.discard(problem.step)
            if problem.step != 9 or "closed" not in str(problem):
                with contextlib.suppress(ckptmgr.CheckpointExistsError):  # the exception came after the commit
                    call()

    def check(self):
        reader = ckptmgr.CheckpointManager(self.directory, read_only=True)
        listed = set(reader.steps())
        self.accepted = {max(self.accepted)} if self.keeps_one else self.accepted
        assert self.accepted <= listed, f"lost {self.accepted - listed} of {self.accepted}"
        for step in listed:
            found = reader.restore(step, layout=ckptmgr.HOST).params
            assert all((found[name] == array).all() for name, array in values(step).items()), f"{step} is another"
        held = list(Path(self.directory).rglob(os.path.basename(names.LOCK)))
        assert not held, f"{held} is still held"


# Each: the options of the manager, what is saved before, and the call that is interrupted.
HOST = {"layout": ckptmgr.HOST}
CALLS: dict[str, tuple[dict, tuple, Callable]] = {
    "save": ({}, (1,), lambda run: run.save(2)),
    "save in waves": ({"max_host_bytes": 3000}, (1,), lambda run: run.save(2)),
    "save behind one": ({}, (0, 1), lambda run: run.save(2)),
    "save at once": ({"asynchronous": False}, (1,), lambda run: run.save(2)),
    "save and delete": ({"keep": 1}, (), lambda run: run.save(2)),
    "wait": ({}, (0, 1), lambda run: run.manager.wait()),
    "result": ({}, (1,), lambda run: run.save(2).result()),
    "restore": ({}, (1,), lambda run: run.manager.restore(**HOST)),
    "restore_or": ({}, (1,), lambda run: run.manager.restore_or(params=values(0), **HOST)),
    "close": ({}, (0, 1), lambda run: run.manager.close()),
    "exit": ({}, (1,), lambda run: run.manager.__exit__(None, None, None)),
    "delete": ({}, (0, 1), lambda run: (run.accepted.discard(0), run.manager.delete(0))),
    "pin": ({}, (1,), lambda run: run.manager.pin(1)),
    "unpin": ({}, (1,), lambda run: run.manager.unpin(1)),
    "look": ({}, (1,), lambda run: [run.manager.steps(), run.manager.infos(), run.manager.info(1)]),
    "verify": ({}, (1,), lambda run: run.manager.verify(1)),
    "pin beside a mirror": ({"mirror": True}, (1,), lambda run: run.manager.pin(1)),
    "wait for a mirror": ({"mirror": True}, (1,), lambda run: run.manager.wait()),
}  # fmt: skip
WORKER = {"the thread of a save": {}, "the thread of a save in waves": {"max_host_bytes": 3000},
          "the thread of a save that deletes": {"keep": 1}}  # fmt: skip


# CPython 3.12.1 sometimes ends with a segmentation fault where threads trace.
EVERY = [*CALLS, *(() if sys.version_info[:2] == (3, 12) else WORKER)]


def begin(directory, options):
    options = {name: directory + "-away" if name == "mirror" else value for name, value in options.items()}
    return Run(directory, options)


def interrupt_call(directory, name, turn):
    """Interrupts the caller's thread. Returns where, or None if the call was over before."""
    options, before, call = CALLS[name]
    run = begin(directory, options)
    for step in before:
        run.save(step)
    interrupt = Interrupt(turn, KeyboardInterrupt)
    with contextlib.suppress(KeyboardInterrupt), interrupt:
        call(run)
    run.overwrite()
    run.go_on()
    run.check()
    return interrupt.where


def interrupt_worker(directory, name, turn):
    """Interrupts the thread that writes, with MemoryError."""
    run, interrupt = begin(directory, WORKER[name]), Interrupt(turn, MemoryError)
    run.save(1).result()
    run.manager.wait()
    work, tracing = background.Background._work, threading.RLock()

    def traced(self):
        """Whichever thread does the work; in turns, as CPython 3.12 does not bear two that begin to trace."""
        with tracing, interrupt:
            work(self)

    background.Background._work = traced
    try:
        run.bear(lambda: run.save(2))
        run.may_fail = True
        run.bear(run.manager.wait)
    finally:
        background.Background._work = work
    run.go_on()
    run.check()
    if interrupt.where is None and interrupt.seen < LEAST:  # a thread of the save before has written this one too
        return interrupt_worker(f"{directory} again", name, turn)
    return interrupt.where


def each_moment(directory, name, every, first):
    """Interrupts one call at every `every`-th moment; returns the runs."""
    once, runs = interrupt_worker if name in WORKER else interrupt_call, []
    for turn in itertools.count(first + 1, every * (4 if name in WORKER else 1)):
        faulthandler.dump_traceback_later(BOUND_S, exit=True)
        run = os.path.join(directory, f"{name} {turn}")
        try:
            where = once(run, name, turn)
        except BaseException:
            print(f"{name}, moment {turn}", file=sys.stderr)
            raise
        if where is None:
            break
        runs.append(run)
    faulthandler.cancel_dump_traceback_later()
    return runs


def main(directory, every, first, *names):
    logging.getLogger("ckptmgr").setLevel(logging.CRITICAL)
    runs = {name: each_moment(directory, name, int(every), int(first)) for name in names or EVERY}
    some = [run for found in runs.values() for run in found[-2:]]
    subprocess.run([sys.executable, "-c", OPEN, *some], check=True, timeout=120)
    for name, found in runs.items():
        print(len(found), "interrupts of", name)


if __name__ == "__main__":
    main(*sys.argv[1:])
