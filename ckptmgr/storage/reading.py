"""Reading a committed step: its items, ours or stock Orbax's, and what went wrong with them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from etils import epath

from ckptmgr import items
from ckptmgr import manifest as manifests
from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.layout import Target
from ckptmgr.storage import arrays, chunks, devices, stock
from ckptmgr.storage.orbax import METRICS, STEP_METADATA, json_file

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


def read_trees(
    manifest: manifests.Manifest,
    directory: epath.Path,
    matched: Sequence[items.Matched],
    targets: Sequence[Sequence[Target]],
) -> dict[str, Any]:
    """The trees of arrays, each leaf where its target wants it; everything is read in one batch."""
    wanted = []
    for each, places in zip(matched, targets, strict=True):
        item = manifest.items.get(each.item, manifests.Item("arrays"))
        plain = manifest.written_here and item.compression is None
        opener = arrays.Opener(directory / each.item, zarr3=item.zarr3, ocdbt=item.ocdbt, plain=plain)
        saved = [row.saved for row in each.rows if row.saved is not None]
        wanted += [
            arrays.Read(each.item, opener, spec, devices.pieces(spec.shape, target))
            for spec, target in zip(saved, places, strict=True)
        ]
    flat = [target for places in targets for target in places]
    placed: list[Any] = []
    try:
        for group in chunks.runs([read.copied_nbytes for read in wanted], _COPIED_BYTES):
            reads, where = wanted[group.start : group.stop], flat[group.start : group.stop]
            placed += devices.place(arrays.read(reads), [read.spec.shape for read in reads], where)
    except arrays.DamagedArrayError as problem:
        raise CorruptCheckpointError(
            f"step {manifest.step}: {problem.leaf} cannot be read: {problem}",
            step=manifest.step, path=problem.item, leaf=problem.leaf,
        ) from problem  # fmt: skip
    arrived = iter(placed)
    return {
        each.item: each.assemble([row.given if row.saved is None else next(arrived) for row in each.rows])
        for each in matched
    }


def read_values(manifest: manifests.Manifest, directory: epath.Path, names: Iterable[str]) -> dict[str, Any]:
    """The JSON values among these items."""
    chosen = {name: item for name in names if (item := manifest.items.get(name)) and item.kind != "arrays"}
    return {
        name: items.from_json(item, json.loads((directory / name / item.file).read_bytes()))
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
