"""Checkpoints of JAX and optax training: saved whole, restored exactly, read by stock Orbax."""

from ckptmgr.cadence import as_often_as_possible, overhead
from ckptmgr.costs import Cost, Costs, Saving
from ckptmgr.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CheckpointTimeoutError,
    CorruptCheckpointError,
    LayoutError,
    NewerFormatError,
    ReducedCheckpointError,
    SaveError,
    StructureMismatchError,
    UnsafePickleError,
    UnsupportedLeafError,
)
from ckptmgr.hyperparams import get_hyperparams, set_hyperparams
from ckptmgr.manager import CheckpointManager
from ckptmgr.policies import (
    InformedSavePolicy,
    Keep,
    KeepPolicy,
    Record,
    SaveEvery,
    SavePolicy,
    at_steps,
    best,
    every_seconds,
    every_steps,
    latest,
    params_only,
)
from ckptmgr.results import Checkpoint, CheckpointInfo, Damage, SaveResult, VerifyReport
from ckptmgr.specs import LeafDiff, LeafSpec, Optimizer, PyTree, StructureDiff
from ckptmgr.trees.layouts import HOST, Layout

__version__ = "0.2.0"

__all__ = [
    "HOST",
    "Checkpoint",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointInfo",
    "CheckpointManager",
    "CheckpointNotFoundError",
    "CheckpointTimeoutError",
    "CorruptCheckpointError",
    "Cost",
    "Costs",
    "Damage",
    "InformedSavePolicy",
    "Keep",
    "KeepPolicy",
    "Layout",
    "LayoutError",
    "LeafDiff",
    "LeafSpec",
    "NewerFormatError",
    "Optimizer",
    "PyTree",
    "Record",
    "ReducedCheckpointError",
    "SaveError",
    "SaveEvery",
    "SavePolicy",
    "SaveResult",
    "Saving",
    "StructureDiff",
    "StructureMismatchError",
    "UnsafePickleError",
    "UnsupportedLeafError",
    "VerifyReport",
    "as_often_as_possible",
    "at_steps",
    "best",
    "every_seconds",
    "every_steps",
    "get_hyperparams",
    "latest",
    "overhead",
    "params_only",
    "set_hyperparams",
]
