"""`.ckptmgr/` of a run on a disk: it is made here, checked, and taken over from version 1."""

from __future__ import annotations

import contextlib
import errno
import os

from etils import epath

from ckptmgr.format import names, paths
from ckptmgr.format.names import DAMAGED, DELETING, REDUCING, REPLACED, SAVING
from ckptmgr.run import version_1


class OwnFolder:
    """The folder `.ckptmgr/` of one run."""

    def __init__(self, run: epath.Path) -> None:
        self._run = run
        self._is_of_version_2 = False

    def prepare(self) -> None:
        """Makes the directory of the run and this folder, and raises if they cannot be written to."""
        if self._run.exists() and not self._run.is_dir():
            raise NotADirectoryError(f"directory {self._run} is a file")
        try:
            self._run.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise NotADirectoryError(f"directory {self._run}: a part of this path is a file") from None
        except PermissionError:
            raise PermissionError(f"directory {self._run} cannot be written to: no permission") from None
        if not _writable(self._run):
            raise PermissionError(f"directory {self._run} cannot be written to: no permission")
        self._is_of_version_2 = os.path.lexists(self._run / names.VERSION)
        for folder in (SAVING, DELETING, REDUCING, REPLACED, DAMAGED):
            if folder == SAVING or os.path.lexists(self._run / folder):
                self.folder(folder)

    def folder(self, folder: str) -> epath.Path:
        """A folder of ours in the run, for example `names.SAVING`; it is made if it is missing."""
        for each in dict.fromkeys([names.OURS, folder]):
            self._make(self._run / each)
        if self._is_of_version_2:  # also after somebody has removed `.ckptmgr/`
            self._write_version()
        return self._run / folder

    def _make(self, folder: epath.Path) -> None:
        paths.refuse_link(folder)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        if not folder.is_dir():
            raise NotADirectoryError(
                f"{folder} is a file; ckptmgr needs a folder of that name. Move the file away"
            )
        if not _writable(folder):
            raise PermissionError(
                f"{folder} cannot be written to: no permission. Make the user that trains its owner"
            )
        if os.stat(folder).st_dev != os.stat(self._run).st_dev:
            raise OSError(
                errno.EXDEV,
                f"{folder} is on another file system than the steps, and a step is renamed from there. Unmount it",
            )

    def upgrade(self) -> None:
        """Moves what version 1 has left beside the steps, once."""
        self._is_of_version_2 = os.path.lexists(self._run / names.VERSION)
        if self._is_of_version_2:
            return
        for name, place in version_1.moves(str(self._run)):
            self.folder(os.path.dirname(place))
            (self._run / name).rename(self._run / place)
        for name in version_1.to_remove(str(self._run)):
            (self._run / name).unlink()
        self._write_version()
        self._is_of_version_2 = True

    def _write_version(self) -> None:
        if not os.path.lexists(self._run / names.VERSION):
            with open(self._run / names.VERSION, "w", opener=paths.open_to_write) as file:
                file.write("2\n")


def _writable(directory: epath.Path) -> bool:
    return may(directory, os.W_OK | os.X_OK)


def may(directory: epath.Path, what: int) -> bool:
    """Whether this process may do this to a directory: `os.R_OK`, `os.W_OK` or `os.X_OK`."""
    return os.access(directory, what, effective_ids=os.access in os.supports_effective_ids)
