"""The results of the commands as JSON-able values; `tables` formats them."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ckptmgr import policies as policy
from ckptmgr.cli import report
from ckptmgr.errors import CheckpointNotFoundError, NewerFormatError
from ckptmgr.format import manifest as manifests
from ckptmgr.format import paths
from ckptmgr.manager import CheckpointManager
from ckptmgr.results import CheckpointInfo, VerifyReport
from ckptmgr.run import journal
from ckptmgr.run import rewinding as rewinds
from ckptmgr.run.catalog import open_catalog
from ckptmgr.run.history import History
from ckptmgr.specs import LeafSpec, TreeSpec
from ckptmgr.trees import structure
from ckptmgr.trees.layouts import HOST

Facts = dict[str, Any]
_MOST_NAMES, _LONGEST_NAME = 10, 60


def reader(run: str) -> CheckpointManager:
    """A read-only manager of a run; raises CheckpointNotFoundError if there is none."""
    manager = CheckpointManager(run, read_only=True)
    if not manager.steps() and not manager.directory.exists():
        raise CheckpointNotFoundError(f"there is no run in {manager.directory}", directory=str(manager.directory))
    return manager


def named(text: str, step: int | None = None) -> tuple[str, int | None]:
    """The run and the step in RUN STEP, RUN@STEP or RUN/STEP. The step is None if only a run is named."""
    run, found, is_marked = _split(text)
    if step is None:
        return run, found
    if is_marked:
        raise ValueError(f"{text} names step {found}, and {step} is another step: name one")
    return text, step


def one(text: str, step: int | None) -> tuple[str, int]:
    """As `named`, for a command that has no default step."""
    run, found = named(text, step)
    if found is None:
        raise ValueError(f"say which step this is: {run.rstrip('/')}@STEP")
    return run, found


def two(words: Sequence[str]) -> list[tuple[str, int | None]]:
    """As `named`, for two places: a number after a run is a step of it."""
    found: list[tuple[str, int | None]] = []
    for word in words:
        if not found or not word.isdecimal() or _is_run(word):
            found.append(named(word))
        elif found[-1][1] is None:
            found[-1] = (found[-1][0], int(word))
        else:
            found.append((found[-1][0], int(word)))
    if len(found) != 2:
        raise ValueError(f"two checkpoints can be compared, not {len(found)}: RUN@STEP RUN@STEP")
    return found


def _split(text: str) -> tuple[str, int | None, bool]:
    """The run and the step in RUN, RUN/STEP or RUN@STEP, and whether it is the last of these."""
    run, at, step = text.rstrip("/").rpartition("@")
    if at and "/" not in step and not epath.Path(text).exists():
        if not step.isdecimal():
            raise ValueError(f"{text}: {step!r} is not the number of a step; write RUN@STEP, as in {run}@100")
        return run, int(step), True
    parent, _, last = text.rstrip("/").rpartition("/")
    is_step = last.isdecimal() and not _is_run(text)
    return (parent or ".", int(last), False) if is_step else (text, None, False)


def _is_run(directory: str) -> bool:
    """Whether a directory holds steps, and is not one itself."""
    with contextlib.suppress(CheckpointNotFoundError):
        return bool(CheckpointManager(directory, read_only=True).steps())
    return False


def chosen(manager: CheckpointManager, step: int | None) -> int:
    """The given step, or the newest."""
    number = manager.latest() if step is None else step
    if number is None:
        raise CheckpointNotFoundError(f"{manager.directory} has no checkpoint", directory=str(manager.directory))
    return number


def newest_trusted(manager: CheckpointManager) -> int:
    """The newest step that is trusted."""
    trusted = (info.step for info in manager.infos() if info.distrusted is None)
    return chosen(manager, max(trusted, default=None))


# ---------------------------------------------------------------- a run


def run(manager: CheckpointManager, keep: Sequence[policy.KeepPolicy] | None = None) -> Facts:
    """Every checkpoint of a run, and why it is kept: by `keep`, or by the policies in the journal."""
    policies = journal.policies(manager.directory) if keep is None else keep
    infos, unread = report.survey(manager, policies)
    rows: list[Facts] = [
        {"step": step, "damaged": str(why), "later_format": isinstance(why, NewerFormatError), "kept": None}
        for step, why in unread.items()
    ]
    rows += [_row(info) | {"kept": None if policies is None else list(info.kept)} for info in infos]
    return {
        "run": str(manager.directory),
        "keep": None if policies is None else [policy.spell(each) for each in policies],
        "steps": sorted(rows, key=lambda row: row["step"]),
        "left_alone": left_alone(manager.directory),
    }


def history(directory: epath.Path, keep: Sequence[policy.KeepPolicy]) -> History:
    """The history of a run under these policies."""
    return History(open_catalog(directory), keep)


def left_alone(directory: epath.Path) -> Facts:
    """What is in a run and neither a checkpoint nor ours: the count, and the first names."""
    found = open_catalog(directory).strangers()
    return {"count": len(found), "names": [_printable(name) for name in found[:_MOST_NAMES]]}


def _printable(name: str) -> str:
    """A name that is safe in a terminal: quoted if it holds control characters or is not text."""
    shown = name if name.isprintable() else repr(name)
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[:_LONGEST_NAME]}..."


def _row(info: CheckpointInfo) -> Facts:
    return {
        "step": info.step,
        "time": info.time,
        "age_s": time.time() - info.time,
        "nbytes": info.nbytes,
        "disk_nbytes": info.disk_nbytes,
        "metrics": _finite(info.metrics),
        "pinned": info.pinned,
        "distrusted": info.distrusted,
        "reduced": info.reduced,
        "damaged": None,
        "later_format": False,
    }


def _finite(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """NaN and infinity as text, because JSON has neither."""
    return {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}


# ---------------------------------------------------------------- a checkpoint


def checkpoint(manager: CheckpointManager, step: int) -> Facts:
    """One checkpoint: versions, metadata, and every leaf."""
    info = manager.info(step)
    return {
        "run": str(manager.directory),
        "step": step,
        "time": info.time,
        "nbytes": info.nbytes,
        "disk_nbytes": info.disk_nbytes,
        "metrics": _finite(info.metrics),
        "metadata": dict(info.metadata),
        "versions": dict(info.versions),
        "pinned": info.pinned,
        "distrusted": info.distrusted,
        "reduced": info.reduced,
        "unread": dict(info.unread),
        "items": {name: [_leaf(leaf) for leaf in info.leaves.get(name, ())] for name in info.items},
    }


def _leaf(leaf: LeafSpec) -> Facts:
    return {
        "path": leaf.path,
        "shape": list(leaf.shape),
        "dtype": leaf.dtype,
        "kind": leaf.kind,
        "sharding": None if leaf.partition is None else [_axes(axes) for axes in leaf.partition],
        "nbytes": manifests.leaf_nbytes(leaf),
    }


def _axes(axes: Any) -> Any:
    return list(axes) if isinstance(axes, tuple) else axes


# ---------------------------------------------------------------- two checkpoints


def difference(one: tuple[CheckpointManager, int], other: tuple[CheckpointManager, int], values: bool) -> Facts:
    """The differences of two checkpoints: their leaves, and with `values` their values."""
    first, second = _by_path(*one), _by_path(*other)
    shared = [path for path in first if path in second]
    changed = [path for path in shared if _kind(first[path]) != _kind(second[path])]
    found: Facts = {
        "only_in_first": [path for path in first if path not in second],
        "only_in_second": [path for path in second if path not in first],
        "changed": {path: [_kind(first[path]), _kind(second[path])] for path in changed},
        "equal_leaves": len(shared) - len(changed),
    }
    if values:
        found["values"] = _changes(_values(*one), _values(*other), set(shared) - set(changed))
    found["equal"] = not any(
        found[name] for name in ("only_in_first", "only_in_second", "changed", "values") if name in found
    )
    return found


def _by_path(manager: CheckpointManager, step: int) -> dict[str, LeafSpec]:
    leaves = manager.info(step).leaves
    return {f"{item}{leaf.path}": leaf for item, found in leaves.items() for leaf in found}


def _kind(leaf: LeafSpec) -> str:
    return str(leaf)


def _values(manager: CheckpointManager, step: int) -> dict[str, Any]:
    """Every leaf on the host, by its path in the manifest."""
    manifest = open_catalog(manager.directory).manifest(step)
    found = manager.restore(step, layout=HOST)
    trees = {"params": found.params, "opt_state": found.opt_state, **found.extras}
    return {
        f"{name}{item.tree.leaves[place].path}": value
        for name, item in manifest.items.items()
        if item.kind == "arrays"
        for place, value in _in_order(item.tree, trees[name])
    }


def _in_order(tree: TreeSpec, values: Any) -> Iterator[tuple[int, Any]]:
    places = structure.rebuild(tree.outline, list(range(len(tree.leaves))))
    return zip(jax.tree.leaves(places), jax.tree.leaves(values), strict=True)


def _changes(one: Mapping[str, Any], other: Mapping[str, Any], paths: set[str]) -> list[Facts]:
    """The leaves whose bits differ, with the largest change of each; sorted by that change."""
    rows = [{"path": path} | _change(_plain(one[path]), _plain(other[path])) for path in sorted(paths)]
    return sorted((row for row in rows if row.pop("differs")), key=lambda row: -_number(row["largest_change"]))


def _plain(value: Any) -> np.ndarray[Any, Any]:
    is_key = isinstance(value, jax.Array) and structure.is_key(value)
    return np.asarray(jax.random.key_data(value) if is_key else value)


def _change(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> Facts:
    if one.tobytes() == other.tobytes():
        return {"differs": False}
    if one.dtype.kind == "U":
        return {"differs": True, "largest_change": f"{one} becomes {other}"}
    wide = np.complex128 if np.iscomplexobj(one) else np.float64
    with np.errstate(invalid="ignore", over="ignore"):
        largest = np.max(np.abs(one.astype(wide) - other.astype(wide)))
    return {"differs": True, "largest_change": float(largest) if np.isfinite(largest) else str(largest)}


def _number(value: float | str) -> float:
    return math.inf if isinstance(value, str) else value


# ---------------------------------------------------------------- leftovers


def leftovers(directory: epath.Path) -> list[Facts]:
    """What interrupted processes have left over in a run, with sizes."""
    catalog = open_catalog(directory)
    return [{"path": str(path), "why": why, "nbytes": _size(path)} for path, why in catalog.leftovers()]


def _size(path: epath.Path) -> int:
    if path.is_dir():
        return sum(_size(entry) for entry in path.iterdir())
    with contextlib.suppress(FileNotFoundError):
        return int(path.stat().length)
    return 0


def free_bytes(directory: epath.Path) -> int | None:
    """Free bytes on the disk of a directory."""
    with contextlib.suppress(OSError):
        found = os.statvfs(directory)
        return found.f_bavail * found.f_frsize
    return None


def rewinding(directory: epath.Path, mirror: str | None, step: int) -> Facts:
    """The steps that a rewind would set aside and bring back, in a run and its mirror."""
    places = [directory] + ([paths.resolve(mirror, "--mirror")] if mirror is not None else [])
    plans = rewinds.plan([open_catalog(place) for place in places], step)
    return {
        "set_aside": sorted({each for plan in plans for each in plan.set_aside}),
        "returned": sorted({each for plan in plans for each in plan.returned}),
    }


# ---------------------------------------------------------------- the rest


def verified(found: VerifyReport) -> Facts:
    """A VerifyReport as JSON-able values."""
    return {
        "step": found.step,
        "whole": bool(found),
        "files": found.files,
        "leaves": found.leaves,
        "nbytes": found.nbytes,
        "damages": [damage._asdict() for damage in found.damages],
        "unchecked": list(found.unchecked),
    }
