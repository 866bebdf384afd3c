"""The optimizers of jax.example_libraries: their state carries the params, so params=None.

    python docs/examples/example_libraries_adam.py [DIRECTORY]

Stop it at any time and run it again: it goes on where it was.
"""

import sys

import jax
import jax.numpy as jnp
from jax.example_libraries import optimizers
from sklearn.datasets import load_diabetes

import ckptmgr

DATA = load_diabetes()
INPUTS, TARGETS = jnp.asarray(DATA.data, jnp.float32), jnp.asarray(DATA.target, jnp.float32)
INIT, UPDATE, GET_PARAMS = optimizers.adam(1.0)


@jax.jit
def train_step(step, opt_state):
    def loss(params):
        return jnp.mean((INPUTS @ params["w"] + params["b"] - TARGETS) ** 2)

    value, gradient = jax.value_and_grad(loss)(GET_PARAMS(opt_state))
    return UPDATE(step, gradient, opt_state), value


def train(directory, total_steps):
    opt_state = INIT({"w": jnp.zeros(10), "b": jnp.zeros(())})
    with ckptmgr.CheckpointManager(directory, save_every=50, keep=3) as manager:
        ckpt = manager.restore_or(step=0, opt_state=opt_state)
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started anew")
        opt_state = ckpt.opt_state
        for step in range(ckpt.step + 1, total_steps + 1):
            opt_state, loss = train_step(step, opt_state)
            manager.save(step, params=None, opt_state=opt_state, metrics={"loss": loss})
        manager.save(total_steps, params=None, opt_state=opt_state, force=True, on_exists="skip")
    return GET_PARAMS(opt_state), opt_state


if __name__ == "__main__":
    train(*(sys.argv[1:] or ["runs/example_libraries_adam"]), total_steps=400)
