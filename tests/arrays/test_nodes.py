"""The nodes of OCDBT databases: read as TensorStore tells them, no bit unnoticed, and nothing kept."""

import gc
import itertools
import random
import statistics
import tracemalloc

import google_crc32c
import numpy as np
import pytest
import tensorstore as ts
from etils import epath

import ckptmgr
from ckptmgr.arrays import extents, nodes


def make(directory, seed, compression=None):
    """A database of one or of two parts, with few or many nodes."""
    draw, context = random.Random(seed), ts.Context()
    config = {"compression": compression, "max_decoded_node_bytes": draw.choice([300, 2000, 8 << 20])}

    def open_store(place, **config):
        spec = {"driver": "ocdbt", "base": f"file://{directory}/{place}", "config": config}
        return ts.KvStore.open(spec, context=context).result()

    def fill(place, part):
        transaction = ts.Transaction(atomic=True)
        store = open_store(place, **config, max_inline_value_bytes=draw.choice([100, 4096]))
        store = store.with_transaction(transaction)
        for n in range(draw.choice([1, 40, 300])):
            store[f"{part}.leaf{n}/zarr.json"] = b"{}"
            store[f"{part}.leaf{n}/c/0"] = b"v" * draw.choice([0, 1, 300, 5000])
        transaction.commit_async().result()

    if draw.random() < 0.5:
        fill("", 0)
    else:
        parts = [f"ocdbt.process_{part}/" for part in range(2)]
        for part, place in enumerate(parts):
            fill(place, part)
        transaction = ts.Transaction(atomic=True)
        whole = open_store("", **config).with_transaction(transaction)
        for copied in [open_store(place).experimental_copy_range_to(whole) for place in parts]:
            copied.result()
        transaction.commit_async().result()
    return epath.Path(directory)


@pytest.mark.parametrize("compression", [None, {"id": "zstd"}], ids=["plain", "zstd"])
def test_every_value_is_found_where_tensorstore_says(compression, tmp_path, monkeypatch):
    for seed in range(8):
        directory = make(tmp_path / str(seed), seed, compression)
        found = extents.find(directory)
        with monkeypatch.context() as patch:
            patch.setattr(nodes, "roots", lambda *_: None)  # TensorStore is asked
            patch.setattr(nodes, "decode", lambda *_: None)
            assert found == extents.find(directory)
        assert found


def test_no_bit_of_a_node_can_change_unnoticed(tmp_path):
    make(tmp_path, 3)
    data = b"".join(path.read_bytes() for path in sorted(tmp_path.rglob("d/*")))
    first = data.index(bytes.fromhex("0cdb20de"))
    good = data[first : first + int.from_bytes(data[first + 4 : first + 12], "little")]
    assert nodes.decode(good, b"") is not None
    for bit in range(0, 8 * len(good), max(1, len(good) // 100)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="node of the database"):
            nodes.decode(bytes(bad), b"")


def test_a_database_of_which_everything_was_deleted_has_no_root(tmp_path):
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/"}).result()
    store["a"] = b"1"
    assert list(extents.find(epath.Path(tmp_path))) == ["a"]
    store.delete_range(ts.KvStore.KeyRange("", "z")).result()
    assert extents.find(epath.Path(tmp_path)) == {}


def test_no_bit_of_a_manifest_can_change_unnoticed(tmp_path):
    make(tmp_path, 3)
    good = (tmp_path / "manifest.ocdbt").read_bytes()
    assert nodes.roots(good)
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="manifest of the database"):
            nodes.roots(bytes(bad))


def test_saves_and_restores_keep_no_memory(tmp_path):
    params = {f"w{n}": np.full(3, n) for n in range(300)} | {"large": np.zeros(400_000)}
    with ckptmgr.CheckpointManager(tmp_path, keep=1) as manager:

        def once(step):
            manager.save(step, params).result()
            manager.wait()
            manager.restore(layout=ckptmgr.HOST)
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        for step in range(3):
            once(step)
        tracemalloc.start()
        held = [once(step) for step in range(3, 14)]
        tracemalloc.stop()
    assert epath.Path(tmp_path / "13").exists()
    growth = [after - before for before, after in itertools.pairwise(held)]
    # 600 entries that `tensorstore.ocdbt.dump` never frees are 300,000 a step. What is loaded once is no leak.
    assert statistics.median(growth) < 20_000


def test_a_node_that_is_below_itself_is_an_error(tmp_path, monkeypatch):
    body = b"\0\0\1" + b"\1\3\0" + b"d/x" + b"\1\0\0" + b"\0\0\x1f"  # one child: d/x, 0, 31
    data = bytes.fromhex("0cdb20de") + (31).to_bytes(8, "little") + body
    data += google_crc32c.value(data).to_bytes(4, "little")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_bytes(data)
    monkeypatch.setattr(extents, "_roots", lambda *_: [nodes.Place(b"", b"d/x", 0, 31)])
    with pytest.raises(ValueError, match="a node of the database is below itself"):
        extents.find(tmp_path)
