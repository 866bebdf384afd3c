"""The mean of trees: what it adds up, what must be equal, and what it holds at a time."""

import weakref

import jax
import ml_dtypes
import numpy as np
import pytest

from ckptmgr.trees import averaging


def named(*trees):
    return [(f"step {n}", tree) for n, tree in enumerate(trees)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float16", "float32", "float64", "complex64"])
def test_floats_are_added_up_in_float32_or_wider_and_get_their_dtype_back(dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    values = [np.random.default_rng(n).uniform(0.5, 1, (50, 3)).astype(kind) for n in range(9)]
    found = averaging.mean(named(*({"w": value} for value in values)))["w"]
    wide = np.complex128 if kind.kind == "c" else np.float64
    exact = np.mean([value.astype(wide) for value in values], axis=0)
    assert found.dtype == kind
    if kind.itemsize < 4:  # as if it had been computed exactly and then rounded
        assert np.array_equal(found, exact.astype(np.float32).astype(kind))
    else:
        assert np.allclose(found, exact, rtol=1e-6 if kind.itemsize == 4 or dtype == "complex64" else 1e-15)


def test_a_sum_in_bfloat16_would_be_wrong():
    """Otherwise the test above could not fail: 1 + 1/256 is 1 in bfloat16."""
    small = np.array(1 / 256, ml_dtypes.bfloat16)
    trees = named(np.array(1, ml_dtypes.bfloat16), *[small] * 255)
    assert averaging.mean(trees) == np.array((1 + 255 / 256) / 256, ml_dtypes.bfloat16)


def test_what_is_no_float_must_be_equal_and_stays_as_it_is():
    tree = {"n": np.int32(3), "flag": True, "key": jax.random.key(1), "text": "adam", "lr": 0.5, "none": None}
    found = averaging.mean(named(tree, tree | {"lr": 0.25}, tree | {"lr": 0.75}))
    assert found.pop("key") == tree.pop("key")
    assert found == tree
    assert type(found["lr"]) is float
    for name, other in {"n": np.int32(4), "flag": False, "key": jax.random.key(2), "text": "sgd"}.items():
        tree = {"n": np.int32(3), "flag": True, "key": jax.random.key(1), "text": "adam"}
        with pytest.raises(
            ValueError, match=rf"params\['{name}'\] is no floating .* differs between step 0 and step 1"
        ):
            averaging.mean(named(tree, tree | {name: other}), "params")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"w": np.ones(2)}, r"\['b'\] is in step 0 and not in step 1"),
        ({"w": np.ones(2), "b": np.ones(1), "c": np.ones(1)}, r"\['c'\] is in step 1 and not in step 0"),
        ({"w": np.ones(3), "b": np.ones(1)}, r"\['w'\] is float64\[2\] in step 0 and float64\[3\] in step 1"),
        ({"w": np.ones(2, np.float32), "b": np.ones(1)}, r"float64\[2\] in step 0 and float32\[2\] in step 1"),
        ({"w": np.ones(2), "b": np.ones(1, int)}, r"\['b'\] is float64\[1\] in step 0 and int64\[1\] in step 1"),
    ],
)
def test_other_structures_are_refused_by_name(other, said):
    with pytest.raises(ValueError, match=said):
        averaging.mean(named({"w": np.ones(2), "b": np.ones(1)}, other))


def test_nothing_is_not_averaged():
    with pytest.raises(ValueError, match="nothing to average"):
        averaging.mean([])


def test_one_tree_is_held_at_a_time_beside_the_sum():
    alive = []

    def trees():
        for n in range(5):
            assert not any(each() is not None for each in alive)
            array = np.full(1000, float(n))
            alive.append(weakref.ref(array))
            yield f"step {n}", {"w": array}
            del array

    assert averaging.mean(trees())["w"][0] == 2.0
    assert not any(each() is not None for each in alive)
