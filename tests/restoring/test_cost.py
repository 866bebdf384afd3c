"""What a restore costs for each leaf, counted in calls: what the restore before has found is not asked again."""

import os
import pathlib
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckptmgr
from ckptmgr import CheckpointManager

_OURS = str(pathlib.Path(ckptmgr.__file__).parent)
LEAVES = 300


def our_calls(action):
    """The calls of ckptmgr's own functions, on whatever thread."""
    found = []

    def look(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(_OURS):
            found.append(frame.f_code)

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        action()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return found


def pieces():
    mesh = jax.make_mesh((8,), ("data",))
    return jax.device_put(jnp.ones(16), jax.NamedSharding(mesh, jax.P("data")))


LEAF = {
    "jax": (lambda: jnp.ones(16), 0.1),
    "abstract": (lambda: jax.ShapeDtypeStruct((16,), jnp.float32), 0.1),
    "numpy": (lambda: np.ones(16, np.float32), 0.1),
    "bfloat16": (lambda: jnp.ones(16, jnp.bfloat16), 0.1),
    "pieces": (pieces, 3.1),
}
"""A leaf of a template, and how many of our functions may be called for one."""


@pytest.mark.parametrize("kind", LEAF)
def test_a_second_restore_of_a_structure_costs_next_to_no_python_for_each_leaf(kind, tmp_path):
    make, most = LEAF[kind]
    found = {}
    for count in (100, 100 + LEAVES):
        template = {str(n): make() for n in range(count)}
        saved = {name: jnp.full(16, n, leaf.dtype) for n, (name, leaf) in enumerate(template.items())}
        with CheckpointManager(tmp_path / str(count)) as manager:
            manager.save(1, saved).result()
            assert manager.restore(params=template).step == 1
            manager.save(2, saved).result()
            restored = []
            found[count] = our_calls(lambda m=manager, t=template, r=restored: r.append(m.restore(params=t)))
            assert restored[0].step == 2
            assert all((np.asarray(leaf) == int(n)).all() for n, leaf in restored[0].params.items())
    few, many = map(len, found.values())
    assert (many - few) / LEAVES <= most


def test_a_first_restore_makes_no_more_reads_for_more_leaves(tmp_path, monkeypatch):
    reads = {}
    for count in (100, 100 + LEAVES):
        directory = tmp_path / str(count)
        with CheckpointManager(directory) as manager:
            manager.save(1, {str(n): np.full(1500, n) for n in range(count)}).result()
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(
                os, "preadv", lambda *args, seen=seen, preadv=os.preadv: seen.append(args) or preadv(*args)
            )
            CheckpointManager(directory, read_only=True).restore()
        reads[count] = len(seen)
    nbytes = LEAVES * 1500 * 8
    assert reads[100] > 0
    assert reads[100 + LEAVES] - reads[100] <= 2 + 2 * nbytes / (1 << 20)
