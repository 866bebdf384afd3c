"""What the directory of a run must be able to do. `local` does it on a disk, `bucket` in a bucket; `catalog` asks.

A step is meant by the name of its folder, a place by its path inside of the run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from etils import epath

from ckptmgr.format import manifest as manifests
from ckptmgr.format import names, paths
from ckptmgr.run.branches import Move
from ckptmgr.run.manifest_cache import Stamp

KEPT = "damaged, and set aside for whoever wants to look into it"
BRANCH = "set aside by a rewind: rewind to one of its steps brings it back"
SET_BACK = "set aside for a save that was interrupted: it is the step again"
INTERRUPTED_SAVE = "a save that was interrupted"
INTERRUPTED_DELETION = "a deletion that was interrupted"
STAYS = (KEPT, BRANCH)
"""What is left alone unless somebody asks for its removal."""
Leftover = tuple[epath.Path, str]
"""What is no step, and why it lies there."""
_log = logging.getLogger("ckptmgr")


class Directory(Protocol):
    """A directory in which a run lies."""

    path: epath.Path
    can_replace: bool
    """Whether a step can make room for another of its number without a moment in which neither is there.

    If not, a step is written under its own name, and its last file makes it one.
    """

    # ------------------------------------------------------------ looking

    def entries(self) -> Mapping[str, bool]:
        """What is in it, and whether that may be a folder; of a directory that is not there, nothing."""

    def find_steps(self, entries: Iterable[str]) -> list[str]:
        """Those of these entries that are steps: ckptmgr or Orbax finished something in them."""

    def is_somebodys(self, name: str) -> bool:
        """Whether something has the name of a step and is none, so that no step may be written there."""

    def closed(self) -> list[int]:
        """Folders with the name of a step that cannot be looked into, so that it is not known whether they are."""

    def inside(self, folder: str) -> list[str]:
        """The names in a folder of ours; what a symlink in its place leads to is not ours."""

    def stamp(self, name: str) -> Stamp:
        """What tells one save of a step from another that is put in its place; None where that is not known."""

    def identity(self, name: str) -> tuple[int, int] | None:
        """What tells the folder of a step from another of its name; None if it is gone, or that is not known."""

    def mark(self, place: str) -> str:
        """Eight hexadecimal digits that tell the checkpoint in a place from every other one."""

    def missing_file(self, manifest: manifests.Manifest, place: str) -> str | None:
        """A file that is not there with its recorded size, and why; None if all are, or looking costs too much."""

    # ------------------------------------------------------------ writing and removing

    def prepare(self) -> None:
        """Makes the directory if it is not there, and raises if it cannot be written to."""

    def draft(self, name: str) -> epath.Path:
        """Where a step is put together before `publish`."""

    def begin(self, name: str) -> epath.Path:
        """Takes a note that a draft of a step is being written; gives the draft."""

    def publish(self, name: str) -> epath.Path | None:
        """Makes a draft, all of which is durable, the step; gives the step that it has replaced, to be removed."""

    def discard(self, name: str) -> None:
        """Removes the draft of a save that has failed."""

    def pin(self, folder: epath.Path) -> None:
        """Puts a pin into the folder of a step or of a draft."""

    def unpin(self, folder: epath.Path) -> None:
        """Removes the pin."""

    def hide(self, name: str) -> epath.Path:
        """Takes a step out of the listing at once; gives what is then to be removed."""

    def remove(self, leftover: epath.Path) -> None:
        """Removes what is in no listing; what cannot be removed now is tried again at the next start."""

    def set_aside(self, name: str) -> epath.Path:
        """Takes a damaged step out of the listing, and keeps it; gives its new place."""

    # ------------------------------------------------------------ going on from another step

    def write_plan(self, plan: bytes) -> None:
        """Writes durably what a rewind is going to move."""

    def read_plan(self) -> bytes | None:
        """What a rewind has still to move; None if none was interrupted."""

    def move(self, ahead: Sequence[Move]) -> None:
        """Makes the first of these moves, unless it has been made."""

    def has_moved(self, rest: bytes) -> None:
        """Takes note of the plan that is left, where the moves themselves do not show what has been made."""

    def end_plan(self) -> None:
        """Makes what was moved durable, then forgets the plan."""

    # ------------------------------------------------------------ what was interrupted

    def upgrade(self) -> None:
        """Moves what version 1 has left, once."""

    def leftovers(self) -> list[Leftover]:
        """What stopped processes have left, and damaged steps that were set aside."""

    def set_back(self, replaced: epath.Path) -> None:
        """Makes the old checkpoint the step again: the new one did not come in its place."""


def remove(leftover: epath.Path) -> bool:
    """Removes a folder, or says that it could not: the run goes on beside it."""
    try:
        if paths.is_local(leftover) and os.path.islink(leftover):
            os.unlink(leftover)
        elif leftover.exists():
            leftover.rmtree()
    except Exception as problem:  # of a disk or of a client
        _log.warning("%s could not be removed, and is tried again at the next start: %s", leftover, problem)
        return False
    return True


def mark_of_description(checkpoint: epath.Path) -> str | None:
    """The mark of a checkpoint that has a description which can be read."""
    for name in (manifests.NAME, names.STEP_METADATA):
        with contextlib.suppress(OSError):
            return checksum(paths.read_bytes(checkpoint / name))
    return None


def checksum(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"
