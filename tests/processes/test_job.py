"""Several processes on one machine, under jax.distributed with gloo: all do the same, or none does."""

import itertools
import json
import os
import random
import re
import signal
import threading
import time
from pathlib import Path

import jax
import member
import numpy as np
import orbax.checkpoint as ocp
import pytest
import warm
from conftest import counted, free_port, in_background, visible
from test_crash import last, rest

import ckptmgr
from ckptmgr.cli import facts
from ckptmgr.processes import job
from ckptmgr.processes.coordinator import Coordinator

pytestmark = pytest.mark.xdist_group("job")
SCRIPT = Path(member.__file__)
COUNTS = [2, 4][: counted(1, full=2)]


def start(count, directory, *what, devices=2, faults=None, timeout_s=60.0):
    """Starts the processes of a job; `faults` by index."""
    port = free_port()
    return [
        warm.start(
            [SCRIPT, directory, port, count, index, devices, *what],
            env=os.environ | {"CKPTMGR_FAULT": (faults or {}).get(index, ""), "CKPTMGR_TIMEOUT_S": str(timeout_s)},
        )
        for index in range(count)
    ]  # fmt: skip


def finish(processes, timeout_s=100):
    """The last line of each of them; fails if one did."""
    return [said[-1] if said else "" for said in lines(processes, timeout_s)]


def lines(processes, timeout_s=100):
    """All that each of them said."""
    try:
        answers = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        end(processes)
    for process, (out, err) in zip(processes, answers, strict=True):
        assert process.returncode == 0, out + err[-3000:]
    return [[line for line in out.splitlines()[1:] if not line.startswith("[Gloo]")] for out, _ in answers]


def end(processes):
    for process in processes:
        process.kill()
        process.stdout.close()
        process.stderr.close()
        process.wait()


class Interrupted:
    """The client of a coordinator that holds everything itself. While the first entry is made Ctrl-C comes."""

    def __init__(self):
        self.held, self.is_interrupted, self.is_asked_again = {}, False, threading.Event()

    def key_value_set(self, key, value, allow_overwrite):
        if not self.is_interrupted:
            self.is_interrupted = True
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert not self.is_asked_again.wait(1)
        assert key not in self.held
        self.held[key] = value

    def key_value_dir_get(self, prefix):
        self.is_asked_again.set()
        return [each for each in self.held.items() if each[0].startswith(prefix)]


def test_an_interrupt_as_process_0_decides_leaves_it_able_to_decide_again():
    client = Interrupted()
    line = job.Job("line", 5.0, coordinator=Coordinator(client, 0, 2))
    with pytest.raises(KeyboardInterrupt):
        line.decide(job.Call("a save", 1), lambda: "one")
    assert line.decide(job.Call("a save", 2), lambda: "two") == "two"
    assert [json.loads(said)["found"] for said in client.held.values()] == ["one", "two"]


def test_two_processes_save_and_one_two_or_four_restore(tmp_path):
    assert finish(start(2, tmp_path, "save", "1", "2", "3"))[0] == "steps 2 3"
    assert visible(tmp_path) == ["2", "3"]
    for count, devices in ((1, 4), (2, 2), (4, 1)):
        assert finish(start(count, tmp_path, "load", devices=devices)) == ["restored 3 skipped"] * count
    assert ckptmgr.CheckpointManager(tmp_path, read_only=True).verify()


def test_four_save_and_two_restore(tmp_path):
    assert finish(start(4, tmp_path, "save", "5", devices=1)) == ["steps 5"] * 4
    assert finish(start(2, tmp_path, "load", "5", devices=4)) == ["restored 5 skipped"] * 2
    found = ckptmgr.CheckpointManager(tmp_path, read_only=True).restore(layout=ckptmgr.HOST).params
    assert all((found[name] == values).all() for name, values in member.state(5).items())


def test_stock_orbax_restores_what_several_processes_saved(tmp_path):
    finish(start(2, tmp_path, "save", "1"))
    with ocp.CheckpointManager(tmp_path) as stock:
        template = member.state(0) | member.key_bits(0) | {"one": np.zeros(8, np.float32), "number": 0}
        back = stock.restore(1, args=ocp.args.Composite(params=ocp.args.StandardRestore(template))).params
    assert all(
        np.array_equal(back[name], values) for name, values in (member.state(1) | member.key_bits(1)).items()
    )


