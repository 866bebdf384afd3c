"""Commands typed at a real terminal, of several widths, with and without colour, with answers and Ctrl-C."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import terminal
from rich.cells import cell_len

import ckptmgr
from ckptmgr import interop
from ckptmgr.cli import columns

pytestmark = pytest.mark.xdist_group("terminal")  # one process that forks

WIDTHS = (60, 80, 200)
LOOKS = {"colour": {}, "no colour": {"NO_COLOR": "1"}, "dumb": {"TERM": "dumb"}}
METRICS = {"loss [val]": 0.25, "accuracy": 0.9, "a/rather/long/name/of/a/metric": 12345.678, "perplexity": 17.5}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run whose names have brackets, with a damaged, a distrusted and a pinned step."""
    run = tmp_path_factory.mktemp("t") / "exp[lr=0.1]"
    keep = [ckptmgr.latest(2), ckptmgr.best("loss [val]"), ckptmgr.every_steps(1000)]
    with ckptmgr.CheckpointManager(run, keep=keep) as manager:
        for step in (1000, 2000, 3000, 4000, 5000):
            params = {"layer [0]": {"w": jnp.full((4, 3), step / 7), "[bold]": np.ones(3)}}
            manager.save(step, params, {"mu": params}, metrics={**METRICS, "loss [val]": step / 8000})
        manager.wait()
        manager.pin(2000)
        manager.distrust(3000, "trained on the [red]wrong[/red] data, as the log of the loader says")
    (run / "4000" / "manifest.json").write_bytes(b"")
    return run


def lines(screen):
    return terminal.plain(screen).splitlines()


def ageless(shown):
    """The words of each line without the ages of the steps, which grow between two calls."""
    return [re.sub(r" \d+ (s|min) ", " ", line).split() for line in shown.splitlines()]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("columns", WIDTHS)
def test_what_is_shown_fits_the_terminal(made, columns, look):
    whole = set(terminal.piped("ls", made).out.split()) | set(terminal.piped("show", made).out.split())
    whole |= {"not", "shown:", *(f"{name}," for name in METRICS), "(ls", "--metric", "NAME", "shows", "one)"}
    for words in (("ls", made), ("show", made)):
        done = terminal.typed(*words, columns=columns, env=LOOKS[look])
        assert done.code == 0, done.screen
        shown = [line for line in lines(done.screen) if str(made) not in line]  # which may be longer than the line
        assert max(map(cell_len, shown)) <= columns
        broken = {word for line in shown for word in line.split() if not word.endswith("…")} - whole
        assert not {word for word in broken - {"s", "min"} if not word.isdecimal()}  # the age of a step goes on
        assert ("\x1b[" in done.screen) == (look != "dumb")
        assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]m", done.screen)) == (look == "colour" and words[0] == "ls")


@pytest.mark.parametrize("columns", WIDTHS)
def test_ls_has_one_line_for_a_step_and_names_what_it_leaves_out(made, columns):
    shown = lines(terminal.typed("ls", made, columns=columns).screen)
    head = next(line for line in shown if line.startswith("step "))
    for step in (1000, 2000, 3000, 4000, 5000):
        assert sum(line.startswith(f"{step} ") for line in shown) == 1
    left_out = " ".join(shown).partition("not shown: ")[2].partition(" (ls --metric NAME shows one)")[0]
    assert [name in head for name in METRICS] == [name not in left_out for name in METRICS]
    assert bool(left_out) == (columns < 200)
    assert ("on disk" in head) == (columns == 200)
    assert "kept by" in head
    said = " ".join(" ".join(shown).split())
    assert "DISTRUSTED trained on the [red]wrong[/red] data, as the log of the loader says (step 3000)" in said
    assert "DAMAGED manifest.json is damaged: its checksum does not match (step 4000)" in said
    chosen = terminal.plain(terminal.typed("ls", made, "--metric", "perplexity", columns=60).screen)
    assert "17.5" in chosen
    head = next(line for line in chosen.splitlines() if line.startswith("step "))
    assert ("perplexity" in head, "loss [val]" in head) == (True, False)


