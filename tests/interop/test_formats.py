"""safetensors, .npz, flax's msgpack and stock Orbax: out, in, and read by those whose formats they are."""

import contextlib
import itertools
import json
import subprocess
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.flax
from conftest import counted

import ckptmgr
from ckptmgr import interop
from ckptmgr.testing import assert_trees_equal

TREE = {
    "dense": {"w": jnp.linspace(-1, 1, 12).reshape(4, 3), "b": jnp.zeros(3, jnp.bfloat16)},
    "head": [np.arange(5), np.float32(-0.0), jnp.ones((0, 2)), np.arange(4).astype(ml_dtypes.float8_e5m2)],
    "yes": np.array([True, False]),
}
NESTED = {
    "dense": TREE["dense"],
    "head": {str(at): leaf for at, leaf in enumerate(TREE["head"])},
    "yes": TREE["yes"],
}


def assert_equal(one, other):
    """Equal bits, numpy's or JAX's alike, which `ckptmgr.testing.assert_trees_equal` tells apart."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.dtype, a.shape, np.asarray(a).tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes())


@pytest.mark.parametrize("name", ["tree.safetensors", "tree.npz"])
def test_there_and_back_with_equal_bits(name, tmp_path):
    assert interop.write(TREE, tmp_path / name) == [tmp_path / name]
    assert_equal(interop.read(tmp_path / name), NESTED)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_safetensors_reads_what_is_written_and_we_read_what_it_writes(tmp_path):
    interop.write({"dense": TREE["dense"], "head": TREE["head"][:3]}, tmp_path / "ours.safetensors")
    theirs = safetensors.flax.load_file(tmp_path / "ours.safetensors")  # which knows no float8
    assert set(theirs) == {"dense/b", "dense/w", "head/0", "head/1", "head/2"}
    for name in ("w", "b"):
        assert_equal(theirs[f"dense/{name}"], TREE["dense"][name])
    safetensors.flax.save_file(theirs, tmp_path / "theirs.safetensors")
    assert_equal(interop.read(tmp_path / "theirs.safetensors")["dense"], TREE["dense"])


def test_torch_reads_the_same_bits(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is no dependency; where it is installed it is asked")
    import safetensors.torch

    interop.write({"w": TREE["dense"]["w"], "b": TREE["dense"]["b"]}, tmp_path / "ours.safetensors")
    found = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert found["b"].dtype == torch.bfloat16
    assert found["w"].numpy().tobytes() == np.asarray(TREE["dense"]["w"]).tobytes()
    assert found["b"].view(torch.uint8).numpy().tobytes() == np.asarray(TREE["dense"]["b"]).tobytes()
    safetensors.torch.save_file(found, tmp_path / "theirs.safetensors")
    assert_equal(interop.read(tmp_path / "theirs.safetensors"), TREE["dense"])


def test_shards_of_bounded_size_with_an_index(tmp_path):
    tree = {f"w{place}": np.full(100, place, np.float32) for place in range(5)}
    *shards, index = interop.safetensors.save(tree, tmp_path, max_shard_bytes=850)
    assert [path.name for path in shards] == [f"model-0000{at}-of-00003.safetensors" for at in (1, 2, 3)]
    said = json.loads(index.read_text())
    assert said["metadata"]["total_size"] == 2000
    assert said["weight_map"]["w4"] == "model-00003-of-00003.safetensors"
    assert set(safetensors.flax.load_file(shards[1])) == {"w2", "w3"}
    for path in (tmp_path, index):
        assert_equal(interop.read(path), tree)
    index.write_text(json.dumps({"weight_map": {"w": "../elsewhere"}}))
    with pytest.raises(ValueError, match=r"\.\./elsewhere"):
        interop.read(index)


@pytest.mark.parametrize(
    ("leaf", "why"),
    [(np.ones(2, complex), "complex128"), (jnp.ones(2, jnp.int4), "int4"), (jax.random.key(0), "PRNG keys")],
    ids=["complex", "int4", "key"],
)
def test_what_safetensors_has_no_type_for_is_refused_by_name_and_nothing_is_written(leaf, why, tmp_path):
    with pytest.raises(ckptmgr.UnsupportedLeafError, match=f"a/b .*{why}") as caught:
        interop.write({"a": {"b": leaf}, "c": np.ones(1)}, tmp_path / "out" / "x.safetensors")
    assert caught.value.leaf == "a/b"
    assert not (tmp_path / "out").exists()


def test_two_leaves_of_one_name_are_refused(tmp_path):
    with pytest.raises(ckptmgr.UnsupportedLeafError, match="would have the name 'a/b'"):
        interop.write({"a": {"b": np.ones(1)}, "a/b": np.ones(1)}, tmp_path / "x.npz")


def test_npz_runs_no_pickle(tmp_path):
    np.savez(tmp_path / "x.npz", w=np.array([object()], object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        interop.read(tmp_path / "x.npz")


def test_flax_msgpack(tmp_path):
    (tmp_path / "x.msgpack").write_bytes(flax.serialization.to_bytes(TREE["dense"]))
    assert_equal(interop.read(tmp_path / "x.msgpack"), TREE["dense"])


def test_stock_orbax_reads_what_is_written_and_we_read_what_it_writes(tmp_path):
    tree = {"dense": TREE["dense"], "n": np.arange(3)}
    interop.write(tree, tmp_path / "ours")
    with ocp.StandardCheckpointer() as stock:
        assert_equal(
            stock.restore(tmp_path / "ours", target=jax.tree.map(jnp.asarray, tree))["dense"], tree["dense"]
        )
        stock.save(tmp_path / "theirs", tree)
    assert_equal(interop.read(tmp_path / "theirs"), tree)


def test_an_unknown_ending_is_said_with_those_that_are_known(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.bin has an unknown format; known are \.pkl"):
        interop.read(tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"FILE\.safetensors"):
        interop.write({}, tmp_path / "x.bin")
    with pytest.raises(FileNotFoundError):
        interop.read(tmp_path / "nothing.npz")


def test_a_library_that_is_missing_is_said_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'ckptmgr\[interop\]'"):
        interop.write({"w": np.ones(1)}, tmp_path / "x.safetensors")


def parts(count, value):
    return {f"w{place}": np.full(100, value, np.float32) for place in range(count)}


EXPORTS = {"one file": 10_000, "five shards": 450, "three shards": 850, "two shards": 1300}


@pytest.mark.parametrize("name", ["model.safetensors", "."])
@pytest.mark.parametrize("then", EXPORTS)
@pytest.mark.parametrize("first", EXPORTS)
def test_after_each_export_exactly_what_was_exported_is_read(first, then, name, tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"precious")
    (tmp_path / "model-notes.safetensors").write_bytes(b"precious")
    for value, how in enumerate((first, then, first)):
        written = interop.safetensors.save(parts(5 - value, value), tmp_path / name, max_shard_bytes=EXPORTS[how])
        for place in (tmp_path / "model.safetensors", tmp_path):
            assert_equal(interop.read(place), parts(5 - value, value))
    assert set(tmp_path.iterdir()) - set(written) == {
        tmp_path / "other.safetensors", tmp_path / "model-notes.safetensors",
    }  # fmt: skip


KILLED = """
import os, pathlib, sys
import numpy as np
from ckptmgr.interop import safetensors

