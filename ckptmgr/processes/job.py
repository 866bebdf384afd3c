"""The processes of one job: all do what process 0 decides, and what fails in one fails in all.

They communicate through the key-value store of jax.distributed's coordinator and not through the devices: there
a wait has a bound, and nothing runs between the programs of the training.

    ckptmgr/<name>/here/<process>        the call at which a process waits, and its report
    ckptmgr/<name>/log/<number>          what process 0 has decided, in order
    ckptmgr/<name>/works/<process>/beat  heartbeats of a process that works on a save (`heartbeat`)

Process 0 alone reads the reports, and answers all with one entry of its log: a call costs N requests, not N x N.
The others read the log in order. So a process that came late, or left out a call, finds its place again.

A coordinator that does not answer is process 0 that does not answer.
"""

from __future__ import annotations

import _thread
import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

from ckptmgr.errors import CheckpointError, CheckpointTimeoutError, SaveError
from ckptmgr.processes import agreement, heartbeat
from ckptmgr.processes.agreement import Spec, spell
from ckptmgr.processes.coordinator import Coordinator, CoordinatorSilentError, connected
from ckptmgr.processes.errand import Errand
from ckptmgr.processes.heartbeat import Heartbeats, Patience
from ckptmgr.processes.remote_errors import Packed, is_timeout, pack, unpack

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


class Awaited(NamedTuple):
    """Processes that are waited for."""

    processes: Sequence[int]
    call: Call

    def __str__(self) -> str:
        return f"{spell(self.processes)} at {self.call}"


