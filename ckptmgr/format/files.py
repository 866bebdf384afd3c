"""Small files, written so that they survive a power cut (if the disk is honest about flushes)."""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from etils import epath

from ckptmgr.format import objects
from ckptmgr.format.paths import is_local, open_to_write, refuse_exhausted

Result = TypeVar("Result")
_AT_ONCE = 32  # requests for small files in a bucket
_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 40


def write(path: epath.Path, data: bytes, *, durable: bool = True) -> None:
    """Writes a file. On a local disk its content is durable when this returns; its name only after `sync`.

    Raises OSError if the path is a symlink, or if in a bucket another process has written it. With `durable=False`
    the content, too, waits for `sync`: to flush many files together takes a disk less time.
    """
    if not is_local(path):
        objects.create(path, data)
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
        return [directory], {name: found.size for name, found in objects.below(directory).items()}
    folders, sizes = [directory], {}
    for folder in folders:  # grows while it is walked
        place = "" if folder == directory else f"{folder.relative_to(directory).as_posix()}/"
        for name, is_folder, size in _entries(folder):
            if is_folder:
                folders.append(folder / name)
            else:
                sizes[place + name] = size
    return folders, sizes


def _entries(folder: epath.Path) -> Iterator[tuple[str, bool, int]]:
    """Name, kind and size of what is in a folder. A step of thousands of processes has many thousands of files."""
    with os.scandir(folder) as entries:
        for entry in entries:
            is_folder = entry.is_dir()
            yield entry.name, is_folder, 0 if is_folder else entry.stat().st_size


def for_each(directory: epath.Path, act: Callable[[str], Result], names: Iterable[str]) -> Iterator[Result]:
    """Calls `act` for names in a directory, in order: in a bucket, where each is a request, many at a time."""
    if is_local(directory):
        yield from map(act, names)
        return
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as threads:
        yield from threads.map(act, names)


def put_all(source: epath.Path, target: epath.Path) -> dict[str, bytes]:
    """Puts the files below a folder of this machine into a bucket, at the same time; returns what they hold."""

    def put(name: str) -> bytes:
        data = bytes((source / name).read_bytes())
        write(target / name, data)
        return data

    found = walk(source)[1]
    return dict(zip(found, for_each(target, put, found), strict=True))


def remove_tree(folder: epath.Path) -> None:
    """Removes a folder and all that is below it, if it is there."""
    if not is_local(folder):
        objects.delete_below(folder)
    elif folder.exists():
        folder.rmtree()


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
