"""The commands, each in a process of its own, as `ckptmgr ...` is when a person types it."""

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest
import terminal
import typer.testing
import warm
from etils import epath
from jax.example_libraries import optimizers as example_libraries

import ckptmgr
from ckptmgr.cli import doctor, facts, places, tables
from ckptmgr.cli.app import app, outcome
from ckptmgr.testing import assert_trees_equal

COMMAND = ["-c", "from ckptmgr.cli import main; main()"]
OPTIMIZER = optax.adam(1e-2)
PARAMS = optimizers.PARAMS


def typed(*words):
    done = terminal.piped(*words)
    return done.code, done.out, done.err


def ok(*words):
    code, out, err = typed(*words)
    assert code == 0, out + err
    assert "" not in err.splitlines()  # which a bar would leave that nobody has seen
    return out


def answer(*words):
    return json.loads(ok(*words, "--json"))


@pytest.fixture
def runs(tmp_path):
    """A run of three steps, kept by two policies, and one whose second step is damaged."""
    for name in ("good", "bad"):
        keep = [ckptmgr.latest(2), ckptmgr.best("loss")]
        with ckptmgr.CheckpointManager(tmp_path / name, keep=keep) as manager:
            for step, loss in ((1, 0.1), (2, 0.5), (3, float("nan"))):
                params = jax.tree.map(lambda leaf, step=step: leaf * step, PARAMS)
                manager.save(step, params, OPTIMIZER.init(params), metrics={"loss": loss})
    (tmp_path / "bad" / "2" / "manifest.json").write_bytes(b"")
    return tmp_path


def test_ls(runs):
    out = ok("ls", runs / "good")
    assert re.search(r"^ +1 .* 0.1  best loss$", out, re.MULTILINE)
    assert re.search(r"^ +3 .* nan  latest 2, newest$", out, re.MULTILINE)
    found = answer("ls", runs / "good")
    assert [row["step"] for row in found["steps"]] == [1, 2, 3]
    assert found["keep"] == ["latest:2", "best:loss:min:1"]
    assert found["steps"][0]["kept"] == ["best:loss:min:1"]
    assert found["steps"][2]["metrics"] == {"loss": "nan"}
    assert "DAMAGED" in ok("ls", runs / "bad")


def test_what_is_no_checkpoint_is_told_once_by_ls_and_doctor(runs):
    run = runs / "good"
    assert facts.left_alone(epath.Path(run)) == {"count": 0, "names": []}
    names = ["2024", "[bold]", "a\nb", "\udcff", "x" * 200, *(f"y{n}" for n in range(7))]
    for name in names:
        (run / name).mkdir()
    told = facts.run(ckptmgr.CheckpointManager(run, read_only=True))["left_alone"]
    assert told["count"] == 12
    shown = "2024, [bold], 'a\\nb', " + "x" * 60 + "..., y0, y1, y2, y3, y4, y5"
    assert ", ".join(told["names"]) == shown
    assert ok("ls", run).count(f"not checkpoints, left alone: {shown}, and 2 more\n") == 1
    found = facts.left_alone(epath.Path(run))
    assert doctor._left_alone(epath.Path(run), []) == found == told
    assert doctor._left_alone(epath.Path(runs), []) is None  # no run
    assert "[bold]" in str(tables._left_alone({"left_alone": found})[0])


def test_show(runs):
    out = ok("show", runs / "good", 3)
    assert "['w']  float32[4,3]  48 B" in out
    assert ".mu" in out
    found = answer("show", runs / "good")
    assert found["step"] == 3
    assert found["nbytes"] == sum(leaf["nbytes"] for leaves in found["items"].values() for leaf in leaves)
    leaf = {
        "path": "['head']['w']",
        "shape": [3],
        "dtype": "float32",
        "kind": "jax",
        "sharding": None,
        "nbytes": 12,
    }
    assert leaf in found["items"]["params"]


def test_diff(runs):
    code, out, _ = typed("diff", f"{runs}/good@1", f"{runs}/good/3", "--values")
    assert code == 1
    assert "params['head']['w']" in out
    code, out, _ = typed("diff", f"{runs}/good@1", f"{runs}/good@3", "--values", "--json")
    values = {row["path"]: row["largest_change"] for row in json.loads(out)["values"]}
    assert values == {"params['dense']['w']": 2.0, "params['head']['w']": 4.0}
    assert answer("diff", f"{runs}/good@1", f"{runs}/good@3")["equal"]  # in structure
    with ckptmgr.CheckpointManager(runs / "other") as manager:
        manager.save(1, {"dense": {"w": jnp.ones(3)}, "more": np.ones(2)})
    code, out, _ = typed("diff", runs / "good", runs / "other")
    assert code == 1
    assert "! params['dense']['w']  float32[4,3] in the first, float32[3] in the second" in out
    assert "+ params['more']  only in the second" in out


