"""Several processes with one device each (jax.distributed): saving together, and restoring a shard each."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import fresh, measure, memory, peers
from benchmarks.workloads import State

# ---------------------------------------------------------------- saving and restoring together


def processes(
    names: Sequence[str], counts: Sequence[int], rows: int, repeats: int, timeout_s: float, directory: Path
) -> dict[str, Any]:
    """Times of each peer with 1, 2, 4 processes that hold a shard each of the same total.

    A peer that cannot is recorded with its own words, and takes nothing with it. Peers do not take turns
    here: each has a group of processes of its own.
    """
    found: dict[str, Any] = {"nbytes": _ARRAYS * rows * _COLUMNS * 4, "peers": {name: {} for name in names}}
    for name in names:
        for count in counts:
            folder = directory / f"{name}-{count}"
            args = (name, rows, repeats, folder)
            found["peers"][name][str(count)] = _try(_together, count, args, timeout_s)
    return found


def late(
    names: Sequence[str], counts: Sequence[int], late_s: float, repeats: int, timeout_s: float, directory: Path
) -> dict[str, Any]:
    """How long a call of `save` takes if each process but the first comes to it `late_s` later.

    The longest of all processes in each repetition: training goes on when all do.
    """
    found: dict[str, Any] = {"late_s": late_s, "peers": {name: {} for name in names}}
    for name in names:
        for count in counts:
            args = (name, late_s, repeats, directory / f"{name}-{count}")
            found["peers"][name][str(count)] = _try(_blocked, count, args, timeout_s)
    return found


def _blocked(count: int, args: tuple[Any, ...], timeout_s: float) -> dict[str, Any]:
    answers = group(_save_late, count, args, timeout_s)
    rounds = [
        {"first_s": each[0]["blocked_s"], "blocked_s": max(one["blocked_s"] for one in each),
         "durable_s": max(one["durable_s"] for one in each)}
        for each in zip(*answers, strict=True)
    ]  # fmt: skip
    return measure.summaries(rounds)


_LATE_ROWS = 64  # 4 MB in all


def _save_late(name: str, late_s: float, repeats: int, directory: Path) -> list[dict[str, float]]:
    state, peer, rounds = _state(_LATE_ROWS)[0], peers.ALL[name](directory), []
    for _ in range(repeats + 1):
        time.sleep(late_s * (jax.process_index() > 0))
        _, blocked_s = measure.timed(peer.save, state)
        _, rest_s = measure.timed(peer.wait)
        rounds.append({"blocked_s": blocked_s, "durable_s": blocked_s + rest_s})
    peer.close()
    return rounds[1:]


def _try(run: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    try:
        return run(*args) | {"supported": True}
    except fresh.FailedError as problem:
        return {"supported": False, "reason": str(problem).strip().splitlines()[-1]}


def _together(count: int, args: tuple[Any, ...], timeout_s: float) -> dict[str, Any]:
    """The slowest process of each repetition, as training goes on when all do; the most memory that one takes."""
    answers = group(_save_and_restore, count, args, timeout_s)
    if not all(answer["verified"] for answer in answers):
        raise fresh.FailedError("what was restored is not what was saved")
    rounds = [
        {figure: max(answer["rounds"][i][figure] for answer in answers) for figure in measure.TIMES}
        for i in range(len(answers[0]["rounds"]))
    ]
    peaks = {figure: max(answer[figure] for answer in answers) for figure in memory.PEAKS}
    return measure.summaries(rounds) | peaks | {"verified": True}


def group(function: Callable[..., Any], count: int, args: tuple[Any, ...], timeout_s: float) -> list[Any]:
    """What a function returns in each process of a job."""
    address = free_address()
    ranks = [(address, count, rank, function, args) for rank in range(count)]
    return fresh.call_group(as_one_of, ranks, timeout_s=timeout_s)


def free_address() -> str:
    """For the coordinator of a job on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def as_one_of(address: str, count: int, rank: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Runs a function as one process of a job."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=count, process_id=rank)
    value = function(*args)
    jax.distributed.shutdown()
    return value


_ARRAYS, _COLUMNS = 16, 1024


def _state(rows: int) -> tuple[State, State]:
    """A shard of each array in every process, and the template of it."""
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("shard",)), PartitionSpec("shard", None))
    host = np.random.default_rng(0).standard_normal((rows, _COLUMNS), dtype=np.float32)

    def make(scale: int) -> jax.Array:
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index] * np.float32(scale))

    half = _ARRAYS // 2
    state = State(*({f"w{i}": make(i + 1) for i in part} for part in (range(half), range(half, _ARRAYS))))
    return state, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _save_and_restore(name: str, rows: int, repeats: int, directory: Path) -> dict[str, Any]:
    state, template = _state(rows)
    peer = peers.ALL[name](directory)
    rounds = [measure.round_trip(peer, state, template, same=_same_shards) for _ in range(repeats + 1)]
    peaks = _peaks(peer, state, template)
    peer.close()
    return {"verified": all(each.pop("verified") for each in rounds), "rounds": rounds[1:], **peaks}


