"""The directory of a run: which steps are there, their manifests, pins, and deletion.

The disk is the truth: nothing about steps is remembered that the next listing could contradict.

    <directory>/<step>/             a committed checkpoint
    <directory>/<step>/PINNED       retention leaves it alone
    <directory>/<step>.replaced/    the old checkpoint of a step that is being replaced
    <directory>/.deleted-<step>-*/  on its way out
    <directory>/<step>.damaged-*/   a damaged checkpoint whose step was saved again
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from ckptmgr import manifest as manifests
from ckptmgr import paths
from ckptmgr.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError

PIN = "PINNED"
COMMITTED = "commit_success.txt"
"""Orbax's marker, the last file of a step where nothing can be renamed."""
REPLACED = ".replaced"
DELETED = ".deleted-"
DAMAGED = ".damaged-"
KEPT = "damaged, and set aside for whoever wants to look into it"
SET_BACK = "set aside for a save that was interrupted: it is the step again"
_STEP = re.compile(r"0|[1-9][0-9]*")
UNFINISHED = ".orbax-checkpoint-tmp"
"""Orbax's ending for a step that is being written."""
_log = logging.getLogger("ckptmgr")


class Catalog:
    """What lies in one run directory on a disk of this machine."""

    can_replace = True
    """Whether a step can make room for another of its number without a moment in which neither is there."""

    def __init__(self, directory: epath.Path, read_stock: Any) -> None:
        self.directory = directory
        self._read_stock = read_stock
        self._manifests: dict[int, manifests.Manifest] = {}
        self.damaged: set[int] = set()
        """Steps that a restore has passed over: retention does not count them, and deletes none."""

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

    def path(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """The committed steps on disk, in order."""
        return sorted(int(name) for name in self._folders() if _STEP.fullmatch(name))

    def has(self, step: int) -> bool:
        """Whether a step is committed."""
        return bool(self.path(step).exists())

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
        if (self.directory / manifests.NAME).exists() or (self.directory / "_CHECKPOINT_METADATA").exists():
            return f"this is the directory of one checkpoint; open its parent, {self.directory.parent}"
        below = [entry for entry in self.directory.iterdir() if entry.is_dir()]
        runs = [entry.name for entry in below if type(self)(entry, None).steps()]
        return f"did you mean {self.directory / runs[0]}?" if runs else "nothing is saved in it yet"

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

        It never changes, so it is read once; `fresh` reads it again, to see whether it still is whole.
        """
        if fresh or step not in self._manifests:
            path = self.require(step) / manifests.NAME
            if path.exists():
                manifest = manifests.decode(path.read_bytes(), step=step, path=manifests.NAME)
            else:
                manifest = self._read_stock(step, path.parent)
            self._manifests[step] = manifest
        return self._manifests[step]

    def identity(self, step: int) -> tuple[int, int] | None:
        """What tells a step from another of the same number; None if it is gone, or not on a local disk."""
        try:
            found = os.stat(self.path(step))
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns  # the number alone goes to the next file

    def forget(self, step: int) -> None:
        """Drops what was remembered of a step that was replaced or deleted."""
        self._manifests.pop(step, None)
        self.damaged.discard(step)

    # ------------------------------------------------------------ pins

    def pinned(self) -> set[int]:
        return {step for step in self.steps() if (self.path(step) / PIN).exists()}

    def pin(self, step: int) -> None:
        path = self.require(step) / PIN
        said = b"kept by ckptmgr whatever the retention policy says\n"
        if not paths.is_local(path):
            path.write_bytes(said)
            return
        paths.refuse_link(path.parent)
        with open(path, "wb", opener=paths.open_to_write) as file:
            file.write(said)

    def unpin(self, step: int) -> None:
        paths.refuse_link(self.require(step))
        (self.path(step) / PIN).unlink(missing_ok=True)

    # ------------------------------------------------------------ a step that is copied here

    def draft(self, step: int) -> epath.Path:
        """Where a step is put together before `publish`."""
        return self.directory / f"{step}{UNFINISHED}"

    def publish(self, step: int) -> None:
        """Makes a draft a step; all of it is durable already, Orbax's marker was written last."""
        self.draft(step).rename(self.path(step))

    # ------------------------------------------------------------ deletion

    def delete(self, step: int) -> None:
        """Takes a step out of the listing at once, then removes its files."""
        self.require(step)
        self.forget(step)
        doomed = self._hide(step)
        _log.info("step %d deleted", step)
        remove(doomed)

    def _hide(self, step: int) -> epath.Path:
        return self.path(step).rename(self.directory / f"{DELETED}{step}-{time.time_ns()}")

    def set_aside(self, step: int) -> epath.Path:
        """Takes a damaged step out of the listing, and keeps it for whoever wants to look into it."""
        self.forget(step)
        return self.path(step).rename(self.directory / f"{step}{DAMAGED}{time.time_ns()}")

    def tidy(self) -> None:
        """Finishes what an earlier process was stopped in: saves, deletions, and replacing a step."""
        for entry, why in self.leftovers():
            if why == SET_BACK:
                entry.rename(self.directory / entry.name.removesuffix(REPLACED))
            elif why != KEPT:
                remove(entry)

    def leftovers(self) -> list[tuple[epath.Path, str]]:
        """What is no step, and why it lies there. What is damaged is kept: `tidy` leaves it alone."""
        found = ((self.directory / name, self._why(name)) for name in sorted(self._folders()))
        return [(path, why) for path, why in found if why is not None]

    def _why(self, name: str) -> str | None:
        if name.startswith(DELETED):
            return "a deletion that was interrupted"
        if name.endswith(UNFINISHED):
            return "a save that was interrupted"
        if name.endswith(REPLACED):
            is_back = (self.directory / name.removesuffix(REPLACED)).exists()
            return "replaced by a newer save of the step" if is_back else SET_BACK
        return KEPT if DAMAGED in name else None

    def _folders(self) -> list[str]:
        """The names of the directories in it; of a directory that is not there, none."""
        try:
            with os.scandir(self.directory) as entries:
                return [entry.name for entry in entries if entry.is_dir()]
        except FileNotFoundError:
            return []


def remove(leftover: epath.Path) -> None:
    """Removes what is in no listing any more; what cannot be removed now is tried again at the next start."""
    try:
        if paths.is_local(leftover) and os.path.islink(leftover):
            os.unlink(leftover)
            return
        leftover.rmtree()
    except Exception as problem:  # of a disk or of a client: the run goes on beside it
        _log.warning("%s could not be removed, and is tried again at the next start: %s", leftover, problem)


def _writable(directory: epath.Path) -> bool:
    return os.access(directory, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
