"""Every structure a JAX user has, in and out."""

import contextlib
import dataclasses
import unittest.mock
from typing import NamedTuple

import equinox
import flax.linen
import flax.training.train_state
import haiku
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.example_libraries import optimizers, stax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from ckptmgr import CheckpointManager, StructureMismatchError, UnsupportedLeafError
from ckptmgr.testing import assert_trees_equal


class Point(NamedTuple):
    x: object
    y: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    weight: object
    scale: object
    name: str = dataclasses.field(metadata={"static": True}, default="block")


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


class LinenNet(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        return flax.linen.Dense(2)(flax.linen.relu(flax.linen.Dense(4)(x)))


def linen_train_state():
    net = LinenNet()
    params = net.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    return flax.training.train_state.TrainState.create(apply_fn=net.apply, params=params, tx=optax.adam(1e-3))


def haiku_params():
    net = haiku.transform(lambda x: haiku.nets.MLP([4, 2])(x))
    return net.init(jax.random.key(0), jnp.ones((1, 3)))


STRUCTURES = {
    "dict": lambda: {"w": jnp.ones(2), "b": {"c": jnp.zeros(1)}},
    "int keys": lambda: {3: jnp.ones(2), 1: {10: jnp.ones(1), 9: jnp.zeros(1)}},
    "list and tuple": lambda: [jnp.ones(2), (jnp.ones(1), [])],
    "NamedTuple": lambda: Point(jnp.ones(2), Point(None, jnp.zeros(1))),
    "dataclass": lambda: {"block": Block(jnp.ones(2), 2.0)},
    "one array": lambda: jnp.arange(3.0),
    "one number": lambda: 3,
    "nothing": lambda: {"a": {}, "b": None},
    "flax linen": lambda: LinenNet().init(jax.random.key(0), jnp.ones((1, 3))),
    "flax linen TrainState": linen_train_state,
    "flax nnx state": lambda: nnx.split(Net(nnx.Rngs(0)))[1],
    "flax nnx pure dict": lambda: nnx.to_pure_dict(nnx.split(Net(nnx.Rngs(0)))[1]),
    "equinox": lambda: equinox.filter(equinox.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), equinox.is_array),
    "haiku": haiku_params,
    "stax": lambda: stax.serial(stax.Dense(4), stax.Relu, stax.Dense(2))[0](jax.random.PRNGKey(0), (1, 3))[1],
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_comes_back_as_it_was(tmp_path, name):
    tree = STRUCTURES[name]()
    template = jax.tree.map(lambda leaf: leaf, tree)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, tree)
        back = manager.restore(1, params=template).params
        manager.restore(1)  # without a template, as plain containers
    assert_trees_equal(back, tree)
    assert type(back) is type(tree)


def test_an_equinox_model_goes_on_after_a_restore(tmp_path):
    model = equinox.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, equinox.filter(model, equinox.is_array))
        blank = equinox.filter_eval_shape(equinox.nn.MLP, 3, 2, 4, 1, key=jax.random.key(1))
        arrays, static = equinox.partition(blank, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
        restored = equinox.combine(manager.restore(1, params=arrays).params, static)
    assert np.array_equal(restored(jnp.ones(3)), model(jnp.ones(3)))


def test_nnx_modules_go_on_after_a_restore(tmp_path):
    model = Net(nnx.Rngs(0))
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, nnx.state(model))
        graph, state = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(1))))
        restored = nnx.merge(graph, manager.restore(1, params=state).params)
    assert np.array_equal(restored.first.kernel[...], model.first.kernel[...])


OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "adamw": optax.adamw(1e-3),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.add_noise(0.1, 0.5, 0), optax.adam(1e-3)),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(1e-3, weight_decay=optax.linear_schedule(0, 1, 9)),
    "masked": optax.masked(optax.adam(1e-3), {"w": True, "b": False}),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-3), 4),
    "multi_transform": optax.multi_transform({0: optax.adam(1e-3), 1: optax.set_to_zero()}, {"w": 0, "b": 1}),
    "schedule": optax.sgd(optax.cosine_decay_schedule(1.0, 100), momentum=0.9, nesterov=True),
    "sgd with nothing to save": optax.sgd(1e-3),
    "lookahead": optax.adafactor(1e-3),
    "lion": optax.lion(1e-3, mu_dtype=jnp.bfloat16),
    "ema": optax.ema(0.9),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-3), 3),
    "lbfgs": optax.lbfgs(1e-3, memory_size=2),
}
PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optax_state_comes_back_in_its_own_types(tmp_path, name):
    optimizer = OPTIMIZERS[name]
    opt_state = optimizer.init(PARAMS)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, PARAMS, opt_state)
        assert_trees_equal(manager.restore(1, params=PARAMS, opt_state=opt_state).opt_state, opt_state)
        back = manager.restore(1, optimizer=optimizer)
    assert jax.tree.structure(back.opt_state) == jax.tree.structure(opt_state)
    assert_trees_equal(back.params, PARAMS)


