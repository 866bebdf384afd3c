"""The state comes back exactly: bits, types, kinds and places, on every mesh, under every guard of JAX."""

import contextlib
import itertools
import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ckptmgr
from ckptmgr import CheckpointManager, LayoutError, StructureMismatchError
from ckptmgr.testing import assert_resume_exact, assert_trees_equal

P = PartitionSpec
TX = optax.adam(1e-2)

# ---------------------------------------------------------------- every mesh, every form of template

MESHES = {
    "default": lambda: jax.make_mesh((8,), ("fsdp",)),
    "explicit": lambda: jax.make_mesh((4, 2), ("fsdp", "model"), axis_types=(AxisType.Explicit,) * 2),
    "auto": lambda: jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,)),
    "mixed": lambda: jax.make_mesh((4, 2), ("fsdp", "x"), axis_types=(AxisType.Explicit, AxisType.Auto)),
}


def start(mesh):
    """Params as programs make them: sharded, replicated and weakly typed, a scalar, a bfloat16, an empty one."""
    values = {
        "w": (jnp.arange(64.0).reshape(16, 4), P("fsdp")),
        "column": (jnp.arange(32.0).reshape(2, 16), P(None, "fsdp")),
        "b": (jnp.full((8,), 0.3), P()),
        "half": (jnp.ones((8, 2), jnp.bfloat16), P("fsdp")),
        "scale": (jnp.asarray(0.5), P()),
        "none": (jnp.zeros((0, 4)), P()),
    }
    return {name: jax.device_put(value, NamedSharding(mesh, spec)) for name, (value, spec) in values.items()}


@jax.jit
def update(params, opt_state):
    grads = jax.tree.map(lambda leaf: (leaf * 0.1).astype(leaf.dtype), params)
    updates, opt_state = TX.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


@pytest.fixture(scope="module", params=itertools.product(MESHES, (False, True)), ids=lambda p: f"{p[0]}-{p[1]}")
def trained(request, tmp_path_factory):
    """A run of two steps on a mesh, which `jax.set_mesh` names or not."""
    name, is_set = request.param
    mesh = MESHES[name]()

    def context():
        return jax.set_mesh(mesh) if is_set else contextlib.nullcontext()

    directory = tmp_path_factory.mktemp("run")
    with context():
        state = start(mesh)
        state = state, TX.init(state)
        for _ in range(2):
            state = update(*state)
        with CheckpointManager(directory) as manager:
            manager.save(2, *state)
    return mesh, context, directory, state


def save(directory, *state, **more):
    with CheckpointManager(directory) as manager:
        manager.save(1, *state, **more)


def abstract(tree):
    return jax.eval_shape(lambda leaves: leaves, tree)


WAYS = {
    "live": lambda m, params, opt: m.restore(params=params, opt_state=opt),
    "optimizer": lambda m, params, opt: m.restore(params=params, optimizer=TX),
    "restore_or": lambda m, params, opt: m.restore_or(params=params, optimizer=TX),
    "abstract opt_state": lambda m, params, opt: m.restore(params=params, opt_state=abstract(opt)),
    "both abstract": lambda m, params, opt: m.restore(params=abstract(params), opt_state=abstract(opt)),
    "abstract params, optimizer": lambda m, params, opt: m.restore(params=abstract(params), optimizer=TX),
    "eval_shape(init)": lambda m, params, opt: m.restore(params=params, opt_state=jax.eval_shape(TX.init, params)),
    "layout": lambda m, params, opt: m.restore(
        params=abstract(params), optimizer=TX, layout=jax.tree.map(lambda leaf: leaf.sharding, params)
    ),
}


@pytest.mark.xdist_group("exactness")
@pytest.mark.parametrize("way", WAYS)
def test_bits_types_and_places_are_those_of_the_run(way, trained):
    mesh, context, directory, (params, opt_state) = trained
    with context():
        template = start(mesh)
        found = WAYS[way](CheckpointManager(directory, read_only=True), template, TX.init(template))
    assert_trees_equal((found.params, found.opt_state), (params, opt_state))
    if says_no_place(way, mesh):
        assert {leaf.sharding for leaf in jax.tree.leaves((found.params, found.opt_state))} == {
            jax.sharding.SingleDeviceSharding(jax.devices()[0])
        }
        return
    adam = found.opt_state[0]
    for name, leaf in template.items():
        assert found.params[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), name
        if way != "live":
            assert adam.mu[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), name
            assert adam.nu[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), name
    if way != "live":  # which has it where the template's is
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(found.opt_state)} == {8}


