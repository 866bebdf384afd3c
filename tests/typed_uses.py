"""How programs use ckptmgr, for type checkers to read; nothing runs this file.

A line that ends in `# wrong` must be an error, for each checker, and no other line may be one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, assert_type

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ckptmgr
from ckptmgr import Checkpoint, CheckpointInfo, CheckpointManager


class Moments(NamedTuple):
    mean: jax.Array
    size: int


@dataclasses.dataclass
class Shardings:
    kernel: NamedSharding


Model = dict[str, jax.Array]


def restores(manager: CheckpointManager, model: Model, state: Moments, either: Model | None) -> None:
    assert_type(manager.restore(params=model).params, Model)
    assert_type(manager.restore(3, params=model, opt_state=state), Checkpoint[Model, Moments])
    assert_type(manager.restore(params=either).params, Model)
    assert_type(manager.restore(), Checkpoint[Any, Any])
    assert_type(manager.restore(params=model).opt_state, Any)
    assert_type(manager.restore(params=model, optimizer=optax.adam(1e-3)).params, Model)
    assert_type(manager.restore_or(step=0, params=model, opt_state=state), Checkpoint[Model, Moments])
    assert_type(manager.restore_or(params=model, optimizer=optax.adam(1e-3)).params, Model)
    found = manager.restore("best", params=model, extras={"rng": jax.random.key(0)})
    assert_type(found.extras, Mapping[str, Any])
    assert_type(found.info, CheckpointInfo | None)
    assert_type(found.params["w"], jax.Array)
    print(found.params.kernel)  # wrong
    found.step = 4  # wrong
    manager.restore("newest")  # wrong
    manager.restore(parms=model)  # wrong
    manager.restore(optimizer="adam")  # wrong
    manager.restore_or(params=model, patial=True)  # wrong
    manager.restore(cast="yes", rename="old")  # wrong
    manager.restore(params=model, on_progress=lambda done, total: print(done / total))
    manager.restore_or(params=model, on_progress=print)
    manager.restore(on_progress=3)  # wrong


def returns(manager: CheckpointManager, model: Model) -> Checkpoint:
    return manager.restore(params=model)


def returns_typed(manager: CheckpointManager, model: Model, state: Moments) -> Checkpoint[Model, Moments]:
    return manager.restore(params=model, opt_state=state)


def returns_another(manager: CheckpointManager, model: Model) -> Checkpoint[Moments, Any]:
    return manager.restore(params=model)  # wrong


def layouts(manager: CheckpointManager, mesh: Mesh) -> None:
    sharding = NamedSharding(mesh, PartitionSpec("x"))

    def by_path(path: str, leaf: jax.ShapeDtypeStruct) -> NamedSharding | None:
        return sharding if leaf.ndim else None

    several: list[ckptmgr.Layout] = [None, mesh, sharding, ckptmgr.HOST, jax.devices()[0], by_path]
    several += [{"w": sharding}, {"w": [None, PartitionSpec()]}, Shardings(sharding), (sharding, None)]
    for layout in several:
        manager.restore(layout=layout)
    manager.restore(layout="cpu")  # wrong
    manager.restore(layout=7)  # wrong


class Asks:
    def should_save(self, step: int, *, now: float, last: ckptmgr.Record | None, saving: ckptmgr.Saving) -> bool:
        return not saving.in_progress and saving.costs.cost_s < 1


class MyPolicy:
    def should_save(self, step: int, *, now: float, last: ckptmgr.Record | None) -> bool:
        return last is None

    def keep(self, history: Sequence[ckptmgr.Record]) -> set[int]:
        return {record.step for record in history}


def policies() -> None:
    CheckpointManager("run", save_every=100, keep=3)
    CheckpointManager("run", save_every=[ckptmgr.every_seconds(60.0), 10], keep=[ckptmgr.best("loss"), 2])
    CheckpointManager("run", save_every=[ckptmgr.overhead(0.02), ckptmgr.as_often_as_possible(min_seconds=5)])
    CheckpointManager("run", save_every=[Asks(), 10])
    CheckpointManager("run", keep=ckptmgr.overhead(0.02))  # wrong
    CheckpointManager("run", save_every=MyPolicy(), keep=(MyPolicy(), ckptmgr.latest(2)))
    CheckpointManager("run", save_every=ocp.checkpoint_managers.FixedIntervalPolicy(4))
    CheckpointManager("run", keep=ocp.checkpoint_managers.LatestN(2))
    CheckpointManager("run", save_every=ckptmgr.latest(3))  # wrong
    CheckpointManager("run", keep=ckptmgr.at_steps(3))  # wrong
    CheckpointManager("run", keep="3")  # wrong
    CheckpointManager("run", compression="gzip")  # wrong
    ckptmgr.best("loss", mode="least")  # wrong


def saves(manager: CheckpointManager, model: Model, state: Moments) -> None:
    result = manager.save(1, model, state, metrics={"loss": np.float32(0.5)}, on_exists="skip")
    assert_type(result.result(), CheckpointInfo)
    assert_type(manager.info(1).leaves["params"][0].shape, tuple[int, ...])
    assert_type(manager.latest(), int | None)
    for damage in manager.verify(1).damages:
        assert_type(damage, ckptmgr.Damage)
    manager.save(1, model, on_exists="overwrite")  # wrong
