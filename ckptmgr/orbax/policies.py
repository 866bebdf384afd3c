"""Adapts Orbax's policies to those of `ckptmgr/policies.py`: when to save, and what to keep."""

from __future__ import annotations

import datetime
import inspect
import math
from collections.abc import Sequence
from typing import Any

import orbax.checkpoint as ocp

from ckptmgr import clock, policies
from ckptmgr.costs import Saving


def adapt_save(given: Any) -> Any:
    """A SaveDecisionPolicy of Orbax becomes a SavePolicy; anything else is returned as it is."""
    decide = getattr(given, "should_save", None)
    is_orbax = callable(decide) and "previous_steps" in inspect.signature(decide).parameters
    if not is_orbax or isinstance(given, type):
        return given
    return _OrbaxSave(given) if _is_without_saving(given) else _OrbaxSaveBesideOthers(given)


def _is_without_saving(given: Any) -> bool:
    """Whether it is known that a policy does not ask whether a save is in progress."""
    if type(given) is ocp.checkpoint_managers.AnySavePolicy:
        return all(map(_is_without_saving, given.policies))
    return type(given) in _WITHOUT_SAVING


_WITHOUT_SAVING = (
    ocp.checkpoint_managers.FixedIntervalPolicy,
    ocp.checkpoint_managers.InitialSavePolicy,
    ocp.checkpoint_managers.PreemptionCheckpointingPolicy,
    ocp.checkpoint_managers.SpecificStepsPolicy,
)


def adapt_keep(given: Any) -> Any:
    """A PreservationPolicy of Orbax becomes a KeepPolicy; anything else is returned as it is."""
    if isinstance(given, policies.params_only):
        return policies.params_only(adapt_keep(given.policy))
    is_orbax = hasattr(given, "should_preserve") and not isinstance(given, type)
    return _OrbaxKeep(given) if is_orbax else given


def _for_orbax(record: policies.Record) -> Any:
    return _PolicyRecord(record.step, _date(record.time), dict(record.metrics))


def _date(seconds: float) -> datetime.datetime:
    """A time as Orbax's policies want it, clipped to what `datetime` can hold."""
    seconds = 0.0 if math.isnan(seconds) else min(max(seconds, -clock.LATEST), clock.LATEST)
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


class _PolicyRecord:
    """The attributes of a checkpoint that Orbax's policies read."""

    def __init__(self, step: int, when: datetime.datetime, metrics: dict[str, float]) -> None:
        self.step = step
        self.time = when
        self.metrics = metrics or None


class _OrbaxSave:
    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __repr__(self) -> str:
        return repr(self._wrapped)

    def should_save(self, step: int, *, now: float, last: policies.Record | None) -> bool:
        return self._ask(step, now, last, in_progress=False)

    def _ask(self, step: int, now: float, last: policies.Record | None, *, in_progress: bool) -> bool:
        this = _PolicyRecord(step, _date(now), {})
        context = ocp.checkpoint_managers.DecisionContext(
            is_saving_in_progress=in_progress,
            reached_preemption=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(),
        )
        previous = [_for_orbax(last)] if last else []
        return bool(self._wrapped.should_save(this, previous, context=context))


class _OrbaxSaveBesideOthers(_OrbaxSave):
    """One that may ask whether a save is in progress."""

    def should_save(
        self, step: int, *, now: float, last: policies.Record | None, saving: Saving | None = None
    ) -> bool:
        return self._ask(step, now, last, in_progress=saving is not None and saving.in_progress)


class _OrbaxKeep:
    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __repr__(self) -> str:
        return repr(self._wrapped)

    def keep(self, history: Sequence[policies.Record]) -> set[int]:
        records = [_for_orbax(record) for record in history]
        context = ocp.checkpoint_managers.PreservationContext()
        verdicts = self._wrapped.should_preserve(records, context=context)
        return {record.step for record, keep in zip(records, verdicts, strict=True) if keep}
