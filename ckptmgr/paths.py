"""Paths of runs: on this machine's disks, or in a bucket."""

from __future__ import annotations

import errno
import importlib.util
import os

from etils import epath

_NEEDS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}


def is_local(path: str | os.PathLike[str]) -> bool:
    return "://" not in str(path)


def open_to_write(path: str | os.PathLike[str], flags: int) -> int:
    """A descriptor of a local file that is made if it is not there; a symlink in its place is refused."""
    try:
        return os.open(
            path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), 0o666
        )
    except OSError as problem:
        if problem.errno == errno.ELOOP or os.path.islink(path):
            raise OSError(
                f"{path} is a symlink, and what it leads to might be a file of others: ckptmgr does not write to "
                "it. Remove the symlink"
            ) from problem
        if problem.errno == errno.EISDIR:
            raise IsADirectoryError(
                f"{path} is a directory; ckptmgr needs a file of that name. Move the directory away"
            ) from problem
        raise


def refuse_link(path: str | os.PathLike[str]) -> None:
    """Raises if this directory, to which something is to be written, is a symlink."""
    if is_local(path) and os.path.islink(path):
        raise OSError(
            f"{path} is a symlink; ckptmgr writes only to the directory itself, {os.path.realpath(path)}"
        )


def resolve(directory: str | os.PathLike[str], option: str = "directory") -> epath.Path:
    """The directory as an absolute path: `~` and what is relative mean what they mean now."""
    if not isinstance(directory, str | os.PathLike) or not str(directory):
        raise TypeError(f"{option} takes a path, not {directory!r}")
    if is_local(directory):
        return epath.Path(os.path.abspath(os.path.expanduser(os.fspath(directory))))
    _check_installed(str(directory).partition("://")[0], option)
    return epath.Path(directory)


def _check_installed(scheme: str, option: str) -> None:
    if scheme not in _NEEDS:
        raise ValueError(f"{option} takes a path on this machine, gs:// or s3://, not {scheme}://")
    package, extra = _NEEDS[scheme]
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{scheme}:// needs {package}: pip install 'ckptmgr[{extra}]'")
