"""Names of files: those of ours in a run, and those that others give to steps.

Others name a step `run_9` (Orbax's step_prefix, flax), `000009` (zero-padded) or `ckpt-9`. Orbax's own manager is
told the form; we find it: all steps of a run have one prefix, then digits. A prefix with a dot in it belongs to
what is being written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

OURS = ".ckptmgr"
"""The folder for all of ours in a run that is no step. Outside of it, nothing but steps is renamed or removed."""
LOCK = f"{OURS}/lock"
JOURNAL = f"{OURS}/journal.jsonl"
TOKEN = f"{OURS}/shared"
"""What every process of a job must find while the run is opened."""
VERSION = f"{OURS}/version"
"""Says that what version 1 left beside the steps has been moved."""
SAVING = f"{OURS}/saving"
DELETING = f"{OURS}/deleting"
REPLACED = f"{OURS}/replaced"
DAMAGED = f"{OURS}/damaged"
ABANDONED = f"{OURS}/abandoned"
"""Steps that a rewind has set aside."""
REWINDING = f"{OURS}/rewinding"
"""What a rewind has still to move."""

STEP = re.compile(r"0|[1-9][0-9]*")
PIN = "PINNED"
COMMITTED = "commit_success.txt"
"""Orbax's marker, the last file of a step where nothing can be renamed."""
STEP_METADATA = "_CHECKPOINT_METADATA"
SIGNATURE = {"ckptmgr": {"format": 1}}
"""In Orbax's metadata of a step of ours: one that has it and no manifest has lost its manifest."""
UNFINISHED = ".orbax-checkpoint-tmp"
"""Orbax's ending for what is being written."""

_NAME = re.compile(r"(?P<prefix>[^.]*[^.0-9])?(?P<digits>[0-9]{1,18})")


def number(name: str) -> int | None:
    """The step that a name stands for; None if it is no name of a step."""
    found = _NAME.fullmatch(name)
    return int(found["digits"]) if found else None


def _prefix(name: str) -> str:
    found = _NAME.fullmatch(name)
    return (found["prefix"] or "") if found else ""


def refuse(steps: Sequence[str]) -> str | None:
    """Why these are not the steps of one run; None if they are."""
    by_prefix = {_prefix(name): name for name in sorted(steps)}
    if len(by_prefix) > 1:
        first, second = sorted(by_prefix.values())[:2]
        return (
            f"holds checkpoints named as {first} is and as {second} is: these are two runs. Move each into a "
            "directory of its own"
        )
    found = [number(name) for name in steps]
    twice = [name for name in sorted(steps) if found.count(number(name)) > 1]
    return f"holds one step under several names: {' and '.join(twice)}. Move all but one away" if twice else None


def newest(steps: Sequence[str]) -> str:
    """The name of the newest step."""
    return max(steps, key=lambda name: number(name) or 0)


def refuse_file(name: str) -> str:
    """What to do with a step that is a file, as flax.training.checkpoints writes it."""
    return (
        f"has no step that ckptmgr reads as it is: {name} is a file of msgpack, as flax writes it. Import it into "
        f"a new run: ckptmgr import NEW_RUN {name} --step {number(name)}"
    )
