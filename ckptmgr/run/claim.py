"""The right to write into a run in a bucket: an object that names its holder, with a lease that ends.

    <directory>/.ckptmgr/lock    {"host": ..., "pid": ..., "since": ..., "token": ..., "lease_s": 60.0, ...}

A bucket has no lock that ends with its process. So the holder writes its claim anew every 15 seconds, and a claim
that was not written for 60 seconds is over: then another process may take it. Every write has a condition: the
first is made only if there is no claim, a later one only in the place of the claim that was read. So of two
processes that want a claim one gets it. A server that knows no conditions makes every write. There the claim is
read before each write, and two processes that come at the same moment may both go on until the next one.

How old a claim is, the server's clock says. How long its own claim lasts, the holder counts from before it sent
it, by a clock that goes on while the process is stopped. So the holder stops before another may begin.

Such a claim is a lease: Gray and Cheriton, "Leases: An Efficient Fault-Tolerant Mechanism for Distributed File
Cache Consistency", 1989.
"""

from __future__ import annotations

import _thread
import json
import logging
import os
import secrets
import threading
import time
from typing import Any

from etils import epath

from ckptmgr.errors import SaveError
from ckptmgr.format import names, objects
from ckptmgr.format.objects import Version
from ckptmgr.processes.background import Moment
from ckptmgr.run import owner

LEASE_VARIABLE = "CKPTMGR_LEASE_S"
"""The name of the environment variable with another lease. All writers of a run honor the lease in the claim."""
_LEASE_S = 60.0
_RENEWALS = 4  # in one lease
_ATTEMPTS = 3  # of one renewal
_GRACE_S = 2.0  # the time of an object is in whole seconds
_POLL_S = 1.0
_log = logging.getLogger("ckptmgr")


