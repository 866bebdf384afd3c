"""Small files, written so that they survive a power cut (if the disk is honest about flushes)."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable

from etils import epath

from ckptmgr.format import paths
from ckptmgr.format.paths import is_local, open_to_write, refuse_exhausted

_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 40


def write(path: epath.Path, data: bytes, *, durable: bool = True) -> None:
    """Writes a file. On a local disk its content is durable when this returns; its name only after `sync`.

    Raises OSError if the path is a symlink, or if in a bucket another process has written it. With `durable=False`
    the content, too, waits for `sync`: to flush many files together takes a disk less time.
    """
    if not is_local(path):
        paths.create_bytes(path, data)
        return
    with open(path, "wb", opener=open_to_write) as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def replace(path: epath.Path, data: bytes) -> None:
    """Writes a small file on a disk atomically: whole or not at all, also after a power cut."""
    new = path.with_name(f"{path.name}.new")
    write(new, data)
    os.replace(new, path)
    sync([path.parent])


def exchange(one: epath.Path, other: epath.Path) -> bool:
    """Swaps two names atomically (renameat2 with RENAME_EXCHANGE, Linux); False if the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def sync(places: Iterable[epath.Path]) -> None:
    """Makes durable what files hold, and the names in directories: fsync(2) of a file does not flush its name."""
    for path in filter(is_local, places):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO in its place is refused, not waited for
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def walk(directory: epath.Path) -> tuple[list[epath.Path], dict[str, int]]:
    """Every directory below and including `directory`, and the size of every file by relative name."""
    if not is_local(directory):
        return [directory], paths.sizes_below(directory)
    folders, sizes = [directory], {}
    for folder in folders:  # grows while it is walked
        for entry in folder.iterdir():
            if entry.is_dir():
                folders.append(entry)
            else:
                sizes[entry.relative_to(directory).as_posix()] = entry.stat().length
    return folders, sizes


def check_regular(directory: epath.Path) -> None:
    """Raises OSError if something below is not a file that TensorStore can read.

    TensorStore waits at a FIFO for ever. It ends the process if a file that it reads whole needs too much memory.
    """
    todo = [str(directory)] if is_local(directory) else []
    for folder in todo:  # grows while it is walked
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    found = entry.stat()
                except OSError as problem:  # a symlink without a target, a file that was deleted
                    refuse_exhausted(problem)
                    continue
                mode = found.st_mode
                if stat.S_ISDIR(mode) and not entry.is_symlink():
                    todo.append(entry.path)
                elif not stat.S_ISREG(mode):
                    raise OSError(f"{entry.path} is not a regular file")
                elif found.st_size > _MEMORY and os.path.basename(folder) != "d":  # there it reads what it needs
                    raise OSError(f"{entry.path} has {found.st_size} bytes, more than the memory of this machine")
