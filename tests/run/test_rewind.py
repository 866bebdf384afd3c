"""Going on from another step: what is later is set aside, comes back, and is never lost."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import faults
import numpy as np
import orbax.checkpoint as ocp
import pytest
import trainer
from conftest import counted, visible
from etils import epath
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import ckptmgr
from ckptmgr import CheckpointManager, CheckpointNotFoundError, CorruptCheckpointError, SaveError, best, latest
from ckptmgr.format import names
from ckptmgr.run import catalog, journal

TESTS = Path(__file__).parents[1]
"""Where a program that is given with -c finds the modules of the tests."""


def save(manager, *steps, value=None):
    for step in steps:
        manager.save(step, trainer.state(step if value is None else value)).result()
    manager.wait()


def opened(directory):
    return catalog.open_catalog(epath.Path(directory))


def set_aside(directory):
    return [sorted(branch.steps) for branch in opened(directory).branches()]


def values(directory):
    """What each listed step holds."""
    reader = CheckpointManager(directory, read_only=True)
    return {step: trainer.step_of(reader.restore(step, params=trainer.state(0)).params) for step in reader.steps()}


# ---------------------------------------------------------------- there and back


def test_there_and_back_again(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        save(manager, 40, 50, 90, 100)
        manager.rewind(50)
        assert manager.steps() == [40, 50]
        save(manager, 60, 100, value=7)
        manager.rewind(90)
        assert (manager.steps(), set_aside(tmp_path)) == ([40, 50, 90], [[60, 100], [100]])
        manager.rewind(100)  # of what was set aside last: what follows 90
        assert values(tmp_path) == {40: 40, 50: 50, 90: 90, 100: 100}
        manager.rewind(60)
        manager.rewind(100)
        assert values(tmp_path) == {40: 40, 50: 50, 60: 7, 100: 7}
        said = [event for event in journal.read(epath.Path(tmp_path)) if event["event"] == "rewound"]
        assert [said[0][each] for each in ("step", "from", "set_aside", "returned")] == [50, 100, [90, 100], []]


def test_a_branch_comes_back_with_the_steps_that_it_goes_on_from(tmp_path):
    """60 goes on from the first 50, which was set aside too: another 50 is listed by now."""
    with CheckpointManager(tmp_path) as manager:
        save(manager, 40, 50, 60)
        manager.rewind(50)
        manager.rewind(40)
        save(manager, 50, 55, value=7)
        assert set_aside(tmp_path) == [[60], [50]]
        manager.rewind(60)
        assert (values(tmp_path), set_aside(tmp_path)) == ({40: 40, 50: 50, 60: 60}, [[50, 55]])


def test_a_branch_comes_back_although_the_step_that_it_goes_on_from_was_deleted(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        save(manager, 40, 50, 60)
        manager.rewind(50)
        save(manager, 55)
        manager.delete(50)
        manager.rewind(60)
        assert (values(tmp_path), set_aside(tmp_path)) == ({40: 40, 60: 60}, [[55]])


@pytest.mark.soak
@pytest.mark.parametrize("newest", [70, 110][: counted(1, full=2)])
def test_after_a_crash_on_the_new_branch_it_goes_on_there_and_back_again(newest, tmp_path):
    with CheckpointManager(tmp_path) as manager:
        save(manager, 50, 80, 90, 100)
    program = (
        "import os, sys, ckptmgr, trainer\n"
        "manager = ckptmgr.CheckpointManager(sys.argv[1], keep=ckptmgr.latest(2))\n"
        "manager.rewind(50)\n"
        "for step in (60, int(sys.argv[2])):\n"
        "    manager.save(step, trainer.state(1000 + step)).result()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path, str(newest)], capture_output=True, text=True, cwd=TESTS
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    with CheckpointManager(tmp_path, keep=latest(2)) as manager:
        found = manager.restore_or(params=trainer.state(0))
        assert (found.resumed, found.step, trainer.step_of(found.params)) == (True, newest, 1000 + newest)
        manager.rewind(100)
        assert {step: value for step, value in values(tmp_path).items() if step > 50} == {80: 80, 90: 90, 100: 100}
        assert manager.restore_or(params=trainer.state(0)).step == 100
        manager.rewind(newest)
        assert values(tmp_path).items() >= {60: 1060, newest: 1000 + newest}.items()
        assert manager.restore_or(params=trainer.state(0)).step == newest


# ---------------------------------------------------------------- any order of it, against a few lines


class Tree(RuleBasedStateMachine):
    """`line[value]` is what was listed up to the step of a value when it was set aside: it comes back."""

    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.made, self.listed, self.aside, self.line = 0, {}, {}, {}
        self.step_of, self.gone, self.pinned = {}, set(), set()
        self.manager = CheckpointManager(self.directory)

    def teardown(self):
        self.manager.close()
        shutil.rmtree(self.directory)

    @rule(ahead=st.integers(1, 3))
    def save(self, ahead):
        step, self.made = max(self.listed, default=0) + ahead, self.made + 1
        self.manager.save(step, {"w": np.full((4, 4), self.made)}).result()
        self.manager.wait()
        self.listed[step], self.step_of[self.made] = self.made, step

    def after_rewind(self, value):
        """What is listed once the run goes on from a value."""
        step = self.step_of[value]
        if self.listed.get(step) == value:
            return {each: listed for each, listed in self.listed.items() if each <= step}
        return {each: kept for each, kept in self.line[value].items() if kept not in self.gone}

    def has_rewound(self, listed):
        for value in self.listed.values():
            self.line[value] = {each: low for each, low in self.listed.items() if each <= self.step_of[value]}
        everything = self.aside | {value: step for step, value in self.listed.items()}
        self.listed = listed
        self.aside = {value: step for value, step in everything.items() if value not in listed.values()}

    def choose(self, data):
        """A value that its number stands for: it is listed, or alone in having that number."""
        numbers = [*self.aside.values()]
        known = [
            value for value, step in self.aside.items() if step not in self.listed and numbers.count(step) == 1
        ]
        return data.draw(st.sampled_from([*self.listed.values(), *known]))

    @precondition(lambda self: self.listed)
    @rule(data=st.data())
    def rewind(self, data):
        value = self.choose(data)
        self.manager.rewind(self.step_of[value])
        self.has_rewound(self.after_rewind(value))

    @precondition(lambda self: self.listed)
    @rule(data=st.data(), turn=st.integers(1, 6))
    def crash(self, data, turn):
        """A move fails, and the next process finishes what was begun."""
        value = self.choose(data)
        with pytest.MonkeyPatch.context() as patch:
            faults.install(f"fail rename {turn}", patch.setattr)
            try:
                self.manager.rewind(self.step_of[value])
            except SaveError:
                assert max(self.manager.steps()) in (max(self.listed), self.step_of[value])
        self.reopen()
        self.has_rewound(self.after_rewind(value))

    @rule()
    def reopen(self):
        self.manager.close()
        self.manager = CheckpointManager(self.directory)

    @precondition(lambda self: self.listed)
    @rule(data=st.data())
    def delete(self, data):
        """The newest: if a step that others follow is deleted, its line is not known any more."""
        step = max(self.listed)
        if any(step in line and value in self.aside for value, line in self.line.items()):
            return
        self.manager.delete(step)
        value = self.listed.pop(step)
        self.gone.add(value)
        self.pinned.discard(value)

    @precondition(lambda self: self.listed)
    @rule(data=st.data())
    def pin(self, data):
        step = data.draw(st.sampled_from(sorted(self.listed)))
        self.manager.pin(step)
        self.pinned.add(self.listed[step])

    @invariant()
    def what_is_listed_is_what_is_expected(self):
        assert self.manager.steps() == sorted(self.listed)
        for step, value in self.listed.items():
            assert (self.manager.restore(step, params={"w": np.zeros((4, 4), int)}).params["w"] == value).all()
            assert (self.directory / str(step) / names.PIN).exists() == (value in self.pinned)

    @invariant()
    def nothing_is_lost(self):
        found = [step for branch in opened(self.directory).branches() for step in branch.steps]
        assert sorted(found) == sorted(self.aside.values())
        assert not (self.directory / names.REWINDING).exists()


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=counted(8, full=200), stateful_step_count=15)


# ---------------------------------------------------------------- killed at any moment


def _make(directory):
    """Three runs, what each is asked for, and what is then listed."""
    with CheckpointManager(directory / "leaves") as manager:
        save(manager, 50, 60, 90, 100)
    shutil.copytree(directory / "leaves", directory / "comes back")
    with CheckpointManager(directory / "comes back") as manager:
        manager.rewind(50)
        save(manager, 60, 70, value=7)
    shutil.copytree(directory / "leaves", directory / "comes back lower")
    with CheckpointManager(directory / "comes back lower") as manager:
        manager.rewind(50)
        save(manager, 60, 120, value=7)
    return {
        "leaves": (50, {50: 50}),
        "comes back": (100, {50: 50, 60: 60, 90: 90, 100: 100}),
        "comes back lower": (100, {50: 50, 60: 60, 90: 90, 100: 100}),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    return directory, _make(directory)


KILLED = """
import json, os, sys
import faults
from etils import epath
from ckptmgr.format import files
from ckptmgr.run import catalog, rewinding

