"""Copies the items of a step to the host, where they wait to be written, and prepares the manifest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from ckptmgr.arrays import finite, to_host, writing
from ckptmgr.format import manifest as manifests
from ckptmgr.options import Options
from ckptmgr.processes import agreement
from ckptmgr.processes.background import SLICE_S, Moment
from ckptmgr.saving import items
from ckptmgr.saving.reuse import Reuse

Composed = Mapping[str, items.Tree | items.Value]


@dataclasses.dataclass(frozen=True)
class Copied:
    """The snapshot of a step: its items as they were at the call of `save`."""

    contents: Mapping[str, Any]
    """By item: a Snapshot of its arrays, or a function that returns its JSON value."""
    manifest: manifests.Manifest
    may_differ: Sequence[str] = ()
    """The items that may differ between the processes of a job."""
    own: set[str] = dataclasses.field(default_factory=set)
    """The items that do differ: each process writes its own."""
    kept: Mapping[str, manifests.File] = dataclasses.field(default_factory=dict)
    """The files that this process takes over from the step before."""
    search: finite.Search | None = None
    """The search for NaN and infinity, if they matter."""

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def snapshots(self) -> dict[str, writing.Snapshot]:
        return {name: each for name, each in sorted(self.contents.items()) if isinstance(each, writing.Snapshot)}

    @property
    def own_values(self) -> list[str]:
        """The items of which each process writes its own JSON value."""
        return sorted(self.own - self.snapshots.keys())

    def spec(self) -> agreement.Spec:
        """What all processes of a job must agree on before anything is written."""
        kinds = [
            f"{name}\t{item.kind}{f' with {item.compression}' if item.compression else ''}"
            for name, item in sorted(self.manifest.items.items())
        ]
        plans = {name: snapshot.plan for name, snapshot in self.snapshots.items()}

        def lines() -> list[str]:
            leaves = [f"{name}{line}" for name, plan in plans.items() for line in plan.lines]
            return kinds + leaves + [f"the containers of {name}\t{plan.digest}" for name, plan in plans.items()]

        return agreement.Spec(
            agreement.digest(json.dumps([kinds, [plan.digest for plan in plans.values()]])),
            lines,
            [owner for plan in plans.values() for owner in plan.owners],
            list(map(self._digest, self.may_differ)),
            self._settle,
        )

    def _digest(self, name: str) -> str:
        found = self.contents[name]
        return found.digest() if isinstance(found, writing.Snapshot) else agreement.digest(json.dumps(found()))

    def _settle(self, owners: Sequence[int], differs: Sequence[bool]) -> None:
        """Removes the leaves that other processes write from the snapshots of this process."""
        self.own.update(name for name, each in zip(self.may_differ, differs, strict=True) if each)
        by_leaf = iter(owners)
        for name, snapshot in self.snapshots.items():
            settled = [next(by_leaf) for _ in snapshot.plan.owners]
            if name not in self.own:
                snapshot.leave_out(_of_others(snapshot.plan.owners, settled))

    def wait(self, wait_for: Callable[[Moment, float], bool], timeout_s: float) -> bool:
        """Waits until every leaf is copied. Under `max_host_bytes` a leaf may wait until others are written.

        The items share the seconds, which are counted in slices: see `Moment.wait`.
        """
        left_s = timeout_s
        for each in self.snapshots.values():
            while not wait_for(each.complete, min(SLICE_S, left_s)):
                left_s -= SLICE_S
                if left_s <= 0:
                    return False
        return True

    def twin(self) -> Copied | None:
        """The same for another writer; None if not everything is copied yet (under `max_host_bytes`)."""
        if any(each.has_more() for each in self.snapshots.values()):
            return None
        twins = {name: snapshot.twin() for name, snapshot in self.snapshots.items()}
        return dataclasses.replace(self, contents={**self.contents, **twins}, own=set())

    def release(self) -> None:
        """Drops all references to leaves, also to those that a failed save has not copied."""
        for snapshot in self.snapshots.values():
            snapshot.release()

    def completed_at(self) -> float:
        """When every leaf had been copied, on the clock of `time.perf_counter`."""
        return max((snapshot.completed_at for snapshot in self.snapshots.values()), default=0.0)

    def abandon(self) -> None:
        """Called if `save` is interrupted: fails the save unless every leaf is copied by now."""
        for snapshot in self.snapshots.values():
            snapshot.abandon()

    def marks(self) -> str:
        """What the search has found in this process, for `verdict` in process 0."""
        return self.search.marks() if self.search is not None else ""

    def verdict(self, marks: Iterable[str]) -> str | None:
        """Why the step is not to be trusted, as all processes have found; None if nothing was found."""
        return self.search.verdict(marks) if self.search is not None else None

    def seal(self, files: Mapping[str, manifests.File], distrusted: str | None = None) -> manifests.Manifest:
        """The manifest, once the files are written and the metrics have arrived."""
        metrics = self.contents[manifests.METRICS]()
        each = self.manifest.items
        own = {name: dataclasses.replace(each[name], processes=jax.process_count()) for name in self.own}
        found = {"items": {**each, **own}, "files": files, "metrics": metrics, "distrusted": distrusted}
        return dataclasses.replace(self.manifest, **found)


def _of_others(owners: Sequence[int], settled: Sequence[int]) -> list[int]:
    """The leaves of this process that another one writes: process 0, if each process has the leaf."""
    here = jax.process_index()
    return [
        place
        for place, (owner, writer) in enumerate(zip(owners, settled, strict=True))
        if (owner == -1 and here != 0) or (owner == here and writer != here)
    ]


class Copier:
    """Copies the items of each step; keeps the plan of the step before, which mostly fits."""

    def __init__(self, options: Options, reuse: Reuse | None = None) -> None:
        self._options = options
        self._reuse = reuse
        self._planner = to_host.Planner(options.chunk_bytes)
        self._described: dict[str, manifests.Item] = {}
        self._finder = finite.Finder()

    def copy(self, step: int, saved_at: float, composed: Composed) -> Copied:
        """Copies every item to the host before any writer starts: a writer would slow the copies down."""
        trees = {name: item for name, item in composed.items() if isinstance(item, items.Tree)}
        if self._reuse is not None:
            self._reuse.begin(step)
        search = self._search(trees) if self._options.nonfinite != "ignore" else None
        snapshots = {name: self._snapshot(name, tree, len(trees), search) for name, tree in trees.items()}
        for snapshot in snapshots.values():
            snapshot.start()
        for snapshot in snapshots.values():
            snapshot.collect()
        values = {name: item for name, item in composed.items() if isinstance(item, items.Value)}
        described = {name: self._describe(name, snapshot) for name, snapshot in snapshots.items()}
        described |= {name: manifests.Item(v.kind, file=manifests.json_file(name)) for name, v in values.items()}
        manifest = manifests.Manifest(
            step=step,
            time=saved_at,
            items=described,
            metadata=self._options.metadata,
            versions=manifests.versions(),
        )
        may_differ = [name for name, value in values.items() if value.is_own]
        may_differ += [name for name, snapshot in snapshots.items() if snapshot.is_own]
        contents = {**snapshots, **{name: value.get for name, value in values.items()}}
        kept = self._reuse.files() if self._reuse is not None else {}
        return Copied(contents, manifest, sorted(may_differ), kept=kept, search=search)

    def _search(self, trees: Mapping[str, items.Tree]) -> finite.Search:
        """Starts to look for NaN and infinity in the parameters; opt_state may hold them."""
        item = manifests.PARAMS if manifests.PARAMS in trees else manifests.OPT_STATE
        return self._finder.start(item, trees[item].spec, trees[item].leaves)

    def _snapshot(
        self, name: str, tree: items.Tree, of: int, search: finite.Search | None = None
    ) -> writing.Snapshot:
        plan = self._planner.plan(name, tree.spec, tree.leaves)
        is_own = tree.is_own and jax.process_count() > 1 and all(at is None for at in plan.shardings)
        bound = self._options.max_host_bytes
        share = None if bound is None or is_own else bound // of  # values to compare are copied whole
        looked = {"look": search.look} if search is not None and search.item == name else {}
        needed = search.in_copies if search is not None and looked else frozenset[int]()
        kept = None if self._reuse is None or is_own else self._reuse.keep(name, plan, tree.leaves, needed)
        return writing.Snapshot(plan, tree.leaves, share, is_own=is_own, kept=kept, **looked)

    def _describe(self, name: str, snapshot: writing.Snapshot) -> manifests.Item:
        known = self._described.get(name)
        if known is None or known.tree is not snapshot.plan.tree:
            known = manifests.Item("arrays", snapshot.plan.tree, compression=self._options.compression)
            self._described[name] = known
        return known
