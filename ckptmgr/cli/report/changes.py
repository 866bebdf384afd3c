"""How a checkpoint differs from the one before, from their manifests alone: no array is read."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ckptmgr.results import CheckpointInfo


@dataclasses.dataclass(frozen=True)
class Change:
    """The differences between a step and the one before it on disk."""

    step: int
    before: int
    added: Sequence[str] = ()
    removed: Sequence[str] = ()
    changed: Sequence[str] = ()
    """Leaves of another shape or dtype: what they were and are."""
    around: Sequence[str] = ()
    """Entries of the metadata, and versions of libraries, that differ."""

    def __bool__(self) -> bool:
        return any((self.added, self.removed, self.changed, self.around))


def changes(infos: Sequence[CheckpointInfo]) -> list[Change]:
    """One for each step but the first."""
    return [_change(before, info) for before, info in itertools.pairwise(infos)]


def _change(before: CheckpointInfo, info: CheckpointInfo) -> Change:
    around = [*_entries(before.metadata, info.metadata), *_entries(before.versions, info.versions)]
    if before.leaves == info.leaves and set(before.items) == set(
        info.items
    ):  # mostly the same objects: manifests of one run share them
        return Change(info.step, before.step, around=around)
    was, now = _kinds(before), _kinds(info)
    return Change(
        info.step, before.step,
        added=[path for path in now if path not in was],
        removed=[path for path in was if path not in now],
        changed=[f"{path}: {was[path]}, now {kind}" for path, kind in now.items() if was.get(path, kind) != kind],
        around=around,
    )  # fmt: skip


def _kinds(info: CheckpointInfo) -> dict[str, str]:
    """What each leaf is, by its path, and each item without arrays by its name."""
    found = {f"{item}{leaf.path}": str(leaf) for item, leaves in info.leaves.items() for leaf in leaves}
    return found | {name: "no arrays" for name in info.items if not info.leaves.get(name)}


def _entries(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return [f"{name}: {was.get(name, 'nothing')}, now {now.get(name, 'nothing')}" for name in names]