def here(*words):
    """As `run`, in this process: what is printed, or the text of the error."""
    done = typer.testing.CliRunner().invoke(app, list(map(str, words)))
    return done.output if done.exception is None or isinstance(done.exception, SystemExit) else str(done.exception)


@pytest.mark.parametrize(
    "place", [("{}@2",), ("{}/2",), ("{}/2/",), ("{}", "2")], ids=["RUN@STEP", "RUN/STEP", "RUN/STEP/", "RUN STEP"]
)
def test_every_command_takes_a_step_in_each_form(runs, place):
    step = [each.format(runs / "good") for each in place]

    def told(*words):
        return json.loads(here(*words, "--json"))

    assert told("show", *step)["step"] == 2
    assert [each["step"] for each in told("verify", *step)] == [2]
    assert told("diff", *step, f"{runs}/good@3")["equal"]
    assert told("diff", f"{runs}/good@3", *step)["equal"]
    assert told("pin", *step) == {"run": str(runs / "good"), "pinned": 2}
    assert told("unpin", *step)["unpinned"] == 2
    assert told("distrust", *step, "--why", "a test")["distrusted"] == 2
    assert told("trust", *step)["trusted"] == 2
    assert told("rewind", *step, "--dry-run")["set_aside"] == [3]
    assert told("rm", *step, "--yes") == {"run": str(runs / "good"), "steps": [2], "deleted": True}


def test_of_what_names_no_step_it_is_said_what_is_wrong(runs):
    good = runs / "good"
    assert (
        here("pin", f"{good}@abc")
        == f"{good}@abc: 'abc' is not the number of a step; write RUN@STEP, as in {good}@100"
    )
    assert "'' is not the number of a step" in here("show", f"{good}@")
    assert here("pin", f"{good}@1", 2) == f"{good}@1 names step 1, and 2 is another step: name one"
    for command in ("pin", "unpin", "rm", "trust", "rewind"):
        assert here(command, good) == f"say which step this is: {good}@STEP"
    assert here("distrust", f"{good}@1") == 'say why the step is distrusted: --why "the loss is NaN"'
    assert "diff needs two checkpoints, not 3" in here("diff", good, 1, 2, 3)
    assert "there is no step 9" in here("show", f"{good}@9")
    (runs / "a@b").mkdir()
    with ckptmgr.CheckpointManager(runs / "a@b" / "run") as manager:
        manager.save(7, PARAMS)
    assert json.loads(here("show", runs / "a@b" / "run", "--json"))["step"] == 7
    (runs / "a@b" / "run").rename(runs / "run@3")  # a run may have such a name
    assert json.loads(here("show", runs / "run@3", "--json"))["step"] == 7


def test_a_number_after_a_run_is_its_step_unless_it_is_a_run(runs, monkeypatch):
    monkeypatch.chdir(runs)
    assert places.two(["good", "1", "3"]) == [("good", 1), ("good", 3)]
    assert places.two(["good", "1", "bad", "3"]) == [("good", 1), ("bad", 3)]
    assert places.two(["good@1", "3"]) == [("good", 1), ("good", 3)]
    (runs / "good").rename(runs / "5")
    assert places.two(["bad", "5"]) == [("bad", None), ("5", None)]
    assert places.two(["5", "1", "bad/3"]) == [("5", 1), ("bad", 3)]
    monkeypatch.chdir(runs / "bad")
    assert places.two(["1", "3"]) == [(".", 1), (".", 3)]


def test_verify(runs):
    assert ok("verify", runs / "good", "--all").count("whole") == 3
    code, out, _ = typed("verify", runs / "bad", "--all")
    assert (code, out.count("whole"), out.count("DAMAGED")) == (1, 2, 1)
    code, out, _ = typed("verify", runs / "bad", 2, "--json")
    assert code == 1
    assert json.loads(out)[0]["damages"][0]["where"] == "manifest.json"