folder, first, then = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tree = lambda value: {f"w{place}": np.full(100, value, np.float32) for place in range(5)}
calls = 0

def count(event, arguments):
    global calls
    calls += event in ("os.rename", "os.remove") and ".safetensors" in str(arguments[0])
    if calls > point:
        os._exit(9)

for point in range(30):
    safetensors.save(tree(0), folder / str(point), max_shard_bytes=first)
    child = os.fork()
    if not child:
        sys.addaudithook(count)
        safetensors.save(tree(7), folder / str(point), max_shard_bytes=then)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


@pytest.mark.soak
@pytest.mark.parametrize(("first", "then"), list(itertools.product(EXPORTS, EXPORTS))[3 :: counted(6, full=1)])
def test_an_export_that_is_killed_at_any_point_is_never_read_as_a_mixture(first, then, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", KILLED, tmp_path, str(EXPORTS[first]), str(EXPORTS[then])]
    subprocess.run(command, check=True)
    read = []
    for folder in tmp_path.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found = interop.read(folder)
            read.append(float(found["w0"][0]))
            assert_equal(found, parts(5, read[-1]))
        interop.safetensors.save(parts(3, 3), folder, max_shard_bytes=EXPORTS[then])
        assert_equal(interop.read(folder), parts(3, 3))
    assert len(list(tmp_path.iterdir())) > 1
    assert set(read) == {0.0, 7.0}


def test_an_index_and_its_shards_must_agree(tmp_path):
    interop.safetensors.save(parts(5, 1), tmp_path, max_shard_bytes=850)
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    for name in ("w5", "w1"):
        said = {**whole["weight_map"], name: "model-00003-of-00003.safetensors"}
        index.write_text(json.dumps({"weight_map": said}))
        with pytest.raises(
            ValueError, match=f"names '{name}' in model-00003-of-00003.safetensors, which lacks it"
        ):
            interop.read(tmp_path)
    said = {name: file for name, file in whole["weight_map"].items() if name != "w3"}
    index.write_text(json.dumps({"weight_map": said}))
    with pytest.raises(ValueError, match=r"has 'w3', which .* does not name"):
        interop.read(tmp_path)


@pytest.mark.parametrize(
    ("there", "bound"),
    [("model.safetensors.index.json", 10_000), ("model.safetensors.index.json", 850), ("model.safetensors", 850),
     ("model-00001-of-00003.safetensors", 850)],
)  # fmt: skip
def test_a_file_of_others_that_would_be_read_instead_is_refused_and_stays(there, bound, tmp_path):
    safetensors.flax.save_file({"w0": jnp.ones(3)}, tmp_path / there)
    before = (tmp_path / there).read_bytes()
    with pytest.raises(FileExistsError, match=f"{there} is in the way.*remove it, or export to another place"):
        interop.safetensors.save(parts(5, 1), tmp_path, max_shard_bytes=bound)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(there, before)]


