"""Where each restored leaf goes. Never to the saved sharding by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax

from ckptmgr.errors import LayoutError
from ckptmgr.structure import LeafSpec, Row


class _Host:
    def __repr__(self) -> str:
        return "ckptmgr.HOST"


HOST: Final = _Host()
"""As a layout: numpy arrays, on no device."""

HERE: Final = "the default device"
"""Where `jnp.asarray` would put it: on the default device, and free to be moved by a jitted function."""

Layout = Any


class Target(NamedTuple):
    """Where one leaf goes, and as what."""

    place: Any
    """A Sharding, HERE, or HOST."""
    kind: str
    """A `LeafSpec.kind`."""
    dtype: str
    weak: bool = False
    impl: str | None = None


def check(layout: Layout) -> Layout:
    """Refuses a value that is no layout, before anything is looked up on disk."""
    known = (jax.sharding.Sharding, jax.Device, _Host)
    if layout is not None and not isinstance(layout, known):
        raise TypeError(f"layout takes None, a Sharding, a Device or ckptmgr.HOST, not {layout!r}")
    return layout


def targets(item: str, rows: Sequence[Row], layout: Layout) -> list[Target]:
    """The target of every row that is read; raises LayoutError before anything is."""
    return [_target(f"{item}{row.wants.path}", row, layout) for row in rows if row.saved is not None]


def _target(leaf: str, row: Row, layout: Layout) -> Target:
    wants, impl = row.wants, row.saved.impl if row.saved else row.wants.impl
    place = _place(row.given, wants, layout)
    kind = "numpy" if place is HOST and wants.kind == "jax" else wants.kind
    if kind == "jax":
        _check_dtype(leaf, wants.dtype)
    if isinstance(place, jax.sharding.Sharding):
        _check_fits(leaf, wants.shape, place)
    return Target(place, kind, wants.dtype, wants.weak, impl)


def _place(template: Any, wants: LeafSpec, layout: Layout) -> Any:
    if wants.kind not in ("jax", "key") or layout is HOST:
        return HOST
    if isinstance(layout, jax.sharding.Sharding):
        return layout
    if isinstance(layout, jax.Device):
        return jax.sharding.SingleDeviceSharding(layout)
    if isinstance(template, jax.Array) and not template.committed:
        return HERE
    return getattr(template, "sharding", None) or HERE


def _check_fits(leaf: str, shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> None:
    try:
        sharding.shard_shape(shape)
    except (ValueError, IndexError) as problem:  # JAX indexes past the axes of a spec that is too long
        raise LayoutError(f"{leaf} of shape {shape} does not fit {sharding}: {problem}", leaf=leaf) from None


def _check_dtype(leaf: str, dtype: str) -> None:
    made = jax.dtypes.canonicalize_dtype(dtype).name
    if made != dtype:
        raise LayoutError(
            f"{leaf} is {dtype}, which JAX would make {made} on a device: set jax_enable_x64, give a "
            f"template of {made} with cast=True, or restore with layout=ckptmgr.HOST",
            leaf=leaf,
        )
