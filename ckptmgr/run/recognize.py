"""Which folders of a run on a disk are checkpoints: those in which ckptmgr or Orbax finished something.

Anything else with the name of a step belongs to others: an empty folder, notes, an unfinished copy, or a copy of a
step under another number.
"""

from __future__ import annotations

import errno
import json
import os
import re

from ckptmgr.errors import CheckpointError
from ckptmgr.format import manifest as manifests
from ckptmgr.format import names, paths

MARKED = b"Checkpoint commit was successful to "
"""How Orbax's marker begins; the path of the committed checkpoint follows."""
_LATER = "store_array_data_equal_to_fill_value"
"""A key in the metadata of a tree. An Orbax that writes it also writes `_CHECKPOINT_METADATA`."""
_HEAD = re.compile(rb'\{"format":[0-9]+,"step":([0-9]+),')
_HEAD_BYTES, _SMALL_BYTES, _TREE_BYTES = 64, 1 << 20, 64 << 20


def is_step(path: str) -> bool:
    """Whether a folder is a checkpoint of the step that it is named after."""
    if _leads_beside(path):
        return False
    if is_renamed(path):
        return False
    head = _HEAD.match(begin(f"{path}/{manifests.NAME}", _HEAD_BYTES))
    if head or paths.may_exist(os.path.join(path, manifests.NAME)):
        return head is None or int(head[1]) == own_number(path) or not _is_of_another_step(path, int(head[1]))
    if is_signed(path):
        return _has_lost_its_manifest(path)
    return paths.may_exist(os.path.join(path, names.STEP_METADATA)) or _has_items(path)


def stamp(path: str) -> tuple[int, ...] | None:
    """Tells the manifest of a folder from a later one; None if there is none."""
    try:
        found = os.stat(f"{path}/{manifests.NAME}")
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def is_signed(path: str) -> bool:
    """Whether Orbax's metadata of a folder says that ckptmgr wrote it."""
    return is_signature(begin(os.path.join(path, names.STEP_METADATA), _SMALL_BYTES))


def is_renamed(path: str) -> bool:
    """Whether it is a copy of a step of ckptmgr under another name: the steps themselves have plain numbers."""
    if names.STEP.fullmatch(os.path.basename(path)):
        return False
    return is_signed(path) or _is_written_here(path)


def _is_written_here(path: str) -> bool:
    """Whether ckptmgr wrote the checkpoint, and has not adopted it."""
    head = _HEAD.match(begin(f"{path}/{manifests.NAME}", _HEAD_BYTES))
    found = _read_manifest(path, int(head[1])) if head else None
    return found is not None and found.written_here


def is_signature(metadata: bytes) -> bool:
    return b'"ckptmgr"' in metadata


def _leads_beside(path: str) -> bool:
    """Whether it is a symlink to the run or to another entry of it. (A step may be a symlink to another disk.)"""
    if not os.path.islink(path):
        return False
    run, target = os.path.realpath(os.path.dirname(path)), os.path.realpath(path)
    return run in (target, os.path.dirname(target)) or run.startswith(os.path.join(target, ""))


def _is_of_another_step(path: str, step: int) -> bool:
    """Whether it is a copy of the step that its manifest names. A damaged manifest proves nothing."""
    marked = marked_step(begin(os.path.join(path, names.COMMITTED), _SMALL_BYTES))
    if marked in (step, own_number(path)):
        return marked == step  # if not, its manifest was exchanged
    return _read_manifest(path, step) is not None


def _read_manifest(path: str, step: int) -> manifests.Manifest | None:
    """The manifest of a step in a folder; None if it is damaged or of another step."""
    file = os.path.join(path, manifests.NAME)
    try:
        with open(file, "rb", opener=_open) as opened:
            return manifests.decode(opened.read(), step=step, path=file)
    except (OSError, CheckpointError):
        return None


def own_number(path: str) -> int | None:
    """The step that a folder is named after."""
    name = os.path.basename(path)
    return int(name) if names.STEP.fullmatch(name) else names.number(name)


def marked_step(marker: bytes) -> int | None:
    """The step that Orbax's marker names; None if it names none."""
    path = marker.removeprefix(MARKED) if marker.startswith(MARKED) else b""
    return names.number(os.fsdecode(path.rpartition(b"/")[2].strip()))


def _has_lost_its_manifest(path: str) -> bool:
    """Whether a folder of ours without a manifest was a step: the file written just before it names the step.

    If not, the folder is an unfinished copy, or a copy under another name.
    """
    return _is_marked_as_itself(path)


def _is_marked_as_itself(path: str) -> bool:
    """Whether Orbax's marker names the folder that it is in."""
    said = begin(os.path.join(path, names.COMMITTED), _SMALL_BYTES)
    return said.rpartition(b"/")[2].strip() == os.fsencode(os.path.basename(path))


def _has_items(path: str) -> bool:
    """Whether Orbax has finished something in a folder that lacks Orbax's metadata of the step."""
    if _is_marked_as_itself(path) or _has_tree(path):
        return True
    try:
        with os.scandir(path) as entries:
            folders = [entry.path for entry in entries if is_folder(entry)]
    except OSError as problem:
        paths.refuse_exhausted(problem)
        return problem.errno not in paths.ABSENT  # if unsure True, so that no step is overlooked
    return any(map(_is_item, folders))


def _is_item(folder: str) -> bool:
    """Whether Orbax finished an item, and not a whole step of a run that lies in this folder."""
    if os.path.lexists(os.path.join(folder, names.STEP_METADATA)):
        return names.number(os.path.basename(folder)) is None  # else the item was saved by itself
    if os.path.lexists(os.path.join(folder, manifests.NAME)):
        return False
    return begin(os.path.join(folder, names.COMMITTED), _SMALL_BYTES).startswith(MARKED) or _has_tree(folder)


def _has_tree(folder: str) -> bool:
    """Whether there is metadata of a tree, damaged or not, of an Orbax that wrote no metadata of the step.

    A later Orbax writes both: if one is missing, the folder is an unfinished copy.
    """
    file = os.path.join(folder, "_METADATA")
    if not os.path.lexists(file):
        return False
    try:
        found = json.loads(begin(file, _TREE_BYTES))
    except (ValueError, RecursionError):
        return True
    return isinstance(found, dict) and "tree_metadata" in found and _LATER not in found


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as problem:
        if problem.errno == errno.ELOOP:  # a symlink to itself
            return False
        raise


def begin(file: str, size: int) -> bytes:
    """The first bytes of a file; empty if it cannot be read. Does not wait for the writer of a FIFO."""
    try:
        descriptor = _open(file, os.O_RDONLY)
    except OSError as problem:
        paths.refuse_exhausted(problem)
        return b""
    try:
        return os.read(descriptor, size)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def _open(file: str, flags: int) -> int:
    return os.open(file, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
