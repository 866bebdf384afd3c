"""Where the time of a save and a restore goes, line by line: `python -m benchmarks.profiling [many] [repeats]`.

Looks at every thread every millisecond, for stock Orbax and for ckptmgr, and prints the lines they were
seen at most often: the innermost Python line, so that a line that calls into JAX or TensorStore stands
for what these do. A share is of the wall time, and a thread that only waits is not counted.
"""

from __future__ import annotations

import collections
import linecache
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax

from benchmarks import peers, workloads

ROWS = 8
IDLE = {"wait", "_wait_for_tstate_lock", "select", "acquire", "_worker", "join", "sample", "_recv", "read"}


class Sampler:
    """Counts the lines at which any thread is seen while a call runs."""

    def __init__(self) -> None:
        self.seen: collections.Counter[tuple[str, int, str]] = collections.Counter()
        self.moments = 0
        self._done = threading.Event()

    def sample(self) -> None:
        while not self._done.wait(0.001):
            self.moments += 1
            for frame in sys._current_frames().values():
                code = frame.f_code
                if code.co_name not in IDLE and code.co_filename != __file__:
                    self.seen[(code.co_filename, frame.f_lineno, code.co_name)] += 1

    def run(self, call: Callable[[], object]) -> float:
        thread = threading.Thread(target=self.sample)
        thread.start()
        started = time.perf_counter()
        call()
        took = time.perf_counter() - started
        self._done.set()
        thread.join()
        self._done.clear()
        return took


def show(what: str, sampler: Sampler, took: list[float]) -> None:
    print(f"\n{what}: {sorted(took)[len(took) // 2]:.3f} s while being watched (median of {len(took)})")
    for (file, line, function), count in sampler.seen.most_common(ROWS):
        place = "/".join(Path(file).parts[-2:])
        source = linecache.getline(file, line).strip()
        print(f"  {count / max(1, sampler.moments):6.1%}  {place}:{line} in {function}: {source[:70]}")


def main(name: str = "many", repeats: str = "5") -> None:
    workload = workloads.all_workloads(quick=False)[name]
    state = workloads.build(workload)
    print(f"{workload.title}: lines seen most often")
    for kind in (peers.Orbax, peers.Ckptmgr):
        with tempfile.TemporaryDirectory() as directory:
            watch(kind(Path(directory)), state, int(repeats))


def watch(peer: peers.Peer, state: workloads.State, repeats: int) -> None:
    saving, restoring = Sampler(), Sampler()
    save_s, restore_s = [], []
    peer.save(state)  # the first save of a process pays for what later ones find made
    peer.wait()
    for _ in range(repeats):
        fresh = workloads.copy(state)
        save_s.append(saving.run(lambda fresh=fresh: (peer.save(fresh), peer.wait())))
        restore_s.append(restoring.run(lambda: jax.block_until_ready(peer.restore(state))))
    peer.close()
    show(f"{peer.title}, save until durable", saving, save_s)
    show(f"{peer.title}, restore", restoring, restore_s)


if __name__ == "__main__":
    main(*sys.argv[1:])