def says_no_place(way, mesh):
    """Abstract params say where they are only on meshes whose axes are all explicit; the file never decides."""
    is_explicit = all(kind == AxisType.Explicit for kind in mesh.axis_types)
    return way.startswith(("both abstract", "abstract params")) and not is_explicit


@pytest.mark.xdist_group("exactness")
@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_step_gives_the_bits_of_one_that_never_stopped(way, trained):
    mesh, context, directory, state = trained
    if says_no_place(way, mesh):
        return  # on one device other programs compute, in another order
    with context():
        template = start(mesh)
        found = WAYS[way](CheckpointManager(directory, read_only=True), template, TX.init(template))
        expected, resumed = update(*state), update(found.params, found.opt_state)
    assert_trees_equal(resumed, expected)


@pytest.mark.xdist_group("exactness")
def test_without_a_template_everything_comes_back_to_the_default_device(trained):
    _, context, directory, (params, _) = trained
    with context():
        found = CheckpointManager(directory, read_only=True).restore()
    assert_trees_equal(found.params, params)


def test_a_mesh_without_devices_is_found_or_refused(tmp_path, caplog):
    mesh = jax.make_mesh((8,), ("fsdp",))
    save(tmp_path, start(mesh))
    template = abstract(start(mesh))
    with caplog.at_level(logging.WARNING, "ckptmgr"):
        found = CheckpointManager(tmp_path, read_only=True).restore(params=template)
    assert found.params["w"].sharding.mesh == mesh
    assert "names a mesh {'fsdp': 8} and no devices" in caplog.text
    half = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[4:])
    template = abstract(start(half))
    reader = CheckpointManager(tmp_path, read_only=True)
    with pytest.raises(LayoutError, match=r"on a mesh of 4 devices that are not named.*jax\.set_mesh"):
        reader.restore(params=template)
    with jax.set_mesh(half):
        assert reader.restore(params=template).params["w"].sharding.mesh == half
    one_live = template | {"b": start(half)["b"]}
    assert reader.restore(params=one_live).params["w"].sharding.mesh == half


def test_an_extra_that_mirrors_the_params_follows_them(tmp_path):
    mesh = MESHES["auto"]()
    params = start(mesh)
    ema = jax.tree.map(lambda leaf: leaf * 0.5, params)
    save(tmp_path, params, extras={"ema": ema, "rng": jax.random.key(0)})
    found = CheckpointManager(tmp_path, read_only=True).restore(
        params=params, extras={"ema": abstract(ema), "rng": jax.eval_shape(lambda: jax.random.key(0))}
    )
    assert found.extras["ema"]["w"].sharding == params["w"].sharding
    assert not found.extras["rng"].committed


# ---------------------------------------------------------------- weak types and kinds


def half_precision_step(params, opt_state, step):
    """Weakly typed params take part in bfloat16 activations as bfloat16, strong ones as float32."""
    x = jnp.full((8,), 1.01, jnp.bfloat16)

    def loss(params):
        return jnp.sum((x * params["w"]).astype(jnp.float32) ** 2)

    grads = jax.grad(loss)(params)
    return jax.tree.map(lambda leaf, grad: leaf - jnp.float32(0.1) * grad, params, grads), opt_state


def weak_start():
    return {"w": jnp.full((8,), 0.3)}


def test_a_resumed_bfloat16_run_with_weakly_typed_params_has_the_bits_of_one_that_never_stopped():
    assert_resume_exact(jax.jit(half_precision_step), weak_start(), steps=6, stop_at=3)


def test_what_was_saved_decides_about_weak_types(tmp_path):
    step = jax.jit(half_precision_step)
    trained = step(weak_start(), None, 1)[0]
    assert weak_start()["w"].weak_type
    assert not trained["w"].weak_type
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, trained)
        manager.save(2, weak_start())
    reader = CheckpointManager(tmp_path, read_only=True)
    for template in (weak_start(), trained, abstract(weak_start()), abstract(trained), None):
        assert not reader.restore(1, params=template).params["w"].weak_type
        assert reader.restore(2, params=template).params["w"].weak_type


