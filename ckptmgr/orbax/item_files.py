"""Writes and reads the JSON files that Orbax has beside the arrays of an item.

`_METADATA` holds the tree, `_sharding` the sharding of each array, and `array_metadatas/process_N` the
chunks and the generator of PRNG keys. Source: orbax.checkpoint 0.12, `metadata/tree.py`,
`metadata/sharding.py` and `metadata/array_metadata_store.py`.
"""

from __future__ import annotations

import base64
import json
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ckptmgr.arrays.to_host import Plan
from ckptmgr.specs import Keys, LeafSpec, Outline, TreeSpec
from ckptmgr.trees.structure import numpy_dtype

TREE, SHARDINGS, ARRAYS, TEXTS = "_METADATA", "_sharding", "array_metadatas", "_strings.json"
STORES_ZEROS = "store_array_data_equal_to_fill_value"
"""A key of `TREE`. An Orbax that does not write it did not store chunks of zeros."""
_SEQUENCE, _DICT = 1, 2
_VALUE_TYPES = {"jax": "jax.Array", "key": "jax.Array", "numpy": "np.ndarray"}
_EMPTY: dict[str, Outline] = {
    "None": None, "NamedTuple": None, "Dict": {"dict": {}}, "List": {"list": []}, "Tuple": {"tuple": []},
}  # fmt: skip


_files: weakref.WeakKeyDictionary[Plan, Mapping[str, bytes]] = weakref.WeakKeyDictionary()


def files(plan: Plan) -> Mapping[str, bytes]:
    """Orbax's own files about the leaves of an item. They are made once for each plan."""
    if plan not in _files:
        shapes, cuts = [each.shape for each in plan.stored], [each.chunks for each in plan.stored]
        _files[plan] = describe(plan.tree, shapes, cuts, plan.shardings)
    return _files[plan]


def describe(
    tree: TreeSpec,
    shapes: Sequence[tuple[int, ...]],
    chunks: Sequence[tuple[int, ...]],
    shardings: Sequence[Any],
) -> dict[str, bytes]:
    """The files of one item; `shapes`, `chunks` and `shardings` are those of the arrays as stored."""
    on_device = [spec.kind in ("jax", "key") for spec in tree.leaves]
    entries = {
        str(tuple(map(str, spec.keys))): _entry(
            spec.keys, _VALUE_TYPES.get(spec.kind, "scalar"), shape if device else None
        )
        for spec, shape, device in zip(tree.leaves, shapes, on_device, strict=True)
    } | {str(tuple(map(str, keys))): _entry(keys, kind, None) for keys, kind in tree.empty}
    arrays = [
        {"array_metadata": {"param_name": spec.name, "write_shape": shape, "chunk_shape": chunk,
                            "ext_metadata": spec.impl and {"random_key_impl": spec.impl}}}
        for spec, shape, chunk, device in zip(tree.leaves, shapes, chunks, on_device, strict=True)
        if device
    ]  # fmt: skip
    content = {
        TREE: {
            "tree_metadata": entries, "use_ocdbt": True, "use_zarr3": True,
            STORES_ZEROS: True, "custom_metadata": None,
        },
        SHARDINGS: _sharding_texts(tree.leaves, shardings),
        f"{ARRAYS}/process_0": {"array_metadatas": arrays},
    }  # fmt: skip
    if not arrays:  # Orbax takes an empty list of arrays for a damaged file
        del content[f"{ARRAYS}/process_0"]
    return {name: json.dumps(value).encode() for name, value in content.items()}


def _entry(keys: Keys, value_type: str, shape: tuple[int, ...] | None) -> dict[str, Any]:
    value: dict[str, Any] = {"value_type": value_type, "skip_deserialize": value_type in _EMPTY}
    if shape is not None:
        value["write_shape"] = shape
    steps = [{"key": str(key), "key_type": _SEQUENCE if isinstance(key, int) else _DICT} for key in keys]
    return {"key_metadata": steps, "value_metadata": value}


def _sharding_texts(leaves: Iterable[LeafSpec], shardings: Iterable[Any]) -> dict[str, str]:
    """One text for each array on a device; a tree has few distinct shardings and many leaves."""
    texts: dict[Any, str | None] = {}
    found = {}
    for spec, sharding in zip(leaves, shardings, strict=True):
        if sharding not in texts:
            texts[sharding] = _sharding_text(sharding)
        text = texts[sharding]
        if text is not None:
            found[base64.urlsafe_b64encode(spec.name.encode()).decode()] = text
    return found


