"""The directory of a run in a bucket, where nothing can be renamed or locked.

    <directory>/<step>/commit_success.txt      the last file of a step: without it the step is not there
    <directory>/<step>/PINNED                  retention leaves it alone
    <directory>/.ckptmgr/saving/<step>         a note: the step is being written under its own name
    <directory>/.ckptmgr/deleting/<step>       a note: the step is being deleted
    <directory>/.ckptmgr/damaged/<step>-*/     a damaged checkpoint whose step was saved again
    <directory>/.ckptmgr/abandoned/<branch>/   what a rewind has set aside: copied, then removed
    <directory>/.ckptmgr/rewinding             the moves that a rewind has not made yet

Every look is one request or more. So what would take a request for each step is not looked up.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from etils.epath import backend

from ckptmgr.format import manifest as manifests
from ckptmgr.format import names, paths
from ckptmgr.format.names import COMMITTED, DAMAGED, DELETING, PIN, REWINDING, SAVING
from ckptmgr.run import directory as directories
from ckptmgr.run import recognize
from ckptmgr.run.branches import Move
from ckptmgr.run.directory import Leftover

_log = logging.getLogger("ckptmgr")
_DAY_S = 86_400.0


class BucketDirectory:
    """A run directory in a bucket."""

    can_replace = False

    def __init__(self, path: epath.Path) -> None:
        self.path = path

    def prepare(self) -> None:
        """Does nothing: a bucket has no directories, and only a write shows whether it can be written to."""

    def upgrade(self) -> None:
        """Does nothing: version 1 left no files of its own in a bucket."""

    # ------------------------------------------------------------ looking

    def entries(self) -> Mapping[str, bool]:
        """Every name may be a folder: finding out would take a request for each."""
        return dict.fromkeys(self._children(self.path), True)

    def find_steps(self, entries: Iterable[str]) -> list[str]:
        return list(filter(self._is_step, entries))

    def _is_step(self, name: str) -> bool:
        """Whether a folder has Orbax's marker and is not a copy of a step of ours, which have plain numbers."""
        marker = self._read(f"{name}/{COMMITTED}")
        if marker is None or (marker and not marker.startswith(recognize.MARKED)):
            return False
        is_own = recognize.marked_step(marker) in (None, recognize.own_number(name))
        if is_own and names.STEP.fullmatch(name):
            return True
        is_signed = self._is_signed(name)
        return is_own if is_signed is None else not is_signed

    def _is_signed(self, name: str) -> bool | None:
        """Whether ckptmgr wrote this step; None if that is not known."""
        metadata = self._read(f"{name}/{names.STEP_METADATA}")
        return None if metadata is None else recognize.is_signature(metadata)

    def is_somebodys(self, name: str) -> bool:
        """An interrupted save is not: a note of ckptmgr is there. (Version 1 wrote no notes.)"""
        if self._is_step(name) or self._note(SAVING, name).exists() or not self._is_taken(name):
            return False
        if not self._is_signed(name):
            return True
        return self._read(f"{name}/{COMMITTED}") is not None  # a copy of another step

    def _is_taken(self, name: str) -> bool:
        """Whether there is an object with this name, or below it."""
        own, found = self._list(self.path / name)
        return any(
            each["name"].rstrip("/") != own or (each["name"] == own and each["type"] == "file") for each in found
        )

    def closed(self) -> list[int]:
        return []

    def inside(self, folder: str) -> list[str]:
        return self._children(self.path / folder)

    def stamp(self, name: str) -> None:
        return None

    def identity(self, name: str) -> None:
        return None

    def mark(self, place: str) -> str:
        return directories.mark_of_description(self.path / place) or "0" * 8

    def missing_file(self, manifest: manifests.Manifest, place: str) -> None:
        return None

    # ------------------------------------------------------------ a step that is written here

    def draft(self, name: str) -> epath.Path:
        return self.path / name

    def begin(self, name: str) -> epath.Path:
        self._write_note(SAVING, name)
        return self.path / name

    def publish(self, name: str) -> None:
        """Removes the note: the marker has made the draft a step."""
        self._note(SAVING, name).unlink(missing_ok=True)

    def discard(self, name: str) -> None:
        if self._note(SAVING, name).exists() and not self._is_step(name):
            self.remove(self.path / name)

    def pin(self, folder: epath.Path) -> None:
        (folder / PIN).write_bytes(b"")

    def unpin(self, folder: epath.Path) -> None:
        (folder / PIN).unlink(missing_ok=True)

    # ------------------------------------------------------------ a step that leaves the listing

    def hide(self, name: str) -> epath.Path:
        self._write_note(DELETING, name)
        (self.path / name / COMMITTED).unlink()
        return self.path / name

    def remove(self, leftover: epath.Path) -> None:
        """Removes what is in no listing, then the notes about it."""
        if directories.remove(leftover) and leftover.parent == self.path:
            for folder in (SAVING, DELETING):
                self._note(folder, leftover.name).unlink(missing_ok=True)

    def set_aside(self, name: str) -> epath.Path:
        aside = self.path / DAMAGED / f"{recognize.own_number(name)}-{time.time_ns()}"
        copy(self.path / name, aside)
        self._remove_all(self.path / name)
        return aside

    def leftovers(self) -> list[Leftover]:
        """A save that another process may still be writing is not among them: a bucket has no lock."""
        saved = [name for name in self._notes_of_no_step(SAVING) if self._is_nobodys(name)]
        deleted = self._notes_of_no_step(DELETING)
        found = [(self.path / name, directories.INTERRUPTED_SAVE) for name in saved]
        found += [(self.path / name, directories.INTERRUPTED_DELETION) for name in deleted]
        return found + [(self.path / DAMAGED / name, directories.KEPT) for name in self.inside(DAMAGED)]

    def set_back(self, replaced: epath.Path) -> None:
        """Does nothing: no step is replaced."""

    # ------------------------------------------------------------ going on from another step

    def write_plan(self, plan: bytes) -> None:
        (self.path / REWINDING).write_bytes(plan)

    def read_plan(self) -> bytes | None:
        try:
            return paths.read_bytes(self.path / REWINDING)
        except FileNotFoundError:
            return None

    def move(self, ahead: Sequence[Move]) -> None:
        """Copies, then removes. Only the first of the moves ahead may have been begun."""
        self._look_anew()
        source, target = (self.path / place for place in ahead[0][:2])
        mark = ahead[0].mark
        if (source / COMMITTED).exists() and self.mark(ahead[0].source) != mark:
            return  # the step was saved after the rewind was planned
        if (target / COMMITTED).exists() and self.mark(ahead[0].target) != mark:
            _log.error("%s is not moved: %s is taken by another checkpoint", source, target)
            return
        if (source / COMMITTED).exists():
            copy(source, target)
            (source / COMMITTED).unlink()
        if self._children(source):
            self._remove_all(source)

    def has_moved(self, rest: bytes) -> None:
        self.write_plan(rest)

    def end_plan(self) -> None:
        (self.path / REWINDING).unlink()

    def _remove_all(self, folder: epath.Path) -> None:
        client = _client(self.path)
        client.rm(client._strip_protocol(str(folder)), recursive=True)

    # ------------------------------------------------------------ notes

    def _note(self, folder: str, name: str) -> epath.Path:
        self._look_anew()
        return self.path / folder / name

    def _write_note(self, folder: str, name: str) -> None:
        said = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        self._note(folder, name).write_bytes(json.dumps(said).encode())

    def _notes_of_no_step(self, folder: str) -> list[str]:
        """The notes without a step. A note may be left although its step is committed."""
        found = sorted(filter(names.STEP.fullmatch, self.inside(folder)), key=int)
        steps = self.find_steps(found)
        return [name for name in found if name not in steps]

    def _is_nobodys(self, name: str) -> bool:
        """Whether the process that began a save is gone. A save of another machine counts as gone after a day."""
        try:
            said = json.loads(self._note(SAVING, name).read_bytes())
            if said["host"] != socket.gethostname():
                return time.time() - float(said["time"]) > _DAY_S
            os.kill(int(said["pid"]), 0)
        except PermissionError:  # the process is another user's, and alive
            return False
        except (OSError, ValueError, KeyError, TypeError):
            return True
        return False

    # ------------------------------------------------------------ requests

    def _read(self, place: str) -> bytes | None:
        """An object, in one request; None if there is none with exactly this name."""
        self._look_anew()
        try:
            return paths.read_bytes(self.path / place)
        except FileNotFoundError:
            return None

    def _children(self, directory: epath.Path) -> list[str]:
        """The names in a directory.

        Some clients list the directory itself too. It may have the same name as an entry; the paths differ.
        """
        own, found = self._list(directory)
        listed = (each["name"].rstrip("/") for each in found)
        return sorted(path.rpartition("/")[2] for path in listed if path != own)

    def _list(self, directory: epath.Path) -> tuple[str, list[dict[str, Any]]]:
        """The path of a directory as its client writes it, and what the client lists there."""
        self._look_anew()
        client = _client(self.path)
        own = client._strip_protocol(str(directory))
        try:
            return own, client.ls(own, detail=True)
        except FileNotFoundError:
            return own, []

    def _look_anew(self) -> None:
        """Makes the client forget its listings: others write there too."""
        _client(self.path).invalidate_cache()


def copy(source: epath.Path, target: epath.Path) -> None:
    """Copies a checkpoint on the server; the file that makes it a step comes last."""
    client = _client(source)
    start = client._strip_protocol(str(source))
    for name in sorted(client.find(start), key=lambda name: name.endswith(f"/{COMMITTED}")):
        client.cp_file(name, f"{target}{name.removeprefix(start)}")


def _client(path: epath.Path) -> Any:
    return backend.fsspec_backend.fs(str(path))
