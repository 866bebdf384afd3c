"""What a restore holds on the host above its arrays, with `max_host_bytes`; measured in processes of their own."""

from pathlib import Path

import bounded
import numpy as np
import pytest
import warm

import ckptmgr
from ckptmgr.arrays import to_devices
from ckptmgr.specs import LeafSpec
from ckptmgr.trees.layouts import Target

MIB = 1 << 20
BOUND = 16 * MIB


def save(directory, case):
    """A step that is small, and one of 40 MiB or 96."""
    draw = np.random.default_rng(0)
    shapes = [(40, MIB // 4)] if case == "pieces" else [(4, MIB // 4)] * 24
    options = {"compression": "zstd"} if case == "host" else {}
    with ckptmgr.CheckpointManager(directory, chunk_bytes=MIB, **options) as manager:
        manager.save(1, {f"w{n}": np.ones((4, 300_000), np.float32) for n in range(2)})
        params = {f"w{n}": draw.standard_normal(shape, np.float32) for n, shape in enumerate(shapes)}
        manager.save(2, params)


def held(directory, case, bound):
    done = warm.run([Path(bounded.__file__), directory, case, bound])
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("case", ["devices", "pieces", "host"])
def test_max_host_bytes_bounds_what_a_restore_holds_above_its_arrays(case, tmp_path):
    save(tmp_path, case)
    assert held(tmp_path, case, BOUND) < BOUND
    assert held(tmp_path, case, 0) > 1.5 * BOUND


@pytest.mark.parametrize(
    ("saved", "wanted", "itemsize"),
    [("float32", "float32", 4), ("bfloat16", "float32", 6), ("float32", "int8", 5)],
)
def test_of_a_leaf_that_is_cast_both_types_are_counted(saved, wanted, itemsize):
    spec = LeafSpec("['w']", ("w",), "jax", (4, 8), saved)
    target = Target(None, "jax", wanted, weak=True)  # weak: nothing is taken over, as on a GPU
    assert to_devices.held_bytes(spec, target) == 32 * itemsize
