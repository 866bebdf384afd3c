"""Retention: deletes what no policy keeps, in a run or in its mirror. In doubt nothing is deleted."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ckptmgr.run.catalog import Catalog
from ckptmgr.run.history import History

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
    for step in decision.to_delete:
        try:
            if is_spared(step):
                continue
            if history.still_holds(decision, step):
                catalog.delete(step)
                deleted(step)
            else:
                _log.info("step %d is not deleted now, because the directory has changed meanwhile", step)
        except Exception:
            _log.exception("step %d could not be deleted", step)
