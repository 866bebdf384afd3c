"""Equinox with BatchNorm, in data parallel: `eqx.nn.State` is an extra, the arrays of the model are params.

What is no array (a function, say) is `static`, and stays in the script. A restart makes no values: shapes are
template enough, and `layout` says where they go.
"""

import equinox as eqx
import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import ckptmgr

IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = IMAGES.astype("float32") / 16
OPTIMIZER = optax.adamw(1e-2)


class Net(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    out: eqx.nn.Linear

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.hidden = eqx.nn.Linear(64, 32, key=one)
        self.norm = eqx.nn.BatchNorm(32, axis_name="batch", mode="batch")
        self.out = eqx.nn.Linear(32, 10, key=two)

    def __call__(self, x, state):
        x, state = self.norm(self.hidden(x), state)
        return self.out(jax.nn.relu(x)), state


@eqx.filter_jit
def train_step(model, state, opt_state, images, labels):
    def loss_fn(model, state):
        forward = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        logits, state = forward(images, state)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state

    (loss, state), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, state)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, opt_state, loss


def train(directory, steps):
    make, key = eqx.nn.make_with_state(Net), jax.random.key(0)
    # Since JAX 0.11 the mean of BatchNorm within vmap does not work on explicit axes, which make_mesh gives.
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, replicated = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    with ckptmgr.CheckpointManager(directory, keep=2) as manager:
        start = manager.latest() or 0
        if start == 0:
            model, state = eqx.filter_shard(make(key), replicated)
            opt_state = OPTIMIZER.init(eqx.filter(model, eqx.is_inexact_array))
        else:
            model, state = eqx.filter_eval_shape(make, key)  # shapes in the place of arrays
            params, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
            extras = {"state": state}
            ckpt = manager.restore(params=params, optimizer=OPTIMIZER, extras=extras, layout=replicated)
            print(f"resumed from step {ckpt.step}")
            model, state = eqx.combine(ckpt.params, static), ckpt.extras["state"]
            opt_state = ckpt.opt_state
        for step in range(start + 1, steps + 1):
            batch = slice(step * 64, (step + 1) * 64)
            images, labels = jax.device_put((IMAGES[batch], LABELS[batch]), split)
            model, state, opt_state, loss = train_step(model, state, opt_state, images, labels)
            params = eqx.filter(model, eqx.is_array)
            manager.save(step, params, opt_state, extras={"state": state}, metrics={"loss": loss})
    return eqx.filter(model, eqx.is_array), state, opt_state
