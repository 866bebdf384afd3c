"""What may lie in the place of a file of a step, and what a manager must say of the step then.

As a program, `python odd_files.py RUN (EACCES | EIO | ESTALE)` has the system refuse each file of the newest step
in turn, and prints what was wrong, a line each.
"""

import contextlib
import ctypes
import errno
import os
import pathlib
import socket
import sys

import jax
import numpy as np

import ckptmgr
from ckptmgr.cli import facts


def _bind(path):
    here = os.getcwd()
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(path.parent)  # the name of a socket must be short
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


def _huge(path):
    path.touch()
    os.truncate(path, 1 << 40)


FILES = {
    "nothing": lambda path: None,
    "an empty file": lambda path: path.touch(),
    "a short file": lambda path: path.write_bytes(b"{"),
    "a directory": lambda path: (path / "below").mkdir(parents=True),
    "an empty directory": lambda path: path.mkdir(),
    "a FIFO": os.mkfifo,
    "a socket": _bind,
    "a symlink to itself": lambda path: path.symlink_to(path.name),
    "a dangling symlink": lambda path: path.symlink_to("nowhere"),
    "a symlink to a directory": lambda path: path.symlink_to("."),
    "what gives an I/O error": lambda path: path.symlink_to("/proc/self/mem"),
    "a device without an end": lambda path: path.symlink_to("/dev/zero"),
    "a device that is full": lambda path: path.symlink_to("/dev/full"),
    "a huge file": _huge,
}
FOLDERS = {name: FILES[name] for name in FILES if name not in ("an empty directory", "a directory", "a huge file")}


@contextlib.contextmanager
def instead_of(path, put):
    """Puts something in the place of a file or a directory, for a while."""
    aside = next(each for each in path.parents if each.name == "2").parent.parent / "aside"
    path.rename(aside)
    try:
        put(path)
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            for below in path.iterdir():
                below.rmdir()
            path.rmdir()
        elif os.path.lexists(path):
            path.unlink()
        aside.rename(path)


def values(directory):
    """What the newest step holds, without a template."""
    return plain(ckptmgr.CheckpointManager(directory, read_only=True).restore(layout=ckptmgr.HOST))


def plain(found):
    """What was restored, as numpy arrays."""
    leaves, treedef = jax.tree.flatten((found.params, found.opt_state, dict(found.extras)))
    is_key = [jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key) for leaf in leaves]
    words = [jax.random.key_data(leaf) if key else leaf for leaf, key in zip(leaves, is_key, strict=True)]
    return jax.tree.unflatten(treedef, map(np.asarray, words))


def is_equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b))
    )


def wrong(directory, name, saved):
    """What is said or done wrongly of a run of two steps: `name` of the second cannot be read."""
    run = ckptmgr.CheckpointManager(directory, read_only=True)
    older, newer = run.steps()
    found = run.restore(layout=ckptmgr.HOST)
    if found.step == newer:  # stock Orbax has files that nothing depends on
        return [] if is_equal(saved, plain(found)) else ["another value was restored"]
    problems = [] if name in found.skipped.get(newer, "") else [f"skipped as {found.skipped}"]
    try:
        run.restore(newer)
        problems.append("restored by its number")
    except ckptmgr.CorruptCheckpointError as problem:
        problems += [] if name in f"{problem} {problem.path}" else [f"restore says {problem}"]
    report = run.verify(newer)
    if report or name not in str(report):
        problems.append(f"verify says {report}")
    for reader in (run, ckptmgr.CheckpointManager(directory, read_only=True)):
        if (reader.latest(), reader.steps()) != (newer, [older, newer]):
            problems.append(f"listed as {reader.steps()}")
        with contextlib.suppress(ckptmgr.CorruptCheckpointError):
            reader.info(newer)
        with contextlib.suppress(ckptmgr.CorruptCheckpointError):
            reader.diff(newer, params=found.params)
        seen = [reader.infos(), reader.best("loss"), list(reader.watch(timeout_s=0)), facts.run(reader)]
        if seen[0][0].step != older:
            problems.append(f"infos says {seen}")
    return problems


# ---------------------------------------------------------------- what the system refuses


def _without_rights(path):
    os.chmod(path, 0)
    os.seteuid(65534)


def _with_rights(path, mode):
    os.seteuid(0)
    os.chmod(path, mode)


@contextlib.contextmanager
def refused(path, how):
    if how == "EACCES":
        mode = path.stat().st_mode
        _without_rights(path)
        try:
            yield
        finally:
            _with_rights(path, mode)
    else:
        shim = ctypes.CDLL(None)
        shim.refuse(str(path).encode(), getattr(errno, how))
        try:
            yield
        finally:
            shim.refuse(b"", 0)


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>
static char bad[PATH_MAX]; static int with;
void refuse(const char *path, int number) { with = 0; strncpy(bad, path, sizeof bad - 1); with = number; }
static int is_bad(int fd) {
  char link[64], path[PATH_MAX]; ssize_t n;
  if (!with) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return strcmp(path, bad) == 0;
}
#define SHIM(name, type, args, given) \
  type name args { static type (*real) args; if (is_bad(fd)) { errno = with; return -1; } \
    if (!real) real = dlsym(RTLD_NEXT, #name); return real given; }
SHIM(read, ssize_t, (int fd, void *to, size_t n), (fd, to, n))
SHIM(pread, ssize_t, (int fd, void *to, size_t n, off_t at), (fd, to, n, at))
SHIM(pread64, ssize_t, (int fd, void *to, size_t n, off64_t at), (fd, to, n, at))
SHIM(preadv, ssize_t, (int fd, const struct iovec *to, int n, off_t at), (fd, to, n, at))
SHIM(preadv64, ssize_t, (int fd, const struct iovec *to, int n, off64_t at), (fd, to, n, at))
"""


def main(directory, how):
    saved = values(directory)
    step = directory / "2"
    for path in sorted(path for path in step.rglob("*") if path.is_file() or how == "EACCES"):
        name = path.relative_to(step).as_posix()
        with refused(path, how):
            for problem in wrong(directory, path.name, saved):
                print(f"{name}: {problem}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2])
