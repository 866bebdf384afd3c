"""What differs between a checkpoint and a template, leaf by leaf, with both sides."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import cast

import jax.numpy as jnp

from ckptmgr.errors import StructureMismatchError
from ckptmgr.trees.structure import LeafSpec, TreeSpec, collisions, containers, numpy_dtype


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


@dataclasses.dataclass(frozen=True)
class StructureDiff:
    """Every difference between a checkpoint and a template; falsy when there is none."""

    leaves: tuple[LeafDiff, ...] = ()
    containers: tuple[tuple[str, str, str], ...] = ()
    """Path, type in the checkpoint and type in the template of nodes of different types."""

    def __bool__(self) -> bool:
        return bool(self.leaves)

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
    "unexpected": "not in the template (partial=True ignores it)",
    "shape": "another shape",
    "dtype": "another dtype (cast=True converts)",
    "text": "a str is never cast",
    "value": "the item is no tree of arrays: give a template without arrays, or None, to get its value",
    "key": "PRNG keys are never cast; see jax.random.key_data and jax.random.wrap_key_data",
}


def _show(spec: LeafSpec | None) -> str:
    return "-" if spec is None else str(spec)


def compare(saved: TreeSpec, template: TreeSpec, item: str) -> StructureDiff:
    """Every leaf that differs between a saved item and its template, by path."""
    there, wanted = saved.by_keys(), template.by_keys()
    leaves = []
    for keys in dict.fromkeys([*wanted, *there]):
        has, wants = there.get(keys), wanted.get(keys)
        problem = _problem(has, wants)
        if problem:
            path = cast(LeafSpec, wants or has).path
            leaves.append(LeafDiff(f"{item}{path}", has, wants, problem))
    return StructureDiff(tuple(leaves), _other_containers(saved, template, item) if leaves else ())


def _other_containers(saved: TreeSpec, template: TreeSpec, item: str) -> tuple[tuple[str, str, str], ...]:
    there, wanted = containers(saved.outline), containers(template.outline)
    return tuple(
        (f"{item}{path}", there[path].rpartition(".")[2], wanted[path].rpartition(".")[2])
        for path in wanted
        if path in there and there[path] != wanted[path]
    )


def _problem(saved: LeafSpec | None, template: LeafSpec | None) -> str | None:
    if saved is None:
        return "missing"
    if template is None:
        return "unexpected"
    if "key" in (saved.kind, template.kind) and saved.dtype != template.dtype:
        return "key"
    if saved.shape != template.shape:
        return "shape"
    if "str" in (saved.kind, template.kind) and saved.kind != template.kind:
        return "text"
    return None if same_values(saved, template) else "dtype"


_FAMILIES = {"int": jnp.integer, "float": jnp.floating, "bool": jnp.bool_, "complex": jnp.complexfloating}


def same_values(saved: LeafSpec, template: LeafSpec) -> bool:
    """Whether the saved values fit the template's leaf without a conversion that could change them."""
    if saved.dtype == template.dtype:
        return True
    if saved.kind != "key" and template.kind in _FAMILIES:  # a Python number holds any of its kind
        return bool(jnp.issubdtype(numpy_dtype(saved.dtype), _FAMILIES[template.kind]))
    return False


def raise_if_different(diff: StructureDiff, what: str, advice: str = "") -> None:
    if diff:
        count = f"{len(diff.leaves)} {'leaf differs' if len(diff.leaves) == 1 else 'leaves differ'}"
        lines = [f"the checkpoint does not fit the template of {what}, {count}:", str(diff), advice]
        raise StructureMismatchError("\n".join(filter(None, lines)), diff=diff)


def rename_rules(rename: Mapping[str, str]) -> dict[re.Pattern[str], str]:
    """The rules of `rename`, compiled; raises ValueError for what is no regular expression."""
    try:
        return {re.compile(old): new for old, new in rename.items()}
    except re.error as problem:
        raise ValueError(f"rename: {problem.pattern!r} is no regular expression: {problem}") from None


def _substituted(old: re.Pattern[str], new: str, path: str) -> tuple[str, int]:
    try:
        return old.subn(new, path)
    except (re.error, IndexError) as problem:  # a group that `old` does not have
        raise ValueError(f"rename: {new!r} cannot replace {old.pattern!r}: {problem}") from None


def renamed(
    saved: TreeSpec, rules: Mapping[re.Pattern[str], str], template: TreeSpec, used: set[re.Pattern[str]]
) -> TreeSpec:
    """`saved` with the leaves whose path matches a rule under their new path. Adds these rules to `used`."""
    if not rules:
        return saved
    by_path = {leaf.path: leaf.keys for leaf in template.leaves}

    def apply(leaf: LeafSpec) -> LeafSpec:
        path = leaf.path
        for old, new in rules.items():
            path, count = _substituted(old, new, path)
            if count:
                used.add(old)
        keys = leaf.keys if path == leaf.path else by_path.get(path, (path,))
        return leaf._replace(path=path, keys=keys)

    leaves = tuple(map(apply, saved.leaves))
    names = collisions(leaves)
    if names:
        raise ValueError(f"rename gives two leaves the path {names[0][0]}")
    return TreeSpec(leaves, saved.outline, saved.empty)