def _peaks(peer: peers.Peer, state: State, template: State) -> dict[str, int]:
    """Peak bytes of a save and of a restore in this process, above what the job holds."""
    with memory.Peak() as saving:
        peer.save(state)
        peer.wait()
        peer.finish()
    with memory.Peak() as restoring:
        restored = jax.block_until_ready(peer.restore(template))
    del restored
    return {"save_peak_bytes": saving.nbytes, "restore_peak_bytes": restoring.nbytes}


def _same_shards(restored: State, state: State, template: State) -> bool:
    """Whether this process got the bits it saved."""
    pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True)
    return all(
        new.sharding.is_equivalent_to(old.sharding, old.ndim)
        and len(new.addressable_shards) == len(old.addressable_shards)
        and all(
            np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()
            for a, b in zip(new.addressable_shards, old.addressable_shards, strict=True)
        )
        for new, old in pairs
    )


# ---------------------------------------------------------------- one shard each


def shards(
    names: Sequence[str], count: int, rows: int, columns: int, timeout_s: float, directory: Path
) -> dict[str, Any]:
    """Bytes read over bytes needed when each of `count` processes restores its shard, for ckptmgr and stock Orbax.

    One array is saved in `count` shards along its first axis, by one process; it is restored in as many
    shards along that axis, then along the other. Counted are the bytes that TensorStore asks of files.
    """
    found: dict[str, Any] = {"count": count, "shard_bytes": rows * columns * 4 // count, "peers": {}}
    for name in names:
        folder = directory / name
        fresh.call(_save_sharded, name, count, rows, columns, folder, devices=count)
        axes = {"saved_axis": 0, "other_axis": 1}
        found["peers"][name] = {"chunk_bytes": fresh.call(_chunk_bytes, folder)} | {
            label: _try(_read_along, axis, name, count, rows, columns, folder, timeout_s)
            for label, axis in axes.items()
        }
    return found


def _read_along(
    axis: int, name: str, count: int, rows: int, columns: int, directory: Path, timeout_s: float
) -> dict[str, Any]:
    answers = group(_restore_shard, count, (name, axis, rows, columns, directory), timeout_s)
    if not all(answer["verified"] for answer in answers):
        raise fresh.FailedError("what was restored is not what was saved")
    most = max(answer["read_bytes"] for answer in answers)
    return {"read_bytes": most, "ratio": most / (rows * columns * 4 // count), "verified": True}


def _values(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)


def _save_sharded(name: str, count: int, rows: int, columns: int, directory: Path) -> None:
    mesh = Mesh(np.array(jax.devices()[:count]), ("shard",))
    array = jax.device_put(_values(rows, columns), NamedSharding(mesh, PartitionSpec("shard", None)))
    peer = peers.ALL[name](directory)
    peer.save(State({"w": array}, {"count": jax.numpy.ones(1)}))  # stock Orbax refuses an empty item
    peer.close()


def _chunk_bytes(directory: Path) -> int:
    """Size of the chunks that the array was written in."""
    item = next(path for path in directory.glob("*/params"))
    for driver in ("zarr3", "zarr"):
        spec = {"driver": driver, "kvstore": {"driver": "ocdbt", "base": f"file://{item}/", "path": "w/"}}
        try:
            array = ts.open(spec, open=True, read=True).result()
        except ValueError:
            continue  # written by the other driver
        return int(np.prod(array.chunk_layout.read_chunk.shape)) * array.dtype.numpy_dtype.itemsize
    raise ValueError(f"{item} holds no array named w")


def _restore_shard(name: str, axis: int, rows: int, columns: int, directory: Path) -> dict[str, Any]:
    spec = PartitionSpec(*["shard" if each == axis else None for each in range(2)])
    mesh = Mesh(np.array(jax.devices()), ("shard",))
    array = jax.ShapeDtypeStruct((rows, columns), "float32", sharding=NamedSharding(mesh, spec))
    count = jax.ShapeDtypeStruct((1,), "float32", sharding=NamedSharding(mesh, PartitionSpec()))
    template = State({"w": array}, {"count": count})
    peer = peers.ALL[name](directory)
    before = _read_bytes()
    restored = jax.block_until_ready(peer.restore(template))
    read_bytes = _read_bytes() - before
    peer.close()
    expected, (shard,) = _values(rows, columns), restored.params["w"].addressable_shards
    return {"read_bytes": read_bytes, "verified": np.array_equal(np.asarray(shard.data), expected[shard.index])}


def _read_bytes() -> int:
    """Bytes that this process has read from files, by the kernel's count, or that TensorStore has mapped."""
    lines = Path("/proc/self/io").read_text().splitlines()
    mapped = ts.experimental_collect_matching_metrics("/tensorstore/file/mmap_bytes")
    return int(dict(line.split(": ") for line in lines)["rchar"]) + sum(
        value["value"] for metric in mapped for value in metric["values"]
    )
