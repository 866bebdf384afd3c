"""The learning rate changed on the fly: before a save, after a restore, and kept by the next restore.

    python docs/examples/change_learning_rate.py [DIRECTORY]

`optax.inject_hyperparams` puts the learning rate into the optimizer's state, so a checkpoint holds it.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_diabetes

import ckptmgr

DATA = load_diabetes()
INPUTS, TARGETS = jnp.asarray(DATA.data, jnp.float32), jnp.asarray(DATA.target, jnp.float32)
OPTIMIZER = optax.inject_hyperparams(optax.adam)(learning_rate=1.0)


@jax.jit
def train_step(params, opt_state):
    loss = lambda params: jnp.mean((INPUTS @ params["w"] + params["b"] - TARGETS) ** 2)  # noqa: E731
    updates, opt_state = OPTIMIZER.update(jax.grad(loss)(params), opt_state)
    return optax.apply_updates(params, updates), opt_state


def learning_rate(opt_state):
    return float(ckptmgr.get_hyperparams(opt_state)["learning_rate"])


def train(directory, total_steps, halve_at=()):
    """Trains up to `total_steps`, halving the learning rate before each step of `halve_at`."""
    params = {"w": jnp.zeros(10), "b": jnp.zeros(())}
    with ckptmgr.CheckpointManager(directory) as manager:
        ckpt = manager.restore_or(step=0, params=params, opt_state=OPTIMIZER.init(params))
        params, opt_state = ckpt.params, ckpt.opt_state
        print(f"at step {ckpt.step} with learning rate {learning_rate(opt_state)}")
        for step in range(ckpt.step + 1, total_steps + 1):
            if step in halve_at:
                opt_state = ckptmgr.set_hyperparams(opt_state, learning_rate=learning_rate(opt_state) / 2)
                print(f"halved at step {step} to {learning_rate(opt_state)}")
            params, opt_state = train_step(params, opt_state)
        manager.save(total_steps, params, opt_state, on_exists="skip")
    return params, opt_state


if __name__ == "__main__":
    directory = sys.argv[1] if len(sys.argv) > 1 else "runs/change_learning_rate"
    train(directory, total_steps=100, halve_at=[60])  # changed before a save
    train(directory, total_steps=200, halve_at=[101])  # restored with it, and changed after the restore
    train(directory, total_steps=300)  # restored with it again
