"""Grain: the iterator is an extra; its position is saved, and it goes on there after a restore.

    python docs/examples/grain_loader.py [DIRECTORY]

Stop it at any time and run it again: no example is seen twice, and none is left out.
"""

import sys

import grain
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_diabetes

import ckptmgr

DATA = load_diabetes()
ROWS = list(zip(DATA.data.astype("float32"), DATA.target.astype("float32"), strict=True))
OPTIMIZER = optax.adam(1.0)


def batches():
    """Batches of 32 rows, shuffled anew in each epoch, without end."""
    rows = grain.MapDataset.source(ROWS).seed(0).shuffle().repeat().batch(32, drop_remainder=True)
    return iter(rows.to_iter_dataset())


@jax.jit
def train_step(params, opt_state, batch):
    inputs, targets = batch
    loss = lambda params: jnp.mean((inputs @ params["w"] + params["b"] - targets) ** 2)  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(params)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, value


def train(directory, total_steps):
    params, data = {"w": jnp.zeros(10), "b": jnp.zeros(())}, batches()
    start = {"params": params, "opt_state": OPTIMIZER.init(params), "extras": {"data": data}}
    with ckptmgr.CheckpointManager(directory, save_every=50, keep=3) as manager:
        ckpt = manager.restore_or(step=0, **start)  # calls data.set_state with what was saved
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started anew")
        params, opt_state = ckpt.params, ckpt.opt_state
        for step in range(ckpt.step + 1, total_steps + 1):
            params, opt_state, loss = train_step(params, opt_state, next(data))
            manager.save(step, params, opt_state, extras={"data": data}, metrics={"loss": loss})
        manager.save(total_steps, params, opt_state, extras={"data": data}, force=True, on_exists="skip")
    return params, opt_state


if __name__ == "__main__":
    train(*(sys.argv[1:] or ["runs/grain_loader"]), total_steps=200)
