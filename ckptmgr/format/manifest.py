"""manifest.json: what a checkpoint holds and what its files must be. Knows no model and no Orbax.

The manifest is written last, before the commit, so that every committed checkpoint has one. It carries
the structure that templates are compared with, and size and CRC-32 of every file that does not check
itself; its last field is the CRC-32 of all bytes before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import platform
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from ckptmgr.errors import CorruptCheckpointError, NewerFormatError
from ckptmgr.format import schema
from ckptmgr.specs import LeafSpec, TreeSpec
from ckptmgr.trees.structure import numpy_dtype

NAME = "manifest.json"
PARAMS, OPT_STATE, STEP, METRICS = "params", "opt_state", "step", "metrics"
RESERVED = frozenset({PARAMS, OPT_STATE, STEP, METRICS})
"""The items that every step may have; the others are the entries of extras."""
FORMAT = 2
"""Format 2 adds items of other libraries: in another folder, not read, or with leaves that are a str. It also adds
items of which each process has its own; a reader of format 1 would give the first to all processes.
A manifest without these is still written as format 1, so that older versions read it."""

_LIBRARIES = ("ckptmgr", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint", "tensorstore")


NO_TREE = TreeSpec((), None)


@dataclasses.dataclass(frozen=True)
class Item:
    """One item of a checkpoint: a tree of arrays, a JSON value in `file`, or bytes (in base64 in `file`).

    An item of another library that ckptmgr does not read is "unread", and `why` says what to do.
    """

    kind: Literal["arrays", "json", "bytes", "unread"]
    tree: TreeSpec = NO_TREE
    file: str = ""
    zarr3: bool = True
    ocdbt: bool = True
    """How the arrays are stored; stock Orbax also writes zarr2, and arrays without a database."""
    compression: str | None = None
    folder: str = ""
    """The folder of the item in the step; "" means a folder with the name of the item, "." the step itself."""
    why: str = ""
    processes: int = 1
    """How many processes have saved their own value; stock Orbax reads that of process 0."""
    fills: bool = False
    """Whether chunks that are not there are zeros: an old Orbax did not store them."""

    def place(self, name: str) -> str:
        """The folder of the item in the step."""
        return self.folder or name

    @functools.cached_property
    def nbytes(self) -> int:
        return sum(leaf_nbytes(leaf) for leaf in self.tree.leaves)

    @functools.cached_property
    def text(self) -> str:
        """The item as JSON. The text is long, and equal for all steps of one structure: it is made once."""
        return _dumps(_item_to_json(self))

    @functools.cached_property
    def needs_format_2(self) -> bool:
        is_new = self.kind == "unread" or bool(self.folder) or self.processes > 1
        return is_new or any(leaf.kind == "str" for leaf in self.tree.leaves)


def json_file(item: str) -> str:
    """The file of an item that is a JSON value; the name for metrics is Orbax's."""
    return METRICS if item == METRICS else "metadata"


def own_place(process: int, file: str = "") -> str:
    """The folder or file in an item for the value of one process; stock Orbax reads that of process 0."""
    if file:
        return f"process_{process}.json" if process else file
    return f"process_{process}" if process else ""


def leaf_nbytes(leaf: LeafSpec) -> int:
    """Bytes of one leaf before compression; a str is not counted."""
    if leaf.kind == "str":
        return 0
    if leaf.kind == "key":  # the words of a key depend on its generator; threefry has two
        return math.prod(leaf.shape) * (16 if "rbg" in (leaf.impl or "") else 8)
    return math.prod(leaf.shape) * numpy_dtype(leaf.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class File:
    """What a file must be. `crc32` is None where TensorStore checks the content as it reads it."""

    size: int
    crc32: int | None


@dataclasses.dataclass(frozen=True)
class Reduction:
    """Retention has deleted items of a step, because only `params_only` policies keep it."""

    items: tuple[str, ...]
    """The items that are gone."""
    by: str
    """The policies, as their reprs."""
    time: float

    def __str__(self) -> str:
        when = datetime.datetime.fromtimestamp(self.time, datetime.UTC)
        return f"reduced to its params by {self.by} on {when:%Y-%m-%d %H:%M:%S} UTC"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint that is not an array."""

    step: int
    time: float
    items: Mapping[str, Item]
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, File] = dataclasses.field(default_factory=dict)
    written_here: bool = True
    """False for a checkpoint of stock Orbax, which has no manifest on disk unless it was adopted."""
    distrusted: str | None = None
    """Why the step was distrusted as it was saved; None if it was not. Older versions pass over this field."""
    unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Files of stock Orbax that cannot be read, and why; nothing that is restored depends on them."""
    reduced: Reduction | None = None

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items.values())


