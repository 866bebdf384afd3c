"""Flax NNX: the state of the model is params, the state of nnx.Optimizer is opt_state.

    python docs/examples/flax_nnx.py [DIRECTORY]

Stop it at any time and run it again: it goes on where it was, and so does the dropout.
"""

import sys

import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_diabetes

import ckptmgr

DATA = load_diabetes()
INPUTS, TARGETS = jnp.asarray(DATA.data, jnp.float32), jnp.asarray(DATA.target, jnp.float32)[:, None]


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(10, 32, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.hidden(x))))


@nnx.jit
def train_step(model, optimizer):
    loss, gradient = nnx.value_and_grad(lambda model: jnp.mean((model(INPUTS) - TARGETS) ** 2))(model)
    optimizer.update(model, gradient)
    return loss


def train(directory, total_steps):
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-1), wrt=nnx.Param)
    with ckptmgr.CheckpointManager(directory, save_every=50, keep=3) as manager:
        ckpt = manager.restore_or(step=0, params=nnx.state(model), opt_state=nnx.state(optimizer))
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started anew")
        nnx.update(model, ckpt.params)
        nnx.update(optimizer, ckpt.opt_state)
        for step in range(ckpt.step + 1, total_steps + 1):
            loss = train_step(model, optimizer)
            manager.save(step, nnx.state(model), nnx.state(optimizer), metrics={"loss": loss})
        manager.save(total_steps, nnx.state(model), nnx.state(optimizer), force=True, on_exists="skip")
    return nnx.state(model), nnx.state(optimizer)


if __name__ == "__main__":
    train(*(sys.argv[1:] or ["runs/flax_nnx"]), total_steps=200)