def test_pin_unpin_rm_and_keep(runs):
    good = runs / "good"
    ok("pin", good, 2)
    assert answer("ls", good)["steps"][1]["pinned"]
    found = answer("keep", good, "--policy", "latest:1", "--dry-run")
    assert (found["would_delete"], found["deleted"]) == ([1], [])
    assert found["steps"][1]["kept"] == ["pinned"]
    ok("unpin", good, 2)
    assert "would be deleted: 1, 2" in ok("rm", good, 1, 2, "--dry-run")
    assert len(answer("ls", good)["steps"]) == 3
    assert answer("keep", good, "--policy", "best:loss", "--policy", "every_steps:3", "--yes")["deleted"] == [2]
    ok("rm", good, 1, "--yes")
    assert [row["step"] for row in answer("ls", good)["steps"]] == [3]
    code, _, err = typed("rm", good, 3, 7, "--yes", "--force")
    assert (code, "there is no step 7" in err) == (2, True)
    assert len(answer("ls", good)["steps"]) == 1  # nothing was deleted


def test_keep_makes_milestones_and_ls_show_and_the_report_say_so(tmp_path):
    run = tmp_path / "run"
    with ckptmgr.CheckpointManager(run) as manager:
        for step in (10, 15, 20):
            manager.save(step, PARAMS, OPTIMIZER.init(PARAMS))
    asked = ["keep", run, "--policy", "latest:1", "--policy", "params-only:every_steps:10"]
    out = ok(*asked, "--dry-run")
    assert "would be deleted: 15" in out
    assert "would be reduced to their params: 10" in out
    assert (run / "10" / "opt_state").exists()
    found = answer(*asked, "--yes")
    assert (found["deleted"], found["reduced"]) == ([15], [10])
    assert not (run / "10" / "opt_state").exists()
    assert "nothing to delete" in ok(*asked)
    said = "reduced to its params by params-only:every_steps:10"
    assert [bool(row["reduced"]) for row in answer("ls", run)["steps"]] == [True, False]
    assert said in ok("ls", run)
    assert said in ok("show", run, 10)
    assert answer("show", run, 10)["reduced"].startswith(said)
    ok("report", run, "-o", tmp_path / "report.html")
    assert "reduced to its params" in (tmp_path / "report.html").read_text()
    assert (run / ".ckptmgr" / "journal.jsonl").read_text().count('"event": "reduced", "step": 10') == 1


def test_gc(runs):
    left = runs / "good" / ".ckptmgr" / "saving" / "4"
    left.mkdir()
    (left / "file").write_bytes(b"x" * 1000)
    aside = runs / "good" / ".ckptmgr" / "damaged" / "1-5"
    aside.mkdir(parents=True)
    assert "would be removed: 1.0 kB" in ok("gc", runs / "good", "--dry-run")
    assert left.exists()
    ok("gc", runs / "good", "--yes")
    assert not left.exists()
    assert aside.exists()
    ok("gc", runs / "good", "--yes", "--damaged")
    assert not aside.exists()
    assert answer("gc", runs / "good")["leftovers"] == []


