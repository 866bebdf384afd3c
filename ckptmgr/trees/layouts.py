"""What a caller can give as `layout`, and what a layout says of one leaf."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, NamedTuple, Protocol, TypeAlias

import jax
from jax.sharding import Mesh, PartitionSpec, Sharding

from ckptmgr.specs import Row


class Host:
    """The type of `ckptmgr.HOST`."""

    def __repr__(self) -> str:
        return "ckptmgr.HOST"


HOST: Final = Host()
"""As a layout: numpy arrays, on no device."""

HERE: Final = "the default device"
"""Where `jnp.asarray` would put it: on the default device, and free to be moved by a jitted function."""


class Device(Protocol):
    """A `jax.Device`, which JAX leaves without a type."""

    @property
    def process_index(self) -> int: ...


Placement: TypeAlias = Sharding | PartitionSpec | Device | Host
"""Where one leaf goes. A PartitionSpec is of the mesh of `jax.set_mesh`."""


class Dataclass(Protocol):
    """A pytree that is a dataclass: a module of Equinox, a struct of Flax."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


LayoutFunction: TypeAlias = Callable[[str, jax.ShapeDtypeStruct], Placement | None]
Layout: TypeAlias = (
    Placement | Mesh | LayoutFunction | Mapping[Any, Any] | list[Any] | tuple[Any, ...] | Dataclass | None
)  # fmt: skip
"""Where restored arrays go: one place for all, a Mesh, a function of path and leaf, or a tree of places; None is
where the templates' arrays are."""
Place = Any
"""A Sharding, HERE or HOST; Any, because each user asks a Sharding only after it has ruled out the other two."""


class Target(NamedTuple):
    """Where one leaf goes, and as what."""

    place: Place
    kind: str
    """A `LeafSpec.kind`."""
    dtype: str
    weak: bool = False
    impl: str | None = None


class Wanted(Protocol):
    """An item that is to be restored: its tree, with a row for each leaf."""

    @property
    def item(self) -> str: ...
    @property
    def tree(self) -> Any: ...
    @property
    def order(self) -> Sequence[int]:
        """For each leaf of `tree`, in JAX's order, the place of its row."""

    @property
    def rows(self) -> Sequence[Row]: ...
