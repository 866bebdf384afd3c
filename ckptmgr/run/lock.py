"""One writing process for each run: a lock that the system lets go of when its owner ends, however it ends.

`flock` on `<directory>/.ckptmgr/lock` holds it; what the file says is for the people who meet it. The managers of
one process share it, and a process that is forked lets go of its copy.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import datetime
import json
import os
import socket
import sys
import threading
import weakref
from typing import Any

from etils import epath

from ckptmgr.errors import SaveError
from ckptmgr.format import names, paths
from ckptmgr.processes import background
from ckptmgr.processes.background import Background
from ckptmgr.run import version_1
from ckptmgr.run.manifest_cache import Stamp

if sys.platform != "win32":
    import fcntl

_ATTEMPTS = 1000


class Shared:
    """What the managers that write into one run in this process have in common."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.background = Background()
        """Writes the steps, and does what follows from it."""
        self.mirroring = Background()
        """Copies them to the mirrors."""
        self.damaged: dict[int, Stamp] = {}
        self.committed: int | None = None
        """The step that was saved last: what one manager has just saved, no other deletes."""
        self.newest: int | None = None
        """The newest step that was seen or saved here; None if nobody has looked yet."""
        self.taken: frozenset[int] = frozenset()
        """Numbers above it that were seen to be the names of what is no step."""
        self.owners: set[object] = set()
        self.path = ""
        self.descriptor: int | None = None
        """The open file of the lock that is held."""
        self.opened: int | None = None
        """One that is being locked: Ctrl-C may come when that is done, and nobody has been told."""
        self.make_locks()

    def make_locks(self) -> None:
        """Each may be taken again by the thread that holds it: a handler of signals may save, or close, too."""
        self.turn = threading.RLock()
        """Held by a call that saves or deletes: threads take turns."""
        self.retaining = threading.RLock()
        """Held while it is decided what to delete, and while that is deleted."""
        self.raising = threading.RLock()
        """Held while a failure is looked for: of several threads one raises it."""

    def enter(self, directory: epath.Path, speaks: bool) -> bool:
        """Takes the lock if it is not held; whether nobody wrote here before.

        A directory that was removed took the lock along: it is taken anew, and the other managers may be writing.
        """
        is_first = not self.owners
        is_free = is_first or (self.descriptor is not None and not _is_still(self.path, self.descriptor))
        path = str(directory / names.LOCK)
        if speaks and is_free and paths.is_local(path) and sys.platform != "win32":
            self.let_go()
            _refuse_version_1(directory)
            self.path = path
            self._lock()
        return speaks and is_first

    def hold(self) -> None:
        """Takes the lock anew if its file was removed. Raises SaveError if another process has it since."""
        with _guard:
            descriptor = self.descriptor
            if descriptor is not None and not _is_still(self.path, descriptor):
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
                self._lock()
                os.close(descriptor)

    def _lock(self) -> None:
        for _ in range(_ATTEMPTS):
            self._close_opened()
            self.opened = paths.open_to_write(self.path, os.O_RDWR)
            try:
                _take(self.opened, self.path)
            except SaveError:
                self._close_opened()
                raise
            except OSError:  # a file system without locks
                break
            if _is_still(self.path, self.opened):  # else its owner removed it between our two calls
                _sign(self.opened)
                break
        else:
            raise SaveError(
                f"{self.path} is removed each time that it is locked: find out what removes it", step=None
            )
        self.descriptor, self.opened = self.opened, None

    def _close_opened(self) -> None:
        opened, self.opened = self.opened, None
        if opened is not None:
            os.close(opened)

    def let_go(self) -> None:
        self._close_opened()
        descriptor = self.descriptor
        if descriptor is not None:
            with contextlib.suppress(OSError):
                if _is_still(self.path, descriptor):
                    os.unlink(self.path)  # while it is still ours
            self.descriptor = None
            os.close(descriptor)


_runs: dict[str, Shared] = {}
_guard = threading.RLock()
"""Held while a manager comes or goes."""
_left: set[tuple[str, object]] = set()
"""Managers that the garbage collector has found. It takes no lock: the thread that it interrupts may hold it."""


class Writer:
    """The right to write into a run; `is_first` unless this process had it already.

    Of the processes of one job only one `speaks` for all.
    """

    def __init__(self, directory: epath.Path, *, speaks: bool = True) -> None:
        self._key = os.path.realpath(directory) if paths.is_local(directory) else str(directory)
        self._owner = object()
        weakref.finalize(self, _leave, self._key, self._owner, os.getpid()).atexit = False
        with _guard:
            _settle()
            self.shared = _runs.get(self._key) or Shared()
            _runs[self._key] = self.shared  # first: if Ctrl-C comes, the next manager finds what is locked
            self.is_first = self.shared.enter(directory, speaks)
            self.shared.owners.add(self._owner)

    def is_held(self) -> bool:
        return self._owner in self.shared.owners

    def release(self) -> None:
        """Gives the right back. May be called again, as after an interrupt."""
        with _guard:
            _remove(self._key, self._owner)


def _leave(key: str, owner: object, process: int) -> None:
    """Nobody holds a manager any more, which need not be closed: a thread of its own gives the right back."""
    if process == os.getpid():
        _left.add((key, owner))
        with contextlib.suppress(RuntimeError):  # at the end of Python there are no new threads
            _thread.start_new_thread(_settle, ())


def _settle() -> None:
    with _guard:
        for each in list(_left):
            _remove(*each)
            _left.discard(each)


def _remove(key: str, owner: object) -> None:
    """The last manager of a process to give the right back lets another process in."""
    shared = _runs.get(key)
    if shared is not None:
        shared.owners.discard(owner)
        if not shared.owners:
            shared.let_go()
            _runs.pop(key, None)


@atexit.register
def _end() -> None:
    """What the managers hold that nobody has closed."""
    background.drain_at_exit()  # once more: Ctrl-C just before its own hook skips that
    with _guard:
        for key, shared in list(_runs.items()):
            shared.let_go()
            _runs.pop(key, None)


def _sign(descriptor: int) -> None:
    """Says in the file of the lock who holds it."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    said = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now})
    with contextlib.suppress(OSError):  # on a full disk it holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, said.encode(), 0)


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
    global _guard
    _guard = threading.RLock()
    for shared in _runs.values():
        shared.make_locks()
        for descriptor in (shared.descriptor, shared.opened):
            if descriptor is not None:
                os.close(descriptor)
        shared.descriptor = shared.opened = None
    _runs.clear()
    _left.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