for directory, step, fault, *how in json.load(sys.stdin):
    if not (child := os.fork()):
        if "no swap" in how:  # as on macOS
            files.exchange = lambda *_: False
        faults.install(fault)
        run = catalog.open_catalog(epath.Path(directory))
        run.rewind(rewinding.plan([run], step)[0])
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def kill(cases):
    """Rewinds each run in a process of its own, which has a fault; tells how each of them ended."""
    told = json.dumps(cases)
    done = subprocess.run(
        [sys.executable, "-c", KILLED], input=told, capture_output=True, text=True, check=True, cwd=TESTS
    )
    return list(map(int, done.stdout.split()))


MOMENTS = [
    *(f"{when} {point} 1" for when in ("before", "after") for point in ("plan", "exchange")),
    *(f"{when} rename {turn}" for turn in (1, 2, 3, 4) for when in ("before", "after")),
]
CASES = [
    (run, moment, how)
    for run in ("leaves", "comes back", "comes back lower")
    for how in ("swap", "no swap")
    for moment in MOMENTS
]
ABSENT = ("exchange 1", "rename 4")  # where three steps leave and none comes back


@pytest.mark.soak
def test_killed_at_any_moment_it_is_done_or_not_begun(runs, tmp_path):
    """Before it is finished, the newest step is the old one or the new one."""
    directory, expected = runs
    cases = CASES[:: counted(5, full=1)]
    for index, (run, *_) in enumerate(cases):
        shutil.copytree(directory / run, tmp_path / str(index))
    told = [(str(tmp_path / str(index)), expected[run][0], *rest) for index, (run, *rest) in enumerate(cases)]
    before_all = {run: values(directory / run) for run in expected}
    ended = dict(zip(cases, kill(told), strict=True))
    for index, (run, moment, how) in enumerate(cases):
        (step, after), before = expected[run], before_all[run]
        killed = tmp_path / str(index)
        is_reached = run != "leaves" or not moment.endswith(ABSENT)
        assert ended[run, moment, how] == (-signal.SIGKILL if is_reached else 0), (run, moment, how)
        found = CheckpointManager(killed, read_only=True).restore(params=trainer.state(0))
        assert found.step in (max(before), step), (run, moment, how)
        assert trainer.step_of(found.params) == (before | after)[found.step]
        CheckpointManager(killed).close()
        assert values(killed) == (before if moment == "before plan 1" else after), (run, moment, how)
        everything = sorted([*before, *(each for steps in set_aside(directory / run) for each in steps)])
        assert sorted([*values(killed), *(each for steps in set_aside(killed) for each in steps)]) == everything


