"""Small arrays, read many at a time: each is its own, and no bit of one can change unnoticed."""

import random

import google_crc32c
import numpy as np
import pytest

from ckptmgr.arrays import small
from ckptmgr.arrays.extents import Extent
from ckptmgr.specs import LeafSpec


def sealed(values):
    return values.tobytes() + int(google_crc32c.value(values.tobytes())).to_bytes(4, "little")


def make(directory, seed):
    """Arrays of many forms, their chunks in files with gaps between them or among the nodes; where each is."""
    draw, random_values = random.Random(seed), np.random.default_rng(seed)
    specs, arrays, found, files = [], [], {}, {"one": bytearray(b"x" * 7), "other": bytearray()}
    for n in range(60):
        shape = draw.choice([(), (3,), (5, 7), (40_000,)])
        dtype = draw.choice(["float32", "bfloat16", "uint8", "int64", "bool", "float8_e4m3"])
        spec = LeafSpec(f"['w{n}']", (f"w{n}",), "jax", shape, dtype)
        bits = random_values.integers(0, 2, (*shape, 16), np.uint8)[..., :1].copy()
        values = np.broadcast_to(bits, (*shape, small.numpy_dtype(dtype).itemsize)).copy()
        values = values.view(small.numpy_dtype(dtype)).reshape(shape)
        data, key = sealed(values), "/".join([f"w{n}", "c", *["0"] * len(shape)])
        if draw.random() < 0.3:
            found[key] = data
        else:
            name = draw.choice(list(files))
            found[key] = Extent(name, len(files[name]), len(data))
            files[name] += data + bytes(draw.choice([0, 0, 0, 300, 70_000]))
        specs.append(spec)
        arrays.append(values)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    draw.shuffle(order := list(range(60)))
    return [specs[n] for n in order], [arrays[n] for n in order], found


@pytest.mark.parametrize("seed", range(5))
def test_each_comes_back_as_it_was(seed, tmp_path):
    specs, arrays, found = make(tmp_path, seed)
    for read, array in zip(
        small.read(small.Plan(specs), str(tmp_path), found, small.scratch()), arrays, strict=True
    ):
        assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert read.ctypes.data % 64 == 0  # where JAX takes it over as it is
        assert read.flags.writeable


def test_no_bit_of_one_can_change_unnoticed_and_the_one_is_named(tmp_path):
    specs, _, found = make(tmp_path, 0)
    plan = small.Plan(specs)
    draw = random.Random(1)
    for place in draw.sample(range(60), 25):
        source = found[plan.keys[place]]
        nbytes = len(source) if isinstance(source, bytes) else source.nbytes
        bit = draw.choice([*range(8 * 4), 8 * nbytes - 1])
        if isinstance(source, bytes):
            bad = bytearray(source)
            bad[bit // 8] ^= 1 << bit % 8
            changed = found | {plan.keys[place]: bytes(bad)}
            with pytest.raises(small.SmallArrayError, match="checksum") as caught:
                small.read(plan, str(tmp_path), changed, small.scratch())
        else:
            path, good = tmp_path / source.file, (tmp_path / source.file).read_bytes()
            bad = bytearray(good)
            bad[source.offset + bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            with pytest.raises(small.SmallArrayError, match="checksum") as caught:
                small.read(plan, str(tmp_path), found, small.scratch())
            path.write_bytes(good)
        assert caught.value.place == place


def test_one_that_is_missing_or_of_another_size_or_behind_the_end_is_named(tmp_path):
    specs, _, found = make(tmp_path, 0)
    plan = small.Plan(specs)
    place = next(
        n for n, key in enumerate(plan.keys) if isinstance(found[key], Extent) and specs[n].shape == (5, 7)
    )
    key, source = plan.keys[place], found[plan.keys[place]]
    end = (tmp_path / source.file).stat().st_size
    for wrong, why in (
        (None, "is missing"),
        (b"", "has 0 bytes"),
        (source._replace(nbytes=2**40), "bytes instead of"),
        (source._replace(offset=end), "ends within its chunk"),
        (source._replace(file="absent"), "No such file"),
    ):
        with pytest.raises(small.SmallArrayError, match=why) as caught:
            small.read(plan, str(tmp_path), found | {key: wrong}, small.scratch())
        assert caught.value.place == place
