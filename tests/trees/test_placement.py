"""Where restored leaves go."""

import math
import tempfile
from collections import OrderedDict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import counted
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import ckptmgr
from ckptmgr import CheckpointManager, LayoutError
from ckptmgr.testing import assert_trees_equal
from ckptmgr.trees import placement


@pytest.fixture(scope="module")
def mesh(make_mesh):
    return make_mesh(data=4, model=2)


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


def test_an_abstract_leaf_with_a_partition_spec_goes_to_the_mesh_that_is_set(saved, mesh):
    directory, params = saved
    template = {"both": jax.ShapeDtypeStruct((8, 8), "float32", sharding=PartitionSpec("data"))}
    other = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    there = SingleDeviceSharding(jax.devices()[2])
    with CheckpointManager(directory, read_only=True) as manager:

        def refused():
            with pytest.raises(LayoutError, match=r"\['both'\] has a PartitionSpec, which needs a mesh") as caught:
                manager.restore(params=template, partial=True)
            assert caught.value.leaf == "['both']"

        refused()
        for _ in range(2):  # a plan that is kept is compared with the template again, wherever that is
            for each in (mesh, other):
                with jax.set_mesh(each):
                    back = manager.restore(params=template, partial=True).params["both"]
                assert back.sharding == NamedSharding(each, PartitionSpec("data"))
                assert np.array_equal(back, params["both"])
            refused()
            for layout in (there, {"both": there}, lambda path, leaf: there, ckptmgr.HOST):
                back = manager.restore(params=template, partial=True, layout=layout).params["both"]
                assert type(back) is np.ndarray if layout is ckptmgr.HOST else back.sharding == there
            manager.restore(params={"both": params["both"]}, partial=True)


def test_what_names_a_mesh_that_is_not_set_is_on_no_device_of_another_process():
    empty = jax.sharding.get_mesh()
    for place in (PartitionSpec(), PartitionSpec("data"), empty, empty.abstract_mesh, ckptmgr.HOST, None):
        assert not placement.span_processes([place])


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


# ---------------------------------------------------------------- a mesh, a tree, a callable


@pytest.fixture(scope="module")
def grid(make_mesh):
    return make_mesh(data=4, model=2)


@pytest.fixture(scope="module")
def trained(grid, tmp_path_factory):
    """Parameters over data x model, and Adam's state of them after a step."""
    directory = tmp_path_factory.mktemp("trained")
    spread = {
        "dense": {"w": PartitionSpec("data", "model"), "b": PartitionSpec("model")},
        "odd": PartitionSpec("data"),
    }
    shapes = {"dense": {"w": (8, 16), "b": (16,)}, "odd": (12, 3)}
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda spec, shape: jax.device_put(draw.random(shape, np.float32), NamedSharding(grid, spec)),
        spread, shapes, is_leaf=lambda node: isinstance(node, PartitionSpec),
    )  # fmt: skip
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    with jax.set_mesh(grid):
        _, opt_state = optimizer.update(params, optimizer.init(params), params)
    with CheckpointManager(directory) as manager:
        manager.save(1, params, opt_state, extras={"ema": jax.tree.map(lambda x: x / 2, params)})
    return directory, params, opt_state, optimizer


