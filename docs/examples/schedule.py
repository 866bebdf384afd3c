"""A learning rate schedule goes on where it stopped: its position is in the optimizer's state.

    python docs/examples/schedule.py [DIRECTORY]

Stop it at any time and run it again: the warm-up is not warmed up twice.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_diabetes

import ckptmgr

DATA = load_diabetes()
INPUTS, TARGETS = jnp.asarray(DATA.data, jnp.float32), jnp.asarray(DATA.target, jnp.float32)
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, peak_value=2.0, warmup_steps=100, decay_steps=400)
OPTIMIZER = optax.adam(SCHEDULE)


@jax.jit
def train_step(params, opt_state):
    loss = lambda params: jnp.mean((INPUTS @ params["w"] + params["b"] - TARGETS) ** 2)  # noqa: E731
    updates, opt_state = OPTIMIZER.update(jax.grad(loss)(params), opt_state)
    return optax.apply_updates(params, updates), opt_state


def train(directory, total_steps):
    params = {"w": jnp.zeros(10), "b": jnp.zeros(())}
    with ckptmgr.CheckpointManager(directory, save_every=50, keep=3) as manager:
        ckpt = manager.restore_or(step=0, params=params, opt_state=OPTIMIZER.init(params))
        params, opt_state = ckpt.params, ckpt.opt_state
        position = int(optax.tree_utils.tree_get(opt_state, "count", filtering=_of_the_schedule))
        print(f"at step {ckpt.step} the schedule gives {float(SCHEDULE(position)):.4f}")
        for step in range(ckpt.step + 1, total_steps + 1):
            params, opt_state = train_step(params, opt_state)
            manager.save(step, params, opt_state)
        manager.save(total_steps, params, opt_state, force=True, on_exists="skip")
    return params, opt_state


def _of_the_schedule(path, value):
    """Adam counts steps too; the schedule's own counter is the one in ScaleByScheduleState."""
    return any(getattr(key, "tuple_name", "") == "ScaleByScheduleState" for key in path)


if __name__ == "__main__":
    train(*(sys.argv[1:] or ["runs/schedule"]), total_steps=400)