class Claim:
    """The claim of this process on one run."""

    def __init__(self, directory: epath.Path) -> None:
        self._run = str(directory)
        self._objects = objects.open_objects(directory)
        self._key = "/".join(filter(None, (objects.key_of(directory), names.LOCK)))
        self._lease_s = float(os.environ.get(LEASE_VARIABLE, _LEASE_S))
        self._said = owner.describe() | {"machine": owner.machine(), "token": secrets.token_hex(8)}
        self._tag: str | None = None
        self._ends = 0.0
        self._lost: str | None = None
        """Who has it now."""
        self._turn = threading.RLock()
        self._over: Moment | None = None
        """Set to end the thread that renews the claim."""

    def take(self, timeout_s: float) -> None:
        """Takes the claim, unless this process has it; raises SaveError that names another holder.

        A holder that may be gone is waited for: it renews its claim, or the claim is over.
        """
        with self._turn:
            self._refuse_if_lost()
            if self._tag is None:
                self._wait_for(timeout_s)
            if self._over is None:
                self._over = Moment()
                _thread.start_new_thread(self._go_on, (self._over,))

    def _wait_for(self, timeout_s: float) -> None:
        ends, first, seen_at = _now() + timeout_s, "", _now()
        while True:
            found = self._objects.fetch(self._key)
            if found is None or self._is_own(found) or self._is_over(found, _now() - seen_at):
                if self._write(found):
                    return
                continue
            if not first:
                first = found.tag
                _log.info("%s is claimed by %s: waiting for a sign of life", self._run, owner.spell(found.data))
            if found.tag != first or _is_alive(_parse(found.data)) or _now() >= ends:
                raise owner.refuse(self._run, found.data)
            time.sleep(min(_POLL_S, self._lease_s / _RENEWALS))

    def _is_own(self, found: Version) -> bool:
        """Whether it is the claim of this process, be it written by an earlier manager."""
        said = _parse(found.data)
        if said.get("token") == self._said["token"]:
            return True
        return said.get("machine") == self._said["machine"] and said.get("pid") == os.getpid()

    def _is_over(self, found: Version, watched_s: float) -> bool:
        """Whether another process's claim has ended; `watched_s`: how long it has been seen unchanged."""
        said = _parse(found.data)
        lease_s = said.get("lease_s")
        if not isinstance(lease_s, int | float):
            lease_s = _LEASE_S
        age_s = watched_s if found.age_s is None else found.age_s
        return age_s > lease_s + _GRACE_S or _is_gone(said)

    # ------------------------------------------------------------ holding it

    def hold(self) -> None:
        """Raises SaveError if another process has the claim. Makes requests only if the claim is over."""
        if self._lost is not None or _now() >= self._ends:
            self.renew()

    def is_in_time(self) -> bool:
        """Whether the claim lasts still, by the clock of this process."""
        return self._lost is None and _now() < self._ends

    def renew(self) -> None:
        """Writes the claim anew, in two requests; raises SaveError if another process has taken it.

        A refusal alone does not tell that: a request of this process that was given up may have arrived after all.
        """
        with self._turn:
            for _ in range(_ATTEMPTS):
                self._refuse_if_lost()
                found = self._objects.fetch(self._key)
                is_missing = found is None and not self.is_in_time()  # somebody may have come and gone
                if is_missing or (found is not None and not self._is_own(found)):
                    self._lose()
                elif self._write(found):
                    return
            raise OSError(
                f"the claim on {self._run} was written {_ATTEMPTS} times, and the server has refused it each time"
            )

    def _refuse_if_lost(self) -> None:
        if self._lost is not None:
            raise SaveError(
                f"this process does not write into {self._run} any more: its claim on the run was not renewed "
                f"for {self._lease_s:g} s, and {self._lost} has taken it. Close every manager of the run in this "
                "process, and open it anew once that other one ends",
                step=None,
            )

    def _lose(self) -> None:
        found = self._objects.fetch(self._key)
        self._lost = "another process" if found is None else owner.spell(found.data)

    def _write(self, over: Version | None) -> bool:
        """Writes the claim in the place of the one that was read; whether this process has it now."""
        started = _now()
        said = self._said | {"lease_s": self._lease_s, "written": time.time()}
        data = json.dumps(said).encode()
        create, replace = self._objects.create, self._objects.replace
        tag = create(self._key, data) if over is None else replace(self._key, data, over.tag)
        if tag is None:  # another was faster, or the client has sent it twice because an answer was lost
            found = self._objects.fetch(self._key)
            if found is None or found.data != data:
                return False
            tag = found.tag
        self._tag, self._ends = tag, started + self._lease_s
        return True

    def _go_on(self, over: Moment) -> None:
        """Renews the claim until it is released; in a thread of its own."""
        has_failed = False
        while self._lost is None and not over.wait(self._lease_s / _RENEWALS):
            try:
                self.renew()
                has_failed = False
            except SaveError as problem:
                _log.error("%s", problem)
            except Exception as problem:  # of the network or of a client
                if not has_failed:
                    _log.warning("the claim on %s could not be renewed; tried again: %s", self._run, problem)
                has_failed = True

    # ------------------------------------------------------------ giving it back

    def release(self) -> None:
        """Gives the claim back. If that fails, it ends by itself."""
        if self._over is not None:
            self._over.set()
        with self._turn:
            tag, self._tag, self._over = self._tag, None, None
            try:
                if tag is not None and self._lost is None:
                    self._objects.remove(self._key, tag)
            except Exception as problem:  # of the network or of a client
                _log.warning("the claim on %s could not be given back; it ends by itself: %s", self._run, problem)


def _now() -> float:
    """Seconds by a clock that goes on while the process is stopped, and while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _parse(data: bytes) -> dict[str, Any]:
    try:
        said = json.loads(data)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _is_alive(said: dict[str, Any]) -> bool:
    """Whether the holder is a process of this machine that runs."""
    return said.get("machine") == owner.machine() and not _is_gone(said)


def _is_gone(said: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    if said.get("machine") != owner.machine():
        return False
    try:
        os.kill(int(said["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):  # of another user: alive
        return False
    return False
