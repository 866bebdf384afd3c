"""Where restored leaves go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import ckptmgr
from ckptmgr import CheckpointManager, LayoutError
from ckptmgr.testing import assert_trees_equal


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"))


@pytest.fixture(scope="module")
def saved(mesh, tmp_path_factory):
    """A run with one checkpoint: sharded, replicated and single-device leaves, keys, numpy, numbers."""
    directory = tmp_path_factory.mktemp("run")
    values = jnp.arange(64.0).reshape(8, 8)
    params = {
        "both": jax.device_put(values, NamedSharding(mesh, PartitionSpec("data", "model"))),
        "rows": jax.device_put(values, NamedSharding(mesh, PartitionSpec(("data", "model")))),
        "copies": jax.device_put(values, NamedSharding(mesh, PartitionSpec())),
        "one": jax.device_put(values, jax.devices()[3]),
        "free": jnp.arange(8.0),
        "key": jax.random.key(7),
        "numpy": np.arange(8),
        "number": 3,
    }
    with CheckpointManager(directory) as manager:
        manager.save(1, params)
    return directory, params


def test_without_a_layout_each_leaf_goes_where_the_template_has_it(saved):
    directory, params = saved
    back = CheckpointManager(directory, read_only=True).restore(params=params).params
    assert_trees_equal(back, params)
    for name in ("both", "rows", "copies", "one", "free", "key"):
        assert back[name].sharding == params[name].sharding, name
        assert back[name].committed == params[name].committed, name


def test_without_any_place_it_is_the_default_device_and_free_to_be_moved(saved, mesh):
    directory, params = saved
    abstract = jax.eval_shape(lambda: {name: params[name] for name in ("both", "rows", "copies", "one", "free")})
    bare = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in abstract.items()}
    back = CheckpointManager(directory, read_only=True).restore(params=bare, partial=True).params
    for name, leaf in back.items():
        assert leaf.devices() == {jax.devices()[0]}
        assert not leaf.committed
        assert np.array_equal(leaf, params[name])
    spread = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, PartitionSpec("data")))
    assert (back["both"] + spread).sharding.mesh == mesh  # what is bound to a device could not be added


def test_abstract_leaves_with_a_sharding_get_it_whatever_it_was_saved_on(saved, mesh):
    directory, params = saved
    wants = {
        "both": NamedSharding(mesh, PartitionSpec("model", "data")),
        "rows": NamedSharding(mesh, PartitionSpec(None, "model")),
        "copies": SingleDeviceSharding(jax.devices()[5]),
        "one": NamedSharding(jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]), PartitionSpec("x")),
    }
    template = {name: jax.ShapeDtypeStruct((8, 8), "float32", sharding=where) for name, where in wants.items()}
    back = CheckpointManager(directory, read_only=True).restore(params=template, partial=True).params
    for name, where in wants.items():
        assert back[name].sharding == where
        assert np.array_equal(back[name], params[name])


def test_one_sharding_or_device_for_every_leaf(saved, mesh):
    directory, params = saved
    manager = CheckpointManager(directory, read_only=True)
    device = jax.devices()[6]
    on_device = manager.restore(params=params, layout=device).params
    replicated = manager.restore(params=params, layout=NamedSharding(mesh, PartitionSpec())).params
    for name in ("both", "rows", "copies", "one", "free", "key"):
        assert on_device[name].devices() == {device}
        assert replicated[name].sharding == NamedSharding(mesh, PartitionSpec())
    assert_trees_equal(jax.tree.map(lambda leaf: leaf, on_device), params)
    assert type(on_device["numpy"]) is np.ndarray
    assert on_device["number"] == 3


def test_the_host_gives_numpy_arrays(saved):
    directory, params = saved
    manager = CheckpointManager(directory, read_only=True)
    for back in (
        manager.restore(layout=ckptmgr.HOST).params,
        manager.restore(params=params, layout=ckptmgr.HOST).params,
    ):
        for name in ("both", "rows", "copies", "one", "free", "numpy"):
            assert type(back[name]) is np.ndarray
            assert back[name].flags.writeable
            assert np.array_equal(back[name], params[name])


def test_a_layout_that_cannot_be_is_refused_by_leaf_before_anything_is_read(saved, mesh, tmp_path):
    directory, params = saved
    manager = CheckpointManager(directory, read_only=True)
    template = {"free": jax.ShapeDtypeStruct((8,), "float32", sharding=NamedSharding(mesh, PartitionSpec("data")))}
    manager.restore(params=template, partial=True)
    with pytest.raises(LayoutError, match=r"params\['free'\] of shape \(8,\)") as caught:
        manager.restore(params=params, layout=NamedSharding(mesh, PartitionSpec(None, "data")))
    assert caught.value.leaf == "params['free']"
    with pytest.raises(TypeError, match="layout"):
        manager.restore(layout="cpu")


def test_a_dtype_that_jax_would_change_on_a_device_is_refused(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"x": np.ones(2)})
        template = {"x": jax.ShapeDtypeStruct((2,), np.float64)}
        with pytest.raises(LayoutError, match=r"params\['x'\] is float64, which JAX would make float32"):
            manager.restore(params=template)
        assert manager.restore(params={"x": np.zeros(2)}).params["x"].dtype == np.float64
        narrow = {"x": jax.ShapeDtypeStruct((2,), np.float32)}
        assert manager.restore(params=narrow, cast=True).params["x"].dtype == np.float32
