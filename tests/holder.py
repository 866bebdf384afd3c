"""A process that writes into a run, for the tests of claims: python holder.py RUN [MACHINE].

It saves step 1, then does what it is told, a line at a time, and says a line about each: "save N", "pause POINT"
(the next time it comes there it says "paused", and waits for a line), "close".
"""

import functools
import importlib
import socket
import sys

import trainer

import ckptmgr
from ckptmgr.run import owner

POINTS = {
    "arrays": "ckptmgr.arrays.writing:write_wave",
    "description": "ckptmgr.orbax.writing:_describe",
    "seal": "ckptmgr.saving.sealing:check",
    "files": "ckptmgr.format.files:write",
}


def main():
    run, *machine = sys.argv[1:]
    if machine:
        owner.machine = socket.gethostname = lambda: machine[0]
    with ckptmgr.CheckpointManager(run) as manager:
        manager.save(1, trainer.state(1)).result()
        say("open")
        for line in sys.stdin:
            what, _, given = line.strip().partition(" ")
            if what == "close":
                break
            {"save": lambda given: save(manager, int(given)), "pause": pause}[what](given)
    say("closed")


def save(manager, step):
    try:
        manager.save(step, trainer.state(step)).result()
        say(f"saved {step}")
    except ckptmgr.SaveError as problem:
        say(f"refused: {problem}")


def pause(point):
    module, _, name = POINTS[point].partition(":")
    module = importlib.import_module(module)
    real = getattr(module, name)

    @functools.wraps(real)
    def paused(*args, **given):
        setattr(module, name, real)
        say("paused")
        sys.stdin.readline()
        return real(*args, **given)

    setattr(module, name, paused)
    say(f"pauses at {point}")


def say(line):
    print(line, flush=True)


if __name__ == "__main__":
    main()
