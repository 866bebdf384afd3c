"""Work that goes on after the call that started it, and is finished before the process ends."""

from __future__ import annotations

import _thread
import collections
import contextlib
import dataclasses
import logging
import math
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any, NoReturn

from ckptmgr.errors import CheckpointTimeoutError, SaveError

_log = logging.getLogger("ckptmgr")
CAN_OUTLIVE_MAIN = not (3, 12, 0) <= sys.version_info[:3] < (3, 12, 3)
"""Whether a save goes on after the end of the main thread. Orbax starts threads for it, and CPython 3.12.0 to
3.12.2 start none then: https://github.com/python/cpython/issues/113964"""
SLICE_S = 0.5
"""How often a wait checks that a thread still works on what it waits for. Waits count these slices."""

_INIT = 1
"""The number of the first process of a container."""


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
        with contextlib.suppress(IndexError):  # one that waits may have left meanwhile
            while self._waiting:
                self._waiting.popleft().release()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether the moment has come within these seconds. It polls too: `set` may be interrupted.

        Time in which this process was stopped does not count, but for a slice: slices are counted, not the clock.
        """
        left_s = math.inf if timeout_s is None else timeout_s
        own = threading.Lock()
        own.acquire()
        self._waiting.append(own)
        while not self._has_come and left_s > 0:
            own.acquire(timeout=min(SLICE_S, left_s))
            left_s -= SLICE_S
        with contextlib.suppress(ValueError):  # `set` has removed it
            self._waiting.remove(own)
        return self._has_come


@dataclasses.dataclass(eq=False)
class Task:
    """Accepted work. It is run once, and `ended` is called after it, whatever happened."""

    what: str
    """Its name in messages."""
    run: Callable[[], None]
    timeout_s: float
    about: Any = None
    ended: Callable[[BaseException | None], None] = lambda problem: None
    """Called with what `run` has raised, or None. Called again if an exception from outside interrupts it."""
    has_begun: bool = False
    problem: BaseException | None = None
    done: Moment = dataclasses.field(default_factory=Moment)


class Background:
    """Runs tasks in a thread, one after the other.

    A task is accepted at one point, `append`: an interrupt comes either before or after it. It stays in the queue
    until it is done. So if an exception ends the thread, the next thread finds the task; every wait starts a
    thread if none works. Callers wait for an event that the thread sets, never for the thread: in CPython 3.11
    and 3.12 Ctrl-C in a `join` marks a thread as ended although it is still running.
    """

    def __init__(self) -> None:
        self._accepted: collections.deque[Task] = collections.deque()
        self._works = threading.Lock()
        self._thread = threading.local()
        self._process = os.getpid()
        _backgrounds.add(self)

    def start(self, task: Task) -> None:
        """Starts a task once the tasks before it are done.

        A task that starts another one (a callback that saves, say) cannot wait for it: the other is run at once.
        """
        if self.is_current():
            _run(task)
            return
        self.wait()
        self.add(task)

    def add(self, task: Task) -> None:
        """Accepts a task; returns at once."""
        self._accepted.append(task)
        self._start_thread()  # even if one works: it may already have found the queue empty

    def waiting(self) -> list[Task]:
        """The tasks that are not done, in order."""
        return [task for task in _copy(self._accepted) if not task.done.is_set()]

    def _start_thread(self) -> None:
        """Starts a thread. It waits until no other thread works.

        It is no `threading.Thread`: its `start` waits for the new thread in Python code, where Ctrl-C leaves locks
        held. It also takes locks, which code that is interrupted by a signal handler may hold already.
        """
        try:
            _thread.start_new_thread(self._work, ())
        except RuntimeError:  # too many threads, or, in CPython 3.12.0 to 3.12.2, after the end of the main thread
            if not self.is_current():
                self._work()

    def _work(self) -> None:
        try:
            with self._works:
                self._thread.is_ours = True
                while self._accepted:
                    _run(self._accepted[0])
                    self._accepted.popleft()
        except BaseException:  # raised into the thread from outside, say; the next wait starts another thread
            _log.exception("the thread that writes checkpoints was interrupted; another thread goes on")
        finally:
            self._thread.is_ours = False

    def is_current(self) -> bool:
        """Whether the caller is a task itself (a callback, say): it must not wait for itself."""
        return getattr(self._thread, "is_ours", False)

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until all tasks accepted so far are done; the bound of each is `timeout_s`, or its own."""
        for task in [] if self.is_current() else self.waiting():
            limit_s = task.timeout_s if timeout_s is None else timeout_s
            if not self.wait_for(task.done, limit_s):
                raise CheckpointTimeoutError(f"{task.what} took longer than {limit_s} s", waiting_for=task.what)

    def wait_for(self, moment: Moment, timeout_s: float) -> bool:
        """Whether a moment that a task sets has come within these seconds, counted as in `Moment.wait`."""
        if not moment.is_set() and self._process != os.getpid():
            raise SaveError(
                f"this process was forked from process {self._process}, which saves; wait for the save there",
                step=None,
            )
        left_s = timeout_s
        while not moment.is_set() and self.waiting():
            if not self._works.locked():  # an interrupt has ended the thread, or came before it was started
                self._start_thread()
            if not moment.wait(min(SLICE_S, left_s)) and left_s <= SLICE_S:
                break
            left_s -= SLICE_S
        return moment.is_set()

    def forget(self) -> None:
        """In a forked child, which has no threads: the tasks are the parent's."""
        self._accepted.clear()
        self._works = threading.Lock()
        self._thread = threading.local()


