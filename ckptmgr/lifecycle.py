"""Work that outlives the call that started it: finished before the script ends, or SIGTERM ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

from ckptmgr.errors import CheckpointTimeoutError

_running: weakref.WeakSet[Background] = weakref.WeakSet()


class Background:
    """Runs one task at a time in a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._what = ""
        _running.add(self)

    def start(self, what: str, task: Callable[[], None]) -> None:
        """Starts `task` once the one before it is done; `what` names it in a timeout."""
        self.wait(None)
        self._what = what
        self._thread = threading.Thread(target=task, name=f"ckptmgr: {what}")
        self._thread.start()

    def is_current(self) -> bool:
        """Whether the caller is the task itself (a callback of it, say), which must not wait for itself."""
        return self._thread is threading.current_thread()

    def wait(self, timeout_s: float | None) -> None:
        """Waits until nothing runs."""
        thread = self._thread
        if thread is None or self.is_current():
            return
        thread.join(timeout_s)
        if thread.is_alive():
            raise CheckpointTimeoutError(f"{self._what} took longer than {timeout_s} s", waiting_for=self._what)


def _drain() -> None:
    for background in list(_running):
        background.wait(None)


# A plain atexit hook is too late: by then Python has shut the executors that Orbax writes with, and the
# save is lost. This hook runs when the main thread ends. Of such hooks the last registered runs first,
# so the executors', which is registered when they are imported, must have been registered by now.
assert ThreadPoolExecutor.__module__ == "concurrent.futures.thread"
threading._register_atexit(_drain)  # type: ignore[attr-defined]


# ---------------------------------------------------------------- signals


def drain_on_sigterm() -> None:
    """From now on SIGTERM, where nobody handles it, ends the process once what was accepted is durable."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end_when_drained)


def _end_when_drained(number: int, _: FrameType | None) -> None:
    """Waits in a thread: the interrupted code may hold a lock that what is waited for needs."""
    signal.signal(number, signal.SIG_DFL)  # a second one ends it at once

    def finish() -> None:
        _drain()
        os.kill(os.getpid(), number)

    threading.Thread(target=finish, name="ckptmgr: finishing before SIGTERM", daemon=True).start()


class Preemption:
    """Whether this process has been told to stop, and whether a step was declined before it knew."""

    def __init__(self) -> None:
        self.signalled = False
        self._guarded = False
        self._declined = False

    def is_due(self, decided: bool) -> bool:
        """What becomes of a decision whether to save: after a signal every step in the guard is saved."""
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
        before: dict[int, Any] = {}

        def handle(number: int, frame: FrameType | None) -> None:
            previous = before[number]
            if self.signalled:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self.signalled = True
            if callable(previous) and previous not in (_end_when_drained, signal.default_int_handler):
                previous(number, frame)

        self.signalled, self._guarded, self._declined = False, True, False
        before |= {number: signal.getsignal(number) for number in signals}
        try:
            for number in signals:
                signal.signal(number, handle)
            yield
        finally:
            self._guarded = False
            for number, previous in before.items():
                signal.signal(number, signal.SIG_DFL if previous is None else previous)
