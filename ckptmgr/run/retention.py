"""Retention: deletes what no policy keeps, in a run or in its mirror. In doubt nothing is deleted.

A step that only `params_only` policies keep loses all items but its params.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection

from etils import epath

from ckptmgr.run.catalog import Catalog
from ckptmgr.run.history import Decision, History

_log = logging.getLogger("ckptmgr")
UNWANTED = "no policy keeps it"


def retain(
    catalog: Catalog,
    history: History,
    is_spared: Callable[[int], bool] = lambda step: False,
    deleted: Callable[[int], object] = lambda step: None,
    reduced: Callable[[int, str], object] = lambda step, by: None,
    now: Callable[[], float] = time.time,
) -> None:
    """Deletes and reduces steps as the policies say, except steps that `is_spared`.

    Calls `deleted` with each deleted step, and `reduced` with each reduced step and the policies that keep it.
    """
    try:
        decision = history.decide_deletions()
    except Exception:  # of every library below: those of buckets have errors of their own
        _log.exception("which steps no policy keeps could not be found out; the next save tries again")
        return
    hidden: list[epath.Path] = []
    for step in _in_sight(catalog, decision):
        by = decision.to_reduce.get(step)
        what = "deleted" if by is None else "reduced to its params"
        try:
            if is_spared(step):
                continue
            if history.still_holds(decision, step):
                if by is None:
                    hidden += _delete(catalog, step)
                    deleted(step)
                else:
                    hidden += catalog.reduce(step, by, now())
                    reduced(step, by)
            else:
                _log.info("step %d is not %s now, because the directory has changed meanwhile", step, what)
        except Exception:
            _log.exception("step %d could not be %s", step, what)
    try:
        catalog.remove(*hidden)
    except Exception:
        _log.exception("the files of deleted steps and items could not be removed; the next start tries again")


def _delete(catalog: Catalog, step: int) -> list[epath.Path]:
    """Deletes a step. In a bucket returns its folder, which is removed with those of the others."""
    if not catalog.can_replace:
        return [catalog.hide(step, UNWANTED)]
    catalog.delete(step, UNWANTED)
    return []


def _in_sight(catalog: Catalog, decision: Decision) -> Collection[int]:
    """The steps to delete, then those to reduce, after another look at the run; none if it fails."""
    steps = [*decision.to_delete, *decision.to_reduce]
    try:
        if steps:
            catalog.look()
    except Exception:
        _log.exception("the run could not be looked at before a deletion; the next save tries again")
        return ()
    return steps
