"""A training process to be stopped, killed, or read beside: `python trainer.py DIRECTORY STEPS [how]`.

Every value of a checkpoint is made from its step alone, so that any mixture of two can be seen. Prints
`saving N` before and `committed N` after each step is durable.

    train       saves each step, keeps three, goes on from the newest
    mirror AWAY trains with a second home, keeps one here and three there
    replace     saves step 0 again and again
    guard       saves every fourth step under a preemption_guard, and says `done N` after each step
    managers    is told to stop at step 30, with two managers of which one saves every third step, and begins again
    twice       is told to stop twice
    fork        opens a manager and forks, as a data loader does
    leave HOW   saves one step of STEPS bytes and leaves: by its end, an exception, sys.exit(3), or SIGTERM
"""

import os
import signal
import sys
import time

import faults
import jax
import jax.numpy as jnp
import numpy as np
from warm import say

import ckptmgr

LEAVES = 12


def state(step, size=4096):
    return {f"w{i}": np.full(size, step * 1000 + i, np.int32) for i in range(LEAVES)}


def step_of(params):
    """The step these values were made from; fails unless it is the same for every value of every leaf."""
    (step,) = {int(value) // 1000 for leaf in params.values() for value in np.unique(leaf)}
    assert all((np.asarray(params[f"w{i}"]) == step * 1000 + i).all() for i in range(LEAVES))
    return step


def commits(number):
    return lambda info: say("committed", int(info.metrics.get(number, info.step)))


def train(directory, steps, **options):
    options = {"keep": 3} | options
    with ckptmgr.CheckpointManager(
        directory, on_commit=lambda info: say("committed", info.step), **options
    ) as manager:
        start = manager.restore_or(step=0, params=state(0))
        assert step_of(start.params) == start.step
        say("resumed", start.step)
        for step in range(start.step + 1, steps + 1):
            say("saving", step)
            manager.save(step, state(step), metrics={"loss": 1 / step})


def mirror(directory, steps, away):
    train(directory, steps, keep=1, mirror=away, mirror_keep=3)


def replace(directory, steps):
    with ckptmgr.CheckpointManager(directory, on_commit=commits("made")) as manager:
        for step in range(1, steps + 1):
            say("saving", step)
            manager.save(0, state(step), metrics={"made": step}, on_exists="replace")


def guard(directory, steps):
    @jax.jit
    def train_step(params, step):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (64,))
        return {"w": params["w"] * 0.99 + noise}

    manager = ckptmgr.CheckpointManager(directory, save_every=4)
    found = manager.restore_or(params={"w": jnp.zeros(64)})
    params = found.params
    say("resumed", found.step)
    with manager.preemption_guard():
        for step in range(found.step + 1, steps + 1):
            params = train_step(params, step)
            time.sleep(0.002)
            say("done", step)
            manager.save(step, params)
            if manager.preempted:
                break
    say("ended", step, float(params["w"].sum()).hex())


def managers(directory, steps):
    often, rarely = (
        ckptmgr.CheckpointManager(f"{directory}/{name}", save_every=1000) for name in ("often", "rarely")
    )
    with often.preemption_guard(), rarely.preemption_guard():
        for step in range(1, steps + 1):
            often.save(step, state(step))
            if step % 3 == 0:
                rarely.save(step // 3, state(step))
            if step == 30:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(3)  # JAX looks for the signal now and then
            if often.preempted and rarely.preempted:
                break
    say("ended", step, often.latest(), rarely.latest())
    with often.preemption_guard():
        say("again", often.preempted)


def twice(directory, steps):
    with ckptmgr.CheckpointManager(directory).preemption_guard():
        os.kill(os.getpid(), signal.SIGTERM)
        say("told once")
        os.kill(os.getpid(), signal.SIGTERM)
        say("told twice")


def fork(directory, steps):
    manager = ckptmgr.CheckpointManager(directory)
    if child := os.fork():
        say("forked", child)
    time.sleep(60)
    manager.close()


def leave(directory, nbytes, how):
    manager = ckptmgr.CheckpointManager(directory)
    manager.save(7, state(7, nbytes // 4 // LEAVES))
    if how == "raise":
        raise RuntimeError("on purpose")
    if how == "exit":
        sys.exit(3)
    if how == "SIGTERM":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)


def join(job):
    """Joins the job `PORT COUNT INDEX`: several processes of jax.distributed on this machine."""
    port, count, index = job.split()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", int(count), int(index))


if __name__ == "__main__":
    if "CKPTMGR_JOB" in os.environ:
        join(os.environ["CKPTMGR_JOB"])
    faults.install(os.environ.get("CKPTMGR_FAULT", ""))
    known = (train, mirror, replace, guard, managers, twice, fork, leave)
    run = {each.__name__: each for each in known}[sys.argv[3]]
    run(sys.argv[1], int(sys.argv[2]), *sys.argv[4:])
