"""Which run and which step a word of the command line means; and what may have been meant instead."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterable, Sequence
from typing import Any

from ckptmgr.errors import CheckpointError, CheckpointNotFoundError
from ckptmgr.format import names, paths
from ckptmgr.run.catalog import open_catalog

_MOST_LOOKED_AT, _MOST_NAMED = 300, 6


def named(text: str, step: int | None = None) -> tuple[str, int | None]:
    """The run and the step in RUN STEP, RUN@STEP or RUN/STEP. The step is None if only a run is named."""
    run, found, is_marked = _split(text)
    if step is None:
        return run, found
    if is_marked:
        raise ValueError(f"{text} names step {found}, and {step} is another step: name one")
    return text, step


def one(text: str, step: int | None) -> tuple[str, int]:
    """As `named`, for a command that has no default step."""
    run, found = named(text, step)
    if found is None:
        raise ValueError(f"say which step this is: {run.rstrip('/')}@STEP")
    return run, found


def two(words: Sequence[str]) -> list[tuple[str, int | None]]:
    """As `named`, for two places: a number after a run is a step of it."""
    found: list[tuple[str, int | None]] = []
    for word in words:
        if not found or not word.isdecimal() or is_run(word):
            found.append(named(word))
        elif found[-1][1] is None:
            found[-1] = (found[-1][0], int(word))
        else:
            found.append((found[-1][0], int(word)))
    if len(found) != 2:
        raise ValueError(f"diff needs two checkpoints, not {len(found)}: RUN@STEP RUN@STEP")
    return found


def numbers(text: str) -> list[int]:
    """The steps in "100,200,300", each once and in order."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"{text!r} is no list of steps; write --steps 100,200,300")
    return sorted(set(map(int, words)))


def _split(text: str) -> tuple[str, int | None, bool]:
    """The run and the step in RUN, RUN/STEP or RUN@STEP, and whether it is the last of these."""
    run, at, step = text.rstrip("/").rpartition("@")
    if at and "/" not in step and not paths.path_of(text).exists():
        if not step.isdecimal():
            raise ValueError(f"{text}: {step!r} is not the number of a step; write RUN@STEP, as in {run}@100")
        return run, int(step), True
    parent, _, last = text.rstrip("/").rpartition("/")
    is_step = last.isdecimal() and not is_run(text)
    return (parent or ".", int(last), False) if is_step else (text, None, False)


def is_run(directory: str) -> bool:
    """Whether a directory holds steps, and is not one itself."""
    with contextlib.suppress(CheckpointError, OSError):
        return bool(open_catalog(paths.resolve(directory)).steps())
    return False


# ---------------------------------------------------------------- what may have been meant


def meant(word: str, known: Iterable[str]) -> str:
    """What to add to an error if a known word is spelled nearly so."""
    close = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""


def no_run(run: str) -> CheckpointNotFoundError:
    """The error for a directory without a checkpoint: what it is, and which run may be meant."""
    return CheckpointNotFoundError(_why_no_run(run), directory=str(paths.resolve(run)))


def _why_no_run(run: str) -> str:
    if not paths.is_local(run):
        return f"there is no run in {run}"
    path = os.path.expanduser(run)
    if os.path.isfile(path):
        return f"{run} is a file; a run is a directory"
    folder, name = os.path.split(path.rstrip("/"))
    if name.isdecimal() and is_run(folder or "."):
        return f"there is no step {name} in {folder or '.'}" if not os.path.isdir(path) else f"{run} is no run"
    if not os.path.isdir(path):
        return f"there is no run in {run}{_similar(path)}"
    if runs := runs_in(path):
        return f"{run} is no run itself; it holds the {_counted(runs, 'run')}{_first(path, runs)}"
    if entries := sorted(os.listdir(path)):
        return f"there is no checkpoint in {run}; it holds {_listed(entries)}"
    return f"there is no checkpoint in {run}, which is empty"


