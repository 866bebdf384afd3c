"""Every leaf kind through the disk bit for bit; chunks; what the caller does to arrays after `save`."""

import contextlib
import math
import tracemalloc

import jax
import jax.extend.random
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from ckptmgr import CheckpointManager, UnsupportedLeafError
from ckptmgr.arrays import chunks, to_host
from ckptmgr.arrays.chunks import chunk_shape
from ckptmgr.testing import assert_trees_equal
from ckptmgr.trees import structure

FLOAT8 = "e3m4 e4m3 e4m3b11fnuz e4m3fn e4m3fnuz e5m2 e5m2fnuz e8m0fnu"
NUMPY = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)] + [
    "bool",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
]
JAX_ONLY = ["bfloat16", "int2", "int4", "uint2", "uint4", "float4_e2m1fn"]
JAX_ONLY += [f"float8_{form}" for form in FLOAT8.split()]


def through_disk(tmp_path, tree, **options):
    with CheckpointManager(tmp_path / "run", **options) as manager:
        manager.save(1, tree)
        manager.wait()
        return manager.restore(1, params=tree).params


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_numpy_and_jax_arrays_of_every_dtype(tmp_path, compression):
    rng = np.random.default_rng(0)

    def bits(dtype, shape=(5, 3)):
        raw = rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
        if dtype == "bool":
            raw &= 1
        return raw.view(dtype).reshape(shape)  # any bit pattern, NaNs and infinities among them

    tree = {f"numpy {name}": bits(name) for name in NUMPY}
    tree |= {f"empty {name}": np.zeros((0, 2), name) for name in NUMPY}
    tree |= {f"0-d {name}": np.asarray(bits(name, (1,))[0]) for name in NUMPY}
    small = rng.integers(-2, 2, (4, 3))
    for name in JAX_ONLY:
        dtype = np.dtype(getattr(ml_dtypes, name))
        values = np.abs(small) if name.startswith("u") or name.endswith("fnu") else small
        tree[f"jax {name}"] = jnp.asarray(values.astype(dtype))
        tree[f"ml_dtypes {name}"] = values.astype(dtype)
    tree |= {f"jax {name}": jnp.asarray(bits(name)) for name in NUMPY if not name.endswith(("64", "128"))}
    tree["jax complex64"] = jnp.ones(3, jnp.complex64) * 1j
    back = through_disk(tmp_path, tree, compression=compression)
    assert_trees_equal(back, tree)


def test_scalars_keep_their_types(tmp_path):
    tree = {
        "int": 2**62,
        "float": 0.1,
        "nan": float("nan"),
        "bool": True,
        "complex": 1 + 2j,
        "np": [np.float16(0.1), np.int8(-3), np.bool_(True), ml_dtypes.bfloat16(1.5), np.complex64(1j)],
        "weak": jnp.asarray(0.1),
        "weaker": jnp.broadcast_to(jnp.asarray(2), (3,)),
        "strong": jnp.float32(0.1),
        "empty": [None, (), {}],
    }
    back = through_disk(tmp_path, tree)
    assert_trees_equal(back, tree)
    assert [type(leaf) for leaf in back["np"]] == [type(leaf) for leaf in tree["np"]]
    assert [type(back[name]) for name in ("int", "float", "bool", "complex")] == [int, float, bool, complex]
    assert back["weak"].weak_type
    assert not back["strong"].weak_type


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_typed_keys_of_any_generator_draw_the_same_numbers(make_mesh, tmp_path, impl):
    mesh = make_mesh(data=8)
    tree = {"one": jax.random.key(3, impl=impl), "many": jax.random.split(jax.random.key(4, impl=impl), (2, 3))}
    tree["spread"] = jax.device_put(
        jax.random.split(jax.random.key(5, impl=impl), 8), NamedSharding(mesh, PartitionSpec("data"))
    )
    back = through_disk(tmp_path, tree)
    assert_trees_equal(back, tree)
    for name, keys in tree.items():
        assert back[name].sharding == keys.sharding
        first, again = (jax.device_put(each, jax.devices()[0]).ravel()[0] for each in (keys, back[name]))
        assert np.array_equal(jax.random.normal(first, (4,)), jax.random.normal(again, (4,)))


