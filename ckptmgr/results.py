"""What goes in and out: `SaveResult`, `CheckpointInfo`, `Checkpoint`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ckptmgr.errors import CheckpointTimeoutError, SaveError
from ckptmgr.processes.background import Moment
from ckptmgr.specs import LeafSpec


def _empty() -> Any:
    return dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What is known of a checkpoint without reading an array."""

    step: int
    time: float
    """When `save` was called, in seconds since the epoch."""
    nbytes: int = 0
    """Bytes of all arrays, before compression."""
    disk_nbytes: int = 0
    """Bytes of all files but the manifest; 0 for a checkpoint of stock Orbax."""
    blocked_s: float | None = None
    """How long `save` held up its caller; known to the process that saved, as `durable_s` is."""
    durable_s: float | None = None
    """How long it took from the call of `save` until the checkpoint was durable."""
    items: tuple[str, ...] = ()
    leaves: Mapping[str, tuple[LeafSpec, ...]] = _empty()
    """The leaves of each item that holds arrays."""
    unread: Mapping[str, str] = _empty()
    """Items that another library wrote and that ckptmgr does not read: why, and what does."""
    metrics: Mapping[str, float] = _empty()
    metadata: Mapping[str, Any] = _empty()
    versions: Mapping[str, str] = _empty()
    """Versions of the libraries it was written with; empty for a checkpoint of stock Orbax."""
    pinned: bool = False
    distrusted: str | None = None
    """Why retention does not count it, nor deletes it: a file of it is missing, say. None if it counts."""
    kept: tuple[str, ...] = ()
    """Why retention keeps it, empty if it would go; filled in by `CheckpointManager.info`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A restored checkpoint, or the values a run starts from when there is none."""

    step: int
    params: Any = None
    opt_state: Any = None
    extras: Mapping[str, Any] = _empty()
    metrics: Mapping[str, float] = _empty()
    info: CheckpointInfo | None = None
    resumed: bool = True
    """False when nothing was saved yet and these are the values given to `restore_or`."""
    skipped: Mapping[int, str] = _empty()
    """Newer steps that were passed over as damaged, and why."""
    missing: tuple[str, ...] = ()
    """With `partial`: leaves that the checkpoint lacks; they have the template's own value, or the optimizer's."""
    unused: tuple[str, ...] = ()
    """With `partial`: leaves of the checkpoint that the template lacks; they were not read."""


class Damage(NamedTuple):
    """One damaged place of a checkpoint: a file, or a leaf of the arrays."""

    where: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify` found; falsy if anything is damaged."""

    step: int
    damages: tuple[Damage, ...] = ()
    unchecked: tuple[str, ...] = ()
    """What has no checksum to be checked by: parts of a checkpoint of stock Orbax."""
    files: int = 0
    leaves: int = 0
    nbytes: int = 0
    """Bytes of the arrays that were read."""

    def __bool__(self) -> bool:
        return not self.damages

    def __str__(self) -> str:
        counted = f"step {self.step}: {self.files} files, {self.leaves} leaves, {self.nbytes} bytes of arrays"
        if self:
            return f"{counted}: whole" + "".join(f"\n  not checked: {what}" for what in self.unchecked)
        return f"{counted}: damaged" + "".join(f"\n  {where}: {reason}" for where, reason in self.damages)


class Save:
    """A save that was accepted: once it is `over` it has its `info`, or the `failure`."""

    def __init__(self, step: int, timeout_s: float, wait_for: Callable[[Moment, float], bool]) -> None:
        self.step = step
        self.over = Moment()
        self.timeout_s = timeout_s
        self.wait_for = wait_for
        """Whether a moment that the thread that writes sets comes within these seconds."""
        self.info: CheckpointInfo | None = None
        self.failure: SaveError | None = None
        self.was_raised = False


class SaveResult:
    """What became of a call of `save`: truthy if a save was started."""

    def __init__(self, step: int, reason: str, save: Save | None = None) -> None:
        self.step = step
        self.reason = reason
        """Why the step was saved, or why it was not."""
        self._save = save

    def __bool__(self) -> bool:
        return self._save is not None

    def __repr__(self) -> str:
        state = "not saved" if self._save is None else "durable" if self.done() else "being written"
        return f"SaveResult(step={self.step}, {state}: {self.reason})"

    def done(self) -> bool:
        """Whether nothing is being written any more for this step: it is durable, or failed."""
        return self._save is None or self._save.over.is_set()

    def result(self, timeout_s: float | None = None) -> CheckpointInfo:
        """Waits until the checkpoint is durable.

        Raises SaveError if it could not be written or was never started, and CheckpointTimeoutError after
        `timeout_s` seconds (default: the manager's).
        """
        save = self._save
        if save is None:
            raise SaveError(f"step {self.step} was not saved: {self.reason}", step=self.step)
        timeout_s = save.timeout_s if timeout_s is None else timeout_s
        save.wait_for(save.over, timeout_s)
        if save.failure is not None:
            save.was_raised = True
            raise save.failure
        if save.info is None:
            waiting_for = f"the save of step {self.step}"
            raise CheckpointTimeoutError(f"{waiting_for} took longer than {timeout_s} s", waiting_for=waiting_for)
        return save.info
