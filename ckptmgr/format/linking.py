"""A second folder for the same files on a disk: hard links where the file system has them, else copies."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable

from etils import epath

from ckptmgr.format import files

_NO_LINKS = {errno.EPERM, errno.EACCES, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}
"""The file system has no hard links, the file has too many or is another user's, or it is on another disk."""


def link(source: epath.Path, target: epath.Path, names: Iterable[str]) -> None:
    """Gives files of a folder the same names in another one. What is copied is durable when this returns."""
    copied = []
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if not _is_linked(source / name, target / name):
            shutil.copyfile(source / name, target / name)
            copied.append(target / name)
    files.sync(copied)


def _is_linked(source: epath.Path, target: epath.Path) -> bool:
    """Makes a hard link; False if that cannot be done here."""
    try:
        os.link(source, target)
    except OSError as problem:
        if problem.errno not in _NO_LINKS:
            raise
        return False
    return True
