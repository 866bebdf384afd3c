"""Milestones: a step that only `params_only` keeps loses its other items, and stays a checkpoint."""

import errno
import itertools
import os
import random
import shutil
import signal
import threading
import uuid
from pathlib import Path

import faults
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
import reducer
import warm
from conftest import ON_SERVERS, counted
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

import ckptmgr
from ckptmgr import CheckpointManager, best, every_steps, latest, params_only, policies
from ckptmgr.format import files, linking, names, recorded
from ckptmgr.format import manifest as manifests
from ckptmgr.results import CheckpointInfo
from ckptmgr.run import bucket, journal, local, reducing, transfer
from ckptmgr.testing import assert_trees_equal

pytestmark = ON_SERVERS

ADAM = optax.adam(1e-3)
KEEP = [latest(2), params_only(every_steps(10))]
WHY = r"step 10 was reduced to its params by params_only\(every_steps\(10\)\) on 20\d\d-\d\d-\d\d "


def params(step, size=64):
    values = jnp.arange(float(size)) + step
    return {"w": values, "b": values.astype(jnp.bfloat16), "key": jax.random.key(step)}


def opt_state(step, size=64):
    return ADAM.init({name: leaf for name, leaf in params(step, size).items() if name != "key"})


def save(manager, *steps, size=64):
    for step in steps:
        extras = {"ema": params(step, size), "data": {"at": step}}
        manager.save(step, params(step, size), opt_state(step, size), extras=extras, metrics={"loss": 1 / step})
    manager.wait()


def reduced(manager):
    return [info.step for info in manager.infos() if info.reduced]


def size_of(directory):
    return sum(path.stat().st_blocks * 512 for path in Path(directory).rglob("*") if path.is_file())


def leftovers(run):
    ours = Path(run) / names.OURS
    return [
        path for folder in ("saving", "deleting", "reducing", "replaced") for path in (ours / folder).glob("*")
    ]


@pytest.fixture
def run(tmp_path):
    """A run with steps 10 (a milestone), 15 and 20."""
    with CheckpointManager(tmp_path / "run", keep=KEEP) as manager:
        save(manager, 5, 10, 15, 20)
        assert (manager.steps(), reduced(manager)) == ([10, 15, 20], [10])
    return tmp_path / "run"


def at(place, request, tmp_path):
    if place == "disk":
        return str(tmp_path / "run")
    request.getfixturevalue("servers")
    return f"{place}://bucket/{uuid.uuid4().hex}/run"


@pytest.fixture(params=["disk", "gs", "s3"])
def anywhere(request, tmp_path):
    return at(request.param, request, tmp_path)


# ---------------------------------------------------------------- what it is afterwards


def test_a_milestone_has_its_params_bit_for_bit_and_says_what_it_lacks(anywhere):
    with CheckpointManager(anywhere, keep=KEEP) as manager:
        save(manager, 5, 10, 15, 20, 25, 30)
        assert manager.steps() == [10, 20, 25, 30]
    with CheckpointManager(anywhere, keep=KEEP) as manager:
        assert reduced(manager) == [10, 20]
        found = manager.restore(10, params=params(0))
        assert_trees_equal(found.params, params(10))
        assert (found.metrics, found.info.items) == ({"loss": 0.1}, ("params", "step", "metrics"))
        without = manager.restore(10)
        assert_trees_equal(without.params, params(10))
        assert (without.opt_state, dict(without.extras)) == (None, {})
        assert "reduced to its params by params_only(every_steps(10)) on 20" in manager.info(10).reduced
        assert "reduced=" in repr(found.info)
        assert manager.info(10).kept == ("params_only(every_steps(10))",)
        assert manager.verify(10)
        assert {path.name for path in (epath.Path(anywhere) / "10").iterdir()} == {
            "_CHECKPOINT_METADATA", "commit_success.txt", "manifest.json", "metrics", "params", "step",
        }  # fmt: skip
        assert_trees_equal(manager.restore(30, opt_state=opt_state(0)).opt_state, opt_state(30))
        assert [event["step"] for event in journal.read(manager.directory) if event["event"] == "reduced"] in (
            [10, 20], [],
        )  # fmt: skip  # a bucket has no journal


