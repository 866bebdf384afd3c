"""Retention on disk, with restarts in between, against an oracle of ten lines."""

import math
import random

import jax.numpy as jnp
import pytest
from conftest import counted, visible

from ckptmgr import CheckpointManager, best, every_steps, latest


def oracle(losses):
    kept = {}
    for step, loss in losses:
        kept[step] = loss
        steps = sorted(kept)
        stay = set(steps[-2:]) | {step for step in steps if step % 100 == 0}
        real = {step: loss for step, loss in kept.items() if not math.isnan(loss)}
        if real:
            stay.add(max(step for step, loss in real.items() if loss == min(real.values())))
        kept = {step: kept[step] for step in stay}
    return sorted(kept)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(counted(20, full=1000)))
def test_what_is_kept_is_what_the_oracle_says(tmp_path, seed):
    rng = random.Random(seed)
    steps = sorted(rng.sample(range(0, 500, 25), rng.randint(3, 9)))
    losses = [(step, rng.choice([math.nan, 0.0, 1.0, rng.randint(1, 99) / 128])) for step in steps]
    keep = [latest(2), best("loss", mode="min"), every_steps(100)]
    manager = CheckpointManager(tmp_path, keep=keep)
    for step, loss in losses:
        manager.save(
            step, {"w": jnp.zeros(2)}, metrics={"loss": jnp.float32(loss) if rng.random() < 0.5 else loss}
        )
        if rng.random() < 0.3:
            manager.close()
            manager = CheckpointManager(tmp_path, keep=keep)
    manager.close()
    assert manager.steps() == oracle(losses)
    assert sorted(map(int, visible(tmp_path))) == manager.steps()


def test_what_was_just_saved_is_kept_although_later_steps_are_there(tmp_path, caplog):
    with CheckpointManager(tmp_path, keep=2) as manager:
        for step in (50, 90, 100):
            manager.save(step, {"w": jnp.zeros(2)})
        for step in (51, 52):  # somebody has gone back to 50
            manager.save(step, {"w": jnp.ones(2)})
            manager.wait()
            assert manager.steps() == [step, 90, 100]
            assert manager.info(step).kept == ("last saved",)
    assert caplog.text.count("was saved below the newest step 100") == 1
