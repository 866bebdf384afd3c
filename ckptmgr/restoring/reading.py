"""Reading a committed step: its items, ours or stock Orbax's, and what went wrong with them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ckptmgr.arrays import broadcast, chunks, reading, to_devices
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


class Trees:
    """The trees of arrays of a step, each leaf on its way to where its target wants it.

    `sources` says whose state of an item is read, where the processes that saved it had each their own.
    With `shares` what several processes hold is read once: `fetch` reads this process's part, and all must
    have done so before `place` is called in any.
    """

    def __init__(
        self,
        manifest: manifests.Manifest,
        directory: epath.Path,
        matched: Sequence[matching.Matched],
        targets: Sequence[Sequence[Target]],
        *,
        shares: bool,
        sources: Mapping[str, int | None],
    ) -> None:
        self.sources = sources
        self._step = manifest.step
        self._matched: list[matching.Matched] = []
        self._targets: list[Target] = []
        self._wanted: list[reading.Read] = []
        self._folders: dict[str, epath.Path] = {}
        for each, places in zip(matched, targets, strict=True):
            item = manifest.items.get(each.item, manifests.Item("arrays"))
            source = sources.get(each.item, 0)
            plain = manifest.written_here and item.compression is None
            for process in range(item.processes) if source is None else [source]:
                folder = directory / item.place(each.item) / manifests.own_place(process)
                opener = reading.Opener(folder, zarr3=item.zarr3, ocdbt=item.ocdbt, plain=plain)
                self._folders[each.item] = folder
                saved = [row.saved for row in each.rows if row.saved is not None]
                self._matched.append(each)
                self._targets += places
                self._wanted += [
                    reading.Read(each.item, opener, spec, to_devices.pieces(spec.shape, target))
                    for spec, target in zip(saved, places, strict=True)
                ]
        self._shared = broadcast.Shared(self._wanted, self._targets) if shares else None

    def fetch(self) -> None:
        """Reads what is to be sent to other processes."""
        if self._shared is not None:
            with self._damages():
                self._shared.read()

    def place(self) -> dict[str, Any]:
        """The trees by the names of their items; everything else is read in one batch."""
        placed: dict[int, Any] = {}
        shared = self._shared.leaves if self._shared is not None else []
        if self._shared is not None:  # before anything is read that may be damaged: all send, or none
            for group in self._groups(shared):
                sent = self._shared.send(group)
                placed |= self._placed(group, [sent[place] for place in group])
        with self._damages():
            for group in self._groups(sorted(set(range(len(self._wanted))) - set(shared))):
                placed |= self._placed(group, self._read(group))
        arrived = (placed[place] for place in range(len(self._wanted)))
        found: dict[str, Any] = {}
        for each in self._matched:
            tree = each.assemble([row.given if row.saved is None else next(arrived) for row in each.rows])
            if self.sources.get(each.item, 0) is None:
                found.setdefault(each.item, []).append(tree)
            else:
                found[each.item] = tree
        return found

    def _read(self, group: Sequence[int]) -> list[list[chunks.Values]]:
        """The values of these leaves; those that are a str lie in a file of their own."""
        wanted = [self._wanted[place] for place in group]
        stored = iter(reading.read([each for each in wanted if each.spec.kind != "str"]))
        return [self._text(each) if each.spec.kind == "str" else next(stored) for each in wanted]

    def _text(self, each: reading.Read) -> list[chunks.Values]:
        return [np.asarray(values.text(each, self._folders[each.item]), object)]

    def _groups(self, places: Sequence[int]) -> Iterator[list[int]]:
        for group in chunks.runs([self._wanted[place].copied_nbytes for place in places], _COPIED_BYTES):
            yield [places[each] for each in group]

    def _placed(self, group: Sequence[int], values: Sequence[Sequence[chunks.Values]]) -> dict[int, Any]:
        shapes = [self._wanted[place].spec.shape for place in group]
        where = [self._targets[place] for place in group]
        return dict(zip(group, to_devices.place(values, shapes, where), strict=True))

    @contextlib.contextmanager
    def _damages(self) -> Iterator[None]:
        try:
            yield
        except reading.DamagedArrayError as problem:
            raise CorruptCheckpointError(
                f"step {self._step}: {problem.leaf} cannot be read: {problem}",
                step=self._step, path=problem.item, leaf=problem.leaf,
            ) from problem  # fmt: skip
