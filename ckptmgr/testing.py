"""For the tests of code that uses ckptmgr: does a run go on after a stop exactly as without it?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ckptmgr.manager import CheckpointManager
from ckptmgr.trees.structure import is_key

TrainStep = Callable[[Any, Any, int], tuple[Any, Any]]


def assert_resume_exact(
    train_step: TrainStep,
    params: Any,
    opt_state: Any = None,
    *,
    steps: int = 6,
    stop_at: int = 3,
    directory: str | None = None,
) -> None:
    """Runs `train_step` once without a stop, once with a stop, a save and a restore; compares bit for bit.

    As in a program that is started again, the templates of the restore are the values that the run starts from,
    not those that were saved. Weak types are compared too: they change what later steps compute.

    Args:
      train_step: `(params, opt_state, step) -> (params, opt_state)`, called with steps 1, 2, ...; it must be
        deterministic: random numbers must depend on its arguments only.
      params, opt_state: the start of the run; not donated.
      steps: how many steps to run.
      stop_at: the step after which to stop, save and restore.
      directory: where to save; a temporary directory if not given.

    Raises AssertionError that names every leaf that differs.
    """
    if not 0 < stop_at < steps:
        raise ValueError(f"stop_at={stop_at} must lie between 0 and steps={steps}")
    straight = _run(train_step, params, opt_state, 1, steps)
    stopped = _run(train_step, params, opt_state, 1, stop_at)
    with tempfile.TemporaryDirectory() as scratch:
        with CheckpointManager(directory or scratch) as manager:
            manager.save(stop_at, *stopped, force=True)
        with CheckpointManager(directory or scratch, read_only=True) as manager:
            back = manager.restore(stop_at, params=params, opt_state=opt_state)
    resumed = _run(train_step, back.params, back.opt_state, stop_at + 1, steps)
    assert_trees_equal({"params": resumed[0], "opt_state": resumed[1]},
                       {"params": straight[0], "opt_state": straight[1]})  # fmt: skip


def _run(train_step: TrainStep, params: Any, opt_state: Any, first: int, last: int) -> tuple[Any, Any]:
    params, opt_state = jax.tree.map(lambda leaf: leaf, (params, opt_state))
    for step in range(first, last + 1):
        params, opt_state = train_step(params, opt_state, step)
    return params, opt_state


def assert_trees_equal(one: Any, other: Any) -> None:
    """Raises AssertionError unless two trees have the same structure, types, dtypes and bits."""
    ones, structure = jax.tree_util.tree_flatten_with_path(one)
    others, other_structure = jax.tree_util.tree_flatten_with_path(other)
    if str(structure) != str(other_structure):
        raise AssertionError(f"the structures differ:\n  {structure}\n  {other_structure}")
    pairs = zip(ones, others, strict=True)
    different = [jax.tree_util.keystr(path) for (path, a), (_, b) in pairs if _bits(a) != _bits(b)]
    if different:
        raise AssertionError(f"{len(different)} leaves differ: {', '.join(different)}")


def _bits(leaf: Any) -> tuple[Any, ...]:
    """Everything in which two leaves can differ: dtype, shape, weak type or Python type, and bits."""
    if isinstance(leaf, jax.Array) and is_key(leaf):
        return str(leaf.dtype), *_bits(jax.random.key_data(leaf))
    array = np.asarray(leaf)
    weak = leaf.weak_type if isinstance(leaf, jax.Array) else type(leaf)
    return array.dtype.name, array.shape, weak, array.tobytes()