# ---------------------------------------------------------------- in a bucket, and in the mirror

PLACES = ["gs", "s3"][: counted(1, full=2)]


@pytest.fixture(params=PLACES)
def place(request, servers):
    return f"{request.param}://bucket/{uuid.uuid4().hex}"


@pytest.mark.xdist_group("remote")
def test_in_a_bucket_retention_deletes_no_step_that_was_saved_anew_by_others(servers):
    run = f"gs://bucket/{uuid.uuid4().hex}/run"
    with CheckpointManager(run) as other, CheckpointManager(run, keep=best("loss")) as manager:
        for step in (1, 2):
            other.save(step, trainer.state(step), metrics={"loss": step}).result()
        manager.infos()
        other.delete(2)
        other.save(2, trainer.state(7), metrics={"loss": 0.1}).result()
        manager.save(3, trainer.state(3), metrics={"loss": 3})
        manager.wait()
        assert 2 in manager.steps()
        assert manager.best() == 2


@pytest.mark.xdist_group("remote")
def test_in_a_bucket_a_rewind_that_is_finished_late_leaves_alone_what_was_saved_since(servers):
    run = f"gs://bucket/{uuid.uuid4().hex}/run"
    with CheckpointManager(run) as manager:
        save(manager, 1, 2)
        plan = opened(run).plan_rewind(1)
        (epath.Path(run) / names.REWINDING).write_text(json.dumps(plan.moves))  # then its process was killed
        manager.delete(2)
        save(manager, 2, value=7)
    with CheckpointManager(run) as manager:
        assert values(run) == {1: 1, 2: 7}
    assert not (epath.Path(run) / names.REWINDING).exists()


