"""The commands.

A new command: its values in `facts`, its looks in `tables`, a row in `docs/cli.md`.

Exit codes: 0 all is well, 1 damage or a difference was found, 2 wrong arguments or nothing there, 3 it failed.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from etils import epath
from rich.console import Console, RenderableType

from ckptmgr import interop
from ckptmgr import policies as policy
from ckptmgr.cli import doctor as doctors
from ckptmgr.cli import facts, report, tables
from ckptmgr.cli.working import working
from ckptmgr.errors import CheckpointError, CheckpointNotFoundError
from ckptmgr.manager import CheckpointManager
from ckptmgr.run import journal
from ckptmgr.run.catalog import open_catalog
from ckptmgr.run.directory import BRANCH, KEPT
from ckptmgr.run.history import Decision, History
from ckptmgr.trees.layouts import HOST

app = typer.Typer(
    name="ckptmgr",
    help="Shows, compares, verifies, keeps, imports and exports checkpoints of JAX training.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    epilog="RUN is a directory of checkpoints, also gs:// or s3://. Exit codes: 0 all is well; 1 damage or a "
    "difference was found; 2 wrong arguments, or nothing there; 3 it failed.",
)
_console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())

Run = Annotated[str, typer.Argument(metavar="RUN", help="The directory of a run.")]
Place = Annotated[str, typer.Argument(metavar="RUN@STEP", help="RUN@STEP or RUN/STEP; or RUN, then STEP.")]
Step = Annotated[int | None, typer.Argument(metavar="STEP", help="The number of a step, after RUN.")]
AnyPlace = Annotated[
    str, typer.Argument(metavar="RUN[@STEP]", help="RUN@STEP or RUN/STEP; or RUN, then STEP. Default: the newest.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Prints JSON instead of a table.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Shows what would be done, and changes nothing.")]
Policies = Annotated[
    list[str],
    typer.Option(
        "--policy",
        help="latest:N, best:METRIC[:min|max[:N]], every_steps:N, every_seconds:S, or params-only: before one of "
        "these; may be repeated.",
    ),
]


def run() -> None:
    """Runs the command line. An error is printed as one line, or as JSON with --json."""
    try:
        app()
    except CheckpointNotFoundError as problem:
        _fail(problem, 2)
    except (ValueError, TypeError, ImportError) as problem:
        _fail(problem, 2)
    except (CheckpointError, OSError) as problem:
        _fail(problem, 3)


def _fail(problem: Exception, code: int) -> None:
    if "--json" in sys.argv:
        print(json.dumps({"error": type(problem).__name__, "message": str(problem)}))
    else:
        Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(f"ckptmgr: {problem}")
    sys.exit(code)


def _show(found: Any, as_json: bool, render: Callable[[Any], RenderableType]) -> None:
    if as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        _console.print(render(found))


@contextlib.contextmanager
def _writer(run: str) -> Iterator[CheckpointManager]:
    facts.reader(run)  # raises if there is no run: none is made
    with CheckpointManager(run) as manager:
        yield manager


# ---------------------------------------------------------------- looking


@app.command(epilog="Example: ckptmgr ls runs/digits")
def ls(run: Run, as_json: AsJson = False) -> None:
    """Lists the checkpoints of a run. Shows step, age, size, metrics, and why each is kept."""
    _show(facts.run(facts.reader(run)), as_json, tables.run)


@app.command(epilog="Example: ckptmgr show runs/digits@300")
def show(place: AnyPlace, step: Step = None, as_json: AsJson = False) -> None:
    """Shows one checkpoint as a tree: shapes, dtypes, shardings, bytes."""
    run, step = facts.named(place, step)
    manager = facts.reader(run)
    _show(facts.checkpoint(manager, facts.chosen(manager, step)), as_json, tables.checkpoint)


@app.command(epilog="Example: ckptmgr diff runs/digits@100 runs/digits@300 --values")
def diff(
    places: Annotated[
        list[str],
        typer.Argument(metavar="A B", help="Each RUN@STEP or RUN/STEP; or RUN, then STEP. Default: the newest."),
    ],
    values: Annotated[bool, typer.Option("--values", help="Shows the largest change of each leaf.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compares two checkpoints. Exits with 1 if they differ."""
    managers = [(facts.reader(run), step) for run, step in facts.two(places)]
    a, b = ((manager, facts.chosen(manager, step)) for manager, step in managers)
    with working("comparing"):
        found = facts.difference(a, b, values)
    _show(found, as_json, tables.difference)
    raise typer.Exit(0 if found["equal"] else 1)


