"""The optimizers whose runs are killed and resumed; run as a script, it trains all of them in turn.

    python optimizers.py DIRECTORY STEPS

saves every step of every run and goes on where each one stopped.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from jax.example_libraries import optimizers as example_libraries

import ckptmgr

PARAMS = {
    "dense": {"w": jnp.linspace(-1, 1, 12).reshape(4, 3), "b": jnp.zeros(3)},
    "head": {"w": jnp.linspace(1, 2, 3)},
}


def heads(params):
    return {"dense": "slow", "head": "fast"}


OPTAX = {
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "chain with clipping": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2)),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-2), every_k_schedule=3),
    "multi_transform": optax.multi_transform({"slow": optax.sgd(1e-3), "fast": optax.adam(1e-2)}, heads),
    "masked": optax.masked(optax.adam(1e-2), {"dense": {"w": True, "b": False}, "head": {"w": True}}),
    "sgd": optax.sgd(1e-2),
    "schedule": optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-1, 10, 60)),
}
EXAMPLE_LIBRARIES = {
    "example_libraries adam": example_libraries.adam(1e-2),
    "example_libraries momentum": example_libraries.momentum(1e-2, mass=0.9),
}


def gradient(params, step):
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (4,))
    return jax.grad(lambda p: jnp.sum((noise @ p["dense"]["w"] + p["dense"]["b"] - p["head"]["w"]) ** 2))(params)


def optax_run(optimizer):
    @jax.jit
    def train_step(params, opt_state, step):
        updates, opt_state = optimizer.update(gradient(params, step), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return PARAMS, optimizer.init(PARAMS), train_step


def example_libraries_run(optimizer):
    init, update, get_params = optimizer

    @jax.jit
    def train_step(params, opt_state, step):
        return params, update(step, gradient(get_params(opt_state), step), opt_state)

    return None, init(PARAMS), train_step


def runs():
    """Name -> (params, opt_state, train_step), where each run starts."""
    return {name: optax_run(each) for name, each in OPTAX.items()} | {
        name: example_libraries_run(each) for name, each in EXAMPLE_LIBRARIES.items()
    }


def main(directory, steps):
    managers, states, known = {}, {}, runs()
    for name, (params, opt_state, _) in known.items():
        managers[name] = ckptmgr.CheckpointManager(f"{directory}/{name}", keep=2)
        states[name] = managers[name].restore_or(step=0, params=params, opt_state=opt_state)
    print({name: state.step for name, state in states.items()}, flush=True)
    now = {name: (state.step, state.params, state.opt_state) for name, state in states.items()}
    for step in range(1, steps + 1):
        for name, (_, _, train_step) in known.items():
            done, params, opt_state = now[name]
            if step > done:
                params, opt_state = train_step(params, opt_state, step)
                managers[name].save(step, params, opt_state)
                now[name] = (step, params, opt_state)
    for manager in managers.values():
        manager.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
