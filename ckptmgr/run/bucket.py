"""The directory of a run in a bucket, where nothing can be renamed or locked.

<directory>/<step>/commit_success.txt      the last file of a step: without it the step is not there
<directory>/.ckptmgr/saving/<step>         a note: the step is being written under its own name
<directory>/.ckptmgr/deleting/<step>       a note: the step is being deleted
<directory>/.ckptmgr/damaged/<step>-*/     a damaged checkpoint whose step was saved again
<directory>/.ckptmgr/abandoned/<branch>/   what a rewind has set aside: copied, then removed
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from etils.epath import backend

from ckptmgr.format import names, paths
from ckptmgr.format.names import COMMITTED, DAMAGED, DELETING, REWINDING, SAVING
from ckptmgr.run import branches, local, recognize
from ckptmgr.run.local import KEPT, Catalog

_log = logging.getLogger("ckptmgr")
_DAY_S = 86_400.0


def open_catalog(directory: epath.Path) -> Catalog:
    """What lies in a run directory, on a disk or in a bucket."""
    kind = Catalog if paths.is_local(directory) else Bucket
    return kind(directory)


class Bucket(Catalog):
    """What lies in one run directory of a bucket."""

    can_replace = False

    def prepare(self) -> None:
        """Does nothing: there are no directories, and whether it can be written to is found out by writing."""

    def has(self, step: int) -> bool:
        self._look_anew()
        return super().has(step)

    def _is_step(self, name: str) -> bool:
        """Whether a folder has Orbax's marker, and is no copy of a step of ours. (Ours have plain numbers.)"""
        marker = self._read(f"{name}/{COMMITTED}")
        if marker is None or (marker and not marker.startswith(recognize.MARKED)):
            return False
        is_own = recognize.marked_step(marker) in (None, recognize.own_number(name))
        if is_own and names.STEP.fullmatch(name):
            return True
        metadata = self._read(f"{name}/{names.STEP_METADATA}")
        return is_own if metadata is None else not recognize.is_signature(metadata)

    def _read(self, name: str) -> bytes | None:
        """An object, in one request; None if there is none, be there others below its name."""
        self._look_anew()
        try:
            found: bytes = self._client().cat_file(str(self.directory / name))
        except FileNotFoundError:
            return None
        return found

    def _is_somebodys(self, step: int) -> bool:
        """What an interrupted save has left is not: there is a note of it. Version 1 wrote none."""
        if self._is_step(str(step)) or self._note(SAVING, step).exists() or not self._is_taken(step):
            return False
        metadata = self._read(f"{step}/{names.STEP_METADATA}")
        if metadata is None or not recognize.is_signature(metadata):
            return True
        return self._read(f"{step}/{COMMITTED}") is not None  # a copy of another step

    def _is_taken(self, step: int) -> bool:
        """Whether there are objects below the name of a step, or one that has it."""
        own, found = self._list(self.path(step))
        return any(
            each["name"].rstrip("/") != own or (each["name"] == own and each["type"] == "file") for each in found
        )

    def identity(self, step: int) -> None:
        return None

    def stamp(self, step: int) -> None:
        return None  # it would be a request for each step, at each look

    def what_is_missing(self, step: int) -> None:
        return None  # it would be requests for each step

    def closed(self) -> list[int]:
        return []

    def _write_pin(self, directory: epath.Path) -> None:
        (directory / names.PIN).write_bytes(b"")

    # ------------------------------------------------------------ a step that is written here

    def draft(self, step: int) -> epath.Path:
        return self.path(step)

    def begin(self, step: int) -> epath.Path:
        self._write_note(SAVING, step)
        return self.path(step)

    def publish(self, step: int, *, replaces: bool = False) -> None:
        """The marker has made it a step."""
        self._note(SAVING, step).unlink(missing_ok=True)

    def keep_pin(self, step: int) -> None:
        """Does nothing: a step that is there is not replaced."""

    def discard(self, step: int) -> None:
        if self._note(SAVING, step).exists() and not self._is_step(str(step)):
            self._remove(self.path(step))

    # ------------------------------------------------------------ deletion

    def set_aside(self, step: int) -> epath.Path:
        self.forget(step)
        aside = self.directory / DAMAGED / f"{step}-{time.time_ns()}"
        self._copy(self.path(step), aside)
        self._remove_all(self.path(step))
        return aside

    def _remove_all(self, folder: epath.Path) -> None:
        client = self._client()
        client.rm(client._strip_protocol(str(folder)), recursive=True)

    def _copy(self, source: epath.Path, target: epath.Path) -> None:
        """Copies a checkpoint, on the server; the file that makes it one comes last."""
        client = self._client()
        start = client._strip_protocol(str(source))
        for name in sorted(client.find(start), key=lambda name: name.endswith(f"/{COMMITTED}")):
            client.cp_file(name, f"{target}{name.removeprefix(start)}")

    # ------------------------------------------------------------ going on from another step

    def _missing_file(self, manifest: object, place: str) -> None:
        return None  # it would be requests for each step

    def _move(self, ahead: Sequence[branches.Move]) -> None:
        """Copies, then removes; of the moves ahead only the first may have been begun."""
        self._look_anew()
        source, target = (self.directory / place for place in ahead[0][:2])
        mark = ahead[0].mark
        if (source / COMMITTED).exists() and self.mark(ahead[0].source) != mark:
            return  # it was saved after the rewind was planned
        if (target / COMMITTED).exists() and self.mark(ahead[0].target) != mark:
            _log.error("%s stays there: %s is taken by a checkpoint", source, target)
            return
        if (source / COMMITTED).exists():
            self._copy(source, target)
            (source / COMMITTED).unlink()
        if self._children(source):
            self._remove_all(source)

    def _has_moved(self, ahead: Sequence[branches.Move]) -> None:
        self._write_plan(ahead)

    def _write_plan(self, moves: Sequence[branches.Move]) -> None:
        (self.directory / REWINDING).write_bytes(json.dumps(moves).encode())

    def _end_rewind(self) -> None:
        (self.directory / REWINDING).unlink()

    def _move_version_1(self) -> None:
        """Does nothing: version 1 left nothing beside the steps of a bucket that tells whose it is."""

    def leftovers(self) -> list[tuple[epath.Path, str]]:
        """A bucket has no lock: what another process may still be saving is none."""
        good = self.steps()
        saved = [step for step in self._notes(SAVING) if step not in good and self._is_nobodys(step)]
        deleted = [step for step in self._notes(DELETING) if step not in good]
        found = [(self.path(step), "a save that was interrupted") for step in saved]
        found += [(self.path(step), "a deletion that was interrupted") for step in deleted]
        return found + [(path, KEPT) for path in self._inside(DAMAGED)] + self._set_aside()

    def _hide(self, step: int) -> epath.Path:
        self._write_note(DELETING, step)
        (self.path(step) / COMMITTED).unlink()
        return self.path(step)

    def _remove(self, leftover: epath.Path) -> None:
        """Removes a step that is none any more, then the notes about it."""
        if local.remove(leftover):
            for folder in (SAVING, DELETING):
                self._note(folder, int(leftover.name)).unlink(missing_ok=True)

    # ------------------------------------------------------------ notes, and what lies here

    def _note(self, folder: str, step: int) -> epath.Path:
        self._look_anew()
        return self.directory / folder / str(step)

    def _write_note(self, folder: str, step: int) -> None:
        said = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        self._note(folder, step).write_bytes(json.dumps(said).encode())

    def _is_nobodys(self, step: int) -> bool:
        """Whether the process that began a save is gone; of another machine's that is believed after a day."""
        try:
            said = json.loads(self._note(SAVING, step).read_bytes())
            if said["host"] != socket.gethostname():
                return time.time() - float(said["time"]) > _DAY_S
            os.kill(int(said["pid"]), 0)
        except PermissionError:  # another user's, which is there
            return False
        except (OSError, ValueError, KeyError, TypeError):
            return True
        return False

    def _notes(self, folder: str) -> list[int]:
        return sorted(int(path.name) for path in self._inside(folder) if names.STEP.fullmatch(path.name))

    def _inside(self, folder: str) -> list[epath.Path]:
        return [self.directory / folder / name for name in self._children(self.directory / folder)]

    def _entries(self) -> Mapping[str, bool]:
        """What is in it; what is a directory is not asked, which would be a request for each."""
        return dict.fromkeys(self._children(self.directory), True)

    def _children(self, directory: epath.Path) -> list[str]:
        """The names in a directory.

        Some clients list the directory itself, which may have the name of what is in it: paths tell them apart.
        """
        own, found = self._list(directory)
        listed = (each["name"].rstrip("/") for each in found)
        return sorted(path.rpartition("/")[2] for path in listed if path != own)

    def _list(self, directory: epath.Path) -> tuple[str, list[Any]]:
        """A directory as its client names it, and what the client lists there."""
        self._look_anew()
        client = self._client()
        own = client._strip_protocol(str(directory))
        try:
            return own, client.ls(own, detail=True)
        except FileNotFoundError:
            return own, []

    def _look_anew(self) -> None:
        """Makes the client forget what it has listed: others write there too."""
        self._client().invalidate_cache()

    def _client(self) -> Any:
        return backend.fsspec_backend.fs(str(self.directory))