def shardings(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def test_a_mesh_carries_the_saved_partition_specs_over(make_mesh, trained, caplog):
    directory, params, opt_state, optimizer = trained
    other = make_mesh(data=2, model=4)
    back = CheckpointManager(directory, read_only=True).restore(params=params, optimizer=optimizer, layout=other)
    wants = jax.tree.map(lambda leaf: NamedSharding(other, leaf.sharding.spec), params)
    assert shardings(back.params) == wants
    adam = back.opt_state[1][0]
    assert shardings(adam.mu) == shardings(adam.nu) == wants
    assert adam.count.sharding == NamedSharding(other, PartitionSpec())
    assert_trees_equal(back.params, params)
    assert_trees_equal(back.opt_state, opt_state)
    assert not caplog.records


def test_what_a_mesh_lacks_or_does_not_divide_is_replicated_and_said_once(make_mesh, trained, caplog):
    directory, params, _, optimizer = trained
    flat = make_mesh(data=8)
    back = CheckpointManager(directory, read_only=True).restore(params=params, optimizer=optimizer, layout=flat)
    assert back.params["dense"]["w"].sharding == NamedSharding(flat, PartitionSpec("data"))
    assert back.params["dense"]["b"].sharding == NamedSharding(flat, PartitionSpec())
    assert back.params["odd"].sharding == NamedSharding(flat, PartitionSpec())  # 8 does not divide 12
    assert shardings(back.opt_state[1][0].mu) == shardings(back.params)
    assert_trees_equal(back.params, params)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "9 leaves are replicated along axes that {'data': 8} lacks or that do not divide them" in line
    assert "params['dense']['b'] of shape (16,): ('model',) becomes P()" in line


@pytest.mark.parametrize("known", [True, False], ids=["with the optimizer", "by path and shape"])
def test_a_tree_of_shardings_for_params_and_the_state_follows(trained, grid, known):
    directory, params, opt_state, optimizer = trained
    layout = {"dense": NamedSharding(grid, PartitionSpec("model")), "odd": None}
    how = {"optimizer": optimizer} if known else {"opt_state": opt_state}
    manager = CheckpointManager(directory, read_only=True)
    back = manager.restore(params=params, extras={"ema": params}, layout=layout, **how)
    wants = {"dense": {"w": layout["dense"], "b": layout["dense"]}, "odd": params["odd"].sharding}
    adam = back.opt_state[1][0]
    assert (
        shardings(back.params)
        == shardings(adam.mu)
        == shardings(adam.nu)
        == shardings(back.extras["ema"])
        == wants
    )
    assert adam.count.sharding == NamedSharding(grid, PartitionSpec())
    assert_trees_equal(back.opt_state, opt_state)
    alone = manager.restore(layout=layout | {"odd": jax.devices()[2]}, **how)  # params are not asked for
    assert alone.opt_state[1][0].mu["odd"].devices() == {jax.devices()[2]}


def net_alone(params):
    """The state of an optimizer that was given only a part of what is saved as params."""
    return {"variables": params}, jax.eval_shape(optax.adam(1e-2).init, params), {}


def by_lookahead(params):
    params = optax.LookaheadParams.init_synced(params)
    optimizer = optax.lookahead(optax.adam(1e-2), sync_period=3, slow_step_size=0.5)
    return params, jax.eval_shape(optimizer.init, params), {"optimizer": optimizer}


@pytest.mark.parametrize("made", [net_alone, by_lookahead])
def test_a_state_whose_paths_are_not_those_of_the_params_follows_them_too(made, tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    net = {"w": jax.device_put(jnp.ones((16, 2)), split), "b": jax.device_put(jnp.ones(2), whole)}
    params, abstract, how = made(net)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, params, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract))
        back = manager.restore(params=params, **how or {"opt_state": abstract})
    mirroring = [leaf for leaf in jax.tree.leaves(back.opt_state) if leaf.shape]
    assert [leaf.sharding for leaf in mirroring] == [split if leaf.ndim == 2 else whole for leaf in mirroring]
    assert len(mirroring) == 4


def test_a_prefix_of_partition_specs_in_a_mesh_that_is_set(trained, grid):
    directory, params, _, _ = trained
    manager = CheckpointManager(directory, read_only=True)
    with jax.set_mesh(grid):
        back = manager.restore(params=params, layout=PartitionSpec("data"))
    assert {leaf.sharding for leaf in jax.tree.leaves(back.params)} == {NamedSharding(grid, PartitionSpec("data"))}
    with pytest.raises(LayoutError, match=r"layout has P\('data',\) for params\['dense'\]\['b'\].*needs a mesh"):
        manager.restore(params=params, layout=PartitionSpec("data"))


def test_a_callable_is_asked_for_each_parameter(trained, grid):
    directory, params, opt_state, _ = trained
    asked = {}

    def layout(path, leaf):
        asked[path] = leaf
        return NamedSharding(grid, PartitionSpec(None, "model")) if leaf.ndim == 2 and path != "['odd']" else None

    back = CheckpointManager(directory, read_only=True).restore(params=params, opt_state=opt_state, layout=layout)
    assert asked == {
        "['dense']['b']": jax.ShapeDtypeStruct((16,), "float32"),
        "['dense']['w']": jax.ShapeDtypeStruct((8, 16), "float32"),
        "['odd']": jax.ShapeDtypeStruct((12, 3), "float32"),
    }
    assert back.params["dense"]["w"].sharding.spec == PartitionSpec(None, "model")
    assert back.params["odd"].sharding == params["odd"].sharding
    assert shardings(back.opt_state[1][0].nu) == shardings(back.params)


