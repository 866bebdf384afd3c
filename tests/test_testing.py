"""assert_resume_exact: passes for every optimizer, and fails where a run does not resume."""

import jax
import jax.numpy as jnp
import optax
import optimizers
import pytest

from ckptmgr.testing import assert_resume_exact, assert_trees_equal


@pytest.mark.parametrize("name", optimizers.runs())
def test_each_optimizer_resumes_exactly(name):
    params, opt_state, train_step = optimizers.runs()[name]
    assert_resume_exact(train_step, params, opt_state, steps=7, stop_at=4)


def test_state_that_is_not_saved_is_found():
    calls = []

    def train_step(params, opt_state, step):
        calls.append(step)  # hidden state: it is not part of what is saved
        return jax.tree.map(lambda leaf: leaf + len(calls), params), opt_state

    with pytest.raises(AssertionError, match=r"1 leaves differ: \['params'\]\['w'\]"):
        assert_resume_exact(train_step, {"w": jnp.ones(2)}, optax.EmptyState())
    with pytest.raises(ValueError, match="stop_at=6"):
        assert_resume_exact(train_step, {}, steps=6, stop_at=6)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": jnp.ones(2)}, {"a": jnp.ones(2) * (1 + 1e-7)}),
        ({"a": jnp.zeros(1)}, {"a": -jnp.zeros(1)}),
        ({"a": jnp.ones(2)}, {"a": jnp.ones(2, jnp.int32)}),
        ({"a": jnp.asarray(1.0)}, {"a": jnp.float32(1.0)}),
        ({"a": 1}, {"a": 1.0}),
        ({"a": 1}, {"b": 1}),
        ((1, 2), [1, 2]),
        (optax.ScaleByAdamState(1, 2, 3), (1, 2, 3)),
        ({"a": jax.random.key(0)}, {"a": jax.random.key(1)}),
    ],
)
def test_trees_are_equal_only_to_the_last_bit_and_type(one, other):
    assert_trees_equal(one, one)
    with pytest.raises(AssertionError, match="differ"):
        assert_trees_equal(one, other)