@functools.cache
def versions() -> Mapping[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


# ---------------------------------------------------------------- to and from bytes


def encode(manifest: Manifest) -> bytes:
    head = {
        "format": FORMAT if any(item.needs_format_2 for item in manifest.items.values()) else 1,
        "step": manifest.step,
        "time": manifest.time,
        "metrics": manifest.metrics,
        "metadata": manifest.metadata,
        "versions": manifest.versions,
    }
    head |= {"distrusted": manifest.distrusted} if manifest.distrusted is not None else {}
    items = ",".join(f"{_dumps(name)}:{item.text}" for name, item in manifest.items.items())
    files = _dumps({name: [file.size, file.crc32] for name, file in manifest.files.items()})
    adopted = "" if manifest.written_here else ',"adopted":true'
    reduced = f',"reduced":{_dumps(dataclasses.asdict(manifest.reduced))}' if manifest.reduced else ""
    text = f'{_dumps(head)[:-1]},"items":{{{items}}},"files":{files}{adopted}{reduced}'.encode()
    return text + _seal(text)


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _seal(text: bytes) -> bytes:
    return b',"crc32":"%08x"}\n' % zlib.crc32(text)


_SEAL_BYTES = len(_seal(b""))


class KnownItems(NamedTuple):
    """Items that a manifest holds, and the text that says so: manifests of one run mostly differ in the rest."""

    text: bytes = b""
    items: Mapping[str, Item] = MappingProxyType({})


def items_text(data: bytes) -> bytes:
    """What a manifest says of its items, as it stands there."""
    return data[_items_place(data)]


def _items_place(text: bytes) -> slice:
    return slice(text.find(_ITEMS) + len(_ITEMS), text.rfind(b',"files":'))


_ITEMS = b',"items":'


def _parse(text: bytes, known: KnownItems) -> tuple[Any, bool]:
    """A manifest as JSON, and whether its items are the known ones: those are not parsed again, and left out."""
    place = _items_place(text)
    if known.text and text[place] == known.text:
        with contextlib.suppress(ValueError, TypeError):  # the metadata may hold the same words
            body = json.loads(b"%bnull%b}" % (text[: place.start], text[place.stop :]))
            if body["items"] is None:
                return body | {"items": {}}, True
    return json.loads(text + b"}"), False


NO_ITEMS = KnownItems()


def decode(data: bytes, *, step: int, path: str, known: KnownItems = NO_ITEMS) -> Manifest:
    """Reads a manifest; one that says the same of its items as one before has the very items of that one.

    Raises CorruptCheckpointError unless every bit of it is as it was written and it says what a manifest says,
    NewerFormatError for one that a later version of ckptmgr wrote.
    """

    def damaged(why: object) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"step {step}: {path} is damaged: {why}", step=step, path=path)

    text, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if seal != _seal(text):
        raise damaged("its checksum does not match")
    try:
        body, is_known = _parse(text, known)
        schema.check({"format": schema.COUNT}, body)
        if body["format"] > FORMAT:
            found = body["format"]
            raise NewerFormatError(
                f"step {step} has format {found}, and this ckptmgr reads up to format {FORMAT}; upgrade ckptmgr",
                step=step, format=found,
            )  # fmt: skip
        schema.check_manifest(body)
    except (ValueError, RecursionError) as problem:
        raise damaged(problem) from None
    if body["step"] != step:
        raise damaged(f"it belongs to step {body['step']}")
    return Manifest(
        step=step,
        time=body["time"],
        metrics=body["metrics"],
        metadata=body["metadata"],
        versions=body["versions"],
        items=known.items if is_known else _items_from_json(body["items"]),
        files={name: File(*facts) for name, facts in body["files"].items()},
        written_here=not body.get("adopted", False),
        distrusted=body.get("distrusted"),
        reduced=_reduction(body.get("reduced")),
    )


def _reduction(body: Mapping[str, Any] | None) -> Reduction | None:
    return None if body is None else Reduction(tuple(body["items"]), body["by"], body["time"])


def _item_to_json(item: Item) -> dict[str, Any]:
    more: dict[str, Any] = {"folder": item.folder} if item.folder else {}
    more |= {"processes": item.processes} if item.processes > 1 else {}
    if item.kind == "unread":
        return {"kind": "unread", "why": item.why} | more
    if item.kind != "arrays":
        return {"kind": item.kind, "file": item.file} | more
    leaves = [_leaf_to_json(leaf) for leaf in item.tree.leaves]
    stock = {name: False for name in ("zarr3", "ocdbt") if not getattr(item, name)}
    stock |= {"fills": True} if item.fills else {}
    return {
        "kind": "arrays",
        "nbytes": item.nbytes,
        "compression": item.compression,
        "leaves": leaves,
        "outline": item.tree.outline,
    } | stock | more  # fmt: skip


def _leaf_to_json(leaf: LeafSpec) -> dict[str, Any]:
    named = {"path": leaf.path, "keys": leaf.keys, "kind": leaf.kind, "shape": leaf.shape, "dtype": leaf.dtype}
    extra = {"weak": leaf.weak, "partition": leaf.partition, "impl": leaf.impl, "chunks": leaf.chunks}
    return named | {name: value for name, value in extra.items() if value not in (False, None)}


def _items_from_json(items: Mapping[str, Any]) -> dict[str, Item]:
    return {name: _item_from_json(item) for name, item in items.items()}


def _item_from_json(item: Mapping[str, Any]) -> Item:
    more = {"folder": item.get("folder", ""), "processes": item.get("processes", 1)}
    more |= {"fills": True} if item.get("fills") else {}
    if item["kind"] == "unread":
        return Item("unread", why=item["why"], **more)
    if item["kind"] != "arrays":
        return Item(item["kind"], file=item["file"], **more)
    leaves = tuple(map(_leaf_from_json, item["leaves"]))
    zarr3, ocdbt = item.get("zarr3", True), item.get("ocdbt", True)
    return Item("arrays", TreeSpec(leaves, item["outline"]), "", zarr3, ocdbt, item["compression"], **more)


def _leaf_from_json(leaf: Mapping[str, Any]) -> LeafSpec:
    partition, chunks = leaf.get("partition"), leaf.get("chunks")
    if partition is not None:
        partition = tuple(tuple(axes) if isinstance(axes, list) else axes for axes in partition)
    return LeafSpec(
        leaf["path"],
        tuple(leaf["keys"]),
        leaf["kind"],
        tuple(leaf["shape"]),
        leaf["dtype"],
        leaf.get("weak", False),
        partition,
        leaf.get("impl"),
        None if chunks is None else tuple(chunks),
    )
