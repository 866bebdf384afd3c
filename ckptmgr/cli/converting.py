"""Commands that read and write other formats: export, average, import."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from ckptmgr import interop
from ckptmgr.cli import asking, facts, places
from ckptmgr.cli.base import AnyPlace, AsJson, DryRun, Run, Yes, app, show
from ckptmgr.cli.working import working
from ckptmgr.format import names, paths
from ckptmgr.manager import CheckpointManager
from ckptmgr.run.catalog import open_catalog
from ckptmgr.trees import averaging

Item = Annotated[str, typer.Option(help="params, opt_state, or the name of an extra.")]
MaxShardBytes = Annotated[int, typer.Option(help="The most bytes of one safetensors file.")]
_FORMATS = "FILE.safetensors, FILE.npz, or a new directory for stock Orbax"
_SHARD_BYTES = 5_000_000_000


@app.command(epilog="Example: ckptmgr export runs/digits model.safetensors --step 300")
def export(
    place: AnyPlace,
    out: Annotated[str, typer.Argument(metavar="OUT", help=f"{_FORMATS}.")],
    step: Annotated[int | None, typer.Option(help="The number of a step; default: the newest trusted.")] = None,
    item: Item = "params",
    max_shard_bytes: MaxShardBytes = _SHARD_BYTES,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Writes params to safetensors, .npz or stock Orbax."""
    run, step = places.named(place, step)
    manager = facts.reader(run)
    number = facts.trusted(manager)[-1] if step is None else facts.chosen(manager, step)
    found = {"run": run, "step": number, "item": item, "files": [out]}
    _may_write(out, found, yes=yes or dry_run, as_json=as_json)
    if dry_run:
        return show(found | {"dry_run": True}, as_json, lambda _: f"would write {item} of step {number} to {out}")
    with working("reading") as on_progress:
        tree = facts.items(manager, number, item, on_progress=on_progress)[item]
    _write(tree, out, found, max_shard_bytes, as_json)


def _write(tree: Any, out: str, found: facts.Facts, max_shard_bytes: int, as_json: bool) -> None:
    with working("writing"):
        written = interop.write(tree, out, max_shard_bytes=max_shard_bytes)
    files = [str(path) for path in written]
    show(found | {"files": files}, as_json, lambda _: "wrote " + ", ".join(files))


def _may_write(out: str, found: facts.Facts, *, yes: bool, as_json: bool) -> None:
    """Asks before a file is replaced; raises if the place is a directory that is there, or in a step."""
    path = interop.local(out)
    interop.check_format(path)
    _refuse_inside_of_steps(path)
    if path.is_dir():
        raise ValueError(f"{out} is a directory; a directory is not replaced: remove it, or name another place")
    if replaced := interop.replaced_by(path):
        shown = ", ".join(map(str, replaced[:3])) + (f" and {len(replaced) - 3} more" if len(replaced) > 3 else "")
        asking.confirm(f"replace {shown}", found, yes=yes, as_json=as_json)


def _refuse_inside_of_steps(path: pathlib.Path) -> None:
    """What is written into a step, or beside the steps under a number, would be taken for a part of the run."""
    inside = pathlib.Path(os.path.realpath(path))
    for folder in inside.parents:
        name = inside.relative_to(folder).parts[0]
        if (name == names.OURS or names.STEP.fullmatch(name)) and places.is_run(str(folder)):
            raise ValueError(f"{path} is inside of the run {folder}, among its steps; name another place")