WEAK = {
    "nan": lambda: jnp.full((16,), jnp.nan),
    "minus zero": lambda: jnp.full((16,), -0.0),
    "int": lambda: jnp.full((16,), 7),
    "bool": lambda: jnp.full((16,), True),
    "complex": lambda: jnp.full((16,), 1.5 - 2j),
    "half": lambda: jnp.full((16,), 0.3) * jnp.full((16,), 1.0),
    "empty": lambda: jnp.full((0,), 0.3),
}


@pytest.mark.parametrize("where", ["one device", "replicated", "sharded", "pinned_host"])
def test_weak_types_come_back_of_every_kind_and_in_every_place(where, tmp_path):
    mesh = jax.make_mesh((8,), ("x",))
    place = {
        "one device": jax.sharding.SingleDeviceSharding(jax.devices()[3]),
        "replicated": NamedSharding(mesh, P()),
        "sharded": NamedSharding(mesh, P("x")),
        "pinned_host": NamedSharding(mesh, P("x"), memory_kind="pinned_host"),
    }[where]
    params = {name: jax.device_put(make(), place) for name, make in WEAK.items()}
    params["with axes"] = jax.device_put(jnp.full((8, 4), 0.3), place)
    save(tmp_path, params)
    with jax.debug_nans(True), jax.debug_infs(True):
        found = CheckpointManager(tmp_path, read_only=True).restore(params=params).params
    assert {name: leaf.weak_type for name, leaf in found.items()} == {
        name: leaf.weak_type for name, leaf in params.items()
    }
    assert {leaf.sharding for leaf in found.values()} == {place}
    with jax.debug_nans(False):
        assert_trees_equal(found, params)


def test_a_number_that_training_made_an_array_comes_back_as_that_array(tmp_path):
    started = {"count": 0, "rate": 0.5, "on": True, "name": 3}
    trained = jax.jit(lambda state: {name: value for name, value in state.items() if name != "name"})(started)
    save(tmp_path, trained | {"name": 3})
    found = CheckpointManager(tmp_path, read_only=True).restore(params=started).params
    assert_trees_equal(found, trained | {"name": 3})


def test_dtypes_that_an_update_has_changed_are_kept_and_said(tmp_path, caplog):
    """Adam's moments of bfloat16 params become float32 with float32 hyperparameters."""
    tx = optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.float32)(learning_rate=0.1)
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    first = tx.init(params)
    trained = tx.update(params, first, params)[1]
    assert trained.inner_state[0].mu["w"].dtype != first.inner_state[0].mu["w"].dtype
    save(tmp_path, params, trained)
    reader = CheckpointManager(tmp_path, read_only=True)
    with caplog.at_level(logging.WARNING, "ckptmgr"):
        assert_trees_equal(reader.restore(params=params, optimizer=tx).opt_state, trained)
    assert "leaves of opt_state keep the dtype that was saved" in caplog.text
    assert "opt_state.inner_state[0].mu['w'] is float32[4], not bfloat16[4]" in caplog.text
    with pytest.raises(StructureMismatchError, match="another dtype"):
        reader.restore(params=params, opt_state=first)
    with pytest.raises(StructureMismatchError, match="another dtype"):  # a count is no moment
        reader.restore(params={"w": jnp.ones(4, jnp.int32)}, optimizer=tx)
    assert_trees_equal(
        reader.restore(params=params, optimizer=tx, cast=True).opt_state,
        jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), trained, first),
    )


# ---------------------------------------------------------------- the guards of JAX


def test_a_save_and_a_restore_make_no_implicit_transfer(tmp_path):
    """tests/guard.py holds it in every test; here it is seen to hold something."""
    narrow = jnp.arange(8).astype(jnp.int4)  # which the CPU has to unpack: a copy
    weak, loss, seen = jnp.full((4,), 0.3), jnp.float32(0.25), []
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="Disallowed device-to-host"):
            np.asarray(narrow)
        manager = CheckpointManager(tmp_path, on_commit=seen.append)
        manager.save(1, {"a": narrow, "w": weak}, metrics={"loss": loss})
        manager.wait()
        found = manager.restore(params={"a": narrow, "w": weak})
    assert_trees_equal(found.params, {"a": narrow, "w": weak})
    assert seen[0].metrics == {"loss": 0.25}


