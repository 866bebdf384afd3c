"""Which arrays are still those of the step before (`reuse_unchanged`); `arrays.unchanged` takes them over.

A jax array cannot be changed in place: the very object that was saved has the values that were saved. One that was
donated is deleted, and is not taken for the same. Numpy arrays may have been changed: they are written.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ckptmgr.arrays import unchanged, writing
from ckptmgr.arrays.to_host import Plan
from ckptmgr.arrays.unchanged import Database, Kept
from ckptmgr.format import manifest as manifests
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.manifest_cache import Stamp

_log = logging.getLogger("ckptmgr")
_MANIFEST, _DATA = "manifest.ocdbt", "d/"
_FROM = re.compile(r"/(?:written|unchanged)\.(\d+)/")
"""In the name of a file: the step whose save wrote it."""
_SMALL_BYTES = 4096


class _Item(NamedTuple):
    """The arrays of an item as they were saved, and where they are."""

    plan: Plan
    places: Sequence[int]
    """The places of those that may be kept."""
    refs: Sequence[weakref.ref[Any]]
    home: str
    """The name, in later steps, of the database that most of them are in."""
    homes: Mapping[int, str]
    """That of the others, by place."""
    totals: Mapping[str, int]
    """The bytes of all arrays that were written into each database."""


class _Saved(NamedTuple):
    """A step, and what its items hold."""

    step: int
    items: dict[str, _Item]
    stamp: Stamp = None


class Reuse:
    """Remembers the arrays of the step before, without keeping them alive."""

    def __init__(self, run: Catalog) -> None:
        self._run = run
        self._before: _Saved | None = None
        """The last step that is durable."""
        self._next = _Saved(-1, {})
        """The one that is being saved."""
        self._files: dict[str, manifests.File] = {}
        self._misses: list[int] | None = []
        """The saves that could have reused arrays and did not; None once one has, or a warning was given."""

    def begin(self, step: int) -> None:
        """A save begins: the step before is taken if it is still what was saved."""
        self._next, self._files = _Saved(step, {}), {}
        if self._before is not None and not (self._before.step < step and self._is_there(self._before)):
            self._before = None  # a step that is saved again, or below the newest, would use its names twice

    def _is_there(self, saved: _Saved) -> bool:
        run, step = self._run, saved.step
        return run.is_listed(step) and step not in run.damaged and run.stamp(step) == saved.stamp

    def keep(
        self, name: str, plan: Plan, leaves: Sequence[Any], needed: Collection[int] = frozenset()
    ) -> Kept | None:
        """What an item takes over from the step before; None if nothing. `needed`: leaves to be copied always."""
        before = self._before
        known = before.items.get(name) if before is not None else None
        if known is None or known.plan is not plan:
            places = _may_be_kept(plan, leaves)
            self._remember(name, _Item(plan, places, (), "", {}, {}), leaves, {}, frozenset())
            return None
        same = [place for place in _same(known, leaves) if place not in needed]
        kept, apart = unchanged.choose(same, known.homes, known.home, plan.sizes, known.totals)
        self._remember(name, known, leaves, kept, apart)
        if before is None or not (kept or apart):
            return None
        return Kept(self._databases(name, before.step, kept), apart, f"unchanged.{self._next.step}")

    def _remember(
        self,
        name: str,
        known: _Item,
        leaves: Sequence[Any],
        kept: Mapping[str, Sequence[int]],
        apart: frozenset[int],
    ) -> None:
        """Where the arrays of this item will be."""
        home, away = f"written.{self._next.step}", f"unchanged.{self._next.step}"
        sizes = known.plan.sizes
        homes = {place: at for at, places in kept.items() for place in places} | dict.fromkeys(apart, away)
        totals = {at: known.totals[at] for at in kept}
        totals[away] = sum(sizes[place] for place in apart)
        totals[home] = sum(sizes) - sum(sizes[place] for place in homes)
        refs = [weakref.ref(leaves[place]) for place in known.places]
        self._next.items[name] = _Item(known.plan, known.places, refs, home, homes, totals)

    def _databases(self, name: str, before: int, kept: Mapping[str, Sequence[int]]) -> dict[str, Database]:
        """The databases of an item in the step before, and their files, which the new step has too."""
        manifest, part = self._run.manifest(before), "/".join(filter(None, (name, writing.own_part())))
        found = {}
        for home, places in kept.items():
            folder = part if home == f"written.{before}" else f"{part}/{home}"
            names = [file for file in manifest.files if _is_of(file, f"{folder}/")]
            inside = [file.removeprefix(f"{folder}/") for file in names]
            self._files |= {
                f"{part}/{home}/{file}": manifest.files[name] for file, name in zip(inside, names, strict=True)
            }
            found[home] = Database(self._run.path(before) / folder, inside, places)
        return found

    def files(self) -> dict[str, manifests.File]:
        """The files that are taken over, by their names in the new step."""
        return self._files

    def committed(self, step: int, shared: int) -> None:
        """The save is durable: the next one goes by it. `shared`: the bytes that it did not write."""
        if step != self._next.step:
            return
        if self._before is not None and self._misses is not None:
            self._misses = None if shared else [*self._misses, step]
            self._warn_of_misses()
        self._before = self._next._replace(stamp=self._run.stamp(step))

    def _warn_of_misses(self) -> None:
        """Says once that the option does nothing: else only the size of the disk shows it."""
        if self._misses is None or len(self._misses) < 2:
            return
        nbytes = sum(sum(item.plan.sizes) for item in self._next.items.values())
        if nbytes >= unchanged.LEAST_BYTES and jax.process_index() == 0:
            _log.warning(
                "reuse_unchanged=True has reused nothing in steps %d and %d: no large array is the same object "
                "as in the step before. An array that comes out of jax.jit is a new object, even if nothing "
                "changed it: keep frozen arrays out of the results of the train step",
                *self._misses,
            )
        self._misses = None


def shared_bytes(manifest: manifests.Manifest) -> int:
    """The bytes of a step that its save did not write: files that an earlier step has too."""
    found = ((_FROM.search(name), file) for name, file in manifest.files.items())
    return sum(file.size for by, file in found if by is not None and int(by[1]) != manifest.step)


def _is_of(file: str, folder: str) -> bool:
    rest = file.removeprefix(folder)
    return rest != file and (rest == _MANIFEST or rest.startswith(_DATA))


def _may_be_kept(plan: Plan, leaves: Sequence[Any]) -> Sequence[int]:
    """The places of jax arrays, but for small ones: the list of arrays holds their values, and is always new."""
    if not unchanged.are_apart(plan.prefixes):
        return []
    return [
        place
        for place, (leaf, size) in enumerate(zip(leaves, plan.sizes, strict=True))
        if size > _SMALL_BYTES and isinstance(leaf, jax.Array)
    ]


def _same(known: _Item, leaves: Sequence[Any]) -> list[int]:
    """The places of the arrays that are the very objects of the step before."""
    pairs = zip(known.places, known.refs, strict=True)
    return [place for place, ref in pairs if ref() is leaves[place] and not leaves[place].is_deleted()]
