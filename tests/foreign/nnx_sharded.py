"""Flax NNX with params that are split over a mesh of two axes, as each layer says.

A restart makes no values: `nnx.eval_shape` knows the shapes, and how the params are split.
"""

import functools

import jax
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import ckptmgr

IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = IMAGES.astype("float32") / 16


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        split = functools.partial(nnx.with_partitioning, nnx.initializers.lecun_normal())
        self.hidden = nnx.Linear(64, 32, kernel_init=split((None, "model")), rngs=rngs)
        self.out = nnx.Linear(32, 10, kernel_init=split(("model", None)), use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)), out_sharding=P("data"))


def create():
    model = MLP(nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def train(directory, steps):
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    with jax.set_mesh(mesh), ckptmgr.CheckpointManager(directory, keep=2) as manager:
        start = manager.latest() or 0
        if start == 0:
            model, optimizer = create()
        else:
            model, optimizer = nnx.eval_shape(create)
            ckpt = manager.restore(params=nnx.state(model), opt_state=nnx.state(optimizer))
            print(f"resumed from step {ckpt.step}")
            nnx.update(model, ckpt.params)
            nnx.update(optimizer, ckpt.opt_state)
        for step in range(start + 1, steps + 1):
            batch = slice(step * 64, (step + 1) * 64)
            images, labels = jax.device_put((IMAGES[batch], LABELS[batch]), P("data"))
            loss = train_step(model, optimizer, images, labels)
            manager.save(step, nnx.state(model), nnx.state(optimizer), metrics={"loss": loss})
    return nnx.state(model), nnx.state(optimizer)
