"""Steps that somebody distrusts: passed over, never best, not counted, until they are trusted again."""

import json
import os
import random
import subprocess
import sys
import threading
import uuid

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import counted, on_servers
from typer.testing import CliRunner

import ckptmgr
from ckptmgr import CheckpointManager, best, every_steps, latest
from ckptmgr.cli import app as commands
from ckptmgr.format import names
from ckptmgr.run import trust

PARAMS = {"w": jnp.ones((4, 4))}
NAN = {"w": jnp.full((4, 4), jnp.nan)}
SAID = "params hold NaN or infinity: ['w']"


def saved(directory, *steps, **options):
    with CheckpointManager(directory, **options) as manager:
        for step in steps:
            manager.save(step, PARAMS, metrics={"loss": 1 / step})
    return manager


def check_by_hand(run):
    """The life of a verdict, in any kind of directory, with other managers in between."""
    saved(run, 1, 2, 3)
    with CheckpointManager(run, keep=best("loss")) as manager:
        manager.distrust(3, "trained on the wrong data")
        assert manager.info(3).distrusted == "trained on the wrong data"
        assert manager.info(2).distrusted is None
        assert (manager.best(), manager.latest()) == (2, 3)
        assert manager.restore("best").step == 2
        found = manager.restore()
        assert (found.step, found.skipped) == (2, {3: "distrusted: trained on the wrong data"})
        assert manager.restore(3).step == 3
    reader = CheckpointManager(run, read_only=True)
    assert reader.restore().step == 2
    assert list(reader.watch(timeout_s=0)) == [1, 2]
    with pytest.raises(ckptmgr.SaveError, match="step 3 cannot be distrusted"):
        reader.distrust(3, "why")
    with CheckpointManager(run) as manager:
        manager.distrust(3, "another reason")
        assert manager.info(3).distrusted == "another reason"
        for step in (1, 2):
            manager.distrust(step, "all of it")
        with pytest.raises(
            ckptmgr.CorruptCheckpointError,
            match=r"3 distrusted\).*step 3: another reason.*restore\(3\) .*trust\(3\)",
        ):
            manager.restore_or(params=PARAMS)
        manager.trust(2)
        assert manager.restore_or(params=PARAMS).step == 2
        manager.trust(3)
        manager.trust(3)  # it is trusted already
        assert reader.restore().step == 3
        assert manager.verify(3)
        with pytest.raises(ckptmgr.CheckpointNotFoundError):
            manager.distrust(9, "not there")
    with CheckpointManager(run, nonfinite="distrust") as manager:
        manager.save(4, NAN)
        manager.wait()
        assert manager.restore().step == 3
        manager.trust(4)
        assert reader.restore().step == 4
        assert reader.info(4).distrusted is None
        manager.distrust(4, "it was right")
        assert reader.restore().skipped == {4: "distrusted: it was right"}
        manager.save(4, PARAMS)  # the number can be saved again
        manager.wait()
        assert manager.restore().step == 4
        assert manager.info(4).distrusted is None
        manager.distrust(1, "to be deleted")
        manager.delete(1)
        assert manager.steps() == [2, 3, 4]


def test_by_hand(tmp_path):
    check_by_hand(tmp_path)
    events = [json.loads(line) for line in (tmp_path / ".ckptmgr" / "journal.jsonl").read_text().splitlines()]
    said = [(each["event"], each["step"]) for each in events if each["event"] in ("distrusted", "trusted")]
    assert said[:2] == [("distrusted", 3), ("distrusted", 3)]
    assert ("trusted", 4) in said


@on_servers
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_by_hand_in_a_bucket(servers, scheme):
    check_by_hand(f"{scheme}://bucket/{uuid.uuid4().hex}/run")


def test_the_note_says_who_and_when_and_why_and_is_not_of_the_manifest(tmp_path):
    saved(tmp_path, 7)
    with CheckpointManager(tmp_path, clock=lambda: 1_750_000_000.0) as manager:
        manager.distrust(7, "why")
        note = json.loads((tmp_path / "7" / names.TRUST).read_text())
        assert note.pop("host")
        assert "user" in note
        del note["user"]
        assert note == {"trusted": False, "why": "why", "pid": os.getpid(), "time": 1_750_000_000.0}
        assert manager.verify(7)
        with ocp.CheckpointManager(tmp_path) as stock:
            assert np.array_equal(stock.restore(7)["params"]["w"], PARAMS["w"])
        manager.trust(7)
        assert not (tmp_path / "7" / names.TRUST).exists()


