"""Nothing is deleted, moved or replaced before `--yes`, or before a person at a terminal has said yes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rich.console import RenderableType

from ckptmgr.cli import base
from ckptmgr.cli.facts import Facts


class NotConfirmedError(Exception):
    """A change was not confirmed, and nothing was changed; `facts` are what it would have done."""

    def __init__(self, message: str, facts: Facts) -> None:
        super().__init__(message)
        self.facts = facts


def confirm(
    would: str,
    found: Facts,
    *,
    yes: bool,
    as_json: bool,
    render: Callable[[Any], RenderableType] | None = None,
    hint: str = ", or --dry-run to see more",
) -> bool:
    """Returns if the change is confirmed, and whether the plan was shown for that; else raises NotConfirmedError.

    Args:
      would: what the command would do, after "would": "delete steps 100, 200 of runs/digits".
      found: the same as values, for JSON.
      render: shows a person the plan before the question.
      hint: what else may be typed.
    """
    if yes:
        return False
    if as_json or not _is_person():
        raise NotConfirmedError(f"this would {would}, so nothing was changed. Add --yes to do it{hint}", found)
    if render is not None:
        base.say(render(found))
    if not _answers_yes(f"{would[:1].upper()}{would[1:]}? [y/N] "):
        raise NotConfirmedError("nothing was changed", found)
    return True


def _is_person() -> bool:
    """Whether somebody sees the question and can answer it."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def _answers_yes(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False
