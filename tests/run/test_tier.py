"""Parts of steps on the machines of a job: which belong together, which are kept, and how they come to others."""

import os
import shutil
import socket
import subprocess
import urllib.error
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.checkpoint_managers as orbax
import pytest
from conftest import counted
from etils import epath
from hypothesis import example, given
from hypothesis import strategies as st

import ckptmgr
from ckptmgr import CheckpointManager
from ckptmgr.format import names
from ckptmgr.run import peers
from ckptmgr.run import tier as tiers
from ckptmgr.run.tier import Group, Part, Tier
from ckptmgr.testing import assert_trees_equal

# ---------------------------------------------------------------- what belongs together

groups = st.builds(Group, st.integers(1, 3), st.integers(0, 3), st.integers(0, 5), st.integers(1, 4))


@given(st.lists(st.sets(st.tuples(groups, st.integers(0, 3))), min_size=1, max_size=4))
@example([{(Group(2, 0, 5, 1), 0), (Group(1, 0, 4, 1), 0)}])  # an earlier start
@example([{(Group(1, 1, 4, 1), 0), (Group(1, 0, 5, 1), 0)}])  # a higher step, saved before
def test_a_step_is_complete_if_each_part_of_one_save_is_somewhere(machines):
    reports = [
        {Part(group, process): 10.0 * process for group, process in parts if process < group.processes}
        for parts in machines
    ]
    held = {part for parts in reports for part in parts}
    whole = {group for group, _ in held if all(Part(group, process) in held for process in range(group.processes))}
    found = tiers.complete(reports)
    newest = max((group.start for group in whole), default=0)
    ours = sorted((group for group in whole if group.start == newest), reverse=True)
    assert [each.group for each in found] == [
        group for group in ours if not any(later.step <= group.step for later in ours if later > group)
    ]
    for each in found:
        assert each.time == 0.0  # of the first part
        for process, holders in enumerate(each.holders):
            assert holders
            assert all(Part(each.group, process) in reports[holder] for holder in holders)


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12))
def test_each_process_keeps_the_part_of_one_on_another_host_wherever_that_can_be(hosts):
    found = tiers.neighbours(hosts)
    assert sorted(found) == list(range(len(hosts)))
    if len(hosts) > 1:
        assert all(found[process] != process for process in range(len(hosts)))
    if max(map(hosts.count, hosts)) * 2 <= len(hosts):
        assert all(hosts[found[process]] != hosts[process] for process in range(len(hosts)))


def test_of_one_process_the_neighbour_is_itself():
    assert tiers.neighbours(["a"]) == [0]


@given(st.lists(groups, unique=True), groups, st.integers(1, 4))
def test_so_many_steps_are_kept_and_none_that_the_run_has_gone_back_from(tmp_path_factory, earlier, newest, most):
    tier = Tier(epath.Path(tmp_path_factory.mktemp("tier")), "run")
    for group in {*earlier, newest}:
        tier.path(Part(group, 0)).mkdir(parents=True)
    tier.keep(most, newest)
    left = {part.group for part in tier.parts()}
    assert newest in left
    before = sorted((g for g in {*earlier} - {newest} if g < newest and g.step < newest.step), reverse=True)
    assert left - {newest} == set(before[: most - 1])


# ---------------------------------------------------------------- one process


def state(step):
    return {
        "w": jnp.full((256, 256), step, jnp.float32),
        "key": jax.random.key(step),
        "keys": jax.random.split(jax.random.key(step), 3),
        "empty": jnp.zeros((0, 3)),
        "bits": jnp.arange(5) % 2 == step % 2,
        "small": jnp.arange(4, dtype=jnp.int4),
        "numpy": np.arange(5) + step,
        "number": step,
    }


class Run:
    def __init__(self, path):
        self.path, self.local = path / "run", path / "local"

    def open(self, **options):
        given = {"save_every": 100, "local": self.local, "local_every": 10, **options}
        return CheckpointManager(self.path, **given)

    def parts(self):
        return sorted(self.local.glob("*/*.*.*.*/*"))


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


EVERY_TEN = orbax.FixedIntervalPolicy(10)


@pytest.mark.parametrize("policy", [EVERY_TEN, orbax.AnySavePolicy([EVERY_TEN, orbax.SpecificStepsPolicy([3])])])
def test_policies_of_orbax_say_when_to_save_locally(run, policy):
    with run.open(local_every=policy) as manager:
        for step in range(1, 25):
            manager.save(step, state(step))
        manager.wait()
        assert manager.steps() == []  # none is durable
        assert manager.restore().step == 20


