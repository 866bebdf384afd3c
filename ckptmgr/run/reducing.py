"""A step is reduced to its params: which items go, and what its manifest then says. No file is touched here."""

from __future__ import annotations

import dataclasses

from ckptmgr.format import manifest as manifests
from ckptmgr.format.manifest import METRICS, PARAMS, STEP, Manifest, Reduction

_STAY = (PARAMS, STEP, METRICS)


def to_drop(manifest: Manifest) -> tuple[str, ...]:
    """The items that go; none if the step has lost them before."""
    return () if manifest.reduced else tuple(name for name in manifest.items if name not in _STAY)


def why_whole(manifest: Manifest) -> str | None:
    """Why a step keeps all its items although `params_only` alone keeps it; None if it may lose some."""
    if not manifest.written_here:
        return "ckptmgr did not write it"
    return None if PARAMS in manifest.items else "it has no params, so its opt_state may hold them"


def reduced(manifest: Manifest, by: str, time: float) -> Manifest:
    """The manifest of the step without these items; `by` names the policies."""
    gone = to_drop(manifest)
    return dataclasses.replace(
        manifest,
        items={name: item for name, item in manifest.items.items() if name not in gone},
        files={name: file for name, file in manifest.files.items() if not is_below(name, gone)},
        reduced=Reduction(gone, by, time),
    )


def is_below(file: str, items: tuple[str, ...]) -> bool:
    """Whether a file of a step belongs to one of these items."""
    return file.startswith(tuple(f"{name}/" for name in items))


def is_same_save(one: Manifest, other: Manifest) -> bool:
    """Whether two manifests are of one save; one of them may have been reduced since."""
    if one.reduced is None and other.reduced is None:
        return (one.time, one.files) == (other.time, other.files)
    shared = [name for name in one.files if not is_below(name, _gone(one) + _gone(other))]
    return one.time == other.time and all(one.files[name] == other.files.get(name) for name in shared)


def _gone(manifest: Manifest) -> tuple[str, ...]:
    return manifest.reduced.items if manifest.reduced else ()


def decode(data: bytes, step: int) -> Manifest:
    """The manifest in these bytes."""
    return manifests.decode(data, step=step, path=manifests.NAME)