def test_changing_from_one_optimizer_to_another_is_refused_by_name(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, PARAMS, optax.sgd(1e-3).init(PARAMS))
        with pytest.raises(StructureMismatchError, match=r"opt_state\[0\]\.mu\['w'\]"):
            manager.restore(1, params=PARAMS, optimizer=optax.adam(1e-3))
        back = manager.restore(1, params=PARAMS, opt_state=optax.adam(1e-3).init(PARAMS), partial=True)
        assert_trees_equal(back.opt_state, optax.adam(1e-3).init(PARAMS))


def test_an_optimizer_that_was_made_for_other_params_is_refused_with_what_to_do(tmp_path):
    both = {"base": jnp.ones(3), "adapter": jnp.ones(2)}
    optimizer = optax.masked(optax.adam(1e-3), {"base": False, "adapter": True})
    adapter = {"adapter": both["adapter"]}
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(ValueError, match=r"optimizer\.init fails for these params: .* opt_state="):
            manager.restore_or(params=adapter, optimizer=optimizer)  # at the start
        manager.save(1, adapter, optimizer.init(both))
        for how in ({"params": adapter}, {}):
            with pytest.raises(ValueError, match=r"optimizer\.init fails for these params: .* opt_state="):
                manager.restore(optimizer=optimizer, **how)
        back = manager.restore(params=adapter, opt_state=optimizer.init(both))
    assert_trees_equal(back.opt_state, optimizer.init(both))


@pytest.mark.parametrize("name", ["step", "metrics", "manifest.json", "a/b"])
def test_a_name_that_no_extra_can_have_is_refused_at_the_start_of_a_run(tmp_path, name):
    with (
        CheckpointManager(tmp_path) as manager,
        pytest.raises(ValueError, match=f"'{name}' cannot name an entry of extras"),
    ):
        manager.restore_or(params=PARAMS, extras={name: 1})


def test_a_step_without_an_extra_of_the_step_before_is_warned_of_and_its_error_says_what_to_do(tmp_path, caplog):
    state = np.random.default_rng(0).bit_generator.state
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, PARAMS, extras={"rng": state, "epoch": 1})
        manager.save(2, PARAMS, extras={"epoch": 1, "new": 2})
        manager.save(3, PARAMS, extras={"epoch": 1, "new": 2})
        manager.wait()
        assert [each.getMessage().partition(":")[0] for each in caplog.records if each.levelname == "WARNING"] == [
            "step 2 is saved without rng, which step 1 has"
        ]
        with pytest.raises(StructureMismatchError, match=r"step 3 was saved with no rng.*partial=\('rng',\)"):
            manager.restore(params=PARAMS, extras={"rng": state})
        manager.rewind(1)
        assert manager.restore(params=PARAMS, extras={"rng": state}).extras["rng"] == state


def test_an_object_that_is_no_extra_is_refused_with_what_is(tmp_path):
    with (
        CheckpointManager(tmp_path) as manager,
        pytest.raises(UnsupportedLeafError, match=r"rng: is a .*Generator.* pass its bit_generator\.state"),
    ):
        manager.save(1, PARAMS, extras={"rng": np.random.default_rng(0)})


class Everything:
    """Answers every name, as mocks, dicts with attributes and `nnx.Rngs` do."""

    asked: list[str]

    def __init__(self):
        object.__setattr__(self, "asked", [])

    def __getattr__(self, name):
        self.asked.append(name)
        return lambda *_: self


class Delegating:
    def __init__(self):
        self.inner = [1]

    def __getattr__(self, name):
        return getattr(self.inner, name)


