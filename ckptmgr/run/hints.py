"""Hints for errors: what a directory without the wanted step holds, and which directory to open instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from etils import epath

from ckptmgr.format import names, paths
from ckptmgr.run import recognize

_ORBAX_SIGNS = {names.STEP_METADATA, "_METADATA"}


def what_to_open(directory: epath.Path, entries: Iterable[str], candidates: Iterable[str]) -> str | None:
    """How to read a directory that is one checkpoint itself, or holds files of flax; None if it is neither."""
    if _ORBAX_SIGNS.intersection(entries):
        return f"is the directory of one checkpoint; open its parent, {directory.parent}"
    files = [name for name in candidates if _is_msgpack(directory / name)]
    return names.refuse_file(names.newest(files)) if files else None


def _is_msgpack(path: epath.Path) -> bool:
    """Whether a file begins like a map of msgpack, which is what flax writes. (0x80, an empty map, is how pickles
    begin.)"""
    try:
        with paths.open_to_read(path) as file:
            first = file.read(1)
    except OSError:
        return False
    return bool(first) and (0x81 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF))


def what_is_there(directory: epath.Path, steps: Sequence[int], has_steps: Callable[[epath.Path], bool]) -> str:
    """The steps of a directory. If it has none: where steps are, as far as that can be seen."""
    if steps:
        shown = ", ".join(map(str, steps[-10:]))
        return f"its steps are {'..., ' if len(steps) > 10 else ''}{shown}"
    if not directory.exists():
        return "the directory does not exist"
    for entry in directory.iterdir():
        if entry.name == names.OURS or not entry.is_dir():
            continue
        if has_steps(entry):
            return f"did you mean {entry}?"
        if recognize.is_renamed(str(entry)):
            return f"{entry.name} is a checkpoint under another name: to read it, rename it to its step's number"
    return "nothing is saved in it yet"