@pytest.mark.parametrize(
    ("asked", "item"),
    [
        ({"opt_state": opt_state(0)}, "opt_state"),
        ({"optimizer": ADAM, "params": {"w": jnp.zeros(64)}}, "opt_state"),
        ({"extras": {"data": {"at": 0}}}, "data"),
        ({"extras": {"ema": params(0)}, "opt_state": opt_state(0)}, "opt_state and no ema"),
    ],
    ids=["opt_state", "optimizer", "an iterator", "a tree and opt_state"],
)
def test_who_asks_for_what_is_gone_is_told_why(run, asked, item):
    manager = CheckpointManager(run, read_only=True)
    with pytest.raises(ckptmgr.ReducedCheckpointError, match=f"{WHY}.*, so it has no {item}") as caught:
        manager.restore(10, **asked)
    assert isinstance(caught.value, ckptmgr.StructureMismatchError)
    assert caught.value.step == 10
    assert [leaf.path for leaf in caught.value.diff.leaves] == list(caught.value.items)


def test_partial_keeps_the_values_of_the_template_as_for_any_item_that_a_step_lacks(run, caplog):
    manager = CheckpointManager(run, read_only=True)
    found = manager.restore(10, params=params(0), opt_state=opt_state(7), partial=("opt_state",))
    assert_trees_equal(found.opt_state, opt_state(7))
    assert "step 10 lacks" in caplog.text


def test_two_thirds_of_the_disk_of_an_adam_run_go(tmp_path):
    weights = {"w": jnp.ones((1 << 20,))}
    with CheckpointManager(tmp_path, keep=[latest(1), params_only(every_steps(10))]) as manager:
        for step in (10, 20):
            manager.save(step, weights, ADAM.init(weights))
        manager.wait()
    whole, milestone = size_of(tmp_path / "20"), size_of(tmp_path / "10")
    assert milestone / whole == pytest.approx(1 / 3, abs=0.01)


def test_stock_orbax_restores_the_params_of_a_milestone_that_stands_alone(run, tmp_path):
    shutil.copytree(run / "10", tmp_path / "alone" / "10")
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params(0)
    )
    restore = ocp.args.StandardRestore
    with ocp.CheckpointManager(tmp_path / "alone") as stock:
        assert stock.all_steps() == [10]
        found = stock.restore(10, args=ocp.args.Composite(params=restore(template)))
        assert_trees_equal(found["params"], params(10))
        assert set(stock.restore(10).keys()) == {"params", "step", "metrics"}
    assert CheckpointManager(tmp_path / "alone", read_only=True).verify(10)


def test_no_file_of_the_params_is_copied(tmp_path):
    with CheckpointManager(tmp_path / "run") as manager:
        save(manager, 10, 15)
    before = {path.name: path.stat().st_ino for path in (tmp_path / "run" / "10" / "params" / "d").iterdir()}
    with CheckpointManager(tmp_path / "run", keep=[latest(1), params_only(every_steps(10))]) as manager:
        save(manager, 20)
        assert reduced(manager) == [10]
    data = list((tmp_path / "run" / "10" / "params" / "d").iterdir())
    assert {path.name: path.stat().st_ino for path in data} == before
    assert {path.stat().st_nlink for path in data} == {1}


