"""The branches of a run: which steps a rewind moves, and where to. Pure decisions: no file is touched.

    .ckptmgr/abandoned/<fork>-<time>-<mark>/<step>/

A branch holds the steps that one rewind has set aside. They follow the step `fork`; `mark` tells that checkpoint
from others with its number. `time` is when they were set aside, in nanoseconds since the epoch.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from ckptmgr.format.names import ABANDONED

_NAME = re.compile(r"(?P<fork>0|[1-9][0-9]*)-(?P<time>[0-9]+)-(?P<mark>[0-9a-f]{8})")
_PLACE = re.compile(rf"(?:{re.escape(ABANDONED)}/{_NAME.pattern}/)?(?:0|[1-9][0-9]*)")
Mark = Callable[[str], str]
"""Returns the mark of the checkpoint in a place, which is a path inside of the run."""


@dataclasses.dataclass(frozen=True)
class Branch:
    """Steps that were set aside together, all of them after `fork`."""

    fork: int
    time: int
    mark: str
    steps: frozenset[int] = frozenset()

    @property
    def name(self) -> str:
        return f"{self.fork}-{self.time}-{self.mark}"

    def place(self, step: int) -> str:
        return f"{ABANDONED}/{self.name}/{step}"


def parse(name: str, steps: Iterable[int]) -> Branch | None:
    """The branch that is in a folder with this name; None if no branch has such a name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    fork = int(found["fork"])
    return Branch(fork, int(found["time"]), found["mark"], frozenset(step for step in steps if step > fork))


class Move(NamedTuple):
    """Moves the checkpoint with this mark to another place in the run."""

    source: str
    target: str
    mark: str

    def is_sound(self) -> bool:
        """Whether a rewind moves between such places. (The move comes from a file, which may hold anything.)"""
        return all(isinstance(part, str) for part in self) and all(
            _PLACE.fullmatch(place) for place in (self.source, self.target)
        )


def encode(moves: Sequence[Move]) -> bytes:
    """The content of the file with the moves that a rewind has not made yet."""
    return json.dumps(moves).encode()


def decode(data: bytes) -> list[Move]:
    """The moves in such a file; raises ValueError if no rewind wrote it."""
    try:
        moves = [Move(*each) for each in json.loads(data)]
    except (TypeError, RecursionError) as problem:
        raise ValueError(str(problem)) from problem
    if not all(move.is_sound() for move in moves):
        raise ValueError("it holds moves that no rewind makes")
    return moves


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a rewind does in one directory."""

    base: int
    """The step after which the listed steps are set aside."""
    mark: str
    place: str | None
    """Where the step of the rewind is now; None if it is not in this directory."""
    moves: Sequence[Move]
    set_aside: Sequence[int]
    returned: Sequence[int]


class _Part(NamedTuple):
    """The steps of a branch up to one of them."""

    branch: Branch
    last: int


def plan(step: int, listed: Collection[int], branches: Sequence[Branch], mark: Mark, now: int) -> Plan | None:
    """What moves so that a run goes on from a step; None if the step is neither listed nor in a branch.

    If several checkpoints have the number, the listed one is meant, then the one that was set aside last.
    """
    parts, base, base_mark = _way(step, listed, branches, mark)
    if not parts and base not in listed:
        return None
    returned = {each: part.branch.place(each) for part in parts for each in part.branch.steps if each <= part.last}
    moves = [*_exchange(base, base_mark, listed, returned, now), *_remains(parts, mark, now)]
    place = returned[step] if parts else str(step)
    return Plan(
        base, base_mark, place,
        [Move(source, target, mark(source)) for source, target in moves],
        sorted(each for each in listed if each > base), sorted(returned),
    )  # fmt: skip


def plan_without(base: int, base_mark: str, listed: Collection[int], mark: Mark, now: int) -> Plan:
    """The plan for a directory without the step: the steps listed after `base` are set aside."""
    moves = _exchange(base, base_mark, listed, {}, now)
    aside = sorted(each for each in listed if each > base)
    return Plan(base, base_mark, None, [Move(*move, mark(move[0])) for move in moves], aside, [])


def _way(
    step: int, listed: Collection[int], branches: Sequence[Branch], mark: Mark
) -> tuple[list[_Part], int, str]:
    """The branches from a listed step to this step, and that listed step, which may have been deleted since.

    Each branch follows the step whose mark it has recorded.
    """
    parts: list[_Part] = []
    wanted = ""
    while step not in listed or (wanted and mark(str(step)) != wanted):
        holding = [
            each for each in branches if step in each.steps and (not wanted or mark(each.place(step)) == wanted)
        ]
        if not holding:
            break
        found = max(holding, key=lambda branch: (branch.time, branch.fork))
        parts.insert(0, _Part(found, step))
        step, wanted = found.fork, found.mark  # the fork is below all steps of the branch, so this loop ends
    return parts, step, mark(str(step)) if step in listed else wanted


def _exchange(
    base: int, base_mark: str, listed: Collection[int], returned: Mapping[int, str], now: int
) -> list[tuple[str, str]]:
    """The steps listed after `base` go into a new branch, and `returned` come back.

    The order is such that at each moment the newest step is that of the old listing or that of the new one.
    """
    aside = Branch(base, now, base_mark)
    leaving = {each: (str(each), aside.place(each)) for each in listed if each > base}
    coming = {each: (place, str(each)) for each, place in returned.items()}
    newest_first = max(coming, default=-1) > max(leaving, default=-1)
    order = sorted({*leaving, *coming}, reverse=newest_first)
    return [moves[each] for each in order for moves in (leaving, coming) if each in moves]


def _remains(parts: Sequence[_Part], mark: Mark, now: int) -> list[tuple[str, str]]:
    """The steps of a branch that do not come back form a new branch after the last step that does."""
    found = []
    for branch, last in parts:
        rest = Branch(last, now, mark(branch.place(last)))
        found += [(branch.place(each), rest.place(each)) for each in sorted(branch.steps) if each > last]
    return found
