"""The processes of one job: all do what process 0 decides, and what fails in one fails in all.

They talk through the key-value store of jax.distributed's coordinator and not through the devices: there
a wait has a bound, and nothing runs between the programs of the training.

    ckptmgr/<name>/here/<process>   at which call a process is, and what it has to report there
    ckptmgr/<name>/log/<number>     what process 0 says, in order
    ckptmgr/<name>/works/<process>  a number that changes as long as a process does its part of a save

Process 0 alone reads what the others report, and one entry of its log tells all: a call costs N requests, not
N x N. The others read the log in order. So a process that came late, or left out a call, finds its place again.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import itertools
import json
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from jax._src import distributed  # as Orbax does: JAX has no public name for the coordinator's client

from ckptmgr import errors
from ckptmgr.errors import CheckpointError, CheckpointTimeoutError, SaveError
from ckptmgr.processes.background import Moment

Result = TypeVar("Result")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.05
_LONGEST_BEAT_S = 30.0
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
    """What a process has to say at a call: what failed there, or what it found."""

    error: Mapping[str, Any] | None = None
    found: Any = None


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a process is about to save. All processes must be about to save the same."""

    digest: str
    lines: Callable[[], Sequence[str]]
    """A line for each leaf: its path, a tab, and what it is."""
    owners: Sequence[int]
    """For each leaf the process that holds it, as this process sees it; -1 if every process has one."""
    own: Sequence[str]
    """Digests of the values of which each process may have its own."""
    settle: Callable[[Sequence[int], Sequence[bool]], None]
    """Given the owners as process 0 sees them, and which values differ."""

    def summary(self) -> list[str]:
        return [self.digest, digest(json.dumps(self.owners)), *self.own]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Job:
    """One line of calls, which all processes make in the same order.

    Calls of several threads in one process take turns.
    """

    def __init__(self, name: str, timeout_s: float, *, alone: bool = False) -> None:
        self.index: int = 0 if alone else jax.process_index()
        self.count: int = 1 if alone else jax.process_count()
        self.timeout_s = timeout_s
        self._prefix = f"ckptmgr/{name}"
        self._client = distributed.global_state.client if self.count > 1 else None
        self._number = 0  # of the next entry of the log
        self._is_saying = False
        self._kept: list[str] = []  # entries that may not have been read by all
        self._given_up: set[Call] = set()
        self._turn = threading.RLock()
        self.waits_for: str = ""
        """What is being waited for now."""

    @property
    def leads(self) -> bool:
        """Whether this process decides, and does what is done once for all."""
        return self.index == 0

    # ------------------------------------------------------------ who works

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Inside it this process says again and again that it works, and the others wait for it on and on.

        So a slow save does not fail. A process that is gone, or stopped, says nothing.
        """
        if self._client is None:
            yield
            return
        done = Moment()
        threading.Thread(target=self._say_working, args=(done,), name="ckptmgr: working", daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _say_working(self, done: Moment) -> None:
        assert self._client is not None
        for number in itertools.count():
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator does not answer
                key = f"{self._prefix}/works/{self.index}"
                self._client.key_value_set(key, str(number), allow_overwrite=True)
            if done.wait(self.beat_s):
                return

    @property
    def beat_s(self) -> float:
        """How often a process that works says so."""
        return min(self.timeout_s / 10, _LONGEST_BEAT_S)

    def works(self) -> dict[int, str]:
        """What each process that works has said last."""
        assert self._client is not None
        try:
            entries = self._client.key_value_dir_get(f"{self._prefix}/works/")
        except jax.errors.JaxRuntimeError:  # the coordinator does not answer
            return {}
        return {int(key.rpartition("/")[2]): value for key, value in entries}

    # ------------------------------------------------------------ the calls

    def decide(self, call: Call, decide: Callable[[], Result]) -> Result:
        """What `decide` returns or raises in process 0, in all; the result goes through JSON."""
        if self._client is None:
            return decide()
        with self._turn:
            if not self.leads:
                found: Result = self._listen(call, Report())
                return found
            try:
                decided = decide()
            except Exception as problem:
                self._say(call, error=_pack(problem))
                raise
            self._say(call, found=decided)
            return decided

    def tell(self, call: Call, problem: Exception | None = None) -> None:
        """Process 0 says that it has come so far, or raises `problem` in all."""

        def fail() -> None:
            if problem is not None:
                raise problem

        self.decide(call, fail)

    def together(
        self, call: Call, action: Callable[[], Result], spec: Callable[[Result], Spec] | None = None
    ) -> Result:
        """Does something in every process; what fails in one fails in all.

        With `spec` all must have found the same, or all raise a SaveError that names the first difference.
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
        """Waits for all processes; raises `problem`, or what another process has to tell.

        Raises CheckpointTimeoutError that names the processes that did not come.
        """
        if self._client is not None:
            try:
                self._share(call, Report(_pack(problem)), is_late=isinstance(problem, CheckpointTimeoutError))
            except Exception as other:
                raise problem or other from None
        if problem is not None:
            raise problem

    def collect(self, call: Call, found: Any) -> list[Any]:
        """What each process has found, in process 0 and in order; in the others an empty list."""
        if self._client is None:
            return [found]
        with self._turn:
            if not self.leads:
                self._listen(call, Report(found=found))
                return []
            reports = self._gather_or_say(call, Report(found=found))
            self._say(call)
            return [report.found for report in reports]

    def _share(self, call: Call, report: Report, *, is_late: bool = False) -> list[bool]:
        """For each part of `found` whether it differs in any process."""
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
                raise _unpack(failed, self.index)
            return differs

    def _reconcile(self, call: Call, spec: Spec, is_other: bool, has_other_owners: bool, *is_own: bool) -> None:
        """Raises what differs; all lines are sent for that, so it is not done unless something differs."""
        if is_other:
            found = self.collect(Call(f"what differs in {call.what}", call.step), _squeeze(spec.lines()))

            def refuse() -> None:
                raise SaveError(_difference(call, [_expand(each) for each in found]), step=call.step)

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
            self._number += 1  # an interrupt came when the entry was made and not yet counted
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
            self._say(call, error=_pack(problem))
            raise
        finally:
            self.waits_for = ""

    def _gather(self, call: Call, own: Report) -> list[Report]:
        """The reports of all processes, once all have come to this call."""
        patience, pause_s = _Patience(self), _FIRST_PAUSE_S
        while True:
            here = self._here()
            elsewhere = {i: at for i, (at, _) in here.items() if at != call}
            reports = {0: own} | {i: report for i, (at, report) in here.items() if at == call}
            if len(reports) == self.count or any(_is_late(each.error) for each in reports.values()):
                self._tidy()
                return [reports.get(i, Report()) for i in range(self.count)]
            if any(at.is_before(call) for at in elsewhere.values()):
                self._say(call, is_note=True)  # tells those that left out this process's call, or made one more
            elif elsewhere:
                raise self._left_out(call, elsewhere)
            elif silent := patience.silent(set(range(self.count)) - set(reports)):
                raise self._late(call, silent)
            elif pause_s == _FIRST_PAUSE_S:
                self._come(call, own)
            self.waits_for = f"{spell(sorted(set(range(self.count)) - set(reports)))} at {call}"
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _tidy(self) -> None:
        """All processes have come to this entry of the log, so they have read those before it."""
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
        """What process 0 has found at this call; raises what failed in any process."""
        while True:
            self._come(call, report)
            if is_late:  # this process has waited long enough, and says so
                self._given_up.add(call)
                return None
            said = self._next(call)
            about = Call(*said["call"])
            if about == call:
                self._number += 1
                if said.get("is_note"):
                    continue
                if said.get("error") is not None:
                    raise _unpack(said["error"], self.index)
                return said.get("found")
            if call.is_before(about):
                raise self._left_out(call, {0: about})
            self._number += 1
            if not about.is_before(call) and about not in self._given_up:
                raise self._left_out(call, {0: about})

    def _next(self, call: Call) -> Any:
        """The next entry of the log."""
        assert self._client is not None
        self.waits_for = f"process 0 at {call}"
        patience, key = _Patience(self), f"{self._prefix}/log/{self._number}"
        try:
            while True:
                began = time.monotonic()
                try:
                    return json.loads(self._client.blocking_key_value_get(key, max(1, int(self.beat_s * 1000))))
                except jax.errors.JaxRuntimeError as problem:
                    is_answered = time.monotonic() - began > self.beat_s / 2  # else the coordinator is gone
                    if not is_answered or patience.silent({0}):
                        self._given_up.add(call)
                        present = {i for i, (at, _) in self._here().items() if at == call} | {self.index}
                        raise self._late(call, set(range(self.count)) - present or {0}) from problem
        finally:
            self.waits_for = ""

    # ------------------------------------------------------------ who is where

    def _here(self) -> dict[int, tuple[Call, Report]]:
        """At which call each process is that waits for the next entry of the log."""
        assert self._client is not None
        try:
            entries = self._client.key_value_dir_get(f"{self._prefix}/here/")
        except jax.errors.JaxRuntimeError:  # the coordinator does not answer
            return {}
        said = {int(key.rpartition("/")[2]): json.loads(value) for key, value in entries}
        return {
            i: (Call(*call), Report(*report))
            for i, (call, number, report) in said.items()
            if number == self._number
        }

    def _late(self, call: Call, missing: set[int]) -> CheckpointTimeoutError:
        waiting_for = f"{spell(sorted(missing))} of {self.count} at {call}"
        return CheckpointTimeoutError(
            f"{waiting_for} did not come in {self.timeout_s} s", waiting_for=waiting_for, missing=sorted(missing)
        )

    def _left_out(self, call: Call, elsewhere: Mapping[int, Call]) -> CheckpointError:
        index, at = min(elsewhere.items())
        return CheckpointError(
            f"process {index} did not make {call}: it is at {at}. "
            "All processes of a job make the same calls, in the same order"
        )


