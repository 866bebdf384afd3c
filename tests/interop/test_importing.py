"""What `ckptmgr import` saves of the files of others: all of it, in the form that an optimizer's state has."""

import functools
import pickle

import flax.linen as nn
import flax.serialization
import flax.training.checkpoints
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze

import ckptmgr
from ckptmgr import interop
from ckptmgr.interop.importing import with_sequences
from ckptmgr.testing import assert_trees_equal


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        return nn.Dense(1, name="0")(nn.Dense(3, name="1")(x))  # names that look like places


class TrainState(flax.training.train_state.TrainState):
    batch_stats: object
    rng: object
    epoch: int


VARIABLES = Model().init(jax.random.key(0), jnp.ones((2, 4)))
DRAW = np.random.default_rng(0)
LABELS = {"BatchNorm_0": "0", "Dense_0": "1", "0": "1", "1": "0"}
MASK = {"BatchNorm_0": False, "Dense_0": {"kernel": True, "bias": False}, "0": True, "1": False}
OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "lion in bfloat16": optax.lion(1e-2, mu_dtype=jnp.bfloat16),
    "chain of one": optax.chain(optax.adam(1e-2)),
    "chain of chains": optax.chain(optax.chain(optax.clip(1.0), optax.sgd(0.1, 0.9)), optax.ema(0.9)),
    "clip and adam by schedule": optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0.1, 0.0, 9))
    ),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2),
    "masked": optax.masked(optax.adamw(1e-2), MASK),
    "multi_transform": optax.multi_transform({"0": optax.adam(1e-2), "1": optax.sgd(0.1, momentum=0.9)}, LABELS),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=optax.linear_schedule(0.1, 0.0, 9)),
}


@functools.cache
def trained(name):
    state = TrainState.create(
        apply_fn=Model().apply,
        params=VARIABLES["params"],
        tx=OPTIMIZERS[name],
        batch_stats=VARIABLES["batch_stats"],
        rng=jax.random.PRNGKey(7),
        epoch=3,
    )
    return state.replace(step=3, opt_state=jax.tree.map(as_if_trained, state.opt_state))


def as_if_trained(leaf):
    """Other values of the same kind, made without a compiler."""
    values = np.asarray(DRAW.normal(size=leaf.shape) * 9).astype(leaf.dtype)
    return leaf if leaf.weak_type else jnp.asarray(values)


def saved(run, found):
    with ckptmgr.CheckpointManager(run) as manager:
        manager.save(found.step, found.params, found.opt_state, extras=found.extras, metrics=found.metrics)


def check(run, state, name):
    """A run restored with `optimizer=` has the state that was trained: its types and its bits."""
    extras = {"batch_stats": state.batch_stats, "rng": state.rng}
    back = ckptmgr.CheckpointManager(run).restore(params=state.params, optimizer=OPTIMIZERS[name], extras=extras)
    assert jax.tree.structure(back.opt_state) == jax.tree.structure(state.opt_state)
    assert_trees_equal((back.params, back.opt_state), (state.params, state.opt_state))
    assert_trees_equal(dict(back.extras), extras)
    assert back.step == 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_flax_train_state_is_restored_with_optimizer(name, tmp_path):
    state = trained(name)
    (tmp_path / "state.msgpack").write_bytes(flax.serialization.to_bytes(state))
    found = interop.incoming(tmp_path / "state.msgpack")
    assert (found.step, set(found.extras)) == (3, {"batch_stats", "rng", "epoch"})
    saved(tmp_path / "run", found)
    check(tmp_path / "run", state, name)
    assert ckptmgr.CheckpointManager(tmp_path / "run").restore().extras["epoch"] == 3


def test_no_entry_is_dropped_without_a_word(tmp_path):
    for name, tree in (("state.pkl", {"params": {"w": np.ones(2)}, "step": 3}), ("ema.pkl", {"w": np.zeros(2)})):
        (tmp_path / name).write_bytes(pickle.dumps(tree))
    with pytest.raises(
        ValueError, match=r"state.pkl has params too: skip it there \(--skip params\), or leave out"
    ):
        interop.incoming(tmp_path / "state.pkl", params=tmp_path / "ema.pkl")
    found = interop.incoming(tmp_path / "state.pkl", params=tmp_path / "ema.pkl", skip=["params"])
    assert (found.params["w"] == 0).all()
    with pytest.raises(ValueError, match=r"skip \(rng\) leaves out entries of a file"):
        interop.incoming(params=tmp_path / "ema.pkl", skip=["rng"], step=3)


@pytest.mark.parametrize("how", ["optax states", "state dict", "frozen"])
@pytest.mark.parametrize("name", ["adam", "clip and adam by schedule", "multi_transform"])
def test_a_pickle_of_the_same(name, how, tmp_path):
    state = trained(name)
    plain = flax.serialization.to_state_dict(state) if how == "state dict" else {
        field: getattr(state, field) for field in ("params", "opt_state", "batch_stats", "rng")
    } | {"step": 3}  # fmt: skip
    if how == "frozen":
        plain |= {field: freeze(plain[field]) for field in ("params", "batch_stats")}
    config = {"lr": 0.1, "layers": (5, 3), "name": "small", "seed": np.int64(4)}
    metrics = {"loss": jnp.float32(0.5), "accuracy": np.float64(0.25), "epoch": 2}
    plain |= {"epoch": 3, "config": config, "metrics": metrics, "notes": None}
    (tmp_path / "state.pkl").write_bytes(pickle.dumps(plain))
    saved(tmp_path / "run", interop.incoming(tmp_path / "state.pkl"))
    check(tmp_path / "run", state, name)
    back = ckptmgr.CheckpointManager(tmp_path / "run").restore()
    assert dict(back.metrics) == {"loss": 0.5, "accuracy": 0.25, "epoch": 2}
    assert back.extras["config"] == {"lr": 0.1, "layers": [5, 3], "name": "small", "seed": 4}
    assert (back.extras["epoch"], back.extras["notes"]) == (3, None)


