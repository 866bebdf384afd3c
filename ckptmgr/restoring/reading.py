"""Reading a committed step: its items, ours or stock Orbax's, and what went wrong with them."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ckptmgr.arrays import broadcast, chunks, to_devices
from ckptmgr.arrays import reading as arrays
from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format import manifest as manifests
from ckptmgr.restoring import matching
from ckptmgr.run import values
from ckptmgr.trees.layouts import Target

_COPIED_BYTES = 2 << 20  # JAX copies small leaves once more: not all of them at a time


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
    """

    def __init__(
        self,
        manifest: manifests.Manifest,
        matched: Sequence[matching.Matched],
        targets: Sequence[Sequence[Target]],
        sources: Mapping[str, int | None],
        *,
        is_local: bool,
    ) -> None:
        self.is_local = is_local
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
                self._add(each, places, arrays.Source(folder, item.zarr3, item.ocdbt, plain))

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
    def groups(self) -> list[Group]:
        return self.group(range(len(self.wanted)))

    def group(self, leaves: Sequence[int]) -> list[Group]:
        """These leaves, as many at a time as may be held twice: JAX copies small ones once more."""
        sizes = [self._held_twice(self.wanted[n]) for n in leaves]
        return [Group(self, [leaves[n] for n in run]) for run in chunks.runs(sizes, _COPIED_BYTES)]

    def _held_twice(self, each: arrays.Read) -> int:
        """Bytes of a leaf while it goes to its device."""
        way = arrays.way(each.spec, self.databases[each.source], is_local=self.is_local)
        return chunks.stored(each.spec).nbytes if way in ("small", "chunk") else 0


class Group:
    """Leaves that are read and placed together."""

    def __init__(self, plan: Plan, leaves: Sequence[int]) -> None:
        self.leaves = leaves
        wanted = [plan.wanted[n] for n in leaves]
        self.texts = [n for n, each in enumerate(wanted) if each.spec.kind == "str"]
        """Leaves that lie in a file of their own."""
        self.wanted = wanted
        stored = [each for each in wanted if each.spec.kind != "str"]
        self.reading = arrays.Plan(stored, plan.databases, is_local=plan.is_local)
        self.placing = to_devices.Plan([each.spec for each in wanted], [plan.targets[n] for n in leaves])


class Trees:
    """The trees of arrays of a step, each leaf on its way to where its target wants it.

    With `run` what several processes hold is read once: `fetch` reads this process's part, and all must have done
    so before `place` is called in any. It runs the programs that send it.
    """

    def __init__(
        self,
        plan: Plan,
        structures: Mapping[str, Any],
        step: int,
        directory: epath.Path,
        run: broadcast.Runner | None,
    ) -> None:
        self._plan, self._structures, self._step, self._directory = plan, structures, step, directory
        self._openers = [arrays.Opener(directory, source) for source in plan.databases]
        self._shared = broadcast.Shared(plan.wanted, plan.databases, plan.targets, run) if run else None

    def fetch(self) -> None:
        """Reads what is to be sent to other processes."""
        if self._shared is not None:
            with self._damages():
                self._shared.read(self._openers, is_local=self._plan.is_local)

    def place(self) -> dict[str, Any]:
        """The trees by the names of their items; everything else is read in few batches."""
        plan, groups = self._plan, self._plan.groups if self._shared is None else []
        placed: list[Any] = [None] * len(plan.wanted)
        if self._shared is not None:  # before anything is read that may be damaged: all send, or none
            for group in plan.group(self._shared.leaves):
                sent = self._shared.send(group.leaves)
                self._put(group, [sent[n] for n in group.leaves], placed)
            groups = plan.group(sorted(set(range(len(plan.wanted))) - set(self._shared.leaves)))
        with self._damages():
            for group in groups:
                self._put(group, self._read(group), placed)
        return self._assembled(iter(placed))

    def _put(self, group: Group, values: Sequence[Sequence[chunks.Values]], placed: list[Any]) -> None:
        for n, leaf in zip(group.leaves, to_devices.place(group.placing, values), strict=True):
            placed[n] = leaf

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

    def _read(self, group: Group) -> list[list[chunks.Values]]:
        """The values of these leaves."""
        found = arrays.read(group.reading, self._openers)
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