class _Patience:
    """How long processes are waited for: `timeout_s` from when each was last known to work, or from the start."""

    def __init__(self, job: Job) -> None:
        self._job, self._began = job, time.monotonic()
        self._looked_at = self._began
        self._said: dict[int, str] = {}
        self._heard_at: dict[int, float] = {}

    def silent(self, processes: Collection[int]) -> set[int]:
        """Those of the processes that have been waited for long enough."""
        now = time.monotonic()
        if now - self._looked_at >= self._job.beat_s / 2:
            said, self._looked_at = self._job.works(), now
            self._heard_at |= {i: now for i, each in said.items() if self._said and self._said.get(i) != each}
            self._said = said or self._said
        ends = {i: self._heard_at.get(i, self._began) + self._job.timeout_s for i in processes}
        return {i for i in processes if now > ends[i]}


_shared: dict[str, Job] = {}


def shared(name: str, timeout_s: float) -> Job:
    """The one line of calls of this name in this process."""
    found = _shared.setdefault(name, Job(name, timeout_s))
    found.timeout_s = timeout_s
    return found


def new_name() -> str:
    """A new name for lines of calls; process 0 tells it, as it may have opened more runs than the others."""
    return f"run {next(_epochs)}"


def spell(processes: Sequence[int]) -> str:
    return f"process{'es' * (len(processes) > 1)} {', '.join(map(str, processes))}"


