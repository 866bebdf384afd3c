"""MLflow in a local database: each row is logged once, however often the script is killed and started again.

    python docs/examples/mlflow_local.py [DIRECTORY]

MLflow keeps both values if a step is logged twice. So rows wait until a checkpoint that has their step is durable.
Until then they are in the checkpoint too: a start logs those of them that MLflow lacks.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from mlflow import MlflowClient
from mlflow.entities import Metric
from sklearn.datasets import load_diabetes

import ckptmgr

DATA = load_diabetes()
INPUTS, TARGETS = jnp.asarray(DATA.data, jnp.float32), jnp.asarray(DATA.target, jnp.float32)
OPTIMIZER = optax.adam(1.0)


@jax.jit
def train_step(params, opt_state):
    loss = lambda params: jnp.mean((INPUTS @ params["w"] + params["b"] - TARGETS) ** 2)  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(params)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, value


def find_or_create_run(client, name):
    """The run of MLflow that has this tag: that of an earlier start, or a new one."""
    experiment = client.get_experiment_by_name("diabetes")
    number = experiment.experiment_id if experiment else client.create_experiment("diabetes")
    found = client.search_runs([number], filter_string=f"tags.checkpoints = '{name}'")
    return (found[0] if found else client.create_run(number, tags={"checkpoints": name})).info.run_id


def train(directory, total_steps):
    params, rows = {"w": jnp.zeros(10), "b": jnp.zeros(())}, []  # rows: [step, loss] of steps not yet logged
    client = MlflowClient(f"sqlite:///{Path(directory).resolve()}/mlflow.db")
    run = find_or_create_run(client, Path(directory).resolve().name)
    logged = max((row.step for row in client.get_metric_history(run, "loss")), default=0)

    def log(info):  # is called in a background thread; mlflow.log_metric would log to another run there
        now = [row for row in rows if row[0] <= info.step]
        made = [Metric("loss", loss, int(time.time() * 1000), step) for step, loss in now if step > logged]
        client.log_batch(run, made)
        del rows[: len(now)]  # not reached if MLflow cannot log: the next checkpoint tries again

    with ckptmgr.CheckpointManager(Path(directory, "steps"), save_every=50, on_commit=log) as manager:
        start = {"params": params, "opt_state": OPTIMIZER.init(params), "extras": {"rows": rows}}
        ckpt = manager.restore_or(step=0, **start)
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started anew")
        if ckpt.info is not None:
            rows.extend(ckpt.extras["rows"])
            log(ckpt.info)
        params, opt_state = ckpt.params, ckpt.opt_state
        for step in range(ckpt.step + 1, total_steps + 1):
            params, opt_state, loss = train_step(params, opt_state)
            if step % 10 == 0:
                rows.append([step, float(loss)])
            manager.save(step, params, opt_state, extras={"rows": list(rows)}, metrics={"loss": loss})
    client.set_terminated(run)
    return params, opt_state


if __name__ == "__main__":
    train(*(sys.argv[1:] or ["runs/mlflow_local"]), total_steps=200)