def test_the_newest_step_comes_back_from_where_it_is(run):
    with run.open() as manager:
        for step in range(95, 116):
            manager.save(step, state(step), extras={"at": step})
        manager.wait()
        assert manager.steps() == [100]
        found = manager.restore(params=state(0), extras={"at": 0})
        assert (found.step, found.extras["at"], found.resumed) == (110, 110, True)
        assert_trees_equal(found.params, state(110))
        assert found.info.source.startswith(str(run.local))
    assert len(run.parts()) == 2  # steps 100 and 110
    with run.open() as manager:
        found = manager.restore_or(params=state(0), extras={"at": 0})
        assert_trees_equal(found.params, state(110))
        assert_trees_equal(manager.restore(100, params=state(0)).params, state(100))
        assert manager.restore(100, params=state(0)).info.source.startswith(str(run.local))  # of the same save
    with CheckpointManager(run.path) as manager:
        found = manager.restore(params=state(0))
        assert (found.step, found.info.source) == (100, str(run.path))


def test_the_result_of_a_local_save_says_where_it_is(run):
    with run.open() as manager:
        assert not manager.save(9, state(9))
        saved = manager.save(10, state(10))
        assert (saved.reason, saved.result().step) == ("due by local_every", 10)
        assert saved.result().source.startswith(str(run.local))
        both = manager.save(100, state(100))
        assert (both.reason, both.result().source) == ("due", None)


def test_no_step_of_an_earlier_run_in_the_same_directory_is_taken(run):
    with run.open() as manager:
        manager.save(10, state(10)).result()
    run.path.rename(run.path.with_name("moved"))
    with run.open() as manager:
        assert not manager.restore_or(params=state(0)).resumed
        manager.save(20, state(20)).result()
    run.path.rename(run.path.with_name("second"))
    run.path.with_name("moved").rename(run.path)
    with run.open() as manager:
        assert manager.restore().step == 10


def test_a_run_that_goes_back_saves_the_same_numbers_again(run):
    with run.open() as manager:
        for step in range(10, 60, 10):
            manager.save(step, state(step))
        manager.wait()
        manager.save(30, state(1030)).result()
        found = manager.restore(params=state(0))
        assert found.step == 30
        assert_trees_equal(found.params, state(1030))


def test_a_rewind_forgets_what_was_saved_locally(run):
    with run.open() as manager:
        for step in range(90, 131):
            manager.save(step, state(step))
        manager.rewind(100)
        assert manager.restore().step == 100
        assert run.parts() == []
        manager.save(110, state(110)).result()
        assert manager.restore().step == 110


def test_a_rewind_by_a_manager_without_local_saves_counts_too(run):
    with run.open() as manager:
        for step in range(90, 131):
            manager.save(step, state(step))
    with CheckpointManager(run.path) as manager:
        manager.rewind(100)
    with run.open() as manager:
        assert manager.restore().step == 100


def test_a_rewind_by_another_manager_of_the_process_counts_at_once(run):
    with run.open() as manager, CheckpointManager(run.path) as other:
        for step in range(90, 131):
            manager.save(step, state(step))
        manager.wait()
        other.rewind(100)
        assert manager.restore().step == 100
        assert other.restore().step == 100
        manager.save(120, state(120)).result()  # locally
        assert manager.restore().step == 120
    with run.open() as manager:
        assert manager.restore().step == 120


@pytest.mark.parametrize(
    "data", [b"", b"0123456789abcdef", b"0123456789abcdef x", b"\xff\xfe 1", b"../../../etc/ab 12"]
)
def test_a_damaged_identity_is_named_before_anything_is_moved(run, tmp_path, data):
    with run.open(mirror=tmp_path / "away") as manager:
        for step in (100, 110, 200):
            manager.save(step, state(step))
        manager.wait()
        (run.path / names.RUN).write_bytes(data)
        with pytest.raises(ckptmgr.CheckpointError, match=r"\.ckptmgr/run is damaged: .*Remove the file"):
            manager.rewind(100)
        for directory in (run.path, tmp_path / "away"):
            assert CheckpointManager(directory, read_only=True).steps() == [100, 200]
    with pytest.raises(ckptmgr.CheckpointError, match=r"\.ckptmgr/run is damaged"):
        run.open()
    (run.path / names.RUN).unlink()
    with run.open() as manager:
        assert manager.restore().step == 200


def test_a_durable_step_that_was_saved_later_counts_although_it_is_lower(run):
    with run.open() as manager:
        for step in range(10, 70, 10):
            manager.save(step, state(step))
        manager.wait()
        manager.save(27, state(27), force=True).result()
        assert manager.restore().step == 27
        manager.save(30, state(30)).result()
        assert manager.restore().step == 30


