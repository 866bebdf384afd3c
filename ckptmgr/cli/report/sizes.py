"""The sizes of a checkpoint as a tree: items, modules, leaves. Of a large tree only the large parts are shown."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterable, Sequence

from ckptmgr.cli.report import words
from ckptmgr.format import manifest as manifests
from ckptmgr.results import CheckpointInfo
from ckptmgr.specs import LeafSpec

_MOST_CHILDREN = 40


@dataclasses.dataclass(frozen=True)
class Part:
    """A row of the tree, in the order in which it is read from top to bottom."""

    name: str
    depth: int
    parent: int
    """The place of the part that holds it; -1 for the whole."""
    nbytes: int
    what: str
    """Shape and dtype of a leaf, the number of leaves in a module."""


@dataclasses.dataclass(eq=False)
class _Node:
    name: str
    nbytes: int = 0
    leaves: int = 0
    what: str = ""
    children: dict[str | int, _Node] = dataclasses.field(default_factory=dict)
    shown: list[_Node] = dataclasses.field(default_factory=list)

    def words(self) -> str:
        return self.what or words.count(self.leaves, "leaf", "leaves")


def parts(info: CheckpointInfo, most: int) -> list[Part]:
    """The parts of a checkpoint, at most about so many; the largest modules are looked into first."""
    whole = _tree(info)
    _choose(whole, most)
    return _in_order(whole)


def _tree(info: CheckpointInfo) -> _Node:
    whole = _Node(f"step {info.step}")
    for item, leaves in info.leaves.items():
        for leaf in leaves:
            _add(whole, item, leaf)
    return whole


def _add(whole: _Node, item: str, leaf: LeafSpec) -> None:
    nbytes, node = manifests.leaf_nbytes(leaf), whole
    for key in (None, item, *leaf.keys):
        node = node if key is None else node.children.setdefault(key, _Node(_name(key)))
        node.nbytes += nbytes
        node.leaves += 1
    node.what = str(leaf)


def _choose(whole: _Node, most: int) -> None:
    """Sets `shown`: the children of a module that are shown, as long as there are fewer parts than `most`."""
    order, chosen = itertools.count(), 1
    queue = [(-whole.nbytes, next(order), whole)]
    while queue and chosen < most:
        _, _, node = heapq.heappop(queue)
        node.shown = _largest(map(_shortcut, node.children.values()))
        chosen += len(node.shown)
        for child in node.shown:
            heapq.heappush(queue, (-child.nbytes, next(order), child))


def _shortcut(node: _Node) -> _Node:
    """A module that holds one module alone is shown as one with both names."""
    name = node.name
    while len(node.children) == 1:
        (node,) = node.children.values()
        name = join(name, node.name)
    return dataclasses.replace(node, name=name)


def _name(key: str | int) -> str:
    return f"[{key}]" if isinstance(key, int) else key


def join(module: str, name: str) -> str:
    """The name of a part with that of its module: `layers[0].w`."""
    return f"{module}{name}" if name.startswith("[") else f"{module}.{name}"


def _largest(children: Iterable[_Node]) -> list[_Node]:
    found = sorted(children, key=lambda child: -child.nbytes)
    rest = found[_MOST_CHILDREN:]
    if len(rest) < 2:
        return found
    nbytes, leaves = sum(child.nbytes for child in rest), sum(child.leaves for child in rest)
    return [*found[:_MOST_CHILDREN], _Node(f"{len(rest):,} smaller", nbytes, leaves)]


def _in_order(whole: _Node) -> list[Part]:
    found: list[Part] = []
    waiting = [(whole, 0, -1)]
    while waiting:
        node, depth, parent = waiting.pop()
        waiting += [(child, depth + 1, len(found)) for child in reversed(node.shown)]
        found.append(Part(words.shorten(node.name, 120), depth, parent, node.nbytes, node.words()))
    return found


def total(found: Sequence[Part]) -> int:
    """Bytes of all arrays; the first part is the whole."""
    return found[0].nbytes if found else 0
