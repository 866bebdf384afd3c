"""The directory of a run in a bucket, where nothing can be renamed or locked.

<directory>/<step>/commit_success.txt   the last file of a step: without it the step is not there
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from etils import epath
from etils.epath import backend

from ckptmgr import paths
from ckptmgr.catalog import COMMITTED, DAMAGED, STEP, Catalog


def open_catalog(directory: epath.Path, read_stock: Any) -> Catalog:
    """What lies in a run directory, on a disk or in a bucket."""
    kind = Catalog if paths.is_local(directory) else Bucket
    return kind(directory, read_stock)


class Bucket(Catalog):
    """What lies in one run directory of a bucket."""

    can_replace = False

    def prepare(self) -> None:
        """Does nothing: there are no directories, and whether it can be written to is found out by writing."""

    def has(self, step: int) -> bool:
        self._look_anew()
        return super().has(step)

    def _is_step(self, name: str) -> bool:
        return bool((self.directory / name / COMMITTED).exists())

    def _is_somebodys(self, step: int) -> bool:
        return False  # a save that was interrupted looks the same, and may be done again

    def identity(self, step: int) -> None:
        return None

    def stamp(self, step: int) -> None:
        return None  # it would be a request for each step, at each look

    def what_is_missing(self, step: int) -> None:
        return None  # it would be requests for each step

    def closed(self) -> list[int]:
        return []

    def draft(self, step: int) -> epath.Path:
        return self.path(step)

    def publish(self, step: int) -> None:
        """Does nothing: the marker has made it a step."""

    def set_aside(self, step: int) -> epath.Path:
        self.forget(step)
        aside = self.directory / f"{step}{DAMAGED}{time.time_ns()}"
        client = self._client()
        source = client._strip_protocol(str(self.path(step)))
        for name in client.find(source):
            client.cp_file(name, f"{aside}{name.removeprefix(source)}")
        client.rm(source, recursive=True)
        return aside

    def leftovers(self) -> list[tuple[epath.Path, str]]:
        """Without a lock only what is older than the newest step is known to be nobody's."""
        good = self.steps()
        found = [int(name) for name in self._entries() if STEP.fullmatch(name)]
        stale = [step for step in sorted(found) if good and step not in good and step < good[-1]]
        why = "a save or a deletion that was interrupted"
        return super().leftovers() + [(self.path(step), why) for step in stale]

    def _hide(self, step: int) -> epath.Path:
        (self.path(step) / COMMITTED).unlink()
        return self.path(step)

    def _entries(self) -> Mapping[str, bool]:
        """What is in it; what is a directory is not asked, which would be a request for each.

        Some clients list the directory itself, which may have the name of one of its steps: paths tell them apart.
        """
        self._look_anew()
        client = self._client()
        own = client._strip_protocol(str(self.directory))
        try:
            found = [path.rstrip("/") for path in client.ls(own, detail=False)]
        except FileNotFoundError:
            return {}
        return {path.rpartition("/")[2]: True for path in found if path != own}

    def _look_anew(self) -> None:
        """Makes the client forget what it has listed: others write there too."""
        self._client().invalidate_cache()

    def _client(self) -> Any:
        return backend.fsspec_backend.fs(str(self.directory))