def test_rewind_and_what_gc_says_of_it(runs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")

    good = runs / "good"
    assert here("rewind", good, 1, "--dry-run").splitlines() == [
        "the run would go on from step 1",
        "set aside: 2, 3",
    ]
    assert json.loads(here("rewind", good, 1, "--yes", "--json"))["set_aside"] == [2, 3]
    assert ckptmgr.CheckpointManager(good, read_only=True).steps() == [1]
    assert "the steps are 1, and the steps that were set aside are 2, 3" in here("rewind", good, 4, "--yes")
    kept = json.loads(here("gc", good, "--yes", "--json"))["leftovers"]
    assert ["`rewind` to one of these steps brings it back" in each["why"] for each in kept] == [True, True]
    assert "came back: 2" in here("rewind", good, 2, "--yes")
    (left,) = json.loads(here("gc", good, "--yes", "--abandoned", "--json"))["leftovers"]
    assert (left["path"].rpartition("/")[2], left["goes"], left["nbytes"] > 0) == ("3", True, True)
    assert json.loads(here("gc", good, "--json"))["leftovers"] == []


def test_a_rewind_names_a_mirror_that_it_leaves_and_copies_nothing_to_one_that_it_rewinds(tmp_path):
    run, away = tmp_path / "run", tmp_path / "away"
    with ckptmgr.CheckpointManager(run, mirror=away, mirror_keep=1) as manager:
        for step in (1, 2, 3, 4):
            manager.save(step, {"w": np.full(3, step)}).result()
            manager.wait()
    said = here("rewind", run, 4, "--dry-run", "--json")
    assert f"{run} has a mirror, which stays as it is" in said
    assert f"Give --mirror {away}" in said
    assert "has a mirror" not in here("rewind", run, 2, "--mirror", away, "--yes")
    with ckptmgr.CheckpointManager(run, mirror=away) as manager:
        assert manager.restore().step == 2
    aside = [each.name.partition("-")[0] for each in (away / ".ckptmgr" / "abandoned").glob("*/*")]
    assert "1" not in aside


@pytest.mark.parametrize("option", [("--step", "3"), ("--skip", "rng"), ("--allow", "numpy.arange")])
def test_options_about_a_file_are_refused_without_one(option, runs):
    assert f"{option[0]} is about a file, and none is given" in here("import", runs / "good", *option)


def test_what_another_process_writes_to_is_not_touched(runs):
    with ckptmgr.CheckpointManager(runs / "good"):
        code, _, err = typed("rm", runs / "good", 1, "--yes")
    assert code == 3
    assert f"is being written to by process {os.getpid()}" in err
    assert (runs / "good" / "1").exists()


def test_export(runs):
    out = answer("export", runs / "good", runs / "model.safetensors", "--step", 2)
    assert out["files"] == [str(runs / "model.safetensors")]
    found = ckptmgr.interop.read(runs / "model.safetensors")
    assert_trees_equal(found, jax.tree.map(lambda leaf: np.asarray(leaf * 2), PARAMS))
    ok("export", runs / "good", runs / "stock")
    assert_trees_equal(ckptmgr.interop.read(runs / "stock")["head"], {"w": np.asarray(PARAMS["head"]["w"] * 3)})
    code, _, err = typed("export", runs / "good", runs / "x.npz", "--item", "weights")
    assert (code, "has no weights; it has params, opt_state" in err) == (2, True)


def test_average(tmp_path):
    run = tmp_path / "run"
    with ckptmgr.CheckpointManager(run) as manager:
        for step in (1, 2, 3, 4):
            params = {"w": jnp.full(5, step, jnp.bfloat16), "shape": (2, 3), "b": jnp.full(2, float(step))}
            manager.save(step, params, {"count": step})
        manager.wait()
        manager.distrust(3, "a test")
    assert answer("average", run, "--last", 2, "-o", tmp_path / "a.npz")["steps"] == [2, 4]
    found = ckptmgr.interop.read(tmp_path / "a.npz")
    assert (found["w"].dtype, found["w"].tolist(), found["b"].tolist()) == (jnp.bfloat16, [3.0] * 5, [3.0] * 2)
    assert [int(found["shape"][key]) for key in ("0", "1")] == [2, 3]
    assert "wrote" in ok("average", run, "--steps", "4,1", "-o", tmp_path / "b.safetensors")
    assert ckptmgr.interop.read(tmp_path / "b.safetensors")["b"].tolist() == [2.5, 2.5]
    assert "the mean of params of steps 1, 2, 4 to" in ok(
        "average", run, "--last", 3, "-o", tmp_path / "c.npz", "--dry-run"
    )
    assert not (tmp_path / "c.npz").exists()
    code, _, err = typed("average", run, "--last", 2, "-o", tmp_path / "c.npz", "--item", "opt_state")
    assert (code, "opt_state['count'] is no floating point number" in err) == (2, True)


def test_an_item_is_read_alone_as_it_is_read_with_all_others(tmp_path):
    """Also what JAX holds in 64 bits only where it is told so, as the process that saved it was."""
    program = (
        "import jax; jax.config.update('jax_enable_x64', True)\n"
        "import sys, ckptmgr, numpy as np, jax.numpy as jnp\n"
        "tree = {'wide': jnp.arange(3.0), 'n': 3, 'x': 0.5, 's': np.float32(1)}\n"
        "tree['t'] = jnp.ones(2, jnp.bfloat16), [None]\n"
        "with ckptmgr.CheckpointManager(sys.argv[1]) as manager:\n"
        "    extras = {'ema': tree, 'json': {'a': 'b'}}\n"
        "    manager.save(1, tree | {'key': jax.random.key(0)}, {'mu': tree}, extras=extras)\n"
    )
    assert warm.run(["-c", program, tmp_path / "run"]).returncode == 0
    manager = facts.reader(str(tmp_path / "run"))
    together = facts.items(manager, 1)
    assert together["params"]["wide"].dtype == np.float64
    for name, tree in together.items():
        alone = facts.items(manager, 1, name)[name]
        assert jax.tree.map(type, alone) == jax.tree.map(type, tree)
        assert_trees_equal(alone, tree)
    shutil.rmtree(tmp_path / "run" / "1" / "opt_state")  # which is not read
    ok("export", tmp_path / "run@1", tmp_path / "ema.npz", "--item", "ema")
    assert ckptmgr.interop.read(tmp_path / "ema.npz")["wide"].dtype == np.float64


def trained(steps, params, opt_state):
    _, _, train_step = optimizers.optax_run(OPTIMIZER)
    for step in range(1, steps + 1):
        params, opt_state = train_step(params, opt_state, step)
    return params, opt_state


def test_optax_params_and_state_in_two_pickles_are_imported_and_go_on_bit_for_bit(tmp_path):
    params, opt_state = trained(3, PARAMS, OPTIMIZER.init(PARAMS))
    for name, tree in (("params", params), ("opt_state", opt_state)):
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(tree))
    files = ("--params", tmp_path / "params.pkl", "--opt-state", tmp_path / "opt_state.pkl")
    assert "step 3 saved" in ok("import", tmp_path / "run", *files, "--step", 3)
    found = ckptmgr.CheckpointManager(tmp_path / "run").restore(params=PARAMS, optimizer=OPTIMIZER)
    assert_trees_equal(trained(2, found.params, found.opt_state), trained(2, params, opt_state))


