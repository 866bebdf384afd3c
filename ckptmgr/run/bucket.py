"""The directory of a run in a bucket, where nothing can be renamed or locked.

    <directory>/<step>/commit_success.txt      the last file of a step: without it the step is not there
    <directory>/<step>/PINNED                  retention leaves it alone
    <directory>/<step>/trust.json              whether somebody trusts it (`trust`)
    <directory>/.ckptmgr/lock                  the claim of the process that writes (`claim`)
    <directory>/.ckptmgr/saving/<step>         a note: a save of the step is in progress, or has failed
    <directory>/.ckptmgr/deleting/<step>       a note: the step is being deleted
    <directory>/.ckptmgr/reducing/<step>       a note: items are being taken out of the step
    <directory>/.ckptmgr/damaged/<step>-*/     a damaged checkpoint whose step was saved again
    <directory>/.ckptmgr/abandoned/<branch>/   what a rewind has set aside: copied, then removed
    <directory>/.ckptmgr/rewinding             the moves that a rewind has not made yet

Every request takes time. So `look` lists the whole run, with one request for each 1,000 small files. The other
questions are answered from what it saw: which steps there are, their pins, and the sizes and identities of their
files. What must be read of a file is read once for each identity.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from etils import epath

from ckptmgr.errors import CheckpointError, SaveError
from ckptmgr.format import manifest as manifests
from ckptmgr.format import names, objects
from ckptmgr.format.names import COMMITTED, DAMAGED, DELETING, OURS, PIN, REDUCING, REWINDING, SAVING, TRUST
from ckptmgr.format.objects import Found
from ckptmgr.run import directory as directories
from ckptmgr.run import recognize, reducing
from ckptmgr.run.branches import Move
from ckptmgr.run.directory import Leftover
from ckptmgr.run.manifest_cache import Stamp

_log = logging.getLogger("ckptmgr")
_DAY_S = 86_400.0
_NOTES = (SAVING, DELETING)
"""What has such a note and is not a step is ours, and is to be removed."""
_DATA = "/d/"
"""The folder of the data files of a database. There may be thousands of them, and no question is about them."""


class _Entry(NamedTuple):
    """An entry of the run, as the last look saw it."""

    own: Found | None = None
    """The object that has this name itself."""
    files: Mapping[str, Found] = MappingProxyType({})
    """The objects below, by their names in the entry; but for data files."""
    data: frozenset[str] = frozenset()
    """The folders with data files."""

    @property
    def is_taken(self) -> bool:
        return bool(self.own or self.files or self.data)


class BucketDirectory:
    """A run directory in a bucket."""

    can_replace = False

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        self._objects = objects.open_objects(path)
        self._run = objects.key_of(path)
        self._seen: Mapping[str, _Entry] = {}
        self._has_seen_all = False
        self._stale: set[str] = set()
        """Entries that this process has changed since the last look."""
        self._seeing = threading.Lock()
        self._recognized: dict[str, tuple[tuple[Found | None, ...], bool]] = {}
        """Whether an entry is a step, as long as its marker and its metadata are these."""
        self._trust: dict[str, tuple[Found, bytes | None]] = {}
        """What the note about the trust in a step holds, as long as its object is this one."""
        self._begun: set[str] = set()
        """Steps that are being written here."""
        self._overtaken: set[str] = set()
        """Steps of saves that are given up, to which a process may still write: their notes stay."""

    def prepare(self) -> None:
        """Does nothing: a bucket has no directories, and only a write shows whether it can be written to."""

    def upgrade(self) -> None:
        """Does nothing: version 1 left no files of its own in a bucket."""

    # ------------------------------------------------------------ looking

    def look(self, *only: str) -> None:
        self._see({name: self._look_at(name) for name in only} if only else self._look_at_all(), only)

    def _see(self, found: Mapping[str, _Entry], only: Collection[str]) -> None:
        with self._seeing:
            self._seen = {**self._seen, **found} if only else found
            self._has_seen_all |= not only
            self._stale = self._stale.difference(only) if only else set()

    def _look_at_all(self) -> dict[str, _Entry]:
        return _entries(self._objects.list(self._key(""), _DATA), self._key(""))

    def _look_at(self, name: str) -> _Entry:
        """One entry: one request if nothing has this name, else two."""
        key = self._key(name)
        around = self._objects.list(key, "/")
        below = self._look_below(name) if f"{key}/" in around.rolled_up else _Entry()
        return below._replace(own=around.objects.get(key))

    def _look_below(self, name: str) -> _Entry:
        found = self._objects.list(self._key(f"{name}/"), _DATA)
        return _entries(found, self._key("")).get(name, _Entry())

    def _entry(self, name: str) -> _Entry:
        """An entry as it was last seen; one that was not, or has been changed here, is looked at."""
        if name in self._stale or not (name in self._seen or self._has_seen_all):
            self.look(name)
        return self._seen.get(name, _Entry())

    def _has_changed(self, name: str) -> None:
        with self._seeing:
            self._stale = {*self._stale, name}

    def entries(self) -> Mapping[str, bool]:
        """Every name may be a folder: an object may have the same name, too."""
        self.look()
        return dict.fromkeys(sorted(self._seen), True)

    def find_steps(self, entries: Iterable[str]) -> list[str]:
        marked = {name: entry for name in entries if COMMITTED in (entry := self._entry(name)).files}
        signs = {
            name: (entry.files[COMMITTED], entry.files.get(names.STEP_METADATA)) for name, entry in marked.items()
        }
        known = self._recognized
        new = [name for name, sign in signs.items() if name not in known or known[name][0] != sign]
        for name, is_step in self._recognize(new).items():
            known[name] = signs[name], is_step
        return [name for name, sign in signs.items() if known.get(name) == (sign, True)]

    def _recognize(self, entries: Sequence[str]) -> dict[str, bool]:
        """Whether each of these is a step: it has Orbax's marker, and is not a copy of a step of ours.

        Our steps have plain numbers. An entry whose marker was deleted meanwhile is left out.
        """
        markers = self._read_markers(entries)
        found = {name: _is_step_by(name, marker) for name, marker in markers.items()}
        unclear = [name for name, is_step in found.items() if is_step is None]
        for name, is_signed in self._are_signed(unclear).items():
            found[name] = _is_own(name, markers[name]) if is_signed is None else not is_signed
        return {name: bool(is_step) for name, is_step in found.items()}

    def _read_markers(self, entries: Sequence[str]) -> dict[str, bytes]:
        """What the markers hold. That of an own step holds its path, which its checksum in the listing shows."""
        found = dict[str, bytes]()
        for name in entries:
            marker = self._entry(name).files.get(COMMITTED)
            likely = recognize.MARKED + str(self.path / name).encode()
            if marker is not None and marker.size == 0:
                found[name] = b""
            elif marker is not None and marker.md5 == hashlib.md5(likely, usedforsecurity=False).hexdigest():
                found[name] = likely
        return found | self._read({name: f"{name}/{COMMITTED}" for name in entries if name not in found})

    def _are_signed(self, entries: Sequence[str]) -> dict[str, bool | None]:
        """Whether ckptmgr wrote each of these steps; None where that is not known."""
        metadata = self._read(
            {
                name: f"{name}/{names.STEP_METADATA}"
                for name in entries
                if names.STEP_METADATA in self._entry(name).files
            }
        )
        return {name: recognize.is_signature(metadata[name]) if name in metadata else None for name in entries}

    def is_somebodys(self, name: str) -> bool:
        """The rest of an interrupted save or deletion is not: it has a note of ours. (Version 1 wrote none.)"""
        entry = self._entry(name)
        if not entry.is_taken or self.find_steps([name]) or any(self._has_note(each, name) for each in _NOTES):
            return False
        if not self._are_signed([name])[name]:
            return True
        return COMMITTED in entry.files  # a copy of another step

    def closed(self) -> list[int]:
        return []

    def inside(self, folder: str) -> list[str]:
        files, data = self._below(folder)
        return sorted({name.partition("/")[0] for name in (*files, *data)})

    def _below(self, place: str) -> tuple[dict[str, Found], set[str]]:
        """The files below a place, and its folders with data files, by their names in the place."""
        name, _, rest = place.partition("/")
        entry, start = self._entry(name), f"{rest}/" if rest else ""
        files = {file.removeprefix(start): found for file, found in entry.files.items() if file.startswith(start)}
        return files, {folder.removeprefix(start) for folder in entry.data if folder.startswith(start)}

    def stamp(self, name: str) -> Stamp:
        files = self._entry(name).files
        found = next((files[file] for file in (manifests.NAME, names.STEP_METADATA) if file in files), None)
        if found is None:
            return None
        digest = hashlib.sha256(found.identity.encode()).digest()
        return found.size, int.from_bytes(digest[:8])

    def identity(self, name: str) -> None:
        return None

    def is_pinned(self, name: str) -> bool:
        return PIN in self._entry(name).files

    def trust_note(self, name: str) -> bytes | None:
        found = self._entry(name).files.get(TRUST)
        if found is None:
            return None
        if name not in self._trust or self._trust[name][0] != found:
            self._trust[name] = found, self._read({name: f"{name}/{TRUST}"}).get(name)
        return self._trust[name][1]

    def mark(self, place: str) -> str:
        return directories.mark_of_description(self.path / place) or "0" * 8

    def missing_file(self, manifest: manifests.Manifest, place: str) -> str | None:
        """Data files are not looked at, but for their folder: to list them may take many requests."""
        files, data = self._below(place)
        for name, meant in manifest.files.items():
            folder, is_data, _ = f"/{name}".partition(_DATA)
            if name not in files and not (is_data and f"{folder}{_DATA}"[1:] in data):
                return f"{name} is missing"
            if name in files and files[name].size != meant.size:
                return f"{name} has {files[name].size} bytes instead of {meant.size}"
        return None

    def read_ahead(self, files: Iterable[str]) -> dict[str, bytes]:
        return self._read({place: place for place in files})

    # ------------------------------------------------------------ a step that is written here

    def draft(self, name: str) -> epath.Path:
        return self.path / name

    def begin(self, name: str) -> epath.Path:
        self._write_note(SAVING, name)
        self._begun.add(name)
        self._has_changed(name)
        return self.path / name

    def publish(self, name: str) -> None:
        """Makes no request: the marker has made the draft a step."""
        self._begun.discard(name)
        self._see({name: _Entry()}, [name])  # nobody has pinned it yet; `after_publish` sees the rest

    def after_publish(self, name: str) -> None:
        """Removes the note, and sees what the step holds."""
        self._objects.delete([self._key(f"{SAVING}/{name}")])
        self._see({name: self._look_below(name)}, [name])

    def discard(self, name: str) -> None:
        is_begun = name in self._begun
        if is_begun:
            self.look(name)  # it may have become a step just before the save failed
        self._begun.discard(name)
        is_draft = is_begun or (self._entry(name).is_taken and not self.is_somebodys(name))
        if is_draft and not self.find_steps([name]):
            self._overtaken.add(name)  # another process of the job may still write
            self.remove(self.path / name)

    def pin(self, folder: epath.Path) -> None:
        self._objects.write(self._key(f"{folder.name}/{PIN}"), b"")
        self._has_changed(folder.name)

    def unpin(self, folder: epath.Path) -> None:
        self._objects.delete([self._key(f"{folder.name}/{PIN}")])
        self._has_changed(folder.name)

    def write_trust(self, folder: epath.Path, note: bytes | None) -> None:
        key = self._key(f"{folder.name}/{TRUST}")
        if note is None:
            self._objects.delete([key])
        else:
            self._objects.write(key, note)
        self._has_changed(folder.name)

    # ------------------------------------------------------------ a step that leaves the listing

    def hide(self, name: str) -> epath.Path:
        self._write_note(DELETING, name)
        self._objects.delete([self._key(f"{name}/{COMMITTED}")])
        self._has_changed(name)
        return self.path / name

    def remove(self, *leftovers: epath.Path) -> None:
        """Removes what is in no listing, then the notes about it; in few requests."""
        ours = [each.name for each in leftovers if each.parent == self.path]
        notes = [f"{folder}/{name}" for folder in _NOTES for name in ours]
        notes += sorted({note for each in leftovers if (note := self._note_of_reduction(each))})
        stay = {f"{SAVING}/{name}" for name in self._overtaken}
        try:
            for each in leftovers:
                self._remove_all(each)
            self._objects.delete([self._key(note) for note in notes if note not in stay])
            self._has_changed(OURS)
        except Exception as problem:  # of a client
            said = ", ".join(map(str, leftovers))
            _log.warning("%s could not be removed; the next start tries again: %s", said, problem)

    def _remove_all(self, place: epath.Path) -> None:
        """Deletes every object below a place; one that is named like a folder is no other's."""
        within = self._within(place)
        self._objects.delete(list(self._objects.list(self._key(f"{within}/"), "").objects))
        self._has_changed(within.partition("/")[0])

    def reduce(self, name: str, manifest: manifests.Manifest, was: bytes) -> list[epath.Path]:
        """Replaces the manifest; the objects that it does not name any more are then to be removed."""
        self._write_note(REDUCING, name)
        key, gone = self._key(f"{name}/{manifests.NAME}"), manifest.reduced.items if manifest.reduced else ()
        found = self._objects.fetch(key)
        is_same = found is not None and found.data == was
        if found is None or not is_same or not self._objects.replace(key, manifests.encode(manifest), found.tag):
            raise SaveError(f"step {manifest.step} was replaced meanwhile", step=manifest.step)
        self._has_changed(name)
        return [self.path / name / item for item in gone]

    def _note_of_reduction(self, leftover: epath.Path) -> str:
        """The note about the step of this leftover, an item or the note itself; "" if it is neither."""
        if leftover.parent.parent == self.path and leftover.parent.name != OURS:
            return f"{REDUCING}/{leftover.parent.name}"
        return f"{REDUCING}/{leftover.name}" if leftover.parent == self.path / REDUCING else ""

    def _left_of_reductions(self) -> list[epath.Path]:
        """What is left of items that manifests do not name any more; of a reduction that is over, its note."""
        noted = [name for name in self.inside(REDUCING) if names.STEP.fullmatch(name)]
        read, found = self._read({name: f"{name}/{manifests.NAME}" for name in noted}), list[epath.Path]()
        for name in noted:
            there = {file.partition("/")[0] for file in (*self._entry(name).files, *self._entry(name).data)}
            found += [self.path / name / item for item in _gone(read.get(name), int(name)) if item in there]
            found += [self.path / REDUCING / name]
        return found

    def set_aside(self, name: str) -> epath.Path:
        aside = self.path / DAMAGED / f"{recognize.own_number(name)}-{time.time_ns()}"
        self._copy(self.path / name, aside)
        self._remove_all(self.hide(name))  # if this is stopped, the note of `hide` tells what the rest is
        self._objects.delete([self._key(f"{DELETING}/{name}")])
        self._has_changed(OURS)
        return aside

    def _copy(self, source: epath.Path, target: epath.Path) -> None:
        self._look_anew()
        copy(source, target)
        self._look_anew()
        self._has_changed(self._within(target).partition("/")[0])

    def leftovers(self, *, is_alone: bool = False) -> list[Leftover]:
        """A save that another process may still be writing is not among them, unless this one is alone."""
        saved = self._notes_of_no_step(SAVING)
        others = {name for name in saved if not self._is_nobodys(name)}
        if is_alone:
            self._overtaken = others
        found = [
            (self.path / name, directories.INTERRUPTED_SAVE) for name in saved if is_alone or name not in others
        ]
        deleted = self._notes_of_no_step(DELETING)
        found += [(self.path / name, directories.INTERRUPTED_DELETION) for name in deleted]
        found += [(place, directories.INTERRUPTED_REDUCTION) for place in self._left_of_reductions()]
        return found + [(self.path / DAMAGED / name, directories.KEPT) for name in self.inside(DAMAGED)]

    def set_back(self, replaced: epath.Path) -> None:
        """Does nothing: no step is replaced."""

    # ------------------------------------------------------------ going on from another step

    def write_plan(self, plan: bytes) -> None:
        self._objects.write(self._key(REWINDING), plan)
        self._has_changed(OURS)

    def read_plan(self) -> bytes | None:
        if REWINDING.partition("/")[2] not in self._entry(OURS).files:
            return None
        return self._read({REWINDING: REWINDING}).get(REWINDING)

    def move(self, ahead: Sequence[Move]) -> None:
        """Copies, then removes. Only the first of the moves ahead may have been begun."""
        self._look_anew()
        source, target = (self.path / place for place in ahead[0][:2])
        mark = ahead[0].mark
        marked = self._read({place: f"{place}/{COMMITTED}" for place in ahead[0][:2]})
        if ahead[0].source in marked and self.mark(ahead[0].source) != mark:
            return  # the step was saved after the rewind was planned
        if ahead[0].target in marked and self.mark(ahead[0].target) != mark:
            _log.error("%s is not moved: %s is taken by another checkpoint", source, target)
            return
        if ahead[0].source in marked:
            self._copy(source, target)
            self._objects.delete([self._key(f"{ahead[0].source}/{COMMITTED}")])
        self._remove_all(source)

    def has_moved(self, rest: bytes) -> None:
        self.write_plan(rest)

    def end_plan(self) -> None:
        self._objects.delete([self._key(REWINDING)])
        self._has_changed(OURS)

    # ------------------------------------------------------------ notes

    def _write_note(self, folder: str, name: str) -> None:
        said = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        self._objects.write(self._key(f"{folder}/{name}"), json.dumps(said).encode())
        self._has_changed(OURS)

    def _has_note(self, folder: str, name: str) -> bool:
        return name in self.inside(folder)

    def _notes_of_no_step(self, folder: str) -> list[str]:
        """The notes without a step. A note may be left although its step is committed."""
        found = sorted(filter(names.STEP.fullmatch, self.inside(folder)), key=int)
        steps = self.find_steps(found)
        return [name for name in found if name not in steps]

    def _is_nobodys(self, name: str) -> bool:
        """Whether the process that began a save is gone. A save of another machine counts as gone after a day."""
        try:
            said = json.loads(self._read({name: f"{SAVING}/{name}"}).get(name, b""))
            if said["host"] != socket.gethostname():
                return time.time() - float(said["time"]) > _DAY_S
            os.kill(int(said["pid"]), 0)
        except PermissionError:  # the process is another user's, and alive
            return False
        except (OSError, ValueError, KeyError, TypeError):
            return True
        return False

    # ------------------------------------------------------------ requests

    def _within(self, path: epath.Path) -> str:
        """A path in the run, from the directory of the run."""
        return str(path).removeprefix(f"{self.path}/")

    def _key(self, place: str) -> str:
        """The key of an object in the run."""
        return f"{self._run}/{place}" if self._run else place

    def _read(self, wanted: Mapping[str, str]) -> dict[str, bytes]:
        """By name what the objects in these places hold; those that are not there are left out."""
        found = self._objects.read([self._key(place) for place in wanted.values()])
        read = {name: found.get(self._key(place)) for name, place in wanted.items()}
        return {name: data for name, data in read.items() if data is not None}

    def _look_anew(self) -> None:
        """Makes the client forget its listings: others write there too."""
        objects.client_of(self.path).invalidate_cache()


