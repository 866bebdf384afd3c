"""The steps that the machines of a job hold (`local=`), for a restore: which there are, and their parts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator

from ckptmgr.errors import CheckpointError, CorruptCheckpointError
from ckptmgr.format import manifest as manifests
from ckptmgr.processes.job import Call, Job
from ckptmgr.restoring.planning import Plan
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.nearby import Gathering, Nearby
from ckptmgr.run.tier import Complete

_log = logging.getLogger("ckptmgr")


class LocalSteps:
    """The local steps of a run, as of the last `look`; none without `nearby`."""

    def __init__(self, nearby: Nearby | None, home: Catalog) -> None:
        self._nearby, self._home = nearby, home
        self._found: dict[int, Complete] = {}

    def __str__(self) -> str:
        return str(self._nearby)

    @property
    def steps(self) -> Collection[int]:
        return self._found.keys()

    def look(self) -> None:
        """Looks which steps the machines of the job hold."""
        if self._nearby is not None:
            self._found = {each.group.step: each for each in self._nearby.look(self._counts)}

    def forget(self) -> None:
        """Until the next look there are none."""
        self._found = {}

    def _counts(self, found: Complete) -> bool:
        """Whether a local step is of the branch that the run is on, as far as the newest durable steps tell."""
        with contextlib.suppress(CheckpointError):
            steps, step = self._home.steps(), found.group.step
            if step in steps and self._home.manifest(step).time != found.time:
                return False  # the durable one is of another save
            below = max((each for each in steps if each < step), default=None)
            if below is not None and self._home.manifest(below).time > found.time:
                _log.warning(
                    "local step %d is passed over: by the clock step %d was saved after it, so that the run has "
                    "gone back, or the clock has", step, below
                )  # fmt: skip
                return False
        return True

    @contextlib.contextmanager
    def gathered(self, step: int, job: Job) -> Iterator[Gathering]:
        """What is needed of a step, on this machine; in every process or in none."""
        nearby, found = self._nearby, self._found[step]
        assert nearby is not None
        with contextlib.ExitStack() as closing:

            def gather() -> Gathering:
                with _as_damage(step):
                    return closing.enter_context(contextlib.closing(nearby.gather(found)))

            yield job.together(Call(f"the parts of step {step}"), gather)


@contextlib.contextmanager
def _as_damage(step: int) -> Iterator[None]:
    """Raises what goes wrong with the parts of a local step as damage of that step."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError) as problem:  # a machine that is gone since, or a file
        why = f"local step {step}: a part cannot be fetched: {problem}"
        raise CorruptCheckpointError(why, step=step) from problem


def get_parts(parts: Gathering, manifest: manifests.Manifest, plan: Plan) -> None:
    """Gets the parts of a local step that this process needs."""
    with _as_damage(manifest.step):
        for name, source in plan.sources.items():
            item = manifest.items[name]
            if item.processes > 1:  # each process had its own
                parts.need(name, range(item.processes) if source is None else [source])
            elif item.file and not (parts.folder / name / item.file).exists():
                parts.need(name, [0])
        parts.complete(lambda: plan.trees.missing(parts.folder))