def test_a_pipe_gets_every_column_whatever_the_environment_says(made):
    narrow, wide = (terminal.piped("ls", made, env={"COLUMNS": width}).out for width in ("40", "200"))
    assert ageless(narrow) == ageless(wide)
    for word in (*METRICS, "12345.7", "on disk", "every 1000 steps", "best loss [val]", str(made)):
        assert word in wide


def test_brackets_survive_everywhere(made, tmp_path):
    """Rich reads them as markup; each command is typed at a terminal wide enough for one line."""
    out = tmp_path / "mean[5].npz"
    for words, said in {
        ("ls", made): "loss [val]",
        ("show", f"{made}@1000"): "['[bold]']",
        ("diff", f"{made}@1000", f"{made}@2000", "--values"): "params['layer [0]']['w']",
        ("verify", f"{made}@4000"): "DAMAGED",
        ("keep", made, "--policy", "best:loss [val]", "--dry-run"): "best loss [val]",
        ("keep", made, "--policy", "best:loss [vol]", "--dry-run"): "did you mean loss [val]?",
        ("rm", f"{made}@1000", "--dry-run"): "would be deleted: 1000",
        ("rm", f"{made}@9"): "exp[lr=0.1]",
        ("gc", made): "nothing is left over",
        ("rewind", f"{made}@1", "--yes"): "exp[lr=0.1]",
        ("pin", f"{made}@x"): "exp[lr=0.1]@100",
        ("unpin", f"{made}"): "exp[lr=0.1]@STEP",
        ("distrust", f"{made}@1000", "--why", "[bold]", "--dry-run"): "would be distrusted: [bold]",
        ("trust", f"{made}@7"): "exp[lr=0.1]",
        ("export", f"{made}@1000", out): "mean[5].npz",
        ("average", made, "--steps", "1000,2000", "-o", out, "--yes"): "mean[5].npz",
        ("import", f"{made}x", "--params", out, "--step", 1, "--dry-run"): "exp[lr=0.1]x",
        ("report", made, "-o", tmp_path / "r[1].html"): "r[1].html",
        ("doctor", made): "exp[lr=0.1]",
    }.items():
        done = terminal.typed(*words, columns=400)
        assert said in terminal.plain(done.screen), (words, done.screen)


# ---------------------------------------------------------------- questions


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    with ckptmgr.CheckpointManager(run) as manager:
        for step in (1, 2, 3):
            manager.save(step, {"w": jnp.ones(3) * step}, metrics={"loss": 1 / step})
    (run / ".ckptmgr" / "saving" / "4").mkdir()
    (run / ".ckptmgr" / "saving" / "4" / "file").write_bytes(b"x" * 10)
    return run


def state(run):
    return sorted((str(path), path.stat().st_mtime_ns) for path in run.rglob("*"))


def steps(run):
    return ckptmgr.CheckpointManager(run, read_only=True).steps()


@pytest.mark.parametrize(
    "answer", ["n\n", "\n", "yesterday\n", "\x04", "\x03"], ids=["n", "", "yesterday", "D", "C"]
)
def test_only_yes_is_yes(run, answer):
    before = state(run)
    done = terminal.typed("rm", run, 1, types=answer)
    assert f"Delete step 1 of {run}? [y/N] " in done.screen.replace("\n", " ").replace("  ", " ")
    assert done.code == (130 if answer == "\x03" else 2)
    assert done.screen.rstrip().endswith("interrupted" if answer == "\x03" else "nothing was changed")
    assert "Traceback" not in done.screen
    assert state(run) == before


def test_each_command_that_deletes_or_moves_asks_and_does_it_after_yes(run, tmp_path):
    out = tmp_path / "params.npz"
    interop.write({"w": jnp.zeros(3)}, out)
    (tmp_path / "notes.html").write_text("mine")
    for words, question in {
        ("gc", run): "left over",
        ("rewind", f"{run}@2"): "Set aside step 3",
        ("rewind", f"{run}@3"): "ring back step 3",
        ("keep", run, "--policy", "latest:2"): "Delete step 1",
        ("rm", run, 2): "Delete step 2",
        ("export", run, out): "Replace",
        ("average", run, "--last", 1, "-o", out): "Replace",
        ("import", run, "--params", out, "--step", 3): "Replace step 3",
        ("report", run, "-o", tmp_path / "notes.html"): "Replace",
    }.items():
        before = state(tmp_path)
        refused = terminal.typed(*words, types="n\n", columns=200)
        assert (refused.code, state(tmp_path)) == (2, before), refused.screen
        done = terminal.typed(*words, types="y\n", columns=200)
        assert (done.code, question in done.screen) == (0, True), done.screen
        assert state(tmp_path) != before
    assert steps(run) == [3]
    assert jnp.array_equal(ckptmgr.CheckpointManager(run).restore(3).params["w"], jnp.ones(3) * 3)