def test_where_there_are_no_hard_links_the_files_are_copied_and_flushed(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links here")

    flushed, at_swap, swap = [], [], local.LocalDirectory._swap
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(linking.files, "sync", lambda found: flushed.extend(found))
    monkeypatch.setattr(
        local.LocalDirectory, "_swap", lambda *given: (at_swap.extend(map(str, flushed)), swap(*given))[1]
    )
    with CheckpointManager(tmp_path, keep=KEEP) as manager:
        save(manager, 10, 15, 20)
        assert reduced(manager) == [10]
        assert manager.verify(10)
        assert_trees_equal(manager.restore(10, params=params(0)).params, params(10))
    wanted = {str(path.relative_to(tmp_path / "10")) for path in (tmp_path / "10").rglob("*")}
    assert len(wanted) > 10
    assert wanted <= {path.partition("/reducing/10/")[2] for path in at_swap}  # files and folders, before the swap
    assert str(tmp_path) in map(str, flushed[len(at_swap) :])  # the names, before the old step is removed


def test_what_somebody_has_put_into_a_step_stays_there(tmp_path):
    with CheckpointManager(tmp_path, keep=KEEP) as manager:
        save(manager, 10, 15)
        (tmp_path / "10" / "notes.txt").write_text("good")
        save(manager, 20)
        assert reduced(manager) == [10]
        assert (tmp_path / "10" / "notes.txt").read_text() == "good"


def test_an_older_ckptmgr_reads_a_milestone():
    """It knows no field "reduced", and its schema ignores what it does not know."""
    item = manifests.Item("json", file="metadata")
    gone = manifests.Reduction(("opt_state",), "params_only(latest(1))", 5.0)
    manifest = manifests.Manifest(step=1, time=1.0, items={"step": item}, reduced=gone)
    data = manifests.encode(manifest)
    assert data.startswith(b'{"format":1,')
    assert manifests.decode(data, step=1, path="") == manifest


@pytest.mark.parametrize(
    "body", ["null", "[]", '{"items":[1],"by":"","time":1}', '{"items":[],"by":"","time":1e11}', '{"items":[]}']
)
def test_a_reduction_that_says_something_else_is_damage(body):
    text = (
        b'{"format":1,"step":1,"time":1,"metrics":{},"metadata":{},"versions":{},"items":{},"files":{},"reduced":'
    )
    text += body.encode()
    with pytest.raises(ckptmgr.CorruptCheckpointError, match="reduced"):
        manifests.decode(text + manifests._seal(text), step=1, path="")


# ---------------------------------------------------------------- which steps


def info(step, time=0.0, *, is_reduced=False, pinned=False, **metrics):
    said = "reduced" if is_reduced else None
    return CheckpointInfo(step=step, time=time, metrics=metrics, pinned=pinned, reduced=said)


plain = st.one_of(
    st.integers(1, 4).map(latest),
    st.integers(1, 9).map(every_steps),
    st.integers(1, 3).map(lambda n: best("loss", n)),
)
infos = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 9), st.booleans(), st.integers(0, 5)),
    min_size=1, max_size=12, unique_by=lambda each: each[0],
)  # fmt: skip


@given(infos, st.lists(plain, max_size=2), st.lists(plain, min_size=1, max_size=2))
def test_only_what_nothing_else_keeps_is_reduced_and_never_what_training_resumes_from(found, whole, alone):
    history = [
        info(step, is_reduced=is_reduced, pinned=luck == 0, loss=loss)
        for step, loss, is_reduced, luck in sorted(found)
    ]
    pinned = {each.step for each in history if each.pinned}
    keep = [*whole, *map(params_only, alone)]
    reasons = policies.reasons_to_keep(keep, history, pinned)
    to_reduce = policies.to_reduce(keep, reasons)
    wanted = {step for policy in alone for step in policy.keep(history)}
    other = {step for policy in whole for step in policy.keep(history)}
    full = [each.step for each in history if not each.reduced]
    assert set(to_reduce) <= wanted - other - pinned - {history[-1].step}
    if full:  # the newest that has everything is kept, and is not reduced
        assert reasons[full[-1]]
        assert full[-1] not in to_reduce
    for step in wanted - other - pinned - {history[-1].step} - set(full[-1:]):
        last_saved = "last saved" in reasons[step]
        assert (step in to_reduce) == (not last_saved)


def test_a_policy_that_fails_reduces_nothing():
    class Broken:
        def keep(self, history):
            raise RuntimeError("broken")

    keep = [latest(1), params_only(Broken()), params_only(every_steps(2))]
    reasons = policies.reasons_to_keep(keep, [info(step) for step in (2, 4, 6)], set())
    assert policies.to_reduce(keep, reasons) == {}


def test_policies_of_orbax_numbers_and_ours_can_be_wrapped(tmp_path):
    stock = ocp.checkpoint_managers.LatestN(3)
    with CheckpointManager(tmp_path, keep=[latest(1), params_only(stock)]) as manager:
        save(manager, 1, 2, 3, 4)
        assert (manager.steps(), reduced(manager)) == ([2, 3, 4], [2, 3])
        assert manager.info(3).kept == ("params_only(LatestN(n=3))",)
    assert params_only(2) == params_only(latest(2))
    with CheckpointManager(tmp_path, keep=[1, params_only(best("loss", mode="max"))]) as manager:
        assert manager.best() == 2
        assert manager.restore("best", params=params(0)).step == 2


@pytest.mark.parametrize("wrong", [True, None, "latest", latest, params_only(3), [latest(2)], 0.5])
def test_what_is_no_keep_policy_is_refused(wrong):
    with pytest.raises(TypeError, match="params_only takes a whole number or a keep policy, not"):
        params_only(wrong)
    with pytest.raises(ValueError, match="params_only takes a positive whole number, not 0"):
        params_only(0)


