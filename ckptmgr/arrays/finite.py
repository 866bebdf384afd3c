"""Looks for NaN and infinity in the leaves of an item, on their devices; in numpy arrays, in their copies.

The programs are started on the caller's thread, where nothing waits for them. Their results are read behind it.
In a job each process looks at the pieces of its own devices: a program of all processes would wait for one in
which the save has failed.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ckptmgr.arrays.to_devices import mesh_of, spell
from ckptmgr.arrays.to_host import Part
from ckptmgr.specs import LeafSpec, TreeSpec
from ckptmgr.trees.structure import numpy_dtype

_ALIKE, _MIXED = 32, 128
"""The leaves of one program, of one shape and of several: XLA compiles one for 3,000 leaves for ten seconds."""
_AT_ONCE = 1 << 22  # elements of a numpy array: what is found in them takes a byte each


class Piece(NamedTuple):
    """What one program looks at of a leaf."""

    place: int
    shard: int | None = None
    """Which of the shards on local devices; None: the whole leaf."""


class Run(NamedTuple):
    """The pieces that one program looks at."""

    mesh: jax.sharding.Mesh
    pieces: Sequence[Piece]


class Plan(NamedTuple):
    """Where to look in a tree: the same for every step of one structure."""

    tree: TreeSpec
    runs: Sequence[Run]
    on_host: frozenset[int]
    """The leaves that are looked at in their copies."""


class Search:
    """A search in the leaves of one item, as they are at the call of `save`."""

    def __init__(self, item: str, plan: Plan, leaves: Sequence[Any]) -> None:
        self.item, self._plan = item, plan
        with jax.debug_nans(False), jax.debug_infs(False):  # they may be there: it is what is looked for
            self._flags = [_start(run, leaves) for run in plan.runs]
        self._found: set[int] = set()
        self._turn = threading.Lock()
        """A local save and a durable one of the same step look in two threads."""

    @property
    def in_copies(self) -> frozenset[int]:
        """The leaves that are looked at in their copies, so that they have to be copied."""
        return self._plan.on_host

    def look(self, copied: Iterable[tuple[int, list[Part]]]) -> None:
        """Looks at copies: the place of each leaf, and its parts."""
        for place, parts in copied:
            if place in self._plan.on_host:
                dtype = numpy_dtype(self._plan.tree.leaves[place].dtype)
                if not all(_is_finite_on_host(part.view(dtype)) for _, part in parts):
                    with self._turn:
                        self._found.add(place)

    def marks(self) -> str:
        """What this process has found, for the way to process 0: a bit for each leaf. Waits for the programs."""
        with self._turn:
            flags, self._flags = self._flags, []
            for run, found in zip(self._plan.runs, flags, strict=False):
                with jax.transfer_guard_device_to_host("allow"):
                    are_finite = np.asarray(found)
                self._found.update(
                    piece.place for piece, is_finite in zip(run.pieces, are_finite, strict=True) if not is_finite
                )
            return f"{sum(1 << place for place in self._found):x}"

    def verdict(self, marks: Iterable[str]) -> str | None:
        """What all processes have found, in words; None if every leaf is finite."""
        bits = 0
        for each in marks:
            bits |= int(each, 16)
        paths = [leaf.path for place, leaf in enumerate(self._plan.tree.leaves) if bits >> place & 1]
        return _spell(self.item, paths) if paths else None


class Finder:
    """Starts the searches; keeps the plan of the step before, which mostly fits."""

    def __init__(self) -> None:
        self._known: Plan | None = None

    def start(self, item: str, tree: TreeSpec, leaves: Sequence[Any]) -> Search:
        """Returns at once: nothing waits for the devices."""
        if self._known is None or self._known.tree is not tree:
            self._known = _plan(tree, leaves)
        return Search(item, self._known, leaves)


_NAMED = 3


def _spell(item: str, paths: Sequence[str]) -> str:
    holds = f"{item} {'hold' if item.endswith('s') else 'holds'} NaN or infinity"
    named = paths if len(paths) <= _NAMED else paths[: _NAMED - 1]
    more = f" and {len(paths) - len(named)} more" if len(paths) > len(named) else ""
    return holds if paths == [""] else f"{holds}: {', '.join(named)}{more}"


# ---------------------------------------------------------------- where to look


def _plan(tree: TreeSpec, leaves: Sequence[Any]) -> Plan:
    pieces: dict[Any, list[Piece]] = {}
    on_host = set[int]()
    floating = [place for place, leaf in enumerate(tree.leaves) if _may_be_nonfinite(leaf)]
    for place in sorted(floating, key=lambda place: _kind(tree.leaves[place])):
        leaf = leaves[place]
        if isinstance(leaf, jax.Array) and _is_in_default_memory(leaf):
            for group, piece in _pieces(place, leaf):
                pieces.setdefault(group, []).append(piece)
        else:
            on_host.add(place)
    runs = [Run(mesh_of(group), some) for group, found in pieces.items() for some in _batches(found, tree)]
    return Plan(tree, runs, frozenset(on_host))


def _kind(leaf: LeafSpec) -> Any:
    """Equal for leaves that a program takes in each other's place."""
    return leaf.shape, leaf.dtype, leaf.weak, str(leaf.partition)


