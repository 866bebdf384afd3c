"""What a run is, whatever its directory is called: by this the parts on other machines know it (`local=`).

`.ckptmgr/run` holds a random name, and the time since which local saves count, in milliseconds since the epoch:
those from before the last rewind do not.
"""

from __future__ import annotations

import re
import secrets
import zlib
from collections.abc import Callable
from typing import NamedTuple

from etils import epath

from ckptmgr.errors import CheckpointError
from ckptmgr.format import files, names, objects, paths


class Identity(NamedTuple):
    """The name of a run, and since when its local saves count."""

    name: str
    since: int


def read(home: epath.Path) -> Identity | None:
    """None if no local save was ever made. Raises CheckpointError if the file is damaged."""
    try:
        data = paths.read_bytes(home / names.RUN)
    except FileNotFoundError:
        return None
    found = re.fullmatch(rb"([0-9a-f]{16}) ([0-9]{1,18})", data)
    if found is None:
        raise CheckpointError(
            f"{home / names.RUN} is damaged: it says {data[:40]!r}, not the name of a run and a time. Remove the "
            "file: the run gets a new name then, and local saves that were made before do not count"
        )
    return Identity(found[1].decode(), int(found[2]))


def find(home: epath.Path) -> Identity:
    """The identity of a run; it is made if there is none. A run that was copied or moved is another run."""
    found = read(home)
    if found is None:
        found = Identity(secrets.token_hex(8), 0)
        _write(home, found)
    return found._replace(name=f"{found.name}-{zlib.crc32(str(home).encode()):08x}")


def cut(home: epath.Path, now: Callable[[], float]) -> None:
    """From now on no local save counts that was made before."""
    found = read(home)
    if found is not None:
        _write(home, found._replace(since=max(found.since + 1, int(1000 * now()))))


def _write(home: epath.Path, identity: Identity) -> None:
    data = f"{identity.name} {identity.since}".encode()
    if paths.is_local(home):
        files.replace(home / names.RUN, data)
    else:
        objects.write(home / names.RUN, data)
