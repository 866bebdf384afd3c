"""Faults by name: `CKPTMGR_FAULT="before publish 2"` ends a process there, the second time it comes by.

Real code runs up to the point and not beyond it: the signal is SIGKILL.
"""

import functools
import importlib
import os
import signal

POINTS = {
    "arrays": "ckptmgr.storage.arrays:write_wave",  # the transaction of one item
    "description": "ckptmgr.storage.arrays:describe",  # Orbax's JSON files about it
    "file": "ckptmgr.storage.files:write",  # any small file, the manifest last
    "sync": "ckptmgr.storage.files:sync",  # names made durable
    "publish": "ckptmgr.storage.orbax:_publish",  # the rename
    "exchange": "ckptmgr.storage.orbax:_exchange",  # the swap of a step that is replaced
    "retain": "ckptmgr.manager:CheckpointManager._retain",
    "delete": "ckptmgr.catalog:Catalog.delete",
}


def install(fault):
    """Puts the fault in its place; "" is none."""
    if not fault:
        return
    when, point, turn = fault.split()
    module, _, path = POINTS[point].partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    real, seen = getattr(owner, name), []

    def faulty(*args, **kwargs):
        seen.append(1)
        if len(seen) == int(turn) and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if len(seen) == int(turn):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, faulty)
