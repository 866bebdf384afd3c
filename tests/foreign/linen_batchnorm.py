"""Flax Linen with BatchNorm: a TrainState that has batch_stats, as in Flax's ImageNet example.

Its params and opt_state are params and opt_state here, its batch_stats are an extra. Its apply_fn and tx are code:
the script makes them anew.
"""

from typing import Any

import jax
import optax
from flax import linen as nn
from flax.training import train_state
from sklearn.datasets import load_digits

import ckptmgr

IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = IMAGES.astype("float32").reshape(-1, 8, 8, 1) / 16


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.relu(x).mean(axis=(1, 2))
        return nn.Dense(10)(x)


class TrainState(train_state.TrainState):
    batch_stats: Any


def create_train_state():
    net = ConvNet()
    variables = net.init(jax.random.key(0), IMAGES[:1], train=False)
    tx = optax.sgd(optax.cosine_decay_schedule(0.1, 100), momentum=0.9, nesterov=True)
    return TrainState.create(apply_fn=net.apply, tx=tx, **variables)


@jax.jit
def train_step(state, images, labels):
    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

    (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=new["batch_stats"]), loss


def train(directory, steps):
    state = create_train_state()
    with ckptmgr.CheckpointManager(directory, keep=2) as manager:
        extras = {"batch_stats": state.batch_stats}
        ckpt = manager.restore_or(params=state.params, optimizer=state.tx, extras=extras)
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started anew")
        state = state.replace(step=ckpt.step, params=ckpt.params, opt_state=ckpt.opt_state, **ckpt.extras)
        for step in range(ckpt.step + 1, steps + 1):
            batch = slice(step * 64, (step + 1) * 64)
            state, loss = train_step(state, IMAGES[batch], LABELS[batch])
            extras = {"batch_stats": state.batch_stats}
            manager.save(step, state.params, state.opt_state, extras=extras, metrics={"loss": loss})
    return state.params, state.opt_state, state.batch_stats
