"""The small values of a step: JSON, bytes, and leaves that are a str."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from ckptmgr.arrays import reading
from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format import manifest as manifests
from ckptmgr.format import paths
from ckptmgr.format.manifest import Item
from ckptmgr.orbax import item_files


def read_values(
    manifest: manifests.Manifest, directory: epath.Path, sources: Mapping[str, int | None]
) -> dict[str, Any]:
    """The values of the items that are JSON or bytes: that of one process, or a list of all."""
    found: dict[str, Any] = {}
    for name, process in sources.items():
        item = manifest.items[name]
        if item.kind in ("json", "bytes"):
            each = range(item.processes) if process is None else [process]
            values = [read_value(manifest, directory, name, one) for one in each]
            found[name] = values if process is None else values[0]
    return found


def read_value(manifest: manifests.Manifest, directory: epath.Path, name: str, process: int = 0) -> Any:
    """The value of one item; raises CorruptCheckpointError."""
    item = manifest.items[name]
    file = f"{item.place(name)}/{manifests.own_place(process, item.file)}"
    try:
        return _from_json(item, json.loads(paths.read_bytes(directory / file)))
    except (ValueError, TypeError, OSError, RecursionError) as problem:
        paths.refuse_exhausted(problem)
        raise CorruptCheckpointError(
            f"step {manifest.step}: {directory / file} cannot be read: {problem}", step=manifest.step, path=file
        ) from problem


def _from_json(item: Item, value: Any) -> Any:
    """Bytes are base64 in JSON; other values are JSON themselves."""
    return base64.b64decode(value) if item.kind == "bytes" else value


def text(each: reading.Read, folder: epath.Path) -> str:
    """A leaf that is a str, from the file of Orbax that holds them; raises DamagedArrayError."""
    try:
        found = json.loads(paths.read_bytes(folder / item_files.TEXTS))[each.spec.name]
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as problem:
        paths.refuse_exhausted(problem)
        raise each.damaged(f"{item_files.TEXTS} cannot be read: {problem}") from problem
    if not isinstance(found, str):
        raise each.damaged(f"{item_files.TEXTS} holds {str(found)[:100]} instead of a str")
    return found