@pytest.mark.parametrize("name", ["adam", "clip and adam by schedule", "masked"])
def test_a_state_of_named_tensors_is_restored_with_optimizer(name, tmp_path):
    state = trained(name)
    for item in ("params", "opt_state"):
        interop.write(getattr(state, item), tmp_path / f"{item}.npz")
    files = {item: tmp_path / f"{item}.npz" for item in ("params", "opt_state")}
    saved(tmp_path / "run", interop.incoming(step=3, **files))
    back = ckptmgr.CheckpointManager(tmp_path / "run").restore(params=state.params, optimizer=OPTIMIZERS[name])
    assert_trees_equal((back.params, back.opt_state), (state.params, state.opt_state))


def test_digits_become_places_but_where_the_params_have_them():
    params = {"0": {"w": 1, "b": 2}, "1": {"w": 3, "b": 4}}
    adam = {"count": 0, "mu": params, "nu": params}
    assert with_sequences({"0": adam, "1": {}}, params) == (adam, {})
    assert with_sequences({"0": {}, "1": {"0": adam, "1": {}}}, params) == ({}, (adam, {}))
    masked = {"0": {"w": 1, "b": {}}, "1": {}}
    assert with_sequences({"0": {"mu": masked}}, params) == ({"mu": masked},)
    assert with_sequences({"inner_states": {"0": {"0": {}}, "1": {"0": adam}}}, params) == {
        "inner_states": {"0": ({},), "1": (adam,)}
    }
    assert with_sequences({"1": adam}, params) == (None, adam)
    for state in (adam, {"01": 1}, {"a": 1, "0": 2}, {"99999999": 1}, {}, None, 3, (1, {"b": 2})):
        assert with_sequences(state, params) == state


@pytest.fixture
def legacy(tmp_path):
    """A directory of flax's own checkpoints, msgpack files without an ending, and what was saved."""
    state = trained("adam")
    flax.config.update("flax_use_orbax_checkpointing", False)
    for step in (20, 100, 9120):
        save = flax.training.checkpoints.save_checkpoint
        save(tmp_path / "flax", state.replace(step=step), step, keep=9)
    flax.config.update("flax_use_orbax_checkpointing", True)
    return tmp_path / "flax", state


@pytest.mark.filterwarnings("ignore:Flax Checkpointing will soon be deprecated")
def test_flax_names_are_read_the_newest_or_the_step_asked_for(legacy):
    folder, state = legacy
    assert (folder / "checkpoint_9120").is_file()
    for path, step, expected in ((folder / "checkpoint_20", None, 20), (folder, None, 9120), (folder, 100, 100)):
        found = interop.incoming(path, step=step)
        assert found.step == expected
        assert_trees_equal(jax.tree.map(jnp.asarray, found.params), dict(state.params))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7; it has \[20, 100, 9120\]"):
        interop.incoming(folder, step=7)


def test_the_step_is_taken_from_the_name_if_the_file_has_none(tmp_path):
    (tmp_path / "checkpoint_41").write_bytes(flax.serialization.to_bytes({"params": VARIABLES["params"]}))
    assert interop.incoming(tmp_path / "checkpoint_41").step == 41
    assert interop.incoming(tmp_path / "checkpoint_41", step=5).step == 5
    (tmp_path / "checkpoint_41").rename(tmp_path / "model.msgpack")
    with pytest.raises(ValueError, match="--step N"):
        interop.incoming(tmp_path / "model.msgpack")


def test_a_directory_of_flax_and_orbax_is_read(tmp_path):
    state = trained("clip and adam by schedule")
    target = {"params": state.params, "opt_state": state.opt_state, "step": 3, "batch_stats": state.batch_stats,
              "rng": state.rng}  # fmt: skip
    interop.write(target, tmp_path / "flax" / "checkpoint_3")
    for path in (tmp_path / "flax", tmp_path / "flax" / "checkpoint_3"):
        run = tmp_path / f"run of {path.name}"
        saved(run, interop.incoming(path))
        check(run, state, "clip and adam by schedule")


@pytest.mark.parametrize(
    ("entry", "value", "why"),
    [("metrics", {"loss": [1.0, 2.0]}, "metrics is not a dict of numbers.*--skip metrics"),
     ("history of it", 3, "'history of it' cannot name an entry"),
     ("config", {"name": "x", "w": np.ones(2)}, r"config\['name'\]"),
     ("step", 2.5, "step .* is not a whole number")],
)  # fmt: skip
def test_what_cannot_be_saved_is_an_error_that_names_it_or_is_left_out(entry, value, why, tmp_path):
    whole = {"params": {"w": np.ones(2)}, "step": 1, entry: value}
    (tmp_path / "state.pkl").write_bytes(pickle.dumps(whole))
    with pytest.raises((ValueError, ckptmgr.UnsupportedLeafError), match=why):
        saved(tmp_path / "run", interop.incoming(tmp_path / "state.pkl"))
    saved(tmp_path / "run", interop.incoming(tmp_path / "state.pkl", step=1, skip=[entry]))
    assert set(ckptmgr.CheckpointManager(tmp_path / "run").info(1).items) & {"config", "history of it"} == set()
    with pytest.raises(ValueError, match="has no such entry"):
        interop.incoming(tmp_path / "state.pkl", step=1, skip=["nothing"])
