"""The catalog of a run: its steps, their manifests, pins and damage, its branches and leftovers.

It is the same on a disk and in a bucket. The directory is the truth: the catalog remembers nothing about steps
that the next listing could contradict.

A directory is a step if its name is a number and ckptmgr or Orbax finished something in it. Everything else
outside of `.ckptmgr/` belongs to others: it is never read, counted, renamed or deleted. If no step has a plain
number as its name, steps that Orbax or flax named otherwise are read (`names`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from etils import epath

from ckptmgr.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    NewerFormatError,
    SaveError,
)
from ckptmgr.format import manifest as manifests
from ckptmgr.format import names, paths
from ckptmgr.format.names import STEP
from ckptmgr.orbax import reading as stock
from ckptmgr.run import branches as branching
from ckptmgr.run import hints, reducing, trust
from ckptmgr.run.bucket import BucketDirectory
from ckptmgr.run.directory import BRANCH, SET_BACK, STAYS, Directory, Leftover
from ckptmgr.run.local import LocalDirectory
from ckptmgr.run.manifest_cache import ManifestCache, Stamp
from ckptmgr.run.moving import Mover

_log = logging.getLogger("ckptmgr")
ASKED_FOR = "asked for"


def open_directory(path: epath.Path) -> Directory:
    """The directory of a run, on a disk or in a bucket."""
    return LocalDirectory(path) if paths.is_local(path) else BucketDirectory(path)


def open_catalog(path: epath.Path) -> Catalog:
    """The catalog of the run in this directory."""
    return Catalog(open_directory(path))


class Catalog:
    """The steps of one run, and what belongs to them."""

    def __init__(self, storage: Directory) -> None:
        self.directory = storage.path
        self.can_replace = storage.can_replace
        self._storage = storage
        self._mover = Mover(storage)
        self._manifests = ManifestCache()
        self._names: Mapping[int, str] = {}
        self._numbers: frozenset[int] = frozenset()
        self._damaged: dict[int, Stamp] = {}

    def prepare(self) -> None:
        """Makes sure that the run can be written to."""
        self._storage.prepare()

    # ------------------------------------------------------------ steps

    def steps(self) -> list[int]:
        """The committed steps, in order.

        Raises CheckpointNotFoundError if no entry is a step, but there are checkpoints that must be opened in
        another way.
        """
        entries = self._storage.entries()
        self._numbers = frozenset(map(int, filter(STEP.fullmatch, entries)))
        plain = [int(name) for name in self._storage.find_steps(filter(STEP.fullmatch, entries))]
        self._names = {} if plain else self._named(entries)
        self._manifests.keep_only(plain or self._names)
        return sorted(plain or self._names)

    def _named(self, entries: Iterable[str]) -> Mapping[int, str]:
        """The steps with other names than plain numbers, which Orbax and flax can be told to use."""
        candidates = [name for name in entries if names.number(name) is not None]
        steps = self._storage.find_steps(candidates)
        refused = names.refuse(steps) if steps else hints.what_to_open(self.directory, entries, candidates)
        if refused:
            raise CheckpointNotFoundError(f"{self.directory} {refused}", directory=str(self.directory))
        return {number: name for name in steps if (number := names.number(name)) is not None}

    def _name(self, step: int) -> str:
        return self._names.get(step, str(step))

    def path(self, step: int) -> epath.Path:
        return self.directory / self._name(step)

    def holds(self, step: int) -> bool:
        """Whether a step is committed under its plain number; the directory is not listed."""
        self._storage.look(str(step))
        return bool(self._storage.find_steps([str(step)]))

    def is_listed(self, step: int) -> bool:
        """Whether a step is committed, as the last look saw it; on a disk, now."""
        return bool(self._storage.find_steps([self._name(step)]))

    def look(self, *only: int) -> None:
        """Sees what is in the run now, or only in these steps: in a bucket `is_listed`, `is_pinned` and `stamp`
        answer from it."""
        self._storage.look(*map(self._name, only))

    def has(self, step: int) -> bool:
        """Whether a step is committed."""
        return (step not in self._names and self.holds(step)) or step in self.steps()

    def require(self, step: int) -> epath.Path:
        """The directory of a step that must be there."""
        if not self.has(step):
            raise CheckpointNotFoundError(
                f"there is no step {step} in {self.directory}; {self._hint()}",
                directory=str(self.directory),
                step=step,
            )
        return self.path(step)

    def expect(self, step: int) -> epath.Path:
        """As `require`, but a bucket is not asked again for a step that it has listed.

        The step may have been deleted since. A caller that misses one of its files calls `require`, which says so.
        """
        return self.path(step) if self.is_listed(step) else self.require(step)

    def taken(self) -> frozenset[int]:
        """The numbers that are names in the directory, of steps or of anything else, as last listed."""
        return self._numbers

    def strangers(self) -> list[str]:
        """The names of what is neither a step nor ours."""
        steps = {self._name(step) for step in self.steps()}
        return sorted(set(self._storage.entries()) - steps - {names.OURS})

    def closed(self) -> list[int]:
        """Directories named like steps that may not be read, so it is not known whether they are steps."""
        return self._storage.closed()

    # ------------------------------------------------------------ refusals and hints

    def check_free(self, step: int) -> None:
        """Raises SaveError if a save would mix names of two forms, or replace what is not a checkpoint."""
        self.check_names(step)
        self._storage.look(str(step))
        if self.can_replace and step not in self.damaged and self.holds(step):
            with contextlib.suppress(CorruptCheckpointError):
                self.manifest(step)  # raises NewerFormatError: what a later ckptmgr wrote is not replaced
        self._refuse_somebodys(step)

    def check_names(self, step: int) -> None:
        """Raises SaveError if the steps, as last listed, have names that ckptmgr does not write."""
        self._refuse_names(f"step {step} is not saved", step)

    def _refuse_names(self, what: str, step: int) -> None:
        if self._names:
            name = next(iter(self._names.values()))
            raise SaveError(
                f"{what}: the steps in {self.directory} have names like {name}. ckptmgr reads such names and does "
                f"not write them. Save into another directory, or rename them ({name} to {names.number(name)})",
                step=step,
            )

    def _refuse_somebodys(self, step: int, what: str = "is not saved") -> None:
        if self._storage.is_somebodys(str(step)):
            raise SaveError(
                f"step {step} {what}: {self.path(step)} exists and is not a checkpoint; move it away", step=step
            )

    def _hint(self) -> str:
        return hints.what_is_there(self.directory, self.steps(), _has_steps)

    def nothing_good(
        self,
        damaged: Mapping[int, str],
        why: str | None = None,
        distrusted: Mapping[int, str] = MappingProxyType({}),
    ) -> CheckpointError:
        """The error for a run without a step to restore."""
        if distrusted:
            return self._nothing_trusted(damaged, distrusted)
        if damaged:
            newest, reason = max(damaged.items())
            return CorruptCheckpointError(
                f"all {len(damaged)} checkpoints in {self.directory} are damaged; the newest: {reason}",
                step=newest,
            )
        return CheckpointNotFoundError(
            f"there is no checkpoint to restore in {self.directory}; {why or self._hint()}",
            directory=str(self.directory),
        )

    def _nothing_trusted(self, damaged: Mapping[int, str], distrusted: Mapping[int, str]) -> CheckpointError:
        newest, reason = max(distrusted.items())
        counted = f"{len(distrusted)} distrusted" + (f", {len(damaged)} damaged" if damaged else "")
        return CorruptCheckpointError(
            f"no checkpoint in {self.directory} is trusted ({counted}). The newest distrusted one is step "
            f"{newest}: {reason}. restore({newest}) gives it all the same; after trust({newest}) restore() does",
            step=newest,
        )

    # ------------------------------------------------------------ manifests and damage

    def manifest(self, step: int, *, fresh: bool = False) -> manifests.Manifest:
        """The manifest of a step; for a checkpoint of stock Orbax one that is read from its own files.

        It is read once for each save of the step; `fresh` reads it again, to see whether it still is whole.
        """
        stamp = self.stamp(step)
        known = None if fresh else self._manifests.get(step, stamp)
        if known is not None:
            return known
        read, text = _read_manifest(step, self.expect(step), self._manifests.items)
        return self._manifests.put(step, stamp, read, text)

    def read_ahead(self, steps: Iterable[int]) -> None:
        """Reads the manifests of listed steps that are not known yet, in a bucket all at the same time."""
        stamps = {step: self.stamp(step) for step in steps}
        wanted = {
            f"{self._name(step)}/{manifests.NAME}": step
            for step, seen in stamps.items()
            if seen is not None and self._manifests.get(step, seen) is None
        }
        for file, data in self._storage.read_ahead(wanted).items():
            step = wanted[file]
            with contextlib.suppress(CorruptCheckpointError, NewerFormatError):  # `manifest` raises it again
                read = manifests.decode(data, step=step, path=manifests.NAME, known=self._manifests.items)
                self._manifests.put(step, stamps[step], read, manifests.items_text(data))

    def after_publish(self, manifest: manifests.Manifest, data: bytes) -> None:
        """To be called after `publish`. Remembers the manifest, and what its file holds: it need not be read."""
        self._storage.after_publish(str(manifest.step))
        self._manifests.put(manifest.step, self.stamp(manifest.step), manifest, manifests.items_text(data))

    def stamp(self, step: int) -> Stamp:
        """What tells one save of a step from another, which another process may have put in its place."""
        return self._storage.stamp(self._name(step))

    def identity(self, step: int) -> tuple[int, ...] | None:
        """What tells a step from another of the same number; None if it is gone, or not on a local disk."""
        return self._storage.identity(self._name(step))

    def what_is_missing(self, step: int) -> str | None:
        """A file that is not there with its recorded size, and why; None if all are. Nothing is read."""
        return self._storage.missing_file(self.manifest(step), self._name(step))

    def check_whole(self, step: int, place: str) -> None:
        """Raises CorruptCheckpointError if a step is seen to be damaged; its arrays are not read."""
        missing = self._storage.missing_file(_read_manifest(step, self.directory / place)[0], place)
        if missing is not None:
            raise CorruptCheckpointError(f"step {step}: {missing}", step=step)

    @property
    def damaged(self) -> set[int]:
        """Steps that a restore has passed over: retention does not count them, and deletes none."""
        return {step for step, stamp in list(self._damaged.items()) if self.stamp(step) == stamp}

    def share_damage(self, known: dict[int, Stamp]) -> None:
        """Shares the damaged steps with the other managers of the run."""
        self._damaged = known

    def mark_damaged(self, seen: Mapping[int, Stamp]) -> None:
        """`seen` has the stamp of each step from before it was read: the step may have been replaced since."""
        self._damaged |= seen

    def forget(self, step: int) -> None:
        """Forgets a step that was replaced or deleted."""
        self._manifests.drop(step)
        self._damaged.pop(step, None)

    # ------------------------------------------------------------ pins

    def pinned(self) -> set[int]:
        return {step for step in self.steps() if self.is_pinned(step)}

    def is_pinned(self, step: int) -> bool:
        """Also True if that cannot be found out now: then the step must not be deleted."""
        return self._storage.is_pinned(self._name(step))

    def pin(self, step: int) -> None:
        folder = self.require(step)
        with _refusing(step, "pinned"):
            self._storage.pin(folder)

    def unpin(self, step: int) -> None:
        folder = self.require(step)
        with _refusing(step, "unpinned"):
            self._storage.unpin(folder)

    # ------------------------------------------------------------ trust

    def why_distrusted(self, step: int, manifest: manifests.Manifest | None = None) -> str | None:
        """Why a step is distrusted; None if it is trusted. A note outweighs the manifest."""
        note = self.trust_note(step)
        return (manifest or self.manifest(step)).distrusted if note is None else trust.why_distrusted(note)

    def trust_note(self, step: int) -> bytes | None:
        """The note about the trust in a step; None if there is none."""
        return self._storage.trust_note(self._name(step))

    def write_trust(self, step: int, note: bytes | None) -> None:
        """Writes the note about the trust in a step; None removes it."""
        folder = self.require(step)
        with _refusing(step, "trusted" if note is None or trust.why_distrusted(note) is None else "distrusted"):
            self._storage.write_trust(folder, note)

    # ------------------------------------------------------------ a step that is written here

    def draft(self, step: int) -> epath.Path:
        """The folder in which a step is written before `publish`."""
        return self._storage.draft(str(step))

    def begin(self, step: int) -> epath.Path:
        """Notes on the storage that a draft is being written; returns its folder."""
        return self._storage.begin(str(step))

    def keep_pin(self, step: int) -> None:
        """Pins the draft if the step that it replaces is pinned."""
        if self.can_replace and (self.path(step) / names.PIN).exists():
            self._storage.pin(self.draft(step))

    def publish(self, step: int, *, replaces: bool = False) -> epath.Path | None:
        """Gives a durable draft the name of the step. An old step of that name is replaced atomically.

        Returns the old step, which is to be removed once the new name is durable.
        """
        if self.can_replace:
            self._refuse_newcomer(step, replaces)
        return self._storage.publish(str(step))

    def _refuse_newcomer(self, step: int, replaces: bool) -> None:
        """Raises SaveError if another program has taken the name of the step meanwhile."""
        self._refuse_somebodys(step)
        if not replaces and self.holds(step):
            raise SaveError(
                f"step {step} is not saved: another checkpoint was written to {self.path(step)} meanwhile",
                step=step,
            )

    def discard(self, step: int) -> None:
        """Removes the draft of a failed save. An error here is dropped: that of the save says more."""
        with contextlib.suppress(Exception):
            self._storage.discard(str(step))

    # ------------------------------------------------------------ a step that leaves the listing

    def delete(self, step: int, why: str = ASKED_FOR) -> None:
        """Takes a step out of the listing in one move, then removes its files; the log says why."""
        self.require(step)
        self.remove(self.hide(step, why))

    def hide(self, step: int, why: str = ASKED_FOR) -> epath.Path:
        """Takes a step out of the listing in one move; returns the folder that is then to be removed."""
        self.forget(step)
        with _refusing(step, "deleted"):
            hidden = self._storage.hide(self._name(step))
        _log.info("step %d deleted from %s: %s", step, self.directory, why)
        return hidden

    def remove(self, *leftovers: epath.Path) -> None:
        """Removes what is in no listing. If that fails, the next start tries again."""
        if leftovers:
            self._storage.remove(*leftovers)

    def reduce(self, step: int, by: str, time: float) -> list[epath.Path]:
        """Takes the items that `params_only` does not keep out of a step; returns what is then to be removed."""
        was = paths.read_bytes(self.expect(step) / manifests.NAME)
        manifest = reducing.reduced(reducing.decode(was, step), by, time)
        with _refusing(step, "reduced to its params"):
            gone = self._storage.reduce(self._name(step), manifest, was)
        self.forget(step)
        _log.info("step %d in %s %s", step, self.directory, manifest.reduced)
        return gone

    def set_aside(self, step: int) -> epath.Path:
        """Takes a damaged step out of the listing, and keeps its files."""
        self.forget(step)
        with _refusing(step, "set aside although it is damaged"):
            return self._storage.set_aside(self._name(step))

    # ------------------------------------------------------------ going on from another step

    def branches(self) -> list[branching.Branch]:
        """What rewinds have set aside, the oldest first."""
        self._storage.look(names.OURS)
        return self._mover.branches()

    def plan_rewind(self, step: int) -> branching.Plan | None:
        """What a rewind to a step moves; None if it is neither listed nor in a branch. Nothing is changed.

        Raises SaveError if ckptmgr does not write the names of the steps, or a file of others is in the way.
        """
        listed = self.steps()
        self._refuse_names(f"the run does not go back to step {step}", step)
        found = self._mover.plan(step, listed)
        for each in found.returned if found else ():
            self._refuse_somebodys(each, "does not come back")
        return found

    def plan_rewind_without(self, like: branching.Plan) -> branching.Plan:
        """What moves here with a plan for another directory of the run, if the step itself is not here."""
        return self._mover.plan_without(like, self.steps())

    def rewind(self, plan: branching.Plan) -> None:
        """Moves what is planned. If the process is killed meanwhile, `finish_rewind` moves the rest."""
        self._mover.move(plan)

    def finish_rewind(self) -> None:
        """Moves what a rewind has planned and not yet moved."""
        self._mover.finish()

    # ------------------------------------------------------------ what was interrupted

    def tidy(self, *, is_alone: bool = False) -> None:
        """Finishes what an earlier process began; removes its unfinished saves and deletions.

        `is_alone`: no other process may write into the run.
        """
        self._storage.upgrade()
        self._storage.look()
        try:
            self.finish_rewind()
        except Exception as problem:  # of a disk or of a client; the run can be used all the same
            _log.error("a rewind of %s was interrupted, and cannot be finished now: %s", self.directory, problem)
        found = self._leftovers(is_alone=is_alone)
        for entry, why in found:
            if why == SET_BACK:
                self._storage.set_back(entry)
        self.remove(*(entry for entry, why in found if why not in (SET_BACK, *STAYS)))

    def leftovers(self) -> list[Leftover]:
        """What is not a step, and why it is there. `tidy` keeps what is damaged or was set aside."""
        self._storage.look()
        return self._leftovers()

    def _leftovers(self, *, is_alone: bool = False) -> list[Leftover]:
        places = [branch.place(step) for branch in self._mover.branches() for step in sorted(branch.steps)]
        found = self._storage.leftovers(is_alone=is_alone)
        return found + [(self.directory / place, BRANCH) for place in places]


def _has_steps(path: epath.Path) -> bool:
    try:
        return bool(open_catalog(path).steps())
    except (CheckpointError, OSError):
        return False


@contextlib.contextmanager
def _refusing(step: int, what: str) -> Iterator[None]:
    """Turns an error of the storage into a SaveError that says what was not done."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as problem:  # of a disk or of a client
        raise SaveError(f"step {step} is not {what}: {problem}", step=step) from problem


def _read_manifest(
    step: int, directory: epath.Path, known: manifests.KnownItems = manifests.NO_ITEMS
) -> tuple[manifests.Manifest, bytes]:
    """A manifest, and the text of its items."""
    path = directory / manifests.NAME
    try:
        data = paths.read_bytes(path)
    except FileNotFoundError:
        return stock.read(step, directory), b""
    except (OSError, MemoryError) as problem:  # a directory in its place, a bad sector
        paths.refuse_exhausted(problem)
        raise CorruptCheckpointError(
            f"step {step}: {path} cannot be read: {problem}", step=step, path=manifests.NAME
        ) from problem
    found = manifests.decode(data, step=step, path=manifests.NAME, known=known)
    return found, manifests.items_text(data)