def test_a_dict_of_both_with_a_step_is_imported_and_goes_on_bit_for_bit(tmp_path):
    params, opt_state = trained(4, PARAMS, OPTIMIZER.init(PARAMS))
    state = {"params": params, "opt_state": opt_state, "step": 4}
    (tmp_path / "state.pkl").write_bytes(pickle.dumps(state))
    ok("import", tmp_path / "run", tmp_path / "state.pkl")
    found = ckptmgr.CheckpointManager(tmp_path / "run").restore(params=PARAMS, opt_state=OPTIMIZER.init(PARAMS))
    assert found.step == 4
    assert_trees_equal(trained(2, found.params, found.opt_state), trained(2, params, opt_state))


def test_the_state_of_example_libraries_is_imported_and_goes_on_bit_for_bit(tmp_path):
    init, update, get_params = example_libraries.adam(1e-2)

    def go_on(state, steps):
        for step in steps:
            state = update(step, optimizers.gradient(get_params(state), step), state)
        return state

    state = go_on(init(PARAMS), range(3))
    (tmp_path / "opt_state.pkl").write_bytes(pickle.dumps(state))
    ok("import", tmp_path / "run", "--opt-state", tmp_path / "opt_state.pkl", "--step", 2)
    found = ckptmgr.CheckpointManager(tmp_path / "run").restore(opt_state=init(PARAMS))
    assert_trees_equal(go_on(found.opt_state, range(3, 6)), go_on(state, range(3, 6)))


def test_every_entry_of_a_file_is_imported_and_said_and_skipped_only_if_asked(tmp_path):
    state = {
        "params": PARAMS,
        "opt_state": OPTIMIZER.init(PARAMS),
        "batch_stats": {"mean": jnp.ones(3)},
        "epoch": 2,
    }
    state |= {"rng": jax.random.PRNGKey(3), "metrics": {"loss": 0.5}}
    (tmp_path / "checkpoint_9120").write_bytes(flax.serialization.to_bytes(state))
    said = ok("import", tmp_path / "run", tmp_path / "checkpoint_9120")
    where = (
        f"step 9120 saved in {tmp_path / 'run'}: params, opt_state; extras batch_stats, epoch, rng; metrics loss"
    )
    assert where in said.replace("\n", "")
    found = ckptmgr.CheckpointManager(tmp_path / "run").restore(params=PARAMS, optimizer=OPTIMIZER)
    assert_trees_equal((found.params, found.opt_state), (PARAMS, state["opt_state"]))
    told = answer("import", tmp_path / "run 2", tmp_path, "--step", 9120, "--skip", "rng", "--skip", "epoch")
    assert (told["items"], told["metrics"]) == (["params", "opt_state", "batch_stats"], ["loss"])


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "params.pkl").write_bytes(b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    code, _, err = typed("import", tmp_path / "run", "--params", tmp_path / "params.pkl", "--step", 1)
    assert code == 3
    assert "the pickle uses posix.system" in err
    assert not marker.exists()


def test_doctor(tmp_path):
    found = answer("doctor", tmp_path)
    assert found["versions"]["jax"] == jax.__version__
    assert found["storage"]["write_bytes_per_s"] > 0
    assert found["warnings"] == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".ckptmgr").symlink_to(tmp_path / "elsewhere")  # it writes nowhere else
    code, out, _ = typed("doctor", tmp_path, "--json")
    assert (code, "is a symlink" in json.loads(out)["storage"]["error"]) == (1, True)


