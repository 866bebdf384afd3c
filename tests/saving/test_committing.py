"""The second act of a save: what is remembered of the step that it has made."""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ckptmgr import CheckpointManager
from ckptmgr.format import manifest as manifests

Point = collections.namedtuple("Point", "x y")


def states():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    params = {"w": jax.device_put(jnp.ones((8, 4)), jax.NamedSharding(mesh, jax.P("data", "model")))}
    yield "optax", params, optax.adamw(optax.linear_schedule(1.0, 0.0, 10)).init(params), {}
    yield "leaves", {
        "key": jax.random.key(3), "weak": jnp.asarray(1.0), "bfloat16": jnp.ones(3, jnp.bfloat16),
        "numbers": [1, 2.5, True, 1j, None], "pair": {7: np.float16(2), 8: Point(np.ones((2, 0)), ())},
    }, None, {"counts": {"seen": [1, 2]}, "raw": b"\x00\xff", "tree": {"m": np.arange(3)}}  # fmt: skip


def told(manifest, field):
    """A field of a manifest; where the empty nodes of a tree are serves the writing alone, and is not in it."""
    if field != "items":
        return getattr(manifest, field)
    bare = {name: dataclasses.replace(item.tree, empty=()) for name, item in manifest.items.items()}
    return {name: dataclasses.replace(item, tree=bare[name]) for name, item in manifest.items.items()}


@pytest.mark.parametrize("name", ["optax", "leaves"])
def test_what_is_remembered_of_a_new_step_is_what_its_manifest_says(name, tmp_path):
    _, params, opt_state, extras = next(state for state in states() if state[0] == name)
    with CheckpointManager(tmp_path, metadata={"a": (1, {"b": None}), "é": 1e300}) as manager:
        metrics = {"loss": math.inf, "count": np.int64(3), "rate": jnp.float32(0.1)}
        manager.save(1, params, opt_state, extras=extras, metrics=metrics).result()
        remembered, path = manager._catalog.manifest(1), tmp_path / "1" / manifests.NAME
        read = manifests.decode(path.read_bytes(), step=1, path=str(path))
        for field in dataclasses.fields(read):
            assert repr(told(remembered, field.name)) == repr(told(read, field.name)), field.name
        with CheckpointManager(tmp_path, read_only=True) as other:
            assert manager.infos() == other.infos()


def test_a_callback_that_changes_what_it_is_given_changes_no_later_checkpoint(tmp_path):
    def spoil(info):
        info.metadata["a"].append(2)
        info.metrics["loss"] = 0.0
        info.versions["jax"] = "?"

    with CheckpointManager(tmp_path, metadata={"a": [1]}, on_commit=spoil) as manager:
        for step in (1, 2):
            manager.save(step, {"w": jnp.ones(3)}, metrics={"loss": 1.0}).result()
        manager.wait()
        for info in manager.infos():
            assert (info.metadata, info.metrics) == ({"a": [1]}, {"loss": 1.0})
            assert info.versions["jax"] == jax.__version__
