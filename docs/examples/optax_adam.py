"""optax keeps params and opt_state apart; a checkpoint holds both, and the step.

    python docs/examples/optax_adam.py [DIRECTORY]

Kill it at any time and run it again: it goes on from its newest checkpoint.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_diabetes

import ckptmgr

INPUTS, TARGETS = load_diabetes(return_X_y=True)
OPTIMIZER = optax.adam(1.0)


def batch_at(step):
    """Follows from the step alone, so there is nothing of it to save."""
    rows = np.random.default_rng(step).choice(len(TARGETS), size=64, replace=False)
    return INPUTS[rows], TARGETS[rows]


def loss_of(params, inputs, targets):
    return jnp.mean((inputs @ params["w"] + params["b"] - targets) ** 2)


@jax.jit
def train_step(params, opt_state, batch):
    loss, gradient = jax.value_and_grad(loss_of)(params, *batch)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss


def train(directory, total_steps):
    """Returns the final params and opt_state, and the losses of the steps that were done here."""
    params, losses = {"w": jnp.zeros(10), "b": jnp.zeros(())}, {}
    opt_state = OPTIMIZER.init(params)
    with ckptmgr.CheckpointManager(directory, save_every=100, keep=3) as manager:
        ckpt = manager.restore_or(step=0, params=params, opt_state=opt_state)
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started at step 0")
        params, opt_state = ckpt.params, ckpt.opt_state
        for step in range(ckpt.step + 1, total_steps + 1):
            params, opt_state, losses[step] = train_step(params, opt_state, batch_at(step))
            manager.save(step, params, opt_state, metrics={"loss": losses[step]})
    print(f"final loss {loss_of(params, INPUTS, TARGETS):.2f}")
    return (params, opt_state), losses


if __name__ == "__main__":
    train(sys.argv[1] if len(sys.argv) > 1 else "runs/optax_adam", total_steps=1000)
