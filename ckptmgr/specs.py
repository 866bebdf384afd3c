"""What a tree is, and how two trees differ: plain values that raise nothing and import nothing of ours.

A leaf has two names. `path` is that of `jax.tree_util.keystr`, for people. `keys` are Orbax's names for the parts
of the path. Templates are matched by `keys`, because they are the same for a NamedTuple and for the dict that
stock Orbax returns instead. An int among them is an index in a sequence.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

from ckptmgr import notebook

PyTree: TypeAlias = Any
"""A tree of arrays and numbers in JAX's sense: nested containers of any registered type.
Type checkers cannot tell it from other values; the name is for readers."""

Keys = tuple[str | int, ...]
Outline = Any
"""JSON: a leaf's index, null for None, or an object that names a container and holds its children."""

PYTHON_KINDS = ("bool", "int", "float", "complex", "str")
"""The kinds of leaves that are Python's own values."""


class Optimizer(Protocol):
    """An optax optimizer, of which only `init` is used."""

    @property
    def init(self) -> Callable[[Any], Any]: ...


def fit_line(kind: str, *parts: str) -> str:
    """A repr in one line, cut if it is too long."""
    text = " ".join(f"{kind}({', '.join(parts)})".split())
    return text if len(text) <= _LINE else f"{text[: _LINE - 4]}...)"


_LINE = 115


class LeafSpec(NamedTuple):
    """What one leaf is, without its values. (A tuple: there are thousands, and they must be cheap.)"""

    path: str
    keys: Keys
    kind: str
    """"jax", "numpy", "key" (typed PRNG keys), "scalar" (numpy), or "int", "float", "bool", "complex", "str".

    Only stock Orbax writes a str into a tree; ckptmgr reads it.
    """
    shape: tuple[int, ...]
    dtype: str
    weak: bool = False
    partition: tuple[Any, ...] | None = None
    """The PartitionSpec it was saved under; None for a leaf on one device or on the host."""
    impl: str | None = None
    """The random number generator of typed PRNG keys."""
    chunks: tuple[int, ...] | None = None
    """The chunks it is cut into on disk; None if it is whole."""

    @property
    def name(self) -> str:
        """The name of the array on disk, as Orbax spells it."""
        return ".".join(map(str, self.keys))

    def __str__(self) -> str:
        if self.kind in PYTHON_KINDS:
            return f"Python {self.kind}"
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    def __repr__(self) -> str:
        parts = [f"kind={self.kind!r}"] * (self.kind not in ("jax", *PYTHON_KINDS))
        parts += [f"{name}={given}" for name in _RARE if (given := getattr(self, name))]
        return fit_line("LeafSpec", repr(self.path), str(self), *parts)


_RARE = ("weak", "partition", "impl", "chunks")
"""Fields that the repr of a LeafSpec shows if they say something."""


@dataclasses.dataclass(frozen=True, slots=True)
class TreeSpec:
    """The leaves of a tree in JAX's order, and its containers."""

    leaves: tuple[LeafSpec, ...]
    outline: Outline
    empty: tuple[tuple[Keys, str], ...] = ()
    """The keys of every node that holds nothing (None, (), optax.EmptyState()), and what it is."""

    def by_keys(self) -> dict[Keys, LeafSpec]:
        return {leaf.keys: leaf for leaf in self.leaves}


class Row(NamedTuple):
    """A leaf of a result: `saved` is read, and made what `wants` says; without `saved` it is `given`."""

    saved: LeafSpec | None
    wants: LeafSpec
    given: Any = None


@dataclasses.dataclass(frozen=True)
class LeafDiff:
    """One leaf that differs: what the checkpoint has and what the template has, None for nothing."""

    path: str
    saved: LeafSpec | None
    template: LeafSpec | None
    problem: str
    """"missing" (from the checkpoint), "unexpected" (by the template), "shape", "dtype", "key" or "text" (one side
    has typed PRNG keys or a str, and the other does not: neither is cast), or "value" (the template has an array,
    and the checkpoint a JSON value or bytes)."""

    def __repr__(self) -> str:
        sides = [f"saved={_show(self.saved)}", f"template={_show(self.template)}"]
        return fit_line("LeafDiff", repr(self.path), self.problem, *sides)