def test_a_step_that_is_deleted_is_gone_from_the_local_parts_too(run):
    with run.open() as manager:
        for step in (90, 100, 200):
            manager.save(step, state(step)).result()
        manager.delete(200)
        assert manager.restore().step == 100


def test_a_copy_of_a_run_is_another_run(run):
    with run.open() as manager:
        manager.save(100, state(100)).result()
        manager.save(110, state(110)).result()
    shutil.copytree(run.path, run.path.with_name("copy"))
    with CheckpointManager(run.path.with_name("copy"), local=run.local) as manager:
        assert manager.restore().step == 100
    with run.open() as manager:
        assert manager.restore().step == 110


def test_what_is_asked_wrongly_is_no_damage(run):
    with run.open() as manager:
        manager.save(100, state(100)).result()
        manager.save(110, state(110)).result()
        for _ in range(2):
            with pytest.raises(ckptmgr.StructureMismatchError):
                manager.restore(params={"another": jnp.zeros(3)})
            with pytest.raises(ValueError, match="matches no leaf"):
                manager.restore(params=state(0), rename={"nothing": "something"})
        assert manager.restore(params=state(0)).step == 110


def test_a_local_step_that_cannot_be_had_leaves_its_number_free(run, monkeypatch):
    with run.open() as manager:
        manager.save(100, state(100)).result()
        manager.save(110, state(110)).result()
        with monkeypatch.context() as patch:
            patch.setattr("ckptmgr.run.nearby.Gathering.begin", lambda self: os.stat("/nothing"))
            found = manager.restore(params=state(0))
            assert (found.step, list(found.skipped)) == (100, [110])
        manager.save(110, state(110), force=True).result()
        assert manager.steps() == [100, 110]


def test_of_two_saves_of_a_step_the_durable_one_counts(run):
    """The local one is older: the step was replaced by a process without local=."""
    with run.open() as manager:
        manager.save(100, state(100)).result()
        manager.wait()
    with CheckpointManager(run.path) as manager:
        manager.save(100, state(7), on_exists="replace").result()
    with run.open() as manager:
        found = manager.restore(params=state(0))
        assert_trees_equal(found.params, state(7))
        assert found.info.source == str(run.path)


def test_a_distrusted_step_is_not_taken_from_the_local_parts_either(run):
    with run.open(save_every=50) as manager:
        for step in (50, 100):
            manager.save(step, state(step)).result()
        manager.distrust(100, why="the loss is odd")
        assert manager.restore().step == 50


