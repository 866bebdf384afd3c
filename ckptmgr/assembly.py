"""The parts of a CheckpointManager, put together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from ckptmgr import clock as clocks
from ckptmgr import options as checked
from ckptmgr.format import paths
from ckptmgr.options import Options
from ckptmgr.processes import signals
from ckptmgr.processes.job import Job
from ckptmgr.restoring.restorer import Restorer
from ckptmgr.run import opening
from ckptmgr.run.catalog import Catalog, open_catalog
from ckptmgr.run.history import History
from ckptmgr.run.journal import Journal
from ckptmgr.run.lock import Shared, Writer
from ckptmgr.run.nearby import Nearby
from ckptmgr.saving import aftermath
from ckptmgr.saving.local_saves import LocalSaver
from ckptmgr.saving.queue import Pending
from ckptmgr.saving.saver import Saver


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What a manager consists of."""

    options: Options
    directory: epath.Path
    catalog: Catalog
    history: History
    journal: Journal
    job: Job
    shared: Shared
    writer: Writer | None
    """None for a reader."""
    pending: Pending
    aftermath: aftermath.Aftermath
    restorer: Restorer
    saver: Saver
    local: LocalSaver | None
    """None without `local=`."""


def assemble(path: str | os.PathLike[str], given: Mapping[str, Any]) -> Parts:
    """Checks the options, opens the run, and makes the parts; `given` are the arguments of CheckpointManager."""
    options = checked.check(given)
    clock = clocks.Clock(options.clock)
    directory = paths.resolve(path)
    aftermath.check_beside(options, directory)
    catalog = open_catalog(directory)
    history = History(catalog, options.keep)
    name, job, saving, mirroring, writer = _open(directory, catalog, options)
    shared = writer.shared if writer is not None else Shared()
    catalog.share_damage(shared.damaged)
    pending = Pending(options.timeout_s, saving, shared)
    journal = Journal(directory, clock.wall, writes=not options.read_only and job.leads)
    after = aftermath.Aftermath(options, catalog, history, job, mirroring, journal, shared, writer)
    nearby = _open_local(options, directory, job, name, writer)
    restorer = Restorer(
        catalog, history, after.mirror, job, journal, options.timeout_s, options.max_host_bytes, nearby
    )
    local = LocalSaver(options, clock, history, nearby) if nearby is not None else None
    saver = Saver(options, clock, catalog, history, job, shared, writer, pending, after, local)
    if not options.read_only:
        signals.drain_on_sigterm()
        after.update_mirror()  # an earlier process may have left steps to copy
        if not paths.is_local(directory):
            saver.look_ahead()
    return Parts(
        options=options, directory=directory, catalog=catalog, history=history, journal=journal, job=job,
        shared=shared, writer=writer, pending=pending, aftermath=after, restorer=restorer, saver=saver,
        local=local,
    )  # fmt: skip


def _open(directory: epath.Path, catalog: Catalog, options: Options) -> tuple[str, Job, Job, Job, Writer | None]:
    """The lines of calls of a manager, of its thread and of its mirror, their name, and the right to write."""
    if options.read_only:  # a reader may be opened in one process of a job alone
        line = Job("", options.timeout_s, alone=True)
        return "", line, line, line, None
    name, writer = opening.open_run(directory, catalog, options.timeout_s)
    mirroring = Job(f"{name}/mirror", options.timeout_s / 2)  # half: who waits for a copy sees it end all the same
    return name, Job(name, options.timeout_s), Job(f"{name}/saving", options.timeout_s), mirroring, writer


def _open_local(
    options: Options, directory: epath.Path, job: Job, name: str, writer: Writer | None
) -> Nearby | None:
    if options.local is None or writer is None:
        return None
    saving = Job(f"{name}/local", options.timeout_s)
    try:
        return Nearby(options.local, directory, options.local_copies, job, saving)
    except BaseException:
        writer.release()
        raise
