"""The schema of a manifest: types and bounds of every field, checked before anything is made of it.

A checksum proves that a manifest is as it was written. It does not prove that a program with the same definition
of a manifest wrote it. A schema is a type, a predicate, or a container of schemas: {"name": schema} (a name that
ends in "?" may be left out), [schema] for a list, {str: schema} for a mapping with any names.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ckptmgr.trees.structure import has_form, numpy_dtype


def check(schema: Any, value: Any, where: str = "it") -> None:
    """Raises ValueError that names the first field that does not match the schema."""
    if isinstance(schema, list):
        _require(isinstance(value, list), where, value)
        for place, each in enumerate(value):
            check(schema[0], each, f"{where}[{place}]")
    elif isinstance(schema, Mapping):
        _require(isinstance(value, dict), where, value)
        _check_fields(schema, value, where)
    elif isinstance(schema, type):
        _require(isinstance(value, schema), where, value)
    else:
        _require(schema(value), where, value)


def checked(schema: Any, value: Any) -> Any:
    """Returns the value if it matches the schema."""
    check(schema, value)
    return value


def _check_fields(schema: Mapping[Any, Any], value: Mapping[str, Any], where: str) -> None:
    if str in schema:
        for name, each in value.items():
            check(schema[str], each, f"{where}[{name!r}]")
        return
    for field, below in schema.items():
        name = field.removesuffix("?")
        if name in value:
            check(below, value[name], f"{where}.{name}")
        elif name == field:
            raise ValueError(f"{where} has no {name}")


def _require(holds: bool, where: str, value: Any) -> None:
    if not holds:
        shown = repr(value)
        raise ValueError(f"{where} cannot be {shown if len(shown) < 100 else f'{shown[:100]}...'}")


# ---------------------------------------------------------------- the fields


def stays_inside(name: Any) -> bool:
    """Whether a name read from disk can be joined to the checkpoint's directory without leaving it."""
    if not isinstance(name, str) or not name or not _is_text(name):
        return False
    return not any(part in ("", ".", "..") or "\\" in part for part in name.split("/"))


_SURROGATE = re.compile("[\ud800-\udfff]")


def _is_text(value: Any) -> bool:
    """Whether it is a str that can be a part of a file's name: no NUL, no half of a surrogate pair."""
    return isinstance(value, str) and "\0" not in value and _SURROGATE.search(value) is None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_time(value: Any) -> bool:
    """Seconds since the epoch that a calendar can show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e11


def _is_date(value: Any) -> bool:
    """Seconds since the epoch that `datetime` can show, as a manager's clock gives them."""
    return _is_time(value) and abs(value) <= 6e10


def _is_metric(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _is_axes(value: Any) -> bool:
    """One entry of a PartitionSpec."""
    names = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(name, str) for name in names)


def _is_chunk(size: Any) -> bool:
    return _is_count(size) and size > 0


@functools.cache
def _is_dtype(name: str) -> bool:
    """Whether it names one kind of numbers; "object" is said of texts."""
    if name.startswith("key<") or name == "object":
        return True
    try:
        found = numpy_dtype(name)
    except (TypeError, ValueError, AttributeError):
        return False
    return has_form(found)


_MOST_PROCESSES = 1 << 20
COUNT: Callable[[Any], bool] = _is_count
_KINDS = frozenset(("jax", "numpy", "key", "scalar", "int", "float", "bool", "complex", "str"))
_ITEMS: Mapping[str, Any] = {
    "json": {"file": stays_inside},
    "bytes": {"file": stays_inside},
    "unread": {"why": str},
    "arrays": {
        "compression": lambda name: name in (None, "zstd"),
        "leaves": [dict],
        "outline": object,
        "zarr3?": bool,
        "ocdbt?": bool,
        "fills?": bool,
    },
}
_MANIFEST = {
    "step": COUNT,
    "time": _is_time,
    "metrics": {str: _is_metric},
    "metadata": dict,
    "versions": {str: str},
    "items": {str: {"kind": lambda kind: isinstance(kind, str) and kind in _ITEMS}},
    "files": {str: list},
    "adopted?": bool,
    "distrusted?": str,
    "reduced?": {"items": [_is_text], "by": str, "time": _is_date},
}


