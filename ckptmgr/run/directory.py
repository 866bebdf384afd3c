"""What the directory of a run must be able to do: `local` does it on a disk, `bucket` in a bucket.

Here the name of a step is that of its folder. A place is a path inside of the run.
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

KEPT = "a damaged checkpoint, set aside: its step was saved again"
BRANCH = "set aside by a rewind; `rewind` to one of these steps brings it back"
SET_BACK = "the old checkpoint of a step whose new save was interrupted; it becomes the step again"
INTERRUPTED_SAVE = "a save that was interrupted"
INTERRUPTED_DELETION = "a deletion that was interrupted"
INTERRUPTED_REDUCTION = "what a params-only policy has taken out of a step, or was about to"
STAYS = (KEPT, BRANCH)
"""These are removed only if somebody asks for it."""
Leftover = tuple[epath.Path, str]
"""What is not a step, and why it is there."""
_log = logging.getLogger("ckptmgr")


class Directory(Protocol):
    """The directory of a run."""

    path: epath.Path
    can_replace: bool
    """Whether a step can be replaced atomically.

    If not, a step is written under its own name, and its last file makes it a step.
    """

    # ------------------------------------------------------------ looking

    def look(self, *only: str) -> None:
        """Sees what is in the run now, or only in these entries.

        In a bucket that is a request, and the questions below are answered from what was seen. On a disk each of
        them looks itself.
        """

    def entries(self) -> Mapping[str, bool]:
        """The names in the directory, and whether each may be a folder; empty if there is no directory."""

    def find_steps(self, entries: Iterable[str]) -> list[str]:
        """The entries that are steps: ckptmgr or Orbax finished something in them."""

    def is_somebodys(self, name: str) -> bool:
        """Whether something that is not a step has this name, so that no step may be written there."""

    def closed(self) -> list[int]:
        """Folders named like steps that may not be read, so it is not known whether they are steps."""

    def inside(self, folder: str) -> list[str]:
        """The names in a folder of ours; empty if a symlink is in its place: its target is not ours."""

    def stamp(self, name: str) -> Stamp:
        """Tells this save of a step from a later one of the same name; None where that is not known."""

    def identity(self, name: str) -> tuple[int, ...] | None:
        """Tells the folder of a step from a later one of the same name; None if it is gone or not known."""

    def is_pinned(self, name: str) -> bool:
        """Also True if that cannot be found out now: then the step must not be deleted."""

    def trust_note(self, name: str) -> bytes | None:
        """What the note about the trust in a step holds; None if there is none, b"" if it cannot be read."""

    def read_ahead(self, files: Iterable[str]) -> Mapping[str, bytes]:
        """What these files hold, all read at the same time; empty where that takes no less time."""

    def mark(self, place: str) -> str:
        """Eight hexadecimal digits that tell the checkpoint in a place from all others."""

    def missing_file(self, manifest: manifests.Manifest, place: str) -> str | None:
        """Which file is missing or has not its recorded size; None if none, as far as it is known."""

    # ------------------------------------------------------------ writing and removing

    def prepare(self) -> None:
        """Makes the directory if it is not there, and raises if it cannot be written to."""

    def draft(self, name: str) -> epath.Path:
        """The folder in which a step is written before `publish`."""

    def begin(self, name: str) -> epath.Path:
        """Notes that a draft is being written; returns its folder."""

    def publish(self, name: str) -> epath.Path | None:
        """Makes a durable draft the step. Returns the old step that it replaced, which is to be removed."""

    def after_publish(self, name: str) -> None:
        """What need not be done before `publish` returns; if it fails, the step is there all the same."""

    def discard(self, name: str) -> None:
        """Removes the draft of a failed save."""

    def pin(self, folder: epath.Path) -> None:
        """Puts a pin into the folder of a step or of a draft."""

    def unpin(self, folder: epath.Path) -> None:
        """Removes the pin."""

    def write_trust(self, folder: epath.Path, note: bytes | None) -> None:
        """Writes the note about the trust in a step, durably and whole; None removes it."""

    def hide(self, name: str) -> epath.Path:
        """Takes a step out of the listing in one move; returns the folder that is then to be removed."""

    def remove(self, *leftovers: epath.Path) -> None:
        """Removes what is in no listing. If that fails, the next start tries again."""

    def set_aside(self, name: str) -> epath.Path:
        """Takes a damaged step out of the listing; returns its new place, where it is kept."""

    def reduce(self, name: str, manifest: manifests.Manifest, was: bytes) -> list[epath.Path]:
        """Gives a step this manifest, which has fewer items, in one move. Returns what is then to be removed.

        `was` is the manifest that the step has now. Raises SaveError if it has another one.
        """

    # ------------------------------------------------------------ going on from another step

    def write_plan(self, plan: bytes) -> None:
        """Writes the moves of a rewind, durably."""

    def read_plan(self) -> bytes | None:
        """The moves that a rewind has not made yet; None if no rewind was interrupted."""

    def move(self, ahead: Sequence[Move]) -> None:
        """Makes the first of these moves, unless it was made already."""

    def has_moved(self, rest: bytes) -> None:
        """Notes the moves that are left, if the checkpoints themselves do not show it."""

    def end_plan(self) -> None:
        """Makes the moves durable, then removes the plan."""

    # ------------------------------------------------------------ what was interrupted

    def upgrade(self) -> None:
        """Moves the files of version 1 to their new places, once."""

    def leftovers(self, *, is_alone: bool = False) -> list[Leftover]:
        """What interrupted processes have left, and damaged steps that were set aside.

        `is_alone`: no other process may write into the run, so each save that is not over was interrupted.
        """

    def set_back(self, replaced: epath.Path) -> None:
        """Makes the old checkpoint the step again, because the new one was not published."""


def remove(leftover: epath.Path) -> bool:
    """Removes a folder; if that fails, only logs it: the run goes on."""
    try:
        if paths.is_local(leftover) and os.path.islink(leftover):
            os.unlink(leftover)
        elif leftover.exists():
            leftover.rmtree()
    except Exception as problem:  # of a disk or of a client
        _log.warning("%s could not be removed; the next start tries again: %s", leftover, problem)
        return False
    return True


def mark_of_description(checkpoint: epath.Path) -> str | None:
    """The mark of a checkpoint, made from its description; None if no description can be read."""
    for name in (manifests.NAME, names.STEP_METADATA):
        with contextlib.suppress(OSError):
            return checksum(paths.read_bytes(checkpoint / name))
    return None


def checksum(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"