@jax.tree_util.register_pytree_node_class
class TreeWithState:
    """A pytree first: its own words for its state are not used."""

    def __init__(self, w):
        self.w = w

    def get_state(self):
        raise AssertionError("asked for its state")

    set_state = get_state

    def tree_flatten(self):
        return (self.w,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@pytest.mark.parametrize("make", [Everything, Delegating, unittest.mock.Mock, unittest.mock.MagicMock])
def test_what_answers_every_name_is_no_iterator_and_refused_by_name(make, tmp_path):
    value = make()
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(UnsupportedLeafError, match=f"it: is a .*{make.__name__}"):
            manager.save(1, {"w": 1.0}, extras={"it": value})
        assert manager.steps() == []
    assert not isinstance(value, unittest.mock.Mock) or value.mock_calls == []
    assert not isinstance(value, Everything) or not set(value.asked) & {"get_state", "set_state"}


def test_a_pytree_with_a_state_is_saved_as_a_tree(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": 1.0}, extras={"it": TreeWithState(np.arange(3.0))})
        back = manager.restore(1, extras={"it": TreeWithState(np.zeros(3))}).extras["it"]
    assert np.array_equal(back.w, np.arange(3.0))


@pytest.mark.parametrize("drawn", [0, 3])
def test_the_streams_of_nnx_come_back_exactly_and_saving_draws_nothing(drawn, tmp_path):
    def used():
        rngs = nnx.Rngs(0, dropout=1)
        for _ in range(drawn):
            rngs.dropout()
        return rngs

    def state(rngs):
        return [np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
                for x in jax.tree_util.tree_leaves(rngs)]  # fmt: skip

    rngs, untouched = used(), used()
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": 1.0}, extras={"rngs": rngs})
        template = nnx.Rngs(7, dropout=8)
        before = state(template)
        back = manager.restore(1, extras={"rngs": template}).extras["rngs"]
    for each, expected in ((rngs, state(untouched)), (template, before)):
        assert all(np.array_equal(a, b) for a, b in zip(state(each), expected, strict=True))
    expected = [jax.random.key_data(untouched.dropout()), jax.random.key_data(untouched.params())]
    for each in (rngs, back):
        drawn_next = [jax.random.key_data(each.dropout()), jax.random.key_data(each.params())]
        assert all(np.array_equal(a, b) for a, b in zip(drawn_next, expected, strict=True))


WRONG_OPTIMIZERS = {
    "flax.nnx.training.optimizer.Optimizer": lambda net: nnx.Optimizer(net, optax.sgd(1.0), wrt=nnx.Param),
    "jax.example_libraries.optimizers.Optimizer": lambda net: optimizers.sgd(1.0),
    "builtins.tuple": lambda net: optax.sgd(1.0).init(nnx.state(net)),
}


@pytest.mark.parametrize("kind", WRONG_OPTIMIZERS)
def test_what_is_no_optimizer_of_optax_is_refused_by_name(tmp_path, kind):
    net = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with (
        CheckpointManager(tmp_path) as manager,
        pytest.raises(TypeError, match=rf"not {kind}: give its state as opt"),
    ):
        manager.restore_or(params=nnx.state(net), optimizer=WRONG_OPTIMIZERS[kind](net))


@pytest.mark.parametrize("number", [3, 0.1, True, 1 + 2j], ids=str)
def test_a_python_number_comes_back_as_one_from_an_abstract_template(tmp_path, number):
    """`jax.eval_shape` describes it as an array, and of fewer bits than it has."""
    state = {"w": jnp.ones(2), "number": number}
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, state).result()
        back = manager.restore(params=jax.eval_shape(lambda: state)).params
        assert type(back["number"]) is type(number)
        assert back["number"] == number
        wrong = jax.ShapeDtypeStruct((), jnp.int32 if isinstance(number, float) else jnp.float16)
        with pytest.raises(StructureMismatchError, match=r"params\['number'\]"):
            manager.restore(params={"w": jnp.ones(2), "number": wrong})


def test_a_tree_whose_static_part_cannot_be_compared_is_saved_again(tmp_path):
    class Table:
        def __init__(self, value, static):
            self.value, self.static = value, static

    jax.tree_util.register_pytree_node(
        Table, lambda table: ((table.value,), table.static), lambda static, values: Table(*values, static)
    )
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, Table(np.full(3, step), np.ones(2)))
        template = Table(np.zeros(3, int), np.ones(2))
        assert [manager.restore(step, params=template).params.value[0] for step in (1, 2)] == [1, 2]


@pytest.mark.parametrize("value", [np.complex64(1j), np.array(1j), jnp.array(1j), jax.random.key(0)], ids=str)
def test_a_metric_that_is_no_real_number_is_refused_by_name(value, tmp_path):
    said = r"metrics: 'loss' is [\s\S]*, not one number"
    with CheckpointManager(tmp_path) as manager, pytest.raises(TypeError, match=said):
        manager.save(1, {"w": np.ones(1)}, metrics={"loss": value})


@pytest.mark.parametrize(
    "value",
    [np.asarray(jnp.bfloat16(0.5))[()], np.asarray(jnp.bfloat16(0.5)), jnp.bfloat16(0.5), np.float16(0.5), 0.5],
)
def test_a_metric_may_be_a_number_of_any_real_type(value, tmp_path):
    with CheckpointManager(tmp_path) as manager:
        assert manager.save(1, {"w": np.ones(1)}, metrics={"loss": value}).result().metrics == {"loss": 0.5}


