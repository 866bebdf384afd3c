"""Makes the checkpoints in this folder, with the libraries that others use. Each is one small .tar.gz.

    python tests/data/make.py [NAME ...]

They are kept, because a later version of a library need not write what an earlier one wrote. `VERSIONS` says
what they were made with. `format1` and `format1_leftovers` are of the first format of ckptmgr itself: they are
made with the package as it was at OWN_COMMIT.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.metadata
import io
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

HERE = pathlib.Path(__file__).parent
OWN_COMMIT = "3618edb"
LIBRARIES = ("orbax-checkpoint", "jax", "flax", "numpy", "optax", "tensorstore", "protobuf")
args = ocp.args


def tree(scale=1):
    """Small, and with one of each kind of leaf that matters."""
    return {
        "w": scale * jnp.arange(6, dtype=jnp.float32).reshape(2, 3),
        "half": scale * jnp.ones(2, jnp.bfloat16),
        "layers": [scale * jnp.arange(3), np.full(2, scale, np.int16)],
        "n": 3 * scale,
        "none": None,
        "key": jax.random.key(3),
    }


MT19937 = ("MT19937", np.arange(624, dtype=np.uint32), 3, 0, 0.0)
MT19937_DICT = {"bit_generator": "MT19937", "state": {"key": MT19937[1], "pos": 3}, "gauss": 0.0}


def params(scale=1):
    return {"w": scale * jnp.arange(6, dtype=jnp.float32).reshape(2, 3)}


def state(scale=1):
    return optax.adam(1e-3).init(params(scale))


# ---------------------------------------------------------------- Orbax v0


def stock(directory, steps=(1, 2), *, items=None, registry=None, **options):
    """A run of Orbax's own manager."""
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **options)
    items = items or (lambda step: {"params": args.StandardSave(params(step))})
    with ocp.CheckpointManager(directory, options=options, handler_registry=registry) as manager:
        for step in steps:
            found = items(step)
            manager.save(step, args=args.Composite(**found) if isinstance(found, dict) else found)


def v0_standard(directory):
    stock(
        directory,
        items=lambda step: {
            "params": args.StandardSave(tree(step)),
            "opt_state": args.StandardSave(state(step)),
            "config": args.JsonSave({"lr": 0.1}),
        },
    )


def v0_pytree(directory):
    stock(
        directory,
        items=lambda step: {"params": args.PyTreeSave(tree(step)), "opt_state": args.PyTreeSave(state(step))},
    )


def v0_single(directory):
    stock(directory, items=lambda step: args.StandardSave(params(step)))


def v0_every_form(directory):
    from google.protobuf import struct_pb2

    message = struct_pb2.Struct()
    message.update({"answer": 42})
    stock(
        directory,
        steps=(5,),
        items=lambda step: {
            "params": args.StandardSave(params(step)),
            "array": args.ArraySave(jnp.arange(4.0)),
            "number": args.ArraySave(7),
            "proto": args.ProtoSave(message),
            "jax_key": args.JaxRandomKeySave(jax.random.key(3)),
            "old_key": args.JaxRandomKeySave(jax.random.PRNGKey(3)),
            "numpy_key": args.NumpyRandomKeySave(MT19937),
            "numpy_dict": args.NumpyRandomKeySave(MT19937_DICT),
            "config": args.JsonSave({"lr": 0.1}),
        },
    )


class OwnHandler(ocp.CheckpointHandler):
    """What a project writes with a handler of its own."""

    def save(self, directory, args):
        (directory / "blob.bin").write_bytes(b"only they know")

    def restore(self, directory, args):
        raise NotImplementedError


@ocp.args.register_with_handler(OwnHandler, for_save=True)
@dataclasses.dataclass
class OwnSave(ocp.args.CheckpointArgs):
    pass


def v0_own_handler(directory):
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("blob", OwnSave, OwnHandler())
    found = {"params": args.StandardSave(params()), "blob": OwnSave()}
    stock(directory, steps=(5,), registry=registry, items=lambda step: found)


def v0_names_with_slashes(directory):
    stock(
        directory,
        steps=(5,),
        items=lambda step: {
            "params": args.StandardSave(params(step)),
            "ema/params": args.StandardSave(params(2 * step)),
            "data/position": args.JsonSave({"epoch": 2}),
        },
    )


