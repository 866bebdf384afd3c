"""What the commands share: the app, the words for runs and steps, and how a result is printed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from ckptmgr.cli import facts, places
from ckptmgr.format import paths
from ckptmgr.manager import CheckpointManager
from ckptmgr.policies import Record
from ckptmgr.run.catalog import open_catalog

app = typer.Typer(
    name="ckptmgr",
    help="Shows, compares, verifies, keeps, imports and exports checkpoints of JAX training.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog="RUN is a directory of checkpoints, also gs:// or s3://. Exit codes: 0 all is well; 1 damage or a "
    "difference was found; 2 wrong arguments, nothing there, or not confirmed; 3 it failed; 130 interrupted.",
)

Run = Annotated[str, typer.Argument(metavar="RUN", help="The directory of a run.")]
Place = Annotated[
    str,
    typer.Argument(
        metavar="RUN@STEP", help="RUN@STEP or RUN/STEP; or RUN, then STEP.", autocompletion=places.completed
    ),
]
Step = Annotated[
    int | None,
    typer.Argument(metavar="STEP", help="The number of a step, after RUN.", autocompletion=places.completed_step),
]
AnyPlace = Annotated[
    str,
    typer.Argument(
        metavar="RUN[@STEP]",
        help="RUN@STEP or RUN/STEP; or RUN, then STEP. Default: the newest.",
        autocompletion=places.completed,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Prints JSON instead of text, and asks nothing.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Shows what would be done, and changes nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Does it without a question.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        say(version())
        raise typer.Exit


@app.callback()
def _root(
    wanted: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Prints the version.")
    ] = False,
) -> None:
    pass


def version() -> str:
    """The name and the version of this package."""
    return f"ckptmgr {importlib.metadata.version('ckptmgr')}"


# ---------------------------------------------------------------- printing


class PipeClosedError(Exception):
    """Whoever reads our output has stopped."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise PipeClosedError


def width() -> int | None:
    """The columns of the terminal; None if the output is no terminal, where no line is folded or cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def fitted(render: Callable[[Any, int | None], RenderableType]) -> Callable[[Any], RenderableType]:
    """The same for the terminal that is there."""
    return lambda found: render(found, width())


def say(what: RenderableType) -> None:
    """Prints a result. Brackets in it are no markup."""
    columns = width()
    console = _Console(
        width=columns or 1_000_000, height=25,  # without a height a dumb terminal has 80 columns
        highlight=False, markup=False, emoji=False, soft_wrap=columns is None,
    )  # fmt: skip
    console.print(what)
    _flush()


def show(found: Any, as_json: bool, render: Callable[[Any], RenderableType]) -> None:
    """Prints a result as JSON or as text."""
    if not as_json:
        say(render(found))
        return
    try:
        print(json.dumps(found, indent=2, allow_nan=False))
    except BrokenPipeError:
        raise PipeClosedError from None
    _flush()


def warn(message: str) -> None:
    """Prints a line beside the result."""
    console = _Console(stderr=True, highlight=False, markup=False, emoji=False)
    console.print(f"ckptmgr: {message}", soft_wrap=not console.is_terminal)


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise PipeClosedError from None


# ---------------------------------------------------------------- changing a run


@contextlib.contextmanager
def writer(run: str, mirror: str | None = None) -> Iterator[CheckpointManager]:
    """A manager that may write. No run is made: raises CheckpointNotFoundError if there is none."""
    facts.reader(run)
    mirror_keep = None if mirror is None else _AsItIs(open_catalog(paths.resolve(mirror)).steps())
    with CheckpointManager(run, mirror=mirror, mirror_keep=mirror_keep) as manager:
        yield manager


class _AsItIs:
    """What a mirror keeps while a command has the run open: what it has. The policies of the run are not known."""

    def __init__(self, steps: Sequence[int]) -> None:
        self._steps = set(steps)

    def keep(self, history: Sequence[Record]) -> set[int]:
        return self._steps & {each.step for each in history}
