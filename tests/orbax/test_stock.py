"""Both directions: stock Orbax restores what we save, and we restore what stock Orbax saves."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ckptmgr import CheckpointManager, CorruptCheckpointError
from ckptmgr.testing import assert_trees_equal

ARGS = ocp.args
ADAM = optax.adam(1e-3)


def params():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    values = jnp.arange(64.0).reshape(8, 8)
    return {
        "dense": {"w": values, "b": jnp.ones(3, jnp.bfloat16)},
        "layers": [jnp.arange(4), {"x": jnp.zeros((2, 2), jnp.int8)}],
        "sharded": jax.device_put(values, NamedSharding(mesh, PartitionSpec("data", "model"))),
        "replicated": jax.device_put(values, NamedSharding(mesh, PartitionSpec())),
        "mlp/~/linear_0": {"w": jnp.ones((2, 2))},
        "numpy": np.arange(5, dtype=np.int16),
        "small": jnp.ones(3, jnp.int4),
        "float8": jnp.ones(3, jnp.float8_e4m3fn),
        "complex": jnp.ones(2, jnp.complex64),
        "flag": jnp.array([True, False]),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(3, impl="rbg"), 3),
        "int": 3,
        "float": 0.5,
    }


def abstract(tree):
    def leaf(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x

    return jax.tree.map(leaf, tree)


def state():
    small = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    return ADAM.update(small, ADAM.init(small), small)[1]


# ---------------------------------------------------------------- ours, read by stock Orbax


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ours")
    with CheckpointManager(directory, metadata={"git": "abc"}) as manager:
        extras = {"position": {"epoch": 2}, "empty": {"x": jnp.zeros((0, 3))}}
        manager.save(1, params(), state(), extras=extras, metrics={"loss": 0.5})
        manager.save(2, params(), optax.sgd(0.1).init(params()), metrics={"loss": 0.25})
    return directory


@pytest.mark.parametrize("restore", [ARGS.StandardRestore, ARGS.PyTreeRestore])
def test_stock_orbax_restores_ours_with_templates(ours, restore):
    with ocp.CheckpointManager(ours) as stock:
        template = abstract(params())
        how = (
            {}
            if restore is ARGS.StandardRestore
            else {"restore_args": ocp.checkpoint_utils.construct_restore_args(template)}
        )
        back = stock.restore(
            1,
            args=ARGS.Composite(
                params=restore(template, **how),
                opt_state=ARGS.StandardRestore(abstract(state())),
                step=ARGS.JsonRestore(),
            ),
        )
        assert_trees_equal(back.params, params())
        assert_trees_equal(back.opt_state, state())
        assert type(back.opt_state[0]) is optax.ScaleByAdamState
        assert back.step == 1
        assert back.params["sharded"].sharding == params()["sharded"].sharding


def test_stock_orbax_restores_ours_without_templates(ours):
    with ocp.CheckpointManager(ours) as stock:
        assert stock.all_steps() == [1, 2]
        assert stock.latest_step() == 2
        assert stock.metrics(1) == {"loss": 0.5}
        back = stock.restore(1)
        assert_trees_equal(back.params, params())
        assert back.position == {"epoch": 2}
        assert back.empty["x"].shape == (0, 3)
        assert np.array_equal(back.opt_state[0]["mu"]["w"], state()[0].mu["w"])
        stock.restore(2)  # an optimizer with nothing to save
        handlers = json.loads((ours / "1" / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
        assert all(handler.startswith("orbax.checkpoint.") for handler in handlers.values())


def test_stock_orbax_reads_the_metadata_of_ours(ours):
    with ocp.CheckpointManager(ours, item_handlers={"params": ocp.StandardCheckpointHandler()}) as stock:
        metadata = stock.item_metadata(1)
        assert metadata.params["sharded"].shape == (8, 8)
        assert metadata.params["sharded"].sharding.partition_spec == ("data", "model")
        assert str(metadata.params["dense"]["b"].dtype) == "bfloat16"


def test_a_stock_manager_goes_on_where_ours_stopped_and_back(tmp_path):
    tree = {"w": jnp.arange(3.0)}
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, tree)
    with ocp.CheckpointManager(tmp_path) as stock:
        stock.save(2, args=ARGS.Composite(params=ARGS.StandardSave(tree)))
    with CheckpointManager(tmp_path) as manager:
        assert manager.restore(params=tree).step == 2
        manager.save(3, tree)
        manager.wait()
        assert manager.steps() == [1, 2, 3]


# ---------------------------------------------------------------- stock's, read by us


def handlers(**form):
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in ("params", "opt_state"):
        handler = ocp.PyTreeCheckpointHandler(**form)
        registry.add(item, ARGS.PyTreeSave, handler)
        registry.add(item, ARGS.PyTreeRestore, handler)
    return registry


FORMS = {
    "zarr2, zstd": {},
    "zarr2, uncompressed": {"use_compression": False},
    "zarr3, zstd": {"use_zarr3": True},
    "zarr3, uncompressed": {"use_zarr3": True, "use_compression": False},
    "zarr2, a directory for each array": {"use_ocdbt": False},
}


@pytest.fixture(scope="module", params=FORMS, ids=str)
def stock(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("stock")
    with ocp.CheckpointManager(
        directory,
        handler_registry=handlers(**FORMS[request.param]),
        options=ocp.CheckpointManagerOptions(best_fn=len),
    ) as manager:
        manager.save(
            7,
            args=ARGS.Composite(
                params=ARGS.PyTreeSave(params()),
                opt_state=ARGS.PyTreeSave(state()),
                config=ARGS.JsonSave({"lr": 0.1}),
            ),
            metrics={"loss": 0.5},
            custom_metadata={"git": "abc"},
        )
    return directory


def test_we_restore_what_stock_saved_with_templates(stock):
    manager = CheckpointManager(stock, read_only=True)
    back = manager.restore(params=params(), opt_state=state(), extras={"config": None})
    assert_trees_equal(back.params, params())
    assert_trees_equal(back.opt_state, state())
    assert back.extras == {"config": {"lr": 0.1}}
    assert back.params["sharded"].sharding == params()["sharded"].sharding
    assert_trees_equal(manager.restore(params=abstract(params()), optimizer=None).params, params())


def test_we_restore_what_stock_saved_without_templates(stock):
    back = CheckpointManager(stock, read_only=True).restore(7)
    plain = {**params(), "int": 3, "float": 0.5}
    for name in plain:
        assert_trees_equal(back.params[name], jax.tree.map(lambda leaf: leaf, plain[name]))
    assert back.opt_state[0]["count"] == 1
    assert back.metrics == {"loss": 0.5}
    assert back.info.metadata == {"git": "abc"}
    assert back.info.versions == {}
    assert back.info.time > 1.7e9


def test_what_stock_wrote_is_listed_and_compared_like_our_own(stock):
    manager = CheckpointManager(stock, read_only=True)
    assert manager.steps() == [7]
    info = manager.info(7)
    assert set(info.items) == {"params", "opt_state", "config", "metrics"}
    partitions = {leaf.name: leaf.partition for leaf in info.leaves["params"]}
    assert partitions["sharded"] == ("data", "model")
    diff = manager.diff(7, opt_state=optax.sgd(0.1, momentum=0.9).init({"w": jnp.ones((2, 3)), "b": jnp.ones(3)}))
    assert {leaf.path for leaf in diff.missing} == {"opt_state[0].trace['w']", "opt_state[0].trace['b']"}


def test_standard_save_and_the_single_unnamed_item(tmp_path):
    tree = {"w": jnp.arange(4.0)}
    with ocp.CheckpointManager(tmp_path / "named") as manager:
        manager.save(1, args=ARGS.Composite(params=ARGS.StandardSave(tree), opt_state=ARGS.StandardSave(state())))
    back = CheckpointManager(tmp_path / "named", read_only=True).restore(params=tree, opt_state=state())
    assert_trees_equal(back.params, tree)
    with ocp.CheckpointManager(tmp_path / "single") as manager:
        manager.save(1, args=ARGS.StandardSave(tree))
    back = CheckpointManager(tmp_path / "single", read_only=True).restore(extras={"default": tree})
    assert_trees_equal(back.extras["default"], tree)


def test_a_damaged_stock_checkpoint_is_named(stock, tmp_path):
    import shutil

    copy = shutil.copytree(stock, tmp_path / "copy")
    (copy / "7" / "params" / "_METADATA").write_text("{}")
    with pytest.raises(CorruptCheckpointError, match="params"):
        CheckpointManager(copy, read_only=True).restore(7)


def test_a_partition_that_names_no_axes_is_no_layout_and_no_damage(tmp_path):
    with ocp.CheckpointManager(tmp_path) as stock:
        stock.save(1, args=ARGS.Composite(params=ARGS.StandardSave({"w": jnp.arange(8.0)})))
    (tmp_path / "1" / "params" / "_sharding").write_text('{"dw==": "{\\"partition_spec\\": [5]}"}')
    back = CheckpointManager(tmp_path, read_only=True).restore(layout=jax.make_mesh((8,), ("x",)))
    assert_trees_equal(back.params, {"w": jnp.arange(8.0)})
