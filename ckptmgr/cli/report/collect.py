"""What the report is made of: checkpoints on disk, events of the journal, steps that rewinds have set aside."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ckptmgr import policies
from ckptmgr.errors import CheckpointNotFoundError, CorruptCheckpointError, NewerFormatError
from ckptmgr.manager import CheckpointManager
from ckptmgr.results import CheckpointInfo
from ckptmgr.run import history, journal
from ckptmgr.run.branches import Branch
from ckptmgr.run.catalog import open_catalog

Events = Sequence[Mapping[str, Any]]
Unread = CorruptCheckpointError | NewerFormatError
_NUMBERS = ("nbytes", "disk_nbytes", "blocked_s", "durable_s", "interval_s")
_STEPS = ("set_aside", "returned")


@dataclasses.dataclass(frozen=True)
class Save:
    """A step that was saved, and what became known of it. The step may have been deleted since."""

    step: int
    time: float
    """When `save` was called, in seconds since the epoch."""
    metrics: Mapping[str, float]
    distrusted: str | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """All that the report shows."""

    name: str
    directory: str
    keep: Sequence[policies.KeepPolicy]
    events: Events
    infos: Sequence[CheckpointInfo]
    unread: Mapping[int, Unread]
    branches: Sequence[Branch]

    def of(self, *kinds: str) -> list[Mapping[str, Any]]:
        """The events of these kinds, in the order of the journal."""
        return [event for event in self.events if event["event"] in kinds]

    def damaged(self) -> list[int]:
        return [step for step, problem in self.unread.items() if not isinstance(problem, NewerFormatError)]


def collect(manager: CheckpointManager) -> Run:
    """Reads a run, which may be written to meanwhile."""
    keep = journal.policies(manager.directory)
    infos, unread = survey(manager, keep)
    return Run(
        name=manager.directory.name,
        directory=str(manager.directory),
        keep=keep or (),
        events=[sound for event in journal.read(manager.directory) if (sound := _sound(event)) is not None],
        infos=infos,
        unread=unread,
        branches=[branch for branch in open_catalog(manager.directory).branches() if branch.steps],
    )


def survey(
    manager: CheckpointManager, keep: Sequence[policies.KeepPolicy] | None
) -> tuple[list[CheckpointInfo], dict[int, Unread]]:
    """The checkpoints on disk with why `keep` keeps each; and the errors of those that cannot be read.

    A step that is deleted while it is read may look damaged or incomplete: what is no longer there is left out.
    """
    infos = history.History(open_catalog(manager.directory), keep or ()).all()
    unread: dict[int, Unread] = {}
    here = set(manager.steps())
    for step in sorted(here - {info.step for info in infos}):
        try:
            manager.info(step)
        except (CorruptCheckpointError, NewerFormatError) as problem:
            unread[step] = problem
        except CheckpointNotFoundError:
            continue  # deleted concurrently
    here = set(manager.steps()) if unread else here
    return [info for info in infos if info.step in here], {
        step: problem for step, problem in unread.items() if step in here
    }


def _sound(event: Mapping[str, Any]) -> dict[str, Any] | None:
    """An event with only such fields as have the right type; None if its time is no time."""
    if not _is_number(event["time"]):
        return None
    found: dict[str, Any] = {name: event[name] for name in ("event", "step", "time")}
    found |= {name: float(event[name]) for name in _NUMBERS if _is_number(event.get(name))}
    found |= {name: event[name] for name in ("why", "source") if isinstance(event.get(name), str)}
    for name in _STEPS:
        steps = event.get(name)
        found[name] = [each for each in steps if isinstance(each, int)] if isinstance(steps, list) else []
    metrics = event.get("metrics")
    found["metrics"] = _numbers(metrics) if isinstance(metrics, dict) else {}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if _is_number(value) or _is_not_finite(value)}


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def saves(run: Run) -> tuple[list[Save], list[Save]]:
    """Every step that is known to have been saved, the newest save of each; and those left behind by a rewind."""
    line: dict[int, Save] = {}
    aside: dict[int, Save] = {}
    for event in run.events:
        step = event["step"]
        if event["event"] == "saved":
            line[step] = Save(step, event["time"] - event.get("durable_s", 0.0), event["metrics"])
        elif event["event"] in ("distrusted", "trusted") and step in line:
            why = event.get("why", "no reason is given") if event["event"] == "distrusted" else None
            line[step] = dataclasses.replace(line[step], distrusted=why)
        elif event["event"] == "rewound":
            aside |= {each: line.pop(each) for each in sorted(line) if each > step}
            line |= {each: aside.pop(each) for each in event["returned"] if each in aside}
    for info in run.infos:
        line[info.step] = Save(info.step, info.time, _numbers(info.metrics), info.distrusted)
    return [line[step] for step in sorted(line)], [aside[step] for step in sorted(aside)]


def ranked_by(run: Run) -> dict[str, str]:
    """The metrics by which a policy ranks the steps, and whether "min" or "max" is best."""
    kept_by = [each.policy if isinstance(each, policies.params_only) else each for each in run.keep]
    return {each.metric: each.mode for each in kept_by if isinstance(each, policies.best)}
