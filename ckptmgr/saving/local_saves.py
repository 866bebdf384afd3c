"""Local saves (`local=`): each process writes its part of a step on its own machine, and fetches a neighbour's.

As with a durable save, the caller only copies; all that follows is done by a thread. A local save that fails is
logged and harms nothing else: the run goes on, and its durable saves do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Iterator

from etils import epath

from ckptmgr import policies
from ckptmgr.arrays import writing
from ckptmgr.clock import Clock
from ckptmgr.errors import SaveError
from ckptmgr.format import files
from ckptmgr.format import manifest as manifests
from ckptmgr.options import Options
from ckptmgr.processes.job import Call
from ckptmgr.results import CheckpointInfo, Save
from ckptmgr.run import tier as tiers
from ckptmgr.run.history import History
from ckptmgr.run.lock import Shared
from ckptmgr.run.nearby import Nearby
from ckptmgr.saving.copying import Copied
from ckptmgr.saving.queue import Act, Pending

_log = logging.getLogger("ckptmgr")


class LocalSaver:
    """Saves parts of steps for one manager."""

    def __init__(self, options: Options, clock: Clock, history: History, nearby: Nearby) -> None:
        self._options, self._clock, self._history = options, clock, history
        self._nearby, self._tier, self._job = nearby, nearby.tier, nearby.saving
        self.pending = Pending(options.timeout_s, self._job, Shared(), " locally")
        self._last: CheckpointInfo | None = None
        self._turns = itertools.count()

    def is_due(self, step: int) -> bool:
        """Whether `local_every` wants this step; in all processes alike."""

        def decide() -> bool:
            return policies.is_due(self._options.local_every, step, now=self._clock.now(), last=self._last)

        if policies.need_no_time(self._options.local_every):
            return decide()
        return self._nearby.line.decide(Call("the decision about a local save", step), decide)

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until the local save before is over: then the next one may be copied."""
        self.pending.join(timeout_s)
        self._let_go_of_ended()

    def _let_go_of_ended(self) -> None:
        with contextlib.suppress(SaveError):  # a failure has been logged, and no later call raises it
            self.pending.raise_failure()

    def close(self) -> None:
        """Waits, then serves no parts to other processes any more: all have what they wanted by then."""
        self.wait()
        self._nearby.close()

    def start(self, copied: Copied, called: float) -> Save:
        """Starts the writing of a part in the thread."""
        self._last = CheckpointInfo(step=copied.step, time=self._clock.now())
        self._let_go_of_ended()
        act = Act(lambda: self._commit(copied, called), let_go=copied.release)
        return self.pending.start(copied.step, act)

    def fail(self, step: int, problem: Exception) -> None:
        """Tells the other processes that the local save of a step has failed here, before it began."""
        if self._job.count > 1:
            self.pending.fail(step, problem)

    def after_rewind(self) -> None:
        """What was saved locally is of the branch that the run has left."""
        self.wait()
        self._nearby.begin_anew()
        self._last = None

    def forget(self, step: int) -> None:
        """A step is deleted."""
        self.wait()
        self._tier.forget(step)

    # ------------------------------------------------------------ in the thread

    def _commit(self, copied: Copied, called: float) -> CheckpointInfo:
        step, call = copied.step, Call("the save", copied.step)
        with self._job.working():
            self._job.together(call, copied.spec, lambda found: found)
            start, turn = self._job.decide(call, lambda: [self._nearby.current_start(), next(self._turns)])
            part = tiers.Part(tiers.Group(start, turn, step, self._job.count), self._job.index)
            with contextlib.ExitStack() as drafts:

                def write() -> tuple[epath.Path, manifests.Manifest]:
                    draft = drafts.enter_context(self._draft())
                    return draft, self._write(copied, part, draft)

                written = Call("the local parts", step)
                draft, manifest = self._job.together(written, write)
                distrusted = self._verdict(copied)
                if distrusted is None:  # all have written
                    self._job.together(written, lambda: self._tier.publish(draft, part))
            if distrusted is None:
                self._fetch_neighbours(part)
                self._job.share(Call("the neighbours' parts", step))
                self._tier.keep(self._options.local_keep, part.group)
        info = dataclasses.replace(self._history.glance(manifest), source=str(self._tier), distrusted=distrusted)
        return dataclasses.replace(info, durable_s=time.perf_counter() - called)

    @contextlib.contextmanager
    def _draft(self) -> Iterator[epath.Path]:
        """A folder for a part, which is removed if it is not published."""
        draft = self._tier.draft()
        try:
            yield draft
        finally:
            self._tier.drop(draft)

    def _write(self, copied: Copied, part: tiers.Part, draft: epath.Path) -> manifests.Manifest:
        """Writes what this process has of a step."""
        for name in copied.contents.keys() - copied.snapshots.keys():
            process = part.process if name in copied.own else 0
            file = draft / name / manifests.own_place(process, manifests.json_file(name))
            file.parent.mkdir(parents=True, exist_ok=True)
            files.write(file, json.dumps(copied.contents[name]()).encode(), durable=False)
        for name, snapshot in copied.snapshots.items():
            own = manifests.own_place(part.process) if name in copied.own else f"{writing.PART}{part.process}"
            writing.write(draft / name / own, snapshot, self._options.compression)
        manifest = copied.seal(tiers.sizes(draft))
        tiers.describe(draft, manifest)
        return manifest

    def _verdict(self, copied: Copied) -> str | None:
        """Why a local step is not kept: what `nonfinite` looks for in its parameters was found."""
        if self._options.nonfinite == "ignore":
            return None
        call = Call("what was found in the parameters", copied.step)
        marks = self._job.collect(call, copied.marks())
        why: str | None = self._job.decide(call, lambda: copied.verdict(marks))
        if why is not None and self._options.nonfinite == "refuse":
            raise SaveError(f'{why} (nonfinite="refuse"); no local step is kept', step=copied.step)
        if why is not None:
            _log.warning("step %d is not kept as a local step: %s", copied.step, why)
        return why

    def _fetch_neighbours(self, part: tiers.Part) -> None:
        """Copies the part of the neighbour; if that fails, there is one copy of it."""
        for process in self._nearby.kept_for:
            wanted = part._replace(process=process)
            try:
                with self._draft() as draft:
                    self._nearby.fetch(wanted, [process], draft)
                    self._tier.publish(draft, wanted)
            except Exception as problem:  # of the network, or of that machine
                _log.warning(
                    "local step %d: process %d has no copy of the part of process %d: %s",
                    part.group.step, part.process, process, problem,
                )  # fmt: skip
