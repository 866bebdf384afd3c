"""The structure of a pytree: leaf paths, abstract leaves, containers.

A tree is described by a `TreeSpec`: one `LeafSpec` for each leaf, in JAX's own order, and an
`outline` of the containers as plain JSON, from which `rebuild` makes nested plain containers again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.extend.core.primitives import convert_element_type_p

from ckptmgr.errors import UnsupportedLeafError
from ckptmgr.specs import Keys, LeafSpec, Outline, TreeSpec

_SCALARS: dict[type, str] = {bool: "bool", int: "int", float: "float", complex: "complex"}
_ARRAYS = (jax.Array, jax.ShapeDtypeStruct, np.ndarray)
STORED_ML_TYPES = frozenset({
    "bfloat16", "int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "float8_e3m4",
    "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    "float8_e8m0fnu",
})  # fmt: skip
"""The types of ml_dtypes that have a form on disk. A newer ml_dtypes may bring others, which TensorStore and Orbax
need not know."""
_NUMBERS = "biufc"  # numpy's letters


# ---------------------------------------------------------------- describing a tree


def describe(tree: Any, *, item: str, is_template: bool = False) -> TreeSpec:
    """Describes every leaf and container of `tree`.

    Raises UnsupportedLeafError naming each leaf that cannot be stored, and each pair of leaves that
    Orbax would store under one name. A template may hold `jax.ShapeDtypeStruct` leaves; a tree that
    is to be saved may not.
    """
    walk = _Walk(is_template)
    outline = walk.node(tree, "", ())
    problems = walk.problems + ([] if is_template else collisions(walk.leaves))
    if problems:
        lines = "\n".join(f"  {item}{path}: {reason}" for path, reason in problems)
        what = f"the template of {item} cannot be restored" if is_template else f"{item} cannot be saved"
        raise UnsupportedLeafError(
            f"{what} because of {len(problems)} of its leaves:\n{lines}", leaf=problems[0][0]
        )
    return TreeSpec(tuple(walk.leaves), outline, tuple(walk.empty))


class _Walk:
    """One pass over a tree, container by container: JAX's flatten does not tell their types."""

    def __init__(self, is_template: bool) -> None:
        self.is_template = is_template
        self.leaves: list[LeafSpec] = []
        self.empty: list[tuple[Keys, str]] = []
        self.problems: list[tuple[str, str]] = []

    def node(self, node: Any, path: str, keys: Keys) -> Outline:
        children = None if isinstance(node, _ARRAYS) else _children(node)
        if children is None:
            return self.leaf(node, path, keys)
        if not children:
            self.empty.append((keys, _empty_kind(node)))
        below = [(key, self.node(child, path + spelled, keys + names)) for key, names, spelled, child in children]
        outline = _container(node, below)
        if isinstance(outline, dict) and len(fields := outline.get("fields", below)) < len(below):
            twice = next(key for key in fields if [str(each) for each, _ in below].count(key) > 1)
            self.problems.append((path, f"two of its children have the key {twice!r}; rename one"))
        return outline

    def leaf(self, leaf: Any, path: str, keys: Keys) -> Outline:
        try:
            self.leaves.append(describe_leaf(leaf, path, keys, is_template=self.is_template))
        except _UnsupportedError as problem:
            self.problems.append((path, str(problem)))
        return len(self.leaves) - 1


def _children(node: Any) -> list[tuple[Any, Keys, str, Any]] | None:
    """For each child of a container its key, Orbax's names for it, its path as `keystr` spells it, and the child;
    None for a leaf.

    JAX knows every container, and asking it costs as much as all the rest: most nodes are the plain ones.
    """
    if type(node) is dict and set(map(type, node)) == {str}:
        return [(key, (key,), f"[{key!r}]", node[key]) for key in sorted(node)]
    if type(node) is list or type(node) is tuple:
        return [(n, (n,), f"[{n}]", child) for n, child in enumerate(node)]
    found = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    if len(found) == 1 and not found[0][0]:
        return None
    return [
        (_key(entry), tuple(map(key_name, entry)), jax.tree_util.keystr(entry), child) for entry, child in found
    ]


def _container(node: Any, children: list[tuple[Any, Outline]]) -> Outline:
    kind = type(node)
    values = [child for _, child in children]
    if node is None:
        return None
    if isinstance(node, dict):
        if all(isinstance(key, str) for key, _ in children):
            return {"dict": dict(children)}
        return {"dict_items": [list(child) for child in children]}
    if kind is list or kind is tuple:
        return {kind.__name__: values}
    named = {str(key): child for key, child in children}
    form = "namedtuple" if isinstance(node, tuple) else "node"
    return {form: f"{kind.__module__}.{kind.__qualname__}", "fields": named}


