"""What the calls of a manager return: `SaveResult`, `CheckpointInfo`, `Checkpoint`, `VerifyReport`."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, NamedTuple

import jax
from typing_extensions import TypeVar

from ckptmgr import notebook
from ckptmgr.errors import CheckpointTimeoutError, SaveError
from ckptmgr.format.manifest import leaf_nbytes
from ckptmgr.processes.background import Moment
from ckptmgr.specs import LeafSpec, fit_line
from ckptmgr.units import format_bytes, format_s

Params = TypeVar("Params", default=Any)
"""The type of a template of the params, and so of the params that are restored into it."""
OptState = TypeVar("OptState", default=Any)
_Params = TypeVar("_Params", default=Any, covariant=True)
_OptState = TypeVar("_OptState", default=Any, covariant=True)


_NONE: Any = None


def _empty() -> Any:
    return dataclasses.field(default_factory=dict)


_SHORT = reprlib.Repr()
_SHORT.maxdict = _SHORT.maxtuple = 3
_SHORT.maxstring = 40
_SHOWN = ("distrusted", "reduced", "pinned", "metrics", "kept")
"""Fields that the repr of a CheckpointInfo shows if they are not empty."""


def _names(names: Iterable[object]) -> str:
    return _SHORT.repr(tuple(names))


def _sizes(tree: Any) -> tuple[str, str]:
    """How many leaves a tree has, and how many bytes its arrays; none is copied or waited for."""
    leaves = jax.tree.leaves(tree)
    return f"{len(leaves):,}", format_bytes(sum(getattr(leaf, "nbytes", 0) for leaf in leaves))


def _counted(tree: Any) -> str:
    count = len(jax.tree.leaves(tree))
    return "None" if tree is None else f"<{count} {'leaf' if count == 1 else 'leaves'}>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What is known of a checkpoint without reading its arrays."""

    step: int
    time: float
    """When `save` was called, in seconds since the epoch."""
    nbytes: int = 0
    """Bytes of all arrays, before compression."""
    disk_nbytes: int = 0
    """Bytes of all files except the manifest; 0 for a checkpoint of stock Orbax."""
    blocked_s: float | None = None
    """Seconds that the caller of `save` waited; known, like `durable_s`, only in the process that saved."""
    durable_s: float | None = None
    """Seconds from the call of `save` until the checkpoint was durable."""
    items: tuple[str, ...] = ()
    leaves: Mapping[str, tuple[LeafSpec, ...]] = _empty()
    """The leaves of each item that holds arrays."""
    unread: Mapping[str, str] = _empty()
    """Items that another library wrote and ckptmgr does not read: why not, and what reads them."""
    metrics: Mapping[str, float] = _empty()
    metadata: Mapping[str, Any] = _empty()
    versions: Mapping[str, str] = _empty()
    """Versions of the libraries it was written with; empty for a checkpoint of stock Orbax."""
    pinned: bool = False
    distrusted: str | None = None
    """Why it is not to be used: somebody distrusts it, NaN or infinity was found in it, or it is not whole (a file
    is missing, say). Retention does not count it then. None if it is trusted."""
    reduced: str | None = None
    """Which `params_only` policy has reduced it to its params, and when; None if it has all its items."""
    source: str | None = None
    """The directory it was restored from, or saved to: of the run, of its mirror, or of `local`. Only
    `Checkpoint.info` and the result of a local save have it."""
    kept: tuple[str, ...] = ()
    """Why retention keeps it; empty if retention would delete it. Only `info` and `infos` of a manager
    fill it in."""

    def __repr__(self) -> str:
        count = sum(map(len, self.leaves.values()))
        parts = [f"step={self.step}", f"items={_names(self.items)}", f"leaves={count}", f"nbytes={self.nbytes}"]
        parts += [f"{name}={_SHORT.repr(given)}" for name in _SHOWN if (given := getattr(self, name))]
        return fit_line("CheckpointInfo", *parts)

    @notebook.safely
    def _repr_html_(self) -> str:
        facts = {
            "saved": notebook.when(self.time), "arrays": format_bytes(self.nbytes),
            "on disk": format_bytes(self.disk_nbytes) if self.disk_nbytes else "",
            "the caller waited": "" if self.blocked_s is None else format_s(self.blocked_s),
            "durable after": "" if self.durable_s is None else format_s(self.durable_s),
            "distrusted": self.distrusted, "reduced": self.reduced, "kept by": ", ".join(self.kept),
            "pinned": "yes" if self.pinned else "", "source": self.source,
        }  # fmt: skip
        return notebook.page(
            f"CheckpointInfo: step {self.step}",
            notebook.facts(facts),
            notebook.table(("item", "leaves", "bytes"), map(self._item, self.items), len(self.items), "items"),
            notebook.mapping(("metric", "value"), self.metrics, "metrics"),
            notebook.mapping(("metadata", "value"), self.metadata, "entries"),
        )

    def _item(self, name: str) -> tuple[str, object, str]:
        leaves = self.leaves.get(name)
        if leaves is None:
            return name, "", f"not read: {self.unread[name]}" if name in self.unread else ""
        return name, f"{len(leaves):,}", format_bytes(sum(map(leaf_nbytes, leaves)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(Generic[_Params, _OptState]):
    """A restored checkpoint, or the start values of a run without one.

    For a type checker `params` and `opt_state` have the types of their templates, and are `Any` without one.
    """

    step: int
    params: _Params = _NONE
    opt_state: _OptState = _NONE
    extras: Mapping[str, Any] = _empty()
    metrics: Mapping[str, float] = _empty()
    info: CheckpointInfo | None = None
    resumed: bool = True
    """False if nothing was saved yet: then these are the values given to `restore_or`."""
    skipped: Mapping[int, str] = _empty()
    """Newer steps that were passed over as damaged, distrusted or reduced to their params, and why."""
    missing: tuple[str, ...] = ()
    """With `partial`: leaves that the checkpoint lacks; they have the template's value, or the optimizer's."""
    unused: tuple[str, ...] = ()
    """With `partial`: leaves of the checkpoint that the template lacks; they were not read."""

    def __repr__(self) -> str:
        parts = [f"step={self.step}"]
        parts += [f"{name}={_counted(getattr(self, name))}" for name in ("params", "opt_state")]
        parts += [f"{name}={_names(given)}" for name in ("extras", "skipped") if (given := getattr(self, name))]
        parts += [f"{name}={len(paths)}" for name in ("missing", "unused") if (paths := getattr(self, name))]
        return fit_line("Checkpoint", *parts, f"resumed={self.resumed}")

    @notebook.safely
    def _repr_html_(self) -> str:
        trees = {"params": self.params, "opt_state": self.opt_state, **self.extras}
        rows = ((name, *_sizes(tree)) for name, tree in trees.items() if tree is not None)
        source = self.info.source if self.info is not None else None
        return notebook.page(
            f"Checkpoint: step {self.step}, " + ("restored" if self.resumed else "the start of a new run"),
            notebook.facts({"source": source, "saved": notebook.when(self.info.time) if self.info else ""}),
            notebook.table(("item", "leaves", "bytes"), rows, len(trees), "items"),
            notebook.mapping(("metric", "value"), self.metrics, "metrics"),
            notebook.mapping(("step passed over", "why"), self.skipped, "steps"),
            notebook.names("leaves that the checkpoint lacks", self.missing),
            notebook.names("leaves that were not read", self.unused),
        )


class Damage(NamedTuple):
    """A damaged file or leaf of a checkpoint."""

    where: str
    reason: str

    def __repr__(self) -> str:
        return fit_line("Damage", repr(self.where), repr(self.reason))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify` found; falsy if anything is damaged."""

    step: int
    damages: tuple[Damage, ...] = ()
    unchecked: tuple[str, ...] = ()
    """What could not be checked, because stock Orbax wrote it without a checksum."""
    files: int = 0
    leaves: int = 0
    nbytes: int = 0
    """Bytes of the arrays that were read."""

    def __bool__(self) -> bool:
        return not self.damages

    def __repr__(self) -> str:
        parts = [f"step={self.step}", f"damages={_names(where for where, _ in self.damages)}"]
        parts += [f"{name}={getattr(self, name)}" for name in ("files", "leaves", "nbytes")]
        return fit_line("VerifyReport", *parts)

    @notebook.safely
    def _repr_html_(self) -> str:
        facts = {"files": self.files, "leaves": self.leaves, "arrays": format_bytes(self.nbytes)}
        return notebook.page(
            f"VerifyReport: step {self.step} is {'whole' if self else 'damaged'}",
            notebook.facts(facts),
            notebook.table(("damaged", "how"), self.damages, len(self.damages), "damages"),
            notebook.names("not checked", self.unchecked),
        )

    def __str__(self) -> str:
        arrays = f"{self.leaves} leaves, {format_bytes(self.nbytes)} of arrays"
        counted = f"step {self.step}: {self.files} files, {arrays}"
        if self:
            return f"{counted}: whole" + "".join(f"\n  not checked: {what}" for what in self.unchecked)
        return f"{counted}: damaged" + "".join(f"\n  {where}: {reason}" for where, reason in self.damages)


class Save:
    """A save that was accepted. Once it is `over`, it has an `info` or a `failure`."""

    def __init__(
        self,
        step: int,
        timeout_s: float,
        wait_for: Callable[[Moment, float], bool],
        named: Callable[[CheckpointTimeoutError], CheckpointTimeoutError],
    ) -> None:
        self.step = step
        self.over = Moment()
        self.timeout_s = timeout_s
        self.wait_for = wait_for
        """Waits so many seconds for a moment that the writing thread sets; returns whether it came."""
        self.named = named
        """Adds to an error which processes of the job the save waits for."""
        self.info: CheckpointInfo | None = None
        self.failure: SaveError | None = None
        self.was_raised = False


class SaveResult:
    """The result of a call of `save`: truthy if a save was started."""

    def __init__(self, step: int, reason: str, save: Save | None = None) -> None:
        self.step = step
        self.reason = reason
        """Why the step was saved, or why it was not."""
        self._save = save

    def __bool__(self) -> bool:
        return self._save is not None

    def __repr__(self) -> str:
        state = "not saved" if self._save is None else "durable" if self.done() else "being written"
        return fit_line("SaveResult", f"step={self.step}", f"{state}: {self.reason}")

    def done(self) -> bool:
        """Whether the save is over: the step is durable, or the save failed or was never started."""
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
            late = CheckpointTimeoutError(f"{waiting_for} took longer than {timeout_s} s", waiting_for=waiting_for)
            raise save.named(late)
        return save.info
