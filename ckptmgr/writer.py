"""One writing process for each run: a lock that the system lets go of when its owner ends, however it ends.

`flock` on `<directory>/.ckptmgr/lock` holds it; what the file says is for the people who meet it. The managers of
one process share it, and a process that is forked lets go of its copy.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import json
import os
import socket
import sys
import weakref
from typing import Any

from etils import epath

from ckptmgr import names, paths, version_1
from ckptmgr.errors import SaveError

if sys.platform != "win32":
    import fcntl

_files: dict[str, int] = {}
_managers: collections.Counter[str] = collections.Counter()


class Writer:
    """The right to write into a run; `is_first` unless this process had it already.

    Of the processes of one job only one `speaks` for all.
    """

    def __init__(self, directory: epath.Path, *, speaks: bool = True) -> None:
        path = str(directory / names.LOCK)
        self.is_first = speaks and _managers[path] == 0
        if self.is_first and paths.is_local(path) and sys.platform != "win32":
            _refuse_version_1(directory)
            _files[path] = _lock(path)
        _managers[path] += 1
        self._path = path
        self.release = weakref.finalize(self, _release, path, os.getpid())
        """Gives the right back; also called when nobody holds the manager any more, or Python ends."""

    def hold(self) -> None:
        """Takes the lock anew if its file was removed. Raises SaveError if another process has it since."""
        descriptor = _files.get(self._path)
        if descriptor is not None and not _is_still(self._path, descriptor):
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            _files[self._path] = _lock(self._path)
            os.close(descriptor)


def _release(path: str, owner: int) -> None:
    """The last manager of a process to give the right back lets another process in."""
    if os.getpid() != owner:
        return
    _managers[path] -= 1
    if _managers[path] == 0 and path in _files:
        descriptor = _files.pop(path)
        with contextlib.suppress(OSError):
            if _is_still(path, descriptor):
                os.unlink(path)  # while it is still ours
        os.close(descriptor)


def _lock(path: str) -> int:
    while True:
        descriptor = paths.open_to_write(path, os.O_RDWR)
        try:
            _take(descriptor, path)
        except SaveError:
            os.close(descriptor)
            raise
        except OSError:  # a file system without locks
            return descriptor
        if _is_still(path, descriptor):
            break
        os.close(descriptor)  # its owner removed it between our two calls
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    said = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now})
    with contextlib.suppress(OSError):  # on a full disk it holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, said.encode(), 0)
    return descriptor


def _refuse_version_1(directory: epath.Path) -> None:
    """Raises if a process of version 1, which has its lock beside the steps, writes into the run."""
    path = str(directory / version_1.LOCK)
    if not os.path.isfile(path) or (directory / names.VERSION).exists():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _take(descriptor, path)
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: str) -> None:
    """Locks an open file, or says who has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 4096)
        raise SaveError(
            f"{_run(path)} is being written to by {_spell(owner)}; a run has one writer. Wait "
            "until it ends, or open the directory with read_only=True",
            step=None,
        ) from None


def _run(lock: str) -> str:
    folder = os.path.dirname(lock)
    return os.path.dirname(folder) if os.path.basename(folder) == names.OURS else folder


def _is_still(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _spell(owner: bytes) -> str:
    try:
        said: dict[str, Any] = json.loads(owner)
        return f"process {said['pid']} on {said['host']} since {said['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _forget() -> None:
    """After a fork: a lock ends with the last copy of its file, and it is the parent's."""
    for descriptor in _files.values():
        os.close(descriptor)
    _files.clear()
    _managers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
