"""The processes of one job: all do what process 0 decides, and what fails in one fails in all.

They communicate through the key-value store of jax.distributed's coordinator and not through the devices: there
a wait has a bound, and nothing runs between the programs of the training.

    ckptmgr/<name>/here/<process>   the call at which a process waits, and its report
    ckptmgr/<name>/log/<number>     what process 0 has decided, in order
    ckptmgr/<name>/works/<process>/beat  heartbeats of a process that works on a save (`heartbeat`)

Process 0 alone reads the reports, and answers all with one entry of its log: a call costs N requests, not N x N.
The others read the log in order. So a process that came late, or left out a call, finds its place again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from jax._src import distributed  # as Orbax does: JAX has no public name for the coordinator's client

from ckptmgr.errors import CheckpointError, CheckpointTimeoutError, SaveError
from ckptmgr.processes import agreement, heartbeat
from ckptmgr.processes.agreement import Spec, spell
from ckptmgr.processes.heartbeat import Heartbeats, Patience
from ckptmgr.processes.remote_errors import is_timeout, pack, unpack

Result = TypeVar("Result")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.05
_PAUSES, _MOST_S = 4, 1.0  # of thousands of reports a look takes a while: it takes a fifth of the time at most
_epochs = itertools.count()


class Call(NamedTuple):
    """A call that all processes make. Of two calls with a step the lower step comes first."""

    what: str
    step: int | None = None

    def is_before(self, other: Call) -> bool:
        return self.step is not None and other.step is not None and self.step < other.step

    def __str__(self) -> str:
        return self.what if self.step is None else f"{self.what} of step {self.step}"


class Report(NamedTuple):
    """What a process reports at a call: what failed there, or what it found."""

    error: Mapping[str, Any] | None = None
    found: Any = None


class Job:
    """One line of calls, which all processes make in the same order.

    If several threads of one process make calls, they take turns.
    """

    def __init__(self, name: str, timeout_s: float, *, alone: bool = False) -> None:
        self.index: int = 0 if alone else jax.process_index()
        self.count: int = 1 if alone else jax.process_count()
        self.timeout_s = timeout_s
        self._prefix = f"ckptmgr/{name}"
        self._client = distributed.global_state.client if self.count > 1 else None
        self._heartbeats = Heartbeats(self._client, self._prefix)
        self._number = 0  # of the next entry of the log
        self._is_saying = False
        self._kept: list[str] = []  # entries that may not have been read by all
        self._given_up: set[Call] = set()
        self._turn = threading.RLock()
        self.waits_for: str = ""
        """Which processes this one waits for now, and at which call."""

    @property
    def leads(self) -> bool:
        """Whether this process decides, and does what is done once for all."""
        return self.index == 0

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Inside it this process sends heartbeats, so the others go on waiting for it however slow it is."""
        if self._client is None:
            yield
            return
        with self._heartbeats.sent(self.index, heartbeat.beat_s(self.timeout_s)):
            yield

    # ------------------------------------------------------------ the calls

    def decide(self, call: Call, decide: Callable[[], Result]) -> Result:
        """Calls `decide` in process 0; all processes return or raise what it does. It goes through JSON."""
        if self._client is None:
            return decide()
        with self._turn:
            if not self.leads:
                found: Result = self._listen(call, Report())
                return found
            try:
                decided = decide()
            except Exception as problem:
                self._say(call, error=pack(problem))
                raise
            self._say(call, found=decided)
            return decided

    def tell(self, call: Call, problem: Exception | None = None) -> None:
        """Process 0 lets the others go on, or raises `problem` in all."""

        def fail() -> None:
            if problem is not None:
                raise problem

        self.decide(call, fail)

    def together(
        self, call: Call, action: Callable[[], Result], spec: Callable[[Result], Spec] | None = None
    ) -> Result:
        """Calls `action` in every process; what fails in one fails in all.

        With `spec` the results of all processes must agree. If not, all raise a SaveError that names the first
        difference.
        """
        try:
            result = action()
            mine = spec(result) if spec and self._client else None
            report = Report(found=mine and mine.summary())
        except Exception as problem:
            self.share(call, problem)
            raise
        differs = self._share(call, report)
        if mine is not None:
            self._reconcile(call, mine, *differs)
        return result

    def share(self, call: Call, problem: Exception | None = None) -> None:
        """Waits for all processes; raises `problem`, or what failed in another process.

        Raises CheckpointTimeoutError with the processes that did not reach this call.
        """
        if self._client is not None:
            try:
                self._share(call, Report(pack(problem)), is_late=isinstance(problem, CheckpointTimeoutError))
            except Exception as other:
                raise problem or other from None
        if problem is not None:
            raise problem

    def collect(self, call: Call, found: Any) -> list[Any]:
        """In process 0 what each process has found, in order; in the others an empty list.

        Raises what has failed in a process that calls `share` instead.
        """
        if self._client is None:
            return [found]
        with self._turn:
            if not self.leads:
                self._listen(call, Report(found=found))
                return []
            reports = self._gather_or_say(call, Report(found=found))
            failed = next((each.error for each in reports if each.error is not None), None)
            self._say(call, error=failed)
            if failed is not None:
                raise unpack(failed, self.index)
            return [report.found for report in reports]

    def _share(self, call: Call, report: Report, *, is_late: bool = False) -> list[bool]:
        """For each part of `found`: whether it differs between processes."""
        if self._client is None:
            return []
        with self._turn:
            if not self.leads:
                told: list[bool] | None = self._listen(call, report, is_late=is_late)
                return told or []
            reports = [report] if is_late else self._gather_or_say(call, report)
            failed = next((each.error for each in reports if each.error is not None), None)
            found = [] if failed else [each.found or () for each in reports]
            differs = [len(set(part)) > 1 for part in zip(*found, strict=False)]
            self._say(call, error=failed, found=differs)
            if failed is not None:
                raise unpack(failed, self.index)
            return differs

    def fail(self, call: Call, problem: Exception) -> bool:
        """Tells all processes that a call has failed here; returns whether it has failed in each by itself."""
        with self._turn:
            report = Report(pack(problem))
            if not self.leads:
                return bool(self._answer(call, report).get("everywhere"))
            reports = self._gather_or_say(call, report)
            everywhere = all(each.error is not None for each in reports)
            self._say(call, error=report.error, everywhere=everywhere)
            return everywhere

    def _reconcile(self, call: Call, spec: Spec, is_other: bool, has_other_owners: bool, *is_own: bool) -> None:
        """Raises SaveError if the specs differ. To name the difference, all lines are sent: only then."""
        if is_other:
            found = self.collect(Call(f"what differs in {call.what}", call.step), agreement.compress(spec.lines()))

            def refuse() -> None:
                difference = agreement.first_difference(list(map(agreement.decompress, found)))
                raise SaveError(f"{call} is refused in all processes, which differ. {difference}", step=call.step)

            self.decide(call, refuse)
        owners = spec.owners
        if has_other_owners:
            owners = self.decide(Call(f"who writes what in {call.what}", call.step), lambda: list(spec.owners))
        spec.settle(owners, is_own)

    # ------------------------------------------------------------ process 0

    def _say(self, call: Call, **said: Any) -> None:
        assert self._client is not None
        key = f"{self._prefix}/log/{self._number}"
        if self._is_saying and key in dict(self._client.key_value_dir_get(f"{self._prefix}/log/")):
            self._number += 1  # an interrupt came after the entry was made, and before it was counted
            key = f"{self._prefix}/log/{self._number}"
        self._is_saying = True
        self._client.key_value_set(key, json.dumps({"call": call, **said}))
        self._number += 1
        self._is_saying = False
        self._kept.append(key)

    def _gather_or_say(self, call: Call, own: Report) -> list[Report]:
        try:
            return self._gather(call, own)
        except CheckpointError as problem:
            self._say(call, error=pack(problem))
            raise
        finally:
            self.waits_for = ""

    def _gather(self, call: Call, own: Report) -> list[Report]:
        """The reports of all processes, once all have come to this call."""
        patience, pause_s = Patience(self._heartbeats, self.timeout_s), _FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            here = self._here()
            elsewhere = {i: at for i, (at, _) in here.items() if at != call}
            reports = {0: own} | {i: report for i, (at, report) in here.items() if at == call}
            if len(reports) == self.count or any(is_timeout(each.error) for each in reports.values()):
                self._tidy()
                return [reports.get(i, Report()) for i in range(self.count)]
            if any(at.is_before(call) for at in elsewhere.values()):
                self._say(call, is_note=True)  # tells those that left out this call, or made one more
            elif elsewhere:
                raise self._left_out(call, elsewhere)
            elif silent := patience.silent(set(range(self.count)) - set(reports)):
                raise self._late(call, silent)
            elif pause_s == _FIRST_PAUSE_S:
                self._come(call, own)
            self.waits_for = f"{spell(sorted(set(range(self.count)) - set(reports)))} at {call}"
            time.sleep(max(pause_s, min(_PAUSES * (time.monotonic() - began), _MOST_S)))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _tidy(self) -> None:
        """Deletes older entries of the log: all processes are at this one, so they have read those before it."""
        assert self._client is not None
        kept, self._kept = self._kept, []
        for key in kept:
            self._client.key_value_delete(key)

    # ------------------------------------------------------------ the others

    def _come(self, call: Call, report: Report) -> None:
        assert self._client is not None
        said = json.dumps([call, self._number, report])
        self._client.key_value_set(f"{self._prefix}/here/{self.index}", said, allow_overwrite=True)

    def _listen(self, call: Call, report: Report, *, is_late: bool = False) -> Any:
        """What process 0 has decided at this call; raises what failed in any process."""
        said = self._answer(call, report, is_late=is_late)
        if said.get("error") is not None:
            raise unpack(said["error"], self.index)
        return said.get("found")

    def _answer(self, call: Call, report: Report, *, is_late: bool = False) -> Mapping[str, Any]:
        """The entry of the log that is about this call."""
        while True:
            self._come(call, report)
            if is_late:  # this process has already timed out; it does not wait again
                self._given_up.add(call)
                return {}
            said: Mapping[str, Any] = self._next(call)
            about = Call(*said["call"])
            if about == call:
                self._number += 1
                if said.get("is_note"):
                    continue
                return said
            if call.is_before(about):
                raise self._left_out(call, {0: about})
            self._number += 1
            if not about.is_before(call) and about not in self._given_up:
                raise self._left_out(call, {0: about})

    def _next(self, call: Call) -> Any:
        """The next entry of the log."""
        assert self._client is not None
        self.waits_for = f"process 0 at {call}"
        patience, beat_s = Patience(self._heartbeats, self.timeout_s), heartbeat.beat_s(self.timeout_s)
        key = f"{self._prefix}/log/{self._number}"
        try:
            while True:
                began = time.monotonic()
                try:
                    return json.loads(self._client.blocking_key_value_get(key, max(1, int(beat_s * 1000))))
                except jax.errors.JaxRuntimeError as problem:
                    is_answered = time.monotonic() - began > beat_s / 2  # if not, the coordinator is gone
                    if not is_answered or patience.silent({0}):
                        self._given_up.add(call)
                        present = {i for i, (at, _) in self._here().items() if at == call} | {self.index}
                        raise self._late(call, set(range(self.count)) - present or {0}) from problem
        finally:
            self.waits_for = ""

    # ------------------------------------------------------------ who is where

    def _here(self) -> dict[int, tuple[Call, Report]]:
        """The processes that wait for the next entry of the log: the call and the report of each."""
        assert self._client is not None
        try:
            entries = self._client.key_value_dir_get(f"{self._prefix}/here/")
        except jax.errors.JaxRuntimeError:  # the coordinator does not answer
            return {}
        said = {text: json.loads(text) for text in {text for _, text in entries}}  # mostly all report the same
        here = {int(key.rpartition("/")[2]): said[text] for key, text in entries}
        return {
            i: (Call(*call), Report(*report))
            for i, (call, number, report) in here.items()
            if number == self._number
        }

    def _late(self, call: Call, missing: set[int]) -> CheckpointTimeoutError:
        waiting_for = f"{spell(sorted(missing))} of {self.count} at {call}"
        return CheckpointTimeoutError(
            f"{spell(sorted(missing))} of {self.count} did not reach {call} within {self.timeout_s} s",
            waiting_for=waiting_for,
            missing=sorted(missing),
        )

    def _left_out(self, call: Call, elsewhere: Mapping[int, Call]) -> CheckpointError:
        index, at = min(elsewhere.items())
        return CheckpointError(
            f"process {index} left out {call}: it is at {at}. "
            "All processes of a job must make the same calls in the same order"
        )


_shared: dict[str, Job] = {}


def shared(name: str, timeout_s: float) -> Job:
    """The one line of calls of this name in this process."""
    found = _shared.setdefault(name, Job(name, timeout_s))
    found.timeout_s = timeout_s
    return found


def new_name() -> str:
    """A new name for lines of calls. Process 0 chooses it: it may have opened more runs than the others."""
    return f"run {next(_epochs)}"