@pytest.mark.parametrize(
    "policy", [latest(3), every_steps(1000), best("loss", 2, "max"), ckptmgr.every_seconds(5)]
)
def test_it_is_spelled_and_parsed(policy):
    spelled = policies.spell(params_only(policy))
    assert spelled == f"params-only:{policies.spell(policy)}"
    assert policies.parse(spelled) == policies.parse(spelled.replace("-", "_", 1)) == params_only(policy)
    assert eval(repr(params_only(policy)), vars(ckptmgr)) == params_only(policy)
    assert policies.parse(spelled.replace("every_", "every-")) == params_only(policy)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("params-only:oldest:3", r"^unknown policy 'oldest:3'; known are latest:N, "),
        ("params-only:params-only:latest:3", r"^unknown policy 'params-only:params-only:latest:3'; known are "),
        (
            "params-only:1000",
            "^'params-only:1000' does not say which steps: params-only:latest:1000, or params-only:every",
        ),
        ("params-only:every-steps:x", "^'every-steps:x' is not of the form every_steps:N$"),
        ("params-only", "^unknown policy ''"),
        ("latest", "^'latest' is not of the form latest:N$"),
        ("best:loss:most", r"^'best:loss:most' is not of the form best:METRIC\[:min|max\[:N\]\]$"),
        ("params-only:" * 10_000, "^unknown policy"),
    ],
    ids=lambda text: text[:30],
)
def test_of_a_text_that_is_no_policy_it_is_said_which_part_is_wrong(text, said):
    with pytest.raises(ValueError, match=said):
        policies.parse(text)


def test_a_pinned_step_and_one_that_another_policy_keeps_stay_whole(tmp_path):
    keep = [latest(1), best("loss", mode="max"), params_only(every_steps(10))]
    with CheckpointManager(tmp_path, keep=keep) as manager:
        save(manager, 10, 20)
        manager.pin(20)
        save(manager, 30, 40)
        assert (manager.steps(), reduced(manager)) == ([10, 20, 30, 40], [30])  # the first has the largest loss
        manager.unpin(20)
        save(manager, 50)
        assert reduced(manager) == [20, 30, 40]


def test_a_state_that_holds_the_parameters_is_left_whole_and_that_is_said_once(tmp_path, caplog):
    with CheckpointManager(tmp_path, keep=[latest(1), params_only(3)]) as manager:
        for step in (5, 10, 20, 30):
            manager.save(step, None, {"x": jnp.full(3, step)})
            manager.wait()
        assert (manager.steps(), reduced(manager)) == ([10, 20, 30], [])
        assert_trees_equal(
            manager.restore(10, opt_state={"x": jnp.zeros(3, int)}).opt_state, {"x": jnp.full(3, 10)}
        )
    assert caplog.text.count("step 5: it has no params, so its opt_state may hold them") == 1
    assert caplog.text.count("leaves steps whole") == 1


def test_a_step_with_params_alone_and_one_of_stock_orbax_are_left_as_they_are(tmp_path, caplog):
    with ocp.CheckpointManager(tmp_path) as stock:
        given = {"params": ocp.args.StandardSave(params(10)), "opt_state": ocp.args.StandardSave(params(10))}
        stock.save(10, args=ocp.args.Composite(**given))
    with CheckpointManager(tmp_path, keep=[latest(1), params_only(every_steps(10))]) as manager:
        manager.save(20, params(20))
        save(manager, 30)
        assert (manager.steps(), reduced(manager)) == ([10, 20, 30], [])
        assert set(manager.info(10).items) == {"params", "opt_state"}
    assert caplog.text.count("a params-only policy leaves steps whole") == 1
    assert "step 10: ckptmgr did not write it" in caplog.text


def test_while_the_newest_is_not_whole_nothing_is_reduced_and_the_newest_whole_step_stays(tmp_path):
    with CheckpointManager(tmp_path, keep=[latest(9), params_only(every_steps(10))]) as manager:
        save(manager, 10, 20, 30)
    with CheckpointManager(tmp_path, keep=[latest(1), params_only(every_steps(10))]) as manager:
        save(manager, 40)
        assert reduced(manager) == [10, 20, 30]
        next((tmp_path / "40" / "opt_state" / "d").iterdir()).unlink()
    with CheckpointManager(tmp_path, keep=[params_only(every_steps(10))]) as manager:
        save(manager, 35)  # below the damaged one
        save(manager, 36)
        assert (manager.steps(), reduced(manager)) == ([10, 20, 30, 35, 36, 40], [10, 20, 30])
        with pytest.raises(ckptmgr.CorruptCheckpointError):
            manager.restore(40, opt_state=opt_state(0))
        assert manager.restore(opt_state=opt_state(0)).step == 36