def _batches(pieces: Sequence[Piece], tree: TreeSpec) -> Iterator[Sequence[Piece]]:
    """The pieces for each program; `pieces` are sorted by their kind."""
    rest: list[Piece] = []
    for _, some in itertools.groupby(pieces, lambda piece: _kind(tree.leaves[piece.place])):
        alike = list(some)
        full = len(alike) - len(alike) % _ALIKE
        yield from (alike[at : at + _ALIKE] for at in range(0, full, _ALIKE))
        rest += alike[full:]
    yield from (rest[at : at + _MIXED] for at in range(0, len(rest), _MIXED))


def _may_be_nonfinite(leaf: LeafSpec) -> bool:
    is_number = leaf.kind not in ("key", "str")
    return is_number and bool(jnp.issubdtype(numpy_dtype(leaf.dtype), jnp.inexact))


def _is_in_default_memory(array: jax.Array) -> bool:
    """Programs do not compute on arrays that are kept in the memory of the host."""
    kind = next(iter(array.devices())).default_memory().kind
    return array.sharding.memory_kind in (kind, None)


def _pieces(place: int, array: jax.Array) -> Iterator[tuple[Any, Piece]]:
    """The pieces of an array on local devices, and for each what its program is grouped by."""
    sharding = array.sharding
    if sharding.is_fully_addressable:
        yield _group(sharding), Piece(place)
        return
    shards = array.addressable_shards
    for n in {spell(shard.index, array.shape): n for n, shard in enumerate(shards)}.values():
        yield _group(array.addressable_data(n).sharding), Piece(place, n)  # the first, if all are equal


def _group(sharding: jax.sharding.Sharding) -> Any:
    """Arrays of one group can be given to one program: they are on the same devices, in the same order."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return sharding.mesh
    return next(iter(sharding.device_set)) if len(sharding.device_set) == 1 else sharding


# ---------------------------------------------------------------- looking


def _start(run: Run, leaves: Sequence[Any]) -> jax.Array:
    """A program runs on the mesh of `jax.set_mesh`, and takes no arrays of another."""
    given = [
        leaves[piece.place] if piece.shard is None else leaves[piece.place].addressable_data(piece.shard)
        for piece in run.pieces
    ]
    with jax.set_mesh(run.mesh):
        found: jax.Array = _are_finite(given)
    return found


@jax.jit
def _are_finite(arrays: list[Any]) -> Any:
    return lax.concatenate([lax.reshape(_is_finite(array), (1,)) for array in arrays], 0)


def _is_finite(array: Any) -> Any:
    axes = tuple(range(array.ndim))
    if jnp.iscomplexobj(array):
        parts = lax.is_finite(lax.real(array)), lax.is_finite(lax.imag(array))
        return lax.reduce_and(lax.bitwise_and(*parts), axes)
    return lax.reduce_and(lax.is_finite(array), axes)


def _is_finite_on_host(values: Any) -> bool:
    flat = values.reshape(-1)
    return all(np.isfinite(flat[at : at + _AT_ONCE]).all() for at in range(0, flat.size, _AT_ONCE))