GUARDED = """
import jax, jax.numpy as jnp, numpy as np, optax, sys
import ckptmgr, guard
from ckptmgr.testing import assert_trees_equal
guard.install()
x64 = jax.config.jax_enable_x64
params = {
    "w": jax.device_put(np.array([1.0, np.nan, -np.inf, -0.0])), "b": jax.device_put(np.float32(2).reshape(())),
    "n": jax.device_put(np.arange(3)), "weak": jnp.full((3,), 0.25), "key": jax.random.key(3), "number": 1.5,
}
assert params["w"].dtype == ("float64" if x64 else "float32")
tx = optax.adam(np.float32(1e-3))
trained = {"w": params["w"]}
opt_state = jax.jit(tx.init)(trained)
nan, inf = jax.device_put(np.float32(np.nan)), jax.device_put(np.float64(np.inf))
with ckptmgr.CheckpointManager(sys.argv[1]) as manager:
    manager.save(1, params, opt_state, metrics={"loss": nan, "other": inf})
with ckptmgr.CheckpointManager(sys.argv[1], read_only=True) as manager:
    arrays = {name: leaf for name, leaf in params.items() if name != "number"}
    for template in (params, jax.eval_shape(lambda p: p, arrays) | {"number": 0.0}):
        found = manager.restore(params=template, opt_state=jax.eval_shape(lambda s: s, opt_state))
        with jax.debug_nans(False), jax.debug_infs(False):
            assert_trees_equal((found.params, found.opt_state), (params, opt_state))
    assert str(found.metrics) == "{'loss': nan, 'other': inf}", found.metrics
    assert manager.verify()
print("exact")
"""


@pytest.mark.parametrize(
    "setting",
    ["JAX_DEBUG_NANS", "JAX_DEBUG_INFS", "JAX_ENABLE_X64", "JAX_NUMPY_DTYPE_PROMOTION", "JAX_CHECK_TRACER_LEAKS"],
)
def test_a_run_under_each_setting_of_jax_comes_back_exactly(setting, tmp_path):
    value = "strict" if "PROMOTION" in setting else "true"
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, str(tmp_path)], cwd=os.path.dirname(__file__),
        capture_output=True, text=True, env=os.environ | {setting: value}, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout == "exact\n", done.stderr[-3000:]


def test_restored_replicated_keys_cause_no_recompilation(tmp_path):
    mesh = jax.make_mesh((8,), ("x",))
    params = {
        "w": jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, P("x"))),
        "key": jax.device_put(jax.random.key(0), NamedSharding(mesh, P())),
        "keys": jax.device_put(jax.random.split(jax.random.key(0), 8), NamedSharding(mesh, P("x"))),
        "weak": jax.device_put(jnp.full((8,), 0.3), NamedSharding(mesh, P("x"))),
    }

    @jax.jit
    def step(params):
        return params | {"w": params["w"] + jax.random.normal(params["key"], (8, 2)) * params["weak"][:, None],
                         "key": jax.random.split(params["key"])[0]}  # fmt: skip

    for _ in range(3):
        params = step(params)
    compiled = step._cache_size()
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, params)
        found = manager.restore(params=params).params
    step(found)
    assert step._cache_size() == compiled


# ---------------------------------------------------------------- layouts


class Shardings(dict):
    """A tree of shardings that can be called, as Equinox's modules can."""

    def __call__(self, *_):
        raise AssertionError("taken for a function")


jax.tree_util.register_pytree_node(
    Shardings,
    lambda tree: (list(tree.values()), tuple(tree)),
    lambda names, values: Shardings(zip(names, values, strict=True)),
)


def test_none_among_the_params_and_a_tree_of_shardings_that_can_be_called(tmp_path):
    mesh = jax.make_mesh((8,), ("x",))
    place = NamedSharding(mesh, P("x"))
    params = Shardings(a=jnp.ones(8), nothing=None, b=(jnp.ones(16), None))
    save(tmp_path, params)
    reader = CheckpointManager(tmp_path, read_only=True)
    for layout in (
        jax.tree.map(lambda _: place, params),
        Shardings(a=place, nothing=None, b=place),
        Shardings(a=place, nothing=place, b=(place, place)),
        Shardings(a=place, nothing=None, b=None),
    ):
        found = reader.restore(params=params, layout=layout).params
        assert found["nothing"] is None
        assert found["a"].sharding == place
        assert (found["b"][0].sharding == place) == (layout["b"] is not None)
    with pytest.raises(LayoutError, match="layout is no prefix of params"):
        reader.restore(params=params, layout=Shardings(a=place))