# ---------------------------------------------------------------- what differs


def _squeeze(lines: Sequence[str]) -> str:
    return base64.b64encode(zlib.compress("\n".join(lines).encode())).decode()


def _expand(squeezed: str) -> list[str]:
    return zlib.decompress(base64.b64decode(squeezed)).decode().split("\n")


def _difference(call: Call, found: Sequence[Sequence[str]]) -> str:
    """The first line that differs, and in which processes; a line begins with the path of a leaf and a tab."""
    others = [index for index, lines in enumerate(found) if lines != found[0]]
    ours, theirs = (dict(line.split("\t", 1) for line in found[index] if line) for index in (0, others[0]))
    differing = [path for path in {**ours, **theirs} if ours.get(path) != theirs.get(path)]
    path = min(differing, key=lambda path: " " in path.partition("[")[0], default="the order of the leaves")
    return (
        f"{call} is refused, in all processes: what they give differs. The first difference is {path}: "
        f"{ours.get(path, 'missing')} in process 0, {theirs.get(path, 'missing')} in {spell(others)}"
    )


# ---------------------------------------------------------------- errors of other processes


class OtherProcessError(CheckpointError):
    """Something failed in another process of the job; `kind` is the name of the error's type there."""

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


def _pack(problem: Exception | None) -> Mapping[str, Any] | None:
    if problem is None:
        return None
    facts = {name: value for name, value in vars(problem).items() if not name.startswith("_")}
    try:
        json.dumps(facts)
    except (TypeError, ValueError):
        facts = {}
    origin = jax.process_index()
    return {"kind": type(problem).__name__, "message": str(problem), "facts": facts, "process": origin}


def _unpack(packed: Mapping[str, Any], here: int) -> Exception:
    """The error as another process raised it, of the same type if it is one of ours."""
    message = packed["message"]
    if packed["process"] != here:
        message = f"process {packed['process']}: {message}"
    kind = getattr(errors, packed["kind"], None) or {"ValueError": ValueError, "TypeError": TypeError}.get(
        packed["kind"]
    )
    try:
        return kind(message, **packed["facts"])  # type: ignore[misc]
    except TypeError:
        return OtherProcessError(message, kind=packed["kind"])


def _is_late(packed: Mapping[str, Any] | None) -> bool:
    return packed is not None and packed["kind"] == CheckpointTimeoutError.__name__
