"""Small files, written so that they survive a power cut where the disk keeps its word."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from etils import epath

from ckptmgr.paths import is_local, open_to_write


def write(path: epath.Path, data: bytes) -> None:
    """Writes a file; on a local disk it is durable when this returns, its name once `sync` is called.

    A symlink in its place is an OSError.
    """
    if not is_local(path):
        path.write_bytes(data)
        return
    with open(path, "wb", opener=open_to_write) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(directories: Iterable[epath.Path]) -> None:
    """Makes the names in these local directories durable (fsync(2): a file's own fsync does not)."""
    for directory in filter(is_local, directories):
        descriptor = os.open(directory, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def walk(directory: epath.Path) -> tuple[list[epath.Path], dict[str, int]]:
    """Every directory below and including `directory`, and the size of every file by relative name."""
    folders, sizes = [directory], {}
    for folder in folders:  # grows while it is walked
        for entry in folder.iterdir():
            if entry.is_dir():
                folders.append(entry)
            else:
                sizes[entry.relative_to(directory).as_posix()] = entry.stat().length
    return folders, sizes


def check_regular(directory: epath.Path) -> None:
    """Raises OSError if something below is no file: TensorStore would wait at a FIFO for ever."""
    todo = [str(directory)] if is_local(directory) else []
    for folder in todo:  # grows while it is walked
        with os.scandir(folder) as entries:
            for entry in entries:
                mode = entry.stat().st_mode
                if stat.S_ISDIR(mode) and not entry.is_symlink():
                    todo.append(entry.path)
                elif not stat.S_ISREG(mode):
                    raise OSError(f"{entry.path} is no regular file")


def flush(path: epath.Path) -> None:
    """Makes the content of a local file that another hand wrote durable."""
    if is_local(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