def test_odd_layouts_in_memory(tmp_path):
    base = np.arange(24.0).reshape(4, 6)
    tree = {"fortran": np.asfortranarray(base), "strided": base[::2, ::3], "reversed": base[::-1], "T": base.T}
    read_only = base.copy()
    read_only.flags.writeable = False
    tree["read-only"] = read_only
    tree["mapped"] = np.memmap(tmp_path / "mapped", dtype="f4", mode="w+", shape=(3,))
    back = through_disk(tmp_path, tree)
    for name, leaf in tree.items():
        assert np.array_equal(back[name], leaf), name
        assert back[name].flags.writeable


def test_many_chunks_and_shards(make_mesh, tmp_path):
    mesh = make_mesh(data=4, model=2)
    values = jnp.arange(40 * 24, dtype=jnp.float32).reshape(40, 24)
    specs = [("data", "model"), (("data", "model"),), (None, "model"), (), ("model", "data")]
    tree = [jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec))) for spec in specs]
    tree.append(values)
    back = through_disk(tmp_path, tree, chunk_bytes=100)
    assert_trees_equal(back, tree)
    assert [leaf.sharding for leaf in back] == [leaf.sharding for leaf in tree]


sizes = st.lists(st.integers(0, 50), max_size=4)


@given(sizes, st.sampled_from([1, 2, 4, 8]), st.integers(1, 4000), st.data())
def test_chunks_are_bounded_and_never_shared_by_two_shards(shard, itemsize, chunk_bytes, data):
    pieces = [data.draw(st.sampled_from([1, 2, 3])) if size else 1 for size in shard]
    shape = [size * n for size, n in zip(shard, pieces, strict=True)]
    chunk = chunk_shape(shape, shard, itemsize, chunk_bytes)
    assert all(size >= 1 for size in chunk)
    assert np.prod(chunk, dtype=int) * itemsize <= max(chunk_bytes, itemsize)
    for size, whole, part in zip(chunk, shape, shard, strict=True):
        assert size <= max(1, part)
        assert part == whole or part % size == 0  # a sharded axis is cut where shards end


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 8)), min_size=1, max_size=3),
    st.integers(1, 500),
    st.data(),
)
def test_a_piece_is_cut_into_boxes_that_take_from_few_chunks(axes, most, data):
    shape, chunk = [size for size, _ in axes], [min(axis) for axis in axes]
    firsts = [data.draw(st.integers(0, size - 1)) for size in shape]
    lasts = [data.draw(st.integers(first + 1, size)) for first, size in zip(firsts, shape, strict=True)]
    piece = tuple(slice(first, last) for first, last in zip(firsts, lasts, strict=True))
    chunk_of = np.indices(shape).reshape(len(shape), -1) // np.array(chunk, int).reshape(-1, 1)
    number = np.ravel_multi_index(chunk_of, [99] * len(shape)).reshape(shape)
    times = np.zeros(shape, int)
    for box in chunks.boxes(piece, times[piece].shape, chunk, most):
        times[piece][box] += 1
        taken = chunks.taken_from(piece, box, chunk)
        assert taken == len(np.unique(number[piece][box]))
        assert taken == 1 or taken * np.prod(chunk) <= most
    assert (times[piece] == 1).all()
    assert times.sum() == times[piece].size


LENGTHS = [0, 1, 2, 3, 7, 28, 1021, 4096, 20011, 50257, 128256, 2**20, 67108879]


@given(
    st.lists(st.tuples(st.sampled_from(LENGTHS), st.sampled_from([1, 2, 8, 64, 1024])), max_size=4),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2**16, 2**20, 2**26, 2**32]),
)
def test_arrays_of_any_size_are_cut_in_time_and_into_no_more_parts_than_needed(axes, itemsize, chunk_bytes):
    shard = [size for size, _ in axes]
    chunk = chunk_shape([size * (n if size else 1) for size, n in axes], shard, itemsize, chunk_bytes)
    whole = math.prod(max(1, size) for size in shard) * itemsize
    assert math.prod(chunk) * itemsize * 1024 >= min(whole, chunk_bytes, 2**20)