def v0_string_leaf(directory):
    notes = {"by": "me", "n": 3, "w": jnp.ones(2)}
    found = {"params": args.StandardSave(params()), "notes": args.PyTreeSave(notes)}
    stock(directory, steps=(5,), items=lambda step: found)


def v0_metrics(directory):
    options = ocp.CheckpointManagerOptions(best_fn=lambda m: m["loss"], enable_async_checkpointing=False)
    with ocp.CheckpointManager(directory, options=options) as manager:
        for step in (1, 2):
            manager.save(
                step,
                args=args.Composite(params=args.StandardSave(params(step))),
                metrics={"loss": 1.0 / step},
                custom_metadata={"git": "abc"},
            )


def form(**how):
    def make(directory):
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add("params", args.PyTreeSave, ocp.PyTreeCheckpointHandler(**how))
        stock(directory, registry=registry, items=lambda step: {"params": args.PyTreeSave(params(step))})

    return make


def prefix(directory):
    stock(directory, steps=(9, 10), step_prefix="run")


def padded(directory):
    stock(directory, steps=(9, 10), step_format_fixed_length=6)


def prefix_padded(directory):
    stock(directory, steps=(9, 10), step_prefix="step", step_format_fixed_length=8)


def straight(directory):
    """A tree saved into DIR/STEP, without items."""
    with ocp.StandardCheckpointer() as checkpointer:
        for step in (1, 2):
            checkpointer.save(directory / str(step), tree(step))


def straight_pytree(directory):
    with ocp.PyTreeCheckpointer() as checkpointer:
        for step in (1, 2):
            checkpointer.save(directory / str(step), {"params": params(step), "step": step})


def straight_array(directory):
    with ocp.Checkpointer(ocp.ArrayCheckpointHandler()) as checkpointer:
        checkpointer.save(directory / "1", args=args.ArraySave(jnp.arange(4.0)))


def straight_json(directory):
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        checkpointer.save(directory / "1", args=args.JsonSave({"lr": 0.1}))


# ---------------------------------------------------------------- Orbax v1


def v1_pytree(directory):
    from orbax.checkpoint import v1

    for step in (1, 2):
        v1.save_pytree(directory / str(step), tree(step))


def v1_string(directory):
    from orbax.checkpoint import v1

    v1.save_pytree(directory / "1", {"by": "me", "w": jnp.ones(2)})


def v1_checkpointables(directory):
    from orbax.checkpoint import v1

    for step in (1, 2):
        found = {"params": params(step), "opt_state": state(step), "config": {"lr": 0.1, "name": "adam"}}
        v1.save_checkpointables(directory / str(step), found)


def v1_json(directory):
    from orbax.checkpoint import v1

    registry = v1.handlers.local_registry()
    registry.add(v1.handlers.JsonHandler, checkpointable_name="config")
    options = v1.options.CheckpointablesOptions(registry=registry)
    with v1.Context(checkpointables_options=options):
        v1.save_checkpointables(directory / "1", {"params": params(), "config": {"lr": 0.1, "name": "adam"}})


def v1_training(directory):
    from orbax.checkpoint import v1

    with v1.training.Checkpointer(directory) as checkpointer:
        for step in (1, 2):
            checkpointer.save_pytree(step, params(step), metrics={"loss": 1.0 / step})


def v1_training_checkpointables(directory):
    from orbax.checkpoint import v1

    with v1.training.Checkpointer(directory) as checkpointer:
        for step in (1, 2):
            found = {"params": params(step), "config": {"lr": 0.1}}
            checkpointer.save_checkpointables(step, found, custom_metadata={"git": "abc"})


# ---------------------------------------------------------------- flax


def flax_msgpack(directory):
    import flax
    from flax.training import checkpoints

    flax.config.update("flax_use_orbax_checkpointing", False)
    for step in (9, 10):
        checkpoints.save_checkpoint(directory, {"params": params(step), "step": step}, step, keep=5)


def flax_orbax(directory):
    import flax
    from flax.training import checkpoints

    flax.config.update("flax_use_orbax_checkpointing", True)
    for step in (9, 10):
        target = {"params": params(step), "step": step}
        checkpoints.save_checkpoint(directory, target, step, keep=5, orbax_checkpointer=ocp.PyTreeCheckpointer())


# ---------------------------------------------------------------- ckptmgr, format 1

