"""NaN and infinity are found in every leaf that may hold them, on devices and on the host, and nowhere else."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckptmgr
from ckptmgr.arrays import finite
from ckptmgr.saving import items

WITH_NAN = [
    "float16", "float32", "bfloat16", "complex64", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz",
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def found(tree):
    """The paths in which a search finds something."""
    composed = items.Composer().tree("params", tree)
    search = finite.Finder().start("params", composed.spec, composed.leaves)
    copies = [(place, [((), np.array(leaf))]) for place, leaf in enumerate(composed.leaves) if on_host(leaf)]
    search.look(copies)
    bits = int(search.marks(), 16)
    return [leaf.path for place, leaf in enumerate(composed.spec.leaves) if bits >> place & 1]


def on_host(leaf):
    return not isinstance(leaf, jax.Array)


def with_one(bad, dtype, shape=(8, 3)):
    """One bad value at the end."""
    values = np.ones(shape, dtype)
    values[(-1,) * len(shape)] = bad
    return values


@pytest.mark.parametrize("name", WITH_NAN)
def test_one_nan_is_found_in_every_dtype_that_has_it(name):
    dtype = dtype_of(name)
    good, bad = np.ones((8, 3), dtype), with_one(np.nan, dtype)
    tree = {"good": jnp.asarray(good), "bad": jnp.asarray(bad), "good on host": good, "bad on host": bad}
    assert found(tree) == ["['bad']", "['bad on host']"]


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e5m2"])
def test_infinity_is_found_too(name, bad):
    assert found({"w": jnp.asarray(with_one(bad, dtype_of(name)))}) == ["['w']"]


@pytest.mark.parametrize("bad", [complex(np.nan, 0), complex(0, np.nan), complex(np.inf, 0), complex(0, -np.inf)])
def test_both_parts_of_a_complex_number_are_looked_at(bad):
    values = with_one(bad, np.complex64)
    assert found({"host": values, "w": jnp.asarray(values)}) == ["['host']", "['w']"]


def test_what_cannot_hold_them_is_passed_over():
    tree = {
        "key": jax.random.key(0), "keys": jax.random.split(jax.random.key(0, impl="rbg"), 3),
        "int": jnp.arange(3), "bool": jnp.array([True]), "int4": jnp.ones(3, jnp.int4), "none": None,
        "numpy int": np.arange(3), "Python": 3, "yes": True, "empty": jnp.zeros((0, 3)),
        "empty on host": np.zeros((3, 0)), "float4": jnp.ones(3, jnp.float4_e2m1fn), "zero": jnp.float32(0),
    }  # fmt: skip
    assert found(tree) == []
    assert found({}) == []


@pytest.mark.parametrize("leaf", [float("nan"), complex(0, float("inf")), np.float32("nan"), np.array(np.inf)])
def test_single_numbers_count(leaf):
    assert found({"a": 1.0, "x": leaf}) == ["['x']"]
    assert found({"a": 1.0, "x": jnp.asarray(leaf)}) == ["['x']"]


@pytest.mark.parametrize("spec", [P(), P("data"), P(None, "model"), P("model", "data"), P(("data", "model"))])
@pytest.mark.parametrize("where", [(0, 0), (-1, -1), (3, 7)])
def test_it_is_found_in_whichever_shard_it_is(make_mesh, spec, where):
    mesh = make_mesh(data=4, model=2)
    values = np.ones((16, 8), np.float32)
    values[where] = np.nan
    one = jax.device_put(jnp.ones(3), jax.devices()[5])
    tree = {
        "w": jax.device_put(values, NamedSharding(mesh, spec)), "one": one, "fine": jnp.ones(2),
        "kept": jax.device_put(np.ones((16, 8), np.float32), NamedSharding(mesh, spec)),
    }  # fmt: skip
    assert found(tree) == ["['w']"]
    with jax.set_mesh(make_mesh(other=8)):
        assert found(tree) == ["['w']"]


def test_arrays_on_several_meshes_at_once(make_mesh):
    one, other = make_mesh(a=8), make_mesh(b=2, c=2)
    bad = with_one(np.nan, np.float32, (8, 8))
    tree = {
        "one": jax.device_put(bad, NamedSharding(one, P("a"))),
        "other": jax.device_put(bad, NamedSharding(other, P("b", "c"))),
        "alone": jax.device_put(bad, jax.devices()[7]),
    }
    assert found(tree) == ["['alone']", "['one']", "['other']"]


def test_more_leaves_than_one_program_takes():
    tree = {f"{n:03}": jnp.full((2, 1 + n % 3), np.nan if n in (0, 200, 299) else 1.0) for n in range(300)}
    assert found(tree) == ["['000']", "['200']", "['299']"]


def test_leaves_of_one_shape_share_a_program():
    made = finite._are_finite._cache_size()
    assert found({f"{n:03}": jnp.full((2, 5 + n % 2), np.nan if n == 150 else 1.0) for n in range(192)}) == [
        "['150']"
    ]
    assert finite._are_finite._cache_size() == made + 2


def test_a_program_is_made_once_for_a_structure():
    finder, composer = finite.Finder(), items.Composer()

    def search(value):
        tree = composer.tree("params", {"w": jnp.full((5, 7), value), "b": jnp.full(11, value)})
        return finder.start("params", tree.spec, tree.leaves)

    assert search(np.nan).verdict([search(np.nan).marks()]) == "params hold NaN or infinity: ['b'], ['w']"
    made = finite._are_finite._cache_size()
    assert search(1.0).verdict([search(1.0).marks()]) is None
    assert finite._are_finite._cache_size() == made


def test_few_leaves_are_named_and_all_are_counted():
    tree = items.Composer().tree("params", [1.0] * 9)
    search = finite.Finder().start("params", tree.spec, tree.leaves)
    assert search.verdict(["0", "4"]) == "params hold NaN or infinity: [2]"
    assert search.verdict(["1", "6"]) == "params hold NaN or infinity: [0], [1], [2]"
    assert search.verdict(["1", "1e"]) == "params hold NaN or infinity: [0], [1] and 3 more"
    alone = items.Composer().tree("opt_state", jnp.ones(3))
    search = finite.Finder().start("opt_state", alone.spec, alone.leaves)
    assert search.verdict(["1"]) == "opt_state holds NaN or infinity"


def test_an_array_in_the_memory_of_the_host_is_looked_at_in_its_copy(tmp_path):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    bad = jax.device_put(with_one(np.nan, np.float32), place)
    with ckptmgr.CheckpointManager(tmp_path, nonfinite="distrust") as manager:
        saved = manager.save(1, {"w": bad, "b": jnp.ones(3)}).result()
    assert saved.distrusted == "params hold NaN or infinity: ['w']"
