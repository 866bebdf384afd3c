"""The machines of a job as one store of parts: whose parts each keeps, and how they come to another."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from etils import epath

from ckptmgr.arrays import chunks, writing
from ckptmgr.errors import CheckpointError
from ckptmgr.format import files, linking, paths, recorded
from ckptmgr.format import manifest as manifests
from ckptmgr.processes.job import Call, Job
from ckptmgr.run import identity
from ckptmgr.run import tier as tiers
from ckptmgr.run.peers import Peers, Server
from ckptmgr.run.tier import Complete, Part, Tier

_log = logging.getLogger("ckptmgr")
Answer = TypeVar("Answer")
Missing = Mapping[str, Sequence[tuple[str, int]]]
"""By item the keys that its database lacks, and about how large each is."""
_HELD_BYTES = 64 << 20
_OPENING = Call("the opening of local directories")
_LOOK = Call("the look at local steps")


class Nearby:
    """The local tier of a run, for one process."""

    def __init__(self, root: epath.Path, home: epath.Path, copies: int, line: Job, saving: Job) -> None:
        self.line, self.saving, self._home = line, saving, home
        self._server: Server | None = None
        told: Any = line.decide(_OPENING, lambda: [*identity.find(home), secrets.token_hex(16)])
        (run, since, secret), here = told, list[Any]()
        try:
            line.together(_OPENING, lambda: here.extend(self._open(root, run, since, secret)))
            reports = line.collect(_OPENING, here)
            found = line.decide(_OPENING, lambda: _arrange(reports, since))
        except BaseException:
            self.close()
            raise
        self.start: int = found["start"]
        self.whole: Mapping[Part, float] = {}
        """The parts of this machine that were whole at the last look."""
        self.kept_for: Sequence[int] = [found["neighbours"][line.index]] if copies and line.count > 1 else []
        self._peers = Peers([(host, port) for host, port in found["addresses"]], secret)

    def _open(self, root: epath.Path, run: str, since: int, secret: str) -> Sequence[Any]:
        """The host, the address and the newest start that this process knows."""
        self.tier = Tier(root, run)
        self.tier.tidy(since)
        newest = max((part.group.start for part in self.tier.parts()), default=0)
        if self.line.count == 1:
            return socket.gethostname(), ("", 0), newest
        self._server = Server(self.tier.folder, secret)
        return socket.gethostname(), self._server.address, newest

    def begin_anew(self) -> None:
        """After a rewind: what was saved before does not count."""
        self.tier.clear()
        self.start = self.line.decide(_OPENING, lambda: max(self.start, identity.find(self._home).since) + 1)

    def current_start(self) -> int:
        """The number of this start; a later one if another manager of this process has rewound the run."""
        return max(self.start, identity.find(self._home).since)

    def __str__(self) -> str:
        return str(self.tier)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    # ------------------------------------------------------------ parts of others

    def fetch(self, part: Part, holders: Sequence[int], folder: epath.Path) -> manifests.Manifest:
        """Copies a part from the first of these processes that gives it; raises why none does."""
        return self._ask(holders, lambda holder: self._fetch(part, holder, folder))

    def read(self, name: str, holders: Sequence[int]) -> bytes:
        """A small file of one of these processes."""

        def read(holder: int) -> bytes:
            with self._peers.opened(holder) as peer:
                return peer.read(name)

        return self._ask(holders, read)

    def values(self, name: str, keys: Sequence[str], holders: Sequence[int]) -> list[tuple[str, bytes]]:
        """The values of these keys that a database has."""

        def ask(holder: int) -> list[tuple[str, bytes]]:
            with self._peers.opened(holder) as peer:
                return peer.values(name, keys)

        return self._ask(holders, ask)

    def fetch_item(self, part: Part, item: str, holders: Sequence[int], folder: epath.Path) -> None:
        """Copies the files of an item that is not merged with those of other processes."""

        def fetch(holder: int) -> None:
            with self._peers.opened(holder) as peer:
                manifest = tiers.read_manifest(peer.read(f"{part.name}/{manifests.NAME}"), part)
                for name, file in manifest.files.items():
                    if name.startswith(f"{item}/") and not name.startswith(f"{item}/{writing.PART}"):
                        peer.fetch(f"{part.name}/{name}", folder / name)
                        recorded.check_file(manifest, str(folder), name, file)

        self._ask(holders, fetch)

    def _ask(self, holders: Sequence[int], ask: Callable[[int], Answer]) -> Answer:
        for holder in holders[:-1]:
            try:
                return ask(holder)
            except (OSError, ValueError, CheckpointError) as problem:
                _log.warning("process %d does not give a part: %s", holder, problem)
        return ask(holders[-1])

    def _fetch(self, part: Part, holder: int, folder: epath.Path) -> manifests.Manifest:
        with self._peers.opened(holder) as peer:
            data = peer.read(f"{part.name}/{manifests.NAME}")
            manifest = tiers.read_manifest(data, part)
            for name in manifest.files:
                peer.fetch(f"{part.name}/{name}", folder / name)
        files.write(folder / manifests.NAME, data, durable=False)
        return tiers.check(folder, part)

    # ------------------------------------------------------------ steps

    def look(self, counts: Callable[[Complete], bool]) -> list[Complete]:
        """The local steps that can be restored, the newest first, as process 0 sees them; it asks which count.

        Another manager of this process may have gone back to an earlier step since the last look.
        """
        self.whole = self.line.together(_LOOK, self.tier.whole)
        reports = self.line.collect(_LOOK, [*self.whole.items()])

        def choose() -> list[Complete]:
            found = tiers.complete([dict(map(_part, each)) for each in reports])
            since = identity.find(self._home).since
            return [each for each in found if each.group.start >= since and counts(each)]

        found = self.line.decide(_LOOK, choose)
        return [Complete(tiers.Group(*group), holders, time) for group, holders, time in found]

    def gather(self, step: Complete) -> Gathering:
        """Begins to put a step together."""
        found = Gathering(self, step, self.tier.draft())
        try:
            found.begin()
        except BaseException:
            found.close()
            raise
        return found


class Gathering:
    """A step that is put together from its parts, in a folder of its own: as far as this process needs it."""

    def __init__(self, nearby: Nearby, step: Complete, run: epath.Path) -> None:
        self._nearby, self._step = nearby, step
        self.run = run
        """A directory that holds this step alone."""
        self.folder = run / str(step.group.step)
        here = {part.process for part in nearby.whole if part.group == step.group}
        self._here = sorted(here)
        self._elsewhere = [process for process in self._order(nearby.line.index) if process not in here]

    def begin(self) -> None:
        """Takes the parts that are on this machine."""
        for process in self._here:
            source = self._nearby.tier.path(Part(self._step.group, process))
            found = files.walk(source)[1].keys() - {manifests.NAME}
            linking.link(source, self.folder, sorted(name for name in found if not (self.folder / name).exists()))
        self._describe()

    def close(self) -> None:
        """Removes the folder."""
        self._nearby.tier.drop(self.run)

    @property
    def source(self) -> str:
        """Where the step is from, for people."""
        return str(self._nearby.tier)

    def need(self, item: str, processes: Iterable[int]) -> None:
        """Gets what these processes have written of an item that is a value, or the state of each process."""
        for process in [each for each in processes if each in self._elsewhere]:
            self._nearby.fetch_item(
                Part(self._step.group, process), item, self._step.holders[process], self.folder
            )

    def complete(self, missing: Callable[[], Missing]) -> None:
        """Gets the chunks that are missing from other machines, those first that most likely have them."""
        self._merge()
        for process in self._elsewhere:
            if not (lacking := missing()):
                break
            for item, keys in lacking.items():
                self._get(process, item, keys)
            self._merge()

    def _get(self, process: int, item: str, keys: Sequence[tuple[str, int]]) -> None:
        """Gets chunks of an item that are in the part of a process, as many at a time as may be held."""
        part, place = Part(self._step.group, process), f"{item}/{writing.PART}{process}"
        for number, run in enumerate(chunks.runs([nbytes for _, nbytes in keys], _HELD_BYTES)):
            wanted = [keys[n][0] for n in run]
            values = self._nearby.values(f"{part.name}/{place}", wanted, self._step.holders[process])
            if values:
                writing.write_values(self.folder / f"{place}.{number}", values)

    def _order(self, here: int) -> list[int]:
        """Those nearest to where this process is among all: with as many processes as before that is its own."""
        saved, now = self._step.group.processes, self._nearby.line.count
        at = (here + 0.5) * saved / now - 0.5
        return sorted(range(saved), key=lambda process: (abs(process - at), process))

    def _describe(self) -> None:
        """Writes the manifest of the first part as that of the step, without files: those of parts are checked."""
        first = Part(self._step.group, 0)
        if first in self._nearby.whole:
            data = paths.read_bytes(self._nearby.tier.path(first) / manifests.NAME)
        else:
            data = self._nearby.read(f"{first.name}/{manifests.NAME}", self._step.holders[0])
        self.folder.mkdir(exist_ok=True)
        tiers.describe(self.folder, dataclasses.replace(tiers.read_manifest(data, first), files={}))

    def _merge(self) -> None:
        """Makes one database of the parts of each item that are here."""
        for item in [each for each in self.folder.iterdir() if each.is_dir()]:
            if any(each.name.startswith(writing.PART) for each in item.iterdir()):
                tiers.remove(item / "d")
                (item / "manifest.ocdbt").unlink(missing_ok=True)
                writing.merge(item)


def _part(told: Any) -> tuple[Part, float]:
    (group, process), time = told
    return Part(tiers.Group(*group), process), time


def _arrange(reports: Sequence[Any], since: int) -> dict[str, Any]:
    hosts, addresses, starts = zip(*reports, strict=True)
    return {
        "start": max(int(1000 * time.time()), since + 1, *(newest + 1 for newest in starts)),
        "addresses": addresses,
        "neighbours": tiers.neighbours(hosts),
    }
