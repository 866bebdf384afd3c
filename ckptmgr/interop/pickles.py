"""Reads pickles of params and optimizer states without running their code.

A pickle is a program: it names functions, and Python's pickle calls them. Here `opcodes` only records the calls.
Each name must be one that arrays and optimizer states need; any other name is refused before it is looked up. Then
our own functions, one for each name, make the tree and check every value. Nothing that a pickle does lasts longer
than the reading of it. The names are in `MAKES` and `_known`; those of another optimizer library are added there.
"""

from __future__ import annotations

import collections
import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ckptmgr.errors import UnsafePickleError
from ckptmgr.interop import opcodes
from ckptmgr.interop.names import DEEPEST
from ckptmgr.interop.opcodes import Call, Name
from ckptmgr.trees import structure

_ML_TYPES = {name for name in dir(ml_dtypes) if isinstance(getattr(ml_dtypes, name), type)}
_ML_DTYPES = frozenset(_ML_TYPES - {"finfo", "iinfo"})
_DTYPE = re.compile(r"[<>=|]?[A-Za-z?][A-Za-z0-9_]{0,31}")
_LARGEST = 16
"""A tree may be so many times larger than its file: an array that is used twice is in the file once."""


def load(path: str | os.PathLike[str], *, allow: Iterable[str] = ()) -> Any:
    """Reads a pickle of arrays, numbers and containers; runs no code of the pickle.

    Args:
      path: the file.
      allow: names ("module.name") that it may use in addition. These are called as the pickle says.

    Raises UnsafePickleError with the name that the pickle uses, or if the file is damaged.
    """
    with open(path, "rb") as file:
        data = file.read()
    return loads(data, allow=allow)


def loads(data: bytes, *, allow: Iterable[str] = ()) -> Any:
    """Reads a pickle from bytes, as `load` does."""
    allowed = {name: _allowed(name) for name in allow}

    def find(module: str, name: str) -> Any:
        full = f"{module}.{name}"
        return allowed[full] if full in allowed else _known(module, name)

    try:
        return _Maker(frozenset(allowed), _LARGEST * len(data)).real(opcodes.run(data, find))
    except (UnsafePickleError, ImportError):
        raise
    except opcodes.OpcodeError as problem:
        what = f"the pickle uses {problem.wanted}, which no tree of arrays needs; no code was run"
        raise UnsafePickleError(what, name=problem.wanted) from problem
    except Exception as problem:  # a damaged pickle may raise anything
        why = f"{type(problem).__name__}: {str(problem)[:200]}"
        raise UnsafePickleError(f"the file is not a whole pickle of arrays: {why}", name="") from problem


