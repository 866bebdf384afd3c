"""The directory of a run: which steps are there, their manifests, pins, and deletion.

The disk is the truth: nothing about steps is remembered that the next listing could contradict.

    <directory>/<step>/                      a committed checkpoint
    <directory>/<step>/PINNED                retention leaves it alone
    <directory>/.ckptmgr/saving/<step>/      a step that is being written
    <directory>/.ckptmgr/deleting/<step>-*/  a step that is being deleted
    <directory>/.ckptmgr/replaced/<step>/    the old checkpoint of a step that is being replaced
    <directory>/.ckptmgr/damaged/<step>-*/   a damaged checkpoint whose step was saved again
    <directory>/.ckptmgr/abandoned/<branch>/<step>/    a checkpoint that a rewind has set aside (`branches`)
    <directory>/.ckptmgr/rewinding           what a rewind has still to move

A directory is a step if its name is a number and ckptmgr or Orbax finished something in it (`recognize`).
Everything else outside of `.ckptmgr/` is somebody's: never read, counted, renamed or deleted. Where no step has a
plain number, steps that Orbax or flax named otherwise are read: `names` finds how.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence

from etils import epath

from ckptmgr.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, SaveError
from ckptmgr.format import manifest as manifests
from ckptmgr.format import names, paths
from ckptmgr.format.names import ABANDONED, DAMAGED, DELETING, PIN, REPLACED, REWINDING, SAVING, STEP
from ckptmgr.orbax import reading as stock
from ckptmgr.run import branches as branching
from ckptmgr.run import recognize, version_1
from ckptmgr.run.manifest_cache import ManifestCache, Stamp

KEPT = "damaged, and set aside for whoever wants to look into it"
BRANCH = "set aside by a rewind: rewind to one of its steps brings it back"
SET_BACK = "set aside for a save that was interrupted: it is the step again"
_WHY = {
    SAVING: "a save that was interrupted",
    DELETING: "a deletion that was interrupted",
    REPLACED: "replaced by a newer save of the step",
    DAMAGED: KEPT,
}
_STAYS = (KEPT, BRANCH)
_PINNED = b"kept by ckptmgr whatever the retention policy says\n"
_ORBAX_SIGNS = {names.STEP_METADATA, "_METADATA"}
_log = logging.getLogger("ckptmgr")


class Catalog:
    """What lies in one run directory on a disk of this machine."""

    can_replace = True
    """Whether a step can make room for another of its number without a moment in which neither is there."""

    def __init__(self, directory: epath.Path) -> None:
        self.directory = directory
        self._manifests = ManifestCache()
        self._names: Mapping[int, str] = {}
        self._damaged: dict[int, Stamp] = {}
        self._is_of_version_2 = False
        self._place = str(directory)
        self._recognized: dict[str, tuple[int, ...] | None] = {}

    def prepare(self) -> None:
        """Makes sure that the run can be written to."""
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(f"directory {self.directory} is a file")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise NotADirectoryError(f"directory {self.directory}: a part of this path is a file") from None
        except PermissionError:
            raise PermissionError(f"directory {self.directory} cannot be written to: no permission") from None
        if not _writable(self.directory):
            raise PermissionError(f"directory {self.directory} cannot be written to: no permission")
        self._is_of_version_2 = os.path.lexists(self.directory / names.VERSION)
        for folder in (SAVING, DELETING, REPLACED, DAMAGED):
            if folder == SAVING or os.path.lexists(self.directory / folder):
                self._ours(folder)

    def _ours(self, folder: str) -> epath.Path:
        """A folder of ours in the run, which is made if it is not there."""
        for each in dict.fromkeys([names.OURS, folder]):
            self._make_ours(self.directory / each)
        if self._is_of_version_2:  # also after somebody has removed all of it
            self._write_version()
        return self.directory / folder

    def _make_ours(self, folder: epath.Path) -> None:
        paths.refuse_link(folder)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        if not folder.is_dir():
            raise NotADirectoryError(
                f"{folder} is a file; ckptmgr needs a folder of that name. Move the file away"
            )
        if not _writable(folder):
            raise PermissionError(
                f"{folder} cannot be written to: no permission. Give it to who runs the training"
            )
        if os.stat(folder).st_dev != os.stat(self.directory).st_dev:
            raise OSError(
                errno.EXDEV,
                f"{folder} is on another file system than the steps, which are renamed from there. Unmount it",
            )

    def path(self, step: int) -> epath.Path:
        return self.directory / self._names.get(step, str(step))

    def steps(self) -> list[int]:
        """The committed steps on disk, in order.

        Raises CheckpointNotFoundError if there is none, and what is there is a run that is not read.
        """
        entries = self._entries()
        plain = [int(name) for name in entries if STEP.fullmatch(name) and self._is_step(name)]
        self._names = {} if plain else self._named(entries)
        self._manifests.keep_only(plain or self._names)
        return sorted(plain or self._names)

    def _named(self, entries: Iterable[str]) -> Mapping[int, str]:
        """The steps whose names are no plain numbers, as Orbax and flax can be told to name them."""
        candidates = [name for name in entries if names.number(name) is not None]
        steps = [name for name in candidates if self._is_step(name)]
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

    def _is_step(self, name: str) -> bool:
        """Whether this is a step. A directory that was found to be one, and has not changed, is not read again."""
        path = f"{self._place}/{name}"
        seen = recognize.stamp(path)
        if seen is None or self._recognized.get(name) != seen:
            if not recognize.is_step(path):
                self._recognized.pop(name, None)
                return False
            self._recognized[name] = seen
        return True

    def _is_msgpack(self, name: str) -> bool:
        """Whether this is a file that begins as a map of msgpack does, which is what flax writes. (0x80, an empty
        map, is how pickles begin.)"""
        try:
            with paths.open_to_read(self.directory / name) as file:
                first = file.read(1)
        except OSError:
            return False
        return bool(first) and (0x81 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF))

    def check_free(self, step: int) -> None:
        """Raises SaveError if a save would mix names of two forms, or replace what is no checkpoint."""
        self._refuse_names(f"step {step} is not saved", step)
        if self.can_replace and step not in self.damaged and self._is_step(str(step)):
            with contextlib.suppress(CorruptCheckpointError):
                self.manifest(step)  # raises NewerFormatError: what a later ckptmgr wrote is not replaced
        self._refuse_somebodys(step)

    def _refuse_names(self, what: str, step: int) -> None:
        if self._names:
            name = next(iter(self._names.values()))
            raise SaveError(
                f"{what}: the steps in {self.directory} are named as {name} is, which ckptmgr reads and does not "
                f"write. Save into another directory, or rename them ({name} to {names.number(name)})",
                step=step,
            )

    def _refuse_somebodys(self, step: int, what: str = "is not saved") -> None:
        if self._is_somebodys(step):
            raise SaveError(
                f"step {step} {what}: {self.path(step)} is there and is no checkpoint; move it away", step=step
            )

    def _is_somebodys(self, step: int) -> bool:
        """Whether something has the name of a step, and is no checkpoint; an empty folder may be taken."""
        path = str(self.path(step))
        return not self._is_step(str(step)) and _is_taken(path)

    def has(self, step: int) -> bool:
        """Whether a step is committed."""
        if step not in self._names and self._is_step(str(step)):
            return True
        return step in self.steps()

    def holds(self, step: int) -> bool:
        """The same of a step with a plain number, in one look: nothing is listed."""
        return self._is_step(str(step))

    def require(self, step: int) -> epath.Path:
        """The directory of a step that must be there."""
        if not self.has(step):
            raise CheckpointNotFoundError(
                f"there is no step {step} in {self.directory}; {self._what_is_there()}",
                directory=str(self.directory),
                step=step,
            )
        return self.path(step)

    def _what_is_there(self) -> str:
        steps = self.steps()
        if steps:
            shown = ", ".join(map(str, steps[-10:]))
            return f"its steps are {'..., ' if len(steps) > 10 else ''}{shown}"
        if not self.directory.exists():
            return "the directory does not exist"
        below = [entry for entry in self.directory.iterdir() if entry.is_dir() and entry.name != names.OURS]
        for entry in below:
            if type(self)(entry)._has_steps():
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

    # ------------------------------------------------------------ manifests

    def manifest(self, step: int, *, fresh: bool = False) -> manifests.Manifest:
        """The manifest of a step; for a checkpoint of stock Orbax one that is read from its own files.

        It is read once for each save of the step; `fresh` reads it again, to see whether it still is whole.
        """
        stamp = self.stamp(step)
        known = None if fresh else self._manifests.get(step, stamp)
        return known or self._manifests.put(step, stamp, self._read_manifest(step, self.require(step)))

    def _read_manifest(self, step: int, directory: epath.Path) -> manifests.Manifest:
        path = directory / manifests.NAME
        try:
            data = paths.read_bytes(path)
        except FileNotFoundError:
            found = stock.read(step, directory)
            return found
        except (OSError, MemoryError) as problem:  # a directory in its place, a bad sector
            paths.refuse_exhausted(problem)
            raise CorruptCheckpointError(
                f"step {step}: {path} cannot be read: {problem}", step=step, path=manifests.NAME
            ) from problem
        return manifests.decode(data, step=step, path=manifests.NAME)

    def identity(self, step: int) -> tuple[int, int] | None:
        """What tells a step from another of the same number; None if it is gone, or not on a local disk."""
        try:
            found = os.stat(self.path(step))
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns  # the number alone goes to the next file

    def stamp(self, step: int) -> Stamp:
        """What tells one save of a step from another, which another process may have put in its place."""
        for name in (manifests.NAME, "_CHECKPOINT_METADATA", "."):
            with contextlib.suppress(OSError):
                found = os.stat(self.path(step) / name)
                written = (found.st_mtime_ns, found.st_size) if name != "." else ()  # a pin is a file in it
                return found.st_dev, found.st_ino, *written
        return None

    @property
    def damaged(self) -> set[int]:
        """Steps that a restore has passed over: retention does not count them, and deletes none."""
        return {step for step, stamp in list(self._damaged.items()) if self.stamp(step) == stamp}

    def share_damage(self, known: dict[int, Stamp]) -> None:
        """Keeps what is known of damaged steps where the other managers of the run see it."""
        self._damaged = known

    def mark_damaged(self, steps: Iterable[int]) -> None:
        self._damaged |= {step: self.stamp(step) for step in steps}

    def forget(self, step: int) -> None:
        """Drops what was remembered of a step that was replaced or deleted."""
        self._manifests.drop(step)
        self._recognized.pop(str(step), None)
        self._damaged.pop(step, None)

    def what_is_missing(self, step: int) -> str | None:
        """A file that is not there with its recorded size, and why; None if all are. Nothing is read."""
        return manifests.missing_file(self.manifest(step), self.path(step))

    def closed(self) -> list[int]:
        """Directories with the name of a step that cannot be looked into: whether they are steps is not known."""
        folders = [name for name, is_folder in self._entries().items() if is_folder and STEP.fullmatch(name)]
        return [int(name) for name in folders if not _may(self.directory / name, os.R_OK | os.X_OK)]

    # ------------------------------------------------------------ pins

    def pinned(self) -> set[int]:
        return {step for step in self.steps() if self.is_pinned(step)}

    def is_pinned(self, step: int) -> bool:
        """Also of a step of which that cannot be known now: it must not be deleted."""
        return paths.may_exist(self.path(step) / PIN)

    def pin(self, step: int) -> None:
        directory = self.require(step)
        paths.refuse_link(directory)
        self._write_pin(directory)

    def _write_pin(self, directory: epath.Path) -> None:
        with open(directory / PIN, "wb", opener=paths.open_to_write) as file:
            file.write(_PINNED)

    def unpin(self, step: int) -> None:
        paths.refuse_link(self.require(step))
        (self.path(step) / PIN).unlink(missing_ok=True)

    # ------------------------------------------------------------ a step that is written here

    def draft(self, step: int) -> epath.Path:
        """Where a step is put together before `publish`."""
        return self._ours(SAVING) / str(step)

    def begin(self, step: int) -> epath.Path:
        """Says that a draft of a step is being written, and where."""
        return self.draft(step)

    def publish(self, step: int, *, replaces: bool = False) -> epath.Path | None:
        """Gives a draft, all of which is durable, the step's name; a step that has it makes room without a gap.

        Returns what it has replaced, which is to be removed once the new name is durable.
        """
        self._refuse_somebodys(step)  # what came while the draft was written
        if not replaces and self._is_step(str(step)):
            raise SaveError(
                f"step {step} is not saved: another checkpoint came to {self.path(step)} meanwhile, and is kept",
                step=step,
            )
        draft, final, old = self.directory / SAVING / str(step), self.directory / str(step), self._old(step)
        if not final.exists():
            draft.rename(final)
            return None
        if _exchange(draft, final):
            return draft
        self._ours(REPLACED)
        remove(old)
        final.rename(old)
        try:
            draft.rename(final)
        except OSError:
            old.rename(final)
            raise
        return old

    def keep_pin(self, step: int) -> None:
        """Pins a draft if it is to replace a step that is pinned."""
        if (self.path(step) / PIN).exists():
            self._write_pin(self.draft(step))

    def _old(self, step: int) -> epath.Path:
        return self.directory / REPLACED / str(step)

    def discard(self, step: int) -> None:
        """Removes what a failed save has left; the failure that is on its way says more than one here."""
        with contextlib.suppress(Exception):
            if (draft := self.draft(step)).exists():
                draft.rmtree()

    # ------------------------------------------------------------ deletion

    def delete(self, step: int) -> None:
        """Takes a step out of the listing at once, then removes its files."""
        self.require(step)
        self.forget(step)
        doomed = self._hide(step)
        _log.info("step %d deleted", step)
        self._remove(doomed)

    def _remove(self, leftover: epath.Path) -> None:
        remove(leftover)

    def _hide(self, step: int) -> epath.Path:
        if self._old(step).exists():  # the next start would set it back
            remove(self._ours(REPLACED) / str(step))
        return self.path(step).rename(self._ours(DELETING) / f"{step}-{time.time_ns()}")

    def set_aside(self, step: int) -> epath.Path:
        """Takes a damaged step out of the listing, and keeps it for whoever wants to look into it."""
        self.forget(step)
        return self.path(step).rename(self._ours(DAMAGED) / f"{step}-{time.time_ns()}")

    # ------------------------------------------------------------ going on from another step

    def branches(self) -> list[branching.Branch]:
        """What rewinds have set aside, the oldest first."""
        found = [branching.parse(path.name, self._numbers(path.name)) for path in self._inside(ABANDONED)]
        return sorted((each for each in found if each and each.steps), key=lambda branch: branch.time)

    def _numbers(self, branch: str) -> list[int]:
        entries = self._inside(f"{ABANDONED}/{branch}")
        return [int(path.name) for path in entries if STEP.fullmatch(path.name)]

    def mark(self, place: str) -> str:
        """What tells the checkpoint in a place of the run from every other one: a checksum of its description."""
        path = self.directory / place
        if paths.is_local(path) and os.path.islink(path):
            return _checksum(os.fsencode(os.readlink(path)))
        for name in (manifests.NAME, names.STEP_METADATA):
            with contextlib.suppress(OSError):
                return _checksum(paths.read_bytes(path / name))
        with contextlib.suppress(OSError):
            return f"{os.stat(path).st_ino % 2**32:08x}"
        return "0" * 8

    def plan_rewind(self, step: int) -> branching.Plan | None:
        """What a rewind to a step moves; None if it is neither listed nor in a branch. Nothing is changed.

        Raises SaveError if the steps have names that ckptmgr does not write, or what is no step is in the way.
        """
        listed = self.steps()
        self._refuse_names(f"the run does not go back to step {step}", step)
        found = branching.plan(step, listed, self.branches(), self.mark, time.time_ns())
        for each in found.returned if found else ():
            self._refuse_somebodys(each, "does not come back")
        return found

    def plan_rewind_without(self, like: branching.Plan) -> branching.Plan:
        """What moves here with a plan for another directory of the run, if the step itself is not here."""
        return branching.plan_without(like.base, like.mark, self.steps(), self.mark, time.time_ns())

    def check_whole(self, step: int, place: str) -> None:
        """Raises CorruptCheckpointError if a step is seen to be damaged; its arrays are not read."""
        missing = self._missing_file(self._read_manifest(step, self.directory / place), place)
        if missing is not None:
            raise CorruptCheckpointError(f"step {step}: {missing}", step=step)

    def _missing_file(self, manifest: manifests.Manifest, place: str) -> str | None:
        return manifests.missing_file(manifest, self.directory / place)

    def rewind(self, plan: branching.Plan) -> None:
        """Moves what is planned. If the process is killed in it, `finish_rewind` moves the rest."""
        if plan.moves:
            self._write_plan(plan.moves)
            self.finish_rewind()

    def finish_rewind(self) -> None:
        """Moves what a rewind has planned and not yet moved."""
        ahead = self._read_plan()
        if ahead is None:
            return
        while ahead:
            self._move(ahead)
            ahead = ahead[1:]
            self._has_moved(ahead)
        self._end_rewind()

    def _move(self, ahead: Sequence[branching.Move]) -> None:
        """Makes the first of these moves, unless it has been made.

        If the second one takes the place that becomes free, the two checkpoints are swapped at once: the place is
        never empty.
        """
        source, target, mark = ahead[0]
        follows = ahead[1] if len(ahead) > 1 and ahead[1].target == source else None
        if follows and self._is_at(source, mark) and self._is_at(follows.source, follows.mark):
            _exchange(self.directory / follows.source, self.directory / source)
        if follows and self._is_at(follows.source, mark):
            source = follows.source  # they are swapped
        if self._is_at(source, mark):
            self._make_place(target)
            self._take_place(self.directory / source, self.directory / target)

    def _is_at(self, place: str, mark: str) -> bool:
        """Whether the checkpoint with this mark is there. What lies behind a symlink to a folder is not ours."""
        folders = (names.OURS, ABANDONED, os.path.dirname(place))
        if any(os.path.islink(self.directory / folder) for folder in folders if folder):
            return False
        return os.path.lexists(self.directory / place) and self.mark(place) == mark

    def _take_place(self, checkpoint: epath.Path, place: epath.Path) -> None:
        """Moves a checkpoint, also over an empty folder. If something is there, it stays where it is."""
        if _is_taken(place) or (os.path.islink(checkpoint) and os.path.lexists(place)):
            _log.error("%s stays there: %s is taken by something else", checkpoint, place)
        else:
            os.rename(checkpoint, place)

    def _make_place(self, target: str) -> None:
        """Makes the folder of a branch. What the step once replaced goes: the next start would set it back."""
        folder, _, name = target.rpartition("/")
        if folder:
            self._ours(folder)
        if (old := self._old(int(name))).exists():
            remove(old)

    def _has_moved(self, ahead: Sequence[branching.Move]) -> None:
        """Does nothing: on a disk every move shows whether it has been made."""

    def _write_plan(self, moves: Sequence[branching.Move]) -> None:
        self._ours(ABANDONED)
        _write_durably(self.directory / REWINDING, json.dumps(moves).encode())

    def _read_plan(self) -> Sequence[branching.Move] | None:
        """The moves ahead; None if no rewind was interrupted."""
        path = self.directory / REWINDING
        if paths.is_local(path) and os.path.islink(path):
            return None
        try:
            moves = [branching.Move(*each) for each in json.loads(paths.read_bytes(path))]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, RecursionError) as problem:
            _log.error("%s cannot be read, and the rewind is not finished: %s", path, problem)
            return None
        if not all(move.is_sound() for move in moves):
            _log.error("%s says what no rewind does, and is not followed: remove it", path)
            return None
        return moves

    def _end_rewind(self) -> None:
        """Makes the new names durable, then forgets the plan."""
        folders = [self.directory / f"{ABANDONED}/{path.name}" for path in self._inside(ABANDONED)]
        for folder in folders:
            with contextlib.suppress(OSError):
                os.rmdir(folder)  # if nothing is left in it
        for folder in (*filter(os.path.isdir, folders), self.directory / ABANDONED, self.directory):
            _sync(folder)
        (self.directory / REWINDING).unlink()

    # ------------------------------------------------------------ what was interrupted

    def tidy(self) -> None:
        """Finishes what an earlier process was stopped in: saves, deletions, and replacing a step."""
        self._move_version_1()
        try:
            self.finish_rewind()
        except Exception as problem:  # of a disk or of a client; the run is usable without it
            _log.error("a rewind of %s was interrupted, and cannot be finished now: %s", self.directory, problem)
        for entry, why in self.leftovers():
            if why == SET_BACK:
                self._take_place(entry, self.directory / entry.name)
            elif why not in _STAYS:
                self._remove(entry)

    def _move_version_1(self) -> None:
        """Moves what version 1 left beside the steps, once."""
        self._is_of_version_2 = os.path.lexists(self.directory / names.VERSION)
        if self._is_of_version_2:
            return
        for name, place in version_1.moves(str(self.directory)):
            self._ours(os.path.dirname(place))
            (self.directory / name).rename(self.directory / place)
        for name in version_1.to_remove(str(self.directory)):
            (self.directory / name).unlink()
        self._write_version()
        self._is_of_version_2 = True

    def _write_version(self) -> None:
        if not os.path.lexists(self.directory / names.VERSION):
            with open(self.directory / names.VERSION, "w", opener=paths.open_to_write) as file:
                file.write("2\n")

    def leftovers(self) -> list[tuple[epath.Path, str]]:
        """What is no step, and why it lies there. `tidy` leaves alone what is damaged, or was set aside."""
        found = [(path, self._why(folder, path.name)) for folder in _WHY for path in self._inside(folder)]
        return found + self._set_aside()

    def _set_aside(self) -> list[tuple[epath.Path, str]]:
        """The steps of the branches."""
        places = [branch.place(step) for branch in self.branches() for step in sorted(branch.steps)]
        return [(self.directory / place, BRANCH) for place in places]

    def _why(self, folder: str, name: str) -> str:
        if folder == REPLACED and not self._is_step(name):
            return SET_BACK
        return _WHY[folder]

    def _inside(self, folder: str) -> list[epath.Path]:
        """What lies in a folder of ours; what a symlink in its place leads to is not ours."""
        if any(os.path.islink(self.directory / each) for each in (names.OURS, folder)):
            return []
        try:
            return sorted((self.directory / folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def taken(self) -> set[int]:
        """The numbers that steps have, and that strangers have as their names."""
        return {int(name) for name in self._entries() if STEP.fullmatch(name)}

    def strangers(self) -> list[str]:
        """What is in it and is neither a step nor ours."""
        steps = {self.path(step).name for step in self.steps()}
        return sorted(set(self._entries()) - steps - {names.OURS})

    def _entries(self) -> Mapping[str, bool]:
        """What is in it, and whether that is a directory; of a directory that is not there, nothing."""
        try:
            with os.scandir(self.directory) as entries:
                return {entry.name: recognize.is_folder(entry) for entry in entries}
        except FileNotFoundError:
            return {}
        except NotADirectoryError:
            raise CheckpointNotFoundError(
                f"{self.directory} is a file, or a part of its path is: a run is a directory",
                directory=str(self.directory),
            ) from None
        except OSError as problem:
            paths.refuse_exhausted(problem)
            raise CheckpointError(f"the run {self.directory} cannot be read: {problem}") from problem


def remove(leftover: epath.Path) -> bool:
    """Removes what is in no listing any more; what cannot be removed now is tried again at the next start."""
    try:
        if paths.is_local(leftover) and os.path.islink(leftover):
            os.unlink(leftover)
        elif leftover.exists():
            leftover.rmtree()
    except Exception as problem:  # of a disk or of a client: the run goes on beside it
        _log.warning("%s could not be removed, and is tried again at the next start: %s", leftover, problem)
        return False
    return True


def _is_taken(path: str | os.PathLike[str]) -> bool:
    """Whether anything but an empty folder is there."""
    if not os.path.lexists(path):
        return False
    return os.path.islink(path) or not os.path.isdir(path) or bool(os.listdir(path))


def _checksum(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def _write_durably(path: epath.Path, data: bytes) -> None:
    """A small file on a disk that is there whole or not at all, also after a power cut."""
    new = f"{path}.new"
    with open(new, "wb", opener=paths.open_to_write) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    _sync(path.parent)


def _sync(directory: epath.Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _writable(directory: epath.Path) -> bool:
    return _may(directory, os.W_OK | os.X_OK)


def _may(directory: epath.Path, what: int) -> bool:
    return os.access(directory, what, effective_ids=os.access in os.supports_effective_ids)


def _exchange(one: epath.Path, other: epath.Path) -> bool:
    """Swaps two names at once (renameat2 with RENAME_EXCHANGE, Linux); False where that cannot be."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
