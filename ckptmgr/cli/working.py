"""A progress bar for work of more than a second, with bytes and bytes per second; only shown in a terminal."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from ckptmgr.cli.amounts import size

_PATIENCE_S = 1.0


class _Bytes(ProgressColumn):
    """How much is done of how much, and how fast; nothing as long as the amount is not known."""

    def render(self, task: Task) -> Text:
        if not task.total:
            return Text("")
        share, speed = f"{task.percentage:.0f}%", f", {size(task.speed)}/s" if task.speed else ""
        return Text(f"{share} of {size(task.total)}{speed}", no_wrap=True)


class _Bar(BarColumn):
    def render(self, task: Task) -> Text | object:  # type: ignore[override]
        return super().render(task) if task.total else Text("")


def progress_on(console: Console) -> Progress:
    """A bar with what is done, the share, the speed and the time."""
    bar = _Bar(bar_width=20 if console.width >= 80 else 5)
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), bar, _Bytes(Column(no_wrap=True))
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)


@contextlib.contextmanager
def working(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to call with how many bytes are done, and how many there are in all.

    Until it is called, the time alone is shown.
    """
    console = Console(stderr=True, markup=False)
    progress = progress_on(console)
    task = progress.add_task(what, total=None)
    timer = threading.Timer(_PATIENCE_S, progress.start)
    timer.daemon = True
    if console.is_terminal and not console.is_dumb_terminal:
        timer.start()
    try:
        yield lambda done, total: progress.update(task, completed=done, total=total)
    finally:
        timer.cancel()
        if progress.live.is_started:  # if not, stop() would print an empty line
            progress.stop()
