"""optax keeps params and opt_state apart; a checkpoint keeps both, and the step.

    python docs/examples/optax_adam.py [DIRECTORY]

Stop it at any time and run it again: it goes on where it was.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_diabetes

import ckptmgr

DATA = load_diabetes()
INPUTS, TARGETS = jnp.asarray(DATA.data, jnp.float32), jnp.asarray(DATA.target, jnp.float32)[:, None]
OPTIMIZER = optax.adam(1e-2)


def init():
    keys = jax.random.split(jax.random.key(0))
    params = {
        "hidden": jax.random.normal(keys[0], (10, 32)),
        "out": jax.random.normal(keys[1], (32, 1)),
    }
    return params, OPTIMIZER.init(params)


@jax.jit
def train_step(params, opt_state):
    def loss(params):
        return jnp.mean((jnp.tanh(INPUTS @ params["hidden"]) @ params["out"] - TARGETS) ** 2)

    value, gradient = jax.value_and_grad(loss)(params)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, value


def train(directory, total_steps):
    params, opt_state = init()
    with ckptmgr.CheckpointManager(directory, save_every=50, keep=3) as manager:
        ckpt = manager.restore_or(step=0, params=params, opt_state=opt_state)
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started anew")
        params, opt_state = ckpt.params, ckpt.opt_state
        for step in range(ckpt.step + 1, total_steps + 1):
            params, opt_state, loss = train_step(params, opt_state)
            manager.save(step, params, opt_state, metrics={"loss": loss})
        manager.save(total_steps, params, opt_state, force=True, on_exists="skip")  # the last step, always
    return params, opt_state


if __name__ == "__main__":
    train(*(sys.argv[1:] or ["runs/optax_adam"]), total_steps=400)
