"""What the run has saved so far, and why each checkpoint is kept."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Literal

from ckptmgr import policies
from ckptmgr.errors import CheckpointNotFoundError, CorruptCheckpointError, NewerFormatError
from ckptmgr.format import recorded
from ckptmgr.format.manifest import Manifest
from ckptmgr.results import CheckpointInfo
from ckptmgr.run import reducing
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.manifest_cache import Stamp

_log = logging.getLogger("ckptmgr")


@dataclasses.dataclass(frozen=True)
class Decision:
    """The steps to delete, to reduce and to keep, each with the stamp that it had when this was decided."""

    to_delete: Mapping[int, Stamp] = dataclasses.field(default_factory=dict)
    kept: Mapping[int, Stamp] = dataclasses.field(default_factory=dict)
    saved_at: Mapping[int, float] = dataclasses.field(default_factory=dict)
    to_reduce: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """The kept steps that lose all items but the params, and the policies that say so."""

    def seen(self, step: int) -> Stamp:
        return self.to_delete[step] if step in self.to_delete else self.kept[step]

    def needed_for(self, step: int) -> Mapping[int, Stamp]:
        """The steps that must still be there: for a deletion all that stay, for a reduction the whole ones."""
        left_out = self.to_reduce if step in self.to_reduce else ()
        return {each: seen for each, seen in self.kept.items() if each not in left_out}


class History:
    """The checkpoints of a catalog under the `keep` policies of a manager; each call reads the directory."""

    def __init__(self, catalog: Catalog, keep: Sequence[policies.KeepPolicy]) -> None:
        self._catalog = catalog
        self._keep = keep
        self.committed: Callable[[], int | None] = lambda: None
        """Returns the step that this process committed last: it may be below the newest."""
        self._said: set[str] = set()

    def all(self) -> list[CheckpointInfo]:
        """Every readable checkpoint, in order of steps, and why each is kept."""
        return self._look_at(self._catalog.steps())

    def _look_at(self, steps: Sequence[int]) -> list[CheckpointInfo]:
        self._catalog.read_ahead(steps)
        pinned, damaged = {step for step in steps if self._catalog.is_pinned(step)}, self._catalog.damaged
        read = (self._read(step, pinned) for step in steps)
        found = [self._doubt(info, damaged) for info in read if info is not None]
        return explain(found, self._keep, self.committed(), self._warn_of_policy)

    def _doubt(self, info: CheckpointInfo, damaged: Collection[int]) -> CheckpointInfo:
        """Sets `distrusted` if the checkpoint is known to be damaged, or a file of it is missing."""
        if info.step in damaged:
            return dataclasses.replace(info, distrusted="a restore has passed over it as damaged")
        try:
            missing = self._catalog.what_is_missing(info.step)
        except (CorruptCheckpointError, CheckpointNotFoundError, NewerFormatError):
            missing = "it was deleted meanwhile"
        return dataclasses.replace(info, distrusted=missing)

    def newest(self) -> CheckpointInfo | None:
        """The newest readable checkpoint; older ones are not read."""
        read = (self._read(step) for step in reversed(self._catalog.steps()))
        return next((info for info in read if info is not None), None)

    def _read(self, step: int, pinned: Collection[int] = ()) -> CheckpointInfo | None:
        try:
            return _describe(self._catalog.manifest(step), pinned=step in pinned)
        except (CorruptCheckpointError, CheckpointNotFoundError, NewerFormatError):
            return None  # damaged, deleted concurrently, or of a later ckptmgr: not counted, not deleted

    def glance(self, manifest: Manifest) -> CheckpointInfo:
        """One checkpoint by itself, without `kept`, for which all checkpoints must be read."""
        return _describe(manifest, pinned=self._catalog.is_pinned(manifest.step))

    def info(self, step: int) -> CheckpointInfo:
        """One checkpoint; raises CheckpointNotFoundError or CorruptCheckpointError."""
        self._catalog.require(step)
        alone = self.glance(self._catalog.manifest(step))
        return next((info for info in self.all() if info.step == step), alone)

    # ------------------------------------------------------------ what may be deleted

    def decide_deletions(self) -> Decision:
        """The steps that no policy keeps. None of them, if it is not known which step is the newest."""
        if not self._keep:
            return Decision()
        steps = self._catalog.steps()
        seen = {step: self._catalog.stamp(step) for step in steps}  # before anything is read
        infos = self._look_at(steps)
        trusted = {info.step for info in infos if info.distrusted is None}
        listed = {*seen, *self._catalog.closed()} - trusted - self._catalog.damaged
        unclear = [step for step in listed if step > max(trusted, default=0)]
        if unclear:
            self._warn_once(
                f"nothing is deleted in {self._catalog.directory}: step {max(unclear)} is newer than the newest "
                "good step, and cannot be read, or a file of it is missing. `ckptmgr verify` says more"
            )
            return Decision()
        to_delete = {info.step for info in infos if not info.kept}
        return Decision(
            {step: seen[step] for step in sorted(to_delete)},
            {step: seen.get(step) for step in trusted - to_delete},
            {info.step: info.time for info in infos},
            self._to_reduce(infos),
        )

    def _to_reduce(self, infos: Sequence[CheckpointInfo]) -> dict[int, str]:
        """The steps that only `params_only` keeps and that have something to lose, and the policies."""
        reasons = {info.step: info.kept for info in infos if info.distrusted is None}
        wanted = policies.to_reduce(self._keep, reasons)
        manifests = {step: found for step in wanted if reducing.to_drop(found := self._catalog.manifest(step))}
        whole = {step: why for step, found in manifests.items() if (why := reducing.why_whole(found))}
        for step, why in whole.items():
            text = f"params_only leaves steps whole in {self._catalog.directory}: step {step}: {why}"
            self._warn_once(text, "params_only")
        return {step: by for step, by in wanted.items() if step in manifests.keys() - whole.keys()}

    def still_holds(self, decision: Decision, step: int) -> bool:
        """Whether a step may still be deleted, or reduced, as the last look at the catalog saw it; on a disk, now.

        Another process may have pinned or replaced it meanwhile, or deleted one of the steps to keep.
        """
        seen = decision.seen(step)
        if self._catalog.stamp(step) != seen or self._catalog.is_pinned(step):
            return False
        if seen is None and not self._is_as_old(step, decision.saved_at[step]):
            return False
        return self._catalog.is_listed(max(decision.kept)) and all(
            self._catalog.stamp(each) == seen and self._catalog.what_is_missing(each) is None
            for each, seen in decision.needed_for(step).items()
        )

    def _is_as_old(self, step: int, time: float) -> bool:
        """Whether a step in a bucket, where stamps are not known, is still the save that was looked at."""
        return self._catalog.manifest(step, fresh=True).time == time

    def _warn_of_policy(self, name: str, problem: Exception) -> None:
        self._warn_once(
            f"the policy {name} of keep failed, so nothing is deleted: {type(problem).__name__}: {problem}"
        )

    def _warn_once(self, text: str, about: str = "") -> None:
        """Logs a text unless it, or another one `about` the same, was logged before."""
        if (about or text) not in self._said:
            self._said.add(about or text)
            _log.warning("%s", text)

    # ------------------------------------------------------------ looking

    def watch(self, after: int | None, timeout_s: float | None, poll_s: float) -> Iterator[int]:
        """Yields the steps after `after` as they are committed; ends after `timeout_s` without a new one."""
        waited_since = time.monotonic()
        known: dict[int, Stamp] = {}
        saved_at: dict[int, float] = {}
        while True:
            listed = [step for step in self._catalog.steps() if after is None or step > after]
            if max(listed, default=-1) < max(known, default=-1):
                known = {step: known[step] for step in listed if step in known}  # after a rewind
            seen = {step: self._catalog.stamp(step) for step in listed}
            new = [step for step in listed if step not in known or seen[step] not in (known[step], None)]
            for step in new:
                known[step] = seen[step]
                found = self._readable(step)
                if found is not None and not (found.reduced and saved_at.get(step) == found.time):
                    saved_at[step] = found.time
                    yield step
            if new:
                waited_since = time.monotonic()
            elif timeout_s is not None and time.monotonic() - waited_since >= timeout_s:
                return
            else:
                time.sleep(poll_s)

    def _readable(self, step: int) -> Manifest | None:
        """The manifest of a step that is there, and whose small files are whole. If they are damaged, logs it."""
        try:
            manifest = self._catalog.manifest(step, fresh=True)
            recorded.check_files(manifest, self._catalog.path(step), manifest.items)
        except CheckpointNotFoundError:
            return None
        except CorruptCheckpointError as problem:
            _log.warning("step %d is passed over as damaged: %s", step, problem)
            return None
        return manifest

    def best(
        self, metric: str | None, mode: Literal["min", "max"], *, beside: Sequence[CheckpointInfo] = ()
    ) -> int | None:
        """The step with the best value of a metric, or by the first `best` policy; `beside`: steps elsewhere."""
        kept_by = [each.policy if isinstance(each, policies.params_only) else each for each in self._keep]
        ranked_by = [each for each in kept_by if isinstance(each, policies.best)]
        if metric is not None:
            ranked_by = [policies.best(metric, mode=mode)]
        if not ranked_by:
            raise ValueError('best() needs a metric: best("loss"), or a manager with keep=ckptmgr.best("loss")')
        known = {info.step: info for info in (*beside, *self.all()) if info.distrusted is None}
        return next(iter(ranked_by[0].ranking(known.values())), None)


def explain(
    infos: Sequence[CheckpointInfo],
    keep: Sequence[policies.KeepPolicy],
    committed: int | None = None,
    failed: Callable[[str, Exception], object] = lambda name, problem: None,
) -> list[CheckpointInfo]:
    """Sets `kept`: why each stays. A distrusted checkpoint does not count, and stays."""
    trusted = [info for info in infos if info.distrusted is None]
    pinned = {info.step for info in trusted if info.pinned}
    reasons = policies.reasons_to_keep(keep, trusted, pinned, committed, failed)
    return [
        dataclasses.replace(
            info, kept=reasons.get(info.step) or (f"not counted: {info.distrusted}",) * bool(info.distrusted)
        )
        for info in infos
    ]


def _describe(manifest: Manifest, *, pinned: bool) -> CheckpointInfo:
    """The CheckpointInfo that a manifest gives."""
    return CheckpointInfo(
        step=manifest.step,
        time=manifest.time,
        nbytes=manifest.nbytes,
        disk_nbytes=sum(file.size for file in manifest.files.values()),
        items=tuple(manifest.items),
        leaves={name: item.tree.leaves for name, item in manifest.items.items() if item.kind == "arrays"},
        unread={name: item.why for name, item in manifest.items.items() if item.kind == "unread"},
        metrics=dict(manifest.metrics),  # a policy or a callback may change it
        metadata=copy.deepcopy(manifest.metadata),
        versions=dict(manifest.versions),
        pinned=pinned,
        reduced=None if manifest.reduced is None else str(manifest.reduced),
    )
