"""Flax NNX with BatchNorm, Dropout and Rngs, in data parallel on a mesh as jax.make_mesh gives it.

`nnx.state(model)` holds all of the model: weights, averages, and the keys and counters of its Rngs. A restart
makes no values: `nnx.eval_shape` gives a model of shapes, and `nnx.update` puts the restored values into it.
"""

import jax
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from sklearn.datasets import load_digits

import ckptmgr

IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = IMAGES.astype("float32") / 16


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def create():
    model = Net(nnx.Rngs(params=0, dropout=1))
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def train(directory, steps):
    mesh = jax.make_mesh((8,), ("data",))
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
        model.train()
        for step in range(start + 1, steps + 1):
            batch = slice(step * 64, (step + 1) * 64)
            images, labels = jax.device_put((IMAGES[batch], LABELS[batch]), PartitionSpec("data"))
            loss = train_step(model, optimizer, images, labels)
            manager.save(step, nnx.state(model), nnx.state(optimizer), metrics={"loss": loss})
    _, state = nnx.split((model, optimizer))
    return state