def test_a_local_directory_that_cannot_be_used_leaves_the_run_free(run, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        run.open(local=tmp_path / "file" / "local")
    with run.open() as manager:
        manager.save(10, state(10)).result()


def test_a_synchronous_save_is_whole_when_it_returns(run):
    with run.open(asynchronous=False) as manager:
        assert manager.save(10, state(10)).done()
        assert len(run.parts()) == 1


@pytest.mark.parametrize("nonfinite", ["distrust", "refuse"])
def test_a_local_step_with_nan_is_not_kept(run, nonfinite):
    with run.open(nonfinite=nonfinite) as manager:
        manager.save(10, {"w": jnp.ones(3)}).result()
        saved = manager.save(20, {"w": jnp.array([1.0, jnp.nan, 1.0])})
        if nonfinite == "refuse":
            with pytest.raises(ckptmgr.SaveError, match="NaN"):
                saved.result()
        else:
            assert "NaN" in saved.result().distrusted
        assert manager.restore().step == 10
        manager.save(30, {"w": jnp.zeros(3)}).result()
        assert manager.restore().step == 30


@pytest.mark.soak
def test_nan_is_found_for_a_durable_step_that_is_local_too(run):
    with run.open(nonfinite="distrust", save_every=1, local_every=1) as manager:
        for step in range(1, counted(8, full=100)):
            saved = manager.save(step, {"w": jnp.array([1.0, jnp.nan]), "numpy": np.array([np.inf])})
            assert "NaN" in saved.result().distrusted
            assert "numpy" in saved.result().distrusted
        manager.wait()
        assert run.parts() == []


def test_the_arrays_may_be_donated_and_changed_at_once(run):
    update = jax.jit(lambda w: w + 1, donate_argnums=0)
    with run.open(local_every=1, save_every=2, local_keep=9) as manager:
        w, numbers = jnp.zeros((512, 512)), np.zeros(9)
        for step in range(1, 9):
            w = update(w)
            numbers += 1
            manager.save(step, {"w": w, "numbers": numbers})
        manager.wait()
        for step in range(1, 9):
            found = manager.restore(step)
            assert (found.params["w"] == step).all()
            assert (found.params["numbers"] == step).all()


def test_under_max_host_bytes_a_step_that_is_due_for_both_is_durable_alone(run):
    with run.open(max_host_bytes=1 << 16) as manager:
        manager.save(90, state(90)).result()
        manager.save(100, state(100)).result()
        manager.wait()
        assert [part.parent.name.split(".")[2] for part in run.parts()] == ["90"]
        assert_trees_equal(manager.restore(params=state(0)).params, state(100))
        manager.save(110, state(110)).result()
        assert_trees_equal(manager.restore(params=state(0)).params, state(110))


def test_what_a_killed_process_was_writing_is_removed_at_the_next_start(run):
    with run.open() as manager:
        manager.save(10, state(10)).result()
    [folder] = run.local.iterdir()
    live = Tier(epath.Path(run.local), folder.name).draft()  # of another manager in this process
    (folder / ".0123456789abcdef" / "10").mkdir(parents=True)
    with run.open():
        pass
    assert [each.name for each in folder.iterdir() if each.name.startswith(".")] == [live.name]


@pytest.fixture
def small(tmp_path):
    """A directory on a disk of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_local_disk_that_is_full_stops_neither_the_run_nor_its_durable_saves(run, small, caplog):
    run.local = small / "local"
    with run.open(local_every=10, save_every=20) as manager:
        manager.save(10, state(10)).result()
        free = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize
        (small / "ballast").write_bytes(bytes(free - 100_000))
        failed = manager.save(30, state(30))
        with pytest.raises(ckptmgr.SaveError, match="step 30"):
            failed.result()
        assert "step 30 could not be saved locally: " in caplog.text
        manager.save(50, state(50))  # nobody asks for its result
        manager.save(60, state(60)).result()
        assert manager.restore().step == 60
        (small / "ballast").unlink()
        manager.save(70, state(70)).result()
        assert manager.restore(params=state(0)).info.source.startswith(str(small))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local": "gs://bucket/run"}, "local takes a directory of each process's own machine"),
        ({"local_every": 5}, "local_every= needs a local directory"),
        ({"local_keep": 5}, "local_keep= needs a local directory"),
        ({"local_copies": 0}, "local_copies= needs a local directory"),
        ({"local": "x", "local_every": 0}, "local_every"),
        ({"local": "x", "local_every": ckptmgr.overhead(0.1)}, "ask neither what a save costs"),
        ({"local": "x", "local_every": orbax.ContinuousCheckpointingPolicy()}, "nor whether one is in progress"),
        ({"local": "x", "local_keep": 0}, "local_keep"),
        ({"local": "x", "local_copies": 2}, "local_copies takes 1"),
        ({"local": "x", "read_only": True}, "read_only=True contradicts local="),
        ({"local": "x", "reuse_unchanged": True}, "local= and reuse_unchanged=True cannot be combined"),
        ({"local": "run"}, "local='.*run' is the run itself"),
        ({"local": "run/5"}, "local='.*5' is in a step or in .ckptmgr/"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError), match=message):
        CheckpointManager("run", **options)


# ---------------------------------------------------------------- files of other processes


@pytest.fixture
def server(tmp_path):
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown" / "a b").write_bytes(b"x" * 10_000_000)
    (tmp_path / "hidden").write_bytes(b"secret")
    found = peers.Server(epath.Path(tmp_path / "shown"), "word")
    yield found
    found.close()


def test_files_come_whole_to_whoever_knows_the_secret(server, tmp_path):
    port = server.address[1]
    with peers.Peers([("127.0.0.1", port)], "word").opened(0) as peer:
        assert peer.read("a b") == b"x" * 10_000_000
        peer.fetch("a b", epath.Path(tmp_path / "got" / "it"))
        assert (tmp_path / "got" / "it").read_bytes() == b"x" * 10_000_000
        with pytest.raises(FileNotFoundError, match="process 0 does not have nothing"):
            peer.read("nothing")
        assert peer.read("a b")[:3] == b"xxx"  # the connection goes on
    with peers.Peers([("127.0.0.1", port)], "guess").opened(0) as peer, pytest.raises(FileNotFoundError):
        peer.read("a b")


@pytest.mark.parametrize("name", ["../hidden", "%2e%2e/hidden", "x/../../hidden", "/etc/passwd", ""])
def test_nothing_outside_of_the_folder_is_served(server, name):
    with pytest.raises(urllib.error.HTTPError, match=r"403|404"):
        urllib.request.urlopen(f"http://127.0.0.1:{server.address[1]}/word/{name}", timeout=10)


def test_a_peer_that_does_not_answer_is_an_error_of_the_system():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with peers.Peers([("127.0.0.1", port)], "word").opened(0) as peer, pytest.raises(ConnectionError):
        peer.read("anything")