@pytest.mark.parametrize("why", ["", "  ", None, 3])
def test_a_reason_is_needed(tmp_path, why):
    saved(tmp_path, 7)
    with (
        CheckpointManager(tmp_path) as manager,
        pytest.raises(ValueError, match=r"distrust\(7\) needs to know why"),
    ):
        manager.distrust(7, why)


@pytest.mark.parametrize("note", [b"", b"[]", b"{", b"\xff", b'{"trusted": 1}', b'{"why": 3}', b"[" * 10_000])
def test_a_note_that_says_nothing_is_no_reason_to_trust(tmp_path, note):
    saved(tmp_path, 1, 2)
    (tmp_path / "2" / names.TRUST).write_bytes(note)
    with CheckpointManager(tmp_path) as manager:
        assert manager.info(2).distrusted == "its trust.json does not say why"
        assert manager.restore().step == 1
        manager.trust(2)
        assert manager.restore().step == 2


def test_what_is_not_a_file_in_its_place_holds_up_nobody(tmp_path):
    saved(tmp_path, 1, 2, 3)
    os.mkfifo(tmp_path / "2" / names.TRUST)
    (tmp_path / "3" / names.TRUST).mkdir()
    with CheckpointManager(tmp_path) as manager:
        assert manager.restore().step == 1
        manager.distrust(2, "why")
        assert manager.info(2).distrusted == "why"
        with pytest.raises(ckptmgr.SaveError, match="step 3"):
            manager.distrust(3, "why")


KILLED = """
import os, sys
import ckptmgr
from ckptmgr.format import files

real = os.replace
def replace(source, target):
    if str(target).endswith("trust.json"):
        os.kill(os.getpid(), 9)
    real(source, target)
os.replace = replace
with ckptmgr.CheckpointManager(sys.argv[1]) as manager:
    manager.distrust(2, "why")
"""


def test_killed_before_the_note_is_whole_there_is_none(tmp_path):
    saved(tmp_path, 1, 2)
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert (tmp_path / names.NEW_TRUST).exists()
    with CheckpointManager(tmp_path) as manager:
        assert manager.restore().step == 2
        manager.distrust(2, "again")
        assert manager.restore().step == 1
    assert not (tmp_path / names.NEW_TRUST).exists()


# ---------------------------------------------------------------- retention


def test_a_distrusted_step_takes_no_place_from_another_and_goes_as_it_would_if_trusted(tmp_path):
    saved(tmp_path, 1, 2, 3, 4)
    with CheckpointManager(tmp_path, keep=[latest(1), every_steps(2)]) as manager:
        manager.distrust(4, "why")
        manager.distrust(1, "why")
        manager.save(5, PARAMS)
        manager.wait()
        assert manager.steps() == [2, 4, 5]
        assert manager.info(4).kept == ("every_steps(n=2)",)
        manager.distrust(5, "why")
        manager.save(7, PARAMS)
        manager.wait()
        assert manager.steps() == [2, 4, 7]


def test_a_pinned_step_and_the_last_saved_one_stay_although_they_are_distrusted(tmp_path):
    saved(tmp_path, 1, 2, 3)
    with CheckpointManager(tmp_path, keep=1, nonfinite="distrust") as manager:
        manager.pin(1)
        manager.distrust(1, "why")
        manager.distrust(3, "why")
        manager.save(4, NAN)
        manager.wait()
        assert manager.steps() == [1, 2, 4]


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(counted(6, full=200)))
def test_the_steps_that_would_be_there_without_the_distrusted_ones_are_there(tmp_path, seed):
    """Two runs: in one of them the bad steps are never saved. All that it keeps, the other keeps."""
    rng = random.Random(seed)
    keep = [latest(2), best("loss"), every_steps(5)]
    bad = {step for step in range(1, 16) if rng.random() < 0.5}
    both = CheckpointManager(tmp_path / "both", keep=keep, nonfinite="distrust")
    good = CheckpointManager(tmp_path / "good", keep=keep)
    with both, good:
        for step in range(1, 16):
            metrics = {"loss": rng.random()}
            both.save(step, NAN if step in bad else PARAMS, metrics=metrics)
            if step not in bad:
                good.save(step, PARAMS, metrics=metrics)
            both.wait()
            good.wait()
            kept = {info.step for info in both.infos() if info.distrusted is None}
            assert set(good.steps()) <= kept
            assert set(both.steps()) - kept <= bad
            assert len(both.steps()) <= 2 * len(keep) + 3 + 2
            if good.steps():
                assert both.restore().step == good.latest()


# ---------------------------------------------------------------- readers, mirrors, the command line


