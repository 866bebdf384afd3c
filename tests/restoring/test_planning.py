"""A plan that is kept serves what is the same, and nothing else; it holds nothing that is the caller's."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckptmgr
from ckptmgr import CheckpointManager
from ckptmgr.restoring import planning


def state(value, leaves=5):
    return {f"w{n}": jnp.full((4, 2), float(value + n)) for n in range(leaves)}


@pytest.fixture
def run(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, state(step), extras={"seen": [step]}).result()
        yield manager


@pytest.fixture
def made(monkeypatch):
    """The plans that were made."""
    found, make = [], planning._make
    monkeypatch.setattr(planning, "_make", lambda *args: found.append(make(*args)) or found[-1])
    return found


def test_steps_of_one_structure_share_a_plan_and_have_their_own_values(run, made):
    for step in (2, 1, 2, 1):
        found = run.restore(step, params=state(0), extras={"seen": None})
        assert float(found.params["w0"][0, 0]) == step
        assert found.extras == {"seen": [step]}
    assert len(made) == 1


def on(device):
    return jax.sharding.SingleDeviceSharding(jax.devices()[device])


def over_two():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    return jax.sharding.NamedSharding(mesh, jax.P("x"))


def abstract(dtype="float32", sharding=None):
    return {f"w{n}": jax.ShapeDtypeStruct((4, 2), dtype, sharding=sharding) for n in range(5)}


ASKED = {
    "arrays": lambda: {"params": state(0)},
    "arrays on a device": lambda: {"params": jax.device_put(state(0), on(1))},
    "abstract": lambda: {"params": abstract()},
    "abstract in pieces": lambda: {"params": abstract(sharding=over_two())},
    "numpy": lambda: {"params": jax.device_get(state(0))},
    "host": lambda: {"params": abstract(), "layout": ckptmgr.HOST},
    "device": lambda: {"params": abstract(), "layout": on(3)},
    "mesh": lambda: {"params": abstract(), "layout": over_two().mesh},
    "callable": lambda: {"params": abstract(), "layout": lambda path, leaf: on(2 if "w1" in path else 1)},
    "cast": lambda: {"params": abstract("bfloat16"), "cast": True},
    "partial": lambda: {"params": {"w1": abstract()["w1"]}, "partial": True},
    "rename": lambda: {"params": {f"v{n}": leaf for n, leaf in enumerate(abstract().values())},
                       "rename": {"w": "v"}},
    "nothing": dict,
}  # fmt: skip


def looks(found):
    leaves, treedef = jax.tree.flatten(found.params)
    kinds = [
        (type(leaf), leaf.dtype, getattr(leaf, "sharding", None), getattr(leaf, "committed", None))
        for leaf in leaves
    ]
    return treedef, kinds, [np.asarray(leaf, np.float32).tolist() for leaf in leaves]


def test_what_was_asked_for_before_does_not_change_what_comes_back(run, tmp_path):
    alone = {
        name: looks(CheckpointManager(tmp_path, read_only=True).restore(**ask())) for name, ask in ASKED.items()
    }
    names = list(ASKED)
    order = [*names, *names, *reversed(names), *[each for name in names for each in (name, names[0], name)]]
    for name in order:
        assert looks(run.restore(**ASKED[name]())) == alone[name], name


def test_a_template_that_does_not_fit_is_refused_after_one_that_does(run):
    run.restore(params=state(0))
    with pytest.raises(ckptmgr.StructureMismatchError):
        run.restore(params=state(0, leaves=6))
    with pytest.raises(ckptmgr.StructureMismatchError):
        run.restore(params=abstract("bfloat16"))
    with pytest.raises(ValueError, match="no item"):
        run.restore(params=state(0), cast=("ema",))
    run.save(3, {"other": jnp.zeros(3)}).result()
    with pytest.raises(ckptmgr.StructureMismatchError):
        run.restore(params=state(0))


def test_what_is_said_of_each_restore_is_said_again(run, caplog):
    for _ in range(3):
        caplog.clear()
        run.restore(params={"w1": abstract()["w1"]}, partial=True)
        assert "no template asks for" in caplog.text


def test_keys_that_are_equal_and_not_the_same_are_told_apart(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {1: jnp.zeros(2)}).result()
        for _ in range(2):
            assert list(map(type, manager.restore(params={1: jnp.ones(2)}).params)) == [int]
            with pytest.raises(ckptmgr.StructureMismatchError):
                manager.restore(params={True: jnp.ones(2)})


def test_a_plan_is_not_kept_where_the_width_of_numbers_has_changed(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": np.arange(3.0)}).result()
        template = {"w": jax.ShapeDtypeStruct((3,), np.float64)}
        with jax.enable_x64(True):
            assert manager.restore(params=template).params["w"].dtype == np.float64
        with pytest.raises(ckptmgr.LayoutError):
            manager.restore(params=template)


def test_the_arrays_of_a_template_are_let_go(run):
    template = state(0)
    watched = [weakref.ref(leaf) for leaf in template.values()]
    run.restore(params=template)
    del template
    gc.collect()
    assert [each() for each in watched] == [None] * len(watched)


def test_restored_arrays_may_be_donated_and_changed(run):
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    for _ in range(3):
        found = run.restore(2, params=abstract(sharding=on(0))).params
        assert float(double(found)["w1"][0, 0]) == 6.0
        on_host = run.restore(2, params=abstract(), layout=ckptmgr.HOST).params
        for leaf in on_host.values():
            leaf[...] = 0
    assert float(run.restore(2, params=abstract()).params["w1"][0, 0]) == 3.0
