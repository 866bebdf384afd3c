"""The mirror of a run: a second directory to which every committed checkpoint is copied in the background.

A copy begins as a draft. Its first file tells which save it is of. The draft is read back whole, and then becomes
a step: by a rename on a disk, by a last file in a bucket. A draft that a crash has left is continued if it is of
the same save. The mirror is a run directory like any other.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import fsspec
from etils import epath
from etils.epath import backend

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
from ckptmgr.results import CheckpointInfo
from ckptmgr.run import branches, history, retention, verifying
from ckptmgr.run.catalog import Catalog

_log = logging.getLogger("ckptmgr")
Found = TypeVar("Found")


class Mirror:
    """Copies the steps of `home` that `keep` wants to `away`, the newest first; deletes the others in `away`."""

    def __init__(
        self,
        home: Catalog,
        away: Catalog,
        keep: Sequence[KeepPolicy],
        timeout_s: float,
        background: lifecycle.Background,
    ) -> None:
        self.catalog = away
        self.history = history.History(away, keep)
        self._home, self._keep = home, keep
        self._timeout_s, self._background = timeout_s, background
        self._at_work = threading.Lock()  # a rewind does not run beside copies and deletions
        self._to_copy: set[int] | None = None  # None before the first look
        self._announced: set[int] = set()
        self._known_bad: set[tuple[int, float]] = set()

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

    def copy_later(self, then: Callable[[], None], *saved: int) -> None:
        """Notes new steps to copy; returns at once.

        `then` is called once everything is copied, or copying has failed.
        """
        self._announced.update(saved)
        ahead = [task for task in self._background.waiting() if task.about is self and not task.has_begun]
        if not ahead:  # a task that has not begun will copy them
            what = f"the copy to {self.catalog.directory}"
            self._background.add(lifecycle.Task(what, lambda: self._run(then), self._timeout_s, self))

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

    def _run(self, then: Callable[[], None]) -> None:
        try:
            with self._at_work:
                self._catch_up()
        except Exception as problem:  # of every library below; training goes on without its mirror
            _log.error(
                "the mirror %s cannot be written to; the next save tries again: %s",
                self.catalog.directory, problem,
            )  # fmt: skip
            self._to_copy = set()
            self._announced.clear()
        then()

    def _catch_up(self) -> None:
        self.catalog.prepare()
        self.catalog.finish_rewind()
        while to_copy := self._look():
            step = max(to_copy)
            if not self._copied(step, to_copy[step]):
                self._known_bad.add((step, to_copy[step]))
        self._copy_pins()
        retention.retain(self.catalog, self.history)
        self.catalog.tidy()

    def _copy_pins(self) -> None:
        """Pins and unpins steps in the mirror as they are at home."""
        here, there = self._home.pinned(), self.catalog.pinned()
        shared = set(self._home.steps()) & set(self.catalog.steps())
        for step in shared & (here - there):
            self.catalog.pin(step)
        for step in shared & (there - here):
            self.catalog.unpin(step)

    def _copied(self, step: int, time: float) -> bool:
        """Copies a step. False if it is damaged at home; True also if it was deleted or replaced meanwhile."""
        try:
            self._copy(step)
        except (CheckpointError, FileNotFoundError) as problem:
            if isinstance(problem, SaveError) and problem.__cause__ is not None:
                raise  # the storage has failed, not the step
            if not self._is_still_there(step, time):
                return True
            _log.error("step %d is not copied to %s: %s", step, self.catalog.directory, problem)
            return False
        _log.info("step %d copied to %s", step, self.catalog.directory)
        return True

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
        wanted = {info.step for info in history.explain(list((there | here).values()), self._keep) if info.kept}
        missing = {step for step in here if step in wanted and self._lacks(step)}
        to_copy = {step: here[step].time for step in missing if (step, here[step].time) not in self._known_bad}
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
        return (here.time, here.files) != (there.time, there.files)

    def _copy(self, step: int) -> None:
        source = self._home.require(step)
        self.catalog.check_free(step)
        if self.catalog.has(step):
            _log.warning("step %d in %s is from another save, and is replaced", step, self.catalog.directory)
            self.catalog.delete(step)
        draft = self.catalog.begin(step)
        name = manifests.NAME if (source / manifests.NAME).exists() else names.STEP_METADATA
        if _has_links(draft):
            self.catalog.remove(draft)
        if not _is_equal(source / name, draft / name):
            if draft.exists():
                draft.rmtree()
            _put(source, draft, [name])
        sizes, there = files.walk(source)[1], files.walk(draft)[1]
        marker = paths.read_bytes(source / names.COMMITTED) if names.COMMITTED in sizes else b""
        missing = {name for name, size in sizes.items() if there.get(name) != size}
        _put(source, draft, sorted(missing - {names.COMMITTED}))
        self._check(step, draft)
        self.catalog.forget(step)
        files.write(draft / names.COMMITTED, marker)
        files.sync(files.walk(draft)[0])
        self.catalog.publish(step)
        files.sync([self.catalog.directory])

    def _check(self, step: int, draft: epath.Path) -> None:
        """Reads the copy back; one that is damaged, here or at its source, is begun anew another time."""
        manifest = self._home.manifest(step, fresh=True)  # the draft has the file, which may be damaged by now
        marked_later = {name: file for name, file in manifest.files.items() if name != names.COMMITTED}
        report = verifying.verify(dataclasses.replace(manifest, files=marked_later), draft, None)
        if not report:
            draft.rmtree()
            raise CorruptCheckpointError(f"the copy is damaged: {report}", step=step)


def _is_equal(one: epath.Path, other: epath.Path) -> bool:
    return bool(other.exists() and paths.read_bytes(one) == paths.read_bytes(other))


def _has_links(draft: epath.Path) -> bool:
    """Whether a draft that was begun before holds symlinks, through which a copy would write."""
    if not paths.is_local(draft):
        return False
    below = (os.path.join(folder, name) for folder, *found in os.walk(draft) for names in found for name in names)
    return any(map(os.path.islink, [draft, *below]))


def _put(source: epath.Path, draft: epath.Path, names: Sequence[str]) -> None:
    """Copies files; each is durable when this returns."""
    if names:
        _client(draft).put([str(source / name) for name in names], [str(draft / name) for name in names])
    for name in names:
        files.flush(draft / name)


def _client(directory: epath.Path) -> Any:
    """The client that copies into a directory, without its old listings."""
    if paths.is_local(directory):
        return fsspec.filesystem("file", auto_mkdir=True)
    client = backend.fsspec_backend.fs(str(directory))
    client.invalidate_cache()
    return client