def other(history, pinned, keep):
    """What else keeps a step: an oracle for one `latest` and perhaps one `best`."""
    steps = sorted(history)
    kept = {*steps[-keep[0].n :], *pinned}
    if len(keep) > 2:
        kept.add(max(step for step in steps if history[step] == min(history.values())))
    return kept


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(counted(5, full=200)))
def test_whatever_happens_training_resumes_from_the_newest_whole_step(seed, tmp_path):
    draw = random.Random(seed)
    keep = [latest(draw.randint(1, 3)), params_only(every_steps(draw.choice([2, 3, 10])))]
    keep += [best("loss")] * draw.randint(0, 1)
    manager, history, pinned, gone = CheckpointManager(tmp_path, keep=keep), {}, set(), set()
    for step in sorted(draw.sample(range(40), 12)):
        history[step] = draw.random()
        manager.save(step, params(step), opt_state(step), metrics={"loss": history[step]})
        manager.wait()
        history = {each: loss for each, loss in history.items() if each in manager.steps()}
        new = set(reduced(manager)) - gone
        assert not new & other(history, pinned, keep)
        gone |= new
        assert manager.info(step).reduced is None
        found = manager.restore(params=params(0), opt_state=opt_state(0))
        assert_trees_equal((found.params, found.opt_state), (params(step), opt_state(step)))
        for each in gone & history.keys():
            assert_trees_equal(manager.restore(each, params=params(0)).params, params(each))
        if draw.random() < 0.3:
            chosen = draw.choice(sorted(history))
            (pinned.discard if chosen in pinned else pinned.add)(chosen)
            (manager.pin if chosen in pinned else manager.unpin)(chosen)
        if draw.random() < 0.3:
            manager.close()
            manager = CheckpointManager(tmp_path, keep=keep)
    manager.close()
    assert not leftovers(tmp_path)


# ---------------------------------------------------------------- going on from there


def test_a_restore_of_the_newest_passes_over_a_milestone_that_lacks_what_is_asked_for(tmp_path, caplog):
    with CheckpointManager(
        tmp_path, keep=[latest(1), best("loss", mode="max"), params_only(every_steps(10))]
    ) as manager:
        save(manager, 5, 10, 15)
        assert (manager.steps(), reduced(manager)) == ([5, 10, 15], [10])
        manager.delete(15)
        assert manager.restore(params=params(0)).step == 10
        found = manager.restore(params=params(0), opt_state=opt_state(0))
        assert (found.step, list(found.skipped)) == (5, [10])
        assert "step 10 is passed over: step 10 was reduced to its params" in caplog.text
        manager.delete(5)
        with pytest.raises(ckptmgr.ReducedCheckpointError, match=WHY) as told:
            manager.restore_or(params=params(0), opt_state=opt_state(0))
        assert str(told.value).endswith(
            "no opt_state. Leave this template out: no other step can be restored with it"
        )
        assert (told.value.step, told.value.items) == (10, ("opt_state",))


def test_a_restore_without_templates_says_that_a_milestone_is_all_there_is(run, caplog):
    with CheckpointManager(run, keep=KEEP) as manager:
        for step in (15, 20):
            manager.delete(step)
        said = "it is restored without the rest"
        assert (manager.restore(params=params(0)).step, said in caplog.text) == (10, False)
        assert (manager.restore(10).opt_state, said in caplog.text) == (None, False)  # by its number
        assert (manager.restore().opt_state, said in caplog.text) == (None, True)


def test_a_rewind_to_a_milestone_says_that_training_cannot_be_resumed_from_it(run, caplog):
    with CheckpointManager(run, keep=KEEP) as manager:
        manager.rewind(15)
        assert "restore(params=...) restores it" not in caplog.text
        manager.rewind(10)
        assert "the run goes on from step 10, which was reduced to its params by params_only" in caplog.text
        manager.rewind(20)
        assert manager.steps() == [10, 15, 20]


