"""Saves and restores in a bucket beside TensorStore alone, with a delay for each request.

    python -m benchmarks.latency --delays-ms 0,20,100 --out runs/latency

The buckets are servers on this machine (moto for S3, gcp-storage-emulator for GCS), so the bytes take the time
that these servers take. A proxy adds the delay.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath

import ckptmgr
from benchmarks import counting, fresh, peers, slow_proxy, workloads
from benchmarks.workloads import State, Workload
from ckptmgr.arrays import chunks, database

WORKLOADS = {
    "few": workloads.uniform(7, 10_000),
    "many": workloads.uniform(301, 25_000_000),
    "large": workloads.uniform(97, 201_000_000),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, writes, and prints."""
    options = _parse(arguments)
    rows: list[dict[str, Any]] = []
    for store in options.stores.split(","):
        for delay_ms in map(float, options.delays_ms.split(",")):
            for name in options.workloads.split(","):
                with _bucket(store, delay_ms / 1000) as (environment, port):
                    run, workload = f"{store}://bucket/run", WORKLOADS[name]
                    found = fresh.call(_measured, workload, run, options.repeats, environment, port)
                title = f"{workload.leaves} leaves, {workloads.spell_bytes(workload.nbytes)}"
                rows.append({"store": store, "delay_ms": delay_ms, "title": title, **found})
                print(_line(rows[-1]), file=sys.stderr, flush=True)
    text = "\n".join([_HEAD, *map(_line, rows)])
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "latency.json").write_text(json.dumps(rows, indent=1) + "\n")
        (options.out / "latency.txt").write_text(text + "\n")
    print(text)
    return 0


_HEAD = (
    f"{'bucket':<7}{'delay':>7}  {'state':<24}{'what':<9}{'ckptmgr':>9}{'TensorStore alone':>19}{'ratio':>7}"
    f"{'requests':>16}"
)


def _line(row: dict[str, Any]) -> str:
    return "\n".join(
        f"{row['store']:<7}{row['delay_ms']:>4.0f} ms  {row['title']:<24}{what:<9}"
        f"{row['ckptmgr'][what]:>7.2f} s{row['tensorstore'][what]:>17.2f} s"
        f"{row['ckptmgr'][what] / row['tensorstore'][what]:>7.2f}"
        f"{row['ckptmgr'][what + ' requests']:>8}{row['tensorstore'][what + ' requests']:>8}"
        for what in ("save", "restore")
    )


# ---------------------------------------------------------------- one measurement


def _measured(
    workload: Workload, run: str, repeats: int, environment: dict[str, str], port: int
) -> dict[str, Any]:
    """Times and requests of both, in turns; the quietest of the rounds after the first, which makes plans."""
    os.environ.update(environment)
    state, template = workloads.build(workload), workloads.template(workload)
    both: dict[str, peers.Peer] = {
        "ckptmgr": _Ckptmgr(f"{run}/ckptmgr"),
        "tensorstore": _TensorStore(f"{run}/tensorstore"),
    }
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in both}
    for _ in range(repeats + 1):
        for name, peer in both.items():
            rounds[name].append(_round(peer, state, template, port))
    both["ckptmgr"].close()
    return {
        name: {what: min(each[what] for each in found[1:]) for what in found[0]} for name, found in rounds.items()
    }


def _round(peer: peers.Peer, state: State, template: State, port: int) -> dict[str, float]:
    before = slow_proxy.requests(port)
    began = time.perf_counter()
    peer.save(workloads.copy(state))
    peer.wait()
    saved, between = time.perf_counter(), slow_proxy.requests(port)
    peer.finish()
    settled, again = slow_proxy.requests(port), time.perf_counter()
    restored = jax.block_until_ready(peer.restore(template))
    ended = time.perf_counter()
    for have, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        if np.asarray(have).tobytes() != np.asarray(want).tobytes():
            raise AssertionError(f"{type(peer).__name__} has not restored what it saved")
    return {
        "save": saved - began, "save requests": between - before, "requests after": settled - between,
        "restore": ended - again, "restore requests": slow_proxy.requests(port) - settled,
    }  # fmt: skip


class _Ckptmgr(peers.Ckptmgr):
    def __init__(self, run: str) -> None:
        self._manager, self._step = ckptmgr.CheckpointManager(run, keep=2), 0


class _TensorStore(peers.Peer):
    """The arrays in one database, one transaction; with the checksums that ckptmgr has, and nothing else."""

    def __init__(self, run: str) -> None:
        self._run, self._step = run, 0

    def _store(self) -> Any:
        base = database.open_spec(epath.Path(f"{self._run}/{self._step}"))["base"]
        config = {"compression": None, "max_inline_value_bytes": 4096}
        nodes = {"total_bytes_limit": 100_000_000}  # as Orbax has it: else a node is read again and again
        spec = {"driver": "ocdbt", "base": base, "config": config, "cache_pool": nodes}
        return ts.KvStore.open(spec, context=ts.Context()).result()

    def save(self, state: State) -> None:
        self._step += 1
        transaction = ts.Transaction(atomic=True)
        store = self._store().with_transaction(transaction)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        opened = [ts.open(_zarr(leaf), kvstore=store / f"{n}/", create=True) for n, leaf in enumerate(leaves)]
        for array, leaf in zip(opened, leaves, strict=True):
            array.result().write(leaf, can_reference_source_data_indefinitely=True).copy.result()
        transaction.commit_async().result()

    def restore(self, template: State) -> State:
        leaves, treedef = jax.tree.flatten(template)
        store = self._store()
        opened = [ts.open({"driver": "zarr3"}, kvstore=store / f"{n}/", open=True) for n in range(len(leaves))]
        read = [array.result().read() for array in opened]
        values = [each.result() for each in read]
        return jax.tree.unflatten(treedef, jax.device_put(values, [leaf.sharding for leaf in leaves]))


def _zarr(leaf: np.ndarray[Any, Any]) -> dict[str, Any]:
    stored = chunks.Stored(leaf.shape, leaf.dtype.name, chunks.whole(leaf.shape))
    return {"driver": "zarr3", "metadata": chunks.metadata(stored, None)}


# ---------------------------------------------------------------- buckets on this machine


@contextlib.contextmanager
def _bucket(store: str, delay_s: float) -> Iterator[tuple[dict[str, str], int]]:
    """A server, and a proxy that adds the delay: the environment that leads there, and the port of the proxy."""
    port = counting.free_port()
    with counting.server(store) as behind:
        proxy = [sys.executable, slow_proxy.__file__, str(port), str(behind), str(delay_s)]
        with counting.running(proxy):
            counting.answers(f"http://localhost:{port}/")
            yield counting.environment(port, port), port


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__.partition("\n")[0])
    parser.add_argument("--delays-ms", default="0,20,100", help="added to each request (default: %(default)s)")
    parser.add_argument("--stores", default="s3", help="s3, gs, or both (default: %(default)s)")
    parser.add_argument(
        "--workloads", default="many,large", help=f"of {','.join(WORKLOADS)}; default: %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=3, help="the quietest counts (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where latency.txt and latency.json go")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