def _allowed(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(f"allow takes names as module.name, not {name!r}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError:
        raise ValueError(f"allow: the module {module} has no {attribute!r}") from None


def _refuse(name: str) -> UnsafePickleError:
    shown = name if len(name) <= 200 else f"{name[:200]}..."
    return UnsafePickleError(
        f"the pickle uses {shown}, which is not known to be harmless; no code was run. If you trust the file,"
        f" allow that name: --allow {shown} in `ckptmgr import`, or the argument `allow` in Python",
        name=name,
    )


def _known(module: str, name: str) -> Any:
    """The meaning of a name: a NamedTuple class, a type of ml_dtypes, or None for the names in `MAKES`."""
    full = f"{module}.{name}"
    if full == "jax.example_libraries.optimizers.OptimizerState":
        return _example_optimizers().OptimizerState
    if full in MAKES or full in ARGUMENTS:
        return None
    if module == "ml_dtypes" and name in _ML_DTYPES:
        return getattr(ml_dtypes, name)
    found = _optax_state(module, name) if module.partition(".")[0] == "optax" else None
    if found is None:
        raise _refuse(full)
    return found


def _example_optimizers() -> Any:
    from jax.example_libraries import optimizers

    return optimizers


def _optax_state(module: str, name: str) -> Any:
    """A NamedTuple that optax defines; None for anything else of optax."""
    importlib.import_module("optax")
    found = getattr(sys.modules.get(module), name, None) if name.isidentifier() else None
    if not isinstance(found, type) or not issubclass(found, tuple) or not hasattr(found, "_fields"):
        return None
    return found if found.__module__.partition(".")[0] == "optax" else None


# ---------------------------------------------------------------- from the recorded calls to the tree


class _Maker:
    """Makes the tree of one pickle; a shared object is made once.

    `most` bounds the size of the tree in bytes and nodes, with shared objects counted each time: a few bytes of
    nested lists that share their items could otherwise fill any memory.
    """

    def __init__(self, allowed: frozenset[str], most: int) -> None:
        self._allowed = allowed
        self._most = most + 1000
        self._spent = self._depth = 0
        self._made: dict[int, tuple[Any, Any, int]] = {}

    def spend(self, amount: int) -> None:
        self._spent += amount
        if self._spent > self._most:
            raise ValueError(f"its tree would be more than {_LARGEST} times as large as the file")

    def real(self, node: Any) -> Any:
        """The value that a node of the pickle means."""
        if id(node) in self._made:
            _, value, amount = self._made[id(node)]
            self.spend(amount)
            return value
        if self._depth >= DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        before = self._spent
        self._depth += 1
        self.spend(1)
        value = self._make(node)
        self._depth -= 1
        self._made[id(node)] = (node, value, self._spent - before)  # the node keeps its id in use
        return value

    def _make(self, node: Any) -> Any:
        if node is None or type(node) in (bool, int, float, complex):
            return node
        if type(node) in (str, bytes):
            self.spend(len(node))
            return node
        if type(node) is dict:
            return {key: self.real(value) for key, value in node.items()}
        if type(node) in (list, tuple):
            return type(node)([self.real(each) for each in node])
        if type(node) is Call:
            return self._call(node)
        raise ValueError(f"a {node.full if type(node) is Name else type(node).__name__} is no array or number")

    def _call(self, call: Call) -> Any:
        full, meaning = call.what.full, call.what.meaning
        if full in self._allowed:
            return self._as_the_caller_allows(call)
        if _is_named_tuple(meaning):
            return meaning(*map(self.real, call.arguments))
        if full not in MAKES:
            raise ValueError(f"{full} is called")
        return MAKES[full](self, call)

    def _as_the_caller_allows(self, call: Call) -> Any:
        """Does what Python's pickle would do."""
        kind, arguments = call.what.meaning, [self.real(each) for each in call.arguments]
        made = kind.__new__(kind, *arguments) if call.makes_object else kind(*arguments)
        state = self.real(call.state)
        if hasattr(made, "__setstate__") and state is not None:
            made.__setstate__(state)
        elif state is not None:
            vars(made).update(state)
        for key, value in call.items:
            made[key] = self.real(value)
        return made

    def array(self, raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
        """An array of its bytes; the order is "C" or "F", or whether it is that of Fortran."""
        data, kind = self.raw(raw), _dtype(dtype)
        order = {False: "C", True: "F"}[order] if type(order) is bool else order
        if type(order) is not str or order not in ("C", "F"):
            raise ValueError("an array of no known order")
        if type(shape) is not tuple or any(type(size) is not int or not 0 <= size < 2**63 for size in shape):
            raise ValueError("an array of no shape")
        if len(data) != math.prod(shape[:64]) * kind.itemsize:
            raise ValueError(f"{len(data)} bytes for an array of shape {shape[:64]} and {kind}")
        self.spend(len(data))
        return np.frombuffer(data, np.uint8).view(kind).reshape(shape, order=order).copy(order=order)  # type: ignore[call-overload,no-any-return]

    def raw(self, node: Any) -> bytes | bytearray:
        """Bytes; the oldest protocols have them as text."""
        if type(node) in (bytes, bytearray):
            return node  # type: ignore[no-any-return]
        if type(node) is Call and node.what.full in ("_codecs.encode", "builtins.bytes"):
            return _bytes(self, node)
        raise ValueError("an array without its bytes")


def _is_named_tuple(meaning: Any) -> bool:
    return isinstance(meaning, type) and issubclass(meaning, tuple)


def _dtype(node: Any) -> np.dtype[Any]:
    if type(node) is not Call or node.what.full != "numpy.dtype":
        raise ValueError("an array without its dtype")
    what = node.arguments[0]
    if type(what) is Name and what.full.startswith("ml_dtypes."):
        return structure.numpy_dtype(what.full.removeprefix("ml_dtypes."))
    if type(what) is not str or not _DTYPE.fullmatch(what):
        raise ValueError("a dtype without its name")
    found: np.dtype[Any] = np.dtype(what)
    if found.hasobject or found.kind not in "biufcVSU" or found.names:
        raise ValueError(f"arrays of {found} are no numbers")
    order = "=" if node.state is None else node.state[1]
    if type(order) is not str or order not in "<>=|":
        raise ValueError("a dtype of no known byte order")
    return found.newbyteorder(">") if order == ">" else found


def _bytes(make: _Maker, call: Call) -> bytes:
    if call.what.full == "builtins.bytes" and not call.arguments:
        return b""
    text, encoding = call.arguments
    if type(encoding) is not str or encoding != "latin1" or type(text) is not str:
        raise ValueError("bytes in another encoding than latin1")
    make.spend(len(text))
    return text.encode("latin1")


def _numpy(make: _Maker, call: Call) -> np.ndarray[Any, Any]:
    _, shape, dtype, is_fortran, raw = call.state
    return make.array(raw, dtype, shape, is_fortran)


def _from_buffer(make: _Maker, call: Call) -> np.ndarray[Any, Any]:
    raw, dtype, shape, order, *axes = call.arguments
    if order != "K":
        return make.array(raw, dtype, shape, order)
    (moved,) = axes  # the bytes are in the order of the shape, and the axes were moved
    if type(moved) is not tuple or sorted(moved) != list(range(len(shape))):
        raise ValueError("an array with axes in no known order")
    return make.array(raw, dtype, shape, "C").transpose(moved)


def _scalar(make: _Maker, call: Call) -> Any:
    dtype, raw = call.arguments
    return make.array(raw, dtype, (), "C")[()]


def _jax(make: _Maker, call: Call) -> jax.Array:
    _, _, (_, shape, dtype, is_fortran, raw), aval = call.arguments
    values = make.array(raw, dtype, shape, is_fortran)
    if values.dtype.kind in "VSU" and values.dtype.name not in _ML_DTYPES:
        raise ValueError(f"a jax array of {values.dtype}")
    if jax.dtypes.canonicalize_dtype(values.dtype) != values.dtype:
        raise ValueError(f"an array of {values.dtype}, which takes JAX_ENABLE_X64=1")
    is_weak = type(aval) is dict and aval.get("weak_type") is True
    return structure.weaken([jnp.asarray(values)])[0] if is_weak else jnp.asarray(values)


def _complex(make: _Maker, call: Call) -> complex:
    real, imaginary = call.arguments
    if type(real) is not float or type(imaginary) is not float:
        raise ValueError("a complex number of something that is not a float")
    return complex(real, imaginary)


def _ordered(make: _Maker, call: Call) -> Any:
    pairs = [(opcodes.key(key), value) for given in call.arguments for key, value in given]
    return collections.OrderedDict((key, make.real(value)) for key, value in [*pairs, *call.items])


def _frozen(make: _Maker, call: Call) -> Any:
    (content,) = call.arguments
    return _frozen_dict(make.real(content))


def _frozen_dict(content: Any) -> Any:
    from flax.core import FrozenDict

    return FrozenDict(content)  # type: ignore[no-untyped-call]


def _join_point(make: _Maker, call: Call) -> Any:
    """`JoinPoint` of jax.example_libraries: the subtree of one parameter."""
    return _example_optimizers().JoinPoint(make.real(call.state["subtree"]))


def _object(make: _Maker, call: Call) -> Any:
    """What pickles of protocol 0 and 1 make objects with."""
    kind, _, fields = call.arguments
    if type(kind) is Name and _is_named_tuple(kind.meaning):
        return kind.meaning(*make.real(fields))
    if type(kind) is Name and kind.full == _JOIN_POINT:
        return _join_point(make, call)
    raise ValueError("an object of no known kind")


_LEAF, _NONE, _TUPLE, _NAMED, _LIST, _DICT, _CUSTOM = range(7)
_PLAIN: Mapping[int, Callable[[list[Any]], Any]] = {
    _LEAF: lambda _: 0, _NONE: lambda _: None, _TUPLE: tuple, _LIST: list,
}  # fmt: skip


_CONTAINERS: Mapping[str, Callable[[Any], Any]] = {
    "collections.OrderedDict": collections.OrderedDict, "flax.core.frozen_dict.FrozenDict": _frozen_dict,
}  # fmt: skip


def _treedef(make: _Maker, call: Call) -> Any:
    """A PyTreeDef of plain containers, of its nodes in the order in which JAX has them: children first."""
    stack: list[tuple[Any, int]] = []
    for kind, arity, data, custom, *_ in call.state[1]:
        make.spend(1)
        if type(kind) is not int or type(arity) is not int:
            raise ValueError("a tree definition of no known kind")
        below = [stack.pop() for _ in range(arity)][::-1]
        depth = 1 + max((depth for _, depth in below), default=0)
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        stack.append((_node(kind, [child for child, _ in below], data, custom), depth))
    ((tree, _),) = stack
    return jax.tree_util.tree_structure(tree)


def _node(kind: int, children: list[Any], data: Any, custom: Any) -> Any:
    if kind == _DICT:
        return dict(zip(map(opcodes.key, data), children, strict=True))
    if kind == _NAMED and type(data) is Name and _is_named_tuple(data.meaning):
        return data.meaning(*children)
    if kind == _CUSTOM and type(custom) is Name and (make := _CONTAINERS.get(custom.full)):
        return make(zip(map(opcodes.key, data), children, strict=True))
    if kind in _PLAIN:
        return _PLAIN[kind](children)
    raise ValueError(f"a tree definition with a node of {getattr(custom, 'full', 'no known kind')}")


_JOIN_POINT = "jax.example_libraries.optimizers.JoinPoint"
MAKES: Mapping[str, Callable[[_Maker, Call], Any]] = {
    "jax._src.array._reconstruct_array": _jax,
    "numpy._core.multiarray._reconstruct": _numpy,
    "numpy.core.multiarray._reconstruct": _numpy,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _from_buffer,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "_codecs.encode": _bytes,
    "builtins.bytes": _bytes,
    "builtins.complex": _complex,
    "copyreg._reconstructor": _object,
    "collections.OrderedDict": _ordered,
    "flax.core.frozen_dict.FrozenDict": _frozen,
    _JOIN_POINT: _join_point,
    "jaxlib._jax.pytree.PyTreeDef": _treedef,
    "jaxlib.pytree.PyTreeDef": _treedef,
}
"""The names that a pickle may call, and what is made then."""
ARGUMENTS = frozenset(
    {"numpy.dtype", "numpy.ndarray", "builtins.tuple", "builtins.object", "jax._src.tree_util.default_registry"}
)
"""Names that only say of what kind another thing is."""
