"""Optax alone, with its params split over a mesh (FSDP): MultiSteps, and an average of the params as an extra.

The mesh is as `jax.make_mesh` gives it, so an operation says how its result lies wherever that does not follow.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import ckptmgr

IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = IMAGES.astype("float32") / 16
OPTIMIZER = optax.MultiSteps(optax.adamw(1e-2), every_k_schedule=3)
MESH = jax.make_mesh((8,), ("data",))
SPLIT, REPLICATED = NamedSharding(MESH, PartitionSpec("data")), NamedSharding(MESH, PartitionSpec())


def init():
    one, two = jax.random.split(jax.random.key(0))
    params = {
        "hidden": {"w": jax.random.normal(one, (64, 32)) / 8, "b": jnp.zeros(32)},
        "out": {"w": jax.random.normal(two, (32, 10)) / 6, "b": jnp.zeros(10)},
    }
    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding(leaf)), params)


def sharding(leaf):
    """Matrices are split, what is small is replicated."""
    return SPLIT if leaf.ndim == 2 else REPLICATED


@jax.jit
def train_step(params, opt_state, ema, images, labels):
    def loss_fn(params):
        params = jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, REPLICATED), params)
        hidden = jax.nn.relu(images @ params["hidden"]["w"] + params["hidden"]["b"])
        logits = hidden @ params["out"]["w"] + params["out"]["b"]
        return optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1])).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, opt_state, optax.incremental_update(params, ema, 0.1), loss


def train(directory, steps):
    params = init()
    with ckptmgr.CheckpointManager(directory, keep=2) as manager:
        ckpt = manager.restore_or(params=params, optimizer=OPTIMIZER, extras={"ema": params})
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started anew")
        params, opt_state, ema = ckpt.params, ckpt.opt_state, ckpt.extras["ema"]
        for step in range(ckpt.step + 1, steps + 1):
            batch = slice(step * 64, (step + 1) * 64)
            images, labels = jax.device_put((IMAGES[batch], LABELS[batch]), SPLIT)
            params, opt_state, ema, loss = train_step(params, opt_state, ema, images, labels)
            manager.save(step, params, opt_state, extras={"ema": ema}, metrics={"loss": loss})
    return params, opt_state, ema
