"""What differs between a checkpoint and a template, leaf by leaf, with both sides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

import jax.numpy as jnp

from ckptmgr.errors import StructureMismatchError
from ckptmgr.specs import LeafDiff, LeafSpec, StructureDiff, TreeSpec
from ckptmgr.trees.structure import collisions, containers, numpy_dtype


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
        lines = [f"{what}, {count}:", str(diff), advice]
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