@app.command(epilog="Example: ckptmgr average runs/digits --last 5 -o average.safetensors")
def average(
    run: Run,
    output: Annotated[str, typer.Option("-o", "--output", metavar="OUT", help=f"{_FORMATS}.")],
    last: Annotated[
        int | None, typer.Option(min=1, help="How many of the newest trusted steps are averaged.")
    ] = None,
    steps: Annotated[str | None, typer.Option(metavar="A,B,C", help="Averages these steps.")] = None,
    item: Item = "params",
    max_shard_bytes: MaxShardBytes = _SHARD_BYTES,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Writes the mean of the params of several steps.

    Floating point leaves are added up in float32 or wider, and get their dtype back; all others must be equal.
    """
    manager = facts.reader(run)
    chosen = _to_average(manager, last, steps)
    found = {"run": run, "steps": chosen, "item": item, "files": [output]}
    _may_write(output, found, yes=yes or dry_run, as_json=as_json)
    said = f"the mean of {item} of steps {', '.join(map(str, chosen))}"
    if dry_run:
        return show(found | {"dry_run": True}, as_json, lambda _: f"would write {said} to {output}")
    with working(f"averaging {len(chosen)} steps") as on_progress:
        tree = averaging.mean(_each(manager, chosen, item, on_progress), item)
    _write(tree, output, found, max_shard_bytes, as_json)


def _to_average(manager: CheckpointManager, last: int | None, steps: str | None) -> list[int]:
    """The steps that are averaged; raises if one of them is not trusted, or if there are too few."""
    if (last is None) == (steps is None):
        raise ValueError("say which steps are averaged: --last 5, or --steps 100,200,300")
    trusted = facts.trusted(manager)
    if last is not None:
        if last > len(trusted):
            have = "is 1 trusted step" if len(trusted) == 1 else f"are {len(trusted)} trusted steps"
            raise ValueError(f"there {have} in {manager.directory}, and not {last}")
        return trusted[-last:]
    chosen = [facts.chosen(manager, step) for step in places.numbers(steps or "")]
    for step in set(chosen) - set(trusted):
        why = manager.info(step).distrusted  # raises if the step cannot be read
        raise ValueError(f"step {step} is distrusted, so it is not averaged: {why}")
    return chosen


def _each(manager: CheckpointManager, steps: list[int], item: str, on_progress: Any) -> Iterator[tuple[str, Any]]:
    """One step after the other, so that one is held at a time."""
    before, total = 0, sum(facts.nbytes_of(manager, step, item) for step in steps)
    for step in steps:
        told = functools.partial(_tell, on_progress, before, total)
        yield f"step {step}", facts.items(manager, step, item, on_progress=told)[item]
        before += facts.nbytes_of(manager, step, item)


def _tell(on_progress: Any, before: int, total: int, done: int, _: int) -> None:
    on_progress(before + done, total)


_IMPORTS = """Examples: ckptmgr import runs/new --params params.pkl --opt-state opt_state.pkl --step 300;
ckptmgr import runs/new state.pkl; ckptmgr import runs/new flax_dir/checkpoint_9120; ckptmgr import runs/stock"""


@app.command(name="import", epilog=_IMPORTS)
def import_(
    run: Run,
    state: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE",
            help="A file with a dict of params, opt_state, step and metrics; other entries become extras. Or a "
            "directory with flax's checkpoint_N: the newest is taken, or --step. Without any file, steps of stock "
            "Orbax in RUN get manifests.",
        ),
    ] = None,
    params: Annotated[
        str | None, typer.Option(help="A file: .pkl, .safetensors, .msgpack, .npz, or an Orbax directory.")
    ] = None,
    opt_state: Annotated[str | None, typer.Option(help="A file, as for --params.")] = None,
    step: Annotated[int | None, typer.Option(help="The step to save it as; default: as in FILE.")] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="module.name that a pickle may use; may be repeated.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="An entry of FILE to leave out; may be repeated.")] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Saves files of other formats as a checkpoint. Runs no code of a pickle, except the names of --allow."""
    if state is None and params is None and opt_state is None:
        given = [name for name, value in (("--step", step), ("--allow", allow), ("--skip", skip)) if value]
        if given:
            raise ValueError(f"{' and '.join(given)} is about a file, and none is given")
        return _adopt(run, dry_run, as_json)
    steps = _steps_of(run)
    with working("reading"):
        found = interop.incoming(
            state, params=params, opt_state=opt_state, step=step, allow=allow or (), skip=skip or ()
        )
    if found.params is None and found.opt_state is None:
        raise ValueError(f"{state} has neither params nor an opt_state")
    told = {"run": run, "step": found.step, "items": found.items, "metrics": sorted(found.metrics)}
    is_there = found.step in steps
    if is_there:
        _may_replace(run, found.step, told, yes=yes or dry_run, as_json=as_json)
    if dry_run:
        words = "would replace step" if is_there else "would save step"
        told["dry_run"] = True
        return show(told, as_json, lambda _: f"{words} {found.step} in {run}: {found}")
    with working("saving"), CheckpointManager(run) as manager:
        how: dict[str, Any] = {"extras": found.extras, "metrics": found.metrics}
        how["on_exists"] = "replace" if is_there else "error"
        manager.save(found.step, found.params, found.opt_state, **how).result()
    new = "" if steps else f"; {run} is a new run"
    show(told, as_json, lambda _: f"step {found.step} saved in {run}: {found}{new}")


def _steps_of(run: str) -> list[int]:
    """The steps of a run that may be new; raises if a run in this place would be a mistake."""
    if paths.is_local(run) and os.path.isfile(paths.resolve(run)):
        raise places.no_run(run)
    steps = open_catalog(paths.resolve(run)).steps()
    if not steps and paths.is_local(run):
        _refuse_inside_of_steps(pathlib.Path(paths.resolve(run)))
        if places.runs_in(run):
            raise places.no_run(run)
    return steps


def _may_replace(run: str, step: int, told: facts.Facts, *, yes: bool, as_json: bool) -> None:
    directory = paths.resolve(run)
    if not paths.is_local(directory):
        raise ValueError(f"step {step} is in {run} already, and a bucket cannot replace it; remove it first")
    if open_catalog(directory).is_pinned(step):
        raise ValueError(f"step {step} is pinned, so it is not replaced; unpin it first")
    asking.confirm(f"replace step {step} of {run}", told, yes=yes, as_json=as_json)


def _adopt(run: str, dry_run: bool, as_json: bool) -> None:
    """Gives steps of stock Orbax a manifest."""
    directory = facts.reader(run).directory
    if dry_run:
        bare = interop.without_manifest(directory)
        said = ", ".join(map(str, bare)) or "none, every step has a manifest"
        return show({"run": run, "would_adopt": bare}, as_json, lambda _: f"would be adopted: {said}")
    with working("reading"):
        adopted = interop.adopt(directory)
    said = ", ".join(map(str, adopted)) or "none, every step has a manifest"
    show({"run": run, "adopted": adopted}, as_json, lambda _: f"adopted: {said}")
