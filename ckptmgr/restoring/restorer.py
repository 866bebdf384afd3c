"""Restoring: the same step in every process, the newest good one, from the mirror if need be."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import time
from collections.abc import Mapping
from typing import Any

import jax

from ckptmgr.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointTimeoutError,
    CorruptCheckpointError,
    DistrustedError,
    ReducedCheckpointError,
)
from ckptmgr.format import manifest as manifests
from ckptmgr.format import paths, recorded
from ckptmgr.processes import job
from ckptmgr.processes.job import Call, Job
from ckptmgr.restoring import matching, reading
from ckptmgr.restoring.local_steps import LocalSteps, get_parts
from ckptmgr.restoring.matching import Request, nothing_whole
from ckptmgr.restoring.planning import Plan, Planner
from ckptmgr.results import Checkpoint
from ckptmgr.run import journal
from ckptmgr.run import values as saved
from ckptmgr.run.catalog import Catalog, open_catalog
from ckptmgr.run.history import History
from ckptmgr.run.manifest_cache import Stamp
from ckptmgr.run.mirror import Mirror
from ckptmgr.run.nearby import Gathering, Nearby
from ckptmgr.specs import StructureDiff
from ckptmgr.trees import iterators
from ckptmgr.trees import placement as layouts
from ckptmgr.trees.layouts import HOST
from ckptmgr.trees.meshes import sharding_of
from ckptmgr.trees.structure import abstract
from ckptmgr.units import format_bytes, format_rate, format_s

_log = logging.getLogger("ckptmgr")
_PATIENCE_S, _PAUSE_S = 30.0, 0.02  # a network's file system may show a new step late
Skipped = Mapping[int, str]
_CHOICE = Call("the choice of a step to restore")


class Restorer:
    """Restores the steps of a run; what one process cannot restore, none does."""

    def __init__(
        self,
        home: Catalog,
        history: History,
        mirror: Mirror | None,
        job: Job,
        journal: journal.Journal,
        timeout_s: float,
        max_host_bytes: int | None = None,
        nearby: Nearby | None = None,
    ) -> None:
        self._home, self._history, self._mirror = home, history, mirror
        self._of_run, self._journal, self._timeout_s = job, journal, timeout_s
        self._job = job
        self._planner = Planner(max_host_bytes)
        self._local = LocalSteps(nearby, home)

    def among(self, request: Request) -> Restorer:
        """The same, agreeing with the processes that have to restore the same step.

        A run opened for writing is open in all processes, and they agree on every restore. A reader may be open
        in one alone; it agrees with the others if what it restores is spread over several processes.
        """
        if self._of_run.count == jax.process_count() or not (request.broadcast or self._spans_processes(request)):
            return self
        joined = copy.copy(self)
        joined._job = job.shared("readers", self._timeout_s)
        return joined

    def _spans_processes(self, request: Request) -> bool:
        given = (request.params, request.opt_state, list(request.extras.values()), request.layout)
        places = [sharding_of(leaf, leaf) for leaf in jax.tree_util.tree_leaves(given)]
        if callable(request.layout) and (step := max(self._steps(), default=None)) is not None:
            places += self._places_by(request.layout, step)
        return layouts.span_processes(places)

    def _places_by(self, layout: Any, step: int) -> list[Any]:
        """Where a callable puts the parameters of a step."""
        try:
            params = self._home.manifest(step).items[manifests.PARAMS].tree.leaves
            return [layout(leaf.path, abstract(leaf)) for leaf in params if leaf.kind in ("jax", "key")]
        except Exception:  # whatever it is, restoring meets it too, and says so
            return []

    # ------------------------------------------------------------ which step

    def has_steps(self) -> bool:
        """Whether there is anything to restore, as process 0 sees it."""
        self._local.look()
        return self._job.decide(_CHOICE, lambda: bool(self._steps() or self._local.steps))

    def best(self, request: Request) -> Checkpoint:
        """The step that the policies rank first, here and in the mirror."""
        number = self._job.decide(_CHOICE, self._best)
        self._local.forget()
        if number is None:
            raise self._home.nothing_good({}, "no checkpoint has the metric that ranks them, or all are NaN")
        return self._restore(number, request)

    def _best(self) -> int | None:
        away = self._mirror.infos(needed=not self._home.steps()) if self._mirror is not None else []
        return self._history.best(None, "min", beside=away)

    def one(self, step: int, request: Request) -> Checkpoint:
        """This step and no other."""
        self._local.look()
        return self._restore(self._job.decide(_CHOICE, lambda: step), request)

    def newest(self, request: Request) -> Checkpoint:
        """The newest good step; those passed over count as if they were not there any more.

        A step that was reduced to its params, and lacks what is asked for, is passed over too.
        """
        skipped: dict[int, str] = {}
        distrusted: dict[int, str] = {}
        reduced: list[ReducedCheckpointError] = []
        seen: dict[int, Stamp] = {}
        ends = time.monotonic() + min(_PATIENCE_S, self._timeout_s / 2)
        self._local.look()
        while (choice := self._newest_beside(skipped)) is not None:
            candidate, why = choice
            stamp = self._home.stamp(candidate)
            try:
                if why is not None:
                    raise DistrustedError(why, step=candidate)
                found = self._restore(candidate, request, skipped)
            except CorruptCheckpointError as problem:
                _log.warning("step %d is passed over as damaged: %s", candidate, problem)
                self._journal.record("passed over", candidate, why=str(problem))
                if stamp is not None:  # else it is a step of the mirror, or of `local`, alone
                    seen[candidate] = stamp
                skipped[candidate] = str(problem)
            except DistrustedError as problem:
                _log.warning("step %d is passed over, because it is distrusted: %s", candidate, problem)
                self._journal.record("passed over", candidate, why=f"distrusted: {problem}")
                distrusted[candidate] = str(problem)
                skipped[candidate] = f"distrusted: {problem}"
            except ReducedCheckpointError as problem:
                _log.warning("step %d is passed over: %s", candidate, problem)
                skipped |= {candidate: str(problem)}
                reduced.append(problem)
            except CheckpointNotFoundError as problem:  # the trainer has deleted it meanwhile, and has a newer one
                still_listed = functools.partial(self._refuse_if_listed, candidate, ends, str(problem))
                self._job.decide(_CHOICE, still_listed)
            else:
                self._home.mark_damaged(seen)
                self._warn_of_lower(candidate)
                if found.info and found.info.reduced and not request.has_template():
                    _log.warning("step %d was %s: it is restored without the rest", candidate, found.info.reduced)
                return found
        if reduced:
            raise nothing_whole(reduced[0])
        damaged = {step: why for step, why in skipped.items() if step not in distrusted}
        raise self._home.nothing_good(damaged, distrusted=distrusted)

    def _warn_of_lower(self, step: int) -> None:
        """Says it if the step that was saved last is not the newest: somebody went back, and did not say so."""
        looks = self._job.leads and step not in self._local.steps
        saved = journal.last_saved(self._home.directory) if looks else None
        if saved is not None and saved < step and self._home.has(saved) and self._is_older(step, saved):
            _log.warning(
                "step %d is restored, which has the highest number, and step %d was saved after it. If the run is "
                "to go on from step %d, call manager.rewind(%d) and restore again", step, saved, saved, saved
            )  # fmt: skip

    def _is_older(self, step: int, other: int) -> bool:
        """Whether a step was saved before another. A killed process may not have recorded its last."""
        with contextlib.suppress(CheckpointError):
            return self._home.manifest(step).time < self._home.manifest(other).time
        return False

    def _refuse_if_listed(self, step: int, ends: float, problem: str) -> None:
        """Raises if process 0 still lists a step that another does not find."""
        if step in self._steps() and time.monotonic() > ends:
            raise CheckpointNotFoundError(
                f"step {step} is listed in {self._home.directory} and not found: {problem}. If several processes "
                "restore, all of them need one directory that is shared",
                directory=str(self._home.directory), step=step,
            )  # fmt: skip
        time.sleep(_PAUSE_S)

    def _newest_beside(self, skipped: Skipped) -> tuple[int, str | None] | None:
        """The newest step beside these, and why it is distrusted. One process alone sees that as it reads."""

        def choose() -> tuple[int, str | None] | None:
            step = max((self._steps() | set(self._local.steps)) - set(skipped), default=None)
            return None if step is None else (step, self._why_distrusted(step) if self._job.count > 1 else None)

        return self._job.decide(_CHOICE, choose)

    def _why_distrusted(self, step: int) -> str | None:
        for catalog in (self._home, *([self._mirror.catalog] if self._mirror is not None else [])):
            with contextlib.suppress(CheckpointError):  # it is not here, or damaged, which the restore finds
                return catalog.why_distrusted(step)
        return None

    def _steps(self) -> set[int]:
        """The steps here and in the mirror; one that cannot be reached is missed if there is nothing here."""
        here = set(self._home.steps())
        return here if self._mirror is None else here | set(self._mirror.steps(needed=not here))

    # ------------------------------------------------------------ from where

    def _restore(self, step: int, request: Request, skipped: Skipped | None = None) -> Checkpoint:
        """Restores a step in every process, or in none; from the mirror if it is damaged, reduced or not here.

        `skipped`: newer steps that were passed over, and why; None if the caller has asked for this step.
        """
        if step in self._local.steps:
            try:
                return self._from_local(step, request, skipped)
            except CorruptCheckpointError as problem:
                if not self._job.decide(_CHOICE, lambda: step in self._steps()):
                    raise
                _log.warning("step %d is not taken from %s: %s", step, self._local, problem)
        stamp = self._home.stamp(step)
        try:
            return self._together(self._home, step, request, skipped)
        except (CorruptCheckpointError, CheckpointNotFoundError, ReducedCheckpointError) as problem:
            mirror = self._mirror
            if mirror is None or not self._job.decide(_CHOICE, lambda: step in mirror.steps(needed=False)):
                raise
            _log.warning("step %d is taken from %s: %s", step, mirror.catalog.directory, problem)
            found = self._together(mirror.catalog, step, request, skipped)
            if isinstance(problem, CorruptCheckpointError):
                self._home.mark_damaged({step: stamp})
            return found

    def _together(self, home: Catalog, step: int, request: Request, skipped: Skipped | None) -> Checkpoint:
        call = Call(f"the restore from step {step}")
        return self._handed_over(
            request, self._job.together(call, lambda: self._whole(home, step, request, skipped))
        )

    def _from_local(self, step: int, request: Request, skipped: Skipped | None) -> Checkpoint:
        """Restores a step from the parts on the machines of the job."""
        with self._local.gathered(step, self._job) as parts:
            home, call = open_catalog(parts.run), Call(f"the restore of step {step}")
            return self._handed_over(
                request, self._job.together(call, lambda: self._read(home, step, request, skipped, parts))
            )

    def _handed_over(self, request: Request, found: Checkpoint) -> Checkpoint:
        """With the caller's own iterators, set to their states: only now, as all processes have read this step."""
        states = {
            name: found.extras[name]
            for name, template in request.extras.items()
            if iterators.is_iterator(template) and found.extras.get(name, template) is not template
        }

        def set_all() -> None:
            for name, state in states.items():
                request.extras[name].set_state(state)

        if states:
            self._job.together(Call(f"the iterators of step {found.step}"), set_all)
        return dataclasses.replace(
            found, extras={**found.extras, **{name: request.extras[name] for name in states}}
        )

    # ------------------------------------------------------------ reading it

    def _whole(self, home: Catalog, step: int, request: Request, skipped: Skipped | None) -> Checkpoint:
        """Reads a step; once more if a writer put another in its place meanwhile: no mixture of the two."""
        home.expect(step)
        ends, is_reduced = time.monotonic() + self._timeout_s, False
        while time.monotonic() < ends:
            identity = home.identity(step)
            try:
                found = self._read(home, step, request, skipped)
            except (CorruptCheckpointError, OSError):
                home.require(step)  # says that it was deleted
                is_replaced = home.identity(step) != identity
                is_reduced = identity is None and not is_reduced and _is_reduced(home, step)  # in a bucket
                if request.broadcast or not (is_replaced or is_reduced):  # then all read, or none
                    raise
                continue
            if home.identity(step) in (identity, None):
                return found
            if request.broadcast:
                raise CheckpointTimeoutError(
                    f"step {step} was replaced while several processes read it", waiting_for=f"step {step}"
                )
        waiting_for = f"a moment to read step {step} in which no writer replaces it"
        raise CheckpointTimeoutError(f"no {waiting_for} in {self._timeout_s} s", waiting_for=waiting_for)

    def _others(self, call: Call, step: int) -> reading.Others:
        """How all processes read a step together."""
        sending = Call(f"the sending of what was read from step {step}")
        return reading.Others(
            functools.partial(self._job.together, call), functools.partial(self._job.program, sending)
        )

    def _check_trust(self, home: Catalog, manifest: manifests.Manifest, *, is_asked_for: bool) -> None:
        """Raises DistrustedError for a distrusted step; one that was asked for is restored with a warning."""
        noted = self._home if self._home.trust_note(manifest.step) is not None else home
        why = noted.why_distrusted(manifest.step, manifest)
        if why is not None and not is_asked_for:
            raise DistrustedError(why, step=manifest.step)
        if why is not None:
            _log.warning("step %d is restored as it was asked for, but it is distrusted: %s", manifest.step, why)

    def _read(
        self, home: Catalog, step: int, request: Request, skipped: Skipped | None, parts: Gathering | None = None
    ) -> Checkpoint:
        began, directory, call = time.perf_counter(), home.path(step), Call(f"the reading from step {step}")
        others = self._others(call, step) if request.broadcast else None

        def open_trees() -> tuple[manifests.Manifest, Mapping[str, Any], Plan, reading.Trees]:
            manifest = home.manifest(step, fresh=True)
            if self._job.leads:  # what the others have seen of the run may be older
                self._check_trust(home, manifest, is_asked_for=skipped is None)
            templates = request.templates(manifest)
            plan = self._planner.plan(manifest, templates, request, is_local=paths.is_local(directory))
            if parts is not None:
                get_parts(parts, manifest, plan)
            items, share = {*templates, manifests.STEP, manifests.METRICS}, (self._job.index, self._job.count)
            recorded.check_files(manifest, directory, items, share=share)
            trees = reading.Trees(plan.trees, plan.structures, step, directory, others, request.on_progress)
            trees.fetch()
            return manifest, templates, plan, trees

        with reading.reported(directory):
            if request.broadcast:  # nothing is sent before all have read their part
                manifest, templates, plan, trees = self._job.together(call, open_trees)
            else:
                manifest, templates, plan, trees = open_trees()
            with self._job.working() if request.broadcast else contextlib.nullcontext():
                values = trees.place()
            values |= saved.read_values(manifest, directory, plan.sources)
            trees.end()
        passed = plan.passed
        if request.optimizer is not None and passed.missing:
            values[manifests.OPT_STATE] = _with_new_state(request, values)
        _warn_of_partial(step, passed)
        absent = {name: template for name, template in templates.items() if name not in values}  # partial=True
        source = str(home.directory) if parts is None else parts.source
        _tell(step, source, trees, time.perf_counter() - began)
        self._journal.record("restored", step, source=source)
        return Checkpoint(
            step=step,
            params=values.pop(manifests.PARAMS, None),
            opt_state=values.pop(manifests.OPT_STATE, None),
            extras=absent | values,
            metrics=manifest.metrics,
            info=dataclasses.replace(self._history.glance(manifest), source=source),
            skipped=skipped or {},
            missing=tuple(leaf.path for leaf in passed.missing),
            unused=tuple(leaf.path for leaf in passed.unexpected),
        )


