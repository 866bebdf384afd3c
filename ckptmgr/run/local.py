"""The directory of a run on a disk of this machine. A step gets its name, and loses it, by one rename.

<directory>/<step>/                      a committed checkpoint
<directory>/<step>/PINNED                retention leaves it alone
<directory>/.ckptmgr/saving/<step>/      a step that is being written
<directory>/.ckptmgr/deleting/<step>-*/  a step that is being deleted
<directory>/.ckptmgr/replaced/<step>/    the old checkpoint of a step that is being replaced
<directory>/.ckptmgr/damaged/<step>-*/   a damaged checkpoint whose step was saved again
<directory>/.ckptmgr/abandoned/<branch>/<step>/    a checkpoint that a rewind has set aside (`branches`)
<directory>/.ckptmgr/rewinding           what a rewind has still to move
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence

from etils import epath

from ckptmgr.errors import CheckpointError, CheckpointNotFoundError
from ckptmgr.format import files, names, paths
from ckptmgr.format import manifest as manifests
from ckptmgr.format.names import ABANDONED, DAMAGED, DELETING, PIN, REPLACED, REWINDING, SAVING, STEP
from ckptmgr.run import directory as directories
from ckptmgr.run import recognize, version_1
from ckptmgr.run.branches import Move
from ckptmgr.run.directory import Leftover
from ckptmgr.run.manifest_cache import Stamp

_WHY = {
    SAVING: directories.INTERRUPTED_SAVE,
    DELETING: directories.INTERRUPTED_DELETION,
    REPLACED: "replaced by a newer save of the step",
    DAMAGED: directories.KEPT,
}
_PINNED = b"kept by ckptmgr whatever the retention policy says\n"
_log = logging.getLogger("ckptmgr")


class LocalDirectory:
    """A run directory on a disk."""

    can_replace = True

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        self._is_of_version_2 = False
        self._place = str(path)
        self._recognized: dict[str, tuple[int, ...] | None] = {}

    # ------------------------------------------------------------ our folder

    def prepare(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"directory {self.path} is a file")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise NotADirectoryError(f"directory {self.path}: a part of this path is a file") from None
        except PermissionError:
            raise PermissionError(f"directory {self.path} cannot be written to: no permission") from None
        if not _writable(self.path):
            raise PermissionError(f"directory {self.path} cannot be written to: no permission")
        self._is_of_version_2 = os.path.lexists(self.path / names.VERSION)
        for folder in (SAVING, DELETING, REPLACED, DAMAGED):
            if folder == SAVING or os.path.lexists(self.path / folder):
                self._ours(folder)

    def _ours(self, folder: str) -> epath.Path:
        """A folder of ours in the run, which is made if it is not there."""
        for each in dict.fromkeys([names.OURS, folder]):
            self._make_ours(self.path / each)
        if self._is_of_version_2:  # also after somebody has removed all of it
            self._write_version()
        return self.path / folder

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
        if os.stat(folder).st_dev != os.stat(self.path).st_dev:
            raise OSError(
                errno.EXDEV,
                f"{folder} is on another file system than the steps, which are renamed from there. Unmount it",
            )

    def upgrade(self) -> None:
        self._is_of_version_2 = os.path.lexists(self.path / names.VERSION)
        if self._is_of_version_2:
            return
        for name, place in version_1.moves(str(self.path)):
            self._ours(os.path.dirname(place))
            (self.path / name).rename(self.path / place)
        for name in version_1.to_remove(str(self.path)):
            (self.path / name).unlink()
        self._write_version()
        self._is_of_version_2 = True

    def _write_version(self) -> None:
        if not os.path.lexists(self.path / names.VERSION):
            with open(self.path / names.VERSION, "w", opener=paths.open_to_write) as file:
                file.write("2\n")

    # ------------------------------------------------------------ looking

    def entries(self) -> Mapping[str, bool]:
        try:
            with os.scandir(self.path) as entries:
                return {entry.name: recognize.is_folder(entry) for entry in entries}
        except FileNotFoundError:
            return {}
        except NotADirectoryError:
            raise CheckpointNotFoundError(
                f"{self.path} is a file, or a part of its path is: a run is a directory",
                directory=str(self.path),
            ) from None
        except OSError as problem:
            paths.refuse_exhausted(problem)
            raise CheckpointError(f"the run {self.path} cannot be read: {problem}") from problem

    def find_steps(self, entries: Iterable[str]) -> list[str]:
        return list(filter(self._is_step, entries))

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

    def is_somebodys(self, name: str) -> bool:
        """An empty folder may be taken."""
        return not self._is_step(name) and _is_taken(self.path / name)

    def closed(self) -> list[int]:
        folders = [name for name, is_folder in self.entries().items() if is_folder and STEP.fullmatch(name)]
        return [int(name) for name in folders if not _may(self.path / name, os.R_OK | os.X_OK)]

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
                written = (found.st_mtime_ns, found.st_size) if file != "." else ()  # a pin is a file in it
                return found.st_dev, found.st_ino, *written
        return None

    def identity(self, name: str) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path / name)
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns  # the number alone goes to the next file

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
        return manifests.missing_file(manifest, self.path / place)

    # ------------------------------------------------------------ a step that is written here

    def draft(self, name: str) -> epath.Path:
        return self._ours(SAVING) / name

    def begin(self, name: str) -> epath.Path:
        return self.draft(name)

    def publish(self, name: str) -> epath.Path | None:
        draft, final, old = self.path / SAVING / name, self.path / name, self.path / REPLACED / name
        if not final.exists():
            draft.rename(final)
            return None
        if files.exchange(draft, final):
            return draft
        self._ours(REPLACED)
        directories.remove(old)
        final.rename(old)
        try:
            draft.rename(final)
        except OSError:
            old.rename(final)
            raise
        return old

    def discard(self, name: str) -> None:
        if (draft := self.draft(name)).exists():
            draft.rmtree()

    def pin(self, folder: epath.Path) -> None:
        paths.refuse_link(folder)
        with open(folder / PIN, "wb", opener=paths.open_to_write) as file:
            file.write(_PINNED)

    def unpin(self, folder: epath.Path) -> None:
        paths.refuse_link(folder)
        (folder / PIN).unlink(missing_ok=True)

    # ------------------------------------------------------------ a step that leaves the listing

    def hide(self, name: str) -> epath.Path:
        step = recognize.own_number(name)
        self._forget_replaced(str(step))
        return (self.path / name).rename(self._ours(DELETING) / f"{step}-{time.time_ns()}")

    def _forget_replaced(self, step: str) -> None:
        """Removes what a step once replaced: the next start would set it back."""
        if (self.path / REPLACED / step).exists():
            directories.remove(self._ours(REPLACED) / step)

    def remove(self, leftover: epath.Path) -> None:
        directories.remove(leftover)

    def set_aside(self, name: str) -> epath.Path:
        return (self.path / name).rename(self._ours(DAMAGED) / f"{recognize.own_number(name)}-{time.time_ns()}")

    def leftovers(self) -> list[Leftover]:
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
        self._ours(ABANDONED)
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
        """If the second move takes the place that becomes free, the two checkpoints are swapped at once: the place
        is never empty.
        """
        source, target, mark = ahead[0]
        follows = ahead[1] if len(ahead) > 1 and ahead[1].target == source else None
        if follows and self._is_at(source, mark) and self._is_at(follows.source, follows.mark):
            files.exchange(self.path / follows.source, self.path / source)
        if follows and self._is_at(follows.source, mark):
            source = follows.source  # they are swapped
        if self._is_at(source, mark):
            self._make_place(target)
            _take_place(self.path / source, self.path / target)

    def _is_at(self, place: str, mark: str) -> bool:
        """Whether the checkpoint with this mark is there. What lies behind a symlink to a folder is not ours."""
        folders = (names.OURS, ABANDONED, os.path.dirname(place))
        if any(os.path.islink(self.path / folder) for folder in folders if folder):
            return False
        return os.path.lexists(self.path / place) and self.mark(place) == mark

    def _make_place(self, target: str) -> None:
        """Makes the folder of a branch."""
        folder, _, name = target.rpartition("/")
        if folder:
            self._ours(folder)
        self._forget_replaced(name)

    def has_moved(self, rest: bytes) -> None:
        """Does nothing: on a disk every move shows whether it has been made."""

    def end_plan(self) -> None:
        folders = [self.path / ABANDONED / name for name in self.inside(ABANDONED)]
        for folder in folders:
            with contextlib.suppress(OSError):
                os.rmdir(folder)  # if nothing is left in it
        files.sync([*filter(os.path.isdir, folders), self.path / ABANDONED, self.path])
        (self.path / REWINDING).unlink()


def _take_place(checkpoint: epath.Path, place: epath.Path) -> None:
    """Moves a checkpoint, also over an empty folder. If something is there, it stays where it is."""
    if _is_taken(place) or (os.path.islink(checkpoint) and os.path.lexists(place)):
        _log.error("%s stays there: %s is taken by something else", checkpoint, place)
    else:
        os.rename(checkpoint, place)


def _is_taken(path: epath.Path) -> bool:
    """Whether anything but an empty folder is there."""
    if not os.path.lexists(path):
        return False
    return os.path.islink(path) or not os.path.isdir(path) or bool(os.listdir(path))


def _writable(directory: epath.Path) -> bool:
    return _may(directory, os.W_OK | os.X_OK)


def _may(directory: epath.Path, what: int) -> bool:
    return os.access(directory, what, effective_ids=os.access in os.supports_effective_ids)
