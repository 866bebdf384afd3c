"""Who writes what, where several processes hold the same."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.arrays import chunks, extents, shares, to_host, writing
from ckptmgr.arrays.chunks import Stored
from ckptmgr.specs import LeafSpec, TreeSpec

SIZES = st.lists(st.integers(0, 10**6), min_size=1, max_size=80)


@given(sizes=SIZES, count=st.integers(1, 40))
def test_what_all_hold_is_shared_but_for_one_unit(sizes, count):
    work = [shares.Unit(0, (), (), size, tuple(range(count))) for size in sizes]
    writers = shares.assign(work)
    load = [sum(size for size, writer in zip(sizes, writers, strict=True) if writer == n) for n in range(count)]
    assert max(load) <= sum(sizes) / count + max(sizes)


@given(st.data())
def test_each_unit_is_written_by_one_of_those_who_hold_it_and_no_holder_has_much_less_to_do(data):
    count = data.draw(st.integers(1, 12))
    some = st.sets(st.integers(0, count - 1), min_size=1).map(lambda found: tuple(sorted(found)))
    work = [shares.Unit(0, (), (), size, data.draw(some)) for size in data.draw(SIZES)]
    writers = shares.assign(work)
    assert all(writer in unit.holders for unit, writer in zip(work, writers, strict=True))
    load = [sum(u.nbytes for u, w in zip(work, writers, strict=True) if w == n) for n in range(count)]
    for unit, writer in zip(work, writers, strict=True):
        if len(unit.holders) > 1:  # greedy: when it was given away, no other holder had less to write
            later = [
                u.nbytes for u, w in zip(work, writers, strict=True) if w == writer and u.nbytes <= unit.nbytes
            ]
            assert load[writer] - sum(later) <= min(load[n] for n in unit.holders)


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 40), min_size=3, max_size=3),
    most_bytes=st.integers(1, 4096),
    shards=st.sampled_from([1, 2, 4]),
)
def test_the_units_of_an_array_are_its_chunks_each_once(shape, cuts, most_bytes, shards):
    shape = (shape[0] * shards, *shape[1:])
    shard = (shape[0] // shards, *shape[1:])
    chunk = (shard[0], *(min(cut, size) for cut, size in zip(cuts, shape[1:], strict=False)))
    rows = [slice(n * shard[0], (n + 1) * shard[0]) for n in range(shards)]
    held = [shares.Piece((row, *[slice(None)] * (len(shape) - 1)), (0, 1)) for row in rows]
    found = np.zeros(shape, int)
    for unit in shares.units(0, held, Stored(shape, "float32", chunk), most_bytes):
        found[unit.where] += 1
        assert np.shares_memory(found[unit.where], chunks.at(found[unit.piece], unit.inside))
        assert found[unit.where].size * 4 == unit.nbytes
        for axis, size in zip(unit.where, chunk, strict=True):
            assert (axis.start or 0) % size == 0
    assert (found == 1).all()


def test_an_array_on_several_devices_is_the_sum_of_its_pieces():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    for spec in itertools.product([None, "data"], [None, "model"]):
        array = jax.device_put(jnp.zeros((8, 6)), jax.NamedSharding(mesh, jax.P(*spec)))
        held = shares.pieces(array.sharding, array.shape)
        assert sum(np.zeros(array.shape)[piece.at].size for piece in held) == array.size
        assert {piece.holders for piece in held} == {(0,)}


def test_what_is_larger_than_a_tenth_of_a_fair_share_is_cut():
    everywhere, here = shares.Piece((), tuple(range(4))), shares.Piece((), (0,))
    assert shares.largest_chunk([[everywhere]], [400 << 20]) == 10 << 20
    assert shares.largest_chunk([[everywhere], [here]], [400 << 20, 100 << 20]) == 20 << 20
    assert shares.largest_chunk([[everywhere]], [1000]) == shares.largest_chunk([], []) == 64 << 10


@given(st.data())
def test_each_process_writes_its_share_and_all_of_them_everything_once(data):
    """Where several leaves have one list of pieces, too: as if each had its own."""
    count, size = data.draw(st.integers(1, 6)), 12
    holders = st.sets(st.integers(0, count - 1), min_size=1).map(lambda found: tuple(sorted(found)))
    lists = [
        [shares.Piece((slice(n, n + 1),), data.draw(holders)) for n in range(size)]
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    held = {leaf: data.draw(st.sampled_from(lists)) for leaf in range(data.draw(st.integers(1, 8)))}
    stored = [Stored((size,), data.draw(st.sampled_from(["int8", "float32"])), (1,)) for _ in held]
    work = [unit for leaf, some in held.items() for unit in shares.units(leaf, some, stored[leaf], 1)]
    written = []
    for process in range(count):
        mine = shares.own(process, held, stored, 1)
        apart = shares.own(process, {leaf: list(some) for leaf, some in held.items()}, stored, 1)
        assert mine == apart
        assert set(mine) == set(held)
        written += [unit for units in mine.values() for unit in units]
        assert all(process in unit.holders for units in mine.values() for unit in units)
    assert sorted(written, key=repr) == sorted(work, key=repr)


def test_pieces_of_one_holder_cost_nothing_for_each_leaf(monkeypatch):
    """Of a leaf that is cut into a piece for each of thousands of processes only the own piece is looked at."""
    count, leaves = 2_000, 300
    some = [shares.Piece((slice(n, n + 1),), (n,)) for n in range(count)]
    looked = []
    monkeypatch.setattr(shares, "_shape", lambda *given, real=shares._shape: looked.append(1) or real(*given))
    mine = shares.own(7, dict.fromkeys(range(leaves), some), [Stored((count,), "float32", (1,))] * leaves, 1 << 20)
    assert [unit.piece for units in mine.values() for unit in units] == [some[7].at] * leaves
    assert len(looked) <= count + 2 * leaves


def test_a_process_commits_its_pieces_of_many_leaves_at_once(tmp_path):
    """However large the leaves are: what counts is what this process holds of them."""
    leaves, stored = 40, Stored((1 << 12, 1 << 10), "float32", (1, 1 << 10))
    names = [f"w{n}" for n in range(leaves)]
    specs = [LeafSpec(name, (name,), "jax", stored.shape, "float32", chunks=stored.chunks) for name in names]
    piece = (slice(7, 8), slice(0, 1 << 10)), np.ones((1, 1 << 10), np.float32)
    takes = (lambda leaf, is_own: [piece],) * leaves
    plan = to_host.Plan(TreeSpec(tuple(specs), None), (stored,) * leaves, (None,) * leaves, (), takes)
    snapshot = writing.Snapshot(plan, [None] * leaves, None)
    snapshot.collect()
    writing.write(epath.Path(tmp_path), snapshot, None)
    assert len(list((tmp_path / "d").iterdir())) <= 3
    assert sum(key.endswith("/c/7/0") for key in extents.find(tmp_path)) == leaves
