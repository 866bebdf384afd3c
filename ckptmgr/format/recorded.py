"""The files of a step: sizes and checksums, recorded when it is saved and compared when it is read."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from etils import epath

from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format import files, paths
from ckptmgr.format.manifest import NAME, File, Manifest

_SMALL_BYTES = 8 << 20
_BLOCK_BYTES = 96 << 10  # what malloc need not fetch from the system, page by page, each time
_OWN = re.compile(r"/(?:ocdbt\.)?process_([0-9]+)(?:/|\.json$)")
"""A file that one of several processes has written."""


def checks_itself(directory: epath.Path) -> Callable[[str, int], bool]:
    """Which files need no checksum in the manifest, by name and size.

    Those with parts (OCDBT's nodes, and chunks) that have checksums, so that each read checks them. On a disk a
    small one gets a checksum too, which tells it from a whole file of another save. In a bucket it would have to
    be read once more for that, and has a random name that no other file has.
    """
    least_bytes = _SMALL_BYTES if paths.is_local(directory) else 0
    return lambda name, size: "/d/" in name and size > least_bytes


def record_files(
    directory: epath.Path,
    sizes: Mapping[str, int],
    checks_itself: Callable[[str, int], bool],
    known: Mapping[str, File] = MappingProxyType({}),
) -> dict[str, File]:
    """The size of every file below `directory`, and the CRC-32 of files that do not check themselves.

    A file is not read that is `known`, and still has its size.
    """

    def record(name: str) -> File:
        size = sizes[name]
        if name in known and known[name].size == size:
            return known[name]
        return File(size, None if checks_itself(name, size) else checksum(directory / name))

    found = sorted(sizes.keys() - {NAME})
    return dict(zip(found, files.for_each(directory, record, found), strict=True))


def checksum(path: str | os.PathLike[str]) -> int:
    """CRC-32 of a file, which need not fit into memory."""
    if not paths.is_local(path):  # in a bucket only small files have a checksum
        return zlib.crc32(paths.read_bytes(path))
    with paths.open_to_read(path) as file:
        return _checksum(file.fileno())


def _checksum(descriptor: int) -> int:
    found = 0
    while block := os.read(descriptor, _BLOCK_BYTES):
        found = zlib.crc32(block, found)
    return found


def check_files(
    manifest: Manifest, directory: epath.Path, items: Iterable[str], *, share: tuple[int, int] = (0, 1)
) -> None:
    """Raises CorruptCheckpointError for a missing, short or changed file of these items or of the step.

    `share`: the number of this process, and of how many that restore the step together. What the n-th process has
    written at the save is checked by the n-th of them alone, so that none has to read all files.
    """
    folders = {manifest.items[name].place(name) if name in manifest.items else name for name in items}
    chosen, root = tuple(f"{folder}/" for folder in folders), str(directory)
    here, count = share

    def is_wanted(name: str) -> bool:
        written_by = _OWN.search(name) if count > 1 else None
        is_others = written_by is not None and int(written_by[1]) % count != here
        return not is_others and ("/" not in name or "." in folders or name.startswith(chosen))

    def check(name: str) -> None:
        check_file(manifest, root, name, manifest.files[name])

    for _ in files.for_each(directory, check, filter(is_wanted, manifest.files)):
        pass


def missing_file(manifest: Manifest, directory: epath.Path) -> str | None:
    """Which file of a step on a disk is missing or has another size; None if none. No file is read."""
    for name, file in manifest.files.items():
        try:
            size = os.stat(os.path.join(directory, name)).st_size
        except (OSError, ValueError) as problem:
            return f"{name}: {problem}"
        if size != file.size:
            return f"{name} has {size} bytes instead of {file.size}"
    return None


def check_file(manifest: Manifest, directory: str, name: str, file: File) -> None:
    def damaged(why: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"step {manifest.step}: {directory}/{name} {why}", step=manifest.step, path=name
        )

    try:
        size, found = _size_and_checksum(directory, name, file)
    except FileNotFoundError:
        raise damaged("is missing") from None
    except (OSError, ValueError) as problem:  # a directory in its place, a bad sector, a name with a NUL
        paths.refuse_exhausted(problem)
        raise damaged(f"cannot be read: {problem}") from problem
    if size != file.size:
        raise damaged(f"has {size} bytes instead of {file.size}")
    if found != file.crc32:
        raise damaged("is damaged: its checksum does not match")


def _size_and_checksum(directory: str, name: str, file: File) -> tuple[int, int | None]:
    """Of a file that has another size, or none that is known, the checksum is not made."""
    path = f"{directory}/{name}"
    if not paths.is_local(path):
        data = None if file.crc32 is None else paths.read_bytes(path)
        return (paths.size(paths.path_of(path)), None) if data is None else (len(data), zlib.crc32(data))
    descriptor = paths.descriptor_to_read(path)  # without Python's own file: a step has many small ones
    try:
        size = os.fstat(descriptor).st_size
        return size, None if file.crc32 is None or size != file.size else _checksum(descriptor)
    finally:
        os.close(descriptor)
