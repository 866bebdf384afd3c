"""Commands that change a run: keep, rm, gc, rewind, pin, unpin, distrust, trust.

What deletes or moves a step asks first (`asking`). Each takes --dry-run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import typer
from etils import epath

from ckptmgr import policies as policy
from ckptmgr.cli import asking, facts, places, tables
from ckptmgr.cli.amounts import size
from ckptmgr.cli.base import AsJson, DryRun, Place, Run, Step, Yes, app, fitted, show, warn, writer
from ckptmgr.cli.working import working
from ckptmgr.format import paths
from ckptmgr.manager import CheckpointManager
from ckptmgr.run import journal
from ckptmgr.run.catalog import open_catalog
from ckptmgr.run.directory import BRANCH, KEPT
from ckptmgr.run.history import Decision, History

Policies = Annotated[
    list[str],
    typer.Option(
        "--policy",
        help="latest:N, best:METRIC[:min|max[:N]], every_steps:N, every_seconds:S, or params-only: before one of "
        "these; may be repeated.",
    ),
]

# ---------------------------------------------------------------- deleting


@app.command(epilog="Example: ckptmgr keep runs/digits --policy latest:3 --policy best:loss --dry-run")
def keep(run: Run, policy_: Policies, dry_run: DryRun = False, yes: Yes = False, as_json: AsJson = False) -> None:
    """Deletes the checkpoints that no policy keeps. --dry-run shows which, and why the others stay.

    The newest step and pinned steps always stay. What only params-only policies keep is reduced to its params.
    """
    policies = [policy.parse(each) for each in policy_]
    reader = facts.reader(run)
    facts.check_metrics(reader, policies)
    past = facts.history(reader.directory, policies)
    decision = past.decide_deletions()
    to_delete, to_reduce = sorted(decision.to_delete), sorted(decision.to_reduce)
    found = facts.run(reader, policies)
    found |= {"would_delete": to_delete, "would_reduce": to_reduce, "deleted": [], "reduced": []}
    is_shown = False
    if (to_delete or to_reduce) and not dry_run:
        would = _and(_steps("delete", to_delete, run), _steps("reduce to the params", to_reduce, run))
        is_shown = asking.confirm(would, found, yes=yes, as_json=as_json, render=fitted(tables.plan))
        with writer(run) as manager, working("deleting"):
            found |= {"deleted": _delete(manager, past, decision), "reduced": _reduce(manager, past, decision)}
            found |= {"would_delete": found["deleted"], "would_reduce": found["reduced"]}
    show(found, as_json, tables.changes if is_shown else fitted(tables.plan))


def _steps(what: str, steps: Sequence[int], run: str) -> str:
    named = ", ".join(map(str, steps[:10])) + (f" and {len(steps) - 10} more" if len(steps) > 10 else "")
    return f"{what} step{'s' if len(steps) > 1 else ''} {named} of {run}" if steps else ""


def _and(*parts: str) -> str:
    return " and ".join(filter(None, parts))


def _delete(manager: CheckpointManager, past: History, decision: Decision) -> list[int]:
    """Deletes the steps that a decision says; returns those that were deleted."""
    steps = [step for step in sorted(decision.to_delete) if past.still_holds(decision, step)]
    for step in steps:
        manager.delete(step)
    return steps


def _reduce(manager: CheckpointManager, past: History, decision: Decision) -> list[int]:
    """Reduces the steps that a decision says; returns those that were reduced."""
    catalog, done = open_catalog(manager.directory), []
    told = journal.Journal(manager.directory, time.time, writes=True)
    for step, by in sorted(decision.to_reduce.items()):
        if past.still_holds(decision, step):
            catalog.remove(*catalog.reduce(step, by, time.time()))
            told.record("reduced", step, why=f"only {by} keeps it")
            done.append(step)
    return done


@app.command(epilog="Example: ckptmgr rm runs/digits 100 200 --dry-run")
def rm(
    place: Place,
    steps: Annotated[
        list[int] | None,
        typer.Argument(
            metavar="STEP", help="The numbers of the steps, after RUN.", autocompletion=places.completed_step
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Deletes pinned steps and the newest one too.")] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Deletes steps. Pinned steps and the newest one need --force."""
    run, number = places.one(place, steps[0] if steps else None)
    steps = sorted({number, *(steps or [])[1:]})
    manager = facts.reader(run)
    for step in steps:
        facts.chosen(manager, step)
    if not force:
        _refuse_precious(manager.directory, steps)
    found = {"run": run, "steps": steps, "deleted": False}
    if not dry_run:
        asking.confirm(_steps("delete", steps, run), found, yes=yes, as_json=as_json)
        with writer(run) as manager, working("deleting"):
            for step in steps:
                manager.delete(step)
        found["deleted"] = True
    said = f"{'would be deleted' if dry_run else 'deleted'}: {', '.join(map(str, steps))}"
    show(found, as_json, lambda _: said)


def _refuse_precious(directory: epath.Path, steps: Sequence[int]) -> None:
    catalog = open_catalog(directory)
    newest = catalog.steps()[-1]
    for step in steps:
        why = "pinned" if catalog.is_pinned(step) else "the newest" if step == newest else None
        if why:
            raise ValueError(f"step {step} is {why}, so nothing was deleted; --force deletes it all the same")