def check_manifest(body: Any) -> None:
    """Raises ValueError that names what no manifest can say."""
    check(_MANIFEST, body)
    for name in (*body["items"], *body["files"], *(item.get("file", "x") for item in body["items"].values())):
        if not stays_inside(name):
            raise ValueError(f"{name!r} would lie outside of the checkpoint")
    for name, item in body["items"].items():
        _check_item(item, f"items[{name!r}]")
    for name, facts in body["files"].items():
        size, crc32 = facts if len(facts) == 2 else (None, None)
        _require(_is_count(size) and (crc32 is None or _is_count(crc32)), f"files[{name!r}]", facts)


def _check_item(item: Mapping[str, Any], where: str) -> None:
    check(_ITEMS[item["kind"]], item, where)
    folder = item.get("folder", "")
    if folder not in ("", ".") and not stays_inside(folder):
        raise ValueError(f"{folder!r} would lie outside of the checkpoint")
    processes = item.get("processes", 1)
    _require(_is_chunk(processes) and processes <= _MOST_PROCESSES, f"{where}.processes", processes)
    if item["kind"] == "arrays":
        _check_leaves(item["leaves"], f"{where}.leaves")
        found: list[int] = []
        _check_outline(item["outline"], found, f"{where}.outline")
        _require(sorted(found) == list(range(len(item["leaves"]))), f"{where}.outline", item["outline"])


_FORM = ("kind", "dtype", "shape", "impl", "weak", "chunks", "partition")


def _check_leaves(leaves: list[dict[str, Any]], where: str) -> None:
    """Few leaves differ in more than their names: each form is looked at once, since there are thousands."""
    forms = {str([leaf.get(field) for field in _FORM]): leaf for leaf in leaves}
    for leaf in forms.values():
        _require(_is_form(leaf), where, leaf)
    for leaf in leaves:
        keys = leaf.get("keys")
        _require(type(leaf.get("path")) is str and type(keys) is list, where, leaf)
    keys = [key for leaf in leaves for key in leaf["keys"]]
    _require({str, int}.issuperset(map(type, keys)), f"the keys of {where}", keys)
    _require(min((key for key in keys if type(key) is int), default=0) >= 0, f"the keys of {where}", keys)
    spelled = "".join([str(key) for key in keys] + [leaf["path"] for leaf in leaves])
    _require(_SURROGATE.search(spelled) is None, f"the keys of {where}", keys)


def _is_form(leaf: Mapping[str, Any]) -> bool:
    """Everything about a leaf but its name; the words of a key are one more axis of its chunks."""
    values: list[Any] = [leaf.get(field) for field in _FORM]
    kind, dtype, shape, impl, weak, chunks, partition = values
    is_key = kind == "key"
    return (
        type(kind) is str
        and kind in _KINDS
        and isinstance(dtype, str)
        and _is_dtype(dtype)
        and is_key == dtype.startswith("key<") == isinstance(impl, str)
        and (kind == "str" or dtype != "object")
        and _is_list_of(_is_count, shape)
        and len(shape) <= 32
        and (kind in ("jax", "numpy", "key") or not shape)
        and math.prod(shape) < 2**60
        and weak in (None, True, False)
        and (chunks is None or (_is_list_of(_is_chunk, chunks) and len(chunks) == len(shape) + is_key))
        and (partition is None or _is_list_of(_is_axes, partition))
    )


def _is_list_of(holds: Callable[[Any], bool], value: Any) -> bool:
    return type(value) is list and all(map(holds, value))


def _check_outline(node: Any, found: list[int], where: str) -> None:
    """Collects the leaves of an outline; raises ValueError for what `structure.rebuild` cannot read."""
    if node is None:
        return
    if _is_count(node):  # a tree that is one leaf
        found.append(node)
        return
    for child in _children(node, where):
        if type(child) is int and child >= 0:
            found.append(child)
        else:
            _check_outline(child, found, where)


def _children(node: Any, where: str) -> list[Any]:
    if isinstance(node, dict):
        if "dict_items" in node:
            check([_is_pair], node["dict_items"], where)
            return [child for _, child in node["dict_items"]]
        for word in ("list", "tuple"):
            if word in node:
                check(list, node[word], where)
                return list(node[word])
        fields = node.get("fields", node.get("dict"))
        if isinstance(fields, dict) and isinstance(node.get("namedtuple", node.get("node", "")), str):
            return list(fields.values())
    raise ValueError(f"{where} holds {str(node)[:100]}, which is no container")


def _is_pair(pair: Any) -> bool:
    """A key that is no str, and what it leads to."""
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str | int | float)