class Job:
    """One line of calls, which all processes make in the same order.

    If several threads of one process make calls, they take turns. `coordinator` is that of another job than
    JAX's own, which says which of its processes this is.
    """

    def __init__(
        self, name: str, timeout_s: float, *, alone: bool = False, coordinator: Coordinator | None = None
    ) -> None:
        found = coordinator if coordinator or alone else connected()
        here = (0, 1) if alone else (jax.process_index(), jax.process_count())
        self.index: int = found.index if found else here[0]
        self.count: int = found.count if found else here[1]
        self.timeout_s = timeout_s
        self._prefix = f"ckptmgr/{name}"
        self._coordinator = found
        self._heartbeats = Heartbeats(found.beside(), self._prefix) if found else None
        self._number = 0  # of the next entry of the log
        self._is_saying = False
        self._kept: list[str] = []  # entries that may not have been read by all
        self._given_up: set[Call] = set()
        self._turn = threading.RLock()
        self.awaited: Awaited | None = None
        """Whom this process waits for now, and at which call; or whom it waited for in a call that failed."""

    @property
    def leads(self) -> bool:
        """Whether this process decides, and does what is done once for all."""
        return self.index == 0

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Inside it this process sends heartbeats, so the others go on waiting for it however slow it is."""
        if self._heartbeats is None:
            yield
            return
        with self._heartbeats.sent(self.index, heartbeat.beat_s(self.timeout_s)):
            yield

    # ------------------------------------------------------------ the calls

    def decide(self, call: Call, decide: Callable[[], Result]) -> Result:
        """Calls `decide` in process 0; all processes return or raise what it does. It goes through JSON."""
        if self._coordinator is None:
            return decide()
        with self._turn_at(call):
            if not self.leads:
                found: Result = self._listen(call, Report())
                return found
            try:
                decided = decide()
            except Exception as problem:
                self._say(call, error=self._pack(problem))
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
            mine = spec(result) if spec and self._coordinator else None
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

        If several have failed with errors of ours of different types, all raise the same type: callers go by it.
        Raises CheckpointTimeoutError with the processes that did not reach this call.
        """
        if self._coordinator is not None:
            try:
                self._share(call, Report(self._pack(problem)), is_late=isinstance(problem, CheckpointTimeoutError))
            except Exception as other:
                if problem is None:
                    raise
                types = {type(problem), type(other)}
                is_of_ours = all(issubclass(each, CheckpointError) for each in types)
                if len(types) > 1 and is_of_ours and CheckpointTimeoutError not in types:
                    raise other from problem
                raise problem from None
        if problem is not None:
            raise problem

    def collect(self, call: Call, found: Any) -> list[Any]:
        """In process 0 what each process has found, in order; in the others an empty list.

        Raises what has failed in a process that calls `share` instead.
        """
        if self._coordinator is None:
            return [found]
        with self._turn_at(call):
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
        if self._coordinator is None:
            return []
        with self._turn_at(call):
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
        with self._turn_at(call):
            report = Report(self._pack(problem))
            if not self.leads:
                return bool(self._answer(call, report).get("everywhere"))
            reports = self._gather_or_say(call, report)
            everywhere = all(each.error is not None for each in reports)
            self._say(call, error=report.error, everywhere=everywhere)
            return everywhere

    def program(self, call: Call, run: Callable[[], Result]) -> Result:
        """Runs a program of the devices of all processes. All are `working`: each hears of the others meanwhile.

        JAX has no bound for it. So a thread runs it, and after `timeout_s` this raises CheckpointTimeoutError with
        the processes of which no heartbeat comes. Also if it fails, which may be because one of them is gone.
        """
        if self._heartbeats is None:
            return run()
        errand, others = Errand(run), set(range(self.count)) - {self.index}
        ends, pulse_s = time.monotonic() + self.timeout_s, 3 * heartbeat.beat_s(self.timeout_s)
        _thread.start_new_thread(errand.run, ())
        errand.comes(self.timeout_s - pulse_s)
        if errand.is_done():
            return errand.result()
        missing = heartbeat.without_pulse(self._heartbeats, others, pulse_s, errand.is_done)
        if not missing:
            errand.comes(ends - time.monotonic())
        if errand.over.is_set() and not (errand.problem and missing):
            return errand.result()
        if not missing:
            what = f"the devices at {call}"
            raise CheckpointTimeoutError(f"{what} took longer than {self.timeout_s} s", waiting_for=what)
        raise self._late(call, missing, "did not answer at") from errand.problem

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

    @contextlib.contextmanager
    def _turn_at(self, call: Call) -> Iterator[None]:
        """One thread at a time is in a call. If the coordinator is silent there, process 0 is missing."""
        with self._turn:
            self.awaited = None
            try:
                yield
            except CoordinatorSilentError as problem:
                self._given_up.add(call)
                raise self._late(call, {0}, "did not answer at") from problem
            self.awaited = None  # not after a failure: the error of a save that still goes on names them

    def _pack(self, problem: Exception | None) -> Packed | None:
        return pack(problem, self.index)

    # ------------------------------------------------------------ process 0

    def _say(self, call: Call, **said: Any) -> None:
        assert self._coordinator is not None
        folder, wait_s = f"{self._prefix}/log", self.timeout_s
        if self._is_saying and f"{folder}/{self._number}" in self._coordinator.entries(folder, wait_s):
            self._number += 1  # an interrupt came after the entry was made, and before it was counted
        key = f"{folder}/{self._number}"
        self._is_saying = True
        self._coordinator.set(key, json.dumps({"call": call, **said}), wait_s)
        self._number += 1
        self._is_saying = False
        self._kept.append(key)

    def _gather_or_say(self, call: Call, own: Report) -> list[Report]:
        try:
            return self._gather(call, own)
        except CheckpointError as problem:
            self._say(call, error=self._pack(problem))
            raise

    def _gather(self, call: Call, own: Report) -> list[Report]:
        """The reports of all processes, once all have come to this call."""
        patience, pause_s = self._patience(), _FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            here = self._here()
            elsewhere = {i: at for i, (at, _) in here.items() if at != call}
            reports = {0: own} | {i: report for i, (at, report) in here.items() if at == call}
            if len(reports) == self.count:
                self._tidy()
            if len(reports) == self.count or any(is_timeout(each.error) for each in reports.values()):
                return [reports.get(i, Report()) for i in range(self.count)]
            if any(at.is_before(call) for at in elsewhere.values()):
                self._say(call, is_note=True)  # tells those that left out this call, or made one more
            elif elsewhere:
                raise self._left_out(call, elsewhere)
            elif silent := patience.silent(set(range(self.count)) - set(reports)):
                raise self._late(call, silent)
            elif pause_s == _FIRST_PAUSE_S:
                self._come(call, own)
            self.awaited = Awaited(sorted(set(range(self.count)) - set(reports)), call)
            time.sleep(max(pause_s, min(_PAUSES * (time.monotonic() - began), _MOST_S)))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _tidy(self) -> None:
        """Deletes older entries of the log: all processes are at this one, so they have read those before it."""
        assert self._coordinator is not None
        kept, self._kept = self._kept, []
        for key in kept:
            self._coordinator.delete(key, self.timeout_s)

    # ------------------------------------------------------------ the others

    def _come(self, call: Call, report: Report, *, is_late: bool = False) -> None:
        assert self._coordinator is not None
        self.awaited = Awaited([0], call)
        wait_s = heartbeat.look_s(self.timeout_s) if is_late else self.timeout_s
        said = json.dumps([call, self._number, report])
        self._coordinator.set(f"{self._prefix}/here/{self.index}", said, wait_s)

    def _listen(self, call: Call, report: Report, *, is_late: bool = False) -> Any:
        """What process 0 has decided at this call; raises what failed in any process."""
        said = self._answer(call, report, is_late=is_late)
        if said.get("error") is not None:
            raise unpack(said["error"], self.index)
        return said.get("found")

    def _answer(self, call: Call, report: Report, *, is_late: bool = False) -> Mapping[str, Any]:
        """The entry of the log that is about this call."""
        while True:
            self._come(call, report, is_late=is_late)
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
        assert self._coordinator is not None
        key, patience = f"{self._prefix}/log/{self._number}", self._patience()
        while True:
            is_over = bool(patience.silent({0}))  # then one last look: this process itself may have been stopped
            said = self._coordinator.get(key, patience.next_look_s(0))
            if said is not None:
                return json.loads(said)
            if is_over:
                self._given_up.add(call)
                present = {i for i, (at, _) in self._here().items() if at == call} | {self.index}
                raise self._late(call, set(range(self.count)) - present or {0})

    # ------------------------------------------------------------ who is where

    def _patience(self) -> Patience:
        assert self._heartbeats is not None
        return Patience(self._heartbeats, self.timeout_s)

    def _here(self) -> dict[int, tuple[Call, Report]]:
        """The processes that wait for the next entry of the log: the call and the report of each."""
        assert self._coordinator is not None
        wait_s = self.timeout_s if self.leads else heartbeat.look_s(self.timeout_s)
        entries = self._coordinator.entries(f"{self._prefix}/here", wait_s)
        said = {text: json.loads(text) for text in set(entries.values())}  # mostly all report the same
        here = {int(key.rpartition("/")[2]): said[text] for key, text in entries.items()}
        return {
            i: (Call(*call), Report(*report))
            for i, (call, number, report) in here.items()
            if number == self._number
        }

    def _late(self, call: Call, missing: Collection[int], what: str = "did not reach") -> CheckpointTimeoutError:
        who = f"{spell(sorted(missing))} of {self.count}"
        return CheckpointTimeoutError(
            f"{who} {what} {call} within {self.timeout_s} s",
            waiting_for=f"{who} at {call}",
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