def test_what_was_set_aside_after_a_step_comes_back_although_the_step_was_reduced_since(tmp_path):
    """The branch knows the step by its manifest, which is another now."""
    with CheckpointManager(tmp_path) as manager:
        save(manager, 10, 15, 20)
        manager.rewind(10)
    with CheckpointManager(tmp_path, keep=[latest(1), params_only(every_steps(10))]) as manager:
        save(manager, 12)
        assert (manager.steps(), reduced(manager)) == ([10, 12], [10])
        manager.rewind(20)
        assert manager.steps() == [10, 15, 20]


def test_a_milestone_is_no_new_checkpoint_for_who_watches(anywhere):
    with CheckpointManager(anywhere, keep=KEEP) as manager:
        save(manager, 10)
        watching = CheckpointManager(anywhere, read_only=True).watch(timeout_s=1, poll_s=0.01)
        assert next(watching) == 10
        save(manager, 15, 20)
        assert reduced(manager) == [10]
        assert list(watching) == [15, 20]


# ---------------------------------------------------------------- at every moment


def whole_before_or_after(run, *, is_whole=None):
    """Step 10 is there, whole, with all its items or with its params alone; returns which."""
    with CheckpointManager(run, read_only=True) as reader:
        found = reader.info(10)
        assert reader.verify(10)
        assert_trees_equal(reader.restore(10, params=params(0)).params, params(10))
        if found.reduced is None:
            assert_trees_equal(reader.restore(10, opt_state=opt_state(0)).opt_state, opt_state(10))
            assert reader.restore(10, extras={"data": {}}).extras["data"] == {"at": 10}
        else:
            with pytest.raises(ckptmgr.ReducedCheckpointError):
                reader.restore(10, opt_state=opt_state(0))
        return found.reduced is None


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A run whose step 10 can be reduced, and an entry of somebody's in it."""
    run = tmp_path_factory.mktemp("ready") / "run"
    with CheckpointManager(run) as manager:
        save(manager, 10, 15)
    return run


@pytest.mark.soak
@pytest.mark.parametrize("how", [[], ["no-exchange"]], ids=["swapped", "renamed"])
def test_killed_at_each_moment_a_step_is_whole_before_or_after_and_nothing_is_left_over(how, ready, tmp_path):
    seen, moment = [], 0
    for moment in itertools.count(1, counted(3, full=1)):
        run = tmp_path / str(moment) / "run"
        shutil.copytree(ready, run)
        done = warm.run([reducer.__file__, run, 10, moment, *how])
        is_listed = (run / "10" / manifests.NAME).exists()
        assert is_listed or how  # two renames leave a moment, which the next start ends
        if is_listed:
            before = whole_before_or_after(run)
        CheckpointManager(run).close()
        assert not leftovers(run)
        seen.append(whole_before_or_after(run))
        assert not is_listed or seen[-1] == before
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        shutil.rmtree(run)
    assert moment > 30
    assert seen == sorted(seen, reverse=True)  # first it is whole, and after one moment it is reduced
    assert set(seen) == {True, False}


