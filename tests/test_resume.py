"""Kill, resume, compare: every optimizer goes on bit for bit where SIGKILL stopped it."""

import ast
import signal
import time
from pathlib import Path

import optimizers
import pytest
import warm

import ckptmgr
from ckptmgr.testing import assert_trees_equal

pytestmark = pytest.mark.xdist_group("resume")  # one worker: the runs are made once

STEPS = 16
SCRIPT = Path(__file__).with_name("optimizers.py")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The directory of runs that were killed once in mid-course and resumed to their end."""
    directory = tmp_path_factory.mktemp("runs")
    command = [SCRIPT, directory, STEPS]
    first = warm.start(command)
    while not any(int(path.name) >= 7 for path in directory.glob("*/[0-9]*") if path.name.isdigit()):
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert not list(directory.glob(f"*/{STEPS}"))
    second = warm.run(command)
    assert second.returncode == 0, second.stderr
    return directory, ast.literal_eval(second.stdout)


@pytest.mark.parametrize("name", optimizers.runs())
def test_the_run_ends_as_one_that_was_never_stopped(resumed, name):
    directory, resumed_at = resumed
    assert 0 < resumed_at[name] < STEPS
    params, opt_state, train_step = optimizers.runs()[name]
    for step in range(1, STEPS + 1):
        params, opt_state = train_step(params, opt_state, step)
    manager = ckptmgr.CheckpointManager(directory / name, read_only=True)
    back = manager.restore(STEPS, params=params, opt_state=opt_state)
    assert_trees_equal(
        {"params": back.params, "opt_state": back.opt_state}, {"params": params, "opt_state": opt_state}
    )


@pytest.mark.parametrize("name", optimizers.OPTAX)
def test_the_optimizer_alone_is_template_enough(resumed, name):
    directory, _ = resumed
    params, opt_state, _ = optimizers.runs()[name]
    manager = ckptmgr.CheckpointManager(directory / name, read_only=True)
    back = manager.restore(STEPS, optimizer=optimizers.OPTAX[name])
    by_template = manager.restore(STEPS, params=params, opt_state=opt_state)
    assert_trees_equal(back.opt_state, by_template.opt_state)
    assert_trees_equal(back.params, by_template.params)