@dataclasses.dataclass(frozen=True)
class StructureDiff:
    """Every difference between a checkpoint and a template; falsy when there is none."""

    leaves: tuple[LeafDiff, ...] = ()
    containers: tuple[tuple[str, str, str], ...] = ()
    """Path, type in the checkpoint and type in the template of nodes of different types."""

    def __bool__(self) -> bool:
        return bool(self.leaves)

    def __repr__(self) -> str:
        counts = Counter(leaf.problem for leaf in self.leaves)
        parts = [f"{problem}={count}" for problem, count in counts.items()]
        first = [f"first={self.leaves[0].path}"] if self.leaves else []
        return fit_line("StructureDiff", *parts, *first)

    @notebook.safely
    def _repr_html_(self) -> str:
        leaves = ((each.path, _show(each.saved), _show(each.template), each.problem) for each in self.leaves)
        nodes = self.containers
        return notebook.page(
            f"StructureDiff: {len(self.leaves):,} leaves differ" if self else "StructureDiff: no leaf differs",
            notebook.table(("leaf", "checkpoint", "template", ""), leaves, len(self.leaves), "leaves"),
            notebook.table(("node of another type", "checkpoint", "template"), nodes, len(nodes), "nodes"),
        )

    def of(self, problem: str) -> tuple[LeafDiff, ...]:
        """Leaves with this problem."""
        return tuple(leaf for leaf in self.leaves if leaf.problem == problem)

    @property
    def missing(self) -> tuple[LeafDiff, ...]:
        """Leaves that the checkpoint lacks."""
        return self.of("missing")

    @property
    def unexpected(self) -> tuple[LeafDiff, ...]:
        """Leaves that the template lacks."""
        return self.of("unexpected")

    @property
    def shape(self) -> tuple[LeafDiff, ...]:
        """Leaves of another shape."""
        return self.of("shape")

    @property
    def dtype(self) -> tuple[LeafDiff, ...]:
        """Leaves of another dtype."""
        return self.of("dtype")

    def __add__(self, other: StructureDiff) -> StructureDiff:
        return StructureDiff(self.leaves + other.leaves, self.containers + other.containers)

    def without(self, *problems: str) -> StructureDiff:
        """The same without leaves that have one of these problems."""
        kept = tuple(leaf for leaf in self.leaves if leaf.problem not in problems)
        return StructureDiff(kept, self.containers)

    def only(self, *problems: str) -> StructureDiff:
        """Only the leaves that have one of these problems."""
        return StructureDiff(tuple(leaf for leaf in self.leaves if leaf.problem in problems))

    def __str__(self) -> str:
        rows = [("leaf", "checkpoint", "template", "")]
        rows += [(d.path, _show(d.saved), _show(d.template), _ADVICE[d.problem]) for d in self.leaves[:_SHOWN]]
        rows += [(*container, "node of another type") for container in self.containers[:_SHOWN]]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        if more := max(0, len(self.leaves) - _SHOWN):
            lines.append(f"... and {more} more leaves, all of them in the error's .diff")
        return "\n".join(f"  {line.rstrip()}" for line in lines)


_SHOWN = 40
"""How many leaves a message names: of thousands nobody reads more."""

_ADVICE = {
    "missing": "not in the checkpoint (partial=True keeps the template's own value)",
    "no value": "not in the checkpoint, and the template is abstract: partial=True needs an array to keep",
    "deleted": "not in the checkpoint, and the template's array was deleted or donated: there is no value to keep",
    "unexpected": "not in the template (partial=True ignores it)",
    "shape": "another shape",
    "dtype": "another dtype (cast=True converts)",
    "text": "a str is never cast",
    "value": "the item is no tree of arrays: give a template without arrays, or None, to get its value",
    "key": "PRNG keys are never cast; see jax.random.key_data and jax.random.wrap_key_data",
}


def _show(spec: LeafSpec | None) -> str:
    return "-" if spec is None else str(spec)
