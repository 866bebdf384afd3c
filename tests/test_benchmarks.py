"""The benchmark runs from end to end on next to nothing, so that it cannot rot. It judges no times."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PEERS = {"ckptmgr", "orbax", "pickle", "pickle-fsync", "safetensors"}  # torch only where it is installed


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    data = tmp_path_factory.mktemp("data")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", out, "--dir", data]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr  # it is 1 if one peer restored other bits than it saved
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