def test_if_one_process_cannot_restore_a_step_all_walk_back(tmp_path):
    finish(start(2, tmp_path, "save", "1", "2"))
    (part,) = (tmp_path / "2" / "params" / "ocdbt.process_1" / "d").iterdir()  # what process 1 alone reads
    data = bytearray(part.read_bytes())
    data[data.index(member.state(2)["w"][48:].tobytes())] ^= 1
    part.write_bytes(data)
    with pytest.raises(ckptmgr.CorruptCheckpointError):
        ckptmgr.CheckpointManager(tmp_path, read_only=True).restore(2)
    assert finish(start(2, tmp_path, "load")) == ["restored 1 skipped 2"] * 2


def test_where_processes_fail_in_different_ways_all_raise_what_process_0_does(tmp_path):
    """They go on by the type: if one walks back, and another asks for a list of steps, both would wait."""
    assert finish(start(3, tmp_path, "together")) == [
        "CheckpointNotFoundError gone",
        "CheckpointNotFoundError process 0: gone",
        "ValueError wrong",
    ]


def test_a_save_in_a_callback_of_a_job_is_refused_at_once_and_harms_no_other(tmp_path):
    assert finish(start(2, tmp_path, "callback")) == [
        "steps 1 2 told 2 save(101): all processes must make it; a callback runs in one",
        "steps 1 2 told 0",
    ]


@pytest.mark.parametrize("how", ["spec", "specs", "function", "abstract"])
def test_readers_agree_also_where_nothing_that_they_give_has_devices(how, tmp_path):
    finish(start(2, tmp_path, "save", "1", "2"))
    (part,) = (tmp_path / "2" / "params" / "ocdbt.process_1" / "d").iterdir()
    data = bytearray(part.read_bytes())
    data[data.index(member.state(2)["w"][48:].tobytes())] ^= 1
    part.write_bytes(data)
    assert finish(start(2, tmp_path, "readers", how)) == ["restored 1 skipped 2"] * 2


def test_process_0_decides_whether_to_save(tmp_path):
    assert finish(start(2, tmp_path, "clock")) == ["saved True True"] * 2
    assert visible(tmp_path) == ["1", "2"]


@pytest.mark.parametrize("policy", ["often", "overhead", "orbax"])
def test_process_0_decides_for_all_how_often_to_save(policy, tmp_path):
    """Each process measures something else, and their saves are over at different times."""
    said = finish(start(2, tmp_path, "paced", policy))
    assert said[0] == said[1]
    assert len(said[0].split()) > 3


def test_when_one_process_is_killed_in_a_save_the_others_say_so_in_time(tmp_path):
    """Three jobs at the same time: most of it goes by in waiting."""
    faults, timeout_s = ["before arrays 3", "before description 3", "after publish 2"], 8
    victims = {fault: int("arrays" in fault) for fault in faults}
    jobs = {
        fault: start(2, tmp_path / fault, "save", "1", "2", "3", faults={victim: fault}, timeout_s=timeout_s)
        for fault, victim in victims.items()
    }
    try:
        for fault, processes in jobs.items():
            told = killed(processes, victims[fault], timeout_s)
            check_killed(fault, told, tmp_path / fault)
    finally:
        end(itertools.chain(*jobs.values()))


def killed(processes, victim, timeout_s):
    """What the other process says until it ends."""
    assert processes[victim].wait(100) == -signal.SIGKILL
    # One wait, and the end of a process on a busy machine. Without a bound of ours it is 100 s at least.
    told = processes[1 - victim].communicate(timeout=3 * timeout_s)
    assert processes[1 - victim].returncode != 0
    return "".join(told)


def check_killed(fault, told, directory):
    if "arrays" in fault:  # the coordinator of jax.distributed, in process 0, is alive to tell
        why = "process 1 of 2 did not reach the arrays of step 2 within 8.0 s"
        assert f"failed SaveError step 2 could not be saved: {why}" in told
    with ckptmgr.CheckpointManager(directory) as manager:
        assert manager.steps() == ([1, 2] if "publish" in fault else [1])
        assert manager.restore(layout=ckptmgr.HOST).params["number"] == manager.latest()
    assert set(visible(directory)) <= {"1", "2"}


