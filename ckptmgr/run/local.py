"""The directory of a run on a disk of this machine. A step gets its name, and loses it, by one rename.

<directory>/<step>/                      a committed checkpoint
<directory>/<step>/PINNED                retention leaves it alone
<directory>/<step>/trust.json            whether somebody trusts it (`trust`)
<directory>/.ckptmgr/saving/<step>/      a step that is being written
<directory>/.ckptmgr/deleting/<step>-*/  a step that is being deleted
<directory>/.ckptmgr/reducing/<step>/    a step without the items that `params_only` does not keep
<directory>/.ckptmgr/replaced/<step>/    the old checkpoint of a step that is being replaced
<directory>/.ckptmgr/damaged/<step>-*/   a damaged checkpoint whose step was saved again
<directory>/.ckptmgr/abandoned/<branch>/<step>/    a checkpoint that a rewind has set aside (`branches`)
<directory>/.ckptmgr/rewinding           what a rewind has still to move
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence

from etils import epath

from ckptmgr.errors import CheckpointError, CheckpointNotFoundError, SaveError
from ckptmgr.format import files, linking, names, paths, recorded
from ckptmgr.format import manifest as manifests
from ckptmgr.format.names import (
    ABANDONED,
    DAMAGED,
    DELETING,
    PIN,
    REDUCING,
    REPLACED,
    REWINDING,
    SAVING,
    STEP,
    TRUST,
)
from ckptmgr.run import directory as directories
from ckptmgr.run import recognize, reducing
from ckptmgr.run.branches import Move
from ckptmgr.run.directory import Leftover
from ckptmgr.run.manifest_cache import Stamp
from ckptmgr.run.own_folder import OwnFolder, may

_WHY = {
    SAVING: directories.INTERRUPTED_SAVE,
    DELETING: directories.INTERRUPTED_DELETION,
    REDUCING: directories.INTERRUPTED_REDUCTION,
    REPLACED: "the old checkpoint of a step that was saved again",
    DAMAGED: directories.KEPT,
}
_PINNED = b"kept by ckptmgr whatever the retention policy says\n"
_log = logging.getLogger("ckptmgr")


class LocalDirectory:
    """A run directory on a disk."""

    can_replace = True

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        self._own = OwnFolder(path)
        self._place = str(path)
        self._recognized: dict[str, tuple[int, ...] | None] = {}

    def prepare(self) -> None:
        self._own.prepare()

    def upgrade(self) -> None:
        self._own.upgrade()

    # ------------------------------------------------------------ looking

    def look(self, *only: str) -> None:
        """Does nothing: every question is asked of the disk itself."""

    def entries(self) -> Mapping[str, bool]:
        try:
            with os.scandir(self.path) as entries:
                return {entry.name: recognize.is_folder(entry) for entry in entries}
        except FileNotFoundError:
            return {}
        except NotADirectoryError:
            raise CheckpointNotFoundError(
                f"{self.path} is not a directory: it is a file, or a part of its path is",
                directory=str(self.path),
            ) from None
        except OSError as problem:
            paths.refuse_exhausted(problem)
            raise CheckpointError(f"the run {self.path} cannot be read: {problem}") from problem

    def find_steps(self, entries: Iterable[str]) -> list[str]:
        return list(filter(self._is_step, entries))

    def _is_step(self, name: str) -> bool:
        """Whether this is a step. A directory that was one and has not changed since is not read again."""
        path = f"{self._place}/{name}"
        seen = recognize.stamp(path)
        if seen is None or self._recognized.get(name) != seen:
            if not recognize.is_step(path):
                self._recognized.pop(name, None)
                return False
            self._recognized[name] = seen
        return True

    def is_somebodys(self, name: str) -> bool:
        """A step may be written over an empty folder."""
        return not self._is_step(name) and _is_taken(self.path / name)

    def closed(self) -> list[int]:
        folders = [name for name, is_folder in self.entries().items() if is_folder and STEP.fullmatch(name)]
        return [int(name) for name in folders if not may(self.path / name, os.R_OK | os.X_OK)]

    def inside(self, folder: str) -> list[str]:
        if any(os.path.islink(self.path / each) for each in (names.OURS, folder)):
            return []
        try:
            return sorted(os.listdir(self.path / folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def stamp(self, name: str) -> Stamp:
        for file in (manifests.NAME, names.STEP_METADATA, "."):
            with contextlib.suppress(OSError):
                found = os.stat(self.path / name / file)
                written = (found.st_mtime_ns, found.st_size) if file != "." else ()  # a pin changes the folder's
                return found.st_dev, found.st_ino, *written
        return None

    def identity(self, name: str) -> tuple[int, ...] | None:
        try:
            found = os.stat(self.path / name)
        except FileNotFoundError:
            return None
        return found.st_ino, *(self.stamp(name) or ())  # the inode number alone may be used again

    def is_pinned(self, name: str) -> bool:
        return paths.may_exist(self.path / name / PIN)

    def trust_note(self, name: str) -> bytes | None:
        try:
            return paths.read_bytes(self.path / name / TRUST)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as problem:
            paths.refuse_exhausted(problem)
            return b""

    def read_ahead(self, files: Iterable[str]) -> Mapping[str, bytes]:
        return {}

    def mark(self, place: str) -> str:
        path = self.path / place
        if os.path.islink(path):
            return directories.checksum(os.fsencode(os.readlink(path)))
        if (mark := directories.mark_of_description(path)) is not None:
            return mark
        with contextlib.suppress(OSError):
            return f"{os.stat(path).st_ino % 2**32:08x}"
        return "0" * 8

    def missing_file(self, manifest: manifests.Manifest, place: str) -> str | None:
        return recorded.missing_file(manifest, self.path / place)

    # ------------------------------------------------------------ a step that is written here

    def draft(self, name: str) -> epath.Path:
        return self._own.folder(SAVING) / name

    def begin(self, name: str) -> epath.Path:
        return self.draft(name)

    def publish(self, name: str) -> epath.Path | None:
        draft, final = self.path / SAVING / name, self.path / name
        if not final.exists():
            draft.rename(final)
            return None
        return self._swap(draft, final)

    def _swap(self, draft: epath.Path, final: epath.Path) -> epath.Path:
        """Puts a draft in the place of a step; returns where the old step is now."""
        if files.exchange(draft, final):
            return draft
        old = self._own.folder(REPLACED) / final.name
        directories.remove(old)
        final.rename(old)
        try:
            draft.rename(final)
        except OSError:
            old.rename(final)
            raise
        return old

    def after_publish(self, name: str) -> None:
        """Does nothing: the rename was all."""

    def discard(self, name: str) -> None:
        if (draft := self.draft(name)).exists():
            draft.rmtree()

    def pin(self, folder: epath.Path) -> None:
        paths.refuse_link(folder)
        with open(folder / PIN, "wb", opener=paths.open_to_write) as file:
            file.write(_PINNED)
        files.sync([folder / PIN, folder])

    def unpin(self, folder: epath.Path) -> None:
        paths.refuse_link(folder)
        (folder / PIN).unlink(missing_ok=True)
        files.sync([folder])

    def write_trust(self, folder: epath.Path, note: bytes | None) -> None:
        paths.refuse_link(folder)
        if note is None:
            (folder / TRUST).unlink(missing_ok=True)
        else:
            self._own.folder(names.OURS)
            files.write(self.path / names.NEW_TRUST, note)
            os.replace(self.path / names.NEW_TRUST, folder / TRUST)
        files.sync([folder])

    # ------------------------------------------------------------ a step that leaves the listing

    def hide(self, name: str) -> epath.Path:
        step = recognize.own_number(name)
        self._forget_replaced(str(step))
        return (self.path / name).rename(self._own.folder(DELETING) / f"{step}-{time.time_ns()}")

    def _forget_replaced(self, step: str) -> None:
        """Removes the old checkpoint of a step: the next start would make it the step again."""
        if (self.path / REPLACED / step).exists():
            directories.remove(self._own.folder(REPLACED) / step)

    def remove(self, *leftovers: epath.Path) -> None:
        for each in leftovers:
            directories.remove(each)

    def set_aside(self, name: str) -> epath.Path:
        return (self.path / name).rename(
            self._own.folder(DAMAGED) / f"{recognize.own_number(name)}-{time.time_ns()}"
        )

    def reduce(self, name: str, manifest: manifests.Manifest, was: bytes) -> list[epath.Path]:
        """Makes a folder with hard links to the files that stay, and swaps it with the step."""
        draft, final = self._own.folder(REDUCING) / name, self.path / name
        paths.refuse_link(final)
        directories.remove(draft)
        gone = manifest.reduced.items if manifest.reduced else ()
        stay = [file for file in files.walk(final)[1] if not reducing.is_below(file, gone)]
        linking.link(final, draft, [file for file in stay if file != manifests.NAME])
        files.write(draft / manifests.NAME, manifests.encode(manifest), durable=False)
        files.sync([draft / manifests.NAME, *files.walk(draft)[0]])
        if missing := recorded.missing_file(manifest, draft):
            raise SaveError(f"step {manifest.step}: {missing}", step=manifest.step)
        _check_still(final, was, manifest.step)
        old = self._swap(draft, final)
        try:
            _check_still(old, was, manifest.step)
        except SaveError:
            _swap_back(old, final, draft)
            raise
        files.sync([draft.parent, old.parent, self.path])
        return [old]

    def leftovers(self, *, is_alone: bool = False) -> list[Leftover]:
        return [
            (self.path / folder / name, self._why(folder, name)) for folder in _WHY for name in self.inside(folder)
        ]

    def _why(self, folder: str, name: str) -> str:
        if folder == REPLACED and not self._is_step(name):
            return directories.SET_BACK
        return _WHY[folder]

    def set_back(self, replaced: epath.Path) -> None:
        _take_place(replaced, self.path / replaced.name)

    # ------------------------------------------------------------ going on from another step

    def write_plan(self, plan: bytes) -> None:
        self._own.folder(ABANDONED)
        files.replace(self.path / REWINDING, plan)

    def read_plan(self) -> bytes | None:
        path = self.path / REWINDING
        if os.path.islink(path):
            return None
        try:
            return paths.read_bytes(path)
        except FileNotFoundError:
            return None

    def move(self, ahead: Sequence[Move]) -> None:
        """If the second move goes to the place that the first one empties, both are swapped atomically."""
        source, target, mark = ahead[0]
        follows = ahead[1] if len(ahead) > 1 and ahead[1].target == source else None
        if follows and self._is_at(source, mark) and self._is_at(follows.source, follows.mark):
            files.exchange(self.path / follows.source, self.path / source)
        if follows and self._is_at(follows.source, mark):
            source = follows.source  # the swap has been made
        if self._is_at(source, mark):
            self._make_place(target)
            _take_place(self.path / source, self.path / target)

    def _is_at(self, place: str, mark: str) -> bool:
        """Whether the checkpoint with this mark is there. A folder behind a symlink is not ours."""
        folders = (names.OURS, ABANDONED, os.path.dirname(place))
        if any(os.path.islink(self.path / folder) for folder in folders if folder):
            return False
        return os.path.lexists(self.path / place) and self.mark(place) == mark

    def _make_place(self, target: str) -> None:
        """Makes the folder of the branch."""
        folder, _, name = target.rpartition("/")
        if folder:
            self._own.folder(folder)
        self._forget_replaced(name)

    def has_moved(self, rest: bytes) -> None:
        """Does nothing: on a disk the checkpoints themselves show which moves are made."""

    def end_plan(self) -> None:
        folders = [self.path / ABANDONED / name for name in self.inside(ABANDONED)]
        for folder in folders:
            with contextlib.suppress(OSError):
                os.rmdir(folder)  # if it is empty
        files.sync([*filter(os.path.isdir, folders), self.path / ABANDONED, self.path])
        (self.path / REWINDING).unlink()


def _check_still(checkpoint: epath.Path, was: bytes, step: int) -> None:
    """Raises SaveError if a checkpoint was replaced, or pinned, since its manifest was read."""
    if paths.read_bytes(checkpoint / manifests.NAME) != was or paths.may_exist(checkpoint / PIN):
        raise SaveError(f"step {step} was replaced or pinned meanwhile", step=step)


def _swap_back(old: epath.Path, final: epath.Path, draft: epath.Path) -> None:
    if not files.exchange(old, final):
        final.rename(draft)
        old.rename(final)


def _take_place(checkpoint: epath.Path, place: epath.Path) -> None:
    """Moves a checkpoint, also over an empty folder. It is not moved if the place is taken."""
    if _is_taken(place) or (os.path.islink(checkpoint) and os.path.lexists(place)):
        _log.error("%s is not moved: %s is taken by something else", checkpoint, place)
    else:
        os.rename(checkpoint, place)


def _is_taken(path: epath.Path) -> bool:
    """Whether anything but an empty folder is there."""
    if not os.path.lexists(path):
        return False
    return os.path.islink(path) or not os.path.isdir(path) or bool(os.listdir(path))
