"""The memory that a save and a restore take above what the job itself holds.

Counted is anonymous memory (`RssAnon` of /proc/self/status): pages of mapped files can be dropped by the
kernel and are not the job's. Another process samples it, because in this one the sampler would wait for the
interpreter's lock exactly while a library copies.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import math
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import jax
import numpy as np

from benchmarks import peers, workloads
from benchmarks.workloads import Workload

PEAKS = ("save_peak_bytes", "restore_peak_bytes")
_SAMPLER = """
import select, sys
def anonymous_kb():
    with open("/proc/%s/status" % sys.argv[1]) as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
first = peak = anonymous_kb()
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0.001)[0]:
    peak = max(peak, anonymous_kb())
print(max(peak, anonymous_kb()) - first)
"""


class Peak:
    """Inside it the anonymous memory of this process is watched; `nbytes` is the most it grew by."""

    nbytes = 0

    def __enter__(self) -> Self:
        give_back()
        self._sampler = subprocess.Popen(
            [sys.executable, "-S", "-c", _SAMPLER, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._sampler.stdout is not None
        self._sampler.stdout.readline()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        grown_kb, _ = self._sampler.communicate("stop\n")
        self.nbytes = int(grown_kb) * 1024


def anonymous_bytes() -> int:
    """What this process holds now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def give_back() -> None:
    """Returns free memory to the system: what is used again would not be seen to be used."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def peaks(workload: Workload, name: str, directory: Path, scratch: Path) -> dict[str, int]:
    """Peak bytes of a restore from `directory`, then of a save into it; runs in a process of its own."""
    _warm_up(name, workload.devices, scratch)
    peer, template = peers.ALL[name](directory), workloads.template(workload)
    with Peak() as restoring:
        restored = jax.block_until_ready(peer.restore(template))
    del restored
    state = workloads.build(workload)
    with Peak() as saving:
        peer.save(state)
        peer.wait()
        peer.finish()
    peer.close()
    return {"save_peak_bytes": saving.nbytes, "restore_peak_bytes": restoring.nbytes}


def bare_arrays(workload: Workload) -> int:
    """Peak bytes of putting as many arrays on the devices, from host memory that is there already.

    What is above the bytes of the arrays is JAX's own, and in every restore.
    """
    leaves = jax.tree.leaves(workloads.template(workload))
    jax.block_until_ready(jax.device_put(np.zeros(3)))  # starts the devices
    host = {leaf.shape: _unaligned(leaf.shape, leaf.dtype) for leaf in leaves}
    with Peak() as putting:
        put = jax.device_put(
            [host[leaf.shape] for leaf in leaves], [leaf.sharding for leaf in leaves], may_alias=False
        )
        jax.block_until_ready(put)
    return putting.nbytes


def _unaligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Values that JAX has to copy: it takes over memory that begins where it wants it."""
    values = np.ones(math.prod(shape) + 1, dtype)
    return values[1:].reshape(shape)


def _warm_up(name: str, devices: int, scratch: Path) -> None:
    """Imports, threads and compiled code are paid once in a job and do not grow with what is saved."""
    small = dataclasses.replace(workloads.uniform(6, 2**12), devices=devices)
    peer = peers.ALL[name](scratch)
    peer.save(workloads.build(small))
    peer.wait()
    jax.block_until_ready(peer.restore(workloads.template(small)))
    peer.close()
