"""A learning rate schedule goes on where it stopped: its position is in the optimizer's state.

    python docs/examples/schedule.py [DIRECTORY]

Kill it at any time and run it again: it goes on from its newest checkpoint, and does not warm up twice.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_diabetes

import ckptmgr

INPUTS, TARGETS = load_diabetes(return_X_y=True)
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, peak_value=2.0, warmup_steps=200, decay_steps=1000)
OPTIMIZER = optax.adam(SCHEDULE)


def loss_of(params):
    return jnp.mean((INPUTS @ params["w"] + params["b"] - TARGETS) ** 2)


@jax.jit
def train_step(params, opt_state):
    loss, gradient = jax.value_and_grad(loss_of)(params)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss


def learning_rate(opt_state):
    return float(SCHEDULE(optax.tree_utils.tree_get(opt_state, "ScaleByScheduleState").count))


def train(directory, total_steps):
    """Returns the final params and opt_state, and the losses of the steps that were done here."""
    params, losses = {"w": jnp.zeros(10), "b": jnp.zeros(())}, {}
    opt_state = OPTIMIZER.init(params)
    with ckptmgr.CheckpointManager(directory, save_every=100, keep=3) as manager:
        ckpt = manager.restore_or(step=0, params=params, opt_state=opt_state)
        params, opt_state = ckpt.params, ckpt.opt_state
        came_from = f"resumed from step {ckpt.step}" if ckpt.resumed else "started at step 0"
        print(f"{came_from}; the next learning rate is {learning_rate(opt_state):.3f}")
        for step in range(ckpt.step + 1, total_steps + 1):
            params, opt_state, losses[step] = train_step(params, opt_state)
            manager.save(step, params, opt_state)
    print(f"final loss {loss_of(params):.2f}")
    return (params, opt_state), losses


if __name__ == "__main__":
    train(sys.argv[1] if len(sys.argv) > 1 else "runs/schedule", total_steps=1000)
