"""What local saves (`local=`) cost a job of four processes, and what they spare it: `python -m benchmarks.local`.

The processes are real (jax.distributed with gloo), on this one machine. Each has a local directory of its own, in
/dev/shm if there is one; durable saves go to a disk. The variants take turns: a loop that never saves, one that
saves durably, one that saves locally. In a turn the loop takes 20 steps and saves after the first, and waits for
the save at its end, as the next save would. Figures are medians of the slowest process of each turn; of the calls
of save, which wait for no other process, medians of all. All processes share this machine's cores, which in a job
have as many machines: read the ratios.

The day is described in `benchmarks.local_day`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ckptmgr
from benchmarks import distributed, fresh, local_day, machine, measure, memory, report
from benchmarks.workloads import spell_bytes
from ckptmgr.run import peers

VARIANTS = ("without", "durable", "local")
_NEVER = 10**9
_TIMEOUT_S = 1200.0
Turn = Mapping[str, float]

# ---------------------------------------------------------------- cost, in one process of the job


class _Counted:
    """A file of a connection that counts what is written to it."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> Any:
        _Counting.sent.append(len(data))
        return self._file.write(data)


class _Counting(peers._Handler):
    """Serves parts, and counts the bytes."""

    sent: list[int] = []  # noqa: RUF012

    def setup(self) -> None:
        super().setup()
        self.wfile: Any = _Counted(self.wfile)


class _Loop:
    """The training loop of one process, and a manager for each variant."""

    def __init__(self, width: int, every: int, disk: Path, local: Path) -> None:
        self._every, self._step = every, 0
        self._local = local / str(jax.process_index())
        self._update, self.start = _model(width)
        self._managers = {
            "without": None,
            "durable": ckptmgr.CheckpointManager(disk / "durable", keep=2),
            "local": ckptmgr.CheckpointManager(disk / "local", save_every=_NEVER, local=self._local),
        }

    def turn(self, variant: str) -> Turn:
        """So many steps, with a save after the first."""
        manager, state = self._managers[variant], jax.tree.map(jnp.copy, self.start)
        jax.block_until_ready(self._update(state))  # all processes begin together
        times = dict.fromkeys(("blocked_s", "durable_s"), 0.0)
        began = time.perf_counter()
        for at in range(self._every):
            state = jax.block_until_ready(self._update(state))
            self._step += 1
            if at == 0 and manager is not None:
                saved, times["blocked_s"] = measure.timed(manager.save, self._step, *state)
        if manager is not None:
            manager.wait()
            times["durable_s"] = saved.result().durable_s
        return times | {"seconds": time.perf_counter() - began}

    def part_bytes(self) -> int:
        """Of this process, in its newest local step."""
        found = self._local.glob(f"*/*.*.*.*/{jax.process_index()}")
        newest = max(found, key=lambda folder: int(folder.parent.name.split(".")[2]))
        return _bytes_below(newest)

    def local_bytes(self) -> int:
        return _bytes_below(self._local)

    def close(self) -> None:
        for manager in self._managers.values():
            if manager is not None:
                manager.close()


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _model(width: int) -> tuple[Any, Any]:
    """A perceptron of four layers and Adam; every array is spread over all processes."""
    spread = NamedSharding(Mesh(np.array(jax.devices()), ("shard",)), PartitionSpec("shard"))
    whole = NamedSharding(spread.mesh, PartitionSpec())
    optimizer, names = optax.adam(1e-3), [f"w{n}" for n in range(4)]

    def loss(params: Any) -> Any:
        values = jnp.ones((16, width)) / width
        for name in names:
            values = jnp.tanh(values @ params[name])
        return jnp.mean(values**2)

    def make() -> Any:
        params = {name: jax.random.normal(jax.random.key(n), (width, width)) for n, name in enumerate(names)}
        return params, optimizer.init(params)

    def update(state: Any) -> Any:
        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    places = jax.tree.map(lambda leaf: spread if leaf.ndim else whole, jax.eval_shape(make))
    return jax.jit(update, out_shardings=places), jax.jit(make, out_shardings=places)()


