"""Programs in the style of other libraries: killed and resumed, each ends as if it had never been stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("foreign")  # one worker: the libraries are imported once, for all programs

HERE = Path(__file__).parent
VARIANTS = {"optax_wrappers": ["lookahead", "schedule_free", "apply_if_finite", "inject_hyperparams"]}
PROGRAMS = [
    f"{path.stem} {variant}".strip()
    for path in sorted(HERE.glob("*.py"))
    if path.stem not in ("run", Path(__file__).stem)
    for variant in VARIANTS.get(path.stem, [""])
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a program by name: what each of its processes ended with."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "run.py"), str(tmp_path_factory.mktemp("foreign"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as runner:

        def ask(name):
            print(name, file=runner.stdin, flush=True)
            return json.loads(runner.stdout.readline())

        yield ask
        runner.stdin.close()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_was_killed_ends_as_one_that_was_not(run, name):
    found = run(name)
    codes = {"straight": 0, "killed": -signal.SIGKILL, "resumed": 0, "again": 0}
    for how, code in codes.items():
        assert found[how]["code"] == code, found[how]["said"]
    assert "resumed from step 3" in found["resumed"]["said"]
    assert "resumed from step 7" in found["again"]["said"]
    straight = found["straight"]["state"]
    assert len(straight) > 4
    for how in ("resumed", "again"):
        assert not different(found[how]["state"], straight), how


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
