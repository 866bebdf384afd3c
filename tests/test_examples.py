"""The examples run as a person runs them, and each goes on bit for bit where it was stopped."""

import importlib
import importlib.util
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import faults
import matplotlib.pyplot as plt
import pytest
import warm
from conftest import ON_CI, SOAK, counted, free_port, in_background
from prometheus_client.parser import text_string_to_metric_families
from tensorboardX.proto.event_pb2 import Event

from benchmarks import picture
from ckptmgr.testing import assert_trees_equal

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
FRAMEWORKS = ["flax_nnx", "flax_linen", "equinox_mlp", "haiku_mlp", "grain_loader", "tensorboard"]
RUNS = ["optax_adam", "example_libraries_adam", "change_learning_rate", "schedule", *FRAMEWORKS]


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.mark.parametrize("name", [*RUNS, "nnx_trainer"])
def test_a_run_that_stopped_ends_as_one_that_did_not(tmp_path, name):
    train = importlib.import_module(name).train
    train(tmp_path / "stopped", 110)
    assert_trees_equal(train(tmp_path / "stopped", 160), train(tmp_path / "straight", 160))


def test_a_changed_learning_rate_is_part_of_the_run(tmp_path):
    train = importlib.import_module("change_learning_rate").train
    train(tmp_path / "stopped", 20, halve_at=[10])
    stopped = train(tmp_path / "stopped", 40, halve_at=[21])
    assert_trees_equal(stopped, train(tmp_path / "straight", 40, halve_at=[10, 21]))
    assert float(stopped[1].hyperparams["learning_rate"]) == 0.25


def test_digits_goes_on_with_its_data_and_its_dropout(tmp_path):
    digits = importlib.import_module("digits")
    for directory, stops in (("stopped", (13, 30)), ("straight", (30,))):
        (tmp_path / directory).mkdir()
        for steps in stops:
            result = digits.train(tmp_path / directory, steps=steps, save_every=5)
        if directory == "stopped":
            stopped = result
    assert_trees_equal(stopped, result)
    ours, theirs = (
        sorted((tmp_path / each / "losses.txt").read_text().split()) for each in ("stopped", "straight")
    )
    assert ours == theirs


@pytest.mark.soak
@pytest.mark.parametrize("name", RUNS[:: counted(4, full=1)])
def test_each_example_runs_as_a_script_and_again(tmp_path, name):
    for _ in range(2):
        done = warm.run(["-W", "error", EXAMPLES / f"{name}.py", tmp_path / "run"])
        assert done.returncode == 0, done.stderr
    if name in FRAMEWORKS:
        assert "resumed from step 200" in done.stdout


def test_each_checkpoint_is_drawn_once(tmp_path):
    drawn = []
    for total in (110, 200):
        importlib.import_module("tensorboard").train(tmp_path, total)
        for file in (tmp_path / "events").iterdir():
            drawn += [
                (event.step, value.tag) for event in events(file.read_bytes()) for value in event.summary.value
            ]
            file.unlink()  # within a second the next run would take the same name
    tags = ("checkpoint/durable_s", "loss")
    assert sorted(drawn) == [(step, tag) for step in (50, 100, 150, 200) for tag in tags]


