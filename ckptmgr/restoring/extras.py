"""Extras on their way out: which process's value is wanted, and what fits it."""

from __future__ import annotations

from typing import Any

import jax

from ckptmgr.errors import LayoutError
from ckptmgr.format.manifest import Item
from ckptmgr.trees import iterators
from ckptmgr.trees.layouts import HOST


def source(name: str, item: Item, template: Any, layout: Any) -> int | None:
    """The process whose state of an item is restored; None for those of all, as a list."""
    if item.processes == 1 or iterators.is_global(template):
        return 0
    if layout is HOST and not iterators.is_iterator(template):
        return None
    if item.processes == jax.process_count():
        return jax.process_index()
    raise LayoutError(
        f"{name} was saved by {item.processes} processes, each with its own, and this job has "
        f"{jax.process_count()}: give an object with `is_global = True`, or take all with layout=ckptmgr.HOST",
        leaf=name,
    )


def state_of(template: Any) -> Any:
    """The template of an extra's arrays: that of an iterator is the state it has now."""
    return template.get_state() if iterators.is_iterator(template) else template