@in_background
@pytest.mark.soak
@pytest.mark.parametrize(
    ("slow", "fault", "at"),
    [(1, "arrays", "arrays"), (0, "publish", "commit"), (0, "arrays", "arrays")][: counted(1, 3)],
)
def test_a_save_that_is_slow_in_one_process_is_not_failed_by_the_others(slow, fault, at, tmp_path):
    said = lines(start(2, tmp_path, "slow", faults={slow: f"slow {fault} 1"}, timeout_s=3))
    for index, (told, *others) in enumerate(said):
        assert told.startswith("1 the save of step 1 took longer than 3.0 s"), said
        assert (f"process {slow} at the {at} of step 1" in told) == (index != slow), said
        assert others == ["durable 1", "durable 2", "steps 1 2"]


def test_a_process_that_never_comes_is_named(tmp_path):
    processes = start(2, tmp_path, "save", *map(str, range(1, 1000)), timeout_s=5)
    try:
        assert [process.stdout.readline() for process in processes] == ["joined\n"] * 2
        processes[1].send_signal(signal.SIGSTOP)
        out, err = processes[0].communicate(timeout=100)
        assert re.search(r"process 1 .*did not reach .* within 5\.0 s", out), out + err[-2000:]
    finally:
        end(processes)


def test_a_call_that_one_process_leaves_out_is_told_by_its_step_and_the_job_goes_on(tmp_path):
    said = lines(start(2, tmp_path, "results", "1", "2:0", "3", "4:1", "5"))
    for who, step in ((0, 2), (1, 4)):
        (told,) = [line for line in said[who] if line.startswith(f"{step} ")]
        assert told.startswith(f"{step} SaveError step {step} could not be saved: process {1 - who} left out the ")
        assert f"save of step {step}: it is at " in told
        said[who].remove(told)
        assert f"of step {step + 1}." in told
    assert said == [["1 True", "3 True", "5 True", "steps 1 3 5"]] * 2


@in_background
@pytest.mark.parametrize("count", COUNTS)
def test_a_save_waits_for_no_other_process_and_asks_nobody_anything(count, tmp_path):
    assert finish(start(count, tmp_path, "apart", devices=1)) == ["apart True []"] * count


@in_background
def test_processes_that_have_left_out_calls_are_together_again_two_calls_later(tmp_path):
    said = lines(start(2, tmp_path, "attempt", "1", "2:0", "3", "4", "5", "6", timeout_s=600))
    told = [[line for line in one if "Error" in line] for one in said]
    assert [line.partition(" could")[0] for line in told[0]] == ["3 SaveError step 2", "4 SaveError step 3"]
    assert [line.partition(" could")[0] for line in told[1]] == ["4 SaveError step 3"]
    assert [one[-1] for one in said] == ["steps 1 5 6"] * 2


@in_background
def test_a_failure_that_one_process_knows_is_raised_in_all_and_the_next_save_works(tmp_path):
    faults = {0: "fail publish 2", 1: "full arrays 3"}  # at step 2 and at step 4
    said = lines(start(2, tmp_path, "attempt", "1", "1", "2", "3", "4", "5", "6", faults=faults))
    for index, one in enumerate(said):
        other = "" if index == 0 else "process 0: "
        assert one[1] == (
            f'1 CheckpointExistsError {other}step 1 is already in {tmp_path}; on_exists="replace" replaces it, '
            '"skip" keeps it'
        )
        assert re.fullmatch("3 SaveError step 2 could not be saved: .*Input/output error", one[3])
        assert re.fullmatch("5 SaveError step 4 could not be saved: .*No space left.*", one[5])
        assert [one[at] for at in (0, 2, 4, 6, 7)] == ["1 True", "2 True", "4 True", "6 True", "steps 1 6"]
    assert visible(tmp_path) == ["1", "6"]


@in_background
def test_what_fails_in_one_process_before_it_writes_is_raised_in_all_at_once(tmp_path):
    said = lines(start(2, tmp_path, "results", "1", "2", "3", faults={1: "fail draft 2"}, timeout_s=600))
    for one in said:
        assert one[0] == "1 True"
        assert re.fullmatch("2 SaveError step 2 could not be saved: .*Input/output error", one[1])
        assert one[2:] == ["3 True", "steps 1 3"]


