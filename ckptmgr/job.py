"""The processes of one job: all do what process 0 decides, and what fails in one fails in all.

They talk through the key-value store of jax.distributed's coordinator and not through the devices: there
a wait has a bound, and nothing runs between the programs of the training.
"""

from __future__ import annotations

import collections
import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax._src import distributed  # as Orbax does: JAX has no public name for the coordinator's client

from ckptmgr.errors import CheckpointError, CheckpointTimeoutError

Result = TypeVar("Result")
_jobs = itertools.count()


class Job:
    """All processes make the same calls in the same order, each with a name of its own (see `name`)."""

    def __init__(self, timeout_s: float) -> None:
        self.index, self.count = jax.process_index(), jax.process_count()
        self._timeout_s = timeout_s
        self._prefix = f"ckptmgr/{next(_jobs)}"
        self._named: collections.Counter[str] = collections.Counter()
        self._read: list[str] = []
        self._client = distributed.global_state.client if self.count > 1 else None

    @property
    def leads(self) -> bool:
        """Whether this process decides, and does what is done once for all."""
        return self.index == 0

    def name(self, call: str) -> str:
        """The next name for a call of this kind."""
        self._named[call] += 1
        return f"{call} {self._named[call]}"

    def agree(self, name: str, value: Result) -> Result:
        """What process 0 says; `value` goes through JSON."""
        if self._client is None:
            return value
        key = f"{self._prefix}/{name}/said"
        self._read.append(key)
        if self.leads:
            self._client.key_value_set(key, json.dumps(value))
            return value
        try:
            said: Result = json.loads(self._client.blocking_key_value_get(key, _ms(self._timeout_s)))
            return said
        except jax.errors.JaxRuntimeError as problem:
            raise self._late(name, [0], self._timeout_s) from problem

    def tell(self, name: str, problem: Exception | None = None) -> None:
        """Process 0 says that it has come so far, or raises `problem` in all."""
        said: Any = self.agree(name, problem and [type(problem).__name__, str(problem)])
        if problem is not None:
            raise problem
        if said is not None:
            raise OtherProcessError(f"process 0: {said[1]}", kind=said[0])

    def share(self, name: str, problem: Exception | None = None, *, timeout_s: float | None = None) -> None:
        """Waits for all processes; raises `problem`, or what another process has to tell.

        Raises CheckpointTimeoutError that names the processes that did not come.
        """
        if self._client is None:
            if problem is not None:
                raise problem
            return
        timeout_s = timeout_s or self._timeout_s
        key = f"{self._prefix}/{name}"
        report = problem and [type(problem).__name__, str(problem)]
        self._client.key_value_set(f"{key}/here/{self.index}", json.dumps(report))
        if problem is not None and absent(problem):
            raise problem  # who was waited for in vain is not waited for again, and the others know it too
        try:
            self._client.wait_at_barrier(key, _ms(timeout_s))
        except jax.errors.JaxRuntimeError as late:
            raise problem or self._late(name, absent(late), timeout_s) from late
        reports = self._reports(key)
        self._tidy(f"{key}/")
        if problem is not None:
            raise problem
        for index, told in sorted(reports.items()):
            if told is not None:
                raise OtherProcessError(f"process {index}: {told[1]}", kind=told[0])

    def together(self, name: str, action: Callable[[], Result]) -> Result:
        """Does something in every process; what fails in one fails in all."""
        try:
            result = action()
        except Exception as problem:
            self.share(name, problem)
            raise
        self.share(name)
        return result

    def _reports(self, key: str) -> dict[int, Any]:
        assert self._client is not None
        told = self._client.key_value_dir_get(f"{key}/here/")
        return {int(name.rpartition("/")[2]): json.loads(report) for name, report in told}

    def _late(self, name: str, missing: list[int], timeout_s: float) -> CheckpointTimeoutError:
        waiting_for = f"{spell(missing)} of {self.count} at {name}"
        return CheckpointTimeoutError(f"{waiting_for} did not come in {timeout_s} s", waiting_for=waiting_for)

    def _tidy(self, key: str) -> None:
        """Whoever comes to this call has read what was said in those before it."""
        if self.leads and self._client is not None:
            for read in self._read:
                self._client.key_value_delete(read)
        self._read = [key]


def _ms(seconds: float) -> int:
    return max(1, int(seconds * 1000))


_ABSENT = re.compile(r"timed out task names:\s*([\d\s]+)")


def absent(problem: BaseException) -> list[int]:
    """The processes that did not come to a barrier, from JAX's own words (of an error or what caused it)."""
    link: BaseException | None = problem
    while link is not None:
        if found := _ABSENT.search(str(link)):
            return [int(index) for index in found[1].split()]
        link = link.__cause__
    return []


def spell(processes: Sequence[int]) -> str:
    return f"process{'es' * (len(processes) > 1)} {', '.join(map(str, sorted(processes)))}"


class OtherProcessError(CheckpointError):
    """Something failed in another process of the job; `kind` is the name of the error's type there."""

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind
