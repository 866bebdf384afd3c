"""One writing process for each run: a lock that ends with its process, however the process ends.

The lock is `flock` on `<directory>/.ckptmgr/lock`. The text in that file names the owner, for people to read. The
managers of one process share the lock; a forked child closes its copy of it. A bucket has no such lock: there the
process holds a claim (`claim`).
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import json
import os
import sys
import threading
import weakref

from etils import epath

from ckptmgr.errors import SaveError
from ckptmgr.format import names, paths
from ckptmgr.processes import background
from ckptmgr.processes.background import Background
from ckptmgr.run import owner, version_1
from ckptmgr.run.claim import Claim
from ckptmgr.run.manifest_cache import Stamp
from ckptmgr.run.mirror import Mirror

if sys.platform != "win32":
    import fcntl

_ATTEMPTS = 1000


class Shared:
    """What the managers that write into one run in this process have in common."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.background = Background()
        """Writes the steps; after each commit calls callbacks and deletes old steps."""
        self.mirroring = Background()
        """Copies them to the mirrors."""
        self.damaged: dict[int, Stamp] = {}
        self.committed: int | None = None
        """The step that was saved last. No manager of the run deletes it."""
        self.newest: int | None = None
        """The newest step that this process has seen or saved; None before the first look."""
        self.taken: frozenset[int] = frozenset()
        """Numbers above it that are names of something else than a step."""
        self.owners: set[object] = set()
        self.mirrors: dict[object, Mirror] = {}
        """By owner: no manager of the run deletes a step that one of them still has to copy."""
        self.path = ""
        self.claim: Claim | None = None
        """The claim on a run in a bucket."""
        self.descriptor: int | None = None
        """The open file of the lock that is held."""
        self.opened: int | None = None
        """One that is being locked: Ctrl-C may come when that is done, and nobody has been told."""
        self.make_locks()

    def make_locks(self) -> None:
        """These locks are reentrant: a signal handler may save, or close, in the thread that holds them."""
        self.turn = threading.RLock()
        """Held by each call that saves or deletes: threads take turns."""
        self.retaining = threading.RLock()
        """Held from the decision what to delete until it is deleted."""
        self.raising = threading.RLock()
        """Held by the search for a failure, so that one thread raises it and no other."""

    def enter(self, directory: epath.Path, speaks: bool) -> bool:
        """Takes the lock if this process does not hold it. True for the first manager of the process.

        If the directory was removed, the lock is gone too, and is taken anew: other managers may be writing.
        """
        is_first = not self.owners
        is_free = is_first or (self.descriptor is not None and not _is_still(self.path, self.descriptor))
        path = str(directory / names.LOCK)
        if speaks and is_free and paths.is_local(path) and sys.platform != "win32":
            _refuse_version_1(directory)
            if is_first:
                self.let_go()
                self.path = path
                self._lock()
            else:  # the old one is kept if that fails: by it the other managers see that the run is not theirs
                self.hold()
        return speaks and is_first

    def hold(self) -> None:
        """Takes the lock anew if its file was removed. Raises SaveError if another process holds it now.

        Makes a request to a bucket only if the claim on the run is over.
        """
        if self.claim is not None:
            self.claim.hold()
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
            if _is_still(self.path, self.opened):  # if not, its owner removed the file between our two calls
                _sign(self.opened)
                break
        else:
            raise SaveError(
                f"{self.path} was removed {_ATTEMPTS} times while it was locked; find out what removes it",
                step=None,
            )
        self.descriptor, self.opened = self.opened, None

    def _close_opened(self) -> None:
        opened, self.opened = self.opened, None
        if opened is not None:
            os.close(opened)

    def take_claim(self, directory: epath.Path, timeout_s: float) -> None:
        """Takes the claim on a run in a bucket if this process does not have it."""
        self.claim = self.claim or Claim(directory)
        self.claim.take(timeout_s)

    def confirm(self) -> None:
        """Raises SaveError if this process may not publish a step. Asks a bucket whether the claim is its own."""
        if self.claim is not None:
            self.claim.renew()
        else:
            self.hold()

    def let_go(self) -> None:
        claim, self.claim = self.claim, None
        if claim is not None:
            claim.release()
        self._close_opened()
        descriptor = self.descriptor
        if descriptor is not None:
            with contextlib.suppress(OSError):
                if _is_still(self.path, descriptor):
                    os.unlink(self.path)  # before the lock is released, so the file is ours
            self.descriptor = None
            os.close(descriptor)


