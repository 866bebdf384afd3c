"""The benchmark runs from end to end on next to nothing, so that it cannot rot. It judges no times."""

import json
import math
import mmap
import operator
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import budgets, fresh, machine, measure, memory, peers, workloads

ROOT = Path(__file__).parents[1]
PEERS = {"ckptmgr", "orbax", "pickle", "pickle-fsync", "safetensors"}  # torch only where it is installed


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    data = tmp_path_factory.mktemp("data")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", out, "--dir", data]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr  # it is 1 if one peer restored other bits than it saved
    assert list(data.iterdir()) == []  # whatever was written for the measurements is gone
    (out / "printed.txt").write_text(done.stdout)
    return out


def numbers(found):
    if isinstance(found, dict):
        return [number for below in found.values() for number in numbers(below)]
    if isinstance(found, list):
        return [number for below in found for number in numbers(below)]
    return [found] if isinstance(found, int | float) and not isinstance(found, bool) else []


@pytest.mark.xdist_group("benchmarks")
def test_every_peer_is_measured_on_every_workload_and_restores_the_bits_it_saved(out):
    results = json.loads((out / "results.json").read_text())
    assert set(results["workloads"]) == {"tiny", "many", "big", "gpt2", "gpt2-sharded"}
    for name, workload in results["workloads"].items():
        assert set(workload["peers"]) >= PEERS, name
        for peer, figures in workload["peers"].items():
            assert figures["verified"] is True, (name, peer)
            assert all(math.isfinite(number) and number >= 0 for number in numbers(figures)), (name, peer)
            assert all(number > 0 for time in measure.TIMES for number in numbers(figures[time])), (name, peer)
            assert figures["disk_bytes"] > 0
            assert figures["files"] > 0
    assert set(results["series"]) == {"leaves", "bytes", "training", "opening", "shards", "processes"}
    assert all(numbers(series) for series in results["series"].values())
    assert {"cpu", "cores", "file_system", "kernel"} <= set(results["machine"])
    assert all(isinstance(row["measured"], float | int) for row in results["budgets"])


@pytest.mark.xdist_group("benchmarks")
def test_tables_and_plots_are_made(out):
    printed = (out / "printed.txt").read_text()
    for word in ("ckptmgr", "stock Orbax", "budgets", "blocked", "restore"):
        assert word in printed
    plots = sorted(path.name for path in out.iterdir() if path.suffix in (".png", ".svg"))
    assert plots == sorted(f"{name}{end}" for name in ("bytes", "leaves", "memory", "times", "training")
                           for end in (".png", ".svg"))  # fmt: skip
    assert all((out / name).stat().st_size > 1000 for name in plots)


# ---------------------------------------------------------------- whether the measurements can be believed


class FlipsOneBit(peers.PickleFsync):
    title = "flips one bit"

    def restore(self, template):
        state = super().restore(template)
        values = np.array(state.params["w"])
        values.view(np.uint8).reshape(-1)[0] ^= 1
        return state._replace(params={"w": jax.device_put(values, template.params["w"].sharding)})


class Moves(peers.PickleFsync):
    title = "restores onto another device"

    def restore(self, template):
        return jax.device_put(super().restore(template), jax.devices()[1])


def test_a_peer_that_restores_something_else_is_found_out(tmp_path, monkeypatch):
    for name, wrong in (("flips", FlipsOneBit), ("moves", Moves)):
        monkeypatch.setitem(peers.ALL, name, wrong)
    tiny = workloads.all_workloads(quick=True)["tiny"]
    found = measure.times(tiny, ["pickle-fsync", "flips", "moves"], 1, tmp_path)["peers"]
    assert {name: figures["verified"] for name, figures in found.items()} == {
        "pickle-fsync": True, "flips": False, "moves": False,
    }  # fmt: skip


@pytest.mark.parametrize("name", workloads.all_workloads(quick=True))
def test_what_is_saved_has_the_structure_size_and_place_that_a_restore_asks_for(name):
    workload = workloads.all_workloads(quick=True)[name]
    state, template = workloads.build(workload), workloads.template(workload)
    assert measure.same(state, workloads.copy(state), template)
    leaves = jax.tree.leaves(state)
    assert (len(leaves), sum(leaf.nbytes for leaf in leaves)) == (workload.leaves, workload.nbytes)


def test_the_full_workloads_have_the_sizes_they_are_known_by():
    sizes = {name: (each.leaves, each.nbytes) for name, each in workloads.all_workloads(quick=False).items()}
    assert sizes["tiny"][0] == 4
    assert sizes["many"] == (3001, 24_960_004)
    assert sizes["big"] == (97, 806_092_804)
    assert sizes["gpt2"] == sizes["gpt2-sharded"] == (445, 3 * 4 * 124_439_808 + 4)


def test_memory_counts_what_is_allocated_and_not_what_is_mapped(tmp_path):
    size = 64 * 2**20
    (tmp_path / "file").write_bytes(bytes(size))
    with memory.Peak() as allocating:
        kept = np.ones(size, np.uint8)
    with memory.Peak() as mapping, open(tmp_path / "file", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        total = int(np.frombuffer(mapped, np.uint8).sum())
    assert total == 0
    assert kept.nbytes <= allocating.nbytes < 1.1 * size
    assert mapping.nbytes < 0.1 * size


@pytest.mark.xdist_group("benchmarks")
def test_a_function_in_a_fresh_process_answers_or_says_why_not():
    assert fresh.call(machine.devices, devices=3).startswith("3 x ")
    with pytest.raises(fresh.FailedError, match="ZeroDivisionError"):
        fresh.call(operator.truediv, 1, 0)
    with pytest.raises(fresh.FailedError, match="exit code 3"):
        fresh.call(os._exit, 3)
    with pytest.raises(fresh.FailedError, match="longer than"):
        fresh.call(time.sleep, 60, timeout_s=0.1)


def test_a_budget_is_met_missed_or_not_judged():
    def verdict(measured, judged=True, uncertainty=0.0):
        return budgets.Budget("many", "restore / stock Orbax", 1 / 6, measured, uncertainty).row(judged)["met"]

    assert [verdict(0.1), verdict(0.2), verdict(0.2, judged=False)] == [True, False, None]
    assert [verdict(0.1, uncertainty=0.01), verdict(0.1, uncertainty=0.1)] == [True, None]
