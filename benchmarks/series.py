"""What one save and one restore do not show: training that saves, many saves, the directory of a long run."""

from __future__ import annotations

import math
import os
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

from benchmarks import measure, memory, peers, workloads
from benchmarks.workloads import State, Workload

# ---------------------------------------------------------------- training that saves every N steps

_Step = Callable[[State, Any], State]


def training(
    names: Sequence[str], width: int, rows: int, save_every: int, turns: int, directory: Path
) -> dict[str, Any]:
    """Steps per second of one training loop that never saves, and that saves with each peer, in turns.

    A turn is `save_every` steps with one save in the middle, and the wait for it at the end: in a long run
    every save is overlapped by the steps that follow it. Parameters and optimizer state are donated, as in
    a real loop. What is looked for is a few per cent, less than what other processes make of a turn: turns
    are short and many, each is compared with the one of its round that never saved, and the standard error
    is given. "control" never saves either: what it seems to be slower by is the error of the method.
    """
    step, start, batch = _training_loop(width, rows)
    running: dict[str, peers.Peer | None] = {"never": None, "control": None}
    running |= {name: peers.ALL[name](directory / name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for name in running:  # compiles, and saves once
        _train(step, workloads.copy(start), batch, save_every, running[name])
    for turn in range(turns):
        for name in measure.rotated(list(running), turn):
            state = workloads.copy(start)
            measure.settle()
            seconds[name].append(measure.timed(_train, step, state, batch, save_every, running[name])[1])
    for peer in running.values():
        if peer is not None:
            peer.close()
    return {
        "save_every": save_every,
        "turns": turns,
        "nbytes": sum(leaf.nbytes for leaf in jax.tree.leaves(start)),
        "steps_per_s": {name: measure.summary([save_every / each for each in seconds[name]]) for name in running},
        "slowdown": {name: _slowdown(seconds[name], seconds["never"]) for name in running if name != "never"},
    }


def _slowdown(seconds: Sequence[float], never: Sequence[float]) -> dict[str, float]:
    """By how much a turn is slower than the one of its round that never saved; 0.02 is 2 %."""
    by_round = [mine / base - 1 for mine, base in zip(seconds, never, strict=True)]
    return {
        "mean": statistics.mean(by_round),
        "standard_error": statistics.stdev(by_round) / math.sqrt(len(by_round)),
    }


def _train(step: _Step, state: State, batch: Any, steps: int, peer: peers.Peer | None) -> None:
    for number in range(steps):
        state = step(state, batch)
        if peer is not None and number == steps // 2:
            peer.save(state)
    jax.block_until_ready(state)
    if peer is not None:
        peer.wait()
        peer.finish()


def _training_loop(width: int, rows: int) -> tuple[_Step, State, Any]:
    """A perceptron of three layers with Adam on one batch of `rows`: the step, its first state, the batch."""
    optimizer = optax.adam(1e-3)
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(width, width), (width, width), (width, 10)]
    params = {f"w{i}": jax.random.normal(keys[i], shape) * shape[0] ** -0.5 for i, shape in enumerate(shapes)}
    batch = jax.random.normal(keys[3], (rows, width)), jax.random.randint(keys[4], (rows,), 0, 10)

    def loss(params: Any, batch: Any) -> jax.Array:
        inputs, labels = batch
        hidden = jax.nn.relu(jax.nn.relu(inputs @ params["w0"]) @ params["w1"])
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["w2"], labels).mean()

    def step(state: State, batch: Any) -> State:
        gradient = jax.grad(loss)(state.params, batch)
        updates, opt_state = optimizer.update(gradient, state.opt_state)
        return State(optax.apply_updates(state.params, updates), opt_state)

    start = State(params, optimizer.init(params))
    return jax.jit(step, donate_argnums=0), jax.block_until_ready(start), batch


# ---------------------------------------------------------------- many saves


