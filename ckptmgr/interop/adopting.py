"""Gives steps of stock Orbax a manifest. From then on their files are checked as those of our own steps are."""

from __future__ import annotations

import dataclasses
import os

from etils import epath

from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format import files, paths, recorded
from ckptmgr.format import manifest as manifests
from ckptmgr.run import verifying
from ckptmgr.run.catalog import Catalog, open_catalog


def adopt(run: str | os.PathLike[str]) -> list[int]:
    """Reads every array of each step without a manifest, then writes the manifest; returns these steps.

    From now on every change is detected; a change before that cannot be.
    Raises CorruptCheckpointError for a step that cannot be read; earlier steps stay adopted.
    """
    catalog = open_catalog(paths.resolve(run))
    return [step for step in catalog.steps() if _adopt(catalog, step)]


def without_manifest(run: str | os.PathLike[str]) -> list[int]:
    """The steps of a run that `adopt` would give a manifest."""
    catalog = open_catalog(paths.resolve(run))
    return [step for step in catalog.steps() if not (catalog.path(step) / manifests.NAME).exists()]


def _adopt(catalog: Catalog, step: int) -> bool:
    directory = catalog.path(step)
    if (directory / manifests.NAME).exists():
        return False
    manifest = catalog.manifest(step)
    report = verifying.verify(manifest, directory, None)
    if not report:
        raise CorruptCheckpointError(f"step {step} gets no manifest: {report}", step=step)
    found = recorded.record_files(directory, files.walk(directory)[1], lambda name, size: False)
    _write(directory, manifests.encode(dataclasses.replace(manifest, files=found)))
    catalog.forget(step)
    return True


def _write(directory: epath.Path, data: bytes) -> None:
    """Writes the manifest atomically."""
    if not paths.is_local(directory):
        files.write(directory / manifests.NAME, data)  # an object appears as a whole
        return
    paths.refuse_link(directory)
    unfinished = directory / f".{manifests.NAME}.part"
    files.write(unfinished, data)
    unfinished.rename(directory / manifests.NAME)
    files.sync([directory])
