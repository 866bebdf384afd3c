"""Haiku with state: BatchNorm and its averages, dropout, and a TrainState as Haiku's own examples have it.

The module state and the key are extras. The params are replicated over a mesh, the batch is split (data parallel).
"""

from typing import Any, NamedTuple

import haiku as hk
import jax
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import ckptmgr

IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = IMAGES.astype("float32") / 16
OPTIMIZER = optax.adam(1e-2)


class TrainState(NamedTuple):
    params: hk.Params
    state: hk.State
    opt_state: optax.OptState
    key: Any


@hk.transform_with_state
def forward(x, is_training):
    x = hk.Linear(32)(x)
    x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training)
    x = jax.nn.relu(x)
    if is_training:
        x = hk.dropout(hk.next_rng_key(), 0.2, x)
    return hk.Linear(10)(x)


@jax.jit
def init():
    params, state = forward.init(jax.random.PRNGKey(0), IMAGES[:1], is_training=True)
    return TrainState(params, state, OPTIMIZER.init(params), jax.random.PRNGKey(1))


@jax.jit
def train_step(train_state, images, labels):
    def loss_fn(params):
        logits, state = forward.apply(params, train_state.state, dropout_key, images, is_training=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state

    key, dropout_key = jax.random.split(train_state.key)
    (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(train_state.params)
    updates, opt_state = OPTIMIZER.update(grads, train_state.opt_state)
    return TrainState(optax.apply_updates(train_state.params, updates), state, opt_state, key), loss


def train(directory, steps):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    now = jax.device_put(init(), NamedSharding(mesh, PartitionSpec()))
    with ckptmgr.CheckpointManager(directory, keep=2) as manager:
        extras = {"state": now.state, "key": now.key}
        ckpt = manager.restore_or(params=now.params, optimizer=OPTIMIZER, extras=extras)
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started anew")
        now = TrainState(params=ckpt.params, opt_state=ckpt.opt_state, **ckpt.extras)
        for step in range(ckpt.step + 1, steps + 1):
            batch = slice(step * 64, (step + 1) * 64)
            split = NamedSharding(mesh, PartitionSpec("data"))
            now, loss = train_step(now, *jax.device_put((IMAGES[batch], LABELS[batch]), split))
            extras = {"state": now.state, "key": now.key}
            manager.save(step, now.params, now.opt_state, extras=extras, metrics={"loss": loss})
    return now
