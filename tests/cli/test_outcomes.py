"""What each command does with wrong arguments, wrong directories, a run that is being written, a closed pipe.

`pytest -s tests/cli/test_outcomes.py` prints the table. A new command needs a row in `ROWS`.
"""

import itertools
import json
import os

import api_names
import jax.numpy as jnp
import pytest
import terminal

import ckptmgr
from ckptmgr import interop
from ckptmgr.cli import app as command_line

ROWS = {
    # the right words, where {run} is a run, {free} a new file and {file} a file of params
    "ls": ["{run}"],
    "show": ["{run}@2"],
    "diff": ["{run}@1", "{run}@2"],
    "verify": ["{run}"],
    "report": ["{run}", "-o", "{free}.html"],
    "doctor": ["{run}"],
    "keep": ["{run}", "--policy", "latest:1"],
    "rm": ["{run}", "1"],
    "gc": ["{run}"],
    "rewind": ["{run}@1"],
    "pin": ["{run}@1"],
    "unpin": ["{run}@1"],
    "distrust": ["{run}@1", "--why", "a test"],
    "trust": ["{run}@1"],
    "export": ["{run}", "{free}.npz"],
    "average": ["{run}", "--last", "2", "-o", "{free}.npz"],
    "import": ["{run}", "--params", "{file}", "--step", "9"],
}
COMMANDS = {each.name or each.callback.__name__: each for each in command_line.app.registered_commands}
ASKING = ("keep", "rm", "gc", "rewind")
WRITING = (*ASKING, "pin", "unpin", "distrust", "trust", "import")
"""These need the right to write into the run."""
OPTIONAL = ("doctor",)
"""These need no arguments."""
TABLE, NEW = {}, itertools.count()

pytestmark = pytest.mark.xdist_group("terminal")  # one process that forks


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("outcomes")
    with ckptmgr.CheckpointManager(place / "runs" / "digits") as manager:
        for step in (1, 2, 3):
            manager.save(step, {"w": jnp.ones(3)}, metrics={"loss": 1 / step})
    left = place / "runs" / "digits" / ".ckptmgr" / "saving" / "4"
    left.mkdir()
    (left / "file").write_bytes(b"x" * 10)
    interop.write({"w": jnp.ones(3)}, place / "params.npz")
    return place


def words(name, made, run="runs/digits"):
    named = {"run": made / run, "free": made / f"new{next(NEW)}", "file": made / "params.npz"}
    return [name, *(word.format(**named) for word in ROWS[name])]


def noted(name, situation, code, said):
    TABLE.setdefault(name, {})[situation] = (code, " ".join(said.split()))
    assert "Traceback" not in said, said
    assert api_names.found_in(said) == [], said


def as_json(out):
    """All that is printed is one JSON value."""
    return json.loads(out)


def state(run):
    return sorted((str(path), path.stat().st_mtime_ns) for path in run.rglob("*"))


def test_every_command_has_a_row():
    assert sorted(ROWS) == sorted(COMMANDS)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_wrong_arguments(name, made):
    if name not in OPTIONAL:
        code, out, err = terminal.here(name)
        noted(name, "no arguments", code, err)
        assert (code, out) == (2, "")
        assert f"See ckptmgr {name} --help" in err
    code, out, _ = terminal.here(*words(name, made), "--jsom", "--json")
    found = as_json(out)
    noted(name, "a wrong option", code, found["message"])
    assert (code, found["error"]) == (2, "UsageError")
    assert "there is no option --jsom; did you mean --json? See" in found["message"]


@pytest.mark.parametrize("name", sorted(ROWS))
def test_wrong_directories(name, made):
    before = state(made)
    near = {"doctor": "there is no directory"}.get(name, "did you mean")
    for run, said in {
        "runs/digts": near, "runs": "it holds the run digits", "params.npz": "params.npz", "runs/digits/7": "7"
    }.items():  # fmt: skip
        line = words(name, made, run)
        if (name, run) == ("doctor", "runs"):
            continue  # it measures any directory
        makes_it = (name, run) == ("import", "runs/digts")
        code, out, _ = terminal.here(*line, "--json", *["--dry-run"] * makes_it)
        found = as_json(out)
        noted(name, f"{run} as RUN", code, found.get("message", "would make the run"))
        assert code == (0 if makes_it else 2), out
        assert makes_it or said in found["message"], found
    assert state(made) == before


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_run_that_is_being_written_to(name, made):
    run = made / "runs" / "digits"
    with ckptmgr.CheckpointManager(run):
        (run / ".ckptmgr" / "saving" / "4").mkdir(exist_ok=True)
        (run / ".ckptmgr" / "saving" / "4" / "file").write_bytes(b"x" * 10)
        before = state(run)
        done = terminal.piped(*words(name, made), *["--yes"] * (name in ASKING), "--json")
        assert name == "doctor" or state(run) == before  # it measures the disk in .ckptmgr/
    found = as_json(done.out)
    if name in WRITING:
        noted(name, "being written to", done.code, found["message"])
        assert (done.code, found["error"]) == (3, "SaveError")
        assert f"is being written to by process {os.getpid()}" in found["message"]
    else:
        noted(name, "being written to", done.code, "does it")
        assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_closed_pipe(name, made):
    done = terminal.piped(*words(name, made), *["--dry-run"] * (name in WRITING), is_closed=True)
    noted(name, "a closed pipe", done.code, done.err)
    assert (done.code, done.err) == (141, "")


@pytest.mark.parametrize("name", ASKING)
def test_without_a_terminal_and_without_yes_nothing_is_changed(name, made):
    before = state(made)
    code, out, err = terminal.here(*words(name, made))
    noted(name, "no terminal, no --yes", code, err)
    assert (code, out) == (2, "")
    assert "this would " in err
    assert "nothing was changed. Add --yes to do it" in err
    code, out, _ = terminal.here(*words(name, made), "--json")
    assert (code, as_json(out)["error"]) == (2, "NotConfirmedError")
    code, _, _ = terminal.here(*words(name, made), "--dry-run")
    assert code == 0
    assert state(made) == before


def test_what_changes_something_has_a_dry_run_and_changes_nothing(made):
    before = state(made)
    for name in (*WRITING, "export", "average"):
        code, out, err = terminal.here(*words(name, made), "--dry-run", "--json")
        assert code == 0, (name, err, out)
        as_json(out)
    assert state(made) == before


def test_the_table_is_printed():
    """The last test of this file; `-s` shows it."""
    for name, found in TABLE.items():
        for situation, (code, said) in found.items():
            print(f"| `{name}` | {situation} | {code} | {said} |")
    assert TABLE or os.environ.get("PYTEST_XDIST_WORKER")
