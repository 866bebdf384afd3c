"""Makes the manifest of a step that stock Orbax wrote, from Orbax's own files.

No item is left out: an item that ckptmgr does not read is in the manifest, with the reason. A tree that was saved
directly into the step's directory, without items, becomes the params.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping
from typing import Any

from etils import epath

from ckptmgr.arrays import reading
from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format import files, paths, schema
from ckptmgr.format import manifest as manifests
from ckptmgr.format.manifest import METRICS, STEP, Item
from ckptmgr.format.names import COMMITTED, STEP_METADATA, UNFINISHED
from ckptmgr.orbax import item_files
from ckptmgr.specs import TreeSpec

_log = logging.getLogger("ckptmgr")
_JSON_FILES = ("metadata", METRICS, "data.json")
_PROTO = "proto.pbtxt"
_JAX_KEY, _NUMPY_KEY = "jax_random_key", "np_random_key"
_WRONG = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, OSError)
"""What reading the JSON of others raises if its content is unexpected."""


def read(step: int, directory: epath.Path) -> manifests.Manifest:
    """Raises CorruptCheckpointError if the step cannot be read, or holds nothing that Orbax writes."""
    try:
        return _Step(step, directory).manifest()
    except CorruptCheckpointError:
        raise
    except OSError as problem:
        paths.refuse_exhausted(problem)
        raise CorruptCheckpointError(f"step {step}: {directory} cannot be read: {problem}", step=step) from problem


class _Step:
    """One step that is being read."""

    def __init__(self, step: int, directory: epath.Path) -> None:
        self._step, self._directory = step, directory
        self._unreadable: dict[str, str] = {}

    def manifest(self) -> manifests.Manifest:
        metadata = self._metadata()
        given = metadata.get("custom_metadata") or {}
        custom = given if isinstance(given, dict) else {"custom_metadata": given}
        if "ckptmgr" in custom or (not metadata and self._is_ours()):
            raise self._damaged(manifests.NAME, "is missing")
        items = self._items(metadata.get("item_handlers"))
        if not items:
            raise CorruptCheckpointError(
                f"step {self._step}: {self._directory} holds nothing that ckptmgr or Orbax writes", step=self._step
            )
        return manifests.Manifest(
            step=self._step,
            time=_seconds(metadata),
            items=items,
            metrics=self._metrics(items),
            metadata=custom,
            written_here=False,
            unreadable=self._unreadable,
        )

    def _metadata(self) -> dict[str, Any]:
        """Orbax's metadata of the step. If it cannot be read, Orbax restores without it, and so do we."""
        path = self._directory / STEP_METADATA
        try:
            found = _json(path)
            return schema.checked(dict, found) if found is not None else {}
        except _WRONG as problem:
            self._pass_over(STEP_METADATA, problem)
            return {}

    def _is_ours(self) -> bool:
        """Whether ckptmgr wrote a step that lacks Orbax's metadata: then it has lost its manifest too.

        Orbax either marks the step and its items as committed, or neither; ckptmgr marks the step alone.
        """
        folder = self._directory / STEP
        is_marked = (self._directory / COMMITTED).exists() and not (folder / COMMITTED).exists()
        return is_marked and bool((folder / "metadata").exists())

    def _pass_over(self, name: str, problem: object) -> None:
        path = self._directory / name
        _log.warning("step %d: %s cannot be read, and is read on without it: %s", self._step, path, problem)
        self._unreadable[name] = f"cannot be read: {_first_line(problem)}"

    # ------------------------------------------------------------ the items

    def _items(self, handlers: Any) -> dict[str, Item]:
        if isinstance(handlers, str) or (self._directory / item_files.TREE).exists():
            return self._straight(handlers if isinstance(handlers, str) else "")
        known = handlers if isinstance(handlers, dict) else {}
        folders = {entry.name for entry in self._directory.iterdir() if entry.is_dir()}
        names = {*known, *(folders - {name.partition("/")[0] for name in known})}
        finished = sorted(name for name in names if UNFINISHED not in name)
        return {name: self._item(name, str(known.get(name, ""))) for name in finished}

    def _straight(self, handler: str) -> dict[str, Item]:
        """A tree without items becomes the params; anything else gets the name "default", as in Orbax."""
        is_tree = _kind(handler) not in ("Array", "Json", "Proto", "JaxRandomKey", "NumpyRandomKey")
        name = "params" if is_tree else "default"
        item = self._item(name, handler, ".")
        return {name: dataclasses.replace(item, folder=item.folder or ".")}

    def _item(self, name: str, handler: str, folder: str = "") -> Item:
        """One item; `handler` is the class with which Orbax wrote it, "" if that is not known."""
        folder = folder or name
        if not schema.stays_inside(name):
            raise self._damaged(STEP_METADATA, f"names {name!r}, which would lie outside of the checkpoint")
        if not (self._directory / folder).is_dir():
            raise self._damaged(folder, "is missing")
        kind = _kind(handler)
        names = {entry.name for entry in (self._directory / folder).iterdir()}
        if item_files.TREE in names:
            return self._array(folder) if kind == "Array" else self._tree(folder)
        for key, read in ((_JAX_KEY, self._jax_key), (_NUMPY_KEY, self._numpy_key)):
            if {key, f"{key}_metadata"} <= names:
                return read(_join(folder, key))
        file = next((file for file in _JSON_FILES if file in names), None)
        if file is not None and kind in ("Json", "Metrics", ""):
            return Item("json", file=file)
        if kind in ("Standard", "PyTree", "Array"):
            raise self._damaged(_join(folder, item_files.TREE), "is missing")
        return self._unread(folder, kind, names)

    def _unread(self, folder: str, kind: str, names: set[str]) -> Item:
        where = self._directory / folder
        if _PROTO in names:
            why = f"it is a protocol buffer: google.protobuf.text_format reads {where / _PROTO}"
            return Item("unread", why=why)
        if kind in ("Json", "Metrics", "Proto", "JaxRandomKey", "NumpyRandomKey") and names <= {COMMITTED}:
            raise self._damaged(folder, "is empty")
        what = f"was written by Orbax's {kind}Handler" if kind else "holds no file that Orbax is known to write"
        return Item("unread", why=f"{where} {what}: read it with the program that wrote it")

    def _tree(self, folder: str) -> Item:
        path, metadata, ocdbt = _join(folder, item_files.TREE), None, True
        try:
            files.check_regular(self._directory / folder)
            metadata = _json(self._directory / path)
            zarr3, ocdbt = bool(metadata.get("use_zarr3")), bool(metadata.get("use_ocdbt", True))
            opener = reading.Opener(self._directory, reading.Source(folder, zarr3=zarr3, ocdbt=ocdbt))
            tree = item_files.read_tree(metadata, lambda name: self._read(folder, name), opener.facts)
        except CorruptCheckpointError:
            raise
        except _WRONG as problem:
            paths.refuse_exhausted(problem)
            database = _join(folder, "manifest.ocdbt")
            if isinstance(metadata, dict) and ocdbt and not (self._directory / database).is_file():
                raise self._damaged(database, "is missing") from problem
            raise self._damaged(path, f"cannot be read: {_first_line(problem)}") from problem
        outside = [leaf.name for leaf in tree.leaves if ".." in leaf.name.split("/")]
        if outside and not ocdbt:
            raise self._damaged(path, f"names an array {outside[0]!r}, which would lie outside of the checkpoint")
        return Item("arrays", tree, zarr3=zarr3, ocdbt=ocdbt, fills=not metadata.get(item_files.STORES_ZEROS))

    def _read(self, folder: str, name: str) -> Any:
        """A JSON file beside the tree. The arrays can be restored without that of the shardings."""
        file = _join(folder, name)
        try:
            found = _json(self._directory / file)
            return {} if found is None else schema.checked(dict, found)
        except _WRONG as problem:
            if name != item_files.SHARDINGS:
                raise self._damaged(file, f"cannot be read: {_first_line(problem)}") from problem
            self._pass_over(file, problem)
            return {}

    # ------------------------------------------------------------ what is one array, or a key

    def _array(self, folder: str) -> Item:
        """An item of Orbax's ArraySave: on disk a tree with one leaf, "checkpoint"."""
        item = self._tree(folder)
        leaf = item.tree.leaves[0] if len(item.tree.leaves) == 1 else None
        if leaf is None or leaf.keys != ("checkpoint",) or item.ocdbt:
            return item
        alone = TreeSpec((leaf._replace(path="", keys=()),), 0)
        return dataclasses.replace(item, tree=alone, folder=_join(folder, "checkpoint"))

    def _jax_key(self, folder: str) -> Item:
        item, is_typed = self._array(folder), self._says(folder, "typed")
        leaf = item.tree.leaves[0]
        if not is_typed:
            return item
        if leaf.dtype != "uint32" or leaf.shape[-1:] != (2,):
            why = "Orbax does not record the generator of this key: read it with Orbax's JaxRandomKeyRestore"
            return Item("unread", why=f"{self._directory / folder}: {why}")
        key = item_files.key_leaf(leaf, "threefry2x32")
        return dataclasses.replace(item, tree=TreeSpec((key,), 0))

    def _numpy_key(self, folder: str) -> Item:
        item, is_legacy = self._tree(folder), self._says(folder, "legacy")
        outline = item.tree.outline
        if is_legacy and "list" in outline:
            outline = {"tuple": outline["list"]}
        return dataclasses.replace(item, tree=TreeSpec(item.tree.leaves, outline), folder=folder)

    def _says(self, folder: str, field: str) -> bool:
        """A flag from the JSON file beside a key."""
        file = f"{folder}_metadata/metadata"
        try:
            return bool(schema.checked(bool, _json(self._directory / file)[field]))
        except _WRONG as problem:
            raise self._damaged(file, f"cannot be read: {_first_line(problem)}") from problem

    # ------------------------------------------------------------ the rest

    def _metrics(self, items: Mapping[str, Item]) -> dict[str, float]:
        item = items.get(METRICS)
        if item is None or item.kind != "json":
            return {}
        file = f"{METRICS}/{item.file}"
        try:
            found = _json(self._directory / file)
            named = found.items() if isinstance(found, dict) else ()
            return {name: float(number) for name, number in named if _is_number(number)}
        except _WRONG as problem:
            raise self._damaged(file, f"cannot be read: {_first_line(problem)}") from problem

    def _damaged(self, name: str, why: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"step {self._step}: {self._directory / name} {why}", step=self._step, path=name
        )


def _kind(handler: str) -> str:
    """ "PyTree" of orbax...PyTreeCheckpointHandler, and of v1's PyTreeHandler."""
    return handler.rpartition(".")[2].removesuffix("Handler").removesuffix("Checkpoint")


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _json(path: epath.Path) -> Any:
    """The content of a JSON file; None if it is not there."""
    try:
        return json.loads(paths.read_bytes(path))
    except FileNotFoundError:
        return None
    except OSError as problem:
        paths.refuse_exhausted(problem)
        raise


def _is_number(value: Any) -> bool:
    """Whether a metric fits into a float; other values are left out."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= sys.float_info.max)


def _seconds(metadata: Mapping[str, Any]) -> float:
    """The time of the commit, or of the start of the save; 0 if neither is known."""
    times = (metadata.get("commit_timestamp_nsecs"), metadata.get("init_timestamp_nsecs"))
    return next((time / 1e9 for time in times if schema.COUNT(time) and time), 0.0)


def _first_line(problem: object) -> str:
    return str(problem).partition("\n")[0][:600] or type(problem).__name__
