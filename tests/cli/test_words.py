"""Every error that a command can meet is said in the command line's own words: no name of our Python API."""

import json
import pickle
import zlib

import api_names
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import terminal

import ckptmgr
from ckptmgr import policies
from ckptmgr.cli import messages, spelling

PARAMS = {"w": jnp.arange(4.0)}
STATE = optax.adam(1e-3).init(PARAMS)


def save(run, *steps, **how):
    with ckptmgr.CheckpointManager(run) as manager:
        for step in steps:
            manager.save(step, PARAMS, STATE, metrics={"loss": 1 / step}, **how)
    return run


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Runs and files that a command cannot do with what it is asked to."""
    place = tmp_path_factory.mktemp("zoo")
    with ckptmgr.CheckpointManager(save(place / "good", 1, 2, 3, 4, extras={"rng": jax.random.key(0)})) as manager:
        manager.pin(1)
        manager.distrust(2, "a test")
    save(place / "bad", 1, 2, 3)
    (place / "bad" / "2" / "manifest.json").write_bytes(b"{")
    next((place / "bad" / "3" / "params").glob("d/*")).write_bytes(b"")
    save(place / "later", 1)
    text = b'{"format":99,"new":true'
    (place / "later" / "1" / "manifest.json").write_bytes(text + b',"crc32":"%08x"}\n' % zlib.crc32(text))
    with ckptmgr.CheckpointManager(save(place / "doubtful", 1)) as manager:
        manager.distrust(1, "a test")
    save(place / "milestones", 1, 2)
    assert terminal.here("keep", place / "milestones", "--policy", "params-only:latest:2", "--yes")[0] == 0
    (place / "empty").mkdir()
    with ckptmgr.CheckpointManager(place / "new"):
        pass
    with ckptmgr.CheckpointManager(place / "floats") as manager:
        manager.save(1, {"w": np.ones(2, ml_dtypes.float8_e5m2fnuz)})
        manager.save(2, {"w": np.ones(3, ml_dtypes.float8_e5m2fnuz), "n": 1})
        manager.save(3, {"w": np.ones(2, ml_dtypes.float8_e5m2fnuz), "n": 2})
        manager.save(4, {"w": np.ones(2, ml_dtypes.float8_e5m2fnuz), "n": 3})
    (place / "link.npz").symlink_to("nowhere.npz")
    for name, data in {
        "evil.pkl": b"cposix\nsystem\n(S'ls'\ntR.", "unknown.pkl": b"cnumpy\narange\n(I3\ntR.",
        "half.pkl": b"\x80\x04",
        "text.foo": b"hello", "text": b"hello", "a.npz": b"hello", "a.safetensors": b"hello", "a.msgpack": b"\xc1",
        "dict.pkl": pickle.dumps({"params": {"w": np.ones(2)}, "metrics": "none", "bad/name": np.ones(1)}),
        "none.pkl": pickle.dumps({"params": None, "step": 1}), "w.pkl": pickle.dumps({"w": np.ones(2)}),
        "step.pkl": pickle.dumps({"params": {"w": np.ones(2)}, "step": "x"}),
        "ok.pkl": pickle.dumps({"params": {"w": np.ones(2)}, "step": 4}),
        "object.pkl": pickle.dumps({"params": {"w": "a text"}, "step": 4}),
    }.items():  # fmt: skip
        (place / name).write_bytes(data)
    return place


CASES = {
    "ls good --metric los": 2, "ls bad": 0, "ls later": 0, "ls doubtful": 0, "ls milestones": 0, "ls empty": 2,
    "ls new": 0, "ls gooood": 2, "ls text": 2, "ls good/1": 2, "ls ftp://x/y": 2,
    "show good@9": 2, "show bad@2": 3, "show later": 3, "show new": 2, "show good@x": 2, "show milestones": 0,
    "show good --depth 0": 2, "show good@1 2": 2,
    "diff good": 2, "diff good@1 bad@2": 3, "diff good@1 bad@3 --values": 3, "diff good 1 2 3": 2,
    "diff good@1 milestones@1": 1, "diff good@2 good@3 --values": 0,
    "verify bad --all": 1, "verify later": 3, "verify new": 2,
    "keep good --policy newest:3": 2, "keep good --policy best:los --dry-run": 2, "keep good --policy latest:0": 2,
    "keep good --policy params-only:3": 2, "keep good": 2, "keep good --policy latest:1": 2,
    "keep bad --policy latest:1": 0, "keep later --policy latest:1": 0,
    "keep milestones --policy params-only:every_steps:1 --dry-run": 0,
    "rm good@1 --yes": 2, "rm good@4 --yes": 2, "rm good 3": 2, "rm good 3 9 --yes": 2, "rm good x --yes": 2,
    "gc good": 0, "gc new": 0, "gc empty": 2,
    "rewind good@9 --yes": 2, "rewind bad@2 --yes": 3, "rewind good@1": 2, "rewind good@1 --mirror nowhere": 2,
    "rewind good@1 --mirror good --yes": 2, "rewind good@1 --mirror empty --yes": 2,
    "rewind milestones@1 --yes": 0,
    "pin good": 2, "pin good@9": 2, "unpin nowhere@1": 2, "distrust good@1": 2, "trust good@9": 2,
    "distrust good@1 --why x --dry-run": 0,
    "export doubtful out.npz": 2, "export doubtful@1 out.npz": 0, "export good@2 out2.npz": 0,
    "export good out3.npz --item weights": 2, "export good out3.npz --item rng": 3, "export bad@2 out3.npz": 3,
    "export bad@3 out3.npz": 3, "export floats@1 out.safetensors": 3, "export good text.foo": 2,
    "export good empty": 2, "export good good/7": 2, "export good link.npz": 2,
    "export milestones@1 out4.npz --item opt_state": 2, "export later out4.npz": 3, "export good no/such/dir": 0,
    "average good --last 9 -o mean.npz": 2, "average good -o mean.npz": 2, "average good --last 2": 2,
    "average good --last 2 --steps 1 -o mean.npz": 2, "average good --steps 1,2 -o mean.npz": 2,
    "average good --steps 1,x -o mean.npz": 2, "average floats --steps 1,2 -o mean.npz": 2,
    "average floats --steps 3,4 -o mean.npz": 2, "average floats --steps 2,3 -o mean.npz": 2,
    "import new evil.pkl": 3, "import new unknown.pkl": 3, "import new half.pkl": 3, "import new text.foo": 2,
    "import new text": 2, "import new --params a.npz --step 1": 2, "import new --params a.safetensors --step 1": 2,
    "import new --params a.msgpack --step 1": 2, "import new dict.pkl --step 1": 2, "import new none.pkl": 2,
    "import new dict.pkl --step 1 --skip metrics": 2, "import new ok.pkl --skip more": 2, "import new w.pkl": 2,
    "import new step.pkl": 2, "import new nowhere.pkl": 2, "import good ok.pkl": 2, "import new --params w.pkl": 2,
    "import good --params w.pkl --step 1 --yes": 2, "import new --params w.pkl --step -1": 2,
    "import new object.pkl": 3, "import empty": 2, "import good/7 ok.pkl": 2, "import text ok.pkl": 2,
    "report good -o empty": 2, "report good -o nowhere/r.html": 2, "report good -o text": 2,
    "doctor nowhere": 2, "doctor text": 2,
    "": 2, "lss": 2, "ls": 2, "ls good --jsn": 2, "ls good more": 2,
}  # fmt: skip
"""What is typed, with its exit code."""


@pytest.fixture
def place(zoo, monkeypatch):
    monkeypatch.chdir(zoo)
    return zoo


def test_no_name_of_the_python_api_is_said(place):
    wrong = {}
    for typed, expected in CASES.items():
        code, out, err = terminal.here(*typed.split())
        said = out + err
        names = api_names.found_in(said)
        if code != expected or names or "Traceback" in said or "fault of ckptmgr" in said:
            wrong[typed] = (code, names, said[-500:])
        if code > 1 and typed:
            assert err.startswith("ckptmgr: ") or "\n" in out, typed
    assert wrong == {}


def test_the_same_failures_are_json(place):
    for typed in [each for each, code in CASES.items() if code > 1]:
        code, out, _ = terminal.here(*typed.split(), "--json")
        found = json.loads(out)
        assert code == CASES[typed], typed
        assert found["error"], typed
        assert api_names.found_in(found["message"]) == [], typed


def test_the_test_above_sees_a_name_of_the_python_api():
    for said in (
        "open it with read_only=True",
        'on_exists="replace"',
        "call manager.rewind(3)",
        "restore() takes it",
    ):
        assert api_names.found_in(said)
    assert api_names.found_in("ckptmgr export RUN@300 out.npz --yes; keeps latest:3, /tmp/x.ckptmgr/lock") == []


POLICIES = [
    ckptmgr.latest(3), ckptmgr.best("loss [val]", mode="max", n=2), ckptmgr.best("it's (odd)"),
    ckptmgr.every_steps(10), ckptmgr.every_seconds(90.5), ckptmgr.params_only(ckptmgr.best("a(b)")),
    ckptmgr.params_only(3),
]  # fmt: skip


@pytest.mark.parametrize("kept", POLICIES, ids=policies.spell)
def test_policies_are_spelled_as_in_the_option_wherever_the_library_says_them(kept):
    said = f"step 3 was reduced by {kept!r} on 2026-01-01, and {kept!r} keeps it"
    spelled = f"step 3 was reduced by {policies.spell(kept)} on 2026-01-01, and {policies.spell(kept)} keeps it"
    assert spelling.in_shell_words(said) == spelled
    assert messages.in_words(ckptmgr.SaveError(said, step=3)) == spelled


def test_a_step_that_another_process_saves_during_an_import_is_said_without_python():
    said = messages.in_words(ckptmgr.CheckpointExistsError('on_exists="replace" replaces it', step=3))
    assert said == "step 3 was saved by another process meanwhile, and it is kept"


def test_what_is_no_policy_stays_as_it_is():
    for said in ("the best (of all) is latest", "latest(", "best(metric)", "latest(n=0)", "every_steps(print())"):
        assert spelling.in_shell_words(said) == said


def test_a_fault_of_our_own_is_said_as_such_and_is_json_too(capsys):
    def fails():
        raise KeyError("x")

    assert messages.ended(fails, ["--json"]) == 3
    shown = capsys.readouterr()
    assert "This is a fault of ckptmgr; please report it" in json.loads(shown.out)["message"]
    assert "Traceback" in shown.err
