"""Retention: deletes what no policy keeps, in a run or in its mirror. In doubt nothing is deleted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from etils import epath

from ckptmgr.run.catalog import Catalog
from ckptmgr.run.history import Decision, History

_log = logging.getLogger("ckptmgr")


def retain(
    catalog: Catalog,
    history: History,
    is_spared: Callable[[int], bool] = lambda step: False,
    deleted: Callable[[int], object] = lambda step: None,
) -> None:
    """Deletes what no policy keeps, except steps that `is_spared`; calls `deleted` with each deleted step."""
    try:
        decision = history.decide_deletions()
    except Exception:  # of every library below: those of buckets have errors of their own
        _log.exception("which steps no policy keeps could not be found out; the next save tries again")
        return
    hidden: list[epath.Path] = []
    for step in _in_sight(catalog, decision):
        try:
            if is_spared(step):
                continue
            if history.still_holds(decision, step):
                hidden += _delete(catalog, step)
                deleted(step)
            else:
                _log.info("step %d is not deleted now, because the directory has changed meanwhile", step)
        except Exception:
            _log.exception("step %d could not be deleted", step)
    try:
        catalog.remove(*hidden)
    except Exception:
        _log.exception("the files of deleted steps could not be removed; the next start tries again")


def _delete(catalog: Catalog, step: int) -> list[epath.Path]:
    """Deletes a step. In a bucket returns its folder, which is removed with those of the others."""
    if not catalog.can_replace:
        return [catalog.hide(step)]
    catalog.delete(step)
    return []


def _in_sight(catalog: Catalog, decision: Decision) -> Collection[int]:
    """The steps to delete, after another look at the run; none if it fails."""
    try:
        if decision.to_delete:
            catalog.look()
    except Exception:
        _log.exception("the run could not be looked at before a deletion; the next save tries again")
        return ()
    return decision.to_delete
