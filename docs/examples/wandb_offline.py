"""Weights & Biases: the loss of every tenth step from the loop, and each checkpoint once it is durable.

    python docs/examples/wandb_offline.py [DIRECTORY]

Nothing is sent unless WANDB_MODE=online is set: `wandb sync DIRECTORY/wandb/offline-run-*` sends it later. Each
start is a run of W&B of its own, all in one group, and begins with the checkpoint that it resumes from.
"""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import wandb
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


def train(directory, total_steps):
    params, group = {"w": jnp.zeros(10), "b": jnp.zeros(())}, Path(directory).resolve().name
    mode = os.environ.get("WANDB_MODE", "offline")
    with wandb.init(project="diabetes", group=group, dir=directory, mode=mode) as run:
        run.define_metric("*", step_metric="step")  # a column of ours may go back, unlike the step of run.log

        def log(info):  # is called in a background thread
            costs = {"checkpoint/durable_s": info.durable_s, "checkpoint/blocked_s": info.blocked_s}
            known = {name: value for name, value in costs.items() if value is not None}  # None if it is restored
            run.log({"step": info.step, "checkpoint/loss": info.metrics["loss"], **known})

        manager = ckptmgr.CheckpointManager(Path(directory, "steps"), save_every=50, on_commit=log)
        with manager, manager.preemption_guard():
            ckpt = manager.restore_or(step=0, params=params, opt_state=OPTIMIZER.init(params))
            print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started anew")
            if ckpt.info is not None:
                log(ckpt.info)
            params, opt_state = ckpt.params, ckpt.opt_state
            for step in range(ckpt.step + 1, total_steps + 1):
                params, opt_state, loss = train_step(params, opt_state)
                if step % 10 == 0:
                    run.log({"step": step, "loss": float(loss)})
                manager.save(step, params, opt_state, metrics={"loss": loss})
                if manager.preempted:
                    break
    return params, opt_state


if __name__ == "__main__":
    train(*(sys.argv[1:] or ["runs/wandb_offline"]), total_steps=200)