# ---------------------------------------------------------------- partial, cast, rename: nothing is silent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    params = {"w": jnp.arange(4.0), "old": jnp.ones(2)}
    with CheckpointManager(directory) as manager:
        manager.save(
            3, params, TX.init(params), extras={"ema": params, "keys": jax.random.split(jax.random.key(0), 3)}
        )
    return directory


def reader(directory):
    return CheckpointManager(directory, read_only=True)


def test_partial_says_what_it_kept_and_what_it_did_not_read(run, caplog):
    with caplog.at_level(logging.WARNING, "ckptmgr"):
        found = reader(run).restore(params={"w": jnp.zeros(4), "new": jnp.full(2, 7.0)}, partial=True)
    assert found.missing == ("params['new']",)
    assert found.unused == ("params['old']",)
    assert found.params["new"].tolist() == [7.0, 7.0]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "params['new']" in caplog.text
    assert "params['old']" in caplog.text
    whole = reader(run).restore(params={"w": jnp.zeros(4), "old": jnp.ones(2)}, partial=True)
    assert (whole.missing, whole.unused) == ((), ())


def test_partial_and_cast_can_be_given_to_single_items(run):
    params = {"w": jnp.zeros(4), "old": jnp.zeros(2)}
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    found = reader(run).restore(params=params, extras={"ema": {"w": half["w"]}}, partial=("ema",), cast=["ema"])
    assert found.unused == ("ema['old']",)
    assert found.extras["ema"]["w"].dtype == jnp.bfloat16
    with pytest.raises(StructureMismatchError, match=r"params\['old'\]"):
        reader(run).restore(params={"w": params["w"]}, extras={"ema": params}, partial=("ema",))
    with pytest.raises(StructureMismatchError, match="another dtype"):
        reader(run).restore(params=half, extras={"ema": half}, cast=("ema",))
    with pytest.raises(ValueError, match=r"partial names \['emma'\], which is no item; known are \['ema',"):
        reader(run).restore(params=params, partial=("emma",))
    for wrong in ("ema", 1, None, {"ema": True}):
        with pytest.raises(TypeError, match="partial takes True, False, or names of items"):
            reader(run).restore(params=params, partial=wrong)


def test_partial_never_gives_a_leaf_without_a_value(run):
    template = {"w": jnp.zeros(4), "new": jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(StructureMismatchError, match=r"params\['new'\] .*the template is abstract") as caught:
        reader(run).restore(params=template, partial=True)
    assert [leaf.problem for leaf in caught.value.diff.leaves] == ["no value"]
    with pytest.raises(StructureMismatchError, match="the template is abstract"):
        reader(run).restore(extras={"more": template}, partial=True)


def test_partial_never_gives_an_array_that_was_donated(run):
    donated = jnp.zeros(2)
    donated.delete()
    for asked in ({"params": {"w": jnp.zeros(4), "new": donated}}, {"extras": {"more": {"new": donated}}}):
        with pytest.raises(StructureMismatchError, match="was deleted or donated") as caught:
            reader(run).restore(**asked, partial=True)
        assert [leaf.problem for leaf in caught.value.diff.leaves] == ["deleted"]
    used = jnp.zeros(4)
    used.delete()  # a leaf that is in the step is read, whatever became of the template
    assert reader(run).restore(params={"w": used, "new": jnp.zeros(2)}, partial=True).params["new"].shape == (2,)


def test_partial_with_an_optimizer_starts_the_state_that_the_checkpoint_lacks(run):
    params = {"w": jnp.zeros(4), "old": jnp.ones(2)}
    tx = optax.chain(TX, optax.trace(0.9))
    with pytest.raises(StructureMismatchError):
        reader(run).restore(params=params, optimizer=tx)
    tx = optax.named_chain(("adam", TX), ("trace", optax.trace(0.9)))
    found = reader(run).restore(params=params, optimizer=tx, partial=True)
    assert not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(found.opt_state))
    assert_trees_equal(found.opt_state["trace"], optax.trace(0.9).init(params))
    assert "opt_state['trace'].trace['w']" in found.missing
    tx.update(params, found.opt_state, found.params)


