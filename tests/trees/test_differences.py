"""What differs between a checkpoint and a template."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ckptmgr import StructureDiff, StructureMismatchError
from ckptmgr.trees import differences
from ckptmgr.trees.structure import describe

Pair = collections.namedtuple("Pair", "left right")
describe_params = functools.partial(describe, item="params")


def between(saved, template):
    return differences.compare(
        describe_params(saved), describe(template, item="params", is_template=True), "params"
    )


def test_equal_trees_do_not_differ_and_containers_of_one_shape_stand_for_each_other():
    tree = {"w": jnp.ones((2, 3)), "n": (1, [2])}
    assert not between(tree, jax.eval_shape(lambda: {"w": jnp.ones((2, 3))}) | {"n": (1, [2])})
    assert not between({"p": Pair(1, 2)}, {"p": {"left": 1, "right": 2}})
    assert not between([1, 2], (1, 2))


def test_every_difference_is_named_with_both_sides():
    saved = {"same": jnp.ones(2), "shape": jnp.ones((2, 3)), "dtype": jnp.ones(2), "gone": jnp.ones(4)}
    template = {
        "same": jnp.ones(2),
        "shape": jnp.ones((2, 4)),
        "dtype": jnp.ones(2, jnp.int32),
        "new": jnp.ones(5),
    }
    diff = between(saved, template)
    assert [leaf.path for leaf in diff.shape] == ["params['shape']"]
    assert [leaf.path for leaf in diff.dtype] == ["params['dtype']"]
    assert [leaf.path for leaf in diff.missing] == ["params['new']"]
    assert [leaf.path for leaf in diff.unexpected] == ["params['gone']"]
    assert "params['same']" not in str(diff)
    table = {line.split()[0]: line for line in str(diff).splitlines()}
    assert "float32[2,3]" in table["params['shape']"]
    assert "float32[2,4]" in table["params['shape']"]
    assert "int32[2]" in table["params['dtype']"]
    assert "float32[5]" in table["params['new']"]
    assert "partial=True" in table["params['gone']"]
    with pytest.raises(StructureMismatchError, match="4 leaves differ") as caught:
        differences.raise_if_different(diff, "step 3 does not fit the template of params")
    assert caught.value.diff is diff


def test_another_optimizer_is_told_by_its_states():
    params = {"w": jnp.ones(2)}
    diff = between(optax.adam(1e-3).init(params), optax.sgd(1e-3, momentum=0.9).init(params))
    assert ("params[0]", "ScaleByAdamState", "TraceState") in diff.containers
    assert {leaf.path for leaf in diff.unexpected} == {"params[0].count", "params[0].mu['w']", "params[0].nu['w']"}
    assert {leaf.path for leaf in diff.missing} == {"params[0].trace['w']"}


@pytest.mark.parametrize(
    ("saved", "template", "differs"),
    [
        (1, 2, False),
        (jnp.int32(1), 2, False),
        (np.float32(1), 2.0, False),
        (1.5, 2, True),
        (1, jnp.int32(1), True),
        (True, 1, True),
        (jnp.ones(2, bool), jnp.ones(2, jnp.int8), True),
        (jax.random.key(0), jax.random.key(0, impl="rbg"), True),
        (jax.random.key(0), jax.random.key_data(jax.random.key(0)), True),
    ],
)
def test_a_python_number_takes_any_number_that_it_holds_exactly(saved, template, differs):
    assert bool(between({"x": saved}, {"x": template})) is differs


def test_rename_moves_leaves_and_refuses_to_merge_two():
    saved = describe_params({"encoder": {"w": 1}, "head": {"w": 2}})
    template = describe_params({"backbone": {"w": 1}, "head": {"w": 2}})
    rules = differences.rename_rules({r"^\['encoder'\]": "['backbone']", "decoder": "x"})
    used = set()
    moved = differences.renamed(saved, rules, template, used)
    assert not differences.compare(moved, template, "params")
    assert [rule.pattern for rule in rules if rule not in used] == ["decoder"]
    with pytest.raises(ValueError, match="rename gives two leaves"):
        differences.renamed(saved, differences.rename_rules({r"encoder": "head"}), template, set())


def test_an_empty_difference_is_falsy_and_differences_add_up():
    one = between({"a": 1}, {"b": 1})
    assert not StructureDiff()
    assert len((one + one).leaves) == 4
    assert not one.without("missing", "unexpected")


def test_a_message_about_thousands_of_leaves_stays_short():
    found = between({f"old {n}": n for n in range(3000)}, {f"new {n}": n for n in range(3000)})
    assert len(found.leaves) == 6000
    assert len(str(found)) < 8_000
    assert "... and 5960 more leaves, all of them in the error's .diff" in str(found)
