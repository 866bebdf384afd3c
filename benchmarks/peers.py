"""The libraries that are compared: each saves a state, says when it is durable, and restores it.

All keep one checkpoint, and replace it only by a whole one (plain pickle excepted: it overwrites, as people
do). Whatever a library needs to take jax arrays in and give them back is part of the time that is measured.
"""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from benchmarks import machine
from benchmarks.workloads import State


class Peer:
    """One library, in a directory of its own that may hold what an earlier process saved."""

    title: ClassVar[str]
    note: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def save(self, state: State) -> None:
        """Returns when training may go on."""
        raise NotImplementedError

    def wait(self) -> None:
        """Returns when what was saved is durable."""

    def finish(self) -> None:
        """Returns when nothing is left to do: if the library deletes the old checkpoint later, that is over."""

    def restore(self, template: State) -> State:
        """The state, on the devices of the template's shardings."""
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of threads and files."""


class Ckptmgr(Peer):
    title = "ckptmgr"
    note = "CheckpointManager(keep=1)"

    def __init__(self, directory: Path) -> None:
        import ckptmgr

        super().__init__(directory)
        self._manager = ckptmgr.CheckpointManager(directory, keep=1)
        self._step = self._manager.latest() or 0

    def save(self, state: State) -> None:
        self._step += 1
        self._saved = self._manager.save(self._step, state.params, state.opt_state)

    def wait(self) -> None:
        self._saved.result()

    def finish(self) -> None:
        self._manager.wait()

    def restore(self, template: State) -> State:
        found = self._manager.restore(params=template.params, opt_state=template.opt_state)
        return State(found.params, found.opt_state)

    def close(self) -> None:
        self._manager.close()


class Before(Ckptmgr):
    title = "ckptmgr before"
    note = "the version before this one (--before), in a process of its own, otherwise as ckptmgr"


class Orbax(Peer):
    title = "stock Orbax"
    note = "CheckpointManager(max_to_keep=1), asynchronous, Composite of two StandardSave"

    def __init__(self, directory: Path) -> None:
        import orbax.checkpoint as ocp

        super().__init__(directory)
        self._args = ocp.args
        self._manager = ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(max_to_keep=1))
        self._step = self._manager.latest_step() or 0

    def save(self, state: State) -> None:
        self._step += 1
        items = {name: self._args.StandardSave(item) for name, item in state._asdict().items()}
        self._manager.save(self._step, args=self._args.Composite(**items))

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def restore(self, template: State) -> State:
        items = {name: self._args.StandardRestore(item) for name, item in template._asdict().items()}
        found = self._manager.restore(self._step, args=self._args.Composite(**items))
        return State(found.params, found.opt_state)

    def close(self) -> None:
        self._manager.close()


class PickleFsync(Peer):
    title = "pickle + fsync"
    note = "jax.device_get, protocol 5, fsync, os.replace"

    def save(self, state: State) -> None:
        with open(self.directory / "new", "wb") as file:
            pickle.dump(jax.device_get(state), file, protocol=5)
            _fsync(file)
        os.replace(self.directory / "new", self.directory / "state.pkl")

    def restore(self, template: State) -> State:
        with open(self.directory / "state.pkl", "rb") as file:
            return _put(pickle.load(file), template)


class Pickle(Peer):
    title = "pickle"
    note = "jax arrays as they are, default protocol, overwritten in place: never durable, done when written"

    def save(self, state: State) -> None:
        with open(self.directory / "state.pkl", "wb") as file:
            pickle.dump(state, file)

    def restore(self, template: State) -> State:
        with open(self.directory / "state.pkl", "rb") as file:
            state = pickle.load(file)
        is_placed = all(leaf.sharding.num_devices == 1 for leaf in jax.tree.leaves(template))
        return state if is_placed else _put(state, template)


class Safetensors(Peer):
    title = "safetensors"
    note = "safetensors.numpy: numpy views in, one jax.device_put out, fsync, os.replace"
    needs = ("safetensors",)

    def save(self, state: State) -> None:
        from safetensors.numpy import save_file

        path = self.directory / "new"
        save_file({name: np.asarray(leaf) for name, leaf in _named(state).items()}, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(path, self.directory / "state.safetensors")

    def restore(self, template: State) -> State:
        from safetensors.numpy import load_file

        found = load_file(self.directory / "state.safetensors")
        return _put(_like(template, found), template)


class TorchDcp(Peer):
    title = "torch DCP"
    note = "torch.distributed.checkpoint.save and load (it fsyncs), jax arrays in and out by dlpack"
    needs = ("torch",)

    def save(self, state: State) -> None:
        from torch.distributed import checkpoint as dcp

        tensors = {name: _tensor(leaf) for name, leaf in _named(state).items()}
        with warnings.catch_warnings(action="ignore"):  # that one process saves, and replaces what is there
            dcp.save(tensors, checkpoint_id=self.directory, no_dist=True)

    def restore(self, template: State) -> State:
        import torch
        from torch.distributed import checkpoint as dcp

        tensors = {
            name: torch.empty(leaf.shape, dtype=getattr(torch, leaf.dtype.name))
            for name, leaf in _named(template).items()
        }
        with warnings.catch_warnings(action="ignore"):
            dcp.load(tensors, checkpoint_id=self.directory, no_dist=True)
        arrays = {name: jax.numpy.from_dlpack(tensor) for name, tensor in tensors.items()}
        return _put(_like(template, arrays), template)


ALL: dict[str, type[Peer]] = {
    "ckptmgr": Ckptmgr, "before": Before, "orbax": Orbax, "pickle-fsync": PickleFsync, "pickle": Pickle,
    "safetensors": Safetensors, "torch-dcp": TorchDcp,
}  # fmt: skip


def missing(name: str) -> str | None:
    """The package that this peer needs and that is not installed."""
    return next(filter(machine.is_missing, ALL[name].needs), None)


# ---------------------------------------------------------------- trees as flat names, and onto devices


def _named(state: State) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _like(template: State, named: dict[str, Any]) -> State:
    return jax.tree.unflatten(jax.tree.structure(template), [named[name] for name in _named(template)])


def _put(state: State, template: State) -> State:
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, template))


def _tensor(leaf: jax.Array) -> Any:
    """A torch tensor of the same memory; a sharded array has no such form and is gathered first."""
    import torch

    if leaf.sharding.num_devices == 1:
        return torch.from_dlpack(leaf)
    with warnings.catch_warnings(action="ignore"):  # torch has no read-only tensors, and says so
        return torch.from_numpy(np.asarray(leaf))


def _fsync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
