"""What Orbax logs about our calls, kept below WARNING: what it warns of is raised or logged by ckptmgr.

Calls that anybody else makes to Orbax in the same process are logged as ever.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Iterator

_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
"""Those that are in a call of ours, and those that Orbax started in one."""
_calls: list[set[threading.Thread]] = []
"""For each call that is being made the threads that were there before it."""


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """Marks a call to Orbax as ours."""
    here, before = threading.current_thread(), set(threading.enumerate())
    is_outermost = here not in _threads
    _threads.add(here)
    _calls.append(before)
    try:
        yield
    finally:
        _calls.remove(before)
        _threads.update(set(threading.enumerate()) - before)
        if is_outermost:
            _threads.discard(here)


def _lower(record: logging.LogRecord) -> bool:
    thread = threading.current_thread()
    is_ours = thread in _threads or any(thread not in before for before in _calls)
    if not is_ours or record.levelno <= logging.INFO:
        return True
    record.levelno, record.levelname = logging.INFO, logging.getLevelName(logging.INFO)
    return logging.getLogger(record.name).isEnabledFor(logging.INFO)


logging.getLogger("absl").addFilter(_lower)  # the logger that Orbax writes to
