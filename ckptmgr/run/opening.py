"""Opening a run for writing: one process claims it, and all must see the same directory."""

from __future__ import annotations

import secrets
import time

from etils import epath

from ckptmgr.errors import SaveError
from ckptmgr.format import names, paths
from ckptmgr.processes import job
from ckptmgr.processes.job import Call, Job
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lock import Writer

_PATIENCE_S = 30.0  # a network file system may show a new file late


def open_run(directory: epath.Path, catalog: Catalog, timeout_s: float) -> tuple[str, Writer]:
    """Claims a run in all processes or in none; also returns a name for the calls that they make about it."""
    line = job.shared("opening", timeout_s)
    call, claimed = Call("the opening of a run"), list[Writer]()

    def claim() -> list[str]:
        catalog.prepare()
        claimed.append(Writer(directory, timeout_s=timeout_s / 2))  # the other processes wait for this one
        if claimed[0].is_first:  # no other writer holds the run, so leftovers can be removed
            catalog.tidy(is_alone=True)
        return [job.new_name(), str(directory), _write_token(directory) if line.count > 1 else ""]

    token = ""
    try:
        with line.working():  # process 0 finishes a rewind there, and removes what is left of a save
            name, there, token = line.decide(call, claim)
        if not line.leads:
            claimed.append(Writer(directory, speaks=False))
        line.together(call, lambda: _look_for(token, directory, there, line))
        return name, claimed[0]
    except BaseException:
        for each in claimed:
            each.release()
        raise
    finally:
        if line.leads and token:
            (directory / names.TOKEN).unlink(missing_ok=True)


def _write_token(directory: epath.Path) -> str:
    """Writes a file that every process must find in its directory of the run. A bucket is always shared."""
    token = secrets.token_hex(8) if paths.is_local(directory) else ""
    if token:
        with open(directory / names.TOKEN, "w", opener=paths.open_to_write) as file:
            file.write(token)
    return token


def _look_for(token: str, directory: epath.Path, there: str, line: Job) -> None:
    ends = time.monotonic() + min(_PATIENCE_S, line.timeout_s / 2)
    while token and not _has(directory, token):
        if time.monotonic() > ends:
            raise SaveError(
                f"the directory is not shared: process {line.index} does not find in {directory} the file that "
                f"process 0 has written into {there}. All processes of a job need one shared directory",
                step=None,
            )
        time.sleep(0.05)


def _has(directory: epath.Path, token: str) -> bool:
    try:
        return paths.read_bytes(directory / names.TOKEN) == token.encode()
    except OSError:
        return False
