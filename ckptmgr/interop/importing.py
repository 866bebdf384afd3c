"""`ckptmgr import`: every entry of a file is saved, or an error names it."""

from __future__ import annotations

import dataclasses
import operator
import os
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from ckptmgr.interop import reading

_CHECKPOINT = re.compile(r"checkpoint_(\d+)(\.\w+)?")
_MOST_PLACES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Incoming:
    """The arguments for `save`."""

    step: int
    params: Any
    opt_state: Any
    extras: Mapping[str, Any]
    metrics: Mapping[str, Any]

    @property
    def items(self) -> list[str]:
        """The names of the items to save."""
        trees = {"params": self.params, "opt_state": self.opt_state}
        return [*(name for name, tree in trees.items() if tree is not None), *sorted(self.extras)]

    def __str__(self) -> str:
        trees = [name for name in self.items if name not in self.extras]
        said = {"": trees, "extras ": sorted(self.extras), "metrics ": sorted(self.metrics)}
        return "; ".join(what + ", ".join(found) for what, found in said.items() if found)


def incoming(
    state: str | os.PathLike[str] | None = None,
    *,
    params: str | os.PathLike[str] | None = None,
    opt_state: str | os.PathLike[str] | None = None,
    step: int | None = None,
    allow: Iterable[str] = (),
    skip: Collection[str] = (),
) -> Incoming:
    """Reads files of other formats, to be saved as a checkpoint.

    Args:
      state: a file with a dict of params, opt_state, step and metrics; other entries become extras. Or a directory
        with flax's checkpoint_N: the newest is taken, or `step`.
      params: a file with the params alone.
      opt_state: a file with the opt_state alone.
      step: the step to save it as; by default the entry "step" of the file, or the number in its name.
      allow: names ("module.name") that a pickle may use in addition.
      skip: entries of `state` to leave out.
    """
    entries: dict[str, Any] = {}
    allow = tuple(allow)
    if state is not None:
        path = one_of(pathlib.Path(state).expanduser(), step)
        entries = _entries(path, reading.read(path, allow=allow), skip)
        step = _step(path, entries.pop("step", None)) if step is None else step
        entries.pop("step", None)
    alone = {"params": params, "opt_state": opt_state}
    for name, alone_path in alone.items():
        if alone_path is not None and name in entries:
            raise ValueError(f"{state} has {name} too: skip it there (--skip {name}), or leave out {alone_path}")
    if skip and state is None:
        raise ValueError(f"skip ({', '.join(skip)}) leaves out entries of a file of all, and none is given")
    entries |= {name: reading.read(path, allow=allow) for name, path in alone.items() if path is not None}
    if step is None:
        raise ValueError("say which step this is, with the option step (--step N)")
    metrics = _metrics(entries.pop("metrics", None))
    found = {name: entries.pop(name, None) for name in alone}
    return Incoming(
        step=step,
        params=found["params"],
        opt_state=with_sequences(found["opt_state"], found["params"]),
        extras={name: _extra(value) for name, value in entries.items()},
        metrics=metrics,
    )


def one_of(path: pathlib.Path, step: int | None = None) -> pathlib.Path:
    """In a directory of flax's checkpoint_N: the newest file, or that of `step`. Other paths are returned."""
    if not path.is_dir():
        return path
    found = {int(match[1]): entry for entry in path.iterdir() if (match := _CHECKPOINT.fullmatch(entry.name))}
    if step is not None and found and step not in found:
        raise FileNotFoundError(f"{path} has no checkpoint of step {step}; it has {sorted(found)[-10:]}")
    return found[max(found) if step is None else step] if found else path


def _entries(path: pathlib.Path, whole: Any, skip: Collection[str]) -> dict[str, Any]:
    if not isinstance(whole, Mapping) or not {"params", "opt_state"} & set(whole):
        has = f"; it has {', '.join(map(str, list(whole)[:10]))}" if isinstance(whole, Mapping) else ""
        raise ValueError(
            f"{path} is not a dict with params or opt_state{has}. If it is one of them, use --params FILE or "
            "--opt-state FILE"
        )
    unknown = sorted(set(skip) - set(whole))
    if unknown:
        raise ValueError(f"skip {unknown[0]}: {path} has no such entry; it has {', '.join(map(str, whole))}")
    return {name: value for name, value in whole.items() if name not in skip}


def _step(path: pathlib.Path, said: Any) -> int | None:
    if said is not None:
        try:
            return operator.index(np.asarray(said)[()])
        except TypeError:
            raise ValueError(
                f"the step in {path} is not a whole number. Say it with the option step (--step N)"
            ) from None
    match = _CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match else None


def _metrics(found: Any) -> Mapping[str, Any]:
    if found is None:
        return {}
    if isinstance(found, Mapping) and all(
        isinstance(name, str) and _is_number(each) for name, each in found.items()
    ):
        return found
    raise ValueError(
        "metrics is not a dict of numbers, so it cannot be saved as metrics; the option skip leaves it out "
        "(--skip metrics)"
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, int | float | np.number):
        return True
    return isinstance(value, np.ndarray | jax.Array) and value.shape == () and value.dtype.kind in "biuf"


def _extra(value: Any) -> Any:
    """A tree of arrays as it is; a tree with text as JSON, where tuples become lists."""
    if isinstance(value, str | bytes) or not any(isinstance(leaf, str) for leaf in _leaves(value)):
        return value
    return _json(value)


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return (leaf for each in value.values() for leaf in _leaves(each))
    return (leaf for each in value for leaf in _leaves(each)) if isinstance(value, list | tuple) else [value]


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_json, value))
    return value.item() if isinstance(value, np.generic) else value


# ---------------------------------------------------------------- optimizer states whose tuples became dicts


def with_sequences(state: Any, params: Any) -> Any:
    """Turns dicts with the keys "0", "1", ... in an opt_state into tuples again, as the optimizer has them.

    `flax.serialization` and files of named tensors write a sequence as such a dict. Parts of the state that mirror
    the params (Adam's mu and nu) keep the dicts of the params.
    """
    if not isinstance(state, Mapping) or (isinstance(params, Mapping) and params and _mirrors(state, params)):
        return state
    below = {key: _labels(each, params) if key == "inner_states" else with_sequences(each, params)
             for key, each in state.items()}  # fmt: skip
    places = [int(key) for key in below if isinstance(key, str) and re.fullmatch(r"0|[1-9]\d{0,3}", key)]
    if not below or len(places) < len(below) or max(places) >= _MOST_PLACES:
        return below
    return tuple(below.get(str(place)) for place in range(max(places) + 1))


def _labels(states: Any, params: Any) -> Any:
    """`inner_states` of optax.multi_transform: its keys are labels of the user, which may be digits."""
    if not isinstance(states, Mapping):
        return states
    return {label: with_sequences(each, params) for label, each in states.items()}


def _mirrors(state: Any, params: Any) -> bool:
    """Whether a part of a state has the containers of the params, except those that a mask has emptied."""
    if not isinstance(params, Mapping):
        return not isinstance(state, Mapping) or not state
    if not isinstance(state, Mapping):
        return state is None
    return not state or (set(state) == set(params) and all(_mirrors(state[key], params[key]) for key in params))
