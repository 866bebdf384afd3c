"""What may happen to a process of a job, "KIND ACT", as it comes to an act of a save or a restore.

    kill    SIGKILL
    stop    SIGSTOP; a test lets it go on, or kills it
    cut     SIGSTOP too: a test takes the network away, and lets it go on

An act is a call that the processes make together, by its name, or a function. The process notes when it was there,
in a file.
"""

import functools
import importlib
import os
import signal
import time

CALLS = tuple(f"ckptmgr.processes.job:Job.{name}" for name in ("decide", "collect", "_share"))
SAVE = {
    "leaves": "ckptmgr.saving.items:Composer.compose",  # the first act
    "copies": "ckptmgr.saving.copying:Copier.copy",
    "the save of step STEP": CALLS,  # the second
    "the directories of step STEP": CALLS,
    "arrays": "ckptmgr.arrays.writing:write_wave",
    "the arrays of step STEP": CALLS,
    "seal": "ckptmgr.saving.committing:Committer._seal",
    "publish": "ckptmgr.saving.committing:Committer._publish",
    "the commit of step STEP": CALLS,
    "retention": "ckptmgr.saving.aftermath:Aftermath._retain",
}
RESTORE = {
    "the choice of a step to restore": CALLS,
    "place": "ckptmgr.restoring.reading:Trees.place",
    "the restore from step STEP": CALLS,
}
BROADCAST = RESTORE | {
    "the reading from step STEP": CALLS,
    "sum": "ckptmgr.arrays.broadcast:_sum_block",
}
ACTS = {"save": SAVE, "restore": RESTORE, "broadcast": BROADCAST}
OF_PROCESS_0 = {"seal", "publish", "retention"}
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "cut": signal.SIGSTOP}


def install(emergency, acts, step, at):
    """It happens the first time that this process comes to the act, of this step, from now on."""
    kind, _, act = emergency.partition(" ")
    found = acts[act]
    for place in [found] if isinstance(found, str) else found:
        _watch(place, act.replace("STEP", str(step)) if found is CALLS else None, SIGNALS[kind], at)


def _watch(place, call, number, at):
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    real = getattr(owner, name)

    def watched(*args, **kwargs):
        if (call is None or str(args[1]) == call) and not os.path.exists(at):
            with open(at, "w") as file:
                file.write(str(time.monotonic()))
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    setattr(owner, name, watched)