def test_the_newest_and_pinned_steps_need_force(run):
    with ckptmgr.CheckpointManager(run) as manager:
        manager.pin(1)
    for step, why in ((3, "the newest"), (1, "pinned")):
        done = terminal.piped("rm", run, step, "--yes")
        assert (done.code, f"step {step} is {why}, so nothing was deleted; --force" in done.err) == (2, True)
    assert steps(run) == [1, 2, 3]
    assert terminal.piped("rm", run, 1, 3, "--yes", "--force").code == 0
    assert steps(run) == [2]


def test_a_policy_with_a_mistyped_metric_deletes_nothing(run):
    for option in ("best:los", "params-only:best:los:max"):
        done = terminal.piped("keep", run, "--policy", option, "--yes")
        assert (done.code, "the steps have loss; did you mean loss?" in done.err) == (2, True)
    assert steps(run) == [1, 2, 3]


def test_json_at_a_terminal_asks_nothing(run):
    done = terminal.typed("keep", run, "--policy", "latest:1", "--json")
    found = json.loads(done.screen)
    assert (done.code, found["error"], found["would_delete"]) == (2, "NotConfirmedError", [1, 2])
    assert steps(run) == [1, 2, 3]


def test_completion_names_commands_and_steps(run):
    def completed(line):
        env = {"_CKPTMGR_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        return terminal.piped(env=env).out.split()

    assert {"rm", "report", "rewind"} <= set(completed("ckptmgr r"))
    assert completed(f"ckptmgr show {run}@") == [f"{run}@{step}" for step in (1, 2, 3)]
    assert completed(f"ckptmgr rm {run} ") == ["1", "2", "3"]
    assert completed(f"ckptmgr show {run}/nothing@") == []


def test_show_of_many_leaves_is_bounded_and_says_how_to_see_the_rest(tmp_path):
    block = {"attention": {"q": jnp.ones(2), "k": jnp.ones(2)}, "mlp": {"w": jnp.ones(3)}}
    with ckptmgr.CheckpointManager(tmp_path / "run") as manager:
        for step in (1, 2):
            params = {f"block{n}": jax.tree.map(lambda leaf, step=step: leaf * step, block) for n in range(60)}
            manager.save(step, params)
    shown = terminal.piped("show", tmp_path / "run").out.splitlines()
    assert len(shown) < 210
    assert "180 more leaves; --depth 4 shows them" in shown
    assert any("['block7']  3 leaves, 28 B" in line for line in shown)
    blocks = [line.split("'")[1] for line in shown if "['block" in line]
    assert blocks == [f"block{n}" for n in range(60)]  # not block1, block10, block11
    everything = terminal.piped("show", tmp_path / "run", "--depth", 4).out
    assert everything.count("float32[2]  8 B") == 120
    assert "more leaves" not in everything
    done = terminal.piped("diff", f"{tmp_path}/run@1", f"{tmp_path}/run@2", "--values")
    assert (done.code, done.out.count("params[")) == (1, 40)
    assert "... and 140 more; --all shows them" in done.out
    assert (
        terminal.piped("diff", f"{tmp_path}/run@1", f"{tmp_path}/run@2", "--values", "--all").out.count("params[")
        == 180
    )


def test_wide_characters_are_cut_by_the_cells_that_they_take():
    for text in ("best 検証データの損失", "検証データの損失", "a 検 b 証", "plain words only"):
        for width in range(2, 24):
            shown = columns.shortened(text, width)
            assert cell_len(shown) <= width
            assert shown == text or shown.endswith("…")
