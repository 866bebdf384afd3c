"""Trains digits.py, kills it in the middle of a save, resumes it, and compares it with a run that never stopped.

    python docs/examples/demo.py [--steps 600] [--save-every 20]

Exits with 1 if one bit differs.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import ckptmgr
from ckptmgr.testing import assert_trees_equal

DIGITS = Path(__file__).with_name("digits.py")


def command(directory, arguments):
    options = ["--steps", str(arguments.steps), "--save-every", str(arguments.save_every)]
    return [sys.executable, str(DIGITS), str(directory), *options]


def kill_in_a_save(directory, arguments):
    """Starts a run and sends SIGKILL while a checkpoint past the middle is half written; its step."""
    run = subprocess.Popen(command(directory, arguments))
    while run.poll() is None:
        unfinished = [path for path in directory.glob("*.orbax-checkpoint-tmp") if (path / "params").exists()]
        if unfinished and int(unfinished[0].name.split(".")[0]) > arguments.steps // 2:
            run.send_signal(signal.SIGKILL)
            run.wait()
            if unfinished[0].exists():
                return unfinished[0].name
            print("  it had just been committed; trying again", flush=True)
            run = subprocess.Popen(command(directory, arguments))
        time.sleep(0.0005)
    sys.exit("the run ended before it could be killed; give it more --steps")


def go_on(directory, arguments):
    subprocess.run(command(directory, arguments), check=True)


def losses(directory):
    """Step -> its loss. A step that was done again after the kill must have given the same one."""
    found = {}
    for line in (directory / "losses.txt").read_text().splitlines():
        step, loss = line.split()
        found.setdefault(int(step), set()).add(float.fromhex(loss))
    return {step: np.array(sorted(values)) for step, values in found.items()}


def final(directory):
    manager = ckptmgr.CheckpointManager(directory, read_only=True)
    return manager.restore()


def compare(what, one, other):
    try:
        assert_trees_equal(one, other)
    except AssertionError as difference:
        print(f"  {what:<34} DIFFERS: {difference}")
        return False
    print(f"  {what:<34} {len(jax.tree.leaves(one)):>4} of {len(jax.tree.leaves(one))} equal, bit for bit")
    return True


def main(arguments):
    with tempfile.TemporaryDirectory(prefix="ckptmgr-demo-") as scratch:
        killed, straight = Path(scratch, "killed"), Path(scratch, "straight")
        print("1. a run, killed with SIGKILL in the middle of an asynchronous save", flush=True)
        killed.mkdir()
        left = kill_in_a_save(killed, arguments)
        committed = ckptmgr.CheckpointManager(killed, read_only=True).steps()
        print(f"  killed; half written: {left}; whole: {committed}")
        print("2. the same command again", flush=True)
        go_on(killed, arguments)
        print("3. a run that is never stopped", flush=True)
        straight.mkdir()
        go_on(straight, arguments)

        print(f"4. the two at step {arguments.steps}")
        one, other = final(killed), final(straight)
        equal = [
            compare("parameters", one.params, other.params),
            compare("optimizer state", one.opt_state, other.opt_state),
            compare("dropout key and data position", one.extras, other.extras),
            compare("losses of all steps", losses(killed), losses(straight)),
        ]
        print("All equal: the kill left no trace." if all(equal) else "NOT EQUAL")
        sys.exit(0 if all(equal) else 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--save-every", type=int, default=20)
    main(parser.parse_args())