@in_background
@pytest.mark.parametrize("point", ["read", "glance"])
def test_a_step_that_one_process_cannot_read_once_it_is_committed_has_not_failed(point, tmp_path):
    said = lines(start(2, tmp_path, "results", "1", "2", "3", faults={1: f"fail {point} 2"}))
    assert said == [["1 True", "2 True", "3 True", "steps 1 2 3"]] * 2


@pytest.mark.soak
@pytest.mark.parametrize("count", COUNTS)
def test_what_differs_in_one_process_is_refused_in_all_by_leaf_and_nothing_is_written(count, tmp_path):
    first = {
        "tree": "params['more']: missing in process 0, numpy float64[2] in process 1",
        "missing": "params['odd']: numpy int8[7] in process 0, missing in process 1",
        "dtype": "params['odd']: numpy int8[7] in process 0, numpy float16[7] in process 1",
        "shape": "params['odd']: numpy int8[7] in process 0, numpy int8[3] in process 1",
        "kind": "params['number']: int Python int in process 0, float Python float in process 1",
        "weak": "params['one']: jax float32[8] in process 0, jax float32[8] weak in process 1",
        "sharding": "params['w']: jax float32[64,256]",
        "container": "the containers of params",
        "extra": "mine: missing in process 0, json in process 1",
        "state": "it['buffer']: numpy float64[2] in process 0, numpy float64[3] in process 1",
    }
    for index, said in enumerate(lines(start(count, tmp_path, "differs"))):
        for line, (name, why) in zip(said, first.items(), strict=False):
            assert re.match(rf"{name} .*could not be saved: {'process 0: ' * (index > 0)}the save of step", line)
            assert why in line, line
        assert said[len(first) :] == ["same True", "steps 101"]
    assert visible(tmp_path) == ["101"]


@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_the_stages_of_a_pipeline_come_back_to_their_processes(count, devices, tmp_path):
    assert finish(start(count, tmp_path, "stages", devices=devices)) == ["stages"] * count
    found = ckptmgr.CheckpointManager(tmp_path, read_only=True).restore(layout=ckptmgr.HOST).params
    for process in range(count):
        for name in ("split", "whole"):
            assert np.array_equal(found[f"{name} {process}"], np.arange(8, dtype=np.float32) * (process + 1) + 7)
    assert np.array_equal(found["mine"], np.full(3, 7.0))
    for process in range(count):
        words = np.asarray(jax.random.key_data(found[f"key {process}"]))
        assert np.array_equal(words, [process, 7])
        found[f"key {process}"] = words  # as stock Orbax reads it without its template
    with ocp.CheckpointManager(tmp_path) as stock:
        template = {name: np.zeros_like(values) for name, values in found.items()}
        back = stock.restore(1, args=ocp.args.Composite(params=ocp.args.StandardRestore(template))).params
    assert all(np.array_equal(back[name], values) for name, values in found.items())


