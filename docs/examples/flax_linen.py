"""Flax Linen: params and opt_state of a TrainState; its apply_fn and tx are code and stay in the script.

    python docs/examples/flax_linen.py [DIRECTORY]

Stop it at any time and run it again: it goes on where it was.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from flax import linen
from flax.training.train_state import TrainState
from sklearn.datasets import load_diabetes

import ckptmgr

DATA = load_diabetes()
INPUTS, TARGETS = jnp.asarray(DATA.data, jnp.float32), jnp.asarray(DATA.target, jnp.float32)[:, None]


def init():
    net = linen.Sequential([linen.Dense(32), linen.relu, linen.Dense(1)])
    params = net.init(jax.random.key(0), INPUTS)["params"]
    return TrainState.create(apply_fn=net.apply, params=params, tx=optax.adam(1e-1))


@jax.jit
def train_step(state):
    def loss(params):
        return jnp.mean((state.apply_fn({"params": params}, INPUTS) - TARGETS) ** 2)

    value, gradient = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradient), value


def train(directory, total_steps):
    state = init()
    with ckptmgr.CheckpointManager(directory, save_every=50, keep=3) as manager:
        ckpt = manager.restore_or(step=0, params=state.params, opt_state=state.opt_state)
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started anew")
        state = state.replace(step=ckpt.step, params=ckpt.params, opt_state=ckpt.opt_state)
        for step in range(ckpt.step + 1, total_steps + 1):
            state, loss = train_step(state)
            manager.save(step, state.params, state.opt_state, metrics={"loss": loss})
        manager.save(total_steps, state.params, state.opt_state, force=True, on_exists="skip")
    return state.params, state.opt_state


if __name__ == "__main__":
    train(*(sys.argv[1:] or ["runs/flax_linen"]), total_steps=200)