def test_what_is_not_there_and_what_is_wrong_is_said_in_one_line(tmp_path):
    code, out, err = typed("ls", tmp_path / "nothing")
    assert (code, out) == (2, "")
    assert err == f"ckptmgr: there is no run in {tmp_path / 'nothing'}\n"
    assert not (tmp_path / "nothing").exists()
    code, out, _ = typed("ls", tmp_path / "nothing", "--json")
    assert (code, json.loads(out)["error"]) == (2, "CheckpointNotFoundError")
    code, _, err = typed("keep", tmp_path, "--policy", "newest:3")
    assert (code, "unknown policy 'newest:3'; known are latest:N" in err) == (2, True)


COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]


def test_every_command_is_on_the_page():
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    assert len(COMMANDS) > 12
    for command in COMMANDS:
        assert re.search(rf"^\| .*`{command}[ `]", page, re.MULTILINE), command


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    shown = typer.testing.CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0
    assert f"ckptmgr {command} " in shown.output.partition("Example")[2]


def test_without_the_extra_it_says_what_to_install(tmp_path):
    (tmp_path / "typer.py").write_text("raise ImportError('no typer', name='typer')")
    done = subprocess.run(
        [sys.executable, *COMMAND, "ls", tmp_path], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "the command line needs typer: pip install 'ckptmgr[cli]'\n"


def test_the_command_is_installed():
    assert (Path(sys.executable).parent / "ckptmgr").exists()


@pytest.mark.parametrize(("lasts_s", "is_seen"), [(1.6, True), (0, False)])
def test_what_takes_longer_than_a_second_shows_a_bar_on_a_terminal(lasts_s, is_seen):
    program = (
        "import sys, time\n"
        "from ckptmgr.cli.working import working\n"
        "with working('verifying') as told:\n"
        "    told(20_000_000, 100_000_000)\n"
        "    time.sleep(0.1)\n"
        "    told(50_000_000, 100_000_000)\n"
        "    time.sleep(float(sys.argv[1]))\n"
    )
    ours, theirs = os.openpty()
    shown = subprocess.Popen(
        [sys.executable, "-c", program, str(lasts_s)], stderr=theirs, env=os.environ | {"TERM": "xterm"}
    )
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # Linux's word for the end of a terminal
        while read := os.read(ours, 4096):
            said += read
    os.close(ours)
    assert shown.wait() == 0
    assert (b"verifying" in said, b"50% of 100.0 MB, " in said, b"MB/s" in said) == (is_seen,) * 3, said


def test_diff_compares_items_without_arrays_too(tmp_path, capsys):
    with ckptmgr.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, {"w": np.ones(2)}, extras={"rng": {"at": 1}, "blob": b"a"})
        manager.save(2, {"w": np.ones(2)}, extras={"rng": {"at": 2}, "blob": b"a"})
        manager.save(3, {"w": np.ones(2)}, extras={"rng": {"at": 2}})
    run = f"{tmp_path}/run"
    assert outcome(["diff", f"{run}@1", f"{run}@2", "--json"]) == 0
    capsys.readouterr()
    assert outcome(["diff", f"{run}@1", f"{run}@2", "--values", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["values"] == [{"path": "rng", "largest_change": "another value"}]
    assert outcome(["diff", f"{run}@2", f"{run}@3", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["only_in_first"] == ["blob"]
    assert outcome(["diff", f"{run}@2", f"{run}@3", "--values"]) == 1
    assert "all values are equal" in capsys.readouterr().out


def test_verify_of_one_step_and_of_all_at_once_is_refused(tmp_path, capsys):
    with ckptmgr.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, {"w": np.ones(2)})
    assert outcome(["verify", f"{tmp_path}/run@1", "--all"]) == 2
    assert "names step 1: leave one of them out" in capsys.readouterr().err
