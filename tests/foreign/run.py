"""Trains the programs of this folder, kills them, and resumes them.

    python run.py DIRECTORY

reads requests, a line of JSON each: the `folder` of a `program`, its further arguments (`variant`), and when to
`kill` it, as `faults.py` spells it. For each it trains in four new processes. Each is forked from this one, which
has imported the libraries and done nothing else:

    straight  is never stopped
    killed    is stopped by SIGKILL while it saves
    resumed   goes on in the directory of `killed`, to the end
    again     finds nothing left to do there, so its state is what was restored

Answers each with a line of JSON: for each process its exit code, what it printed, and every fact of the state that
it ended with.
"""

import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import sys
import warnings
from pathlib import Path

import equinox  # noqa: F401  (imported once, here, for all processes)
import faults
import flax.linen
import flax.nnx
import flax.training.train_state  # noqa: F401
import guard
import haiku  # noqa: F401
import jax
import keras  # noqa: F401
import numpy as np
import optax.contrib  # noqa: F401
import penzai.models.simple_mlp
import penzai.toolshed.basic_training  # noqa: F401
import sklearn.datasets  # noqa: F401

import ckptmgr  # noqa: F401

STEPS = 7


def facts(tree):
    """Everything that makes a tree what it is, by leaf path; it shares no code with ckptmgr."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    found = {jax.tree_util.keystr(path): leaf_facts(leaf) for path, leaf in leaves}
    return found | {"structure": {"is": re.sub(r" at 0x[0-9a-f]+", "", str(structure))}}


def leaf_facts(leaf):
    is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    values = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    bits = {
        "dtype": values.dtype.name,
        "shape": values.shape,
        "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
    }
    if not isinstance(leaf, jax.Array):
        return {"type": type(leaf).__name__} | bits
    places = leaf.sharding.devices_indices_map(leaf.shape).items()
    return bits | {
        "type": str(jax.typeof(leaf)),  # with the axes of an Explicit mesh
        "weak": getattr(leaf, "weak_type", False),
        "committed": leaf.committed,
        "memory": leaf.sharding.memory_kind,
        "mesh": str(getattr(leaf.sharding, "mesh", None)),
        "places": {device.id: str(index) for device, index in places},
    }


def train(request, directory, how):
    """What one process does: it trains, and leaves the facts of its state in a file."""
    with open(directory / f"{how}.out", "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    faults.install(request["kill"] if how == "killed" else "")
    sys.path.insert(0, request["folder"])
    program = importlib.import_module(request["program"])
    state = program.train(directory / ("straight" if how == "straight" else "stopped"), STEPS, *request["variant"])
    (directory / f"{how}.json").write_text(json.dumps(facts(state)))


def in_new_process(request, directory, how):
    process = multiprocessing.Process(target=train, args=(request, directory, how))
    process.start()
    process.join()
    found = directory / f"{how}.json"
    state = json.loads(found.read_text()) if found.exists() else {}
    return {"code": process.exitcode, "said": (directory / f"{how}.out").read_text(), "state": state}


def run(request, directory):
    directory.mkdir()
    return {how: in_new_process(request, directory, how) for how in ("straight", "killed", "resumed", "again")}


def main(directory):
    multiprocessing.set_start_method("fork")
    guard.install()
    warnings.simplefilter("error")
    # A program is compiled once for all processes, as on a machine where a job is started again, and quickly.
    jax.config.update("jax_compilation_cache_dir", str(directory / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_disable_most_optimizations", True)
    gc.freeze()  # no fork looks through the libraries again
    for number, line in enumerate(sys.stdin):
        print(json.dumps(run(json.loads(line), directory / str(number))), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