def test_a_rename_that_matches_nothing_is_refused(run):
    template = {"w": jnp.zeros(4), "young": jnp.zeros(2)}
    assert reader(run).restore(params=template, rename={"old": "young"}).params["young"].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"rename: 'odl' matches no leaf of params"):
        reader(run).restore(params=template, rename={"old": "young", "odl": "young"})
    with pytest.raises(ValueError, match="is no regular expression"):
        reader(run).restore(params=template, rename={"[": "x"})
    with pytest.raises(ValueError, match="rename gives leaves the paths of a template"):
        reader(run).restore(rename={"old": "young"})


def test_keys_are_never_cast(run):
    numbers = {"keys": jnp.zeros(3)}
    with pytest.raises(StructureMismatchError, match="PRNG keys are never cast"):
        reader(run).restore(extras=numbers, cast=True)
    other = {"keys": jax.random.split(jax.random.key(0, impl="rbg"), 3)}
    with pytest.raises(StructureMismatchError, match="PRNG keys are never cast"):
        reader(run).restore(extras=other, cast=True)


# ---------------------------------------------------------------- restore_or


def test_restore_or_takes_what_restore_takes_and_nothing_else(run, tmp_path):
    import inspect

    ours, theirs = (
        inspect.signature(getattr(CheckpointManager, name)).parameters for name in ("restore_or", "restore")
    )
    assert set(ours) == set(theirs)
    for directory in (run, tmp_path):  # also before anything is saved
        for name in theirs:
            if name not in ("self", "step"):
                with pytest.raises(TypeError, match=f"{name}s_"):
                    CheckpointManager(directory, read_only=True).restore_or(**{f"{name}s_": None})
        for wrong, error in (
            ({"partial": "ema"}, TypeError),
            ({"layout": 3}, TypeError),
            ({"rename": {"[": ""}}, ValueError),
        ):
            with pytest.raises(error):
                CheckpointManager(directory, read_only=True).restore_or(params={"w": jnp.ones(2)}, **wrong)


def test_restore_or_starts_with_the_state_of_the_optimizer(tmp_path):
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    with CheckpointManager(tmp_path) as manager:
        first = manager.restore_or(step=np.int64(7), params=params, optimizer=TX)
        assert (first.step, type(first.step), first.resumed) == (7, int, False)
        assert_trees_equal(first.opt_state, TX.init(params))
        shapes = manager.restore_or(params=abstract(params), optimizer=TX).opt_state
        assert shapes == jax.eval_shape(TX.init, params)
        with pytest.raises(ValueError, match="opt_state or optimizer, not both"):
            manager.restore_or(params=params, opt_state=first.opt_state, optimizer=TX)
        manager.save(1, first.params, first.opt_state)
        again = manager.restore_or(params=params, optimizer=TX)
    assert again.resumed
    assert_trees_equal(again.opt_state, first.opt_state)


# ---------------------------------------------------------------- steps and names

INTEGERS = [np.dtype(code).type for code in np.typecodes["AllInteger"]]


@pytest.mark.parametrize("kind", INTEGERS, ids=lambda kind: kind.__name__)
def test_a_step_may_be_any_integer_of_numpy(kind, tmp_path):
    with CheckpointManager(tmp_path, save_every=kind(5), keep=kind(2)) as manager:
        assert not manager.save(kind(4), {"w": jnp.ones(2)})
        info = manager.save(kind(5), {"w": jnp.ones(2)}).result()
        assert (info.step, type(info.step)) == (5, int)
        assert manager.restore(kind(5)).step == manager.info(kind(5)).step == manager.verify(kind(5)).step == 5
        manager.pin(kind(5))
        manager.unpin(kind(5))
        assert not manager.diff(kind(5), params={"w": jnp.ones(2)})
        manager.delete(kind(5))
    assert ckptmgr.at_steps(kind(5)) == ckptmgr.at_steps(5)


