"""The results of the commands as JSON-able values; `tables` formats them."""

from __future__ import annotations

import builtins
import contextlib
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from ckptmgr import policies as policy
from ckptmgr.cli import places, report
from ckptmgr.cli.spelling import in_shell_words
from ckptmgr.errors import CheckpointNotFoundError, NewerFormatError, StructureMismatchError
from ckptmgr.format import manifest as manifests
from ckptmgr.format import names, paths
from ckptmgr.manager import CheckpointManager
from ckptmgr.results import CheckpointInfo, VerifyReport
from ckptmgr.run import journal
from ckptmgr.run import rewinding as rewinds
from ckptmgr.run.catalog import open_catalog
from ckptmgr.run.history import History
from ckptmgr.specs import PYTHON_KINDS, LeafSpec, TreeSpec
from ckptmgr.trees import structure
from ckptmgr.trees.layouts import HOST

Facts = dict[str, Any]
_MOST_NAMES = 10


def reader(run: str) -> CheckpointManager:
    """A read-only manager of a run; raises CheckpointNotFoundError if there is none."""
    manager = CheckpointManager(run, read_only=True)
    if paths.is_local(run) and manager.directory.is_file():
        raise places.no_run(run)
    if not manager.steps() and not (manager.directory / names.OURS).exists():
        raise places.no_run(run)
    return manager


def chosen(manager: CheckpointManager, step: int | None) -> int:
    """The given step, or the newest."""
    steps = manager.steps()
    if not steps:
        raise CheckpointNotFoundError(
            f"there is no checkpoint in {manager.directory} yet", directory=str(manager.directory)
        )
    if step is not None and step not in steps:
        raise places.no_step(step, str(manager.directory), steps)
    return steps[-1] if step is None else step


def trusted(manager: CheckpointManager) -> list[int]:
    """The steps that are trusted, in order; at least one."""
    newest, infos = chosen(manager, None), manager.infos()
    if not infos:
        manager.info(newest)  # raises: no step can be read
    found = [info.step for info in infos if info.distrusted is None]
    if not found:
        raise ValueError(f"no step in {manager.directory} is trusted; say which one is meant: RUN@STEP")
    return found


# ---------------------------------------------------------------- a run


def run(manager: CheckpointManager, keep: Sequence[policy.KeepPolicy] | None = None) -> Facts:
    """Every checkpoint of a run, and why it is kept: by `keep`, or by the policies in the journal."""
    policies = journal.policies(manager.directory) if keep is None else keep
    infos, unread = report.survey(manager, policies)
    rows: list[Facts] = [
        {
            "step": step,
            "damaged": in_shell_words(str(why)),
            "later_format": isinstance(why, NewerFormatError),
            "kept": None,
        }
        for step, why in unread.items()
    ]
    rows += [
        _row(info) | {"kept": None if policies is None else list(map(in_shell_words, info.kept))} for info in infos
    ]
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
    return {"count": len(found), "names": [places.printable(name) for name in found[:_MOST_NAMES]]}


def _row(info: CheckpointInfo) -> Facts:
    return {
        "step": info.step,
        "time": info.time,
        "age_s": time.time() - info.time,
        "nbytes": info.nbytes,
        "disk_nbytes": info.disk_nbytes,
        "metrics": _printable(info.metrics),
        "pinned": info.pinned,
        "distrusted": info.distrusted,
        "reduced": _in_words(info.reduced),
        "damaged": None,
        "later_format": False,
    }


def _in_words(said: str | None) -> str | None:
    return None if said is None else in_shell_words(said)


def metrics(manager: CheckpointManager) -> list[str]:
    """The metrics that the steps of a run have."""
    return sorted({name for info in manager.infos() for name in info.metrics})


def check_metrics(manager: CheckpointManager, policies: Sequence[policy.KeepPolicy]) -> None:
    """Raises ValueError if a policy ranks by a metric that no step has: it would keep nothing."""
    inner = [each.policy if isinstance(each, policy.params_only) else each for each in policies]
    for each in inner:
        if isinstance(each, policy.best):
            check_metric(manager, each.metric)


def check_metric(manager: CheckpointManager, name: str) -> None:
    known = metrics(manager)
    if name not in known:
        has = f"the steps have {', '.join(known)}" if known else "the steps have no metrics"
        raise ValueError(f"no step in {manager.directory} has the metric {name}; {has}{places.meant(name, known)}")


def _printable(value: Any) -> Any:
    """A value of JSON, with NaN and infinity as text: JSON has neither."""
    if isinstance(value, Mapping):
        return {name: _printable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_printable, value))
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


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
        "metrics": _printable(info.metrics),
        "metadata": _printable(info.metadata),
        "versions": dict(info.versions),
        "pinned": info.pinned,
        "distrusted": info.distrusted,
        "reduced": _in_words(info.reduced),
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


