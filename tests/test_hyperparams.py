"""Injected hyperparameters: read, changed on the fly, saved and restored."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ckptmgr import CheckpointManager, get_hyperparams, set_hyperparams

PARAMS = {"w": jnp.ones(4)}
ADAM = optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)


def step(optimizer, params, opt_state):
    updates, opt_state = optimizer.update(jax.tree.map(jnp.ones_like, params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def test_a_new_learning_rate_is_used_at_once_and_nothing_else_changes():
    opt_state = ADAM.init(PARAMS)
    assert get_hyperparams(opt_state)["learning_rate"] == np.float32(1e-2)
    changed = set_hyperparams(opt_state, learning_rate=0.5)
    moved = step(ADAM, PARAMS, changed)[0]["w"] - PARAMS["w"]
    assert np.allclose(moved, -0.5, atol=1e-4)
    rate, before = get_hyperparams(changed)["learning_rate"], get_hyperparams(opt_state)["learning_rate"]
    assert (rate.dtype, rate.sharding, rate.weak_type) == (before.dtype, before.sharding, before.weak_type)
    assert jax.tree.structure(changed) == jax.tree.structure(opt_state)
    others = {name: value for name, value in get_hyperparams(changed).items() if name != "learning_rate"}
    assert others == {name: value for name, value in get_hyperparams(opt_state).items() if name != "learning_rate"}


def test_an_array_that_is_given_is_copied_for_each_state_as_a_train_step_may_donate_them():
    params, given = {"a": jnp.ones(3), "b": jnp.ones(3)}, jnp.float32(0.5)
    rates = {name: optax.inject_hyperparams(optax.sgd)(1e-2) for name in params}
    optimizer = optax.multi_transform(rates, {name: name for name in params})
    opt_state = set_hyperparams(optimizer.init(params), learning_rate=given)
    moved, _ = jax.jit(lambda *both: step(optimizer, *both), donate_argnums=(0, 1))(params, opt_state)
    assert np.array_equal(moved["a"], np.full(3, 0.5))
    assert not given.is_deleted()


def test_changed_before_a_save_after_a_restore_and_kept_by_the_next(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        opt_state = set_hyperparams(ADAM.init(PARAMS), learning_rate=0.25)
        manager.save(1, PARAMS, opt_state)
        back = manager.restore(params=PARAMS, optimizer=ADAM).opt_state
        assert get_hyperparams(back)["learning_rate"] == 0.25
        manager.save(2, PARAMS, set_hyperparams(back, learning_rate=0.125))
        again = manager.restore(params=PARAMS, optimizer=ADAM).opt_state
        assert get_hyperparams(again)["learning_rate"] == 0.125


def test_dtype_and_sharding_are_kept(make_mesh):
    mesh = make_mesh(data=8)
    everywhere = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.bfloat16)(learning_rate=1e-2).init(
        PARAMS
    )
    opt_state = jax.device_put(opt_state, everywhere)
    rate = get_hyperparams(set_hyperparams(opt_state, learning_rate=0.3))["learning_rate"]
    assert rate.dtype == jnp.bfloat16
    assert rate.sharding == everywhere
    assert rate == jnp.bfloat16(0.3)


def test_inside_chain_masked_and_multi_transform():
    def wrap(make):
        return optax.inject_hyperparams(make)(learning_rate=1e-2)

    nested = [
        optax.chain(optax.clip(1.0), wrap(optax.adam)),
        optax.masked(wrap(optax.adam), {"w": True}),
        optax.multi_transform({"a": wrap(optax.sgd), "b": wrap(optax.adam)}, {"w": "a"}),
        optax.MultiSteps(wrap(optax.adam), 2),
    ]
    for optimizer in nested:
        changed = set_hyperparams(optimizer.init(PARAMS), learning_rate=0.5)
        assert get_hyperparams(changed)["learning_rate"] == 0.5


def spelled(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


NAMES = ["hyperparams", "inner_state", "hyperparams_states", "learning_rate", "count"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("plain", [False, True], ids=["as made", "plain"])
def test_a_name_of_the_state_may_be_a_label_and_a_parameter_too(name, plain, tmp_path):
    params = {name: {"learning_rate": jnp.ones(()), "hyperparams": {"b1": jnp.ones(())}}, "w": jnp.ones(())}
    labels = {name: name, "w": "other"}
    optimizer = optax.chain(optax.multi_transform({name: ADAM, "other": optax.chain(ADAM)}, labels), ADAM)
    state = optimizer.init(params)
    if plain:
        with CheckpointManager(tmp_path) as manager:
            manager.save(1, params, state).result()
            state = manager.restore().opt_state
    before, after = spelled(state), spelled(set_hyperparams(state, learning_rate=0.25, b1=0.5))
    changed = {path for path, leaf in after.items() if leaf is not before[path]}
    assert len(changed) == 6  # two in each of three optimizers, and nothing of mu and nu
    assert {float(after[path]) for path in changed} == {0.25, 0.5}
    assert not any("mu" in path or "nu" in path for path in changed)
    assert set(get_hyperparams(state)) == {"learning_rate", "b1", "b2", "eps", "eps_root"}


def test_one_injected_optimizer_inside_of_another():
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
    outer = optax.inject_hyperparams(lambda decay: optax.chain(inner, optax.add_decayed_weights(decay)))(decay=0.5)
    state = set_hyperparams(outer.init(PARAMS), learning_rate=2.0, decay=0.25)
    assert get_hyperparams(state) == {"learning_rate": 2.0, "decay": 0.25}


@pytest.mark.parametrize("value", [2, np.int32(2), jnp.int32(2), jnp.asarray(2)], ids=repr)
def test_a_train_step_is_not_compiled_again_for_a_new_value(value):
    clip = optax.inject_hyperparams(optax.clip_by_global_norm)(max_norm=1)
    for number, make in ((value, clip), (0.5, ADAM)):
        update = jax.jit(lambda state, make=make: make.update(PARAMS, state, PARAMS)[1])
        name = "max_norm" if make is clip else "learning_rate"
        state = make.init(PARAMS)
        update(state)
        update(set_hyperparams(state, **{name: number}))
        assert update._cache_size() == 1
        again = jax.jit(lambda state, name=name, number=number: set_hyperparams(state, **{name: number}))(state)
        assert get_hyperparams(again)[name].weak_type == get_hyperparams(state)[name].weak_type


def test_inside_of_jit():
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    params = {"w": jnp.ones(3)}

    @jax.jit
    def step(params, opt_state, rate):
        opt_state = set_hyperparams(opt_state, learning_rate=rate)
        updates, opt_state = tx.update(params, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = step(params, tx.init(params), 0.25)
    assert (params["w"] == 0.75).all()
    assert get_hyperparams(opt_state) == {"learning_rate": 0.25}


def test_errors_show_what_to_do():
    with pytest.raises(ValueError, match=r"optax\.inject_hyperparams\(optax\.adam\)"):
        get_hyperparams(optax.adam(1e-3).init(PARAMS))
    opt_state = ADAM.init(PARAMS)
    with pytest.raises(ValueError, match=r"'lr' is not among the hyperparameters \['b1'.*'learning_rate'\]"):
        set_hyperparams(opt_state, lr=1.0)
    with pytest.raises(TypeError, match=r"'learning_rate' has shape \(\), not \(2,\)"):
        set_hyperparams(opt_state, learning_rate=[1.0, 2.0])
    scheduled = optax.inject_hyperparams(optax.adam)(learning_rate=optax.constant_schedule(0.1))
    with pytest.raises(ValueError, match="follows a schedule"):
        set_hyperparams(scheduled.init(PARAMS), learning_rate=1.0)


@pytest.mark.parametrize("value", [0.25, 1, np.float32(0.25), jnp.float32(0.25)], ids=str)
def test_a_state_on_the_host_stays_there(value):
    opt_state = jax.device_get(ADAM.init(PARAMS))
    before = get_hyperparams(opt_state)["learning_rate"]
    rate = get_hyperparams(set_hyperparams(opt_state, learning_rate=value))["learning_rate"]
    assert (type(rate), rate.dtype, rate.shape, rate) == (type(before), before.dtype, (), value)


def test_each_injected_optimizer_keeps_its_own_dtype():
    optimizer = optax.multi_transform(dict.fromkeys("ab", ADAM), {"x": "a", "y": "b"})
    state = optimizer.init({"x": jnp.ones(2), "y": jnp.ones(2, jnp.bfloat16)})
    for before in (state, jax.device_get(state)):
        inner = set_hyperparams(before, learning_rate=3e-4).inner_states
        rates = {name: each.inner_state.hyperparams["learning_rate"] for name, each in inner.items()}
        assert (rates["a"].dtype, rates["b"].dtype) == (jnp.float32, jnp.bfloat16)
        assert (rates["a"], rates["b"]) == (np.float32(3e-4), jnp.bfloat16(3e-4))


def flax_states(injected):
    nnx = pytest.importorskip("flax.nnx")
    optimizer = nnx.Optimizer(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), injected, wrt=nnx.Param)
    state = nnx.state(optimizer)
    return [optimizer.opt_state, state, state["opt_state"], nnx.to_pure_dict(state)]


INNER = {
    "with a state": optax.adam, "without": optax.sgd, "with an empty one": optax.scale_by_learning_rate,
    "in a chain": lambda learning_rate: optax.chain(optax.clip(1.0), optax.sgd(learning_rate)),
}  # fmt: skip


@pytest.mark.parametrize("inner", INNER)
def test_in_the_states_of_flax_and_in_plain_containers(inner, tmp_path):
    injected = optax.inject_hyperparams(INNER[inner])(learning_rate=1e-2)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, PARAMS, injected.init(PARAMS)).result()
        plain = manager.restore().opt_state
    for state in [plain, *flax_states(injected)]:
        changed = set_hyperparams(state, learning_rate=0.25)
        assert get_hyperparams(changed)["learning_rate"] == 0.25
        assert get_hyperparams(state)["learning_rate"] == np.float32(1e-2)
        assert jax.tree.structure(changed) == jax.tree.structure(state)


@pytest.mark.parametrize(
    "where", [jnp.asarray, jax.device_get, lambda tree: tree], ids=["jax", "numpy", "as made"]
)
def test_a_whole_number_takes_no_fraction(where):
    clip = optax.inject_hyperparams(optax.clip_by_global_norm)(max_norm=1)
    state = jax.tree.map(where, clip.init(PARAMS))
    assert get_hyperparams(set_hyperparams(state, max_norm=2.0))["max_norm"] == 2
    with pytest.raises(TypeError, match=r"'max_norm' is a whole number, which 0\.5 is not"):
        set_hyperparams(state, max_norm=0.5)
