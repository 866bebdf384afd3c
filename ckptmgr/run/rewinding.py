"""Rewinds: a run and its mirror go on from another step, both or neither."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ckptmgr.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from ckptmgr.run.branches import Plan
from ckptmgr.run.catalog import Catalog

_log = logging.getLogger("ckptmgr")


def plan(catalogs: Sequence[Catalog], step: int) -> list[Plan]:
    """The plan of a rewind for each directory of a run; nothing is moved yet.

    One directory that has the step is enough. Raises CheckpointNotFoundError if none has it, and
    CorruptCheckpointError if it is damaged in each that has it.
    """
    found = [each.plan_rewind(step) for each in catalogs]
    known = next((each for each in found if each is not None), None)
    if known is None:
        raise _not_found(catalogs, step)
    _check_one(catalogs, found, step)
    return [plan or each.plan_rewind_without(known) for each, plan in zip(catalogs, found, strict=True)]


def warn_if_reduced(catalogs: Sequence[Catalog], step: int) -> None:
    """Says it if training cannot be resumed from the step that a run goes on from."""
    try:
        found = [each.manifest(step).reduced for each in catalogs if each.has(step)]
    except (CheckpointError, OSError):  # a mirror that cannot be reached; the rewind is made
        return
    if found and all(found):
        _log.warning(
            "the run goes on from step %d, which was %s: its params can be restored. A restore that asks for "
            "opt_state or extras takes an older step", step, found[0],
        )  # fmt: skip


def _check_one(catalogs: Sequence[Catalog], found: Sequence[Plan | None], step: int) -> None:
    """Raises if the step is whole in none of the directories that have it."""
    problems = []
    for each, plan in zip(catalogs, found, strict=True):
        if plan is not None and plan.place is not None:
            try:
                each.check_whole(step, plan.place)
                return
            except CorruptCheckpointError as problem:
                problems.append(problem)
    raise CorruptCheckpointError(
        f"step {step} is damaged, so the run does not go back to it, and nothing is changed: {problems[0]}",
        step=step, path=problems[0].path,
    )  # fmt: skip


def _not_found(catalogs: Sequence[Catalog], step: int) -> CheckpointNotFoundError:
    listed = sorted({each for catalog in catalogs for each in catalog.steps()})
    aside = sorted({each for catalog in catalogs for branch in catalog.branches() for each in branch.steps})
    directories = " and ".join(str(each.directory) for each in catalogs)
    return CheckpointNotFoundError(
        f"there is no step {step} in {directories}; the steps are {_spell(listed)}, and the steps that were set "
        f"aside are {_spell(aside)}",
        directory=str(catalogs[-1].directory), step=step,
    )  # fmt: skip


def _spell(steps: Sequence[int]) -> str:
    return ("..., " if len(steps) > 10 else "") + ", ".join(map(str, steps[-10:])) if steps else "none"