def _similar(path: str) -> str:
    """The runs that a mistyped path may mean."""
    folder, name = os.path.split(path.rstrip("/"))
    for parent in [folder] if os.path.isdir(folder or ".") else _folders_like(folder):
        runs = runs_in(parent)
        if close := difflib.get_close_matches(name, runs, 1, 0.5):
            return f"; did you mean {os.path.join(parent, close[0])}?"
        if runs:
            return f"; in {parent or '.'} there {'are' if len(runs) > 1 else 'is'} the {_counted(runs, 'run')}"
    return ""


def _folders_like(folder: str) -> list[str]:
    above, name = os.path.split(folder.rstrip("/"))
    entries = os.listdir(above or ".") if os.path.isdir(above or ".") else []
    close = difflib.get_close_matches(name, entries, 1, 0.5)
    return [os.path.join(above, each) for each in close]


def runs_in(folder: str) -> list[str]:
    """The names of the runs in a directory."""
    with contextlib.suppress(OSError):
        entries = sorted(entry.name for entry in os.scandir(folder or ".") if entry.is_dir())
        return [
            each for each in entries[:_MOST_LOOKED_AT] if each != names.OURS and is_run(os.path.join(folder, each))
        ]
    return []


def _counted(found: Sequence[str], what: str) -> str:
    return f"{what}{'s' if len(found) > 1 else ''} {_listed(found)}"


def _first(folder: str, runs: Sequence[str]) -> str:
    return f"; name one: {os.path.join(folder, runs[0])}"


def _listed(found: Sequence[str]) -> str:
    shown = ", ".join(printable(each) for each in found[:_MOST_NAMED])
    more = len(found) - _MOST_NAMED
    return f"{shown} and {more} more" if more > 0 else shown


def printable(name: str, longest: int = 60) -> str:
    """A name that is safe in a terminal: quoted if it holds control characters or is not text."""
    shown = name if name.isprintable() else repr(name)
    return shown if len(shown) <= longest else f"{shown[:longest]}..."


def no_directory(directory: str) -> CheckpointNotFoundError:
    """The error for a directory that is not there, with one that is."""
    folder, name = os.path.split(os.path.abspath(os.path.expanduser(directory)))
    entries = [each.name for each in os.scandir(folder) if each.is_dir()] if os.path.isdir(folder) else []
    close = difflib.get_close_matches(name, entries, 1, 0.5)
    said = f"; did you mean {os.path.join(folder, close[0])}?" if close else ""
    return CheckpointNotFoundError(f"there is no directory {directory}{said}", directory=directory)


def no_step(step: int, run: str, steps: Sequence[int]) -> CheckpointNotFoundError:
    """The error for a step that is not there, with those that are near it."""
    below, above = [each for each in steps if each < step], [each for each in steps if each > step]
    near = [*below[-1:], *above[:1]]
    said = f"there is no step {step} in {run}"
    if near:
        said += f"; the nearest {'are' if len(near) > 1 else 'is'} {' and '.join(map(str, near))}"
        said += f", the newest is {steps[-1]}" if steps[-1] not in near else ""
    return CheckpointNotFoundError(said, directory=run, step=step)


# ---------------------------------------------------------------- completion in a shell


def completed(incomplete: str) -> list[str]:
    """RUN@STEP for each step of RUN. Directories are completed by the shell."""
    run, at, digits = incomplete.rpartition("@")
    return [f"{run}@{step}" for step in _steps(run) if str(step).startswith(digits)] if at else []


def completed_step(ctx: Any, incomplete: str) -> list[str]:
    """The steps of the run that was named before."""
    return [str(step) for step in _steps(ctx.params.get("place") or "") if str(step).startswith(incomplete)]


def _steps(run: str) -> list[int]:
    with contextlib.suppress(Exception):  # a completion prints nothing else
        return open_catalog(paths.resolve(run)).steps()
    return []
