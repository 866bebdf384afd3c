"""What lies in a run: its steps, their manifests, pins, damage, branches and leftovers, wherever the run lies.

The directory is the truth: nothing about steps is remembered that the next listing could contradict.

A directory is a step if its name is a number and ckptmgr or Orbax finished something in it. Everything else
outside of `.ckptmgr/` is somebody's: never read, counted, renamed or deleted. Where no step has a plain number,
steps that Orbax or flax named otherwise are read: `names` finds how.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping

from etils import epath

from ckptmgr.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, SaveError
from ckptmgr.format import manifest as manifests
from ckptmgr.format import names, paths
from ckptmgr.format.names import ABANDONED, STEP
from ckptmgr.orbax import reading as stock
from ckptmgr.run import branches as branching
from ckptmgr.run import recognize
from ckptmgr.run.bucket import BucketDirectory
from ckptmgr.run.directory import BRANCH, SET_BACK, STAYS, Directory, Leftover
from ckptmgr.run.local import LocalDirectory
from ckptmgr.run.manifest_cache import ManifestCache, Stamp

_ORBAX_SIGNS = {names.STEP_METADATA, "_METADATA"}
_log = logging.getLogger("ckptmgr")


def open_directory(path: epath.Path) -> Directory:
    """The directory of a run, on a disk or in a bucket."""
    return LocalDirectory(path) if paths.is_local(path) else BucketDirectory(path)


def open_catalog(path: epath.Path) -> Catalog:
    """What lies in the run in this directory."""
    return Catalog(open_directory(path))


class Catalog:
    """What lies in one run."""

    def __init__(self, storage: Directory) -> None:
        self.directory = storage.path
        self.can_replace = storage.can_replace
        self._storage = storage
        self._manifests = ManifestCache()
        self._names: Mapping[int, str] = {}
        self._damaged: dict[int, Stamp] = {}

    def prepare(self) -> None:
        """Makes sure that the run can be written to."""
        self._storage.prepare()

    # ------------------------------------------------------------ steps

    def steps(self) -> list[int]:
        """The committed steps, in order.

        Raises CheckpointNotFoundError if there is none, and what is there is a run that is not read.
        """
        entries = self._storage.entries()
        plain = [int(name) for name in self._storage.find_steps(filter(STEP.fullmatch, entries))]
        self._names = {} if plain else self._named(entries)
        self._manifests.keep_only(plain or self._names)
        return sorted(plain or self._names)

    def _named(self, entries: Iterable[str]) -> Mapping[int, str]:
        """The steps whose names are no plain numbers, as Orbax and flax can be told to name them."""
        candidates = [name for name in entries if names.number(name) is not None]
        steps = self._storage.find_steps(candidates)
        refused = names.refuse(steps) if steps else self._refuse_other(entries, candidates)
        if refused:
            raise CheckpointNotFoundError(f"{self.directory} {refused}", directory=str(self.directory))
        return {number: name for name in steps if (number := names.number(name)) is not None}

    def _refuse_other(self, entries: Iterable[str], candidates: Iterable[str]) -> str | None:
        """What to do with a directory that holds a checkpoint and no step that is read; None if it is empty."""
        if _ORBAX_SIGNS.intersection(entries):
            return f"is the directory of one checkpoint; open its parent, {self.directory.parent}"
        files = [name for name in candidates if self._is_msgpack(name)]
        return names.refuse_file(names.newest(files)) if files else None

    def _is_msgpack(self, name: str) -> bool:
        """Whether this is a file that begins as a map of msgpack does, which is what flax writes. (0x80, an empty
        map, is how pickles begin.)"""
        try:
            with paths.open_to_read(self.directory / name) as file:
                first = file.read(1)
        except OSError:
            return False
        return bool(first) and (0x81 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF))

    def _name(self, step: int) -> str:
        return self._names.get(step, str(step))

    def path(self, step: int) -> epath.Path:
        return self.directory / self._name(step)

    def holds(self, step: int) -> bool:
        """Whether a step with the plain number is committed, in one look: nothing is listed."""
        return bool(self._storage.find_steps([str(step)]))

    def has(self, step: int) -> bool:
        """Whether a step is committed."""
        return (step not in self._names and self.holds(step)) or step in self.steps()

    def require(self, step: int) -> epath.Path:
        """The directory of a step that must be there."""
        if not self.has(step):
            raise CheckpointNotFoundError(
                f"there is no step {step} in {self.directory}; {self._what_is_there()}",
                directory=str(self.directory),
                step=step,
            )
        return self.path(step)

    def taken(self) -> set[int]:
        """The numbers that steps have, and that strangers have as their names."""
        return {int(name) for name in self._storage.entries() if STEP.fullmatch(name)}

    def strangers(self) -> list[str]:
        """What is in it and is neither a step nor ours."""
        steps = {self._name(step) for step in self.steps()}
        return sorted(set(self._storage.entries()) - steps - {names.OURS})

    def closed(self) -> list[int]:
        """Directories with the name of a step that cannot be looked into: whether they are steps is not known."""
        return self._storage.closed()

    # ------------------------------------------------------------ what is in the way, and what is there instead

    def check_free(self, step: int) -> None:
        """Raises SaveError if a save would mix names of two forms, or replace what is no checkpoint."""
        self.check_names(step)
        if self.can_replace and step not in self.damaged and self.holds(step):
            with contextlib.suppress(CorruptCheckpointError):
                self.manifest(step)  # raises NewerFormatError: what a later ckptmgr wrote is not replaced
        self._refuse_somebodys(step)

    def check_names(self, step: int) -> None:
        """Raises SaveError if the steps that were listed last have names which ckptmgr does not write."""
        self._refuse_names(f"step {step} is not saved", step)

    def _refuse_names(self, what: str, step: int) -> None:
        if self._names:
            name = next(iter(self._names.values()))
            raise SaveError(
                f"{what}: the steps in {self.directory} are named as {name} is, which ckptmgr reads and does not "
                f"write. Save into another directory, or rename them ({name} to {names.number(name)})",
                step=step,
            )

    def _refuse_somebodys(self, step: int, what: str = "is not saved") -> None:
        if self._storage.is_somebodys(str(step)):
            raise SaveError(
                f"step {step} {what}: {self.path(step)} is there and is no checkpoint; move it away", step=step
            )

    def _what_is_there(self) -> str:
        steps = self.steps()
        if steps:
            shown = ", ".join(map(str, steps[-10:]))
            return f"its steps are {'..., ' if len(steps) > 10 else ''}{shown}"
        if not self.directory.exists():
            return "the directory does not exist"
        below = [entry for entry in self.directory.iterdir() if entry.is_dir() and entry.name != names.OURS]
        for entry in below:
            if open_catalog(entry)._has_steps():
                return f"did you mean {entry}?"
            if recognize.is_renamed(str(entry)):
                return (
                    f"{entry.name} is a checkpoint under another name: to read it, rename it to its step's number"
                )
        return "nothing is saved in it yet"

    def _has_steps(self) -> bool:
        try:
            return bool(self.steps())
        except (CheckpointError, OSError):
            return False

    def nothing_good(self, damaged: Mapping[int, str], why: str | None = None) -> CheckpointError:
        """The error for a run without a step to restore."""
        if damaged:
            newest, reason = max(damaged.items())
            return CorruptCheckpointError(
                f"all {len(damaged)} checkpoints in {self.directory} are damaged; the newest: {reason}",
                step=newest,
            )
        return CheckpointNotFoundError(
            f"there is no such checkpoint in {self.directory}; {why or self._what_is_there()}",
            directory=str(self.directory),
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
        read, text = _read_manifest(step, self.require(step), self._manifests.items)
        return self._manifests.put(step, stamp, read, text)

    def stamp(self, step: int) -> Stamp:
        """What tells one save of a step from another, which another process may have put in its place."""
        return self._storage.stamp(self._name(step))

    def identity(self, step: int) -> tuple[int, int] | None:
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
        """Keeps what is known of damaged steps where the other managers of the run see it."""
        self._damaged = known

    def mark_damaged(self, seen: Mapping[int, Stamp]) -> None:
        """Each with the stamp that it had before it was read: it may have been replaced since."""
        self._damaged |= seen

    def forget(self, step: int) -> None:
        """Drops what was remembered of a step that was replaced or deleted."""
        self._manifests.drop(step)
        self._damaged.pop(step, None)

    # ------------------------------------------------------------ pins

    def pinned(self) -> set[int]:
        return {step for step in self.steps() if self.is_pinned(step)}

    def is_pinned(self, step: int) -> bool:
        """Also of a step of which that cannot be known now: it must not be deleted."""
        return paths.may_exist(self.path(step) / names.PIN)

    def pin(self, step: int) -> None:
        folder = self.require(step)
        with _refusing(step, "pinned"):
            self._storage.pin(folder)

    def unpin(self, step: int) -> None:
        folder = self.require(step)
        with _refusing(step, "unpinned"):
            self._storage.unpin(folder)

    # ------------------------------------------------------------ a step that is written here

    def draft(self, step: int) -> epath.Path:
        """Where a step is put together before `publish`."""
        return self._storage.draft(str(step))

    def begin(self, step: int) -> epath.Path:
        """Says that a draft of a step is being written, and where."""
        return self._storage.begin(str(step))

    def keep_pin(self, step: int) -> None:
        """Pins a draft if it is to replace a step that is pinned."""
        if self.can_replace and (self.path(step) / names.PIN).exists():
            self._storage.pin(self.draft(step))

    def publish(self, step: int, *, replaces: bool = False) -> epath.Path | None:
        """Gives a draft, all of which is durable, the step's name; a step that has it makes room without a gap.

        Returns what it has replaced, which is to be removed once the new name is durable.
        """
        if self.can_replace:
            self._refuse_newcomer(step, replaces)
        return self._storage.publish(str(step))

    def _refuse_newcomer(self, step: int, replaces: bool) -> None:
        """Raises if something came to the place of the step while the draft was written."""
        self._refuse_somebodys(step)
        if not replaces and self.holds(step):
            raise SaveError(
                f"step {step} is not saved: another checkpoint came to {self.path(step)} meanwhile, and is kept",
                step=step,
            )

    def discard(self, step: int) -> None:
        """Removes what a failed save has left; the failure that is on its way says more than one here."""
        with contextlib.suppress(Exception):
            self._storage.discard(str(step))

    # ------------------------------------------------------------ a step that leaves the listing

    def delete(self, step: int) -> None:
        """Takes a step out of the listing at once, then removes its files."""
        self.require(step)
        self.forget(step)
        with _refusing(step, "deleted"):
            hidden = self._storage.hide(self._name(step))
        _log.info("step %d deleted", step)
        self.remove(hidden)

    def remove(self, leftover: epath.Path) -> None:
        """Removes what is in no listing; what cannot be removed now is tried again at the next start."""
        self._storage.remove(leftover)

    def set_aside(self, step: int) -> epath.Path:
        """Takes a damaged step out of the listing, and keeps it for whoever wants to look into it."""
        self.forget(step)
        with _refusing(step, "set aside, and it is damaged"):
            return self._storage.set_aside(self._name(step))

    # ------------------------------------------------------------ going on from another step

    def branches(self) -> list[branching.Branch]:
        """What rewinds have set aside, the oldest first."""
        found = [branching.parse(name, self._numbers(name)) for name in self._storage.inside(ABANDONED)]
        return sorted((each for each in found if each and each.steps), key=lambda branch: branch.time)

    def _numbers(self, branch: str) -> list[int]:
        return [int(name) for name in self._storage.inside(f"{ABANDONED}/{branch}") if STEP.fullmatch(name)]

    def plan_rewind(self, step: int) -> branching.Plan | None:
        """What a rewind to a step moves; None if it is neither listed nor in a branch. Nothing is changed.

        Raises SaveError if the steps have names that ckptmgr does not write, or what is no step is in the way.
        """
        listed = self.steps()
        self._refuse_names(f"the run does not go back to step {step}", step)
        found = branching.plan(step, listed, self.branches(), self._storage.mark, time.time_ns())
        for each in found.returned if found else ():
            self._refuse_somebodys(each, "does not come back")
        return found

    def plan_rewind_without(self, like: branching.Plan) -> branching.Plan:
        """What moves here with a plan for another directory of the run, if the step itself is not here."""
        return branching.plan_without(like.base, like.mark, self.steps(), self._storage.mark, time.time_ns())

    def rewind(self, plan: branching.Plan) -> None:
        """Moves what is planned. If the process is killed in it, `finish_rewind` moves the rest."""
        if plan.moves:
            self._storage.write_plan(branching.encode(plan.moves))
            self.finish_rewind()

    def finish_rewind(self) -> None:
        """Moves what a rewind has planned and not yet moved."""
        ahead = self._read_plan()
        if ahead is None:
            return
        while ahead:
            self._storage.move(ahead)
            ahead = ahead[1:]
            self._storage.has_moved(branching.encode(ahead))
        self._storage.end_plan()

    def _read_plan(self) -> list[branching.Move] | None:
        """The moves ahead; None if no rewind was interrupted, or what is there is no plan."""
        try:
            plan = self._storage.read_plan()
            return None if plan is None else branching.decode(plan)
        except (OSError, ValueError) as problem:
            path = self.directory / names.REWINDING
            _log.error("%s is not followed, so the rewind is not finished: %s. Remove it", path, problem)
            return None

    # ------------------------------------------------------------ what was interrupted

    def tidy(self) -> None:
        """Finishes what an earlier process was stopped in: saves, deletions, and replacing a step."""
        self._storage.upgrade()
        try:
            self.finish_rewind()
        except Exception as problem:  # of a disk or of a client; the run is usable without it
            _log.error("a rewind of %s was interrupted, and cannot be finished now: %s", self.directory, problem)
        for entry, why in self.leftovers():
            if why == SET_BACK:
                self._storage.set_back(entry)
            elif why not in STAYS:
                self.remove(entry)

    def leftovers(self) -> list[Leftover]:
        """What is no step, and why it lies there. `tidy` leaves alone what is damaged, or was set aside."""
        places = [branch.place(step) for branch in self.branches() for step in sorted(branch.steps)]
        return self._storage.leftovers() + [(self.directory / place, BRANCH) for place in places]


@contextlib.contextmanager
def _refusing(step: int, what: str) -> Iterator[None]:
    """What the storage raises becomes an error of ours, which says what is not done."""
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