_backgrounds: weakref.WeakSet[Background] = weakref.WeakSet()


def _run(task: Task) -> None:
    """Runs a task, unless an interrupted thread has begun it before, and ends it."""
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
    """A copy of a queue to which other threads may add meanwhile."""
    while True:
        try:
            return list(queue)
        except RuntimeError:  # another thread has changed the queue
            continue


def _forget() -> None:
    global _is_ending
    _is_ending = False
    for background in _copy(_backgrounds):
        background.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# ---------------------------------------------------------------- the end of the process


def _unfinished() -> list[tuple[Background, Task]]:
    return [(each, task) for each in _copy(_backgrounds) for task in each.waiting()]


_is_ending = False
"""Whether a signal ends the process as soon as every accepted save is durable."""


def end_now(number: int, _: FrameType | None = None) -> NoReturn:
    """Ends the process by a signal that has its default action. Call `end_at_next` before.

    The system ignores such a signal in the first process of a container (process 1 of a PID namespace). There the
    process ends with the status that a shell gives for the signal.
    """
    if os.getpid() != _INIT:
        os.kill(os.getpid(), number)
        time.sleep(SLICE_S)
    os._exit(128 + number)


def end_at_next(number: int) -> None:
    """From now on such a signal ends the process at once."""
    signal.signal(number, end_now if os.getpid() == _INIT else signal.SIG_DFL)


def hold_if_ending() -> None:
    """Does not return if a signal is ending the process, which ends only if no more is saved. Hold no lock here.

    Returns in a task (a callback, say): the end of the process waits for the task.
    """
    while _is_ending and not any(each.is_current() for each in _copy(_backgrounds)):
        time.sleep(SLICE_S)


def begin_to_end(number: int) -> None:
    """Ends the process by a signal once every accepted task is done; returns at once. A second one ends it then.

    Waits in a new thread: the interrupted code may hold a lock that the unfinished saves need. It is no
    `threading.Thread`: its `start` takes locks too.
    """

    def finish() -> None:
        try:
            drain()
        finally:
            end_now(number)

    global _is_ending
    _is_ending = True
    end_at_next(number)
    try:
        _thread.start_new_thread(finish, ())
    except RuntimeError:  # too many threads
        finish()


def drain() -> None:
    """Waits until every accepted task is done, and every task that these add. Each wait has its bound."""
    given_up: set[Task] = set()
    while left := [each for each in _unfinished() if each[1] not in given_up]:
        background, task = left[0]
        if not background.wait_for(task.done, task.timeout_s):
            _log.error("%s took longer than %s s; the process ends without it", task.what, task.timeout_s)
            given_up.update(background.waiting())


def drain_at_exit() -> None:
    """Drains at the end of the main thread. Ctrl-C prints what is waited for; a second Ctrl-C ends the process."""
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
    end_at_next(number)
    what = ", ".join(task.what for _, task in _unfinished())
    said = f"ckptmgr waits for {what}; press Ctrl-C again to end without it\n"
    with contextlib.suppress(OSError):
        os.write(2, said.encode())  # the handler may interrupt a write to sys.stderr


# A plain atexit hook is too late: by then Python has shut the executors that Orbax writes with, and the
# save is lost. This hook runs when the main thread ends. Of such hooks the last registered runs first,
# so the executors', which is registered when they are imported, must have been registered by now.
assert ThreadPoolExecutor.__module__ == "concurrent.futures.thread"
threading._register_atexit(drain_at_exit)  # type: ignore[attr-defined]
