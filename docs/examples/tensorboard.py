"""TensorBoard: the metrics of each checkpoint, and what it cost, written once it is durable.

    python docs/examples/tensorboard.py [DIRECTORY]

Then `tensorboard --logdir DIRECTORY/events`. Only committed checkpoints are drawn, each once.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_diabetes
from tensorboardX import SummaryWriter

import ckptmgr

DATA = load_diabetes()
INPUTS, TARGETS = jnp.asarray(DATA.data, jnp.float32), jnp.asarray(DATA.target, jnp.float32)
OPTIMIZER = optax.adam(1.0)


@jax.jit
def train_step(params, opt_state):
    loss = lambda params: jnp.mean((INPUTS @ params["w"] + params["b"] - TARGETS) ** 2)  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(params)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, value


def train(directory, total_steps):
    params = {"w": jnp.zeros(10), "b": jnp.zeros(())}
    with SummaryWriter(str(Path(directory, "events"))) as events:

        def draw(info):
            for name, value in {**info.metrics, "checkpoint/durable_s": info.durable_s}.items():
                events.add_scalar(name, value, info.step)

        with ckptmgr.CheckpointManager(Path(directory, "steps"), save_every=50, on_commit=draw) as manager:
            ckpt = manager.restore_or(step=0, params=params, opt_state=OPTIMIZER.init(params))
            print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started anew")
            params, opt_state = ckpt.params, ckpt.opt_state
            for step in range(ckpt.step + 1, total_steps + 1):
                params, opt_state, loss = train_step(params, opt_state)
                manager.save(step, params, opt_state, metrics={"loss": loss})
    return params, opt_state


if __name__ == "__main__":
    train(*(sys.argv[1:] or ["runs/tensorboard"]), total_steps=200)
