"""The mirror of a run: a second directory to which every committed checkpoint is copied in the background.

A copy begins as a draft. Its first file tells which save it is of. The draft is read back whole, and then becomes
a step: by a rename on a disk, by a last file in a bucket. A draft that a crash has left is continued if it is of
the same save. The mirror is a run directory like any other.

In a job process 0 does this, and the others help with the steps that they save (`parts`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from etils import epath

from ckptmgr.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    NewerFormatError,
    SaveError,
)
from ckptmgr.format import files, names, paths
from ckptmgr.format import manifest as manifests
from ckptmgr.policies import KeepPolicy
from ckptmgr.processes import background as lifecycle
from ckptmgr.processes.job import Job
from ckptmgr.results import CheckpointInfo
from ckptmgr.run import branches, history, reducing, retention, transfer, verifying
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.parts import Offer, Parts

_log = logging.getLogger("ckptmgr")
Found = TypeVar("Found")
_MAY_GO = {names.PIN, names.TRUST}
"""Files of a step that somebody may remove at any moment."""


class Mirror:
    """Copies the steps of `home` that `keep` wants to `away`, the newest first; deletes the others in `away`."""

    def __init__(
        self,
        home: Catalog,
        away: Catalog,
        keep: Sequence[KeepPolicy],
        timeout_s: float,
        background: lifecycle.Background,
        job: Job,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.catalog = away
        self._now = now
        self.history = history.History(away, keep)
        self._home, self._keep = home, keep
        self._timeout_s, self._background = timeout_s, background
        self._parts = Parts(job, away.directory)
        self._at_work = threading.Lock()  # a rewind does not run beside copies and deletions
        self._to_copy: set[int] | None = None  # None before the first look
        self._announced: set[int] = set()
        self._damaged: set[tuple[int, float]] = set()  # at home: never copied
        self._put_off: set[tuple[int, float]] = set()  # the next save tries again

    def steps(self, *, needed: bool) -> list[int]:
        """The steps of the mirror; none if it cannot be reached. If they are `needed`, that raises."""
        return self._ask(self.catalog.steps, needed)

    def infos(self, *, needed: bool) -> list[CheckpointInfo]:
        """The infos of these steps, in the same way."""
        return self._ask(self.history.all, needed)

    def _ask(self, look: Callable[[], list[Found]], needed: bool) -> list[Found]:
        try:
            return look()
        except Exception as problem:  # of every library below
            if needed:
                raise
            _log.warning("the mirror %s cannot be read: %s", self.catalog.directory, problem)
            return []

    def copy_later(self, then: Callable[[], None], *saved: int, together: bool) -> None:
        """Notes new steps to copy; returns at once.

        `then` is called once everything is copied, or copying has failed. In a job the other processes help with
        these steps if the mirror is of the manager that saved them (`together`).
        """
        self._announced.update(saved)
        for step in saved if together and self._parts.is_shared else ():  # the others make one call for each
            self._add(functools.partial(self._run, then, step))
        if not self._is_ahead():  # a task that has not begun will copy them
            self._add(lambda: self._run(then))

    def help_later(self, step: int) -> None:
        """In processes other than 0: copies what this process wrote of a new step; returns at once."""
        self._add(lambda: self._parts.help(step, self._home.path(step)))

    def _add(self, run: Callable[[], None]) -> None:
        what = f"the copy to {self.catalog.directory}"
        self._background.add(lifecycle.Task(what, run, self._timeout_s, self))

    def _is_ahead(self) -> bool:
        """Whether a task waits: it will copy what is missing then."""
        return any(task.about is self and not task.has_begun for task in self._background.waiting())

    def not_yet_copied(self, step: int) -> bool:
        """Whether a step is still to be copied: then it must not be deleted at home yet.

        If copying fails, retention may still delete local steps, so that the disk does not fill.
        """
        return self._to_copy is None or step in self._to_copy or step in self._announced

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until nothing is being copied."""
        self._background.wait(self._timeout_s if timeout_s is None else timeout_s)

    def rewind(self, plan: branches.Plan) -> None:
        """Makes the moves of a rewind in the mirror; raises what the storage raises."""
        with self._at_work:
            self.catalog.rewind(plan)

    def _run(self, then: Callable[[], None], shared: int | None = None) -> None:
        """Copies a step that all processes share, then what is missing."""
        try:
            with self._at_work, self._parts.working():
                self._put_off.clear()
                with self._parts.offer(shared) as offer:
                    self._prepare()
                    if shared is not None:
                        self._copy_wanted(shared, self._look(), offer)
                self._catch_up()
        except Exception as problem:  # of every library below; training goes on without its mirror
            _log.error(
                "the mirror %s cannot be written to; the next save tries again: %s",
                self.catalog.directory, problem,
            )  # fmt: skip
            self._to_copy = set()
            self._announced.clear()
        then()

    def _prepare(self) -> None:
        self.catalog.prepare()
        self.catalog.finish_rewind()

    def _catch_up(self) -> None:
        """Copies what is missing. In a job a step that all processes copy comes first; then this goes on."""
        while not self._makes_way() and (to_copy := self._look()):
            self._copy_wanted(max(to_copy), to_copy)
        self._copy_pins_and_trust()
        retention.retain(self.catalog, self.history, now=self._now)
        if not self._makes_way():  # a draft that a crash has left is still to be continued
            self.catalog.tidy()

    def _makes_way(self) -> bool:
        return self._parts.is_shared and self._is_ahead()

    def _copy_pins_and_trust(self) -> None:
        """Pins, unpins, trusts and distrusts steps in the mirror as they are at home."""
        here, there = self._home.pinned(), self.catalog.pinned()
        shared = set(self._home.steps()) & set(self.catalog.steps())
        for step in shared & (here - there):
            self.catalog.pin(step)
        for step in shared & (there - here):
            self.catalog.unpin(step)
        for step in shared:
            note = self._home.trust_note(step)
            if note != self.catalog.trust_note(step):
                self.catalog.write_trust(step, note)

    def _copy_wanted(self, step: int, to_copy: Mapping[int, float], offer: Offer | None = None) -> None:
        """Copies a step if it is one of these. If the copy alone is found damaged, it is made once more."""
        if step not in to_copy:
            return
        problem = self._problem_of_copy(step, offer)
        if isinstance(problem, CorruptCheckpointError) and self._is_whole(step):
            problem = self._problem_of_copy(step, None)
        if problem is None:
            _log.info("step %d copied to %s", step, self.catalog.directory)
        elif self._is_still_there(step, to_copy[step]):
            is_whole = isinstance(problem, SaveError) or self._is_whole(step)
            (self._put_off if is_whole else self._damaged).add((step, to_copy[step]))
            again = "; the next save tries again if the step is still there" if is_whole else ""
            _log.error("step %d is not copied to %s: %s%s", step, self.catalog.directory, problem, again)

    def _problem_of_copy(self, step: int, offer: Offer | None) -> Exception | None:
        """Copies a step. Returns what was wrong with it or with its copy; raises if the storage has failed."""
        try:
            self._copy(step, offer)
        except (CheckpointError, FileNotFoundError) as problem:
            if isinstance(problem, SaveError) and problem.__cause__ is not None:
                raise
            return problem
        return None

    def _is_whole(self, step: int) -> bool:
        """Reads a step at home. False if it is damaged; True also if it was deleted meanwhile."""
        try:
            return bool(verifying.verify_step(self._home, step, None))
        except CheckpointNotFoundError:
            return True
        except CheckpointError:
            return False

    def _is_still_there(self, step: int, time: float) -> bool:
        """Whether the step at home is still the one that was saved at this time, damaged or not."""
        try:
            return self._home.manifest(step, fresh=True).time == time
        except CheckpointNotFoundError:
            return False
        except CheckpointError:
            return True

    def _look(self) -> dict[int, float]:
        """The steps to copy now, and when each was saved."""
        taken = set(self._announced)
        here = {info.step: info for info in history.History(self._home, ()).all() if info.distrusted is None}
        there = {info.step: info for info in self.history.all()}
        both = there | here | _whole_there(here, there)
        known = [both[step] for step in sorted(both)]  # a policy is promised the order of steps
        wanted = {info.step for info in history.explain(known, self._keep) if info.kept}
        missing = {step for step in here if step in wanted and self._lacks(step)}
        left_out = self._damaged | self._put_off
        to_copy = {step: here[step].time for step in missing if (step, here[step].time) not in left_out}
        self._to_copy = set(to_copy)  # before the next line: `not_yet_copied` looks at both sets
        self._announced.difference_update(taken)
        return to_copy

    def _lacks(self, step: int) -> bool:
        """Whether the mirror lacks this save of the step: it has none, or an earlier one of the same number."""
        try:
            here = self._home.manifest(step)
        except CheckpointNotFoundError:
            return False  # deleted at home meanwhile: the copy stays
        try:
            there = self.catalog.manifest(step)
        except (CheckpointNotFoundError, CorruptCheckpointError):
            return True
        except NewerFormatError:
            return False  # a later ckptmgr wrote the copy: it is left alone
        return not reducing.is_same_save(here, there)

    def _copy(self, step: int, offer: Offer | None = None) -> None:
        source = self._home.require(step)
        draft = self._begin(step, source)
        if offer is not None:
            self._parts.share(step, source, draft, offer)
        sizes, there = files.walk(source)[1], files.walk(draft)[1]
        transfer.remove(draft, there.keys() - sizes.keys())
        marker = paths.read_bytes(source / names.COMMITTED) if names.COMMITTED in sizes else b""
        missing = {name for name, size in sizes.items() if there.get(name) != size}
        transfer.put(source, draft, sorted(missing - {names.COMMITTED} - _MAY_GO))
        for name in sorted(missing & _MAY_GO):
            with contextlib.suppress(FileNotFoundError):  # somebody has unpinned the step meanwhile, or trusts it
                transfer.put(source, draft, [name])
        self._check(step, draft, marker)
        self.catalog.forget(step)
        files.write(draft / names.COMMITTED, marker)
        files.sync(files.walk(draft)[0])
        self.catalog.publish(step)
        files.sync([self.catalog.directory])

    def _begin(self, step: int, source: epath.Path) -> epath.Path:
        """A draft that holds the file which tells of which save it is, and what was copied of that save before."""
        self.catalog.check_free(step)
        if self.catalog.has(step):
            _log.warning("step %d in %s is from another save, and is replaced", step, self.catalog.directory)
            self.catalog.delete(step, "it is from another save")
        draft = self.catalog.begin(step)
        name = manifests.NAME if (source / manifests.NAME).exists() else names.STEP_METADATA
        if _has_links(draft):
            self.catalog.remove(draft)
        if not transfer.is_equal(source / name, draft / name):
            files.remove_tree(draft)
            transfer.put(source, draft, [name])
        return draft

    def _check(self, step: int, draft: epath.Path, marker: bytes) -> None:
        """Reads the copy back. If it is damaged, the draft is removed, and the copy begins anew."""
        manifest = self._home.manifest(step, fresh=True)  # from home: the copy of the manifest may be damaged
        marked_later = {name: file for name, file in manifest.files.items() if name != names.COMMITTED}
        report = verifying.verify(dataclasses.replace(manifest, files=marked_later), draft, None)
        if not report:
            files.remove_tree(draft)
            raise CorruptCheckpointError(f"the copy is damaged: {report}", step=step)
        meant = manifest.files.get(names.COMMITTED)
        if meant is not None and meant.crc32 not in (None, zlib.crc32(marker)):
            files.remove_tree(draft)
            raise CorruptCheckpointError(f"the copy is damaged: {names.COMMITTED} is not as recorded", step=step)


def _whole_there(
    here: Mapping[int, CheckpointInfo], there: Mapping[int, CheckpointInfo]
) -> dict[int, CheckpointInfo]:
    """The steps of the mirror that are whole there, and were reduced here."""
    return {
        step: info
        for step, info in there.items()
        if info.reduced is None and step in here and here[step].reduced and here[step].time == info.time
    }


def _has_links(draft: epath.Path) -> bool:
    """Whether a draft that was begun before holds symlinks, through which a copy would write."""
    if not paths.is_local(draft):
        return False
    below = (os.path.join(folder, name) for folder, *found in os.walk(draft) for names in found for name in names)
    return any(map(os.path.islink, [draft, *below]))