@pytest.mark.parametrize(("count", "devices"), [(4, 2), (3, 1)])
def test_processes_that_hold_the_same_share_the_writing(count, devices, tmp_path):
    assert finish(start(count, tmp_path, "balanced", devices=devices)) == ["balanced"] * count
    item, values = tmp_path / "1" / "params", member.held_by_several()
    parts = [sum(map(os.path.getsize, (item / f"ocdbt.process_{n}" / "d").iterdir())) for n in range(count)]
    expected = sum(each.nbytes for each in values.values())
    assert max(parts) < 1.1 * expected / count
    assert sum(parts) < 1.1 * expected
    leaves = ckptmgr.CheckpointManager(tmp_path, read_only=True).info(1).leaves["params"]
    (spread,) = [leaf for leaf in leaves if leaf.name == "spread"]
    assert spread.chunks == (24 // count, 50_000)  # nobody shares it, so it is cut as in one process
    with ocp.CheckpointManager(tmp_path) as stock:
        template = values | {"key": member.key_bits(7)["key"]}
        back = stock.restore(1, args=ocp.args.Composite(params=ocp.args.StandardRestore(template))).params
    assert all(np.array_equal(back[name], each) for name, each in template.items() if name != "key")


def check_differences(directory, count):
    """Of what each process has saved for itself, that of each is compared with its own."""
    reader = ckptmgr.CheckpointManager(directory, read_only=True)
    assert facts.difference((reader, count), (reader, count), values=True)["equal"]
    found = facts.difference((reader, count), (reader, 100 + count), values=True)["values"]
    assert {row["path"] for row in found} == {"bytes", "json", "plain"}


@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_each_process_gets_its_own_iterator_back_and_another_number_is_told(count, devices, tmp_path):
    assert finish(start(count, tmp_path, "own", "save", devices=devices)) == ["own"] * count
    check_differences(tmp_path, count)
    other = {2: 1, 4: 2}[count]
    assert finish(start(other, tmp_path, "own", "load", devices=count * devices // other)) == ["own"] * other
    for step, format_number in ((count, 2), (100 + count, 1)):
        assert json.loads((tmp_path / str(step) / "manifest.json").read_bytes())["format"] == format_number
    wanted = {
        "json": ocp.args.JsonRestore(),
        "plain": ocp.args.JsonRestore(),
        "arrays": ocp.args.StandardRestore(),
    }
    with ocp.CheckpointManager(tmp_path) as stock:
        back = stock.restore(count, args=ocp.args.Composite(**wanted))
    assert (back.json, back.plain) == ({"at": 0, "files": []}, {"host": 0})
    assert np.array_equal(back.arrays["rng"], np.full(5, 0.5))


@pytest.mark.soak
@pytest.mark.parametrize("count", COUNTS)
def test_a_reader_in_one_process_alone_holds_up_nobody(count, tmp_path):
    assert finish(start(count, tmp_path, "reader")) == ["read"] * count


@pytest.mark.soak
@pytest.mark.parametrize("count", COUNTS)
def test_directories_that_are_not_shared_are_refused_in_all(count, tmp_path):
    processes = start(count, tmp_path / "INDEX", "attempt", "1", timeout_s=8)  # half of it is spent looking
    try:
        for process in processes:
            assert process.stdout.readline() == "joined\n"
        said = [process.stdout.readline() for process in processes]
    finally:
        end(processes)
    for one in said:
        assert re.search(
            rf"failed SaveError .*the directory is not shared: process (\d) does not find in {tmp_path}/\1", one
        )
    assert visible(tmp_path) == ["0"]


def test_sigterm_stops_every_process_at_the_same_saved_step(tmp_path):
    processes = start(2, tmp_path, "train", "1000")
    for process in processes:
        for line in process.stdout:
            if line == "done 10\n":
                break
    processes[1].send_signal(signal.SIGTERM)  # one is told: JAX tells the other
    (one, other) = finish(processes)
    assert one == other
    stopped = int(one.split()[1])
    assert ckptmgr.CheckpointManager(tmp_path, read_only=True).steps() == [stopped]


@pytest.mark.parametrize(
    ("count", "axes", "devices"), [(2, "2x1", 1), (4, "2x2", 1), (3, "3x2t", 2)], ids=["2", "4", "not aligned"]
)
def test_what_two_processes_hold_is_read_once_when_asked(count, axes, devices, tmp_path):
    finish(start(1, tmp_path, "shared", "1x1", "save", devices=1))
    found = {
        how: [
            line.rpartition(" ") for line in finish(start(count, tmp_path, "shared", axes, how, devices=devices))
        ]
        for how in ("False", "True", "bounded")
    }
    assert {said for one in found.values() for said, _, _ in one} == {"restored 2 skipped read"}
    total = {how: sum(int(read) for *_, read in one) for how, one in found.items()}
    readers = 1 if devices == 1 else 2  # of the one chunk of the largest array: those that have a piece of it
    holders = 2 if devices == 1 else 3
    # The small files of a step, and how often their heads are read, are the last hundredth.
    assert max(total["True"], total["bounded"]) < (readers / holders + 0.02) * total["False"]


@pytest.mark.parametrize("how", ["True", "bounded"])
def test_damage_that_one_reader_sees_makes_all_walk_back(how, tmp_path):
    finish(start(1, tmp_path, "shared", "1x1", "save", devices=1))
    largest = max((tmp_path / "2" / "params" / "d").iterdir(), key=os.path.getsize)
    values = bytearray(largest.read_bytes())
    values[len(values) // 2] ^= 1
    largest.write_bytes(bytes(values))
    said = finish(start(2, tmp_path, "shared", "2x1", how, devices=1))
    assert [line.partition(" read")[0] for line in said] == ["restored 1 skipped 2"] * 2


@pytest.mark.soak
@pytest.mark.parametrize("victim", [1, 0])
def test_one_process_killed_at_random_moments_leaves_the_newest_step_whole(victim, tmp_path):
    draw, newest = random.Random(victim), 0
    for _ in range(counted(1, full=12)):
        processes = start(2, tmp_path, "train", "1", timeout_s=8.0)
        said = [process.stdout for process in processes]
        try:
            for index, process in enumerate(processes):
                assert [said[index].readline() for _ in range(4)] == [
                    "joined\n", f"resumed {newest}\n", f"done {newest + 1}\n", f"done {newest + 2}\n"
                ], process.stderr.read()[-3000:]  # fmt: skip
            time.sleep(draw.uniform(0, 1))
            processes[victim].send_signal(signal.SIGKILL)
            began = time.monotonic()
            processes[1 - victim].wait(60)
            ended = time.monotonic() - began
            (told, _), (out, err) = rest(processes[victim]), rest(processes[1 - victim])
            if victim == 1:  # without process 0, the coordinator, JAX itself ends the others
                failed = "^failed (CheckpointTimeoutError|SaveError) .*"
                named = f"{failed}(process 1 .*did not reach|still waiting for process 1 )"
                assert re.search(named, out, re.MULTILINE), out + err[-3000:]
                assert ended < 4 * 8
        finally:
            end(processes)
        newest = restored(tmp_path)
        # Once `save` has returned, the step before its own is durable: in whichever process.
        assert newest >= max(last(told, "done"), last(out, "done")) - 1


def restored(directory):
    """The newest step as one process finds it, with every value looked at."""
    with ckptmgr.CheckpointManager(directory, read_only=True) as reader:
        found = reader.restore(layout=ckptmgr.HOST)
        assert (found.step, found.skipped) == (reader.latest(), {})
    assert np.array_equal(found.params["w"], member.state(found.step)["w"])
    return found.step


def test_what_a_milestone_lacks_is_told_in_all_processes_and_all_pass_over_it(tmp_path):
    for index, said in enumerate(lines(start(2, tmp_path, "milestones"))):
        by = "process 0: " if index else ""
        assert said[0].startswith(f"refused 10 opt_state {by}step 10 was reduced to its params by params_only")
        assert said[1:] == ["restored 5 10"]


def test_all_processes_go_back_together(tmp_path):
    for index, said in enumerate(lines(start(2, tmp_path, "rewind"))):
        assert said[0].startswith(f"refused {'process 0: ' if index else ''}there is no step 55 in {tmp_path}")
        assert said[1:] == ["steps 50 60 70"]


@in_background
@pytest.mark.parametrize("fault", ["slow move 1", "slow remove 1"])
def test_what_takes_process_0_longer_than_the_bound_is_waited_for_in_a_rewind_and_as_a_run_is_opened(
    fault, tmp_path
):
    draft = tmp_path / ".ckptmgr" / "saving" / "7"
    draft.mkdir(parents=True)
    said = finish(start(2, tmp_path, "rewind", faults={0: fault}, timeout_s=3))
    assert said == finish(start(2, tmp_path / "another", "rewind"))
    assert not draft.exists()


@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)][: counted(1, full=2)])
def test_nan_in_one_shard_of_one_process_makes_all_distrust_the_step(count, devices, tmp_path):
    said = lines(start(count, tmp_path, "poisoned", "distrust", devices=devices))
    for two, three, four, restored_, nothing, again in said:
        assert two == "saved 2: params hold NaN or infinity: ['w']"
        assert three == "saved 3: params hold NaN or infinity: ['one']"
        assert four == "saved 4: params hold NaN or infinity: ['b'], ['host'] and 2 more"
        assert restored_ == "restored 1 skipped 4 of 1 4"
        assert re.match(r"nothing no checkpoint in .* is trusted \(2 distrusted\).*step 4: params hold", nothing)
        assert again == "again 1"


def test_nan_in_one_shard_of_one_process_is_refused_in_all(tmp_path):
    for index, said in enumerate(lines(start(2, tmp_path, "poisoned", "refuse"))):
        for step, paths in ((2, "['w']"), (3, "['one']"), (4, "['b'], ['host'] and 2 more")):
            start_ = f"refused {step}: step {step} could not be saved: {'process 0: ' * index}"
            assert said[step - 2].startswith(f"{start_}params hold NaN or infinity: {paths} (nonfinite")
        assert said[3] == "restored 1 skipped of 1"
    assert visible(tmp_path) == ["1"]
