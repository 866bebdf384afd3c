"""manifest.json: what goes in comes out, and no bit of it can change unnoticed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from ckptmgr import CorruptCheckpointError, manifest, structure


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


def test_a_manifest_of_another_step_or_of_a_later_format_is_refused(monkeypatch):
    with pytest.raises(CorruptCheckpointError, match="belongs to step 12"):
        manifest.decode(manifest.encode(sample()), step=13, path="manifest.json")
    monkeypatch.setattr(manifest, "FORMAT", 3)
    own = {name: dataclasses.replace(item, processes=2) for name, item in sample().items.items()}
    later = manifest.encode(dataclasses.replace(sample(), items=own))
    monkeypatch.undo()
    with pytest.raises(CorruptCheckpointError, match="upgrade ckptmgr"):
        manifest.decode(later, step=12, path="manifest.json")


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


@pytest.fixture
def recorded(tmp_path):
    """A directory of files and a manifest that records them; `params/d/x` checks itself."""
    for name, data in {"a": b"top", "params/b": b"small", "params/d/x": b"array", "opt_state/c": b"other"}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    sizes = {
        path.relative_to(tmp_path).as_posix(): path.stat().st_size
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    files = manifest.record_files(epath.Path(tmp_path), sizes, lambda name: "/d/" in name)
    return tmp_path, dataclasses.replace(sample(), files=files)


@pytest.mark.parametrize("name", ["a", "params/b"])
def test_a_changed_file_is_named(recorded, name):
    directory, wrote = recorded
    manifest.check_files(wrote, epath.Path(directory), ["params"])
    data = bytearray((directory / name).read_bytes())
    data[1] ^= 4
    (directory / name).write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match="checksum") as caught:
        manifest.check_files(wrote, epath.Path(directory), ["params"])
    assert caught.value.path == name
    assert caught.value.step == 12


@pytest.mark.parametrize("name", ["a", "params/b", "params/d/x"])
def test_a_short_or_missing_file_is_named(recorded, name):
    directory, wrote = recorded
    (directory / name).write_bytes(b"x")
    with pytest.raises(CorruptCheckpointError, match="1 bytes instead of") as caught:
        manifest.check_files(wrote, epath.Path(directory), ["params"])
    assert caught.value.path == name
    (directory / name).unlink()
    with pytest.raises(CorruptCheckpointError, match="is missing"):
        manifest.check_files(wrote, epath.Path(directory), ["params"])


def test_items_that_are_not_read_are_not_looked_at(recorded):
    directory, wrote = recorded
    (directory / "opt_state/c").unlink()
    manifest.check_files(wrote, epath.Path(directory), ["params"])
    with pytest.raises(CorruptCheckpointError, match="opt_state/c"):
        manifest.check_files(wrote, epath.Path(directory), ["params", "opt_state"])


def test_bytes_of_scalars_and_of_every_dtype_are_counted():
    tree = {"a": jnp.ones((3, 2), jnp.bfloat16), "b": np.ones(4, np.complex128), "c": 1.0, "d": np.float16(1)}
    assert manifest.Item("arrays", structure.describe(tree, item="params")).nbytes == 12 + 64 + 8 + 2