def test_state_that_is_like_no_parameter_is_replicated(grid, tmp_path):
    params = {"w": jax.device_put(jnp.ones((256, 128)), NamedSharding(grid, PartitionSpec("data", "model")))}
    optimizer = optax.adafactor(1e-3, min_dim_size_to_factor=64)
    with jax.set_mesh(grid):
        opt_state = optimizer.init(params)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, params, opt_state)
        layout = shardings(params)
        for how in ({"optimizer": optimizer}, {"opt_state": jax.eval_shape(optimizer.init, params)}):
            back = manager.restore(params=params, layout=layout, **how)
            for leaf in jax.tree.leaves(back.opt_state):
                assert leaf.sharding == NamedSharding(grid, PartitionSpec())  # factored: rows and columns alone
            assert_trees_equal(back.opt_state, opt_state)


def test_impossible_layouts_are_refused_by_name(trained, grid):
    directory, params, _, _ = trained
    manager = CheckpointManager(directory, read_only=True)
    with pytest.raises(LayoutError, match=r"params\['odd'\] of shape \(12, 3\) does not fit .*'model'") as caught:
        manager.restore(
            params=params, layout={"dense": None, "odd": NamedSharding(grid, PartitionSpec(None, "model"))}
        )
    assert caught.value.leaf == "params['odd']"
    with pytest.raises(LayoutError, match=r"(?s)layout is no prefix of params: .*dense"):
        manager.restore(params=params, layout={"dens": None, "odd": None})
    with pytest.raises(LayoutError, match=r"layout has 'data' for params\['dense'\]\['b'\]"):
        manager.restore(params=params, layout=lambda path, leaf: "data")
    with pytest.raises(TypeError, match=r"layout takes .* not 'data'"):
        manager.restore(params=params, layout={"dense": "data", "odd": None})


# ---------------------------------------------------------------- memory kinds


PINNED = "pinned_host"


@pytest.fixture(scope="module")
def offloaded(grid, tmp_path_factory):
    """Parameters in the host's memory, keys among them, and Adam's state of the arrays, which is there too."""
    directory = tmp_path_factory.mktemp("offloaded")
    where = NamedSharding(grid, PartitionSpec("data"), memory_kind=PINNED)
    arrays = {"w": jnp.arange(32.0).reshape(8, 4), "b": jnp.arange(8.0)}
    params = jax.device_put(arrays | {"keys": jax.random.split(jax.random.key(1), 8)}, where)
    trained = {name: params[name] for name in arrays}
    optimizer = optax.adam(1e-3)
    opt_state = optimizer.init(trained)
    with CheckpointManager(directory) as manager:
        manager.save(1, params, opt_state)
    return directory, params, opt_state, optimizer


def kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def test_a_memory_kind_is_kept_when_it_is_asked_for(offloaded, grid):
    assert PINNED in {memory.kind for memory in jax.devices()[0].addressable_memories()}
    directory, params, opt_state, _ = offloaded
    manager = CheckpointManager(directory, read_only=True)
    by_template = manager.restore(params=params, opt_state=opt_state)
    assert (kinds(by_template.params), shardings(by_template.opt_state)) == ({PINNED}, shardings(opt_state))
    assert_trees_equal(by_template.params, params)
    where = NamedSharding(grid, PartitionSpec("model"), memory_kind=PINNED)
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where) for name, leaf in params.items()
    }
    one = SingleDeviceSharding(jax.devices()[2], memory_kind=PINNED)
    for how, wants in (({}, where), ({"layout": one}, one)):
        back = manager.restore(params=abstract, **how)
        assert all(leaf.sharding == wants for leaf in back.params.values())
        assert_trees_equal(back.params, params)


@pytest.mark.parametrize("known", [True, False], ids=["with the optimizer", "by path and shape"])
def test_the_state_follows_its_parameter_into_another_memory(offloaded, grid, known):
    directory, params, opt_state, optimizer = offloaded
    trained = {name: params[name] for name in "wb"}
    how = {"optimizer": optimizer} if known else {"opt_state": opt_state}
    wants = {
        "w": NamedSharding(grid, PartitionSpec("data"), memory_kind=PINNED),
        "b": NamedSharding(grid, PartitionSpec("data")),
    }
    manager = CheckpointManager(directory, read_only=True)
    every = manager.restore(params=trained, layout={"w": wants["w"], "b": wants["w"]}, partial=True, **how)
    assert kinds((every.params, every.opt_state)) == {PINNED}  # the count of steps too, which is like no parameter
    back = manager.restore(params=trained, layout=wants, partial=True, **how)
    assert shardings(back.params) == shardings(back.opt_state[0].mu) == shardings(back.opt_state[0].nu) == wants
    assert_trees_equal(back.params, trained)
    assert_trees_equal(back.opt_state, opt_state)


