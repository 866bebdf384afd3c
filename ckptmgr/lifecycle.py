"""Work that outlives the call that started it: finished before the script ends."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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
