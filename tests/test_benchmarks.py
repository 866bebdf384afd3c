"""The benchmark runs from end to end on next to nothing, so that it cannot rot. It judges no times."""

import json
import math
import mmap
import operator
import os
import pydoc
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import SOAK, counted

from benchmarks import (
    before,
    budgets,
    fresh,
    house,
    machine,
    measure,
    memory,
    peers,
    plan,
    profiling,
    report,
    scale,
    workloads,
)

ROOT = Path(__file__).parents[1]
PEERS = {"ckptmgr", "orbax", "pickle", "pickle-fsync", "safetensors"}  # torch only where it is installed

WORKLOADS = counted(["tiny", "gpt2-sharded"], full=["tiny", "many", "big", "gpt2", "gpt2-sharded"])
SERIES = counted(["leaves", "bytes", "training"], full=[*plan.SERIES])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    data = tmp_path_factory.mktemp("data")
    parts = [f"--workloads={','.join(WORKLOADS)}", f"--series={','.join(SERIES)}"]
    command = [sys.executable, "-m", "benchmarks", "--quick", *parts, "--out", out, "--dir", data]
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


def git(*words, cwd=ROOT):
    who = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *who, *words], cwd=cwd, capture_output=True, text=True, check=True
    ).stdout.strip()


def knows_predecessor():
    try:
        return bool(before.full_name(before.COMMIT))
    except before.UnavailableError:
        return False  # an sdist, or a clone without history


@pytest.mark.soak
@pytest.mark.xdist_group("benchmarks")
def test_every_peer_is_measured_on_every_workload_and_restores_the_bits_it_saved(out):
    results = json.loads((out / "results.json").read_text())
    found = PEERS | ({"before"} if knows_predecessor() else set())
    assert list(results["workloads"]) == WORKLOADS
    for name, workload in results["workloads"].items():
        assert set(workload["peers"]) >= found, name
        for peer, figures in workload["peers"].items():
            assert figures["verified"] is True, (name, peer)
            assert all(math.isfinite(number) and number >= 0 for number in numbers(figures)), (name, peer)
            assert all(number > 0 for time in measure.TIMES for number in numbers(figures[time])), (name, peer)
            assert figures["disk_bytes"] > 0
            assert figures["files"] > 0
    assert list(results["series"]) == SERIES
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
        values, *others = jax.tree.leaves(state)
        values = np.array(values)
        values.view(np.uint8).reshape(-1)[0] ^= 1
        return jax.tree.unflatten(jax.tree.structure(state), [jax.device_put(values), *others])


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
    assert sizes["tiny"][0] == 7
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


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="it takes a run of all workloads and series")
@pytest.mark.xdist_group("benchmarks")
def test_every_budget_that_can_be_judged_alone_is_in_a_run_of_budgets(out):
    """`--budgets` leaves out workloads and series, and no budget but those of the larger models' memory."""
    results = json.loads((out / "results.json").read_text())
    fewer = results | {
        "workloads": {name: results["workloads"][name] for name in plan.JUDGED_WORKLOADS},
        "series": {name: results["series"][name] for name in plan.JUDGED_SERIES},
    }
    judged = {(row["where"], row["what"]) for row in budgets.check(fewer)}
    left_out = {(row["where"], row["what"]) for row in results["budgets"]} - judged
    assert left_out, "the full run has the memory of GPT-2"
    assert all("GPT-2" in where and "memory" in what for where, what in left_out)


def test_the_report_of_a_missed_budget_ends_with_what_remains(monkeypatch):
    """py-spy looks at real saves."""
    monkeypatch.setitem(profiling.ENOUGH, "tiny", 60)  # at a hundred samples a second
    row = {"where": "tiny", "what": "blocked", "limit": 1, "measured": 2}
    rows = [row | {"met": False, "profiled": ["tiny", "save"]}, row | {"met": True, "profiled": ["big", "save"]}]
    profiles = profiling.of_missed([*rows, row | {"met": False, "profiled": None}])
    assert list(profiles) == ["tiny, save"]
    assert "s (median)" in profiles["tiny, save"][0]
    assert any("%" in line for line in profiles["tiny, save"][1:])


def test_the_table_of_the_page_is_that_of_the_results():
    rows = json.loads((ROOT / "docs/performance/results.json").read_text())["budgets"]
    assert report.markdown(rows) in (ROOT / "docs/performance.md").read_text()


def test_the_tables_of_the_page_about_many_processes_are_those_of_the_results():
    page = (ROOT / "docs/scale.md").read_text()
    for table in scale.markdown(json.loads((ROOT / "docs/performance/scale.json").read_text())).values():
        assert table in page


