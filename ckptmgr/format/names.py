"""Names of files: ours in a run, and the names that others give to steps.

Others name a step `run_9` (Orbax's step_prefix, flax), `000009` (zero-padded) or `ckpt-9`. Orbax's manager gets
the form as an option. ckptmgr finds it: all steps of a run have one prefix, then digits. A prefix with a dot
belongs to an unfinished checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

OURS = ".ckptmgr"
"""The folder for everything of ours that is not a step. Outside of it ckptmgr renames and removes steps only."""
LOCK = f"{OURS}/lock"
JOURNAL = f"{OURS}/journal.jsonl"
RUN = f"{OURS}/run"
"""The name of the run itself, by which local directories know it (`local=`)."""
TOKEN = f"{OURS}/shared"
"""A file that every process of a job must find when the run is opened."""
VERSION = f"{OURS}/version"
"""A file that shows that the files of version 1 have been moved."""
SAVING = f"{OURS}/saving"
DELETING = f"{OURS}/deleting"
REDUCING = f"{OURS}/reducing"
"""Steps that lose the items which `params_only` does not keep."""
REPLACED = f"{OURS}/replaced"
DAMAGED = f"{OURS}/damaged"
ABANDONED = f"{OURS}/abandoned"
"""Steps that a rewind has set aside."""
REWINDING = f"{OURS}/rewinding"
"""The moves that a rewind has not made yet."""
NEW_TRUST = f"{OURS}/trust.new"
"""A note about a step, until it is whole."""

STEP = re.compile(r"0|[1-9][0-9]*")
PIN = "PINNED"
TRUST = "trust.json"
"""A note in a step: whether somebody trusts it."""
COMMITTED = "commit_success.txt"
"""Orbax's marker; in a bucket, which has no rename, it is the last file of a step."""
STEP_METADATA = "_CHECKPOINT_METADATA"
SIGNATURE = {"ckptmgr": {"format": 1}}
"""In Orbax's metadata of our steps: a step with it and without a manifest has lost its manifest."""
UNFINISHED = ".orbax-checkpoint-tmp"
"""Orbax's ending for unfinished checkpoints."""

_NAME = re.compile(r"(?P<prefix>[^.]*[^.0-9])?(?P<digits>[0-9]{1,18})")


def number(name: str) -> int | None:
    """The number of a step, from its name; None if it is not the name of a step."""
    found = _NAME.fullmatch(name)
    return int(found["digits"]) if found else None


def _prefix(name: str) -> str:
    found = _NAME.fullmatch(name)
    return (found["prefix"] or "") if found else ""


def refuse(steps: Sequence[str]) -> str | None:
    """Why these cannot be the steps of one run; None if they can."""
    by_prefix = {_prefix(name): name for name in sorted(steps)}
    if len(by_prefix) > 1:
        first, second = sorted(by_prefix.values())[:2]
        return (
            f"holds checkpoints with two forms of names, {first} and {second}: these are two runs. Move each run "
            "into its own directory"
        )
    found = [number(name) for name in steps]
    twice = [name for name in sorted(steps) if found.count(number(name)) > 1]
    if not twice:
        return None
    return f"holds one step under several names: {' and '.join(twice)}. Keep one and move the others away"


def newest(steps: Sequence[str]) -> str:
    """The name of the newest step."""
    return max(steps, key=lambda name: number(name) or 0)


def refuse_file(name: str) -> str:
    """How to import a step that is a file, as flax.training.checkpoints writes it."""
    return (
        f"has no step that ckptmgr reads directly: {name} is a msgpack file, as flax writes it. Import it into a "
        f"new run: ckptmgr import NEW_RUN {name} --step {number(name)}"
    )
