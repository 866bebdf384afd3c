"""The work at risk: what a run would have lost if it had stopped, at each moment, from its journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Peak(NamedTuple):
    """A save that became durable, and what was at risk until then."""

    at: float
    """When it was durable, in seconds since the epoch."""
    before_s: float
    """Work at risk just before: the time since the durable save before was begun, or since the run was resumed."""
    after_s: float
    """Work at risk just after: the time since this save was begun."""
    steps: int
    """Steps at risk just before."""
    step: int
    """The step that was saved."""


def peaks(events: Sequence[Mapping[str, Any]]) -> list[Peak]:
    """The durable saves of a run, in the order of its journal.

    The first save is left out if the journal does not tell when the run began. A run that stands still loses no
    work, so a restore or a rewind begins anew.
    """
    found: list[Peak] = []
    since: tuple[float, int] | None = None
    for event in events:
        if event["event"] == "saved":
            took_s = max(0.0, event.get("durable_s") or 0.0)
            if since is not None:
                before_s = max(took_s, event["time"] - since[0])
                found.append(
                    Peak(event["time"], before_s, took_s, max(0, event["step"] - since[1]), event["step"])
                )
            since = event["time"] - took_s, event["step"]
        elif event["event"] in ("restored", "rewound"):
            since = event["time"], event["step"]
    return found


def fewer(found: Sequence[Peak], most: int) -> list[Peak]:
    """At most so many: of several saves in a row the one before which most was at risk."""
    each = -(-len(found) // most) or 1
    return [max(found[at : at + each], key=lambda peak: peak.before_s) for at in range(0, len(found), each)]
