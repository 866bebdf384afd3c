"""What type checkers see of the public API, and reprs that fit a line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import ckptmgr
from ckptmgr import CheckpointInfo, CheckpointManager, LeafDiff, LeafSpec, StructureDiff, VerifyReport
from ckptmgr.results import Damage

ROOT = Path(__file__).parents[1]
USES = ROOT / "tests" / "typed_uses.py"


def check(*words):
    done = subprocess.run([sys.executable, "-m", *words, str(USES)], cwd=ROOT, capture_output=True, text=True,
                          timeout=200)  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 2: the checker itself has failed
    return done.stdout


def mypy():
    found = re.findall(r"typed_uses\.py:(\d+): error: (.*)", check("mypy"))
    return {int(line): text for line, text in found}


def pyright():
    found = json.loads(check("pyright", "--outputjson", "--pythonpath", sys.executable))["generalDiagnostics"]
    return {each["range"]["start"]["line"] + 1: each["message"] for each in found if each["severity"] == "error"}


@pytest.mark.parametrize("errors", [mypy, pyright])
def test_templates_give_their_types_and_wrong_uses_are_errors(errors):
    lines = USES.read_text().splitlines()
    wrong = [number for number, line in enumerate(lines, 1) if line.endswith("# wrong")]
    found = errors()
    assert sorted(found) == wrong, found


# ---------------------------------------------------------------- reprs

SPEC = LeafSpec("['layers'][0]['kernel']", ("layers", 0, "kernel"), "jax", (512, 512), "float32")
MANY = (SPEC,) * 10_000


def values(tmp_path):
    """Of each public class of values one that holds a lot."""
    metrics = {f"a metric with a long name {i}": 0.5 for i in range(100)}
    info = CheckpointInfo(step=7, time=0.0, items=("params",) * 50, leaves={"params": MANY}, metrics=metrics,
                          distrusted="a file is missing\n" * 9, kept=("latest(n=3)",) * 40)  # fmt: skip
    tree = {f"layer {i}": np.ones(2) for i in range(10_000)}
    yield info
    yield ckptmgr.Checkpoint(step=7, params=tree, opt_state=[tree] * 9, extras=tree, metrics=metrics, info=info,
                             skipped=dict.fromkeys(range(99), "damaged"), missing=("leaf",) * 99)  # fmt: skip
    yield VerifyReport(step=7, damages=(Damage("params/d/" + "0" * 32, "its bytes differ"),) * 500)
    yield StructureDiff((LeafDiff("params['layers']", SPEC, None, "unexpected"),) * 10_000)
    with CheckpointManager(tmp_path / "run") as manager:
        yield manager
        yield manager.save(1, tree)
    yield manager
    yield CheckpointManager(tmp_path / "a long name" / ("run" * 60), read_only=True)
    yield ckptmgr.SaveResult(7, "a reason that is long " * 50)
    yield ckptmgr.every_steps(100)
    yield ckptmgr.every_seconds(0.5)
    yield ckptmgr.overhead(1 / 3)
    yield ckptmgr.as_often_as_possible(1 / 3)
    cost = ckptmgr.Cost(began=1e9 + 1 / 3, blocked_s=1 / 3, beside_s=1 / 3, longest_s=1 / 3, after_s=1 / 3)
    yield cost
    costs = ckptmgr.Costs(step=10**9, at=1e9, quiet=(1 / 3,) * 32, saves=(cost,) * 8, current=cost)
    yield costs
    yield ckptmgr.Saving(in_progress=True, costs=costs)
    yield ckptmgr.latest(3)
    yield ckptmgr.params_only(3)
    yield ckptmgr.best("loss", n=3)
    yield ckptmgr.at_steps(*range(10_000))
    yield SPEC
    yield LeafSpec(
        "['layers']" * 50, ("layers",) * 50, "key", (512,) * 9, "uint32", True, ("x",) * 9, "rbg", (2,) * 9
    )
    yield LeafDiff("params['layers']", SPEC, SPEC, "shape")
    yield Damage("params/d/" + "0" * 32, "its bytes differ\n" * 99)
    yield ckptmgr.HOST


def test_every_repr_fits_a_line_and_names_its_class(tmp_path):
    seen = set()
    for value in values(tmp_path):
        text = repr(value)
        assert "\n" not in text, text
        assert len(text) <= 115, text
        assert type(value).__name__ in text or value is ckptmgr.HOST
        seen.add(type(value))
    every = {name: getattr(ckptmgr, name) for name in ckptmgr.__all__}
    aliases = {"Keep", "Layout", "PyTree", "SaveEvery"}
    public = {each for name, each in every.items() if isinstance(each, type) and name not in aliases}
    protocols = {each for each in public if getattr(each, "_is_protocol", False)}
    errors = {each for each in public if issubclass(each, Exception)}
    assert public - protocols - errors == seen - {type(ckptmgr.HOST)}


def test_a_repr_says_what_is_most_asked_for(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(7, {"w": jnp.ones(3), "b": jnp.ones(2)}, metrics={"loss": 0.5}).result()
        back = manager.restore()
        assert repr(manager).endswith(f"/{tmp_path.name}', open for writing)")
    assert repr(manager).endswith(f"/{tmp_path.name}', read-only or closed)")
    assert repr(back) == "Checkpoint(step=7, params=<2 leaves>, opt_state=None, resumed=True)"
    assert repr(back.info) == (
        "CheckpointInfo(step=7, items=('params', 'step', 'metrics'), leaves=2, nbytes=20, metrics={'loss': 0.5})"
    )
    assert repr(manager.verify(7)).startswith("VerifyReport(step=7, damages=(), files=")
    assert repr(StructureDiff((LeafDiff("params['w']", SPEC, None, "missing"),))) == (
        "StructureDiff(missing=1, first=params['w'])"
    )
    assert repr(ckptmgr.at_steps(3, 1, 2)) == "at_steps(1, 2, 3)"
    assert repr(SPEC) == "LeafSpec(\"['layers'][0]['kernel']\", float32[512,512])"
    on_mesh = SPEC._replace(kind="numpy", partition=("x", None))
    assert repr(on_mesh) == f"{repr(SPEC)[:-1]}, kind='numpy', partition=('x', None))"
    assert repr(LeafDiff("params['w']", SPEC, None, "missing")) == (
        "LeafDiff(\"params['w']\", missing, saved=float32[512,512], template=-)"
    )
