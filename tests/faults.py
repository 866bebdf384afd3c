"""Faults by name, injected into the code that really runs: "KIND POINT TURN", the TURN-th time POINT is reached.

    before, after   SIGKILL
    fail            an I/O error of the disk
    full            no space left on the disk
    refuse          a server says no, in an error of its library that is no OSError
    slow            five seconds go by
    short           half of a small file is written, then an I/O error (point "file" alone)

A subprocess takes them from CKPTMGR_FAULT: `CKPTMGR_FAULT="before publish 2"`.
"""

import errno
import functools
import importlib
import os
import signal
import time

POINTS = {
    "arrays": "ckptmgr.arrays.writing:write_wave",  # the arrays of one item
    "description": "ckptmgr.orbax.writing:_describe",  # Orbax's JSON files about it
    "file": "ckptmgr.format.files:write",  # any small file, the manifest last
    "sync": "ckptmgr.format.files:sync",  # names made durable
    "publish": "ckptmgr.run.local:Catalog.publish",  # the rename
    "exchange": "ckptmgr.run.local:_exchange",  # the swap of a step that is replaced
    "retain": "ckptmgr.saving.aftermath:Aftermath._retain",
    "choose": "ckptmgr.run.history:History.decide_deletions",  # what is to be deleted
    "delete": "ckptmgr.run.local:Catalog.delete",
    "remove": "ckptmgr.run.local:remove",  # the files of what is in no listing any more
    "rename": "os:rename",  # of any directory
}
MIRROR_POINTS = {
    "put": "ckptmgr.run.mirror:_put",  # files copied to the mirror
    "check": "ckptmgr.run.mirror:Mirror._check",  # the copy is read back
    "make step": "ckptmgr.run.local:Catalog.publish",  # the copy gets its name
}
REWIND_POINTS = {
    "plan": "ckptmgr.run.local:_write_durably",  # what is to be moved
    "move": "ckptmgr.run.bucket:Bucket._move",  # one checkpoint, in a bucket
    "moved": "ckptmgr.run.bucket:Bucket._write_plan",  # what is still to be moved, in a bucket
    "copy": "ckptmgr.run.bucket:Bucket._copy",
}
SLOW_S = 5.0  # longer than what is timed beside it takes on a busy machine


def _kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def _error(number):
    def act(*_):
        raise OSError(number, os.strerror(number))

    return act


def _short(path, data):
    path.write_bytes(data[: len(data) // 2])
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _refuse(*_):
    from gcsfs.retry import HttpError  # slow to import

    raise HttpError({"code": 503, "message": "Service Unavailable"})


KINDS = {
    "before": _kill,
    "fail": _error(errno.EIO),
    "full": _error(errno.ENOSPC),
    "refuse": _refuse,
    "slow": lambda *_: time.sleep(SLOW_S),
    "short": _short,
}


def install(fault, put=setattr):
    """Puts the fault in its place; "" is none. A test gives `monkeypatch.setattr` as `put`."""
    if not fault:
        return
    kind, _, rest = fault.partition(" ")
    point, _, turn = rest.rpartition(" ")
    module, _, path = (POINTS | MIRROR_POINTS | REWIND_POINTS)[point].partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    real, seen = getattr(owner, name), []

    def faulty(*args, **kwargs):
        seen.append(1)
        is_turn = len(seen) == int(turn)
        if is_turn and kind != "after":
            KINDS[kind](*args)
        result = real(*args, **kwargs)
        if is_turn and kind == "after":
            _kill()
        return result

    put(owner, name, faulty)
