"""Options: checked at construction, the message names the option, nothing is written."""

import jax
import orbax.checkpoint as ocp
import pytest

import ckptmgr
from ckptmgr import CheckpointManager, best, every_steps, latest


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("save_every", 0, ValueError),
        ("save_every", -5, ValueError),
        ("save_every", [], ValueError),
        ("save_every", "100", TypeError),
        ("save_every", latest(3), TypeError),
        ("save_every", every_steps, TypeError),
        ("keep", 0, ValueError),
        ("keep", [], ValueError),
        ("keep", [latest(2), 0], ValueError),
        ("keep", 1.5, TypeError),
        ("keep", ckptmgr.at_steps(3), TypeError),
        ("asynchronous", 1, TypeError),
        ("compression", "gzip", ValueError),
        ("chunk_bytes", 0, ValueError),
        ("max_host_bytes", -1, ValueError),
        ("nonfinite", "raise", ValueError),
        ("nonfinite", True, ValueError),
        ("on_commit", "print", TypeError),
        ("on_commit", [print, 3], TypeError),
        ("read_only", "yes", TypeError),
        ("metadata", [1], TypeError),
        ("metadata", {"x": object()}, TypeError),
        ("timeout_s", 0, ValueError),
        ("timeout_s", True, ValueError),
    ],
)
def test_a_wrong_value_is_refused_by_name_and_nothing_is_written(tmp_path, option, value, error):
    with pytest.raises(error, match=option):
        CheckpointManager(tmp_path / "run", **{option: value})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"save_every": ckptmgr.overhead},
            r"^save_every takes a policy, not its class: call it, as in overhead\(...\)$",
        ),
        ({"keep": [latest]}, r"^keep takes a policy, not its class: call it, as in latest\(...\)$"),
        (
            {"keep": ckptmgr.overhead(0.02)},
            r"^keep takes .* a keep policy \(latest, .*, not overhead\(share=0.02\)$",
        ),
        ({"save_every": best("loss")}, r"^save_every takes .* a save policy \(every_steps, .*, not best\("),
        ({"save_every": int}, r"^save_every takes a whole number, .*, not <class 'int'>$"),
        (
            {"save_every": [1000, ckptmgr.overhead(0.02), ckptmgr.overhead(0.05)]},
            r"^save_every has overhead\(share=0.02\) and overhead\(share=0.05\): the largest share decides",
        ),
    ],
)
def test_a_wrong_policy_is_told_from_a_right_one(tmp_path, options, said):
    with pytest.raises((TypeError, ValueError), match=said):
        CheckpointManager(tmp_path, **options)


@pytest.mark.parametrize(
    "option",
    [{"save_every": 2}, {"keep": 3}, {"nonfinite": "refuse"}, {"on_commit": print}, {"metadata": {"a": 1}}],
)
def test_what_contradicts_read_only_is_refused(tmp_path, option):
    with pytest.raises(ValueError, match=f"read_only=True contradicts {next(iter(option))}"):
        CheckpointManager(tmp_path / "run", read_only=True, **option)


def test_a_directory_that_is_no_path_is_refused():
    for wrong in (None, 3, ""):
        with pytest.raises(TypeError, match="directory"):
            CheckpointManager(wrong)


def test_orbax_policies_are_accepted_beside_ours(tmp_path):
    policies = ocp.checkpoint_managers
    with CheckpointManager(
        tmp_path,
        save_every=[policies.FixedIntervalPolicy(4), 6],
        keep=[policies.LatestN(n=1), policies.CustomSteps([4]), best("loss")],
    ) as manager:
        saved = [
            step for step in range(1, 13) if manager.save(step, {"w": jax.numpy.ones(1)}, metrics={"loss": step})
        ]
        manager.wait()
        assert saved == [4, 6, 8, 12]
        assert manager.steps() == [4, 12]
        assert "LatestN" in " ".join(manager.info(12).kept)
