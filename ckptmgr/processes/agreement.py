"""What all processes must agree on before they save: each describes its leaves, and the descriptions are compared.

Digests are compared at every save. The descriptions themselves, a line for each leaf, are sent only if the digests
differ: then the error names the first leaf that differs.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a process is about to save. All processes must be about to save the same."""

    digest: str
    lines: Callable[[], Sequence[str]]
    """A line for each leaf: its path, a tab, and what it is."""
    owners: Sequence[int]
    """For each leaf the process that holds it, as this process sees it; -1 if every process has one."""
    own: Sequence[str]
    """Digests of the values of which each process may have its own."""
    settle: Callable[[Sequence[int], Sequence[bool]], None]
    """Called with the owners as process 0 sees them, and for each value in `own` with whether it differs."""

    def summary(self) -> list[str]:
        return [self.digest, digest(json.dumps(self.owners)), *self.own]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def compress(lines: Sequence[str]) -> str:
    return base64.b64encode(zlib.compress("\n".join(lines).encode())).decode()


def decompress(text: str) -> list[str]:
    return zlib.decompress(base64.b64decode(text)).decode().split("\n")


def first_difference(found: Sequence[Sequence[str]]) -> str:
    """The first line that differs, and in which processes it does; `found` has the lines of each process."""
    others = [index for index, lines in enumerate(found) if lines != found[0]]
    ours, theirs = (dict(line.split("\t", 1) for line in found[index] if line) for index in (0, others[0]))
    differing = [path for path in {**ours, **theirs} if ours.get(path) != theirs.get(path)]
    path = min(differing, key=lambda path: " " in path.partition("[")[0], default="the order of the leaves")
    return (
        f"The first difference is {path}: {ours.get(path, 'missing')} in process 0, "
        f"{theirs.get(path, 'missing')} in {spell(others)}"
    )


_NAMED = 16
"""How many processes a message names: of a thousand nobody reads more."""


def spell(processes: Sequence[int]) -> str:
    named = ", ".join(map(str, processes[:_NAMED]))
    more = f" and {len(processes) - _NAMED} more" if len(processes) > _NAMED else ""
    return f"process{'es' * (len(processes) > 1)} {named}{more}"
