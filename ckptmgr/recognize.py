"""Which folders of a run on a disk are checkpoints: those in which ckptmgr or Orbax finished something.

What has the name of a step and is none is somebody's: an empty folder, notes, a copy that is half made or that has
got another number.
"""

from __future__ import annotations

import errno
import os
import re

from ckptmgr import manifest as manifests
from ckptmgr import names, paths
from ckptmgr.errors import CheckpointError

_ITEM_SIGNS = ("_METADATA", names.COMMITTED)
"""Files of Orbax in an item; an older version wrote none beside the items."""
_HEAD = re.compile(rb'\{"format":[0-9]+,"step":([0-9]+),')
_HEAD_BYTES, _SMALL_BYTES = 64, 1 << 20


def is_step(path: str) -> bool:
    """Whether a folder is a checkpoint of the step that it is named after."""
    if _leads_beside(path):
        return False
    if paths.may_exist(os.path.join(path, manifests.NAME)):
        return not _is_of_another_step(path)
    if is_signed(path):
        return _is_marked(path)
    return paths.may_exist(os.path.join(path, names.STEP_METADATA)) or _has_items(path)


def is_signed(path: str) -> bool:
    """Whether Orbax's metadata of a folder says that ckptmgr wrote it."""
    return b'"ckptmgr"' in begin(os.path.join(path, names.STEP_METADATA), _SMALL_BYTES)


def _leads_beside(path: str) -> bool:
    """Whether it is a symlink to another entry of the same run. (A step may be one, to another disk.)"""
    return os.path.islink(path) and os.path.dirname(os.path.realpath(path)) == os.path.realpath(
        os.path.dirname(path)
    )


def _is_of_another_step(path: str) -> bool:
    """Whether it is a copy of another step; a number that is damaged proves nothing."""
    file = os.path.join(path, manifests.NAME)
    head, own = _HEAD.match(begin(file, _HEAD_BYTES)), names.number(os.path.basename(path))
    if head is None or own is None or int(head[1]) == own or _is_marked(path):
        return False
    try:
        with open(file, "rb") as opened:
            manifests.decode(opened.read(), step=int(head[1]), path=file)
    except (OSError, CheckpointError):
        return False
    return True


def _is_marked(path: str) -> bool:
    """Whether the file that is written before the manifest names this step.

    If not, the folder is a copy that is half made, or was made under another name.
    """
    said = begin(os.path.join(path, names.COMMITTED), _SMALL_BYTES)
    return said.rpartition(b"/")[2].strip() == os.fsencode(os.path.basename(path))


def _has_items(path: str) -> bool:
    if any(paths.may_exist(os.path.join(path, name)) for name in _ITEM_SIGNS):
        return True
    try:
        with os.scandir(path) as entries:
            folders = [entry.path for entry in entries if is_folder(entry)]
    except OSError as problem:
        paths.refuse_exhausted(problem)
        return problem.errno not in paths.ABSENT  # so that no step goes unnoticed
    return any(paths.may_exist(os.path.join(folder, name)) for folder in folders for name in _ITEM_SIGNS)


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as problem:
        if problem.errno == errno.ELOOP:  # a symlink to itself
            return False
        raise


def begin(file: str, size: int) -> bytes:
    """The first bytes of a file; of one that cannot be read, nothing. Does not wait for the writer of a FIFO."""
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except OSError as problem:
        paths.refuse_exhausted(problem)
        return b""
    try:
        return os.read(descriptor, size)
    except OSError:
        return b""
    finally:
        os.close(descriptor)
