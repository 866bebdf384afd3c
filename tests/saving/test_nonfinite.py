"""nonfinite="distrust" and "refuse": a step with NaN in its parameters never takes the place of a good one."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import visible
from jax import lax
from jax.example_libraries import optimizers

import ckptmgr
from ckptmgr import CheckpointManager
from ckptmgr.arrays import finite

NAN = float("nan")


def params(value):
    return {
        "w": jnp.full((4, 3), value), "b": jnp.ones(3), "host": np.full(5, value), "key": jax.random.key(1),
        "n": jnp.arange(3),
    }  # fmt: skip


SAID = "params hold NaN or infinity: ['host'], ['w']"


def journal(directory):
    lines = (directory / ".ckptmgr" / "journal.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_ten_steps_with_nan_do_not_push_out_the_last_good_one(tmp_path, caplog):
    with CheckpointManager(tmp_path, keep=1, nonfinite="distrust") as manager:
        manager.save(10, params(1.0), metrics={"loss": 1.0})
        for step in range(20, 120, 10):
            result = manager.save(step, params(NAN), metrics={"loss": 0.0})
        assert result.result().distrusted == SAID
        manager.wait()
        assert manager.steps() == [10, 110]  # those with NaN do not pile up either
        assert manager.latest() == 110
        assert manager.best("loss") == 10
    with CheckpointManager(tmp_path, keep=1, nonfinite="distrust") as manager:
        assert manager.info(110).distrusted == SAID
        assert manager.info(10).distrusted is None
        caplog.clear()
        found = manager.restore_or(params=params(0.0))
        assert (found.step, found.skipped) == (10, {110: f"distrusted: {SAID}"})
        assert f"step 110 is passed over, because it is distrusted: {SAID}" in caplog.text
        assert np.array_equal(found.params["w"], params(1.0)["w"])
        caplog.clear()
        asked = manager.restore(110, params=params(0.0))
        assert (asked.step, asked.skipped, asked.info.distrusted) == (110, {}, SAID)
        assert np.isnan(asked.params["w"]).all()
        assert f"step 110 is restored as it was asked for, but it is distrusted: {SAID}" in caplog.text
    events = [(each["event"], each["step"]) for each in journal(tmp_path)]
    assert ("distrusted", 110) in events
    assert ("passed over", 110) in events
    assert ("deleted", 100) in events


def test_a_run_that_goes_back_saves_the_same_numbers_again(tmp_path, caplog):
    with CheckpointManager(tmp_path, keep=2, nonfinite="distrust") as manager:
        for step, value in ((1, 1.0), (2, NAN), (3, NAN), (4, NAN)):
            manager.save(step, params(value))
        manager.wait()
        assert manager.restore().step == 1
        caplog.clear()
        for step in (2, 3):
            manager.save(step, params(float(step)))
            manager.wait()
            assert manager.restore().step == step
        assert "below the newest" not in caplog.text  # what is newer is not to be gone on from
        assert manager.steps() == [2, 3, 4]
        with pytest.raises(ckptmgr.CheckpointExistsError):
            manager.save(3, params(3.0))
        manager.pin(4)
        with pytest.raises(ckptmgr.CheckpointExistsError):  # somebody wants to look into it
            manager.save(4, params(4.0))
    assert not (tmp_path / ".ckptmgr" / "damaged").exists()


def test_rewind_sets_the_distrusted_steps_aside(tmp_path):
    with CheckpointManager(tmp_path, nonfinite="distrust") as manager:
        for step, value in ((1, 1.0), (2, NAN)):
            manager.save(step, params(value))
        manager.rewind(manager.restore().step)
        assert manager.steps() == [1]
        manager.rewind(2)
        assert manager.info(2).distrusted == SAID


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_refused_step_is_not_there_and_training_goes_on(tmp_path, asynchronous):
    with CheckpointManager(tmp_path, nonfinite="refuse", asynchronous=asynchronous) as manager:
        manager.save(1, params(1.0))
        with pytest.raises(
            ckptmgr.SaveError, match=r"step 2 .*\['host'\], \['w'\].*\(nonfinite=\"refuse\"\)"
        ) as told:
            manager.save(2, params(NAN)).result()
        assert told.value.step == 2
        assert manager.steps() == [1]
        assert manager.save(3, params(3.0)).result().distrusted is None
        with pytest.raises(ckptmgr.SaveError, match="step 4"):
            manager.save(4, params(np.inf)).result()
    assert visible(tmp_path) == ["1", "3"]
    assert not list((tmp_path / ".ckptmgr" / "saving").iterdir())


def test_a_refused_step_does_not_replace_the_one_that_is_there(tmp_path):
    with CheckpointManager(tmp_path, nonfinite="refuse") as manager:
        manager.save(1, params(1.0))
        with pytest.raises(ckptmgr.SaveError, match="NaN"):
            manager.save(1, params(NAN), on_exists="replace").result()
        assert np.array_equal(manager.restore(1, params=params(0.0)).params["host"], np.full(5, 1.0))


def test_nobody_looks_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(finite, "Search", None)
    with CheckpointManager(tmp_path) as manager:
        assert manager.save(1, params(NAN)).result().distrusted is None
        assert manager.restore().step == 1
    assert b"distrusted" not in (tmp_path / "1" / "manifest.json").read_bytes()


def test_opt_state_and_extras_may_hold_them_and_params_in_opt_state_may_not(tmp_path):
    bad = {"mu": jnp.full(3, NAN)}
    init, update, _ = optimizers.adam(1e-3)
    state = init({"w": jnp.ones(3)})
    with CheckpointManager(tmp_path, nonfinite="distrust") as manager:
        assert manager.save(1, params(1.0), bad, extras={"ema": bad}).result().distrusted is None
        assert manager.save(2, None, state).result().distrusted is None
        state = update(0, {"w": jnp.full(3, NAN)}, state)
        assert manager.save(3, None, state).result().distrusted.startswith("opt_state holds NaN or infinity: [")
        assert manager.restore().step == 2


@pytest.mark.parametrize("max_host_bytes", [None, 64])
def test_every_array_may_be_donated_deleted_and_overwritten_after_save(tmp_path, max_host_bytes):
    spoil = jax.jit(lambda x: x * 0 + 1, donate_argnums=0)
    with CheckpointManager(tmp_path, nonfinite="distrust", max_host_bytes=max_host_bytes) as manager:
        for step in range(1, 9):
            bad = step % 3 == 0
            tree = {
                "w": jnp.full((64, 64), NAN if bad else 1.0), "deleted": jnp.ones(1000),
                "host": np.full(300, NAN if bad else 1.0),
            }  # fmt: skip
            manager.save(step, tree)
            tree["w"] = spoil(tree["w"])
            tree["deleted"].delete()
            tree["host"][:] = 1.0 if bad else NAN
        manager.wait()
        said = [info.distrusted for info in manager.infos()]
    assert said == [SAID if step % 3 == 0 else None for step in range(1, 9)]


def test_save_does_not_wait_for_what_is_found(tmp_path, monkeypatch):
    """The program that looks is made to take seconds, on its device."""
    real = finite._is_finite

    def slow(array):
        last = lax.fori_loop(0, 1500, lambda _, x: jnp.tanh(x @ x), jnp.full((400, 400), 0.01))
        return real(array) & (last[0, 0] < 2)

    def take(step):
        manager.wait()
        tree = params(NAN)
        jax.block_until_ready(tree["w"])
        began = time.monotonic()
        result = manager.save(step, tree)
        blocked = time.monotonic() - began
        assert result.result().distrusted == SAID
        return blocked, time.monotonic() - began

    monkeypatch.setattr(finite, "_is_finite", slow)
    with CheckpointManager(tmp_path, nonfinite="distrust") as manager:
        finite._are_finite.clear_cache()
        try:
            take(1)  # compiles
            blocked, durable = take(2)
        finally:
            finite._are_finite.clear_cache()
    assert durable > 0.8
    assert blocked < durable / 4


def test_a_slow_program_before_it_holds_up_no_caller(tmp_path):
    """What still runs on the devices when `save` is called is not waited for, with the option and without it."""
    slow = jax.jit(lambda x: lax.fori_loop(0, 1500, lambda _, x: jnp.tanh(x @ x), jnp.full((400, 400), 0.01) * x))
    one = jnp.ones(())
    slow(one).block_until_ready()
    for name in ("ignore", "distrust"):
        with CheckpointManager(tmp_path / name, nonfinite=name) as manager:
            manager.save(1, params(1.0)).result()
            tree = jax.block_until_ready(params(1.0))
            began = time.monotonic()
            running = slow(one)
            manager.save(2, tree)
            blocked = time.monotonic() - began
            running.block_until_ready()
            took = time.monotonic() - began
        assert took > 0.8
        assert blocked < took / 4, name


def test_a_manifest_says_it_in_a_field_that_older_versions_pass_over(tmp_path):
    with CheckpointManager(tmp_path, nonfinite="distrust") as manager:
        manager.save(1, params(NAN)).result()
        manager.save(2, params(1.0)).result()
    one, other = (json.loads((tmp_path / step / "manifest.json").read_bytes()) for step in "12")
    assert (one["format"], one["distrusted"]) == (other["format"], SAID) == (1, SAID)
    assert one.keys() - other.keys() == {"distrusted"}


def test_nan_in_an_unchanged_array_in_the_memory_of_the_host_is_found_at_each_save(tmp_path):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    frozen = jax.device_put(jnp.full(1 << 19, NAN), place)
    with CheckpointManager(tmp_path, reuse_unchanged=True, nonfinite="distrust") as manager:
        for step in (1, 2, 3):
            assert manager.save(step, {"frozen": frozen}).result().distrusted
