"""manifest.json: what goes in comes out, and no bit of it can change unnoticed."""

import contextlib
import copy
import dataclasses
import functools
import json
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import counted
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from ckptmgr import CheckpointError, CheckpointManager, CorruptCheckpointError, NewerFormatError
from ckptmgr.cli import facts, tables
from ckptmgr.format import manifest
from ckptmgr.specs import LeafSpec, TreeSpec
from ckptmgr.trees import structure


def sample():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    spread = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, PartitionSpec(("data", "model"), None)))
    tree = {"w": spread, "n": {7: 2}, "k": jax.random.key(0), "u": jnp.asarray(1.0)}
    items = {
        "params": manifest.Item("arrays", structure.describe(tree, item="params")),
        "opt_state": manifest.Item(
            "arrays", structure.describe(optax.adam(1e-3).init({"w": jnp.ones(3)}), item="opt_state")
        ),
        "step": manifest.Item("json", file="metadata"),
    }
    return manifest.Manifest(
        step=12,
        time=1.5,
        items=items,
        metrics={"loss": 0.25},
        metadata={"git": "abc"},
        versions=dict(manifest.versions()),
        files={"params/_METADATA": manifest.File(3, 99), "params/d/x": manifest.File(5, None)},
    )


def test_what_is_encoded_is_decoded():
    written = sample()
    read = manifest.decode(manifest.encode(written), step=12, path="manifest.json")
    for name, item in written.items.items():
        assert read.items[name].tree.leaves == item.tree.leaves
        assert read.items[name].tree.outline == item.tree.outline
    strip = {"items": {}}
    assert dataclasses.replace(read, **strip) == dataclasses.replace(written, **strip)
    assert read.nbytes == written.nbytes == 8 * 4 * 4 + 8 + 8 + 4 + (4 + 3 * 4 * 2)


def test_every_single_flipped_bit_and_every_truncation_is_found():
    small = manifest.encode(dataclasses.replace(sample(), items={}, versions={}))
    for bit in range(len(small) * 8):
        damaged = bytearray(small)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptCheckpointError, match=r"manifest\.json"):
            manifest.decode(bytes(damaged), step=12, path="manifest.json")
    for length in range(len(small)):
        with pytest.raises(CorruptCheckpointError):
            manifest.decode(small[:length], step=12, path="manifest.json")


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"items": {"a": 1}},
        {"a": {"b": 1, "items": {"x": [2]}, "files": {}}},
        {"a": 1, "items": None, "files": {}},
        {"a": ',"items":{},"files":{}'},
    ],
)
def test_items_that_are_spelled_as_those_before_are_those_before_whatever_the_metadata_holds(metadata):
    written = dataclasses.replace(sample(), metadata=metadata)
    data = manifest.encode(written)
    first = manifest.decode(data, step=12, path="")
    known = manifest.KnownItems(manifest.items_text(data), first.items)
    later = manifest.encode(dataclasses.replace(written, metrics={"loss": 9.0}))
    read, plain = (manifest.decode(later, step=12, path="", known=each) for each in (known, manifest.NO_ITEMS))
    assert read == plain
    assert (read.metadata, read.metrics) == (metadata, {"loss": 9.0})
    if not metadata:
        assert all(item is first.items[name] for name, item in read.items.items())
    other = manifest.encode(dataclasses.replace(written, items={"opt_state": written.items["params"]}))
    assert list(manifest.decode(other, step=12, path="", known=known).items) == ["opt_state"]


def sealed(body):
    """The bytes of a manifest that says this; a str is taken as its text."""
    text = (body if isinstance(body, str) else json.dumps(body)).rstrip()[:-1].encode()
    return text + b',"crc32":"%08x"}\n' % zlib.crc32(text)


def body_of(written):
    body = json.loads(manifest.encode(written))
    del body["crc32"]
    return body


def test_a_manifest_of_another_step_is_refused():
    with pytest.raises(CorruptCheckpointError, match="belongs to step 12"):
        manifest.decode(manifest.encode(sample()), step=13, path="manifest.json")


def test_what_older_versions_can_read_keeps_their_format():
    assert body_of(sample())["format"] == 1
    text = LeafSpec("['a']", ("a",), "str", (), "object")
    newer = [
        manifest.Item("unread", why="nobody knows"),
        manifest.Item("json", file="metadata", folder="elsewhere"),
        manifest.Item("json", file="metadata", processes=2),
        manifest.Item("arrays", TreeSpec((text,), {"dict": {"a": 0}})),
    ]
    for item in newer:
        written = dataclasses.replace(sample(), items={"extra": item})
        assert body_of(written)["format"] == 2
        assert manifest.decode(manifest.encode(written), step=12, path="manifest.json").items["extra"] == item


