"""Reduces a step to its params, and is killed on the way: `python reducer.py RUN STEP MOMENT [no-exchange]`.

MOMENT counts what is done to the files of the run, as Python's audit events tell it; the process is killed just
before the MOMENT-th. In a bucket it counts requests. Says `done` if it comes to its end.
"""

import os
import signal
import sys
import time

from etils import epath

from ckptmgr.format import files
from ckptmgr.run.catalog import open_catalog

EVENTS = {"open", "os.link", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"}


def main(run, step, moment, *how):
    catalog, seen = open_catalog(epath.Path(run)), []
    catalog.steps()

    def count(event, arguments):
        if event == "exchange" or (event in EVENTS and run in str(arguments)):
            seen.append(event)
            if len(seen) == int(moment):
                os.kill(os.getpid(), signal.SIGKILL)

    swap = files.exchange

    def exchange(one, other):
        count("exchange", ())
        done = swap(one, other) if not how else False
        count("exchange", ())
        return done

    def asking(name, ask):
        return lambda *given: (count("exchange", ()), ask(*given))[1]

    files.exchange = exchange
    if "://" in run:
        store = catalog._storage._objects
        for name in ("list", "read", "delete", "write", "fetch", "replace"):
            setattr(store, name, asking(name, getattr(store, name)))
    sys.addaudithook(count)
    catalog.remove(*catalog.reduce(int(step), "params_only(every_steps(10))", time.time()))
    print("done", len(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