def _sharding_text(sharding: Any) -> str | None:
    if isinstance(sharding, jax.sharding.NamedSharding):
        if getattr(sharding.spec, "reduced", None):  # of which Orbax knows nothing: it is replicated there
            plain = jax.sharding.PartitionSpec(*sharding.spec.partitions)
            sharding = jax.sharding.NamedSharding(sharding.mesh, plain, memory_kind=sharding.memory_kind)
        form = ocp.metadata.NamedShardingMetadata
    elif isinstance(sharding, jax.sharding.SingleDeviceSharding):
        form = ocp.metadata.SingleDeviceShardingMetadata
    else:
        return None
    return str(form.from_jax_sharding(sharding).to_serialized_string())


# ---------------------------------------------------------------- reading what stock Orbax wrote


Facts = Callable[[str], tuple[tuple[int, ...], str]]
ReadJson = Callable[[str], Mapping[str, Any]]


def read_tree(metadata: Mapping[str, Any], read: ReadJson, facts: Facts) -> TreeSpec:
    """The tree of an item that has no manifest.

    `metadata` is what `_METADATA` holds; `read` gives another JSON file of the item, {} if there is none, and
    `facts` the shape and dtype of a stored array by its name.
    """
    keys, shardings = _random_keys(read), read(SHARDINGS)
    outline = _Below()
    leaves: list[LeafSpec] = []
    for entry in metadata["tree_metadata"].values():
        path: Keys = tuple(
            int(step["key"]) if step["key_type"] == _SEQUENCE else step["key"] for step in entry["key_metadata"]
        )
        kind = entry["value_metadata"]["value_type"]
        node: Outline
        if kind in _EMPTY:
            node = _EMPTY[kind]
        else:
            leaves.append(_stored(path, kind, keys, shardings, facts))
            node = len(leaves) - 1
        _insert(outline, path, node)
    return TreeSpec(tuple(leaves), _outline(outline.get((), outline)))


def _stored(
    path: Keys, kind: str, keys: Mapping[str, str], shardings: Mapping[str, Any], facts: Facts
) -> LeafSpec:
    name = ".".join(map(str, path))
    if kind == "string":
        return LeafSpec(_spelled(path), path, "str", (), "object")
    shape, dtype = facts(name)
    try:
        partition = _partition(shardings.get(base64.urlsafe_b64encode(name.encode()).decode()))
    except (ValueError, TypeError, AttributeError):  # a hint for a layout, no part of the values
        partition = None
    leaf = LeafSpec(_spelled(path), path, "numpy" if kind == "np.ndarray" else "jax", shape, dtype)
    if name in keys:
        return key_leaf(leaf, keys[name])._replace(partition=partition)
    if kind == "scalar":
        return leaf._replace(kind=_number(dtype))
    return leaf._replace(partition=partition)


def _number(dtype: str) -> str:
    """What a stored number is in Python."""
    families = {"bool": np.bool_, "int": np.integer, "float": np.floating}
    return next((name for name, each in families.items() if jnp.issubdtype(numpy_dtype(dtype), each)), "scalar")


def _spelled(path: Keys) -> str:
    return "".join(f"[{key!r}]" for key in path)


def key_leaf(leaf: LeafSpec, impl: str) -> LeafSpec:
    """The typed keys whose words a leaf holds."""
    keys = jax.eval_shape(lambda: jax.random.key(0, impl=impl))
    return leaf._replace(kind="key", shape=leaf.shape[:-1], dtype=str(keys.dtype), impl=impl)


def _random_keys(read: ReadJson) -> dict[str, str]:
    arrays = read(f"{ARRAYS}/process_0").get("array_metadatas", [])
    found = ((a["array_metadata"]["param_name"], a["array_metadata"].get("ext_metadata")) for a in arrays)
    return {name: extra["random_key_impl"] for name, extra in found if extra and "random_key_impl" in extra}


def _partition(text: str | None) -> tuple[Any, ...] | None:
    spec = json.loads(text).get("partition_spec") if text else None
    return None if spec is None else tuple(map(_axes, spec))


def _axes(found: Any) -> Any:
    """One entry of a PartitionSpec; raises TypeError for what is none."""
    names = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{found!r} names no axes of a mesh")
    return tuple(found) if isinstance(found, list) else found


class _Below(dict[Any, Any]):
    """A container of the outline while it is put together; () is the key of a tree that is one leaf."""


def _insert(outline: _Below, path: Keys, node: Outline) -> None:
    for key in path[:-1]:
        outline = outline.setdefault(key, _Below())
    outline[path[-1] if path else ()] = node


def _outline(node: Any) -> Outline:
    """Orbax records no tuples: what has numbered places comes back as a list."""
    if not isinstance(node, _Below):
        return node
    if node and all(isinstance(key, int) for key in node):
        return {"list": [_outline(node[key]) for key in sorted(node)]}
    return {"dict": {key: _outline(child) for key, child in node.items()}}