@pytest.mark.soak
def test_in_a_bucket_there_and_back_again(place):
    with CheckpointManager(place) as manager:
        save(manager, 50, 60, 70)
        manager.pin(60)
        manager.rewind(50)
        assert (manager.steps(), set_aside(place)) == ([50], [[60, 70]])
        save(manager, 60, value=7)
        manager.rewind(70)
        assert (values(place), set_aside(place)) == ({50: 50, 60: 60, 70: 70}, [[60]])
        assert manager.info(60).pinned
        assert all(manager.verify(step) for step in manager.steps())
    assert CheckpointManager(place).steps() == [50, 60, 70]


IN_A_BUCKET = [
    f"{when} {point} {turn}"
    for point, turns in {"plan": 1, "move": 3, "copy": 3, "moved": 3}.items()
    for turn in range(1, turns + 1)
    for when in ("before", "after")
]


@pytest.mark.soak
def test_killed_at_any_moment_in_a_bucket_it_is_done_or_not_begun(place):
    """60 is listed and comes back: 70 comes first, the listed 60 leaves, the other 60 comes."""
    moments = ["after copy 2"] if counted(1, full=0) else IN_A_BUCKET
    runs = [f"{place}/{index}" for index in range(len(moments))]
    for run in runs:
        with CheckpointManager(run) as manager:
            save(manager, 50, 60, 70)
            manager.rewind(50)
            save(manager, 60, value=7)
    ended = kill([(run, 70, moment) for run, moment in zip(runs, moments, strict=True)])
    assert set(ended) == {-signal.SIGKILL}
    for run, moment in zip(runs, moments, strict=True):
        begun = moment != "before plan 1"
        seen = values(run)
        assert (max(seen), seen[max(seen)]) in ((60, 7), (70, 70)), moment
        CheckpointManager(run).close()
        assert values(run) == ({50: 50, 60: 60, 70: 70} if begun else {50: 50, 60: 7}), moment
        assert set_aside(run) == ([[60]] if begun else [[60, 70]]), moment
        assert all(CheckpointManager(run, read_only=True).verify(step) for step in values(run)), moment


def test_the_mirror_of_another_manager_goes_back_too(tmp_path):
    run, away = tmp_path / "run", tmp_path / "away"
    with ckptmgr.CheckpointManager(run, mirror=away) as manager, ckptmgr.CheckpointManager(run) as other:
        for step in (1, 2, 3):
            manager.save(step, trainer.state(step)).result()
        other.rewind(2)
        assert manager.restore().step == 2
        assert ckptmgr.CheckpointManager(away, read_only=True).steps() == [1, 2]
        other.rewind(3)
        assert ckptmgr.CheckpointManager(away, read_only=True).steps() == manager.steps() == [1, 2, 3]


