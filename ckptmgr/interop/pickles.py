"""Pickles of params and optimizer states, read without running anything of theirs.

A pickle is a program: it names functions, and pickle calls them. Here every name it may use stands for a
plain holder of our own (arrays, dtypes, containers), which only keeps what it is given; the tree is made from
the holders afterwards, with every value checked. Any other name is refused before it is looked up.
"""

from __future__ import annotations

import collections
import importlib
import io
import math
import os
import pickle
import pickletools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ckptmgr.errors import UnsafePickleError

_ML_TYPES = {name for name in dir(ml_dtypes) if isinstance(getattr(ml_dtypes, name), type)}
_ML_DTYPES = frozenset(_ML_TYPES - {"finfo", "iinfo"})
_PYTHON_2 = {"copy_reg": "copyreg", "__builtin__": "builtins"}  # protocols 0 to 2 have its names
_MEMO_OPS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})


def load(path: str | os.PathLike[str], *, allow: Iterable[str] = ()) -> Any:
    """Reads a pickle of arrays, numbers and containers, and runs nothing that it asks for.

    Args:
      path: the file.
      allow: names ("module.name") that it may use beside; what they name is called as the pickle wants.

    Raises UnsafePickleError that names what the pickle wanted, or says that the file is damaged.
    """
    with open(path, "rb") as file:
        data = file.read()
    return loads(data, allow=allow)


def loads(data: bytes, *, allow: Iterable[str] = ()) -> Any:
    """The same from bytes."""
    try:
        _check_sizes(data)
        reader = _Reader(data, {name: _allowed(name) for name in allow})
        return _real(reader.load(), {})
    except UnsafePickleError:
        raise
    except ImportError:
        raise
    except Exception as problem:  # a damaged pickle may raise anything
        raise UnsafePickleError(f"this is no whole pickle of arrays: {problem!r}", name="") from problem


