"""The parts of steps on the machines of a job: `local=`.

    LOCAL/<run>/<start>.<turn>.<step>.<processes>/<process>/     a part: manifest.json, and what one process wrote
    LOCAL/<run>/.<anything>                                      what is being written, or read

A part is whole or not there: each of its files has its size and CRC-32 in its manifest. <start> is a number that
grows with every start of the run, and <turn> counts its local saves. Parts belong together if all four numbers are
equal. So what an earlier start has left on a machine, or an earlier save of a step, is never mixed with what came
later. Processes that are given the same directory share it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from etils import epath

from ckptmgr.errors import CheckpointError
from ckptmgr.format import files, paths, recorded
from ckptmgr.format import manifest as manifests

if sys.platform != "win32":
    import fcntl

_log = logging.getLogger("ckptmgr")
_GROUP = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+")
_NUMBER = re.compile(r"0|[1-9][0-9]*")


class Group(NamedTuple):
    """A step as it was saved once: its parts belong together. The one that was saved last is the largest."""

    start: int
    turn: int
    step: int
    processes: int

    @property
    def name(self) -> str:
        return ".".join(map(str, self))


class Part(NamedTuple):
    """What one process wrote of a step."""

    group: Group
    process: int

    @property
    def name(self) -> str:
        return f"{self.group.name}/{self.process}"


class Complete(NamedTuple):
    """A step of which all parts are there, the processes that have each, and when the step was saved."""

    group: Group
    holders: Sequence[Sequence[int]]
    time: float


class Tier:
    """The parts on one machine."""

    def __init__(self, root: epath.Path, run: str) -> None:
        self.folder = root / run
        self._drafts: dict[epath.Path, int] = {}
        """Each is locked as long as its process lives."""
        self._make()

    def _make(self) -> None:
        os.makedirs(self.folder.parent, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.folder, 0o700)

    def __str__(self) -> str:
        return str(self.folder)

    def parts(self) -> list[Part]:
        """All parts here, whole or not."""
        found = []
        for folder in self._groups():
            group = Group(*map(int, folder.name.split(".")))
            with contextlib.suppress(FileNotFoundError):  # a process that shares the directory has removed it
                numbers = (int(each.name) for each in folder.iterdir() if _NUMBER.fullmatch(each.name))
                found += [Part(group, process) for process in numbers if process < group.processes]
        return found

    def _groups(self) -> list[epath.Path]:
        with contextlib.suppress(FileNotFoundError):
            return [each for each in self.folder.iterdir() if _GROUP.fullmatch(each.name)]
        return []

    def whole(self) -> dict[Part, float]:
        """The parts of which every byte is as it was written, and when each was saved."""
        found = {}
        for part in self.parts():
            try:
                found[part] = check(self.path(part), part).time
            except (CheckpointError, OSError) as problem:
                _log.warning("the local part %s in %s counts as not there: %s", part.name, self, problem)
        return found

    def path(self, part: Part) -> epath.Path:
        return self.folder / part.name

    def draft(self) -> epath.Path:
        """A new folder, for a part on its way."""
        self._make()
        made = self.folder / f".{secrets.token_hex(8)}"
        made.mkdir()
        self._drafts[made] = os.open(made, os.O_RDONLY)
        fcntl.flock(self._drafts[made], fcntl.LOCK_EX)
        return made

    def drop(self, draft: epath.Path) -> None:
        """Removes a draft, if it was not published."""
        if draft in self._drafts:
            remove(draft)
            os.close(self._drafts.pop(draft))

    def publish(self, draft: epath.Path, part: Part) -> None:
        """Gives a draft its name. A process that shares the directory may have published the same part."""
        place = self.path(part)
        place.parent.mkdir(exist_ok=True)
        try:
            draft.rename(place)
        except OSError:
            if not place.exists():
                raise
            remove(draft)
        os.close(self._drafts.pop(draft))

    def keep(self, most: int, newest: Group) -> None:
        """Removes all but so many steps, after one was saved; also higher ones: the run has gone back since."""
        earlier = sorted({part.group for part in self.parts()} - {newest}, reverse=True)
        kept = [group for group in earlier if group < newest and group.step < newest.step][: most - 1]
        self._remove(self.folder / group.name for group in earlier if group not in kept)

    def tidy(self, since: int) -> None:
        """Removes steps from before this time, and what processes that have ended were writing."""
        self._remove(each for each in self._groups() if int(each.name.split(".")[0]) < since)
        for draft in [each for each in self.folder.iterdir() if each.name.startswith(".")]:
            if _is_left(draft):
                remove(draft)

    def forget(self, step: int) -> None:
        """Removes all that was saved of a step."""
        self._remove(each for each in self._groups() if int(each.name.split(".")[2]) == step)

    def clear(self) -> None:
        """Removes all steps."""
        self._remove(self._groups())

    def _remove(self, folders: Iterable[epath.Path]) -> None:
        for folder in folders:
            remove(folder)


def remove(folder: epath.Path) -> None:
    """Removes a folder, which another process of this machine may be removing too."""
    shutil.rmtree(folder, ignore_errors=True)


def _is_left(draft: epath.Path) -> bool:
    """Whether the process that was writing a draft has ended: then its lock has."""
    try:
        descriptor = os.open(draft, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def describe(folder: epath.Path, manifest: manifests.Manifest) -> None:
    """Writes the manifest of a part, last."""
    files.write(folder / manifests.NAME, manifests.encode(manifest), durable=False)


def sizes(folder: epath.Path) -> Mapping[str, manifests.File]:
    """All files of a part, with their checksums."""
    return recorded.record_files(folder, files.walk(folder)[1], lambda name, size: False)


def check(folder: epath.Path, part: Part) -> manifests.Manifest:
    """The manifest of a part; raises CheckpointError or OSError if a byte of it is not as it was written."""
    manifest = read_manifest(paths.read_bytes(folder / manifests.NAME), part)
    for name, file in manifest.files.items():
        recorded.check_file(manifest, str(folder), name, file)
    return manifest


def read_manifest(data: bytes, part: Part) -> manifests.Manifest:
    return manifests.decode(data, step=part.group.step, path=f"{part.name}/{manifests.NAME}")


def complete(reports: Sequence[Mapping[Part, float]]) -> list[Complete]:
    """The steps that can be restored, the newest first; `reports` are the whole parts that each process has.

    Only steps of the newest start that has any: an earlier one may have gone on from another step. And none that
    is above one that was saved later: the run has gone back since.
    """
    times = {part: time for parts in reports for part, time in parts.items()}
    holders: dict[Part, list[int]] = {part: [] for part in times}
    for holder, parts in enumerate(reports):
        for part in parts:
            holders[part].append(holder)
    found: list[Complete] = []
    for group in sorted({part.group for part in times}, reverse=True):
        parts_of = [Part(group, process) for process in range(group.processes)]
        is_older = bool(found) and (group.start, group.step) >= (found[-1].group.start, found[-1].group.step)
        if all(part in times for part in parts_of) and not is_older:
            found.append(Complete(group, [holders[part] for part in parts_of], times[parts_of[0]]))
    return [each for each in found if each.group.start == found[0].group.start]


def neighbours(hosts: Sequence[str]) -> list[int]:
    """For each process the one whose parts it keeps too: on another host, wherever that is possible."""
    order = sorted(range(len(hosts)), key=lambda process: (hosts[process], process))
    shift = max((hosts.count(host) for host in hosts), default=0)
    shift = shift if shift < len(hosts) else 1
    found = [0] * len(hosts)
    for at, process in enumerate(order):
        found[process] = order[(at + shift) % len(order)]
    return found
