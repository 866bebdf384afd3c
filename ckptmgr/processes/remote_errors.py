"""Errors as they travel: what one process raises is raised in all, with the same type and attributes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ckptmgr import errors
from ckptmgr.errors import CheckpointError, CheckpointTimeoutError

Packed = Mapping[str, Any]
"""An error as JSON."""


class OtherProcessError(CheckpointError):
    """Something failed in another process of the job; `kind` is the name of the error's type there."""

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


def pack(problem: Exception | None, here: int) -> Packed | None:
    """The error of process `here` as JSON; attributes that JSON cannot hold are left out."""
    if problem is None:
        return None
    attributes = {name: value for name, value in vars(problem).items() if not name.startswith("_")}
    attributes = {name: value for name, value in attributes.items() if _is_json(value)}
    return {
        "kind": type(problem).__name__,
        "message": str(problem),
        "attributes": attributes,
        "process": here,
    }


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def unpack(packed: Packed, here: int) -> Exception:
    """The error as another process raised it. It keeps a type of ours, ValueError and TypeError."""
    message, name = packed["message"], packed["kind"]
    if packed["process"] != here:
        message = f"process {packed['process']}: {message}"
    kind = getattr(errors, name, None) or {"ValueError": ValueError, "TypeError": TypeError}.get(name)
    try:
        return kind(message, **packed["attributes"])  # type: ignore[misc]
    except TypeError:
        return OtherProcessError(message, kind=name)


def is_timeout(packed: Packed | None) -> bool:
    return packed is not None and packed["kind"] == CheckpointTimeoutError.__name__