def test_a_manifest_of_a_later_format_says_upgrade_whatever_else_it_holds():
    for body in (body_of(sample()) | {"format": 3}, {"format": 2**40, "whatever": "there will be"}):
        with pytest.raises(NewerFormatError, match="upgrade ckptmgr") as caught:
            manifest.decode(sealed(body), step=12, path="manifest.json")
        assert (caught.value.step, caught.value.format) == (12, body["format"])


# ---------------------------------------------------------------- well sealed, and malformed


def places(node, path=()):
    """The path of every value in it, its own first."""
    yield path
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def changed(body, path, value):
    """The body with another value at a place; without the place if the value is GONE."""
    if not path:
        return value
    body = copy.deepcopy(body)
    *above, last = path
    node = functools.reduce(lambda found, key: found[key], above, body)
    if value is GONE:
        del node[last]
    else:
        node[last] = value
    return body


GONE = object()
DEEP = functools.reduce(lambda below, _: {"list": [below]}, range(400), 0)
WRONG = [
    GONE, None, True, -1, 1.5, 7, 2**63, 10**400, float("nan"), float("inf"), "", "x", "../x", "\0", "\ud800",
    [], [[]], [1, "x"], {}, {"x": 1}, DEEP,
]  # fmt: skip


def small():
    """A manifest with one of each: few enough fields that each can be replaced by everything."""
    mesh = jax.make_mesh((4,), ("data",))
    spread = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, PartitionSpec("data", None)))
    spec = structure.describe({"w": spread, "k": {3: (jax.random.key(0), None)}}, item="params")
    shapes = [leaf.shape + (2,) * (leaf.kind == "key") for leaf in spec.leaves]
    cut = TreeSpec(
        tuple(leaf._replace(chunks=shape) for leaf, shape in zip(spec.leaves, shapes, strict=True)), spec.outline
    )
    items = {
        "params": manifest.Item("arrays", cut),
        "step": manifest.Item("json", file="metadata"),
        "other": manifest.Item("unread", why="unknown", folder="x/y"),
    }
    return body_of(dataclasses.replace(sample(), items=items, versions={"jax": "1"}))


def use(found):
    """Does with a manifest what everybody does who has read one."""
    assert found.nbytes >= 0
    assert f"{found.time:.3f} {sum(found.metrics.values())}"
    assert time.localtime(found.time)
    for name, item in found.items.items():
        assert (epath.Path("/run") / item.place(name) / item.file).parts
        values = list(range(len(item.tree.leaves)))
        assert sorted(jax.tree.leaves(structure.rebuild(item.tree.outline, values))) == values
        structure.containers(item.tree.outline)
        for leaf in item.tree.leaves:
            assert len(f"{leaf} {leaf.path} {leaf.name}".encode())
            hash(leaf)
    manifest.decode(manifest.encode(found), step=12, path="manifest.json")


def read_or_refuse(data):
    with contextlib.suppress(CorruptCheckpointError, NewerFormatError):
        found = manifest.decode(data, step=12, path="manifest.json")
        use(found)


def test_what_a_manifest_is_changed_from_is_whole():
    use(manifest.decode(sealed(small()), step=12, path="manifest.json"))


@pytest.mark.parametrize("chunk_bytes", [64, 2**26])
def test_what_is_saved_from_a_mesh_in_chunks_is_what_a_manifest_can_say(chunk_bytes, tmp_path):
    mesh = jax.make_mesh((8,), ("data",))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    keys = jax.device_put(jax.random.split(jax.random.key(0, impl="rbg"), 16), spread)
    tree = {"keys": keys, "w": jax.device_put(jnp.ones((64, 3)), spread), "none": jnp.ones((0, 3)), "n": 3}
    with CheckpointManager(tmp_path, chunk_bytes=chunk_bytes) as manager:
        manager.save(1, tree).result()
        assert manager.verify()


def test_every_field_that_is_anything_else_is_damage_or_is_of_use():
    body = small()
    for path in places(body):
        for value in WRONG:
            if path or value is not GONE:
                read_or_refuse(sealed(changed(body, path, value) if path else [value]))


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "{]", '{"format":1', "[" * 100_000, '{"a":' * 100_000, '{"format": ' + "9" * 5000 + "}", "\xff}"],
)
def test_what_is_no_json_object_is_damage(text):
    with pytest.raises(CorruptCheckpointError):
        manifest.decode(sealed(text), step=12, path="manifest.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below, max_size=3),
    max_leaves=5,
)


@pytest.mark.soak
@settings(max_examples=counted(80, 5000))
@given(st.data())
def test_any_two_fields_that_are_anything_are_damage_or_are_of_use(data):
    body = small()
    for _ in range(2):
        path = data.draw(st.sampled_from([path for path in places(body) if path]))
        body = changed(body, path, data.draw(JSON))
    read_or_refuse(sealed(body))


