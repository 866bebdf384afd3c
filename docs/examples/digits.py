"""A classifier of handwritten digits that can be killed at any moment and goes on bit for bit.

    python docs/examples/digits.py DIRECTORY [--steps 600] [--save-every 20] [--devices 1]

What a run is made of is all in the checkpoint: params, the state of optax.adamw, the key that dropout
draws from, and the position of the data iterator. So it does not matter when, or how often, it stops.
With --devices 4 the same run goes on with each weight matrix split over four of them.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import ckptmgr

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=1e-2))
WIDTHS = [64, 1024, 1024, 10]


class Minibatches:
    """Draws shuffled minibatches for ever; `get_state` and `set_state` make its position savable."""

    def __init__(self, inputs, labels, size, seed):
        self.inputs, self.labels, self.size, self.seed = inputs, labels, size, seed
        self.epoch = self.index = 0

    def __next__(self):
        if self.index + self.size > len(self.labels):
            self.epoch, self.index = self.epoch + 1, 0
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.labels))
        chosen = order[self.index : self.index + self.size]
        self.index += self.size
        return self.inputs[chosen], self.labels[chosen]

    def get_state(self):
        return {"epoch": self.epoch, "index": self.index}

    def set_state(self, state):
        self.epoch, self.index = state["epoch"], state["index"]


def init():
    dropout_key, *keys = jax.random.split(jax.random.key(0), len(WIDTHS))
    layers = [
        {"w": jax.random.normal(key, (n_in, n_out)) / np.sqrt(n_in), "b": jnp.zeros(n_out)}
        for key, n_in, n_out in zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    ]
    return layers, OPTIMIZER.init(layers), dropout_key


def logits(layers, inputs, dropout):
    for layer in layers[:-1]:
        inputs = jax.nn.relu(inputs @ layer["w"] + layer["b"])
        dropout, here = jax.random.split(dropout)
        inputs = jnp.where(jax.random.bernoulli(here, 0.8, inputs.shape), inputs / 0.8, 0)
    return inputs @ layers[-1]["w"] + layers[-1]["b"]


@jax.jit(donate_argnums=(0, 1))
def train_step(layers, opt_state, key, inputs, labels):
    key, dropout = jax.random.split(key)

    def loss_of(layers):
        return optax.softmax_cross_entropy_with_integer_labels(logits(layers, inputs, dropout), labels).mean()

    loss, gradient = jax.value_and_grad(loss_of)(layers)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state, layers)
    return optax.apply_updates(layers, updates), opt_state, key, loss


def split(devices):
    """Where each parameter goes: the columns of a matrix over the devices, as far as they divide."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("model",))

    def place(path, leaf):
        divides = len(leaf.shape) == 2 and leaf.shape[1] % devices == 0
        return NamedSharding(mesh, PartitionSpec(None, "model") if divides else PartitionSpec())

    return place


def train(directory, steps=600, save_every=20, devices=1):
    digits = load_digits()
    batches = Minibatches(digits.data.astype(np.float32) / 16, digits.target, size=64, seed=0)
    layers, opt_state, key = init()
    manager = ckptmgr.CheckpointManager(
        directory, save_every=save_every, keep=[ckptmgr.latest(3), ckptmgr.best("loss")]
    )
    in_save, started = [], time.perf_counter()
    with manager, open(Path(directory) / "losses.txt", "a") as losses:
        extras = {"batches": batches, "dropout_key": key}
        layout = split(devices) if devices > 1 else None
        ckpt = manager.restore_or(step=0, params=layers, opt_state=opt_state, extras=extras, layout=layout)
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started anew", flush=True)
        layers, opt_state, key = ckpt.params, ckpt.opt_state, ckpt.extras["dropout_key"]
        for step in range(ckpt.step + 1, steps + 1):
            layers, opt_state, key, loss = train_step(layers, opt_state, key, *next(batches))
            before = time.perf_counter()
            saved = manager.save(
                step,
                layers,
                opt_state,
                extras={"batches": batches, "dropout_key": key},
                metrics={"loss": loss},
                force=step == steps,
            )
            if saved:
                in_save.append(time.perf_counter() - before)
            print(step, float(loss).hex(), file=losses, flush=True)
            if step % 100 == 0:
                print(f"step {step}: loss {float(loss):.4f}", flush=True)
    took = time.perf_counter() - started
    if in_save:
        size = manager.info(steps).nbytes / 1e6
        print(
            f"{len(in_save)} checkpoints of {size:.1f} MB: {sum(in_save):.2f} s of {took:.1f} s in save, "
            f"{1e3 * np.median(in_save):.0f} ms each (median)"
        )
    return layers, opt_state


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("directory")
    arguments.add_argument("--steps", type=int, default=600)
    arguments.add_argument("--save-every", type=int, default=20)
    arguments.add_argument("--devices", type=int, default=1)
    chosen = vars(arguments.parse_args())
    jax.config.update("jax_num_cpu_devices", chosen["devices"])  # a CPU made to look like several; GPUs are
    train(**chosen)
