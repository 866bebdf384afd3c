"""Local saves (`local=`) in real jobs: machines that are lost, exchanged, damaged; other layouts; a full disk."""

import itertools
import json
import os
import random
import shutil
import signal
import time
import uuid
from pathlib import Path

import pytest
import warm
from conftest import SOAK, counted, free_port, in_background, on_servers
from etils import epath
from test_job import end

from benchmarks import counting
from ckptmgr.run import identity
from ckptmgr.run.tier import Tier

SCRIPT = Path(__file__).parents[1] / "tiered.py"
EVERY = {"save_every": 1000, "local_every": 2}


class Machines:
    """The directories of a run, and of the machines of its job."""

    def __init__(self, path):
        self.path = path

    def of(self, name):
        return self.path / str(name)

    def wipe(self, *names):
        for name in names:
            shutil.rmtree(self.of(name), ignore_errors=True)

    def parts(self, name):
        """The folders of parts on a machine, by step and process."""
        found = {}
        for folder in self.of(name).glob("*/*.*.*.*/*"):
            found[int(folder.parent.name.split(".")[2]), int(folder.name)] = folder
        return found

    def start(self, steps, names=range(4), devices=2, faults=None, **options):
        """Starts a job whose processes are on these machines, in this order."""
        port, names = free_port(), list(names)
        said = json.dumps({**EVERY, "hosts": [f"machine {name}" for name in names], **options})
        return [
            warm.start(
                [SCRIPT, self.of("run"), self.of(name), port, len(names), index, devices, steps, said],
                env=os.environ | {"CKPTMGR_FAULT": (faults or {}).get(index, "")},
            )
            for index, name in enumerate(names)
        ]

    def run(self, steps, names=range(4), **options):
        """Runs a job to its end: what each process resumed from, and the digest of each step."""
        return heard(self.start(steps, names, **options))


class Heard:
    """What one process said."""

    def __init__(self, lines):
        said = [line.split() for line in lines if line.startswith(("resumed", "done"))]
        self.resumed, self.source, self.digest, self.iterator = (
            (int(said[0][1]), said[0][2], said[0][3], int(said[0][4])) if said else (None, None, None, None)
        )
        self.digests = {int(step): digest for word, step, digest, *_ in said if word == "done"}
        self.saved = [int(line[1]) for line in said if line[0] == "done" and line[-1] == "1"]


def heard(processes, timeout_s=200):
    try:
        answers = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        end(processes)
    for process, (out, err) in zip(processes, answers, strict=True):
        assert process.returncode == 0, out + err[-3000:]
    return [Heard(out.splitlines()) for out, _ in answers]


def killed(processes, index, after):
    """Kills one of these processes after some steps, then all; returns what each had said."""
    said = []
    while sum(line.startswith("done") for line in said) < 7:
        said.append(processes[index].stdout.readline())
        assert said[-1], processes[index].stderr.read()[-3000:]
    time.sleep(after)
    for process in (processes[index], *processes):
        process.kill()
    out = [process.stdout.read() for process in processes]
    out[index] = "".join(said) + out[index]
    end(processes)
    return [Heard(text.rpartition("\n")[0].splitlines()) for text in out]  # the last line may be cut short


def same(found, step, digest):
    """Checks that all processes have resumed from a step with the same bits."""
    for index, each in enumerate(found):
        assert (each.resumed, each.digest) == (step, digest)
        yield index, each