def _allowed(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _check_sizes(data: bytes) -> None:
    """Refuses places in pickle's memo that no pickler would use: the table would fill the memory."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name in _MEMO_OPS and int(argument or 0) > count:
            raise ValueError(f"{opcode.name} {argument} after {count} operations")


def _refuse(name: str) -> UnsafePickleError:
    return UnsafePickleError(
        f"the pickle wants {name}, which is not among what is known to be harmless; nothing of it was run. If you "
        f"trust the file, allow it by name: allow=[{name!r}] (ckptmgr import --allow {name})",
        name=name,
    )


class _Reader(pickle.Unpickler):
    """Knows names alone, and looks none of them up."""

    def __init__(self, data: bytes, allowed: Mapping[str, Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        module = _PYTHON_2.get(module, module)
        full = f"{module}.{name}"
        if full in self._allowed:
            return self._allowed[full]
        if full in _HOLDERS:
            return _HOLDERS[full]()
        if module == "ml_dtypes" and name in _ML_DTYPES:
            return _Name(name)
        if module.partition(".")[0] == "optax":
            return _optax_state(module, name) or self._refused(full)
        return self._refused(full)

    def _refused(self, name: str) -> Any:
        raise _refuse(name)

    def persistent_load(self, pid: Any) -> Any:
        raise _refuse("an object outside of the file")


def _optax_state(module: str, name: str) -> Any:
    """A holder for a NamedTuple that optax defines; None for anything else of optax."""
    importlib.import_module("optax")
    found = getattr(sys.modules.get(module), name, None) if name.isidentifier() else None
    if not isinstance(found, type) or not issubclass(found, tuple) or not hasattr(found, "_fields"):
        return None
    return _named_tuple(found) if found.__module__.partition(".")[0] == "optax" else None


# ---------------------------------------------------------------- holders: they keep what they are given


class _Name(str):
    """The name of a type that is an argument."""


class _Dtype:
    def __init__(self, what: Any, *_: Any) -> None:
        if not isinstance(what, str):
            raise ValueError(f"a dtype of {what!r}")
        self.dtype = np.dtype(getattr(ml_dtypes, what) if isinstance(what, _Name) else what)
        if self.dtype.hasobject or self.dtype.kind not in "biufcVSU" or self.dtype.names:
            raise ValueError(f"arrays of {self.dtype} are no numbers")

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """A numpy array, or a jax one."""

    def __init__(self, *_: Any) -> None:
        self.values: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.values = _view(raw, dtype, shape, "F" if is_fortran else "C")


class _JaxArray:
    def __init__(self, make: Any, arguments: Any, state: Any, aval: Any) -> None:
        self.array = _Array()
        self.array.__setstate__(state)
        self.is_weak = bool(isinstance(aval, dict) and aval.get("weak_type"))


def _view(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes | bytearray):
        raise ValueError("an array without its dtype or bytes")
    flat = np.frombuffer(raw, np.uint8)
    if any(not isinstance(size, int) or size < 0 for size in shape) or order not in ("C", "F"):
        raise ValueError(f"an array of shape {shape!r}")
    if flat.size != math.prod(shape) * dtype.dtype.itemsize:
        raise ValueError(f"{flat.size} bytes for an array of shape {shape}")
    return flat.view(dtype.dtype).reshape(shape, order=order).copy(order=order)


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    found = _Array()
    found.values = _view(raw, dtype, shape, order)
    return found


class _Scalar:
    def __init__(self, dtype: Any, raw: Any) -> None:
        self.value = _view(raw, dtype, (), "C")[()]


def _to_bytes(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise ValueError(f"bytes in {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


class _Holder(tuple):  # type: ignore[type-arg]
    """A NamedTuple to be; a class of its own for each use, so that nothing a pickle does to it lasts."""

    __slots__ = ()
    kind: type = tuple


def _named_tuple(kind: type) -> type:
    made = type("_Held", (_Holder,), {"__slots__": (), "kind": kind})
    made.__new__ = lambda cls, *fields: tuple.__new__(cls, fields)  # type: ignore[method-assign,assignment]
    return made


class _Frozen:
    def __init__(self, content: Any) -> None:
        self.content = content


class _Joint:
    """`JoinPoint` of jax.example_libraries: the subtree of one parameter."""

    def __setstate__(self, state: Any) -> None:
        self.subtree = state["subtree"]


class _TreeDef:
    def __setstate__(self, state: Any) -> None:
        self.nodes = state[1]


def _reconstructor(kind: Any, base: Any, state: Any) -> Any:
    """What pickles of protocol 0 and 1 make objects with."""
    if isinstance(kind, type) and issubclass(kind, _Holder):
        return kind(*state)
    if kind is _Joint:
        return _Joint()
    raise ValueError("an object of no known kind")


def _example_state() -> type:
    from jax.example_libraries import optimizers

    return _named_tuple(optimizers.OptimizerState)


_HOLDERS: Mapping[str, Callable[[], Any]] = {
    "jax._src.array._reconstruct_array": lambda: _JaxArray,
    "numpy.ndarray": lambda: _Name("ndarray"),
    "numpy.dtype": lambda: _Dtype,
    "numpy._core.multiarray._reconstruct": lambda: _Array,
    "numpy.core.multiarray._reconstruct": lambda: _Array,
    "numpy._core.multiarray.scalar": lambda: _Scalar,
    "numpy.core.multiarray.scalar": lambda: _Scalar,
    "numpy._core.numeric._frombuffer": lambda: _from_buffer,
    "numpy.core.numeric._frombuffer": lambda: _from_buffer,
    "_codecs.encode": lambda: _to_bytes,
    "builtins.bytes": lambda: _no_bytes,
    "builtins.complex": lambda: complex,
    "builtins.tuple": lambda: _Name("tuple"),
    "builtins.object": lambda: _Name("object"),
    "copyreg._reconstructor": lambda: _reconstructor,
    "collections.OrderedDict": lambda: collections.OrderedDict,
    "flax.core.frozen_dict.FrozenDict": lambda: _Frozen,
    "jax.example_libraries.optimizers.OptimizerState": _example_state,
    "jax.example_libraries.optimizers.JoinPoint": lambda: _Joint,
    "jaxlib._jax.pytree.PyTreeDef": lambda: _TreeDef,
    "jaxlib.pytree.PyTreeDef": lambda: _TreeDef,
    "jax._src.tree_util.default_registry": lambda: _Name("default_registry"),
}


# ---------------------------------------------------------------- from holders to the tree


def _real(node: Any, known: dict[int, tuple[Any, Any]]) -> Any:
    """What a holder stands for; what is shared in the pickle is made once."""
    if id(node) not in known:
        known[id(node)] = (node, _make(node, known))  # the node too, lest its id go to another
    return known[id(node)][1]


def _make(node: Any, known: dict[int, tuple[Any, Any]]) -> Any:
    if node is None or type(node) in (bool, int, float, complex, str, bytes):
        return node
    if type(node) in (dict, collections.OrderedDict):
        return type(node)((_key(key), _real(value, known)) for key, value in node.items())
    if type(node) in (list, tuple):
        return type(node)(_real(each, known) for each in node)
    if isinstance(node, _Holder):
        return type(node).kind(*(_real(each, known) for each in node))
    if isinstance(node, _TreeDef):
        return _treedef(node.nodes)
    return _value(node, known)


def _value(node: Any, known: dict[int, tuple[Any, Any]]) -> Any:
    if isinstance(node, _Array) and node.values is not None:
        return node.values
    if isinstance(node, _JaxArray):
        return _on_device(node)
    if isinstance(node, _Scalar):
        return node.value
    if isinstance(node, _Joint):
        from jax.example_libraries import optimizers

        return optimizers.JoinPoint(_real(node.subtree, known))
    if isinstance(node, _Frozen):
        from flax.core import FrozenDict

        return FrozenDict(_real(node.content, known))  # type: ignore[no-untyped-call]
    if isinstance(node, jax.Array | np.ndarray | np.generic):
        return node  # of a name that the caller allowed
    raise ValueError(f"{type(node).__name__} is no array, number or container")


def _on_device(node: _JaxArray) -> jax.Array:
    values = node.array.values
    assert values is not None
    if values.dtype.kind in "VSU" and values.dtype.name not in _ML_DTYPES:
        raise ValueError(f"a jax array of {values.dtype}")
    if jax.dtypes.canonicalize_dtype(values.dtype) != values.dtype:
        raise ValueError(f"an array of {values.dtype}, which takes JAX_ENABLE_X64=1")
    if node.is_weak and values.ndim == 0:
        return jnp.asarray(values.item())
    return jnp.asarray(values)


def _key(key: Any) -> Any:
    if key is None or type(key) in (bool, int, float, str, bytes):
        return key
    raise ValueError(f"a dict with the key {key!r}")


_LEAF, _NONE, _TUPLE, _NAMED, _LIST, _DICT = range(6)
_PLAIN: Mapping[int, Callable[[list[Any]], Any]] = {
    _LEAF: lambda _: 0, _NONE: lambda _: None, _TUPLE: tuple, _LIST: list,
}  # fmt: skip


def _treedef(nodes: Any) -> Any:
    """A PyTreeDef of plain containers, of its nodes in the order in which JAX has them: children first."""
    stack: list[Any] = []
    for kind, arity, data, *_ in nodes:
        children = [stack.pop() for _ in range(arity)][::-1]
        if kind == _DICT:
            stack.append(dict(zip(map(_key, data), children, strict=True)))
        elif kind == _NAMED and isinstance(data, type) and issubclass(data, _Holder):
            stack.append(data.kind(*children))
        else:
            stack.append(_PLAIN[kind](children))
    (tree,) = stack
    return jax.tree_util.tree_structure(tree)
