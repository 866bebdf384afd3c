"""What is saved: parameters and the state of Adam after one step, in the sizes that people train."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

Shapes = Mapping[str, Any]
"""Nested dicts whose leaves are shapes (tuples of ints); all values are float32."""


class State(NamedTuple):
    """What a training job saves."""

    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model to save, before any array of it is made."""

    name: str
    title: str
    params: Shapes
    devices: int = 1
    """Over how many devices every array is sharded, along the first axis that they divide."""

    @property
    def leaves(self) -> int:
        return 3 * len(_sizes(self.params)) + 1  # params, Adam's mu and nu, and its count

    @property
    def nbytes(self) -> int:
        return 3 * 4 * sum(_sizes(self.params)) + 4


def _sizes(shapes: Any) -> list[int]:
    if isinstance(shapes, tuple):
        return [math.prod(shapes)]
    return [size for below in shapes.values() for size in _sizes(below)]


# ---------------------------------------------------------------- the models


def layers(count: int, rows: int, columns: int) -> Shapes:
    return {f"layer{i}": {"w": (rows, columns), "b": (columns,)} for i in range(count)}


def gpt2(blocks: int, width: int, vocabulary: int, context: int) -> Shapes:
    """GPT-2; with (12, 768, 50257, 1024) the 124 M of https://huggingface.co/openai-community/gpt2."""

    def norm() -> Shapes:
        return {"scale": (width,), "bias": (width,)}

    def dense(inputs: int, outputs: int) -> Shapes:
        return {"kernel": (inputs, outputs), "bias": (outputs,)}

    def block() -> Shapes:
        return {
            "ln_1": norm(), "c_attn": dense(width, 3 * width), "c_proj": dense(width, width),
            "ln_2": norm(), "c_fc": dense(width, 4 * width), "mlp_proj": dense(4 * width, width),
        }  # fmt: skip

    embeddings = {"wte": (vocabulary, width), "wpe": (context, width)}
    return embeddings | {f"h{i}": block() for i in range(blocks)} | {"ln_f": norm()}


def uniform(leaves: int, total_bytes: int) -> Workload:
    """About `leaves` leaves of equal size, `total_bytes` together: a point of a series."""
    arrays = max(1, leaves // 3)
    values = max(1, total_bytes // (3 * 4 * arrays))
    shapes = {f"w{i}": (values,) for i in range(arrays)}
    name = f"{leaves} leaves, {total_bytes} bytes"
    return Workload(name, name, shapes)


def all_workloads(quick: bool) -> dict[str, Workload]:
    """By the names that `--workloads` takes. `quick` keeps the structure and shrinks the arrays."""
    many = layers(20, 8, 8) if quick else layers(500, 64, 64)
    big = layers(16, 16, 64) if quick else layers(16, 1024, 4096)
    model = gpt2(2, 32, 256, 64) if quick else gpt2(12, 768, 50257, 1024)
    found = [
        Workload("tiny", "", layers(1, 3, 1)),
        Workload("many", "", many),
        Workload("big", "", big),
        Workload("gpt2", "GPT-2 and Adam", model),
        Workload("gpt2-sharded", "GPT-2 and Adam over 8 devices", model, devices=8),
    ]
    return {each.name: dataclasses.replace(each, title=_title(each)) for each in found}


def _title(workload: Workload) -> str:
    size = f"{workload.leaves:,} leaves, {spell_bytes(workload.nbytes)}"
    return f"{workload.title} ({size})" if workload.title else size


def spell_bytes(count: float) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= 0.9995 * factor:  # 999,996 is a round MB
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


# ---------------------------------------------------------------- the arrays


def template(workload: Workload) -> State:
    """The abstract state, each leaf with its sharding: what a restore is given."""
    abstract = _map_shapes(workload.params, lambda shape: jax.ShapeDtypeStruct(shape, "float32"))
    state = State(abstract, jax.eval_shape(optax.adam(1e-3).init, abstract))
    place = _placer(workload.devices)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x.shape)), state)


def build(workload: Workload) -> State:
    """Random parameters and what Adam makes of one random gradient: bytes that compress as trained ones do."""
    random, place = np.random.default_rng(0), _placer(workload.devices)

    def normal(shape: tuple[int, ...]) -> Any:
        return random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)

    def put(values: Any) -> Any:
        return jax.device_put(values, place(values.shape)) if workload.devices > 1 else jax.numpy.array(values)

    params = jax.tree.map(put, _map_shapes(workload.params, normal))
    gradient = _map_shapes(workload.params, normal)
    adam = optax.ScaleByAdamState(
        count=put(np.int32(1)),
        mu=jax.tree.map(lambda g: put(np.float32(0.1) * g), gradient),
        nu=jax.tree.map(lambda g: put(np.float32(0.001) * g**2), gradient),
    )
    return jax.block_until_ready(State(params, (adam, optax.EmptyState())))


def copy(state: State) -> State:
    """New arrays with the same values, as a step of training would leave them.

    A jax array remembers its host copy: saving one a second time would cost less than it does in training.
    """
    return jax.block_until_ready(jax.tree.map(jax.numpy.copy, state))


def _placer(devices: int) -> Callable[[tuple[int, ...]], Any]:
    if devices == 1:
        return lambda shape: SingleDeviceSharding(jax.devices()[0])
    mesh = Mesh(np.array(jax.devices()[:devices]), ("shard",))

    def place(shape: tuple[int, ...]) -> Any:
        cut = next((axis for axis, size in enumerate(shape) if size % devices == 0), None)
        axes = ["shard" if axis == cut else None for axis in range(len(shape))]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return place


def _map_shapes(shapes: Any, make: Callable[[tuple[int, ...]], Any]) -> Any:
    if isinstance(shapes, tuple):
        return make(shapes)
    return {name: _map_shapes(below, make) for name, below in shapes.items()}