CALLS = {
    "save": lambda manager, step: manager.save(step, {"w": 1.0}),
    "should_save": lambda manager, step: manager.should_save(step),
    "restore": lambda manager, step: manager.restore(step),
    "restore_or": lambda manager, step: manager.restore_or(step=step, params={"w": 1.0}),
    "info": lambda manager, step: manager.info(step),
    "verify": lambda manager, step: manager.verify(step),
    "diff": lambda manager, step: manager.diff(step, params={"w": 1.0}),
    "delete": lambda manager, step: manager.delete(step),
    "pin": lambda manager, step: manager.pin(step),
    "unpin": lambda manager, step: manager.unpin(step),
    "at_steps": lambda manager, step: ckptmgr.at_steps(step),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_step_is_refused_by_every_call(name, tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(5, {"w": 1.0})
        for wrong in (-1, np.int64(-1), 1.0, np.float32(1), True, np.True_, "5", b"5", [5], np.ones(2, int)):
            with pytest.raises((ValueError, TypeError)):
                CALLS[name](manager, wrong)
        with pytest.raises(ValueError, match=r"jax array.*pass int\(step\)"):
            CALLS[name](manager, jnp.int32(5))
        manager.wait()
        assert manager.steps() == [5]


def test_extras_and_metrics_that_are_no_mappings_are_refused_by_name(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        for name in ("extras", "metrics"):
            with pytest.raises(TypeError, match=f"{name} takes a mapping of names to values, not list"):
                manager.save(1, {"w": 1.0}, **{name: [1]})
        manager.save(1, {"w": 1.0})
        for call in (manager.restore, manager.restore_or):
            with pytest.raises(TypeError, match="extras takes a mapping of names to templates, not list"):
                call(extras=[1])


def test_an_extra_cannot_have_the_name_of_a_part_or_a_file_of_a_checkpoint(tmp_path):
    """All names that lie in steps, ours and Orbax's, and what Orbax reserves in its sources."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint.experimental.v1._src.layout import checkpoint_layout

    with CheckpointManager(tmp_path / "ours") as manager:
        manager.save(1, {"w": jnp.ones(2)}, {"m": jnp.ones(2)}, metrics={"loss": 1.0})
        manager.pin(1)
    with ocp.CheckpointManager(tmp_path / "stock") as stock:
        stock.save(1, args=ocp.args.StandardSave({"w": np.ones(2)}))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", {"w": np.ones(2)})
    found = {
        entry.name
        for step in (tmp_path / "ours" / "1", tmp_path / "stock" / "1", tmp_path / "tree")
        for entry in step.iterdir()
    }
    reserved = (
        found | checkpoint_layout.RESERVED_CHECKPOINTABLE_KEYS | {"ocdbt.process_0", "x.orbax-checkpoint-tmp"}
    )
    assert {"manifest.json", "PINNED", "default", "_METADATA", "params"} <= reserved
    with CheckpointManager(tmp_path / "new") as manager:
        for name in sorted(reserved):
            with pytest.raises(ValueError, match="cannot name an entry of extras"):
                manager.save(1, {"w": jnp.ones(2)}, extras={name: {"n": 1}})
        assert (
            manager.save(1, {"w": jnp.ones(2)}, extras={"pinned": {"n": 1}, "_mine": {"n": 2}}).result().pinned
            is False
        )


# ---------------------------------------------------------------- other meshes than that of jax.set_mesh


@pytest.mark.parametrize("is_set", [False, True])
def test_weak_leaves_come_back_where_they_were_whatever_mesh_is_set(is_set, tmp_path):
    half = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    params = {
        "spread": jax.device_put(jnp.full(8, 0.5), NamedSharding(half, P("x"))),
        "bound": jax.device_put(jnp.asarray(0.5), jax.devices()[0]),
        "elsewhere": jax.device_put(jnp.asarray(0.5), jax.devices()[3]),
        "free": jnp.asarray(0.5),
    }
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, params)
        with jax.set_mesh(jax.make_mesh((8,), ("y",))) if is_set else contextlib.nullcontext():
            back = manager.restore(params=params).params
    for name, leaf in params.items():
        assert (back[name].sharding, back[name].committed) == (leaf.sharding, leaf.committed), name
    assert_trees_equal(back, params)


def test_the_state_of_an_optimizer_follows_params_on_two_meshes(tmp_path):
    first, second = (
        jax.make_mesh((4,), ("x",), devices=devices) for devices in (jax.devices()[:4], jax.devices()[4:])
    )
    params = {
        name: jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("x")))
        for name, mesh in (("a", first), ("b", second))
    }
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, params, TX.init(params))
        back = manager.restore(params=params, optimizer=TX)
    for name, leaf in params.items():
        assert back.opt_state[0].mu[name].sharding == leaf.sharding


# ---------------------------------------------------------------- what does not fit is refused


def test_a_dtype_that_an_update_has_changed_keeps_its_weak_type_too(tmp_path):
    tx = optax.GradientTransformation(lambda _: {"rate": jnp.asarray(0.3)}, TX.update)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": jnp.ones(3)}, {"rate": jnp.asarray(0.5, jnp.bfloat16)})
        back = manager.restore(params={"w": jnp.ones(3)}, optimizer=tx)
    assert back.opt_state["rate"].dtype == jnp.bfloat16
    assert not back.opt_state["rate"].weak_type


@pytest.mark.parametrize(
    ("saved", "template"),
    [(jnp.asarray(0.5, jnp.bfloat16), 0.1), (jnp.asarray(3, jnp.int4), 1), (jnp.asarray(1 + 2j), 0j)],
)
def test_a_python_number_is_a_template_for_an_array_of_its_kind(saved, template, tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"n": saved})
        assert_trees_equal(manager.restore(params={"n": template}).params, {"n": saved})


def test_cast_makes_a_python_number_of_an_array_of_another_kind(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"n": jnp.asarray(2.0)})
        back = manager.restore(params={"n": 1}, cast=True).params
    assert type(back["n"]) is int
    assert back["n"] == 2


def test_arrays_are_not_restored_from_an_extra_that_is_a_json_value(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": jnp.ones(3)}, extras={"batch_stats": {}, "data": {"n": 3}})
        with pytest.raises(StructureMismatchError, match=r"batch_stats\['mean'\] .* no tree of arrays"):
            manager.restore(extras={"batch_stats": {"mean": jnp.zeros(3)}})
        for template in (None, {"n": 0}):
            assert manager.restore(extras={"data": template}).extras == {"data": {"n": 3}}


@pytest.mark.parametrize("name", ["params", "opt_state"])
def test_an_extra_never_takes_the_place_of_a_template(name, tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": jnp.ones(3)})
        with pytest.raises(ValueError, match=f"give it as {name}="):
            manager.restore(params={"v": jnp.ones(3)}, extras={name: {"w": jnp.ones(3)}})


def test_a_replacement_with_a_group_that_its_rule_lacks_is_refused(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": jnp.ones(3)})
        for new in (r"\2", r"\g<name>"):
            with pytest.raises(ValueError, match=r"rename: .* cannot replace 'w'"):
                manager.restore(params={"v": jnp.ones(3)}, rename={"w": new})


def test_a_template_that_cannot_be_restored_is_called_that(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"f": jnp.ones(3)})
        with pytest.raises(ckptmgr.UnsupportedLeafError, match="the template of params cannot be restored"):
            manager.restore(params={"f": jnp.sin})


def test_a_leaf_of_too_few_axes_for_a_layout_is_called_that(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"n": jnp.asarray(1.0)})
        with pytest.raises(LayoutError, match="the leaf has 0 axes"):
            manager.restore(layout=NamedSharding(jax.make_mesh((8,), ("x",)), P("x")))


def test_a_run_does_not_start_with_the_state_of_no_params(tmp_path):
    with CheckpointManager(tmp_path) as manager, pytest.raises(ValueError, match="give params= too"):
        manager.restore_or(optimizer=TX)


def test_a_spec_with_an_axis_that_the_mesh_lacks_is_refused(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": jnp.ones(8)})
        with jax.set_mesh(jax.make_mesh((8,), ("x",))), pytest.raises(LayoutError, match="does not fit"):
            manager.restore(layout=P("y"))


@pytest.mark.parametrize("kind", ["default", "auto"])
def test_the_state_of_params_in_the_memory_of_the_host_follows_them_there(kind, tmp_path):
    mesh = MESHES[kind]()
    params = {"w": jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, P("fsdp"), memory_kind="pinned_host"))}
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(TX.init, params))
    save(tmp_path, params, state)
    found = CheckpointManager(tmp_path, read_only=True).restore(params=params, optimizer=TX)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(found.opt_state)} == {"pinned_host"}
    assert found.opt_state[0].mu["w"].sharding == params["w"].sharding
