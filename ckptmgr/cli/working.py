"""A progress bar for work of more than a second; only shown in a terminal."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

_PATIENCE_S = 1.0


@contextlib.contextmanager
def working(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to call with how much is done, and how much there is in all."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task(what, total=None)
    timer = threading.Timer(_PATIENCE_S, progress.start)
    timer.daemon = True
    if progress.console.is_terminal:
        timer.start()
    try:
        yield lambda done, total: progress.update(task, completed=done, total=total)
    finally:
        timer.cancel()
        if progress.live.is_started:  # if not, stop() would print an empty line
            progress.stop()
