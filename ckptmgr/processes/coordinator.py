"""The coordinator of jax.distributed: keys and values in process 0, whose silence is an error.

JAX has a bound for one question alone, the wait for a key. If process 0 is stopped, or the network is cut, every
other question returns after two minutes. So a thread asks, and the caller waits for it as long as it wants to.
"""

from __future__ import annotations

import _thread
import collections
import contextlib
import math
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax._src import distributed  # as Orbax does: JAX has no public name for the coordinator's client

from ckptmgr.processes.errand import Errand

Answer = TypeVar("Answer")
_PAUSE_S = 0.05
_GRACE_S = 0.05  # the thread that waits for a key says itself that there is none


class CoordinatorSilentError(Exception):
    """The coordinator did not answer in time. `Job` tells its callers, as a CheckpointTimeoutError."""


class Coordinator:
    """Asks the coordinator one question after the other, for one process of the job.

    A question that its caller has left (at its bound, or by Ctrl-C) is over before the next one is asked: a later
    question sees what it has set, or it never sets anything.
    """

    def __init__(self, client: Any, index: int, count: int) -> None:
        self.index, self.count = index, count
        self._client = client
        self._asked: collections.deque[_Question[Any]] = collections.deque()
        self._asking = threading.Lock()

    def beside(self) -> Coordinator:
        """The same coordinator, for questions that need not wait for those that are asked here."""
        return Coordinator(self._client, self.index, self.count)

    def set(self, key: str, value: str, wait_s: float) -> None:
        """Gives a key its value, whether it had one or not."""
        self._ask(lambda: self._client.key_value_set(key, value, allow_overwrite=True), wait_s)

    def get(self, key: str, wait_s: float) -> str | None:
        """The value of a key as soon as it has one; None if it has none, or no answer came, within `wait_s`."""
        ends = time.monotonic() + wait_s

        def ask() -> str | None:
            left_s = ends - time.monotonic()
            try:
                found: str = self._client.blocking_key_value_get(key, max(1, math.ceil(left_s * 1000)))
            except jax.errors.JaxRuntimeError:
                if time.monotonic() < ends:  # the connection broke
                    raise
                return None
            return found

        with contextlib.suppress(CoordinatorSilentError):
            return self._ask(ask, wait_s + _GRACE_S)
        return None

    def entries(self, folder: str, wait_s: float) -> dict[str, str]:
        """The keys below `folder/`, and their values."""
        return dict(self._ask(lambda: self._client.key_value_dir_get(folder), wait_s))

    def delete(self, key: str, wait_s: float) -> None:
        self._ask(lambda: self._client.key_value_delete(key), wait_s)

    def _ask(self, ask: Callable[[], Answer], wait_s: float) -> Answer:
        """Raises CoordinatorSilentError if there is no answer within `wait_s`."""
        question = _Question(ask)
        try:
            self._asked.append(question)
            self._start_thread()
            if not question.comes(wait_s):
                raise CoordinatorSilentError(f"no answer within {wait_s:.3g} s") from question.broken
        finally:
            question.is_left = True
        return question.result()

    def _start_thread(self) -> None:
        """No `threading.Thread`: its `start` waits in Python code, where Ctrl-C leaves locks held."""
        try:
            _thread.start_new_thread(self._answer, ())
        except RuntimeError:  # too many threads
            self._answer()

    def _answer(self) -> None:
        """Asks what has not been asked yet: mostly the one question for which the thread was started."""
        with self._asking:
            while self._asked:
                self._asked.popleft().run()


class _Question(Errand[Answer]):
    """It is asked until there is an answer, or the caller has left: a broken connection may come back."""

    def __init__(self, ask: Callable[[], Answer]) -> None:
        super().__init__(self._insist)
        self._ask = ask
        self.is_left = False
        self.broken: Exception | None = None
        """Why it could not be asked, the last time."""

    def _insist(self) -> Answer:
        while not self.is_left:
            try:
                return self._ask()
            except jax.errors.JaxRuntimeError as problem:
                self.broken = problem
                time.sleep(_PAUSE_S)
        raise CoordinatorSilentError("the caller has left")


def connected() -> Coordinator | None:
    """The coordinator of the job that this process is in; None if it is in none."""
    count, client = jax.process_count(), distributed.global_state.client
    return Coordinator(client, jax.process_index(), count) if count > 1 and client is not None else None


def host() -> str | None:
    """The host of the coordinator, as the processes of the job were told; None without a job."""
    told: str | None = distributed.global_state.coordinator_address
    return told.rpartition(":")[0].strip("[]") if told else None


def is_here() -> bool:
    """Whether the coordinator is in this process."""
    return distributed.global_state.service is not None