def test_watch_yields_a_step_once_it_is_trusted(tmp_path):
    with CheckpointManager(tmp_path, nonfinite="distrust") as manager:
        manager.save(1, PARAMS)
        manager.save(2, NAN)
        manager.wait()
        seen, reader = [], CheckpointManager(tmp_path, read_only=True)
        is_seen = threading.Event()

        def watch():
            for step in reader.watch(timeout_s=20, poll_s=0.05):
                seen.append(step)
                is_seen.set()
                if step == 2:
                    return

        thread = threading.Thread(target=watch)
        thread.start()
        assert is_seen.wait(20)
        thread.join(1)  # the watch looks at step 2 meanwhile
        assert seen == [1]
        manager.trust(2)
        thread.join(20)
        assert seen == [1, 2]


def test_the_mirror_gets_verdicts_and_no_distrusted_steps(tmp_path):
    home, away = tmp_path / "home", tmp_path / "away"
    with CheckpointManager(home, mirror=away, keep=1, mirror_keep=1, nonfinite="distrust") as manager:
        manager.save(1, PARAMS)
        manager.save(2, NAN)
        manager.wait()
        mirror = CheckpointManager(away, read_only=True)
        assert mirror.steps() == [1]
        manager.trust(2)
        manager.wait()
        assert mirror.steps() == [2]
        manager.distrust(2, "no")
        manager.wait()
        assert mirror.info(2).distrusted == "no"
        manager.save(3, PARAMS)
        manager.wait()
        assert mirror.restore().step == 3
        manager.distrust(3, "no")
        manager.wait()
    with CheckpointManager(home, mirror=away, keep=1) as manager:
        with pytest.raises(ckptmgr.CorruptCheckpointError, match=r"no checkpoint in .* is trusted"):
            manager.restore()
        manager.trust(3)
        manager.wait()
        assert CheckpointManager(away, read_only=True).info(3).distrusted is None


def test_what_is_distrusted_at_home_is_not_taken_from_the_mirror(tmp_path):
    home, away = tmp_path / "home", tmp_path / "away"
    with CheckpointManager(home, mirror=away, keep=best("loss")) as manager:
        for step in (1, 2):
            manager.save(step, PARAMS, metrics={"loss": 1 / step})
        manager.wait()
        (home / "2" / names.TRUST).write_bytes(trust.distrusting("no", 0.0))  # not yet in the mirror
        assert manager.restore().step == 1
        assert manager.restore("best").step == 1


def test_damaged_and_distrusted_steps_are_counted_apart(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "1" / "manifest.json").write_bytes(b"{}")
    with CheckpointManager(tmp_path) as manager:
        manager.distrust(2, "why")
        with pytest.raises(ckptmgr.CorruptCheckpointError, match=r"\(1 distrusted, 1 damaged\)") as told:
            manager.restore()
        assert told.value.step == 2


def command(*words):
    done = CliRunner().invoke(commands.app, [str(word) for word in words])
    return done.exit_code, done.output, done.exception


def test_the_command_line(tmp_path):
    run = tmp_path / "run"
    saved(run, 1, 2, 3)
    assert command("distrust", f"{run}@3", "--why", "NaN since 250")[:2] == (
        0,
        "step 3 is distrusted: NaN since 250\n",
    )
    assert command("distrust", f"{run}/2", "--why", "it too")[0] == 0
    assert command("distrust", run, 1, "--why", "and that")[0] == 0
    told = json.loads(command("ls", run, "--json")[1])
    assert {row["step"]: row["distrusted"] for row in told["steps"]} == {
        1: "and that", 2: "it too", 3: "NaN since 250"
    }  # fmt: skip
    assert "DISTRUSTED NaN since 250" in " ".join(command("ls", run)[1].split())
    assert "DISTRUSTED NaN since 250" in command("show", run, 3)[1]
    assert command("trust", f"{run}@2")[:2] == (0, "step 2 is trusted\n")
    assert json.loads(command("export", run, tmp_path / "out.npz", "--json")[1])["step"] == 2
    assert json.loads(command("trust", run, 1, "--json")[1]) == {"run": str(run), "trusted": 1}
    assert "RUN@STEP" in str(command("distrust", "--help")[1])
    assert isinstance(command("trust", run)[2], ValueError)
    assert isinstance(command("distrust", f"{run}@3")[2], ValueError)
    assert command("report", run, "-o", tmp_path / "report.html")[0] == 0
    page = (tmp_path / "report.html").read_text()
    for said in ("on disk, distrusted", "trusted again", "(distrusted: NaN since 250)"):
        assert said in page
