"""Signals: SIGTERM ends the process once accepted saves are durable; in a guard it makes the next save happen."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from ckptmgr.processes import background

_outside: dict[int, Any] = {}
"""The handlers from before the outermost guard, of the signals that are guarded now."""
_late: set[int] = set()
"""The signals that came in a guard, of which nobody has been told: no save and no question came after."""


def drain_on_sigterm() -> None:
    """Unless SIGTERM has a handler: from now on it ends the process once every accepted save is durable."""
    is_main = threading.current_thread() is threading.main_thread()
    is_free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and not _jax_listens()
    if is_main and is_free:
        signal.signal(signal.SIGTERM, _end_when_drained)


def _end_when_drained(number: int, _: FrameType | None) -> None:
    background.begin_to_end(number)


_OURS = (_end_when_drained, background.end_now)
"""The handlers outside of guards."""


def _let_sigterm_end_a_fork() -> None:
    """A fork has accepted nothing, so SIGTERM need not wait. It must not: Python runs a handler between two steps
    of the main thread, and a fork may stand still in a library, at a lock that a thread of its parent held.
    """
    guarded = {**_outside}
    _outside.clear()
    _late.clear()
    for number, previous in ({signal.SIGTERM: signal.getsignal(signal.SIGTERM)} | guarded).items():
        if number in guarded or previous in _OURS:
            signal.signal(number, signal.SIG_DFL if previous is None or previous in _OURS else previous)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_sigterm_end_a_fork)


def _jax_listens() -> bool:
    """Whether JAX handles SIGTERM itself, to tell all processes of a job; `getsignal` does not show that."""
    is_on = bool(jax.config.jax_enable_preemption_service)  # type: ignore[attr-defined]
    return is_on and jax.distributed.is_initialized()


class _SyncPoint:
    """Whether the job is to stop now, as JAX says: its processes are to stop at the same step.

    JAX spreads the news of SIGTERM, and names the moment by a counter that every process counts up, here with
    each step that is asked about. A process has one counter, and JAX says yes at one number alone. So all
    managers of the process share this object, which remembers the yes.
    https://docs.jax.dev/en/latest/_autosummary/jax.experimental.multihost_utils.reached_preemption_sync_point.html
    """

    def __init__(self) -> None:
        self.is_reached = False
        self._asked: int | None = None
        self._count = 0

    def ask(self, step: int) -> None:
        """Asks JAX, once for each step."""
        if step != self._asked and not self.is_reached:
            self._asked, self._count = step, self._count + 1
            self.is_reached = multihost_utils.reached_preemption_sync_point(self._count)


_sync_point = _SyncPoint()


class Preemption:
    """Whether this process has been told to stop, and whether a step was declined before it knew."""

    def __init__(self) -> None:
        self.signalled = False
        self._guarded = False
        self._handled: set[int] = set()
        """The signals that a guard of this manager handles."""
        self._declined = False

    def is_due(self, step: int, decided: bool) -> bool:
        """Whether to save this step; `decided` is what the policies say. After a signal every step is saved."""
        if self._guarded:
            _late.clear()
            if _jax_listens():
                _sync_point.ask(step)
        self._hear()
        self._declined = not (decided or (self.signalled and self._guarded))
        return not self._declined

    @property
    def reached(self) -> bool:
        """Whether to stop now. Not if the newest step was declined before the signal: the next step is saved."""
        self._hear()
        if self._guarded:
            _late.clear()
        return self.signalled and not self._declined

    def _hear(self) -> None:
        """Inside a guard: notes that the job is to stop, whichever manager of this process was told so."""
        self.signalled |= self._guarded and _sync_point.is_reached

    @contextlib.contextmanager
    def guard(self, signals: Sequence[int], wait: Callable[[], None]) -> Iterator[None]:
        """Handles the signals; at the end it waits, and the handlers from before are set again.

        A guard inside of another one of the same manager handles only what that one does not. A signal that comes
        after the last save, and of which nobody asks, is delivered again after the outermost guard, but not if an
        exception ends it.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("preemption_guard works in the main thread only: no other may set signal handlers")
        is_inner = self._guarded
        free = [number for number in signals if number != signal.SIGTERM or not _jax_listens()]
        taken = [number for number in free if number not in self._handled]
        before: dict[int, Any] = {number: signal.getsignal(number) for number in taken}

        def handle(number: int, frame: FrameType | None) -> None:
            previous = before[number]
            if self.signalled:
                background.end_at_next(number)
                background.end_now(number)
            if _jax_listens():
                os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the other processes
            else:
                self.signalled = True
                if not _is_of_others(_outside.get(number)):
                    _late.add(number)
            if _is_of_others(previous):
                previous(number, frame)

        outermost = before.keys() - _outside.keys()
        if not _outside:
            _late.clear()
        if not is_inner:
            self.signalled, self._declined = False, False
        self._guarded = True
        try:
            for number, previous in before.items():
                self._handled.add(number)
                if number in outermost:
                    _outside[number] = previous
                signal.signal(number, handle)
            try:
                yield
            finally:
                wait()
        finally:
            self._guarded = is_inner
            self._handled -= before.keys()
            for number, previous in before.items():
                signal.signal(number, signal.SIG_DFL if previous is None else previous)
            for number in outermost:
                _outside.pop(number, None)
        if not _outside:
            _deliver_late()


def _is_of_others(handler: Any) -> bool:
    """Whether a handler is to be called from inside a guard: it is neither ours, nor Python's own."""
    return callable(handler) and handler not in (*_OURS, signal.default_int_handler)


def _deliver_late() -> None:
    """After the outermost guard: what it has held back has its usual effect."""
    while _late:
        number = _late.pop()
        if signal.getsignal(number) is signal.SIG_DFL:
            background.begin_to_end(number)
        else:
            os.kill(os.getpid(), number)
        background.hold_if_ending()