def _cost(width: int, every: int, rounds: int, disk: Path, local: Path) -> dict[str, Any]:
    """The turns of this process, and what it has sent and held."""
    with mock.patch.object(peers, "_Handler", _Counting):
        loop = _Loop(width, every, disk, local)
    for variant in VARIANTS:  # compiles, and makes the plan of a save
        loop.turn(variant)
    _Counting.sent.clear()
    turns: dict[str, list[Turn]] = {variant: [] for variant in VARIANTS}
    for number in range(rounds):
        for variant in measure.rotated(VARIANTS, number):
            turns[variant].append(loop.turn(variant))
    found = {"turns": turns, "sent_bytes": sum(_Counting.sent) / rounds}
    found |= {"part_bytes": loop.part_bytes(), "local_bytes": loop.local_bytes()}
    found["peak_bytes"] = {variant: _peak(loop, variant, max(1, rounds // 3)) for variant in VARIANTS}
    loop.close()
    return found


def _peak(loop: _Loop, variant: str, times: int) -> float:
    """The most memory that a turn takes above what the process holds; without the files in /dev/shm."""
    found = []
    for _ in range(times):
        with memory.Peak() as peak:
            loop.turn(variant)
        found.append(peak.nbytes)
    return statistics.median(found)


# ---------------------------------------------------------------- cost, of the job


def cost(width: int, every: int, rounds: int, disk: Path, local: Path) -> dict[str, Any]:
    """What each variant costs the job."""
    answers = distributed.group(_cost, local_day.PROCESSES, (width, every, rounds, disk, local), _TIMEOUT_S)
    found: dict[str, Any] = {"every": every, "rounds": rounds, "variants": {}}
    for variant in VARIANTS:
        slowest = [
            {name: max(turn[name] for turn in turns) for name in turns[0]}
            for turns in zip(*(each["turns"][variant] for each in answers), strict=True)
        ]
        figures = {name: statistics.median(turn[name] for turn in slowest) for name in slowest[0]}
        figures["blocked_s"] = statistics.median(
            turn["blocked_s"] for each in answers for turn in each["turns"][variant]
        )
        figures["steps_per_s"] = every / figures.pop("seconds")
        figures["peak_bytes"] = max(each["peak_bytes"][variant] for each in answers)
        found["variants"][variant] = figures
    variants = found["variants"]
    found["part_bytes"] = max(each["part_bytes"] for each in answers)
    found["sent"] = max(each["sent_bytes"] / each["part_bytes"] for each in answers)
    found["held"] = max(each["local_bytes"] / each["part_bytes"] for each in answers)
    found["blocked"] = variants["local"]["blocked_s"] / variants["durable"]["blocked_s"]
    found["slower"] = {
        name: _slower([each["turns"] for each in answers], name) for name in VARIANTS if name != "without"
    }
    return found


def _slower(turns: Sequence[Mapping[str, Sequence[Turn]]], variant: str) -> float:
    """A turn beside the one of its round that never saved."""
    mine, base = (
        [max(turn["seconds"] for turn in each) for each in zip(*(own[name] for own in turns), strict=True)]
        for name in (variant, "without")
    )
    return statistics.median(one / other for one, other in zip(mine, base, strict=True))


# ---------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes and prints."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parse(given)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the directories go
    options.out.mkdir(parents=True, exist_ok=True)
    occasion = machine.occasion(given, "benchmarks.local")
    with contextlib.ExitStack() as stack:
        disk, local = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckptmgr-benchmark-", dir=place)))
            for place in (options.dir, _memory_disk())
        )
        facts = machine.facts(disk) | {"devices": fresh.call(machine.devices)}
        _say("a day, simulated")
        found: dict[str, Any] = {"days": options.days, "simulated": local_day.simulate(options.days)}
        _say("cost")
        found["cost"] = cost(options.width, local_day.LOCAL_EVERY, options.rounds, disk / "cost", local / "cost")
        _say("a day, of real processes")
        plan = local_day.plan(options.step_ms / 1e3, options.steps, options.seed)
        found["plan"] = {"step_s": plan.step_s, "steps": options.steps, "failures": len(plan.victims)}
        found["real"] = local_day.real(plan, disk / "day", local / "day")
    results = occasion | {"machine": facts, "versions": machine.versions()} | found
    (options.out / "local.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (options.out / "local.txt").write_text(text(results) + "\n")
    print(text(results))
    return 0


def _memory_disk() -> Path | None:
    found = Path("/dev/shm")
    return found if found.is_dir() else None


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _parse(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.local", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/performance"), help="where results go")
    parser.add_argument("--dir", type=Path, help="durable saves go to a temporary directory in it, then removed")
    parser.add_argument("--width", type=int, default=1024, help="of each layer; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each variant; default: %(default)s")
    parser.add_argument("--days", type=int, default=100, help="that are simulated; default: %(default)s")
    parser.add_argument("--step-ms", type=float, default=12.0, help="a step of the real day; default: %(default)s")
    parser.add_argument("--steps", type=int, default=3_600, help="that the real day trains, with local saves and "
                        "again without; default: %(default)s")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, help="of the real failures; default: %(default)s")
    return parser.parse_args(given)


# ---------------------------------------------------------------- tables

_COST = ("", "a call of save, ms", "beside durable", "a save is over after, ms", "a turn beside without",
         "peak memory beside own part")  # fmt: skip
_DAY = ("", "steps done again", "trains", "saving", "done again", "restarting")
_REAL = ("", "failures", "steps trained", "done again", "simulated", "share kept", "simulated",
         "step, ms", "a save is over after, ms")  # fmt: skip


def text(results: Mapping[str, Any]) -> str:
    """Everything that was measured, for a terminal."""
    found = results["cost"]
    lines = [
        *report.occasion(results),
        "",
        report.section(
            f"cost: {local_day.PROCESSES} processes, a part of {spell_bytes(found['part_bytes'])} in each, saved "
            f"every {found['every']} steps; {found['rounds']} turns"
        ),
        *report.table(_COST, _cost_rows(results)),
        f"each process sends for each local save {found['sent']:.3f} x the bytes of its own part",
        f"each local directory holds {found['held']:.2f} x the bytes of an own part",
    ]
    for source, each in results["simulated"].items():
        title = f"a day, simulated: {source}, a failure every {each['mtbf_s'] / 3600:.2g} h"
        lines += ["", report.section(title), *report.table(_DAY, _day_rows(each))]
    plan = results["plan"]
    title = f"real processes: {plan['steps']:,} steps, each of at least {1e3 * plan['step_s']:g} ms"
    return "\n".join([*lines, "", report.section(title), *report.table(_REAL, _real_rows(results))])


def _cost_rows(results: Mapping[str, Any]) -> list[list[str]]:
    found = results["cost"]
    rows = []
    for name, each in found["variants"].items():
        ratio = each["blocked_s"] / found["variants"]["durable"]["blocked_s"]
        times = (f"{1e3 * each['blocked_s']:.3g}", f"{ratio:.2f} x", f"{1e3 * each['durable_s']:.3g}")
        slower = f"{found['slower'][name]:.2f} x" if name in found["slower"] else "1"
        peak = f"{each['peak_bytes'] / found['part_bytes']:.2f} x"
        rows.append([name, *(times if name != "without" else ("-",) * 3), slower, peak])
    return rows


def _day_rows(found: Mapping[str, Any]) -> list[list[str]]:
    return [
        [name, f"{each['lost']:,.0f}",
         *(f"{each[what]:.2%}" for what in ("trains", "saving", "again", "restarting"))]
        for name, each in found["policies"].items()
    ]  # fmt: skip


def _real_rows(results: Mapping[str, Any]) -> list[list[str]]:
    titles = {
        "durable": f"durable every {local_day.DURABLE_EVERY:,}",
        "local": f"local every {local_day.LOCAL_EVERY}, durable every {local_day.DURABLE_EVERY:,}",
    }
    return [
        [titles[name], str(each["failures"]), f"{each['trained']:,}",
         f"{each['lost']:,}", f"{each['simulated_lost']:,}", f"{1 - each['lost'] / each['trained']:.1%}",
         f"{1 - each['simulated_lost'] / each['simulated_trained']:.1%}", f"{1e3 * each['step_s']:.3g}",
         f"{1e3 * each['times_s'][name]:.3g}"]
        for name, each in results["real"].items()
    ]  # fmt: skip


def markdown(results: Mapping[str, Any]) -> dict[str, str]:
    """The tables of docs/local.md, by name."""
    tables = {"cost": _cost_rows(results), "real": _real_rows(results)}
    tables |= {source: _day_rows(each) for source, each in results["simulated"].items()}
    return {name: "\n".join(f"| {' | '.join(row)} |" for row in rows) for name, rows in tables.items()}


if __name__ == "__main__":
    sys.exit(main())
