"""Commands that change nothing: ls, show, diff, verify, report, doctor."""

from __future__ import annotations

import os
import pathlib
from typing import Annotated

import typer

from ckptmgr.cli import asking, facts, places, report, tables
from ckptmgr.cli import doctor as doctors
from ckptmgr.cli.base import AnyPlace, AsJson, Run, Step, Yes, app, fitted, show
from ckptmgr.cli.working import working
from ckptmgr.errors import CheckpointNotFoundError
from ckptmgr.format import paths


@app.command(epilog="Example: ckptmgr ls runs/digits --metric loss")
def ls(
    run: Run,
    metric: Annotated[
        list[str] | None, typer.Option(help="A metric to show; may be repeated. Default: all that fit.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Lists the checkpoints of a run. Shows step, age, size, metrics, and why each is kept."""
    manager = facts.reader(run)
    for name in metric or ():
        facts.check_metric(manager, name)
    show(facts.run(manager), as_json, fitted(lambda found, columns: tables.run(found, columns, metric or ())))


@app.command(name="show", epilog="Example: ckptmgr show runs/digits@300 --depth 3")
def show_(
    place: AnyPlace,
    step: Step = None,
    depth: Annotated[
        int | None, typer.Option(min=1, help="How many levels are shown. Default: as many as 200 lines hold.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Shows one checkpoint as a tree: shapes, dtypes, shardings, and the bytes of each module."""
    run, step = places.named(place, step)
    manager = facts.reader(run)
    found = facts.checkpoint(manager, facts.chosen(manager, step))
    show(found, as_json, lambda found: tables.checkpoint(found, depth))


@app.command(epilog="Example: ckptmgr diff runs/digits@100 runs/digits@300 --values")
def diff(
    pair: Annotated[
        list[str],
        typer.Argument(
            metavar="A B",
            help="Each RUN@STEP or RUN/STEP; or RUN, then STEP. Default: the newest.",
            autocompletion=places.completed,
        ),
    ],
    values: Annotated[bool, typer.Option("--values", help="Shows the largest change of each leaf.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Shows every leaf that differs, not the first 40.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compares shapes and dtypes of two checkpoints, with --values also values. Exits with 1 if they differ."""
    managers = [(facts.reader(run), step) for run, step in places.two(pair)]
    a, b = ((manager, facts.chosen(manager, step)) for manager, step in managers)
    with working("comparing") as on_progress:
        found = facts.difference(a, b, values, on_progress)
    show(found, as_json, fitted(lambda found, columns: tables.difference(found, every, columns)))
    raise typer.Exit(0 if found["equal"] else 1)


@app.command(epilog="Example: ckptmgr verify runs/digits --all")
def verify(
    place: AnyPlace,
    step: Step = None,
    every: Annotated[bool, typer.Option("--all", help="Verifies every step.")] = False,
    as_json: AsJson = False,
) -> None:
    """Reads every file and every array of a checkpoint. Exits with 1 if there is damage."""
    run, step = places.named(place, step)
    if every and step is not None:
        raise ValueError(f"--all verifies every step, and {place} names step {step}: leave one of them out")
    manager = facts.reader(run)
    newest = facts.chosen(manager, step)
    reports = []
    for number in manager.steps() if every else [newest]:
        with working(f"verifying step {number}") as on_progress:
            try:
                reports.append(manager.verify(number, on_progress=on_progress))
            except CheckpointNotFoundError:  # retention of a trainer has deleted it meanwhile
                if not every or number in manager.steps():
                    raise
    show([facts.verified(each) for each in reports], as_json, tables.verified)
    raise typer.Exit(0 if all(reports) else 1)


_MARK = "<!-- written by ckptmgr report -->\n"
"""At the end of a report, so that the next one may replace it without a question."""


@app.command(name="report", epilog="Example: ckptmgr report runs/digits -o report.html")
def report_(
    run: Run,
    output: Annotated[pathlib.Path, typer.Option("-o", "--output", help="The file to write.")] = pathlib.Path(
        "report.html"
    ),
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Writes one HTML file about a run. Shows what is kept and why, metrics, sizes, times, failures."""
    manager = facts.reader(run)
    if output.is_dir():
        raise ValueError(f"{output} is a directory; name a file")
    if not output.parent.is_dir():
        raise places.no_directory(str(output.parent))
    if output.exists() and not _is_report(output):
        asking.confirm(f"replace {output}", {"file": str(output)}, yes=yes, as_json=as_json, hint="")
    with working("reporting"):
        part = output.with_name(f"{output.name}.part")
        part.write_text(f"{report.html(manager).rstrip()}\n{_MARK}", encoding="utf-8")
        os.replace(part, output)
    show({"run": run, "file": str(output)}, as_json, lambda _: f"wrote {output}")


def _is_report(path: pathlib.Path) -> bool:
    """Whether this command has written a file."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - len(_MARK)))
        return file.read() == _MARK.encode()


@app.command(epilog="Example: ckptmgr doctor runs/digits")
def doctor(
    directory: Annotated[
        str, typer.Argument(metavar="DIRECTORY", help="A directory for checkpoints; its speed is measured.")
    ] = ".",
    as_json: AsJson = False,
) -> None:
    """Shows versions, devices, storage speed, and what is not installed. Exits with 1 if something is wrong."""
    if paths.is_local(directory) and not os.path.isdir(os.path.expanduser(directory)):
        raise places.no_directory(directory)
    with working("measuring"):
        found = doctors.examine(directory)
    show(found, as_json, tables.doctor)
    raise typer.Exit(1 if found["warnings"] else 0)