@pytest.mark.parametrize(
    ("shape", "shard", "chunk"),
    [
        ((3, 4096, 4096), (3, 4096, 512), (1, 1024, 512)),  # q, k and v in one array, on 8 devices
        ((1, 4096, 4096), (1, 4096, 1024), (1, 2048, 1024)),
        ((28, 8192, 8192), (28, 8192, 128), (1, 4096, 128)),  # layers of a scan, on 64
        ((0, 1024, 1024), (0, 1024, 1024), (1, 1024, 1024)),
        ((8 * 20011, 4096), (20011, 4096), (20011, 512)),  # a prime number of rows on each device
        ((8 * 67108879,), (67108879,), (67108879,)),
    ],
)
def test_axes_that_cannot_be_cut_further_are_left(shape, shard, chunk):
    assert chunk_shape(shape, shard, 4, 64 * 2**20) == chunk


def test_a_shard_along_an_axis_that_was_not_sharded_reads_at_most_twice_its_bytes():
    gigabyte = (16384, 16384)
    assert chunk_shape(gigabyte, (2048, 16384), 4, 64 * 2**20) == (2048, 4096)
    assert chunk_shape(gigabyte, (16384, 2048), 4, 64 * 2**20) == (4096, 2048)
    assert chunk_shape(gigabyte, (4096, 8192), 4, 64 * 2**20) == (4096, 4096)
    assert chunk_shape((1024, 64), (128, 64), 4, 64 * 2**20) == (128, 64)  # small: left whole


def test_a_chunk_is_as_large_as_it_may_be():
    assert chunk_shape((4096, 4096), (4096, 4096), 4, 64 * 2**20) == (4096, 4096)
    assert chunk_shape((4096, 4096), (4096, 4096), 4, 4 * 2**20) == (1024, 1024)
    assert chunk_shape((), (), 4, 1) == ()


def test_the_caller_may_do_what_it_likes_once_save_has_returned(tmp_path):
    step = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with CheckpointManager(tmp_path) as manager:
        donated, deleted = jnp.arange(300_000.0), jnp.arange(1000)
        owned, view = np.arange(3_000_000.0), np.arange(12.0)[::2]
        loss = jnp.float32(2.5)
        expected = {
            "donated": np.array(donated),
            "deleted": np.array(deleted),
            "owned": owned.copy(),
            "view": view.copy(),
        }
        params = {"donated": donated, "deleted": deleted, "owned": owned, "view": view}
        step(jnp.arange(300_000.0))  # compiled by now: what comes after save comes at once
        manager.save(1, params, metrics={"loss": loss})
        owned[:] = -1
        view[:] = -1
        step(donated).block_until_ready()
        deleted.delete()
        loss.delete()
        back = manager.restore(1)
    for name, values in expected.items():
        assert np.array_equal(back.params[name], values), name
    assert back.metrics == {"loss": 2.5}


def test_max_host_bytes_bounds_the_copies_that_wait_to_be_written(tmp_path):
    params = {f"w{n}": np.random.default_rng(n).random((1024, 1024)) for n in range(12)}  # 8 MiB each
    total = sum(leaf.nbytes for leaf in params.values())
    peaks = {}
    for bound in (None, 24 * 2**20):
        with CheckpointManager(tmp_path / str(bound), max_host_bytes=bound) as manager:
            tracemalloc.start()  # numpy's memory is counted
            manager.save(1, params, {"moments": params["w0"]}).result()
            peaks[bound] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert_trees_equal(manager.restore(1, params=params).params, params)
    assert peaks[None] > total
    assert peaks[24 * 2**20] < 25 * 2**20


