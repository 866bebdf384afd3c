"""The journal of a run, for people and reports: one JSON line for each event.

    <directory>/.ckptmgr/journal.jsonl

No restore needs it. After a restart it tells which step was saved last, so that retention keeps that step, and by
which policies. It is kept on a disk only, and events that cannot be written are left out.

Events: saved, failed, deleted, reduced, rewound, distrusted, trusted, paced (`saving/aftermath`); passed over,
restored (`restoring/restorer`). A new event is also named in `docs/format.md`, and drawn by `cli/report/charts`
(`KINDS`, `_TOLD`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath

from ckptmgr import policies as policy
from ckptmgr.format import names, paths
from ckptmgr.run import version_1

_log = logging.getLogger("ckptmgr")
_TAIL_BYTES = 1 << 16


class Journal:
    """The events of one run, in the order in which they happened."""

    def __init__(self, directory: epath.Path, wall: Callable[[], float], *, writes: bool) -> None:
        self._path = directory / names.JOURNAL
        self.wall = wall
        """Returns the time in seconds since the epoch."""
        self._writes = writes and paths.is_local(directory)
        self._has_warned = False

    def record(self, event: str, step: int, **facts: Any) -> None:
        """Adds an event of a step, in one `write`: so lines of several threads stay whole."""
        if not self._writes:
            return
        line = json.dumps({"event": event, "step": step, "time": self.wall()} | facts) + "\n"
        try:
            with open(self._path, "ab", buffering=0, opener=paths.open_to_write) as file:
                file.write(line.encode())
        except OSError as problem:
            if not self._has_warned:
                _log.warning("the journal of %s cannot be written to: %s", self._path.parent.parent, problem)
            self._has_warned = True


def read(directory: epath.Path) -> list[dict[str, Any]]:
    """The events of a run, without lines that a crash cut short or that no manager wrote."""
    return list(_events(_lines(directory) if paths.is_local(directory) else ()))


def _events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line)
            if _is_event(event):
                yield event


def last_saved(directory: epath.Path) -> int | None:
    """The step that was saved last, if no rewind came after it; None if the end of the journal does not say."""
    lines = _end_of(directory / names.JOURNAL).splitlines()
    for event in _events(line for line in reversed(lines) if b'"saved"' in line or b'"rewound"' in line):
        if event["event"] in ("saved", "rewound"):
            return int(event["step"]) if event["event"] == "saved" else None
    return None


def mirror(directory: epath.Path) -> str | None:
    """The mirror of the manager that saved last; None if it had none, or that is not known."""
    lines = _end_of(directory / names.JOURNAL).splitlines()
    last = next(_events(line for line in reversed(lines) if b'"event":"saved"' in line.replace(b" ", b"")), {})
    return str(last["mirror"]) if "mirror" in last else None


def _end_of(path: epath.Path) -> bytes:
    """The last part of a journal; empty if it cannot be read. Does not wait for the writer of a FIFO."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        try:
            return os.pread(descriptor, _TAIL_BYTES, max(0, os.fstat(descriptor).st_size - _TAIL_BYTES))
        finally:
            os.close(descriptor)
    return b""


def _lines(directory: epath.Path) -> list[bytes]:
    path = directory / names.JOURNAL
    if not paths.may_exist(path):
        path = directory / version_1.JOURNAL
    try:
        return paths.read_bytes(path).splitlines()
    except FileNotFoundError:
        return []
    except OSError as problem:
        _log.warning("the journal %s cannot be read: %s", path, problem)
        return []


def _is_event(line: Any) -> bool:
    kinds = {"event": str, "step": int, "time": int | float}
    return isinstance(line, dict) and all(isinstance(line.get(name), kind) for name, kind in kinds.items())


def policies(directory: epath.Path) -> list[policy.KeepPolicy] | None:
    """The `keep` policies at the last save; None if they are not known."""
    said = [event["keep"] for event in read(directory) if "keep" in event]
    try:
        return [policy.parse(each) for each in said[-1]] if said else None
    except (ValueError, TypeError, AttributeError):
        return None  # a policy of Orbax or of the caller's own, or not written by us