@app.command(epilog="Example: ckptmgr gc runs/digits --dry-run, then ckptmgr gc runs/digits --yes")
def gc(
    run: Run,
    damaged: Annotated[bool, typer.Option("--damaged", help="Also damaged checkpoints set aside.")] = False,
    abandoned: Annotated[bool, typer.Option("--abandoned", help="Also steps a rewind has set aside.")] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Removes what interrupted processes have left over."""
    directory = facts.reader(run).directory
    asked_for = {KEPT: damaged, BRANCH: abandoned}
    rows = [each | {"goes": asked_for.get(each["why"], True)} for each in facts.leftovers(directory)]
    found = {"run": str(directory), "leftovers": rows, "removed": False}
    going, is_shown = [row for row in rows if row["goes"]], False
    if going and not dry_run:
        would = f"remove {size(sum(row['nbytes'] for row in going))} that are left over in {run}"
        is_shown = asking.confirm(would, found, yes=yes, as_json=as_json, render=fitted(tables.leftovers))
        with writer(run), working("removing"):  # raises if another process writes; removes leftovers as it opens
            catalog = open_catalog(directory)
            for path, why in catalog.leftovers():
                if asked_for.get(why):
                    catalog.remove(path)
        found["removed"] = True
    show(found, as_json, (lambda _: "removed") if is_shown else fitted(tables.leftovers))


@app.command(epilog="Example: ckptmgr rewind runs/digits@50 --dry-run")
def rewind(
    place: Place,
    step: Step = None,
    mirror: Annotated[
        str | None,
        typer.Option(
            help="The mirror of the run; it is rewound too. Without it a start restores its later steps."
        ),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Lets a run go on from a step: later steps are set aside. A rewind to one of them brings it back."""
    run, number = places.one(place, step)
    directory = facts.reader(run).directory
    if mirror is not None:
        _check_mirror(run, mirror)
    elif (known := journal.mirror(directory)) is not None:
        warn(
            f"{run} has a mirror, which stays as it is: the next start that uses it restores its later steps. "
            f"Give --mirror {known}"
        )
    found = {"run": run, "step": number, **facts.rewinding(directory, mirror, number), "done": False}
    is_change = bool(found["set_aside"] or found["returned"])
    is_shown = False
    if not dry_run and is_change:
        aside = _steps("set aside", found["set_aside"], run)
        would = _and(aside, _steps("bring back", found["returned"], run))
        is_shown = asking.confirm(would, found, yes=yes, as_json=as_json, render=tables.rewound)
    if not dry_run:
        with writer(run, mirror) as manager, working("rewinding"):
            manager.rewind(number)
        found["done"] = True
    show(found, as_json, (lambda _: f"the run goes on from step {number}") if is_shown else tables.rewound)


def _check_mirror(run: str, mirror: str) -> None:
    """A manager makes a mirror that is not there, and fills it: a mistyped one must not come that far."""
    facts.reader(mirror)
    if not paths.is_local(run):
        raise ValueError(f"{run} is in a bucket, and such a run has no mirror")
    if paths.is_local(mirror) and os.path.realpath(paths.resolve(run)) == os.path.realpath(paths.resolve(mirror)):
        raise ValueError(f"the mirror {mirror} is the run itself")


# ---------------------------------------------------------------- marking


def _mark(
    place: str, step: int | None, dry_run: bool, as_json: bool, *,
    key: str, say: str, mark: Callable[[CheckpointManager, int], None], **more: str,
) -> None:  # fmt: skip
    """Marks one step; `key` names it in JSON, and `say` tells a person what it is now."""
    run, number = places.one(place, step)
    facts.chosen(facts.reader(run), number)
    if not dry_run:
        with writer(run) as manager:
            mark(manager, number)
    found = {"run": run, key: number, **more} | ({"dry_run": True} if dry_run else {})
    show(found, as_json, lambda _: f"step {number} {'would be' if dry_run else 'is'} {say}")


@app.command(epilog="Example: ckptmgr pin runs/digits@300")
def pin(place: Place, step: Step = None, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Pins a step: retention does not delete it."""
    _mark(place, step, dry_run, as_json, key="pinned", say="pinned", mark=CheckpointManager.pin)


@app.command(epilog="Example: ckptmgr unpin runs/digits@300")
def unpin(place: Place, step: Step = None, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Unpins a step: retention may delete it again."""
    _mark(place, step, dry_run, as_json, key="unpinned", say="no longer pinned", mark=CheckpointManager.unpin)


@app.command(epilog="Example: ckptmgr distrust runs/digits@300 --why 'the loss is NaN'")
def distrust(
    place: Place,
    step: Step = None,
    why: Annotated[str, typer.Option("--why", help="The reason; it is shown where the step is passed over.")] = "",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Distrusts a step: a restore passes over it, and retention does not count it."""
    places.one(place, step)
    if not why.strip():
        raise ValueError('say why the step is distrusted: --why "the loss is NaN"')
    _mark(
        place, step, dry_run, as_json, key="distrusted", say=f"distrusted: {why}", why=why,
        mark=lambda manager, number: manager.distrust(number, why),
    )  # fmt: skip


@app.command(epilog="Example: ckptmgr trust runs/digits@300")
def trust(place: Place, step: Step = None, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Trusts a step again, also one that was distrusted as it was saved."""
    _mark(place, step, dry_run, as_json, key="trusted", say="trusted", mark=CheckpointManager.trust)
