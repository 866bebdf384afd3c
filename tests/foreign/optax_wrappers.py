"""Optax transformations that wrap another one, whose state therefore holds another state, params, or settings.

Nothing here depends on which one it is: `optimizer=` is template enough, and `params` may be lookahead's pair.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, PartitionSpec
from optax import contrib
from sklearn.datasets import load_diabetes

import ckptmgr

INPUTS, TARGETS = load_diabetes(return_X_y=True)
INPUTS, TARGETS = INPUTS[:440].astype("float32") * 20, TARGETS[:440].astype("float32") / 100
OPTIMIZERS = {
    "lookahead": optax.lookahead(optax.adam(1e-2), sync_period=3, slow_step_size=0.5),
    "schedule_free": contrib.schedule_free_adamw(1e-2, warmup_steps=5),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-2), max_consecutive_errors=3),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
}


def init(name):
    split = PartitionSpec(None, "data")  # FSDP: each device holds a part of the large matrix
    params = {
        "w": jnp.ones(16, jnp.bfloat16),
        "v": jax.device_put(jnp.full((10, 16), 0.1), split),
        "b": jnp.full((), 0.5),
    }
    return optax.LookaheadParams.init_synced(params) if name == "lookahead" else params


def batch_at(step):
    rows = slice(step * 40, (step + 1) * 40)
    targets = TARGETS[rows] if step % 4 else TARGETS[rows] * float("nan")  # a bad batch now and then
    return jax.device_put((INPUTS[rows], targets), PartitionSpec("data"))


def make_train_step(name):
    @jax.jit
    def train_step(params, opt_state, inputs, targets):
        def loss_fn(params):
            hidden = jnp.tanh(inputs.astype(jnp.bfloat16) @ params["v"])
            return jnp.mean((hidden @ params["w"] + params["b"] - targets) ** 2)

        fast = params.fast if name == "lookahead" else params
        loss, grads = jax.value_and_grad(loss_fn)(fast)
        if name != "apply_if_finite":
            grads = jax.tree.map(jnp.nan_to_num, grads)
        updates, opt_state = OPTIMIZERS[name].update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return train_step


def train(directory, steps, name):
    mesh, train_step = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), make_train_step(name)
    with jax.set_mesh(mesh), ckptmgr.CheckpointManager(directory, keep=2) as manager:
        params = init(name)
        ckpt = manager.restore_or(params=params, optimizer=OPTIMIZERS[name])
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started anew")
        params, opt_state = ckpt.params, ckpt.opt_state
        for step in range(ckpt.step + 1, steps + 1):
            if name == "inject_hyperparams" and step in (2, 6):  # on the fly
                opt_state.hyperparams["learning_rate"] = opt_state.hyperparams["learning_rate"] / 2
            params, opt_state, loss = train_step(params, opt_state, *batch_at(step))
            manager.save(step, params, opt_state, metrics={"loss": loss})
    return params, opt_state
