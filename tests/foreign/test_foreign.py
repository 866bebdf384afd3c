"""Programs in the style of other libraries: killed and resumed, each ends as if it had never been stopped."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import counted

pytestmark = pytest.mark.xdist_group("foreign")  # one worker: the libraries are imported once, for all programs

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "docs" / "examples"
VARIANTS = {"optax_wrappers": ["lookahead", "schedule_free", "apply_if_finite", "inject_hyperparams"]}
PROGRAMS = [
    f"{path.stem} {variant}".strip()
    for path in sorted(HERE.glob("*.py"))
    if path.stem not in ("run", Path(__file__).stem)
    for variant in VARIANTS.get(path.stem, [""])
]
KILLS = ["before publish 4", "after publish 4", "after arrays 9", "before file 40", "before retain 4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a program, and kills it in between: what each of its processes ended with."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    environment["KERAS_BACKEND"] = "jax"
    command = [sys.executable, str(HERE / "run.py"), str(tmp_path_factory.mktemp("foreign"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as runner:

        def ask(name, kill=KILLS[0], folder=HERE):
            program, *variant = name.split()
            request = {"folder": str(folder), "program": program, "variant": variant, "kill": kill}
            print(json.dumps(request), file=runner.stdin, flush=True)
            found = json.loads(runner.stdout.readline())
            for how, code in {"straight": 0, "killed": -signal.SIGKILL, "resumed": 0, "again": 0}.items():
                assert found[how]["code"] == code, f"{how}: {found[how]['said']}"
            return found

        yield ask
        runner.stdin.close()


@pytest.mark.soak
@pytest.mark.parametrize("kill", KILLS[: counted(1, full=len(KILLS))])
@pytest.mark.parametrize("name", [*PROGRAMS, "keras_callback"][:: counted(2, full=1)])
def test_a_program_that_was_killed_ends_as_one_that_was_not(run, name, kill):
    found = run(name, kill, folder=EXAMPLES if name == "keras_callback" else HERE)
    assert 0 < resumed_from(found["resumed"]) < 7
    assert resumed_from(found["again"]) == 7
    straight = found["straight"]["state"]
    assert len(straight) > 4
    for how in ("resumed", "again"):
        assert not different(found[how]["state"], straight), how


def resumed_from(process):
    return int(re.search(r"^resumed from step (\d+)$", process["said"], re.MULTILINE)[1])


def different(state, straight):
    """What is not the same, by leaf: each fact that differs, with both sides."""
    return {
        path: {
            fact: (ours.get(fact), theirs.get(fact))
            for fact in ours | theirs
            if ours.get(fact) != theirs.get(fact)
        }
        for path in straight | state
        if (ours := state.get(path, {})) != (theirs := straight.get(path, {}))
    }


FORGOTTEN = {
    "haiku_state": ("**ckpt.extras)", "state=ckpt.extras['state'], key=now.key)"),
    "linen_batchnorm": (", **ckpt.extras)", ")"),
    "nnx_lora": ('nnx.update(rngs, ckpt.extras["rngs"])', "pass"),
    "keras_callback": ("np.random.set_state(", "dict("),
}


@pytest.mark.soak
@pytest.mark.parametrize("name", list(FORGOTTEN)[: counted(1, full=len(FORGOTTEN))])
def test_what_a_program_forgets_to_put_back_is_noticed(run, name, tmp_path):
    """The comparison can fail."""
    source = next(path for path in (HERE / f"{name}.py", EXAMPLES / f"{name}.py") if path.exists()).read_text()
    broken = source.replace(*FORGOTTEN[name])
    assert broken != source
    (tmp_path / f"{name}.py").write_text(broken)
    found = run(name, folder=tmp_path)
    assert different(found["resumed"]["state"], found["straight"]["state"])
