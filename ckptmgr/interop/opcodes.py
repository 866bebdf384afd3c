"""Runs the opcodes of a pickle, and nothing else.

A pickle is a program for a stack machine. Python's machine calls the names in the pickle, and sets attributes of
the results. This machine only records them: a name becomes a `Name`, a call becomes a `Call`. It makes lists,
dicts and tuples; keys must be safe to hash. The caller of `run` decides what a `Call` means.
https://github.com/python/cpython/blob/main/Lib/pickletools.py describes the opcodes.
"""

from __future__ import annotations

import dataclasses
import pickletools
import sys
from collections.abc import Callable
from typing import Any

_PYTHON_2 = {"copy_reg": "copyreg", "__builtin__": "builtins"}  # protocols 0 to 2 use these names


@dataclasses.dataclass(frozen=True, slots=True)
class Name:
    """A "module.name" in the pickle; `meaning` is what `find` has returned for it."""

    full: str
    meaning: Any


@dataclasses.dataclass(slots=True, eq=False)
class Call:
    """A name called with arguments; `state` and `items` are what the pickle sets on the result."""

    what: Name
    arguments: tuple[Any, ...]
    makes_object: bool = False
    """Whether the name is a class whose object is made without `__init__`."""
    state: Any = None
    items: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)


class OpcodeError(ValueError):
    """The pickle uses something that no tree of arrays needs; `wanted` names it."""

    def __init__(self, wanted: str) -> None:
        super().__init__(wanted)
        self.wanted = wanted


def run(data: bytes, find: Callable[[str, str], Any]) -> Any:
    """Returns what the pickle leaves on its stack. `find` is called with each name, and raises to refuse it."""
    machine = _Machine(find)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name == "STOP":
            return machine.pop()
        if opcode.name in _PUTS and int(argument or 0) > count:  # no pickler does so
            raise ValueError(f"{opcode.name} {argument} after {count} operations")
        if opcode.name not in _DOES:
            raise OpcodeError(_NEVER.get(opcode.name, f"the opcode {opcode.name}"))
        _DOES[opcode.name](machine, argument)
    raise ValueError("it does not end")


class _Machine:
    def __init__(self, find: Callable[[str, str], Any]) -> None:
        self._find = find
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def drop(self) -> None:
        self.stack.pop() if self.stack else self.after_mark()

    def mark(self) -> None:
        self._below.append(self.stack)
        self.stack = []

    def after_mark(self) -> list[Any]:
        """What was pushed since the last mark."""
        found, self.stack = self.stack, self._below.pop()
        return found

    def put(self, place: int | None = None) -> None:
        self._memo[len(self._memo) if place is None else place] = self.stack[-1]

    def get(self, place: int) -> None:
        self.push(self._memo[place])

    def last(self, count: int) -> tuple[Any, ...]:
        found = tuple(self.stack[-count:])
        if len(found) < count:
            raise IndexError("the stack is empty")
        del self.stack[-count:]
        return found

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        module = _PYTHON_2.get(module, module)
        self.push(Name(f"{module}.{name}", self._find(module, name)))

    def call(self, what: Any, arguments: Any, *, makes_object: bool = False) -> None:
        if type(what) is not Name or type(arguments) is not tuple:
            raise ValueError("a call of something that is not a name")
        self.push(Call(what, arguments, makes_object))

    def instance(self, what: str) -> None:
        arguments = tuple(self.after_mark())
        self.name(*what.split(" ", 1))
        self.call(self.pop(), arguments)

    def build(self) -> None:
        state, made = self.pop(), self.stack[-1]
        if type(made) is not Call or made.state is not None:
            raise ValueError("attributes set on something that is not a new object")
        made.state = state

    def append(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("something appended to what is not a list")
        self.stack[-1].extend(values)

    def set_items(self, flat: list[Any]) -> None:
        into, pairs = self.stack[-1], [(key(k), v) for k, v in zip(flat[::2], flat[1::2], strict=True)]
        if type(into) is dict:
            into.update(pairs)
        elif type(into) is Call:
            into.items.extend(pairs)
        else:
            raise ValueError("an item set in something that is not a dict")

    def dict_of(self, flat: list[Any]) -> None:
        self.push({})
        self.set_items(flat)


def key(found: Any) -> Any:
    """A key of a dict, if it is safe to hash.

    Nested tuples overflow the C stack. Ints that differ by a multiple of the modulus all hash alike
    (https://docs.python.org/3/library/stdtypes.html#hashing-of-numeric-types), and make a dict of them slow.
    """
    if found is None or type(found) in (bool, float, str, bytes):
        return found
    if type(found) is int and abs(found) < sys.hash_info.modulus:
        return found
    raise ValueError(f"a dict with a key that is {'too large' if type(found) is int else 'no text or number'}")


_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_NEVER = dict.fromkeys(("PERSID", "BINPERSID", "NEXT_BUFFER"), "an object outside of the file")
_NEVER |= dict.fromkeys(("EXT1", "EXT2", "EXT4"), "a registered extension (copyreg.add_extension)")
_NEVER |= dict.fromkeys(("EMPTY_SET", "FROZENSET", "ADDITEMS"), "a set")
_VALUES = (
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE",
    "BINUNICODE", "BINUNICODE8",
)  # fmt: skip
_DOES: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(_VALUES, lambda m, value: m.push(value)),
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "TUPLE1": lambda m, _: m.push(m.last(1)),
    "TUPLE2": lambda m, _: m.push(m.last(2)),
    "TUPLE3": lambda m, _: m.push(m.last(3)),
    "TUPLE": lambda m, _: m.push(tuple(m.after_mark())),
    "LIST": lambda m, _: m.push(m.after_mark()),
    "DICT": lambda m, _: m.dict_of(m.after_mark()),
    "APPEND": lambda m, _: m.append(list(m.last(1))),
    "APPENDS": lambda m, _: m.append(m.after_mark()),
    "SETITEM": lambda m, _: m.set_items(list(m.last(2))),
    "SETITEMS": lambda m, _: m.set_items(m.after_mark()),
    "MARK": lambda m, _: m.mark(),
    "POP": lambda m, _: m.drop(),
    "POP_MARK": lambda m, _: m.after_mark(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    "PUT": lambda m, place: m.put(place),
    "BINPUT": lambda m, place: m.put(place),
    "LONG_BINPUT": lambda m, place: m.put(place),
    "MEMOIZE": lambda m, _: m.put(),
    "GET": lambda m, place: m.get(place),
    "BINGET": lambda m, place: m.get(place),
    "LONG_BINGET": lambda m, place: m.get(place),
    "GLOBAL": lambda m, what: m.name(*what.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.name(*m.last(2)),
    "REDUCE": lambda m, _: m.call(*m.last(2)),
    "NEWOBJ": lambda m, _: m.call(*m.last(2), makes_object=True),
    "INST": lambda m, what: m.instance(what),
    "OBJ": lambda m, _: (lambda found: m.call(found[0], tuple(found[1:])))(m.after_mark()),
    "BUILD": lambda m, _: m.build(),
}
