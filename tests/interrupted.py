"""Ctrl-C at random moments of a loop that saves: `python interrupted.py DIRECTORY SEED COUNT MAX_HOST_BYTES`.

After each interrupt the arrays are overwritten, as a program may do that catches it. At the end every save that
was accepted must be there, and every step that is listed must be what was given to its call.
"""

import random
import signal
import sys
import threading

import guard
import numpy as np

import ckptmgr

guard.install()


def values(step):
    return {f"w{place}": np.full(20_000, step * 10 + place, np.float64) for place in range(6)}


def interrupt_soon(seconds):
    timer = threading.Timer(seconds, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    timer.start()
    return timer


def main(directory, seed, count, max_host_bytes):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    draw, step, accepted, lost, interrupts = random.Random(int(seed)), 0, set(), set(), 0
    manager = ckptmgr.CheckpointManager(directory, max_host_bytes=int(max_host_bytes) or None, timeout_s=60)
    manager.save(step, values(step)).result()  # on a busy machine no other may be accepted
    accepted.add(step)
    for _ in range(int(count)):
        params = {}
        try:
            timer = interrupt_soon(draw.uniform(0, 0.03))
            try:
                while True:
                    step += 1
                    params = values(step)
                    if manager.save(step, params):
                        accepted.add(step)
                    draw.choice([manager.wait, manager.steps, lambda: manager.restore(layout=ckptmgr.HOST)])()
            except ckptmgr.SaveError as problem:  # of a call that was interrupted before everything was copied
                lost.add(problem.step)
            except ckptmgr.CheckpointNotFoundError:
                lost |= accepted
            timer.join()
        except KeyboardInterrupt:
            interrupts += 1
            for array in params.values():
                array[...] = -1
    try:
        manager.close()
    except ckptmgr.SaveError as problem:
        lost.add(problem.step)
        manager.close()
    reader = ckptmgr.CheckpointManager(directory, read_only=True)
    listed = set(reader.steps())
    for each in listed:
        found = reader.restore(each, layout=ckptmgr.HOST).params
        assert all((found[name] == array).all() for name, array in values(each).items()), each
    print("lost", sorted(accepted & lost | accepted - listed), "after", interrupts, "interrupts")


if __name__ == "__main__":
    main(*sys.argv[1:])
