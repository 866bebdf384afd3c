"""The processes of a job copy a step to the mirror together: each the data files that it wrote itself.

Process 0 begins the copy and tells the others where it is. Each copies its part. Process 0 waits for them, copies
what is missing then, checks the whole, and publishes it: what another process does or leaves out changes who
copies a file, and nothing else.

The names of data files are random, and a file gets its name once it is whole. So a process that comes too late
puts nothing in the place of another file.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Self

from etils import epath

from ckptmgr.arrays import writing
from ckptmgr.errors import CheckpointError, CheckpointTimeoutError
from ckptmgr.format import files, names
from ckptmgr.format import manifest as manifests
from ckptmgr.processes.job import Call, Job
from ckptmgr.run import transfer
from ckptmgr.units import format_bytes

_log = logging.getLogger("ckptmgr")


class Parts:
    """What the processes tell each other about copies; in a line of calls of its own, behind the caller."""

    def __init__(self, job: Job, away: epath.Path) -> None:
        self._job, self._away = job, away
        self._is_alone = False
        """Whether process 0 goes on without the others: one of them did not come."""

    @property
    def is_shared(self) -> bool:
        """Whether there are other processes."""
        return self._job.count > 1

    def working(self) -> contextlib.AbstractContextManager[None]:
        """Inside it the others wait for this process, however long it copies."""
        return self._job.working()

    # ------------------------------------------------------------ process 0

    def share(self, step: int, source: epath.Path, draft: epath.Path, offer: Offer) -> None:
        """Copies the part of process 0, and waits until the others have copied theirs, or one does not come."""
        if self._is_alone:
            return
        offer.make(str(draft).removeprefix(f"{self._away}/"))
        try:
            nbytes = self._put_own(step, source, draft)
        finally:
            self._wait(step)
        _log.info("step %d: process %d has copied %s", step, self._job.index, format_bytes(nbytes))

    def _wait(self, step: int) -> None:
        try:
            self._job.collect(_copied(step), None)
        except CheckpointError as problem:
            self._is_alone = isinstance(problem, CheckpointTimeoutError)
            _log.warning("step %d: process 0 copies the parts of other processes too: %s", step, problem)

    def offer(self, step: int | None) -> Offer:
        """What process 0 tells the others about a step that all have saved; about None it tells nothing."""
        return Offer(self._job, step)

    # ------------------------------------------------------------ the others

    def help(self, step: int, source: epath.Path) -> None:
        """Copies the part of this process, if process 0 copies the step. After a failure process 0 copies it."""
        try:
            with self.working():
                place: str | None = self._job.decide(_copy(step), lambda: None)
                if place is not None:
                    nbytes = self._try(step, source, self._away / place)
                    self._job.collect(_copied(step), None)
                    _log.info("step %d: process %d has copied %s", step, self._job.index, format_bytes(nbytes))
        except Exception as problem:  # of the job
            _log.warning("step %d: process 0 copies it without process %d: %s", step, self._job.index, problem)

    def _try(self, step: int, source: epath.Path, draft: epath.Path) -> int:
        try:
            return self._put_own(step, source, draft)
        except Exception as problem:  # of every library below
            _log.warning("step %d: process %d could not copy its part: %s", step, self._job.index, problem)
            return 0

    def _put_own(self, step: int, source: epath.Path, draft: epath.Path) -> int:
        """Copies the data files that this process wrote; returns their bytes.

        The draft is looked at before each: process 0 may have gone on without this process.
        """
        nbytes = 0
        for name, size in self._own(files.walk(source)[1]):
            if _is_open(source, draft) and not (draft / name).exists():
                transfer.put(source, draft, [name])
                nbytes += size
        return nbytes

    def _own(self, sizes: dict[str, int]) -> Iterator[tuple[str, int]]:
        here = self._job.index
        folders = {f"{writing.PART}{here}", manifests.own_place(here)}
        for name, size in sizes.items():
            if name.split("/")[-2:-1] == ["d"] and name.split("/")[-3] in folders:
                yield name, size


class Offer:
    """What process 0 tells the others about one step, once: where its copy is made, or that none is."""

    def __init__(self, job: Job, step: int | None) -> None:
        self._job, self._step = job, step

    def make(self, place: str | None) -> None:
        step, self._step = self._step, None
        if step is not None:
            self._job.decide(_copy(step), lambda: place)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.make(None)


def _copy(step: int) -> Call:
    return Call("the copy to the mirror", step)


def _copied(step: int) -> Call:
    return Call("the parts of the copy", step)


def _is_open(source: epath.Path, draft: epath.Path) -> bool:
    """Whether the draft is seen here, is of this save, and is not published."""
    is_of_it = transfer.is_equal(source / manifests.NAME, draft / manifests.NAME)
    return is_of_it and not (draft / names.COMMITTED).exists()
