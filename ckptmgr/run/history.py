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
        return self._look_at(self._catalog.steps())[0]

    def _look_at(self, steps: Sequence[int]) -> tuple[list[CheckpointInfo], set[int]]:
        """What is known of these steps; and those of them that are not whole."""
        self._catalog.read_ahead(steps)
        pinned, damaged = {step for step in steps if self._catalog.is_pinned(step)}, self._catalog.damaged
        read = [info for step in steps if (info := self._read(step, pinned)) is not None]
        doubts = {info.step: why for info in read if (why := self._doubt(info.step, damaged)) is not None}
        found = [dataclasses.replace(each, distrusted=doubts.get(each.step, each.distrusted)) for each in read]
        explained = explain(found, self._keep, self.committed(), self._warn_of_policy, not_whole=doubts)
        return explained, set(doubts)

    def _doubt(self, step: int, damaged: Collection[int]) -> str | None:
        """Why a step is not whole: it is known to be damaged, or a file of it is missing."""
        if step in damaged:
            return "a restore has passed over it as damaged"
        try:
            return self._catalog.what_is_missing(step)
        except (CorruptCheckpointError, CheckpointNotFoundError, NewerFormatError):
            return "it was deleted meanwhile"

    def newest(self) -> CheckpointInfo | None:
        """The newest readable checkpoint; older ones are not read."""
        read = (self._read(step) for step in reversed(self._catalog.steps()))
        return next((info for info in read if info is not None), None)

    def _read(self, step: int, pinned: Collection[int] = ()) -> CheckpointInfo | None:
        try:
            return self._describe(self._catalog.manifest(step), pinned=step in pinned)
        except (CorruptCheckpointError, CheckpointNotFoundError, NewerFormatError):
            return None  # damaged, deleted concurrently, or of a later ckptmgr: not counted, not deleted

    def glance(self, manifest: Manifest) -> CheckpointInfo:
        """One checkpoint by itself, without `kept`, for which all checkpoints must be read."""
        return self._describe(manifest, pinned=self._catalog.is_pinned(manifest.step))

    def _describe(self, manifest: Manifest, *, pinned: bool) -> CheckpointInfo:
        distrusted = self._catalog.why_distrusted(manifest.step, manifest)
        return dataclasses.replace(describe(manifest), pinned=pinned, distrusted=distrusted)

    def info(self, step: int) -> CheckpointInfo:
        """One checkpoint; raises CheckpointNotFoundError or CorruptCheckpointError."""
        self._catalog.require(step)
        alone = self.glance(self._catalog.manifest(step))
        return next((info for info in self.all() if info.step == step), alone)

    def why_unread(self, step: int) -> str:
        """Why nothing is known of a listed step; "" if something is."""
        try:
            self._catalog.manifest(step)
        except (CorruptCheckpointError, CheckpointNotFoundError, NewerFormatError) as problem:
            return str(problem)
        return ""

    # ------------------------------------------------------------ what may be deleted

    def decide_deletions(self) -> Decision:
        """The steps that no policy keeps. None of them, if it is not known which step is the newest."""
        if not self._keep:
            return Decision()
        steps = self._catalog.steps()
        seen = {step: self._catalog.stamp(step) for step in steps}  # before anything is read
        infos, not_whole = self._look_at(steps)
        trusted = {info.step for info in infos if info.distrusted is None}
        whole = {info.step for info in infos} - not_whole
        listed = {*seen, *self._catalog.closed()} - whole - self._catalog.damaged
        unclear = [step for step in listed if step > max(trusted, default=0)]
        if unclear:
            self._warn_once(
                f"nothing is deleted in {self._catalog.directory}: step {max(unclear)} is newer than the newest "
                "good step, and cannot be read, or a file of it is missing. `ckptmgr verify` says more"
            )
            return Decision()
        if (metric := policies.unknown_metric(self._keep, infos)) is not None:
            has = ", ".join(sorted({name for info in infos for name in info.metrics}))
            self._warn_once(
                f"nothing is deleted in {self._catalog.directory}: keep names the metric {metric!r}, which no "
                f"checkpoint has; they have {has}",
                "best",
            )
            return Decision()
        to_delete = {info.step for info in infos if not info.kept}
        return Decision(
            {step: seen[step] for step in sorted(to_delete)},
            {step: seen.get(step) for step in whole - to_delete},
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
            text = f"a params-only policy leaves steps whole in {self._catalog.directory}: step {step}: {why}"
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
        known: dict[int, tuple[Stamp, bytes | None] | None] = {}
        saved_at: dict[int, float] = {}
        while True:
            listed = [step for step in self._catalog.steps() if after is None or step > after]
            if max(listed, default=-1) < max(known, default=-1):
                known = {step: known[step] for step in listed if step in known}  # after a rewind
            seen = {step: self._seen(step) for step in listed}
            new = [step for step in listed if step not in known or seen[step] not in (known[step], None)]
            for step in new:
                known[step] = seen[step]
                found = self._if_good(step)
                if found is not None and not (found.reduced and saved_at.get(step) == found.time):
                    saved_at[step] = found.time
                    yield step
            if new:
                waited_since = time.monotonic()
            elif timeout_s is not None and time.monotonic() - waited_since >= timeout_s:
                return
            else:
                time.sleep(poll_s)

    def _seen(self, step: int) -> tuple[Stamp, bytes | None] | None:
        """Tells a save of a step from another, and whether somebody has trusted or distrusted it since."""
        stamp = self._catalog.stamp(step)
        return None if stamp is None else (stamp, self._catalog.trust_note(step))

    def _if_good(self, step: int) -> Manifest | None:
        """The manifest of a step that is there, trusted, and whose small files are whole. Else that is logged."""
        try:
            manifest = self._catalog.manifest(step, fresh=True)
            recorded.check_files(manifest, self._catalog.path(step), manifest.items)
        except CheckpointNotFoundError:
            return None
        except CorruptCheckpointError as problem:
            _log.warning("step %d is passed over as damaged: %s", step, problem)
            return None
        why = self._catalog.why_distrusted(step, manifest)
        if why is not None:
            _log.warning("step %d is passed over, because it is distrusted: %s", step, why)
        return manifest if why is None else None

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
        here, not_whole = self._look_at(self._catalog.steps())
        distrusted = {info.step for info in here if info.distrusted is not None} - not_whole
        found = (info for info in (*beside, *here) if info.step not in distrusted)
        known = {info.step: info for info in found if info.distrusted is None}
        return next(iter(ranked_by[0].ranking(known.values())), None)


def explain(
    infos: Sequence[CheckpointInfo],
    keep: Sequence[policies.KeepPolicy],
    committed: int | None = None,
    failed: Callable[[str, Exception], object] = lambda name, problem: None,
    not_whole: Collection[int] | None = None,
) -> list[CheckpointInfo]:
    """Sets `kept`: why each stays. `not_whole` are steps that do not count, and stay; default: all distrusted.

    The policies are asked about the trusted steps alone, so that a distrusted one takes no place from them. They
    are also asked about both together: a distrusted step stays as long as it would if it were trusted.
    """
    trusted = [info for info in infos if info.distrusted is None]
    stays = {info.step for info in infos if info.distrusted} if not_whole is None else not_whole
    whole = [info for info in infos if info.step not in stays]
    reasons: dict[int, tuple[str, ...]] = {}
    for some in (trusted, whole) if len(whole) > len(trusted) else (trusted,):
        pinned = {info.step for info in some if info.pinned}
        for step, why in policies.reasons_to_keep(keep, some, pinned, committed, failed).items():
            reasons[step] = tuple(dict.fromkeys((*reasons.get(step, ()), *why)))
    reasons |= {info.step: (f"not counted: {info.distrusted}",) for info in infos if info.step in stays}
    return [dataclasses.replace(info, kept=reasons[info.step]) for info in infos]


def describe(manifest: Manifest) -> CheckpointInfo:
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
        reduced=None if manifest.reduced is None else str(manifest.reduced),
    )
