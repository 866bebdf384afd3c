"""Every failure in the command line's own words, and its exit code.

The library words its errors for both. Where it names an argument of Python all the same, `_OWN_WORDS` has what the
command line says instead.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import typer

from ckptmgr.cli import places
from ckptmgr.cli.asking import NotConfirmedError
from ckptmgr.cli.base import PipeClosedError, warn
from ckptmgr.cli.spelling import in_shell_words
from ckptmgr.errors import CheckpointError, CheckpointExistsError, SaveError

UsageProblem: type[Exception] = typer.BadParameter.__mro__[2]  # ClickException, whichever module has it
WRONG, _FAILED = 2, 3
_INTERRUPTED, _PIPE_CLOSED = 130, 141
"""As a shell counts a process that SIGINT or SIGPIPE has ended."""

_OWN_WORDS: dict[type[Exception], Callable[[Any], str | None]] = {
    SaveError: lambda problem: (
        problem.holder
        and f"the run is being written to by {problem.holder}, and a run has one writer. Wait until that process "
        "ends; commands that only read need not wait"
    ),
    CheckpointExistsError: lambda problem: (
        f"step {problem.step} was saved by another process meanwhile, and it is kept"
    ),
}
_CODES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], int], ...] = (
    ((UsageProblem, NotConfirmedError, FileNotFoundError), WRONG),
    ((CheckpointError, OSError), _FAILED),
    ((ValueError, TypeError, ImportError), WRONG),
)


def ended(call: Callable[[], Any], words: list[str]) -> int:
    """Runs a command; its exit code. A failure is printed as one line, or as JSON with --json."""
    as_json = "--json" in words
    try:
        with _logged():
            code = _ended(call, as_json)
        sys.stdout.flush()
        return code
    except (PipeClosedError, BrokenPipeError):
        _close_stdout()
        return _PIPE_CLOSED
    except OSError as problem:  # a full disk
        _close_stdout()
        return _failed(type(problem).__name__, str(problem), False, _FAILED)


def _ended(call: Callable[[], Any], as_json: bool) -> int:
    try:
        code = int(call() or 0)
        return code if code != _INTERRUPTED else _failed("Interrupted", "interrupted", as_json, code)
    except PipeClosedError:
        raise
    except (KeyboardInterrupt, typer.Abort):
        return _failed("Interrupted", "interrupted", as_json, _INTERRUPTED)
    except Exception as problem:
        return _fail(problem, as_json)


def _fail(problem: Exception, as_json: bool) -> int:
    is_usage = isinstance(problem, UsageProblem)
    code = next((code for kinds, code in _CODES if isinstance(problem, kinds)), None)
    if code is None:
        traceback.print_exc()
        said = f"unexpected {type(problem).__name__}: {problem}. This is a fault of ckptmgr; please report it"
        return _failed(type(problem).__name__, said, as_json, _FAILED)
    facts = problem.facts if isinstance(problem, NotConfirmedError) else {}
    return _failed("UsageError" if is_usage else type(problem).__name__, in_words(problem), as_json, code, facts)


def in_words(problem: Exception) -> str:
    """What the command line says of an error."""
    if isinstance(problem, UsageProblem):
        return _usage(problem)
    for kind, words in _OWN_WORDS.items():
        if isinstance(problem, kind) and (said := words(problem)):
            return said
    return in_shell_words(str(problem))


def _usage(problem: Any) -> str:
    """A wrong command line: what is wrong, and what may have been meant."""
    context, said = problem.ctx if hasattr(problem, "ctx") else None, str(problem.format_message()).rstrip(".")
    if hasattr(problem, "possibilities"):
        said = f"there is no option {problem.option_name}{places.meant(problem.option_name, _options(context))}"
    if context is None:
        return said
    return f"{said}{'' if said.endswith('?') else '.'} See {context.command_path} --help"


def _options(context: Any) -> list[str]:
    return [] if context is None else [name for each in context.command.params for name in each.opts]


def _failed(name: str, message: str, as_json: bool, code: int, facts: dict[str, Any] | None = None) -> int:
    if as_json:
        print(json.dumps({"error": name, "message": message} | (facts or {})))
        return code
    warn(message)
    return code


def _close_stdout() -> None:
    """So that nothing is written to a closed pipe again when Python ends."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)


class _Log(logging.Handler):
    """Prints what the library logs while a command runs."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(in_shell_words(record.getMessage()))


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """Shows what the library warns of as lines of our own."""
    log, handler = logging.getLogger("ckptmgr"), _Log(logging.WARNING)
    log.addHandler(handler)
    before, log.propagate = log.propagate, False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = before
