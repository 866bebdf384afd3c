"""Work that outlives the call that started it: finished before the script ends, or SIGTERM ends it."""

from __future__ import annotations

import _thread
import collections
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

from ckptmgr.errors import CheckpointTimeoutError, SaveError

_log = logging.getLogger("ckptmgr")
CAN_OUTLIVE_MAIN = not (3, 12, 0) <= sys.version_info[:3] < (3, 12, 3)
"""Whether a save goes on after the end of the main thread. Orbax starts threads for it, and CPython 3.12.0 to
3.12.2 start none then: https://github.com/python/cpython/issues/113964"""
_SLICE_S = 0.5
"""How long a wait goes on before it looks whether what it waits for still goes on."""


class Moment:
    """An event that is set once. Ctrl-C in a thread that waits for it does not stop the thread that sets it.

    With `threading.Event` and futures it may: their lock is taken in Python code (`Condition.__enter__`). If
    Ctrl-C comes there, the lock stays held, and the thread that sets the event waits for ever. Here each waiting
    thread has a lock of its own.
    """

    def __init__(self) -> None:
        self._has_come = False
        self._waiting: collections.deque[threading.Lock] = collections.deque()

    def is_set(self) -> bool:
        return self._has_come

    def set(self) -> None:
        self._has_come = True
        while self._waiting:
            self._waiting.popleft().release()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it has come within these seconds. It looks now and then: `set` may be interrupted too."""
        ends = None if timeout_s is None else time.monotonic() + timeout_s
        own = threading.Lock()
        own.acquire()
        self._waiting.append(own)
        while not self._has_come:
            left_s = _SLICE_S if ends is None else min(ends - time.monotonic(), _SLICE_S)
            if left_s <= 0:
                break
            own.acquire(timeout=left_s)
        with contextlib.suppress(ValueError):  # `set` has taken it
            self._waiting.remove(own)
        return self._has_come


@dataclasses.dataclass(eq=False)
class Task:
    """Something that was accepted. It is run once, and `ended` is called after it, whatever happened in it."""

    what: str
    """What it is called in a timeout."""
    run: Callable[[], None]
    timeout_s: float
    about: Any = None
    ended: Callable[[BaseException | None], None] = lambda problem: None
    """Given what `run` has raised. Called again if an exception from outside interrupts it."""
    has_begun: bool = False
    problem: BaseException | None = None
    done: Moment = dataclasses.field(default_factory=Moment)


class Background:
    """Runs one task after the other beside their callers.

    A task is accepted at one point, `append`: an interrupt comes before it or after it. It is left in the queue
    until it is done, so a thread that an exception ends leaves it to the next one, which every wait starts. The
    callers wait for an event that the thread sets, never for the thread: in CPython 3.11 and 3.12 Ctrl-C in a
    `join` marks a thread as ended that is still running.
    """

    def __init__(self) -> None:
        self._accepted: collections.deque[Task] = collections.deque()
        self._works = threading.Lock()
        self._thread = threading.local()
        self._process = os.getpid()
        _backgrounds.add(self)

    def start(self, task: Task) -> None:
        """Starts a task once those before it are done.

        A task that starts another (a callback that saves, say) cannot wait for it: the other is run at once.
        """
        if self.is_current():
            _run(task)
            return
        self.wait()
        self.add(task)

    def add(self, task: Task) -> None:
        """Accepts a task; returns at once."""
        self._accepted.append(task)
        self._start_thread()  # also if one works: it may have looked for the last time

    def waiting(self) -> list[Task]:
        """The tasks that are not done, in order."""
        return [task for task in _copy(self._accepted) if not task.done.is_set()]

    def _start_thread(self) -> None:
        """Starts a thread, which waits until no other works.

        Not a `threading.Thread`: its `start` waits for the new thread in Python code, where Ctrl-C leaves locks
        behind, and it takes locks that a signal handler, or the garbage collector, may find taken.
        """
        try:
            _thread.start_new_thread(self._work, ())
        except RuntimeError:  # too many, or, in CPython 3.12.0 to 3.12.2, after the end of the main thread
            if not self.is_current():
                self._work()

    def _work(self) -> None:
        try:
            with self._works:
                self._thread.is_ours = True
                while self._accepted:
                    _run(self._accepted[0])
                    self._accepted.popleft()
        except Exception:  # from outside of the thread; whoever waits starts another
            _log.exception("the thread that saves was interrupted, and another goes on")
        finally:
            self._thread.is_ours = False

    def is_current(self) -> bool:
        """Whether the caller is a task itself (a callback of it, say), which must not wait for itself."""
        return getattr(self._thread, "is_ours", False)

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until what was accepted so far is done; at most so long, or as long as its manager allows."""
        for task in [] if self.is_current() else self.waiting():
            limit_s = task.timeout_s if timeout_s is None else timeout_s
            if not self.wait_for(task.done, limit_s):
                raise CheckpointTimeoutError(f"{task.what} took longer than {limit_s} s", waiting_for=task.what)

    def wait_for(self, moment: Moment, timeout_s: float) -> bool:
        """Whether a moment that a task sets has come within these seconds."""
        if not moment.is_set() and self._process != os.getpid():
            raise SaveError(f"process {self._process} saves, and this one was forked from it", step=None)
        ends = time.monotonic() + timeout_s
        while not moment.is_set() and self.waiting():
            if not self._works.locked():  # an interrupt came before a thread was started, or has ended it
                self._start_thread()
            if not moment.wait(min(_SLICE_S, ends - time.monotonic())) and time.monotonic() >= ends:
                break
        return moment.is_set()

    def forget(self) -> None:
        """In a forked child: its threads are the parent's alone."""
        self._accepted.clear()
        self._works = threading.Lock()
        self._thread = threading.local()


