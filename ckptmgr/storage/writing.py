"""From the items of a step to host copies that wait to be written, and to the manifest that seals them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ckptmgr import items, job
from ckptmgr import manifest as manifests
from ckptmgr.options import Options
from ckptmgr.storage import arrays, devices, orbax

Composed = Mapping[str, items.Tree | items.Value]


@dataclasses.dataclass(frozen=True)
class Copied:
    """A step as it was at the moment of the call."""

    contents: Mapping[str, Any]
    """A Snapshot for each item of arrays; for any other a function that gives its JSON value."""
    manifest: manifests.Manifest

    @property
    def _snapshots(self) -> dict[str, arrays.Snapshot]:
        return {name: each for name, each in sorted(self.contents.items()) if isinstance(each, arrays.Snapshot)}

    def spec(self) -> job.Spec:
        """What the processes of a job must agree on before any of it is written."""
        kinds = [
            f"{name}\t{item.kind}{f' with {item.compression}' if item.compression else ''}"
            for name, item in sorted(self.manifest.items.items())
        ]
        plans = {name: snapshot.plan for name, snapshot in self._snapshots.items()}

        def lines() -> list[str]:
            leaves = [f"{name}{line}" for name, plan in plans.items() for line in plan.lines]
            return kinds + leaves + [f"the containers of {name}\t{plan.digest}" for name, plan in plans.items()]

        return job.Spec(
            job.digest(json.dumps([kinds, [plan.digest for plan in plans.values()]])),
            lines,
            [owner for plan in plans.values() for owner in plan.owners],
            self._leave_to_owners,
        )

    def _leave_to_owners(self, owners: Sequence[int]) -> None:
        """Of a leaf that several processes have each for themselves, the one that process 0 sees is written."""
        here, by_leaf = jax.process_index(), iter(owners)
        for snapshot in self._snapshots.values():
            settled = [next(by_leaf) for _ in snapshot.plan.owners]
            own = [place for place, owner in enumerate(snapshot.plan.owners) if owner == here]
            snapshot.leave_out([place for place in own if settled[place] != here])

    def wait(self, timeout_s: float) -> bool:
        """Waits until every leaf is copied: under `max_host_bytes` what is written makes room for the next."""
        return all(snapshot.complete.wait(timeout_s) for snapshot in self._snapshots.values())

    def build_manifest(self, files: Mapping[str, manifests.File]) -> bytes:
        """The manifest, once the files are written and the metrics have arrived."""
        metrics = self.contents[items.METRICS]()
        return manifests.encode(dataclasses.replace(self.manifest, files=files, metrics=metrics))


class Copier:
    """Copies the items of each step; remembers how they are stored, which is mostly the same."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._planner = devices.Planner(options.chunk_bytes)

    def copy(self, step: int, time: float, composed: Composed) -> Copied:
        """Copies every item to the host before any writer starts: a writer would slow the copies down."""
        trees = {name: item for name, item in composed.items() if isinstance(item, items.Tree)}
        snapshots = {name: self._snapshot(name, tree, len(trees)) for name, tree in trees.items()}
        for snapshot in snapshots.values():
            snapshot.start()
        for snapshot in snapshots.values():
            snapshot.collect()
        values = {name: item for name, item in composed.items() if isinstance(item, items.Value)}
        described = {name: self._of_arrays(snapshot) for name, snapshot in snapshots.items()}
        described |= {name: manifests.Item(v.kind, file=orbax.json_file(name)) for name, v in values.items()}
        manifest = manifests.Manifest(
            step=step,
            time=time,
            items=described,
            metadata=self._options.metadata,
            versions=manifests.versions(),
        )
        return Copied({**snapshots, **{name: value.get for name, value in values.items()}}, manifest)

    def _snapshot(self, name: str, tree: items.Tree, of: int) -> arrays.Snapshot:
        bound = self._options.max_host_bytes
        plan = self._planner.plan(name, tree.spec, tree.leaves)
        return arrays.Snapshot(plan, tree.leaves, bound and bound // of)

    def _of_arrays(self, snapshot: arrays.Snapshot) -> manifests.Item:
        return manifests.Item("arrays", snapshot.plan.tree, compression=self._options.compression)