def saves(count: int, workload: Workload, directory: Path) -> dict[str, Any]:
    """What a run holds after its first saves and after its last: medians over a fifth of them each.

    The first fifth is left out: the first saves make what all of them use.
    """
    peer, state = peers.ALL["ckptmgr"](directory), workloads.build(workload)
    held = []
    for _ in range(count):
        peer.save(workloads.copy(state))
        peer.wait()
        peer.finish()
        held.append(_held(directory))
    peer.close()
    fifth = count // 5
    return {
        "count": count, "nbytes": workload.nbytes, "all": held,
        "early": _median(held[fifth : 2 * fifth]), "late": _median(held[-fifth:]),
    }  # fmt: skip


def _held(directory: Path) -> dict[str, int]:
    memory.give_back()
    return {
        "anonymous_bytes": memory.anonymous_bytes(),
        "threads": len(os.listdir("/proc/self/task")),
        "open_files": len(os.listdir("/proc/self/fd")),
        "files": sum(path.is_file() for path in directory.rglob("*")),
    }


def _median(held: Sequence[Mapping[str, int]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in held) for name in held[0]}


# ---------------------------------------------------------------- a directory of many steps


def opening(steps: int, repeats: int, directory: Path) -> dict[str, Any]:
    """Seconds to open a directory of many steps and to make the first save into it, ckptmgr and stock Orbax.

    Opening is: construct the manager, ask for the newest step and for all of them. The first save is timed
    apart, until training may go on: what opening puts off would show there.
    """
    state = workloads.build(workloads.uniform(6, 2**10))
    openers = {"ckptmgr": (_open_ckptmgr, _save_ckptmgr), "orbax": (_open_orbax, _save_orbax)}
    for name in openers:
        _make_steps(name, state, steps, directory / name)
    rounds: dict[str, list[Mapping[str, float]]] = {name: [] for name in openers}
    for turn in range(repeats):
        for name in measure.rotated(list(openers), turn):
            open_it, save = openers[name]
            measure.settle()
            (manager, found), open_s = measure.timed(open_it, directory / name)
            assert len(found) == steps + turn, f"{name} sees {len(found)} steps of {steps + turn}"
            _, save_s = measure.timed(save, manager, steps + turn + 1, state)
            manager.close()
            rounds[name].append({"open_s": open_s, "first_save_blocked_s": save_s})
    return {"steps": steps, "peers": {name: measure.summaries(rounds[name]) for name in openers}}


def _open_ckptmgr(directory: Path) -> tuple[Any, list[int]]:
    import ckptmgr

    manager = ckptmgr.CheckpointManager(directory)
    manager.latest()
    return manager, manager.steps()


def _save_ckptmgr(manager: Any, step: int, state: State) -> None:
    manager.save(step, state.params, state.opt_state)


def _open_orbax(directory: Path) -> tuple[Any, list[int]]:
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager(directory)
    manager.latest_step()
    return manager, list(manager.all_steps())


def _save_orbax(manager: Any, step: int, state: State) -> None:
    import orbax.checkpoint as ocp

    items = {name: ocp.args.StandardSave(item) for name, item in state._asdict().items()}
    manager.save(step, args=ocp.args.Composite(**items))


def _make_steps(name: str, state: State, steps: int, directory: Path) -> None:
    """Saves step 1 and makes the others of it: hard links, because saving thousands would take minutes."""
    peer = peers.ALL[name](directory)
    peer.save(state)
    peer.close()
    first = directory / "1"
    for step in range(2, steps + 1):
        copied = directory / str(step)
        shutil.copytree(first, copied, copy_function=os.link)
        if name == "ckptmgr":
            _renumber(copied / "manifest.json", step)


def _renumber(path: Path, step: int) -> None:
    """A manifest names its step, under a checksum."""
    from dataclasses import replace

    from ckptmgr.format import manifest

    first = manifest.decode(path.read_bytes(), step=1, path=path.name)
    path.unlink()  # a link: writing through it would change every step
    path.write_bytes(manifest.encode(replace(first, step=step, time=first.time + step)))
