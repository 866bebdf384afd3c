"""The command line: `run` is the program, `app` has the commands.

A new command: a function in `looking`, `changing` or `converting`, its values in `facts`, its looks in `tables`, a
row in `docs/cli.md`. What deletes or replaces something asks first (`asking`).

Exit codes: 0 all is well, 1 damage or a difference was found, 2 wrong arguments, nothing there or not confirmed,
3 it failed, 130 interrupted.
"""

from __future__ import annotations

import sys

from ckptmgr.cli import changing, converting, looking, messages
from ckptmgr.cli.base import app

__all__ = ["app", "outcome", "run"]

_ORDER = [each.__name__ for each in (looking, changing, converting)]
app.registered_commands.sort(key=lambda each: _ORDER.index(getattr(each.callback, "__module__", "")))


def run() -> None:
    """Runs the command line. An error is printed as one line, or as JSON with --json."""
    sys.exit(outcome(sys.argv[1:]))


def outcome(words: list[str]) -> int:
    """Runs one command line; its exit code. Without words the help is shown."""
    code = messages.ended(lambda: app(words or ["--help"], prog_name="ckptmgr", standalone_mode=False), words)
    return code if words else code or messages.WRONG
