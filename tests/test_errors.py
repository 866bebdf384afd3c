"""The error tree: what each error is, besides, and what it carries."""

import pickle

import pytest

import ckptmgr
from ckptmgr import errors

TREE = {
    ckptmgr.CheckpointNotFoundError: (FileNotFoundError, {"directory": "/run", "step": 3}),
    ckptmgr.CheckpointExistsError: (FileExistsError, {"step": 3}),
    ckptmgr.CorruptCheckpointError: (OSError, {"step": 3, "path": "params/_METADATA", "leaf": "params['w']"}),
    errors.DistrustedError: (LookupError, {"step": 3}),
    ckptmgr.NewerFormatError: (NotImplementedError, {"step": 3, "format": 9}),
    ckptmgr.StructureMismatchError: (ValueError, {"diff": ckptmgr.StructureDiff()}),
    ckptmgr.ReducedCheckpointError: (ValueError, {"step": 3, "items": ("opt_state",)}),
    ckptmgr.LayoutError: (ValueError, {"leaf": "params['w']"}),
    ckptmgr.UnsupportedLeafError: (TypeError, {"leaf": "params['w']"}),
    ckptmgr.SaveError: (RuntimeError, {"step": 3}),
    ckptmgr.CheckpointTimeoutError: (TimeoutError, {"waiting_for": "the save of step 3"}),
    ckptmgr.UnsafePickleError: (pickle.UnpicklingError, {"name": "os.system"}),
}


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_each_error_is_a_checkpoint_error_and_a_builtin_one_and_carries_its_facts(kind):
    builtin, facts = TREE[kind]
    error = kind("what, where, what to do", **facts)
    assert isinstance(error, ckptmgr.CheckpointError)
    assert isinstance(error, builtin)
    assert str(error) == "what, where, what to do"
    assert {name: getattr(error, name) for name in facts} == facts


def test_the_tree_above_is_complete():
    defined = {each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)}
    assert defined == {*TREE, ckptmgr.CheckpointError}