def _empty_kind(node: Any) -> str:
    """Orbax's word for a node without children; it stores an empty NamedTuple as None."""
    for kind, word in ((dict, "Dict"), (list, "List")):
        if isinstance(node, kind):
            return word
    return "Tuple" if type(node) is tuple else "None"


def key_name(entry: Any) -> str | int:
    """Orbax's name for one step of a path."""
    if isinstance(entry, jax.tree_util.SequenceKey):
        return int(entry.idx)
    if isinstance(entry, jax.tree_util.FlattenedIndexKey):
        return int(entry.key)
    if isinstance(entry, jax.tree_util.GetAttrKey):
        return str(entry.name)
    return str(getattr(entry, "key", entry))  # JAX takes any object for a key


def _key(entry: tuple[Any, ...]) -> Any:
    """The key itself where JSON can carry it, so that an int key comes back as an int."""
    key = getattr(entry[0], "key", None) if len(entry) == 1 else None
    return key if isinstance(key, str | int | float) else ".".join(str(key_name(e)) for e in entry)


def collisions(leaves: Iterable[LeafSpec]) -> list[tuple[str, str]]:
    """Path and reason of every leaf that has no name of its own on disk."""
    seen: dict[str, LeafSpec] = {}
    problems = []
    for leaf in leaves:
        if not leaf.name.isprintable() and _is_no_utf8(leaf.name):
            problems.append((leaf.path, "has a name that UTF-8 cannot spell; rename it"))
            continue
        first = seen.setdefault(leaf.name, leaf)
        if first is not leaf:
            problems.append(
                (leaf.path, f"has the name {leaf.name!r} on disk, and so has {first.path}; rename one")
            )
    return problems


def _is_no_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return False


# ---------------------------------------------------------------- describing a leaf


_ENTRIES = (
    "an entry of extras is a pytree of arrays and numbers, JSON, bytes, or has get_state and set_state (of a "
    "numpy Generator pass its bit_generator.state)"
)
_INSTEAD = "save it as an entry of its own in extras, if it is JSON, bytes or an iterator"


class _UnsupportedError(Exception):
    """Why a leaf cannot be stored."""


def describe_leaf(leaf: Any, path: str, keys: Keys, *, is_template: bool = False) -> LeafSpec:
    spec = functools.partial(LeafSpec, path, keys)
    if isinstance(leaf, jax.core.Tracer):
        raise _UnsupportedError("is a tracer: save outside of jax.jit")
    if isinstance(leaf, jax.Array):
        if leaf.is_deleted() and not is_template:
            raise _UnsupportedError("was deleted or donated before save was called")
        facts = _array_facts(leaf)
        impl = _generator(leaf) if facts[0] == "key" else None
        return spec(*facts, is_weak(leaf), partition_of(leaf.sharding), impl)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        if not is_template:
            raise _UnsupportedError("is a ShapeDtypeStruct: it has no values")
        return spec(*_array_facts(leaf), is_weak(leaf))
    if type(leaf) in _SCALARS:
        return spec(_SCALARS[type(leaf)], (), dtype_name(_scalar_dtype(leaf)))
    if is_template and type(leaf) is str:
        return spec("str", (), "object")
    if isinstance(leaf, np.generic):
        return spec("scalar", (), dtype_name(_storable(leaf.dtype)))
    if type(leaf) in (np.ndarray, np.memmap):
        return spec("numpy", leaf.shape, dtype_name(_storable(leaf.dtype)))
    kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}"
    advice = "leave it out" if is_template else _INSTEAD if path else _ENTRIES
    raise _UnsupportedError(f"is a {kind}, not an array or a number; {advice}")


def _array_facts(leaf: Any) -> tuple[str, tuple[int, ...], str]:
    if is_key(leaf):
        return "key", leaf.shape, str(leaf.dtype)
    if _is_of(leaf.dtype, jax.dtypes.extended):
        raise _UnsupportedError(f"has the extended dtype {leaf.dtype}, which has no form on disk")
    if not has_form(leaf.dtype):
        raise _UnsupportedError(f"has the dtype {leaf.dtype}, which has no form on disk")
    return "jax", leaf.shape, dtype_name(leaf.dtype)


def _generator(keys: jax.Array) -> str:
    """The name of the generator of keys, by which any process finds it."""
    impl = jax.random.key_impl(keys)
    if not isinstance(impl, str):
        raise _UnsupportedError("is of a generator that JAX knows by no name: save jax.random.key_data of it")
    return impl


def is_key(leaf: Any) -> bool:
    """Whether a jax array holds typed PRNG keys."""
    return _is_of(leaf.dtype, jax.dtypes.prng_key)


@functools.cache
def _is_of(dtype: Any, family: Any) -> bool:
    return bool(jnp.issubdtype(dtype, family))


