"""Faults by name, injected into the code that really runs: "KIND POINT TURN", the TURN-th time POINT is reached.

    before, after   SIGKILL
    fail            an I/O error of the disk
    full            no space left on the disk
    refuse          a server says no, in an error of its library that is no OSError
    slow            five seconds go by
    short           half of a small file is written, then an I/O error (point "file" alone)

A new kind goes into `KINDS`, a new place into `POINTS`: `test_crash.py` then kills before and after it, at its
fourth time. Faults in what is on the disk are in `odd_files.py` and `strangers.py`.

A subprocess takes them from CKPTMGR_FAULT: `CKPTMGR_FAULT="before publish 2"`.

Those of a run's directory enter through `FaultyDirectory`, which lies around each directory that is opened after
this is imported.
"""

import errno
import functools
import importlib
import os
import signal
import time

from ckptmgr.run import catalog
from ckptmgr.run.directory import Directory

POINTS = {
    "arrays": "ckptmgr.arrays.writing:write_wave",  # the arrays of one item
    "description": "ckptmgr.orbax.writing:_describe",  # Orbax's JSON files about it
    "file": "ckptmgr.format.files:write",  # any small file, the manifest last
    "sync": "ckptmgr.format.files:sync",  # names made durable
    "publish": "faults:FaultyDirectory.publish",  # the rename
    "note": "faults:FaultyDirectory.after_publish",  # in a bucket the note that the step is written is removed
    "exchange": "ckptmgr.format.files:exchange",  # the swap of a step that is replaced
    "retain": "ckptmgr.saving.aftermath:Aftermath._retain",
    "choose": "ckptmgr.run.history:History.decide_deletions",  # what is to be deleted
    "delete": "faults:FaultyDirectory.hide",
    "remove": "faults:FaultyDirectory.remove",  # the files of what is in no listing any more
    "rename": "os:rename",  # of any directory
}
MIRROR_POINTS = {
    "put": "ckptmgr.run.transfer:put",  # files copied to the mirror
    "check": "ckptmgr.run.mirror:Mirror._check",  # the copy is read back
    "make step": "faults:FaultyDirectory.publish",  # the copy gets its name
}
REDUCE_POINTS = {
    "link": "ckptmgr.format.linking:link",  # the files that stay get a second name
    "reduce": "faults:FaultyDirectory.reduce",  # a step loses items
}
REWIND_POINTS = {
    "plan": "faults:FaultyDirectory.write_plan",  # what is to be moved
    "move": "faults:FaultyDirectory.move",  # one checkpoint
    "moved": "faults:FaultyDirectory.has_moved",  # what is still to be moved
    "copy": "ckptmgr.run.bucket:copy",
}
JOB_POINTS = {
    "draft": "faults:FaultyDirectory.draft",  # where a process other than 0 writes its arrays
    "local draft": "ckptmgr.run.tier:Tier.draft",
    "read": "ckptmgr.run.catalog:_read_manifest",  # the manifest of a step, once it is committed
    "glance": "ckptmgr.run.history:History.glance",
}
SLOW_S = 5.0  # longer than what is timed beside it takes on a busy machine


class FaultyDirectory:
    """The directory of a run that passes every call on, unless `install` has put a fault in the way."""

    def __init__(self, real):
        self._real = real
        self.path, self.can_replace = real.path, real.can_replace


def _pass_on(name):
    return lambda self, *args, **given: getattr(self._real, name)(*args, **given)


for _name in {*vars(Directory)} - {*vars(object)}:
    if not _name.startswith("_"):
        setattr(FaultyDirectory, _name, _pass_on(_name))
catalog.open_directory = lambda path, real=catalog.open_directory: FaultyDirectory(real(path))


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
    module, _, path = (POINTS | MIRROR_POINTS | REDUCE_POINTS | REWIND_POINTS | JOB_POINTS)[point].partition(":")
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
