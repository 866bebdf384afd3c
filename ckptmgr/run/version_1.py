"""Runs of version 1, which had its files beside the steps: they are moved or removed once.

.writer  .shared  .journal.jsonl    the lock, a token, and the journal
<step>.orbax-checkpoint-tmp/        a save that was interrupted
<step>.replaced/                    the old checkpoint of a step that was being replaced
.deleted-<step>-<number>/           a deletion that was interrupted
<step>.damaged-<number>/            a damaged checkpoint whose step was saved again
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from ckptmgr.format import manifest as manifests
from ckptmgr.format import names
from ckptmgr.run.recognize import begin, is_signed

LOCK, TOKEN, JOURNAL = ".writer", ".shared", ".journal.jsonl"
_FOLDERS = {
    names.SAVING: re.compile(r"(?P<step>[0-9]+)\.orbax-checkpoint-tmp"),
    names.REPLACED: re.compile(r"(?P<step>[0-9]+)\.replaced"),
    names.DELETING: re.compile(r"\.deleted-(?P<step>[0-9]+-[0-9]+)"),
    names.DAMAGED: re.compile(r"(?P<step>[0-9]+)\.damaged-(?P<number>[0-9]+)"),
}


def moves(directory: str) -> list[tuple[str, str]]:
    """What to move, and where to; nothing if this is no run of version 1.

    The journal is moved last: as long as it is in its old place, an interrupted upgrade is done again.
    """
    entries = sorted(os.listdir(directory))
    if not _is_run(directory, entries):
        return []
    journal = [(JOURNAL, names.JOURNAL)] if JOURNAL in entries else []
    return [*_folders(directory, entries), *journal]


def to_remove(directory: str) -> list[str]:
    """The lock and the token of a process that was killed."""
    forms = {LOCK: rb'\{"host": .*"pid": [0-9]+.*\}', TOKEN: rb"[0-9a-f]{16}"}
    return [name for name, form in forms.items() if re.fullmatch(form, begin(os.path.join(directory, name), 4096))]


def _folders(directory: str, entries: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in entries:
        path = os.path.join(directory, name)
        for folder, form in _FOLDERS.items():
            if (found := form.fullmatch(name)) and not _is_others(folder, path):
                yield name, f"{folder}/{'-'.join(found.groups())}"


def _is_others(folder: str, path: str) -> bool:
    """Whether this is a save of stock Orbax, or not a checkpoint although it has the name of a replaced one."""
    has_metadata = os.path.exists(os.path.join(path, names.STEP_METADATA))
    if folder == names.SAVING:
        return has_metadata and not is_signed(path)
    return folder == names.REPLACED and not (has_metadata or os.path.lexists(os.path.join(path, manifests.NAME)))


def _is_run(directory: str, entries: Sequence[str]) -> bool:
    if {LOCK, JOURNAL} & set(entries):
        return True
    steps = (name for name in entries if names.STEP.fullmatch(name))
    return any(os.path.lexists(os.path.join(directory, step, manifests.NAME)) for step in steps)
