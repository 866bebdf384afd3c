"""Haiku: params as they are, and the module state (here an average that batch norm keeps) as an extra.

    python docs/examples/haiku_mlp.py [DIRECTORY]

Stop it at any time and run it again: it goes on where it was.
"""

import sys

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_diabetes

import ckptmgr

DATA = load_diabetes()
INPUTS, TARGETS = jnp.asarray(DATA.data, jnp.float32), jnp.asarray(DATA.target, jnp.float32)[:, None]
OPTIMIZER = optax.adam(1e-1)


@hk.without_apply_rng
@hk.transform_with_state
def net(x):
    norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)
    hidden = norm(hk.Linear(32)(x), is_training=True)
    return hk.Linear(1)(jax.nn.relu(hidden))


@jax.jit
def train_step(params, opt_state, averages):
    def loss(params):
        predicted, kept = net.apply(params, averages, INPUTS)
        return jnp.mean((predicted - TARGETS) ** 2), kept

    (value, averages), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, averages, value


def train(directory, total_steps):
    params, averages = net.init(jax.random.key(0), INPUTS)
    start = {"params": params, "opt_state": OPTIMIZER.init(params), "extras": {"averages": averages}}
    with ckptmgr.CheckpointManager(directory, save_every=50, keep=3) as manager:
        ckpt = manager.restore_or(step=0, **start)
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started anew")
        params, opt_state, averages = ckpt.params, ckpt.opt_state, ckpt.extras["averages"]
        for step in range(ckpt.step + 1, total_steps + 1):
            params, opt_state, averages, loss = train_step(params, opt_state, averages)
            metrics = {"loss": loss}
            manager.save(step, params, opt_state, extras={"averages": averages}, metrics=metrics)
    return params, opt_state, averages


if __name__ == "__main__":
    train(*(sys.argv[1:] or ["runs/haiku_mlp"]), total_steps=200)