def test_what_was_interrupted_is_done_by_the_next_retention(ready, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(ready, run)
    assert warm.run([reducer.__file__, run, 10, 20]).returncode == -signal.SIGKILL
    assert leftovers(run)
    with CheckpointManager(run, keep=[latest(1), params_only(every_steps(10))]) as manager:
        save(manager, 20)
        assert (manager.steps(), reduced(manager)) == ([10, 20], [10])
    assert not leftovers(run)


def test_an_error_of_the_disk_leaves_the_step_whole_and_the_next_save_tries_again(tmp_path, monkeypatch, caplog):
    with CheckpointManager(tmp_path, keep=KEEP) as manager:
        save(manager, 10, 15)
        with monkeypatch.context() as patch:
            faults.install("full link 1", patch.setattr)
            save(manager, 20)
        assert "step 10 could not be reduced to its params" in caplog.text
        assert whole_before_or_after(tmp_path)
        save(manager, 25)
        assert not whole_before_or_after(tmp_path)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("what", ["pins", "replaces"])
def test_a_step_that_is_pinned_or_replaced_meanwhile_stays_whole(
    what, can_exchange, tmp_path, monkeypatch, caplog
):
    """At the last moment: just before the swap, after the last look."""
    swap, acted = local.LocalDirectory._swap, []

    def act(self, draft, final):
        if not acted:
            acted.append(final)
            if what == "pins":
                (final / names.PIN).touch()
            else:
                text = (final / manifests.NAME).read_bytes()
                (final / manifests.NAME).write_bytes(text[:-1] + b" \n")
        return swap(self, draft, final)

    monkeypatch.setattr(local.LocalDirectory, "_swap", act)
    if not can_exchange:
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    with CheckpointManager(tmp_path, keep=KEEP) as manager:
        save(manager, 10, 15, 20)
    assert acted == [epath.Path(tmp_path / "10")]
    assert "step 10 was replaced or pinned meanwhile" in caplog.text
    assert (tmp_path / "10" / "opt_state").is_dir()
    CheckpointManager(tmp_path).close()
    assert not leftovers(tmp_path)


def test_a_restore_that_meets_the_exchange_begins_again(tmp_path, monkeypatch):
    with CheckpointManager(tmp_path) as manager:
        save(manager, 10, 15)
        reader, check = CheckpointManager(tmp_path, read_only=True), recorded.check_files

        def overtaken(*args, **options):
            if not reduced(manager):
                manager._catalog.remove(*manager._catalog.reduce(10, "params_only(every_steps(10))", 0.0))
            return check(*args, **options)

        monkeypatch.setattr(recorded, "check_files", overtaken)
        with pytest.raises(ckptmgr.ReducedCheckpointError, match="no opt_state"):
            reader.restore(10, params=params(0), opt_state=opt_state(0))
        assert_trees_equal(reader.restore(10, params=params(0)).params, params(10))


def test_a_step_on_another_disk_is_left_as_it_is(tmp_path, caplog):
    with CheckpointManager(tmp_path / "run") as manager:
        save(manager, 10, 15)
    shutil.move(tmp_path / "run" / "10", tmp_path / "elsewhere")
    (tmp_path / "run" / "10").symlink_to(tmp_path / "elsewhere")
    with CheckpointManager(tmp_path / "run", keep=[latest(1), params_only(every_steps(10))]) as manager:
        save(manager, 20)
    assert "is a symlink" in caplog.text
    assert (tmp_path / "elsewhere" / "opt_state").is_dir()
    assert whole_before_or_after(tmp_path / "run")


# ---------------------------------------------------------------- in a bucket


@pytest.fixture(params=["gs", "s3"])
def far(request, tmp_path):
    return at(request.param, request, tmp_path)


def objects_of(run, step):
    return sorted(bucket.objects.below(epath.Path(run) / str(step)))


def items_in(run):
    return {name.partition("/")[0] for name in objects_of(run, 10) if "/" in name}


FEW = {"params", "step", "metrics"}


@pytest.mark.parametrize("kind", ["fail", "refuse"])
def test_items_whose_deletion_fails_are_deleted_by_the_next_start(far, kind, monkeypatch):
    with CheckpointManager(far, keep=KEEP) as manager:
        save(manager, 10, 15)
        with monkeypatch.context() as patch:
            faults.install(f"{kind} remove 1", patch.setattr)
            save(manager, 20)
        assert reduced(manager) == [10]
        assert "opt_state" in items_in(far)
        assert manager.verify(10)
        with pytest.raises(ckptmgr.ReducedCheckpointError):
            manager.restore(10, opt_state=opt_state(0))
    CheckpointManager(far).close()
    assert items_in(far) == FEW
    assert not CheckpointManager(far, read_only=True)._catalog.leftovers()


@pytest.mark.soak
def test_killed_at_each_request_a_step_in_a_bucket_is_whole_before_or_after(far):
    seen = []
    for moment in itertools.count(1, counted(5, full=1)):
        run = f"{far}/{moment}"
        with CheckpointManager(run) as manager:
            save(manager, 10, 15)
        done = warm.run([reducer.__file__, run, 10, moment])
        before = whole_before_or_after(run)
        CheckpointManager(run).close()
        seen.append(whole_before_or_after(run))
        assert seen[-1] == before
        assert items_in(run) == (FEW | {"opt_state", "ema", "data"} if before else FEW)
        assert not CheckpointManager(run, read_only=True)._catalog.leftovers()
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert moment > 6
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {True, False}


def test_a_manifest_that_could_not_be_written_leaves_the_step_whole(far, monkeypatch, caplog):
    with CheckpointManager(far, keep=KEEP) as manager:
        save(manager, 10, 15)
        with monkeypatch.context() as patch:
            store = manager._catalog._storage._real._objects
            patch.setattr(store, "replace", lambda key, *rest: None)  # the claim has a store of its own
            save(manager, 20)
        assert "step 10 was replaced meanwhile" in caplog.text
        assert manager.restore(10, opt_state=opt_state(0)).step == 10
    CheckpointManager(far).close()  # removes the note alone
    assert whole_before_or_after(far)
    assert not CheckpointManager(far, read_only=True)._catalog.leftovers()


def test_a_step_in_a_bucket_that_was_saved_anew_meanwhile_keeps_its_manifest(far):
    file = epath.Path(far) / "10" / manifests.NAME
    with CheckpointManager(far) as manager:
        save(manager, 10, 15)
        old = file.read_bytes()
        manager.delete(10)
        save(manager, 10)
        new, catalog = file.read_bytes(), manager._catalog
        manifest = reducing.reduced(reducing.decode(old, 10), "params_only(latest(1))", 0.0)
        with pytest.raises(ckptmgr.SaveError, match="step 10 was replaced meanwhile"):
            catalog._storage.reduce("10", manifest, old)
        assert file.read_bytes() == new


def test_a_restore_in_a_bucket_that_is_overtaken_says_what_happened(far, monkeypatch):
    with CheckpointManager(far) as manager:
        save(manager, 10, 15)
        reader, check = CheckpointManager(far, read_only=True), recorded.check_files

        def overtaken(*args, **options):
            if "opt_state" in items_in(far):
                manager._catalog.remove(*manager._catalog.reduce(10, "params_only(every_steps(10))", 0.0))
            return check(*args, **options)

        monkeypatch.setattr(recorded, "check_files", overtaken)
        with pytest.raises(ckptmgr.ReducedCheckpointError, match="no opt_state"):
            reader.restore(10, params=params(0), opt_state=opt_state(0))


# ---------------------------------------------------------------- the mirror


def away(directory):
    return CheckpointManager(directory, read_only=True)


@pytest.fixture(params=["disk", "s3"])
def mirror(request, tmp_path):
    return at(request.param, request, tmp_path).replace("/run", "/away")


def test_the_mirror_makes_milestones_of_its_own(mirror, tmp_path):
    with CheckpointManager(tmp_path / "home", keep=2, mirror=mirror, mirror_keep=KEEP) as manager:
        save(manager, 10, 15, 20, 25)
        assert (manager.steps(), reduced(manager)) == ([20, 25], [])
    assert (away(mirror).steps(), reduced(away(mirror))) == ([10, 20, 25], [10])
    assert away(mirror).verify(10)


def test_what_was_reduced_at_home_is_whole_in_a_mirror_that_keeps_all_and_comes_from_there(mirror, tmp_path):
    options = {"keep": KEEP, "mirror": mirror}
    with CheckpointManager(tmp_path / "home", **options) as manager:
        save(manager, 10, 15, 20)
        assert reduced(manager) == [10]
        copied = away(mirror)._catalog.stamp(10)
        save(manager, 25)
        assert (away(mirror).steps(), reduced(away(mirror))) == ([10, 15, 20, 25], [])
        assert away(mirror)._catalog.stamp(10) == copied  # it is not taken for another save
        found = manager.restore(10, params=params(0), opt_state=opt_state(0))
        assert_trees_equal(found.opt_state, opt_state(10))


def test_a_step_that_was_reduced_before_it_was_copied_is_copied_as_it_is(run, mirror):
    with CheckpointManager(run, keep=KEEP, mirror=mirror) as manager:
        manager.wait()
        assert reduced(away(mirror)) == [10]
        assert away(mirror).verify(10)
        with pytest.raises(ckptmgr.ReducedCheckpointError, match=WHY):
            manager.restore(10, opt_state=opt_state(0))


def test_a_step_is_not_reduced_before_it_was_copied(tmp_path, monkeypatch):
    """The first copy takes its time; meanwhile three more are saved."""
    put, goes_on = transfer.put, threading.Event()
    monkeypatch.setattr(transfer, "put", lambda *given: (goes_on.wait(60), put(*given))[1])
    with CheckpointManager(tmp_path / "home", keep=KEEP, mirror=tmp_path / "away") as manager:
        for step in (10, 15, 20, 25):
            manager.save(step, params(step), opt_state(step)).result()
        is_whole = (tmp_path / "home" / "10" / "opt_state").is_dir()  # retention has run after step 20
        goes_on.set()
        manager.wait()
        assert is_whole
        assert reduced(manager) == [10]
        assert reduced(away(tmp_path / "away")) == []
