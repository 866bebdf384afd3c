"""A learning rate changed by hand: before a save, after a restore, and kept by the next restore.

    python docs/examples/change_learning_rate.py [DIRECTORY]

`optax.inject_hyperparams` puts the learning rate into the optimizer's state, so a checkpoint holds it.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_diabetes

import ckptmgr

INPUTS, TARGETS = load_diabetes(return_X_y=True)
OPTIMIZER = optax.inject_hyperparams(optax.adam)(learning_rate=1.0)


def loss_of(params):
    return jnp.mean((INPUTS @ params["w"] + params["b"] - TARGETS) ** 2)


@jax.jit
def train_step(params, opt_state):
    loss, gradient = jax.value_and_grad(loss_of)(params)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss


def learning_rate(opt_state):
    return float(ckptmgr.get_hyperparams(opt_state)["learning_rate"])


def train(directory, total_steps, halve_before=()):
    """Halves the learning rate before each step of `halve_before`.

    Returns the final params and opt_state, and the losses of the steps that were done here.
    """
    params, losses = {"w": jnp.zeros(10), "b": jnp.zeros(())}, {}
    opt_state = OPTIMIZER.init(params)
    with ckptmgr.CheckpointManager(directory, save_every=100, keep=3) as manager:
        ckpt = manager.restore_or(step=0, params=params, opt_state=opt_state)
        params, opt_state = ckpt.params, ckpt.opt_state
        came_from = f"resumed from step {ckpt.step}" if ckpt.resumed else "started at step 0"
        print(f"{came_from} with learning rate {learning_rate(opt_state)}")
        for step in range(ckpt.step + 1, total_steps + 1):
            if step in halve_before:
                opt_state = ckptmgr.set_hyperparams(opt_state, learning_rate=learning_rate(opt_state) / 2)
                print(f"learning rate {learning_rate(opt_state)} from step {step} on")
            params, opt_state, losses[step] = train_step(params, opt_state)
            manager.save(step, params, opt_state)
    print(f"final loss {loss_of(params):.2f}")
    return (params, opt_state), losses


if __name__ == "__main__":
    directory = sys.argv[1] if len(sys.argv) > 1 else "runs/change_learning_rate"
    # 250 is changed before the save of step 300; 301 is the first step after that one's restore.
    for total_steps in (300, 600, 1000):
        train(directory, total_steps, halve_before=[250, 301])
