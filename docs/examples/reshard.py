"""Train on eight devices, go on with two, with one, with a grid of two by two: the run is one run.

    python docs/examples/reshard.py [DIRECTORY]

The devices are this machine's CPU cores made to look like eight; on GPUs or TPUs leave that line out.
"""

import os
import subprocess
import sys

SHAPES = {"8 as data x model": (4, 2), "2": (2, 1), "1": (1, 1), "2 x 2": (2, 2)}


def train(directory, data, model, steps):
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from sklearn.datasets import load_digits

    import ckptmgr

    devices = jax.devices()[: data * model]
    mesh = jax.make_mesh((data, model), ("data", "model"), devices=devices, axis_types=(AxisType.Auto,) * 2)
    digits = load_digits()
    batch_on = NamedSharding(mesh, PartitionSpec("data"))
    inputs = jax.device_put(jnp.asarray(digits.data[:1792] / 16, jnp.float32), batch_on)
    labels = jax.device_put(jnp.asarray(digits.target[:1792]), batch_on)
    optimizer = optax.adam(1e-3)

    def init():
        keys = jax.random.split(jax.random.key(0))
        return {
            "hidden": 0.1 * jax.random.normal(keys[0], (64, 256)),
            "out": 0.1 * jax.random.normal(keys[1], (256, 10)),
        }

    split = {"hidden": PartitionSpec(None, "model"), "out": PartitionSpec("model")}  # each layer over "model"
    params = jax.device_put(init(), {name: NamedSharding(mesh, spec) for name, spec in split.items()})

    @jax.jit
    def train_step(params, opt_state):
        def loss(params):
            logits = jax.nn.relu(inputs @ params["hidden"]) @ params["out"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, value

    with ckptmgr.CheckpointManager(directory, save_every=5, keep=2) as manager:
        # Saved on one mesh, restored on another: each PartitionSpec is carried over by the names of its axes.
        ckpt = manager.restore_or(params=params, opt_state=optimizer.init(params), layout=mesh)
        params, opt_state = ckpt.params, ckpt.opt_state
        for step in range(ckpt.step + 1, ckpt.step + steps + 1):
            params, opt_state, loss = train_step(params, opt_state)
            manager.save(step, params, opt_state, metrics={"loss": loss})
            print(f"step {step:2}  loss {loss:.6f}  hidden on {params['hidden'].sharding.num_devices} devices")
    momentum = opt_state[0].mu["hidden"]
    assert momentum.sharding.is_equivalent_to(params["hidden"].sharding, 2)  # Adam's state lies with its parameter
    return params


if __name__ == "__main__":
    if len(sys.argv) > 2:  # one of the four runs, in a process of its own
        train(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), steps=10)
    else:
        directory = (sys.argv[1:] or ["runs/reshard"])[0]
        eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
        for words, (data, model) in SHAPES.items():
            print(f"devices: {words}")
            command = [sys.executable, __file__, directory, str(data), str(model)]
            subprocess.run(command, env=os.environ | eight, check=True)
