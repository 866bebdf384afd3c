"""Who writes into a run, as the lock on a disk and the claim in a bucket say it."""

from __future__ import annotations

import datetime
import json
import os
import socket
from pathlib import Path
from typing import Any

from ckptmgr.errors import SaveError


def describe() -> dict[str, Any]:
    """This process, for people to read."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": now}


def spell(owner: bytes) -> str:
    try:
        said: dict[str, Any] = json.loads(owner)
        return f"process {said['pid']} on {said['host']} since {said['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def refuse(run: str, owner: bytes) -> SaveError:
    """The error for a second writer."""
    return SaveError(
        f"{run} is being written to by {spell(owner)}; a run has one writer. Wait "
        "until that process ends, or open the directory with read_only=True",
        step=None, holder=spell(owner),
    )  # fmt: skip


def machine() -> str:
    """Tells where the number of a process means the same: this start of this system, and this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
