"""No symlink is followed to write: a link under each name that ckptmgr writes to leaves its target as it was."""

import contextlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import ckptmgr
from ckptmgr import CheckpointManager, interop
from ckptmgr.testing import assert_trees_equal

PARAMS = {"w": jnp.arange(6.0), "v": jnp.arange(6.0)}


@pytest.fixture
def others(tmp_path):
    """A directory of somebody else."""
    folder = tmp_path / "others"
    (folder / "below").mkdir(parents=True)
    for name in ("file", "below/params.npz", "manifest.json"):
        (folder / name).write_text("precious")
    return folder


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def save(folder):
    with ckptmgr.CheckpointManager(folder / "run") as manager:
        manager.save(1, PARAMS)


def replace(folder):
    with ckptmgr.CheckpointManager(folder / "run") as manager:
        manager.save(1, PARAMS, on_exists="replace")


def delete(folder):
    with ckptmgr.CheckpointManager(folder / "run") as manager:
        manager.delete(1)


def pin(folder):
    with ckptmgr.CheckpointManager(folder / "run") as manager:
        manager.pin(1)


def distrust(folder):
    with ckptmgr.CheckpointManager(folder / "run") as manager:
        manager.distrust(1, "why")


def copy(folder):
    with ckptmgr.CheckpointManager(folder / "run", mirror=folder / "mirror") as manager:
        manager.save(2, PARAMS)
        manager.wait()


def reduce(folder):
    keep = [ckptmgr.latest(1), ckptmgr.params_only(9)]
    with ckptmgr.CheckpointManager(folder / "run", keep=keep) as manager:
        for step in (1, 2):
            manager.save(step, PARAMS, PARAMS)


def export(name, **how):
    return lambda folder: interop.write(PARAMS, folder / name, **how)


SHARDS = {"max_shard_bytes": 30}
NAMES = {
    "run/.ckptmgr": save,
    "run/.ckptmgr/lock": save,
    "run/.ckptmgr/journal.jsonl": save,
    "run/.ckptmgr/version": save,
    "run/.ckptmgr/saving": save,
    "run/.ckptmgr/saving/2": copy,
    "run/.ckptmgr/deleting": delete,
    "run/.ckptmgr/replaced": replace,
    "run/.ckptmgr/replaced/1": replace,
    "run/.ckptmgr/reducing": reduce,
    "run/.ckptmgr/reducing/1": reduce,
    "run/.ckptmgr/reducing/1/params": reduce,
    "run/1/PINNED": pin,
    "run/1/trust.json": distrust,
    "run/.ckptmgr/trust.new": distrust,
    "mirror/.ckptmgr": copy,
    "mirror/.ckptmgr/version": copy,
    "mirror/.ckptmgr/saving": copy,
    "mirror/.ckptmgr/saving/2": copy,
    "mirror/.ckptmgr/saving/2/manifest.json": copy,
    "mirror/.ckptmgr/saving/2/params": copy,
    "stock/1/.manifest.json.part": interop.adopt,
    "stock/1/manifest.json": interop.adopt,
    "x.npz": export("x.npz"),
    "x.npz.part": export("x.npz"),
    "x.safetensors": export("x.safetensors"),
    "x.safetensors.part": export("x.safetensors"),
    "x.safetensors.index.json": export("x.safetensors", **SHARDS),
    "x.safetensors.index.json.part": export("x.safetensors", **SHARDS),
    "x-00001-of-00002.safetensors": export("x.safetensors", **SHARDS),
    "x-00001-of-00002.safetensors.part": export("x.safetensors", **SHARDS),
    "model.safetensors": lambda folder: interop.safetensors.save(PARAMS, folder, **SHARDS),
    "out": export("out"),
    "out.orbax-checkpoint-tmp": export("out"),
}


@pytest.mark.parametrize("leads_to", ["file", "below", "nothing"])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_symlink_leads_to_is_not_written_to(name, leads_to, others, tmp_path):
    work = NAMES[name]
    if work in (pin, distrust, replace, delete):
        save(tmp_path)
    if name.startswith("stock/1/"):
        with ocp.CheckpointManager(tmp_path / "stock") as stock:
            stock.save(1, args=ocp.args.Composite(params=ocp.args.StandardSave(PARAMS)))
    link, before = tmp_path / name, content(others)
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists():
        shutil.rmtree(link)
    link.symlink_to(others / leads_to)
    with contextlib.suppress(OSError, ckptmgr.CheckpointError, ValueError):
        work(tmp_path / "stock" if work is interop.adopt else tmp_path)
    assert content(others) == before
    assert not (others / "nothing").exists()


def test_the_error_names_the_link_and_says_what_to_do(others, tmp_path, caplog):
    save(tmp_path)
    run = tmp_path / "run"
    (run / ".ckptmgr/lock").symlink_to(others / "file")
    with pytest.raises(OSError, match=r"lock is a symlink.*Remove the symlink"):
        save(tmp_path)
    (run / ".ckptmgr/lock").unlink()
    (run / "1" / "PINNED").symlink_to(others / "file")
    with pytest.raises(ckptmgr.SaveError, match=r"PINNED is a symlink"):
        pin(tmp_path)
    (run / ".ckptmgr/journal.jsonl").rename(others / "journal")
    (run / ".ckptmgr/journal.jsonl").symlink_to(others / "journal")
    copy(tmp_path)
    assert next(r.message for r in caplog.records if "journal" in r.message).endswith("Remove the symlink")


def test_a_step_that_is_a_symlink_is_read_but_not_pinned(others, tmp_path):
    save(tmp_path)
    (tmp_path / "run" / "1").rename(others / "1")
    (tmp_path / "run" / "1").symlink_to(others / "1")
    before = content(others)
    refused = r"1 is a symlink; ckptmgr writes only into the directory itself: use .*others/1"
    with pytest.raises(ckptmgr.SaveError, match=refused):
        pin(tmp_path)
    with ckptmgr.CheckpointManager(tmp_path / "run") as manager:
        assert np.array_equal(manager.restore(1, params=PARAMS).params["w"], PARAMS["w"])
        manager.delete(1)
    assert content(others) == before


ODD_NAMES = [
    "exp#3",
    "a?b",
    "50%",
    "exp%201",
    "a b",
    "ü",
    "x;y=1&z",
    "[1]",
    "a*",
    "{a}",
    "a:b",
    "c@1",
    "'q\"",
    "--all",
    "~x",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_run_may_have_any_name(name, tmp_path):
    state = {
        "small": jnp.arange(3.0), "large": jnp.ones((600, 600)), "int4": jnp.ones(5, jnp.int4),
        "empty": np.zeros((0, 3)), "key": jax.random.key(1),
    }  # fmt: skip
    beside = {"mirror": tmp_path / f"mirror {name}", "local": tmp_path / f"local {name}"}
    with CheckpointManager(tmp_path / name, compression="zstd", **beside) as manager:
        for step in (1, 2):
            manager.save(step, state).result()
        manager.wait()
        assert_trees_equal(manager.restore(2, params=state).params, state)
        assert manager.verify(2)
    assert CheckpointManager(tmp_path / f"mirror {name}", read_only=True).verify(2)
    with CheckpointManager(tmp_path / name, reuse_unchanged=True) as manager:
        for step in (3, 4):
            manager.save(step, state).result()
            assert_trees_equal(manager.restore(step, params=state).params, state)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([name, f"mirror {name}", f"local {name}"])
    with ocp.CheckpointManager(tmp_path / f"mirror {name}") as stock:
        assert sorted(stock.all_steps()) == [1, 2]