@pytest.mark.parametrize(
    "value", [np.str_("3"), np.array("3"), np.datetime64(3, "s"), np.array([3]), "3", b"3", None], ids=repr
)
def test_what_only_looks_like_a_number_is_no_metric(value, tmp_path):
    with (
        CheckpointManager(tmp_path) as manager,
        pytest.raises(TypeError, match=r"metrics: 'loss' is .*, not one number"),
    ):
        manager.save(1, {"w": np.ones(1)}, metrics={"loss": value})


@pytest.mark.parametrize("around", [None, 1, 2, 8])
def test_a_metric_may_be_on_any_devices_whatever_mesh_is_set(around, tmp_path, make_mesh):
    def sharding(**axes):
        return NamedSharding(make_mesh(**axes), PartitionSpec())

    one = SingleDeviceSharding(jax.devices()[3])
    places = {
        "one": one, "two": sharding(a=2), "all": sharding(data=8), "both": sharding(a=2, b=4),
        "host": one.with_memory_kind("pinned_host"), "copies": sharding(data=8).with_memory_kind("pinned_host"),
    }  # fmt: skip
    metrics = {name: jax.device_put(jnp.float32(0.5), place) for name, place in places.items()}
    inside = contextlib.nullcontext() if around is None else jax.set_mesh(make_mesh(data=around))
    with CheckpointManager(tmp_path) as manager, inside:
        saved = manager.save(1, {"w": np.ones(1)}, metrics=metrics | {"free": jnp.float32(0.5)})
        assert set(saved.result().metrics.values()) == {0.5}


@pytest.mark.parametrize("around", [jax.jit, jax.grad, jax.vmap])
def test_a_traced_metric_is_refused_by_name_at_the_call(around, tmp_path):
    with CheckpointManager(tmp_path) as manager:

        def step(loss):
            manager.save(1, {"w": np.ones(1)}, metrics={"loss": loss})
            return loss

        with pytest.raises(TypeError, match=r"metrics: 'loss' is a tracer: save outside of jax\.jit"):
            around(step)(jnp.ones(3) if around is jax.vmap else 1.0)


def test_a_metric_that_is_too_large_is_refused_by_name(tmp_path):
    with CheckpointManager(tmp_path) as manager, pytest.raises(ValueError, match="metrics: 'loss' is too large"):
        manager.save(1, {"w": np.ones(1)}, metrics={"loss": 10**400})


@pytest.mark.parametrize("step", [2**63, 10**30])
def test_a_step_that_no_manifest_can_hold_is_refused(step, tmp_path):
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(ValueError, match=rf"step {step} cannot be saved: it must be below 2\*\*63"):
            manager.save(step, {"w": np.ones(1)})
        manager.save(2**63 - 1, {"w": np.ones(1)}).result()
        assert manager.restore().step == 2**63 - 1


def test_keys_that_are_equal_and_not_the_same_stay_what_they_are(tmp_path):
    """Python holds 1, 1.0 and True to be one key."""
    keys = [1, True, 1.0, 1, "1"]
    with CheckpointManager(tmp_path) as manager:
        for step, key in enumerate(keys):
            manager.save(step, {"a": [{key: np.full(2, step)}]})
        manager.wait()
        for step, key in enumerate(keys):
            (found,) = manager.restore(step).params["a"][0]
            assert (type(found), found) == (type(key), key)
            same = manager.restore(step, params={"a": [{key: np.zeros(2, int)}]}).params["a"][0]
            assert [type(each) for each in same] == [type(key)]


class Shuffled:
    """An iterator that goes through a permutation; its state gets shorter."""

    def __init__(self, left):
        self.left = left

    def get_state(self):
        return {"epoch": 1, "left": self.left}

    def set_state(self, state):
        self.left = state["left"]


@pytest.mark.parametrize("fresh", [np.arange(100), np.arange(37), [], np.arange(3.0), {"a": np.ones(2)}], ids=repr)
def test_an_iterator_gets_what_it_had_whatever_a_fresh_one_has(fresh, tmp_path):
    left = np.random.default_rng(0).permutation(100)[:37]
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, {"w": np.ones(1)}, extras={"data": Shuffled(left[step:])}).result()
        for step in (1, 2, 1):
            mine = Shuffled(fresh)
            found = manager.restore(step, params={"w": np.ones(1)}, extras={"data": mine})
            assert found.extras["data"] is mine
            assert np.array_equal(mine.left, left[step:])
            assert (found.missing, found.unused) == ((), ())
