"""A classifier of handwritten digits that can be killed at any moment and goes on bit for bit.

    python docs/examples/digits.py DIRECTORY [--steps 1000] [--save-every 50]

All that a run consists of is in its checkpoints: the params, the state of optax.adamw, the key that
dropout draws from, and the position of the data iterator. So it does not matter when, or how often, it
is stopped. losses.txt in DIRECTORY has the exact loss of every step, to compare runs by.
"""

import argparse
import itertools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import ckptmgr

WIDTHS = [64, 512, 512, 10]
OPTIMIZER = optax.adamw(1e-3)


class Minibatches:
    """Shuffled minibatches without end; where it is can be saved and set."""

    def __init__(self, images, labels, size=64):
        self.images, self.labels, self.size = images, labels, size
        self.epoch = self.index = 0

    def __next__(self):
        if self.index + self.size > len(self.labels):
            self.epoch, self.index = self.epoch + 1, 0
        # The order follows from the epoch, so the position is two numbers.
        order = np.random.default_rng(self.epoch).permutation(len(self.labels))
        rows = order[self.index : self.index + self.size]
        self.index += self.size
        return self.images[rows], self.labels[rows]

    def get_state(self):
        return {"epoch": self.epoch, "index": self.index}

    def set_state(self, state):
        self.epoch, self.index = state["epoch"], state["index"]


def init_params():
    rng = np.random.default_rng(0)
    return [
        {"w": jnp.asarray(rng.normal(0, np.sqrt(2 / n_in), (n_in, n_out)), jnp.float32), "b": jnp.zeros(n_out)}
        for n_in, n_out in itertools.pairwise(WIDTHS)
    ]


def loss_of(params, dropout_key, images, labels):
    *hidden, last = params
    for layer in hidden:
        images = jax.nn.relu(images @ layer["w"] + layer["b"])
    kept = jax.random.bernoulli(dropout_key, 0.8, images.shape)
    logits = jnp.where(kept, images / 0.8, 0) @ last["w"] + last["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit(donate_argnums=(0, 1))
def train_step(params, opt_state, key, images, labels):
    key, dropout_key = jax.random.split(key)
    loss, gradient = jax.value_and_grad(loss_of)(params, dropout_key, images, labels)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, key, loss


def train(directory, steps=1000, save_every=50):
    """Returns the final (params, opt_state, key), and the losses of the steps that were done here."""
    images, labels = load_digits(return_X_y=True)
    batches = Minibatches(images / 16, labels)
    params, key = init_params(), jax.random.key(0)
    opt_state = OPTIMIZER.init(params)
    keep = [ckptmgr.latest(3), ckptmgr.best("loss")]
    manager = ckptmgr.CheckpointManager(directory, save_every=save_every, keep=keep)
    losses, blocked_s, started = {}, [], time.perf_counter()
    with manager, open(Path(directory, "losses.txt"), "a") as log:
        extras = {"batches": batches, "dropout_key": key}
        ckpt = manager.restore_or(step=0, params=params, opt_state=opt_state, extras=extras)
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started at step 0", flush=True)
        params, opt_state, key = ckpt.params, ckpt.opt_state, ckpt.extras["dropout_key"]
        for step in range(ckpt.step + 1, steps + 1):
            params, opt_state, key, loss = train_step(params, opt_state, key, *next(batches))
            losses[step] = float(loss)
            # Before the save: a run killed right after a commit would otherwise miss this line for ever.
            print(step, losses[step].hex(), file=log, flush=True)
            saving = time.perf_counter()
            saved = manager.save(
                step,
                params,
                opt_state,
                extras={"batches": batches, "dropout_key": key},
                metrics={"loss": loss},
                force=step == steps,
            )
            if saved:
                blocked_s.append(time.perf_counter() - saving)
            if step % (steps // 5 or 1) == 0:
                print(f"step {step}: loss {losses[step]:.4f}", flush=True)
        waiting = time.perf_counter()
        manager.wait()
        done = time.perf_counter()
    if blocked_s:
        print(cost(blocked_s, done - waiting, done - started, manager.info(steps).nbytes))
    return (params, opt_state, key), losses


def cost(blocked_s, waited_s, run_s, nbytes):
    each_ms = 1e3 * sum(blocked_s) / len(blocked_s)
    return (
        f"{len(blocked_s)} checkpoints of {nbytes / 1e6:.1f} MB; blocked {sum(blocked_s):.2f} s in save "
        f"({each_ms:.0f} ms each), {waited_s:.2f} s for the last to be durable: "
        f"{(sum(blocked_s) + waited_s) / run_s:.1%} of {run_s:.1f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=50)
    train(**vars(parser.parse_args()))