_runs: dict[str, Shared] = {}
_guard = threading.RLock()
"""Held while a manager is added or removed."""
_left: set[tuple[str, object]] = set()
"""Managers that the garbage collector found. It takes no lock: the thread that it interrupts may hold it."""


class Writer:
    """The right to write into a run. `is_first`: this process did not have it before.

    In a job one process `speaks` for all: it alone holds the lock.
    """

    def __init__(self, directory: epath.Path, *, speaks: bool = True, timeout_s: float = 1200.0) -> None:
        self._key = os.path.realpath(directory) if paths.is_local(directory) else str(directory)
        self._owner = object()
        weakref.finalize(self, _leave, self._key, self._owner, os.getpid()).atexit = False
        with _guard:
            _settle()
            self.shared = _runs.get(self._key) or Shared()
            _runs[self._key] = self.shared  # first: if Ctrl-C comes, the next manager finds what is locked
            self.is_first = self.shared.enter(directory, speaks)
            self.shared.owners.add(self._owner)
        if speaks and not paths.is_local(directory):  # that may take a while, in which other runs are opened
            try:
                self.shared.take_claim(directory, timeout_s)
            except BaseException:
                self.release()
                raise

    def copies_to(self, mirror: Mirror) -> None:
        """The other managers of the run hear of this mirror until `release`."""
        self.shared.mirrors[self._owner] = mirror

    def is_held(self) -> bool:
        return self._owner in self.shared.owners

    def release(self) -> None:
        """Gives the right back. After an interrupt it may be called again."""
        with _guard:
            _remove(self._key, self._owner)


def _leave(key: str, owner: object, process: int) -> None:
    """Called when a manager is garbage that was not closed: a new thread gives its right back."""
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
    """Removes a manager. With the last one of this process the lock is released."""
    shared = _runs.get(key)
    if shared is not None:
        shared.owners.discard(owner)
        shared.mirrors.pop(owner, None)
        if not shared.owners:
            shared.let_go()
            _runs.pop(key, None)


@atexit.register
def _end() -> None:
    """Releases the locks of managers that were not closed."""
    background.drain_at_exit()  # again: Ctrl-C may have skipped its own hook
    with _guard:
        for key, shared in list(_runs.items()):
            shared.let_go()
            _runs.pop(key, None)


def _sign(descriptor: int) -> None:
    """Writes into the file of the lock who holds it."""
    with contextlib.suppress(OSError):  # on a full disk the lock holds without the text
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner.describe()).encode(), 0)


def _refuse_version_1(directory: epath.Path) -> None:
    """Raises if a process of version 1 writes into the run: its lock file is beside the steps."""
    path = str(directory / version_1.LOCK)
    if not os.path.isfile(path) or (directory / names.VERSION).exists():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _take(descriptor, path)
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: str) -> None:
    """Locks an open file; raises SaveError that names the owner."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise owner.refuse(_run(path), os.read(descriptor, 4096)) from None


def _run(lock: str) -> str:
    folder = os.path.dirname(lock)
    return os.path.dirname(folder) if os.path.basename(folder) == names.OURS else folder


def _is_still(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _forget() -> None:
    """After a fork: closes the child's copies, because a lock is held until its last copy is closed."""
    global _guard
    _guard = threading.RLock()
    for shared in _runs.values():
        shared.make_locks()
        for descriptor in (shared.descriptor, shared.opened):
            if descriptor is not None:
                os.close(descriptor)
        shared.descriptor = shared.opened = None
        shared.claim = None  # it is the parent's
    _runs.clear()
    _left.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