@app.command(epilog="Example: ckptmgr verify runs/digits --all")
def verify(
    place: AnyPlace,
    step: Step = None,
    every: Annotated[bool, typer.Option("--all", help="Verifies every step.")] = False,
    as_json: AsJson = False,
) -> None:
    """Reads every file and every array of a checkpoint. Exits with 1 if there is damage."""
    run, step = facts.named(place, step)
    manager = facts.reader(run)
    chosen = manager.steps() if every else [facts.chosen(manager, step)]
    reports = []
    for number in chosen:
        with working(f"step {number}") as on_progress:
            reports.append(manager.verify(number, on_progress=on_progress))
    _show([facts.verified(each) for each in reports], as_json, tables.verified)
    raise typer.Exit(0 if all(reports) else 1)


@app.command(epilog="Example: ckptmgr keep runs/digits --policy latest:3 --policy best:loss --dry-run")
def keep(run: Run, policy_: Policies, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Deletes the checkpoints that no policy keeps. --dry-run shows which, and why the others stay.

    What only params-only policies keep is reduced to its params.
    """
    policies = [policy.parse(each) for each in policy_]
    reader = facts.reader(run)
    found, past = facts.run(reader, policies), facts.history(reader.directory, policies)
    decision = past.decide_deletions()
    to_delete, to_reduce = sorted(decision.to_delete), sorted(decision.to_reduce)
    if (to_delete or to_reduce) and not dry_run:
        with _writer(run) as manager:
            to_delete = [step for step in to_delete if past.still_holds(decision, step)]
            for step in to_delete:
                manager.delete(step)
            to_reduce = _reduce(manager.directory, past, decision)
    told = {"would_delete": to_delete, "would_reduce": to_reduce}
    told |= {"deleted": [] if dry_run else to_delete, "reduced": [] if dry_run else to_reduce}
    _show(found | told, as_json, tables.kept)


def _reduce(directory: epath.Path, past: History, decision: Decision) -> list[int]:
    """Reduces the steps that a decision says; returns those that were reduced."""
    catalog, told, done = open_catalog(directory), journal.Journal(directory, time.time, writes=True), []
    for step, by in decision.to_reduce.items():
        if past.still_holds(decision, step):
            catalog.remove(*catalog.reduce(step, by, time.time()))
            told.record("reduced", step, why=f"only {by} keeps it")
            done.append(step)
    return done


# ---------------------------------------------------------------- changing


@app.command(epilog="Example: ckptmgr pin runs/digits@300")
def pin(place: Place, step: Step = None, as_json: AsJson = False) -> None:
    """Pins a step: retention does not delete it."""
    run, number = facts.one(place, step)
    with _writer(run) as manager:
        manager.pin(number)
    _show({"run": run, "pinned": number}, as_json, lambda found: f"step {number} is pinned")


@app.command(epilog="Example: ckptmgr unpin runs/digits@300")
def unpin(place: Place, step: Step = None, as_json: AsJson = False) -> None:
    """Unpins a step: retention may delete it again."""
    run, number = facts.one(place, step)
    with _writer(run) as manager:
        manager.unpin(number)
    _show({"run": run, "unpinned": number}, as_json, lambda found: f"step {number} is no longer pinned")


@app.command(epilog="Example: ckptmgr distrust runs/digits@300 --why 'the loss is NaN'")
def distrust(
    place: Place,
    step: Step = None,
    why: Annotated[str, typer.Option("--why", help="The reason; it is shown where the step is passed over.")] = "",
    as_json: AsJson = False,
) -> None:
    """Distrusts a step: a restore passes over it, and retention does not count it."""
    run, number = facts.one(place, step)
    if not why.strip():
        raise ValueError('say why the step is distrusted: --why "the loss is NaN"')
    with _writer(run) as manager:
        manager.distrust(number, why)
    _show({"run": run, "distrusted": number, "why": why}, as_json, lambda _: f"step {number} is distrusted: {why}")


@app.command(epilog="Example: ckptmgr trust runs/digits@300")
def trust(place: Place, step: Step = None, as_json: AsJson = False) -> None:
    """Trusts a step again, also one that was distrusted as it was saved."""
    run, number = facts.one(place, step)
    with _writer(run) as manager:
        manager.trust(number)
    _show({"run": run, "trusted": number}, as_json, lambda _: f"step {number} is trusted")


@app.command(epilog="Example: ckptmgr rewind runs/digits@50 --dry-run")
def rewind(
    place: Place,
    step: Step = None,
    mirror: Annotated[str | None, typer.Option(help="The mirror of the run; it is rewound too.")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Lets a run go on from a step: later steps are set aside. A rewind to one of them brings it back."""
    run, number = facts.one(place, step)
    found = facts.rewinding(facts.reader(run).directory, mirror, number)
    if not dry_run:
        with CheckpointManager(run, mirror=mirror) as manager:
            manager.rewind(number)
    _show({"run": run, "step": number, **found, "done": not dry_run}, as_json, tables.rewound)


@app.command(epilog="Example: ckptmgr rm runs/digits 100 200 --dry-run")
def rm(
    place: Place,
    steps: Annotated[
        list[int] | None, typer.Argument(metavar="STEP", help="The numbers of the steps, after RUN.")
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Deletes steps, pinned or not."""
    run, number = facts.one(place, steps[0] if steps else None)
    steps = [number, *(steps or [])[1:]]
    known = set(facts.reader(run).steps())
    for step in steps:
        if step not in known:
            raise CheckpointNotFoundError(f"there is no step {step} in {run}; nothing was deleted", directory=run)
    if not dry_run:
        _delete(run, steps)
    said = f"{'would be deleted' if dry_run else 'deleted'}: {', '.join(map(str, steps))}"
    _show({"run": run, "steps": steps, "deleted": not dry_run}, as_json, lambda _: said)


def _delete(run: str, steps: list[int]) -> None:
    if steps:
        with _writer(run) as manager:
            for step in steps:
                manager.delete(step)


@app.command(epilog="Example: ckptmgr gc runs/digits, then ckptmgr gc runs/digits --yes")
def gc(
    run: Run,
    yes: Annotated[bool, typer.Option("--yes", help="Removes what is left over.")] = False,
    damaged: Annotated[bool, typer.Option("--damaged", help="Also damaged checkpoints set aside.")] = False,
    abandoned: Annotated[bool, typer.Option("--abandoned", help="Also steps a rewind has set aside.")] = False,
    as_json: AsJson = False,
) -> None:
    """Shows what interrupted processes have left over. --yes removes it."""
    manager = facts.reader(run)
    asked_for = {KEPT: damaged, BRANCH: abandoned}
    found = [each | {"goes": asked_for.get(each["why"], True)} for each in facts.leftovers(manager.directory)]
    if yes:
        with _writer(run):  # raises if another process writes; removes leftovers as it opens
            found_anew = open_catalog(manager.directory)
            for path, why in found_anew.leftovers():
                if asked_for.get(why):
                    found_anew.remove(path)
    _show({"run": run, "leftovers": found, "removed": yes}, as_json, tables.leftovers)


# ---------------------------------------------------------------- coming and going


@app.command(epilog="Example: ckptmgr export runs/digits model.safetensors --step 300")
def export(
    place: Annotated[str, typer.Argument(metavar="RUN[@STEP]", help="RUN@STEP or RUN/STEP; or RUN, and --step.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="FILE.safetensors, FILE.npz, or an Orbax directory.")],
    step: Annotated[int | None, typer.Option(help="The number of a step; default: the newest trusted.")] = None,
    item: Annotated[str, typer.Option(help="params, opt_state, or the name of an extra.")] = "params",
    max_shard_bytes: Annotated[int, typer.Option(help="The largest safetensors file.")] = 5_000_000_000,
    as_json: AsJson = False,
) -> None:
    """Writes params to safetensors, .npz or stock Orbax."""
    run, step = facts.named(place, step)
    manager = facts.reader(run)
    number = facts.newest_trusted(manager) if step is None else step
    with working("exporting"):
        found = manager.restore(number, layout=HOST)
        trees = {"params": found.params, "opt_state": found.opt_state, **found.extras}
        if trees.get(item) is None:
            known = ", ".join(name for name, tree in trees.items() if tree is not None)
            raise ValueError(f"step {number} has no {item}; it has {known}")
        written = interop.write(trees[item], out, max_shard_bytes=max_shard_bytes)
    names = [str(path) for path in written]
    told = {"run": run, "step": number, "item": item, "files": names}
    _show(told, as_json, lambda _: "wrote " + ", ".join(names))


_IMPORTS = """Examples: ckptmgr import runs/new --params params.pkl --opt-state opt_state.pkl --step 300;
ckptmgr import runs/new state.pkl; ckptmgr import runs/new flax_dir/checkpoint_9120; ckptmgr import runs/stock"""


@app.command(name="import", epilog=_IMPORTS)
def import_(
    run: Run,
    state: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]",
            help="A file with a dict of params, opt_state, step and metrics; other entries become extras. Or a "
            "directory with flax's checkpoint_N: the newest is taken, or --step. Without any file, steps of stock "
            "Orbax in RUN get manifests.",
        ),
    ] = None,
    params: Annotated[
        str | None, typer.Option(help="A file: .pkl, .safetensors, .msgpack, .npz, or an Orbax directory.")
    ] = None,
    opt_state: Annotated[str | None, typer.Option(help="A file, as for --params.")] = None,
    step: Annotated[int | None, typer.Option(help="The step to save it as.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="A module.name that a pickle may use.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="An entry of FILE to leave out; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Saves files of other formats as a checkpoint. No code of a pickle is run."""
    with working("importing"):
        if state is None and params is None and opt_state is None:
            adopted = interop.adopt(str(facts.reader(run).directory))
            told = ", ".join(map(str, adopted)) or "nothing: every step has a manifest"
            return _show({"run": run, "adopted": adopted}, as_json, lambda _: f"adopted: {told}")
        found = interop.incoming(
            state, params=params, opt_state=opt_state, step=step, allow=allow or (), skip=skip or ()
        )
        with CheckpointManager(run) as manager:
            how: dict[str, Any] = {"extras": found.extras, "metrics": found.metrics}
            manager.save(found.step, found.params, found.opt_state, **how).result()
    done = {"run": run, "step": found.step, "items": found.items, "metrics": sorted(found.metrics)}
    _show(done, as_json, lambda _: f"step {found.step} saved in {run}: {found}")


@app.command(name="report", epilog="Example: ckptmgr report runs/digits -o report.html")
def report_(
    run: Run,
    output: Annotated[pathlib.Path, typer.Option("-o", "--output", help="The file to write.")] = pathlib.Path(
        "report.html"
    ),
    as_json: AsJson = False,
) -> None:
    """Writes one HTML file about a run. Shows what is kept and why, metrics, sizes, times, failures."""
    with working("reporting"):
        output.write_text(report.html(facts.reader(run)), encoding="ascii")
    _show({"run": run, "file": str(output)}, as_json, lambda _: f"wrote {output}")


@app.command(epilog="Example: ckptmgr doctor runs/digits")
def doctor(
    directory: Annotated[str, typer.Argument(help="The directory for checkpoints; its speed is measured.")] = ".",
    as_json: AsJson = False,
) -> None:
    """Shows versions, devices, storage speed, and what is not installed. Exits with 1 if something is wrong."""
    with working("measuring"):
        found = doctors.examine(directory)
    _show(found, as_json, tables.doctor)
    raise typer.Exit(1 if found["warnings"] else 0)