@pytest.fixture
def machines(tmp_path):
    return Machines(tmp_path)


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A run of four machines that has ended after step 5, and the digest of each step."""
    machines = Machines(tmp_path_factory.mktemp("local"))
    return machines, machines.run(5)[0].digests


@pytest.fixture
def four(before, machines):
    shutil.copytree(before[0].path, machines.path, dirs_exist_ok=True)
    name = identity.find(epath.Path(machines.of("run"))).name  # a copied run is another run
    for machine in range(4):
        [folder] = machines.of(machine).iterdir()
        folder.rename(folder.with_name(name))
    return machines, before[1]


# ---------------------------------------------------------------- machines that are lost


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(counted(1, full=100)))
def test_any_one_machine_may_be_lost_at_any_moment(machines, seed):
    chance = random.Random(seed)
    lost = chance.randrange(4)
    said = killed(machines.start(10_000, slow_s=0.02), lost, after=chance.uniform(0, 2))
    machines.wipe(lost)
    known = dict(itertools.chain.from_iterable(each.digests.items() for each in said))
    left = {part for name in range(4) for part in machines.parts(name)}
    newest = max(step for step, _ in left if all((step, process) in left for process in range(4)))
    assert newest >= said[0].saved[-3]  # a save begins once the one before is over
    found = machines.run(max(known) + 3)
    for index, each in same(found, newest, known[newest]):
        assert str(machines.of(index)) in each.source
        assert each.iterator == 1000 * index + newest
    [straight, *_] = Machines(machines.path / "straight").run(max(known) + 3)
    assert straight.digests == {**known, **found[0].digests}


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="four machines, three times")
def test_two_neighbours_or_all_are_lost(four):
    machines, digests = four
    machines.wipe(1, 2)
    assert [each.resumed for each in machines.run(5, save_every=3)] == [0] * 4  # nothing durable yet
    machines.wipe(1, 2)
    for index, each in same(machines.run(7, save_every=3), 3, digests[3]):
        assert (each.source, each.iterator) == (str(machines.of("run")), 1000 * index + 3)
    machines.wipe(0, 1, 2, 3)
    for _, each in same(machines.run(7, save_every=3), 6, found_digest(machines)):
        assert each.source == str(machines.of("run"))


def found_digest(machines):
    """The digest of the newest durable step, as one process alone restores it."""
    return machines.run(0, ["alone"], devices=8, own=False, local_copies=0)[0].digest


def test_processes_of_one_machine_may_share_its_directory(machines):
    digests = machines.run(5, [0, 0, 1, 1])[0].digests
    machines.wipe(1)
    assert {process for _, process in machines.parts(0)} == {0, 1, 2, 3}
    for index, each in same(machines.run(5, [0, 0, 1, 1]), 4, digests[4]):
        assert (each.source.startswith(str(machines.of(index // 2))), each.iterator) == (True, 1000 * index + 4)


# ---------------------------------------------------------------- damage


def damages(folder):
    """Every way to damage each file of a part: a bit, its end, its name, its kind."""
    for name in sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()):
        yield from ((name, how) for how in ("bit", "cut", "removed", "folder"))
    yield "", "emptied"


def damage(folder, name, how):
    path = folder / name
    data = path.read_bytes() if name else b""
    match how:
        case "bit":
            at = random.Random(name).randrange(8 * len(data))
            path.write_bytes(data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :])
        case "cut":
            path.write_bytes(data[:-1])
        case "removed":
            path.unlink()
        case "folder":
            path.unlink()
            path.mkdir()
        case "emptied":
            shutil.rmtree(folder)
            folder.mkdir()


def test_no_damage_to_a_part_is_taken_for_it(four):
    machines, _ = four
    [root] = machines.of(1).iterdir()
    tier = Tier(epath.Path(machines.of(1)), root.name)
    whole = list(tier.whole())
    assert len(whole) == 4  # two steps, of two processes each
    part = next(each for each in whole if each.process == 1)
    folder, kept = Path(tier.path(part)), machines.path / "kept"
    shutil.copytree(folder, kept)
    for name, how in damages(kept):
        damage(folder, name, how)
        assert list(tier.whole()) == [each for each in whole if each != part], (name, how)
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
    assert sorted(tier.whole()) == sorted(whole)


def test_of_a_damaged_part_the_copy_of_the_neighbour_is_taken(four):
    machines, digests = four
    for name in range(4):
        folder = machines.parts(name)[4, name]
        names = [path for path in folder.rglob("*") if path.is_file() and "d" in path.parent.name]
        damage(
            folder, str(names[name % len(names)].relative_to(folder)), ("bit", "cut", "removed", "folder")[name]
        )
    for index, each in same(machines.run(5), 4, digests[4]):
        assert str(machines.of(index)) in each.source


def test_if_both_copies_are_damaged_the_step_before_is_taken(four):
    machines, digests = four
    for name in range(4):
        if (4, 2) in (parts := machines.parts(name)):
            damage(parts[4, 2], "manifest.json", "bit")
    for _ in same(machines.run(5), 2, digests[2]):
        pass


# ---------------------------------------------------------------- other layouts


LAYOUTS = [
    ([2, 0, 3, 1], {"broadcast": True}),
    ([3, 2, 1, 0], {"rows": 4}),
    ([0, 9, 2, 3], {"broadcast": True}),
    ([0, 1, 3], {"rows": 2}),
    ([0, 1, 2], {}),
    ([0, 1, 2, 3, 4, 5, 6, 7], {"devices": 1}),
    ([1, 3], {"devices": 1}),
    ([2, 0, 3, 1], {}),
]


@pytest.mark.soak
@pytest.mark.parametrize(("names", "options"), LAYOUTS[:: counted(3, full=1)], ids=str)
def test_onto_other_machines_processes_and_meshes(four, names, options):
    machines, digests = four
    own = {"own": False} if len(names) != 4 else {}
    for index, each in same(machines.run(4, names, **own, **options), 4, digests[4]):
        assert str(machines.of(names[index])) in each.source
        if not own:
            assert each.iterator == 1000 * index + 4


def test_what_an_earlier_start_has_left_is_not_mixed_in(four):
    """Machine 1 is away for a while, and comes back with what it had."""
    machines, _ = four
    machines.of(1).rename(machines.of("away"))
    assert {each.resumed for each in machines.run(9, [0, 4, 2, 3])} == {4}
    machines.of(1).mkdir()
    shutil.copytree(machines.of("away"), machines.of(1), dirs_exist_ok=True)
    found = machines.run(9, [0, 1, 2, 3])
    assert {each.resumed for each in found} == {8}
    machines.wipe(0, 2, 3)
    shutil.copytree(machines.of(4), machines.of(0))  # of step 8 there are two parts, of step 4 there are two
    assert {each.resumed for each in machines.run(3, [0, 1, 2, 3])} == {0}


@in_background
def test_a_local_disk_without_room_for_a_folder_fails_the_save_in_all_at_once(machines):
    began = time.monotonic()  # its fourth part: each is followed by one that it keeps for the other
    for found in heard(machines.start(8, range(2), faults={1: "full local draft 7"}, devices=1)):
        assert found.saved == [2, 4, 6, 8]
    assert time.monotonic() - began < 50  # else process 0 waits for 60 seconds as it closes
    for name in range(2):
        assert max(step for step, _ in machines.parts(name)) == 6


# ---------------------------------------------------------------- one process


def _trained(machines, *steps, **options):
    return machines.run(*steps, ["alone"], devices=1, own=False, **options)


def test_one_process(machines):
    digests = _trained(machines, 5)[0].digests
    [found] = _trained(machines, 5)
    assert (found.resumed, found.digest) == (4, digests[4])
    assert str(machines.of("alone")) in found.source


# ---------------------------------------------------------------- in front of a bucket

KILLED_BEFORE_ITS_UPLOAD = """
import os, signal, sys, time
import jax.numpy as jnp
import ckptmgr