@pytest.mark.soak
@pytest.mark.parametrize("where", ["disk", *PLACES[: counted(0, full=2)]])
def test_the_mirror_goes_back_too(where, tmp_path, request):
    away = tmp_path / "away"
    if where != "disk":
        request.getfixturevalue("servers")
        away = f"{where}://bucket/{uuid.uuid4().hex}"
    home = tmp_path / "home"
    with CheckpointManager(home, mirror=away, keep=2) as manager:
        for step in (50, 60, 90, 100):
            save(manager, step)
        assert (manager.steps(), sorted(values(away))) == ([90, 100], [50, 60, 90, 100])
        manager.rewind(50)  # which is in the mirror alone
        assert manager.restore_or(params=trainer.state(0)).step == 50
        save(manager, 60, 70, value=7)
        assert (values(home), values(away)) == ({60: 7, 70: 7}, {50: 50, 60: 7, 70: 7})
    shutil.rmtree(home)  # the disk is gone
    with CheckpointManager(home, mirror=away, keep=2) as manager:
        assert manager.restore_or(params=trainer.state(0)).step == 70
        manager.rewind(100)
        manager.wait()
        assert values(away) == {50: 50, 60: 60, 90: 90, 100: 100}
        assert manager.restore_or(params=trainer.state(0)).step == 100


def test_if_the_mirror_cannot_be_reached_nothing_is_changed(tmp_path):
    away = tmp_path / "away"
    with CheckpointManager(tmp_path / "home", mirror=away) as manager:
        save(manager, 50, 100)
        away.rename(tmp_path / "other")
        away.write_text("no directory")
        with pytest.raises(SaveError, match=r"step 50, and nothing is changed .*the mirror .*away cannot be used"):
            manager.rewind(50)
        assert (manager.steps(), set_aside(tmp_path / "home")) == ([50, 100], [])
        away.unlink()
        (tmp_path / "other").rename(away)
        manager.rewind(50)
        assert (values(tmp_path / "home"), values(away)) == ({50: 50}, {50: 50})


# ---------------------------------------------------------------- what it refuses


