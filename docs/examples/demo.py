"""Trains digits.py, kills it in the middle of a save, resumes it, and compares it with a run that never stopped.

    python docs/examples/demo.py [--steps 600] [--save-every 20] [--keep DIRECTORY]

Then goes on with it on four devices. Exits with 1 if one bit differs.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import digits
import jax
import numpy as np

import ckptmgr
from ckptmgr.testing import assert_trees_equal

DIGITS = Path(__file__).with_name("digits.py")
MORE_STEPS, DEVICES = 60, 4
SAME_LOSS = 1e-3  # relative: four devices add in another order, and training makes more of it


def command(directory, arguments, more=0, devices=1):
    options = {"--steps": arguments.steps + more, "--save-every": arguments.save_every, "--devices": devices}
    return [sys.executable, str(DIGITS), str(directory), *(str(word) for pair in options.items() for word in pair)]


def kill_in_a_save(directory, arguments):
    """Starts a run and sends SIGKILL while a checkpoint past the middle is half written; its step."""
    run = subprocess.Popen(command(directory, arguments))
    while run.poll() is None:
        unfinished = [path for path in (directory / ".ckptmgr" / "saving").glob("*") if (path / "params").exists()]
        if unfinished and int(unfinished[0].name) > arguments.steps // 2:
            run.send_signal(signal.SIGKILL)
            run.wait()
            if unfinished[0].exists():
                return f"step {unfinished[0].name}"
            print("  it had just been committed; trying again", flush=True)
            run = subprocess.Popen(command(directory, arguments))
        time.sleep(0.0005)
    sys.exit("the run ended before it could be killed; give it more --steps")


def go_on(directory, arguments, **how):
    subprocess.run(command(directory, arguments, **how), check=True)


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


def killed_and_not(scratch, arguments):
    """The first act: whether a run that was killed and resumed ends as one that was not."""
    killed, straight = scratch / "killed", scratch / "straight"
    print("1. a run, killed with SIGKILL in the middle of an asynchronous save", flush=True)
    left = kill_in_a_save(killed, arguments)
    committed = ckptmgr.CheckpointManager(killed, read_only=True).steps()
    print(f"  killed; half written: {left}; whole: {committed}")
    print("2. the same command again", flush=True)
    go_on(killed, arguments)
    print("3. a run that is never stopped", flush=True)
    go_on(straight, arguments)

    print(f"4. the two at step {arguments.steps}")
    one, other = final(killed), final(straight)
    return all([
        compare("parameters", one.params, other.params),
        compare("optimizer state", one.opt_state, other.opt_state),
        compare("dropout key and data position", one.extras, other.extras),
        compare("losses of all steps", losses(killed), losses(straight)),
    ])  # fmt: skip


def on_other_devices(scratch, arguments):
    """The second act: whether the run goes on when its weights are split over more devices."""
    spread, straight = scratch / "spread", scratch / "straight"
    shutil.copytree(straight, spread, dirs_exist_ok=True)
    print(f"5. its last checkpoint, on {DEVICES} devices", flush=True)
    layers, opt_state, _ = digits.init()
    manager = ckptmgr.CheckpointManager(spread, read_only=True)
    one = manager.restore(params=layers, opt_state=opt_state)
    split = manager.restore(params=layers, opt_state=opt_state, layout=digits.split(DEVICES))
    mu, w = split.opt_state[1][0].mu[1]["w"], split.params[1]["w"]
    print(f"  a weight {w.shape} lies as {w.sharding.shard_shape(w.shape)} on each device, Adam's mu beside it")
    good = [
        w.sharding.num_devices == DEVICES and mu.sharding.is_equivalent_to(w.sharding, 2),
        compare("parameters", one.params, split.params),
        compare("optimizer state", one.opt_state, split.opt_state),
    ]
    print(f"6. {MORE_STEPS} steps more, on {DEVICES} devices and on one", flush=True)
    go_on(spread, arguments, more=MORE_STEPS, devices=DEVICES)
    go_on(straight, arguments, more=MORE_STEPS)
    there, here = losses(spread), losses(straight)
    apart = max(abs(there[step].item() / here[step].item() - 1) for step in here if step > arguments.steps)
    print(f"  losses differ by {apart:.1e} at most (relative; allowed: {SAME_LOSS})")
    return all([*good, apart < SAME_LOSS])


def main(arguments):
    with tempfile.TemporaryDirectory(prefix="ckptmgr-demo-") as scratch:
        scratch = Path(arguments.keep or scratch)
        for name in ("killed", "straight", "spread"):
            shutil.rmtree(scratch / name, ignore_errors=True)
            (scratch / name).mkdir(parents=True)
        equal = killed_and_not(scratch, arguments) and on_other_devices(scratch, arguments)
    print("All equal: neither the kill nor the other devices left a trace." if equal else "NOT EQUAL")
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--keep", metavar="DIRECTORY", help="leaves the runs there, to be looked at")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    main(parser.parse_args())
