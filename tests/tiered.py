"""One process of a job with local saves: `python tiered.py RUN LOCAL PORT COUNT INDEX DEVICES STEPS [OPTIONS]`.

It resumes, says `resumed STEP SOURCE DIGEST ITERATOR`, and trains up to STEPS. After each step it says
`done STEP DIGEST SAVED`. The digest is of the whole state, so equal digests are equal bits, whatever the layout.
OPTIONS is JSON: the options of the manager, and

    hosts       the names of the machines of the processes, for those that all run on one
    rows        the axes of the mesh are (rows, rest), and w is cut along both
    slow_s      how long each step takes
    own         whether each process has an iterator of its own
    broadcast   whether what several processes hold is read once
"""

import hashlib
import json
import os
import sys
import time

from warm import say


class Counter:
    """An iterator of one process."""

    def __init__(self, at):
        self.at = at

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def start(mesh, axes):
    def where(*names):
        return NamedSharding(mesh, P(*names))

    def make():
        return {
            "w": jnp.arange(48 * 96, dtype=jnp.float32).reshape(48, 96),
            "big": jnp.zeros((768, 768)),
            "replicated": jnp.arange(64, dtype=jnp.float32),
            "keys": jax.random.split(jax.random.key(7), 48),
        }

    places = {"w": where(*axes), "big": where(axes[0]), "replicated": where(), "keys": where(axes[0])}
    params = jax.jit(make, out_shardings=places)()
    opt_state = optax.adam(1e-2).init({name: params[name] for name in ("w", "replicated")})
    return params | {"local": jnp.float32(1), "numpy": np.arange(5), "step": 0}, opt_state


def build(optimizer):
    @jax.jit
    def update(params, opt_state):
        trained = {name: params[name] for name in ("w", "replicated")}
        gradients = jax.tree.map(lambda each: each - 1000, trained)
        updates, opt_state = optimizer.update(gradients, opt_state)
        moved = optax.apply_updates(trained, updates)
        keys = jax.random.wrap_key_data(jax.random.key_data(params["keys"]) + jnp.uint32(1))
        return {**params, **moved, "big": params["big"] + 1, "keys": keys}, opt_state

    return update


def step_of(update, params, opt_state):
    spread = {name: params[name] for name in ("w", "big", "replicated", "keys")}
    spread, opt_state = update(spread, opt_state)
    rest = {"local": params["local"] * 2 - 1, "numpy": params["numpy"] + 1, "step": params["step"] + 1}
    return {**spread, **rest}, opt_state


def digest(tree):
    def whole(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        values = whole(leaf)
        found.update(f"{values.dtype}{values.shape}".encode() + values.tobytes())
    return found.hexdigest()[:16]


def main(run, local, steps, slow_s, own, broadcast, axes, options):
    params, opt_state = start(MESH, axes)
    update, iterator = build(optax.adam(1e-2)), Counter(1000 * jax.process_index())
    extras = {"it": iterator} if own else {}
    with ckptmgr.CheckpointManager(run, local=local, timeout_s=60, **options) as manager:
        found = manager.restore_or(params=params, opt_state=opt_state, extras=extras, broadcast=broadcast)
        params, opt_state, step = found.params, found.opt_state, found.step
        source = found.info.source if found.info else "nowhere"
        say("resumed", step, source, digest((params, opt_state)), iterator.at)
        while step < steps:
            step += 1
            params, opt_state = step_of(update, params, opt_state)
            iterator.at += 1
            said = digest((params, opt_state))
            result = manager.save(step, params, opt_state, extras=extras)
            if "waits" in os.environ.get("CKPTMGR_TEST", "") and result:
                result.result()
            time.sleep(slow_s)
            say("done", step, said, int(bool(result)))
    say("ended")


if __name__ == "__main__":
    run, local, port, count, index, devices, steps, *rest = sys.argv[1:]
    options = json.loads(rest[0]) if rest else {}
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import socket

    import faults
    import guard
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import ckptmgr

    if int(count) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", int(count), int(index))
    faults.install(os.environ.get("CKPTMGR_FAULT", ""))
    guard.install()
    hosts, rows = options.pop("hosts", None), options.pop("rows", None)
    if hosts:
        socket.gethostname = lambda: hosts[int(index)]
    shape = (rows, jax.device_count() // rows) if rows else (jax.device_count(),)
    AXES = ("data", "model")[: len(shape)]
    MESH = jax.make_mesh(shape, AXES)
    slow_s, own = options.pop("slow_s", 0.0), options.pop("own", True)
    main(run, local, int(steps), slow_s, own, options.pop("broadcast", False), AXES, options)