def test_a_step_that_is_nowhere_is_refused_with_what_there_is(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        save(manager, 1, 2, 3)
        manager.rewind(1)
        with pytest.raises(
            CheckpointNotFoundError, match=r"no step 4 in .*; the steps are 1, and .* aside are 2, 3"
        ):
            manager.rewind(4)
        assert manager.steps() == [1]


def test_a_damaged_step_is_refused_and_nothing_is_changed(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        save(manager, 1, 2, 3)
        file = next((tmp_path / "1").rglob("d/*"))
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(CorruptCheckpointError, match=r"step 1 is damaged, .* nothing is changed: .*params"):
            manager.rewind(1)
        assert (manager.steps(), set_aside(tmp_path)) == ([1, 2, 3], [])


def test_a_reader_and_a_closed_manager_refuse(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        save(manager, 1, 2)
    for each in (manager, CheckpointManager(tmp_path, read_only=True)):
        with pytest.raises(SaveError, match="step 1 cannot be rewound to: this manager is read-only or closed"):
            each.rewind(1)


def test_steps_with_names_of_others_are_refused_with_the_sentence_of_a_save(tmp_path):
    options = ocp.CheckpointManagerOptions(step_prefix="run")
    with ocp.CheckpointManager(tmp_path, options=options) as stock:
        for step in (1, 2):
            stock.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave({"w": np.ones(2)})))
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(
            SaveError, match=r"have names like run_\d\. ckptmgr reads such names and does not write"
        ):
            manager.rewind(1)
        assert manager.steps() == [1, 2]


def test_what_is_no_checkpoint_and_is_in_the_way_is_left_alone(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        save(manager, 1, 2)
        manager.rewind(1)
        (tmp_path / "2").mkdir()
        (tmp_path / "2" / "notes").write_text("mine")
        with pytest.raises(SaveError, match=r"step 2 does not come back: .*2 exists and is not a checkpoint"):
            manager.rewind(2)
        assert (tmp_path / "2" / "notes").read_text() == "mine"
        shutil.rmtree(tmp_path / "2")
        manager.rewind(2)
        assert values(tmp_path) == {1: 1, 2: 2}


def test_what_is_no_folder_of_ours_is_not_written_to(tmp_path):
    with CheckpointManager(tmp_path / "run") as manager:
        save(manager, 1, 2)
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "run" / names.ABANDONED).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(SaveError, match="abandoned is a symlink"):
            manager.rewind(1)
        assert (manager.steps(), visible(tmp_path / "elsewhere")) == ([1, 2], [])
    assert not (tmp_path / "run" / names.REWINDING).exists()


def test_an_empty_folder_in_the_place_of_a_step_that_comes_back_is_no_hindrance(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        save(manager, 1, 2, 3, 4)
        manager.rewind(1)
        save(manager, 2, value=7)
        (tmp_path / "3").mkdir()
        manager.rewind(4)
    assert values(tmp_path) == {1: 1, 2: 2, 3: 3, 4: 4}
    assert set_aside(tmp_path) == [[2]]


def test_a_rewind_that_failed_in_its_middle_ends_although_its_steps_were_saved_anew(tmp_path, nobody):
    manager = CheckpointManager(tmp_path)
    save(manager, 1, 2, 3, 4)
    manager.rewind(1)
    save(manager, 2, value=7)
    (branch,) = (tmp_path / names.ABANDONED).iterdir()
    (branch / "4").chmod(0o500)  # it cannot be moved
    nobody()
    if (tmp_path / "1").stat().st_uid == 0:
        pytest.skip("root may move everything")
    with pytest.raises(SaveError, match=r"the rewind to step 4 has failed: .*Permission denied.*Call it again"):
        manager.rewind(4)
    assert (tmp_path / names.REWINDING).exists()
    save(manager, 3, 4, value=8)
    manager.close()
    (branch / "4").chmod(0o700)
    with CheckpointManager(tmp_path) as manager:
        assert not (tmp_path / names.REWINDING).exists()
        assert values(tmp_path)[4] == 8
        assert 4 in set_aside(tmp_path)[0]
        manager.rewind(1)
        assert manager.steps() == [1]


PLANS = {
    "no JSON": "?",
    "no moves": '{"a": 1}',
    "a path outside": '[["../secret", "3", "00000000"]]',
    "a path of somebody": '[["notes", ".ckptmgr/abandoned/1-1-00000000/3", "00000000"]]',
    "a symlink to elsewhere": '[[".ckptmgr/abandoned/1-1-00000000/3", "3", "MARK"]]',
}


@pytest.mark.parametrize("what", PLANS)
def test_a_plan_that_no_rewind_wrote_moves_nothing(what, tmp_path, caplog):
    run = tmp_path / "run"
    with CheckpointManager(run) as manager:
        save(manager, 1, 2)
    for name in ("secret", "run/notes", "elsewhere/3"):
        (tmp_path / name).mkdir(parents=True)
    (run / names.ABANDONED).mkdir()
    (run / names.ABANDONED / "1-1-00000000").symlink_to(tmp_path / "elsewhere")
    mark = catalog.open_directory(epath.Path(run)).mark(f"{names.ABANDONED}/1-1-00000000/3")
    (run / names.REWINDING).write_text(PLANS[what].replace("MARK", mark))
    CheckpointManager(run).close()
    assert visible(run) == ["1", "2", "notes"]
    assert (tmp_path / "secret").exists()
    assert (tmp_path / "elsewhere" / "3").exists()


# ---------------------------------------------------------------- who goes by it


def test_retention_best_and_leftovers_leave_alone_what_was_set_aside(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(step, trainer.state(step), metrics={"loss": 1 / step}).result()
        manager.rewind(1)
    with CheckpointManager(tmp_path, keep=[latest(1), best("loss")]) as manager:
        assert manager.best() == 1
        for step in (2, 4):
            manager.save(step, trainer.state(7), metrics={"loss": step}).result()
        manager.wait()
        assert manager.steps() == [1, 4]
    assert set_aside(tmp_path) == [[2, 3]]
    assert [path.name for path, why in opened(tmp_path).leftovers() if "rewind" in why] == ["2", "3"]


class Asked:
    """A policy that says what it is told of the last save."""

    def __init__(self):
        self.last = []

    def should_save(self, step, *, now, last):
        self.last.append(last and last.step)
        return True


class AskedByOrbax(Asked):
    def should_save(self, step, previous_steps, *, context):
        self.last.append(previous_steps[-1].step if previous_steps else None)
        return True


@pytest.mark.parametrize("policy", [Asked, AskedByOrbax])
def test_policies_go_by_the_branch_that_is_live(policy, tmp_path, caplog):
    asked = policy()
    with CheckpointManager(tmp_path, save_every=asked, keep=2) as manager:
        save(manager, 50, 90, 100)
        manager.rewind(90)
        save(manager, 95)
        assert manager.steps() == [90, 95]
        assert asked.last == [None, 50, 90, 90]
        assert "was saved below" not in caplog.text


def test_every_seconds_counts_from_the_step_that_is_gone_back_to(tmp_path):
    now = [100.0]
    with CheckpointManager(tmp_path, save_every=ckptmgr.every_seconds(50), clock=lambda: now[0]) as manager:
        save(manager, 1)
        now[0] = 150
        save(manager, 2)
        now[0] = 160
        assert not manager.should_save(3)
        manager.rewind(1)
        assert manager.should_save(3)


def test_an_evaluator_sees_what_is_saved_after_the_run_went_back(tmp_path):
    with CheckpointManager(tmp_path, keep=2) as manager:
        watching = CheckpointManager(tmp_path, read_only=True).watch(timeout_s=60, poll_s=0.01)
        save(manager, 50, 90)
        assert [next(watching), next(watching)] == [50, 90]
        manager.rewind(50)
        save(manager, 60, value=7)
        assert next(watching) == 60
        save(manager, 90, value=7)
        assert next(watching) == 90


def test_an_evaluator_that_was_busy_meanwhile_sees_them_too(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        save(manager, 50, 60, 70)
        watching = CheckpointManager(tmp_path, read_only=True).watch(timeout_s=0.2, poll_s=0.01)
        assert [next(watching) for _ in range(3)] == [50, 60, 70]
        manager.rewind(50)
        save(manager, 60, 70, 80, value=7)
        assert list(watching) == [60, 70, 80]


def test_a_callback_may_rewind(tmp_path):
    def go_back(info):
        if info.metrics["loss"] > 1:
            manager.rewind(1)

    with CheckpointManager(tmp_path, keep=2, on_commit=go_back) as manager:
        for step, loss in ((1, 0.5), (2, 0.4), (3, 9.0), (4, 0.3)):
            manager.save(step, trainer.state(step), metrics={"loss": loss})
            manager.wait()
    assert (values(tmp_path), set_aside(tmp_path)) == ({1: 1, 4: 4}, [[2, 3]])


def test_a_save_in_progress_is_waited_for(tmp_path, monkeypatch):
    with CheckpointManager(tmp_path) as manager:
        save(manager, 1)
        monkeypatch.setattr(faults, "SLOW_S", 0.5)
        faults.install("slow publish 1", monkeypatch.setattr)
        manager.save(2, trainer.state(2))
        manager.rewind(1)
        assert (manager.steps(), set_aside(tmp_path)) == ([1], [[2]])


def test_a_process_that_is_killed_before_it_records_a_save_causes_no_advice_to_rewind(tmp_path, caplog):
    with CheckpointManager(tmp_path) as manager:
        save(manager, 50, 90)
    journal = tmp_path / ".ckptmgr" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"step": 90' not in line and '"step":90' not in line))
    assert len(journal.read_text()) < sum(map(len, lines))
    with CheckpointManager(tmp_path) as manager:
        assert manager.restore_or(params=trainer.state(0)).step == 90
    assert "rewind" not in caplog.text


def test_without_a_rewind_the_save_and_the_next_start_say_what_is_meant(tmp_path, caplog):
    with CheckpointManager(tmp_path, keep=2) as manager:
        save(manager, 50, 90, 100)
        manager.restore(90, params=trainer.state(0))
        save(manager, 95, 97)
        assert manager.steps() == [97, 100]
    assert caplog.text.count("step 95 was saved below the newest step 100") == 1
    assert "manager.rewind(95)" in caplog.text
    caplog.clear()
    with CheckpointManager(tmp_path, keep=2) as manager:
        assert manager.restore_or(params=trainer.state(0)).step == 100
        assert "step 100 is restored, which has the highest number, and step 97 was saved after it" in caplog.text
        assert "manager.rewind(97)" in caplog.text
        manager.rewind(97)
        caplog.clear()
        assert manager.restore_or(params=trainer.state(0)).step == 97
        save(manager, 98)
        manager.restore(params=trainer.state(0))
        assert not caplog.records
