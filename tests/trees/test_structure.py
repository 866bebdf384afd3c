"""Paths, abstract leaves, and plain containers again."""

import collections
import dataclasses
import functools

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.tree_util import DictKey, GetAttrKey

from ckptmgr import CheckpointManager, UnsupportedLeafError
from ckptmgr.trees import structure
from ckptmgr.trees.structure import describe

Pair = collections.namedtuple("Pair", "left right")
describe_params = functools.partial(describe, item="params")


def paths(tree):
    return [leaf.path for leaf in describe_params(tree).leaves]


def test_a_name_that_utf8_cannot_spell_is_refused_before_anything_is_written():
    with pytest.raises(UnsupportedLeafError, match="UTF-8 cannot spell"):
        structure.describe({"\ud800": np.ones(2)}, item="params")


def test_paths_are_those_of_keystr_in_the_order_of_jax():
    tree = {"b": [1, {"x": 2.0}], "a": Pair(jnp.ones(2), (None, np.ones(1)))}
    expected = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    assert paths(tree) == expected == ["['a'].left", "['a'].right[1]", "['b'][0]", "['b'][1]['x']"]
    assert [leaf.name for leaf in describe_params(tree).leaves] == ["a.left", "a.right.1", "b.0", "b.1.x"]


def test_every_kind_of_leaf_is_told_apart():
    tree = [
        jnp.ones((2, 3), jnp.bfloat16),
        np.ones(2, np.int16),
        jax.random.split(jax.random.key(0), 3),
        np.float16(1),
        np.bool_(True),
        True,
        3,
        1.5,
        2j,
        jnp.asarray(1.0),
        jnp.ones((0, 4)),
    ]
    found = [(leaf.kind, leaf.shape, leaf.dtype, leaf.weak) for leaf in describe_params(tree).leaves]
    assert found == [
        ("jax", (2, 3), "bfloat16", False),
        ("numpy", (2,), "int16", False),
        ("key", (3,), "key<fry>", False),
        ("scalar", (), "float16", False),
        ("scalar", (), "bool", False),
        ("bool", (), "bool", False),
        ("int", (), "int64", False),
        ("float", (), "float64", False),
        ("complex", (), "complex128", False),
        ("jax", (), "float32", True),
        ("jax", (0, 4), "float32", False),
    ]


class Opaque:
    pass


def deleted():
    array = jnp.ones(3)
    array.delete()
    return array


@pytest.mark.parametrize(
    ("leaf", "why"),
    [
        ("text", "builtins.str"),
        (Opaque(), "Opaque"),
        (np.array(["a"]), "no form on disk"),
        (np.array([None]), "no form on disk"),
        (np.ones(2, ">f4"), "byte order"),
        (np.zeros(1, "datetime64[s]"), "no form on disk"),
        (np.zeros(1, [("a", "f4")]), "no form on disk"),
        (np.ma.masked_array([1, 2], [True, False]), "MaskedArray"),
        (2**70, "64 bits"),
        (jax.ShapeDtypeStruct((2,), "float32"), "no values"),
        (deleted, "deleted or donated"),
    ],
    ids=lambda value: None if callable(value) or not isinstance(value, str) else value,
)
def test_what_cannot_be_stored_is_refused_by_name_all_at_once(leaf, why):
    leaf = leaf() if callable(leaf) else leaf
    with pytest.raises(UnsupportedLeafError) as caught:
        describe_params({"good": jnp.ones(2), "bad": leaf, "worse": {"x": "text"}})
    assert caught.value.leaf == "['bad']"
    assert "params['bad']" in str(caught.value)
    assert why in str(caught.value)
    assert "params['worse']['x']" in str(caught.value)


def test_saving_inside_jit_is_refused():
    with pytest.raises(UnsupportedLeafError, match=r"tracer: save outside of jax\.jit"):
        jax.jit(lambda x: describe_params({"x": x}).leaves and x)(jnp.ones(2))


@pytest.mark.parametrize("tree", [{"a.b": 1, "a": {"b": 2}}, {"x": {1: 1}, "x.1": 2}])
def test_two_leaves_that_orbax_would_give_one_name_are_refused(tree):
    with pytest.raises(UnsupportedLeafError, match="rename one"):
        describe_params(tree)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    weight: object
    bias: object


def test_a_tree_comes_back_as_plain_containers_with_its_own_keys():
    tree = {
        "n": {7: 1, -2: 2},
        "t": (1, [2, None], ()),
        "p": Pair(1, {}),
        "l": Layer(1, 2),
        "e": optax.EmptyState(),
    }
    spec = describe_params(tree)
    plain = structure.rebuild(spec.outline, jax.tree_util.tree_leaves(tree))
    assert plain == {
        "n": {7: 1, -2: 2},
        "t": (1, [2, None], ()),
        "p": {"left": 1, "right": {}},
        "l": {"weight": 1, "bias": 2},
        "e": {},
    }


def test_custom_nodes_are_named():
    state = optax.adam(1e-3).init({"w": jnp.ones(2)})
    named = structure.containers(describe_params((state, equinox.nn.Linear(2, 2, key=jax.random.key(0)))).outline)
    assert named["[0][0]"].endswith("ScaleByAdamState")
    assert named["[1]"].endswith("Linear")


leaves = st.sampled_from([1, 2.5, True, None])
trees = st.recursive(
    leaves,
    lambda below: st.one_of(
        st.lists(below, max_size=3),
        st.lists(below, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), below, max_size=3),
        st.dictionaries(st.integers(-5, 5), below, max_size=3),
    ),
    max_leaves=12,
)


@given(trees)
def test_any_tree_of_plain_containers_survives_its_description(tree):
    spec = describe_params(tree)
    assert structure.rebuild(spec.outline, jax.tree_util.tree_leaves(tree)) == tree
    assert len(spec.leaves) == len(jax.tree_util.tree_leaves(tree))


class Two:
    """A node of the caller's own, with keys that it chooses."""

    def __init__(self, one, other):
        self.one, self.other = one, other


def registered(first, second):
    class Own(Two):
        pass

    jax.tree_util.register_pytree_with_keys(
        Own, lambda node: (((first, node.one), (second, node.other)), None), lambda _, children: Own(*children)
    )
    return Own


TWICE = [
    (GetAttrKey("layers"), GetAttrKey("layers")),
    (DictKey(1), DictKey("1")),
    (GetAttrKey("x"), DictKey("x")),
]


@pytest.mark.parametrize("keys", TWICE, ids=str)
def test_two_children_of_one_node_with_the_same_key_are_refused(keys, tmp_path):
    """Also if their leaves have names of their own: the outline of the tree would lose one child."""
    tree = {"model": registered(*keys)({"enc": jnp.ones(3)}, {"dec": jnp.zeros(3)})}
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(UnsupportedLeafError, match=r"\['model'\]: two of its children have the key"):
            manager.save(1, tree)
        assert manager.steps() == []


def test_a_key_of_any_type_is_spelled(tmp_path):
    """JAX asks for nothing of a key but that it can be spelled."""
    own = registered("w", "b")
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, own(jnp.ones(3), jnp.zeros(2))).result()
    found = CheckpointManager(tmp_path, read_only=True).restore(params=own(jnp.zeros(3), jnp.ones(2))).params
    assert (found.one == 1).all()
    assert (found.other == 0).all()
