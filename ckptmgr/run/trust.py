"""The note in a step that says whether somebody trusts it: JSON, with who wrote it, when, and why.

A note outweighs the manifest, which says what `nonfinite="distrust"` has found in the step as it was saved.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import socket
from typing import Any

from ckptmgr.format import names


def distrusting(why: str, time: float) -> bytes:
    """A note that a step is distrusted."""
    return _note({"trusted": False, "why": why}, time)


def trusting(time: float) -> bytes:
    """A note that a step is trusted, whatever its manifest says."""
    return _note({"trusted": True}, time)


def _note(said: dict[str, Any], time: float) -> bytes:
    user = None
    with contextlib.suppress(Exception):  # a container may have no name for its user
        user = getpass.getuser()
    who = {"user": user, "host": socket.gethostname(), "pid": os.getpid(), "time": time}
    return json.dumps(said | who).encode() + b"\n"


def why_distrusted(note: bytes) -> str | None:
    """Why a step with this note is distrusted; None if it is trusted. What says neither is no reason to trust."""
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(note)
        if isinstance(said, dict) and said.get("trusted") is True:
            return None
        if isinstance(said, dict) and isinstance(said.get("why"), str) and said["why"]:
            return str(said["why"])
    return f"its {names.TRUST} does not say why"
