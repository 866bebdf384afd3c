"""Saved on one mesh of devices, restored on another by a process that has other devices."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import warm
from conftest import counted
from jax.sharding import NamedSharding, PartitionSpec

import ckptmgr
from benchmarks import distributed

SPECS = {"w": ("a", "b"), "v": (("a", "b"),), "c": ("c",), "all": ()}
SHAPES = {"w": (16, 8), "v": (24, 2), "c": (8,), "all": (5,)}


def values(name):
    draw = np.random.default_rng(len(name) + SHAPES[name][0])
    return draw.random(SHAPES[name], np.float32)


RESTORE = """
import os, sys
devices, axes, where = int(sys.argv[2]), eval(sys.argv[3]), sys.argv[4]
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
sys.path.insert(0, sys.argv[5])
import jax, numpy as np, optax, ckptmgr, test_reshard
from jax.sharding import AxisType, NamedSharding
from ckptmgr.trees.meshes import carry
assert jax.device_count() == devices
kinds = {"axis_types": (AxisType.Auto,) * len(axes)} if sys.argv[6] == "auto" else {}
mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), **kinds)
layout = ckptmgr.HOST if where == "host" else mesh
template = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in test_reshard.SHAPES.items()}
found = ckptmgr.CheckpointManager(sys.argv[1], read_only=True).restore(
    params=template, optimizer=optax.adam(1e-3), layout=layout)
mu = found.opt_state[0].mu
for name, saved in zip(sorted(template), found.info.leaves["params"], strict=True):
    expected = test_reshard.values(name)
    for leaf, want in ((found.params[name], expected), (mu[name], expected / 2)):
        assert np.asarray(leaf).tobytes() == want.tobytes(), name
        if where == "host":
            assert type(leaf) is np.ndarray
        else:
            assert leaf.sharding == NamedSharding(mesh, carry(saved.shape, saved.partition, mesh)), name
if where != "host":
    assert found.params["w"].sharding.num_devices == devices
print("equal")
"""


@pytest.mark.parametrize("saved_on", [{"a": 8}, {"a": 4, "b": 2}, {"a": 2, "b": 2, "c": 2}], ids=str)
def test_saved_on_one_mesh_restored_on_others_by_other_processes(saved_on, tmp_path):
    mesh = jax.make_mesh(tuple(saved_on.values()), tuple(saved_on))

    def spread(name):
        known = [tuple(a for a in (axes if isinstance(axes, tuple) else (axes,)) if a in saved_on) or None
                 for axes in SPECS[name]]  # fmt: skip
        return jax.device_put(jnp.asarray(values(name)), NamedSharding(mesh, PartitionSpec(*known)))

    params = {name: spread(name) for name in SHAPES}
    state = optax.adam(1e-3).init(params)
    state = (state[0]._replace(mu=jax.tree.map(lambda leaf: leaf / 2, params)), *state[1:])
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        manager.save(1, params, state)
    here = os.path.dirname(__file__)
    restored_on = [(1, {"a": 1}, "mesh", "default"), (2, {"a": 2}, "mesh", "auto"), (1, {"a": 1}, "host", "auto"),
                   (4, {"a": 4, "b": 1}, "mesh", "default"), (8, {"a": 2, "b": 4}, "mesh", "auto")]  # fmt: skip
    for devices, axes, where, kinds in restored_on:
        done = warm.run(["-c", RESTORE, tmp_path, devices, axes, where, here, kinds])
        assert done.stdout == "equal\n", done.stderr[-3000:]


@pytest.mark.soak
def test_one_of_eight_shards_reads_little_more_than_itself(tmp_path):
    """Eight processes, one shard each; what TensorStore reads of files is counted."""
    columns = counted(4096, full=16384)
    found = distributed.shards(["ckptmgr"], 8, columns, columns, 300.0, tmp_path)
    peer, shard = found["peers"]["ckptmgr"], found["shard_bytes"]
    assert shard == columns * columns * 4 // 8  # of 64 MiB, or of 1 GiB
    assert 0 < peer["chunk_bytes"] <= shard
    assert shard <= peer["saved_axis"]["read_bytes"] <= 1.1 * shard + peer["chunk_bytes"]
    assert shard <= peer["other_axis"]["read_bytes"] <= 2 * shard + peer["chunk_bytes"]
    print({axis: peer[axis]["ratio"] for axis in ("saved_axis", "other_axis")}, "chunk", peer["chunk_bytes"])