@pytest.mark.xdist_group("benchmarks")
def test_what_a_large_job_pays_is_measured_and_drawn(tmp_path):
    command = [sys.executable, "-m", "benchmarks.scale", "--sizes", "2,5", "--repeats", "1", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "scale.json").read_text())
    assert [each["count"] for each in results["steps"]] == results["sizes"] == [2, 5]
    assert all(math.isfinite(number) and number >= 0 for number in numbers(results))
    assert results["agreements"][1]["a save"]["seconds"]["median"] > 0
    assert results["lines"]["files"]["1024"] > results["lines"]["files"]["64"]
    assert "every process reads all" in (tmp_path / "scale.txt").read_text()
    assert (tmp_path / "scale.png").stat().st_size > 1000


@pytest.mark.xdist_group("benchmarks")
def test_what_a_bucket_costs_is_measured_beside_tensorstore_alone(tmp_path):
    command = [sys.executable, "-m", "benchmarks.latency", "--workloads=few", "--delays-ms=0,30", "--repeats=1",
               "--out", tmp_path]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    quick, slow = json.loads((tmp_path / "latency.json").read_text())
    for name in ("ckptmgr", "tensorstore"):
        assert min(slow[name]["save requests"], quick[name]["save requests"]) >= 4
        assert slow[name]["save"] > quick[name]["save"] + 0.03
    assert (tmp_path / "latency.txt").read_text().strip() == done.stdout.strip()


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="half a minute of measuring")
@pytest.mark.xdist_group("benchmarks")
@pytest.mark.parametrize(
    "what", [["reuse", "--steps=3"], ["options", "--workloads=few", "--repeats=3"]], ids=" ".join
)
def test_what_an_option_costs_and_saves_is_measured(what, tmp_path):
    command = [sys.executable, "-m", f"benchmarks.{what[0]}", *what[1:], "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / f"{what[0]}.txt").read_text().strip() == done.stdout.strip()
    if what[0] == "reuse":  # what a further step takes of the disk, with the option and without
        rows = [line.split() for line in done.stdout.splitlines() if "bytes stored" in line]
        with_it, without = (float(row[-3]) for row in rows)
        assert with_it < 1 < 80 < without


# ---------------------------------------------------------------- the version before


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit, whose package differs from this one; git is asked for nothing else."""
    try:
        git("init", "--quiet", cwd=tmp_path)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    shutil.copytree(ROOT / "ckptmgr", tmp_path / "ckptmgr", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "ckptmgr/__init__.py", "a") as package:
        package.write("\nIS_BEFORE = True\n")
    git("add", ".", cwd=tmp_path)
    git("commit", "--quiet", "--message", "before", cwd=tmp_path)
    return tmp_path


@pytest.mark.xdist_group("benchmarks")
def test_the_version_before_is_measured_in_processes_of_its_own(repository, tmp_path):
    server = before.Server(before.checkout("HEAD", tmp_path / "code", repository))
    try:
        assert before.call(server.address, pydoc.locate, "ckptmgr.IS_BEFORE") is True
        assert before.call(server.address, machine.devices, devices=3).startswith("3 x ")
        assert len({os.getpid(), *(before.call(server.address, os.getpid) for _ in range(2))}) == 3
        with pytest.raises(fresh.FailedError, match="ZeroDivisionError"):
            before.call(server.address, operator.truediv, 1, 0)
        with pytest.raises(fresh.FailedError, match="its process died"):
            before.call(server.address, os._exit, 3)
        tiny = workloads.all_workloads(quick=True)["tiny"]
        peer = measure.times(tiny, ["ckptmgr", "before"], 2, tmp_path / "data", server.address)["peers"]["before"]
        assert peer["verified"]
        assert len(peer["durable_s"]["all"]) == 2
    finally:
        server.close()


def test_without_the_commit_the_run_says_so(repository, tmp_path):
    with pytest.raises(before.UnavailableError, match="no-such-commit"):
        before.checkout("no-such-commit", tmp_path / "code", repository)
    with pytest.raises(before.UnavailableError, match="not a git repository"):
        before.full_name("HEAD", Path("/"))


def test_without_git_the_run_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(before.UnavailableError, match="git is not installed"):
        before.full_name("HEAD")


def test_the_house_is_measured(tmp_path):
    """A package with two rooms, a circle that only type checkers see, and a private name of another library."""
    files = {
        "__init__.py": "",
        "low/__init__.py": '"""A room."""\n',
        "low/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ckptmgr.high import b\n",
        "high.py": "import orbax\nfrom ckptmgr.low.a import x\n\n# why\nx._own()\norbax._theirs()\n",
        "cli/app.py": "import ckptmgr.high\n",
    }
    for name, text in files.items():
        (tmp_path / "ckptmgr" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ckptmgr" / name).write_text(text)
    with open(tmp_path / "ckptmgr/low/a.py", "a") as file:
        file.write("def _own(self): self._mine = 1\n")
    assert house.measure(tmp_path) == {
        "lines of code": 8, "lines of docstrings and comments": 2, "modules": 4, "arrows between modules": 2,
        "arrows between rooms": 2, "circles": ["ckptmgr.high, ckptmgr.low.a"],
        "modules that import Orbax": ["ckptmgr.high"],
        "private names of others": ["ckptmgr/high.py:6 _theirs"],
    }  # fmt: skip