def events(data):
    """The records of an event file: each has its length, a checksum, itself, and a checksum."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def logged(example, directory, stop):
    """How an example that logs ended when it was stopped, what the next start printed, and what the logger has."""
    environment = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment |= {"WANDB_X_SERVICE_WAIT": "100", "WANDB_INIT_TIMEOUT": "100"}  # on a busy machine
    script = Path(__file__).parent / "loggers.py"
    done = warm.run([script, example, directory, stop], env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    *_, first, said, rows = done.stdout.splitlines()
    return json.loads(first), said, json.loads(rows)


def losses_of(total):
    """The loss of every tenth step: the examples of loggers train the same line."""
    module = importlib.import_module("tensorboard")
    params = {"w": module.jnp.zeros(10), "b": module.jnp.zeros(())}
    state, found = (params, module.OPTIMIZER.init(params)), {}
    for step in range(1, total + 1):
        *state, loss = module.train_step(*state)
        found[step] = float(loss)
    return {step: loss for step, loss in found.items() if step % 10 == 0}


def test_mlflow_has_each_row_once_although_the_example_was_killed(tmp_path):
    if importlib.util.find_spec("mlflow") is None:
        assert not ON_CI
        pytest.skip("mlflow is not installed")
    ended, said, (rows,) = logged("mlflow_local", tmp_path, "after publish 3")
    assert ended == -signal.SIGKILL  # step 150 is durable, and nobody was told
    assert said == "resumed from step 150"
    assert [(row["step"], row["loss"]) for row in rows] == list(losses_of(200).items())


def test_wandb_has_each_row_once_in_a_group_of_offline_runs(tmp_path):
    ended, said, (first, second, with_own_step) = logged("wandb_offline", tmp_path, "SIGTERM 120")
    assert (ended, said) == (0, "resumed from step 120")
    losses = losses_of(200)
    assert {row["step"]: row["loss"] for row in first + second if "loss" in row} == losses
    assert [row["step"] for row in first + second if "loss" in row] == list(losses)
    assert [checkpoint(row) for row in first if "checkpoint/loss" in row] == [
        (step, losses[step], True) for step in (50, 100, 120)
    ]
    assert [checkpoint(row) for row in second if "checkpoint/loss" in row] == [
        (step, losses[step], step > 120) for step in (120, 150, 200)
    ]
    assert [(row["_step"], "checkpoint/loss" in row) for row in with_own_step] == [(100, False)]  # W&B drops it


def checkpoint(row):
    costs = {row.get(f"checkpoint/{name}", 0) > 0 for name in ("blocked_s", "durable_s")}
    (has_costs,) = costs
    return row["step"], row["checkpoint/loss"], has_costs


@in_background
def test_prometheus_reads_what_the_last_checkpoint_was_and_what_failed(tmp_path, monkeypatch):
    module, port, seen = importlib.import_module("prometheus_metrics"), free_port(), {}
    train_step = module.train_step

    def looked_at(*state):
        looked_at.step += 1
        if looked_at.step in looked_at.until:
            seen[looked_at.step] = scrape(port, looked_at.until[looked_at.step])
        return train_step(*state)

    monkeypatch.setattr(module, "train_step", looked_at)
    looked_at.step, looked_at.until = 0, {1: 0, 110: 100}
    module.train(tmp_path / "run", 120, port)
    assert math.isnan(seen[1]["checkpoint_age_seconds"])
    assert (seen[1]["checkpoint_step"], seen[1]["checkpoint_durable_seconds_count"]) == (0, 0)
    assert seen[110]["checkpoint_step"] == 100
    assert seen[110]["checkpoint_durable_seconds_count"] == seen[110]["checkpoint_blocked_seconds_count"] == 2
    assert seen[110]["checkpoint_durable_seconds_sum"] > seen[110]["checkpoint_blocked_seconds_sum"] > 0

    faults.install("fail publish 1", put=monkeypatch.setattr)
    looked_at.step, looked_at.until = 100, {101: 100, 240: 200}
    stopped = module.train(tmp_path / "run", 250, port)
    assert 0 < seen[110]["checkpoint_age_seconds"] < seen[101]["checkpoint_age_seconds"]
    assert seen[101]["checkpoint_durable_seconds_count"] == seen[101]["checkpoint_failures_total"] == 0
    assert seen[240]["checkpoint_step"] == 200
    assert (seen[240]["checkpoint_durable_seconds_count"], seen[240]["checkpoint_failures_total"]) == (1, 1)
    files = [path for path in (tmp_path / "run" / "200").rglob("*") if path.is_file()]
    sizes = [path.stat().st_size for path in files if path.name != "manifest.json"]
    assert seen[240]["checkpoint_disk_bytes"] == sum(sizes)
    assert_trees_equal(stopped, module.train(tmp_path / "straight", 250, port))


def scrape(port, step):
    """What Prometheus would read, once this step is durable."""
    for _ in range(600):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        found = {sample.name: sample.value for family in families for sample in family.samples}
        if found["checkpoint_step"] == step:
            return found
        time.sleep(0.1)
    raise AssertionError(found)


def test_a_run_goes_on_over_other_devices_as_if_nothing_had_happened(tmp_path, capsys):
    def losses(said):
        lines = [line.split() for line in said.splitlines() if line.startswith("step")]
        return {int(words[1]): (float(words[3]), int(words[6])) for words in lines}

    command = [sys.executable, EXAMPLES / "reshard.py", tmp_path / "moved"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    moved = losses(done.stdout)
    assert [moved[step][1] for step in (1, 11, 21, 31)] == [8, 2, 1, 4]
    assert sorted(moved) == list(range(1, 41))
    importlib.import_module("reshard").train(tmp_path / "stayed", 1, 1, steps=40)
    stayed = losses(capsys.readouterr().out)
    assert all(abs(moved[step][0] - stayed[step][0]) < 1e-4 for step in moved)  # sums of other orders


def test_several_processes_train_as_one_and_go_on(tmp_path):
    command = [sys.executable, EXAMPLES / "multiprocess.py", tmp_path / "run"]
    first, again = (subprocess.run(command, capture_output=True, text=True, timeout=180) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert "from step 0 to 20" in first.stdout
    assert "done before" in again.stdout


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="`make demo` runs it")
def test_the_demo_ends_with_every_comparison_equal_and_leaves_what_the_picture_needs(tmp_path):
    command = [sys.executable, EXAMPLES / "demo.py", "--steps", "80", "--save-every", "10", "--keep", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "half written" in done.stdout
    assert "resumed from step" in done.stdout
    assert "80 of 80 equal" in done.stdout
    assert "(1024, 1024) lies as (1024, 256) on each device" in done.stdout
    assert done.stdout.count("13 of 13 equal") == 2
    assert "All equal" in done.stdout
    lives = picture.lives(picture.losses(tmp_path / "killed"))
    assert lives[-2][-1][0] >= lives[-1][0][0], "the resumed process repeats steps of the one that was killed"
    drawn = picture.draw(tmp_path, picture.RESULTS, tmp_path / "picture.png")
    assert plt.imread(drawn).std() > 0.1  # not one colour


FORGOTTEN = {
    "its data position": ('self.epoch, self.index = state["epoch"], state["index"]', "pass"),
    "its dropout key": ('ckpt.opt_state, ckpt.extras["dropout_key"]', "ckpt.opt_state, key"),
}


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="three runs of a minute")
@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_the_demo_notices_what_is_not_resumed(tmp_path, forgotten):
    """The comparison can fail."""
    source = (EXAMPLES / "digits.py").read_text()
    broken = source.replace(*FORGOTTEN[forgotten])
    assert broken != source
    (tmp_path / "digits.py").write_text(broken)
    (tmp_path / "demo.py").write_text((EXAMPLES / "demo.py").read_text())
    command = [sys.executable, tmp_path / "demo.py", "--steps", "60", "--save-every", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 1
    assert "NOT EQUAL" in done.stdout