def test_a_name_that_is_a_leaf_and_a_folder_is_refused_in_either_order(tmp_path):
    for names in (("a", "a/b"), ("a/b", "a")):
        safetensors.flax.save_file({name: jnp.ones(3) for name in names}, tmp_path / "x.safetensors")
        np.savez(tmp_path / "x.npz", **{name: np.ones(3) for name in names})
        for file in ("x.safetensors", "x.npz"):
            with pytest.raises(ValueError, match="leaf"):
                interop.read(tmp_path / file)


def test_a_step_or_a_run_of_orbax_is_no_tree_and_the_error_says_what_to_name(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as stock:
        stock.save(7, args=ocp.args.StandardSave({"w": jnp.ones(3)}))
    with pytest.raises(ValueError, match=r"7 is a step of Orbax; name one of its items: .*7/default$"):
        interop.read(tmp_path / "run" / "7")
    with pytest.raises(ValueError, match=r"run is a run of Orbax, which needs no import: name it as the run"):
        interop.read(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is not a tree that Orbax has saved"):
        interop.read(tmp_path / "empty")
    assert list(interop.read(tmp_path / "run" / "7" / "default")) == ["w"]


@pytest.mark.parametrize("name", ["model.safetensors", "model.npz", "model"])
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_nothing_is_written_for_a_bucket(scheme, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"{scheme}://bucket/{name} is not on a disk"):
        interop.write({"w": np.ones(1)}, f"{scheme}://bucket/{name}")
    assert not [*tmp_path.iterdir()]


def test_npz_takes_the_names_that_are_arguments_of_numpy(tmp_path):
    tree = {name: np.full(2, n) for n, name in enumerate(["file", "allow_pickle", "args", "kwds", "w"])}
    interop.write(tree, tmp_path / "x.npz")
    assert_trees_equal(interop.read(tmp_path / "x.npz"), tree)
    with np.load(tmp_path / "x.npz") as found:
        assert sorted(found.files) == sorted(tree)
