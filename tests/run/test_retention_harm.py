"""Retention that cannot do harm: what is not whole does not count, and what changes is looked at again."""

import dataclasses
import random
import shutil
import subprocess
import sys
import time

import faults
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from conftest import counted, visible
from etils import epath

from ckptmgr import CheckpointManager, best, every_seconds, every_steps, latest, params_only
from ckptmgr.format import manifest
from ckptmgr.run import history, retention
from ckptmgr.run.catalog import Catalog, open_catalog

PARAMS = {"w": jnp.ones((4, 4))}


def saved(directory, *steps, **options):
    with CheckpointManager(directory, **options) as manager:
        for step in steps:
            manager.save(step, PARAMS, metrics={"loss": 1 / step})
    return manager


def files(directory):
    return sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())


# ---------------------------------------------------------------- what counts

HARMS = {
    "missing": lambda path: path.unlink(),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_step_that_lacks_a_file_is_not_counted_and_not_deleted(tmp_path, harm):
    """Each file in turn: with `keep=2` the step beside it is needed."""
    saved(tmp_path / "run", 1, 2, 3)
    names = files(tmp_path / "run" / "3")
    assert len(names) > 5
    for name in names:
        shutil.copytree(tmp_path / "run", tmp_path / "harmed")
        HARMS[harm](tmp_path / "harmed" / "3" / name)
        with CheckpointManager(tmp_path / "harmed", keep=2) as manager:
            manager.save(4, PARAMS)
            manager.wait()
            assert manager.steps() == [2, 3, 4], name
            if str(name) != manifest.NAME:  # else it is not readable, and only listed
                assert "not counted" in manager.info(3).kept[0]
                assert [info.step for info in manager.infos() if info.distrusted] == [3]
            assert manager.best("loss") == 2
        shutil.rmtree(tmp_path / "harmed")


def _newer_format(step):
    text = (step / manifest.NAME).read_bytes().replace(b'"format":1', b'"format":9')
    body = text[: text.rindex(b',"crc32"')]
    (step / manifest.NAME).write_bytes(body + manifest._seal(body))


UNCLEAR = {
    "a manifest of anything": lambda step: (step / manifest.NAME).write_bytes(b"?" * 100),
    "a manifest that is a directory": lambda step: HARMS["a directory"](step / manifest.NAME),
    "a newer format": _newer_format,
    "a file is missing": lambda step: next(step.rglob("d/*")).unlink(),
    "it cannot be looked into": lambda step: step.chmod(0),
}


@pytest.mark.parametrize("how", UNCLEAR)
def test_nothing_is_deleted_while_a_newest_step_is_not_understood(how, tmp_path, caplog, nobody):
    run = tmp_path / "run"
    saved(run, 1, 2, 9)
    UNCLEAR[how](run / "9")
    nobody()
    saved(run, 3, 4, keep=1)
    assert visible(run) == ["1", "2", "3", "4", "9"]
    assert caplog.text.count("nothing is deleted") == 1
    assert "step 9 is newer than the newest good step" in caplog.text
    (run / "9").chmod(0o755)


def test_once_a_restore_has_passed_over_the_newest_step_retention_goes_on(tmp_path):
    saved(tmp_path, 1, 2, 9)
    UNCLEAR["a file is missing"](tmp_path / "9")
    with CheckpointManager(tmp_path, keep=1) as manager:
        assert manager.restore(params=PARAMS).step == 2
        manager.save(3, PARAMS)
        manager.wait()
        assert manager.steps() == [3, 9]
        assert manager.info(9).kept == ("not counted: a restore has passed over it as damaged",)


# ---------------------------------------------------------------- another process, meanwhile

PIN = "open({run!r} + '/2/PINNED', 'w').close()"
REPLACE = (
    "import shutil; shutil.copytree({run!r} + '/2', {run!r} + '/.x'); shutil.rmtree({run!r} + '/2'); import os; "
)
REPLACE += "os.rename({run!r} + '/.x', {run!r} + '/2')"
EMPTY = "import pathlib; [path.write_bytes(b'') for path in pathlib.Path({run!r}, '4').rglob('d/*')]"
STRANGERS = {
    "pins one": (PIN, [2, 4]),
    "replaces one": (REPLACE, [2, 4]),
    "removes one": ("import shutil; shutil.rmtree({run!r} + '/2')", [4]),
    "removes the newest": ("import shutil; shutil.rmtree({run!r} + '/4')", [1, 2, 3]),
    "empties the newest": (EMPTY, [1, 2, 3, 4]),
}  # fmt: skip


@pytest.mark.parametrize("what", STRANGERS)
@pytest.mark.parametrize("when", ["decided", "deletes"])
def test_a_decision_is_looked_at_again_before_each_deletion(tmp_path, what, when, monkeypatch):
    """The other process acts when it has been decided what goes, or when the first of three is on its way out."""
    program, at_once = STRANGERS[what]
    saved(tmp_path, 1, 2, 3)
    acted = []

    def act():
        if not acted:
            acted.append(
                subprocess.run([sys.executable, "-S", "-c", program.format(run=str(tmp_path))], check=True)
            )

    decide, delete = history.History.decide_deletions, Catalog.delete
    if when == "decided":
        monkeypatch.setattr(history.History, "decide_deletions", lambda self: (decide(self), act())[0])
        expected = at_once
    else:
        monkeypatch.setattr(Catalog, "delete", lambda self, *given: (act(), delete(self, *given)))
        expected = [step for step in at_once if step != 1]  # its deletion had begun
    manager = saved(tmp_path, 4, keep=1)
    assert acted
    assert manager.steps() == expected


# ---------------------------------------------------------------- what is said is what is done


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    directory = tmp_path_factory.mktemp("template")
    saved(directory, 1)
    return directory / "1"


def _make(template, directory, step, time, loss):
    shutil.copytree(template, directory / str(step))
    known = manifest.decode((template / manifest.NAME).read_bytes(), step=1, path=manifest.NAME)
    told = dataclasses.replace(known, step=step, time=time, metrics={} if loss is None else {"loss": loss})
    (directory / str(step) / manifest.NAME).write_bytes(manifest.encode(told))


POLICIES = [latest(1), latest(3), best("loss"), best("loss", 2, "max"), every_steps(3), every_seconds(25)]


@pytest.mark.parametrize("seed", range(counted(20, full=200)))
def test_what_is_told_of_a_step_is_what_retention_does_with_it(tmp_path, one_step, seed):
    draw = random.Random(seed)
    steps = draw.sample(range(30), 8)
    for step in steps:
        _make(
            one_step,
            tmp_path,
            step,
            draw.choice([5.0, 10.0 * step, -3.0 * step]),
            draw.choice([None, float("nan"), draw.random()]),
        )
        if draw.random() < 0.2:
            (tmp_path / str(step) / "PINNED").touch()
        if draw.random() < 0.2:
            draw.choice(list(HARMS.values()))(next((tmp_path / str(step)).rglob("d/*")))
    found = open_catalog(epath.Path(tmp_path))
    told = history.History(found, draw.sample(POLICIES, draw.randint(1, 3)))
    committed = draw.choice([None, *steps])
    told.committed = lambda: committed
    infos = {info.step: info for info in told.all()}
    assert sorted(infos) == sorted(steps)
    for step in steps:
        assert told.info(step).kept == infos[step].kept
    trusted = [step for step, info in infos.items() if info.distrusted is None]
    is_clear = trusted and max(trusted) == max(steps)
    retention.retain(found, told)
    assert found.steps() == sorted(step for step, info in infos.items() if info.kept or not is_clear)


# ---------------------------------------------------------------- below the newest


def test_what_was_saved_last_stays_after_a_restart_although_later_steps_are_there(tmp_path):
    now = [100.0]
    options = {"keep": 2, "clock": lambda: now[0]}
    for step in (50, 90, 100, 60):  # the run has gone back to 50
        now[0] += 10
        saved(tmp_path / "run", step, **options)
    with CheckpointManager(
        tmp_path / "run", mirror=tmp_path / "away", **options
    ) as manager:  # retains as it copies
        manager.wait()
        assert manager.steps() == [60, 90, 100]
        assert manager.info(60).kept == ("last saved",)
        now[0] += 10
        manager.save(70, PARAMS)
        manager.wait()
        assert manager.steps() == [70, 90, 100]


def test_metrics_that_stock_orbax_wrote_may_be_anything(tmp_path):
    found = {
        1: '{"loss": 0.5}', 2: '{"loss": NaN}', 3: '{"loss": "0.1"}', 4: '{"loss": null}',
        5: '{"loss": {"a": 0.1}}', 6: f'{{"loss": {10**400}}}', 7: '{"loss": -1e999}', 8: "[0.1]", 9: "0.1",
        10: '{"loss": true}', 11: "{}",
    }  # fmt: skip
    with ocp.CheckpointManager(tmp_path) as stock:
        for step in found:
            item = {"params": ocp.args.StandardSave(PARAMS), "metrics": ocp.args.JsonSave({"loss": 1.0})}
            stock.save(step, args=ocp.args.Composite(**item))
    for step, text in found.items():
        (tmp_path / str(step) / "metrics" / "metrics").write_text(text)
    with CheckpointManager(tmp_path, keep=[best("loss", 2), best("loss", mode="max")]) as manager:
        assert manager.best() == 7
        assert manager.restore("best", params=PARAMS).step == 7
        manager.save(12, PARAMS)
        manager.wait()
        assert manager.steps() == [1, 7, 10, 12]


def test_a_step_that_has_just_got_its_name_is_not_deleted_by_the_thread_of_the_mirror(tmp_path, monkeypatch):
    """It is below the newest, its save is not over, and a pin has the mirror's thread retain meanwhile."""
    run = tmp_path / "run"
    with CheckpointManager(run, keep=1, mirror=tmp_path / "away") as manager:
        manager.save(10, PARAMS)
        manager.wait()
        monkeypatch.setattr(faults, "SLOW_S", 2.0)
        faults.install("slow sync 2", put=monkeypatch.setattr)  # of the run's directory, after the rename
        accepted = manager.save(5, PARAMS)
        while not (run / "5").exists():
            time.sleep(0.01)
        manager.pin(10)
        assert accepted.result().step == 5
        manager.wait()
        assert manager.steps() == [5, 10]


def test_the_step_that_was_saved_last_outlives_a_restart_although_the_clock_went_back(tmp_path):
    now = [1000.0]
    options = {"keep": 2, "mirror": tmp_path / "mirror", "clock": lambda: now[0]}
    with CheckpointManager(tmp_path / "run", **options) as manager:
        for step in (90, 100):
            manager.save(step, {"w": jnp.arange(4)}).result()
        now[0] = 500
        manager.save(60, {"w": jnp.arange(4)})
    with CheckpointManager(tmp_path / "run", **options) as manager:
        manager.wait()  # a mirror is looked at when a run is opened, and then it is decided what to delete
        assert manager.steps() == [60, 90, 100]


@pytest.mark.parametrize("wrap", [lambda policy: policy, params_only], ids=["best", "params_only"])
def test_a_metric_that_no_checkpoint_has_deletes_none(wrap, tmp_path, caplog):
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(step, {"w": jnp.ones(2)}, metrics={"loss": 1 / step}).result()
    with CheckpointManager(tmp_path, keep=[wrap(best("los")), 1]) as manager:
        manager.save(4, {"w": jnp.ones(2)}, metrics={"loss": 0.0}).result()
        manager.wait()
        assert manager.steps() == [1, 2, 3, 4]
        assert caplog.text.count("keep names the metric 'los', which no checkpoint has; they have loss") == 1
        manager.save(5, {"w": jnp.ones(2)}, metrics={"loss": 1.0, "los": 2.0}).result()
        manager.wait()
        assert manager.steps() == [5]


def test_without_any_metrics_best_keeps_nothing(tmp_path):
    with CheckpointManager(tmp_path, keep=[best("loss"), 1]) as manager:
        for step in (1, 2, 3):
            manager.save(step, {"w": jnp.ones(2)}).result()
        manager.wait()
        assert manager.steps() == [3]
