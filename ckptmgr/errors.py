"""The errors about checkpoints; each is a built-in exception too.

    CheckpointError
    ├── CheckpointNotFoundError   [FileNotFoundError]       directory, step
    ├── CheckpointExistsError     [FileExistsError]         step
    ├── CorruptCheckpointError    [OSError]                 step, path, leaf
    ├── DistrustedError           [LookupError]             step
    ├── NewerFormatError          [NotImplementedError]     step, format
    ├── StructureMismatchError    [ValueError]              diff
    │   └── ReducedCheckpointError                          diff, step, items
    ├── LayoutError               [ValueError]              leaf
    ├── UnsupportedLeafError      [TypeError]               leaf
    ├── SaveError                 [RuntimeError]            step, holder, and the cause
    ├── CheckpointTimeoutError    [TimeoutError]            waiting_for, missing
    └── UnsafePickleError         [pickle.UnpicklingError]  name

A message says what is wrong, where (leaf path, step, file), and what to do.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence

from ckptmgr.specs import LeafDiff, StructureDiff


class CheckpointError(Exception):
    """Base of every error about checkpoints. A wrong argument raises ValueError or TypeError."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint to restore, or none with this number."""

    def __init__(self, message: str, *, directory: str, step: int | None = None) -> None:
        super().__init__(message)
        self.directory = directory
        self.step = step


class CheckpointExistsError(CheckpointError, FileExistsError):
    """A checkpoint with this step number is already there."""

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step


class CorruptCheckpointError(CheckpointError, OSError):
    """A committed checkpoint is damaged; `path` names the file and `leaf` the leaf, if they are known."""

    def __init__(self, message: str, *, step: int, path: str | None = None, leaf: str | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.path = path
        self.leaf = leaf


class DistrustedError(CheckpointError, LookupError):
    """A step is distrusted, so `restore()` takes the step before. No call raises it: it only travels in a job."""

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step


class NewerFormatError(CheckpointError, NotImplementedError):
    """A later version of ckptmgr wrote the checkpoint: it is not damaged, and nothing of it is touched."""

    def __init__(self, message: str, *, step: int, format: int) -> None:
        super().__init__(message)
        self.step = step
        self.format = format


class StructureMismatchError(CheckpointError, ValueError):
    """The template does not fit the checkpoint; `diff` holds every difference by leaf."""

    def __init__(self, message: str, *, diff: StructureDiff) -> None:
        super().__init__(message)
        self.diff = diff


class ReducedCheckpointError(StructureMismatchError):
    """`params_only` has deleted items from the step, and a template asks for them; `items` names them."""

    def __init__(self, message: str, *, step: int, items: Sequence[str]) -> None:
        missing = (LeafDiff(name, None, None, "missing") for name in items)
        super().__init__(message, diff=StructureDiff(tuple(missing)))
        self.step = step
        self.items = tuple(items)


class LayoutError(CheckpointError, ValueError):
    """A leaf cannot be placed where `layout` wants it."""

    def __init__(self, message: str, *, leaf: str | None = None) -> None:
        super().__init__(message)
        self.leaf = leaf


class UnsupportedLeafError(CheckpointError, TypeError):
    """A leaf cannot be stored; `leaf` is the path of the first one, the message names them all.

    Also raised for a template of an item that another library wrote and ckptmgr does not read.
    """

    def __init__(self, message: str, *, leaf: str) -> None:
        super().__init__(message)
        self.leaf = leaf


class SaveError(CheckpointError, RuntimeError):
    """A save was refused or failed; earlier checkpoints do not change. `step` is None if it is about the run.

    `holder` tells which other process writes into the run, if that is why.
    """

    def __init__(self, message: str, *, step: int | None, holder: str | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.holder = holder


class CheckpointTimeoutError(CheckpointError, TimeoutError):
    """A wait took longer than its bound; `waiting_for` says for what, `missing` has the missing processes."""

    def __init__(self, message: str, *, waiting_for: str, missing: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.waiting_for = waiting_for
        self.missing = tuple(missing)


class UnsafePickleError(CheckpointError, pickle.UnpicklingError):
    """A pickle uses a name that is not allowed, or is damaged; `name` is that name."""

    def __init__(self, message: str, *, name: str) -> None:
        super().__init__(message)
        self.name = name