manager = ckptmgr.CheckpointManager(sys.argv[1], save_every=10, local=sys.argv[2], local_every=1)
for step in range(1, 10):
    manager.save(step, {"w": jnp.full((64, 64), step)}).result()
durable = manager.save(10, {"w": jnp.full((64, 64), 10)})
local = [manager.save(step, {"w": jnp.full((64, 64), step)}) for step in (11, 12, 13)]
for each in local:
    each.result()
print(durable.done(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


RESUMED_AFTER_IT = """
import sys
import jax.numpy as jnp
import ckptmgr

with ckptmgr.CheckpointManager(sys.argv[1], save_every=10, local=sys.argv[2], local_every=1) as manager:
    found = manager.restore(params={"w": jnp.zeros((64, 64), int)})
    print(manager.steps(), found.step, found.params["w"][5, 5], found.info.source)
    manager.save(20, found.params).result()
    print(manager.restore(20).info.source)
with ckptmgr.CheckpointManager(sys.argv[1]) as manager:
    print(manager.restore().info.source)
"""


@in_background
@on_servers
def test_before_a_slow_bucket_saves_go_on_as_with_a_disk_and_none_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    run, local = f"s3://bucket/{uuid.uuid4().hex}/run", tmp_path / "local"
    with counting.servers(delay_s=0.05):  # of each request
        done = warm.run(["-c", KILLED_BEFORE_ITS_UPLOAD, run, local], env=os.environ)
        assert (done.returncode, done.stdout.split()) == (-signal.SIGKILL, ["False"]), done.stderr[-3000:]
        done = warm.run(["-c", RESUMED_AFTER_IT, run, local], env=os.environ)
    [folder] = local.iterdir()
    assert done.stdout.splitlines() == [f"[] 13 13 {folder}", str(folder), run], done.stderr[-3000:]