def test_a_malformed_manifest_of_a_real_step_is_passed_over_and_a_later_one_is_left_alone(tmp_path):
    with CheckpointManager(tmp_path, keep=1) as manager:
        for step in (1, 2):
            manager.save(step, {"w": jnp.ones(3)}, on_exists="skip")
            manager.pin(step) if step == 1 else None
        manager.wait()
    path = tmp_path / "2" / "manifest.json"
    body = json.loads(path.read_bytes())
    del body["crc32"]
    for field in body:
        path.write_bytes(sealed(changed(body, (field,), [[field]])))
        reader = CheckpointManager(tmp_path, read_only=True)
        assert reader.restore().step == 1
        assert [info.step for info in reader.infos()] == [1]
        assert not reader.verify(2)


@pytest.fixture
def later(tmp_path):
    """A run whose newest step a later ckptmgr wrote."""
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, {"w": jnp.ones(3)})
    path = tmp_path / "2" / "manifest.json"
    path.write_bytes(sealed({"format": 99, "new": True}))
    return tmp_path


def test_a_step_of_a_later_format_says_upgrade_and_is_neither_damaged_nor_touched(later):
    before = {path: path.read_bytes() for path in (later / "2").rglob("*") if path.is_file()}
    with CheckpointManager(later, keep=1) as manager:
        assert manager.steps() == [1, 2]
        assert [info.step for info in manager.infos()] == [1]
        calls = [
            manager.restore, manager.restore_or, lambda: manager.restore(2), lambda: manager.verify(2),
            lambda: manager.info(2), lambda: manager.diff(2, params={}), lambda: list(manager.watch(timeout_s=0)),
            lambda: manager.save(2, {"w": jnp.ones(3)}, on_exists="replace"),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(NewerFormatError, match=r"step 2 has format 99.*upgrade ckptmgr"):
                call()
        assert manager.restore(1).skipped == {}
        for step in (3, 4):
            manager.save(step, {"w": jnp.ones(3)})
        manager.wait()
        assert manager.steps() == [2, 4]
        assert manager.restore().step == 4
    assert {path: path.read_bytes() for path in (later / "2").rglob("*") if path.is_file()} == before


def test_the_list_of_checkpoints_says_upgrade_and_not_damaged(later):
    listed = facts.run(CheckpointManager(later, read_only=True))
    console = Console(record=True, width=200)
    console.print(tables.run(listed))
    shown = console.export_text()
    assert [row["later_format"] for row in listed["steps"]] == [False, True]
    assert "upgrade ckptmgr" in shown
    assert "DAMAGED" not in shown


def test_the_mirror_leaves_a_step_of_a_later_format_alone(later, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with CheckpointManager(home, mirror=later, mirror_keep=1) as manager:
        for step in (2, 3):
            manager.save(step, {"w": jnp.ones(3)})
        manager.wait()
    assert json.loads((later / "2" / "manifest.json").read_bytes())["format"] == 99
    assert CheckpointManager(later, read_only=True).steps() == [2, 3]


@pytest.mark.parametrize("name", ["../secret", "/etc", "a/../../b", "..", ".", "", "a\\..\\b"])
def test_names_that_lead_outside_of_the_checkpoint_are_refused(name):
    good = sample()
    forged = [
        dataclasses.replace(good, items={name: good.items["params"]}),
        dataclasses.replace(good, items={"step": manifest.Item("json", file=name)}),
        dataclasses.replace(good, files={name: manifest.File(3, 99)}),
    ]
    for each in forged:
        with pytest.raises(CorruptCheckpointError, match="would lie outside of the checkpoint"):
            manifest.decode(manifest.encode(each), step=12, path="manifest.json")


def test_bytes_of_scalars_and_of_every_dtype_are_counted():
    tree = {"a": jnp.ones((3, 2), jnp.bfloat16), "b": np.ones(4, np.complex128), "c": 1.0, "d": np.float16(1)}
    assert manifest.Item("arrays", structure.describe(tree, item="params")).nbytes == 12 + 64 + 8 + 2


FORGED = [
    *({"dtype": name} for name in ("object", "O", "i8,O", "M8[s]", "(2,)i4", "V8", "U4", "void64")),
    *({"kind": kind, "shape": [4]} for kind in ("int", "float", "bool", "complex", "scalar", "str")),
    {"kind": "scalar", "shape": [], "dtype": "object"},
    {"kind": "key", "dtype": "key<no>", "impl": "no"},
    {"chunks": []},
    {"shape": [], "chunks": []},
]


@pytest.mark.parametrize("forged", FORGED, ids=str)
def test_a_forged_leaf_with_a_right_seal_is_an_error_and_gives_no_memory_away(forged, tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": np.full(4, 0x4141414141414141, np.int64)}).result()
    body = json.loads((tmp_path / "1" / "manifest.json").read_bytes())
    del body["crc32"]
    body["items"]["params"]["leaves"][0] |= forged
    (tmp_path / "1" / "manifest.json").write_bytes(sealed(body))
    reader = CheckpointManager(tmp_path, read_only=True)
    with pytest.raises(CheckpointError):
        reader.restore(1)