def copy(source: epath.Path, target: epath.Path) -> None:
    """Copies a checkpoint on the server; the file that makes it a step comes last."""
    client = objects.client_of(source)
    start = client._strip_protocol(str(source))
    for name in sorted(client.find(start), key=lambda name: name.endswith(f"/{COMMITTED}")):
        client.cp_file(name, f"{target}{name.removeprefix(start)}")


def _entries(listing: objects.Listing, start: str) -> dict[str, _Entry]:
    """The entries of a run, from a listing of it; `start` is the part of each key that leads to the run."""
    own, files, data = dict[str, Found](), dict[str, dict[str, Found]](), dict[str, set[str]]()
    for key, found in listing.objects.items():
        name, is_below, rest = key.removeprefix(start).partition("/")
        if not is_below:
            own[name] = found
        elif not key.endswith("/"):  # else it only stands for a folder, as the consoles of the clouds make them
            files.setdefault(name, {})[rest] = found
        else:
            files.setdefault(name, {})
    for folder in listing.rolled_up:
        name, _, rest = folder.removeprefix(start).partition("/")
        data.setdefault(name, set()).add(rest)
    return {
        name: _Entry(own.get(name), files.get(name, {}), frozenset(data.get(name, ())))
        for name in {*own, *files, *data}
    }


def _gone(manifest: bytes | None, step: int) -> tuple[str, ...]:
    """The items that were taken out of a step; none if its manifest does not say so."""
    with contextlib.suppress(CheckpointError):
        found = reducing.decode(manifest, step) if manifest is not None else None
        return found.reduced.items if found is not None and found.reduced is not None else ()
    return ()


def _is_step_by(name: str, marker: bytes) -> bool | None:
    """Whether a marker makes an entry a step; None if its metadata must be read, too."""
    if marker and not marker.startswith(recognize.MARKED):
        return False
    return True if _is_own(name, marker) and names.STEP.fullmatch(name) else None


def _is_own(name: str, marker: bytes) -> bool:
    """Whether a marker names the step that it is in, or none."""
    return recognize.marked_step(marker) in (None, recognize.own_number(name))
