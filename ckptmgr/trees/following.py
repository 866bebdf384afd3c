"""Leaves of opt_state that mirror a parameter (Adam's mu and nu) go where the parameter goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ckptmgr.specs import Keys, Row
from ckptmgr.trees.layouts import HERE, Place, Wanted


def follow(wanted: Wanted, params: Wanted, places: Sequence[Place], rest: Place | None = None) -> list[Place]:
    """Leaves that mirror a parameter (Adam's mu and nu) go where it goes, others to `rest` (default: replicated).

    A leaf mirrors the parameter that has its shape and whose whole path its own path ends with. Where there is
    none, the end of that path is enough: with optax.lookahead `.fast_state[0].mu['w']` mirrors `.fast['w']`.
    """
    rest = replicated(places) if rest is None else rest
    whole, partly = _endings(params, places)

    def place(row: Row) -> Place:
        own = [(row.wants.keys[first:], row.wants.shape) for first in range(len(row.wants.keys) + 1)]
        return next((known[ending] for known in (whole, partly) for ending in own if ending in known), rest)

    return [place(row) for row in wanted.rows]


_Ending = tuple[Keys, tuple[int, ...]]


def _endings(params: Wanted, places: Sequence[Place]) -> tuple[dict[_Ending, Place], dict[_Ending, Place]]:
    """The places of the parameters by path and shape: by whole paths, and by ends that lead to one place only."""
    whole: dict[_Ending, Place] = {}
    partly: dict[_Ending, list[Place]] = {}
    for row, place in zip(params.rows, places, strict=True):
        keys, shape = row.wants.keys, row.wants.shape
        whole[keys, shape] = place
        for first in range(1, len(keys)):
            partly.setdefault((keys[first:], shape), []).append(place)
    agreed = {ending: found[0] for ending, found in partly.items() if all(each == found[0] for each in found)}
    return whole, agreed


def replicated(places: Iterable[Place]) -> Place:
    """All of an array on every device of the mesh that the params are on, in their kind of memory if it is one."""
    found = list(places)
    named = [place for place in found if isinstance(place, NamedSharding)]
    if not named:
        return next(iter(found), HERE)
    kinds = {place.memory_kind for place in named}
    return NamedSharding(named[0].mesh, PartitionSpec(), memory_kind=kinds.pop() if len(kinds) == 1 else None)


def same(own: Place | None, followed: Place, shape: tuple[int, ...]) -> Place:
    """A leaf's own place, spelled as that of the leaf that it follows if both are the same place: P("x", None) and
    P("x") are equal for JAX's programs, and not for `==`."""
    if own is None:
        return followed
    if own is followed or (isinstance(own, SingleDeviceSharding) and isinstance(followed, SingleDeviceSharding)):
        return own
    both = isinstance(own, Sharding) and isinstance(followed, Sharding)
    return followed if both and own.is_equivalent_to(followed, len(shape)) else own