_OWN = """
import pathlib, sys
import jax.numpy as jnp, jax, numpy as np, optax
import ckptmgr
directory, leftovers = pathlib.Path(sys.argv[1]), sys.argv[2] == "leftovers"
params = lambda scale: {"w": scale * jnp.arange(6, dtype=jnp.float32).reshape(2, 3)}
state = lambda scale: optax.adam(1e-3).init(params(scale))
extras = {"position": {"epoch": 2}, "blob": b"raw", "key": jax.random.key(3)}
manager = ckptmgr.CheckpointManager(directory, metadata={"git": "abc"})
for step in (1, 2, 3):
    manager.save(step, params(step), state(step), extras=extras, metrics={"loss": 1 / step}).result()
if leftovers:
    manager.pin(1)
    (directory / "3" / "params" / "manifest.ocdbt").write_bytes(b"")
    assert manager.restore().step == 2
    manager.save(3, params(33), state(33)).result()
    manager.save(2, params(22), state(22), on_exists="replace").result()
manager.close()
if leftovers:
    import shutil
    shutil.copytree(directory / "2", directory / "2.replaced")
    shutil.copytree(directory / "2", directory / ".deleted-2-17")
    shutil.copytree(directory / "2", directory / "7.orbax-checkpoint-tmp")
"""


def own(what):
    def make(directory):
        with tempfile.TemporaryDirectory() as source:
            archive = subprocess.run(
                ["git", "archive", OWN_COMMIT, "ckptmgr"], cwd=HERE.parents[1], capture_output=True, check=True
            ).stdout
            with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
                packed.extractall(source, filter="data")
            environment = os.environ | {"PYTHONPATH": source}
            subprocess.run([sys.executable, "-c", _OWN, str(directory), what], env=environment, check=True)

    return make


# ---------------------------------------------------------------- all of them

FIXTURES = {
    "v0_standard": v0_standard,
    "v0_pytree": v0_pytree,
    "v0_single": v0_single,
    "v0_every_form": v0_every_form,
    "v0_own_handler": v0_own_handler,
    "v0_names_with_slashes": v0_names_with_slashes,
    "v0_string_leaf": v0_string_leaf,
    "v0_metrics": v0_metrics,
    "v0_zarr2": form(use_zarr3=False),
    "v0_zarr3": form(use_zarr3=True),
    "v0_zarr2_no_ocdbt": form(use_zarr3=False, use_ocdbt=False),
    "v0_zarr3_no_ocdbt": form(use_zarr3=True, use_ocdbt=False),
    "v0_prefix": prefix,
    "v0_padded": padded,
    "v0_prefix_padded": prefix_padded,
    "v0_straight": straight,
    "v0_straight_pytree": straight_pytree,
    "v0_straight_array": straight_array,
    "v0_straight_json": straight_json,
    "v1_pytree": v1_pytree,
    "v1_string": v1_string,
    "v1_checkpointables": v1_checkpointables,
    "v1_json": v1_json,
    "v1_training": v1_training,
    "v1_training_checkpointables": v1_training_checkpointables,
    "flax_msgpack": flax_msgpack,
    "flax_orbax": flax_orbax,
    "format1": own("steps"),
    "format1_leftovers": own("leftovers"),
}


def pack(directory, name):
    """One archive, with the same bytes whenever its files are the same."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in sorted(directory.rglob("*")):
            facts = archive.gettarinfo(path, path.relative_to(directory).as_posix())
            facts.mtime, facts.uid, facts.gid, facts.uname, facts.gname = 0, 0, 0, "", ""
            with path.open("rb") if path.is_file() else io.BytesIO() as content:
                archive.addfile(facts, content)
    (HERE / f"{name}.tar.gz").write_bytes(gzip.compress(packed.getvalue(), mtime=0))


def main(names):
    for name in names or FIXTURES:
        with tempfile.TemporaryDirectory() as folder:
            directory = pathlib.Path(folder) / "run"
            directory.mkdir()
            FIXTURES[name](directory)
            pack(directory, name)
            print(name, (HERE / f"{name}.tar.gz").stat().st_size)
    used = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    (HERE / "VERSIONS").write_text("\n".join(used) + f"\nckptmgr {OWN_COMMIT} (format 1)\n")


if __name__ == "__main__":
    main(sys.argv[1:])
