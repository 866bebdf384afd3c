"""Manifests that have been read, each while its step is the one that it was read from."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from ckptmgr.format.manifest import Item, KnownItems, Manifest
from ckptmgr.specs import TreeSpec

Stamp = tuple[int, ...] | None
"""What tells one save of a step from another of the same number; None where that is not known."""


class ManifestCache:
    """The steps of a run mostly have one structure: its description, which is large, is held once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Stamp, Manifest]] = {}
        self.items = KnownItems()
        """Those of the manifest that was read last."""

    def get(self, step: int, stamp: Stamp) -> Manifest | None:
        found = self._known.get(step)
        return found[1] if found is not None and found[0] == stamp else None

    def put(self, step: int, stamp: Stamp, read: Manifest, text: bytes = b"") -> Manifest:
        """Remembers a manifest; also gives it, with the structures of the one before where they are equal.

        `text` is what its file says of its items.
        """
        known = self.items.items
        items = {name: _shared(item, known.get(name)) for name, item in read.items.items()}
        read = dataclasses.replace(read, items=items)
        self.items = KnownItems(text, items)
        self._known[step] = stamp, read
        return read

    def drop(self, step: int) -> None:
        self._known.pop(step, None)

    def keep_only(self, steps: Collection[int]) -> None:
        """Drops what other processes have deleted."""
        for gone in self._known.keys() - set(steps):
            self.drop(gone)


def _shared(item: Item, known: Item | None) -> Item:
    """A known item if it says the same, or the item with its tree. (To `==`, a key 1 is a key True.)"""
    if known is None or not _is_same(item.tree, known.tree):
        return item
    shared = dataclasses.replace(item, tree=known.tree)
    return known if shared == known else shared


def _is_same(tree: TreeSpec, known: TreeSpec) -> bool:
    return tree is known or (tree.leaves == known.leaves and repr(tree.outline) == repr(known.outline))
