"""What is remembered of a step is that of the step that is there, whoever put it there."""

import gc
import subprocess
import sys

import jax.numpy as jnp

from ckptmgr import CheckpointManager
from ckptmgr.format.manifest import Manifest


def state(value):
    return {"w": jnp.full(3, float(value))}


def replace_elsewhere(directory, step, loss):
    """Another process replaces a step."""
    script = f"""
import ckptmgr, numpy as np
with ckptmgr.CheckpointManager({str(directory)!r}) as manager:
    manager.save({step}, {{"w": np.zeros(3), "x": 0}}, metrics={{"loss": {loss}}}, on_exists="replace")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_step_that_another_process_replaced_is_told_of_as_it_is_now(tmp_path):
    home, away = tmp_path / "home", tmp_path / "away"
    with CheckpointManager(home) as manager:
        for step in (1, 2):
            manager.save(step, state(step), metrics={"loss": step})
    reader = CheckpointManager(home, read_only=True)
    mirroring = CheckpointManager(home, mirror=away)
    mirroring.wait()
    copies = CheckpointManager(away, read_only=True)
    for each in (reader, copies, mirroring):
        assert (each.best("loss"), each.info(2).metrics, len(each.infos())) == (1, {"loss": 2}, 2)
    mirroring.close()
    replace_elsewhere(home, 2, 0.5)
    with CheckpointManager(home, mirror=away) as again:
        again.wait()
    for each in (reader, copies, mirroring):
        assert each.best("loss") == 2
        assert each.info(2).metrics == each.infos()[1].metrics == {"loss": 0.5}
        assert len(each.info(2).leaves["params"]) == 2
        assert each.diff(2, params=state(0))


def test_a_step_that_was_damaged_counts_again_once_it_is_whole(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, state(step))
        manager.wait()
        reader = CheckpointManager(tmp_path, read_only=True)
        path = tmp_path / "2" / "manifest.json"
        path.write_bytes(path.read_bytes()[:-1])
        assert reader.restore().step == 1
        assert [info.step for info in reader.infos()] == [1]
        manager.save(2, state(3), on_exists="replace").result()
        assert [info.step for info in reader.infos()] == [1, 2]
        assert reader.restore().step == 2


def test_a_pin_changes_nothing_about_damage(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, state(step))
        manager.wait()
        for chunk in (tmp_path / "2" / "params" / "d").iterdir():
            chunk.write_bytes(b"")
        assert manager.restore().step == 1
        manager.pin(2)
        assert [info.step for info in manager.infos() if info.distrusted is None] == [1]


def test_the_structure_that_all_steps_have_is_held_once_and_a_deleted_step_is_not_held(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        for step in range(1, 6):
            manager.save(step, state(step) | ({"k": 1.0} if step < 3 else {}))
        manager.wait()
        reader = CheckpointManager(tmp_path, read_only=True)
        infos = reader.infos()
        assert len({id(info.leaves["params"]) for info in infos}) == 2
        held = len(manifests_in_memory())
        for step in (3, 4):
            manager.delete(step)
        assert reader.steps() == [1, 2, 5]
        assert len(manifests_in_memory()) <= held - 2


def manifests_in_memory():
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is Manifest]