def difference(
    one: tuple[CheckpointManager, int],
    other: tuple[CheckpointManager, int],
    values: bool,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> Facts:
    """The differences of two checkpoints: their leaves, and with `values` their values."""
    first, second = _by_path(*one), _by_path(*other)
    shared = [path for path in first if path in second]
    changed = [path for path in shared if first[path] != second[path]]
    found: Facts = {
        "only_in_first": [path for path in first if path not in second],
        "only_in_second": [path for path in second if path not in first],
        "changed": {path: [first[path], second[path]] for path in changed},
        "equal_leaves": len(shared) - len(changed),
    }
    if values:
        before, after = (manager.info(step).nbytes for manager, step in (one, other))
        total = before + after
        values_of_one = _values(*one, changed, lambda done, _: on_progress(done, total))
        values_of_other = _values(*other, changed, lambda done, _: on_progress(before + done, total))
        comparable = values_of_one.keys() & values_of_other.keys()  # an item that is not read has no value
        found["values"] = _changes(values_of_one, values_of_other, comparable)
    found["equal"] = not any(
        found[name] for name in ("only_in_first", "only_in_second", "changed", "values") if name in found
    )
    return found


def _by_path(manager: CheckpointManager, step: int) -> dict[str, str]:
    """What each leaf is, by its path, and each item without arrays by its name."""
    info = manager.info(step)
    found = {f"{item}{leaf.path}": str(leaf) for item, leaves in info.leaves.items() for leaf in leaves}
    bare = [name for name in info.items if name not in (manifests.STEP, manifests.METRICS)]
    return found | {name: "no arrays" for name in bare if not info.leaves.get(name)}


def items(
    manager: CheckpointManager, step: int, *only: str, on_progress: Callable[[int, int], object] | None = None
) -> dict[str, Any]:
    """These items of a step on the host, in plain containers; without names all of them.

    Raises ValueError if the step lacks one.
    """
    manifest = open_catalog(manager.directory).manifest(step)
    known = [name for name in manifest.items if name not in (manifests.STEP, manifests.METRICS)]
    for name in only:
        if name in known and manifest.items[name].kind == "unread":
            raise ValueError(f"step {step}: {name} is not read: {manifest.items[name].why}")
        if name not in known:
            raise ValueError(f"step {step} has no {name}; it has {', '.join(known)}{places.meant(name, known)}")
    is_all = not only or any(manifest.items[name].kind != "arrays" for name in only)
    wanted = {} if is_all else {name: _template(manifest.items[name]) for name in only}
    trees = {name: wanted.pop(name, None) for name in (manifests.PARAMS, manifests.OPT_STATE)}
    try:
        found = manager.restore(step, layout=HOST, extras=wanted, on_progress=on_progress, **trees)
    except StructureMismatchError:  # the children of a node had no names, which a dict cannot say: all is read
        found = manager.restore(step, layout=HOST, on_progress=on_progress)
    restored = {manifests.PARAMS: found.params, manifests.OPT_STATE: found.opt_state, **found.extras}
    return {name: restored[name] for name in only or known if name in restored}


def nbytes_of(manager: CheckpointManager, step: int, item: str) -> int:
    """The bytes of the arrays of an item."""
    leaves = manager.info(step).leaves.get(item, ())
    return sum(manifests.leaf_nbytes(leaf) for leaf in leaves)


def _template(item: manifests.Item) -> Any:
    """A tree like that of an item, without its values."""
    return structure.rebuild(item.tree.outline, [_stand_in(leaf) for leaf in item.tree.leaves])


def _stand_in(leaf: LeafSpec) -> Any:
    if leaf.kind in PYTHON_KINDS:
        return getattr(builtins, leaf.kind)()
    if leaf.kind == "key":
        return structure.abstract(leaf)
    zero = np.zeros((), structure.numpy_dtype(leaf.dtype))
    return zero[()] if leaf.kind == "scalar" else np.broadcast_to(zero, leaf.shape)


def _values(
    manager: CheckpointManager, step: int, changed: Collection[str], on_progress: Callable[[int, int], object]
) -> dict[str, Any]:
    """Every leaf on the host by its path in the manifest, without those that have changed their form.

    Of an item that differs between processes that of process 1 is `item[1]`.
    """
    manifest = open_catalog(manager.directory).manifest(step)
    found: dict[str, Any] = {}
    for name, tree in items(manager, step, on_progress=on_progress).items():
        item = manifest.items[name]
        if item.kind != "arrays":
            found |= {name: _Bare(tree)} if name not in changed else {}
            continue
        for process, own in enumerate(tree if item.processes > 1 else [tree]):
            whose = f"{name}[{process}]" if process else name
            for place, value in _in_order(item.tree, own):
                path = item.tree.leaves[place].path
                found |= {f"{whose}{path}": value} if f"{name}{path}" not in changed else {}
    return found


class _Bare(NamedTuple):
    """The value of an item without arrays: JSON or bytes."""

    value: Any


def _in_order(tree: TreeSpec, values: Any) -> Iterator[tuple[int, Any]]:
    places = structure.rebuild(tree.outline, list(range(len(tree.leaves))))
    return zip(jax.tree.leaves(places), jax.tree.leaves(values), strict=True)


def _changes(one: Mapping[str, Any], other: Mapping[str, Any], paths: set[str]) -> list[Facts]:
    """The leaves whose bits differ, with the largest change of each; sorted by that change."""
    rows = [{"path": path} | _change(_plain(one[path]), _plain(other[path])) for path in sorted(paths)]
    return sorted((row for row in rows if row.pop("differs")), key=lambda row: -_number(row["largest_change"]))


def _plain(value: Any) -> Any:
    if isinstance(value, _Bare):
        return value
    is_key = isinstance(value, jax.Array) and structure.is_key(value)
    return np.asarray(jax.random.key_data(value) if is_key else value)


def _change(one: Any, other: Any) -> Facts:
    if isinstance(one, _Bare) or isinstance(other, _Bare):
        return {"differs": one != other, "largest_change": "another value"}
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
