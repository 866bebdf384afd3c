"""Signals: SIGTERM ends the process once what was accepted is durable; a preemption is noticed and told."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from ckptmgr.processes import background


def drain_on_sigterm() -> None:
    """From now on SIGTERM, where nobody handles it, ends the process once what was accepted is durable."""
    is_main = threading.current_thread() is threading.main_thread()
    is_free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and not _jax_listens()
    if is_main and is_free:
        signal.signal(signal.SIGTERM, _end_when_drained)


def _end_when_drained(number: int, _: FrameType | None) -> None:
    """Waits in a thread: the interrupted code may hold a lock that what is waited for needs.

    Not in a `threading.Thread`, for the same reason.
    """
    signal.signal(number, signal.SIG_DFL)  # a second one ends it at once

    def finish() -> None:
        background.drain()
        os.kill(os.getpid(), number)

    _thread.start_new_thread(finish, ())


def _let_sigterm_end_a_fork() -> None:
    """A fork has accepted nothing, so SIGTERM need not wait. It must not: Python runs a handler between two steps
    of the main thread, and a fork may stand still in a library, at a lock that a thread of its parent held.
    """
    if signal.getsignal(signal.SIGTERM) is _end_when_drained:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_sigterm_end_a_fork)


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
