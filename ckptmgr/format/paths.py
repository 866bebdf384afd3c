"""Paths of runs: on this machine's disks, or in a bucket."""

from __future__ import annotations

import errno
import importlib.util
import os
import stat
from typing import BinaryIO, cast

from etils import epath
from etils.epath import backend, gpath

from ckptmgr.errors import CheckpointError

_NEEDS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
_ONE_READ = {"s3": {"max_concurrency": 1}}
"""What the client is told so that it does not ask for the size first."""
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
"""Errors that mean that there is no such file; after any other error there may be one."""
_MOST_BYTES = 1 << 30  # the largest file that is read whole; ours are smaller
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)  # without it, open waits at a FIFO


class BucketPath(gpath.PosixGPath):  # type: ignore[misc]
    """A path in a bucket that is read and written through the clients of fsspec, as all of ckptmgr does it.

    Where TensorFlow is installed, etils would take TensorFlow's client, which knows neither the address of the
    server nor the credentials. EPATH_USE_TF=0 forbids that too, but for every other user of etils in the process.
    """

    @property
    def _backend(self) -> backend.Backend:
        return backend.fsspec_backend


def path_of(path: str | os.PathLike[str]) -> epath.Path:
    """A path as `resolve` makes it, of one that is absolute."""
    return epath.Path(path) if is_local(path) else BucketPath(path)


def is_local(path: str | os.PathLike[str]) -> bool:
    return "://" not in str(path)


def open_to_write(path: str | os.PathLike[str], flags: int) -> int:
    """Opens a local file, or makes it; raises OSError if it is a symlink."""
    try:
        descriptor = os.open(path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | _AT_ONCE, 0o666)
    except OSError as problem:
        if problem.errno == errno.ELOOP or os.path.islink(path):
            raise OSError(
                f"{path} is a symlink, and ckptmgr does not write through symlinks: the target may be of others. "
                "Remove the symlink"
            ) from problem
        if problem.errno == errno.EISDIR:
            raise IsADirectoryError(
                f"{path} is a directory; ckptmgr needs a file of that name. Move the directory away"
            ) from problem
        raise
    return _regular(descriptor, path)


def open_to_read(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file, also through a symlink; raises OSError for anything else.

    It does not wait at a FIFO, and does not read a device without an end.
    """
    if not is_local(path):
        return cast(BinaryIO, path_of(path).open("rb"))
    return open(descriptor_to_read(path), "rb")


def descriptor_to_read(path: str | os.PathLike[str]) -> int:
    """The same as a file descriptor, of a file on a disk."""
    return _regular(os.open(path, os.O_RDONLY | _AT_ONCE), path)


def _regular(descriptor: int, path: str | os.PathLike[str]) -> int:
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(f"{path} is not a regular file")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a small file; in a bucket that is one request."""
    if not is_local(path):
        more = _ONE_READ.get(str(path).partition("://")[0], {})
        return bytes(backend.fsspec_backend.fs(str(path)).cat_file(str(path), **more))
    with open_to_read(path) as file:
        if (found := os.fstat(file.fileno()).st_size) > _MOST_BYTES:
            raise OSError(f"{path} has {found} bytes, too many for such a file")
        return file.read()


def size(path: epath.Path) -> int:
    """The size of a file; it is opened, to see that it can be read."""
    if not is_local(path):
        return int(path.stat().length)
    with open_to_read(path) as file:
        return os.fstat(file.fileno()).st_size


def may_exist(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file of this name; True also if that cannot be found out."""
    if not is_local(path):
        return bool(path_of(path).exists())
    try:
        os.lstat(path)
    except (OSError, ValueError) as problem:
        return getattr(problem, "errno", errno.ENOENT) not in ABSENT
    return True


def refuse_exhausted(problem: BaseException) -> None:
    """Raises CheckpointError if memory or open files ran out: then the file itself may be whole."""
    is_said = str(problem).startswith("RESOURCE_EXHAUSTED")  # by TensorStore
    if is_said or isinstance(problem, MemoryError) or getattr(problem, "errno", None) in _EXHAUSTED:
        raise CheckpointError(
            f"this process has run out of memory or of open files (ulimit -n): {problem}"
        ) from problem


def refuse_link(path: str | os.PathLike[str]) -> None:
    """Raises OSError if this directory, in which a file is to be written, is a symlink."""
    if is_local(path) and os.path.islink(path):
        raise OSError(
            f"{path} is a symlink; ckptmgr writes only into the directory itself: use {os.path.realpath(path)}"
        )


def resolve(directory: str | os.PathLike[str], option: str = "directory") -> epath.Path:
    """The directory as an absolute path; `~` and relative paths are resolved now."""
    if not isinstance(directory, str | os.PathLike) or not str(directory):
        raise TypeError(f"{option} takes a path, not {directory!r}")
    if is_local(directory):
        return _on_disk(os.fspath(directory), option)
    _check_installed(str(directory).partition("://")[0], option)
    return path_of(directory)


def _on_disk(path: str, option: str) -> epath.Path:
    """An absolute path on this machine; raises ValueError if a bucket is meant, or etils reads it as one."""
    takes = f"{option} takes a path on this machine, gs:// or s3://, not"
    scheme, colon, below = path.partition(":/")
    if colon and scheme in _NEEDS:
        raise ValueError(
            f"{takes} {path}: write '{scheme}://{below}' as text. (A path object makes one slash of two, and then "
            f"this is a folder named '{scheme}:'.)"
        )
    absolute = os.path.abspath(os.path.expanduser(path))
    found = epath.Path(absolute)
    if not is_local(found):  # etils reads /s3/x as s3://x
        raise ValueError(
            f"{takes} {absolute}: it would be read as {found}. For a bucket write '{found}'. For a folder on this "
            f"machine give a path that does not begin with {absolute[:4]}, for example a symlink to it"
        )
    return found


def _check_installed(scheme: str, option: str) -> None:
    if scheme not in _NEEDS:
        raise ValueError(f"{option} takes a path on this machine, gs:// or s3://, not {scheme}://")
    package, extra = _NEEDS[scheme]
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{scheme}:// needs {package}: pip install 'ckptmgr[{extra}]'")
