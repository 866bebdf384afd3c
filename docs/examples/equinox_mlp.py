"""Equinox: the arrays of the model are params; what else is in it is code and stays in the script.

    python docs/examples/equinox_mlp.py [DIRECTORY]

Stop it at any time and run it again: it goes on where it was.
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_diabetes

import ckptmgr

DATA = load_diabetes()
INPUTS, TARGETS = jnp.asarray(DATA.data, jnp.float32), jnp.asarray(DATA.target, jnp.float32)[:, None]
OPTIMIZER = optax.adam(1e-1)
MODEL = eqx.nn.MLP(10, 1, width_size=32, depth=1, key=jax.random.key(0))


@jax.jit
def train_step(params, opt_state):
    def loss(params):
        model = eqx.combine(params, eqx.filter(MODEL, eqx.is_array, inverse=True))
        return jnp.mean((jax.vmap(model)(INPUTS) - TARGETS) ** 2)

    value, gradient = jax.value_and_grad(loss)(params)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state)
    return eqx.apply_updates(params, updates), opt_state, value


def train(directory, total_steps):
    params = eqx.filter(MODEL, eqx.is_array)  # a model with None in the place of all that is no array
    with ckptmgr.CheckpointManager(directory, save_every=50, keep=3) as manager:
        ckpt = manager.restore_or(step=0, params=params, opt_state=OPTIMIZER.init(params))
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started anew")
        params, opt_state = ckpt.params, ckpt.opt_state
        for step in range(ckpt.step + 1, total_steps + 1):
            params, opt_state, loss = train_step(params, opt_state)
            manager.save(step, params, opt_state, metrics={"loss": loss})
        manager.save(total_steps, params, opt_state, force=True, on_exists="skip")
    return params, opt_state


if __name__ == "__main__":
    train(*(sys.argv[1:] or ["runs/equinox_mlp"]), total_steps=200)