@functools.cache
def dtype_name(dtype: Any) -> str:
    """`dtype.name`, which numpy spells anew each time."""
    return str(dtype.name)


@functools.cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of this name, numpy's or one of ml_dtypes."""
    return np.dtype(getattr(ml_dtypes, name, name))


@functools.cache
def has_form(dtype: np.dtype[Any]) -> bool:
    """Whether values of this type can be stored: numbers of numpy, and types of ml_dtypes that are known here."""
    is_numpys = dtype.kind in _NUMBERS and dtype.type.__module__ == "numpy"
    return is_numpys or dtype.name in STORED_ML_TYPES


def is_weak(leaf: Any) -> bool:
    """Whether JAX lets other types win over this array's; keys do not take part."""
    return bool(getattr(leaf, "weak_type", False))


@jax.jit
def weaken(arrays: list[jax.Array]) -> list[jax.Array]:
    """The same arrays with JAX's weak type; `jax.lax.convert_element_type` gives strong types only."""
    return [
        convert_element_type_p.bind(array, new_dtype=array.dtype, weak_type=True, sharding=None)
        for array in arrays
    ]


def _scalar_dtype(value: complex) -> np.dtype[Any]:
    dtype = np.asarray(value).dtype
    if dtype.kind not in "bifc":  # numpy makes object (or uint64) of an int that int64 cannot hold
        raise _UnsupportedError(f"is the int {value}, which does not fit 64 bits")
    return dtype


def _storable(dtype: np.dtype[Any]) -> np.dtype[Any]:
    if not has_form(dtype):
        raise _UnsupportedError(f"has the numpy dtype {dtype}, which has no form on disk")
    if not dtype.isnative:
        raise _UnsupportedError(f"has the byte order of another machine ({dtype.str}); convert it first")
    if dtype.name in ("longdouble", "float128", "clongdouble", "complex256"):
        raise _UnsupportedError(f"has the numpy dtype {dtype}, which differs between machines")
    return dtype


def partition_of(sharding: Any) -> tuple[Any, ...] | None:
    """The PartitionSpec of a NamedSharding as nested tuples; None for any other sharding."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    if getattr(sharding.spec, "unreduced", None):
        raise _UnsupportedError("is a sum that is still to be made (unreduced=): reduce it first")
    return tuple(getattr(sharding.spec, "partitions", sharding.spec))


def abstract(leaf: LeafSpec) -> jax.ShapeDtypeStruct:
    """A leaf without its values, as `jax.eval_shape` gives it."""
    if leaf.kind == "key":
        found: jax.ShapeDtypeStruct = jax.eval_shape(
            lambda: jnp.broadcast_to(jax.random.key(0, impl=leaf.impl), leaf.shape)
        )
        return found
    return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(numpy_dtype(leaf.dtype)))


# ---------------------------------------------------------------- plain containers again


def rebuild(outline: Outline, leaves: Sequence[Any]) -> Any:
    """Nested dicts, lists and tuples of `leaves`: what was a NamedTuple or another node is a dict."""
    if outline is None:
        return None
    if isinstance(outline, int):
        return leaves[outline]
    if "dict_items" in outline:
        return {key: rebuild(child, leaves) for key, child in outline["dict_items"]}
    for word, kind in (("list", list), ("tuple", tuple)):
        if word in outline:
            return kind(rebuild(child, leaves) for child in outline[word])
    fields = outline["fields" if "fields" in outline else "dict"]
    return {key: rebuild(child, leaves) for key, child in fields.items()}


def containers(outline: Outline, path: str = "") -> dict[str, str]:
    """The type of every NamedTuple and custom node by its path; enough to tell two optimizers apart."""
    if not isinstance(outline, dict):
        return {}
    named = outline.get("namedtuple") or outline.get("node")
    found = {path: named} if named else {}
    for step, child in _steps(outline):
        found |= containers(child, path + step)
    return found


def has_names_alone(outline: Outline) -> bool:
    """Whether every key of every dict is a str."""
    if not isinstance(outline, dict):
        return True
    return "dict_items" not in outline and all(has_names_alone(child) for _, child in _steps(outline))


def _steps(outline: Mapping[str, Any]) -> Iterable[tuple[str, Outline]]:
    if "fields" in outline:
        return [(f".{key}", child) for key, child in outline["fields"].items()]
    if "dict" in outline:
        return [(f"[{key!r}]", child) for key, child in outline["dict"].items()]
    if "dict_items" in outline:
        return [(f"[{key!r}]", child) for key, child in outline["dict_items"]]
    children = outline.get("list", outline.get("tuple", []))
    return [(f"[{index}]", child) for index, child in enumerate(children)]