_backgrounds: weakref.WeakSet[Background] = weakref.WeakSet()


def _run(task: Task) -> None:
    """Runs a task unless an interrupted thread had begun it, and ends it."""
    try:
        if not task.has_begun:
            task.has_begun = True
            task.run()
    except BaseException as problem:
        task.problem = problem
        _log.exception("%s failed", task.what)
    finally:
        task.ended(task.problem)
        task.done.set()


def _copy(queue: Iterable[Any]) -> list[Any]:
    """What is in a queue to which other threads may add meanwhile."""
    while True:
        try:
            return list(queue)
        except RuntimeError:  # it did
            continue


def _forget() -> None:
    for background in _copy(_backgrounds):
        background.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# ---------------------------------------------------------------- the end of the process


def _unfinished() -> list[tuple[Background, Task]]:
    return [(each, task) for each in _copy(_backgrounds) for task in each.waiting()]


def drain() -> None:
    """Waits until nothing that was accepted is left, also what follows from it; each wait has its bound."""
    given_up: set[Task] = set()
    while left := [each for each in _unfinished() if each[1] not in given_up]:
        background, task = left[0]
        if not background.wait_for(task.done, task.timeout_s):
            _log.error("%s took longer than %s s, and the process ends without it", task.what, task.timeout_s)
            given_up.update(background.waiting())


def drain_at_exit() -> None:
    """The same at the end of the main thread. Ctrl-C is told what is waited for; the second one there ends it."""
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_default or threading.current_thread() is not threading.main_thread():
        drain()
        return
    signal.signal(signal.SIGINT, _warn_first)
    try:
        drain()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _warn_first(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    what = ", ".join(task.what for _, task in _unfinished())
    said = f"ckptmgr waits for {what}; press Ctrl-C again to end without it\n"
    with contextlib.suppress(OSError):
        os.write(2, said.encode())  # a handler may interrupt the stream of the log


# A plain atexit hook is too late: by then Python has shut the executors that Orbax writes with, and the
# save is lost. This hook runs when the main thread ends. Of such hooks the last registered runs first,
# so the executors', which is registered when they are imported, must have been registered by now.
assert ThreadPoolExecutor.__module__ == "concurrent.futures.thread"
threading._register_atexit(drain_at_exit)  # type: ignore[attr-defined]