def _is_reduced(home: Catalog, step: int) -> bool:
    """Whether a step has been reduced to its params, as its manifest says now."""
    with contextlib.suppress(CheckpointError):
        return home.manifest(step, fresh=True).reduced is not None
    return False


def _with_new_state(request: Request, values: Mapping[str, Any]) -> Any:
    """The opt_state, where the checkpoint lacks a leaf with that of a new state of these params."""
    new = first_state(request.optimizer, values[manifests.PARAMS])
    new = jax.device_get(new) if request.layout is HOST else new
    return jax.tree.map(
        lambda kept, made: made if isinstance(kept, jax.ShapeDtypeStruct) else kept,
        values[manifests.OPT_STATE],
        new,
    )


def first_state(optimizer: Any, params: Any) -> Any:
    """The opt_state that a run starts with; of an abstract params template an abstract one."""
    if params is None:
        raise ValueError("optimizer needs params to start its state from, and there are none: give params= too")
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        return matching.abstract_state(optimizer, params)
    return matching.new_state(optimizer, params)


def _tell(step: int, source: str, trees: reading.Trees, seconds: float) -> None:
    if _log.isEnabledFor(logging.INFO):  # if not, the bytes of thousands of leaves are not counted
        nbytes = trees.nbytes
        speed = format_rate(nbytes, seconds)
        _log.info(
            "step %d restored from %s: %s in %s (%s)", step, source, format_bytes(nbytes), format_s(seconds), speed
        )


def _warn_of_partial(step: int, passed: StructureDiff) -> None:
    """Says what `partial` kept and what it did not read: a wrong name in a template looks the same."""
    for what, leaves in (("lacks, and the template's values are kept", passed.missing),
                         ("has and no template asks for", passed.unexpected)):  # fmt: skip
        if leaves:
            shown = ", ".join(leaf.path for leaf in leaves[:3])
            more = ", ..." if len(leaves) > 3 else ""
            _log.warning("partial=True: %d leaves that step %d %s: %s%s", len(leaves), step, what, shown, more)
