"""The optimizers of jax.example_libraries carry the params in their state: save it with params=None.

    python docs/examples/example_libraries_adam.py [DIRECTORY]

Kill it at any time and run it again: it goes on from its newest checkpoint.
"""

import sys

import jax
import jax.numpy as jnp
from jax.example_libraries import optimizers
from sklearn.datasets import load_diabetes

import ckptmgr

INPUTS, TARGETS = load_diabetes(return_X_y=True)
INIT, UPDATE, GET_PARAMS = optimizers.adam(1.0)


def loss_of(params):
    return jnp.mean((INPUTS @ params["w"] + params["b"] - TARGETS) ** 2)


@jax.jit
def train_step(step, opt_state):
    loss, gradient = jax.value_and_grad(loss_of)(GET_PARAMS(opt_state))
    return UPDATE(step, gradient, opt_state), loss


def train(directory, total_steps):
    """Returns the final state, and the losses of the steps that were done here."""
    opt_state, losses = INIT({"w": jnp.zeros(10), "b": jnp.zeros(())}), {}
    with ckptmgr.CheckpointManager(directory, save_every=100, keep=3) as manager:
        ckpt = manager.restore_or(step=0, opt_state=opt_state)
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started at step 0")
        opt_state = ckpt.opt_state
        for step in range(ckpt.step + 1, total_steps + 1):
            opt_state, losses[step] = train_step(step, opt_state)
            manager.save(step, params=None, opt_state=opt_state)
    print(f"final loss {loss_of(GET_PARAMS(opt_state)):.2f}")
    return opt_state, losses


if __name__ == "__main__":
    train(sys.argv[1] if len(sys.argv) > 1 else "runs/example_libraries_adam", total_steps=1000)
