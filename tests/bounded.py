"""Restores step 2 in a process of its own: `python bounded.py DIRECTORY CASE MAX_HOST_BYTES`, 0 for none.

Says how much anonymous memory it took at most, above the arrays that came back.

devices     onto four devices, and in another dtype: what is read does not become the arrays
pieces      the same of one array that is larger than the bound
host        compressed arrays, as numpy arrays of another dtype
"""

import os
import sys
from pathlib import Path


def main(directory, case, max_host_bytes):
    bound = int(max_host_bytes) or None
    manager = ckptmgr.CheckpointManager(directory, read_only=True, max_host_bytes=bound)

    def restore(step):
        over_four = jax.sharding.NamedSharding(jax.make_mesh((4,), ("x",)), jax.P("x"))
        where = ckptmgr.HOST if case == "host" else over_four
        shapes = {leaf.name: leaf.shape for leaf in manager.info(step).leaves["params"]}
        template = {name: jax.ShapeDtypeStruct(shape, "bfloat16") for name, shape in shapes.items()}
        return jax.block_until_ready(manager.restore(step, params=template, layout=where, cast=True).params)

    restore(1)  # imports, threads and devices are there, and do not grow with what is restored
    with memory.Peak() as peak:
        found = restore(2)
    print(peak.nbytes - sum(leaf.nbytes for leaf in found.values()))


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    sys.path.append(str(Path(__file__).parents[1]))
    import jax

    import ckptmgr
    from benchmarks import memory

    main(*sys.argv[1:])
