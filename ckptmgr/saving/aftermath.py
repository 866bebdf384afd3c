"""After a commit: journal, callbacks, mirror, retention. Also a failed save, a deletion, a mark, a rewind."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence

from etils import epath

from ckptmgr import policies
from ckptmgr.cadence import Choice
from ckptmgr.errors import CheckpointError, SaveError
from ckptmgr.format import names, paths
from ckptmgr.options import Options
from ckptmgr.processes.job import Job
from ckptmgr.results import CheckpointInfo, Save
from ckptmgr.run import branches, identity, retention, rewinding, trust
from ckptmgr.run.catalog import ASKED_FOR, Catalog, open_catalog
from ckptmgr.run.history import History
from ckptmgr.run.journal import Journal, last_saved
from ckptmgr.run.lock import Shared, Writer
from ckptmgr.run.mirror import Mirror
from ckptmgr.units import format_bytes, format_rate, format_s

_log = logging.getLogger("ckptmgr")


def check_beside(options: Options, home: epath.Path) -> None:
    """Raises ValueError for a mirror or a local directory that cannot be used, before anything is written."""
    if options.mirror is not None and not paths.is_local(home):
        raise ValueError(f"mirror={str(options.mirror)!r}: a run in a bucket ({home}) cannot have a mirror")
    for name, place in (("mirror", options.mirror), ("local", options.local)):
        if place is not None:
            _check_outside(f"{name}={str(place)!r}", place, home)


def _check_outside(option: str, place: epath.Path, home: epath.Path) -> None:
    if _real(place) == _real(home):
        raise ValueError(f"{option} is the run itself; choose another directory")
    inside = _real(place).removeprefix(f"{_real(home)}/").split("/")[0]
    if inside == names.OURS or names.STEP.fullmatch(inside):
        raise ValueError(f"{option} is in a step or in .ckptmgr/ of the run; choose another directory")


def _real(directory: epath.Path) -> str:
    return os.path.realpath(directory) if paths.is_local(directory) else str(directory).rstrip("/")


@contextlib.contextmanager
def _reaching(mirror: Mirror, step: int) -> Iterator[None]:
    """An error of the mirror stops a rewind."""
    try:
        yield
    except Exception as problem:  # of every library below
        raise SaveError(
            f"the run does not go back to step {step}, and nothing is changed in its directory: the mirror "
            f"{mirror.catalog.directory} cannot be used, and a restore would take later steps from it: {problem}",
            step=step,
        ) from problem


def _nothing() -> None:
    pass


class Aftermath:
    """What follows a commit; a failure here is logged and harms no save.

    Only process 0 of a job does it. The others copy to the mirror what they wrote.
    """

    def __init__(
        self,
        options: Options,
        home: Catalog,
        history: History,
        job: Job,
        mirror_job: Job,
        journal: Journal,
        shared: Shared,
        writer: Writer | None,
    ) -> None:
        self._options, self._home, self._history = options, home, history
        self._job, self._mirror_job, self._journal = job, mirror_job, journal
        self._has_warned = False
        self._shared = shared
        if shared.committed is None and writer is not None and paths.is_local(home.directory):
            shared.committed = last_saved(home.directory)
        self._writer = writer  # keeps the lock of the run as long as something is still to be copied
        self.mirror = self._open_mirror()
        if self.mirror is not None and writer is not None:
            writer.copies_to(self.mirror)
        for each in (history, *([self.mirror.history] if self.mirror is not None else [])):
            each.committed = lambda: shared.committed

    def _open_mirror(self) -> Mirror | None:
        if self._options.mirror is None:
            return None
        found = open_catalog(self._options.mirror)
        options = self._options
        timeout_s, background = options.timeout_s, self._shared.mirroring
        now = self._journal.wall
        return Mirror(self._home, found, options.mirror_keep, timeout_s, background, self._mirror_job, now)

    def after_commit(self, info: CheckpointInfo, shared: int) -> None:
        """Called once a step is durable. `shared`: the bytes of files that the step before has too."""
        if self._job.leads:
            self._keep_for_now(info.step)
            self._tell(info, shared)
            self.update_mirror(info.step)
            self._retain()
        elif self.mirror is not None:
            self.mirror.help_later(info.step)

    def record_failure(self, step: int, failure: SaveError) -> None:
        self._journal.record("failed", step, why=str(failure.__cause__))

    def record_choice(self, step: int, choice: Choice) -> None:
        """Says how often a policy saves from now on, and why."""
        if self._job.leads:
            _log.info("step %d: %s", step, choice)
            self._journal.record("paced", step, **dataclasses.asdict(choice))

    def _keep_for_now(self, step: int) -> None:
        """Remembers the step: retention keeps it, even if steps with higher numbers exist."""
        self._remember(step)
        if not paths.is_local(self._home.directory) or self._has_warned:  # a bucket gets few requests
            return
        try:
            self._warn_of_later([each for each in self._home.steps() if each > step and self._counts(each)], step)
        except (CheckpointError, OSError) as problem:
            _log.warning("step %d: it could not be found out whether later steps exist: %s", step, problem)

    def _counts(self, step: int) -> bool:
        """Whether a restore would try a step before lower ones: it does not if the step is distrusted."""
        try:
            return self._home.why_distrusted(step) is None
        except CheckpointError:
            return True

    def _remember(self, step: int) -> None:
        self._shared.committed = step

    def _warn_of_later(self, later: Sequence[int], step: int) -> None:
        if later:
            self._has_warned = True
            _log.warning(
                "step %d was saved below the newest step %d. The next start resumes from step %d: restore() and "
                "retention go by the numbers of steps. If the run is to go on from here, call "
                "manager.rewind(%d): it sets aside the later steps (%d)",
                step, later[-1], later[-1], step, len(later),
            )  # fmt: skip

    # ------------------------------------------------------------ what is asked for

    def delete(self, step: int) -> None:
        """Deletes a step, pinned or not."""
        if self._job.leads:
            self._shared.hold()
            with self._shared.retaining:
                self._home.delete(step)
            self._journal.record("deleted", step, why=ASKED_FOR)

    def mark(self, step: int, mark: Callable[[int], None]) -> None:
        """Pins or unpins a step, or writes whether it is trusted."""
        if self._job.leads:
            self._shared.hold()
            with self._shared.retaining:
                mark(step)
            self.update_mirror()

    def distrust(self, step: int, why: str) -> None:
        """Notes that a step is distrusted; called by `mark`."""
        self._home.write_trust(step, trust.distrusting(why, self._journal.wall()))
        self._journal.record("distrusted", step, why=why)

    def trust(self, step: int) -> None:
        """Takes that back; called by `mark`. Only against the manifest a note is needed."""
        was_found = self._home.manifest(step).distrusted is not None
        self._home.write_trust(step, trust.trusting(self._journal.wall()) if was_found else None)
        self._journal.record("trusted", step)

    # ------------------------------------------------------------ going on from another step

    def rewind(self, step: int) -> list[int]:
        """Sets aside what is later than a step, here and in the mirror; returns the numbers of all moved steps."""
        self._shared.hold()
        try:
            return self._go_back(step)
        except CheckpointError:
            raise
        except Exception as problem:  # of a disk, or of a client
            raise SaveError(
                f"the rewind to step {step} has failed: {problem}. Call it again when the cause is removed; the "
                "next start finishes it too",
                step=step,
            ) from problem

    def _go_back(self, step: int) -> list[int]:
        """The mirror comes first: if it cannot be reached, nothing is changed here."""
        identity.read(self._home.directory)  # if it is damaged, this raises before anything is moved
        mirrors = self._mirrors()
        for mirror in mirrors:
            mirror.wait()
        with self._shared.retaining:
            self._home.finish_rewind()
            for mirror in mirrors:
                with _reaching(mirror, step):
                    mirror.catalog.finish_rewind()
                    mirror.catalog.steps()
            here, *there = rewinding.plan([self._home, *(mirror.catalog for mirror in mirrors)], step)
            moved = {*here.set_aside, *here.returned}
            for mirror, plan in zip(mirrors, there, strict=True):
                with _reaching(mirror, step):
                    mirror.rewind(plan)
                moved |= {*plan.set_aside, *plan.returned}
            self._rewind(here, step)
            return sorted(moved)

    def _mirrors(self) -> list[Mirror]:
        """The mirrors of all managers of the run, each directory once."""
        return list({str(each.catalog.directory): each for each in self._shared.mirrors.values()}.values())

    def _rewind(self, plan: branches.Plan, step: int) -> None:
        former = max(self._home.steps(), default=None)
        identity.cut(self._home.directory, self._journal.wall)
        self._home.rewind(plan)
        _log.info(
            "the run goes on from step %d: %d steps are set aside, %d come back",
            step, len(plan.set_aside), len(plan.returned),
        )  # fmt: skip
        said = {"from": former, "set_aside": plan.set_aside, "returned": plan.returned}
        self._journal.record("rewound", step, **said)

    def go_on_from(self, step: int, moved: Sequence[int]) -> None:
        """Forgets what was known of the moved steps; called in every process after a rewind."""
        catalogs = [self._home, *(mirror.catalog for mirror in self._shared.mirrors.values())]
        for catalog in catalogs:
            for each in moved:
                catalog.forget(each)
        if self._job.leads:
            rewinding.warn_if_reduced(catalogs, step)
        self._remember(step)
        self._has_warned = False
        self.update_mirror()

    def update_mirror(self, *new: int) -> None:
        """Lets each mirror of the run copy what it lacks, `new` steps for certain; returns at once.

        Then retention follows, as what was not copied was spared. A mirror of another manager only makes it wait:
        it is not why this one deletes.
        """
        if self._job.leads:
            for each in list(self._shared.mirrors.values()):
                is_own = each is self.mirror
                each.copy_later(self._retain if is_own or new else _nothing, *new, together=is_own)

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until nothing is being copied to a mirror of the run; what is copied last is deleted then."""
        self._shared.mirroring.wait(self._options.timeout_s if timeout_s is None else timeout_s)

    def _tell(self, info: CheckpointInfo, shared: int) -> None:
        nbytes, durable_s, blocked_s = info.disk_nbytes - shared, info.durable_s or 0.0, info.blocked_s or 0.0
        also = f" and {format_bytes(shared)} shared with the step before" if self._options.reuse_unchanged else ""
        _log.info(
            "step %d saved: %s written%s, durable after %s (%s), the caller waited %s", info.step,
            format_bytes(nbytes), also, format_s(durable_s), format_rate(nbytes, durable_s), format_s(blocked_s),
        )  # fmt: skip
        more = {} if self._options.mirror is None else {"mirror": str(self._options.mirror)}
        self._journal.record(
            "saved", info.step, **more, nbytes=info.nbytes, disk_nbytes=info.disk_nbytes, metrics=info.metrics,
            blocked_s=info.blocked_s, durable_s=info.durable_s,
            keep=[policies.spell(each) for each in self._options.keep],
        )  # fmt: skip
        if info.distrusted is not None:
            _log.warning("step %d is distrusted: %s", info.step, info.distrusted)
            self._journal.record("distrusted", info.step, why=info.distrusted)
        for callback in self._options.on_commit:
            try:
                callback(info)
            except BaseException:  # even sys.exit(), which would end only this thread
                _log.exception("step %d: on_commit callback %r failed", info.step, callback)

    def _retain(self) -> None:
        """Deletes and reduces what the policies say; called once a newer checkpoint is durable."""
        with self._shared.retaining:  # the thread that copies to the mirror calls this too
            try:
                self._shared.hold()
            except Exception as problem:  # of a client, or another process has the run now
                _log.error("nothing is deleted in %s: %s", self._home.directory, problem)
                return
            retention.retain(
                self._home,
                self._history,
                is_spared=self._is_spared,
                deleted=lambda step: self._journal.record("deleted", step, why=retention.UNWANTED),
                reduced=lambda step, by: self._journal.record("reduced", step, why=f"only {by} keeps it"),
                now=self._journal.wall,
            )

    def _is_spared(self, step: int) -> bool:
        """Whether a step stays for now: any manager of the run has still to copy it, or to end its save."""
        saves = [task.about for task in self._shared.background.waiting()]
        return any(isinstance(save, Save) and save.step == step for save in saves) or any(
            mirror.not_yet_copied(step) for mirror in list(self._shared.mirrors.values())
        )
