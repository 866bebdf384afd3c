"""From the items of a step to the copies that wait to be written."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ckptmgr import CheckpointManager
from ckptmgr.options import Options
from ckptmgr.saving import copying, items


def test_what_each_process_may_have_of_its_own_is_compared_whole_whatever_memory_may_be_held(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def digest(last):
        state = {"a": np.zeros(100), "b": np.full(100, last)}
        composed = items.Composer().compose(1, {"w": np.zeros(3)}, None, {"mine": state}, {})
        copied = copying.Copier(Options(max_host_bytes=100)).copy(1, 0.0, composed)
        return copied.contents["mine"].digest()

    assert digest(0.0) == digest(0.0) != digest(1.0)


LEAVES = 300


def pieces():
    mesh = jax.make_mesh((8,), ("data",))
    return jax.device_put(jnp.ones(16), jax.NamedSharding(mesh, jax.P("data")))


LEAF = {
    "jax": (lambda: jnp.ones(16), 1.1),
    "numpy": (lambda: np.ones(16), 2.1),
    "number": (lambda: 1.0, 2.1),
    "bfloat16": (lambda: jnp.ones(16, jnp.bfloat16), 12),
    "pieces": (pieces, 8 * 7),
    "key": (lambda: jax.random.key(0), 150),
}
"""A leaf of each kind, and how many Python functions may be called for one. All but one or two are JAX's own."""


def calls_of(action):
    """The calls of Python functions on this thread."""
    found = []
    sys.setprofile(lambda frame, event, _: found.append(frame.f_code) if event == "call" else None)
    try:
        action()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("kind", LEAF)
def test_a_structure_that_is_known_costs_its_caller_next_to_no_python_for_each_leaf(kind, tmp_path):
    make, most = LEAF[kind]
    found = {}
    with CheckpointManager(tmp_path) as manager:
        for count in (100, 100 + LEAVES):
            for step in (count, count + 1):
                state = {str(n): make() for n in range(count)}
                found[count] = calls_of(lambda step=step, state=state: manager.save(step, state))
                manager.wait()
    few, many = map(len, found.values())
    assert (many - few) / LEAVES <= most