def test_the_memory_it_was_saved_from_is_not_used_by_itself(make_mesh, offloaded):
    directory, params, opt_state, _ = offloaded
    manager = CheckpointManager(directory, read_only=True)
    usual = jax.devices()[0].default_memory().kind
    bare = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in params.items()}
    assert usual != PINNED
    for how in (
        {"params": params, "opt_state": opt_state, "layout": make_mesh(data=2)},
        {"layout": make_mesh(data=2)},
        {"params": bare},
        {},
    ):
        back = manager.restore(**how)
        assert kinds((back.params, back.opt_state)) == {usual}
        assert_trees_equal(back.params, params)


MESHES = [{"a": 8}, {"a": 4, "b": 2}, {"a": 2, "b": 2, "c": 2}, {"b": 2}, {"a": 1}]


@st.composite
def arrays_on_a_mesh(draw):
    """A shape, a dtype, a mesh to save on and one to restore on, and a PartitionSpec for each that fits."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 4, 8, 12, 24]), min_size=1, max_size=3)))
    dtype = draw(st.sampled_from(["float32", "bfloat16", "int8", "bool", "float8_e4m3fn", "complex64"]))
    placed = []
    for mesh in (draw(st.sampled_from(MESHES)), draw(st.sampled_from(MESHES))):
        free, spec = list(draw(st.permutations(list(mesh)))), []
        for size in shape:
            axes = []
            while free and draw(st.booleans()) and size % math.prod(mesh[name] for name in [*axes, free[-1]]) == 0:
                axes.append(free.pop())
            spec.append(tuple(axes) or None)
        placed.append((mesh, PartitionSpec(*spec)))
    return shape, dtype, placed


@settings(max_examples=counted(20, full=300))
@pytest.mark.soak
@given(case=arrays_on_a_mesh(), chunk_bytes=st.sampled_from([16, 100, 2**20]), seed=st.integers(0, 99))
def test_saved_on_one_mesh_and_restored_on_another_every_bit_is_the_same(make_mesh, case, chunk_bytes, seed):
    shape, dtype, placed = case
    values = np.random.default_rng(seed).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
    values = (values & 1).astype(bool)[..., 0] if dtype == "bool" else values.view(jnp.dtype(dtype))[..., 0]
    meshes = [make_mesh(**mesh) for mesh, _ in placed]
    first, second = (NamedSharding(mesh, spec) for mesh, (_, spec) in zip(meshes, placed, strict=True))
    with (
        tempfile.TemporaryDirectory() as directory,
        CheckpointManager(directory, chunk_bytes=chunk_bytes) as manager,
    ):
        manager.save(1, {"x": jax.device_put(values, first)})
        for layout in ({"x": second}, meshes[1]):
            back = manager.restore(layout=layout).params["x"]
            assert layout is meshes[1] or back.sharding == second
            assert np.asarray(back).tobytes() == values.tobytes()


def test_what_partial_keeps_goes_where_the_layout_wants_it(tmp_path, make_mesh):
    mesh = make_mesh(x=8)
    place = NamedSharding(mesh, PartitionSpec("x"))
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": jnp.ones(8)})
    reader = CheckpointManager(tmp_path, read_only=True)
    template = {"w": jnp.zeros(8), "new": jax.device_put(jnp.arange(8.0), jax.devices()[0])}
    for layout in (place, {"w": place, "new": place}, lambda path, leaf: place):
        found = reader.restore(params=template, layout=layout, partial=True).params
        assert {leaf.sharding for leaf in found.values()} == {place}
        assert np.array_equal(found["new"], np.arange(8.0))
    found = reader.restore(params=template, optimizer=optax.adam(1.0), layout=ckptmgr.HOST, partial=True)
    assert {type(leaf) for leaf in jax.tree.leaves((found.params, found.opt_state))} == {np.ndarray}


def test_a_callable_is_asked_about_keys_too(tmp_path, make_mesh):
    everywhere = NamedSharding(make_mesh(x=8), PartitionSpec())
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": jnp.ones(8), "key": jax.random.key(3, impl="rbg"), "n": 3})
    asked = {}
    found = CheckpointManager(tmp_path, read_only=True).restore(
        layout=lambda path, leaf: asked.update({path: leaf}) or everywhere
    )
    assert {leaf.sharding for leaf in (found.params["w"], found.params["key"])} == {everywhere}
    assert str(asked["['key']"].dtype) == "key<rbg>"
    assert set(asked) == {"['w']", "['key']"}


class Net(NamedTuple):
    weight: jax.Array
    bias: jax.Array


class Stack:
    """A node whose children have no names: on disk they are "0" to "11"."""

    def __init__(self, *layers):
        self.layers = layers


jax.tree_util.register_pytree_node(Stack, lambda stack: (stack.layers, None), lambda _, layers: Stack(*layers))


def net(*leaves):
    return Net(*leaves[:2])


def ordered(*leaves):
    return OrderedDict(z=leaves[0], a=leaves[1])


@pytest.mark.parametrize(
    ("make", "asked"),
    [(net, "nothing"), (net, "opt_state"), (net, "optimizer"), (ordered, "optimizer"), (Stack, "nothing")],
)
def test_a_tree_of_places_goes_by_names_where_the_params_have_no_template(make, asked, tmp_path):
    devices, optimizer = jax.devices(), optax.adam(1.0)
    params = make(*(jnp.full(3, n, jnp.float32) for n in range(12)))
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, params, optimizer.init(params)).result()
        plain = manager.restore().params
        layout = jax.tree.map(lambda leaf: devices[int(leaf[0]) % 8], plain)
        templates = {"opt_state": optimizer.init(plain), "optimizer": optimizer}
        found = manager.restore(layout=layout, **{name: templates[name] for name in templates if name == asked})
    restored = [found.params] * (asked != "opt_state")
    restored += [found.opt_state[0].mu for _ in range(asked != "nothing")]
    for tree in restored:
        assert jax.tree.map(lambda leaf: next(iter(leaf.devices())), tree) == layout
    assert restored


def test_what_partial_keeps_is_refused_by_name_where_it_does_not_fit(tmp_path, make_mesh):
    place = NamedSharding(make_mesh(x=8), PartitionSpec("x"))
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": jnp.ones(8)}).result()
        for layout in (place, {"w": place, "b": place}, lambda path, leaf: place):
            with pytest.raises(LayoutError, match=r"params\['b'\] of shape \(3,\) does not fit") as refused:
                manager.restore(params={"w": jnp.zeros(8), "b": jnp.zeros(3)}, partial=True, layout=layout)
            assert refused.value.leaf == "params['b']"


def test_an_extra_that_the_step_lacks_goes_where_the_layout_wants_it(tmp_path, make_mesh):
    mesh = make_mesh(x=8)
    place, everywhere = (NamedSharding(mesh, spec) for spec in (PartitionSpec("x"), PartitionSpec()))
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": jnp.ones(8)}).result()
        extras = {"ema": {"w": jnp.arange(8.0)}, "note": "text", "none": None}
        wants = [(place, place), (mesh, everywhere), ({"w": place}, place), (lambda path, leaf: place, place)]
        for layout, want in wants:
            found = manager.restore(params={"w": jnp.zeros(8)}, extras=extras, partial=True, layout=layout)
            assert found.extras["ema"]["w"].sharding == want
            assert (found.extras["note"], found.extras["none"]) == ("text", None)
            assert set(found.missing) == {"ema", "note", "none"}
        found = manager.restore(params={"w": jnp.zeros(8)}, extras=extras, partial=True, layout=ckptmgr.HOST)
        assert isinstance(found.extras["ema"]["w"], np.ndarray)
        assert np.array_equal(found.extras["ema"]["w"], np.arange(8.0))


@pytest.mark.parametrize("pinned", ["a", "z"])
def test_what_mirrors_no_parameter_is_in_the_devices_memory_unless_all_params_are_elsewhere(
    pinned, tmp_path, make_mesh
):
    mesh = make_mesh(x=8)
    kinds = {pinned: PINNED, "b": None}
    params = {
        name: jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec("x"), memory_kind=kind))
        for name, kind in kinds.items()
    }
    optimizer = optax.adam(1.0)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, params, optimizer.init(params)).result()
        adam = manager.restore(params=params, optimizer=optimizer).opt_state[0]
    default = jax.devices()[0].default_memory().kind
    assert adam.count.sharding.memory_kind == default
    assert (adam.mu[pinned].sharding.memory_kind, adam.mu["b"].sharding.memory_kind) == (PINNED, default)
