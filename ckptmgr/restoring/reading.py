"""Reading a committed step: its items, ours or stock Orbax's, and what went wrong with them."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from ckptmgr.arrays import broadcast, chunks, to_devices
from ckptmgr.arrays import reading as arrays
from ckptmgr.arrays.progress import Meter, Progress
from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format import manifest as manifests
from ckptmgr.restoring import matching
from ckptmgr.run import values
from ckptmgr.trees.layouts import Target

_COPIED_BYTES = 2 << 20  # JAX copies small leaves once more: not all of them at a time
_COPIED_BYTES_IN_BUCKETS = 32 << 20  # there each time is a wait for the server


class Others(NamedTuple):
    """The other processes of a job, if they restore the same step."""

    agree: Callable[[Callable[[], None]], None]
    """Makes a call in every process; what fails in one fails in all."""
    run: broadcast.Runner


@contextlib.contextmanager
def reported(directory: epath.Path) -> Iterator[None]:
    """Tells the listeners of jax.monitoring (Orbax's exporter, say) of a restore, in Orbax's own words."""
    storage = "gcs" if str(directory).startswith("gs://") else "other"
    began = time.perf_counter()
    jax.monitoring.record_event("/jax/orbax/read/start")
    yield
    jax.monitoring.record_event("/jax/orbax/read/success")
    jax.monitoring.record_event_duration_secs(
        "/jax/orbax/read/total_duration_secs", time.perf_counter() - began, storage_type=storage
    )


class Plan:
    """What is read of the trees of a step, and where each leaf goes: the same for each step of one structure.

    `sources` says whose state of an item is read, where the processes that saved it had each their own.
    `max_host_bytes` bounds what is held on the host above the arrays that are restored: three eighths of it what
    is on its way to a device, as much the chunks of which that is made; the allocator keeps some freed memory.
    """

    def __init__(
        self,
        manifest: manifests.Manifest,
        matched: Sequence[matching.Matched],
        targets: Sequence[Sequence[Target]],
        sources: Mapping[str, int | None],
        *,
        is_local: bool,
        max_host_bytes: int | None = None,
    ) -> None:
        self.is_local = is_local
        self.most_bytes = None if max_host_bytes is None else max(1, max_host_bytes * 3 // 8)
        self.matched: list[matching.Matched] = []
        """One for each tree: of some items there is one for each process."""
        self.lists = {each.item for each in matched if sources.get(each.item, 0) is None}
        """Items of which the trees of all processes come back, as a list."""
        self.databases: list[arrays.Source] = []
        self.wanted: list[arrays.Read] = []
        self.targets: list[Target] = []
        for each, places in zip(matched, targets, strict=True):
            item = manifest.items.get(each.item, manifests.Item("arrays"))
            source = sources.get(each.item, 0)
            for process in range(item.processes) if source is None else [source]:
                folder = f"{item.place(each.item)}/{manifests.own_place(process)}"
                plain = manifest.written_here and item.compression is None
                self._add(each, places, arrays.Source(folder, item.zarr3, item.ocdbt, plain, item.fills))

    def _add(self, each: matching.Matched, places: Sequence[Target], source: arrays.Source) -> None:
        saved = [row.saved for row in each.rows if row.saved is not None]
        self.wanted += [
            arrays.Read(each.item, len(self.databases), spec, to_devices.pieces(spec.shape, target))
            for spec, target in zip(saved, places, strict=True)
        ]
        self.targets += places
        self.matched.append(each)
        self.databases.append(source)

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of all that is wanted."""
        return sum(each.nbytes for each in self.wanted)

    def missing(self, directory: epath.Path) -> dict[str, list[tuple[str, int]]]:
        """By item the keys that its database lacks there, as it is of the parts of some processes alone."""
        openers = [arrays.Opener(directory, source) for source in self.databases]
        found = arrays.missing(self.wanted, openers)
        return {self.databases[source].folder.strip("/"): keys for source, keys in found.items()}

    @functools.cached_property
    def groups(self) -> list[Group]:
        return self.group(range(len(self.wanted)))

    def group(self, leaves: Sequence[int]) -> list[Group]:
        """These leaves, as many at a time as may be held beside the arrays, or one that is larger."""
        small = self.small(leaves)
        if self.most_bytes is not None:
            small = [run for some in small for run in _cut(some, self.held_bytes, self.most_bytes)]
        return [Group(self, run) for run in small]

    def small(self, leaves: Sequence[int]) -> list[Sequence[int]]:
        """As many at a time as may be held twice: JAX copies small ones once more."""
        most_bytes = _COPIED_BYTES if self.is_local else _COPIED_BYTES_IN_BUCKETS
        return _cut(leaves, self._held_twice, most_bytes)

    def placing(self, leaves: Sequence[int], only: int | None = None) -> to_devices.Plan:
        """How these leaves, or one piece of each, are sent to their devices."""
        return to_devices.Plan([self.wanted[n].spec for n in leaves], [self.targets[n] for n in leaves], only)

    def held_bytes(self, n: int) -> int:
        """What a leaf takes on the host beside the array that it becomes."""
        held = to_devices.held_bytes(self.wanted[n].spec, self.targets[n])
        return max(held, self._held_twice(n), 1)  # 1: so a large one is alone also behind some that take nothing

    def _held_twice(self, n: int) -> int:
        """Bytes of a leaf that JAX copies once more."""
        each = self.wanted[n]
        way = arrays.way(each.spec, self.databases[each.source], is_local=self.is_local)
        return chunks.stored(each.spec).nbytes if way in ("small", "chunk") else 0


def _cut(leaves: Sequence[int], nbytes: Callable[[int], int], most_bytes: int) -> list[Sequence[int]]:
    return [[leaves[n] for n in run] for run in chunks.runs(list(map(nbytes, leaves)), most_bytes)]


class Group:
    """Leaves that are read and placed together; a large one alone, and one of its pieces after the other."""

    def __init__(self, plan: Plan, leaves: Sequence[int]) -> None:
        self.leaves = leaves
        wanted = [plan.wanted[n] for n in leaves]
        self.texts = [n for n, each in enumerate(wanted) if each.spec.kind == "str"]
        """Leaves that lie in a file of their own."""
        self.wanted = wanted
        stored = [each for each in wanted if each.spec.kind != "str"]
        read = functools.partial(
            arrays.Plan, sources=plan.databases, is_local=plan.is_local, most_bytes=plan.most_bytes
        )
        self.placing = plan.placing(leaves)
        self.parts = [(read(stored), self.placing)]
        """How they are read and sent to their devices, one part after the other."""
        is_large = plan.most_bytes is not None and plan.held_bytes(leaves[0]) > plan.most_bytes
        if len(leaves) == 1 and is_large and wanted[0].pieces:  # there are none if other processes have them all
            pieces = enumerate(wanted[0].pieces)
            self.parts = [
                (read([wanted[0]._replace(pieces=[each])]), plan.placing(leaves, n)) for n, each in pieces
            ]


def _shared(plan: Plan, run: broadcast.Runner) -> broadcast.Shared:
    return broadcast.Shared(plan.wanted, plan.databases, plan.targets, run, plan.most_bytes, plan.is_local)


class Trees:
    """The trees of arrays of a step, each leaf on its way to where its target wants it.

    With `others` what several processes hold is read once, and sent. `fetch` reads this process's part; all must
    have done so before `place` is called in any. Under `max_host_bytes` it is only the first part, and `fetch` is
    called in all processes for each of the others.

    `on_progress` is called on the thread that calls these methods.
    """

    def __init__(
        self,
        plan: Plan,
        structures: Mapping[str, Any],
        step: int,
        directory: epath.Path,
        others: Others | None,
        on_progress: Progress | None = None,
    ) -> None:
        self._plan, self._structures, self._step, self._directory = plan, structures, step, directory
        self._openers = [arrays.Opener(directory, source) for source in plan.databases]
        self._others = others
        self._shared = _shared(plan, others.run) if others is not None else None
        self._ahead = self._shared.cut() if self._shared is not None else []
        """The leaves that are to be sent, those of each `fetch`."""
        self._meter = Meter(on_progress, self.nbytes) if on_progress is not None else None

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of what this process reads."""
        if self._shared is None:
            return self._plan.nbytes
        sent = set(self._shared.leaves)
        own = sum(each.nbytes for n, each in enumerate(self._plan.wanted) if n not in sent)
        return own + self._shared.nbytes_read_here()

    def end(self) -> None:
        """To be called once the step is restored."""
        if self._meter is not None:
            self._meter.end()

    def fetch(self) -> None:
        """Reads what is to be sent next to other processes."""
        if self._shared is not None and self._ahead:
            with self._damages():
                self._shared.read(self._ahead[0], self._openers, self._meter)

    def place(self) -> dict[str, Any]:
        """The trees by the names of their items, read in few batches."""
        plan = self._plan
        placed: list[Any] = [None] * len(plan.wanted)
        groups = plan.groups if self._shared is None else plan.group(self._receive(self._shared, placed))
        with self._damages():
            for group in groups:
                for n, leaf in zip(group.leaves, self._leaves(group), strict=True):
                    placed[n] = leaf
        return self._assembled(iter(placed))

    def _receive(self, shared: broadcast.Shared, placed: list[Any]) -> list[int]:
        """Places the leaves that are sent by the processes that read them; returns the others."""
        while self._ahead:
            for run in self._plan.small(self._ahead.pop(0)):
                sent, placing = shared.send(run), self._plan.placing(run)
                leaves = to_devices.place(placing, [sent[n] for n in run])
                for n, leaf in zip(run, self._arrived(leaves), strict=True):
                    placed[n] = leaf
            self._give_back()
            if self._ahead and self._others is not None:
                self._others.agree(self.fetch)
        return sorted(set(range(len(placed))) - set(shared.leaves))

    def _leaves(self, group: Group) -> list[Any]:
        """Reads the leaves of a group, and sends them to their devices."""
        arrived: list[list[jax.Array]] = [[] for _ in group.leaves]
        values: list[Sequence[chunks.Values]] = []
        for reading, placing in group.parts:
            values = []  # what has been sent is not held while more is read
            self._give_back()
            values = to_devices.cast(placing, self._read(group, reading))
            for own, sent in zip(arrived, to_devices.send(placing, values), strict=True):
                own += sent
            self._arrived(arrived)
        return to_devices.finish(group.placing, arrived, values)

    def _assembled(self, placed: Iterator[Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for each in self._plan.matched:
            leaves = [row.given if row.saved is None else next(placed) for row in each.rows]
            tree = each.assemble(leaves, self._structures.get(each.item))
            if each.item in self._plan.lists:
                found.setdefault(each.item, []).append(tree)
            else:
                found[each.item] = tree
        return found

    def _give_back(self) -> None:
        if self._plan.most_bytes is not None:
            chunks.give_back()

    def _arrived(self, leaves: list[Any]) -> list[Any]:
        """The same; under `max_host_bytes` once they have arrived, as until then JAX holds what it sends."""
        return leaves if self._plan.most_bytes is None else jax.block_until_ready(leaves)

    def _read(self, group: Group, reading: arrays.Plan) -> list[list[chunks.Values]]:
        """The values of these leaves."""
        found = arrays.read(reading, self._openers, self._meter)
        for n in group.texts:  # in ascending order, so that each finds its place
            found.insert(n, self._text(group.wanted[n]))
        return found

    def _text(self, each: arrays.Read) -> list[chunks.Values]:
        folder = self._directory / self._plan.databases[each.source].folder
        return [np.asarray(values.text(each, folder), object)]

    @contextlib.contextmanager
    def _damages(self) -> Iterator[None]:
        try:
            yield
        except arrays.DamagedArrayError as problem:
            raise CorruptCheckpointError(
                f"step {self._step}: {problem.leaf} cannot be read: {problem}",
                step=self._step, path=problem.item, leaf=problem.leaf,
            ) from problem  # fmt: skip
