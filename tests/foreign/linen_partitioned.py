"""Flax Linen with logical axes on a mesh: the boxes (nn.LogicallyPartitioned) stay in the params and in opt_state.

Every value is made where it belongs, by a jitted init. A restart needs no values, only their shapes and shardings.
"""

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import ckptmgr

IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = (IMAGES / 16).astype(np.float32)
RULES = [("batch", "data"), ("embed", None), ("mlp", "model")]


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        x = nn.Dense(32, kernel_init=nn.with_logical_partitioning(init, ("embed", "mlp")))(x)
        x = nn.with_logical_constraint(nn.relu(x), ("batch", "mlp"))
        return nn.Dense(10, kernel_init=nn.with_logical_partitioning(init, ("mlp", "embed")))(x)


def create_train_state(key):
    net = MLP()
    params = net.init(key, IMAGES[:8])["params"]
    return TrainState.create(apply_fn=net.apply, params=params, tx=optax.adamw(1e-2))


def train_step(state, images, labels):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def train(directory, steps):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    by_data = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES), ckptmgr.CheckpointManager(directory, keep=2) as manager:
        abstract = jax.eval_shape(create_train_state, jax.random.key(0))
        shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, RULES)
        step_on_mesh = jax.jit(train_step, out_shardings=(shardings, None))
        if manager.latest() is None:
            start, state = 0, jax.jit(create_train_state, out_shardings=shardings)(jax.random.key(0))
        else:
            tx, layout = abstract.tx, shardings.params
            ckpt = manager.restore(params=abstract.params, optimizer=tx, layout=layout)
            print(f"resumed from step {ckpt.step}")
            start = ckpt.step
            state = abstract.replace(step=start, params=ckpt.params, opt_state=ckpt.opt_state)
        for step in range(start + 1, steps + 1):
            batch = slice(step * 64, (step + 1) * 64)
            state, loss = step_on_mesh(state, *jax.device_put((IMAGES[batch], LABELS[batch]), by_data))
            manager.save(step, state.params, state.opt_state, metrics={"loss": loss})
    return state.params, state.opt_state
