"""Times of all peers on one workload, interleaved, and whether each restored the bits it saved."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import before, peers, workloads
from benchmarks.workloads import State, Workload

TIMES = ("blocked_s", "durable_s", "restore_s")


def times(
    workload: Workload, names: Sequence[str], repeats: int, directory: Path, server: str | None = None
) -> dict[str, Any]:
    """Times, bytes, files and verdicts of each peer, and the ceilings of the same run.

    Peers take turns (A, B, C, then B, C, A), so that what else the machine does falls on all of them. The
    first round is compared bit for bit, and is given apart: it makes plans and threads that a steady save
    has. What the peers saved stays in `directory`, a folder for each. "before" needs the address of its `server`.
    """
    state, template = workloads.build(workload), workloads.template(workload)
    running: dict[str, _Here | _Elsewhere] = {
        name: _Elsewhere(workload, name, directory / name, server)
        if name == "before" and server is not None
        else _Here(name, directory / name, state, template)
        for name in names
    }
    first = {name: peer.turn(same) for name, peer in running.items()}
    ceilings(state, directory / "raw")
    rounds: dict[str, list[Mapping[str, float]]] = {name: [] for name in names}
    limits = []
    for turn in range(repeats):
        limits.append(ceilings(state, directory / "raw"))
        for name in rotated(names, turn):
            rounds[name].append(running[name].turn())
    for peer in running.values():
        peer.close()
    return {
        "leaves": workload.leaves,
        "nbytes": workload.nbytes,
        "ceilings": summaries(limits),
        "peers": {
            name: {
                **summaries(rounds[name]),
                **_on_disk(directory / name),
                "verified": first[name].pop("verified"),
                "first": first[name],
            }
            for name in names
        },
    }


class _Here:
    """A peer in this process."""

    def __init__(self, name: str, directory: Path, state: State, template: State) -> None:
        self._peer, self._state, self._template = peers.ALL[name](directory), state, template

    def turn(self, same: Same | None = None) -> dict[str, Any]:
        return round_trip(self._peer, self._state, self._template, same)

    def close(self) -> None:
        self._peer.close()


class _Elsewhere:
    """A peer in a process of another checkout: no other peer runs there."""

    def __init__(self, workload: Workload, name: str, directory: Path, server: str) -> None:
        self._process = before.Process(server, workload.devices)
        self._process.call(_begin, workload, name, directory.resolve())

    def turn(self, same: Same | None = None) -> dict[str, Any]:
        return self._process.call(_turn, same)

    def close(self) -> None:
        self._process.call(_end)
        self._process.close()


_there: list[_Here] = []  # in a process of another checkout: its one peer


def _begin(workload: Workload, name: str, directory: Path) -> None:
    _there.append(_Here(name, directory, workloads.build(workload), workloads.template(workload)))


def _turn(same: Same | None) -> dict[str, Any]:
    return _there[0].turn(same)


def _end() -> None:
    _there.pop().close()


Same = Callable[[State, State, State], bool]


def round_trip(peer: peers.Peer, state: State, template: State, same: Same | None = None) -> dict[str, Any]:
    """One save and one restore, in seconds; with `same`, whether what came back is what was saved."""
    new = workloads.copy(state)
    settle()
    start = time.perf_counter()
    peer.save(new)
    blocked = time.perf_counter()
    peer.wait()
    durable = time.perf_counter()
    peer.finish()
    finished = time.perf_counter()
    del new
    settle()
    begin = time.perf_counter()
    restored = jax.block_until_ready(peer.restore(template))
    restore_s = time.perf_counter() - begin
    found = {
        "blocked_s": blocked - start, "durable_s": durable - start, "finished_s": finished - start,
        "restore_s": restore_s,
    }  # fmt: skip
    return found | {"verified": same(restored, state, template)} if same else found


def ceilings(state: State, path: Path) -> dict[str, float]:
    """What no checkpoint can beat by much: the same bytes written with fsync, read, and copied to the host.

    The file was just written, so that the read, like every restore here, comes from the page cache.
    """
    new = workloads.copy(state)
    settle()
    host, device_get_s = timed(jax.device_get, jax.tree.leaves(new))
    path.unlink(missing_ok=True)
    _, raw_write_s = timed(_write, path, host)
    _, raw_read_s = timed(path.read_bytes)
    path.unlink()
    return {"raw_write_s": raw_write_s, "raw_read_s": raw_read_s, "device_get_s": device_get_s}


def _write(path: Path, host: Sequence[Any]) -> None:
    with open(path, "wb", buffering=2**20) as file:
        for array in host:
            file.write(memoryview(array.reshape(-1)).cast("B"))
        file.flush()
        os.fsync(file.fileno())


def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """What `function(*args)` returned, and the seconds it took."""
    start = time.perf_counter()
    value = function(*args)
    return value, time.perf_counter() - start


def settle() -> None:
    """Finishes what is left of the measurement before: garbage, and pages that nobody had synced."""
    gc.collect()
    os.sync()


def same(restored: State, state: State, template: State) -> bool:
    """Whether two states have one structure, the same bits, and the shardings of the template."""
    if jax.tree.structure(restored) != jax.tree.structure(state):
        return False
    rows = zip(*map(jax.tree.leaves, (restored, state, template)), strict=True)
    return all(_same_leaf(*row) for row in rows)


def _same_leaf(restored: Any, saved: jax.Array, template: jax.ShapeDtypeStruct) -> bool:
    if not isinstance(restored, jax.Array) or (restored.shape, restored.dtype) != (saved.shape, saved.dtype):
        return False
    ours, theirs = np.asarray(restored), np.asarray(saved)
    is_placed = restored.sharding.is_equivalent_to(template.sharding, restored.ndim)
    return is_placed and ours.tobytes() == theirs.tobytes()


def _on_disk(directory: Path) -> dict[str, int]:
    sizes = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
    return {"disk_bytes": sum(sizes), "files": len(sizes)}


# ---------------------------------------------------------------- several measurements as one


def rotated(names: Sequence[str], turn: int) -> list[str]:
    cut = turn % len(names)
    return [*names[cut:], *names[:cut]]


def summaries(rounds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    return {figure: summary([each[figure] for each in rounds]) for figure in rounds[0]}


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and spread of repeated measurements, and the measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}
