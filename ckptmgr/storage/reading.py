"""Reading a committed step: its items, ours or stock Orbax's, and what went wrong with them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from ckptmgr import items
from ckptmgr import manifest as manifests
from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.layout import Target
from ckptmgr.storage import arrays, broadcast, chunks, devices, stock
from ckptmgr.storage.orbax import METRICS, STEP_METADATA, json_file, own_place

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
        matched: Sequence[items.Matched],
        targets: Sequence[Sequence[Target]],
        *,
        shares: bool,
        sources: Mapping[str, int | None],
    ) -> None:
        self.sources = sources
        self._step = manifest.step
        self._matched: list[items.Matched] = []
        self._targets: list[Target] = []
        self._wanted: list[arrays.Read] = []
        for each, places in zip(matched, targets, strict=True):
            item = manifest.items.get(each.item, manifests.Item("arrays"))
            source = sources.get(each.item, 0)
            plain = manifest.written_here and item.compression is None
            for process in range(item.processes) if source is None else [source]:
                directory_of = directory / each.item / own_place(process)
                opener = arrays.Opener(directory_of, zarr3=item.zarr3, ocdbt=item.ocdbt, plain=plain)
                saved = [row.saved for row in each.rows if row.saved is not None]
                self._matched.append(each)
                self._targets += places
                self._wanted += [
                    arrays.Read(each.item, opener, spec, devices.pieces(spec.shape, target))
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
                placed |= self._placed(group, arrays.read([self._wanted[place] for place in group]))
        arrived = (placed[place] for place in range(len(self._wanted)))
        found: dict[str, Any] = {}
        for each in self._matched:
            tree = each.assemble([row.given if row.saved is None else next(arrived) for row in each.rows])
            if self.sources.get(each.item, 0) is None:
                found.setdefault(each.item, []).append(tree)
            else:
                found[each.item] = tree
        return found

    def _groups(self, places: Sequence[int]) -> Iterator[list[int]]:
        for group in chunks.runs([self._wanted[place].copied_nbytes for place in places], _COPIED_BYTES):
            yield [places[each] for each in group]

    def _placed(self, group: Sequence[int], values: Sequence[Sequence[chunks.Values]]) -> dict[int, Any]:
        shapes = [self._wanted[place].spec.shape for place in group]
        where = [self._targets[place] for place in group]
        return dict(zip(group, devices.place(values, shapes, where), strict=True))

    @contextlib.contextmanager
    def _damages(self) -> Iterator[None]:
        try:
            yield
        except arrays.DamagedArrayError as problem:
            raise CorruptCheckpointError(
                f"step {self._step}: {problem.leaf} cannot be read: {problem}",
                step=self._step, path=problem.item, leaf=problem.leaf,
            ) from problem  # fmt: skip


def read_values(
    manifest: manifests.Manifest, directory: epath.Path, sources: Mapping[str, int | None]
) -> dict[str, Any]:
    """The JSON values among these items: that of one process, or a list of all."""

    def value(name: str, item: manifests.Item, process: int) -> Any:
        data = (directory / name / own_place(process, item.file)).read_bytes()
        return items.from_json(item, json.loads(data))

    chosen = {name: item for name in sources if (item := manifest.items[name]).kind != "arrays"}
    return {
        name: [value(name, item, each) for each in range(item.processes)]
        if (process := sources[name]) is None
        else value(name, item, process)
        for name, item in chosen.items()
    }


# ---------------------------------------------------------------- what stock Orbax wrote


def read_stock(step: int, directory: epath.Path) -> manifests.Manifest:
    """The manifest of a checkpoint that has none, from Orbax's own files."""
    metadata = _json(directory / STEP_METADATA) or {}
    if "ckptmgr" in (metadata.get("custom_metadata") or {}):
        raise CorruptCheckpointError(
            f"step {step}: {directory / manifests.NAME} is missing", step=step, path=manifests.NAME
        )
    folders = [entry for entry in directory.iterdir() if entry.is_dir()]
    found = {folder.name: item for folder in folders if (item := _stock_item(step, folder)) is not None}
    nanoseconds = metadata.get("commit_timestamp_nsecs") or metadata.get("init_timestamp_nsecs") or 0
    return manifests.Manifest(
        step=step,
        time=nanoseconds / 1e9,
        items=found,
        metrics=_numbers(_json(directory / METRICS / METRICS)),
        metadata=metadata.get("custom_metadata") or {},
        written_here=False,
    )


def _stock_item(step: int, directory: epath.Path) -> manifests.Item | None:
    metadata = _json(directory / stock.TREE)
    if metadata is None:
        file = json_file(directory.name)
        return manifests.Item("json", file=file) if (directory / file).exists() else None
    zarr3, ocdbt = bool(metadata.get("use_zarr3")), bool(metadata.get("use_ocdbt", True))

    def read(name: str) -> bytes | None:
        path = directory / name
        return path.read_bytes() if path.exists() else None

    try:
        tree = stock.read_tree(metadata, read, arrays.Opener(directory, zarr3=zarr3, ocdbt=ocdbt).facts)
    except (ValueError, KeyError) as problem:
        raise CorruptCheckpointError(
            f"step {step}: {directory} cannot be read: {problem}", step=step, path=directory.name
        ) from problem
    return manifests.Item("arrays", tree, zarr3=zarr3, ocdbt=ocdbt)


def _json(path: epath.Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _numbers(value: Any) -> dict[str, float]:
    named = value.items() if isinstance(value, dict) else ()
    return {name: float(number) for name, number in named if isinstance(number, int | float)}