def test_leaves_larger_than_the_bound_are_copied_one_by_one(make_mesh, tmp_path):
    mesh = make_mesh(data=8)
    params = {f"w{n}": jnp.full((64, 64), float(n)) for n in range(5)}
    params["spread"] = jax.device_put(jnp.ones((64, 8)), NamedSharding(mesh, PartitionSpec("data")))
    assert_trees_equal(through_disk(tmp_path, params, max_host_bytes=1), params)


def test_no_bit_of_a_chunk_can_change_unnoticed():
    values = np.arange(7, dtype=np.int16)
    stored = chunks.Stored(values.shape, "int16", values.shape)
    ((_, good),) = chunks.encoded(values, (), stored.chunks)
    assert np.array_equal(chunks.decode(good, stored), values)
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="checksum"):
            chunks.decode(bytes(bad), stored)


def test_the_words_of_keys_are_never_cut():
    keys = jax.random.split(jax.random.key(0), 1 << 20)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    for rows, chunk_bytes in ((NamedSharding(mesh, PartitionSpec("x")), 64 << 20), (None, 1000)):
        leaf = keys if rows is None else jax.device_put(keys, rows)
        tree = structure.describe({"k": leaf}, item="params")
        (stored,) = to_host.Planner(chunk_bytes).plan("params", tree, [leaf]).stored
        assert stored.chunks[1] == 2


def test_an_array_without_values_whose_rows_are_large(tmp_path):
    empty = np.zeros((0, 5000, 5000), np.float32)
    with CheckpointManager(tmp_path, chunk_bytes=256 << 20) as manager:
        manager.save(1, {"w": empty}).result()
        assert manager.restore(1).params["w"].shape == empty.shape
        assert manager.verify(1)


@pytest.mark.parametrize(
    "name", sorted(each for each in vars(ml_dtypes) if isinstance(getattr(ml_dtypes, each), type))
)
def test_every_type_of_ml_dtypes_comes_back_or_is_refused_by_name(name, tmp_path):
    kind = getattr(ml_dtypes, name)
    if not issubclass(kind, np.generic):
        pytest.skip("no type of arrays")
    values = {"numpy": np.zeros(3, kind)}
    with contextlib.suppress(TypeError, ValueError, RuntimeError):  # what JAX, or XLA, does not know
        values["jax"] = jnp.zeros(3, kind)
    for what, value in values.items():
        with CheckpointManager(tmp_path / what) as manager:
            if name not in structure.STORED_ML_TYPES:
                with pytest.raises(UnsupportedLeafError, match="which has no form on disk"):
                    manager.save(1, {"w": value})
                continue
            manager.save(1, {"w": value}).result()
            assert_trees_equal(manager.restore(1, params={"w": value}).params, {"w": value})


def test_keys_of_a_generator_without_a_name_are_refused(tmp_path):
    known = jax.extend.random.threefry_prng_impl
    parts = {name: getattr(known, name) for name in ("key_shape", "seed", "split", "random_bits", "fold_in")}
    mine = jax.extend.random.define_prng_impl(**parts, tag="rbg")
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(
            UnsupportedLeafError, match=r"params\['k'\].*is of a generator that JAX knows by no name"
        ):
            manager.save(1, {"k": jax.random.key(0, impl=mine)})
        for name in ("threefry2x32", "rbg", "unsafe_rbg"):
            manager.save(1, {"k": jax.random.key(0, impl=name)}, on_exists="replace").result()
            assert str(jax.random.key_impl(manager.restore(1).params["k"])) == name


def test_arrays_that_are_replicated_for_a_reduction_come_back_and_sums_to_be_made_are_refused(tmp_path):
    mesh = jax.make_mesh((8,), ("data",))
    try:
        spec = PartitionSpec(reduced={"data"})
    except TypeError:
        pytest.skip("this JAX has no reduced axes")
    array = jax.device_put(np.arange(8.0, dtype=np.float32), NamedSharding(mesh, spec))
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": array}).result()
        assert np.array_equal(manager.restore(1, params={"w": array}).params["w"], array)
    with pytest.raises(structure._UnsupportedError, match="a sum that is still to be made"):
        structure.partition_of(NamedSharding(mesh, PartitionSpec(unreduced={"data"})))
