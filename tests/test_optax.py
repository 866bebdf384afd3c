"""Every transformation of optax comes back exactly, in each way of restoring it, and its run goes on bit for bit."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformations
from conftest import counted

import ckptmgr

STOP, STEPS = 2, 5

# name -> why the rules of transformations.py cannot build it
NOT_BUILT: dict[str, str] = {}

# name -> the ways of restoring whose template is no template of what was saved, and why
REFUSED = {
    "optax.lookahead": ({"optimizer alone"}, "without a params template they are dicts, and no LookaheadParams"),
    "optax.monitor": ({"live", "abstract", "optimizer", "optimizer alone"}, "its init has none of the measurements"),
}

TRANSFORMATIONS = transformations.transformations()


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Saves a state as the next step of one run; returns what restores that step."""
    steps = itertools.count()
    with ckptmgr.CheckpointManager(tmp_path_factory.mktemp("optax")) as manager:

        def save(params, opt_state):
            step = next(steps)
            manager.save(step, params, opt_state).result()
            return lambda **templates: manager.restore(step, **templates)

        yield save


@contextlib.contextmanager
def no_implicit_transfer():
    """In every thread: the manager's own too."""
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        yield
    finally:
        jax.config.update("jax_transfer_guard", "allow")


def ways(training, start):
    """The templates of the four ways to restore a run."""
    params, opt_state = start
    abstract = jax.eval_shape(lambda: start)
    return {
        "live": {"params": params, "opt_state": opt_state},
        "abstract": {"params": abstract[0], "opt_state": abstract[1]},
        "optimizer": {"params": params, "optimizer": training.optimizer},
        "optimizer alone": {"optimizer": training.optimizer},
    }


def run(step, state, first, last):
    for number in range(first, last):
        state = step(*state, number)
    return state


def goes_on_exactly(save, training, step, start=None):
    """Saves after STOP steps; each way brings back that state, and the run ends as one that was never stopped.

    Returns the ways whose template is refused.
    """
    stopped = run(step, start or training.init(), 0, STOP)
    straight = run(step, stopped, STOP, STEPS)
    compiled = compilations(step)
    with no_implicit_transfer():
        restore = save(*stopped)
    refused = set()
    for way, templates in ways(training, training.init()).items():
        try:
            with no_implicit_transfer():
                back = restore(**templates)
        except ckptmgr.StructureMismatchError as refusal:
            if "opt_state" not in templates or {leaf.problem for leaf in refusal.diff.leaves} != {"dtype"}:
                refused.add(way)
                continue
            back = restore(**ways(training, stopped)[way])  # the dtypes of optax's init are not those of its update
        same((back.params, back.opt_state), stopped, way)
        same(run(step, (back.params, back.opt_state), STOP, STEPS), straight, f"{way}, three steps later")
        assert compilations(step) == compiled, f"{way}: the restored state compiles the step again"
    return refused


def compilations(step):
    return step._cache_size() if hasattr(step, "_cache_size") else 0


def same(one, other, when):
    """Fails unless two trees have the same containers, and leaves of the same kind, dtype, weak type and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other), when
    leaves = zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True)
    differ = {jax.tree_util.keystr(path): (told(a), told(b)) for (path, a), b in leaves if told(a) != told(b)}
    assert not differ, when


def told(leaf):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), *told(jax.random.key_data(leaf))
    array = np.asarray(leaf)
    return type(leaf), array.dtype, array.shape, getattr(leaf, "weak_type", None), array.tobytes()


@pytest.mark.parametrize("name", sorted(TRANSFORMATIONS.keys() - NOT_BUILT))
def test_every_transformation_comes_back_exactly_and_goes_on(save, name):
    training = transformations.training(TRANSFORMATIONS[name])
    refused = goes_on_exactly(save, training, compiled(training), training.init_strongly())
    assert refused == REFUSED.get(name, ({}, ""))[0]


def compiled(training):
    """The step as one compiled function; what it costs to run does not count, and what it costs to compile does."""
    return jax.jit(training.step, compiler_options={"xla_backend_optimization_level": 0})
