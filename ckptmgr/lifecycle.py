"""Work that outlives the call that started it: finished before the script ends, or SIGTERM ends it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from ckptmgr.errors import CheckpointTimeoutError

_log = logging.getLogger("ckptmgr")
_running: weakref.WeakSet[Background] = weakref.WeakSet()


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
        """Whether it has come within these seconds."""
        own = threading.Lock()
        own.acquire()
        self._waiting.append(own)
        if not self._has_come:  # else `set` may have looked before
            own.acquire(timeout=-1 if timeout_s is None else min(max(timeout_s, 0), threading.TIMEOUT_MAX))
        return self._has_come


class Outcome(Moment):
    """The result of a task: `value` or `failure`, once it is set."""

    value: Any = None
    failure: Exception | None = None


class Background:
    """Runs one task at a time beside its caller; `timeout_s` bounds every wait for it.

    The callers wait for an event that the task's thread sets, never for the thread: in CPython 3.11 and 3.12
    Ctrl-C in a `join` marks a thread as ended that is still running. A task is accepted at one point, `append`: an
    interrupt comes before it or after it.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._accepted: collections.deque[_Task] = collections.deque()
        self._works = threading.Lock()
        self._worker: int | None = None
        _running.add(self)

    def start(self, what: str, run: Callable[[], None], about: Any = None) -> None:
        """Starts a task once the one before it is done; `what` names it in a timeout.

        A task that starts another (a callback that saves, say) cannot wait for it: the other is run at once.
        """
        if self.is_current():
            run()
            return
        self.wait()
        self._accepted.append(_Task(what, run, about))
        self._start_thread()

    @property
    def about(self) -> Any:
        """What the task that runs is about, as `start` was told; None if none does."""
        return next((task.about for task in tuple(self._accepted)), None)

    def _start_thread(self) -> None:
        what = next((task.what for task in tuple(self._accepted)), "nothing")
        threading.Thread(target=self._work, name=f"ckptmgr: {what}", daemon=True).start()

    def _work(self) -> None:
        with self._works:
            self._worker = threading.get_ident()
            try:
                while self._accepted:
                    self._run(self._accepted[0])
            finally:
                self._worker = None

    def _run(self, task: _Task) -> None:
        try:
            task.run()
        except BaseException:
            _log.exception("%s failed", task.what)
        finally:
            self._accepted.popleft()
            task.done.set()

    def is_current(self) -> bool:
        """Whether the caller is the task itself (a callback of it, say), which must not wait for itself."""
        return bool(self._accepted) and self._worker == threading.get_ident()

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until nothing runs."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        if self.is_current():
            return
        for task in tuple(self._accepted):
            if not self._works.locked():  # an interrupt came between `append` and the start of a thread
                self._start_thread()
            if not task.done.wait(timeout_s):
                raise CheckpointTimeoutError(f"{task.what} took longer than {timeout_s} s", waiting_for=task.what)

    def forget(self) -> None:
        """In a forked child: its threads are the parent's alone."""
        self._accepted.clear()
        self._works = threading.Lock()


@dataclasses.dataclass(frozen=True, eq=False)
class _Task:
    what: str
    run: Callable[[], None]
    about: Any
    done: Moment = dataclasses.field(default_factory=Moment)


def _forget() -> None:
    for background in list(_running):
        background.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _drain() -> None:
    for background in list(_running):
        try:
            background.wait()
        except CheckpointTimeoutError as problem:
            _log.error("%s, and the process ends without it", problem)


# A plain atexit hook is too late: by then Python has shut the executors that Orbax writes with, and the
# save is lost. This hook runs when the main thread ends. Of such hooks the last registered runs first,
# so the executors', which is registered when they are imported, must have been registered by now.
assert ThreadPoolExecutor.__module__ == "concurrent.futures.thread"
threading._register_atexit(_drain)  # type: ignore[attr-defined]


# ---------------------------------------------------------------- signals


def drain_on_sigterm() -> None:
    """From now on SIGTERM, where nobody handles it, ends the process once what was accepted is durable."""
    is_main = threading.current_thread() is threading.main_thread()
    is_free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and not _jax_listens()
    if is_main and is_free:
        signal.signal(signal.SIGTERM, _end_when_drained)


def _end_when_drained(number: int, _: FrameType | None) -> None:
    """Waits in a thread: the interrupted code may hold a lock that what is waited for needs."""
    signal.signal(number, signal.SIG_DFL)  # a second one ends it at once

    def finish() -> None:
        _drain()
        os.kill(os.getpid(), number)

    threading.Thread(target=finish, name="ckptmgr: finishing before SIGTERM", daemon=True).start()


def _jax_listens() -> bool:
    """Whether JAX takes SIGTERM itself (below Python, which does not know), to tell all processes of a job."""
    is_on = bool(jax.config.jax_enable_preemption_service)  # type: ignore[attr-defined]
    return is_on and jax.distributed.is_initialized()


class Preemption:
    """Whether this process has been told to stop, and whether a step was declined before it knew.

    In a job of several processes they are to stop at the same step: JAX spreads the news of SIGTERM, and
    names the moment by a counter that every process counts up, here with each step that is asked about.
    https://docs.jax.dev/en/latest/_autosummary/jax.experimental.multihost_utils.reached_preemption_sync_point.html
    """

    def __init__(self) -> None:
        self.signalled = False
        self._guarded = False
        self._declined = False
        self._asked: int | None = None
        self._count = 0

    def is_due(self, step: int, decided: bool) -> bool:
        """What becomes of a decision whether to save: after a signal every step in the guard is saved."""
        if self._guarded and _jax_listens() and step != self._asked:
            self._asked, self._count = step, self._count + 1
            self.signalled |= multihost_utils.reached_preemption_sync_point(self._count)
        self._declined = not (decided or (self.signalled and self._guarded))
        return not self._declined

    @property
    def reached(self) -> bool:
        """Whether to stop now. Not yet if a signal came after the newest step was declined: the next is saved."""
        return self.signalled and not self._declined

    @contextlib.contextmanager
    def guard(self, signals: Sequence[int]) -> Iterator[None]:
        """Takes the signals; at the end they go back to those who had them."""
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("preemption_guard takes signals, which Python delivers to the main thread alone")
        taken = [number for number in signals if number != signal.SIGTERM or not _jax_listens()]
        before: dict[int, Any] = {number: signal.getsignal(number) for number in taken}

        def handle(number: int, frame: FrameType | None) -> None:
            previous = before[number]
            if self.signalled:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            if _jax_listens():
                os.kill(os.getpid(), signal.SIGTERM)  # so that the other processes hear of it too
            else:
                self.signalled = True
            if callable(previous) and previous not in (_end_when_drained, signal.default_int_handler):
                previous(number, frame)

        self.signalled, self._guarded, self._declined = False, True, False
        try:
            for number in taken:
                signal.signal(number, handle)
            yield
        finally:
            self._guarded = False
            for number, previous in before.items():
                signal.signal(number, signal.SIG_DFL if previous is None else previous)
