"""What the run has saved so far, and why each checkpoint is kept."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from ckptmgr import manifest as manifests
from ckptmgr import policy
from ckptmgr.catalog import Catalog
from ckptmgr.checkpoint import CheckpointInfo
from ckptmgr.errors import CheckpointNotFoundError, CorruptCheckpointError, NewerFormatError
from ckptmgr.manifest import Manifest

_log = logging.getLogger("ckptmgr")


class History:
    """The checkpoints of a catalog under the `keep` policies of a manager; read from disk when asked."""

    def __init__(self, catalog: Catalog, keep: Sequence[policy.KeepPolicy]) -> None:
        self._catalog = catalog
        self._keep = keep
        self.committed: int | None = None
        """The step that was committed last by this process: it may be below the newest."""

    def all(self) -> list[CheckpointInfo]:
        """Every readable checkpoint, in order of steps."""
        pinned = self._catalog.pinned()
        counted = [step for step in self._catalog.steps() if step not in self._catalog.damaged]
        found = [info for step in counted if (info := self._read(step, pinned)) is not None]
        reasons = policy.reasons_to_keep(self._keep, found, pinned, self.committed)
        return [dataclasses.replace(info, kept=reasons[info.step]) for info in found]

    def newest(self) -> CheckpointInfo | None:
        """The newest readable checkpoint; the others are not looked at."""
        read = (self._read(step) for step in reversed(self._catalog.steps()))
        return next((info for info in read if info is not None), None)

    def _read(self, step: int, pinned: Collection[int] = ()) -> CheckpointInfo | None:
        try:
            return _describe(self._catalog.manifest(step), pinned=step in pinned)
        except (CorruptCheckpointError, CheckpointNotFoundError, NewerFormatError):
            return None  # damaged, deleted by another hand, or of a later ckptmgr: not counted, not deleted

    def glance(self, manifest: Manifest) -> CheckpointInfo:
        """One checkpoint by itself: why it is kept is not looked up, which would take all the others."""
        return _describe(manifest, pinned=self._catalog.is_pinned(manifest.step))

    def info(self, step: int) -> CheckpointInfo:
        """One checkpoint; raises CheckpointNotFoundError or CorruptCheckpointError."""
        self._catalog.require(step)
        alone = self.glance(self._catalog.manifest(step))
        return next((info for info in self.all() if info.step == step), alone)

    def doomed(self) -> list[int]:
        """The steps that no policy keeps."""
        return [info.step for info in self.all() if not info.kept] if self._keep else []

    def watch(self, after: int | None, timeout_s: float | None, poll_s: float) -> Iterator[int]:
        """Yields the steps after one as they come; ends when none has come for `timeout_s`."""
        waited_since = time.monotonic()
        while True:
            new = [step for step in self._catalog.steps() if after is None or step > after]
            for step in new:
                after = step
                if self._is_readable(step):
                    yield step
            if new:
                waited_since = time.monotonic()
            elif timeout_s is not None and time.monotonic() - waited_since >= timeout_s:
                return
            else:
                time.sleep(poll_s)

    def _is_readable(self, step: int) -> bool:
        """Whether a step is there and its small files are whole; said if they are not."""
        try:
            manifest = self._catalog.manifest(step, fresh=True)
            manifests.check_files(manifest, self._catalog.path(step), manifest.items)
        except CheckpointNotFoundError:
            return False
        except CorruptCheckpointError as problem:
            _log.warning("step %d is passed over as damaged: %s", step, problem)
            return False
        return True

    def best(
        self, metric: str | None, mode: Literal["min", "max"], *, beside: Sequence[CheckpointInfo] = ()
    ) -> int | None:
        """The step with the best value of a metric, or of the first `best` policy; `beside`: elsewhere."""
        ranked_by = [each for each in self._keep if isinstance(each, policy.best)]
        if metric is not None:
            ranked_by = [policy.best(metric, mode=mode)]
        if not ranked_by:
            raise ValueError('best() needs a metric: name one, or give the manager keep=ckptmgr.best("loss")')
        known = {info.step: info for info in (*beside, *self.all())}
        return next(iter(ranked_by[0].ranking(known.values())), None)


def _describe(manifest: Manifest, *, pinned: bool) -> CheckpointInfo:
    """What a manifest tells about its checkpoint."""
    return CheckpointInfo(
        step=manifest.step,
        time=manifest.time,
        nbytes=manifest.nbytes,
        disk_nbytes=sum(file.size for file in manifest.files.values()),
        items=tuple(manifest.items),
        leaves={name: item.tree.leaves for name, item in manifest.items.items() if item.kind == "arrays"},
        unread={name: item.why for name, item in manifest.items.items() if item.kind == "unread"},
        metrics=manifest.metrics,
        metadata=manifest.metadata,
        versions=manifest.versions,
        pinned=pinned,
    )
